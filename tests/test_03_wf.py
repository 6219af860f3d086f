"""Script 03 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from pathlib import Path

import pytest
from helpers import ROOT, changed, check_whole, evaluate

SCRIPT = ROOT / "03_wf_workflow_primitives.py"


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path)
    check_whole(verdicts)
    # Each limit of the platform is still there: one that is no longer seen has been mended.
    assert [one["held"] for one in verdicts.evidence("WF-05", "limit")] == [True]
    # The third, the burst of a rate limit, is only seen where the worker is fast enough to take it.
    assert [one["held"] for one in verdicts.evidence("WF-06", "limit")].count(True) >= 2


# (item, text in the script, what stands there instead, stars then: None where nothing is proven any more)
FALLS = [
    # The local step becomes an ordinary one: six events of history instead of one, and no marker.
    ("WF-01", "workflow.execute_local_activity(async_step", "workflow.execute_activity(async_step", 2),
    # A standalone activity that does not fail shows no retry.
    ("WF-01", "failures=2", "failures=0", 2),
    # Two definitions that are no longer at odds are not refused.
    ("WF-01", '@activity.defn(name="async_step")', '@activity.defn(name="another_step")', 3),
    # A decorated function is refused by nobody.
    ("WF-01", "async def undecorated", "@activity.defn\nasync def undecorated", None),
    # Every child is terminated, whatever policy its parent was given: nobody is left to be relieved.
    ("WF-02", "parent_close_policy=policy", "parent_close_policy=ParentClosePolicy.TERMINATE", None),
    # The failure loses its type on the way.
    ("WF-02", 'type="OutOfStock", ', "", 2),
    # The third generation is not told of the cancel: its parent lets go of it.
    ("WF-02", 'id=f"{me}-child")\n            else', 'id=f"{me}-child", cancellation_type='
     "workflow.ChildWorkflowCancellationType.ABANDON)\n            else", 3),
    # One after the other is not parallel.
    ("WF-03", "return await asyncio.gather(*(do_job(job) for job in jobs))", "return [await do_job(j) for j in jobs]",
     1),
    # The others are not kept but given up with the first failure.
    ("WF-03", ", return_exceptions=True", "", None),
    # A semaphore with room for all bounds nothing.
    ("WF-03", "asyncio.Semaphore(at_once)", "asyncio.Semaphore(100)", 3),
    # Parallel work in the control is no control.
    ("WF-03", "return [await do_job(job) for job in jobs]", "return await asyncio.gather(*map(do_job, jobs))", None),
    # Light parcels go by freight too.
    ("WF-04", "if grams > 20_000", "if grams > 0", 1),
    # The new run begins without the sum of the old one.
    ("WF-04", "continue_as_new(tally)", "continue_as_new(Tally(tally.ledger, tally.upto, tally.number))", 3),
    # The process is not killed, and its sleep is not gone.
    ("WF-05", "        await program.kill()\n        async with lab", "        async with lab", None),
    # A timer that is over when it is set did not wait.
    ("WF-05", "workflow.sleep(seconds) for seconds in naps", "workflow.sleep(seconds / 2) for seconds in naps", 1),
    # The schedule keeps running while it should be paused.
    ("WF-05", "        await pause(handle, ledger)\n", "", 3),
    # Twice the places.
    ("WF-06", "max_concurrent_activities=4)", "max_concurrent_activities=8)", 2),
    # Urgent and routine work have the same priority.
    ("WF-06", "Priority(priority_key=1)", "Priority(priority_key=5)", 3),
    # The tenants share one key.
    ("WF-06", "Priority(fairness_key=name)", 'Priority(fairness_key="all")', 3),
]  # fmt: skip


@pytest.mark.parametrize(("item", "old", "new", "stars"), FALLS)
def test_the_verdict_falls(tmp_path: Path, item: str, old: str, new: str, stars: int | None) -> None:
    verdicts = evaluate(changed(SCRIPT, tmp_path, (old, new)), tmp_path, item)
    assert verdicts.stars(item) == stars, verdicts.out
    assert verdicts.code == (1 if stars is None else 0)
