"""What only Granite has: no base, two maps that can clash, a base that is multiplied, tiles between text marks.

Run: pytest tests/model/families/test_granite.py. What all families share is in test_every_family.py.
"""

import pytest
import torch
from transformers import AutoConfig, Granite4VisionForConditionalGeneration, GraniteDoclingForConditionalGeneration

from model.errors import UserError
from model.families.granite4_vision import layout_of
from model.families.granite_docling import GraniteDocling
from model.loading import load
from model.plan import Plan, presets
from tests import tiny
from tests.families import engine, folder, plain
from tests.families.granite import docling_tokenizer, granite4_vision_folder, granite_docling_folder
from tests.families.llava_released import forward, inputs

QUESTION = "What does the sign say?"
ONE = tiny.ask(tiny.image(0, (40, 32)), QUESTION)
PAGE = tiny.ask(tiny.image(3, (64, 60)), QUESTION)  # four tiles and a thumbnail


# ---- Granite 4 Vision


def test_it_has_no_base_and_its_deepest_tap_alone_is_a_preset():
    layout = engine("granite4_vision").layout
    assert [source.name for source in layout.sources] == [str(k) for k in range(8)]
    assert [source.tap for source in layout.sources] == [0, 1, 2, 3, 3, 3, 3, 3]
    assert layout.source("4").label == "tap after vision block 3 · top left"
    assert layout.source("3").own_words == "added before LLM layer 0"
    named = presets(layout)
    assert str(named["deepest tap only"]) == "3@0" and "single injection" not in named
    assert "deepest tap only" not in presets(engine("granite_docling").layout)
    with pytest.raises(UserError, match="uses the stack “base”"):
        Plan.parse("base@0").validate(layout)


def test_with_all_stacks_off_the_image_rows_are_zero_vectors():
    """The model's own forward, given rows of zeros for every stack."""
    reference, given = plain("granite4_vision"), inputs(folder("granite4_vision"), ONE)
    with torch.no_grad():
        pixels = {name: given.pop(name) for name in ("pixel_values", "image_sizes")}
        seen = reference.model.get_image_features(**pixels)
        seen.deepstack_features = [(layer, [rows[0] * 0]) for layer, rows in seen.deepstack_features]
        want = reference(**given, mm_encoder_outputs={"image": seen}).logits[0]
    loaded = engine("granite4_vision")
    assert torch.equal(loaded.logits(loaded.prompt(ONE), Plan()), want)


@pytest.mark.parametrize(
    ("layer_map", "spatial", "default", "said"),
    [
        ([(-3, 2), (-2, 2), (-1, 0)], [], "1@2,2@0", "Stack 0 (overwritten by 1 at layer 2) never enters"),
        ([(-1, 0), (-2, 5)], [3, 3], "0@0,1@5,3@3", "Stack 2 (overwritten by 3 at layer 3) never enters"),
        ([(-1, 0), (-2, 8)], [], "0@0", "Stack 1 names a layer that the LLM does not have (it has 0 to 7)"),
        ([(0, 0), (1, 1)], [], "0@0,1@1", None),  # hidden state 0 is what enters block 0
        ([(-1, 2)], [], "0@2", "No stack enters before LLM layer 0"),
    ],
)
def test_maps_are_what_the_model_really_does_and_oddities_are_said(tmp_path, layer_map, spatial, default, said):
    granite4_vision_folder(tmp_path, layer_map, spatial)
    loaded = tiny.build(tmp_path)
    assert str(loaded.layout.default) == default
    assert (said is None and not loaded.warnings) or (len(loaded.warnings) == 1 and said in loaded.warnings[0])
    reference = Granite4VisionForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        want = forward(reference, inputs(tmp_path, ONE))
    assert torch.equal(loaded.logits(loaded.prompt(ONE), loaded.layout.default), want)


def test_a_hidden_state_is_the_output_of_the_block_before_it():
    config = AutoConfig.from_pretrained(folder("granite4_vision"))
    config.deepstack_layer_map = [(0, 0), (4, 1), (-5, 2)]
    taps = [(source.tap, source.label) for source in layout_of(config)[0].sources[:3]]
    assert taps == [(None, "patch embeddings"), (3, "tap after vision block 3"), (None, "patch embeddings")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"deepstack_layer_map": [(-6, 0)]}, "taps hidden state -6 of the vision tower, which has 0 to 4"),
        ({"deepstack_layer_map": None, "spatial_target_layers": []}, "no image could enter"),
        ({"spatial_target_layers": [1, 2, 3, 4, 5]}, "lists 5 spatial_target_layers, but the model makes 4"),
        ({"vision_feature_select_strategy": "default"}, "drops the first patch of every view"),
    ],
)
def test_a_config_that_cannot_run_is_refused(change, said):
    config = AutoConfig.from_pretrained(folder("granite4_vision"))
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=said):
        layout_of(config)


# ---- Granite Docling


def test_the_base_is_multiplied_on_its_way_in_and_the_stacks_are_not():
    loaded, reference = engine("granite_docling"), plain("granite_docling")
    given = inputs(folder("granite_docling"), ONE)
    with torch.no_grad():
        seen = reference.model.get_image_features(given["pixel_values"], given["pixel_attention_mask"])
    features = loaded.see(loaded.prompt(ONE)).features
    assert torch.equal(features["base"], seen.pooler_output[0] * 12.0)
    for k in range(3):
        assert torch.equal(features[str(k)], seen.deepstack_features[k][0])


def test_all_tiles_of_a_page_are_one_grid_row_by_row_and_the_thumbnail_another():
    loaded = engine("granite_docling")
    prompt = loaded.prompt(PAGE)
    page, thumbnail = prompt.grids
    assert (page.name, page.grid, thumbnail.name, thumbnail.grid) == ("page in tiles", (4, 4), "thumbnail", (2, 2))
    marks = {docling_tokenizer().convert_tokens_to_ids(f"<row_{r}_col_{c}>"): (r, c) for r in (1, 2) for c in (1, 2)}
    ids = prompt.input_ids[0].tolist()
    for n, position in enumerate(page.positions):
        y, x = divmod(n, 4)
        mark = next(at for at in range(position, -1, -1) if ids[at] in marks)
        assert marks[ids[mark]] == (y // 2 + 1, x // 2 + 1)
        assert position - mark - 1 == y % 2 * 2 + x % 2  # within its tile row by row
    assert [view.grid for view in loaded.views(PAGE[0]["content"][0]["image"])] == [(4, 4), (2, 2)]


def test_the_fine_path_has_four_times_the_tokens(tmp_path):
    granite_docling_folder(tmp_path, fine=True)
    loaded = tiny.build(tmp_path)
    prompt, given = loaded.prompt(PAGE), inputs(tmp_path, PAGE)
    assert torch.equal(prompt.input_ids, given["input_ids"]) and [g.grid for g in prompt.grids] == [(8, 8), (4, 4)]
    reference = GraniteDoclingForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(loaded.logits(prompt, loaded.layout.default), reference(**given).logits[0])


@pytest.mark.parametrize(
    ("taps", "kept", "said"),
    [
        (
            (2, 0),
            (0, 2),
            "out of order (2, 0): the model makes stacks in order of depth (0, 2), stack k through merger k",
        ),
        ((0, 1, 1), (0, 1), "block 1 more than once (0, 1, 1): the model makes one stack of it, and stack k goes"),
        ((0, 9), (0,), "taps vision block 9, but the blocks are 0 to 3"),
    ],
)
def test_taps_go_through_the_mergers_by_order(tmp_path, taps, kept, said):
    granite_docling_folder(tmp_path, taps)
    loaded = tiny.build(tmp_path)
    assert tuple(source.tap for source in loaded.layout.sources[1:]) == kept
    assert len(loaded.warnings) == 1 and said in loaded.warnings[0]
    assert GraniteDocling.layout_of(loaded.model.config)[1] == loaded.warnings
    reference = GraniteDoclingForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        want = reference(**inputs(tmp_path, ONE)).logits[0]
    assert torch.equal(loaded.logits(loaded.prompt(ONE), loaded.layout.default), want)


def test_an_untrained_tap_of_granite_4_goes_through_the_nearest_projector(tmp_path):
    granite4_vision_folder(tmp_path, layer_map=((-4, 1), (-1, 0)))  # blocks 0 and 3, in the other order of layers
    loaded, image = load(str(tmp_path), device="cpu"), tiny.image(3, (48, 32))
    assert [source.name for source in loaded.layout.untrained] == ["tap1", "tap2"]
    assert loaded.layout.source("tap2").label.endswith("block 2, through the projector of block 3")
    prompt = loaded.prompt(tiny.ask(image, "x"))
    found = loaded.features(prompt, Plan.parse("1@0,tap1@2,tap2@3"))[-2:]
    model = Granite4VisionForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model.config.deepstack_layer_map = [[2, 1], [3, 0]]  # hidden state 2 is what block 1 gives
    with torch.no_grad():
        seen = model.model.get_image_features(**loaded.adapter.pixels([image]), return_dict=True)
    for rows, (_, want) in zip(found, seen.deepstack_features, strict=False):
        assert torch.equal(rows, want[0])


def test_an_untrained_tap_goes_through_the_nearest_merger():
    """The rows of vision block 3, which no stack is trained on, by hooks on a model that we never touched."""
    loaded, reference = engine("granite_docling"), plain("granite_docling")
    given, prompt = inputs(folder("granite_docling"), PAGE), loaded.prompt(PAGE)
    tower, seen = reference.model.vision_model, {}
    tower.encoder.layers[3].register_forward_hook(lambda m, args, out: seen.update(block=out))
    with torch.no_grad():
        reference.model.get_image_features(given["pixel_values"], given["pixel_attention_mask"])
        tiles = tower.connector.coarse.pixel_shuffle(seen["block"].contiguous(), 4)  # [5, 4, d]
        rows = tower.connector.coarse.deepstack_mergers[2](tiles)
    plan = Plan.parse("base@0,tap3@2")
    found = loaded.features(prompt, plan)[-1]
    page = rows[:4].unflatten(0, (2, 2)).unflatten(2, (2, 2)).transpose(1, 2).reshape(16, -1)
    assert torch.equal(found, torch.cat([page, rows[4]]))
