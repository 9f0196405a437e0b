"""The example pictures: what is in the folder is what the generator draws, and every answer is exact."""

import json

import numpy as np
import pytest
from PIL import Image

from assets.examples.make import EXAMPLES, HERE, draw
from model.training.scenes import SCENES

RECORDS = json.loads((HERE / "examples.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("example", "record"), list(zip(EXAMPLES, RECORDS, strict=True)), ids=[e.stem for e in EXAMPLES]
)
def test_drawing_again_gives_the_same(example, record) -> None:
    image, drawn = draw(example)
    assert drawn == record, "the generator has changed: run `make examples` and look at the pictures"
    with Image.open(HERE / record["file"]) as kept:
        assert kept.mode == "RGB" and kept.size == image.size
        # another build of the JPEG or font library may round differently: 0 to 255, on average
        assert np.abs(np.asarray(kept, float) - np.asarray(image, float)).mean() < 1


def test_every_kind_of_scene_is_shown_once() -> None:
    assert sorted(example.scene for example in EXAMPLES) == sorted([*SCENES, "lab", "lab"])
    assert {record["kind"] for record in RECORDS} == {"fine", "coarse"}
    assert {example.fonts for example in EXAMPLES} == {"train", "held-out"}


def test_files_and_records_belong_together() -> None:
    assert sorted(record["file"] for record in RECORDS) == sorted(path.name for path in HERE.glob("*.png"))
    for record in RECORDS:
        assert set(record) == {"file", "scene", "question", "answer", "caption", "kind"}
        assert all(isinstance(value, str) and value for value in record.values())
