"""The Qwen3-VL shaped twins: the training pass is transformers' own; a run of two steps gives a folder that loads."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from model.loading import load
from model.plan import Plan
from model.training import dataset, scenes, taps, tower, train
from model.training.tokenizer import QWEN, make_tokenizer
from model.types import Sampling
from tests.model.training.half import same_way


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(QWEN)


@pytest.fixture(scope="module")
def clip():
    """An untrained CLIP tower with its heads, 64 wide, whose norms are not at rest."""
    torch.manual_seed(0)
    reader = tower.Reader(tower.config(64, 5)).eval().requires_grad_(False)
    for name, weight in reader.named_parameters():
        if "norm" in name:
            weight += 0.2 * torch.randn_like(weight)
    return reader


@pytest.fixture(scope="module")
def batch():
    return dataset.render(4, 3)


@pytest.fixture(scope="module")
def reader(clip, batch):
    made = taps.Reader(taps.vision_configuration((), clip.tower.config)).eval().requires_grad_(False)
    taps.warm_start(made, clip, tower.to_pixels(batch.high[:, :64, :64]))
    return made


def twin_of(name, reader, clip, tokenizer) -> taps.Twin:
    """A twin whose model has the tower too, in the way that it is exported."""
    torch.manual_seed(1)
    twin = taps.Twin(taps.TAPS[name], clip.tower.config, tokenizer).eval()
    own = {key: value for key, value in reader.tower.state_dict().items() if "merger" not in key}
    twin.model.model.visual.load_state_dict(own, strict=False)
    return twin


def features(reader, pixels: torch.Tensor) -> torch.Tensor:
    blocks = reader.blocks(pixels)
    return torch.stack([*(blocks[k] for k in taps.KEPT), blocks[-1]], 1)


@pytest.mark.parametrize("name", list(taps.TAPS))
def test_packed_pass_equals_transformers_from_the_pixels_on(name, reader, clip, tokenizer, batch):
    twin = twin_of(name, reader, clip, tokenizer)
    pixels = tower.to_pixels(batch.high)
    rows = taps.questions_of(tokenizer).rows(batch.items, np.random.default_rng(0), per_scene=3)
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    with torch.no_grad():
        logits, result = twin(features(reader, pixels), rows)
        place = 0
        for i in range(len(rows.ids)):
            length = int(rows.length[i])
            prefix = [*twin.lead, *[image] * 144, *twin.closing]
            ids = torch.tensor([prefix + rows.ids[i, :length].tolist()])
            expected = twin.model(
                input_ids=ids,
                pixel_values=taps.patches(pixels[i // 3][None]),
                image_grid_thw=torch.tensor([[1, 24, 24]]),
                mm_token_type_ids=(ids == image).int(),
            ).logits[0, len(prefix) :]
            scored = rows.targets[i, :length] != -100
            count = int(scored.sum())
            torch.testing.assert_close(logits[place : place + count], expected[scored], atol=5e-6, rtol=0)
            assert torch.equal(result.targets[place : place + count], rows.targets[i, :length][scored])
            place += count
        assert place == len(logits)


@pytest.mark.parametrize("name", list(taps.TAPS))
def test_layers_in_bfloat16_learn_the_same(name, reader, clip, tokenizer, batch):
    twin = twin_of(name, reader, clip, tokenizer)
    rows = taps.questions_of(tokenizer).rows(batch.items, np.random.default_rng(0), per_scene=3)
    with torch.no_grad():
        seen = features(reader, tower.to_pixels(batch.high))
    same_way(twin, seen, rows)


def test_a_folder_of_it_is_small(tokenizer):
    with torch.device("meta"):
        made = Qwen3VLForConditionalGeneration(taps.configuration(taps.KEPT, tower.config(), tokenizer))
    assert 2 * sum(weights.numel() for weights in made.parameters()) < 16_000_000  # bytes, in float16


def test_questions_are_what_the_template_writes(tokenizer):
    """Two turns, put together for training, have the ids of the rendered conversation."""
    made = taps.questions_of(tokenizer)
    first, second = (made.turn(q, a, ())[0] for q, a in (("What is this?", "bar chart"), ("how many BARS?", "3")))
    text = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "text", "text": "What is this? "}, {"type": "image"}]},
            {"role": "assistant", "content": "bar chart"},
            {"role": "user", "content": "how many\nBARS?"},
            {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
        ],
        tokenize=False,
    )
    start = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    assert text.startswith(f"{start}what is this?<|im_end|>\n<|im_start|>assistant\nbar chart<|im_end|>\n")
    expected = tokenizer(text.removeprefix(start), add_special_tokens=False).input_ids
    assert first + made.user + second == expected[:-1]  # the template ends with a line feed


def test_patches_are_the_image_processors(batch):
    """Bit for bit, from a picture of three times the view's side; every square becomes 24 x 24 patches."""
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": taps.LEAST_PIXELS, "longest_edge": taps.MOST_PIXELS},
        **{"patch_size": 8, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    )
    picture = Image.fromarray(batch.high[0]).resize((384, 384), Image.Resampling.BICUBIC)
    high = np.array(picture.resize((192, 192), Image.Resampling.BICUBIC))
    made = processor(images=[picture], return_tensors="pt")
    assert torch.equal(made["pixel_values"], taps.patches(tower.to_pixels(high[None])))
    for side in range(16, 700):
        assert smart_resize(side, side, 16, taps.LEAST_PIXELS, taps.MOST_PIXELS) == (192, 192), side


def test_warm_start_takes_the_clip_tower_over(reader, clip, batch):
    """What enters the blocks points where CLIP's normed embedding does, on a tile at any of the nine places."""
    tile = tower.to_pixels(batch.high[:1, :64, :64])
    old = clip.tower(tile, output_hidden_states=True).hidden_states[0][0, 1:]
    states = reader.tower(taps.patches(tile.repeat(1, 1, 3, 3)), torch.tensor([[1, 24, 24]]), output_hidden_states=True)
    new = states.hidden_states[0].view(12, 12, 2, 2, -1).transpose(1, 2).reshape(24, 24, -1)
    for top in (0, 8, 16):
        for left in (0, 8, 16):
            there = new[top : top + 8, left : left + 8].reshape(64, -1)
            assert torch.cosine_similarity(there, old).min() > 0.97
    ours, theirs = reader.tower.blocks[2], clip.tower.encoder.layers[2]
    assert torch.equal(ours.attn.qkv.weight[64:128], theirs.self_attn.k_proj.weight)
    assert torch.equal(ours.mlp.linear_fc2.bias, theirs.mlp.fc2.bias)


def test_features_are_row_by_row(reader, batch):
    """A change of the patch in row 3, column 6 is largest in feature 3 * 24 + 6."""
    pixels = tower.to_pixels(batch.high[:1])
    other = pixels.clone()
    other[:, :, 24:32, 48:56] *= -1
    change = (reader.features(other) - reader.features(pixels)).norm(dim=-1)[0]
    assert change.argmax() == 3 * 24 + 6


@pytest.mark.parametrize("name", list(taps.TAPS))
def test_two_steps_to_a_folder_that_answers_as_in_training(name, clip, tokenizer, tmp_path):
    """Every stage; then the engine's greedy answer and scores are those of the training pass."""
    start = tmp_path / "tower"
    start.mkdir()
    saved = {"reader": clip.state_dict(), "config": clip.tower.config.to_dict(), "step": 2, "minutes": 0.0}
    torch.save(saved, start / "tower.pt")
    (start / "tower.jsonl").write_text('{"step": 2, "minutes": 0.0}\n')
    counts = {"steps": 2, "tower_steps": 2, "start_steps": 2, "shards": 1, "per_shard": 6}
    out = taps.train_taps(name, workdir=tmp_path, out=tmp_path / "out", device="cpu", **counts)
    recipe = json.loads((out / "recipe.json").read_text())
    assert [stage["stage"] for stage in recipe["stages"]] == ["start of the tower", "tower", "language model"]
    assert (out / "curve.jsonl").exists() and recipe["scenes"] == 6

    engine = load(str(out), device="cpu")
    assert engine.layout.stack_names == ("0", "1", "2")[: len(taps.TAPS[name])]
    scene = scenes.make_scene(np.random.default_rng([train.VALIDATION_SEED, 0]))
    content = [{"type": "text", "text": "WHAT is this?"}, {"type": "image", "image": scene.image}]
    prompt = engine.prompt([{"role": "user", "content": content}])
    assert prompt.visual_tokens == 144
    answer = engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=6))
    assert engine.answer(prompt, Plan.parse("base@0"), Sampling(max_new_tokens=2)).tokens

    twin = taps.Twin(taps.TAPS[name], clip.tower.config, tokenizer).eval()
    twin.load_state_dict(torch.load(tmp_path / name / "last.pt", weights_only=True)["twin"])
    twin.half().float()  # as exported
    asked = taps.questions_of(tokenizer).tokens("what is this?") + taps.questions_of(tokenizer).answer
    said = [token.id for token in answer.tokens]
    places = [-100] * (len(asked) - 1) + said + [-100]
    rows = taps.questions_of(tokenizer).pad([(asked + said, places, [-1] * len(places))])
    high = np.array(scene.image.resize((192, 192), Image.Resampling.BICUBIC))
    frozen = taps.load_reader(tmp_path / "taps-tower")
    frozen.half().float()
    with torch.no_grad():
        logits, result = twin(features(frozen, tower.to_pixels(high[None])), rows)
    assert logits.argmax(-1).tolist() == said == result.targets.tolist()
    given = torch.tensor([token.logprob for token in answer.tokens])
    torch.testing.assert_close(given, logits.log_softmax(-1).max(-1).values, atol=1e-4, rtol=0)
