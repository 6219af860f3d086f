"""Script 02 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from pathlib import Path

import pytest
from helpers import ROOT, changed, check_whole, evaluate

SCRIPT = ROOT / "02_rt_retry_timeout.py"


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path)
    check_whole(verdicts)
    assert [item for item, one in verdicts.items.items() if one["fail_closed"]] == ["RT-01"]


# (item, text in the script, what stands there instead, stars then: None where nothing is proven any more)
FALLS = [
    # One attempt is all that the policy allows.
    ("RT-01", '"quick": RetryPolicy(', '"quick": RetryPolicy(maximum_attempts=1, ', 1),
    # The intervals do not grow.
    ("RT-01", "backoff_coefficient=5", "backoff_coefficient=1", 3),
    # The platform lies about its intervals: attempts begin before they are over.
    ("RT-01", "return [after - before for", "return [after - before - 0.6 for", 3),
    # The policy does not name the error that must not be retried.
    ("RT-01", 'non_retryable_error_types=["BadRequest"],\n    )', "non_retryable_error_types=[],\n    )", 3),
    # The control may retry, too.
    ("RT-01", '"once": RetryPolicy(maximum_attempts=1)', '"once": RetryPolicy(maximum_attempts=3)', None),
    # Jitter could not be seen if it were there.
    ("RT-01", "lab.random.uniform(2.5, 4.5)", "3.5", None),
    # With jitter, the limit would be gone: nothing but the measurement caps the stars.
    ("RT-01", 'herd(lab, "equal", [0] * HERD)', 'herd(lab, "equal", asked)', 5),
    # No heartbeat timeout: the stall is never noticed.
    ("RT-02", "Limits(30, heartbeat=1)", "Limits(30)", 1),
    # Another clock than the one that is asked for.
    ("RT-02", "Limits(schedule_to_close=1)", "Limits(start_to_close=1)", 1),
    # One attempt only: nothing is bounded together.
    ("RT-02", "schedule_to_close=4, attempts=0", "schedule_to_close=4, attempts=1", 3),
    # The clock that begins anew, where the one for the whole chain belongs.
    ("RT-02", "execution=bound", "run=bound", 3),
    # No room to spare.
    ("RT-02", '"start-to-close 30 s": Limits(start_to_close=30)', '"30 s": Limits(start_to_close=1)', None),
    # A breaker that does not close when the service is back.
    ("RT-03", "self.circuit.failures = 0\n", "pass\n", 1),
    # The callers of the control go through the breaker, too; there is none.
    ("RT-03", "None if direct else self.id", "self.id", None),
    # The details are there, and nobody reads them.
    ("RT-04", "if info.heartbeat_details else 0", "if False else 0", 1),
    # The activity to be cancelled does not heartbeat.
    ("RT-04", 'Batch(lab.file("cancelled"), stays_at=2)', 'Batch(lab.file("cancelled"), stalls_at=2, beats=False)', 3),
    # The activity that must not hear of its cancellation does heartbeat.
    ("RT-04", 'Batch(lab.file("deaf"), stalls_at=2, beats=False)', 'Batch(lab.file("deaf"), stays_at=2)', None),
    # Details that are sent at once are not lost.
    ("RT-04", 'killed_after_heartbeats(lab, "unsent")', 'killed_after_heartbeats(lab, "unsent", **OFTEN)', 5),
]


@pytest.mark.parametrize(("item", "old", "new", "stars"), FALLS)
def test_the_verdict_falls(tmp_path: Path, item: str, old: str, new: str, stars: int | None) -> None:
    verdicts = evaluate(changed(SCRIPT, tmp_path, (old, new)), tmp_path, item)
    assert verdicts.stars(item) == stars, verdicts.out
    assert verdicts.code == (1 if stars is None or (item == "RT-01" and stars < 4) else 0)


# RT-03 cannot have more than three stars, so that the stars do not show the fall of what would be the fourth:
# (text in the script, what stands there instead, words of the evidence that must not hold then).
FALLS_UNSEEN = [
    # Nobody counts the calls that are under way.
    ("return self.calling == 0 or self.circuit", "return True or self.circuit", "concurrent callers"),
    # A window that is over at once, where the state of the breaker should last over the kills.
    ("Circuit(threshold=3, window=3600)", "Circuit(threshold=3, window=0)", "two kills"),
    # A new run that begins with an empty state.
    ("workflow.continue_as_new(self.circuit)", "workflow.continue_as_new(Circuit(window=3600))", "continues as new"),
]


@pytest.mark.parametrize(("old", "new", "words"), FALLS_UNSEEN)
def test_the_evidence_falls(tmp_path: Path, old: str, new: str, words: str) -> None:
    verdicts = evaluate(changed(SCRIPT, tmp_path, (old, new)), tmp_path, "RT-03")
    fallen = [one["claim"] for one in verdicts.evidence("RT-03", "holds") if not one["held"]]
    assert verdicts.stars("RT-03") == 3, verdicts.out
    assert any(words in claim for claim in fallen), verdicts.out
