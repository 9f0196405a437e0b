"""Scenes say the truth: every answer is drawn where it is said to be, seeds repeat, fonts keep apart."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.training import dataset, fonts, pages, scenes, strings
from model.training.canvas import CHARACTERS, SIDE, Canvas


def scene(seed: int, name: str | None = None) -> scenes.Scene:
    return scenes.make_scene(np.random.default_rng(seed), name=name)


@pytest.mark.parametrize("name", list(scenes.SCENES))
def test_fine_answers_are_the_drawn_strings(name):
    for seed in range(12):
        drawn = scene(seed, name)
        texts: dict[int, str] = {}
        for glyph in drawn.glyphs:
            texts[glyph.string] = texts.get(glyph.string, "") + glyph.character
        for question in drawn.questions:
            if question.kind == "fine":
                assert texts[question.string] == question.answer
                assert question.glyph_px in pages.GLYPHS and question.font in fonts.TRAIN
            else:
                assert question.glyph_px is None


@pytest.mark.parametrize("name", list(scenes.SCENES))
def test_characters_are_on_the_paper(name):
    for seed in range(12):
        drawn = scene(seed, name)
        outside = [g for g in drawn.glyphs if not (0 <= g.x < SIDE and 0 <= g.y < SIDE)]
        assert not outside
        assert drawn.image.size[0] == drawn.image.size[1] and drawn.image.size[0] in (SIDE, 2 * SIDE, 3 * SIDE)


def test_counts_and_colours_agree_with_the_things_drawn():
    for seed in range(40):
        drawn = scene(seed, "shapes")
        kinds = [thing.kind for thing in drawn.things]
        for question in drawn.questions:
            words = dict(question.words)
            if question.topic == "count_all":
                assert question.answer == str(len(kinds))
            if question.topic == "count_shape":
                assert question.answer == str(kinds.count(words["s"]))
            if question.topic == "shape_colour":
                assert [t.colour for t in drawn.things if t.kind == words["s"]] == [question.answer]
            if question.topic == "exists":
                there = any(t.kind == words["s"] and t.colour == words["c"] for t in drawn.things)
                assert question.answer == ("yes" if there else "no")


def test_bar_answers_follow_the_heights():
    for seed in range(20):
        drawn = scene(seed, "bar chart")
        heights = {t.colour: t.half_height for t in drawn.things if t.kind == "bar"}
        answers = {q.topic: q for q in drawn.questions}
        assert answers["tallest"].answer == max(heights, key=heights.get)
        assert answers["shortest"].answer == min(heights, key=heights.get)
        words = dict(answers["taller"].words)
        assert answers["taller"].answer == ("yes" if heights[words["c"]] > heights[words["d"]] else "no")


def test_a_glyph_is_where_it_is_said_to_be():
    """Ink lies around each recorded centre and none at the paper's empty edge, also after a turn."""
    for seed in range(6):
        canvas = Canvas(np.random.default_rng(seed), scale=2, background=(245, 245, 245))
        canvas.text(30, 60, "HEN", "DejaVu Sans Bold", 9, "black")
        grey = np.asarray(canvas.finish().convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC), float)
        for glyph in canvas.glyphs:
            x, y = int(glyph.x), int(glyph.y)
            assert grey[y - 3 : y + 4, x - 3 : x + 4].min() < 130
        assert grey[100:, :].min() > 180


def test_written_scenes_repeat_and_hold_the_promised_keys(tmp_path: Path):
    first = scenes.write_scenes(tmp_path / "a", 12, 5)
    second = scenes.write_scenes(tmp_path / "b", 12, 5)
    assert first.read_text() == second.read_text()
    records = [json.loads(line) for line in first.read_text().splitlines()]
    assert len(records) == 12
    for record in records:
        assert {"image", "question", "answer", "kind", "glyph_px", "font"} <= set(record)
        assert (tmp_path / "a" / record["image"]).exists()
        assert (tmp_path / "a" / record["image"]).read_bytes() == (tmp_path / "b" / record["image"]).read_bytes()
    assert {r["kind"] for r in records} == {"fine", "coarse"}
    assert scenes.write_scenes(tmp_path / "c", 12, 6).read_text() != first.read_text()


def test_held_out_fonts_are_never_trained_on(tmp_path: Path):
    lines = scenes.write_scenes(tmp_path, 12, 5, fonts="held-out").read_text().splitlines()
    used = {record["font"] for record in map(json.loads, lines)} - {None}
    assert used and used <= set(fonts.HELD_OUT) and not used & set(fonts.TRAIN)


def test_capitals_have_the_height_that_is_said():
    for name in fonts.TRAIN | fonts.HELD_OUT:
        top, bottom = fonts.face(name, 40.0).font.getbbox("H")[1::2]
        assert abs((bottom - top) - 40) <= 1, name


def test_patch_labels_of_one_character():
    canvas = Canvas(np.random.default_rng(0), background=(250, 250, 250))
    canvas.text(41, 18, "K", "DejaVu Sans", 8, "red")  # centre at about (44.6, 22): column 5, row 2
    labels = pages.patch_labels(canvas.glyphs, canvas.things, SIDE)
    half = "left" if canvas.glyphs[0].x % 8 < 4 else "right"
    assert labels[half][2, 5] == CHARACTERS.index("K") + 1
    assert labels[half + "_index"][2, 5] == 1
    assert sum(int((labels[h] > 0).sum()) for h in ("left", "right")) == 1


def test_a_tile_of_a_sheet_has_the_labels_of_its_place():
    page = pages.dense_page(np.random.default_rng(3))
    _, whole = page.tile(64, 128)
    full = pages.patch_labels(page.glyphs, page.things, 256)
    for head in ("left", "right", "left_index", "ink", "object", "object_colour"):
        assert np.array_equal(whole[head], full[head][16:24, 8:16]), head


def test_an_object_outside_the_tile_labels_nothing():
    """A regression: an object above or left of a tile once labelled it from the other side (negative slice ends)."""
    canvas = Canvas(np.random.default_rng(0), side=256, background=(250, 250, 250))
    canvas.thing("square", "red", 20, 20, 8)
    sheet = pages.Sheet(np.asarray(canvas.finish().resize((256, 256))), canvas.glyphs, canvas.things)
    for left, top in ((40, 0), (0, 40), (48, 48), (128, 128)):
        assert not sheet.tile(left, top)[1]["object"].any()
    assert sheet.tile(0, 0)[1]["object"].sum() > 0


def test_stored_cells_point_at_the_answer():
    batch = dataset.render(20, 11)
    for items, contents in zip(batch.items, batch.contents, strict=True):
        for item in items:
            if item.question.kind != "fine":
                continue
            for place, (character, cell) in enumerate(zip(item.question.answer, item.cells, strict=True)):
                if cell >= 0 and place < pages.LONGEST:
                    at = {int(contents[cell, half * pages.LONGEST + place]) for half in (0, 1)}
                    assert CHARACTERS.index(character) + 1 in at


def test_codes_avoid_look_alikes_and_prices_look_like_prices():
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert not set(strings.code(rng)) & set("O0I1L") - set("L")
        whole, cents = strings.price(rng).split(".")
        assert whole.isdigit() and len(cents) == 2


def test_the_place_of_a_glyph_is_where_its_label_stands():
    """Tile, patch and half agree with the labels of that very tile, unless a later glyph took the same half."""
    scene = scenes.make_scene(np.random.default_rng(4), name="receipt")
    _, high = pages.scene_sheets(scene.image, scene.glyphs, scene.things)
    last = {pages.place_of(glyph, SIDE): glyph for glyph in high.glyphs}
    last.pop(None, None)
    assert len(last) > 20 and len({tile for tile, _, _ in last}) > 3
    for (tile, patch, half), glyph in last.items():
        _, labels = high.tile(tile % 3 * pages.TILE, tile // 3 * pages.TILE)
        assert labels[half].reshape(-1)[patch] == CHARACTERS.index(glyph.character) + 1
    assert pages.place_of(high.glyphs[0].__class__("A", -1.0, 5.0, 0, 0, "red"), SIDE) is None
