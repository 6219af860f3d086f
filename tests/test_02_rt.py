"""Script 02 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ROOT, Fall, check_falls, check_whole, evaluate, in_runs, name_of_run

SCRIPT = ROOT / "02_rt_retry_timeout.py"


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path)
    check_whole(verdicts)
    assert [item for item, one in verdicts.items.items() if one["fail_closed"]] == ["RT-01"]
    # Under a cap a lost piece does not show in the stars.
    gone = [one["claim"] for item in verdicts.items.values() for one in item["evidence"] if one["held"] is False]
    assert gone == []


FALLS = [
    # One attempt is all that the lesson's policy allows.
    Fall("RT-01", "maximum_attempts=10,", "maximum_attempts=1,", 1, ["the third succeeds"]),
    # The intervals do not grow.
    Fall("RT-01", "backoff_coefficient=4", "backoff_coefficient=1", 3, ["grow by the coefficient"]),
    # Attempts that come too early, too late, and beyond the cap: by the ledger, not as the server announces them.
    Fall("RT-01", "timedelta(seconds=0.5), backoff", "timedelta(seconds=0.1), backoff", 3, ["grow by the coefficient"]),
    Fall("RT-01", "timedelta(seconds=0.5), backoff", "timedelta(seconds=1.9), backoff", 3, ["grow by the coefficient"]),
    Fall("RT-01", "maximum_interval=timedelta(seconds=2.5)", "maximum_interval=timedelta(seconds=4)", 3,
         ["grow by the coefficient"]),
    # A machine on which equal gaps come too late to tell.
    Fall("RT-01", ".append(next_one - call.at)",
         ".append(next_one - call.at + 9)", None),
    # The policy does not name the error that must not be retried.
    Fall("RT-01", 'non_retryable_error_types=["CardDeclined"],', "non_retryable_error_types=[],", 3,
         ["whose type the policy lists"]),
    # The error does not say itself that no retry can help.
    Fall("RT-01", 'type="BadRequest", non_retryable=True', 'type="BadRequest"', 3, ["says itself"]),
    # One attempt less than was said, and none is left for the worker that comes after the kill.
    Fall("RT-01", "maximum_attempts=4)", "maximum_attempts=2)", 3, ["until the attempts are used up", "worker killed"]),
    # An error that asks for a shorter wait.
    # One that does not ask, so that the policy alone decides.
    Fall("RT-01", "next_retry_delay=delay)", ")", None, ["overrides the policy"]),
    Fall("RT-01", "busy = Answer(429, retry_after=1.5)", "busy = Answer(429, retry_after=0.2)", 3,
         ["overrides the policy"]),
    # A workflow without a policy of its own.
    Fall("RT-01", "[DECLINED, DECLINED, OK], retry_policy=policy)", "[DECLINED, DECLINED, OK])", 3,
         ["the workflow as a whole"]),
    # The control may retry, too.
    Fall("RT-01", '"once": RetryPolicy(maximum_attempts=1)', '"once": RetryPolicy(maximum_attempts=3)', None),
    # Jitter could not be seen if it were there.
    Fall("RT-01", "random.uniform(1, 2)", "1.5", None),
    # With jitter, the limit would be gone: nothing but the measurement caps the stars.
    Fall("RT-01", 'herd(desk, "equal", "flat", DOWN)', 'herd(desk, "equal", "long", Answer(429, retry_after=2))', 5,
         ["have no jitter"]),
    # No heartbeat timeout: the silence is never noticed.
    Fall("RT-02", "heartbeat_timeout=span(limits.heartbeat)", "heartbeat_timeout=None", 2, ["falls silent"]),
    # No limit to the wait for a worker.
    Fall("RT-02", "schedule_to_start_timeout=span(limits.schedule_to_start)", "schedule_to_start_timeout=None", 2,
         ["no worker takes"]),
    # Clocks that are fast.
    Fall("RT-02", "clock.set(bound, nobody)", "clock.set(bound / 2, nobody)", 1,
         ["takes too long:", "too long together", "no worker takes", "falls silent"]),
    # No room to spare.
    Fall("RT-02", "FAR = 300.0", "FAR = 1.0", None),
    # One attempt only: nothing is bounded together.
    Fall("RT-02", "schedule_to_close=4 * short, attempts=0", "schedule_to_close=4 * short, attempts=1", 3,
         ["bounds all attempts"]),
    # The clock that begins anew, where the one for the whole chain belongs.
    Fall("RT-02", '"bounded", length, "execution_timeout"', '"bounded", length, "run_timeout"', 3,
         ["bounds the whole chain"]),
    # The clock for workflow tasks is the default one.
    Fall("RT-02", 'task_queue=queue, task_timeout=bound)', "task_queue=queue)", 3, ["inside a workflow task"]),
    # A clock that runs fast where no worker lives.
    Fall("RT-02", "Limits(start_to_close=bound.total_seconds())", "Limits(start_to_close=1)", 3, ["no worker alive"]),
    # The late answer of the worker that was stopped is the one that is taken.
    Fall("RT-02", 'hall.press("the second")', 'hall.press("the first")', 3, ["was stopped until"]),
    # The archive does not know its keys.
    Fall("RT-02", "self.books.enter(key, 1)", 'self.books.enter(f"{key}/{uuid.uuid4()}", 1)', 3, ["count once"]),
    # The archive of the control does.
    Fall("RT-02", 'super().store(f"{key}/{uuid.uuid4()}", pages)', "super().store(key, pages)", None),
    # The attempt that was given up heartbeats, is told, and does not come to its end.
    Fall("RT-02", "await hall.held(name, limits, pages=0)", "await hall.held(name, limits, pages=50)", None,
         ["is not stopped", "count once", "knows no keys"]),
    # An attempt without heartbeats that has a retry beside it.
    Fall("RT-02", "Limits(start_to_close=short))", "Limits(start_to_close=short, attempts=2))", 3,
         ["cancelled by its own worker"]),
    # There is no second attempt for the one that heartbeats to go on beside.
    Fall("RT-02", "heartbeat=short, attempts=2)", "heartbeat=short, attempts=1)", 4, ["one that heartbeats"]),
    # A breaker that does not close when the service is back.
    Fall("RT-03", "self.circuit.failures = 0\n", "pass\n", 1, ["opens after 3 failures"]),
    # Nobody counts the calls that are under way.
    Fall("RT-03", "return self.calling == 0 or self.circuit", "return True or self.circuit", 3, ["concurrent callers"]),
    # A window that is over at once, where the state of the breaker should last over the kills.
    Fall("RT-03", "await shop.open(3, 3600)\n    shop.turn(down=True)\n    told", "await shop.open(3, 0)\n"
         "    shop.turn(down=True)\n    told", 3, ["two kills"]),
    # A new run that begins with an empty state.
    Fall("RT-03", "workflow.continue_as_new(self.circuit)", "workflow.continue_as_new(Circuit(window=3600))", 3,
         ["breaker that continues as new"]),
    # Requests told apart by ids that come again in every run.
    Fall("RT-03", 'f"{purchase.order}/{activity.info().workflow_run_id}"',
         'f"{activity.info().workflow_id}/{activity.info().activity_id}"', 3, ["served for each order"]),
    # The control's ids do not come again.
    Fall("RT-03", 'f"{activity.info().workflow_id}/{activity.info().activity_id}"',
         'f"{activity.info().workflow_run_id}/{activity.info().activity_id}"', None),
    # The callers of the control go through the breaker, too; there is none.
    Fall("RT-03", "shop.buy_together(CALLERS, BuyDirectly.run)", "shop.buy_together(CALLERS)", None),
    # What the service answered is asked for again and again.
    Fall("RT-03", 'non_retryable_error_types=["ServiceDown", "CircuitOpen"]', "non_retryable_error_types=[]", None),
    # The details are there, and nobody reads them.
    Fall("RT-04", "if details else 0", "if False else 0", None, ["a stalled activity", "behind the last details"]),
    # The heartbeat comes before the work that it tells of.
    Fall("RT-04", '        self.stock.put(f"{batch.name}/{item}")\n        activity.heartbeat(item)  #',
         '        activity.heartbeat(item)\n        self.stock.put(f"{batch.name}/{item}")  #', 1,
         ["a stalled activity", "none is left out"]),
    # The activity to be cancelled does not heartbeat.
    Fall("RT-04", 'Batch("heard", MANY), name="heard")', 'Batch("heard", MANY), name="heard", task_queue=deaf_queue)',
         3, ["a cancellation reaches"]),
    # The activity that must not hear of its cancellation does heartbeat.
    Fall("RT-04", "**dock.parts(Mute), task_queue=deaf_queue", "**dock.parts(), task_queue=deaf_queue", None),
    # Nobody outside gives a sign of life.
    Fall("RT-04", 'await task.heartbeat(f"{pages} pages read")', "pass", 3, ["another process completes"]),
    # Details that are sent at once are not lost.
    Fall("RT-04", 'del parts["max_heartbeat_throttle_interval"]', "pass", 4, ["details reported shortly"]),
    # The call that blocks does so in a thread.
    Fall("RT-04", "call_in_the_loop, given_up", "call_in_a_thread, given_up", 4, ["a blocking call"]),
    # The one in a thread does so in the loop.
    Fall("RT-04", '"beside-a-thread", call_in_a_thread', '"beside-a-thread", call_in_the_loop', None),
]  # fmt: skip


@pytest.mark.hours
@pytest.mark.parametrize("falls", in_runs(FALLS), ids=name_of_run)
def test_a_verdict_falls(tmp_path: Path, falls: Sequence[Fall]) -> None:
    check_falls(SCRIPT, tmp_path, falls)
