"""PF: performance - what a step costs, how wide work fans out, and how large a payload may be.

Durability is paid for: each step is written down by a server before the next one begins. The three items
measure that price, and where it ends. The dev server of the default run keeps its state in memory; beside it
stand one on a file, and a real cluster where one is prepared. A figure says as much about the machine as about
Temporal, so no verdict rests on one: each compares what was measured by turns in one run.
"""

from cluster import Bucket, Cluster
from common import (
    HERE,
    Category,
    Evidence,
    Fact,
    NotRun,
    Spread,
    Target,
    at_least,
    at_most,
    between,
    causes,
    connect,
    contains,
    control,
    differs,
    equal,
    figure,
    holds,
    limit,
    native,
    not_run,
    one_of,
    piece,
    side_by_side,
    words,
    works,
)
from harness.given import between as stranger
from harness.servers import Guard, make_folder
from harness.services import Place as Site
from harness.systems import NO_PROGRAMS
from lab import (
    PATIENT,
    TUNED,
    Call,
    Handle,
    Lab,
    count_events,
    ended,
    failed_tasks,
    history_of,
    is_closed_or_stuck,
    name_of,
    note,
    notes,
    open_gate,
    refusal,
    requires,
    run,
    slow,
    slowness,
    status_of,
    together,
    until,
)

import asyncio
import contextlib
import functools
import hashlib
import importlib.util
import math
import os
import re
import secrets
import sqlite3
import statistics
import tempfile
import time
import uuid
import zlib
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from temporalio import activity, workflow
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import EventType, WorkflowTaskFailedCause
from temporalio.api.workflowservice.v1 import GetSystemInfoRequest, StartWorkflowExecutionRequest
from temporalio.client import Client, WorkflowHandle, WorkflowHistory
from temporalio.common import RawValue, RetryPolicy
from temporalio.converter import (
    DataConverter,
    DefaultFailureConverterWithEncodedAttributes,
    PayloadCodec,
)
from temporalio.exceptions import ActivityError, ApplicationError
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import (
    ActivityInboundInterceptor,
    ExecuteActivityInput,
    Interceptor,
    Worker,
)

try:
    from temporalio.converter import (
        ExternalStorage,
        StorageDriver,
        StorageDriverClaim,
        StorageDriverRetrieveContext,
        StorageDriverStoreContext,
    )
except ImportError:  # an SDK before 1.24: what needs them is not run, and the rest of the script is
    ExternalStorage = StorageDriver = StorageDriverClaim = object  # type: ignore[assignment, misc]
    StorageDriverRetrieveContext = StorageDriverStoreContext = object  # type: ignore[assignment, misc]

# The sandbox imports this file for every run of a workflow, but it need not import these again.
with workflow.unsafe.imports_passed_through():
    import psutil
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PF = Category(
    "PF",
    "Performance",
    "What does a step cost, how wide does work fan out, and how large may a payload be?",
    flags={
        "plot": "write the measured curves to docs/pf_*.svg",
        "full": "measure more: 1,000 steps, 10,000 activities, 100 MB (about three minutes more)",
    },
)

# What the items share --------------------------------------------------------------------------------

Processes = Mapping[str, Sequence[psutil.Process]]  # that work is done by, in groups such as "server"


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def in_ms(seconds: Iterable[float]) -> Spread:
    return Spread.of([1000 * one for one in seconds], "ms")


def tails(name: str, seconds: Sequence[float]) -> Mapping[str, Spread]:
    """Facts that inform: how long the slow ones took."""
    return {f"{name}_p{percent}": figure(1000 * percentile(seconds, percent), "ms") for percent in (95, 99)}


def steady(values: Sequence[float]) -> bool:
    """Whether the latest ones lie within a tenth of their middle."""
    latest = values[-3:]
    return max(latest) - min(latest) <= 0.2 * statistics.median(latest)


async def by_turns(
    turn: Callable[[], Awaitable[Mapping[str, float]]], *, least: int = 3, most: int = 6
) -> Mapping[str, list[float]]:
    """Measure again until every figure of a turn is steady, so many times at most. Returns each one's values."""
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(most):
        if number >= least and all(map(steady, found.values())):
            break
        for name, value in (await turn()).items():
            found[name].append(value)
    return found


async def timed(call: Awaitable[Any]) -> float:
    begun = time.monotonic()
    await call
    return time.monotonic() - begun


def server_of(target: Target) -> Processes:
    """The process of the evaluated server, where this script started it; nothing for one that is not ours."""
    if target.address is None:
        return {}
    port = ["--port", target.address.rpartition(":")[2]]
    ours = [child for child in psutil.Process().children() if port in map(list, pairwise(child.cmdline()))]
    return {"server": ours[:1]} if ours else {}


def services_of(cluster: Cluster) -> Processes:
    """The processes of a cluster by kind of service, and those of its database."""
    region = cluster.region
    groups = {one.kind: [psutil.Process(one.pid)] for one in region.services}
    database = psutil.Process(region.database.pid)
    return groups | {"database": [database, *database.children(recursive=True)]}


@dataclass
class Used:
    """What measured blocks took: seconds by the wall clock, and CPU seconds of each group of processes."""

    wall: float = 0
    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    idle: float = 0  # CPU seconds that nobody on this machine used

    @property
    def others(self) -> float:
        """The part of this machine's CPU that went to programs that are not measured here."""
        if set(self.cpu) <= {"workers", "client"}:
            return 0  # the server's process is not ours, and its CPU was not seen
        every = self.wall * (os.cpu_count() or 1)
        return min(max(1 - (sum(self.cpu.values()) + self.idle) / every, 0), 0.95)

    def seconds_a_thousand(self, count: int) -> Mapping[str, float]:
        """CPU seconds of each group for a thousand pieces of work, of which `count` were done."""
        return {name: round(1000 * used / count, 1) for name, used in self.cpu.items()}

    def cores(self) -> Mapping[str, float]:
        """How many cores each group kept busy, and how many were idle."""
        return {name: round(used / self.wall, 2) for name, used in {**self.cpu, "idle": self.idle}.items()}


@contextlib.contextmanager
def metered(groups: Processes, used: Used | None = None) -> Iterator[Used]:
    """Measure what a block takes, and add it to `used`."""

    def spent() -> Mapping[tuple[str, int], float]:
        found = {}
        for name, group in groups.items():
            for one in group:
                with contextlib.suppress(psutil.NoSuchProcess):  # such as one of the database's own helpers
                    times = one.cpu_times()
                    found[name, one.pid] = times.user + times.system
        return found

    def idle() -> float:
        now = psutil.cpu_times()
        return float(now.idle + getattr(now, "iowait", 0))

    used = used or Used()
    before, begun, rested = spent(), time.monotonic(), idle()
    yield used
    used.wall += time.monotonic() - begun
    used.idle += idle() - rested
    for (name, pid), after in spent().items():
        used.cpu[name] += after - before.get((name, pid), after)


def new_figure(width: float = 7) -> Any:
    """A matplotlib figure that gives the same file for the same data."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "temporal-example", "svg.fonttype": "path", "font.size": 10})
    return Figure(figsize=(width, 3.6), layout="constrained")


def save(drawing: Any, name: str) -> str:
    """Write a drawing to docs/. Returns where."""
    folder = HERE / "docs"
    folder.mkdir(exist_ok=True)
    drawing.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return f"docs/{name}.svg"


async def pictured(lab: Lab, plot: Callable[..., str], *measured: Any) -> Mapping[str, str]:
    """Draw what was measured where that is asked for. Returns a fact that says where."""
    return {"curve_in": await asyncio.to_thread(plot, *measured)} if lab.flag("plot") else {}


# PF-01 Step latency ----------------------------------------------------------------------------------
# A step is two round trips to a server that writes each of them down: milliseconds, whatever the step does. So
# small things are done many to a step. A local activity runs beside its workflow, is written down together with
# its neighbours, and costs a fraction.


@dataclass
class Order:
    articles: list[str]
    way: str = "activities"


@activity.defn
async def price(article: str) -> int:
    """Something quick, such as a look-up in a table that is in memory anyway."""
    return len(article)


@activity.defn
async def price_all(articles: list[str]) -> list[int]:
    return [await price(article) for article in articles]


async def by_activities(articles: list[str]) -> list[int]:
    """Each result is written down before the next begins, by whichever worker is free."""
    prices = []
    for article in articles:
        prices.append(await workflow.execute_activity(price, article, start_to_close_timeout=timedelta(seconds=30)))
    return prices


async def by_local_activities(articles: list[str]) -> list[int]:
    """In the workflow's own worker. Those that finished since the last workflow task are repeated after a crash."""
    prices = []
    for article in articles:
        prices.append(
            await workflow.execute_local_activity(price, article, start_to_close_timeout=timedelta(seconds=30))
        )
    return prices


async def in_one_activity(articles: list[str]) -> list[int]:
    """One step for all of it. After a crash in the middle it begins again with the first."""
    return await workflow.execute_activity(price_all, articles, start_to_close_timeout=timedelta(seconds=30))


WAYS = {"activities": by_activities, "local activities": by_local_activities, "one activity": in_one_activity}


@workflow.defn
class Quote:
    @workflow.run
    async def run(self, order: Order) -> list[int]:
        return await WAYS[order.way](order.articles)


async def example_pf_01(client: Client) -> None:
    articles = [f"article {number}" for number in range(20)]
    async with Worker(client, task_queue="quotes", workflows=[Quote], activities=[price, price_all]):
        for way in WAYS:
            id = f"quote-{uuid.uuid4()}"
            begun = time.monotonic()
            await client.execute_workflow(Quote.run, Order(articles, way), id=id, task_queue="quotes")
            each = (time.monotonic() - begun) / len(articles)
            print(f"{len(articles)} articles by {way}: {1000 * each:.1f} ms each")


# PF-01 put to the test -------------------------------------------------------------------------------

STEPS = 15  # of each way in a turn
AGE = 100  # steps that make a run an old one
REGULAR, LOCAL, ONE = WAYS


@workflow.defn
class Walk:
    """A run that lives on and takes the lesson's steps when asked, so that they alternate with another run's."""

    def __init__(self) -> None:
        self.touches = 0

    @workflow.run
    async def run(self) -> None:
        await workflow.wait_condition(lambda: False)

    @workflow.update
    async def take(self, order: Order) -> list[int]:
        return await WAYS[order.way](order.articles)

    @workflow.signal
    def touch(self) -> None:
        self.touches += 1

    @workflow.query
    def touched(self) -> int:
        return self.touches


@dataclass
class Walker:
    """A run of Walk, and what the ledger has of its steps."""

    lab: Lab
    handle: Handle
    watched: bool = True
    # By their way, turns of steps that were not taken once and in order.
    wrong: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    taken: int = 0
    _seen: int = 0

    @classmethod
    async def begin(cls, lab: Lab, name: str, client: Client | None = None, queue: str = "") -> "Walker":
        queue = queue or lab.task_queue
        handle = await lab.start(Walk.run, name=name, client=client, task_queue=queue)
        walker = cls(lab, handle, watched=queue == lab.task_queue)
        await walker.take(5)  # the first steps warm everything up
        return walker

    async def take(self, steps: int, way: str = REGULAR, articles: Sequence[str] = ()) -> list[float]:
        """Let it take some steps. Returns the seconds from the begin of one to that of the next, by the ledger."""
        asked = list(articles or (f"{self.taken + number}" for number in range(steps)))
        answer = await self.handle.execute_update(Walk.take, Order(asked, way))
        calls = self.lab.calls(self.handle.id)[self._seen :] if self.watched else []
        self._seen += len(calls)
        self.taken += steps
        done = [part for one in calls for part in (one.argument if way == ONE else [one.argument])]
        if answer != [len(one) for one in asked] or (self.watched and done != asked):
            self.wrong[way].append(f"{words(done)} instead of {words(asked)}")
        return [later.at - earlier.at for earlier, later in pairwise(calls)]


@dataclass
class Pace:
    """Every step that was measured, by its way; and what a step cost by the clock around a turn of them."""

    steps: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    turns: Mapping[str, list[float]] = field(default_factory=dict)

    def p50(self, way: str) -> float:
        return statistics.median(self.steps[way])


WITHOUT = "without the ledger"


async def all_ways(walker: Walker, bare: Walker) -> Pace:
    """Steps of one run, each way by turns, and those of a run whose worker keeps no ledger."""
    found = Pace()

    async def turn() -> Mapping[str, float]:
        took = {}
        for way in WAYS:
            begun = time.monotonic()
            found.steps[way] += await walker.take(STEPS, way)
            took[way] = (time.monotonic() - begun) / STEPS
        return took | {WITHOUT: await timed(bare.take(STEPS)) / STEPS}

    found.turns = await by_turns(turn, most=5)
    return found


async def latency(lab: Lab, walker: Walker, pace: Pace) -> list[Evidence]:
    turns = len(pace.turns[ONE])
    events, taken = await count_events(walker.handle), turns * STEPS
    whole, without = pace.turns[REGULAR], pace.turns[WITHOUT]
    picture = await pictured(lab, plot_latency, pace.steps[REGULAR], pace.steps[LOCAL])
    return [
        works(
            "the latency of a regular activity: each step is taken once and in order",
            steps_taken_otherwise=equal(walker.wrong[REGULAR], []),
            completed_in_the_history=equal(events["ACTIVITY_TASK_COMPLETED"] - 5 - turns, taken),
            steps=taken,
            a_step=in_ms(pace.steps[REGULAR]),
            **tails("a_step", pace.steps[REGULAR]),
            **picture,
        ),
        works(
            "the latency of a local activity: each step is taken once and in order",
            steps_taken_otherwise=equal(walker.wrong[LOCAL], []),
            markers_in_the_history=equal(events["MARKER_RECORDED"], taken),
            a_local_step=in_ms(pace.steps[LOCAL]),
            **tails("a_local_step", pace.steps[LOCAL]),
        ),
        holds(
            "a local activity costs at most two thirds of a regular one in the same run, by turns",
            of_a_regular_one=at_most(pace.p50(LOCAL) / pace.p50(REGULAR), 2 / 3),
            turns=turns,
        ),
        holds(
            "many small things in one activity cost at most half of what as many activities do, by turns",
            of_as_many_activities=at_most(statistics.median(pace.turns[ONE]) / statistics.median(whole), 0.5),
            all_of_them=in_ms(STEPS * seconds for seconds in pace.turns[ONE]),
            as_many_activities=in_ms(STEPS * seconds for seconds in whole),
            things=STEPS,
        ),
        control(
            "what measuring adds, the ledger's lines, is less than half of a step",
            times_as_much=at_most(statistics.median(whole) / statistics.median(without), 1.5),
            a_step_without_them=in_ms(without),
            with_them=in_ms(whole),
        ),
    ]


async def stays_level(lab: Lab, old: Walker) -> Evidence:
    """The run that has taken hundreds of steps, and one that has just begun, by turns."""
    young = await Walker.begin(lab, "young")

    async def turn() -> Mapping[str, float]:
        # What grows with a run's age shows in its quick steps too; what other programs take shows in the slow ones.
        return {name: percentile(await one.take(8), 25) for name, one in (("old", old), ("young", young))}

    quick = await by_turns(turn, least=4, most=8)
    events = (await old.handle.describe()).history_length
    return holds(
        "a step late in a long run costs no more than 1.5 times as much as in a new one, by turns",
        steps_taken_otherwise=equal(old.wrong[REGULAR] + young.wrong[REGULAR], []),
        times_as_much=at_most(statistics.median(quick["old"]) / statistics.median(quick["young"]), 1.5),
        events_of_the_long_run=at_least(events, 6 * AGE),
        a_quick_step_in_it=in_ms(quick["old"]),
        in_the_new_one=in_ms(quick["young"]),
    )


# The events of one regular step and the workflow task after it, and what the time between them is spent on.
CYCLE = {
    "ACTIVITY_TASK_SCHEDULED": "the activity waits for a worker",
    "ACTIVITY_TASK_STARTED": "the activity runs and reports",
    "ACTIVITY_TASK_COMPLETED": "",
    "WORKFLOW_TASK_SCHEDULED": "the workflow task waits",
    "WORKFLOW_TASK_STARTED": "the workflow decides",
    "WORKFLOW_TASK_COMPLETED": "",
}


def stages(history: WorkflowHistory) -> dict[str, list[float]]:
    """The seconds that each stage took, for every step that was followed by another one at once."""
    events = [(EventType.Name(one.event_type).removeprefix("EVENT_TYPE_"), one.event_time) for one in history.events]
    found: dict[str, list[float]] = {stage: [] for stage in CYCLE.values() if stage}
    for begin in range(len(events) - len(CYCLE)):
        part = events[begin : begin + len(CYCLE) + 1]
        if [name for name, _ in part] != [*CYCLE, "ACTIVITY_TASK_SCHEDULED"]:
            continue
        for (name, since), (_, till) in pairwise(part):
            if CYCLE[name]:
                found[CYCLE[name]].append((till.ToNanoseconds() - since.ToNanoseconds()) / 1e9)
    return found


def medians_in_ms(found: Mapping[str, Sequence[float]]) -> Mapping[str, float]:
    return {stage: round(1000 * statistics.median(one), 2) for stage, one in found.items() if one}


async def where_time_goes(walker: Walker, long: Sequence[float], used: Used) -> Evidence:
    """The same steps by the server's timestamps: two clocks that know nothing of each other must agree."""
    steps = len(long)
    found = {stage: one[-steps:] for stage, one in stages(await walker.handle.fetch_history()).items()}
    cycles = [sum(one) for one in zip(*found.values(), strict=True)]
    total, seen = statistics.median(cycles or [0]), statistics.median(long)
    return holds(
        "the server's timestamps account for the cost of a step, within a quarter of what the ledger saw",
        steps_in_the_history=equal(len(cycles), steps),
        times_as_much=between(total / seen, 0.75, 1.25),
        a_step_by_the_history=in_ms(cycles or [0]),
        by_the_ledger=in_ms(long),
        ms=medians_in_ms(found),
        CPU_seconds_a_thousand_steps=used.seconds_a_thousand(steps),
    )


async def round_trips(lab: Lab) -> Evidence:
    """A signal, a query that must already see it, a whole workflow, and a few steps, by turns."""
    seen, steps, walker = [], list[float](), await Walker.begin(lab, "trips")
    handle = walker.handle

    async def turn() -> Mapping[str, float]:
        steps.extend(await walker.take(4))
        took = {"a signal": await timed(handle.signal(Walk.touch))}
        begun = time.monotonic()
        seen.append(await handle.query(Walk.touched))
        took["a query"] = time.monotonic() - begun
        id = f"{lab.id}-empty-{len(seen)}"
        whole = lab.client.execute_workflow(Quote.run, Order([]), id=id, task_queue=lab.task_queue)
        return took | {"an empty workflow": await timed(whole)}

    took, a_step = await by_turns(turn, least=6, most=8), statistics.median(steps)
    return holds(
        "a signal, a query, a whole empty workflow: each takes less than ten steps, and a query sees every signal",
        signals_seen_by_the_queries=equal(seen, list(range(1, len(seen) + 1))),
        **{f"{name}_in_steps": at_most(statistics.median(one) / a_step, 10) for name, one in took.items()},
        **{name: in_ms(one) for name, one in took.items()},
    )


SLOW = 0.05


async def asleep(walker: Walker) -> Evidence:
    """The yardstick itself: every other step is made to take 50 ms more.

    Local ones: where a server's own poll limit paces the regular steps, a sleep would be hidden in its pauses.
    """
    gaps = await walker.take(13, LOCAL, [*["slow", "quick"] * 6, "quick"])
    slower, quicker = statistics.median(gaps[::2]), statistics.median(gaps[1::2])
    return control(
        "a local step that takes 50 ms longer is measured as 50 ms longer",
        longer=between(figure(1000 * (slower - quicker), "ms"), 45, 100),
        slow=in_ms(gaps[::2]),
        quick=in_ms(gaps[1::2]),
    )


async def two_ends(lab: Lab, pace: Pace) -> list[Evidence]:
    """The empty RPC as the floor of what asks the server, the in-process call as the other end."""
    ledger, count = lab.file("in-process"), 1000
    begun = time.monotonic()
    for number in range(count):
        note(ledger, f"{number}")
        await price(f"{number}")
    each = (time.monotonic() - begun) / count
    service = lab.client.workflow_service
    empty = [await timed(service.get_system_info(GetSystemInfoRequest())) for _ in range(100)]
    floor, regular, local = statistics.median(empty), pace.p50(REGULAR), pace.p50(LOCAL)
    return [
        control(
            "the ends of the scale: a call in this process, below an empty RPC, below a step",
            lines_of_the_calls=equal(len(notes(ledger)), count),
            an_empty_RPC_in_such_calls=at_least(floor / each, 1),
            a_step_in_empty_RPCs=at_least(regular / floor, 1),
            a_local_step_in_empty_RPCs=local / floor,
            an_empty_RPC=in_ms(empty),
        ),
        limit(
            "a step is no function call: it costs over a hundred of them, so a loop over small things belongs inside",
            a_step_in_calls_that_write_a_line=at_least(regular / each, 100),
            a_local_step=local / each,
            such_a_call=figure(1e6 * each, "us"),
        ),
    ]


@dataclass
class Place:
    """A server that is measured, what it consists of, and a run on it."""

    client: Client
    processes: Processes
    walker: Walker
    steps: list[float] = field(default_factory=list)
    used: Used = field(default_factory=Used)

    @property
    def p50(self) -> float:
        return statistics.median(self.steps)

    async def take(self, steps: int) -> float:
        """Let its run take steps. Returns what was usual."""
        with metered(self.processes, self.used):
            took = await self.walker.take(steps)
        self.steps += took
        return statistics.median(took)

    async def facts(self) -> Mapping[str, Any]:
        return {
            "steps_taken_otherwise": equal(self.walker.wrong[REGULAR], []),
            "a_step": in_ms(self.steps),
            "ms": medians_in_ms(stages(await self.walker.handle.fetch_history())),
            "CPU_seconds_a_thousand_steps": self.used.seconds_a_thousand(self.walker.taken - 5),
        }


MEMORY, FILE, CLUSTER = "in memory", "on a file", "on a cluster"
SYNCED = ("--sqlite-pragma", "journal_mode=wal", "--sqlite-pragma", "synchronous=full")
POLLS = "history.transferProcessorMaxPollRPS"


class Places:
    """Servers that are measured by turns; the worker of each is in this process."""

    def __init__(self, lab: Lab, stack: contextlib.AsyncExitStack) -> None:
        self.lab, self.stack = lab, stack
        self.all: dict[str, Place] = {}

    async def add(self, name: str, client: Client, processes: Processes) -> Place:
        await self.stack.enter_async_context(self.lab.worker([Walk], [price, price_all], client=client))
        walker = await Walker.begin(self.lab, name.replace(" ", "-"), client)
        own = {"workers": [psutil.Process()]}
        self.all[name] = Place(client, {**processes, **own}, walker)
        return self.all[name]

    async def dev_server(self, name: str, **options: Any) -> Place:
        server = await self.stack.enter_async_context(self.lab.private_server(**options))
        return await self.add(name, server.client, {"server": [psutil.Process(server.pid)]})

    async def cluster(self) -> Cluster:
        cluster = await self.stack.enter_async_context(Cluster())
        await self.add(CLUSTER, cluster.client, services_of(cluster))
        return cluster

    async def measure(self) -> None:
        async def turn() -> Mapping[str, float]:
            return {name: await place.take(STEPS) for name, place in self.all.items()}

        await by_turns(turn, least=2, most=4)


def commit_of_sqlite(path: str, times: int = 50) -> list[float]:
    """The seconds that SQLite takes for a commit that is synced to this disk."""
    took = []
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in ("PRAGMA journal_mode = wal", "PRAGMA synchronous = full", "CREATE TABLE steps (number)"):
            connection.execute(statement)
        for number in range(times):
            begun = time.monotonic()
            connection.execute("INSERT INTO steps VALUES (?)", (number,))
            took.append(time.monotonic() - begun)
    return took


async def commit_of_database(cluster: Cluster, times: int = 200) -> float:
    """The seconds that the cluster's own database takes for one commit of one row, the way to it included."""
    database, script = cluster.region.database, cluster.place.folder / "commit.sql"
    script.write_text("INSERT INTO floor VALUES (1);\n", encoding="utf-8")
    script.chmod(0o644)
    await database.query("CREATE TABLE floor (number int)")
    said = (await database.program("pgbench", "-n", "-t", f"{times}", "-f", script, "temporal")).out
    found = re.search(r"latency average = ([\d.]+) ms", said)
    assert found, said
    return float(found[1]) / 1000


ON_FILE = "a dev server on a file that is synced at every commit, by turns with one in memory: a step outlasts a commit"
ON_CLUSTER = "a real cluster on PostgreSQL, by turns with these: each step is taken once, and outlasts two commits"
POLLED = (
    "a dev server as it comes polls its queues 20 times a second: after a burst a step costs at least half as much "
    "again"
)


@piece(holds(ON_FILE), holds(ON_CLUSTER), limit(POLLED))
async def other_servers(lab: Lab) -> list[Evidence]:
    """The same steps in memory, on a file, and on a real cluster where one is prepared; then without the tuning."""
    async with contextlib.AsyncExitStack() as stack:
        places = Places(lab, stack)
        memory = await places.dev_server(MEMORY)
        file = await places.dev_server(FILE, file=True, arguments=SYNCED)
        try:
            cluster = await places.cluster()
        except NotRun as why:
            await places.measure()
            on_cluster = not_run("holds", ON_CLUSTER, str(why))
        else:
            await places.measure()
            on_cluster = await compared(places, await commit_of_database(cluster))
        commits = await asyncio.to_thread(commit_of_sqlite, lab.file("floor.sqlite"))
        on_file = holds(
            ON_FILE,
            **await file.facts(),
            in_memory=in_ms(memory.steps),
            a_commit_of_SQLite_on_this_disk=in_ms(commits),
            a_step_in_commits=at_least(file.p50 / statistics.median(commits), 1),
        )
        return [on_file, on_cluster, await untuned(places, memory)]


async def compared(places: Places, commit: float) -> Evidence:
    place = places.all[CLUSTER]
    return holds(
        ON_CLUSTER,
        **await place.facts(),
        **{name: in_ms(other.steps) for name, other in places.all.items() if other is not place},
        a_commit_of_its_database=figure(1000 * commit, "ms"),
        a_step_in_commits=at_least(place.p50 / commit, 2),
    )


async def untuned(places: Places, tuned: Place) -> Evidence:
    """The dev server in memory, and its twin that lacks one of the two settings with which scripts run theirs."""
    others = {key: value for key, value in TUNED.items() if key != POLLS}
    plain = await places.dev_server("as it comes", tuned=False, settings=others)
    first = await tuned.take(STEPS)
    await plain.take(2 * STEPS)  # what may be saved up for a burst is used up
    polled = await plain.take(STEPS)
    usual = statistics.median([first, await tuned.take(STEPS)])
    return limit(
        POLLED,
        times_as_much=at_least(polled / usual, 1.5),
        a_step=figure(1000 * polled, "ms"),
        with_history_transferProcessorMaxPollRPS_raised=figure(1000 * usual, "ms"),
        steps_taken_otherwise=equal(tuned.walker.wrong[REGULAR] + plain.walker.wrong[REGULAR], []),
        after_a_burst_of=2 * STEPS,
    )


def plot_latency(regular: Sequence[float], local: Sequence[float]) -> str:
    drawing = new_figure()
    axes = drawing.subplots()
    for name, seconds, dash in (("regular activity", regular, "-"), ("local activity", local, "--")):
        share = [100 * (place + 1) / len(seconds) for place in range(len(seconds))]
        axes.step([1000 * one for one in sorted(seconds)], share, dash, where="post", label=name)
    axes.set(xlabel="time of a step (ms)", ylabel="steps that took no longer (%)", xscale="log", ylim=(0, 100))
    ticks = [tick for tick in (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500) if tick / 1.5 <= 1000 * max(regular)]
    axes.set_xticks([tick for tick in ticks if tick * 1.5 >= 1000 * min(local)])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.set_title("Latency of a step, one sequential workflow")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return save(drawing, "pf_latency")


@PF.item("PF-01", "Step latency", seconds=400, alone=True)
async def step_latency(lab: Lab) -> AsyncIterator[Evidence]:
    """One run takes its steps by turns with what they are compared with; a ledger has the moment of each."""
    parts: dict[str, Any] = {"workflows": [Walk, Quote], "activities": [price, price_all]}
    unwatched = f"{lab.id}-unwatched"
    async with (
        lab.worker_process(**parts, faults=[slow("price", SLOW, "slow")]) as worker,
        lab.worker_process(**parts, task_queue=unwatched, watched=False),
    ):
        walker, bare = await Walker.begin(lab, "walk"), await Walker.begin(lab, "bare", queue=unwatched)
        pace = await all_ways(walker, bare)
        for evidence in await latency(lab, walker, pace):
            yield evidence
        with metered({**server_of(lab.target), "workers": [psutil.Process(worker.pid)]}) as used:
            long = await walker.take(1000 if lab.flag("full") else AGE)
        yield await where_time_goes(walker, long, used)
        yield await stays_level(lab, walker)
        yield await round_trips(lab)
        yield await asleep(await Walker.begin(lab, "asleep"))
        for evidence in await two_ends(lab, pace):
            yield evidence
    yield native(
        "local activities are part of the SDK: the same activity and worker, another call in the workflow",
        workflow.execute_local_activity,
        workflow.execute_activity,
        WorkflowHandle.signal,
        WorkflowHandle.query,
    )
    for evidence in await other_servers(lab):
        yield evidence


# PF-02 Fan-out throughput ----------------------------------------------------------------------------
# Wide work is asyncio.gather, over activities or over children that share it out. A workflow may have 2,000
# activities pending, and its history has an end: what is wider is split up. How much is done a second is decided by
# the server's CPU, not by the width.


@dataclass
class Pages:
    first: int
    count: int
    share: int = 500  # of one child


@activity.defn
async def fetch(page: int) -> int:
    await asyncio.sleep(0.1)  # stands for a site that takes its time: waiting is what a fan-out overlaps
    return page


async def fetch_page(page: int) -> int:
    return await workflow.execute_activity(fetch, page, start_to_close_timeout=timedelta(seconds=60))


@workflow.defn
class FetchAll:
    """All at once, in one workflow."""

    @workflow.run
    async def run(self, pages: Pages) -> list[int]:
        numbers = range(pages.first, pages.first + pages.count)
        return list(await asyncio.gather(*(fetch_page(number) for number in numbers)))


@workflow.defn
class FetchByChildren:
    """More than one workflow may have pending: children share the pages out."""

    @workflow.run
    async def run(self, pages: Pages) -> list[int]:
        end = pages.first + pages.count
        children = [
            workflow.execute_child_workflow(
                FetchAll.run,
                Pages(first, min(pages.share, end - first)),
                id=f"{workflow.info().workflow_id}/{first}",
            )
            for first in range(pages.first, end, pages.share)
        ]
        return [number for child in await asyncio.gather(*children) for number in child]


async def example_pf_02(client: Client) -> None:
    async with Worker(client, task_queue="pages", workflows=[FetchAll, FetchByChildren], activities=[fetch]):
        for name, run, pages in (
            ("all at once", FetchAll.run, Pages(0, 100)),
            ("by children", FetchByChildren.run, Pages(0, 200, share=50)),
        ):
            begun = time.monotonic()
            fetched: list[int] = await client.execute_workflow(
                run, pages, id=f"pages-{uuid.uuid4()}", task_queue="pages"
            )
            print(f"{len(fetched)} pages {name}: {len(fetched) / (time.monotonic() - begun):.0f} a second")


# PF-02 put to the test -------------------------------------------------------------------------------

ALONE = 8
WIDTHS = (10, 100, 200)
LARGEST, SHARE = 400, 100


@workflow.defn
class OneByOne:
    """The control: the same pages one after the other."""

    @workflow.run
    async def run(self, pages: Pages) -> list[int]:
        return [await fetch_page(number) for number in range(pages.first, pages.first + pages.count)]


@dataclass
class Fanned:
    """A number of pages that were fetched: by which workflow, with what result, and the CPU it took."""

    id: str
    count: int
    result: list[int]
    used: Used

    @property
    def rate(self) -> float:
        """Activities a second by the clock."""
        return self.count / self.used.wall

    @property
    def pace(self) -> float:
        """Activities a second for the CPU that other programs left: what two runs are compared by."""
        return self.rate / (1 - self.used.others)


@dataclass
class Fans:
    """Fetches pages in workflows of a server, and says afterwards what the ledger has of it."""

    lab: Lab
    processes: Processes
    client: Client
    queue: str = ""
    share: int = SHARE

    async def fan(self, run: Any, count: int) -> Fanned:
        id = f"{self.lab.id}-{uuid.uuid4().hex[:8]}"
        with metered(self.processes) as used:
            pages, queue = Pages(0, count, self.share), self.queue or self.lab.task_queue
            handle = await self.lab.start(run, pages, id=id, client=self.client, task_queue=queue)
            how = await ended(handle, 300)
        return Fanned(id, count, how.result or [], used)


def calls_by_run(lab: Lab) -> Mapping[str, list[Call]]:
    """The calls in the ledger by the workflow that was asked for them, those of its children included."""
    found: dict[str, list[Call]] = defaultdict(list)
    for call in lab.calls():
        found[call.workflow.partition("/")[0]].append(call)
    return found


def missing_or_repeated(lab: Lab, runs: Iterable[Fanned]) -> Fact:
    """Each page was fetched once, and the results are complete and in order."""
    calls, wrong = calls_by_run(lab), []
    for one in runs:
        ran = Counter(call.argument for call in calls[one.id])
        wrong += [f"{page} of {one.count} was fetched {ran[page]} times" for page in range(one.count) if ran[page] != 1]
        wrong += [f"the result of {one.count} is another"] if one.result != list(range(one.count)) else []
    return equal(wrong[:10], [])


def rates(runs: Iterable[Fanned]) -> Spread:
    return Spread.of([one.rate for one in runs], "a second")


def pace_of(runs: Iterable[Fanned]) -> float:
    return statistics.median(one.pace for one in runs)


@dataclass
class Curve:
    """Throughput over width: fan-outs in one workflow, the same one by one, and the largest by children."""

    wide: dict[int, list[Fanned]]
    alone: list[Fanned]
    children: Fanned

    @property
    def best(self) -> float:
        return max(pace_of(runs) for width, runs in self.wide.items() if width >= 100)


async def curve(fans: Fans, full: bool) -> Curve:
    """All widths and one by one, by turns, and between them the largest by children."""
    widths = (10, 100, 1000) if full else WIDTHS
    found = Curve({width: [] for width in widths}, [], Fanned("", 0, [], Used()))
    await fans.fan(FetchAll.run, 50)  # warms up

    async def turn() -> Mapping[str, float]:
        found.alone.append(await fans.fan(OneByOne.run, ALONE))
        for width, runs in found.wide.items():
            runs.append(await fans.fan(FetchAll.run, width))
        if not found.children.count:
            found.children = await fans.fan(FetchByChildren.run, 10_000 if full else LARGEST)
        return {f"{width}": runs[-1].pace for width, runs in found.wide.items()}

    await by_turns(turn, least=2, most=3)
    return found


def wide_and_alone(lab: Lab, found: Curve, picture: Mapping[str, str]) -> list[Evidence]:
    every = [one for runs in found.wide.values() for one in runs]
    base = rates(found.alone)
    return [
        works(
            "activities that wait 0.1 s: each ran once at every width, and a hundred or more at once at least double "
            "what one by one makes",
            missing_or_repeated=missing_or_repeated(lab, every),
            **{
                f"times_one_by_one_at_{width}": at_least(rates(runs).median / base.median, 2)
                for width, runs in found.wide.items()
                if width >= 100
            },
            **{f"at_{width}": rates(runs) for width, runs in found.wide.items()},
            cores_busy_at_the_widest=list(found.wide.values())[-1][-1].used.cores(),
            CPU_seconds_a_thousand=list(found.wide.values())[-1][-1].used.seconds_a_thousand(max(found.wide)),
            **picture,
        ),
        control(
            "the same activities one after the other: no more a second than their 0.1 s allow",
            missing_or_repeated=missing_or_repeated(lab, found.alone),
            one_by_one=at_most(base, 10),
            cores_busy=found.alone[-1].used.cores(),
        ),
        holds(
            "many activities in children: each ran once, at least half of the best throughput",
            missing_or_repeated=missing_or_repeated(lab, [found.children]),
            of_the_best=at_least(found.children.pace / found.best, 0.5),
            activities=found.children.count,
            children=len({call.workflow for call in calls_by_run(lab)[found.children.id]}),
            by_children=rates([found.children]),
            cores_busy=found.children.used.cores(),
        ),
    ]


async def by_workers(lab: Lab, jobs: int) -> dict[int, Fanned]:
    """The same width over 1, 2 and 4 worker processes."""
    queue, found = f"{lab.id}-shared", {}
    processes = server_of(lab.target)
    async with contextlib.AsyncExitStack() as stack:
        pids: list[int] = []
        for count in (1, 2, 4):
            while len(pids) < count:
                worker = lab.worker_process([FetchAll], [fetch], task_queue=queue)
                pids.append((await stack.enter_async_context(worker)).pid)
            fans = Fans(lab, {**processes, "workers": [psutil.Process(pid) for pid in pids]}, lab.client, queue)
            for _ in range(5):  # by then all of them are polling
                if len(shares(lab, await fans.fan(FetchAll.run, 10 * count))) == count:
                    break
            found[count] = await fans.fan(FetchAll.run, jobs)
    return found


def shares(lab: Lab, fanned: Fanned) -> Mapping[int, int]:
    """How many activities each worker process ran."""
    return Counter(call.pid for call in calls_by_run(lab)[fanned.id])


def shared_out(lab: Lab, found: Mapping[int, Fanned]) -> list[Evidence]:
    """What more workers bring. Rates are compared for the CPU that other programs left."""
    best = max(one.pace for one in found.values())
    four, one = found[4], found[1]
    return [
        holds(
            "1, 2 and 4 worker processes: each activity ran once, every process gets a part, and four keep at least "
            "half of the best throughput",
            missing_or_repeated=missing_or_repeated(lab, found.values()),
            **{
                f"parts_of_{count}": Fact(
                    sorted(shares(lab, fanned).values()), f"{count} parts", len(shares(lab, fanned)) == count
                )
                for count, fanned in found.items()
            },
            four_of_the_best=at_least(four.pace / best, 0.5),
        ),
        limit(
            "more worker processes make it no faster: here it is the server that has no more to give",
            times_as_much_by_four_as_by_one=at_most(four.pace / one.pace, 1.5),
            a_second_by_workers={f"{count}": round(fanned.rate) for count, fanned in found.items()},
            cores_busy_with_one=one.used.cores(),
            with_four=four.used.cores(),
            cores_in_all=os.cpu_count(),
        ),
    ]


async def whole_workflows(lab: Lab, fans: Fans, count: int = 30) -> Evidence:
    """Many small workflows instead of one wide one."""

    async def one(number: int) -> list[int]:
        handle = await lab.start(FetchAll.run, Pages(number, 1), name=f"whole/{number}", client=fans.client)
        return (await ended(handle)).result or []

    with metered(fans.processes) as used:
        results = await asyncio.gather(*(one(number) for number in range(count)))
    every = Fanned(f"{lab.id}-whole", count, [number for result in results for number in result], used)
    return holds(
        "many workflows at once, one activity each: all finish with their own result, each activity ran once",
        missing_or_repeated=missing_or_repeated(lab, [every]),
        workflows=count,
        finished=rates([every]),
        CPU_seconds_a_thousand=used.seconds_a_thousand(count),
    )


FAN_ON_CLUSTER = "a real cluster on PostgreSQL, by turns with a dev server: a hundred at once, each ran once"


@piece(holds(FAN_ON_CLUSTER))
async def on_a_cluster(lab: Lab) -> Evidence:
    """The same fan-out on a cluster where one is prepared, and on a dev server beside it."""
    worker = functools.partial(lab.worker, [FetchAll], [fetch])
    async with (
        Cluster() as cluster,
        lab.private_server() as server,
        worker(client=cluster.client),
        worker(client=server.client),
    ):
        own = {"workers": [psutil.Process()]}
        on_cluster = Fans(lab, {**services_of(cluster), **own}, cluster.client)
        on_server = Fans(lab, {"server": [psutil.Process(server.pid)], **own}, server.client)
        found: dict[str, list[Fanned]] = {MEMORY: [], CLUSTER: []}
        for count in (20, 100, 100):  # the first one warms up
            found[CLUSTER].append(await on_cluster.fan(FetchAll.run, count))
            found[MEMORY].append(await on_server.fan(FetchAll.run, count))
    last = found[CLUSTER][-1]
    return holds(
        FAN_ON_CLUSTER,
        missing_or_repeated=missing_or_repeated(lab, [one for runs in found.values() for one in runs]),
        **{name: rates(runs[1:]) for name, runs in found.items()},
        CPU_seconds_a_thousand=last.used.seconds_a_thousand(last.count),
        cores_busy=last.used.cores(),
    )


def plot_fanout(wide: Mapping[int, float], workers: Mapping[int, float], alone: float) -> str:
    drawing = new_figure(9)
    left, right = drawing.subplots(1, 2, sharey=True)
    left.plot(list(wide), list(wide.values()), "o-", label="all at once")
    left.axhline(alone, linestyle="--", color="gray", label="one after the other")
    left.set(xscale="log", xlabel="activities in the fan-out", ylabel="activities per second")
    left.set_xticks(list(wide), [f"{width:,}" for width in wide])
    left.minorticks_off()
    left.legend(loc="center right")
    right.bar([str(count) for count in workers], list(workers.values()), width=0.5)
    right.set(xlabel="worker processes")
    left.set_ylim(0, 1.1 * max(*wide.values(), *workers.values()))
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="y")
    drawing.suptitle("Fan-out throughput")
    return save(drawing, "pf_fanout")


@dataclass
class Outcome:
    """How a run ended, or that it hangs: status, what came back, why a workflow task failed, and after how long."""

    status: str
    answer: str
    failed: str
    seconds: float


async def outcome_of(handle: Handle, begun: float) -> Outcome:
    """Wait until a run has ended, or until its workflow task failed and is tried again."""
    await until(lambda: is_closed_or_stuck(handle), "the workflow ended, or its workflow task failed", every=0.1)
    seconds, status, answer = time.monotonic() - begun, await status_of(handle), ""
    if status != "RUNNING":
        how = await ended(handle)
        answer = f"{how.result or how.why}"[:300]
    return Outcome(status, answer, await stuck_on(handle), seconds)


async def stuck_on(handle: Handle) -> str:
    """Why the latest failed workflow task of a run failed, or "" when none did."""
    for event in reversed((await handle.fetch_history()).events):
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED:
            cause = event.workflow_task_failed_event_attributes.cause
            return WorkflowTaskFailedCause.Name(cause).removeprefix("WORKFLOW_TASK_FAILED_CAUSE_")
    return ""


TOO_WIDE = "one activity more than may be pending, and the workflow hangs in retries: split wide work up"
TOO_LONG = "a history that grows over its limit ends the run in the middle of its work: continue as new in time"


async def pending_limit(lab: Lab, fans: Fans, most: int) -> Evidence:
    """As many as may be pending pass; one more, and the workflow hangs without an error."""
    fits = await fans.fan(FetchAll.run, most)
    handle = await lab.start(FetchAll.run, Pages(0, most + 1), name="over", client=fans.client)
    over = await outcome_of(handle, time.monotonic())
    return limit(
        TOO_WIDE,
        with_one_more=equal(over.status, "RUNNING"),
        its_workflow_task=over.failed,
        fetched_with_as_many_as_may_be=equal(len(fits.result), most),
        activities_that_ran=len(lab.calls(handle.id)),
        limit_lowered_to=most,
        documented_default=2000,
    )


@activity.defn(name="fetch")
async def fetch_at_once(page: int) -> int:
    return page


async def history_limit(lab: Lab, fans: Fans, most: int, steps: int) -> Evidence:
    """A workflow whose history grows too long is ended by the server in the middle of its work."""
    handle = await lab.start(OneByOne.run, Pages(0, steps), name="history", client=fans.client)
    how = await ended(handle)
    return limit(
        TOO_LONG,
        ended_as=equal(how.status, "TERMINATED"),
        reason=how.why,
        activities_that_ran=len(lab.calls(handle.id)),
        of=steps,
        events=(await handle.describe()).history_length,
        limit_lowered_to=most,
        documented_default=51_200,
    )


@piece(limit(TOO_WIDE), limit(TOO_LONG))
async def limits(lab: Lab) -> list[Evidence]:
    # Settings that no user has, so that it is seen in seconds: by default 2,000 and 51,200.
    lowered = {"limit.numPendingActivities.error": "50", "limit.historyCount.error": "400"}
    async with (
        lab.private_server(settings=lowered) as server,
        lab.worker([FetchAll, OneByOne], [fetch_at_once], server=server),
    ):
        fans = Fans(lab, {}, server.client)
        return await together(pending_limit(lab, fans, 50), history_limit(lab, fans, 400, 100))


@PF.item("PF-02", "Fan-out throughput", seconds=400, alone=True)
async def fan_out_throughput(lab: Lab) -> AsyncIterator[Evidence]:
    """Fan-outs of growing width against the same activities one after the other; a ledger has who ran what."""
    full = lab.flag("full")
    async with lab.worker_process([FetchAll, FetchByChildren, OneByOne], [fetch]) as worker:
        processes = {**server_of(lab.target), "workers": [psutil.Process(worker.pid)]}
        fans = Fans(lab, processes, lab.client, share=500 if full else SHARE)
        found = await curve(fans, full)
        workflows = await whole_workflows(lab, fans)
    by_count = await by_workers(lab, 300 if full else 120)
    widths = {width: rates(runs).median for width, runs in found.wide.items()}
    widths |= {found.children.count: found.children.rate}
    workers = {count: fanned.rate for count, fanned in by_count.items()}
    picture = await pictured(lab, plot_fanout, widths, workers, rates(found.alone).median)
    for evidence in [*wide_and_alone(lab, found, picture), workflows, *shared_out(lab, by_count)]:
        yield evidence
    yield native(
        "fan-out is asyncio.gather over activities or children; sharing it out among workers is the server's work",
        workflow.execute_activity,
        workflow.execute_child_workflow,
    )
    for evidence in await limits(lab):
        yield evidence
    for evidence in await on_a_cluster(lab):
        yield evidence


# PF-03 Payload size limits ---------------------------------------------------------------------------
# Two megabytes is the end of a payload, four of a message. A codec makes payloads smaller, or unreadable to the
# server; external storage, which is experimental, leaves only a reference in the history. All of it is the data
# converter's, which every client and every worker must be given alike.


class Compression(PayloadCodec):
    """Compresses what gets smaller by it."""

    ENCODING = b"binary/zlib"

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [self._smaller(payload) for payload in payloads]

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [self._restored(payload) for payload in payloads]

    def _smaller(self, payload: Payload) -> Payload:
        # The whole payload, so that its own metadata, which says how to read it, comes back with it.
        packed = zlib.compress(payload.SerializeToString(), level=1)
        if len(packed) >= payload.ByteSize():
            return payload
        return Payload(metadata={"encoding": self.ENCODING}, data=packed)

    def _restored(self, payload: Payload) -> Payload:
        # What was written before the codec was introduced stays readable.
        if payload.metadata.get("encoding") != self.ENCODING:
            return payload
        return Payload.FromString(zlib.decompress(payload.data))


class Encryption(PayloadCodec):
    """AES-256-GCM with a ring of keys: writes with the current one, reads with the one that the payload names.

    To rotate, give every process the ring with the new key in it, and only then make that one the current
    key. An old key stays in the ring for as long as there are histories that it wrote.
    """

    ENCODING = b"binary/encrypted"

    def __init__(self, keys: Mapping[str, bytes], current: str) -> None:
        self._ring = {name: AESGCM(key) for name, key in keys.items()}
        self._current = current

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [self._sealed(payload) for payload in payloads]

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [self._opened(payload) for payload in payloads]

    def _sealed(self, payload: Payload) -> Payload:
        nonce = os.urandom(12)  # a new one each time: GCM is broken by one that is used twice
        name = self._current.encode()
        sealed = self._ring[self._current].encrypt(nonce, payload.SerializeToString(), name)
        return Payload(metadata={"encoding": self.ENCODING, "encryption-key-id": name}, data=nonce + sealed)

    def _opened(self, payload: Payload) -> Payload:
        if payload.metadata.get("encoding") != self.ENCODING:
            return payload
        name = payload.metadata["encryption-key-id"]
        if name.decode() not in self._ring:
            raise LookupError(f"no key {name.decode()!r} in the ring")
        return Payload.FromString(self._ring[name.decode()].decrypt(payload.data[:12], payload.data[12:], name))


class InTurn(PayloadCodec):
    """Several codecs as one. Compression comes first: what is encrypted gets no smaller."""

    def __init__(self, *codecs: PayloadCodec) -> None:
        self._codecs = codecs

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        for codec in self._codecs:
            payloads = await codec.encode(payloads)
        return list(payloads)

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        for codec in reversed(self._codecs):
            payloads = await codec.decode(payloads)
        return list(payloads)


class FolderStorage(StorageDriver):
    """Keeps large payloads as files of a folder that every client and worker can reach.

    A file is named by the SHA-256 of what it holds: storing the same payload again, as a retry does, changes
    nothing, and what comes back can be checked. Delete files no sooner than the histories that name them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def name(self) -> str:
        return "folder"

    async def store(self, context: StorageDriverStoreContext, payloads: Sequence[Payload]) -> list[StorageDriverClaim]:
        names = await asyncio.gather(*(asyncio.to_thread(self._write, payload) for payload in payloads))
        return [StorageDriverClaim({"sha256": name}) for name in names]

    async def retrieve(
        self, context: StorageDriverRetrieveContext, claims: Sequence[StorageDriverClaim]
    ) -> list[Payload]:
        names = (claim.claim_data["sha256"] for claim in claims)
        return await asyncio.gather(*(asyncio.to_thread(self._read, name) for name in names))

    def _write(self, payload: Payload) -> str:
        data = payload.SerializeToString()
        path = self._folder / digest(data)
        if not path.exists():
            # Nobody ever sees half a file, not even after a crash: the new name appears when all is there.
            part = path.with_suffix(f".{uuid.uuid4().hex}")
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        sync_folder(self._folder)  # the name as well, before a history refers to it
        return path.name

    def _read(self, name: str) -> Payload:
        # A claim comes from the history: it must not lead out of the folder.
        if not re.fullmatch(r"[0-9a-f]{64}", name):
            raise ValueError(f"not a name that this driver gives: {name!r}")
        data = (self._folder / name).read_bytes()
        if digest(data) != name:
            raise ValueError(f"{name} was changed in storage")
        return Payload.FromString(data)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def converter_with(codec: PayloadCodec, folder: Path | None = None) -> DataConverter:
    converter = DataConverter(
        payload_codec=codec,
        # Without it the messages and stack traces of failures are not given to the codec.
        failure_converter_class=DefaultFailureConverterWithEncodedAttributes,
    )
    if folder is None:
        return converter
    return replace(converter, external_storage=ExternalStorage(drivers=[FolderStorage(folder)]))


@activity.defn
async def stamp(document: bytes) -> bytes:
    return document


@workflow.defn
class Stamp:
    """The document goes four ways: to the workflow, to the activity, and both back."""

    @workflow.run
    async def run(self, document: bytes) -> bytes:
        return await workflow.execute_activity(stamp, document, start_to_close_timeout=timedelta(minutes=1))


async def example_pf_03(client: Client) -> None:
    keys = {"january": AESGCM.generate_key(256)}
    codec = InTurn(Compression(), Encryption(keys, "january"))
    with tempfile.TemporaryDirectory() as folder:
        config = client.config()
        config["data_converter"] = converter_with(codec, Path(folder))
        client = Client(**config)
        async with Worker(client, task_queue="documents", workflows=[Stamp], activities=[stamp]):
            document = os.urandom(10_000_000)
            id = f"document-{uuid.uuid4()}"
            handle = await client.start_workflow(Stamp.run, document, id=id, task_queue="documents")
            whole = await handle.result() == document
            history = sum(event.ByteSize() for event in (await handle.fetch_history()).events)
            print(f"{len(document):,} bytes came back whole: {whole}. The history has {history:,} bytes.")


# PF-03 put to the test -------------------------------------------------------------------------------

KB, MB = 1 << 10, 1 << 20
MESSAGE = 4 * MB  # the end of a message, which is that of gRPC


@dataclass(frozen=True)
class Room:
    """What the evaluated server takes, in bytes. It may be set otherwise than to the default of 2 MB."""

    limit: int  # of a payload with its metadata, as the server tells it; the worker's own check goes by it
    passes: int  # the largest start argument that was taken
    refused: int  # more than the server takes, whatever it tells
    between: str | None = None  # who refuses what is larger, when it is not Temporal

    @property
    def too_much(self) -> int:
        return self.limit + 1

    @property
    def part(self) -> int:
        """Of a payload that is allowed, but `parts` of which are more than a message may have."""
        return min(self.limit * 3 // 4, 3 * MB // 2)

    @property
    def parts(self) -> int:
        return -(-9 * MB // 2 // self.part)

    def refuses(self, seen: str, size: int) -> Fact:
        """Whether so many bytes were refused as they must be: by the limit of a payload, or by that of a message."""
        if self.between:  # where it was asked for, and what it saw of them once they were compressed, decides
            return differs(seen, "no error")
        by_payload, by_message = "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"
        if abs(size - MESSAGE) < 64 * KB:
            return one_of(seen, by_payload, by_message)
        return equal(seen, by_payload if size < MESSAGE else by_message)


async def find_room(lab: Lab) -> Room:
    """Ask for the limit of a payload, and try whether it is so: something else on the way may take less."""
    told = lab.limit("payload")
    most = min(told or MESSAGE, MESSAGE) - KB - (0 if told and told < MESSAGE else 64 * KB)
    if why := await try_start(lab, most):
        low, high, why = await narrowed(lab, KB, most, why)
        # A margin for what else stands in the larger messages that carry it further.
        return Room(told or high, low - 16 * KB, max(told or 0, high) + 1, stranger(why))
    refused = (told or most) + 1
    if told and told < MESSAGE and await try_start(lab, refused + KB) is None:
        # Where the limit is set below the size at which the server warns, it is that size which counts.
        _, refused, _ = await narrowed(lab, refused, MESSAGE, "")
    return Room(told or most + 64 * KB, most, refused + 64 * KB if told is None else refused)


async def narrowed(lab: Lab, low: int, high: int, why: str) -> tuple[int, int, str]:
    """Between what passes and what does not, to 8 KB. Returns both, and the refusal's text."""
    while high - low > 8 * KB:
        middle = (low + high) // 2
        refused = await try_start(lab, middle)
        low, high, why = (middle, high, why) if refused is None else (low, middle, refused)
    return low, high, why


async def try_start(lab: Lab, size: int) -> str | None:
    """Start a workflow that nobody works on, with an argument of so many bytes. Returns the refusal's text, or None."""
    id = f"{lab.id}-room-{size}"
    request = StartWorkflowExecutionRequest(
        namespace=lab.client.namespace, workflow_id=id, request_id=id,
        workflow_type={"name": "Nothing"}, task_queue={"name": f"{lab.id}-nobody"},  # type: ignore[arg-type]
        # Random, since messages are compressed on the way, and a proxy counts what it sees.
        input={"payloads": [Payload(data=os.urandom(size - 100))]},  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        await lab.client.workflow_service.start_workflow_execution(request)
    except RPCError as error:
        too_large(error)
        return str(error)
    await lab.client.get_workflow_handle(id).terminate(reason="it served its purpose")
    return None


def too_large(error: RPCError) -> str:
    """By whom something was refused for its size, and how; raises what is no such refusal.

    The server's limit of a payload speaks first, then that of a message, then whatever stands before the server.
    """
    if who := stranger(str(error)):
        return who
    of_payload = error.status == RPCStatusCode.INVALID_ARGUMENT and re.search(r"(?i)size|exceed", error.message)
    of_message = error.status == RPCStatusCode.RESOURCE_EXHAUSTED and "larger than max" in error.message
    if not of_payload and not of_message:
        raise error
    return name_of(error.status)


async def refused(call: Awaitable[object]) -> str:
    """How a call was refused for the size of what it sends, or "no error"."""
    try:
        await call
    except RPCError as error:
        return too_large(error)
    return "no error"


class Digests(Interceptor):
    """Writes down what an activity is given, by its size and digest: the lab's own ledger would hold all of it."""

    def __init__(self, ledger: str) -> None:
        self.ledger = ledger

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        ledger = self.ledger

        class Noting(ActivityInboundInterceptor):
            async def execute_activity(self, input: ExecuteActivityInput) -> Any:
                data = input.args[0]
                said = f"{len(data)} {digest(data)}" if isinstance(data, bytes) else repr(data)[:40]
                note(ledger, f"{activity.info().workflow_id} {said}")
                return await self.next.execute_activity(input)

        return Noting(next)


@dataclass
class Relay:
    """Sends data through the lesson's workflow, with one data converter at client and worker."""

    lab: Lab
    client: Client
    queue: str

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, lab: Lab, name: str, converter: DataConverter = DataConverter.default
    ) -> AsyncIterator["Relay"]:
        client, queue = await connect(lab.target, data_converter=converter), f"{lab.id}-{name}"
        noting = Digests(lab.file("digests"))
        async with lab.worker(
            [Stamp, Weigh, Echo, Pressing], [stamp, weigh, echo, press], client=client, task_queue=queue, watched=False,
            interceptors=[noting],
        ):  # fmt: skip
            yield cls(lab, client, queue)

    async def start(self, run: Any, data: object) -> Handle:
        options: dict[str, Any] = {"client": self.client, "task_queue": self.queue, "task_timeout": PATIENT}
        return await self.lab.start(run, data, id=f"{self.queue}-{uuid.uuid4().hex[:8]}", **options)

    async def send(self, data: bytes) -> "Sent":
        """To the workflow, to its activity, and both back."""
        begun = time.monotonic()
        handle = await self.start(Stamp.run, data)
        same = (await ended(handle)).result == data
        seconds = time.monotonic() - begun
        given = [line.partition(" ")[2] for line in notes(self.lab.file("digests")) if line.startswith(handle.id)]
        whole = same and given == [f"{len(data)} {digest(data)}"]
        return Sent(handle, seconds, whole, sum(event.ByteSize() for event in (await handle.fetch_history()).events))


@dataclass
class Sent:
    """What became of data that was sent: after how long, whether it arrived whole everywhere, bytes of history."""

    handle: Handle
    seconds: float
    whole: bool
    history: int


def plot_payload(most: int, sizes: Mapping[int, Sequence[float]]) -> str:
    drawing = new_figure()
    axes = drawing.subplots()
    middle = [1000 * statistics.median(one) for one in sizes.values()]
    low = [mid - 1000 * min(one) for mid, one in zip(middle, sizes.values(), strict=True)]
    high = [1000 * max(one) - mid for mid, one in zip(middle, sizes.values(), strict=True)]
    axes.errorbar([size / KB for size in sizes], middle, [low, high], fmt="o-", capsize=4, label="median, min to max")
    axes.axvline(most / KB, linestyle="--", color="gray", label="limit of a payload")
    axes.set(xscale="log", ylim=(0, None), xlabel="payload (KB)", ylabel="start to result (ms)")
    axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    axes.minorticks_off()
    axes.set_title("A payload to a workflow, to its activity, and back")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    return save(drawing, "pf_payload")


async def sizes_that_pass(lab: Lab, room: Room) -> Evidence:
    """All sizes by turns, of data that nothing can compress."""
    smaller = [size for size in (KB, 10 * KB, 100 * KB, MB) if size < room.passes]
    sizes = {f"{size // KB:,} KB": size for size in [*smaller, room.passes]}
    damaged: list[str] = []
    async with Relay.open(lab, "sizes") as relay:

        async def turn() -> Mapping[str, float]:
            sent = {name: await relay.send(os.urandom(size)) for name, size in sizes.items()}
            damaged.extend(name for name, one in sent.items() if not one.whole)
            return {name: one.seconds for name, one in sent.items()}

        await relay.send(b"warm")
        seconds = await by_turns(turn, least=2, most=3)
    more = f"than {room.passes // KB:,} KB does not arrive: {room.between}"
    return works(
        "1 KB to just under the limit pass whole: as start argument, activity argument, activity result and result",
        damaged=equal(damaged, []),
        **{f"start to result, {name}": in_ms(one) for name, one in seconds.items()},
        **({"what_is_larger": more} if room.between else {}),
        **await pictured(lab, functools.partial(plot_payload, room.limit), {sizes[n]: s for n, s in seconds.items()}),
    )


@activity.defn
async def swallow(data: bytes) -> int:
    return len(data)


@activity.defn
async def produce(size: int) -> bytes:
    return bytes(size)


ARGUMENT, RESULT, ACTIVITY_RESULT, TOGETHER = "activity argument", "workflow result", "activity result", "together"


@dataclass
class Excess:
    """Over the limit by `size`, in one of four places; of the fourth, so many parts of a size that is allowed."""

    way: str
    size: int
    part: int
    parts: int


@workflow.defn
class TooBig:
    @workflow.run
    async def run(self, excess: Excess) -> bytes | str:
        retries = RetryPolicy(initial_interval=timedelta(milliseconds=100), maximum_attempts=2)
        options: Any = {"start_to_close_timeout": PATIENT, "retry_policy": retries}
        if excess.way == ARGUMENT:
            await workflow.execute_activity(swallow, bytes(excess.size), **options)
        if excess.way == ACTIVITY_RESULT:
            try:
                await workflow.execute_activity(produce, excess.size, **options)
            except ActivityError as error:
                return str(error.cause)
        if excess.way == TOGETHER:  # in one message to the server
            parts = (workflow.execute_activity(swallow, bytes(excess.part), **options) for _ in range(excess.parts))
            await asyncio.gather(*parts)
        return bytes(excess.size) if excess.way == RESULT else "passed"


async def too_big(lab: Lab, way: str, queue: str, room: Room, size: int) -> Outcome:
    id = f"{queue}-{way.replace(' ', '-')}"
    begun = time.monotonic()
    excess = Excess(way, size, room.part, room.parts)
    return await outcome_of(await lab.start(TooBig.run, excess, id=id, task_queue=queue), begun)


async def refused_to_the_caller(lab: Lab, room: Room) -> Evidence:
    """Whoever sends too much from outside is told at once."""
    begun, nobody = time.monotonic(), f"{lab.id}-nobody"
    start = await refused(lab.start(Stamp.run, bytes(room.refused), name="refused", task_queue=nobody))
    seconds = time.monotonic() - begun
    receiver = await lab.start(Stamp.run, b"", name="receiver", task_queue=nobody)
    signalled = await refused(receiver.signal("take", "x" * room.refused))
    events = await count_events(receiver)
    await receiver.terminate(reason="it served its purpose")
    return holds(
        "a start or signal argument over the limit: the caller is refused, and nothing is left on the server",
        start=room.refuses(start, room.refused),
        after=figure(1000 * seconds, "ms"),
        then_the_run_is=equal(await described(lab, "refused"), "NOT_FOUND"),
        signal=room.refuses(signalled, room.refused),
        signals_in_the_history=equal(events["WORKFLOW_EXECUTION_SIGNALED"], 0),
        bytes=room.refused,
    )


async def described(lab: Lab, name: str) -> str:
    """How the server refuses to describe a run; nothing when it does describe it."""
    return await refusal(lab.client.get_workflow_handle(f"{lab.id}-{name}"))


async def over_the_limit(lab: Lab, room: Room) -> list[Evidence]:
    """What comes from inside a workflow, past the worker's own check of sizes."""
    checking, ledger = f"{lab.id}-checking", lab.file("over")
    # What a stranger on the way does not let pass never comes to the server, and the worker tries for ever.
    arrives = room.between is None
    ways = (ARGUMENT, RESULT, ACTIVITY_RESULT, *([TOGETHER] if arrives else []))
    async with too_big_worker(lab, ledger, task_queue=checking):
        found = await together(*(too_big(lab, way, checking, room, room.too_much) for way in ways))
    outcomes = dict(zip(ways, found, strict=True))
    result = outcomes[ACTIVITY_RESULT]
    return [
        holds(
            "an activity result over the limit: an error that the workflow can handle, after the usual retries",
            workflow=equal(result.status, "COMPLETED"),
            error=contains(result.answer, "PayloadsTooLarge"),
            attempts=equal(len([line for line in notes(ledger) if f"{checking}-activity-result" in line]), 2),
            after=figure(result.seconds, "s"),
        ),
        *(hangs(way, outcomes[way]) for way in (ARGUMENT, RESULT)),
        in_one_message(outcomes.get(TOGETHER), room),
    ]


def too_big_worker(lab: Lab, ledger: str, **options: Any) -> Worker:
    return lab.worker([TooBig], [swallow, produce], watched=False, interceptors=[Digests(ledger)], **options)


def hangs(way: str, outcome: Outcome) -> Evidence:
    return limit(
        f"{'an' if way == ARGUMENT else 'a'} {way} over the limit: the workflow hangs in retries and nobody is told",
        workflow=equal(outcome.status, "RUNNING"),
        its_workflow_task=outcome.failed,
        after=figure(outcome.seconds, "s"),
    )


def in_one_message(message: Outcome | None, room: Room) -> Evidence:
    claim = (
        "several activity arguments that are allowed, in one message that is not: the run is ended and says why, but "
        "cannot handle it"
    )
    if message is None:
        return not_run("holds", claim, str(room.between))
    if message.answer == "passed":
        size = room.parts * room.part
        return not_run("holds", claim, f"a message of {size:,} bytes passes here, so its end was not met")
    return holds(
        claim,
        workflow=equal(message.status, "TERMINATED"),
        why=contains(message.answer, "GrpcMessageTooLarge"),
        arguments=room.parts,
        bytes_of_each=room.part,
        after=figure(message.seconds, "s"),
    )


UNCHECKED = "with Worker(disable_payload_error_limit=True) the same two are ended by the server and say why"
NO_CHECK = "temporalio.worker.Worker(disable_payload_error_limit)"


@piece(holds(UNCHECKED))
async def unchecked(lab: Lab, room: Room) -> Evidence:
    """The way out of the hang: the server's check, which comes after the worker's, ends the run."""
    requires(NO_CHECK)
    if room.between:
        raise NotRun(room.between)
    queue, ways = f"{lab.id}-trusting", (ARGUMENT, RESULT)
    async with too_big_worker(lab, lab.file("over-unchecked"), task_queue=queue, disable_payload_error_limit=True):
        found = await together(*(too_big(lab, way, queue, room, room.refused) for way in ways))
    outcomes = dict(zip(ways, found, strict=True))
    # A payload that is allowed more than a message is too large as a message first.
    why = "size limit" if room.limit < MESSAGE else "GrpcMessageTooLarge"
    facts: dict[str, Any] = {way: equal(one.status, "TERMINATED") for way, one in outcomes.items()}
    facts |= {f"why the {way.split()[0]} was": contains(one.answer, why) for way, one in outcomes.items()}
    return holds(UNCHECKED, **facts)


async def compressed(lab: Lab, room: Room) -> list[Evidence]:
    """Five times as much text as a payload may have, which repeats itself, with and without the codec."""
    many = 5 * max(room.passes + KB, room.refused // KB * KB if room.refused < MESSAGE else 0)
    lines = (f"{number:07d} the customer asked for a refund and got it\n".encode() for number in range(many // 50))
    data = b"".join(lines)[:many]
    async with Relay.open(lab, "compressed", DataConverter(payload_codec=Compression())) as relay:
        sent = await relay.send(data)
        noise = await refused(relay.start(Stamp.run, os.urandom(many)))
    plain = await refused(lab.start(Stamp.run, data, name="plain", task_queue=f"{lab.id}-nobody"))
    return [
        holds(
            "a compression codec: text of five times the size that a payload may have passes whole",
            arrived_whole=equal(sent.whole, True),
            bytes=many,
            bytes_of_history=at_most(sent.history, many - 1),
            took=figure(sent.seconds, "s"),
            as_many_random_bytes=room.refuses(noise, many),
        ),
        control(
            "the same text without the codec is refused",
            start=room.refuses(plain, many),
            then_the_run_is=equal(await described(lab, "plain"), "NOT_FOUND"),
        ),
    ]


@dataclass
class Confidence:
    secret: str


@activity.defn
async def whisper(told: Confidence) -> str:
    return told.secret


@activity.defn
async def blurt(told: Confidence) -> None:
    raise ApplicationError(f"cannot keep {told.secret}", told.secret, non_retryable=True)


@workflow.defn
class Confide:
    """A secret in every place that a payload has: arguments, results, a signal, and a failure with its message."""

    def __init__(self) -> None:
        self.word = ""

    @workflow.run
    async def run(self, told: Confidence) -> str:
        await workflow.execute_activity(whisper, told, start_to_close_timeout=PATIENT)
        try:
            await workflow.execute_activity(blurt, told, start_to_close_timeout=PATIENT)
        except ActivityError:
            await workflow.wait_condition(lambda: self.word != "")
        return await workflow.execute_activity(whisper, told, start_to_close_timeout=PATIENT) + self.word

    @workflow.signal
    def go_on(self, word: str) -> None:
        self.word = word


@dataclass
class Confided:
    """A secret that went through Confide, whether it came through, and what the history holds, before any codec."""

    secret: bytes
    came_through: bool
    history: WorkflowHistory

    @property
    def raw(self) -> bytes:
        return b"".join(event.SerializeToString() for event in self.history.events)

    @property
    def found(self) -> int:
        return self.raw.count(self.secret)


async def confide(lab: Lab, target: Target, name: str, before: DataConverter, after: DataConverter) -> Confided:
    """Run Confide with one data converter, and with another one from its middle on."""
    secret, queue = f"{name}-{secrets.token_hex(16)}", f"{lab.id}-{name}"
    worker = functools.partial(lab.worker, [Confide], [whisper, blurt], task_queue=queue)
    client = await connect(target, data_converter=before)
    handle = await lab.start(Confide.run, Confidence(secret), id=queue, client=client, task_queue=queue)

    async def failed() -> bool:
        events = await count_events(handle)
        # With the workflow task after it, or that would be lost with its worker, and waited for.
        return events["ACTIVITY_TASK_FAILED"] == 1 and events["WORKFLOW_TASK_COMPLETED"] == 3

    async with worker(client=client):
        await until(failed, "the first half is done")
    client = await connect(target, data_converter=after)
    handle = client.get_workflow_handle(queue)
    async with worker(client=client):
        await handle.signal(Confide.go_on, f" and {secret}")
        result = (await ended(handle)).result
    given = [call.argument["secret"] for call in lab.calls(queue)]
    return Confided(secret.encode(), result == f"{secret} and {secret}" and given == [secret] * 3,
                    await handle.fetch_history())  # fmt: skip


async def unreadable(payload: Payload, reader: PayloadCodec) -> str:
    """How a codec, such as one with another ring of keys, refuses a payload; "readable" when it does not."""
    try:
        await reader.decode([payload])
    except (InvalidTag, LookupError) as error:
        return type(error).__name__
    return "readable"


def turned(data: bytes) -> bytes:
    """The same with its last bit turned."""
    return data[:-1] + bytes([data[-1] ^ 1])


def on_disk(lab: Lab) -> bytes:
    """Everything that the item's private server has written: its SQLite file with what stands beside it."""
    return b"".join(path.read_bytes() for path in sorted(lab.folder.glob("*.sqlite*")))


async def encryption(lab: Lab) -> list[Evidence]:
    """Three runs with a secret: encrypted over a key rotation, without the failure converter, and in plain text."""
    keys = {"january": AESGCM.generate_key(256), "february": AESGCM.generate_key(256)}
    before, after = Encryption({"january": keys["january"]}, "january"), Encryption(keys, "february")
    half = DataConverter(payload_codec=after)
    async with lab.private_server(file=True) as server:
        sealed, leaking, open_ = await together(
            confide(lab, server.target, "sealed", converter_with(before), converter_with(after)),
            confide(lab, server.target, "leaking", half, half),
            confide(lab, server.target, "open", DataConverter.default, DataConverter.default),
        )
        server.kill()  # all that it will ever write is written
        disk = await asyncio.to_thread(on_disk, lab)
    used = Counter(re.findall(rb"encryption-key-id\x12.(january|february)", sealed.raw, re.DOTALL))
    first = sealed.history.events[0].workflow_execution_started_event_attributes.input.payloads[0]
    spoilt = Payload(metadata=first.metadata, data=turned(first.data))
    return [
        holds(
            "an encryption codec whose key is rotated in the middle of a run: it finishes, under both keys",
            came_through=equal(sealed.came_through, True),
            payloads_with_january=at_least(used[b"january"], 1),
            payloads_with_february=at_least(used[b"february"], 1),
            the_first_payload_with_the_new_ring=equal(await unreadable(first, after), "readable"),
        ),
        holds(
            "the encrypted secret stands nowhere in the history and nowhere in the server's SQLite file",
            found_in_the_history=equal(sealed.found, 0),
            found_on_disk=equal(disk.count(sealed.secret), 0),
            bytes_of_history=len(sealed.raw),
            bytes_on_disk=len(disk),
            looked_for_in="arguments, results, signal, failure message and its stack trace",
        ),
        holds(
            "an encrypted payload that was changed on the way is refused",
            with_its_last_bit_turned=equal(await unreadable(spoilt, after), "InvalidTag"),
        ),
        control(
            "without the codec the secret stands in both",
            found_in_the_history=at_least(open_.found, 1),
            found_on_disk=at_least(disk.count(open_.secret), 1),
        ),
        control(
            "with the codec but without DefaultFailureConverterWithEncodedAttributes the failure's message leaks",
            found_in_the_history=at_least(leaking.found, 1),
        ),
        control(
            "with a wrong key, or without the old one in the ring, the history is unreadable",
            another_key_of_the_same_name=equal(
                await unreadable(first, Encryption({"january": AESGCM.generate_key(256)}, "january")), "InvalidTag"
            ),
            a_ring_without_the_old_key=equal(
                await unreadable(first, Encryption({"february": keys["february"]}, "february")), "LookupError"
            ),
        ),
    ]


@activity.defn
async def echo(value: Any) -> Any:
    return value


@workflow.defn
class Echo:
    @workflow.run
    async def run(self, value: Any) -> Any:
        return await workflow.execute_activity(echo, value, start_to_close_timeout=PATIENT)


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else "core"


# What becomes of them without any codec, and by readers in other languages, is VR-04's.
ODD: Mapping[str, Any] = {
    "nothing": None,
    "an empty text": "",
    "no bytes": b"",
    "an empty list": [],
    "a null byte": "a\0b",
    "a lone surrogate": "a\ud800b",
    "2**53 + 1": 2**53 + 1,
    "NaN": math.nan,
    "100 lists in each other": nested(100),
}


def became(value: Any, result: Any) -> str:
    return "kept" if repr(result) == repr(value) else f"{result!r:.40}"


ODD_KEPT = "odd values come back through codecs and storage as they went"
STORAGE = "temporalio.converter.DataConverter(external_storage)"


@piece(holds(ODD_KEPT))
async def odd_values(lab: Lab) -> Evidence:
    """Each through the lesson's codecs and its storage, which here is given everything, small things too."""
    requires(STORAGE)
    folder = Path(lab.file("odd"))
    folder.mkdir()
    everything = ExternalStorage(drivers=[FolderStorage(folder)], payload_size_threshold=0)
    codec = InTurn(Compression(), Encryption({"january": AESGCM.generate_key(256)}, "january"))
    async with Relay.open(lab, "odd", DataConverter(payload_codec=codec, external_storage=everything)) as relay:
        handles = [await relay.start(Echo.run, value) for value in ODD.values()]
        results = dict(zip(ODD, [(await ended(handle)).result for handle in handles], strict=True))
    return holds(
        ODD_KEPT,
        **{name: equal(became(value, results[name]), "kept") for name, value in ODD.items()},
        files_in_storage=at_least(len(list(folder.iterdir())), len(ODD)),
    )


@workflow.defn
class Weigh:
    """One way only, for what is too large to be sent about.

    The workflow hands it on unopened: a workflow that converts 100 MB soon takes longer than the 2 s after
    which the worker calls it deadlocked.
    """

    @workflow.run
    async def run(self, data: RawValue) -> int:
        return await workflow.execute_activity(weigh, args=[data], start_to_close_timeout=PATIENT)


@activity.defn
def weigh(data: bytes) -> int:
    return len(data)


@dataclass
class Press:
    ledger: str
    gate: str
    size: int


@activity.defn
async def press(how: Press) -> bytes:
    """Notes that it runs, and answers with so many bytes once the gate is open."""
    note(how.ledger, "pressed")
    await until(Path(how.gate).exists, "the gate is open", 120)
    return os.urandom(how.size)


@workflow.defn
class Pressing:
    @workflow.run
    async def run(self, how: Press) -> int:
        return len(await workflow.execute_activity(press, how, start_to_close_timeout=PATIENT))


async def by_driver(driver: FolderStorage, name: str) -> str:
    """How a driver refuses to read a claim, or "read"."""
    try:
        await driver.retrieve(StorageDriverRetrieveContext(), [StorageDriverClaim({"sha256": name})])
    except ValueError as error:
        return str(error).removeprefix(name).strip()
    return "read"


STORED = "external storage: 10 MB all four ways and many more one way arrive whole, and the histories stay small"
SPOILT = "a file that was changed in storage is refused, and so is a reference that leads out of the folder"
UNSTORED = "the same 10 MB without storage are refused"
EMPTIED = "with the folder emptied the result is gone: the history holds a reference, no copy"


@piece(holds(STORED), holds(SPOILT), control(UNSTORED), control(EMPTIED))
async def external_storage(lab: Lab, room: Room) -> list[Evidence]:
    """Ten megabytes all four ways and many one way, through a folder; then the folder is emptied."""
    requires(STORAGE)
    folder = Path(lab.file("storage"))
    folder.mkdir()
    driver, many = FolderStorage(folder), (100 if lab.flag("full") else 32) * MB
    converter = DataConverter(external_storage=ExternalStorage(drivers=[driver]))
    data, more = await asyncio.to_thread(os.urandom, 10 * MB), await asyncio.to_thread(os.urandom, many)
    async with Relay.open(lab, "storage", converter) as relay:
        sent = await relay.send(data)
        begun = time.monotonic()
        handle = await relay.start(Weigh.run, more)
        weighed = await handle.result()
        seconds = time.monotonic() - begun
    given = [line.split()[1:] for line in notes(lab.file("digests")) if line.startswith(handle.id)]
    history = sum(event.ByteSize() for event in (await handle.fetch_history()).events)
    stored = sorted(path.stat().st_size // MB for path in folder.iterdir())
    start = await refused(lab.start(Stamp.run, data, name="unstored", task_queue=f"{lab.id}-nobody"))
    one = min(folder.iterdir())
    one.write_bytes(turned(one.read_bytes()))
    spoilt, astray = await by_driver(driver, one.name), await by_driver(driver, "../calls")
    for path in folder.iterdir():
        path.unlink()
    gone = "still there"
    try:
        await sent.handle.result()
    except Exception as error:
        gone = next((type(one).__name__ for one in causes(error) if isinstance(one, FileNotFoundError)), str(error))
    return [
        holds(
            STORED,
            all_four_ways_whole=equal(sent.whole, True),
            one_way_whole=equal(weighed == many and given == [[f"{many}", digest(more)]], True),
            MB_one_way=many // MB,
            bytes_of_history=at_most(sent.history, 20 * KB),
            of_the_other=at_most(history, 20 * KB),
            files_in_storage_MB=equal(stored, [10, many // MB]),
            all_four_ways=figure(sent.seconds, "s"),
            one_way=figure(seconds, "s"),
        ),
        holds(
            SPOILT,
            changed=contains(spoilt, "was changed in storage"),
            astray=contains(astray, "not a name that this driver gives"),
        ),
        control(
            UNSTORED,
            start=room.refuses(start, len(data)),
            then_the_run_is=equal(await described(lab, "unstored"), "NOT_FOUND"),
        ),
        control(
            EMPTIED,
            reading_the_result_again=equal(gone, "FileNotFoundError"),
        ),
    ]


BY_S3 = (
    "the SDK's own driver keeps payloads in an S3 bucket: 6 MB all four ways arrive whole, and the history stays small"
)
BUCKET_SILENT = (
    "while the bucket does not answer, a start that needs it fails to its caller and leaves no run; a run whose "
    "argument is in it waits, and completes once the bucket answers"
)
RESULT_REFUSED = "an activity whose result the bucket does not take runs again, and its workflow completes"
NOT_IN_S3 = "the same 6 MB without the driver are refused"
BUCKET_LOST = "with the bucket lost the result is gone, and the driver says so"
S3_DRIVER = "temporalio.contrib.aws.s3driver.S3StorageDriver"


@contextlib.asynccontextmanager
async def open_bucket() -> AsyncIterator[Bucket]:
    """An empty bucket of moto's S3 server, ended with the block. Raises NotRun where moto is not installed."""
    for module in ("moto", "aioboto3"):
        if importlib.util.find_spec(module) is None:
            raise NotRun(f"{module} is not installed, which a bucket needs: uv sync --group cluster")
    folder = make_folder()
    site = Site(NO_PROGRAMS, folder, Guard(folder), None)
    try:
        bucket = Bucket(site)
        await bucket.start(60 * slowness())
        yield bucket
    finally:
        site.close()


@contextlib.asynccontextmanager
async def kept_in(bucket: Bucket) -> AsyncIterator[DataConverter]:
    """A data converter with the SDK's driver for a bucket."""
    import aioboto3
    from aiobotocore.config import AioConfig
    from temporalio.contrib.aws.s3driver import S3StorageDriver
    from temporalio.contrib.aws.s3driver.aioboto3 import new_aioboto3_client

    # Loopback is not asked for through a proxy, and a bucket that does not answer is soon given up.
    config = AioConfig(proxies={}, connect_timeout=2, read_timeout=3 * slowness(), retries={"max_attempts": 0})
    async with aioboto3.Session().client(
        "s3", endpoint_url=bucket.url, region_name="us-east-1", config=config,
        aws_access_key_id="evaluation", aws_secret_access_key="evaluation",
    ) as client:  # fmt: skip
        driver = S3StorageDriver(client=new_aioboto3_client(client), bucket=bucket.NAME)
        yield DataConverter(external_storage=ExternalStorage(drivers=[driver]))


async def failure_of(call: Awaitable[object]) -> str:
    """What a call that needs a storage driver fails with, or "no error"."""
    try:
        await call
    except Exception as error:
        told = [str(one) for one in causes(error)]
        return next((one for one in told if "StorageDriver" in one), told[0])
    return "no error"


@piece(holds(BY_S3), holds(BUCKET_SILENT), holds(RESULT_REFUSED), control(NOT_IN_S3), control(BUCKET_LOST))
async def by_s3(lab: Lab, room: Room) -> list[Evidence]:
    """Six megabytes through a bucket that works, that does not answer for a while, and that is gone."""
    requires(S3_DRIVER)
    data = await asyncio.to_thread(os.urandom, 6 * MB)
    async with open_bucket() as bucket, kept_in(bucket) as converter:
        async with Relay.open(lab, "s3", converter) as relay:
            sent = await relay.send(data)
        keys = bucket.keys()
        pressed = await answer_to_silence(lab, bucket, converter)
        waiting = await relay.start(Stamp.run, data)
        bucket.pause()
        unheard = await failure_of(
            relay.client.start_workflow(Stamp.run, data, id=f"{lab.id}-silent", task_queue=lab.id)
        )
        async with Relay.open(lab, "s3", converter):
            await until(lambda: failed_tasks(waiting), "the worker has asked the bucket in vain", 120)
            (why, *_), status = await failed_tasks(waiting), await status_of(waiting)
            bucket.resume()
            begun = time.monotonic()
            whole = await waiting.result() == data
            seconds = time.monotonic() - begun
        bucket.kill()
        lost = await failure_of(sent.handle.result())
    start = await refused(lab.start(Stamp.run, data, name="no-driver", task_queue=f"{lab.id}-nobody"))
    store, retrieve = "S3StorageDriver store failed", "S3StorageDriver retrieve failed"
    return [
        holds(
            BY_S3,
            whole=equal(sent.whole, True),
            bytes_of_history=at_most(sent.history, 20 * KB),
            objects_in_the_bucket=at_least(len(keys), 1),
            all_four_ways=figure(sent.seconds, "s"),
        ),
        holds(
            BUCKET_SILENT,
            start=contains(without_details(unheard), store),
            then_the_run_is=equal(await described(lab, "silent"), "NOT_FOUND"),
            the_run_that_waits_is=equal(status, "RUNNING"),
            its_workflow_task_failed_with=contains(without_details(why), retrieve),
            whole_once_it_answers=equal(whole, True),
            after=figure(seconds, "s"),
        ),
        pressed,
        control(
            NOT_IN_S3,
            start=room.refuses(start, len(data)),
            then_the_run_is=equal(await described(lab, "no-driver"), "NOT_FOUND"),
        ),
        control(BUCKET_LOST, reading_the_result_again=contains(without_details(lost), retrieve)),
    ]


async def answer_to_silence(lab: Lab, bucket: Bucket, converter: DataConverter) -> Evidence:
    """The bucket falls silent while an activity runs whose result belongs there, until that runs again."""
    how = Press(lab.file("pressed"), lab.gate("pressed"), 6 * MB)
    async with Relay.open(lab, "pressed", converter) as relay:
        handle = await relay.start(Pressing.run, how)
        await until(lambda: notes(how.ledger), "the activity runs")
        bucket.pause()
        open_gate(how.gate)

        async def is_over() -> bool:
            return len(notes(how.ledger)) > 1 or await is_closed_or_stuck(handle)

        await until(is_over, "it runs again, or not any more", 120)
        bucket.resume()
        how_it_ended = await ended(handle)
    started = [one.get("activityTaskStartedEventAttributes", {}) for one in await history_of(handle)]
    failure: dict[str, Any] = next((one["lastFailure"] for one in started if "lastFailure" in one), {})
    said = failure.get("cause", failure).get("message", "")  # the server keeps the cause of what is too long
    return holds(
        RESULT_REFUSED,
        bytes_of_its_result=equal(how_it_ended.result, how.size),
        times_it_ran=at_least(len(notes(how.ledger)), 2),
        the_time_before_failed_with=contains(without_details(said), "S3StorageDriver store failed"),
    )


def without_details(text: str) -> str:
    """What a driver said, without bucket and key, which are other ones in each run."""
    return text.partition(" [")[0]


@PF.item("PF-03", "Payload size limits", seconds=300)
async def payload_size_limits(lab: Lab) -> AsyncIterator[Evidence]:
    """Payloads of growing size, over the limit each way, compressed, encrypted, and kept elsewhere."""
    room = await find_room(lab)
    yield await sizes_that_pass(lab, room)
    parts = (refused_to_the_caller, over_the_limit, unchecked, compressed)
    async for evidence in side_by_side(*(part(lab, room) for part in parts), encryption(lab), odd_values(lab)):
        yield evidence
    for part in (external_storage, by_s3):
        for evidence in await part(lab, room):
            yield evidence
    yield native(
        "codecs are a place to plug one's own into, and no codec comes with the SDK",
        PayloadCodec,
        (DataConverter, "payload_codec"),
        (DataConverter, "failure_converter_class"),
        DefaultFailureConverterWithEncodedAttributes,
        NO_CHECK,
        adds=[Compression.__name__, Encryption.__name__],
    )
    storage = native(
        "external storage is part of the SDK, with drivers for S3 and Google Cloud Storage; one for a folder is not",
        STORAGE,
        "temporalio.converter.ExternalStorage(drivers)",
        "temporalio.converter.StorageDriver",
        "temporalio.converter.StorageDriverClaim",
        S3_DRIVER,
        adds=[FolderStorage.__name__],
    )
    yield storage
    new = "external storage is not generally available yet"
    if storage.stage in (None, "missing", "not readable"):
        yield not_run("limit", new, storage.measured)
    else:
        yield limit(new, its_docstrings_say=one_of(storage.stage, "preview", "experimental", "deprecated"))


if __name__ == "__main__":
    run(PF)
