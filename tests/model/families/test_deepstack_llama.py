"""The paper's own checkpoints: what is read from a released folder, what is refused, and what HD does with an image.

Run: pytest tests/model/families/test_deepstack_llama.py. Parity with a plain loop over transformers' layers, for one
and several images and under any plan, is in test_every_family.py; the loop and the folders in tests/families.
"""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import TrainerSpec
from transformers import AutoConfig, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel

from model import loading
from model.catalog import RELEASED, describe_models
from model.errors import UserError
from model.families import detect
from model.families.deepstack_llama import DeepStackLlama
from model.families.deepstack_llava import SAMPLINGS, dealt, sample
from model.loading import load
from model.plan import Plan
from model.types import Sampling
from tests import tiny
from tests.families import engine, folder
from tests.families.deepstack_llama import (
    PIECES,
    SIDE,
    SYSTEM,
    TILE,
    VISION,
    Reference,
    hd_folder,
    inputs,
    released_folder,
    tokens_of,
    tower_folder,
    vocabulary,
)

QUESTION = "What does the sign say?"
PHOTO = tiny.image(0, (64, 32))  # one row of two tiles


def started(path):
    return load(str(path), device="cpu", dtype="float32")


def same_as_the_reference(path, image=PHOTO):
    """Logits of the default plan equal those of the loop in tests/families, and the stacks are in them."""
    loaded, messages = started(path), tiny.ask(image, QUESTION)
    prompt = loaded.prompt(messages)
    with torch.no_grad():
        want = Reference.from_pretrained(path).eval()(**inputs(path, messages)).logits[0]
    found = loaded.logits(prompt, loaded.layout.default)
    assert torch.equal(found, want)
    assert not torch.equal(found, loaded.logits(prompt, Plan.parse("base@0")))
    return loaded


# ---- the folder


def test_the_type_is_read_from_config_json_because_transformers_does_not_know_it():
    with pytest.raises(ValueError, match="deepstack_llama"):
        AutoConfig.from_pretrained(folder("deepstack_llama"))
    assert loading.check_type(folder("deepstack_llama") / "config.json", "x") is DeepStackLlama
    loading.check(str(folder("deepstack_llama")))  # no image processor, no tokenizer.json


def test_nothing_is_said_to_be_deprecated_while_it_loads(recwarn):
    started(folder("deepstack_llama"))
    assert not [str(warning.message) for warning in recwarn if "rope" in str(warning.message)]


def test_keys_that_a_released_config_leaves_out_are_the_codes_defaults(tmp_path):
    left_out = dict.fromkeys(("num_crops", "mm_vision_select_feature", "deepstack_sampling"), "left out")
    loaded = same_as_the_reference(released_folder(tmp_path, **left_out))
    assert loaded.adapter.settings == {
        "merge": "stack",
        "num_crops": 4,
        "sampling": "2d",
        "start": 1,
        "interval": 1,
        "hd": False,
        "tower": None,
        "plan": None,
        "tower_mark": None,
        "tower_change": False,
        "vit_start": None,
    }


def test_start_and_interval_move_the_stacks(tmp_path):
    path = released_folder(tmp_path, deepstack_start_id=2, deepstack_interval=3)
    loaded = same_as_the_reference(path, tiny.image(0, (32, 32)))
    assert str(loaded.layout.default) == "base@0,0@2,1@5"
    assert "Stack 2, 3 would enter before a layer that the LLM does not have" in loaded.warnings[0]


@pytest.mark.parametrize("sampling", ["1d", "grid"])
@pytest.mark.parametrize("size", [(32, 32), (64, 32), (16, 48)])
def test_other_samplings_are_the_codes(tmp_path, sampling, size):
    loaded = same_as_the_reference(released_folder(tmp_path, deepstack_sampling=sampling), tiny.image(0, size))
    owners = loaded.views(tiny.image(0, (32, 32)))[1].owners
    assert owners[0] == (("0", "1", "2", "3") * 2 if sampling == "1d" else ("0",) * 4 + ("1",) * 4)


def test_samplings_are_permutations_and_strided_is_not_dilated():
    cells = torch.arange(64).reshape(8, 8, 1)
    sets = {name: [s.flatten().tolist() for s in sample(cells, (2, 2), 4, name)] for name in SAMPLINGS}
    assert all(dealt((8, 8), (2, 2), name) == each for name, each in sets.items())
    assert sets["1d-sequential"][1] == list(range(16, 32))
    assert all(sorted(sum(each, [])) == list(range(64)) for each in sets.values())
    assert sets["1d"][1][:3] == [1, 5, 9] and sets["2d"][1][:3] == [1, 3, 5] and sets["grid"][1][:3] == [4, 5, 6]


def test_fewer_crops_are_fewer_stacks(tmp_path):
    path = released_folder(tmp_path, num_crops=2, layers=4)
    loaded = same_as_the_reference(path)
    assert loaded.layout.stack_names == ("0", "1") and str(loaded.layout.default) == "base@0,0@1,1@2"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"image_aspect_ratio": "anyres"},
            "image_aspect_ratio 'anyres', which cannot be run here; supported is deepst",
        ),
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'.* supported is mlp2x_gelu"),
        (
            {"deepstack_sampling": "2d_scaledown"},
            "deepstack_sampling '2d_scaledown'.* supported is 2d or grid or 1d or 1d-sequential",
        ),
        ({"deepstack_args_for_ablation": "dummy_local"}, "deepstack_args_for_ablation 'dummy_local'.* is none"),
        ({"twoviews_unshare": True}, "twoviews_unshare True"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'.* supported is patch"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size 1024, but the vision tower clip is 32 wide"),
        ({"num_crops": 1}, "num_crops ≥ 2"),
        ({"mm_vision_tower": "left out"}, "names no vision tower; give mm_vision_tower"),
        ({"mm_vision_tower": "no/such/folder"}, "no/such/folder.* is not there, neither as a folder nor inside"),
        ({"mm_vision_tower": "someone/no-such-clip"}, "someone/no-such-clip .mm_vision_tower.* cannot be read"),
        ({"mm_vision_tower": "siglip"}, "of type “siglip_vision_model”; it has to be a CLIP"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence(tmp_path, change, said):
    path = released_folder(tmp_path, **change)
    tower_folder(path / "siglip")
    tiny._write(path / "siglip", "config.json", {"model_type": "siglip_vision_model"})
    with pytest.raises(UserError, match=said) as caught:
        started(path)
    assert "\n" not in str(caught.value)


def test_pickles_are_not_opened(tmp_path):
    released_folder(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    for i in (1, 2):
        (tmp_path / f"pytorch_model-{i:05d}-of-00002.bin").write_bytes(b"\x80")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(
        UserError, match="00001-of-00002.bin is a pickle, which can run code.* Give a folder with safet"
    ):
        started(tmp_path)


def test_a_missing_weight_is_noticed(tmp_path):
    released_folder(tmp_path)
    name = "model.layers.3.mlp.up_proj.weight"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    file = tmp_path / index["weight_map"][name]
    weights = load_file(file)
    lost = weights.pop(name)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks {lost.numel():,} of the model's"):
        started(tmp_path)


# ---- the tower


def test_the_tower_can_lie_in_its_own_folder_only(tmp_path):
    path = released_folder(tmp_path / "outside", inside=False)
    loaded = started(path)
    prompt, inside = loaded.prompt(tiny.ask(PHOTO, QUESTION)), engine("deepstack_llama")
    assert torch.equal(loaded.logits(prompt, loaded.layout.default), inside.logits(prompt, inside.layout.default)), (
        "the same weights, read from elsewhere"
    )
    assert f"read from {path / 'clip'}" in loaded.note and "Its tower" not in inside.note
    assert loaded.adapter.borrowed == sum(p.numel() for p in CLIPVisionModel(CLIPVisionConfig(**VISION)).parameters())


def test_the_towers_folder_may_hold_the_whole_clip_and_lie_anywhere(tmp_path):
    whole = CLIPConfig(
        text_config=CLIPTextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
        ).to_dict(),
        vision_config=CLIPVisionConfig(**VISION).to_dict(),
        projection_dim=32,
    )
    clip = CLIPModel(whole)
    tiny._randomise(clip, 3)
    tower_folder(tmp_path / "elsewhere")
    clip.save_pretrained(tmp_path / "elsewhere")
    loaded = started(released_folder(tmp_path / "m", inside=False, mm_vision_tower=str(tmp_path / "elsewhere")))
    found, want = loaded.model.model.vision_tower.state_dict(), clip.vision_model.state_dict()
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)


def test_weights_among_the_checkpoints_own_win_over_the_named_towers(tmp_path):
    path = released_folder(tmp_path)
    other = CLIPVisionModel(CLIPVisionConfig(**VISION))
    tower_folder(path / "clip", other)
    same_as_the_reference(path)


def test_a_tower_without_safetensors_is_refused(tmp_path):
    path = released_folder(tmp_path, inside=False)
    (path / "clip" / "model.safetensors").rename(path / "clip" / "pytorch_model.bin")
    with pytest.raises(
        UserError, match="clip has no safetensors; other formats can hold code and are not opened. Save"
    ):
        started(path)


def test_of_openais_tower_no_file_is_needed_where_its_weights_are_in_the_checkpoint():
    config = RELEASED["menglc/deepstack-l-vicuna-7b"]()
    with torch.device("meta"):
        model = DeepStackLlama.unfilled(config)
    # As many tensors as the released index has entries: 291 of Vicuna 7B, 4 of the projector, 391 of the tower.
    assert len(model.state_dict()) == 291 + 4 + 391
    vision = model.config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (1024, 24, 336, 14)
    assert vision.hidden_act == "quick_gelu" and model.config.vision_feature_layer == -2


# ---- the vocabulary and the prompt


def test_the_vocabulary_is_read_as_sentencepiece_reads_it():
    file = folder("deepstack_llama") / "tokenizer.model"
    theirs, tokenizer = SentencePieceProcessor(model_file=str(file)), engine("deepstack_llama").tokenizer
    for text in ("the hé", "What is in the USER's can?", "two  spaces and\na line", "", "ab12 ▁", "</s>"[1:]):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs.encode(text), text
    assert tokenizer.decode(tokenizer("the hé", add_special_tokens=False)["input_ids"]) == "the hé"
    assert tokenizer("")["input_ids"] == [1]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (vocabulary(PIECES)[:-3], "cannot be read: .*; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:74bafc6f\nsize 499723\n", "cannot be read"),
        (vocabulary(PIECES, kind=TrainerSpec.UNIGRAM), "is no byte-pair model"),
        (b"", "is no byte-pair model"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(tmp_path, data, said):
    released_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(UserError, match=said):
        started(tmp_path)


def test_a_tokenizer_json_beside_it_is_used(tmp_path):
    released_folder(tmp_path)
    engine("deepstack_llama").tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    same_as_the_reference(tmp_path)


def test_the_prompt_is_vicunas_with_images_first():
    loaded = engine("deepstack_llama")
    messages = [
        *tiny.ask("Hello", PHOTO, "there.", PHOTO),
        {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]},
        *tiny.ask(QUESTION),
    ]
    chunks, _ = tokens_of(messages)
    prompt = loaded.prompt(messages)
    holes = [0] * SIDE**2
    assert prompt.input_ids[0].tolist() == chunks[0] + holes + chunks[1] + holes + chunks[2]
    text = loaded.tokenizer.decode(chunks[0] + chunks[1] + chunks[2])
    assert text == f"<s> {SYSTEM} USER:  \n \nHellothere. ASSISTANT: Hi.</s>USER: {QUESTION} ASSISTANT:"


@pytest.mark.parametrize("typed", ["<unk>", "</s>", "<s>", "<image>"])
def test_special_tokens_typed_by_a_user_stay_text(typed):
    loaded = engine("deepstack_llama")
    prompt = loaded.prompt(tiny.ask(PHOTO, f"Is {typed} here?"))
    plain = loaded.prompt(tiny.ask(PHOTO, "Is it here?"))
    for token in (0, 1, 2):
        assert (prompt.input_ids == token).sum() == (plain.input_ids == token).sum()
    assert prompt.visual_tokens == SIDE**2
    assert typed in "".join(prompt.texts).replace(" ", "").replace("▁", "")


def test_a_prompt_that_is_too_long_is_refused_and_not_cut(tmp_path):
    loaded = started(released_folder(tmp_path, max_position_embeddings=200))
    loaded.prompt(tiny.ask(PHOTO, "x"))
    with pytest.raises(UserError, match="but this model reads at most 199. Shorten it, or use fewer"):
        loaded.prompt(tiny.ask(PHOTO, PHOTO, PHOTO, PHOTO, "x"))


def test_the_released_codes_defects_are_named():
    assert "shifts the stacks of a second image" in engine("deepstack_llama").note
    assert engine("deepstack_llama").trained == "trained with stacks"


# ---- HD


def test_hd_packs_views_with_row_ends_and_every_stack_likewise():
    loaded = engine("deepstack_llama_hd")
    prompt = loaded.prompt(tiny.ask(PHOTO, QUESTION))
    small, large = prompt.grids
    assert (small.grid, small.box, large.grid, large.box) == ((4, 4), None, (4, 9), (0, 0, 72.0, 32))
    seen, end = loaded.see(prompt).features, loaded.model.model.image_newline
    for rows in seen.values():
        lines = rows[SIDE**2 :].unflatten(0, large.grid)
        assert torch.equal(lines[:, -1], end.expand(4, -1)) and not (lines[:, :-1] == end).all(-1).any()
    assert not torch.equal(seen["base"], seen["0"]) and not torch.equal(seen["0"], seen["1"])


def test_hd_stacks_are_the_view_twice_as_large():
    """Set (i, j) of a view is what the tower gives at every second token of the view's four tiles."""
    loaded = engine("deepstack_llama_hd")
    family, image = loaded.adapter, tiny.image(3, (32, 32))
    seen = loaded.see(loaded.prompt(tiny.ask(image, QUESTION))).features
    large = image.resize((4 * TILE, 4 * TILE), Image.Resampling.BICUBIC)
    with torch.no_grad():
        corner = family._project([large.crop((0, 0, TILE, TILE))])[0]  # of the first tile's view
    for k in range(4):
        mine = seen[str(k)][SIDE**2 :].unflatten(0, (2 * SIDE, 2 * SIDE + 1))[:2, :2]
        torch.testing.assert_close(mine, corner[k // 2 :: 2, k % 2 :: 2], atol=2e-6, rtol=0)


def test_the_views_of_hd_show_what_its_stacks_see():
    small, large = engine("deepstack_llama_hd").views(PHOTO)
    assert (small.image.size, small.grid) == ((16, 16), (4, 4))
    assert (large.image.size, large.grid) == ((64, 32), (8, 16))
    assert large.owners[0][:4] == ("0", "1", "0", "1") and large.owners[1][:2] == ("2", "3")


def test_sampling_is_not_looked_at_by_hd(tmp_path):
    loaded = same_as_the_reference(released_folder(tmp_path, hd=True, deepstack_sampling="grid"))
    assert loaded.warnings == (
        "The config asks for grid sampling, which HD does not look at: its views are always sampled 2d.",
    )


def test_hd_with_five_crops_has_four_stacks():
    config = RELEASED["menglc/deepstack-l-hd-vicuna-7b"]()
    config.num_crops = 5
    assert DeepStackLlama.layout_of(config)[0].stack_names == ("0", "1", "2", "3")


# ---- beside plain transformers, and described


@pytest.mark.parametrize("kind", ["deepstack_llama", "deepstack_llama_hd"])
@pytest.mark.parametrize("sizes", [[], [(40, 32)], [(40, 32), (64, 16)]])
def test_without_stacks_it_is_plain_llava_or_llava_next(kind, sizes):
    loaded = engine(kind)
    prompt = loaded.prompt(tiny.ask(*(tiny.image(i, size) for i, size in enumerate(sizes)), QUESTION))
    given, plan = loaded.adapter.plain_inputs(prompt)
    with torch.no_grad():
        plain = loaded.model(**given).logits[0]
    assert str(plan) == "base@0"
    # Several images: transformers runs the tower on them as one batch, the engine one by one, so last bits differ.
    torch.testing.assert_close(plain, loaded.logits(prompt, plan), atol=1e-5 if len(sizes) > 1 else 0, rtol=0)


@pytest.mark.parametrize("hd", [False, True])
def test_it_runs_in_bfloat16(tmp_path, hd):
    loaded = load(str((hd_folder if hd else released_folder)(tmp_path)), device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    prompt = loaded.prompt(tiny.ask(PHOTO, QUESTION))
    exact = engine("deepstack_llama_hd" if hd else "deepstack_llama")
    found, want = loaded.logits(prompt, loaded.layout.default).float(), exact.logits(prompt, exact.layout.default)
    assert torch.nn.functional.cosine_similarity(found, want, dim=-1).min() > 0.99
    assert loaded.answer(prompt, loaded.layout.default, Sampling(max_new_tokens=2)).tokens


def test_the_released_ones_are_described_with_their_dimensions():
    rows = {row.name: row.to_json() for row in describe_models()}
    plain, hd = rows["menglc/deepstack-l-vicuna-7b"], rows["menglc/deepstack-l-hd-vicuna-7b"]
    assert (plain["vision_layers"], plain["llm_layers"], plain["hidden_size"]) == (24, 32, 4096)
    assert plain["default_plan"] == hd["default_plan"] == "base@0,0@1,1@2,2@3,3@4"
    # 6,738,415,616 of Vicuna 7B, 303,507,456 of CLIP-L/14-336, 20,979,712 of the projector; HD has row ends too.
    assert plain["parameters"] == 6_738_415_616 + 303_507_456 + 20_979_712
    assert hd["parameters"] == plain["parameters"] + 4096
    assert [stack["stack"] for stack in plain["stacks"]] == ["0", "1", "2", "3"]
    assert plain["stacks"][1]["own_code"] == "added before LLM layer 2 (start 1, interval 1)"
    assert detect(RELEASED["menglc/deepstack-l-vicuna-7b"]()) is DeepStackLlama


def test_the_index_names_every_shard():
    index = json.loads((folder("deepstack_llama") / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3 and "model.mm_projector.2.bias" in index["weight_map"]
