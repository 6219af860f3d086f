"""SG: signals and events - how messages reach a workflow, wake it, start it, and read it.

A workflow is an addressee: it has an id, and whoever knows the id can send it something. The server writes
each message into the workflow's history before it tells the sender that it was taken, so that neither a
missing worker nor a crash loses it. The four items ask what that promises for signals, how a workflow
waits for something, what can start one, and how its state is read from outside.
"""

from common import (
    Category,
    Evidence,
    Target,
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
    side_by_side,
    slowness,
    works,
)
from lab import (
    Books,
    Lab,
    Server,
    count_events,
    ended,
    event_times,
    failed_tasks,
    free_port,
    history_of,
    hold,
    name_of,
    note,
    notes,
    open_gate,
    outline,
    refusal,
    run,
    status_of,
    until,
)

import asyncio
import contextlib
import inspect
import json
import logging
import os
import shutil
import signal
import subprocess
import time
import urllib.request
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import count, pairwise
from typing import Any, Protocol

from temporalio import activity, workflow
from temporalio.api.enums.v1 import EventType
from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionExecutionStartWorkflow,
    ScheduleActionResult,
    ScheduleActionStartWorkflow,
    ScheduleHandle,
    ScheduleIntervalSpec,
    ScheduleSpec,
    ScheduleState,
    WithStartWorkflowOperation,
    WorkflowExecutionStatus,
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowQueryRejectedError,
    WorkflowUpdateFailedError,
    WorkflowUpdateHandle,
    WorkflowUpdateStage,
)
from temporalio.common import QueryRejectCondition, WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RetryConfig, RPCError, RPCStatusCode
from temporalio.worker import Worker

SG = Category(
    "SG",
    "Signals and events",
    "How do messages reach a workflow, wake it, start it, and read it?",
)

Handle = WorkflowHandle[Any, Any]
SOON = timedelta(seconds=2)
# Where nothing is to be given up, a slow machine gets all the time it needs.
PATIENT = timedelta(seconds=30)


def soon() -> timedelta:
    """An attempt that a kill has cut off is given up after this long, here short, so that kills cost little time."""
    return timedelta(seconds=2 * slowness())


@contextlib.contextmanager
def overheard(logger: str, part: str) -> Iterator[list[str]]:
    """What a logger of this process is told meanwhile, as far as `part` occurs in it."""
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if part in record.getMessage():
                told.append(record.getMessage())

    listener = Listener()
    logging.getLogger(logger).addHandler(listener)
    try:
        yield told
    finally:
        logging.getLogger(logger).removeHandler(listener)


# SG-01 External signals ------------------------------------------------------------------------------
# A signal is written into the history before its sender is told "taken": from then on it cannot get lost, whoever
# dies. The handlers only put aside what comes; one loop works on it in order, and takes along into the next run
# what is still waiting.


@dataclass
class Deposit:
    key: str  # of the sender's: what is sent again, for want of an answer, comes twice and counts once
    amount: int


@dataclass
class Batch:
    account: str
    deposits: list[Deposit]


@dataclass
class Standing:
    """What an account takes along into its next run."""

    account: str
    waiting: list[Deposit] = field(default_factory=list)
    booked: int = 0
    closed: bool = False


class Bank(Protocol):
    """Whoever keeps the books."""

    def enter_all(self, entries: Mapping[str, int]) -> None:
        """Enter these amounts in one go; what was entered under a key before is not entered again."""


class Teller:
    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    @activity.defn
    def book(self, batch: Batch) -> None:
        self.bank.enter_all({f"{batch.account}/{one.key}": one.amount for one in batch.deposits})


AT_ONCE = 40  # deposits in one activity


@workflow.defn
class Account:
    @workflow.init
    def __init__(self, standing: Standing) -> None:
        self.standing = standing

    @workflow.run
    async def run(self, standing: Standing) -> int:
        while True:
            await workflow.wait_condition(lambda: bool(self.standing.waiting) or self.standing.closed)
            if not self.standing.waiting:
                return self.standing.booked
            batch = Batch(self.standing.account, self.standing.waiting[:AT_ONCE])
            await workflow.execute_activity_method(Teller.book, batch, start_to_close_timeout=timedelta(seconds=30))
            del self.standing.waiting[: len(batch.deposits)]
            self.standing.booked += len(batch.deposits)
            # Histories are bounded. What was taken and is not booked yet must not stay behind in this one.
            if workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(self.taken_along())

    def taken_along(self) -> Standing:
        return self.standing

    @workflow.signal
    def deposit(self, deposit: Deposit) -> None:
        self.standing.waiting.append(deposit)

    @workflow.signal
    def close(self) -> None:
        self.standing.closed = True


@dataclass
class PayDay:
    key: str
    wages: dict[str, int]  # by the account's workflow id


@workflow.defn
class Payroll:
    """A workflow sends signals, too. Returns the accounts that are not there, or are closed."""

    @workflow.run
    async def run(self, day: PayDay) -> list[str]:
        unpaid = []
        for account, amount in day.wages.items():
            try:
                handle = workflow.get_external_workflow_handle_for(Account.run, account)
                await handle.signal(Account.deposit, Deposit(day.key, amount))
            except ApplicationError as error:
                if error.type != "ExternalWorkflowExecutionNotFound":
                    raise
                unpaid.append(account)
        return unpaid


class Paper:
    """A bank for the example: it keeps its books in memory."""

    def __init__(self) -> None:
        self.entries: dict[str, int] = {}

    def enter_all(self, entries: Mapping[str, int]) -> None:
        self.entries = {**entries, **self.entries}


async def example_sg_01(client: Client) -> None:
    bank, id = Paper(), f"account-{uuid.uuid4()}"
    async with Worker(
        client,
        task_queue="accounts",
        workflows=[Account, Payroll],
        activities=[Teller(bank).book],
        activity_executor=ThreadPoolExecutor(10),
    ):
        account = await client.start_workflow(Account.run, Standing(id), id=id, task_queue="accounts")
        for _ in range(2):
            await account.signal(Account.deposit, Deposit("gift", 50))
        wages = {id: 1000, f"nobody-{uuid.uuid4()}": 1000}
        unpaid = await client.execute_workflow(
            Payroll.run, PayDay("may", wages), id=f"payroll-{uuid.uuid4()}", task_queue="accounts"
        )
        await account.signal(Account.close)
        print(f"{await account.result()} deposits came, one of them twice: {sum(bank.entries.values())} in the books.")
        print(f"Not there to be paid: {', '.join(unpaid)}")


# SG-01 put to the test -------------------------------------------------------------------------------


@workflow.defn
class Forgetful(Account):
    """The control: what is still waiting stays behind when a new run begins."""

    @workflow.init
    def __init__(self, standing: Standing) -> None:
        super().__init__(standing)

    @workflow.run
    async def run(self, standing: Standing) -> int:
        return await super().run(standing)

    def taken_along(self) -> Standing:
        return replace(self.standing, waiting=[])


@workflow.defn
class Liquidator:
    """Cancels other workflows. Returns those that are not there."""

    @workflow.run
    async def run(self, accounts: list[str]) -> list[str]:
        missing = []
        for account in accounts:
            try:
                await workflow.get_external_workflow_handle(account).cancel()
            except ApplicationError as error:
                missing.append(f"{account}: {error.type}")
        return missing


class Branch:
    """Where accounts are opened, on whichever server, and what came to them is looked up."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.books = lab, Books(lab.file("books.sqlite"))
        self.teller = Teller(self.books)

    async def open(self, name: str, client: Client, kind: Any = Account, **options: Any) -> Handle:
        id = f"{self.lab.id}-{name}"
        options = {"id": id, "task_queue": self.lab.task_queue, **options}
        handle: Handle = await client.start_workflow(kind.run, Standing(id), **options)
        return handle

    def parts(self, **options: Any) -> dict[str, Any]:
        """What a worker for accounts is made of. A call that a kill has cut off is given up soon."""
        shortened = {"book": {"start_to_close_timeout": soon()}}
        return {
            "workflows": [Account, Forgetful, Payroll, Liquidator],
            "activities": [self.teller.book],
            "shortened": shortened,
            **options,
        }

    def received(self, handle: Handle) -> list[int]:
        """The amounts that the account worked on, in that order: a signal that came twice is there twice.

        A call that was made again is not: it has the same id in the same run.
        """
        calls: dict[tuple[str, str], Any] = {}
        for call in self.lab.calls(handle.id):
            calls.setdefault((call.run, call.id), call.argument)
        return [int(one["amount"]) for batch in calls.values() for one in batch["deposits"]]

    def booked(self, handle: Handle) -> list[int]:
        return self.books.amounts(f"{handle.id}/")

    def runs(self, handle: Handle) -> int:
        """How many runs of the account have worked on something."""
        return len({call.run for call in self.lab.calls(handle.id)})


async def put(handle: Handle, amount: int) -> None:
    await handle.signal(Account.deposit, Deposit(str(amount), amount))


async def close(handle: Handle) -> int:
    """Close an account. Returns how many deposits it has booked."""
    await handle.signal(Account.close)
    return int((await ended(handle)).result)


def repeated(numbers: Sequence[int]) -> list[int]:
    return sorted(number for number, count in Counter(numbers).items() if count > 1)


def missing(numbers: Sequence[int], found: Sequence[int]) -> list[int]:
    return sorted(set(numbers) - set(found))


async def wakes_a_workflow(lab: Lab, branch: Branch) -> tuple[Evidence, ...]:
    handle = await branch.open("wake", lab.client)
    await until(lambda: waits(handle), "the workflow waits")
    before, begun = branch.received(handle), time.monotonic()
    await put(handle, 7)
    await until(lambda: branch.booked(handle), "the signal had an effect")
    seconds = time.monotonic() - begun
    woken = works(
        "a signal wakes a running workflow, which then acts on the signal's argument",
        booked_before=equal(before, []),
        booked_after_a_signal_with_7=equal(branch.booked(handle), [7]),
        from_signal_to_booked=figure(seconds, "s"),
    )
    await put(handle, 7)
    result = await close(handle)
    return woken, holds(
        "a signal that its sender sends again comes twice; by the key in it, it counts once",
        received=equal(branch.received(handle), [7, 7]),
        booked=equal(branch.booked(handle), [7]),
        result=equal(result, 2),
    )


async def waits(handle: Handle) -> bool:
    """The first workflow task is done: the workflow's code has run up to where it waits."""
    return (await count_events(handle))["WORKFLOW_TASK_COMPLETED"] > 0


async def by_another_workflow(lab: Lab, branch: Branch) -> tuple[Evidence, ...]:
    """A payroll signals two accounts and a liquidator cancels two; one of each two does not exist."""
    handle = await branch.open("external", lab.client)
    nobody = f"{lab.id}-nobody"
    payroll = await lab.start(Payroll.run, PayDay("may", {nobody: 5, handle.id: 9}), name="payroll")
    unpaid = await ended(payroll)
    await until(lambda: branch.booked(handle), "the wages are booked")
    liquidator = await lab.start(Liquidator.run, [nobody, handle.id], name="liquidator")
    unknown, how = await ended(liquidator), await ended(handle)
    history = await handle.fetch_history()
    signals = [one.workflow_execution_signaled_event_attributes for one in history.events]
    senders = [one.external_workflow_execution.workflow_id for one in signals if one.signal_name]
    found = works(
        "a workflow signals and cancels another one by its id",
        received=equal(branch.received(handle), [9]),
        sender_in_its_history=equal(senders, [payroll.id]),
        ended=equal(how.status, "CANCELED"),
    )
    return found, holds(
        "to one that does not exist the sender's code gets an error of a type of its own, and goes on; none is started",
        not_signalled=equal(unpaid.result, [nobody]),
        not_cancelled=equal(unknown.result, [f"{nobody}: ExternalWorkflowExecutionNotFound"]),
        senders_ended=equal([unpaid.status, unknown.status], ["COMPLETED", "COMPLETED"]),
        describing_it=equal(name_of(await refusal(lab.client.get_workflow_handle(nobody))), "NOT_FOUND"),
        in_the_senders_histories=equal(
            [await failed_in(one) for one in (payroll, liquidator)],
            ["SignalExternalWorkflowExecutionFailed", "RequestCancelExternalWorkflowExecutionFailed"],
        ),
    )


async def failed_in(handle: Handle) -> str:
    """The events of a history that tell of a failure, a line each."""
    return "\n".join(line for line in outline(await handle.fetch_history()).splitlines() if line.endswith("Failed"))


async def before_any_worker(lab: Lab, branch: Branch) -> Evidence:
    queue = f"{lab.id}-early"
    handle = await branch.open("early", lab.client, task_queue=queue)
    numbers = list(range(1, 21))
    for number in numbers:
        await put(handle, number)
    tasks = await count_events(handle)
    async with lab.worker(**branch.parts(task_queue=queue)):
        result = await close(handle)
    return holds(
        "signals sent before any worker exists wait for it: all arrive, in the order sent",
        workflow_tasks_started_when_all_were_sent=equal(tasks["WORKFLOW_TASK_STARTED"], 0),
        received=equal(branch.received(handle), numbers),
        result=equal(result, 20),
    )


CROWD = 1000


async def recorded(handle: Handle) -> list[int]:
    """The amounts of the deposits in the history, in that order."""
    history = await handle.fetch_history()
    signals = [one.workflow_execution_signaled_event_attributes for one in history.events]
    return [json.loads(one.input.payloads[0].data)["amount"] for one in signals if one.signal_name == "deposit"]


async def concurrent_signals(lab: Lab, branch: Branch) -> Evidence:
    """Nobody waits for the answer to one signal before sending the next: then no order of sending is promised."""
    handle, numbers = await branch.open("crowd", lab.client), range(1, CROWD + 1)
    begun = time.monotonic()
    await asyncio.gather(*(put(handle, number) for number in numbers))
    sent = time.monotonic() - begun
    await close(handle)
    done, received, written = time.monotonic() - begun, branch.received(handle), await recorded(handle)
    return holds(
        f"{CROWD} concurrent signals to one workflow: none lost, none twice, handled in the order of the history",
        received=equal(len(received), CROWD),
        lost=equal(missing(numbers, received), []),
        twice=equal(repeated(received), []),
        signal_events=equal(len(written), CROWD),
        same_order_in_both=equal(received == written, True),
        written_after_one_that_was_sent_later=sum(one < another for another, one in pairwise(written)),
        all_accepted_after=figure(sent, "s"),
        all_handled_after=figure(done, "s"),
    )


EACH = 50


async def two_senders(lab: Lab, branch: Branch) -> Evidence:
    """Each sends one signal after the other, and knows nothing of the other one."""
    handle = await branch.open("senders", lab.client)
    odd, even = list(range(1, 2 * EACH, 2)), list(range(2, 2 * EACH + 1, 2))

    async def send(numbers: Sequence[int]) -> None:
        for number in numbers:
            await put(handle, number)

    await asyncio.gather(send(odd), send(even))
    await close(handle)
    received, written = branch.received(handle), await recorded(handle)
    return holds(
        "two senders at a time, each waiting for its answers: each one's order is kept, and both share the history's",
        first=equal([number for number in received if number % 2], odd),
        second=equal([number for number in received if number % 2 == 0], even),
        same_order_in_the_history=equal(received == written, True),
        turns_between_the_two_in_it=sum((one - another) % 2 for one, another in pairwise(written)),
    )


class Stream:
    """Numbers from 1 on, sent one after the other; it is kept which ones were acknowledged."""

    def __init__(self, send: Callable[[int], Awaitable[object]]) -> None:
        self.send = send
        self.acknowledged: list[int] = []
        self.refused: list[int] = []
        self.ended = False

    async def __aenter__(self) -> "Stream":
        self.flowing = asyncio.create_task(self.flow())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def end(self) -> None:
        self.ended = True
        await self.flowing

    async def flow(self) -> None:
        for number in count(1):
            if self.ended:
                return
            try:
                # A sender that nobody answers gives up and does not know whether its message was taken.
                await asyncio.wait_for(self.send(number), 20 * slowness())
                self.acknowledged.append(number)
            except (RPCError, OSError, TimeoutError) as error:
                if isinstance(error, RPCError) and error.status == RPCStatusCode.NOT_FOUND:
                    raise  # the addressee is gone, and no waiting brings it back
                self.refused.append(number)
            await asyncio.sleep(0.005)

    def has(self, many: int) -> bool:
        if self.flowing.done():
            self.flowing.result()  # raises what ended it
        return len(self.acknowledged) >= many

    async def more(self, many: int) -> int:
        """Wait until so many more were acknowledged. Returns how many there are then."""
        there = len(self.acknowledged)
        await until(lambda: self.has(there + many), f"{many} more messages are acknowledged")
        return len(self.acknowledged)


def as_sent(branch: Branch, handle: Handle, stream: Stream) -> dict[str, Any]:
    """The facts that every acknowledged signal of a stream came once, in the order sent, and no other one did."""
    received = branch.received(handle)
    return {
        "acknowledged": len(stream.acknowledged),
        "lost": equal(missing(stream.acknowledged, received), []),
        "twice": equal(repeated(received), []),
        "in the order sent": equal(received == sorted(received), True),
        "never sent": equal(missing(received, stream.acknowledged + stream.refused), []),
        "booked as received": equal(branch.booked(handle) == received, True),
        "without an answer": len(stream.refused),
    }


# A setting that no user needs: the server suggests a new run after so few events, instead of 4096.
SHORT = {"limit.historyCount.suggestContinueAsNew": "40"}
RUNS = 6


async def through_new_runs(lab: Lab, branch: Branch, server: Server) -> tuple[Evidence, ...]:
    """A stream flows while the account continues as new; two others have a hundred deposits before they begin."""
    client = server.client
    handle = await branch.open("moving", client)
    piled = [await branch.open(kind.__name__, client, kind) for kind in (Account, Forgetful)]
    numbers = list(range(1, 101))
    for one in piled:
        await asyncio.gather(*(put(one, number) for number in numbers))
        await one.signal(Account.close)
    async with Stream(lambda number: put(handle, number)) as stream, lab.worker(**branch.parts(server=server)):
        await until(lambda: stream.has(1) and branch.runs(handle) >= RUNS, f"{RUNS} runs have booked something")
        await stream.end()
        await close(handle)
        for one in piled:
            await ended(one)
    kept, forgotten = (branch.received(one) for one in piled)
    events = {"events_after_which_a_new_run_is_suggested": 40, "instead_of": 4096}
    return (
        holds(
            "a stream of signals while the run continues as new five times: each acknowledged one comes once, in order",
            **as_sent(branch, handle, stream),
            runs=at_least(branch.runs(handle), RUNS),
            a_hundred_that_waited_already=equal(sorted(kept) == numbers, True),
            runs_of_theirs=at_least(branch.runs(piled[0]), 2),
            **events,
        ),
        control(
            "a workflow that does not take along what is waiting loses what was acknowledged when a new run begins",
            sent=len(numbers),
            received=equal(len(forgotten), AT_ONCE),
            lost=equal(len(missing(numbers, forgotten)), len(numbers) - AT_ONCE),
            **events,
        ),
    )


async def kill_worker_and_server(lab: Lab, branch: Branch, server: Server) -> Evidence:
    """While a stream of signals flows, first the worker is killed and replaced, then the server."""
    queue = f"{lab.id}-kills"
    handle = await branch.open("kills", server.client, task_queue=queue, task_timeout=soon())
    worker = partial(lab.worker_process, **branch.parts(server=server, task_queue=queue))
    async with Stream(lambda number: put(handle, number)) as stream:
        async with worker() as victim:
            await until(lambda: branch.booked(handle), "the first signal is booked")
            first = await stream.more(40)
            await victim.kill()
            second = await stream.more(40)
        async with worker():
            third = await stream.more(40)
            server.kill()
            down = await server.start()
            await stream.more(40)
            await stream.end()
            await close(handle)
    return holds(
        "worker and server are killed in mid-stream: every acknowledged signal is there once, in the order sent",
        **as_sent(branch, handle, stream),
        acknowledged_when_the_worker_was_killed=first,
        when_a_new_one_came=at_least(second, first + 40),
        when_the_server_was_killed=at_least(third, second + 40),
        server_away=figure(down, "s"),
    )


async def on_a_server_of_its_own(lab: Lab, branch: Branch) -> list[Evidence]:
    async with lab.private_server(file=True, settings=SHORT) as server:
        moved = await through_new_runs(lab, branch, server)
        return [*moved, await kill_worker_and_server(lab, branch, server)]


async def plain_inbox(port: int, path: str) -> None:
    """The control: the same inbox as an ordinary program, which keeps what it received in its memory."""
    waiting: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := (await reader.readline()).decode().strip():
            if line == "close":
                Books(path).enter_all({str(number): number for number in waiting})
            else:
                waiting.append(int(line))
            writer.write(b"taken\n")

    async with await asyncio.start_server(serve, "127.0.0.1", port) as server:
        await server.serve_forever()


async def tell(port: int, message: object) -> None:
    """Send one line and wait for the answer, over a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{message}\n".encode())
        if await reader.readline() != b"taken\n":
            raise ConnectionError("no answer")
    finally:
        writer.close()


async def kill_plain_program(lab: Lab) -> Evidence:
    port, path = free_port(), lab.file("plain.sqlite")
    async with Stream(lambda number: tell(port, number)) as stream:
        async with lab.process(plain_inbox, port, path) as program:
            await stream.more(40)
            await program.kill()
            before = list(stream.acknowledged)
        async with lab.process(plain_inbox, port, path):
            await stream.more(40)
            await stream.end()
            await tell(port, "close")
    received = Books(path).amounts()
    return control(
        "the same stream into a plain program that is killed: what it had acknowledged by then is lost",
        acknowledged_when_it_was_killed=at_least(len(before), 40),
        of_these_booked=equal([number for number in received if number in before], []),
        booked=at_least(len(received), 1),
    )


async def undecodable(lab: Lab, branch: Branch) -> Evidence:
    """The handler takes a deposit. The server does not look into payloads and takes anything."""
    handle = await branch.open("wrong", lab.client)
    with overheard("temporalio.worker._workflow_instance", handle.id) as told:
        await put(handle, 1)
        await handle.signal("deposit", "two")
        await put(handle, 3)
        result = await close(handle)
    signals = outline(await handle.fetch_history()).splitlines().count("WorkflowExecutionSignaled deposit")
    return limit(
        "a signal whose argument the handler cannot decode is dropped, though its sender saw success",
        signals_accepted_and_recorded=equal(signals, 3),
        received=equal(branch.received(handle), [1, 3]),
        result=equal(result, 2),
        failed_workflow_tasks=equal(await failed_tasks(handle), []),
        the_workers_log=contains((told or ["nothing"])[0].split(" on workflow")[0], "Failed deserializing signal"),
    )


@SG.item("SG-01", "External signals")
async def external_signals(lab: Lab) -> AsyncIterator[Evidence]:
    """Signals are sent early, all at once, by workflows and through kills; an account outside keeps what arrived."""
    branch = Branch(lab)
    parts = (wakes_a_workflow, by_another_workflow, before_any_worker, two_senders, undecodable, on_a_server_of_its_own)
    async with lab.worker(**branch.parts()):
        async for evidence in side_by_side(kill_plain_program(lab), *(part(lab, branch) for part in parts)):
            yield evidence
        yield await concurrent_signals(lab, branch)
    yield native(
        "a signal is a method of the workflow; nothing was built to keep, order or deliver it",
        workflow.signal,
        workflow.wait_condition,
        WorkflowHandle.signal,
        workflow.get_external_workflow_handle,
        workflow.get_external_workflow_handle_for,
        workflow.ExternalWorkflowHandle.signal,
        workflow.ExternalWorkflowHandle.cancel,
        workflow.continue_as_new,
        workflow.init,
        workflow.Info.is_continue_as_new_suggested,
    )


# SG-02 Waiting and awaitables ------------------------------------------------------------------------
# Waiting costs no thread and may last for months: the condition is ordinary code, and the server keeps the time. What
# answers its sender while a workflow waits is an update. A run takes ten of them at a time and two thousand in all: one
# that takes long only joins a queue, and the run continues as new when the server suggests it.


@dataclass
class Wish:
    thing: str
    sellers: list[str]
    seconds: float | None  # to wait for an approval; None: for ever


@dataclass
class Inquiry:
    seller: str
    thing: str


@dataclass
class Offer:
    seller: str
    price: int


@dataclass
class Expense:
    number: str  # of the bill: it is paid once
    amount: int


class Market(Protocol):
    """Whoever sells, and takes money."""

    def price(self, seller: str, thing: str) -> int: ...

    def enter(self, key: str, amount: int) -> None:
        """Take a payment; what was paid under a key before is not taken again."""


class Buyer:
    def __init__(self, market: Market) -> None:
        self.market = market

    @activity.defn
    def ask(self, inquiry: Inquiry) -> Offer:
        return Offer(inquiry.seller, self.market.price(inquiry.seller, inquiry.thing))

    @activity.defn
    def pay(self, expense: Expense) -> None:
        self.market.enter(expense.number, expense.amount)


@workflow.defn
class Purchase:
    """Waits for several at the same time, and then for somebody's word, or for the end of patience."""

    def __init__(self) -> None:
        self.offers: list[Offer] = []
        self.approved = False

    @workflow.run
    async def run(self, wish: Wish) -> str:
        asked = [
            workflow.start_activity_method(
                Buyer.ask, Inquiry(seller, wish.thing), start_to_close_timeout=timedelta(minutes=5)
            )
            for seller in wish.sellers
        ]
        # Not asyncio.wait: its sets have no order of their own, so a replay could take them in another one.
        done, _ = await workflow.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        self.offers = [one.result() for one in done]
        self.offers = await asyncio.gather(*asked)
        try:
            await workflow.wait_condition(lambda: self.approved, timeout=wish.seconds)
        except TimeoutError:
            return "expired"
        return f"bought from {min(self.offers, key=lambda offer: offer.price).seller}"

    @workflow.signal
    def approve(self) -> None:
        self.approved = True

    @workflow.query
    def seen(self) -> list[str]:
        return [offer.seller for offer in self.offers]


@dataclass
class Means:
    """What a budget takes along into its next run."""

    left: int
    queue: list[Expense] = field(default_factory=list)
    unpaid: list[str] = field(default_factory=list)
    closed: bool = False


@workflow.defn
class Budget:
    @workflow.init
    def __init__(self, means: Means) -> None:
        self.means = means
        self.turn: contextlib.AbstractAsyncContextManager[None] = asyncio.Lock()

    @workflow.run
    async def run(self, means: Means) -> Means:
        while (self.means.queue or not self.means.closed) and not self.is_long():
            await workflow.wait_condition(lambda: bool(self.means.queue) or self.means.closed or self.is_long())
            if self.means.queue:
                await self.pay_next()
        # A handler that is still at work would be cut off here, and its sender would get an error.
        await workflow.wait_condition(workflow.all_handlers_finished)
        if self.means.queue or not self.means.closed:
            workflow.continue_as_new(self.means)
        return self.means

    def is_long(self) -> bool:
        """The server suggests it before a run's events, or its updates, are too many."""
        return workflow.info().is_continue_as_new_suggested()

    async def pay_next(self) -> None:
        try:
            await self.pay(self.means.queue[0])
        except ApplicationError:
            self.means.unpaid.append(self.means.queue[0].number)
        del self.means.queue[0]

    async def pay(self, expense: Expense) -> int:
        async with self.turn:  # handlers take turns at every await: without the lock they change what others have read
            self.refuse_too_much(expense)  # once more: others may have spent since it was accepted
            left = self.means.left - expense.amount
            await workflow.execute_activity_method(Buyer.pay, expense, start_to_close_timeout=timedelta(seconds=30))
            self.means.left = left
        return left

    def refuse_too_much(self, expense: Expense) -> None:
        if not 0 < expense.amount <= self.means.left:
            raise ApplicationError(f"{expense.amount} cannot be spent, {self.means.left} is left")

    @workflow.update
    async def spend(self, expense: Expense) -> int:
        """Pay while the sender waits. Until then it holds one of the run's ten places."""
        return await self.pay(expense)

    @spend.validator
    def check_spend(self, expense: Expense) -> None:
        self.refuse_too_much(expense)

    @workflow.update
    def order(self, expense: Expense) -> int:
        """Only take note of it, and answer at once with its place in the queue."""
        self.means.queue.append(expense)
        return len(self.means.queue)

    @order.validator
    def check_order(self, expense: Expense) -> None:
        self.refuse_too_much(expense)

    @workflow.signal
    def close(self) -> None:
        self.means.closed = True


class Bazaar:
    """A market for the example: everybody asks for as much as their name is long."""

    def __init__(self) -> None:
        self.paid: dict[str, int] = {}

    def price(self, seller: str, thing: str) -> int:
        return len(seller)

    def enter(self, key: str, amount: int) -> None:
        self.paid.setdefault(key, amount)


async def example_sg_02(client: Client) -> None:
    market = Bazaar()
    buyer = Buyer(market)
    async with Worker(
        client,
        task_queue="purchases",
        workflows=[Purchase, Budget],
        activities=[buyer.ask, buyer.pay],
        activity_executor=ThreadPoolExecutor(10),
    ):
        ids = [f"{kind}-{uuid.uuid4()}" for kind in ("purchase", "budget")]
        wish = Wish("lamp", ["anna", "bob"], seconds=60)
        purchase = await client.start_workflow(Purchase.run, wish, id=ids[0], task_queue="purchases")
        await purchase.signal(Purchase.approve)
        budget = await client.start_workflow(Budget.run, Means(100), id=ids[1], task_queue="purchases")
        left = await budget.execute_update(Budget.spend, Expense("lamp", 30))
        try:
            await budget.execute_update(Budget.spend, Expense("table", 80))
        except WorkflowUpdateFailedError as refusal:
            print(f"{await purchase.result()}, {left} left; the table was refused: {refusal.cause}")
        await budget.execute_update(Budget.order, Expense("chair", 50))
        await budget.signal(Budget.close)
        print(f"In the end {(await budget.result()).left} are left; paid: {market.paid}")


# SG-02 put to the test -------------------------------------------------------------------------------


class Shop(Books):
    """A market whose books are a file outside Temporal."""

    def price(self, seller: str, thing: str) -> int:
        return {"anna": 3, "bob": 2, "carl": 1}[seller]


@workflow.defn
class Unlocked(Budget):
    """The control: the same handlers, and nothing keeps them apart."""

    @workflow.init
    def __init__(self, means: Means) -> None:
        super().__init__(means)
        self.turn = contextlib.nullcontext()

    @workflow.run
    async def run(self, means: Means) -> Means:
        return await super().run(means)


@workflow.defn
class Staying(Budget):
    """One that never continues as new."""

    @workflow.init
    def __init__(self, means: Means) -> None:
        super().__init__(means)

    @workflow.run
    async def run(self, means: Means) -> Means:
        return await super().run(means)

    def is_long(self) -> bool:
        return False


@workflow.defn
class Hasty(Budget):
    """One that ends as soon as it is told to, whatever its handlers do."""

    @workflow.init
    def __init__(self, means: Means) -> None:
        super().__init__(means)

    @workflow.run
    async def run(self, means: Means) -> Means:
        await workflow.wait_condition(lambda: self.means.closed)
        return self.means


class Till:
    """Where purchases and budgets are tried: every payment goes into one shop's books."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.shop = lab, Shop(lab.file("shop.sqlite"))
        self.buyer = Buyer(self.shop)
        self.held = [
            *(hold("ask", self.gate(seller), seller=seller).of(self.id_of("quotes")) for seller in SELLERS),
            *(hold("pay", self.gate(name)).of(self.id_of(name)) for name in HELD),
        ]

    def id_of(self, name: str) -> str:
        return f"{self.lab.id}-{name}"

    def gate(self, name: str) -> str:
        return self.lab.gate(name)

    def parts(self, **options: Any) -> dict[str, Any]:
        """What a worker for purchases and budgets is made of."""
        return {
            "workflows": [Purchase, Budget, Unlocked, Staying, Hasty],
            "activities": [self.buyer.ask, self.buyer.pay],
            "faults": self.held,
            **options,
        }

    async def purchase(self, name: str, seconds: float | None, sellers: Sequence[str] = ("bob",)) -> Handle:
        return await self.lab.start(Purchase.run, Wish("lamp", list(sellers), seconds), name=name)

    async def budget(self, name: str, left: int, kind: Any = Budget, client: Client | None = None) -> Handle:
        client = client or self.lab.client
        handle: Handle = await client.start_workflow(
            kind.run, Means(left), id=self.id_of(name), task_queue=self.lab.task_queue
        )
        return handle

    def bill(self, handle: Handle, amount: int, name: object = "") -> Expense:
        return Expense(f"{handle.id}/{name or amount}", amount)

    def paid(self, handle: Handle) -> list[int]:
        return self.shop.amounts(f"{handle.id}/")

    def begun(self, handle: Handle, activity: str = "pay") -> list[str]:
        calls = [call.argument for call in self.lab.calls(handle.id) if call.activity == activity]
        return [one.get("seller", "") or one["number"].rpartition("/")[2] for one in calls]


SELLERS = ("anna", "bob", "carl")
HELD = ("hasty", "polite", "pair", "waiting", "queued", "killed")  # budgets whose payments wait for a gate


async def dismiss(handle: Handle) -> Means:
    """Close a budget. Returns the means it ended with."""
    await handle.signal(Budget.close)
    means: Means = (await ended(handle)).result
    return means


async def waits_for_signal(lab: Lab, till: Till) -> Evidence:
    handles = [await till.purchase(f"approved-{seconds}", seconds) for seconds in (None, 3600)]
    for handle in handles:
        await until(lambda: handle.query(Purchase.seen), "it waits for its approval")  # noqa: B023
    before = [name_of(await status_of(handle)) for handle in handles]
    for handle in handles:
        await handle.signal(Purchase.approve)
    results = [(await ended(handle)).result for handle in handles]
    timers = [outline(await handle.fetch_history()).count("TimerCanceled") for handle in handles]
    return works(
        "wait_condition waits until a signal makes its condition true; a timeout not needed is taken back",
        without_and_with_a_timeout_of_3600_s=equal(before, ["RUNNING", "RUNNING"]),
        after_a_signal=equal(results, ["bought from bob", "bought from bob"]),
        timers_cancelled=equal(timers, [0, 1]),
    )


async def never_set(lab: Lab, till: Till) -> tuple[Evidence, ...]:
    """Nobody ever approves. Both purchases wait for the same condition; one of them has a timeout."""
    without = await till.purchase("endless", None)
    await until(lambda: without.query(Purchase.seen), "it waits for its approval")
    bounded = await till.purchase("bounded", 1)
    how = await ended(bounded)
    status, history = await status_of(without), outline(await without.fetch_history())
    events = await history_of(bounded)
    await without.terminate()
    waited = (event_times(events, "TIMER_FIRED")[0] - event_times(events, "TIMER_STARTED")[0]).total_seconds()
    expired = works(
        "a condition that is never set: the timeout ends the wait, not before its time",
        result=equal(how.result, "expired"),
        timeout=figure(1, "s"),
        waited_by_the_servers_clock=at_least(figure(waited, "s"), 1),
    )
    return expired, control(
        "the same wait without a timeout hangs",
        when_the_one_with_a_timeout_had_ended=equal(name_of(status), "RUNNING"),
        timers_in_its_history=equal(history.count("Timer"), 0),
    )


async def wait_on_many(lab: Lab, till: Till) -> Evidence:
    handle = await till.purchase("quotes", None, SELLERS)
    await until(lambda: len(till.begun(handle, "ask")) >= 3, "all three are asked")
    early = await handle.query(Purchase.seen)
    open_gate(till.gate("bob"))
    await until(lambda: handle.query(Purchase.seen), "the first answer is there")
    first, completed = await handle.query(Purchase.seen), (await count_events(handle))["ACTIVITY_TASK_COMPLETED"]
    for seller in ("carl", "anna"):
        open_gate(till.gate(seller))
    await until(lambda: has_seen(handle, 3), "every answer is there")
    every = await handle.query(Purchase.seen)
    await handle.signal(Purchase.approve)
    return works(
        "waiting on many: it goes on with the first that is ready, and later has all, in the order asked",
        asked_before_anybody_answered=equal(sorted(till.begun(handle, "ask")), list(SELLERS)),
        seen_by_then=equal(early, []),
        seen_when_one_had_answered=equal(first, ["bob"]),
        activities_completed_by_then=equal(completed, 1),
        seen_in_the_end=equal(every, list(SELLERS)),
        result=equal((await ended(handle)).result, "bought from carl"),
    )


async def has_seen(handle: Handle, offers: int) -> bool:
    return len(await handle.query(Purchase.seen)) >= offers


async def sent(update: Awaitable[object]) -> str:
    """What came of an update: its answer, or in words why it was refused."""
    try:
        return str(await update)
    except WorkflowUpdateFailedError as error:
        return str(error.cause)
    except RPCError as error:
        return f"{error.status.name}: {error.message}"


async def validated_updates(lab: Lab, till: Till) -> Evidence:
    handle = await till.budget("budget", 100)
    first = await handle.execute_update(Budget.spend, till.bill(handle, 30))
    # On a busy machine an update may make workflow tasks of its own, refused or not: outline() leaves them out.
    before = outline(await handle.fetch_history())
    refused = [
        await sent(handle.execute_update(Budget.spend, till.bill(handle, amount))) for amount in (71, 1000, 0, -5, 71)
    ]
    after = outline(await handle.fetch_history())
    rest = await handle.execute_update(Budget.spend, till.bill(handle, 70))
    await dismiss(handle)
    events = await count_events(handle)
    return holds(
        "an update's validator refuses bad input: the sender learns why, and the history gets no event of it",
        left_after_30_of_100=equal(first, 70),
        refused=equal(refused, [f"{amount} cannot be spent, 70 is left" for amount in (71, 1000, 0, -5, 71)]),
        events_but_workflow_tasks_before=len(before.splitlines()),
        the_same_after=equal(after == before, True),
        left_after_70_more=equal(rest, 0),
        paid=equal(till.paid(handle), [30, 70]),
        updates_accepted_and_completed=equal(
            [events[f"WORKFLOW_EXECUTION_UPDATE_{what}"] for what in ("ACCEPTED", "COMPLETED")], [2, 2]
        ),
    )


async def accepted_too_early(lab: Lab, till: Till) -> Evidence:
    """Two updates want seventy of a hundred. The second one is accepted while the first one is being paid."""
    handle = await till.budget("pair", 100)
    one = await accept(handle, till.bill(handle, 70, "one"))
    await until(lambda: till.begun(handle), "the first one is being paid")
    other = await accept(handle, till.bill(handle, 70, "other"))
    open_gate(till.gate("pair"))
    answers = [await sent(update.result()) for update in (one, other)]
    await dismiss(handle)
    return holds(
        "a validator knows the state at its own time: what was accepted is looked at again when its turn has come",
        answers=equal(answers, ["30", "70 cannot be spent, 30 is left"]),
        both_accepted=equal((await count_events(handle))["WORKFLOW_EXECUTION_UPDATE_ACCEPTED"], 2),
        paid=equal(till.paid(handle), [70]),
    )


async def accept(handle: Handle, expense: Expense) -> WorkflowUpdateHandle[int]:
    """Send an update that waits for its payment, and wait until it is accepted."""
    return await handle.start_update(
        Budget.spend, expense, id=expense.number, wait_for_stage=WorkflowUpdateStage.ACCEPTED
    )


async def end_during_update(till: Till, name: str, kind: type[Budget]) -> tuple[str, list[str]]:
    """End a budget while it handles an update. Returns (what the sender got, what the worker warned of)."""
    with overheard("py.warnings", f'"id": "{till.id_of(name)}/') as told:
        handle = await till.budget(name, 100, kind)
        update = await accept(handle, till.bill(handle, 30))
        await until(lambda: till.begun(handle), "the update is being handled")
        await handle.signal(Budget.close)
        await until(lambda: has_heard(handle), "the workflow has heard that it is to end")
        open_gate(till.gate(name))
        try:
            answer = str(await update.result())
        except WorkflowUpdateFailedError as error:
            cause = error.cause
            answer = str(cause.type if isinstance(cause, ApplicationError) else cause)
        await ended(handle)
    return answer, told


async def has_heard(handle: Handle) -> bool:
    """A workflow task was completed after the signal came."""
    _, signalled, after = outline(await handle.fetch_history(), without="").partition("WorkflowExecutionSignaled")
    return bool(signalled) and "WorkflowTaskCompleted" in after


async def unfinished_handlers(lab: Lab, till: Till) -> Evidence:
    (hasty, warned), (polite, silent) = await asyncio.gather(
        end_during_update(till, "hasty", Hasty), end_during_update(till, "polite", Budget)
    )
    warning = (warned or ["of nothing"])[0].split(": ", 1)[-1].split(".")[0]
    return holds(
        "ending with an unfinished handler is noticed by worker and sender; all_handlers_finished waits for it",
        ended_at_once=equal(hasty, "AcceptedUpdateCompletedWorkflow"),
        the_worker_warned=contains(warning, "TMPRL1102"),
        ended_after_all_handlers=equal(polite, "70"),
        warnings_then=equal(silent, []),
    )


AT_A_TIME = 10


async def at_once(lab: Lab, till: Till, name: str, kind: type[Budget]) -> tuple[int, list[str]]:
    """Spend one ten times at once. Returns (how much less it is then, the calls begun and ended in their order)."""
    handle = await till.budget(name, 100, kind)
    bills = [till.bill(handle, 1, number) for number in range(1, AT_A_TIME + 1)]
    await asyncio.gather(*(handle.execute_update(Budget.spend, bill) for bill in bills))
    left = (await dismiss(handle)).left
    calls = sorted([*lab.calls(handle.id), *lab.calls(handle.id, "ended")], key=lambda call: call.at)
    return 100 - left, [call.what for call in calls]


async def locked_handlers(lab: Lab, till: Till) -> tuple[Evidence, ...]:
    (counted, turns), (fewer, mixed) = await asyncio.gather(
        at_once(lab, till, "locked", Budget), at_once(lab, till, "unlocked", Unlocked)
    )
    one_by_one = ["begun", "ended"] * AT_A_TIME
    locked = holds(
        "async handlers under one asyncio.Lock take turns, and no change is lost",
        concurrent_updates_that_spend_1_each=AT_A_TIME,
        spent=equal(counted, AT_A_TIME),
        payments_one_by_one=equal(turns == one_by_one, True),
    )
    return locked, control(
        "the same handlers without the lock overlap and lose changes",
        concurrent_updates_that_spend_1_each=AT_A_TIME,
        payments_made=equal(mixed.count("ended"), AT_A_TIME),
        spent=at_most(fewer, AT_A_TIME - 1),
        payments_begun_before_the_first_ended=at_least(mixed.index("ended"), 2),
    )


MANY = 30


async def many_at_a_time(lab: Lab, till: Till) -> tuple[Evidence, ...]:
    """Thirty updates come at once, while no payment gets through: some that wait for it, and some that only queue."""
    waiting, queued = await till.budget("waiting", 1000), await till.budget("queued", 1000)
    impatient = await connect(lab.target, retry_config=RetryConfig(max_retries=1, max_elapsed_time_millis=1))
    direct = impatient.get_workflow_handle(waiting.id)
    bills = [till.bill(waiting, 1, number) for number in range(1, MANY + 1)]
    answers = await asyncio.gather(*(sent(accept(direct, bill)) for bill in bills))
    refused = [answer for answer in answers if answer.startswith("RESOURCE_EXHAUSTED")]
    orders = [till.bill(queued, 1, number) for number in range(1, MANY + 1)]
    places = await asyncio.gather(*(queued.execute_update(Budget.order, order) for order in orders))
    paid = till.paid(queued)
    for name in ("waiting", "queued"):
        open_gate(till.gate(name))
    left = [(await dismiss(handle)).left for handle in (waiting, queued)]
    late = await sent(accept(direct, till.bill(waiting, 1, "late")))
    return (
        limit(
            "a run takes only so many updates at a time: while these wait for something, others are refused",
            sent_at_once=MANY,
            accepted=at_most(MANY - len(refused), MANY - 1),
            refused=at_least(len(refused), 1),
            with_the_words=equal(sorted(set(refused)), refused[:1]),
            done=equal(1000 - left[0], MANY - len(refused)),
            and_after_its_end=contains(late, "already completed"),
        ),
        holds(
            "updates that only join a queue do not hold their places: as many are all answered, and then done",
            sent_at_once=MANY,
            answered_before_anything_was_paid=equal([len(places), paid], [MANY, []]),
            places_given=equal(sorted(places), sorted(range(1, MANY + 1))),
            done=equal(1000 - left[1], MANY),
            paid_once_each=equal(till.begun(queued), [*dict.fromkeys(till.begun(queued))]),
        ),
    )


# Settings that no user has, so that the limits are met here after few messages; the server's own are the second ones.
LOWERED = {
    "history.maxTotalUpdates": ("40", "2000"),
    "history.maxTotalUpdates.suggestContinueAsNewThreshold": ("0.5", "0.9"),
    "history.maximumSignalsPerExecution": ("20", "10000"),
}
UPDATES = 100


async def many_in_all(lab: Lab, till: Till, server: Server) -> tuple[Evidence, ...]:
    """Updates are sent one after the other, to a budget that continues as new and to one that does not."""
    staying = await till.budget("staying", 1000, Staying, server.client)
    moving = await till.budget("moving", 1000, Budget, server.client)
    answers = []
    for number in range(1, UPDATES + 1):
        answers.append(await sent(staying.execute_update(Budget.order, till.bill(staying, 1, number))))
        if not answers[-1].isdecimal():
            break
    places = [
        await moving.execute_update(Budget.order, till.bill(moving, 1, number)) for number in range(1, UPDATES + 1)
    ]
    spent = [1000 - (await dismiss(handle)).left for handle in (staying, moving)]
    runs = len({call.run for call in lab.calls(moving.id)})
    lowered = "40 updates, and a new run is suggested after half of them, instead of 2000 and nine tenths"
    return (
        limit(
            "a run takes only so many updates in all, and then refuses every one",
            server_set_to=lowered,
            answered=equal(len(answers) - 1, 40),
            then=contains(answers[-1], "FAILED_PRECONDITION", "total number"),
            done=equal(spent[0], 40),
        ),
        holds(
            "a workflow that continues as new when it is suggested takes any number: each is answered, and done once",
            server_set_to=lowered,
            answered=equal(len(places), UPDATES),
            done=equal(spent[1], UPDATES),
            done_twice=equal([name for name, times in Counter(till.begun(moving)).items() if times > 1], []),
            runs=at_least(runs, UPDATES // 40 + 1),
        ),
    )


async def many_signals(lab: Lab, till: Till, server: Server) -> Evidence:
    """Nobody works for this purchase: its signals only have to be taken."""
    handle: Handle = await server.client.start_workflow(
        Purchase.run, Wish("lamp", [], None), id=till.id_of("signals"), task_queue=till.id_of("nobody")
    )
    answers = [await sent(handle.signal(Purchase.approve)) for _ in range(25)]
    taken = (await count_events(handle))["WORKFLOW_EXECUTION_SIGNALED"]
    status = name_of(await status_of(handle))
    await handle.terminate()
    return limit(
        "a run takes only so many signals, and then refuses every one, also that which would end it",
        server_set_to="20 signals instead of 10000",
        taken=equal([taken, answers.count("None")], [20, 20]),
        then=equal(sorted(set(answers[20:])), answers[20:21]),
        in_words=contains(answers[-1], "limit for signal events"),
        the_run_then=equal(status, "RUNNING"),
    )


async def killed_while_accepted(lab: Lab, till: Till, server: Server) -> Evidence:
    """An update waits for its payment. Worker and server are killed, and somebody else asks for its result."""
    id = till.id_of("killed")
    parts = till.parts(server=server, task_queue=id, shortened={"pay": {"start_to_close_timeout": soon()}})
    handle: Handle = await server.client.start_workflow(
        Budget.run, Means(100), id=id, task_queue=id, task_timeout=soon()
    )
    bill = till.bill(handle, 30)
    async with lab.worker_process(**parts) as worker:
        await accept(handle, bill)
        await until(lambda: till.begun(handle), "it is being paid")
        await worker.kill()
    server.kill()
    down = await server.start()
    open_gate(till.gate("killed"))
    newcomer = (await connect(server.target)).get_workflow_handle_for(Budget.run, handle.id)
    update: WorkflowUpdateHandle[int] = newcomer.get_update_handle(bill.number, result_type=int)
    async with lab.worker_process(**parts):
        answer = await sent(update.result())
        left = (await dismiss(newcomer)).left
    return holds(
        "an update is accepted, worker and server are killed: a client that never saw it gets its answer by its id",
        answer=equal(answer, "70"),
        left=equal(left, 70),
        paid=equal(till.paid(handle), [30]),
        payments_begun=at_least(len(till.begun(handle)), 2),
        updates_accepted=equal((await count_events(newcomer))["WORKFLOW_EXECUTION_UPDATE_ACCEPTED"], 1),
        server_away=figure(down, "s"),
    )


async def with_lowered_limits(lab: Lab, till: Till) -> list[Evidence]:
    settings = {name: lowered for name, (lowered, _) in LOWERED.items()}
    async with lab.private_server(file=True, settings=settings) as server:
        async with lab.worker(**till.parts(server=server)):
            counted = await many_in_all(lab, till, server)
        return [
            *counted,
            await many_signals(lab, till, server),
            await killed_while_accepted(lab, till, server),
        ]


@SG.item("SG-02", "Waiting and awaitables")
async def waiting(lab: Lab) -> AsyncIterator[Evidence]:
    """Workflows wait for signals, timeouts, activities and each other's handlers; updates come in crowds."""
    till = Till(lab)
    single = (waits_for_signal, wait_on_many, validated_updates, accepted_too_early, unfinished_handlers)
    several = (never_set, locked_handlers, many_at_a_time, with_lowered_limits)
    async with lab.worker(**till.parts()):
        async for evidence in side_by_side(*(part(lab, till) for part in (*single, *several))):
            yield evidence
    yield native(
        "conditions, timeouts, waiting on many, updates and their validators belong to the SDK",
        workflow.wait_condition,
        (workflow.wait_condition, "timeout"),
        workflow.wait,
        workflow.update,
        workflow.all_handlers_finished,
        workflow.continue_as_new,
        workflow.init,
        workflow.Info.is_continue_as_new_suggested,
        WorkflowHandle.execute_update,
        (WorkflowHandle.start_update, "wait_for_stage"),
        (WorkflowHandle.start_update, "id"),
        WorkflowHandle.get_update_handle,
        WorkflowUpdateStage.ACCEPTED,
        WorkflowUpdateFailedError,
    )


# SG-03 Event triggers --------------------------------------------------------------------------------
# Whatever can make a call can start a workflow. The workflow id decides whether an event that comes twice
# makes one run or two.


@dataclass
class Order:
    ledger: str
    event: str = ""
    awaits: int = 0  # so many events more are awaited before the workflow goes on


@dataclass
class Seen:
    ledger: str
    events: list[str]


@activity.defn
async def record(seen: Seen) -> None:
    for event in seen.events:
        note(seen.ledger, f"{activity.info().workflow_run_id} {event}")


@workflow.defn
class OnEvent:
    """Reports the events it was started with, or was sent, to a ledger outside Temporal."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @workflow.run
    async def run(self, order: Order) -> None:
        self.events += [order.event] if order.event else []
        await workflow.wait_condition(lambda: len(self.events) >= order.awaits)
        await workflow.execute_activity(record, Seen(order.ledger, self.events), start_to_close_timeout=PATIENT)

    @workflow.signal
    def add(self, event: str) -> None:
        self.events.append(event)

    @workflow.update
    def put(self, event: str) -> int:
        self.events.append(event)
        return len(self.events)

    @put.validator
    def check(self, event: str) -> None:
        if not event:
            raise ApplicationError("an event must have a name")


@dataclass(frozen=True)
class Report:
    """A line of the ledger: which run saw which event."""

    run_id: str
    event: str


def reports(ledger: str) -> list[Report]:
    return [Report(*line.split(" ", 1)) for line in notes(ledger)]


async def by_api(lab: Lab) -> list[Report]:
    ledger, id = lab.file("api"), f"{lab.id}-api"
    await lab.client.execute_workflow(OnEvent.run, Order(ledger, "api call"), id=id, task_queue=lab.task_queue)
    return reports(ledger)


async def by_http(lab: Lab) -> tuple[str, list[Report]]:
    """The server's own HTTP API. Returns (the run id that it answered with, the reports)."""
    port, ledger, id = free_port(), lab.file("http"), f"{lab.id}-http"
    start = {
        "workflowType": {"name": "OnEvent"},
        "taskQueue": {"name": lab.task_queue},
        "input": [{"ledger": ledger, "event": "http post"}],
    }
    async with (
        lab.private_server(arguments=["--http-port", str(port)]) as server,
        lab.worker([OnEvent], [record], server=server),
    ):
        url = f"http://127.0.0.1:{port}/api/v1/namespaces/default/workflows/{id}"
        answer = await asyncio.to_thread(post, url, start)
        await server.client.get_workflow_handle(id).result()
    return answer["runId"], reports(ledger)


def post(url: str, body: object) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=20) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


async def by_calls(lab: Lab) -> Evidence:
    api, (answered, http) = await asyncio.gather(by_api(lab), by_http(lab))
    return works(
        "a workflow is started by a client's call and by an HTTP POST to the server",
        [one.event for one in api] == ["api call"] and http == [Report(answered, "http post")],
        f"runs in the ledger: {len(api)} by {', '.join(one.event for one in api)}, {len(http)} by "
        f"{', '.join(one.event for one in http)} (no SDK on the caller's side)",
    )


async def by_schedule(lab: Lab) -> list[tuple[datetime, datetime]]:
    """A schedule of every second, for two runs. Returns (when it was due, when it started) of each."""
    ledger, id = lab.file("schedule"), f"{lab.id}-schedule"
    schedule = await lab.client.create_schedule(
        id,
        Schedule(
            action=ScheduleActionStartWorkflow(
                OnEvent.run, Order(ledger, "schedule"), id=id, task_queue=lab.task_queue
            ),
            spec=ScheduleSpec(intervals=[ScheduleIntervalSpec(every=timedelta(seconds=1))]),
            state=ScheduleState(limited_actions=True, remaining_actions=2),
        ),
    )  # fmt: skip
    try:
        await until(lambda: len(reports(ledger)) >= 2, "the schedule has made two runs", 40)
        await until(lambda: actions_of(schedule, 2), "the schedule tells of both", 20)
        actions = await actions_of(schedule, 2)
    finally:
        await schedule.delete()
    ran = {one.run_id for one in reports(ledger)}
    return [
        (one.scheduled_at, one.started_at)
        for one in actions
        if isinstance(one.action, ScheduleActionExecutionStartWorkflow) and one.action.first_execution_run_id in ran
    ]


async def actions_of(schedule: ScheduleHandle, count: int) -> Sequence[ScheduleActionResult]:
    """What a schedule says it has started, once there are so many."""
    actions = (await schedule.describe()).info.recent_actions
    return actions if len(actions) >= count else ()


async def by_cron(lab: Lab) -> list[tuple[str, str, float, float]]:
    """The first two runs by a cron schedule: (run id, the run before, seconds to wait by the server, waited)."""
    ledger, id = lab.file("cron"), f"{lab.id}-cron"
    await lab.client.start_workflow(
        OnEvent.run, Order(ledger, "cron"), id=id, task_queue=lab.task_queue, cron_schedule="@every 1s"
    )
    try:
        await until(lambda: len({one.run_id for one in reports(ledger)}) >= 2, "cron has made two runs", 40)
    finally:
        await lab.client.get_workflow_handle(id).terminate("seen enough")
    runs = list(dict.fromkeys(one.run_id for one in reports(ledger)))[:2]
    return [await wait_of(lab.client.get_workflow_handle(id, run_id=run_id)) for run_id in runs]


async def wait_of(handle: Handle) -> tuple[str, str, float, float]:
    history = (await handle.fetch_history()).events
    begun = history[0].workflow_execution_started_event_attributes
    task = next(one for one in history if one.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_SCHEDULED)
    waited = task.event_time.ToDatetime() - history[0].event_time.ToDatetime()
    backoff = begun.first_workflow_task_backoff.ToTimedelta()
    return str(handle.run_id), begun.continued_execution_run_id, backoff.total_seconds(), waited.total_seconds()


async def by_clock(lab: Lab) -> Evidence:
    scheduled, cron = await asyncio.gather(by_schedule(lab), by_cron(lab))
    due = [at for at, _ in scheduled]
    punctual = all(at <= begun and at.microsecond == 0 for at, begun in scheduled)
    delays = ", ".join(f"{(begun - at).total_seconds():.2f} s" for at, begun in scheduled)
    chained = len(cron) == 2 and cron[0][1] == "" and cron[1][1] == cron[0][0]
    waited = all(0 < asked <= 1 and asked <= got for _, _, asked, got in cron)
    return works(
        "a schedule and a cron expression each start a workflow again and again, and never before it is due",
        len(set(due)) == len(scheduled) == 2 and punctual and chained and waited,
        f"schedule of every second: {len(scheduled)} runs, {delays} after they were due; cron '@every 1s': "
        f"{len(cron)} runs, the second continued from the first: {chained}; waited "
        + ", ".join(f"{got:.3f} s of {asked:.3f} s" for _, _, asked, got in cron),
    )


async def by_message(lab: Lab) -> Evidence:
    """Message and start in one request: the workflow is there, or is started, and has the message either way."""
    ledgers = {name: lab.file(name) for name in ("signalled", "updated")}
    await lab.client.execute_workflow(
        OnEvent.run,
        Order(ledgers["signalled"], awaits=1),
        id=f"{lab.id}-signalled",
        task_queue=lab.task_queue,
        start_signal="add",
        start_signal_args=["first signal"],
    )
    answer = await lab.client.execute_update_with_start_workflow(
        OnEvent.put, "first update", start_workflow_operation=start_if_missing(lab, "updated", ledgers["updated"])
    )
    await lab.client.get_workflow_handle(f"{lab.id}-updated").result()
    signal_seen, update_seen = reports(ledgers["signalled"]), reports(ledgers["updated"])
    return works(
        "a workflow is started by the first signal, and by the first update, that is sent to it",
        [one.event for one in signal_seen] == ["first signal"] and answer == 1
        and [one.event for one in update_seen] == ["first update"] and signal_seen[0].run_id != update_seen[0].run_id,
        f"ledger: {', '.join(one.event for one in signal_seen + update_seen)}, each in a run of its own; "
        f"the update's answer: {answer}",
    )  # fmt: skip


def start_if_missing(lab: Lab, name: str, ledger: str) -> WithStartWorkflowOperation[OnEvent, None]:
    return WithStartWorkflowOperation(
        OnEvent.run,
        Order(ledger, awaits=1),
        id=f"{lab.id}-{name}",
        task_queue=lab.task_queue,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
    )


SENDERS = 20


async def concurrent_signal_with_start(lab: Lab) -> Evidence:
    ledger, id = lab.file("race"), f"{lab.id}-race"
    handles = await asyncio.gather(
        *(
            lab.client.start_workflow(
                OnEvent.run,
                Order(ledger, awaits=SENDERS),
                id=id,
                task_queue=lab.task_queue,
                start_signal="add",
                start_signal_args=[f"signal {number}"],
            )
            for number in range(SENDERS)
        )
    )
    await asyncio.wait_for(handles[0].result(), 30)
    seen, events = reports(ledger), (await count_events(handles[0]))["WORKFLOW_EXECUTION_SIGNALED"]
    runs = {one.run_id for one in seen} | {str(handle.result_run_id) for handle in handles if handle.result_run_id}
    return holds(
        f"{SENDERS} concurrent signal-with-starts of one id make one run that has all {SENDERS} signals",
        len(runs) == 1 and sorted(one.event for one in seen) == sorted(f"signal {n}" for n in range(SENDERS))
        and events == SENDERS,
        f"{SENDERS} calls succeeded; runs: {len(runs)}; signals in the ledger: {len(seen)}, different ones: "
        f"{len(set(seen))}; signal events in its history: {events}",
    )  # fmt: skip


async def signal_nobody(lab: Lab) -> Evidence:
    handle = lab.client.get_workflow_handle(f"{lab.id}-nobody")
    try:
        await handle.signal(OnEvent.add, "lost")
        answer = None
    except RPCError as error:
        answer = error.status
    return control(
        "a plain signal to a workflow that does not exist is refused and starts none",
        answer == RPCStatusCode.NOT_FOUND and await refusal(handle) == RPCStatusCode.NOT_FOUND,
        f"the signal: {name_of(answer)}; describing the workflow: {name_of(await refusal(handle))}",
    )


async def refused_update_with_start(lab: Lab) -> Evidence:
    handle, reason = lab.client.get_workflow_handle(f"{lab.id}-refused"), "accepted"
    try:
        await lab.client.execute_update_with_start_workflow(
            OnEvent.put, "", start_workflow_operation=start_if_missing(lab, "refused", lab.file("refused"))
        )
    except WorkflowUpdateFailedError as error:
        reason = str(error.cause)
    status = None if await refusal(handle) else await status_of(handle)
    if status == WorkflowExecutionStatus.RUNNING:
        await handle.terminate("nobody asked for it")
    return limit(
        "update-with-start: an update that its validator refuses leaves the workflow started",
        reason == "an event must have a name" and status == WorkflowExecutionStatus.RUNNING,
        f"the update: {reason!r}; the workflow then: {name_of(status) if status else 'not there'}",
    )


# A message broker hands a message out again until it is acknowledged. The consumer below is what a user of
# Temporal writes: take, start a workflow under the message's own id, acknowledge. The broker is Redis where
# one is installed; else a process that stands in for it and understands the five commands used here.


def find_redis() -> str | None:
    return shutil.which("redis-server")


def serve_broker(port: int) -> None:
    """Become the broker: listens on loopback, keeps its lists in memory."""
    redis = find_redis()
    if redis:
        os.execv(redis, [redis, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
    asyncio.run(stand_in(port))


async def stand_in(port: int) -> None:
    lists: dict[str, list[str]] = defaultdict(list)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(obey(lists, line.decode().split()))

    async with await asyncio.start_server(serve, "127.0.0.1", port) as server:
        await server.serve_forever()


def obey(lists: dict[str, list[str]], words: list[str]) -> bytes:
    """One command, and the answer that Redis would give."""
    match words:
        case ["RPUSH", name, item]:
            lists[name].append(item)
            return f":{len(lists[name])}\r\n".encode()
        case ["LLEN", name]:
            return f":{len(lists[name])}\r\n".encode()
        case ["LINDEX", name, "0"]:
            return bulk(lists[name][0] if lists[name] else None)
        case ["LMOVE", source, target, "LEFT", "RIGHT"] if lists[source]:
            lists[target].append(lists[source].pop(0))
            return bulk(lists[target][-1])
        case ["LMOVE", *_]:
            return bulk(None)
        case ["LREM", name, "1", item] if item in lists[name]:
            lists[name].remove(item)
            return b":1\r\n"
        case ["LREM", *_]:
            return b":0\r\n"
    return b"-ERR unknown command\r\n"


def bulk(item: str | None) -> bytes:
    return b"$-1\r\n" if item is None else f"${len(item)}\r\n{item}\r\n".encode()


class Broker:
    """A connection to the broker."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __call__(self, *words: str) -> str:
        """Send a command. Returns the answer's text, empty when there is none."""
        self.streams = self.streams or await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        writer.write((" ".join(words) + "\r\n").encode())
        head = (await reader.readline()).decode().strip()
        if head.startswith("$"):
            size = int(head[1:])
            return (await reader.readexactly(size + 2)).decode().strip() if size >= 0 else ""
        if not head.startswith(":"):
            raise RuntimeError(f"the broker said {head!r} to {words[0]}")
        return head[1:]

    async def answers(self) -> bool:
        try:
            return await self("LLEN", "orders") != ""
        except OSError:
            return False

    def close(self) -> None:
        if self.streams:
            self.streams[1].close()


@dataclass
class Subscription:
    """What a consumer process is told. It dies once, after it has started the workflow of one message."""

    target: Target
    port: int
    topic: str
    task_queue: str
    ledger: str
    deliveries: str
    reuse: WorkflowIDReusePolicy
    dies_after: str


async def consume(given: Subscription) -> None:
    """The consumer: one workflow a message, however often the broker hands the message out."""
    client, broker = await connect(given.target), Broker(given.port)
    taken = f"{given.topic}-taken"
    while True:
        # First what an earlier consumer took and did not acknowledge.
        message = await broker("LINDEX", taken, "0")
        message = message or await broker("LMOVE", given.topic, taken, "LEFT", "RIGHT")
        if not message:
            await asyncio.sleep(0.02)
            continue
        note(given.deliveries, message)
        with contextlib.suppress(WorkflowAlreadyStartedError):  # by an earlier delivery of the same message
            await client.start_workflow(
                OnEvent.run,
                Order(given.ledger, message),
                id=f"{given.topic}-{message}",
                task_queue=given.task_queue,
                # The first run may be over by now, which alone would allow a second one.
                id_reuse_policy=given.reuse,
            )
        if message == given.dies_after and notes(given.deliveries).count(message) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        await broker("LREM", taken, "1", message)


MESSAGES = [f"order-{number}" for number in range(1, 6)]
DOUBLE = "order-3"


@dataclass
class Consumption:
    idle: tuple[int, int]  # (messages in the broker, runs) while there was no consumer
    deliveries: list[str]
    seen: list[Report]
    left: int  # messages in the broker in the end


async def consumption(lab: Lab, port: int, reuse: WorkflowIDReusePolicy) -> Consumption:
    """Five messages, of which one is handed out twice, because its consumer dies before it acknowledges."""
    topic = f"{lab.id}-{reuse.name}"
    given = Subscription(
        lab.target, port, topic, lab.task_queue, lab.file(topic), lab.file(f"{topic}-deliveries"), reuse, DOUBLE
    )
    broker = Broker(port)
    await until(broker.answers, "the broker answers")
    for message in MESSAGES:
        await broker("RPUSH", topic, message)
    await asyncio.sleep(1)  # the time in which nothing is to happen by itself
    idle = int(await broker("LLEN", topic)), len(reports(given.ledger))
    async with lab.process(consume, given) as consumer:
        await consumer.wait()
    await until(lambda: [one for one in reports(given.ledger) if one.event == DOUBLE], "the doubtful message ran")
    await lab.client.get_workflow_handle(f"{topic}-{DOUBLE}").result()
    async with lab.process(consume, given):
        await until(lambda: drained(broker, topic), "every message is acknowledged")
    left = int(await broker("LLEN", topic)) + int(await broker("LLEN", f"{topic}-taken"))
    broker.close()
    # What was started has reported before it is over: afterwards the ledger is complete.
    await asyncio.gather(*(lab.client.get_workflow_handle(f"{topic}-{one}").result() for one in MESSAGES))
    return Consumption(idle, notes(given.deliveries), reports(given.ledger), left)


async def drained(broker: Broker, topic: str) -> bool:
    return await broker("LLEN", topic) == await broker("LLEN", f"{topic}-taken") == "0"


def broker_name() -> str:
    redis = find_redis()
    if not redis:
        return "a local queue in its own process (no redis-server installed)"
    version = subprocess.run([redis, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    return f"Redis {version.split('v=')[-1].split()[0]}"


async def message_broker(lab: Lab) -> tuple[Evidence, ...]:
    port = free_port()
    async with lab.process(serve_broker, port):
        once, again = await asyncio.gather(
            consumption(lab, port, WorkflowIDReusePolicy.REJECT_DUPLICATE),
            consumption(lab, port, WorkflowIDReusePolicy.ALLOW_DUPLICATE),
        )
    twice = Counter(MESSAGES) + Counter([DOUBLE])
    runs = Counter(one.event for one in once.seen)
    consumer = len([line for line in inspect.getsource(consume).splitlines() if line.strip()])
    named = [name for name in dir(Client) if any(part in name for part in ("consume", "subscribe", "kafka", "queue"))]
    return (
        holds(
            "messages of a broker start workflows; one that is delivered again makes no second run",
            Counter(once.deliveries) == twice and runs == Counter(MESSAGES) and len(set(once.seen)) == 5
            and once.left == 0,
            f"{await asyncio.to_thread(broker_name)}; SIGKILL between start and acknowledgement of {DOUBLE}: "
            f"{len(once.deliveries)} deliveries, {len(once.seen)} runs (id from the message, REJECT_DUPLICATE); "
            f"left in the broker: {once.left}",
        ),
        control(
            "the same redelivery without REJECT_DUPLICATE makes a second run when the first one is over",
            Counter(again.deliveries) == twice and Counter(one.event for one in again.seen) == twice
            and len({one.run_id for one in again.seen}) == 6,
            f"{len(again.deliveries)} deliveries, {len(again.seen)} runs",
        ),
        limit(
            "a message broker starts nothing by itself: the consumer is the user's to write and to run",
            once.idle == again.idle == (5, 0) and not named,
            f"1 s with server and workers but no consumer: {once.idle[0]} messages wait, {once.idle[1]} runs; "
            f"the consumer here has {consumer} lines; methods of the client that take messages from a broker: "
            f"{', '.join(named) or 'none'}",
        ),
    )  # fmt: skip


@SG.item("SG-03", "Event triggers")
async def event_triggers(lab: Lab) -> AsyncIterator[Evidence]:
    """Workflows are started in seven ways; each run reports to a ledger by which event it was started."""
    async with lab.worker([OnEvent], [record]):
        brokered = asyncio.create_task(message_broker(lab))
        parts = (
            signal_nobody, by_message, refused_update_with_start, concurrent_signal_with_start, by_calls, by_clock
        )  # fmt: skip
        try:
            async for evidence in side_by_side(*(part(lab) for part in parts)):
                yield evidence
            for evidence in await brokered:
                yield evidence
        finally:
            brokered.cancel()
    yield native(
        "starting by call, clock, signal and update is built in (a broker's messages are not, see the limit)",
        Client.start_workflow,
        (Client.start_workflow, "id_reuse_policy"),
        (Client.start_workflow, "start_signal"),
        (Client.start_workflow, "cron_schedule"),
        Client.create_schedule,
        (ScheduleSpec, "intervals"),
        (ScheduleState, "remaining_actions"),
        Client.execute_update_with_start_workflow,
        (WithStartWorkflowOperation, "id_conflict_policy"),
    )


# SG-04 Query -----------------------------------------------------------------------------------------
# A query reads the variables of a workflow, running or ended, and leaves no trace in its history. A worker
# must be there to answer it.


@dataclass
class Stage:
    name: str
    ledger: str


@activity.defn
async def enter(stage: Stage) -> str:
    note(stage.ledger, stage.name)
    return stage.name


@workflow.defn
class Journey:
    """Goes through stages as it is told to, and counts, wrongly, how often it was peeked at."""

    def __init__(self) -> None:
        self.wanted: list[str] = []
        self.entered: list[str] = []
        self.peeked = 0

    @workflow.run
    async def run(self, ledger: str) -> list[str]:
        self.watch = asyncio.create_task(self.watch_the_sky())
        while "home" not in self.entered:
            await workflow.wait_condition(lambda: len(self.wanted) > len(self.entered))
            stage = Stage(self.wanted[len(self.entered)], ledger)
            self.entered.append(await workflow.execute_activity(enter, stage, start_to_close_timeout=PATIENT))
        return self.entered

    async def watch_the_sky(self) -> None:
        await workflow.wait_condition(lambda: "meteor" in self.wanted)

    @workflow.signal
    def go(self, stage: str) -> None:
        self.wanted.append(stage)

    @workflow.query
    def stages(self) -> list[str]:
        return self.entered

    @workflow.query
    def told(self) -> int:
        return len(self.wanted)

    @workflow.query
    def peek(self) -> int:
        """What a query handler must not do: change the workflow."""
        self.peeked += 1
        return self.peeked

    @workflow.query
    def act(self) -> None:
        """What a query handler cannot do: act."""
        workflow.start_activity(enter, Stage("by query", ""), start_to_close_timeout=PATIENT)


async def travel(lab: Lab, name: str, *stages: str) -> tuple[Handle, str]:
    """Start a Journey and send it through the stages. Returns its handle and its ledger."""
    ledger = lab.file(name)
    handle = await lab.client.start_workflow(
        Journey.run, ledger, id=f"{lab.id}-{name}", task_queue=f"{lab.id}-{name}", task_timeout=SOON
    )
    for stage in stages:
        await handle.signal(Journey.go, stage)
    return handle, ledger


def guide(lab: Lab, handle: Handle) -> Any:
    """A worker for the one journey."""
    return lab.worker([Journey], [enter], task_queue=handle.id)


async def arrived(handle: Handle, ledger: str, stages: int) -> bool:
    """So many stages are entered, by the ledger and by the history, and the workflow waits again."""
    count = await count_events(handle)
    ended = sum(count[f"WORKFLOW_TASK_{how}"] for how in ("COMPLETED", "TIMED_OUT", "FAILED"))
    idle = ended == count["WORKFLOW_TASK_SCHEDULED"]
    return len(notes(ledger)) >= stages <= count["ACTIVITY_TASK_COMPLETED"] and idle


async def read_while_running(lab: Lab) -> tuple[Evidence, ...]:
    handle, ledger = await travel(lab, "running", "forest")
    answers: list[list[str]] = []
    ledgers: list[list[str]] = []
    async with guide(lab, handle):
        for stage in ("river", "hill"):
            await until(lambda: arrived(handle, ledger, len(ledgers) + 1), "the stage is entered")
            answers.append(await handle.query(Journey.stages))
            ledgers.append(notes(ledger))
            await handle.signal(Journey.go, stage)
        await until(lambda: arrived(handle, ledger, 3), "the third stage is entered")
        before = await history_of(handle)
        answers.append(await handle.query(Journey.stages))
        ledgers.append(notes(ledger))
        stack = str(await handle.query("__stack_trace"))
        status, after = await status_of(handle), await history_of(handle)
        by_cli = await lab.cli("workflow", "stack", "--workflow-id", handle.id)
        await handle.terminate()
    state = works(
        "a query reads a running workflow's variables as they are, and writes nothing into its history",
        answers == ledgers == [["forest"], ["forest", "river"], ["forest", "river", "hill"]]
        and status == WorkflowExecutionStatus.RUNNING and before == after,
        f"answers as it went on: {'; '.join(' '.join(one) for one in answers)} (the ledger says the same: "
        f"{answers == ledgers}); status {name_of(status)}; events before and after: {len(before)}, {len(after)}",
    )  # fmt: skip
    own, main = (waiting_line(method) for method in (Journey.watch_the_sky, Journey.run))
    trace = works(
        "the stack-trace query, which every workflow answers, shows the line at which a task of its own waits",
        own in stack and "in watch_the_sky" in stack and "watch_the_sky" in by_cli.out,
        f"for a task made by asyncio.create_task: {own if own in stack else 'no line'!r}; "
        f"the temporal command line shows it too: {'watch_the_sky' in by_cli.out}",
    )
    return (
        state,
        trace,
        limit(
            "the stack trace does not show where the run method itself waits: it ends at the SDK's frame above it",
            "name='run (workflow: Journey" in stack and main not in stack and "in run\n    await" not in stack,
            f"run waits at {main!r}; shown for it: {shown_for(stack, 'run (workflow')}",
        ),
    )


def waiting_line(method: Callable[..., Any]) -> str:
    """The line of the method's source at which it waits for a condition."""
    return next(line.strip() for line in inspect.getsource(method).splitlines() if "wait_condition" in line)


def shown_for(stack: str, task: str) -> str:
    """The frames that a stack trace shows for one task."""
    lines = stack.split(f"name='{task}", 1)[-1].split("Stack for")[0].splitlines()[1:]
    return "; ".join(line.split(", in ")[-1].strip() for line in lines if line.strip()) or "nothing"


async def reads_what_was_sent(lab: Lab) -> Evidence:
    handle, _ = await travel(lab, "fresh")
    answers = []
    async with guide(lab, handle):
        for number in range(20):
            await handle.signal(Journey.go, f"stage {number}")
            answers.append(await handle.query(Journey.told))
        await handle.terminate()
    return holds(
        "a query sees every signal that was acknowledged before it was sent",
        answers == list(range(1, 21)),
        f"20 times a signal, then at once a query for how many there were: {answers}",
    )


async def closed_workflows(lab: Lab) -> tuple[Evidence, ...]:
    """One journey has come home, another was terminated. A worker that never saw them answers."""
    home, ledger = await travel(lab, "closed", "forest", "home")
    lost, lost_ledger = await travel(lab, "lost", "forest")
    async with lab.worker_process([Journey], [enter], task_queue=home.id) as first:
        await home.result()
    async with guide(lab, lost):
        await until(lambda: arrived(lost, lost_ledger, 1), "the stage is entered")
        running = await answered(lost, QueryRejectCondition.NOT_OPEN)
        await lost.terminate()
    async with guide(lab, home), guide(lab, lost):
        answer = await home.query(Journey.stages)
        conditions = {
            "completed, NOT_OPEN": await answered(home, QueryRejectCondition.NOT_OPEN),
            "completed, NOT_COMPLETED_CLEANLY": await answered(home, QueryRejectCondition.NOT_COMPLETED_CLEANLY),
            "terminated, NOT_COMPLETED_CLEANLY": await answered(lost, QueryRejectCondition.NOT_COMPLETED_CLEANLY),
            "terminated, no condition": await answered(lost, None),
            "running, NOT_OPEN": running,
        }
    expected = ["rejected: COMPLETED", "forest home", "rejected: TERMINATED", "forest", "forest"]
    closed = holds(
        "after its completion a workflow answers queries as before, also by a worker that never ran it",
        answer == notes(ledger) == ["forest", "home"] and await status_of(home) == WorkflowExecutionStatus.COMPLETED,
        f"status COMPLETED, worker process {first.pid} that ran it is gone; another one answers: {' '.join(answer)}",
    )
    return closed, holds(
        "a reject condition refuses the query where the workflow is not open, or did not end well",
        list(conditions.values()) == expected,
        "; ".join(f"{name}: {answer}" for name, answer in conditions.items()),
    )


async def answered(handle: Handle, condition: QueryRejectCondition | None) -> str:
    try:
        return " ".join(await handle.query(Journey.stages, reject_condition=condition))
    except WorkflowQueryRejectedError as error:
        return f"rejected: {name_of(error.status)}"


async def failing_query(handle: Handle, name: str) -> str:
    """The message with which a query fails, or "answered"."""
    try:
        await handle.query(name)
    except WorkflowQueryFailedError as error:
        return error.message
    return "answered"


async def refused_queries(lab: Lab) -> tuple[Evidence, ...]:
    handle, ledger = await travel(lab, "refused", "forest")
    async with guide(lab, handle):
        await until(lambda: arrived(handle, ledger, 1), "the stage is entered")
        before = await history_of(handle)
        unknown, acting = await failing_query(handle, "stage"), await failing_query(handle, "act")
        after, answer = await history_of(handle), await handle.query(Journey.stages)
        await handle.terminate()
    known = ("stages", "told", "peek", "act", "__stack_trace")
    named = holds(
        "an unknown query fails and names the known ones",
        "'stage'" in unknown and all(name in unknown.split("known queries:")[-1].split("]")[0] for name in known),
        f"query 'stage': {unknown}",
    )
    return named, holds(
        "a query handler that starts an activity is refused, nothing is run, and the workflow goes on",
        "read-only" in acting.lower() and before == after and notes(ledger) == answer == ["forest"],
        f"{acting}; events before and after: {len(before)}, {len(after)}; activities run: {' '.join(notes(ledger))}",
    )


async def without_worker(lab: Lab) -> Evidence:
    handle, ledger = await travel(lab, "deserted", "forest")
    async with guide(lab, handle):
        await until(lambda: arrived(handle, ledger, 1), "the stage is entered")
    begun = time.monotonic()
    try:
        alone = str(await handle.query(Journey.stages, rpc_timeout=timedelta(seconds=1.5)))
    except RPCError as error:
        alone = error.status.name
    seconds = time.monotonic() - begun
    async with guide(lab, handle):
        answer = await handle.query(Journey.stages)
        await handle.terminate()
    return control(
        "without a worker nobody answers: the query times out, it does not hang",
        alone in ("DEADLINE_EXCEEDED", "CANCELLED") and 1.4 <= seconds < 15 and answer == ["forest"],
        f"{alone} after {seconds:.1f} s (rpc_timeout 1.5 s); with a worker again: {' '.join(answer)}",
    )


async def changing_query(lab: Lab) -> Evidence:
    handle, ledger = await travel(lab, "changed", "forest")
    peeks = []
    for _ in range(2):
        async with guide(lab, handle):
            await until(lambda: arrived(handle, ledger, 1), "the stage is entered")
            peeks.append([await handle.query(Journey.peek) for _ in range(4)])
    await handle.terminate()
    return limit(
        "a query handler that changes the workflow's variables is not stopped, and the change is in no history",
        max(peeks[0]) > 1 and peeks[1][0] == 1,
        f"a counter raised by a query: {' '.join(map(str, peeks[0]))}; after the worker was replaced: "
        f"{' '.join(map(str, peeks[1]))}",
    )


@SG.item("SG-04", "Query")
async def query(lab: Lab) -> AsyncIterator[Evidence]:
    """Journeys are asked where they are: under way, ended, deserted; a ledger knows where they have been."""
    single = (without_worker, reads_what_was_sent, changing_query)
    several = (read_while_running, closed_workflows, refused_queries)
    async for evidence in side_by_side(*(part(lab) for part in (*single, *several))):
        yield evidence
    yield native(
        "a query is a method of the workflow, and the SDK adds the stack trace",
        workflow.query,
        WorkflowHandle.query,
        (WorkflowHandle.query, "reject_condition"),
        QueryRejectCondition.NOT_OPEN,
        QueryRejectCondition.NOT_COMPLETED_CLEANLY,
        "temporal workflow stack",
    )


if __name__ == "__main__":
    run(SG)
