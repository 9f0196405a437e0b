"""One engine for every family: prompts, vision features, answers, replays.

An answer is one prefill, in which the plan's injections happen, and a cached decode; looking is a second,
teacher-forced pass. K plans are one batch of K rows; requests that decode at once share their steps. Nothing is stored
on the model: a plan or probe lives in one call, and between two tokens of a stream no lock is held and no pass is
active. Knows nothing about analysis or pages.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from model.clip import clip_of
from model.compiled import CANNOT, Compiled, choose_decode, in_words
from model.decode import Choice, TextStream, choose, describe, generators
from model.errors import OutOfMemory, UserError, is_out_of_memory
from model.families import Family
from model.images import DEFAULT_LIMITS
from model.instrument import ATTENTION, EffectRecorder, Injection, Pass, Recorder, TraceRecorder, active, install
from model.loading import choose_attention
from model.need import SEAT, of_answer, of_pass
from model.plan import Plan
from model.prefix import PrefixCache
from model.probe import Probe
from model.prompt import CUT, Prompt, guard, guarded_messages
from model.together import Part, Together, Wanted
from model.trace import Trace
from model.turns import FairLock
from model.types import Answer, ImageGrid, Message, Region, Sampling, Token, View

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sight:
    """What the vision tower made of a prompt's images: per source the rows of all images in order."""

    features: dict[str, Tensor]  # source -> [N, d], on the model's device; empty without images
    seconds: float
    cached: bool  # every image came from the cache


class FeatureCache:
    """Features by image content and source, least recently used image out first, up to `max_bytes`."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._items: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> dict[str, Tensor]:
        """What is held of this image, by source; empty where nothing is."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key, {})

    def add(self, key: str, features: dict[str, Tensor]) -> None:
        """Holds these features beside the image's others, unless all of them together are over the limit."""
        with self._lock:
            held = self._items.get(key, {})
            joined = {**features, **held}
            if _bytes(joined) > self.max_bytes:
                return
            self._items[key] = joined
            self._items.move_to_end(key)
            self.bytes += _bytes(joined) - _bytes(held)
            while self.bytes > self.max_bytes:
                self.bytes -= _bytes(self._items.popitem(last=False)[1])

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._items.clear()
            self.bytes = 0

    def __len__(self) -> int:
        return len(self._items)


def _bytes(features: dict[str, Tensor]) -> int:
    return sum(tensor.element_size() * tensor.nelement() for tensor in features.values())


# Weights below which a model on the CPU computes with one thread: each thread that asks keeps compute threads of its
# own, which wait for one another. Measured outside the main thread on 2 cores, with one and with two compute threads:
# one token 2.0 and 7.0 ms (2 million weights), 4.8 and 11.9 (9), 17 and 20 (30), 56 and 51 (154); 200 tokens at once
# 12 and 16, 39 and 48, 129 and 110, 586 and 410 ms.
ONE_THREAD = 20_000_000


def choose_threads(device: torch.device, parameters: int) -> tuple[int, str]:
    """(compute threads of a model with that many weights, why); (0, "") where the device is not the CPU."""
    if device.type != "cpu":
        return 0, ""
    if parameters < ONE_THREAD:
        return 1, "one compute thread: with so few weights a second one costs more than it gains"
    count = torch.get_num_threads()
    return count, f"{count} compute thread{'s' * (count > 1)}: what torch uses here, see OMP_NUM_THREADS"


class Engine:
    """A loaded model that answers under plans and can be looked into. Thread-safe: one lock around the device."""

    def __init__(
        self,
        family: Family,
        *,
        name: str,
        reasons: Sequence[str] = (),
        cache_bytes: int = 512 * 2**20,
        prefix_bytes: int = 1024 * 2**20,
        shortest_prefix: int = 256,
        shared_bytes: int = 4096 * 2**20,
    ):
        """cache_bytes: of image features held; prefix_bytes: of key-value caches held; shared_bytes: of what requests
        decode in, together and compiled each (`Together`, `Compiled`).

        Beginnings of `shortest_prefix` tokens and more are taken up; shorter ones are computed again, to the same bits.
        """
        self.adapter = family
        self.name = name
        self.layout = family.layout
        self.family = family.layout.family
        self.warnings = family.warnings
        self.trained = family.trained
        self.note = family.note
        self.tokenizer = family.tokenizer
        self.model = family.model.eval().requires_grad_(False)
        self.device = family.embed.weight.device
        self.dtype = family.embed.weight.dtype
        self.threads, why = choose_threads(self.device, sum(tensor.numel() for tensor in self.model.parameters()))
        self._reasons = (*reasons, why) if why else tuple(reasons)
        self.max_tokens: int = family.decoder.config.max_position_embeddings
        self.max_memory = DEFAULT_LIMITS.max_memory  # bytes that one request may take beside the weights
        self.cache = FeatureCache(cache_bytes)
        self.prefixes = PrefixCache(prefix_bytes)
        self.shortest_prefix = shortest_prefix
        self.hooks = install(family.decoder)
        self._end = family.end_tokens()
        self._special = family.special_tokens()
        self._pieces: dict[int, str] = {}
        self._lock = FairLock()
        self.together = Together(self, shared_bytes)
        self.attend_by("auto")
        self.compiled: Compiled | None = None  # of a lone request's steps
        self.decode_by("auto")

    def __repr__(self) -> str:
        return f"Engine({self.name!r}, {self.family}, {self.device}, {self.dtype})"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it runs where it runs and how: device, number format, compute threads, attention, decoding."""
        return (*self._reasons, self._why_attention, self._why_decode)

    @property
    def memory_bytes(self) -> int:
        """Weights and buffers, plus the features and the key-value caches held."""
        tensors = {t.data_ptr(): t for t in [*self.model.parameters(), *self.model.buffers()]}
        held = self.cache.bytes + self.prefixes.bytes + (self.compiled.bytes if self.compiled else 0)
        return sum(t.element_size() * t.nelement() for t in tensors.values()) + held

    def forget(self) -> None:
        """Lets go of all features and key-value caches: what comes next is computed anew."""
        self.cache.clear()
        self.prefixes.clear()
        if self.compiled is not None:
            self.compiled.forget()

    def attend_by(self, wanted: str | None) -> None:
        """Attention by "sdpa", "flash", "eager", or as this device chooses ("auto"); UserError where it cannot be."""
        way, self._why_attention = choose_attention(wanted, self.device, self.dtype)
        self.adapter.decoder.set_attn_implementation(ATTENTION[way])

    def decode_by(self, wanted: str | None, backend: str | Callable = "inductor", brief: bool = False) -> None:
        """Decodes "plain", "compiled", or as this device and model choose ("auto"); `reasons` says why.

        UserError where compiled was asked for and cannot be. backend: of torch.compile. brief: a few answers are all
        that will be asked for.
        """
        compiled, self._why_decode = choose_decode(wanted, self, brief)
        self._insist = wanted == "compiled"
        self.compiled = Compiled(self, self.together.max_bytes, backend) if compiled else None

    def warm_up(self) -> None:
        """Compiles the step of a lone answer now, where it is compiled at all, so that no request waits for it."""
        if self.compiled is None:
            return
        generation = Generation(
            self, self.prompt([{"role": "user", "content": "Hello"}]), [self.layout.default], Sampling(4), None
        )
        with torch.inference_mode(), self._device():
            generation._prefill()
            for _ in range(3):  # on a GPU: compiled, tried, recorded
                generation.rows[0].tokens.append(Token(0, "", 0.0, ()))
                generation._made += 1
                generation._decode()
        self.together.leave(generation._part)

    # Prompts and images

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """Tokenises a conversation that ends with a question. UserError if nothing is asked or it is too long."""
        clean, images = guarded_messages(messages, self._special, self.adapter.fold_case)
        self._check_kinds(images)
        alone = len(images) == 1 or not self.adapter.mixes_images
        regions = [self.adapter.regions(image, alone) for image in images]
        texts = [self.adapter.image_text(image, alone) for image in images]
        parts = self.adapter.render(clean).split(self.adapter.image_token)
        if len(parts) != len(images) + 1:
            raise UserError(f"The chat template placed {len(parts) - 1} of {len(images)} images; check its template.")
        text = parts[0] + "".join(part for pair in zip(texts, parts[1:], strict=True) for part in pair)
        ids = self._start(text) + self._encode(text)
        placed = _placed(ids, self.adapter.image_token_id, images, regions)
        if len(ids) >= self.max_tokens:
            visual = sum(len(grid.positions) for grid in placed)
            raise UserError(
                f"The conversation takes {len(ids)} tokens ({visual} of them visual), but this model reads at most "
                f"{self.max_tokens - 1}. Shorten it, or use fewer or smaller images."
            )
        input_ids = torch.tensor([ids])
        position_ids, next_position = self.adapter.positions(input_ids, placed, images)
        pieces = ["" if token == self.adapter.image_token_id else self._piece(token) for token in ids]
        extra = {
            "position_ids": position_ids,
            "next_position": next_position,
            "image_keys": tuple(_content_key(image) + ("" if alone else " among others") for image in images),
            "alone": alone,
        }
        return Prompt(input_ids, tuple(images), tuple(placed), extra, tuple(pieces))

    def views(self, image: Image.Image) -> tuple[View, ...]:
        """What the model sees of this image, with its token grid; UserError for a video that it cannot read."""
        self._check_kinds([image])
        return self.adapter.views(image)

    def reads(self, image: Image.Image) -> bool:
        """Whether this model can be asked about it: any picture, and a video where its family reads videos."""
        return self.adapter.takes_video or clip_of(image) is None

    def _check_kinds(self, images: Sequence[Image.Image]) -> None:
        if not all(map(self.reads, images)):
            from model.families import families

            able = ", ".join(family.title for family in families() if family.takes_video)
            raise UserError(
                f"{self.name} reads pictures, not videos. Choose a model that reads videos ({able}), or save a frame "
                "as PNG and ask about that."
            )

    def see(self, prompt: Prompt, plan: Plan | None = None) -> Sight:
        """What the vision tower makes of each image for this plan: the rows that it brings into the LLM.

        Without a plan, every source of the layout, under what of the default plan enters the tower itself. Each image
        goes through the tower alone and once; what is held of it, by content, is completed with what is missing.
        """
        if plan is None:
            return self._look(prompt, [source.name for source in self.layout.sources], self.layout.default.tower)
        return self._see_all(prompt, [plan])

    def _see_all(self, prompt: Prompt, plans: Sequence[Plan]) -> Sight:
        """What these plans need together, the images once per part of a plan that enters the vision tower.

        Rows are [N, d], or [B, N, d] where those parts differ.
        """
        names = list(dict.fromkeys(e.source for plan in plans for e in plan.validate(self.layout) if not e.in_tower))
        towers = [plan.tower for plan in plans]
        seen = {tower: self._look(prompt, names, tower) for tower in dict.fromkeys(towers)}
        if len(seen) == 1:
            return seen[towers[0]]
        joined = {name: torch.stack([seen[tower].features[name] for tower in towers]) for name in names}
        sights = seen.values()
        return Sight(joined, sum(sight.seconds for sight in sights), all(sight.cached for sight in sights))

    def _look(self, prompt: Prompt, names: Sequence[str], tower: Plan) -> Sight:
        """The rows of these sources, which enter the LLM, under a `tower` plan, which enters the vision tower."""
        start = time.perf_counter()
        how: dict[str, Any] = {} if prompt.extra["alone"] else {"alone": False}
        mark = f" {tower}" if self.layout.tower else ""
        rows, cached = {name: [] for name in names if prompt.images}, True
        for image, content in zip(prompt.images, prompt.extra["image_keys"], strict=True):
            if tower and names:
                entering, held = self._features(image, content, tower.sources(), how)
                how_here = {**how, "entering": tuple((entry, entering[entry.source]) for entry in tower)}
                cached &= held
            else:
                how_here = how
            features, held = self._features(image, content + mark, names, how_here)
            cached &= held
            for name in names:
                rows[name].append(features[name])
        joined = {name: torch.cat(each) if len(each) > 1 else each[0] for name, each in rows.items()}
        return Sight(joined, time.perf_counter() - start, cached)

    def _features(
        self, image: Image.Image, key: str, names: Sequence[str], how: dict[str, Any]
    ) -> tuple[dict[str, Tensor], bool]:
        """(at least these sources of one image, whether all of them were held); what is made now is held as `key`."""

        def missing() -> list[str]:
            return [name for name in names if name not in held]

        held = self.cache.get(key)
        if not missing():
            return held, True
        with self._device():
            held = self.cache.get(key)  # another request may have made it meanwhile
            if not missing():
                return held, True
            untrained = {source.name for source in self.layout.untrained}
            taps = [name for name in missing() if name in untrained]
            trained = [name for name in missing() if name not in untrained]
            made: dict[str, Tensor] = {}
            # Not in inference mode, even inside an answer: a later differentiable pass uses them too.
            with torch.inference_mode(False), torch.no_grad():
                if trained:
                    made |= self.adapter.encode(image, trained, **how)
                if taps:
                    made |= self.adapter.encode_taps(image, taps)
                made = {name: rows.to(self.device, self.dtype) for name, rows in made.items()}
            self.cache.add(key, made)
        return {**made, **held}, False

    def features(self, prompt: Prompt, plan: Plan | None = None) -> Tensor:
        """What each source of the LLM adds at gain 1: [sources, N, d] in the order of `Layout.rows_for(plan)`.

        Without a plan, of the default one.
        """
        plan = self.layout.default if plan is None else plan.validate(self.layout)
        names = [source.name for source in self.layout.rows_for(plan)]
        return self._stacked(prompt, names, self._look(prompt, names, plan.tower).features)

    def _stacked(self, prompt: Prompt, names: Sequence[str], seen: dict[str, Tensor]) -> Tensor:
        """[sources, N, d] in the order of `names`; zeros for what was not looked at."""
        empty = torch.zeros(prompt.visual_tokens, self.layout.hidden_size, device=self.device, dtype=self.dtype)
        return torch.stack([seen.get(name, empty) for name in names])

    # Answers

    def stream(
        self, prompt: Prompt, plan: Plan, sampling: Sampling | None = None, stop: threading.Event | None = None
    ) -> AnswerStream:
        """Yields tokens as they are made; `.answer` holds the answer so far. `stop` or `.close()` end it in a token."""
        return AnswerStream(Generation(self, prompt, [plan], sampling or Sampling(), stop))

    def answer(self, prompt: Prompt, plan: Plan, sampling: Sampling | None = None) -> Answer:
        """One whole answer."""
        return self.answer_many(prompt, [plan], sampling)[0]

    def answer_many(
        self,
        prompt: Prompt,
        plans: Sequence[Plan],
        sampling: Sampling | None = None,
        stop: threading.Event | None = None,
    ) -> list[Answer]:
        """One answer per plan, decoded together as one batch; each is what its plan would get alone."""
        if not plans:
            return []
        generation = Generation(self, prompt, list(plans), sampling or Sampling(), stop)
        while not generation.done:
            generation.step()
        return generation.answers()

    # Looking

    def score(self, prompt: Prompt, plan: Plan, text: str) -> tuple[Token, ...]:
        """How probable this text is as the answer: its tokens, each given the ones before."""
        ids = self._encode("".join(guard([text], self._special, self.adapter.fold_case)))
        if not ids:
            return ()
        with torch.no_grad(), self._device():
            hidden = self._run(prompt, [plan], ids)
            logprobs = self._logits(hidden[0, -len(ids) - 1 : -1]).float().log_softmax(-1)
            choices = describe(logprobs, torch.tensor(ids, device=self.device))
        stream = TextStream(self.tokenizer)
        return tuple(self._token(choice, stream) for choice in choices)

    def next_tokens(
        self, prompt: Prompt, plan: Plan, prefix_tokens: Sequence[int | Token] = (), top: int = 5
    ) -> tuple[tuple[str, float], ...]:
        """The most probable next tokens after `prefix_tokens` of an answer: (text, log-probability), best first."""
        with torch.no_grad(), self._device():
            hidden = self._run(prompt, [plan], _ids(prefix_tokens))
            logprobs = self._logits(hidden[0, -1]).float().log_softmax(-1)
            best, ids = logprobs.topk(min(top, logprobs.shape[-1]))
        return tuple((self._piece(i), p) for i, p in zip(ids.tolist(), best.tolist(), strict=True))

    def replay(self, prompt: Prompt, answer: Answer, plan: Plan, probe: Probe | None = None) -> Trace:
        """One teacher-forced pass over prompt + answer that records what the probe asks. Never changes an answer."""
        probe = probe or Probe()
        start = time.perf_counter()
        plan.validate(self.layout)
        ids = _ids(answer.tokens)
        length = prompt.input_ids.shape[1] + len(ids)
        self._check(probe, length)
        of_pass(self, prompt, [plan], len(ids), probe).check(self)
        image = self._image_positions(prompt)
        kept = image if probe.hidden_rows == "image" else torch.arange(length, device=self.device)
        recorder = TraceRecorder(probe, image, kept, self.layout.n_layers)
        with torch.no_grad(), self._device():
            hidden = self._run(prompt, [plan], ids, recorder=recorder)
            chosen = torch.tensor(ids, device=self.device)
            logprobs = self._logits(hidden[0, -len(ids) - 1 : -1] if ids else hidden[0, :0])
            logprobs = logprobs.float().log_softmax(-1).gather(1, chosen[:, None].long()).squeeze(1)
            n, layers = len(image), self.layout.n_layers
            rows = sorted({row for wish in probe.attention for row in wish.rows})
            return Trace(
                model=self.name,
                plan=plan,
                texts=prompt.texts + tuple(token.text for token in answer.tokens),
                answer_start=prompt.input_ids.shape[1],
                grids=prompt.grids,
                residual_rms=_stack(recorder.residual, (layers + 1, length)),
                before_rms=_stack(recorder.before, (layers, length)),
                injected_rms={key: value.cpu().numpy() for key, value in recorder.injected.items()},
                ratio=_stack(recorder.ratio, (layers, n)),
                cosine=_stack(recorder.cosine, (layers, n)),
                attention={layer: value.cpu().numpy() for layer, value in recorder.rows.items()},
                attention_rows=tuple(rows),
                hidden={layer: value.cpu().numpy() for layer, value in recorder.hidden.items()},
                hidden_positions=kept.cpu().numpy(),
                logprobs=logprobs.cpu().numpy(),
                seconds=time.perf_counter() - start,
            )

    def image_effect(self, prompt: Prompt, answer: Answer | None, plan: Plan) -> np.ndarray:
        """What each source changes: float32 [sources, L+1], |h_on - h_off| / |h_on| over all image rows (Frobenius).

        Each source of `Layout.sources_for(plan)` is switched off in turn, all in one batch; 0 for a source not in the
        plan. Axis 1: the input of each layer after injection, then the final output. Images come before the answer, so
        it has no part.
        """
        plan.validate(self.layout)
        used = plan.sources()
        names = [source.name for source in self.layout.sources_for(plan)]
        effect = np.zeros((len(names), self.layout.n_layers + 1), dtype=np.float32)
        if not used or not prompt.images:
            return effect
        plans = [plan, *(plan.without(name) for name in used)]
        of_pass(self, prompt, plans, 0).check(self)
        recorder = EffectRecorder(self._image_positions(prompt))
        with torch.no_grad(), self._device():
            self._run(prompt, plans, (), recorder=recorder)
            found = torch.stack(recorder.effect, dim=1).cpu().numpy()  # [used, L+1]
        for row, name in zip(found, used, strict=True):
            effect[names.index(name)] = row
        return effect

    def logprobs(self, prompt: Prompt, answer: Answer | Sequence[int | Token], plans: Sequence[Plan]) -> Tensor:
        """Log-probability of each answer token under each plan, float32 [plans, answer tokens], in one batch."""
        ids = _ids(answer)
        for plan in plans:
            plan.validate(self.layout)
        of_pass(self, prompt, plans, len(ids)).check(self)
        with torch.no_grad(), self._device():
            return self._chosen(self._run(prompt, plans, ids), ids)

    # Differentiable passes

    def logits(
        self,
        prompt: Prompt,
        plan: Plan,
        answer: Answer | Sequence[int | Token] = (),
        features: Tensor | None = None,
        grad: bool = False,
        last: int | None = None,
    ) -> Tensor:
        """Logits [T, V] of one pass over prompt + answer; with `last` only those of the last positions.

        `features` [sources, N, d] replaces what the vision tower saw (`Engine.features` of this plan), whatever entered
        the tower; with `grad` the result is differentiable with respect to it. A leading batch axis [B, sources, N, d]
        gives [B, T, V].
        """
        with torch.set_grad_enabled(grad), self._device():
            hidden = self._run(prompt, [plan], _ids(answer), features=features)
            logits = self._logits(hidden if last is None else hidden[:, -last:])
        return logits if features is not None and features.ndim == 4 else logits[0]

    def logprob_of(
        self, prompt: Prompt, answer: Answer | Sequence[int | Token], plan: Plan, row_gains: Tensor
    ) -> Tensor:
        """Log-probability of each answer token as a differentiable function of a gain per source and image row.

        row_gains [sources, N] -> [answer tokens], or [B, sources, N] -> [B, answer tokens], which is the function an
        attribution method wants: all ones is the plan as it is, all zeros is no image. Sources are in the order of
        `Layout.rows_for(plan)`; the plan's own gains and layers apply on top.
        """
        ids = _ids(answer)
        rows = len(row_gains) if row_gains.ndim == 3 else 1
        of_pass(self, prompt, [plan] * rows, len(ids), grad=torch.is_grad_enabled()).check(self)
        names = [source.name for source in self.layout.rows_for(plan)]
        seen = self.see(prompt, plan).features  # of the sources in the plan: the others play no part
        features = self._stacked(prompt, names, seen) * row_gains.to(self.device, self.dtype)[..., None]
        with torch.set_grad_enabled(torch.is_grad_enabled()), self._device():
            out = self._chosen(self._run(prompt, [plan], ids, features=features), ids)
        return out if row_gains.ndim == 3 else out[0]

    # Inside

    @contextmanager
    def _device(self) -> Iterator[None]:
        """The device for one forward pass. Running out of memory becomes a sentence; nothing stays behind."""
        with self._lock, self.compute_threads():
            try:
                yield
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._free(error)
                raise OutOfMemory(
                    f"{self.name} ran out of memory on {self.device}. Use a smaller image, a shorter conversation or "
                    "fewer plans at once."
                ) from error

    @contextmanager
    def compute_threads(self) -> Iterator[None]:
        """This engine's number of compute threads, for the thread that asks; what it had is put back."""
        before = torch.get_num_threads()
        if self.threads in (0, before):
            yield
            return
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _free(self, error: BaseException) -> None:
        """Gives back what the frames of a failed pass, which the error keeps, what is held, and then torch have."""
        traceback.clear_frames(error.__traceback__)
        self.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _cannot_compile(self, error: Exception) -> None:
        """Decodes plainly from now on, and says so; UserError where compiled decoding was asked for."""
        if self._insist:
            raise UserError(
                f"{self.name} cannot decode compiled here: {in_words(error)}. Leave --decode out, or use plain."
            ) from error
        self.compiled, self._why_decode = None, f"plain decoding: compiling failed here ({in_words(error)})"
        logger.warning("%s: %s", self.name, self._why_decode)

    def _pass(
        self, prompt: Prompt, plans: Sequence[Plan], features: dict[str, Tensor], recorder: Recorder | None = None
    ) -> Pass:
        """The injections of `plans`, one batch row each."""
        injections: dict[int, list[Injection]] = {}
        if prompt.images:
            for plan in plans:
                plan.validate(self.layout)
            pairs = dict.fromkeys((e.source, e.layer) for plan in plans for e in plan if not e.in_tower)
            for source, layer in pairs:
                gains = tuple(plan.gain(source, layer) for plan in plans)
                injections.setdefault(layer, []).append(Injection(source, gains, features[source]))
        return Pass(injections, self._image_positions(prompt), recorder)

    def _image_positions(self, prompt: Prompt) -> Tensor:
        positions = [grid.positions for grid in prompt.grids]
        joined = np.concatenate(positions) if positions else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(joined).to(self.device)

    def _embeddings(self, ids: Tensor, image: Tensor) -> Tensor:
        """Input embeddings [1, T, d] with zeros at the image rows: the base is an injection like any other."""
        embeddings = self.adapter.embed(ids)
        if len(image):
            embeddings[:, image] = 0
        return embeddings

    def _run(
        self,
        prompt: Prompt,
        plans: Sequence[Plan],
        answer_ids: Sequence[int],
        *,
        features: Tensor | None = None,
        recorder: Recorder | None = None,
        cache: DynamicCache | None = None,
        begin: int = 0,
        seen: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """One pass over prompt + answer_ids with injection: normed hidden states [B, T - begin, d].

        The `begin` first positions are in `cache` already, under the same plans; seen: what `_see_all` gave for these
        plans, where that is known. Call under the lock.
        """
        if features is None:
            seen = self._see_all(prompt, plans).features if seen is None else seen
            batch = len(plans)
        else:
            sources = self.layout.rows_for(plans[0])
            seen = {source.name: features.select(-3, i) for i, source in enumerate(sources)}
            batch = len(features) if features.ndim == 4 else 1
        ids = prompt.input_ids
        positions = prompt.extra["position_ids"]
        if answer_ids:
            ids = torch.cat([ids, torch.tensor([list(answer_ids)])], dim=1)
            if ids.shape[1] > self.max_tokens:
                raise UserError(
                    f"The conversation and its answer take {ids.shape[1]} tokens, but this model reads at most "
                    f"{self.max_tokens}. Shorten one of them."
                )
            more = prompt.extra["next_position"] + torch.arange(len(answer_ids))
            positions = torch.cat([positions, more.expand(*positions.shape[:-1], -1)], dim=-1)
        current = self._pass(prompt, plans, seen, recorder).after(begin)
        embeddings = self._embeddings(ids[:, begin:].to(self.device), current.positions).expand(batch, -1, -1)
        with active(current):
            return self.adapter.decoder(
                inputs_embeds=embeddings,
                position_ids=positions[..., begin:].to(self.device),
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state

    def _chosen(self, hidden: Tensor, ids: Sequence[int]) -> Tensor:
        """Log-probability of each of the answer's ids, given normed states of prompt and answer [B, T, d]: [B, ids]."""
        logprobs = self._logits(hidden[:, hidden.shape[1] - len(ids) - 1 : -1]).float().log_softmax(-1)
        chosen = torch.tensor(ids, device=self.device, dtype=torch.long).expand(len(logprobs), -1)
        return logprobs.gather(2, chosen[..., None]).squeeze(-1)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits on the device of the embeddings, wherever the last layer and the head are."""
        # As rows of one matrix: of a part of [B, T, d] torch would multiply by a copy of the head (CHANGELOG, Learned).
        logits = self.adapter.lm_head(hidden.reshape(-1, hidden.shape[-1]))
        return logits.reshape(*hidden.shape[:-1], -1).to(self.device)

    def _start(self, text: str) -> list[int]:
        """What the tokenizer itself puts before a text (a beginning-of-text token), unless the template wrote it."""
        written = self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token)
        return [] if written else list(self.tokenizer("")["input_ids"])

    def _encode(self, text: str) -> list[int]:
        """Token ids of rendered text; no token spans a `CUT`."""
        ids: list[int] = []
        for piece in text.split(CUT):
            if piece:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    def _piece(self, token: int) -> str:
        """The text of one token by itself, special tokens by name."""
        text = self._pieces.get(token)
        if text is None:
            text = self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            self._pieces[token] = text
        return text

    def _token(self, choice: Choice, stream: TextStream) -> Token:
        return Token(
            choice.id, stream.add(choice.id), choice.logprob, tuple((self._piece(i), p) for i, p in choice.top)
        )

    def _check(self, probe: Probe, length: int) -> None:
        layers = self.layout.n_layers
        for wish in probe.attention:
            if any(not 0 <= layer < layers for layer in wish.layers):
                raise UserError(f"Attention of layers {wish.layers} was asked for; this model has 0 to {layers - 1}.")
            without = sorted(set(wish.layers) - set(self.layout.attention_layers))
            if without:
                raise UserError(
                    f"Attention of layers {', '.join(map(str, without))} was asked for, but this model has linear "
                    f"attention there; layers {', '.join(map(str, self.layout.attention_layers))} can be looked at."
                )
            if any(not 0 <= row < length for row in wish.rows):
                raise UserError(f"Attention of positions {wish.rows} was asked for; there are 0 to {length - 1}.")
        if any(not 0 <= layer <= layers for layer in probe.hidden):
            raise UserError(f"Hidden states {probe.hidden} were asked for; this model has 0 to {layers}.")
        if probe.hidden_rows not in ("all", "image"):
            raise UserError(f"hidden_rows is {probe.hidden_rows!r}; it must be all or image.")


@dataclass
class _Row:
    """One answer being made."""

    plan: Plan
    text: TextStream
    draw: torch.Generator | None
    tokens: list[Token] = field(default_factory=list)
    stopped: str = ""  # "" while it runs
    seconds: float = 0.0


class Generation:
    """K answers to one prompt under K plans, made token by token as one batch. One thread at a time."""

    def __init__(
        self, engine: Engine, prompt: Prompt, plans: list[Plan], sampling: Sampling, stop: threading.Event | None
    ):
        for plan in plans:
            plan.validate(engine.layout)
        self.engine, self.prompt, self.sampling, self.stop = engine, prompt, sampling, stop
        draws = generators(sampling, len(plans))
        self.rows = [_Row(p, TextStream(engine.tokenizer), g) for p, g in zip(plans, draws, strict=True)]
        self._live = list(range(len(plans)))  # rows of the batch, in order
        self._limit = min(sampling.max_new_tokens, engine.max_tokens - prompt.input_ids.shape[1])
        need = of_answer(engine, prompt, plans, sampling.max_new_tokens)
        need.check(engine)
        self._part = Part(most=prompt.input_ids.shape[1] + self._limit if SEAT in need.parts else 0)
        self._made = 0
        self._start = time.perf_counter()
        self._first = 0.0
        self._sight: Sight | None = None

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        return not self._live

    def step(self) -> dict[int, Token]:
        """One token for every row that still runs: row -> token, without rows that just ended."""
        if self.stop is not None and self.stop.is_set():
            self.end("stopped")
        if self.done:
            return {}
        engine = self.engine
        try:
            if self._made:
                choices = engine.together.step(self._part, self._wanted(), self._decode)
            else:
                with torch.inference_mode(), engine._device():
                    choices = choose(self._prefill(), [self.sampling] * len(self.rows), [r.draw for r in self.rows])
        except BaseException as error:
            # Some layers may be a position ahead of others: nothing to hand on.
            engine.together.leave(self._part, broken=True)
            self.end("stopped")
            if isinstance(error, OutOfMemory):
                engine._free(error)  # once more: the key-value cache has gone now
            raise
        now = time.perf_counter() - self._start
        self._first = self._first or now
        self._made += 1
        made: dict[int, Token] = {}
        for i, choice in zip(self._live, choices, strict=True):
            row = self.rows[i]
            row.seconds = now
            if choice.id in engine._end:
                row.stopped = "end"
                continue
            made[i] = engine._token(choice, row.text)
            row.tokens.append(made[i])
            if self._made >= self._limit:
                row.stopped = "length"
        keep = [at for at, i in enumerate(self._live) if not self.rows[i].stopped]
        if keep and len(keep) < len(self._live):
            engine.together.keep(self._part, keep)
        self._live = [self._live[at] for at in keep]
        if self.done:
            self._let_go()
        return made

    def end(self, why: str) -> None:
        """Ends the rows that still run and lets go of the cache."""
        for i in self._live:
            self.rows[i].stopped = why
            self.rows[i].seconds = time.perf_counter() - self._start
        self._live = []
        self._let_go()

    def _let_go(self) -> None:
        """Hands the cache of a single answer on to later requests."""
        engine, part, (first, *others) = self.engine, self._part, self.rows
        try:
            if len(part) >= max(engine.shortest_prefix, 1) and not others:
                cache = engine.together.take_out(part)
                engine.prefixes.keep(cache, [*self._marks(), *(token.id for token in first.tokens)], first.plan)
        except Exception as error:
            if not is_out_of_memory(error):  # the answer is there; only the next one has to begin anew
                raise
        finally:
            engine.together.leave(part)

    def _marks(self) -> list[Hashable]:
        """What stands at each position of the prompt: a token's id, or the image and the row of it."""
        marks: list[Hashable] = self.prompt.input_ids[0].tolist()
        for grid in self.prompt.grids:
            key = self.prompt.extra["image_keys"][grid.index]
            for row, position in enumerate(grid.positions.tolist()):
                marks[position] = (key, grid.name, row)
        return marks

    def answers(self) -> list[Answer]:
        """One per plan, as far as they got."""
        engine, prompt = self.engine, self.prompt
        sight = self._sight or Sight({}, 0.0, False)
        return [
            Answer(
                model=engine.name,
                plan=row.plan,
                text="".join(token.text for token in row.tokens),
                tokens=tuple(row.tokens),
                seconds=row.seconds,
                first_token_seconds=self._first,
                vision_seconds=sight.seconds,
                vision_cached=sight.cached,
                stopped=row.stopped or "stopped",
                prompt_tokens=prompt.input_ids.shape[1],
                visual_tokens=prompt.visual_tokens,
                device=str(engine.device),
            )
            for row in self.rows
        ]

    def _prefill(self) -> Tensor:
        """Logits [K, V] after the prompt; all injection happens here."""
        engine = self.engine
        plans = [row.plan for row in self.rows]
        self._sight = engine._see_all(self.prompt, plans)
        cache = self._part.cache = DynamicCache(config=engine.adapter.decoder.config)
        begin = engine.prefixes.take_up(cache, self._marks(), plans, engine.shortest_prefix)
        hidden = engine._run(self.prompt, plans, (), cache=cache, begin=begin, seen=self._sight.features)
        return engine._logits(hidden[:, -1])

    def _wanted(self) -> Wanted:
        """The next token of every row that still runs."""
        return Wanted(
            ids=[self.rows[i].tokens[-1].id for i in self._live],
            position=self.prompt.extra["next_position"] + self._made - 1,
            axes=self.prompt.extra["position_ids"].shape[:-2],
            sampling=self.sampling,
            draws=[self.rows[i].draw for i in self._live],
        )

    def _decode(self) -> Tensor:
        """Logits [live rows, V] after the last tokens, by itself; nothing injected."""
        engine, wanted, part = self.engine, self._wanted(), self._part
        if engine.compiled is not None and engine.compiled.seat(part, len(wanted.ids)):
            try:
                return engine.compiled.step(part.seat, wanted)
            except CANNOT as error:
                if is_out_of_memory(error):
                    raise
                engine._cannot_compile(error)
        if part.seat is not None:  # decoding has been switched, cannot be compiled, or somebody watches
            part.cache = engine.together.take_out(part)
            part.seat.home.leave(part, broken=True)
        last = torch.tensor([[token] for token in wanted.ids], device=engine.device)
        hidden = engine.adapter.decoder(
            inputs_embeds=engine.adapter.embed(last),
            position_ids=torch.full((*wanted.axes, 1, 1), wanted.position, device=engine.device),
            past_key_values=part.cache,
            use_cache=True,
        ).last_hidden_state
        return engine._logits(hidden[:, -1])


class AnswerStream:
    """Iterates over the tokens of one answer. Safe to resume in another thread or context, and to drop at any time."""

    def __init__(self, generation: Generation):
        self._generation = generation

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> Token:
        made = self._generation.step()
        if not made:
            raise StopIteration
        return made[0]

    @property
    def done(self) -> bool:
        """Whether the answer is complete or was stopped."""
        return self._generation.done

    @property
    def answer(self) -> Answer:
        """The answer so far, complete once the iteration has ended."""
        return self._generation.answers()[0]

    def close(self) -> None:
        """Ends the answer where it is."""
        self._generation.end("stopped")

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _placed(
    ids: Sequence[int], placeholder: int, images: Sequence[Image.Image], regions: Sequence[Sequence[Region]]
) -> list[ImageGrid]:
    """Where every region of every image lies among `ids`; UserError where there are more or fewer placeholders."""
    where = np.flatnonzero(np.asarray(ids, dtype=np.int64) == placeholder)
    sizes = [sum(region.grid[0] * region.grid[1] for region in found) for found in regions]
    if len(where) != sum(sizes):
        raise UserError(f"The images take {sum(sizes)} tokens, but the prompt has {len(where)}; check its tokenizer.")
    placed = []
    for index, (image, found) in enumerate(zip(images, regions, strict=True)):
        own, where = where[: sizes[index]], where[sizes[index] :]
        taken = 0
        for region in found:
            n = region.grid[0] * region.grid[1]
            positions = own[taken : taken + n] if region.rows is None else own[region.rows]
            taken += n
            left, top, right, bottom = region.box or (0, 0, *image.size)
            size = (round(right - left), round(bottom - top))
            placed.append(ImageGrid(index, positions, region.grid, size, region.box, region.name))
    return placed


def _ids(tokens: Answer | Sequence[int | Token]) -> list[int]:
    """Token ids of an answer, of tokens, or of ids themselves."""
    if isinstance(tokens, Answer):
        tokens = tokens.tokens
    return [token.id if isinstance(token, Token) else int(token) for token in tokens]


def _stack(rows: list[Tensor], shape: tuple[int, int]) -> np.ndarray:
    """Recorded rows -> float32 array; an empty one [0, columns] where nothing was recorded."""
    if not rows:
        return np.zeros((0, shape[1]), dtype=np.float32)
    return torch.stack(rows).float().cpu().numpy().reshape(shape)


def _content_key(image: Image.Image) -> str:
    """Equal for equal pixels, and of a video equal times."""
    digest = hashlib.blake2b(f"{image.mode} {image.size} {clip_of(image) or ''}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()
