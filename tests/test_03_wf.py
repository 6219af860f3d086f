"""Script 03 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ROOT, Fall, check_falls, check_whole, evaluate, in_runs, name_of_run

SCRIPT = ROOT / "03_wf_workflow_primitives.py"


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path)
    check_whole(verdicts)
    # Each limit of the platform is still there: one that is no longer seen has been mended.
    assert [one["held"] for one in verdicts.evidence("WF-02", "limit")] == [True]
    assert [one["held"] for one in verdicts.evidence("WF-05", "limit")] == [True] * 4
    # The third, the burst of a rate limit, is only seen where the worker is fast enough to take it.
    assert [one["held"] for one in verdicts.evidence("WF-06", "limit")].count(True) >= 2
    # A TaskGroup needs an except clause of the user's own: that alone takes WF-03's fifth star.
    assert [one["held"] for one in verdicts.evidence("WF-03", "native")] == [False]


GROUP = "except ExceptionGroup as errors"
NAP = 'Nap.run, [], name="delay", start_delay=timedelta(seconds=1)'

FALLS = [
    # The local step becomes an ordinary one: six events of history instead of one, and no marker.
    Fall("WF-01", "execute_local_activity(price", "execute_activity(price", 3, ["a local one a single event"]),
    # A standalone activity that does not fail shows no retry.
    Fall("WF-01", 'fail("weigh", 2, number=21)', 'fail("weigh", 1, number=21)', 2, ["a standalone activity"]),
    # An activity without the instance that its worker was given.
    Fall("WF-01", 'f"{self.name} takes', 'f"nobody takes', 2, ["async, threaded, method"]),
    # Two definitions that are no longer at odds are not refused.
    Fall("WF-01", '@activity.defn(name="weigh")', '@activity.defn(name="weigh again")', 3, ["bad definition"]),
    # A decorated function is refused by nobody.
    Fall("WF-01", "async def undecorated", "@activity.defn\nasync def undecorated", None, ["without the decorator"]),

    # A server that takes ABANDON for TERMINATE.
    Fall("WF-02", "ParentClosePolicy[policy]}", 'ParentClosePolicy[policy.replace("ABANDON", "TERMINATE")]}', 3,
         ["three parent close policies", "with children open"]),
    # No policy given keeps the child.
    Fall("WF-02", "} if policy else {}", "} if policy else {'parent_close_policy': ParentClosePolicy(3)}", None,
         ["no policy given", "continue-as-new with no policy"]),
    # The failure loses its type on the way.
    Fall("WF-02", 'type="TooHeavy", ', "", 2, ["chain of causes"]),
    # Another result than what was packed.
    Fall("WF-02", 'return f"{shipment.name} packed"', 'return "packed"', 2,
         ["a child's result", "called by Nexus", "outlives its parent's worker"]),
    # The third generation is not told of the cancel: its parent lets go of it.
    Fall("WF-02", 'Tree.run, generations - 1, id=f"{me}/child")', 'Tree.run, generations - 1, id=f"{me}/child", '
         "cancellation_type=workflow.ChildWorkflowCancellationType.ABANDON)", 3, ["three generations"]),
    # The caller lets go of the operation when it is cancelled.
    Fall("WF-02", "shipment, schedule_to_close_timeout=timedelta(days=1))", "shipment, cancellation_type="
         "workflow.NexusOperationCancellationType.ABANDON)", 3, ["a cancel of the caller"]),
    # An operation that answers nonsense.
    Fall("WF-02", "return 2 + shipment.grams // 100", "return 1", 3, ["called by Nexus"]),

    # One after the other is not parallel.
    Fall("WF-03", "return await asyncio.gather(*(resized(one) for one in pictures))\n\n\n@workflow.defn\nclass AllOr",
         "return [await resized(one) for one in pictures]\n\n\n@workflow.defn\nclass AllOr", 1,
         ["all at work at the same moment"]),
    # A task group whose group of errors nobody opens: the run stays open.
    Fall("WF-03", GROUP, "except KeyError as errors", 3, ["fails in a TaskGroup"]),
    # Were a group of errors a failure of the workflow, nothing would be left to build.
    Fall("WF-03", "@workflow.defn\nclass BareGroup", "@workflow.defn(failure_exception_types=[ExceptionGroup])\n"
         "class BareGroup", None, ["a bare TaskGroup"]),
    # The others are not kept but given up with the first failure.
    Fall("WF-03", ", return_exceptions=True", "", 3, ["nine others are kept"]),
    # A semaphore with room for all bounds nothing.
    Fall("WF-03", "asyncio.Semaphore(at_once)", "asyncio.Semaphore(100)", 3, ["a semaphore bounds"]),
    # A batch is forgotten.
    Fall("WF-03", "batch.split(25))", "batch.split(25)[1:])", 3, ["3,000 items"]),
    # Parallel work in the control is no control.
    Fall("WF-03", "return [await resized(one) for one in pictures]",
         "return await asyncio.gather(*map(resized, pictures))", None, ["one after the other"]),
    # A server with another bound.
    Fall("WF-03", "lab.private_server() as server,", 'lab.private_server(settings={"limit.numPendingActivities.error": '
         '"1990"}) as server,', 3, ["2,000 activities open"]),

    # Light parcels go by freight too.
    Fall("WF-04", "if grams > 20_000", "if grams > 0", 1, ["take exactly the right steps", "the same branches"]),
    # The new run begins without the sum of the old one.
    Fall("WF-04", "continue_as_new(tally)", "continue_as_new(Tally(tally.upto, tally.number))", 3, ["500 iterations"]),
    # With a cache the code is run once.
    Fall("WF-04", "max_cached_workflows=0", "max_cached_workflows=100", 3, ["run anew from the history"]),
    # The loop of the control hears the suggestion, too.
    Fall("WF-04", "    return False\n\n\n# Lowered", "    return super().wants_a_new_run()\n\n\n# Lowered", None,
         ["history limit ends the loop"]),

    # The loop does not wait for its child.
    Fall("WF-04", "            if waits:\n", "            if False:\n", 3, ["waits for its child"]),

    # The process is not killed, and its sleep is not gone.
    Fall("WF-05", "        await program.kill()\n", "", None, ["in a killed process"]),
    # A timer that is over when it is set did not wait.
    Fall("WF-05", "workflow.sleep(seconds) for", "workflow.sleep(seconds / 2) for", 1,
         ["no worker is alive", "a server SIGKILL"]),
    # The schedule keeps running while it should be paused.
    Fall("WF-05", "        await handle.pause()\n", "", 3, ["not while paused"]),
    # The start is not delayed.
    Fall("WF-05", NAP, NAP.replace("=1", "=0"), 3, ["start_delay"]),
    # The schedule is looked at instead of deleted.
    Fall("WF-05", "await handle.delete()\n        deleted", "await handle.describe()\n        deleted", 3,
         ["after it is deleted"]),
    # Half as often as asked for.
    Fall("WF-05", "each(seconds=beat())) as handle,", "each(seconds=beat() * 2)) as handle,", 3,
         ["at its interval", "do not drift"]),
    # A good expression among the bad ones.
    Fall("WF-05", '"61 * * * *"', '"1 * * * *"', 3, ["is refused"]),
    # A time that every day has.
    Fall("WF-05", 'daily("2:30"), 2', 'daily("4:30"), 3', 4, ["left out"]),
    Fall("WF-05", 'daily("1:30"), 4', 'daily("0:30"), 3', 4, ["comes twice"]),
    # Every 24 hours is not every day.
    Fall("WF-05", 'daily("12:30"), 3', "each(hours=24), 3", 3, ["keeps its local time"]),
    # Missed actions that the default policy is asked to make up for.
    Fall("WF-05", "overlap=one, client=", "overlap=ScheduleOverlapPolicy.SKIP, client=", 3, ["made up for, each once"]),
    Fall("WF-05", "overlap=one, client=", "overlap=ScheduleOverlapPolicy.ALLOW_ALL, client=", 4, ["are dropped"]),
    # Runs that were begun under another policy do not count as being at work.
    Fall("WF-05", "overlap=ScheduleOverlapPolicy.SKIP, paused=True", "paused=True", 3, ["six overlap policies"]),
    # An hour less is made up for.
    Fall("WF-05", "wanted[0], wanted[-1], len(wanted))", "wanted[0], wanted[-2], 9)", 3, ["a backfill"]),
    # A shorter time than was asked for.
    Fall("WF-05", "signal(Reminder.reset, 1.5)", "signal(Reminder.reset, 1.0)", 3, ["a timer can be reset"]),
    # Half past nine somewhere else.
    Fall("WF-05", 'time_zone_name="Europe/Berlin"', 'time_zone_name="UTC"', 3, ["cron strings"]),

    # Twice the places.
    Fall("WF-06", "max_concurrent_activities=4\n", "max_concurrent_activities=8\n", 2, ["reached and never exceeded"]),
    # A server that gives out twice as fast.
    Fall("WF-06", "(one - known[0]).total_seconds()", "(one - known[0]).total_seconds() / 2.5", 2,
         ["is kept by 60", "set at run time"]),
    # The rate is never set.
    Fall("WF-06", '("slow", str(SLOW))', '("slow", "default")', 3, ["set at run time"]),
    # Urgent and routine work have the same priority.
    Fall("WF-06", "Priority(priority_key=1)", "Priority(priority_key=5)", 3, ["priority keys"]),
    # The tenants share one key.
    Fall("WF-06", "Priority(fairness_key=name)", 'Priority(fairness_key="all")', 3, ["fairness keys"]),
    # Gold weighs no more than bronze.
    Fall("WF-06", "fairness_weight=3)", "fairness_weight=1)", 3, ["fairness weights"]),
    # Where fairness is on, keys are not ignored; with one partition, priority does not leak.
    Fall("WF-06", "settings={**ONE_PARTITION, **FRESH}", "settings={**ONE_PARTITION, **FAIRNESS, **FRESH}", 4,
         ["fairness is off"]),
    Fall("WF-06", "settings=FRESH)", "settings={**ONE_PARTITION, **FRESH})", 4, ["priority leaks"]),
    # The control has priorities, too.
    Fall("WF-06", '"no-priority", URGENT_LAST)', '"no-priority", URGENT_LAST, URGENT)', None, ["with neither"]),
]  # fmt: skip


@pytest.mark.hours
@pytest.mark.parametrize("falls", in_runs(FALLS), ids=name_of_run)
def test_a_verdict_falls(tmp_path: Path, falls: Sequence[Fall]) -> None:
    check_falls(SCRIPT, tmp_path, falls)
