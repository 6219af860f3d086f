"""Script 04 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from pathlib import Path

import pytest
from helpers import ROOT, changed, check_whole, evaluate

SCRIPT = ROOT / "04_sg_signals_events.py"


def test_the_whole_script(tmp_path: Path) -> None:
    check_whole(evaluate(SCRIPT, tmp_path))


SEND = "lambda number: handle.signal(Inbox.receive, number)"

# (item, text in the script, what stands there instead, stars then: None where nothing is proven any more)
FALLS = [
    # A server that lies: every ninth signal is acknowledged and lost; each one arrives twice.
    ("SG-01", SEND, f"{SEND} if number % 9 else asyncio.sleep(0)", 3),
    ("SG-01", SEND, "lambda n: asyncio.wait([asyncio.create_task(handle.signal(Inbox.receive, n)) for _ in 'ab'])", 3),
    # One of the thousand is lost, and another one comes twice.
    ("SG-01", "Inbox.receive, number) for number in range(CROWD)", "Inbox.receive, n % 999) for n in range(CROWD)", 3),
    # The latest first.
    ("SG-01", "self.waiting.append(number)", "self.waiting.insert(0, number)", 3),
    # The server keeps nothing on disk.
    ("SG-01", "lab.private_server(file=True)", "lab.private_server()", None),
    # A plain program that remembers what it received before it was killed.
    (
        "SG-01",
        "    waiting: list[int] = []\n\n    async def serve",
        '    waiting = [int(one) for one in notes(database.replace("plain.sqlite", "taken"))]\n\n    async def serve',
        None,
    ),
    # The argument does not come through.
    ("SG-01", "await handle.signal(Inbox.receive, 7)", "await handle.signal(Inbox.receive, 8)", 1),
    # A timer that fires too early.
    ("SG-02", "timeout=seconds)", "timeout=seconds and seconds / 2)", 2),
    # The first answer is taken for all of them.
    ("SG-02", "return await asyncio.gather(*tasks)", "return self.first", 2),
    # No validator, no waiting for handlers, no lock.
    ("SG-02", "    @spend.validator\n", "", 3),
    ("SG-02", "            await workflow.wait_condition(workflow.all_handlers_finished)\n", "            pass\n", 3),
    ("SG-02", "        async with self.lock:\n", "        if self.lock:\n", 3),
    # A lock where the control has none.
    ("SG-02", "\n        await self.add(ledger)\n\n", "\n        await self.add_locked(ledger)\n\n", None),
    # A workflow without a timeout that ends all the same.
    ("SG-02", 'lab, "endless", None)', 'lab, "endless", 0.1)', None),
    # A message that is delivered again may start a second run; or may not where it should.
    ("SG-03", "id_reuse_policy=given.reuse", "id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE", 3),
    ("SG-03", "id_reuse_policy=given.reuse", "id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE", None),
    # Of twenty signals one is lost, and another one comes twice.
    ("SG-03", '[f"signal {number}"]', '[f"signal {number % 19}"]', 3),
    # Signals wait for a workflow to be started, where they should be refused.
    ("SG-03", 'await handle.signal(OnEvent.add, "lost")', "await by_message(lab)", None),
    # The run that the HTTP API speaks of is not the one that ran.
    ("SG-03", 'answer["runId"]', "id", 2),
    # The second run is not due before the first.
    ("SG-03", "asked <= got for", "asked < got - 1 for", 2),
    # A query that answers with old news.
    ("SG-04", "return self.entered\n\n    @workflow.query\n", "return self.entered[:1]\n\n    @workflow.query\n", 2),
    ("SG-04", "return len(self.wanted)", "return len(self.entered)", 3),
    # A task of the workflow's own is none: nothing of it is in the stack trace.
    ("SG-04", "self.watch = asyncio.create_task(self.watch_the_sky())", "pass", 2),
    # The condition is not asked for; the query that should be unknown is known; the handler does not act.
    ("SG-04", "reject_condition=condition", "reject_condition=None", 3),
    ("SG-04", 'failing_query(handle, "stage")', 'failing_query(handle, "stages")', 3),
    ("SG-04", 'workflow.start_activity(enter, Stage("by query", "")', "len((enter, Stage)) or dict(a=1", 3),
    # The query comes back too early to have waited for anybody.
    ("SG-04", "rpc_timeout=timedelta(seconds=1.5)", "rpc_timeout=timedelta(seconds=0.2)", None),
]


@pytest.mark.parametrize(("item", "old", "new", "stars"), FALLS)
def test_the_verdict_falls(tmp_path: Path, item: str, old: str, new: str, stars: int | None) -> None:
    verdicts = evaluate(changed(SCRIPT, tmp_path, (old, new)), tmp_path, item)
    assert verdicts.stars(item) == stars, verdicts.out
    assert verdicts.code == (1 if stars is None else 0)
