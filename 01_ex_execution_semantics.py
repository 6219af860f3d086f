"""EX: execution semantics - what survives a crash, what runs twice, what a replay reproduces.

Durable execution rests on one mechanism. A workflow's code decides, its activities act, and the server
keeps a history of both. Whoever holds the history can bring the workflow back to where it was, by
running its code again and answering from the history instead of acting again. The seven items ask what
that promises, what it asks of the code in return, and where it ends.
"""

from cluster import Cluster
from common import (
    Category,
    Evidence,
    at_least,
    at_most,
    connect,
    contains,
    control,
    equal,
    figure,
    holds,
    limit,
    native,
    not_run,
    piece,
    side_by_side,
    slowness,
    works,
)
from lab import (
    PATIENT,
    Books,
    Call,
    Child,
    Ending,
    Handle,
    Lab,
    Reached,
    Server,
    TakeOver,
    die,
    die_before,
    ended,
    failed_tasks,
    history_of,
    hold,
    keywords_in,
    listed,
    name_of,
    note,
    notes,
    open_gate,
    refusal,
    refuse,
    run,
    said,
    sandbox,
    slow,
    soon,
    status_of,
    until,
    waits,
    withhold,
)

import asyncio
import contextlib
import inspect
import json
import os
import random
import resource
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from temporalio import activity, workflow
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType, TimeoutType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflowservice.v1 import SignalWorkflowExecutionRequest
from temporalio.client import (
    Client,
    WorkflowHandle,
    WorkflowHistory,
    WorkflowUpdateHandle,
    WorkflowUpdateStage,
)
from temporalio.common import RetryPolicy, WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import ActivityError, ApplicationError, WorkflowAlreadyStartedError, is_cancelled_exception
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import PollerBehaviorSimpleMaximum, Replayer, Worker
from temporalio.worker.workflow_sandbox import RestrictedWorkflowAccessError, SandboxedWorkflowRunner

EX = Category(
    "EX",
    "Execution semantics",
    "What survives a crash, what runs twice, and what does a replay reproduce?",
)

# What the items share --------------------------------------------------------------------------------


def bound() -> float:
    """Seconds that a call may take, so that one that hangs is an error and not a pass."""
    return 60 * slowness()


# EX-01 Progress guarantee ----------------------------------------------------------------------------
# A crash costs time, never finished work: the workflow below has five steps, a wait in the middle, and no line
# of recovery. Whoever comes next runs its code again, and the history answers for what was done already.


@dataclass
class Parcel:
    """One argument object instead of several arguments: fields can be added later without breaking runs."""

    number: str
    content: str = "tea"


@activity.defn
async def pick(parcel: Parcel) -> str:
    return f"{parcel.content} picked"


@activity.defn
async def pack(parcel: Parcel) -> str:
    return f"{parcel.content} packed"


@activity.defn
async def label(parcel: Parcel) -> str:
    return f"parcel {parcel.number} labelled"


@activity.defn
async def hand_over(parcel: Parcel) -> str:
    return f"parcel {parcel.number} handed over"


@activity.defn
async def notify(parcel: Parcel) -> str:
    return f"customer of {parcel.number} told"


async def take(step: Callable[[Parcel], Awaitable[str]], parcel: Parcel) -> str:
    # An attempt that a crash has cut off is given up after this long, and the step is tried again.
    return await workflow.execute_activity(step, parcel, start_to_close_timeout=timedelta(minutes=1))


@workflow.defn
class SendParcel:
    def __init__(self) -> None:
        self.collected = False

    @workflow.run
    async def run(self, parcel: Parcel) -> list[str]:
        done = [await take(step, parcel) for step in (pick, pack, label)]
        await workflow.wait_condition(lambda: self.collected)
        return done + [await take(step, parcel) for step in (hand_over, notify)]

    @workflow.signal
    def courier_is_here(self) -> None:
        self.collected = True


def parcel_worker(client: Client) -> Worker:
    return Worker(
        client, task_queue="parcels", workflows=[SendParcel], activities=[pick, pack, label, hand_over, notify]
    )


async def example_ex_01(client: Client) -> None:
    parcel = Parcel(str(uuid.uuid4()))
    handle = await client.start_workflow(SendParcel.run, parcel, id=f"parcel-{parcel.number}", task_queue="parcels")
    async with parcel_worker(client):
        await asyncio.sleep(1)
    print("The worker is gone, wherever the parcel stands. Another one takes over.")
    async with parcel_worker(client):
        await handle.signal(SendParcel.courier_is_here)
        print("\n".join(await handle.result()))


# EX-01 put to the test -------------------------------------------------------------------------------

PARCEL_STEPS = [pick, pack, label, hand_over, notify]
STEPS = [step.__name__ for step in PARCEL_STEPS]
PARCELS: dict[str, Any] = {"workflows": [SendParcel], "activities": PARCEL_STEPS}
COLLECTED: dict[str, Any] = {"start_signal": "courier_is_here"}


def names(calls: Iterable[Call]) -> list[str]:
    return [call.activity for call in calls]


def right_result(number: str) -> list[str]:
    return [
        "tea picked", "tea packed", f"parcel {number} labelled", f"parcel {number} handed over",
        f"customer of {number} told",
    ]  # fmt: skip


async def kill_between_steps(lab: Lab, name: str, **options: Any) -> TakeOver:
    """Three steps are done and the workflow waits; its worker dies; the courier comes; another worker goes on."""
    handle = lab.client.get_workflow_handle(f"{lab.id}-{name}")
    return await lab.take_over(
        SendParcel.run, Parcel(name), name=name, parts=PARCELS | options,
        point=lambda: waits(handle, 3), meanwhile=lambda: handle.signal(SendParcel.courier_is_here),
    )  # fmt: skip


async def quick_successor(lab: Lab) -> Evidence:
    taken = await kill_between_steps(lab, "between")
    return works(
        "worker killed between steps: a new one goes on at the next step, and each step was taken once",
        before=equal(names(taken.before), STEPS[:3]),
        after=equal(names(taken.after), STEPS[3:]),
        result=equal(taken.ending.result, right_result("between")),
        from_kill_to_end=figure(taken.seconds, "s"),
        sticky_timeout="1 s instead of the default 10 s, as everywhere here",
    )


async def waited_for_the_dead(handle: Handle) -> list[float]:
    """Seconds of the server's clock that workflow tasks waited for a worker that did not fetch them."""
    spans, scheduled = [], 0.0
    for event in (await handle.fetch_history()).events:
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_SCHEDULED:
            scheduled = event.event_time.ToNanoseconds() / 1e9
        timed_out = event.workflow_task_timed_out_event_attributes
        if timed_out.timeout_type == TimeoutType.TIMEOUT_TYPE_SCHEDULE_TO_START:
            spans.append(event.event_time.ToNanoseconds() / 1e9 - scheduled)
    return spans


async def default_successor(lab: Lab) -> Evidence:
    """The same kill with the SDK's default: for 10 s the next task waits for the worker that has the run cached."""
    default = inspect.signature(Worker).parameters["sticky_queue_schedule_to_start_timeout"].default
    # With --no-cache nobody would be waited for: this worker keeps its cache.
    options = {"sticky_queue_schedule_to_start_timeout": default, "max_cached_workflows": 1000}
    taken = await kill_between_steps(lab, "default", **options)
    spans = await waited_for_the_dead(taken.handle)
    return holds(
        "with the default sticky timeout it is the same, only later: the task first waits for the worker that died",
        after=equal(names(taken.after), STEPS[3:]),
        result=equal(taken.ending.result, right_result("default")),
        waits_in_the_history=equal(len(spans), 1),
        waited=at_least(figure(sum(spans), "s"), default.total_seconds()),
        from_kill_to_end=figure(taken.seconds, "s"),
    )


async def kill_inside_step(lab: Lab) -> Evidence:
    """The worker dies inside the fourth step. The server gives that attempt up when its time is over."""
    name = "inside"
    taken = await lab.take_over(
        SendParcel.run, Parcel(name), name=name, **COLLECTED,
        parts=PARCELS | {
            "faults": [die_before("hand_over")],
            "shortened": {"hand_over": {"start_to_close_timeout": soon(2)}},
        },
    )  # fmt: skip
    calls = Counter(names([*taken.before, *taken.after]))
    return holds(
        "worker killed inside the fourth step: that step alone is tried again",
        before=equal(names(taken.before), STEPS[:4]),
        calls_of_hand_over=at_least(calls.pop("hand_over"), 2),
        calls_of_the_others=equal(calls, Counter(["pick", "pack", "label", "notify"])),
        result=equal(taken.ending.result, right_result(name)),
        given_up_after=figure(soon(2).total_seconds(), "s"),
    )


async def kill_server(lab: Lab, *, file: bool) -> Evidence:
    """The server dies and comes back; client and worker are not touched and find it again."""
    name = "server" if file else "lost"
    async with lab.private_server(file=file) as server, lab.worker(**PARCELS, server=server, task_queue=name):
        handle = await lab.start(SendParcel.run, Parcel(name), name=name, server=server, task_queue=name)
        await until(lambda: waits(handle, 3), "three steps are completed")
        server.kill()
        restart = await server.start()
        if not file:
            return control(
                "a server that keeps nothing on disk has lost the workflow",
                steps_before_the_kill=equal(names(lab.calls(handle.id)), STEPS[:3]),
                after_the_restart=equal(await refusal(handle), "NOT_FOUND"),
            )
        back = time.monotonic()
        await handle.signal(SendParcel.courier_is_here)
        how = await ended(handle)
        return holds(
            "server killed and restarted on its file: the same run goes on, the same client and worker reconnect",
            steps=equal(names(lab.calls(handle.id)), STEPS),
            result=equal(how.result, right_result(name)),
            same_run_id=equal((await handle.describe()).run_id == handle.first_execution_run_id, True),
            server_back_in=figure(restart, "s"),
            rest_done_after=figure(time.monotonic() - back, "s"),
        )


async def five_plain_steps(ledger: str) -> None:
    """The control: the same five steps called by an ordinary program. It waits after the third to be killed."""
    killed_before = len(notes(ledger)) >= 3
    for step in PARCEL_STEPS:
        note(ledger, step.__name__)
        await step(Parcel("plain"))
        if step is label and not killed_before:
            await asyncio.sleep(3600)


async def plain_program(lab: Lab) -> Evidence:
    ledger = lab.file("plain")
    async with lab.process(five_plain_steps, ledger) as program:
        await until(lambda: len(notes(ledger)) == 3, "three plain steps were taken")
        await program.kill()
    async with lab.process(five_plain_steps, ledger) as program:
        await program.wait()
    return control(
        "the same five steps in a plain program start over after the kill",
        before=equal(notes(ledger)[:3], STEPS[:3]),
        after=equal(notes(ledger)[3:], STEPS),
    )


@activity.defn
async def square(number: int) -> int:
    return number * number


Steps = list[tuple[str, Any]]


def mixed(total: int, part: int) -> int:
    """A sum in which the order counts."""
    return (31 * total + part) % 1_000_003


@workflow.defn
class Program:
    """Does what it is told: activities, several at once, timers, children, and waiting for signals."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    @workflow.run
    async def run(self, steps: Steps) -> int:
        total, used = 0, 0
        for kind, value in steps:
            part = 0
            if kind == "activities":
                run = [workflow.execute_activity(square, one, start_to_close_timeout=PATIENT) for one in value]
                part = sum(await asyncio.gather(*run))
            elif kind == "timer":
                await workflow.sleep(value)
            elif kind == "child":
                part = await workflow.execute_child_workflow(
                    Program.run, value, id=f"{workflow.info().workflow_id}-{workflow.uuid4()}"
                )
            else:
                await workflow.wait_condition(lambda: len(self.heard) > used)  # noqa: B023
                part, used = self.heard[used], used + 1
            total = mixed(total, part)
        return total

    @workflow.signal
    def hear(self, number: int) -> None:
        self.heard.append(number)


def right_answer(steps: Steps, heard: Sequence[int]) -> int:
    """The result that a program must have, computed beside Temporal."""
    total, numbers = 0, iter(heard)
    for kind, value in steps:
        part = 0
        if kind == "activities":
            part = sum(number * number for number in value)
        elif kind == "child":
            part = right_answer(value, [])
        elif kind == "signal":
            part = next(numbers)
        total = mixed(total, part)
    return total


def draw(drawing: random.Random, kinds: Sequence[str], length: int) -> Steps:
    """So many steps of these kinds, in an order drawn from the seed."""
    steps: Steps = []
    for kind in drawing.choices(kinds, k=length):
        if kind == "activities":
            steps.append((kind, [drawing.randrange(100) for _ in range(drawing.randint(1, 3))]))
        elif kind == "timer":
            steps.append((kind, drawing.choice([0.05, 0.2, 0.5])))
        else:
            steps.append((kind, draw(drawing, ["activities", "timer"], 2)))
    return steps


PARCELS_IN_CHAOS, PROGRAMS_IN_CHAOS, KILLS = 20, 6, 4
SERVICES = ["history", "matching", "frontend", "database"]  # each of them is killed once


class Load:
    """Many runs that are under way on a server while parts of it are killed, and what must be true of them then."""

    def __init__(self, lab: Lab, server: Reached, name: str = "chaos") -> None:
        self.lab, self.server, self.name = lab, server, name
        self.queue = f"{lab.id}-{name}"
        self.random = random.Random(f"{lab.seed} {name}")  # of its own: which load draws first is left to chance
        self.programs = [self._program() for _ in range(PROGRAMS_IN_CHAOS)]
        self.signals = [self.random.randrange(100) for _ in range(KILLS)]
        self.parcels: list[Handle] = []
        self.running: list[Handle] = []
        self.recorded: dict[tuple[str, str], float] = {}  # what was seen to be completed, and when

    def _program(self) -> Steps:
        """As many waits for a signal as there are kills, with random steps around them."""
        every = ["activities", "timer", "child"]
        parts = [[*draw(self.random, every, 2), ("signal", None)] for _ in range(KILLS)]
        return [*(step for part in parts for step in part), *draw(self.random, every, 2)]

    async def start(self) -> None:
        options: dict[str, Any] = {"server": self.server, "task_timeout": soon(2), "task_queue": self.queue}
        for number in range(PARCELS_IN_CHAOS):
            parcel, name = Parcel(str(number)), f"{self.name}-{number}"
            self.parcels.append(await self.lab.start(SendParcel.run, parcel, name=name, **COLLECTED, **options))
        for number, steps in enumerate(self.programs):
            program = await self.lab.start(Program.run, steps, name=f"{self.name}-program-{number}", **options)
            self.running.append(program)

    def worker(self, **options: Any) -> contextlib.AbstractAsyncContextManager[Child]:
        """A process that works for them; each step takes a moment, so that a kill meets some."""
        return self.lab.worker_process(
            [SendParcel, Program], [*PARCEL_STEPS, square], server=self.server, task_queue=self.queue,
            faults=[slow(name, 0.05) for name in [*STEPS, "square"]],
            shortened={name: {"start_to_close_timeout": soon(2)} for name in [*STEPS, "square"]}, **options,
        )  # fmt: skip

    def begun(self) -> int:
        """How many steps of parcels were begun so far."""
        parcels = {one.id for one in self.parcels}
        return sum(call.workflow in parcels for call in self.lab.calls())

    async def hear(self, number: int) -> None:
        """Send every program the signal that it waits for next; what a lost one answers, its end tells."""
        await asyncio.gather(*(said(handle.signal(Program.hear, number)) for handle in self.running))

    async def comes_to(self, moment: int, number: int) -> None:
        """Send the programs their next signal, wait for the moment of a kill, and remember what is completed."""
        await self.hear(number)
        await until(lambda: self.begun() >= moment, f"{moment} steps were begun", every=0.1)
        await self.look()

    async def look(self) -> None:
        """Remember what the server says is completed. It must not be begun again, whatever is killed now."""
        for handle in [*self.parcels, *self.running]:
            for id in await completed(handle):
                self.recorded.setdefault((handle.id, id), time.time())

    async def outcome(self, kills: str) -> list[dict[str, Any]]:
        """Wait for every run: what came of the parcels, of what was recorded before kills, and of the programs."""
        results = {one.id: await ended(one) for one in self.parcels}
        answers = [(await ended(one)).result for one in self.running]
        completions = {one.id: await completed(one) for one in [*self.parcels, *self.running]}
        calls = [call for call in self.lab.calls() if call.workflow in completions]
        again = {(one.workflow, one.id) for one in calls if one.at > self.recorded.get((one.workflow, one.id), one.at)}
        right = sum(one.result == right_result(id.rpartition("-")[2]) for id, one in results.items())
        begun = {one.id: {call.activity for call in calls if call.workflow == one.id} for one in self.parcels}
        return [
            {
                "seed": self.lab.seed,
                "SIGKILL_of": kills,
                "right_results": equal(right, PARCELS_IN_CHAOS),
                "completions_a_history": equal(sorted({len(completions[one.id]) for one in self.parcels}), [5]),
                "parcels_without_all_five_steps_begun": equal([id for id in begun if begun[id] != {*STEPS}], []),
                "steps_begun": f"{self.begun()} for {5 * PARCELS_IN_CHAOS} to be done",
                "settings": f"attempts and workflow tasks given up after {soon(2).total_seconds():g} s, "
                "sticky timeout 1 s",
            },
            {
                "completions_seen_before_kills": at_least(len(self.recorded), KILLS),
                "gone": equal(sorted(key for key in self.recorded if key[1] not in completions[key[0]]), []),
                "begun_again": equal(sorted(again), []),
            },
            {
                "seed": self.lab.seed,
                "steps": Counter(kind for steps in self.programs for kind, _ in steps),
                "answers": equal(answers, [right_answer(steps, self.signals) for steps in self.programs]),
            },
        ]


async def completed(handle: Handle) -> list[str]:
    """The ids of the activities that are completed in a run's history; none where the server has lost it."""
    ids, found = {}, []
    try:
        history = await handle.fetch_history()
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        return []
    for event in history.events:
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
            ids[event.event_id] = event.activity_task_scheduled_event_attributes.activity_id
        elif event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
            found.append(ids[event.activity_task_completed_event_attributes.scheduled_event_id])
    return found


def moments_of(load: Load) -> list[int]:
    """After how many steps each kill comes, drawn from the seed."""
    return sorted(load.random.sample(range(10, PARCELS_IN_CHAOS * 5 - 15), KILLS))


async def chaos(lab: Lab) -> list[Evidence]:
    """Under load, three kills of the worker and one of the server, at moments drawn from the seed."""
    async with lab.private_server(file=True) as server:
        load = Load(lab, server)
        victims = load.random.sample(["worker", "worker", "worker", "server"], KILLS)
        moments = moments_of(load)
        await load.start()
        for moment, victim, number in zip(moments, victims, load.signals, strict=True):
            async with load.worker(max_concurrent_activities=4) as worker:
                await load.comes_to(moment, number)
                if victim == "server":
                    server.kill()
                    await server.start()
                await worker.kill()
        async with load.worker():
            kills = [f"{victim} at step {moment}" for victim, moment in zip(victims, moments, strict=True)]
            parcels, recorded, programs = await load.outcome(", ".join(kills))
    return [
        holds(
            "random kills under load: every result is right and every history has each step completed once", **parcels
        ),
        holds("what a history had as completed before a kill stays there, and is never begun again", **recorded),
        holds(
            "random programs of activities, timers, children and signals give their known answers under them",
            **programs,
        ),
    ]


async def chaos_of_services(lab: Lab) -> Evidence:
    """The same load on a cluster whose services and database are killed one after the other; the worker stays."""
    async with Cluster() as cluster:
        load, region = Load(lab, cluster, "services"), cluster.region
        victims = load.random.sample(SERVICES, KILLS)
        moments = moments_of(load)
        await load.start()
        async with load.worker(max_concurrent_activities=4):
            for moment, victim, number in zip(moments, victims, load.signals, strict=True):
                await load.comes_to(moment, number)
                process = region.database if victim == "database" else region.of(victim)[0]
                process.kill()
                await process.start(60 * slowness())
                await region.ready(60 * slowness())
            kills = [f"{victim} at step {moment}" for victim, moment in zip(victims, moments, strict=True)]
            parcels, recorded, programs = await load.outcome(", ".join(kills))
    return holds(
        "history, matching, frontend and database of a cluster killed one after the other under load: the same holds",
        **(parcels | recorded | programs),
    )


@EX.item("EX-01", "Progress guarantee", fail_closed=True, seconds=200)
async def progress_guarantee(lab: Lab) -> AsyncIterator[Evidence]:
    """Workers and servers are killed between and inside steps; a ledger outside Temporal counts the steps.

    Whoever evaluates a cluster sees its services killed, too.
    """
    async for evidence in side_by_side(
        quick_successor(lab),
        default_successor(lab),
        kill_inside_step(lab),
        kill_server(lab, file=True),
        kill_server(lab, file=False),
        plain_program(lab),
        chaos(lab),
        *([chaos_of_services(lab)] if lab.on_cluster else []),
    ):
        yield evidence
    yield native(
        "replay belongs to the SDK: the workflow holds no recovery code, and nobody resumed a run by hand",
        workflow.defn,
        workflow.wait_condition,
        (workflow.execute_activity, "start_to_close_timeout"),
        Worker,
        WorkflowHandle.result,
        "temporal server start-dev --db-filename",
        adds=keywords_in([SendParcel, take], "try"),
    )


# EX-02 Side-effect guarantee -------------------------------------------------------------------------
# A completed activity is never run again. One that was cut off in the middle is: bring a key that is the same in
# every attempt, or allow only one and say what is not known. And let what runs end when a worker is told to end.


@dataclass
class Sale:
    number: str
    cents: int


@dataclass
class Payment:
    # Of the business, and of nothing else: the ids of workflows and activities come again in a later run. Where the
    # business has none, workflow id, run id and a name are a key, but a run that is repeated then pays once more.
    key: str
    cents: int


class Bank(Protocol):
    """The world outside. What it is asked twice under one key counts once; a text message has no key."""

    def charge(self, key: str, cents: int) -> str: ...

    def is_settled(self, receipt: str) -> bool: ...

    def send_text(self, message: str) -> None: ...


class Till:
    """These activities block, so they are no coroutines: each runs in a thread."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    @activity.defn
    def charge(self, payment: Payment) -> str:
        return self.bank.charge(payment.key, payment.cents)

    @activity.defn
    def await_settlement(self, receipt: str) -> None:
        """May take longer than a deployment waits: it leaves with its worker, and goes on with another."""
        while not self.bank.is_settled(receipt):
            activity.heartbeat()
            activity.wait_for_worker_shutdown_sync(timedelta(seconds=5))
            if activity.is_worker_shutdown():
                raise ApplicationError("the worker leaves")

    @activity.defn
    def send_text(self, message: str) -> None:
        self.bank.send_text(message)


@workflow.defn
class Checkout:
    @workflow.run
    async def run(self, sale: Sale) -> str:
        receipt = await workflow.execute_activity_method(
            Till.charge, Payment(f"{sale.number}/charge", sale.cents), start_to_close_timeout=timedelta(seconds=30)
        )
        await workflow.execute_activity_method(
            Till.await_settlement,
            receipt,
            start_to_close_timeout=timedelta(hours=8),
            heartbeat_timeout=timedelta(seconds=30),
        )
        try:
            await workflow.execute_activity_method(
                Till.send_text,
                f"order {sale.number} is paid",
                start_to_close_timeout=timedelta(seconds=30),
                retry_policy=RetryPolicy(maximum_attempts=1),  # rather not at all than twice
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            return f"{receipt}; not known whether the customer was told: {error.cause}"
        return f"{receipt}; customer told"


def till_worker(client: Client, till: Till) -> Worker:
    return Worker(
        client,
        task_queue="till",
        workflows=[Checkout],
        activities=[till.charge, till.await_settlement, till.send_text],
        activity_executor=ThreadPoolExecutor(10),
        graceful_shutdown_timeout=timedelta(seconds=30),
    )


async def serve(worker: Worker) -> None:
    """A worker as it is deployed: SIGTERM ends it, and what runs then is given time to end."""
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    async with worker:
        await told.wait()


class PaperBank:
    """A bank for the example, which keeps its books in memory."""

    def __init__(self) -> None:
        self.books: dict[str, int] = {}

    def charge(self, key: str, cents: int) -> str:
        self.books.setdefault(key, cents)
        return f"receipt for {key}"

    def is_settled(self, receipt: str) -> bool:
        return True

    def send_text(self, message: str) -> None:
        print(f"Text message: {message}")


async def example_ex_02(client: Client) -> None:
    serving = asyncio.create_task(serve(till_worker(client, Till(PaperBank()))))
    sale = Sale(str(uuid.uuid4()), 4200)
    print(await client.execute_workflow(Checkout.run, sale, id=f"checkout-{sale.number}", task_queue="till"))
    os.kill(os.getpid(), signal.SIGTERM)
    await serving


# EX-02 put to the test -------------------------------------------------------------------------------


@dataclass
class Branch:
    """A bank whose books outlive its callers."""

    books: Books
    settles: str = ""  # a file: settled when it is there

    def charge(self, key: str, cents: int) -> str:
        note(f"{self.books.path} tokens", activity.info().task_token.hex())
        self.books.enter(key, cents)
        return f"receipt for {key}"

    def tokens(self) -> list[str]:
        """What each attempt to charge would prove itself by, oldest first."""
        return notes(f"{self.books.path} tokens")

    def is_settled(self, receipt: str) -> bool:
        return not self.settles or Path(self.settles).exists()

    def send_text(self, message: str) -> None:
        self.books.enter(f"{message} {uuid.uuid4()}", 1)


class Keyless(Branch):
    """The control: it books every call."""

    def charge(self, key: str, cents: int) -> str:
        return super().charge(f"{key} {uuid.uuid4()}", cents)


class KeyedByIds(Branch):
    """The control: the caller sends the ids of workflow and activity as its key, as is often advised."""

    def charge(self, key: str, cents: int) -> str:
        return super().charge(f"{activity.info().workflow_id}/{activity.info().activity_id}", cents)


@workflow.defn
class ThreeCharges:
    """Notes each time its code is run, which workflow code must never do: it counts the replays here."""

    @workflow.run
    async def run(self, number: str, ledger: str, local: bool) -> None:
        note(ledger, "entered")
        for key in (f"{number}/1", f"{number}/2", f"{number}/3"):
            if local:
                await workflow.execute_local_activity_method(
                    Till.charge, Payment(key, 1), start_to_close_timeout=PATIENT
                )
            else:
                await workflow.execute_activity_method(Till.charge, Payment(key, 1), start_to_close_timeout=PATIENT)


@workflow.defn
class Subscription:
    """Charges three months, each in a run of its own, as one that never ends has to."""

    @workflow.run
    async def run(self, number: str, month: int) -> None:
        payment = Payment(f"{number}/month {month}", month)
        await workflow.execute_activity_method(Till.charge, payment, start_to_close_timeout=PATIENT)
        if month < 3:
            workflow.continue_as_new(args=[number, month + 1])


def parts_of(bank: Branch, **options: Any) -> dict[str, Any]:
    """The arguments of a worker for this bank."""
    till = Till(bank)
    workflows = [Checkout, ThreeCharges, Subscription]
    return {"workflows": workflows, "activities": [till.charge, till.await_settlement, till.send_text], **options}


def branch(lab: Lab, name: str, kind: type[Branch] = Branch) -> Branch:
    return kind(Books(lab.file(f"{name}.sqlite")))


async def replayed_charges(lab: Lab) -> Evidence:
    bank, ledger, number = branch(lab, "replayed"), lab.file("replayed"), f"{lab.id}-replayed"
    # No cache: every workflow task begins with a replay of the whole history.
    async with lab.worker(**parts_of(bank), max_cached_workflows=0, task_queue=number):
        await ended(await lab.start(ThreeCharges.run, number, ledger, False, name="replayed", task_queue=number))
    return works(
        "a completed activity is not run again when its workflow is replayed",
        workflow_code_run=at_least(len(notes(ledger)), 4),
        calls=equal(keys(lab.calls(number)), [f"{number}/{n}" for n in (1, 2, 3)]),
        books=equal(bank.books.amounts(), [1, 1, 1]),
    )


def keys(calls: Iterable[Call]) -> list[str]:
    return [call.argument["key"] for call in calls]


async def cut_off(lab: Lab, name: str, step: str, kind: type[Branch] = Branch) -> tuple[TakeOver, Branch]:
    """A checkout whose worker dies when a step has had its effect, and before it can tell anybody."""
    bank = branch(lab, name, kind)
    given_up = {step: {"start_to_close_timeout": soon(2)}}
    taken = await lab.take_over(
        Checkout.run, Sale(name, 42), name=name, parts=parts_of(bank, faults=[die(step)], shortened=given_up)
    )
    return taken, bank


async def keyed(lab: Lab) -> list[Evidence]:
    (plain, without), (taken, bank) = await asyncio.gather(
        cut_off(lab, "keyless", "charge", Keyless), cut_off(lab, "keyed", "charge")
    )
    again, once = without.books.amounts("keyless/"), bank.books.amounts("keyed/")
    return [
        control(
            "killed after the effect and before the report, without a key: the effect is there twice",
            calls=at_least(names([*plain.before, *plain.after]).count("charge"), 2),
            calls_without_an_effect=equal(names([*plain.before, *plain.after]).count("charge") - len(again), 0),
            status=equal(plain.ending.status, "COMPLETED"),
        ),
        holds(
            "the same kill with a key of the business's: called again, and it counts once",
            calls=at_least(names([*taken.before, *taken.after]).count("charge"), 2),
            keys=equal({*keys(lab.calls(taken.handle.id, activity="charge"))}, {"keyed/charge"}),
            books=equal(once, [42]),
            status=equal(taken.ending.status, "COMPLETED"),
        ),
        limit(
            "an effect outside Temporal is there twice after such a kill unless its user brings a key",
            times_without=at_least(len(again), 2),
            times_with=equal(len(once), 1),
        ),
    ]


async def at_most_once(lab: Lab) -> Evidence:
    taken, bank = await cut_off(lab, "once", "send_text")
    return holds(
        "maximum_attempts=1 makes it at most once, and the workflow knows that it does not know",
        calls=equal(names([*taken.before, *taken.after]).count("send_text"), 1),
        texts_sent=equal(bank.books.amounts("order once"), [1]),
        result=contains(told(taken.ending), "not known", "timeout"),
    )


def told(how: Ending) -> str:
    """A checkout's result without its receipt."""
    return str(how.result).partition("; ")[2]


async def subscribed(lab: Lab) -> list[Evidence]:
    """Three months under a key of the business's, and under the ids of workflow and activity."""
    found = {}
    for name, kind in (("months", Branch), ("ids", KeyedByIds)):
        bank, id = branch(lab, name, kind), f"{lab.id}-{name}"
        async with lab.worker(**parts_of(bank), task_queue=id):
            how = await ended(await lab.start(Subscription.run, name, 1, name=name, task_queue=id))
        ids = [f"{'c' if call.workflow == id else call.workflow}/{call.id}" for call in lab.calls(id)]
        found[name] = {
            "runs": equal(len({call.run for call in lab.calls(id)}), 3),
            "workflow_and_activity_ids": equal(ids, ["c/1"] * 3),
            "status": equal(how.status, "COMPLETED"),
        }
        found[name]["books"] = equal(bank.books.amounts(), [1, 2, 3] if kind is Branch else [1])
    return [
        holds("over continue-as-new a key of the business's lets each month count", **found["months"]),
        control(
            "a key of workflow id and activity id comes again in each run: two of three months are never paid",
            **found["ids"],
        ),
    ]


async def local_charges(lab: Lab) -> Evidence:
    """Three local activities, whose worker dies in the third."""
    bank, number = branch(lab, "local"), f"{lab.id}-local"
    options: dict[str, Any] = {"task_queue": number, "task_timeout": soon(2)}
    handle = await lab.start(ThreeCharges.run, number, lab.file("local"), True, name="local", **options)
    dying = parts_of(bank, faults=[die_before("charge", key=f"{number}/3")])
    async with lab.worker_process(**dying, task_queue=number) as worker:
        await worker.wait()
    before = len(lab.calls(number))
    async with lab.worker_process(**parts_of(bank), task_queue=number):
        how = await ended(handle)
    finished = [key for key in keys(lab.calls(number)[before:]) if not key.endswith("/3")]
    return limit(
        "finished local activities run again when the worker dies within the same workflow task",
        calls_before=at_least(before, 3),
        finished_and_run_again=at_least(len(finished), 1),
        status=equal(how.status, "COMPLETED"),
        workflow_task_timeout=figure(soon(2).total_seconds(), "s"),
    )


@dataclass(frozen=True)
class Deployment:
    """A worker told to end by SIGTERM while the text message, which has one attempt, is under way."""

    kind: Callable[..., Evidence]
    claim: str
    says: Sequence[str]  # words of the result
    texts: list[int]
    grace: bool
    handler: bool = True


DEPLOYMENTS = {
    "grace": Deployment(
        holds, "told to end by SIGTERM, a worker with graceful_shutdown_timeout lets its activity end",
        ["customer told"], [1], grace=True,
    ),
    "default": Deployment(
        control, "with the default grace the running activity fails at once, and with it its only attempt",
        ["not known"], [], grace=False,
    ),
    "no handler": Deployment(
        control, "where nothing handles SIGTERM the attempt hangs until it is given up",
        ["not known", "timeout"], [], grace=True, handler=False,
    ),
}  # fmt: skip


async def deploy(lab: Lab, name: str, case: Deployment) -> Evidence:
    bank, id, gate = branch(lab, name), f"{lab.id}-{name}", lab.gate(name)
    leaving = lab.file(f"{name} told") if case.handler else ""
    parts = parts_of(bank, task_queue=id, faults=[hold("send_text", gate)])
    parts |= {"graceful_shutdown_timeout": PATIENT * slowness()} if case.grace else {}
    parts |= {} if case.handler else {"shortened": {"send_text": {"start_to_close_timeout": soon(2)}}}
    handle = await lab.start(Checkout.run, Sale(name, 1), name=name, task_queue=id)
    async with lab.worker_process(**parts, leaving=leaving) as old:
        await until(lambda: "send_text" in names(lab.calls(id)), "the text message is under way")
        old.send(signal.SIGTERM)
        begun = time.monotonic()
        await until(lambda: Path(leaving).exists() if leaving else not old.alive, "the worker was told to end")
        async with lab.worker_process(**parts):
            if case.grace and case.handler:
                open_gate(gate)
            how = await ended(handle)
            seconds = time.monotonic() - begun
        status = await old.wait()
    return case.kind(
        case.claim,
        result=contains(told(how), *case.says),
        texts_sent=equal(bank.books.amounts(f"order {name}"), case.texts),
        attempts=equal(names(lab.calls(id)).count("send_text"), 1),
        worker_ended_with=equal(status, 0 if case.handler else -signal.SIGTERM),
        from_SIGTERM_to_the_end=figure(seconds, "s"),
    )


async def long_one(lab: Lab) -> Evidence:
    """A worker is told to end while an activity waits for the bank, which may take hours."""
    name, gate, grace = "long", lab.gate("long"), PATIENT * slowness()
    bank = replace(branch(lab, name), settles=gate)
    parts = parts_of(bank, graceful_shutdown_timeout=grace, task_queue=f"{lab.id}-{name}")
    handle = await lab.start(Checkout.run, Sale(name, 1), name=name, task_queue=f"{lab.id}-{name}")
    async with lab.worker_process(**parts, leaving=lab.file("long told")) as old:
        await until(lambda: "await_settlement" in names(lab.calls(handle.id)), "the wait has begun")
        old.send(signal.SIGTERM)
        begun = time.monotonic()
        try:
            status: int | str = await old.wait(30)
        except TimeoutError:
            status = "nothing: it stayed"
        seconds = time.monotonic() - begun
        open_gate(gate)
    async with lab.worker_process(**parts) as successor:
        how = await ended(handle)
    calls = lab.calls(handle.id, activity="await_settlement")
    starts = [one.activity_task_started_event_attributes for one in (await handle.fetch_history()).events]
    return holds(
        "a long activity that waits for the shutdown of its worker hands over to the next one",
        workers=equal([{old.pid: "first", successor.pid: "second"}[one.pid] for one in calls], ["first", "second"]),
        first_attempt_ended_with=equal(
            [one.last_failure.message for one in starts if one.attempt == 2], ["the worker leaves"]
        ),
        first_worker_ended_with=equal(status, 0),
        it_ended_after=figure(seconds, "s"),
        grace=figure(grace.total_seconds(), "s"),
        result=equal(told(how), "customer told"),
    )


async def zombie(lab: Lab) -> Evidence:
    """A worker stands still, is given up, and wakes when another one has done its work."""
    bank, id, gate = branch(lab, "zombie"), f"{lab.id}-zombie", lab.gate("zombie")
    parts = parts_of(bank, task_queue=id, shortened={"charge": {"start_to_close_timeout": soon(2)}})
    handle = await lab.start(Subscription.run, "zombie", 3, name="zombie", task_queue=id, task_timeout=soon(2))
    # One poll, because each open one of a worker that stands still takes a task that must be waited for.
    one = PollerBehaviorSimpleMaximum(maximum=1)
    polls = {"activity_task_poller_behavior": one, "workflow_task_poller_behavior": one, "max_cached_workflows": 0}
    halted = parts | polls | {"faults": [withhold("charge", gate, silent=True)]}
    async with lab.worker_process(**halted, leaving=lab.file("zombie told")) as old:
        await until(lambda: lab.calls(id, "ended"), "the first attempt has had its effect")
        old.send(signal.SIGSTOP)
        async with lab.worker_process(**parts) as successor:
            how = await ended(handle)
        open_gate(gate)
        old.send(signal.SIGCONT)
        old.send(signal.SIGTERM)
        left = await old.wait()
    events = [one.activity_task_completed_event_attributes for one in (await handle.fetch_history()).events]
    late = lab.client.get_async_activity_handle(task_token=bytes.fromhex(bank.tokens()[0]))
    answer = await said(late.complete("late"))
    return holds(
        "a worker that stood still and wakes after another has done its work: its answer changes nothing, and one more "
        "under its token is refused",
        attempts_of_it=sum(call.pid == old.pid for call in lab.calls(id)),
        it_ended_with=equal(left, 0),
        completions_by_the_other=equal(
            [one.identity.startswith(f"{successor.pid}@") for one in events if one.identity], [True]
        ),
        answer_to_one_more_report=equal(answer.partition(":")[0], "NOT_FOUND"),
        books=equal(bank.books.amounts("zombie/"), [3]),
        status=equal(how.status, "COMPLETED"),
    )


@EX.item("EX-02", "Side-effect guarantee")
async def side_effect_guarantee(lab: Lab) -> AsyncIterator[Evidence]:
    """Workers die, are told to end or stand still between an effect and its report; a table counts the effects."""
    async for evidence in side_by_side(
        replayed_charges(lab),
        keyed(lab),
        at_most_once(lab),
        subscribed(lab),
        local_charges(lab),
        *(deploy(lab, name, case) for name, case in DEPLOYMENTS.items()),
        long_one(lab),
        zombie(lab),
    ):
        yield evidence
    grace = inspect.signature(Worker).parameters["graceful_shutdown_timeout"].default
    yield limit(
        "by default a worker that is told to end gives its running activities no time",
        default_grace=at_most(figure(grace.total_seconds(), "s"), 0),
    )
    yield native(
        "not running a completed activity again, bounding its attempts and ending in peace are the SDK's own",
        (workflow.execute_activity_method, "retry_policy"),
        (RetryPolicy, "maximum_attempts"),
        workflow.execute_local_activity_method,
        (Worker, "graceful_shutdown_timeout"),
        activity.wait_for_worker_shutdown_sync,
        activity.is_worker_shutdown,
        adds=["the key that makes an effect single"],
    )


# EX-03 Idempotency and deduplication -----------------------------------------------------------------
# A workflow id is a lock that the server keeps: of many who start, one succeeds, and a policy says what the others
# get. An update has an id, too: sent again, it is answered again and not made again.


@dataclass
class Balance:
    owner: str
    cents: int = 0
    transfers: dict[str, int] = field(default_factory=dict)  # what each was answered; the old ones may be dropped


@activity.defn
async def welcome(balance: Balance) -> str:
    return f"Welcome, {balance.owner}"


@workflow.defn
class Account:
    @workflow.init
    def __init__(self, balance: Balance) -> None:
        self.balance, self.closed = balance, False

    @workflow.run
    async def run(self, balance: Balance) -> int:
        if workflow.info().continued_run_id is None:
            await workflow.execute_activity(welcome, balance, start_to_close_timeout=timedelta(seconds=30))
        await workflow.wait_condition(lambda: self.closed or workflow.info().is_continue_as_new_suggested())
        await workflow.wait_condition(workflow.all_handlers_finished)
        if not self.closed:
            workflow.continue_as_new(self.balance)
        return self.balance.cents

    @workflow.update
    def deposit(self, cents: int) -> int:
        update = workflow.current_update_info()
        assert update
        return self.book(update.id, cents)

    def book(self, transfer: str, cents: int) -> int:
        # The server knows an update's id until the run ends; the account takes it along into the next one.
        balance = self.balance
        if transfer not in balance.transfers:
            balance.cents += cents
            balance.transfers[transfer] = balance.cents
        return balance.transfers[transfer]

    @workflow.signal
    def close(self) -> None:
        self.closed = True


async def open_account(client: Client, owner: str) -> WorkflowHandle[Account, int]:
    """Whoever calls this, and however often: there is one account, and everyone is given it."""
    return await client.start_workflow(
        Account.run,
        Balance(owner),
        id=f"account-{owner}",
        task_queue="accounts",
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,  # while it is open
        id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,  # once it was closed
    )


async def example_ex_03(client: Client) -> None:
    async with Worker(client, task_queue="accounts", workflows=[Account], activities=[welcome]):
        owner, transfer = str(uuid.uuid4()), str(uuid.uuid4())
        accounts = await asyncio.gather(*(open_account(client, owner) for _ in range(5)))
        print(f"Runs made by five callers: {len({one.first_execution_run_id for one in accounts})}")
        for _ in range(2):
            print(f"Balance: {await accounts[0].execute_update(Account.deposit, 10, id=transfer)}")
        await accounts[0].signal(Account.close)
        print(f"Balance when closed: {await accounts[0].result()}")


# EX-03 put to the test -------------------------------------------------------------------------------

CALLERS = 50


@workflow.defn
class Forgetful(Account):
    """The account without its memory of transfers."""

    @workflow.init
    def __init__(self, balance: Balance) -> None:
        super().__init__(balance)

    @workflow.run
    async def run(self, balance: Balance) -> int:
        return await super().run(balance)

    def book(self, transfer: str, cents: int) -> int:
        self.balance.transfers.clear()
        return super().book(transfer, cents)


@workflow.defn
class Tally:
    """Counts what it is sent. An update waits until it is released."""

    def __init__(self) -> None:
        self.total, self.released, self.closed = 0, False, False

    @workflow.run
    async def run(self) -> int:
        await workflow.wait_condition(lambda: self.closed and workflow.all_handlers_finished())
        return self.total

    @workflow.update
    async def add_later(self, amount: int) -> int:
        await workflow.wait_condition(lambda: self.released)
        self.total += amount
        return self.total

    @workflow.signal
    def add(self, amount: int) -> None:
        self.total += amount

    @workflow.signal
    def release(self) -> None:
        self.released = True

    @workflow.signal
    def close(self) -> None:
        self.closed = True


ACCOUNTS: dict[str, Any] = {"workflows": [Account, Forgetful, Tally], "activities": [welcome]}


async def closed(handle: Handle) -> Any:
    await handle.signal("close")
    return (await ended(handle)).result


async def start_many(lab: Lab, name: str, policy: WorkflowIDConflictPolicy, callers: int) -> Counter[str]:
    """`callers` start one id at the same time. Returns how often each run id came back, and each refusal."""
    answers: Counter[str] = Counter()

    async def start() -> None:
        try:
            handle = await lab.start(Account.run, Balance(name), name=name, id_conflict_policy=policy)
            answers[str(handle.first_execution_run_id)] += 1
        except WorkflowAlreadyStartedError as error:
            answers[type(error).__name__] += 1

    await asyncio.gather(*(start() for _ in range(callers)))
    return answers


def runs(lab: Lab, name: str) -> set[str]:
    """The runs of an id that welcomed their owner."""
    return {call.run for call in lab.calls(f"{lab.id}-{name}")}


async def concurrent_starts(lab: Lab) -> Evidence:
    answers = await start_many(lab, "one", WorkflowIDConflictPolicy.FAIL, CALLERS)
    refused = answers.pop(WorkflowAlreadyStartedError.__name__, 0)
    handle = lab.client.get_workflow_handle(f"{lab.id}-one")
    await closed(handle)
    visible = f'WorkflowId = "{handle.id}"'
    await until(lambda: listed(lab.client, visible), "visibility lists the run")
    return works(
        f"{CALLERS} concurrent starts of one id make one run",
        handles=equal(sum(answers.values()), 1),
        WorkflowAlreadyStartedError=equal(refused, CALLERS - 1),
        runs_that_ran=equal(len(runs(lab, "one") & set(answers)), 1),
        others_that_ran=equal(len(runs(lab, "one") - set(answers)), 0),
        runs_in_visibility=equal(len(await listed(lab.client, visible)), 1),
    )


async def conflict_policies(lab: Lab) -> Evidence:
    """What the others get while a run of the id is open."""
    using = await start_many(lab, "using", WorkflowIDConflictPolicy.USE_EXISTING, 10)
    ending = await start_many(lab, "ending", WorkflowIDConflictPolicy.TERMINATE_EXISTING, 10)
    ids = [lab.client.get_workflow_handle(f"{lab.id}-ending", run_id=one) for one in ending]
    states = Counter([await status_of(one) for one in ids])
    await closed(lab.client.get_workflow_handle(f"{lab.id}-using"))
    return holds(
        "conflict policies while a run is open: USE_EXISTING shares it, TERMINATE_EXISTING replaces it",
        handles_by_run_of_USE_EXISTING=equal(list(using.values()), [10]),
        runs_that_ran=equal(len(runs(lab, "using")), 1),
        runs_of_TERMINATE_EXISTING=equal(states, Counter(TERMINATED=9, RUNNING=1)),
    )


# What happens to a second start once the first run has ended so -> whether it makes a run, by policy.
REUSE = {
    (WorkflowIDReusePolicy.ALLOW_DUPLICATE, "COMPLETED"): "new run",
    (WorkflowIDReusePolicy.ALLOW_DUPLICATE, "FAILED"): "new run",
    (WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY, "COMPLETED"): "refused",
    (WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY, "FAILED"): "new run",
    (WorkflowIDReusePolicy.REJECT_DUPLICATE, "COMPLETED"): "refused",
    (WorkflowIDReusePolicy.REJECT_DUPLICATE, "FAILED"): "refused",
}


async def started_again(lab: Lab, policy: WorkflowIDReusePolicy, how: str) -> str:
    """End a run so, then start its id again: was there a second run? Accounts named after FAILED are refused."""
    name = f"{policy.name}-{how}"
    first = await lab.start(Account.run, Balance(how), name=name)
    await closed(first) if how == "COMPLETED" else await ended(first)
    was = await status_of(first)
    try:
        second = await lab.start(Account.run, Balance(how), name=name, id_reuse_policy=policy)
    except WorkflowAlreadyStartedError:
        return "refused" if was == how else was
    await closed(second) if how == "COMPLETED" else await ended(second)
    return "new run" if len(runs(lab, name)) == 2 and was == how else was


async def reuse_policies(lab: Lab) -> Evidence:
    found = await asyncio.gather(*(started_again(lab, *case) for case in REUSE))
    facts = {f"{policy.name} after {how}": case for (policy, how), case in zip(REUSE, found, strict=True)}
    wanted = dict(zip(facts, REUSE.values(), strict=True))
    return holds(
        "reuse policies after a run has ended do what they say",
        **{name: equal(case, wanted[name]) for name, case in facts.items()},
    )


async def one_update(lab: Lab) -> Evidence:
    """One id, sent by many at once, then again, and again when the run is closed."""
    handle = await lab.start(Account.run, Balance("update"), name="update")

    async def deposit() -> int:
        return await handle.execute_update(Account.deposit, 10, id="transfer-1")

    answers = await asyncio.gather(*(deposit() for _ in range(20)))
    other = await handle.execute_update(Account.deposit, 5, id="transfer-2")
    again = await deposit()
    total = await closed(handle)
    return holds(
        "one update id is applied once, and everyone who sends it gets the recorded answer, also when all is over",
        answers_to_20_at_once=equal(answers, [10] * 20),
        answer_to_another_id=equal(other, 15),
        sent_again=equal(again, 10),
        balance=equal(total, 15),
        sent_again_to_the_closed_run=equal(await deposit(), 10),
    )


async def waiting_updates(lab: Lab) -> Evidence:
    """A run takes ten updates at a time. Thirty callers who wait under one id, and nine others."""
    handle = await lab.start(Tally.run, name="waiting")

    async def accepted(id: str) -> WorkflowUpdateHandle[int]:
        return await handle.start_update(
            Tally.add_later, 1, id=id, wait_for_stage=WorkflowUpdateStage.ACCEPTED, rpc_timeout=PATIENT
        )

    same = await asyncio.gather(*(accepted("same") for _ in range(30)))
    others = await asyncio.gather(*(accepted(f"other-{number}") for number in range(9)))
    await handle.signal(Tally.release)
    answers = [await said(one.result()) for one in same]
    return holds(
        "callers who wait under one update id take one of the ten places that a run has for updates under way",
        answers_to_30_under_one_id=equal(len(set(answers)), 1),
        answers_to_9_others=equal(len({await said(one.result()) for one in others}), 9),
        total=equal(await closed(handle), 10),
    )


async def killed_update(lab: Lab, server: Server) -> Evidence:
    """An update is accepted and waits. Worker and server are killed, and a client that knows the id asks."""
    queue = f"{lab.id}-killed"
    async with lab.worker_process(**ACCOUNTS, server=server, task_queue=queue) as worker:
        handle = await lab.start(Tally.run, name="killed", server=server, task_queue=queue)
        await handle.start_update(
            Tally.add_later, 10, id="transfer-1", wait_for_stage=WorkflowUpdateStage.ACCEPTED, rpc_timeout=PATIENT
        )
        await worker.kill()
        server.kill()
    await server.start()
    async with lab.worker_process(**ACCOUNTS, server=server, task_queue=queue):
        found: WorkflowHandle[Tally, int] = (await connect(server.target)).get_workflow_handle(queue)
        await found.signal(Tally.release)
        answer = await asyncio.wait_for(found.get_update_handle_for(Tally.add_later, "transfer-1").result(), bound())
        again = await asyncio.wait_for(found.execute_update(Tally.add_later, 10, id="transfer-1"), bound())
        total = await closed(found)
    return holds(
        "an update accepted before worker and server were killed is made once, and a new client gets its answer by id",
        answer=equal(answer, 10),
        sent_again=equal(again, 10),
        total=equal(total, 10),
    )


async def over_continue_as_new(lab: Lab, server: Server) -> list[Evidence]:
    """The same transfer is sent again when the account goes on in its next run."""
    found = []
    async with lab.worker(**ACCOUNTS, server=server):
        for account in (Account, Forgetful):
            handle = await lab.start(account.__name__, Balance("next"), name=account.__name__, server=server)
            await handle.execute_update("deposit", 10, id="transfer-1")
            await until(lambda: goes_on(handle), "the account goes on in another run")  # noqa: B023
            again = await handle.execute_update("deposit", 10, id="transfer-1")
            found.append({"answer_to_the_second": again, "balance": await closed(handle)})
    remembers, forgets = found
    return [
        holds(
            "an account that takes the ids along books a transfer once, though it was sent to two runs",
            **all_equal(remembers, 10),
        ),
        limit(
            "an update's id is known to one run: after continue-as-new the same one is applied again",
            **all_equal(forgets, 20),
        ),
    ]


def all_equal(found: Mapping[str, int], expected: int) -> dict[str, Any]:
    return {name: equal(value, expected) for name, value in found.items()}


async def goes_on(handle: Handle) -> bool:
    return (await handle.describe()).run_id != handle.first_execution_run_id


async def one_request(lab: Lab) -> Evidence:
    """Below the client, the server's API deduplicates signals by request id."""
    handle = await lab.start(Tally.run, name="request")
    request = SignalWorkflowExecutionRequest(
        namespace=lab.client.namespace,
        workflow_execution=WorkflowExecution(workflow_id=handle.id),
        signal_name="add",
        request_id="transfer-1",
    )
    request.input.payloads.extend(await lab.client.data_converter.encode([10]))
    for _ in range(2):
        await lab.client.workflow_service.signal_workflow_execution(request)
    return holds(
        "a signal sent twice with one request id (raw gRPC) is applied once",
        total_of_2_signals_of_10=equal(await closed(handle), 10),
    )


async def equal_signals(lab: Lab) -> Evidence:
    handle = await lab.start(Tally.run, name="signals")
    for _ in range(2):
        await handle.signal(Tally.add, 10)
    offered = [name for name in inspect.signature(WorkflowHandle.signal).parameters if name.endswith("id")]
    return limit(
        "a signal sent twice is applied twice: the client offers no id for it (an update does)",
        total_of_2_signals_of_10=equal(await closed(handle), 20),
        id_parameters_of_WorkflowHandle_signal=equal(offered, []),
    )


async def distinct_ids(lab: Lab) -> Evidence:
    owners = [f"distinct-{number}" for number in range(CALLERS)]
    handles = await asyncio.gather(*(lab.start(Account.run, Balance(owner), name=owner) for owner in owners))
    await asyncio.gather(*(closed(handle) for handle in handles))
    return control(
        f"{CALLERS} starts with ids of their own make {CALLERS} runs",
        runs_that_ran=equal(len(set().union(*(runs(lab, owner) for owner in owners))), CALLERS),
    )


# A setting that no user has: continue-as-new is suggested after so many events.
SUGGESTED_EARLY = {"limit.historyCount.suggestContinueAsNew": "10"}  # 4096


async def on_a_server_of_its_own(lab: Lab) -> list[Evidence]:
    """What kills the server, and what needs it to suggest continue-as-new early."""
    async with lab.private_server(file=True, settings=SUGGESTED_EARLY) as server:
        return [*await over_continue_as_new(lab, server), await killed_update(lab, server)]


@EX.item("EX-03", "Idempotency and deduplication", fail_closed=True)
async def deduplication(lab: Lab) -> AsyncIterator[Evidence]:
    """Many callers start, update and signal at once and again; a ledger tells which runs really ran."""
    parts = (
        concurrent_starts, distinct_ids, conflict_policies, reuse_policies, one_update, waiting_updates, one_request,
        equal_signals, on_a_server_of_its_own,
    )  # fmt: skip
    async with lab.worker(**ACCOUNTS, faults=[refuse("welcome", owner="FAILED")]):
        async for evidence in side_by_side(*(part(lab) for part in parts)):
            yield evidence
    yield native(
        "policies and ids are arguments of the call; the workflow has no code for it",
        (Client.start_workflow, "id_conflict_policy"),
        WorkflowIDConflictPolicy,
        (Client.start_workflow, "id_reuse_policy"),
        WorkflowIDReusePolicy,
        WorkflowHandle.signal,
        (WorkflowHandle.execute_update, "id"),
        WorkflowHandle.get_update_handle_for,
        workflow.current_update_info,
        adds=["a signal's request id, by raw gRPC", "a memory of update ids over continue-as-new"],
    )


# EX-04 State persistence -----------------------------------------------------------------------------
# State is not saved, it is derived: a workflow's variables come back because its history does. Nothing here
# writes or loads anything.


@dataclass
class Round:
    read: int = 0
    total: int = 0
    remarks: list[str] = field(default_factory=list)


@activity.defn
async def read_meter(number: int) -> int:
    return number * number


@workflow.defn
class MeterReading:
    def __init__(self) -> None:
        self.round = Round()
        self.closed = False

    @workflow.run
    async def run(self, meters: int) -> Round:
        for number in range(1, meters + 1):
            self.round.total += await workflow.execute_activity(
                read_meter, number, start_to_close_timeout=timedelta(seconds=30)
            )
            self.round.read = number
        await workflow.wait_condition(lambda: self.closed)
        return self.round

    @workflow.signal
    def remark(self, text: str) -> None:
        self.round.remarks.append(text)

    @workflow.signal
    def close(self) -> None:
        self.closed = True

    @workflow.query
    def state(self) -> Round:
        return self.round


def meter_worker(client: Client) -> Worker:
    return Worker(client, task_queue="meters", workflows=[MeterReading], activities=[read_meter])


async def example_ex_04(client: Client) -> None:
    handle = await client.start_workflow(MeterReading.run, 10, id=f"meters-{uuid.uuid4()}", task_queue="meters")
    await handle.signal(MeterReading.remark, "dog in the yard")
    for _ in range(2):
        async with meter_worker(client), asyncio.timeout(60):
            while (state := await handle.query(MeterReading.state)).read < 10:
                await asyncio.sleep(0.1)
            print(f"{state}, from a worker that has never seen the others")
    async with meter_worker(client):
        await handle.signal(MeterReading.close)
        print(await handle.result())


# EX-04 put to the test -------------------------------------------------------------------------------

METERS = 100
METERING: dict[str, Any] = {"workflows": [MeterReading], "activities": [read_meter]}
READ = Round(METERS, sum(number * number for number in range(1, METERS + 1)), ["first"])


async def has_read(handle: WorkflowHandle[MeterReading, Round]) -> bool:
    return (await handle.query(MeterReading.state)).read == METERS


async def kill_both(lab: Lab) -> list[Evidence]:
    """A workflow's variables are read before and after its worker and its server were killed."""
    id = f"{lab.id}-both"
    async with lab.private_server(file=True) as server:
        handle = await lab.start(MeterReading.run, METERS, name="both", server=server)
        async with lab.worker_process(**METERING, server=server) as worker:
            await handle.signal(MeterReading.remark, "first")
            await until(lambda: has_read(handle), f"{METERS} meters are read")
            before, then = await handle.query(MeterReading.state), await history_of(handle)
            await worker.kill()
            server.kill()
        await server.start()
        async with lab.worker_process(**METERING, server=server):
            after, history = await handle.query(MeterReading.state), await history_of(handle)
            shown = await lab.command("workflow", "show", "--workflow-id", id, "--output", "json", server=server)
            size = (await handle.describe()).raw_description.workflow_execution_info.history_size_bytes
    by_cli = json.loads(shown.out)["events"]
    return [
        works(
            "state read by query is the same after worker and server were killed",
            before=equal(before, READ),
            after=equal(after, READ),
            readings_made=equal(len(lab.calls(id)), METERS),
        ),
        holds(
            "the history is whole: event ids run from 1 without a gap, and nothing in it changed",
            event_ids=equal([int(one["eventId"]) for one in history] == list(range(1, len(history) + 1)), True),
            events=at_least(len(history), 6 * METERS),
            changed_since_before_the_kill=equal([one["eventId"] for one in then if one not in history], []),
            size_of_the_history=figure(size / 1000, "kB"),
        ),
        holds(
            "a second reader, the command line written in Go, sees the same events, field by field",
            events_by_the_command_line=equal(len(by_cli), len(history)),
            differing=equal([a["eventId"] for a, b in zip(history, by_cli, strict=False) if a != b], []),
        ),
    ]


async def in_memory(lab: Lab) -> Evidence:
    async with lab.private_server() as server:
        handle = await lab.start(MeterReading.run, 1, server=server)
        there = await status_of(handle)
        server.kill()
        await server.start()
        gone = await refusal(handle)
    return control(
        "a server that keeps its state in memory has forgotten the run",
        before_the_kill=equal(there, "RUNNING"),
        after_the_restart=equal(gone, "NOT_FOUND"),
    )


FULL = (
    "when the server's disk is full, what was acknowledged is kept, what is refused is said, and with room it goes on"
)


async def full_disk(lab: Lab) -> Evidence:
    """The server's file may not grow any more: the limit on the size of its files stands for a full disk."""
    if not hasattr(resource, "prlimit"):
        return not_run("holds", FULL, "only Linux limits the files of a process that runs")
    async with lab.private_server(file=True) as server, lab.worker(**METERING, server=server):
        handle = await lab.start(MeterReading.run, 1, name="full", server=server)
        await handle.query(MeterReading.state)
        limits = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
        room = os.path.getsize(str(server.file)) + 150_000
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (room, limits[1]))
        kept: list[str] = []
        refused: list[RPCError] = []
        while len(refused) < 3 and len(kept) < 1000:
            remark = f"{len(kept) + len(refused)} {'x' * 2000}"
            try:
                await remark_once(server.client, handle.id, remark)
                kept.append(remark)
            except RPCError as error:
                refused.append(error)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, limits)
        after = "with room again"
        await asyncio.wait_for(handle.signal(MeterReading.remark, after), bound())
        server.kill()
        await server.start()
        found = (await handle.query(MeterReading.state)).remarks
    return holds(
        FULL,
        acknowledged=at_least(len(kept), 1),
        refused=equal(len(refused), 3),
        refused_with=sorted({f"{name_of(error.status)}: {error.message}" for error in refused}),
        acknowledged_and_lost=equal(len([one for one in kept if found.count(one) != 1]), 0),
        in_order=equal([one for one in found if one in kept] == kept, True),
        last=equal(found[-1:], [after]),
        refused_and_kept=len(found) - len(kept) - 1,
    )


async def remark_once(client: Client, id: str, text: str) -> None:
    """A signal that is sent only once: the client would try again for a while."""
    request = SignalWorkflowExecutionRequest(
        namespace=client.namespace, workflow_execution=WorkflowExecution(workflow_id=id), signal_name="remark"
    )
    request.input.payloads.extend(await client.data_converter.encode([text]))
    await client.workflow_service.signal_workflow_execution(request, timeout=timedelta(seconds=10 * slowness()))


@EX.item("EX-04", "State persistence")
async def state_persistence(lab: Lab) -> AsyncIterator[Evidence]:
    """State and history are read again after worker and server were killed, and after the disk was full."""
    parts = (kill_both, in_memory, full_disk)
    async for evidence in side_by_side(*(part(lab) for part in parts)):
        yield evidence
    yield native(
        "variables are plain attributes, read by a query",
        workflow.query,
        WorkflowHandle.query,
        WorkflowHandle.fetch_history,
        "temporal workflow show",
        "temporal server start-dev --db-filename",
    )


# EX-05 Determinism constraints -----------------------------------------------------------------------
# Replay only works if the code decides the same again. The SDK has a clock, randomness and ids that do, and a
# sandbox that refuses those that do not.


@dataclass
class Draw:
    id: str
    at: datetime
    winner: str
    lot: int


@workflow.defn
class Raffle:
    def __init__(self) -> None:
        self.drawn: Draw | None = None

    @workflow.run
    async def run(self, entrants: list[str]) -> Draw:
        once_each = sorted(set(entrants))  # the order of a set differs from process to process, and nobody refuses it
        self.drawn = Draw(
            id=str(workflow.uuid4()),
            at=workflow.now(),
            winner=workflow.random().choice(once_each),
            lot=workflow.random().randrange(10**9),
        )
        await workflow.sleep(timedelta(seconds=1))
        return self.drawn

    @workflow.query
    def draw(self) -> Draw | None:
        return self.drawn


async def example_ex_05(client: Client) -> None:
    id = f"raffle-{uuid.uuid4()}"
    async with Worker(client, task_queue="raffle", workflows=[Raffle]):
        draw = await client.execute_workflow(Raffle.run, ["Ann", "Bob", "Ann", "Eve"], id=id, task_queue="raffle")
    print(f"Drawn:    {draw}")
    async with Worker(client, task_queue="raffle", workflows=[Raffle]):
        # This worker has never seen the run: it replays the code to answer.
        print(f"Replayed: {await client.get_workflow_handle(id).query(Raffle.draw)}")


# EX-05 put to the test -------------------------------------------------------------------------------

NONDETERMINISTIC: dict[str, Callable[[], object]] = {
    "datetime.now()": lambda: datetime.now(),
    "datetime.now(UTC)": lambda: datetime.now(UTC),
    "datetime.today()": lambda: datetime.today(),
    "date.today()": lambda: date.today(),
    "time.time()": lambda: time.time(),
    "time.time_ns()": lambda: time.time_ns(),
    "time.monotonic()": lambda: time.monotonic(),
    "time.perf_counter()": lambda: time.perf_counter(),
    "time.localtime()": lambda: time.localtime(),
    "time.sleep(0)": lambda: time.sleep(0),
    "random.random()": lambda: random.random(),
    "random.randint(1, 6)": lambda: random.randint(1, 6),
    "random.choice('ab')": lambda: random.choice("ab"),
    "random.shuffle([1])": lambda: random.shuffle([1]),
    "random.gauss(0, 1)": lambda: random.gauss(0, 1),
    "uuid.uuid1()": lambda: uuid.uuid1(),
    "uuid.uuid4()": lambda: uuid.uuid4(),
    "secrets.token_hex()": lambda: secrets.token_hex(),
    "secrets.randbelow(6)": lambda: secrets.randbelow(6),
    "os.urandom(1)": lambda: os.urandom(1),
    "os.getpid()": lambda: os.getpid(),
    "os.getenv('HOME')": lambda: os.getenv("HOME"),
    "os.environ['PATH']": lambda: os.environ["PATH"],
    "os.listdir('/')": lambda: os.listdir("/"),
    "os.cpu_count()": lambda: os.cpu_count(),
    "open('/dev/null')": lambda: open("/dev/null").close(),
    "Path('/').stat()": lambda: Path("/").stat(),
    "tempfile.gettempdir()": lambda: tempfile.gettempdir(),
    "subprocess.run('true')": lambda: subprocess.run("true", check=False),
    "socket.gethostname()": lambda: socket.gethostname(),
    "socket.socket()": lambda: socket.socket().close(),
    "urlopen('http://127.0.0.1:9')": lambda: urllib.request.urlopen("http://127.0.0.1:9", timeout=1),
    "threading.Thread().start()": lambda: threading.Thread(target=int).start(),
}


def try_each() -> dict[str, str]:
    """Each call with "refused", "ran", or the other error that it raised."""
    outcome = {}
    for name, call in NONDETERMINISTIC.items():
        try:
            call()
            outcome[name] = "ran"
        except RestrictedWorkflowAccessError as error:
            outcome[name] = f"refused: {error.qualified_name}"
        except Exception as error:
            outcome[name] = f"ran: {type(error).__name__}"
    return outcome


@workflow.defn
class Forbidden:
    @workflow.run
    async def run(self) -> dict[str, str]:
        return try_each()


@workflow.defn(sandboxed=False)
class Unsandboxed:
    @workflow.run
    async def run(self) -> dict[str, str]:
        return try_each()


@workflow.defn
class Busy:
    @workflow.run
    async def run(self) -> None:
        while True:  # never gives control back
            pass


@workflow.defn
class Holes:
    """What the sandbox does not refuse: an unseeded Random, the order of a set, hash() and id()."""

    def __init__(self) -> None:
        self.values = {
            "random.Random()": str(random.Random().random()),
            "set order": str(list({f"element {n}" for n in range(20)})),
            "hash(str)": str(hash("temporal")),
            "id(object)": str(id(self)),
        }

    @workflow.run
    async def run(self) -> None:
        await workflow.wait_condition(lambda: False)

    @workflow.query
    def read(self) -> dict[str, str]:
        return self.values


# What a query gets while no worker is there.
NOBODY_ANSWERS = (RPCStatusCode.FAILED_PRECONDITION, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.CANCELLED)


async def asked(handle: Handle, query: str) -> Any:
    """A query's answer once a worker is there; without one the server, or the client, gives up after a while."""
    answers: list[Any] = []

    async def answered() -> bool:
        try:
            answers.append(await handle.query(query, rpc_timeout=timedelta(seconds=5)))
        except RPCError as error:
            if error.status not in NOBODY_ANSWERS:
                raise
        return bool(answers)

    await until(answered, f"{handle.id} answers {query}")
    return answers[0]


async def two_interpreters(lab: Lab) -> list[Evidence]:
    """What the code of a run computed at first, and when another interpreter replayed it."""
    queue = f"{lab.id}-two"
    raffles = [
        await lab.start(Raffle.run, ["Ann", "Bob", "Eve"], name=name, task_queue=queue) for name in ("one", "other")
    ]
    holes = await lab.start(Holes.run, name="holes", task_queue=queue)
    seen = []
    for fresh in (False, True):
        async with lab.worker_process([Raffle, Holes], task_queue=queue, fresh=fresh):
            seen.append([await asked(raffles[0], "draw"), await asked(raffles[1], "draw"), await asked(holes, "read")])
    (first, other, odd), (again, other_again, odd_again) = seen
    differing = [name for name in odd if odd[name] != odd_again[name]]
    return [
        works(
            "workflow.now, random and uuid4 give a replay in another process the values of the first run, "
            "and another run values of its own",
            first=first,
            other_than_that_in_the_replay=equal([name for name in first if again[name] != first[name]], []),
            other_in_the_replay_of_another_run=equal([name for name in other if other_again[name] != other[name]], []),
            shared_by_the_two_runs=equal([name for name in ("id", "at", "lot") if first[name] == other[name]], []),
        ),
        limit(
            "the sandbox has holes: some sources of nondeterminism pass it and differ on replay",
            that_differ=at_least(len(differing), 1),
            they_are=differing,
        ),
    ]


async def deadlock(lab: Lab) -> Evidence:
    queue = f"{lab.id}-busy"
    handle = await lab.start(Busy.run, name="busy", task_queue=queue)
    async with lab.worker_process([Busy], task_queue=queue):
        await until(lambda: failed_tasks(handle), "the workflow task failed", 30)
    message, status = (await failed_tasks(handle))[0], await status_of(handle)
    await handle.terminate()
    return holds(
        "a workflow that never yields is caught",
        workflow_task_failed=contains(message, "TMPRL1101"),
        status=equal(status, "RUNNING"),
    )


async def forbidden(lab: Lab) -> list[Evidence]:
    """Every nondeterministic call, with the sandbox and without."""
    async with lab.worker([Forbidden, Unsandboxed]):
        refused, ran = [
            (await ended(await lab.start(one.run, name=one.__name__))).result for one in (Forbidden, Unsandboxed)
        ]
    blocked = [name for name, outcome in refused.items() if outcome.startswith("refused")]
    return [
        holds(
            f"the sandbox refuses each of {len(NONDETERMINISTIC)} nondeterministic calls",
            refused_with_RestrictedWorkflowAccessError=blocked,
            how_many=len(blocked),
            not_refused=equal([name for name in NONDETERMINISTIC if name not in blocked], []),
        ),
        control(
            "without the sandbox the same calls pass",
            that_were_refused=equal([name for name, outcome in ran.items() if outcome.startswith("refused")], []),
        ),
    ]


@EX.item("EX-05", "Determinism constraints")
async def determinism(lab: Lab) -> AsyncIterator[Evidence]:
    """A run's values are compared between two interpreters, and every nondeterministic call is tried."""
    parts = (two_interpreters, deadlock, forbidden)
    async for evidence in side_by_side(*(part(lab) for part in parts)):
        yield evidence
    default = inspect.signature(Worker).parameters["workflow_runner"].default
    yield native(
        "the sandbox is on by default, and clock, randomness and ids come with the SDK",
        (Worker, "workflow_runner"),
        SandboxedWorkflowRunner,
        RestrictedWorkflowAccessError,
        workflow.now,
        workflow.random,
        workflow.uuid4,
        adds=[] if isinstance(default, SandboxedWorkflowRunner) else [f"default runner {default!r}"],
    )


# EX-06 Handling of violations ------------------------------------------------------------------------
# Code that no longer fits the history stops the workflow, it does not corrupt it: put the old code back and the
# run goes on. A query finds the runs that wait for that.


@activity.defn
async def pay(order: str) -> str:
    return f"{order} paid"


@activity.defn
async def reserve(order: str) -> str:
    return f"{order} reserved"


@activity.defn
async def ship(order: str) -> str:
    return f"{order} shipped"


async def do(step: Callable[[str], Awaitable[str]], order: str) -> str:
    return await workflow.execute_activity(step, order, start_to_close_timeout=timedelta(seconds=30))


class Approvable:
    """What the versions of the order below have in common: they wait for an approval."""

    def __init__(self) -> None:
        self.approved = False

    @workflow.signal
    def approve(self) -> None:
        self.approved = True


@workflow.defn(name="Order")
class Order(Approvable):
    @workflow.run
    async def run(self, order: str) -> list[str]:
        done = [await do(pay, order)]
        await workflow.wait_condition(lambda: self.approved)
        return [*done, await do(ship, order)]


@workflow.defn(name="Order")
class OrderChanged(Approvable):
    """A mistake: orders that have paid already were begun without the new step."""

    @workflow.run
    async def run(self, order: str) -> list[str]:
        done = [await do(reserve, order), await do(pay, order)]
        await workflow.wait_condition(lambda: self.approved)
        return [*done, await do(ship, order)]


STUCK = 'TemporalReportedProblems = "cause=WorkflowTaskFailedCauseNonDeterministicError"'


async def stuck_runs(client: Client) -> list[str]:
    """The ids of the runs whose code does not fit, a few failures after it was deployed."""
    return [run.id async for run in client.list_workflows(STUCK)]


def order_worker(client: Client, version: type) -> Worker:
    return Worker(client, task_queue="orders", workflows=[version], activities=[pay, reserve, ship])


async def first_event(handle: WorkflowHandle[Any, Any], kind: int) -> HistoryEvent:
    """Follow a run's history until it holds an event of this type."""
    async for event in handle.fetch_history_events(wait_new_event=True):
        if event.event_type == kind:
            return event
    raise RuntimeError(f"{handle.id} ended without it")


async def example_ex_06(client: Client) -> None:
    order = f"order-{uuid.uuid4()}"
    handle = await client.start_workflow(Order.run, order, id=order, task_queue="orders")
    async with order_worker(client, Order):
        await first_event(handle, EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED)
    await handle.signal(Order.approve)
    async with order_worker(client, OrderChanged):
        event = await first_event(handle, EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED)
        print(f"Under the changed code: {event.workflow_task_failed_event_attributes.failure.message}")
    async with order_worker(client, Order):
        print(f"Rolled back: {await handle.result()}")


# EX-06 put to the test -------------------------------------------------------------------------------

ORDER_STEPS = [pay, reserve, ship]


@workflow.defn(name="Order")
class OrderChangedBehind(Approvable):
    """A step is inserted behind everything that the history holds so far."""

    @workflow.run
    async def run(self, order: str) -> list[str]:
        done = [await do(pay, order)]
        await workflow.wait_condition(lambda: self.approved)
        return [*done, await do(reserve, order), await do(ship, order)]


def retried_after() -> timedelta:
    """A failed workflow task is tried again after the task timeout: 10 s by default, less here to save time."""
    return timedelta(seconds=min(10, 5 * slowness()))


@dataclass
class Paid:
    """A run of Order that was begun with the old code, and what its history was then."""

    handle: Handle
    history: Sequence[HistoryEvent]

    def worker(self, lab: Lab, version: type, **options: Any) -> Worker:
        """Whoever comes next, with this version of the code."""
        return lab.worker([version], ORDER_STEPS, task_queue=self.handle.id, **options)

    def steps(self, lab: Lab) -> list[str]:
        return names(lab.calls(self.handle.id))


async def begin_order(lab: Lab, name: str, server: Server | None = None) -> Paid:
    """Start Order, let it pay, and stop its worker: whoever comes next must replay it."""
    options: dict[str, Any] = {"task_queue": f"{lab.id}-{name}", "task_timeout": retried_after()}
    handle = await lab.start(Order.run, "order", name=name, server=server, **options)
    async with lab.worker([Order], ORDER_STEPS, server=server, task_queue=handle.id):
        await until(lambda: waits(handle, 1), "the order is paid and waits")
    return Paid(handle, (await handle.fetch_history()).events)


OLD_RESULT = ["order paid", "order shipped"]


async def break_and_roll_back(lab: Lab) -> list[Evidence]:
    order = await begin_order(lab, "broken")
    await order.handle.signal(Order.approve)
    async with order.worker(lab, OrderChanged):
        await until(lambda: failed_tasks(order.handle), "the workflow task failed", 30)
        message = (await failed_tasks(order.handle))[0]
        status, history = await status_of(order.handle), (await order.handle.fetch_history()).events
        ran = order.steps(lab)
    begun = time.monotonic()
    async with order.worker(lab, Order):
        how = await ended(order.handle)
    return [
        works(
            "changed code under a running workflow: NondeterminismError, the run stays open and its history whole",
            workflow_task_failed=contains(message, "TMPRL1100", "Nondeterminism"),
            status=equal(status, "RUNNING"),
            events_before=len(order.history),
            changed_events=equal([one.event_id for one in order.history if one not in history], []),
            activities_run=equal(ran, ["pay"]),
        ),
        holds(
            "after a rollback to the old code the same run finishes with the right result",
            result=equal(how.result, OLD_RESULT),
            activities_run=equal(order.steps(lab), ["pay", "ship"]),
            from_the_rollback_to_the_end=figure(time.monotonic() - begun, "s"),
            workflow_task_timeout=f"{retried_after().total_seconds():g} s instead of 10 s",
        ),
    ]


async def fail_at_once(lab: Lab) -> Evidence:
    order = await begin_order(lab, "failed")
    await order.handle.signal(Order.approve)
    async with order.worker(lab, OrderChanged, workflow_failure_exception_types=[workflow.NondeterminismError]):
        how = await ended(order.handle)
    return holds(
        "workflow_failure_exception_types=[NondeterminismError] makes the run fail instead of waiting",
        status=equal(how.status, "FAILED"),
        why=contains(how.why, "TMPRL1100"),
        activities_run=equal(order.steps(lab), ["pay"]),
    )


REPORTED = "visibility lists the run as a reported problem, and not a healthy one beside it"


# A setting that no user has: after so many failures in a row a run is a reported problem.
SOON_REPORTED = {"system.numConsecutiveWorkflowTaskProblemsToTriggerSearchAttribute": "2"}


@piece(holds(REPORTED))
async def reported_problem(lab: Lab) -> Evidence:
    """How an operator finds such runs."""
    async with lab.private_server(settings=SOON_REPORTED) as server:
        healthy, broken = await begin_order(lab, "healthy", server), await begin_order(lab, "stuck", server)
        async with healthy.worker(lab, Order, server=server), broken.worker(lab, OrderChanged, server=server):
            await healthy.handle.query("__stack_trace")  # it is replayed for that, and fits
            await broken.handle.signal(Order.approve)
            seconds = await until(lambda: stuck_runs(server.client), "a run is listed")
            found = await stuck_runs(server.client)
            open_runs = await listed(server.client, 'ExecutionStatus = "Running"')
        failed = await failed_tasks(healthy.handle)
    name = len(lab.id) + 1
    return holds(
        REPORTED,
        open_runs=equal(sorted(id[name:] for id in open_runs), ["healthy", "stuck"]),
        reported=equal([id[name:] for id in found], ["stuck"]),
        failed_tasks_of_the_healthy_one=equal(len(failed), 0),
        listed_after=figure(seconds, "s"),
        threshold="2 failures instead of the server's own",
    )


async def continued(lab: Lab, name: str, version: type) -> tuple[Ending, list[str], list[str]]:
    """Continue a paid order with this version. Returns how it ended, its steps, and its failed workflow tasks."""
    order = await begin_order(lab, name)
    await order.handle.signal(Order.approve)
    async with order.worker(lab, version):
        how = await ended(order.handle)
    return how, order.steps(lab), await failed_tasks(order.handle)


async def unchanged_code(lab: Lab) -> Evidence:
    how, steps, failed = await continued(lab, "unchanged", Order)
    return holds(
        "the same restart with unchanged code finishes without an error: it is not accused",
        result=equal(how.result, OLD_RESULT),
        activities_run=equal(steps, ["pay", "ship"]),
        failed_workflow_tasks=equal(len(failed), 0),
    )


async def inserted_behind(lab: Lab) -> Evidence:
    how, steps, failed = await continued(lab, "behind", OrderChangedBehind)
    return limit(
        "a step inserted behind the last recorded command is taken silently",
        status=equal(how.status, "COMPLETED"),
        activities_run=equal(steps, ["pay", "reserve", "ship"]),
        failed_workflow_tasks=equal(len(failed), 0),
    )


async def plain_order(journal: str, steps: Sequence[str]) -> None:
    """The control: a program that resumes from its journal by position. The first run waits to be killed."""
    done = len(notes(journal))
    for step in steps[done:]:
        note(journal, step)
        if done == 0:
            await asyncio.sleep(3600)


async def plain_journal(lab: Lab) -> Evidence:
    """The same change of code under a journal that nobody compares with it."""
    journal = lab.file("journal")
    async with lab.process(plain_order, journal, ["pay", "ship"]) as program:
        await until(lambda: notes(journal), "the plain order is paid")
        await program.kill()
    async with lab.process(plain_order, journal, ["reserve", "pay", "ship"]) as program:
        status = await program.wait()
    return control(
        "a plain program that resumes by position takes the changed code without a word, and pays twice",
        steps_done=equal(notes(journal), ["pay", "pay", "ship"]),
        ended_with=equal(status, 0),
    )


@EX.item("EX-06", "Handling of violations")
async def violations(lab: Lab) -> AsyncIterator[Evidence]:
    """Orders are begun with one version of the code and continued with another."""
    parts = (break_and_roll_back, fail_at_once, reported_problem, unchanged_code, inserted_behind, plain_journal)
    async for evidence in side_by_side(*(part(lab) for part in parts)):
        yield evidence
    yield native(
        "detection belongs to the SDK and needs no setting, and a query finds the runs that wait",
        workflow.NondeterminismError,
        Worker,
        Client.list_workflows,
    )
    yield native(
        "failing at once instead of waiting is a setting of the worker",
        (Worker, "workflow_failure_exception_types"),
    )


# EX-07 Replay fidelity -------------------------------------------------------------------------------
# A stored history is a test case: replaying it against today's code tells whether yesterday's runs would survive
# a deployment.


@dataclass
class Ticket:
    id: str
    seat: int
    at: datetime


@activity.defn
async def book(what: str) -> str:
    return f"{what} booked"


@activity.defn
async def bill(cents: int) -> int:
    return cents


@workflow.defn(name="Trip")
class Trip:
    @workflow.run
    async def run(self, traveller: str) -> Ticket:
        await workflow.execute_activity(book, "flight", start_to_close_timeout=timedelta(seconds=30))
        await workflow.sleep(timedelta(seconds=1))
        ticket = self.draw()
        await workflow.execute_activity(bill, 4200, start_to_close_timeout=timedelta(seconds=30))
        return ticket

    def draw(self) -> Ticket:
        return Ticket(str(workflow.uuid4()), workflow.random().randrange(10**9), workflow.now())


@workflow.defn(name="Trip")
class TripBilledFirst:
    """The next version, with its steps in another order."""

    @workflow.run
    async def run(self, traveller: str) -> None:
        await workflow.execute_activity(bill, 4200, start_to_close_timeout=timedelta(seconds=30))
        await workflow.sleep(timedelta(seconds=1))
        await workflow.execute_activity(book, "flight", start_to_close_timeout=timedelta(seconds=30))


async def misfits(replayer: Replayer, histories: Iterable[WorkflowHistory]) -> dict[str, Exception]:
    """The runs that the replayer's code would break, and why: a test for it fails unless there are none."""
    found = {}
    for history in histories:
        replayed = await replayer.replay_workflow(history, raise_on_replay_failure=False)
        if replayed.replay_failure:
            found[history.workflow_id] = replayed.replay_failure
    return found


async def example_ex_07(client: Client) -> None:
    async with Worker(client, task_queue="trips", workflows=[Trip], activities=[book, bill]):
        handle = await client.start_workflow(Trip.run, "Ann", id=f"trip-{uuid.uuid4()}", task_queue="trips")
        await handle.result()
    histories = [await handle.fetch_history()]  # in a test: files that `temporal workflow show --output json` wrote
    for version in (Trip, TripBilledFirst):
        print(f"{version.__name__}: {await misfits(Replayer(workflows=[version]), histories) or 'fits'}")


# EX-07 put to the test -------------------------------------------------------------------------------


@workflow.defn(name="Trip")
class NotedTrip(Trip):
    """Notes what it has drawn each time its code is run, in the file that its traveller is named after."""

    @workflow.run
    async def run(self, traveller: str) -> Ticket:
        ticket = await super().run(traveller)
        note(traveller, str(ticket))
        return ticket


@workflow.defn(name="Trip", sandboxed=False)
class RawTrip(NotedTrip):
    """The control: draws by raw randomness and the raw clock, which only works without the sandbox."""

    @workflow.run
    async def run(self, traveller: str) -> Ticket:
        return await super().run(traveller)

    def draw(self) -> Ticket:
        return Ticket(str(uuid.uuid4()), random.randrange(10**9), datetime.now(UTC))


async def booked(what: str = "flight") -> None:
    await workflow.execute_activity(book, what, start_to_close_timeout=PATIENT)


async def slept(seconds: float = 1) -> None:
    await workflow.sleep(seconds)


async def billed(name: str = "bill", **options: Any) -> None:
    await workflow.execute_activity(name, 4200, **{"start_to_close_timeout": PATIENT, **options})


async def billed_locally() -> None:
    await workflow.execute_local_activity(bill, 4200, start_to_close_timeout=PATIENT)


async def billed_by_a_child() -> None:
    await workflow.execute_child_workflow("bill", 4200)


Version = Sequence[Callable[[], Awaitable[None]]]
UNCHANGED: Version = (booked, slept, billed)
BREAKING: dict[str, Version] = {
    "order swapped": (billed, slept, booked),
    "timer removed": (booked, billed),
    "activity added in front": (partial(booked, "hotel"), booked, slept, billed),
    "activity removed": (booked, slept),
    "activity type changed": (booked, slept, partial(billed, "bill again")),
    "activity id changed": (booked, slept, partial(billed, activity_id="the bill")),
    "local instead of regular activity": (booked, slept, billed_locally),
    "child instead of activity": (booked, slept, billed_by_a_child),
}
UNSEEN: dict[str, Version] = {
    "argument of an activity": (partial(booked, "first class"), slept, billed),
    "length of a timer": (booked, partial(slept, 3600), billed),
    "timeout of an activity": (booked, slept, partial(billed, start_to_close_timeout=timedelta(hours=1))),
    "retry policy of an activity": (booked, slept, partial(billed, retry_policy=RetryPolicy(maximum_attempts=1))),
}


@workflow.defn(name="Trip", sandboxed=False)
class AnyTrip:
    """Trip in a version that is given from outside, which is why it is not in the sandbox."""

    steps = UNCHANGED

    @workflow.run
    async def run(self, traveller: str) -> None:
        for step in self.steps:
            await step()


@workflow.defn
class LongTrip:
    """Thirty rounds of ten activities: more than 1,000 events."""

    @workflow.run
    async def run(self) -> int:
        total = 0
        for _ in range(30):
            results = [workflow.execute_activity(bill, n, start_to_close_timeout=PATIENT) for n in range(10)]
            total += sum(await asyncio.gather(*results))
        return total


async def replay(version: type, history: WorkflowHistory) -> str:
    """Replay a history against a version of the code. Returns the type of what is wrong, or "fits"."""
    replayer = Replayer(workflows=[version], workflow_runner=sandbox())
    async with asyncio.timeout(bound()):
        replayed = await replayer.replay_workflow(history, raise_on_replay_failure=False)
    return type(replayed.replay_failure).__name__ if replayed.replay_failure else "fits"


async def recorded(lab: Lab, version: Any, name: str, *arguments: Any) -> WorkflowHistory:
    """Run a workflow to its end and return its history."""
    queue = f"{lab.id}-{name}"
    async with lab.worker([version], [book, bill], task_queue=queue):
        handle = await lab.start(version.run, *arguments, name=name, task_queue=queue)
        await handle.result()
    return await handle.fetch_history()


async def drawings(lab: Lab, version: Any) -> tuple[str, list[str]]:
    """What comes of replaying a finished run, and what its code has drawn at first and in the replay."""
    path = lab.file(version.__name__)
    answer = await replay(version, await recorded(lab, version, version.__name__, path))
    return answer, notes(path)


async def drawn_again(lab: Lab) -> Evidence:
    answer, (first, *again) = await drawings(lab, NotedTrip)
    return works(
        "a finished history replays clean, and its decisions come out as recorded",
        replay=equal(answer, "fits"),
        drawn=first,
        times_drawn_again=equal(len(again), 1),
        other_than_at_first=equal([one for one in again if one != first], []),
    )


async def drawn_raw(lab: Lab) -> Evidence:
    _, (first, *again) = await drawings(lab, RawTrip)
    return control(
        "raw random and clock, unsandboxed, come out differently on replay",
        drawn=first,
        times_drawn_again=equal(len(again), 1),
        the_same_as_at_first=equal([one for one in again if one == first], []),
    )


async def every_change(lab: Lab) -> list[Evidence]:
    """One history against every changed version."""
    history = await recorded(lab, Trip, "original", "Ann")

    async def tried(version: Version) -> str:
        AnyTrip.steps = version
        return await replay(AnyTrip, history)

    found = {name: await tried(version) for name, version in BREAKING.items()}
    unseen = {name: await tried(version) for name, version in UNSEEN.items()}
    return [
        holds(
            f"each of {len(BREAKING)} kinds of breaking change is found, and the unchanged code is not accused",
            unchanged=equal(await tried(UNCHANGED), "fits"),
            **{name: equal(answer, "NondeterminismError") for name, answer in found.items()},
        ),
        *(limit(f"another {name} passes unseen", replay=equal(answer, "fits")) for name, answer in unseen.items()),
    ]


async def long_history(lab: Lab) -> Evidence:
    long = await recorded(lab, LongTrip, "long")
    begun = time.monotonic()
    answer = await replay(LongTrip, long)
    return holds(
        "a long history replays",
        events=at_least(len(long.events), 1000),
        replay=equal(answer, "fits"),
        replayed_in=figure(time.monotonic() - begun, "s"),
    )


@EX.item("EX-07", "Replay fidelity")
async def replay_fidelity(lab: Lab) -> AsyncIterator[Evidence]:
    """Recorded histories are replayed against the same code and against changed code."""
    parts = (drawn_again, drawn_raw, every_change, long_history)
    async for evidence in side_by_side(*(part(lab) for part in parts)):
        yield evidence
    yield native(
        "replaying is part of the SDK",
        Replayer,
        Replayer.replay_workflow,
        workflow.NondeterminismError,
        WorkflowHandle.fetch_history,
    )


if __name__ == "__main__":
    run(EX)
