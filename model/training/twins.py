"""Train the DeepStack-L shaped language models on a frozen tower: `hires`, `hires-single`, `hires-concat`.

All three see the same scenes, the same questions in the same order, the same number of steps and the same seed; they
differ in what enters: nine stacks, nothing beyond the global view, or the same pixels merged once into the input.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from model.training import dataset, packed, scenes, strings
from model.training.canvas import CHARACTERS, COLOURS, SHAPES, SIDE
from model.training.muon import Muon
from model.training.pages import TILE
from model.training.tokenizer import make_tokenizer
from model.training.tower import PRECISIONS, Reader, accelerator_for, compute_dtype, to_pixels

MERGE = {"hires": "stack", "hires-single": "none", "hires-concat": "concat"}
TILES = SIDE // TILE  # per side of the high-resolution view
START, INTERVAL, CROPS = 1, 1, TILES**2  # the paper's defaults, with more tiles: stacks before layers 1, 2, ... 9
BATCH = 8  # scenes in a step
ROWS = 12  # questions asked of a scene at once
FIRST_SHARE = 0.5652  # of the steps: the first cycle; then the rate rises again, once, and falls to the end
RESTART = 0.7  # of the first cycle's highest rate, which the second starts from
WARMUP = 100  # steps over which the rate rises at the start of a cycle
LOOK_SHARE = 0.1635  # of the first cycle: its first steps ask nothing, image rows only learn what they hold
LOOK_BATCH = 32  # scenes in such a step
DECAY_SHARE = 0.53  # of the first cycle: its last steps, over which the rate falls
FINE_SHARE = 0.65  # of the questions asked
# among a scene's coarse questions: the same few stand under every picture, and some take long to learn
TOPIC_WEIGHTS = {"picture": 0.25, "count_all": 3.0, "count_shape": 3.0, "taller": 3.0}
OUT_OF_SCOPE_SHARE = 0.03
SECOND_TURN_SHARE = 0.08
SAVE_EVERY = 200  # steps: a checkpoint, and a line of the curve
SCORE_EVERY = 1000  # steps: the line has scores on validation scenes, too
RATE = 3e-3  # of AdamW, for what is trained from nothing and is no matrix of the decoder
WORDS = (  # words that single out a place: their embeddings are drawn towards the image rows they point at
    *(*COLOURS, *SHAPES, *scenes.ORDINALS, "last", "top", "bottom", "left", "right", "middle"),
    *(word.lower() for word in (*strings.FIELDS, *strings.ITEMS)),
)
_WORD = {word: number for number, word in enumerate(WORDS)}
INSPECTED = 10  # the layer whose input must know the contents: all stacks are in
WATCHED = (10, 11)  # layers whose head 0 is shown the answer's place
WEIGHTS = {"answer": 1.0, "point": 0.5, "contents": 0.3, "words": 0.3, "asked": 0.1}  # of the losses
LOOK_WEIGHTS = {"contents": 1.0, "words": 1.0}
WIDTH, LAYERS = 128, 12


def configuration(
    vision: CLIPVisionConfig,
    merge: str,
    vocabulary: int,
    width: int = WIDTH,
    layers: int = LAYERS,
    image_token: int = 4,
    crops: int = CROPS,
    sampling: str = "2d",
    start: int = START,
    interval: int = INTERVAL,
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
        vision_feature_layer=[-1] * (1 + crops) if merge == "concat" else -1,
        deepstack={"merge": merge, "num_crops": crops, "sampling": sampling, "start": start, "interval": interval},
        tie_word_embeddings=False,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )


@torch.no_grad()
def encode(reader: Reader, batch: dataset.Batch, chunk: int = 32) -> torch.Tensor:
    """Tower features of every scene, float16 `[n, 10, 64, width]`: the global view, then nine samples of the mosaic,
    2d-dilated.
    """
    n, side = len(batch.low), dataset.GRID
    out = torch.empty(n, 1 + CROPS, side**2, reader.tower.config.hidden_size, dtype=torch.float16)
    for start in range(0, n, chunk):
        low, high = batch.low[start : start + chunk], batch.high[start : start + chunk]
        b = len(low)
        features = reader.features(torch.cat([to_pixels(low), to_pixels(cut(high))]))
        out[start : start + b, 0] = features[:b].half()
        mosaic = joined(features[b:], b)
        for i in range(TILES):
            for j in range(TILES):
                sample = mosaic[:, i::TILES, j::TILES]
                out[start : start + b, 1 + TILES * i + j] = sample.reshape(b, side**2, -1).half()
    return out


def cut(views: np.ndarray) -> np.ndarray:
    """Square views `[b, side, side, 3]` in tiles `[b * n * n, 64, 64, 3]`, row by row."""
    b, n = len(views), views.shape[1] // TILE
    return views.reshape(b, n, TILE, n, TILE, 3).swapaxes(2, 3).reshape(-1, TILE, TILE, 3)


def joined(features: torch.Tensor, views: int) -> torch.Tensor:
    """Features `[b * n * n, 64, width]` of the tiles of b `views` as maps `[b, 8 n, 8 n, width]`."""
    side, n = dataset.GRID, round((len(features) / views) ** 0.5)
    maps = features.view(views, n, n, side, side, -1).transpose(2, 3)
    return maps.reshape(views, n * side, n * side, -1)


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

    def turn(self, question: str, answer: str, cells: tuple[int, ...], words: list[int] = ()):
        """Token ids of one question and its answer; targets at the answer; cells beside them; numbers of its words."""
        asked = self.tokens(question.lower().strip()) + self.answer
        said = self.tokens(answer) + self.end
        ids = asked + said
        targets = [-100] * (len(asked) - 1) + said + [-100]
        where = [-1] * len(ids)
        for i, cell in enumerate(cells[: len(said) - 1]):
            where[len(asked) - 1 + i] = cell
        return ids, targets, where, words

    def draw(self, items: list[dataset.Item], rng: np.random.Generator):
        """One question of a scene (or one that no scene answers), sometimes with a second turn."""
        if rng.random() < OUT_OF_SCOPE_SHARE:
            return self.turn(scenes.out_of_scope(rng), scenes.UNKNOWN, ())
        fine = [i for i in items if i.question.kind == "fine"]
        coarse = [i for i in items if i.question.kind == "coarse"]
        group = fine if fine and (rng.random() < FINE_SHARE or not coarse) else coarse
        if group is coarse:
            weights = np.array([TOPIC_WEIGHTS.get(i.question.topic, 1.0) for i in group])
            item = group[int(rng.choice(len(group), p=weights / weights.sum()))]
        else:
            item = group[int(rng.integers(len(group)))]
        question = item.question
        return self.turn(
            scenes.restyle(question.reworded(rng), rng), question.answer, item.cells, place_words(question)
        )

    def rows(self, chosen: list[list[dataset.Item]], rng: np.random.Generator, per_scene: int = ROWS) -> packed.Rows:
        table = []
        two_turns = rng.random() < SECOND_TURN_SHARE  # of the batches: half as many rows, two questions each
        for items in chosen:
            for _ in range(per_scene // 2 if two_turns else per_scene):
                ids, targets, where, words = self.draw(items, rng)
                if two_turns:
                    more = self.draw(items, rng)
                    ids, targets, where, words = (
                        ids + self.user + more[0],
                        targets + [-100] * len(self.user) + more[1],
                        where + [-1] * len(self.user) + more[2],
                        None,  # two questions: which words were asked depends on the position
                    )
                table.append((ids, targets, where, words))
        return self.pad(table)

    def grounding(self, chosen: list[list[dataset.Item]], rows: int = dataset.GRID**2) -> torch.Tensor:
        """Which of WORDS point at which visual token, `[B, rows, W]` in 0, 1: the words that a question of the scene
        uses to single out its answer stand at the answer's place, and so does the answer of a question about an
        object."""
        truth = torch.zeros(len(chosen), rows, len(WORDS))
        for b, items in enumerate(chosen):
            for item in items:
                cells = [cell for cell in item.cells if cell >= 0]
                words = place_words(item.question)
                if item.question.thing is not None:
                    words = [*words, _WORD[item.question.answer]]
                for word in words:
                    truth[b, cells, word] = 1
        return truth

    @staticmethod
    def pad(table) -> packed.Rows:
        longest = max(len(ids) for ids, *_ in table)
        full = [
            torch.tensor([row[k] + [fill] * (longest - len(row[k])) for row in table])
            for k, fill in ((0, 0), (1, -100), (2, -1))
        ]
        asked = torch.zeros(len(table), len(WORDS))
        for number, (*_, words) in enumerate(table):
            if words is None:
                asked[number] = -1
            else:
                asked[number, list(words)] = 1
        return packed.Rows(*full, torch.tensor([len(ids) for ids, *_ in table]), asked)


def cycle_ends(steps: int) -> tuple[int, int]:
    """The steps after which the rate has fallen to nearly nothing, in a run of two cycles."""
    return round(steps * FIRST_SHARE), steps


def rate_factor(step: int, ends: tuple[int, ...]) -> float:
    """What the rates are multiplied by at `step` of a run whose cycles end after the steps `ends`: held, then falling
    in the first cycle; falling throughout in a later one."""
    start, held = 0, 1 / DECAY_SHARE
    for end in ends:
        if step < end:
            break
        start, held = end, RESTART
    done = (step - start) / (end - start)
    highest = 1.0 if start == 0 else RESTART
    return min(highest, highest * (step - start + 1) / WARMUP, max(0.02, held * (1 - done)))


def looking_steps(ends: tuple[int, ...]) -> int:
    """How many of a run's steps come before the first question."""
    return int(ends[0] * LOOK_SHARE)


def shown(ends: tuple[int, ...]) -> dict[str, int | list[int]]:
    """What a run whose cycles end after the steps `ends` has shown, for its recipe."""
    steps, looks = ends[-1], looking_steps(ends)
    return {
        "steps": steps,
        "cycles_end_at": list(ends),
        "steps_without_questions": looks,
        "scenes_seen": looks * LOOK_BATCH + (steps - looks) * BATCH,
        "questions_seen": (steps - looks) * BATCH * ROWS,
    }


def place_words(question: scenes.Question) -> list[int]:
    """Numbers of the WORDS by which a question singles out its place."""
    said = " ".join(str(value) for _, value in question.words).split()
    return [_WORD[word] for word in said if word in _WORD]


def begin(projector: nn.Module) -> None:
    """Give a projector the weights that it is trained from."""
    for layer in (projector.linear_1, projector.linear_2):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)


class Twin(nn.Module):
    """Projector, decoder and training-only heads of one variant; `merge` is what enters.

    features: a sample of the tower's, `[n, 10, 64, width]`. Their directions differ a thousandfold in size, so the
    projector is trained on whitened ones, with a floor under small directions; `fold` puts that into its first layer.
    shape: what else `configuration` takes.
    """

    FLOOR = 0.1  # of the mean variance of a direction
    inspected, watched = INSPECTED, WATCHED
    lead = (2, 5)  # <s><user>: the tokens before the image's

    def __init__(self, merge: str, vision: CLIPVisionConfig, vocabulary: int, features: torch.Tensor, **shape):
        super().__init__()
        self.merge = merge
        self.model = LlavaForConditionalGeneration(configuration(vision, merge, vocabulary, **shape))
        self.heads = packed.Heads(self.model.config.text_config.hidden_size, dataset.CONTENTS, len(CHARACTERS) + 1)
        begin(self.projector)
        for name, value in zip(("centre", "whiten"), self.whitening(features), strict=True):
            self.register_buffer(name, value)

    @classmethod
    def whitening(cls, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean `[width]` of features `[..., width]` and the matrix that whitens what is left of them."""
        rows = features.float().flatten(0, -2)
        variances, directions = torch.linalg.eigh(torch.cov(rows.T))
        scales = (variances + cls.FLOOR * variances.mean()).rsqrt()
        return rows.mean(0), directions @ scales.diag() @ directions.T

    @property
    def projector(self) -> nn.Module:
        return self.model.model.multi_modal_projector

    @property
    def language(self) -> nn.Module:
        """The decoder's layers and embeddings."""
        return self.model.model.language_model

    @torch.no_grad()
    def fold(self) -> None:
        """Put the whitening into the projector's first layer: from now on the tower's own features enter."""
        first = self.projector.linear_1
        weight = first.weight.unflatten(1, (-1, len(self.centre))) @ self.whiten
        first.bias -= (weight @ self.centre).sum(1)
        first.weight.copy_(weight.flatten(1))
        self.centre.zero_()
        self.whiten.copy_(torch.eye(len(self.whiten)))

    def inject(self, features: torch.Tensor):
        """Features `[B, 10, 64, width]` to the base `[B, 64, d]` and the stacks by layer."""
        features = (features - self.centre) @ self.whiten
        if self.merge == "concat":
            return self.projector(features.transpose(1, 2).flatten(2)), {}
        if self.merge == "none":
            return self.projector(features[:, 0]), {}
        rows = self.projector(features)
        return rows[:, 0], {START + INTERVAL * s: rows[:, 1 + s] for s in range(CROPS)}

    def forward(self, features: torch.Tensor, rows: packed.Rows | None, dtype: torch.dtype = torch.float32):
        """Logits `[S, vocabulary]` at scored positions (None without rows) and the pass, layers computed in `dtype`."""
        return self.decoded(*self.inject(features), rows, dtype)

    def decoded(
        self, base: torch.Tensor, stacks: dict[int, torch.Tensor], rows: packed.Rows | None, dtype: torch.dtype
    ):
        """`forward` from what `inject` gives."""
        lead = torch.tensor(self.lead, device=base.device)
        result = packed.forward(self.language, lead, base, stacks, rows, self.watched, self.inspected, dtype=dtype)
        return None if rows is None else self.model.lm_head(result.hidden), result


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
    twin = Twin(MERGE[name], reader.tower.config, len(tokenizer), data[0][1][:500])
    twin.model.model.vision_tower.requires_grad_(False)
    ends = cycle_ends(steps)
    return fit(name, twin, Questions(tokenizer), data, validation, out, ends, batch, seed, rate, device, progress, log)


def fit(
    name: str,
    twin: nn.Module,
    questions: Questions,
    data: list[tuple[dataset.Batch, torch.Tensor]],
    validation,
    out: Path,
    ends: tuple[int, ...],
    batch: int = BATCH,
    seed: int = 0,
    rate: float = 0.02,
    device: str | None = None,
    progress=None,
    log=print,
    until: int | None = None,
    precision: str | None = None,
) -> nn.Module:
    """Train what needs a gradient in `twin`, called as a Twin is, in cycles of the rate that end after the steps
    `ends`; resumable from out/last.pt. until: the step after which it pauses, with a checkpoint; a later call goes on
    as if it had not.

    The first steps ask nothing: with many scenes at once and no question tokens, image rows learn what they hold in a
    seventh of the steps that answers need for it. The decoder's layers run in `precision` (one of tower.PRECISIONS;
    None: in bfloat16 where the machine is fast in it), around a residual stream in float32.
    """
    out.mkdir(parents=True, exist_ok=True)
    llama = twin.language
    matrices = [p for p in llama.layers.parameters() if p.ndim == 2]
    accelerator = accelerator_for(device)
    dtype = PRECISIONS[precision] if precision else compute_dtype(accelerator)
    twin.to(accelerator.device)
    chosen = {id(p) for p in matrices}
    others = [p for p in twin.parameters() if p.requires_grad and id(p) not in chosen]
    optimizers = [
        Muon(matrices, lr=rate, dtype=dtype),
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    counts = np.cumsum([0] + [len(b.items) for b, _ in data])
    first, spent = 0, 0.0
    last = out / "last.pt"
    if last.exists():
        saved = torch.load(last, weights_only=True)
        twin.load_state_dict(saved["twin"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        first, spent = saved["step"], saved["minutes"]
        if "random" in saved:
            set_random_state(saved["random"])
    started, sums, since = time.time() - spent * 60, Counter(), 0
    steps, looks = ends[-1], looking_steps(ends)
    stop = steps if until is None else min(until, steps)
    for step in range(first, stop):
        rng = np.random.default_rng([seed, step])  # the same scenes and questions for every variant
        order = rng.integers(counts[-1], size=LOOK_BATCH if step < looks else batch)
        shards = np.searchsorted(counts, order, side="right") - 1
        picked = [(s, i - counts[s]) for s, i in zip(shards, order, strict=True)]
        features = torch.stack([data[s][1][i] for s, i in picked]).float().to(accelerator.device)
        contents = torch.from_numpy(np.stack([data[s][0].contents[i] for s, i in picked])).to(accelerator.device)
        items = [data[s][0].items[i] for s, i in picked]
        truth = questions.grounding(items, contents.shape[1]).to(accelerator.device)
        rows = questions.rows(items, rng).to(accelerator.device) if step >= looks else None
        factor = rate_factor(step, ends)
        for optimizer, each in zip(optimizers, rates, strict=True):
            for group, rate_ in zip(optimizer.param_groups, each, strict=True):
                group["lr"] = rate_ * factor
        logits, result = twin(features, rows, dtype)
        words = llama.embed_tokens.weight[questions.words]
        losses = {
            "contents": twin.heads.contents_loss(result.seen, contents),
            "words": twin.heads.words_loss(result.seen, words, truth, asked=False),
        }
        if rows is not None:
            losses |= answer_losses(twin, logits, result, rows, words)
        weights = LOOK_WEIGHTS if rows is None else WEIGHTS
        loss = sum(weights[name] * value for name, value in losses.items())
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if progress:
            progress((step + 1) / steps, f"{name} step {step + 1} of {steps}, loss {loss.item():.3f}")
        sums.update({name: value.item() for name, value in losses.items()})
        since += 1
        minutes = (time.time() - started) / 60
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == stop:
            values = {"twin": twin.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            values |= {"step": step + 1, "minutes": minutes, "random": random_state()}
            torch.save(values, last.with_suffix(".new"))  # whoever is killed here goes on from the one before
            last.with_suffix(".new").replace(last)
            record = {"step": step + 1, "minutes": round(minutes, 2)}
            record |= {name: round(value / since, 4) for name, value in sums.items()}
            sums, since = Counter(), 0
            if step >= looks and (step + 1) % SCORE_EVERY == 0 or step + 1 == steps:
                record |= score(twin, questions, *validation)
            log(json.dumps(record))
            with open(out / "curve.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
    return twin.cpu()


def random_state() -> list[torch.Tensor]:
    """Where torch's random numbers are, on the CPU and on the GPUs: a resumed run goes on as an unbroken one would."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_state(state: list[torch.Tensor]) -> None:
    """Back to where `random_state` was; the GPUs only where there are as many."""
    torch.set_rng_state(state[0])
    if len(state) - 1 == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state[1:])


def answer_losses(twin, logits, result: packed.Pass, rows: packed.Rows, words) -> dict[str, torch.Tensor]:
    """Answers; where head 0 of the watched layers looks, if there are any; which place words the answers' positions
    know of."""
    known, asked = result.cells >= 0, rows.asked[result.row]
    single = asked[:, 0] >= 0  # of rows with one question
    point = [-torch.log(a[known].gather(1, result.cells[known, None]) + 1e-6).mean() for a in result.attention.values()]
    losses = {"answer": F.cross_entropy(logits.float(), result.targets)}
    losses |= {"point": sum(point) / len(point)} if point else {}
    return losses | {"asked": twin.heads.words_loss(result.asking[single], words, asked[single], asked=True)}


@torch.no_grad()
def answered(
    twin: Twin, questions: Questions, batch: dataset.Batch, features: torch.Tensor, most: int = 6
) -> Iterator[tuple[scenes.Question, torch.Tensor]]:
    """Each scene's first `most` questions, and which tokens of the answer are right, the one that ends it included
    (bool `[T]`): each given the true ones before it, so that all right is what greedy decoding gets right.

    What a twin draws by chance meanwhile is drawn from a seed of its own: the same at every call, and training goes on
    as if nothing had been asked.
    """
    for start in range(0, len(batch.items), 10):
        groups = batch.items[start : start + 10]
        chosen = [[items[k % len(items)] for k in range(most)] for items in groups]
        table = [questions.turn(i.question.question, i.question.answer, i.cells) for items in chosen for i in items]
        device = next(twin.parameters()).device
        rows = questions.pad(table).to(device)
        with torch.random.fork_rng():
            torch.manual_seed(start)
            logits, result = twin(features[start : start + 10].float().to(device), rows)
        right = logits.argmax(-1) == result.targets
        sizes = [sum(t != -100 for t in targets) for _, targets, *_ in table]
        good = right.split(sizes)
        for n, items in enumerate(chosen):
            for number in range(min(most, len(groups[n]))):
                yield items[number].question, good[n * most + number].cpu()


def score(twin: Twin, questions: Questions, batch: dataset.Batch, features: torch.Tensor) -> dict[str, float]:
    """Greedy exact match on validation scenes by kind and topic."""
    hits: dict[str, list[float]] = {}
    for question, good in answered(twin, questions, batch, features):
        for key in (question.kind, question.topic):
            hits.setdefault(key, []).append(float(good.all()))
        if question.kind == "fine":
            hits.setdefault("first_char", []).append(float(good[0]))
            hits.setdefault("chars", []).append(float(good[:-1].float().mean()))
    return {key: round(float(np.mean(values)), 3) for key, values in sorted(hits.items())}
