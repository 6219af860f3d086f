"""OP: operations - what it takes to deploy, manage, keep, scale and share a cluster.

Between the code and its promises stands a service that somebody runs. It must be reached and secured,
managed by hand and by program, kept on a disk that may be restored, scaled, cleaned up, carried over the
death of its parts, and shared by tenants who do not trust each other. The seven items do each of these
with servers that they start, break and throw away: dev servers, and, where one is prepared, a real cluster
of separate services on PostgreSQL, in two regions, with an archive, with access control.
"""

from cluster import Bucket, Cluster
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
    holds,
    lacks,
    limit,
    native,
    not_run,
    one_of,
    piece,
    side_by_side,
    slowness,
    words,
    works,
)
from harness.services import KINDS, Failed, Process
from harness.systems import prepared, running
from lab import (
    DELETES_SOON,
    PATIENT,
    Books,
    Call,
    Child,
    Handle,
    Lab,
    Server,
    count_events,
    ended,
    finds,
    free_port,
    happened,
    history_of,
    hold,
    http,
    is_closed,
    listed,
    most_at_once,
    note,
    notes,
    open_gate,
    outline,
    pace,
    pending,
    refusal,
    repeated,
    run,
    sandbox,
    slow,
    soon,
    status_of,
    together,
    until,
    withhold,
)

import asyncio
import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import signal
import sqlite3
import ssl
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
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

from google.protobuf.duration_pb2 import Duration
from temporalio import activity, workflow
from temporalio.api.batch.v1 import BatchOperationSignal
from temporalio.api.common.v1 import WorkflowExecution, WorkflowType
from temporalio.api.enums.v1 import ArchivalState, BatchOperationState, IndexedValueType, TaskQueueKind
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import (
    CountWorkflowExecutionsRequest,
    DeleteWorkflowExecutionRequest,
    DescribeBatchOperationRequest,
    DescribeNamespaceRequest,
    GetClusterInfoRequest,
    PollWorkflowTaskQueueRequest,
    RegisterNamespaceRequest,
    ResetWorkflowExecutionRequest,
    StartBatchOperationRequest,
    StartWorkflowExecutionRequest,
    UpdateNamespaceRequest,
)
from temporalio.client import (
    Client,
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowUpdateFailedError,
)
from temporalio.common import (
    RetryPolicy,
    SearchAttributeKey,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
)
from temporalio.envconfig import ClientConfig
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.runtime import MetricBuffer, Runtime, TelemetryConfig
from temporalio.service import RetryConfig, RPCError, RPCStatusCode, TLSConfig
from temporalio.worker import (
    PollerBehaviorAutoscaling,
    Replayer,
    ResourceBasedSlotConfig,
    Worker,
    WorkerTuner,
)

OP = Category(
    "OP",
    "Operations",
    "What does it take to deploy, manage, keep, scale and share a cluster?",
)
# What the items share --------------------------------------------------------------------------------

T = TypeVar("T")
Facts = dict[str, Any]  # by name, as evidence takes them
USE_EXISTING = WorkflowIDConflictPolicy.USE_EXISTING
Travelling = WorkflowHandle[Any, list[int]]


async def reply(call: Awaitable[object]) -> str:
    """With which status a call is refused; "OK" when it is not."""
    try:
        await call
    except RPCError as error:
        return error.status.name
    return "OK"


async def or_else(
    claim: str, parts: AsyncIterator[Evidence], instead: Callable[[], Awaitable[Evidence | list[Evidence]]]
) -> AsyncIterator[Evidence]:
    """The evidence of parts; and where none of it has this claim, as without a cluster, what is seen instead."""
    found = set()
    async for evidence in parts:
        found.add(evidence.claim)
        yield evidence
    if claim not in found:
        seen = await instead()
        for evidence in [seen] if isinstance(seen, Evidence) else seen:
            yield evidence


def go_on(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Raises what has ended one of these, which are to go on until they are told."""
    for one in tasks:
        if one.done():
            one.result()


async def ask_to_start(client: Client, seconds: float = 30) -> str:
    """One attempt to start a workflow, without the SDK's retries. Returns what came back."""
    id = str(uuid.uuid4())
    request = StartWorkflowExecutionRequest(
        namespace=client.namespace, workflow_id=id, request_id=id,
        workflow_type=WorkflowType(name="Any"), task_queue=TaskQueue(name="nobody"),
    )  # fmt: skip
    return await reply(client.workflow_service.start_workflow_execution(request, timeout=timedelta(seconds=seconds)))


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
# One command starts a server. Where a server is, who may speak to it and how that is encrypted are settings: the same
# program runs against a laptop and against a cluster whose services are processes of their own.


@activity.defn
async def say_hello(name: str) -> str:
    return f"Hello, {name}!"


@workflow.defn
class Hello:
    @workflow.run
    async def run(self, name: str) -> str:
        return await workflow.execute_activity(say_hello, name, start_to_close_timeout=timedelta(seconds=30))


# A file of these, named by TEMPORAL_CONFIG_FILE; TEMPORAL_PROFILE says which. Or each setting as a TEMPORAL_* variable.
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


async def example_op_01(client: Client) -> None:
    """The client comes from ClientConfig.load_client_connect_config(): no address, certificate or key stands here."""
    async with Worker(client, task_queue="greetings", workflows=[Hello], activities=[say_hello]):
        print(await client.execute_workflow(Hello.run, "Temporal", id=f"hello-{uuid.uuid4()}", task_queue="greetings"))


# OP-01 put to the test -------------------------------------------------------------------------------

GREETED = "Hello, Temporal!"


async def greet(lab: Lab, settings: Mapping[str, str], config_file: str | None = None) -> str:
    """Connect as the settings say, and run the workflow."""
    options = ClientConfig.load_client_connect_config(
        config_file=config_file,
        disable_file=config_file is None,
        override_env_vars=settings,  # left out, it would be the process's environment
    )
    client, queue = await Client.connect(**options), f"{lab.id}-{uuid.uuid4().hex[:6]}"
    async with lab.worker([Hello], [say_hello], client=client, task_queue=queue):
        handle = await lab.start(Hello.run, "Temporal", id=queue, client=client, task_queue=queue)
        return str((await ended(handle)).result)


async def turned_away(lab: Lab, settings: Mapping[str, str]) -> str:
    """What the SDK says when it does not get in; "let in" when it does."""
    try:
        # Slowness must not look like a refusal: what never answers raises TimeoutError.
        await asyncio.wait_for(greet(lab, settings), 60 * slowness())
    except (RuntimeError, RPCError) as error:
        return str(error)
    return "let in"


class Certificates:
    """An authority of our own with certificates for servers and for one client, and one that is not trusted."""

    def __init__(self, lab: Lab) -> None:
        # Here and not above: the workflow sandbox need not load it for every run.
        import trustme

        self._authority, stranger = trustme.CA(), trustme.CA()
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

    def key_and_chain(self, name: str) -> list[str]:
        """A server's private key and its certificates, as PEM."""
        issued = self._authority.issue_cert(name)
        return [one.bytes().decode() for one in (issued.private_key_pem, *issued.cert_chain_pems)]


async def one_command(lab: Lab) -> list[Evidence]:
    """Start a server; then run this item's own lesson, copied out of here, and name that server in its settings."""
    begun = time.monotonic()
    async with lab.private_server() as server:
        ready = time.monotonic() - begun
        said = await greet(lab, {"TEMPORAL_ADDRESS": server.address})
        seconds = time.monotonic() - begun
        others = {key: value for key, value in os.environ.items() if not key.startswith("TEMPORAL_")}
        copied = await asyncio.to_thread(run_python, others, __file__, "--copy", "OP-01")
        Path(lab.file("lesson.py")).write_text(copied.stdout, encoding="utf-8")
        settings = {"TEMPORAL_ADDRESS": server.address, "TEMPORAL_CONFIG_FILE": os.devnull}
        done = await asyncio.to_thread(run_python, others | settings, lab.file("lesson.py"))
        query = 'WorkflowId STARTS_WITH "hello-"'
        await until(lambda: finds(server.client, query, 1), "visibility has the workflow of the copied program")
    return [
        works(
            "one command starts a server, and a first workflow completes on it",
            result=equal(said, GREETED),
            server_answers_after=figure(ready, "s"),
            first_result_after=figure(seconds, "s"),
        ),
        works(
            "a program with no word of a server in it runs against that one, told by settings alone",
            exit=equal(done.returncode, 0),
            it_printed=equal(done.stdout.strip(), GREETED),
            address_in_its_text=equal(server.address in copied.stdout, False),
        ),
    ]


def run_python(env: Mapping[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], env=dict(env), capture_output=True, text=True, timeout=240, check=False
    )


async def encrypted(lab: Lab, server: Server, certificates: Certificates) -> list[Evidence]:
    """TLS and mTLS by settings and by a profile, each ended by a proxy that knows who came."""
    async with (
        Proxy(server, certificates.tls("127.0.0.1")) as tls,
        Proxy(server, certificates.tls("temporal.example", mutual=True)) as mutual,
    ):
        there, there_too = {"TEMPORAL_ADDRESS": tls.address}, {"TEMPORAL_ADDRESS": mutual.address}
        named = {"TEMPORAL_TLS_SERVER_NAME": "temporal.example"}
        by_tls = await greet(lab, there | certificates.trust)
        unknown = set(tls.speakers)
        by_mutual = await greet(lab, there_too | certificates.trust | certificates.identity | named)
        known = set(mutual.speakers)
        mutual.speakers.clear()
        profile = lab.file("profile.toml")
        Path(profile).write_text(PROFILE.format(address=mutual.address, folder=lab.folder), encoding="utf-8")
        by_profile = await greet(lab, {"TEMPORAL_PROFILE": "secured"}, profile)
        wrong_authority = await turned_away(lab, there | certificates.strange_trust)
        wrong_name = await turned_away(lab, there_too | certificates.trust | certificates.identity)
        no_certificate = await turned_away(lab, there_too | certificates.trust | named)
        plaintext = await turned_away(lab, there)
    return [
        holds(
            "TLS and mTLS are settings: the proxy that ends them learns the client's name from its certificate",
            by_TLS=equal(by_tls, GREETED),
            connections_by_TLS=at_least(tls.accepted, 1),
            name_by_TLS=equal(unknown, set()),
            by_mTLS_under_another_server_name=equal(by_mutual, GREETED),
            name_by_mTLS=equal(known, {"greeter@example.com"}),
        ),
        holds(
            "the same settings from a named profile of a TOML file",
            result=equal(by_profile, GREETED),
            name=equal(mutual.speakers, {"greeter@example.com"}),
        ),
        holds(
            "wrong authority, wrong name and missing client certificate are refused, the first two with the reason",
            wrong_authority=reason(wrong_authority, "UnknownIssuer"),
            wrong_name=reason(wrong_name, "NotValidForName"),
            no_certificate=refused_fact(no_certificate),
        ),
        control("a client that speaks plaintext to the TLS port gets nowhere", it_is=refused_fact(plaintext)),
    ]


def reason(said: str, core: str) -> Fact:
    """The core of what the SDK says, which wraps it in several layers; all of it where the core is not there."""
    return contains(core if core in said else said[:200], core)


def refused_fact(said: str) -> Fact:
    """Not let in: the connection breaks, in words that differ from time to time."""
    return equal(said if said == "let in" else "refused", "refused")


async def keep_the_gate(server: str, key: str, files: Mapping[str, str], chain: Sequence[str]) -> None:
    """A gateway, in a process of its own: ends TLS, notes the authorization headers, and passes on who has the key.

    It hands the bytes of each call on as they are, and knows nothing of Temporal.
    """
    import grpc
    import grpc.aio

    class Keeper(grpc.GenericRpcHandler):  # type: ignore[misc, unused-ignore]
        def service(self, call: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
            header = str(dict(call.invocation_metadata).get("authorization", ""))
            note(files["headers"], header)
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

    keeper = grpc.aio.server()
    keeper.add_generic_rpc_handlers([Keeper()])
    private, *public = (one.encode() for one in chain)
    port = keeper.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(private, b"".join(public))]))
    async with grpc.aio.insecure_channel(server) as onward:
        await keeper.start()
        note(files["port"], str(port))
        await keeper.wait_for_termination()


async def keyed(lab: Lab, server: Server, certificates: Certificates) -> Evidence:
    files = {name: lab.file(f"gate.{name}") for name in ("port", "headers")}
    chain = certificates.key_and_chain("127.0.0.1")
    async with lab.process(keep_the_gate, server.address, "right", files, chain):
        await until(lambda: notes(files["port"]), "the gateway is open")
        settings = {"TEMPORAL_ADDRESS": f"127.0.0.1:{notes(files['port'])[0]}", **certificates.trust}
        said = await greet(lab, settings | {"TEMPORAL_API_KEY": "right"})
        headers = sorted(set(notes(files["headers"])))
        wrong = await turned_away(lab, settings | {"TEMPORAL_API_KEY": "wrong"})
        none = await turned_away(lab, settings)
    return holds(
        "an API key is a setting, sent with every call; a wrong or a missing one is refused",
        result=equal(said, GREETED),
        headers_of_its_calls=equal(headers, ["Bearer right"]),
        wrong_key=reason(wrong, "wrong key"),
        no_key=reason(none, "wrong key"),
        all_headers=equal(sorted(set(notes(files["headers"]))), ["", "Bearer right", "Bearer wrong"]),
    )


async def secured(lab: Lab) -> list[Evidence]:
    certificates = Certificates(lab)
    async with lab.private_server() as server:
        return [*await encrypted(lab, server, certificates), await keyed(lab, server, certificates)]


JOINS = "the services are processes of their own: a second one of each kind joins, and work moves to it"


@piece(holds(JOINS))
async def services_apart(lab: Lab) -> Evidence:
    """Start one process a kind, then a second one of each, and look where the work is done."""
    async with Cluster(shards=8) as cluster:
        region = cluster.region
        first = await greet(lab, {"TEMPORAL_ADDRESS": cluster.address})
        added = {kind: await region.add(kind) for kind in KINDS}

        async def moved() -> bool:
            # Started on many task queues, so that both matching processes have some.
            for _ in range(10):
                await cluster.client.start_workflow("Any", id=str(uuid.uuid4()), task_queue=str(uuid.uuid4()))
            owned = (await region.shard_owners())[added["history"].name]
            return bool(owned) and await requests_to(added["matching"].metrics) > 0

        took = await until(moved, "the second history and matching processes have work", 120)
        second = await greet(lab, {"TEMPORAL_ADDRESS": added["frontend"].address})
        members = await region.database.query("SELECT role, count(*) FROM cluster_membership GROUP BY 1 ORDER BY 1")
        owners = await region.shard_owners()
        return holds(
            JOINS,
            by_the_first_frontend=equal(first, GREETED),
            by_the_second_frontend=equal(second, GREETED),
            processes_of_each_kind=equal([int(count) for _, count in members], [2] * len(KINDS)),
            shards_of_the_second_history=at_least(len(owners[added["history"].name]), 1),
            shards_in_all=equal(sum(map(len, owners.values())), cluster.shards),
            requests_to_the_second_matching=at_least(await requests_to(added["matching"].metrics), 1),
            work_moved_after=figure(took, "s"),
        )


# What Temporal Cloud asks of a client, asked by a cluster of one's own: a key or a certificate, through TLS.

FRONT = """
daemon off; worker_processes 1; pid {folder}/front.pid; error_log {folder}/front-error.log;
events {{}}
http {{
    access_log off; client_body_temp_path {folder}/front-1; proxy_temp_path {folder}/front-2;
    fastcgi_temp_path {folder}/front-3; uwsgi_temp_path {folder}/front-4; scgi_temp_path {folder}/front-5;
    ssl_certificate {folder}/front.pem; ssl_certificate_key {folder}/front.key;
    client_max_body_size 0; keepalive_requests 100000; grpc_read_timeout 90s;
    # Who has a key is known to the cluster, which gets the header as it is.
    server {{
        listen 127.0.0.1:{by_key} ssl http2;
        location / {{ grpc_pass grpc://{frontend}; }}
    }}
    # Who has a certificate is known here; the cluster is told by a key of this front's own.
    server {{
        listen 127.0.0.1:{by_certificate} ssl http2;
        ssl_verify_client on; ssl_client_certificate {folder}/trusted.pem;
        location / {{ grpc_set_header authorization "Bearer {token}"; grpc_pass grpc://{frontend}; }}
    }}
}}
"""


class Front(Process):
    """nginx, which ends TLS before a cluster that asks for tokens."""

    NAME = "cloud.example"

    def __init__(self, cluster: Cluster, program: str) -> None:
        super().__init__("front", cluster.place)
        import trustme

        self._cluster, self._program = cluster, program
        self._draw()
        authority, self.folder = trustme.CA(), cluster.place.folder
        issued = authority.issue_cert(self.NAME)
        issued.private_key_pem.write_to_path(str(self.folder / "front.key"))
        issued.cert_chain_pems[0].write_to_path(str(self.folder / "front.pem"))
        authority.cert_pem.write_to_path(str(self.folder / "front-ca.pem"))
        # The address is not the name in the certificate, so that a client must be told the name.
        self.settings = {
            "TEMPORAL_TLS_SERVER_CA_CERT_PATH": str(self.folder / "front-ca.pem"),
            "TEMPORAL_TLS_SERVER_NAME": self.NAME,
        }

    def trust(self, *authorities: Any) -> None:
        """Let in the clients whose certificates these have issued, and no others."""
        every = b"".join(one.cert_pem.bytes() for one in authorities)
        (self.folder / "trusted.pem").write_bytes(every)
        if self.alive:
            os.kill(self.pid, signal.SIGHUP)  # it reads its files again, and new connections are judged by them

    def identity(self, authority: Any, name: str, **validity: datetime) -> dict[str, str]:
        """Settings with a new certificate of a client."""
        issued, path = authority.issue_cert("greeter@example.com", **validity), self.folder / name
        issued.private_key_pem.write_to_path(f"{path}.key")
        issued.cert_chain_pems[0].write_to_path(f"{path}.pem")
        files = {"TEMPORAL_TLS_CLIENT_CERT_PATH": f"{path}.pem", "TEMPORAL_TLS_CLIENT_KEY_PATH": f"{path}.key"}
        return self.settings | files | {"TEMPORAL_ADDRESS": f"127.0.0.1:{self.by_certificate}"}

    def key(self, token: str) -> dict[str, str]:
        """Settings with an API key."""
        return self.settings | {"TEMPORAL_API_KEY": token, "TEMPORAL_ADDRESS": f"127.0.0.1:{self.by_key}"}

    def _command(self) -> Sequence[str | Path]:
        assert self._cluster.access
        config = self.folder / "front.conf"
        config.touch(0o600)
        token = self._cluster.access.token("default:write", subject="greeter@example.com")
        ports = {"by_key": self.by_key, "by_certificate": self.by_certificate}
        text = FRONT.format(folder=self.folder, frontend=self._cluster.address, token=token, **ports)
        config.write_text(text, encoding="utf-8")
        return [self._program, "-e", self.folder / "front-error.log", "-p", self.folder, "-c", config]

    async def _usable(self) -> bool:
        return self._listens(self.by_key) and self._listens(self.by_certificate)

    def _draw(self) -> None:
        self.by_key, self.by_certificate = self.place.port(), self.place.port()


BY_KEY = "through TLS to another name, an API key is a setting; wrong, expired, missing and replaced keys are refused"
BY_CERTIFICATE = (
    "through mTLS, a certificate is a setting, and can be rotated; an unknown and an expired one are refused"
)


# What is said to who is not let in: by the cluster, by nginx, and by the SDK itself.
UNAUTHORIZED, NO_CERTIFICATE, OTHER_NAME = "Request unauthorized", "400 Bad Request", "NotValidForName"


@piece(holds(BY_KEY), holds(BY_CERTIFICATE))
async def as_in_the_cloud(lab: Lab) -> list[Evidence]:
    """A cluster that asks for tokens, behind a front that ends TLS."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise NotRun("a front that ends TLS is needed (nginx), and none is installed here")
    async with Cluster(access=True) as cluster:
        front = Front(cluster, program)
        try:
            # The replaced key is the one that the front's own token is of: that comes last.
            return [await certificates_at(lab, front), await keys_at(lab, cluster, front)]
        finally:
            front.kill()


async def at_the_door(settings: Mapping[str, str]) -> str:
    """What comes of a client with these settings that asks to start a workflow: "let in", or the core of why not."""
    options = ClientConfig.load_client_connect_config(disable_file=True, override_env_vars=settings)
    try:
        client = await Client.connect(**options)
    except RuntimeError as error:
        said = str(error)
        return next((core for core in (UNAUTHORIZED, NO_CERTIFICATE, OTHER_NAME) if core in said), said[:200])
    answer = await ask_to_start(client)
    return {"OK": "let in", "PERMISSION_DENIED": UNAUTHORIZED}.get(answer, answer)


async def keys_at(lab: Lab, cluster: Cluster, front: Front) -> Evidence:
    """With the right key and with wrong ones; then the key that signs them is replaced."""
    access = cluster.access
    assert access
    token = functools.partial(access.token, "default:write", subject="greeter@example.com")
    first = front.key(token())
    said = await greet(lab, first)
    wrong = {
        "of another key": front.key(token(key=access.new_key())),
        "expired": front.key(token(seconds=-60)),
        "for reading": front.key(access.token("default:read")),
        "without": {key: value for key, value in first.items() if key != "TEMPORAL_API_KEY"},
    }
    refused = {what: equal(await at_the_door(one), UNAUTHORIZED) for what, one in wrong.items()}
    misnamed = await at_the_door(first | {"TEMPORAL_TLS_SERVER_NAME": "other.example"})
    cluster.rotate_key()

    async def replaced() -> bool:
        return await at_the_door(first) == UNAUTHORIZED

    took = await until(replaced, "the replaced key is refused")
    return holds(
        BY_KEY,
        result=equal(said, GREETED),
        **refused,
        another_server_name=equal(misnamed, OTHER_NAME),
        replaced_key_refused_after=figure(took, "s"),
        result_by_the_new_key=equal(await greet(lab, front.key(token())), GREETED),
    )


async def certificates_at(lab: Lab, front: Front) -> Evidence:
    """An authority is replaced by another one, and for a time both are trusted."""
    import trustme

    old, new = trustme.CA(), trustme.CA()
    first, second = front.identity(old, "first"), front.identity(new, "second")
    past = datetime.now(UTC) - timedelta(days=1)
    expired = front.identity(old, "expired", not_before=past - timedelta(days=9), not_after=past)
    front.trust(old)
    await front.start()

    async def both() -> dict[str, str]:
        return {name: await at_the_door(one) for name, one in (("old", first), ("new", second))}

    async def judged(*trusted: Any, **expected: bool) -> Fact:
        """Who is let in with these authorities: it takes a moment until they are known."""
        front.trust(*trusted)
        seen = {}

        async def as_expected() -> bool:
            nonlocal seen
            seen = {name: said == "let in" for name, said in (await both()).items()}
            return seen == expected

        # The fact shows who was let in, which is worth more than that it took too long.
        with contextlib.suppress(TimeoutError):
            await until(as_expected, "the front knows its authorities", 20)
        return equal(seen, expected)

    before = await judged(old, old=True, new=False)
    too_late = await at_the_door(expired)
    none = {key: value for key, value in first.items() if "CLIENT" not in key}
    return holds(
        BY_CERTIFICATE,
        let_in_before=before,
        expired=equal(too_late, NO_CERTIFICATE),
        without=equal(await at_the_door(none), NO_CERTIFICATE),
        let_in_meanwhile=await judged(old, new, old=True, new=True),
        let_in_afterwards=await judged(new, old=False, new=True),
        result_by_the_new_one=equal(await greet(lab, second), GREETED),
    )


async def requests_to(url: str) -> float:
    """How many requests a service of the cluster has had, as it tells Prometheus."""
    lines = (await http(url)).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("service_requests"))


@OP.item("OP-01", "Deployment model", seconds=240)
async def deployment_model(lab: Lab) -> AsyncIterator[Evidence]:
    """Start a server, run a copied lesson against it, reach one through TLS, mTLS and a key; start a cluster."""
    async for evidence in side_by_side(one_command(lab), secured(lab), services_apart(lab), as_in_the_cloud(lab)):
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
    said = (await lab.cli("server", "start-dev", "--help")).out
    unfit = "the server that one command starts is not for production"
    if "production" in said:
        yield limit(unfit, its_help_warns=equal("not intended for production use" in said, True))
    else:
        yield not_run("limit", unfit, "its help has no word of production")
    yield limit(
        "the server that one command starts has no TLS of its own",
        flags_for_TLS=equal(re.findall("--[a-z-]*tls[a-z-]*", said), []),
    )
    yield cited(
        "a production cluster comes as Temporal Cloud, or self-hosted by Helm chart or Docker Compose with a "
        "database of one's own and TLS in the frontend",
        "docs.temporal.io/self-hosted-guide, github.com/temporalio/helm-charts",
    )


# OP-02 Management API --------------------------------------------------------------------------------
# Whatever runs can be managed from outside, by program, by command line and by HTTP, while the workflow has no code
# for being managed; it is found by what is written on it; and a call that is wrong is refused, and says why.


@dataclass
class Purchase:
    item: str


@activity.defn
async def ship(items: list[str]) -> str:
    return " ".join(items)


@workflow.defn
class Basket:
    @workflow.init
    def __init__(self, purchase: Purchase) -> None:
        self.items = [purchase.item]
        self.closed = False

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        await workflow.wait_condition(lambda: self.closed and workflow.all_handlers_finished())
        await workflow.execute_activity(ship, self.items, start_to_close_timeout=timedelta(seconds=30))
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


async def example_op_02(client: Client) -> None:
    async with Worker(client, task_queue="baskets", workflows=[Basket], activities=[ship]):
        basket = await client.start_workflow(
            Basket.run, Purchase("tea"), id=f"basket-{uuid.uuid4()}", task_queue="baskets"
        )
        await basket.signal(Basket.add, "milk")
        await basket.execute_update(Basket.swap, "coffee")
        print("in the basket:", await basket.query(Basket.contents), (await basket.describe()).status)
        # The same from a shell: temporal workflow signal --workflow-id ... --name close
        await basket.signal(Basket.close)
        print("shipped:", await basket.result())


# OP-02 put to the test -------------------------------------------------------------------------------


class Refused(Exception):
    """A call was refused: by which status of its interface, and in which words."""

    def __init__(self, status: str, said: str) -> None:
        super().__init__(f"{status}: {said}")
        self.status, self.said = status, said


REGION = SearchAttributeKey.for_keyword("Region")
FOUND = "WORKFLOW_EXECUTION_STATUS_"


class Manager(Protocol):
    """What an operator does to workflows: a verb, an id, what the verb takes. Raises Refused.

    start: purchase, region, type; list, count: query; signal, query, update: name, arguments; reset: event.
    """

    name: str

    async def do(self, verb: str, id: str = "", *given: Any, run_id: str = "") -> Any: ...


class ByPython:
    """By the Python client. What it has no method for is a request to the service it holds."""

    name = "Python"

    def __init__(self, lab: Lab, client: Client) -> None:
        self.client, self._queue = client, lab.task_queue

    async def do(self, verb: str, id: str = "", *given: Any, run_id: str = "") -> Any:
        client, handle = self.client, self.client.get_workflow_handle(id, run_id=run_id or None)
        raw: dict[str, Any] = {"namespace": client.namespace, "workflow_execution": WorkflowExecution(workflow_id=id)}

        async def start() -> Any:
            purchase, region, type = given
            attributes = TypedSearchAttributes([SearchAttributePair(REGION, region)])
            options: dict[str, Any] = {"task_queue": self._queue, "search_attributes": attributes}
            return (await client.start_workflow(type, purchase, id=id, **options)).first_execution_run_id

        async def reset() -> str:
            how: dict[str, Any] = {"workflow_task_finish_event_id": given[0], "request_id": str(uuid.uuid4())}
            request = ResetWorkflowExecutionRequest(**raw, **how, reason="a tour")
            return (await client.workflow_service.reset_workflow_execution(request)).run_id

        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "start": start, "list": lambda: listed(client, given[0]), "reset": reset,
            "describe": handle.describe, "result": handle.result,
            "cancel": handle.cancel, "terminate": handle.terminate,
            "count": lambda: client.count_workflows(given[0]),
            "signal": lambda: handle.signal(given[0], args=given[1:]),
            "query": lambda: handle.query(given[0], rpc_timeout=PATIENT),
            "update": lambda: handle.execute_update(*given),
            "delete": lambda: client.workflow_service.delete_workflow_execution(DeleteWorkflowExecutionRequest(**raw)),
        }  # fmt: skip
        try:
            answer = await calls[verb]()
        except RPCError as error:
            raise Refused(error.status.name, error.message) from error
        except WorkflowUpdateFailedError as error:
            raise Refused(type(error).__name__, str(error.cause)) from error
        except (WorkflowAlreadyStartedError, WorkflowQueryFailedError) as error:
            raise Refused(type(error).__name__, str(error)) from error
        return {"describe": lambda: answer.status.name, "count": lambda: answer.count}.get(verb, lambda: answer)()


class ByCommand:
    """By the command line, which is written in Go and knows nothing of Python."""

    name = "temporal"

    def __init__(self, lab: Lab, server: Server) -> None:
        self._lab, self._server = lab, server
        self._yes = ["--yes"]

    async def do(self, verb: str, id: str = "", *given: Any, run_id: str = "") -> Any:
        which = ["-w", id, *(["-r", run_id] if run_id else [])]
        named = ["--name", *given[:1], *(word for one in given[1:] for word in ("-i", json.dumps(one)))]
        rest: dict[str, Callable[[], list[str]]] = {
            "start": lambda: [
                *which, "--type", given[2], "-t", self._lab.task_queue, "-i", json.dumps(given[0].__dict__),
                "--search-attribute", f'Region="{given[1]}"', "--fail-existing",
            ],
            "list": lambda: ["--query", given[0]],
            "count": lambda: ["--query", given[0]],
            "signal": lambda: which + named,
            "query": lambda: which + named,
            "update": lambda: ["execute", *which, *named],
            "reset": lambda: [*which, "-e", str(given[0]), "--reason", "a tour"],
            "delete": lambda: [*which, *self._yes],
        }  # fmt: skip
        arguments = rest[verb]() if verb in rest else which
        done = await self._lab.cli("workflow", verb, *arguments, "-o", "json", server=self._server)
        if "cannot set 'yes'" in done.err:  # CLI 1.5 does not ask, and takes no answer in advance
            self._yes = []
            return await self.do(verb, id, *given, run_id=run_id)
        if done.code:
            raise Refused(f"exit {done.code}", " ".join(done.err.split()).removeprefix("Error: "))
        told = json.loads(done.out) if done.out.lstrip().startswith(("{", "[")) else {}
        take: dict[str, Callable[[], Any]] = {
            "start": lambda: told["runId"],
            "reset": lambda: told["runId"],
            "describe": lambda: told["workflowExecutionInfo"]["status"].removeprefix(FOUND),
            "list": lambda: [one["execution"]["workflowId"] for one in told],
            "count": lambda: int(told["count"]),
            "query": lambda: told["queryResult"][0],
            "update": lambda: told["result"],
            "result": lambda: told["result"],
        }
        return take[verb]() if verb in take else None


class ByHttp:
    """By HTTP and JSON, as any language speaks it."""

    name = "HTTP"

    def __init__(self, lab: Lab, port: int) -> None:
        self._base, self._queue = f"http://127.0.0.1:{port}/api/v1/namespaces/default", lab.task_queue

    async def ask(self, path: str, body: Any = None, **query: str) -> Any:
        """POST where there is a body, else GET."""
        url = f"{self._base}/{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        answer = await http(url, body)
        if answer.status != 200:
            raise Refused(str(answer.status), answer.json.get("message", "") if answer.status else answer.text)
        return answer.json

    async def do(self, verb: str, id: str = "", *given: Any, run_id: str = "") -> Any:
        run = {"workflowExecution": {"runId": run_id}} if run_id else {}
        at = f"workflows/{id}"

        async def start() -> Any:
            body = {
                "workflowType": {"name": given[2]}, "taskQueue": {"name": self._queue},
                "input": [given[0].__dict__], "searchAttributes": {"indexedFields": {"Region": given[1]}},
            }  # fmt: skip
            return (await self.ask(at, body))["runId"]

        async def describe() -> Any:
            told = await self.ask(at, **({"execution.runId": run_id} if run_id else {}))
            return told["workflowExecutionInfo"]["status"].removeprefix(FOUND)

        async def listed() -> Any:
            found = (await self.ask("workflows", query=given[0])).get("executions", [])
            return [one["execution"]["workflowId"] for one in found]

        async def count() -> Any:
            return int((await self.ask("workflow-count", query=given[0])).get("count", 0))

        async def query() -> Any:
            return (await self.ask(f"{at}/query/{given[0]}", {}))["queryResult"][0]

        async def update() -> Any:
            # The server waits for a while and then answers without an outcome. Asking again with the same update id
            # is safe: it is applied once.
            request = {"meta": {"updateId": str(uuid.uuid4())}, "input": {"args": list(given[1:])}}
            policy = {"lifecycleStage": "UPDATE_WORKFLOW_EXECUTION_LIFECYCLE_STAGE_COMPLETED"}
            answer = {}
            while "outcome" not in answer:
                answer = await self.ask(f"{at}/update/{given[0]}", {"request": request, "waitPolicy": policy})
            # A refused update is an answered call: status 200, and the failure is the outcome.
            if "failure" in answer["outcome"]:
                raise Refused("200", answer["outcome"]["failure"]["message"])
            return answer["outcome"]["success"][0]

        async def result() -> Any:
            close = {"historyEventFilterType": "HISTORY_EVENT_FILTER_TYPE_CLOSE_EVENT", "waitNewEvent": "true"}
            (event,) = (await self.ask(f"{at}/history", **close))["history"]["events"]
            return event["workflowExecutionCompletedEventAttributes"]["result"][0]

        async def reset() -> Any:
            how = {"reason": "a tour", "workflowTaskFinishEventId": given[0], "requestId": str(uuid.uuid4())}
            return (await self.ask(f"{at}/reset", how))["runId"]

        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "start": start, "describe": describe, "list": listed, "count": count, "query": query, "update": update,
            "result": result, "reset": reset,
            "signal": lambda: self.ask(f"{at}/signal/{given[0]}", {"input": list(given[1:]), **run}),
            "cancel": lambda: self.ask(f"{at}/cancel", run),
            "terminate": lambda: self.ask(f"{at}/terminate", run),
            "delete": lambda: self.ask(f"{at}/delete", {}),
        }  # fmt: skip
        return await calls[verb]()


async def begin(by: Manager, id: str, item: str = "tea", region: str = "nowhere", type: str = "Basket") -> str:
    return str(await by.do("start", id, Purchase(item), region, type))


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
    main, stopped, finished = (f"{lab.id}-{by.name}-{name}" for name in ("main", "ended", "finished"))
    found: dict[str, Any] = {}
    first = await begin(by, main, region=by.name)
    await by.do("signal", main, "add", "milk")
    found["query after start and signal"] = await by.do("query", main, "contents")
    found["update"] = await by.do("update", main, "swap", "coffee")
    found["describe"] = await by.do("describe", main)
    query = f'Region = "{by.name}"'
    await until(lambda: by.do("count", "", query), "visibility has the workflow")
    found["list by search attribute"] = [id.rpartition("-")[2] for id in await by.do("list", "", query)]
    found["count by search attribute"] = await by.do("count", "", query)

    second = await by.do("reset", main, await first_decision(client.get_workflow_handle(main)))
    found["reset makes another run"] = second != first
    found["first run after the reset"] = await by.do("describe", main, run_id=first)
    found["query after the reset"] = await by.do("query", main, "contents")
    await by.do("cancel", main)
    found["after cancel"] = await closing(by, main)

    await begin(by, stopped)
    await by.do("terminate", stopped)
    found["after terminate"] = await closing(by, stopped)

    await begin(by, finished)
    await by.do("signal", finished, "add", "sugar")
    await by.do("signal", finished, "close")
    found["result"] = await by.do("result", finished)
    found["after delete"] = await deleted(by, finished)
    return found


async def first_decision(handle: Handle) -> int:
    """The number of the first completed workflow task, to which a run can be reset."""
    events = await history_of(handle)
    return next(int(one["eventId"]) for one in events if one["eventType"] == "EVENT_TYPE_WORKFLOW_TASK_COMPLETED")


async def closing(by: Manager, id: str) -> str:
    """The status in which a workflow ends."""

    async def closed() -> bool:
        return bool(await by.do("describe", id) != "RUNNING")

    await until(closed, f"{id} has ended")
    return str(await by.do("describe", id))


async def deleted(by: Manager, id: str) -> str:
    """Delete a workflow, which takes the server a moment. Returns with which status it is refused then."""
    status, _ = await refused_by(by.do("delete", id))
    if status:
        return f"not offered ({status})"

    async def gone() -> str:
        return (await refused_by(by.do("describe", id)))[0]

    await until(gone, f"{id} is deleted")
    status, said = await refused_by(by.do("describe", id))
    return "NOT_FOUND" if "not found" in said else status


async def refused_by(call: Awaitable[Any]) -> tuple[str, str]:
    """The status and the words with which a call is refused; empty when it is not."""
    try:
        await call
    except Refused as refused:
        return refused.status, refused.said
    return "", ""


def shipped(lab: Lab, id: str) -> list[str]:
    """What a workflow shipped, by the account outside Temporal."""
    return [" ".join(call.argument) for call in lab.calls(id, "ended")]


async def tours(lab: Lab, client: Client, every: Sequence[Manager]) -> list[Evidence]:
    by_python, by_command, by_http = await together(*(tour(lab, by, client) for by in every))
    ledgers = [shipped(lab, f"{lab.id}-{by.name}-finished") for by in every]
    no_delete = by_http.pop("after delete")
    but_delete = {step: answer for step, answer in TOUR.items() if step != "after delete"}
    return [
        works(
            "every verb works from Python, on a workflow that has no code for it",
            answers=equal(by_python, TOUR),
            shipped=equal(ledgers[0], ["tea sugar"]),
        ),
        holds(
            "the same from the command line, and but for delete over HTTP, on the same workflow: the answers are equal",
            steps_by_command_that_differ=equal(differing(by_command, TOUR), []),
            steps_over_HTTP_that_differ=equal(differing(by_http, but_delete), []),
            shipped=equal(ledgers[1:], [["tea sugar"]] * 2),
        ),
        limit("the HTTP API cannot delete a workflow", POST_to_delete=equal(no_delete, "not offered (404)")),
    ]


def differing(found: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    return [f"{step}: {found.get(step)!r}" for step in {**right, **found} if found.get(step) != right.get(step)]


async def mixed(lab: Lab, python: Manager, command: Manager, by_http: Manager) -> Evidence:
    """One run, three interfaces."""
    id = f"{lab.id}-mixed"
    run_id = await begin(python, id)
    await command.do("signal", id, "add", "milk")
    swapped = await by_http.do("update", id, "swap", "coffee")
    told = [await by.do("query", id, "contents") for by in (python, command, by_http)]
    await by_http.do("signal", id, "close", run_id=run_id)
    return holds(
        "one run, managed by all three in turn",
        updated_over_HTTP=equal(swapped, "coffee"),
        seen_by_all=equal(told, [["coffee", "milk"]] * 3),
        result_by_command=equal(await command.do("result", id), ["coffee", "milk"]),
        shipped=equal(shipped(lab, id), ["coffee milk"]),
    )


@dataclass(frozen=True)
class Wrong:
    """A wrong call: how Python and HTTP name the refusal, and words that all three must say."""

    verb: str
    whose: str
    given: Sequence[Any]
    python: str
    http: str
    words: str
    but: str = ""  # the interface that does not have it


NO_PURCHASE = Purchase("")
MISSING = {
    "describe": (), "signal": ("close",), "query": ("contents",), "update": ("swap", "x"), "cancel": (),
    "terminate": (), "reset": (4,), "delete": (),
}  # fmt: skip
UPDATE_FAILED, QUERY_FAILED = "WorkflowUpdateFailedError", "WorkflowQueryFailedError"
WRONG = {
    **{
        f"{verb}, missing id": Wrong(
            verb, "missing", given, "NOT_FOUND", "404", "not found", "HTTP" if verb == "delete" else ""
        )
        for verb, given in MISSING.items()
    },
    "signal, closed": Wrong("signal", "closed", ["close"], "NOT_FOUND", "404", "already completed"),
    "update, closed": Wrong("update", "closed", ["swap", "x"], "NOT_FOUND", "404", "already completed"),
    "terminate, closed": Wrong("terminate", "closed", [], "NOT_FOUND", "404", "already completed"),
    "list, bad query": Wrong("list", "", ["not a query"], "INVALID_ARGUMENT", "400", "invalid query"),
    "count, bad query": Wrong("count", "", ["Colour = 1"], "INVALID_ARGUMENT", "400", "invalid query"),
    "query, unknown name": Wrong("query", "open", ["colour"], QUERY_FAILED, "400", "expected but not found"),
    "update, unknown name": Wrong("update", "open", ["paint", "x"], UPDATE_FAILED, "200", "expected but not found"),
    "update, refused by its validator": Wrong("update", "open", ["swap", ""], UPDATE_FAILED, "200", "needs a name"),
    "reset, to no workflow task": Wrong("reset", "open", [1], "INVALID_ARGUMENT", "400", "finish ID must be"),
    "start, id taken": Wrong(
        "start", "open", [NO_PURCHASE, "x", "Basket"], "WorkflowAlreadyStartedError", "409", "already"
    ),
    "start, without a type": Wrong(
        "start", "missing", [NO_PURCHASE, "x", ""], "INVALID_ARGUMENT", "400", "WorkflowType"
    ),
}


async def wrong_calls(lab: Lab, client: Client, every: Sequence[Manager]) -> list[Evidence]:
    """Each wrong call by each interface; neither the open nor the closed workflow must notice any of them."""
    ids = {name: f"{lab.id}-{name}" for name in ("missing", "closed", "open")} | {"": ""}
    python = every[0]
    for name in ("closed", "open"):
        await begin(python, ids[name])
    await python.do("signal", ids["closed"], "close")
    await python.do("result", ids["closed"])
    handles = [client.get_workflow_handle(ids[name]) for name in ("closed", "open")]
    before = [outline(await one.fetch_history()) for one in handles]
    unlike, statuses = [], Counter[str]()
    for name, wrong in WRONG.items():
        for by in every:
            if by.name == wrong.but:
                continue
            status, said = await refused_by(by.do(wrong.verb, ids[wrong.whose], *wrong.given))
            statuses[f"{by.name} {status}"] += 1
            right = {"Python": wrong.python, "temporal": "exit 1", "HTTP": wrong.http}[by.name]
            if status != right or wrong.words not in said:
                unlike.append(f"{name}, {by.name}: {status} {said[:100]}")
    after = [outline(await one.fetch_history()) for one in handles]
    closed_again = [(await refused_by(by.do("cancel", ids["closed"])))[0] for by in every]
    status = await python.do("describe", ids["closed"])
    await python.do("terminate", ids["open"])
    in_all = sum(not wrong.but for wrong in WRONG.values())
    return [
        holds(
            f"{in_all} kinds of wrong call are refused by all three, and one more by the two that have it, with a "
            "status and the same reason; nothing changes",
            otherwise_than_expected=equal(unlike, []),
            events_that_came=equal([later != sooner for sooner, later in zip(before, after, strict=True)], [False] * 2),
            answers=dict(statuses),
        ),
        limit(
            "to cancel what is already closed is answered as if it had been cancelled",
            refusals=equal(closed_again, [""] * 3),
            it_is=equal(status, "COMPLETED"),
        ),
    ]


async def start_again(lab: Lab, server: Server, python: Manager) -> Evidence:
    """The command line's own default for an id that is taken."""
    id = f"{lab.id}-again"
    first = await begin(python, id)
    again = ["workflow", "start", "-w", id, "--type", "Basket", "-t", lab.task_queue, "-o", "json"]
    by_default = await lab.cli(*again, server=server)
    by_policy = await lab.cli(*again, "--id-conflict-policy", "Fail", server=server)
    refused = await lab.cli(*again, "--fail-existing", server=server)
    await python.do("terminate", id)
    return limit(
        "the command line's start of an id that runs reports success and the run that was there",
        exit=equal(by_default.code, 0),
        run_of_before=equal(json.loads(by_default.out or "{}").get("runId") == first, True),
        exit_with_fail_existing=equal(refused.code, 1),
        because=contains("already" if "already" in refused.err else refused.err[:200], "already"),
        exit_with_id_conflict_policy_Fail=by_policy.code,
    )


BATCH = 4


async def batches(lab: Lab, server: Server, python: ByPython, by_http: ByHttp) -> Evidence:
    """Signal, cancel and terminate many workflows by one query each; one workflow answers to no query."""
    client = python.client
    groups = {"signal": "COMPLETED", "cancel": "CANCELED", "terminate": "TERMINATED"}
    ids = {group: [f"{lab.id}-batch-{group}-{n}" for n in range(BATCH)] for group in groups}
    spared = f"{lab.id}-batch-spared"
    every = [(id, f"batch-{group}") for group in groups for id in ids[group]] + [(spared, "spared")]
    await asyncio.gather(*(begin(python, id, id, region) for id, region in every))
    query = {group: f'Region = "batch-{group}" AND ExecutionStatus = "Running"' for group in groups}

    async def all_found() -> bool:
        return [await python.do("count", "", one) for one in query.values()] == [BATCH] * len(groups)

    await until(all_found, "visibility has the batches")
    # A namespace runs one batch at a time unless it is set otherwise; each is waited for.
    job, another = str(uuid.uuid4()), str(uuid.uuid4())
    await client.workflow_service.start_batch_operation(
        StartBatchOperationRequest(
            namespace=client.namespace, job_id=job, visibility_query=query["signal"], reason="tour",
            signal_operation=BatchOperationSignal(signal="close"),
        )
    )  # fmt: skip
    await until(lambda: batch_done(client, job), "the batch of signals is done")
    body = {"visibilityQuery": query["cancel"], "reason": "tour", "cancellationOperation": {}}
    await by_http.ask(f"batch-operations/{another}", body)
    await until(lambda: batch_done(client, another), "the batch of cancellations is done")
    terminate = ["workflow", "terminate", "--query", query["terminate"], "--yes", "--reason", "tour"]
    done = await lab.cli(*terminate, server=server)
    found = {group: Counter([await closing(python, id) for id in ids[group]]) for group in groups}
    left = await python.do("describe", spared)
    await python.do("terminate", spared)
    return holds(
        "batch operations by query, from Python, over HTTP and by command, reach all that match and nothing else",
        **{f"by {group}": equal(found[group], Counter({status: BATCH})) for group, status in groups.items()},
        exit=equal(done.code, 0),
        shipped=equal(sum(shipped(lab, id) == [id] for id in ids["signal"]), BATCH),
        the_one_that_no_query_names=equal(left, "RUNNING"),
    )


async def batch_done(client: Client, job: str) -> bool:
    request = DescribeBatchOperationRequest(namespace=client.namespace, job_id=job)
    told = await client.workflow_service.describe_batch_operation(request)
    return told.state == BatchOperationState.BATCH_OPERATION_STATE_COMPLETED


async def other_targets(lab: Lab, server: Server, python: Manager, by_http: Manager) -> Evidence:
    """The right calls to the wrong run id and the wrong namespace, and then to the right one."""
    id, handle = f"{lab.id}-target", server.client.get_workflow_handle(f"{lab.id}-target")
    await begin(python, id)
    await until(lambda: happened(handle, "WORKFLOW_TASK_COMPLETED"), "its first workflow task is done")
    before = outline(await handle.fetch_history(), without="")
    elsewhere = ByPython(lab, await connect(Target(server.address, "elsewhere")))
    another = str(uuid.uuid4())
    calls = [
        python.do("signal", id, "close", run_id=another),
        python.do("cancel", id, run_id=another),
        by_http.do("terminate", id, run_id=another),
        elsewhere.do("signal", id, "close"),
        *(elsewhere.do(verb, id) for verb in ("cancel", "terminate", "delete")),
    ]
    refused = [await refused_by(call) for call in calls]
    after, status = outline(await handle.fetch_history(), without=""), await python.do("describe", id)
    await python.do("signal", id, "close")
    return control(
        "calls on another run id or in another namespace change nothing; the same call on the right run does",
        refused_as=equal([status for status, _ in refused], ["NOT_FOUND"] * 2 + ["404"] + ["NOT_FOUND"] * 4),
        because_of_the_workflow=equal(["workflow" in said for _, said in refused], [True] * len(calls)),
        events_that_came=equal(after.removeprefix(before), ""),
        status_then=equal(status, "RUNNING"),
        result_after_the_right_signal=equal(await python.do("result", id), ["tea"]),
    )


# A search attribute of each type, set at the start of two runs; the second one changes some of its own later.
ATTRIBUTES: Mapping[str, tuple[str, Any, Any]] = {
    "Code": ("Keyword", "a-1", "b'2"),
    "Notes": ("Text", "green tea", "black coffee"),
    "Number": ("Int", 7, 8),
    "Price": ("Double", 1.5, 2.5),
    "Paid": ("Bool", True, False),
    "Due": ("Datetime", datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
    "Tags": ("KeywordList", ["x", "y"], ["y", "z"]),
}
KEY_OF: Mapping[str, Callable[[str], Any]] = {
    "Keyword": SearchAttributeKey.for_keyword, "Text": SearchAttributeKey.for_text,
    "Int": SearchAttributeKey.for_int, "Double": SearchAttributeKey.for_float, "Bool": SearchAttributeKey.for_bool,
    "Datetime": SearchAttributeKey.for_datetime, "KeywordList": SearchAttributeKey.for_keyword_list,
}  # fmt: skip
QUERIES = {
    'Code = "a-1"': "a",
    'Code != "a-1"': "b",
    'Code IN ("a-1", "c")': "a",
    'Code STARTS_WITH "b"': "b",
    "Notes = 'tea'": "a",
    "Number > 7": "b",
    "Number BETWEEN 7 AND 8": "ab",
    "Price <= 1.5 OR Number = 8": "ab",
    "Paid = true": "a",
    'Due < "2026-06-01T00:00:00Z"': "a",
    'Tags = "y"': "ab",
    'Tags = "z"': "b",
    "Later IS NULL": "a",
    'Later = "upserted"': "b",
    'NOT Code = "a-1"': "b",
    # A quote in a value is a value, where it is doubled; it does not end the query.
    "Code = 'b''2'": "b",
    "Code = 'b'' OR Code != '''": "",
}
MALFORMED = {
    "a wrong literal": 'Number = "seven"',
    "an unknown key": "Colour = 1",
    "a quote that is not doubled": "Code = 'b' OR '2'",
}


@workflow.defn
class Tagged:
    """Sets one more search attribute on itself, where it is told to, and waits."""

    @workflow.run
    async def run(self, later: str) -> None:
        if later:
            workflow.upsert_search_attributes([SearchAttributeKey.for_keyword("Later").value_set(later)])
        await workflow.wait_condition(lambda: False)


async def two_tagged(lab: Lab, client: Client) -> list[Handle]:
    """Two runs, a and b, with attributes of all kinds; returns when visibility has both whole."""
    handles = []
    for number, name in enumerate("ab", 1):
        pairs = [SearchAttributePair(KEY_OF[some[0]](key), some[number]) for key, some in ATTRIBUTES.items()]
        attributes = TypedSearchAttributes(pairs)
        later = "upserted" * (name == "b")
        handles.append(
            await lab.start(Tagged.run, later, name=f"tagged-{name}", client=client, search_attributes=attributes)
        )

    async def upserted() -> bool:
        return await find(client, 'Later = "upserted" OR Number = 7') == "ab"

    await until(upserted, "visibility has both")
    return handles


async def find(client: Client, query: str) -> str:
    """Which of the two a query finds."""
    every = client.list_workflows(f'WorkflowType = "Tagged" AND ({query})')
    return "".join(sorted([one.id[-1] async for one in every]))


async def visibility(lab: Lab, client: Client) -> list[Evidence]:
    """Two runs with all kinds of attributes, and what queries find."""
    handles = await two_tagged(lab, client)
    found = {query: await find(client, query) for query in QUERIES}
    wrong = {query: one for query, one in found.items() if one != QUERIES[query]}
    refused = {what: await reply(client.count_workflows(query)) for what, query in MALFORMED.items()}
    sorts = await reply(anext(client.list_workflows('WorkflowType = "Tagged" ORDER BY Number DESC')))
    groups = await reply(client.count_workflows("GROUP BY Number"))
    by_status = await client.count_workflows('WorkflowType = "Tagged" GROUP BY ExecutionStatus')
    latencies = [await found_after(lab, client, number) for number in range(20)]
    for handle in handles:
        await handle.terminate()
    return [
        holds(
            "search attributes of seven types, set at the start and later: each query finds exactly the right runs, a "
            "malformed one is refused",
            queries=len(found),
            with_other_runs_than_right=equal(wrong, {}),
            **{what: equal(status, "INVALID_ARGUMENT") for what, status in refused.items()},
            counted_by_status=equal([group.count for group in by_status.groups], [2]),
            found_after_a_start=Spread.of(latencies, "ms"),
            found_after_a_start_95_of_100=figure(sorted(latencies)[18], "ms"),
        ),
        limit("visibility does not sort by an attribute", ORDER_BY=equal(sorts, "INVALID_ARGUMENT")),
        limit("visibility does not count by an attribute", GROUP_BY=equal(groups, "INVALID_ARGUMENT")),
    ]


async def found_after(lab: Lab, client: Client, number: int) -> float:
    """Milliseconds from the answer to a start until a query finds the run."""
    handle = await lab.start("Any", name=f"soon-{number}", client=client, task_queue="nobody")
    query = f'WorkflowId = "{handle.id}"'
    took = 1000 * await until(lambda: finds(client, query, 1), "it is found", every=0.002)
    await handle.terminate()
    return took


@OP.item("OP-02", "Management API", fail_closed=True, seconds=200)
async def management_api(lab: Lab) -> AsyncIterator[Evidence]:
    """Every verb by Python client, Go command line and HTTP API; then every wrong call; then what queries find."""
    port = free_port()
    arguments = ["--http-port", str(port), "--namespace", "elsewhere"]
    kinds = {"Region": "Keyword", "Later": "Keyword"} | {name: kind for name, (kind, *_) in ATTRIBUTES.items()}
    arguments += [word for name, kind in kinds.items() for word in ("--search-attribute", f"{name}={kind}")]
    async with (
        lab.private_server(settings=DELETES_SOON, arguments=arguments) as server,
        lab.worker([Basket, Tagged], [ship], server=server),
    ):
        python, command, by_http = ByPython(lab, server.client), ByCommand(lab, server), ByHttp(lab, port)
        every: Sequence[Manager] = (python, command, by_http)
        parts = (
            tours(lab, server.client, every),
            mixed(lab, python, command, by_http),
            wrong_calls(lab, server.client, every),
            start_again(lab, server, python),
            batches(lab, server, python, by_http),
            other_targets(lab, server, python, by_http),
            visibility(lab, server.client),
        )
        async for evidence in side_by_side(*parts):
            yield evidence
    yield native(
        "all of it is the platform's: the workflow has no code for it, and the interfaces are the server's",
        Client.start_workflow,
        (Client.start_workflow, "search_attributes"),
        workflow.upsert_search_attributes,
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
    start = functools.partial(lab.start, Inbox.run, client=client, task_timeout=soon())
    return [await start(name=f"{name}-{number}") for number in range(INBOXES)]


async def five_inboxes(lab: Lab, client: Client, name: str = "inbox") -> Inboxes:
    """Waiting workflows with two signals each."""
    handles = await open_inboxes(lab, client, name)
    for handle in handles:
        for number in (1, 2):
            await handle.signal(Inbox.put, number)
    return handles


async def finish(handle: WorkflowHandle[Inbox, list[int]], number: int) -> list[int] | None:
    """Send one more number, close, and read what the workflow has kept."""
    await handle.signal(Inbox.put, number)
    await handle.signal(Inbox.close)
    kept: list[int] | None = (await ended(handle)).result
    return kept


async def finish_all(handles: Inboxes) -> Facts:
    """Facts: each has its two signals and the one of now, and is the run that it was."""
    results = await asyncio.gather(*(finish(handle, 3) for handle in handles))
    runs = [(await handle.describe()).run_id for handle in handles]
    begun = [handle.first_execution_run_id for handle in handles]
    return {"results": equal(results, [[1, 2, 3]] * INBOXES), "runs_of_before": equal(runs == begun, True)}


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
        before = [await status_of(handle) for handle in handles]
        server.kill()
        await server.start()
        after = [await refusal(handle) for handle in handles]
    return control(
        "a server that keeps its state in memory has lost them all",
        before_SIGKILL=equal(before, ["RUNNING"] * INBOXES),
        after_the_restart=equal(after, ["NOT_FOUND"] * INBOXES),
    )


IN_SQLITE = "the server keeps histories and visibility in SQLite, which is one file of one machine"


async def where_it_is_stored(client: Client) -> Evidence:
    """A store that is not told of counts as SQLite."""
    info = await client.workflow_service.get_cluster_info(GetClusterInfoRequest())
    stores = [info.persistence_store, info.visibility_store]
    return limit(
        IN_SQLITE,
        certain=True,
        stores=Fact(stores, "sqlite", set(stores) <= {"sqlite", ""}),
    )


async def stored_by_a_dev_server(lab: Lab) -> Evidence:
    async with lab.private_server(file=True) as server:
        return await where_it_is_stored(server.client)


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

        def enough() -> bool:
            go_on(self.sending)
            return self.acknowledged >= goal

        await until(enough, "signals are acknowledged", every=0.005)

    async def read(self) -> Facts:
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


POSTGRESQL_KILLED = (
    "PostgreSQL killed under load, at last with all services: every acknowledged signal is there once and in order"
)


async def database_killed(lab: Lab, cluster: Cluster) -> Evidence:
    """SIGKILL to PostgreSQL, all of its processes; then to the database and the four services at once."""
    region, unheard = cluster.region, []
    client = await region.connect(retry_config=RETRY)
    async with Senders(await open_inboxes(lab, client, "database")) as senders:
        for _ in range(3):
            await senders.some_more(lab)
            region.database.kill()
            unheard.append(await ask_to_start(client, 5))
            await region.database.start()
        await senders.some_more(lab)
        region.kill()
        back = await region.start()
        facts = await senders.read()
    return holds(
        POSTGRESQL_KILLED,
        **facts,
        starts_while_the_database_is_dead=lacks(unheard, "OK"),
        region_back_after=figure(back, "s"),
        seed=lab.seed,
    )


TOO_EARLY = (
    "a database that acknowledges before it writes (synchronous_commit=off) loses acknowledged signals by the same kill"
)

LAZY = {"synchronous_commit": "off", "wal_writer_delay": "10s", "wal_writer_flush_after": "1GB"}


async def acknowledged_too_early(lab: Lab, cluster: Cluster) -> Evidence:
    """The same kill of everything; only, the database acknowledges before it has written."""
    region, sent = cluster.region, 30
    region.database.settings = LAZY
    await region.database.restart()
    await region.ready()
    handle = await lab.start(Inbox.run, name="early", client=cluster.client, task_queue=f"{lab.id}-early")
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
        TOO_EARLY,
        acknowledged=sent,
        lost=at_least(sent - len(kept), 1),
        setting=words(LAZY),
    )


FROM_BASE_BACKUP = "a base backup of the running PostgreSQL, restored under a second cluster, goes on from that moment"


async def base_backup(lab: Lab, cluster: Cluster) -> Evidence:
    """Back up a running PostgreSQL, lose the whole region, and start another cluster from the backup."""
    folder = cluster.place.folder / "backup"
    handles = await five_inboxes(lab, cluster.client, "base")
    begun = time.monotonic()
    await cluster.region.database.backup(folder)
    seconds = time.monotonic() - begun
    await handles[0].signal(Inbox.put, 99)
    cluster.region.kill()
    async with Cluster(restore=folder) as second, lab.worker([Inbox], client=second.client):
        facts = await finish_all(moved_to(second.client, handles))
    return holds(
        FROM_BASE_BACKUP,
        **facts,
        backup_took=figure(seconds, "s"),
    )


@piece(
    holds(POSTGRESQL_KILLED),
    holds(FROM_BASE_BACKUP),
    control(TOO_EARLY),
)
async def on_postgresql(lab: Lab) -> list[Evidence]:
    async with Cluster() as cluster:
        async with lab.worker([Inbox], client=cluster.client):
            found = [await where_it_is_stored(cluster.client), await database_killed(lab, cluster)]
        found.append(await acknowledged_too_early(lab, cluster))
        async with lab.worker([Inbox], client=cluster.client):
            found.append(await base_backup(lab, cluster))
        return found


# One trial for every store that is prepared here. All that is different is how it is started.

STORES = ("cassandra", "mariadb")
EVERY_STORE = (
    "every store that is prepared here, killed under load: each workflow whose start was acknowledged completes"
)


@piece(holds(EVERY_STORE))
async def in_every_store(lab: Lab) -> Evidence:
    """Visibility stays in PostgreSQL: Cassandra has none, and MariaDB refuses it."""
    there, missing = prepared(*STORES)
    facts: Facts = {}
    async with Cluster() as cluster:
        facts |= await store_killed(lab, cluster, cluster.region.database, "PostgreSQL")
    for name in there:
        async with running(name) as store, Cluster(stores={"main": store.store}) as cluster:
            facts |= await store_killed(lab, cluster, store, await store.version())
    return holds(EVERY_STORE, **facts, not_looked_at=missing)


async def store_killed(lab: Lab, cluster: Cluster, store: Process, title: str) -> Facts:
    """SIGKILL to the store of the histories, while workflows are started as fast as that is acknowledged."""
    acknowledged: list[WorkflowHandle[Hello, str]] = []
    done, queue = asyncio.Event(), f"{lab.id}-{store.name}"
    client = await cluster.region.connect(retry_config=RETRY)

    async def start_some(sender: int) -> None:
        for number in itertools.count():
            if done.is_set():
                return
            id = f"{queue}-{sender}-{number}"
            start = functools.partial(client.start_workflow, Hello.run, "Temporal", task_queue=queue, id=id)
            # A start that was acknowledged to nobody is there all the same.
            acknowledged.append(await patiently(functools.partial(start, id_conflict_policy=USE_EXISTING)))

    async def some_more() -> float:
        goal = len(acknowledged) + 10
        return await until(lambda: len(acknowledged) >= goal, "starts are acknowledged", 120, every=0.005)

    async with lab.worker([Hello], [say_hello], client=client, task_queue=queue):
        senders = [asyncio.create_task(start_some(number)) for number in range(3)]
        try:
            await some_more()
            store.kill()
            before, unheard = len(acknowledged), await ask_to_start(client, 5)
            back = await store.start(120 * slowness())
            again = await some_more()
            done.set()
            await asyncio.gather(*senders)
            results = await asyncio.gather(*map(result_or_why, acknowledged))
        finally:
            for one in senders:
                one.cancel()
    info = await client.workflow_service.get_cluster_info(GetClusterInfoRequest())
    return {
        f"{title} as": differs(info.persistence_store, "sqlite"),
        f"{title}: acknowledged before": before,
        f"{title}: a start while it was dead": differs(unheard, "OK"),
        f"{title}: acknowledged in all": len(acknowledged),
        f"{title}: completed": equal(results.count(GREETED), len(acknowledged)),
        f"{title}: back after": figure(back, "s"),
        f"{title}: ten starts acknowledged after that": figure(again, "s"),
    }


async def result_or_why(handle: WorkflowHandle[Hello, str]) -> str:
    """A result, or why there is none: NOT_FOUND where the workflow is lost, and one may have lost its tasks alone."""
    try:
        return await asyncio.wait_for(patiently(handle.result), 60 * slowness())
    except RPCError as error:
        return error.status.name
    except TimeoutError:
        return "not completed"


NO_VISIBILITY = "MariaDB keeps histories in the place of MySQL, and refuses MySQL's schema of visibility"


@piece(limit(NO_VISIBILITY))
async def mariadb_as_mysql(lab: Lab) -> Evidence:
    """Lay out the schema that MySQL has for visibility."""
    async with running("mariadb") as store:
        try:
            await store.make_schema("temporal_visibility", "visibility")
            said = "made"
        except Failed as error:
            said = str(error)
        version = await store.version()
    core = re.search(r"Error \d+ \(\w+\): You have an error in your SQL syntax", said)
    return limit(
        NO_VISIBILITY,
        schema_of_visibility=Fact(core.group() if core else said[-200:], "an error", said != "made"),
        version=version,
    )


# Visibility in a search engine: the queries of OP-02, and what goes on without it.

ENGINES = ("elasticsearch", "opensearch")
SAME_RUNS = "every store of visibility prepared here finds the same runs by the same queries"
LISTS_FAIL = "while the search engine of visibility is dead, lists fail; workflows go on, and are found once it is back"
SORTED = "a search engine sorts by an attribute only where a setting of the server allows it, and counts by none"
# Known at once instead of within a minute.
KNOWN_AT_ONCE = {"system.forceSearchAttributesCacheRefreshOnRead": True}


@piece(holds(SAME_RUNS), limit(LISTS_FAIL), limit(SORTED))
async def in_every_visibility(lab: Lab) -> list[Evidence]:
    """Histories stay in PostgreSQL."""
    there, missing = prepared(*ENGINES)
    without: Facts = {}
    order: Facts = {}
    async with Cluster(settings=KNOWN_AT_ONCE) as cluster, lab.worker([Tagged], client=cluster.client):
        found = await queries_find(lab, cluster, "PostgreSQL")
    for name in there:
        async with (
            running(name) as engine,
            Cluster(stores={"visibility": engine.store}, settings=KNOWN_AT_ONCE) as cluster,
            lab.worker([Tagged, Hello], [say_hello], client=cluster.client),
        ):
            title = await engine.version()
            found |= await queries_find(lab, cluster, title)
            order |= await sorted_by(cluster, title)
            without |= await engine_killed(lab, cluster, engine, title)
    same = holds(SAME_RUNS, **found, not_looked_at=missing)
    if not there:
        return [same, *(not_run("limit", claim, "; ".join(missing)) for claim in (LISTS_FAIL, SORTED))]
    return [same, limit(LISTS_FAIL, **without, not_looked_at=missing), limit(SORTED, **order, not_looked_at=missing)]


async def queries_find(lab: Lab, cluster: Cluster, title: str) -> Facts:
    """What OP-02 asks of visibility, asked here."""
    client = cluster.client
    kinds = {"Later": "Keyword"} | {name: kind for name, (kind, *_) in ATTRIBUTES.items()}
    types = {name: IndexedValueType.Value(f"INDEXED_VALUE_TYPE_{snake(kind)}") for name, kind in kinds.items()}
    request = AddSearchAttributesRequest(namespace=client.namespace, search_attributes=types)

    async def known() -> bool:
        try:
            await client.operator_service.add_search_attributes(request)
        except RPCError as error:
            return error.status == RPCStatusCode.ALREADY_EXISTS
        return True

    await until(known, "the search attributes are known")
    await until(functools.partial(is_answered, client, "Later IS NULL"), "they can be asked for")
    await two_tagged(lab, client)
    wrong = {query: one for query in QUERIES if (one := await find(client, query)) != QUERIES[query]}
    info = await client.workflow_service.get_cluster_info(GetClusterInfoRequest())
    return {
        f"{title} as": differs(info.visibility_store, "sqlite"),
        f"{title}: queries": len(QUERIES),
        f"{title}: with other runs than right": equal(wrong, {}),
    }


def snake(kind: str) -> str:
    """KeywordList as KEYWORD_LIST."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).upper()


async def is_answered(client: Client, query: str) -> bool:
    """One attempt to count, without the SDK's retries."""
    request = CountWorkflowExecutionsRequest(namespace=client.namespace, query=query)
    answer = await reply(client.workflow_service.count_workflow_executions(request, timeout=timedelta(seconds=5)))
    return answer == "OK"


async def sorted_by(cluster: Cluster, title: str) -> Facts:
    """ORDER BY and GROUP BY an attribute: as the server is, and where its setting allows the first."""
    client, query = cluster.client, 'WorkflowType = "Tagged" ORDER BY Number DESC'
    plainly = await reply(anext(client.list_workflows(query)))
    groups = await reply(client.count_workflows("GROUP BY Number"))
    cluster.region.configure({"system.visibilityDisableOrderByClause": False})

    async def allowed() -> bool:
        return await reply(anext(client.list_workflows(query))) == "OK"

    await until(allowed, "the server sorts")
    found = [one.id[-1] async for one in client.list_workflows(query)]
    return {
        f"{title}: ORDER BY an attribute": equal(plainly, "INVALID_ARGUMENT"),
        f"{title}: where it is allowed": equal(found, ["b", "a"]),
        f"{title}: GROUP BY an attribute": equal(groups, "INVALID_ARGUMENT"),
    }


async def engine_killed(lab: Lab, cluster: Cluster, engine: Process, title: str) -> Facts:
    """SIGKILL to the search engine: what workflows do without it, and what is found when it is back."""
    client = cluster.client
    engine.kill()
    handle = await lab.start(Hello.run, "Temporal", name=engine.name, client=client)
    greeted = (await ended(handle)).result
    answered = await is_answered(client, f'WorkflowId = "{handle.id}"')
    back = await engine.start(120 * slowness())
    query = f'WorkflowId = "{handle.id}" AND ExecutionStatus = "Completed"'

    async def found() -> bool:
        return await reply(client.count_workflows()) == "OK" and await finds(client, query, 1)

    caught_up = await until(found, "what went on without it is found", 120)
    return {
        f"{title}: a workflow without it": equal(greeted, GREETED),
        f"{title}: counting without it": equal("answered" if answered else "failed", "failed"),
        f"{title}: back after": figure(back, "s"),
        f"{title}: caught up after that": figure(caught_up, "s"),
    }


@OP.item("OP-03", "Storage backend", seconds=600)
async def storage_backend(lab: Lab) -> AsyncIterator[Evidence]:
    """Servers, databases and search engines are killed under load; some are restored from a backup."""
    parts = (
        waiting_survive, in_memory, ten_kills, restored_elsewhere, on_postgresql, in_every_store, mariadb_as_mysql,
        in_every_visibility,
    )  # fmt: skip
    every = side_by_side(*(part(lab) for part in parts))
    async for evidence in or_else(IN_SQLITE, every, lambda: stored_by_a_dev_server(lab)):
        yield evidence
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
# Workers share a task queue by polling it: one more takes its part, and the work of one that dies is done by the
# others. How much a worker takes at a time is a number, or follows the machine. One that is told to end needs time
# for what it has in hand; by default it is given none.


@dataclass
class Order:
    parcels: int
    packers: str  # the task queue of those who pack


@activity.defn
async def pack(parcel: int) -> int:
    await asyncio.sleep(0.05)  # stands for the work
    return parcel


@workflow.defn
class Shipment:
    @workflow.run
    async def run(self, order: Order) -> list[int]:
        packing = [
            workflow.execute_activity(
                pack,
                parcel,
                task_queue=order.packers,
                start_to_close_timeout=timedelta(minutes=5),
                heartbeat_timeout=timedelta(seconds=30),
            )
            for parcel in range(order.parcels)
        ]
        return list(await asyncio.gather(*packing))


def packer(client: Client, task_queue: str) -> Worker:
    return Worker(
        client,
        task_queue=task_queue,
        activities=[pack],
        # As many at a time as memory and processor allow; `max_concurrent_activities=20` says a number instead.
        tuner=WorkerTuner.create_resource_based(target_memory_usage=0.8, target_cpu_usage=0.9),
        activity_task_poller_behavior=PollerBehaviorAutoscaling(),
        # A deployment ends the old worker with SIGTERM. Let it wait a little longer than this before it kills.
        graceful_shutdown_timeout=timedelta(seconds=30),
    )


async def serve(worker: Worker) -> None:
    """The main of a worker process: work until SIGTERM, then finish what is in hand."""
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    async with worker:
        await told.wait()


async def example_op_04(client: Client) -> None:
    queue = "packers"
    async with Worker(client, task_queue="shipments", workflows=[Shipment]):
        handle = await client.start_workflow(
            Shipment.run, Order(200, queue), id=f"shipment-{uuid.uuid4()}", task_queue="shipments"
        )
        leaving = asyncio.create_task(serve(packer(client, queue)))
        await asyncio.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)  # a deployment, in the middle of the work
        await leaving
        async with packer(client, queue):  # its successor
            print(f"{len(await handle.result())} parcels, none lost")


# OP-04 put to the test -------------------------------------------------------------------------------

PARCELS, SLOTS = 16, 2


class Hall:
    """Packers in processes of their own on one task queue. What they begin is held until the gate is opened."""

    def __init__(self, lab: Lab, name: str, parcels: int = PARCELS) -> None:
        self.lab, self.name, self.queue, self.parcels = lab, name, f"{lab.id}-{name}-packers", parcels
        self.gate = lab.gate(name)
        self.id = f"{lab.id}-{name}"

    def packer(self, **options: Any) -> contextlib.AbstractAsyncContextManager[Child]:
        return self.lab.worker_process(
            [], [pack], task_queue=self.queue, faults=[hold("pack", self.gate)],
            **(options or {"max_concurrent_activities": SLOTS}),
        )  # fmt: skip

    async def begin(self, packers: int) -> None:
        """Start the shipment, and wait until every slot of so many packers is taken."""
        self.handle = await self.lab.start(Shipment.run, Order(self.parcels, self.queue), name=self.name)
        await self.full(packers)

    async def full(self, packers: int) -> None:
        await until(lambda: self.in_hand().total() >= SLOTS * packers, f"{packers} packers have their hands full")

    def calls(self, what: str = "begun") -> list[Call]:
        return self.lab.calls(self.id, what)

    def in_hand(self) -> Counter[int]:
        """How many parcels each packer has begun and not ended, by its process."""
        return +(Counter(one.pid for one in self.calls()) - Counter(one.pid for one in self.calls("ended")))

    def peak(self) -> int:
        """The most parcels that were under way at once."""
        return most_at_once(self.calls(""))

    def twice(self) -> list[int]:
        """The parcels that were begun more than once."""
        return repeated(one.argument for one in self.calls())

    async def finish(self) -> Facts:
        """Open the gate, and wait for the end."""
        open_gate(self.gate)
        result = (await ended(self.handle, 120)).result
        return {"every_parcel_in_the_result": equal(result == list(range(self.parcels)), True)}


async def filled(lab: Lab, count: int) -> tuple[Hall, Facts, list[int]]:
    """The same shipment with so many packers. Returns what each had in its hands when all were full."""
    hall = Hall(lab, f"by-{count}")
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(count):
            await stack.enter_async_context(hall.packer())
        await hall.begin(count)
        held = sorted(hall.in_hand().values())
        return hall, await hall.finish(), held


async def more_workers(lab: Lab) -> list[Evidence]:
    counts = (1, 2, 4)
    seen = await together(*(filled(lab, count) for count in counts))
    return [
        works(
            "the same load on 1, 2 and 4 worker processes: every job is done once, and twice the workers have twice as "
            "many under way",
            results=equal([facts["every_parcel_in_the_result"].held for _, facts, _ in seen], [True] * 3),
            begun_twice=equal([hall.twice() for hall, *_ in seen], [[], [], []]),
            at_once=equal([hall.peak() for hall, *_ in seen], [SLOTS * count for count in counts]),
        ),
        works(
            "no worker is left out while work waits: each has its slots full",
            in_hand_of_two=equal(seen[1][2], [SLOTS] * 2),
            in_hand_of_four=equal(seen[2][2], [SLOTS] * 4),
            jobs_waiting_meanwhile=at_least(PARCELS - sum(seen[2][2]), 1),
        ),
        control(
            "one worker alone has no more under way than its slots, and the rest waits",
            in_hand=equal(seen[0][2], [SLOTS]),
            at_once=equal(seen[0][0].peak(), SLOTS),
        ),
    ]


async def killed_under_load(lab: Lab) -> Evidence:
    hall = Hall(lab, "killed", 12)
    async with hall.packer() as victim, hall.packer() as survivor:
        await hall.begin(2)
        in_hand = sorted(one.argument for one in hall.calls() if one.pid == victim.pid)
        await victim.kill()
        facts = await hall.finish()
    began = Counter(one.pid for one in hall.calls())
    return holds(
        "a worker killed under load: the other does its jobs again and the rest, and none is lost",
        **facts,
        in_the_hands_of_the_dead=equal(len(in_hand), SLOTS),
        begun_twice=equal(hall.twice(), in_hand),
        begun_by_the_other=equal(began[survivor.pid], 12),
    )


async def added_under_load(lab: Lab) -> Evidence:
    hall = Hall(lab, "added", 12)
    async with hall.packer():
        await hall.begin(1)
        async with hall.packer() as added:
            await hall.full(2)
            theirs, done = hall.in_hand()[added.pid], len(hall.calls("ended"))
            facts = await hall.finish()
    return holds(
        "a worker added under load takes its share before the others have ended a job, and nothing is done twice",
        **facts,
        in_the_hands_of_the_added_one=equal(theirs, SLOTS),
        jobs_ended_by_then=equal(done, 0),
        begun_twice=equal(hall.twice(), []),
    )


async def other_tuners(lab: Lab) -> Evidence:
    """Slots from the machine's load instead of a number, and pollers that grow with the work."""
    by_resources = WorkerTuner.create_resource_based(
        target_memory_usage=0.95,
        target_cpu_usage=0.95,
        activity_config=ResourceBasedSlotConfig(minimum_slots=2, maximum_slots=6, ramp_throttle=timedelta()),
    )
    hall = Hall(lab, "resources", 12)
    async with hall.packer(tuner=by_resources):
        await hall.begin(1)
        facts = await hall.finish()
    pollers = PollerBehaviorAutoscaling(minimum=1, maximum=10, initial=1)
    scaled = await pollers_of(lab, "autoscaling", activity_task_poller_behavior=pollers)
    fixed = await pollers_of(lab, "fixed")
    return holds(
        "resource-based slots and autoscaling pollers keep within the bounds they were given, and lose nothing",
        **facts,
        begun_twice=equal(hall.twice(), []),
        at_once_of_2_to_6_slots=between(hall.peak(), 2, 6),
        autoscaling_pollers_of_1_to_10_at_first=equal(scaled[0], 1),
        at_most=between(max(scaled), 1, 10),
        without_the_setting=at_least(fixed[0], 2),
    )


async def pollers_of(lab: Lab, name: str, **options: Any) -> list[int]:
    """How many activity pollers a worker has, as it reports itself: at first, and while it works off a shipment."""
    buffer = MetricBuffer(10_000)
    # A runtime of its own: metrics are a process's, else.
    client = await connect(lab.target, runtime=Runtime(telemetry=TelemetryConfig(metrics=buffer)))
    hall, seen = Hall(lab, name, 40), list[int]()

    def look() -> list[int]:
        for update in buffer.retrieve_updates():
            if update.metric.name.endswith("num_pollers") and "activity" in str(update.attributes.get("poller_type")):
                seen.append(int(update.value))
        return seen

    async with lab.worker([], [pack], client=client, task_queue=hall.queue, **options):
        await until(look, "the worker says how many pollers it has")
        first = max(seen)
        handle = await lab.start(Shipment.run, Order(40, hall.queue), name=name)
        await ended(handle)
        return [first, *look()]


@dataclass(frozen=True)
class Told:
    """A worker that is told to end, and what becomes of the activity in its hands, which has one attempt."""

    kind: Callable[..., Evidence]
    claim: str
    grace: float  # seconds
    handler: bool  # whether the process listens to SIGTERM
    ending: str
    why: str


TOLD = {
    "grace": Told(
        holds, "told to end by SIGTERM, a worker with graceful_shutdown_timeout lets its activity end",
        120, True, "COMPLETED", "",
    ),
    "default": Told(
        limit, "by default a worker that is told to end gives what it has in hand no time: its activity fails at once",
        0, True, "FAILED", "",
    ),
    "no handler": Told(
        control, "where nothing handles SIGTERM, the attempt hangs until it times out",
        120, False, "FAILED", "timeout",
    ),
}  # fmt: skip


@activity.defn
async def wrap(gate: str) -> str:
    """Takes until the gate is open, and notes that it has begun, and that its worker is to leave."""
    note(f"{gate}.begun", str(os.getpid()))
    while not Path(gate).exists():
        activity.heartbeat()
        if activity.is_worker_shutdown():
            note(f"{gate}.told", "")
        await asyncio.sleep(0.05)
    return "wrapped"


@workflow.defn
class OneAttempt:
    @workflow.run
    async def run(self, gate: str, packers: str, patience: float) -> str:
        return await workflow.execute_activity(
            wrap, gate, task_queue=packers, start_to_close_timeout=timedelta(minutes=10),
            heartbeat_timeout=timedelta(seconds=patience), retry_policy=RetryPolicy(maximum_attempts=1),
        )  # fmt: skip


async def live_as_packer(target: Target, queue: str, grace: float, handler: bool) -> None:
    """The life of a worker process as it is deployed."""
    options: dict[str, Any] = {"graceful_shutdown_timeout": timedelta(seconds=grace)} if grace else {}
    worker = Worker(await connect(target), task_queue=queue, activities=[wrap], **options)
    if handler:
        await serve(worker)
    else:
        await worker.run()


async def told_to_end(lab: Lab, name: str, case: Told) -> Evidence:
    queue, gate = f"{lab.id}-{name.replace(' ', '-')}", lab.gate(name)
    async with lab.process(live_as_packer, lab.target, queue, case.grace, case.handler) as packer:
        handle = await lab.start(OneAttempt.run, gate, queue, soon().total_seconds(), name=name)
        await until(lambda: notes(f"{gate}.begun"), "the activity is under way")
        packer.send(signal.SIGTERM)
        if case.grace and case.handler:

            async def leaving() -> bool:
                return bool(notes(f"{gate}.told")) or await is_closed(handle)

            await until(leaving, "the activity knows that its worker is to leave, or was not told and has failed")
            open_gate(gate)
        begun = time.monotonic()
        how = await ended(handle)
        status = await packer.wait()
    return case.kind(
        case.claim,
        workflow=equal(how.status, case.ending),
        why=contains(how.why or "nothing", case.why),
        worker_ended_with=equal(status, 0 if case.handler else -signal.SIGTERM),
        ended_after=figure(time.monotonic() - begun, "s"),
    )


ONE_SHARD = "the server keeps all histories in one shard: only the scaling of workers is seen here"


async def shards_of(client: Client) -> Evidence:
    """A number that is not told counts as one."""
    info = await client.workflow_service.get_cluster_info(GetClusterInfoRequest())
    return limit(ONE_SHARD, certain=True, history_shards=at_most(info.history_shard_count, 1))


class Warehouse:
    """A cluster of two processes a kind, and shipments that go on while it is hurt."""

    def __init__(self, lab: Lab, cluster: Cluster) -> None:
        self.lab, self.cluster, self.region = lab, cluster, cluster.region

    async def ship(
        self, name: str, shipments: int = 10, hurt: Callable[[], Awaitable[object]] | None = None, queue: str = ""
    ) -> Facts:
        """So many shipments of ten parcels, and while they are under way something is done to the cluster.

        Facts: each parcel of each is there, completed once in the history; how many calls it took.
        """
        client, prefix = await self.region.connect(retry_config=RETRY), f"{self.lab.id}-{name}"
        queue = queue or prefix
        start = functools.partial(self.lab.start, Shipment.run, Order(10, queue), client=client, task_queue=queue)
        handles: list[Handle] = []
        hurting = asyncio.ensure_future(hurt()) if hurt else None
        while len(handles) < shipments or (hurting and not hurting.done()):
            id = f"{prefix}-{len(handles)}"
            handles.append(await patiently(lambda: start(id=id, id_conflict_policy=USE_EXISTING)))  # noqa: B023
            await asyncio.sleep(0.1 if hurt else 0)
        if hurting:
            await hurting
        results = [await patiently(handle.result) for handle in handles]
        completed = [(await count_events(handle))["ACTIVITY_TASK_COMPLETED"] for handle in handles]
        calls = [call for call in self.lab.calls() if call.workflow.startswith(f"{prefix}-")]
        return {
            "shipments": at_least(len(handles), shipments),
            "with_every_parcel": equal(sum(one == list(range(10)) for one in results), len(handles)),
            "completed_in_each_history": equal(sorted(set(completed)), [10]),
            "calls_more_than_parcels": len(calls) - 10 * len(handles),
        }

    async def lose_history(self) -> None:
        """SIGKILL to one of two history processes. It is started again when the other one owns every shard."""
        self.before = await self.region.shard_owners()
        dead, other = self.region.of("history")
        dead.kill()

        async def taken_over() -> bool:
            return len((await self.region.shard_owners())[other.name]) == self.cluster.shards

        self.took = await until(taken_over, "the other history process owns every shard", 120)
        self.after = await self.region.shard_owners()
        await dead.start()

    async def roll(self) -> None:
        """Restart every process, one after the other, by SIGTERM."""
        self.pids = {one.name: one.pid for one in self.region.services}
        begun = time.monotonic()
        for one in list(self.region.services):
            await one.restart()
        self.rolled = time.monotonic() - begun

    async def cost(self, workers: int) -> Facts:
        """What a step costs with so many worker processes: steps a second, and milliseconds of the services' CPU."""
        name, queue, steps = f"cost-{workers}", f"{self.lab.id}-cost-{workers}", 200
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(workers):
                place = cast(Any, self.region)  # it has a target, as a server does
                await stack.enter_async_context(
                    self.lab.worker_process([Shipment], [pack], task_queue=queue, server=place)
                )
            await self.ship(f"{name}-warm", 2, queue=queue)
            spent, begun = sum(one.cpu_seconds for one in self.region.processes), time.monotonic()
            facts = await self.ship(f"{name}-measured", steps // 10, queue=queue)
            seconds = time.monotonic() - begun
        cpu = sum(one.cpu_seconds for one in self.region.processes) - spent
        facts |= {
            "steps_a_second": steps / seconds,
            "CPU of services and database": figure(1000 * cpu / steps, "ms a step"),
        }
        return {f"{name} with {workers}": fact for name, fact in facts.items()}


HISTORY_KILLED = "one of two history processes killed under load: the other owns all shards, each step completed once"
ALL_RESTARTED = "all eight service processes restarted under load, one after the other: each step is completed once"
WHAT_A_STEP_COSTS = "one worker and two on the cluster, what a step costs beside the rate: each step is completed once"


@piece(
    holds(HISTORY_KILLED),
    holds(ALL_RESTARTED),
    holds(WHAT_A_STEP_COSTS),
)
async def on_two_of_each(lab: Lab) -> list[Evidence]:
    async with Cluster(services=dict.fromkeys(KINDS, 2)) as cluster:
        place, region = Warehouse(lab, cluster), cluster.region
        costs = [await place.cost(workers) for workers in (1, 2)]
        async with contextlib.AsyncExitStack() as stack:
            for name in ("lost", "rolled"):
                worker = lab.worker([Shipment], [pack], client=cluster.client, task_queue=f"{lab.id}-{name}")
                await stack.enter_async_context(worker)
            lost = await place.ship("lost", hurt=place.lose_history)
            rolled = await place.ship("rolled", hurt=place.roll)
        owned = {name: len(shards) for name, shards in place.before.items()}
        changed = sum(place.pids[one.name] != one.pid for one in region.services)
        return [
            await shards_of(cluster.client),
            holds(
                HISTORY_KILLED,
                **lost,
                shards_of_each_before=equal(sum(owned.values()) if all(owned.values()) else owned, cluster.shards),
                shards_of_the_other_after=equal(len(place.after["a-history-2"]), cluster.shards),
                taken_over_after=figure(place.took, "s"),
            ),
            holds(
                ALL_RESTARTED,
                **rolled,
                processes_that_are_new=equal(changed, 8),
                restarts_took=figure(place.rolled, "s"),
            ),
            holds(
                WHAT_A_STEP_COSTS,
                **(costs[0] | costs[1]),
            ),
        ]


@OP.item("OP-04", "Scalability", seconds=300)
async def scalability(lab: Lab) -> AsyncIterator[Evidence]:
    """Activities are held in worker processes that come and go: who has what is read from a ledger."""
    parts = (more_workers, killed_under_load, added_under_load, other_tuners, on_two_of_each)
    async with lab.worker([Shipment, OneAttempt], []):
        cases = [told_to_end(lab, name, case) for name, case in TOLD.items()]
        every = side_by_side(*(part(lab) for part in parts), *cases)
        async for evidence in or_else(ONE_SHARD, every, lambda: shards_of(lab.client)):
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
        (Worker, "graceful_shutdown_timeout"),
    )


# OP-05 Retention and clean-up ------------------------------------------------------------------------
# Closed workflows are kept for as long as their namespace says and are then deleted with their history; running ones
# are never touched. What goes earlier is deleted by a call, and what is to be kept longer goes to an archive first.

EXAMPLE_OP_05 = """
# Closed runs are kept for thirty days. An hour is the least that a server takes by default.
temporal operator namespace create --namespace orders --retention 720h
temporal operator namespace describe --namespace orders

# One run goes now, with its history and its place in visibility; a batch of them by a query.
temporal workflow delete --namespace orders --workflow-id order-17
temporal workflow delete --namespace orders --query "WorkflowType = 'Trial' AND ExecutionStatus = 'Failed'" --yes

# What is to outlive its retention needs an archive, which the server's configuration names (S3, files, GCS):
#   archival: {history: {state: enabled, enableRead: true, provider: {s3store: {region: eu-central-1}}}}
# and the namespace asks for. Read an archived history by workflow id AND run id: there is no other way to it.
temporal operator namespace update --namespace orders --history-archival-state enabled --history-uri s3://archive
temporal operator namespace describe --namespace orders   # a server without an archive says Disabled here, no error
temporal workflow show --namespace orders --workflow-id order-17 --run-id 0199a8c4-1c5e-7a2b-9f00-5d1c2b3a4e5f
"""


# OP-05 put to the test -------------------------------------------------------------------------------


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


def short_time() -> int:
    """For how many seconds closed runs are kept here: long enough to look at them on a slow machine."""
    return round(3 * pace())


# Settings that no user has: the least that a namespace keeps is an hour, and deletions are spread over minutes.
SHORT_RETENTION = {"system.namespaceMinRetentionLocal": '"1s"', "history.retentionTimerJitterDuration": '"100ms"'}


async def make_namespace(client: Client, name: str, retention: float, **options: Any) -> Client:
    """Register a namespace, wait until it can be used, and return a client of it."""
    request = RegisterNamespaceRequest(
        namespace=name, workflow_execution_retention_period=Duration(seconds=int(retention)), **options
    )
    await client.workflow_service.register_namespace(request)
    inside = await connect(Target(client.service_client.config.target_host, name))
    await until(lambda: usable(inside), f"namespace {name} can be used")
    return inside


async def usable(client: Client) -> bool:
    """The server learns of a new namespace within a few seconds; each of its services does so by itself."""
    try:
        handle = await client.start_workflow("Any", id=f"usable-{uuid.uuid4()}", task_queue="nobody")
        await handle.terminate()
    except RPCError as error:
        if error.status == RPCStatusCode.NOT_FOUND:
            return False
        raise
    return True


async def leave(client: Client, lab: Lab, name: str) -> WorkflowHandle[Visit, str]:
    """A workflow that was started and has completed."""
    handle = await lab.start(Visit.run, name=name, client=client)
    await handle.signal(Visit.leave)
    await ended(handle)
    return handle


async def traces(client: Client, handle: Handle) -> list[str]:
    """What is left of a workflow: its description, its history, its place in visibility."""
    left = ["description"] if not await refusal(handle) else []
    try:
        left += ["history"] if await history_of(handle) else []
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
    counted = await client.count_workflows(f'WorkflowId = "{handle.id}"')
    return left + ["visibility"] * counted.count


WHOLE = ["description", "history", "visibility"]


async def disappears(client: Client, handle: Handle) -> dict[str, float]:
    """When each trace of a workflow was seen to be gone, by the clock that the server stamps its events with.

    A trace that stays is not in the answer.
    """
    seen: dict[str, float] = {}

    async def all_gone() -> bool:
        left = await traces(client, handle)
        for name in WHOLE:
            if name not in left:
                seen.setdefault(name, time.time())
        return not left

    with contextlib.suppress(TimeoutError):
        await until(all_gone, f"{handle.id} is gone")
    return seen


async def short_namespace(client: Client) -> Client:
    """A namespace that keeps what is closed for seconds. Raises NotRun where no setting brings a server to that."""
    try:
        return await make_namespace(client, "short", short_time())
    except RPCError as error:
        if error.status == RPCStatusCode.INVALID_ARGUMENT:
            raise NotRun(f"this server takes no retention of seconds, however it is set: {error.message}") from None
        raise


async def whole(client: Client, handle: Handle) -> bool:
    return await traces(client, handle) == WHOLE


GONE = "a closed workflow is gone after the seconds that its namespace keeps it, and not before"
ALL_GO = "its description, its history and its place in visibility all go"
UNTOUCHED = "a running workflow is not touched, however old, and still completes"
STILL_THERE = "a workflow that closed earlier in the default namespace is still there"


@piece(works(GONE), holds(ALL_GO), holds(UNTOUCHED), control(STILL_THERE))
async def expires(lab: Lab, server: Server) -> list[Evidence]:
    """A closed and a running workflow in a namespace of short retention, and a closed one in the default one."""
    short = await short_namespace(server.client)
    async with lab.worker([Visit], client=short):
        return await expiring(lab, server, short)


async def expiring(lab: Lab, server: Server, short: Client) -> list[Evidence]:
    running = await lab.start(Visit.run, name="running", client=short)
    kept, closed = await leave(server.client, lab, "kept"), await leave(short, lab, "closed")
    end = (await closed.describe()).close_time
    assert end, "the workflow is closed"
    seen = await disappears(short, closed)
    after = {name: at - end.timestamp() for name, at in seen.items()}
    # The running one is older than a closed one that is now gone, and than another that closes now and goes, too.
    late = await disappears(short, await leave(short, lab, "later"))
    alive, other = await traces(short, running), await traces(server.client, kept)
    await running.signal(Visit.leave)
    return [
        works(
            GONE,
            first_trace_gone_after=at_least(figure(min(after.values(), default=0), "s"), short_time()),
            kept_for=figure(short_time(), "s"),
            last_trace_gone_after=figure(max(after.values(), default=0), "s"),
        ),
        holds(
            ALL_GO,
            gone=equal(sorted(after), WHOLE),
            apart=figure(max(after.values(), default=0) - min(after.values(), default=0), "s"),
        ),
        holds(
            UNTOUCHED,
            left_of_it=equal(alive, WHOLE),
            when_two_younger_closed_ones_were_gone=equal([len(seen), len(late)], [3, 3]),
            result_after_a_signal=equal((await ended(running)).result, "left"),
        ),
        control(
            STILL_THERE,
            left_of_it=equal(other, WHOLE),
            hours_that_it_keeps_what_is_closed=at_least(await retention_of(server.client) / 3600, 1),
        ),
    ]


async def retention_of(client: Client) -> int:
    request = DescribeNamespaceRequest(namespace=client.namespace)
    told = await client.workflow_service.describe_namespace(request)
    return told.config.workflow_execution_retention_ttl.seconds


async def deletes(lab: Lab, client: Client) -> list[Evidence]:
    """Delete one of two closed workflows, and a running one, by a call each."""
    doomed, spared = await leave(client, lab, "doomed"), await leave(client, lab, "spared")
    running = await lab.start(Visit.run, name="doomed-running", client=client)
    for handle in (doomed, spared, running):
        await until(lambda: whole(client, handle), "the workflow is in visibility")  # noqa: B023
    begun = time.time()
    for handle in (doomed, running):
        request = DeleteWorkflowExecutionRequest(
            namespace=client.namespace, workflow_execution=WorkflowExecution(workflow_id=handle.id)
        )
        await client.workflow_service.delete_workflow_execution(request)
    gone = await together(disappears(client, doomed), disappears(client, running))
    left = await traces(client, spared)
    return [
        works(
            "a workflow, closed or running, is deleted by a call, with all its traces",
            gone_of_the_closed_one=equal(sorted(gone[0]), WHOLE),
            gone_of_the_running_one=equal(sorted(gone[1]), WHOLE),
            gone_after=figure(max(at for one in gone for at in one.values()) - begun, "s"),
        ),
        control("its neighbour, for which no call was made, is still there", left_of_it=equal(left, WHOLE)),
    ]


async def too_short(lab: Lab) -> Evidence:
    """What a server with its own settings says to a retention of seconds."""
    async with lab.private_server() as server:
        try:
            await make_namespace(server.client, "too-short", short_time())
        except RPCError as error:
            said = f"{error.status.name}: {error.message}"
        else:
            said = "accepted"
    return holds(
        "without the setting of this item a retention of seconds is refused: nobody loses histories by a slip",
        a_retention_of_seconds=contains(said, "INVALID_ARGUMENT", "retention"),
    )


NO_ARCHIVE = "archival: the server accepts the setting and does not apply it, so that what is deleted is lost"
STATES: Mapping[str, Any] = {
    "history_archival_state": ArchivalState.ARCHIVAL_STATE_ENABLED,
    "visibility_archival_state": ArchivalState.ARCHIVAL_STATE_ENABLED,
}


async def archival_of(client: Client) -> Evidence:
    """What a namespace that was registered with an archive says of it."""
    told = await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=client.namespace))
    state = ArchivalState.Name(told.config.history_archival_state)
    return limit(
        NO_ARCHIVE, certain=True, registered_with_an_archive_and_described_as=differs(state, "ARCHIVAL_STATE_ENABLED")
    )


async def no_archive(lab: Lab, server: Server) -> Evidence:
    uri = f"file://{lab.file('archive')}"
    return await archival_of(await make_namespace(server.client, "archived", 3600, history_archival_uri=uri, **STATES))


@dataclass(frozen=True)
class Kept:
    """What was seen of one archive: histories as events, before the run was deleted and after it."""

    before: int
    after: int
    replayed: bool
    without_run_id: str
    in_archive: float  # seconds from the end of the run until something of it was there
    without_archive: str  # what is said of a run in a namespace without an archive
    evidence: Sequence[Evidence]


UNREADABLE = ("NOT_FOUND", "INVALID_ARGUMENT")  # the latter where the namespace names no archive
UNARCHIVED: Mapping[str, Any] = dict.fromkeys(STATES, ArchivalState.ARCHIVAL_STATE_DISABLED)


async def archives(lab: Lab, kind: Literal["s3", "files"]) -> Kept:
    """Close a run in a namespace with an archive and one in a namespace without, and wait until both are deleted."""
    async with Cluster(archive=kind) as cluster:
        archive, begin = cluster.archive, cluster.client
        assert archive
        kept = await make_namespace(begin, "kept", short_time(), **STATES)
        lost = await make_namespace(begin, "lost", short_time(), **UNARCHIVED)
        async with lab.worker([Visit], client=kept), lab.worker([Visit], client=lost):
            one, other = await leave(kept, lab, "archived"), await leave(lost, lab, "lost")
            run = kept.get_workflow_handle(one.id, run_id=one.first_execution_run_id)
            before = len((await run.fetch_history()).events)

            async def arrived() -> bool:  # in files, names are hashes
                return kind == "files" or any(run.run_id in key for key in await asyncio.to_thread(archive.keys))  # type: ignore[operator]

            took = await until(arrived, "the run is in the archive", 120)
            for client, handle in ((kept, one), (lost, other)):
                await until(lambda: is_unlisted(client, handle), "the run is deleted", 120)  # noqa: B023
            history = await run.fetch_history()
            replay = await Replayer(workflows=[Visit], workflow_runner=sandbox()).replay_workflow(
                history, raise_on_replay_failure=False
            )
            anew = await refusal(kept.get_workflow_handle(one.id))
            gone = await reads(lost.get_workflow_handle(other.id, run_id=other.first_execution_run_id))
            more = [await archival_of(kept)]
            more += [await bucket_down(lab, archive, kept, lost)] if isinstance(archive, Bucket) else []
        return Kept(before, len(history.events), not replay.replay_failure, anew, took, gone, more)


async def is_unlisted(client: Client, handle: Handle) -> bool:
    return "description" not in await traces(client, handle)


async def reads(handle: Handle) -> str:
    """How many events a history has, or with which status it is refused."""
    try:
        return f"{len((await handle.fetch_history()).events)} events"
    except RPCError as error:
        return error.status.name


BUCKET_DOWN = (
    "while the bucket does not answer nothing is deleted that is not in it yet; afterwards it is archived, then deleted"
)


async def bucket_down(lab: Lab, bucket: Bucket, kept: Client, lost: Client) -> Evidence:
    """The bucket stands still. A run closes, and later one in the namespace without an archive, which is then gone."""
    bucket.pause()
    one = await leave(kept, lab, "waiting")
    later = await leave(lost, lab, "later")
    await until(lambda: is_unlisted(lost, later), "the later run is deleted", 120)
    meanwhile = await traces(kept, one)
    bucket.resume()
    await until(lambda: is_unlisted(kept, one), "it is deleted after all", 240)
    run = kept.get_workflow_handle(one.id, run_id=one.first_execution_run_id)
    return holds(
        BUCKET_DOWN,
        left_when_a_later_run_without_an_archive_was_gone=contains(meanwhile, "description", "history"),
        read_from_the_bucket_afterwards=contains(await reads(run), "events"),
    )


ARCHIVED = "with an archive, in an S3 bucket or in files, a deleted run is read by its run id and replayed"
NOT_ARCHIVED = "without an archive what is deleted cannot be read any more"


@piece(
    holds(ARCHIVED),
    holds(BUCKET_DOWN),
    control(NOT_ARCHIVED),
)
async def archived(lab: Lab) -> list[Evidence]:
    bucket, files = await archives(lab, "s3"), await archives(lab, "files")
    return [
        holds(
            ARCHIVED,
            events_from_the_bucket=equal(bucket.after, bucket.before),
            events_from_files=equal(files.after, files.before),
            replayed=equal([bucket.replayed, files.replayed], [True, True]),
            without_run_id=equal([bucket.without_run_id, files.without_run_id], ["NOT_FOUND"] * 2),
            in_the_bucket_after=figure(bucket.in_archive, "s"),
            archived_after_a_setting_of=figure(1, "s"),
        ),
        control(
            NOT_ARCHIVED,
            beside_the_bucket=one_of(bucket.without_archive, *UNREADABLE),
            beside_the_files=one_of(files.without_archive, *UNREADABLE),
        ),
        *bucket.evidence,
    ]


@OP.item("OP-05", "Retention and clean-up", seconds=300)
async def retention_and_clean_up(lab: Lab) -> AsyncIterator[Evidence]:
    """Workflows close in a namespace of short retention; what is left of them is looked for until it is gone."""
    async with (
        lab.private_server(settings=SHORT_RETENTION | DELETES_SOON) as server,
        lab.worker([Visit], server=server),
    ):
        every = side_by_side(expires(lab, server), deletes(lab, server.client), too_short(lab), archived(lab))
        async for evidence in or_else(NO_ARCHIVE, every, lambda: no_archive(lab, server)):
            yield evidence
    yield native(
        "retention is the namespace's, deletion a call (the commands make those made here); no job cleans up",
        "temporal operator namespace create --retention",
        "temporal operator namespace describe",
        "temporal workflow delete",
    )


# OP-06 Multi-region, high availability ---------------------------------------------------------------
# Any part may die: a worker's work goes to the others, a server that comes back is found again, a connection that
# breaks is made anew, and a second region goes on with what has reached it. After each of these a step may be run
# again, so its effect carries a key; nothing else in the code below is there for it.


@dataclass
class Stage:
    journey: str  # the number of the journey, which is the same in every attempt, run and region
    number: int

    @property
    def key(self) -> str:
        return f"{self.journey}/{self.number}"


class Carrier(Protocol):
    def carry(self, key: str) -> None:
        """What is asked twice under one key is done once."""


class Travel:
    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier

    @activity.defn
    def travel(self, stage: Stage) -> int:
        self.carrier.carry(stage.key)
        return stage.number


@dataclass
class Route:
    journey: str
    stages: int
    postcards: int = 0  # so many are waited for


@workflow.defn
class Journey:
    def __init__(self) -> None:
        self.received: list[int] = []

    @workflow.run
    async def run(self, route: Route) -> list[int]:
        done = [
            await workflow.execute_activity_method(
                Travel.travel, Stage(route.journey, number), start_to_close_timeout=timedelta(seconds=30)
            )
            for number in range(route.stages)
        ]
        await workflow.wait_condition(lambda: len(self.received) >= route.postcards)
        return done

    @workflow.signal
    def postcard(self, number: int) -> None:
        self.received.append(number)

    @workflow.query
    def postcards(self) -> list[int]:
        return self.received


class Ferry:
    """A carrier for the example: it remembers in memory what it has carried."""

    def __init__(self) -> None:
        self.carried: set[str] = set()

    def carry(self, key: str) -> None:
        self.carried.add(key)


async def example_op_06(client: Client) -> None:
    ferry = Ferry()

    def worker() -> Worker:
        return Worker(
            client,
            task_queue="journeys",
            workflows=[Journey],
            activities=[Travel(ferry).travel],
            activity_executor=ThreadPoolExecutor(10),
        )

    route = Route(str(uuid.uuid4()), stages=5, postcards=1)
    id = f"journey-{route.journey}"
    async with worker():
        journey = await client.start_workflow(Journey.run, route, id=id, task_queue="journeys")
    await journey.signal(Journey.postcard, 1)  # nobody is there to read it
    async with worker():  # a successor, as on another machine
        print(f"Stages {await journey.result()}, carried {len(ferry.carried)}")


# OP-06 put to the test -------------------------------------------------------------------------------

STAGES, STAGE_SECONDS, HELD = 6, 0.1, 3


class BookedFerry:
    """A carrier whose books are a file outside Temporal, shared by all workers."""

    def __init__(self, books: Books) -> None:
        self.books = books

    def carry(self, key: str) -> None:
        self.books.enter(key, 1)


class Line:
    """Journeys of one task queue, with a carrier of their own."""

    def __init__(self, lab: Lab, name: str, client: Client | None = None, seconds: float = STAGE_SECONDS) -> None:
        self.lab, self.queue, self.client = lab, f"{lab.id}-{name}", client or lab.client
        self.books, self.gate = Books(lab.file(f"{name}.sqlite")), lab.gate(name)
        self.parts: dict[str, Any] = {
            "workflows": [Journey],
            "activities": [Travel(BookedFerry(self.books)).travel],
            "task_queue": self.queue,
            "faults": [slow("travel", seconds)],
            "shortened": {"travel": {"start_to_close_timeout": soon()}},
        }

    @property
    def held(self) -> dict[str, Any]:
        """The same parts; only, the answer of each journey's stage HELD is kept back until the gate is opened."""
        return self.parts | {"faults": [*self.parts["faults"], withhold("travel", self.gate, number=HELD)]}

    def in_hand(self) -> Counter[int]:
        """How many journeys each worker holds, by its process; an attempt that is made again counts once."""
        held = {call.workflow: call.pid for call in self.calls() if call.argument["number"] == HELD}
        return Counter(held.values())

    async def depart(self, count: int, stages: int = STAGES, postcards: int = 0, name: str = "") -> list[Travelling]:
        ids = [f"{self.queue}-{name}{number}" for number in range(count)]
        start = functools.partial(self.lab.start, Journey.run, client=self.client, task_queue=self.queue)
        return [await start(Route(id, stages, postcards), id=id) for id in ids]

    def calls(self, since: float = 0) -> list[Call]:
        return [call for call in self.lab.calls() if call.workflow.startswith(f"{self.queue}-") and call.at > since]

    async def arrive(self, handles: Sequence[Travelling], stages: int = STAGES) -> Facts:
        """Facts: every journey ends with every stage, completed once in its history, and one effect a stage."""
        results = [(await ended(handle, 120)).result for handle in handles]
        completed = [(await count_events(handle))["ACTIVITY_TASK_COMPLETED"] for handle in handles]
        return {
            "journeys": len(handles),
            "results": equal(Counter(map(str, results)), Counter({str(list(range(stages))): len(handles)})),
            "completions_in_each_history": equal(sorted(set(completed)), [stages]),
            "calls": len(self.calls()),
        }

    def effects(self, handles: Sequence[Travelling], stages: int = STAGES) -> Fact:
        """One a stage: a call that is made again comes with the key that it had."""
        return equal(sum(len(self.books.amounts(f"{handle.id}/")) for handle in handles), len(handles) * stages)


async def one_of_two_dies(lab: Lab, sticky: float) -> tuple[Facts, Spread]:
    """Facts of what came of it, and the seconds from the kill until each journey's next stage began."""
    line = Line(lab, f"takeover-{sticky:.0f}")
    # Neither can take all six, so that both have some in hand.
    parts = line.held | {"max_concurrent_activities": 4}
    parts["sticky_queue_schedule_to_start_timeout"] = timedelta(seconds=sticky)
    async with lab.worker_process(**parts) as victim, lab.worker_process(**parts) as heir:
        handles = await line.depart(6)
        await until(lambda: line.in_hand().total() == 6, "every journey is held at the same stage")
        orphans = line.in_hand()[victim.pid]
        await victim.kill()
        killed = time.time()
        open_gate(line.gate)
        facts = await line.arrive(handles)
        after = line.calls(killed)
    firsts = {call.workflow: call.at for call in reversed(after)}
    facts["stages_in_the_hands_of_the_dead"] = between(orphans, 1, 4)
    facts["later_calls_by_others_than_the_other_worker"] = equal({call.pid for call in after} - {heir.pid}, set())
    facts["journeys_that_went_on"] = equal(len(firsts), 6)
    return facts | {"effects": line.effects(handles)}, Spread.of([at - killed for at in firsts.values()] or [0], "s")


async def takeover(lab: Lab) -> Evidence:
    (facts, quick), (default, usual) = await together(*(one_of_two_dies(lab, sticky) for sticky in (1, 10)))
    return works(
        "one of two workers killed: the other takes its workflows over, and nobody did anything about it",
        **facts,
        **{f"{name}, again": fact for name, fact in default.items()},
        next_stage_after_the_kill_with_the_default_sticky_timeout_of_10_s=usual,
        with_one_of_1_s=quick,
        an_attempt_cut_off_is_given_up_after=figure(soon().total_seconds(), "s"),
    )


async def server_crash(lab: Lab) -> Evidence:
    """The server dies and comes back on its file; its worker process and its client are left alone."""
    async with lab.private_server(file=True) as server:
        line = Line(lab, "crash", server.client)
        async with lab.worker_process(**line.held, server=server) as worker:
            handles = await line.depart(4)
            await until(lambda: line.in_hand().total() == 4, "every journey is held at the same stage")
            server.kill()
            killed = time.time()
            await server.start()
            restarted = time.time()
            open_gate(line.gate)
            await until(lambda: line.calls(restarted), "another stage has begun")
            facts = await line.arrive(handles)
            alive = worker.alive
    return holds(
        "the server crashes and comes back: workers and clients reconnect by themselves, all goes on",
        **facts,
        effects=line.effects(handles),
        same_worker_process=equal(alive, True),
        server_back_after=figure(restarted - killed, "s"),
        next_stage_after_the_kill=figure(line.calls(restarted)[0].at - killed, "s"),
    )


CUTS = 5


async def broken_line(lab: Lab) -> Evidence:
    """Between server and worker is a proxy that delays everything and cuts at moments drawn from the seed."""
    async with lab.private_server() as server, Proxy(server) as proxy:
        proxy.delay = 0.02
        line = Line(lab, "line", await connect(Target(proxy.address)), 0.05)
        async with lab.worker(**line.parts, client=line.client):
            handles = await line.depart(4, postcards=CUTS * 4)
            for handle in handles[1:]:
                for number in range(CUTS * 4):
                    await handle.signal(Journey.postcard, number)
            broken = 0
            for cut in range(CUTS):
                goal = len(line.calls()) + lab.random.randrange(1, 5)
                # 4 postcards before each cut, sent over the same line at the same time.
                numbers = range(cut * 4, cut * 4 + 4)
                sending = [asyncio.create_task(handles[0].signal(Journey.postcard, number)) for number in numbers]
                await until(lambda: len(line.calls()) >= min(goal, 4 * STAGES), "stages go on", every=0.01)  # noqa: B023
                await until(lambda: proxy.connections > 0, "there is a connection to cut", every=0.01)
                broken += proxy.cut()
                await asyncio.gather(*sending)
            facts = await line.arrive(handles)
            received = await handles[0].query(Journey.postcards)
    return holds(
        "a line that delays and breaks: no stage and no signal is lost, no signal is there twice, and a stage that is "
        "run again comes with its key",
        **facts,
        effects=line.effects(handles),
        signals_received=equal(sorted(received), list(range(CUTS * 4))),
        connections_broken=at_least(broken, CUTS),
        connections_made=at_least(proxy.accepted, CUTS),
        delay_each_way=figure(20, "ms"),
        seed=lab.seed,
    )


async def nobody_left(lab: Lab) -> Evidence:
    line = Line(lab, "nobody")
    async with lab.worker_process(**line.held) as worker:
        (handle,) = await line.depart(1)
        await until(lambda: line.in_hand().total() == 1, "a stage is in hand")
        await worker.kill()
    before = len(line.calls())

    async def given_up() -> bool:
        return any(one.attempt >= 2 for one in await pending(handle))

    await until(given_up, "the attempt that was cut off is given up, so that somebody could take over")
    waited, status = len(line.calls()) - before, await status_of(handle)
    async with lab.worker_process(**line.parts):
        facts = await line.arrive([handle])
    return control(
        "with nobody to take over, the workflow waits, and loses nothing by it",
        stages_begun_meanwhile=equal(waited, 0),
        status_meanwhile=equal(status, "RUNNING"),
        **{f"{name} with a new worker": fact for name, fact in facts.items()},
    )


NO_SECOND_REGION = (
    "a second region cannot be had: the servers do not replicate each other, and that is the user's to build"
)


async def dev_servers_apart(lab: Lab) -> Evidence:
    """Try what two clusters would need: to know each other, and a namespace that both hold."""
    async with lab.private_server() as one, lab.private_server() as two:
        upsert = ["operator", "cluster", "upsert", "--frontend-address", two.address, "--enable-connection"]
        joined = await lab.cli(*upsert, server=one)
        shared = await lab.cli("operator", "namespace", "create", "--global", "everywhere", server=one)
    said = [" ".join(done.err.split()).rpartition("Error: ")[2] for done in (joined, shared)]
    return limit(
        NO_SECOND_REGION,
        certain=True,
        cluster_upsert=contains(said[0], "Cannot update current cluster metadata"),
        global_namespace=contains(said[1], "Cannot register global namespace"),
        cap=3,
    )


WORLD = "everywhere"


REPLICATED = "what is started in one region is in the other one a moment later"


async def replicates(lab: Lab, cluster: Cluster, own: Client) -> list[Evidence]:
    """Start runs in region a, one after the other, and look for each in what region b itself holds."""
    client, lags = await cluster.region.connect(WORLD), []
    for number in range(10):
        handle = await lab.start("Any", name=f"lag-{number}", client=client, task_queue="nobody")
        again = own.get_workflow_handle(handle.id)
        lags.append(1000 * await until(lambda: is_there(again), "it is in region b", every=0.005))  # noqa: B023
        await handle.terminate()
    there = [await cluster.active_region(WORLD, region) for region in cluster.regions]
    return [
        holds(
            REPLICATED,
            runs_found_in_b=len(lags),
            replication_lag=at_most(Spread.of(lags, "ms"), 10_000),
        ),
        limit(NO_SECOND_REGION, certain=True, active_region_as_each_has_it=differs(there, ["a", "a"]), cap=3),
    ]


async def is_there(handle: Handle) -> bool:
    return not await refusal(handle)


class Traffic:
    """What a client does to region a until it is lost: it starts journeys and sends numbers, and keeps the receipts."""

    def __init__(self, line: Line, inboxes: Inboxes) -> None:
        self.line, self.journeys, self.senders = line, list[Travelling](), Senders(inboxes)

    async def __aenter__(self) -> "Traffic":
        await self.senders.__aenter__()
        self.starting = asyncio.create_task(self.start())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.starting.cancel()
        await asyncio.gather(self.starting, return_exceptions=True)
        await self.senders.__aexit__()

    async def start(self) -> None:
        while True:
            self.journeys += await self.line.depart(1, name=f"{len(self.journeys)}-")
            await asyncio.sleep(0.05)

    async def go_on(self) -> None:
        """Wait for three more receipts of each kind."""
        starts, numbers = len(self.journeys), self.senders.acknowledged

        def enough() -> bool:
            go_on([self.starting, *self.senders.sending])
            return len(self.journeys) >= starts + 3 and self.senders.acknowledged >= numbers + 3

        await until(enough, "the load goes on", every=0.01)


REGION_KILLED = "all of region a killed under load: told to, region b goes on with every run that had reached it"
REGION_BACK = "region a comes back: it learns that b is active, nothing is there twice, and work goes back to a"
ORDINARY_GONE = "a run of an ordinary namespace is gone with region a"


class Loss:
    """Region a is lost under load, b goes on, and a comes back."""

    def __init__(self, lab: Lab, cluster: Cluster) -> None:
        self.lab, self.cluster = lab, cluster
        self.a, self.b = cluster.regions
        self.line = Line(lab, "regions")
        self.parts = self.line.parts | {"workflows": [Journey, Inbox]}
        self.parts["sticky_queue_schedule_to_start_timeout"] = timedelta(seconds=1)

    async def lose(self) -> None:
        """Kill all of a while b is behind: its history service stands still for a moment."""
        self.in_a, self.in_b = await self.a.connect(WORLD), await self.b.connect(WORLD)
        self.line.client = self.in_a
        start = functools.partial(self.lab.start, Inbox.run, client=self.in_a, task_queue=self.line.queue)
        inboxes = [await start(id=f"{self.line.queue}-inbox-{number}") for number in range(3)]
        self.local = await self.lab.start("Any", name="local", client=self.a.client, task_queue="nobody")
        async with self.lab.worker(**self.parts, client=self.in_a), Traffic(self.line, inboxes) as self.load:
            await self.load.go_on()
            await until(lambda: len(self.line.calls()) > 20, "stages have begun")
            history = self.b.of("history")[0]
            history.pause()
            await self.load.go_on()
            self.a.kill()
            self.lost = time.time()
            history.resume()

    async def in_second(self) -> dict[str, list[str]]:
        """Of what was acknowledged: the starts and the numbers that region b does not hold."""
        starts = [one.id for one in self.load.journeys if not await is_there(self.at_b(one))]
        numbers = [
            f"{sender.handle.id} {number}"
            for sender in self.load.senders.every
            for number in sorted(set(range(1, sender.acknowledged + 1)) - set(await self.numbers(sender.handle)))
        ]
        return {"starts": starts, "signals": numbers}

    def at_b(self, handle: Handle) -> Handle:
        return self.in_b.get_workflow_handle(handle.id)

    async def numbers(self, handle: Handle) -> list[int]:
        history = await self.at_b(handle).fetch_history()
        inputs = [one.workflow_execution_signaled_event_attributes.input.payloads for one in history.events]
        return [json.loads(one[0].data) for one in inputs if one]

    async def fail_over(self) -> list[Evidence]:
        took = await patiently(lambda: self.cluster.fail_over(WORLD, to=self.b))
        over = time.time()
        async with self.lab.worker(**self.parts, client=self.in_b):
            await until(lambda: self.line.calls(over), "a stage has begun in region b")
            self.missing = await self.in_second()
            there = [self.at_b(one) for one in self.load.journeys if one.id not in self.missing["starts"]]
            facts = await self.line.arrive(there)
            gone = await refusal(self.b.client.get_workflow_handle(self.local.id))
        self.over = over
        lost = {kind: len(some) for kind, some in self.missing.items()}
        return [
            holds(
                REGION_KILLED,
                **facts,
                effects=self.line.effects(there),
                at_least_one_run_reached_it=at_least(len(there), 1),
                failing_over_took=figure(took, "s"),
                first_stage_in_b_after_the_kill=figure(self.line.calls(over)[0].at - self.lost, "s"),
                with_a_sticky_timeout_of=figure(1, "s"),
            ),
            limit(
                "what region a acknowledged while region b was behind is not in b after the loss",
                acknowledged_starts_missing_in_b=at_least(lost["starts"], 1),
                acknowledged_signals_missing_in_b=at_least(lost["signals"], 1),
                of_starts=len(self.load.journeys),
                of_signals=self.load.senders.acknowledged,
            ),
            control(ORDINARY_GONE, asked_for_in_b=equal(gone, "NOT_FOUND")),
        ]

    async def come_back(self) -> Evidence:
        """Start a again, and fail back to it."""
        begun = time.time()
        await self.a.start()
        await until(self.knows, "region a knows that b is active")
        known = time.time()
        async with self.lab.worker(**self.parts, client=self.in_b):
            # Seen to come within seconds, and not to come within minutes: a fact that only informs.
            with contextlib.suppress(TimeoutError):
                await until(self.nothing_missing, "what was missing is in region b, too", 20, every=0.5)
            left = await self.in_second()
        await patiently(lambda: self.cluster.fail_over(WORLD, to=self.a))
        async with self.lab.worker(**self.parts, client=self.in_a):
            for sender in self.load.senders.every:
                await patiently(lambda: sender.handle.signal(Inbox.close))  # noqa: B023
            kept = [await patiently(sender.handle.result) for sender in self.load.senders.every]
        twice = [number for numbers in kept for number in repeated(numbers)]
        return holds(
            REGION_BACK,
            signals_there_twice=equal(twice, []),
            signals_kept=at_least(sum(map(len, kept)), 1),
            active_again=equal(await self.cluster.active_region(WORLD, self.a), "a"),
            b_had_lacked={kind: len(some) for kind, some in self.missing.items()},
            and_lacks_20_s_after_a_is_back={kind: len(some) for kind, some in left.items()},
            a_was_away_for=figure(begun - self.lost, "s"),
            a_knows_after=figure(known - begun, "s"),
        )

    async def knows(self) -> bool:
        return await self.cluster.active_region(WORLD, self.a) == "b"

    async def nothing_missing(self) -> bool:
        return not any((await self.in_second()).values())


@piece(
    holds(REPLICATED),
    holds(REGION_KILLED),
    holds(REGION_BACK),
    control(ORDINARY_GONE),
)
async def two_regions(lab: Lab) -> list[Evidence]:
    async with Cluster(regions=2) as cluster:
        await cluster.global_namespace(WORLD)
        own = await cluster.regions[1].connect(WORLD, rpc_metadata={"xdc-redirection": "false"})
        found, loss = await replicates(lab, cluster, own), Loss(lab, cluster)
        await loss.lose()
        return [*found, *await loss.fail_over(), await loss.come_back()]


@OP.item("OP-06", "Multi-region, high availability", seconds=300)
async def high_availability(lab: Lab) -> AsyncIterator[Evidence]:
    """A worker, a server, a line and a region are broken in the middle of work; books outside count the effects."""
    parts = (takeover, nobody_left, server_crash, broken_line, two_regions)
    every = side_by_side(*(part(lab) for part in parts))
    async for evidence in or_else(NO_SECOND_REGION, every, lambda: dev_servers_apart(lab)):
        yield evidence
    yield native(
        "workers and clients find each other's successors by themselves: the workflow has no line for it",
        Worker,
        Client.connect,
        workflow.execute_activity_method,
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
# A namespace is a tenant's own: ids, histories, retention, search attributes and limits. It is not a lock. Who may
# enter is decided by the token that a call carries, and only where the server is told to ask for one.

EXAMPLE_OP_07 = """
# A namespace a tenant.
temporal operator namespace create --namespace red --retention 72h
temporal operator search-attribute create --namespace red --name Shade --type Keyword

# No tenant takes the whole server: calls a second and namespace (dynamic configuration of the frontend).
#   frontend.namespaceRPS: [{value: 400}, {value: 1200, constraints: {namespace: red}}]
#   frontend.namespaceBurstRatio: [{value: 1.0}]

# Nobody enters without a token (configuration of the server; keys are read again every so often, so rotate them):
#   global: {authorization: {authorizer: default, claimMapper: default,
#     jwtKeyProvider: {keySourceURIs: [https://login.example/keys.json], refreshInterval: 1m}}}
# and the history says whose token it was, beside the identity that a client gives itself (dynamic configuration):
#   frontend.enablePrincipalPropagation: [{value: true}]

# A token's claims are {"sub": "rose", "exp": ..., "permissions": ["red:write"]}: read, write or admin. It is a setting:
TEMPORAL_NAMESPACE=red TEMPORAL_API_KEY="$TOKEN" temporal workflow list
"""


# OP-07 put to the test -------------------------------------------------------------------------------


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
    reds = await lab.start(Room.run, "red", name="room", client=red)
    blues = await lab.start(Room.run, "blue", name="room", client=blue)
    own = await lab.start(Room.run, "red", name="room-own", client=red)
    across = [blue.get_workflow_handle(own.id), blue.get_workflow_handle(reds.id, run_id=reds.first_execution_run_id)]
    refusals = [await refusal(handle) for handle in across]
    signalled = await reply(across[0].signal("enter", "a stranger"))
    await reds.signal(Room.enter, "Rose")
    await blues.signal(Room.enter, "Bob")
    results = [(await ended(handle)).result for handle in (reds, blues)]
    untouched = await status_of(own)
    await own.terminate()
    return [
        works(
            "one workflow id in two namespaces is two runs, each with its own signals and result",
            run_of_red=differs(reds.first_execution_run_id, blues.first_execution_run_id),
            results=equal(results, ["red: Rose", "blue: Bob"]),
        ),
        holds(
            "a workflow of the other namespace cannot be read or signalled, not even by its run id",
            describe_by_id_and_by_run_id=equal(refusals, ["NOT_FOUND", "NOT_FOUND"]),
            signal=equal(signalled, "NOT_FOUND"),
            where_it_is_at_home=equal(untouched, "RUNNING"),
        ),
    ]


async def separate_settings(lab: Lab, server: Server, red: Client, blue: Client) -> Evidence:
    """A search attribute of red's that blue does not have, and a namespace with a retention of its own."""
    kind, query = IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD, 'Shade = "dark"'
    await red.operator_service.add_search_attributes(
        AddSearchAttributesRequest(namespace="red", search_attributes={"Shade": kind})
    )

    async def red_knows() -> bool:
        return await reply(red.count_workflows(query)) == "OK"

    await until(red_knows, "red knows its search attribute")
    shade = TypedSearchAttributes([SearchAttributePair(SearchAttributeKey.for_keyword("Shade"), "dark")])
    options: dict[str, Any] = {"id": f"{lab.id}-shade", "task_queue": lab.task_queue, "search_attributes": shade}
    handle = await red.start_workflow("Room", "x", **options)
    await until(lambda: finds(red, query, 1), "red finds its workflow")
    at_blue = [
        await reply(blue.start_workflow("Room", "x", **options)),
        await reply(blue.count_workflows(query)),
    ]
    await handle.terminate()
    green = await make_namespace(server.client, "green", 2 * 3600)
    kept = [await retention_of(client) // 3600 for client in (red, green)]
    return holds(
        "search attributes and retention are each namespace's own",
        start_and_query_with_an_attribute_of_reds_in_blue=equal(at_blue, ["INVALID_ARGUMENT"] * 2),
        hours_of_retention=equal(kept, [24, 2]),
    )


CALLERS = 16
RATE = 5
LIMITED = {"frontend.namespaceRPS": str(RATE), "frontend.namespaceBurstRatio": "1.0"}
# The control: as many calls for the two namespaces as they have together, but no limit of each one's own.
SHARED = {"frontend.rps": str(2 * RATE)}
QUIET_CALLS = 8


async def make_noise(address: str, ledger: str) -> None:
    """The noisy tenant, a process of its own: 16 callers who start workflows as fast as they are answered."""
    client = await connect(Target(address, "red"))

    async def caller() -> None:
        while True:
            said = await ask_to_start(client)
            note(ledger, said)
            await asyncio.sleep(0 if said == "OK" else 0.1)  # who is refused waits a little

    await asyncio.gather(*(caller() for _ in range(CALLERS)))


async def live_quietly(address: str) -> list[str]:
    """The quiet tenant, a process of its own, too: a few calls, one after the other, below the limit of each."""
    client, said = await connect(Target(address, "blue")), []
    for _ in range(QUIET_CALLS):
        said.append(await ask_to_start(client))
        await asyncio.sleep(1.5 / RATE)
    return said


async def neighbours(lab: Lab, name: str, settings: Mapping[str, str]) -> tuple[Counter[str], float, Counter[str]]:
    """Both tenants on a server with these settings: what the noisy one was told, for how long, and the quiet one."""
    noise = lab.file(f"{name}-noise")
    async with (
        lab.private_server(settings=settings, arguments=TENANTS) as server,
        lab.process(make_noise, server.address, noise),
    ):
        await until(lambda: len(notes(noise)) >= CALLERS, "the noise has begun")
        begun, before = time.monotonic(), len(notes(noise))
        quiet = await lab.answer(live_quietly, server.address)
        lasted, during = time.monotonic() - begun, notes(noise)[before:]
    return Counter(during), lasted, Counter(quiet)


async def noisy_neighbour(lab: Lab) -> list[Evidence]:
    parts = (neighbours(lab, "limited", LIMITED), neighbours(lab, "shared", SHARED))
    (noise, seconds, quiet), (shared_noise, _, shared_quiet) = await together(*parts)
    return [
        holds(
            "with a limit for each namespace the noisy tenant is held to it, and the quiet one gets every call through",
            noisy_tenant_refused=at_least(noise["RESOURCE_EXHAUSTED"], CALLERS),
            noisy_tenant_served=between(noise["OK"], 1, RATE * (seconds + 2)),
            quiet_tenant=equal(quiet, Counter(OK=QUIET_CALLS)),
            limit=f"{RATE} calls a second and namespace, {CALLERS} callers, {seconds:.1f} s",
        ),
        control(
            "with one limit for both together the noisy tenant takes the quiet one's calls, too",
            noisy_tenant=contains(shared_noise, "RESOURCE_EXHAUSTED"),
            quiet_tenant=contains(shared_quiet, "RESOURCE_EXHAUSTED"),
            quiet_tenant_refused=shared_quiet["RESOURCE_EXHAUSTED"],
        ),
    ]


OPEN_DOORS = "namespaces separate, they do not guard: the server asks nobody who they are"
FORGED = "whoever acts is in the history by the name that they give themselves, and by no other"


async def forged(client: Client, target: Handle) -> dict[str, str]:
    """Signal as somebody else. Returns what the history then has: the name given, and the name in the token."""
    await target.signal("enter", "x")
    history = await client.get_workflow_handle(target.id).fetch_history()
    event = next(
        one for one in reversed(history.events) if one.HasField("workflow_execution_signaled_event_attributes")
    )
    return {
        "identity": event.workflow_execution_signaled_event_attributes.identity,
        # An older SDK cannot read the name that a newer server writes.
        "principal": str(getattr(getattr(event, "principal", None), "name", "")),
    }


async def open_doors(lab: Lab) -> list[Evidence]:
    """A client with no credentials at all helps itself in both namespaces, under a name that is not its own."""
    reached, names = [], {}
    async with lab.private_server(arguments=TENANTS) as server:
        for client in await tenants(server):
            handle = await lab.start("Room", "x", name="open", client=client, task_queue="nobody")
            stranger = await Client.connect(server.address, namespace=client.namespace, identity="the boss")
            names = await forged(client, stranger.get_workflow_handle(handle.id))
            await stranger.get_workflow_handle(handle.id).terminate(reason="because I can")
            reached.append(await status_of(handle))
    return [
        limit(
            OPEN_DOORS,
            certain=True,
            terminated_by_a_client_without_credentials=equal(reached, ["TERMINATED", "TERMINATED"]),
        ),
        limit(
            FORGED,
            certain=True,
            identity=equal(names["identity"], "the boss"),
            name_of_who_it_was=equal(names["principal"], ""),
        ),
    ]


# Who comes, and what each may do: describe and list, start and signal, poll for tasks, change the namespace.
MAY: Mapping[str, Sequence[str]] = {
    "reader": ["describe", "list"],
    "writer": ["describe", "list", "start", "signal", "poll"],
    "admin": ["describe", "list", "start", "signal", "poll", "update namespace"],
    "another namespace's admin": [],
    "expired": [],
    "foreign key": [],
    "none": [],
}


PERMITTED = "with access control a token permits what is written in it: to read, to write and poll, to administer"
STRANGERS_REFUSED = "another namespace's, an expired and a foreign token, and none at all: every call is refused"
KEY_REPLACED = "a key is replaced: what the old one signed is refused, and a running client goes on with a new token"


class Doors:
    """A cluster that asks for tokens, with one running workflow in the namespace red."""

    def __init__(self, lab: Lab, cluster: Cluster) -> None:
        assert cluster.access
        self.lab, self.cluster, self.access = lab, cluster, cluster.access
        token = self.access.token
        self.tokens: dict[str, str | None] = {
            "reader": token("red:read", subject="rita"),
            "writer": token("red:write", subject="will"),
            "admin": token("red:admin", subject="anna"),
            "another namespace's admin": token("blue:admin"),
            "expired": token("red:admin", seconds=-60),
            "foreign key": token("red:admin", key=self.access.new_key()),
            "none": None,
        }

    async def open(self) -> None:
        for name in ("red", "blue"):
            request = RegisterNamespaceRequest(
                namespace=name, workflow_execution_retention_period=Duration(seconds=3600)
            )
            await self.cluster.client.workflow_service.register_namespace(request)
        self.red = await self.cluster.region.connect("red")
        await until(lambda: usable(self.red), "the namespace red can be used")
        self.room = await self.lab.start("Room", "red", name="room", client=self.red, task_queue="nobody")

    async def client(self, token: str | None, **options: Any) -> Client:
        """Whoever they are: a client that connects only when it is used, so that each call is refused by itself."""
        target = Target(self.cluster.address, "red")
        return await connect(target, api_key=token, tls=False, lazy=True, **options)

    async def may(self, token: str | None) -> list[str]:
        """Which calls get through with a token."""
        client = await self.client(token)
        handle, id = client.get_workflow_handle(self.room.id), str(uuid.uuid4())
        queue = TaskQueue(name=id, kind=TaskQueueKind.TASK_QUEUE_KIND_NORMAL)
        poll = PollWorkflowTaskQueueRequest(namespace="red", task_queue=queue)
        calls: dict[str, Awaitable[object]] = {
            "describe": handle.describe(),
            "list": client.count_workflows(),
            "start": client.start_workflow("Room", "red", id=id, task_queue=id),
            "signal": handle.signal("enter", "x"),
            "poll": client.workflow_service.poll_workflow_task_queue(poll),  # the run started before waits there
            "update namespace": client.workflow_service.update_namespace(UpdateNamespaceRequest(namespace="red")),
        }
        return [what for what, call in calls.items() if await let_in(call)]

    async def table(self) -> list[Evidence]:
        seen = {who: await self.may(token) for who, token in self.tokens.items()}
        inside, outside = ("reader", "writer", "admin"), list(MAY)[3:]
        return [
            holds(
                PERMITTED,
                **{who: equal(seen[who], MAY[who]) for who in inside},
            ),
            holds(
                STRANGERS_REFUSED,
                **{who: equal(seen[who], []) for who in outside},
                calls_that_the_admin_makes=equal(len(seen["admin"]), 6),
            ),
            limit(OPEN_DOORS, certain=True, calls_without_credentials_let_in=at_least(len(seen["none"]), 1)),
        ]

    async def identity(self) -> Evidence:
        will = await self.client(self.access.token("red:write", subject="will"), identity="the boss")
        names = await forged(self.red, will.get_workflow_handle(self.room.id))
        return limit(
            FORGED,
            certain=True,
            identity=equal(names["identity"], "the boss"),
            name_of_who_it_was=equal(names["principal"], ""),
        )

    async def rotated(self) -> Evidence:
        old, running = self.access.token("red:write"), await self.client(self.access.token("red:write"))
        handle = running.get_workflow_handle(self.room.id)
        before = await let_in(handle.describe())
        self.cluster.rotate_key()

        async def refused() -> bool:
            return not await let_in((await self.client(old)).get_workflow_handle(self.room.id).describe())

        took = await until(refused, "a token of the old key is refused")
        with_old = await let_in(handle.describe())
        running.api_key = self.access.token("red:write")
        return holds(
            KEY_REPLACED,
            old_token_before_and_after=equal([before, with_old], [True, False]),
            the_same_client_with_a_new_token=equal(await let_in(handle.describe()), True),
            refused_after=figure(took, "s"),
            keys_are_read_every=figure(1, "s"),
        )


async def let_in(call: Awaitable[object]) -> bool:
    """Whether a call is answered. A refusal for another reason than who asks is an error."""
    try:
        await call
    except RPCError as error:
        if error.status in (RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNAUTHENTICATED):
            return False
        raise
    except RuntimeError as error:  # a lazy client asks for the server's version first, and that is refused
        if "PermissionDenied" in str(error) or "Unauthenticated" in str(error):
            return False
        raise
    return True


@piece(
    holds(PERMITTED),
    holds(STRANGERS_REFUSED),
    holds(KEY_REPLACED),
)
async def guarded(lab: Lab) -> list[Evidence]:
    async with Cluster(access=True, settings={"frontend.enablePrincipalPropagation": True}) as cluster:
        doors = Doors(lab, cluster)
        try:
            await doors.open()
            return [*await doors.table(), await doors.identity(), await doors.rotated()]
        except RPCError as error:
            # A refusal is what is tried here: one that nobody expected is no reason not to have run it.
            raise RuntimeError(f"{error.status.name}: {error.message}") from None


async def two_tenants(lab: Lab) -> list[Evidence]:
    async with lab.private_server(arguments=TENANTS) as server:
        red, blue = await tenants(server)
        async with lab.worker([Room], client=red), lab.worker([Room], client=blue):
            return [*await one_id_twice(lab, red, blue), await separate_settings(lab, server, red, blue)]


@OP.item("OP-07", "Multi-tenant isolation", seconds=240)
async def isolation(lab: Lab) -> AsyncIterator[Evidence]:
    """Two namespaces of one server: equal ids, calls across, separate settings, one that shouts; and a locked door."""
    every = side_by_side(two_tenants(lab), noisy_neighbour(lab), guarded(lab))
    async for evidence in or_else(OPEN_DOORS, every, lambda: open_doors(lab)):
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
        "other ways to decide who may enter: an Authorizer and a ClaimMapper of one's own compiled into the server, or "
        "Temporal Cloud's roles",
        "docs.temporal.io/self-hosted-guide/security#authorization",
    )


if __name__ == "__main__":
    run(OP)
