"""Script 01 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from pathlib import Path

import pytest
from helpers import ROOT, changed, check_whole, evaluate

SCRIPT = ROOT / "01_ex_execution_semantics.py"


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path)
    check_whole(verdicts)
    assert [item for item, one in verdicts.items.items() if one["fail_closed"]] == ["EX-01", "EX-03"]


# (item, text in the script, what stands there instead, stars then: None where nothing is proven any more)
FALLS = [
    # One retry is all it takes: without it, a step cut off by the kill is never tried again.
    ("EX-01", "step, start_to_close_timeout=patience", "step, schedule_to_close_timeout=patience", None),
    # The key makes a second call harmless. With a different key in each call, the effect is doubled.
    ("EX-02", "[order.key or None, time.time()]", "[order.key and str(time.time()) or None, 0]", 3),
    # An activity that does not die leaves nothing to prove.
    ("EX-02", "if order.dies and rows", "if False and rows", None),
    # Each start gets an id of its own: the policies have nothing to decide.
    ("EX-03", 'id=f"{lab.id}-{name}",\n', 'id=f"{lab.id}-{name}-{uuid.uuid4()}",\n', None),
    # The update no longer carries its id.
    ("EX-03", 'Account.deposit, 10, id="deposit-1"', "Account.deposit, 10", 3),
    # The server keeps nothing on disk.
    ("EX-04", "lab.private_server(file=True)", "lab.private_server()", None),
    # No sandbox: the calls are not refused.
    ("EX-05", "@workflow.defn\nclass Forbidden", "@workflow.defn(sandboxed=False)\nclass Forbidden", 3),
    # Real randomness where the SDK's belongs.
    ("EX-05", "workflow.random().random(), str", "random.SystemRandom().random(), str", 1),
    # The changed code is not changed.
    ("EX-06", "        await workflow.sleep(1)\n        paid", "        paid", None),
    # A change that replay cannot see among those it must see.
    ("EX-07", "    OrderSwapped,\n", "    OrderSwapped,\n    TimeoutChanged,\n", 3),
    ("EX-07", "luck = workflow.random().random()", "luck = random.SystemRandom().random()", 1),
]


@pytest.mark.parametrize(("item", "old", "new", "stars"), FALLS)
def test_the_verdict_falls(tmp_path: Path, item: str, old: str, new: str, stars: int | None) -> None:
    verdicts = evaluate(changed(SCRIPT, tmp_path, (old, new)), tmp_path, item)
    assert verdicts.stars(item) == stars, verdicts.out
    assert verdicts.code == (1 if stars is None or item == "EX-03" else 0)
