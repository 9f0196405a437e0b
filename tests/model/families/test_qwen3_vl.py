"""Qwen3-VL against transformers' own code: default plan, stacks off, positions, taps, a released-format folder."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model.families import detect
from model.families.qwen3_vl import layout_of
from model.plan import Plan
from model.types import Sampling
from tests import tiny


@pytest.fixture(scope="module")
def engine():
    return tiny.engine("qwen")


@pytest.fixture
def plain():
    """The same folder in plain transformers, never touched by us."""
    return Qwen3VLForConditionalGeneration.from_pretrained(tiny.folder("qwen"), dtype=torch.float32).eval()


def reference_inputs(messages):
    """What the released processor makes: the placeholder repeated in the text, patches, grids, token types."""
    folder = tiny.folder("qwen")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, chat_template=template)
    images = [p["image"] for m in messages if not isinstance(m["content"], str) for p in m["content"] if "image" in p]
    inputs = {}
    if images:
        inputs = dict(Qwen2VLImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt"))
        for grid in inputs["image_grid_thw"]:
            n = int(grid.prod()) // 4
            text = text.replace("<|image_pad|>", "<|placeholder|>" * n, 1)
        text = text.replace("<|placeholder|>", "<|image_pad|>")
    inputs["input_ids"] = tokenizer(text, return_tensors="pt")["input_ids"]
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return inputs


CONVERSATIONS = {
    "one image": tiny.ask(tiny.image(0, (40, 32)), "What does the sign say?"),
    "two images": tiny.ask(tiny.image(0), "and", tiny.image(1, (64, 32)), "Which is red?"),
    "image in a later turn": [
        {"role": "system", "content": "Be brief."},
        *tiny.ask("Hello there."),
        {"role": "assistant", "content": "Hello. Show me a picture."},
        *tiny.ask(tiny.image(2, (24, 64)), "What is this?"),
    ],
    "text only": tiny.ask("How many red circles are there?"),
}


def reference_logits(plain, inputs):
    """[T, V] of transformers' own forward, the tower run image by image: joint runs round differently (3e-6)."""
    inputs = dict(inputs)
    with torch.no_grad():
        if len(inputs.get("image_grid_thw", ())) > 1:
            grids, sizes = inputs["image_grid_thw"], inputs["image_grid_thw"].prod(1).tolist()
            pixels = inputs.pop("pixel_values").split(sizes)
            each = [plain.model.get_image_features(p, g[None]) for p, g in zip(pixels, grids, strict=True)]
            joint = each[0]
            joint.pooler_output = [seen.pooler_output[0] for seen in each]
            stacks = range(len(joint.deepstack_features))
            joint.deepstack_features = [[seen.deepstack_features[k][0] for seen in each] for k in stacks]
            inputs["mm_encoder_outputs"] = {"image": joint}
        return plain(**inputs).logits[0]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_default_plan_is_transformers_own_forward(engine, plain, name):
    messages = CONVERSATIONS[name]
    inputs = reference_inputs(messages)
    prompt = engine.prompt(messages)
    assert torch.equal(prompt.input_ids, inputs["input_ids"])
    ours = engine.logits(prompt, engine.layout.default)
    assert torch.equal(ours, reference_logits(plain, inputs))
    with torch.no_grad():
        torch.testing.assert_close(ours, plain(**inputs).logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_default_plan_is_transformers_own_greedy_generate(engine, plain, name):
    messages = CONVERSATIONS[name]
    inputs = reference_inputs(messages)
    want = plain.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :].tolist()
    answer = engine.answer(engine.prompt(messages), engine.layout.default, Sampling(max_new_tokens=24))
    end = [answer.stopped == "end"] * (len(want) - len(answer.tokens))
    assert [token.id for token in answer.tokens] == want[: len(answer.tokens)] and all(end)


def test_base_alone_is_the_family_with_its_stacks_off(engine, plain):
    messages = CONVERSATIONS["one image"]
    plain.model.visual.deepstack_visual_indexes = []
    with torch.no_grad():
        want = plain(**reference_inputs(messages)).logits[0]
    prompt = engine.prompt(messages)
    assert torch.equal(engine.logits(prompt, Plan.parse("base@0")), want)
    assert not torch.equal(engine.logits(prompt, engine.layout.default), want)


def test_zeroed_mergers_are_stacks_off_too(engine, plain):
    for merger in plain.model.visual.deepstack_merger_list:
        merger.linear_fc2.weight.data.zero_()
        merger.linear_fc2.bias.data.zero_()
    messages = CONVERSATIONS["one image"]
    with torch.no_grad():
        want = plain(**reference_inputs(messages)).logits[0]
    assert torch.equal(engine.logits(engine.prompt(messages), Plan.parse("base@0")), want)


def test_stacks_are_the_mergers_of_the_tapped_blocks(engine, plain):
    image = tiny.image(3, (48, 32))
    blocks = {}
    for index, block in enumerate(plain.model.visual.blocks):
        block.register_forward_hook(lambda module, args, out, index=index: blocks.update({index: out}))
    inputs = Qwen2VLImageProcessorPil.from_pretrained(tiny.folder("qwen"))(images=[image], return_tensors="pt")
    with torch.no_grad():
        plain.model.get_image_features(**inputs)
        features = engine.see(engine.prompt(tiny.ask(image, "x"))).features
        for k, tap in enumerate(engine.adapter.taps):
            assert torch.equal(features[str(k)], plain.model.visual.deepstack_merger_list[k](blocks[tap]))
        assert torch.equal(features["base"], plain.model.visual.merger(blocks[3]))


def test_an_idle_engine_leaves_the_model_bit_equal(engine, plain):
    inputs = reference_inputs(CONVERSATIONS["one image"])
    with torch.no_grad():
        assert torch.equal(engine.model(**inputs).logits, plain(**inputs).logits)


def config_with(taps, layers=5):
    config = AutoConfig.from_pretrained(tiny.folder("qwen"))
    config.vision_config.deepstack_visual_indexes = list(taps)
    config.text_config.num_hidden_layers = layers
    return config


@pytest.mark.parametrize(
    ("taps", "kept", "said"),
    [
        ((0, 1, 2), (0, 1, 2), None),
        ((), (), None),
        ((2, 0), (0, 2), "out of order (2, 0)"),
        ((0, 1, 1), (0, 1), "block 1 more than once"),
        ((0, 9), (0,), "taps vision block 9, but the blocks are 0 to 3"),
        ((-1, 1), (1,), "taps vision block -1"),
    ],
)
def test_taps_are_what_the_tower_really_makes_and_oddities_are_said(tmp_path, taps, kept, said):
    layout, warnings = layout_of(config_with(taps))
    assert tuple(source.tap for source in layout.sources[1:]) == kept
    assert (said is None and not warnings) or (len(warnings) == 1 and said in warnings[0])
    engine = tiny.build(tiny.qwen3_vl_folder(tmp_path, taps=taps))
    assert engine.warnings == warnings
    prompt = engine.prompt(CONVERSATIONS["one image"])
    assert list(engine.see(prompt).features) == ["base", *layout.stack_names]
    plain = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        want = plain(**reference_inputs(CONVERSATIONS["one image"])).logits[0]
    assert torch.equal(engine.logits(prompt, engine.layout.default), want)


def test_a_stack_after_the_last_layer_is_left_out_and_said(tmp_path):
    engine = tiny.build(tiny.qwen3_vl_folder(tmp_path, taps=(0, 1, 2), layers=3))
    assert str(engine.layout.default) == "base@0,0@1,1@2"
    assert "Stack 2 would be added after LLM layer 2 or later" in engine.warnings[0]
    prompt = engine.prompt(CONVERSATIONS["one image"])
    plain = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        want = plain(**reference_inputs(CONVERSATIONS["one image"])).logits[0]
    text = [i for i, t in enumerate(prompt.texts) if t]
    assert torch.equal(engine.logits(prompt, engine.layout.default)[text], want[text])


def test_the_layout_speaks_the_familys_words(engine):
    layout = engine.layout
    assert (layout.family, layout.n_layers, layout.n_vision_layers, layout.hidden_size) == ("qwen3_vl", 5, 4, 64)
    assert str(layout.default) == "base@0,0@1,1@2,2@3"
    assert [s.label for s in layout.sources[1:]] == [f"tap after vision block {k}" for k in range(3)]
    assert layout.source("1").own_words == "added after LLM layer 1" and layout.source("1").home == 2
    assert engine.trained == "trained with stacks"


def test_the_folder_has_the_released_files(engine):
    folder = tiny.folder("qwen")
    names = {path.name for path in folder.iterdir()}
    assert {
        *("config.json", "generation_config.json", "model.safetensors.index.json", "preprocessor_config.json"),
        *("video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.json"),
    } <= names
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert detect(AutoConfig.from_pretrained(folder)).name == "qwen3_vl"


def test_the_view_is_the_resized_image_with_its_token_grid(engine):
    (view,) = engine.views(tiny.image(0, (100, 50)))
    assert view.grid == engine.prompt(tiny.ask(tiny.image(0, (100, 50)), "x")).grids[0].grid
    assert view.image.size == (view.grid[1] * 16, view.grid[0] * 16)
    assert view.image.width * view.image.height <= 64 * 64
