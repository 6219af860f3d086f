"""Script 06 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from pathlib import Path

import pytest
from helpers import ROOT, changed, check_whole, evaluate

SCRIPT = ROOT / "06_cp_compensation.py"


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path)
    check_whole(verdicts)
    assert verdicts.stars("CP-01") == 3, "the limit of three is the only thing between a saga and four stars"
    held = [one["held"] for kind in ("works", "holds", "control", "limit") for one in verdicts.evidence("CP-01", kind)]
    assert held == [True] * 12


# (item, text in the script, what stands there instead, stars then: None where nothing is proven any more)
FALLS = [
    # Undone in the order in which it was done.
    ("CP-01", "for one in reversed(self.undo)", "for one in self.undo", None),
    # Undoing that runs whether or not anything failed.
    ("CP-01", "        if error is not None:\n", "        if True:\n", 2),
    # No car is ever refused: nothing was to be undone.
    ("CP-01", 'if trouble == "refused":', "if False:", None),
    # Were there a saga in the SDK, the cap of three would be gone.
    ("CP-01", '"saga|compensat"', '"signal"', 4),
    # Back to the first step instead of to the fourth.
    ("CP-02", "return scheduled[step - 1]", "return scheduled[0]", 1),
    # The spare part never comes: what is reset fails again.
    ("CP-02", "    Path(job.spare).touch()\n    begun", "    begun", None),
    # The workflow's code is not mended.
    ("CP-02", "[1, 2, 3, 4, 5], job", "[1, 2, 3, 40, 5], job", None),
    # The batch goes back to the beginning instead of to where the bad build took over.
    ("CP-02", '"--type", "BuildId", "--build-id", "bad",', '"--type", "FirstWorkflowTask",', 3),
    # One of the signals is there twice.
    ("CP-02", 'in ("a", "b"):\n        await', 'in ("a", "b", "a"):\n        await', 3),
    # The twin is helped, too.
    ("CP-03", '(lab, "twin")', '(lab, "twin", 0.1)', None),
    # A workflow without words for intervention: the signal says nothing.
    ("CP-03", 'self.instead = "give up"', 'self.instead = "office"', 2),
    # The pause is never asked for.
    ("CP-03", '"pause", paused, "--identity", OPERATOR,', '"unpause", paused, "--identity", OPERATOR,', None),
    # Somebody else's name in the history.
    ("CP-03", "mine = lab.client.identity", 'mine = "somebody else"', 3),
    # The retry is not an hour away: that it comes soon proves nothing.
    ("CP-03", '(lab, "activity-options")', '(lab, "activity-options", 0.5)', 3),
    # The key is made of the run's id, which a reset changes.
    ("CP-04", "{activity.info().workflow_id}/{kind}", "{activity.info().workflow_run_id}/{kind}", 2),
    # The addresses are not mended.
    ("CP-04", 'ask_shop(shop, "DELETE FROM unknown_addresses")', "pass", None),
    # The poison item is given up at once.
    ("CP-04", "maximum_attempts=order.attempts", "maximum_attempts=order.attempts and 2", 3),
    # Each item has a limit: none retries for ever.
    ("CP-04", "attempts=0)", "attempts=3)", None),
    # The healthy run is stuck, too.
    ("CP-04", '("healthy", {"home": "Old Street"})', '("healthy", {})', 3),
]


@pytest.mark.parametrize(("item", "old", "new", "stars"), FALLS)
def test_the_verdict_falls(tmp_path: Path, item: str, old: str, new: str, stars: int | None) -> None:
    verdicts = evaluate(changed(SCRIPT, tmp_path, (old, new)), tmp_path, item)
    assert verdicts.stars(item) == stars, verdicts.out
    assert verdicts.code == (1 if stars is None else 0)


REGISTER, STEP = "saga.undo.append(partial(do_undo, trip, service))", "await do_book(trip, service)"
END = '        return "booked"\n\n\n@workflow.defn\nclass NothingUndone'
REGISTERED_BEFORE = f"{REGISTER}\n                {STEP}\n{END}"
REGISTERED_AFTER = f"{STEP}\n                {REGISTER}\n{END}"

# CP-01 is capped at three by its limit, so the loss of its fourth star shows in the evidence:
# (text in the script, what stands there instead, words of the claim that must no longer hold)
LOST = [
    # The undoing is not shielded: the cancellation ends it.
    ("await asyncio.shield(undoing)", "await undoing", "cancelled while it is undone"),
    # What was begun is only registered once it is known to be done.
    (REGISTERED_BEFORE, REGISTERED_AFTER, "a step that timed out"),
    # The undoing has no retries.
    ("        retry_policy=QUICKLY,\n    )\n\n\n@workflow.defn\nclass TravelBooking",
     "        retry_policy=RetryPolicy(maximum_attempts=1),\n    )\n\n\n@workflow.defn\nclass TravelBooking",
     "retried until it succeeds"),
    # A provider that does not know its keys books the undoing of every attempt.
    ('"SELECT key || \' undone\', -amount', '"SELECT key || random(), -amount', "worker killed"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "claim"), LOST)
def test_the_saga_fails(tmp_path: Path, old: str, new: str, claim: str) -> None:
    verdicts = evaluate(changed(SCRIPT, tmp_path, (old, new)), tmp_path, "CP-01")
    lost = [one["claim"] for one in verdicts.evidence("CP-01", "holds") if one["held"] is False]
    assert any(claim in one for one in lost), verdicts.out
