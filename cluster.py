"""A real Temporal cluster on this machine: the server's services as separate processes on a real PostgreSQL.

    uv run cluster.py prepare     builds the server once, into the user's cache folder
    uv run cluster.py up          starts a cluster, says what runs where, and ends it with Ctrl-C

1. Archive and access     where closed runs go, and the keys and tokens of a cluster that asks for them
2. Region                 services, database and Web UI that belong together
3. Cluster                one region, or two that replicate to each other
4. The command line

A script uses it as `async with Cluster(...) as cluster`. Everything listens on loopback and ends with the process
that started it. Nothing here is a stand-in but the bucket, which is moto's S3 server.
"""

from common import (
    NotRun,
    Target,
    Unusable,
    connect,
    devnull,
    leave,
    load_settings,
    make_console,
    redacted,
    refuse,
    stop_signals,
)
from harness.machine import together
from harness.progress import Progress
from harness.servers import port_is_free
from harness.services import (
    KINDS,
    SERVER,
    SIZES,
    Database,
    Failed,
    Place,
    Process,
    Service,
    WebUI,
    cache,
    empty_database,
    explain_build,
    find_programs,
    in_thread,
    lock_file,
    may_enter,
    prepare,
)
from harness.systems import SYSTEMS, builds_for, chosen, prepare_systems
from lab import until

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn

from rich.console import Console
from temporalio.api.common.v1 import WorkflowExecution, WorkflowType
from temporalio.api.enums.v1 import TaskQueueKind, TaskQueueType
from temporalio.api.operatorservice.v1 import AddOrUpdateRemoteClusterRequest
from temporalio.api.replication.v1 import ClusterReplicationConfig, NamespaceReplicationConfig
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import (
    DeleteWorkflowExecutionRequest,
    DescribeNamespaceRequest,
    DescribeTaskQueueRequest,
    DescribeWorkflowExecutionRequest,
    PollWorkflowTaskQueueRequest,
    RegisterNamespaceRequest,
    StartWorkflowExecutionRequest,
    UpdateNamespaceRequest,
)
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

# 1. Archive and access --------------------------------------------------------------------------------


class Archive:
    """Where closed runs are kept after their retention: in files, or in a bucket."""

    environment: Mapping[str, str] = {}

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def uri(self) -> str:
        return self.folder.as_uri()

    def provider(self) -> dict[str, Any]:
        """The server's settings for it."""
        return {"filestore": {"fileMode": "0666", "dirMode": "0766"}}

    def keys(self) -> list[str]:
        """The names of what is in it."""
        return sorted(str(one.relative_to(self.folder)) for one in self.folder.rglob("*") if one.is_file())


class Bucket(Archive, Process):
    """An archive in a bucket of moto's S3 server. It keeps what it holds while it is paused, not when it is killed."""

    NAME = "temporal-archive"
    environment: Mapping[str, str] = {
        "AWS_ACCESS_KEY_ID": "evaluation",
        "AWS_SECRET_ACCESS_KEY": "evaluation",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }

    def __init__(self, place: Place) -> None:
        Process.__init__(self, "bucket", place)
        self.port = place.port()

    @property
    def uri(self) -> str:
        return f"s3://{self.NAME}"

    @property
    def url(self) -> str:
        """Where its S3 API answers."""
        return f"http://127.0.0.1:{self.port}"

    def provider(self) -> dict[str, Any]:
        return {"s3store": {"region": "us-east-1", "endpoint": self.url, "s3ForcePathStyle": True}}

    async def start(self, seconds: float = 60) -> float:
        """Start it, empty, and make the bucket."""
        took = await Process.start(self, seconds)
        await asyncio.to_thread(lambda: self.s3().create_bucket(Bucket=self.NAME))
        return took

    def _command(self) -> Sequence[str | Path]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    async def _usable(self) -> bool:
        return self._listens(self.port)

    def _draw(self) -> None:
        self.port = self.place.port()

    def keys(self) -> list[str]:
        pages = self.s3().get_paginator("list_objects_v2").paginate(Bucket=self.NAME)
        return sorted(one["Key"] for page in pages for one in page.get("Contents", []))

    def s3(self) -> Any:
        """A client of its API."""
        import boto3  # type: ignore[import-untyped]
        from botocore.config import Config

        # Loopback is not asked for through a proxy, and a bucket that is down is not waited for.
        config = Config(proxies={}, connect_timeout=2, read_timeout=5, retries={"max_attempts": 0})
        return boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", config=config,
            aws_access_key_id="evaluation", aws_secret_access_key="evaluation",
        )  # fmt: skip


class Access:
    """The keys of a cluster that asks for tokens. What a token permits is written in it.

    Permissions are "NAMESPACE:read", "NAMESPACE:write", "NAMESPACE:admin" and "temporal-system:admin".
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "keys.json"
        self.key_id, self._key = self.new_key()
        self._publish()

    @staticmethod
    def new_key() -> tuple[str, Any]:
        """(id, private key) of a new RSA key that the cluster does not know."""
        from cryptography.hazmat.primitives.asymmetric import rsa

        return secrets.token_hex(4), rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def token(
        self, *permissions: str, subject: str = "evaluation", seconds: float = 86400, key: tuple[str, Any] | None = None
    ) -> str:
        """A token that expires in so many seconds (negative: it did already). `key`: signed by this one instead."""
        import jwt

        key_id, private = key or (self.key_id, self._key)
        claims = {"sub": subject, "permissions": list(permissions), "exp": datetime.now(UTC) + timedelta(0, seconds)}
        return jwt.encode(claims, private, algorithm="RS256", headers={"kid": key_id})

    def rotate(self) -> None:
        """Replace the key: the services read the new one within a second or two and refuse what the old one signed."""
        self.key_id, self._key = self.new_key()
        self._publish()

    def config(self) -> dict[str, Any]:
        """The server's settings for it."""
        keys = {"keySourceURIs": [self.file.as_uri()], "refreshInterval": "1s"}
        return {"authorizer": "default", "claimMapper": "default", "jwtKeyProvider": keys}

    def _publish(self) -> None:
        from jwt.algorithms import RSAAlgorithm

        public = RSAAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps({"keys": [public | {"kid": self.key_id, "alg": "RS256", "use": "sig"}]}))
        new.replace(self.file)  # a reader sees the old file or the new one


# 2. Region -------------------------------------------------------------------------------------------


class Region:
    """One complete Temporal cluster: its services, its database, its Web UI. Two of them replicate to each other."""

    def __init__(self, name: str, cluster: "Cluster", folder: Path, ports: Mapping[str, int]) -> None:
        self.name, self.cluster, self.place = name, cluster, cluster.place
        self.archive, self.access = cluster.archive, cluster.access
        self.database = Database(f"{name}-database", self.place, folder)
        self.services: list[Service] = []
        for kind, count in cluster.counts.items():
            for number in range(1, count + 1):
                port = ports.get(f"{name}-{kind}-{number}") if kind == "frontend" else None
                self.services.append(self._service(kind, number, port))
        ui_port = ports.get(f"{name}-ui")
        self.ui = WebUI(f"{name}-ui", self.place, lambda: self.address, ui_port) if cluster.with_ui else None
        self.settings: dict[str, Any] = {}
        self._client: Client | None = None

    @property
    def address(self) -> str:
        """The first frontend's "host:port"."""
        return self.of("frontend")[0].address

    @property
    def target(self) -> Target:
        return Target(self.address)

    @property
    def client(self) -> Client:
        """A client of the namespace default, with all permissions. It stays the same over restarts."""
        assert self._client, "the region was not started"
        return self._client

    @property
    def processes(self) -> list[Process]:
        """All of its processes, the database first."""
        return [self.database, *self.services, *([self.ui] if self.ui else [])]

    def of(self, kind: str) -> list[Service]:
        """Its services of one kind, in the order in which they were added."""
        return [one for one in self.services if one.kind == kind]

    async def connect(self, namespace: str = "default", **options: Any) -> Client:
        """A client of its own; where tokens are asked for it has all permissions unless `api_key` says otherwise.

        `rpc_metadata={"xdc-redirection": "false"}` shows what a standby itself holds.
        """
        if self.access is not None:
            options = {"api_key": self.access.token("temporal-system:admin"), "tls": False} | options
        return await connect(Target(self.address, namespace), **options)

    async def start(self, seconds: float = 60) -> float:
        """Start all that does not run, and wait until workflows can be started. Returns the seconds it took."""
        begun = time.monotonic()
        if not self.database.alive:
            await self.database.start(seconds)
            # Members of an earlier life, or of the cluster that this is a copy of, would be called for help.
            await self.database.query("DELETE FROM cluster_membership")
        self._write_settings()
        first, *rest = [one for one in self.services if not one.alive] or [self.services[0]]
        if not first.alive:
            await first.start(seconds)  # alone: on an empty database the others would lose a race and exit
        await together(*(one.start(seconds) for one in rest))
        await self.ready(seconds)
        if self.ui and not self.ui.alive:
            await self.ui.start(seconds)
        return time.monotonic() - begun

    async def ready(self, seconds: float = 60) -> float:
        """Wait until history, matching and the database answer real calls and a workflow task is handed out.

        Returns the seconds it took; raises Ended when a process is not there any more.
        """
        begun = time.monotonic()
        checks: list[tuple[str, Callable[[], Awaitable[bool]]]] = [
            ("its frontend answers", self._has_namespace),
            ("history says that a missing workflow is missing", self._knows_what_is_missing),
            ("matching describes a task queue", self._describes_queue),
            ("every shard has an owner", self._shards_are_owned),
            ("a workflow starts and its task is handed out", self._hands_out_a_task),
        ]
        for what, check in checks:
            await self._until(f"in region {self.name} {what}", check, seconds)
        return time.monotonic() - begun

    async def add(self, kind: str) -> Service:
        """Start one more process of a kind. It joins within a second or two, and work moves to it."""
        service = self._service(kind, 1 + len(self.of(kind)))
        self.services.append(service)
        await service.start()
        return service

    def kill(self) -> None:
        """SIGKILL of everything at once: the region is gone until start()."""
        for one in self.processes:
            if one.alive:
                os.kill(one.pid, signal.SIGSTOP)  # none of them sees another one go
        for one in self.processes:
            one.kill()

    async def shard_owners(self) -> dict[str, list[int]]:
        """Which shards each history process owns, as the database has it. One that was killed owns them until others
        have taken them over; a process not of this region is named by its address."""
        names = {f"127.0.0.1:{port}": one.name for one in self.of("history") for port in one.ports.values()}
        owner = "substring(encode(data, 'escape') FROM '127[.]0[.]0[.]1:[0-9]+')"
        owners: dict[str, list[int]] = {one.name: [] for one in self.of("history")}
        for address, shard in await self.database.query(f"SELECT {owner}, shard_id FROM shards ORDER BY shard_id"):
            owners.setdefault(names.get(address, address), []).append(int(shard))
        return owners

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Change dynamic configuration; the services read it within 5 s, the shortest interval they take."""
        self.settings |= settings
        self._write_settings()

    def config(self, service: Service) -> dict[str, Any]:
        """The configuration of one of its services."""
        kinds = [*KINDS, *(["internal-frontend"] if self.access else [])]
        ports = {kind: dict(self.of(kind)[0].ports if self.of(kind) else service.ports) for kind in kinds}
        ports[service.kind] = dict(service.ports)
        metrics = ports[service.kind].pop("metricsPort")
        for each in ports.values():
            each.pop("metricsPort", None)
        glob: dict[str, Any] = {
            "membership": {"maxJoinDuration": "30s", "broadcastAddress": "127.0.0.1"},
            "metrics": {"prometheus": {"timerType": "histogram", "listenAddress": f"127.0.0.1:{metrics}"}},
        }
        config: dict[str, Any] = {
            "log": {"stdout": True, "level": "warn"},
            "persistence": self._persistence(),
            "global": glob,
            "services": {kind: {"rpc": each | {"bindOnLocalHost": True}} for kind, each in ports.items()},
            "clusterMetadata": self._metadata(),
            "dcRedirectionPolicy": {"policy": "all-apis-forwarding" if self.cluster.paired else "noop"},
            "dynamicConfigClient": {"filepath": str(self._settings_file), "pollInterval": "5s"},
        }
        if self.access is not None:
            glob["authorization"] = self.access.config()
        return config | self._archival()

    def _service(self, kind: str, number: int, port: int | None = None) -> Service:
        environment = self.archive.environment if self.archive else {}
        return Service(f"{self.name}-{kind}-{number}", kind, self.place, self.config, environment, port)

    @property
    def _settings_file(self) -> Path:
        return self.place.folder / f"{self.name}-dynamic.yaml"

    def _write_settings(self) -> None:
        every = {key: [{"value": value}] for key, value in (self.cluster.settings | self.settings).items()}
        new = self._settings_file.with_suffix(".new")
        new.write_text(json.dumps(every), encoding="utf-8")
        new.replace(self._settings_file)

    def _persistence(self) -> dict[str, Any]:
        sql = {"pluginName": "postgres12", "connectAddr": self.database.address, "connectProtocol": "tcp"}
        sql |= {"user": "temporal", "password": self.database.password}
        stores = {
            "main": {"sql": sql | {"databaseName": "temporal", "maxConns": 20, "maxIdleConns": 20}},
            "visibility": {"sql": sql | {"databaseName": "temporal_visibility", "maxConns": 10, "maxIdleConns": 10}},
        }
        names = {"defaultStore": "main", "visibilityStore": "visibility"}
        return {**names, "numHistoryShards": self.cluster.shards, "datastores": stores | self.cluster.stores}

    def _metadata(self) -> dict[str, Any]:
        version = 1 + [one.name for one in self.cluster.regions].index(self.name)
        own = {"enabled": True, "initialFailoverVersion": version, "rpcName": "frontend", "rpcAddress": self.address}
        return {
            "enableGlobalNamespace": self.cluster.paired,
            "failoverVersionIncrement": 100,
            "masterClusterName": self.name,
            "currentClusterName": self.name,
            "clusterInformation": {self.name: own},
        }

    def _archival(self) -> dict[str, Any]:
        if self.archive is None:
            return {}
        one = {"state": "enabled", "enableRead": True, "provider": self.archive.provider()}
        default = {"state": "enabled", "URI": self.archive.uri}
        return {
            "archival": {"history": one, "visibility": one},
            "namespaceDefaults": {"archival": {"history": default, "visibility": default}},
        }

    async def _until(self, what: str, check: Callable[[], Awaitable[bool]], seconds: float) -> None:
        """Wait until a check holds. Where it never does, the TimeoutError says what refused it last."""
        trouble = "no error"

        async def tried() -> bool:
            nonlocal trouble
            for one in self.services:
                one.check()
            try:
                async with asyncio.timeout(5):
                    self._client = self._client or await self.connect()
                    return await check()
            except (RPCError, Failed, TimeoutError, RuntimeError) as error:
                known = isinstance(error, RPCError | Failed | TimeoutError) or str(error).startswith("Failed client")
                if not known:
                    raise
                trouble = f"{type(error).__name__} {error}"
            return False

        try:
            await until(tried, what, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error} ({redacted(trouble)[:300]})") from None

    async def _has_namespace(self) -> bool:
        request = RegisterNamespaceRequest(namespace="default")
        request.workflow_execution_retention_period.FromTimedelta(timedelta(days=1))
        try:
            await self.client.workflow_service.register_namespace(request)
        except RPCError as error:
            if error.status != RPCStatusCode.ALREADY_EXISTS:
                raise
        return True

    async def _knows_what_is_missing(self) -> bool:
        missing = WorkflowExecution(workflow_id=f"missing-{secrets.token_hex(4)}")
        request = DescribeWorkflowExecutionRequest(namespace="default", execution=missing)
        try:
            await self.client.workflow_service.describe_workflow_execution(request)
        except RPCError as error:
            return error.status == RPCStatusCode.NOT_FOUND and "namespace" not in error.message.lower()
        return False

    async def _describes_queue(self) -> bool:
        kind = TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW
        queue = TaskQueue(name="readiness")
        request = DescribeTaskQueueRequest(namespace="default", task_queue=queue, task_queue_type=kind)
        await self.client.workflow_service.describe_task_queue(request)
        return True

    async def _shards_are_owned(self) -> bool:
        owners = await self.shard_owners()
        ours = [shard for one in self.of("history") if one.alive for shard in owners[one.name]]
        return "main" in self.cluster.stores or len(ours) == self.cluster.shards

    async def _hands_out_a_task(self) -> bool:
        """Start a workflow, take its first task as a worker would, and delete it again."""
        name, kind = f"readiness-{secrets.token_hex(4)}", TaskQueueKind.TASK_QUEUE_KIND_NORMAL
        service, queue = self.client.workflow_service, TaskQueue(name=name, kind=kind)
        started = StartWorkflowExecutionRequest(
            namespace="default", workflow_id=name, request_id=name,
            workflow_type=WorkflowType(name="Readiness"), task_queue=queue,
        )  # fmt: skip
        run = await service.start_workflow_execution(started)
        poll = PollWorkflowTaskQueueRequest(namespace="default", task_queue=queue, identity="readiness")
        task = await service.poll_workflow_task_queue(poll)
        execution = WorkflowExecution(workflow_id=name, run_id=run.run_id)
        done = DeleteWorkflowExecutionRequest(namespace="default", workflow_execution=execution)
        await service.delete_workflow_execution(done)
        return task.workflow_execution.run_id == run.run_id


# 3. Cluster ------------------------------------------------------------------------------------------

# Found at once instead of within minutes; a test waits for these and learns nothing from the waiting.
PAIRED = {"system.clusterMetadataRefreshInterval": "1s", "system.namespaceMinRetentionGlobal": "1s"}
ARCHIVED = {
    "history.archivalProcessorArchiveDelay": "1s",
    "history.retentionTimerJitterDuration": "100ms",
    "system.namespaceMinRetentionLocal": "1s",
}


class Cluster:
    """One region, or two that replicate to each other, for `async with`.

    `services`: processes a kind, one each unless said otherwise. `archive`: closed runs go to a bucket ("s3") or to
    files. `access`: tokens are asked for. `ui`: with a Web UI. `keep`: the data stays in this folder and is found
    there again. `restore`: begin with a backup instead of an empty database. `port`: of region a's frontend.
    `settings`: dynamic configuration of all services. `stores`: where histories ("main") and visibility are kept
    instead of in PostgreSQL, as the server's configuration names it. Raises NotRun where nothing is prepared.
    """

    def __init__(
        self,
        *,
        regions: int = 1,
        services: Mapping[str, int] | None = None,
        shards: int | None = None,
        archive: Literal["s3", "files"] | None = None,
        access: bool = False,
        ui: bool = False,
        keep: Path | None = None,
        restore: Path | None = None,
        port: int | None = None,
        settings: Mapping[str, Any] | None = None,
        server: str | None = None,
        stores: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.programs = find_programs(server)
        self.stores = dict(stores or {})
        self.paired, self.with_ui = regions > 1, ui and not access and self.programs.ui is not None
        self.counts = dict.fromkeys(KINDS, 1) | dict(services or {}) | ({"internal-frontend": 1} if access else {})
        self.settings: dict[str, Any] = PAIRED if self.paired else {}
        self.settings |= (ARCHIVED if archive else {}) | dict(settings or {})
        self._wanted = {"regions": regions, "shards": shards}
        self._archive_kind, self._with_access = archive, access
        self._keep, self._restore, self._port = keep, restore, port
        self.shards = shards or 4
        self.regions: list[Region] = []
        self.archive: Archive | None = None
        self.access: Access | None = None
        self._lock = contextlib.ExitStack()

    @property
    def region(self) -> Region:
        """The first region, a."""
        return self.regions[0]

    @property
    def address(self) -> str:
        return self.region.address

    @property
    def target(self) -> Target:
        return self.region.target

    @property
    def client(self) -> Client:
        """A client of the first region."""
        return self.region.client

    @property
    def processes(self) -> list[Process]:
        """Every process of the cluster."""
        bucket = [self.archive] if isinstance(self.archive, Bucket) else []
        return [one for region in self.regions for one in region.processes] + bucket

    async def __aenter__(self) -> "Cluster":
        empty = await empty_database(self.programs)
        self.place = Place.new(self.programs)
        try:
            await self._open(empty)
        except BaseException:
            self._end()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End everything. Data that is kept is written out first; other data needs no goodbye."""
        try:
            if self._keep:
                services = [one for region in self.regions for one in region.services if one.alive]
                await asyncio.gather(*(one.stop(10) for one in services), return_exceptions=True)
                await asyncio.gather(*(region.database.stop(20) for region in self.regions), return_exceptions=True)
        finally:
            self._end()

    async def _open(self, empty: Path) -> None:
        if self._archive_kind == "s3":
            self.archive = Bucket(self.place)
        elif self._archive_kind == "files":
            self.archive = Archive((self._keep or self.place.folder) / "archive")
        self.access = Access(self.place.folder) if self._with_access else None
        kept = self._open_kept()
        ports = dict(kept.get("ports", {}))
        ports |= {"a-frontend-1": self._port} if self._port else {}
        ports = {name: port for name, port in ports.items() if port_is_free(port) or port == self._port}
        names = "ab"[: self._wanted["regions"]]
        parts: list[Coroutine[Any, Any, object]] = [
            in_thread(self._lay_out, name, self._restore or empty) for name in names
        ]
        parts += [self.archive.start()] if isinstance(self.archive, Bucket) else []
        await together(*parts)
        self.regions += [Region(name, self, self._folder(name), ports) for name in names]
        await together(*(region.start() for region in self.regions))
        if self.paired:
            await self._pair()
        if self._keep:
            self._note_kept()

    def _end(self) -> None:
        for region in self.regions:
            region.kill()
        self.place.close()
        self._lock.close()

    def _folder(self, name: str) -> Path:
        """Where a region's database is."""
        return (self._keep or self.place.folder) / f"region-{name}"

    def _lay_out(self, name: str, origin: Path) -> None:
        """Copy the files of `origin` for a region's database, unless it was kept from an earlier start."""
        folder = self._folder(name)
        if not (folder / "data" / "PG_VERSION").exists():
            making = folder.with_suffix(".making")
            shutil.rmtree(making, ignore_errors=True)
            shutil.copytree(origin, making, ignore=shutil.ignore_patterns(SIZES))
            making.rename(folder)
        self.place.give(folder)

    def _open_kept(self) -> dict[str, Any]:
        """What was noted at the last start from the folder that is kept. Raises Unusable where it does not fit."""
        if self._keep is None:
            return {}
        self._keep = self._keep.absolute()
        try:
            self._keep.mkdir(mode=0o711, parents=True, exist_ok=True)
            lock = self._lock.enter_context((self._keep / "lock").open("w"))
        except OSError as error:
            raise Unusable(f"--keep {self._keep} cannot be written ({error.strerror}): name another folder.") from None
        if not lock_file(lock.fileno()):
            raise Unusable(f"--keep {self._keep} is in use by another cluster: end that one, or name another folder.")
        if self.place.user is not None and not may_enter(self._keep):
            raise Unusable(
                f"PostgreSQL refuses to run as root, and the user {self.place.user.pw_name} cannot enter {self._keep}: "
                "name a folder for --keep that everybody may enter, or run this as another user."
            )
        if not (self._keep / "cluster.json").exists():
            return {}
        kept: dict[str, Any] = json.loads((self._keep / "cluster.json").read_text(encoding="utf-8"))
        for name, wanted in self._wanted.items():
            if wanted not in (None, kept[name]):
                raise Unusable(
                    f"{self._keep} holds a cluster with --{name} {kept[name]}, which stays so: leave it out."
                )
        self.shards = kept["shards"]
        return kept

    def _note_kept(self) -> None:
        assert self._keep
        ports = {one.name: one.ports["grpcPort"] for region in self.regions for one in region.of("frontend")}
        ports |= {region.ui.name: region.ui.port for region in self.regions if region.ui}
        noted = {"regions": len(self.regions), "shards": self.shards, "ports": ports}
        (self._keep / "cluster.json").write_text(json.dumps(noted), encoding="utf-8")

    async def _pair(self, seconds: float = 60) -> None:
        """Let each region know the other, and wait until both do."""
        for one, other in (self.regions, self.regions[::-1]):
            request = AddOrUpdateRemoteClusterRequest(
                frontend_address=other.address, enable_remote_cluster_connection=True, enable_replication=True
            )

            async def upsert(one: Region = one, request: AddOrUpdateRemoteClusterRequest = request) -> bool:
                try:
                    await one.client.operator_service.add_or_update_remote_cluster(request)
                except RPCError:
                    return False
                return True

            await until(upsert, f"region {one.name} accepts {other.name}", seconds)

    async def global_namespace(self, name: str, active: str = "a", retention: timedelta = timedelta(days=1)) -> None:
        """Make a namespace that lives in both regions, and wait until both show it."""
        clusters = [ClusterReplicationConfig(cluster_name=region.name) for region in self.regions]
        request = RegisterNamespaceRequest(
            namespace=name, is_global_namespace=True, clusters=clusters, active_cluster_name=active
        )
        request.workflow_execution_retention_period.FromTimedelta(retention)
        at = next(region for region in self.regions if region.name == active)

        async def made() -> bool:
            try:
                await at.client.workflow_service.register_namespace(request)
            except RPCError as error:
                return error.status == RPCStatusCode.ALREADY_EXISTS  # refused while the other region is not known yet
            return True

        await until(made, f"region {active} makes the namespace {name}")
        for region in self.regions:
            await until(lambda region=region: self.active_region(name, region), f"{name} is in region {region.name}")  # type: ignore[misc]

    async def active_region(self, namespace: str, asked: Region) -> str | None:
        """Which region a namespace is active in, as `asked` has it; None where it does not know it (yet)."""
        try:
            request = DescribeNamespaceRequest(namespace=namespace)
            found = await asked.client.workflow_service.describe_namespace(request)
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return None
        return found.replication_config.active_cluster_name

    async def fail_over(self, namespace: str, to: Region) -> float:
        """Make a namespace active in `to`, which is asked itself: the other one may be gone. Returns the seconds."""
        begun = time.monotonic()
        config = NamespaceReplicationConfig(active_cluster_name=to.name)
        request = UpdateNamespaceRequest(namespace=namespace, replication_config=config)
        await to.client.workflow_service.update_namespace(request)
        return time.monotonic() - begun

    def rotate_key(self) -> None:
        """Replace the key that tokens are signed with; the clients of the regions get tokens of the new one."""
        assert self.access, "this cluster asks for no tokens"
        self.access.rotate()
        for region in self.regions:
            region.client.api_key = self.access.token("temporal-system:admin")


# 4. The command line ---------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises Unusable where options contradict each other."""
    parser = argparse.ArgumentParser(description="A real Temporal cluster on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare", help="build the server once, into the user's cache folder")
    one.add_argument("--server", default=SERVER, metavar="VERSION", help=f"another server than {SERVER}")
    one.add_argument("--keep-build", action="store_true", help="keep 3 GB with which another build is quick")
    one.add_argument("--with", dest="systems", default="", metavar="NAME,...", help=f"also {', '.join(SYSTEMS)}")
    two = commands.add_parser("up", help="start a cluster, until Ctrl-C")
    two.add_argument("--regions", type=int, default=1, help="1, or 2 that replicate to each other")
    two.add_argument("--services", default="", metavar="KIND=N,...", help="such as history=2,matching=2")
    two.add_argument("--shards", type=int, help="history shards (default: 4)")
    two.add_argument("--archive", metavar="s3|files", help="where closed runs go")
    two.add_argument("--access", action="store_true", help="ask for tokens")
    two.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the data there and find it again")
    two.add_argument("--port", type=int, help="of region a's frontend")
    options = parser.parse_args(arguments)
    if options.command == "prepare":
        options.systems = chosen(options.systems)
    if options.command == "up":
        options.services = parse_services(options.services)
        check_options(options)
    elif not re.fullmatch(r"\d+\.\d+\.\d+", options.server):
        raise Unusable(f"--server must be a version such as {SERVER}, not {options.server!r}.")
    return options


def parse_services(text: str) -> dict[str, int]:
    """`history=2,matching=2` as numbers by kind. Raises Unusable."""
    counts: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        kind, _, count = part.partition("=")
        if kind not in KINDS or not re.fullmatch(r"[1-9]", count):
            raise Unusable(f"--services must be KIND=1 to 9 of {', '.join(KINDS)}, not {part!r}.")
        counts[kind] = int(count)
    return counts


def check_options(options: argparse.Namespace) -> None:
    """Raise Unusable for what cannot be, before anything runs."""
    if options.regions not in (1, 2):
        raise Unusable(f"--regions must be 1 or 2, not {options.regions}.")
    if options.archive not in (None, "s3", "files"):
        raise Unusable(f"--archive must be s3 or files, not {options.archive!r}.")
    if options.shards is not None and not 1 <= options.shards <= 512:
        raise Unusable(f"--shards must be from 1 to 512, not {options.shards}.")
    if options.access and options.regions == 2:
        raise Unusable("--access and --regions 2 do not go together: regions replicate without tokens.")
    if options.keep and options.archive == "s3":
        raise Unusable("--keep and --archive s3 do not go together: the bucket is in memory. Take --archive files.")
    if options.port is not None:
        if not 1 <= options.port <= 65535:
            raise Unusable(f"Port {options.port} does not exist: choose one from 1024 to 65535.")
        if not port_is_free(options.port):
            raise Unusable(f"Port {options.port} is taken or not allowed: choose another --port, or leave it out.")


async def run_prepare(options: argparse.Namespace, console: Console) -> int:
    """The command prepare."""
    progress, begun = Progress(console), time.monotonic()
    try:
        programs = await prepare(options.server, progress.show, options.keep_build, builds_for(options.systems))
        lines = await prepare_systems(options.systems, progress.show)
    except (RuntimeError, OSError) as error:
        raise Unusable(f"It cannot be prepared: {explain_build(str(error), cache())}") from None
    finally:
        progress.close()
    took = f"{time.monotonic() - begun:.0f} s"
    console.print(
        f"Temporal server {programs.version} is prepared in {cache()} ({took})", *lines, sep="\n", soft_wrap=True
    )
    console.print("Start it with: uv run cluster.py up", soft_wrap=True)
    return 0


async def run_up(options: argparse.Namespace, console: Console) -> int:
    """The command up: a cluster until this is cancelled."""
    begun = time.monotonic()
    given = {name: value for name, value in vars(options).items() if name != "command"}
    try:
        cluster = Cluster(**given, ui=True)
        async with cluster:
            lines = describe(cluster, await asyncio.to_thread(lambda: cluster.programs.version))
            took = time.monotonic() - begun
            console.print(f"{lines[0]}, ready after {took:.1f} s", *lines[1:], sep="\n", soft_wrap=True)
            known = {process.name for process in cluster.processes}
            while True:
                await asyncio.sleep(0.5)
                for process in cluster.processes:
                    if process.name in known and not process.alive:
                        known.discard(process.name)
                        console.print(f"{process.name} has ended: {process.said()[-300:]}", soft_wrap=True)
    except NotRun as error:
        raise Unusable(f"{error}.") from None
    except BrokenPipeError:
        raise
    except (RuntimeError, OSError) as error:
        full = "No space left" in str(error) and "the disk is full. Free some, or set TMPDIR to a folder with room."
        raise Unusable(f"The cluster does not run: {full or redacted(str(error))[:600]}") from None


def describe(cluster: Cluster, version: str) -> list[str]:
    """What runs where, and how to use it. Shows no token: where one is needed it stands in a file."""
    lines = [f"Temporal server {version}, {cluster.shards} history shards a region", ""]
    for region in cluster.regions:
        for process in region.services:
            lines.append(f"{process.name:<22} {process.address:<17} process {process.pid}")
        lines.append(f"{region.database.name:<22} {region.database.address:<17} process {region.database.pid}")
        if region.ui:
            lines.append(f"{region.ui.name:<22} {region.ui.url}")
    if isinstance(cluster.archive, Bucket):
        lines.append(f"{'bucket':<22} {cluster.archive.url}/{Bucket.NAME}")
    elif cluster.archive:
        lines.append(f"{'archive':<22} {cluster.archive.folder}")
    settings = [f"TEMPORAL_ADDRESS={cluster.address}", "TEMPORAL_NAMESPACE=default"]
    if not cluster.access:
        return [*lines, "", "For .env:", *settings, "", "Ctrl-C ends it."]
    file = cluster.place.folder / "env"
    file.touch(0o600)
    token = cluster.access.token("temporal-system:admin")
    file.write_text("\n".join([*settings, "TEMPORAL_TLS=false", f"TEMPORAL_API_KEY={token}", ""]), encoding="utf-8")
    made = "The token in it was made for this cluster alone, permits everything there, and ends with it."
    no_ui = "There is no Web UI where tokens are asked for: it would need a provider of logins."
    return [*lines, "", f"For .env: cp {file} .env", made, no_ui, "", "Ctrl-C ends it."]


async def _main(options: argparse.Namespace) -> NoReturn:
    """Run the command until it is done or a signal comes; leave nothing behind either way."""
    stopped = stop_signals()
    console = make_console()
    command = run_prepare if options.command == "prepare" else run_up
    work = asyncio.create_task(command(options, console))
    code = 1
    try:
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
            name = signal.Signals(stopped.result()).name
            print(f"{name}: stopped, every process ended", file=sys.stderr)
            code = 128 + stopped.result()
        else:
            code = work.result()
    except Unusable as error:
        code = refuse(error)
    except BrokenPipeError:
        sys.stdout = devnull()  # what is still buffered for the closed pipe is lost
        code = 128 + signal.SIGPIPE
    except Exception:
        traceback.print_exc()
    leave(code)


def main() -> NoReturn:
    """The main of this file. Exit status: 0, 2 for what cannot be used, 128 plus the signal that ended it."""
    try:
        load_settings()
        options = parse(sys.argv[1:])
        asyncio.run(_main(options))
    except Unusable as error:
        leave(refuse(error))
    raise AssertionError("_main ends the process")


if __name__ == "__main__":
    main()
