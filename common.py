"""What every numbered script stands on: evidence, and running and output.

A script declares a `Category`, decorates one async generator per item, and calls `run(category)` of lab.py,
which has what an item works with: servers, workers, a ledger. This file knows nothing of any category.

    settings and connection, secrets       harness/settings.py
    evidence, facts and the judge          harness/evidence.py
    release stages of APIs                 harness/stages.py
    lessons that can be copied             harness/lesson.py
    speed of the machine                   harness/machine.py
    running and output                     here
"""

import signal
import sys
from pathlib import Path

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:
    # The imports below take a moment. Until run() installs its own handlers, a Ctrl-C ends the script
    # at once instead of printing a traceback from the middle of an import. Nothing is running yet.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from harness.evidence import (
    LABELS,
    SCHEMA,
    STAR_NEEDING,
    Evidence,
    Fact,
    Kind,
    Spread,
    Verdict,
    at_least,
    at_most,
    between,
    cited,
    contains,
    control,
    differs,
    equal,
    figure,
    holds,
    judge,
    lacks,
    limit,
    native,
    not_run,
    one_of,
    words,
    works,
)
from harness.given import refusal
from harness.lesson import copy_of, lessons_of
from harness.machine import Room, Ticker, leave, slowness
from harness.settings import (
    HERE,
    NotRun,
    Target,
    Unusable,
    connect,
    find_cli,
    load_settings,
    mask_streams,
    masked,
    masked_all,
    name_profile,
    redacted,
    sdk_version,
)

import argparse
import asyncio
import collections
import contextlib
import functools
import inspect
import io
import json
import logging
import os
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, Protocol, TextIO, get_args

import pydantic_core
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

# What scripts, lab.py and cluster.py take from here though it stands elsewhere.
__all__ = [
    "HERE",
    "LABELS",
    "STAR_NEEDING",
    "Evidence",
    "Fact",
    "NotRun",
    "Spread",
    "Target",
    "Unusable",
    "Verdict",
    "at_least",
    "at_most",
    "between",
    "cited",
    "connect",
    "contains",
    "control",
    "differs",
    "equal",
    "figure",
    "find_cli",
    "holds",
    "judge",
    "lacks",
    "leave",
    "limit",
    "load_settings",
    "native",
    "not_run",
    "one_of",
    "redacted",
    "sdk_version",
    "slowness",
    "words",
    "works",
]  # fmt: skip


def causes(error: BaseException | None) -> list[BaseException]:
    """An error and its chain of causes, outermost first; empty for None."""
    return [error, *causes(error.__cause__)] if error else []


SIDE_BY_SIDE = 2 * (os.cpu_count() or 1)  # items at a time: they wait more than they compute
Demonstration = Callable[[Any], AsyncIterator[Evidence]]  # it is given a Lab


@dataclass(frozen=True)
class Item:
    """One of the 58 things evaluated: an id such as EX-01, and the demonstration that yields evidence."""

    id: str
    title: str
    demonstrate: Demonstration
    fail_closed: bool = False
    seconds: float = 90  # bound on a quick machine; a demonstration that takes longer is inconclusive
    alone: bool = False  # its evidence is a duration, so that nothing else runs beside it


class Category:
    """The items of one script.

    `at_once` items run side by side (a script that measures says 1). `flags` are options of this script
    alone, name to help text; an item asks for one by `lab.flag(name)`.
    """

    def __init__(
        self, id: str, title: str, question: str, *, at_once: int = SIDE_BY_SIDE, flags: Mapping[str, str] | None = None
    ) -> None:
        self.id, self.title, self.question = id, title, question
        self.at_once, self.flags = at_once, flags or {}
        self.items: list[Item] = []

    def item(
        self, id: str, title: str, *, fail_closed: bool = False, seconds: float = 90, alone: bool = False
    ) -> Callable[[Demonstration], Demonstration]:
        """Register an async generator of evidence.

        `fail_closed`: below four stars it caps the overall rating. `seconds`: its bound on a quick machine.
        `alone`: its evidence is a duration, so that no other item, of any script, may run beside it.
        """

        def register(demonstrate: Demonstration) -> Demonstration:
            self.items.append(Item(id, title, demonstrate, fail_closed, seconds, alone))
            return demonstrate

        return register


@dataclass(frozen=True)
class Result:
    """An item with its verdict and the evidence it rests on."""

    item: Item
    verdict: Verdict
    evidence: Sequence[Evidence]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """One entry of "items" in the JSON file."""
        evidence = [
            {
                "kind": one.kind,
                "claim": one.claim,
                "held": one.held,
                "measured": redacted(one.measured),
                "facts": [fact_as_json(name, fact) for name, fact in one.facts.items()],
            }
            for one in self.evidence
        ]
        return {
            "id": self.item.id,
            "title": self.item.title,
            "fail_closed": self.item.fail_closed,
            "outcome": self.verdict.outcome,
            "stars": self.verdict.stars,
            "stage": self.verdict.stage,
            "reason": self.verdict.reason,
            "seconds": round(self.seconds, 2),
            "evidence": evidence,
        }

    @property
    def passes(self) -> bool:
        """Whether this item lets the script end with status 0."""
        if self.item.fail_closed:
            return (self.verdict.stars or 0) >= 4
        return self.verdict.outcome != "inconclusive"


def fact_as_json(name: str, fact: Fact) -> dict[str, Any]:
    """One entry of "facts" in the JSON file."""
    measured = pydantic_core.to_jsonable_python(fact.measured, fallback=words, inf_nan_mode="strings")
    return {"name": name, "measured": measured, "expected": fact.expected, "held": fact.held}


P = ParamSpec("P")
Part = Callable[P, Coroutine[Any, Any, "Evidence | Iterable[Evidence]"]]


def piece(*declared: Evidence) -> Callable[[Part[P]], Callable[P, Coroutine[Any, Any, list[Evidence]]]]:
    """For a part of an item that somebody's server may refuse: what evidence it gives, known before it runs.

    Where the part is refused, or raises NotRun, these pieces are not run, with the reason, and the rest of the
    item is judged. They are written as evidence without a measurement:

        @piece(holds("six overlap policies do what they say"))
        async def overlap_policies(lab: Lab) -> Evidence:
            lab.needs("schedules")  # NotRun at once, and not after a minute of waiting
            ...

    A declared claim that the part then does not yield is an error, so that the two cannot drift apart.
    """

    def wrap(part: Part[P]) -> Callable[P, Coroutine[Any, Any, list[Evidence]]]:
        @functools.wraps(part)
        async def run(*args: P.args, **kwargs: P.kwargs) -> list[Evidence]:
            try:
                seen = await part(*args, **kwargs)
            except Exception as error:
                if (why := refusal(error)) is None:
                    raise
                return [replace(one, held=None, measured=why) for one in declared]
            found = [seen] if isinstance(seen, Evidence) else list(seen)
            if lost := {one.claim for one in declared} - {one.claim for one in found}:
                raise RuntimeError(f"{part.__name__} declares {lost} and does not yield it")
            return found

        return run

    return wrap


async def side_by_side(*parts: Coroutine[Any, Any, "Evidence | Iterable[Evidence]"]) -> AsyncIterator["Evidence"]:
    """Run the parts of an item at the same time, and yield the evidence of each, one piece or several, as it comes.

    If one fails, the others are cancelled. One that is refused (see piece()) lets the others go on, and then NotRun
    is raised: what it would have shown is not known here.
    """
    tasks = [asyncio.ensure_future(part) for part in parts]
    refused: str | None = None
    try:
        for task in asyncio.as_completed(tasks):
            try:
                seen = await task
            except Exception as error:
                refused = refusal(error) or refused
                if refusal(error) is None:
                    raise
                continue
            for evidence in [seen] if isinstance(seen, Evidence) else seen:
                yield evidence
        if refused:
            raise NotRun(refused)
    finally:
        for one in tasks:
            one.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Session(Protocol):
    """What a run needs of the surroundings that its items share; lab.py has the one that there is."""

    environment: dict[str, Any]
    seed: int
    ready_after: float
    remarks: list[str]  # on the server and the settings, to be shown before anything runs

    @property
    def address(self) -> str:
        """Where the evaluated server listens."""

    def lab(self, item: str) -> Any:
        """What one item works with."""

    async def open(self) -> None:
        """Connect to the user's server, or start one. Raises Unusable."""

    async def tidy(self) -> Sequence[str]:
        """Remove what the items left on a server of the user's. Returns what is to be said of it."""

    async def stay(self, say: Callable[[str], None], stopped: "asyncio.Future[int]") -> None:
        """Leave the server up until a signal comes."""

    async def hindrance(self, item: str) -> str | None:
        """The limit of a server of the user's that keeps an item from going on, in a sentence; None on our own."""

    def cpu_seconds(self) -> dict[str, float] | None:
        """Processor seconds of this process and of its servers and workers so far, where they can be read."""

    def close(self) -> None:
        """End every process of ours."""


async def run_item(item: Item, session: Session, see: Callable[[Item, Evidence], None], ticker: Ticker) -> Result:
    """Run one demonstration within its bound; whatever it does, there is a result."""
    evidence: list[Evidence] = []

    async def gather() -> None:
        async with contextlib.aclosing(item.demonstrate(session.lab(item.id))) as demonstration:  # type: ignore[type-var]
            async for one in demonstration:
                evidence.append(one)
                see(item, one)

    begun = time.monotonic()
    task = asyncio.create_task(gather())
    bound = item.seconds * slowness()
    hindered = await finished_or_hindered(task, item, session, bound)
    if hindered:
        verdict = Verdict("not_run", None, hindered)
        task.cancel()
        await asyncio.wait({task}, timeout=10)
    elif task.done():
        lost = any(one.held is False for one in evidence)
        starved = await asyncio.to_thread(ticker.starved_since, begun) if lost else None
        verdict = verdict_of(evidence, task.exception(), starved)
    else:
        verdict = judge(evidence, f"no end within {bound:.0f} s, after {len(evidence)} pieces of evidence")
        task.cancel()
        await asyncio.wait({task}, timeout=10)  # its processes end with the session if it does not end now
    evidence.sort(key=lambda one: get_args(Kind).index(one.kind))  # as a reader asks; it came as it came
    return Result(item, verdict, evidence, time.monotonic() - begun)


async def finished_or_hindered(task: "asyncio.Task[None]", item: Item, session: Session, seconds: float) -> str | None:
    """Wait for an item's end, so many seconds. Returns the server's limit that keeps it from going on, if one does.

    What is seen once may pass; it counts when it is seen again, or when the item has failed meanwhile.
    """
    deadline, before = time.monotonic() + seconds, None
    while not task.done() and time.monotonic() < deadline:
        await asyncio.wait({task}, timeout=min(5, max(deadline - time.monotonic(), 0)))
        failed = task.done() and task.exception() is not None and refusal(task.exception()) is None
        if task.done() and not failed:
            return None
        seen = await session.hindrance(item.id)
        if seen and (failed or before):
            return seen
        before = seen
    return None


def verdict_of(evidence: Sequence[Evidence], error: BaseException | None, starved: str | None) -> Verdict:
    """judge(), for a demonstration that ended with `error` or without."""
    if why := refusal(error):
        return Verdict("not_run", None, why)
    if isinstance(error, BrokenPipeError):
        raise error
    if error is not None:
        logging.getLogger("evaluation").error("a demonstration failed", exc_info=error)
    return judge(evidence, describe_error(error) if error else None, starved)


def describe_error(error: BaseException) -> str:
    """The chain of causes of an exception, and the line of the script that it came through."""
    chain = [f"{type(one).__name__}: {redacted(str(one))[:300]}" for one in causes(error)[:4]]
    script = Path(sys.argv[0]).name
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == script]
    return " <- ".join(chain) + (f" (line {lines[-1]} of {script})" if lines else "")


class Screen:
    """Shows what happens: a live line per running item on a terminal, and plain text that reads anywhere."""

    def __init__(self, category: Category) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace", line_buffering=True)
        self.console = make_console()
        self.category = category
        self.first_evidence: float | None = None
        self._begun = time.monotonic()
        self._running: dict[str, tuple[Item, float, str]] = {}
        plain = not self.console.is_terminal or self.console.is_dumb_terminal
        self._live = None if plain else Live(get_renderable=self._live_lines, console=self.console, transient=True)

    def open(self, session: Session) -> None:
        """Print what is evaluated and where, and begin the live lines."""
        facts = session.environment
        self.line(f"{self.category.id}  {self.category.title}", "bold")
        self.line(self.category.question, "italic")
        where = f"{facts['where']} {session.address}, Temporal {facts['server']}"
        with_what = f"SDK {facts['sdk']}, Python {facts['python']}, {facts['cpus']} cores"
        speed = f"{facts['speed']:.1f} times as slow as the reference machine"
        self.line(f"{where}; {with_what}, {speed}; seed {session.seed}", "dim")
        for remark in session.remarks:
            self.line(remark, "dim")
        if self._live:
            self._live.start()

    def begin(self, item: Item) -> None:
        self._running[item.id] = (item, time.monotonic(), "")

    def see(self, item: Item, evidence: Evidence) -> None:
        """Called for each piece of evidence as it comes."""
        if self.first_evidence is None:
            self.first_evidence = time.monotonic() - self._begun
        if item.id in self._running:
            self._running[item.id] = (*self._running[item.id][:2], evidence.claim)

    def end(self, result: Result) -> None:
        """Print an item's stars and evidence."""
        self._running.pop(result.item.id, None)
        self.line("")
        self.line(f"{result.item.id}  {result.item.title}  {self._stars(result.verdict)}", "bold")
        self.line(f"{self._verdict_words(result)}; {result.seconds:.1f} s", indent=2)
        for one in result.evidence:
            self._show(one)

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def summary(self, results: Sequence[Result], session: Session, seconds: float) -> None:
        """Print the category's table and what it amounts to."""
        self.close()
        self.line("")
        for result in results:
            verdict = result.verdict
            row = f"{result.item.id}  {self._stars(verdict)}  {result.item.title}"
            label = LABELS[verdict.stars] if verdict.stars else verdict.outcome.replace("_", " ")
            self.line(f"{row} - {label}", indent=0, hang=14)
        judged = [result.verdict.stars for result in results if result.verdict.stars]
        mean = f", mean {sum(judged) / len(judged):.1f}" if judged else ""
        count = collections.Counter(result.verdict.outcome for result in results)
        closed = [f"{one.item.id} {'passes' if one.passes else 'FAILS'}" for one in results if one.item.fail_closed]
        self.line(f"{len(judged)} judged{mean}, {count['inconclusive']} inconclusive, {count['not_run']} not run")
        if closed:
            self.line(f"Fail-closed (four stars or the overall rating is capped): {', '.join(closed)}")
        self.line(
            f"Server ready in {session.ready_after:.2f} s, first evidence after {self.first_evidence or 0:.1f} s, "
            f"all after {seconds:.1f} s",
            "dim",
        )

    def line(self, text: str, style: str = "", indent: int = 0, hang: int = 0) -> None:
        """Print a paragraph, wrapped at the width there is."""
        width = self.console.width
        hang = hang if width >= 60 else 2
        lines = wrapped(masked(text), width, indent, indent + hang)
        for one in lines:
            self.console.print(Text(one, style=style), soft_wrap=True)

    def _show(self, evidence: Evidence) -> None:
        mark, style = self._mark(evidence)
        claim = evidence.claim
        if evidence.held is None and evidence.kind in STAR_NEEDING:
            claim += f" (not run; it would have been needed for {STAR_NEEDING[evidence.kind]} stars)"
        if evidence.kind == "limit":
            claim += {True: f" (caps at {evidence.cap})", False: " (not seen here)", None: ""}[evidence.held]
        wide = self.console.width >= 60
        self.line(f"{mark} {evidence.kind:<8}{claim}", style, indent=2, hang=len(mark) + 9)
        self.line(evidence.measured, "dim", indent=len(mark) + 11 if wide else 4)

    def _mark(self, evidence: Evidence) -> tuple[str, str]:
        if evidence.held is None:
            return ("\u00b7" if self._unicode else "--"), ""
        if evidence.kind == "limit":
            seen = ("\u25b2" if self._unicode else "! ") if evidence.held else ("\u25b3" if self._unicode else "ok")
            return seen, "yellow" if evidence.held else "green"
        if evidence.held:
            return ("\u2713" if self._unicode else "ok"), "green"
        return ("\u2717" if self._unicode else "NO"), "red"

    def _stars(self, verdict: Verdict) -> str:
        return stars_text(verdict.stars, verdict.outcome, self._unicode)

    def _verdict_words(self, result: Result) -> str:
        verdict = result.verdict
        words = [LABELS[verdict.stars] if verdict.stars else verdict.outcome.replace("_", " ")]
        words += [verdict.stage] if verdict.stage else []
        words += ["fail-closed"] if result.item.fail_closed else []
        return f"{', '.join(words)}: {verdict.reason}"

    @property
    def _unicode(self) -> bool:
        return is_unicode(self.console)

    def _live_lines(self) -> RenderableType:
        lines: list[RenderableType] = []
        for item, begun, latest in list(self._running.values()):
            row = Table.grid(padding=(0, 1))
            head = f"{item.id} {time.monotonic() - begun:4.1f} s  {item.title}  "
            text = Text(head, no_wrap=True, overflow="ellipsis")
            text.append(masked(latest), style="dim")
            row.add_row(Spinner("dots" if self._unicode else "line"), text)
            lines.append(row)
        return Padding(Group(*lines), (1, 0, 0, 0)) if lines else Text("")


def make_console() -> Console:
    """A console for standard output; a closed pipe is an error here, and lines keep their length in a file."""

    class Strict(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    file = sys.stdout if sys.stdout is not None else devnull()
    width = None if file.isatty() or os.environ.get("COLUMNS") else 100
    return Strict(file=file, width=width, highlight=False, markup=False, emoji=False)


def devnull() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def is_unicode(console: Console) -> bool:
    """Whether stars and ticks can be shown: not in another encoding, nor where the locale is set to C."""
    locale = os.environ.get("LC_ALL") or os.environ.get("LANG") or ""
    return console.encoding.lower().startswith("utf") and locale not in ("C", "POSIX")


def stars_text(stars: int | None, outcome: str, unicode: bool) -> str:
    """Five places wide: the stars, or a question mark, or a dash for what was not run."""
    if stars is None:
        return f"{'?' if outcome == 'inconclusive' else '-':<5}"
    return ("\u2605" if unicode else "*") * stars + ("\u2606" if unicode else ".") * (5 - stars)


def wrapped(text: str, width: int, indent: int = 0, hang: int = 0) -> list[str]:
    """`text` in lines of at most `width` characters."""
    import textwrap

    width = max(width, hang + 10)
    lines = textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * hang)
    return lines or [""]


def parse(category: Category, arguments: Sequence[str]) -> argparse.Namespace:
    """The command line of a numbered script. Exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=f"{category.id}, {category.title}: {category.question}")
    parser.add_argument("items", nargs="*", metavar="ITEM", help="run only these, such as " + category.items[0].id)
    parser.add_argument("--list", action="store_true", help="name the items, and whether their lessons can be copied")
    parser.add_argument("--copy", metavar="ITEM", help="write the lesson of ITEM as a file that runs on its own")
    parser.add_argument("--json", metavar="FILE", help="write the verdicts and their evidence to FILE")
    parser.add_argument("--against", metavar="RUN", help="say what differs from a recorded run: a folder or a file")
    parser.add_argument("--accept", action="store_true", help="with --against: write this run in its place")
    parser.add_argument("--cluster", action="store_true", help="on a real cluster on this machine: see cluster.py")
    parser.add_argument("--keep-open", action="store_true", help="leave the embedded server and its Web UI up")
    parser.add_argument("--port", type=int, help="of the embedded server; its Web UI then has PORT + 1000")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="repeat a run's random faults")
    parser.add_argument("--profile", metavar="NAME", help="a TOML profile that names the server to evaluate")
    parser.add_argument("--no-cache", action="store_true", help="replay the whole history for every workflow task")
    parser.add_argument("--log", metavar="FILE", help="keep what server, workers and SDK log in FILE")
    for flag, meaning in category.flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=meaning)
    options = parser.parse_args(arguments)
    known = {item.id: item for item in category.items}
    asked = [*options.items, *([options.copy] if options.copy else [])]
    wrong = [name for name in asked if name.upper() not in known]
    if wrong:
        raise Unusable(f"There is no item {', '.join(wrong)} here: choose from {', '.join(known)}.")
    asked = [name.upper() for name in options.items]
    options.chosen = [item for item in category.items if not asked or item.id in asked]
    for option in ("json", "log"):
        check_writable(option, getattr(options, option))
    check_baseline(options.against, options.accept)
    return options


def script_of(category: Category) -> Path:
    """The script that declares a category."""
    return Path(inspect.getsourcefile(category.items[0].demonstrate) or sys.argv[0])


def listing(category: Category) -> str:
    """A line an item: its id, its title, how it is run, and how long the lesson is that --copy writes."""
    path = script_of(category)
    lessons = lessons_of(path.read_text(encoding="utf-8"))
    lines = []
    for item in category.items:
        lesson = lessons.get(item.id)
        notes = ["fail-closed"] if item.fail_closed else []
        notes += ["runs alone"] if item.alone else []
        notes += [f"lesson of {lesson.last - lesson.first + 1} lines"] if lesson and lesson.example else []
        lines.append(f"{item.id}  {item.title}" + (f" ({', '.join(notes)})" if notes else ""))
    from harness.record import age_of, recorded_here

    recorded = recorded_here()
    age = age_of(recorded) if recorded else None
    lines += [f"results/: {age}"] if age else []
    return "\n".join(lines) + "\n"


def copy(category: Category, item: str) -> str:
    """The lesson of an item as a file of its own. Raises Unusable where it has none that can be copied."""
    text = copy_of(script_of(category), item.upper())
    if text is None:
        raise Unusable(f"{item.upper()} has no lesson that stands on its own: read its section of the script.")
    return text


def check_baseline(path: str | None, accept: bool) -> None:
    """Raise Unusable before anything runs where --against names no record, or --accept has nothing to write to."""
    from harness.record import load_run

    if path is not None:
        load_run(Path(path))
    elif accept:
        raise Unusable("--accept is for --against RUN: name the run that this one is to replace.")


def check_writable(option: str, path: str | None) -> None:
    """Raise Unusable before anything runs, not after, when a file cannot be written."""
    if path is None:
        return
    new = not os.path.lexists(path)
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise Unusable(f"--{option} {path} cannot be written ({error.strerror}): name another file.") from None
    if new:
        os.unlink(path)


def evaluate(category: Category, new_session: Callable[[argparse.Namespace], Session]) -> NoReturn:
    """Evaluate a category's items as the command line asks, show and record the verdicts, exit.

    Exit status: 0 all that ran was judged and the fail-closed items pass; 1 one of these is not so;
    2 the command or the settings cannot be used; 128 plus the signal's number when ended by a signal.
    """
    try:
        mask_streams()
        load_settings()
        options = parse(category, sys.argv[1:])
        if options.list or options.copy:
            print(listing(category) if options.list else copy(category, options.copy), end="")
            leave(0)
        name_profile(options.profile)
        asyncio.run(_main(category, options, new_session))
    except Unusable as error:
        leave(refuse(error))
    raise AssertionError("_main ends the process")


def stop_signals() -> "asyncio.Future[int]":
    """The number of the first signal that asks this process to end."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()

    def stop(number: int) -> None:
        if not stopped.done():
            stopped.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop, number)
    return stopped


async def _main(
    category: Category, options: argparse.Namespace, new_session: Callable[[argparse.Namespace], Session]
) -> NoReturn:
    """Evaluate until done or until a signal comes; leave nothing behind either way.

    It does not return to asyncio.run(), which would wait for tasks that an item left behind and that
    may never end.
    """
    stopped = stop_signals()
    screen = Screen(category)
    ticker = Ticker()
    session = new_session(options)
    try:
        work = asyncio.create_task(_evaluate(options, session, screen, ticker))
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            leave_with = work.result()
            if options.keep_open:
                await session.stay(screen.line, stopped)
        else:
            screen.close()
            work.cancel()  # what still runs shall not make anything new
            await asyncio.wait({work}, timeout=5)
            for words in await session.tidy():
                print(words, file=sys.stderr)
            print(f"{signal.Signals(stopped.result()).name}: stopped, workers and servers ended", file=sys.stderr)
            leave_with = 128 + stopped.result()
    except Unusable as error:
        leave_with = refuse(error)
    except BrokenPipeError:
        sys.stdout = devnull()  # what is still buffered for the closed pipe is lost
        leave_with = 128 + signal.SIGPIPE
    except Exception:
        traceback.print_exc()
        leave_with = 1
    finally:
        with contextlib.suppress(BrokenPipeError):
            screen.close()
        session.close()
    leave(leave_with)


def refuse(error: Unusable) -> int:
    """Say in one sentence why nothing is run. Returns the exit status for it."""
    print(f"{Path(sys.argv[0]).name}: {redacted(str(error))}", file=sys.stderr)
    return 2


async def _evaluate(options: argparse.Namespace, session: Session, screen: Screen, ticker: Ticker) -> int:
    """Run the chosen items side by side, and those that measure alone after them. Returns the exit status."""
    begun = time.monotonic()
    await session.open()
    session.environment["speed"] = round(ticker.at_start, 2)
    screen.open(session)
    room = Room(screen.category.at_once)

    async def shown(item: Item) -> Result:
        async with room.enter(item.alone):
            screen.begin(item)
            result = await run_item(item, session, screen.see, ticker)
            if result.verdict.outcome == "inconclusive" and session.environment["where"] == "given server":
                result = second_try(result, await run_item(item, session, screen.see, ticker))
            screen.end(result)
            return result

    # Those that are given more time take more of it: they begin first, so that they do not end last.
    together = sorted((item for item in options.chosen if not item.alone), key=lambda item: -item.seconds)
    found = list(await asyncio.gather(*(shown(item) for item in together)))
    found += [await shown(item) for item in options.chosen if item.alone]
    results = sorted(found, key=lambda result: options.chosen.index(result.item))
    left = await session.tidy()
    screen.summary(results, session, time.monotonic() - begun)
    for line in left:
        screen.line(line)
    session.environment["cpu_seconds"] = session.cpu_seconds()
    record = record_of(screen.category, session, results)
    if options.json:
        write_json(options.json, record)
    passes = all(result.passes for result in results)
    differs = options.against and against(options.against, screen.category, record, options.accept, screen)
    return 0 if passes and not differs else 1


def second_try(first: Result, second: Result) -> Result:
    """The second run of an item that came to no verdict on somebody else's server, and says so.

    What stands before such a server may end connections and take tasks along that were on their way. A verdict, good or
    bad, is never asked for again.
    """
    reason = f"{second.verdict.reason}; run a second time, for the first was inconclusive: {first.verdict.reason}"
    return replace(second, verdict=replace(second.verdict, reason=reason), seconds=first.seconds + second.seconds)


def record_of(category: Category, session: Session, results: Sequence[Result]) -> dict[str, Any]:
    """The verdicts with their evidence and the environment they were seen in: see docs/record.schema.json."""
    record = {
        "schema": SCHEMA,
        "category": category.id,
        "title": category.title,
        "environment": session.environment,
        "items": [result.as_json() for result in results],
    }
    masked_record: dict[str, Any] = masked_all(record)
    return masked_record


def write_json(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1, ensure_ascii=False)
        file.write("\n")


def accept_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record in an older one's place; items that did not run this time stay as they were recorded."""
    kept = json.loads(file.read_text(encoding="utf-8"))["items"] if file.exists() else []
    ran = {item["id"]: item for item in record["items"]}
    items = {item["id"]: item for item in kept} | ran
    write_json(file, {**record, "items": [items[id] for id in sorted(items)]})


def against(path: str, category: Category, record: Mapping[str, Any], accept: bool, screen: Screen) -> int:
    """Show what differs from a recorded run. Returns the exit status: 1 where something was lost, or it is stale.

    `accept` writes the new record in its place, and then nothing is stale.
    """
    from harness.compare import compare, lines_of, status_of
    from harness.record import CategoryRecord, Run, load_run

    there, here = load_run(Path(path)), Run("this run", [CategoryRecord.model_validate(record)])
    changes = compare(there, here)
    for style, text in lines_of(there, here, changes):
        screen.line(text, style, hang=7)
    if not accept:
        return status_of(changes)
    file = Path(path) / f"{script_of(category).stem}.json" if Path(path).is_dir() else Path(path)
    accept_record(file, record)
    screen.line(f"Accepted: {file}")
    return 0
