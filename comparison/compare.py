# /// script
# requires-python = ">=3.11"
# dependencies = ["psutil>=7.0"]
# ///
"""All systems under the same probes, on the same machine, one after the other: one command, one table.

`uv run comparison/compare.py` runs every `on_*.py` of this folder in its own environment, prints the
table, and writes it to results/comparison.json. What one system measures, its own script measures too.
The cost of a step is measured by turns: each system once, then each once more, so that a machine that is
busy with something else is busy for all. At the end the copies of this project's lessons are run on DBOSify.

Restate's server is prepared once: `npm install --prefix .restate @restatedev/restate-server`; Temporal's
cluster by `uv run cluster.py prepare`. What is not there is said and left out.

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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import probes

HERE = Path(__file__).resolve().parent
RECORD = HERE.parent / "results" / "comparison.json"
# The order of the table; the last two are combinations.
SYSTEMS = ("temporal", "langgraph", "crewai", "dbos", "restate", "dbosify", "temporal_langgraph", "temporal_crewai")
SIDE_BY_SIDE = 2  # most probes wait; what is timed comes afterwards, alone and by turns
COST = 6  # the probe that is done by turns
TURNS = 3
TITLES = {
    "temporal": "Temporal",
    "langgraph": "LangGraph",
    "crewai": "CrewAI",
    "dbos": "DBOS",
    "restate": "Restate",
    "dbosify": "DBOSify",
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
            old = [one["title"] for one in options.show["systems"] if "reason" not in one and "servers" not in one]
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--show needs the record of a run ({type(error).__name__}: {error})")
        if old:
            parser.error(f"--show: {options.show['environment'].get('date', 'that')} is of an older form: run it anew")
    elif options.json is None and not options.probe and not options.system:
        RECORD.parent.mkdir(exist_ok=True)
        options.json = str(RECORD)
    probes.check_json(parser, options.json)
    if shutil.which("uv") is None:
        parser.error("uv is not on the PATH: install it, each system runs in an environment of its own")
    return options


class Runner:
    """Runs scripts; whatever ends this process ends them, through their standard input."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        self.stopped = False

    def run(
        self, name: str, file: Path, options: argparse.Namespace, numbers: Sequence[int], more: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The record of a system's script; with a reason and no records when it could not run."""
        print(f"{TITLES[name]} begins", flush=True)
        script = str(HERE / f"on_{name}.py")
        code, errors = self._start(["uv", "sync", "--quiet", "--script", script])
        if code:
            return not_run(name, f"its packages cannot be installed here: {errors}")
        command = ["uv", "run", "--quiet", "--script", script, "--lifeline", "--json", str(file)]
        command += ["--seed", str(options.seed), "--probe", *map(str, numbers), *more]
        code, errors = self._start(command)
        if file.exists() and file.stat().st_size:
            record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return record
        return not_run(name, errors or f"exit status {code}") | {"failed": True}

    def lessons(self, file: Path) -> dict[str, Any]:
        """What became of the copies of the lessons on DBOSify."""
        print("The lessons on DBOSify begin", flush=True)
        script = str(HERE / "lessons_on_dbosify.py")
        code, errors = self._start(["uv", "run", "--quiet", "--script", script, "--lifeline", "--json", str(file)])
        if code or not file.exists():
            return {"reason": errors}
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return record

    def _start(self, command: Sequence[str]) -> tuple[int, str]:
        """Run a command and show its lines; its exit status and the end of what it complained of."""
        if self.stopped:
            return 1, "stopped"
        # A session of its own, so that a Ctrl-C reaches it only through its lifeline.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line)
            print(f"  {line}", end="", flush=True)
        code = process.wait()
        self.processes.remove(process)
        return code, " ".join(" ".join(lines).split())[-300:]

    def stop(self) -> None:
        """Close the lifelines and wait until the scripts have cleaned up."""
        self.stopped = True
        left = list(self.processes)
        for process in left:
            assert process.stdin
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in left:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def not_run(name: str, reason: str) -> dict[str, Any]:
    print(probes.wrapped(f"  {TITLES[name]}: not run: {reason}"), flush=True)
    return {"name": name, "title": TITLES[name], "columns": [], "records": [], "stars": {}, "reason": reason}


def locked_now(system: Mapping[str, Any]) -> dict[str, str]:
    """The versions that the system's script would be run with."""
    return {name: version for name, (version, _) in probes.locked(HERE / f"on_{system['name']}.py").items()}


def by_turns(
    systems: Sequence[dict[str, Any]],
    runner: Runner,
    folder: Path,
    options: argparse.Namespace,
    begun: float,
    learnt: Mapping[str, Any],
) -> list[float]:
    """Measure the cost of a step of every system in turn, several times over; the machine's load at each."""
    loads = []
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for turn in range(1, TURNS + 1):
        for system in [one for one in systems if not one["name"].startswith("temporal_") and "reason" not in one]:
            print(f"Turn {turn} of {TURNS}: {system['title']}", flush=True)
            loads.append(round(os.getloadavg()[0], 1))
            file = folder / f"{system['name']}-{turn}.json"
            seen = runner.run(system["name"], file, options, [COST], ["--repeats", "1"])
            for record in seen["records"]:
                turns.setdefault((system["name"], record["column"]), []).append(record)
        put_together(systems, turns)
        save(systems, begun, options, {**learnt, "load": loads})  # what was seen outlives an interruption
    return loads


def put_together(systems: Sequence[dict[str, Any]], turns: Mapping[tuple[str, str], Sequence[dict[str, Any]]]) -> None:
    """Put what the turns measured so far into the systems' records."""
    for system in systems:
        system["records"] = [one for one in system["records"] if one["probe"] != COST]
        for column in system["columns"]:
            records = turns.get((system["name"], column), [])
            if records:
                system["records"].append(merged(records))
        order = list(system["columns"])
        system["records"].sort(key=lambda one: (order.index(one["column"]), one["probe"]))


def merged(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record from those of several turns; inconclusive where one of them is."""
    bad = next((one for one in records if one["status"] != "seen"), None)
    if bad:
        return bad
    facts = probes.merged([one["facts"] for one in records])
    outcome, measured = probes.words(COST, facts)
    seconds = round(sum(one["seconds"] for one in records), 1)
    return {**records[0], "facts": facts, "outcome": outcome, "measured": measured, "seconds": seconds}


def save(
    systems: Sequence[dict[str, Any]], begun: float, options: argparse.Namespace, whole: Mapping[str, Any]
) -> None:
    """Write the record, with the stars of today's rule."""
    if not options.json:
        return
    for system in systems:
        system["stars"] = probes.rate_columns(system)
    record = {
        "environment": whole.get("environment") or probes.machine(),
        "load": whole.get("load", []),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "probes": {str(number): title for number, title in probes.PROBES.items()},
        "rule": {
            row: [{"statement": one.text, "reason": one.reason} for one in statements]
            for row, statements in probes.RULE.items()
        },
        "systems": systems,
        "lessons": whole.get("lessons", {}),
    }
    Path(options.json).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def conclude(
    systems: Sequence[dict[str, Any]], seconds: float, options: argparse.Namespace, whole: Mapping[str, Any]
) -> int:
    """Print the table, record it, and return the exit status."""
    for system in systems:
        system["stars"] = probes.rate_columns(system)
        for one in probes.newer_than(system, locked_now(system)):
            probes.say(f"{system['title']}: {one} is newer than this record")
    probes.show_table(systems)
    probes.say(f"\n{seconds / 60:.1f} minutes")
    if options.json:
        save(systems, time.monotonic() - seconds, options, whole)
        probes.say(f"Recorded in {options.json}")
    inconclusive = any(record["status"] == "inconclusive" for system in systems for record in system["records"])
    return int(inconclusive or any("failed" in system for system in systems))


def main() -> None:
    options = parse(sys.argv[1:])
    if options.show:
        probes.leave(conclude(options.show["systems"], options.show["minutes"] * 60, options, options.show))
    probes.stop_on_signals()
    runner = Runner()
    folder = None
    code = 0
    try:
        folder = Path(tempfile.mkdtemp(prefix="comparison-"))
        begun = time.monotonic()
        # The cost alone needs no other run: what the first turn says of a system is all there is to say.
        numbers = [number for number in options.probe or probes.PROBES if number != COST] or [COST]
        names = [name for name in SYSTEMS if not options.system or name in options.system]
        pool = ThreadPoolExecutor(SIDE_BY_SIDE)  # not a `with`: a signal must not have to wait for it
        files = {name: folder / f"{name}.json" for name in names}
        futures = {name: pool.submit(runner.run, name, files[name], options, numbers) for name in names}
        learnt = pool.submit(runner.lessons, folder / "lessons.json") if len(names) > 1 and not options.probe else None
        done = 0
        while not all(one.done() for one in futures.values()) or (learnt and not learnt.done()):
            time.sleep(0.1)
            over = [name for name in names if futures[name].done()]
            if len(over) > done:
                done = len(over)
                save([futures[name].result() for name in over], begun, options, {})
        systems = [futures[name].result() for name in names]
        lessons = {"lessons": learnt.result() if learnt else {}}
        save(systems, begun, options, lessons)
        cost = COST in (options.probe or probes.PROBES)
        loads = by_turns(systems, runner, folder, options, begun, lessons) if cost else []
        whole = {"load": loads} | lessons
        code = conclude(systems, time.monotonic() - begun, options, whole)
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
