"""CP: compensation and recovery - undoing what was done, repeating only what failed, and stepping in by hand.

Retries repair what repairs itself. This category begins where they end: a step that is refused for good,
a bug that has spoilt a hundred runs, a delivery that nobody will ever accept. The four items ask what can
be undone, what can be repeated without repeating everything, who may step in, and where the hopeless
cases are kept until somebody has mended their cause.
"""

from common import (
    Category,
    Evidence,
    Fact,
    contains,
    control,
    equal,
    figure,
    holds,
    lacks,
    limit,
    native,
    piece,
    side_by_side,
    slowness,
    works,
)
from lab import (
    Books,
    Ending,
    Fault,
    Lab,
    Server,
    TakeOver,
    count_events,
    ended,
    fail,
    failed_tasks,
    hold,
    name_of,
    never_answer,
    note,
    notes,
    open_gate,
    outline,
    refuse,
    run,
    status_of,
    until,
    withhold,
)

import asyncio
import contextlib
import inspect
import json
import re
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol, Self

import temporalio.client
import temporalio.worker
from google.protobuf.empty_pb2 import Empty
from temporalio import activity, workflow
from temporalio.api.batch.v1 import BatchOperationReset
from temporalio.api.common.v1 import ResetOptions, WorkflowExecution
from temporalio.api.enums.v1 import PendingActivityState
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest, StartBatchOperationRequest
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError
from temporalio.service import RPCError, RPCStatusCode, WorkflowService
from temporalio.worker import Worker
from temporalio.workflow import ActivityCancellationType

CP = Category(
    "CP",
    "Compensation and recovery",
    "What is undone, what is repeated, and who can step in when retries no longer help?",
)

# Where nothing is to be given up, a slow machine gets all the time it needs.
PATIENT = timedelta(seconds=30)
# An attempt that a kill has cut off, or that never answers, is given up after this long.
SOON = timedelta(seconds=3)
SECOND = timedelta(seconds=1)
QUICKLY = RetryPolicy(initial_interval=timedelta(milliseconds=100), backoff_coefficient=1)

COMPLETED, FAILED, CANCELED = (
    WorkflowExecutionStatus.COMPLETED,
    WorkflowExecutionStatus.FAILED,
    WorkflowExecutionStatus.CANCELED,
)
RUNNING, TERMINATED = WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.TERMINATED


def soon() -> timedelta:
    """An attempt that a kill has cut off, or that never answers, is given up after this long."""
    return timedelta(seconds=3 * slowness())


# A cancellation or a pause reaches a running activity by its heartbeats: do not hold these back for long.
OFTEN = timedelta(milliseconds=200)


async def said(handle: WorkflowHandle[Any, Any]) -> str:
    """Wait until a run is closed. Returns its result, or what it ended with and why, in words."""
    how = await ended(handle)
    return str(how.result) if how.status == "COMPLETED" else how.why


async def pending_activity(handle: WorkflowHandle[Any, Any]) -> PendingActivityInfo:
    """What the server tells of a run's open activity, which is not in the history; empty when none is open."""
    pending = (await handle.describe()).raw_description.pending_activities
    return pending[0] if pending else PendingActivityInfo()


async def events_of(handle: WorkflowHandle[Any, Any]) -> list[HistoryEvent]:
    return list((await handle.fetch_history()).events)


async def kinds_of(handle: WorkflowHandle[Any, Any]) -> list[str]:
    return [str(event.WhichOneof("attributes")) for event in await events_of(handle)]


def offered(words: str, *places: ModuleType | type) -> list[str]:
    """The names in the given modules and classes of the SDK that one of the words (a pattern) is part of."""
    return [f"{place.__name__}.{name}" for place in places for name in dir(place) if re.search(words, name, re.I)]


# How the server says "later": it works off one batch of a namespace at a time, and one change of a run.
BUSY = ("concurrent batch", "Workflow is busy")


async def by_cli(lab: Lab, *arguments: str, server: Server | None = None) -> None:
    """Run a `temporal` command, again while the server is busy. Raises when it fails."""
    was_busy = False

    async def done() -> bool:
        nonlocal was_busy
        command = await lab.cli(*arguments, server=server)
        if command.code == 0:
            return True
        if any(reason in command.err for reason in BUSY):
            was_busy = True
            return False
        if was_busy:  # It said "later" and did it all the same, so that now nothing is left to be done.
            return True
        raise RuntimeError(f"temporal {' '.join(arguments)}: {command.err or command.out}")

    await until(done, f"the server accepted temporal {' '.join(arguments[:2])}")


# CP-01 Compensation, saga ----------------------------------------------------------------------------
# What was begun is undone, last first. The undoing must survive what ended the work: failures, kills, and a
# cancellation that arrives while it runs. And no booking that comes late may outrun its own undoing.


class Saga:
    """Undoes, last first, what was registered, when the block is left by an error or a cancellation."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, Callable[[], Awaitable[object]]]] = []

    def register(self, name: str, undo: Callable[[], Awaitable[object]]) -> None:
        self.steps.append((name, undo))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        # continue_as_new leaves the block by an exception, too, but the work goes on. What the next run shall be
        # able to undo has to be handed to it.
        if error is None or isinstance(error, workflow.ContinueAsNewError):
            return
        undoing = asyncio.create_task(self.undo_all())
        while not undoing.done():  # a cancellation ends the waiting, so wait again: it must not end the undoing
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(undoing)
        if left := undoing.result():
            raise ApplicationError(f"not undone: {', '.join(left)}", type="NotUndone", non_retryable=True) from error

    async def undo_all(self) -> list[str]:
        """One that fails for good does not stop the others. Returns what is left, by name and reason."""
        left = []
        for name, undo in reversed(self.steps):
            try:
                await undo()
            except ActivityError as error:
                left.append(f"{name} ({error.cause})")
        return left


@dataclass
class Reservation:
    service: str
    key: str  # the same in every attempt, so that neither booking nor undoing counts twice


@dataclass
class Trip:
    number: str  # of the order: keys are made of it, since a workflow's and an activity's ids may come again
    services: list[str]


class Provider(Protocol):
    """Whoever is booked with. What is asked twice under one key counts once."""

    def book(self, key: str, service: str) -> None: ...

    def reverse(self, key: str) -> None:
        """Undo what was booked under the key, and refuse what is still to come under it."""


class Travel:
    """Activities are methods, so that what they work with is handed in and need not travel through histories."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider

    @activity.defn
    def book(self, order: Reservation) -> None:
        self.provider.book(order.key, order.service)

    @activity.defn
    def undo(self, order: Reservation) -> None:
        """Undoing what was never booked is no error: whether it was is not always known."""
        self.provider.reverse(order.key)


async def book(order: Reservation) -> None:
    await workflow.execute_activity_method(
        Travel.book,
        order,
        summary=order.service,
        start_to_close_timeout=timedelta(seconds=30),
        # A booking that is cancelled is undone only when its attempt has ended.
        cancellation_type=ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        # One attempt, and then the others are undone. Where a second one is worth while, the key bears it.
        retry_policy=RetryPolicy(maximum_attempts=1),
    )


async def undo(order: Reservation) -> None:
    # No limit to the attempts: giving up here would leave a bill that nobody knows of.
    await workflow.execute_activity_method(
        Travel.undo, order, summary=order.service, start_to_close_timeout=timedelta(seconds=30)
    )


@workflow.defn
class TravelBooking:
    @workflow.run
    async def run(self, trip: Trip) -> str:
        async with Saga() as saga:
            for service in trip.services:
                order = Reservation(service, key=f"{trip.number}/{service}")
                # Before the step, not after it: a step whose outcome stays unknown is then undone too.
                saga.register(service, partial(undo, order))
                await book(order)
        return "booked"


class Agency:
    """A provider for the example: it keeps its bookings in memory, and has no cars left."""

    def __init__(self) -> None:
        self.booked: dict[str, str] = {}

    def book(self, key: str, service: str) -> None:
        if service == "car":
            raise ApplicationError("no car left", non_retryable=True)
        self.booked[key] = service

    def reverse(self, key: str) -> None:
        self.booked[key] = "undone"


async def example_cp_01(client: Client) -> None:
    agency = Agency()
    travel = Travel(agency)
    async with Worker(
        client,
        task_queue="travel",
        workflows=[TravelBooking],
        activities=[travel.book, travel.undo],
        activity_executor=ThreadPoolExecutor(10),
    ):
        trip = Trip(str(uuid.uuid4()), ["flight", "hotel", "car"])
        try:
            await client.execute_workflow(TravelBooking.run, trip, id=f"trip-{trip.number}", task_queue="travel")
        except WorkflowFailureError as failure:
            print(f"The trip failed: {failure.cause}. The agency's books: {agency.booked}")


# CP-01 put to the test -------------------------------------------------------------------------------

PRICES = {"flight": 300, "hotel": 200, "car": 100}
SERVICES = list(PRICES)
ALL, BACK = ["book flight", "book hotel", "book car"], ["undo car", "undo hotel", "undo flight"]
BOOKED, UNDONE, ALL_UNDONE = [300, 200, 100], [300, 200, -200, -300], [300, 200, 100, -100, -200, -300]


class Desk:
    """A provider whose books are a file outside Temporal, and outlive the worker."""

    def __init__(self, books: Books) -> None:
        self.books = books

    def book(self, key: str, service: str) -> None:
        if not self.books.book(key, PRICES[service]):
            raise ApplicationError(f"{key} was undone before it was booked", non_retryable=True)

    def reverse(self, key: str) -> None:
        self.books.reverse(key)


class Forgetful(Desk):
    """The control: a provider that does not remember what was undone before it was booked."""

    def book(self, key: str, service: str) -> None:
        self.books.enter(key, PRICES[service])


@workflow.defn
class Variant:
    """The controls: the same booking with one thing left out."""

    @workflow.run
    async def run(self, trip: Trip, without: str) -> str:
        saga = Saga()
        try:
            for service in trip.services:
                order = Reservation(service, key=f"{trip.number}/{service}")
                register = partial(saga.register, service, partial(undo, order))
                if without != "registering before":
                    register()
                await book(order)
                if without == "registering before":
                    register()
        except (ActivityError, asyncio.CancelledError):
            if without == "compensation":
                raise
            undoing = saga.undo_all()
            # shield() alone keeps the undoing running, but nobody waits for it: the workflow ends first.
            await (asyncio.shield(undoing) if without == "waiting" else undoing)
            raise
        return "booked"


@workflow.defn
class Leg:
    """A booking in two runs: the second one books the rest."""

    @workflow.run
    async def run(self, trip: Trip) -> str:
        async with Saga() as saga:
            order = Reservation(trip.services[0], key=f"{trip.number}/{trip.services[0]}")
            saga.register(order.service, partial(undo, order))
            await book(order)
            if trip.services[1:]:
                workflow.continue_as_new(Trip(trip.number, trip.services[1:]))
        return "booked"


@dataclass(frozen=True)
class Case:
    """A booking, what is done to it, and what must come of it."""

    kind: Callable[..., Evidence]
    claim: str
    calls: Sequence[str]
    books: Sequence[int]
    status: str = "FAILED"
    why: str = ""
    faults: Sequence[Fault] = ()
    run: Any = TravelBooking.run
    services: list[str] = field(default_factory=lambda: SERVICES)
    without: str = ""  # what the control leaves out
    cancel_at: Sequence[str] = ()  # the calls during which a cancellation is sent
    gives_up: bool = False  # an attempt to book is given up after soon(), instead of half a minute
    late: str = ""  # what is held goes on only when the run has ended, and ends like this
    forgetful: bool = False  # the provider is
    missing: int = 0  # of the control: what is not in the books, whatever else is


GATE = "a gate of the case's own"
no_car = refuse("book", service="car", why="no car left")
slow_hotel = hold("undo", GATE, service="hotel")
stuck_hotel = hold("undo", "", service="hotel")
stuck_car = never_answer("book", service="car")
silent_car = never_answer("book", service="car", silent=True)
late_car = hold("book", GATE, service="car", silent=True)

CASES = {
    "well": Case(works, "when all goes well nothing is undone", ALL, BOOKED, "COMPLETED"),
    "third": Case(
        works,
        "the third step is refused: what was begun is undone in reverse order, and the run says why it failed",
        ALL + BACK, UNDONE, why="no car left", faults=[no_car],
    ),
    "first": Case(
        holds, "the first step is refused: nothing else is begun, and nothing is paid",
        ["book flight", "undo flight"], [], why="no flight", faults=[refuse("book", service="flight", why="no flight")],
    ),
    "second": Case(
        holds, "the second step is refused: only what was begun is undone",
        [*ALL[:2], *BACK[1:]], [300, -300], why="no hotel", faults=[refuse("book", service="hotel", why="no hotel")],
    ),
    "for good": Case(
        holds,
        "an undoing that fails for good does not stop the others: the failure names the step, and what began it all",
        ALL + BACK, [300, 200, -300], why="not undone: hotel (the hotel is bankrupt) <- no car left",
        faults=[no_car, refuse("undo", service="hotel", why="the hotel is bankrupt")],
    ),
    "unanswered": Case(
        holds, "a step that timed out, though it had its effect, is undone: its undoing was registered before it",
        ALL + BACK, ALL_UNDONE, why="timeout", faults=[silent_car], gives_up=True,
    ),
    "late": Case(
        holds, "a booking that comes after its own undoing is refused by the provider",
        ALL + BACK, UNDONE, why="timeout", faults=[late_car], gives_up=True, late="failed book car",
    ),
    "cancelled": Case(
        holds, "cancelled in the third step: everything is undone, and the run is CANCELED",
        ALL + BACK, ALL_UNDONE, "CANCELED", faults=[stuck_car], cancel_at=["book car"],
    ),
    "twice": Case(
        holds, "cancelled again while it is undone: the server drops the second request, and everything is undone",
        ALL + BACK, ALL_UNDONE, "CANCELED", faults=[stuck_car, slow_hotel], cancel_at=["book car", "undo hotel"],
    ),
    "shielded": Case(
        holds, "a booking that failed, cancelled while it is undone: the undoing is finished",
        ALL + BACK, UNDONE, faults=[no_car, slow_hotel], cancel_at=["undo hotel"],
    ),
    "continued": Case(
        holds, "continue-as-new inside the block undoes nothing: the next run goes on",
        ALL[:2], [300, 200], "COMPLETED", run=Leg.run, services=SERVICES[:2],
    ),
    "nothing": Case(
        control, "without compensation the failed booking leaves the books off balance",
        ALL, [300, 200], faults=[no_car], without="compensation",
    ),
    "after": Case(
        control, "registered after the step, the undoing of a step that timed out is missing",
        ALL + BACK[1:], [300, 200, 100, -200, -300], faults=[silent_car], gives_up=True, without="registering before",
    ),
    "bare": Case(
        control, "awaited without a shield, the undoing that is under way is lost when a cancellation comes",
        [], [], faults=[no_car, stuck_hotel], without="shield", cancel_at=["undo hotel"], missing=-200,
    ),
    "plain": Case(
        control, "with a plain asyncio.shield() nobody waits for the undoing, and its rest is lost",
        [*ALL, *BACK[:2]], [300, 200], "CANCELED", faults=[no_car, stuck_hotel], without="waiting",
        cancel_at=["undo hotel"],
    ),
    "forgetful": Case(
        control, "with a provider that does not remember, a booking that comes late stays and is paid",
        ALL + BACK, [300, 200, -200, -300, 100], faults=[late_car], gives_up=True, late="ended book car",
        forgetful=True,
    ),
}  # fmt: skip

# The faults of the trials that are more than a case.
FAULTS = {name: case.faults for name, case in CASES.items()} | {
    "retried": [no_car, fail("undo", 2, service="hotel", why="the hotel's line is busy"), slow_hotel],
    "terminated": [stuck_car],
}


def called(lab: Lab, workflow: str) -> list[str]:
    return [f"{call.activity} {call.argument['service']}" for call in lab.calls(workflow)]


class Bench:
    """Where the cases are tried: workers that differ in when they give an attempt up, and in their provider."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.books = lab, Books(lab.file("books.sqlite"))
        self.travel, self.forgetful = Travel(Desk(self.books)), Travel(Forgetful(self.books))

    def faults(self) -> list[Fault]:
        """Those of every trial, each for its own workflow and with its own gate."""
        return [
            replace(fault, gate=fault.gate and self.lab.gate(name)).of(self.id_of(name))
            for name, faults in FAULTS.items()
            for fault in faults
        ]

    def id_of(self, name: str) -> str:
        return f"{self.lab.id}-{name.replace(' ', '-')}"

    def queue_of(self, case: Case) -> str:
        return f"{self.lab.id}{'-gives-up' * case.gives_up}{'-forgetful' * case.forgetful}"

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        def worker(case: Case) -> Worker:
            travel = self.forgetful if case.forgetful else self.travel
            return self.lab.worker(
                [TravelBooking, Variant, Leg],
                [travel.book, travel.undo],
                task_queue=self.queue_of(case),
                faults=self.faults(),
                shortened={"book": {"start_to_close_timeout": soon()}} if case.gives_up else None,
                max_heartbeat_throttle_interval=OFTEN,
            )

        async with worker(CASES["well"]), worker(CASES["unanswered"]), worker(CASES["forgetful"]):
            yield

    async def start(self, name: str) -> WorkflowHandle[Any, Any]:
        """Start a booking of everything, on the worker that most cases have."""
        return await self.lab.start(TravelBooking.run, Trip(self.id_of(name), SERVICES), id=self.id_of(name))

    def booked(self, name: str) -> list[int]:
        return self.books.amounts(f"{self.id_of(name)}/")

    async def try_case(self, name: str, case: Case) -> Evidence:
        """Start the booking, do to it what the case says, and compare calls, books and ending."""
        lab, id = self.lab, self.id_of(name)
        arguments = [Trip(id, case.services), *([case.without] if case.without else [])]
        run = Variant.run if case.without else case.run
        handle = await lab.start(run, *arguments, id=id, task_queue=self.queue_of(case))
        try:
            for call in case.cancel_at:
                await until(lambda: call in called(lab, id), f"{call} has begun")  # noqa: B023
                await handle.cancel()
                await until(lambda: told_of_cancel(handle), "the workflow knows that it is cancelled")
            if not case.late:
                open_gate(lab.gate(name))
            how = await ended(handle)
        finally:
            open_gate(lab.gate(name))
        # What was held ends before the books are read; what never answers does not end at all.
        left = len(called(lab, id)) - len([fault for fault in case.faults if fault.does == "never answer"])
        await until(lambda: len(returned(lab, id)) >= left, "every call has ended")
        return case.kind(case.claim, **await self.facts(name, case, handle, how))

    async def facts(
        self, name: str, case: Case, handle: WorkflowHandle[Any, Any], how: Ending
    ) -> dict[str, Fact | list[str]]:
        calls, amounts, balance = called(self.lab, handle.id), self.booked(name), Fact(sum(self.booked(name)))
        if case.missing:
            return {"calls": calls, "books": lacks(amounts, case.missing), "balance": balance}
        facts = {"calls": equal(calls, case.calls), "books": equal(amounts, case.books), "balance": balance}
        facts |= {"status": equal(how.status, case.status)}
        if case.late:
            facts |= {"the last call": equal(returned(self.lab, handle.id)[-1], case.late)}
        if case.cancel_at:
            asked = outline(await handle.fetch_history()).count("WorkflowExecutionCancelRequested")
            facts |= {"cancellations sent": Fact(len(case.cancel_at)), "in the history": equal(asked, 1)}
        return facts | ({"why": contains(how.why, case.why)} if case.why else {})


def returned(lab: Lab, workflow: str) -> list[str]:
    """The calls that have ended, and how, in this order."""
    over = sorted([*lab.calls(workflow, "ended"), *lab.calls(workflow, "failed")], key=lambda call: call.at)
    return [f"{call.what} {call.activity} {call.argument['service']}" for call in over]


async def told_of_cancel(handle: WorkflowHandle[Any, Any]) -> bool:
    """Whether the workflow has completed the task that brought it the cancellation."""
    _, asked, after = outline(await handle.fetch_history(), without="").partition("WorkflowExecutionCancelRequested")
    return bool(asked) and "WorkflowTaskCompleted" in after


async def undoing_fails(bench: Bench) -> Evidence:
    """The hotel cannot be reached twice, and the third attempt takes long. Somebody looks meanwhile."""
    handle = await bench.start("retried")
    try:
        pending = await in_mid_air(handle)
    finally:
        open_gate(bench.lab.gate("retried"))
    await ended(handle)
    return holds(
        "an undoing that fails is retried until it succeeds, and only then comes the next; describe tells of it "
        "in mid-air",
        calls=equal(called(bench.lab, handle.id), [*ALL, "undo car", *["undo hotel"] * 3, "undo flight"]),
        books=equal(bench.booked("retried"), UNDONE),
        pending=equal(pending.activity_type.name, "undo"),
        attempt=equal(pending.attempt, 3),
        last_failure=equal(pending.last_failure.message, "the hotel's line is busy"),
    )


async def in_mid_air(handle: WorkflowHandle[Any, Any]) -> PendingActivityInfo:
    """What describe tells when the third attempt is under way; nothing where the run ends without one."""
    pending = PendingActivityInfo()

    async def seen() -> bool:
        nonlocal pending
        pending = await pending_activity(handle)
        return pending.attempt >= 3 or await status_of(handle) != RUNNING

    await until(seen, "the undoing is at its third attempt, or the run has ended")
    return pending


async def killed_while_undoing(lab: Lab) -> Evidence:
    """The worker dies after undoing the hotel and before it could say so. The next one undoes it again."""
    quick, default = await asyncio.gather(*(take_over_at_hotel(lab, sticky) for sticky in (1, 10)))
    (seen, books), (usual, usual_books) = quick, default
    return holds(
        "worker killed in the middle of undoing: a new one finishes it; the call cut off is repeated, and counts once",
        calls=equal(called(lab, seen.handle.id)[:6], [*ALL, "undo car", "undo hotel", "undo hotel"]),
        last_call=equal(called(lab, seen.handle.id)[-1], "undo flight"),
        books=equal([books.amounts(), usual_books.amounts()], [UNDONE, UNDONE]),
        ended=equal([seen.ending.status, usual.ending.status], ["FAILED", "FAILED"]),
        from_kill_to_end=figure(seen.seconds, "s"),
        with_the_default_sticky_timeout_of_10_s=figure(usual.seconds, "s"),
    )


async def take_over_at_hotel(lab: Lab, sticky: float) -> tuple[TakeOver, Books]:
    name = f"killed-{sticky:.0f}"
    books, gate = Books(lab.file(f"{name}.sqlite")), lab.gate(name)
    travel = Travel(Desk(books))
    seen = await lab.take_over(
        TravelBooking.run,
        Trip(lab.id + name, SERVICES),
        name=name,
        parts={
            "workflows": [TravelBooking],
            "activities": [travel.book, travel.undo],
            "faults": [no_car, withhold("undo", gate, service="hotel")],
            "shortened": {"undo": {"start_to_close_timeout": soon()}},
            "sticky_queue_schedule_to_start_timeout": timedelta(seconds=sticky),
        },
        point=lambda: len(books.amounts()) == 3,
        meanwhile=lambda: open_gate(gate),
    )
    return seen, books


async def terminated(bench: Bench) -> Evidence:
    handle = await bench.start("terminated")
    await until(lambda: len(bench.booked("terminated")) == 3, "the car is booked, but not confirmed")
    await handle.terminate(reason="out of patience")
    # Another booking is made meanwhile: time enough for an undoing of this one to show itself.
    next_one = await ended(await bench.start("successor"))
    return limit(
        "a terminated workflow compensates nothing",
        calls=lacks(called(bench.lab, handle.id), *BACK),
        balance=equal(sum(bench.booked("terminated")), sum(PRICES.values())),
        status=name_of(await status_of(handle)),
        a_booking_begun_after_it=next_one.status,
    )


def no_saga_construct() -> Evidence:
    found = offered("saga|compensat", workflow, temporalio.worker, temporalio.client, WorkflowService)
    lines = sum(bool(line.strip()) for line in inspect.getsource(Saga).splitlines())
    return limit(
        "there is no saga construct: the pattern is the user's, here a helper to copy",
        cap=3,
        names_with_saga_or_compensat_in_the_SDK_and_the_API=equal(found, []),
        lines_of_the_helper=lines,
    )


@CP.item("CP-01", "Compensation, saga")
async def compensation(lab: Lab) -> AsyncIterator[Evidence]:
    """Bookings fail, hang, are cancelled and killed; a provider outside Temporal keeps the books."""
    bench = Bench(lab)
    async with bench.open():
        others = (killed_while_undoing(lab), undoing_fails(bench), terminated(bench))
        async for evidence in side_by_side(*(bench.try_case(*case) for case in CASES.items()), *others):
            yield evidence
    yield no_saga_construct()


# CP-02 Partial restart -------------------------------------------------------------------------------
# A reset begins a new run that inherits the history up to a chosen point: what was done before it stays
# done, and only what came after it is repeated, with today's code.


@dataclass
class Job:
    ledger: str
    spare: str = ""  # a file: step `fails` fails until it is there
    fails: int = 0
    waits: int = 0  # step `waits` does not begin before two remarks have come


@dataclass
class Step:
    number: int
    job: Job


@activity.defn
async def take_step(step: Step) -> str:
    note(step.job.ledger, str(step.number))
    if step.number == step.job.fails and not Path(step.job.spare).exists():
        raise ApplicationError(f"step {step.number} needs a spare part", non_retryable=True)
    if step.number > 5:
        raise ApplicationError(f"there is no step {step.number}", non_retryable=True)
    return str(step.number)


class Steps:
    """What the two versions of the workflow below have in common: a journal of steps and remarks."""

    def __init__(self) -> None:
        self.journal: list[str] = []

    @workflow.signal
    def remark(self, text: str) -> None:
        self.journal.append(text)

    @workflow.query
    def written(self) -> list[str]:
        return self.journal

    async def take(self, numbers: list[int], job: Job) -> list[str]:
        for place, number in enumerate(numbers, 1):
            if place == job.waits:
                await workflow.wait_condition(lambda: {"a", "b"} <= set(self.journal))
            done = await workflow.execute_activity(take_step, Step(number, job), start_to_close_timeout=PATIENT)
            self.journal.append(done)
        return self.journal


@workflow.defn(name="FiveSteps")
class FiveSteps(Steps):
    @workflow.run
    async def run(self, job: Job) -> list[str]:
        return await self.take([1, 2, 3, 4, 5], job)


@workflow.defn(name="FiveSteps")
class FiveStepsWithABug(Steps):
    @workflow.run
    async def run(self, job: Job) -> list[str]:
        return await self.take([1, 2, 3, 40, 5], job)


async def task_before(handle: WorkflowHandle[Any, Any], step: int) -> int:
    """The event id of the workflow task that scheduled a step: the point to reset to, to take it again."""
    scheduled = [
        event.activity_task_scheduled_event_attributes.workflow_task_completed_event_id
        for event in await events_of(handle)
        if event.HasField("activity_task_scheduled_event_attributes")
    ]
    return scheduled[step - 1]


async def reset(
    client: Client, handle: WorkflowHandle[Any, Any], event_id: int, reason: str
) -> WorkflowHandle[Any, Any]:
    """Begin a new run at a workflow task of an old one, by the server's API."""
    response = await client.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=handle.id, run_id=handle.first_execution_run_id or ""),
            workflow_task_finish_event_id=event_id,
            reason=reason,
            identity=client.identity,
            request_id=str(uuid.uuid4()),  # so that a request sent twice resets once
        ),
        retry=True,
    )
    return client.get_workflow_handle(handle.id, run_id=response.run_id)


async def start_job(lab: Lab, name: str, job: Job, task_queue: str = "") -> WorkflowHandle[Any, Any]:
    return await lab.client.start_workflow(
        FiveSteps.run, job, id=f"{lab.id}-{name}", task_queue=task_queue or lab.task_queue
    )


ALL_STEPS = ["1", "2", "3", "4", "5"]


async def reset_at_step_four(lab: Lab) -> tuple[Evidence, Evidence]:
    """The spare part comes: one run is reset to step 4, and another is started anew."""
    job = Job(lab.file("failed"), spare=lab.file("spare"), fails=4)
    anew = Job(lab.file("anew"), spare=job.spare, fails=4)
    handles = [await start_job(lab, "failed", job), await start_job(lab, "anew", anew)]
    why = [await said(handle) for handle in handles]
    before = [notes(job.ledger), notes(anew.ledger)]
    Path(job.spare).touch()
    begun = time.monotonic()
    point = await task_before(handles[0], 4)
    resumed = await reset(lab.client, handles[0], point, "the spare part came")
    result = await said(resumed)
    seconds = time.monotonic() - begun
    # All but the start of the run and the workflow task that the reset broke off.
    old, new = [(await events_of(handle))[1 : point - 2] for handle in (handles[0], resumed)]
    again = await said(await start_job(lab, "anew", anew))
    ran, ran_anew = notes(job.ledger)[4:], notes(anew.ledger)[4:]
    return works(
        "failed at step 4, reset there: steps 1 to 3 are not called again, and the run completes",
        "spare part" in why[0] and before[0] == ALL_STEPS[:4] and ran == ["4", "5"] and result == str(ALL_STEPS)
        and resumed.run_id != handles[0].first_execution_run_id and old == new and len(new) == point - 3,
        f"calls: {' '.join(before[0])} ({why[0]}), reset, {' '.join(ran)}; result {result} as a new run of the "
        f"same workflow id {seconds:.2f} s after the reset; events 2 to {point - 2} are those of the old run; "
        f"method of WorkflowHandle for it: {', '.join(offered('reset', WorkflowHandle)) or 'none, so raw API'}",
    ), control(
        "started anew instead, every call is made again",
        before[1] == ALL_STEPS[:4] and ran_anew == ALL_STEPS and again == str(ALL_STEPS),
        f"calls: {' '.join(before[1])}, start anew, {' '.join(ran_anew)}",
    )  # fmt: skip


async def signals_reapplied(lab: Lab) -> tuple[Evidence, Evidence]:
    """Two signals come after step 4, then step 5 fails; the run is reset to before step 4."""
    job = Job(lab.file("signals"), spare=lab.file("signals.spare"), fails=5, waits=5)
    handle = await start_job(lab, "signals", job)
    await until(lambda: journal_is(handle, ALL_STEPS[:4]), "four steps are taken")
    for text in ("a", "b"):
        await handle.signal(FiveSteps.remark, text)
    await said(handle)
    old: list[str] = await handle.query(FiveSteps.written)
    Path(job.spare).touch()
    resumed = await reset(lab.client, handle, await task_before(handle, 4), "the spare part came")
    await said(resumed)
    new: list[str] = await resumed.query(FiveSteps.written)
    told = f"journal before the reset: {' '.join(old)}; after it: {' '.join(new)}"
    return holds(
        "signals from after the reset point are not lost: each is there once, in the order they were sent",
        [entry for entry in new if entry in "ab"] == ["a", "b"] and sorted(new) == sorted([*ALL_STEPS, "a", "b"])
        and notes(job.ledger) == ["1", "2", "3", "4", "5", "4", "5"],
        f"{told}; calls: {' '.join(notes(job.ledger))}",
    ), limit(
        "reapplied signals come before the repeated steps, although they had come after them",
        old.index("a") > old.index("4") and new.index("a") < new.index("4"),
        told,
    )  # fmt: skip


async def journal_is(handle: WorkflowHandle[Any, Any], entries: list[str]) -> bool:
    written: list[str] = await handle.query(FiveSteps.written)
    return written == entries


async def bug_mended(lab: Lab) -> Evidence:
    """The workflow's code calls a step that does not exist. It is mended, and the run reset by the CLI."""
    ledger, queue = lab.file("bug"), f"{lab.id}-bug"
    handle = await start_job(lab, "bug", Job(ledger), queue)
    async with lab.worker([FiveStepsWithABug], [take_step], task_queue=queue):
        why = await said(handle)
    event = str(await task_before(handle, 4))
    async with lab.worker([FiveSteps], [take_step], task_queue=queue):
        await by_cli(
            lab, "workflow", "reset", "--workflow-id", handle.id, "--event-id", event, "--reason", "bug mended"
        )  # fmt: skip
        result = await said(lab.client.get_workflow_handle(handle.id))
    return holds(
        "with the bug in the workflow's code mended, a run that it spoilt is reset and completes",
        "no step 40" in why and result == str(ALL_STEPS)
        and notes(ledger) == ["1", "2", "3", "40", "4", "5"],
        f"calls: {' '.join(notes(ledger))} (40 by the bug: {why}); result {result}; "
        f"by: temporal workflow reset --event-id {event}",
    )  # fmt: skip


BATCH = 5


@piece(holds(f"{BATCH} runs spoilt by a bad build are reset by one command to where it took over, and complete"))
async def bad_deployment(lab: Lab) -> Evidence:
    """Step 4 of five runs falls into the hands of a bad build. One command takes all of them back to before it."""
    lab.needs("batch operations")
    queue = f"{lab.id}-batch"
    jobs = [Job(lab.file(f"batch-{n}"), waits=4) for n in range(BATCH)]
    handles = [await start_job(lab, f"batch-{n}", job, queue) for n, job in enumerate(jobs)]
    async with lab.worker([FiveSteps], [take_step], task_queue=queue, build_id="good"):
        for handle in handles:
            await until(lambda: journal_is(handle, ALL_STEPS[:3]), "three steps are taken")  # noqa: B023
    async with lab.worker([FiveStepsWithABug], [take_step], task_queue=queue, build_id="bad"):
        for handle in handles:
            for text in ("a", "b"):
                await handle.signal(FiveSteps.remark, text)
        spoilt = [await said(handle) for handle in handles]
    query = f'WorkflowId STARTS_WITH "{queue}" AND ExecutionStatus = "Failed" AND BuildIds = "unversioned:bad"'
    await until(lambda: count_is(lab.client, query, BATCH), "the failed runs are listed")
    async with lab.worker([FiveSteps], [take_step], task_queue=queue, build_id="mended"):
        await by_cli(
            lab, "workflow", "reset", "--query", query, "--type", "BuildId", "--build-id", "bad",
            "--reason", "bad deployment", "--yes",
        )  # fmt: skip
        after = [lab.client.get_workflow_handle(handle.id) for handle in handles]
        await until(lambda: all_are(after, COMPLETED), "all runs are completed")
        results = [await said(handle) for handle in after]
    calls = {" ".join(notes(job.ledger)) for job in jobs}
    return holds(
        f"{BATCH} runs spoilt by a bad build are reset by one command to where it took over, and complete",
        all("no step 40" in why for why in spoilt) and calls == {"1 2 3 40 4 5"}
        and len(results) == BATCH and set(results) == {str(["1", "2", "3", "a", "b", "4", "5"])},
        f"calls of each of the {BATCH}: {' or '.join(sorted(calls))}; found by {query}; "
        "by: temporal workflow reset --query ... --type BuildId --build-id bad",
    )  # fmt: skip


async def count_is(client: Client, query: str, expected: int) -> bool:
    return (await client.count_workflows(query)).count == expected


async def all_are(handles: list[WorkflowHandle[Any, Any]], status: WorkflowExecutionStatus) -> bool:
    return all([await status_of(handle) == status for handle in handles])


@CP.item("CP-02", "Partial restart")
async def partial_restart(lab: Lab) -> AsyncIterator[Evidence]:
    """Failed runs are reset to a step in the middle; a ledger outside Temporal counts the calls."""
    parts = (reset_at_step_four, signals_reapplied, bug_mended, bad_deployment)
    async with lab.worker([FiveSteps], [take_step]):
        async for evidence in side_by_side(*(part(lab) for part in parts)):
            yield evidence
    yield native(
        "reset is the server's (the command makes the call made here); a workflow has no code for it",
        WorkflowHandle.fetch_history,
        "temporal workflow reset --event-id",
        adds=["finding the event at which a step began"],
    )
    yield native(
        "a command takes all runs of a bad build back, where their worker was told its build",
        "temporal workflow reset --query --type --build-id",
        (Worker, "build_id"),
    )


# CP-03 Manual intervention ---------------------------------------------------------------------------
# A workflow that is stuck is still an open run with an id: whoever may reach the server can tell it to go
# on, to do something else, or to stop. Leave the words for that in its code.


@dataclass
class Parcel:
    ledger: str
    open_door: str  # a file: at the address "home" nobody opens until it is there
    address: str = "home"
    retry: float = 3600  # seconds until a delivery is tried again


@activity.defn
async def deliver(parcel: Parcel) -> str:
    note(parcel.ledger, f"{parcel.address}, attempt {activity.info().attempt}")
    if parcel.address == "home" and not Path(parcel.open_door).exists():
        raise ApplicationError("nobody at home")
    return f"delivered at {parcel.address}"


@activity.defn
async def take_back(parcel: Parcel) -> None:
    note(parcel.ledger, "taken back")


@workflow.defn
class Delivery:
    """Gets stuck: nobody is at home, and the next attempt is an hour away."""

    def __init__(self) -> None:
        self.instead = ""

    @workflow.run
    async def run(self, parcel: Parcel) -> str:
        try:
            delivery = self.start(parcel)
            await workflow.wait_condition(lambda: delivery.done() or self.instead != "")
            if not self.instead:
                return await delivery
            delivery.cancel()
            if self.instead == "give up":
                return "given up"
            parcel.address = self.instead
            return await self.start(parcel)
        except asyncio.CancelledError:
            await workflow.execute_activity(take_back, parcel, start_to_close_timeout=PATIENT)
            raise

    def start(self, parcel: Parcel) -> workflow.ActivityHandle[str]:
        wait = timedelta(seconds=parcel.retry)
        policy = RetryPolicy(initial_interval=wait, maximum_interval=wait, backoff_coefficient=1)
        # An id of its own makes the activity easy to name from outside.
        return workflow.start_activity(
            deliver, parcel, activity_id=parcel.address, start_to_close_timeout=10 * SECOND, retry_policy=policy
        )

    @workflow.signal
    def give_up(self) -> None:
        self.instead = "give up"

    @workflow.update
    def redirect(self, address: str) -> str:
        self.instead = address
        return f"goes to {address}"


@dataclass
class Stuck:
    """A delivery that nobody was at home for."""

    handle: WorkflowHandle[Any, Any]
    parcel: Parcel

    @property
    def calls(self) -> list[str]:
        return notes(self.parcel.ledger)


async def start_delivery(lab: Lab, name: str, retry: float = 3600) -> Stuck:
    """Start a delivery and wait until its first attempt has failed."""
    parcel = Parcel(lab.file(f"{name}.ledger"), lab.file(f"{name}.door"), retry=retry)
    handle: WorkflowHandle[Any, Any] = await lab.client.start_workflow(
        Delivery.run, parcel, id=f"{lab.id}-{name}", task_queue=lab.task_queue
    )
    stuck = Stuck(handle, parcel)
    await until(lambda: has_failed(stuck), "the first attempt has failed")
    return stuck


async def has_failed(stuck: Stuck) -> bool:
    pending = await pending_activity(stuck.handle)
    return pending.attempt >= 2 and pending.last_failure.message == "nobody at home"


FIRST_CALL = "home, attempt 1"


@dataclass
class Trace:
    """What the history keeps of an operation: who did it and why; "" where it has no such field or value."""

    operation: str
    who: str
    why: str


async def trace_of(handle: WorkflowHandle[Any, Any], operation: str, event: str, who: str, why: str) -> Trace:
    """Read who and why from the one event of that kind; `who` and `why` are the paths of its fields."""
    kind = f"{event}_event_attributes"
    found = [getattr(one, kind) for one in await events_of(handle) if one.WhichOneof("attributes") == kind]
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} events {event} in the history after one {operation}")
    return Trace(operation, value_at(found[0], who), value_at(found[0], why))


def value_at(message: Any, path: str) -> str:
    for name in path.split(".") if path else []:
        message = getattr(message, name)
    return str(message) if path else ""


async def outcome(
    stuck: Stuck, operation: str, status: WorkflowExecutionStatus, result: str, *calls: str, answered: bool = True
) -> Evidence:
    """Wait for the end of a run that somebody stepped into, and compare it with what should come of it."""
    begun = time.monotonic()
    handle = stuck.handle
    how = await said(handle)
    seconds, seen = time.monotonic() - begun, (await handle.describe()).status
    return works(
        f"{operation} ends a stuck run as {status.name}",
        seen == status and result in how and stuck.calls == [FIRST_CALL, *calls] and answered,
        f"status {name_of(seen)}, {how!r}, {seconds:.2f} s after the call; activity calls: {'; '.join(stuck.calls)}",
    )


async def step_in_by_cancel(lab: Lab) -> tuple[Evidence, Trace]:
    stuck = await start_delivery(lab, "cancel")
    await stuck.handle.cancel(reason="order withdrawn")
    seen = await outcome(stuck, "cancel, with a last word for the workflow,", CANCELED, "", "taken back")
    return seen, await trace_of(stuck.handle, "cancel", "workflow_execution_cancel_requested", "identity", "cause")


async def step_in_by_terminate(lab: Lab) -> tuple[Evidence, Trace]:
    stuck = await start_delivery(lab, "terminate")
    await stuck.handle.terminate(reason="parcel lost")
    seen = await outcome(stuck, "terminate, without a last word,", TERMINATED, "")
    return seen, await trace_of(stuck.handle, "terminate", "workflow_execution_terminated", "identity", "reason")


async def step_in_by_signal(lab: Lab) -> tuple[Evidence, Trace]:
    stuck = await start_delivery(lab, "signal")
    await stuck.handle.signal(Delivery.give_up)
    seen = await outcome(stuck, "signal", COMPLETED, "given up")
    return seen, await trace_of(stuck.handle, "signal", "workflow_execution_signaled", "identity", "")


async def step_in_by_update(lab: Lab) -> tuple[Evidence, Trace]:
    stuck = await start_delivery(lab, "update")
    answer = await stuck.handle.execute_update(Delivery.redirect, "office")
    right = answer == "goes to office"
    seen = await outcome(
        stuck, "update, which answers,", COMPLETED, "delivered at office", "office, attempt 1", answered=right
    )
    accepted = "workflow_execution_update_accepted"
    return seen, await trace_of(stuck.handle, "update", accepted, "accepted_request.meta.identity", "")


async def step_in_by_reset(lab: Lab) -> tuple[Evidence, Trace]:
    """Somebody is at home again: instead of waiting an hour, the delivery is taken back to before it was tried."""
    stuck = await start_delivery(lab, "reset")
    Path(stuck.parcel.open_door).touch()
    stuck.handle = await reset(lab.client, stuck.handle, await task_before(stuck.handle, 1), "somebody is at home")
    seen = await outcome(stuck, "reset, its cause mended,", COMPLETED, "delivered at home", FIRST_CALL)
    return seen, await trace_of(stuck.handle, "reset", "workflow_task_failed", "identity", "failure.message")


REASONS = {"cancel": "order withdrawn", "terminate": "parcel lost", "reset": "somebody is at home"}
NAMED = ("cancel", "terminate", "signal", "update")


def who_and_why(lab: Lab, traces: list[Trace]) -> tuple[Evidence, Evidence]:
    mine = lab.client.identity
    whys = {trace.operation: trace.why for trace in traces if trace.why}
    named = {trace.operation for trace in traces if trace.who == mine}
    told = "; ".join(f"{one.operation}: {one.who or 'missing'}, {one.why or 'no reason kept'}" for one in traces)
    reset_by = next(trace.who for trace in traces if trace.operation == "reset")
    return holds(
        "the history says who cancelled, terminated, signalled and updated, and why where the call takes a reason",
        set(NAMED) <= named and whys == REASONS,
        f"this client is {mine}; in the histories: {told}",
    ), limit(
        "who reset a run is not in the history, although the request named them",
        reset_by != mine,
        f"the request's identity: {mine}; in the event: {reset_by!r}",
    )  # fmt: skip


async def from_python(lab: Lab) -> list[Evidence]:
    parts = (step_in_by_cancel, step_in_by_terminate, step_in_by_signal, step_in_by_update, step_in_by_reset)
    outcomes = await asyncio.gather(*(part(lab) for part in parts))
    return [seen for seen, _ in outcomes] + list(who_and_why(lab, [trace for _, trace in outcomes]))


async def activity_cli(lab: Lab, operation: str, stuck: Stuck, *options: str) -> None:
    """`temporal activity ...` for the one activity of a delivery."""
    await by_cli(lab, "activity", operation, "--workflow-id", stuck.handle.id, "--activity-id", "home", *options)


OPERATOR = "night shift"


async def pause_activity(lab: Lab) -> Evidence:
    """Two deliveries are tried again and again. One is paused, and the other one measures the time."""
    paused, other = await asyncio.gather(start_delivery(lab, "paused", 0.1), start_delivery(lab, "other", 0.1))
    await activity_cli(lab, "pause", paused, "--identity", OPERATOR, "--reason", "provider is down")
    halted = PendingActivityState.PENDING_ACTIVITY_STATE_PAUSED
    await until(lambda: in_state(paused, halted), "the activity is paused", 45)
    before, other_before = len(paused.calls), len(other.calls)
    manual = (await pending_activity(paused.handle)).pause_info.manual
    query = f'WorkflowId STARTS_WITH "{lab.id}-paused" AND TemporalPauseInfo = "property:activityType=deliver"'
    await until(lambda: count_is(lab.client, query, 1), "visibility lists the paused activity")
    await until(lambda: len(other.calls) >= other_before + 3, "the other one was tried three times", 45)
    still, others = len(paused.calls) - before, len(other.calls) - other_before
    for delivery in (paused, other):
        Path(delivery.parcel.open_door).touch()
    await said(other.handle)
    waiting = await status_of(paused.handle)
    await activity_cli(lab, "unpause", paused, "--identity", OPERATOR)
    result = await said(paused.handle)
    return holds(
        "pause stops the attempts of an activity, unpause lets it go on; meanwhile it says who paused it and why",
        still == 0 and waiting == RUNNING and result == "delivered at home" and len(paused.calls) == before + 1
        and manual.identity == OPERATOR and manual.reason == "provider is down",
        f"attempts while paused: {still}, of the one not paused meanwhile: {others}; then {result!r}; describe says "
        f"{manual.identity!r}, {manual.reason!r}, and visibility lists it by TemporalPauseInfo",
    )  # fmt: skip


async def in_state(stuck: Stuck, state: "PendingActivityState.ValueType") -> bool:
    return (await pending_activity(stuck.handle)).state == state


@activity.defn
async def drive(parcel: Parcel) -> str:
    """A long activity: it heartbeats how far it came, and a later attempt goes on from there."""
    details = activity.info().heartbeat_details
    done = int(details[0]) if details else 0
    note(parcel.ledger, f"attempt {activity.info().attempt} from {done}")
    try:
        while not Path(parcel.open_door).exists():
            await asyncio.sleep(0.1)
            done += 1
            activity.heartbeat(done)
    except asyncio.CancelledError:
        told = activity.cancellation_details()
        note(parcel.ledger, f"{'paused' if told and told.paused else 'cancelled'} at {done}")
        raise
    return f"arrived after {done}"


@workflow.defn
class Journey:
    @workflow.run
    async def run(self, parcel: Parcel) -> str:
        return await workflow.execute_activity(
            drive,
            parcel,
            activity_id="home",
            start_to_close_timeout=PATIENT,
            heartbeat_timeout=PATIENT,
            retry_policy=QUICKLY,
        )


async def pause_running_activity(lab: Lab) -> Evidence:
    """An attempt that is under way hears of the pause when it heartbeats."""
    parcel = Parcel(lab.file("drive"), lab.file("drive.door"))
    handle: WorkflowHandle[Any, Any] = await lab.client.start_workflow(
        Journey.run, parcel, id=f"{lab.id}-drive", task_queue=lab.task_queue
    )
    stuck = Stuck(handle, parcel)
    await until(lambda: heartbeats(handle), "the drive has heartbeat")
    await activity_cli(lab, "pause", stuck)
    await until(lambda: in_state(stuck, PendingActivityState.PENDING_ACTIVITY_STATE_PAUSED), "the drive is paused")
    calls = len(stuck.calls)
    await activity_cli(lab, "unpause", stuck)
    await until(lambda: len(stuck.calls) > calls, "the drive goes on")
    Path(parcel.open_door).touch()
    result = await said(handle)
    steps = re.fullmatch(r"attempt 1 from 0; paused at (\d+); attempt \d+ from (\d+)", "; ".join(stuck.calls))
    return holds(
        "pause reaches an attempt that is under way, and unpause lets it go on from what it had heartbeat",
        steps is not None and 0 < int(steps[2]) <= int(steps[1]) and result.startswith("arrived after"),
        f"{'; '.join(stuck.calls)}; {result}",
    )


async def heartbeats(handle: WorkflowHandle[Any, Any]) -> bool:
    return bool((await pending_activity(handle)).heartbeat_details.payloads)


async def reset_activity(lab: Lab) -> Evidence:
    stuck = await start_delivery(lab, "activity-reset")
    Path(stuck.parcel.open_door).touch()
    await activity_cli(lab, "reset", stuck)
    result = await said(stuck.handle)
    return holds(
        "reset of an activity tries it again at once, and counts its attempts anew",
        stuck.calls == [FIRST_CALL, FIRST_CALL] and result == "delivered at home",
        f"calls: {'; '.join(stuck.calls)} (the next one was due in an hour); result {result!r}",
    )


async def new_options(lab: Lab) -> Evidence:
    stuck = await start_delivery(lab, "activity-options")
    wait = (await pending_activity(stuck.handle)).current_retry_interval.ToTimedelta()
    begun = time.monotonic()
    await activity_cli(
        lab, "update-options", stuck, "--retry-initial-interval", "100ms", "--retry-maximum-interval", "100ms"
    )
    await until(lambda: len(stuck.calls) >= 2, "the activity is tried again")
    again = time.monotonic() - begun
    Path(stuck.parcel.open_door).touch()
    result = await said(stuck.handle)
    attempts = [f"home, attempt {number}" for number in range(1, len(stuck.calls) + 1)]
    return holds(
        "new options take effect in an activity that already waits: a retry due in an hour comes at once",
        stuck.calls == attempts and len(attempts) >= 2 and result == "delivered at home"
        and wait > timedelta(minutes=59),
        f"retry interval {in_minutes(wait)}, changed to 100 ms: tried again {again:.2f} s after the command began; "
        f"{len(attempts)} attempts until somebody was at home, {result!r}",
    )  # fmt: skip


def in_minutes(span: timedelta) -> str:
    return f"{span.total_seconds() / 60:.0f} minutes"


async def complete_by_hand(lab: Lab) -> Evidence:
    """The neighbour took the parcel: nobody needs to try again, and the workflow goes on with that answer."""
    stuck = await start_delivery(lab, "by-hand")
    answer = "left with the neighbour"
    await activity_cli(lab, "complete", stuck, "--result", json.dumps(answer), "--identity", OPERATOR)
    result = await said(stuck.handle)
    trace = await trace_of(stuck.handle, "complete", "activity_task_completed", "identity", "")
    return holds(
        "an activity is completed by hand with a result, and the history says by whom",
        result == answer and stuck.calls == [FIRST_CALL] and trace.who == OPERATOR,
        f"result {result!r} without another call ({'; '.join(stuck.calls)}); completed by {trace.who!r}",
    )


async def no_trace(lab: Lab) -> Evidence:
    """The histories of deliveries that were paused, reset and changed, beside that of one that just went well."""
    smooth = Parcel(lab.file("smooth"), lab.file("smooth.door"), address="office")
    handle = await lab.client.start_workflow(Delivery.run, smooth, id=f"{lab.id}-smooth", task_queue=lab.task_queue)
    await said(handle)
    expected, alike = await kinds_of(handle), []
    for name in ("paused", "activity-reset", "activity-options"):
        touched = lab.client.get_workflow_handle(f"{lab.id}-{name}")
        same = await kinds_of(touched) == expected and OPERATOR not in str(await events_of(touched))
        alike += [name] if same else []
    return limit(
        "pause, unpause, reset and new options of an activity leave no event: afterwards nobody can tell of them",
        len(alike) == 3,
        f"the same {len(expected)} events as an untouched delivery, and no word of {OPERATOR!r}: "
        f"{', '.join(alike) or 'none'}",
    )


async def pause_workflow(lab: Lab) -> Evidence:
    """A whole workflow is paused, which has to be allowed on the server, and looked at from Python."""
    async with lab.private_server(settings={"frontend.WorkflowPauseEnabled": "true"}) as server:
        handle = await server.client.start_workflow(
            Delivery.run, Parcel(lab.file("p"), lab.file("p.door")), id=f"{lab.id}-p", task_queue="nobody"
        )
        await by_cli(
            lab, "workflow", "pause", "--workflow-id", handle.id, "--reason", "look into it", server=server
        )  # fmt: skip
        shown = await lab.cli("workflow", "describe", "--workflow-id", handle.id, server=server)
        event = (await count_events(handle))["WORKFLOW_EXECUTION_PAUSED"]
        errors = [await error_of(handle.describe()), await error_of(listed(server.client))]
    if event != 1 or "look into it" not in shown.out:
        raise RuntimeError(f"the workflow was not paused: {shown.err or event}")
    return limit(
        "on a paused workflow (experimental, and allowed here by a setting) the Python client fails: it cannot "
        "describe it, nor list runs among which it is",
        all("not a valid WorkflowExecutionStatus" in error for error in errors),
        f"describe: {errors[0]}; list_workflows: {errors[1]}; the command line shows it as paused, and the history "
        f"has {event} event WORKFLOW_EXECUTION_PAUSED",
    )


async def listed(client: Client, query: str = "") -> list[str]:
    return [one.id async for one in client.list_workflows(query)]


async def error_of(call: Awaitable[object]) -> str:
    try:
        await call
    except ValueError as error:
        return f"ValueError: {error}"
    return "no error"


@CP.item("CP-03", "Manual intervention")
async def manual_intervention(lab: Lab) -> AsyncIterator[Evidence]:
    """Deliveries are stuck, nobody being at home; each is helped in another way, and one is left alone."""
    parts = (
        from_python, pause_activity, pause_running_activity, reset_activity, new_options, complete_by_hand,
        pause_workflow,
    )  # fmt: skip
    often = timedelta(milliseconds=200)  # a pause reaches a running activity by its heartbeats
    async with lab.worker([Delivery, Journey], [deliver, take_back, drive], max_heartbeat_throttle_interval=often):
        twin = await start_delivery(lab, "twin")
        async for evidence in side_by_side(*(part(lab) for part in parts)):
            yield evidence
        yield await no_trace(lab)
        Path(twin.parcel.open_door).touch()  # as for the others, the cause is gone; but nobody steps in
        pending, status = await pending_activity(twin.handle), await status_of(twin.handle)
    due = pending.next_attempt_schedule_time.ToDatetime() - pending.last_attempt_complete_time.ToDatetime()
    yield control(
        "a twin that nobody touches stays stuck",
        status == RUNNING and twin.calls == [FIRST_CALL] and due > timedelta(minutes=59),
        f"status {name_of(status)}, calls: {'; '.join(twin.calls)}; the next one is due {in_minutes(due)} later",
    )
    yield native(
        "cancel, terminate, signal and update need nothing but the run's id, a reset also an event of its history",
        WorkflowHandle.cancel,
        WorkflowHandle.terminate,
        WorkflowHandle.signal,
        WorkflowHandle.execute_update,
        WorkflowHandle.fetch_history,
        "temporal workflow reset --event-id",
    )
    yield native(
        "the operations on a single activity need nothing but its id, and it hears of a pause by its heartbeat",
        "temporal activity complete",
        "temporal activity pause",
        "temporal activity unpause",
        "temporal activity reset",
        "temporal activity update-options",
        activity.heartbeat,
        activity.cancellation_details,
    )


# CP-04 Dead letters ----------------------------------------------------------------------------------
# There is no dead-letter queue to fill and to drain: a failed run is the dead letter. It keeps its input
# and its failure, a query lists it, and a batch drives it again once the cause is mended.


LIMIT = 3


@dataclass
class Order:
    number: int
    shop: str  # a SQLite file: addresses, and what was paid and shipped
    calls: str  # a ledger: every call of an activity
    attempts: int = LIMIT  # to ship; 0 is without limit


def open_shop(database: str, poison: Sequence[int]) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE effects (key TEXT UNIQUE)")
        connection.execute("CREATE TABLE unknown_addresses (number INTEGER)")
        connection.executemany("INSERT INTO unknown_addresses VALUES (?)", [(number,) for number in poison])


def ask_shop(database: str, statement: str, *values: object) -> list[Any]:
    with sqlite3.connect(database) as connection:
        return connection.execute(statement, values).fetchall()


def effects(database: str, kind: str) -> int:
    return len(ask_shop(database, "SELECT key FROM effects WHERE key LIKE ?", f"%/{kind}"))


def take_effect(order: Order, kind: str) -> None:
    """Happens once for a workflow id, in however many attempts and runs: a reset changes the run's id."""
    key = f"{activity.info().workflow_id}/{kind}"
    ask_shop(order.shop, "INSERT OR IGNORE INTO effects VALUES (?)", key)


@activity.defn
async def pay(order: Order) -> None:
    note(order.calls, f"pay {order.number}")
    take_effect(order, "pay")


@activity.defn
async def ship(order: Order) -> None:
    note(order.calls, f"ship {order.number}")
    if ask_shop(order.shop, "SELECT 1 FROM unknown_addresses WHERE number = ?", order.number):
        raise ApplicationError(f"order {order.number} has no address")
    take_effect(order, "ship")


@workflow.defn
class Fulfilment:
    @workflow.run
    async def run(self, order: Order) -> str:
        await workflow.execute_activity(pay, order, start_to_close_timeout=PATIENT)
        await workflow.execute_activity(
            ship,
            order,
            start_to_close_timeout=PATIENT,
            retry_policy=RetryPolicy(
                initial_interval=timedelta(milliseconds=100), backoff_coefficient=1, maximum_attempts=order.attempts
            ),
        )
        return "shipped"


ORDERS, POISON = range(1, 9), (2, 5, 7)


async def start_order(lab: Lab, name: str, order: Order) -> WorkflowHandle[Any, Any]:
    return await lab.client.start_workflow(Fulfilment.run, order, id=f"{lab.id}-{name}", task_queue=lab.task_queue)


def failed_runs(lab: Lab) -> str:
    """The dead letters: a query, narrowed down to the orders of this evaluation."""
    return f'WorkflowType = "Fulfilment" AND ExecutionStatus = "Failed" AND WorkflowId STARTS_WITH "{lab.id}-order-"'


async def dead_letters(client: Client, query: str) -> dict[str, str]:
    """Each failed run that was not driven again since, by workflow id, with its last failure."""
    letters = {}
    async for letter in client.list_workflows(query):
        handle = client.get_workflow_handle(letter.id, run_id=letter.run_id)
        described = (await handle.describe()).raw_description
        if not described.workflow_extended_info.reset_run_id:
            letters[letter.id] = await said(handle)
    return letters


async def drive_again(client: Client, query: str, reason: str) -> None:
    """Reset every run that the query finds to its beginning, in one batch that the server works off."""
    request = StartBatchOperationRequest(
        namespace=client.namespace,
        visibility_query=query,
        job_id=str(uuid.uuid4()),
        reason=reason,
        reset_operation=BatchOperationReset(
            identity=client.identity, options=ResetOptions(first_workflow_task=Empty())
        ),
    )

    async def accepted() -> bool:
        try:
            await client.workflow_service.start_batch_operation(request)
        except RPCError as error:
            if error.status != RPCStatusCode.RESOURCE_EXHAUSTED:
                raise
            return False  # by default a namespace works off one batch at a time: wait for the other one
        return True

    await until(accepted, "the batch was accepted")


DRIVEN_AGAIN = (
    works("with the cause mended, one batch drives them again, and all complete"),
    holds("driven again, even twice, nothing is paid twice: the key is made of the workflow's id"),
    limit("a failed run stays listed as failed when its successor has completed: the same batch drives it once more"),
)


async def orders_with_poison(lab: Lab) -> list[Evidence]:
    """Eight orders, three of which cannot be shipped; their addresses are then mended and they are driven again."""
    shop, calls, query = lab.file("shop"), lab.file("calls"), failed_runs(lab)
    open_shop(shop, POISON)
    handles = [await start_order(lab, f"order-{number}", Order(number, shop, calls)) for number in ORDERS]
    first = [await said(handle) for handle in handles]
    parked = parked_after_attempts(first, notes(calls))
    await until(lambda: count_is(lab.client, query, len(POISON)), "the failed runs are listed")
    letters = await dead_letters(lab.client, query)
    ids = {f"{lab.id}-order-{number}": f"ApplicationError: order {number} has no address" for number in POISON}
    return [
        parked,
        works(
            "a query lists exactly the failed runs, each with its last failure",
            letters == ids,
            f"{query}: {'; '.join(f'{id}: {why}' for id, why in sorted(letters.items()))}",
        ),
        *await driven_again(lab, shop, calls, [lab.client.get_workflow_handle(handle.id) for handle in handles]),
    ]


@piece(*DRIVEN_AGAIN)
async def driven_again(lab: Lab, shop: str, calls: str, latest: list[WorkflowHandle[Any, Any]]) -> list[Evidence]:
    lab.needs("batch operations")
    query = failed_runs(lab)
    ask_shop(shop, "DELETE FROM unknown_addresses")
    await drive_again(lab.client, query, "addresses mended")
    await until(lambda: all_are(latest, COMPLETED), "every order is completed")
    results = [await said(handle) for handle in latest]
    left, once = await dead_letters(lab.client, query), pays_and_effects(shop, calls)
    again = await same_batch_again(lab, shop, calls, latest)
    twice = pays_and_effects(shop, calls)
    return [
        works(
            "with the cause mended, one batch drives them again, and all complete",
            results == ["shipped"] * len(ORDERS) and effects(shop, "ship") == len(ORDERS) and not left,
            f"{results.count('shipped')} of {len(ORDERS)} shipped, {effects(shop, 'ship')} shipments in the shop; "
            f"dead letters left: {len(left)}",
        ),
        holds(
            "driven again, even twice, nothing is paid twice: the key is made of the workflow's id",
            once == (len(ORDERS) + len(POISON), len(ORDERS)) and twice == (once[0] + len(POISON), len(ORDERS)),
            f"{once[0]} calls to pay made {once[1]} payments; after the same batch once more: {twice[0]} calls, "
            f"{twice[1]} payments",
        ),
        again,
    ]


def parked_after_attempts(outcomes: list[str], calls: list[str]) -> Evidence:
    attempts = {number: calls.count(f"ship {number}") for number in ORDERS}
    good = [number for number in ORDERS if number not in POISON]
    return holds(
        f"a poison item is parked after {LIMIT} attempts, while the rest go on",
        attempts == {number: LIMIT if number in POISON else 1 for number in ORDERS}
        and all(outcomes[number - 1] == "shipped" for number in good)
        and all("has no address" in outcomes[number - 1] for number in POISON),
        f"attempts to ship, by order: {', '.join(f'{n}: {count}' for n, count in attempts.items())}; "
        f"{outcomes.count('shipped')} shipped, {len(outcomes) - outcomes.count('shipped')} failed; one activity "
        "at a time in the worker, one more item without a limit retrying beside them",
    )  # fmt: skip


def pays_and_effects(shop: str, calls: str) -> tuple[int, int]:
    """(calls to pay, payments)"""
    return sum(call.startswith("pay ") for call in notes(calls)), effects(shop, "pay")


async def same_batch_again(lab: Lab, shop: str, calls: str, latest: list[WorkflowHandle[Any, Any]]) -> Evidence:
    """Every order is completed. Does the query know?"""
    query = failed_runs(lab)
    before, found = pays_and_effects(shop, calls)[0], await listed(lab.client, query)
    await drive_again(lab.client, query, "the same again")
    if found:
        await until(lambda: pays_and_effects(shop, calls)[0] >= before + len(found), "they were driven again")
        await until(lambda: all_are(latest, COMPLETED), "every order is completed again")
    repeated = pays_and_effects(shop, calls)[0] - before
    return limit(
        "a failed run stays listed as failed when its successor has completed: the same batch drives it once more",
        repeated > 0,
        f"listed after all were completed: {len(found)}; sent again, the batch repeated {repeated} calls to pay; "
        "describe tells them apart (reset_run_id)",
    )


async def retrying_runs(client: Client, query: str, attempts: int) -> dict[str, str]:
    """Each running run with an activity at its n-th attempt or later, by workflow id, with its last failure."""
    found = {}
    async for one in client.list_workflows(query):
        pending = await pending_activity(client.get_workflow_handle(one.id, run_id=one.run_id))
        if pending.attempt >= attempts:
            found[one.id] = pending.last_failure.message
    return found


@workflow.defn
class LookUp:
    @workflow.run
    async def run(self, addresses: dict[str, str]) -> str:
        address = addresses["home"]  # a bug is no failure of the run: its workflow task is tried again, for ever
        await workflow.wait_condition(lambda: False)
        return address


async def stuck_in_code(lab: Lab) -> Evidence:
    """A run whose code raises stays RUNNING. The threshold is the server's; lowered here, to see it in seconds."""
    threshold = {"system.numConsecutiveWorkflowTaskProblemsToTriggerSearchAttribute": "2"}
    query = 'ExecutionStatus = "Running" AND TemporalReportedProblems IS NOT NULL'
    async with lab.private_server(settings=threshold) as server, lab.worker([LookUp], server=server):
        # A failure after the first one only counts when the workflow task has timed out.
        healthy, stuck = [
            await server.client.start_workflow(
                LookUp.run, addresses, id=f"{lab.id}-{name}", task_queue=lab.task_queue, task_timeout=SOON
            )
            for name, addresses in (("healthy", {"home": "Old Street"}), ("stuck", {}))
        ]
        seconds = await until(lambda: listed(server.client, query), "the stuck run is listed", 60)
        found, messages = await listed(server.client, query), await failed_tasks(stuck)
        both = [await status_of(handle) for handle in (healthy, stuck)]
        works_well = (await count_events(healthy))["WORKFLOW_TASK_COMPLETED"] == 1
    return holds(
        "a run that is stuck in its own code, not failed, is found by a query, and a healthy one is not",
        found == [stuck.id] and both == [RUNNING, RUNNING] and bool(messages) and works_well,
        f"{query}: {len(found)} of 2 running after {seconds:.1f} s (threshold lowered to 2 failures, workflow tasks "
        f"to {SOON.seconds} s); its workflow task failed with KeyError {messages[:1]}",
    )


async def endless(lab: Lab, order: Order) -> list[Evidence]:
    """The poison item without a limit: it is no dead letter, but a running run that gets nowhere."""
    attempts = 2 * LIMIT + 1
    await until(lambda: notes(order.calls).count(f"ship {order.number}") >= attempts, f"{attempts} attempts were made")
    handle = lab.client.get_workflow_handle(f"{lab.id}-endless")
    status, running = await status_of(handle), f'ExecutionStatus = "Running" AND WorkflowId STARTS_WITH "{lab.id}"'
    await until(lambda: listed(lab.client, running), "the running run is listed")
    found = await retrying_runs(lab.client, running, attempts=LIMIT + 2)
    count, as_failed = notes(order.calls).count(f"ship {order.number}"), await listed(lab.client, failed_runs(lab))
    return [
        control(
            "without a limit to its attempts the poison item goes on retrying, and is no failed run",
            count >= attempts and status == RUNNING and handle.id not in as_failed,
            f"{count} attempts and still {name_of(status)}, where a limit of {LIMIT} parks it",
        ),
        holds(
            "a run stuck in retries is found by asking each running run for its pending activities",
            found == {handle.id: f"order {order.number} has no address"},
            f"running runs were listed and described one by one; at attempt {LIMIT + 2} or later: {found}",
        ),
    ]


@CP.item("CP-04", "Dead letters")
async def dead_letter_items(lab: Lab) -> AsyncIterator[Evidence]:
    """Orders fail for good, are listed, mended and driven again; a shop outside Temporal counts the effects."""
    poison = Order(99, lab.file("endless.shop"), lab.file("endless.calls"), attempts=0)
    open_shop(poison.shop, [poison.number])
    async with lab.worker([Fulfilment], [pay, ship], max_concurrent_activities=1):
        await start_order(lab, "endless", poison)
        async for evidence in side_by_side(orders_with_poison(lab), endless(lab, poison), stuck_in_code(lab)):
            yield evidence
    yield native(
        "the list, the limit of attempts and the batch are built in, and are enough",
        Client.list_workflows,
        WorkflowHandle.describe,
        (RetryPolicy, "maximum_attempts"),
        "temporal workflow reset --query --type",
        adds=["the filter for runs already driven again", "the key for effects"],
    )
    found = offered("dead_?letter|dlq", workflow, temporalio.client, temporalio.worker, WorkflowService)
    yield limit(
        "there is no dead-letter object: it is a query and a convention, and whoever drives again brings the key",
        not found,
        "names with dead letter or dlq in temporalio.workflow, .worker, .client and the server's API: "
        f"{', '.join(found) or 'none'}",
    )


if __name__ == "__main__":
    run(CP)
