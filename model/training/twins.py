"""Train the DeepStack-L shaped language models on a frozen tower: `hires`, `hires-single`, `hires-concat`.

All three see the same scenes, the same questions in the same order, the same number of steps and the same seed; they
differ in what enters: four stacks, nothing beyond the global view, or the same pixels merged once into the input.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from model.training import dataset, packed, scenes, strings
from model.training.canvas import CHARACTERS, COLOURS, SHAPES
from model.training.muon import Muon
from model.training.tokenizer import make_tokenizer
from model.training.tower import Reader, accelerator_for, to_pixels

MERGE = {"hires": "stack", "hires-single": "none", "hires-concat": "concat"}
START, INTERVAL, CROPS = 1, 1, 4  # the paper's defaults: stacks before layers 1, 2, 3, 4
BATCH = 8  # scenes in a step
ROWS = 12  # questions asked of a scene at once
FINE_SHARE = 0.78  # of the questions asked
OUT_OF_SCOPE_SHARE = 0.03
SECOND_TURN_SHARE = 0.08
SAVE_EVERY = 200  # steps
WORDS = (  # words that single out a place: their embeddings are drawn towards the image rows they point at
    *(*COLOURS, *SHAPES, *scenes.ORDINALS, "last", "top", "bottom", "left", "right", "middle"),
    *(word.lower() for word in (*strings.FIELDS, *strings.ITEMS)),
)
_WORD = {word: number for number, word in enumerate(WORDS)}
WATCHED = (5, 6)  # layers whose head 0 is shown where the answer is, in training


def configuration(
    vision: CLIPVisionConfig, merge: str, vocabulary: int, width: int = 128, layers: int = 8, image_token: int = 4
) -> LlavaConfig:
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=352 * width // 128,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=64,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=[-1] * (1 + CROPS) if merge == "concat" else -1,
        deepstack={"merge": merge, "num_crops": CROPS, "sampling": "2d", "start": START, "interval": INTERVAL},
        tie_word_embeddings=False,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )


@torch.no_grad()
def encode(reader: Reader, batch: dataset.Batch, chunk: int = 32) -> torch.Tensor:
    """Tower features of every scene, float16 `[n, 5, 64, width]`: the global view, then four samples of the mosaic,
    2d-dilated.
    """
    n = len(batch.low)
    out = torch.empty(n, 1 + CROPS, 64, reader.tower.config.hidden_size, dtype=torch.float16)
    for start in range(0, n, chunk):
        low, high = batch.low[start : start + chunk], batch.high[start : start + chunk]
        b = len(low)
        tiles = high.reshape(b, 2, 64, 2, 64, 3).swapaxes(2, 3).reshape(b * 4, 64, 64, 3)
        features = reader.features(torch.cat([to_pixels(low), to_pixels(tiles)]))
        out[start : start + b, 0] = features[:b].half()
        mosaic = features[b:].view(b, 2, 2, 8, 8, -1).transpose(2, 3).reshape(b, 16, 16, -1)
        for i in range(2):
            for j in range(2):
                out[start : start + b, 1 + 2 * i + j] = mosaic[:, i::2, j::2].reshape(b, 64, -1).half()
    return out


class Questions:
    """Turns stored questions into padded token rows; wording, case and choice are drawn anew each time.

    answer, end, user: what the chat template writes before an answer, after it, and before the next question.
    """

    def __init__(self, tokenizer, answer: str = "<answer>", end: str = "</s>", user: str = "<user>"):
        self.tokenizer = tokenizer
        self.answer, self.end, self.user = self.tokens(answer), self.tokens(end), self.tokens(user)

    @property
    def words(self) -> list[int]:
        """The token of each of WORDS as it stands inside a question, after a space."""
        return [self.tokens("x " + word)[1] for word in WORDS]

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def turn(self, question: str, answer: str, cells: tuple[int, ...]):
        """Token ids of one question and its answer; targets at the answer; cells beside them."""
        asked = self.tokens(question.lower().strip()) + self.answer
        said = self.tokens(answer) + self.end
        ids = asked + said
        targets = [-100] * (len(asked) - 1) + said + [-100]
        where = [-1] * len(ids)
        for i, cell in enumerate(cells[: len(said) - 1]):
            where[len(asked) - 1 + i] = cell
        return ids, targets, where

    def draw(self, items: list[dataset.Item], rng: np.random.Generator):
        """One question of a scene (or one that no scene answers), sometimes with a second turn."""
        if rng.random() < OUT_OF_SCOPE_SHARE:
            return self.turn(scenes.out_of_scope(rng), scenes.UNKNOWN, ())
        fine = [i for i in items if i.question.kind == "fine"]
        coarse = [i for i in items if i.question.kind == "coarse"]
        group = fine if fine and (rng.random() < FINE_SHARE or not coarse) else coarse
        if group is coarse:  # the same few questions stand under every picture: ask them less
            weights = np.array([0.25 if i.question.topic == "picture" else 1.0 for i in group])
            item = group[int(rng.choice(len(group), p=weights / weights.sum()))]
        else:
            item = group[int(rng.integers(len(group)))]
        return self.turn(scenes.restyle(item.question.reworded(rng), rng), item.question.answer, item.cells)

    def rows(self, chosen: list[list[dataset.Item]], rng: np.random.Generator, per_scene: int = ROWS) -> packed.Rows:
        table = []
        two_turns = rng.random() < SECOND_TURN_SHARE  # of the batches: half as many rows, two questions each
        for items in chosen:
            for _ in range(per_scene // 2 if two_turns else per_scene):
                ids, targets, where = self.draw(items, rng)
                if two_turns:
                    more = self.draw(items, rng)
                    ids, targets, where = (
                        ids + self.user + more[0],
                        targets + [-100] * len(self.user) + more[1],
                        where + [-1] * len(self.user) + more[2],
                    )
                table.append((ids, targets, where))
        return self.pad(table)

    def grounding(self, chosen: list[list[dataset.Item]]) -> torch.Tensor:
        """Which of WORDS point at which visual token, `[B, 64, W]` in 0, 1: the words that a question of the scene uses
        to single out its answer stand at the answer's place, and so does the answer of a question about an object."""
        truth = torch.zeros(len(chosen), dataset.GRID**2, len(WORDS))
        for b, items in enumerate(chosen):
            for item in items:
                cells = [cell for cell in item.cells if cell >= 0]
                said = [str(value) for _, value in item.question.words]
                said += [item.question.answer] if item.question.thing is not None else []
                for word in " ".join(said).split():
                    if word in _WORD and cells:
                        truth[b, cells, _WORD[word]] = 1
        return truth

    @staticmethod
    def pad(table) -> packed.Rows:
        longest = max(len(ids) for ids, _, _ in table)
        full = [
            torch.tensor([row[k] + [fill] * (longest - len(row[k])) for row in table])
            for k, fill in ((0, 0), (1, -100), (2, -1))
        ]
        return packed.Rows(*full, torch.tensor([len(ids) for ids, _, _ in table]))


class Twin(nn.Module):
    """Projector, decoder and training-only head of one variant; `merge` is what enters."""

    def __init__(self, merge: str, vision: CLIPVisionConfig, vocabulary: int):
        super().__init__()
        self.merge = merge
        self.model = LlavaForConditionalGeneration(configuration(vision, merge, vocabulary))
        self.grounding = packed.Grounding(self.model.config.text_config.hidden_size)
        self.contents = packed.Contents(
            self.model.config.text_config.hidden_size, dataset.CONTENTS, len(CHARACTERS) + 1
        )

    def inject(self, features: torch.Tensor):
        """Features `[B, 5, 64, width]` to the base `[B, 64, d]` and the stacks by layer."""
        projector = self.model.model.multi_modal_projector
        if self.merge == "concat":
            return projector(features.transpose(1, 2).flatten(2)), {}
        if self.merge == "none":
            return projector(features[:, 0]), {}
        rows = projector(features)
        return rows[:, 0], {START + INTERVAL * s: rows[:, 1 + s] for s in range(CROPS)}

    def forward(self, features: torch.Tensor, rows: packed.Rows):
        base, stacks = self.inject(features)
        lead = torch.tensor([2, 5], device=features.device)
        hidden, targets, attention, cells, seen = packed.forward(
            self.model.model.language_model, lead, base, stacks, rows, WATCHED, 6
        )
        return self.model.lm_head(hidden), targets, attention, cells, seen


def train_twin(
    name: str,
    reader: Reader,
    data: list[tuple[dataset.Batch, torch.Tensor]],
    validation,
    out: Path,
    steps: int,
    batch: int = BATCH,
    seed: int = 0,
    rate: float = 0.02,
    device: str | None = None,
    progress=None,
    log=print,
) -> Twin:
    """Train one variant for `steps` steps of `batch` scenes; resumable from out/last.pt."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    twin = Twin(MERGE[name], reader.tower.config, len(tokenizer))
    twin.model.model.vision_tower.requires_grad_(False)
    return fit(name, twin, Questions(tokenizer), data, validation, out, steps, batch, seed, rate, device, progress, log)


def fit(
    name: str,
    twin: nn.Module,
    questions: Questions,
    data: list[tuple[dataset.Batch, torch.Tensor]],
    validation,
    out: Path,
    steps: int,
    batch: int = BATCH,
    seed: int = 0,
    rate: float = 0.02,
    device: str | None = None,
    progress=None,
    log=print,
) -> nn.Module:
    """Train what needs a gradient in `twin`, called as a Twin is; resumable from out/last.pt. bfloat16 on CUDA, float32
    on the CPU.
    """
    out.mkdir(parents=True, exist_ok=True)
    llama = twin.model.model.language_model
    matrices = [p for p in llama.layers.parameters() if p.ndim == 2]
    accelerator = accelerator_for(device)
    twin.to(accelerator.device)
    chosen = {id(p) for p in matrices}
    others = [p for p in twin.parameters() if p.requires_grad and id(p) not in chosen]
    optimizers = [Muon(matrices, lr=rate), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    counts = np.cumsum([0] + [len(b.items) for b, _ in data])
    first, spent = 0, 0.0
    last = out / "last.pt"
    if last.exists():
        saved = torch.load(last, weights_only=True)
        twin.load_state_dict(saved["twin"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        first, spent = saved["step"], saved["minutes"]
    started, sums = time.time() - spent * 60, np.zeros(5)
    for step in range(first, steps):
        rng = np.random.default_rng([seed, step])  # the same scenes and questions for every variant
        order = rng.integers(counts[-1], size=batch)
        shards = np.searchsorted(counts, order, side="right") - 1
        picked = [(s, i - counts[s]) for s, i in zip(shards, order, strict=True)]
        features = torch.stack([data[s][1][i] for s, i in picked]).float().to(accelerator.device)
        contents = torch.from_numpy(np.stack([data[s][0].contents[i] for s, i in picked])).to(accelerator.device)
        chosen_items = [data[s][0].items[i] for s, i in picked]
        rows = questions.rows(chosen_items, rng).to(accelerator.device)
        truth = questions.grounding(chosen_items).to(accelerator.device)
        factor = min(1.0, (step + 1) / 100, max(0.02, (1 - step / steps) / 0.6))
        for optimizer, rate_ in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate_ * factor
        with accelerator.autocast():
            logits, targets, attention, cells, seen = twin(features, rows)
        answer_loss = F.cross_entropy(logits.float(), targets)
        known = cells >= 0
        point_loss = sum(
            -torch.log(a[known].float().gather(1, cells[known, None]) + 1e-6).mean() for a in attention.values()
        ) / len(attention)
        contents_loss = twin.contents.loss(seen.float(), contents)
        words_loss = twin.grounding.loss(seen.float(), llama.embed_tokens.weight[questions.words], truth)
        loss = answer_loss + 0.25 * point_loss + 0.1 * contents_loss + 0.1 * words_loss
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if progress:
            progress((step + 1) / steps, f"{name} step {step + 1} of {steps}, loss {answer_loss.item():.3f}")
        sums += [answer_loss.item(), point_loss.item(), contents_loss.item(), words_loss.item(), 1]
        minutes = (time.time() - started) / 60
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            values = {"twin": twin.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            torch.save(values | {"step": step + 1, "minutes": minutes}, last)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            record = {
                "step": step + 1,
                "minutes": round(minutes, 2),
                **dict(
                    zip(("answer", "point", "contents", "words"), (sums[:4] / sums[4]).round(4).tolist(), strict=True)
                ),
            }
            sums[:] = 0
            if (step + 1) % 600 == 0 or step + 1 == steps:
                record |= score(twin, questions, *validation)
            log(json.dumps(record))
            with open(out / "curve.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
    return twin.cpu()


@torch.no_grad()
def score(twin: Twin, questions: Questions, batch: dataset.Batch, features: torch.Tensor) -> dict[str, float]:
    """Greedy exact match on validation scenes by kind and topic (teacher-forced: all answer tokens right is the same
    thing).
    """
    hits: dict[str, list[float]] = {}
    for start in range(0, len(batch.items), 10):
        groups = batch.items[start : start + 10]
        most = 6
        chosen = [[items[k % len(items)] for k in range(most)] for items in groups]
        table = [questions.turn(i.question.question, i.question.answer, i.cells) for items in chosen for i in items]
        device = next(twin.parameters()).device
        rows = questions.pad(table).to(device)
        logits, targets, _, _, _ = twin(features[start : start + 10].float().to(device), rows)
        right = logits.argmax(-1) == targets
        place = 0
        for n, (items, number) in enumerate((items, k) for items in chosen for k in range(most)):
            size = sum(t != -100 for t in table[n][1])
            good = right[place : place + size]
            place += size
            question = items[number].question
            if number < len(set(id(i) for i in items)):
                for key in (question.kind, question.topic):
                    hits.setdefault(key, []).append(float(good.all()))
                if question.kind == "fine":
                    hits.setdefault("first_char", []).append(float(good[0]))
                    hits.setdefault("chars", []).append(float(good[:-1].float().mean()))
    return {key: round(float(np.mean(values)), 3) for key, values in sorted(hits.items())}
