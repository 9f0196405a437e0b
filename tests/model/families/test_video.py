"""Videos in the families that read them, against transformers' own forward on video tokens.

The patches are put together here, value by value, as transformers' video processor has them. (With torchvision
installed that processor, and its prompt, give the same: tokens equal, pixels within one step of 8 bits after a
resize, two where Qwen3-Omni enlarges small frames.) Run: pytest tests/model/families/test_video.py
"""

import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from model.clip import clip_of, frames_of
from model.engine import Generation
from model.errors import UserError
from model.families import families
from model.images import read_image
from model.loading import load
from model.plan import Plan
from model.probe import Probe
from model.types import Sampling
from tests import tiny
from tests.families import ENTRIES, engine, folder, plain
from tests.model.test_together import at_once, counted, same
from tests.videos import video

READS = {family.name for family in families() if family.takes_video}
BLOCKS = ("qwen2_vl", "qwen2_5_vl", "qwen3_omni_moe")  # a video in one block of tokens, without times
OMNI = "qwen3_omni_moe"
KINDS = [kind for kind, entry in ENTRIES.items() if entry.family in READS and kind not in BLOCKS]
SHEET = read_image(video(23, 8, (96, 64)))[0]  # five frames: the last is read twice
ASKED = tiny.ask(SHEET, "What moves?")
SLOWER = read_image(video(23, 4, (96, 64)))[0]  # twice as long, twice as many frames


def patches(frames: list[Image.Image], patch: int = 8, merge: int = 2) -> torch.Tensor:
    """[patches, 3 * 2 * patch²]: by two frames, by block of 2 x 2, by patch; channel, frame, row, column."""
    values = np.stack([np.asarray(frame, np.float32) / 127.5 - 1 for frame in frames])
    block = patch * merge
    rows = []
    for start in range(0, len(values), 2):
        for y in range(0, values.shape[1], block):
            for x in range(0, values.shape[2], block):
                for dy in range(0, block, patch):
                    for dx in range(0, block, patch):
                        cut = values[start : start + 2, y + dy : y + dy + patch, x + dx : x + dx + patch]
                        rows.append(cut.transpose(3, 0, 1, 2).reshape(-1))
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_is_read_as_transformers_reads_it(kind):
    loaded, model = engine(kind), plain(kind)
    prompt = loaded.prompt(ASKED)
    assert [grid.name for grid in prompt.grids] == ["0.4 s", "1.7 s", "2.8 s"]
    assert {grid.grid for grid in prompt.grids} == {(4, 6)}
    ids, visual = prompt.input_ids.clone(), prompt.input_ids == model.config.image_token_id
    ids[visual] = model.config.video_token_id
    frames = frames_of(SHEET)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * visual.int(),
        "pixel_values_videos": patches([*frames, frames[-1]]),
        "video_grid_thw": torch.tensor([[3, 8, 12]]),
    }
    with torch.no_grad():
        theirs = model(**inputs).logits[0]
        ours = loaded.logits(prompt, loaded.layout.default, ())
    assert (theirs - ours).abs().max() <= 2.1e-6 * ENTRIES[kind].rounding * theirs.abs().max()
    text = "".join(prompt.texts)
    assert "<0.4 seconds>" in text and text.index("<1.7 seconds>") < text.index("<2.8 seconds>")


@cache
def reader(kind: str):
    """An engine of this kind. Qwen3-Omni's takes frames of up to 64 x 64 pixels: its own make 500 tokens of each."""
    if kind != OMNI:
        return engine(kind)
    loaded = load(str(folder(kind)), device="cpu", dtype="float32")
    loaded.adapter.processor.video_size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    return loaded


def theirs_of(ids: torch.Tensor, model, rows: slice) -> torch.Tensor:
    """These ids [1, T] as transformers reads them, where `rows` are the tokens of one video."""
    ids = ids.clone()
    ids[0, rows] = model.config.video_token_id
    return ids


def block_inputs(model, prompt, rows: slice, frames: list[Image.Image]) -> dict[str, torch.Tensor]:
    """What transformers takes for a prompt whose `rows` are the tokens of one video, as its processor makes it."""
    ids = theirs_of(prompt.input_ids, model, rows)
    groups, (width, height) = -(-len(frames) // 2), frames[0].size
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": patches([*frames, *frames[-1:] * (len(frames) % 2)]),
        "video_grid_thw": torch.tensor([[groups, height // 8, width // 8]]),
    }
    # VideoMetadata.sampled_fps of 5 out of 23 frames at 8 a second; the processors make a tensor of it.
    seconds = torch.tensor([2 / (5 / 23 * 8)])
    if model.config.model_type == "qwen3_omni_moe_thinker":
        return {**inputs, "video_second_per_grid": seconds}
    types = (ids == model.config.image_token_id).int()
    types[0, rows] = 2
    inputs["mm_token_type_ids"] = types
    return {**inputs, "second_per_grid_ts": seconds} if model.config.model_type == "qwen2_5_vl" else inputs


def rope(model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own positions [3, 1, T] and their offset."""
    if model.config.model_type != "qwen3_omni_moe_thinker":
        return model.model.get_rope_index(**inputs)
    seconds = {"second_per_grids": inputs["video_second_per_grid"]}
    names = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw")
    return model.get_rope_index(**{name: inputs[name] for name in names if name in inputs}, **seconds)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("still", [None, tiny.image(1, (32, 48))])
def test_a_video_in_one_block_is_read_as_transformers_reads_it(kind, still):
    loaded, model = reader(kind), plain(kind)
    prompt = loaded.prompt(tiny.ask(SHEET, *([still] if still else []), "What moves?"))
    first, *_ = clip = [grid for grid in prompt.grids if grid.index == 0]
    assert [grid.name for grid in clip] == ["0.4 s", "1.7 s", "2.8 s"]
    assert {grid.grid for grid in clip} == {(3, 4)}, "96 x 64 pixels in at most 64 x 64"
    rows = np.concatenate([grid.positions for grid in clip])
    assert np.array_equal(rows, first.positions[0] + np.arange(36)), "nothing between the frames"
    frames = [frame.resize((64, 48), Image.Resampling.BICUBIC) for frame in frames_of(SHEET)]
    inputs = block_inputs(model, prompt, slice(rows[0], rows[-1] + 1), frames)
    if still:
        seen = loaded.adapter.processor(images=[still], return_tensors="pt")
        inputs |= {"pixel_values": seen["pixel_values"], "image_grid_thw": seen["image_grid_thw"]}
    positions, delta = rope(model, inputs)
    ours = prompt.extra["position_ids"]
    assert torch.equal(positions, ours) and ours.dtype == (torch.float32 if kind == OMNI else torch.int64)
    assert prompt.extra["next_position"] == prompt.input_ids.shape[1] + delta.item()
    assert type(prompt.extra["next_position"]) is (float if kind == OMNI else int)
    with torch.no_grad():
        theirs = model(**inputs).logits[0]
        ours = loaded.logits(prompt, loaded.layout.default, ())
    if still:  # the tower runs on each alone, in transformers too
        assert (theirs - ours).abs().max() <= 2.1e-6 * theirs.abs().max()
    else:
        assert torch.equal(theirs, ours)
    made = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, prompt.input_ids.shape[1] :].tolist()
    answer = loaded.answer(prompt, loaded.layout.default, Sampling(max_new_tokens=8))
    assert [token.id for token in answer.tokens] == made[: len(answer.tokens)]


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_transformers_is_given_for_a_video_runs_the_same_plan(kind):
    loaded = reader(kind)
    for prompt in (loaded.prompt(tiny.ask(SHEET, "?")), loaded.prompt(tiny.ask(tiny.image(1), SHEET, SLOWER, "?"))):
        inputs, plan = loaded.adapter.plain_inputs(prompt)
        with torch.no_grad():
            theirs = loaded.model(**inputs).logits[0]
        torch.testing.assert_close(theirs, loaded.logits(prompt, plan), atol=1e-5, rtol=0)


def test_frames_lie_as_far_apart_as_in_time():
    """Qwen2-VL counts grids, the others time: 2 frames in 1.15 s, at 4 positions a second rounded down, or at 13."""
    found = {}
    for kind in BLOCKS:
        prompt = reader(kind).prompt(ASKED)
        found[kind] = [prompt.extra["position_ids"][0, 0, grid.positions[0]].item() for grid in prompt.grids]
    start = found["qwen2_vl"][0]
    assert found["qwen2_vl"] == [start, start + 1, start + 2]
    assert found["qwen2_5_vl"] == [start, start + 4, start + 9]
    assert found[OMNI] == pytest.approx([start, start + 14.95, start + 29.9], abs=1e-5)
    slower = engine("qwen2_5_vl").prompt(tiny.ask(SLOWER, "What moves?"))
    times = [int(slower.extra["position_ids"][0, 0, grid.positions[0]]) for grid in slower.grids]
    assert len(times) == 6 and times[1] - times[0] == 4


@pytest.fixture
def fresh():
    """A Qwen3-Omni that takes up every beginning, with nothing held yet."""
    loaded = load(str(folder(OMNI)), device="cpu", dtype="float32")
    loaded.adapter.processor.video_size = reader(OMNI).adapter.processor.video_size
    loaded.shortest_prefix = 1
    return loaded


FEW = Sampling(max_new_tokens=5)


def test_what_is_decoded_between_whole_positions_is_what_one_pass_makes(fresh):
    plan, prompt = fresh.layout.default, fresh.prompt(ASKED)
    assert prompt.extra["next_position"] % 1, "13 a second do not fall on whole numbers here"
    answer = fresh.answer(prompt, plan, FEW)
    trace = fresh.replay(prompt, answer, plan, Probe())
    assert trace.logprobs == pytest.approx([token.logprob for token in answer.tokens], abs=1e-5)
    same(fresh.answer_many(prompt, [Plan.parse("base@0"), plan], FEW)[1], answer)


def test_whole_positions_and_others_are_decoded_beside_each_other(fresh):
    plan = fresh.layout.default
    asked = [fresh.prompt(ASKED), fresh.prompt(tiny.ask(tiny.image(1), "Read the sign."))]
    assert [type(prompt.extra["next_position"]) for prompt in asked] == [float, int]
    wanted = [reader(OMNI).answer(prompt, plan, FEW) for prompt in asked]
    generations = [Generation(fresh, prompt, [plan], FEW, None) for prompt in asked]
    with counted(fresh) as rows:
        while any(not generation.done for generation in generations):
            at_once(fresh, [generation.step for generation in generations])
    assert 2 in rows
    for generation, want in zip(generations, wanted, strict=True):
        same(generation.answers()[0], want)


def test_the_turn_after_a_video_goes_on_between_whole_positions(fresh):
    plan = fresh.layout.default
    first = fresh.answer(fresh.prompt(ASKED), plan, FEW)
    said = {"role": "assistant", "content": [{"type": "text", "text": first.text}]}
    second = fresh.prompt([*ASKED, said, {"role": "user", "content": [{"type": "text", "text": "And then?"}]}])
    read = []
    fresh.adapter.decoder.layers[0].register_forward_pre_hook(lambda layer, args: read.append(args[0].shape[1]))
    found = fresh.answer(second, plan, FEW)
    assert read[0] < second.input_ids.shape[1] - second.visual_tokens, "the video is not read again"
    same(found, reader(OMNI).answer(second, plan, FEW))


@pytest.mark.parametrize(
    "files, grid",
    [
        ({}, (3, 4)),  # preprocessor_config.json: at most 64 x 64 pixels
        ({"video_preprocessor_config.json": {"size": {"shortest_edge": 1024, "longest_edge": 32 * 32}}}, (1, 2)),
        ({"processor_config.json": {"video_processor": {"min_pixels": 1024, "max_pixels": 96 * 64}}}, (4, 6)),
        ({"processor_config.json": {"processor_class": "Qwen2_5_VLProcessor"}}, (3, 4)),
    ],
)
def test_the_folder_says_how_large_a_frame_may_be(tmp_path, files, grid):
    path = shutil.copytree(folder("qwen2_5_vl"), tmp_path / "m")
    for name, data in files.items():
        (path / name).write_text(json.dumps(data))
    assert load(str(path), device="cpu").adapter.grid(SHEET) == grid


def test_qwen3_omni_says_itself_how_large_a_frame_may_be():
    """Its processor tells the one for videos: at least 128 x 32 x 32 pixels, whatever the folder's file says."""
    assert engine(OMNI).adapter.grid(SHEET) == (19, 28)


def test_every_two_frames_have_a_grid_and_stacks_of_their_own():
    loaded = engine("qwen3_vl")
    prompt = loaded.prompt(ASKED)
    pictures = [prompt.picture(at) for at in range(3)]
    assert [np.asarray(picture).tobytes() for picture in pictures] == [
        np.asarray(frame).tobytes() for frame in frames_of(SHEET)[::2]
    ]
    answer = loaded.answer(prompt, loaded.layout.default, Sampling(max_new_tokens=2))
    trace = loaded.replay(prompt, answer, loaded.layout.default, Probe())
    assert trace.injected_rms and {rows.shape[-1] for rows in trace.injected_rms.values()} >= {72}
    views = loaded.views(SHEET)
    assert [view.name for view in views] == ["at 0.4 s", "at 1.7 s", "at 2.8 s"] and {v.grid for v in views} == {(4, 6)}


def test_the_frames_share_the_budget_of_the_whole_video():
    loaded = engine("qwen3_vl")
    long = loaded.adapter.grid(read_image(video(32, 2, (320, 240)))[0])
    short = loaded.adapter.grid(read_image(video(4, 2, (320, 240)))[0])
    assert long[0] * long[1] * 32 * 16**2 <= 8 * 64 * 64 and long[0] < short[0]


def test_equal_pictures_at_other_times_are_another_video():
    loaded = engine("qwen3_vl")
    keys = {loaded.prompt(tiny.ask(sheet, "?")).extra["image_keys"] for sheet in (SHEET, SLOWER, SHEET)}
    assert len(keys) == 2 and clip_of(SLOWER).seconds != clip_of(SHEET).seconds


@pytest.mark.parametrize("kind", [kind for kind, entry in ENTRIES.items() if entry.family not in READS])
def test_the_others_say_that_they_read_pictures_only(kind):
    loaded = engine(kind)
    assert not loaded.reads(SHEET) and loaded.reads(tiny.image(1))
    for asked in (lambda: loaded.prompt(ASKED), lambda: loaded.views(SHEET)):
        with pytest.raises(UserError, match="reads pictures, not videos. Choose a model that reads videos .Qwen3-VL, "):
            asked()
    assert loaded.answer(loaded.prompt(tiny.ask(tiny.image(1), "?")), Plan(), Sampling(max_new_tokens=1)).tokens
