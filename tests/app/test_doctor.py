"""The doctor: healthy models pass; each thing that can be wrong with DeepStack fails the check meant for it.

Run: pytest tests/app/test_doctor.py
"""

import json

import pytest
import torch

from app.cli import main
from app.doctor import QUESTION, diagnose, sign, watch
from model.instrument import Pass
from model.loading import load
from model.plan import enters_tower
from model.types import Sampling
from tests import families, tiny

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


@pytest.mark.parametrize("kind", families.ENTRIES)
def test_every_family_passes(kind):
    assert failed(families.engine(kind)) == []


def test_the_model_that_ships_passes_with_all_its_stacks():
    """Its nine stacks come of three by three tiles; a small picture is cut into fewer, and the last ones are zero."""
    checks = {check.name: check for check in diagnose(load("embedded/hires"))}
    assert [name for name, check in checks.items() if not check.ok] == []
    assert checks["injections, prefill only"].figure.startswith("9 of 9 before layers 1, 2, 3, 4, 5, 6, 7, 8, 9 ")


def test_the_command_prints_the_checks_and_exits_0(capsys):
    assert main(["doctor", "--model", str(tiny.folder("qwen")), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is True and len(data["checks"]) >= 10
    assert all(set(check) == {"name", "ok", "figure"} for check in data["checks"])
    figures = {check["name"]: check["figure"] for check in data["checks"]}
    assert figures["taps"] == "vision blocks 0, 1, 2; the config says 0, 1, 2"
    assert figures["injections, prefill only"] == "3 of 3 before layers 1, 2, 3 in the prefill; 0 in 7 later steps"
    assert all(word in figures["memory"] for word in ("held", "needed", "free on cpu"))
    assert "cpu" in figures["device and number format"] and "float32" in figures["device and number format"]
    assert all(library in figures["versions"] for library in ("python 3", "torch 2", "transformers 5"))


def test_compiled_decoding_is_looked_at_as_it_is_used(qwen):
    """Injections are counted in plain steps, which can be watched; the answer that is recomputed is a compiled one."""
    steps = []

    def backend(program, inputs):
        return lambda *given: steps.append(1) or program.forward(*given)

    qwen.decode_by("compiled", backend)
    checks = {check.name: check for check in diagnose(qwen)}
    assert all(check.ok for check in checks.values()) and steps
    assert "0 in 7 later steps" in checks["injections, prefill only"].figure
    assert "compiled decoding: asked for" in checks["device and number format"].figure


def test_a_compiled_step_that_is_wrong_is_found(qwen):
    qwen.decode_by("compiled", lambda program, inputs: lambda *given: [program.forward(*given)[0].roll(1, -1)])
    assert "cached decode equals recompute" in failed(qwen)


def test_a_prompt_long_enough_to_be_taken_up_is_still_seen_in_full():
    engine = tiny.build(tiny.folder("hires"))
    engine.shortest_prefix = 8
    assert failed(engine) == []


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


def test_another_vision_layer_than_the_configs_is_found():
    early = tiny.build(tiny.folder("hires"))
    early.adapter.vision_layer -= 1
    checks = {check.name: check for check in diagnose(early)}
    assert not checks["taps"].ok and checks["taps"].figure == "vision blocks 1; the config says 2"


def test_an_answer_that_ends_at_once_still_shows_decoding():
    engine = tiny.build(tiny.folder("qwen"))
    first = engine.answer(engine.prompt(tiny.ask(sign(), QUESTION)), engine.layout.default, Sampling(1)).tokens[0]
    engine._end = frozenset({first.id})
    checks = {check.name: check for check in diagnose(engine)}
    for name, empty in (
        ("injections, prefill only", " 0 later steps"),
        ("cached decode equals recompute", " 0 tokens"),
    ):
        assert checks[name].ok and empty not in checks[name].figure


def test_a_cache_that_decodes_something_else_is_found(qwen):
    def late(module, args, given):
        if given["past_key_values"] is not None and given["inputs_embeds"].shape[1] == 1:
            given = {**given, "position_ids": given["position_ids"] + 40}
        return args, given

    qwen.adapter.decoder.register_forward_pre_hook(late, with_kwargs=True)
    assert "cached decode equals recompute" in failed(qwen)


def test_attention_rows_of_another_layer_are_found(qwen):
    replay = qwen.replay

    def mixed(prompt, answer, plan, probe=None):
        trace = replay(prompt, answer, plan, probe)
        if trace.attention:
            layers = list(trace.attention)
            trace.attention.update(zip(layers, [trace.attention[layer] for layer in layers[::-1]], strict=True))
        return trace

    qwen.replay = mixed
    assert failed(qwen) == ["attention rows equal eager's"]


def test_too_little_memory_is_said(monkeypatch):
    monkeypatch.setattr("app.doctor.free_memory", lambda device: 10)
    assert failed(tiny.engine("qwen")) == ["memory"]


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


@pytest.mark.parametrize(
    ("layer", "roll", "figure"),
    [
        (None, 0, "4 of 4 before vision layers 2, 3, 4, 5; difference"),
        (3, 0, "3 of 4 before vision layers 2, 4, 5; difference"),
        (3, 1, "4 of 4 before vision layers 2, 3, 4, 5; difference"),
    ],
)
def test_stacks_inside_the_vision_tower_are_looked_at_too(layer, roll, figure, monkeypatch):
    """Left out at one layer, or its rows one place on: the base is still finite and fluent."""
    engine = families.engine("deepstack_v")
    real = Pass.before_layer

    def broken(self, at, hidden):
        if at != layer or not any(enters_tower(entry.source) for entry in self.injections.get(at, ())):
            return real(self, at, hidden)
        moved = [entry._replace(rows=entry.rows.roll(roll, 0)) for entry in self.injections[at]]
        return real(Pass({at: moved} if roll else {}, self.positions), at, hidden)

    monkeypatch.setattr(Pass, "before_layer", broken)
    checks = {check.name: check for check in diagnose(engine)}
    found = checks["stacks inside the vision tower"]
    assert found.ok == (layer is None) and found.figure.startswith(figure)
    assert layer is not None or all(check.ok for check in checks.values())


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
