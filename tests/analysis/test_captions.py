"""Every view has one short sentence, and says the things that must be said."""

import inspect

import pytest

from analysis import captions, figures

# figure -> the caption that stands under it
UNDER = {
    "norms_by_layer": "norms",
    "ratio_and_cosine": "ratio",
    "image_map": "map",
    "map_row": "map",
    "attention_map": "attention",
    "attention_by_layer": "attention_layers",
    "effect_heatmap": "effect",
    "shapley_bars": "shapley",
    "subset_strip": "subsets",
    "attribution_map": "integrated_gradients",
    "attribution_by_source": "ablation",
    "causal_strip": "causal_check",
    "acuity_curves": "acuity",
    "lab_variants": "lab_variants",
    "lab_axes": "lab_axes",
    "lab_budget": "lab_budget",
    "lab_recall": "lab_recall",
    "lab_cost": "lab_cost",
    "loss_curve": "loss",
}


def test_every_figure_has_a_caption():
    drawn = {
        name
        for name, function in inspect.getmembers(figures, inspect.isfunction)
        if function.__module__ == figures.__name__ and not name.startswith("_") and name != "shares"
    }
    assert drawn == set(UNDER)
    for view in UNDER.values():
        assert captions.caption(view)


@pytest.mark.parametrize("view", sorted(captions.CAPTIONS))
def test_one_short_sentence(view):
    text = captions.caption(view)
    assert text.endswith(".") and text.count(". ") == 0 and len(text) <= 170
    assert text[0].isupper() and "  " not in text


@pytest.mark.parametrize(
    "view, words",
    [
        ("norms", "a norm is not an effect"),
        ("attention", "attention is not cause"),
        ("compare", "an ablated model is not a baseline"),
        ("shapley", "off-distribution"),
        ("trained_vs_ablated", "never benefit"),
        ("lab_recall", "256 tokens are no long context"),
        ("lab_variants", "signs can be compared, sizes not"),
    ],
)
def test_what_must_be_said(view, words):
    assert words in captions.caption(view)


def test_a_view_without_a_caption_is_an_error():
    with pytest.raises(KeyError):
        captions.caption("nothing")
