"""DeepStack-L against an independent loop written after the paper's code, and its sampling on hand-sized tensors."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, LlavaForConditionalGeneration

from model.errors import UserError
from model.families import detect
from model.families.deepstack_llava import best_grid, layout_of, mosaic, sample, settings_of, tiles
from model.plan import Plan
from model.types import Sampling
from tests import tiny

SIDE, TILE = 4, 16  # tokens and pixels of one side of a tile in the tiny model


def plain_model(kind):
    return LlavaForConditionalGeneration.from_pretrained(tiny.folder(kind), dtype=torch.float32).eval()


def pixels(view):
    """One view, normalised as preprocessor_config.json says: [1, 3, 16, 16]."""
    array = (np.asarray(view, dtype=np.float32) / 255 - np.float32(0.5)) / np.float32(0.25)
    return torch.from_numpy(array).permute(2, 0, 1)[None]


def reference_views(image, rows, columns):
    """[1 + rows*columns, 3, 16, 16]: the squashed image, then its tiles row by row."""
    views = [image.resize((TILE, TILE), Image.Resampling.BICUBIC)]
    large = image.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC)
    for y in range(rows):
        for x in range(columns):
            views.append(large.crop((x * TILE, y * TILE, (x + 1) * TILE, (y + 1) * TILE)))
    return torch.cat([pixels(view) for view in views])


def reference_features(model, image, rows, columns, num_crops=4):
    """[1 + num_crops, 16, d]: global tokens, then the dilated sets, by explicit indexing."""
    views = reference_views(image, rows, columns)
    seen = [model.model.get_image_features(part).pooler_output for part in (views[:1], views[1:])]
    seen = torch.stack([*seen[0], *seen[1]])
    out = [seen[0]]
    for i in range(rows):
        for j in range(columns):
            tokens = []
            for y in range(SIDE):
                for x in range(SIDE):
                    high_y, high_x = y * rows + i, x * columns + j
                    tile = 1 + (high_y // SIDE) * columns + high_x // SIDE
                    tokens.append(seen[tile, (high_y % SIDE) * SIDE + high_x % SIDE])
            out.append(torch.stack(tokens))
    out += [torch.zeros_like(out[0])] * (1 + num_crops - len(out))
    return torch.stack(out)


def paper_loop(model, input_ids, image_tokens, stacks, start=1, interval=1):
    """Logits [T, V]: the decoder's layers one by one, stack i added before layer start + i * interval."""
    llama = model.model.language_model
    hidden = llama.embed_tokens(input_ids)
    first = int((input_ids[0] == model.config.image_token_id).nonzero()[0])
    n = len(image_tokens)
    hidden[0, first : first + n] = image_tokens
    rotary = llama.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for layer_id, layer in enumerate(llama.layers):
        if start <= layer_id < start + len(stacks) * interval and (layer_id - start) % interval == 0:
            hidden[0, first : first + n] += stacks[(layer_id - start) // interval]
        hidden = layer(hidden, position_embeddings=rotary)
    return model.lm_head(llama.norm(hidden))[0]


GRIDS = {(32, 32): (2, 2), (64, 16): (1, 4), (16, 64): (4, 1), (64, 32): (1, 2), (32, 64): (2, 1), (50, 17): (1, 3)}


@pytest.mark.parametrize("size", GRIDS)
def test_default_plan_is_the_papers_loop(size):
    engine, model = tiny.engine("hires"), plain_model("hires")
    image = tiny.image(1, size)
    prompt = engine.prompt(tiny.ask(image, "What does the sign say?"))
    with torch.no_grad():
        rows = reference_features(model, image, *GRIDS[size])
        want = paper_loop(model, prompt.input_ids, rows[0], rows[1:])
        assert torch.equal(torch.stack(list(engine.see(prompt).features.values())), rows)
    assert torch.equal(engine.logits(prompt, engine.layout.default), want)


def test_another_start_and_interval_move_the_stacks(tmp_path):
    engine = tiny.build(tiny.hires_folder(tmp_path, start=0, interval=2))
    assert str(engine.layout.default) == "base@0,0@0,1@2,2@4"
    assert "Stack 3 would enter before a layer that the LLM does not have" in engine.warnings[0]
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    image = tiny.image(1)
    prompt = engine.prompt(tiny.ask(image, "x"))
    with torch.no_grad():
        rows = reference_features(model, image, 2, 2)
        want = paper_loop(model, prompt.input_ids, rows[0], rows[1:], start=0, interval=2)
    # Two sets enter before layer 0: here their sum is added to the zeroed rows, there one after the other.
    torch.testing.assert_close(engine.logits(prompt, engine.layout.default), want, atol=2e-6, rtol=0)


def plain_inputs(kind, messages, image):
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder(kind))
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text.replace("<image>", "<image>" * SIDE**2)
    view = pixels(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    return {**tokenizer(text, return_tensors="pt", add_special_tokens=False), "pixel_values": view}


@pytest.mark.parametrize("kind", ["hires", "single"])
def test_base_alone_is_plain_llava(kind):
    engine, model = tiny.engine(kind), plain_model(kind)
    image = tiny.image(2, (40, 32))
    messages = tiny.ask(image, "What does the sign say?")
    inputs = plain_inputs(kind, messages, image)
    inputs.pop("token_type_ids", None)
    prompt = engine.prompt(messages)
    assert torch.equal(prompt.input_ids, inputs["input_ids"])
    with torch.no_grad():
        assert torch.equal(engine.logits(prompt, Plan.parse("base@0")), model(**inputs).logits[0])
    want = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :].tolist()
    answer = engine.answer(prompt, Plan.parse("base@0"), Sampling(max_new_tokens=24))
    assert [token.id for token in answer.tokens] == [token for token in want if token != engine.tokenizer.eos_token_id]


def test_an_idle_engine_leaves_the_model_bit_equal():
    image = tiny.image(2)
    inputs = plain_inputs("hires", tiny.ask(image, "x"), image)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        want = plain_model("hires")(**inputs).logits
        assert torch.equal(tiny.engine("hires").model(**inputs).logits, want)


def test_concat_merges_the_same_sets_once_before_the_projector():
    engine, model = tiny.engine("concat"), plain_model("concat")
    image = tiny.image(4, (64, 32))
    prompt = engine.prompt(tiny.ask(image, "x"))
    with torch.no_grad():
        views = reference_views(image, 1, 2)
        tower = model.model.vision_tower
        states = [tower(part, output_hidden_states=True).hidden_states[-1] for part in (views[:1], views[1:])]
        states = torch.cat(states)[:, 1:].reshape(3, SIDE, SIDE, -1)
        wide = torch.cat([states[1], states[2]], dim=1)  # the two tiles side by side
        sets = [wide[:, 0::2].flatten(0, 1), wide[:, 1::2].flatten(0, 1)]
        sets += [torch.zeros_like(sets[0])] * 2
        rows = model.model.multi_modal_projector(torch.cat([states[0].flatten(0, 1), *sets], dim=-1))
        want = paper_loop(model, prompt.input_ids, rows, [])
    assert torch.equal(engine.logits(prompt, engine.layout.default), want)
    assert str(engine.layout.default) == "base@0" and engine.layout.stack_names == ()


# Sampling on hand-sized tensors


@pytest.mark.parametrize("grid", [(1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)])
def test_dilated_sets_are_a_permutation_of_the_high_resolution_grid(grid):
    n = 3
    rows, columns = grid
    numbered = torch.arange(rows * n * columns * n).reshape(rows * n, columns * n, 1).float()
    cut = [numbered[y : y + n, x : x + n] for y in range(0, rows * n, n) for x in range(0, columns * n, n)]
    assert torch.equal(mosaic(torch.stack(cut), grid), numbered)
    sets = sample(numbered, grid, 4)
    assert len(sets) == 4 and all(s.shape == (n * n, 1) for s in sets)
    assert sorted(torch.cat(sets[: rows * columns]).flatten().tolist()) == list(range(rows * n * columns * n))
    for k in range(rows * columns):
        i, j = divmod(k, columns)
        for y in range(n):
            for x in range(n):
                assert sets[k][y * n + x] == numbered[y * rows + i, x * columns + j]
    assert all(not s.any() for s in sets[rows * columns :])


def test_absent_tiles_add_nothing():
    engine = tiny.engine("hires")
    prompt = engine.prompt(tiny.ask(tiny.image(5, (64, 32)), "x"))  # 1x2 tiles: sets 2 and 3 are zero
    assert torch.equal(
        engine.logits(prompt, engine.layout.default), engine.logits(prompt, Plan.parse("base@0,0@1,1@2"))
    )
    assert not torch.equal(engine.logits(prompt, Plan.parse("base@0,0@1")), engine.logits(prompt, Plan.parse("base@0")))


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1000, 1000), (2, 2)),
        ((1000, 500), (1, 2)),
        ((500, 1000), (2, 1)),
        ((1200, 400), (1, 3)),
        ((400, 1200), (3, 1)),
        ((1600, 200), (1, 4)),
        ((200, 1600), (4, 1)),
        ((640, 480), (2, 2)),
        ((400, 400), (2, 2)),
        ((336, 336), (2, 1)),  # not larger than a tile: all keep it whole, the first of those that waste least
        ((1, 1), (2, 1)),
        ((20_000, 1), (2, 1)),  # less than a pixel high at every scale
    ],
)
def test_tiles_are_chosen_as_the_paper_does(size, grid):
    assert best_grid(size, 336, 4) == grid


def test_tiles_are_cut_row_by_row():
    array = np.arange(4 * 6, dtype=np.uint8).reshape(4, 6)
    cut = tiles(Image.fromarray(array), 2)
    assert [np.asarray(tile)[0, 0] for tile in cut] == [0, 2, 4, 12, 14, 16]


# Layout, views, refusals


def test_the_layout_speaks_the_papers_words():
    layout = tiny.engine("hires").layout
    assert (layout.family, layout.n_layers, layout.n_vision_layers) == ("deepstack_llava", 6, 3)
    assert str(layout.default) == "base@0,0@1,1@2,2@3,3@4"
    assert layout.source("1").label == "sample 1 · rows 0::2, cols 1::2"
    assert layout.source("2").own_words == "added before LLM layer 3 (start 1, interval 1)"
    trained = {kind: tiny.engine(kind).trained for kind in ("hires", "single", "concat")}
    assert trained == {
        "hires": "trained with stacks",
        "single": "trained single injection",
        "concat": "trained with one merge (dimension concatenation)",
    }


def test_views_show_both_resolutions_and_who_owns_each_token():
    low, high = tiny.engine("hires").views(tiny.image(0, (64, 32)))
    assert (low.name, low.image.size, low.grid) == ("global view", (16, 16), (4, 4))
    assert (high.name, high.image.size, high.grid) == ("high-resolution view", (32, 16), (4, 8))
    assert high.owners[0] == ("0", "1") * 4 and len(high.owners) == 4
    square = tiny.engine("hires").views(tiny.image(0, (64, 64)))[1]
    assert square.owners[0][:2] == ("0", "1") and square.owners[1][:2] == ("2", "3")
    assert [view.name for view in tiny.engine("single").views(tiny.image())] == ["global view"]
    assert tiny.engine("concat").views(tiny.image())[1].owners is None


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"merge": "mix"}, "must be one of stack, none, concat, dummy, string, global-string, average"),
        ({"plan": "base@0,4@1"}, "uses the stack “4”, but this model has base, 0, 1, 2, 3"),
        ({"plan": 5}, "A plan is text, not int"),
        ({"sampling": "2d_scaledown"}, "must be one of 2d, grid, 1d, 1d-sequential"),
        ({"num_crops": 1}, "num_crops ≥ 2"),
    ],
)
def test_configs_that_cannot_be_run_are_refused(entry, said):
    config = AutoConfig.from_pretrained(tiny.folder("hires"))
    config.deepstack = entry
    with pytest.raises(UserError, match=said):
        layout_of(config)


def test_a_plan_in_the_config_is_the_default_and_says_where_its_sources_are_at_home():
    config = AutoConfig.from_pretrained(tiny.folder("hires"))
    config.deepstack = {"plan": "base@2,0@1*0.5,1@5"}
    layout, warnings = layout_of(config)
    assert str(layout.default) == "base@2,0@1*0.5,1@5" and not warnings
    assert [source.home for source in layout.sources] == [2, 1, 5, 3, 4]
    assert layout.source("base").own_words.startswith("added before LLM layer 2; zeros are put in place")
    assert layout.source("1").own_words == "added before LLM layer 5"
    assert layout.source("2").own_words == "added before LLM layer 3 (start 1, interval 1)"


def test_missing_settings_are_the_papers_defaults():
    config = AutoConfig.from_pretrained(tiny.folder("hires"))
    config.deepstack = {}
    said = {"merge": "stack", "num_crops": 4, "sampling": "2d", "start": 1, "interval": 1}
    unset = dict.fromkeys(("plan", "tower", "tower_mark", "vit_start"))
    assert settings_of(config) == {**said, **unset, "tower_change": False}


def test_other_models_are_refused_with_the_supported_ones():
    config = AutoConfig.from_pretrained(tiny.folder("hires"))
    assert detect(config).name == "deepstack_llava"
    del config.deepstack
    assert detect(config).name == "llava"
    with pytest.raises(UserError, match="type “bert” are not supported. Supported are Qwen3-VL.*DeepStack-L.*LLaVA"):
        detect(AutoConfig.for_model("bert"))
