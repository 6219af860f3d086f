"""A fault that is put in from outside is to Temporal what one from inside would be; and the ledger tells what ran."""

from common import connect
from harness.faults import Call, Fault, Outside, calls_in, die, fail, hold, never_answer, refuse, slow, withhold
from lab import Server, make_worker, outline, until

import asyncio
import contextlib
import pickle
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from servers import given_server
from temporalio import activity, workflow
from temporalio.client import WorkflowFailureError, WorkflowHistory
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError


@dataclass
class Parcel:
    number: int
    trouble: str = ""


@activity.defn
async def deliver(parcel: Parcel) -> str:
    """Fails from inside as its argument says."""
    if parcel.trouble == "refuse" or (parcel.trouble == "fail" and activity.info().attempt <= 2):
        raise ApplicationError("trouble", non_retryable=parcel.trouble == "refuse")
    if parcel.trouble == "slow":
        await asyncio.sleep(0.2)
    return f"delivered {parcel.number}"


@workflow.defn
class Delivery:
    @workflow.run
    async def run(self, parcel: Parcel) -> str:
        retry = RetryPolicy(initial_interval=timedelta(milliseconds=10))
        return await workflow.execute_activity(
            deliver, parcel, start_to_close_timeout=timedelta(seconds=30), retry_policy=retry
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with given_server(tmp_path_factory.mktemp("server"), namespace="default") as server:
        yield server


async def history_of(server: Server, outside: Outside, parcel: Parcel, id: str) -> WorkflowHistory:
    """Run one delivery on a worker with this interceptor, to its end."""
    client = await connect(server.target)
    async with make_worker(client, id, [Delivery], [deliver], interceptors=[outside]):
        handle = await client.start_workflow(Delivery.run, parcel, id=id, task_queue=id)
        with contextlib.suppress(WorkflowFailureError):
            await handle.result()
        history: WorkflowHistory = await handle.fetch_history()
        return history


def comparable(history: WorkflowHistory) -> list[str]:
    """Each event as text, without what differs between any two runs: ids, times, task queues, and the stack traces."""
    lines = []
    for event in history.events:
        attributes: Any = getattr(event, str(event.WhichOneof("attributes")))
        failure = getattr(attributes, "failure", None)
        told = ""
        if failure is not None and failure.message:
            cause = failure.cause if failure.HasField("cause") else failure
            info = cause.application_failure_info
            told = f"{failure.message}, {cause.message}, {info.type}, {info.non_retryable}"
        last = getattr(attributes, "last_failure", None)
        retried = f"attempt {attributes.attempt} after {last.message}" if last is not None and last.message else ""
        lines.append(f"{event.event_type} {told} {retried} {getattr(attributes, 'retry_state', '')}")
    return lines


@pytest.mark.parametrize(
    ("trouble", "fault"),
    [
        ("refuse", refuse("deliver", number=1, why="trouble")),
        ("fail", fail("deliver", 2, number=1, why="trouble")),
        ("slow", slow("deliver", 0.2, number=1)),
    ],
)
def test_from_outside_it_leaves_the_same_history_as_from_inside(
    server: Server, tmp_path: Path, trouble: str, fault: Fault
) -> None:
    ledger = str(tmp_path / "calls")
    inside = asyncio.run(history_of(server, Outside(ledger), Parcel(1, trouble), f"inside-{trouble}"))
    outside = asyncio.run(history_of(server, Outside(ledger, [fault]), Parcel(1), f"outside-{trouble}"))
    none = asyncio.run(history_of(server, Outside(ledger, [fault]), Parcel(2), f"none-{trouble}"))
    assert comparable(outside) == comparable(inside)
    assert outline(outside) == outline(inside)
    assert trouble == "slow" or comparable(none) != comparable(inside), "the control: this call is not meant"


def test_a_timeout_is_shortened_from_outside(server: Server, tmp_path: Path) -> None:
    options = {"deliver": {"start_to_close_timeout": timedelta(seconds=7)}}
    history = asyncio.run(history_of(server, Outside(str(tmp_path / "c"), (), options), Parcel(1), "shortened"))
    (scheduled,) = [one for one in history.events if one.HasField("activity_task_scheduled_event_attributes")]
    attributes = scheduled.activity_task_scheduled_event_attributes
    assert attributes.start_to_close_timeout.ToTimedelta() == timedelta(seconds=7)


def test_the_ledger_has_every_attempt(server: Server, tmp_path: Path) -> None:
    ledger = str(tmp_path / "calls")
    asyncio.run(history_of(server, Outside(ledger, [fail("deliver", 2)]), Parcel(5), "ledger"))
    seen = [
        (call.what, call.activity, call.argument["number"], call.workflow, call.attempt) for call in calls_in(ledger)
    ]
    once = [("begun", "failed"), ("begun", "failed"), ("begun", "ended")]
    assert seen == [(what, "deliver", 5, "ledger", n) for n, both in enumerate(once, 1) for what in both]


MEETS: Sequence[tuple[Fault, bool]] = [
    (refuse("deliver"), True),
    (refuse("deliver", number=3), True),
    (refuse("deliver", number=4), False),
    (refuse("deliver", colour="red"), False),
    (refuse("deliver", Parcel(3)), True),
    (refuse("deliver", 3), False),
    (refuse("book"), False),
    (refuse("deliver").of("mine"), True),
    (refuse("deliver").of("other"), False),
    (fail("deliver", 2), True),
    (fail("deliver", 1), False),
    (die("deliver"), False),
    (die("deliver", times=2), True),
    (hold("deliver", "gate", number=3), True),
    (withhold("deliver", "gate", number=3), True),
    (never_answer("deliver", times=1), False),
]


@activity.defn
def knock(number: int) -> str:
    return f"knocked at {number} in {threading.current_thread().name}"


@workflow.defn
class Knocking:
    """Cancelled during its first call, it makes a second one."""

    @workflow.run
    async def run(self) -> str:
        options: Any = {
            "start_to_close_timeout": timedelta(minutes=5),
            "heartbeat_timeout": timedelta(minutes=1),
            "cancellation_type": workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        }
        try:
            return await workflow.execute_activity(knock, 1, **options)
        except ActivityError:
            return await workflow.execute_activity(knock, 2, **options)


def test_a_call_cancelled_after_it_has_returned_leaves_its_thread_alone(server: Server, tmp_path: Path) -> None:
    """A pool of one thread must serve another call (before SDK 1.31 that thread would be dead)."""
    outside = Outside(str(tmp_path / "calls"), [never_answer("knock", 1)])

    async def knocked() -> str:
        client = await connect(server.target)
        parts: Any = {"interceptors": [outside], "max_heartbeat_throttle_interval": timedelta(milliseconds=100)}
        pool = ThreadPoolExecutor(1)
        async with make_worker(client, "door", [Knocking], [knock], activity_executor=pool, **parts):
            handle = await client.start_workflow(Knocking.run, id="door", task_queue="door")
            await until(lambda: [call for call in calls_in(outside.ledger) if call.what == "ended"], "it has returned")
            await handle.cancel()
            return str(await asyncio.wait_for(handle.result(), 60))

    assert asyncio.run(knocked()).startswith("knocked at 2")


@pytest.mark.parametrize(("fault", "met"), MEETS)
def test_a_fault_meets_the_calls_that_are_meant(fault: Fault, met: bool) -> None:
    assert fault.meets("deliver", [Parcel(3)], "mine", attempt=2) is met
    assert pickle.loads(pickle.dumps(fault)) == fault


def test_a_large_argument_does_not_fill_the_ledger(server: Server, tmp_path: Path) -> None:
    ledger = str(tmp_path / "calls")
    asyncio.run(history_of(server, Outside(ledger), Parcel(1, "x" * Call.LARGEST), "large"))
    assert [call.argument for call in calls_in(ledger)] == [None, None]
