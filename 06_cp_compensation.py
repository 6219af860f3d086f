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
    at_least,
    between,
    connect,
    contains,
    control,
    differs,
    equal,
    figure,
    holds,
    lacks,
    limit,
    native,
    not_run,
    piece,
    side_by_side,
    works,
)
from lab import (
    PROMPT,
    Books,
    Ending,
    Fault,
    Handle,
    Lab,
    Server,
    TakeOver,
    count_events,
    ended,
    fail,
    failed_tasks,
    finds,
    happened,
    hold,
    is_closed,
    listed,
    never_answer,
    note,
    notes,
    open_gate,
    outline,
    pending,
    refuse,
    run,
    said,
    soon,
    status_of,
    together,
    until,
    where_there,
    withhold,
)

import asyncio
import contextlib
import inspect
import json
import operator
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
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
from temporalio.client import (
    Client,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowHistory,
)
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

# What the items share --------------------------------------------------------------------------------

# What is held by a fault is not given up on a slow machine.
LONG = {"start_to_close_timeout": timedelta(minutes=10)}


async def pending_activity(handle: Handle) -> PendingActivityInfo:
    """What the server tells of a run's open activity; empty when none is open."""
    return (await pending(handle) or [PendingActivityInfo()])[0]


async def events_of(handle: Handle) -> list[HistoryEvent]:
    return list((await handle.fetch_history()).events)


def kind_of(event: HistoryEvent) -> str:
    """Such as "activity_task_completed"."""
    return str(event.WhichOneof("attributes")).removesuffix("_event_attributes")


async def driven_again(client: Client, runs: Sequence[Handle]) -> list[Ending]:
    """Wait until each of these runs has a successor that is its workflow's latest, and that one has ended."""

    async def all_have_one(ids: Mapping[str, str | None]) -> bool:
        return all([(await client.get_workflow_handle(id).describe()).run_id != run for id, run in ids.items()])

    ids = {one.id: one.first_execution_run_id for one in runs}
    await until(lambda: all_have_one(ids), "they were driven again")
    return [await ended(client.get_workflow_handle(id)) for id in ids]


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
    """Whoever takes the bookings. What is asked twice under one key counts once."""

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


def stop_if_cancelled() -> None:
    # A cancellation is not raised a second time: where a booking went well in spite of it, it would be lost here.
    task = asyncio.current_task()
    if task and task.cancelling():
        raise asyncio.CancelledError


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
                stop_if_cancelled()
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
                if without != "asking":
                    stop_if_cancelled()
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
    "under way": Case(
        holds, "cancelled during a booking that does not hear of it: that is waited for, and undone as well",
        ALL + BACK, ALL_UNDONE, "CANCELED", faults=[late_car], cancel_at=["book car"],
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
    "unasked": Case(
        control, "without asking for it after each step, a cancellation that comes during the last booking is lost",
        ALL, BOOKED, "COMPLETED", faults=[late_car], without="asking", cancel_at=["book car"],
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
        soon_or_late = {True: {"start_to_close_timeout": soon()}, False: LONG}

        def worker(case: Case) -> Worker:
            travel = self.forgetful if case.forgetful else self.travel
            return self.lab.worker(
                [TravelBooking, Variant, Leg],
                [travel.book, travel.undo],
                task_queue=self.queue_of(case),
                faults=self.faults(),
                shortened={"book": soon_or_late[case.gives_up], "undo": soon_or_late[False]},
                **PROMPT,
            )

        async with worker(CASES["well"]), worker(CASES["unanswered"]), worker(CASES["forgetful"]):
            yield

    async def start(self, name: str) -> Handle:
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

    async def facts(self, name: str, case: Case, handle: Handle, how: Ending) -> Mapping[str, Fact | list[str]]:
        calls, amounts, balance = called(self.lab, handle.id), self.booked(name), Fact(sum(self.booked(name)))
        if case.missing:
            return {"calls": calls, "books": lacks(amounts, case.missing), "balance": balance}
        facts = {"calls": equal(calls, case.calls), "books": equal(amounts, case.books), "balance": balance}
        facts |= {"status": equal(how.status, case.status)}
        if case.late:
            facts |= {"the_last_call": equal(returned(self.lab, handle.id)[-1], case.late)}
        if case.cancel_at:
            history = outline(await handle.fetch_history())
            asked = history.count("WorkflowExecutionCancelRequested")
            facts |= {"cancellations_sent": Fact(len(case.cancel_at)), "in_the_history": equal(asked, 1)}
            _, cancelled, then = history.partition("ActivityTaskCancelRequested")
            if cancelled and case.kind is holds:
                before_undoing = then.partition("ActivityTaskScheduled undo")[0].split()
                facts |= {"before_the_undoing": contains(before_undoing, "ActivityTaskStarted")}
        return facts | ({"why": contains(how.why, case.why)} if case.why else {})


def returned(lab: Lab, workflow: str) -> list[str]:
    """The calls that have ended, and how, in this order."""
    over = [call for call in lab.calls(workflow, "") if call.what != "begun"]
    return [f"{call.what} {call.activity} {call.argument['service']}" for call in over]


async def told_of_cancel(handle: Handle) -> bool:
    """Whether the workflow has completed the task that brought it the cancellation."""
    _, asked, after = outline(await handle.fetch_history(), without="").partition("WorkflowExecutionCancelRequested")
    return bool(asked) and "WorkflowTaskCompleted" in after


async def undoing_fails(bench: Bench) -> Evidence:
    """The hotel cannot be reached twice, and the third attempt takes long. Somebody looks meanwhile."""
    handle = await bench.start("retried")
    try:
        third = await in_mid_air(handle)
    finally:
        open_gate(bench.lab.gate("retried"))
    await ended(handle)
    return holds(
        "an undoing that fails is retried until it succeeds, and only then comes the next; describe tells of it "
        "in mid-air",
        calls=equal(called(bench.lab, handle.id), [*ALL, "undo car", *["undo hotel"] * 3, "undo flight"]),
        books=equal(bench.booked("retried"), UNDONE),
        pending=equal(third.activity_type.name, "undo"),
        attempt=equal(third.attempt, 3),
        last_failure=equal(third.last_failure.message, "the hotel's line is busy"),
    )


async def in_mid_air(handle: Handle) -> PendingActivityInfo:
    """What describe tells when the third attempt is under way; nothing where the run ends without one."""
    found = PendingActivityInfo()

    async def seen() -> bool:
        nonlocal found
        found = await pending_activity(handle)
        return found.attempt >= 3 or await is_closed(handle)

    await until(seen, "the undoing is at its third attempt, or the run has ended")
    return found


async def killed_while_undoing(lab: Lab) -> Evidence:
    """The worker dies after undoing the hotel and before it could say so. The next one undoes it again."""
    quick, default = await together(*(take_over_at_hotel(lab, sticky) for sticky in (1, 10)))
    (taken, books), (usual, usual_books) = quick, default
    return holds(
        "worker killed in the middle of undoing: a new one finishes it; the call cut off is repeated, and counts once",
        calls=equal(called(lab, taken.handle.id)[:6], [*ALL, "undo car", "undo hotel", "undo hotel"]),
        last_call=equal(called(lab, taken.handle.id)[-1], "undo flight"),
        books=equal([books.amounts(), usual_books.amounts()], [UNDONE, UNDONE]),
        ended=equal([taken.ending.status, usual.ending.status], ["FAILED", "FAILED"]),
        from_kill_to_end=figure(usual.seconds, "s"),
        with_a_sticky_timeout_of_1_s_instead_of_10_s=figure(taken.seconds, "s"),
        of_it_until_the_lost_call_is_given_up=figure(soon().total_seconds(), "s"),
    )


async def take_over_at_hotel(lab: Lab, sticky: float) -> tuple[TakeOver, Books]:
    name = f"killed-{sticky:.0f}"
    books, gate = Books(lab.file(f"{name}.sqlite")), lab.gate(name)
    travel = Travel(Desk(books))
    taken = await lab.take_over(
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
        point=lambda: len(books.amounts()) >= 3,
        meanwhile=lambda: open_gate(gate),
    )
    return taken, books


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
        status=equal(await status_of(handle), "TERMINATED"),
        a_booking_begun_after_it=equal(next_one.status, "COMPLETED"),
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
        cases = [bench.try_case(*case) for case in CASES.items()]
        async for evidence in side_by_side(*cases, killed_while_undoing(lab), undoing_fails(bench), terminated(bench)):
            yield evidence
    yield no_saga_construct()


# CP-02 Partial restart -------------------------------------------------------------------------------
# A reset begins a new run that inherits the history up to a chosen point: what was done before it stays
# done, and only what came after it is repeated, with today's code. So give every step a key: it may come again.

PARTS = ["frame", "motor", "wheels", "paint", "bell"]


@dataclass
class Fitting:
    order: str
    part: str


class Store(Protocol):
    """Where the parts are kept. What is asked for twice under one key is handed out once."""

    def hand_out(self, key: str, part: str) -> None:
        """Raises where there is none."""


class Workshop:
    def __init__(self, store: Store) -> None:
        self.store = store

    @activity.defn
    def fit(self, fitting: Fitting) -> None:
        self.store.hand_out(f"{fitting.order}/{fitting.part}", fitting.part)


@workflow.defn(name="Assembly")
class Assembly:
    """Builds a scooter, and keeps a journal to which anybody may add a remark."""

    def __init__(self) -> None:
        self.journal: list[str] = []

    @workflow.run
    async def run(self, order: str) -> list[str]:
        return await self.build(order, PARTS)

    async def build(self, order: str, parts: list[str]) -> list[str]:
        for part in parts:
            await workflow.execute_activity_method(
                Workshop.fit,
                Fitting(order, part),
                activity_id=part,  # an id that people know, so that a step is easily found from outside
                start_to_close_timeout=timedelta(minutes=1),
            )
            self.journal.append(part)
        return self.journal

    @workflow.signal
    def remark(self, text: str) -> None:
        self.journal.append(text)

    @workflow.query
    def written(self) -> list[str]:
        return self.journal


async def task_before(run: WorkflowHandle[Any, Any], activity_id: str) -> int:
    """The event id of the workflow task that scheduled an activity: the point to reset to, to do it again."""
    async for event in run.fetch_history_events():
        scheduled = event.activity_task_scheduled_event_attributes
        if scheduled.activity_id == activity_id:
            return scheduled.workflow_task_completed_event_id
    raise ValueError(f"{run.id} has not come to {activity_id}")


async def reset_request(
    client: Client, run: WorkflowHandle[Any, Any], activity_id: str, reason: str
) -> ResetWorkflowExecutionRequest:
    """What asks the server for a new run in which an activity is yet to be scheduled.

    The command line asks for the same: temporal workflow reset --workflow-id ... --event-id ... --reason ...
    """
    return ResetWorkflowExecutionRequest(
        namespace=client.namespace,
        workflow_execution=WorkflowExecution(workflow_id=run.id, run_id=(await run.describe()).run_id),
        workflow_task_finish_event_id=await task_before(run, activity_id),
        reason=reason,
        identity=client.identity,
        request_id=str(uuid.uuid4()),
    )


async def reset_before(
    client: Client, run: WorkflowHandle[Any, Any], activity_id: str, reason: str
) -> WorkflowHandle[Any, Any]:
    """Begin a new run in which an activity is yet to be scheduled.

    Where an answer is lost and the request is sent again, the server resets again: the last new run counts.
    """
    request = await reset_request(client, run, activity_id, reason)
    response = await client.workflow_service.reset_workflow_execution(request, retry=True)
    return client.get_workflow_handle(run.id, run_id=response.run_id)


class Shelf:
    """A store for the example, from which parts of single orders are missing."""

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self.handed_out: list[str] = []

    def hand_out(self, key: str, part: str) -> None:
        if part not in PARTS or key in self.missing:
            raise ApplicationError(f"no {part} in the store", non_retryable=True)
        if key not in self.handed_out:
            self.handed_out.append(key)


async def example_cp_02(client: Client) -> None:
    shelf = Shelf()
    async with Worker(
        client,
        task_queue="assembly",
        workflows=[Assembly],
        activities=[Workshop(shelf).fit],
        activity_executor=ThreadPoolExecutor(10),
    ):
        order = f"scooter-{uuid.uuid4()}"
        shelf.missing.add(f"{order}/paint")
        run = await client.start_workflow(Assembly.run, order, id=order, task_queue="assembly")
        try:
            await run.result()
        except WorkflowFailureError as failure:
            print(f"The assembly failed: {failure.cause.__cause__}. Handed out: {shelf.handed_out}")
        shelf.missing.clear()
        resumed = await reset_before(client, run, "paint", "paint came")
        print(f"Reset, it ended with {await resumed.result()}. Handed out: {shelf.handed_out}")


# CP-02 put to the test -------------------------------------------------------------------------------


@workflow.defn(name="Assembly")
class AssemblyWithABug(Assembly):
    @workflow.run
    async def run(self, order: str) -> list[str]:
        return await self.build(order, [*PARTS[:3], "pain", "bell"])


async def start_assembly(lab: Lab, name: str, **options: Any) -> Handle:
    """Start an assembly whose order has the workflow's id."""
    return await lab.start(Assembly.run, f"{lab.id}-{name}", name=name, **options)


def fitted(lab: Lab, name: str) -> list[str]:
    """The calls for an order, by part."""
    return [call.argument["part"] for call in lab.calls(f"{lab.id}-{name}")]


async def reset_at_step_four(lab: Lab, shelf: Shelf) -> list[Evidence]:
    """Paint is missing, and comes: one run is reset to step 4, and another is started anew."""
    names = ("failed", "anew")
    shelf.missing |= {f"{lab.id}-{name}/paint" for name in names}
    handles = [await start_assembly(lab, name) for name in names]
    endings = [await ended(handle) for handle in handles]
    before, old = [fitted(lab, name) for name in names], await events_of(handles[0])
    shelf.missing -= {f"{lab.id}-{name}/paint" for name in names}
    begun = time.monotonic()
    resumed = await reset_before(lab.client, handles[0], "paint", "paint came")
    how = await ended(resumed)
    seconds, new = time.monotonic() - begun, await events_of(resumed)
    # A new run takes over all events but its own start, up to the workflow task that the reset broke off.
    kept = [*map(kind_of, new)].index("workflow_task_failed") - 1
    again = await ended(await start_assembly(lab, "anew"))
    return [
        works(
            "failed at step 4, reset there: steps 1 to 3 are not called again, and the run completes",
            calls_before=equal(before[0], PARTS[:4]),
            failed_because=contains(endings[0].why, "no paint"),
            calls_after=equal(fitted(lab, "failed")[4:], PARTS[3:]),
            result=equal(how.result, PARTS),
            steps_that_the_new_run_took_over=equal([*map(kind_of, new[1:kept])].count("activity_task_completed"), 3),
            events_unchanged=equal(sum(a == b for a, b in zip(old[1:kept], new[1:kept], strict=True)), kept - 1),
            run_id=differs(resumed.run_id, handles[0].first_execution_run_id),
            from_reset_to_end=figure(seconds, "s"),
            methods_of_WorkflowHandle_for_it=offered("reset", WorkflowHandle),
        ),
        control(
            "started anew instead, every call is made again",
            calls_before=equal(before[1], PARTS[:4]),
            calls_after=equal(fitted(lab, "anew")[4:], PARTS),
            result=equal(again.result, PARTS),
        ),
    ]


async def sent_twice(lab: Lab, shelf: Shelf) -> Evidence:
    """One request, with one request id, comes to the server twice, as after an answer that was lost."""
    shelf.missing.add(f"{lab.id}-twice/paint")
    handle = await start_assembly(lab, "twice")
    await ended(handle)
    request = await reset_request(lab.client, handle, "paint", "paint came")
    runs = [(await lab.client.workflow_service.reset_workflow_execution(request, retry=True)).run_id for _ in range(2)]
    first = await ended(lab.client.get_workflow_handle(handle.id, run_id=runs[0]))
    return limit(
        "a reset that is sent twice under one request id resets twice", new_runs=differs(runs[1], runs[0]),
        of_which_the_first_is=first.status,
    )  # fmt: skip


async def signals_reapplied(lab: Lab, shelf: Shelf) -> list[Evidence]:
    """Two signals come after step 4, then step 5 fails; the run is reset to before step 4."""
    shelf.missing.add(f"{lab.id}-signals/bell")
    handle = await start_assembly(lab, "signals")
    await until(lambda: fitted(lab, "signals") == PARTS, "step 5 has begun")
    for text in ("a", "b"):
        await handle.signal(Assembly.remark, text)
    open_gate(lab.gate("signals"))
    await ended(handle)
    old: list[str] = await handle.query(Assembly.written)
    if old != [*PARTS[:4], "a", "b"]:
        raise RuntimeError(f"the journal before the reset: {old}")
    shelf.missing.discard(f"{lab.id}-signals/bell")
    resumed = await reset_before(lab.client, handle, "paint", "a bell came")
    how = await ended(resumed)
    new: list[str] = await resumed.query(Assembly.written)
    return [
        holds(
            "signals from after the reset point are not lost: each is there once, in the order they were sent",
            status=equal(how.status, "COMPLETED"),
            remarks=equal([entry for entry in new if entry not in PARTS], ["a", "b"]),
            steps=equal([entry for entry in new if entry in PARTS], PARTS),
        ),
        holds(
            "a step that was done and comes again counts once: its key is made of the order",
            calls=equal(fitted(lab, "signals"), [*PARTS, "paint", "bell"]),
            parts_handed_out=equal(len([key for key in shelf.handed_out if handle.id in key]), len(PARTS)),
        ),
        limit(
            "reapplied signals come before the repeated steps, although they had come after them",
            journal_before_the_reset=old,
            journal_after_it=new,
            in_it_before_step_4=contains(new[: new.index("paint")], "a", "b"),
        ),
    ]


BATCH = 5
TAKEN_BACK = f"{BATCH} runs spoilt by a bad build are reset by one command to where it took over, and complete"
MENDED = "with the bug in the workflow's code mended, a run that it spoilt is reset and completes"


@piece(holds(MENDED), holds(TAKEN_BACK))
async def bad_build(lab: Lab, shelf: Shelf) -> list[Evidence]:
    """Step 4 of some runs falls to a build that has a bug. One command each takes one and five of them back."""
    lab.needs("batch operations")
    queue, fit, gate = f"{lab.id}-builds", Workshop(shelf).fit, lab.gate("builds")
    names = [f"batch-{n}" for n in range(BATCH)]
    query = f'WorkflowId STARTS_WITH "{lab.id}-batch" AND ExecutionStatus = "Failed" AND BuildIds = "unversioned:bad"'
    # The activities are no part of the build: the wheels are under way while the workflows' worker is replaced.
    async with lab.worker((), [fit], task_queue=queue, faults=[withhold("fit", gate, part="wheels")]):
        async with lab.worker([Assembly], task_queue=queue, build_id="good"):
            handles = [await start_assembly(lab, name, task_queue=queue) for name in names]
            await until(lambda: all(fitted(lab, name) == PARTS[:3] for name in names), "the wheels are being fitted")
        open_gate(gate)
        async with lab.worker([AssemblyWithABug], task_queue=queue, build_id="bad"):
            single = await start_assembly(lab, "single", task_queue=queue)
            spoilt = [(await ended(handle)).why for handle in (single, *handles)]
        await until(lambda: finds(lab.client, query, BATCH), "the failed runs are listed")
        event = str(await task_before(single, "pain"))
        batch = ("--query", query, "--type", "BuildId", "--build-id", "bad", "--reason", "bad build", "--yes")
        async with lab.worker([Assembly], task_queue=queue, build_id="mended"):
            await by_cli(lab, "workflow", "reset", "-w", single.id, "--event-id", event, "--reason", "mended")
            await by_cli(lab, "workflow", "reset", *batch)
            results = [one.result for one in await driven_again(lab.client, [single, *handles])]
    calls = [*PARTS[:3], "pain", "paint", "bell"]
    return [
        holds(
            MENDED,
            failed_because=equal(spoilt[0], "no pain in the store"),
            calls=equal(fitted(lab, "single"), calls),
            result=equal(results[0], PARTS),
            by=f"temporal workflow reset --event-id {event}",
        ),
        holds(
            TAKEN_BACK,
            failed_because=equal(sorted({*spoilt[1:]}), ["no pain in the store"]),
            calls=equal([" ".join(fitted(lab, name)) for name in names], [" ".join(calls)] * BATCH),
            completed_with_all_parts=equal(results[1:].count(PARTS), BATCH),
            found_by=query,
            by="temporal workflow reset --query ... --type BuildId --build-id bad",
        ),
    ]


@CP.item("CP-02", "Partial restart")
async def partial_restart(lab: Lab) -> AsyncIterator[Evidence]:
    """Failed runs are reset to a step in the middle; a ledger outside Temporal counts the calls."""
    shelf, parts = Shelf(), (reset_at_step_four, sent_twice, signals_reapplied, bad_build)
    held = hold("fit", lab.gate("signals"), part="bell").of(f"{lab.id}-signals")
    async with lab.worker([Assembly], [Workshop(shelf).fit], faults=[held]):
        async for evidence in side_by_side(*(part(lab, shelf) for part in parts)):
            yield evidence
    yield native(
        "reset is the server's (the command makes the call made here); a workflow has no code for it",
        WorkflowHandle.describe,
        WorkflowHandle.fetch_history_events,
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
# on, to do something else, or to stop. Leave the words for that in its code, and let it look first at what came
# of the attempt under way.


@dataclass
class Parcel:
    number: str
    address: str = "home"
    again: float = 3600  # seconds after which a delivery that failed is tried again


class Courier(Protocol):
    def deliver(self, number: str, address: str) -> None:
        """Raises where nobody opens."""

    def take_back(self, number: str) -> None: ...


class Tour:
    def __init__(self, courier: Courier) -> None:
        self.courier = courier

    @activity.defn
    def deliver(self, parcel: Parcel) -> str:
        self.courier.deliver(parcel.number, parcel.address)
        return f"delivered at {parcel.address}"

    @activity.defn
    def take_back(self, parcel: Parcel) -> None:
        self.courier.take_back(parcel.number)


@workflow.defn
class Delivery:
    def __init__(self) -> None:
        self.address = self.instead = self.outcome = ""
        self.given_up = False

    @workflow.run
    async def run(self, parcel: Parcel) -> str:
        try:
            self.address = parcel.address
            while not self.outcome:
                await self.try_at(replace(parcel, address=self.address))
        except asyncio.CancelledError:
            await workflow.execute_activity_method(Tour.take_back, parcel, start_to_close_timeout=timedelta(seconds=30))
            raise
        finally:
            self.outcome = self.outcome or "not delivered"  # whoever waits for an answer gets one
            await workflow.wait_condition(workflow.all_handlers_finished)
        return self.outcome

    async def try_at(self, parcel: Parcel) -> None:
        attempts = self.start(parcel)
        try:
            await workflow.wait_condition(lambda: attempts.done() or self.given_up or self.instead != "")
        finally:
            await no_more(attempts)
        try:
            # First what came of it: the parcel may have arrived while somebody stepped in.
            self.outcome = await attempts
        except ActivityError:
            if self.given_up:
                self.outcome = "given up"
            elif self.instead:
                self.address, self.instead = self.instead, ""
            else:
                raise

    def start(self, parcel: Parcel) -> workflow.ActivityHandle[str]:
        wait = timedelta(seconds=parcel.again)
        return workflow.start_activity_method(
            Tour.deliver,
            parcel,
            activity_id=parcel.address,  # an id that people know, so that it is easily named from outside
            start_to_close_timeout=timedelta(seconds=30),
            retry_policy=RetryPolicy(initial_interval=wait, maximum_interval=wait, backoff_coefficient=1),
            # Nothing else is done before the attempt under way has ended, which may be a delivery.
            cancellation_type=ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        )

    @workflow.signal
    def give_up(self) -> None:
        self.given_up = True

    @workflow.update
    async def redirect(self, address: str) -> str:
        """Answers when it is certain. Fails where the parcel arrived before, or was given up."""
        self.instead = address
        await workflow.wait_condition(lambda: self.address == address or self.outcome != "")
        if self.outcome:
            raise ApplicationError(f"too late: {self.outcome}")
        return f"goes to {address}"

    @redirect.validator
    def may_be_redirected(self, address: str) -> None:
        if address in ("", self.address):
            raise ValueError(f"it goes to {self.address}: name another address")


async def no_more(attempts: workflow.ActivityHandle[str]) -> None:
    """Cancel an activity, and wait until it can no longer have an effect."""
    attempts.cancel()
    try:
        await workflow.wait([attempts])
    except asyncio.CancelledError:  # the workflow's own cancellation, which comes once: it waits, too
        await workflow.wait([attempts])
        raise


class Street:
    """A courier for the example: doors are opened one by one, by the number of a parcel."""

    def __init__(self) -> None:
        self.open_to: set[str] = set()
        self.delivered: list[tuple[str, str]] = []

    def deliver(self, number: str, address: str) -> None:
        if address == "home" and number not in self.open_to:
            raise ApplicationError("nobody at home")
        self.delivered.append((number, address))

    def take_back(self, number: str) -> None: ...


async def example_cp_03(client: Client) -> None:
    street = Street()
    tour = Tour(street)
    async with Worker(
        client,
        task_queue="parcels",
        workflows=[Delivery],
        activities=[tour.deliver, tour.take_back],
        activity_executor=ThreadPoolExecutor(10),
    ):
        parcel = Parcel(str(uuid.uuid4()))
        run = await client.start_workflow(Delivery.run, parcel, id=f"parcel-{parcel.number}", task_queue="parcels")
        print(f"The next attempt is an hour away, so: {await run.execute_update(Delivery.redirect, 'office')}")
        print(f"The run ended with {await run.result()!r}. Deliveries: {street.delivered}")


# CP-03 put to the test -------------------------------------------------------------------------------

OPERATOR, FIRST_CALL = "night shift", "deliver at home, attempt 1"


@dataclass
class Visit:
    """A delivery. Its parcel has the number that the workflow has as its id."""

    lab: Lab
    street: Street
    handle: Handle

    @property
    def calls(self) -> list[str]:
        calls = self.lab.calls(self.handle.id)
        return [f"{call.activity} at {call.argument['address']}, attempt {call.attempt}" for call in calls]

    @property
    def delivered(self) -> list[str]:
        return sorted(address for number, address in self.street.delivered if number == self.handle.id)

    def open_door(self) -> None:
        self.street.open_to.add(self.handle.id)

    async def cli(self, operation: str, *options: str) -> None:
        """`temporal activity ...` for the activity at home, by the operator."""
        where = ("--workflow-id", self.handle.id, "--activity-id", "home", "--identity", OPERATOR)
        await by_cli(self.lab, "activity", operation, *where, *options)

    async def failed_once(self) -> bool:
        found = await pending_activity(self.handle)
        return found.attempt >= 2 and found.last_failure.message == "nobody at home"

    async def is_paused(self) -> bool:
        return (await pending_activity(self.handle)).state == PendingActivityState.PENDING_ACTIVITY_STATE_PAUSED

    async def minutes_away(self) -> float:
        """How long the server waits before the next attempt."""
        return (await pending_activity(self.handle)).current_retry_interval.ToTimedelta() / timedelta(minutes=1)


async def visit(
    lab: Lab, street: Street, name: str, again: float = 3600, run: Any = Delivery.run, **options: Any
) -> Visit:
    """Start a delivery."""
    parcel = Parcel(f"{lab.id}-{name}", again=again)
    return Visit(lab, street, await lab.start(run, parcel, name=name, **options))


async def stuck(lab: Lab, street: Street, name: str, again: float = 3600) -> Visit:
    """Start a delivery and wait until its first attempt has failed."""
    one = await visit(lab, street, name, again)
    await until(one.failed_once, "the first attempt has failed")
    return one


@dataclass(frozen=True)
class StepIn:
    """A way to step into a stuck run, what must come of it, and where the history says who did it and why."""

    what: str
    act: Callable[[Visit], Awaitable[object]]
    status: str
    came_of_it: str  # the result, or why it ended
    calls: Sequence[str]
    event: str
    who: str = "identity"
    why: str = ""  # the path of the field, empty where the event has none
    reason: str = ""
    answer: str | None = None

    @property
    def claim(self) -> str:
        return f"{self.what} ends a stuck run as {self.status}"


async def by_reset(one: Visit) -> None:
    """Somebody is at home again: instead of waiting an hour, the run is taken back to before the first attempt."""
    one.open_door()
    one.handle = await reset_before(one.lab.client, one.handle, "home", "somebody is at home")


# Before SDK 1.28 a cancellation takes no reason.
REASON = where_there(WorkflowHandle.cancel, reason="order withdrawn")
STEPS_IN = {
    "cancel": StepIn(
        "cancel, with a last word for the workflow,", lambda one: one.handle.cancel(**REASON),
        "CANCELED", "Workflow cancelled", ["take_back at home, attempt 1"],
        "workflow_execution_cancel_requested", why="cause" if REASON else "", reason="order withdrawn",
    ),
    "terminate": StepIn(
        "terminate, without a last word,", lambda one: one.handle.terminate(reason="parcel lost"),
        "TERMINATED", "parcel lost", [], "workflow_execution_terminated", why="reason", reason="parcel lost",
    ),
    "signal": StepIn(
        "signal", lambda one: one.handle.signal(Delivery.give_up),
        "COMPLETED", "given up", [], "workflow_execution_signaled",
    ),
    "update": StepIn(
        "update, which answers,", lambda one: one.handle.execute_update(Delivery.redirect, "office"),
        "COMPLETED", "delivered at office", ["deliver at office, attempt 1"],
        "workflow_execution_update_accepted", who="accepted_request.meta.identity", answer="goes to office",
    ),
    "reset": StepIn(
        "reset, its cause mended,", by_reset, "COMPLETED", "delivered at home", [FIRST_CALL],
        "workflow_task_failed", why="failure.message", reason="somebody is at home",
    ),
}  # fmt: skip


async def step_in(lab: Lab, street: Street, name: str, way: StepIn) -> tuple[Evidence, str, str]:
    """Step into a stuck run. Returns what came of it, and who did it and why as the history has it."""
    one = await stuck(lab, street, name)
    begun = time.monotonic()
    answer = await way.act(one)
    how = await ended(one.handle)
    seconds = time.monotonic() - begun
    evidence = works(
        way.claim,
        status=equal(how.status, way.status),
        came_of_it=equal(how.result or how.why, way.came_of_it),
        calls=equal(one.calls, [FIRST_CALL, *way.calls]),
        answer=equal(answer, way.answer),
        within=figure(seconds, "s"),
    )
    event = await only_event(one.handle, way.event)
    return evidence, operator.attrgetter(way.who)(event), way.why and operator.attrgetter(way.why)(event)


async def only_event(handle: Handle, kind: str) -> Any:
    """The attributes of the one event of a kind in a history."""
    (found,) = (event for event in await events_of(handle) if kind_of(event) == kind)
    return getattr(found, f"{kind}_event_attributes")


async def from_python(lab: Lab, street: Street) -> list[Evidence]:
    seen = await together(*(step_in(lab, street, *way) for way in STEPS_IN.items()))
    who = {f"{name}_by": who for name, (_, who, _) in zip(STEPS_IN, seen, strict=True)}
    why = {f"why_{name}": why for name, (_, _, why) in zip(STEPS_IN, seen, strict=True)}
    me, reset_by = lab.client.identity, who.pop("reset_by")
    return [
        *(evidence for evidence, _, _ in seen),
        holds(
            "the history says who cancelled, terminated, signalled and updated, and why where a reason is taken",
            **{name: equal(one, me) for name, one in who.items()},
            **{f"why_{name}": equal(why[f"why_{name}"], way.reason) for name, way in STEPS_IN.items() if way.why},
        ),
        limit(
            "who reset a run is not in the history, although the request named them",
            in_the_request=me,
            in_the_history=equal(reset_by, "history-service"),
        ),
    ]


async def forged(lab: Lab, street: Street) -> Evidence:
    """Somebody calls themselves by another's name."""
    one = await stuck(lab, street, "forged")
    client = await connect(lab.target, identity="the managing director")
    await client.get_workflow_handle(one.handle.id).signal(Delivery.give_up)
    await ended(one.handle)
    return limit(
        "who did something is what their client says of itself: the history takes any name",
        it_says=equal((await only_event(one.handle, "workflow_execution_signaled")).identity, "the managing director"),
        though_it_was=lab.client.identity,
    )


async def redirected(one: Visit, address: str = "office") -> str:
    """What an update answers that sends the parcel elsewhere, also when it fails."""
    return await said(one.handle.execute_update(Delivery.redirect, address))


HISTORY = ["WorkflowExecutionStarted Delivery", "ActivityTaskScheduled deliver"]


async def refused_words(lab: Lab, street: Street) -> Evidence:
    one = await stuck(lab, street, "refused")
    return holds(
        "an update that makes no sense is refused by its validator, and leaves no event",
        answer=contains(await redirected(one, "home"), "name another address"),
        history=equal(outline(await one.handle.fetch_history()).splitlines(), HISTORY),
        status=equal(await status_of(one.handle), "RUNNING"),
    )


@workflow.defn
class Hasty(Delivery):
    """The control: it looks at what is asked for, and not first at what came of the attempt."""

    @workflow.run
    async def run(self, parcel: Parcel) -> str:
        attempts = self.start(parcel)
        await workflow.wait_condition(lambda: attempts.done() or self.instead != "")
        if not self.instead:
            return await attempts
        await no_more(attempts)
        self.address = self.instead
        return await self.start(replace(parcel, address=self.address))


SLOWLY = ("moment", "hasty", "under-way", "hurried")  # deliveries at which somebody comes to the door slowly


async def in_one_task(lab: Lab, street: Street) -> list[Evidence]:
    """While no worker takes workflow tasks, the parcel is redirected and delivered: both are in the next task."""
    options: dict[str, Any] = {
        "task_queue": f"{lab.id}-moment",
        # The activities go on, by the item's other worker.
        "shortened": {"deliver": {"task_queue": lab.task_queue, **LONG}},
    }
    async with lab.worker([Delivery, Hasty], **options):
        one = await visit(lab, street, "moment", task_queue=options["task_queue"])
        other = await visit(lab, street, "hasty", run=Hasty.run, task_queue=options["task_queue"])
        await until(lambda: one.calls == other.calls == [FIRST_CALL], "the parcels are on their way")
    answers = [asyncio.ensure_future(redirected(each)) for each in (one, other)]
    for each, name in ((one, "moment"), (other, "hasty")):
        await until(partial(task_waits, each), "the update waits for a worker")
        each.open_door()
        open_gate(lab.gate(name))
        await until(partial(happened, each.handle, "ACTIVITY_TASK_COMPLETED"), "it was delivered")
    async with lab.worker([Delivery, Hasty], **options):
        return [
            await delivered_once(
                "delivered and redirected in the same workflow task: it is delivered once, and the update fails",
                one, answers[0],
            ),
            await delivered_twice("a workflow that looks at the update first delivers twice", other, answers[1]),
        ]  # fmt: skip


async def under_way(lab: Lab, street: Street) -> list[Evidence]:
    """The parcel is redirected while somebody is about to open the door."""
    queue = f"{lab.id}-hurried"
    tries = {"cancellation_type": ActivityCancellationType.TRY_CANCEL, "task_queue": lab.task_queue, **LONG}
    async with lab.worker([Delivery], task_queue=queue, shortened={"deliver": tries}):
        one = await visit(lab, street, "under-way")
        other = await visit(lab, street, "hurried", task_queue=queue)
        await until(lambda: one.calls == other.calls == [FIRST_CALL], "the parcels are on their way")
        answers = [asyncio.ensure_future(redirected(each)) for each in (one, other)]
        for each in (one, other):
            await until(partial(happened, each.handle, "ACTIVITY_TASK_CANCEL_REQUESTED"), "it is cancelled")
            each.open_door()
        await ended(other.handle)  # it does not wait for the attempt under way, so let that end later
        for name in ("under-way", "hurried"):
            open_gate(lab.gate(name))
        await until(lambda: one.delivered and len(other.delivered) == 2, "the attempts under way have ended")
        return [
            await delivered_once(
                "redirected while an attempt is under way: that is waited for, and what it delivers is not delivered "
                "again", one, answers[0],
            ),
            await delivered_twice(
                "cancelled by the SDK's default, TRY_CANCEL, nobody waits for the attempt under way: delivered twice",
                other, answers[1],
            ),
        ]  # fmt: skip


async def delivered_once(claim: str, one: Visit, answer: Awaitable[str]) -> Evidence:
    how = await ended(one.handle)
    return holds(
        claim,
        delivered_at=equal(one.delivered, ["home"]),
        result=equal(how.result, "delivered at home"),
        answer=equal(await answer, "too late: delivered at home"),
    )


async def delivered_twice(claim: str, one: Visit, answer: Awaitable[str]) -> Evidence:
    how = await ended(one.handle)
    delivered_at = equal(one.delivered, ["home", "office"])
    return control(claim, delivered_at=delivered_at, result=how.result, answer=await answer)


async def task_waits(one: Visit) -> bool:
    return (await one.handle.describe()).raw_description.HasField("pending_workflow_task")


PAUSED = "pause stops the attempts of an activity, unpause lets it go on; meanwhile it says who paused it and why"


@piece(holds(PAUSED))
async def pause_activity(lab: Lab, street: Street) -> Evidence:
    """Two deliveries are tried again and again. One is paused, and the other one measures the time."""
    paused, other = await together(*(stuck(lab, street, name, again=0.1) for name in ("paused", "other")))
    await paused.cli("pause", "--reason", "provider is down")
    await until(paused.is_paused, "the activity is paused")
    before, other_before = len(paused.calls), len(other.calls)
    manual = (await pending_activity(paused.handle)).pause_info.manual
    query = f'WorkflowId STARTS_WITH "{lab.id}-paused" AND TemporalPauseInfo = "property:activityType=deliver"'
    await until(lambda: finds(lab.client, query, 1), "visibility lists the paused activity")
    await until(lambda: len(other.calls) >= other_before + 3, "the other one was tried three times")
    still, others = len(paused.calls) - before, len(other.calls) - other_before
    for each in (paused, other):
        each.open_door()
    await ended(other.handle)
    waiting = await status_of(paused.handle)
    await paused.cli("unpause")
    how = await ended(paused.handle)
    return holds(
        PAUSED,
        attempts_while_paused=equal(still, 0),
        of_the_one_not_paused_meanwhile=others,
        with_the_door_open=equal(waiting, "RUNNING"),
        unpaused=equal(how.result, "delivered at home"),
        attempts_after_it=equal(len(paused.calls) - before, 1),
        paused_by=equal(manual.identity, OPERATOR),
        because=equal(manual.reason, "provider is down"),
        listed_by=query,
    )


@activity.defn
async def drive(ledger: str, end: str) -> str:
    """A long activity: it heartbeats how far it came, and a later attempt goes on from there."""
    details = activity.info().heartbeat_details
    done = int(details[0]) if details else 0
    note(ledger, f"attempt {activity.info().attempt} from {done}")
    try:
        while not Path(end).exists():
            await asyncio.sleep(0.1)
            done += 1
            activity.heartbeat(done)
    except asyncio.CancelledError:
        told = activity.cancellation_details()
        note(ledger, f"{'paused' if told and told.paused else 'cancelled'} at {done}")
        raise
    return f"arrived after {done}"


@workflow.defn
class Journey:
    @workflow.run
    async def run(self, ledger: str, end: str) -> str:
        return await workflow.execute_activity(
            drive, args=[ledger, end], activity_id="home", start_to_close_timeout=timedelta(minutes=10),
        )  # fmt: skip


async def pause_running_activity(lab: Lab, street: Street) -> Evidence:
    """An attempt that is under way hears of the pause when it heartbeats."""
    ledger, end = lab.file("drive"), lab.gate("drive")
    one = Visit(lab, street, await lab.start(Journey.run, ledger, end, name="drive"))
    await until(lambda: heartbeats(one), "the drive has heartbeat")
    await one.cli("pause")
    await until(one.is_paused, "the drive is paused")
    await one.cli("unpause")
    await until(lambda: len(notes(ledger)) > 2, "the drive goes on")
    open_gate(end)
    how = await ended(one.handle)
    told = "; ".join(notes(ledger))
    steps = re.fullmatch(r"attempt 1 from 0; paused at (\d+); attempt \d+ from (\d+)", told)
    paused_at, went_on_from = map(int, steps.groups()) if steps else (0, 0)
    return holds(
        "pause reaches an attempt that is under way, and unpause lets it go on from what it had heartbeat",
        the_activity_says=contains(told, "paused at"),
        went_on_from=between(went_on_from, 1, paused_at),
        result=contains(str(how.result), "arrived after"),
    )


async def heartbeats(one: Visit) -> bool:
    return bool((await pending_activity(one.handle)).heartbeat_details.payloads)


async def reset_activity(lab: Lab, street: Street) -> Evidence:
    one = await stuck(lab, street, "activity-reset")
    minutes = await one.minutes_away()
    one.open_door()
    await one.cli("reset")
    how = await ended(one.handle)
    return holds(
        "reset of an activity tries it again at once, and counts its attempts anew",
        the_retry_was_minutes_away=at_least(minutes, 59),
        calls=equal(one.calls, [FIRST_CALL, FIRST_CALL]),
        result=equal(how.result, "delivered at home"),
    )


async def new_options(lab: Lab, street: Street) -> Evidence:
    one = await stuck(lab, street, "activity-options")
    minutes, begun = await one.minutes_away(), time.monotonic()
    await one.cli("update-options", "--retry-initial-interval", "100ms", "--retry-maximum-interval", "100ms")
    await until(lambda: len(one.calls) >= 2, "the activity is tried again")
    again = time.monotonic() - begun
    one.open_door()
    how = await ended(one.handle)
    return holds(
        "new options take effect in an activity that already waits: a retry due in an hour comes at once",
        the_retry_was_minutes_away=at_least(minutes, 59),
        tried_again_after=figure(again, "s"),
        calls=equal(one.calls, [f"deliver at home, attempt {n}" for n in range(1, len(one.calls) + 1)]),
        result=equal(how.result, "delivered at home"),
    )


async def complete_by_hand(lab: Lab, street: Street) -> Evidence:
    """The neighbour took the parcel: nobody needs to try again, and the workflow goes on with that answer."""
    one = await stuck(lab, street, "by-hand")
    await one.cli("complete", "--result", json.dumps("left with the neighbour"))
    how = await ended(one.handle)
    return holds(
        "an activity is completed by hand with a result, and the history says by whom",
        result=equal(how.result, "left with the neighbour"),
        calls=equal(one.calls, [FIRST_CALL]),
        completed_by=equal((await only_event(one.handle, "activity_task_completed")).identity, OPERATOR),
    )


# Operations on a single activity, and the deliveries that were helped by them.
SILENT = {"pause and unpause": "hushed", "reset": "activity-reset", "new options": "activity-options"}
NO_TRACE = "pause and unpause, reset, or new options of an activity leave no event: afterwards nobody can tell of them"


@piece(limit(NO_TRACE))
async def no_trace(lab: Lab, street: Street) -> Evidence:
    """The histories of deliveries that were paused, reset and changed, beside that of one that just went well."""
    await hush(lab, street)
    smooth = await visit(lab, street, "smooth")
    smooth.open_door()
    await ended(smooth.handle)
    expected = outline(await smooth.handle.fetch_history())
    handles = {name: lab.client.get_workflow_handle(f"{lab.id}-{id}") for name, id in SILENT.items()}
    if untried := [name for name, handle in handles.items() if not await is_closed(handle)]:
        return not_run("limit", NO_TRACE, f"not to be had here: {', '.join(untried)}")
    histories = {name: await handle.fetch_history() for name, handle in handles.items()}
    by_hand = await lab.client.get_workflow_handle(f"{lab.id}-by-hand").fetch_history()
    silent = [name for name, history in histories.items() if outline(history) == expected and not tells(history)]
    return limit(
        NO_TRACE,
        without_a_trace=equal(silent, list(SILENT)),
        completed_by_hand_names_the_operator=equal(tells(by_hand), True),
    )


def tells(history: WorkflowHistory) -> bool:
    """Whether a history names the operator."""
    return OPERATOR in str(list(history.events))


async def hush(lab: Lab, street: Street) -> None:
    """Pause a delivery and let it go on; without a reason, which not every command line takes."""
    one = await stuck(lab, street, "hushed", again=0.1)
    await one.cli("pause")
    await until(one.is_paused, "the activity is paused")
    one.open_door()
    await one.cli("unpause")
    await ended(one.handle)


OF_PAUSED = "a workflow that was paused (experimental, and switched on here by a setting)"
NOT_DESCRIBED = f"the Python client cannot describe {OF_PAUSED}"
NOT_LISTED = f"the Python client cannot list runs among which is {OF_PAUSED}"


@piece(limit(NOT_DESCRIBED), limit(NOT_LISTED))
async def pause_workflow(lab: Lab, street: Street) -> list[Evidence]:
    """A whole workflow is paused, which has to be allowed on the server, and looked at from Python."""
    why = ("--reason", "look into it")
    refused = await lab.cli("workflow", "pause", "--workflow-id", f"{lab.id}-nobody", *why)
    async with lab.private_server(settings={"frontend.WorkflowPauseEnabled": "true"}) as server:
        handle = await lab.start(Delivery.run, Parcel("p"), name="p", task_queue="nobody", server=server)
        await by_cli(lab, "workflow", "pause", "--workflow-id", handle.id, *why, server=server)
        shown = await lab.cli("workflow", "describe", "--workflow-id", handle.id, server=server)
        event = (await count_events(handle))["WORKFLOW_EXECUTION_PAUSED"]
        errors = [await error_of(handle.describe()), await error_of(listed(server.client))]
    if event != 1 or "look into it" not in shown.out:
        raise RuntimeError(f"the workflow was not paused: {shown.err or event}")
    broken, without = "not a valid WorkflowExecutionStatus", refused.err.partition("\n")[0]
    return [
        limit(NOT_DESCRIBED, it=contains(errors[0], broken), without_setting=without),
        limit(NOT_LISTED, it=contains(errors[1], broken)),
    ]


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
        from_python, forged, refused_words, in_one_task, under_way, pause_activity, pause_running_activity,
        reset_activity, new_options, complete_by_hand, pause_workflow,
    )  # fmt: skip
    street = Street()
    tour = Tour(street)
    faults = [hold("deliver", lab.gate(name), address="home", silent=True).of(f"{lab.id}-{name}") for name in SLOWLY]
    activities: list[Callable[..., Any]] = [tour.deliver, tour.take_back, drive]
    options: dict[str, Any] = {"shortened": {"deliver": LONG}, **PROMPT}
    async with lab.worker([Delivery, Journey], activities, faults=faults, **options):
        twin = await stuck(lab, street, "twin")
        try:
            async for evidence in side_by_side(*(part(lab, street) for part in parts)):
                yield evidence
        finally:
            for name in SLOWLY:
                open_gate(lab.gate(name))
        for evidence in await no_trace(lab, street):
            yield evidence
        twin.open_door()  # as for the others, the cause is gone; but nobody steps in
        status, minutes = await status_of(twin.handle), await twin.minutes_away()
    yield control(
        "a twin that nobody touches stays stuck",
        status=equal(status, "RUNNING"),
        calls=equal(twin.calls, [FIRST_CALL]),
        minutes_from_attempt_to_attempt=at_least(minutes, 59),
    )
    yield native(
        "cancel, terminate, signal and update need nothing but the run's id, a reset also an event of its history",
        WorkflowHandle.cancel,
        WorkflowHandle.terminate,
        WorkflowHandle.signal,
        WorkflowHandle.execute_update,
        WorkflowHandle.describe,
        WorkflowHandle.fetch_history_events,
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


@dataclass
class Order:
    number: str
    address: str
    amount: int = 100


class Shop(Protocol):
    """Whoever takes the money and sends the goods. What is asked twice under one key counts once."""

    def pay(self, key: str, amount: int) -> None: ...

    def ship(self, key: str, address: str) -> None:
        """Raises where there is no such address."""


class Counter:
    # The key is made of the order's number, and so is the same in a reset run, and in another workflow for the same
    # order; the ids of runs and activities are not. It means that an order is paid once: whoever is to pay a second
    # time, for good reasons, needs a key of its own.

    def __init__(self, shop: Shop) -> None:
        self.shop = shop

    @activity.defn
    def pay(self, order: Order) -> None:
        self.shop.pay(order.number, order.amount)

    @activity.defn
    def ship(self, order: Order) -> None:
        self.shop.ship(order.number, order.address)


@workflow.defn
class Fulfilment:
    @workflow.run
    async def run(self, order: Order) -> str:
        await workflow.execute_activity_method(Counter.pay, order, start_to_close_timeout=timedelta(seconds=30))
        await workflow.execute_activity_method(
            Counter.ship,
            order,
            start_to_close_timeout=timedelta(seconds=30),
            # Without a limit the run would not fail, and be no dead letter, but try for ever.
            retry_policy=RetryPolicy(maximum_attempts=3),
        )
        return "shipped"


FAILED_ORDERS = 'WorkflowType = "Fulfilment" AND ExecutionStatus = "Failed"'


async def dead_letters(client: Client, query: str = FAILED_ORDERS) -> dict[str, str]:
    """Each failed run that was not driven again since, by workflow id, with its last failure."""
    letters = {}
    async for one in client.list_workflows(query):
        letter = client.get_workflow_handle(one.id, run_id=one.run_id)
        described = (await letter.describe()).raw_description
        if not described.workflow_extended_info.reset_run_id:
            letters[one.id] = await last_failure(letter)
    return letters


async def last_failure(run: WorkflowHandle[Any, Any]) -> str:
    try:
        await run.result()
    except WorkflowFailureError as failure:
        return str(failure.cause.__cause__ or failure.cause)
    return "none"


async def drive_again(client: Client, reason: str, query: str = FAILED_ORDERS) -> None:
    """Reset every run that the query finds to its beginning, in one batch that the server works off.

    Raises RPCError with RESOURCE_EXHAUSTED while the namespace works off another one. The command line does the same:
    temporal workflow reset --query ... --type FirstWorkflowTask --reason ... --yes
    """
    request = StartBatchOperationRequest(
        namespace=client.namespace,
        visibility_query=query,
        job_id=str(uuid.uuid4()),
        reason=reason,
        reset_operation=BatchOperationReset(
            identity=client.identity, options=ResetOptions(first_workflow_task=Empty())
        ),
    )
    await client.workflow_service.start_batch_operation(request)


class Warehouse:
    """A shop for the example. What is addressed to an unknown place cannot be shipped, until somebody learns of it."""

    def __init__(self, *unknown: str) -> None:
        self.unknown = {*unknown}
        self.paid: dict[str, int] = {}
        self.shipped: set[str] = set()

    def pay(self, key: str, amount: int) -> None:
        self.paid[key] = amount

    def ship(self, key: str, address: str) -> None:
        if address in self.unknown:
            raise ApplicationError(f"there is no address {address}")
        self.shipped.add(key)


async def example_cp_04(client: Client) -> None:
    warehouse = Warehouse("Nowhere")
    counter = Counter(warehouse)
    async with Worker(
        client,
        task_queue="orders",
        workflows=[Fulfilment],
        activities=[counter.pay, counter.ship],
        activity_executor=ThreadPoolExecutor(10),
    ):
        order = Order(str(uuid.uuid4()), "Nowhere")
        run = await client.start_workflow(Fulfilment.run, order, id=f"order-{order.number}", task_queue="orders")
        print(f"The order failed: {await last_failure(run)}")
        this_one = f'{FAILED_ORDERS} AND WorkflowId = "{run.id}"'
        async with asyncio.timeout(60):
            while not (letters := await dead_letters(client, this_one)):
                await asyncio.sleep(0.1)  # what is listed lags behind a little
        print(f"Dead letters: {letters}")
        warehouse.unknown.clear()
        await drive_again(client, "address mended", this_one)
        async with asyncio.timeout(60):
            while await dead_letters(client, this_one):
                await asyncio.sleep(0.1)  # the server works the batch off
        result = await client.get_workflow_handle(run.id).result()
        print(f"Driven again, it was {result}. Paid: {warehouse.paid}")


# CP-04 put to the test -------------------------------------------------------------------------------

LIMIT = 3  # attempts to ship, in the lesson
ORDERS, POISON = range(1, 9), (2, 5, 7)
NOWHERE = "there is no address Nowhere"


@workflow.defn
class Endless:
    """The control: no limit to the attempts."""

    @workflow.run
    async def run(self, order: Order) -> None:
        policy = RetryPolicy(initial_interval=timedelta(milliseconds=100), backoff_coefficient=1)
        await workflow.execute_activity_method(
            Counter.ship, order, start_to_close_timeout=timedelta(seconds=30), retry_policy=policy
        )


@workflow.defn
class ByRun(Fulfilment):
    """The control: the key is made of the run's id, which a reset changes."""

    @workflow.run
    async def run(self, order: Order) -> str:
        return await super().run(replace(order, number=f"{order.number}/{workflow.info().run_id}"))


class Market:
    """Where orders are tried: a shop, and a worker that does one activity at a time."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.shop = lab, Warehouse("Nowhere", "Neverland")
        self.counter = Counter(self.shop)
        self.failed = f'{FAILED_ORDERS} AND WorkflowId STARTS_WITH "{lab.id}-order-"'
        self.ids = {number: f"{lab.id}-order-{number}" for number in ORDERS}

    async def start(self, name: object, address: str, run: Any = Fulfilment.run, **options: Any) -> Any:
        """Start the fulfilment of an order whose number is the workflow's id."""
        id = f"{self.lab.id}-order-{name}"
        return await self.lab.start(run, Order(id, address), id=id, **options)

    def attempts(self, id: str, activity: str = "ship") -> int:
        return [call.activity for call in self.lab.calls(id)].count(activity)

    def paid(self) -> list[int]:
        """Of the eight orders: the calls to pay, and the payments."""
        return [
            sum(self.attempts(id, "pay") for id in self.ids.values()),
            len([key for key in self.shop.paid if key.startswith(tuple(self.ids.values()))]),
        ]

    async def gets_nowhere(self, handle: Handle) -> bool:
        return self.attempts(handle.id) > 2 * LIMIT or await is_closed(handle)

    async def drive_again(self, reason: str) -> None:
        """Drive again what the query finds, as soon as the namespace has no other batch to work off."""

        async def accepted() -> bool:
            try:
                await drive_again(self.lab.client, reason, self.failed)
            except RPCError as error:
                if error.status != RPCStatusCode.RESOURCE_EXHAUSTED:
                    raise
                return False
            return True

        await until(accepted, "the batch was accepted")


async def orders_with_poison(market: Market) -> list[Evidence]:
    """Eight orders, three of which cannot be shipped; their address is then mended and they are driven again."""
    handles = [await market.start(n, "Nowhere" if n in POISON else "Old Street") for n in ORDERS]
    parked = parked_after_attempts(market, [await ended(handle) for handle in handles])
    await until(lambda: finds(market.lab.client, market.failed, len(POISON)), "the failed runs are listed")
    letters = await dead_letters(market.lab.client, market.failed)
    return [
        parked,
        works(
            "a query lists exactly the failed runs, each with its last failure",
            listed=equal(dict(sorted(letters.items())), {market.ids[number]: NOWHERE for number in POISON}),
            query=market.failed,
        ),
        *await mended_and_driven_again(market, handles),
    ]


DRIVEN_AGAIN = "with the cause mended, one batch drives them again, and all complete"
PAID_ONCE = "driven again, even twice, nothing is paid twice: the key is made of the order's number"
STAYS = "a failed run stays listed as failed when its successor has completed: the same batch drives it once more"


@piece(works(DRIVEN_AGAIN), holds(PAID_ONCE), limit(STAYS))
async def mended_and_driven_again(market: Market, handles: Sequence[Handle]) -> list[Evidence]:
    market.lab.needs("batch operations")
    client, shop = market.lab.client, market.shop
    shop.unknown.remove("Nowhere")
    await market.drive_again("address mended")
    await driven_again(client, [handles[number - 1] for number in POISON])
    endings = [await ended(client.get_workflow_handle(handle.id)) for handle in handles]
    left, once = await dead_letters(client, market.failed), market.paid()
    again = await same_batch_again(market)
    return [
        works(
            DRIVEN_AGAIN,
            results=equal([one.result for one in endings], ["shipped"] * len(ORDERS)),
            shipped=equal(sorted(shop.shipped), [market.ids[number] for number in ORDERS]),
            dead_letters_left=equal(left, {}),
        ),
        holds(
            PAID_ONCE,
            calls_to_pay_and_payments=equal(once, [len(ORDERS) + len(POISON), len(ORDERS)]),
            after_the_same_batch_once_more=equal(market.paid(), [len(ORDERS) + 2 * len(POISON), len(ORDERS)]),
        ),
        again,
    ]


def parked_after_attempts(market: Market, endings: Sequence[Ending]) -> Evidence:
    attempts = {number: market.attempts(id) for number, id in market.ids.items()}
    hows = {number: ending.result or ending.why for number, ending in zip(ORDERS, endings, strict=True)}
    return holds(
        f"a poison item is parked after {LIMIT} attempts, while the rest go on",
        attempts_to_ship_by_order=equal(attempts, {number: LIMIT if number in POISON else 1 for number in ORDERS}),
        ended_with=equal(hows, {number: NOWHERE if number in POISON else "shipped" for number in ORDERS}),
        activities_at_a_time=1,
    )


async def same_batch_again(market: Market) -> Evidence:
    """Every order is completed. Does the query know?"""
    before, found = market.paid()[0], await listed(market.lab.client, market.failed)
    await market.drive_again("the same again")
    if found:
        await until(lambda: market.paid()[0] >= before + len(POISON), "they were driven again")
        for number in POISON:
            await ended(market.lab.client.get_workflow_handle(market.ids[number]))
    return limit(
        STAYS,
        listed_after_all_were_completed=len(found),
        calls_to_pay_repeated=at_least(market.paid()[0] - before, 1),
        told_apart_by="describe (reset_run_id)",
    )


async def by_run(market: Market) -> Evidence:
    """The twin of a poison item, driven again in the same way, pays under a key of the run's id."""
    handle = await market.start("by-run", "Neverland", ByRun.run)
    await ended(handle)
    again = await reset_before(market.lab.client, handle, "1", "address mended")  # its first activity is to pay
    await ended(again)
    return control(
        "with a key made of the run's id, an order that is driven again is paid again",
        calls_to_pay=equal(market.attempts(handle.id, "pay"), 2),
        payments=equal(len([key for key in market.shop.paid if key.startswith(handle.id)]), 2),
    )


async def retrying_runs(client: Client, query: str, attempts: int) -> dict[str, str]:
    """Each running run with an activity at its n-th attempt or later, by workflow id, with its last failure."""
    found = {}
    async for one in client.list_workflows(query):
        latest = await pending_activity(client.get_workflow_handle(one.id, run_id=one.run_id))
        if latest.attempt >= attempts:
            found[one.id] = latest.last_failure.message
    return found


@workflow.defn
class LookUp:
    @workflow.run
    async def run(self, addresses: dict[str, str]) -> str:
        address = addresses["home"]  # a bug is no failure of the run: its workflow task is tried again, for ever
        await workflow.wait_condition(lambda: False)
        return address


STUCK = "a run that is stuck in its own code, not failed, is found by a query, and a healthy one is not"


@piece(holds(STUCK))
async def stuck_in_code(market: Market) -> Evidence:
    """A run whose code raises stays RUNNING."""
    lab = market.lab
    # A setting that no user has, so that it is seen in seconds.
    threshold = {"system.numConsecutiveWorkflowTaskProblemsToTriggerSearchAttribute": "2"}  # 5
    query = 'ExecutionStatus = "Running" AND TemporalReportedProblems IS NOT NULL'
    # A failure after the first one only counts when the workflow task has timed out.
    patience = soon()
    async with lab.private_server(settings=threshold) as server, lab.worker([LookUp], server=server):
        healthy, stuck = [
            await lab.start(LookUp.run, addresses, name=name, server=server, task_timeout=patience)
            for name, addresses in (("healthy", {"home": "Old Street"}), ("stuck", {}))
        ]
        seconds = await until(lambda: listed(server.client, query), "the stuck run is listed")
        found, messages = await listed(server.client, query), await failed_tasks(stuck)
        both = [await status_of(handle) for handle in (healthy, stuck)]
        well = (await count_events(healthy))["WORKFLOW_TASK_COMPLETED"]
    return holds(
        STUCK,
        found=equal(found, [stuck.id]),
        both_are=equal(both, ["RUNNING", "RUNNING"]),
        its_workflow_task_failed_with=equal(messages[:1], ["'home'"]),
        completed_by_the_healthy_one=equal(well, 1),
        query=query,
        after=figure(seconds, "s"),
        threshold_lowered_to_failures=2,
        workflow_tasks_shortened_to=figure(patience.total_seconds(), "s"),
    )


async def endless(market: Market) -> list[Evidence]:
    """The poison item without a limit: it is no dead letter, but a running run that gets nowhere."""
    lab, handle = market.lab, await market.start("endless", "Neverland", Endless.run)
    waiting = await market.start("waiting", "Old Street", start_delay=timedelta(hours=1))
    await until(lambda: market.gets_nowhere(handle), "many attempts were made, or it has ended")
    every = f'WorkflowId STARTS_WITH "{lab.id}-order-"'
    running, failed = f'{every} AND ExecutionStatus = "Running"', f'{every} AND ExecutionStatus = "Failed"'
    await until(lambda: all_listed(lab.client, every, handle.id, waiting.id), "both are listed")
    await until(lambda: listed(lab.client, failed), "an order that does have a limit is listed as failed")
    found = await retrying_runs(lab.client, running, attempts=LIMIT + 2)
    return [
        control(
            "without a limit to its attempts the poison item goes on retrying, and is no failed run",
            attempts=at_least(market.attempts(handle.id), 2 * LIMIT + 1),
            status=equal(await status_of(handle), "RUNNING"),
            among_the_failed=lacks(sorted(await listed(lab.client, failed)), handle.id),
        ),
        holds(
            "a run stuck in retries is found by asking each running run for its pending activities, and one that "
            "waits is not",
            found=equal(found, {handle.id: "there is no address Neverland"}),
            at_attempt_or_later=LIMIT + 2,
            listed_and_described_one_by_one=running,
        ),
    ]


async def all_listed(client: Client, query: str, *ids: str) -> bool:
    return set(ids) <= set(await listed(client, query))


@CP.item("CP-04", "Dead letters")
async def dead_letter_items(lab: Lab) -> AsyncIterator[Evidence]:
    """Orders fail for good, are listed, mended and driven again; a shop outside Temporal counts the effects."""
    market = Market(lab)
    activities = [market.counter.pay, market.counter.ship]
    async with lab.worker([Fulfilment, Endless, ByRun], activities, max_concurrent_activities=1):
        parts = (orders_with_poison, by_run, endless, stuck_in_code)
        async for evidence in side_by_side(*(part(market) for part in parts)):
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
        names_with_dead_letter_or_dlq_in_the_SDK_and_the_API=equal(found, []),
    )


if __name__ == "__main__":
    run(CP)
