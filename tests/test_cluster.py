"""The cluster on this machine: it starts, is hurt and moves its work, leaves nothing, and refuses in one sentence.

What needs the prepared programs is skipped where `uv run cluster.py prepare` was not run.
"""

from cluster import Cluster, parse_services
from common import NotRun, Target, Unusable, connect
from harness.services import BUILD_TROUBLE, KINDS, SERVER, SIZES, check_space, explain_build, find_programs, is_whole
from lab import free_port, make_worker, note, notes, until

import asyncio
import fcntl
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import ROOT, environment, run
from temporalio import activity, workflow
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest, RegisterNamespaceRequest
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import UnsandboxedWorkflowRunner, Worker
from test_processes import TAG, tagged, wait_for

pytestmark = pytest.mark.all

COMMAND = ROOT / "cluster.py"


@pytest.fixture(scope="session", autouse=True)
def _no_settings() -> None:
    """The settings of whoever runs the tests must not decide how they end."""
    for name in [name for name in os.environ if name.startswith("TEMPORAL_")]:
        del os.environ[name]


@pytest.fixture(scope="session")
def prepared() -> None:
    """Skip where nothing was prepared."""
    try:
        find_programs()
    except NotRun as error:
        pytest.skip(str(error))


def refused(*arguments: str | Path, **env: str) -> str:
    """Run cluster.py, which must refuse in one sentence on stderr with status 2. Returns the sentence."""
    done = run(COMMAND, *arguments, env=env)
    assert done.returncode == 2, done.stdout + done.stderr
    sentence = done.stderr.strip()
    assert len(sentence.splitlines()) == 1, sentence
    assert "Traceback" not in sentence
    return sentence


# Bad input, without any build ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["up", "--regions", "3"], "--regions must be 1 or 2"),
        (["up", "--archive", "tape"], "--archive must be s3 or files"),
        (["up", "--services", "history=0"], "KIND=1 to 9 of frontend, history, matching, worker"),
        (["up", "--services", "kafka=1"], "not 'kafka=1'"),
        (["up", "--shards", "0"], "--shards must be from 1 to 512"),
        (["up", "--access", "--regions", "2"], "do not go together"),
        (["up", "--keep", "x", "--archive", "s3"], "Take --archive files"),
        (["up", "--port", "70000"], "Port 70000 does not exist"),
        (["prepare", "--server", "latest"], "--server must be a version"),
    ],
)
def test_options_that_cannot_be(arguments: list[str], words: str) -> None:
    assert words in refused(*arguments)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert f"Port {port} is taken" in refused("up", "--port", str(port))


def test_nothing_prepared(tmp_path: Path) -> None:
    sentence = refused("up", XDG_CACHE_HOME=str(tmp_path))
    assert "is not prepared: `uv run cluster.py prepare` builds it" in sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["up", "prepare"])
def test_a_server_path_without_a_server(tmp_path: Path, command: str) -> None:
    (tmp_path / "temporal-server").write_text("not executable")
    env = {"TEMPORAL_SERVER_PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert "no temporal-server can be executed" in refused(command, **env)


def test_neither_uv_nor_go(tmp_path: Path) -> None:
    sentence = refused("prepare", XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path), UV="")
    assert "neither uv, which fetches it, nor go" in sentence
    assert left(tmp_path) == ["lock"]


def test_no_network(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    sentence = refused("prepare", XDG_CACHE_HOME=str(tmp_path), GOPROXY=f"http://127.0.0.1:{port}")
    assert "cannot be reached. Run it again when it can" in sentence
    assert left(tmp_path) == ["go", "lock"]


class Garbage(http.server.BaseHTTPRequestHandler):
    """A module registry whose every archive is broken."""

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        version, _, kind = name.rpartition(".")
        told = {"info": json.dumps({"Version": version}), "mod": "module " + self.path[1:].split("/@v/")[0]}
        self.send_response(200 if kind in ("info", "mod", "zip") else 404)
        self.end_headers()
        self.wfile.write(told.get(kind, "garbage").encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_broken_download(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Garbage) as registry:
        threading.Thread(target=registry.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{registry.server_port}"
        sentence = refused("prepare", XDG_CACHE_HOME=str(tmp_path), GOPROXY=url, GOSUMDB="off", GOTOOLCHAIN="local")
        registry.shutdown()
    assert "a download arrived broken" in sentence
    assert left(tmp_path) == ["go", "lock"]


def test_no_space(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="There is no space to build the server"):
        check_space(tmp_path, 1e18)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written" in refused("prepare", XDG_CACHE_HOME=str(tmp_path))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("write /x/server: no space left on device", "the disk is full"),
        ("verifying module: checksum mismatch\nSECURITY ERROR", "arrived broken"),
        ("dial tcp: lookup registry: no such host", "cannot be reached"),
        ("compile: signal: killed", "not enough memory"),
        ("go: unknown revision v9.9.9", "no such version"),
        ("server response: This module version is not available.", "no such version"),
        ("line one\nsomething else", "something else."),
        ("", "it said nothing."),
    ],
)
def test_what_a_failed_build_says(said: str, words: str) -> None:
    assert words in explain_build(said, Path("/cache"))
    assert len(explain_build(said, Path("/cache")).splitlines()) == 1


def test_every_meaning_can_be_met() -> None:
    texts = ["quota", "unexpected EOF", "dial tcp", "signal: killed", "unknown revision"]
    for (pattern, _), text in zip(BUILD_TROUBLE, texts, strict=True):
        assert re.search(pattern, "disk " + text), pattern


def test_a_half_built_cache_is_none(tmp_path: Path) -> None:
    """A folder without its list of sizes, or with a file shorter than listed, counts as not there."""
    whole = {"server": 7}
    (tmp_path / "server").write_text("program")
    assert not is_whole(tmp_path)
    (tmp_path / SIZES).write_text(json.dumps(whole))
    assert is_whole(tmp_path)
    (tmp_path / "server").write_text("prog")
    assert not is_whole(tmp_path)
    (tmp_path / SIZES).write_text("{")
    assert not is_whole(tmp_path)


def test_services_as_numbers() -> None:
    assert parse_services("history=2,matching=3") == {"history": 2, "matching": 3}
    assert parse_services("") == {}


def left(cache: Path) -> list[str]:
    """What a prepare left in the cache of a test."""
    folder = cache / "temporal-example"
    return sorted(one.name for one in folder.iterdir()) if folder.exists() else []


def test_two_prepares_wait_for_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "temporal-example"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        env = environment(XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path), UV="")
        process = subprocess.Popen([sys.executable, COMMAND, "prepare"], env=env, text=True, stdout=-1, stderr=-1)
        assert process.stdout
        assert "another process is preparing" in process.stdout.readline()
        assert process.poll() is None
    _, err = process.communicate(timeout=60)
    assert "neither uv" in err  # it went on, and came as far as it could


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_prepare_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """The module registry never answers, so that the signal meets Go at work."""
    tag = uuid.uuid4().hex
    with socket.create_server(("127.0.0.1", 0)) as registry:
        env = environment(
            **{TAG: tag, "XDG_CACHE_HOME": str(tmp_path), "GOPROXY": f"http://127.0.0.1:{registry.getsockname()[1]}"}
        )
        process = subprocess.Popen([sys.executable, COMMAND, "prepare"], env=env, stdout=-1, stderr=-1, text=True)
        registry.settimeout(60)
        asked, _ = registry.accept()
        with asked:
            assert any(name.startswith("making-") for name in left(tmp_path))
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in err
    wait_for(lambda: tagged(tag) == [], "every process has ended")
    wait_for(lambda: left(tmp_path) == ["go", "lock"], "what was half made is gone")


# With the prepared programs --------------------------------------------------------------------------


class Up:
    """`cluster.py up` as a user runs it."""

    def __init__(self, tmp_path: Path, *arguments: str | Path, **env: str) -> None:
        self.tag = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, str(COMMAND), "up", *map(str, arguments)],
            env=environment(**{TAG: self.tag} | env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("Ctrl-C ends it"):
                return
        raise AssertionError(f"it did not start: {self.process.communicate()[1]}")

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def setting(self, name: str) -> str:
        return next(line.partition("=")[2] for line in self.lines if line.startswith(name))

    def end(self, number: int = signal.SIGINT) -> tuple[int, str]:
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_up_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    up = Up(tmp_path)
    running = tagged(up.tag)
    for kind in ("frontend", "history", "matching", "worker"):
        assert len([line for line in running if line.endswith(f"--service {kind}")]) == 1, running
        assert f"a-{kind}-1" in up.text
    assert any("postgres" in line for line in running)
    folder = Path(next(part for line in running for part in line.split() if part.endswith(".yaml"))).parent

    async def answers() -> bool:
        client = await connect(Target(up.setting("TEMPORAL_ADDRESS"), up.setting("TEMPORAL_NAMESPACE")))
        await client.start_workflow("Any", id="any", task_queue="any")
        return [one.id async for one in client.list_workflows("WorkflowId = 'any'")] in ([], ["any"])

    assert asyncio.run(answers())
    code, err = up.end(number)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in err
    wait_for(lambda: tagged(up.tag) == [], "every process has ended", 20)
    wait_for(lambda: not folder.exists(), "the folder is gone", 20)


@pytest.mark.usefixtures("prepared")
def test_ten_starts_in_a_row(tmp_path: Path) -> None:
    for _ in range(10):
        up = Up(tmp_path, "--services", "history=2,matching=2")
        assert up.end()[0] == 130
        wait_for(lambda up=up: tagged(up.tag) == [], "every process has ended", 20)  # type: ignore[misc]


@pytest.mark.usefixtures("prepared")
def test_official_binaries_by_their_own_names(tmp_path: Path) -> None:
    """With a cache that holds nothing, and so without a Web UI."""
    found = find_programs()
    (tmp_path / "official").mkdir()
    (tmp_path / "official" / "temporal-server").symlink_to(found.server)
    (tmp_path / "official" / "temporal-sql-tool").symlink_to(found.sql)
    env = {"TEMPORAL_SERVER_PATH": str(tmp_path / "official"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    up = Up(tmp_path, **env)
    assert "a-ui" not in up.text
    assert up.end()[0] == 130
    assert [name for name in left(tmp_path / "cache") if name != "lock"] == [f"database-{SERVER}-postgres-18-6"]


@pytest.mark.usefixtures("prepared")
def test_a_port_that_is_asked_for(tmp_path: Path) -> None:
    port = free_port()
    up = Up(tmp_path, "--port", str(port))
    assert up.setting("TEMPORAL_ADDRESS") == f"127.0.0.1:{port}"
    assert f"Port {port} is taken" in refused("up", "--port", str(port))
    assert up.end()[0] == 130


@pytest.mark.usefixtures("prepared")
def test_what_is_kept_is_found_again() -> None:
    folder = Path("/var/tmp") / f"temporal-example-kept-{uuid.uuid4().hex[:8]}"
    try:
        up = Up(folder, "--keep", folder)
        address = up.setting("TEMPORAL_ADDRESS")
        asyncio.run(_start(address, "kept"))
        assert "is in use by another cluster" in refused("up", "--keep", folder)
        assert up.end(signal.SIGKILL)[0] == -signal.SIGKILL  # the database recovers as after a crash
        wait_for(lambda: tagged(up.tag) == [], "every process has ended", 20)
        assert "holds a cluster with --shards 4" in refused("up", "--keep", folder, "--shards", "8")
        up = Up(folder, "--keep", folder)
        assert up.setting("TEMPORAL_ADDRESS") == address
        assert asyncio.run(_status(address, "kept")) == WorkflowExecutionStatus.RUNNING
        assert up.end()[0] == 130
        assert tagged(up.tag) == []
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)


async def _start(address: str, id: str) -> None:
    await (await connect(Target(address))).start_workflow("Any", id=id, task_queue="any")


async def _status(address: str, id: str) -> WorkflowExecutionStatus | None:
    return (await (await connect(Target(address))).get_workflow_handle(id).describe()).status


@pytest.mark.usefixtures("prepared")
@pytest.mark.skipif(os.geteuid() != 0, reason="PostgreSQL refuses root alone")
def test_a_folder_that_postgresql_cannot_enter(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert "PostgreSQL refuses to run as root" in refused("up", "--keep", tmp_path / "kept")


@pytest.mark.usefixtures("prepared")
def test_tokens_stand_in_a_file_alone(tmp_path: Path) -> None:
    up = Up(tmp_path, "--access")
    file = Path(next(line.split()[3] for line in up.lines if line.startswith("For .env: cp ")))
    token = file.read_text().partition("TEMPORAL_API_KEY=")[2].strip()
    assert file.stat().st_mode & 0o077 == 0
    assert token.count(".") == 2
    assert token not in up.text
    code, err = up.end()
    assert (code, token in err) == (130, False)
    assert not file.exists()


# As a module -----------------------------------------------------------------------------------------


@workflow.defn
class Counting:
    """Counts to five, a step an activity, and waits for a signal before it ends."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    @workflow.run
    async def run(self, ledger: str) -> list[int]:
        for number in range(5):
            step = f"{ledger} {workflow.info().workflow_id} {number}"
            await workflow.execute_activity(write, step, start_to_close_timeout=timedelta(seconds=5))
        await workflow.wait_condition(lambda: bool(self.heard))
        return self.heard

    @workflow.signal
    def hear(self, number: int) -> None:
        self.heard.append(number)


@activity.defn
async def write(step: str) -> None:
    ledger, entry = step.split(" ", 1)
    note(ledger, entry)


def worker(client: Client, task_queue: str) -> Worker:
    """Outside the sandbox, which would import this file and pytest with it for every run."""
    return make_worker(client, task_queue, [Counting], [write], workflow_runner=UnsandboxedWorkflowRunner())


async def run_through(client: Client, ledger: Path, hurt: Callable[[], Awaitable[object]], workflows: int = 10) -> None:
    """Workflows whose cluster is hurt while they run: every one ends with its signal, no step is missing."""
    queue = f"hurt-{uuid.uuid4().hex[:8]}"
    async with worker(client, queue):
        ids = [f"{queue}-{number}" for number in range(workflows)]
        start = client.start_workflow
        handles = [await start(Counting.run, str(ledger), id=id, task_queue=queue) for id in ids]
        await until(lambda: notes(str(ledger)), "the first step has run")
        await hurt()
        for number, handle in enumerate(handles):
            await patiently(lambda handle=handle, number=number: handle.signal(Counting.hear, number))  # type: ignore[misc]
        for number, handle in enumerate(handles):
            assert await patiently(lambda handle=handle: handle.result()) == [number]  # type: ignore[misc]
    assert {entry for entry in notes(str(ledger)) if entry.startswith(queue)} == {
        f"{id} {step}" for id in ids for step in range(5)
    }


async def patiently(call: Callable[[], Awaitable[Any]], seconds: float = 60) -> Any:
    """A call that is made again while the cluster is hurt."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                return await call()
            except RPCError as error:
                if error.status in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
                    raise
                await asyncio.sleep(0.2)


@pytest.mark.usefixtures("prepared")
def test_services_may_be_hurt(tmp_path: Path) -> None:
    """Each kind killed and started again, paused and resumed; so is the database."""

    async def test() -> None:
        async with Cluster(services={"history": 2}, shards=8) as cluster:
            region = cluster.region
            owners = await region.shard_owners()
            assert sorted(shard for owned in owners.values() for shard in owned) == list(range(1, 9))
            before = {one.name: one.pid for one in cluster.processes}

            async def hurt() -> None:
                for one in [*(region.of(kind)[0] for kind in ("history", "matching", "frontend")), region.database]:
                    one.kill()
                    assert not one.alive
                    await one.start()
                    one.pause()
                    await asyncio.sleep(0.3)
                    assert psutil.Process(one.pid).status() == psutil.STATUS_STOPPED
                    one.resume()
                await region.ready()

            await run_through(cluster.client, tmp_path / "hurt", hurt)
            after = {one.name: one.pid for one in cluster.processes}
            changed = {name for name, pid in after.items() if before[name] != pid}
            assert changed == {"a-history-1", "a-matching-1", "a-frontend-1", "a-database"}
            assert all(one.cpu_seconds > 0 for one in cluster.processes)

    asyncio.run(test())


@pytest.mark.usefixtures("prepared")
def test_shards_move(tmp_path: Path) -> None:
    """To a history process that joins, and away from one that is killed."""

    async def test() -> None:
        async with Cluster(shards=16) as cluster:
            region = cluster.region
            second = await region.add("history")

            async def both() -> bool:
                return all((await region.shard_owners()).values())

            await until(both, "both history processes own shards")
            first = region.of("history")[0]

            async def hurt() -> None:
                first.kill()

                async def moved() -> bool:
                    return len((await region.shard_owners())[second.name]) == 16

                await until(moved, "the second history process owns every shard")

            await run_through(cluster.client, tmp_path / "moved", hurt)

    asyncio.run(test())


@pytest.mark.usefixtures("prepared")
def test_a_rolling_restart(tmp_path: Path) -> None:
    async def test() -> None:
        async with Cluster(services=dict.fromkeys(KINDS, 2)) as cluster:

            async def hurt() -> None:
                for one in list(cluster.region.services):
                    await one.restart()

            await run_through(cluster.client, tmp_path / "rolled", hurt)

    asyncio.run(test())


@pytest.mark.usefixtures("prepared")
def test_two_regions_fail_over(tmp_path: Path) -> None:
    """All of a is killed under load; b goes on with what was replicated; a comes back as standby."""

    async def test() -> None:
        async with Cluster(regions=2) as cluster:
            a, b = cluster.regions
            await cluster.global_namespace("global", active="a")
            in_a, in_b = [await region.connect("global") for region in (a, b)]
            own = await b.connect("global", rpc_metadata={"xdc-redirection": "false"})
            handle = await in_a.start_workflow(Counting.run, str(tmp_path / "x"), id="over", task_queue="over")

            async def replicated() -> bool:
                try:
                    return (await own.get_workflow_handle(handle.id).describe()).status is not None
                except RPCError as error:
                    if error.status != RPCStatusCode.NOT_FOUND:
                        raise
                    return False

            await until(replicated, "b holds the workflow itself")
            await a.client.start_workflow("Any", id="local", task_queue="any")
            a.kill()
            assert not any(one.alive for one in a.processes)
            await cluster.fail_over("global", to=b)
            assert await cluster.active_region("global", b) == "b"
            async with worker(in_b, "over"):
                await in_b.get_workflow_handle("over").signal(Counting.hear, 7)
                assert await in_b.get_workflow_handle("over").result() == [7]
            with pytest.raises(RPCError, match="not found"):  # an ordinary namespace is gone with its region
                await b.client.get_workflow_handle("local").describe()
            await a.start()

            async def knows() -> bool:
                return await cluster.active_region("global", a) == "b"

            await until(knows, "a knows that b is active")
            await cluster.fail_over("global", to=a)
            assert await cluster.active_region("global", a) == "a"

    asyncio.run(test())


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("kind", ["s3", "files"])
def test_closed_runs_are_archived(tmp_path: Path, kind: str) -> None:
    async def test() -> None:
        async with Cluster(archive="s3" if kind == "s3" else "files") as cluster:
            assert cluster.archive
            request = RegisterNamespaceRequest(namespace="short")
            request.workflow_execution_retention_period.FromTimedelta(timedelta(seconds=2))
            await cluster.client.workflow_service.register_namespace(request)
            client = await cluster.region.connect("short")

            async def known() -> bool:
                try:
                    await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace="short"))
                    await client.start_workflow("Any", id="probe", task_queue="probe")
                except RPCError:
                    return False
                return True

            await until(known, "the namespace can be used")
            async with worker(client, "archived"):
                handle = await client.start_workflow(
                    Counting.run, str(tmp_path / "ledger"), id="archived", task_queue="archived",
                    start_signal="hear", start_signal_args=[1],
                )  # fmt: skip
                assert await handle.result() == [1]
            live = await handle.fetch_history()
            await until(lambda: archived(cluster), "something is in the archive")

            async def gone() -> bool:
                return [one.id async for one in client.list_workflows("WorkflowId = 'archived'")] == []

            await until(gone, "the run has left the database")
            run = client.get_workflow_handle("archived", run_id=handle.first_execution_run_id)
            assert len((await run.fetch_history()).events) == len(live.events)
            with pytest.raises(RPCError):
                await client.get_workflow_handle("archived").fetch_history()

    asyncio.run(test())


def archived(cluster: Cluster) -> list[str]:
    """The names of what is in the archive."""
    assert cluster.archive
    return cluster.archive.keys()


@pytest.mark.usefixtures("prepared")
def test_tokens_decide() -> None:
    async def test() -> None:
        async with Cluster(access=True) as cluster:
            access = cluster.access
            assert access

            async def start(**options: object) -> RPCStatusCode | None:
                id = uuid.uuid4().hex
                try:
                    client = await connect(cluster.target, tls=False, **options)
                    await client.start_workflow("Any", id=id, task_queue="any")
                except RPCError as error:
                    return error.status
                except RuntimeError as error:  # at connect
                    return RPCStatusCode.PERMISSION_DENIED if "PermissionDenied" in str(error) else None
                return RPCStatusCode.OK

            refused = RPCStatusCode.PERMISSION_DENIED
            assert await start(api_key=access.token("default:write")) == RPCStatusCode.OK
            assert await start(api_key=access.token("default:read")) == refused
            assert await start(api_key=access.token("other:write")) == refused
            assert await start(api_key=access.token("default:write", seconds=-60)) == refused
            assert await start(api_key=access.token("default:write", key=access.new_key())) == refused
            assert await start() == refused
            old = access.token("default:write")
            cluster.rotate_key()

            async def old_is_refused() -> bool:
                return await start(api_key=old) == refused

            await until(old_is_refused, "a token of the old key is refused")
            assert await start(api_key=access.token("default:write")) == RPCStatusCode.OK
            await cluster.client.start_workflow("Any", id="own", task_queue="any")  # with the new token

    asyncio.run(test())


@pytest.mark.usefixtures("prepared")
def test_a_backup_starts_a_second_cluster(tmp_path: Path) -> None:
    async def test() -> None:
        async with Cluster() as first:
            await first.client.start_workflow("Any", id="saved", task_queue="any")
            folder = first.place.folder / "backup"
            await first.region.database.backup(folder)
            await first.client.start_workflow("Any", id="later", task_queue="any")
            async with Cluster(restore=folder) as second:
                status = (await second.client.get_workflow_handle("saved").describe()).status
                assert status == WorkflowExecutionStatus.RUNNING
                with pytest.raises(RPCError, match="not found"):
                    await second.client.get_workflow_handle("later").describe()
                await second.client.get_workflow_handle("saved").terminate()
            assert (await first.client.get_workflow_handle("saved").describe()).status == status

    asyncio.run(test())


@pytest.mark.usefixtures("prepared")
def test_a_lost_port_is_replaced() -> None:
    """Somebody takes a port of a service between its probe and its start."""

    async def test() -> None:
        async with Cluster() as cluster:
            service = cluster.region.of("matching")[0]
            service.kill()
            taken = service.ports["grpcPort"]
            with socket.create_server(("127.0.0.1", taken)):
                await service.start()
                assert service.ports["grpcPort"] != taken
                await cluster.region.ready()

    asyncio.run(test())


@pytest.mark.usefixtures("prepared")
def test_a_service_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with Cluster() as cluster:
            service = cluster.region.of("history")[0]
            service.kill()
            monkeypatch.setattr(service, "_config", lambda _: {"persistence": {}})
            with pytest.raises(RuntimeError, match=r"a-history-1 ended by itself; it said: \w+"):
                await service.start()

    asyncio.run(test())
