"""Tables and JSON as they reach the terminal.

Run: pytest tests/app/test_output.py
"""

import io
import json
import math
import sys

import numpy as np

from app.output import ProgressLine, log, plain, printable, table


def test_plain_values_are_json():
    data = {"a": np.float32(0.5), 3: np.arange(2), "n": math.nan, "i": [math.inf, None, (True, "x")], "s": np.int64(7)}
    assert plain(data) == {"a": 0.5, "3": [0, 1], "n": None, "i": [None, None, [True, "x"]], "s": 7}
    json.dumps(plain(data), allow_nan=False)


def test_a_table_aligns_words_left_and_numbers_right():
    text = table(["name", "n", "last"], [["a", 1, "x"], ["longer", 1234.5, None], ["b\nc", math.nan, "y" * 100]])
    lines = text.splitlines()
    assert lines[0] == "name           n  last"
    assert lines[1] == "a              1  x"
    assert lines[2] == "longer  1.23e+03  -"
    assert lines[3].startswith("b c            -  yyy") and lines[3].endswith("…") and len(lines[3]) < 100
    assert table(["a", "b"], []) == "a  b"


def test_progress_is_silent_unless_somebody_watches(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, every, shown in ((io.StringIO(), None, False), (Terminal(), None, True), (io.StringIO(), 60, True)):
        monkeypatch.setattr(sys, "stderr", stream)
        progress = ProgressLine("scene", every)
        progress.count(3, 3)
        progress.clear()
        assert ("scene 3 of 3" in stream.getvalue()) is shown


def test_nothing_that_a_model_or_a_file_name_says_can_steer_the_terminal(capsys):
    assert printable("a\x1b[2Jb\x9bc\td\n\u3000é\x00") == "a\ufffd[2Jb\ufffdc\td\n\u3000é\ufffd"
    log("There is no file \x1b]0;x\x07\nerror: forged.png.")
    assert capsys.readouterr().err == "There is no file \ufffd]0;x\ufffd error: forged.png.\n"


def test_a_long_run_tells_a_file_now_and_then(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = ProgressLine(every=60)
    for step in range(100):
        progress.fraction(step / 100, f"step {step}")
    assert sys.stderr.getvalue() == "0% step 0\n"
