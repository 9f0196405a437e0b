"""Golden traces: faults are really run, in another engine of the same weights, and must be called by their names.

No number of a record is edited for these: a faulty variant of the engine or model runs and writes its own record, and a
healthy engine judges what is on disk. Run: pytest tests/app/test_golden.py
"""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from analysis.golden import signs
from app.cli import main
from app.golden import judged, read, record, write
from model.errors import UserError
from model.images import read_image
from model.plan import Plan
from model.types import Sampling
from tests import families, tiny
from tests.model.families.test_video import reader
from tests.videos import video

QUESTION = "What does the sign say?"
TAPS = (1, 3)  # of the four vision blocks: each has an untapped block before it


@pytest.fixture(scope="module")
def taps(tmp_path_factory):
    """A Qwen3-VL folder whose taps have neighbours that are not tapped."""
    return tiny.qwen3_vl_folder(tmp_path_factory.mktemp("taps"), taps=TAPS)


@pytest.fixture(scope="module")
def folders(taps):
    return {"qwen": tiny.folder("qwen"), "hires": tiny.folder("hires"), "taps": taps}


@pytest.fixture(scope="module")
def healthy(folders):
    return {kind: tiny.build(folder, name=kind) for kind, folder in folders.items()}


@pytest.fixture
def faulty(folders):
    """An engine of its own to break, by kind."""
    return lambda kind, **given: tiny.build(folders[kind], name=f"faulty {kind}", **given)


@pytest.fixture
def judge(healthy, tmp_path):
    """Runs an engine under a plan, writes its record, and has the healthy engine of `kind` judge what is on disk."""

    def run(kind, engine, plan=None, images=None, tolerance=None):
        plan = engine.layout.default if plan is None else Plan.parse(plan)
        images = images or [tiny.image(0, (64, 48))]
        prompt = engine.prompt(tiny.ask(*images, QUESTION))
        answer = engine.answer(prompt, plan, Sampling(max_new_tokens=4))
        golden = record(engine, prompt, plan, [token.id for token in answer.tokens])
        golden.about["question"] = QUESTION
        write(golden, tmp_path / "theirs")
        return judged(healthy[kind], read(tmp_path / "theirs"), tolerance)

    return run


def only(verdict):
    """The one thing that is wrong."""
    assert [finding.kind for finding in verdict.findings] == [verdict.findings[0].kind], verdict.findings
    return verdict.findings[0]


KINDS = ("qwen", "hires", "taps")
PLANS = {"qwen": "base@0,0@1,1@2,2@3", "hires": "base@0,0@1,1@2,2@3,3@4", "taps": "base@0,0@1,1@2"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_agrees(judge, faulty, kind):
    verdict = judge(kind, faulty(kind))
    assert verdict.ok and max(verdict.figures["outputs"]) == 0.0 and max(verdict.figures["logits"]) == 0.0


@pytest.mark.parametrize("kind", ["single", "concat"])
def test_models_without_stacks_have_records_too(kind, tmp_path):
    engine = tiny.engine(kind)
    prompt = engine.prompt(tiny.ask(tiny.image(0, (40, 32)), QUESTION))
    write(record(engine, prompt, engine.layout.default, []), tmp_path)
    assert judged(engine, read(tmp_path)).ok
    write(record(engine, prompt, Plan(), []), tmp_path)
    assert only(judged(engine, read(tmp_path))).where == {"stacks": ["base"], "layers": [0]}


@pytest.mark.parametrize("kind", KINDS)
def test_several_images_agree_and_a_text_only_prompt_too(judge, faulty, kind):
    same = tiny.image(1)
    assert judge(kind, faulty(kind), images=[tiny.image(0, (64, 48)), same, same]).ok
    engine = tiny.engine("qwen")
    prompt = engine.prompt(tiny.ask("How many red circles are there?"))
    golden = record(engine, prompt, engine.layout.default, [])
    golden.about["question"] = "How many red circles are there?"
    assert golden.inputs.shape == (6, len(golden.ids), 16) and golden.stacks["0"].shape == (0, 16)


def test_stacks_that_are_zero_for_this_picture_are_not_missing(judge, faulty):
    # A wide picture has two tiles, so two of the four samples are zeros: whether they are added cannot be seen.
    assert judge("hires", faulty("hires"), images=[tiny.image(0, (64, 20))]).ok
    found = only(judge("hires", faulty("hires"), "base@0,1@2,2@3,3@4", images=[tiny.image(0, (64, 20))]))
    assert (found.kind, found.where["stacks"]) == ("missing", ["0"])


# ---- a stack is missing


@pytest.mark.parametrize(
    "kind, k", [(kind, entry.source) for kind, plan in PLANS.items() for entry in Plan.parse(plan) if entry.layer]
)
def test_stack_k_is_missing(judge, faulty, kind, k):
    engine = faulty(kind)
    found = only(judge(kind, engine, str(engine.layout.default.without(k))))
    assert found.kind == "missing" and found.where == {"stacks": [k], "layers": [int(k) + 1]}
    assert found.text.startswith(f"Stack {k} is missing") and f"stack {k} right" in found.text


def test_all_stacks_are_missing_where_no_hook_runs(judge, faulty):
    engine = faulty("qwen")
    for handle in engine.hooks[1:]:  # the first puts the base in its place
        handle.remove()
    found = only(judge("qwen", engine))
    assert found.kind == "missing" and found.where == {"stacks": ["0", "1", "2"], "layers": [1, 2, 3]}


def test_a_stack_computed_as_zeros_is_missing_and_it_says_so(judge, faulty):
    engine = faulty("qwen")
    merger = engine.model.model.visual.deepstack_merger_list[1].linear_fc2
    merger.weight.data.zero_()
    merger.bias.data.zero_()
    found = only(judge("qwen", engine))
    assert (found.kind, found.where["stacks"]) == ("missing", ["1"]) and "stack 1 as zeros" in found.text


# ---- taps one block early, or late


def test_taps_one_block_early(judge, faulty):
    engine = faulty("taps")
    engine.model.model.visual.deepstack_visual_indexes = [tap - 1 for tap in TAPS]
    found = only(judge("taps", engine))
    assert found.kind == "tap"
    assert found.where == {"stacks": ["0", "1"], "blocks": [0, 2], "expected": [1, 3], "by": -1}
    assert "one block early: after vision block 0, 2 instead of 1, 3" in found.text


def test_one_tap_one_block_late(judge, faulty):
    engine = faulty("taps")
    engine.model.model.visual.deepstack_visual_indexes = [2, 3]
    found = only(judge("taps", engine))
    assert found.kind == "tap" and found.where == {"stacks": ["0"], "blocks": [2], "expected": [1], "by": 1}


def test_the_selected_vision_layer_one_early(judge, faulty):
    engine = faulty("hires")
    engine.adapter.vision_layer -= 1
    found = only(judge("hires", engine))
    assert found.kind == "tap" and found.where["by"] == -1
    assert found.where["stacks"] == ["base", "0", "1", "2", "3"] and set(found.where["blocks"]) == {1}


# ---- permuted


@pytest.mark.parametrize(
    "kind, plan, stacks, found_there",
    [
        ("qwen", "base@0,1@1,0@2,2@3", ["0", "1"], ["1", "0"]),
        ("qwen", "base@0,2@1,1@2,0@3", ["0", "2"], ["2", "0"]),
        ("qwen", "base@0,1@1,2@2,0@3", ["0", "1", "2"], ["1", "2", "0"]),
        ("hires", "base@0,0@1,2@2,1@3,3@4", ["1", "2"], ["2", "1"]),  # tiles read column by column
        ("hires", "base@0,3@1,2@2,1@3,0@4", ["0", "1", "2", "3"], ["3", "2", "1", "0"]),
        ("qwen", "0@0,base@1,1@2,2@3", ["base", "0"], ["0", "base"]),
    ],
)
def test_stacks_are_permuted(judge, faulty, kind, plan, stacks, found_there):
    found = only(judge(kind, faulty(kind), plan))
    assert (found.kind, found.where["stacks"], found.where["found"]) == ("permuted", stacks, found_there)


def test_mergers_are_permuted(judge, faulty):
    engine = faulty("qwen")
    mergers = engine.model.model.visual.deepstack_merger_list
    mergers[0], mergers[1] = mergers[1], mergers[0]
    found = only(judge("qwen", engine))
    # Stack k here is what went through merger k: the first one found the block of the second, and the reverse.
    assert found.kind == "permuted" and {"0", "1"} <= set(found.where["stacks"])


# ---- a layer late


@pytest.mark.parametrize("kind", KINDS)
def test_all_stacks_a_layer_late(judge, faulty, kind):
    engine = faulty(kind)
    names = list(engine.layout.stack_names)
    late = Plan([("base", 0, 1.0), *((name, int(name) + 2, 1.0) for name in names)])
    found = only(judge(kind, engine, str(late)))
    assert found.kind == "late" and found.where == {"stacks": names, "layers": [int(k) + 2 for k in names], "by": 1}
    assert "added one layer late" in found.text


def test_one_stack_a_layer_late(judge, faulty):
    found = only(judge("qwen", faulty("qwen"), "base@0,0@1,1@3,2@3"))
    assert found.kind == "late" and found.where == {"stacks": ["1"], "layers": [3], "by": 1}


def test_the_last_stack_falls_off_the_end(tmp_path):
    folder = tiny.qwen3_vl_folder(tmp_path / "short", layers=4)
    engine = tiny.build(folder)
    prompt = engine.prompt(tiny.ask(tiny.image(0), QUESTION))
    write(record(engine, prompt, Plan.parse("base@0,0@2,1@3"), [5]), tmp_path / "r")
    found = only(judged(engine, read(tmp_path / "r")))
    assert found.kind == "late" and found.where["stacks"] == ["0", "1"] and "Stack 2 would come after" in found.text


def test_a_stack_added_twice_or_scaled(judge, faulty):
    found = only(judge("qwen", faulty("qwen"), "base@0,0@1,1@2,2@3,0@4"))
    assert found.kind == "extra" and found.where == {"stacks": ["0"], "layers": [4]}
    found = only(judge("hires", faulty("hires"), "base@0*12,0@1,1@2,2@3,3@4"))
    assert found.kind == "scaled" and found.where == {"stacks": ["base"], "layers": [0], "gain": 12.0}


# ---- rows


def rows_changed(engine, change, names=None):
    """Every stack's rows go through `change` on their way into the stream, as a port's buffer handling would do it."""
    run = engine._pass

    def changed(*args):
        current = run(*args)
        for layer, injections in current.injections.items():
            if layer == 0:
                continue
            current.injections[layer] = [
                i._replace(rows=change(i.rows)) if names is None or i.source in names else i for i in injections
            ]
        return current

    engine._pass = changed


def rolled(n, by):
    return lambda rows: torch.cat([rows[:n], rows[n:].roll(by, 0)])


@pytest.mark.parametrize(
    "kind, n, by", [("qwen", 1, 1), ("qwen", 5, -1), ("qwen", 9, 3), ("hires", 5, 1), ("hires", 9, 3), ("taps", 9, -1)]
)
def test_rows_rolled_after_token_n(judge, faulty, kind, n, by):
    engine = faulty(kind)
    rows_changed(engine, rolled(n, by))
    found = only(judge(kind, engine, images=[tiny.image(0, (64, 64))]))
    assert found.kind == "rows" and found.where["visual_token"] == n and found.where["by"] == by
    assert found.where["stacks"] == list(engine.layout.stack_names)
    first = engine.prompt(tiny.ask(tiny.image(0, (64, 64)), QUESTION)).grids[0].positions[0]
    assert found.where["position"] == first + n


def test_rows_of_one_stack_rolled(judge, faulty):
    engine = faulty("qwen")
    rows_changed(engine, rolled(4, 1), names=("1",))
    found = only(judge("qwen", engine))
    assert found.kind == "rows" and found.where["stacks"] == ["1"] and found.where["visual_token"] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_chunk_that_starts_again_with_the_first_rows(judge, faulty, kind):
    # Chunked prefill that does not move its window on: the rows after token n are those from the start.
    engine = faulty(kind)
    n = 8
    rows_changed(engine, lambda rows: torch.cat([rows[:n], rows[: len(rows) - n]]))
    found = only(judge(kind, engine, images=[tiny.image(0, (64, 64))]))
    assert found.kind == "rows" and found.where["visual_token"] == n and found.where["by"] == n


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_that_stop_after_token_n(judge, faulty, kind):
    engine = faulty(kind)
    rows_changed(engine, lambda rows: torch.cat([rows[:6], torch.zeros_like(rows[6:])]))
    found = only(judge(kind, engine))
    assert found.kind == "rows" and found.where["visual_token"] == 6 and found.where["by"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_one_position_late(judge, faulty, kind):
    engine = faulty(kind)
    real = engine._image_positions
    engine._image_positions = lambda prompt: real(prompt) + 1
    found = only(judge(kind, engine))
    assert found.kind == "rows" and found.where["visual_token"] == 0 and found.where["by"] == 1
    assert found.where["stacks"] == ["base", *engine.layout.stack_names]


# ---- only numerics, or something else that is no stack's fault


@pytest.mark.parametrize("kind", KINDS)
def test_only_numerics_where_weights_were_rounded(judge, faulty, kind):
    engine = faulty(kind)
    for parameter in engine.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    found = only(judge(kind, engine))
    assert found.kind == "numerics" and 1e-3 < found.where["difference"] < 0.1
    assert judge(kind, engine, tolerance=0.2).ok


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_agrees_by_its_own_tolerance_and_its_faults_are_still_found(judge, faulty, kind):
    engine = faulty(kind, dtype=torch.bfloat16)
    assert judge(kind, engine).ok
    found = only(judge(kind, engine, str(engine.layout.default.without("1"))))
    assert (found.kind, found.where["stacks"]) == ("missing", ["1"])
    rows_changed(engine, rolled(5, 1))
    found = only(judge(kind, engine))
    assert found.kind == "rows" and found.where["visual_token"] == 5 and found.where["by"] == 1


def test_taps_one_block_early_in_bfloat16(judge, faulty):
    engine = faulty("taps", dtype=torch.bfloat16)
    engine.model.model.visual.deepstack_visual_indexes = [tap - 1 for tap in TAPS]
    found = only(judge("taps", engine))
    assert found.kind == "tap" and found.where["by"] == -1 and found.where["stacks"] == ["0", "1"]


def test_a_layer_that_computes_something_else(judge, faulty):
    engine = faulty("qwen")
    engine.adapter.decoder.layers[2].self_attn.scaling *= 40
    found = only(judge("qwen", engine))
    assert found.kind == "layer" and found.where["layers"] == [2]


def test_positions_that_ignore_the_grid(judge, faulty, tmp_path, healthy):
    engine = faulty("qwen")
    engine.adapter.positions = lambda ids, grids, images: (torch.arange(ids.shape[1]).expand(3, 1, -1), ids.shape[1])
    found = only(judge("qwen", engine))
    assert found.kind == "positions" and "instead of" in found.text
    change(tmp_path / "theirs", position_ids=None)  # an exporter may leave them out
    found = only(judged(healthy["qwen"], read(tmp_path / "theirs")))
    assert found.kind == "layer" and found.where["layers"] == [0]


V_DEFAULT = "base@0,v0@v2,v1@v3,v2@v4,v3@v5"


@pytest.mark.parametrize(
    ("plan", "kind", "said"),
    [
        (V_DEFAULT, None, ""),
        ("base@0,v0@v2,v2@v4,v3@v5", "missing", "Stack v1 is missing: nothing of it enters before vision layer 3."),
        (
            "base@0",
            "missing",
            "Stacks v0, v1, v2, v3 are missing: nothing of them enters before vision layer 2, 3, 4, 5.",
        ),
        ("base@0,v1@v2,v0@v3,v2@v4,v3@v5", "permuted", "before vision layer 2 comes stack v1 instead of stack v0"),
        ("base@0,v0@v3,v1@v4,v2@v5", "late", "Stack v3 would come after the last layer: nothing of it enters."),
        ("base@0,v0@v2,v1@v2,v2@v4,v3@v5", "early", "Stack v1 is added one layer early: before vision layer 2"),
        (
            "base@0,v0@v2*0.5,v2@v4",
            "tower",
            "what enters the vision tower (stacks v0, v1, v2, v3) is not what the plan",
        ),
        ("base@1,v0@v2,v1@v3,v2@v4,v3@v5", "late", "The base is added one layer late"),
        ("v0@v2,v1@v3,v2@v4,v3@v5", "missing", "The base is missing"),
    ],
)
def test_stacks_inside_the_vision_tower_are_known_by_the_base_that_comes_out_of_it(plan, kind, said, tmp_path):
    engine = families.engine("deepstack_v")
    prompt = engine.prompt(tiny.ask(tiny.image(0, (64, 48)), tiny.image(1, (32, 48)), QUESTION))
    plan = Plan.parse(plan)
    write(record(engine, prompt, plan, [5, 6], features=engine.features(prompt, plan)), tmp_path)
    verdict = judged(engine, read(tmp_path))
    if kind is None:
        assert verdict.ok
        return
    found = only(verdict)
    assert found.kind == kind and said in found.text


def test_a_fault_inside_the_tower_is_not_guessed_at_on_other_pixels(tmp_path):
    engine = families.engine("deepstack_v")
    prompt = engine.prompt(tiny.ask(tiny.image(0, (64, 48)), QUESTION))
    plan = Plan.parse("base@0,v0@v2,v2@v4,v3@v5")
    write(record(engine, prompt, plan, [5], features=engine.features(prompt, plan)), tmp_path)
    theirs = read(tmp_path)
    theirs.images[0][...] = 255 - theirs.images[0]
    kinds = [finding.kind for finding in judged(engine, theirs).findings]
    assert kinds == ["pixels", "tower"]


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl", "qwen3_omni_moe"])
def test_the_record_of_a_video_is_read_as_a_video(kind, tmp_path):
    engine = reader(kind)
    prompt = engine.prompt(tiny.ask(read_image(video())[0], QUESTION))
    golden = record(engine, prompt, engine.layout.default, [5, 6])
    golden.about["question"] = QUESTION
    write(golden, tmp_path)
    theirs = read(tmp_path)
    assert judged(engine, theirs).ok and theirs.position_ids.dtype == prompt.extra["position_ids"].numpy().dtype
    theirs.position_ids[..., -1] += 1
    assert "positions" in [finding.kind for finding in judged(engine, theirs).findings]
    about = json.loads((tmp_path / "golden.json").read_text())
    about["images"][0]["frames"]["seconds"].append(9.0)
    about["images"][0]["frames"]["columns"] = 3
    (tmp_path / "golden.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="the frames of an image do not fill it"):
        read(tmp_path)


def test_another_head(judge, faulty):
    engine = faulty("qwen")
    engine.adapter.decoder.norm.weight.data.mul_(torch.linspace(-1, 1, 64))
    assert only(judge("qwen", engine)).kind == "head"


def test_wrong_positions_of_new_tokens(judge, faulty):
    engine = faulty("qwen")
    real = engine._run

    def late(prompt, plans, answer, **given):  # a decode that counts on from the sequence's length
        if answer:
            prompt.extra["next_position"] += 40
        return real(prompt, plans, answer, **given)

    engine._run = late
    found = only(judge("qwen", engine))
    assert found.kind == "decode" and found.where["answer_token"] == 0


def test_rows_that_are_not_numbers(judge, faulty):
    engine = faulty("qwen")
    engine.model.model.visual.deepstack_merger_list[1].linear_fc2.bias.data[3] = torch.nan
    assert only(judge("qwen", engine)).kind == "not finite"


def test_something_that_is_no_stack(judge, faulty):
    engine = faulty("qwen")

    def noise(rows):  # as large as the stack: less than half of that passes for nothing
        other = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(rows)
        return other * rows.norm() / other.norm()

    rows_changed(engine, noise, names=("1",))
    found = only(judge("qwen", engine))
    assert found.kind == "foreign" and found.where["layers"] == [2]


def test_something_added_to_text_rows(judge, faulty):
    engine = faulty("qwen")
    engine.adapter.decoder.layers[3].register_forward_pre_hook(
        lambda module, args: (torch.cat([args[0][:, :2] + 1, args[0][:, 2:]], 1), *args[1:])
    )
    found = only(judge("qwen", engine))
    assert found.kind == "stray" and found.where == {"layers": [3], "position": 0}


# ---- preprocessing is told apart


def test_preprocessing_is_told_apart_from_the_model(judge, faulty):
    engine = faulty("qwen")
    engine.adapter.processor.image_mean = [0.4, 0.5, 0.6]
    assert only(judge("qwen", engine)).kind == "pixels"
    found = judge("qwen", engine, "base@0,0@1,2@3").findings
    assert [finding.kind for finding in found] == ["pixels", "missing"] and found[1].where["stacks"] == ["1"]


def test_another_size_is_told(judge, faulty):
    engine = faulty("qwen")
    engine.adapter.processor.size = {"longest_edge": 32 * 32, "shortest_edge": 32 * 32}
    assert only(judge("qwen", engine)).kind == "count"


def test_other_calls_of_the_tower_are_told(files, healthy):
    one = load_file(files / "golden.safetensors")["pixels.0.hidden_states"]
    change(files, **{"pixels.1.hidden_states": one})
    found = only(judged(healthy["qwen"], read(files)))
    assert found.kind == "shapes" and found.text.count("hidden_states") == 3  # two of theirs, one of ours


def test_another_template_is_told_and_the_model_compared_on_their_tokens(judge, faulty):
    engine = faulty("qwen")
    engine.adapter.chat_template = engine.adapter.chat_template.replace("assistant", "answer")
    assert only(judge("qwen", engine)).kind == "tokens"
    found = judge("qwen", engine, "base@0,0@2,1@3,2@4").findings
    assert [finding.kind for finding in found] == ["tokens", "late"]


# ---- records from elsewhere


def splitmix64_signs(seed, columns, width):
    """GOLDEN.md's generator, written down again in whole numbers."""
    state, out = seed, []
    for _ in range(columns * width):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        out.append(-1.0 if (z ^ (z >> 31)) >> 63 else 1.0)
    return torch.tensor(out).reshape(columns, width)


def foreign(folder, path, *, columns=6, seed=11, taps=None):
    """An exporter by GOLDEN.md alone: plain transformers, its own hooks, no line of this app's code."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tower, decoder = model.model.visual, model.model.language_model
    if taps is not None:
        tower.deepstack_visual_indexes = taps
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    picture = tiny.image(0, (64, 48))
    given = processor(images=[picture], return_tensors="pt")
    n = int(given["image_grid_thw"].prod()) // 4
    text = f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>{QUESTION}<|im_end|>\n"
    ids = tokenizer(text + "<|im_start|>assistant\n", return_tensors="pt")["input_ids"]
    image = ids[0] == model.config.image_token_id
    signs = splitmix64_signs(seed, columns, 64)
    tensors = {"pixels.0.hidden_states": given["pixel_values"], "pixels.0.grid_thw": given["image_grid_thw"]}

    def keep(name):
        def hook(module, args, output=None):
            value = args[0] if output is None else output
            value = value[0] if isinstance(value, tuple) else value
            tensors.setdefault(name, value[0] @ signs.T / 8)  # the first pass is the prompt's; 8 is the root of 64

        return hook

    for at, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(keep(f"layer.{at}.input"))
        layer.register_forward_hook(keep(f"layer.{at}.output"))
    decoder.norm.register_forward_pre_hook(keep(f"layer.{len(decoder.layers)}.input"))
    inputs = {"input_ids": ids, "mm_token_type_ids": image[None].int(), **given}
    with torch.no_grad():
        made = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    tensors |= {
        "input_ids": ids[0],
        "answer_ids": made.sequences[0, ids.shape[1] : -1],
        "image_positions": image.nonzero()[:, 0],
        "logits": torch.cat(made.logits),
    }
    path.mkdir(exist_ok=True)
    save_file({name: value.detach().numpy() for name, value in tensors.items()}, path / "golden.safetensors")
    about = {
        "format": "deepstack-golden",
        "version": 1,
        "dtype": "float32",
        "layers": len(decoder.layers),
        "projection": {"seed": seed, "columns": columns, "width": 64},
        "images": [{"size": [64, 48]}],
    }
    (path / "golden.json").write_text(json.dumps(about))
    return path


def test_a_record_made_by_plain_transformers_and_the_documentation_agrees(healthy, taps, tmp_path):
    verdict = judged(healthy["taps"], read(foreign(taps, tmp_path)))
    assert verdict.ok, verdict.findings
    assert max(verdict.figures["outputs"]) < 1e-4 and max(verdict.figures["logits"]) < 1e-4


def test_its_taps_one_block_early_are_found_too(healthy, taps, tmp_path):
    found = only(judged(healthy["taps"], read(foreign(taps, tmp_path, taps=[0, 2]))))
    assert found.kind == "tap" and found.where["by"] == -1 and found.where["stacks"] == ["0", "1"]


@pytest.fixture
def files(healthy, tmp_path):
    """A good record on disk."""
    engine = healthy["qwen"]
    prompt = engine.prompt(tiny.ask(tiny.image(0), QUESTION))
    write(record(engine, prompt, engine.layout.default, [5, 6]), tmp_path / "record")
    return tmp_path / "record"


def test_what_is_written_is_read_back(healthy, files):
    golden = read(files)
    assert read(files / "golden.json").ids.tolist() == golden.ids.tolist()
    assert golden.inputs.shape == (6, len(golden.ids), 16) and golden.outputs.shape == (5, len(golden.ids), 16)
    assert golden.logits.shape[0] == 3 and set(golden.stacks) == {"base", "0", "1", "2"}
    assert set(golden.pixels[0]) == {"hidden_states", "grid_thw"} and golden.images[0].shape == (32, 32, 3)
    statistics = golden.about["statistics"]["layer.1.input"]["image"]
    seen = golden.inputs[1, golden.image_positions]
    assert statistics["rms"] == pytest.approx(float(np.sqrt(np.square(seen).mean())), rel=0.2)
    assert statistics["max"] >= statistics["rms"]


def change(files, **tensors):
    """The record with these tensors changed (None: taken out)."""
    held = load_file(files / "golden.safetensors") | tensors
    save_file({name: value for name, value in held.items() if value is not None}, files / "golden.safetensors")


def about(files, **values):
    held = json.loads((files / "golden.json").read_text()) | values
    (files / "golden.json").write_text(json.dumps(held))


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda files: (files / "golden.json").unlink(), "There is no"),
        (lambda files: (files / "golden.json").write_text("{"), "cannot be used"),
        (lambda files: (files / "golden.json").write_text("[]"), "cannot be used"),
        (lambda files: about(files, version=2), "version 1"),
        (lambda files: about(files, layers="many"), "cannot be used"),
        (lambda files: about(files, layers=-1), "impossible"),
        (lambda files: about(files, layers=9), "no tensor layer.6.input"),
        (lambda files: about(files, projection={"seed": 0, "columns": 8, "width": 64}), "must be float32"),
        (lambda files: about(files, images=[{"size": [10**6, 10**6]}]), "is not taken"),
        (lambda files: (files / "golden.safetensors").write_bytes(b"not this"), "cannot be used"),
        (lambda files: change(files, input_ids=None), "no tensor input_ids"),
        (lambda files: change(files, input_ids=np.zeros((2, 2), np.int64)), "must be integers"),
        (lambda files: change(files, logits=np.zeros((1, 4), np.float32)), "logits in"),
        (lambda files: change(files, **{"image.0": np.zeros((3, 3, 3), np.uint8)}), "image.0"),
    ],
)
def test_damaged_records_are_one_clear_sentence(files, break_it, words):
    break_it(files)
    with pytest.raises(UserError, match=words):
        read(files)


def test_records_of_other_models_are_refused(files, healthy, folders, capsys):
    assert main(["golden", "check", str(files), "--model", str(folders["hires"])]) == 2
    assert "another model: it has 5 layers" in capsys.readouterr().err
    change(files, input_ids=np.full_like(load_file(files / "golden.safetensors")["input_ids"], 10**6))
    assert main(["golden", "check", str(files), "--model", str(folders["qwen"])]) == 2
    assert "token ids" in capsys.readouterr().err


# ---- the command


def test_export_and_check_by_command_line(capsys, tmp_path, folders):
    model, out = ["--model", str(folders["hires"])], str(tmp_path / "out")
    assert main(["golden", "export", *model, "--out", out, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [path.split("/")[-1] for path in made["files"]] == ["golden.safetensors", "golden.json"]
    assert json.loads((tmp_path / "out" / "golden.json").read_text())["question"] == "What is on the orange sign?"
    assert main(["golden", "check", out, *model, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is True and said["findings"] == [] and said["figures"]["tolerance"] == 1e-3
    assert main(["golden", "check", out, *model]) == 0
    assert "In agreement" in capsys.readouterr().out


def test_check_exits_1_with_the_fault_in_words(capsys, tmp_path, faulty, folders):
    engine = faulty("qwen")
    prompt = engine.prompt(tiny.ask(tiny.image(0), QUESTION))
    write(record(engine, prompt, Plan.parse("base@0,0@1,2@3"), [5]), tmp_path)
    assert main(["golden", "check", str(tmp_path), "--model", str(folders["qwen"])]) == 1
    assert "WRONG  Stack 1 is missing" in capsys.readouterr().out
    assert main(["golden", "check", str(tmp_path), "--model", str(folders["qwen"]), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False and said["findings"][0]["kind"] == "missing" and said["findings"][0]["stacks"] == ["1"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["golden"], "action"),
        (["golden", "import"], "invalid choice"),
        (["golden", "export", "a.png"], "images and a question"),
        (["golden", "check"], "one record"),
        (["golden", "check", "/no/such/record"], "There is no"),
        (["golden", "check", "x", "--tolerance", "2"], "--tolerance is 2"),
        (["golden", "export", "--out", "/dev/null/x"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(capsys, argv, words, folders):
    more = ["--model", str(folders["hires"])] if len(argv) > 1 else []
    assert main([*argv, *more]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and words in err


def test_nothing_is_left_on_the_model(healthy, files):
    engine = healthy["qwen"]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.model.modules()]
    cache = engine.cache
    judged(engine, read(files))
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.model.modules()] == hooks
    assert engine.cache is cache


# ---- the documentation


def test_the_documentation_names_every_kind_and_the_generators_numbers(root):
    text = (root / "app" / "GOLDEN.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`([^`]+)`", " ".join(line.split("|")[1] for line in text.splitlines() if "|" in line)))
    sources = [(root / folder / "golden.py").read_text(encoding="utf-8") for folder in ("app", "analysis")]
    kinds = set(re.findall(r'Finding\(\s*"([a-z ]+)"', "".join(sources))) | {"late", "early"}
    assert len(kinds) > 15 and kinds <= listed, kinds - listed
    for number in ("9E3779B97F4A7C15", "BF58476D1CE4E5B9", "94D049BB133111EB"):
        assert f"0x{number}" in text and f"0x{number}" in sources[1]
    assert "-1, +1, +1" in text and signs(0, 1, 3).tolist() == [[-1.0, 1.0, 1.0]]
