"""The command `lab`: what it lists and refuses, and runs through Ray that die and go on.

Run: pytest tests/app/test_lab.py
"""

import json
import shutil

import pytest

from app.cli import main
from app.lab import card
from model import loading
from model.catalog import describe_models
from model.lab import many, results, search
from model.lab import run as lab
from model.lab.variants import VARIANTS
from model.training.tower import precision_on
from tests import lab as made_up
from tests.model.lab.lab_sizes import TINY, job


@pytest.fixture
def said(capsys):
    """Runs a command line: (exit status, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["lab", *argv])
        return code, *capsys.readouterr()

    return run


def test_list_names_every_variant_with_its_runs(said, tmp_path):
    file = tmp_path / "results.jsonl"
    results.write({"variant": "dummy", "seed": 3}, file)
    code, out, _ = said("list", "--results", str(file), "--json")
    found = {entry["variant"]: entry for entry in json.loads(out)["variants"]}
    assert code == 0 and set(found) == set(VARIANTS)
    assert found["dummy"]["runs"] == 1 and found["string"]["runs"] == 0
    assert all(found[name]["config"] == variant.config() for name, variant in VARIANTS.items())


@pytest.mark.parametrize(
    "argv, words",
    [
        (["run"], "needs names of variants"),
        (["run", "stacks"], "no lab variant 'stacks'"),
        (["run", "none", "--seeds", "0,x"], "--seeds is 0,x"),
        (["run", "none", "--seeds", "-1"], "--seeds is -1"),
        (["run", "none", "--steps", "0"], "--steps is 0"),
        (["run", "none", "--size", "huge"], "no lab size 'huge'"),
        (["list", "none"], "lab list takes no names, not none"),
        (["search", "none"], "lab search takes no names, not none"),
        (["search", "--budget", "2000"], "two candidates of 2,000 steps each need 3,000 steps"),
        (["run", "start-9-interval-0-count-2"], "no lab variant 'start-9-interval-0-count-2'"),
        (["ship"], "lab ship needs names of variants"),
        (["ship", "none", "--seeds", "0,1"], "lab ship takes the model of one seed, not of 0,1"),
        (["ship", "all"], "lab ship needs names of variants"),
        (["ship", "start-last"], "start-last cannot be shipped"),
        (["list", "--seeds", "x"], "lab list has no use for --seeds; lab run and lab search and lab ship have"),
        (["table", "--steps", "7"], "lab table has no use for --steps"),
        (["run", "none", "--metric", "fine"], "lab run has no use for --metric; lab table"),
        (["run", "none", "--workdir", "/dev/null/x"], "/dev/null/x cannot be used: Not a directory"),
        (["ship", "none", "--workdir", "no-such-folder"], "none 0 has done 0 of 2,000 steps"),
    ],
)
def test_mistakes_are_one_line(said, tmp_path, argv, words):
    code, out, err = said(*argv, "--results", str(tmp_path / "results.jsonl"))
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err


def test_runs_go_through_ray_and_are_written_once(said, tmp_path, monkeypatch):
    """One that reads features from the cache and one that runs the tower on pixels, side by side."""
    monkeypatch.setitem(lab.SIZES, "tiny", TINY)
    file = tmp_path / "results.jsonl"
    argv = ["run", "none", "deepstack-v-3", "--size", "tiny", "--device", "cpu", "--results", str(file)]
    argv += ["--workdir", str(tmp_path / "work"), "--json"]
    code, out, err = said(*argv)
    assert code == 0, err
    assert json.loads(out)["new"] == 2
    lines = file.read_text().splitlines()
    written = {json.loads(line)["variant"]: json.loads(line) for line in lines}
    assert len(lines) == 2 and set(written) == {"none", "deepstack-v-3"}
    assert sorted(json.loads(out)["runs"], key=str) == sorted(written.values(), key=str)
    kinds = {path.name.split(".")[1] for path in (tmp_path / "work").rglob("train-*.pt")}
    assert kinds == {"features", "views"}
    code, out, err = said(*argv)
    assert code == 0 and json.loads(out)["new"] == 0
    assert f"none 0 is in {file} already" in err and f"deepstack-v-3 0 is in {file} already" in err
    assert file.read_text().splitlines() == lines


@pytest.mark.timeout(900)  # Ray starts five times, each in a minute where the machine is busy
def test_a_search_spends_its_budget_and_meets_the_rule_of_thumb(said, tmp_path, monkeypatch):
    """Two candidates, the better goes on; it dies while it is tested, and the same command goes on there; it and the
    rule are tested; another call finds all done."""
    monkeypatch.setitem(lab.SIZES, "tiny", TINY)
    file = tmp_path / "results.jsonl"
    argv = ["search", "--size", "tiny", "--steps", "4", "--budget", "6", "--device", "cpu", "--results", str(file)]
    argv += ["--workdir", str(tmp_path / "work")]
    real = many.through_ray
    with monkeypatch.context() as patch:
        dead = [(0, many.Died("of old age"))]
        patch.setattr(many, "through_ray", lambda fn, *rest: dead if fn is search.finish else real(fn, *rest))
        code, _, err = said(*argv)
    assert code == 2 and f"died {many.RETRIES + 1} times (of old age); the same command goes on" in err
    assert not (tmp_path / "search.jsonl").exists() and not file.exists()
    code, out, err = said(*argv)
    assert code == 0 and "2 runs, 2 of them there already" in err, err
    (line,) = (tmp_path / "search.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["spent"] == 6 and [len(rung["ranking"]) for rung in record["rungs"]] == [2, 1]
    assert {each["variant"] for _, each in results.lines(file)} == {record["winner"], "stack-2d"}
    assert "6 of 6 steps spent on 2 of 49 placements" in out and "at step 2:" in out and "stack-2d" in out
    table = said("table", "--results", str(file))[1]
    assert f"search, tiny, 4 steps on cpu in {precision_on('cpu')}, seed 0: " in table and "at step" not in table
    before = file.read_text()
    code, out, err = said(*argv, "--json")
    assert code == 0 and json.loads(out)["rungs"] == record["rungs"] and file.read_text() == before
    assert len((tmp_path / "search.jsonl").read_text().splitlines()) == 1


def test_a_card_says_whether_the_tower_was_trained():
    """Of two runs as they shipped: one reads the frozen tower, one changed it, and its changes lie beside the card."""
    frozen, changes = "the frozen vision tower is that of `embedded/hires`", "tower_change.safetensors"
    for name, tuned in (("dummy", False), ("deepstack-v-3", True)):
        folder = loading.CHECKPOINTS / f"lab-{name}"
        record = json.loads((folder / "recipe.json").read_text())
        (made,) = lab.jobs([name], [record["seed"]], lab.SIZES["small"], record["steps"])
        text = card(made, record)
        assert (frozen in text) != tuned and (changes in text) == tuned == (folder / changes).exists()


def test_the_table_stands_beside_the_papers_and_can_be_taken_away(said, tmp_path):
    file = made_up.write(tmp_path / "results.jsonl")
    code, out, _ = said("table", "--results", str(file), "--out", str(tmp_path / "taken"))
    assert code == 0 and out.startswith("2,000 steps on cpu: fine detail, exact match")
    rows, told = out.split("What the paper claims:")
    assert "contradicted: A sample should cover the whole image" in told
    assert "    stack-2d above stack-grid: fails, -10.0 points" in told
    lines = {line.split()[0]: line.split() for line in rows.splitlines() if line}
    assert (
        lines["dummy"][:4] == ["dummy", "3", "11.0", "(11.0,"]
        and "agrees" in lines["dummy"]
        and "49.1" in lines["dummy"]
    )
    names = {path.name for path in (tmp_path / "taken").rglob("*.*")}
    assert {"lab-variants.csv", "lab-recall.csv", "lab-axes.svg", "lab-cost.png"} <= names and len(names) == 15
    assert "text-truncated" in lines["text-full"]
    code, out, _ = said("table", "--results", str(file), "--metric", "coarse", "--json")
    (row,) = [row for row in json.loads(out) if row["variant"] == "string"]
    assert code == 0 and row["mean"] == pytest.approx(0.9) and row["context"] == 162
    code, out, err = said("table", "--results", str(tmp_path / "none.jsonl"))
    assert code == 2 and "There are no results" in err and "lab run stack-2d" in err
    code, out, err = said("table", "--results", str(file), "--metric", "beauty")
    assert code == 2 and "choose of fine" in err


def test_a_finished_run_is_shipped_with_its_card_and_can_be_asked(said, tmp_path, monkeypatch):
    """From `lab run` to a folder beside the embedded models, named last, whose card has the numbers of its run."""
    monkeypatch.setitem(lab.SIZES, "tiny", TINY)
    work, file, out = tmp_path / "work", tmp_path / "results.jsonl", tmp_path / "checkpoints"
    made = job("dummy")
    record = lab.run(made, work)
    options = ["--size", "tiny", "--device", "cpu", "--results", str(file), "--workdir", str(work), "--out", str(out)]
    code, _, err = said("ship", "dummy", *options)
    assert code == 2 and f"dummy 0 has no line in {file}" in err and not out.exists()
    results.write(record, file)
    code, stdout, err = said("ship", "dummy", *options, "--json")
    assert code == 0, err
    (found,) = json.loads(stdout)["shipped"]
    assert found["variant"] == "dummy" and found["folder"] == str(out / "lab-dummy") and found["bytes"] < 4_000_000
    card = (out / "lab-dummy" / "README.md").read_text()
    share = record["accuracy"]["coarse"]["exact_match"]
    assert f"| coarse | {record['accuracy']['coarse']['n']} | {100 * share:.1f} % |" in card
    where = f"--seeds 0 --size tiny --steps 2 --device cpu --precision {made.precision}"
    assert f"python -m app lab run dummy {where} --again\n" in card  # whose line is in the results
    assert f"python -m app lab ship dummy {where}\n" in card
    elsewhere = [*options[:-4], "--workdir", str(tmp_path / "elsewhere")]
    code, _, err = said("ship", "dummy", *elsewhere, "--steps", "2")
    assert code == 2 and f"or train it with python -m app lab run dummy {where} --again." in err
    assert json.loads((out / "lab-dummy" / "recipe.json").read_text()) == record
    for name in ("taps", "hires"):
        shutil.copytree(loading.CHECKPOINTS / "hires", out / name)
    monkeypatch.setattr(loading, "CHECKPOINTS", out)
    assert loading.embedded_names() == ["embedded/hires", "embedded/taps", "embedded/lab-dummy"]
    assert loading.load("embedded/lab-dummy").trained == "trained with the global view for every stack"
    assert [row.name for row in describe_models() if row.here] == loading.embedded_names()
    assert len([*out.iterdir()]) == 3
