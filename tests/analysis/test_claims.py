"""The paper's claims in our results: what holds, what fails, what stays open, worked out by hand."""

import pytest

from analysis import claims, lab
from analysis.claims import CLAIMS, Comparison
from model.lab.variants import VARIANTS
from tests import lab as made
from tests.lab import line


def summary(tmp_path, shares, second=("gate", "gate")):
    """One seed of 600 questions about 300 codes each, and of gate two that agree; an interval of a difference is about
    8 points wide to each side."""
    lines = [line(variant, share) for variant, share in shares.items()]
    lines += [line(variant, 0.5, seed=4 * seed) for seed, variant in enumerate(second)]  # seeds 0, 4: no noise
    return lab.summary(lab.read(made.write(tmp_path / "results.jsonl", lines)))


def test_every_claim_names_variants_that_there_are_and_its_place_in_the_paper():
    for claim in CLAIMS:
        assert claim.source.startswith(("table ", "figure ")) and claim.shown_by
        for comparison in claim.shown_by:
            assert {comparison.variant, comparison.against} <= set(VARIANTS)
            assert comparison.how in claims.HOW


@pytest.mark.parametrize(
    ("how", "share", "kind"),
    [
        ("above", 0.5, "holds"),
        ("above", 0.3, "fails"),
        ("above", 0.41, "open"),
        ("below", 0.5, "fails"),
        ("below", 0.3, "holds"),
        ("below", 0.39, "open"),
        ("not above", 0.3, "holds"),
        ("not above", 0.4, "holds"),
        ("not above", 0.48, "open"),
        ("not above", 0.6, "fails"),
        ("not below", 0.6, "holds"),
        ("not below", 0.4, "holds"),
        ("not below", 0.32, "open"),
        ("not below", 0.2, "fails"),
    ],
)
def test_one_comparison(tmp_path, how, share, kind):
    """dummy against none at 0.4; the stacks gain 0.4, so that 0.08 is about as good."""
    found = summary(tmp_path, {"none": 0.4, "stack-2d": 0.8, "dummy": share})
    outcome = claims.outcome(found, Comparison("dummy", how, "none"))
    assert outcome.kind == kind
    assert outcome.difference.value == pytest.approx(share - 0.4, abs=2e-3)
    assert "1 seed)" in outcome.words and outcome.words.startswith("dummy ")


def test_a_claim_needs_all_its_comparisons_and_falls_with_one(tmp_path):
    first = CLAIMS[0]
    for dummy, kind in ((0.2, "supported"), (0.5, "contradicted"), (0.29, "undecided")):
        found = summary(tmp_path, {"none": 0.2, "stack-2d": 0.7, "dummy": dummy})
        told = {finding.claim: finding for finding in claims.findings(found)}
        assert told[first].kind == kind, dummy
    lacking = summary(tmp_path, {"none": 0.2, "stack-2d": 0.7})
    finding = claims.findings(lacking)[0]
    assert finding.kind == "undecided"
    assert [outcome.kind for outcome in finding.outcomes] == ["holds", "not run", "not run"]
    assert finding.outcomes[1].words == "stack-2d above dummy: not run"


def test_without_the_stacks_gain_nothing_is_about_as_good(tmp_path):
    found = summary(tmp_path, {"none": 0.2, "dummy": 0.2})
    assert claims.outcome(found, Comparison("dummy", "not above", "none")).kind == "not run"


def test_a_comparison_may_be_under_a_score_of_its_own(tmp_path):
    """A string that reads less in all, and more where it is asked by place, is not beaten by the stacks."""
    lines = []
    for variant, fine, place in (("none", 0.2, 0.2), ("stack-2d", 0.7, 0.7), ("string", 0.5, 0.9)):
        for seed in (0, 4):
            each = line(variant, fine, seed=seed)
            each["accuracy"]["place"] = {"n": 300, "exact_match": place}
            lines.append(each)
    found = lab.summary(lab.read(made.write(tmp_path / "results.jsonl", lines)))
    asked = [each for each in CLAIMS[1].shown_by if each.against == "string"]
    said = {each.metric: claims.outcome(found, each) for each in asked}
    assert said[""].kind == "holds" and said["place"].kind == "fails"
    assert said["place"].words.startswith("stack-2d not clearly below string, asked by place: fails, -20.0 points")
    under = found.under("place")
    assert under.metric == "place" and claims.findings(under)[1].kind == "contradicted"
    assert [each.comparison.metric for each in claims.findings(under)[1].outcomes] == ["", ""]
