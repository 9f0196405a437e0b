"""The registry of what the lab compares: one small frozen config each, and where its visual tokens land.

The global view has 8 x 8 tokens, the high-resolution view 16 x 16, dealt out to four sets of 64 (`sets_of`). A new
variant is one line of VARIANTS. Most read the last layer of the frozen vision tower, from a cache; those that tune the
tower or look inside it (`pixels`) read the views and run it themselves (model/lab/sight.py).

The group "text" has no picture: its long text has 256 tokens, of which the last 64 are the short context, and the same
samplings deal the whole out to four sets of 64 (`entering`). Knows nothing about training.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace

import torch

from model.errors import UserError
from model.families.deepstack_llava import sample

LOW, TILES = 8, 2  # tokens per side of the global view; tiles per side of the high-resolution view
FITTED = 0.75  # of the global view's height that an inconsistent one fills
HIGH = LOW * TILES  # tokens per side of the high-resolution view
LAYERS = 8  # of the decoder in every size; what variants are called in words counts on it
SETS = TILES**2
GROUPS = ("what enters", "how it enters", "sampling", "where", "tower", "strength", "text", "budget")
LAST = -1  # as a start: after the last layer, where no answer can see it
TAPPED = (1, 2, 3)  # blocks of the tower, of 0 to 4, that are tapped; its last is what all others read
TAPS = ("taps", "taps-samples")  # the merges whose rows come from several blocks
TEXTS = ("text-full", "text-truncated", "text-stack")  # the merges that read a long text and no picture
LONG, SHORT = HIGH**2, LOW**2  # tokens of that text, and of its end that is the short context
PARTS = 8  # of that text, by which recall is told


@dataclass(frozen=True)
class Variant:
    """What defines a variant; defaults are the paper's: four dilated samples added before layers 1 to 4."""

    name: str
    group: str
    words: str  # what it is, one sentence
    merge: str = "stack"  # how visual tokens enter: stack, none, string, global-string, concat, average, of TAPS, TEXTS
    rows: str = "high"  # what a stack holds: samples of the high-resolution view, or the global tokens ("global"); of a
    # text: samples of the whole, or the short context
    sampling: str = "2d"  # see families.deepstack_llava.sample
    consistent: bool = True  # False: the global view is fitted into three quarters of its height
    start: int = 1  # the layer before which the first stack is added, or LAST
    interval: int = 1
    count: int = SETS  # how many of the sets enter, or taps (and samples)
    base_at: int = 0  # the layer before which the global tokens are added; beyond 0 the input holds zeros
    gate: str = "none"  # what each stack is multiplied by: none, scalar, channel (learned, from 1)
    positions: bool = False  # a learned embedding per stack and row, from 0
    keep_all: float = 1.0  # share of the image rows that get every stack: those with most in the high-resolution view
    keep_some: float = 1.0  # share that gets at least the first half of the stacks
    keep_by: str = "norm"  # how rows are ranked: norm, random, question
    tuned: bool = False  # the tower is trained, too, by low-rank changes
    tower_start: int | None = None  # DeepStack-V: the tower layer before which the first stack enters the global view
    tapped: str = "earlier"  # what taps read: the blocks of TAPPED, or "last": each the last one's
    guided: bool = True  # training shows one attention head of the last two layers where each answer stands

    def config(self) -> dict:
        """Everything that sets it apart in a run: all but its name and words."""
        return {key: value for key, value in asdict(self).items() if key not in ("name", "group", "words")}

    @property
    def pixels(self) -> bool:
        """Whether it reads the views themselves and not the frozen tower's features."""
        return self.tuned or self.tower_start is not None or self.merge in TAPS

    @property
    def reads(self) -> str:
        """What its data are: "text", "views", or "features" of the frozen tower."""
        return "text" if self.merge in TEXTS else "views" if self.pixels else "features"

    @property
    def taps(self) -> int:
        """How many of its stacks are merged blocks of the tower."""
        return min(self.count, len(TAPPED)) if self.merge in TAPS else 0

    @property
    def blocks(self) -> tuple[int, ...]:
        """Of a merge of TAPS: the tower block that the input's image rows are made of, then that of each stack."""
        taps = TAPPED[: self.taps] if self.tapped == "earlier" else (-1,) * self.taps
        if self.merge == "taps":
            return (-1, *taps)
        return (-1, *reversed(taps), *(-1,) * SETS)[: 1 + self.count]


_ALL = (
    Variant("stack-2d", "what enters", "four dilated samples of the high-resolution view before layers 1 to 4"),
    Variant("none", "what enters", "the global view alone, once, at the input", merge="none"),
    Variant("dummy", "what enters", "the global tokens again before layers 1 to 4", rows="global"),
    Variant("string", "how it enters", "all high-resolution tokens in the sequence, no global view", merge="string"),
    Variant("global-string", "how it enters", "the global tokens and all high-resolution tokens in the sequence",
            merge="global-string"),
    Variant("concat", "how it enters", "global tokens and samples side by side on the feature axis, projected once",
            merge="concat"),
    Variant("average", "how it enters", "global tokens plus the mean of the samples, once, at the input",
            merge="average"),
    Variant("stack-grid", "sampling", "each tile of the high-resolution view is one stack", sampling="grid"),
    Variant("stack-1d", "sampling", "every fourth token of the flattened view, as in the paper's code", sampling="1d"),
    Variant("stack-1d-sequential", "sampling", "one quarter of the flattened view after another, as in its text",
            sampling="1d-sequential"),
    Variant("inconsistent-resize", "sampling", "the global view squeezed into three quarters of its height, the "
            "high-resolution view filling its frame: the same pixels in other places (the paper pads the "
            "high-resolution view instead)", consistent=False),
    Variant("start-0", "where", "stacks before layers 0 to 3", start=0),
    Variant("start-2", "where", "stacks before layers 2 to 5", start=2),
    Variant("start-3", "where", "stacks before layers 3 to 6", start=3),
    Variant("start-4", "where", "stacks before layers 4 to 7", start=4),
    Variant("start-5", "where", "stacks before layers 5 to 7: the fourth would come after the last layer and is left "
            "out", start=5),
    Variant("start-6", "where", "stacks before layers 6 and 7: the third and fourth would come after the last layer "
            "and are left out", start=6),
    Variant("start-7", "where", "a stack before layer 7: the second to fourth would come after the last layer and are "
            "left out", start=7),
    Variant("start-last", "where", "the first sample added after the last layer, where no answer sees it: a control",
            start=LAST),
    Variant("interval-2", "where", "stacks before layers 1, 3, 5, 7", interval=2),
    Variant("interval-3", "where", "stacks before layers 1, 4, 7: the fourth would come after the last layer and is "
            "left out", interval=3),
    Variant("interval-4", "where", "stacks before layers 1 and 5: the third and fourth would come after the last layer "
            "and are left out", interval=4),
    Variant("layers-1", "where", "the first sample only", count=1),
    Variant("layers-2", "where", "the first two samples only", count=2),
    Variant("layers-3", "where", "the first three samples only", count=3),
    Variant("global-deeper", "where", "the global view alone, added before layer 4; zeros at the input",
            merge="none", base_at=4),
    Variant("global-deeper-1", "where", "the global view alone, added before layer 1; zeros at the input",
            merge="none", base_at=1),
    Variant("global-deeper-2", "where", "the global view alone, added before layer 2; zeros at the input",
            merge="none", base_at=2),
    Variant("global-deeper-6", "where", "the global view alone, added before layer 6; zeros at the input",
            merge="none", base_at=6),
    Variant("stack-2d-unguided", "where", "as stack-2d, but training shows no attention head where answers stand: a "
            "model finds out by itself in which layers to read", guided=False),
    Variant("start-4-unguided", "where", "as start-4, but unguided", start=4, guided=False),
    Variant("none-unguided", "where", "as none, but unguided", merge="none", guided=False),
    Variant("global-deeper-2-unguided", "where", "as global-deeper-2, but unguided", merge="none", base_at=2,
            guided=False),
    Variant("global-deeper-6-unguided", "where", "as global-deeper-6, but unguided", merge="none", base_at=6,
            guided=False),
    Variant("none-tuned", "tower", "the global view alone, the tower trained too, by changes of rank 8 to its "
            "matrices", merge="none", tuned=True),
    Variant("deepstack-v-0", "tower", "the tower trained as in none-tuned; stacks of the high-resolution view's patch "
            "embeddings enter it before its layers 0 to 3", merge="none", tuned=True, tower_start=0),
    Variant("deepstack-v-1", "tower", "the tower trained as in none-tuned; stacks of what its first layer makes of "
            "the high-resolution view enter it before its layers 1 to 4", merge="none", tuned=True, tower_start=1),
    Variant("deepstack-v-2", "tower", "the tower trained as in none-tuned; stacks of what its first two layers make of "
            "the high-resolution view enter it before its layers 2 to 4: the fourth would come after its last layer "
            "and is left out", merge="none", tuned=True, tower_start=2),
    Variant("deepstack-v-3", "tower", "the tower trained as in none-tuned; stacks of what its first three layers make "
            "of the high-resolution view enter it before its layers 3 and 4: the third and fourth would come after its "
            "last layer and are left out", merge="none", tuned=True, tower_start=3),
    Variant("deepstack-v-4", "tower", "the tower trained as in none-tuned; a stack of what its first four layers make "
            "of the high-resolution view enters it before its last: the second to fourth would come after that and are "
            "left out", merge="none", tuned=True, tower_start=4),
    Variant("taps-0", "tower", "the high-resolution view alone, each 2 x 2 tokens merged into one, once, at the input",
            merge="taps", count=0),
    Variant("taps-1", "tower", "as taps-0, and the tower's block 1, merged by weights of its own, before layer 1",
            merge="taps", count=1),
    Variant("taps-2", "tower", "as taps-0, and the tower's blocks 1 and 2, each merged by weights of its own, before "
            "layers 1 and 2", merge="taps", count=2),
    Variant("taps-3", "tower", "as taps-0, and the tower's blocks 1 to 3, each merged by weights of its own, before "
            "layers 1 to 3: Qwen3-VL's way", merge="taps", count=3),
    Variant("taps-3-last", "tower", "the same weights in the same places as taps-3, but each merges the tower's last "
            "block: a control", merge="taps", count=3, tapped="last"),
    Variant("taps-samples", "tower", "as taps-0, then the tower's blocks 3, 2, 1 merged before layers 1 to 3 and four "
            "samples of its last block before layers 4 to 7, each by weights of its own: Granite's way",
            merge="taps-samples", count=len(TAPPED) + SETS),
    Variant("gate", "strength", "a learned scalar per stack", gate="scalar"),
    Variant("gate-channel", "strength", "a learned gain per stack and channel", gate="channel"),
    Variant("layer-positions", "strength", "a learned embedding per stack and row", positions=True),
    Variant("text-full", "text", "a long text of facts, all of its 256 tokens in the sequence", merge="text-full"),
    Variant("text-truncated", "text", "its last 64 tokens alone", merge="text-truncated"),
    Variant("text-stack-dilated", "text", "its last 64 tokens in the sequence; before layers 1 to 4 every fourth token "
            "of the whole, so that the four tokens of a fact land on one row", merge="text-stack", sampling="1d"),
    Variant("text-stack-chunks", "text", "its last 64 tokens in the sequence; before layers 1 to 4 one quarter of the "
            "whole after another, so that four facts lie on the same rows", merge="text-stack",
            sampling="1d-sequential"),
    Variant("text-stack-dummy", "text", "its last 64 tokens in the sequence and again before layers 1 to 4: a control",
            merge="text-stack", sampling="1d", rows="global"),
    Variant("budget-50", "budget", "every stack for a quarter of the rows, half of them for another, none for the "
            "rest; by the norm of their features", keep_all=0.25, keep_some=0.5),
    Variant("budget-25", "budget", "every stack for an eighth of the rows, half of them for another, none for the "
            "rest; by the norm of their features", keep_all=0.125, keep_some=0.25),
    Variant("budget-50-random", "budget", "as budget-50, but the rows are drawn by chance", keep_all=0.25,
            keep_some=0.5, keep_by="random"),
    Variant("budget-25-random", "budget", "as budget-25, but the rows are drawn by chance", keep_all=0.125,
            keep_some=0.25, keep_by="random"),
    Variant("budget-50-question", "budget", "as budget-50, but ranked by the question: how much its words attend to "
            "the global tokens in the first layer; each question has image rows of its own in training",
            keep_all=0.25, keep_some=0.5, keep_by="question"),
    Variant("budget-25-question", "budget", "as budget-25, but ranked by the question, as budget-50-question",
            keep_all=0.125, keep_some=0.25, keep_by="question"),
)  # fmt: skip
VARIANTS = {variant.name: variant for variant in _ALL}
PLACED = r"start-(\d+)-interval-(\d+)-count-(\d+)"  # names of what `placed` makes


def variant_of(name: str) -> Variant:
    """That of the registry, or a `placed` one by its name. UserError unless there is one of this name."""
    if name in VARIANTS:
        return VARIANTS[name]
    numbers = re.fullmatch(PLACED, name)
    found = placed(*map(int, numbers.groups())) if numbers else None
    if found is None or found.name != name:
        raise UserError(f"There is no lab variant {name!r}; there are {', '.join(VARIANTS)}.")
    return found


def placed(start: int, interval: int, count: int, layers: int = LAYERS) -> Variant | None:
    """The reference with its stacks in other places of a decoder of so many layers: the one of the registry where there
    is one; None for numbers that are none of a place or add no stack. Stacks that would come after the last layer are
    left out, and its words do not count them."""
    if interval < 1 or not 1 <= count <= SETS or (count == 1 and interval > 1) or start >= layers:
        return None
    made = replace(
        VARIANTS["stack-2d"], name=f"start-{start}-interval-{interval}-count-{count}", group="where",
        start=start, interval=interval, count=count,
    )  # fmt: skip
    found = len(layers_of(made, layers))
    every = f", every {interval} layers" if interval > 1 and found > 1 else ""
    words = f"{'one stack' if found == 1 else f'{found} stacks'} from layer {start} on{every}"
    left = count - found
    out = f"; {left} of the {count} would come after the last layer and {'is' if left == 1 else 'are'} left out"
    made = replace(made, words=words + (out if left else ""))
    return next((known for known in VARIANTS.values() if known.config() == made.config()), made)


def sets_of(sampling: str) -> torch.Tensor:
    """Which tokens of the high-resolution view, row by row, each set takes: `[4, 64]`, in the order of the rows that
    they are added to."""
    numbers = torch.arange(HIGH**2).view(HIGH, HIGH, 1)
    return torch.stack([taken.flatten() for taken in sample(numbers, (TILES, TILES), SETS, sampling)])


def first_layer(variant: Variant, layers: int) -> int:
    """The layer before which the first stack is added, of `layers`; that number itself means after the last."""
    return layers if variant.start == LAST else variant.start


def watched(variant: Variant, layers: int) -> tuple[int, ...]:
    """The layers whose head 0 is shown where each answer stands."""
    return (layers - 2, layers - 1) if variant.guided else ()


def layers_of(variant: Variant, layers: int) -> dict[int, int]:
    """Layer -> set (or tap), of a decoder of `layers` layers, as the paper's loop has it: those beyond the last layer
    are left out, but of a start at LAST the first, which is added after it, under the number of layers. A
    single-injection variant has none."""
    if variant.merge not in ("stack", "text-stack", *TAPS):
        return {}
    places = {first_layer(variant, layers) + variant.interval * k: k for k in range(variant.count)}
    return {layer: k for layer, k in places.items() if layer < layers + (variant.start == LAST)}


def landing(variant: Variant, layers: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """In which image row of the decoder to look for each high-resolution token `[256]`, for what the global view shows
    at each of their places `[256]`, and how many image rows there are.

    Training points at these rows, so that no variant is told to look where its tokens are not. A token that does not
    enter is looked for in the global view's row of its place.
    """
    numbers = torch.arange(HIGH**2)
    down = (numbers // HIGH + 0.5) / HIGH  # share of the height
    down = down if variant.consistent else (1 - FITTED) / 2 + FITTED * down
    below = (down * LOW).long() * LOW + numbers % HIGH // TILES  # the global view's token over the same place
    if variant.merge == "string":
        return numbers, numbers, HIGH**2
    if variant.merge == "global-string":
        return LOW**2 + numbers, below, LOW**2 + HIGH**2
    where = below.clone()
    if variant.merge == "stack" and variant.rows == "high":
        sets = sets_of(variant.sampling)
        for k in layers_of(variant, layers).values():
            where[sets[k]] = torch.arange(LOW**2)
    return where, below, LOW**2


def entering(variant: Variant, layers: int) -> torch.Tensor:
    """Which tokens of a long text enter: `[1 + stacks, rows]`, those of the input first, then those of each stack in
    the order of its layers.

    As in the paper a short view stands in the sequence and all of the long one is stacked onto it, its own part again
    included. An image's short view is a smaller image of all of it; a text has no such thing, so that ours is its end,
    which is what truncation leaves. Dilated, four neighbours land on one row, as with 2d samples of an image; a fact
    has four tokens, and none is torn.
    """
    whole, end = torch.arange(LONG), torch.arange(LONG - SHORT, LONG)
    if variant.merge == "text-full":
        return whole[None]
    taken = [*layers_of(variant, layers).values()]
    stacks = end.expand(len(taken), -1) if variant.rows == "global" else sets_of(variant.sampling)[taken]
    return torch.cat([end[None], stacks])


def found_at(variant: Variant, layers: int) -> torch.Tensor:
    """In which row of the decoder to look for each token of a long text, `[256]`: that of its stack if it has one; -1
    for a token that does not enter."""
    where = torch.full((LONG,), -1)
    for tokens in entering(variant, layers):
        where[tokens] = torch.arange(len(tokens))
    return where
