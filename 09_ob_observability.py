"""OB: observability - can one see what runs, what ran, what failed and why, and be told when it matters?

A durable workflow outlives the process that began it, so a debugger or the output of one program shows
little of it. What there is instead: the history that the server keeps, the Web UI and the command line
that read it, metrics of the server and of each worker, traces and logs. The six items compare what each
of them says with what really ran, which is counted outside Temporal.
"""

from common import (
    HERE,
    Category,
    Evidence,
    Fact,
    NotRun,
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
    lacks,
    limit,
    native,
    not_run,
    piece,
    side_by_side,
    slowness,
    works,
)
from lab import (
    PROMPT,
    Child,
    Handle,
    HttpAnswer,
    Lab,
    Server,
    count_events,
    ended,
    event_times,
    fail,
    failed_tasks,
    free_port,
    happened,
    history_of,
    hold,
    http,
    never_answer,
    note,
    notes,
    open_gate,
    pending,
    refuse,
    requires,
    run,
    said,
    together,
    until,
    waits,
)

import asyncio
import base64
import contextlib
import hmac
import inspect
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol, TextIO

import temporalio.contrib.opentelemetry as temporal_tracing
from temporalio import activity, workflow
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest, GetSystemInfoRequest
from temporalio.client import Client, WorkflowHandle, WorkflowHistory
from temporalio.common import RetryPolicy
from temporalio.converter import DataConverter, PayloadCodec
from temporalio.exceptions import (
    ApplicationError,
    ApplicationErrorCategory,
    ChildWorkflowError,
    NexusOperationError,
)
from temporalio.runtime import (
    LogForwardingConfig,
    LoggingConfig,
    PrometheusConfig,
    Runtime,
    TelemetryConfig,
    TelemetryFilter,
)
from temporalio.worker import (
    ExecuteWorkflowInput,
    Interceptor,
    Worker,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
)

# Libraries that the sandbox need not load again for every run of a workflow.
with workflow.unsafe.imports_passed_through():
    import nexusrpc
    import nexusrpc.handler
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from google.protobuf import json_format
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
    from prometheus_client.parser import text_string_to_metric_families

OB = Category(
    "OB",
    "Observability",
    "Can one see what runs, what ran, what failed and why, and be told when it matters?",
)

# What the items share --------------------------------------------------------------------------------


async def reconnected(client: Client, runtime: Runtime) -> Client:
    """Another client of the same server: metrics and logs belong to a runtime, which a client connects with."""
    config = client.service_client.config
    return await Client.connect(
        config.target_host,
        namespace=client.namespace,
        api_key=config.api_key,
        tls=config.tls,
        rpc_metadata=config.rpc_metadata,
        runtime=runtime,
    )


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    """Let an HTTP server answer in a thread of this process. Yields its URL."""
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def listening(hear: Callable[[bytes], None]) -> contextlib.AbstractContextManager[str]:
    """An HTTP server that hears every POST: a collector of traces, a webhook."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hear(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass  # the ledger says what came

    return serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler))


@dataclass
class Plain(Interceptor):
    """What counts and logs in workflow code without knowing of replays: a note, and a line by a plain logger.

    So it tells how often the code is really run, and is the control for what the SDK counts and logs.
    """

    ledger: str

    def workflow_interceptor_class(
        self, input: WorkflowInterceptorClassInput
    ) -> type[WorkflowInboundInterceptor] | None:
        ledger = self.ledger

        class Entered(WorkflowInboundInterceptor):
            async def execute_workflow(self, input: ExecuteWorkflowInput) -> Any:
                note(ledger, workflow.info().workflow_id)
                logging.getLogger("plain").info("entered")
                return await self.next.execute_workflow(input)

        return Entered


async def repeated_tasks(*handles: Handle) -> int:
    """How many workflow tasks failed or timed out, as happens on a machine that is too busy.

    What such a task has logged or counted comes once more when it is tried again. That is no replay.
    """
    kinds = [await count_events(handle) for handle in handles]
    return sum(one["WORKFLOW_TASK_FAILED"] + one["WORKFLOW_TASK_TIMED_OUT"] for one in kinds)


async def server_version(client: Client) -> str:
    return (await client.workflow_service.get_system_info(GetSystemInfoRequest())).server_version


# OB-01 Dashboard, UI ---------------------------------------------------------------------------------
# The Web UI comes with the server and shows each run with its history, failures and stacks. Encrypted
# data it shows only with the help of a codec server, which holds the key, is the user's own, and must
# ask who wants to read.


@dataclass
class Purchase:
    item: str
    card: str


@activity.defn
async def charge_card(purchase: Purchase) -> str:
    if not purchase.card.isdigit():
        raise ApplicationError(f"{purchase.card} is no card", type="NoCard")
    return f"charged for {purchase.item}"


@workflow.defn
class Buy:
    @workflow.run
    async def run(self, purchase: Purchase) -> str:
        return await workflow.execute_activity(
            charge_card,
            purchase,
            start_to_close_timeout=timedelta(seconds=30),
            retry_policy=RetryPolicy(initial_interval=timedelta(milliseconds=100), maximum_attempts=3),
        )


class Encryption(PayloadCodec):
    """Encrypts what workflows and activities are given and return, before it leaves the process."""

    def __init__(self, key: bytes) -> None:
        self._box = AESGCM(key)

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [self._sealed(payload) for payload in payloads]

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [self._opened(payload) for payload in payloads]

    def _sealed(self, payload: Payload) -> Payload:
        nonce = os.urandom(12)  # a new one each time; PF-03 has a ring of keys, to change them under running workflows
        data = nonce + self._box.encrypt(nonce, payload.SerializeToString(), None)
        return Payload(metadata={"encoding": b"binary/encrypted"}, data=data)

    def _opened(self, payload: Payload) -> Payload:
        if payload.metadata.get("encoding") != b"binary/encrypted":
            return payload
        return Payload.FromString(self._box.decrypt(payload.data[:12], payload.data[12:], None))


def sealed(client: Client, key: bytes) -> Client:
    """The same client, but what it sends and its workers send is encrypted."""
    config = client.config()
    config["data_converter"] = replace(DataConverter.default, payload_codec=Encryption(key))
    return Client(**config)


def codec_server(port: int, key: bytes, token: str, ui: str) -> ThreadingHTTPServer:
    """Decrypts what the Web UI or the command line posts to /decode, for those who have the token.

    The command line is given it by --codec-auth. The UI passes on the access token of whoever is signed in, where it
    is told to (passAccessToken) and this server speaks HTTPS: then verify that token here instead. `ui` is the origin
    of the page.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_OPTIONS(self) -> None:
            self.reply(204, b"")

        def do_POST(self) -> None:
            given = self.headers.get("Authorization", "")
            posted = self.rfile.read(int(self.headers["Content-Length"]))
            if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                return self.reply(401, b"a token is needed")
            if urllib.parse.urlsplit(self.path).path != "/decode":
                return self.reply(404, b"only /decode is here")
            try:
                opened = asyncio.run(Encryption(key).decode(json_format.Parse(posted, Payloads()).payloads))
            except InvalidTag:
                return self.reply(400, b"not encrypted with this key")
            self.reply(200, json_format.MessageToJson(Payloads(payloads=opened)).encode())

        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Access-Control-Allow-Origin", ui)
            self.send_header("Access-Control-Allow-Methods", "POST, OPTIONS")
            self.send_header("Access-Control-Allow-Headers", "authorization, content-type, x-namespace")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass  # not even who asked for what goes to stderr

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


async def example_ob_01(client: Client) -> None:
    key, token = AESGCM.generate_key(256), secrets.token_urlsafe()
    writer = sealed(client, key)
    async with Worker(writer, task_queue="shop", workflows=[Buy], activities=[charge_card]):
        purchase = Purchase("a secret diary", card="4242424242424242")
        id = f"purchase-{uuid.uuid4()}"
        result = await writer.execute_workflow(Buy.run, purchase, id=id, task_queue="shop")
    (started, *_) = (await client.get_workflow_handle(id).fetch_history()).events
    stored = started.workflow_execution_started_event_attributes.input.payloads[0].data
    print(f"{result!r} is kept by the server as {stored[:20].hex()}...")
    with codec_server(0, key, token, ui="http://localhost:8233") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        print(f"temporal workflow show -w {id} --codec-endpoint {url} --codec-auth 'Bearer ...' reads it,")
        print(f"and so does the UI of: temporal server start-dev --ui-codec-endpoint {url}")
        server.shutdown()


# OB-01 put to the test -------------------------------------------------------------------------------


@dataclass
class WebUI:
    """The UI as its page in a browser uses it: by the API that it offers on its own port."""

    url: str

    async def ready(self) -> bool:
        return (await http(f"{self.url}/api/v1/namespaces")).status == 200

    async def get(self, path: str) -> Any:
        """What the API says, or None where it finds nothing."""
        answer = await http(f"{self.url}/api/v1/namespaces/default/workflows{path}")
        return answer.json if answer.status == 200 else None

    async def listed(self, id: str) -> list[Any]:
        query = urllib.parse.quote(f'WorkflowId = "{id}"')
        executions: list[Any] = (await self.get(f"?query={query}")).get("executions", [])
        return executions

    async def shows(self, id: str, status: str) -> bool:
        return [run["status"] for run in await self.listed(id)] == [f"WORKFLOW_EXECUTION_STATUS_{status}"]

    async def events(self, id: str) -> list[Any]:
        events: list[Any] = (await self.get(f"/{id}/history"))["history"]["events"]
        return events


DIARY, TEAPOT, KETTLE = Purchase("a secret diary", "4242"), Purchase("a teapot", "4242"), Purchase("a kettle", "none")


async def page_is_served(ui: WebUI) -> Evidence:
    """The page, and everything that it names: scripts and styles, all from this server."""
    page = await http(ui.url)
    named = sorted(set(re.findall(r'(?:href|src)="([^"]+)"', page.text)))
    scripts = [name for name in named if name.endswith(".js")]
    answers = await asyncio.gather(*(http(urllib.parse.urljoin(ui.url, name)) for name in scripts))
    right = [one for one in answers if one.status == 200 and "javascript" in one.headers.get("Content-Type", "")]
    return works(
        "the page is served with every script that it names, and none comes from elsewhere",
        page=equal(page.status, 200),
        scripts=at_least(len(scripts), 1),
        served=equal(len(right), len(scripts)),
        kB=round(sum(len(one.text) for one in right) / 1000),
        named_on_other_hosts=equal([name for name in named if "//" in name], []),
    )


async def run_is_shown(lab: Lab, client: Client, ui: WebUI) -> list[Evidence]:
    handle = await lab.start(Buy.run, TEAPOT, name="well", client=client)
    result = str((await ended(handle)).result)
    await until(lambda: ui.shows(handle.id, "COMPLETED"), "the UI lists the run as ended")
    (listed,) = await ui.listed(handle.id)
    by_ui, by_client = await ui.events(handle.id), await history_of(handle)
    nobody = f"{lab.id}-nobody"
    missing = await ui.get(f"/{nobody}/history")
    return [
        works(
            "the run made a moment ago is listed with its status, and its history is what the client reads",
            run=equal(listed["execution"]["runId"], handle.first_execution_run_id),
            status=equal(listed["status"].removeprefix("WORKFLOW_EXECUTION_STATUS_"), "COMPLETED"),
            type=equal(listed["type"]["name"], "Buy"),
            events=at_least(len(by_client), 10),
            that_differ_in_id_type_or_time=equal(differing(by_ui, by_client), 0),
            result_is_readable=equal(result in contents(by_ui), True),
            calls=equal(len(lab.calls(handle.id)), 1),
        ),
        control(
            "a workflow id that was never started is not shown",
            listed=equal(await ui.listed(nobody), []),
            history=equal("none" if missing is None else "there", "none"),
        ),
    ]


def differing(some: Sequence[Any], others: Sequence[Any]) -> int:
    """How many events two readers of one history do not agree on."""
    keys = ("eventId", "eventType", "eventTime")
    mine, theirs = ({tuple(one[key] for key in keys) for one in events} for events in (some, others))
    return len(mine ^ theirs)


def contents(events: Sequence[Any]) -> str:
    """All the data in a history as JSON, as far as it is text."""
    data = re.findall(r'"data": "([^"]*)"', json.dumps(events))
    return " ".join(base64.b64decode(one).decode(errors="replace") for one in data)


async def failure_is_shown(lab: Lab, client: Client, ui: WebUI) -> Evidence:
    handle = await lab.start(Buy.run, KETTLE, name="failed", client=client)
    await ended(handle)
    await until(lambda: ui.shows(handle.id, "FAILED"), "the UI lists the run as failed")
    by_type = {event["eventType"]: event for event in await ui.events(handle.id)}
    failure = by_type["EVENT_TYPE_ACTIVITY_TASK_FAILED"]["activityTaskFailedEventAttributes"]["failure"]
    threw = f"line {line_of(charge_card, 'raise ApplicationError')}, in charge_card"
    return holds(
        "a failed run is listed as failed, with the message, the line that threw, and the number of attempts",
        attempts=equal(by_type["EVENT_TYPE_ACTIVITY_TASK_STARTED"]["activityTaskStartedEventAttributes"]["attempt"], 3),
        calls=equal(len(lab.calls(handle.id)), 3),
        message=equal(failure["message"], "none is no card"),
        its_stack_names=equal(re.findall(rf'{Path(__file__).name}", (line .+)', failure["stackTrace"]), [threw]),
    )


def line_of(function: Callable[..., Any], text: str) -> int:
    """The number of the line in this file on which a function says `text`."""
    lines, first = inspect.getsourcelines(function)
    return next(first + number for number, line in enumerate(lines) if text in line)


@dataclass(frozen=True)
class Codec:
    """The codec server, and who may ask it."""

    url: str
    key: bytes
    token: str
    page: str  # the origin that it allows

    async def decode(self, payloads: Any, token: str | None, url: str = "") -> HttpAnswer:
        """Post to it as the UI's page does."""
        headers = {"Origin": self.page, "X-Namespace": "default"}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        return await http(f"{url or self.url}/decode?preserveStorageRefs=true", payloads, headers=headers)


async def codec_decodes(lab: Lab, server: Server, ui: WebUI, codec: Codec) -> list[Evidence]:
    """What is encrypted before it leaves the client: as the UI has it, and as the codec server gives it back."""
    queue, writer = f"{lab.id}-sealed", sealed(server.client, codec.key)
    async with lab.worker([Buy], [charge_card], client=writer, task_queue=queue):
        handle = await lab.start(Buy.run, DIARY, id=queue, client=writer, task_queue=queue)
        result = (await ended(handle)).result
    events = await ui.events(queue)
    stored, payloads = contents(events), events[-1]["workflowExecutionCompletedEventAttributes"]["result"]
    settings = (await http(f"{ui.url}/api/v1/settings")).json["Codec"]
    preflight = await http(f"{settings['Endpoint']}/decode", method="OPTIONS", headers={"Origin": ui.url})
    decoded = await codec.decode(payloads, codec.token, settings["Endpoint"])
    opened = json_format.Parse(decoded.text, Payloads()).payloads if decoded.status == 200 else []
    flags = ("--codec-endpoint", codec.url, "--codec-auth", f"Bearer {codec.token}", "--command-timeout", "20s")
    shown = await lab.cli("workflow", "result", "-w", queue, *flags, server=server)
    with serving(codec_server(0, AESGCM.generate_key(256), codec.token, ui.url)) as another:
        other = await codec.decode(payloads, codec.token, another)
    plain = [word for word in ("diary", "4242", "charged") if word in stored]
    return [
        holds(
            "encrypted data is unreadable for the server and its UI; the codec server that the UI is told of reads it",
            characters_in_the_history=at_least(len(stored), 100),
            of_it_in_plain_text=equal(plain, []),
            the_UI_is_told_of=equal(settings["Endpoint"], codec.url),
            origins_allowed=equal([one.headers.get("Access-Control-Allow-Origin") for one in (preflight, decoded)],
                                  [ui.url, ui.url]),
            decoded=equal([json.loads(payload.data) for payload in opened], [result]),
            by_the_command_line=contains(shown.out, "charged for a secret diary"),
        ),
        holds(
            "the codec server decrypts for nobody who does not have the token",
            without=equal((await codec.decode(payloads, None)).status, 401),
            with_a_wrong_one=equal((await codec.decode(payloads, "guessed")).status, 401),
        ),
        control(
            "with another key the same codec server reads nothing",
            status=equal(other.status, 400),
            answer=lacks(other.text, "diary"),
        ),
        limit(
            "who encrypts must write and run the codec server, and decide who may read: without it the UI shows only "
            "ciphertext",
            of_the_history_in_plain_text=equal(plain, []),
            lines_of_the_codec_server=len(inspect.getsourcelines(codec_server)[0]),
            this_UI_passes_on_a_token=settings["PassAccessToken"],
        ),
    ]  # fmt: skip


BESIDE_A_CLUSTER = (
    "beside a cluster of separate services the UI lists both runs, and their histories as the client does"
)
IN_A_BROWSER = "a person finds both runs in a browser, with their events, and reads why one of them failed"


@piece(holds(BESIDE_A_CLUSTER), holds(IN_A_BROWSER))
async def beside_a_cluster(lab: Lab) -> list[Evidence]:
    # Here and not above: nobody else needs what a cluster is made of.
    from cluster import Cluster

    async with Cluster(ui=True) as cluster:
        if cluster.region.ui is None:
            raise NotRun("the Web UI of a cluster is not prepared: uv run cluster.py prepare")
        ui, queue = WebUI(cluster.region.ui.url), f"{lab.id}-cluster"
        async with lab.worker([Buy], [charge_card], client=cluster.client, task_queue=queue):
            runs = [
                await lab.start(Buy.run, one, name=f"cluster-{name}", client=cluster.client, task_queue=queue)
                for name, one in (("well", TEAPOT), ("failed", KETTLE))
            ]
            how = [(await ended(handle)).status for handle in runs]
        for handle, status in zip(runs, how, strict=True):
            await until(lambda: ui.shows(handle.id, status), "the UI lists the run as ended")  # noqa: B023
        apart = [differing(await ui.events(handle.id), await history_of(handle)) for handle in runs]
        shown = holds(
            BESIDE_A_CLUSTER,
            server=await server_version(cluster.client),
            status=equal(how, ["COMPLETED", "FAILED"]),
            events_that_differ=equal(apart, [0, 0]),
        )
        return [shown, await in_a_browser(ui, *runs)]


async def in_a_browser(ui: WebUI, well: Handle, failed: Handle) -> Evidence:
    try:
        from playwright.async_api import Page, async_playwright
    except ImportError:
        return not_run("holds", IN_A_BROWSER, "playwright is not installed (uv sync --group dev)")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        return not_run("holds", IN_A_BROWSER, "chromium is not installed (Debian: apt install chromium)")

    async def read(page: Page, path: str, *words: str) -> str:
        """What a page says, once it says these words, or when it will not; the caller judges."""
        await page.goto(f"{ui.url}/namespaces/default/workflows{path}")
        text = ""

        async def complete() -> bool:
            nonlocal text
            text = (await page.locator("body").inner_text()).lower()  # as styled: some of it is in capitals
            return all(word in text for word in words)

        with contextlib.suppress(TimeoutError):
            await until(complete, f"the page says {words}", 20)
        return text

    listed = [well.id.lower(), failed.id.lower(), "completed", "failed"]
    events = ["workflow execution started", "activity task completed", "workflow execution completed"]
    why = ["workflow execution failed", "none is no card"]
    elsewhere = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": 1400, "height": 1200}, locale="en-US")
        page.on("request", lambda asked: elsewhere.append(asked.url) if not asked.url.startswith(ui.url) else None)
        texts = [
            await read(page, "", *listed),
            await read(page, f"/{well.id}/{well.first_execution_run_id}/history", *events),
            await read(page, f"/{failed.id}/{failed.first_execution_run_id}/history", *why),
        ]
        version = browser.version
        await browser.close()
    missing = [
        [word for word in words if word not in text] for words, text in zip((listed, events, why), texts, strict=True)
    ]
    return holds(
        IN_A_BROWSER,
        Chromium=version,
        asked_of_other_hosts=equal(elsewhere, []),
        missing_in_the_list=equal(missing[0], []),
        in_the_history=equal(missing[1], []),
        in_that_of_the_failed_one=equal(missing[2], []),
    )


@OB.item("OB-01", "Dashboard, UI", seconds=150)
async def dashboard(lab: Lab) -> AsyncIterator[Evidence]:
    """A server with its UI; the UI's own API is asked for runs that ended well, badly, and encrypted."""
    port, key, token = free_port(), AESGCM.generate_key(256), secrets.token_urlsafe()
    ui = WebUI(f"http://127.0.0.1:{port}")
    with serving(codec_server(0, key, token, ui.url)) as url:
        async with (
            lab.private_server(ui_port=port, arguments=["--ui-codec-endpoint", url]) as server,
            lab.worker([Buy], [charge_card], server=server),
        ):
            await until(ui.ready, "the Web UI answers", 30)
            parts = (
                page_is_served(ui),
                run_is_shown(lab, server.client, ui),
                failure_is_shown(lab, server.client, ui),
                codec_decodes(lab, server, ui, Codec(url, key, token, ui.url)),
                beside_a_cluster(lab),
            )
            async for evidence in side_by_side(*parts):
                yield evidence
    yield native(
        "the UI is part of the server's command; the codec is a parameter of the client, and built here",
        "temporal server start-dev --ui-port --ui-codec-endpoint",
        (DataConverter, "payload_codec"),
        PayloadCodec,
        adds=[Encryption.__name__, f"{codec_server.__name__}()"],
    )


# OB-02 Metrics ---------------------------------------------------------------------------------------
# Worker and server count by themselves what they do, in the form that Prometheus reads. What workflow
# code counts through the SDK is counted once, however often the code is replayed.


@dataclass
class Sale:
    order: str


class Depot(Protocol):
    """Whoever packs what was sold."""

    def has_packed(self, order: str) -> bool: ...


class Shop:
    def __init__(self, depot: Depot) -> None:
        self.depot = depot

    @activity.defn
    async def take_payment(self, sale: Sale) -> None: ...

    @activity.defn
    async def collect(self, sale: Sale) -> None:
        if not self.depot.has_packed(sale.order):
            # Not there yet is no failure that anybody should be woken for: BENIGN is neither counted nor logged as one.
            raise ApplicationError(
                "not packed yet", category=ApplicationErrorCategory.BENIGN, next_retry_delay=timedelta(seconds=1)
            )


@workflow.defn
class Sell:
    @workflow.run
    async def run(self, sale: Sale) -> None:
        workflow.metric_meter().create_counter("sales_begun", "Sales that were begun").add(1)
        for step in (Shop.take_payment, Shop.collect):
            await workflow.execute_activity_method(step, sale, start_to_close_timeout=timedelta(seconds=30))


def metered(port: int) -> Runtime:
    """A runtime whose workers offer their metrics at this port, with durations in seconds, as Prometheus has them."""
    metrics = PrometheusConfig(bind_address=f"127.0.0.1:{port}", durations_as_seconds=True)
    return Runtime(telemetry=TelemetryConfig(metrics=metrics))


class Quick:
    """A depot for the example: everything is there at once."""

    def has_packed(self, order: str) -> bool:
        return bool(order)


async def example_ob_02(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    client, shop = await reconnected(client, metered(port)), Shop(Quick())
    async with Worker(client, task_queue="sales", workflows=[Sell], activities=[shop.take_payment, shop.collect]):
        id = f"sale-{uuid.uuid4()}"
        await client.execute_workflow(Sell.run, Sale(order=id), id=id, task_queue="sales")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            lines = page.read().decode().splitlines()
    counted = ("sales_begun", "temporal_workflow_completed", "temporal_activity_execution_latency_count")
    print(*(line for line in lines if line.startswith(counted)), sep="\n")


# OB-02 put to the test -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metrics:
    """One scrape: a sample is a name, labels and a value."""

    samples: Sequence[tuple[str, Mapping[str, str], float]]

    def found(self, name: str, **labels: str) -> list[float]:
        """The samples of this name that carry these labels."""
        return [value for one, theirs, value in self.samples if one == name and labels.items() <= theirs.items()]

    def value(self, name: str, **labels: str) -> float:
        """Their sum; where there are none NaN, with which no comparison holds."""
        return sum(self.found(name, **labels)) if self.found(name, **labels) else math.nan

    def values(self, *names: str, **labels: str) -> dict[str, float]:
        return {name: self.value(name, **labels) for name in names}


async def scrape(port: int, *only: str) -> Metrics:
    """What /metrics offers, read by Prometheus' own parser; of a server's 2 MB, `only` the names asked for."""
    page = (await http(f"http://127.0.0.1:{port}/metrics")).text
    lines = [line for line in page.splitlines() if not only or line.startswith(only)]
    samples = [one for family in text_string_to_metric_families("\n".join([*lines, ""])) for one in family.samples]
    # The parser gives counters the suffix of OpenMetrics; here they are called as the page calls them.
    return Metrics([(one.name.removesuffix("_total"), one.labels, one.value) for one in samples])


async def scraped(port: int, enough: Callable[[Metrics], bool], *only: str) -> Metrics:
    """Scrape until it shows what is expected, or for so long that it will not. The caller judges."""
    last = Metrics([])

    async def shown() -> bool:
        nonlocal last
        last = await scrape(port, *only)
        return enough(last)

    with contextlib.suppress(TimeoutError):
        await until(shown, "the metrics show it", 10)
    return last


def label(queue: str) -> str:
    """A task queue's name as the server's metrics write it, which replace what Prometheus' names may not hold."""
    return re.sub(r"\W", "_", queue)


def with_metrics(port: int) -> dict[str, Any]:
    """How the client of a worker process connects."""
    return {"runtime": metered(port)}


@dataclass(frozen=True)
class Market:
    """Where sales are tried: a server whose metrics can be scraped, and workers in processes of their own."""

    lab: Lab
    server: Server
    server_port: int

    def queue(self, name: str) -> str:
        return f"{self.lab.id}-{name}"

    @contextlib.asynccontextmanager
    async def worker(self, name: str, *parts: Any, metrics: bool = True, **options: Any) -> AsyncIterator[int]:
        """A worker on a queue of this name. Yields the port of its metrics."""
        port = free_port()
        connecting = partial(with_metrics, port) if metrics else None
        async with self.lab.worker_process(
            *parts, server=self.server, task_queue=self.queue(name), connect_options=connecting, **options
        ):
            yield port

    async def start(self, run: Any, *arguments: Any, queue: str, name: str = "") -> Handle:
        return await self.lab.start(
            run, *arguments, name=f"{queue}-{name}", server=self.server, task_queue=self.queue(queue)
        )


class Late:
    """A depot that has packed one of the orders only when it is asked again, and notes that in a file."""

    def __init__(self, order: str, ledger: str) -> None:
        self.order, self.ledger = order, ledger

    def has_packed(self, order: str) -> bool:
        if order != self.order or notes(self.ledger):
            return True
        note(self.ledger, order)
        return False


# Eight, of which six end well and two fail.
ORDERS = ["plain-1", "plain-2", "plain-3", "plain-4", "refused-1", "refused-2", "flaky", "late"]
FAULTS = [
    *(refuse("take_payment", order=order, why="card refused") for order in ("refused-1", "refused-2")),
    fail("take_payment", 1, order="flaky"),
]
SERVER_COUNTERS = ("workflow_success", "workflow_failed", "activity_success", "activity_task_fail")


async def counts(market: Market) -> list[Evidence]:
    """Counters against the ledger; and again after a time in which nothing is done."""
    lab, server, queue = market.lab, market.server_port, market.queue("sales")
    late, entered = lab.file("late"), lab.file("entered")
    shop = Shop(Late("late", late))
    parts = ([Sell], [shop.take_payment, shop.collect])
    # No cache: every workflow task begins with a replay of the whole history.
    async with market.worker(
        "sales", *parts, faults=FAULTS, max_cached_workflows=0, interceptors=[Plain(entered)]
    ) as port:
        handles = [await market.start(Sell.run, Sale(order), queue="sales", name=order) for order in ORDERS]
        how = Counter([(await ended(handle)).status for handle in handles])
        calls = [call for call in lab.calls(what="") if call.workflow.startswith(queue)]
        ran = Counter(call.what for call in calls)
        benign, by_hand = len(notes(late)), len(notes(entered))
        sdk_right = {
            "temporal_workflow_completed": how["COMPLETED"],
            "temporal_workflow_failed": how["FAILED"],
            "temporal_activity_execution_latency_count": ran["begun"],
            "temporal_activity_execution_failed": ran["failed"] - benign,
        }
        server_right = dict(
            zip(SERVER_COUNTERS, (how["COMPLETED"], how["FAILED"], ran["ended"], ran["failed"]), strict=True)
        )

        def by_sdk(seen: Metrics) -> dict[str, float]:
            return seen.values(*sdk_right, task_queue=queue)

        def by_server(seen: Metrics) -> dict[str, float]:
            return seen.values(*SERVER_COUNTERS, taskqueue=label(queue))

        seen = await scraped(port, lambda seen: by_sdk(seen) == sdk_right)
        at_server = await scraped(server, lambda seen: by_server(seen) == server_right, *SERVER_COUNTERS)
        begun = seen.value("sales_begun", task_queue=queue)
        await asyncio.sleep(2)
        later = by_sdk(await scrape(port)) | by_server(await scrape(server, *SERVER_COUNTERS))
    again = await repeated_tasks(*handles)
    failures = by_sdk(seen)["temporal_activity_execution_failed"]
    return [
        works(
            "the worker's counters are what ran: workflows by their end, attempts of activities, failures",
            ended=equal(how, {"COMPLETED": 6, "FAILED": 2}),
            **{name: equal(value, sdk_right[name]) for name, value in by_sdk(seen).items()},
        ),
        works(
            "the server's counters are what ran, too",
            attempts_in_the_ledger=at_least(ran["begun"], 16),
            **{name: equal(value, server_right[name]) for name, value in by_server(at_server).items()},
            its_label_for_the_queue=label(queue),
        ),
        holds(
            "a counter in workflow code counts once a workflow, however often the code is replayed",
            workflows=len(ORDERS),
            code_run=at_least(by_hand, len(ORDERS) + again + 1),
            sales_begun=between(begun, len(ORDERS), len(ORDERS) + again),
            tasks_repeated_for_another_reason=again,
        ),
        control(
            "a plain counter in the same workflow code counts every replay",
            counted=at_least(by_hand, len(ORDERS) + again + 1),
            workflows=len(ORDERS),
        ),
        holds(
            "failed attempts are counted also where a retry mends them, but not those marked BENIGN",
            failed_in_the_ledger=equal(ran["failed"], how["FAILED"] + 2),
            of_these_BENIGN=equal(benign, 1),
            counted_by_the_worker=equal(failures, ran["failed"] - benign),
            failed_workflows=equal(how["FAILED"], 2),
        ),
        holds(
            "while nothing runs nothing is counted",
            counters=len(later),
            changed_in_2_idle_seconds=equal(
                [name for name, value in later.items() if value != (by_sdk(seen) | by_server(at_server))[name]], []
            ),
        ),
    ]


async def unmetered(market: Market) -> Evidence:
    shop = Shop(Quick())
    async with market.worker("unmetered", [Sell], [shop.take_payment, shop.collect], metrics=False) as port:
        handle = await market.start(Sell.run, Sale("plain"), queue="unmetered")
        how = await ended(handle)
        page = await http(f"http://127.0.0.1:{port}/metrics")
    return control(
        "a worker whose runtime was given no metrics to offer offers none",
        sale=equal(how.status, "COMPLETED"),
        HTTP_status=equal(page.status, 0),
    )


@activity.defn
async def work_one(seconds: float) -> None:
    await asyncio.sleep(seconds)


@workflow.defn
class Work:
    @workflow.run
    async def run(self, people: int, seconds: float) -> None:
        minutes = timedelta(minutes=5)
        await asyncio.gather(
            *(workflow.execute_activity(work_one, seconds, start_to_close_timeout=minutes) for _ in range(people))
        )


async def slots(market: Market) -> Evidence:
    """Three activities hold a slot each of a worker that has five, and then none does."""
    lab, gate = market.lab, market.lab.gate("slots")
    names = ("temporal_worker_task_slots_used", "temporal_worker_task_slots_available")
    labels = {"task_queue": market.queue("slots"), "worker_type": "ActivityWorker"}
    faults = [hold("work_one", gate).of(f"{lab.id}-slots-")]
    async with market.worker("slots", [Work], [work_one], faults=faults, max_concurrent_activities=5) as port:
        handle = await market.start(Work.run, 3, 0, queue="slots")
        await until(lambda: len(lab.calls(handle.id)) == 3, "three are at work")
        busy = (await scraped(port, lambda seen: seen.value(names[0], **labels) == 3)).values(*names, **labels)
        open_gate(gate)
        await ended(handle)
        free = (await scraped(port, lambda seen: seen.value(names[0], **labels) == 0)).values(*names, **labels)
    return holds(
        "the slots of a worker are shown while they are used and when they are free",
        slots=5,
        used_and_available_with_three_at_work=equal(list(busy.values()), [3, 2]),
        and_afterwards=equal(list(free.values()), [0, 5]),
    )


async def schedule_to_start(market: Market) -> Evidence:
    """Three tasks for one slot wait for each other; the history says how long."""
    name, labels = "temporal_activity_schedule_to_start_latency", {"task_queue": market.queue("waiting")}
    async with market.worker("waiting", [Work], [work_one], max_concurrent_activities=1) as port:
        handle = await market.start(Work.run, 3, 0.3, queue="waiting")
        await ended(handle)
        seen = await scraped(port, lambda seen: seen.value(f"{name}_count", **labels) == 3)
    events = (await handle.fetch_history()).events
    scheduled = {one.event_id: one.event_time.ToDatetime() for one in events}
    starts = [(one, one.activity_task_started_event_attributes) for one in events]
    waited = [
        (one.event_time.ToDatetime() - scheduled[started.scheduled_event_id]).total_seconds()
        for one, started in starts
        if started.scheduled_event_id
    ]
    count, within = seen.value(f"{name}_count", **labels), seen.value(f"{name}_bucket", le="0.1", **labels)
    return holds(
        "how long tasks wait for a worker is shown, and agrees with the history",
        tasks=equal(count, len(waited)),
        waited_by_the_history=at_least(sum(waited), 0.9),
        by_the_metric=between(seen.value(f"{name}_sum", **labels), 0.95 * sum(waited), 1.05 * sum(waited)),
        # The two clocks need not agree on one that waited for about so long.
        longer_than_a_tenth_of_a_second=between(
            count - within, len([one for one in waited if one > 0.15]), len([one for one in waited if one > 0.05])
        ),
    )


@activity.defn
async def count_stock(gate: str) -> None:
    """Heartbeats as it should, until the gate is open."""
    while not Path(gate).exists():
        activity.heartbeat()
        await asyncio.sleep(0.05)


def call_supplier(gate: str) -> None:
    """As of a database's driver or an HTTP library: the thread waits, and nothing else runs in it."""
    while not Path(gate).exists():
        time.sleep(0.05)


@activity.defn(name="call_supplier")
async def call_in_the_loop(gate: str) -> None:
    call_supplier(gate)


@activity.defn(name="call_supplier")
def call_in_a_thread(gate: str) -> None:
    call_supplier(gate)


@workflow.defn
class Neighbours:
    @workflow.run
    async def run(self, gate: str, heartbeat: float) -> None:
        minutes = timedelta(minutes=5)
        await asyncio.gather(
            workflow.execute_activity(
                count_stock, gate, start_to_close_timeout=minutes, heartbeat_timeout=timedelta(seconds=heartbeat)
            ),
            workflow.execute_activity("call_supplier", gate, start_to_close_timeout=minutes),
        )


TIMEOUTS = "activity_task_timeout"  # of the server's metrics, one sample an activity and kind of timeout


async def timeouts_beside(market: Market, call: Callable[..., Any]) -> tuple[dict[str, float], list[float], str]:
    """What metrics tell while a call blocks: timeouts by the server's, failures by the worker's; how it ended."""
    name = call.__name__
    gate, heartbeat = market.lab.gate(name), 1.0 * slowness()
    told = {"taskqueue": label(market.queue(name))}
    async with market.worker(name, [Neighbours], [count_stock, call]) as port:
        handle = await market.start(Neighbours.run, gate, heartbeat, queue=name)
        await until(lambda: "call_supplier" in [one.activity for one in market.lab.calls(handle.id)], "the call blocks")
        with contextlib.suppress(TimeoutError):  # the control waits in vain, for as long as four timeouts
            await until(lambda: given_up(market, told), "a timeout is counted", 4 * heartbeat / slowness())
        seen, of_worker = await scrape(market.server_port, TIMEOUTS), await scrape(port)
        open_gate(gate)
        how = await ended(handle)
    timeouts = {
        f"{labels['activityType']} {labels['timeout_type']}": value
        for metric, labels, value in seen.samples
        if metric == TIMEOUTS and value and told.items() <= labels.items()
    }
    return timeouts, of_worker.found("temporal_activity_execution_failed"), how.status


async def given_up(market: Market, labels: Mapping[str, str]) -> bool:
    return any((await scrape(market.server_port, TIMEOUTS)).found(TIMEOUTS, **labels))


async def neighbours(market: Market) -> list[Evidence]:
    loop, thread = await together(*(timeouts_beside(market, call) for call in (call_in_the_loop, call_in_a_thread)))
    timeouts, failures, how = loop
    return [
        holds(
            "where a blocking call silences its neighbour's heartbeats, the server's metrics tell the operator: which "
            "activity, and why it was given up; the worker's own do not",
            by_the_server=equal(list(timeouts), ["count_stock Heartbeat"]),
            times=at_least(sum(timeouts.values()), 1),
            failures_by_the_worker=equal(sum(failures), 0),
            ended=equal(how, "COMPLETED"),
        ),
        control(
            "beside the same call in a thread no timeout is counted",
            by_the_server=equal(thread[0], {}),
            ended=equal(thread[2], "COMPLETED"),
        ),
    ]


@OB.item("OB-02", "Metrics")
async def worker_and_server_metrics(lab: Lab) -> AsyncIterator[Evidence]:
    """Workflows that end well and badly; what Prometheus would scrape is compared with the ledger."""
    server_port = free_port()
    async with lab.private_server(arguments=["--metrics-port", str(server_port)]) as server:
        market = Market(lab, server, server_port)
        parts = (counts, unmetered, slots, schedule_to_start, neighbours)
        async for evidence in side_by_side(*(part(market) for part in parts)):
            yield evidence
    yield native(
        "switched on by a setting of runtime and server; workflow code counts through the SDK's meter",
        (Client.connect, "runtime"),
        (Runtime, "telemetry"),
        (TelemetryConfig, "metrics"),
        (PrometheusConfig, "bind_address"),
        (PrometheusConfig, "durations_as_seconds"),
        workflow.metric_meter,
        (ApplicationError, "category"),
        ApplicationErrorCategory.BENIGN,
        "temporal server start-dev --metrics-port",
    )


# OB-03 History visualisation -------------------------------------------------------------------------
# The history is a record that any program can read and draw. It holds what went through Temporal, and
# nothing else: neither what code did inside an activity, nor what was only asked.


@dataclass(frozen=True)
class Bar:
    """Something that took time: when it began and ended, how it ended, and how many attempts it took."""

    name: str
    begin: datetime
    end: datetime
    how: str = "pending"  # pending: it lasts to the history's last event
    attempts: int = 1


# The events that begin a bar, and where its name stands when it has no summary.
BEGINS = {
    "ACTIVITY_TASK_SCHEDULED": "activityType",
    "TIMER_STARTED": "timerId",
    "START_CHILD_WORKFLOW_EXECUTION_INITIATED": "workflowType",
    "NEXUS_OPERATION_SCHEDULED": "operation",
}
# Those that end one refer to the first, as do others: only these words say that it is over.
ENDS = re.compile(r"(?<!REQUEST_)(COMPLETED|FAILED|TIMED_OUT|CANCELED|TERMINATED|FIRED)$")


def bars(events: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """The activities, timers, children and Nexus operations of a history in JSON, as they began."""
    found: dict[str, Bar] = {}
    for event in events:
        kind, at = event["eventType"].removeprefix("EVENT_TYPE_"), datetime.fromisoformat(event["eventTime"])
        what: Mapping[str, Any] = next((value for key, value in event.items() if key.endswith("EventAttributes")), {})
        begun = what.get("scheduledEventId") or what.get("initiatedEventId") or what.get("startedEventId")
        if kind in BEGINS:
            found[event["eventId"]] = Bar(summary_of(event) or type_name(what[BEGINS[kind]]), at, at)
        elif what.get("markerName") == "core_local_activity":
            found[event["eventId"]] = local_activity(what, at)
        elif begun in found and kind == "ACTIVITY_TASK_STARTED":
            found[begun] = replace(found[begun], attempts=what["attempt"])
        elif begun in found and (over := ENDS.search(kind)):
            found[begun] = replace(found[begun], end=at, how=over[1].replace("_", " ").lower())
    now = max((datetime.fromisoformat(event["eventTime"]) for event in events), default=None)
    every = [replace(bar, end=now) if bar.how == "pending" and now else bar for bar in found.values()]
    return sorted(every, key=lambda bar: bar.begin)


def summary_of(event: Mapping[str, Any]) -> str:
    """What the workflow's code calls it, for those who read the history or look at the Web UI."""
    data = event.get("userMetadata", {}).get("summary", {}).get("data")
    return str(json.loads(base64.b64decode(data))) if data else ""


def type_name(type: Any) -> str:
    return str(type["name"] if isinstance(type, Mapping) else type)


def local_activity(marker: Mapping[str, Any], heard: datetime) -> Bar:
    """A local activity leaves one event, when it has ended. `heard` is that event's time.

    Its begin is in there, by the worker's clock. So is an end, but counted from the begin of the workflow task instead
    of its own: where a worker was late it lies too early, and the bar lasts until the server heard of it.
    """
    data = json.loads(base64.b64decode(marker["details"]["data"]["payloads"][0]["data"]))
    since = data["original_schedule_time"]
    begin = datetime.fromtimestamp(since["seconds"], UTC) + timedelta(microseconds=since.get("nanos", 0) / 1000)
    how = "failed" if "failure" in marker else "completed"
    return Bar(f"{data['activity_type']} (local)", begin, heard, how, data["attempt"])


def timeline(found: Sequence[Bar], width: int = 30) -> list[str]:
    """The bars as text, to a common scale."""
    begin = min((bar.begin for bar in found), default=None)
    if begin is None:
        return []
    whole = max(bar.end for bar in found) - begin or timedelta(microseconds=1)  # all may have happened at one moment
    drawn = []
    for bar in found:
        left = min(int(width * ((bar.begin - begin) / whole)), width - 1)
        length = max(1, round(width * ((bar.end - bar.begin) / whole)))
        line = ("." * left + "#" * length)[:width].ljust(width, ".")
        attempts = f" at attempt {bar.attempts}" if bar.attempts > 1 else ""
        drawn.append(f"[{line}] {bar.name} {(bar.end - bar.begin).total_seconds():.2f} s {bar.how}{attempts}")
    return drawn


@dataclass
class Step:
    name: str
    seconds: float = 0


@activity.defn
async def do_step(step: Step) -> str:
    await asyncio.sleep(step.seconds)
    return step.name


async def step_of(name: str, seconds: float) -> str:
    return await workflow.execute_activity(
        do_step, Step(name, seconds), summary=name, start_to_close_timeout=timedelta(seconds=30)
    )


@workflow.defn
class Deliver:
    @workflow.run
    async def run(self) -> None:
        await step_of("deliver", 0.4)


@workflow.defn
class Fulfil:
    """Two steps side by side, one after them, a timer, and a child workflow."""

    @workflow.run
    async def run(self) -> None:
        await asyncio.gather(step_of("reserve", 0.3), step_of("quote", 0.6))
        await step_of("charge", 0.2)
        await workflow.sleep(0.3, summary="cooling off")
        await workflow.execute_child_workflow(Deliver.run, static_summary="by bicycle")


async def example_ob_03(client: Client) -> None:
    async with Worker(client, task_queue="parcels", workflows=[Fulfil, Deliver], activities=[do_step]):
        handle = await client.start_workflow(Fulfil.run, id=f"parcel-{uuid.uuid4()}", task_queue="parcels")
        await handle.result()
    exported = (await handle.fetch_history()).to_json()  # or: temporal workflow show -o json
    print(*timeline(bars(json.loads(exported)["events"])), sep="\n")


# OB-03 put to the test -------------------------------------------------------------------------------

# Which event ends what, and how it refers to its beginning.
CLOSINGS = {
    **dict.fromkeys([f"activity_task_{how}" for how in ("completed", "failed", "timed_out", "canceled")], "scheduled"),
    **dict.fromkeys(["nexus_operation_completed", "nexus_operation_failed"], "scheduled"),
    **dict.fromkeys(["timer_fired", "timer_canceled"], "started"),
    **dict.fromkeys(["child_workflow_execution_completed", "child_workflow_execution_failed"], "initiated"),
}


def closed(history: WorkflowHistory) -> list[tuple[datetime, datetime, str]]:
    """Begin, end and ending of what a history has closed, read from its events and not from JSON."""
    events, found = {event.event_id: event for event in history.events}, []
    for event in history.events:
        kind = str(event.WhichOneof("attributes")).removesuffix("_event_attributes")
        if back := CLOSINGS.get(kind):
            begun = events[getattr(getattr(event, f"{kind}_event_attributes"), f"{back}_event_id")]
            how = re.sub("activity_task_|nexus_operation_|timer_|child_workflow_execution_", "", kind)
            times = [one.event_time.ToDatetime(UTC) for one in (begun, event)]
            found.append((times[0], times[1], how.replace("_", " ")))
    return sorted(found)


def unlike(found: Sequence[Bar], history: WorkflowHistory) -> int:
    """How many bars do not agree with the events of their history, to the microsecond."""
    drawn = [(bar.begin, bar.end, bar.how) for bar in found if bar.how != "pending" and "(local)" not in bar.name]
    return (Counter(drawn) - Counter(closed(history))).total() + (Counter(closed(history)) - Counter(drawn)).total()


def off_scale(found: Sequence[Bar], lines: Sequence[str]) -> float:
    """By how many columns of its drawing a bar begins or lasts too early or late, at the most."""
    begin, end = min(bar.begin for bar in found), max(bar.end for bar in found)
    off = []
    for bar, line in zip(found, lines, strict=True):
        field = line[1 : line.index("]")]
        scale = len(field) / max((end - begin).total_seconds(), 1e-6)
        off.append(abs(field.index("#") - scale * (bar.begin - begin).total_seconds()))
        off.append(abs(field.count("#") - scale * (bar.end - bar.begin).total_seconds()))
    return round(max(off), 6)  # one column is one column, whatever binary fractions make of it


async def export(handle: Handle) -> tuple[WorkflowHistory, list[Bar]]:
    history = await handle.fetch_history()
    return history, bars(json.loads(history.to_json())["events"])


async def drawn(lab: Lab) -> list[Evidence]:
    handle = await lab.start(Fulfil.run, name="fulfil", static_summary="a parcel for the picture")
    await ended(handle)
    shown = await lab.command("workflow", "show", "-w", handle.id, "-o", "json")
    events, by_cli = await history_of(handle), json.loads(shown.out)["events"]
    history, found = await export(handle)
    by_name, lines = {bar.name: bar for bar in found}, timeline(found)
    calls = {what: lab.calls(handle.id, what) for what in ("begun", "ended")}
    moments = {call.argument["name"]: call.at for call in calls["begun"] if call.attempt == 1}
    took = {call.argument["name"]: call.at - moments[call.argument["name"]] for call in calls["ended"]}
    lasted = {name: (by_name[name].end - by_name[name].begin).total_seconds() for name in took if name in by_name}
    return [
        works(
            "the history can be had as JSON from the client and from the command line, and both are equal",
            events=at_least(len(events), 20),
            kB=round(len(shown.out) / 1000),
            that_differ=equal(len([one for one in events if one not in by_cli]) + abs(len(events) - len(by_cli)), 0),
        ),
        works(
            "a timeline drawn from it shows what ran when: order, length, side by side, retry, timer and child",
            bars=equal([bar.name for bar in found][2:], ["charge", "cooling off", "by bicycle"]),
            side_by_side=equal(sorted(bar.name for bar in found[:2]), ["quote", "reserve"]),
            overlap=equal([overlap(by_name, "reserve", "quote"), overlap(by_name, "quote", "charge")], [True, False]),
            that_differ_from_the_events=equal(unlike(found, history), 0),
            columns_beside_the_scale=at_most(off_scale(found, lines), 1),
            steps=equal(sorted(lasted), ["charge", "quote", "reserve"]),
            shorter_than_the_call_itself=equal([name for name in lasted if lasted[name] < took[name]], []),
            attempts_of_charge=equal(by_name["charge"].attempts, 2),
            calls_of_charge=equal(len([one for one in calls["begun"] if one.argument["name"] == "charge"]), 2),
            drawn=lines,
        ),
    ]


def overlap(found: Mapping[str, Bar], one: str, other: str) -> bool:
    return found[one].begin < found[other].end and found[other].begin < found[one].end


@workflow.defn
class Failing:
    @workflow.run
    async def run(self) -> None:
        raise ApplicationError("the child fails")


@workflow.defn
class Everything:
    """Begins one of each kind that a history knows, lets each end in another way, and then goes on waiting."""

    def __init__(self) -> None:
        self.rung = False

    @workflow.run
    async def run(self, patience: float) -> None:
        def begin(name: str, **options: Any) -> workflow.ActivityHandle[str]:
            options.setdefault("start_to_close_timeout", timedelta(minutes=5))
            once = RetryPolicy(maximum_attempts=1)
            return workflow.start_activity(do_step, Step(name), summary=name, retry_policy=once, **options)

        waiting = workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED
        begun = [
            begin("done"),
            begin("refused"),
            begin("overdue", start_to_close_timeout=timedelta(seconds=patience)),
            begin("stopped", heartbeat_timeout=timedelta(minutes=1), cancellation_type=waiting),
        ]
        rings = workflow.wait_condition(lambda: self.rung, timeout=3600, timeout_summary="bell")
        bell = asyncio.create_task(rings)
        await workflow.sleep(patience / 2, summary="pause")
        begun[-1].cancel()
        self.rung = True
        await asyncio.gather(*begun, bell, return_exceptions=True)
        with contextlib.suppress(ChildWorkflowError):
            await workflow.execute_child_workflow(Failing.run, static_summary="child")
        await workflow.execute_local_activity(do_step, Step("nearby", 0.1), start_to_close_timeout=timedelta(minutes=1))
        await begin("open")


# How each ends.
ENDINGS = {
    "done": "completed", "refused": "failed", "overdue": "timed out", "stopped": "canceled", "bell": "canceled",
    "pause": "fired", "child": "failed", "do_step (local)": "completed", "open": "pending",
}  # fmt: skip


def drawing_faults(lab: Lab) -> list[Any]:
    return [
        fail("do_step", 1, name="charge"),
        refuse("do_step", name="refused"),
        never_answer("do_step", name="overdue", silent=True),
        hold("do_step", "", name="stopped"),
        hold("do_step", lab.gate("open"), name="open"),
    ]


async def every_kind(lab: Lab) -> list[Evidence]:
    handle = await lab.start(Everything.run, 1.0 * slowness(), name="everything")
    await until(lambda: "open" in [call.argument["name"] for call in lab.calls(handle.id)], "one is left open")
    history, found = await export(handle)
    open_gate(lab.gate("open"))
    await ended(handle)
    by_name, last = {bar.name: bar for bar in found}, history.events[-1].event_time.ToDatetime(UTC)
    # One activity that nobody takes: its history ends with the event that begins its only bar.
    alone = await lab.start(Deliver.run, name="alone", task_queue=f"{lab.id}-first")
    async with lab.worker([Deliver], task_queue=f"{lab.id}-first"):
        await until(lambda: happened(alone, "ACTIVITY_TASK_SCHEDULED"), "the activity is scheduled")
    _, single = await export(alone)
    await alone.terminate()
    return [
        holds(
            "every kind and ending is drawn: failed, timed-out, cancelled and pending, local ones, timers and children",
            endings=equal({bar.name: bar.how for bar in found}, ENDINGS),
            that_differ_from_the_events=equal(unlike(found, history), 0),
            the_pending_one_lasts_to_the_end=equal(by_name["open"].end, last),
            the_local_one_took=at_least((by_name["do_step (local)"].end - by_name["do_step (local)"].begin)
                                        .total_seconds(), 0.05),
            columns_beside_the_scale=at_most(off_scale(found, timeline(found)), 1),
        ),
        holds(
            "a history whose only bar has no length yet is drawn as one mark",
            lasts=equal([(bar.name, (bar.end - bar.begin).total_seconds(), bar.how) for bar in single],
                        [("deliver", 0.0, "pending")]),
            drawn=equal(timeline(single), [f"[#{'.' * 29}] deliver 0.00 s pending"]),
            of_no_bars=equal(timeline([]), []),
        ),
    ]  # fmt: skip


@nexusrpc.service
class Weather:
    forecast: nexusrpc.Operation[str, str]


@nexusrpc.handler.service_handler(service=Weather)
class WeatherHandler:
    @nexusrpc.handler.sync_operation
    async def forecast(self, context: nexusrpc.handler.StartOperationContext, place: str) -> str:
        if place == "sea":
            raise nexusrpc.OperationError("nobody looks there", state=nexusrpc.OperationErrorState.FAILED)
        return "sun"


@workflow.defn
class Outing:
    @workflow.run
    async def run(self, endpoint: str) -> str:
        client = workflow.create_nexus_client(service=Weather, endpoint=endpoint)
        weather = await client.execute_operation(Weather.forecast, "land")
        with contextlib.suppress(NexusOperationError):
            await client.execute_operation(Weather.forecast, "sea")
        return weather


OF_NEXUS = "operations of Nexus are drawn, too, those that fail as well"


@piece(holds(OF_NEXUS))
async def nexus(lab: Lab) -> Evidence:
    """On a server of our own: an endpoint belongs to a whole server, and not to a namespace."""
    async with lab.private_server() as server:
        queue = f"{lab.id}-nexus"
        endpoint = await lab.nexus_endpoint(server, queue)
        handlers = [WeatherHandler()]
        async with lab.worker([Outing], server=server, task_queue=queue, nexus_service_handlers=handlers):
            handle = await lab.start(Outing.run, endpoint, name="nexus", server=server, task_queue=queue)
            how = await ended(handle)
        history, found = await export(handle)
    return holds(
        OF_NEXUS,
        result=equal(how.result, "sun"),
        bars=equal([(bar.name, bar.how) for bar in found], [("forecast", "completed"), ("forecast", "failed")]),
        that_differ_from_the_events=equal(unlike(found, history), 0),
    )


@activity.defn
async def do_everything() -> list[str]:
    """Three steps inside one activity."""
    return [await do_step(Step(name, 0.1)) for name in ("reserve", "quote", "charge")]


@workflow.defn
class FulfilAtOnce:
    @workflow.run
    async def run(self) -> list[str]:
        return await workflow.execute_activity(do_everything, start_to_close_timeout=timedelta(seconds=30))


async def all_at_once(lab: Lab) -> Evidence:
    handle = await lab.start(FulfilAtOnce.run, name="at-once")
    how = await ended(handle)
    _, found = await export(handle)
    return control(
        "the same steps inside one activity are not seen: one bar",
        steps=equal(how.result, ["reserve", "quote", "charge"]),
        bars=equal([bar.name for bar in found], ["do_everything"]),
    )


@workflow.defn
class Refund:
    """Hangs on an activity; meanwhile it can be asked, and told off."""

    def __init__(self) -> None:
        self.note = "waiting for the bank"

    @workflow.run
    async def run(self) -> None:
        await workflow.execute_activity(
            call_bank,
            start_to_close_timeout=timedelta(minutes=2),
            retry_policy=RetryPolicy(initial_interval=timedelta(milliseconds=100)),
        )

    @workflow.query
    def state(self) -> str:
        return self.note

    @workflow.update
    def rename(self, note: str) -> str:
        self.note = note
        return note

    @rename.validator
    def check(self, note: str) -> None:
        if not note:
            raise ValueError("a note needs words")


@activity.defn
async def call_bank() -> None: ...


async def under_way(lab: Lab) -> list[Evidence]:
    queue, gate = f"{lab.id}-bank", lab.gate("bank")
    faults = [fail("call_bank", 2, why="the bank is closed"), hold("call_bank", gate)]
    async with lab.worker([Refund], [call_bank], task_queue=queue, faults=faults):
        handle = await lab.start(Refund.run, name="pending", task_queue=queue)
        await until(lambda: len(lab.calls(handle.id)) == 3, "the third attempt has begun")
        described = await pending(handle)
        shown = json.loads((await lab.command("workflow", "describe", "-w", handle.id, "-o", "json")).out)
        before = await history_of(handle)
        asked = [await handle.query(Refund.state) for _ in range(3)]
        refused = [await said(handle.execute_update(Refund.rename, "")) for _ in range(2)]
        after = await history_of(handle)
        await handle.execute_update(Refund.rename, "the bank calls back")
        later = await history_of(handle)
        open_gate(gate)
        await ended(handle)
    by_cli = [(one["attempt"], one["lastFailure"]["message"]) for one in shown["pendingActivities"]]
    return [
        holds(
            "what is under way is described before it is in the history: attempt and last failure",
            calls=equal([call.attempt for call in lab.calls(handle.id)], [1, 2, 3]),
            client=equal([(one.attempt, one.last_failure.message) for one in described], [(3, "the bank is closed")]),
            command_line=equal(by_cli, [(3, "the bank is closed")]),
            attempts_in_the_history=equal(len(event_times(before, "ACTIVITY_TASK_STARTED")), 0),
        ),
        limit(
            "queries and refused updates leave no trace in the history: who asked cannot be seen later",
            queries_answered=len(asked),
            updates_refused=equal(refused, ["ValueError: a note needs words"] * 2),
            events_added=equal(len(after) - len(before), 0),
            by_an_accepted_update=len(later) - len(after),
        ),
    ]


@workflow.defn
class ManyTimers:
    @workflow.run
    async def run(self, timers: int) -> None:
        await asyncio.gather(*(asyncio.sleep(0.001) for _ in range(timers)))


TIMERS = 500


async def long_history(lab: Lab) -> Evidence:
    handle = await lab.start(ManyTimers.run, TIMERS, name="long", task_timeout=timedelta(seconds=30))
    await ended(handle)
    begun = time.monotonic()
    events = await history_of(handle)
    took = time.monotonic() - begun
    again = WorkflowHistory.from_json(handle.id, json.dumps({"events": events}))
    found = bars(events)
    return holds(
        "a history of 1,000 events is read whole, kept as JSON and drawn",
        events=at_least(len(events), 1000),
        gaps=equal([number for number, event in enumerate(events, 1) if event["eventId"] != str(number)], []),
        read_in=figure(took, "s"),
        bars=equal(len(timeline(found)), TIMERS),
        that_differ_from_the_events=equal(unlike(found, again), 0),
        read_back_from_JSON=equal(json.loads(again.to_json())["events"] == events, True),
    )


@OB.item("OB-03", "History visualisation")
async def history_visualisation(lab: Lab) -> AsyncIterator[Evidence]:
    """Histories are read by two programs, compared event by event and with a ledger, and drawn."""
    workflows = [Fulfil, Deliver, Everything, Failing, FulfilAtOnce, ManyTimers]
    async with lab.worker(
        workflows,
        [do_step, do_everything],
        faults=drawing_faults(lab),
        **PROMPT,
    ):
        parts = (drawn, every_kind, nexus, all_at_once, under_way, long_history)
        async for evidence in side_by_side(*(part(lab) for part in parts)):
            yield evidence
    yield native(
        "the history is there for every run, for client and command line; the drawing in a terminal is built here",
        WorkflowHandle.fetch_history,
        WorkflowHistory.from_json,
        WorkflowHistory.to_json,
        WorkflowHandle.describe,
        (workflow.execute_activity, "summary"),
        (workflow.execute_child_workflow, "static_summary"),
        "temporal workflow show",
        "temporal workflow describe",
        adds=[f"{bars.__name__}() and {timeline.__name__}() (the Web UI draws its own)"],
    )


# OB-04 OpenTelemetry ---------------------------------------------------------------------------------
# With the SDK's plugin one trace leads from the caller through workflow, activity and child, and stays
# one when a worker dies in the middle. Without it every process begins traces of its own.


@dataclass
class Question:
    text: str


class Model(Protocol):
    """Whatever answers: gives its answer, and the tokens in and out."""

    def answer(self, text: str) -> tuple[str, int, int]: ...


class Answers:
    def __init__(self, model: Model) -> None:
        self.model = model

    @activity.defn
    async def ask_model(self, question: Question) -> str:
        """Each attempt has a span of its own, named as OpenTelemetry's conventions for generative AI have it."""
        attributes = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "local", "gen_ai.request.model": "tiny"}
        tracer = trace.get_tracer("answers")
        with tracer.start_as_current_span("chat tiny", kind=trace.SpanKind.CLIENT, attributes=attributes) as span:
            answer, tokens_in, tokens_out = self.model.answer(question.text)
            span.set_attribute("gen_ai.usage.input_tokens", tokens_in)
            span.set_attribute("gen_ai.usage.output_tokens", tokens_out)
        return answer


@activity.defn
async def publish(page: str) -> None:
    with trace.get_tracer("answers").start_as_current_span("write page"):
        await asyncio.sleep(0)


@workflow.defn
class Publish:
    @workflow.run
    async def run(self, page: str) -> None:
        await workflow.execute_activity(publish, page, start_to_close_timeout=timedelta(seconds=30))


@workflow.defn
class Reply:
    """Asks the model, waits until somebody has released the answer, and publishes it in a child workflow."""

    def __init__(self) -> None:
        self.released = False

    @workflow.run
    async def run(self, question: Question) -> str:
        answer = await workflow.execute_activity_method(
            Answers.ask_model, question, start_to_close_timeout=timedelta(seconds=30)
        )
        # Through the plugin a workflow's own span may last over timers, crashes and replays.
        with trace.get_tracer("answers").start_as_current_span("decide"):
            await workflow.wait_condition(lambda: self.released)
            await workflow.execute_child_workflow(Publish.run, answer)
        return answer

    @workflow.signal
    def release(self) -> None:
        self.released = True


def send_spans(exporter: SpanExporter, service: str) -> None:
    """What a process does once, at its start: its spans are sent in the background. The provider knows of replays."""
    provider = temporal_tracing.create_tracer_provider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=50))
    trace.set_tracer_provider(provider)


def flush_spans() -> None:
    """What a process does at its end; flushing is not part of the API, only of the SDK."""
    trace.get_tracer_provider().force_flush()  # type: ignore[attr-defined]


def traced(client: Client) -> Client:
    """The same client, whose calls and whose workers make spans and carry them on."""
    config = client.config()
    config["plugins"] = [*config["plugins"], temporal_tracing.OpenTelemetryPlugin(add_temporal_spans=True)]
    return Client(**config)


class Backwards:
    """A model for the example: a local function."""

    def answer(self, text: str) -> tuple[str, int, int]:
        words = text.split()
        return " ".join(reversed(words)), len(words), len(words)


async def example_ob_04(client: Client) -> None:
    # To a collector: OTLPSpanExporter("http://localhost:4318/v1/traces") of opentelemetry-exporter-otlp-proto-http
    send_spans(ConsoleSpanExporter(formatter=lambda span: f"{span.name} {span.context.trace_id:x}\n"), "answers")
    client, answers = traced(client), Answers(Backwards())
    parts: Any = {"workflows": [Reply, Publish], "activities": [answers.ask_model, publish]}
    async with Worker(client, task_queue="answers", **parts):
        with trace.get_tracer("answers").start_as_current_span("customer asks"):
            id, question = f"answer-{uuid.uuid4()}", Question("why is the sky blue")
            handle = await client.start_workflow(Reply.run, question, id=id, task_queue="answers")
            await handle.signal(Reply.release)
            await handle.result()
    flush_spans()


# OB-04 put to the test -------------------------------------------------------------------------------


class Overloaded(Backwards):
    """A model that is overloaded when it is asked for the first time, and notes in a file what it is asked."""

    def __init__(self, ledger: str) -> None:
        self.ledger = ledger

    def answer(self, text: str) -> tuple[str, int, int]:
        note(self.ledger, text)
        if len(notes(self.ledger)) == 1:
            raise ApplicationError("the model is overloaded", type="Overloaded")
        return super().answer(text)


def hear_spans(ledger: str, posted: bytes) -> None:
    """What a collector for OTLP over HTTP is sent: every span goes to the ledger, one line of JSON each."""
    for resource in ExportTraceServiceRequest.FromString(posted).resource_spans:
        service = {one.key: one.value.string_value for one in resource.resource.attributes}["service.name"]
        for span in (one for scope in resource.scope_spans for one in scope.spans):
            found = {
                "trace": span.trace_id.hex(),
                "id": span.span_id.hex(),
                "parent": span.parent_span_id.hex(),
                "name": span.name,
                "failed": span.status.code == span.status.STATUS_CODE_ERROR,
                "begin": span.start_time_unix_nano,
                "end": span.end_time_unix_nano,
                "service": service,
                "attributes": {one.key: value_of(one.value) for one in span.attributes},
                "errors": [value_of(one.value) for event in span.events for one in event.attributes
                           if one.key == "exception.message"],
            }  # fmt: skip
            note(ledger, json.dumps(found))


def value_of(value: Any) -> str | int:
    """The value of an attribute: text or number."""
    return str(value.string_value) if value.HasField("string_value") else int(value.int_value)


def with_spans(collector: str, service: str, plugged: bool) -> dict[str, Any]:
    """How a process of the trials connects, once it sends its spans to the collector."""
    send_spans(OTLPSpanExporter(f"{collector}/v1/traces", timeout=5), service)
    return {"plugins": [temporal_tracing.OpenTelemetryPlugin(add_temporal_spans=True)] if plugged else []}


async def caller(target: Target, connecting: Callable[[], Mapping[str, Any]], queue: str, gate: str) -> None:
    """The process that starts the workflow, and releases it when the gate is open."""
    client = await connect(target, **connecting())
    with trace.get_tracer("answers").start_as_current_span("customer asks"):
        handle = await client.start_workflow(Reply.run, Question("why is the sky blue"), id=queue, task_queue=queue)
        await until(lambda: Path(gate).exists(), "the gate is open")
        await handle.signal(Reply.release)
        await handle.result()
    flush_spans()


# (span, the span it stands under): what one question looks like. The first attempt fails.
TREE = Counter(
    [
        ("customer asks", ""),
        ("StartWorkflow:Reply", "customer asks"),
        ("RunWorkflow:Reply", "StartWorkflow:Reply"),
        ("StartActivity:ask_model", "RunWorkflow:Reply"),
        *[("RunActivity:ask_model", "StartActivity:ask_model"), ("chat tiny", "RunActivity:ask_model")] * 2,
        ("decide", "RunWorkflow:Reply"),
        ("SignalWorkflow:release", "customer asks"),
        ("HandleSignal:release", "SignalWorkflow:release"),
        ("StartChildWorkflow:Publish", "decide"),
        ("RunWorkflow:Publish", "StartChildWorkflow:Publish"),
        ("StartActivity:publish", "RunWorkflow:Publish"),
        ("RunActivity:publish", "StartActivity:publish"),
        ("write page", "RunActivity:publish"),
    ]
)
BY_CALLER = ["SignalWorkflow:release", "StartWorkflow:Reply", "customer asks"]
OWN_SPANS = ["chat tiny", "chat tiny", "customer asks", "decide", "write page"]
LASTING = ["RunWorkflow:Reply", "decide"]  # spans of the workflow's own that are open while it waits
Spans = Sequence[Mapping[str, Any]]


def named(found: Spans, *names: str) -> list[Mapping[str, Any]]:
    return [span for span in found if span["name"] in names]


def tree_facts(found: Spans) -> dict[str, Fact]:
    """A trace against what it should be; a parent that never came is called so."""
    names = {span["id"]: span["name"] for span in found} | {"": ""}
    tree = Counter((span["name"], names.get(span["parent"], "unknown")) for span in found)
    return {
        "traces": equal(len({span["trace"] for span in found}), 1),
        "spans": equal(len({span["id"] for span in found}), TREE.total()),
        "missing": equal(sorted((TREE - tree).elements()), []),
        "too_many": equal(sorted((tree - TREE).elements()), []),
    }


@dataclass(frozen=True)
class Traced:
    """One question over processes of its own, and the collector's ledger of it."""

    lab: Lab
    name: str
    plugged: bool = True

    @property
    def queue(self) -> str:
        return f"{self.lab.id}-{self.name}"

    def file(self, what: str) -> str:
        return self.lab.file(f"{self.name}-{what}")

    @property
    def spans(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in notes(self.file("spans"))]

    async def arrived(self, expected: int) -> list[dict[str, Any]]:
        """The spans, once there are so many and no more come for a while; the caller judges."""
        with contextlib.suppress(TimeoutError):
            await until(lambda: len(self.spans) >= expected, "the spans have come", 10)
        await asyncio.sleep(0.5 * slowness())  # ten times what a batch waits: a duplicate would be here
        return self.spans

    def worker(self, url: str) -> contextlib.AbstractAsyncContextManager[Child]:
        answers = Answers(Overloaded(self.file("model")))
        return self.lab.worker_process(
            [Reply, Publish],
            [answers.ask_model, publish],
            task_queue=self.queue,
            connect_options=partial(with_spans, url, "worker", self.plugged),
            interceptors=[Plain(self.file("entered"))],
            max_cached_workflows=0,  # every workflow task begins with a replay of the whole history
        )

    async def run(self, spans: int, killed: bool = False) -> list[dict[str, Any]]:
        """Ask, release and publish. Returns the spans that had come while the workflow waited."""
        with listening(partial(hear_spans, self.file("spans"))) as url:
            connecting = partial(with_spans, url, "caller", self.plugged)
            async with self.lab.process(
                caller, self.lab.target, connecting, self.queue, self.file("gate")
            ) as calling, contextlib.AsyncExitStack() as workers:  # fmt: skip
                worker = await workers.enter_async_context(self.worker(url))
                handle = self.lab.client.get_workflow_handle(self.queue)
                await until(lambda: len(notes(self.file("model"))) == 2, "the model was asked twice")
                await until(lambda: waits(handle, 1), "the workflow waits")
                before = await self.arrived(6) if killed else []
                if killed:
                    await worker.kill()
                    await workers.enter_async_context(self.worker(url))
                open_gate(self.file("gate"))
                await calling.wait(80)
                await self.arrived(spans)
        return before


# As OpenTelemetry's semantic conventions for generative AI spell them, and what the model really took and gave.
GENAI = {
    gen_ai.GEN_AI_OPERATION_NAME: "chat",
    gen_ai.GEN_AI_PROVIDER_NAME: "local",
    gen_ai.GEN_AI_REQUEST_MODEL: "tiny",
    gen_ai.GEN_AI_USAGE_INPUT_TOKENS: 5,
    gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS: 5,
}


async def one_trace(lab: Lab) -> list[Evidence]:
    """One question, over two processes: what the collector got is compared with what should be there."""
    trial = Traced(lab, "plain")
    await trial.run(TREE.total())
    found, run_id = trial.spans, (await lab.client.get_workflow_handle(trial.queue).describe()).run_id
    inside = named(found, "RunWorkflow:Reply", "StartActivity:ask_model", "RunActivity:ask_model")
    attempts = sorted(named(found, "RunActivity:ask_model"), key=lambda span: span["begin"])
    chats = sorted(named(found, "chat tiny"), key=lambda span: span["begin"])
    return [
        works(
            "one trace from the caller through workflow, activity and child workflow, each span under the right one",
            **tree_facts(found),
            from_the_callers_process=equal(sorted(one["name"] for one in found if one["service"] == "caller"),
                                           BY_CALLER),
            from_the_workers=equal(len([one for one in found if one["service"] == "worker"]), 13),
        ),
        works(
            "the spans carry workflow id, run id and activity id",
            spans_of_workflow_and_activity=equal(len(inside), 4),
            workflow=equal({one["attributes"].get("temporalWorkflowID") for one in inside}, {trial.queue}),
            run=equal({one["attributes"].get("temporalRunID") for one in inside}, {run_id}),
            activity=equal([one["attributes"].get("temporalActivityID") for one in attempts], ["1", "1"]),
        ),
        holds(
            "a failed attempt is a span of its own with an error, beside the one that went well",
            the_model_was_asked=equal(len(notes(trial.file("model"))), 2),
            failed=equal([span["failed"] for span in attempts], [True, False]),
            errors=equal([span["errors"] for span in attempts], [["Overloaded: the model is overloaded"], []]),
        ),
        holds(
            "a model call is a span with GenAI attributes, under its activity",
            names={name: value for one in chats[-1:] for name, value in one["attributes"].items()},
            of_the_call_that_went_well=equal([one["attributes"] for one in chats[1:]], [GENAI]),
        ),
    ]  # fmt: skip


async def killed_worker(lab: Lab) -> list[Evidence]:
    """The worker dies while the workflow waits; another one replays it, and goes on."""
    trial = Traced(lab, "killed")
    before = await trial.run(TREE.total(), killed=True)
    history = (await lab.client.get_workflow_handle(trial.queue).fetch_history()).events
    tasks = [
        one.event_time.ToNanoseconds() for one in history if one.HasField("workflow_task_started_event_attributes")
    ]
    lasted = [(span["begin"], span["end"]) for span in named(trial.spans, "RunWorkflow:Reply")]
    return [
        holds(
            "after SIGKILL of the worker and replays no span is doubled, and it is still one trace",
            **tree_facts(trial.spans),
            workflow_code_run=at_least(notes(trial.file("entered")).count(trial.queue), 3),
            the_model_was_asked=equal(len(notes(trial.file("model"))), 2),
            # Workflow code has the time of its task, also in a replay: so it begins before the kill, to the nanosecond.
            the_workflows_span_begins_with_its_first_task=equal([begin - tasks[0] for begin, _ in lasted], [0]),
            and_lasts=[figure((end - begin) / 1e9, "s") for begin, end in lasted],
        ),
        limit(
            "a workflow's spans appear only when they end: a trace of a running workflow has no root in the middle",
            spans_while_the_workflow_waited=len(before),
            of_its_own=equal([span["name"] for span in named(before, *LASTING)], []),
            after_its_end=sorted(span["name"] for span in named(trial.spans, *LASTING)),
        ),
    ]


async def torn_apart(lab: Lab) -> Evidence:
    trial = Traced(lab, "torn", plugged=False)
    await trial.run(len(OWN_SPANS))
    return control(
        "without the plugin the same spans of one's own stand in a trace each",
        spans=equal(sorted(span["name"] for span in trial.spans), OWN_SPANS),
        traces=equal(len({span["trace"] for span in trial.spans}), len(OWN_SPANS)),
    )


@OB.item("OB-04", "OpenTelemetry", seconds=140)
async def opentelemetry(lab: Lab) -> AsyncIterator[Evidence]:
    """Caller and worker are a process each; the collector's ledger holds what they exported."""
    requires("temporalio.contrib.opentelemetry.OpenTelemetryPlugin")
    async for evidence in side_by_side(one_trace(lab), killed_worker(lab), torn_apart(lab)):
        yield evidence
    yield native(
        "one plugin on the client, and a tracer provider that knows of replay",
        (Client.connect, "plugins"),
        (temporal_tracing.OpenTelemetryPlugin, "add_temporal_spans"),
        temporal_tracing.create_tracer_provider,
    )


# OB-05 Alerts ----------------------------------------------------------------------------------------
# Temporal raises no alerts. What an alert needs is in its metrics; the rules, and the programs that
# follow them, are the user's. Rules to begin with are in docs/alerts, and proven here with these settings.

EXAMPLE_OB_05 = """
# prometheus.yml: scrape every worker and the server, and follow docs/alerts/temporal_rules.yml beside this file.
# A worker offers its metrics where its client has such a runtime (a dev server: --metrics-port):
#   Runtime(telemetry=TelemetryConfig(metrics=PrometheusConfig(bind_address="0.0.0.0:9464", durations_as_seconds=True)))
global: {scrape_interval: 15s, evaluation_interval: 15s}
rule_files: [temporal_rules.yml]
alerting: {alertmanagers: [{static_configs: [{targets: ["alertmanager:9093"]}]}]}
scrape_configs:
  - job_name: temporal-workers
    static_configs: [{targets: ["worker-1:9464", "worker-2:9464"]}]
  - job_name: temporal-server
    static_configs: [{targets: ["temporal:9090"]}]
    metric_relabel_configs: [{source_labels: [__name__], regex: "approximate_.*", action: keep}]
---
# alertmanager.yml: who is told, of the end of an alert, too.
route: {receiver: webhook, group_by: [alertname], group_wait: 30s, group_interval: 5m, repeat_interval: 4h}
receivers: [{name: webhook, webhook_configs: [{url: "http://pager:8080/", send_resolved: true}]}]
"""


# OB-05 put to the test -------------------------------------------------------------------------------

RULES = HERE / "docs" / "alerts" / "temporal_rules.yml"
RULES_TEST = RULES.with_name("temporal_rules_test.yml")

# The shipped rules wait for minutes, as one wants it in production. Here they must be quick: nothing but
# these durations is replaced.
QUICK = {
    "[5m]": "[6s]",
    "[20m]": "[12s]",
    "for: 10m": "for: 1s",
    "for: 5m": "for: 1s",
    "for: 2m": "for: 1s",
    "for: 1m": "for: 1s",
    "> 300": "> 1",
}


class Courier:
    """Takes parcels, unless a file says that it is away; notes each call."""

    def __init__(self, away: str, ledger: str) -> None:
        self.away, self.ledger = away, ledger

    @activity.defn
    async def call_courier(self) -> None:
        away = Path(self.away).exists()
        note(self.ledger, "failed" if away else "done")
        if away:
            raise ApplicationError("the courier is away")


@workflow.defn
class SendParcel:
    @workflow.run
    async def run(self) -> None:
        again = RetryPolicy(initial_interval=timedelta(milliseconds=300), backoff_coefficient=1)
        await workflow.execute_activity_method(
            Courier.call_courier, start_to_close_timeout=timedelta(seconds=30), retry_policy=again
        )


@workflow.defn
class Invoice:
    """Its code is broken while the file exists. An error that is not Temporal's does not fail a workflow."""

    @workflow.run
    async def run(self, broken: str) -> None:
        with workflow.unsafe.sandbox_unrestricted():
            bad = os.path.exists(broken)  # never do this: here it stands for a bad deployment, and its repair
        if bad:
            raise ValueError("a bug")


def hear_alerts(ledger: str, posted: bytes) -> None:
    """The webhook: notes every alert that comes, such as "firing TemporalWorkerMissing 127.0.0.1:9464"."""
    for alert in json.loads(posted)["alerts"]:
        labels = alert["labels"]
        about = (labels.get(name) for name in ("activity_type", "workflow_type", "taskqueue", "instance", "task_queue"))
        note(ledger, f"{alert['status']} {labels['alertname']} {next(filter(None, about), '')}")


@dataclass(frozen=True)
class Plant:
    """The system that is watched: a server, two workers, their queues, and what is broken in it."""

    lab: Lab
    server: Server
    server_port: int
    counts_backlog: bool  # the server's metrics say how much waits
    ports: tuple[int, int] = field(default_factory=lambda: (free_port(), free_port()))

    @property
    def away(self) -> str:
        return self.lab.file("courier-is-away")

    @property
    def ledger(self) -> list[str]:
        return notes(self.lab.file("courier"))

    def queue(self, number: int) -> str:
        return f"{self.lab.id}-{('parcels', 'mails')[number]}"

    def worker(self, number: int) -> contextlib.AbstractAsyncContextManager[Child]:
        return self.lab.worker_process(
            [SendParcel, Invoice],
            [Courier(self.away, self.lab.file("courier")).call_courier],
            server=self.server,
            task_queue=self.queue(number),
            connect_options=partial(with_metrics, self.ports[number]),
        )

    async def start(self, run: Any, *arguments: Any, name: str, queue: int = 0) -> Handle:
        return await self.lab.start(run, *arguments, name=name, server=self.server, task_queue=self.queue(queue))

    async def deliver(self, name: str, parcels: int = 6) -> list[str]:
        """Send parcels, and wait until they are sent. Returns how the runs ended."""
        handles = [await self.start(SendParcel.run, name=f"{name}-{number}") for number in range(parcels)]
        return [(await ended(handle)).status for handle in handles]

    async def attempts(self) -> tuple[float, float]:
        """(failed attempts, all attempts) of the courier's activity so far, by the first worker's metrics."""
        now = await scrape(self.ports[0])
        names = ("temporal_activity_execution_failed", "temporal_activity_execution_latency_count")
        failed, every = (now.found(name, activity_type="call_courier") for name in names)
        return sum(failed), sum(every) if every else math.nan  # a counter is not there before it has counted

    async def backlog(self, number: int) -> tuple[float, float]:
        """(tasks that wait in a queue, the age of the oldest in seconds), by the server's metrics."""
        names = ("approximate_backlog_count", "approximate_backlog_age_seconds")
        seen, queue = await scrape(self.server_port, *names), label(self.queue(number))
        # A queue is kept in several partitions, which count for themselves.
        return seen.value(names[0], taskqueue=queue), max(seen.found(names[1], taskqueue=queue), default=math.nan)

    async def last_polled(self, number: int) -> float:
        """When a worker last asked for tasks of a queue, by the server."""
        request = DescribeTaskQueueRequest(
            namespace=self.server.client.namespace,
            task_queue=TaskQueue(name=self.queue(number)),
            task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
        )
        described = await self.server.client.workflow_service.describe_task_queue(request)
        return max((one.last_access_time.ToNanoseconds() / 1e9 for one in described.pollers), default=math.nan)

    async def served(self) -> list[int]:
        """The HTTP status of both workers' metrics; 0 where nobody answers."""
        return [(await http(f"http://127.0.0.1:{port}/metrics")).status for port in self.ports]

    def expected(self) -> list[str]:
        """What is broken here, each by the alert that must say so, and what that must be about."""
        return [
            "TemporalActivityFailures call_courier",
            f"TemporalTasksStuck {label(self.queue(1))}",
            f"TemporalWorkerMissing 127.0.0.1:{self.ports[1]}",
            "TemporalWorkflowTasksFailing Invoice",
        ]


PROGRAMS = {"prometheus": ["prometheus"], "promtool": ["promtool"],
            "alertmanager": ["prometheus-alertmanager", "alertmanager"]}  # fmt: skip


def prometheus_programs() -> dict[str, str]:
    """Prometheus' three programs, as Debian or their makers name them; those that are there."""
    found = {program: next(filter(None, map(shutil.which, names)), None) for program, names in PROGRAMS.items()}
    return {program: path for program, path in found.items() if path}


def adapted(text: str, changes: Mapping[str, str]) -> str:
    for old, new in changes.items():
        assert old in text, f"{old!r} is no longer in what is shipped"
        text = text.replace(old, new)
    return text


@dataclass(frozen=True)
class Watch:
    """Prometheus and Alertmanager at work: where Prometheus is asked, and what the webhook was told."""

    url: str
    ledger: str

    async def query(self, path: str) -> Any:
        answer = await http(f"{self.url}/api/v1/{path}")
        return answer.json["data"] if answer.status == 200 else {}

    async def evaluated(self, since: float, healthy: bool = True) -> bool:
        """Whether everything was scraped, and every rule evaluated, without an error, since a moment."""
        targets = (await self.query("targets")).get("activeTargets", [])
        groups = (await self.query("rules")).get("groups", [])
        rules = [rule for group in groups for rule in group["rules"]]
        times = [one["lastScrape"] for one in targets] + [one["lastEvaluation"] for one in rules]
        fine = all(one["health"] in ("up", "ok") for one in [*(targets if healthy else []), *rules])
        return fine and len(targets) == 3 and bool(rules) and min(map(moment_of, times)) > since

    async def looked_again(self) -> None:
        """Wait until every rule was evaluated twice more."""
        for _ in range(2):
            since = time.time()
            await until(partial(self.evaluated, since, healthy=False), "every rule was evaluated again", 30)

    def told(self, status: str = "") -> list[str]:
        """The alerts of which the webhook was last told that they are firing, or resolved; without, all ever told."""
        last = {name: how for how, _, name in (line.partition(" ") for line in notes(self.ledger))}
        return sorted(name for name, how in last.items() if status in ("", how))


def moment_of(text: str) -> float:
    """A time as Prometheus writes it, with nanoseconds."""
    return datetime.fromisoformat(text).timestamp()


@contextlib.asynccontextmanager
async def watching(plant: Plant, programs: Mapping[str, str]) -> AsyncIterator[Watch | None]:
    """Prometheus and Alertmanager as processes, and the webhook; None where no programs are given."""
    if not programs:
        yield None
        return
    lab, ports, ledger = plant.lab, (free_port(), free_port()), plant.lab.file("webhook")
    with listening(partial(hear_alerts, ledger)) as webhook:
        prometheus, _, alertmanager = EXAMPLE_OB_05.partition("---\n")
        files = {
            "temporal_rules.yml": adapted(RULES.read_text(encoding="utf-8"), QUICK),
            "prometheus.yml": adapted(prometheus, {
                "scrape_interval: 15s, evaluation_interval: 15s": "scrape_interval: 1s, evaluation_interval: 500ms",
                "alertmanager:9093": f"127.0.0.1:{ports[1]}", "temporal:9090": f"127.0.0.1:{plant.server_port}",
                "worker-1:9464": f"127.0.0.1:{plant.ports[0]}", "worker-2:9464": f"127.0.0.1:{plant.ports[1]}",
            }),
            "alertmanager.yml": adapted(alertmanager, {
                "group_wait: 30s, group_interval: 5m": "group_wait: 0s, group_interval: 1s",
                "http://pager:8080": webhook,
            }),
        }  # fmt: skip
        for name, text in files.items():
            Path(lab.file(name)).write_text(text, encoding="utf-8")
        async with (
            lab.program(
                programs["alertmanager"], f"--config.file={lab.file('alertmanager.yml')}",
                f"--storage.path={lab.file('alertmanager')}", f"--web.listen-address=127.0.0.1:{ports[1]}",
                "--cluster.listen-address=", "--log.level=warn",
            ),
            lab.program(
                programs["prometheus"], f"--config.file={lab.file('prometheus.yml')}",
                f"--storage.tsdb.path={lab.file('prometheus')}", f"--web.listen-address=127.0.0.1:{ports[0]}",
                "--log.level=warn",
            ),
        ):  # fmt: skip
            yield Watch(f"http://127.0.0.1:{ports[0]}", ledger)


WAITING = 4  # workflows that are started where no worker is


async def healthy(plant: Plant, watch: Watch | None) -> Evidence:
    """Parcels are sent and nothing is wrong: no value is out of order, and no alert is raised."""
    sent, (handle,) = await plant.deliver("well"), [await plant.start(SendParcel.run, name="mail", queue=1)]
    await ended(handle)
    ran = Counter(plant.ledger)
    await until(lambda: counted(plant, ran["done"] - 1), "the worker has counted them")
    facts = {
        "sent": equal(sent, ["COMPLETED"] * 6),
        "failed": equal((await plant.attempts())[0], 0),
        "metrics": equal(await plant.served(), [200, 200]),
    }
    if plant.counts_backlog:
        await until(lambda: backlog_is(plant, 0), "the server has said how much waits")
        facts |= {"waiting": equal((await plant.backlog(1))[0], 0)}
    if watch:
        since = time.time()
        await until(lambda: watch.evaluated(since), "Prometheus has seen the healthy run")
        facts |= {"alerts_pending_or_firing": equal((await watch.query("alerts"))["alerts"], [])}
        facts |= {"told_to_the_webhook": equal(watch.told(), [])}
    return control("a healthy run raises nothing", **facts)


async def counted(plant: Plant, attempts: int) -> bool:
    return (await plant.attempts())[1] >= attempts


async def backlog_is(plant: Plant, count: int, age: float = 0) -> bool:
    waiting, oldest = await plant.backlog(1)
    return waiting == count and (oldest >= age or not age)


async def by_value(plant: Plant, before: tuple[float, float], killed: float) -> list[Evidence]:
    """While things are broken: the numbers that rules can be written on, against what really happens."""
    noted = len(plant.ledger)
    await until(lambda: len(plant.ledger) >= noted + 6, "the courier was asked in vain")
    ledger_before = Counter(plant.ledger)
    failed, attempts = (now - then for now, then in zip(await plant.attempts(), before, strict=True))
    ledger_after = Counter(plant.ledger)
    waiting = await nobody_takes(plant, killed)
    tasks = "temporal_workflow_task_execution_failed"
    stuck = (await scraped(plant.ports[0], lambda seen: bool(seen.found(tasks)), tasks)).value(
        tasks, workflow_type="Invoice"
    )
    return [
        works(
            "the failure rate is in the worker's metrics",
            # Attempts of three activities go on while it is scraped, and are noted before they are counted.
            failed=between(failed, ledger_before["failed"] - 3, ledger_after["failed"]),
            in_the_ledger=[ledger_before["failed"], ledger_after["failed"]],
            of_attempts=between(attempts, max(failed, 2), failed + 1),
        ),
        waiting,
        works("workflow tasks whose code throws are in the worker's metrics", failed=at_least(stuck, 1)),
        await worker_is_missing(plant),
    ]


async def worker_is_missing(plant: Plant) -> Evidence:
    """A process that is gone answers nowhere; but the server, too, tells who still asks for tasks."""
    begun, last = time.time(), [await plant.last_polled(number) for number in (0, 1)]
    # The facts show who asked, which is worth more than that it took too long.
    with contextlib.suppress(TimeoutError):
        await until(lambda: polled_since(plant, begun), "the living worker has asked for tasks", 20)
    now = [await plant.last_polled(number) for number in (0, 1)]
    return works(
        "a missing worker can be told from one that is there",
        metrics=equal(await plant.served(), [200, 0]),
        asked_for_tasks_meanwhile=equal([then < again for then, again in zip(last, now, strict=True)], [True, False]),
        watched_for=figure(time.time() - begun, "s"),
    )


async def polled_since(plant: Plant, moment: float) -> bool:
    return await plant.last_polled(0) > moment


NOT_COUNTED = "the server's metrics say how much waits only since Temporal 1.30"


async def nobody_takes(plant: Plant, killed: float) -> Evidence:
    claim = "tasks that nobody takes are in the server's metrics"
    if not plant.counts_backlog:
        return not_run("works", claim, NOT_COUNTED)
    # The facts show how many wait, which is worth more than that it took too long.
    with contextlib.suppress(TimeoutError):
        await until(lambda: backlog_is(plant, WAITING, 1), f"{WAITING} tasks wait", 20)
    (count, age), now = await plant.backlog(1), time.time()
    return works(
        claim,
        started_where_no_worker_is=equal(count, WAITING),
        the_oldest_waits=between(figure(age, "s"), 1, now - killed + 1),
    )


FIRES = "each fault fires its alert, from metrics over Prometheus and Alertmanager to a webhook"
RESOLVES = "each alert goes on until its own cause is mended, and then it is resolved"


async def alerted(plant: Plant, watch: Watch) -> Evidence:
    """The alerts reach the webhook, each once its rule has seen enough."""
    begun, expected = time.monotonic(), plant.expected()
    # The fact shows which alerts did come, which is worth more than that not all of them did.
    with contextlib.suppress(TimeoutError):
        await until(lambda: set(watch.told()) >= set(expected), "every alert has fired")
    return holds(
        FIRES,
        told_to_the_webhook=equal(watch.told(), expected),
        the_last=figure(time.monotonic() - begun, "s after the numbers were seen"),
        seconds_for_minutes=QUICK,
    )


async def resolved(watch: Watch, *alerts: str) -> float:
    """Wait until these alerts are resolved, and look again. Returns after how many seconds they were; NaN if never."""
    begun = time.monotonic()
    try:
        await until(lambda: set(watch.told("resolved")) >= set(alerts), "the alerts are resolved")
    except TimeoutError:
        return math.nan
    took = time.monotonic() - begun
    await watch.looked_again()
    return took


async def mended(plant: Plant, watch: Watch | None, alive: Child, broken: Sequence[Handle]) -> list[Evidence]:
    """First a worker comes back, and then the courier does and the bug is mended."""
    failures, stuck, missing, tasks = plant.expected()
    facts: dict[str, Any] = {}
    if watch:
        await watch.looked_again()
        facts["before_any_repair"] = equal(watch.told("resolved"), [])
    async with plant.worker(1):
        if watch:
            took = await resolved(watch, *({stuck, missing} & set(watch.told())))
            facts["a_worker_came_back"] = equal(watch.told("resolved"), [stuck, missing])
            facts["after"] = figure(took, "s")
            facts["still_firing"] = equal(watch.told("firing"), [failures, tasks])
        os.unlink(plant.away)
        how = [(await ended(handle)).status for handle in broken]
        before = await plant.attempts()
        sent = await plant.deliver("mended")
        await until(lambda: counted(plant, int(before[1]) + 5), "the worker has counted them")
        now, waiting = await plant.attempts(), (await plant.backlog(1))[0]
        left = {"tasks_waiting": equal(waiting, 0)} if plant.counts_backlog else {}
        if watch:
            took = await resolved(watch, *watch.told())
            facts["courier_and_code_were_mended"] = equal(watch.told("resolved"), plant.expected())
            facts["then_after"] = figure(took, "s")
            facts["left_in_Prometheus"] = equal((await watch.query("alerts"))["alerts"], [])
    repaired = holds(
        "after the repair what was stuck goes on by itself, and the numbers are as before; the worker whose attempts "
        "failed was never restarted",
        runs=equal(Counter(how), {"COMPLETED": len(broken)}),
        parcels_sent=equal(sent, ["COMPLETED"] * 6),
        attempts_that_failed_since=equal(now[0] - before[0], 0),
        **left,
        the_worker_runs=equal(alive.alive, True),
    )
    return [repaired, holds(RESOLVES, **facts)] if watch else [repaired]


async def rules_checked(programs: Mapping[str, str]) -> Evidence:
    """promtool reads the shipped files as they are, and plays series of half an hour to the rules."""
    claim = "promtool accepts the rules as they are shipped, and made-up half hours raise what they should"
    if "promtool" not in programs:
        return not_run("holds", claim, "promtool is not installed (Debian: apt install prometheus)")
    codes, printed = [], []
    for what, file in (("check", RULES), ("test", RULES_TEST)):
        process = await asyncio.create_subprocess_exec(
            programs["promtool"], what, "rules", file.name, cwd=file.parent,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        out, _ = await asyncio.wait_for(process.communicate(), 30 * slowness())
        codes.append(process.returncode)
        printed.append(" ".join(out.decode().split())[-120:])
    return holds(
        claim,
        exit_status=equal(codes, [0, 0]),
        check=contains(printed[0], f"SUCCESS: {RULES.read_text(encoding='utf-8').count('- alert:')} rules found"),
        test=contains(printed[1], "SUCCESS"),
    )


async def no_alerting(lab: Lab) -> list[Evidence]:
    """One limit each for the API and the command line; what cannot be read speaks of nothing, and so is seen."""
    groups = ("operator", "task-queue", "worker", "workflow")
    helps = await asyncio.gather(*(lab.cli(group, "--help") for group in groups))
    methods = [*dir(lab.client.workflow_service), *dir(lab.client.operator_service)]
    return [
        limit(
            "Temporal's API raises no alerts: Prometheus, the rules and who is told are the user's to run",
            methods_looked_at=len(methods),
            of_alerts=equal([name for name in methods if re.search("alert|webhook", name)], []),
        ),
        limit(
            "no command of Temporal's sets an alert",
            groups_looked_at=[group for group, one in zip(groups, helps, strict=True) if one.code == 0],
            of_alerts=equal(
                [word for one in helps for word in re.findall(r"(?i)\balert\w*|\bwebhook\w*", one.out)], []
            ),
        ),
    ]


async def both_served(plant: Plant) -> bool:
    return await plant.served() == [200, 200]


@OB.item("OB-05", "Alerts", seconds=200)
async def alerts(lab: Lab) -> AsyncIterator[Evidence]:
    """A healthy run; then a service fails, code breaks, a worker dies and tasks pile up; then each is repaired."""
    programs, server_port = prometheus_programs(), free_port()
    quick = {"matching.backlogMetricsEmitInterval": '"500ms"'}  # how often the server says how much waits
    async with lab.private_server(settings=quick, arguments=["--metrics-port", str(server_port)]) as server:
        major, minor = map(int, (await server_version(server.client)).split(".")[:2])
        plant = Plant(lab, server, server_port, counts_backlog=(major, minor) >= (1, 30))
        reason = "" if plant.counts_backlog else NOT_COUNTED
        if len(programs) < 3:
            reason = "prometheus or prometheus-alertmanager is not installed (Debian: apt install, by these names)"
        async with watching(plant, {} if reason else programs) as watch, plant.worker(0) as alive:
            async with plant.worker(1) as victim:
                await until(lambda: both_served(plant), "the workers' metrics are served")
                yield await healthy(plant, watch)
                before = await plant.attempts()
                note(plant.away, "away")  # the fault: the courier's service, and the code of Invoice
                await victim.kill()
            killed = time.time()
            broken = [await plant.start(SendParcel.run, name=f"late-{number}") for number in range(3)]
            broken += [await plant.start(Invoice.run, plant.away, name="bug")]
            broken += [await plant.start(SendParcel.run, name=f"unserved-{n}", queue=1) for n in range(WAITING)]
            for evidence in await by_value(plant, before, killed):
                yield evidence
            if watch:
                yield await alerted(plant, watch)
            else:
                yield not_run("holds", FIRES, reason)
                yield not_run("holds", RESOLVES, reason)
            for evidence in await mended(plant, watch, alive, broken):
                yield evidence
    yield await rules_checked(programs)
    for evidence in await no_alerting(lab):
        yield evidence
    yield native(
        "the numbers are in the metrics; the rules are not",
        (Client.connect, "runtime"),
        (TelemetryConfig, "metrics"),
        PrometheusConfig,
        "temporal server start-dev --metrics-port",
        adds=[f"{RULES.read_text(encoding='utf-8').count('- alert:')} rules for Prometheus"],
    )


# OB-06 Logging ---------------------------------------------------------------------------------------
# The SDK's loggers know which run and which attempt speaks, and are silent while code is replayed. A
# logger of one's own in workflow code repeats itself at every replay.


class JsonLines(logging.Formatter):
    """One JSON object a line: what the SDK's loggers know stands in fields of its own."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for source in ("temporal_workflow", "temporal_activity"):
            line |= getattr(record, source, {})
        if core := getattr(record, "temporal_log", None):
            line |= {"core": core.fields}
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_json(stream: TextIO) -> Runtime:
    """Every log of this process goes to one stream, Python's now, and the core's with the runtime that is returned."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # The ids have fields of their own, so they need not be in the message as well.
    workflow.logger.workflow_info_on_message = activity.logger.activity_info_on_message = False
    core = LoggingConfig(
        filter=TelemetryFilter(core_level="WARN", other_level="ERROR"),
        forwarding=LogForwardingConfig(logger=logging.getLogger("temporal-core"), append_log_fields_to_message=False),
    )
    return Runtime(telemetry=TelemetryConfig(logging=core))


class Reception:
    def __init__(self, greeting: Callable[[str], str]) -> None:
        self.greeting = greeting

    @activity.defn
    async def greet(self, name: str) -> str:
        activity.logger.info("greeting %s", name)
        return self.greeting(name)


@workflow.defn
class Welcome:
    def __init__(self) -> None:
        self.left = False

    @workflow.run
    async def run(self, name: str) -> None:
        workflow.logger.info("expecting %s", name)
        await workflow.execute_activity_method(Reception.greet, name, start_to_close_timeout=timedelta(seconds=30))
        await workflow.wait_condition(lambda: self.left)
        workflow.logger.info("goodbye %s", name)

    @workflow.signal
    def leave(self) -> None:
        self.left = True


async def example_ob_06(client: Client) -> None:
    client, reception = await reconnected(client, log_json(sys.stdout)), Reception("Hello, {}".format)
    async with Worker(client, task_queue="guests", workflows=[Welcome], activities=[reception.greet]):
        id = f"visit-{uuid.uuid4()}"
        handle = await client.start_workflow(Welcome.run, "Ada", id=id, task_queue="guests")
        await handle.signal(Welcome.leave)
        await handle.result()


# OB-06 put to the test -------------------------------------------------------------------------------

VISITORS = ("Ada", "Björn", "Chidi")


class Shy:
    """Greets, but one of the guests not at the first attempt; notes whom."""

    def __init__(self, ledger: str, shy_of: str) -> None:
        self.ledger, self.shy_of = ledger, shy_of

    def __call__(self, name: str) -> str:
        note(self.ledger, name)
        if name == self.shy_of and notes(self.ledger).count(name) == 1:
            raise ApplicationError("lost\nfor words")
        return f"Hello, {name}"


@workflow.defn
class Stumble:
    @workflow.run
    async def run(self) -> None:
        raise ValueError("a bug in workflow code")


def with_log(path: str) -> dict[str, Any]:
    """How a worker process connects whose logs are kept in a file, which it leaves open as long as it lives."""
    return {"runtime": log_json(open(path, "a", encoding="utf-8"))}


def logging_worker(lab: Lab, queue: str, stream: str) -> contextlib.AbstractAsyncContextManager[Child]:
    reception = Reception(Shy(lab.file("greeted"), "Chidi"))
    return lab.worker_process(
        [Welcome, Stumble],
        [reception.greet],
        task_queue=queue,
        connect_options=partial(with_log, stream),
        interceptors=[Plain(lab.file("entered"))],
        max_cached_workflows=0,  # every workflow task begins with a replay of the whole history
    )


def logged(stream: str, **fields: Any) -> list[dict[str, Any]]:
    """The lines of a stream that have these fields. A line that is not JSON is an error."""
    lines = [json.loads(line) for line in notes(stream)]
    return [line for line in lines if fields.items() <= line.items()]


async def visits(lab: Lab, stream: str) -> list[Handle]:
    """Three workflows, over a worker that is killed and its successor."""
    async with logging_worker(lab, lab.task_queue, stream) as worker:
        handles = [await lab.start(Welcome.run, name, name=name) for name in VISITORS]
        for handle in handles:
            await until(partial(waits, handle, 1), "the workflow waits")
        await worker.kill()
    async with logging_worker(lab, lab.task_queue, stream):
        for handle in handles:
            await handle.signal(Welcome.leave)
            await ended(handle)
    return handles


async def logs_of_code(lab: Lab) -> list[Evidence]:
    stream = lab.file("log.jsonl")
    handles = await visits(lab, stream)
    runs = {handle.id: handle.first_execution_run_id for handle in handles}
    lines = logged(stream, logger="temporalio.workflow")
    expected = {
        (id, f"{word} {name}") for id, name in zip(runs, VISITORS, strict=True) for word in ("expecting", "goodbye")
    }
    activities = [line for line in logged(stream, logger="temporalio.activity") if line["level"] == "INFO"]
    greeted = Counter((line.get("workflow_id"), line.get("attempt")) for line in activities)
    calls = Counter((call.workflow, call.attempt) for call in lab.calls())
    failed = [line for line in logged(stream, logger="temporalio.activity") if "stack" in line]
    entered = Counter(notes(lab.file("entered")))
    entered = Counter({id: entered[id] for id in runs})
    plain = logged(stream, logger="plain")
    steady = {handle.id for handle in handles if await repeated_tasks(handle) == 0}
    once = Counter((line.get("workflow_id"), line["message"]) for line in lines)
    return [
        works(
            "logs of workflows and activities are JSON lines that carry the ids of their run and attempt",
            lines=len(notes(stream)),
            of_workflows=len(lines),
            missing_or_too_many=equal(sorted(set(once) ^ expected, key=str), []),
            of_activities=len(activities),
            without_a_call_or_a_call_without=equal(sorted(set(greeted) ^ set(calls), key=str), []),
            calls=equal(calls.total(), 4),
            type=equal({line.get("workflow_type") for line in lines}, {"Welcome"}),
            run_not_as_the_client_has_it=equal(
                [line for line in lines if line.get("run_id") != runs.get(line.get("workflow_id", ""))]
                + [line for line in activities if line.get("workflow_run_id") != runs.get(line.get("workflow_id", ""))],
                [],
            ),
            activity=equal({line.get("activity_id") for line in activities}, {"1"}),
        ),
        holds(
            "a line is written once, however often the code is replayed, and also when another worker goes on",
            code_run=at_least(min(entered.values()), 3),
            runs_without_a_task_repeated_for_another_reason=at_least(len(steady), 1),
            lines_of_these_not_there_once=equal(
                [line for line in expected if line[0] in steady and once[line] != 1], []
            ),
            a_line_for_each_call_of_an_activity=equal(
                sorted(map(str, greeted.elements())) == sorted(map(str, calls.elements())), True
            ),
        ),
        holds(
            "the SDK logs a failed attempt by itself, with its ids, and its stack stays in the same line",
            of=equal([(line.get("workflow_id"), line.get("attempt")) for line in failed], [(f"{lab.id}-Chidi", 1)]),
            message=[line["message"] for line in failed],
            in_its_stack=equal(
                [word for line in failed for word in ("in greet", "lost\nfor words") if word in line["stack"]],
                ["in greet", "lost\nfor words"],
            ),
        ),
        control(
            "a line by a plain logger in the same workflow code is repeated at every replay",
            by_logging=equal(len(plain), sum(entered.values())),
            by_the_SDK_once_for_each_of=len(runs),
            code_run=at_least(min(entered.values()), 2),
        ),
    ]


async def logs_of_core(lab: Lab) -> Evidence:
    """What the SDK's core, which is written in Rust, has to say stands in the same stream."""
    stream, queue = lab.file("core.jsonl"), f"{lab.id}-core"
    async with logging_worker(lab, queue, stream):
        handle = await lab.start(Stumble.run, name="core", task_queue=queue)
        run_id = str(handle.first_execution_run_id)
        # The facts show what was logged, which is worth more than that it took too long.
        with contextlib.suppress(TimeoutError):
            await until(lambda: core_lines(stream, run_id), "the core has said so", 30)
        tasks = await failed_tasks(handle)
        await handle.terminate(reason="seen enough")
    found = core_lines(stream, run_id)[:1]
    return holds(
        "the core's own log is forwarded into the same stream, with its fields",
        failed_workflow_tasks=at_least(len(tasks), 1),
        level=equal([line["level"] for line in found], ["WARNING"]),
        message=[line["message"][:90] for line in found],
        beside_lines_of_Python=at_least(len(logged(stream, logger="temporalio.worker._workflow_instance")), 1),
    )


def core_lines(stream: str, run_id: str) -> list[dict[str, Any]]:
    """What the core says of a run, known by its id among the fields."""
    lines = [json.loads(line) for line in notes(stream)]
    return [line for line in lines if line["logger"].startswith("temporal-core") and run_id in str(line.get("core"))]


@OB.item("OB-06", "Logging")
async def logs(lab: Lab) -> AsyncIterator[Evidence]:
    """Workers in processes of their own write JSON lines; the stream is compared with a ledger."""
    async for evidence in side_by_side(logs_of_code(lab), logs_of_core(lab)):
        yield evidence
    yield native(
        "ids and silence under replay are the SDK's loggers' own; the form of a line is built here",
        (TelemetryConfig, "logging"),
        (LoggingConfig, "filter"),
        (LoggingConfig, "forwarding"),
        (LogForwardingConfig, "append_log_fields_to_message"),
        workflow.LoggerAdapter,
        activity.LoggerAdapter,
        adds=[f"{JsonLines.__name__}, a formatter of {len(inspect.getsourcelines(JsonLines)[0])} lines"],
    )


if __name__ == "__main__":
    run(OB)
