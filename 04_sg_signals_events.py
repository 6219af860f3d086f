"""SG: signals and events - how messages reach a workflow, wake it, start it, and read it.

A workflow is an addressee: it has an id, and whoever knows the id can send it something. The server writes
each message into the workflow's history before it tells the sender that it was taken, so that neither a
missing worker nor a crash loses it. The four items ask what that promises for signals, how a workflow
waits for something, what can start one, and how its state is read from outside.
"""

from common import (
    Category,
    Evidence,
    NotRun,
    Spread,
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
    one_of,
    piece,
    side_by_side,
    slowness,
    works,
)
from harness.systems import running
from lab import (
    DELETES_SOON,
    Books,
    Handle,
    Lab,
    Server,
    count_events,
    end,
    ended,
    event_times,
    failed_tasks,
    free_port,
    history_of,
    hold,
    http,
    name_of,
    note,
    notes,
    open_gate,
    outline,
    overheard,
    pace,
    refusal,
    repeated,
    run,
    said,
    soon,
    status_of,
    until,
    waits,
)

import asyncio
import contextlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import count, pairwise
from typing import Any, Protocol

from temporalio import activity, workflow
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest
from temporalio.client import (
    Client,
    Interceptor,
    OutboundInterceptor,
    Schedule,
    ScheduleActionExecutionStartWorkflow,
    ScheduleActionResult,
    ScheduleActionStartWorkflow,
    ScheduleHandle,
    ScheduleIntervalSpec,
    ScheduleSpec,
    ScheduleState,
    StartWorkflowInput,
    WithStartWorkflowOperation,
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
                handle: workflow.ExternalWorkflowHandle[Any] = workflow.get_external_workflow_handle(account)
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
    """Where accounts are tried, on whichever server, and what came to them."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.books = lab, Books(lab.file("books.sqlite"))
        self.teller = Teller(self.books)

    async def open(self, name: str, kind: Any = Account, **options: Any) -> Handle:
        return await self.lab.start(kind.run, Standing(f"{self.lab.id}-{name}"), name=name, **options)

    def parts(self, *workflows: type, **options: Any) -> dict[str, Any]:
        """The arguments of a worker for accounts. A call that a kill has cut off is given up soon."""
        shortened = {"book": {"start_to_close_timeout": soon(2)}}
        kinds = [Account, *workflows]
        return {"workflows": kinds, "activities": [self.teller.book], "shortened": shortened, **options}

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


def missing(numbers: Sequence[int], found: Sequence[int]) -> list[int]:
    return sorted(set(numbers) - set(found))


async def wakes_a_workflow(branch: Branch) -> list[Evidence]:
    handle = await branch.open("wake")
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
    again = holds(
        "a signal that its sender sends again comes twice; by the key in it, it counts once",
        received=equal(branch.received(handle), [7, 7]),
        booked=equal(branch.booked(handle), [7]),
        result=equal(result, 2),
    )
    return [woken, again]


async def by_another_workflow(branch: Branch) -> list[Evidence]:
    """A payroll signals two accounts and a liquidator cancels two; one of each two does not exist."""
    lab, handle = branch.lab, await branch.open("external")
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
    missed = holds(
        "to one that does not exist the sender's code gets an error of a type of its own, and goes on; none is started",
        not_signalled=equal(unpaid.result, [nobody]),
        not_cancelled=equal(unknown.result, [f"{nobody}: ExternalWorkflowExecutionNotFound"]),
        senders_ended=equal([unpaid.status, unknown.status], ["COMPLETED", "COMPLETED"]),
        describing_it=equal(await refusal(lab.client.get_workflow_handle(nobody)), "NOT_FOUND"),
        in_the_senders_histories=equal(
            [await failed_in(one) for one in (payroll, liquidator)],
            ["SignalExternalWorkflowExecutionFailed", "RequestCancelExternalWorkflowExecutionFailed"],
        ),
    )
    return [found, missed]


async def failed_in(handle: Handle) -> str:
    """The events of a history that tell of a failure, a line each."""
    return "\n".join(line for line in outline(await handle.fetch_history()).splitlines() if line.endswith("Failed"))


async def before_any_worker(branch: Branch) -> Evidence:
    queue = f"{branch.lab.id}-early"
    handle = await branch.open("early", task_queue=queue)
    numbers = list(range(1, 21))
    for number in numbers:
        await put(handle, number)
    tasks = await count_events(handle)
    async with branch.lab.worker(**branch.parts(task_queue=queue)):
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


CROWDED = f"{CROWD} concurrent signals to one workflow: none lost, none twice, handled in the order of the history"


@piece(holds(CROWDED))
async def concurrent_signals(branch: Branch) -> Evidence:
    """Nobody waits for the answer to one signal before sending the next: then no order of sending is promised."""
    handle, numbers = await branch.open("crowd"), range(1, CROWD + 1)
    begun = time.monotonic()
    await asyncio.gather(*(put(handle, number) for number in numbers))
    sent = time.monotonic() - begun
    await close(handle)
    done, received, written = time.monotonic() - begun, branch.received(handle), await recorded(handle)
    return holds(
        CROWDED,
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


async def two_senders(branch: Branch) -> Evidence:
    """Each sends one signal after the other, and knows nothing of the other one."""
    handle = await branch.open("senders")
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
        "in_the_order_sent": equal(received == sorted(received), True),
        "never_sent": equal(missing(received, stream.acknowledged + stream.refused), []),
        "booked_as_received": equal(branch.booked(handle) == received, True),
        "without_an_answer": len(stream.refused),
    }


MOVED = "a stream of signals while the run continues as new five times: each acknowledged one comes once, in order"
LEFT_BEHIND = "a workflow that does not take along what is waiting loses what was acknowledged when a new run begins"
KILLED = "worker and server are killed in mid-stream: every acknowledged signal is there once, in the order sent"

# A setting that no user has: a new run is suggested after so few events.
SHORT = {"limit.historyCount.suggestContinueAsNew": "40"}  # 4096
RUNS = 6


async def through_new_runs(branch: Branch, server: Server) -> list[Evidence]:
    """A stream flows while the account continues as new; two others have their deposits before they begin."""
    handle = await branch.open("moving", server=server)
    piled = [await branch.open(kind.__name__, kind, server=server) for kind in (Account, Forgetful)]
    numbers = list(range(1, AT_ONCE + 21))
    for one in piled:
        await asyncio.gather(*(put(one, number) for number in numbers))
        await one.signal(Account.close)
    async with (
        Stream(lambda number: put(handle, number)) as stream,
        branch.lab.worker(**branch.parts(Forgetful, server=server)),
    ):
        await until(lambda: stream.has(1) and branch.runs(handle) >= RUNS, f"{RUNS} runs have booked something")
        await stream.end()
        await close(handle)
        for one in piled:
            await ended(one)
    kept, forgotten = (branch.received(one) for one in piled)
    events = {"events_after_which_a_new_run_is_suggested": 40, "instead_of": 4096}
    return [
        holds(
            MOVED,
            **as_sent(branch, handle, stream),
            runs=at_least(branch.runs(handle), RUNS),
            of_another_that_waited_already=equal(sorted(kept) == numbers, True),
            runs_of_theirs=at_least(branch.runs(piled[0]), 2),
            **events,
        ),
        control(
            LEFT_BEHIND,
            sent=len(numbers),
            received=equal(len(forgotten), AT_ONCE),
            lost=equal(len(missing(numbers, forgotten)), len(numbers) - AT_ONCE),
            **events,
        ),
    ]


async def kill_worker_and_server(branch: Branch, server: Server) -> Evidence:
    """While a stream of signals flows, first the worker is killed and replaced, then the server."""
    queue = f"{branch.lab.id}-kills"
    handle = await branch.open("kills", server=server, task_queue=queue, task_timeout=soon(2))
    worker = partial(branch.lab.worker_process, **branch.parts(server=server, task_queue=queue))
    async with Stream(lambda number: put(handle, number)) as stream:
        async with worker() as victim:
            await until(lambda: branch.booked(handle), "the first signal is booked")
            first = await stream.more(30)
            await victim.kill()
            second = await stream.more(30)
        async with worker():
            third = await stream.more(30)
            server.kill()
            down = await server.start()
            await stream.more(30)
            await stream.end()
            await close(handle)
    return holds(
        KILLED,
        **as_sent(branch, handle, stream),
        acknowledged_when_the_worker_was_killed=first,
        when_a_new_one_came=second,
        when_the_server_was_killed=third,
        server_away=figure(down, "s"),
    )


@piece(holds(MOVED), control(LEFT_BEHIND), holds(KILLED))
async def on_a_server_of_its_own(branch: Branch) -> list[Evidence]:
    async with branch.lab.private_server(file=True, settings=SHORT) as server:
        moved = await through_new_runs(branch, server)
        return [*moved, await kill_worker_and_server(branch, server)]


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


async def kill_plain_program(branch: Branch) -> Evidence:
    lab, port, path = branch.lab, free_port(), branch.lab.file("plain.sqlite")
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
        acknowledged_when_it_was_killed=len(before),
        of_these_booked=equal([number for number in received if number in before], []),
        booked=at_least(len(received), 1),
    )


async def undecodable(branch: Branch) -> Evidence:
    """The handler takes a deposit. The server does not look into payloads and takes anything."""
    handle = await branch.open("wrong")
    with overheard("temporalio.worker._workflow_instance") as records:
        await put(handle, 1)
        await handle.signal("deposit", "two")
        await put(handle, 3)
        result = await close(handle)
    # By the words and not by the run's id, which SDK 1.22 does not tell with them. No other signal here is like that.
    told = [said for one in records if "Failed deserializing" in (said := one.getMessage())]
    signals = outline(await handle.fetch_history()).splitlines().count("WorkflowExecutionSignaled deposit")
    return limit(
        "a signal whose argument the handler cannot decode is dropped, though its sender saw success",
        signals_accepted_and_recorded=equal(signals, 3),
        received=equal(branch.received(handle), [1, 3]),
        result=equal(result, 2),
        failed_workflow_tasks=equal(await failed_tasks(handle), []),
        the_workers_log=contains(
            (told or ["nothing"])[0].split(" on workflow")[0].split(", dropping")[0], "Failed deserializing signal"
        ),
    )


@SG.item("SG-01", "External signals")
async def external_signals(lab: Lab) -> AsyncIterator[Evidence]:
    """Signals are sent early, all at once, by workflows and through kills; an account outside keeps what arrived."""
    branch = Branch(lab)
    parts = (
        kill_plain_program, wakes_a_workflow, by_another_workflow, before_any_worker, two_senders, undecodable,
        on_a_server_of_its_own,
    )  # fmt: skip
    async with lab.worker(**branch.parts(Payroll, Liquidator)):
        async for evidence in side_by_side(*(part(branch) for part in parts)):
            yield evidence
        for evidence in await concurrent_signals(branch):
            yield evidence
    yield native(
        "a signal is a method of the workflow; nothing was built to keep, order or deliver it",
        workflow.signal,
        workflow.wait_condition,
        WorkflowHandle.signal,
        workflow.get_external_workflow_handle,
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
class Variant(Budget):
    """The controls: the same budget with one thing left out."""

    @workflow.init
    def __init__(self, means: Means, without: str = "") -> None:
        super().__init__(means)
        self.without = without
        if without == "the lock":
            self.turn = contextlib.nullcontext()

    @workflow.run
    async def run(self, means: Means, without: str = "") -> Means:
        if without != "waiting for handlers":
            return await super().run(means)
        await workflow.wait_condition(lambda: self.means.closed)
        return self.means

    def is_long(self) -> bool:
        return self.without != "continuing" and super().is_long()


class Till:
    """Where purchases and budgets are tried: every payment goes into one shop's books."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.shop = lab, Shop(lab.file("shop.sqlite"))
        self.buyer = Buyer(self.shop)
        self.held = [
            *(hold("ask", self.lab.gate(seller), seller=seller).of(self.id_of("quotes")) for seller in SELLERS),
            *(hold("pay", self.lab.gate(name)).of(self.id_of(name)) for name in HELD),
        ]

    def id_of(self, name: str) -> str:
        return f"{self.lab.id}-{name}"

    def parts(self, *workflows: type, **options: Any) -> dict[str, Any]:
        """The arguments of a worker for budgets."""
        activities = [self.buyer.ask, self.buyer.pay]
        return {"workflows": [Budget, *workflows], "activities": activities, "faults": self.held, **options}

    async def purchase(self, name: str, seconds: float | None, sellers: Sequence[str] = ("bob",)) -> Handle:
        return await self.lab.start(Purchase.run, Wish("lamp", list(sellers), seconds), name=name)

    async def budget(self, name: str, left: int, without: str = "", **options: Any) -> Handle:
        """Start a budget, or the variant that leaves something out."""
        if without:
            return await self.lab.start(Variant.run, Means(left), without, name=name, **options)
        return await self.lab.start(Budget.run, Means(left), name=name, **options)

    def bill(self, handle: Handle, amount: int, name: object = "") -> Expense:
        return Expense(f"{handle.id}/{name or amount}", amount)

    def paid(self, handle: Handle) -> list[int]:
        return self.shop.amounts(f"{handle.id}/")

    def begun(self, handle: Handle, activity: str = "pay") -> list[str]:
        calls = [call.argument for call in self.lab.calls(handle.id, activity=activity)]
        return [one.get("seller", "") or one["number"].rpartition("/")[2] for one in calls]


SELLERS = ("anna", "bob", "carl")
# Budgets whose payments wait for a gate.
HELD = ("hasty", "polite", "pair", "locked", "unlocked", "waiting", "queued", "killed")


async def dismiss(handle: Handle) -> Means:
    """Close a budget. Returns the means it ended with."""
    await handle.signal(Budget.close)
    means: Means = (await ended(handle)).result
    return means


async def waits_for_signal(till: Till) -> Evidence:
    handles = [await till.purchase(f"approved-{seconds}", seconds) for seconds in (None, 3600)]
    for handle in handles:
        await until(lambda: waits(handle, 1), "it waits for its approval")  # noqa: B023
    before = [await status_of(handle) for handle in handles]
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


async def never_set(till: Till) -> list[Evidence]:
    """Nobody ever approves. Both purchases wait for the same condition; one of them has a timeout."""
    without = await till.purchase("endless", None)
    await until(lambda: waits(without, 1), "it waits for its approval")
    bounded = await till.purchase("bounded", 1)
    how = await ended(bounded)
    status, history = await status_of(without), outline(await without.fetch_history())
    events = await history_of(bounded)
    await end(without)
    waited = (event_times(events, "TIMER_FIRED")[0] - event_times(events, "TIMER_STARTED")[0]).total_seconds()
    expired = works(
        "a condition that is never set: the timeout ends the wait, not before its time",
        result=equal(how.result, "expired"),
        timeout=figure(1, "s"),
        waited_by_the_servers_clock=at_least(figure(waited, "s"), 1),
    )
    hangs = control(
        "the same wait without a timeout hangs",
        when_the_one_with_a_timeout_had_ended=equal(status, "RUNNING"),
        timers_in_its_history=equal(history.count("Timer"), 0),
    )
    return [expired, hangs]


async def wait_on_many(till: Till) -> Evidence:
    handle = await till.purchase("quotes", None, SELLERS)
    await until(lambda: len(till.begun(handle, "ask")) >= 3, "all three are asked")
    early = await handle.query(Purchase.seen)
    open_gate(till.lab.gate("bob"))
    await until(lambda: waits(handle, 1, under_way=2), "the first answer is there")
    first, completed = await handle.query(Purchase.seen), (await count_events(handle))["ACTIVITY_TASK_COMPLETED"]
    for seller in ("carl", "anna"):
        open_gate(till.lab.gate(seller))
    await until(lambda: waits(handle, 3), "every answer is there")
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


async def validated_updates(till: Till) -> Evidence:
    handle = await till.budget("budget", 100)
    first = await handle.execute_update(Budget.spend, till.bill(handle, 30))
    # On a busy machine an update may make workflow tasks of its own, refused or not: outline() leaves them out.
    before = outline(await handle.fetch_history())
    refused = [
        await said(handle.execute_update(Budget.spend, till.bill(handle, amount))) for amount in (71, 1000, 0, -5, 71)
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


async def accepted_too_early(till: Till) -> Evidence:
    """Two updates want seventy of a hundred. The second one is accepted while the first one is being paid."""
    handle = await till.budget("pair", 100)
    one = await accept(handle, till.bill(handle, 70, "one"))
    await until(lambda: till.begun(handle), "the first one is being paid")
    other = await accept(handle, till.bill(handle, 70, "other"))
    open_gate(till.lab.gate("pair"))
    answers = [await said(update.result()) for update in (one, other)]
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


async def end_during_update(till: Till, name: str, without: str = "") -> tuple[str, list[str]]:
    """End a budget while it handles an update. Returns (what the sender got, what the worker warned of)."""
    with overheard("py.warnings") as records:
        handle = await till.budget(name, 100, without)
        update = await accept(handle, till.bill(handle, 30))
        await until(lambda: till.begun(handle), "the update is being handled")
        await handle.signal(Budget.close)
        await until(lambda: has_heard(handle), "the workflow has heard that it is to end")
        open_gate(till.lab.gate(name))
        try:
            answer = str(await update.result())
        except WorkflowUpdateFailedError as error:
            cause = error.cause
            answer = str(cause.type if isinstance(cause, ApplicationError) else cause)
        await ended(handle)
    return answer, [one.getMessage() for one in records if f'"id": "{till.id_of(name)}/' in one.getMessage()]


async def has_heard(handle: Handle) -> bool:
    """A workflow task was completed after the signal came."""
    _, signalled, after = outline(await handle.fetch_history(), without="").partition("WorkflowExecutionSignaled")
    return bool(signalled) and "WorkflowTaskCompleted" in after


async def unfinished_handlers(till: Till) -> Evidence:
    (hasty, warned), (polite, silent) = await asyncio.gather(
        end_during_update(till, "hasty", without="waiting for handlers"), end_during_update(till, "polite")
    )
    warning = (warned or ["of nothing"])[0].split(": ", 1)[-1].split(".")[0]
    return holds(
        "ending with an unfinished handler is noticed by worker and sender; all_handlers_finished waits for it",
        ended_at_once=equal(hasty, "AcceptedUpdateCompletedWorkflow"),
        the_worker_warned=contains(warning, "TMPRL1102"),
        ended_after_all_handlers=equal(polite, "70"),
        warnings_then=equal(silent, []),
    )


TOGETHER = 10


async def all_at_a_time(till: Till, name: str, begin: int, without: str = "") -> tuple[int, list[str], int]:
    """Spend one in each of ten updates at a time, and let no payment through until so many have begun.

    Returns (how many payments had begun when all updates were accepted, and all in the end, how much was spent).
    """
    handle = await till.budget(name, 100, without)
    updates = [await accept(handle, till.bill(handle, 1, number)) for number in range(1, TOGETHER + 1)]
    await until(lambda: len(till.begun(handle)) >= begin, "payments have begun")
    begun = len(till.begun(handle))
    open_gate(till.lab.gate(name))
    await asyncio.gather(*(update.result() for update in updates))
    return begun, till.begun(handle), 100 - (await dismiss(handle)).left


async def locked_handlers(till: Till) -> list[Evidence]:
    (one, every, spent), (many, mixed, fewer) = await asyncio.gather(
        all_at_a_time(till, "locked", 1), all_at_a_time(till, "unlocked", TOGETHER, without="the lock")
    )
    locked = holds(
        "async handlers under one asyncio.Lock take turns, and no change is lost",
        updates_that_spend_1_each=TOGETHER,
        payments_begun_while_all_are_accepted=equal(one, 1),
        payments_in_the_end=equal(len(every), TOGETHER),
        spent=equal(spent, TOGETHER),
    )
    unlocked = control(
        "the same handlers without the lock overlap and lose changes",
        updates_that_spend_1_each=TOGETHER,
        payments_begun_while_all_are_accepted=equal(many, TOGETHER),
        payments_in_the_end=equal(len(mixed), TOGETHER),
        spent=at_most(fewer, TOGETHER - 1),
    )
    return [locked, unlocked]


MANY = 30


async def many_at_a_time(till: Till) -> list[Evidence]:
    """Thirty updates come while no payment gets through: some that wait for it, and some that only queue."""
    waiting, queued = await till.budget("waiting", 1000), await till.budget("queued", 1000)
    # A client with the defaults sends again for ten seconds what is refused like this.
    impatient = await connect(till.lab.target, retry_config=RetryConfig(max_retries=1, max_elapsed_time_millis=1))
    direct = impatient.get_workflow_handle(waiting.id)
    answers = [await said(taken(direct, till.bill(waiting, 1, number))) for number in range(1, MANY + 1)]
    accepted = (await count_events(waiting))["WORKFLOW_EXECUTION_UPDATE_ACCEPTED"]
    orders = [till.bill(queued, 1, number) for number in range(1, MANY + 1)]
    places = await asyncio.gather(*(queued.execute_update(Budget.order, order) for order in orders))
    paid = till.paid(queued)
    for name in ("waiting", "queued"):
        open_gate(till.lab.gate(name))
    spent = [1000 - (await dismiss(handle)).left for handle in (waiting, queued)]
    late = await said(taken(direct, till.bill(waiting, 1, "late")))
    return [
        limit(
            "a run takes only so many updates at a time: while these wait for something, others are refused",
            sent=MANY,
            accepted=at_most(accepted, MANY - 1),
            refused=at_least(len([answer for answer in answers if answer.startswith("RESOURCE_EXHAUSTED")]), 1),
            answers=sorted(set(answers)),
            done=spent[0],
            one_sent_again_after_the_end=late,
        ),
        holds(
            "updates that only join a queue do not hold their places: as many at once are all answered, and then done",
            sent_at_once=MANY,
            places_given=equal(sorted(places) == list(range(1, MANY + 1)), True),
            paid_by_then=equal(paid, []),
            done=equal(spent[1], MANY),
            done_twice=equal(repeated(till.begun(queued)), []),
        ),
    ]


async def taken(handle: Handle, expense: Expense) -> str:
    await accept(handle, expense)
    return "accepted"


SO_MANY_UPDATES = "a run takes only so many updates in all, and then refuses every one"
CONTINUED = "a workflow that continues as new when it is suggested takes more: each update is answered, and done once"
SO_MANY_SIGNALS = "a run takes only so many signals, and then refuses every one, also that which would end it"
OUTLIVED = "an update is accepted, worker and server are killed: a client that never saw it gets its answer by its id"

# Settings that no user has, so that the limits are met here after few messages.
LOWERED = {
    "history.maxTotalUpdates": "40",  # 2000
    "history.maxTotalUpdates.suggestContinueAsNewThreshold": "0.5",  # 0.9
    "history.maximumSignalsPerExecution": "20",  # 10000
}
UPDATES = 60


async def many_in_all(till: Till, server: Server) -> list[Evidence]:
    """Updates are sent one after the other, to a budget that continues as new and to one that does not."""
    staying = await till.budget("staying", 1000, "continuing", server=server)
    moving = await till.budget("moving", 1000, server=server)
    answers = []
    for number in range(1, UPDATES + 1):
        answers.append(await said(staying.execute_update(Budget.order, till.bill(staying, 1, number))))
        if not answers[-1].isdecimal():
            break
    orders = [till.bill(moving, 1, number) for number in range(1, UPDATES + 1)]
    places = [await said(moving.execute_update(Budget.order, order)) for order in orders]
    spent = [1000 - (await dismiss(handle)).left for handle in (staying, moving)]
    runs = len({call.run for call in till.lab.calls(moving.id)})
    lowered = "40 updates, and a new run is suggested after half of them, instead of 2000 and nine tenths"
    return [
        limit(
            SO_MANY_UPDATES,
            server_set_to=lowered,
            answered=equal(len(answers) - 1, 40),
            then=contains(answers[-1], "FAILED_PRECONDITION", "total number"),
            done=equal(spent[0], 40),
        ),
        holds(
            CONTINUED,
            server_set_to=lowered,
            answered=equal(sum(place.isdecimal() for place in places), UPDATES),
            done=equal(spent[1], UPDATES),
            done_twice=equal(repeated(till.begun(moving)), []),
            runs=at_least(runs, UPDATES // 40 + 1),
        ),
    ]


async def many_signals(till: Till, server: Server) -> Evidence:
    """Nobody works for this purchase: its signals only have to be taken."""
    wish, nobody = Wish("lamp", [], None), till.id_of("nobody")
    handle = await till.lab.start(Purchase.run, wish, name="signals", server=server, task_queue=nobody)
    answers = [await said(handle.signal(Purchase.approve)) for _ in range(25)]
    recorded = (await count_events(handle))["WORKFLOW_EXECUTION_SIGNALED"]
    status = await status_of(handle)
    await handle.terminate()
    return limit(
        SO_MANY_SIGNALS,
        server_set_to="20 signals instead of 10000",
        taken=equal(answers.count("None"), 20),
        events=equal(recorded, 20),
        then=equal(sorted(set(answers[20:])), answers[20:21]),
        in_words=contains(answers[-1], "limit for signal events"),
        the_run_then=equal(status, "RUNNING"),
    )


async def killed_while_accepted(till: Till, server: Server) -> Evidence:
    """An update waits for its payment. Worker and server are killed, and somebody else asks for its result."""
    lab, id = till.lab, till.id_of("killed")
    parts = till.parts(server=server, task_queue=id, shortened={"pay": {"start_to_close_timeout": soon(2)}})
    handle = await till.budget("killed", 100, server=server, task_queue=id, task_timeout=soon(2))
    bill = till.bill(handle, 30)
    async with lab.worker_process(**parts) as worker:
        await accept(handle, bill)
        await until(lambda: till.begun(handle), "it is being paid")
        await worker.kill()
    server.kill()
    down = await server.start()
    open_gate(till.lab.gate("killed"))
    newcomer: Handle = (await connect(server.target)).get_workflow_handle(handle.id, result_type=Means)
    update: WorkflowUpdateHandle[int] = newcomer.get_update_handle(bill.number, result_type=int)
    async with lab.worker_process(**parts):
        answer = await said(update.result())
        left = (await dismiss(newcomer)).left
    return holds(
        OUTLIVED,
        answer=equal(answer, "70"),
        left=equal(left, 70),
        paid=equal(till.paid(handle), [30]),
        payments_begun=at_least(len(till.begun(handle)), 2),
        updates_accepted=equal((await count_events(newcomer))["WORKFLOW_EXECUTION_UPDATE_ACCEPTED"], 1),
        server_away=figure(down, "s"),
    )


@piece(limit(SO_MANY_UPDATES), holds(CONTINUED), limit(SO_MANY_SIGNALS), holds(OUTLIVED))
async def with_lowered_limits(till: Till) -> list[Evidence]:
    async with till.lab.private_server(file=True, settings=LOWERED) as server:
        async with till.lab.worker(**till.parts(Variant, server=server)):
            counted = await many_in_all(till, server)
        return [*counted, await many_signals(till, server), await killed_while_accepted(till, server)]


@SG.item("SG-02", "Waiting and awaitables")
async def waiting_for(lab: Lab) -> AsyncIterator[Evidence]:
    """Workflows wait for signals, timeouts, activities and each other's handlers; updates come in crowds."""
    till = Till(lab)
    parts = (
        waits_for_signal, wait_on_many, validated_updates, accepted_too_early, unfinished_handlers, never_set,
        locked_handlers, many_at_a_time, with_lowered_limits,
    )  # fmt: skip
    async with lab.worker(**till.parts(Purchase, Variant)):
        async for evidence in side_by_side(*(part(till) for part in parts)):
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
# Whatever can make a call can start a workflow: a client, an HTTP POST, a clock, a signal, an update, the consumer of a
# message broker. The workflow's id is made of the event (in Kafka: topic, partition, offset): then one that comes twice
# makes one run, for as long as the namespace retains the first one's.


@dataclass
class Order:
    number: str  # the workflow's id
    items: list[str] = field(default_factory=list)
    size: int = 1  # it is complete with so many items


@dataclass
class Parcel:
    order: str
    items: list[str]


class Store(Protocol):
    """Whoever packs and sends."""

    def ship(self, order: str, items: Sequence[str]) -> None:
        """Send an order's items; what was sent before is not sent again."""


class Shipping:
    def __init__(self, store: Store) -> None:
        self.store = store

    @activity.defn
    def ship(self, parcel: Parcel) -> None:
        self.store.ship(parcel.order, parcel.items)


@workflow.defn
class Fulfilment:
    @workflow.init
    def __init__(self, order: Order) -> None:
        self.items = list(order.items)

    @workflow.run
    async def run(self, order: Order) -> list[str]:
        await workflow.wait_condition(lambda: len(self.items) >= order.size)
        parcel = Parcel(order.number, self.items)
        await workflow.execute_activity_method(Shipping.ship, parcel, start_to_close_timeout=timedelta(seconds=30))
        return self.items

    @workflow.signal
    def add(self, item: str) -> None:
        self.items.append(item)

    @workflow.update
    def put(self, item: str) -> int:
        self.items.append(item)
        return len(self.items)

    @put.validator
    def check(self, item: str) -> None:
        if not item:
            raise ApplicationError("an item must have a name")


async def add_or_start(
    client: Client, order: Order, item: str, task_queue: str
) -> WorkflowHandle[Fulfilment, list[str]]:
    """Signal and start in one request: the order is there, or is begun, and has the item either way."""
    return await client.start_workflow(
        Fulfilment.run, order, id=order.number, task_queue=task_queue, start_signal="add", start_signal_args=[item]
    )


async def put_or_start(client: Client, order: Order, item: str, task_queue: str) -> int:
    """The same by an update, which answers. Raises WorkflowUpdateFailedError where it is refused."""
    start = WithStartWorkflowOperation(
        Fulfilment.run,
        order,
        id=order.number,
        task_queue=task_queue,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
    )
    return await client.execute_update_with_start_workflow(Fulfilment.put, item, start_workflow_operation=start)


def repeat(order: Order, every: timedelta, task_queue: str) -> Schedule:
    """A schedule that begins the order anew each time; the server adds the time to the id."""
    action = ScheduleActionStartWorkflow(Fulfilment.run, order, id=order.number, task_queue=task_queue)
    return Schedule(action=action, spec=ScheduleSpec(intervals=[ScheduleIntervalSpec(every=every)]))


class Topic(Protocol):
    """What is needed of a message broker: it hands a message out again until it is acknowledged."""

    async def take(self) -> Order | None:
        """The next message, or None when there is nothing more to do."""

    async def acknowledge(self, order: Order) -> None: ...


# Also where the run that an earlier delivery has started is over by now.
ONE_RUN = WorkflowIDReusePolicy.REJECT_DUPLICATE


async def consume(client: Client, topic: Topic, task_queue: str) -> None:
    """Start one workflow a message, and only then acknowledge it."""
    while order := await topic.take():
        with contextlib.suppress(WorkflowAlreadyStartedError):  # by an earlier delivery of the same message
            await client.start_workflow(
                Fulfilment.run, order, id=order.number, task_queue=task_queue, id_reuse_policy=ONE_RUN
            )
        await topic.acknowledge(order)


class Pile:
    """A store and a broker for the example, in memory. The broker hands everything out twice."""

    def __init__(self, orders: Sequence[Order]) -> None:
        self.messages = [*orders, *orders]
        self.shipped: dict[str, Sequence[str]] = {}

    def ship(self, order: str, items: Sequence[str]) -> None:
        self.shipped.setdefault(order, items)

    async def take(self) -> Order | None:
        return self.messages[0] if self.messages else None

    async def acknowledge(self, order: Order) -> None:
        del self.messages[0]


async def example_sg_03(client: Client) -> None:
    ids = [f"order-{uuid.uuid4()}" for _ in range(5)]
    pile = Pile([Order(ids[0], ["lamp"]), Order(ids[1], ["chair"])])
    async with Worker(
        client,
        task_queue="orders",
        workflows=[Fulfilment],
        activities=[Shipping(pile).ship],
        activity_executor=ThreadPoolExecutor(10),
    ):
        await consume(client, pile, "orders")
        basket = Order(ids[2], size=2)
        for item in ("cup", "plate"):
            await add_or_start(client, basket, item, "orders")
        await put_or_start(client, Order(ids[3]), "table", "orders")
        daily = await client.create_schedule(ids[4], repeat(Order(ids[4], ["milk"]), timedelta(days=1), "orders"))
        print(f"The milk would be shipped at {(await daily.describe()).info.next_action_times[0]}, and every day.")
        await daily.delete()
        for id in ids[:4]:
            await client.get_workflow_handle(id).result()
    print(f"Started by messages, a signal and an update: {', '.join(' and '.join(x) for x in pile.shipped.values())}")


# SG-03 put to the test -------------------------------------------------------------------------------


class Nowhere:
    """A store of which only the calls are of interest: the ledger has them."""

    def ship(self, order: str, items: Sequence[str]) -> None:
        pass


SHIPPING = Shipping(Nowhere())


@dataclass(frozen=True)
class Shipped:
    """What the ledger has of an order that was shipped: which run of it, and what was in the parcel."""

    run: str
    order: str
    items: list[str]


def shipped(lab: Lab, start: str) -> list[Shipped]:
    """Every order whose number begins like this, oldest first; once a run, however often it tried."""
    calls = {call.run: call.argument for call in lab.calls(what="ended") if call.argument["order"].startswith(start)}
    return [Shipped(run, parcel["order"], parcel["items"]) for run, parcel in calls.items()]


def items_of(some: Sequence[Shipped]) -> list[str]:
    return [item for one in some for item in one.items]


async def by_api(lab: Lab) -> list[Shipped]:
    id = f"{lab.id}-api"
    await ended(await lab.start(Fulfilment.run, Order(id, ["api call"]), name="api"))
    return shipped(lab, id)


async def by_http(lab: Lab, server: Server, port: int) -> tuple[str, list[Shipped]]:
    """The server's own HTTP API. Returns (the run id that it answered with, what was shipped)."""
    id = f"{lab.id}-http"
    start = {
        "workflowType": {"name": "Fulfilment"},
        "taskQueue": {"name": lab.task_queue},
        "input": [{"number": id, "items": ["http post"]}],
    }
    url = f"http://127.0.0.1:{port}/api/v1/namespaces/default/workflows/{id}"
    answer = (await http(url, start)).json
    await ended(server.client.get_workflow_handle(id))
    return answer["runId"], shipped(lab, id)


async def forgotten_id(lab: Lab, server: Server) -> Evidence:
    """An event comes again while its first run is retained, and once more when that has been deleted."""
    order = Order(f"{lab.id}-retained", ["once"])
    handle = server.client.get_workflow_handle(order.number)
    told = [await started(lab, server, order) for _ in range(2)]
    first = DeleteWorkflowExecutionRequest(
        namespace=server.client.namespace, workflow_execution=WorkflowExecution(workflow_id=order.number)
    )
    await server.client.workflow_service.delete_workflow_execution(first)
    await until(lambda: refusal(handle), "the run is deleted")
    told.append(await started(lab, server, order))
    return limit(
        FORGOTTEN,
        started=equal(told[0], "yes"),
        again=contains(told[1], "already started"),
        when_the_first_run_was_deleted=equal(told[2], "yes"),
        shipped=equal(items_of(shipped(lab, order.number)), ["once", "once"]),
    )


async def started(lab: Lab, server: Server, order: Order) -> str:
    """Whether an order could be started that has not been before, and why not."""
    try:
        handle = await lab.start(Fulfilment.run, order, id=order.number, server=server, id_reuse_policy=ONE_RUN)
    except WorkflowAlreadyStartedError as error:
        return str(error)
    await ended(handle)
    return "yes"


BY_CALLS = "a workflow is started by a client's call and by an HTTP POST to the server"
FORGOTTEN = "an id is refused only for as long as the namespace retains the run: after that an event makes a second one"


@piece(works(BY_CALLS), limit(FORGOTTEN))
async def by_calls(lab: Lab) -> list[Evidence]:
    port = free_port()
    async with (
        lab.private_server(arguments=["--http-port", str(port)], settings=DELETES_SOON) as server,
        lab.worker([Fulfilment], [SHIPPING.ship], server=server),
    ):
        api, (told, posted), forgotten = await asyncio.gather(
            by_api(lab), by_http(lab, server, port), forgotten_id(lab, server)
        )
    called = works(
        BY_CALLS,
        shipped_by_call=equal(items_of(api), ["api call"]),
        shipped_by_a_post_without_any_SDK=equal(items_of(posted), ["http post"]),
        run_that_the_post_was_answered_with=equal([told], [one.run for one in posted]),
    )
    return [called, forgotten]


async def by_schedule(lab: Lab) -> tuple[list[Shipped], list[tuple[datetime, datetime]]]:
    """A schedule of every second, for two runs. Returns what was shipped, and (due, started) of each run."""
    id = f"{lab.id}-schedule"
    plan = repeat(Order(id, ["schedule"]), timedelta(seconds=1), lab.task_queue)
    plan.state = ScheduleState(limited_actions=True, remaining_actions=2)
    schedule = await lab.client.create_schedule(id, plan)
    try:
        await until(lambda: len(shipped(lab, id)) >= 2, "the schedule has made two runs")
        await until(lambda: actions_of(schedule, 2), "the schedule tells of both")
        actions = await actions_of(schedule, 2)
    finally:
        await schedule.delete()
    ran = shipped(lab, id)
    return ran, [
        (one.scheduled_at, one.started_at)
        for one in actions
        if isinstance(one.action, ScheduleActionExecutionStartWorkflow)
        and one.action.first_execution_run_id in {run.run for run in ran}
    ]


async def actions_of(schedule: ScheduleHandle, many: int) -> Sequence[ScheduleActionResult]:
    """What a schedule says it has started, once there are so many."""
    actions = (await schedule.describe()).info.recent_actions
    return actions if len(actions) >= many else ()


async def by_cron(lab: Lab) -> list[tuple[str, str, float, float]]:
    """The first two runs by a cron schedule: (run id, the run before, seconds to wait by the server, waited)."""
    id = f"{lab.id}-cron"
    await lab.start(Fulfilment.run, Order(id, ["cron"]), name="cron", cron_schedule="@every 1s")
    try:
        await until(lambda: len(shipped(lab, id)) >= 2, "cron has made two runs")
    finally:
        await lab.client.get_workflow_handle(id).terminate(reason="seen enough")
    runs = [one.run for one in shipped(lab, id)[:2]]
    return [await wait_of(lab.client.get_workflow_handle(id, run_id=run)) for run in runs]


async def wait_of(handle: Handle) -> tuple[str, str, float, float]:
    history = (await handle.fetch_history()).events
    begun = history[0].workflow_execution_started_event_attributes
    task = next(one for one in history if one.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_SCHEDULED)
    waited = task.event_time.ToDatetime() - history[0].event_time.ToDatetime()
    backoff = begun.first_workflow_task_backoff.ToTimedelta()
    return str(handle.run_id), begun.continued_execution_run_id, backoff.total_seconds(), waited.total_seconds()


BY_CLOCK = "a schedule and a cron expression each start a workflow again and again, and never before it is due"


@piece(works(BY_CLOCK))
async def by_clock(lab: Lab) -> Evidence:
    lab.needs("schedules")
    (ran, scheduled), cron = await asyncio.gather(by_schedule(lab), by_cron(lab))
    late = [(begun - due).total_seconds() for due, begun in scheduled]
    early = [asked - waited for _, _, asked, waited in cron]
    return works(
        BY_CLOCK,
        runs_by_a_schedule_of_every_second=equal([len(ran), len({due for due, _ in scheduled})], [2, 2]),
        due_at_full_seconds=equal([due.microsecond for due, _ in scheduled], [0, 0]),
        started_after_they_were_due=Spread.of(late, "s"),
        the_earliest=at_least(min(late), 0),
        the_second_continued_from=equal(cron[1][1], cron[0][0]),
        cron_waited=Spread.of([waited for _, _, _, waited in cron], "s"),
        longer_than_it_was_told_by=at_least(-max(early), 0),
    )


BY_MESSAGE = "a workflow is started by the first signal, and by the first update, that is sent to it"


@piece(works(BY_MESSAGE))
async def by_message(lab: Lab) -> Evidence:
    """Message and start in one request."""
    lab.needs("updates", "update-with-start")
    signalled, updated = Order(f"{lab.id}-signalled"), Order(f"{lab.id}-updated")
    handle = await add_or_start(lab.client, signalled, "first signal", lab.task_queue)
    answer = await put_or_start(lab.client, updated, "first update", lab.task_queue)
    await asyncio.gather(ended(handle), ended(lab.client.get_workflow_handle(updated.number)))
    return works(
        BY_MESSAGE,
        shipped_by_a_signal=equal(items_of(shipped(lab, signalled.number)), ["first signal"]),
        shipped_by_an_update=equal(items_of(shipped(lab, updated.number)), ["first update"]),
        the_updates_answer=equal(answer, 1),
    )


SENDERS = 20


async def concurrent_signal_with_start(lab: Lab) -> Evidence:
    order, signals = Order(f"{lab.id}-race", size=SENDERS), [f"signal {number}" for number in range(SENDERS)]
    handles = await asyncio.gather(*(add_or_start(lab.client, order, one, lab.task_queue) for one in signals))
    await ended(handles[0])
    parcels, events = shipped(lab, order.number), await count_events(handles[0])
    return holds(
        f"{SENDERS} concurrent signal-with-starts of one id make one run that has all {SENDERS} signals",
        runs_that_were_answered=equal(
            sorted({str(one.result_run_id) for one in handles}), [one.run for one in parcels]
        ),
        signals_in_the_parcel=equal(len(items_of(parcels)), SENDERS),
        different_ones=equal(len(set(items_of(parcels))), SENDERS),
        signal_events=equal(events["WORKFLOW_EXECUTION_SIGNALED"], SENDERS),
    )


async def signal_nobody(lab: Lab) -> Evidence:
    handle = lab.client.get_workflow_handle(f"{lab.id}-nobody")
    answer = await said(handle.signal(Fulfilment.add, "lost"))
    return control(
        "a plain signal to a workflow that does not exist is refused and starts none",
        the_signal=contains(answer, "NOT_FOUND"),
        describing_the_workflow=equal(await refusal(handle), "NOT_FOUND"),
    )


STARTED_ALL_THE_SAME = "update-with-start: an update that its validator refuses leaves the workflow started"


@piece(limit(STARTED_ALL_THE_SAME))
async def refused_update_with_start(lab: Lab) -> Evidence:
    lab.needs("updates", "update-with-start")
    order = Order(f"{lab.id}-refused")
    handle = lab.client.get_workflow_handle(order.number)
    answer = await said(put_or_start(lab.client, order, "", lab.task_queue))
    status = "not there" if await refusal(handle) else await status_of(handle)
    await end(handle, "nobody asked for it")
    return limit(
        STARTED_ALL_THE_SAME,
        the_update=equal(answer, "an item must have a name"),
        the_workflow_then=equal(status, "RUNNING"),
    )


# Message brokers: each one is a Topic for the lesson's consumer, with a way to start it and to fill it.


class Redis:
    """A connection to Redis, with the few commands that are used here."""

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
            raise RuntimeError(f"Redis said {head!r} to {words[0]}")
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
class RedisTopic:
    """A list of order numbers. What is taken stands in a second list until it is acknowledged.

    The consumer is killed from here, at the first delivery of one message: its workflow is started by then.
    """

    port: int
    name: str
    deliveries: str
    dies_at: str

    def __post_init__(self) -> None:
        self.redis, self.taken = Redis(self.port), f"{self.name}-taken"

    async def take(self) -> Order | None:
        # First what an earlier consumer took and did not acknowledge.
        number = await self.redis("LINDEX", self.taken, "0")
        number = number or await self.redis("LMOVE", self.name, self.taken, "LEFT", "RIGHT")
        if not number:
            return None
        note(self.deliveries, number)
        return Order(number, ["message"])

    async def acknowledge(self, order: Order) -> None:
        if order.number == self.dies_at and notes(self.deliveries).count(order.number) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        await self.redis("LREM", self.taken, "1", order.number)


class Careless(Interceptor):
    """The control: a client by which an id can be used again as soon as its run is over."""

    def intercept_client(self, next: OutboundInterceptor) -> OutboundInterceptor:
        return CarelessCalls(next)


class CarelessCalls(OutboundInterceptor):
    async def start_workflow(self, input: StartWorkflowInput) -> Handle:
        input.id_reuse_policy = WorkflowIDReusePolicy.ALLOW_DUPLICATE
        return await super().start_workflow(input)


async def consumer(target: Target, topic: RedisTopic, task_queue: str, careless: bool) -> None:
    """The consumer's process."""
    client = await connect(target, interceptors=[Careless()] if careless else [])
    await consume(client, topic, task_queue)


@dataclass
class Consumption:
    idle: tuple[int, int]  # (messages in the broker, runs) while there was no consumer
    killed: int  # the first consumer's exit status
    deliveries: list[str]
    shipped: list[Shipped]
    left: int  # messages in the broker in the end


async def consumption(lab: Lab, port: int, kind: str) -> Consumption:
    """Five messages, of which one is handed out twice, because its consumer dies before it acknowledges."""
    name, careless = f"{lab.id}-{kind}", kind == "careless"
    numbers = [f"{name}-{number}" for number in range(1, 6)]
    topic = RedisTopic(port, name, lab.file(name), dies_at=numbers[2])
    redis = Redis(port)
    for number in numbers:
        await redis("RPUSH", name, number)
    await ended(await lab.start(Fulfilment.run, Order(f"{lab.id}-other", ["other"]), name=f"other-{kind}"))
    idle = int(await redis("LLEN", name)), len(shipped(lab, name))
    async with lab.process(consumer, lab.target, topic, lab.task_queue, careless) as first:
        killed = await first.wait()
    await ended(lab.client.get_workflow_handle(numbers[2]))
    async with lab.process(consumer, lab.target, topic, lab.task_queue, careless) as second:
        await second.wait()
    left = int(await redis("LLEN", name)) + int(await redis("LLEN", f"{name}-taken"))
    redis.close()
    # What was started has shipped before it is over: afterwards the ledger is complete.
    await asyncio.gather(*(ended(lab.client.get_workflow_handle(number)) for number in numbers))
    return Consumption(idle, killed, notes(topic.deliveries), shipped(lab, name), left)


REDELIVERED = "messages of a broker start workflows; one that is delivered again makes no second run"
DOUBLED = "the same redelivery without REJECT_DUPLICATE makes a second run when the first one is over"
UNATTENDED = "a message broker starts nothing by itself: until the user's own consumer runs, its messages wait"


@piece(holds(REDELIVERED), control(DOUBLED), limit(UNATTENDED))
async def by_broker(lab: Lab) -> list[Evidence]:
    program = shutil.which("redis-server")
    if program is None:
        raise NotRun("no message broker is installed here (redis-server)")
    port = free_port()
    in_memory = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
    async with lab.program(program, *in_memory):
        await until(Redis(port).answers, "Redis answers")
        once, again = await asyncio.gather(consumption(lab, port, "careful"), consumption(lab, port, "careless"))
    version = await asyncio.to_thread(version_of, program)
    return [
        holds(
            REDELIVERED,
            broker=version,
            killed_before_it_acknowledged=equal(once.killed, -signal.SIGKILL),
            deliveries=equal(short(once.deliveries), [1, 2, 3, 3, 4, 5]),
            shipped=equal(sorted(short([one.order for one in once.shipped])), [1, 2, 3, 4, 5]),
            left_in_the_broker=equal(once.left, 0),
        ),
        control(
            DOUBLED,
            deliveries=equal(short(again.deliveries), [1, 2, 3, 3, 4, 5]),
            shipped=equal(sorted(short([one.order for one in again.shipped])), [1, 2, 3, 3, 4, 5]),
        ),
        limit(
            UNATTENDED,
            messages_waiting_when_an_order_begun_after_them_had_ended=equal(once.idle[0], 5),
            workflows_started_of_them=once.idle[1],
            lines_of_the_consumer=len([line for line in inspect.getsource(consume).splitlines() if line.strip()]),
        ),
    ]


def version_of(program: str) -> str:
    told = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    return f"Redis {told.split('v=')[-1].split()[0]}"


def short(numbers: Sequence[str]) -> list[int]:
    """The last part of each number of an order."""
    return [int(number.rpartition("-")[2]) for number in numbers]


# Kafka keeps its records, and each has a place that no other one has: topic, partition and offset. The group remembers
# how far it has come, and its next consumer begins there.


@dataclass
class KafkaTopic:
    """The records of a Kafka topic, each an order whose number is its place. A record that cannot be read is set aside.

    Before the third delivery is committed the consumer is killed, and before the eighth it waits for the gate, where
    there is one: the order of the partitions is not known. `places` false: the numbers are random. `sets_aside` false:
    it ends at what it cannot read.
    """

    address: str
    name: str
    deliveries: str
    gate: str = ""
    places: bool = True
    sets_aside: bool = True

    def __post_init__(self) -> None:
        self.consumer: Any = None
        self.record: Any = None

    async def take(self) -> Order | None:
        self.consumer = self.consumer or await self._join()
        while not await self._at_end():
            self.record = await self.consumer.getone()
            try:
                item = json.loads(self.record.value)["item"]
            except ValueError:
                if not self.sets_aside:
                    raise
                await send_records(self.address, f"{self.name}-aside", {0: [self.record.value]})
                await self._commit()
                continue
            note(self.deliveries, item)
            place = f"{self.record.partition}-{self.record.offset}" if self.places else uuid.uuid4()
            return Order(f"{self.name}-{place}", [item])
        await self.consumer.stop()
        return None

    async def acknowledge(self, order: Order) -> None:
        deliveries = len(notes(self.deliveries)) if self.gate else 0
        if deliveries == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if deliveries == 8:
            await until(lambda: os.path.exists(self.gate), "the broker was killed", 120)
        await self._commit()

    async def _join(self) -> Any:
        from aiokafka import AIOKafkaConsumer

        # A consumer that was killed is missed after this long: until then its partitions are nobody's.
        session = int(3000 * pace())
        consumer = AIOKafkaConsumer(
            self.name, bootstrap_servers=self.address, group_id=self.name, enable_auto_commit=False,
            auto_offset_reset="earliest", session_timeout_ms=session, heartbeat_interval_ms=session // 6,
            fetch_max_wait_ms=100,
        )  # fmt: skip
        await consumer.start()
        return consumer

    async def _at_end(self) -> bool:
        parts = self.consumer.assignment()
        ends = await self.consumer.end_offsets(parts)
        return bool(parts) and [await self.consumer.position(part) for part in parts] == [ends[part] for part in parts]

    async def _commit(self) -> None:
        from aiokafka import TopicPartition
        from aiokafka.errors import CommitFailedError

        # The group has begun anew meanwhile, as after the death of the broker: the record comes again.
        with contextlib.suppress(CommitFailedError):
            part = TopicPartition(self.record.topic, self.record.partition)
            await self.consumer.commit({part: self.record.offset + 1})


async def make_topics(address: str, partitions: Mapping[str, int]) -> None:
    """Make topics, and see to it that groups can read: a new broker makes what they need at the first call for it."""
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic
    from aiokafka.errors import KafkaError

    admin = AIOKafkaAdminClient(bootstrap_servers=address)

    async def coordinated() -> bool:
        try:
            await admin.list_consumer_group_offsets("nobody")
        except KafkaError:
            return False
        return True

    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, many, 1) for name, many in partitions.items()])
        await until(coordinated, "the broker keeps the offsets of groups")
    finally:
        await admin.close()


async def send_records(address: str, topic: str, values: Mapping[int, Sequence[bytes]]) -> None:
    """Values by partition; all are written when this returns."""
    from aiokafka import AIOKafkaProducer

    async with AIOKafkaProducer(bootstrap_servers=address, acks="all") as producer:
        for partition, some in values.items():
            for value in some:
                await producer.send_and_wait(topic, value, partition=partition)


async def records_of(address: str, topic: str) -> list[bytes]:
    """The values in a topic of one partition."""
    from aiokafka import AIOKafkaConsumer, TopicPartition

    async with AIOKafkaConsumer(bootstrap_servers=address) as consumer:
        part = TopicPartition(topic, 0)
        consumer.assign([part])
        await consumer.seek_to_beginning(part)
        end = (await consumer.end_offsets([part]))[part]
        return [(await consumer.getone()).value for _ in range(end)]


async def record_consumer(target: Target, topic: KafkaTopic, task_queue: str) -> None:
    """The consumer's process."""
    await consume(await connect(target), topic, task_queue)


RECORDS = [f"{part}{number}" for part in "ab" for number in range(6)]  # of two partitions
POISON = b"no order"


def values_of(part: str) -> list[bytes]:
    return [json.dumps({"item": item}).encode() for item in RECORDS if item.startswith(part)]


@dataclass
class Drama:
    """What came of two topics of the same records, read by the same consumers: by their places, and by random numbers.

    Their first consumers are SIGKILLed, each between a start and the commit; then the broker, under the second ones.
    """

    first: list[int]  # exit statuses
    second: list[int]
    back: float  # seconds from the broker's SIGKILL until it can be used
    topics: list[KafkaTopic]
    aside: list[bytes]


async def drama(lab: Lab, broker: Any) -> Drama:
    gate = lab.gate("kafka")
    topics = [
        KafkaTopic(broker.address, name, lab.file(name), gate, places=name.endswith("places"))
        for name in (f"{lab.id}-places", f"{lab.id}-random")
    ]
    await make_topics(broker.address, {one.name: 2 for one in topics} | {f"{one.name}-aside": 1 for one in topics})
    for one in topics:
        a, b = values_of("a"), values_of("b")
        await send_records(broker.address, one.name, {0: [*a[:4], POISON, *a[4:]], 1: b})
    process = partial(lab.process, record_consumer, lab.target)
    async with contextlib.AsyncExitStack() as stack:
        begun = [await stack.enter_async_context(process(one, lab.task_queue)) for one in topics]
        first = [await one.wait(120) for one in begun]
        begun = [await stack.enter_async_context(process(one, lab.task_queue)) for one in topics]
        await until(lambda: all(len(notes(one.deliveries)) == 8 for one in topics), "eight deliveries", 120)
        broker.kill()
        open_gate(gate)
        back = await broker.start(120 * slowness())
        second = [await one.wait(120) for one in begun]
    return Drama(first, second, back, topics, await records_of(broker.address, f"{topics[0].name}-aside"))


async def stuck(lab: Lab, broker: Any) -> tuple[list[int], list[str]]:
    """A consumer that ends at what it cannot read, twice. Returns (its exit statuses, what was delivered)."""
    topic = KafkaTopic(broker.address, f"{lab.id}-stuck", lab.file("stuck"), sets_aside=False)
    await make_topics(broker.address, {topic.name: 1})
    await send_records(broker.address, topic.name, {0: [POISON, *values_of("a")]})
    ends = []
    for _ in range(2):
        async with lab.process(record_consumer, lab.target, topic, lab.task_queue) as one:
            ends.append(await one.wait())
    return ends, notes(topic.deliveries)


OF_KAFKA = (
    "records of a Kafka topic start workflows: topic, partition and offset are the id, so that every record has its "
    "effect once, though consumer and broker are killed"
)
SET_ASIDE = "a record that nobody can read is set aside, and those behind it in its partition are not held up"
WITHOUT_PLACES = "the same records under random ids: what is delivered again has its effect again"
HELD_UP = "a consumer that ends at such a record meets it again at its next start, and those behind it wait"


@piece(holds(OF_KAFKA), holds(SET_ASIDE), control(WITHOUT_PLACES), control(HELD_UP))
async def by_kafka(lab: Lab) -> list[Evidence]:
    async with running("kafka") as broker:
        seen = await drama(lab, broker)
        ends, behind = await stuck(lab, broker)
        version = await broker.version()
    places, random = seen.topics
    delivered = notes(random.deliveries)
    at = {"0": (0, 1, 2, 3, 5, 6), "1": range(6)}  # the poison is at 4
    ids = [f"{places.name}-{part}-{offset}" for part, offsets in at.items() for offset in offsets]
    # What was started has shipped before it is over. What was never started is lost, and lacks below.
    for handle in map(lab.client.get_workflow_handle, ids):
        if await refusal(handle) != "NOT_FOUND":
            await ended(handle)
    with contextlib.suppress(TimeoutError):  # the control's ids are not known: what lacks of it is seen below, too
        await until(lambda: len(shipped(lab, random.name)) >= len(delivered), "every delivery has shipped", 20)
    once, again = (sorted(items_of(shipped(lab, one.name))) for one in (places, random))
    return [
        holds(
            OF_KAFKA,
            broker=version,
            consumers_killed_before_they_committed=equal(seen.first, [-signal.SIGKILL] * 2),
            consumers_under_which_the_broker_was_killed=equal(seen.second, [0, 0]),
            delivered_again_and_refused=at_least(len(notes(places.deliveries)) - len(RECORDS), 1),
            effects=equal(once, RECORDS),
            broker_back_after=figure(seen.back, "s"),
        ),
        holds(
            SET_ASIDE,
            set_aside=equal(
                {value.decode(errors="replace") for value in seen.aside}, {POISON.decode(errors="replace")}
            ),
            effects_of_those_behind_it=equal([item for item in once if item in ("a4", "a5")], ["a4", "a5"]),
        ),
        control(
            WITHOUT_PLACES,
            delivered_again=at_least(len(delivered) - len(RECORDS), 1),
            effects_of_the_one_whose_consumer_died=at_least(again.count(delivered[2]), 2),
            effects=at_least(len(again), len(RECORDS) + 1),
        ),
        control(HELD_UP, exit_statuses=equal(ends, [1, 1]), delivered_of_those_behind_it=equal(behind, [])),
    ]


@SG.item("SG-03", "Event triggers", seconds=400)
async def event_triggers(lab: Lab) -> AsyncIterator[Evidence]:
    """Workflows are started in seven ways; the ledger has which run shipped what."""
    parts = (
        signal_nobody, concurrent_signal_with_start, refused_update_with_start, by_calls, by_clock, by_message,
        by_broker, by_kafka,
    )  # fmt: skip
    async with lab.worker([Fulfilment], [SHIPPING.ship]):
        async for evidence in side_by_side(*(part(lab) for part in parts)):
            yield evidence
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
# A query reads the variables of a workflow, running or ended, and leaves no trace in its history. A worker must be
# there to answer it. The handler may only look: what it changes is in no history, and gone with the worker.


@dataclass
class Leg:
    parcel: str
    to: str


class Carrier(Protocol):
    """Whoever moves parcels."""

    def move(self, parcel: str, to: str) -> None: ...


class Driver:
    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier

    @activity.defn
    def move(self, leg: Leg) -> None:
        self.carrier.move(leg.parcel, leg.to)


@workflow.defn
class Delivery:
    """A parcel that goes where it is sent, until it is at home."""

    def __init__(self) -> None:
        self.wanted: list[str] = []
        self.visited: list[str] = []

    @workflow.run
    async def run(self, parcel: str) -> list[str]:
        while "home" not in self.visited:
            await workflow.wait_condition(lambda: len(self.wanted) > len(self.visited))
            leg = Leg(parcel, self.wanted[len(self.visited)])
            await workflow.execute_activity_method(Driver.move, leg, start_to_close_timeout=timedelta(seconds=30))
            self.visited.append(leg.to)
        return self.visited

    @workflow.signal
    def send(self, to: str) -> None:
        self.wanted.append(to)

    @workflow.query
    def places(self) -> list[str]:
        return self.visited

    @workflow.query
    def told(self) -> int:
        return len(self.wanted)


class Bicycle:
    """A carrier for the example."""

    def move(self, parcel: str, to: str) -> None:
        print(f"{parcel} is brought to: {to}")


async def example_sg_04(client: Client) -> None:
    async with Worker(
        client,
        task_queue="parcels",
        workflows=[Delivery],
        activities=[Driver(Bicycle()).move],
        activity_executor=ThreadPoolExecutor(10),
    ):
        id = f"parcel-{uuid.uuid4()}"
        parcel = await client.start_workflow(Delivery.run, id, id=id, task_queue="parcels")
        for place in ("depot", "home"):
            await parcel.signal(Delivery.send, place)
            print(f"Told of {await parcel.query(Delivery.told)} places by now.")
        await parcel.result()
        try:
            await parcel.query(Delivery.places, reject_condition=QueryRejectCondition.NOT_OPEN)
        except WorkflowQueryRejectedError:
            print(f"It is not open any more, and still answers: {await parcel.query(Delivery.places)}")


# SG-04 put to the test -------------------------------------------------------------------------------


class Air:
    """A carrier of which only the calls are of interest: the ledger has them."""

    def move(self, parcel: str, to: str) -> None:
        pass


DRIVER = Driver(Air())


@workflow.defn
class Watched(Delivery):
    """The same delivery with a task of its own, with queries that do what they must not, and with a reading update."""

    def __init__(self) -> None:
        super().__init__()
        self.peeked = 0

    @workflow.run
    async def run(self, parcel: str) -> list[str]:
        self.watch = asyncio.create_task(self.watch_the_sky())
        return await super().run(parcel)

    async def watch_the_sky(self) -> None:
        await workflow.wait_condition(lambda: "the moon" in self.wanted)

    @workflow.query
    def peek(self) -> int:
        self.peeked += 1
        return self.peeked

    @workflow.query
    def act(self) -> None:
        workflow.start_activity_method(Driver.move, Leg("", "nowhere"), start_to_close_timeout=timedelta(seconds=30))

    @workflow.update
    def tell(self) -> list[str]:
        """The control: the same reading by an update."""
        return self.visited


async def send_off(lab: Lab, name: str, *places: str, kind: type[Delivery] = Delivery, alone: bool = False) -> Handle:
    """Start a delivery and send it to places; one that is `alone` has a task queue of its own."""
    id = f"{lab.id}-{name}"
    queue = id if alone else lab.task_queue
    handle = await lab.start(kind.run, id, name=name, task_queue=queue, task_timeout=soon(2))
    for place in places:
        await handle.signal(Delivery.send, place)
    return handle


def driver(lab: Lab, *workflows: type, task_queue: str | None = None) -> Worker:
    return lab.worker(workflows, [DRIVER.move], task_queue=task_queue)


def moved(lab: Lab, handle: Handle) -> list[str]:
    """Where the parcel was brought, by the ledger."""
    return [call.argument["to"] for call in lab.calls(handle.id, "ended")]


async def rests(lab: Lab, handle: Handle, places: int) -> bool:
    """So many places are visited, by the ledger and by the history, and the workflow waits again."""
    return len(moved(lab, handle)) >= places and await waits(handle, places)


async def read_while_running(lab: Lab) -> list[Evidence]:
    handle = await send_off(lab, "running", "depot", kind=Watched)
    answers: list[list[str]] = []
    ledger: list[list[str]] = []
    for place in ("ship", "train", ""):
        await until(lambda: rests(lab, handle, len(ledger) + 1), "the place is reached")
        before = await history_of(handle)
        answers.append(await handle.query(Delivery.places))
        ledger.append(moved(lab, handle))
        if place:
            await handle.signal(Delivery.send, place)
    status, after = await status_of(handle), await history_of(handle)
    update: Any = Watched.tell
    by_update = await handle.execute_update(update)
    written = outline(await handle.fetch_history()).splitlines()[-2:]
    await handle.signal(Delivery.send, "home")
    await ended(handle)
    return [
        works(
            "a query reads a running workflow's variables as they are, and writes nothing into its history",
            answers=equal(answers, ledger),
            the_last=equal(answers[-1], ["depot", "ship", "train"]),
            status=equal(status, "RUNNING"),
            events_before=len(before),
            the_same_after=equal(after == before, True),
        ),
        control(
            "the same reading by an update writes events each time, and ends with the workflow",
            answer=equal(by_update, ["depot", "ship", "train"]),
            events_written=equal(written, ["WorkflowExecutionUpdateAccepted", "WorkflowExecutionUpdateCompleted"]),
            when_it_has_ended=contains(await said(handle.execute_update(update)), "already completed"),
        ),
    ]


async def stack_traces(lab: Lab) -> list[Evidence]:
    """One delivery waits in its run method; another one also in a task of its own."""
    plain, watched = await send_off(lab, "plain"), await send_off(lab, "watched", kind=Watched)
    for handle in (plain, watched):
        await until(lambda: rests(lab, handle, 0), "it waits")  # noqa: B023
    stack, main = str(await watched.query("__stack_trace")), str(await plain.query("__stack_trace"))
    by_cli = await lab.cli("workflow", "stack", "--workflow-id", watched.id)
    for handle in (plain, watched):
        await handle.terminate()
    line, run = waiting_line(Watched.watch_the_sky), waiting_line(Delivery.run)
    return [
        works(
            "the stack-trace query, which every workflow answers, shows the line at which a task of its own waits",
            shown_for_a_task_made_by_create_task=contains(frames_of(stack, "Task-"), "watch_the_sky", line),
            shown_by_the_command_line=equal("in watch_the_sky" in by_cli.out, True),
        ),
        limit(
            "the stack trace does not show where the run method itself waits: it ends at the SDK's frame above it",
            run_waits_at=run,
            shown_for_it=equal(
                frames_of(main, "run (workflow: Delivery"), "_run_top_level_workflow_function; await coro"
            ),
        ),
    ]


def waiting_line(method: Callable[..., Any]) -> str:
    """The line of the method's source at which it waits for a condition."""
    return next(line.strip() for line in inspect.getsource(method).splitlines() if "wait_condition" in line)


def frames_of(stack: str, task: str) -> str:
    """What a stack trace shows for the task whose name begins like this: functions and lines, without files."""
    lines = stack.partition(f"name='{task}")[2].partition("Stack for")[0].splitlines()[1:]
    return "; ".join(line.split(", in ")[-1].strip() for line in lines if line.strip()) or "nothing"


async def reads_what_was_sent(lab: Lab) -> Evidence:
    handle = await send_off(lab, "fresh")
    answers = []
    for number in range(20):
        await handle.signal(Delivery.send, f"place {number}")
        answers.append(await handle.query(Delivery.told))
    await handle.terminate()
    return holds(
        "a query sees every signal that was acknowledged before it was sent",
        how_many_there_were_after_each_of_20=equal(answers, list(range(1, 21))),
    )


async def closed_workflows(lab: Lab) -> list[Evidence]:
    """One parcel has come home, another one's delivery was terminated. A worker that never saw them answers."""
    home, lost = await send_off(lab, "home", "depot", "home", alone=True), await send_off(lab, "lost", "depot")
    async with lab.worker_process([Delivery], [DRIVER.move], task_queue=home.id):
        how = await ended(home)
    await until(lambda: rests(lab, lost, 1), "the place is reached")
    conditions = {"running, NOT_OPEN": await answered(lost, QueryRejectCondition.NOT_OPEN)}
    await lost.terminate()
    async with driver(lab, Delivery, task_queue=home.id):
        answer = await home.query(Delivery.places)
        conditions |= {
            "completed, NOT_OPEN": await answered(home, QueryRejectCondition.NOT_OPEN),
            "completed, NOT_COMPLETED_CLEANLY": await answered(home, QueryRejectCondition.NOT_COMPLETED_CLEANLY),
            "terminated, NOT_COMPLETED_CLEANLY": await answered(lost, QueryRejectCondition.NOT_COMPLETED_CLEANLY),
            "terminated, no condition": await answered(lost, None),
        }
    expected = ["depot", "rejected: COMPLETED", "depot home", "rejected: TERMINATED", "depot"]
    closed = holds(
        "after its completion a workflow answers queries as before, also by a worker that never ran it",
        status=equal(how.status, "COMPLETED"),
        answer_by_another_one=equal(answer, ["depot", "home"]),
        ledger=equal(moved(lab, home), ["depot", "home"]),
    )
    rejected = holds(
        "a reject condition refuses the query where the workflow is not open, or did not end well",
        **{name: equal(answer, wanted) for (name, answer), wanted in zip(conditions.items(), expected, strict=True)},
    )
    return [closed, rejected]


async def answered(handle: Handle, condition: QueryRejectCondition | None) -> str:
    try:
        return " ".join(await handle.query(Delivery.places, reject_condition=condition))
    except WorkflowQueryRejectedError as error:
        return f"rejected: {name_of(error.status)}"


async def failing_query(handle: Handle, name: str) -> str:
    """The message with which a query fails, or "answered"."""
    try:
        await handle.query(name)
    except WorkflowQueryFailedError as error:
        return error.message
    return "answered"


async def refused_queries(lab: Lab) -> list[Evidence]:
    handle = await send_off(lab, "refused", "depot", kind=Watched)
    await until(lambda: rests(lab, handle, 1), "the place is reached")
    before = await history_of(handle)
    unknown, acting = await failing_query(handle, "place"), await failing_query(handle, "act")
    after = await history_of(handle)
    await handle.signal(Delivery.send, "home")
    how = await ended(handle)
    known = ["__enhanced_stack_trace", "__stack_trace", "__temporal_workflow_metadata", "act", "peek", "places", "told"]
    listed = unknown.partition("known queries: [")[2].partition("]")[0]
    named = holds(
        "an unknown query fails and names the known ones",
        query_place=contains(unknown, "'place' expected but not found"),
        named=equal(sorted(listed.split()), known),
    )
    refused = holds(
        "a query handler that starts an activity is refused, nothing is run of it, and the workflow goes on",
        refused=contains(acting, "read-only", "start activity"),
        the_same_events_after=equal(after == before, True),
        sent_home_then=equal(str(how), "COMPLETED"),
        brought_to=equal(moved(lab, handle), ["depot", "home"]),
    )
    return [named, refused]


async def without_worker(lab: Lab) -> Evidence:
    handle = await send_off(lab, "deserted", "depot", alone=True)
    async with driver(lab, Delivery, task_queue=handle.id):
        await until(lambda: rests(lab, handle, 1), "the place is reached")
    begun = time.monotonic()
    async with asyncio.timeout(60 * slowness()):
        answer = await said(handle.query(Delivery.places, rpc_timeout=timedelta(seconds=1.5)))
    seconds = time.monotonic() - begun
    async with driver(lab, Delivery, task_queue=handle.id):
        later = await handle.query(Delivery.places)
    await handle.terminate()
    return limit(
        "without a worker nobody answers: the query times out, it does not hang",
        answer=one_of(answer.partition(":")[0], "DEADLINE_EXCEEDED", "CANCELLED"),
        rpc_timeout=figure(1.5, "s"),
        waited=at_least(figure(seconds, "s"), 1.4),
        with_a_worker_again=equal(later, ["depot"]),
    )


async def changing_query(lab: Lab) -> Evidence:
    handle = await send_off(lab, "changed", "depot", kind=Watched, alone=True)
    peeks = []
    for _ in range(2):
        async with driver(lab, Watched, task_queue=handle.id):
            await until(lambda: rests(lab, handle, 1), "the place is reached")
            peeks.append([await handle.query("peek") for _ in range(4)])
    await handle.terminate()
    return limit(
        "a query handler that changes the workflow's variables is not stopped, and the change is in no history",
        counted_by_a_query=peeks[0],
        the_highest=at_least(max(peeks[0]), 2),
        first_after_the_worker_was_replaced=equal(peeks[1][0], 1),
    )


@SG.item("SG-04", "Query")
async def query(lab: Lab) -> AsyncIterator[Evidence]:
    """Parcels are asked where they are: under way, ended, deserted; a ledger knows where they have been."""
    parts = (
        without_worker, reads_what_was_sent, changing_query, read_while_running, stack_traces, closed_workflows,
        refused_queries,
    )  # fmt: skip
    async with driver(lab, Delivery, Watched):
        async for evidence in side_by_side(*(part(lab) for part in parts)):
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
