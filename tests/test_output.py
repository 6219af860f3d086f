"""What a person sees: on a terminal, in a pipe, without colour, in ASCII, in 40 columns; and what --json holds."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from helpers import environment, evaluate, run, tiny

ITEMS = ("TT-01", "TT-02", "TT-03", "TT-04", "TT-05", "TT-06")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def on_terminal(*command: str | Path, columns: int = 100, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a script on a pseudo-terminal of its own. Returns (exit status, everything it wrote)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(**({"TERM": "xterm-256color"} | (env or {}))),
        start_new_session=True,
    )
    os.close(theirs)
    wrote = bytearray()
    while True:
        try:
            some = os.read(ours, 65536)
        except OSError:  # Linux says EIO when the other side is closed
            break
        if not some:
            break
        wrote += some
    os.close(ours)
    return process.wait(30), wrote.decode(errors="replace")


def settled(text: str) -> list[str]:
    """The lines that stay on the screen, without colours. The live lines are erased by the terminal."""
    return [ESCAPE.sub("", line).split("\r")[-1] for line in text.replace("\r\n", "\n").split("\n")]


def test_a_pipe_gets_plain_text_that_tells_everything(tmp_path: Path) -> None:
    done = run(tiny(tmp_path), *ITEMS)
    assert done.returncode == 1
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    for words in (
        "Does every way to end show?",
        "embedded server 127.0.0.1:",
        "TT-01  Recommended  \u2605\u2605\u2605\u2605\u2605",
        "recommended, GA, fail-closed: everything held, no limit seen",
        "\u2713 works   a workflow in a worker process greets",
        "result Hello, you; took 0.25 s",
        "TT-02  Of every kind  \u2605\u2605\u2605\u2606\u2606",
        "\u2717 holds   it does not hold",
        "(not run; it would have been needed for 4 stars)",
        "\u25b2 limit   a limit is there (caps at 4)",
        "another is gone (not seen here)",
        "somebody says so",
        "inconclusive: ValueError: thrown on purpose <- KeyError: 'the cause' (line ",
        "inconclusive: no end within ",
        "not run: this needs the moon",
        "inconclusive: the control failed, so nothing is proven",
        "2 judged, mean 4.0, 3 inconclusive, 1 not run",
        "TT-01 passes",
    ):
        assert words in done.stdout
    assert all(len(line) <= 100 and line == line.rstrip() for line in done.stdout.splitlines())


def test_a_terminal_gets_live_lines_and_colour(tmp_path: Path) -> None:
    code, text = on_terminal(tiny(tmp_path), "TT-01", "TT-04")
    assert code == 1
    assert "\x1b[1m" in text
    assert re.search(r"TT-04 +\d\.\d s  Hangs  it works", ESCAPE.sub("", text)), "a live line with the latest claim"
    kept = settled(text)
    assert sum("TT-01  Recommended" in line for line in kept) == 1


@pytest.mark.parametrize("columns", [40, 60, 132])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, columns: int) -> None:
    code, text = on_terminal(tiny(tmp_path), *ITEMS, columns=columns)
    assert code == 1
    lines = [ESCAPE.sub("", line) for line in re.split(r"[\r\n]+", text)]
    assert max(map(len, lines)) <= columns
    assert "thrown on purpose" in " ".join(" ".join(lines).split())


def test_no_color_is_obeyed(tmp_path: Path) -> None:
    _, text = on_terminal(tiny(tmp_path), "TT-02", env={"NO_COLOR": "1"})
    assert not re.search(r"\x1b\[[0-9;]*3[0-9][;m]", text), "no foreground colour"
    assert "\u2605\u2605\u2605\u2606\u2606" in text


@pytest.mark.parametrize("ascii_only", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"LANG": "POSIX"}])
def test_an_ascii_only_terminal_can_read_it(tmp_path: Path, ascii_only: dict[str, str]) -> None:
    done = run(tiny(tmp_path), "TT-02", env=ascii_only)
    ours = done.stdout.replace("\u2192", "?").replace("\u00fc", "?")  # the item's own text
    assert ours.isascii()
    for words in ("TT-02  Of every kind  ***..", "ok works", "NO holds", "!  limit", "-- cited"):
        assert words in done.stdout


def test_a_dumb_terminal_gets_no_live_lines(tmp_path: Path) -> None:
    _, text = on_terminal(tiny(tmp_path), "TT-02", env={"TERM": "dumb"})
    assert "\x1b" not in text
    assert "TT-02  Of every kind" in text


def test_json_holds_the_verdicts_and_what_they_rest_on(tmp_path: Path) -> None:
    verdicts = evaluate(tiny(tmp_path), tmp_path, *ITEMS)
    assert verdicts.code == 1
    assert verdicts.record["category"] == "TT"
    assert verdicts.record["environment"].keys() >= {"python", "sdk", "server", "os", "cpus", "date"}
    outcomes = {item: (one["outcome"], one["stars"]) for item, one in verdicts.items.items()}
    assert outcomes == {
        "TT-01": ("judged", 5),
        "TT-02": ("judged", 3),
        "TT-03": ("inconclusive", None),
        "TT-04": ("inconclusive", None),
        "TT-05": ("not_run", None),
        "TT-06": ("inconclusive", None),
    }
    first = verdicts.items["TT-01"]
    assert (first["stage"], first["fail_closed"]) == ("GA", True)
    assert first["evidence"][0] == {
        "kind": "works",
        "claim": "a workflow in a worker process greets",
        "held": True,
        "measured": "result Hello, you; took 0.25 s",
        "facts": [
            {"name": "result", "measured": "Hello, you", "expected": "Hello, you", "held": True},
            {
                "name": "took",
                "measured": {"median": 0.25, "low": 0.25, "high": 0.25, "times": 1, "unit": "s"},
                "expected": None,
                "held": True,
            },
        ],
    }
    not_run = [one for one in verdicts.items["TT-02"]["evidence"] if one["held"] is None]
    assert [one["kind"] for one in not_run] == ["holds", "cited"]
    assert verdicts.items["TT-05"]["reason"] == "this needs the moon"


@pytest.mark.parametrize(
    ("items", "code"),
    [(["TT-01"], 0), (["tt-01"], 0), (["TT-02"], 0), (["TT-05"], 0), (["TT-03"], 1), (["TT-01", "TT-06"], 1)],
)
def test_exit_status(tmp_path: Path, items: list[str], code: int) -> None:
    verdicts = evaluate(tiny(tmp_path), tmp_path, *items)
    assert verdicts.code == code
    assert list(verdicts.items) == [item.upper() for item in items]


def test_the_log_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    done = run(tiny(tmp_path), "TT-03", "--log", str(tmp_path / "log.txt"))
    assert done.returncode == 1
    assert "ValueError: thrown on purpose" in (tmp_path / "log.txt").read_text()


def test_help_names_the_options() -> None:
    done = run("01_ex_execution_semantics.py", "--help")
    assert done.returncode == 0
    for option in ("--json", "--keep-open", "--port", "--seed", "--log"):
        assert option in done.stdout


def test_the_seed_is_printed_and_repeats(tmp_path: Path) -> None:
    verdicts = evaluate(tiny(tmp_path), tmp_path, "TT-02", "--seed", "42")
    assert "seed 42" in verdicts.out
    assert json.loads((tmp_path / "verdicts.json").read_text())["environment"]["seed"] == 42
