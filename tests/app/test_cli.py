"""The command line's promises: what goes to stdout and stderr, exit statuses, bad input, each command on tiny models.

Most run in this process through `main(argv)`; the few that need a process of their own say why.
Run: pytest tests/app/test_cli.py
"""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
import xml.etree.ElementTree
from pathlib import Path

import pytest
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from app.cli import COMMANDS, main
from app.output import printable
from model import loading
from model.families import families
from model.types import Sampling
from tests import tiny
from tests.model.test_images import encoded, png_header_only

QUESTION = "What does the sign say?"


@pytest.fixture(autouse=True)
def quiet():
    """As in a fresh process, where app/cli.py says it before the library is imported."""
    disable_progress_bar()


@pytest.fixture
def sign(tmp_path) -> str:
    path = tmp_path / "sign.png"
    tiny.image(0, (40, 32)).save(path)
    return str(path)


@pytest.fixture
def embedded(tmp_path, monkeypatch) -> Path:
    """A folder in the place of assets/checkpoints, with one checkpoint."""
    monkeypatch.setattr(loading, "CHECKPOINTS", tmp_path / "checkpoints")
    tiny.hires_folder(tmp_path / "checkpoints" / "hires")
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def hires() -> str:
    return str(tiny.folder("hires"))


@pytest.fixture(scope="module")
def qwen() -> str:
    return str(tiny.folder("qwen"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("scenes")
    assert main(["scenes", "--out", str(folder), "--n", "4", "--seed", "3"]) == 0
    return str(folder)


@pytest.fixture
def said(capsys):
    """Runs a command line: (exit status, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(argv))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(said):
    """Runs a command line that is a user's mistake, and returns the one line that it gets."""

    def run(*argv: str) -> str:
        code, out, err = said(*argv)
        assert code == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        return err

    return run


@pytest.fixture
def found(said):
    """Runs a command line with --json: the object, after checking that stdout holds nothing else."""

    def run(*argv: str) -> dict:
        code, out, err = said(*argv, "--json")
        assert code == 0, err
        assert out.count("\n") == 1, "exactly one line"
        return json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))

    return run


# ---- words and mistakes


def test_help_names_every_command_and_every_limit_with_its_default(said):
    code, out, err = said("--help")
    assert code == 0 and err == ""
    assert all(f"  {name} " in out for name in COMMANDS)
    for words in (
        "--max-pixels",
        "(default 40M)",
        "(default 32MiB)",
        "--max-images",
        "(default 8)",
        "--max-prompt-tokens",
    ):
        assert words in " ".join(out.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(said, name):
    code, out, _ = said(name, "--help")
    assert code == 0 and out.startswith(f"usage: python -m app {name}")


def test_the_help_text_is_quick_because_nothing_heavy_is_imported():
    # A process of its own: here everything has been imported already.
    code = (
        "import sys; from app.cli import main; main(['--help']); sys.exit(bool({'torch', 'gradio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "argv, words",
    [
        (["frobnicate"], "no command frobnicate"),
        (["--frobnicate"], "no option --frobnicate"),
        (["--model", "x", "ask", "a.png", "what?"], "command comes first"),
        (["ask"], "IMAGE, QUESTION"),
        (["ask", "a.png", "q", "--nothing"], "--nothing"),
        (["ask", "a.png", "q", "--max-pixels", "many"], "--max-pixels"),
        (["ask", "a.png", "q", "--max-images", "0"], "max_images is 0"),
        (["scenes", "--out", "x"], "--n"),
        (["scenes", "--out", "x", "--n", "0"], "--n is 0"),
        (["scenes", "--out", "/dev/null/x", "--n", "1"], "cannot be written"),
        (["--port", "70000"], "--port is 70000"),
        (["--host", "203.0.113.7"], "Cannot listen"),
        (["--model", "nothing at all"], "is no model"),
        (["compare", "a.png"], "an image and a question"),
        (["eval", "--scenes", "nowhere"], "answers.jsonl"),
        (["train", "frobnicate"], "hires"),
        (["train", "hires", "--steps", "0"], "--steps is 0"),
        (["train", "hires", "--card", "--out", "/no/such/folder"], "no folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(refused, embedded, argv, words):
    assert words in refused(*argv)


BAD_IMAGES = {
    "not-an-image.png": b"hello, this is text",
    "truncated.jpg": encoded(Image.effect_noise((64, 64), 90), "JPEG")[:900],
    "empty.png": b"",
    "bomb.png": png_header_only(20_000, 20_000),
    "long.png": encoded(Image.new("L", (3000, 16)), "PNG"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.parametrize("command", ["ask", "trace", "compare"])
def test_bad_images_are_refused_before_a_model_is_loaded(refused, tmp_path, command, name):
    (tmp_path / name).write_bytes(BAD_IMAGES[name])
    assert name in refused(command, str(tmp_path / name), QUESTION, "--model", "/no/such/model")


ODD_IMAGES = {
    "one-pixel.png": (encoded(Image.new("RGB", (1, 1), "red"), "PNG"), "enlarged 16 times"),
    "cmyk.jpg": (encoded(Image.new("CMYK", (32, 32), (9, 9, 9, 9)), "JPEG"), "CMYK converted"),
    "16-bit.png": (encoded(Image.new("I;16", (32, 32), 40_000), "PNG"), "16 bits"),
    "palette.png": (encoded(Image.new("P", (32, 32), 0), "PNG", transparency=0), "on white"),
    "animated.gif": (
        encoded(Image.new("L", (32, 32)), "GIF", save_all=True, append_images=[Image.new("L", (32, 32), 99)]),
        "first frame",
    ),
}


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_odd_images_are_converted_used_and_noted(found, tmp_path, hires, name):
    data, note = ODD_IMAGES[name]
    (tmp_path / name).write_bytes(data)
    answer = found("ask", str(tmp_path / name), QUESTION, "--model", hires, "--max-new-tokens", "2")
    assert len(answer["notes"]) == 1 and note in answer["notes"][0] and name in answer["notes"][0]


def test_bad_questions_plans_models_and_settings(refused, sign, hires):
    ask = ["ask", sign]
    assert "question is empty" in refused(*ask, "  ", "--model", hires)
    assert "10,000,000 characters" in refused(*ask, "x" * 10_000_000, "--model", hires)
    assert "layers are 0 to 5" in refused(*ask, QUESTION, "--model", hires, "--plan", "base@0,0@99")
    assert "base, 0, 1, 2, 3" in refused(*ask, QUESTION, "--model", hires, "--plan", "7@1")
    assert "not an injection" in refused(*ask, QUESTION, "--model", hires, "--plan", "nonsense")
    assert "not a gain" in refused(*ask, QUESTION, "--model", hires, "--plan", "base@0*x")
    assert "no folder" in refused(*ask, QUESTION, "--model", "./nowhere")
    assert "cannot be reached" in refused(*ask, QUESTION, "--model", "nobody/nothing")
    assert "temperature" in refused(*ask, QUESTION, "--model", hires, "--temperature", "-1")
    assert "--max-answer-tokens" in refused(*ask, QUESTION, "--model", hires, "--max-new-tokens", "5000")
    assert "compiled" in refused(*ask, QUESTION, "--model", hires, "--decode", "fast")
    assert "flash-attn" in refused(*ask, QUESTION, "--model", hires, "--attention", "flash")
    assert "float32" in refused(*ask, QUESTION, "--model", hires, "--dtype", "int3")
    assert "cpu" in refused(*ask, QUESTION, "--model", hires, "--device", "abacus")
    assert "max_prompt_tokens" in refused(*ask, QUESTION, "--model", hires, "--max-prompt-tokens", "5")


def test_too_many_images_are_refused(refused, sign, hires):
    assert "--max-images" in refused("ask", sign, sign, QUESTION, "--max-images", "1", "--model", hires)


def test_a_port_that_is_taken_is_said(refused, embedded):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another --port" in refused("--port", str(taken.getsockname()[1]))


# ---- ask


def test_ask_prints_the_answer_alone_on_stdout(said, sign, hires):
    code, out, err = said("ask", sign, QUESTION, "--model", hires, "--max-new-tokens", "4")
    engine = tiny.engine("hires")
    prompt = engine.prompt(tiny.ask(tiny.image(0, (40, 32)), QUESTION))
    answer = engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=4))
    assert code == 0 and out == printable(answer.text) + "\n"
    assert "no CUDA GPU" in err or "cuda" in err, "the reason for the device is told"


def test_ask_json_has_the_promised_keys(found, sign, hires):
    data = found("ask", sign, sign, QUESTION, "--model", hires, "--max-new-tokens", "3")
    assert {"model", "plan", "answer", "tokens", "seconds", "device"} <= set(data)
    assert data["model"] == hires and data["plan"] == "base@0,0@1,1@2,2@3,3@4" and data["device"] == "cpu"
    assert "".join(token["text"] for token in data["tokens"]) == data["answer"]
    assert all(token["logprob"] <= 0 for token in data["tokens"]) and data["visual_tokens"] == 32


def test_plans_change_answers_and_presets_have_names(found, sign, hires):
    ask = ["ask", sign, QUESTION, "--model", hires, "--max-new-tokens", "6"]
    plain = found(*ask)
    single = found(*ask, "--plan", "single injection")
    assert single["plan"] == "base@0" and single["answer"] != plain["answer"]
    assert found(*ask, "--plan", " base@0 ")["answer"] == single["answer"]
    assert found(*ask, "--plan", "default")["answer"] == plain["answer"]
    assert found(*ask, "--plan", "none")["plan"] == "none"


def test_a_seed_repeats_a_sampled_answer(found, sign, hires):
    ask = ["ask", sign, QUESTION, "--model", hires, "--max-new-tokens", "8", "--temperature", "2", "--seed"]
    assert found(*ask, "1")["answer"] == found(*ask, "1")["answer"] != found(*ask, "2")["answer"]


def test_options_may_stand_between_the_words(found, sign, hires):
    data = found("ask", "--model", hires, sign, "--max-new-tokens", "2", QUESTION, "--plan", "base@0")
    assert data["plan"] == "base@0" and data["visual_tokens"] == 16


# ---- trace


def test_trace_tells_every_layer(found, said, sign, qwen):
    words = ["trace", sign, QUESTION, "--model", qwen, "--max-new-tokens", "3"]
    data = found(*words)
    assert [row["layer"] for row in data["layers"]] == list(range(6))
    assert {row["layer"]: [i["stack"] for i in row["injected"]] for row in data["layers"][:5]} == {
        0: ["base"], 1: ["0"], 2: ["1"], 3: ["2"], 4: [],
    }  # fmt: skip
    assert data["layers"][0]["ratio"] is None and data["layers"][1]["ratio"] > 0, (
        "nothing to compare with before layer 0"
    )
    effect = {row["layer"]: row["effect"] for row in data["layers"]}
    assert effect[1]["0"] > 0 and effect[0]["0"] == 0, "a stack moves nothing before it enters"
    assert 0 < data["layers"][2]["attention_to_image"] < 1
    code, out, _ = said(*words)
    assert code == 0 and out.startswith(data["answer"]) and "effect of base" in out


def test_trace_writes_figures_tables_and_json(said, sign, qwen, tmp_path):
    out = tmp_path / "new" / "folder"
    code, text, _ = said("trace", sign, QUESTION, "--model", qwen, "--max-new-tokens", "3", "--out", str(out))
    assert code == 0 and str(out) in text
    names = {path.name for path in out.iterdir()}
    for name in ("norms", "ratio", "effect", "attention", "image0-injected"):
        assert {f"{name}.png", f"{name}.svg"} <= names
        with Image.open(out / f"{name}.png") as figure:
            assert min(figure.size) > 100 and len(set(figure.convert("L").resize((64, 64)).tobytes())) > 5
        xml.etree.ElementTree.parse(out / f"{name}.svg")
    data = json.loads((out / "trace.json").read_text())
    rows = list(csv.DictReader((out / "norms.csv").read_text().splitlines()))
    assert len(rows) == 6 and float(rows[1]["residual_rms_image"]) == data["layers"][1]["residual_rms_image"]
    assert f"{len(names)} files" in text


def test_trace_out_that_cannot_be_written(said, sign, qwen):
    code, out, err = said("trace", sign, QUESTION, "--model", qwen, "--max-new-tokens", "1", "--out", "/dev/null/x")
    assert code == 2 and out == "" and err.splitlines()[-1].startswith("error: ") and "cannot be written" in err


# ---- compare


def test_compare_crosses_models_and_plans(found, said, sign, hires, qwen):
    words = ["compare", sign, QUESTION, "--model", hires, "--model", qwen, "--plan", "default", "--plan", "base@0"]
    words += ["--truth", "K7", "--max-new-tokens", "5"]
    data = found(*words)
    assert [(row["model"], row["badge"]) for row in data["columns"]] == [
        (hires, "trained"), (hires, "ablated"), (qwen, "trained"), (qwen, "ablated"),
    ]  # fmt: skip
    for row in data["columns"]:
        assert row["logprob_truth"] < 0 and row["cer"] > 0 and row["exact"] is False
    assert len(data["divergence"]) == 3
    for part in data["divergence"]:
        assert part["columns"][0] == f"{hires} base@0,0@1,1@2,2@3,3@4"
        assert part["at"] is None or all(len(side["top"]) == 5 for side in part["sides"])
    code, out, _ = said(*words)
    assert code == 0 and out.splitlines()[0].split() == [
        "model",
        "plan",
        "answer",
        "exact",
        "CER",
        "log",
        "p(truth)",
        "seconds",
    ]
    assert "parts from" in out


def test_compare_without_models_takes_the_embedded_twins_and_the_ablated_one(found, sign, embedded):
    tiny.hires_folder(embedded / "hires-single", "none")
    tiny.qwen3_vl_folder(embedded / "taps")
    data = found("compare", sign, QUESTION, "--max-new-tokens", "2")
    assert [(row["model"], row["plan"], row["badge"]) for row in data["columns"]] == [
        ("embedded/hires", "base@0,0@1,1@2,2@3,3@4", "trained"),
        ("embedded/hires", "base@0", "ablated"),
        ("embedded/hires-single", "base@0", "trained"),
    ]


def test_compare_on_scenes(found, said, hires, scenes):
    words = ["compare", "--scenes", scenes, "--limit", "2", "--model", hires, "--plan", "default", "--plan", "none"]
    data = found(*words, "--max-new-tokens", "4")
    assert [column["n"] for column in data["columns"]] == [2, 2]
    assert len(data["misread"]) == 2 and all(len(question["said"]) == 2 for question in data["misread"])
    code, out, _ = said(*words, "--max-new-tokens", "4")
    assert code == 0 and "some column got wrong" in out


def test_sweep_scores_every_plan_of_its_axes(found, said, hires, scenes, tmp_path):
    words = ["sweep", "--scenes", scenes, "--limit", "2", "--model", hires]
    data = found(*words, "--over", "start", "--over", "count", "--out", str(tmp_path / "s"))
    start, count = data["sweeps"]
    assert [point["value"] for point in start["points"]] == [0, 1, 2] and len(count["points"]) == 5
    assert [point["state"] for point in start["points"]] == ["ablated", "trained", "ablated"]
    assert start["points"][1]["plan"] == count["points"][4]["plan"] and start["points"][1]["n"] == 2
    assert start["points"][1]["by_kind"] == count["points"][4]["by_kind"], "one plan, asked once"
    files = {f"{axis}.{end}" for axis in ("start", "count") for end in ("csv", "png", "svg")}
    assert {path.name for path in (tmp_path / "s").iterdir()} == {*files, "sweep.json"}
    code, out, _ = said(*words, "--over", "alone")
    assert code == 0 and "each stack alone" in out and "ablated" in out and "what the trained weights bear" in out


# ---- scenes and eval


def test_scenes_are_the_same_for_the_same_seed(found, scenes, tmp_path):
    data = found("scenes", "--out", str(tmp_path / "again"), "--n", "4", "--seed", "3")
    assert (data["n"], data["seed"], data["fonts"]) == (4, 3, "train")
    lines = Path(data["answers"]).read_text()
    assert lines == (Path(scenes) / "answers.jsonl").read_text()
    for line in map(json.loads, lines.splitlines()):
        assert {"image", "question", "answer", "kind", "glyph_px", "font"} <= set(line)
        same = [Path(folder) / line["image"] for folder in (scenes, tmp_path / "again")]
        assert same[0].read_bytes() == same[1].read_bytes()


def test_eval_scores_by_kind_and_glyph_height(found, said, hires, scenes):
    data = found("eval", "--model", hires, "--scenes", scenes)
    assert data["n"] == 4 and set(data["by_kind"]) == {"fine", "coarse"}
    for scores in (*data["by_kind"].values(), *data["by_glyph_px"].values()):
        assert set(scores) == {"n", "exact_match", "cer"}
    assert sum(scores["n"] for scores in data["by_kind"].values()) == 4
    code, out, _ = said("eval", "--model", hires, "--scenes", scenes, "--limit", "1", "--plan", "base@0")
    assert code == 0 and "plan base@0" in out and "exact match" in out


@pytest.mark.parametrize(
    "line, words",
    [
        ("not json", "Line 1 of"),
        ("[1, 2]", "not a JSON object"),
        ('{"image": "x.png"}', "no question, answer"),
        ('{"image": "x.png", "question": "q", "answer": "a", "kind": "fine", "glyph_px": 7}', "no file"),
        ("", "empty"),
    ],
)
def test_damaged_scene_folders_are_one_line(refused, hires, tmp_path, line, words):
    (tmp_path / "answers.jsonl").write_text(line + "\n")
    assert words in refused("eval", "--model", hires, "--scenes", str(tmp_path))


# ---- models


def test_models_lists_families_released_and_embedded_checkpoints(found, said, embedded):
    data = found("models")
    titles = [family["family"] for family in data["families"]]
    assert titles == [family.title for family in families()] and {"Qwen3-VL", "DeepStack-L", "LLaVA"} <= set(titles)
    rows = {row["name"]: row for row in data["models"]}
    assert rows["embedded/hires"]["here"] and len(rows["embedded/hires"]["stacks"]) == 4
    engine = tiny.engine("hires")
    assert rows["embedded/hires"]["parameters"] == sum(p.numel() for p in engine.model.parameters())
    small = rows["Qwen/Qwen3-VL-2B-Instruct"]
    assert [stack["tap"] for stack in small["stacks"]] == [5, 11, 17] and small["parameters"] == 2_127_532_032
    assert small["default_plan"] == "base@0,0@1,1@2,2@3" and small["bytes_bfloat16"] * 2 == small["bytes_float32"]
    code, out, _ = said("models")
    assert code == 0 and "embedded/hires" in out and "model_type qwen3_vl" in out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if " * " in line}
    assert lines["Qwen/Qwen3-VL-235B-A22B-Instruct"][-6:] == ["~235", "B", "~470.0", "GB", "~940.0", "GB"]
    assert lines["nvidia/Cosmos3-Nano"][-7:] == ["-"] * 7
    assert lines["Qwen/Qwen2-VL-7B-Instruct"][-10:-6] == ["none", "base@0", "-", "-"]


# ---- the process


def interruptible():
    """Ctrl-C reaches the child even where these tests run in the background, which shells start with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_stops_with_130_and_no_traceback(sign, hires):
    # A process of its own: the signal is to reach a main thread that is answering.
    argv = [sys.executable, "-m", "app", "ask", sign, QUESTION, "--model", hires, "--max-new-tokens", "400"]
    argv += ["--temperature", "5"]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=interruptible,
    )  # fmt: skip
    assert process.stdout.read(1), process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.decode().splitlines()[-1] == "stopped" and b"Traceback" not in err


def test_the_page_says_where_it_is_and_why_the_model_runs_there_and_ctrl_c_ends_it(hires):
    # A process of its own: a server, and a signal.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "app", "--port", str(port), "--model", hires]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    )
    lines = []
    while not all(any(words in line for line in lines) for words in (f"http://127.0.0.1:{port}", f"{hires}: ")):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    assert any("float32" in line for line in lines)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as page:
        assert page.status == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "") and err.splitlines()[-1] == "stopped" and "Traceback" not in err


@pytest.mark.parametrize("argv", [["--help"], ["scenes", "--out", "{}", "--n", "1", "--json"]])
def test_a_reader_that_goes_away_is_no_error(tmp_path, argv):
    # A process of its own: its stdout is a pipe that nobody reads.
    argv = [sys.executable, "-m", "app", *(word.format(tmp_path) for word in argv)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 0 and "Traceback" not in err and "BrokenPipe" not in err


def test_json_stays_pure_whatever_libraries_print(sign, hires, monkeypatch, found):
    real = loading.check_files

    def noisy(*arguments):
        print("a library says hello")
        return real(*arguments)

    monkeypatch.setattr(loading, "check_files", noisy)
    assert found("ask", sign, QUESTION, "--model", hires, "--max-new-tokens", "1")["device"] == "cpu"
