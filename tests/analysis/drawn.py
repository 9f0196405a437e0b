"""One figure of every kind from hand-made results, for both drawing modules."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from analysis import attention, lab, norms
from analysis.attribution import Attribution, CausalCheck
from analysis.evaluate import acuity
from model.prompt import Prompt
from tests import lab as made
from tests.analysis import hand

PICTURE = Image.linear_gradient("L").convert("RGB").resize((40, 20))


def attribution() -> Attribution:
    """Two sources on the grid of `hand.trace`."""
    prompt = Prompt(None, (), hand.trace().grids)
    values = np.array([[1.0, -2, 3, 0], [0, 0, 0, 0.5]])
    return Attribution("integrated gradients", prompt, hand.PLAN, ("base", "0"), values, -1.0, -3.5, 1e-4, None, 0.1)


def lab_summary() -> lab.Summary:
    """Made-up runs of the lab, one of them with a name that must not be read as markup."""
    with tempfile.TemporaryDirectory() as folder:
        lines = [made.line(name, seed=seed) for name in made.MADE_UP for seed in (0, 1)]
        lines.append(made.line("<b>$x$", 0.95, group="what enters", cost={"context": 200}))
        return lab.summary(lab.read(made.write(Path(folder) / "results.jsonl", lines)))


def every(draw, **how) -> dict:
    """name -> figure, made by the module `draw` (figures or figures_mpl)."""
    trace, looking = hand.trace(), hand.attending()
    summary = norms.summarise(trace)
    effect = norms.Effect(hand.PLAN, ("base", "0"), np.array([[1.0, 0.9, 0.8], [0.0, 0.5, 0.25]]))
    look = attention.to_image(looking, 6, 0)
    run = hand.subset_run(tokens=(" K", "$7$ <b>"), said="K7 <b>$x$")
    curve = acuity({str(h): {"n": 20, "exact_match": e, "cer": 0.1} for h, e in ((6, 0.2), (8, 0.9))})
    map_ = norms.norm_map(trace, "before", 1)
    return {
        "norms_by_layer": draw.norms_by_layer(summary, **how),
        "ratio_and_cosine": draw.ratio_and_cosine(summary, **how),
        "image_map": draw.image_map(map_, PICTURE, **how),
        "map_row": draw.map_row({"base": map_, "0": map_, "<i>": map_}, PICTURE, title="Three maps, RMS", **how),
        "attention_map": draw.attention_map(look, PICTURE, **how),
        "attention_by_layer": draw.attention_by_layer(attention.by_layer(looking), 2, **how),
        "effect_heatmap": draw.effect_heatmap(effect, **how),
        "shapley_bars": draw.shapley_bars(run, **how),
        "subset_strip": draw.subset_strip(run, **how),
        "attribution_map": draw.attribution_map(attribution(), "0", PICTURE, **how),
        "attribution_by_source": draw.attribution_by_source(attribution(), **how),
        "causal_strip": draw.causal_strip(CausalCheck(2, 1.5, np.array([0.1, 0.2, 1.9])), **how),
        "acuity_curves": draw.acuity_curves({"<hires>": curve}, **how),
        "lab_variants": draw.lab_variants(lab_summary(), **how),
        "lab_axes": draw.lab_axes(lab_summary(), **how),
        "lab_budget": draw.lab_budget(lab_summary(), **how),
        "lab_recall": draw.lab_recall(lab_summary(), **how),
        "lab_cost": draw.lab_cost(lab_summary(), **how),
        "loss_curve": draw.loss_curve({"hires": ([0, 10], [4.0, 0.1])}, **how),
    }


def without_image() -> norms.LayerNorms:
    """Norms of a conversation without an image."""
    nothing = {"grids": (), "injected_rms": {}, "ratio": np.zeros((2, 0)), "cosine": np.zeros((2, 0))}
    return norms.summarise(hand.trace(**nothing, texts=("a",) * 9))
