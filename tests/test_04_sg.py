"""Script 04 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from harness.systems import prepared

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ROOT, Fall, check_falls, check_whole, evaluate, in_runs, name_of_run

SCRIPT = ROOT / "04_sg_signals_events.py"


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path)
    check_whole(verdicts)
    for item in verdicts.items:
        held = [one["held"] for kind in ("works", "holds", "control", "limit") for one in verdicts.evidence(item, kind)]
        there = shutil.which("redis-server") and prepared("kafka")[0]
        assert None not in held or not there, item


def test_without_a_broker_that_piece_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stands in for one: the star is not earned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    nowhere = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if not has_broker(part))
    verdicts = evaluate(SCRIPT, tmp_path, "SG-03", env={"PATH": nowhere})
    left = [one["measured"] for one in verdicts.items["SG-03"]["evidence"] if one["held"] is None]
    assert len([why for why in left if "redis-server" in why]) == 3
    assert len([why for why in left if "cluster.py prepare --with kafka" in why]) == 4
    assert verdicts.stars("SG-03") == 3
    assert "not run (holds): messages of a broker" in verdicts.items["SG-03"]["reason"]
    assert verdicts.code == 0


def has_broker(folder: str) -> bool:
    return (Path(folder) / "redis-server").exists()


STREAM = "Stream(lambda number: put(handle, number))"
STREAMS = ["continues as new five times", "killed in mid-stream"]

SG_01 = [
    # A server that lies: every ninth signal is acknowledged and lost; each one arrives twice.
    Fall("SG-01", STREAM, STREAM[:-1] + " if number % 9 else asyncio.sleep(0))", 3, STREAMS),
    Fall("SG-01", STREAM, "Stream(lambda n: asyncio.gather(put(handle, n), put(handle, n)))", 3, STREAMS),
    # One of the thousand is lost, and another one comes twice.
    Fall("SG-01", "*(put(handle, number) for", "*(put(handle, number % 999 + 1) for", 3, ["concurrent signals to one"]),
    # The latest first.
    Fall(
        "SG-01", "waiting.append(deposit)", "waiting.insert(0, deposit)", 3,
        ["sent before any worker", "concurrent signals to one", "two senders"],
    ),
    # The server keeps nothing on disk.
    Fall("SG-01", "file=True, settings=SHORT", "settings=SHORT", None),
    # A plain program that remembers what it received before it was killed.
    Fall(
        "SG-01",
        "waiting.append(int(line))", "waiting.append(int(line)), Books(path).enter_all({line: int(line)})", None,
    ),
    # The argument does not come through, to a workflow that is signalled by a client and by another workflow.
    Fall("SG-01", "put(handle, 7)\n    await until", "put(handle, 8)\n    await until", 2, ["wakes a running"]),
    Fall("SG-01", "handle.id: 9}", "handle.id: 8}", 2, ["signals and cancels another one"]),
    # The sender's code is not told that there is nobody.
    Fall("SG-01", "                unpaid.append(account)\n", "                pass\n", 3, ["one that does not exist"]),
    # What comes while others are being booked is thrown away.
    Fall("SG-01", "waiting[: len(batch.deposits)]", "waiting[:AT_ONCE]", 3, STREAMS),
    # What is waiting stays behind in the old run; and does not where it should.
    Fall(
        "SG-01", "continue_as_new(self.taken_along())", "continue_as_new(replace(self.taken_along(), waiting=[]))", 3,
        ["continues as new five times"],
    ),
    Fall("SG-01", "return replace(self.standing, waiting=[])", "return self.standing", None),
    # A key that is another one each time.
    Fall("SG-01", "{batch.account}/{one.key}", "{batch.account}/{one.key}/{id(one)}", 3, ["sends again comes twice"]),
    # Were everything decoded, the limit would be gone.
    Fall("SG-01", 'await handle.signal("deposit", "two")', "await put(handle, 2)", 5, ["cannot decode"]),
]  # fmt: skip

SG_02 = [
    # A timer that fires too early; and one that is there where none should be.
    Fall("SG-02", "timeout=wish.seconds)", "timeout=wish.seconds and wish.seconds / 2)", 2, ["never set"]),
    Fall("SG-02", "for seconds in (None, 3600)", "for seconds in (7200, 3600)", 2, ["a timeout not needed"]),
    # The first answer is taken for all of them.
    Fall("SG-02", "self.offers = await asyncio.gather(*asked)", "self.offers *= 3", 2, ["waiting on many"]),
    # No validator; no second look; no waiting for handlers; no lock.
    Fall("SG-02", "    @spend.validator\n", "", 3, ["validator refuses bad input"]),
    Fall(
        "SG-02",
        "            self.refuse_too_much(expense)  # once more: others may have spent since it was accepted\n", "", 3,
        ["a validator knows the state"],
    ),
    Fall(
        "SG-02", "        await workflow.wait_condition(workflow.all_handlers_finished)\n", "", 3,
        ["unfinished handler"],
    ),
    Fall("SG-02", "[None] = asyncio.Lock()", "[None] = contextlib.nullcontext()", 3, ["take turns"]),
    # Handlers that lose nothing without the lock.
    Fall("SG-02", "self.means.left = left", "self.means.left -= expense.amount", None),
    # A workflow without a timeout that ends all the same.
    Fall("SG-02", 'till.purchase("endless", None)', 'till.purchase("endless", 0.1)', None),
    # As many as are sent are taken at a time; in all; and of signals.
    Fall(
        "SG-02", 'await accept(handle, expense)\n    return "accepted"',
        'await handle.execute_update(Budget.order, expense)\n    return "accepted"', 4, ["so many updates at a time"],
    ),
    Fall("SG-02", 'maxTotalUpdates": "40"', 'maxTotalUpdates": "400"', 3, ["so many updates in all", "takes more"]),
    Fall("SG-02", 'SignalsPerExecution": "20"', 'SignalsPerExecution": "30"', 4, ["so many signals"]),
    # A queue that forgets; a workflow that never begins a new run.
    Fall(
        "SG-02", "self.means.queue.append(expense)", "self.means.queue[:] = [*self.means.queue[:5], expense]", 3,
        ["only join a queue"],
    ),
    Fall("SG-02", "return workflow.info().is_continue_as_new_suggested()\n\n    async", "return False\n\n    async", 3,
         ["takes more"]),
    # The server keeps nothing on disk; somebody else's answer.
    Fall("SG-02", "file=True, settings=LOWERED", "settings=LOWERED", None),
    Fall("SG-02", "get_update_handle(bill.number", "get_update_handle(handle.id", 3, ["a client that never saw it"]),
]  # fmt: skip

BROKER = [
    # A message that is delivered again may start a second run; or may not where it should.
    Fall("SG-03", "task_queue=task_queue, id_reuse_policy=ONE_RUN", "task_queue=task_queue", 3,
         ["makes no second run"]),
    Fall("SG-03", "input.id_reuse_policy = WorkflowIDReusePolicy.ALLOW_DUPLICATE", "pass", None),
    # A consumer that is not killed proves nothing of redelivery.
    Fall("SG-03", "dies_at=numbers[2]", 'dies_at=""', None),
    # A consumer that is there from the beginning.
    Fall("SG-03", "    await ended(await lab.start(Fulfilment.run, Order(f\"{lab.id}-other\"",
         "    await consume(lab.client, replace(topic, dies_at=''), lab.task_queue)\n"
         "    await ended(await lab.start(Fulfilment.run, Order(f\"{lab.id}-other\"", None),
]  # fmt: skip
SG_03 = [
    # Of twenty signals one is lost, and another one comes twice.
    Fall("SG-03", '[f"signal {number}"', '[f"signal {number % 19}"', 3, ["concurrent signal-with-starts"]),
    # Signals wait for a workflow to be started, where they should be refused.
    Fall(
        "SG-03", 'await said(handle.signal(Fulfilment.add, "lost"))',
        'await said(add_or_start(lab.client, Order(f"{lab.id}-nobody"), "lost", lab.task_queue))', None,
    ),
    # The run that the HTTP API speaks of is not the one that ran.
    Fall("SG-03", 'return answer["runId"]', "return id", 2, ["an HTTP POST"]),
    # A run that is due later than it starts.
    Fall("SG-03", "asked - waited for", "asked + 2 - waited for", 2, ["never before it is due"]),
    # An update that answers wrongly.
    Fall("SG-03", "return len(self.items)\n", "return len(self.items) + 1\n", 2, ["by the first update"]),
    # Were nothing refused, or the second run that of another id, these limits would be gone.
    Fall("SG-03", "    @put.validator\n", "", 3, ["update-with-start"]),
    Fall(
        "SG-03", 'await until(lambda: refusal(handle), "the run is deleted")', "order.number += '-other'", 3,
        ["as long as the namespace retains"],
    ),
    *(BROKER if shutil.which("redis-server") else []),
]  # fmt: skip

SG_04 = [
    # A query that answers with old news.
    Fall(
        "SG-04", "return self.visited\n\n    @workflow.query", "return self.visited[:1]\n\n    @workflow.query", 2,
        ["reads a running workflow's", "after its completion"],
    ),
    Fall("SG-04", "return len(self.wanted)", "return len(self.visited)", 3, ["acknowledged before it was sent"]),
    # A task of the workflow's own is none: nothing of it is in the stack trace.
    Fall("SG-04", "self.watch = asyncio.create_task(self.watch_the_sky())", "pass", 2, ["stack-trace query"]),
    # The condition is not asked for; the query that should be unknown is known; the handler does not act.
    Fall("SG-04", "reject_condition=condition", "reject_condition=None", 3, ["a reject condition"]),
    Fall("SG-04", 'failing_query(handle, "place")', 'failing_query(handle, "places")', 3, ["an unknown query fails"]),
    Fall(
        "SG-04", 'workflow.start_activity_method(Driver.move, Leg("", "nowhere")', 'dict(leg=Leg("", "nowhere")', 3,
        ["starts an activity is refused"],
    ),
    # A query writes what an update does, or an update as little as a query.
    Fall("SG-04", "await handle.execute_update(update)\n", "await handle.query(Delivery.places)\n", None),
    Fall(
        "SG-04", "    status, after = await status_of",
        "    await handle.execute_update('tell')\n    status, after = await status_of", 2,
        ["reads a running workflow's"],
    ),
    # The query comes back too early to have waited for anybody; a handler that changes nothing.
    Fall("SG-04", "rpc_timeout=timedelta(seconds=1.5)", "rpc_timeout=timedelta(seconds=0.2)", 4, ["without a worker"]),
    Fall("SG-04", "        self.peeked += 1\n", "", 4, ["changes the workflow's variables"]),
]  # fmt: skip


@pytest.fixture
def _nothing_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Kafka would show is not run then, which saves its time; SG-03 has three stars at most."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.hours
@pytest.mark.usefixtures("_nothing_prepared")
@pytest.mark.parametrize("falls", in_runs([*SG_01, *SG_02, *SG_03, *SG_04]), ids=name_of_run)
def test_a_verdict_falls(tmp_path: Path, falls: Sequence[Fall]) -> None:
    check_falls(SCRIPT, tmp_path, falls)
