"""OP: operations - what it takes to deploy, manage, keep, scale and share a cluster.

Between the code and its promises stands a service that somebody runs. It must be reached and secured,
managed by hand and by program, kept on a disk that may be restored, scaled, cleaned up, carried over the
death of its parts, and shared by tenants who do not trust each other. The seven items do each of these
with servers that they start, break and throw away, and say where a dev server ends and a production
cluster would have to begin.
"""

from cluster import Cluster, Region
from common import (
    Category,
    Evidence,
    Fact,
    NotRun,
    Spread,
    Target,
    at_least,
    at_most,
    between,
    cited,
    connect,
    contains,
    control,
    differs,
    equal,
    figure,
    find_cli,
    holds,
    lacks,
    limit,
    native,
    one_of,
    piece,
    side_by_side,
    slowness,
    words,
    works,
)
from lab import (
    Books,
    Call,
    Child,
    Lab,
    Server,
    count_events,
    ended,
    free_port,
    history_of,
    hold,
    name_of,
    note,
    notes,
    open_gate,
    refusal,
    run,
    run_cli,
    slow,
    status_of,
    until,
)

import asyncio
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import sqlite3
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

from google.protobuf.duration_pb2 import Duration
from temporalio import activity, workflow
from temporalio.api.batch.v1 import BatchOperationSignal
from temporalio.api.common.v1 import WorkflowExecution, WorkflowType
from temporalio.api.enums.v1 import ArchivalState, BatchOperationState, IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import (
    DeleteWorkflowExecutionRequest,
    DescribeBatchOperationRequest,
    DescribeNamespaceRequest,
    GetClusterInfoRequest,
    RegisterNamespaceRequest,
    ResetWorkflowExecutionRequest,
    StartBatchOperationRequest,
    StartWorkflowExecutionRequest,
)
from temporalio.client import (
    Client,
    WorkflowExecutionStatus,
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowUpdateFailedError,
)
from temporalio.common import SearchAttributeKey, SearchAttributePair, TypedSearchAttributes
from temporalio.envconfig import ClientConfig
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RetryConfig, RPCError, RPCStatusCode, TLSConfig
from temporalio.worker import (
    PollerBehaviorAutoscaling,
    ResourceBasedSlotConfig,
    Worker,
    WorkerTuner,
)

OP = Category(
    "OP",
    "Operations",
    "What does it take to deploy, manage, keep, scale and share a cluster?",
)

T = TypeVar("T")
Travelling = WorkflowHandle[Any, Any]


def soon() -> timedelta:
    """An attempt or a task that a kill has cut off is given up after this long, so that kills cost little time."""
    return timedelta(seconds=3 * slowness())


# An attempt that a kill has cut off is given up after this long, here short, so that kills cost little time.
SOON = timedelta(seconds=2)
# Where nothing is to be given up, a slow machine gets all the time it needs.
PATIENT = timedelta(seconds=30)


# A call that deletes is done once the server's queue has noted that the closing was processed, which it does
# only every 30 s unless it is set otherwise.
DELETES_SOON = {"history.transferProcessorUpdateAckInterval": '"500ms"'}


class Proxy:
    """A TCP proxy in front of a server. It ends TLS where it has a context; it can delay and cut connections."""

    def __init__(self, server: Server, tls: ssl.SSLContext | None = None) -> None:
        self._server, self._tls = server, tls
        self._open: set[asyncio.StreamWriter] = set()
        self.delay = 0.0
        self.accepted = 0
        self.speakers: set[str] = set()  # the names in the certificates of the clients, where they showed one

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> "Proxy":
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()

    @property
    def connections(self) -> int:
        return len(self._open) // 2

    def cut(self) -> int:
        """Break every connection off. Returns how many there were."""
        broken = self.connections
        for writer in self._open:
            writer.transport.abort()
        return broken

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        shown = writer.get_extra_info("peercert") or {}
        self.speakers |= {name for _, name in shown.get("subjectAltName", ())}
        host, port = self._server.address.split(":")
        try:
            onward = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, onward[1]}
        self._open |= pair
        try:
            await asyncio.gather(self._copy(reader, onward[1]), self._copy(onward[0], writer))
        finally:
            self._open -= pair

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A connection that breaks is what a proxy is here for; both ends learn of it by the abort.
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


# OP-01 Deployment model ------------------------------------------------------------------------------
# One command starts a server, and where that server is, who may speak to it and how it is encrypted are
# settings. The program below is the same for all of them.


@activity.defn
async def say_hello(name: str) -> str:
    return f"Hello, {name}!"


@workflow.defn
class Hello:
    @workflow.run
    async def run(self, name: str) -> str:
        return await workflow.execute_activity(say_hello, name, start_to_close_timeout=PATIENT)


async def greet(lab: Lab, settings: Mapping[str, str], config_file: str | None = None) -> str:
    """A program that knows of no address, certificate or key: all that comes from its settings."""
    options = ClientConfig.load_client_connect_config(
        config_file=config_file,
        disable_file=config_file is None,
        override_env_vars=settings,  # left out, it would be the process's environment
    )
    client = await Client.connect(**options)
    queue = f"{lab.id}-{uuid.uuid4().hex[:6]}"
    async with lab.worker([Hello], [say_hello], client=client, task_queue=queue):
        return await client.execute_workflow(Hello.run, "Temporal", id=queue, task_queue=queue)


GREETED = "Hello, Temporal!"


async def turned_away(lab: Lab, settings: Mapping[str, str]) -> tuple[str, float]:
    """What the SDK says when it does not get in, and after how many seconds; "" when it does."""
    begun = time.monotonic()
    try:
        await greet(lab, settings)
    except (RuntimeError, RPCError) as error:
        return str(error), time.monotonic() - begun
    return "", time.monotonic() - begun


class Certificates:
    """An authority of our own with certificates for servers and for one client, and one that is not trusted."""

    def __init__(self, lab: Lab) -> None:
        # Here and not above: the workflow sandbox need not load it for every run.
        import trustme

        self._authority, stranger, self._lab = trustme.CA(), trustme.CA(), lab
        client = self._authority.issue_cert("greeter@example.com")
        self._authority.cert_pem.write_to_path(lab.file("ca.pem"))
        stranger.cert_pem.write_to_path(lab.file("stranger.pem"))
        client.cert_chain_pems[0].write_to_path(lab.file("client.pem"))
        client.private_key_pem.write_to_path(lab.file("client.key"))
        self.trust = {"TEMPORAL_TLS_SERVER_CA_CERT_PATH": lab.file("ca.pem")}
        self.strange_trust = {"TEMPORAL_TLS_SERVER_CA_CERT_PATH": lab.file("stranger.pem")}
        self.identity = {
            "TEMPORAL_TLS_CLIENT_CERT_PATH": lab.file("client.pem"),
            "TEMPORAL_TLS_CLIENT_KEY_PATH": lab.file("client.key"),
        }

    def tls(self, *names: str, mutual: bool = False) -> ssl.SSLContext:
        """The server's side of TLS, by these names; `mutual` asks the client for a certificate, too."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._authority.issue_cert(*names).configure_cert(context)
        context.set_alpn_protocols(["h2"])
        if mutual:
            self._authority.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def key_and_chain(self, name: str) -> tuple[bytes, bytes]:
        """A server's certificate as grpcio takes it."""
        issued = self._authority.issue_cert(name)
        return issued.private_key_pem.bytes(), b"".join(one.bytes() for one in issued.cert_chain_pems)


async def one_command(lab: Lab) -> list[Evidence]:
    """Start a server; then start this very script once more and name that server in its settings."""
    begun = time.monotonic()
    async with lab.private_server() as server:
        ready = time.monotonic() - begun
        said = await greet(lab, {"TEMPORAL_ADDRESS": server.address})
        seconds = time.monotonic() - begun
        yielded = works(
            "one command starts a server, and a first workflow completes on it",
            said == GREETED,
            f"temporal server start-dev: answers after {ready:.2f} s; first result after {seconds:.2f} s",
        )
        before = (await server.client.count_workflows()).count
        record, code = await run_again(lab, "OP-04", server)
        runs = (await server.client.count_workflows()).count - before
    item = record["items"][0]
    return [
        yielded,
        works(
            "the same script runs against that server, told by settings alone",
            code == 0 and item["stars"] is not None and runs > 0
            and record["environment"]["where"] == "given server",
            f"{Path(__file__).name} OP-04 with TEMPORAL_ADDRESS set: exit {code}, {item['stars']} stars, "
            f"{runs} workflows on that server",
        ),
    ]  # fmt: skip


async def run_again(lab: Lab, item: str, server: Server) -> tuple[dict[str, Any], int]:
    """Run one item of this script against `server`. Returns what it recorded, and its exit status."""
    profile, verdicts = lab.file("given.toml"), lab.file("given.json")
    Path(profile).write_text("[profile.default]\n")
    # All of these are set, so that no .env file and no profile of the user's decides where this run goes.
    settings = {
        "TEMPORAL_ADDRESS": server.address,
        "TEMPORAL_NAMESPACE": "default",
        "TEMPORAL_TLS": "false",
        "TEMPORAL_PROFILE": "default",
        "TEMPORAL_CONFIG_FILE": profile,
    }
    others = {key: value for key, value in os.environ.items() if not key.startswith("TEMPORAL_") or "CLI" in key}
    script = await asyncio.create_subprocess_exec(
        sys.executable, __file__, item, "--json", verdicts,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=others | settings,
    )  # fmt: skip
    try:
        code = await asyncio.wait_for(script.wait(), 200)
    finally:
        if script.returncode is None:
            script.terminate()
    return json.loads(Path(verdicts).read_text(encoding="utf-8")), code


async def encrypted(lab: Lab, server: Server, certificates: Certificates) -> list[Evidence]:
    """TLS and mTLS by settings and by a profile, each ended by a proxy that knows who came."""
    async with (
        Proxy(server, certificates.tls("127.0.0.1")) as tls,
        Proxy(server, certificates.tls("temporal.example", mutual=True)) as mutual,
    ):
        named = {"TEMPORAL_TLS_SERVER_NAME": "temporal.example"}
        there = {"TEMPORAL_ADDRESS": tls.address}
        there_too = {"TEMPORAL_ADDRESS": mutual.address}
        by_tls = await greet(lab, there | certificates.trust)
        unknown = set(tls.speakers)
        by_mutual = await greet(lab, there_too | certificates.trust | certificates.identity | named)
        known = set(mutual.speakers)
        mutual.speakers.clear()
        profile = lab.file("profile.toml")
        Path(profile).write_text(PROFILE.format(address=mutual.address, folder=lab.folder), encoding="utf-8")
        by_profile = await greet(lab, {"TEMPORAL_PROFILE": "secured"}, profile)
        profiled = set(mutual.speakers)
        refused = {
            "wrong authority": await turned_away(lab, there | certificates.strange_trust),
            "wrong name": await turned_away(lab, there_too | certificates.trust | certificates.identity),
            "no client certificate": await turned_away(lab, there_too | certificates.trust | named),
        }
        accepted = tls.accepted
        plain = await turned_away(lab, there)
    return [
        holds(
            "TLS and mTLS are settings: the proxy that ends them learns the client's name from its certificate",
            by_tls == by_mutual == GREETED and accepted > 0 and unknown == set() and known == {"greeter@example.com"},
            f"TLS: {by_tls!r}, client unknown; mTLS under another server name: {by_mutual!r}, "
            f"client {', '.join(known) or 'unknown'}",
        ),
        holds(
            "the same settings from a named profile of a TOML file",
            by_profile == GREETED and profiled == {"greeter@example.com"},
            f"TEMPORAL_PROFILE=secured: {by_profile!r}, client {', '.join(profiled) or 'unknown'}",
        ),
        holds(
            "wrong authority, wrong name and missing client certificate are refused within 5 seconds, the first two "
            "with the reason",
            all(words and seconds < 5 for words, seconds in refused.values())
            and "UnknownIssuer" in refused["wrong authority"][0] and "NotValidForName" in refused["wrong name"][0],
            "; ".join(f"{case}: {seconds:.3f} s, {reason(words)}" for case, (words, seconds) in refused.items()),
        ),
        control(
            "a client that speaks plaintext to the TLS port gets nowhere",
            plain[0] != "" and plain[1] < 5,
            f"{plain[1]:.3f} s, {reason(plain[0])}",
        ),
    ]  # fmt: skip


PROFILE = """
[profile.secured]
address = "{address}"
namespace = "default"

[profile.secured.tls]
server_name = "temporal.example"
server_ca_cert_path = "{folder}/ca.pem"
client_cert_path = "{folder}/client.pem"
client_key_path = "{folder}/client.key"
"""


def reason(words: str) -> str:
    """The core of what the SDK says, which wraps it in several layers."""
    if not words:
        return "let in"
    for core in ("UnknownIssuer", "NotValidForName", "peer closed connection", "broken pipe", "wrong key"):
        if core in words:
            return f"the SDK says {core!r}"
    return f"the SDK says {words[:120]!r}"


@contextlib.asynccontextmanager
async def key_gate(server: Server, key: str, certificates: Certificates, seen: Counter[str]) -> AsyncIterator[str]:
    """A gateway that ends TLS, counts the authorization headers it sees, and passes on who has the right one.

    It hands the bytes of each call on as they are, and knows nothing of Temporal. Yields its address.
    """
    import grpc
    import grpc.aio

    class Gate(grpc.GenericRpcHandler):  # type: ignore[misc, unused-ignore]
        def service(self, call: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
            header = str(dict(call.invocation_metadata).get("authorization", ""))
            seen[header] += 1
            passes = functools.partial(forward, call.method) if header == f"Bearer {key}" else refuse
            return grpc.unary_unary_rpc_method_handler(passes)

    async def forward(method: str, request: bytes, context: Any) -> bytes:
        try:
            call: Any = onward.unary_unary(method)
            answer: bytes = await call(request, timeout=context.time_remaining())
            return answer
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details(), tuple(error.trailing_metadata()))
            raise

    async def refuse(_request: bytes, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong key")

    gate = grpc.aio.server()
    gate.add_generic_rpc_handlers([Gate()])
    port = gate.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([certificates.key_and_chain("127.0.0.1")]))
    async with grpc.aio.insecure_channel(server.address) as onward:
        await gate.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await gate.stop(None)


async def keyed(lab: Lab, server: Server, certificates: Certificates) -> Evidence:
    seen: Counter[str] = Counter()
    async with key_gate(server, "right", certificates, seen) as address:
        settings = {"TEMPORAL_ADDRESS": address, **certificates.trust}
        said = await greet(lab, settings | {"TEMPORAL_API_KEY": "right"})
        calls = dict(seen)
        wrong = await turned_away(lab, settings | {"TEMPORAL_API_KEY": "wrong"})
        none = await turned_away(lab, settings)
    return holds(
        "an API key is a setting, sent with every call; a wrong or a missing one is refused within 5 seconds",
        said == GREETED and set(calls) == {"Bearer right"} and "wrong key" in wrong[0] and "wrong key" in none[0]
        and wrong[1] < 5 and none[1] < 5 and set(seen) == {"Bearer right", "Bearer wrong", ""},
        f"{said!r}; headers seen at the gateway: {calls}; wrong key: {wrong[1]:.3f} s, {reason(wrong[0])}; "
        f"no key: {none[1]:.3f} s, {reason(none[0])}",
    )  # fmt: skip


async def secured(lab: Lab) -> list[Evidence]:
    certificates = Certificates(lab)
    async with lab.private_server() as server:
        return [*await encrypted(lab, server, certificates), await keyed(lab, server, certificates)]


async def help_of(*command: str) -> str:
    """What `temporal ... --help` says."""
    cli = find_cli()
    if cli is None:
        raise NotRun("the temporal command line is needed, and there is none")
    return (await run_cli(cli, Target(None), [*command, "--help"], 30)).out


@OP.item("OP-01", "Deployment model", seconds=240)
async def deployment_model(lab: Lab) -> AsyncIterator[Evidence]:
    """Start a server, run this script against it, and reach it through TLS, mTLS, a profile and a key."""
    async for evidence in side_by_side(one_command(lab), secured(lab)):
        yield evidence
    yield native(
        "address, TLS, certificates, key and profile are arguments and settings of the SDK",
        ClientConfig.load_client_connect_config,
        (Client.connect, "tls"),
        (Client.connect, "api_key"),
        (TLSConfig, "server_root_ca_cert"),
        (TLSConfig, "domain"),
        (TLSConfig, "client_cert"),
        (TLSConfig, "client_private_key"),
        "temporal server start-dev",
    )
    said = await help_of("server", "start-dev")
    yield limit(
        "the server that one command starts is not for production, and has no TLS of its own",
        "not intended for production use" in said and "--port" in said and "--tls" not in said,
        f"its --help: {'not intended for production use' if 'not intended' in said else 'no warning'}; "
        f"flags for TLS: {'some' if '--tls' in said else 'none'}",
    )
    yield cited(
        "a production cluster comes as Temporal Cloud, or self-hosted by Helm chart or Docker Compose with a "
        "database of one's own and TLS in the frontend",
        "docs.temporal.io/self-hosted-guide, github.com/temporalio/helm-charts",
    )


# OP-02 Management API --------------------------------------------------------------------------------
# Whatever runs can be managed from outside, by program, by command line and by HTTP, while the workflow
# has no code for being managed; and a call that is wrong is refused, and says why.


@dataclass
class Purchase:
    ledger: str
    item: str


@activity.defn
async def ship(items: list[str], ledger: str) -> None:
    note(ledger, " ".join(items))


@workflow.defn
class Basket:
    @workflow.init
    def __init__(self, purchase: Purchase) -> None:
        self.items = [purchase.item]
        self.closed = False

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        await workflow.wait_condition(lambda: self.closed)
        await workflow.execute_activity(ship, args=[self.items, purchase.ledger], start_to_close_timeout=PATIENT)
        return self.items

    @workflow.signal
    def add(self, item: str) -> None:
        self.items.append(item)

    @workflow.signal
    def close(self) -> None:
        self.closed = True

    @workflow.query
    def contents(self) -> list[str]:
        return self.items

    @workflow.update
    def swap(self, item: str) -> str:
        self.items[0] = item
        return item

    @swap.validator
    def check_swap(self, item: str) -> None:
        if not item:
            raise ValueError("an item needs a name")


class Refused(Exception):
    """A call was refused: by which status of its interface, and in which words."""

    def __init__(self, status: str, words: str) -> None:
        super().__init__(f"{status}: {words}")
        self.status, self.words = status, words


REGION = SearchAttributeKey.for_keyword("Region")


class Manager(Protocol):
    """What an operator does to workflows. Raises Refused."""

    name: str

    async def start(self, id: str, purchase: Purchase, region: str = "nowhere", type: str = "Basket") -> str: ...
    async def status(self, id: str, run_id: str = "") -> str: ...
    async def list(self, query: str) -> list[str]: ...
    async def count(self, query: str) -> int: ...
    async def signal(self, id: str, name: str, *arguments: str, run_id: str = "") -> None: ...
    async def query(self, id: str, name: str) -> Any: ...
    async def update(self, id: str, name: str, argument: str) -> Any: ...
    async def result(self, id: str) -> Any: ...
    async def cancel(self, id: str, run_id: str = "") -> None: ...
    async def terminate(self, id: str, run_id: str = "") -> None: ...
    async def reset(self, id: str, event: int) -> str: ...
    async def delete(self, id: str) -> None: ...


class ByPython:
    """By the Python client. What it has no method for is a request to the service it holds."""

    name = "Python"

    def __init__(self, lab: Lab, client: Client) -> None:
        self.client, self._queue = client, lab.task_queue

    def _handle(self, id: str, run_id: str = "") -> WorkflowHandle[Any, Any]:
        return self.client.get_workflow_handle(id, run_id=run_id or None)

    def _execution(self, id: str) -> dict[str, Any]:
        return {"namespace": self.client.namespace, "workflow_execution": WorkflowExecution(workflow_id=id)}

    async def start(self, id: str, purchase: Purchase, region: str = "nowhere", type: str = "Basket") -> str:
        attributes = TypedSearchAttributes([SearchAttributePair(REGION, region)])
        handle = await answered(
            self.client.start_workflow(type, purchase, id=id, task_queue=self._queue, search_attributes=attributes)
        )
        return str(handle.first_execution_run_id)

    async def status(self, id: str, run_id: str = "") -> str:
        return name_of((await answered(self._handle(id, run_id).describe())).status)

    async def list(self, query: str) -> list[str]:
        async def collect() -> list[str]:
            return [one.id async for one in self.client.list_workflows(query)]

        return await answered(collect())

    async def count(self, query: str) -> int:
        return (await answered(self.client.count_workflows(query))).count

    async def signal(self, id: str, name: str, *arguments: str, run_id: str = "") -> None:
        await answered(self._handle(id, run_id).signal(name, args=arguments))

    async def query(self, id: str, name: str) -> Any:
        return await answered(self._handle(id).query(name, rpc_timeout=PATIENT))

    async def update(self, id: str, name: str, argument: str) -> Any:
        return await answered(self._handle(id).execute_update(name, argument))

    async def result(self, id: str) -> Any:
        return await answered(self._handle(id).result())

    async def cancel(self, id: str, run_id: str = "") -> None:
        await answered(self._handle(id, run_id).cancel())

    async def terminate(self, id: str, run_id: str = "") -> None:
        await answered(self._handle(id, run_id).terminate())

    async def reset(self, id: str, event: int) -> str:
        request = ResetWorkflowExecutionRequest(
            **self._execution(id), reason="a tour", workflow_task_finish_event_id=event, request_id=str(uuid.uuid4())
        )
        return (await answered(self.client.workflow_service.reset_workflow_execution(request))).run_id

    async def delete(self, id: str) -> None:
        request = DeleteWorkflowExecutionRequest(**self._execution(id))
        await answered(self.client.workflow_service.delete_workflow_execution(request))


async def answered(call: Awaitable[T]) -> T:
    """The answer to a call of the Python client, whose exceptions tell the status."""
    try:
        return await call
    except RPCError as error:
        raise Refused(error.status.name, error.message) from error
    except WorkflowUpdateFailedError as error:
        raise Refused(type(error).__name__, str(error.cause)) from error
    except (WorkflowAlreadyStartedError, WorkflowQueryFailedError) as error:
        raise Refused(type(error).__name__, str(error)) from error


class ByCommand:
    """By the command line, which is written in Go and knows nothing of Python."""

    name = "temporal"

    def __init__(self, lab: Lab, server: Server) -> None:
        self._lab, self._server = lab, server

    async def _run(self, *arguments: str) -> Any:
        """Run `temporal workflow ...`; what it prints, parsed."""
        done = await self._lab.cli("workflow", *arguments, "-o", "json", server=self._server)
        if done.code:
            raise Refused(f"exit {done.code}", " ".join(done.err.split()).removeprefix("Error: "))
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(done.out)
        return done.out

    async def start(self, id: str, purchase: Purchase, region: str = "nowhere", type: str = "Basket") -> str:
        argument = json.dumps(purchase.__dict__)
        started = await self._run(
            "start", "-w", id, "--type", type, "-t", self._lab.task_queue, "-i", argument,
            "--search-attribute", f'Region="{region}"', "--fail-existing",
        )  # fmt: skip
        return str(started["runId"])

    async def status(self, id: str, run_id: str = "") -> str:
        told = await self._run("describe", "-w", id, *which(run_id))
        return str(told["workflowExecutionInfo"]["status"]).removeprefix("WORKFLOW_EXECUTION_STATUS_")

    async def list(self, query: str) -> list[str]:
        return [one["execution"]["workflowId"] for one in await self._run("list", "--query", query)]

    async def count(self, query: str) -> int:
        return int((await self._run("count", "--query", query))["count"])

    async def signal(self, id: str, name: str, *arguments: str, run_id: str = "") -> None:
        given = [word for one in arguments for word in ("-i", json.dumps(one))]
        await self._run("signal", "-w", id, "--name", name, *given, *which(run_id))

    async def query(self, id: str, name: str) -> Any:
        return (await self._run("query", "-w", id, "--name", name))["queryResult"][0]

    async def update(self, id: str, name: str, argument: str) -> Any:
        return (await self._run("update", "execute", "-w", id, "--name", name, "-i", json.dumps(argument)))["result"]

    async def result(self, id: str) -> Any:
        return (await self._run("result", "-w", id))["result"]

    async def cancel(self, id: str, run_id: str = "") -> None:
        await self._run("cancel", "-w", id, *which(run_id))

    async def terminate(self, id: str, run_id: str = "") -> None:
        await self._run("terminate", "-w", id, *which(run_id))

    async def reset(self, id: str, event: int) -> str:
        return str((await self._run("reset", "-w", id, "-e", str(event), "--reason", "a tour"))["runId"])

    async def delete(self, id: str) -> None:
        await self._run("delete", "-w", id, "--yes")


def which(run_id: str) -> list[str]:
    return ["-r", run_id] if run_id else []


class ByHttp:
    """By HTTP and JSON, as any language speaks it."""

    name = "HTTP"

    def __init__(self, lab: Lab, port: int, namespace: str = "default") -> None:
        self._base, self._queue = f"http://127.0.0.1:{port}/api/v1/namespaces/{namespace}", lab.task_queue

    async def ask(self, path: str, body: Any = None, **query: str) -> Any:
        """POST where there is a body, else GET."""
        url = f"{self._base}/{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
        return await asyncio.to_thread(ask, request)

    async def start(self, id: str, purchase: Purchase, region: str = "nowhere", type: str = "Basket") -> str:
        body = {
            "workflowType": {"name": type},
            "taskQueue": {"name": self._queue},
            "input": [purchase.__dict__],
            "searchAttributes": {"indexedFields": {"Region": region}},
        }
        return str((await self.ask(f"workflows/{id}", body))["runId"])

    async def status(self, id: str, run_id: str = "") -> str:
        told = await self.ask(f"workflows/{id}", **({"execution.runId": run_id} if run_id else {}))
        return str(told["workflowExecutionInfo"]["status"]).removeprefix("WORKFLOW_EXECUTION_STATUS_")

    async def list(self, query: str) -> list[str]:
        found = await self.ask("workflows", query=query)
        return [one["execution"]["workflowId"] for one in found.get("executions", [])]

    async def count(self, query: str) -> int:
        return int((await self.ask("workflow-count", query=query)).get("count", 0))

    async def signal(self, id: str, name: str, *arguments: str, run_id: str = "") -> None:
        await self.ask(f"workflows/{id}/signal/{name}", {"input": list(arguments), **execution(run_id)})

    async def query(self, id: str, name: str) -> Any:
        return (await self.ask(f"workflows/{id}/query/{name}", {}))["queryResult"][0]

    async def update(self, id: str, name: str, argument: str) -> Any:
        # The server waits for a while and then answers without an outcome. Asking again with the same update id
        # is safe: it is applied once.
        request = {"meta": {"updateId": str(uuid.uuid4())}, "input": {"args": [argument]}}
        answer = {}
        while "outcome" not in answer:
            answer = await self.ask(f"workflows/{id}/update/{name}", {"request": request, "waitPolicy": COMPLETED})
        # A refused update is an answered call: status 200, and the failure is the outcome.
        if "failure" in answer["outcome"]:
            raise Refused("200", answer["outcome"]["failure"]["message"])
        return answer["outcome"]["success"][0]

    async def result(self, id: str) -> Any:
        close = {"historyEventFilterType": "HISTORY_EVENT_FILTER_TYPE_CLOSE_EVENT", "waitNewEvent": "true"}
        (event,) = (await self.ask(f"workflows/{id}/history", **close))["history"]["events"]
        return event["workflowExecutionCompletedEventAttributes"]["result"][0]

    async def cancel(self, id: str, run_id: str = "") -> None:
        await self.ask(f"workflows/{id}/cancel", execution(run_id))

    async def terminate(self, id: str, run_id: str = "") -> None:
        await self.ask(f"workflows/{id}/terminate", execution(run_id))

    async def reset(self, id: str, event: int) -> str:
        body = {"reason": "a tour", "workflowTaskFinishEventId": event, "requestId": str(uuid.uuid4())}
        return str((await self.ask(f"workflows/{id}/reset", body))["runId"])

    async def delete(self, id: str) -> None:
        await self.ask(f"workflows/{id}/delete", {})


COMPLETED = {"lifecycleStage": "UPDATE_WORKFLOW_EXECUTION_LIFECYCLE_STAGE_COMPLETED"}


def execution(run_id: str) -> dict[str, Any]:
    return {"workflowExecution": {"runId": run_id}} if run_id else {}


def ask(request: urllib.request.Request) -> Any:
    """Blocks: called in a thread."""
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = json.loads(error.read() or b"{}")
        raise Refused(str(error.code), said.get("message", "")) from error


# Each step of the tour and what must come of it, by whichever interface.
TOUR: dict[str, Any] = {
    "query after start and signal": ["tea", "milk"],
    "update": "coffee",
    "describe": "RUNNING",
    "list by search attribute": ["main"],
    "count by search attribute": 1,
    "reset makes another run": True,
    "first run after the reset": "TERMINATED",
    "query after the reset": ["coffee", "milk"],
    "after cancel": "CANCELED",
    "after terminate": "TERMINATED",
    "result": ["tea", "sugar"],
    "after delete": "NOT_FOUND",
}


async def tour(lab: Lab, by: Manager, client: Client) -> dict[str, Any]:
    """Every verb of one interface on workflows of its own. Returns what came of each step."""
    base = f"{lab.id}-{by.name}"
    ids = {name: f"{base}-{name}" for name in ("main", "ended", "finished")}
    found: dict[str, Any] = {}
    purchase = Purchase(lab.file(base), "tea")
    first = await by.start(ids["main"], purchase, region=by.name)
    await by.signal(ids["main"], "add", "milk")
    found["query after start and signal"] = await by.query(ids["main"], "contents")
    found["update"] = await by.update(ids["main"], "swap", "coffee")
    found["describe"] = await by.status(ids["main"])
    await until(lambda: by.count(f'Region = "{by.name}"'), "visibility has the workflow")
    found["list by search attribute"] = [id.rpartition("-")[2] for id in await by.list(f'Region = "{by.name}"')]
    found["count by search attribute"] = await by.count(f'Region = "{by.name}"')

    second = await by.reset(ids["main"], await first_decision(client.get_workflow_handle(ids["main"])))
    found["reset makes another run"] = second != first
    found["first run after the reset"] = await by.status(ids["main"], first)
    found["query after the reset"] = await by.query(ids["main"], "contents")
    await by.cancel(ids["main"])
    found["after cancel"] = await closing(by, ids["main"])

    await by.start(ids["ended"], purchase)
    await by.terminate(ids["ended"])
    found["after terminate"] = await closing(by, ids["ended"])

    await by.start(ids["finished"], purchase)
    await by.signal(ids["finished"], "add", "sugar")
    await by.signal(ids["finished"], "close")
    found["result"] = await by.result(ids["finished"])
    found["after delete"] = await deleted(by, ids["finished"])
    return found


async def first_decision(handle: WorkflowHandle[Any, Any]) -> int:
    """The number of the first completed workflow task, to which a run can be reset."""
    events = await history_of(handle)
    return next(int(one["eventId"]) for one in events if one["eventType"] == "EVENT_TYPE_WORKFLOW_TASK_COMPLETED")


async def closing(by: Manager, id: str) -> str:
    """The status in which a workflow ends."""

    async def closed() -> bool:
        return await by.status(id) != "RUNNING"

    await until(closed, f"{id} has ended")
    return await by.status(id)


async def deleted(by: Manager, id: str) -> str:
    """Delete a workflow, which takes the server a moment. Returns with which status it is refused then."""
    try:
        await by.delete(id)
    except Refused as refused:
        return f"not offered ({refused.status})"

    async def gone() -> str:
        return (await refused_by(by.status(id)))[0]

    await until(gone, f"{id} is deleted", 30)
    status, words = await refused_by(by.status(id))
    return "NOT_FOUND" if "not found" in words else status


async def refused_by(call: Awaitable[Any]) -> tuple[str, str]:
    """The status and the words with which a call is refused; empty when it is not."""
    try:
        await call
    except Refused as refused:
        return refused.status, refused.words
    return "", ""


def came_out(lab: Lab, by: Manager) -> list[str]:
    """What the workflows of a tour shipped: the account outside Temporal of what reached them."""
    return notes(lab.file(f"{lab.id}-{by.name}"))


async def tours(lab: Lab, client: Client, by_python: Manager, others: Sequence[Manager]) -> list[Evidence]:
    every = [by_python, *others]
    seen = await asyncio.gather(*(tour(lab, by, client) for by in every))
    python, command, http = seen
    verbs = "start, signal, query, update, describe, list, count, reset, cancel, terminate, result, delete"
    ledgers = [came_out(lab, by) for by in every]
    return [
        works(
            "every verb works from Python, on a workflow that has no code for it",
            python == TOUR and ledgers[0] == ["tea sugar"],
            f"{verbs}: {differences(python)}; shipped (ledger): {', '.join(ledgers[0])}",
        ),
        holds(
            "the same from the command line and over HTTP on the same Python workflow: the answers are equal",
            command == python and {**http, "after delete": "NOT_FOUND"} == python and ledgers[1] == ledgers[2]
            == ["tea sugar"],
            f"{len(TOUR)} answers each; temporal (Go): {differences(command)}; HTTP: {differences(http)}; "
            f"shipped (ledger): {', '.join(ledgers[1])} and {', '.join(ledgers[2])}",
        ),
        limit(
            "the HTTP API cannot delete a workflow",
            http["after delete"] != "NOT_FOUND",
            f"POST .../delete: {http['after delete']}; by Python and by command: {python['after delete']}",
        ),
    ]  # fmt: skip


def differences(found: Mapping[str, Any]) -> str:
    """Where a tour went otherwise than it must."""
    wrong = [f"{step}: {found[step]!r}" for step, right in TOUR.items() if found[step] != right]
    return "; ".join(wrong) or "as expected"


async def mixed(lab: Lab, python: Manager, command: Manager, http: Manager) -> Evidence:
    """One run, three interfaces."""
    id = f"{lab.id}-mixed"
    run_id = await python.start(id, Purchase(lab.file("mixed"), "tea"))
    await command.signal(id, "add", "milk")
    swapped = await http.update(id, "swap", "coffee")
    told = [await by.query(id, "contents") for by in (python, command, http)]
    await http.signal(id, "close", run_id=run_id)
    result = await command.result(id)
    shipped = notes(lab.file("mixed"))
    return holds(
        "one run, managed by all three in turn",
        told == [["coffee", "milk"]] * 3 and swapped == "coffee" and result == ["coffee", "milk"]
        and shipped == ["coffee milk"],
        f"started by Python, signalled by command, updated over HTTP; all three see {told[0]}; result {result}, "
        f"shipped {shipped}",
    )  # fmt: skip


@dataclass(frozen=True)
class Wrong:
    """A wrong call: how Python and HTTP name the refusal, and a word that all three must say."""

    call: Callable[[Manager, Mapping[str, str]], Awaitable[Any]]
    python: str
    http: str
    words: str
    but: str = ""  # the interface that does not have it


NO_PURCHASE = Purchase("", "")
WRONG = {
    "describe, missing id": Wrong(lambda by, ids: by.status(ids["missing"]), "NOT_FOUND", "404", "not found"),
    "signal, missing id": Wrong(lambda by, ids: by.signal(ids["missing"], "close"), "NOT_FOUND", "404", "not found"),
    "query, missing id": Wrong(lambda by, ids: by.query(ids["missing"], "contents"), "NOT_FOUND", "404", "not found"),
    "update, missing id": Wrong(
        lambda by, ids: by.update(ids["missing"], "swap", "x"), "NOT_FOUND", "404", "not found"
    ),
    "cancel, missing id": Wrong(lambda by, ids: by.cancel(ids["missing"]), "NOT_FOUND", "404", "not found"),
    "terminate, missing id": Wrong(lambda by, ids: by.terminate(ids["missing"]), "NOT_FOUND", "404", "not found"),
    "reset, missing id": Wrong(lambda by, ids: by.reset(ids["missing"], 4), "NOT_FOUND", "404", "not found"),
    "delete, missing id": Wrong(lambda by, ids: by.delete(ids["missing"]), "NOT_FOUND", "404", "not found", but="HTTP"),
    "signal, closed": Wrong(lambda by, ids: by.signal(ids["closed"], "close"), "NOT_FOUND", "404", "already completed"),
    "update, closed": Wrong(
        lambda by, ids: by.update(ids["closed"], "swap", "x"), "NOT_FOUND", "404", "already completed"
    ),
    "terminate, closed": Wrong(lambda by, ids: by.terminate(ids["closed"]), "NOT_FOUND", "404", "already completed"),
    "list, bad query": Wrong(lambda by, ids: by.list("not a query"), "INVALID_ARGUMENT", "400", "invalid query"),
    "count, bad query": Wrong(lambda by, ids: by.count("Colour = 1"), "INVALID_ARGUMENT", "400", "invalid query"),
    "query, unknown name": Wrong(
        lambda by, ids: by.query(ids["open"], "colour"), "WorkflowQueryFailedError", "400", "expected but not found"
    ),
    "update, unknown name": Wrong(
        lambda by, ids: by.update(ids["open"], "paint", "x"),
        "WorkflowUpdateFailedError",
        "200",
        "expected but not found",
    ),
    "update, refused by its validator": Wrong(
        lambda by, ids: by.update(ids["open"], "swap", ""), "WorkflowUpdateFailedError", "200", "needs a name"
    ),
    "reset, to no workflow task": Wrong(
        lambda by, ids: by.reset(ids["open"], 1), "INVALID_ARGUMENT", "400", "finish ID must be"
    ),
    "start, id taken": Wrong(
        lambda by, ids: by.start(ids["open"], NO_PURCHASE), "WorkflowAlreadyStartedError", "409", "already"
    ),
    "start, without a type": Wrong(
        lambda by, ids: by.start(ids["missing"], NO_PURCHASE, type=""), "INVALID_ARGUMENT", "400", "WorkflowType"
    ),
}


async def wrong_calls(lab: Lab, python: Manager, command: Manager, http: Manager) -> list[Evidence]:
    """Each wrong call by each interface; the open workflow must not notice any of them."""
    ids = {name: f"{lab.id}-{name}" for name in ("missing", "closed", "open")}
    for name in ("closed", "open"):
        await python.start(ids[name], Purchase(lab.file(f"wrong {name}"), "tea"))
    await python.signal(ids["closed"], "close")
    await python.result(ids["closed"])
    found = {
        name: await asyncio.gather(*(refused_by(wrong.call(by, ids)) for by in (python, command, http)))
        for name, wrong in WRONG.items()
    }
    unlike = {
        name: answers
        for name, answers in found.items()
        if not as_expected(WRONG[name], dict(zip(("Python", "temporal", "HTTP"), answers, strict=True)))
    }
    counted = Counter(answers[0][0] for answers in found.values())
    untouched = await python.query(ids["open"], "contents")
    closed_again = {by.name: (await refused_by(by.cancel(ids["closed"])))[0] for by in (python, command, http)}
    after = await python.status(ids["closed"])
    await python.terminate(ids["open"])
    return [
        holds(
            f"{len(WRONG)} kinds of wrong call are refused by all three, with a status and the same reason, and change "
            "nothing",
            not unlike and untouched == ["tea"] and notes(lab.file("wrong closed")) == ["tea"]
            and await python.status(ids["closed"]) == "COMPLETED",
            f"otherwise than expected: {unlike or 'none'}; Python: "
            f"{', '.join(f'{count} {status}' for status, count in counted.items())}; the command line: exit 1 and "
            "the reason; HTTP: 404, 400, 409; a refused update over HTTP is 200 with a failure in its outcome",
        ),
        limit(
            "to cancel what is already closed is answered as if it had been cancelled",
            not any(closed_again.values()) and after == "COMPLETED",
            f"refused by: {', '.join(by for by, status in closed_again.items() if status) or 'none of the three'}; "
            f"the workflow is {after} as before",
        ),
    ]  # fmt: skip


def as_expected(wrong: Wrong, found: Mapping[str, tuple[str, str]]) -> bool:
    """Whether all interfaces that have the call refused it with the right status, and said the word."""
    status = {"Python": wrong.python, "temporal": "exit 1", "HTTP": wrong.http}
    return all(found[by][0] == status[by] and wrong.words in found[by][1] for by in found if by != wrong.but)


async def start_again(lab: Lab, server: Server, python: Manager) -> Evidence:
    """The command line's own default for an id that is taken."""
    id = f"{lab.id}-again"
    first = await python.start(id, Purchase(lab.file("again"), "tea"))
    again = ["workflow", "start", "-w", id, "--type", "Basket", "-t", lab.task_queue, "-o", "json"]
    by_default = await lab.cli(*again, server=server)
    by_policy = await lab.cli(*again, "--id-conflict-policy", "Fail", server=server)
    told = await lab.cli(*again, "--fail-existing", server=server)
    await python.terminate(id)
    return limit(
        "the command line's start of an id that runs reports success and the run that was there",
        by_default.code == 0 and json.loads(by_default.out)["runId"] == first and told.code != 0,
        f"exit {by_default.code} with the old run id; with --id-conflict-policy Fail: exit {by_policy.code}; "
        f"with --fail-existing: exit {told.code}",
    )


BATCH = 4


async def batches(lab: Lab, server: Server, python: ByPython, http: ByHttp) -> Evidence:
    """Signal, cancel and terminate many workflows by one query each; one workflow answers to no query."""
    client = python.client
    groups = {"signal": "COMPLETED", "cancel": "CANCELED", "terminate": "TERMINATED"}
    ids = {group: [f"{lab.id}-batch-{group}-{n}" for n in range(BATCH)] for group in groups}
    spared = f"{lab.id}-batch-spared"
    every = [(id, f"batch-{group}") for group in groups for id in ids[group]] + [(spared, "spared")]
    await asyncio.gather(*(python.start(id, Purchase(lab.file("batch"), id), region=region) for id, region in every))
    query = {group: f'Region = "batch-{group}" AND ExecutionStatus = "Running"' for group in groups}
    for group in groups:
        await until(lambda: counted_all(python, query[group]), "visibility has the batch")  # noqa: B023

    # A namespace runs one batch at a time unless it is set otherwise; each is waited for.
    begun = time.monotonic()
    by_python, by_http = str(uuid.uuid4()), str(uuid.uuid4())
    signal = BatchOperationSignal(signal="close")
    await client.workflow_service.start_batch_operation(
        StartBatchOperationRequest(
            namespace=client.namespace, job_id=by_python, visibility_query=query["signal"], reason="tour",
            signal_operation=signal,
        )
    )  # fmt: skip
    await until(lambda: batch_done(client, by_python), "the batch of signals is done")
    body = {"visibilityQuery": query["cancel"], "reason": "tour", "cancellationOperation": {}}
    await http.ask(f"batch-operations/{by_http}", body)
    await until(lambda: batch_done(client, by_http), "the batch of cancellations is done")
    done = await lab.cli(
        "workflow", "terminate", "--query", query["terminate"], "--yes", "--reason", "tour", server=server
    )
    statuses = {group: Counter(await asyncio.gather(*(closing(python, id) for id in ids[group]))) for group in groups}
    seconds = time.monotonic() - begun
    spared_status = await python.status(spared)
    await python.terminate(spared)
    shipped = sorted(notes(lab.file("batch")))
    return holds(
        "batch operations by query, from Python, over HTTP and by command, reach all that match and nothing else",
        all(statuses[group] == {status: BATCH} for group, status in groups.items()) and done.code == 0
        and shipped == ids["signal"] and spared_status == "RUNNING",
        "; ".join(f"{group}: {dict(statuses[group])}" for group in groups)
        + f"; the one that no query names: {spared_status}; three batches in {seconds:.1f} s",
    )  # fmt: skip


async def counted_all(by: Manager, query: str) -> bool:
    return await by.count(query) == BATCH


async def batch_done(client: Client, job: str) -> bool:
    request = DescribeBatchOperationRequest(namespace=client.namespace, job_id=job)
    told = await client.workflow_service.describe_batch_operation(request)
    return told.state == BatchOperationState.BATCH_OPERATION_STATE_COMPLETED


async def decided(handle: WorkflowHandle[Any, Any]) -> bool:
    return (await count_events(handle))["WORKFLOW_TASK_COMPLETED"] > 0


async def other_targets(lab: Lab, server: Server, python: Manager, http: Manager) -> Evidence:
    """The right calls to the wrong run id and the wrong namespace, and then to the right one."""
    id, handle = f"{lab.id}-target", server.client.get_workflow_handle(f"{lab.id}-target")
    await python.start(id, Purchase(lab.file("target"), "tea"))
    await until(lambda: decided(handle), "its first workflow task is done")
    before = len(await history_of(handle))
    elsewhere = ByPython(lab, await connect(Target(server.address, "elsewhere")))
    another = str(uuid.uuid4())
    calls = [
        python.signal(id, "close", run_id=another),
        python.cancel(id, another),
        http.terminate(id, another),
        elsewhere.signal(id, "close"),
        elsewhere.cancel(id),
        elsewhere.terminate(id),
        elsewhere.delete(id),
    ]
    refused = [await refused_by(call) for call in calls]
    refusals = Counter(status for status, _ in refused)
    after, status = len(await history_of(handle)), await python.status(id)
    await python.signal(id, "close")
    result = await python.result(id)
    return control(
        "calls on another run id or in another namespace change nothing; the same call on the right run does",
        refusals == {"NOT_FOUND": 6, "404": 1} and all("workflow" in words for _, words in refused)
        and after == before and status == "RUNNING" and result == ["tea"],
        f"{len(calls)} calls: {dict(refusals)}; history {before} events before, {after} after, {status}; "
        f"then the right signal: {result}",
    )  # fmt: skip


@OP.item("OP-02", "Management API", fail_closed=True, seconds=200)
async def management_api(lab: Lab) -> AsyncIterator[Evidence]:
    """Every verb by Python client, Go command line and HTTP API; then every wrong call."""
    port = free_port()
    arguments = ["--http-port", str(port), "--search-attribute", "Region=Keyword", "--namespace", "elsewhere"]
    async with (
        lab.private_server(settings=DELETES_SOON, arguments=arguments) as server,
        lab.worker([Basket], [ship], server=server),
    ):
        python, command, http = ByPython(lab, server.client), ByCommand(lab, server), ByHttp(lab, port)
        parts = (
            tours(lab, server.client, python, (command, http)),
            mixed(lab, python, command, http),
            wrong_calls(lab, python, command, http),
            start_again(lab, server, python),
            batches(lab, server, python, http),
            other_targets(lab, server, python, http),
        )
        async for evidence in side_by_side(*parts):
            yield evidence
        yield native(
            "all of it is the platform's: the workflow has no code for it, and the interfaces are the server's",
            Client.start_workflow,
            (Client.start_workflow, "search_attributes"),
            Client.list_workflows,
            Client.count_workflows,
            WorkflowHandle.describe,
            WorkflowHandle.fetch_history,
            WorkflowHandle.result,
            WorkflowHandle.signal,
            WorkflowHandle.query,
            WorkflowHandle.execute_update,
            WorkflowHandle.cancel,
            WorkflowHandle.terminate,
            "temporal workflow start --fail-existing --id-conflict-policy",
            "temporal workflow describe",
            "temporal workflow list --query",
            "temporal workflow count --query",
            "temporal workflow signal --query",
            "temporal batch describe",
            "temporal workflow query",
            "temporal workflow update execute",
            "temporal workflow result",
            "temporal workflow cancel",
            "temporal workflow terminate --query",
            "temporal workflow reset --event-id",
            "temporal workflow delete",
            "temporal server start-dev --http-port",
        )


# OP-03 Storage backend -------------------------------------------------------------------------------
# What the server has acknowledged is in its database, and nowhere else. Kill both as often as you like and go on
# from there, or from a backup. How much of it survives is the database's doing: its settings are Temporal's promise.

EXAMPLE_OP_03 = """
# On one machine: a server that keeps everything in a file, and finds it again after any crash.
temporal server start-dev --db-filename temporal.db

# A consistent copy while the server goes on writing. Another server continues from it.
sqlite3 temporal.db ".backup 'copy.db'"
temporal server start-dev --db-filename copy.db

# In production, on PostgreSQL: histories and visibility are two databases of one server, so copy both at one moment.
pg_basebackup --host db.example --username temporal --pgdata backup --wal-method=stream --checkpoint=fast

# Leave these as they are. With either one off, signals that were acknowledged are lost in a crash.
psql --host db.example --username temporal -c "SHOW fsync" -c "SHOW synchronous_commit"
"""


# OP-03 put to the test -------------------------------------------------------------------------------


@workflow.defn
class Inbox:
    """Keeps the numbers that it is sent until it is told to close."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.closed = False

    @workflow.run
    async def run(self) -> list[int]:
        await workflow.wait_condition(lambda: self.closed)
        return self.numbers

    @workflow.signal
    def put(self, number: int) -> None:
        self.numbers.append(number)

    @workflow.signal
    def close(self) -> None:
        self.closed = True


# A client that asks again soon: by default it waits longer and longer, which only costs time here.
RETRY = RetryConfig(max_interval_millis=300, max_retries=400, max_elapsed_time_millis=120_000)
INBOXES = 5
Inboxes = Sequence[WorkflowHandle[Inbox, list[int]]]


async def open_inboxes(lab: Lab, client: Client, name: str) -> Inboxes:
    ids = [f"{lab.id}-{name}-{number}" for number in range(INBOXES)]
    start = functools.partial(client.start_workflow, Inbox.run, task_queue=lab.task_queue, task_timeout=soon())
    return [await start(id=id) for id in ids]


async def five_inboxes(lab: Lab, client: Client, name: str = "inbox") -> Inboxes:
    """Waiting workflows with two signals each."""
    handles = await open_inboxes(lab, client, name)
    for handle in handles:
        for number in (1, 2):
            await handle.signal(Inbox.put, number)
    return handles


async def finish(handle: WorkflowHandle[Inbox, list[int]], number: int) -> list[int]:
    """Send one more number, close, and read what the workflow has kept."""
    await handle.signal(Inbox.put, number)
    await handle.signal(Inbox.close)
    return await handle.result()


async def finish_all(handles: Inboxes) -> dict[str, Fact]:
    """Facts: each has its two signals and the one of now, and is the run that it was."""
    results = await asyncio.gather(*(finish(handle, 3) for handle in handles))
    runs = [(await handle.describe()).run_id for handle in handles]
    begun = [handle.first_execution_run_id for handle in handles]
    return {"results": equal(results, [[1, 2, 3]] * INBOXES), "runs of before": equal(runs == begun, True)}


async def waiting_survive(lab: Lab) -> Evidence:
    async with lab.private_server(file=True) as server, lab.worker([Inbox], server=server):
        handles = await five_inboxes(lab, server.client)
        server.kill()
        restart = await server.start()
        facts = await finish_all(handles)
    return works(
        "waiting workflows and their signals survive SIGKILL of the server on a SQLite file, and complete",
        **facts,
        server_back_after=figure(restart, "s"),
    )


async def in_memory(lab: Lab) -> Evidence:
    async with lab.private_server() as server:
        handles = await five_inboxes(lab, server.client)
        before = [name_of(await status_of(handle)) for handle in handles]
        server.kill()
        await server.start()
        after = [name_of(await refusal(handle)) for handle in handles]
    return control(
        "a server that keeps its state in memory has lost them all",
        before_SIGKILL=equal(before, ["RUNNING"] * INBOXES),
        after_the_restart=equal(after, ["NOT_FOUND"] * INBOXES),
    )


async def where_it_is_stored(client: Client) -> Evidence:
    """A store that is not told of counts as SQLite."""
    info = await client.workflow_service.get_cluster_info(GetClusterInfoRequest())
    stores = [info.persistence_store, info.visibility_store]
    return limit(
        "the server keeps histories and visibility in SQLite, which is one file of one machine",
        stores=Fact(stores, "sqlite", set(stores) <= {"sqlite", ""}),
    )


@dataclass
class Sender:
    """Sends numbers to one workflow until it is stopped, and remembers which were acknowledged."""

    handle: WorkflowHandle[Inbox, list[int]]
    sent: int = 0
    acknowledged: int = 0
    stopped: bool = False

    async def send(self) -> None:
        # The client tries a call again while the server is away, so that every number is acknowledged in the end.
        while not self.stopped:
            self.sent += 1
            await patiently(lambda: self.handle.signal(Inbox.put, self.sent))
            self.acknowledged += 1


class Senders:
    """Five clients that send as fast as they are answered; for `async with`."""

    def __init__(self, handles: Inboxes) -> None:
        self.every = [Sender(handle) for handle in handles]

    async def __aenter__(self) -> "Senders":
        self.sending = [asyncio.create_task(sender.send()) for sender in self.every]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.sending:
            task.cancel()
        await asyncio.gather(*self.sending, return_exceptions=True)

    @property
    def acknowledged(self) -> int:
        return sum(sender.acknowledged for sender in self.every)

    async def some_more(self, lab: Lab) -> None:
        """Wait for so many acknowledgements as the seed says."""
        goal = self.acknowledged + lab.random.randrange(3, 15)
        await until(lambda: self.acknowledged >= goal, "signals are acknowledged", every=0.005)

    async def read(self) -> dict[str, Fact]:
        """Stop, close the inboxes, and compare what they kept with what was acknowledged."""
        for sender in self.every:
            sender.stopped = True
        await asyncio.gather(*self.sending)
        for sender in self.every:
            await patiently(lambda: sender.handle.signal(Inbox.close))  # noqa: B023
        results = [await patiently(sender.handle.result) for sender in self.every]
        sent = [list(range(1, sender.acknowledged + 1)) for sender in self.every]
        wrong = [result for result, numbers in zip(results, sent, strict=True) if result != numbers]
        return {
            "acknowledged": at_least(self.acknowledged, 3 * INBOXES),
            "kept": equal(sum(map(len, results)), self.acknowledged),
            "inboxes that lack one, or have one twice or out of order": equal(wrong, []),
        }


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """A call that is made again while the server is hurt. It is the same signal then: it carries the same number."""
    async with asyncio.timeout(120 * slowness()):
        while True:
            try:
                return await call()
            except RPCError as error:
                if error.status in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
                    raise
                await asyncio.sleep(0.2)


KILLS = 10


async def ten_kills(lab: Lab) -> Evidence:
    """SIGKILL at moments drawn from the seed, while five clients send as fast as they can."""
    async with lab.private_server(file=True) as server:
        assert server.file
        file, checks = server.file, []
        async with lab.worker([Inbox], server=server):
            client = await connect(server.target, retry_config=RETRY)
            async with Senders(await open_inboxes(lab, client, "kills")) as senders:
                for _ in range(KILLS):
                    await senders.some_more(lab)
                    server.kill()
                    checks.append(await asyncio.to_thread(integrity, file))
                    await server.start()
                facts = await senders.read()
        server.kill()
        checks.append(await asyncio.to_thread(integrity, file))
    return holds(
        f"{KILLS} kills of the process in a row under load: every acknowledged signal is there once and in order, "
        "a copy of the file intact",
        **facts,
        integrity_check_after_each=equal(checks, ["ok"] * (KILLS + 1)),
        seed=lab.seed,
    )


def integrity(file: Path) -> str:
    """What SQLite says of a copy of the file of a dead server, its journal beside it.

    Of a copy: who opens the file itself rolls its journal back, and the server would find that done.
    """
    with tempfile.TemporaryDirectory() as folder:
        for one in file.parent.glob(f"{file.name}*"):
            shutil.copy(one, folder)
        with contextlib.closing(sqlite3.connect(Path(folder) / file.name)) as connection:
            return str(connection.execute("PRAGMA integrity_check").fetchone()[0])


def back_up(file: Path, copy: Path) -> None:
    """SQLite's own online backup: a consistent copy while the server goes on writing."""
    with contextlib.closing(sqlite3.connect(file)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
        source.backup(target)


async def restored_elsewhere(lab: Lab) -> Evidence:
    """Back up the file of a running server, lose that server, and start another one from the copy."""
    original, copy = Path(lab.file("original")), Path(lab.file("backup"))
    async with lab.private_server(file=original) as first, lab.worker([Inbox], server=first):
        handles = await five_inboxes(lab, first.client)
        await asyncio.to_thread(back_up, original, copy)
        await handles[0].signal(Inbox.put, 99)  # too late for the backup
        first.kill()
    async with lab.private_server(file=copy) as second, lab.worker([Inbox], server=second):
        facts = await finish_all(moved_to(second.client, handles))
    return holds(
        "a backup of the live file, restored under another server, goes on from the moment of the backup", **facts
    )


def moved_to(client: Client, handles: Inboxes) -> Inboxes:
    """The same runs, asked for elsewhere."""
    again = client.get_workflow_handle_for
    return [again(Inbox.run, one.id, first_execution_run_id=one.first_execution_run_id) for one in handles]


async def database_killed(lab: Lab, cluster: Cluster) -> Evidence:
    """SIGKILL to PostgreSQL, all of its processes; then to the database and the four services at once."""
    region, unheard = cluster.region, []
    client = await region.connect(retry_config=RETRY)
    async with Senders(await open_inboxes(lab, client, "database")) as senders:
        for _ in range(3):
            await senders.some_more(lab)
            region.database.kill()
            unheard.append(await answer_to_a_start(client))
            await region.database.start()
        await senders.some_more(lab)
        region.kill()
        back = await region.start()
        facts = await senders.read()
    return holds(
        "PostgreSQL killed under load, at last with all services: every acknowledged signal is there once and in order",
        **facts,
        starts_while_the_database_is_dead=lacks(unheard, "OK"),
        region_back_after=figure(back, "s"),
        seed=lab.seed,
    )


async def answer_to_a_start(client: Client) -> str:
    """What a client hears that asks once, and waits for five seconds."""
    id = str(uuid.uuid4())
    request = StartWorkflowExecutionRequest(
        namespace=client.namespace, workflow_id=id, request_id=id,
        workflow_type=WorkflowType(name="Inbox"), task_queue=TaskQueue(name="nobody"),
    )  # fmt: skip
    try:
        await client.workflow_service.start_workflow_execution(request, timeout=timedelta(seconds=5))
    except RPCError as error:
        return error.status.name
    return "OK"


LAZY = {"synchronous_commit": "off", "wal_writer_delay": "10s", "wal_writer_flush_after": "1GB"}


async def acknowledged_too_early(lab: Lab, cluster: Cluster) -> Evidence:
    """The same kill of everything; only, the database acknowledges before it has written."""
    region, sent = cluster.region, 30
    region.database.settings = LAZY
    await region.database.restart()
    await region.ready()
    handle = await cluster.client.start_workflow(Inbox.run, id=f"{lab.id}-early", task_queue=f"{lab.id}-early")
    await region.database.query("CHECKPOINT")
    for number in range(1, sent + 1):
        await handle.signal(Inbox.put, number)
    region.kill()
    region.database.settings = {}
    await region.start()
    await patiently(lambda: handle.signal(Inbox.close))
    async with lab.worker([Inbox], client=cluster.client, task_queue=f"{lab.id}-early"):
        kept = await patiently(handle.result)
    return control(
        "a database that acknowledges before it writes (synchronous_commit=off) loses acknowledged signals by the same "
        "kill",
        acknowledged=sent,
        lost=at_least(sent - len(kept), 1),
        setting=words(LAZY),
    )


async def base_backup(lab: Lab, cluster: Cluster) -> Evidence:
    """Back up a running PostgreSQL, lose the whole region, and start another cluster from the backup."""
    folder = cluster.place.folder / "backup"
    handles = await five_inboxes(lab, cluster.client, "base")
    took = time.monotonic()
    await cluster.region.database.backup(folder)
    took = time.monotonic() - took
    await handles[0].signal(Inbox.put, 99)
    cluster.region.kill()
    async with Cluster(restore=folder) as second, lab.worker([Inbox], client=second.client):
        facts = await finish_all(moved_to(second.client, handles))
    return holds(
        "a base backup of the running PostgreSQL, restored under a second cluster, goes on from that moment",
        **facts,
        backup_took=figure(took, "s"),
    )


@piece(
    holds(
        "PostgreSQL killed under load, at last with all services: every acknowledged signal is there once and in order"
    ),
    holds("a base backup of the running PostgreSQL, restored under a second cluster, goes on from that moment"),
    control(
        "a database that acknowledges before it writes (synchronous_commit=off) loses acknowledged signals by the same "
        "kill"
    ),
)
async def on_postgresql(lab: Lab) -> list[Evidence]:
    async with Cluster() as cluster:
        async with lab.worker([Inbox], client=cluster.client):
            found = [await where_it_is_stored(cluster.client), await database_killed(lab, cluster)]
        found.append(await acknowledged_too_early(lab, cluster))
        async with lab.worker([Inbox], client=cluster.client):
            found.append(await base_backup(lab, cluster))
        return found


@OP.item("OP-03", "Storage backend", seconds=300)
async def storage_backend(lab: Lab) -> AsyncIterator[Evidence]:
    """Servers and databases are killed under load; some are restored from a backup."""
    parts = (waiting_survive, in_memory, ten_kills, restored_elsewhere, on_postgresql)
    found = []
    async for evidence in side_by_side(*(part(lab) for part in parts)):
        found.append(evidence.kind)
        yield evidence
    if "limit" not in found:  # without a cluster it is the dev server that is judged
        async with lab.private_server(file=True) as server:
            yield await where_it_is_stored(server.client)
    yield native(
        "keeping state, finding it again after a crash, and backing it up are the platform's own",
        "temporal server start-dev --db-filename",
        (Client.connect, "retry_config"),
        RetryConfig,
        WorkflowHandle.signal,
        Worker,
        adds=["the backup, by the database's own means"],
    )
    yield cited(
        "in production: PostgreSQL, MySQL or Cassandra for persistence; these or Elasticsearch for visibility",
        "docs.temporal.io/self-hosted-guide/defaults, docs.temporal.io/temporal-service/persistence",
    )


# OP-04 Scalability -----------------------------------------------------------------------------------
# More workers on the same task queue take a share of its tasks, at once and without being told of each
# other. How many tasks a worker takes at a time is a number, or left to the machine's load.


@dataclass
class Job:
    number: int
    seconds: float
    ledger: str


@activity.defn
async def do_job(job: Job) -> int:
    note(job.ledger, f"{time.time():.3f} begins {job.number} {os.getpid()}")
    await asyncio.sleep(job.seconds)
    note(job.ledger, f"{time.time():.3f} ends {job.number} {os.getpid()}")
    return job.number


@dataclass
class Load:
    jobs: int
    seconds: float
    queue: str  # the workers of this task queue do the jobs
    ledger: str
    patience: float = 30  # seconds until an attempt is given up


@workflow.defn
class FanOut:
    @workflow.run
    async def run(self, load: Load) -> list[int]:
        jobs = [
            workflow.execute_activity(
                do_job,
                Job(number, load.seconds, load.ledger),
                task_queue=load.queue,
                start_to_close_timeout=timedelta(seconds=load.patience),
            )
            for number in range(load.jobs)
        ]
        return await asyncio.gather(*jobs)


@dataclass
class Shift:
    """What the ledger says of a load: how long it took, who did how much, how many were under way at once."""

    result: list[int]
    seconds: float
    begun: Counter[str]  # by worker
    ended: Counter[str]  # by job
    again: list[str]  # the jobs that were begun more than once
    peak: int

    @property
    def complete(self) -> bool:
        """Every job was done, exactly once, and reported."""
        jobs = range(len(self.result))
        return self.result == list(jobs) and self.ended == Counter(map(str, jobs))


def read_shift(result: list[int], ledger: str) -> Shift:
    entries = [line.split() for line in notes(ledger)]
    times = [float(at) for at, *_ in entries]
    under_way, peak = 0, 0
    for _, what, *_ in entries:
        under_way += 1 if what == "begins" else -1
        peak = max(peak, under_way)
    begun = Counter(pid for _, what, _, pid in entries if what == "begins")
    ended = Counter(number for _, what, number, _ in entries if what == "ends")
    jobs = Counter(number for _, what, number, _ in entries if what == "begins")
    again = [number for number, times_begun in jobs.items() if times_begun > 1]
    return Shift(result, max(times) - min(times), begun, ended, again, peak)


@contextlib.asynccontextmanager
async def workforce(lab: Lab, queue: str, count: int, **options: Any) -> AsyncIterator[list[Child]]:
    """So many worker processes on one task queue, all of them polling. Two slots each, unless said otherwise."""
    options = options or {"max_concurrent_activities": 2}
    async with contextlib.AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(lab.worker_process([], [do_job], task_queue=queue, **options))
            for _ in range(count)
        ]

        await until(lambda: all_at_work(lab, queue, workers), f"all of {count} workers are at work")
        yield workers


async def all_at_work(lab: Lab, queue: str, workers: Sequence[Child]) -> bool:
    """Hand out some short jobs: did every worker get one?"""
    load = Load(2 * len(workers), 0.05, queue, lab.file(f"warm-up-{uuid.uuid4().hex[:6]}"), patience=5)
    return len((await work_through(lab, load)).begun) == len(workers)


async def work_through(lab: Lab, load: Load) -> Shift:
    """Run a load over the workers there are."""
    id = f"{load.queue}-{Path(load.ledger).name}"
    result = await lab.client.execute_workflow(FanOut.run, load, id=id, task_queue=lab.task_queue)
    return read_shift(result, load.ledger)


JOBS, JOB_SECONDS, SLOTS = 16, 1.0, 2


async def scaled(lab: Lab, count: int) -> Shift:
    queue = f"{lab.id}-{count}"
    async with workforce(lab, queue, count):
        return await work_through(lab, Load(JOBS, JOB_SECONDS, queue, lab.file(str(count))))


async def more_workers(lab: Lab) -> list[Evidence]:
    """The same load on one, two and four worker processes, each on a task queue of its own."""
    one, two, four = await asyncio.gather(*(scaled(lab, count) for count in (1, 2, 4)))
    alone = JOBS / SLOTS * JOB_SECONDS
    return [
        works(
            "the same load on 1, 2 and 4 worker processes: every job is done once, and twice the workers need at most "
            "3/4 of the time",
            one.complete and two.complete and four.complete
            and alone / 2 <= two.seconds <= 0.75 * one.seconds and alone / 4 <= four.seconds <= 0.75 * two.seconds,
            f"{JOBS} activities of {JOB_SECONDS:.0f} s, {SLOTS} slots a worker: {one.seconds:.2f} s, "
            f"{two.seconds:.2f} s, {four.seconds:.2f} s "
            f"(without any cost: {alone:.0f}, {alone / 2:.0f}, {alone / 4:.0f} s)",
        ),
        works(
            "the work is split evenly: no worker does less than half or more than double its share",
            shares_fair(two, 2) and shares_fair(four, 4),
            f"jobs by worker: {shares(two)} of two; {shares(four)} of four",
        ),
        control(
            "one worker alone takes the time of all the jobs one after the other in its slots",
            one.seconds >= alone and one.peak == SLOTS and len(one.begun) == 1,
            f"{one.seconds:.2f} s, at least {alone:.0f} s; at most {one.peak} jobs at once",
        ),
    ]  # fmt: skip


def shares(shift: Shift) -> list[int]:
    return sorted(shift.begun.values())


def shares_fair(shift: Shift, workers: int) -> bool:
    share = JOBS / workers
    return len(shift.begun) == workers and all(share / 2 <= done <= share * 2 for done in shift.begun.values())


async def started(lab: Lab, load: Load, jobs: int) -> WorkflowHandle[Any, list[int]]:
    """Start a load and wait until so many jobs were begun."""
    handle = await lab.client.start_workflow(FanOut.run, load, id=load.queue, task_queue=lab.task_queue)
    await until(lambda: sum("begins" in line for line in notes(load.ledger)) >= jobs, f"{jobs} jobs have begun")
    return handle


async def killed_under_load(lab: Lab) -> Evidence:
    queue, ledger = f"{lab.id}-killed", lab.file("killed")
    async with workforce(lab, queue, 2) as (victim, survivor):
        handle = await started(lab, Load(12, 0.4, queue, ledger, SOON.total_seconds()), 4)
        await until(lambda: in_hand(ledger, victim), "the victim has a job in hand", every=0.01)
        await victim.kill()
        shift = read_shift(await handle.result(), ledger)
    began = {line.split()[2] for line in notes(ledger) if "begins" in line and line.endswith(f" {victim.pid}")}
    return holds(
        "a worker killed under load: the other does its jobs again and the rest, and none is lost",
        shift.result == list(range(12)) == sorted(map(int, shift.ended)) and 0 < len(shift.again) <= SLOTS
        and set(shift.again) <= began,
        f"12 jobs; the killed worker began {len(began)}, of which {len(shift.again)} were cut off and begun again; the "
        f"other began {shift.begun[str(survivor.pid)]}",
    )  # fmt: skip


def in_hand(ledger: str, worker: Child) -> bool:
    """Whether a worker has begun more jobs than it has ended."""
    own = [line.split()[1] for line in notes(ledger) if line.endswith(f" {worker.pid}")]
    return own.count("begins") > own.count("ends")


async def added_under_load(lab: Lab) -> Evidence:
    queue, ledger = f"{lab.id}-added", lab.file("added")
    async with workforce(lab, queue, 1):
        handle = await started(lab, Load(14, 0.3, queue, ledger), 3)
        async with lab.worker_process([], [do_job], task_queue=queue, max_concurrent_activities=2) as added:
            shift = read_shift(await handle.result(), ledger)
    return holds(
        "a worker added under load takes its share at once, and nothing is done twice",
        shift.complete and shift.begun.total() == 14 and shift.begun[str(added.pid)] >= 2 and shift.peak > SLOTS,
        f"14 jobs; added after 3 had begun, it did {shift.begun[str(added.pid)]}; {shift.seconds:.2f} s "
        f"(alone: at least {14 / SLOTS * 0.3:.1f} s); at most {shift.peak} jobs at once",
    )


async def tuned(lab: Lab, name: str, **options: Any) -> Shift:
    queue = f"{lab.id}-{name}"
    async with workforce(lab, queue, 1, **options):
        return await work_through(lab, Load(12, 0.3, queue, lab.file(name)))


async def other_tuners(lab: Lab) -> Evidence:
    """The fixed worker, and what changes with one setting: where slots or pollers come from."""
    by_resources = WorkerTuner.create_resource_based(
        target_memory_usage=0.95,
        target_cpu_usage=0.95,
        activity_config=ResourceBasedSlotConfig(minimum_slots=2, maximum_slots=6, ramp_throttle=timedelta()),
    )
    fixed, resources, pollers = await asyncio.gather(
        tuned(lab, "fixed", max_concurrent_activities=2),
        tuned(lab, "resources", tuner=by_resources),
        tuned(
            lab,
            "pollers",
            max_concurrent_activities=2,
            activity_task_poller_behavior=PollerBehaviorAutoscaling(minimum=1, maximum=10, initial=1),
        ),
    )
    return holds(
        "resource-based slots and autoscaling pollers do the same load once, within the bounds they were given",
        fixed.complete and resources.complete and pollers.complete
        and fixed.peak == pollers.peak == 2 and 2 <= resources.peak <= 6,
        f"12 jobs of 0.3 s on one worker: 2 fixed slots {fixed.seconds:.2f} s; 2 to 6 slots by load "
        f"{resources.seconds:.2f} s, at most {resources.peak} at once; 2 fixed slots with autoscaling pollers "
        f"{pollers.seconds:.2f} s",
    )  # fmt: skip


@OP.item("OP-04", "Scalability", seconds=180)
async def scalability(lab: Lab) -> AsyncIterator[Evidence]:
    """Sleeping activities on worker processes that come and go: time and shares are read from a ledger."""
    async with lab.worker([FanOut], []):
        parts = (more_workers, killed_under_load, added_under_load, other_tuners)
        async for evidence in side_by_side(*(part(lab) for part in parts)):
            yield evidence
    yield native(
        "workers share a task queue by polling it: no coordinator, no list of workers, no rebalancing",
        Worker,
        (Worker, "max_concurrent_activities"),
        (Worker, "tuner"),
        WorkerTuner.create_resource_based,
        ResourceBasedSlotConfig,
        (Worker, "activity_task_poller_behavior"),
        PollerBehaviorAutoscaling,
    )
    info = await lab.client.workflow_service.get_cluster_info(GetClusterInfoRequest())
    yield limit(
        "the server evaluated keeps all histories in one shard: only the scaling of workers is seen here",
        info.history_shard_count == 1,
        f"history shards: {info.history_shard_count}; a cluster fixes their number when it is set up",
    )


# OP-05 Retention and clean-up ------------------------------------------------------------------------
# Closed workflows are kept for as long as their namespace says and are then deleted with their history;
# running ones are never touched. What goes earlier is deleted by a call.


@workflow.defn
class Visit:
    def __init__(self) -> None:
        self.left = False

    @workflow.run
    async def run(self) -> str:
        await workflow.wait_condition(lambda: self.left)
        return "left"

    @workflow.signal
    def leave(self) -> None:
        self.left = True


RETENTION = 3
# The least that a namespace may keep is an hour, and deletions are spread over minutes; here both are short.
SHORT = {"system.namespaceMinRetentionLocal": '"1s"', "history.retentionTimerJitterDuration": '"100ms"'}


async def make_namespace(client: Client, name: str, retention: float) -> Client:
    """Register a namespace, wait until it can be used, and return a client of it."""
    request = RegisterNamespaceRequest(
        namespace=name, workflow_execution_retention_period=Duration(seconds=int(retention))
    )
    await client.workflow_service.register_namespace(request)
    inside = await connect(Target(client.service_client.config.target_host, name))
    await until(lambda: usable(inside), f"namespace {name} can be used", 30)
    return inside


async def usable(client: Client) -> bool:
    """The server learns of a new namespace within a few seconds."""
    try:
        await client.count_workflows()
    except RPCError as error:
        if error.status == RPCStatusCode.NOT_FOUND:
            return False
        raise
    return True


async def leave(client: Client, lab: Lab, name: str) -> WorkflowHandle[Visit, str]:
    """A workflow that was started and has completed."""
    handle = await client.start_workflow(Visit.run, id=f"{lab.id}-{name}", task_queue=lab.task_queue)
    await handle.signal(Visit.leave)
    await handle.result()
    return handle


@dataclass
class Traces:
    """What is left of a workflow: its description, its history, its place in visibility."""

    described: bool
    history: int
    listed: bool

    @property
    def gone(self) -> bool:
        return not (self.described or self.history or self.listed)

    @property
    def whole(self) -> bool:
        return self.described and self.history > 0 and self.listed


async def traces(client: Client, handle: WorkflowHandle[Any, Any]) -> Traces:
    described = await refusal(handle) is None
    try:
        history = len(await history_of(handle))
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        history = 0
    listed = (await client.count_workflows(f'WorkflowId = "{handle.id}"')).count == 1
    return Traces(described, history, listed)


async def disappears(client: Client, handle: WorkflowHandle[Any, Any]) -> dict[str, float]:
    """When each trace of a workflow was seen to be gone, by the clock that the server stamps its events with."""
    seen: dict[str, float] = {}

    async def all_gone() -> bool:
        left = await traces(client, handle)
        for name, there in (("description", left.described), ("history", left.history), ("visibility", left.listed)):
            if not there:
                seen.setdefault(name, time.time())
        return left.gone

    await until(all_gone, f"{handle.id} is gone", 40)
    return seen


async def whole(client: Client, handle: WorkflowHandle[Any, Any]) -> bool:
    return (await traces(client, handle)).whole


async def expires(lab: Lab, server: Server, short: Client) -> list[Evidence]:
    """A closed and a running workflow in a namespace of short retention, and a closed one in the default one."""
    running = await short.start_workflow(Visit.run, id=f"{lab.id}-running", task_queue=lab.task_queue)
    kept = await leave(server.client, lab, "kept")
    closed = await leave(short, lab, "closed")
    await until(lambda: whole(short, closed), "the closed workflow is in visibility", RETENTION, 0.01)
    end = (await closed.describe()).close_time
    assert end, "the workflow is closed"
    seen = await disappears(short, closed)
    after = {name: at - end.timestamp() for name, at in seen.items()}
    first, last = min(after.values()), max(after.values())
    # It is older than the closed one. A moment more, in case that its deletion comes later.
    await asyncio.sleep(1)
    alive, other = await traces(short, running), await traces(server.client, kept)
    await running.signal(Visit.leave)
    result = await running.result()
    kept_for = await retention_of(server.client)
    return [
        works(
            f"a closed workflow is gone after the {RETENTION} s that its namespace keeps it, and not before",
            first >= RETENTION and last <= RETENTION + 15,
            f"whole after it closed; {', '.join(f'{name} gone after {at:.2f} s' for name, at in after.items())}",
        ),
        holds(
            "visibility and history go together",
            set(after) == {"description", "history", "visibility"} and last - first <= 2,
            f"first and last trace gone {last - first:.2f} s apart",
        ),
        holds(
            "a running workflow is not touched, however old, and still completes",
            alive.whole and result == "left",
            f"when the younger, closed one had been gone for 1 s: {alive.history} events, listed; "
            f"then signalled: {result!r}",
        ),
        control(
            "a workflow that closed earlier in the default namespace is still there",
            other.whole and kept_for > 3600,
            f"{other.history} events, listed; that namespace keeps what is closed for {kept_for / 3600:.0f} h",
        ),
    ]


async def retention_of(client: Client) -> int:
    request = DescribeNamespaceRequest(namespace=client.namespace)
    told = await client.workflow_service.describe_namespace(request)
    return told.config.workflow_execution_retention_ttl.seconds


async def deletes(lab: Lab, client: Client) -> Evidence:
    """Delete one of two closed workflows, and a running one, by a call each."""
    doomed, spared = await leave(client, lab, "doomed"), await leave(client, lab, "spared")
    running = await client.start_workflow(Visit.run, id=f"{lab.id}-doomed-running", task_queue=lab.task_queue)
    for handle in (doomed, spared, running):
        await until(lambda: whole(client, handle), "the workflow is in visibility")  # noqa: B023
    begun = time.time()
    for handle in (doomed, running):
        request = DeleteWorkflowExecutionRequest(
            namespace=client.namespace, workflow_execution=WorkflowExecution(workflow_id=handle.id)
        )
        await client.workflow_service.delete_workflow_execution(request)
    one, two = await asyncio.gather(disappears(client, doomed), disappears(client, running))
    left = await traces(client, spared)
    return works(
        "a workflow, closed or running, is deleted by a call, with all its traces; its neighbour stays",
        left.whole and len(one) == len(two) == 3,
        f"closed: gone after {max(one.values()) - begun:.2f} s; running: after {max(two.values()) - begun:.2f} s; "
        f"the neighbour: {left.history} events, listed",
    )


async def too_short(lab: Lab) -> Evidence:
    """What a server with its own settings says to a retention of seconds."""
    async with lab.private_server() as server:
        try:
            await make_namespace(server.client, "too-short", RETENTION)
        except RPCError as error:
            said = f"{error.status.name}: {error.message}"
        else:
            said = "accepted"
    return holds(
        "without the setting of this item a retention of seconds is refused: nobody loses histories by a slip",
        said.startswith("INVALID_ARGUMENT"),
        f"retention of {RETENTION} s: {said}",
    )


async def archived(lab: Lab, server: Server) -> Evidence:
    service = server.client.workflow_service
    await service.register_namespace(
        RegisterNamespaceRequest(
            namespace="archived",
            workflow_execution_retention_period=Duration(seconds=3600),
            history_archival_state=ArchivalState.ARCHIVAL_STATE_ENABLED,
            history_archival_uri=f"file://{lab.file('archive')}",
        )
    )
    told = await service.describe_namespace(DescribeNamespaceRequest(namespace="archived"))
    state = ArchivalState.Name(told.config.history_archival_state)
    return limit(
        "archival: the dev server accepts the setting and does not apply it, so that what is deleted is lost",
        told.config.history_archival_state == ArchivalState.ARCHIVAL_STATE_DISABLED,
        f"namespace registered with ARCHIVAL_STATE_ENABLED and a URI: accepted; described as {state}",
    )


@OP.item("OP-05", "Retention and clean-up")
async def retention(lab: Lab) -> AsyncIterator[Evidence]:
    """Workflows close in a namespace of short retention; what is left of them is looked for until it is gone."""
    async with lab.private_server(settings=SHORT | DELETES_SOON) as server:
        short = await make_namespace(server.client, "short", RETENTION)
        async with lab.worker([Visit], server=server), lab.worker([Visit], client=short):
            parts = (expires(lab, server, short), deletes(lab, server.client), too_short(lab), archived(lab, server))
            async for evidence in side_by_side(*parts):
                yield evidence
        yield native(
            "retention is the namespace's, deletion a call (the commands make those made here); no job cleans up",
            "temporal operator namespace create --retention",
            "temporal operator namespace describe",
            "temporal workflow delete",
        )


# OP-06 Multi-region, high availability ---------------------------------------------------------------
# Any part may die: a worker's work goes to the others, a server that comes back is found again, and a
# connection that breaks is made anew. Between clusters, in two regions, none of this was to be had here.


@dataclass
class Stage:
    journey: str
    number: int
    seconds: float
    database: str


def open_journal(database: str) -> None:
    """The effects, each once by its key, and every call that was made for them."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS effects (key TEXT PRIMARY KEY)")
        connection.execute("CREATE TABLE IF NOT EXISTS calls (at REAL, pid INTEGER, journey TEXT, number INTEGER)")


def read_journal(database: str, query: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def effect_count(database: str) -> int:
    return int(read_journal(database, "SELECT count(*) FROM effects")[0][0])


def call_count(database: str) -> int:
    return int(read_journal(database, "SELECT count(*) FROM calls")[0][0])


@activity.defn
async def travel(stage: Stage) -> int:
    with contextlib.closing(sqlite3.connect(stage.database, timeout=20)) as connection, connection:
        row = (time.time(), os.getpid(), stage.journey, stage.number)
        connection.execute("INSERT INTO calls VALUES (?, ?, ?, ?)", row)
        connection.execute("INSERT OR IGNORE INTO effects VALUES (?)", [f"{stage.journey}/{stage.number}"])
    await asyncio.sleep(stage.seconds)
    return stage.number


@dataclass
class Route:
    stages: int
    seconds: float
    database: str


@workflow.defn
class Journey:
    def __init__(self) -> None:
        self.postcards: list[int] = []
        self.expected = 0

    @workflow.run
    async def run(self, route: Route) -> list[int]:
        id = workflow.info().workflow_id
        done = [
            await workflow.execute_activity(
                travel,
                Stage(id, number, route.seconds, route.database),
                start_to_close_timeout=SOON,
            )
            for number in range(route.stages)
        ]
        await workflow.wait_condition(lambda: len(self.postcards) >= self.expected)
        return done

    @workflow.signal
    def postcard(self, number: int) -> None:
        self.postcards.append(number)

    @workflow.signal
    def expect(self, postcards: int) -> None:
        self.expected = postcards

    @workflow.query
    def received(self) -> list[int]:
        return self.postcards


async def depart(
    lab: Lab, client: Client, name: str, count: int, route: Route
) -> list[WorkflowHandle[Journey, list[int]]]:
    """Start so many journeys on a task queue of their own."""
    open_journal(route.database)
    queue = f"{lab.id}-{name}"
    return [
        await client.start_workflow(Journey.run, route, id=f"{queue}-{n}", task_queue=queue, task_timeout=SOON)
        for n in range(count)
    ]


async def arrive(handles: Sequence[WorkflowHandle[Journey, list[int]]], stages: int) -> tuple[bool, str]:
    """Whether every journey ends with every stage done, completed once in its history; and that in words."""
    results = await asyncio.gather(*(handle.result() for handle in handles))
    events = await asyncio.gather(*(count_events(handle) for handle in handles))
    right = sum(result == list(range(stages)) for result in results)
    completed = {one["ACTIVITY_TASK_COMPLETED"] for one in events}
    return right == len(handles) and completed == {stages}, (
        f"{right} of {len(handles)} results right, completions a history: {sorted(completed)}"
    )


def parts_of(lab: Lab, name: str) -> dict[str, Any]:
    """What a worker for the journeys of that name is made of."""
    return {"workflows": [Journey], "activities": [travel], "task_queue": f"{lab.id}-{name}"}


async def both_serve(lab: Lab, workers: set[int]) -> bool:
    """Let short journeys tell who serves them: if one worker came late, the other would take all there is."""
    short = Route(1, 0.1, lab.file("short.sqlite"))
    await arrive(await depart(lab, lab.client, "takeover", 6, short), 1)
    return workers <= {pid for (pid,) in read_journal(short.database, "SELECT DISTINCT pid FROM calls")}


async def takeover(lab: Lab) -> Evidence:
    route = Route(8, 0.2, lab.file("takeover.sqlite"))
    async with (
        lab.worker_process(**parts_of(lab, "takeover")) as victim,
        lab.worker_process(**parts_of(lab, "takeover")) as heir,
    ):
        await until(lambda: both_serve(lab, {victim.pid, heir.pid}), "both workers take part")
        handles = await depart(lab, lab.client, "takeover", 6, route)

        def both_work() -> bool:
            of: dict[int, int] = dict(read_journal(route.database, "SELECT pid, count(*) FROM calls GROUP BY pid"))
            return of.get(victim.pid, 0) >= 3 and of.get(heir.pid, 0) >= 3

        await until(both_work, "both workers have begun three stages")
        orphans = {one for (one,) in read_journal(route.database, LAST_SERVED_BY.format(pid=victim.pid))}
        await victim.kill()
        killed = time.time()
        fine, words = await arrive(handles, route.stages)
        later = f"SELECT pid, journey, min(at) FROM calls WHERE at > {killed} GROUP BY pid, journey"
        after = read_journal(route.database, later)
        alive = heir.alive
    waits = [at - killed for _, journey, at in after if journey in orphans]
    return works(
        "one of two workers killed: the other takes its workflows over, and nobody did anything about it",
        fine and alive and {pid for pid, *_ in after} == {heir.pid} and len(waits) == len(orphans) > 0
        and effect_count(route.database) == 48,
        f"6 workflows of 8 stages; {len(orphans)} had their last stage on the killed worker and went on after "
        f"{min(waits, default=0):.1f} to {max(waits, default=0):.1f} s (an attempt cut off is given up after "
        f"{SOON.seconds} s); {words}; {call_count(route.database)} calls for 48 effects",
    )  # fmt: skip


# The workflows whose latest call was made by a process.
LAST_SERVED_BY = (
    "SELECT journey FROM calls AS one WHERE pid = {pid} "
    "AND at = (SELECT max(at) FROM calls WHERE journey = one.journey) GROUP BY journey"
)


async def server_crash(lab: Lab) -> Evidence:
    """The server dies and comes back on its file; its worker process and its client are left alone."""
    route = Route(6, 0.2, lab.file("crash.sqlite"))
    async with (
        lab.private_server(file=True) as server,
        lab.worker_process(**parts_of(lab, "crash"), server=server) as worker,
    ):
        handles = await depart(lab, server.client, "crash", 4, route)
        await until(lambda: call_count(route.database) >= 8, "stages have begun")
        server.kill()
        killed = time.time()
        await server.start()
        restart = time.time() - killed
        # At the moment of the kill the worker finishes what it has in hand; then it needs the server.
        begun = effect_count(route.database)
        await until(lambda: effect_count(route.database) > begun, "another stage has begun")
        back = time.time() - killed
        fine, words = await arrive(handles, route.stages)
        alive = worker.alive
    return holds(
        "the server crashes and comes back: workers and clients reconnect by themselves, all goes on",
        fine and alive and effect_count(route.database) == 24,
        f"4 workflows of 6 stages; SIGKILL, back after {restart:.2f} s, next stage {back:.1f} s after the kill; "
        f"{words}; {call_count(route.database)} calls for 24 effects; same worker process",
    )


CUTS = 5


async def broken_line(lab: Lab) -> Evidence:
    """Between server and worker is a proxy that delays everything and cuts at moments drawn from the seed."""
    route = Route(8, 0.05, lab.file("line.sqlite"))
    async with lab.private_server() as server, Proxy(server) as line:
        line.delay = 0.02
        client = await connect(Target(line.address))
        async with lab.worker(**parts_of(lab, "line"), client=client):
            handles = await depart(lab, client, "line", 4, route)
            await handles[0].signal(Journey.expect, 20)
            broken = 0
            for cut in range(CUTS):
                goal = call_count(route.database) + lab.random.randrange(1, 5)
                # 4 postcards before each cut, sent over the same line at the same time.
                sending = [
                    asyncio.create_task(handles[0].signal(Journey.postcard, cut * 4 + number)) for number in range(4)
                ]
                await until(lambda: call_count(route.database) >= min(goal, 30), "stages go on", 30, 0.01)  # noqa: B023
                await until(lambda: line.connections > 0, "there is a connection to cut", 30, 0.01)
                broken += line.cut()
                await asyncio.gather(*sending)
            fine, words = await arrive(handles, route.stages)
            received = await handles[0].query(Journey.received)
        accepted = line.accepted
    return holds(
        "a line that delays and breaks: no stage and no signal is lost, no effect and no signal is there twice",
        fine and sorted(received) == list(range(20)) and effect_count(route.database) == 32 and broken >= CUTS
        and accepted >= CUTS,
        f"seed {lab.seed}: {CUTS} cuts broke {broken} connections, {accepted} were made, 20 ms of delay each way; "
        f"{words}; 20 signals sent, {len(received)} received; {call_count(route.database)} calls for "
        f"{effect_count(route.database)} effects, each with its key",
    )  # fmt: skip


async def nobody_left(lab: Lab) -> Evidence:
    route = Route(4, 1.0, lab.file("nobody.sqlite"))  # long enough to be killed in the middle
    async with lab.worker_process(**parts_of(lab, "nobody")) as worker:
        (handle,) = await depart(lab, lab.client, "nobody", 1, route)
        await until(lambda: call_count(route.database) >= 2, "two stages have begun")
        await worker.kill()
    before = call_count(route.database)
    # Longer than an attempt is given: somebody could have taken over by now.
    await asyncio.sleep(SOON.seconds + 1)
    waited, status = call_count(route.database) - before, await status_of(handle)
    async with lab.worker_process(**parts_of(lab, "nobody")):
        fine, words = await arrive([handle], route.stages)
    return control(
        "with nobody to take over, the workflow waits, and loses nothing by it",
        waited == 0 and status == WorkflowExecutionStatus.RUNNING and fine,
        f"{SOON.seconds + 1} s after the kill: {waited} more stages, {name_of(status)}; with a new worker: {words}",
    )


async def no_replication(lab: Lab) -> Evidence:
    """Try what two clusters would need: to know each other, and a namespace that both hold."""
    async with lab.private_server() as one, lab.private_server() as two:
        upsert = ["operator", "cluster", "upsert", "--frontend-address", two.address, "--enable-connection"]
        joined = await lab.cli(*upsert, server=one)
        shared = await lab.cli("operator", "namespace", "create", "--global", "everywhere", server=one)
    said = [" ".join(done.err.split()).rpartition("Error: ")[2] for done in (joined, shared)]
    return limit(
        "clusters that replicate each other cannot be had of dev servers: a second region is the user's to build",
        joined.code != 0 and shared.code != 0,
        f"cluster upsert: {said[0]!r}; global namespace: {said[1]!r}",
        cap=3,
    )


@OP.item("OP-06", "Multi-region, high availability", seconds=120)
async def high_availability(lab: Lab) -> AsyncIterator[Evidence]:
    """A worker, a server and a line are broken in the middle of work; a database outside counts the effects."""
    parts = (takeover, nobody_left, server_crash, broken_line, no_replication)
    async for evidence in side_by_side(*(part(lab) for part in parts)):
        yield evidence
    yield native(
        "workers and clients find each other's successors by themselves: the workflow has no line for it",
        Worker,
        Client.connect,
        workflow.execute_activity,
        WorkflowHandle.signal,
        "temporal server start-dev --db-filename",
        adds=["the key that makes an effect single"],
    )
    yield cited(
        "replication between clusters: by configuration of self-hosted clusters (experimental), or as a feature of "
        "Temporal Cloud with automatic failover",
        "docs.temporal.io/self-hosted-guide/multi-cluster-replication, docs.temporal.io/cloud/high-availability",
    )


# OP-07 Multi-tenant isolation ------------------------------------------------------------------------
# A namespace is a tenant's own: ids, histories, retention, search attributes and limits. It is not a lock:
# who may enter is decided elsewhere.


@workflow.defn
class Room:
    """Remembers whose it is."""

    def __init__(self) -> None:
        self.guests: list[str] = []

    @workflow.run
    async def run(self, owner: str) -> str:
        await workflow.wait_condition(lambda: len(self.guests) > 0)
        return f"{owner}: {', '.join(self.guests)}"

    @workflow.signal
    def enter(self, guest: str) -> None:
        self.guests.append(guest)


TENANTS = ["--namespace", "red", "--namespace", "blue"]


async def tenants(server: Server) -> tuple[Client, Client]:
    return await connect(Target(server.address, "red")), await connect(Target(server.address, "blue"))


async def one_id_twice(lab: Lab, red: Client, blue: Client) -> list[Evidence]:
    """The same workflow id in two namespaces, and one that only red has."""
    id, queue = f"{lab.id}-room", lab.task_queue
    reds = await red.start_workflow(Room.run, "red", id=id, task_queue=queue)
    blues = await blue.start_workflow(Room.run, "blue", id=id, task_queue=queue)
    own = await red.start_workflow(Room.run, "red", id=f"{id}-own", task_queue=queue)
    across = [
        blue.get_workflow_handle(own.id),
        blue.get_workflow_handle(id, run_id=reds.first_execution_run_id),
    ]
    refusals = [name_of(await refusal(handle)) for handle in across]
    signalled = await signal_refused(across[0])
    await reds.signal(Room.enter, "Rose")
    await blues.signal(Room.enter, "Bob")
    results = [await reds.result(), await blues.result()]
    untouched = await status_of(own)
    await own.terminate()
    return [
        works(
            "one workflow id in two namespaces is two runs, each with its own signals and result",
            reds.first_execution_run_id != blues.first_execution_run_id and results == ["red: Rose", "blue: Bob"],
            f"results: {results[0]!r} and {results[1]!r}",
        ),
        holds(
            "a workflow of the other namespace cannot be read or signalled, not even by its run id",
            refusals == ["NOT_FOUND", "NOT_FOUND"] and signalled == "NOT_FOUND"
            and untouched == WorkflowExecutionStatus.RUNNING,
            f"describe by id: {refusals[0]}; by run id: {refusals[1]}; signal: {signalled}; "
            f"there it is {name_of(untouched)}",
        ),
    ]  # fmt: skip


async def signal_refused(handle: WorkflowHandle[Any, Any]) -> str:
    try:
        await handle.signal("enter", "a stranger")
    except RPCError as error:
        return error.status.name
    return "delivered"


async def separate_settings(lab: Lab, server: Server, red: Client, blue: Client) -> Evidence:
    """A search attribute of red's that blue does not have, and a namespace with a retention of its own."""
    kind = IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
    await red.operator_service.add_search_attributes(
        AddSearchAttributesRequest(namespace="red", search_attributes={"Shade": kind})
    )
    await until(lambda: counts(red, 'Shade = "dark"'), "red knows its search attribute", 30)
    shade = TypedSearchAttributes([SearchAttributePair(SearchAttributeKey.for_keyword("Shade"), "dark")])

    async def start(client: Client) -> WorkflowHandle[Any, Any]:
        id = f"{lab.id}-shade"
        return await client.start_workflow("Room", "x", id=id, task_queue=lab.task_queue, search_attributes=shade)

    handle = await start(red)
    await until(lambda: found(red, 'Shade = "dark"'), "red finds its workflow")
    try:
        await start(blue)
        at_blue = "accepted"
    except RPCError as error:
        at_blue = error.status.name
    await handle.terminate()
    green = await make_namespace(server.client, "green", 2 * 3600)
    kept = [await retention_of(client) // 3600 for client in (red, green)]
    return holds(
        "search attributes and retention are each namespace's own",
        at_blue == "INVALID_ARGUMENT" and not await counts(blue, 'Shade = "dark"') and kept == [24, 2],
        f"attribute of red's: found by red, at blue {at_blue}; retention: {kept[0]} h and {kept[1]} h",
    )


async def counts(client: Client, query: str) -> bool:
    """Whether the namespace understands a query."""
    try:
        await client.count_workflows(query)
    except RPCError as error:
        if error.status == RPCStatusCode.INVALID_ARGUMENT:
            return False
        raise
    return True


async def found(client: Client, query: str) -> bool:
    return (await client.count_workflows(query)).count > 0


CALLERS = 16
RATE = 5
LIMITED = {"frontend.namespaceRPS": str(RATE), "frontend.namespaceBurstRatio": "1.0"}


async def make_noise(address: str, ledger: str) -> None:
    """The noisy tenant, a process of its own: 16 callers who start workflows as fast as they are answered."""
    client = await connect(Target(address, "red"))

    async def caller() -> None:
        while True:
            id = str(uuid.uuid4())
            request = StartWorkflowExecutionRequest(
                namespace="red",
                workflow_id=id,
                workflow_type=WorkflowType(name="Room"),
                task_queue=TaskQueue(name="nobody"),
                request_id=id,
            )
            try:
                await client.workflow_service.start_workflow_execution(request)
                note(ledger, "OK")
            except RPCError as error:
                note(ledger, error.status.name)
                await asyncio.sleep(0.1)  # who is refused waits a little

    await asyncio.gather(*(caller() for _ in range(CALLERS)))


async def live_quietly(address: str, ledger: str, calls: int) -> None:
    """The quiet tenant, a process of its own, too: a few calls, one after the other, and how long each took."""
    client = await connect(Target(address, "blue"))
    for number in range(calls):
        begun = time.monotonic()
        try:
            await client.start_workflow("Room", "blue", id=f"quiet-{uuid.uuid4()}", task_queue="nobody")
        except RPCError as error:
            note(ledger, f"refused {error.status.name}")
        else:
            note(ledger, f"{number} {time.monotonic() - begun:.4f}")
        await asyncio.sleep(1.2 / RATE)  # below the limit that both tenants have


@dataclass
class Neighbours:
    """What the noisy tenant got while the quiet one lived beside it, and what the quiet one's calls took."""

    noise: Counter[str]
    before: float  # median latency of the quiet tenant, alone
    beside: float  # and beside the noisy one
    refused: int
    seconds: float  # for how long the noise lasted


QUIET_CALLS = 6


async def neighbours(lab: Lab, name: str, settings: Mapping[str, str]) -> Neighbours:
    """Both tenants on a server with these settings."""
    noise, alone, beside = lab.file(f"{name}-noise"), lab.file(f"{name}-alone"), lab.file(f"{name}-beside")
    async with lab.private_server(settings=settings, arguments=TENANTS) as server:
        async with lab.process(live_quietly, server.address, alone, QUIET_CALLS) as quiet:
            await quiet.wait()
        begun = time.monotonic()
        async with lab.process(make_noise, server.address, noise):
            await until(lambda: len(notes(noise)) >= CALLERS, "the noise has begun")
            async with lab.process(live_quietly, server.address, beside, QUIET_CALLS) as quiet:
                await quiet.wait()
        lasted = time.monotonic() - begun
    seconds = {
        path: [float(line.split()[1]) for line in notes(path) if "refused" not in line] for path in (alone, beside)
    }
    refused = 2 * QUIET_CALLS - sum(map(len, seconds.values()))
    median = {path: statistics.median(some) if some else float("inf") for path, some in seconds.items()}
    return Neighbours(Counter(notes(noise)), median[alone], median[beside], refused, lasted)


async def noisy_neighbour(lab: Lab) -> list[Evidence]:
    limited = await neighbours(lab, "limited", LIMITED)
    free = await neighbours(lab, "free", {})
    told = f"median of {QUIET_CALLS} starts: alone {{0.before:.4f}} s, beside the noise {{0.beside:.4f}} s"
    return [
        holds(
            "with a limit for each namespace the noisy tenant is held to it, and the quiet one is served, "
            "in less than a third of the time it takes without the limit",
            limited.noise["RESOURCE_EXHAUSTED"] >= CALLERS and 0 < limited.noise["OK"] <= RATE * (limited.seconds + 2)
            and limited.refused == 0 and limited.beside < free.beside / 3,
            f"{CALLERS} callers against {RATE} calls a second: {dict(limited.noise)} in {limited.seconds:.1f} s; "
            f"quiet tenant: {limited.refused} refused, "
            + told.format(limited),
        ),
        control(
            "without the limit both compete: the quiet tenant waits for the noisy one",
            free.noise["RESOURCE_EXHAUSTED"] == 0 and free.beside > 3 * free.before,
            f"the same {CALLERS} callers: {dict(free.noise)} in {free.seconds:.1f} s; "
            "quiet tenant: " + told.format(free),
        ),
    ]  # fmt: skip


async def open_doors(lab: Lab, server: Server) -> Evidence:
    """A client with no credentials at all helps itself in both namespaces."""
    reached = []
    for client in await tenants(server):
        handle = await client.start_workflow("Room", "x", id=f"{lab.id}-open", task_queue="nobody")
        stranger = await Client.connect(server.address, namespace=client.namespace)
        await stranger.get_workflow_handle(handle.id).terminate("because I can")
        reached.append(name_of(await status_of(handle)))
    return limit(
        "namespaces separate, they do not guard: the dev server asks nobody who they are",
        reached == ["TERMINATED", "TERMINATED"],
        f"a client without credentials, in either namespace, to another's workflow: {', '.join(reached)}",
    )


@OP.item("OP-07", "Multi-tenant isolation", seconds=120)
async def isolation(lab: Lab) -> AsyncIterator[Evidence]:
    """Two namespaces of one server: equal ids, calls across, separate settings, and one that shouts."""
    async with lab.private_server(arguments=TENANTS) as server:
        red, blue = await tenants(server)
        async with lab.worker([Room], client=red), lab.worker([Room], client=blue):
            for part in (
                one_id_twice(lab, red, blue),
                separate_settings(lab, server, red, blue),
                open_doors(lab, server),
            ):
                seen = await part
                for evidence in [seen] if isinstance(seen, Evidence) else seen:
                    yield evidence
    for evidence in await noisy_neighbour(lab):
        yield evidence
    yield native(
        "the namespace is an argument of the client, and its limits are settings (each command makes a call made here)",
        (Client.connect, "namespace"),
        (Client.start_workflow, "search_attributes"),
        TypedSearchAttributes,
        Client.count_workflows,
        "temporal server start-dev --namespace --dynamic-config-value",
        "temporal operator namespace create --retention",
        "temporal operator search-attribute create",
    )
    yield cited(
        "who may enter which namespace is decided by an Authorizer and a ClaimMapper compiled into the server, or "
        "by Temporal Cloud's roles",
        "docs.temporal.io/self-hosted-guide/security#authorization",
    )


if __name__ == "__main__":
    run(OP)
