"""Workers, in this process and in processes that may be killed, and the nursery that forks these."""

from harness.machine import leave, slowness
from harness.servers import tail
from harness.settings import Target, connect, mask_streams, remember

import asyncio
import collections
import contextlib
import importlib
import inspect
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from temporalio.client import Client
from temporalio.worker import Worker
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions


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
    build id is given, which every new process would otherwise compute from all its code (0.1 s); the SDK calls
    that parameter deprecated, in favour of one that is experimental.
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


HARNESS = ("cluster", "common", "harness", "lab")


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


async def serve(
    target: Target,
    connect_options: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    task_queue: str,
    parts: Mapping[str, Any],
    leaving: str = "",
) -> None:
    """The life of a worker process: poll until killed, or where there is a file `leaving`, until SIGTERM.

    `connect_options` may be called for: a runtime, for one, cannot be handed to a process.
    """
    told = asyncio.Event()
    if leaving:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    options = connect_options() if callable(connect_options) else connect_options
    client = await connect(target, **options)
    async with make_worker(client, task_queue, **parts):
        await told.wait()
        Path(leaving).touch()


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

    def send(self, number: signal.Signals) -> None:
        """Send it another signal, such as SIGTERM, SIGSTOP or SIGCONT."""
        os.kill(self.pid, number)

    async def wait(self, seconds: float = 60) -> int:
        """Wait for the process to end by itself. Returns its exit status, or minus the signal's number.

        Raises TimeoutError after `seconds`, which grow on a slow machine.
        """
        return await asyncio.wait_for(asyncio.shield(self._ended), seconds * slowness())

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
