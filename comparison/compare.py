# /// script
# requires-python = ">=3.11"
# dependencies = ["psutil>=7.0"]
# ///
"""All systems under the same probes, on the same machine, one after the other: one command, one table.

`uv run comparison/compare.py` runs every `on_*.py` of this folder in its own environment, prints the
table, and writes it to results/comparison.json. What one system measures, its own script measures too.
Restate's server is prepared once: `npm install --prefix .restate @restatedev/restate-server`.

Exit status: 0 all that ran was seen, 1 a probe was inconclusive or a script failed, 2 the command is
wrong, 130 Ctrl-C.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import probes

HERE = Path(__file__).resolve().parent
RECORD = HERE.parent / "results" / "comparison.json"
# The order of the table; the last three are combinations.
SYSTEMS = ("temporal", "langgraph", "crewai", "dbos", "restate", "temporal_langgraph", "temporal_crewai")
TITLES = {
    "temporal": "Temporal",
    "langgraph": "LangGraph",
    "crewai": "CrewAI",
    "dbos": "DBOS",
    "restate": "Restate",
    "temporal_langgraph": "LangGraph with Temporal",
    "temporal_crewai": "CrewAI with Temporal",
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Put the same probes to all systems and print the table.")
    parser.add_argument(
        "--probe", type=int, nargs="+", choices=list(probes.PROBES), metavar="N", help="only these (1-10)"
    )
    parser.add_argument(
        "--system", nargs="+", choices=SYSTEMS, metavar="NAME", help=f"only these: {', '.join(SYSTEMS)}"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="where to write (default: results/comparison.json for a whole run)"
    )
    parser.add_argument(
        "--show", metavar="FILE", help="run nothing: print the table of a record, rated by today's rule"
    )
    parser.add_argument("--seed", type=int, default=7, help="repeat the random kills of probe 9 (default: 7)")
    options = parser.parse_args(arguments)
    if options.show:
        try:
            options.show = json.loads(Path(options.show).read_text(encoding="utf-8"))
            options.show["systems"]
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--show needs the record of a run ({type(error).__name__}: {error})")
    elif options.json is None and not options.probe and not options.system:
        RECORD.parent.mkdir(exist_ok=True)
        options.json = str(RECORD)
    probes.check_json(parser, options.json)
    if shutil.which("uv") is None:
        parser.error("uv is not on the PATH: install it, each system runs in an environment of its own")
    return options


class Runner:
    """Runs one script at a time; whatever ends this process ends that one, through its standard input."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, name: str, file: Path, options: argparse.Namespace) -> dict[str, Any]:
        """The record of a system's script; with a reason and no records when it could not run."""
        script = str(HERE / f"on_{name}.py")
        code, errors = self._start(["uv", "sync", "--quiet", "--script", script])
        if code:
            return not_run(name, f"its packages cannot be installed here: {errors}")
        command = ["uv", "run", "--quiet", "--script", script, "--lifeline", "--json", str(file)]
        command += ["--seed", str(options.seed)]
        if options.probe:
            command += ["--probe", *map(str, options.probe)]
        code, errors = self._start(command)
        if file.exists() and file.stat().st_size:
            record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return record
        return not_run(name, errors or f"exit status {code}") | {"failed": True}

    def _start(self, command: Sequence[str]) -> tuple[int, str]:
        """Run a command and show its lines; its exit status and the end of what it complained of."""
        # A session of its own, so that a Ctrl-C reaches it only through its lifeline.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            print(f"  {line}", end="", flush=True)
        code = self.process.wait()
        self.process = None
        return code, " ".join(" ".join(lines).split())[-300:]

    def stop(self) -> None:
        """Close the lifeline and wait until the script has cleaned up."""
        if self.process is None:
            return
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def not_run(name: str, reason: str) -> dict[str, Any]:
    print(probes.wrapped(f"  {TITLES[name]}: not run: {reason}"), flush=True)
    return {"name": name, "title": TITLES[name], "columns": [], "records": [], "stars": {}, "reason": reason}


def conclude(systems: Sequence[dict[str, Any]], seconds: float, options: argparse.Namespace) -> int:
    """Print the table, record it, and return the exit status."""
    for system in systems:
        system["stars"] = probes.rate_columns(system)
    probes.show_table(systems)
    probes.say(f"\n{seconds / 60:.1f} minutes")
    if options.json:
        whole = {
            "environment": options.show["environment"] if options.show else probes.machine(),
            "minutes": round(seconds / 60, 1),
            "probes": {str(number): title for number, title in probes.PROBES.items()},
            "rule": {row: [text for text, _ in statements] for row, statements in probes.RULE.items()},
            "systems": systems,
        }
        Path(options.json).write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        probes.say(f"Recorded in {options.json}")
    inconclusive = any(record["status"] == "inconclusive" for system in systems for record in system["records"])
    return int(inconclusive or any("failed" in system for system in systems))


def main() -> None:
    options = parse(sys.argv[1:])
    if options.show:
        probes.leave(conclude(options.show["systems"], options.show["minutes"] * 60, options))
    probes.stop_on_signals()
    runner = Runner()
    folder = None
    code = 0
    try:
        folder = Path(tempfile.mkdtemp(prefix="comparison-"))
        begun = time.monotonic()
        systems = []
        for name in [name for name in SYSTEMS if not options.system or name in options.system]:
            print(f"{TITLES[name]} begins", flush=True)
            systems.append(runner.run(name, folder / f"{name}.json", options))
        code = conclude(systems, time.monotonic() - begun, options)
    except probes.Stopped as stopped:
        code = 128 + stopped.number
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    finally:
        runner.stop()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        probes.leave(code)


if __name__ == "__main__":
    main()
