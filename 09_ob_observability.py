"""OB: observability - can one see what runs, what ran, what failed and why, and be told when it matters?

A durable workflow outlives the process that began it, so a debugger or the output of one program shows
little of it. What there is instead: the history that the server keeps, the Web UI and the command line
that read it, metrics of the server and of each worker, traces and logs. The six items compare what each
of them says with what really ran, which is counted outside Temporal.
"""

from common import HERE, Category, Evidence, Target, connect, control, holds, limit, native, side_by_side, works
from lab import Lab, Server, count_events, event_times, free_port, history_of, make_worker, note, notes, run, until

import asyncio
import base64
import contextlib
import inspect
import json
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from temporalio import activity, workflow
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle, WorkflowHistory, WorkflowUpdateFailedError
from temporalio.common import RetryPolicy
from temporalio.converter import DataConverter, PayloadCodec
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory
from temporalio.runtime import (
    LogForwardingConfig,
    LoggingConfig,
    PrometheusConfig,
    Runtime,
    TelemetryConfig,
    TelemetryFilter,
)

# Libraries that the sandbox need not load again for every run of a workflow.
with workflow.unsafe.imports_passed_through():
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from google.protobuf import json_format
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
    from prometheus_client.parser import text_string_to_metric_families
    from temporalio.contrib.opentelemetry import OpenTelemetryPlugin, create_tracer_provider

OB = Category(
    "OB",
    "Observability",
    "Can one see what runs, what ran, what failed and why, and be told when it matters?",
)

PATIENT = timedelta(seconds=30)  # nothing is to be given up: a slow machine gets the time it needs
QUICKLY = RetryPolicy(initial_interval=timedelta(milliseconds=100), backoff_coefficient=1)


@dataclass(frozen=True)
class Answer:
    """What an HTTP server said."""

    status: int
    headers: Mapping[str, str]
    text: str


def ask(url: str, method: str = "GET", body: str = "", headers: Mapping[str, str] | None = None) -> Answer:
    """One HTTP request; a refusal is an answer too, and status 0 that nobody answered."""
    asked = urllib.request.Request(url, body.encode() or None, dict(headers or {}), method=method)
    # Everything asked for here is on this machine, whatever proxy the environment names.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(asked, timeout=10) as response:
            return Answer(response.status, dict(response.headers), response.read().decode())
    except urllib.error.HTTPError as error:
        return Answer(error.code, dict(error.headers), error.read().decode())
    except OSError as error:
        return Answer(0, {}, str(error))


async def http(url: str, method: str = "GET", body: str = "", headers: Mapping[str, str] | None = None) -> Answer:
    """The same without holding up the event loop."""
    return await asyncio.to_thread(ask, url, method, body, headers)


def serve_http(port: int, respond: Callable[[bytes], tuple[int, bytes]], origin: str = "") -> None:
    """A small HTTP server for a process of its own: every POST is answered by `respond`, until killed.

    `origin` is the only one from which a browser may call.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_OPTIONS(self) -> None:
            self.reply(204, b"")

        def do_POST(self) -> None:
            self.reply(*respond(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Access-Control-Allow-Methods", "POST, OPTIONS")
            self.send_header("Access-Control-Allow-Headers", "content-type, x-namespace")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass  # the ledger says what came

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


async def answers(port: int) -> bool:
    return (await http(f"http://127.0.0.1:{port}/", "OPTIONS")).status != 0


async def repeated_tasks(*handles: WorkflowHandle[Any, Any]) -> int:
    """How many workflow tasks failed or timed out, as happens on a machine that is too busy.

    What such a task has logged or counted comes once more when it is tried again. That is no replay.
    """
    kinds = [await count_events(handle) for handle in handles]
    return sum(one["WORKFLOW_TASK_FAILED"] + one["WORKFLOW_TASK_TIMED_OUT"] for one in kinds)


# OB-01 Dashboard, UI ---------------------------------------------------------------------------------
# The Web UI comes with the server and shows each run with its history, failures and stacks. Encrypted
# data it shows only with the help of a codec server, which holds the key and is the user's own.


@dataclass
class Purchase:
    """One argument object instead of several arguments: fields can be added later without breaking runs."""

    item: str
    ledger: str
    failures: int = 0  # so many attempts to charge the card fail


@activity.defn
async def charge_card(purchase: Purchase) -> str:
    attempt = activity.info().attempt
    note(purchase.ledger, f"charge {attempt}")
    if attempt <= purchase.failures:
        raise ApplicationError(f"card terminal offline at attempt {attempt}", type="TerminalOffline")
    return f"charged for {purchase.item}"


@workflow.defn
class Buy:
    @workflow.run
    async def run(self, purchase: Purchase) -> str:
        return await workflow.execute_activity(
            charge_card,
            purchase,
            start_to_close_timeout=PATIENT,
            retry_policy=replace(QUICKLY, maximum_attempts=3),
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
        nonce = os.urandom(12)
        data = nonce + self._box.encrypt(nonce, payload.SerializeToString(), None)
        return Payload(metadata={"encoding": b"binary/encrypted"}, data=data)

    def _opened(self, payload: Payload) -> Payload:
        if payload.metadata.get("encoding") != b"binary/encrypted":
            return payload
        return Payload.FromString(self._box.decrypt(payload.data[:12], payload.data[12:], None))


def serve_codec(port: int, key: bytes, ui: str) -> None:
    """Decrypts for the browser: the UI's page posts payloads as JSON and gets them back readable."""

    def respond(posted: bytes) -> tuple[int, bytes]:
        payloads = json_format.Parse(posted, Payloads()).payloads
        try:
            opened = asyncio.run(Encryption(key).decode(payloads))
        except InvalidTag:
            return 400, b"not encrypted with this key"
        return 200, json_format.MessageToJson(Payloads(payloads=opened)).encode()

    serve_http(port, respond, ui)


@dataclass
class WebUI:
    """The UI as its page in a browser uses it: by the API that it offers on its own port."""

    url: str

    async def ready(self) -> bool:
        return (await http(f"{self.url}/api/v1/namespaces")).status == 200

    async def get(self, path: str) -> Any:
        """What the API says, or None where it finds nothing."""
        answer = await http(f"{self.url}/api/v1/namespaces/default/workflows{path}")
        return json.loads(answer.text) if answer.status == 200 else None

    async def listed(self, id: str) -> list[Any]:
        query = urllib.parse.quote(f'WorkflowId = "{id}"')
        executions: list[Any] = (await self.get(f"?query={query}")).get("executions", [])
        return executions

    async def events(self, id: str) -> list[Any]:
        events: list[Any] = (await self.get(f"/{id}/history"))["history"]["events"]
        return events


async def page_is_served(ui: WebUI) -> Evidence:
    """The page, and everything that it names: scripts and styles, all from this server."""
    page = await http(ui.url)
    named = sorted(set(re.findall(r'(?:href|src)="([^"]+)"', page.text)))
    scripts = [name for name in named if name.endswith(".js")]
    answers = await asyncio.gather(*(http(urllib.parse.urljoin(ui.url, name)) for name in scripts))
    right = [one for one in answers if one.status == 200 and "javascript" in one.headers.get("Content-Type", "")]
    elsewhere = [name for name in named if "//" in name]
    return works(
        "the page is served with every script that it names, and none comes from elsewhere",
        page.status == 200 and len(scripts) > 0 and len(right) == len(scripts) and not elsewhere,
        f"page: HTTP {page.status}; {len(right)} of {len(scripts)} scripts served, "
        f"{sum(len(one.text) for one in right) / 1000:.0f} kB; named on other hosts: {len(elsewhere)}",
    )


async def run_is_shown(lab: Lab, server: Server, ui: WebUI) -> Sequence[Evidence]:
    purchase = Purchase("a teapot", lab.file("well"))
    handle = await server.client.start_workflow(Buy.run, purchase, id=f"{lab.id}-well", task_queue=lab.task_queue)
    result = await handle.result()
    await until(lambda: shown_as(ui, handle.id, "WORKFLOW_EXECUTION_STATUS_COMPLETED"), "the UI lists the run as ended")
    (listed,) = await ui.listed(handle.id)
    by_ui, by_client = await ui.events(handle.id), await history_of(handle)
    nobody = f"{lab.id}-nobody"
    missing, history = await ui.listed(nobody), await ui.get(f"/{nobody}/history")
    return [
        works(
            "the run made a moment ago is listed with its status, and its history is what the client reads",
            listed["execution"]["runId"] == handle.first_execution_run_id
            and [outline(event) for event in by_ui] == [outline(event) for event in by_client]
            and result in contents(by_ui)
            and notes(purchase.ledger) == ["charge 1"],
            f"status {listed['status'].removeprefix('WORKFLOW_EXECUTION_STATUS_')}, type {listed['type']['name']}; "
            f"{len(by_ui)} events equal in id, type and time; the result {result!r} is readable",
        ),
        control(
            "a workflow id that was never started is not shown",
            missing == [] and history is None and len(await ui.listed(handle.id)) == 1,
            f"asked for {nobody}: {len(missing)} runs listed, history: {'none' if history is None else 'there'}",
        ),
    ]


def contents(events: Sequence[Any]) -> str:
    """All the data in a history as JSON, as far as it is text."""
    data = re.findall(r'"data": "([^"]*)"', json.dumps(events))
    return " ".join(base64.b64decode(one).decode(errors="replace") for one in data)


def outline(event: Mapping[str, Any]) -> tuple[str, str, str]:
    """What two readers of one history must agree on."""
    return event["eventId"], event["eventType"], event["eventTime"]


async def shown_as(ui: WebUI, id: str, status: str) -> bool:
    return [run["status"] for run in await ui.listed(id)] == [status]


async def failure_is_shown(lab: Lab, server: Server, ui: WebUI) -> Evidence:
    purchase = Purchase("a kettle", lab.file("failed"), failures=3)
    handle = await server.client.start_workflow(Buy.run, purchase, id=f"{lab.id}-failed", task_queue=lab.task_queue)
    with contextlib.suppress(WorkflowFailureError):
        await handle.result()
    await until(lambda: shown_as(ui, handle.id, "WORKFLOW_EXECUTION_STATUS_FAILED"), "the UI lists the run as failed")
    by_type = {event["eventType"]: event for event in await ui.events(handle.id)}
    attempt = by_type["EVENT_TYPE_ACTIVITY_TASK_STARTED"]["activityTaskStartedEventAttributes"]["attempt"]
    failure = by_type["EVENT_TYPE_ACTIVITY_TASK_FAILED"]["activityTaskFailedEventAttributes"]["failure"]
    line = line_of(charge_card, "raise ApplicationError")
    where = f'{Path(__file__).name}", line {line}, in charge_card'
    return holds(
        "a failed run is listed as failed, with the message, the line that threw, and the number of attempts",
        attempt == 3 == len(notes(purchase.ledger))
        and failure["message"] == "card terminal offline at attempt 3"
        and where in failure["stackTrace"],
        f"attempts in the UI: {attempt}, in the ledger: {len(notes(purchase.ledger))}; message "
        f"{failure['message']!r}; its stack names {where.replace(chr(34), '')}",
    )


def line_of(function: Callable[..., Any], text: str) -> int:
    """The number of the line in this file on which a function says `text`."""
    lines, first = inspect.getsourcelines(function)
    return next(first + number for number, line in enumerate(lines) if text in line)


async def codec_decodes(lab: Lab, server: Server, ui: WebUI, codec: int, key: bytes) -> Sequence[Evidence]:
    """What is encrypted before it leaves the client: as the UI has it, and as the codec server gives it back."""
    sealed = await Client.connect(
        server.address, data_converter=replace(DataConverter.default, payload_codec=Encryption(key))
    )
    queue = f"{lab.id}-sealed"
    async with lab.worker([Buy], [charge_card], client=sealed, task_queue=queue):
        secret = Purchase("a secret diary", lab.file("sealed"))
        result = await sealed.execute_workflow(Buy.run, secret, id=queue, task_queue=queue)
    events = await ui.events(queue)
    payloads = events[-1]["workflowExecutionCompletedEventAttributes"]["result"]
    named = json.loads((await http(f"{ui.url}/api/v1/settings")).text)["Codec"]["Endpoint"]
    origin = {"Origin": ui.url, "Content-Type": "application/json", "X-Namespace": "default"}
    preflight = await http(f"{named}/decode", "OPTIONS", headers=origin)
    decoded = await http(f"{named}/decode", "POST", json.dumps(payloads), origin)
    other = await with_another_key(lab, ui, payloads)
    allowed = {answer.headers.get("Access-Control-Allow-Origin") for answer in (preflight, decoded)}
    opened = json_format.Parse(decoded.text, Payloads()).payloads if decoded.status == 200 else []
    readable = [json.loads(payload.data) for payload in opened]
    stored = contents(events)
    unreadable = len(stored) > 100 and "diary" not in stored
    return [
        holds(
            "encrypted data is unreadable for the server and its UI; the codec server that the UI is told of reads it",
            unreadable
            and readable == [result] == ["charged for a secret diary"]
            and allowed == {ui.url}
            and named == f"http://127.0.0.1:{codec}",
            f"AES-GCM; {len(events)} events in the UI without the plain text; POST {named}/decode with the page's own "
            f"preflight: {readable}, for the origin {', '.join(map(str, allowed))}; with another key: "
            f"HTTP {other.status}",
        ),
        control(
            "with another key the same codec server reads nothing",
            other.status == 400 and "diary" not in other.text,
            f"HTTP {other.status}: {other.text!r}",
        ),
        limit(
            "who encrypts must write and run the codec server: without it the UI shows only ciphertext",
            unreadable,
            f"{len(stored)} characters of data in the UI's history, 'diary' in them: {'diary' in stored}; the codec "
            f"server here is "
            f"{sum(len(inspect.getsourcelines(one)[0]) for one in (serve_http, serve_codec))} lines",
        ),
    ]


async def with_another_key(lab: Lab, ui: WebUI, payloads: Any) -> Answer:
    port = free_port()
    async with lab.process(serve_codec, port, AESGCM.generate_key(256), ui.url):
        await until(lambda: answers(port), "the other codec server answers")
        return await http(f"http://127.0.0.1:{port}/decode", "POST", json.dumps(payloads), {"Origin": ui.url})


@OB.item("OB-01", "Dashboard, UI")
async def dashboard(lab: Lab) -> AsyncIterator[Evidence]:
    """A server with its UI; the UI's own API is asked for runs that ended well, badly, and encrypted."""
    port, codec, key = free_port(), free_port(), AESGCM.generate_key(256)
    ui = WebUI(f"http://127.0.0.1:{port}")
    async with (
        lab.process(serve_codec, codec, key, ui.url),
        lab.private_server(ui_port=port, arguments=["--ui-codec-endpoint", f"http://127.0.0.1:{codec}"]) as server,
        lab.worker([Buy], [charge_card], server=server),
    ):
        await until(ui.ready, "the Web UI answers", 30)
        parts = (
            page_is_served(ui),
            run_is_shown(lab, server, ui),
            failure_is_shown(lab, server, ui),
            codec_decodes(lab, server, ui, codec, key),
        )
        async for evidence in side_by_side(*parts):
            yield evidence
    yield native(
        "the UI is part of the server's command; the codec is a parameter of the client, and built here",
        "temporal server start-dev --ui-port --ui-codec-endpoint",
        (DataConverter, "payload_codec"),
        PayloadCodec,
        adds=[Encryption.__name__, f"{serve_codec.__name__}(), the codec server"],
    )


# OB-02 Metrics ---------------------------------------------------------------------------------------
# Worker and server count by themselves what they do, in the form that Prometheus reads. What workflow
# code counts through the SDK is counted once, however often the code is replayed.


@dataclass(frozen=True)
class Metrics:
    """One scrape: a sample is a name, labels and a value."""

    samples: Sequence[tuple[str, Mapping[str, str], float]]

    def value(self, name: str, **labels: str) -> float:
        """The sum of all samples of this name that carry these labels; 0 where there is none."""
        return sum(value for found, theirs, value in self.samples if found == name and labels.items() <= theirs.items())

    def largest(self, name: str, **labels: str) -> float:
        """The largest of these samples; 0 where there is none."""
        return max(
            (one for found, theirs, one in self.samples if found == name and labels.items() <= theirs.items()),
            default=0,
        )

    def counters(self, *names: str, **labels: str) -> dict[str, float]:
        return {name: self.value(name, **labels) for name in names}


async def scrape(port: int, *only: str) -> Metrics:
    """What /metrics offers, read by Prometheus' own parser; of a server's 2 MB, `only` the names asked for."""
    page = (await http(f"http://127.0.0.1:{port}/metrics")).text
    lines = [line for line in page.splitlines() if not only or line.startswith(only)]
    samples = [one for family in text_string_to_metric_families("\n".join([*lines, ""])) for one in family.samples]
    # The parser gives counters the suffix of OpenMetrics; here they are called as the page calls them.
    return Metrics([(one.name.removesuffix("_total"), one.labels, one.value) for one in samples])


async def scraped(port: int, enough: Callable[[Metrics], bool], *only: str, seconds: float = 10) -> Metrics:
    """Scrape until it shows what is expected, or for so long that it will not. The caller judges."""
    last = await scrape(port, *only)
    deadline = time.monotonic() + seconds
    while not enough(last) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
        last = await scrape(port, *only)
    return last


def label(queue: str) -> str:
    """A task queue's name as the server's metrics write it, which replace what Prometheus' names may not hold."""
    return re.sub(r"\W", "_", queue)


def metered(port: int) -> Runtime:
    """A runtime whose workers offer their metrics on a port; in seconds, as Prometheus has it."""
    return Runtime(
        telemetry=TelemetryConfig(
            metrics=PrometheusConfig(bind_address=f"127.0.0.1:{port}", durations_as_seconds=True),
            logging=LoggingConfig(
                filter=TelemetryFilter(core_level="WARN", other_level="ERROR"),
                forwarding=LogForwardingConfig(logger=logging.getLogger("temporal-core")),
            ),
        )
    )


@dataclass
class Sale:
    ledger: str
    refused: bool = False  # the payment fails for good
    flaky: bool = False  # the first attempt to pack fails
    unimportant: bool = False  # and is marked as a failure that nobody need hear of


@activity.defn
async def take_payment(sale: Sale) -> None:
    note(sale.ledger, "failed" if sale.refused else "done")
    if sale.refused:
        raise ApplicationError("card refused", non_retryable=True)


@activity.defn
async def pack_goods(sale: Sale) -> None:
    fails = sale.flaky and activity.info().attempt == 1
    note(sale.ledger, ("benign" if sale.unimportant else "failed") if fails else "done")
    if fails:
        benign = ApplicationErrorCategory.BENIGN if sale.unimportant else ApplicationErrorCategory.UNSPECIFIED
        raise ApplicationError("the box is too small", category=benign)


@workflow.defn
class Sell:
    @workflow.run
    async def run(self, sale: Sale) -> None:
        workflow.metric_meter().create_counter("sales_begun", "Sales that were begun").add(1)
        note(sale.ledger, "counted by hand")  # never do this: it is the control, a counter of one's own
        for step in (take_payment, pack_goods, pack_goods):
            await workflow.execute_activity(step, sale, start_to_close_timeout=PATIENT, retry_policy=QUICKLY)


# Eight, of which six end well and two fail.
SALES: list[dict[str, bool]] = [
    *[{}] * 4,
    *[{"refused": True}] * 2,
    {"flaky": True},
    {"flaky": True, "unimportant": True},
]


@dataclass(frozen=True)
class Metered:
    """A server and a client whose metrics can be scraped."""

    server: Server
    server_port: int
    client: Client
    port: int


async def sell(lab: Lab, place: Metered, name: str) -> tuple[list[str], Counter[str]]:
    """Make all SALES on a queue of their own. Returns the ledger, and how the workflows ended."""
    queue, ledger = f"{lab.id}-{name}", lab.file(name)
    # No cache: every workflow task begins with a replay of the whole history.
    async with lab.worker(
        [Sell], [take_payment, pack_goods], client=place.client, task_queue=queue, max_cached_workflows=0
    ):
        ended = await asyncio.gather(
            *(
                place.client.execute_workflow(Sell.run, Sale(ledger, **sale), id=f"{queue}-{number}", task_queue=queue)
                for number, sale in enumerate(SALES)
            ),
            return_exceptions=True,
        )
    return notes(ledger), Counter("well" if end is None else type(end).__name__ for end in ended)


SDK_COUNTERS = (
    "temporal_workflow_completed",
    "temporal_workflow_failed",
    "temporal_activity_execution_latency_count",
    "temporal_activity_execution_failed",
    "sales_begun",
)
SERVER_COUNTERS = ("workflow_success", "workflow_failed", "activity_success", "activity_task_fail")


async def counts(lab: Lab, place: Metered) -> list[Evidence]:
    """Counters against the ledger; and again after a time in which nothing is done."""
    ledger, ended = await sell(lab, place, "sales")
    ran = Counter(ledger)
    attempts = ran["done"] + ran["failed"] + ran["benign"]
    well, failed = ended["well"], ended["WorkflowFailureError"]
    sdk_right = dict(zip(SDK_COUNTERS, (well, failed, attempts, ran["failed"], len(SALES)), strict=True))
    server_right = dict(zip(SERVER_COUNTERS, (well, failed, ran["done"], ran["failed"] + ran["benign"]), strict=True))
    queue = f"{lab.id}-sales"

    def by_sdk(seen: Metrics) -> dict[str, float]:
        return seen.counters(*SDK_COUNTERS, task_queue=queue)

    def by_server(seen: Metrics) -> dict[str, float]:
        return seen.counters(*SERVER_COUNTERS, taskqueue=label(queue))

    sdk = by_sdk(await scraped(place.port, lambda seen: by_sdk(seen) == sdk_right))
    server = by_server(await scraped(place.server_port, lambda seen: by_server(seen) == server_right, *SERVER_COUNTERS))
    await asyncio.sleep(3)
    sdk_later = by_sdk(await scrape(place.port))
    server_later = by_server(await scrape(place.server_port, *SERVER_COUNTERS))
    by_hand = ran["counted by hand"]
    again = await repeated_tasks(
        *(place.client.get_workflow_handle(f"{queue}-{number}") for number in range(len(SALES)))
    )
    failures = sdk["temporal_activity_execution_failed"]
    return [
        works(
            "the worker's counters are what ran: workflows by their end, attempts of activities, failures",
            {**sdk, "sales_begun": 0} == {**sdk_right, "sales_begun": 0} and (well, failed) == (6, 2) and attempts > 0,
            f"{len(SALES)} workflows, {attempts} attempts in the ledger; {words(sdk)}",
        ),
        works(
            "the server's counters are what ran, too",
            server == server_right and ran["done"] > 0,
            f"ledger: {ran['done']} attempts done, {ran['failed'] + ran['benign']} failed; {words(server)}; "
            f"its label for the task queue is {label(queue)}",
        ),
        holds(
            "a counter in workflow code counts once a workflow, however often the code is replayed",
            len(SALES) <= sdk["sales_begun"] <= len(SALES) + again and by_hand > len(SALES) + again,
            f"{len(SALES)} workflows, their code run {by_hand} times: sales_begun {sdk['sales_begun']:g}; workflow "
            f"tasks that were repeated for another reason: {again}",
        ),
        control(
            "a counter of one's own in the same workflow code counts every replay",
            by_hand > len(SALES),
            f"{by_hand} for {len(SALES)} workflows",
        ),
        holds(
            "failed attempts are counted also where a retry mends them, but not those marked BENIGN",
            failures == ran["failed"] > failed and ran["benign"] > 0,
            f"failed attempts in the ledger: {ran['failed']}, and {ran['benign']} BENIGN; counted by the worker: "
            f"{failures:g}; failed workflows: {failed}",
        ),
        control(
            "while nothing runs nothing is counted",
            sdk_later == sdk and server_later == server,
            f"{len(sdk) + len(server)} counters, scraped again after 3 idle seconds: "
            f"{'all unchanged' if sdk_later == sdk and server_later == server else 'changed'}",
        ),
    ]


def words(counters: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in counters.items())


@dataclass
class Shift:
    ledger: str
    people: int
    seconds: float = 0  # how long one works; 0: until the ledger says "go home"


@activity.defn
async def work_one(shift: Shift) -> None:
    note(shift.ledger, "at work")
    if shift.seconds:
        await asyncio.sleep(shift.seconds)
        return
    while "go home" not in notes(shift.ledger):
        await asyncio.sleep(0.05)


@workflow.defn
class Work:
    @workflow.run
    async def run(self, shift: Shift) -> None:
        jobs = (workflow.execute_activity(work_one, shift, start_to_close_timeout=PATIENT) for _ in range(shift.people))
        await asyncio.gather(*jobs)


async def slots(lab: Lab, place: Metered) -> Evidence:
    """Three activities hold a slot each of a worker that has five, and then none does."""
    queue, shift = f"{lab.id}-slots", Shift(lab.file("slots"), people=3)
    labels = {"task_queue": queue, "worker_type": "ActivityWorker"}
    names = ("temporal_worker_task_slots_used", "temporal_worker_task_slots_available")
    async with lab.worker([Work], [work_one], client=place.client, task_queue=queue, max_concurrent_activities=5):
        handle = await place.client.start_workflow(Work.run, shift, id=queue, task_queue=queue)
        await until(lambda: len(notes(shift.ledger)) == 3, "three are at work")
        busy = (await scraped(place.port, lambda seen: seen.value(names[0], **labels) == 3)).counters(*names, **labels)
        note(shift.ledger, "go home")
        await handle.result()
        free = (await scraped(place.port, lambda seen: seen.value(names[0], **labels) == 0)).counters(*names, **labels)
    return holds(
        "the slots of a worker are shown while they are used and when they are free",
        list(busy.values()) == [3, 2] and list(free.values()) == [0, 5],
        f"5 slots, 3 activities running: used and available {list(busy.values())}; afterwards {list(free.values())}",
    )


async def schedule_to_start(lab: Lab, place: Metered) -> Evidence:
    """Three tasks for one slot wait for each other; the history says how long."""
    queue, shift = f"{lab.id}-waiting", Shift(lab.file("waiting"), people=3, seconds=0.3)
    name = "temporal_activity_schedule_to_start_latency"
    async with lab.worker([Work], [work_one], client=place.client, task_queue=queue, max_concurrent_activities=1):
        handle = await place.client.start_workflow(Work.run, shift, id=queue, task_queue=queue)
        await handle.result()
        seen = await scraped(place.port, lambda seen: seen.value(f"{name}_count", task_queue=queue) == 3)
    events = await history_of(handle)
    scheduled = [one.timestamp() for one in event_times(events, "ACTIVITY_TASK_SCHEDULED")]
    started = [one.timestamp() for one in event_times(events, "ACTIVITY_TASK_STARTED")]
    right = sum(started) - sum(scheduled)
    count, total = seen.value(f"{name}_count", task_queue=queue), seen.value(f"{name}_sum", task_queue=queue)
    quick = seen.value(f"{name}_bucket", task_queue=queue, le="0.1")
    return holds(
        "how long tasks wait for a worker is shown, and agrees with the history",
        count == len(notes(shift.ledger)) == 3 and right >= 0.9 and abs(total - right) <= 0.05 * right and quick <= 1,
        f"3 activities of 0.3 s for 1 slot: waited {total:.2f} s together by the metric, {right:.2f} s by the history; "
        f"within 0.1 s: {quick:g} of {count:g}",
    )


@OB.item("OB-02", "Metrics")
async def metrics(lab: Lab) -> AsyncIterator[Evidence]:
    """Workflows that end well and badly; what Prometheus would scrape is compared with the ledger."""
    port, server_port = free_port(), free_port()
    async with lab.private_server(arguments=["--metrics-port", str(server_port)]) as server:
        place = Metered(server, server_port, await connect(server.target, runtime=metered(port)), port)
        async for evidence in side_by_side(*(part(lab, place) for part in (counts, slots, schedule_to_start))):
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


@dataclass
class Parcel:
    ledger: str
    step: str = ""
    seconds: float = 0
    failures: int = 0


@activity.defn
async def do_step(parcel: Parcel) -> str:
    """Says in the ledger when it begins and ends, by the clock of this machine."""
    note(parcel.ledger, f"{parcel.step} begins {time.time()}")
    await asyncio.sleep(parcel.seconds)
    if activity.info().attempt <= parcel.failures:
        raise ApplicationError(f"{parcel.step} failed at attempt {activity.info().attempt}")
    note(parcel.ledger, f"{parcel.step} ends {time.time()}")
    return parcel.step


async def step_of(parcel: Parcel, step: str, seconds: float, failures: int = 0) -> str:
    """One activity, named in its id for who reads the history, and in its summary for who looks at the Web UI."""
    return await workflow.execute_activity(
        do_step,
        replace(parcel, step=step, seconds=seconds, failures=failures),
        activity_id=step,
        summary=step,
        start_to_close_timeout=PATIENT,
        retry_policy=QUICKLY,
    )


@workflow.defn
class Deliver:
    @workflow.run
    async def run(self, parcel: Parcel) -> None:
        await step_of(parcel, "deliver", 0.4)


@workflow.defn
class Fulfil:
    """Two steps side by side, one that is retried, a timer, and a child workflow."""

    @workflow.run
    async def run(self, parcel: Parcel) -> None:
        await asyncio.gather(step_of(parcel, "reserve", 0.3), step_of(parcel, "quote", 0.6))
        await step_of(parcel, "charge", 0.2, failures=1)
        await workflow.sleep(0.3, summary="cooling off")
        await workflow.execute_child_workflow(
            Deliver.run, parcel, id=f"{workflow.info().workflow_id}-delivery", static_summary="by bicycle"
        )


@activity.defn
async def do_everything(parcel: Parcel) -> None:
    """Three steps inside one activity."""
    for step in ("reserve", "quote", "charge"):
        note(parcel.ledger, step)
        await asyncio.sleep(0.1)


@workflow.defn
class FulfilAtOnce:
    @workflow.run
    async def run(self, parcel: Parcel) -> None:
        await workflow.execute_activity(do_everything, parcel, start_to_close_timeout=PATIENT)


@dataclass(frozen=True)
class Bar:
    """Something that took time: its name, and when it began and ended."""

    name: str
    begin: float
    end: float


# The event that begins a bar, the one that ends it, where its name stands.
SPANS = (
    ("ActivityTaskScheduled", "ActivityTaskCompleted", "activityId", "scheduledEventId"),
    ("TimerStarted", "TimerFired", "timerId", "startedEventId"),
    ("StartChildWorkflowExecutionInitiated", "ChildWorkflowExecutionCompleted", "workflowId", "initiatedEventId"),
)


def bars(events: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """The activities, timers and children of a history, as they began."""
    by_id = {event["eventId"]: event for event in events}
    found = []
    for event in events:
        for begins, ends, name, back in SPANS:
            closing = event.get(f"{ends[0].lower()}{ends[1:]}EventAttributes")
            if closing:
                opening = by_id[closing[back]]
                called = opening[f"{begins[0].lower()}{begins[1:]}EventAttributes"][name]
                called = f"timer {called}" if begins == "TimerStarted" else called.rpartition("-")[2]
                found.append(Bar(called, seconds_of(opening), seconds_of(event)))
    return sorted(found, key=lambda bar: bar.begin)


def seconds_of(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["eventTime"].replace("Z", "+00:00")).timestamp()


def timeline(found: Sequence[Bar], width: int = 30) -> list[str]:
    """The bars as text, to a common scale."""
    if not found:
        return []
    begin, end = min(bar.begin for bar in found), max(bar.end for bar in found)
    scale = width / (end - begin)
    drawn = []
    for bar in found:
        left = min(int((bar.begin - begin) * scale), width - 1)
        length = max(1, round((bar.end - bar.begin) * scale))
        line = ("." * left + "#" * length)[:width].ljust(width, ".")
        drawn.append(f"[{line}] {bar.name} {bar.end - bar.begin:.2f} s")
    return drawn


def real_times(ledger: Sequence[str]) -> dict[str, Bar]:
    """From the ledger: when each step was first begun and when it was done, by a clock outside Temporal."""
    found: dict[str, Bar] = {}
    for step, what, moment in (line.split() for line in ledger):
        known = found.get(step, Bar(step, float(moment), 0))
        found[step] = known if what == "begins" else replace(known, end=float(moment))
    return found


async def drawn(lab: Lab) -> list[Evidence]:
    parcel = Parcel(lab.file("fulfil"))
    handle = await lab.client.start_workflow(
        Fulfil.run, parcel, id=f"{lab.id}-fulfil", task_queue=lab.task_queue, static_summary="a parcel for the picture"
    )
    await handle.result()
    events, shown = await history_of(handle), await lab.cli("workflow", "show", "-w", handle.id, "-o", "json")
    by_cli = json.loads(shown.out)["events"]
    found, real = bars(events), real_times(notes(parcel.ledger))
    by_name = {bar.name: bar for bar in found}
    expected = ["reserve", "quote", "charge", "timer 1", "delivery"]
    # "deliver" is a step of the child's own history; the child is a bar here.
    lasted = {step: by_name[step].end - by_name[step].begin for step in real if step in by_name}
    truly = {step: real[step].end - real[step].begin for step in lasted}
    return [
        works(
            "the history can be had as JSON from the client and from the command line, and both are equal",
            events == by_cli and len(events) > 20,
            f"{len(events)} events, {len(shown.out) / 1000:.1f} kB of JSON, "
            f"{'equal in every field' if events == by_cli else 'different'}",
        ),
        works(
            "a timeline drawn from it shows what ran when: order, length, side by side, retry, timer and child",
            sorted(by_name) == sorted(expected) and [bar.name for bar in found][2:] == expected[2:]
            and sorted(lasted) == ["charge", "quote", "reserve"]
            and all(0 <= lasted[step] - truly[step] + 0.01 < 10 for step in lasted)
            and overlap(by_name["reserve"], by_name["quote"]) and not overlap(by_name["quote"], by_name["charge"]),
            "  ".join(timeline(found)) + "; by the clock of the activities: "
            + ", ".join(f"{step} {seconds:.2f} s" for step, seconds in truly.items()),
        ),
    ]  # fmt: skip


def overlap(one: Bar, other: Bar) -> bool:
    return one.begin < other.end and other.begin < one.end


async def all_at_once(lab: Lab) -> Evidence:
    parcel = Parcel(lab.file("at-once"))
    handle = await lab.client.start_workflow(
        FulfilAtOnce.run, parcel, id=f"{lab.id}-at-once", task_queue=lab.task_queue
    )
    await handle.result()
    found = bars(await history_of(handle))
    return control(
        "the same steps inside one activity are not seen: one bar",
        len(notes(parcel.ledger)) == 3 and len(found) == 1,
        f"steps in the ledger: {', '.join(notes(parcel.ledger))}; bars: {len(found)}",
    )


@workflow.defn
class Refund:
    """Hangs on an activity that fails twice and then waits; meanwhile it can be asked, and told off."""

    def __init__(self) -> None:
        self.note = "waiting for the bank"

    @workflow.run
    async def run(self, shift: Shift) -> None:
        await workflow.execute_activity(
            call_bank, shift, start_to_close_timeout=timedelta(minutes=2), retry_policy=QUICKLY
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
async def call_bank(shift: Shift) -> None:
    attempt = activity.info().attempt
    note(shift.ledger, f"attempt {attempt}")
    if attempt < 3:
        raise ApplicationError(f"the bank is closed, attempt {attempt}")
    while "go home" not in notes(shift.ledger):
        await asyncio.sleep(0.05)


async def pending(lab: Lab) -> list[Evidence]:
    shift = Shift(lab.file("pending"), people=1)
    handle = await lab.client.start_workflow(Refund.run, shift, id=f"{lab.id}-pending", task_queue=lab.task_queue)
    await until(lambda: "attempt 3" in notes(shift.ledger), "the third attempt has begun")
    described = (await handle.describe()).raw_description.pending_activities
    by_cli = json.loads((await lab.cli("workflow", "describe", "-w", handle.id, "-o", "json")).out)["pendingActivities"]
    before = await history_of(handle)
    asked = [await handle.query(Refund.state) for _ in range(3)]
    refused = 0
    for _ in range(2):
        try:
            await handle.execute_update(Refund.rename, "")
        except WorkflowUpdateFailedError:
            refused += 1
    after = await history_of(handle)
    accepted = await handle.execute_update(Refund.rename, "the bank calls back")
    later = await history_of(handle)
    note(shift.ledger, "go home")
    await handle.result()
    last = [one.last_failure.message for one in described]
    return [
        holds(
            "what is under way is described before it is in the history: attempt and last failure",
            [one.attempt for one in described] == [3] and last == ["the bank is closed, attempt 2"]
            and [(one["attempt"], one["lastFailure"]["message"]) for one in by_cli] == [(3, last[0])]
            and notes(shift.ledger)[:3] == ["attempt 1", "attempt 2", "attempt 3"]
            and not event_times(before, "ACTIVITY_TASK_STARTED"),
            f"{len(notes(shift.ledger)) - 1} attempts in the ledger; the client and the command line: attempt "
            f"{described[0].attempt}, last failure {last[0]!r}; in the history no attempt yet",
        ),
        limit(
            "queries and refused updates leave no trace in the history: who asked cannot be seen later",
            asked == ["waiting for the bank"] * 3 and refused == 2 and after == before,
            f"3 queries answered, 2 updates refused: {len(before)} events before, {len(after)} after; an accepted "
            f"update ({accepted!r}) added {len(later) - len(after)}",
        ),
    ]  # fmt: skip


@workflow.defn
class ManyTimers:
    @workflow.run
    async def run(self, timers: int) -> None:
        await asyncio.gather(*(asyncio.sleep(0.001) for _ in range(timers)))


TIMERS = 500


async def long_history(lab: Lab) -> Evidence:
    handle = await lab.client.start_workflow(
        ManyTimers.run, TIMERS, id=f"{lab.id}-long", task_queue=lab.task_queue, task_timeout=PATIENT
    )
    await handle.result()
    begun = time.monotonic()
    events = await history_of(handle)
    took = time.monotonic() - begun
    kinds = await count_events(handle)
    again = WorkflowHistory.from_json(handle.id, json.dumps({"events": events}))
    found = bars(events)
    return holds(
        "a history of 1,000 events is read whole, kept as JSON and drawn",
        [event["eventId"] for event in events] == [str(number) for number in range(1, len(events) + 1)]
        and kinds["TIMER_STARTED"] == kinds["TIMER_FIRED"] == TIMERS == len(timeline(found))
        and json.loads(again.to_json())["events"] == events and len(events) >= 1000,
        f"{len(events)} events without a gap, read in {took:.2f} s; {len(found)} bars for {TIMERS} timers; "
        "JSON read back is equal",
    )  # fmt: skip


@OB.item("OB-03", "History visualisation")
async def history_visualisation(lab: Lab) -> AsyncIterator[Evidence]:
    """Histories are read by two programs, compared with a ledger's clock, and drawn."""
    workflows = [Fulfil, Deliver, FulfilAtOnce, Refund, ManyTimers]
    async with lab.worker(workflows, [do_step, do_everything, call_bank]):
        async for evidence in side_by_side(drawn(lab), all_at_once(lab), pending(lab), long_history(lab)):
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
        adds=[f"{timeline.__name__}(), {len(inspect.getsourcelines(timeline)[0])} lines (the Web UI draws its own)"],
    )


# OB-04 OpenTelemetry ---------------------------------------------------------------------------------
# With the SDK's plugin one trace leads from the caller through workflow, activity and child, and stays
# one when a worker dies in the middle. Without it every process begins traces of its own.


@dataclass
class Question:
    text: str
    ledger: str
    waits: bool = False  # between the model's answer and its publication, for the signal


def tiny_model(text: str) -> tuple[str, int, int]:
    """A local function that stands for a model. Returns its answer and the tokens in and out."""
    words = text.split()
    return " ".join(reversed(words)), len(words), len(words)


@activity.defn
async def ask_model(question: Question) -> str:
    """The first attempt fails; the second has a span of its own, as the conventions for GenAI name it."""
    attempt = activity.info().attempt
    note(question.ledger, f"ask_model {attempt}")
    if attempt == 1:
        raise ApplicationError("the model is overloaded", type="Overloaded")
    attributes = {
        gen_ai.GEN_AI_OPERATION_NAME: "chat",
        gen_ai.GEN_AI_PROVIDER_NAME: "local",
        gen_ai.GEN_AI_REQUEST_MODEL: "tiny",
    }
    tracer = trace.get_tracer("answers")
    with tracer.start_as_current_span("chat tiny", kind=trace.SpanKind.CLIENT, attributes=attributes) as span:
        answer, tokens_in, tokens_out = tiny_model(question.text)
        note(question.ledger, f"tokens {tokens_in} {tokens_out}")
        span.set_attribute(gen_ai.GEN_AI_USAGE_INPUT_TOKENS, tokens_in)
        span.set_attribute(gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS, tokens_out)
    return answer


@activity.defn
async def publish(question: Question) -> None:
    note(question.ledger, f"publish {activity.info().attempt}")
    with trace.get_tracer("answers").start_as_current_span("write page"):
        await asyncio.sleep(0)


@workflow.defn
class Publish:
    @workflow.run
    async def run(self, question: Question) -> None:
        await workflow.execute_activity(publish, question, start_to_close_timeout=PATIENT)


@workflow.defn
class Reply:
    """Asks the model, may wait to be released, and publishes in a child workflow."""

    def __init__(self) -> None:
        self.released = False

    @workflow.run
    async def run(self, question: Question) -> str:
        note(question.ledger, "workflow code entered")  # never do this: it counts how often the code is run
        answer = await workflow.execute_activity(
            ask_model, question, start_to_close_timeout=PATIENT, retry_policy=QUICKLY
        )
        # Through the plugin a workflow's own span may last over timers, crashes and replays.
        with trace.get_tracer("answers").start_as_current_span("decide"):
            await workflow.wait_condition(lambda: self.released or not question.waits)
            await workflow.execute_child_workflow(Publish.run, question, id=f"{workflow.info().workflow_id}-page")
        return answer

    @workflow.signal
    def release(self) -> None:
        self.released = True


def collect_spans(port: int, ledger: str) -> None:
    """A collector for OTLP over HTTP: writes every span to the ledger, one line of JSON each."""

    def respond(posted: bytes) -> tuple[int, bytes]:
        for resource in ExportTraceServiceRequest.FromString(posted).resource_spans:
            service = resource.resource.attributes
            for scope in resource.scope_spans:
                for span in scope.spans:
                    found = {
                        "trace": span.trace_id.hex(),
                        "id": span.span_id.hex(),
                        "parent": span.parent_span_id.hex(),
                        "name": span.name,
                        "failed": span.status.code == span.status.STATUS_CODE_ERROR,
                        "seconds": (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
                        "service": {one.key: one.value.string_value for one in service}["service.name"],
                        "attributes": {one.key: value_of(one.value) for one in span.attributes},
                        "errors": [value_of(one.value) for event in span.events for one in event.attributes
                                   if one.key == "exception.message"],
                    }  # fmt: skip
                    note(ledger, json.dumps(found))
        return 200, b""

    serve_http(port, respond)


def value_of(value: Any) -> str | int:
    """The value of an attribute: text or number."""
    return str(value.string_value) if value.HasField("string_value") else int(value.int_value)


def send_spans(collector: str, service: str) -> None:
    """What a process does once, at its start: its spans go to a collector, in the background."""
    provider = create_tracer_provider(resource=Resource.create({"service.name": service}))
    exporter = OTLPSpanExporter(f"{collector}/v1/traces", timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=50))
    trace.set_tracer_provider(provider)


def plugins(traced: bool) -> list[OpenTelemetryPlugin]:
    return [OpenTelemetryPlugin(add_temporal_spans=True)] if traced else []


@dataclass(frozen=True)
class Tracing:
    """What the processes of one demonstration must know."""

    target: Target
    queue: str
    collector: str
    traced: bool = True  # with the plugin


async def traced_worker(tracing: Tracing) -> None:
    """A worker's process. A worker takes the plugins of its client."""
    send_spans(tracing.collector, "worker")
    client = await connect(tracing.target, plugins=plugins(tracing.traced))
    parts = ([Reply, Publish], [ask_model, publish])
    # No cache: every workflow task begins with a replay of the whole history.
    async with make_worker(client, tracing.queue, *parts, max_cached_workflows=0):
        await asyncio.Future()


async def traced_caller(tracing: Tracing, question: Question, released: str) -> None:
    """The process that starts the workflow, and releases it when it is told to."""
    send_spans(tracing.collector, "caller")
    client = await connect(tracing.target, plugins=plugins(tracing.traced))
    with trace.get_tracer("answers").start_as_current_span("customer asks"):
        handle = await client.start_workflow(Reply.run, question, id=tracing.queue, task_queue=tracing.queue)
        if question.waits:
            await until(lambda: notes(released), "the driver says so", 60)
            await handle.signal(Reply.release)
        await handle.result()
    provider = trace.get_tracer_provider()
    assert provider.force_flush()  # type: ignore[attr-defined]  # not part of the API, only of the SDK


# (span, the span it stands under): what one question looks like.
TREE = Counter(
    [
        ("customer asks", ""),
        ("StartWorkflow:Reply", "customer asks"),
        ("RunWorkflow:Reply", "StartWorkflow:Reply"),
        ("StartActivity:ask_model", "RunWorkflow:Reply"),
        ("RunActivity:ask_model", "StartActivity:ask_model"),  # the attempt that fails
        ("RunActivity:ask_model", "StartActivity:ask_model"),
        ("chat tiny", "RunActivity:ask_model"),
        ("decide", "RunWorkflow:Reply"),
        ("StartChildWorkflow:Publish", "decide"),
        ("RunWorkflow:Publish", "StartChildWorkflow:Publish"),
        ("StartActivity:publish", "RunWorkflow:Publish"),
        ("RunActivity:publish", "StartActivity:publish"),
        ("write page", "RunActivity:publish"),
    ]
)
SIGNAL = Counter([("SignalWorkflow:release", "customer asks"), ("HandleSignal:release", "SignalWorkflow:release")])


def spans(ledger: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in notes(ledger)]


def named(found: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [span for span in found if span["name"] == name]


def tree(found: Sequence[Mapping[str, Any]]) -> Counter[tuple[str, str]]:
    """Each span's name with its parent's; a parent that never came is called so."""
    names = {span["id"]: span["name"] for span in found} | {"": ""}
    return Counter((span["name"], names.get(span["parent"], "unknown")) for span in found)


@contextlib.asynccontextmanager
async def collecting(lab: Lab, name: str, traced: bool = True) -> AsyncIterator[tuple[Tracing, str]]:
    """A collector in a process of its own, and what the other processes must know. Yields its ledger, too."""
    port, ledger = free_port(), lab.file(f"{name}-spans")
    async with lab.process(collect_spans, port, ledger):
        await until(lambda: answers(port), "the collector answers")
        yield Tracing(lab.target, f"{lab.id}-{name}", f"http://127.0.0.1:{port}", traced), ledger


async def arrived(ledger: str, spans_expected: int) -> list[dict[str, Any]]:
    """The spans, once there are so many and no more come for a while; the caller judges."""
    with contextlib.suppress(TimeoutError):
        await until(lambda: len(notes(ledger)) >= spans_expected, "the spans have come", 10)
    await asyncio.sleep(0.5)  # ten times what a batch waits: a duplicate would be here
    return spans(ledger)


async def one_trace(lab: Lab) -> list[Evidence]:
    """One question, over two processes: what the collector got is compared with what should be there."""
    question = Question("why is the sky blue", lab.file("plain"))
    async with collecting(lab, "plain") as (tracing, ledger):
        async with lab.process(traced_worker, tracing), lab.process(traced_caller, tracing, question, "") as caller:
            await caller.wait(80)
            found = await arrived(ledger, TREE.total())
        run_id = (await lab.client.get_workflow_handle(tracing.queue).describe()).run_id
    traces = {span["trace"] for span in found}
    inside = [span["attributes"] for name in ("RunWorkflow:Reply", "StartActivity:ask_model", "RunActivity:ask_model")
              for span in named(found, name)]  # fmt: skip
    attempts = named(found, "RunActivity:ask_model")
    chat = [span["attributes"] for span in named(found, "chat tiny")]
    used = [line.split()[1:] for line in notes(question.ledger) if line.startswith("tokens")]
    asked = [line for line in notes(question.ledger) if line.startswith("ask_model")]
    services = Counter(span["service"] for span in found)
    return [
        works(
            "one trace from the caller through workflow, activity and child workflow, each span under the right one",
            tree(found) == TREE and len(traces) == 1 and services == {"caller": 2, "worker": len(found) - 2},
            f"{len(found)} spans in {len(traces)} trace: {services['caller']} from the caller's process, "
            f"{services['worker']} from the worker's; as a tree: {unlike(found, TREE)}",
        ),
        works(
            "the spans carry workflow id, run id and activity id",
            len(inside) == 4
            and all(one["temporalWorkflowID"] == tracing.queue and one["temporalRunID"] == run_id for one in inside)
            and [one["attributes"].get("temporalActivityID") for one in attempts] == ["1", "1"],
            f"{len(inside)} spans of workflow and activity: all name {tracing.queue}, and its run as the server has it",
        ),
        holds(
            "a failed attempt is a span of its own with an error, beside the one that went well",
            asked == ["ask_model 1", "ask_model 2"] and sorted(span["failed"] for span in attempts) == [False, True]
            and [one["errors"] for one in attempts if one["failed"]] == [["Overloaded: the model is overloaded"]],
            f"attempts in the ledger: {len(asked)}; spans: {len(attempts)}, of which with an error: "
            f"{'; '.join(error for span in attempts if span['failed'] for error in span['errors'])}",
        ),
        holds(
            "a model call is a span with GenAI attributes, under its activity",
            [{**one} for one in chat] == [genai_attributes(*map(int, used[0]))] and len(used) == 1,
            f"local function as model: {', '.join(f'{key}={value}' for one in chat for key, value in one.items())}",
        ),
    ]  # fmt: skip


def genai_attributes(tokens_in: int, tokens_out: int) -> dict[str, str | int]:
    """As OpenTelemetry's semantic conventions for generative AI spell them."""
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "local",
        "gen_ai.request.model": "tiny",
        "gen_ai.usage.input_tokens": tokens_in,
        "gen_ai.usage.output_tokens": tokens_out,
    }


def unlike(found: Sequence[Mapping[str, Any]], expected: Counter[tuple[str, str]]) -> str:
    """What is missing or too many, in words."""
    missing, more = expected - tree(found), tree(found) - expected
    return f"missing {dict(missing)}, too many {dict(more)}" if missing or more else "as expected"


async def killed_worker(lab: Lab) -> list[Evidence]:
    """The worker dies while the workflow waits; another one replays it, and goes on."""
    question, released = Question("why is grass green", lab.file("killed"), waits=True), lab.file("released")
    async with collecting(lab, "killed") as (tracing, ledger):  # noqa: SIM117
        async with lab.process(traced_caller, tracing, question, released) as caller:
            handle = lab.client.get_workflow_handle(tracing.queue)
            async with lab.process(traced_worker, tracing) as worker:
                await until(lambda: named(spans(ledger), "chat tiny"), "the model's span has come")
                await until(lambda: idle(handle), "the workflow waits")
                seen = time.monotonic()
                before = await arrived(ledger, 4)
                await worker.kill()
                until_kill = time.monotonic() - seen
            async with lab.process(traced_worker, tracing):
                note(released, "now")
                await caller.wait(80)
                found = await arrived(ledger, (TREE + SIGNAL).total())
    entered = notes(question.ledger).count("workflow code entered")
    ids, traces = {span["id"] for span in found}, {span["trace"] for span in found}
    lasted = max((span["seconds"] for span in named(found, "RunWorkflow:Reply")), default=0)
    open_ones = ("RunWorkflow:Reply", "decide")
    return [
        holds(
            "after SIGKILL of the worker and replays no span is doubled, and it is still one trace",
            tree(found) == TREE + SIGNAL and len(ids) == len(found) and len(traces) == 1 and entered > 2
            and notes(question.ledger).count("ask_model 2") == 1 and lasted > until_kill,
            f"workflow code run {entered} times in two workers; {len(found)} spans, {len(ids)} ids, {len(traces)} "
            f"trace; as a tree: {unlike(found, TREE + SIGNAL)}; the workflow's span lasts {lasted:.2f} s, from "
            f"at least {until_kill:.2f} s before the kill",
        ),
        limit(
            "a workflow's spans appear only when they end: a trace of a running workflow has no root in the middle",
            not any(named(before, name) for name in open_ones) and all(named(found, name) for name in open_ones),
            f"while the workflow waited: {len(before)} spans, and of {' and '.join(open_ones)} "
            f"{sum(len(named(before, name)) for name in open_ones)}; after its end "
            f"{sum(len(named(found, name)) for name in open_ones)}",
        ),
    ]  # fmt: skip


async def idle(handle: WorkflowHandle[Any, Any]) -> bool:
    """Whether the last event of a run is a completed workflow task: nothing is under way."""
    events = await history_of(handle)
    done = (await count_events(handle))["ACTIVITY_TASK_COMPLETED"] == 1
    return done and events[-1]["eventType"] == "EVENT_TYPE_WORKFLOW_TASK_COMPLETED"


OWN_SPANS = ("customer asks", "chat tiny", "decide", "write page")


async def torn_apart(lab: Lab) -> Evidence:
    question = Question("why is snow white", lab.file("torn"))
    async with (
        collecting(lab, "torn", traced=False) as (tracing, ledger),
        lab.process(traced_worker, tracing),
        lab.process(traced_caller, tracing, question, "") as caller,
    ):
        await caller.wait(80)
        found = await arrived(ledger, len(OWN_SPANS))
    traces = {span["trace"] for span in found}
    return control(
        "without the plugin the same spans of one's own stand in a trace each",
        sorted({span["name"] for span in found}) == sorted(OWN_SPANS) and len(traces) == len(found) >= len(OWN_SPANS),
        f"{len(found)} spans in {len(traces)} traces: {', '.join(span['name'] for span in found)}",
    )


@OB.item("OB-04", "OpenTelemetry", seconds=140)
async def opentelemetry(lab: Lab) -> AsyncIterator[Evidence]:
    """Caller, worker and collector are a process each; the collector's ledger holds what was exported."""
    async for evidence in side_by_side(one_trace(lab), killed_worker(lab), torn_apart(lab)):
        yield evidence
    yield native(
        "one plugin on the client, and a tracer provider that knows of replay",
        (Client.connect, "plugins"),
        (OpenTelemetryPlugin, "add_temporal_spans"),
        create_tracer_provider,
    )


# OB-05 Alerts ----------------------------------------------------------------------------------------
# Temporal raises no alerts. What an alert needs is in its metrics; the rules, and the programs that
# follow them, are the user's. Rules to begin with are shipped, and proven here.

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

# What is broken below, and the rules that must say so. The workflows with a bug are mended with the worker.
EXPECTED = {
    "TemporalActivityFailures", "TemporalWorkflowTasksFailing", "TemporalWorkerMissing", "TemporalTasksStuck",
}  # fmt: skip


@dataclass
class Trip:
    courier: str  # the file that stands for the courier's service; while it exists, the courier is away
    ledger: str
    keep_on: bool = False  # ask again and again


@activity.defn
async def call_courier(trip: Trip) -> None:
    away = Path(trip.courier).exists()
    note(trip.ledger, "failed" if away else "done")
    if away:
        raise ApplicationError("the courier is away")


@workflow.defn
class SendParcel:
    @workflow.run
    async def run(self, trip: Trip) -> None:
        retries = replace(QUICKLY, initial_interval=timedelta(milliseconds=300))
        await workflow.execute_activity(call_courier, trip, start_to_close_timeout=PATIENT, retry_policy=retries)


@workflow.defn
class Invoice:
    """Its code is broken while the file exists. An error that is not Temporal's does not fail a workflow."""

    @workflow.run
    async def run(self, trip: Trip) -> None:
        with workflow.unsafe.sandbox_unrestricted():
            broken = os.path.exists(trip.courier)  # never do this: here it stands for a bad deployment
        if broken:
            raise ValueError("a bug")


async def metered_worker(target: Target, queue: str, port: int) -> None:
    """A worker's process, which Prometheus can scrape."""
    client = await connect(target, runtime=metered(port))
    async with make_worker(client, queue, [SendParcel, Invoice], [call_courier]):
        await asyncio.Future()


def become(*command: str) -> None:
    """This process becomes another program, and ends with the script as all its processes do."""
    os.execv(command[0], command)


def receive_alerts(port: int, ledger: str) -> None:
    """The webhook: notes every alert that comes as "firing NAME" or "resolved NAME"."""

    def respond(posted: bytes) -> tuple[int, bytes]:
        for alert in json.loads(posted)["alerts"]:
            note(ledger, f"{alert['status']} {alert['labels']['alertname']}")
        return 200, b""

    serve_http(port, respond)


@dataclass(frozen=True)
class Plant:
    """The system that is watched: a server, two workers' ports, and their queues."""

    server: Server
    server_port: int
    ports: tuple[int, int]
    queues: tuple[str, str]
    trip: Trip

    def worker(self, lab: Lab, number: int) -> contextlib.AbstractAsyncContextManager[Any]:
        return lab.process(metered_worker, self.server.target, self.queues[number], self.ports[number])

    async def start(self, flow: Any, name: str, queue: int = 0) -> WorkflowHandle[Any, Any]:
        queue_name = self.queues[queue]
        return await self.server.client.start_workflow(
            flow, self.trip, id=f"{queue_name}-{name}", task_queue=queue_name
        )


def find_programs() -> dict[str, str]:
    """Prometheus' three programs, as Debian or their makers name them; those that are there."""
    wanted = {"prometheus": ["prometheus"], "promtool": ["promtool"],
              "alertmanager": ["prometheus-alertmanager", "alertmanager"]}  # fmt: skip
    found = {program: next(filter(None, map(shutil.which, names)), None) for program, names in wanted.items()}
    return {program: path for program, path in found.items() if path}


def prometheus_yml(rules: Path, alertmanager: int, plant: Plant) -> str:
    workers = ", ".join(f"'127.0.0.1:{port}'" for port in plant.ports)
    return f"""
global: {{scrape_interval: 1s, evaluation_interval: 500ms}}
rule_files: ['{rules}']
alerting: {{alertmanagers: [{{static_configs: [{{targets: ['127.0.0.1:{alertmanager}']}}]}}]}}
scrape_configs:
  - job_name: temporal-workers
    static_configs: [{{targets: [{workers}]}}]
  - job_name: temporal-server
    static_configs: [{{targets: ['127.0.0.1:{plant.server_port}']}}]
    metric_relabel_configs: [{{source_labels: [__name__], regex: 'approximate_.*', action: keep}}]
"""


def alertmanager_yml(webhook: int) -> str:
    return f"""
route: {{receiver: webhook, group_by: [alertname], group_wait: 0s, group_interval: 1s, repeat_interval: 1h}}
receivers: [{{name: webhook, webhook_configs: [{{url: 'http://127.0.0.1:{webhook}/', send_resolved: true}}]}}]
"""


@dataclass(frozen=True)
class Watch:
    """Prometheus and Alertmanager at work: where Prometheus is asked, and what the webhook was told."""

    url: str
    ledger: str

    async def query(self, path: str) -> Any:
        answer = await http(f"{self.url}/api/v1/{path}")
        return json.loads(answer.text)["data"] if answer.status == 200 else {}

    async def evaluated(self, since: float) -> bool:
        """Whether everything was scraped and every rule evaluated without an error since a moment."""
        targets = (await self.query("targets")).get("activeTargets", [])
        groups = (await self.query("rules")).get("groups", [])
        rules = [rule for group in groups for rule in group["rules"]]
        times = [one["lastScrape"] for one in targets] + [one["lastEvaluation"] for one in rules]
        fine = all(one["health"] in ("up", "ok") for one in [*targets, *rules])
        return fine and len(targets) == 3 and bool(rules) and min(map(moment_of, times)) > since

    def told(self, status: str) -> set[str]:
        """The alerts of which the webhook was last told that they are firing, or resolved."""
        last = {name: said for said, name in (line.split() for line in notes(self.ledger))}
        return {name for name, said in last.items() if said == status}


def moment_of(text: str) -> float:
    """A time as Prometheus writes it, with nanoseconds."""
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", text.replace("Z", "+00:00"))).timestamp()


@contextlib.asynccontextmanager
async def watching(lab: Lab, plant: Plant, programs: Mapping[str, str]) -> AsyncIterator[Watch | None]:
    """Prometheus, Alertmanager and the webhook, a process each; None where a program is missing."""
    if len(programs) < 3:
        yield None
        return
    prometheus, alertmanager, webhook = free_port(), free_port(), free_port()
    rules, ledger = lab.folder / "rules.yml", lab.file("webhook")
    text = RULES.read_text(encoding="utf-8")
    for old, new in QUICK.items():
        assert old in text, f"{RULES.name} no longer holds {old!r}"
        text = text.replace(old, new)
    rules.write_text(text, encoding="utf-8")
    (lab.folder / "prometheus.yml").write_text(prometheus_yml(rules, alertmanager, plant), encoding="utf-8")
    (lab.folder / "alertmanager.yml").write_text(alertmanager_yml(webhook), encoding="utf-8")
    async with (
        lab.process(receive_alerts, webhook, ledger),
        lab.process(
            become, programs["alertmanager"], f"--config.file={lab.file('alertmanager.yml')}",
            f"--storage.path={lab.file('alertmanager')}", f"--web.listen-address=127.0.0.1:{alertmanager}",
            "--cluster.listen-address=", "--log.level=warn",
        ),
        lab.process(
            become, programs["prometheus"], f"--config.file={lab.file('prometheus.yml')}",
            f"--storage.tsdb.path={lab.file('prometheus')}", f"--web.listen-address=127.0.0.1:{prometheus}",
            "--log.level=warn",
        ),
    ):  # fmt: skip
        yield Watch(f"http://127.0.0.1:{prometheus}", ledger)


async def failure_rate(plant: Plant, before: Metrics) -> tuple[float, float]:
    """(failed attempts, all attempts) of the courier's activity since a scrape, by the worker's metrics."""
    now = await scrape(plant.ports[0])
    return tuple(
        now.value(name, activity_type="call_courier") - before.value(name, activity_type="call_courier")
        for name in ("temporal_activity_execution_failed", "temporal_activity_execution_latency_count")
    )  # type: ignore[return-value]  # two names, two values


async def backlog(plant: Plant, queue: int) -> tuple[float, float]:
    """(tasks that wait in a queue, the age of the oldest in seconds), by the server's metrics."""
    names = ("approximate_backlog_count", "approximate_backlog_age_seconds")
    seen = await scrape(plant.server_port, *names)
    queue_name = label(plant.queues[queue])
    # A queue is kept in several partitions, which count for themselves.
    return seen.value(names[0], taskqueue=queue_name), seen.largest(names[1], taskqueue=queue_name)


WAITING = 4  # workflows that are started where no worker is


async def deliver(plant: Plant, name: str, parcels: int = 6) -> None:
    handles = [await plant.start(SendParcel.run, f"{name}-{number}") for number in range(parcels)]
    await asyncio.gather(*(handle.result() for handle in handles))


async def healthy(plant: Plant, watch: Watch | None) -> Evidence:
    """Parcels are sent and nothing is wrong: no value is out of order, and no alert is raised."""
    await deliver(plant, "well")
    counted, done = "temporal_activity_execution_latency_count", len(notes(plant.trip.ledger))
    await scraped(plant.ports[0], lambda seen: seen.value(counted, activity_type="call_courier") >= done)
    failed, attempts = await failure_rate(plant, Metrics([]))
    waiting, _ = await backlog(plant, 1)
    ran = Counter(notes(plant.trip.ledger))
    pollers = [(await scrape(port)).value("temporal_num_pollers") for port in plant.ports]
    raised = "no Prometheus here to ask"
    quiet = True
    if watch:
        since = time.time()
        await until(lambda: watch.evaluated(since), "Prometheus has seen the healthy run")
        alerts = (await watch.query("alerts"))["alerts"]
        quiet = not alerts and not notes(watch.ledger)
        raised = f"alerts pending or firing: {len(alerts)}, sent to the webhook: {len(notes(watch.ledger))}"
    return control(
        "a healthy run raises nothing",
        (failed, attempts) == (0, ran["done"]) and attempts > 0 and waiting == 0 and min(pollers) > 0 and quiet,
        f"{attempts:g} attempts, {failed:g} failed; {waiting:g} tasks waiting; pollers of the two workers: "
        f"{', '.join(f'{one:g}' for one in pollers)}; {raised}",
    )


async def by_value(plant: Plant, before: Metrics, begun: float) -> list[Evidence]:
    """While things are broken: the numbers that rules can be written on, against what really happens."""
    noted = len(notes(plant.trip.ledger))
    await until(lambda: len(notes(plant.trip.ledger)) >= noted + 6, "the courier was asked in vain")
    ledger_before = Counter(notes(plant.trip.ledger))
    failed, attempts = await failure_rate(plant, before)
    ledger_after = Counter(notes(plant.trip.ledger))
    with contextlib.suppress(TimeoutError):
        await until(lambda: grown(plant), f"{WAITING} tasks wait", 20)
    count, age = await backlog(plant, 1)
    elapsed = time.time() - begun
    stuck = (await scrape(plant.ports[0])).value("temporal_workflow_task_execution_failed", workflow_type="Invoice")
    alive, gone = [(await http(f"http://127.0.0.1:{port}/metrics")).status for port in plant.ports]
    return [
        works(
            "the failure rate is in the worker's metrics",
            # Attempts of three activities go on while it is scraped, and are noted before they are counted.
            ledger_before["failed"] - 3 <= failed <= ledger_after["failed"] and 0 <= attempts - failed <= 1 < attempts,
            f"since the courier is away: {failed:g} of {attempts:g} attempts failed, in the ledger "
            f"{ledger_before['failed']} to {ledger_after['failed']} while it was scraped",
        ),
        works(
            "stuck tasks are in the metrics: those that nobody takes, and those whose code throws",
            count == WAITING and 1 < age <= elapsed + 1 and stuck > 0,
            f"{WAITING} workflows started where no worker is: backlog {count:g}, the oldest {age:.1f} s of "
            f"{elapsed:.1f} s; failed workflow tasks of a workflow with a bug: {stuck:g}",
        ),
        works(
            "a missing worker can be told from one that is there",
            alive == 200 and gone == 0,
            f"/metrics of the living worker: HTTP {alive}; of the one that was killed: "
            f"{f'HTTP {gone}' if gone else 'nobody answers'}",
        ),
    ]


async def grown(plant: Plant) -> bool:
    count, age = await backlog(plant, 1)
    return count == WAITING and age > 1


async def rules_checked(programs: Mapping[str, str]) -> Evidence:
    """promtool reads the shipped files as they are, and plays series of half an hour to the rules."""
    claim = "promtool accepts the rules as they are shipped, and made-up half hours raise what they should"
    if "promtool" not in programs:
        return holds(claim, None, "promtool is not installed (Debian: apt install prometheus)")
    ended = []
    for what, file in (("check", RULES), ("test", RULES_TEST)):
        process = await asyncio.create_subprocess_exec(
            programs["promtool"], what, "rules", file.name, cwd=file.parent,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        out, _ = await asyncio.wait_for(process.communicate(), 30)
        ended.append((process.returncode, " ".join(out.decode().split())[-120:]))
    count = RULES.read_text(encoding="utf-8").count("- alert:")
    return holds(
        claim,
        [code for code, _ in ended] == [0, 0] and f"SUCCESS: {count} rules found" in ended[0][1] and count > 0,
        f"in docs/alerts: {ended[0][1]}; {ended[1][1]}",
    )


async def alerted(lab: Lab, plant: Plant, watch: Watch | None, alive: Any, mend: Callable[[], None]) -> list[Evidence]:
    """The alerts reach the webhook, and end after the repair."""
    fires = "each fault fires its alert, from metrics over Prometheus and Alertmanager to a webhook"
    resolves = "after the repair every alert is resolved; the worker that kept failing was never restarted"
    if watch is None:
        missing = "prometheus or prometheus-alertmanager is not installed (Debian: apt install, by these names)"
        return [holds(fires, None, missing), holds(resolves, None, missing)]
    begun = time.monotonic()
    with contextlib.suppress(TimeoutError):
        await until(lambda: watch.told("firing") >= EXPECTED, "every alert has fired", 60)
    fired, took = watch.told("firing"), time.monotonic() - begun
    mend()
    begun = time.monotonic()
    async with plant.worker(lab, 1):
        with contextlib.suppress(TimeoutError):
            await until(lambda: watch.told("resolved") >= EXPECTED, "every alert is resolved", 60)
        resolved, seconds = watch.told("resolved"), time.monotonic() - begun
        left = (await watch.query("alerts"))["alerts"]
    return [
        holds(
            fires,
            fired == EXPECTED,
            f"the webhook was told of {', '.join(sorted(fired))}; the last {took:.1f} s after the numbers were seen; "
            f"rules as shipped, with seconds for minutes: {', '.join(f'{old} {new}' for old, new in QUICK.items())}",
        ),
        holds(
            resolves,
            resolved == EXPECTED and fired == EXPECTED and not left and alive.alive,
            f"resolved {seconds:.1f} s after the repair: {', '.join(sorted(resolved))}; left in Prometheus: "
            f"{len(left)}; process {alive.pid} of the failing worker still runs",
        ),
    ]


async def no_alerting(lab: Lab) -> Evidence:
    groups = ("operator", "task-queue", "worker", "workflow")
    helps = await asyncio.gather(*(lab.cli(group, "--help") for group in groups))
    spoken = [word for one in helps for word in re.findall(r"(?i)\balert\w*|\bwebhook\w*", one.out)]
    methods = [*dir(lab.client.workflow_service), *dir(lab.client.operator_service)]
    found = [name for name in methods if re.search("alert|webhook", name)]
    return limit(
        "Temporal itself raises no alerts: Prometheus, the rules and who is told are the user's to run",
        not found and not spoken and "describe_workflow_execution" in methods and all(one.code == 0 for one in helps),
        f"methods of the server's API that speak of alerts: {', '.join(found) or 'none'}; of the command line's groups "
        f"{', '.join(groups)}: {', '.join(spoken) or 'none'}; rules to begin with are in docs/alerts",
    )


@OB.item("OB-05", "Alerts", seconds=200)
async def alerts(lab: Lab) -> AsyncIterator[Evidence]:
    """A healthy run; then a service fails, code breaks, a worker dies and tasks pile up; then all is repaired."""
    programs, server_port = find_programs(), free_port()
    trip = Trip(lab.file("courier-is-away"), lab.file("courier"))
    quick = {"matching.backlogMetricsEmitInterval": '"500ms"'}  # how often the server says how much waits
    async with lab.private_server(settings=quick, arguments=["--metrics-port", str(server_port)]) as server:
        queues = (f"{lab.id}-parcels", f"{lab.id}-mails")
        plant = Plant(server, server_port, (free_port(), free_port()), queues, trip)
        async with watching(lab, plant, programs) as watch, plant.worker(lab, 0) as alive:
            async with plant.worker(lab, 1) as victim:
                for port in plant.ports:
                    await until(partial(answers_metrics, port), "the workers' metrics are served")
                yield await healthy(plant, watch)
                before = await scrape(plant.ports[0])
                note(trip.courier, "away")  # the fault: the courier's service, and the code of Invoice
                await victim.kill()
            begun = time.time()
            started = [await plant.start(SendParcel.run, f"late-{number}") for number in range(3)]
            started += [await plant.start(Invoice.run, "bug")]
            started += [await plant.start(SendParcel.run, f"unserved-{number}", 1) for number in range(WAITING)]
            for evidence in await by_value(plant, before, begun):
                yield evidence
            for evidence in await alerted(lab, plant, watch, alive, partial(os.unlink, trip.courier)):
                yield evidence
    yield await rules_checked(programs)
    yield await no_alerting(lab)
    rules = RULES.read_text(encoding="utf-8").count("- alert:")
    yield native(
        "the numbers are in the metrics; the rules are not",
        (Client.connect, "runtime"),
        (TelemetryConfig, "metrics"),
        PrometheusConfig,
        "temporal server start-dev --metrics-port",
        adds=[f"{rules} rules for Prometheus"],
    )


async def answers_metrics(port: int) -> bool:
    return (await http(f"http://127.0.0.1:{port}/metrics")).status == 200


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


@dataclass
class Visit:
    name: str
    ledger: str
    fails: bool = False


@activity.defn
async def greet(visit: Visit) -> None:
    attempt = activity.info().attempt
    note(visit.ledger, f"greet {visit.name} {attempt}")
    activity.logger.info("greeting %s", visit.name)
    if visit.fails and attempt == 1:
        raise ApplicationError("lost\nfor words")


@workflow.defn
class Welcome:
    def __init__(self) -> None:
        self.at_door = False

    @workflow.run
    async def run(self, visit: Visit) -> None:
        note(visit.ledger, f"entered {visit.name}")  # never do this: it counts how often the code is run
        workflow.logger.info("expecting %s", visit.name)
        logging.getLogger("plain").info("expecting %s", visit.name)
        await workflow.execute_activity(greet, visit, start_to_close_timeout=PATIENT, retry_policy=QUICKLY)
        await workflow.wait_condition(lambda: self.at_door)
        workflow.logger.info("goodbye %s", visit.name)

    @workflow.signal
    def leave(self) -> None:
        self.at_door = True


@workflow.defn
class Stumble:
    @workflow.run
    async def run(self) -> None:
        raise ValueError("a bug in workflow code")


async def logging_worker(target: Target, queue: str, stream: str) -> None:
    """A worker's process whose every log, Python's and the core's, goes to one stream as JSON lines."""
    handler = logging.FileHandler(stream)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # The ids have fields of their own, so they need not be in the message as well.
    workflow.logger.workflow_info_on_message = activity.logger.activity_info_on_message = False
    core = LoggingConfig(
        filter=TelemetryFilter(core_level="WARN", other_level="ERROR"),
        forwarding=LogForwardingConfig(logger=logging.getLogger("temporal-core"), append_log_fields_to_message=False),
    )
    client = await connect(target, runtime=Runtime(telemetry=TelemetryConfig(logging=core)))
    # No cache: every workflow task begins with a replay of the whole history.
    async with make_worker(client, queue, [Welcome, Stumble], [greet], max_cached_workflows=0):
        await asyncio.Future()


VISITORS = ("Ada", "Björn", "Chidi")


def logged(stream: str, **fields: Any) -> list[dict[str, Any]]:
    """The lines of a stream that have these fields. A line that is not JSON is an error."""
    lines = [json.loads(line) for line in notes(stream)]
    return [line for line in lines if fields.items() <= line.items()]


async def visits(lab: Lab, stream: str, ledger: str) -> list[WorkflowHandle[Any, Any]]:
    """Three workflows, over a worker that is killed and its successor."""
    async with lab.process(logging_worker, lab.target, lab.task_queue, stream) as worker:
        handles = [
            await lab.client.start_workflow(
                Welcome.run,
                Visit(name, ledger, fails=name == "Chidi"),
                id=f"{lab.id}-{name}",
                task_queue=lab.task_queue,
            )
            for name in VISITORS
        ]
        for handle in handles:
            await until(partial(idle, handle), "the workflow waits at the door")
        await worker.kill()
    async with lab.process(logging_worker, lab.target, lab.task_queue, stream):
        for handle in handles:
            await handle.signal(Welcome.leave)
            await handle.result()
    return handles


async def logs_of_code(lab: Lab) -> list[Evidence]:
    stream, ledger = lab.file("log.jsonl"), lab.file("visits")
    handles = await visits(lab, stream, ledger)
    runs = {handle.id: str(handle.first_execution_run_id) for handle in handles}
    said = logged(stream, logger="temporalio.workflow")
    expected = Counter((f"{lab.id}-{name}", f"{word} {name}") for name in VISITORS for word in ("expecting", "goodbye"))
    by_activity = [line for line in logged(stream, logger="temporalio.activity") if line["level"] == "INFO"]
    greeted = Counter((line["message"].split()[1], line.get("attempt")) for line in by_activity)
    really = Counter((line.split()[1], int(line.split()[2])) for line in notes(ledger) if line.startswith("greet"))
    failed = [line for line in logged(stream, logger="temporalio.activity") if "stack" in line]
    entered = Counter(line.split()[1] for line in notes(ledger) if line.startswith("entered"))
    plain = Counter(line["message"].split()[1] for line in logged(stream, logger="plain"))
    steady = {handle.id for handle in handles if await repeated_tasks(handle) == 0}
    once = Counter((line.get("workflow_id"), line["message"]) for line in said)
    return [
        works(
            "logs of workflows and activities are JSON lines that carry the ids of their run and attempt",
            {(line.get("workflow_id"), line["message"]) for line in said} == set(expected)
            and all(line["run_id"] == runs[line["workflow_id"]] for line in said)
            and {line["workflow_type"] for line in said} == {"Welcome"}
            and set(greeted) == set(really) and len(by_activity) >= 4
            and all(line["workflow_run_id"] == runs[line["workflow_id"]] and line["activity_id"] == "1"
                    for line in by_activity),
            f"{len(notes(stream))} lines, all JSON; {len(said)} of workflows and {len(by_activity)} of activities, "
            f"each with workflow id and run id as the client has them, the activities' with id and attempt",
        ),
        holds(
            "a line is written once, however often the code is replayed, and also when another worker goes on",
            {line: count for line, count in once.items() if line[0] in steady}
            == {line: count for line, count in expected.items() if line[0] in steady}
            and len(steady) > 0 and greeted == really and min(entered.values()) > 2,
            f"workflow code run {'/'.join(map(str, entered.values()))} times, by two workers with a SIGKILL between; "
            f"its {len(expected)} lines are there {len(said)} times; runs in which no task was repeated for another "
            f"reason: {len(steady)} of {len(handles)}",
        ),
        holds(
            "the SDK logs a failed attempt by itself, with its ids, and its stack stays in the same line",
            len(failed) == 1 and failed[0].get("workflow_id") == f"{lab.id}-Chidi" and failed[0]["attempt"] == 1
            and "in greet" in failed[0]["stack"] and "lost\nfor words" in failed[0]["stack"],
            "; ".join(f"{line['level']} {line['message']!r}, attempt {line.get('attempt')}, a stack of "
                      f"{len(line['stack'].splitlines())} lines in one" for line in failed) or "no such line",
        ),
        control(
            "the same line by a plain logger in workflow code is repeated at every replay",
            plain == entered and min(plain.values()) > 1,
            f"once each by workflow.logger, and by logging {'/'.join(map(str, plain.values()))} times",
        ),
    ]  # fmt: skip


async def logs_of_core(lab: Lab) -> Evidence:
    """What the SDK's core, which is written in Rust, has to say stands in the same stream."""
    stream, queue = lab.file("core.jsonl"), f"{lab.id}-core"
    async with lab.process(logging_worker, lab.target, queue, stream):
        handle = await lab.client.start_workflow(Stumble.run, id=queue, task_queue=queue)
        run_id = str(handle.first_execution_run_id)
        with contextlib.suppress(TimeoutError):
            await until(lambda: core_lines(stream, run_id), "the core has said so", 30)
        await handle.terminate("seen enough")
    found, python = core_lines(stream, run_id), logged(stream, logger="temporalio.worker._workflow_instance")
    return holds(
        "the core's own log is forwarded into the same stream, with its fields",
        len(found) > 0 and found[0]["level"] == "WARNING" and len(python) > 0,
        f"{len(found)} of core: {found[0]['level'] if found else 'none'} "
        f"{found[0]['message'][:90] if found else ''!r} with run_id among its fields; beside {len(python)} of Python",
    )


def core_lines(stream: str, run_id: str) -> list[dict[str, Any]]:
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
