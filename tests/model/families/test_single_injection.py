"""Families without stacks: what is detected, what of the picture they see, and what only one of them does.

Run: pytest tests/model/families/test_single_injection.py. What all families share is in test_every_family.py.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, PixtralVisionConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from model.errors import UserError
from model.families import detect
from model.families.llava import Llava
from model.plan import Plan, presets
from model.probe import AttentionWish, Probe
from model.types import Sampling
from tests import tiny
from tests.families import engine, folder
from tests.families.llava_released import LLAMA, llava_folder, tokenizer_of

KINDS = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_5")
QUESTION = "What does the sign say?"


@pytest.mark.parametrize("kind", KINDS)
def test_the_only_plan_of_its_own_is_the_base(kind):
    loaded = engine(kind)
    assert loaded.trained == "trained single injection" and "no stacks" in loaded.note
    assert loaded.layout.stack_names == () and list(map(str, presets(loaded.layout).values())) == ["base@0", "none"]
    with pytest.raises(UserError, match="has base only, it has no stacks"):
        Plan.parse("base@0,0@1").validate(loaded.layout)
    assert detect(AutoConfig.from_pretrained(folder(kind))).name == kind


def test_a_type_that_the_installed_transformers_lacks_is_named(monkeypatch):
    config = AutoConfig.for_model("qwen2_5_vl")
    monkeypatch.delitem(CONFIG_MAPPING_NAMES, "qwen2_5_vl")
    with pytest.raises(UserError, match="does not have the type “qwen2_5_vl” .Qwen2.5-VL.. Install a newer one"):
        detect(config)


# ---- LLaVA


def test_the_grid_of_llava_lies_on_the_centre_that_its_processor_keeps():
    loaded, image = engine("llava"), tiny.image(0, (60, 32))
    prompt = loaded.prompt(tiny.ask(image, QUESTION))
    assert prompt.grids[0].box == (14, 0, 46, 32) and prompt.grids[0].size == (32, 32)
    assert prompt.picture(0) == image.crop((14, 0, 46, 32))
    outside = image.copy()
    outside.paste((0, 0, 0), (0, 0, 10, 32))
    other = loaded.prompt(tiny.ask(outside, QUESTION))
    assert torch.equal(loaded.see(prompt).features["base"], loaded.see(other).features["base"])
    (view,) = loaded.views(image)
    small = np.asarray(prompt.picture(0).resize((16, 16), Image.Resampling.BICUBIC), dtype=int)
    inside = (slice(2, -2), slice(2, -2))  # cut before or after the resize: the edges differ
    assert view.grid == (4, 4) and np.abs(np.asarray(view.image, dtype=int) - small)[inside].max() <= 2


def test_a_beginning_of_text_token_is_there_once():
    tokenizer = tokenizer_of(LLAMA, starts=True)
    ids = engine("llava").prompt(tiny.ask(QUESTION)).input_ids[0].tolist()
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_a_placeholder_typed_by_a_user_is_plain_text():
    loaded = engine("llava")
    prompt = loaded.prompt(tiny.ask(tiny.image(), "What is <image> here?"))
    assert prompt.visual_tokens == 16 and int((prompt.input_ids == loaded.adapter.image_token_id).sum()) == 16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_config": PixtralVisionConfig()}, "tower of type “pixtral”"),
        ({"vision_feature_select_strategy": "full"}, "keeps the class token"),
    ],
)
def test_towers_whose_tokens_fill_no_square_are_refused(change, said):
    config = AutoConfig.from_pretrained(folder("llava"))
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=said):
        Llava.layout_of(config)


def test_they_are_refused_before_weights_are_read(tmp_path):
    llava_folder(tmp_path, vision_feature_select_strategy="full")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="keeps the class token"):
        tiny.build(tmp_path)


# ---- tiles


def test_row_ends_are_the_last_column_beside_the_picture():
    loaded = engine("llava_next")
    prompt = loaded.prompt(tiny.ask(tiny.image(0, (64, 32)), QUESTION))
    small, large = prompt.grids
    assert (small.grid, small.box, large.grid, large.box) == ((4, 4), None, (4, 9), (0, 0, 72.0, 32))
    assert prompt.picture(1).size == large.size == (72, 32)
    rows = loaded.see(prompt).features["base"][16:].unflatten(0, large.grid)
    end = loaded.model.model.image_newline
    assert torch.equal(rows[:, -1], end.expand(4, -1)) and not (rows[:, :-1] == end).all(-1).any()
    first, second = loaded.views(tiny.image(0, (64, 32)))
    assert (first.grid, second.grid, second.image.size) == ((4, 4), (4, 9), (36, 16))


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_an_image_too_long_for_tiles_is_refused(kind):
    with pytest.raises(UserError, match="4000×2 pixels, too long and narrow"):
        engine(kind).prompt(tiny.ask(tiny.image(0, (4000, 2)), QUESTION))


def test_a_second_image_changes_how_onevision_encodes_the_first():
    loaded, image = engine("llava_onevision"), tiny.image(0, (40, 32))
    alone = loaded.prompt(tiny.ask(image, QUESTION))
    both = loaded.prompt(tiny.ask(image, image, QUESTION))
    assert [grid.name for grid in alone.grids] == ["global view", "high-resolution view"]
    assert [grid.name for grid in both.grids] == ["whole image", "row end"] * 2
    loaded.cache.clear()
    assert len(loaded.see(alone).features["base"]) == 16 + 4 * 7
    assert len(loaded.see(both).features["base"]) == 2 * 17  # not the rows that the cache holds of the same pixels
    assert len(loaded.cache) == 2


# ---- Qwen3.5


def test_layers_of_linear_attention_have_no_attention_rows():
    loaded = engine("qwen3_5")
    prompt = loaded.prompt(tiny.ask(tiny.image(), QUESTION))
    answer = loaded.answer(prompt, loaded.layout.default, Sampling(max_new_tokens=2))
    assert loaded.layout.attention_layers == (3,)
    with pytest.raises(
        UserError, match="Attention of layers 0, 1 .* linear attention there; layers 3 can be looked at"
    ):
        loaded.replay(prompt, answer, loaded.layout.default, Probe(attention=(AttentionWish((0, 1, 3), (4,)),)))
