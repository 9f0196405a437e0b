"""The lab's long texts: facts one after another, and what a run of the group "text" reads and is asked.

A fact is a word and three characters, one token each: 64 facts fill the 256 tokens, and no two of a text have the same
word, so that every question has one answer, anywhere in the text. Texts are drawn anew in each run from their seeds,
which takes seconds. Knows nothing about variants' training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.lab.variants import LONG, PARTS, Variant, entering, found_at
from model.training import dataset, twins
from model.training.canvas import CHARACTERS
from model.training.scenes import Question

FACT = 4  # tokens: the word, then the characters
FACTS = LONG // FACT
VALUES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"  # characters of a value
TRAINING_SEED, VALIDATION_SEED, TEST_SEED = 3000, 910_101, 8101
RECALL = "recall"  # the topic of its questions


@dataclass(frozen=True)
class Recall(Question):
    """The question after one fact. `part`: where in the text it stands, 1 for the first of PARTS."""

    part: int = 0


class Facts(Sequence):
    """The questions of one text, in an order by chance; each is made when it is asked for.

    words `[64]`: numbers of twins.WORDS; values `[64, 3]`: of VALUES; order `[64]`; rows `[256]`: where each token is
    to be looked for, -1 for one that is nowhere.
    """

    def __init__(self, words: np.ndarray, values: np.ndarray, order: np.ndarray, rows: np.ndarray):
        self.words, self.values, self.order, self.rows = words, values, order, rows

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, number: int) -> dataset.Item:
        fact = int(self.order[number])
        word = twins.WORDS[self.words[fact]]
        answer = "".join(VALUES[value] for value in self.values[fact])
        asked = Recall(RECALL, f"what is {word}?", answer, "fine", words=(("k", word),), part=1 + fact * PARTS // FACTS)
        return dataset.Item(asked, tuple(self.rows[FACT * fact + 1 : FACT * (fact + 1)].tolist()))


class Questions(twins.Questions):
    """As of a scene's, but for what is asked: one of the facts, each as likely."""

    def draw(self, items: Sequence[dataset.Item], rng: np.random.Generator):
        item = items[int(rng.integers(len(items)))]
        question = item.question
        return self.turn(question.question, question.answer, item.cells, twins.place_words(question))


@dataclass
class Texts:
    """So many texts: words `[n, 64]`, values `[n, 64, 3]`, the order of their questions `[n, 64]`."""

    words: np.ndarray
    values: np.ndarray
    order: np.ndarray

    def ids(self, questions: twins.Questions) -> torch.Tensor:
        """Their tokens `[n, 256]`."""
        words = np.array(questions.words)[self.words]
        values = np.array([questions.tokens(value)[0] for value in VALUES])[self.values]
        return torch.from_numpy(np.concatenate([words[..., None], values], -1).reshape(len(words), LONG))

    def batch(self, variant: Variant, layers: int) -> dataset.Batch:
        """Contents and places told by the variant's rows. The characters that a row gets at the input, then from each
        stack, are its contents one after another; a word leaves its own empty."""
        rows = found_at(variant, layers).numpy()
        codes = np.array([CHARACTERS.index(value) + 1 for value in VALUES], np.uint8)[self.values]
        tokens = np.concatenate([np.zeros_like(codes[..., :1]), codes], -1).reshape(len(codes), LONG)
        taken = entering(variant, layers).numpy()
        contents = np.zeros((len(codes), taken.shape[1], dataset.CONTENTS), np.uint8)
        contents[..., : len(taken)] = tokens[:, taken].swapaxes(1, 2)
        items = [Facts(*each, rows) for each in zip(self.words, self.values, self.order, strict=True)]
        nothing = np.empty((0,), np.uint8)
        return dataset.Batch(nothing, nothing, contents, items)


def draw(count: int, seed: int) -> Texts:
    """`count` texts of this seed."""
    rng = np.random.default_rng(seed)
    words = rng.permuted(np.tile(np.arange(len(twins.WORDS)), (count, 1)), axis=1)[:, :FACTS]
    values = rng.integers(len(VALUES), size=(count, FACTS, FACT - 1))
    return Texts(words, values, rng.permuted(np.tile(np.arange(FACTS), (count, 1)), axis=1))
