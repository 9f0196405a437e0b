"""Runs of the lab: every variant trains, a killed run ends as an unbroken one, records are written once.

Run: pytest tests/model/lab/test_run.py
"""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.errors import UserError
from model.lab import cost, results, scenes, sight
from model.lab import run as lab
from model.lab.twin import RANK
from model.lab.variants import TEXTS, VARIANTS
from model.training import twins
from model.training.scenes import Question
from model.training.tower import PRECISIONS, precision_on
from tests.model.lab.lab_sizes import TINY, job, weights

TOWER = "model.model.vision_tower."


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_two_steps_and_says_what_it_is(workdir, name):
    made = job(name)
    record = json.loads(json.dumps(lab.run(made, workdir)))
    assert results.key_of(record) == made.key()
    assert record["group"] == VARIANTS[name].group and record["steps"] == 2 and record["device"] == "cpu"
    accuracy, text = record["accuracy"], VARIANTS[name].merge in TEXTS
    topics = {"recall"} if text else {"ink", "place"}
    assert set(accuracy) == {"fine", *topics} | ({"by_position"} if text else {"coarse", "by_glyph_px"})
    for topic in topics | ({"coarse"} if not text else set()):
        told = accuracy[topic]
        assert results.unpacked(told["right"], told["n"]).mean() == pytest.approx(told["exact_match"], abs=1e-4)
    assert text or accuracy["ink"]["n"] + accuracy["place"]["n"] == accuracy["fine"]["n"]
    assert set(accuracy["fine"]) == {"n", "exact_match", "characters", "first_character"}
    parts = accuracy["by_position" if text else "by_glyph_px"].values()
    assert accuracy["fine"]["n"] == sum(share["n"] for share in parts) > 0
    assert text or accuracy["coarse"]["n"] > 0
    assert record["cost"]["context"] == {"string": 258, "global-string": 322, "text-full": 258}.get(name, 66)
    assert (record["cost"].pop("tower_flops") > 0) == (not text)
    assert all(math.isfinite(value) and value > 0 for value in record["cost"].values())
    assert "gates" not in record or len(record["gates"]) == 4


def test_marks_by_kind_topic_and_height():
    """Two codes asked by ink and by place; one of the four is wrong, and not in its first character."""
    told = [("ink", 6, (1, 1, 1)), ("place", 6, (1, 0, 1)), ("ink", 8, (1, 1, 1)), ("place", 8, (1, 1, 1))]
    asked = [Question(topic, "?", "A7", "fine", px) for topic, px, _ in told]
    asked.append(Question("exists", "?", "yes", "coarse"))
    right = [torch.tensor(each).bool() for *_, each in told] + [torch.tensor([False, True])]
    assert lab.marks(zip(asked, right, strict=True)) == {
        "fine": {"n": 4, "exact_match": 0.75, "characters": 0.875, "first_character": 1.0},
        "coarse": {"n": 1, "exact_match": 0.0, "right": "00"},
        "ink": {"n": 2, "exact_match": 1.0, "right": "c0"},
        "place": {"n": 2, "exact_match": 0.5, "right": "40"},
        "by_glyph_px": {"6": {"n": 2, "exact_match": 0.5}, "8": {"n": 2, "exact_match": 1.0}},
    }


def test_which_questions_were_right_is_read_back():
    right = [True, False, False, True, True, False, True, False, True]
    assert results.packed(right) == "9a80"  # by hand: 1001 1010 1, then nothing
    assert results.unpacked("9a80", 9).tolist() == right
    for text, n in (("9a80", 17), ("9a80", 8), ("9", 3), ("zz", 8)):
        with pytest.raises(ValueError):
            results.unpacked(text, n)


def test_colour_and_place_ask_for_the_same_codes_in_the_same_order(workdir):
    """What lets the two questions about a code count as one thing, and two variants be compared code by code."""
    tested = scenes.prepare(workdir, TINY.scenes, TINY.validation, TINY.test, device="cpu").test[0]
    for items in tested.items:
        by_topic = {
            topic: [(item.question.answer, item.cells) for item in items if item.question.topic == topic]
            for topic in ("ink", "place")
        }
        assert by_topic["ink"] == by_topic["place"] and len(by_topic["ink"]) <= lab.MOST // 2


def test_what_a_variant_learns_changes_in_training(workdir):
    """Each learned part beyond the reference's gets gradients: gates leave 1, embeddings leave 0."""
    for name, part, start in (
        ("gate", "gates", 1.0),
        ("gate-channel", "gates", 1.0),
        ("layer-positions", "positions", 0.0),
    ):
        lab.run(job(name), workdir)
        assert (weights(job(name), workdir)["twin"][part] != start).any(), name


def test_the_tower_changes_where_it_is_tuned_and_nowhere_else(workdir):
    """Training changes the low-rank part of every matrix and nothing of the weights that it starts from."""
    frozen = scenes.load_tower().tower.state_dict()
    matrices = {name for name, value in frozen.items() if value.ndim == 2 and "layers" in name}
    for name in ("none-tuned", "deepstack-v-1", "taps-1"):
        lab.run(job(name), workdir)
        kept = weights(job(name), workdir)["twin"]
        tower = {label.removeprefix(TOWER): value for label, value in kept.items() if label.startswith(TOWER)}
        tuned = VARIANTS[name].tuned
        ups = {label.replace(".parametrizations", "").removesuffix(".0.up") for label in tower if label.endswith(".up")}
        assert ups == (matrices if tuned else set())
        for label, start in frozen.items():
            if label in ups:
                layer = label.removesuffix("weight") + "parametrizations.weight"
                assert torch.equal(tower[f"{layer}.original"], start)
                assert tower[f"{layer}.0.up"].shape == (len(start), RANK) and tower[f"{layer}.0.up"].any(), label
            else:
                assert torch.equal(tower[label], start), label


def test_the_views_show_what_the_features_were_made_of(workdir):
    """The same scenes in the same order: the tower makes the cached features of them, and they are asked the same."""
    sizes = (TINY.scenes, TINY.validation, TINY.test)
    with_features = scenes.prepare(workdir, *sizes, device="cpu").test
    with_views = scenes.prepare(workdir, *sizes, device="cpu", pixels=True).test
    assert with_features[0].items == with_views[0].items
    own = scenes.load_tower().tower
    for name, part in (("none-tuned", slice(0, 64)), ("taps-0", slice(128, 384))):
        with torch.no_grad():
            seen = sight.see(own, VARIANTS[name], with_views[1]).reshape(TINY.test, -1, own.config.hidden_size)
        torch.testing.assert_close(seen, with_features[1][:, part].float(), atol=2e-3, rtol=2e-3)


def test_the_towers_work_is_counted_by_what_a_variant_reads(workdir):
    """One view, one and part of four, four, five; a tap more costs the tower nothing."""
    names = ("none", "none-tuned", "deepstack-v-0", "deepstack-v-3", "taps-0", "taps-3", "string", "stack-2d")
    costs = {name: lab.run(job(name), workdir)["cost"] for name in names}
    one, *rest = (costs[name]["tower_flops"] for name in names)
    assert [round(work / one, 1) for work in rest] == [1.0, 1.1, 3.4, 4.0, 4.0, 4.0, 5.0]
    assert costs["none"]["prefill_flops"] == costs["none-tuned"]["prefill_flops"]
    assert costs["deepstack-v-3"]["prefill_flops"] == costs["none"]["prefill_flops"]


def test_the_work_of_a_step_is_counted_forward_and_backward(workdir):
    """By hand for one matrix: forward, and back to the weights and to what entered. A tuned tower runs forward and back
    for each of its two scenes, where a frozen one's features are read."""
    matrix, entered = torch.nn.Linear(3, 5), torch.rand(7, 3)
    assert cost.flops(lambda: matrix(entered).sum().backward()) == 2 * (2 * 7 * 3 * 5)
    entered.requires_grad_()
    assert cost.flops(lambda: matrix(entered).sum().backward()) == 3 * (2 * 7 * 3 * 5)
    frozen, tuned = (lab.run(job(name), workdir)["cost"] for name in ("none", "none-tuned"))
    towers = (tuned["step_flops"] - frozen["step_flops"]) / tuned["tower_flops"] / TINY.batch
    assert 2.5 < towers < 3.5


class Killed(Exception):
    pass


def killer(at: int):
    """Progress that ends the run before step `at` is saved."""

    def progress(share: float, words: str):
        if f"step {at} of" in words:
            raise Killed

    return progress


# among the steps without questions, and after them; budgets by question draw by chance in the first ones
KILLED = [("gate", 3), ("gate", 9), ("deepstack-v-3", 9), ("taps-samples", 9)]
KILLED += [("budget-50-random", 9)]  # right after a score, which draws by chance as well
KILLED += [("budget-50-question", 3), ("budget-50-question", 9), ("text-stack-chunks", 3), ("text-full", 9)]


@pytest.mark.parametrize("name, at", KILLED)
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path, workdir, monkeypatch, name, at):
    monkeypatch.setattr(twins, "SAVE_EVERY", 2)
    monkeypatch.setattr(twins, "SCORE_EVERY", 4)
    made = job(name, steps=10)
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / f"data-{scenes.tower_mark()}").symlink_to(workdir / "lab" / f"data-{scenes.tower_mark()}")
    monkeypatch.setattr(twins, "LOOK_SHARE", 0.5)
    monkeypatch.setattr(twins, "LOOK_BATCH", 3)
    with pytest.raises(Killed):
        lab.run(made, tmp_path, progress=killer(at))
    assert weights(made, tmp_path)["step"] == at - 1
    ended = lab.run(made, tmp_path)
    broken = weights(made, tmp_path)
    lab.forget(made, tmp_path)
    record = lab.run(made, tmp_path)
    curve = (made.folder(tmp_path) / "curve.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in curve if "chars" in line] == [8, 10]
    assert ended["accuracy"] == record["accuracy"] == lab.run(made, tmp_path)["accuracy"]
    unbroken = weights(made, tmp_path)
    assert broken["step"] == unbroken["step"] == 10
    assert all(torch.equal(broken["twin"][name], value) for name, value in unbroken["twin"].items())


def test_variants_see_the_same_scenes_and_questions_in_the_same_order(workdir, monkeypatch):
    """What is asked at each step does not depend on the variant; how many image rows there are may."""
    asked = {}
    real = twins.Questions.rows

    def rows(self, chosen, rng, *rest):
        found = real(self, chosen, rng, *rest)
        asked.setdefault(name, []).append(found.ids)
        return found

    monkeypatch.setattr(twins.Questions, "rows", rows)
    groups = [("stack-2d", "string", "none", "concat", "deepstack-v-1", "taps-1")]
    groups.append([variant.name for variant in VARIANTS.values() if variant.merge in TEXTS])
    for first, *rest in groups:
        for name in (first, *rest):
            lab.forget(job(name), workdir)
            lab.run(job(name), workdir)
        assert len(asked[first]) >= 2
        for name in rest:
            same = map(torch.equal, asked[name], asked[first])
            assert len(asked[name]) == len(asked[first]) and all(same), name


def test_records_are_written_once(tmp_path):
    file = tmp_path / "lab" / "results.jsonl"
    assert list(results.lines(file)) == []
    one = {"variant": "none", "seed": 0, "steps": 2, "config": {"a": 1}, "hours": 1}
    other = one | {"seed": 1}
    for record in (one, other, one | {"hours": 2}):
        results.write(record, file)
    assert [r for _, r in results.lines(file)] == [other, one | {"hours": 2}]
    assert {path.name for path in file.parent.iterdir()} == {"results.jsonl", "results.lock"}


WRITER = """
import sys, time
from pathlib import Path
from model.lab import results
folder, own = Path(sys.argv[1]), int(sys.argv[2])
(folder / f"begun {own}").write_text("")
while len([*folder.glob("begun *")]) < 2:
    time.sleep(0.01)
for seed in range(200):
    results.write({"variant": "none", "seed": seed, "steps": own, "config": {}}, folder / "results.jsonl")
"""


def test_two_processes_that_write_at_once_lose_no_line(tmp_path):
    """Two hundred lines each, begun together; without a lock one takes the other's file away."""
    root = Path(lab.__file__).resolve().parents[2]
    calls = [[sys.executable, "-c", WRITER, str(tmp_path), str(own)] for own in range(2)]
    writers = [subprocess.Popen(call, cwd=root) for call in calls]
    assert [writer.wait() for writer in writers] == [0, 0]
    found = {(record["steps"], record["seed"]) for _, record in results.lines(tmp_path / "results.jsonl")}
    assert found == {(own, seed) for own in range(2) for seed in range(200)}


def test_the_results_that_ship_are_of_what_the_code_would_run():
    """The same tower, scenes and variants: none was made by something that has changed since."""
    records = [record for _, record in results.lines()]
    assert records
    for record in records:
        (made,) = lab.jobs([record["variant"]], [record["seed"]], lab.SIZES[record["config"]["size"]], record["steps"])
        assert record["config"] == made.config(), made.name


@pytest.mark.parametrize(
    "line, words", [("{", "line 2, is no finished run: it is no JSON. "), ("[]", "line 2, .* it is no JSON object")]
)
def test_a_damaged_file_of_results_is_refused(tmp_path, line, words):
    file = tmp_path / "results.jsonl"
    file.write_text(f"{{}}\n{line}\n")
    with pytest.raises(UserError, match=words):
        list(results.lines(file))


def test_a_run_is_another_where_anything_that_defines_it_differs():
    keys = {job("none").key(), job("dummy").key(), job("none", steps=3).key()}
    keys |= {lab.Job(VARIANTS["none"], TINY, 1, 2).key(), lab.Job(VARIANTS["none"], lab.SIZES["small"], 0, 2).key()}
    keys |= {replace(job("none"), device="cuda").key()}
    assert len(keys) == 6


def test_runs_in_another_precision_or_place_keep_their_own_lines(tmp_path):
    """A run on a GPU, or on a CPU without instructions for bfloat16, replaces none that was made elsewhere."""
    file, line = tmp_path / "results.jsonl", json.loads(job("none").key())
    record = dict(zip(("variant", "seed", "steps", "device", "precision", "config"), line, strict=True))
    for each in (record, record | {"precision": "other"}, record | {"device": "cuda"}, record):
        results.write(each, file)
    assert len(list(results.lines(file))) == 3 and results.key_of(record) == job("none").key()


def test_a_run_computes_in_the_precision_that_it_says(workdir, tmp_path):
    """Whatever this machine is fast in: a number is made again in the precision that its command names."""
    made = [replace(job("none"), precision=each) for each in PRECISIONS]
    records = [lab.run(each, workdir, runs=tmp_path) for each in made]
    assert [record["precision"] for record in records] == ["bfloat16", "float32"]
    low, high = (record["cost"] for record in records)
    assert low["step_flops"] == high["step_flops"] and low["step_bytes"] < high["step_bytes"]
    one, other = (weights(each, tmp_path)["twin"] for each in made)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert job("none").precision == precision_on("cpu")


def test_runs_on_text_do_not_depend_on_pictures():
    """What defines them has neither the tower nor the scenes; what defines the others has nothing of texts."""
    text, other = job("text-full").config(), job("none").config()
    assert {"tower", "side", "glyphs", "scenes_seeds"} == set(other) - set(text)
    assert {"text", "fact", "spread", "texts_seeds"} == set(text) - set(other)


def test_unknown_names_are_refused_with_what_there_is():
    with pytest.raises(UserError, match="no lab variant 'stacks'; there are stack-2d, none"):
        lab.jobs(["stacks"], [0], TINY)
    with pytest.raises(UserError, match="no lab size 'huge'; there are small, large"):
        lab.size_of("huge")
