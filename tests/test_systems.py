"""The systems around a server: prepared by name, started, gone afterwards, and not run where missing."""

from common import NotRun, Unusable
from harness.servers import Guard
from harness.services import Ended, Failed
from harness.systems import SYSTEMS, chosen, prepared, run_to_end, running

import asyncio
import shutil
import socket
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, Verdicts, changed, evaluate, run
from servers import given_server
from temporalio.client import Client

pytestmark = pytest.mark.all

SG, OP = ROOT / "04_sg_signals_events.py", ROOT / "08_op_operations.py"


def test_a_wrong_name_is_refused_in_a_sentence() -> None:
    done = run(ROOT / "cluster.py", "prepare", "--with", "kafka,kafak")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "kafak" in line
    assert all(name in line for name in SYSTEMS)


def test_names_are_taken_once_and_in_order() -> None:
    assert [one.name for one in chosen("mariadb,kafka,mariadb,")] == ["mariadb", "kafka"]
    assert chosen("") == []
    with pytest.raises(Unusable, match="nothing"):
        chosen("nothing")


def test_what_is_not_prepared_says_how_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    there, missing = prepared(*SYSTEMS)
    assert there == []
    for name, why in zip(SYSTEMS, missing, strict=True):
        assert f"--with {name}" in why or "mariadb-server-core" in why


def test_what_prepares_and_does_not_end_is_ended(tmp_path: Path) -> None:
    guard = Guard(tmp_path / "left")
    try:
        with pytest.raises(Failed, match="sleep did not end within 0 s"):
            asyncio.run(run_to_end(guard, "sleep", "60", seconds=0.1))
        with pytest.raises(Failed, match=r"ls failed: .*nothing-there"):
            asyncio.run(run_to_end(guard, "ls", tmp_path / "nothing-there"))
    finally:
        guard.close()


def test_one_that_is_damaged_counts_as_not_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted preparation leaves nothing that looks whole."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = SYSTEMS["kafka"].folder
    folder.mkdir(parents=True)
    (folder / "sizes.json").write_text('{"jars/one.jar": 12}')
    with pytest.raises(NotRun, match="prepare --with kafka"):
        SYSTEMS["kafka"].check()


WORKERS = [name for name, system in SYSTEMS.items() if system.process.built]


def test_the_version_that_is_said_is_the_one_that_is_fetched() -> None:
    for system in SYSTEMS.values():
        if system.sources.exists():
            files = [one.read_text(encoding="utf-8") for one in system.sources.iterdir() if one.is_file()]
            assert any(system.version in one for one in files), system.title


def test_workers_of_other_sources_count_as_not_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was built of other lines than stand there now would show something else than is read."""
    before = {name: SYSTEMS[name].folder for name in WORKERS}
    shutil.copytree(ROOT / "systems", tmp_path / "systems")
    monkeypatch.setattr("harness.systems.HERE", tmp_path)
    assert {name: SYSTEMS[name].folder for name in WORKERS} == before
    for name in WORKERS:
        source = next((tmp_path / "systems" / name).glob("[Ww]orker.*"))
        source.write_text(source.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        with pytest.raises(NotRun, match=f"prepare --with {name}"):
            SYSTEMS[name].check()


@pytest.mark.parametrize("name", [name for name in WORKERS if name != "crewai"])
def test_a_worker_polls_comes_back_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    if not prepared(name)[0]:
        pytest.skip(prepared(name)[1][0])

    async def live(address: str) -> tuple[list[psutil.Process], Path]:
        client = await Client.connect(address)
        async with running(name, client, "abroad") as worker:
            first = psutil.Process(worker.pid)
            assert worker.lines > 30
            assert worker.memory > 5e6
            assert worker.ready_after > 0
            worker.kill()
            assert not first.is_running()
            await worker.start(180)  # until the server has seen the new process poll
            return [first, psutil.Process(worker.pid)], worker.place.folder

    (tmp_path / "server").mkdir()
    with given_server(tmp_path / "server", "default") as server:
        processes, folder = asyncio.run(live(server.address))
    assert not any(one.is_running() for one in processes)
    assert not folder.exists()


def test_a_worker_that_cannot_begin_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not prepared("go")[0]:
        pytest.skip(prepared("go")[1][0])
    monkeypatch.setattr("harness.systems.ForeignWorker.arguments", ("127.0.0.1:1", "abroad"))

    async def live(address: str) -> None:
        async with running("go", await Client.connect(address), "abroad"):
            raise AssertionError("it has begun")

    (tmp_path / "server").mkdir()
    with given_server(tmp_path / "server", "default") as server, pytest.raises(Ended, match="refused"):
        asyncio.run(live(server.address))


@pytest.mark.hours
@pytest.mark.parametrize("name", [name for name in SYSTEMS if name not in WORKERS])
def test_it_starts_comes_back_and_leaves_nothing(name: str) -> None:
    if not prepared(name)[0]:
        pytest.skip(prepared(name)[1][0])

    async def live() -> tuple[list[psutil.Process], Path, int]:
        async with running(name) as system:
            first = psutil.Process(system.pid)
            system.kill()
            assert not first.is_running()
            await system.start(180)
            with socket.create_connection(("127.0.0.1", system.port), 5):
                return [first, psutil.Process(system.pid)], system.place.folder, system.port

    processes, folder, port = asyncio.run(live())
    assert not any(one.is_running() for one in processes)
    assert not folder.exists()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 5)


def lost(verdicts: Verdicts, item: str, words: str) -> bool:
    """Whether a claim with these words is said not to hold."""
    return any(one["held"] is False and words in one["claim"] for one in verdicts.items[item]["evidence"])


@pytest.fixture
def _kafka() -> None:
    if not prepared("kafka")[0]:
        pytest.skip(prepared("kafka")[1][0])


@pytest.mark.hours
@pytest.mark.usefixtures("_kafka")
@pytest.mark.parametrize(
    ("old", "new", "stars", "claim"),
    [
        # The number of an order does not come from the record's place.
        ('-{self.record.offset}" if self.places', '-{self.record.offset}" if False', 3, "records of a Kafka topic"),
        # Where it should not, it does.
        ('places=name.endswith("places")', "places=True", None, "under random ids"),
        # What cannot be read is dropped.
        ('-aside", {0: [self.record.value]})', '-aside", {0: []})', 3, "is set aside"),
        # The record that cannot be read is the last one.
        ('{0: [POISON, *values_of("a")]}', '{0: [*values_of("a"), POISON]}', None, "meets it again"),
    ],
)
def test_what_kafka_shows_falls(tmp_path: Path, old: str, new: str, stars: int | None, claim: str) -> None:
    verdicts = evaluate(changed(SG, tmp_path, (old, new)), tmp_path, "SG-03")
    assert verdicts.stars("SG-03") == stars, verdicts.out
    assert lost(verdicts, "SG-03", claim), verdicts.out


# What PostgreSQL shows needs no other store.
ALONE = [('STORES = ("cassandra", "mariadb")', "STORES = ()"), ('ENGINES = ("elast', 'ENGINES = () and ("elast')]


@pytest.mark.hours
@pytest.mark.usefixtures("_cluster")
@pytest.mark.parametrize(
    ("item", "old", "new", "claim"),
    [
        # The database acknowledges before it writes.
        (
            "OP-03",
            "        facts |= await store_killed(lab, cluster, cluster.region.database",
            "        cluster.region.database.settings = LAZY\n        await cluster.region.database.restart()\n"
            "        await cluster.region.ready()\n"
            "        facts |= await store_killed(lab, cluster, cluster.region.database",
            "each workflow whose start was acknowledged completes",
        ),
        # A query finds fewer than there are.
        (
            "OP-03",
            "(one := await find(client, query)) !=",
            '(one := await find(client, f"({query}) AND Paid = true")) !=',
            "every store of visibility prepared here",
        ),
        # The front does not look at certificates; a key that is known to all.
        ("OP-01", "ssl_verify_client on", "ssl_verify_client optional_no_ca", "through mTLS"),
        ("OP-01", "token(key=access.new_key())", "token()", "through TLS to another name"),
    ],
)
def test_what_a_cluster_shows_falls(tmp_path: Path, item: str, old: str, new: str, claim: str) -> None:
    verdicts = evaluate(changed(OP, tmp_path, *ALONE, (old, new)), tmp_path, item)
    assert verdicts.stars(item) == 3, verdicts.out
    assert lost(verdicts, item, claim), verdicts.out
