"""One sentence per view: what it shows and what it does not. Knows nothing about figures.

The page and the README quote these sentences; nothing on the page words its own caution.
"""

from __future__ import annotations

CAPTIONS = {
    "norms": "Shows how long the rows are, not what they do: a norm is not an effect.",
    "ratio": (
        "Shows how large an injection is beside the stream it joins, and whether both point the same way; "
        "neither says that the answer changes."
    ),
    "map": "One number per visual token, drawn where the token lies; deeper in, a token also carries its neighbours.",
    "effect": (
        "Shows how far the stream at the image rows moves when one source is switched off; "
        "that it moves does not mean that it helps."
    ),
    "ripple": (
        "Shows which image rows move when one source is switched off; "
        "attention spreads a change, so a row that moves need not be where the detail was."
    ),
    "attention": "Shows where one row looked when a word was chosen; attention is not cause, and sinks draw it always.",
    "attention_layers": (
        "Shows how much of their attention the answer's rows give to the image; "
        "a small share can decide and a large one can be idle."
    ),
    "readers": "Shows which words look at one patch; to look is not to use.",
    "causal_check": (
        "Shows what the answer loses without the marked patches and without as many random ones; "
        "if both lose the same, the map did not find what mattered."
    ),
    "diff": "Shows where two texts differ; a different wording can be equally right.",
    "compare": (
        "Trained beside trained is a comparison; an ablated model is not a baseline, "
        "because it runs in a state it never saw in training."
    ),
    "divergence": (
        "Shows the first token where two answers part; what comes after depends on that token, "
        "so later differences say little."
    ),
    "truth": "Shows how probable the true text is as the answer; the model may still say something else.",
    "subsets": (
        "All but the first are ablated: this shows what the trained model relies on, not what stacks gain in training."
    ),
    "shapley": (
        "Shows what each stack adds to a token's log-probability, averaged over orders of switching on "
        "(a sample beyond six stacks); "
        "off-distribution for this trained model."
    ),
    "integrated_gradients": (
        "Shows how the answer's log-probability grows with the rows' gains, shared out over rows; "
        "half-grown rows are off-distribution."
    ),
    "ablation": (
        "Shows what the answer loses when one part of the image is withheld; "
        "two parts that say the same can each look idle."
    ),
    "acuity": (
        "Shows how often text is read exactly at each glyph height, with 95 % intervals of what was "
        "asked; it holds for these questions and fonts, not for photographs."
    ),
    "lab_claims": (
        "A claim stands or falls with 95 % intervals, of what is asked and of seeds; “at most” and “more than” say a "
        "fifth of what stacks gain, or of the other's score."
    ),
    "lab_variants": (
        "Shows small models that read rendered text beside the paper's benchmarks; signs can be compared, sizes not."
    ),
    "lab_axes": (
        "Shows models trained anew at each place, each on its own scale; a bar belongs to its dot: "
        "the gap between two is told, with less doubt, row by row."
    ),
    "lab_cost": (
        "Shows what was measured here at toy size; how costs grow with 576 rows and 32 layers is not read off it, nor "
        "are times that differ by less than half."
    ),
    "lab_budget": (
        "Rows that keep no stack still stand in the context, so the budget spares pixels and not tokens; what a "
        "ranking is worth shows beside chance."
    ),
    "lab_recall": (
        "Shows from which part of a text a variant recalls facts that nobody could guess; that is room for facts, not "
        "understanding, and 256 tokens are no long context."
    ),
    "lab_search": (
        "Shows what one search found from one seed in one small decoder; what it would choose for another depth or "
        "other pictures is open."
    ),
    "kept": (
        "The norm is of this model's own stacks (in the lab's variants of the tower's tokens), the attention of its "
        "first layer; it was neither trained nor is run with a budget."
    ),
    "lab_table": (
        "Agreement is in the sign of one difference on rendered text; it neither confirms the paper's size of it "
        "nor its cause."
    ),
    "deal": "Shows where tokens go, not what they carry; which way reads best is for the trained variants to say.",
    "context": "Counts rows of the context alone; what attention over more rows costs is in the measured columns.",
    "loss": "Shows the loss on training scenes; a low one is not yet reading on scenes that were held out.",
    "views": "Shows all that the model sees: nothing finer than these pixels reaches it.",
    "hires_vs_single": (
        "The same context length, but the twin never sees the high-resolution pixels: "
        "this pair shows what stacks carry at no cost in context."
    ),
    "hires_vs_concat": (
        "The same pixels and context length, stacked layer by layer beside merged once: "
        "this pair asks whether stacking itself helps."
    ),
    "taps_vs_single": (
        "The same pixels, with and without features from earlier vision layers; "
        "a difference between two single training runs can be chance."
    ),
    "lab_pair": (
        "Two variants of the lab, trained on the same scenes; one question and one seed of each decide nothing: "
        "the Lab tab has all of them."
    ),
    "trained_vs_ablated": (
        "The same weights with stacks switched off: this shows reliance, never benefit, "
        "since training had no chance to make up for the loss."
    ),
}


def caption(view: str) -> str:
    """The sentence that belongs under a view; KeyError for a view that has none (every view must have one)."""
    return CAPTIONS[view]
