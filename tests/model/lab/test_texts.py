"""Long texts of facts, and the mechanics of the variants that read them: which token lands where, what equals what.

Run: pytest tests/model/lab/test_texts.py
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.lab import texts
from model.lab.text_twin import TextTwin
from model.lab.variants import LONG, SHORT, TEXTS, VARIANTS, entering, found_at, layers_of
from model.training import packed, twins
from model.training.canvas import CHARACTERS
from model.training.tokenizer import make_tokenizer

LAYERS, WIDTH, N = 8, 32, 3
NAMES = [name for name, variant in VARIANTS.items() if variant.merge in TEXTS]
STACKED = [name for name in NAMES if "stack" in name]


@pytest.fixture(scope="module")
def questions():
    return texts.Questions(make_tokenizer())


@pytest.fixture(scope="module")
def drawn():
    return texts.draw(N, 0)


@pytest.fixture(scope="module")
def ids(drawn, questions):
    return drawn.ids(questions)


@pytest.fixture(scope="module")
def made(questions):
    """A twin of a variant; all have the same weights."""

    def make(variant):
        torch.manual_seed(0)
        return TextTwin(variant, len(questions.tokenizer), WIDTH, LAYERS).eval()

    return make


@pytest.fixture(scope="module")
def rows(drawn, questions):
    """Two questions of each text, of its variant with all rows."""
    chosen = drawn.batch(VARIANTS["text-full"], LAYERS).items
    return questions.rows([[*items] for items in chosen], np.random.default_rng(0), per_scene=2)


# ---- texts


def test_a_text_is_facts_of_different_words(drawn, ids, questions):
    """As the tokenizer reads them: a word after a space and three characters, 64 times."""
    assert ids.shape == (N, LONG)
    for words, values, tokens in zip(drawn.words, drawn.values, ids, strict=True):
        assert len({*words}) == texts.FACTS
        said = ["".join(texts.VALUES[v] for v in value) for value in values]
        written = "".join(f" {twins.WORDS[word]}{value}" for word, value in zip(words, said, strict=True))
        assert questions.tokenizer.decode(tokens) == written
        two = questions.tokenizer.convert_ids_to_tokens(tokens[:2].tolist())
        assert two == ["▁" + twins.WORDS[words[0]], said[0][0]]


def test_texts_come_again_from_their_seed_and_differ(drawn):
    again, other = texts.draw(N, 0), texts.draw(N, 1)
    assert (again.values == drawn.values).all() and (again.words == drawn.words).all()
    assert (other.values != drawn.values).any() and (drawn.values[0] != drawn.values[1]).any()
    seeds = {texts.TRAINING_SEED, texts.VALIDATION_SEED, texts.TEST_SEED}
    assert len(seeds) == 3


def test_every_fact_is_asked_once_and_points_at_its_characters(drawn, questions):
    (items, *_) = drawn.batch(VARIANTS["text-full"], LAYERS).items
    assert sorted(items.order.tolist()) == [*range(64)] != items.order.tolist()
    cells = sorted(item.cells for item in items)
    assert cells == [(4 * k + 1, 4 * k + 2, 4 * k + 3) for k in range(64)]
    for item in items:
        fact = item.cells[0] // 4
        assert item.question.question == f"what is {twins.WORDS[drawn.words[0, fact]]}?"
        assert item.question.answer == "".join(texts.VALUES[v] for v in drawn.values[0, fact])
        assert item.question.part == 1 + fact // 8  # eighths of 64 facts
        assert twins.place_words(item.question) == [drawn.words[0, fact]]


# ---- where tokens land


def test_which_token_lands_where():
    """By hand, at row 5 (tokens of the input, then of the stacks before layers 1 to 4)."""
    taken = {name: entering(VARIANTS[name], LAYERS)[:, 5].tolist() for name in NAMES}
    assert taken == {
        "text-full": [5],
        "text-truncated": [192 + 5],
        "text-stack-dilated": [192 + 5, 20, 21, 22, 23],  # the fact number 5, whole
        "text-stack-chunks": [192 + 5, 5, 64 + 5, 128 + 5, 192 + 5],
        "text-stack-dummy": [192 + 5] * 5,
    }
    for name in NAMES:
        layers = [*layers_of(VARIANTS[name], LAYERS)]
        assert layers == ([1, 2, 3, 4] if name in STACKED else [])


@pytest.mark.parametrize("name", ["text-stack-dilated", "text-stack-chunks"])
def test_all_of_the_text_is_stacked_once(name):
    stacked = entering(VARIANTS[name], LAYERS)[1:]
    assert sorted(stacked.flatten().tolist()) == [*range(LONG)] and stacked.shape == (4, SHORT)


def test_a_token_is_looked_for_where_its_stack_puts_it():
    where = {name: found_at(VARIANTS[name], LAYERS)[[23, 130, 200]].tolist() for name in NAMES}
    assert where == {
        "text-full": [23, 130, 200],
        "text-truncated": [-1, -1, 8],
        "text-stack-dilated": [5, 32, 50],
        "text-stack-chunks": [23, 2, 8],
        "text-stack-dummy": [-1, -1, 8],
    }
    two = replace(VARIANTS["text-stack-chunks"], count=2)
    assert found_at(two, LAYERS)[[23, 130, 200]].tolist() == [23, -1, 8]


@pytest.mark.parametrize("name", NAMES)
def test_contents_are_the_characters_of_each_row(drawn, name):
    """Slot 0 what the input holds, the next what each stack adds; 0 for a word."""
    variant = VARIANTS[name]
    batch = drawn.batch(variant, LAYERS)
    taken = entering(variant, LAYERS)
    assert batch.contents.shape[:2] == (N, taken.shape[1])
    for slot, tokens in enumerate(taken):
        for row in (0, 1, 2, 3, 63):
            fact, place = divmod(int(tokens[row]), 4)
            said = texts.VALUES[drawn.values[1, fact, place - 1]] if place else None
            assert batch.contents[1, row, slot] == (CHARACTERS.index(said) + 1 if said else 0)
    assert not batch.contents[..., len(taken) :].any()


@pytest.mark.parametrize("name", NAMES)
def test_rows_hold_the_embeddings_of_their_tokens(made, ids, name):
    twin = made(VARIANTS[name])
    base, stacks = twin.inject(ids.float())  # as training hands them over
    taken = entering(VARIANTS[name], LAYERS)
    embedded = twin.language.embed_tokens(ids)
    assert [*stacks] == [*layers_of(VARIANTS[name], LAYERS)]
    for rows, tokens in zip((base, *stacks.values()), taken, strict=True):
        assert torch.equal(rows, embedded[:, tokens])


# ---- what equals what


@pytest.mark.parametrize("name", STACKED)
def test_stacks_of_zeros_are_truncation(made, ids, rows, name):
    twin, alone = made(VARIANTS[name]), made(VARIANTS["text-truncated"])
    with torch.no_grad():
        base, stacks = twin.inject(ids)
        assert not torch.allclose(twin(ids, rows)[0], alone(ids, rows)[0])
        lead = torch.tensor(twin.lead)
        nothing = {layer: torch.zeros_like(each) for layer, each in stacks.items()}
        found = packed.forward(twin.language, lead, base, nothing, rows, twin.watched, twin.inspected)
        assert torch.equal(twin.model.lm_head(found.hidden), alone(ids, rows)[0])


def test_what_was_cut_away_changes_no_answer_and_what_is_stacked_does(made, ids, rows):
    other = ids.clone()
    other[:, 21] = other[:, 25]  # a character of the fact number 5
    with torch.no_grad():
        said = {name: [made(VARIANTS[name])(each, rows)[0] for each in (ids, other)] for name in NAMES}
    same = {name: torch.equal(*each) for name, each in said.items()}
    assert same == {name: name in ("text-truncated", "text-stack-dummy") for name in NAMES}


def test_a_text_in_full_is_read_as_transformers_does(made, ids):
    """One question after the whole text, token by token, through the plain model."""
    twin = made(VARIANTS["text-full"])
    questions = texts.Questions(make_tokenizer())
    row = questions.turn("what is red?", "A7K", (1, 2, 3))
    with torch.no_grad():
        found = twin(ids[:1], questions.pad([row]))[0]
        tokens = torch.tensor([[*twin.lead, *ids[0].tolist(), *row[0]]])
        wanted = twin.model(tokens).logits[0, -len(row[0]) :][torch.tensor(row[1]) != -100]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_gradients_reach_everything(made, ids, rows):
    twin = made(VARIANTS["text-stack-dilated"])
    logits, result = twin(ids, rows)
    (logits.square().mean() + result.seen.square().mean()).backward()
    assert all(p.grad is not None for name, p in twin.named_parameters() if not name.startswith("heads."))
    assert twin.counted() == sum(p.numel() for p in made(VARIANTS["text-full"]).model.parameters())
