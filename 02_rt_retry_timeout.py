"""RT: retries and timeouts - what is tried again, when it is given up, and how a stall is noticed.

An activity that fails is not an exception to handle, it is an attempt that the server repeats by a
policy. An activity that does not answer is bounded by timeouts, and the server keeps those clocks, so
that they run whether or not a worker lives. The four items ask whether the policy is obeyed, whether
each clock fires, what protects a service that is down from its callers, and what a heartbeat adds.
"""

from common import (
    Category,
    Evidence,
    Target,
    at_least,
    at_most,
    between,
    connect,
    contains,
    control,
    equal,
    figure,
    holds,
    limit,
    native,
    one_of,
    piece,
    side_by_side,
    slowness,
    works,
)
from lab import (
    PATIENT,
    PROMPT,
    Books,
    Call,
    Fault,
    Handle,
    Lab,
    Server,
    count_events,
    die_before,
    ended,
    event_times,
    fail,
    happened,
    history_of,
    hold,
    is_closed,
    keywords_in,
    name_of,
    note,
    notes,
    open_gate,
    outline,
    pace,
    pending,
    run,
    soon,
    status_of,
    until,
    withhold,
)

import asyncio
import contextlib
import inspect
import io
import os
import random
import signal
import time
import tokenize
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import nexusrpc
import nexusrpc.handler
import temporalio
from temporalio import activity, exceptions, workflow
from temporalio.api.enums.v1 import PendingNexusOperationState, TimeoutType
from temporalio.api.failure.v1 import Failure
from temporalio.client import (
    AsyncActivityCancelledError,
    AsyncActivityHandle,
    Client,
    WorkflowUpdateFailedError,
)
from temporalio.common import RetryPolicy
from temporalio.converter import DataConverter
from temporalio.exceptions import ActivityError, ApplicationError
from temporalio.service import RPCError
from temporalio.worker import Worker

RT = Category(
    "RT",
    "Retries and timeouts",
    "What is tried again, when is it given up, and how is a stall noticed?",
)


# What the items share --------------------------------------------------------------------------------


def attempts(calls: Sequence[Call]) -> list[int]:
    return [call.attempt for call in calls]


def story(lab: Lab, workflow: str) -> list[str]:
    """What the ledger has of a workflow's activity, oldest first: what each attempt did, such as "begun 1"."""
    return [f"{call.what} {call.attempt}" for call in lab.calls(workflow, "")]


def timeouts_in(failure: Failure) -> list[str]:
    """The types of the timeouts in a failure and its causes, outermost first, such as "HEARTBEAT"."""
    found = failure.timeout_failure_info.timeout_type
    here = [TimeoutType.Name(found).removeprefix("TIMEOUT_TYPE_")] if found else []
    return here + (timeouts_in(failure.cause) if failure.HasField("cause") else [])


async def gave_up(handle: Handle) -> list[str]:
    """The timeouts that a run's history tells of: those of attempts that were retried, and of activities lost."""
    found = []
    for event in (await handle.fetch_history()).events:
        found += timeouts_in(event.activity_task_started_event_attributes.last_failure)
        found += timeouts_in(event.activity_task_timed_out_event_attributes.failure)
    return found


# RT-01 Retry strategy --------------------------------------------------------------------------------
# A failed attempt is repeated by the server, by a policy that is data: the activity has no retry loop, and the
# workflow sees the last attempt only. The activity says what went wrong, and what no retry can mend.


@dataclass
class Payment:
    order: str  # what the provider counts once, however often it is told
    cents: int


@dataclass
class Answer:
    status: int  # as HTTP has it
    retry_after: float = 0  # seconds


class Provider(Protocol):
    """Whoever moves the money. An order that is charged twice counts once."""

    def charge(self, order: str, cents: int) -> Answer: ...


class Payments:
    """Activities are methods, so that what they work with is handed in and need not travel through histories."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider

    @activity.defn
    def charge(self, payment: Payment) -> str:
        """One attempt. Raises what went wrong, by type; the policy decides what follows from it."""
        answer = self.provider.charge(payment.order, payment.cents)
        if answer.status == 200:
            return "paid"
        if answer.status == 400:
            # However often it is sent, whoever sends it: the error says so itself.
            raise ApplicationError("the payment is not valid", type="BadRequest", non_retryable=True)
        if answer.status == 402:
            raise ApplicationError("the card was declined", type="CardDeclined")
        if answer.status == 429:
            # The server adds no jitter: those who are sent away together would come back together.
            delay = timedelta(seconds=answer.retry_after * random.uniform(1, 2))
            raise ApplicationError("too many requests", type="Busy", next_retry_delay=delay)
        raise ApplicationError(f"the provider answered {answer.status}", type="Unavailable")


RETRIES = RetryPolicy(
    initial_interval=timedelta(seconds=1),
    backoff_coefficient=2,
    maximum_interval=timedelta(minutes=1),
    maximum_attempts=10,
    non_retryable_error_types=["CardDeclined"],  # this caller has no second card; another one may try again
)


@workflow.defn
class Checkout:
    @workflow.run
    async def run(self, payment: Payment) -> str:
        return await workflow.execute_activity_method(
            Payments.charge, payment, start_to_close_timeout=timedelta(seconds=30), retry_policy=RETRIES
        )


class Flaky:
    """A provider for the example: it answers at the third call."""

    def __init__(self) -> None:
        self.calls = 0

    def charge(self, order: str, cents: int) -> Answer:
        self.calls += 1
        return Answer(200 if self.calls == 3 else 503)


async def example_rt_01(client: Client) -> None:
    provider = Flaky()
    async with Worker(
        client,
        task_queue="checkout",
        workflows=[Checkout],
        activities=[Payments(provider).charge],
        activity_executor=ThreadPoolExecutor(10),
    ):
        payment = Payment(str(uuid.uuid4()), 1200)
        result = await client.execute_workflow(
            Checkout.run, payment, id=f"checkout-{payment.order}", task_queue="checkout"
        )
        print(f"The order is {result}, after {provider.calls} calls of the provider")


# RT-01 put to the test -------------------------------------------------------------------------------

OK, INVALID, DECLINED, DOWN = Answer(200), Answer(400), Answer(402), Answer(503)

POLICIES = {
    "once": RetryPolicy(maximum_attempts=1),
    "four": RetryPolicy(initial_interval=timedelta(milliseconds=100), maximum_attempts=4),
    "long": RetryPolicy(initial_interval=timedelta(seconds=20), backoff_coefficient=1),
    "growing": RetryPolicy(
        initial_interval=timedelta(seconds=0.5), backoff_coefficient=4, maximum_interval=timedelta(seconds=2.5)
    ),
    "flat": RetryPolicy(initial_interval=timedelta(seconds=2), backoff_coefficient=1),
}
GROWING, FLAT = [0.5, 2.0, 2.5, 2.5], [2.0] * 4  # seconds between five attempts; without the cap 0.5, 2, 8, 32
LATE = 1.0  # seconds that the quickest of several equal attempts may come too late


def stretched(policy: RetryPolicy, factor: float) -> RetryPolicy:
    """The same policy for a slower machine: its intervals are `factor` times as long."""
    longest = policy.maximum_interval
    first, longest = policy.initial_interval * factor, longest and longest * factor
    return replace(policy, initial_interval=first, maximum_interval=longest)


@dataclass
class Script:
    """A provider that answers an order as was agreed for it, the last answer again and again; others not at all."""

    answers: dict[str, list[Answer]] = field(default_factory=dict)

    def charge(self, order: str, cents: int) -> Answer:
        left = self.answers.get(order, [DOWN])
        return left.pop(0) if len(left) > 1 else left[0]


@workflow.defn
class Paying:
    """The same call under another policy, for several orders at once."""

    @workflow.run
    async def run(self, orders: list[str], policy: str, factor: float) -> None:
        calls = (
            workflow.execute_activity_method(
                Payments.charge,
                Payment(order, 100),
                start_to_close_timeout=PATIENT,
                retry_policy=stretched(POLICIES[policy], factor),
            )
            for order in orders
        )
        await asyncio.gather(*calls)


@dataclass(frozen=True)
class Case:
    """One order: how the provider answers it, and what must come of it."""

    kind: Callable[..., Evidence]
    claim: str
    answers: Sequence[Answer]
    attempts: list[int]
    why: str = ""  # the workflow fails, and says this
    policy: str = ""  # of POLICIES instead of the lesson's own


CASES = {
    "third": Case(
        works, "two attempts fail, the third succeeds, and the workflow sees only that", [DOWN, DOWN, OK], [1, 2, 3]
    ),
    "once": Case(
        control, "maximum_attempts=1: the same service fails the workflow", [DOWN, DOWN, OK], [1], "answered 503",
        "once",
    ),
    "listed": Case(
        holds, "an error whose type the policy lists stops at the first attempt", [DECLINED, OK], [1], "declined"
    ),
    "marked": Case(
        holds, "an error that says itself that no retry can help stops at the first attempt", [INVALID, OK], [1],
        "not valid",
    ),
    "other": Case(
        holds, "another error is retried until the attempts are used up", [DOWN], [1, 2, 3, 4], "answered 503", "four"
    ),
}  # fmt: skip

# What is in the history, whatever became of earlier attempts; the one that was taken is told with its start.
HISTORY = """\
WorkflowExecutionStarted Checkout
ActivityTaskScheduled charge
ActivityTaskStarted
ActivityTaskCompleted
WorkflowExecutionCompleted"""


class Desk:
    """Where payments are tried: one worker, and a provider that answers each order as is agreed for it."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.provider = lab, Script()

    def worker(self) -> Worker:
        return self.lab.worker([Checkout, Paying], [Payments(self.provider).charge])

    def orders(self, name: str, answers: Sequence[Answer], count: int = 1) -> list[str]:
        """So many orders that are answered like this."""
        orders = [f"{self.lab.id}-{name}/{number}" for number in range(count)]
        self.provider.answers |= {order: list(answers) for order in orders}
        return orders

    async def pay(
        self, name: str, answers: Sequence[Answer], policy: str = "", count: int = 1, **options: Any
    ) -> Handle:
        """Start a workflow that pays: the lesson's, or under another policy that of so many orders."""
        orders = self.orders(name, answers, count)
        if policy:
            return await self.lab.start(Paying.run, orders, policy, pace(), name=name)
        return await self.lab.start(Checkout.run, Payment(orders[0], 100), name=name, **options)

    async def try_case(self, name: str, case: Case) -> Evidence:
        handle = await self.pay(name, case.answers, case.policy)
        how, calls = await ended(handle), self.lab.calls(handle.id)
        failed = case.attempts if case.why else case.attempts[:-1]
        facts = {
            "attempts_that_ran": equal(attempts(calls), case.attempts),
            "failed": equal(attempts(self.lab.calls(handle.id, "failed")), failed),
        }
        if case.why:
            return case.kind(case.claim, **facts, status=equal(how.status, "FAILED"), why=contains(how.why, case.why))
        history = await handle.fetch_history()
        started = [event.activity_task_started_event_attributes.attempt for event in history.events]
        facts |= {
            "result": equal(how.result, "paid"),
            "history": equal(outline(history), HISTORY),
        }
        return case.kind(case.claim, **facts, started_at_attempt=equal(sum(started), case.attempts[-1]))

    def gaps(self, workflow: str) -> dict[int, list[float]]:
        """By attempt, the seconds from the failure before it to its beginning, as the ledger has them."""
        starts = {(call.argument["order"], call.attempt): call.at for call in self.lab.calls(workflow)}
        found: dict[int, list[float]] = {}
        for call in self.lab.calls(workflow, "failed"):
            if next_one := starts.get((call.argument["order"], call.attempt + 1)):
                found.setdefault(call.attempt + 1, []).append(next_one - call.at)
        return found


async def retry_after(desk: Desk) -> Evidence:
    """The provider says when to come back, as with HTTP's Retry-After; the policy alone would wait 20 s."""
    busy = Answer(429, retry_after=1.5)
    handle = await desk.pay("after", [busy, busy, OK], "long")
    how = await ended(handle)
    gaps = [gap for gaps in desk.gaps(handle.id).values() for gap in gaps]
    return holds(
        "next_retry_delay in the error overrides the policy's interval",
        policy=figure(20 * pace(), "s"),
        asked_for="1.5 to 3 s",
        gaps=equal(len(gaps), 2),
        shortest=at_least(figure(min(gaps), "s"), 1.5),
        longest=at_most(figure(max(gaps), "s"), 19 * pace()),
        attempts_that_ran=equal(attempts(desk.lab.calls(handle.id)), [1, 2, 3]),
        status=equal(how.status, "COMPLETED"),
    )


async def whole_workflow(desk: Desk) -> Evidence:
    """Workflows have no retry policy unless they are given one. Each retry is another run with the same id."""
    policy = RetryPolicy(initial_interval=timedelta(milliseconds=100), maximum_attempts=3)
    retried = await desk.pay("whole", [DECLINED, DECLINED, OK], retry_policy=policy)
    single = await desk.pay("single", [DECLINED, OK])
    await asyncio.gather(ended(retried), ended(single))
    runs = [call.run for call in desk.lab.calls(retried.id)]
    handles = [desk.lab.client.get_workflow_handle(retried.id, run_id=run) for run in runs]
    return holds(
        "a retry policy on the workflow repeats the workflow as a whole; without one it fails at once",
        runs_of_one_id=equal(len(set(runs)), 3),
        which_ended=equal([await status_of(one) for one in handles], ["FAILED", "FAILED", "COMPLETED"]),
        runs_without_a_policy=equal(len(desk.lab.calls(single.id)), 1),
        which_then=equal(await status_of(single), "FAILED"),
    )


async def count_survives_kill(lab: Lab) -> Evidence:
    """Attempt 1 fails, attempt 2 is killed with its worker. The server counts, so the next worker has two left.

    On a slow machine an attempt may be given up before it begins, and then counts without having run: the third, and
    so may the last.
    """
    gate = lab.gate("killed")
    taken = await lab.take_over(
        Paying.run,
        ["killed"],
        "four",
        pace(),
        name="killed",
        parts={
            "workflows": [Paying],
            "activities": [Payments(Script()).charge],
            "faults": [fail("charge", 1), hold("charge", gate, silent=True)],
            "shortened": {"charge": {"start_to_close_timeout": soon()}},
        },
        point=lambda: attempts(lab.calls(f"{lab.id}-killed")) == [1, 2],
        meanwhile=lambda: open_gate(gate),
    )
    return holds(
        "worker killed inside a retry: the next worker goes on with the count, and stops after 4 attempts in all",
        attempts_before_SIGKILL=equal(attempts(taken.before), [1, 2]),
        after_it=one_of(attempts(taken.after), [3, 4], [4], [3]),
        status=equal(taken.ending.status, "FAILED"),
        why=taken.ending.why,
    )


@dataclass
class Gaps:
    """Seconds before each attempt of equal orders: what the policy says, and what was seen, however often."""

    policy: Sequence[float]
    slower: float
    seen: dict[int, list[float]] = field(default_factory=dict)  # by attempt

    def add(self, found: dict[int, list[float]]) -> None:
        for attempt, gaps in found.items():
            self.seen.setdefault(attempt, []).extend(gaps)

    def shortest(self) -> list[float]:
        return [min(gaps) for _, gaps in sorted(self.seen.items())]

    def lateness(self) -> list[float]:
        return [gap - self.slower * wanted for gap, wanted in zip(self.shortest(), self.policy, strict=False)]


async def growing_gaps(desk: Desk) -> list[Evidence]:
    """Five equal orders: the machine delays some of them, so the shortest of five gaps tells the server's interval.

    A twin whose interval does not grow runs beside them, and shows how late attempts are on this machine. An attempt
    that was given up before it began counts without having run: then there is a fifth gap, which tells nothing. Where
    one of the two comes late, both are measured again, at most three times in all: a machine that was busy for a
    moment is not busy three times, and a server that waits too long is late each time. The shortest of all counts.
    """
    answers, slower, rounds = [DOWN, DOWN, DOWN, DOWN, OK], pace(), ("", "-again", "-once-more")
    grown, even = Gaps(GROWING, slower), Gaps(FLAT, slower)
    for again in rounds:
        growing = await desk.pay(f"growing{again}", answers, "growing", 5)
        flat = await desk.pay(f"flat{again}", answers, "flat", 5)
        await asyncio.gather(ended(growing), ended(flat))
        grown.add(desk.gaps(growing.id))
        even.add(desk.gaps(flat.id))
        if max(grown.lateness() + even.lateness()) <= slower * LATE:
            break
    names = ("first_gap", "second_gap", "third_gap", "fourth_gap")
    gaps = {
        name: between(figure(gap, "s"), slower * wanted, slower * (wanted + LATE))
        for name, gap, wanted in zip(names, grown.shortest(), GROWING, strict=False)
    }
    return [
        holds(
            "the gaps between attempts grow by the coefficient up to the cap",
            policy="0.5 s, times 4, at most 2.5 s",
            stretched=slower,
            calls=at_least(len(desk.lab.calls(growing.id)), 20),
            measured_times=1 + rounds.index(again),
            gaps=at_least(len(grown.shortest()), 4),
            **gaps,
        ),
        control(
            "with a coefficient of 1 the gaps do not grow, and attempts come soon enough to tell",
            policy="2 s",
            gaps=[round(gap, 2) for gap in even.shortest()],
            earliest=at_least(figure(min(even.lateness()), "s"), 0),
            latest=at_most(figure(max(even.lateness()), "s"), slower * LATE),
        ),
    ]


HERD = 28


async def decided_intervals(handle: Handle) -> list[float]:
    """The intervals before the second attempts, as the server announces them while they are waited for.

    A busy machine delays attempts, but not this; what it may do is hide an interval from us.
    """
    decided: dict[str, float] = {}

    async def over() -> bool:
        description = await handle.describe()
        for one in description.raw_description.pending_activities:
            # It has failed, and waits for its retry.
            if one.attempt == 2 and one.HasField("next_attempt_schedule_time"):
                wait = one.next_attempt_schedule_time.ToDatetime() - one.last_attempt_complete_time.ToDatetime()
                decided[one.activity_id] = wait.total_seconds()
        return name_of(description.status) != "RUNNING"

    await until(over, "the calls were answered")
    return list(decided.values())


async def herd(desk: Desk, name: str, policy: str, answer: Answer) -> tuple[list[float], float]:
    """Many fail together. Returns the intervals decided, and the seconds within which all called again."""
    handle = await desk.pay(name, [answer, OK], policy, HERD)
    decided = await decided_intervals(handle)
    again = [call.at for call in desk.lab.calls(handle.id) if call.attempt == 2]
    return decided, max(again) - min(again)


async def no_jitter(desk: Desk) -> list[Evidence]:
    """The herds come when the first of the growing gaps is over, so that they do not crowd it."""
    growing = f"{desk.lab.id}-growing"
    await until(lambda: len(desk.lab.calls(growing)) >= 10, "the growing gaps have begun to grow")
    equally, randomly = await asyncio.gather(
        herd(desk, "equal", "flat", DOWN), herd(desk, "random", "long", Answer(429, retry_after=2))
    )
    (intervals, again), (drawn, drawn_again) = equally, randomly
    return [
        control(
            "the measurement would see jitter: retries that ask for random delays are seen to be spread",
            drawn_by_the_activity="2 to 4 s (next_retry_delay)",
            seen=at_least(len(drawn), 20),
            of=HERD,
            shortest=at_least(figure(min(drawn), "s"), 1.99),
            longest=at_most(figure(max(drawn), "s"), 4.01),
            spread=at_least(figure(max(drawn) - min(drawn), "s"), 0.5),
            called_again_within=at_least(figure(drawn_again, "s"), 0.5),
        ),
        limit(
            "retries have no jitter: callers that failed together come back together",
            policy="2 s",
            seen=at_least(len(intervals), 20),
            of=HERD,
            intervals_decided_by_the_server=f"{min(intervals):.4f} to {max(intervals):.4f} s",
            spread=at_most(figure(1000 * (max(intervals) - min(intervals)), "ms"), 100),
            a_jitter_of_10_percent_would_be="400 ms",
            all_called_again_within=figure(again, "s"),
        ),
    ]


@RT.item("RT-01", "Retry strategy", fail_closed=True)
async def retry_strategy(lab: Lab) -> AsyncIterator[Evidence]:
    """A provider answers as was agreed; a ledger keeps when each attempt began and failed."""
    desk = Desk(lab)
    parts = (retry_after, whole_workflow, growing_gaps, no_jitter)
    async with desk.worker():
        async for evidence in side_by_side(
            *(desk.try_case(*case) for case in CASES.items()), *(part(desk) for part in parts), count_survives_kill(lab)
        ):
            yield evidence
    yield native(
        "a RetryPolicy is all there is to write: no loop and no handler in workflow or activity",
        (workflow.execute_activity_method, "retry_policy"),
        (Client.start_workflow, "retry_policy"),
        (RetryPolicy, "initial_interval"),
        (RetryPolicy, "backoff_coefficient"),
        (RetryPolicy, "maximum_interval"),
        (RetryPolicy, "maximum_attempts"),
        (RetryPolicy, "non_retryable_error_types"),
        (ApplicationError, "type"),
        (ApplicationError, "non_retryable"),
        (ApplicationError, "next_retry_delay"),
        adds=keywords_in([Checkout, Payments], "for", "while", "try"),
    )


# RT-02 Timeout system --------------------------------------------------------------------------------
# The server keeps the clocks. Each timeout answers a question of its own: how long may an attempt take, all
# attempts together, the wait for a worker, and the silence between two heartbeats? What was given up is not
# stopped at once, with heartbeats or without: whatever an activity does must bear a second one beside it.


@dataclass
class Report:
    key: str  # such as "2026-03": what is stored under it again takes the place of what was there
    pages: int


class Archive(Protocol):
    """Where reports are drawn and kept. Two that are stored under one key count once."""

    def draw(self, key: str, page: int) -> None: ...

    def store(self, key: str, pages: int) -> str:
        """Returns a receipt."""


class Press:
    def __init__(self, archive: Archive) -> None:
        self.archive = archive

    @activity.defn
    def print_report(self, report: Report) -> str:
        """Draw and store a report.

        An attempt that was given up hears of it later, by a heartbeat, or when its own worker finds its time over:
        the next one may be at work already.
        """
        for page in range(1, report.pages + 1):
            self.archive.draw(report.key, page)
            activity.heartbeat(page)
        return self.archive.store(report.key, report.pages)


def given_up(error: ActivityError) -> str:
    """Which clock ended an activity; "" when it failed by itself."""
    cause = error.cause
    return cause.type.name if isinstance(cause, exceptions.TimeoutError) and cause.type else ""


@workflow.defn
class MonthlyReport:
    @workflow.run
    async def run(self, report: Report) -> str:
        try:
            return await workflow.execute_activity_method(
                Press.print_report,
                report,
                # One attempt: a little more than the longest report takes. Without heartbeats, this is also how
                # long the loss of a worker goes unnoticed.
                start_to_close_timeout=timedelta(minutes=20),
                heartbeat_timeout=timedelta(minutes=1),
                # All attempts, and the waits between them: from here on nobody needs the report any more.
                schedule_to_close_timeout=timedelta(hours=6),
                # No worker takes it: that is not repaired by a retry, so somebody should hear of it.
                schedule_to_start_timeout=timedelta(hours=1),
            )
        except ActivityError as error:
            if clock := given_up(error):
                return f"no report: {clock}"
            raise


class Shelf:
    """An archive for the example, in memory."""

    def __init__(self) -> None:
        self.reports: dict[str, int] = {}

    def draw(self, key: str, page: int) -> None:
        time.sleep(0.1)

    def store(self, key: str, pages: int) -> str:
        self.reports[key] = pages
        return f"{key} is on the shelf"


async def example_rt_02(client: Client) -> None:
    async with Worker(
        client,
        task_queue="reports",
        workflows=[MonthlyReport],
        activities=[Press(Shelf()).print_report],
        activity_executor=ThreadPoolExecutor(10),
    ):
        report = Report(key=f"2026-03-{uuid.uuid4()}", pages=3)
        result = await client.execute_workflow(
            MonthlyReport.run,
            report,
            id=f"report-{report.key}",
            task_queue="reports",
            # Each run, and the whole chain of runs that continue or retry it.
            run_timeout=timedelta(hours=12),
            execution_timeout=timedelta(days=1),
        )
        print(f"The report: {result}")


# RT-02 put to the test -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """Timeouts in seconds; None where there is none."""

    start_to_close: float | None = None
    schedule_to_close: float | None = None
    schedule_to_start: float | None = None
    heartbeat: float | None = None
    attempts: int = 1
    task_queue: str | None = None
    lingers: bool = False  # the workflow goes on after the activity, until it is told to leave


def span(number: float | None) -> timedelta | None:
    return None if number is None else timedelta(seconds=number)


@workflow.defn
class Timed:
    """The same activity under other limits."""

    def __init__(self) -> None:
        self.may_leave = False

    @workflow.run
    async def run(self, report: Report, limits: Limits) -> str:
        try:
            result = await workflow.execute_activity_method(
                Press.print_report,
                report,
                start_to_close_timeout=span(limits.start_to_close),
                schedule_to_close_timeout=span(limits.schedule_to_close),
                schedule_to_start_timeout=span(limits.schedule_to_start),
                heartbeat_timeout=span(limits.heartbeat),
                retry_policy=RetryPolicy(
                    initial_interval=timedelta(milliseconds=100),
                    backoff_coefficient=1,
                    maximum_attempts=limits.attempts,
                ),
                task_queue=limits.task_queue,
            )
        except ActivityError as error:
            result = given_up(error)
        await workflow.wait_condition(lambda: self.may_leave or not limits.lingers)
        return result

    @workflow.signal
    def leave(self) -> None:
        self.may_leave = True


class Cabinet:
    """An archive whose books outlive the worker. Its receipts carry the name that it was given."""

    def __init__(self, books: Books, name: str = "") -> None:
        self.books, self.name = books, name

    def draw(self, key: str, page: int) -> None:
        pass

    def store(self, key: str, pages: int) -> str:
        self.books.enter(key, 1)
        return f"stored by {self.name}"


class Heap(Cabinet):
    """The control: an archive that takes whatever comes, and knows no keys."""

    def store(self, key: str, pages: int) -> str:
        return super().store(f"{key}/{uuid.uuid4()}", pages)


@workflow.defn
class Relay:
    """Hands over to a second run of itself, and that one never ends."""

    @workflow.run
    async def run(self, seconds: float) -> None:
        await workflow.sleep(seconds)
        workflow.continue_as_new(3600.0)


def when(events: Sequence[dict[str, Any]], kind: str) -> float:
    """The server's time of the first event of a type, in seconds; not a number where there is none."""
    found = event_times(events, kind)
    return found[0].timestamp() if found else float("nan")


@dataclass(frozen=True)
class Clock:
    """One of the four timeouts of an activity: what it bounds, and the event that it counts from."""

    bounds: str
    name: str  # of its field in Limits; in capitals, of its type
    since: str
    beside: Limits = Limits()  # other limits that are needed, far away

    def set(self, seconds: float, task_queue: str | None) -> Limits:
        change: dict[str, Any] = {self.name: seconds, "task_queue": task_queue}
        return replace(self.beside, **change)


SCHEDULED, STARTED = "ACTIVITY_TASK_SCHEDULED", "ACTIVITY_TASK_STARTED"
FAR = 300.0  # seconds
CLOCKS = [
    Clock("an attempt that takes too long", "start_to_close", STARTED),
    Clock("attempts that take too long together", "schedule_to_close", SCHEDULED),
    Clock("an activity that no worker takes", "schedule_to_start", SCHEDULED, Limits(FAR)),
    Clock("an attempt that falls silent", "heartbeat", STARTED, Limits(FAR)),
]


class Hall:
    """Where the press is tried: one worker, whose calls are held at gates, and one archive."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.books = lab, Books(lab.file("books.sqlite"))
        self.faults: list[Fault] = []  # a worker in this process looks at them at each call

    def press(self, name: str = "the press") -> Press:
        return Press(Cabinet(self.books, name))

    def worker(self, press: Press, task_queue: str) -> Worker:
        """One for activities alone."""
        return self.lab.worker([], [press.print_report], task_queue=task_queue, faults=self.faults)

    async def start(self, name: str, limits: Limits, pages: int = 2) -> Handle:
        return await self.lab.start(Timed.run, Report(f"{self.lab.id}-{name}", pages), limits, name=name)

    async def held(self, name: str, limits: Limits | None, pages: int = 2) -> Handle:
        """Start one whose printing hangs, silently, until its gate is opened. Without limits: the lesson's own."""
        self.faults.append(hold("print_report", self.lab.gate(name), silent=True).of(f"{self.lab.id}-{name}"))
        if limits is None:
            return await self.lab.start(MonthlyReport.run, Report(f"{self.lab.id}-{name}", pages), name=name)
        return await self.start(name, limits, pages)

    async def outcome(self, name: str, handle: Handle, seconds: float) -> str:
        """How a held one ends. If no clock ends it in time, its gate is opened, so that this is seen.

        The `seconds` count from when it has begun; one that no worker takes is waited for a little longer.
        """

        async def begun() -> bool:
            return bool(self.lab.calls(handle.id)) or await is_closed(handle)

        with contextlib.suppress(TimeoutError):
            await until(begun, "it has begun", 20)
        with contextlib.suppress(TimeoutError):
            await until(lambda: is_closed(handle), "a clock has ended it", seconds / slowness())
        open_gate(self.lab.gate(name))
        try:
            return str((await ended(handle, 10)).result)
        except TimeoutError:
            return f"nothing, within {seconds:.0f} s"


async def fires(hall: Hall, clock: Clock) -> tuple[Evidence, str]:
    """Let a job that hangs run into a timeout, and meanwhile hold its twin, which has room, just as long.

    Where the machine was so slow that the attempt did not begin in time, it is tried again with more time.
    Returns the evidence, and what came of the twin.
    """
    lab, nobody = hall.lab, f"{hall.lab.id}-nobody" if clock.name == "schedule_to_start" else None
    twin = f"{clock.name}-room"
    roomy = await hall.held(twin, clock.set(FAR, nobody and f"{nobody}-yet"))
    for length in (2, 8, 32):
        name, bound = f"{clock.name}-{length}", length * pace()
        handle = await hall.held(name, clock.set(bound, nobody))
        told = await hall.outcome(name, handle, 5 * bound)
        if nobody or lab.calls(handle.id):
            break
    events = await history_of(handle)
    after = when(events, "ACTIVITY_TASK_TIMED_OUT") - when(events, clock.since)
    open_gate(lab.gate(twin))
    async with hall.worker(hall.press(), f"{nobody}-yet") if nobody else contextlib.nullcontext():
        answer = await ended(roomy)
    what = clock.name.replace("_", "-")
    return works(
        f"{clock.bounds}: {what} ends it with a type of its own, and not early",
        type=equal(told, clock.name.upper()),
        limit=figure(bound, "s"),
        after=at_least(figure(after, "s"), bound),
        attempts_begun=equal(len(lab.calls(handle.id)), 0 if nobody else 1),
    ), str(answer.result)


async def each_fires(hall: Hall) -> list[Evidence]:
    lesson = await hall.held("lesson", None)
    found = await asyncio.gather(*(fires(hall, clock) for clock in CLOCKS))
    open_gate(hall.lab.gate("lesson"))
    answers = {clock.name: equal(found[n][1], "stored by the press") for n, clock in enumerate(CLOCKS)}
    return [
        *(evidence for evidence, _ in found),
        control(
            "the same slow job with room to spare completes",
            limits=f"{FAR:.0f} s",
            **answers,
            all_four_as_in_the_lesson=equal((await ended(lesson)).result, "stored by the press"),
        ),
    ]


async def all_attempts_together(hall: Hall) -> Evidence:
    """Each attempt hangs and is given up; there is no limit to their number but the clock."""
    for length in (1, 4):
        name, short = f"together-{length}", length * pace()
        limits = Limits(start_to_close=short, schedule_to_close=4 * short, attempts=0)
        handle = await hall.held(name, limits)
        told = await hall.outcome(name, handle, 12 * short)
        if len(hall.lab.calls(handle.id)) > 1:
            break
    return holds(
        "schedule-to-close bounds all attempts and the waits between them together",
        start_to_close=figure(short, "s"),
        schedule_to_close=figure(4 * short, "s"),
        attempts_that_ran=at_least(len(hall.lab.calls(handle.id)), 2),
        given_up_by=equal(told, "SCHEDULE_TO_CLOSE"),
        in_the_history=equal((await gave_up(handle))[-2:], ["SCHEDULE_TO_CLOSE", "START_TO_CLOSE"]),
    )


async def second_run(lab: Lab, name: str, length: float, which: str) -> tuple[list[str], float, float]:
    """Let a timeout end the second run. Returns (how both runs ended, seconds of the second, and of both)."""
    bound: dict[str, Any] = {which: timedelta(seconds=length)}
    handle = await lab.start(Relay.run, length / 2, name=f"{name}-{length:.0f}", **bound)
    await ended(handle)
    first = await history_of(lab.client.get_workflow_handle(handle.id, run_id=handle.first_execution_run_id))
    last = await history_of(lab.client.get_workflow_handle(handle.id))
    begun, continued = when(first, "WORKFLOW_EXECUTION_STARTED"), when(last, "WORKFLOW_EXECUTION_STARTED")
    gone = when(last, "WORKFLOW_EXECUTION_TIMED_OUT")
    kinds = [events[-1]["eventType"].removeprefix("EVENT_TYPE_WORKFLOW_EXECUTION_") for events in (first, last)]
    return kinds, gone - continued, gone - begun


async def run_and_execution(lab: Lab) -> Evidence:
    """One clock begins anew with every run, the other one bounds the whole chain of runs.

    A slow machine may hand over too late: then it is tried again with more time.
    """
    for length in (6.0, 24.0):
        (renewed, second, both), (bounded, rest, whole) = await asyncio.gather(
            second_run(lab, "renewed", length, "run_timeout"), second_run(lab, "bounded", length, "execution_timeout")
        )
        if renewed == bounded == ["CONTINUED_AS_NEW", "TIMED_OUT"] and rest < 0.9 * length:
            break
    return holds(
        "the run timeout begins anew with each run, the execution timeout bounds the whole chain of them",
        timeout=figure(length, "s"),
        the_first_run_hands_over_after=figure(length / 2, "s"),
        ends_by_run_timeout=equal(renewed, ["CONTINUED_AS_NEW", "TIMED_OUT"]),
        second_run=at_least(figure(second, "s"), 0.95 * length),
        both_runs=at_least(figure(both, "s"), 1.45 * length),
        ends_by_execution_timeout=equal(bounded, ["CONTINUED_AS_NEW", "TIMED_OUT"]),
        the_second_run_then=at_most(figure(rest, "s"), 0.9 * length),
        both_runs_then=at_least(figure(whole, "s"), 0.95 * length),
    )


@workflow.defn
class DiesDeciding:
    """The worker dies inside the first workflow task, while the workflow's code is being run."""

    @workflow.run
    async def run(self, ledger: str) -> None:
        with workflow.unsafe.sandbox_unrestricted():
            note(ledger, "decided")
            if len(notes(ledger)) == 1:
                os.kill(os.getpid(), signal.SIGKILL)


async def task_timeout(lab: Lab) -> Evidence:
    """The third clock bounds the worker's answer to a workflow task. It is not an end, but a second try."""
    ledger, queue, bound = lab.file("deciding"), f"{lab.id}-deciding", timedelta(seconds=2 * pace())
    handle = await lab.start(DiesDeciding.run, ledger, name="deciding", task_queue=queue, task_timeout=bound)
    async with lab.worker_process([DiesDeciding], task_queue=queue) as worker:
        await worker.wait()
    async with lab.worker([DiesDeciding], task_queue=queue):
        how = await ended(handle)
    events, count = await history_of(handle), await count_events(handle)
    after = when(events, "WORKFLOW_TASK_TIMED_OUT") - when(events, "WORKFLOW_TASK_STARTED")
    return holds(
        "worker killed inside a workflow task: the task times out and another worker takes it",
        task_timeout=figure(bound.total_seconds(), "s"),
        by_default="10 s",
        given_up_after=between(figure(after, "s"), bound.total_seconds(), 9.5),
        tasks_timed_out=at_least(count["WORKFLOW_TASK_TIMED_OUT"], 1),
        times_the_code_ran=at_least(len(notes(ledger)), 2),
        status=equal(how.status, "COMPLETED"),
    )


async def nobody_alive(hall: Hall) -> Evidence:
    """One activity whose only worker is dead, and one workflow that never had a worker."""
    lab, queue, bound = hall.lab, f"{hall.lab.id}-alone", timedelta(seconds=2)
    limits = Limits(start_to_close=bound.total_seconds())
    begun = await lab.start(Timed.run, Report("alone", 2), limits, name="alone", task_queue=queue)
    never = await lab.start(Relay.run, 1.0, name="never", task_queue=f"{queue}-never", run_timeout=bound)
    parts: dict[str, Any] = {"task_queue": queue, "faults": [die_before("print_report")]}
    async with lab.worker_process([Timed], [hall.press().print_report], **parts) as worker:
        await worker.wait()

    async def both_fired() -> bool:
        return await is_closed(never) and await happened(begun, "ACTIVITY_TASK_TIMED_OUT")

    await until(both_fired, "both timeouts fired")
    events, untouched = await history_of(begun), await history_of(never)
    after = when(events, "ACTIVITY_TASK_TIMED_OUT") - when(events, STARTED)
    lasted = when(untouched, "WORKFLOW_EXECUTION_TIMED_OUT") - when(untouched, "WORKFLOW_EXECUTION_STARTED")
    return holds(
        "timeouts fire with no worker alive",
        limits="2 s",
        attempts_begun=equal(attempts(lab.calls(begun.id)), [1]),
        start_to_close_after=at_least(figure(after, "s"), 2),
        run_timeout_of_a_workflow_no_worker_took_after=at_least(figure(lasted, "s"), 1.9),
        tasks_that_it_ever_started=equal((await count_events(never))["WORKFLOW_TASK_STARTED"], 0),
    )


async def two_at_work(hall: Hall, name: str, task_queue: str | None = None) -> tuple[list[str], list[int]]:
    """Attempt 1 hangs, is given up, and goes on as soon as attempt 2 has begun, which was held, too.

    A report without pages never heartbeats. Returns what the ledger has of the attempts, and what the archive has.
    """
    lab, limits = hall.lab, Limits(start_to_close=soon().total_seconds(), attempts=2, task_queue=task_queue)
    handle = await hall.held(name, limits, pages=0)
    await until(lambda: 2 in attempts(lab.calls(handle.id)), "attempt 2 has begun")
    open_gate(lab.gate(name))
    await until(lambda: len(story(lab, handle.id)) >= 4, "both attempts are over")
    return story(lab, handle.id), hall.books.amounts(handle.id)


async def goes_on(hall: Hall) -> list[Evidence]:
    """A timeout is the server's decision. The code that it gave up hears of it later, by a heartbeat.

    The SDK sends a heartbeat after each 0.8 of the timeout: the second one after the attempt began, 1.6 times that,
    brings the news, a second or more after the attempt was given up and the next one could begin.
    """
    heap, beating = f"{hall.lab.id}-heap", f"{hall.lab.id}-beating"
    hall.faults.append(hold("print_report", "").of(beating))
    short = 4 * pace()
    async with hall.worker(Press(Heap(hall.books)), heap):
        handle = await hall.start("beating", Limits(start_to_close=short, heartbeat=short, attempts=2))
        (silent, stored), (_, heaped) = await asyncio.gather(
            two_at_work(hall, "silent"), two_at_work(hall, "heaped", heap)
        )
    await until(lambda: "failed 1" in story(hall.lab, beating), "the attempt that heartbeats was told")
    told = story(hall.lab, beating)
    beside = [one for one in told[1 : told.index("failed 1")] if one.startswith("begun")]
    return [
        limit(
            "an attempt that was given up is not stopped at once: it goes on beside its retry",
            without_heartbeats=equal(silent[:2], ["begun 1", "begun 2"]),
            then=contains(silent[2:], "ended 1"),
        ),
        limit(
            "one that heartbeats goes on beside its retry, too, until a heartbeat brings it the news and cancels it",
            ledger=told,
            begun_beside_it=at_least(len(beside), 1),
            each_limit=figure(short, "s"),
            ended=equal((await ended(handle)).result, "START_TO_CLOSE"),
        ),
        holds(
            "two attempts at work at once count once, where what they do bears a second time",
            attempts=contains(silent, "ended 1", "ended 2"),
            in_the_archive=equal(stored, [1]),
        ),
        control(
            "where the archive knows no keys, the two attempts are there twice",
            in_the_archive=equal(heaped, [1, 1]),
        ),
    ]  # fmt: skip


async def overdue(hall: Hall) -> Evidence:
    """The worker knows the limit, too: an attempt that never heartbeats is cancelled there, and not by the server."""
    lab, short, id = hall.lab, 2 * pace(), f"{hall.lab.id}-overdue"
    hall.faults.append(hold("print_report", "", silent=True).of(id))
    how = await ended(await hall.start("overdue", Limits(start_to_close=short)))
    await until(lambda: lab.calls(id, "failed"), "the attempt was cancelled")
    lasted = lab.calls(id, "failed")[0].at - lab.calls(id)[0].at
    return holds(
        "an attempt without heartbeats is cancelled by its own worker, some seconds after its time is over",
        start_to_close=figure(short, "s"),
        ended=equal(how.result, "START_TO_CLOSE"),
        ledger=equal(story(lab, id), ["begun 1", "failed 1"]),
        cancelled_after=at_least(figure(lasted, "s"), short),
    )


async def zombie(hall: Hall) -> Evidence:
    """A worker is stopped when it has done the work and not yet said so. It wakes when another's answer was taken.

    It has one place for activities, so that it asks for the next one only when it has reported the first.
    """
    lab, queue = hall.lab, f"{hall.lab.id}-zombie"
    gate = lab.gate("zombie")
    limits = Limits(start_to_close=soon().total_seconds(), attempts=0, task_queue=queue, lingers=True)
    stopped: dict[str, Any] = {
        "faults": [withhold("print_report", gate, silent=True).of(queue)],
        "max_concurrent_activities": 1,
    }
    async with lab.worker_process([], [hall.press("the first").print_report], task_queue=queue, **stopped) as first:
        handle = await hall.start("zombie", limits)
        await until(lambda: lab.calls(queue, "ended"), "an attempt has done its work")
        first.send(signal.SIGSTOP)
        async with hall.worker(hall.press("the second"), queue):
            answered = partial(happened, handle, "ACTIVITY_TASK_COMPLETED")
            await until(answered, "the second attempt's answer was taken")
        open_gate(gate)
        first.send(signal.SIGCONT)
        after = await hall.start("after-zombie", Limits(start_to_close=FAR, task_queue=queue))
        next_one = await ended(after)
    await handle.signal(Timed.leave)
    how = await ended(handle)
    return holds(
        "a worker that was stopped until another's attempt had succeeded wakes and reports: the other's answer stays",
        attempts_that_ended=len(lab.calls(queue, "ended")),
        next_answer_of_the_first=equal(next_one.result, "stored by the first"),
        result=equal(how.result, "stored by the second"),
        completions_in_the_history=equal(outline(await handle.fetch_history()).count("ActivityTaskCompleted"), 1),
    )


@RT.item("RT-02", "Timeout system")
async def timeout_system(lab: Lab) -> AsyncIterator[Evidence]:
    """Jobs that hang run into each timeout; the gaps are taken from the server's events, what ran from a ledger."""
    hall = Hall(lab)
    of_hall = (each_fires, all_attempts_together, nobody_alive, goes_on, overdue, zombie)
    parts = (*(part(hall) for part in of_hall), run_and_execution(lab), task_timeout(lab))
    async with lab.worker([MonthlyReport, Timed, Relay], [hall.press().print_report], faults=hall.faults):
        async for evidence in side_by_side(*parts):
            yield evidence
    yield native(
        "each timeout is one argument",
        (workflow.execute_activity_method, "start_to_close_timeout"),
        (workflow.execute_activity_method, "schedule_to_close_timeout"),
        (workflow.execute_activity_method, "schedule_to_start_timeout"),
        (workflow.execute_activity_method, "heartbeat_timeout"),
        (Client.start_workflow, "execution_timeout"),
        (Client.start_workflow, "run_timeout"),
        (Client.start_workflow, "task_timeout"),
        exceptions.TimeoutError,
        exceptions.TimeoutType,
    )


# RT-03 Circuit breaker -------------------------------------------------------------------------------
# Retries protect a caller; nothing protects the service that is down from all its callers. A breaker that all
# of them share is a workflow that makes the call for them, or refuses to.


class ServiceDown(Exception):
    """Raised by a gateway whose service does not answer."""


class Gateway(Protocol):
    """A way to the service that is to be protected. An order that is paid twice counts once."""

    def pay(self, order: str) -> str:
        """Returns "paid". Raises ServiceDown."""


class Till:
    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    @activity.defn
    def pay(self, order: str) -> str:
        return self.gateway.pay(order)


@dataclass
class Circuit:
    """The state of a breaker: all that a new run of it must know."""

    threshold: int = 3  # so many failures in a row open it
    window: float = 10  # seconds that it stays open
    failures: int = 0
    open_until: float = 0


@workflow.defn
class Breaker:
    """Calls a service for its callers. Closed: calls. Open: refuses. Half-open: lets one call try."""

    @workflow.init
    def __init__(self, circuit: Circuit) -> None:
        self.circuit = circuit
        self.calling = 0

    @workflow.run
    async def run(self, circuit: Circuit) -> None:
        await workflow.wait_condition(workflow.info().is_continue_as_new_suggested)
        await workflow.wait_condition(workflow.all_handlers_finished)
        workflow.continue_as_new(self.circuit)

    def refuse_when_open(self) -> None:
        tripped = self.circuit.failures >= self.circuit.threshold
        if tripped and (self.calling or workflow.time() < self.circuit.open_until):
            raise ApplicationError("the circuit is open", type="CircuitOpen", non_retryable=True)

    def has_room(self) -> bool:
        """No more calls at a time than failures are left, so that a burst cannot overrun the threshold."""
        return self.calling == 0 or self.circuit.failures + self.calling < self.circuit.threshold

    @workflow.update
    async def call(self, order: str) -> str:
        while not self.has_room():  # of several who waited for one place, one gets it
            await workflow.wait_condition(self.has_room)
        self.refuse_when_open()
        self.calling += 1
        try:
            answer = await workflow.execute_activity_method(
                Till.pay,
                order,
                start_to_close_timeout=timedelta(seconds=30),
                retry_policy=RetryPolicy(maximum_attempts=1),
            )
        except ActivityError:
            self.circuit.failures += 1
            self.circuit.open_until = workflow.time() + self.circuit.window
            raise
        finally:
            self.calling -= 1
        self.circuit.failures = 0
        return answer

    @call.validator
    def check(self, order: str) -> None:
        """An update that is refused here leaves nothing in the history."""
        self.refuse_when_open()

    @workflow.query
    def state(self) -> Circuit:
        return self.circuit


@dataclass
class Purchase:
    order: str
    breaker: str  # the id of the breaker's workflow


@activity.defn
async def pay_through_breaker(purchase: Purchase) -> str:
    """Ask the breaker. It may be asked again: a run of the breaker answers an update's id only once.

    The id is made of the order and of who asks. The order alone would give each later try the answer of the first,
    also when that was a refusal. The ids of workflow and activity, without the run's, come again in every run.
    """
    breaker = activity.client().get_workflow_handle(purchase.breaker)
    id = f"{purchase.order}/{activity.info().workflow_run_id}"
    try:
        return await breaker.execute_update(Breaker.call, purchase.order, id=id)
    except WorkflowUpdateFailedError as error:
        raise root_cause(error) from None


def root_cause(error: BaseException) -> BaseException:
    return root_cause(error.__cause__) if error.__cause__ else error


# A breaker that cannot be reached is asked again; what it or the service answered is not asked for twice.
ASK_AGAIN = RetryPolicy(maximum_attempts=3, non_retryable_error_types=["ServiceDown", "CircuitOpen"])


@workflow.defn
class Buy:
    @workflow.run
    async def run(self, purchase: Purchase) -> str:
        try:
            return await workflow.execute_activity(
                pay_through_breaker, purchase, start_to_close_timeout=timedelta(minutes=1), retry_policy=ASK_AGAIN
            )
        except ActivityError as error:
            return type_of(error.cause)


def type_of(cause: BaseException | None) -> str:
    return str(cause.type) if isinstance(cause, ApplicationError) else type(cause).__name__


class Broken:
    """A gateway for the example, to a service that never answers."""

    calls = 0

    def pay(self, order: str) -> str:
        self.calls += 1
        raise ServiceDown


async def example_rt_03(client: Client) -> None:
    gateway, breaker, queue = Broken(), f"breaker-{uuid.uuid4()}", "payments"
    async with Worker(
        client,
        task_queue=queue,
        workflows=[Breaker, Buy],
        activities=[Till(gateway).pay, pay_through_breaker],
        activity_executor=ThreadPoolExecutor(10),
    ):
        await client.start_workflow(Breaker.run, Circuit(), id=breaker, task_queue=queue)
        for number in range(5):
            purchase = Purchase(f"{breaker}/{number}", breaker)
            outcome = await client.execute_workflow(Buy.run, purchase, id=f"buy-{purchase.order}", task_queue=queue)
            print(f"Buyer {number}: {outcome}; the service was called {gateway.calls} times")
        await client.get_workflow_handle(breaker).terminate()


# RT-03 put to the test -------------------------------------------------------------------------------


@dataclass
class Service:
    """A service outside Temporal, one a shop: it notes each order, and is down or slow when told to be."""

    folder: str

    def file(self, shop: str, what: str) -> Path:
        return Path(self.folder) / f"{shop}.{what}"

    def pay(self, order: str) -> str:
        shop = order.partition("/")[0]
        note(str(self.file(shop, "calls")), f"{order} {time.time()}")
        while self.file(shop, "held").exists():
            time.sleep(0.05)
        if self.file(shop, "down").exists():
            raise ServiceDown("the service is down")
        return "paid"


@workflow.defn
class BuyDirectly:
    """The control: the same purchase without a breaker."""

    @workflow.run
    async def run(self, purchase: Purchase) -> str:
        try:
            return await workflow.execute_activity_method(
                Till.pay, purchase.order, start_to_close_timeout=PATIENT, retry_policy=ASK_AGAIN
            )
        except ActivityError as error:
            return type_of(error.cause)


@activity.defn
async def pay_by_ids_that_come_again(purchase: Purchase) -> str:
    """The control: an update's id made of the workflow's and the activity's."""
    breaker = activity.client().get_workflow_handle(purchase.breaker)
    id = f"{activity.info().workflow_id}/{activity.info().activity_id}"
    return await breaker.execute_update(Breaker.call, purchase.order, id=id)


@workflow.defn
class Subscription:
    """Pays one order a run, and continues as new for the next."""

    @workflow.run
    async def run(self, purchases: list[Purchase], activity: str, told: list[str]) -> list[str]:
        told.append(await workflow.execute_activity(activity, purchases[0], start_to_close_timeout=PATIENT))
        if purchases[1:]:
            workflow.continue_as_new(args=[purchases[1:], activity, told])
        return told


class Shop:
    """Workflows that buy from one service through one breaker, and what became of them."""

    def __init__(self, lab: Lab, name: str, *, server: Server | None = None, task_queue: str = "") -> None:
        self.name, self.service = name, Service(str(lab.folder))
        self.client = server.client if server else lab.client
        self.id, self.queue = f"{lab.id}-{name}", task_queue or lab.task_queue
        self.breaker: Handle = self.client.get_workflow_handle(self.id)
        self.bought = 0

    async def open(self, threshold: int, window: float) -> None:
        await self.client.start_workflow(Breaker.run, Circuit(threshold, window), id=self.id, task_queue=self.queue)

    def order(self) -> Purchase:
        self.bought += 1
        return Purchase(f"{self.name}/{self.bought}", self.id)

    async def buy(self, run: Any = Buy.run) -> str:
        """One workflow that buys. Returns "paid", the type of the error that it got, or how else it ended."""
        purchase = self.order()
        id = f"{self.id}-buy-{self.bought}"
        how = await ended(await self.client.start_workflow(run, purchase, id=id, task_queue=self.queue))
        return str(how.result or how)

    async def buy_together(self, count: int, run: Any = Buy.run) -> dict[str, int]:
        return dict(Counter(await asyncio.gather(*(self.buy(run) for _ in range(count)))))

    async def buy_until_called(self) -> str:
        """Buy again and again until the breaker lets a call through. Returns that call's outcome."""
        outcome = ""

        async def called() -> bool:
            nonlocal outcome
            outcome = await self.buy()
            return outcome != "CircuitOpen"

        await until(called, "the breaker let a call through")
        return outcome

    def calls(self) -> list[tuple[str, float]]:
        """The orders that came to the service, and when."""
        lines = (line.split() for line in notes(str(self.service.file(self.name, "calls"))))
        return [(order, float(at)) for order, at in lines]

    def turn(self, **states: bool) -> None:
        """Make the service `down`, or let it hold its answers (`held`); or no longer."""
        for what, on in states.items():
            file = self.service.file(self.name, what)
            file.touch() if on else file.unlink()


CALLERS = 8


def parts_of(lab: Lab) -> dict[str, Any]:
    """The arguments of a worker for shops."""
    activities = [Till(Service(str(lab.folder))).pay, pay_through_breaker, pay_by_ids_that_come_again]
    return {"workflows": [Breaker, Buy, BuyDirectly, Subscription], "activities": activities}


async def through_all_states(lab: Lab) -> Evidence:
    """Closed, open, half-open and down again, open, half-open and up again, closed.

    On a slow machine the window may be over before a purchase that should be refused: then it is made longer.
    """
    for window in (2, 10, 40):
        shop = Shop(lab, f"states-{window}")
        await shop.open(3, window)
        shop.turn(down=True)
        told = [await shop.buy() for _ in range(3)]
        begun = time.monotonic()
        told.append(await shop.buy())
        fast, counts = time.monotonic() - begun, [len(shop.calls())]
        told += [await shop.buy_until_called(), await shop.buy()]
        counts.append(len(shop.calls()))
        shop.turn(down=False)
        told.append(await shop.buy_until_called())
        if told[3] == told[5] == "CircuitOpen":
            break
    closed = await shop.buy_together(3)
    times = [at for _, at in shop.calls()]
    return works(
        "a breaker workflow opens after 3 failures, fails fast, tries one call when half-open, and closes",
        window=figure(window, "s"),
        outcomes=equal(told, [*["ServiceDown"] * 3, "CircuitOpen", "ServiceDown", "CircuitOpen", "paid"]),
        then=equal(closed, {"paid": 3}),
        calls=equal([*counts, len(times)], [3, 4, 8]),
        half_open_after=at_least(figure(times[3] - times[2], "s"), window),
        and_after=at_least(figure(times[4] - times[3], "s"), window),
        refused_within=figure(fast * 1000, "ms"),
        buyers=shop.bought,
    )


async def burst(lab: Lab) -> Evidence:
    """Eight callers at the same moment, of a closed and of a half-open breaker. The service holds its answers."""
    shop = Shop(lab, "burst")
    await shop.open(3, 1)
    shop.turn(down=True, held=True)
    closed = asyncio.create_task(shop.buy_together(CALLERS))
    arrived = partial(happened, shop.breaker, "WORKFLOW_EXECUTION_UPDATE_ACCEPTED", CALLERS)
    await until(arrived, f"{CALLERS} callers have arrived")
    shop.turn(held=False)
    outcomes, calls = await closed, len(shop.calls())
    circuit = await shop.breaker.query(Breaker.state)
    await until(lambda: time.time() > circuit.open_until, "the window is over")
    shop.turn(down=False, held=True)
    half_open = [asyncio.create_task(shop.buy()) for _ in range(CALLERS)]
    await until(lambda: sum(task.done() for task in half_open) >= CALLERS - 1, "all but the probe are answered")
    probes = len(shop.calls()) - calls
    shop.turn(held=False)
    return holds(
        f"{CALLERS} concurrent callers make at most 3 calls of a failing service, and 1 when it is half-open",
        calls_when_closed=equal(calls, 3),
        outcomes=equal(outcomes, {"ServiceDown": 3, "CircuitOpen": CALLERS - 3}),
        calls_when_half_open=equal(probes, 1),
        outcomes_then=equal(dict(Counter(await asyncio.gather(*half_open))), {"CircuitOpen": CALLERS - 1, "paid": 1}),
    )


async def breaker_survives(lab: Lab) -> Evidence:
    """The worker is killed with two failures counted, and killed again when the breaker is open."""
    parts = parts_of(lab) | {"task_queue": f"{lab.id}-survives"}
    shop = Shop(lab, "survives", task_queue=parts["task_queue"])
    await shop.open(3, 3600)
    shop.turn(down=True)
    told = []
    for _ in range(2):
        async with lab.worker_process(**parts) as worker:
            told += [await shop.buy(), await shop.buy()]
            await worker.kill()
    async with lab.worker_process(**parts):
        later = await shop.buy_together(CALLERS)
    return holds(
        "its count and its state survive two kills of its worker",
        two_before_and_two_after_the_first=equal(told, [*["ServiceDown"] * 3, "CircuitOpen"]),
        after_the_second=equal(later, {"CircuitOpen": CALLERS}),
        calls=equal(len(shop.calls()), 3),
    )


async def subscribed(lab: Lab, name: str, activity: str) -> tuple[list[str], list[str]]:
    """Two orders in two runs of one workflow. Returns what the buyer was told, and the orders that were paid."""
    shop = Shop(lab, name)
    await shop.open(3, 1)
    handle = await lab.start(Subscription.run, [shop.order(), shop.order()], activity, [], name=f"{name}-buyer")
    return (await ended(handle)).result, [order for order, _ in shop.calls()]


async def ids_come_again(lab: Lab) -> list[Evidence]:
    (told, paid), (told_too, paid_once) = await asyncio.gather(
        subscribed(lab, "monthly", "pay_through_breaker"), subscribed(lab, "lost", "pay_by_ids_that_come_again")
    )
    return [
        holds(
            "a buyer that continues as new is served for each order: the run's id is part of the request's",
            told=equal(told, ["paid", "paid"]),
            paid=equal(paid, ["monthly/1", "monthly/2"]),
        ),
        control(
            "requests told apart by the ids of workflow and activity: the second order is lost, and is said to be paid",
            told=equal(told_too, ["paid", "paid"]),
            paid=equal(paid_once, ["lost/1"]),
        ),
    ]


async def without_breaker(lab: Lab) -> Evidence:
    shop = Shop(lab, "direct")
    shop.turn(down=True)
    outcomes = await shop.buy_together(CALLERS, BuyDirectly.run)
    return control(
        "maximum_attempts and a non-retryable type alone: every caller still calls",
        outcomes=equal(outcomes, {"ServiceDown": CALLERS}),
        calls=equal(len(shop.calls()), CALLERS),
    )


@nexusrpc.service
class Billing:
    """The same service as a Nexus operation: the only kind of call for which the server has a breaker."""

    pay: nexusrpc.Operation[str, str]


@nexusrpc.handler.service_handler(service=Billing)
class BillingHandler:
    def __init__(self, service: Service) -> None:
        self.service = service

    @nexusrpc.handler.sync_operation
    async def pay(self, _: nexusrpc.handler.StartOperationContext, order: str) -> str:
        return self.service.pay(order)


@workflow.defn
class BuyByNexus:
    @workflow.run
    async def run(self, order: str, endpoint: str) -> str:
        billing = workflow.create_nexus_client(service=Billing, endpoint=endpoint)
        return await billing.execute_operation(Billing.pay, order, schedule_to_close_timeout=timedelta(minutes=2))


KEEPS_COUNT = "a breaker that continues as new keeps its count and its state"
CALLERS_WAIT = "the server's own breaker, for Nexus operations, does not fail fast: its callers wait"
# A setting that no user has: continue-as-new is suggested after so many events.
SUGGESTED_EARLY = {"limit.historyCount.suggestContinueAsNew": "10"}  # 4096


@piece(holds(KEEPS_COUNT), limit(CALLERS_WAIT))
async def on_a_server_of_its_own(lab: Lab) -> list[Evidence]:
    """Its threshold for continue-as-new is lowered, to see it passed, and it has a Nexus endpoint."""
    async with lab.private_server(settings=SUGGESTED_EARLY) as server:
        endpoint = await lab.nexus_endpoint(server)
        parts = parts_of(lab) | {"workflows": [Breaker, Buy, BuyByNexus]}
        handler = BillingHandler(Service(str(lab.folder)))
        async with lab.worker(**parts, server=server, nexus_service_handlers=[handler]):
            shops = (Shop(lab, name, server=server) for name in ("handed", "nexus"))
            return [*await asyncio.gather(handed_over(next(shops)), nexus_breaker(next(shops), endpoint))]


async def handed_over(shop: Shop) -> Evidence:
    """A history must not grow forever."""
    await shop.open(3, 3600)
    first_run = (await shop.breaker.describe()).run_id
    shop.turn(down=True)
    outcomes = [await shop.buy() for _ in range(5)]
    return holds(
        KEEPS_COUNT,
        continues_as_new_at="10 events, by default 4096",
        runs=equal(len({first_run, (await shop.breaker.describe()).run_id}), 2),
        outcomes=equal(outcomes, ["ServiceDown"] * 3 + ["CircuitOpen"] * 2),
        calls=equal(len(shop.calls()), 3),
    )


async def nexus_breaker(shop: Shop, endpoint: str) -> Evidence:
    """The server's own breaker: who calls through it is protected from calling, and left waiting."""
    shop.turn(down=True)
    orders = [shop.order().order for _ in range(CALLERS)]
    start, queue = shop.client.start_workflow, shop.queue
    handles = [
        await start(BuyByNexus.run, args=[one, endpoint], id=f"{endpoint}-{one}", task_queue=queue) for one in orders
    ]
    reasons: dict[str, str] = {}

    async def settled() -> bool:
        """Each caller was held back, or has ended; or the service was called so often that nothing protects it."""
        for handle in handles:
            reasons[handle.id] = reasons.get(handle.id) or await blocked_because(handle)
        left = [handle for handle in handles if not reasons[handle.id] and not await is_closed(handle)]
        return not left or len(shop.calls()) > 3 * CALLERS

    await until(settled, "the callers are blocked, answered or not protected", every=0.5)
    return limit(
        CALLERS_WAIT,
        calls_of_the_failing_service=len(shop.calls()),
        operations_blocked=equal(len([*filter(None, reasons.values())]), CALLERS),
        reasons=sorted(set(reasons.values())),
        callers_still_running=equal(CALLERS - sum([await is_closed(handle) for handle in handles]), CALLERS),
    )


async def blocked_because(handle: Handle) -> str:
    """Why the server holds back a run's Nexus operation; "" when it does not."""
    for one in (await handle.describe()).raw_description.pending_nexus_operations:
        if one.state == PendingNexusOperationState.PENDING_NEXUS_OPERATION_STATE_BLOCKED:
            return one.blocked_reason
    return ""


def names_with(word: str) -> list[str]:
    """The names in the SDK's own source that contain a word; generated protocol code left out."""
    package = Path(temporalio.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        if {"api", "proto"} & set(path.relative_to(package).parts):
            continue
        text = path.read_text(encoding="utf-8")
        if word in text.lower():
            tokens = tokenize.generate_tokens(io.StringIO(text).readline)
            found |= {one.string for one in tokens if one.type == tokenize.NAME and word in one.string.lower()}
    return sorted(found)


def built_by_the_user() -> Evidence:
    lines = [line for one in (Circuit, Breaker, pay_through_breaker) for line in inspect.getsource(one).splitlines()]
    return limit(
        "there is none for activities: the user builds it",
        cap=3,
        names_with_breaker_in_the_source_of_the_SDK=equal(names_with("breaker"), []),
        lines_built_here=sum(bool(line.strip()) for line in lines),
    )


@RT.item("RT-03", "Circuit breaker")
async def circuit_breaker(lab: Lab) -> AsyncIterator[Evidence]:
    """Buyers call a service that is down, through a breaker and without; the service notes its calls."""
    parts = (through_all_states, burst, breaker_survives, ids_come_again, without_breaker, on_a_server_of_its_own)
    async with lab.worker(**parts_of(lab)):
        async for evidence in side_by_side(*(part(lab) for part in parts)):
            yield evidence
    yield await asyncio.to_thread(built_by_the_user)


# RT-04 Heartbeat -------------------------------------------------------------------------------------
# A heartbeat is three things at once: a sign of life that makes a loss known early, a note of how far the work
# has come for the next attempt, and the way by which a cancellation comes in. It comes after the work that it
# tells of: then an item may be done twice, and none is left out.


@dataclass
class Batch:
    name: str
    items: int


class Stock(Protocol):
    """Where items go. One that comes again under its key counts once."""

    def put(self, key: str) -> None: ...


class Importing:
    """Blocking calls stand in a plain function, which runs in a thread of its own.

    In an `async def` they would stop the worker's event loop, and with it the heartbeats of all its neighbours.
    """

    def __init__(self, stock: Stock) -> None:
        self.stock = stock

    @activity.defn
    def import_batch(self, batch: Batch) -> int:
        """Import the items of a batch, from where the last attempt got to: its heartbeats said so."""
        details = activity.info().heartbeat_details
        done = int(details[0]) if details else 0
        for item in range(done + 1, batch.items + 1):
            self.take(batch, item)
        return batch.items

    def take(self, batch: Batch, item: int) -> None:
        self.stock.put(f"{batch.name}/{item}")
        activity.heartbeat(item)  # only now: what is told is done


@workflow.defn
class ImportBatch:
    @workflow.run
    async def run(self, batch: Batch) -> int:
        return await workflow.execute_activity_method(
            Importing.import_batch,
            batch,
            start_to_close_timeout=timedelta(hours=1),
            # Longer than the longest item takes, and short enough to act upon.
            heartbeat_timeout=timedelta(seconds=30),
            # When it is cancelled, the workflow waits until the activity itself has ended.
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        )


class Warehouse:
    """A stock for the example, in memory."""

    def __init__(self) -> None:
        self.items: set[str] = set()

    def put(self, key: str) -> None:
        time.sleep(0.05)
        self.items.add(key)


async def example_rt_04(client: Client) -> None:
    warehouse = Warehouse()
    async with Worker(
        client,
        task_queue="imports",
        workflows=[ImportBatch],
        activities=[Importing(warehouse).import_batch],
        activity_executor=ThreadPoolExecutor(10),
        # By default heartbeats are held back for 0.8 times the timeout: what they told is lost in a crash.
        max_heartbeat_throttle_interval=timedelta(seconds=2),
    ):
        batch = Batch(str(uuid.uuid4()), items=20)
        done = await client.execute_workflow(ImportBatch.run, batch, id=f"import-{batch.name}", task_queue="imports")
        print(f"{done} items were imported, {len(warehouse.items)} are in the warehouse")


# RT-04 put to the test -------------------------------------------------------------------------------

ITEMS, MANY = 6, 100


@dataclass
class Shelves:
    """A stock outside the worker. It notes what is put, and lets an attempt wait before it is there.

    `stops`: by batch, the item at which the first attempt waits until the batch's gate is open. A batch that is
    `paced` takes 0.2 s an item, until its gate is open.
    """

    folder: str
    books: Books
    stops: Mapping[str, int]
    paced: Sequence[str]

    def put(self, key: str) -> None:
        batch, number = key.split("/")
        item, attempt, gate = int(number), activity.info().attempt, Path(self.folder) / f"{batch}.gate"
        note(f"{self.folder}/{batch}.items", f"{attempt} {item}")
        while attempt == 1 and item == self.stops.get(batch) and not gate.exists():
            time.sleep(0.05)
        if batch in self.paced and not gate.exists():
            time.sleep(0.2)
        self.books.enter(key, item)


class Mute(Importing):
    """The control: no heartbeats."""

    def take(self, batch: Batch, item: int) -> None:
        self.stock.put(f"{batch.name}/{item}")


class Hasty(Importing):
    """The control: a heartbeat before the work that it tells of."""

    def take(self, batch: Batch, item: int) -> None:
        activity.heartbeat(item)
        self.stock.put(f"{batch.name}/{item}")


class Dock:
    """Where batches are tried, a name each."""

    STOPS: Mapping[str, int] = {"stalled": 4, "lost": 4, "mute": 4, "hasty": 4, "unsent": 6}
    PACED = ("heard", "deaf", "beside-a-loop", "beside-a-thread")

    def __init__(self, lab: Lab) -> None:
        self.lab, self.books = lab, Books(lab.file("books.sqlite"))
        self.shelves = Shelves(str(lab.folder), self.books, self.STOPS, self.PACED)

    def begun(self, batch: str) -> tuple[list[int], list[int]]:
        """The items that the first attempt began to put, and those that later ones did."""
        lines = [line.split() for line in notes(self.lab.file(f"{batch}.items"))]
        first = [int(item) for attempt, item in lines if attempt == "1"]
        return first, [int(item) for attempt, item in lines if attempt != "1"]

    def stored(self, batch: str) -> list[int]:
        return sorted(self.books.amounts(f"{batch}/"))

    def parts(self, kind: type[Importing] = Importing, **timeouts: timedelta) -> dict[str, Any]:
        """The arguments of a worker for imports. Without heartbeats there can be no timeout for them."""
        silence = None if kind is Mute else soon()
        return {
            "workflows": [ImportBatch],
            "activities": [kind(self.shelves).import_batch],
            "shortened": {"import_batch": {"heartbeat_timeout": silence, **timeouts}},
            **PROMPT,
        }


async def details_of(handle: Handle) -> list[Any]:
    """The last heartbeat details that the server holds for the activity that a run waits for."""
    payloads = [payload for one in await pending(handle) for payload in one.heartbeat_details.payloads]
    return await DataConverter.default.decode(payloads)


async def stall_noticed(dock: Dock) -> Evidence:
    """The worker lives and the activity hangs: only the missing heartbeat tells."""
    handle = await dock.lab.start(ImportBatch.run, Batch("stalled", ITEMS), name="stalled")
    how = await ended(handle)
    first, later = dock.begun("stalled")
    open_gate(dock.lab.gate("stalled"))
    calls = dock.lab.calls(handle.id)
    return works(
        "a stalled activity is noticed by its heartbeat timeout, and its retry goes on where it stood",
        heartbeat_timeout=figure(soon().total_seconds(), "s"),
        start_to_close="1 h",
        attempt_given_up_by=equal(await gave_up(handle), ["HEARTBEAT"]),
        first_attempt=equal(first, [1, 2, 3, 4]),
        second=equal(later, [4, 5, 6]),
        seconds_between=at_least(figure(calls[-1].at - calls[0].at, "s"), soon().total_seconds()),
        stored=equal(dock.stored("stalled"), [1, 2, 3, 4, 5, 6]),
        result=equal(how.result, ITEMS),
    )


async def lose_worker(
    dock: Dock, batch: str, parts: Mapping[str, Any], told: int | None = None
) -> tuple[list[Any], list[str], float]:
    """Kill the worker when its first attempt waits at the item that the batch stops at.

    `told`: the item that the server must have heard of by then; None waits a moment for what may be on its way.
    Returns what the server held at the kill, what gave the attempt up, and the seconds to the next one.
    """
    lab, held = dock.lab, list[Any]()
    handle: Handle = lab.client.get_workflow_handle(f"{lab.id}-{batch}")

    async def has_heard(item: int) -> bool:
        held[:] = await details_of(handle)
        return bool(held) and held[0] >= item

    async def came_to_the_stop() -> bool:
        stop = dock.STOPS[batch]
        if stop not in dock.begun(batch)[0]:
            return False
        if told is not None:
            return await has_heard(told)
        with contextlib.suppress(TimeoutError):
            await until(lambda: has_heard(stop - 1), "the server has heard of the last one", 1)
        return True

    taken = await lab.take_over(ImportBatch.run, Batch(batch, ITEMS), name=batch, parts=parts, point=came_to_the_stop)
    return held, await gave_up(handle), taken.after[0].at - taken.before[-1].at


async def worker_lost(dock: Dock) -> list[Evidence]:
    mutely = dock.parts(Mute, start_to_close_timeout=2 * soon())
    (held, why, gap), (mute, mute_why, mute_gap), (hasty, _, _) = await asyncio.gather(
        lose_worker(dock, "lost", dock.parts(), told=3),
        lose_worker(dock, "mute", mutely),
        lose_worker(dock, "hasty", dock.parts(Hasty), told=4),
    )
    return [
        holds(
            "worker killed: the next attempt begins behind the last details that were sent",
            details_at_the_SIGKILL=equal(held, [3]),
            attempt_given_up_by=equal(why, ["HEARTBEAT"]),
            first_attempt=equal(dock.begun("lost")[0], [1, 2, 3, 4]),
            second=equal(dock.begun("lost")[1], [4, 5, 6]),
            seconds_between=figure(gap, "s"),
        ),
        holds(
            "worker killed in the middle of an item: the item is done again, and none is left out",
            stored=equal(dock.stored("lost"), [1, 2, 3, 4, 5, 6]),
        ),
        control(
            "without heartbeats the same kill is noticed only at start-to-close, and the work begins anew",
            details_at_the_SIGKILL=equal(mute, []),
            attempt_given_up_by=equal(mute_why, ["START_TO_CLOSE"]),
            first_attempt=equal(dock.begun("mute")[0], [1, 2, 3, 4]),
            second=equal(dock.begun("mute")[1], [1, 2, 3, 4, 5, 6]),
            seconds_between=figure(mute_gap, "s"),
        ),
        control(
            "with the heartbeat before the work, the item that the kill cut off is left out for good",
            details_at_the_SIGKILL=equal(hasty, [4]),
            first_attempt=equal(dock.begun("hasty")[0], [1, 2, 3, 4]),
            second=equal(dock.begun("hasty")[1], [5, 6]),
            stored=equal(dock.stored("hasty"), [1, 2, 3, 5, 6]),
        ),
    ]


async def unsent_details(dock: Dock) -> Evidence:
    """The same kill by a worker that holds heartbeats back as long as it does by default."""
    parts = dock.parts(heartbeat_timeout=timedelta(seconds=60), start_to_close_timeout=2 * soon())
    del parts["max_heartbeat_throttle_interval"]
    held, _, _ = await lose_worker(dock, "unsent", parts)
    again = [item for item in dock.begun("unsent")[1] if item < 6]
    return limit(
        "details reported shortly before a kill are lost: heartbeats are held back, and work is done again",
        items_done_and_told=5,
        details_at_the_SIGKILL=held,
        done_again=at_least(len(again), 1),
        held_back_for="0.8 times the timeout of 60 s; the other batches 0.2 s",
    )


async def cancellation(dock: Dock) -> list[Evidence]:
    """Two long batches are cancelled at the same time. When one has heard of it, the other may come to its end."""
    lab, deaf_queue = dock.lab, f"{dock.lab.id}-deaf"
    async with lab.worker(**dock.parts(Mute), task_queue=deaf_queue):
        heard = await lab.start(ImportBatch.run, Batch("heard", MANY), name="heard")
        deaf = await lab.start(ImportBatch.run, Batch("deaf", MANY), name="deaf", task_queue=deaf_queue)
        await until(lambda: 2 in dock.begun("heard")[0] and 2 in dock.begun("deaf")[0], "both have begun")
        asked = time.time()
        await asyncio.gather(heard.cancel(), deaf.cancel())
        how = await ended(heard)
        took = time.time() - asked
        asked_too = partial(happened, deaf, "ACTIVITY_TASK_CANCEL_REQUESTED")
        await until(asked_too, "the other was asked to end, too")
        open_gate(lab.gate("deaf"))
        await ended(deaf)
    return [
        holds(
            "a cancellation reaches an activity that heartbeats",
            ledger=equal(story(lab, heard.id), ["begun 1", "failed 1"]),
            status=equal(how.status, "CANCELED"),
            after=figure(took, "s"),
            items_stored=at_most(len(dock.stored("heard")), MANY - 1),
            of=MANY,
        ),
        control(
            "without heartbeats a cancellation never arrives",
            in_the_history=contains(outline(await deaf.fetch_history()), "ActivityTaskCancelRequested"),
            ledger=equal(story(lab, deaf.id), ["begun 1", "ended 1"]),
            items_stored=equal(len(dock.stored("deaf")), MANY),
        ),
    ]


@activity.defn
async def ask_outsider(ledger: str) -> str:
    """Hand the task token to someone else, who completes the activity; this worker is free meanwhile."""
    note(ledger, activity.info().task_token.hex())
    activity.raise_complete_async()


@workflow.defn
class Outsourced:
    @workflow.run
    async def run(self, ledger: str, silence: float) -> str:
        return await workflow.execute_activity(
            ask_outsider,
            ledger,
            start_to_close_timeout=timedelta(minutes=5),
            heartbeat_timeout=timedelta(seconds=silence),
            retry_policy=RetryPolicy(maximum_attempts=1),
        )


async def outsider(target: Target, token: str, gate: str) -> tuple[int, str]:
    """The life of a process that reads until the gate is open, and signs. Returns (heartbeats, how it ended)."""
    client = await connect(target)
    task = client.get_async_activity_handle(task_token=bytes.fromhex(token))
    pages = 0
    try:
        while not Path(gate).exists():
            pages += 1
            await task.heartbeat(f"{pages} pages read")
            await asyncio.sleep(0.2)
        await task.complete("signed")
    except (RPCError, AsyncActivityCancelledError) as error:
        return pages, f"refused: {error}"
    return pages, "accepted"


async def completed_outside(dock: Dock) -> Evidence:
    """One is kept alive from outside until its twin, which nobody keeps alive, was given up."""
    lab, silence = dock.lab, soon().total_seconds()
    ledgers = lab.file("signed"), lab.file("forgotten")
    signed = await lab.start(Outsourced.run, ledgers[0], silence, name="signed")
    await until(lambda: notes(ledgers[0]), "the task token was handed over")
    work = asyncio.create_task(lab.answer(outsider, lab.target, notes(ledgers[0])[0], lab.gate("signed")))
    forgotten = await lab.start(Outsourced.run, ledgers[1], silence, name="forgotten")
    seen: list[str] = []

    async def twin_ended() -> bool:
        seen.extend(one for one in await details_of(signed) if one not in seen)
        return await is_closed(forgotten)

    await until(twin_ended, "the twin was given up")
    open_gate(lab.gate("signed"))
    how, (pages, answer) = await ended(signed), await work
    return holds(
        "an activity that another process completes is kept alive by that process's heartbeats",
        heartbeat_timeout=figure(silence, "s"),
        completion=equal(answer, "accepted"),
        result=equal(how.result, "signed"),
        heartbeats_from_outside=at_least(pages, 2),
        details_that_the_server_showed=at_least(len([one for one in seen if one.endswith("pages read")]), 2),
        a_twin_without_them=equal(await gave_up(forgotten), ["HEARTBEAT"]),
    )


def blocking_call(gate: str) -> None:
    """As of a database's driver or an HTTP library: the thread waits, and nothing else runs in it."""
    while not Path(gate).exists():
        time.sleep(0.05)


@activity.defn(name="call")
async def call_in_the_loop(gate: str) -> None:
    blocking_call(gate)


@activity.defn(name="call")
def call_in_a_thread(gate: str) -> None:
    blocking_call(gate)


@workflow.defn
class Calling:
    @workflow.run
    async def run(self, gate: str) -> None:
        await workflow.execute_activity("call", gate, start_to_close_timeout=timedelta(minutes=5))


@dataclass(frozen=True)
class Beside:
    """What came of a batch beside a blocking call, and what an operator was told of both meanwhile."""

    ledger: list[str]
    result: Any
    blocked: float  # seconds
    batch_failed: list[str]
    call_failed: list[str]


async def beside(dock: Dock, batch: str, call: Any, enough: Callable[[str], object]) -> Beside:
    """Let a call block on the worker of a batch that heartbeats, until it is `enough`, or four timeouts long."""
    lab, queue, gate = dock.lab, f"{dock.lab.id}-{batch}", dock.lab.gate(f"{batch}-call")
    parts = dock.parts() | {"workflows": [ImportBatch, Calling], "task_queue": queue}
    parts["activities"] = [*parts["activities"], call]
    async with lab.worker_process(**parts):
        neighbour = await lab.start(ImportBatch.run, Batch(batch, MANY), name=batch, task_queue=queue)
        await until(lambda: 3 in dock.begun(batch)[0], "the batch is under way")
        caller = await lab.start(Calling.run, gate, name=f"{batch}-call", task_queue=queue)
        await until(lambda: lab.calls(caller.id), "the blocking call has begun")
        begun = time.monotonic()
        with contextlib.suppress(TimeoutError):
            await until(lambda: enough(neighbour.id), "it is enough", 4 * soon().total_seconds() / slowness())
        failures = await last_failures(neighbour), await last_failures(caller)
        blocked = time.monotonic() - begun
        open_gate(gate)
        open_gate(lab.gate(batch))
        how = await ended(neighbour)
        await ended(caller)
    return Beside(story(lab, neighbour.id), how.result, blocked, *failures)


async def last_failures(handle: Handle) -> list[str]:
    """Why the activities that a run waits for are tried again, as the server describes it."""
    return [one for waiting in await pending(handle) for one in timeouts_in(waiting.last_failure)]


async def blocking(dock: Dock) -> list[Evidence]:
    seen = asyncio.Event()

    async def given_up(batch: str) -> bool:
        return bool(await last_failures(dock.lab.client.get_workflow_handle(batch)))

    async def in_the_loop() -> Beside:
        try:
            return await beside(dock, "beside-a-loop", call_in_the_loop, given_up)
        finally:
            seen.set()

    def as_long_at_least(batch: str) -> bool:
        (call,) = dock.lab.calls(f"{batch}-call")
        return seen.is_set() and time.time() > call.at + 1.2 * soon().total_seconds()

    loop, thread = await asyncio.gather(
        in_the_loop(), beside(dock, "beside-a-thread", call_in_a_thread, as_long_at_least)
    )
    return [
        limit(
            "a blocking call in an async activity silences its neighbours: one that heartbeats is given up and retried",
            heartbeat_timeout=figure(soon().total_seconds(), "s"),
            blocked_for=figure(loop.blocked, "s"),
            attempts_of_the_neighbour=at_least(len([one for one in loop.ledger if one.startswith("begun")]), 2),
            result=equal(loop.result, MANY),
            what_describe_tells_of_the_neighbour=equal(loop.batch_failed, ["HEARTBEAT"]),
            and_of_the_call_that_blocks=loop.call_failed,
        ),
        control(
            "beside the same call in a thread the neighbour needs one attempt",
            blocked_for=at_least(figure(thread.blocked, "s"), soon().total_seconds()),
            ledger=equal(thread.ledger, ["begun 1", "ended 1"]),
            result=equal(thread.result, MANY),
        ),
    ]


@RT.item("RT-04", "Heartbeat")
async def heartbeat(lab: Lab) -> AsyncIterator[Evidence]:
    """Batches stall, die and are cancelled, with heartbeats and without; a ledger keeps each item."""
    dock = Dock(lab)
    parts = (stall_noticed, worker_lost, cancellation, completed_outside, unsent_details, blocking)
    imports = dock.parts()
    imports["workflows"], imports["activities"] = [ImportBatch, Outsourced], [*imports["activities"], ask_outsider]
    async with lab.worker(**imports):
        async for evidence in side_by_side(*(part(dock) for part in parts)):
            yield evidence
    yield native(
        "sign of life, details and cancellation are one call of the SDK's",
        activity.heartbeat,
        (activity.Info, "heartbeat_details"),
        (workflow.execute_activity_method, "heartbeat_timeout"),
        (workflow.execute_activity_method, "cancellation_type"),
        workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        (Worker, "max_heartbeat_throttle_interval"),
        activity.raise_complete_async,
        (Client.get_async_activity_handle, "task_token"),
        AsyncActivityHandle.heartbeat,
        AsyncActivityHandle.complete,
    )


if __name__ == "__main__":
    run(RT)
