"""Videos in the families that read them, against transformers' own forward on video tokens.

The patches are put together here, value by value, as transformers' video processor has them. (With torchvision
installed that processor, and its prompt, give the same: tokens equal, pixels within one step of 8 bits after a
resize.) Run: pytest tests/model/families/test_video.py
"""

import numpy as np
import pytest
import torch
from PIL import Image

from model.clip import clip_of, frames_of
from model.errors import UserError
from model.families import families
from model.images import read_image
from model.plan import Plan
from model.probe import Probe
from model.types import Sampling
from tests import tiny
from tests.families import ENTRIES, engine, plain
from tests.videos import video

READS = {family.name for family in families() if family.takes_video}
KINDS = [kind for kind, entry in ENTRIES.items() if entry.family in READS]
SHEET = read_image(video(23, 8, (96, 64)))[0]  # five frames: the last is read twice
ASKED = tiny.ask(SHEET, "What moves?")


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
    slower = read_image(video(23, 4, (96, 64)))[0]
    keys = {loaded.prompt(tiny.ask(sheet, "?")).extra["image_keys"] for sheet in (SHEET, slower, SHEET)}
    assert len(keys) == 2 and clip_of(slower).seconds != clip_of(SHEET).seconds


@pytest.mark.parametrize("kind", [kind for kind, entry in ENTRIES.items() if entry.family not in READS])
def test_the_others_say_that_they_read_pictures_only(kind):
    loaded = engine(kind)
    assert not loaded.reads(SHEET) and loaded.reads(tiny.image(1))
    for asked in (lambda: loaded.prompt(ASKED), lambda: loaded.views(SHEET)):
        with pytest.raises(UserError, match="reads pictures, not videos. Choose a model that reads videos .Qwen3-VL, "):
            asked()
    assert loaded.answer(loaded.prompt(tiny.ask(tiny.image(1), "?")), Plan(), Sampling(max_new_tokens=1)).tokens
