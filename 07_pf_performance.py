"""PF: performance - what a step costs, how wide work fans out, and how large a payload may be.

Durability is paid for: each step is written down by a server before the next one begins. The three items
measure that price, and where it ends. A figure says as much about the machine as about Temporal, so no
verdict rests on one: each compares what was measured by turns in one run, most of it in a ledger kept
outside Temporal by the activities themselves.
"""

from common import HERE, Category, Evidence, Target, causes, connect, control, holds, limit, native, side_by_side, works
from harness.given import between
from lab import Lab, Server, count_events, name_of, note, notes, refusal, run, status_of, until

import asyncio
import contextlib
import functools
import hashlib
import os
import re
import secrets
import statistics
import time
import uuid
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from temporalio import activity, workflow
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import EventType, WorkflowTaskFailedCause
from temporalio.api.workflowservice.v1 import GetSystemInfoRequest, StartWorkflowExecutionRequest
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle, WorkflowHistory
from temporalio.common import RawValue, RetryPolicy
from temporalio.converter import (
    DataConverter,
    DefaultFailureConverterWithEncodedAttributes,
    ExternalStorage,
    PayloadCodec,
    StorageDriver,
    StorageDriverClaim,
    StorageDriverRetrieveContext,
    StorageDriverStoreContext,
)
from temporalio.exceptions import ActivityError, ApplicationError, TerminatedError
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Worker

# The sandbox imports this file for every run of a workflow, but it need not import these again.
with workflow.unsafe.imports_passed_through():
    import psutil
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PF = Category(
    "PF",
    "Performance",
    "What does a step cost, how wide does work fan out, and how large may a payload be?",
    at_once=1,  # items that measure must not disturb each other
    flags={
        "plot": "write the measured curves to docs/pf_*.svg",
        "full": "fan out to 10,000 activities instead of 3,000 (about a minute more)",
    },
)

# Nothing here is to time out: a slow machine gets all the time it needs.
PATIENT = timedelta(seconds=60)


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def ms(seconds: float) -> str:
    """Seconds as milliseconds with about three digits."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{1000 * seconds:,.0f} ms"


def spread(seconds: Sequence[float]) -> str:
    p50, p95, p99 = (ms(percentile(seconds, percent)) for percent in (50, 95, 99))
    return f"p50 {p50}, p95 {p95}, p99 {p99} (n={len(seconds)})"


def bars(values: Mapping[str, float], unit: str = "") -> str:
    """A picture that survives any terminal: one bar of # for each value, the longest has twelve."""
    longest = max(values.values())
    drawn = (f"{name} {'#' * max(1, round(12 * one / longest))} {one:,.0f}{unit}" for name, one in values.items())
    return "; ".join(drawn)


def histogram(seconds: Sequence[float], bins: int = 5) -> str:
    """How many of the values lie between which milliseconds; the last bin takes the tail."""
    low, high = min(seconds), percentile(seconds, 95)
    width = (high - low) / bins
    placed = Counter(min(int((one - low) / width), bins) for one in seconds)
    names = [f"{1000 * (low + place * width):.1f}+ ms" for place in range(bins + 1)]
    return bars({name: placed[place] for place, name in enumerate(names)})


def server_process(target: Target) -> psutil.Process | None:
    """The process of a server that this script started, or None for one that is not ours."""
    if target.address is None:
        return None
    port = ["--port", target.address.rpartition(":")[2]]
    return next((child for child in psutil.Process().children() if port in map(list, pairwise(child.cmdline()))), None)


@dataclass
class Used:
    """What a measured block took: seconds by the wall clock, and CPU seconds of each group of processes."""

    wall: float = 0
    cpu: dict[str, float] = field(default_factory=dict)
    idle: float = 0  # CPU seconds that nobody on this machine used

    @property
    def others(self) -> float:
        """The part of this machine's CPU that went to programs that are not measured here."""
        every = self.wall * (os.cpu_count() or 1)
        return min(max(1 - (sum(self.cpu.values()) + self.idle) / every, 0), 0.95) if "server" in self.cpu else 0

    def each(self, count: int) -> str:
        """CPU time of each group for one of `count` pieces of work."""
        return ", ".join(f"{name} {ms(used / count)}" for name, used in self.cpu.items()) + unseen(self)

    def cores(self) -> str:
        """How many cores each group kept busy."""
        return ", ".join(f"{name} {used / self.wall:.2f}" for name, used in self.cpu.items()) + unseen(self)


def unseen(used: Used) -> str:
    return "" if "server" in used.cpu else " (the server's process is not ours: its CPU was not seen)"


@contextlib.contextmanager
def metered(target: Target, workers: Iterable[int]) -> Any:
    """Measure what a block takes: the CPU time of the server, the worker processes and this client."""
    server = server_process(target)
    groups = {"server": [server]} if server else {}
    groups |= {"workers": [psutil.Process(pid) for pid in workers], "client": [psutil.Process()]}

    def spent() -> dict[str, float]:
        times = {name: [one.cpu_times() for one in group] for name, group in groups.items()}
        return {name: sum(one.user + one.system for one in group) for name, group in times.items()}

    def idle() -> float:
        now = psutil.cpu_times()
        return float(now.idle + getattr(now, "iowait", 0))

    used, before, begun, rested = Used(), spent(), time.monotonic(), idle()
    yield used
    used.wall, used.idle = time.monotonic() - begun, idle() - rested
    used.cpu = {name: after - before[name] for name, after in spent().items()}


def new_figure(width: float = 7) -> Any:
    """A matplotlib figure that gives the same file for the same data."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "temporal-example", "svg.fonttype": "path", "font.size": 10})
    return Figure(figsize=(width, 3.6), layout="constrained")


def save(figure: Any, name: str) -> str:
    """Write a figure to docs/. Returns where, for a measured text."""
    folder = HERE / "docs"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return f"docs/{name}.svg"


async def plotted(lab: Lab, plot: Callable[..., str], *measured: Any) -> str:
    """Draw what was measured where that is asked for. Returns a remark for a measured text."""
    return f"; curve in {await asyncio.to_thread(plot, *measured)}" if lab.flag("plot") else ""


# PF-01 Step latency ----------------------------------------------------------------------------------
# A step is two round trips over the server's disk: about 10 ms. A local activity is written down together
# with its neighbours, and costs a fraction. Neither costs more in a long run than in a short one.


@dataclass
class Step:
    number: int
    ledger: str  # "" notes nothing
    seconds: float


@activity.defn
async def step(one: Step) -> int:
    """Note the moment it began; what lies between two such moments is what a step costs."""
    if one.ledger:
        note(one.ledger, f"{one.number} {time.monotonic()}")
    if one.seconds:
        await asyncio.sleep(one.seconds)
    return one.number


@dataclass
class Batch:
    steps: int
    ledger: str = ""
    local: bool = False
    seconds: list[float] = field(default_factory=lambda: [0.0])  # what the steps sleep, by turns


async def take_steps(batch: Batch) -> int:
    """The loop that is measured. Regular or local activity: the call is all that differs."""
    taken = 0
    for number in range(batch.steps):
        one = Step(number, batch.ledger, batch.seconds[number % len(batch.seconds)])
        if batch.local:
            await workflow.execute_local_activity(step, one, start_to_close_timeout=PATIENT)
        else:
            await workflow.execute_activity(step, one, start_to_close_timeout=PATIENT)
        taken += 1
    return taken


@workflow.defn
class Walk:
    """A run that lives on and takes steps when asked, so that its steps can alternate with another run's."""

    def __init__(self) -> None:
        self.touches = 0
        self.finished = False

    @workflow.run
    async def run(self) -> None:
        await workflow.wait_condition(lambda: self.finished)

    @workflow.update
    async def take(self, batch: Batch) -> int:
        return await take_steps(batch)

    @workflow.signal
    def touch(self) -> None:
        self.touches += 1

    @workflow.query
    def touched(self) -> int:
        return self.touches

    @workflow.signal
    def finish(self) -> None:
        self.finished = True


@workflow.defn
class BareLoop:
    """The same loop without anything around it."""

    @workflow.run
    async def run(self, batch: Batch) -> int:
        return await take_steps(batch)


class Pace:
    """The seconds between the beginnings of a run's steps, as its ledger has them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.complete = True  # each step was taken once and in order

    def add(self, ledger: str, steps: int, answered: int) -> None:
        lines = [line.split() for line in notes(ledger)]
        began = [float(moment) for _, moment in lines]
        self.seconds += [later - earlier for earlier, later in pairwise(began)]
        self.complete &= [int(number) for number, _ in lines] == list(range(steps)) and answered == steps

    @property
    def p50(self) -> float:
        return statistics.median(self.seconds)


Walker = WorkflowHandle[Walk, None]


async def pace(lab: Lab, walker: Walker, into: Pace, steps: int, local: bool = False) -> None:
    """Let a run take some steps, and add what its ledger says."""
    ledger = lab.file(uuid.uuid4().hex)
    into.add(ledger, steps, await walker.execute_update(Walk.take, Batch(steps, ledger, local)))


async def begin_walk(lab: Lab, name: str) -> Walker:
    walker = await lab.client.start_workflow(Walk.run, id=f"{lab.id}-{name}", task_queue=lab.task_queue)
    await walker.execute_update(Walk.take, Batch(5))  # the first steps warm everything up
    return walker


ROUNDS, STEPS = 8, 26  # 25 gaps a round: 200 of each kind
LONG = 1000


async def by_turns(lab: Lab, walker: Walker) -> tuple[Pace, Pace]:
    """Regular and local steps of one run, by turns."""
    regular, local = Pace(), Pace()
    for _ in range(ROUNDS):
        await pace(lab, walker, regular, STEPS)
        await pace(lab, walker, local, STEPS, local=True)
    return regular, local


async def latency(walker: Walker, regular: Pace, local: Pace) -> list[Evidence]:
    seen = await count_events(walker)
    taken = ROUNDS * STEPS
    activities, markers = seen["ACTIVITY_TASK_COMPLETED"] - 5, seen["MARKER_RECORDED"]
    return [
        works(
            f"the latency of a regular activity over {taken} steps, each taken once and in order",
            regular.complete and activities == taken,
            f"from one step's begin to the next one's, by a ledger: {spread(regular.seconds)}; {activities} "
            f"completed in the history; {histogram(regular.seconds)}",
        ),
        works(
            f"the latency of a local activity over {taken} steps, each taken once and in order",
            local.complete and markers == taken,
            f"{spread(local.seconds)}; {markers} markers in the history; {histogram(local.seconds)}",
        ),
        holds(
            "a local activity costs at most two thirds of a regular one in the same run, by turns",
            local.p50 <= regular.p50 * 2 / 3,
            f"{ROUNDS} turns of {STEPS} steps: p50 {ms(regular.p50)} and {ms(local.p50)}: "
            f"{regular.p50 / local.p50:.1f} times less",
        ),
    ]


def level(steps: Pace) -> str:
    """How the cost of a step changes with its number: a line through the medians of 50 steps each."""
    starts = range(0, len(steps.seconds) - 49, 50)
    medians = [statistics.median(steps.seconds[start : start + 50]) for start in starts]
    slope = statistics.linear_regression(list(starts), medians).slope
    return f"slope {1e6 * slope:+.2f} us a step (medians of 50: {ms(min(medians))} to {ms(max(medians))})"


async def stays_level(lab: Lab, old: Walker, long: Pace) -> Evidence:
    """The run that has taken a thousand steps, and one that has just begun, by turns."""
    young = await begin_walk(lab, "young")
    aged, fresh = Pace(), Pace()
    for _ in range(10):
        await pace(lab, old, aged, 8)
        await pace(lab, young, fresh, 8)
    # What grows with a run's age shows in its quick steps too; what other programs take shows in the slow ones.
    late, early = percentile(aged.seconds, 25), percentile(fresh.seconds, 25)
    events = (await old.describe()).history_length
    await young.signal(Walk.finish)
    return holds(
        f"a step costs no more than 1.5 times as much after {LONG:,} steps as after 5, by turns",
        aged.complete and fresh.complete and long.complete and late <= 1.5 * early,
        f"10 turns of 8 steps: p25 {ms(late)}, p50 {ms(aged.p50)} in the run with {events:,} events; p25 {ms(early)}, "
        f"p50 {ms(fresh.p50)} in the new one; "
        f"steps {LONG - len(long.seconds)} to {LONG}: {level(long)}",
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


async def where_time_goes(walker: Walker, long: Pace, used: Used) -> Evidence:
    """The same steps by the server's timestamps: two clocks that know nothing of each other must agree."""
    steps = len(long.seconds)
    found = {stage: one[-steps:] for stage, one in stages(await walker.fetch_history()).items()}
    cycles = [sum(one) for one in zip(*found.values(), strict=True)]
    total = statistics.median(cycles or [0])
    parts = "; ".join(f"{stage} {ms(statistics.median(one))}" for stage, one in found.items() if one)
    return holds(
        "the server's timestamps account for the cost of a step, within a quarter of what the ledger saw",
        len(cycles) == steps and 0.75 <= total / long.p50 <= 1.25,
        f"p50 {ms(total)} by {len(cycles)} steps of the history, {ms(long.p50)} by the ledger: {parts}. "
        f"CPU a step: {used.each(steps)}",
    )


async def timed(call: Callable[[], Awaitable[Any]], seconds: list[float]) -> Any:
    begun = time.monotonic()
    answer = await call()
    seconds.append(time.monotonic() - begun)
    return answer


async def round_trips(lab: Lab, walker: Walker) -> Evidence:
    """A signal, a query that must already see it, a whole workflow, and a few steps, by turns."""
    trips: dict[str, list[float]] = {"signal": [], "query": [], "workflow from start to result": []}
    seen, steps = [], Pace()
    for turn in range(25):
        await pace(lab, walker, steps, 3)
        await timed(lambda: walker.signal(Walk.touch), trips["signal"])
        seen.append(await timed(lambda: walker.query(Walk.touched), trips["query"]))
        fields: dict[str, Any] = {"id": f"{lab.id}-empty-{turn}", "task_queue": lab.task_queue}
        whole = trips["workflow from start to result"]
        await timed(lambda: lab.client.execute_workflow(BareLoop.run, Batch(0), **fields), whole)  # noqa: B023
    slowest = max(statistics.median(one) for one in trips.values())
    return holds(
        "a signal, a query, a whole empty workflow: each takes less than ten steps, and a query sees every signal",
        seen == list(range(1, 26)) and slowest <= 10 * steps.p50,
        f"{'; '.join(f'{name}: {spread(one)}' for name, one in trips.items())}; signals seen by the queries: "
        f"{seen[0]} to {seen[-1]}; a step between them: p50 {ms(steps.p50)}",
    )


async def asleep(lab: Lab, walker: Walker) -> Evidence:
    """The yardstick itself: every other step sleeps.

    Local ones: where a server's own poll limit paces the regular steps, a sleep would be hidden in its pauses.
    """
    ledger, both = lab.file("asleep"), Pace()
    batch = Batch(41, ledger, local=True, seconds=[0.05, 0.0])
    both.add(ledger, 41, await walker.execute_update(Walk.take, batch))
    slow, fast = statistics.median(both.seconds[::2]), statistics.median(both.seconds[1::2])
    return control(
        "a local step that sleeps 50 ms is measured as 50 ms more",
        both.complete and 0.045 <= slow - fast <= 0.1,
        f"20 of each by turns: p50 {ms(slow)} and {ms(fast)}, {ms(slow - fast)} more",
    )


async def in_process(lab: Lab, count: int = 2000) -> tuple[float, Pace]:
    """The same function called directly, as a program without durable execution does. Returns (a call, its pace)."""
    ledger, calls = lab.file("in-process"), Pace()
    begun = time.monotonic()
    for number in range(count):
        await step(Step(number, ledger, 0))
    each = (time.monotonic() - begun) / count
    calls.add(ledger, count, count)
    return each, calls


async def two_ends(lab: Lab, regular: Pace, local: Pace) -> list[Evidence]:
    """The empty RPC as the floor of what asks the server, the in-process call as the other end."""
    each, calls = await in_process(lab)
    service, empty = lab.client.workflow_service, list[float]()
    for _ in range(200):
        await timed(lambda: service.get_system_info(GetSystemInfoRequest()), empty)
    floor, times = statistics.median(empty), regular.p50 / each
    return [
        control(
            "the ends of the scale: a call in this process, below an empty RPC, below a step",
            calls.complete and each < floor < regular.p50,
            f"in-process call with its ledger line {1e6 * each:.0f} us; empty RPC {spread(empty)}; a regular step is "
            f"{regular.p50 / floor:.0f} empty RPCs, a local one {local.p50 / floor:.1f}",
        ),
        control(
            "what measuring adds to a step, its ledger line, is under 5 % of it",
            each < 0.05 * regular.p50,
            f"{1e6 * each:.0f} us of {ms(regular.p50)}: {100 * each / regular.p50:.2f} %; " + await bare_loops(lab),
        ),
        limit(
            "a step is no function call: it costs over a hundred of them, so a loop over small things belongs inside",
            times > 100,
            f"a regular step costs {times:,.0f} in-process calls, a local one {local.p50 / each:,.0f}",
        ),
    ]


async def bare_loops(lab: Lab, steps: int = 40) -> str:
    """The same loop with and without its ledger, by nothing but the clock around execute_workflow."""
    walls: dict[str, list[float]] = {"with": [], "without": []}
    for turn in range(3):
        for name, wall in walls.items():
            batch = Batch(steps, lab.file(f"bare-{turn}") if name == "with" else "")
            fields: dict[str, Any] = {"id": f"{lab.id}-{name}-{turn}", "task_queue": lab.task_queue}
            await timed(lambda: lab.client.execute_workflow(BareLoop.run, batch, **fields), wall)  # noqa: B023
    measured, bare = (statistics.median(wall) / steps for wall in walls.values())
    return (
        f"around execute_workflow, 3 by turns: {ms(measured)} a step with the ledger, {ms(bare)} bare "
        f"({100 * (measured / bare - 1):+.1f} %, noise included)"
    )


async def steps_on(lab: Lab, server: Server, steps: int, into: Pace) -> None:
    ledger = lab.file(uuid.uuid4().hex)
    fields: dict[str, Any] = {"id": f"{lab.id}-{Path(ledger).name}", "task_queue": lab.task_queue}
    into.add(ledger, steps, await server.client.execute_workflow(BareLoop.run, Batch(steps, ledger), **fields))


async def untuned(lab: Lab) -> Evidence:
    burst, tuned, plain = Pace(), Pace(), Pace()
    async with (
        lab.private_server() as fast,
        lab.private_server(tuned=False) as slow,
        lab.worker([BareLoop], [step], server=fast),
        lab.worker([BareLoop], [step], server=slow),
    ):
        for _ in range(2):
            for server, into in ((fast, tuned), (slow, plain)):
                await steps_on(lab, server, 40, burst)  # what may be saved up for a burst is used up
                await steps_on(lab, server, 40, into)
    return limit(
        "a dev server as it comes polls its queues 20 times a second: after a burst a step costs at least half more",
        plain.p50 >= 1.5 * tuned.p50,
        f"2 turns of 40 steps, each after a burst of 40: p50 {ms(plain.p50)} as it comes, {ms(tuned.p50)} with "
        f"history.transferProcessorMaxPollRPS raised: {plain.p50 / tuned.p50:.1f} times as much; all steps "
        f"taken: {plain.complete and tuned.complete}",
    )


def plot_latency(regular: Sequence[float], local: Sequence[float]) -> str:
    figure = new_figure()
    axes = figure.subplots()
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
    return save(figure, "pf_latency")


@PF.item("PF-01", "Step latency", seconds=400)
async def step_latency(lab: Lab) -> AsyncIterator[Evidence]:
    """One run takes its steps by turns with what they are compared with; a ledger has the moment of each."""
    async with lab.worker_process([Walk, BareLoop], [step]) as worker:
        walker = await begin_walk(lab, "walk")
        regular, local = await by_turns(lab, walker)
        for evidence in await latency(walker, regular, local):
            yield evidence
        long = Pace()
        with metered(lab.target, [worker.pid]) as used:
            await pace(lab, walker, long, LONG - ROUNDS * STEPS)
        yield await where_time_goes(walker, long, used)
        yield await stays_level(lab, walker, long)
        yield await round_trips(lab, walker)
        yield await asleep(lab, walker)
        for evidence in await two_ends(lab, regular, local):
            yield evidence
        await walker.signal(Walk.finish)
    yield native(
        "local activities are part of the SDK: the same activity and worker, another call in the workflow"
        + await plotted(lab, plot_latency, regular.seconds, local.seconds),
        workflow.execute_local_activity,
        workflow.execute_activity,
        Worker,
        WorkflowHandle.signal,
        WorkflowHandle.query,
        WorkflowHandle.execute_update,
    )
    yield await untuned(lab)


# PF-02 Fan-out throughput ----------------------------------------------------------------------------
# One workflow may have hundreds of activities in flight and children may share out thousands; the CPU of
# the server ends it, not the width. Beyond 2,000 pending activities a workflow must split its work.


@dataclass
class Job:
    number: int
    ledger: str
    seconds: float


@activity.defn
async def work(job: Job) -> int:
    note(job.ledger, f"{job.number} {os.getpid()}")
    await asyncio.sleep(job.seconds)  # real work waits for somebody, and that is what a fan-out overlaps
    return job.number


@dataclass
class Jobs:
    ledger: str
    first: int
    count: int
    seconds: float = 0.1


async def do_job(number: int, jobs: Jobs) -> int:
    job = Job(number, jobs.ledger, jobs.seconds)
    return await workflow.execute_activity(work, job, start_to_close_timeout=PATIENT)


@workflow.defn
class FanOut:
    """All at once, in one workflow."""

    @workflow.run
    async def run(self, jobs: Jobs) -> list[int]:
        numbers = range(jobs.first, jobs.first + jobs.count)
        return list(await asyncio.gather(*(do_job(number, jobs) for number in numbers)))


@workflow.defn
class OneByOne:
    """The control: the same jobs one after the other."""

    @workflow.run
    async def run(self, jobs: Jobs) -> list[int]:
        return [await do_job(number, jobs) for number in range(jobs.first, jobs.first + jobs.count)]


CHILD = 500  # jobs a child
SLOW = 60  # activities a second: a server that makes fewer is given fewer of them


@workflow.defn
class FanOutByChildren:
    """More than one workflow may have pending: children share the jobs out."""

    @workflow.run
    async def run(self, jobs: Jobs) -> list[int]:
        me = workflow.info().workflow_id
        parts = [
            workflow.execute_child_workflow(FanOut.run, Jobs(jobs.ledger, first, CHILD), id=f"{me}-{first}")
            for first in range(jobs.first, jobs.first + jobs.count, CHILD)
        ]
        return [number for part in await asyncio.gather(*parts) for number in part]


@dataclass
class Fanned:
    """How a number of jobs went: how many a second, whether each ran once, who ran them, and the CPU it took."""

    rate: float  # by the clock
    exact: bool
    shares: Mapping[str, int]
    used: Used

    @property
    def pace(self) -> float:
        """Jobs a second for the CPU that other programs left: what two runs are compared by on a shared machine."""
        return self.rate / (1 - self.used.others)


async def fan(lab: Lab, workflow_class: Any, count: int, workers: Sequence[int], queue: str | None = None) -> Fanned:
    """Run `count` jobs in one workflow and compare its result with the ledger."""
    ledger = lab.file(uuid.uuid4().hex)
    fields: dict[str, Any] = {"id": f"{lab.id}-{Path(ledger).name}", "task_queue": queue or lab.task_queue}
    with metered(lab.target, workers) as used:
        result = await lab.client.execute_workflow(workflow_class.run, Jobs(ledger, 0, count), **fields)
    ran = [line.split() for line in notes(ledger)]
    exact = result == list(range(count)) and sorted(int(number) for number, _ in ran) == list(range(count))
    return Fanned(count / used.wall, exact, Counter(pid for _, pid in ran), used)


ALONE = 15
LARGEST = 3_000
WIDTHS = {10: 3, 100: 2, 1000: 1}  # how often in a round: the short ones more often


@dataclass
class Curve:
    """Throughput over width: fan-outs in one workflow, the same jobs one by one, and the largest by children."""

    wide: dict[int, list[Fanned]]
    alone: list[Fanned]
    largest: int
    by_children: list[Fanned]

    @property
    def rates(self) -> dict[int, float]:
        return {width: rate(runs) for width, runs in self.wide.items()} | {self.largest: rate(self.by_children)}

    @property
    def best(self) -> float:
        """The pace of 100 or 1,000: ten are too few to say what can be sustained."""
        return max(pace_of(self.wide[100]), pace_of(self.wide[1000]))


async def curve(lab: Lab, worker: int, largest: int) -> Curve:
    """Two rounds over all widths and the jobs one by one, and between them the largest."""
    found = Curve({width: [] for width in WIDTHS}, [], largest, [])
    first = await fan(lab, FanOut, 100, [worker])  # warms up
    if first.rate < SLOW:
        found.largest = 1500
    for turn in range(2):
        found.alone.append(await fan(lab, OneByOne, ALONE, [worker]))
        for width, times in WIDTHS.items():
            if turn == 0 or width < 1000 or first.rate >= SLOW:
                found.wide[width] += [await fan(lab, FanOut, width, [worker]) for _ in range(times)]
        if turn == 0:
            found.by_children.append(await fan(lab, FanOutByChildren, found.largest, [worker]))
    return found


def rate(runs: Sequence[Fanned]) -> float:
    return statistics.median(one.rate for one in runs)


def pace_of(runs: Sequence[Fanned]) -> float:
    return statistics.median(one.pace for one in runs)


def exact(runs: Iterable[Fanned]) -> bool:
    return all(one.exact for one in runs)


def saturation(fanned: Fanned) -> str:
    """Who kept how many cores busy, and who comes first."""
    used, all_of_it = fanned.used, sum(fanned.used.cpu.values())
    busy = f"cores busy of {os.cpu_count()}: {used.cores()}"
    if "server" not in used.cpu:
        return busy
    first = max(used.cpu, key=lambda name: used.cpu[name])
    return (
        f"{busy}, idle {used.idle / used.wall:.2f}, other programs {100 * used.others:.0f} %; "
        f"most of it {first} ({100 * used.cpu[first] / all_of_it:.0f} %)"
    )


async def by_workers(lab: Lab, jobs: int) -> dict[int, list[Fanned]]:
    """The same width over 1, 2 and 4 worker processes, in two rounds."""
    found: dict[int, list[Fanned]] = {1: [], 2: [], 4: []}
    for turn in range(2):
        for count, runs in found.items():
            queue = f"{lab.id}-{count}-{turn}"
            async with contextlib.AsyncExitStack() as stack:
                workers = [
                    await stack.enter_async_context(lab.worker_process([FanOut], [work], task_queue=queue))
                    for _ in range(count)
                ]
                pids = [worker.pid for worker in workers]
                await fan(lab, FanOut, 20, pids, queue)  # all of them are polling
                runs.append(await fan(lab, FanOut, jobs, pids, queue))
    return found


def shared_out(found: Mapping[int, Sequence[Fanned]]) -> Evidence:
    paces = {count: pace_of(runs) for count, runs in found.items()}
    everyone = all(len(one.shares) == count for count, runs in found.items() for one in runs)
    shares = [sorted(one.shares.values()) for one in found[4]]
    picture = bars({f"{count} workers": one for count, one in paces.items()}, "/s")
    return holds(
        "1, 2 and 4 worker processes: every one gets a part, and four keep at least half of the best throughput",
        exact(one for runs in found.values() for one in runs) and everyone and paces[4] >= max(paces.values()) / 2,
        f"for the CPU that other programs left: {picture}; parts of the four: {shares[0]} and {shares[1]}; "
        f"with one {saturation(found[1][-1])}; with four {saturation(found[4][-1])}",
    )


async def whole_workflows(lab: Lab, worker: int, count: int = 80) -> Evidence:
    """Many small workflows instead of one wide one."""
    ledger = lab.file("whole")

    async def one(number: int) -> list[int]:
        fields: dict[str, Any] = {"id": f"{lab.id}-whole-{number}", "task_queue": lab.task_queue}
        return await lab.client.execute_workflow(FanOut.run, Jobs(ledger, number, 1), **fields)

    with metered(lab.target, [worker]) as used:
        results = await asyncio.gather(*(one(number) for number in range(count)))
    ran = sorted(int(line.split()[0]) for line in notes(ledger))
    return holds(
        f"{count} workflows at once, one activity each: all finish with their own result, each activity ran once",
        results == [[number] for number in range(count)] and ran == list(range(count)),
        f"{count / used.wall:.0f} workflows a second; CPU each: {used.each(count)}",
    )


def plot_fanout(wide: Mapping[int, float], workers: Mapping[int, float], alone: float) -> str:
    figure = new_figure(9)
    left, right = figure.subplots(1, 2, sharey=True)
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
    figure.suptitle("Fan-out throughput")
    return save(figure, "pf_fanout")


@dataclass
class Outcome:
    """How a run ended, or that it hangs: what came back, after how many seconds, and why a workflow task failed."""

    status: WorkflowExecutionStatus | None
    answer: str
    seconds: float
    failed: str


async def outcome_of(handle: WorkflowHandle[Any, Any], begun: float) -> Outcome:
    """Wait for a run's end. One whose workflow task failed gets 3 s more, then it hangs."""
    ending = asyncio.ensure_future(handle.result())

    async def decided() -> bool:
        return ending.done() or await stuck_on(handle) != ""

    await until(decided, "the workflow ended or a workflow task failed", every=0.1)
    await asyncio.wait({ending}, timeout=3)
    seconds, status, answer = time.monotonic() - begun, await status_of(handle), ""
    if status == WorkflowExecutionStatus.RUNNING:
        ending.cancel()
    else:
        try:
            answer = str(await ending)[:300]
        except WorkflowFailureError as error:
            answer = str(error.cause)
    return Outcome(status, answer, seconds, await stuck_on(handle))


async def stuck_on(handle: WorkflowHandle[Any, Any]) -> str:
    """Why the latest failed workflow task of a run failed, or "" when none did."""
    for event in reversed((await handle.fetch_history()).events):
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED:
            cause = event.workflow_task_failed_event_attributes.cause
            return WorkflowTaskFailedCause.Name(cause).removeprefix("WORKFLOW_TASK_FAILED_CAUSE_")
    return ""


async def pending_limit(lab: Lab, server: Server, most: int) -> Evidence:
    """As many as may be pending pass; one more, and the workflow hangs without an error."""
    fits, over = lab.file("fits"), lab.file("over")
    fields: dict[str, Any] = {"task_queue": lab.task_queue}
    passed = await server.client.execute_workflow(FanOut.run, Jobs(fits, 0, most), id=f"{lab.id}-fits", **fields)
    handle = await server.client.start_workflow(FanOut.run, Jobs(over, 0, most + 1), id=f"{lab.id}-over", **fields)
    ended = await outcome_of(handle, time.monotonic())
    return limit(
        "one activity more than may be pending, and the workflow hangs in retries: split wide work up",
        passed == list(range(most)) and ended.status == WorkflowExecutionStatus.RUNNING,
        f"limit lowered to {most} (documented default 2,000): {len(notes(fits))} at once pass; {most + 1}: "
        f"{ended.failed}, the run is {name_of(ended.status)} after {ended.seconds:.1f} s "
        f"and {len(notes(over))} activities ran",
    )


async def history_limit(lab: Lab, server: Server, most: int, steps: int) -> Evidence:
    """A workflow whose history grows too long is ended by the server in the middle of its work."""
    ledger = lab.file("history")
    handle = await server.client.start_workflow(
        OneByOne.run, Jobs(ledger, 0, steps, seconds=0), id=f"{lab.id}-history", task_queue=lab.task_queue
    )
    reason = ""
    try:
        await handle.result()
    except WorkflowFailureError as error:
        reason = str(error.cause) if isinstance(error.cause, TerminatedError) else ""
    events = (await handle.describe()).history_length
    return limit(
        "a history that grows over its limit ends the run in the middle of its work: continue as new in time",
        reason != "" and len(notes(ledger)) < steps,
        f"limit lowered to {most} events (documented default 51,200): terminated at {events} ({reason}), "
        f"{len(notes(ledger))} of {steps} steps",
    )


async def limits(lab: Lab) -> list[Evidence]:
    lowered = {"limit.numPendingActivities.error": "50", "limit.historyCount.error": "400"}
    async with (
        lab.private_server(settings=lowered) as server,
        lab.worker([FanOut, OneByOne], [work], server=server),
    ):
        return [await pending_limit(lab, server, 50), await history_limit(lab, server, 400, 100)]


@PF.item("PF-02", "Fan-out throughput", seconds=400)
async def fan_out_throughput(lab: Lab) -> AsyncIterator[Evidence]:
    """Fan-outs of growing width against the same jobs one after the other; a ledger has who ran what."""
    async with lab.worker_process([FanOut, FanOutByChildren, OneByOne], [work]) as worker:
        found = await curve(lab, worker.pid, 10_000 if lab.flag("full") else LARGEST)
        workflows = await whole_workflows(lab, worker.pid)
    rates, base, best, children = found.rates, rate(found.alone), found.best, found.by_children[0]
    picture = bars({"one by one": base} | {f"{width:,} wide": one for width, one in rates.items()}, "/s")
    yield works(
        "activities of 0.1 s a second at widths 10, 100 and 1,000: each ran once, and width at least doubles it",
        exact(one for runs in found.wide.values() for one in runs) and min(rates[100], rates[1000]) >= 2 * base,
        f"{picture}; at 1,000 {saturation(found.wide[1000][-1])}",
    )
    yield control(
        "the same activities one after the other: no more a second than their 0.1 s allow",
        exact(found.alone) and base <= 10,
        f"{base:.1f} activities a second; {saturation(found.alone[-1])}",
    )
    yield holds(
        f"{found.largest:,} activities in children of {CHILD}: each ran once, at least half of the best throughput",
        children.exact and children.pace >= best / 2,
        f"{children.rate:.0f} a second by the clock, {children.used.wall:.1f} s for all of them; {children.pace:.0f} "
        f"against {best:.0f} for the CPU that other programs left; {saturation(children)}; a server that makes less "
        f"than {SLOW} a second is given 1,500, and --full gives 10,000",
    )
    yield workflows
    processes = await by_workers(lab, 300 if best >= SLOW else 100)
    yield shared_out(processes)
    workers = {count: rate(runs) for count, runs in processes.items()}
    yield native(
        "fan-out is asyncio.gather over activities or children; sharing out among worker processes is the server's work"
        + await plotted(lab, plot_fanout, rates, workers, base),
        workflow.execute_activity,
        workflow.execute_child_workflow,
        Worker,
    )
    for evidence in await limits(lab):
        yield evidence


# PF-03 Payload size limits ---------------------------------------------------------------------------
# Two megabytes is the end of a payload, four of a message. A codec makes payloads smaller or unreadable on
# the way out; external storage leaves only a reference in the history.

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


async def find_room(lab: Lab) -> Room:
    """Ask for the limit of a payload, and try whether it is so: something else on the way may take less."""
    told = lab.limit("payload")
    most = min(told or MESSAGE, MESSAGE) - KB - (0 if told and told < MESSAGE else 64 * KB)
    if why := await try_start(lab, most):
        low, high, why = await narrowed(lab, KB, most, why)
        # A margin for what else stands in the larger messages that carry it further.
        return Room(told or high, low - 16 * KB, max(told or 0, high) + 1, between(why))
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
        return str(error)
    await lab.client.get_workflow_handle(id).terminate("it served its purpose")
    return None


def size_text(size: int) -> str:
    """Bytes in words, such as "2 MB less 1 KB"."""
    if size % KB:
        return f"{size:,} bytes"
    if size >= MB and (size + KB) % (MB // 2) == 0:
        return f"{(size + KB) / MB:g} MB less 1 KB"
    return f"{size / MB:g} MB" if size % (MB // 4) == 0 else f"{size // KB:,} KB"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@activity.defn
async def pass_on(data: bytes, ledger: str) -> bytes:
    note(ledger, f"{len(data)} {digest(data)}")
    return data


@workflow.defn
class Relay:
    """The data goes four ways: to the workflow, to the activity, and both back."""

    @workflow.run
    async def run(self, data: bytes, ledger: str) -> bytes:
        return await workflow.execute_activity(pass_on, args=[data, ledger], start_to_close_timeout=PATIENT)


async def relay(lab: Lab, data: bytes, client: Client | None = None, queue: str = "") -> tuple[float, bool, Any]:
    """Send data through Relay. Returns (seconds, whether it arrived whole everywhere, the run's handle)."""
    ledger = lab.file(uuid.uuid4().hex)
    begun = time.monotonic()
    handle = await (client or lab.client).start_workflow(
        Relay.run, args=[data, ledger], id=f"{lab.id}-{Path(ledger).name}", task_queue=queue or lab.task_queue
    )
    result = await handle.result()
    seconds = time.monotonic() - begun
    return seconds, result == data and notes(ledger) == [f"{len(data)} {digest(data)}"], handle


def sizes_up_to(most: int) -> dict[str, int]:
    sizes = [size for size in (KB, 10 * KB, 100 * KB, MB) if size < most]
    return {size_text(size): size for size in [*sizes, most]}


def plot_payload(limit: int, sizes: Mapping[int, Sequence[float]]) -> str:
    figure = new_figure()
    axes = figure.subplots()
    middle = [1000 * statistics.median(one) for one in sizes.values()]
    low = [mid - 1000 * min(one) for mid, one in zip(middle, sizes.values(), strict=True)]
    high = [1000 * max(one) - mid for mid, one in zip(middle, sizes.values(), strict=True)]
    axes.errorbar([size / KB for size in sizes], middle, [low, high], fmt="o-", capsize=4, label="median, min to max")
    axes.axvline(limit / KB, linestyle="--", color="gray", label="limit of a payload")
    axes.set(xscale="log", ylim=(0, None), xlabel="payload (KB)", ylabel="start to result (ms)")
    axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    axes.minorticks_off()
    axes.set_title("A payload to a workflow, to its activity, and back")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    return save(figure, "pf_payload")


async def sizes_that_pass(lab: Lab, room: Room) -> Evidence:
    """Five rounds over all sizes, by turns, of data that nothing can compress."""
    sizes = sizes_up_to(room.passes)
    seconds: dict[str, list[float]] = {name: [] for name in sizes}
    whole = True
    await relay(lab, b"warm")
    for _ in range(5):
        for name, size in sizes.items():
            took, arrived, _ = await relay(lab, os.urandom(size))
            seconds[name].append(took)
            whole &= arrived
    draw = functools.partial(plot_payload, room.limit)
    remark = await plotted(lab, draw, {sizes[name]: one for name, one in seconds.items()})
    if room.between:
        remark += f"; what is larger than {room.passes // KB:,} KB does not arrive: {room.between}"
    medians = {name: 1000 * statistics.median(one) for name, one in seconds.items()}
    return works(
        "1 KB to just under the limit pass whole: as start argument, activity argument, activity result and result",
        whole,
        f"start to result, medians of 5 by turns: {bars(medians, ' ms')}; "
        f"SHA-256 compared at the activity, bytes at the end{remark}",
    )


@activity.defn
async def swallow(data: bytes) -> int:
    return len(data)


@activity.defn
async def produce(size: int, ledger: str) -> bytes:
    note(ledger, "produced")
    return bytes(size)


@workflow.defn
class TooBig:
    """Over the limit by `size`, in a different place each."""

    @workflow.run
    async def run(self, way: str, ledger: str, size: int, room: Room) -> bytes | str:
        options: Any = {"start_to_close_timeout": PATIENT, "retry_policy": RetryPolicy(maximum_attempts=2)}
        if way == "activity argument":
            await workflow.execute_activity(swallow, bytes(size), **options)
        if way == "activity result":
            try:
                await workflow.execute_activity(produce, args=[size, ledger], **options)
            except ActivityError as error:
                return str(error.cause)
        if way == "whole message":  # each part is allowed; together they are one message to the server
            parts = (workflow.execute_activity(swallow, bytes(room.part), **options) for _ in range(room.parts))
            await asyncio.gather(*parts)
        return bytes(size) if way == "workflow result" else "passed"


async def too_big(lab: Lab, way: str, queue: str, room: Room, size: int) -> Outcome:
    id = f"{queue}-{way.replace(' ', '-')}"
    begun = time.monotonic()
    handle = await lab.client.start_workflow(TooBig.run, args=[way, lab.file(id), size, room], id=id, task_queue=queue)
    return await outcome_of(handle, begun)


async def refused_start(lab: Lab, data: bytes, client: Client | None = None) -> tuple[str, float, Any]:
    """Start a workflow with too large an argument. Returns (the refusal, seconds, handle of what should not be)."""
    id = f"{lab.id}-refused-{uuid.uuid4().hex[:8]}"
    begun, why = time.monotonic(), ""
    try:
        await (client or lab.client).start_workflow(Relay.run, args=[data, ""], id=id, task_queue=f"{lab.id}-nobody")
    except RPCError as error:
        why = too_large(error)
    return why, time.monotonic() - begun, lab.client.get_workflow_handle(id)


def too_large(error: RPCError) -> str:
    """By whom something was refused for its size, and how; raises what is no such refusal.

    The server's limit of a payload speaks first, then that of a message, then whatever stands before the server.
    """
    if stranger := between(str(error)):
        return stranger
    of_payload = error.status == RPCStatusCode.INVALID_ARGUMENT and re.search(r"(?i)size|exceed", error.message)
    of_message = error.status == RPCStatusCode.RESOURCE_EXHAUSTED and "larger than max" in error.message
    if not of_payload and not of_message:
        raise error
    return name_of(error.status)


async def refused_to_the_caller(lab: Lab, room: Room) -> Evidence:
    """Whoever sends too much from outside is told at once."""
    refused, seconds, handle = await refused_start(lab, bytes(room.refused))
    none = await refusal(handle)
    receiver = await lab.client.start_workflow(
        Confide.run, Confidence("", ""), id=f"{lab.id}-receiver", task_queue=f"{lab.id}-nobody"
    )
    signalled = ""
    try:
        await receiver.signal(Confide.go_on, "x" * room.refused)
    except RPCError as error:
        signalled = too_large(error)
    events = await count_events(receiver)
    await receiver.terminate("it served its purpose")
    return holds(
        "a start or signal argument over the limit: the caller is refused, and nothing is left on the server",
        bool(refused and signalled) and none == RPCStatusCode.NOT_FOUND and not events["WORKFLOW_EXECUTION_SIGNALED"],
        f"{room.refused:,} bytes: start {refused} in {ms(seconds)}, then the run is {name_of(none)}; signal "
        f"{signalled}, {events['WORKFLOW_EXECUTION_SIGNALED']} in the history",
    )


HANGING = ("activity argument", "workflow result")


async def over_the_limit(lab: Lab, room: Room) -> list[Evidence]:
    """What comes from inside a workflow: once with the worker's own check of sizes, once without it."""
    parts: dict[str, Any] = {"workflows": [TooBig], "activities": [swallow, produce]}
    checking, trusting = f"{lab.id}-checking", f"{lab.id}-trusting"
    # What a stranger on the way does not let pass never comes to the server, and the worker tries for ever.
    arrives = room.between is None
    ways = (*HANGING, "activity result", *(["whole message"] if arrives else []))
    async with (
        lab.worker(**parts, task_queue=checking),
        lab.worker(**parts, task_queue=trusting, disable_payload_error_limit=True),
    ):
        found = await asyncio.gather(*(too_big(lab, way, checking, room, room.too_much) for way in ways))
        ended = await asyncio.gather(*(too_big(lab, way, trusting, room, room.refused) for way in HANGING if arrives))
    produced = len(notes(lab.file(f"{checking}-activity-result")))
    outcomes = dict(zip(ways, found, strict=True))
    return [
        *judged(outcomes, produced),
        in_one_message(outcomes.get("whole message"), room),
        unchecked(dict(zip(HANGING, ended, strict=False)), room),
    ]


def in_one_message(message: Outcome | None, room: Room) -> Evidence:
    count = {3: "three"}.get(room.parts, f"{room.parts}")
    claim = (
        f"{count} activity arguments of {size_text(room.part)} in one message: the run is ended and says why, but "
        "cannot handle it"
    )
    if message is None:
        return holds(claim, None, str(room.between))
    if message.answer == "passed":
        return holds(
            claim, None, f"a message of {size_text(room.parts * room.part)} passes here, so its end was not met"
        )
    return holds(
        claim,
        message.status == WorkflowExecutionStatus.TERMINATED and "GrpcMessageTooLarge" in message.answer,
        f"{name_of(message.status)} after {ms(message.seconds)}: {message.answer} (a message may have 4 MB)",
    )


def judged(found: Mapping[str, Outcome], produced: int) -> list[Evidence]:
    """The verdicts over what a worker with its own check of sizes made of each way."""
    result = found["activity result"]
    hanging = [found[way] for way in HANGING]
    return [
        holds(
            "an activity result over the limit: an error that the workflow can handle, after the usual retries",
            result.status == WorkflowExecutionStatus.COMPLETED and "PayloadsTooLarge" in result.answer
            and produced == 2,
            f"{result.answer}; the activity ran {produced} times of 2 allowed; workflow "
            f"{name_of(result.status)} after {result.seconds:.1f} s",
        ),
        limit(
            "an activity argument or a workflow result over the limit: the workflow hangs and nobody is told",
            any(one.status == WorkflowExecutionStatus.RUNNING for one in hanging),
            "; ".join(
                f"{way}: {name_of(found[way].status)} after {found[way].seconds:.1f} s, workflow task failed "
                f"({found[way].failed})" for way in HANGING
            ),
        ),
    ]  # fmt: skip


def unchecked(ended: Mapping[str, Outcome], room: Room) -> Evidence:
    """The way out of the hang: the server's check, which comes after the worker's, ends the run."""
    claim = "with Worker(disable_payload_error_limit=True) the same two are ended by the server and say why"
    if room.between:
        return holds(claim, None, room.between)
    # A payload that is allowed more than a message is too large as a message first.
    words = "size limit" if room.limit < MESSAGE else "GrpcMessageTooLarge"
    return holds(
        claim,
        all(one.status == WorkflowExecutionStatus.TERMINATED and words in one.answer for one in ended.values()),
        "; ".join(f"{way}: {name_of(one.status)} after {ms(one.seconds)}: {one.answer}" for way, one in ended.items()),
    )


class Compression(PayloadCodec):
    """Compresses what gets smaller by it. Give the same data converter to every client and worker."""

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


def history_bytes(history: WorkflowHistory) -> bytes:
    """A history as the server gives it, which is before any codec."""
    return b"".join(event.SerializeToString() for event in history.events)


async def compressed(lab: Lab, room: Room) -> list[Evidence]:
    """Five times as much text as a payload may have, which repeats itself, with and without the codec."""
    many = 5 * max(room.passes + KB, room.refused // KB * KB if room.refused < MESSAGE else 0)
    lines = (f"{number:07d} the customer asked for a refund and got it\n".encode() for number in range(many // 50))
    data = b"".join(lines)[:many]
    name = size_text(many)
    queue = f"{lab.id}-compressed"
    client = await connect(lab.target, data_converter=DataConverter(payload_codec=Compression()))
    async with lab.worker([Relay], [pass_on], client=client, task_queue=queue):
        seconds, whole, handle = await relay(lab, data, client, queue)
    size = len(history_bytes(await handle.fetch_history()))
    noise, _, _ = await refused_start(lab, os.urandom(many), client)
    plain, _, never = await refused_start(lab, data)
    return [
        holds(
            f"a compression codec: {name} of text pass whole",
            whole and size < len(data),
            f"{seconds:.2f} s; the history holds it four times in {size / KB:,.0f} KB; {name} of random bytes "
            f"with the codec: {noise or 'no error'}",
        ),
        control(
            f"the same {name} without the codec are refused",
            bool(plain) and await refusal(never) == RPCStatusCode.NOT_FOUND,
            f"start: {plain or 'no error'}",
        ),
    ]


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


def encrypted(keys: Mapping[str, bytes], current: str) -> DataConverter:
    """With the failure converter: without it, messages and stack traces of failures stay readable."""
    return DataConverter(
        payload_codec=Encryption(keys, current),
        failure_converter_class=DefaultFailureConverterWithEncodedAttributes,
    )


@dataclass
class Confidence:
    secret: str
    ledger: str


@activity.defn
async def whisper(told: Confidence) -> str:
    note(told.ledger, told.secret)
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


async def confide(
    lab: Lab, server: Server, name: str, before: DataConverter, after: DataConverter
) -> tuple[bytes, WorkflowHandle[Any, Any]]:
    """Run Confide with one data converter, and with another one from its middle on. Returns (secret, handle)."""
    told = Confidence(f"{name}-{secrets.token_hex(16)}", lab.file(name))
    queue = f"{lab.id}-{name}"
    client = await connect(server.target, data_converter=before)
    parts: dict[str, Any] = {"workflows": [Confide], "activities": [whisper, blurt], "task_queue": queue}
    handle = await client.start_workflow(Confide.run, told, id=queue, task_queue=queue)
    async with lab.worker(**parts, client=client):
        await until(lambda: failed_activity(handle), "the first half is done")
    client = await connect(server.target, data_converter=after)
    rotated: WorkflowHandle[Any, Any] = client.get_workflow_handle(queue)
    async with lab.worker(**parts, client=client):
        await rotated.signal(Confide.go_on, f" and {told.secret}")
        result = await rotated.result()
    if result != f"{told.secret} and {told.secret}" or notes(told.ledger) != [told.secret] * 2:
        raise RuntimeError(f"{name}: the secret did not come through")
    return told.secret.encode(), rotated


async def failed_activity(handle: WorkflowHandle[Any, Any]) -> bool:
    return (await count_events(handle))["ACTIVITY_TASK_FAILED"] == 1


async def unreadable(history: WorkflowHistory, reader: DataConverter) -> str:
    """What becomes of a history's first payload for somebody with another ring of keys."""
    payloads = history.events[0].workflow_execution_started_event_attributes.input.payloads
    try:
        await reader.decode(payloads, [Confidence])
    except (InvalidTag, LookupError) as error:
        return f"{type(error).__name__} {error}".strip()
    return ""


def on_disk(lab: Lab) -> bytes:
    """Everything that the item's private server has written: its SQLite file with what stands beside it."""
    return b"".join(path.read_bytes() for path in sorted(lab.folder.glob("*.sqlite*")))


async def encryption(lab: Lab) -> list[Evidence]:
    """Three runs with a secret: encrypted over a key rotation, without the failure converter, and in plain text."""
    keys = {"january": AESGCM.generate_key(256), "february": AESGCM.generate_key(256)}
    january = encrypted({"january": keys["january"]}, "january")
    both = encrypted(keys, "february")
    half = DataConverter(payload_codec=Encryption(keys, "february"))
    async with lab.private_server(file=True) as server:
        (sealed, run_sealed), (leaking, run_leaking), (open_, run_open) = await asyncio.gather(
            confide(lab, server, "sealed", january, both),
            confide(lab, server, "leaking", half, half),
            confide(lab, server, "open", DataConverter.default, DataConverter.default),
        )
        sealed_history = await run_sealed.fetch_history()
        raw = history_bytes(sealed_history)
        leaks = history_bytes(await run_leaking.fetch_history()).count(leaking)
        plain = history_bytes(await run_open.fetch_history()).count(open_)
        server.kill()  # all that it will ever write is written
        disk = await asyncio.to_thread(on_disk, lab)
    key_ids = Counter(re.findall(rb"encryption-key-id\x12.(january|february)", raw, re.DOTALL))
    used = ", ".join(f"{count} payloads with {name.decode()}" for name, count in key_ids.items())
    wrong = await unreadable(sealed_history, encrypted({"january": AESGCM.generate_key(256)}, "january"))
    without = await unreadable(sealed_history, encrypted({"february": keys["february"]}, "february"))
    with_both = await unreadable(sealed_history, both)
    return [
        holds(
            "an encryption codec whose key is rotated in the middle of a run: it finishes, under both keys",
            set(key_ids) == {b"january", b"february"} and with_both == "",
            f"{used}; the first payload, read with the new ring: {with_both or 'readable'}",
        ),
        holds(
            "the encrypted secret stands nowhere in the history and nowhere in the server's SQLite file",
            raw.count(sealed) == 0 and disk.count(sealed) == 0,
            f"found {raw.count(sealed)} times in {len(raw):,} bytes of history and {disk.count(sealed)} times in "
            f"{len(disk):,} bytes on disk: arguments, results, signal, failure message and its stack trace",
        ),
        control(
            "without the codec the secret stands in both",
            plain > 0 and disk.count(open_) > 0,
            f"{plain} times in the history, {disk.count(open_)} times on disk",
        ),
        control(
            "with the codec but without DefaultFailureConverterWithEncodedAttributes the failure's message leaks",
            leaks > 0,
            f"found {leaks} times in the history, for one failed activity",
        ),
        control(
            "with a wrong key, or without the old one in the ring, the history is unreadable",
            bool(wrong and without),
            f"another key of the same name: {wrong}; a ring without the old key: {without}",
        ),
    ]


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
        return path.name

    def _read(self, name: str) -> Payload:
        # A claim comes from the history: it must not lead out of the folder.
        if not re.fullmatch(r"[0-9a-f]{64}", name):
            raise ValueError(f"not a name that this driver gives: {name!r}")
        data = (self._folder / name).read_bytes()
        if digest(data) != name:
            raise ValueError(f"{name} was changed in storage")
        return Payload.FromString(data)


@workflow.defn
class Weigh:
    """One way only, for what is too large to be sent about: in, and its digest out.

    The workflow hands it on unopened: a workflow that converts 100 MB soon takes longer than the 2 s after
    which the worker calls it deadlocked.
    """

    @workflow.run
    async def run(self, data: RawValue, ledger: str) -> str:
        return await workflow.execute_activity(weigh, args=[data, ledger], start_to_close_timeout=PATIENT)


@activity.defn
def weigh(data: bytes, ledger: str) -> str:
    note(ledger, f"{len(data)}")
    return digest(data)


async def hundred_megabytes(lab: Lab, client: Client, queue: str) -> tuple[float, bool, int]:
    """Returns (seconds, whether all of it arrived, bytes of the history)."""
    data, ledger = await asyncio.to_thread(os.urandom, 100 * MB), lab.file("hundred")
    begun = time.monotonic()
    handle = await client.start_workflow(
        Weigh.run, args=[data, ledger], id=f"{queue}-100", task_queue=queue, task_timeout=PATIENT
    )
    weighed = await handle.result()
    seconds = time.monotonic() - begun
    arrived = weighed == await asyncio.to_thread(digest, data) and notes(ledger) == [str(100 * MB)]
    return seconds, arrived, len(history_bytes(await handle.fetch_history()))


async def external_storage(lab: Lab) -> list[Evidence]:
    """Ten megabytes all four ways and a hundred one way, through a folder; then the folder is emptied."""
    folder, queue = Path(lab.file("storage")), f"{lab.id}-storage"
    folder.mkdir()
    converter = DataConverter(external_storage=ExternalStorage(drivers=[FolderStorage(folder)]))
    client = await connect(lab.target, data_converter=converter)
    data = os.urandom(10 * MB)
    async with lab.worker([Relay, Weigh], [pass_on, weigh], client=client, task_queue=queue):
        seconds, whole, handle = await relay(lab, data, client, queue)
        long, arrived, large_history = await hundred_megabytes(lab, client, queue)
    size = len(history_bytes(await handle.fetch_history()))
    stored = sorted(path.stat().st_size for path in folder.iterdir())
    refused, _, never = await refused_start(lab, data)
    for path in folder.iterdir():
        path.unlink()
    gone = ""
    try:
        await handle.result()
    except Exception as error:
        gone = next((type(one).__name__ for one in causes(error) if isinstance(one, FileNotFoundError)), "")
    return [
        holds(
            "external storage: 10 MB all four ways and 100 MB one way arrive whole, and the histories stay small",
            whole and arrived and max(size, large_history) < 20 * KB,
            f"10 MB in {seconds:.2f} s with {size:,} bytes of history; 100 MB in {long:.1f} s with "
            f"{large_history:,} bytes; {len(stored)} files of {' and '.join(f'{one / MB:.0f}' for one in stored)} MB",
        ),
        control(
            "the same 10 MB without storage are refused",
            bool(refused) and await refusal(never) == RPCStatusCode.NOT_FOUND,
            f"start: {refused or 'no error'}",
        ),
        control(
            "with the folder emptied the result is gone: the history holds a reference, no copy",
            gone == "FileNotFoundError",
            f"reading the finished run's result again: {gone or 'still there'}",
        ),
    ]


@PF.item("PF-03", "Payload size limits", seconds=300)
async def payload_size_limits(lab: Lab) -> AsyncIterator[Evidence]:
    """Payloads of growing size, over the limit each way, compressed, encrypted, and kept elsewhere."""
    room = await find_room(lab)
    async with lab.worker([Relay], [pass_on]):
        yield await sizes_that_pass(lab, room)
    parts = (refused_to_the_caller, over_the_limit, compressed)
    async for evidence in side_by_side(*(part(lab, room) for part in parts), encryption(lab)):
        yield evidence
    for evidence in await external_storage(lab):
        yield evidence
    yield native(
        "codecs are a place to plug one's own into, and no codec comes with the SDK",
        PayloadCodec,
        (DataConverter, "payload_codec"),
        (DataConverter, "failure_converter_class"),
        DefaultFailureConverterWithEncodedAttributes,
        (Worker, "disable_payload_error_limit"),
        adds=[Compression.__name__, Encryption.__name__],
    )
    storage = native(
        "external storage is part of the SDK, with drivers for S3 and Google Cloud Storage; one for a folder is not",
        (DataConverter, "external_storage"),
        (ExternalStorage, "drivers"),
        StorageDriver,
        StorageDriverClaim,
        adds=[FolderStorage.__name__],
    )
    yield storage
    yield limit(
        "external storage is not generally available yet", storage.stage != "GA", f"its docstrings say: {storage.stage}"
    )


if __name__ == "__main__":
    run(PF)
