"""The doctor: healthy models pass; each thing that can be wrong with DeepStack fails the check meant for it.

Run: pytest tests/app/test_doctor.py
"""

import json

import pytest
import torch

from app.cli import main
from app.doctor import diagnose, sign, watch
from model.loading import load
from tests import tiny

KINDS = ("qwen", "hires", "single", "concat")


def failed(engine) -> list[str]:
    return [check.name for check in diagnose(engine) if not check.ok]


@pytest.mark.parametrize("kind", KINDS)
def test_healthy_models_pass_and_nothing_is_left_behind(kind):
    engine = tiny.engine(kind)
    layers = engine.adapter.decoder.layers
    before = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in layers]
    assert failed(engine) == []
    assert [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in layers] == before
    assert engine.adapter.decoder.config._attn_implementation == "deepstack_lens"


def test_the_command_prints_the_checks_and_exits_0(capsys):
    assert main(["doctor", "--model", str(tiny.folder("qwen")), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is True and len(data["checks"]) >= 10
    assert all(set(check) == {"name", "ok", "figure"} for check in data["checks"])
    figures = {check["name"]: check["figure"] for check in data["checks"]}
    assert figures["taps"] == "vision blocks 0, 1, 2; the config says 0, 1, 2"
    assert figures["injections, prefill only"] == "before layers 1, 2, 3 in the prefill; 0 in 7 later steps"


def test_bfloat16_is_judged_by_its_own_precision():
    assert failed(load(str(tiny.folder("qwen")), dtype="bfloat16")) == []


# ---- broken on purpose; each engine is built anew


@pytest.fixture
def qwen():
    return tiny.build(tiny.folder("qwen"))


def test_a_stack_of_zeros_is_found(qwen):
    merger = qwen.model.model.visual.deepstack_merger_list[1].linear_fc2
    merger.weight.data.zero_()
    merger.bias.data.zero_()
    names = failed(qwen)
    assert "stacks finite and not zero" in names and "switching a stack off changes the answer's logits" in names


def test_a_stack_that_is_not_a_number_is_found(qwen):
    qwen.model.model.visual.deepstack_merger_list[1].linear_fc2.bias.data[3] = torch.nan
    assert "stacks finite and not zero" in failed(qwen)


def test_taps_one_block_early_are_found(tmp_path):
    # A port's mistake that stays fluent and nearly right: the tower taps 0, 1, 2 although 1, 2, 3 are listed.
    late = tiny.build(tiny.qwen3_vl_folder(tmp_path, taps=(1, 2, 3)))
    late.model.model.visual.deepstack_visual_indexes = [0, 1, 2]
    checks = {check.name: check for check in diagnose(late)}
    assert not checks["taps"].ok and checks["taps"].figure == "vision blocks 0, 1, 2; the config says 1, 2, 3"


def test_injections_that_do_not_happen_are_found(qwen):
    for handle in qwen.hooks:
        handle.remove()
    names = failed(qwen)
    assert "injections, prefill only" in names and "rows where the plan says" in names


def test_rows_that_are_shifted_by_one_are_found(qwen):
    real = qwen._image_positions
    qwen._image_positions = lambda prompt: real(prompt) + 1
    names = failed(qwen)
    assert "rows where the plan says" in names and "parity with plain transformers" in names


def test_something_injected_at_every_step_is_found(qwen):
    qwen.adapter.decoder.layers[2].register_forward_pre_hook(lambda module, args: (args[0] + 0.01, *args[1:]))
    assert "injections, prefill only" in failed(qwen)


def test_exit_1_where_a_check_fails(capsys, tmp_path):
    tiny.qwen3_vl_folder(tmp_path, taps=(0, 1, 9))
    assert main(["doctor", "--model", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert (
        "FAILED  the config's stacks" in out
        and "taps vision block 9" in out
        and out.endswith("1 of 12 checks failed\n")
    )


def test_watching_sees_layers_with_what_was_injected():
    engine = tiny.engine("qwen")
    prompt = engine.prompt(tiny.ask(sign(), "What does the sign say?"))
    with watch(engine) as seen:
        engine.logits(prompt, engine.layout.default)
    assert len(seen.inputs) == 1 and sorted(seen.inputs[0]) == list(range(5))
    assert seen.inputs[0][1].shape == (prompt.input_ids.shape[1], 64)
