"""Faults that are put in from outside, and the ledger that is kept there: what a lesson need not know of.

A worker of the lab has one interceptor more than its user would give it. It writes down each activity call
before it begins and after it has ended, in a file outside Temporal, and it can refuse a call, hold it, keep
its answer back, or kill its own process in the middle of it. So the workflows and activities under test stay
as somebody would write them for production.

    faults=[refuse("book", service="car")]              the argument is told by its fields, or by its value
    faults=[fail("undo", times=2, service="hotel")]     the first two attempts
    faults=[die("charge").of(workflow_id)]              of one workflow only: the effect is there, the report is not

Everything here is picklable, so that it reaches worker processes.
"""

import asyncio
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from temporalio import activity, workflow
from temporalio.converter import AdvancedJSONEncoder
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.worker import (
    ActivityInboundInterceptor,
    ActivityOutboundInterceptor,
    ExecuteActivityInput,
    Interceptor,
    StartActivityInput,
    StartLocalActivityInput,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
    WorkflowOutboundInterceptor,
)

# The ledger ------------------------------------------------------------------------------------------


def note(path: str, entry: str) -> None:
    """Append one line to a ledger, the account of what really ran that is kept outside Temporal.

    One write to a file opened for appending is atomic, so that several processes may share a ledger,
    and what was written stays when the writer is killed the moment after.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, f"{entry}\n".encode())
    finally:
        os.close(descriptor)


def notes(path: str) -> list[str]:
    """The lines of a ledger, oldest first; none when nothing was noted yet."""
    file = Path(path)
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


@dataclass(frozen=True)
class Call:
    """One call of an activity, as the ledger has it.

    `what` is "begun", written before anything else happens, then "ended" or "failed", written when the activity
    has returned or raised and before the server is told. `argument` is the first one, as JSON has it (None where it is
    larger than LARGEST), `attempt` counts from 1, `at` is in seconds of the wall clock.
    """

    what: Literal["begun", "ended", "failed"]
    activity: str
    argument: Any
    workflow: str
    run: str
    id: str
    attempt: int
    pid: int
    at: float

    LARGEST = 2000  # characters


def calls_in(path: str) -> list[Call]:
    """Every call in a ledger of the interceptor's, oldest first."""
    return [Call(**json.loads(line)) for line in notes(path)]


# Faults ----------------------------------------------------------------------------------------------

EVERY = 10**9
What = Literal["begun", "ended", "failed"]
Beat = Callable[[], None]
Does = Literal["refuse", "fail", "hold", "slow", "die before", "die", "withhold", "never answer"]


@dataclass(frozen=True)
class Fault:
    """What happens to calls of one activity, told apart by workflow, arguments and attempt."""

    does: Does
    activity: str
    values: Sequence[Any] = ()  # the first arguments are these
    fields: Mapping[str, Any] = field(default_factory=dict)  # the first argument has these attributes
    workflow: str = ""  # the workflow's id; empty: any
    attempts: int = EVERY  # the first so many
    gate: str = ""  # a file: what is held goes on when it is there
    seconds: float = 0
    why: str = ""
    silent: bool = False  # without heartbeats, so that nobody can tell it from a process that is gone

    def of(self, workflow: str) -> "Fault":
        """The same, for the workflow with this id only."""
        return replace(self, workflow=workflow)

    def meets(self, name: str, arguments: Sequence[Any], workflow: str, attempt: int) -> bool:
        """Whether a call is meant by it."""
        return (
            name == self.activity
            and self.workflow in ("", workflow)
            and attempt <= self.attempts
            and list(arguments[: len(self.values)]) == list(self.values)
            and all(arguments and getattr(arguments[0], key, None) == value for key, value in self.fields.items())
        )


def refuse(activity: str, *values: Any, why: str = "refused from outside", **fields: Any) -> Fault:
    """The call fails for good before it has any effect: a non-retryable ApplicationError."""
    return Fault("refuse", activity, values, fields, why=why)


def fail(activity: str, times: int, *values: Any, why: str = "failed from outside", **fields: Any) -> Fault:
    """The first so many attempts fail before they have any effect: an ApplicationError that is retried."""
    return Fault("fail", activity, values, fields, attempts=times, why=why)


def hold(activity: str, gate: str, *values: Any, silent: bool = False, **fields: Any) -> Fault:
    """The call waits, before it has any effect, until the file `gate` is there, or for ever where `gate` is empty.

    It heartbeats, and so can be cancelled, unless `silent`: then only the gate ends it, so open that in any case.
    """
    return Fault("hold", activity, values, fields, gate=gate, silent=silent)


def slow(activity: str, seconds: float, *values: Any, **fields: Any) -> Fault:
    """The call takes so many seconds longer, before it has any effect."""
    return Fault("slow", activity, values, fields, seconds=seconds)


def withhold(activity: str, gate: str, *values: Any, silent: bool = False, **fields: Any) -> Fault:
    """The call has its effect, and its answer is kept back until the file `gate` is there."""
    return Fault("withhold", activity, values, fields, gate=gate, silent=silent)


def never_answer(activity: str, *values: Any, silent: bool = False, times: int = EVERY, **fields: Any) -> Fault:
    """The call has its effect, and its answer never comes. It heartbeats, and so can be cancelled, unless `silent`."""
    return Fault("never answer", activity, values, fields, silent=silent, attempts=times)


def die(activity: str, *values: Any, times: int = 1, **fields: Any) -> Fault:
    """SIGKILL to the worker's own process after the effect and before the report, in the first attempts."""
    return Fault("die", activity, values, fields, attempts=times)


def die_before(activity: str, *values: Any, times: int = 1, **fields: Any) -> Fault:
    """SIGKILL to the worker's own process when the call has begun and has no effect yet, in the first attempts."""
    return Fault("die before", activity, values, fields, attempts=times)


async def _shut(fault: Fault, beat: Beat) -> None:
    """Wait until the gate is open, or for ever where there is none. A cancellation ends it.

    It does not end one that is silent and has a gate: a worker cancels by itself what is overdue for 5 s, and would
    so end the very call that is to come late.
    """
    late = fault.silent and fault.gate
    while not (fault.gate and Path(fault.gate).exists()):
        if activity.is_cancelled() and not late:  # where the activity runs in a thread, nothing else tells us here
            raise CancelledError("cancelled from outside")
        if not fault.silent:
            beat()
        await asyncio.sleep(0.05)


async def _before(fault: Fault, beat: Beat) -> None:
    """What a fault does to a call that has no effect yet."""
    if fault.does in ("refuse", "fail"):
        raise ApplicationError(fault.why, non_retryable=fault.does == "refuse")
    if fault.does == "die before":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.does == "hold":
        await _shut(fault, beat)
    if fault.does == "slow":
        await asyncio.sleep(fault.seconds)


async def _after(fault: Fault, beat: Beat) -> None:
    """What a fault does to a call that has had its effect, and is about to answer."""
    if fault.does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.does in ("withhold", "never answer"):
        await _shut(fault, beat)


# The interceptor -------------------------------------------------------------------------------------


@dataclass
class Outside(Interceptor):
    """Keeps the ledger of a worker's activity calls, puts faults into them, and shortens their timeouts.

    `shortened` gives options of an activity other values than its workflow does, by the activity's name and
    the option's: a lesson that gives up after a minute need not take one here.
    """

    ledger: str
    faults: Sequence[Fault] = ()
    shortened: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        return _Activities(next, self)

    def workflow_interceptor_class(
        self, input: WorkflowInterceptorClassInput
    ) -> type[WorkflowInboundInterceptor] | None:
        shortened = self.shortened

        class Shortened(_Workflows):
            options = shortened

        return Shortened if shortened else None


SHIELDS: list[AbstractContextManager[None]] = []


def spare_the_thread() -> None:
    """Keep a cancellation that comes from here on out of the thread in which an activity has run.

    Before SDK 1.31 it is raised there although the thread serves another call by then, or waits for one: so it dies,
    and its pool, which does not know, leaves another call without a thread (sdk-python issue 1648). Only an interceptor
    that is not done with the call, as here, can meet that. The shield stays for good: to take it away raises what it
    kept off.
    """
    SHIELDS.append(activity.shield_thread_cancel_exception())
    SHIELDS[-1].__enter__()


class _Activities(ActivityInboundInterceptor):
    def __init__(self, next: ActivityInboundInterceptor, outside: Outside) -> None:
        super().__init__(next)
        self._outside = outside

    def init(self, outbound: ActivityOutboundInterceptor) -> None:
        # activity.heartbeat() would wait for this very loop where the activity runs in a thread.
        self._outbound = outbound
        super().init(outbound)

    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        info = activity.info()
        workflow_id, beat = info.workflow_id or "", self._outbound.heartbeat
        faults = [
            fault
            for fault in self._outside.faults
            if fault.meets(info.activity_type, input.args, workflow_id, info.attempt)
        ]
        self._note("begun", info, input)
        try:
            for fault in faults:
                await _before(fault, beat)
            result = await self.next.execute_activity(input)
        except BaseException:
            self._note("failed", info, input)
            raise
        self._note("ended", info, input)
        if faults:
            spare_the_thread()
        for fault in faults:
            await _after(fault, beat)
        return result

    def _note(self, what: What, info: activity.Info, input: ExecuteActivityInput) -> None:
        argument = json.dumps(input.args[0] if input.args else None, cls=_Argument)
        call = Call(
            what=what,
            activity=info.activity_type,
            argument=json.loads(argument) if len(argument) <= Call.LARGEST else None,
            workflow=info.workflow_id or "",
            run=info.workflow_run_id or "",
            id=info.activity_id,
            attempt=info.attempt,
            pid=os.getpid(),
            at=time.time(),
        )
        note(self._outside.ledger, json.dumps(dataclasses.asdict(call)))


class _Argument(AdvancedJSONEncoder):
    """As the SDK's own converter writes it; what JSON cannot hold is written as Python shows it."""

    def default(self, o: Any) -> Any:
        try:
            return super().default(o)
        except TypeError:
            return repr(o)


class _Workflows(WorkflowInboundInterceptor):
    options: Mapping[str, Mapping[str, Any]]

    def init(self, outbound: WorkflowOutboundInterceptor) -> None:
        super().init(_Schedules(outbound, self.options))


class _Schedules(WorkflowOutboundInterceptor):
    """Gives activities other options than their workflow does."""

    def __init__(self, next: WorkflowOutboundInterceptor, options: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(next)
        self._options = options

    def start_activity(self, input: StartActivityInput) -> workflow.ActivityHandle[Any]:
        self._change(input)
        return super().start_activity(input)

    def start_local_activity(self, input: StartLocalActivityInput) -> workflow.ActivityHandle[Any]:
        self._change(input)
        return super().start_local_activity(input)

    def _change(self, input: StartActivityInput | StartLocalActivityInput) -> None:
        for name, value in self._options.get(input.activity, {}).items():
            setattr(input, name, value)
