"""Entries of the paper's own checkpoints: tiny folders as released, and a plain loop over transformers' layers.

A released folder: shards of safetensors with LLaVA-1.5's weight names, the tower's among them, config.json of a type
that transformers does not know, and a SentencePiece vocabulary; no image processor and no tokenizer.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlamaTokenizer
from transformers.masking_utils import create_causal_mask
from transformers.tokenization_utils_base import generate_merges

from tests import tiny
from tests.families import Entry

TILE, SIDE = 16, 4  # pixels and tokens of one side of a view
MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.3, 0.25)
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": 4,
    "projection_dim": 32,
}
CONTROL = ("<unk>", "<s>", "</s>")
LETTERS = "▁ abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'-"
JOINED = (
    "he",
    "the",
    "▁t",
    "▁the",
    "▁th",
    "th",
    "er",
    "US",
    "ER",
    "USER",
    "AN",
    "in",
    "an",
    "▁a",
    "is",
    "What",
    "Wh",
    "at",
)
PIECES = (*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS.replace(" ", ""), *JOINED)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


# ---- the folder


def vocabulary(pieces: tuple[str, ...], kind: int = TrainerSpec.BPE) -> bytes:
    """A SentencePiece file of these pieces."""
    kinds = ModelProto.SentencePiece
    out = ModelProto(trainer_spec=TrainerSpec(model_type=kind, vocab_size=len(pieces), byte_fallback=True))
    for i, text in enumerate(pieces):
        flag = kinds.NORMAL
        if text in CONTROL:
            flag = kinds.UNKNOWN if text == "<unk>" else kinds.CONTROL
        elif text.startswith("<0x"):
            flag = kinds.BYTE
        out.pieces.add(piece=text, score=-float(i) if flag == kinds.NORMAL else 0.0, type=flag)
    out.normalizer_spec.name, out.normalizer_spec.remove_extra_whitespaces = "identity", False
    return out.SerializeToString()


def tower_folder(path: Path, weights: CLIPVisionModel | None = None, depth: int = 3) -> None:
    """A CLIP folder: its config and processor, and its weights if they are given."""
    path.mkdir(parents=True, exist_ok=True)
    if weights is None:
        CLIPVisionConfig(**VISION | {"num_hidden_layers": depth}).save_pretrained(path)
    else:
        weights.save_pretrained(path)
    pixels = {"image_processor_type": "CLIPImageProcessor", "image_mean": MEAN, "image_std": STD}
    pixels |= {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    tiny._write(path, "preprocessor_config.json", pixels)


def released_folder(
    path: Path, hd: bool = False, layers: int = 6, inside: bool = True, depth: int = 3, **changes: object
) -> Path:
    """A released checkpoint. inside: the tower's weights lie among the others; else only in the folder "clip"."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    text = LlamaConfig(**TEXT, num_hidden_layers=layers, vocab_size=len(PIECES))
    vision = CLIPVisionConfig(**VISION | {"num_hidden_layers": depth})
    llama, tower = LlamaForCausalLM(text), CLIPVisionModel(vision)
    projector = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
    for seed, module in enumerate((llama, tower, projector), start=20 + 10 * hd):
        tiny._randomise(module, seed)
    weights = dict(llama.state_dict())
    weights |= {f"model.mm_projector.{name}": value for name, value in projector.state_dict().items()}
    if inside:
        prefix = "model.vision_tower.vision_tower.vision_model."
        weights |= {prefix + name: value for name, value in tower.state_dict().items()}
    if hd:
        weights["model.image_newline"] = torch.randn(64, generator=torch.Generator().manual_seed(5))
    names = sorted(weights)
    shards = [names[i::3] for i in range(3)]
    where = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-00003.safetensors"
        save_file({name: weights[name].contiguous() for name in shard}, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for value in weights.values())
    tiny._write(path, "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    tower_folder(path / "clip", None if inside else tower, depth)
    config = {
        "_name_or_path": "checkpoints/vicuna-7b-v1.5",
        "architectures": ["DeepstackLlamaForCausalLM"],
        "model_type": "deepstack_llama",
        **TEXT,
        "rope_scaling": None,
        "num_hidden_layers": layers,
        "vocab_size": len(PIECES),
        "image_aspect_ratio": "deepstack",
        "mm_hidden_size": 32,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "clip",
        "num_crops": 4,
        "tokenizer_model_max_length": 2048,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.2",
        "use_mm_proj": True,
        **({"is_anyres_deepstack": True, "deepstack_sampling": "2d"} if hd else {}),
        **changes,
    }
    tiny._write(path, "config.json", {key: value for key, value in config.items() if value != "left out"})
    (path / "tokenizer.model").write_bytes(vocabulary(PIECES))
    special = {name: {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
               for name, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))}  # fmt: skip
    tiny._write(path, "special_tokens_map.json", {**special, "pad_token": "<unk>"})
    settings = {"add_bos_token": True, "add_eos_token": False, "legacy": False, "model_max_length": 2048}
    settings |= {"tokenizer_class": "LlamaTokenizer", "padding_side": "right", "pad_token": None}
    tiny._write(path, "tokenizer_config.json", {**settings, **special})
    return path


def hd_folder(path: Path) -> Path:
    return released_folder(path, hd=True)


def v_folder(path: Path, **changes: object) -> Path:
    """DeepStack-V: a tower of six layers, stacks before its last four."""
    said = {"deepstack_args_for_ablation": "deepstack_vit+2xsample+lsvit_start_layer_2"}
    return released_folder(path, depth=6, **said | changes)


# ---- what a conversation becomes, without the code under test


def tokens_of(messages: list[dict]) -> tuple[list[list[int]], list[Image.Image]]:
    """The ids of the texts between images, and the images, as the released code makes them from Vicuna's prompt."""
    numbers = {piece: i for i, piece in enumerate(PIECES)}
    tokenizer = LlamaTokenizer(vocab=numbers, merges=generate_merges(numbers), legacy=False)
    texts, images, system = [], [], SYSTEM
    for turn in messages:
        content = turn["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        words = "".join(part["text"] for part in parts if part["type"] == "text")
        own = [part["image"] for part in parts if part["type"] == "image"]
        images += own
        if turn["role"] == "system":
            system = words
        elif turn["role"] == "user":
            texts.append("USER: " + "<image>\n" * len(own) + words + " ")
        else:
            texts.append("ASSISTANT: " + words + "</s>")
    prompt = system + " " + "".join(texts) + "ASSISTANT:"
    chunks = [tokenizer(chunk, add_special_tokens=False)["input_ids"] for chunk in prompt.split("<image>")]
    return [[1, *chunks[0]], *chunks[1:]], images


GRIDS = [(1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]  # (columns, rows)


def grid_of(image: Image.Image) -> tuple[int, int]:
    """(columns, rows) of tiles: most of the image's own pixels kept, then least of the view wasted, then the first."""

    def kept(grid: tuple[int, int]) -> int:
        scale = min(grid[0] * TILE / image.width, grid[1] * TILE / image.height)
        return min(int(image.width * scale) * int(image.height * scale), image.width * image.height)

    return max(GRIDS, key=lambda grid: (kept(grid), kept(grid) - grid[0] * grid[1] * TILE**2, -GRIDS.index(grid)))


def cut(image: Image.Image, columns: int, rows: int) -> list[Image.Image]:
    """The image stretched over columns x rows views, cut into them row by row."""
    large = image.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC)
    boxes = [(x * TILE, y * TILE, (x + 1) * TILE, (y + 1) * TILE) for y in range(rows) for x in range(columns)]
    return [large.crop(box) for box in boxes]


def pixels(views: list[Image.Image]) -> Tensor:
    array = np.stack([np.asarray(view, dtype=np.float32) / 255 for view in views])
    return torch.from_numpy((array - np.float32(MEAN)) / np.float32(STD)).permute(0, 3, 1, 2)


def padded(each: list[Tensor]) -> Tensor:
    most = max(map(len, each))
    return torch.stack([torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in each])


def inputs(folder: Path, messages: list[dict]) -> dict[str, Tensor]:
    """input_ids, and per image `grids` [2] as (columns, rows), `pixel_values` and, for HD, `pixel_larger`."""
    chunks, images = tokens_of(messages)
    images = [image.convert("RGB") for image in images]
    config = json.loads((folder / "config.json").read_text())
    hd, v = config.get("is_anyres_deepstack", False), config.get("deepstack_args_for_ablation")
    grids = [(2, 2) if v else grid_of(image) for image in images]
    ids = list(chunks[0])
    for (columns, rows), chunk in zip(grids, chunks[1:], strict=True):
        ids += [0] * (SIDE**2 + (rows * SIDE * (columns * SIDE + 1) if hd else 0)) + chunk
    out = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if images:
        small = [cut(image, 1, 1) + cut(image, *grid) for image, grid in zip(images, grids, strict=True)]
        out |= {"pixel_values": padded([pixels(views) for views in small]), "grids": torch.tensor(grids)}
    if images and hd:
        larger = []
        for image, (columns, rows) in zip(images, grids, strict=True):
            fine = cut(image, 2 * columns, 2 * rows)
            views = cut(image, 2, 2)
            for y in range(rows):
                for x in range(columns):
                    views += [fine[(2 * y + i) * 2 * columns + 2 * x + j] for i in range(2) for j in range(2)]
            larger.append(pixels(views))
        out["pixel_larger"] = padded(larger)
    return out


# ---- the reference: transformers' CLIP and Llama, run layer by layer


class Reference(nn.Module):
    """The released model: loaded by its released names, its layers run one by one as the paper's code does."""

    def __init__(self, config: dict, llama: LlamaForCausalLM, tower: CLIPVisionModel, projector: nn.Module, newline):
        super().__init__()
        self.config, self.llama, self.tower, self.projector, self.newline = config, llama, tower, projector, newline
        self.stacking = True

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=False):
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        keys = (*TEXT, "num_hidden_layers", "vocab_size")
        text = LlamaConfig(**{key: config[key] for key in keys}, attn_implementation=attn_implementation)
        llama = LlamaForCausalLM(text)
        tower = CLIPVisionModel(CLIPVisionConfig.from_pretrained(folder / config["mm_vision_tower"]))
        projector = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
        newline = weights.pop("model.image_newline", None)
        for prefix, module in (
            ("model.vision_tower.vision_tower.vision_model.", tower),
            ("model.mm_projector.", projector),
            ("", llama),
        ):
            own = {name: weights.pop(name) for name in list(weights) if name.startswith(prefix)}
            module.load_state_dict({name.removeprefix(prefix): value for name, value in own.items()})
        info = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": list(weights)}
        model = cls(config, llama, tower, projector, newline).to(dtype)
        return (model, info) if output_loading_info else model

    def seen(self, views: Tensor) -> Tensor:
        """[B, 3, 16, 16] -> [B, 4, 4, 64]."""
        states = self.tower(views, output_hidden_states=True).hidden_states[self.config["mm_vision_select_layer"]]
        return self.projector(states[:, 1:]).reshape(len(views), SIDE, SIDE, -1)

    def image(self, grid: tuple[int, int], small: Tensor, larger: Tensor | None) -> list[Tensor]:
        """[base, stack 0, …] of one image, each [N, 64]."""
        columns, rows = grid
        small = small[: 1 + columns * rows]
        if larger is None:
            base = self.seen(small[:1])[0].flatten(0, 1)
            return [base, *self.sets(whole(self.seen(small[1:]), columns, rows), columns, rows)]
        larger = self.seen(larger[: 4 * len(small)])
        four = [self.sets(whole(larger[4 * v : 4 * v + 4], 2, 2), 2, 2, "2d") for v in range(len(small))]
        sets = [torch.stack([four[v][k] for v in range(len(small))]).unflatten(1, (SIDE, SIDE)) for k in range(4)]
        return [self.packed(views, columns, rows) for views in (self.seen(small), *sets)]

    def packed(self, views: Tensor, columns: int, rows: int) -> Tensor:
        out = [views[0].flatten(0, 1)]
        for line in whole(views[1:], columns, rows):
            out += [line, self.newline[None]]
        return torch.cat(out)

    def sets(self, wide: Tensor, columns: int, rows: int, sampling: str = "") -> list[Tensor]:
        """A map [rows * 4, columns * 4, 64] -> as many sets as there are crops, the absent ones zero."""
        sampling, n = sampling or self.config.get("deepstack_sampling", "2d"), rows * columns
        out = []
        for k in range(n):
            i, j = divmod(k, columns)
            tokens = []
            for y in range(SIDE):
                for x in range(SIDE):
                    if sampling == "2d":
                        tokens.append(wide[y * rows + i, x * columns + j])
                    elif sampling == "grid":
                        tokens.append(wide[i * SIDE + y, j * SIDE + x])
                    else:
                        tokens.append(wide[divmod((y * SIDE + x) * n + k, columns * SIDE)])
            out.append(torch.stack(tokens))
        return out + [torch.zeros_like(out[0])] * (self.config.get("num_crops", 4) - n)

    def forward(self, input_ids, attention_mask, pixel_values=None, pixel_larger=None, grids=None):
        model = self.llama.model
        hidden = model.embed_tokens(input_ids)
        images = []
        for k in range(0 if grids is None else len(grids)):
            larger = None if pixel_larger is None else pixel_larger[k]
            images.append(self.image(tuple(grids[k].tolist()), pixel_values[k], larger))
        # The unknown token holds the places of images; one that the model says itself comes after all of them.
        places = ((input_ids == 0) & attention_mask.bool()).nonzero().tolist()
        rows = []
        for image in images:
            own, places = places[: len(image[0])], places[len(image[0]) :]
            rows.append((own[0][0], own[0][1], own[0][1] + len(own)))
            assert len(own) == len(image[0])
        for (b, start, end), image in zip(rows, images, strict=True):
            hidden[b, start:end] = image[0]
        whole_text = bool(attention_mask.all())
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        mask = create_causal_mask(
            config=model.config,
            inputs_embeds=hidden,
            attention_mask=None if whole_text else attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        rotary = model.rotary_emb(hidden, position_ids=position_ids)
        first, step = self.config.get("deepstack_start_id", 1), self.config.get("deepstack_interval", 1)
        for number, layer in enumerate(model.layers):
            k, rest = divmod(number - first, step)
            if self.stacking and rest == 0 and k >= 0:
                hidden = hidden.clone()
                for (b, start, end), image in zip(rows, images, strict=True):
                    if k + 1 < len(image):
                        hidden[b, start:end] += image[k + 1]
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=position_ids)
        return SimpleNamespace(logits=self.llama.lm_head(model.norm(hidden)))

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, do_sample, max_new_tokens, **images):
        """[1, T + new]: greedy, the whole text anew for each token."""
        assert not do_sample
        for _ in range(max_new_tokens):
            token = self(input_ids, attention_mask, **images).logits[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], dim=1)
            attention_mask = torch.ones_like(input_ids)
            if token.item() == self.config["eos_token_id"]:
                break
        return input_ids


class ReferenceV(Reference):
    """DeepStack-V: the tower's layers run one by one, the global view's and the tiles' tokens each on their own."""

    def image(self, grid: tuple[int, int], small: Tensor, larger: None) -> list[Tensor]:
        assert grid == (2, 2) and larger is None
        layers, start = self.tower.encoder.layers, self.start(len(self.tower.encoder.layers))
        hidden, fine = (self.tower.pre_layrnorm(self.tower.embeddings(views)) for views in (small[:1], small[1:5]))
        for layer in layers[:start]:
            fine = layer(fine, None)
        sets = self.sets(whole(fine[:, 1:].unflatten(1, (SIDE, SIDE)), 2, 2), 2, 2, "2d")
        states = []
        for number, layer in enumerate(layers):
            if self.stacking and 0 <= number - start < len(sets):
                hidden = torch.cat([hidden[:, :1], hidden[:, 1:] + sets[number - start]], dim=1)
            states.append(hidden)
            hidden = layer(hidden, None)
        states.append(hidden)
        return [self.projector(states[self.config["mm_vision_select_layer"]][0, 1:])]

    def start(self, depth: int) -> int:
        said = self.config["deepstack_args_for_ablation"]
        return int(said.rpartition("_")[2]) if "lsvit_start_layer" in said else depth // 2


def whole(views: Tensor, columns: int, rows: int) -> Tensor:
    """Views [rows * columns, 4, 4, d] -> one map [rows * 4, columns * 4, d]."""
    lines = [torch.cat(list(views[y * columns : (y + 1) * columns]), dim=1) for y in range(rows)]
    return torch.cat(lines, dim=0)


def off(reference: Reference) -> None:
    reference.stacking = False


RELEASED = {
    "default": "base@0,0@1,1@2,2@3,3@4",
    "pad_token": "</s>",
    "off": off,
    "files": ("config.json", "tokenizer.model", "model.safetensors.index.json"),
    "decoder": lambda reference: reference.llama.model,
}

ENTRIES = {
    "deepstack_llama": Entry("deepstack_llama", released_folder, Reference, inputs, **RELEASED),
    "deepstack_llama_hd": Entry("deepstack_llama", hd_folder, Reference, inputs, **RELEASED),
    "deepstack_v": Entry(
        "deepstack_v", v_folder, ReferenceV, inputs, **RELEASED | {"default": "base@0,v0@v2,v1@v3,v2@v4,v3@v5"}
    ),
}
