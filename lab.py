"""What the items of the numbered scripts work with.

    servers of our own, and their guard    harness/servers.py
    looking: runs, histories, answers      harness/looking.py
    workers, and processes to kill         harness/workers.py
    faults from outside, and the ledger    harness/faults.py
    somebody else's server                 harness/given.py
    the lab, session and run               here

This file knows nothing of verdicts: what is seen here becomes evidence in a script, and a verdict in common.py.
"""

from common import (
    Category,
    NotRun,
    Target,
    Unusable,
    evaluate,
    find_cli,
    sdk_version,
    slowness,
)
from harness.faults import (
    Call,
    Fault,
    Outside,
    calls_in,
    die,
    die_before,
    fail,
    hold,
    never_answer,
    note,
    notes,
    refuse,
    slow,
    withhold,
)
from harness.given import Capabilities, Inventory, capabilities, hindrance, refused_command, remember_command
from harness.given import refusal as why_refused
from harness.looking import (
    Ending,
    Handle,
    HttpAnswer,
    count_events,
    end,
    ended,
    event_times,
    failed_tasks,
    finds,
    happened,
    history_of,
    http,
    is_closed,
    is_closed_or_stuck,
    keywords_in,
    listed,
    most_at_once,
    name_of,
    outline,
    overheard,
    pending,
    refusal,
    repeated,
    said,
    status_of,
    waits,
)
from harness.machine import SLOW, together, until
from harness.servers import (
    DELETES_SOON,
    TUNED,
    Finished,
    Guard,
    Server,
    download_cli,
    free_port,
    make_folder,
    port_is_free,
    tail,
)
from harness.settings import (
    CLI_ALONE,
    EVALUATED,
    LEFT,
    MADE,
    MaskingFormatter,
    cli_environment,
    connect,
    connect_to_user_server,
    is_given,
    unused_settings,
    user_settings,
)
from harness.versions import command_lacks, lacks_yet, requires, where_there
from harness.workers import Child, Nursery, keep_bytecode, make_worker, sandbox, serve

import argparse
import asyncio
import contextlib
import inspect
import itertools
import json
import logging
import os
import platform
import random
import resource
import sqlite3
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from temporalio.client import Client
from temporalio.worker import PollerBehaviorSimpleMaximum, Worker

if TYPE_CHECKING:
    from cluster import Cluster

# What scripts, cluster.py and tests take from here though it stands in harness/.
__all__ = [
    "DELETES_SOON", "TUNED", "Call", "Child", "Ending", "Fault", "Finished", "Guard", "Handle", "HttpAnswer",
    "Nursery", "Server", "count_events", "die", "die_before", "end", "ended", "event_times", "fail", "failed_tasks",
    "finds", "free_port", "happened", "history_of", "hold", "http", "is_closed", "is_closed_or_stuck",
    "keywords_in", "lacks_yet", "listed", "make_folder", "make_worker", "most_at_once", "name_of", "never_answer",
    "note", "notes", "outline", "overheard", "pending", "port_is_free", "refusal", "refuse", "repeated", "requires",
    "said", "sandbox", "slow", "slowness", "status_of", "tail", "together", "until", "waits", "where_there",
    "withhold",
]  # fmt: skip

# 1. The lab ------------------------------------------------------------------------------------------

# Where nothing is to be given up, a slow machine gets all the time it needs.
PATIENT = timedelta(minutes=5)


# For a worker whose heartbeats must not be late: by default they are held back for 0.8 of their timeout, and what was
# not sent is lost in a kill.
PROMPT: Mapping[str, Any] = {"max_heartbeat_throttle_interval": timedelta(milliseconds=200)}


def pace() -> float:
    """The factor by which short timeouts are stretched; from SLOW on a loss is put down to slowness anyway."""
    return min(slowness(), SLOW)


def soon(seconds: float = 3) -> timedelta:
    """After so many seconds an attempt or a task that a kill has cut off, or that is silent, is given up.

    Short, so that a kill costs little time, and longer by as much as the machine is slow.
    """
    return timedelta(seconds=seconds * slowness())


@dataclass(frozen=True)
class TakeOver:
    """What came of a worker killed and another that took over.

    `seconds` from SIGKILL to the end of the run; the activity calls begun before the kill, and after it.
    """

    handle: Handle
    ending: Ending
    seconds: float
    before: Sequence[Call]
    after: Sequence[Call]


class Books:
    """An outside system: enters every key once, in a SQLite file that survives its users.

    For an activity that is handed what it works with: synchronous, and picklable.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._do("CREATE TABLE IF NOT EXISTS entries (key TEXT UNIQUE, amount INTEGER)")

    def book(self, key: str, amount: int) -> bool:
        """Enter an amount under a key, once. Returns False where the key was reversed before."""
        self._do(
            "INSERT OR IGNORE INTO entries SELECT ?, ? WHERE NOT EXISTS (SELECT 1 FROM entries WHERE key = ?)",
            key, amount, f"{key} undone",
        )  # fmt: skip
        return not self._do("SELECT 1 FROM entries WHERE key = ?", f"{key} undone")

    def enter(self, key: str, amount: int) -> None:
        """Enter an amount under a key, once, whether or not it was reversed before."""
        self._do("INSERT OR IGNORE INTO entries VALUES (?, ?)", key, amount)

    def enter_all(self, entries: Mapping[str, int]) -> None:
        """Enter amounts under their keys in one go, each key once, whether or not it was reversed before."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=30)) as connection, connection:
            connection.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?)", entries.items())

    def reverse(self, key: str) -> None:
        """Enter the opposite of what stands under a key, once; where nothing does, remember that it was reversed."""
        self._do(
            "INSERT OR IGNORE INTO entries VALUES (?, COALESCE((SELECT -amount FROM entries WHERE key = ?), 0))",
            f"{key} undone", key,
        )  # fmt: skip

    def amounts(self, prefix: str = "") -> list[int]:
        """What was entered under keys with this prefix and is not nothing, oldest first."""
        found = self._do("SELECT key, amount FROM entries WHERE amount != 0 ORDER BY rowid")
        return [int(amount) for key, amount in found if key.startswith(prefix)]

    def _do(self, statement: str, *values: object) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self.path, timeout=30)) as connection, connection:
            return connection.execute(statement, values).fetchall()


class Reached(Protocol):
    """Where workflows run: a server or a cluster of ours, as clients and workers reach it."""

    @property
    def client(self) -> Client: ...

    @property
    def target(self) -> Target: ...


class Lab:
    """What one item works with: names, files, workers and servers that no other item touches."""

    def __init__(self, session: "Session", item: str, suffix: str, clients: Sequence[Client], sparing: bool) -> None:
        self._session = session
        self.id = f"{item}-{session.token}{suffix}"
        self.task_queue = self.id
        self.client, self.target = clients[0], session.target
        self._for_workers = itertools.cycle(clients)
        self._sparing = sparing
        self.seed = session.seed
        self.random = random.Random(f"{session.seed}/{item}")
        self.folder = session.folder / f"{item}{suffix}"
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

    @property
    def on_cluster(self) -> bool:
        """Whether the command line asked for a real cluster: then an item may ask more of it than of a dev server."""
        return bool(self._session.options.cluster)

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
        server: Reached | None = None,
        task_queue: str | None = None,
        faults: Sequence[Fault] = (),
        shortened: Mapping[str, Mapping[str, Any]] | None = None,
        watched: bool = True,
        **options: Any,
    ) -> Worker:
        """A worker in this process; use it with `async with`. Other options are those of temporalio's Worker.

        `faults` are put into its activities, and `shortened` gives these other timeouts (see faults.py). Its
        activity calls are in calls(), unless it is not `watched`.
        """
        client = options.pop("client", None) or (server.client if server else next(self._for_workers))
        self._watch(options, faults, shortened, watched)
        return make_worker(client, task_queue or self.task_queue, workflows, activities, **options)

    @contextlib.asynccontextmanager
    async def worker_process(
        self,
        workflows: Sequence[type] = (),
        activities: Sequence[Callable[..., Any]] = (),
        *,
        server: Reached | None = None,
        task_queue: str | None = None,
        fresh: bool = False,
        connect_options: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        faults: Sequence[Fault] = (),
        shortened: Mapping[str, Mapping[str, Any]] | None = None,
        watched: bool = True,
        leaving: str = "",
        nursery: Nursery | None = None,
        **options: Any,
    ) -> AsyncIterator[Child]:
        """A worker in a process of its own, which may be killed, and is on leaving the block. Options: see worker().

        SIGTERM ends it like any program that does not expect it. With a path `leaving`, it lets the worker shut down
        as its options say, and the file is there as soon as the signal has come.
        """
        self._watch(options, faults, shortened, watched)
        parts = {"workflows": workflows, "activities": activities, **options}
        target = server.target if server else self._session.target
        async with self.process(
            serve,
            target,
            connect_options or {},
            task_queue or self.task_queue,
            parts,
            leaving,
            fresh=fresh,
            nursery=nursery,
        ) as child:
            yield child
            if not child.alive and not child.killed and await child.wait() == 1:
                raise RuntimeError(f"a worker process ended by itself: {tail(self._session.log)}")

    def _watch(
        self,
        options: dict[str, Any],
        faults: Sequence[Fault],
        shortened: Mapping[str, Mapping[str, Any]] | None,
        watched: bool,
    ) -> None:
        if self._session.options.no_cache:
            options.setdefault("max_cached_workflows", 0)
        if self._sparing:
            for kind in ("workflow", "activity"):
                options.setdefault(f"{kind}_task_poller_behavior", PollerBehaviorSimpleMaximum(POLLERS))
        if watched:
            outside = Outside(self.file("calls"), faults, shortened or {})
            options["interceptors"] = [*options.get("interceptors", ()), outside]

    def calls(self, workflow: str = "", what: str = "begun", activity: str = "") -> list[Call]:
        """The activity calls that workers of this item have begun (or "ended"), of one workflow's id or of all.

        Of one activity, or of all.

        `what` empty: every line of the ledger, begins and ends in the order in which they came.
        """
        return [
            call
            for call in calls_in(self.file("calls"))
            if what in ("", call.what) and workflow in ("", call.workflow) and activity in ("", call.activity)
        ]

    def gate(self, name: str = "") -> str:
        """The path of a file that is not there yet, for faults that wait for it; open_gate() makes it."""
        return self.file(f"{name or uuid.uuid4().hex[:8]}.gate")

    async def start(
        self, run: Any, *arguments: Any, name: str = "", server: Reached | None = None, **options: Any
    ) -> Handle:
        """Start a workflow with an id of this item's, "`id`-`name`", on its task queue unless another is named.

        By the `client` that is given, by that of the server, or by the item's own.
        """
        client = options.pop("client", None) or (server.client if server else self.client)
        given: dict[str, Any] = {"id": f"{self.id}-{name}" if name else self.id, "task_queue": self.task_queue}
        handle: Handle = await client.start_workflow(run, args=arguments, **(given | options))
        return handle

    async def answer(self, function: Callable[..., Any], *arguments: Any, seconds: float = 60) -> Any:
        """What a module-level function returns in a process of its own, as JSON. It may be async.

        What is refused there, or is not in the installed SDK yet, is raised here as NotRun.
        """
        path = self.file(f"{uuid.uuid4().hex[:8]}.json")
        async with self.process(_answer, path, function, arguments) as child:
            status = await child.wait(seconds)
        if status != 0:
            raise RuntimeError(f"{function.__name__} ended with status {status}: {tail(self._session.log)}")
        answer, refused = json.loads(Path(path).read_text(encoding="utf-8"))
        if refused:
            raise NotRun(refused)
        return answer

    async def take_over(
        self,
        run: Any,
        *arguments: Any,
        name: str,
        parts: Mapping[str, Any],
        point: Callable[[], object] | None = None,
        meanwhile: Callable[[], object] | None = None,
        **options: Any,
    ) -> "TakeOver":
        """The commonest drama: start a workflow, SIGKILL its worker at a point, and let another take over.

        `parts` are arguments of worker_process() for both workers; `point` is waited for with until(), or where there
        is none, a fault of the parts kills the worker. `meanwhile` is called when no worker is left. `options` are
        those of start(). Raises TimeoutError where the point does not come.
        """
        queue = f"{self.id}-{name}"
        parts = {"task_queue": queue, **parts}
        handle = await self.start(run, *arguments, name=name, task_queue=queue, **options)
        async with self.worker_process(**parts) as worker:
            if point:
                await until(point, f"{name} came to the point of the kill")
                await worker.kill()
            await worker.wait()
        killed, before = time.monotonic(), len(self.calls(handle.id))
        if meanwhile:
            met = meanwhile()
            await met if inspect.isawaitable(met) else None
        async with self.worker_process(**parts):
            how = await ended(handle)
        calls = self.calls(handle.id)
        return TakeOver(handle, how, time.monotonic() - killed, calls[:before], calls[before:])

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
        if done.code and (why := command_lacks(arguments, done.err)):
            raise NotRun(why)
        if target.address is None and done.code and (why := refused_command(done.err)):
            raise NotRun(why)
        return done

    async def command(self, *arguments: str, server: Server | None = None, seconds: float = 30) -> Finished:
        """The same as cli(), for a command that must succeed."""
        done = await self.cli(*arguments, server=server, seconds=seconds)
        if done.code:
            raise RuntimeError(f"temporal {' '.join(arguments[:3])}: {done.err or done.out}")
        return done

    async def nexus_endpoint(self, server: Server, task_queue: str = "", namespace: str = "default") -> str:
        """Make a Nexus endpoint of this item's name, which leads to a task queue. Returns its name."""
        await self.command(
            "operator", "nexus", "endpoint", "create", "--name", self.id, "--target-namespace", namespace,
            "--target-task-queue", task_queue or self.task_queue, server=server,
        )  # fmt: skip
        return self.id

    def program(
        self, *command: str, output: str = "", **variables: str
    ) -> contextlib.AbstractAsyncContextManager[Child]:
        """Another program as a process that ends with the script, with these variables in its environment.

        With a path `output` it writes there what it prints, and works in that file's folder.
        """
        return self.process(_become, command, output, variables)


async def _answer(path: str, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """The life of a process that answers: call the function, and leave what it returns in a file."""
    answer, refused = None, None
    try:
        result = function(*arguments)
        answer = await result if inspect.isawaitable(result) else result
    except Exception as error:
        if (refused := why_refused(error)) is None:
            raise
    Path(path).write_text(json.dumps([answer, refused]), encoding="utf-8")


def _become(command: Sequence[str], output: str, variables: Mapping[str, str]) -> None:
    """The life of a process that becomes another program."""
    if output:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(Path(output).parent)
    os.execvpe(command[0], list(command), {**os.environ, **variables})


def open_gate(path: str) -> None:
    """Let what waits at a gate go on."""
    Path(path).touch()


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


# 2. Session and run ----------------------------------------------------------------------------------


# As on the dev server (see TUNED): a timer of 50 ms does not round up to a second. Nothing promised changes by it.
CLUSTER_TUNED = {"history.timerProcessorMaxTimeShift": "1ms"}
CONNECTIONS = 6  # of an item to a server of the user's
# Of a worker for tasks of one kind there, instead of 5: each is an open call, and what stands before a server may take
# 512 connections in all (nginx's default), which two scripts at a time filled.
POLLERS = 2


class Session:
    """What the items of one run share: the server evaluated, the nursery, the guard and a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        check_port(options)
        given = is_given()
        if given and options.cluster:
            raise Unusable(
                "--cluster starts one of our own, but TEMPORAL_ADDRESS names another: leave one of them out."
            )
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
        self._cluster: Cluster | None = None
        self._ui_port: int | None = None
        self._client: Client | None = None
        self._clients: dict[str, Sequence[Client]] = {}
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
        """The URL of the Web UI of a server of our own, where it has one."""
        if self._cluster:
            return self._cluster.region.ui.url if self._cluster.region.ui else None
        return f"http://127.0.0.1:{self._ui_port}" if self._embedded and self._ui_port else None

    @property
    def address(self) -> str:
        """Where the evaluated server listens, as "host:port"."""
        return self.target.address or str(user_settings()["target_host"])

    def lab(self, item: str) -> Lab:
        prefix = f"{item}-{self.token}"
        suffix = "-again" if prefix in self._prefixes else ""
        self._prefixes.append(prefix)
        # Who measures alone has as many pollers as the SDK's defaults give.
        sparing = item in self._clients and not any(one.id == item and one.alone for one in self.options.chosen)
        return Lab(self, item, suffix, self._clients.get(item, [self.client]), sparing)

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
        if self.options.cluster:
            await self._start_cluster()
        elif user_settings():
            self._client = await connect_to_user_server()
            # What stands before a server may allow a connection only so many calls at a time (nginx 128), and every
            # poller of a worker is one that lasts a minute: so each item has some, and its workers use them by turns.
            for item in self.options.chosen:
                self._clients[item.id] = await asyncio.gather(*(connect(Target(None)) for _ in range(CONNECTIONS)))
        else:
            await self._start_embedded()
        self.ready_after = time.monotonic() - begun
        self.capabilities = await capabilities(self.client, ours=bool(self._embedded or self._cluster))
        if self._embedded:
            os.environ[EVALUATED] = self.capabilities.version
        where = "cluster" if self._cluster else "embedded server" if self._embedded else "given server"
        if where == "given server":
            self.remarks += self.capabilities.told()
        self.environment = {
            "python": platform.python_version(),
            "sdk": sdk_version(),
            "server": self.capabilities.version,
            "where": where,
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

    async def _start_cluster(self) -> None:
        # Here and not above: a script that needs no cluster need not import what one is made of.
        from cluster import Cluster

        try:
            self._cluster = Cluster(ui=self.options.keep_open, port=self.options.port, settings=CLUSTER_TUNED)
            await self._cluster.__aenter__()
        except NotRun as error:
            raise Unusable(str(error)) from None
        self.target, self._client = self._cluster.target, self._cluster.client

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
        if self._cluster:
            await self._cluster.close()
        if self._embedded or self._cluster or self._client is None or not self._prefixes:
            return []
        inventory = Inventory(self.client, self._prefixes)
        await inventory.remove()
        if path := os.environ.get(LEFT):
            inventory.hand_over(path)
        return inventory.told()

    def cpu_seconds(self) -> dict[str, float] | None:
        """Processor seconds: of this process, and of the servers and workers it started, those that ended too."""
        try:
            import psutil
        except ImportError:
            return None
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        others = ended.ru_utime + ended.ru_stime
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                used = child.cpu_times()
                others += used.user + used.system + used.children_user + used.children_system
        return {"own": round(time.process_time(), 2), "servers_and_workers": round(others, 2)}

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
