"""The search for where stacks enter: what it may spend, who goes on and from where, and what ranks them.

Run: pytest tests/model/lab/test_search.py
"""

from dataclasses import replace

import pytest
import torch

from model.errors import UserError
from model.lab import run as lab
from model.lab import scenes, search
from model.lab.search import Rung
from model.lab.variants import LAYERS, VARIANTS, layers_of, placed, variant_of
from model.training import twins
from tests.model.lab.lab_sizes import TINY, weights

STEPS = 8


@pytest.fixture
def steps_done(monkeypatch):
    """Every step of training that is done, as (run, step)."""
    done, real = [], twins.rate_factor

    def rate_factor(step, ends):
        done.append(step)
        return real(step, ends)

    monkeypatch.setattr(twins, "rate_factor", rate_factor)
    return done


def own(folder, data):
    """A work folder of its own that borrows the data of another."""
    (folder / "lab").mkdir()
    name = f"data-{scenes.tower_mark()}"
    (folder / "lab" / name).symlink_to(data / "lab" / name)
    return folder


def jobs(count, seed=0):
    return [lab.Job(variant, TINY, 0, STEPS) for variant in search.drawn(LAYERS, count, seed)]


def searched(workdir, made, rungs, progress=None):
    def climb(left, until):
        return [search.climb(job, workdir, until, progress) for job in left]

    return search.halve(made, rungs, climb)


# ---- what is tried, for how much


def test_every_candidate_is_a_placement_of_its_own_whose_stacks_find_layers():
    every = search.candidates(LAYERS)
    assert len(every) == 49 and len({tuple(layers_of(variant, LAYERS)) for variant in every}) == 49
    for variant in every:
        assert len(layers_of(variant, LAYERS)) == variant.count
        assert variant_of(variant.name) == variant
        other = replace(VARIANTS["stack-2d"], start=variant.start, interval=variant.interval, count=variant.count)
        assert other.config() == variant.config()


def test_a_placement_of_the_registry_is_that_variant_with_its_key():
    known = {(1, 1, 4): "stack-2d", (2, 1, 4): "start-2", (1, 2, 4): "interval-2", (1, 1, 3): "layers-3"}
    for place, name in known.items():
        assert placed(*place) is VARIANTS[name]
    assert placed(2, 1, 3).name == "start-2-interval-1-count-3" and placed(1, 0, 2) is placed(1, 2, 1) is None
    for name in ("start-1-interval-1-count-4", "start-2-interval-1-count-5", "start-02-interval-1-count-3"):
        with pytest.raises(UserError, match="There is no lab variant"):
            variant_of(name)


def test_those_drawn_have_every_number_of_stacks_and_differ_by_seed():
    drawn = search.drawn(LAYERS, 16, 0)
    counts = [variant.count for variant in drawn]
    assert [counts.count(n) for n in (1, 2, 3, 4)] == [4, 4, 4, 4]
    assert search.drawn(LAYERS, 16, 0) == drawn != search.drawn(LAYERS, 16, 1)
    assert search.drawn(LAYERS, 8, 0) == drawn[:8]
    assert len({variant.name for variant in search.drawn(LAYERS, 49, 0)}) == 49


def test_a_plan_spends_what_it_may_and_no_more():
    assert search.plan(16_000, 2000, 49) == [Rung(1000, 11), Rung(2000, 5)]
    for budget in (3000, 3999, 7000, 16_000, 30_000, 10**6):
        rungs = search.plan(budget, 2000, 49)
        assert search.spent(rungs) <= budget and rungs[-1].step == 2000 and rungs[0].count <= 49
        one_more = [Rung(rung.step, max(1, (rungs[0].count + 1) >> k)) for k, rung in enumerate(rungs)]
        assert rungs[0].count == 49 or search.spent(one_more) > budget
    with pytest.raises(UserError, match="--budget is 2,999; two candidates of 2,000 steps each need 3,000"):
        search.plan(2999, 2000, 49)


def test_the_best_half_goes_on_and_ties_are_told_by_whole_answers():
    made = jobs(4)
    told = zip(made, (1, 3, 2, 3), (0, 0, 9, 1), strict=True)
    scores = {job.name: {"characters": c, "exact_match": e} for job, c, e in told}
    asked = []

    def climb(left, until):
        asked.append((until, [job.name for job in left]))
        return [scores[job.name] for job in left]

    found = search.halve(made, [Rung(2, 4), Rung(4, 2), Rung(8, 1)], climb)
    names = [job.name for job in made]
    assert asked == [(2, names), (4, [names[3], names[1]]), (8, [names[3]])] and found.winner == made[3]


# ---- on real runs


def test_survivors_go_on_and_what_ends_is_the_run_of_the_variant(tmp_path, workdir, steps_done, monkeypatch):
    """As many steps as the plan says, those of the winner once each, its weights those of a run without pauses."""
    folder, asked, real = own(tmp_path, workdir), [], twins.answered

    def answered(twin, questions, batch, *rest, **more):
        asked.append(len(batch.items))
        return real(twin, questions, batch, *rest, **more)

    monkeypatch.setattr(twins, "answered", answered)
    rungs = search.plan(17, STEPS, 49)
    assert rungs == [Rung(4, 3), Rung(8, 1)] and search.spent(rungs) == 16
    found = searched(folder, jobs(3), rungs)
    assert len(steps_done) == 16 and sorted(steps_done) == sorted([0, 1, 2, 3] * 3 + [4, 5, 6, 7])
    assert set(asked) == {TINY.validation}, "scenes of the test had a part in it"
    winner = found.winner
    ended = search.finish(winner, folder)
    assert len(steps_done) == 16 and asked[-1] == TINY.test
    record = search.record(found, 17, ended)
    assert record["spent"] == 16 and [len(rung["ranking"]) for rung in record["rungs"]] == [3, 1]
    assert record["winner"] == winner.variant.name and record["rule"] == "stack-2d"
    assert [each["variant"] for each in record["rungs"][-1]["ranking"]] == [winner.variant.name]
    unbroken = lab.run(winner, folder)
    assert len(steps_done) == 24
    for key in ("variant", "config", "seed", "steps", "accuracy"):
        assert ended[key] == unbroken[key]
    broken = weights(winner, search.home(folder))["twin"]
    assert all(torch.equal(broken[name], value) for name, value in weights(winner, folder)["twin"].items())


class Killed(Exception):
    pass


def test_a_killed_search_goes_on_and_ends_as_an_unbroken_one(tmp_path, workdir, steps_done):
    folder, made, rungs = own(tmp_path, workdir), jobs(2), [Rung(2, 2), Rung(4, 1), Rung(8, 1)]

    def progress(share, words):
        if "step 3 of" in words:
            raise Killed

    with pytest.raises(Killed):
        searched(folder, made, rungs, progress)
    assert len(steps_done) == 5  # two of each, and the one that was lost
    found = searched(folder, made, rungs)
    assert len(steps_done) == 5 + 6
    assert found == searched(folder, made, rungs) and len(steps_done) == 11
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    assert searched(own(fresh, workdir), made, rungs) == found


def test_a_run_that_went_on_without_being_ranked_begins_anew(tmp_path, workdir, steps_done):
    folder, (job,) = own(tmp_path, workdir), jobs(1)
    search.climb(job, folder, 4)
    search.climb(job, folder, 2)
    assert steps_done == [0, 1, 2, 3, 0, 1]
