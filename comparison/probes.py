"""What the comparison's scripts share: ten probes, a ledger outside every system, a table, a star rule.

A script `on_NAME.py` holds the programs that a user of that system would write, and nothing about
probing. The probes below know nothing of any system: they start those programs as processes of their
own, kill them with SIGKILL, start them again, and read in the ledger what really ran.

1. Programs     what a user's program may call: the body of every step, and the versions of its steps
2. Processes    starting them, killing them, leaving none behind
3. Probes       what is done to every system alike, and what is looked at
4. Stars        seven rows that follow from what the probes saw
5. Output       the table, the record, the command line
"""

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.metadata
import io
import itertools
import json
import os
import platform
import random
import re
import resource
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tokenize
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]  # stubs are not everywhere

PROBES = {
    1: "SIGKILL after step 3 of 5",
    2: "SIGKILL inside step 3",
    3: "human answer across a restart",
    4: "replay of a finished run",
    5: "program changed under a run",
    6: "200 no-op steps",
    7: "5 s timer across a kill",
    8: "retry with two failures",
    9: "20 runs, three random kills",
    10: "size, import time, lines",
}
FIVE = ("s1", "s2", "s3", "s4", "s5")
# What a new release may do to a run that stands before step 4.
VERSIONS = {
    "old": FIVE,
    "inserted": ("s1", "s2", "s2b", "s3", "s4", "s5"),
    "renamed done": ("s1", "s2", "s3new", "s4", "s5"),
    "renamed next": ("s1", "s2", "s3", "s4new", "s5"),
    "swapped": ("s1", "s3", "s2", "s4", "s5"),
}
STEPS = 200
RUNS = 20
TIMER = 5.0
KILLED_AFTER = 3.0  # of those

# No system may phone home while it is being looked at.
NO_TELEMETRY = {
    "DO_NOT_TRACK": "1",
    "RESTATE_DISABLE_TELEMETRY": "true",
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_DISABLE_TRACKING": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "OTEL_SDK_DISABLED": "true",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
    "ANONYMIZED_TELEMETRY": "false",
}


# 1. Programs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a process is told: which program, where its store and its ledger are, how it shall fail."""

    folder: str  # everything of one probe of one column: ledger, store, logs
    column: str = ""
    phase: str = "start"  # start a run; up: only start the program again; resume: continue it by hand
    version: str = "old"
    run: str = "run"
    runs: int = 1
    door: str = ""  # the process kills itself before it begins this step, once
    hang: str = ""  # this step never ends, once, so that it can be killed inside
    seconds: float = 0  # how long each step takes
    server: Mapping[str, int] = field(default_factory=dict)  # the ports of the system's server
    server_pid: int = 0
    repeats: int = 3  # how often the timing probe measures
    port: int = 0  # a free port for the program itself

    @property
    def steps(self) -> Sequence[str]:
        return VERSIONS.get("inserted" if self.version == "remedy" else self.version, FIVE)

    @property
    def names(self) -> Sequence[str]:
        """The ids of the runs."""
        return [self.run] if self.runs == 1 else [f"{self.run}-{number}" for number in range(self.runs)]

    def file(self, name: str) -> str:
        return str(Path(self.folder) / name)


PLAN = Plan(**json.loads(os.environ.get("COMPARISON_PLAN", '{"folder": "."}')))


@dataclass(frozen=True)
class Line:
    """One line of the ledger: when, in which run, which step, and what: begin, end, or a word."""

    time: float
    run: str
    step: str
    event: str


class Ledger:
    """A file that every step writes to before and after it acts. No system knows of it."""

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / "ledger"

    def note(self, run: str, step: str, event: str) -> None:
        """Append a line in one write, which a SIGKILL of this process cannot take back."""
        line = json.dumps([time.time(), run, step, event]) + "\n"
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def lines(self) -> list[Line]:
        if not self._path.exists():
            return []
        return [Line(*json.loads(one)) for one in self._path.read_text(encoding="utf-8").splitlines()]

    def events(self, event: str, run: str | None = None) -> list[str]:
        """The steps of which `event` was noted, in order."""
        return [one.step for one in self.lines() if one.event == event and run in (None, one.run)]

    def first(self, step: str, event: str) -> float:
        return next(one.time for one in self.lines() if (one.step, one.event) == (step, event))

    def last(self, step: str, event: str) -> float:
        return [one.time for one in self.lines() if (one.step, one.event) == (step, event)][-1]


def once(name: str) -> bool:
    """True for the first caller of all processes of this probe."""
    try:
        os.close(os.open(PLAN.file(f"once-{name}"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def note(run: str, step: str, event: str) -> None:
    Ledger(PLAN.folder).note(run, step, event)


def work(run: str, step: str) -> str:
    """The body of every step in every system: note the begin, take a while, note the end."""
    if step == PLAN.door and once("door"):
        os.kill(os.getpid(), signal.SIGKILL)
    note(run, step, "begin")
    if step == PLAN.hang and once("hang"):
        time.sleep(3600)
    time.sleep(PLAN.seconds)
    note(run, step, "end")
    return step


def fail_twice(run: str, step: str) -> str:
    """A step that works at its third attempt."""
    note(run, step, "begin")
    if Ledger(PLAN.folder).events("begin", run).count(step) < 3:
        raise ConnectionError("not yet")
    note(run, step, "end")
    return step


def measure(run_steps: Callable[[int], Any]) -> list[dict[str, float]]:
    """Run `run_steps(STEPS)` a few times after a warm-up; seconds and CPU seconds of all who took part."""

    def servers() -> Iterator[psutil.Process]:
        if PLAN.server_pid:
            yield psutil.Process(PLAN.server_pid)
            yield from psutil.Process(PLAN.server_pid).children(recursive=True)

    def cpu() -> float:
        ours, theirs = os.times(), 0.0
        for one in servers():
            with contextlib.suppress(psutil.Error):
                theirs += sum(one.cpu_times()[:2])
        return ours.user + ours.system + theirs

    run_steps(5)
    seen = []
    for _ in range(PLAN.repeats):
        begun, used = time.perf_counter(), cpu()
        run_steps(STEPS)
        seen.append({"seconds": time.perf_counter() - begun, "cpu": cpu() - used})
    return seen


def run_child(module: str, function: str) -> None:
    """What a started process does: import the script, run one of its functions, leave its answer in a file."""
    answer: dict[str, Any]
    try:
        program = importlib.import_module(module)
        value = None if function == "nothing_to_do" else getattr(program, function)()
        answer = {"value": value}
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        answer = {"error": f"{type(error).__name__}: {text}"}
    target = os.environ["COMPARISON_ANSWER"]
    Path(target + ".part").write_text(json.dumps(answer), encoding="utf-8")
    os.replace(target + ".part", target)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads and native code of the system under test may not hold the process up


# 2. Processes ----------------------------------------------------------------------------------------


class Inconclusive(Exception):
    """A probe did not come to an end: it earns nothing and says why."""


class NotRun(Exception):
    """What the system needs is not installed here; the text says what to do."""


class Guard:
    """Ends what this script started, even when the script itself is killed by SIGKILL.

    A second interpreter waits for the end of a pipe that ends with the script. Then it kills the process
    groups it was told of, and removes the folder.
    """

    CODE = """
import os, shutil, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-S", "-E", "-c", self.CODE, str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._lock = threading.Lock()
        self._closed = False

    def start(self, command: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path) -> subprocess.Popen[bytes]:
        """Start a process in a group of its own, which is killed when this script ends."""
        with self._lock:
            if self._closed:
                raise Inconclusive("stopped")
            with log.open("ab") as out:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, cwd=cwd, start_new_session=True
                )
            self._tell("+", process.pid)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL for the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with self._lock:
            if not self._closed:
                self._tell("-", process.pid)

    def close(self) -> None:
        """Kill what is left, remove the folder, and allow nothing to be started any more."""
        with self._lock:
            self._closed = True
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(20)

    def _tell(self, sign: str, group: int) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{sign}{group}\n".encode())
        self._process.stdin.flush()


# How much longer than on an idle machine things may take here; set once, from the start of a first process.
PACE = {"seconds": 0.0}


def until(condition: Callable[[], Any], seconds: float) -> bool:
    """Wait for `condition`, at most so long and what a slow start adds. True when it came."""
    end = time.monotonic() + seconds + PACE["seconds"]
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def free_port() -> int:
    """A loopback port nobody listens on, below the range that outgoing connections draw from."""
    while True:
        port = 15000 + secrets.randbelow(17000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
        return True
    return False


def environment(folder: Path) -> dict[str, str]:
    """The environment of every process under test: no telemetry, and a home folder that goes with the run."""
    home = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "CREWAI_STORAGE_DIR": str(folder / "crewai")}
    # The user's own keys, projects and endpoints are nobody's business here.
    mine = ("LANGCHAIN_", "LANGSMITH_", "OPENAI_", "TEMPORAL_", "RESTATE_", "DBOS_", "CREWAI_", "OTEL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
    return kept | NO_TELEMETRY | home


class Child:
    """A process that runs one function of a system's script."""

    def __init__(self, bench: "Bench", function: str, plan: Plan) -> None:
        self._bench = bench
        self.name = f"{function}-{plan.phase}-{plan.version}".replace(" ", "-")
        folder = Path(plan.folder)
        self._answer = folder / f"answer-{secrets.token_hex(4)}"
        self.log = folder / f"{self.name}.log"
        env = environment(folder) | {
            "COMPARISON_PLAN": json.dumps(asdict(plan)),
            "COMPARISON_ANSWER": str(self._answer),
        }
        module = bench.system.script.stem
        command = [sys.executable, str(Path(__file__).resolve()), "--child", module, function]
        self._process = bench.guard.start(command, self.log, env, folder)

    @property
    def over(self) -> bool:
        return self._process.poll() is not None

    @property
    def said(self) -> dict[str, Any]:
        """{"value": ...} or {"error": ...} when the function came to its end, else nothing."""
        if not self._answer.exists():
            return {}
        said: dict[str, Any] = json.loads(self._answer.read_text(encoding="utf-8"))
        return said

    def kill(self) -> None:
        self._bench.guard.kill(self._process)

    def result(self, seconds: float = 60) -> dict[str, Any]:
        """What the function said, once it is over. Raises Inconclusive when it does not end."""
        if not until(lambda: self.over, seconds):
            raise Inconclusive(f"{self.name} did not end within {seconds:.0f} s; {self.tail()}")
        if not self.said:
            raise Inconclusive(f"{self.name} ended without an answer; {self.tail()}")
        return self.said

    def value(self, seconds: float = 60) -> Any:
        """The function's value; an error of it makes the probe inconclusive."""
        said = self.result(seconds)
        if "error" in said:
            raise Inconclusive(f"{self.name}: {said['error'][:300]}")
        return said["value"]

    def tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split() if self.log.exists() else []
        return "log: ..." + " ".join(lines)[-300:]


@dataclass
class Server:
    """The system's own server on loopback: a command, the ports it listens on, and a check that it is ready."""

    command: Callable[[Path, Mapping[str, int], str], Sequence[str]]  # folder, ports, column
    ports: Sequence[str]
    ready: str  # the port that answers once it is ready
    env: Callable[[Path, Mapping[str, int]], Mapping[str, str]] = lambda folder, ports: {}
    healthy: Callable[[Mapping[str, int]], bool] = lambda ports: True


@dataclass(frozen=True)
class System:
    """A system under test, as its script describes it."""

    name: str
    title: str
    columns: Sequence[str]  # the modes that matter; one column each
    packages: Sequence[str]  # distributions whose version and licence are shown, the main one first
    imports: str  # the statement whose time is taken
    focus: str  # main focus in words
    store: str
    server: Server | None = None
    servers: Mapping[str, Server | None] = field(default_factory=dict)  # of a column, where it has one of its own
    stores: Mapping[str, str] = field(default_factory=dict)  # likewise
    needs: Mapping[str, Callable[[], None]] = field(default_factory=dict)  # column -> raises NotRun
    server_version: Callable[[], Mapping[str, str]] = dict  # what runs beside the packages -> its version
    server_licence: Callable[[], str] = lambda: ""
    server_file: Callable[[], Path | None] = lambda: None
    check: Callable[[], None] = lambda: None  # raises NotRun
    llm: Mapping[str, str] = field(default_factory=dict)  # what an LLM user looks for -> module:name
    companion: str = ""  # the vendor's own package that integrates an agent framework, where it is not the package
    elsewhere: str = ""  # what pip does not bring
    not_counted: Sequence[str] = ()  # distributions that only the probes, or another column, need
    by_hand: bool = False  # nothing runs that could continue a run unasked; probe 1 makes sure
    knows_state: bool = True  # there is a record that says whether a run is finished: the script has a state()
    remedy: str = ""  # how the documentation wants a program changed under a run
    retry: str = ""  # module:name of the retry policy, if the package has one
    only: Mapping[str, Sequence[int]] = field(default_factory=dict)  # column -> its probes, where not all

    @property
    def script(self) -> Path:
        return Path(__file__).resolve().with_name(f"on_{self.name}.py")

    def server_of(self, column: str) -> Server | None:
        return self.servers.get(column, self.server)

    def store_of(self, column: str) -> str:
        return self.stores.get(column, self.store)


class Bench:
    """One probe of one column: a folder, a ledger, a server of its own, and the processes it starts."""

    def __init__(self, system: System, column: str, folder: Path, guard: Guard, seed: int) -> None:
        self.system, self.column, self.guard = system, column, guard
        self.random = random.Random(f"{seed}")
        folder.mkdir(parents=True)
        self.folder = folder
        self.ledger = Ledger(folder)
        self.children: list[Child] = []
        self._server = system.server_of(column)
        self._ports = {name: free_port() for name in self._server.ports} if self._server else {}
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start_server()

    def start_server(self) -> None:
        server = self._server
        if server is None:
            return
        env = environment(self.folder) | dict(server.env(self.folder, self._ports))
        command = server.command(self.folder, self._ports, self.column)
        self._process = self.guard.start(command, self.folder / "server.log", env, self.folder)
        if not until(lambda: answers(self._ports[server.ready]) and server.healthy(self._ports), 60):
            log = (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")
            raise Inconclusive(f"the server was not ready within 60 s: {log[-300:]}")

    def kill_server(self) -> bool:
        """SIGKILL for the server, and the same server again on its files. False when there is none."""
        if self._process is None:
            return False
        self.guard.kill(self._process)
        self.start_server()
        return True

    def spawn(self, function: str, **options: Any) -> Child:
        pid = self._process.pid if self._process else 0
        plan = Plan(str(self.folder), self.column, server=self._ports, server_pid=pid, port=self._port)
        child = Child(self, function, replace(plan, **options))
        self.children.append(child)
        return child

    def close(self) -> None:
        for child in self.children:
            child.kill()
        if self._process:
            self.guard.kill(self._process)


# 3. Probes -------------------------------------------------------------------------------------------


def again(bench: Bench) -> list[str]:
    """The steps that had ended and were begun once more."""
    ended: set[str] = set()
    repeated = []
    for line in bench.ledger.lines():
        if line.event == "begin" and line.step in ended:
            repeated.append(line.step)
        if line.event == "end":
            ended.add(line.step)
    return repeated


def ended(bench: Bench, step: str) -> bool:
    return step in bench.ledger.events("end")


def bring_back(bench: Bench, done: Callable[[], bool], function: str, bound: float = 30, **plan: Any) -> dict[str, Any]:
    """Start the program again, and only where that does nothing do what its user must do by hand.

    Probe 1 tries the first with every system. Where nothing is there that could go on by itself, the
    other probes go straight to the second.
    """
    begun, at = time.monotonic(), time.time()
    by_itself, error, over = False, "", True
    both = plan.pop("both", False)
    if both or not bench.system.by_hand:
        up = bench.spawn(function, phase="up", **plan)
        until(lambda: done() or up.over, bound)
        by_itself, error, over = done(), up.said.get("error", ""), up.over
        up.kill()
    if not by_itself and over and not error:
        hand = bench.spawn(function, phase="resume", **plan)
        if not until(lambda: hand.over, bound):
            raise Inconclusive(f"{hand.name} did not end within {bound:.0f} s; {hand.tail()}")
        error = hand.said.get("error", "")
    seconds = time.monotonic() - begun
    return {"finished": done(), "by_itself": by_itself, "error": error[:300], "seconds": seconds, "begun": at}


def kill_after_three(bench: Bench) -> dict[str, Any]:
    """The process dies as it enters step 4: step 3 has ended, step 4 has not begun."""
    child = bench.spawn("five", door="s4")
    if not until(lambda: child.over, 60) or child.said:
        raise Inconclusive(f"the process was not killed before step 4; {child.said} {child.tail()}")
    facts = bring_back(bench, lambda: ended(bench, "s5"), "five", both=True)
    del facts["begun"]
    return facts | {"again": again(bench), "after": after_kill(bench, "s3")}


def after_kill(bench: Bench, step: str) -> list[str]:
    """The steps begun after `step` was first begun, in order."""
    begun = bench.ledger.events("begin")
    return begun[begun.index(step) + 1 :] if step in begun else begun


def kill_inside_three(bench: Bench) -> dict[str, Any]:
    """The process is killed while step 3 is under way and has been for half a second."""
    child = bench.spawn("five", hang="s3")
    if not until(lambda: "s3" in bench.ledger.events("begin"), 60):
        raise Inconclusive(f"step 3 did not begin; {child.tail()}")
    time.sleep(0.5)
    child.kill()
    facts = bring_back(bench, lambda: ended(bench, "s5"), "five")
    del facts["begun"]
    return facts | {"again": again(bench), "after": after_kill(bench, "s3")}


def human_answer(bench: Bench) -> dict[str, Any]:
    """Everything dies while a run waits for a human. The answer comes while no program runs."""
    child = bench.spawn("human")
    if not until(lambda: "asked" in bench.ledger.events("asked"), 60):
        raise Inconclusive(f"the run did not come to wait; {child.tail()}")
    child.kill()
    server = bench.kill_server()
    begun = time.monotonic()

    def done() -> bool:
        return ended(bench, "publish yes")

    bench.spawn("answer").value()
    answerer_ran_it = done()
    if not answerer_ran_it:
        up = bench.spawn("human", phase="up")
        until(lambda: done() or up.over, 30)
    return {
        "finished": done(),
        "again": again(bench),
        "by_itself": done() and not answerer_ran_it,
        "server_killed": server,
        "seconds": time.monotonic() - begun,
    }


def replay(bench: Bench) -> dict[str, Any]:
    """A finished run is replayed from its record, first by the same program, then by one with two steps swapped."""
    bench.spawn("five").value()
    steps = len(bench.ledger.events("begin"))
    same = bench.spawn("replay").result()
    ran_same = bench.ledger.events("begin")[steps:]
    swapped = bench.spawn("replay", version="swapped").result()
    ran_swapped = bench.ledger.events("begin")[steps + len(ran_same) :]
    return {
        "error": same.get("error", "")[:200],
        "ran": ran_same,
        "recorded": list(same.get("value") or []),
        "noticed": swapped.get("error", "")[:200],
        "ran_swapped": ran_swapped,
    }


def judge_change(finished: bool, error: str, seen: Sequence[str]) -> str:
    """What became of a run in flight under a changed program. `seen`: every step that began, in order."""
    if not finished:
        return "noticed" if error else "stuck silently"
    if error:
        return "finished with an error"
    counted = Counter(step.removesuffix("new") for step in seen if step != "s2b")
    if any(counted[step] > 1 for step in FIVE):
        return "done twice"
    if any(counted[step] == 0 for step in FIVE):
        return "step lost silently"
    if "s2b" in seen and list(seen).index("s2b") > list(seen).index("s3"):
        return "out of order"
    return "accepted"


def one_change(bench: Bench, version: str) -> dict[str, Any]:
    child = bench.spawn("five", door="s4", seconds=0.1)
    if not until(lambda: child.over, 60) or child.said:
        raise Inconclusive(f"the process was not killed before step 4; {child.said} {child.tail()}")
    facts = bring_back(bench, lambda: ended(bench, "s5"), "five", 12, version=version, seconds=0.1)
    # The system's own word counts: a run that it calls completed is finished, whatever the ledger says.
    if bench.system.knows_state:
        state = bench.spawn("state", version=version).value()
    else:  # it keeps no state of a run; all it says is that the call came back
        state = {"finished": not facts["error"], "error": ""}
    finished = facts["finished"] or state["finished"]
    error = facts["error"] or state["error"]
    outcome = judge_change(finished, "" if finished else error, bench.ledger.events("begin"))
    after = after_kill(bench, "s3")
    heals = None
    if not finished:
        healed = bring_back(bench, lambda: ended(bench, "s5"), "five", 30, seconds=0.1)
        heals = healed["finished"]
    return {"outcome": outcome, "error": error[:200], "heals": heals, "after": after}


def timing(bench: Bench) -> dict[str, Any]:
    """200 steps that do nothing, one after the other and side by side; three times each."""
    facts: dict[str, Any] = {}
    for shape in ("sequential", "parallel"):
        said = bench.spawn("many", version=shape, repeats=REPEATS["timing"]).result(150)
        if "error" in said:  # it cannot do 200 steps in a run: that is what its user would see as well
            facts[shape] = {"error": said["error"][:200]}
            continue
        seen = said["value"]
        facts[shape] = summed_up(
            [one["seconds"] / STEPS * 1000 for one in seen], [one["cpu"] / STEPS * 1000 for one in seen]
        )
    return facts


REPEATS = {"timing": 3}


def summed_up(ms: Sequence[float], cpu: Sequence[float]) -> dict[str, Any]:
    """What repeated measurements of a step's milliseconds say: the median, the spread, and each of them."""
    seen = {"ms": statistics.median(ms), "min": min(ms), "max": max(ms), "cpu_ms": statistics.median(cpu)}
    return seen | {"all": list(ms), "all_cpu": list(cpu)}


def merged(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of one column's timing probe from several turns; a turn that failed is what is said."""
    facts: dict[str, Any] = {}
    for shape in ("sequential", "parallel"):
        seen = [turn[shape] for turn in turns]
        failed = next((one for one in seen if "error" in one), None)
        facts[shape] = failed or summed_up(
            [ms for one in seen for ms in one["all"]], [ms for one in seen for ms in one["all_cpu"]]
        )
    return facts


def timer(bench: Bench) -> dict[str, Any]:
    """The process is killed three seconds into a wait of five, and started again at once."""
    spawned = time.time()
    child = bench.spawn("timer")
    if not until(lambda: ended(bench, "before"), 60):
        raise Inconclusive(f"the wait did not begin; {child.tail()}")
    time.sleep(max(0, bench.ledger.first("before", "end") + KILLED_AFTER - time.time()))
    child.kill()
    facts = bring_back(bench, lambda: ended(bench, "after"), "timer", 40)
    restarted = facts.pop("begun")
    if facts["finished"]:
        rang = bench.ledger.last("after", "begin")
        facts["late"] = rang - bench.ledger.first("before", "end") - TIMER
        facts["after_restart"] = rang - restarted
        facts["start"] = bench.ledger.first("before", "begin") - spawned  # what a start takes on this machine
        if facts["late"] >= KILLED_AFTER and TIMER / 2 <= facts["after_restart"] - facts["start"] < TIMER - 1:
            raise Inconclusive(f"the machine is too slow to tell a timer that was kept from one started again: {facts}")
    return facts | {"again": again(bench)}


def retry(bench: Bench) -> dict[str, Any]:
    """A step fails twice and then works; the system's own retry policy is used, if it has one."""
    said = bench.spawn("flaky").result()
    begun = [line.time for line in bench.ledger.lines() if line.event == "begin"]
    gaps = [second - first for first, second in itertools.pairwise(begun)]
    native = bool(bench.system.retry) and not usable(bench.system.retry)
    return {
        "finished": ended(bench, "flaky"),
        "attempts": len(begun),
        "gaps": gaps,
        "native": native,
        "error": said.get("error", "")[:200],
    }


def chaos(bench: Bench) -> dict[str, Any]:
    """20 runs start together; their process is killed three times, at moments drawn from the seed."""
    plan: dict[str, Any] = {"runs": RUNS, "seconds": 0.1}
    moments = sorted(bench.random.sample(range(10, 85), 3))
    kills = 0
    by_itself = not bench.system.by_hand
    begun = time.monotonic()

    def progress() -> int:
        return len({(line.run, line.step) for line in bench.ledger.lines() if line.event == "end"})

    child = bench.spawn("five", **plan)
    # A kill counts only once all runs have begun: what was never accepted cannot be lost.
    if not until(lambda: len({line.run for line in bench.ledger.lines()}) == RUNS or child.over, 60):
        raise Inconclusive(f"not all runs began; {child.tail()}")
    for moment in [*moments, RUNS * len(FIVE)]:
        reached = until(lambda: progress() >= moment or child.over, 90)  # noqa: B023
        if not reached or progress() < moment:
            break
        if moment < RUNS * len(FIVE):
            kills += 1
            child.kill()
            child = bench.spawn("five", phase="up" if by_itself else "resume", **plan)
    return count_chaos(bench.ledger.lines()) | {
        "by_itself": by_itself,
        "kills": kills,
        "error": child.said.get("error", "")[:300],
        "seconds": time.monotonic() - begun,
    }


def count_chaos(lines: Sequence[Line]) -> dict[str, Any]:
    """Lost: steps that never ended. Twice: begun again although the run had gone on to a later step.

    Where a kill comes between the end of a step and its record, nobody can know that it ended: such a
    step, after which no later one had begun, is counted apart. Nameless: steps begun for no run that was started.
    """
    known = {f"run-{number}" for number in range(RUNS)}
    ends: set[tuple[str, str]] = set()
    reached: dict[str, int] = {}  # run -> the furthest step that began
    twice = unreported = nameless = 0
    for line in lines:
        if line.run not in known:
            nameless += line.event == "begin"
            continue
        position = FIVE.index(line.step)
        if line.event == "end":
            ends.add((line.run, line.step))
        elif (line.run, line.step) in ends:
            twice += reached[line.run] > position
            unreported += reached[line.run] == position
        reached[line.run] = max(position, reached.get(line.run, 0))
    finished = sum(all((f"run-{number}", step) in ends for step in FIVE) for number in range(RUNS))
    lost = RUNS * len(FIVE) - len(ends)
    return {"finished": finished, "lost": lost, "twice": twice, "unreported": unreported, "nameless": nameless}


CHECK = """
import importlib, inspect, operator, sys, warnings
module, _, name = sys.argv[1].partition(":")
warnings.simplefilter("ignore")
thing = operator.attrgetter(name)(importlib.import_module(module))
sys.exit(3 if inspect.isabstract(thing) else 4 if hasattr(thing, "__deprecated__") else 0)
"""
WHY_NOT = {3: "is abstract", 4: "is deprecated"}


def usable(place: str, python: Sequence[str] = (sys.executable,)) -> str:
    """Why `module:name` is of no use here: it cannot be imported, is abstract or deprecated. Empty where it is."""
    if not place:
        return "there is none"
    done = subprocess.run(
        [*python, "-W", "ignore", "-c", CHECK, place],
        env={**os.environ, **NO_TELEMETRY},
        capture_output=True,
        timeout=300,
        check=False,
    )
    if done.returncode in (0, -6, -11, 134, 139):  # natives may crash while they are torn down
        return ""
    return WHY_NOT.get(done.returncode, "cannot be imported")


def usable_with(companion: str, place: str) -> str:
    """The same in a new environment that holds only the vendor's companion package."""
    run = ["uv", "run", "--no-project", "--quiet", "--isolated", "--with", companion, "python"]
    return usable(place, run)


def size(bench: Bench) -> dict[str, Any]:
    """Megabytes on disk without bytecode, seconds to import in a new process, lines and names of user code."""
    installed = installed_bytes(("psutil", *bench.system.not_counted))
    server = bench.system.server_file()
    binary = server.stat().st_size if server else 0
    seconds, cpu = [], []
    for _ in range(3):
        begun, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", bench.system.imports],
            env=environment(bench.folder),
            cwd=bench.folder,
            capture_output=True,
            timeout=120,
            check=False,
        )
        if done.returncode not in (0, -6, -11, 134, 139):
            raise Inconclusive(f"import failed: {done.stderr.decode()[-200:]}")
        seconds.append(time.perf_counter() - begun)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)
    code = user_code(bench.system.script.read_text(encoding="utf-8"))
    llm = {name: usable(place) for name, place in bench.system.llm.items()}
    if bench.system.companion:
        package, _, place = bench.system.companion.partition(" ")
        llm[FRAMEWORK] = usable_with(package, place)
    return {
        "packages_mb": installed / 1e6,
        "server_mb": binary / 1e6,
        "import": statistics.median(seconds),
        "import_min": min(seconds),
        "import_max": max(seconds),
        "import_cpu": min(cpu),
        "lines": code.lines,
        "names": sorted(code.names),
        "elsewhere": bench.system.elsewhere,
        "llm": {name: not why for name, why in llm.items()},
        "llm_why": {name: f"{bench.system.llm[name]} {why}".strip() for name, why in llm.items() if why},
    }


FRAMEWORK = "agent framework integration"


def installed_bytes(apart: Sequence[str]) -> int:
    """Bytes of the files that the installed distributions brought, but for bytecode and the distributions `apart`."""
    total = 0
    for one in importlib.metadata.distributions():
        if one.name.lower() in apart:
            continue
        for file in one.files or ():
            if "__pycache__" not in file.parts and ".." not in file.parts:
                with contextlib.suppress(OSError):
                    total += os.stat(str(one.locate_file(file))).st_size
    return total


@dataclass(frozen=True)
class UserCode:
    """What a user writes: lines a region, and the names of the system's API that they use."""

    lines: Mapping[str, int]
    names: frozenset[str]


SWITCHES = ("phase", "version", "column")  # what only the probes turn


def user_code(source: str) -> UserCode:
    """Count what stands between `# user code: NAME` and `# end`, by one rule for all systems.

    A line counts unless it is blank, a comment or a docstring, asks the plan for what only the probes turn (phase,
    version, column), writes to the ledger, or is marked `# harness`: a setting of the test. Imports count as setup
    wherever they stand, those of Python itself and of the probes not at all; `# only: REGION` names another region.
    A name counts when the code imports it from other than Python itself or the probes, or when it is an attribute
    that neither Python's own types and modules nor the code's own classes have: StateGraph, invoke, defn, recv.
    """
    tree = ast.parse(source)
    regions: dict[int, str] = {}
    region = ""
    for number, raw in enumerate(source.splitlines(), 1):
        line = raw.strip()
        if line.startswith("# user code: "):
            region = line.removeprefix("# user code: ")
        elif line == "# end":
            region = ""
        elif region and not line.endswith("# harness"):
            regions[number] = region
        if "# only: " in line:
            regions[number] = line.partition("# only: ")[2]
    texts = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                if is_plain(node) or texts[number - 1].endswith("# harness"):
                    regions.pop(number, None)
                else:
                    regions.setdefault(number, "setup")
    written: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            written.update(range(token.start[0], token.end[0] + 1))
    written -= harness_lines(tree)
    lines = Counter(regions[number] for number in sorted(written) if number in regions)
    inside = [node for node in ast.walk(tree) if getattr(node, "lineno", 0) in regions]
    imported: set[str] = set()
    plain: set[str] = {"probes", "postgres", "PLAN"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {(one.asname or one.name).partition(".")[0] for one in node.names}
            (plain if is_plain(node) else imported).update(names)
    own = {node.name for node in inside if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    attributes = [node for node in inside if isinstance(node, ast.Attribute)]
    own |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    own |= {node.target.id for node in inside if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    known = {name for kind in (str, list, dict, set, int, float, Path, type, Exception) for name in dir(kind)}
    found = {node.id for node in inside if isinstance(node, ast.Name) and node.id in imported}
    for node in attributes:
        if root_of(node) not in plain and node.attr not in known | own:
            found.add(node.attr)
    return UserCode(dict(lines), frozenset(found))


def root_of(node: ast.expr) -> str:
    """The name that an expression of attributes and calls begins with."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript | ast.Await):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def is_plain(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether an import is of Python's own modules, or of the probes'."""
    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
    ours = ("probes", "postgres")
    return all(one.partition(".")[0] in (*sys.stdlib_module_names, *ours) for one in modules)


def harness_lines(tree: ast.Module) -> set[int]:
    """The lines of docstrings, and of what only the probes need."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            if ast.get_docstring(node, clean=False) is not None:
                found.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
        elif isinstance(node, ast.If) and asks_a_switch(node.test):
            found.update(range(node.lineno, node.body[0].lineno))
            if node.orelse:
                last = node.body[-1].end_lineno or node.body[-1].lineno
                found.update(range(last + 1, node.orelse[0].lineno))
        elif isinstance(node, ast.Attribute) and asks_a_switch(node):
            found.add(node.lineno)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "note":
            found.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def asks_a_switch(node: ast.AST) -> bool:
    return any(
        isinstance(one, ast.Attribute)
        and isinstance(one.value, ast.Name)
        and (one.value.id, one.attr in SWITCHES) == ("PLAN", True)
        for one in ast.walk(node)
    )


# What is looked at, by number. Those that take the time have the machine to themselves.
ONE_COLUMN: Mapping[int, Callable[[Bench], dict[str, Any]]] = {
    1: kill_after_three,
    2: kill_inside_three,
    3: human_answer,
    4: replay,
    6: timing,
    7: timer,
    8: retry,
    9: chaos,
    10: size,
}
ALONE = (6, 10)


def start_up(bench: Bench) -> dict[str, Any]:
    """Start the program and let it do nothing; the first start also fills the caches of a machine."""
    bench.spawn("nothing_to_do").value(300)
    return {}


CHANGES = ("inserted", "renamed done", "renamed next")


def remedy(bench: Bench) -> dict[str, Any]:
    """A step is inserted the way the system's documentation wants it; a run in flight must finish on the new code."""
    child = bench.spawn("five", door="s4", seconds=0.1)
    if not until(lambda: child.over, 60) or child.said:
        raise Inconclusive(f"the process was not killed before step 4; {child.said} {child.tail()}")
    facts = bring_back(bench, lambda: ended(bench, "s5"), "five", 30, version="remedy", seconds=0.1)
    return {"works": facts["finished"] and not again(bench), "after": after_kill(bench, "s3"), "error": facts["error"]}


def no_remedy(bench: Bench) -> dict[str, Any]:
    return {"works": False, "after": [], "error": "none is documented"}


@dataclass(frozen=True)
class Job:
    """A piece of work of one probe of one column."""

    probe: int
    column: str
    part: str
    work: Callable[[Bench], dict[str, Any]]


def jobs_of(system: System, numbers: Sequence[int], missing: Mapping[str, str] | None = None) -> list[Job]:
    missing = missing or {}
    jobs = []
    for column in system.columns:
        if column in missing:
            continue
        for number in numbers:
            if number not in system.only.get(column, tuple(PROBES)):
                continue
            if number == 10 and column != next(one for one in system.columns if one not in missing):
                continue  # it is the same for all columns
            if number == 5:
                for version in CHANGES:
                    jobs.append(Job(5, column, version, functools.partial(one_change, version=version)))
                jobs.append(Job(5, column, "remedy", remedy if system.remedy else no_remedy))
            else:
                jobs.append(Job(number, column, "", ONE_COLUMN[number]))
    return jobs


def missing_columns(system: System) -> dict[str, str]:
    """The columns whose surroundings are not there, each with the reason."""
    missing = {}
    for column, check in system.needs.items():
        try:
            check()
        except NotRun as error:
            missing[column] = str(error)
    return missing


def run_job(system: System, job: Job, folder: Path, guard: Guard, seed: int) -> dict[str, Any]:
    """Its facts, or {"inconclusive": reason}. Other jobs go on in any case."""
    place = folder / f"{job.probe}-{job.column}-{job.part}".replace(" ", "-")
    bench = None
    begun = time.monotonic()
    try:
        bench = Bench(system, job.column, place, guard, seed)
        facts = job.work(bench)
    except Inconclusive as error:
        facts = {"inconclusive": str(error)}
    except Exception as error:
        facts = {"inconclusive": f"{type(error).__name__}: {error}"}
    finally:
        if bench:
            with contextlib.suppress(Exception):
                bench.close()
    return facts | {"took": time.monotonic() - begun}


def record_of(system: System, probe: int, column: str, parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One row of the record: what a column did in a probe."""
    seconds = round(sum(part.pop("took") for part in parts.values()), 1)
    reasons = [part["inconclusive"] for part in parts.values() if "inconclusive" in part]
    facts: Mapping[str, Any] = parts if probe == 5 else parts[""]
    row = {"system": system.name, "column": column, "probe": probe, "seconds": seconds, "facts": facts}
    if reasons:
        return row | {"status": "inconclusive", "outcome": "inconclusive", "measured": "; ".join(reasons)}
    outcome, measured = words(probe, facts)
    return row | {"status": "seen", "outcome": outcome, "measured": measured}


def listed(steps: Sequence[str]) -> str:
    return " ".join(steps) or "none"


def words(probe: int, facts: Mapping[str, Any]) -> tuple[str, str]:
    """An outcome in a few words and what was measured, from the facts of a probe."""
    if probe in (1, 2):
        if not facts["finished"]:
            outcome = "lost" if not facts["error"] else "lost, with an error"
        else:
            allowed = {"s3"} if probe == 2 else set()
            over = [step for step in facts["again"] if step not in allowed]
            how = "by itself" if facts["by_itself"] else "by hand"
            verb = "starts over" if "s1" in over else "goes back" if over else "resumes"
            outcome = f"{verb} {how}"
        measured = f"after the kill ran {listed(facts['after'])}; finished steps run again: {listed(facts['again'])}"
        measured += f"; {facts['seconds']:.1f} s" if facts["finished"] else ""
        return outcome, measured + (f"; {facts['error']}" if facts["error"] else "")
    if probe == 3:
        how = "by itself" if facts["by_itself"] else "in the process that answers"
        outcome = f"answered, goes on {how}" if facts["finished"] else "answer lost"
        server = "program and server killed" if facts["server_killed"] else "program killed"
        return outcome, f"{server}; finished steps run again: {listed(facts['again'])}; {facts['seconds']:.1f} s"
    if probe == 4:
        noticed = "divergence noticed" if facts["noticed"] else "divergence not noticed"
        if facts["error"]:
            outcome = "no replay"
        else:
            outcome = ("replay runs steps again, " if facts["ran"] else "replayed from the record, ") + noticed
        measured = f"same program ran {listed(facts['ran'])}; steps in the record: {listed(facts['recorded'])}; "
        measured += f"swapped program ran {listed(facts['ran_swapped'])}"
        return outcome, measured + "".join(f"; {facts[one]}" for one in ("error", "noticed") if facts[one])
    if probe == 5:
        outcome = ", ".join(f"{version}: {facts[version]['outcome']}" for version in CHANGES)
        heals = [facts[version]["heals"] for version in CHANGES if facts[version]["heals"] is not None]
        parts = [f"{version} ran {listed(facts[version]['after'])}" for version in CHANGES]
        parts.append(f"old code heals {sum(heals)} of {len(heals)}" if heals else "nothing to heal")
        works = "works" if facts["remedy"]["works"] else facts["remedy"]["error"] or "fails"
        parts.append(f"documented way: {works}")
        return outcome, "; ".join(parts)
    if probe == 6:
        shapes = {shape: facts[shape] for shape in ("sequential", "parallel")}
        parts = [
            f"{shape} fails: {one['error']}"
            if "error" in one
            else f"{shape} {one['ms']:.2f} ms ({one['min']:.2f}-{one['max']:.2f}), CPU {one['cpu_ms']:.2f} ms"
            for shape, one in shapes.items()
        ]
        short = ["fails" if "error" in one else f"{one['ms']:.1f}" for one in shapes.values()]
        return f"{short[0]} / {short[1]} ms a step", "; ".join(parts)
    if probe == 7:
        if not facts["finished"]:
            return "timer lost", facts["error"] or "not finished"
        kept = "kept" if timer_kept(facts) else "started again"
        how = "by itself" if facts["by_itself"] else "by hand"
        return f"timer {kept}, {how}", f"{facts['late']:+.1f} s; finished steps run again: {listed(facts['again'])}"
    if probe == 8:
        how = "by its own policy" if facts["native"] else "by the user's own loop"
        outcome = f"succeeds {how}" if facts["finished"] else "fails"
        gaps = " ".join(f"{gap:.2f}" for gap in facts["gaps"])
        return outcome, f"{facts['attempts']} attempts, gaps {gaps} s" + (
            f"; {facts['error']}" if facts["error"] else ""
        )
    if probe == 9:
        good = facts["lost"] == 0 and facts["twice"] == 0
        outcome = "nothing lost, nothing twice" if good else f"{facts['lost']} lost, {facts['twice']} twice"
        how = "by itself" if facts["by_itself"] else "by hand"
        measured = f"{facts['finished']} of {RUNS} runs finished {how} after {facts['kills']} kills in "
        measured += f"{facts['seconds']:.1f} s; {facts['unreported']} steps run again whose end nobody had recorded"
        measured += f"; {facts['nameless']} steps begun without the run's inputs" if facts["nameless"] else ""
        return outcome, measured + (f"; {facts['error']}" if facts["error"] else "")
    total = facts["packages_mb"] + facts["server_mb"]
    lines = ", ".join(f"{name} {count}" for name, count in facts["lines"].items())
    measured = f"import {facts['import']:.2f} s ({facts['import_min']:.2f}-{facts['import_max']:.2f}), "
    measured += f"CPU {facts['import_cpu']:.2f} s; "
    measured += f"lines: {lines}; {len(facts['names'])} names of its API"
    measured += f"; of it server {facts['server_mb']:.0f} MB" if facts["server_mb"] else ""
    return f"{total:.0f} MB", measured


# 4. Stars --------------------------------------------------------------------------------------------

# Bounds come from outside the data; each statement of the rule says its reason.
SCREEN = 24  # lines
MEGABYTES = 250
BY_NATURE = "yes or no, no bound"
SCREEN_WHY = f"{SCREEN} lines are a standard terminal (VT100; the default of terminfo)"

Facts = Mapping[int, Mapping[str, Any]]
GOOD_CHANGE = ("noticed", "accepted")
IN_PACKAGE = "it can be imported from the package alone, is not abstract and not deprecated"


def lines_to_begin(facts: Facts) -> int:
    """The lines of the setup and of five steps, in the mode of the column."""
    lines = facts[10]["lines"]
    return int(sum(lines.get(name, 0) for name in ("setup", "five", f"setup, {facts[10]['column']}")))


def timer_kept(facts: Mapping[str, Any]) -> bool:
    """A timer that is started again rings a whole wait after its process is up, late by what had passed at the kill."""
    return bool(facts["late"] < KILLED_AFTER or facts["after_restart"] - facts["start"] < TIMER / 2)


@dataclass(frozen=True)
class Statement:
    """What earns a star, and why its bound is what it is."""

    text: str
    reason: str
    holds: Callable[[Facts], bool]


# One star, and one more for every statement that holds.
RULE: Mapping[str, Sequence[Statement]] = {
    "durability": (
        Statement(
            "killed between steps, it resumes and runs no finished step again",
            BY_NATURE,
            lambda f: f[1]["finished"] and not f[1]["again"],
        ),
        Statement(
            "it does so without any line of the user's",
            BY_NATURE,
            lambda f: f[1]["finished"] and f[1]["by_itself"],
        ),
        Statement(
            "20 runs survive random kills: nothing lost, nothing finished run twice",
            "none at all: durable is what loses nothing",
            lambda f: f[9]["finished"] == RUNS and f[9]["lost"] == 0 and f[9]["twice"] == 0,
        ),
        Statement(
            "a timer keeps its time across a kill, by itself",
            f"one started again rings {TIMER:.0f} s after its process is up, and {KILLED_AFTER:.0f} s or more too late",
            lambda f: f[7]["finished"] and timer_kept(f[7]) and f[7]["by_itself"],
        ),
    ),
    "HITL": (
        Statement("an answer arrives across a restart", BY_NATURE, lambda f: f[3]["finished"]),
        Statement("no finished step runs again for it", BY_NATURE, lambda f: f[3]["finished"] and not f[3]["again"]),
        Statement(
            "the run goes on by itself: who answers needs none of its code",
            BY_NATURE,
            lambda f: f[3]["finished"] and f[3]["by_itself"],
        ),
        Statement(
            f"the wait and the answer fit on a screen of {SCREEN} lines",
            SCREEN_WHY,
            lambda f: f[3]["finished"] and f[10]["lines"]["human"] <= SCREEN,
        ),
    ),
    "replay": (
        Statement("a finished run can be replayed", BY_NATURE, lambda f: not f[4]["error"]),
        Statement("the replay runs no step", BY_NATURE, lambda f: not f[4]["error"] and not f[4]["ran"]),
        Statement("the record names every step", BY_NATURE, lambda f: set(FIVE) <= set(f[4]["recorded"])),
        Statement("a program that diverges is noticed", BY_NATURE, lambda f: bool(f[4]["noticed"])),
    ),
    "versioning": (
        Statement(
            "an inserted step is noticed or harmless", BY_NATURE, lambda f: f[5]["inserted"]["outcome"] in GOOD_CHANGE
        ),
        Statement(
            "renamed steps are noticed or harmless",
            BY_NATURE,
            lambda f: all(f[5][one]["outcome"] in GOOD_CHANGE for one in ("renamed done", "renamed next")),
        ),
        Statement(
            "where the change does harm, the old program puts the run right",
            BY_NATURE,
            lambda f: all(f[5][one]["outcome"] == "accepted" or f[5][one]["heals"] is True for one in CHANGES),
        ),
        Statement("a documented way changes the program under a run", BY_NATURE, lambda f: f[5]["remedy"]["works"]),
    ),
    "learning curve": (
        Statement(
            f"the setup and five durable steps fit on a screen of {SCREEN} lines",
            SCREEN_WHY,
            lambda f: lines_to_begin(f) <= SCREEN,
        ),
        Statement("pip alone brings all that has to be installed", BY_NATURE, lambda f: not f[10]["elsewhere"]),
        Statement(
            f"the packages take at most {MEGABYTES} MB",
            f"{MEGABYTES} MB is what AWS Lambda takes, unzipped, as a function's package",
            lambda f: f[10]["packages_mb"] <= MEGABYTES,
        ),
        Statement("no server has to run", BY_NATURE, lambda f: not f[10]["server"]),
    ),
    "LLM-native": (
        Statement("an agent loop comes with the package", IN_PACKAGE, lambda f: f[10]["llm"]["agent loop"]),
        Statement("a model client comes with it", IN_PACKAGE, lambda f: f[10]["llm"]["model client"]),
        Statement("tool calling comes with it", IN_PACKAGE, lambda f: f[10]["llm"]["tool calling"]),
        Statement(
            "an agent framework is the package itself, or is integrated by its vendor",
            "it can be imported, from the package or from the vendor's own companion of it",
            lambda f: f[10]["llm"][FRAMEWORK],
        ),
    ),
}


def rate(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The stars of one column: per row their number (None: not run), the statements that held, and those unknown.

    A statement whose probe was not run or is inconclusive holds nothing and counts as unknown.
    """
    facts = {record["probe"]: record["facts"] for record in records if record["status"] == "seen"}
    rows = {}
    for row, statements in RULE.items():
        held, unknown = [], []
        for statement in statements:
            try:
                if statement.holds(facts):
                    held.append(statement.text)
            except KeyError:
                unknown.append(statement.text)
        stars = None if len(unknown) == len(statements) else 1 + len(held)
        rows[row] = {"stars": stars, "held": held, "unknown": unknown}
    return rows


def rate_columns(system: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The stars of each column that more than one probe looked at; size and lines are those of the system."""
    rated = {}
    for column in system["columns"]:
        mine = [one for one in system["records"] if one["column"] == column and one["probe"] != 10]
        if len(mine) > 1:
            rated[column] = rate([*mine, *(in_column(one, system, column) for one in system["records"])])
    return rated


def in_column(record: Mapping[str, Any], system: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """The record of probe 10, which is of the whole system, as it is in one column; nothing for other records."""
    if record["probe"] != 10 or record["status"] != "seen":
        return {"status": "of another column"}
    server = system["servers"].get(column, False)
    return {**record, "facts": {**record["facts"], "column": column, "server": server}}


def stars_text(row: Mapping[str, Any]) -> str:
    """ "3", "3?" where a statement is unknown, "-" where nothing was run."""
    if row["stars"] is None:
        return "-"
    return f"{row['stars']}{'?' if row['unknown'] else ''}"


# 5. Output -------------------------------------------------------------------------------------------


def licence_of(distribution: str) -> str:
    meta: Any = importlib.metadata.metadata(distribution)
    classifiers = [one.rpartition(":: ")[2] for one in meta.get_all("Classifier") or [] if one.startswith("License")]
    text: str = (
        meta.get("License-Expression") or (meta.get("License") or "").partition("\n")[0] or ", ".join(classifiers)
    )
    return text or "not stated"


def about(system: System) -> dict[str, Any]:
    """Who is under test: versions and licences as installed, and when they were released."""
    versions = {name: importlib.metadata.version(name) for name in system.packages}
    return {
        "name": system.name,
        "title": system.title,
        "focus": system.focus,
        "store": system.store,
        "stores": {column: system.store_of(column) for column in system.columns},
        "servers": {column: system.server_of(column) is not None for column in system.columns},
        "columns": list(system.columns),
        "versions": versions | dict(system.server_version()),
        "released": {name: released(system.script, name) for name in versions},
        "licences": {name: licence_of(name) for name in system.packages}
        | ({"server": system.server_licence()} if system.server_licence() else {}),
    }


def locked(script: Path) -> dict[str, tuple[str, str]]:
    """What a script's lock file names: distribution -> (version, the day of its release)."""
    file = script.with_name(f"{script.name}.lock")
    if not file.exists():
        return {}
    found = {}
    for package in tomllib.loads(file.read_text(encoding="utf-8"))["package"]:
        files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        days = sorted(one["upload-time"] for one in files if "upload-time" in one)
        found[package["name"]] = (package.get("version", ""), str(days[0])[:10] if days else "")
    return found


def released(script: Path, name: str) -> str:
    version, day = locked(script).get(name, ("", ""))
    return day if version == importlib.metadata.version(name) else "not in the lock file"


def newer_than(record: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """What is installed, or locked, in a newer version than a record's system was measured with."""
    versions = record.get("versions", {})
    return [
        f"{name} {now[name]} (recorded: {version})"
        for name, version in versions.items()
        if name in now and as_numbers(now[name]) > as_numbers(version)
    ]


def as_numbers(version: str) -> list[int]:
    return [int(one) for one in re.findall(r"\d+", version)]


def machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def wrapped(text: str, hang: int = 4) -> str:
    """`text` in lines that fit the terminal, or 100 columns where there is none."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    return "\n".join(textwrap.wrap(text, max(width, 40), subsequent_indent=" " * hang)) or text


def say(text: str, hang: int = 4) -> None:
    print("\n" * text.startswith("\n") + wrapped(text.removeprefix("\n"), hang), flush=True)


def show_table(systems: Sequence[Mapping[str, Any]]) -> None:
    """A block a probe with a line a column, then the stars."""
    for number, title in PROBES.items():
        rows = [record for system in systems for record in system["records"] if record["probe"] == number]
        if not rows:
            continue
        say(f"\n{number}. {title}")
        for record in rows:
            say(f"  {label(record, systems)}: {record['outcome']}. {record['measured']}", 6)
    say("\nStars: one, and one more for each statement of the row that holds (the statements stand in probes.py)")
    print(f"  {'':<46}" + "".join(f"{short:>7}" for short in ("durab.", "HITL", "replay", "vers.", "learn", "LLM")))
    for system in systems:
        for column, rows in system["stars"].items():
            name = label({"system": system["name"], "column": column}, systems)
            print(f"  {name[:46]:<46}" + "".join(f"{stars_text(rows[row]):>7}" for row in RULE))
    say("\nMain focus, versions, licences")
    for system in systems:
        if "reason" in system:
            say(f"  {system['title']}: not run. {system['reason']}", 6)
            continue
        days = system.get("released", {})
        versions = ", ".join(
            f"{name} {version}{f' of {days[name]}' if days.get(name) else ''}"
            for name, version in system["versions"].items()
        )
        licences = ", ".join(f"{name}: {one}" for name, one in system["licences"].items())
        say(f"  {system['title']}: {system['focus']}. Store: {system['store']}. {versions}. Licences: {licences}", 6)


def label(record: Mapping[str, Any], systems: Sequence[Mapping[str, Any]]) -> str:
    system = next(one for one in systems if one["name"] == record["system"])
    return f"{system['title']}, {record['column']}" if len(system["columns"]) > 1 else str(system["title"])


def lifeline() -> None:
    """End when the starter does: its end of standard input closes."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class Stopped(BaseException):
    """A signal asks this script to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def stop_on_signals() -> None:
    """Signals become an exception in the main thread, once; later ones are ignored while it cleans up."""

    def stop(number: int, frame: FrameType | None) -> None:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(one, signal.SIG_IGN)
        raise Stopped(number)

    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, stop)


def leave(code: int) -> None:
    """End now: what natural exit would still do, threads and native code, is not needed and may hang."""
    with contextlib.suppress(BrokenPipeError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def check_json(parser: argparse.ArgumentParser, path: str | None) -> None:
    """An unwritable file is found before anything runs."""
    if path is None:
        return
    new = not os.path.exists(path)
    try:
        with open(path, "a", encoding="utf-8"):
            pass
        if new:
            os.unlink(path)  # nothing is left behind by a run that does not come to its end
    except OSError as error:
        parser.error(f"--json {path} cannot be written ({error.strerror}): name another file")


def run_all(
    system: System, numbers: Sequence[int], folder: Path, guard: Guard, seed: int, missing: Mapping[str, str]
) -> list[dict[str, Any]]:
    """All records of a system. What is timed runs alone; the rest, which mostly waits, four at a time."""
    seen: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    records = []

    def keep(job: Job, facts: dict[str, Any], waiting: Sequence[Job]) -> None:
        key = (job.probe, job.column)
        seen.setdefault(key, {})[job.part] = facts
        if not any((one.probe, one.column) == key for one in waiting):
            record = record_of(system, job.probe, job.column, seen[key])
            records.append(record)
            name = f" ({job.column})" if len(system.columns) > 1 else ""
            say(f"{job.probe}. {PROBES[job.probe]}{name}: {record['outcome']}. {record['measured']}")

    jobs = jobs_of(system, numbers, missing)
    waiting = list(jobs)
    first = run_job(
        system, Job(0, jobs[0].column if jobs else system.columns[0], "start", start_up), folder, guard, seed
    )
    if "inconclusive" in first:
        say(f"The first process failed: {first['inconclusive']}")
    # Everybody starts a few processes, four at a time: what one takes alone is allowed eight times more.
    PACE["seconds"] = 8 * first["took"]
    for job in [one for one in jobs if one.probe in ALONE]:
        facts = run_job(system, job, folder, guard, seed)
        waiting.remove(job)
        keep(job, facts, waiting)
    pool = ThreadPoolExecutor(4)  # not a `with`: a signal must not have to wait for what is under way
    side_by_side = [one for one in jobs if one.probe not in ALONE]
    futures = {job: pool.submit(run_job, system, job, folder, guard, seed) for job in side_by_side}
    while futures:
        time.sleep(0.05)
        for job in [job for job, future in futures.items() if future.done()]:
            waiting.remove(job)
            keep(job, futures.pop(job).result(), waiting)
    return sorted(records, key=lambda one: (system.columns.index(one["column"]), one["probe"]))


def main(system: System) -> None:
    """The command line of one system's script."""
    parser = argparse.ArgumentParser(description=f"Put the probes to {system.title}.")
    parser.add_argument("--probe", type=int, nargs="+", choices=list(PROBES), metavar="N", help="only these (1-10)")
    parser.add_argument(
        "--column", nargs="+", choices=system.columns, default=system.columns, metavar="NAME", help="only these modes"
    )
    parser.add_argument("--json", metavar="FILE", help="write what was seen")
    parser.add_argument("--seed", type=int, default=7, help="repeat the random kills of probe 9 (default: 7)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="measurements of probe 6 (default: 3)")
    parser.add_argument("--lifeline", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    check_json(parser, options.json)
    if options.lifeline:
        lifeline()
    stop_on_signals()
    guard = None
    code = 0
    try:
        folder = Path(tempfile.mkdtemp(prefix="comparison-"))
        guard = Guard(folder)
        result = about(system) | {"environment": machine(), "records": [], "stars": {}}
        try:
            system.check()
        except NotRun as error:
            say(f"{system.title}: not run: {error}")
            result["reason"] = str(error)
        else:
            versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
            say(f"{system.title}: {versions}; {system.store}; telemetry off")
            numbers = [number for number in PROBES if number in (options.probe or PROBES)]
            result["missing"] = missing_columns(system)
            for column, reason in result["missing"].items():
                say(f"{system.title}, {column}: not run: {reason}")
            skipped = result["missing"] | {one: "" for one in system.columns if one not in options.column}
            REPEATS["timing"] = options.repeats
            result["records"] = run_all(system, numbers, folder, guard, options.seed, skipped)
            result["stars"] = rate_columns(result)
        if options.json:
            text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
            Path(options.json).write_text(text, encoding="utf-8")
        code = int(any(record["status"] == "inconclusive" for record in result["records"]))
    except Stopped as stopped:
        code = 128 + stopped.number
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    finally:
        if guard:
            guard.close()
        leave(code)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2], sys.argv[3])
