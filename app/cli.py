"""The command line: what can be typed, and the promises that every command keeps.

Results go to stdout and everything else to stderr; `--json` prints exactly one JSON object. A user's mistake is one
line on stderr and exit status 2, Ctrl-C is 130. Nothing heavy is imported before a command is known: what a command
does lies in app/commands.py, app/doctor.py, app/golden.py and app/bench.py. Knows nothing about models.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.limits import add_limits
from app.output import log, plain, printable
from model.errors import UserError, is_out_of_memory

DESCRIPTION = "DeepStack Lens: see, switch and understand how a DeepStack vision-language model uses an image."
MODEL_HELP = "embedded, embedded/NAME, a folder or a hub id such as Qwen/Qwen3-VL-2B-Instruct"
PLAN_HELP = (
    "which stack enters before which layer, as base@0,0@1,1@2*0.5 (tap6@0: an untrained tap); or a preset's name; "
    "default: as trained"
)
INTERRUPTED = 130  # 128 + SIGINT, as shells count


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, like all others."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True)
class Command:
    """One word of the command line."""

    summary: str
    arguments: Callable[[Parser], None]
    run: str  # "module:function", imported when it is run; takes the options, returns an Outcome


def _model(parser: Parser, brief: bool = False) -> None:
    parser.add_argument("--model", "-m", default="embedded", metavar="NAME", help=f"{MODEL_HELP} (default embedded)")
    _hardware(parser, brief)


def _hardware(parser: Parser, brief: bool = False) -> None:
    """Where and how a model runs. brief: a few answers are all that this command asks for."""
    parser.add_argument(
        "--device",
        metavar="D",
        help="cpu, cuda, cuda:1 …, or split over all GPUs (default: a GPU where one works, else the CPU)",
    )
    parser.add_argument(
        "--dtype",
        metavar="T",
        help="float32, bfloat16, float16, or int8 or nf4 with bitsandbytes (default: bfloat16 for large models on a "
        "GPU, else float32)",
    )
    parser.add_argument(
        "--attention", choices=("auto", "sdpa", "flash", "eager"), metavar="A",
        help="sdpa, flash with the package flash-attn, or eager (default: sdpa, which has flash kernels of its own)",
    )  # fmt: skip
    parser.add_argument(
        "--decode", choices=("auto", "plain", "compiled"), metavar="W",
        help="plain or compiled (default: plain)" if brief else
        "plain or compiled (default: compiled on a GPU where the model allows it, else plain)",
    )  # fmt: skip
    parser.set_defaults(brief=brief)


def _json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _sampling(parser: Parser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="longest answer (default 48)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default)")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="least set of this probability (default 1: off)"
    )
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="the N most probable tokens (default 0: off)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the random numbers (default 0)")


def _question(parser: Parser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument(
        "question", metavar="QUESTION", help="what to ask about them; the last word on the line, in quotes"
    )


def _page_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--model", "-m", action="append", default=[], metavar="NAME",
        help=f"{MODEL_HELP}; may be given several times, the first is the one to start with",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default 127.0.0.1: this machine only")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default 7860")
    _hardware(parser)
    add_limits(parser)


def _models_arguments(parser: Parser) -> None:
    _json(parser)


def _ask_arguments(parser: Parser) -> None:
    _question(parser)
    parser.add_argument("--plan", metavar="P", help=PLAN_HELP)
    _model(parser, brief=True)
    _json(parser)
    _sampling(parser)
    add_limits(parser)


def _trace_arguments(parser: Parser) -> None:
    _question(parser)
    parser.add_argument("--plan", metavar="P", help=PLAN_HELP)
    parser.add_argument(
        "--out", metavar="DIR", help="write figures (PNG, SVG), tables (CSV) and trace.json into this folder"
    )
    _model(parser, brief=True)
    _json(parser)
    _sampling(parser)
    add_limits(parser)


def _compare_arguments(parser: Parser) -> None:
    parser.add_argument("inputs", nargs="*", metavar="IMAGE… QUESTION", help="image files and a question, in quotes")
    parser.add_argument(
        "--plan", action="append", default=[], metavar="P", help=f"{PLAN_HELP}; may be given several times"
    )
    parser.add_argument(
        "--model", "-m", action="append", default=[], metavar="NAME", help=f"{MODEL_HELP}; may be given several times"
    )
    parser.add_argument("--truth", metavar="TEXT", help="the right answer: adds error rates and its log-probability")
    parser.add_argument("--scenes", metavar="DIR", help="ask the questions of DIR/answers.jsonl instead of one")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of --scenes")
    _hardware(parser)
    _json(parser)
    _sampling(parser)
    add_limits(parser)


def _eval_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--scenes", required=True, metavar="DIR", help="a folder with answers.jsonl, as `scenes` writes it"
    )
    parser.add_argument("--plan", metavar="P", help=PLAN_HELP)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    _model(parser)
    _json(parser)
    add_limits(parser)


def _sweep_arguments(parser: Parser) -> None:
    from analysis.sweep import AXES

    words = "; ".join(f"{name}: {axis.words}" for name, axis in AXES.items())
    parser.add_argument(
        "--over", action="append", required=True, choices=tuple(AXES), metavar="AXIS",
        help=f"what is changed; may be given several times. {words}",
    )  # fmt: skip
    parser.add_argument(
        "--scenes", required=True, metavar="DIR", help="a folder with answers.jsonl, as `scenes` writes it"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--out", metavar="DIR", help="write curves (PNG, SVG), tables (CSV) and sweep.json there")
    _model(parser)
    _json(parser)
    add_limits(parser)


def _lab_arguments(parser: Parser) -> None:
    parser.add_argument(
        "action",
        choices=("list", "run", "search", "table", "ship"),
        help="the variants, runs of some, a search for where stacks enter, results beside the paper's, or models of "
        "finished runs for Chat and Compare",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="run: variants, or all; ship: variants")
    parser.add_argument(
        "--seeds",
        metavar="S,S…",
        help="run: of weights and order; search: the first for the search, all for comparing its winner with the "
        "paper's rule of thumb; ship: the one to take (default 0)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="run, search, ship: of a run (default: the size's)")
    parser.add_argument(
        "--budget", type=int, metavar="STEPS", help="search: training steps of all its runs together (default: 8 runs')"
    )
    parser.add_argument(
        "--size", metavar="SIZE", help="run, search, ship: small or large (default: large on a GPU, small on the CPU)"
    )
    parser.add_argument(
        "--device",
        metavar="D",
        help="run, search, ship: cpu, cuda (default: a GPU where one works, else the CPU; with --ray cuda)",
    )
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "float32"),
        help="run, search, ship: of what matrices are multiplied in (default: bfloat16 on a GPU and on CPUs that have "
        "instructions for it, else float32, which is another setting of the results)",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run, search: of a Ray cluster (default: Ray on this machine); a search needs a "
        "work folder that its machines share",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        default=None,
        help="run: train anew what is in the results, and replace it there; search: begin anew",
    )
    parser.add_argument("--results", metavar="FILE", help="default: the app's own assets/lab/results.jsonl")
    parser.add_argument("--workdir", metavar="DIR", help="run, search, ship: what a resumed run needs (default runs)")
    parser.add_argument("--metric", metavar="M", help="table: our score (default fine)")
    parser.add_argument("--bench", metavar="B", help="table: the paper's benchmark (default AVG)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="table: write figures (PNG, SVG) and tables (CSV) there; ship: the folder of "
        "the models' folders (default assets/checkpoints)",
    )
    _json(parser)


def _scenes_arguments(parser: Parser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="where the images and answers.jsonl go")
    parser.add_argument("--n", type=int, required=True, metavar="N", help="how many scenes")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed draws the same scenes (default 0)"
    )
    parser.add_argument(
        "--fonts",
        choices=("train", "held-out"),
        default="train",
        help="the fonts of the training, or those kept out of it",
    )
    _json(parser)


def _train_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="the embedded checkpoint to make: hires, hires-single …")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of the language model")
    parser.add_argument("--tower-steps", type=int, metavar="N", help="training steps of the vision tower")
    parser.add_argument("--card", action="store_true", help="train nothing: score what is there and write its card")
    parser.add_argument("--device", metavar="D", help="cpu, cuda … (default: a GPU where one works, else the CPU)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of scenes, weights and order (default 0)")
    parser.add_argument("--out", metavar="DIR", help="where the checkpoint goes (default assets/checkpoints/NAME)")
    parser.add_argument("--workdir", default="runs", metavar="DIR", help="what a resumed run needs (default runs)")
    parser.add_argument("--resume", action="store_true", help="go on from what is in the work folder")
    _json(parser)


def _check_arguments(parser: Parser) -> None:
    _model(parser)
    _json(parser)


def _bench_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--random-weights", metavar="NAME",
        help="instead of a model: the true shape of Qwen3-VL-2B, Qwen3-VL-8B, Granite-4-Vision or DeepStack-L-7B (or "
        "tiny, to try it) with random weights; speeds are real, answers are not",
    )  # fmt: skip
    parser.add_argument(
        "--only", action="append", choices=("answer", "parts", "clients", "images", "plans"), metavar="TABLE",
        help="answer, parts, clients, images or plans: this table alone; may be given several times (default: all)",
    )  # fmt: skip
    _check_arguments(parser)


def _golden_arguments(parser: Parser) -> None:
    parser.add_argument("action", choices=("export", "check"), help="write a record, or compare one with this model")
    parser.add_argument(
        "inputs", nargs="*", metavar="IMAGE… QUESTION | THEIRS",
        help="export: images and a question (default: an example); check: a record, a folder or its .json",
    )  # fmt: skip
    parser.add_argument("--out", default="golden", metavar="DIR", help="export: the folder to write (default golden)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=8, metavar="N", help="export: tokens of the answer (default 8)"
    )
    parser.add_argument(
        "--tolerance", type=float, metavar="X",
        help="check: relative difference to accept (default 1e-3 in float32, 5e-2 in bfloat16, 1e-1 quantised)",
    )  # fmt: skip
    _model(parser, brief=True)
    _json(parser)
    add_limits(parser)


PAGE = Command("the page, in a browser", _page_arguments, "app.commands:page")
COMMANDS = {
    "models": Command(
        "supported families, embedded checkpoints, what each needs", _models_arguments, "app.commands:models"
    ),
    "ask": Command("an answer about one image or several", _ask_arguments, "app.commands:ask"),
    "trace": Command("per-layer numbers of one answer, and figures of them", _trace_arguments, "app.commands:trace"),
    "compare": Command(
        "several plans and models on one question or a whole file", _compare_arguments, "app.commands:compare"
    ),
    "doctor": Command("is DeepStack active and aligned here? exit 1 if not", _check_arguments, "app.doctor:run"),
    "golden": Command("records to check a port by: which stack is wrong, and how", _golden_arguments, "app.golden:run"),
    "bench": Command("speed and memory beside plain transformers", _bench_arguments, "app.bench:run"),
    "scenes": Command("rendered scenes with exact answers", _scenes_arguments, "app.commands:scenes"),
    "eval": Command("exact match and error rate of a model on scenes", _eval_arguments, "app.commands:evaluate"),
    "sweep": Command("many plans on many images: score by start, gain …", _sweep_arguments, "app.sweep:run"),
    "lab": Command(
        "the paper's experiments at small size: list, run, search, table, ship", _lab_arguments, "app.lab:run"
    ),
    "train": Command("makes an embedded checkpoint again from nothing", _train_arguments, "app.commands:train"),
}


def _parser(name: str | None) -> Parser:
    """The parser of a command, or of the page for None."""
    if name is not None:
        command = COMMANDS[name]
        summary = command.summary[0].upper() + command.summary[1:] + "."
        parser = Parser(prog=f"python -m app {name}", description=summary, allow_abbrev=False)
        command.arguments(parser)
        return parser
    words = "\n".join(f"  {word:<8} {command.summary}" for word, command in COMMANDS.items())
    parser = Parser(
        prog="python -m app",
        usage="python -m app [options]\n       python -m app COMMAND …",
        description=f"{DESCRIPTION}\nWithout a command it opens the page in a browser.",
        epilog=f"commands (each has its own --help):\n{words}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    PAGE.arguments(parser)
    return parser


def _parse(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    name = argv[0] if argv and argv[0] in COMMANDS else None
    parser = _parser(name)
    if name is None:
        options, rest = parser.parse_known_args(argv)
        if rest:
            misplaced = next((word for word in rest if word in COMMANDS), None)
            if misplaced:
                raise UserError(f"The command comes first: python -m app {misplaced} …, then its options.")
            what = "option" if rest[0].startswith("-") else "command"
            raise UserError(
                f"There is no {what} {rest[0]}; the commands are {', '.join(COMMANDS)} (see python -m app --help)."
            )
        return PAGE, options
    return COMMANDS[name], parser.parse_intermixed_args(argv[1:])


def _quiet_libraries() -> None:
    """Libraries' progress bars, warnings and telemetry off, before any of them is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    warnings.filterwarnings(
        "ignore", module="PIL"
    )  # damaged EXIF, size: model/images.py says what matters in its own words


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns its exit status."""
    stdout = sys.stdout
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        stdout.flush()
        return code
    except BrokenPipeError:  # the reader has gone (`… | head`); nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        return 0


def _run(argv: list[str]) -> int:
    stdout = sys.stdout
    try:
        command, options = _parse(argv)
        _quiet_libraries()
        module, function = command.run.split(":")
        as_json = getattr(options, "json", False)
        # With --json whatever a library prints goes to stderr: stdout is for the one object.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            outcome = getattr(importlib.import_module(module), function)(options)
        if as_json:
            print(json.dumps(plain(outcome.data), allow_nan=False), file=stdout, flush=True)
        elif outcome.text:
            print(printable(outcome.text), file=stdout, flush=True)
        return outcome.code
    except UserError as error:
        log(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        log("stopped")
        return INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        log("error: Out of memory. Use smaller images or a smaller model, or --dtype bfloat16.")
        return 2
    except SystemExit as end:  # argparse after --help
        return end.code if isinstance(end.code, int) else 0
