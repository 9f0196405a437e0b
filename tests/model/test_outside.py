"""A model seen from outside: what its stacks are made of, found and changed by hooks alone.

The reference is the model itself with another setting. Run: pytest tests/model/test_outside.py
"""

import pytest
import torch

from model.errors import UserError
from model.outside import pixels_seen, retapped, tap_of, tapped_blocks
from tests import tiny


def asked(engine):
    return engine.prompt(tiny.ask(tiny.image(0, (64, 48)), "What does the sign say?"))


@pytest.fixture
def taps(tmp_path):
    return tiny.build(tiny.qwen3_vl_folder(tmp_path, taps=(1, 2)))


@pytest.mark.parametrize("indexes", [(0, 2), (1, 3), (2, 1), (0, 3)])
def test_other_taps_are_the_towers_own_with_another_list(taps, indexes):
    prompt = asked(taps)
    got = retapped(taps, prompt, [("0", indexes[0]), ("1", indexes[1]), ("1", 9), ("0", -1), ("base", 1)])
    assert set(got) == {("0", indexes[0]), ("1", indexes[1])}
    tower = taps.model.model.visual
    # One tap at a time: the tower makes stacks in order of depth, and its merger by the place in the list.
    for stack, block in enumerate(indexes):
        tower.deepstack_visual_indexes = [block if at == stack else -1 for at in range(2)]
        taps.cache.clear()
        pixels = taps.adapter.processor(images=list(prompt.images), return_tensors="pt")
        with torch.no_grad():
            want = taps.model.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"])
        assert torch.equal(got[str(stack), block], want.deepstack_features[0][0])


def test_other_vision_layers_of_a_clip_tower():
    engine = tiny.build(tiny.folder("hires"))
    prompt = asked(engine)
    assert tap_of(engine) == dict.fromkeys(["base", "0", "1", "2", "3"], 2)
    got = retapped(engine, prompt, [(name, block) for name in ("base", "3") for block in (0, 1)])
    for block in (0, 1):
        engine.adapter.vision_layer = block + 1  # hidden state 0 is the embeddings
        engine.cache.clear()
        want = engine.see(prompt).features
        assert all(torch.equal(got[name, block], want[name]) for name in ("base", "3"))


def test_tapped_blocks_are_found_whatever_the_config_says(taps):
    prompt = asked(taps)
    assert tapped_blocks(taps, prompt, ["0", "1"]) == {"0": 1, "1": 2}
    taps.model.model.visual.deepstack_visual_indexes = [0, 3]
    assert tapped_blocks(taps, prompt, ["0", "1"]) == {"0": 0, "1": 3}
    merger = taps.model.model.visual.deepstack_merger_list[0].linear_fc2
    merger.weight.data.zero_()
    assert tapped_blocks(taps, prompt, ["0", "1"]) == {"0": None, "1": 3}


def test_the_tower_runs_on_other_pixels_and_nothing_is_kept(taps):
    prompt, other = asked(taps), taps.prompt(tiny.ask(tiny.image(7, (64, 48)), "What does the sign say?"))
    with pixels_seen(taps) as theirs:
        want = taps.see(other).features
    assert set(theirs[0]) == {"hidden_states", "grid_thw"}
    own = taps.see(prompt).features
    with pixels_seen(taps, theirs) as calls:
        got = taps.see(prompt).features
    assert len(calls) == 1 and not torch.equal(calls[0]["hidden_states"], theirs[0]["hidden_states"])
    assert all(torch.equal(got[name], want[name]) and not torch.equal(got[name], own[name]) for name in want)
    assert torch.equal(taps.see(prompt).features["0"], own["0"])
    with pytest.raises(UserError, match="grid_thw"), pixels_seen(taps, [{"hidden_states": theirs[0]["hidden_states"]}]):
        taps.see(prompt)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in [taps.model.model.visual])
