"""RT: retries and timeouts - what is tried again, when it is given up, and how a stall is noticed.

An activity that fails is not an exception to handle, it is an attempt that the server repeats by a
policy. An activity that does not answer is bounded by timeouts, and the server keeps those clocks, so
that they run whether or not a worker lives. The four items ask whether the policy is obeyed, whether
each clock fires, what protects a service that is down from its callers, and what a heartbeat adds.
"""

from common import Category, Evidence, causes, control, holds, limit, native, side_by_side, works
from lab import (
    Child,
    Lab,
    Server,
    count_events,
    event_times,
    history_of,
    keywords_in,
    name_of,
    note,
    notes,
    run,
    status_of,
    until,
)

import asyncio
import inspect
import io
import itertools
import os
import signal
import time
import tokenize
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import nexusrpc
import nexusrpc.handler
import temporalio
from temporalio import activity, workflow
from temporalio.api.enums.v1 import PendingNexusOperationState
from temporalio.client import (
    AsyncActivityHandle,
    Client,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowUpdateFailedError,
)
from temporalio.common import RetryPolicy
from temporalio.converter import DataConverter
from temporalio.exceptions import ActivityError, ApplicationError, TimeoutError, TimeoutType
from temporalio.worker import Worker

RT = Category(
    "RT",
    "Retries and timeouts",
    "What is tried again, when is it given up, and how is a stall noticed?",
)

# Where a timeout is not what is shown, a slow machine gets all the time it needs.
PATIENT = timedelta(seconds=30)
# An attempt that a kill has cut off is given up after this long.
SOON = timedelta(seconds=2)


async def failure_of(handle: WorkflowHandle[Any, Any]) -> list[BaseException]:
    """What a run failed with, outermost first; empty when it completed."""
    found: list[BaseException] = []
    try:
        await handle.result()
    except WorkflowFailureError as error:
        found = causes(error.cause)
    return found


def kind_of(failure: BaseException) -> str:
    """A failure in a word: the type that was given to it, or that of the timeout."""
    if isinstance(failure, ApplicationError):
        return str(failure.type)
    if isinstance(failure, TimeoutError) and failure.type is not None:
        return failure.type.name
    return type(failure).__name__


def in_words(seconds: Sequence[float]) -> str:
    return ", ".join(f"{one:.2f}" for one in seconds) + " s"


# RT-01 Retry strategy --------------------------------------------------------------------------------
# A failed attempt is repeated by the server, by a policy that is data: the activity has no retry loop,
# and the workflow sees the last attempt only.

POLICIES = {
    "quick": RetryPolicy(initial_interval=timedelta(milliseconds=100)),
    "growing": RetryPolicy(
        initial_interval=timedelta(seconds=0.5),
        backoff_coefficient=5,
        maximum_interval=timedelta(seconds=3),
    ),
    "once": RetryPolicy(maximum_attempts=1),
    "four": RetryPolicy(initial_interval=timedelta(milliseconds=100), maximum_attempts=4),
    "not BadRequest": RetryPolicy(
        initial_interval=timedelta(milliseconds=100),
        maximum_attempts=3,
        non_retryable_error_types=["BadRequest"],
    ),
    "hourly": RetryPolicy(initial_interval=timedelta(hours=1)),
    "steady": RetryPolicy(initial_interval=timedelta(seconds=3), backoff_coefficient=1),
}


@dataclass
class Call:
    """A call of a service that fails at first."""

    ledger: str
    failures: int = 2  # so many attempts fail
    error: str = "Unreachable"
    final: bool = False  # the error itself says that a retry is useless
    retry_after: float = 0  # seconds after which the error asks to be retried
    kills_in: int = 0  # the first attempt to begin, from this one on, kills its own worker


@activity.defn
async def call_service(call: Call) -> str:
    attempt = activity.info().attempt
    note(call.ledger, f"{attempt} begun {time.monotonic()}")
    if 0 < call.kills_in <= attempt and "killed" not in str(notes(call.ledger)):
        note(call.ledger, f"{attempt} killed {time.monotonic()}")
        os.kill(os.getpid(), signal.SIGKILL)
    if attempt > call.failures:
        return "answered"
    delay = timedelta(seconds=call.retry_after) if call.retry_after else None
    note(call.ledger, f"{attempt} failed {time.monotonic()}")
    raise ApplicationError("no answer", type=call.error, non_retryable=call.final, next_retry_delay=delay)


@workflow.defn
class Retrying:
    @workflow.run
    async def run(self, call: Call, policy: str) -> str:
        return await workflow.execute_activity(
            call_service, call, start_to_close_timeout=SOON if call.kills_in else PATIENT, retry_policy=POLICIES[policy]
        )


def attempts(ledger: str) -> list[int]:
    """The numbers of the attempts that were begun."""
    return [int(line.split()[0]) for line in notes(ledger) if "begun" in line]


def gaps(ledger: str) -> list[float]:
    """Seconds from each failed attempt to the beginning of the next, by the worker's own clock."""
    times = [(line.split()[1], float(line.split()[2])) for line in notes(ledger)]
    pairs = itertools.pairwise(times)
    return [after - before for (was, before), (now, after) in pairs if (was, now) == ("failed", "begun")]


def tokens_of(function: Callable[..., Any]) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(inspect.getsource(function)).readline))


async def retried(lab: Lab, name: str, policy: str, call: Call | None = None) -> tuple[str, list[BaseException]]:
    """Run one call under a policy. Returns (its ledger, what the workflow failed with)."""
    call = call or Call(lab.file(name))
    handle = await lab.client.start_workflow(
        Retrying.run, args=[call, policy], id=f"{lab.id}-{name}", task_queue=lab.task_queue
    )
    return call.ledger, await failure_of(handle)


async def third_attempt_succeeds(lab: Lab) -> Evidence:
    ledger, failed = await retried(lab, "third", "quick")
    handle: WorkflowHandle[Any, str] = lab.client.get_workflow_handle(f"{lab.id}-third", result_type=str)
    events, count = await history_of(handle), await count_events(handle)
    recorded = [event["activityTaskStartedEventAttributes"]["attempt"] for event in events
                if event["eventType"] == "EVENT_TYPE_ACTIVITY_TASK_STARTED"]  # fmt: skip
    return works(
        "two attempts fail, the third succeeds, and the workflow sees only that",
        not failed and await handle.result() == "answered" and attempts(ledger) == [1, 2, 3] and recorded == [3]
        and len(gaps(ledger)) == 2 and count["ACTIVITY_TASK_COMPLETED"] == 1 and not count["ACTIVITY_TASK_FAILED"],
        f"attempts that ran (ledger): {attempts(ledger)}, {len(gaps(ledger))} failed; in the history: one activity, "
        f"started at attempt {recorded}, {count['ACTIVITY_TASK_FAILED']} failed, "
        f"{count['ACTIVITY_TASK_COMPLETED']} completed",
    )  # fmt: skip


async def decided_intervals(handle: WorkflowHandle[Any, Any]) -> dict[tuple[str, int], float]:
    """The interval before each attempt as the server decided it, by activity id and attempt.

    A busy machine delays attempts, but not this; what it may do is hide a short interval from us.
    """
    decided: dict[tuple[str, int], float] = {}

    async def over() -> bool:
        description = await handle.describe()
        for one in description.raw_description.pending_activities:
            # It has failed, and waits for its retry.
            if one.HasField("next_attempt_schedule_time") and one.HasField("last_attempt_complete_time"):
                wait = one.next_attempt_schedule_time.ToDatetime() - one.last_attempt_complete_time.ToDatetime()
                decided[one.activity_id, one.attempt] = wait.total_seconds()
        return description.status != WorkflowExecutionStatus.RUNNING

    await until(over, "the calls were answered", 60)
    return decided


async def growing_gaps(lab: Lab) -> Evidence:
    """Decided by the server: the interval. Measured by the ledger: no attempt began before it was over."""
    call = Call(lab.file("growing"), failures=4)
    handle = await lab.client.start_workflow(
        Retrying.run, args=[call, "growing"], id=f"{lab.id}-growing", task_queue=lab.task_queue
    )
    intervals = {attempt: wait for (_, attempt), wait in (await decided_intervals(handle)).items()}
    expected = {2: 0.5, 3: 2.5, 4: 3.0, 5: 3.0}  # without the cap: 0.5, 2.5, 12.5, 62.5
    measured = gaps(call.ledger)
    as_decided = all(abs(wait - expected[attempt]) < 0.01 for attempt, wait in intervals.items())
    return holds(
        "the gaps between attempts grow by the coefficient up to the cap",
        attempts(call.ledger) == [1, 2, 3, 4, 5] and as_decided and {3, 4, 5} <= set(intervals)
        and all(gap >= wait for gap, wait in zip(measured, expected.values(), strict=True)),
        f"0.5 s x 5, at most 3 s: expected {in_words([*expected.values()])} (without the cap 0.5, 2.5, 12.5, 62.5 s); "
        f"decided by the server {in_words([*intervals.values()])}; measured by the ledger {in_words(measured)}",
    )  # fmt: skip


async def non_retryable(lab: Lab) -> Evidence:
    """An error that the policy lists, one that says so itself, and one that neither concerns."""
    (listed, by_type), (marked, by_error), (other, usual) = await asyncio.gather(
        retried(lab, "listed", "not BadRequest", Call(lab.file("listed"), failures=3, error="BadRequest")),
        retried(lab, "marked", "not BadRequest", Call(lab.file("marked"), failures=3, final=True)),
        retried(lab, "other", "not BadRequest", Call(lab.file("other"), failures=3)),
    )
    kinds = [kind_of(failure[-1]) if failure else "none" for failure in (by_type, by_error, usual)]
    return holds(
        "a non-retryable type and a non-retryable error stop at the first attempt, another error does not",
        [attempts(listed), attempts(marked), attempts(other)] == [[1], [1], [1, 2, 3]]
        and kinds == ["BadRequest", "Unreachable", "Unreachable"],
        f"attempts: {attempts(listed)} for a type in non_retryable_error_types, {attempts(marked)} for "
        f"ApplicationError(non_retryable=True), {attempts(other)} for another error; reported: {', '.join(kinds)}",
    )


async def retry_after(lab: Lab) -> Evidence:
    """The service says when to come back, as with HTTP's Retry-After; the policy alone would wait an hour."""
    ledger, failed = await retried(lab, "after", "hourly", Call(lab.file("after"), failures=2, retry_after=1.5))
    seen = gaps(ledger)
    return holds(
        "next_retry_delay in the error overrides the policy's interval",
        not failed and attempts(ledger) == [1, 2, 3] and len(seen) == 2 and all(1.5 <= gap < 30 for gap in seen),
        f"policy 1 h, the error asks for 1.5 s: gaps {in_words(seen)}",
    )


async def count_survives_kill(lab: Lab) -> Evidence:
    """Attempt 2 kills its worker. Attempts are counted by the server, so the next worker has two left.

    On a slow machine an attempt may be given up before it begins, and then counts without having run.
    """
    call, queue = Call(lab.file("killed"), failures=9, kills_in=2), f"{lab.id}-killed"
    handle = await lab.client.start_workflow(Retrying.run, args=[call, "four"], id=queue, task_queue=queue)
    async with lab.worker_process([Retrying], [call_service], task_queue=queue) as worker:
        await worker.wait()
    before = attempts(call.ledger)
    async with lab.worker([Retrying], [call_service], task_queue=queue):
        failed = await failure_of(handle)
    after = attempts(call.ledger)[len(before) :]
    return holds(
        "worker killed inside a retry: the next worker goes on with the count, and stops after 4 attempts in all",
        len(before) > 1 and len(after) > 0 and after[-1] == 4 and before + after == sorted({*before, *after})
        and bool(failed) and kind_of(failed[-1]) == "Unreachable",
        f"attempts before SIGKILL {before}, after it {after}; then the workflow failed with "
        f"{kind_of(failed[-1]) if failed else 'nothing'}",
    )  # fmt: skip


@activity.defn
async def report_run(ledger: str) -> None:
    note(ledger, str(activity.info().workflow_run_id))


@workflow.defn
class Flawed:
    """Fails as a whole, twice. A retried workflow begins anew: another run with the same id."""

    @workflow.run
    async def run(self, ledger: str) -> str:
        await workflow.execute_activity(report_run, ledger, start_to_close_timeout=PATIENT)
        if workflow.info().attempt < 3:
            raise ApplicationError("a flaw", type="Flaw")
        return "done"


async def whole_workflow(lab: Lab) -> Evidence:
    """Workflows have no retry policy unless they are given one."""
    with_policy, without = lab.file("flawed"), lab.file("unretried")
    first, second = await asyncio.gather(
        lab.client.start_workflow(
            Flawed.run,
            with_policy,
            id=f"{lab.id}-flawed",
            task_queue=lab.task_queue,
            retry_policy=RetryPolicy(initial_interval=timedelta(milliseconds=100), maximum_attempts=3),
        ),
        lab.client.start_workflow(Flawed.run, without, id=f"{lab.id}-unretried", task_queue=lab.task_queue),
    )
    failed, failed_without = await asyncio.gather(failure_of(first), failure_of(second))
    runs = notes(with_policy)
    states = [name_of(await status_of(lab.client.get_workflow_handle(first.id, run_id=one))) for one in runs]
    return holds(
        "a retry policy on the workflow repeats the workflow as a whole; without one it fails at once",
        not failed and states == ["FAILED", "FAILED", "COMPLETED"] and len(set(runs)) == 3
        and len(notes(without)) == 1 and [kind_of(one) for one in failed_without] == ["Flaw"],
        f"{len(set(runs))} runs of one id: {', '.join(states)}; without a policy: {len(notes(without))} run, failed",
    )  # fmt: skip


HERD = 28


@workflow.defn
class Herd:
    """Many equal calls at once."""

    @workflow.run
    async def run(self, calls: list[Call]) -> None:
        members = (
            workflow.execute_activity(
                call_service, call, start_to_close_timeout=PATIENT, retry_policy=POLICIES["steady"]
            )
            for call in calls
        )
        await asyncio.gather(*members)


@dataclass
class Stampede:
    """What became of a herd whose members all failed once."""

    decided: dict[int, float]  # by member, the interval that the server decided on
    failed: list[float]  # when the first attempts failed
    again: list[float]  # when the second attempts began


async def herd(lab: Lab, name: str, delays: Sequence[float]) -> Stampede:
    calls = [Call(lab.file(f"{name}-{n}"), failures=1, retry_after=delay) for n, delay in enumerate(delays)]
    handle = await lab.client.start_workflow(Herd.run, calls, id=f"{lab.id}-{name}", task_queue=lab.task_queue)
    # Activity ids are numbered in the order of the calls, from 1.
    decided = {int(id) - 1: wait for (id, attempt), wait in (await decided_intervals(handle)).items() if attempt == 2}
    lines = [line.split() for call in calls for line in notes(call.ledger)]
    failed = [float(at) for _, what, at in lines if what == "failed"]
    return Stampede(decided, failed, [float(at) for number, _, at in lines if number == "2"])


def spread(values: Iterable[float]) -> float:
    known = list(values)
    return max(known) - min(known)


async def no_jitter(lab: Lab) -> list[Evidence]:
    asked = [lab.random.uniform(2.5, 4.5) for _ in range(HERD)]
    equal, random = await asyncio.gather(herd(lab, "equal", [0] * HERD), herd(lab, "random", asked))
    followed = all(abs(wait - asked[member]) < 0.01 for member, wait in random.decided.items())
    intervals = list(equal.decided.values())
    return [
        control(
            "the measurement would see jitter: retries that ask for random delays are seen to be spread",
            spread(random.decided.values()) > 1 and followed and min(len(random.decided), len(intervals)) >= 20,
            f"delays of {min(asked):.2f} to {max(asked):.2f} s drawn by the user (next_retry_delay), decided by the "
            f"server: {min(random.decided.values()):.2f} to {max(random.decided.values()):.2f} s; "
            f"{len(random.decided)} of {HERD} random and {len(intervals)} of {HERD} equal intervals were caught",
        ),
        limit(
            "retries have no jitter: callers that failed together come back together",
            spread(intervals) < 0.1,
            f"{len(intervals)} equal retries after 3 s: intervals decided {min(intervals):.4f} to {max(intervals):.4f} "
            f"s, spread {spread(intervals) * 1000:.1f} ms (a jitter of 10 % would be 600 ms). A thundering herd: "
            f"{HERD} callers that failed within {spread(equal.failed):.2f} s called again within "
            f"{spread(equal.again):.2f} s; with random delays of the user's own, within {spread(random.again):.2f} s",
        ),
    ]


async def no_retry(lab: Lab) -> Evidence:
    ledger, failed = await retried(lab, "once", "once")
    return control(
        "maximum_attempts=1: the same service fails the workflow",
        attempts(ledger) == [1] and [kind_of(one) for one in failed] == ["ActivityError", "Unreachable"],
        f"attempts that ran: {attempts(ledger)}; the workflow failed with "
        f"{' <- '.join(kind_of(one) for one in failed) or 'nothing'}",
    )


@RT.item("RT-01", "Retry strategy", fail_closed=True)
async def retry_strategy(lab: Lab) -> AsyncIterator[Evidence]:
    """Calls fail as they are told; a ledger keeps when each attempt began and failed."""
    jitter = asyncio.create_task(no_jitter(lab))
    parts = (
        third_attempt_succeeds, no_retry, non_retryable, retry_after, whole_workflow, count_survives_kill, growing_gaps,
    )  # fmt: skip
    async with lab.worker([Retrying, Flawed, Herd], [call_service, report_run]):
        async for evidence in side_by_side(*(part(lab) for part in parts)):
            yield evidence
        for evidence in await jitter:
            yield evidence
    yield native(
        "a RetryPolicy is all there is to write: no loop and no handler in workflow or activity",
        (workflow.execute_activity, "retry_policy"),
        (Client.start_workflow, "retry_policy"),
        (RetryPolicy, "initial_interval"),
        (RetryPolicy, "backoff_coefficient"),
        (RetryPolicy, "maximum_interval"),
        (RetryPolicy, "maximum_attempts"),
        (RetryPolicy, "non_retryable_error_types"),
        (ApplicationError, "type"),
        (ApplicationError, "non_retryable"),
        (ApplicationError, "next_retry_delay"),
        adds=keywords_in([Retrying, Flawed, call_service], "for", "while", "try"),
    )


# RT-02 Timeout system --------------------------------------------------------------------------------
# The server keeps the clocks. Each timeout answers a question of its own: how long may an attempt take,
# all attempts together, the wait for a worker, and the silence between two heartbeats?


@dataclass
class Job:
    ledger: str
    seconds: float = 5
    beats: bool = False
    kills: bool = False  # kills its own worker


@activity.defn
async def slow_job(job: Job) -> str:
    note(job.ledger, f"begun {activity.info().attempt}")
    if job.kills:
        os.kill(os.getpid(), signal.SIGKILL)
    end = time.monotonic() + job.seconds
    try:
        while (left := end - time.monotonic()) > 0:
            if job.beats:
                activity.heartbeat()
            await asyncio.sleep(min(left, 0.2))
    except asyncio.CancelledError:
        note(job.ledger, f"cancelled {activity.info().attempt}")
        raise
    note(job.ledger, f"ended {activity.info().attempt}")
    return "done"


@dataclass
class Limits:
    """Timeouts in seconds; None where there is none."""

    start_to_close: float | None = None
    schedule_to_close: float | None = None
    schedule_to_start: float | None = None
    heartbeat: float | None = None
    attempts: int = 1
    task_queue: str | None = None


def seconds(number: float | None) -> timedelta | None:
    return None if number is None else timedelta(seconds=number)


@workflow.defn
class Timed:
    @workflow.run
    async def run(self, job: Job, limits: Limits) -> str:
        return await workflow.execute_activity(
            slow_job,
            job,
            start_to_close_timeout=seconds(limits.start_to_close),
            schedule_to_close_timeout=seconds(limits.schedule_to_close),
            schedule_to_start_timeout=seconds(limits.schedule_to_start),
            heartbeat_timeout=seconds(limits.heartbeat),
            retry_policy=RetryPolicy(
                initial_interval=timedelta(milliseconds=100),
                backoff_coefficient=1,
                maximum_attempts=limits.attempts,
            ),
            task_queue=limits.task_queue,
        )


def when(events: Sequence[dict[str, Any]], kind: str) -> float:
    """The server's time of the first event of a type, in seconds."""
    found = event_times(events, kind)
    return found[0].timestamp() if found else float("nan")


async def fires(lab: Lab, expected: TimeoutType, limits: Limits, since: str) -> tuple[bool, str]:
    """Let a job of 5 s run into a timeout of 1 s: was it the expected one, in time, and what was seen."""
    job, id = Job(lab.file(expected.name)), f"{lab.id}-{expected.name}"
    handle = await lab.client.start_workflow(Timed.run, args=[job, limits], id=id, task_queue=lab.task_queue)
    failed = await failure_of(handle)
    events = await history_of(handle)
    after = when(events, "ACTIVITY_TASK_TIMED_OUT") - when(events, since)
    told = kind_of(failed[-1]) if failed else "none"
    untouched = expected != TimeoutType.SCHEDULE_TO_START or not notes(job.ledger)
    return told == expected.name and 1 <= after < job.seconds and untouched, f"{told} after {after:.2f} s"


async def each_fires(lab: Lab) -> Evidence:
    nobody = f"{lab.id}-nobody"
    cases = (
        fires(lab, TimeoutType.START_TO_CLOSE, Limits(start_to_close=1), "ACTIVITY_TASK_STARTED"),
        fires(lab, TimeoutType.SCHEDULE_TO_CLOSE, Limits(schedule_to_close=1), "ACTIVITY_TASK_SCHEDULED"),
        fires(lab, TimeoutType.SCHEDULE_TO_START, Limits(30, None, 1, task_queue=nobody), "ACTIVITY_TASK_SCHEDULED"),
        fires(lab, TimeoutType.HEARTBEAT, Limits(30, heartbeat=1), "ACTIVITY_TASK_STARTED"),
    )
    found = await asyncio.gather(*cases)
    return works(
        "each of the four activity timeouts fires with its own type, not early, and before the job has ended",
        all(right for right, _ in found),
        f"limit 1 s, job 5 s, times of the server's events: {'; '.join(told for _, told in found)}",
    )


async def room_to_spare(lab: Lab) -> Evidence:
    """The same job under the same kinds of timeout, with room; for the last one it heartbeats."""
    cases = {
        "start-to-close 30 s": Limits(start_to_close=30),
        "schedule-to-close 30 s": Limits(schedule_to_close=30),
        "schedule-to-start 30 s": Limits(start_to_close=30, schedule_to_start=30),
        "heartbeat 10 s": Limits(start_to_close=30, heartbeat=10),
    }
    ledger = lab.file("room")
    results = (
        lab.client.execute_workflow(
            Timed.run,
            args=[Job(ledger, beats=limits.heartbeat is not None), limits],
            id=f"{lab.id}-room-{number}",
            task_queue=lab.task_queue,
        )
        for number, limits in enumerate(cases.values())
    )
    done = await asyncio.gather(*results, return_exceptions=True)
    return control(
        "the same slow job with room to spare completes",
        done == ["done"] * 4 and Counter(notes(ledger)) == {"begun 1": 4, "ended 1": 4},
        f"{', '.join(cases)}: {done.count('done')} of 4 completed; "
        f"begun {notes(ledger).count('begun 1')}, ended {notes(ledger).count('ended 1')} (ledger)",
    )


async def all_attempts_together(lab: Lab) -> Evidence:
    """Each attempt hangs and is given up after 1 s; there is no limit to their number but the clock."""
    job, id = Job(lab.file("together"), seconds=20), f"{lab.id}-together"
    limits = Limits(start_to_close=1, schedule_to_close=4, attempts=0)
    handle = await lab.client.start_workflow(Timed.run, args=[job, limits], id=id, task_queue=lab.task_queue)
    failed = await failure_of(handle)
    ran = [line for line in notes(job.ledger) if line.startswith("begun")]
    events = await history_of(handle)
    after = when(events, "ACTIVITY_TASK_TIMED_OUT") - when(events, "ACTIVITY_TASK_SCHEDULED")
    types = [kind_of(one) for one in failed]
    return holds(
        "schedule-to-close bounds all attempts and the waits between them together",
        len(ran) >= 2 and 1 < after < 8 and "SCHEDULE_TO_CLOSE" in types,
        f"start-to-close 1 s, schedule-to-close 4 s, attempts unlimited: {len(ran)} attempts ran, given up after "
        f"{after:.2f} s: {' <- '.join(types)}",
    )


@workflow.defn
class Relay:
    """Hands over to a second run of itself, and that one never ends."""

    @workflow.run
    async def run(self, seconds: float) -> None:
        await workflow.sleep(seconds)
        workflow.continue_as_new(3600.0)


EXECUTION = "EVENT_TYPE_WORKFLOW_EXECUTION_"


async def second_run(
    lab: Lab, name: str, run: timedelta | None = None, execution: timedelta | None = None
) -> tuple[str, float, float]:
    """Let a timeout end the second run. Returns (its status, how long it lasted, how long both did)."""
    handle = await lab.client.start_workflow(
        Relay.run,
        1.5,
        id=f"{lab.id}-{name}",
        task_queue=lab.task_queue,
        run_timeout=run,
        execution_timeout=execution,
    )
    failed = await failure_of(handle)
    first = await history_of(lab.client.get_workflow_handle(handle.id, run_id=handle.first_execution_run_id))
    last = await history_of(lab.client.get_workflow_handle(handle.id))
    begun, continued, ended = (when(first, "WORKFLOW_EXECUTION_STARTED"), when(last, "WORKFLOW_EXECUTION_STARTED"),
                               when(last, "WORKFLOW_EXECUTION_TIMED_OUT"))  # fmt: skip
    return f"{first[-1]['eventType'].removeprefix(EXECUTION)}, {kind_of(failed[-1])}", ended - continued, ended - begun


async def run_and_execution(lab: Lab) -> Evidence:
    """One clock begins anew with every run, the other one bounds the whole chain of runs."""
    expected = "CONTINUED_AS_NEW, START_TO_CLOSE"
    for length in (10, 40):  # on a busy machine the first run may not come to its handing over within 10 s
        bound = timedelta(seconds=length)
        (status, second, both), (bounded_status, bounded_second, bounded_both) = await asyncio.gather(
            second_run(lab, f"renewed-{length}", run=bound), second_run(lab, f"bounded-{length}", execution=bound)
        )
        if status == bounded_status == expected:
            break
    return holds(
        "the run timeout begins anew with each run, the execution timeout bounds the whole chain of them",
        status == bounded_status == expected and second >= 0.95 * length and both >= length + 1.5
        and bounded_second < length - 1 and 0.95 * length <= bounded_both < both,
        f"two runs, the first of 1.5 s or more; run_timeout {length} s ends the second after {second:.2f} s, and both "
        f"after {both:.2f} s; execution_timeout {length} s ends the second after {bounded_second:.2f} s, and both "
        f"after {bounded_both:.2f} s",
    )  # fmt: skip


@workflow.defn
class DiesDeciding:
    """The worker dies inside the first workflow task, while the workflow's code is being run."""

    @workflow.run
    async def run(self, ledger: str) -> str:
        with workflow.unsafe.sandbox_unrestricted():
            note(ledger, "decided")
            if len(notes(ledger)) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return "done"


async def task_timeout(lab: Lab) -> Evidence:
    """The third clock bounds the worker's answer to a workflow task. It is not an end, but a second try."""
    ledger, queue = lab.file("deciding"), f"{lab.id}-deciding"
    handle = await lab.client.start_workflow(
        DiesDeciding.run, ledger, id=queue, task_queue=queue, task_timeout=timedelta(seconds=2)
    )
    async with lab.worker_process([DiesDeciding], task_queue=queue) as worker:
        await worker.wait()
    async with lab.worker([DiesDeciding], task_queue=queue):
        failed = await failure_of(handle)
    events, count = await history_of(handle), await count_events(handle)
    after = when(events, "WORKFLOW_TASK_TIMED_OUT") - when(events, "WORKFLOW_TASK_STARTED")
    return holds(
        "worker killed inside a workflow task: the task times out and another worker takes it",
        not failed and len(notes(ledger)) == 1 + count["WORKFLOW_TASK_TIMED_OUT"] >= 2 and 2 <= after < 8,
        f"task_timeout 2 s: given up {after:.2f} s after it was started; the workflow's code ran "
        f"{len(notes(ledger))} times, then the run completed",
    )


async def nobody_alive(lab: Lab) -> Evidence:
    """One activity whose worker is dead, and one workflow that never had a worker."""
    job, queue = Job(lab.file("alone"), kills=True), f"{lab.id}-alone"
    begun = await lab.client.start_workflow(
        Timed.run, args=[job, Limits(start_to_close=1)], id=queue, task_queue=queue
    )  # fmt: skip
    never = await lab.client.start_workflow(
        Relay.run, 1.0, id=f"{lab.id}-never", task_queue=f"{lab.id}-never", run_timeout=timedelta(seconds=1)
    )
    async with lab.worker_process([Timed], [slow_job], task_queue=queue) as worker:
        await worker.wait()

    async def both_fired() -> bool:
        timed_out = (await count_events(begun))["ACTIVITY_TASK_TIMED_OUT"]
        return bool(timed_out) and await status_of(never) == WorkflowExecutionStatus.TIMED_OUT

    await until(both_fired, "both timeouts fired")
    events, untouched = await history_of(begun), await count_events(never)
    ends = await history_of(never)
    after = when(events, "ACTIVITY_TASK_TIMED_OUT") - when(events, "ACTIVITY_TASK_STARTED")
    lasted = when(ends, "WORKFLOW_EXECUTION_TIMED_OUT") - when(ends, "WORKFLOW_EXECUTION_STARTED")
    return holds(
        "timeouts fire with no worker alive",
        not worker.alive and 1 <= after < 6 and 0.9 <= lasted < 6 and not untouched["WORKFLOW_TASK_STARTED"]
        and notes(job.ledger) == ["begun 1"],
        f"only worker killed inside the activity: start-to-close fired after {after:.2f} s (limit 1 s); a workflow "
        f"that no worker ever took: run timeout fired after {lasted:.2f} s (limit 1 s)",
    )  # fmt: skip


async def goes_on(lab: Lab) -> Evidence:
    """A timeout is the server's decision. The code that it gave up hears of it only through a heartbeat."""
    silent, beating = Job(lab.file("silent")), Job(lab.file("beating"), seconds=20, beats=True)
    first, second = await asyncio.gather(
        lab.client.start_workflow(
            Timed.run,
            args=[silent, Limits(start_to_close=1, attempts=2)],
            id=f"{lab.id}-silent",
            task_queue=lab.task_queue,
        ),
        lab.client.start_workflow(
            Timed.run,
            args=[beating, Limits(start_to_close=1, heartbeat=1)],
            id=f"{lab.id}-beating",
            task_queue=lab.task_queue,
        ),
    )
    failures = await asyncio.gather(failure_of(first), failure_of(second))
    told = [kind_of(failed[-1]) if failed else "none" for failed in failures]
    await until(lambda: len(notes(silent.ledger)) == 4, "both attempts of the silent job were over")
    await until(lambda: "cancelled 1" in notes(beating.ledger), "the beating job was stopped")
    order = notes(silent.ledger)
    overlapped = "ended 1" in order and order.index("begun 2") < order.index("ended 1")
    return limit(
        "an attempt that was given up is not stopped: it goes on beside its retry, unless it heartbeats",
        overlapped and told == ["START_TO_CLOSE"] * 2,
        f"job of 5 s, start-to-close 1 s, 2 attempts: {', '.join(order)}; a job of 20 s "
        f"with heartbeats: {', '.join(notes(beating.ledger))}",
    )


@RT.item("RT-02", "Timeout system")
async def timeout_system(lab: Lab) -> AsyncIterator[Evidence]:
    """Slow jobs run into each timeout; the gaps are taken from the server's events, what ran from a ledger."""
    parts = (
        room_to_spare, all_attempts_together, run_and_execution, task_timeout, nobody_alive, goes_on,
    )  # fmt: skip
    async with lab.worker([Timed, Relay], [slow_job]):
        yield await each_fires(lab)
        async for evidence in side_by_side(*(part(lab) for part in parts)):
            yield evidence
    yield native(
        "each timeout is one argument",
        (workflow.execute_activity, "start_to_close_timeout"),
        (workflow.execute_activity, "schedule_to_close_timeout"),
        (workflow.execute_activity, "schedule_to_start_timeout"),
        (workflow.execute_activity, "heartbeat_timeout"),
        (Client.start_workflow, "execution_timeout"),
        (Client.start_workflow, "run_timeout"),
        (Client.start_workflow, "task_timeout"),
        TimeoutError,
        TimeoutType,
    )


# RT-03 Circuit breaker -------------------------------------------------------------------------------
# Retries protect a caller; nothing protects the service that is down from all its callers. A breaker
# that all of them share is a workflow that makes the call for them, or refuses to.


class Service:
    """An imaginary service outside Temporal: it notes each call, and is down or slow when told to be."""

    def __init__(self, path: str) -> None:
        self.path, self.down, self.held = path, Path(f"{path}.down"), Path(f"{path}.held")

    def calls(self) -> list[float]:
        return [float(line) for line in notes(self.path)]


@activity.defn
async def pay(service: str) -> str:
    note(service, str(time.monotonic()))
    while Service(service).held.exists():
        await asyncio.sleep(0.05)
    if Service(service).down.exists():
        raise ApplicationError("the service is down", type="ServiceDown")
    return "paid"


@dataclass
class Circuit:
    """The state of a breaker: all that a new run of it must know."""

    threshold: int = 3  # so many failures in a row open it
    window: float = 1  # seconds that it stays open
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
    async def call(self, service: str) -> str:
        while not self.has_room():  # of several who waited for one place, one gets it
            await workflow.wait_condition(self.has_room)
        self.refuse_when_open()
        self.calling += 1
        try:
            answer = await workflow.execute_activity(
                pay, service, start_to_close_timeout=PATIENT, retry_policy=RetryPolicy(maximum_attempts=1)
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
    def check(self, service: str) -> None:
        """An update that is refused here leaves nothing in the history."""
        self.refuse_when_open()

    @workflow.query
    def state(self) -> Circuit:
        return self.circuit


@dataclass
class Purchase:
    service: str
    breaker: str | None = None  # the id of the breaker's workflow; None calls the service directly


@activity.defn
async def pay_through_breaker(purchase: Purchase) -> str:
    """The update's id makes it safe to retry this activity: a run of the breaker answers an id only once."""
    breaker = activity.client().get_workflow_handle(str(purchase.breaker))
    id = f"{activity.info().workflow_id}/{activity.info().activity_id}"
    try:
        return await breaker.execute_update(Breaker.call, purchase.service, id=id)
    except WorkflowUpdateFailedError as error:
        raise root_cause(error) from None


def root_cause(error: BaseException) -> BaseException:
    return root_cause(error.__cause__) if error.__cause__ else error


NO_RETRY = RetryPolicy(maximum_attempts=3, non_retryable_error_types=["ServiceDown"])


@workflow.defn
class Buy:
    @workflow.run
    async def run(self, purchase: Purchase) -> str:
        try:
            if purchase.breaker is None:
                return await workflow.execute_activity(
                    pay, purchase.service, start_to_close_timeout=PATIENT, retry_policy=NO_RETRY
                )
            return await workflow.execute_activity(
                pay_through_breaker, purchase, start_to_close_timeout=PATIENT, retry_policy=NO_RETRY
            )
        except ActivityError as error:
            return str(error.cause.type) if isinstance(error.cause, ApplicationError) else type(error.cause).__name__


class Shop:
    """Workflows that buy from one service through one breaker, and what became of them."""

    def __init__(self, lab: Lab, name: str, server: Server | None = None) -> None:
        self.lab, self.id, self.server = lab, f"{lab.id}-{name}", server
        self.client = server.client if server else lab.client
        self.service = Service(lab.file(name))
        self.breaker = self.client.get_workflow_handle(self.id)
        self.bought = 0

    async def open(self, circuit: Circuit) -> None:
        await self.client.start_workflow(Breaker.run, circuit, id=self.id, task_queue=self.id)

    async def buy(self, direct: bool = False) -> str:
        """One workflow that buys. Returns "paid", or the type of the error that it got."""
        self.bought += 1
        return await self.client.execute_workflow(
            Buy.run,
            Purchase(self.service.path, None if direct else self.id),
            id=f"{self.id}-buy-{self.bought}",
            task_queue=self.id,
        )

    async def buy_until_called(self) -> str:
        """Buy again and again until the breaker lets a call through. Returns that call's outcome."""
        outcomes: list[str] = []

        async def called() -> bool:
            await asyncio.sleep(0.2)
            outcomes.append(await self.buy())
            return outcomes[-1] != "CircuitOpen"

        await until(called, "the breaker let a call through")
        return outcomes[-1]

    def worker(self) -> Worker:
        return self.lab.worker([Breaker, Buy], [pay, pay_through_breaker], server=self.server, task_queue=self.id)

    def worker_process(self) -> AbstractAsyncContextManager[Child]:
        return self.lab.worker_process([Breaker, Buy], [pay, pay_through_breaker], task_queue=self.id)


CALLERS = 8


async def through_all_states(lab: Lab) -> Evidence:
    """Closed, open, half-open and down again, open, half-open and up again, closed."""
    shop = Shop(lab, "states")
    async with shop.worker():
        await shop.buy(direct=True)
        begun = time.monotonic()
        await shop.buy(direct=True)
        window = min(6, max(2, 5 * (time.monotonic() - begun)))  # time for some purchases, on a slow machine too
        await shop.open(Circuit(threshold=3, window=window))
        shop.service.down.touch()
        failing = [await shop.buy() for _ in range(3)]
        begun = time.monotonic()
        refused, fast, after_opening = await shop.buy(), time.monotonic() - begun, len(shop.service.calls()) - 2
        probe = await shop.buy_until_called()
        after_probe, probed = await shop.buy(), len(shop.service.calls()) - 2
        shop.service.down.unlink()
        recovered = await shop.buy_until_called()
        closed = await asyncio.gather(*(shop.buy() for _ in range(3)))
    _first, _second, *calls = shop.service.calls()
    pauses = [calls[3] - calls[2], calls[4] - calls[3]]
    return works(
        "a breaker workflow opens after 3 failures, fails fast, tries one call when half-open, and closes",
        failing == ["ServiceDown"] * 3 and refused == "CircuitOpen" and after_opening == 3
        and (probe, after_probe, probed) == ("ServiceDown", "CircuitOpen", 4)
        and recovered == "paid" and closed == ["paid"] * 3 and len(calls) == 8 and min(pauses) >= window,
        f"window {window:.2f} s; 3 failures, then refused in {fast * 1000:.0f} ms without a call; half-open "
        f"{pauses[0]:.2f} s after the third call: {probe}, open again; half-open {pauses[1]:.2f} s later: {recovered}; "
        f"then 3 of 3 paid; {shop.bought - 2} buyers, {len(calls)} calls",
    )  # fmt: skip


async def burst(lab: Lab) -> Evidence:
    """Eight callers at the same moment, of a closed and of a half-open breaker. The service holds its answers."""
    shop = Shop(lab, "burst")
    await shop.open(Circuit(threshold=3, window=1))
    shop.service.down.touch()
    shop.service.held.touch()
    async with shop.worker():
        closed = asyncio.gather(*(shop.buy() for _ in range(CALLERS)))
        await until(lambda: arrived(shop), f"{CALLERS} callers have arrived")
        shop.service.held.unlink()
        outcomes, calls = Counter(await closed), len(shop.service.calls())
        shop.service.down.unlink()
        shop.service.held.touch()
        await asyncio.sleep(1.1)  # the window
        half_open = [asyncio.create_task(shop.buy()) for _ in range(CALLERS)]
        await until(lambda: sum(task.done() for task in half_open) >= CALLERS - 1, "all but the probe are answered")
        probes = len(shop.service.calls()) - calls
        shop.service.held.unlink()
        tried = Counter(await asyncio.gather(*half_open))
    return holds(
        f"{CALLERS} concurrent callers make at most 3 calls of a failing service, and 1 when it is half-open",
        outcomes == {"ServiceDown": 3, "CircuitOpen": 5} and calls == 3
        and probes == 1 and tried == {"CircuitOpen": CALLERS - 1, "paid": 1},
        f"closed: {calls} calls (ledger), {dict(outcomes)}; half-open: {probes} call, {dict(tried)}",
    )  # fmt: skip


async def arrived(shop: Shop) -> bool:
    return (await count_events(shop.breaker))["WORKFLOW_EXECUTION_UPDATE_ACCEPTED"] == CALLERS


async def breaker_survives(lab: Lab) -> Evidence:
    """The worker is killed with two failures counted, and killed again when the breaker is open."""
    shop = Shop(lab, "survives")
    await shop.open(Circuit(threshold=3, window=3600))
    shop.service.down.touch()
    async with shop.worker_process() as worker:
        first = [await shop.buy() for _ in range(2)]
        await worker.kill()
    async with shop.worker_process() as worker:
        third, fourth = await shop.buy(), await shop.buy()
        await worker.kill()
    async with shop.worker():
        later = await asyncio.gather(*(shop.buy() for _ in range(CALLERS)))
    calls = len(shop.service.calls())
    return holds(
        "its count and its state survive two kills of its worker",
        [*first, third, fourth] == ["ServiceDown"] * 3 + ["CircuitOpen"]
        and later == ["CircuitOpen"] * CALLERS and calls == 3,
        f"2 failures, SIGKILL, {third}, {fourth}, SIGKILL, {dict(Counter(later))}; {calls} calls in all",
    )  # fmt: skip


async def handed_over(lab: Lab) -> Evidence:
    """A history must not grow forever. The server's threshold, 4096 events, is lowered to see it passed."""
    async with lab.private_server(settings={"limit.historyCount.suggestContinueAsNew": "10"}) as server:
        shop = Shop(lab, "handed", server)
        await shop.open(Circuit(threshold=3, window=3600))
        first_run = (await shop.breaker.describe()).run_id
        shop.service.down.touch()
        async with shop.worker():
            outcomes = [await shop.buy() for _ in range(5)]
        last_run = (await shop.breaker.describe()).run_id
    calls = len(shop.service.calls())
    return holds(
        "a breaker that continues as new run keeps its count and its state",
        outcomes == ["ServiceDown"] * 3 + ["CircuitOpen"] * 2 and calls == 3 and first_run != last_run,
        f"continued as new at 10 events: {', '.join(outcomes)}; {calls} calls",
    )


async def without_breaker(lab: Lab) -> Evidence:
    shop = Shop(lab, "direct")
    shop.service.down.touch()
    async with shop.worker():
        outcomes = Counter(await asyncio.gather(*(shop.buy(direct=True) for _ in range(CALLERS))))
    calls = len(shop.service.calls())
    return control(
        "maximum_attempts and a non-retryable type alone: every caller still calls",
        outcomes == {"ServiceDown": CALLERS} and calls == CALLERS,
        f"{CALLERS} callers, {calls} calls of the failing service",
    )


@nexusrpc.service
class Payments:
    """The same service as a Nexus operation: the only kind of call for which the server has a breaker."""

    pay: nexusrpc.Operation[str, str]


@nexusrpc.handler.service_handler(service=Payments)
class PaymentsHandler:
    @nexusrpc.handler.sync_operation
    async def pay(self, _: nexusrpc.handler.StartOperationContext, service: str) -> str:
        return await pay(service)


@workflow.defn
class BuyByNexus:
    @workflow.run
    async def run(self, service: str, endpoint: str) -> str:
        payments = workflow.create_nexus_client(service=Payments, endpoint=endpoint)
        return await payments.execute_operation(Payments.pay, service, schedule_to_close_timeout=PATIENT)


async def nexus_breaker(lab: Lab) -> Evidence:
    """The server's own breaker: who calls through it is protected from calling, and left waiting."""
    service, endpoint = Service(lab.file("nexus")), lab.id
    service.down.touch()
    create = ("operator", "nexus", "endpoint", "create", "--name", endpoint, "--target-namespace", "default")
    async with lab.private_server() as server:
        await lab.cli(*create, "--target-task-queue", lab.task_queue, server=server)
        async with lab.worker([BuyByNexus], server=server, nexus_service_handlers=[PaymentsHandler()]):
            handles = [
                await server.client.start_workflow(
                    BuyByNexus.run, args=[service.path, endpoint], id=f"{lab.id}-{number}", task_queue=lab.task_queue
                )
                for number in range(CALLERS)
            ]
            await until(lambda: settled(handles, service), "the callers are blocked, answered or not protected", 40)
            waiting = [await blocked_because(handle) for handle in handles]
    return limit(
        "the server's own breaker, for Nexus operations, does not fail fast: its callers wait",
        all(waiting),
        f"{CALLERS} callers, {len(service.calls())} calls of the failing service, then {len([*filter(None, waiting)])} "
        f"operations BLOCKED ({', '.join(set(waiting))}), their callers still running",
    )


async def blocked_because(handle: WorkflowHandle[Any, Any]) -> str:
    """Why the server holds back a run's Nexus operation; "" when it does not."""
    for one in (await handle.describe()).raw_description.pending_nexus_operations:
        if one.state == PendingNexusOperationState.PENDING_NEXUS_OPERATION_STATE_BLOCKED:
            return one.blocked_reason
    return ""


async def settled(handles: Sequence[WorkflowHandle[Any, Any]], service: Service) -> bool:
    """Each caller is held back, or has ended; or the service was called so often that nothing protects it."""
    await asyncio.sleep(0.3)
    states = [await blocked_because(one) or await status_of(one) != WorkflowExecutionStatus.RUNNING for one in handles]
    return all(states) or len(service.calls()) > 3 * CALLERS


def names_with(word: str) -> list[str]:
    """The names in the SDK's own source that contain a word; generated protocol code left out."""
    package = Path(temporalio.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if word in text.lower() and not {"api", "proto"} & set(path.relative_to(package).parts):
            tokens = tokenize.generate_tokens(io.StringIO(text).readline)
            found |= {one.string for one in tokens if one.type == tokenize.NAME and word in one.string.lower()}
    return sorted(found)


def lines_of(*functions: Callable[..., Any]) -> int:
    """Lines of code: those that hold more than a comment or a docstring."""
    code = (tokenize.NAME, tokenize.OP, tokenize.NUMBER)
    return sum(len({token.start[0] for token in tokens_of(one) if token.type in code}) for one in functions)


@RT.item("RT-03", "Circuit breaker")
async def circuit_breaker(lab: Lab) -> AsyncIterator[Evidence]:
    """Buyers call a service that is down, through a breaker and without; the service counts its calls."""
    parts = (through_all_states, burst, breaker_survives, handed_over, without_breaker, nexus_breaker)
    async for evidence in side_by_side(*(part(lab) for part in parts)):
        yield evidence
    methods = (one for one in vars(Breaker).values() if inspect.isfunction(one))
    built: list[Callable[..., Any]] = [*methods, pay_through_breaker, root_cause]
    offered = await asyncio.to_thread(names_with, "breaker")
    yield limit(
        "there is none for activities: the user builds it",
        not offered,
        f"names with 'breaker' in the SDK's own code: {', '.join(offered) or 'none'}; built here: "
        f"{len(built)} functions, {lines_of(*built)} lines of code",
        cap=3,
    )


# RT-04 Heartbeat -------------------------------------------------------------------------------------
# A heartbeat is three things at once: a sign of life that makes a loss known early, a note of how far the
# work has come for the next attempt, and the way by which a cancellation comes in.


# Silence for so long means that the activity is lost.
SILENCE = timedelta(seconds=3)
# The SDK sends a heartbeat at most every 0.8 x heartbeat timeout, unless the worker is told otherwise.
OFTEN: dict[str, Any] = {"max_heartbeat_throttle_interval": timedelta(milliseconds=200)}


async def details_of(handle: WorkflowHandle[Any, Any]) -> list[Any]:
    """The last heartbeat details that the server holds for the activity that a run waits for."""
    waiting = (await handle.describe()).raw_description.pending_activities
    payloads = [payload for one in waiting for payload in one.heartbeat_details.payloads]
    return await DataConverter.default.decode(payloads)


@dataclass
class Batch:
    ledger: str
    items: int = 6
    beats: bool = True
    stalls_at: int = 0  # the first attempt stops beating after this item, and hangs
    stays_at: int = 0  # the first attempt goes no further than this item, but beats on
    dies_at: int = 0  # the first attempt kills its worker half a second after this item's heartbeat


@activity.defn
async def process_batch(batch: Batch) -> str:
    """Process items from where the last attempt got to: its heartbeat said so."""
    info = activity.info()
    done = int(info.heartbeat_details[0]) if info.heartbeat_details else 0
    try:
        for item in range(done + 1, batch.items + 1):
            note(batch.ledger, f"{info.attempt}:{item} {time.monotonic()}")
            if batch.beats:
                activity.heartbeat(item)
            await asyncio.sleep(0.05)
            if info.attempt == 1:
                await misbehave(batch, item)
    except asyncio.CancelledError:
        note(batch.ledger, f"cancelled {time.monotonic()}")
        raise
    note(batch.ledger, f"ended {time.monotonic()}")
    return "processed"


async def misbehave(batch: Batch, item: int) -> None:
    """What the first attempts below are told to do."""
    if item == batch.stalls_at:
        await asyncio.sleep(3600 if batch.beats else 4)
    while item == batch.stays_at:
        if batch.beats:
            activity.heartbeat(item)
        await asyncio.sleep(0.1)
    if item == batch.dies_at:
        await asyncio.sleep(0.5)  # enough for a heartbeat that is not held back
        os.kill(os.getpid(), signal.SIGKILL)


@workflow.defn
class Processing:
    @workflow.run
    async def run(self, batch: Batch, start_to_close: float) -> str:
        return await workflow.execute_activity(
            process_batch,
            batch,
            start_to_close_timeout=timedelta(seconds=start_to_close),
            heartbeat_timeout=SILENCE if batch.beats else None,
            retry_policy=POLICIES["quick"],
            # The workflow waits until the activity itself has ended.
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        )


def entries(ledger: str) -> dict[str, float]:
    """What a batch noted, and when: attempt:item, and how it ended."""
    return {line.split()[0]: float(line.split()[1]) for line in notes(ledger)}


def resumed(order: Sequence[str]) -> bool:
    """Whether attempt 1 processed items 1 to 3, and later ones each of the others, once and in order."""
    attempt_and_item = [entry.split(":") for entry in order]
    return [item for _, item in attempt_and_item] == list("123456") and [
        attempt == "1" for attempt, _ in attempt_and_item
    ] == [True] * 3 + [False] * 3


def beginning(order: Mapping[str, float], item: int) -> float:
    """When an attempt after the first began with an item; not a number when none did."""
    return next((at for entry, at in order.items() if entry[0] != "1" and entry.endswith(f":{item}")), float("nan"))


async def start_batch(lab: Lab, name: str, batch: Batch, start_to_close: float = 30) -> WorkflowHandle[Any, Any]:
    queue = f"{lab.id}-{name}"
    return await lab.client.start_workflow(Processing.run, args=[batch, start_to_close], id=queue, task_queue=queue)


def batch_worker(lab: Lab, name: str) -> Worker:
    return lab.worker([Processing], [process_batch], task_queue=f"{lab.id}-{name}", **OFTEN)


async def stall_noticed(lab: Lab) -> Evidence:
    """The worker lives and the activity hangs: only the missing heartbeat tells."""
    batch = Batch(lab.file("stall"), stalls_at=3)
    async with batch_worker(lab, "stall"):
        handle = await start_batch(lab, "stall", batch)
        failed = await failure_of(handle)
        seen = entries(batch.ledger)
        started = [event["activityTaskStartedEventAttributes"] for event in await history_of(handle)
                   if event["eventType"] == "EVENT_TYPE_ACTIVITY_TASK_STARTED"]  # fmt: skip
    cause = started[0].get("lastFailure", {}).get("timeoutFailureInfo", {}).get("timeoutType")
    order = [entry for entry in seen if ":" in entry]
    noticed = beginning(seen, 4) - seen["1:3"]
    return works(
        "a stalled activity is noticed by its heartbeat timeout, and its retry goes on where it stood",
        not failed and resumed(order) and cause == "TIMEOUT_TYPE_HEARTBEAT" and 3 <= noticed < 12,
        f"heartbeat timeout 3 s, start-to-close 30 s: tried again {noticed:.2f} s after the last heartbeat ({cause}); "
        f"attempt:item {' '.join(order)}",
    )


async def lose_worker(lab: Lab, name: str, batch: Batch, start_to_close: float) -> tuple[dict[str, float], float]:
    """Kill the worker when the server has item 3's details, or without heartbeats when item 3 was begun.

    Returns (when each attempt:item was begun, when the worker was killed).
    """
    handle, queue = await start_batch(lab, name, batch, start_to_close), f"{lab.id}-{name}"

    async def sent() -> bool:
        if not batch.beats:
            return "1:3" in entries(batch.ledger)
        return await details_of(handle) == [3]

    async with lab.worker_process([Processing], [process_batch], task_queue=queue, **OFTEN) as worker:
        await until(sent, "item 3 was reported")
        killed = time.monotonic()
        await worker.kill()
    async with batch_worker(lab, name):
        await handle.result()
    seen = entries(batch.ledger)
    return {entry: at for entry, at in seen.items() if ":" in entry}, killed


async def worker_lost(lab: Lab) -> list[Evidence]:
    (beating, killed), (mute, mute_killed) = await asyncio.gather(
        lose_worker(lab, "lost", Batch(lab.file("lost"), stays_at=3), 30),
        lose_worker(lab, "mute", Batch(lab.file("mute"), stays_at=3, beats=False), 6),
    )
    early, late, lasted = beginning(beating, 4) - killed, beginning(mute, 1) - mute_killed, mute["2:1"] - mute["1:1"]
    return [
        holds(
            "worker killed: the next attempt begins behind the last details that were sent",
            resumed([*beating]) and 0 < early < 12,
            f"the server held details 3 at the SIGKILL; next attempt {early:.2f} s after it (heartbeat timeout 3 s, "
            f"start-to-close 30 s); attempt:item {' '.join(beating)}",
        ),
        control(
            "without heartbeats the same kill is noticed only at start-to-close, and the work begins anew",
            [*mute][:4] == ["1:1", "1:2", "1:3", "2:1"] and lasted > 5 and late > early,
            f"start-to-close 6 s: next attempt {late:.2f} s after the SIGKILL, {lasted:.2f} s after the first one "
            f"began; attempt:item {' '.join(mute)}",
        ),
    ]


async def cancelled(lab: Lab, name: str, batch: Batch) -> tuple[str, float]:
    """Cancel the workflow when item 2 was begun. Returns (how the activity ended, seconds after the request)."""
    async with batch_worker(lab, name):
        handle = await start_batch(lab, name, batch)
        await until(lambda: "1:2" in entries(batch.ledger), "item 2 was begun")
        asked = time.monotonic()
        await handle.cancel()
        await failure_of(handle)
        seen = entries(batch.ledger)
    ended = next((one for one in ("cancelled", "ended") if one in seen), "nothing")
    return ended, seen.get(ended, float("nan")) - asked


async def cancellation(lab: Lab) -> list[Evidence]:
    (beating, soon), (mute, later) = await asyncio.gather(
        cancelled(lab, "cancelled", Batch(lab.file("cancelled"), stays_at=2)),
        cancelled(lab, "deaf", Batch(lab.file("deaf"), stalls_at=2, beats=False)),
    )
    return [
        holds(
            "a cancellation reaches an activity that heartbeats",
            beating == "cancelled" and soon < 10,
            f"CancelledError raised in the activity {soon:.2f} s after the request",
        ),
        control(
            "without heartbeats a cancellation never arrives",
            mute == "ended" and later > 1,
            f"the activity ran on to its end, {later:.2f} s after the request, and was not interrupted",
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
    async def run(self, ledger: str) -> str:
        return await workflow.execute_activity(
            ask_outsider,
            ledger,
            start_to_close_timeout=PATIENT,
            heartbeat_timeout=timedelta(seconds=5),
            retry_policy=RetryPolicy(maximum_attempts=1),
        )


async def outsider(lab: Lab, name: str, beats: bool) -> tuple[str, float, list[Any]]:
    """Wait 6.5 s, more than the heartbeat timeout, then complete. Returns (outcome, seconds, details seen)."""
    ledger, queue = lab.file(name), f"{lab.id}-{name}"
    handle = await lab.client.start_workflow(Outsourced.run, ledger, id=queue, task_queue=queue)
    details: list[Any] = []
    async with lab.worker([Outsourced], [ask_outsider], task_queue=queue):
        await until(lambda: notes(ledger), "the task token was handed over")
        begun = time.monotonic()
        if beats:
            task = lab.client.get_async_activity_handle(task_token=bytes.fromhex(notes(ledger)[0]))
            while time.monotonic() < begun + 6.5:
                await task.heartbeat(f"{len(details)} pages read")
                details += await details_of(handle)
                await asyncio.sleep(0.2)
            await task.complete("signed")
        failed = await failure_of(handle)
        seconds = time.monotonic() - begun
    if not failed:
        return await handle.result(), seconds, details
    events = await history_of(handle)
    return kind_of(failed[-1]), when(events, "ACTIVITY_TASK_TIMED_OUT") - when(events, "ACTIVITY_TASK_STARTED"), details


async def completed_outside(lab: Lab) -> Evidence:
    (signed, lasted, details), (lost, gave_up, _) = await asyncio.gather(
        outsider(lab, "signed", beats=True), outsider(lab, "forgotten", beats=False)
    )
    expected = [f"{number} pages read" for number in range(len(details))]
    return holds(
        "an activity that another process completes is kept alive by that process's heartbeats",
        signed == "signed" and lasted > 6.5 and len(details) >= 2 and details == expected
        and lost == "HEARTBEAT" and gave_up >= 4.9,
        f"heartbeat timeout 5 s: {len(details)} heartbeats from outside, each seen by the server, result {signed!r} "
        f"after {lasted:.2f} s; a twin without them: {lost} after {gave_up:.2f} s",
    )  # fmt: skip


async def killed_after_heartbeats(lab: Lab, name: str, **options: Any) -> tuple[int, list[str]]:
    """Five items with a heartbeat each, then the worker dies. Returns (how many were processed again, the order)."""
    batch, queue = Batch(lab.file(name), dies_at=5), f"{lab.id}-{name}"
    handle = await start_batch(lab, name, batch)
    async with lab.worker_process([Processing], [process_batch], task_queue=queue, **options) as worker:
        await worker.wait()
    async with batch_worker(lab, name):
        await handle.result()
    order = [entry for entry in entries(batch.ledger) if ":" in entry]
    return sum(f"2:{item}" in order for item in range(1, 6)), order


async def unsent_details(lab: Lab) -> Evidence:
    (again, order), (again_often, _) = await asyncio.gather(
        killed_after_heartbeats(lab, "unsent"), killed_after_heartbeats(lab, "often", **OFTEN)
    )
    return limit(
        "details reported shortly before a kill are lost: heartbeats are held back, and work is done again",
        again > 0,
        f"5 items, each with its heartbeat, SIGKILL 0.5 s later: {again} of the 5 processed again ({' '.join(order)}); "
        f"with max_heartbeat_throttle_interval=0.2 s: {again_often} of 5",
    )


@RT.item("RT-04", "Heartbeat")
async def heartbeat(lab: Lab) -> AsyncIterator[Evidence]:
    """Batches stall, die and are cancelled, with heartbeats and without; a ledger keeps each item's time."""
    pairs = [asyncio.create_task(pair(lab)) for pair in (cancellation, worker_lost)]
    async for evidence in side_by_side(*(part(lab) for part in (stall_noticed, completed_outside, unsent_details))):
        yield evidence
    for pair in pairs:
        for evidence in await pair:
            yield evidence
    yield native(
        "sign of life, details and cancellation are one call of the SDK's",
        activity.heartbeat,
        (activity.Info, "heartbeat_details"),
        (workflow.execute_activity, "heartbeat_timeout"),
        (workflow.execute_activity, "cancellation_type"),
        workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        (Worker, "max_heartbeat_throttle_interval"),
        activity.raise_complete_async,
        (Client.get_async_activity_handle, "task_token"),
        AsyncActivityHandle.heartbeat,
        AsyncActivityHandle.complete,
    )


if __name__ == "__main__":
    run(RT)
