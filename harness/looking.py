"""Looking at what is there: how a run ended, where it stands, what its history holds, what a call was answered.

All of it is asked of the server or of a program, and changes nothing but where end() says so.
"""

from common import causes
from harness.faults import Call
from harness.machine import slowness

import asyncio
import collections
import contextlib
import inspect
import io
import itertools
import json
import logging
import tokenize
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from temporalio.api.enums.v1 import EventType
from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.client import (
    Client,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowHistory,
    WorkflowUpdateFailedError,
)
from temporalio.exceptions import FailureError
from temporalio.service import RPCError, RPCStatusCode

Handle = WorkflowHandle[Any, Any]


@dataclass(frozen=True)
class Ending:
    """How a run ended: status such as "COMPLETED", result, and the causes of its failure, the first one last."""

    status: str
    result: Any = None
    why: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.why}" if self.why else self.status


def keywords_in(things: Sequence[type | Callable[..., Any]], *keywords: str) -> list[str]:
    """Where keywords such as "try" stand in the source of functions or classes: what a demonstration adds itself."""
    found = []
    for thing in things:
        # Not ast: on Python 3.11 parsing fails now and then while other threads are busy.
        tokens = tokenize.generate_tokens(io.StringIO(inspect.getsource(thing)).readline)
        found += [f"{one.string} in {thing.__qualname__}" for one in tokens if one.string in keywords]
    return found


async def ended(handle: Handle, seconds: float = 60) -> Ending:
    """Wait until a run is closed, and say how. Raises TimeoutError after `seconds`, which grow on a slow machine.

    Of a run that the server does not know any more the status is "NOT_FOUND".
    """
    result, why = None, ""
    try:
        async with asyncio.timeout(seconds * slowness()):
            result = await handle.result()
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        return Ending(error.status.name, why=error.message)
    except WorkflowFailureError as error:
        told = [one.message if isinstance(one, FailureError) else str(one) for one in causes(error.cause)]
        why = " <- ".join(one for one in told if one != "Activity task failed")
    except TimeoutError:
        raise TimeoutError(f"{handle.id} did not end within {seconds * slowness():.0f} s") from None
    return Ending(await status_of(handle), result, why)


def outline(history: WorkflowHistory, *, without: str = "WorkflowTask") -> str:
    """A run's events as a block of text, one a line, as the history reads, such as "ActivityTaskScheduled book".

    Events whose names begin with `without` are left out.
    """
    lines = []
    for event in history.events:
        name = EventType.Name(event.event_type).removeprefix("EVENT_TYPE_").title().replace("_", "")
        attributes = getattr(event, str(event.WhichOneof("attributes")))
        details = [
            getattr(value, "name", getattr(value, "message", value))
            for field in ("activity_type", "workflow_type", "signal_name", "timer_id", "failure")
            if (value := getattr(attributes, field, None))
        ]
        if not (without and name.startswith(without)):
            lines.append(" ".join([name, *map(str, details)]))
    return "\n".join(lines)


async def status_of(handle: Handle) -> str:
    """A run's status as the server describes it, such as "RUNNING"."""
    return name_of((await handle.describe()).status)


async def refusal(handle: Handle) -> str:
    """The status with which the server refuses to describe a run, such as "NOT_FOUND"; "" when it does describe it."""
    try:
        await handle.describe()
    except RPCError as error:
        return error.status.name
    return ""


def name_of(status: WorkflowExecutionStatus | RPCStatusCode | None) -> str:
    """A status in words, for a measured text."""
    return status.name if status else "no error"


async def history_of(handle: Handle) -> list[dict[str, Any]]:
    """A run's events as JSON, as the Python client reads them."""
    events: list[dict[str, Any]] = json.loads((await handle.fetch_history()).to_json())["events"]
    return events


async def count_events(handle: Handle) -> collections.Counter[str]:
    """How often each type of event stands in a run's history, such as "ACTIVITY_TASK_COMPLETED"."""
    history = await handle.fetch_history()
    return collections.Counter(EventType.Name(one.event_type).removeprefix("EVENT_TYPE_") for one in history.events)


def event_times(events: Sequence[Mapping[str, Any]], kind: str) -> list[datetime]:
    """When the server recorded the events of one type, such as "TIMER_FIRED". `events` are those of history_of()."""
    times = [event["eventTime"] for event in events if event["eventType"] == f"EVENT_TYPE_{kind}"]
    return [datetime.fromisoformat(time.replace("Z", "+00:00")) for time in times]


async def failed_tasks(handle: Handle) -> list[str]:
    """The messages of the failed workflow tasks in a run's history: what a stuck workflow suffers from."""
    history = await handle.fetch_history()
    return [
        event.workflow_task_failed_event_attributes.failure.message
        for event in history.events
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED
    ]


async def is_closed(handle: Handle) -> bool:
    return await status_of(handle) != "RUNNING"


async def is_closed_or_stuck(handle: Handle) -> bool:
    """Whether a run has ended, or a workflow task of it has failed, which is tried again and again."""
    return await is_closed(handle) or await happened(handle, "WORKFLOW_TASK_FAILED")


async def happened(handle: Handle, kind: str, times: int = 1) -> bool:
    """Whether so many events of a type, such as "TIMER_FIRED", are in a run's history; there may be no such run yet."""
    try:
        return (await count_events(handle))[kind] >= times
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        return False


async def waits(handle: Handle, activities: int = 0, under_way: int = 0) -> bool:
    """So many activities are completed and so many under way; the workflow has taken note and asks for no more.

    A worker that is killed or stopped now takes no workflow task along.
    """
    count = await count_events(handle)
    heard = sum(count[f"WORKFLOW_TASK_{how}"] for how in ("COMPLETED", "TIMED_OUT", "FAILED"))
    over = sum(count[f"ACTIVITY_TASK_{how}"] for how in ("COMPLETED", "FAILED", "TIMED_OUT", "CANCELED"))
    return (
        0 < heard == count["WORKFLOW_TASK_SCHEDULED"]
        and count["ACTIVITY_TASK_COMPLETED"] >= activities
        and count["ACTIVITY_TASK_SCHEDULED"] - over == under_way
    )


async def end(handle: Handle, reason: str = "seen enough") -> None:
    """Terminate a run, unless it has ended by itself."""
    try:
        await handle.terminate(reason=reason)
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise


async def finds(client: Client, query: str, many: int) -> bool:
    """Whether visibility, which follows a moment behind, finds so many runs."""
    return (await client.count_workflows(query)).count == many


async def listed(client: Client, query: str = "") -> list[str]:
    """The workflow ids of the runs that visibility finds."""
    return [one.id async for one in client.list_workflows(query)]


async def said(call: Awaitable[object]) -> str:
    """What a call was answered; or why not, in the words of the workflow, or as the server's status and message."""
    try:
        return str(await call)
    except WorkflowUpdateFailedError as error:
        return str(error.cause)
    except RPCError as error:
        return f"{error.status.name}: {error.message}"


async def pending(handle: Handle) -> list[PendingActivityInfo]:
    """What the server tells of a run's open activities, which is not in the history."""
    return list((await handle.describe()).raw_description.pending_activities)


def most_at_once(calls: Sequence[Call]) -> int:
    """The largest number of calls that were begun and neither ended nor failed, at any moment of a ledger."""
    return max(itertools.accumulate(1 if call.what == "begun" else -1 for call in calls), default=0)


def repeated(things: Iterable[Any]) -> list[Any]:
    """What occurs more than once."""
    return sorted(one for one, times in collections.Counter(things).items() if times > 1)


@contextlib.contextmanager
def overheard(logger: str = "") -> Iterator[list[logging.LogRecord]]:
    """What this process logs meanwhile, warnings and worse; by one logger, or by any."""
    records: list[logging.LogRecord] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    listener = Listener(logging.WARNING)
    logging.getLogger(logger).addHandler(listener)
    try:
        yield records
    finally:
        logging.getLogger(logger).removeHandler(listener)


@dataclass(frozen=True)
class HttpAnswer:
    """What an HTTP server answered; status 0 that nobody did."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text or "{}")


async def http(url: str, body: Any = None, method: str = "", headers: Mapping[str, str] | None = None) -> HttpAnswer:
    """One HTTP request: a POST of JSON where there is a body, else a GET. A refusal is an answer, too."""
    data = None if body is None else json.dumps(body).encode()
    every = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data, every, method=method or None)

    def ask() -> HttpAnswer:
        try:
            with urllib.request.urlopen(request, timeout=30 * slowness()) as response:
                return HttpAnswer(response.status, dict(response.headers), response.read().decode())
        except urllib.error.HTTPError as error:
            return HttpAnswer(error.code, dict(error.headers), error.read().decode())
        except OSError as error:
            return HttpAnswer(0, {}, str(error))

    return await asyncio.to_thread(ask)
