"""Runs the numbered scripts, prints the overall evaluation, and records the results.

Each script runs as a command of its own, as a user would run it, and hands over its verdicts as JSON.
This file adds nothing to them: it counts, applies the fail-closed rule, and shows where things stand.
"""

from common import (
    HERE,
    Unusable,
    accept_record,
    check_baseline,
    check_writable,
    is_unicode,
    leave,
    make_console,
    redacted,
    refuse,
    stars_text,
    stop_signals,
    wrapped,
)
from harness.compare import compare, lines_of, status_of
from harness.given import Inventory, handed_over
from harness.machine import ROOM
from harness.page import Rated, html_of, junit_of, summary_of
from harness.record import CategoryRecord, Run, load_run
from harness.settings import (
    LEFT,
    Target,
    connect,
    load_settings,
    mask_streams,
    masked,
    name_profile,
    unused_settings,
    user_settings,
)
from lab import Guard, make_folder

import argparse
import asyncio
import collections
import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

ITEMS_IN_ALL = 58
MEASURES = "07"  # the script that measures speed: it gets the machine to itself

# Whoever depends on durable execution depends on these; an evaluation that fails one is capped.
FAIL_CLOSED = {
    "EX-01": "Progress guarantee",
    "EX-03": "Idempotency and deduplication",
    "RT-01": "Retry strategy",
    "VR-01": "Workflow versioning",
    "OP-02": "Management API",
}
CAP = 2
NEEDED = 4

PICTURE = HERE / "docs" / "run_all.svg"
PLOTS = ("pf_latency.svg", "pf_fanout.svg", "pf_payload.svg")  # what script 07 draws with --plot

ASSUMPTIONS = {
    "run time": "minutes to hours",
    "side effects": "limited writes",
    "deployment": "self-hosted dev server",  # where the evaluation ran on another, see DEPLOYMENTS
    "scale": "about 100",
    "determinism": "LLM decisions included",
    "language": "Python",
}


# What the assumption "deployment" says, by where a run was.
DEPLOYMENTS = {
    "embedded server": ASSUMPTIONS["deployment"],
    "cluster": "self-hosted cluster of separate services on PostgreSQL",
    "given server": "the server that the settings name",
}


@dataclass(frozen=True)
class Overall:
    """The rating over all judged items. `mean`, `least` and `stars` are None when nothing was judged.

    `missing` are the items of scripts that left no verdicts, `least` the mean if each lost item had one star.
    """

    mean: float | None
    least: float | None
    stars: int | None
    judged: int
    inconclusive: int
    not_run: int
    missing: int
    capped_by: Sequence[str]

    @property
    def lost(self) -> int:
        """How many items should have been judged and were not."""
        return self.inconclusive + self.missing


def fail_closed_states(items: Mapping[str, Any], assumptions: Mapping[str, str]) -> dict[str, str]:
    """For each fail-closed item: "passes", "not applicable", or why it does not pass.

    VR-01 guards runs that outlive a deployment; where runs last seconds there are none.
    """
    states = {}
    for id in FAIL_CLOSED:
        item = items.get(id)
        if id == "VR-01" and assumptions["run time"] == "seconds":
            states[id] = "not applicable"
        elif item is None:
            states[id] = "not run: its script did not run"
        elif item["outcome"] != "judged":
            states[id] = f"{item['outcome'].replace('_', ' ')}: {item['reason']}"
        else:
            states[id] = "passes" if item["stars"] >= NEEDED else f"below {NEEDED}: {item['reason']}"
    return states


def rate(items: Mapping[str, Any], assumptions: Mapping[str, str], missing: int = 0) -> Overall:
    """The mean over the judged items, and whole stars (a half rounded up) that no lost item can raise.

    An item is lost when it is inconclusive, or when its script left no verdicts (`missing` of them). Nobody knows
    its stars, so the whole stars are those of the mean in which it has the least there is, one: who loses a bad
    item gains nothing by it. An item that was not run does not count so: it says why it cannot run where it
    stands, which is a property of the surroundings and not of this run. The fail-closed items cap the stars.
    """
    stars = [item["stars"] for item in items.values() if item["outcome"] == "judged"]
    outcomes = collections.Counter(item["outcome"] for item in items.values())
    states = fail_closed_states(items, assumptions)
    capped_by = [id for id, state in states.items() if state not in ("passes", "not applicable")]
    lost = outcomes["inconclusive"] + missing
    mean = sum(stars) / len(stars) if stars else None
    least = (sum(stars) + lost) / (len(stars) + lost) if stars else None
    whole = None if least is None else int(least + 0.5)
    if whole is not None and capped_by:
        whole = min(whole, CAP)
    return Overall(
        mean, least, whole, len(stars), outcomes["inconclusive"], outcomes["not_run"], missing, capped_by
    )  # fmt: skip


class Script:
    """One numbered script, and how its run stands."""

    def __init__(self, path: Path, folder: Path, guard: Guard) -> None:
        self.path = path
        self._guard = guard
        self.number = path.name[:2]
        self.file = folder / f"{path.stem}.json"
        self.begun: float | None = None
        self.latest = ""
        self.seconds = 0.0
        self.code: int | None = None
        self.errors = ""
        self._process: asyncio.subprocess.Process | None = None

    @property
    def record(self) -> dict[str, Any] | None:
        """What the script wrote with --json, or None when it did not come to that."""
        if self.code is None or not self.file.exists():
            return None
        record: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        return record

    @property
    def missing(self) -> int:
        """How many items are lost with it when it left no verdicts: those that its source registers, or one."""
        if self.record is not None:
            return 0
        registered = re.findall(r"\.item\(\s*\"[A-Z]{2}-\d\d\"", self.path.read_text(encoding="utf-8"))
        return max(1, len(registered))

    async def run(self, *arguments: str) -> None:
        """Run it to its end; its lines are kept for the display only."""
        self.begun = time.monotonic()
        command = [sys.executable, str(self.path), "--json", str(self.file), *arguments]
        # In a session of its own, so that a Ctrl-C comes to it through us and only once.
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout
        assert self._process.stderr
        self._guard.watch(self._process.pid)
        errors = asyncio.create_task(self._process.stderr.read())
        async for line in self._process.stdout:
            self.latest = masked(line.decode(errors="replace").strip()) or self.latest
        self.errors = redacted((await errors).decode(errors="replace"))
        self.code = await self._process.wait()
        self._guard.forget(self._process.pid)
        self.seconds = time.monotonic() - self.begun

    async def stop(self, number: int) -> None:
        """End it by a signal, which it answers by ending its workers and servers."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 20)
        if process.returncode is None:
            process.kill()  # its guard ends what it leaves behind


class Board:
    """What a person sees: live lines on a terminal, a line per event elsewhere, then the tables."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.unicode = is_unicode(console)
        self._running: list[Script] = []
        live = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(get_renderable=self._live_lines, console=console, transient=True) if live else None

    def open(self) -> None:
        if self._live:
            self._live.start()

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def begin(self, script: Script) -> None:
        self._running.append(script)
        if not self._live:
            self.line(f"{script.path.name} begins")

    def end(self, script: Script) -> None:
        """Print a script's items, each with the reason for its stars."""
        self._running.remove(script)
        record = script.record
        if record is None:
            self.line(f"{script.path.name}: no verdicts, exit status {script.code}. {script.errors}", "red")
            return
        self.line("")
        self.line(f"{script.number} {record['category']}  {record['title']}, {script.seconds:.0f} s", "bold")
        for item in record["items"]:
            stars = stars_text(item["stars"], item["outcome"], self.unicode)
            why = "" if item["stars"] == 5 else f" - {item['reason']}"
            self.line(f"{item['id']}  {stars}  {item['title']}{why}", hang=14)

    def line(self, text: str, style: str = "", hang: int = 0) -> None:
        width = self.console.width
        for one in wrapped(masked(text), width, hang=hang if width >= 60 else 2):
            self.console.print(Text(one, style=style), soft_wrap=True)

    def categories(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Per category: how many items, their mean, how many are good (three stars and more) and not."""
        self.line("")
        self.line("Categories", "bold")
        for record in records:
            items = record["items"]
            stars = [item["stars"] for item in items if item["stars"]]
            good = sum(one >= 3 for one in stars)
            mean = f"{sum(stars) / len(stars):.1f}" if stars else "-"
            shown = stars_text(int(sum(stars) / len(stars) + 0.5) if stars else None, "not_run", self.unicode)
            counts = f"{len(items)} items: {good} good, {len(stars) - good} insufficient"
            other = collections.Counter(item["outcome"] for item in items)
            for one in ("inconclusive", "not_run"):
                counts += f", {other[one]} {one.replace('_', ' ')}" if other[one] else ""
            self.line(f"{record['category']}  {shown} {mean:>3}  {record['title']}; {counts}", hang=14)

    def fail_closed(self, items: Mapping[str, Any], states: Mapping[str, str]) -> None:
        self.line("")
        self.line(f"Fail-closed items: below {NEEDED} stars, inconclusive or not run caps the rating at {CAP}", "bold")
        for id, state in states.items():
            item = items.get(id, {"stars": None, "outcome": "not_run"})
            stars = stars_text(item["stars"], item["outcome"], self.unicode)
            self.line(f"{id}  {stars}  {FAIL_CLOSED[id]}: {state}", hang=14)

    def assumptions(self, assumptions: Mapping[str, str]) -> None:
        self.line("")
        self.line("Assumptions of this evaluation", "bold")
        for name, value in assumptions.items():
            self.line(f"{name + ':':<14}{value}", hang=14)

    def overall(self, rating: Overall, environment: Mapping[str, Any]) -> None:
        self.line("")
        stars = stars_text(rating.stars, "not_run", self.unicode)
        mean = "nothing was judged" if rating.mean is None else f"mean {rating.mean:.1f}"
        self.line(f"Overall  {stars}  {mean} over {rating.judged} judged of {ITEMS_IN_ALL} items", "bold")
        missing = f", {rating.missing} of scripts that left no verdicts" if rating.missing else ""
        self.line(f"{rating.inconclusive} inconclusive, {rating.not_run} not run{missing}")
        if rating.lost and rating.least is not None:
            with_one = f"with one star for each of the {rating.lost} lost items the mean is {rating.least:.1f}"
            self.line(f"Nobody knows the stars of what was lost: {with_one}, and the whole stars are its", "yellow")
        if rating.capped_by:
            self.line(f"Capped at {CAP} stars by {', '.join(rating.capped_by)}", "yellow")
        self.line(", ".join(f"{name} {value}" for name, value in environment.items()), "dim")

    def _live_lines(self) -> Text:
        now = time.monotonic()
        lines = [f"{one.path.stem}  {now - (one.begun or now):3.0f} s  {one.latest}" for one in self._running]
        return Text("\n".join(["", *lines]), no_wrap=True, overflow="ellipsis")


async def run_scripts(scripts: Sequence[Script], board: Board, options: argparse.Namespace) -> None:
    """Run the scripts, so many at a time and the one that measures alone. Raises Unusable when one does."""
    places = asyncio.Semaphore(options.jobs)
    shared = ["--seed", str(options.seed), *(["--cluster"] if options.cluster else [])]

    async def one(script: Script, *arguments: str) -> None:
        async with places:
            board.begin(script)
            await script.run(*(fail_closed_of(script.path) if options.fail_closed else []), *shared, *arguments)
            if script.code == 2:
                raise Unusable(script.errors.partition(": ")[2] or script.errors)
            board.end(script)

    await asyncio.gather(*(one(script) for script in scripts if script.number != MEASURES))
    for script in scripts:
        if script.number == MEASURES:
            await one(script, *(["--plot"] if options.pictures else []))


async def take_away(left: Path, board: Board, seconds: float = 330) -> list[str]:
    """Remove what the scripts could not: some worker deployments are let go after minutes. Returns what stays."""
    found = handed_over(left)
    later = [name for name, _ in found if name]
    lines = [line for name, told in found if not name for line in told]
    if later:
        board.line(
            f"{len(later)} worker deployments are still on your server, which keeps them until it has forgotten their "
            "workers, five minutes unless it is set otherwise. They are removed then; Ctrl-C leaves them there."
        )
        inventory = Inventory(await connect(Target(None)))
        await inventory.remove_deployments(later, seconds, seconds)
        lines += inventory.told()
    return lines


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises Unusable or exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description="Run the evaluation: all numbered scripts, or those named.")
    parser.add_argument("scripts", nargs="*", metavar="NUMBER", help="run only these scripts, such as 01")
    parser.add_argument("--record", nargs="?", const=str(HERE / "results"), metavar="DIR", help="keep the verdicts")
    parser.add_argument("--pictures", action="store_true", help="draw the tables and what script 07 measured in docs/")
    parser.add_argument("--against", metavar="RUN", help="say what differs from a recorded run: a folder or a file")
    parser.add_argument("--accept", action="store_true", help="with --against: write this run in its place")
    parser.add_argument("--html", metavar="FILE", help="write a page of this run; with --against of both, side by side")
    parser.add_argument("--junit", metavar="FILE", help="write JUnit XML: a test case an item")
    parser.add_argument("--cluster", action="store_true", help="on a real cluster on this machine: see cluster.py")
    parser.add_argument("--fail-closed", action="store_true", help="run only the items that cap the rating")
    parser.add_argument("--timings", action="store_true", help="print where the time goes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="scripts at a time (default: the cores)")
    parser.add_argument("--profile", metavar="NAME", help="a TOML profile that names the server to evaluate")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="repeat a run's random faults")
    parser.add_argument(
        "--run-time", choices=["seconds", "minutes", "hours", "days"], help="how long your workflows run"
    )
    options = parser.parse_args(arguments)
    found = {path.name[:2]: path for path in sorted(HERE.glob("[0-9][0-9]_*.py"))}
    wrong = [number for number in options.scripts if number not in found]
    if wrong:
        raise Unusable(f"There is no script {', '.join(wrong)}: choose from {', '.join(found)}.")
    if options.jobs < 1:
        raise Unusable("--jobs must be 1 or more.")
    options.paths = [path for number, path in found.items() if not options.scripts or number in options.scripts]
    if options.fail_closed:
        options.paths = [path for path in options.paths if fail_closed_of(path)]
    if options.record:
        try:
            os.makedirs(options.record, exist_ok=True)
        except OSError as error:
            raise Unusable(f"--record {options.record} cannot be made ({error.strerror}): name another.") from None
        check_writable("record", str(Path(options.record) / "write-test.json"))
    if options.pictures:
        PICTURE.parent.mkdir(exist_ok=True)
        check_writable("pictures", str(PICTURE))
    for option in ("html", "junit"):
        check_writable(option, getattr(options, option))
    check_baseline(options.against, options.accept)
    if options.accept and not Path(options.against).is_dir():
        raise Unusable("--accept of a whole run needs a folder behind --against: a file holds one script.")
    return options


def fail_closed_of(path: Path) -> list[str]:
    """The ids of the fail-closed items of a script, told by the letters in its name, such as 01_ex_..."""
    return [id for id in FAIL_CLOSED if id[:2].lower() == path.name[3:5]]


def conclude(scripts: Sequence[Script], board: Board, options: argparse.Namespace) -> int:
    """Print the tables, record what is to be kept, and return the exit status."""
    if options.record:  # first of all: what comes below is made of it
        for script in scripts:
            if script.record:
                target = Path(options.record) / script.file.name
                target.write_text(script.file.read_text(encoding="utf-8"), encoding="utf-8")
    records = [record for record in (script.record for script in scripts) if record]
    items = {item["id"]: item for record in records for item in record["items"]}
    where = records[0]["environment"]["where"] if records else "embedded server"
    assumptions = ASSUMPTIONS | {"deployment": DEPLOYMENTS[where]}
    assumptions |= {"run time": options.run_time} if options.run_time else {}
    states = fail_closed_states(items, assumptions)
    rating = rate(items, assumptions, sum(script.missing for script in scripts))
    board.close()
    board.console.record = bool(options.pictures)
    board.categories(records)
    board.fail_closed(items, states)
    board.assumptions(assumptions)
    board.overall(rating, records[0]["environment"] if records else {})
    if options.pictures:
        draw(board.console)
    if options.record:
        board.line(f"Recorded in {options.record}")
    if options.timings:
        timings(scripts, board)
    differs = hand_over(records, board, options, assumptions) if records else 0
    failed = [id for id in rating.capped_by if id in items]
    return 1 if failed or rating.inconclusive or len(records) < len(scripts) or differs else 0


def timings(scripts: Sequence[Script], board: Board) -> None:
    """Print where the time went: a line a script, and its slowest items."""
    board.line("")
    board.line("Where the time went: wall and processor seconds, and the slowest items", "bold")
    total = collections.Counter[str]()
    for script in scripts:
        record = script.record
        if record is None:
            continue
        cpu = record["environment"].get("cpu_seconds") or {"own": 0.0, "servers_and_workers": 0.0}
        total.update({"wall": script.seconds, **cpu})
        slowest = sorted(record["items"], key=lambda item: -item["seconds"])[:3]
        told = ", ".join(f"{item['id']} {item['seconds']:.1f}" for item in slowest)
        cost = f"{cpu['own']:.1f} own + {cpu['servers_and_workers']:.1f} servers and workers"
        board.line(f"{script.number} {record['category']}  {script.seconds:5.1f} s, {cost}; {told}", hang=7)
    cost = f"{total['own']:.0f} own + {total['servers_and_workers']:.0f} servers and workers"
    board.line(f"in all  {total['wall']:.0f} s one after the other, {cost} processor seconds")


def rated(run: Run, assumptions: Mapping[str, str]) -> Rated:
    """A run with its rating."""
    items = {id: item.model_dump() for id, item in run.items.items()}
    return Rated(run, rate(items, assumptions))


def hand_over(
    records: Sequence[Mapping[str, Any]], board: Board, options: argparse.Namespace, assumptions: Mapping[str, str]
) -> int:
    """Compare with another run, and write the page, JUnit and summary asked for. Returns 1 where a run differs so
    that it matters: something was lost, or the other run is stale.
    """
    here = Run("this run", [CategoryRecord.model_validate(record) for record in records])
    there = load_run(Path(options.against)) if options.against else None
    changes = compare(there, here) if there else None
    if there and changes is not None:
        board.line("")
        for style, text in lines_of(there, here, changes):
            board.line(text, style, hang=7)
    runs = [rated(run, assumptions) for run in (there, here) if run]
    if options.html:
        plots = [path for name in PLOTS if (path := HERE / "docs" / name).exists()]
        Path(options.html).write_text(html_of(runs, plots), encoding="utf-8")
        board.line(f"A page of {'both runs' if there else 'the run'}: {options.html}")
    if options.junit:
        Path(options.junit).write_bytes(junit_of(here))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:
            file.write(summary_of(runs[-1], changes))
    if there and options.accept:
        accept(Path(options.against), records, board)
        return 0
    return status_of(changes) if changes is not None else 0


def accept(path: Path, records: Sequence[Mapping[str, Any]], board: Board) -> None:
    """Write this run where the other one stands: a file a script."""
    for record in records:
        stem = next(one.stem for one in HERE.glob("[0-9][0-9]_*.py") if one.stem[3:5] == record["category"].lower())
        accept_record(path / f"{stem}.json", record)
    board.line(f"Accepted: {path}")


def draw(console: Console) -> None:
    """Draw the tables that were just printed as a terminal picture that needs nothing from the network."""
    picture = console.export_svg(title="uv run run_all.py", unique_id="run-all")
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")


async def main(options: argparse.Namespace) -> int:
    """Run everything until done or until a signal comes. Returns the exit status."""
    stopped = stop_signals()
    board = Board(make_console())
    folder = make_folder()
    guard = Guard(folder)
    left = folder / "left.txt"
    os.environ[LEFT] = str(left)
    os.environ[ROOM] = str(folder)  # so that an item which measures has the machine to itself over all scripts
    scripts = [Script(path, folder, guard) for path in options.paths]
    signal_number = signal.SIGTERM
    try:
        board.open()
        for words in unused_settings():
            board.line(words)
        work = asyncio.create_task(run_scripts(scripts, board, options))
        either: set[asyncio.Future[Any]] = {work, stopped}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            code = conclude(scripts, board, options)
            tidying = asyncio.create_task(take_away(left, board))
            waited: set[asyncio.Future[Any]] = {tidying, stopped}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if tidying.done():
                for words in tidying.result():
                    board.line(words)
                return code
        signal_number = signal.Signals(stopped.result())
        work.cancel()
        await asyncio.gather(*(script.stop(signal_number) for script in scripts))
        for words in [line for _, told in handed_over(left) for line in told]:
            print(words, file=sys.stderr)
        print(f"{signal_number.name}: stopped", file=sys.stderr)
        return 128 + signal_number
    finally:
        with contextlib.suppress(BrokenPipeError):
            board.close()
        await asyncio.gather(*(script.stop(signal_number) for script in scripts))
        guard.close()


if __name__ == "__main__":
    try:
        mask_streams()
        load_settings()
        asked = parse(sys.argv[1:])
        name_profile(asked.profile)
        user_settings()  # once, for its refusals, before eleven scripts give the same
        leave(asyncio.run(main(asked)))
    except Unusable as error:
        leave(refuse(error))
    except BrokenPipeError:
        leave(128 + signal.SIGPIPE)
