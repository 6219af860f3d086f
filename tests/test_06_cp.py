"""Script 06 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ROOT, Fall, check_falls, check_whole, evaluate, in_runs, name_of_run

SCRIPT = ROOT / "06_cp_compensation.py"


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path)
    check_whole(verdicts)
    assert verdicts.stars("CP-01") == 3, "the limit of three is the only thing between a saga and four stars"
    held = [one["held"] for kind in ("works", "holds", "control", "limit") for one in verdicts.evidence("CP-01", kind)]
    assert held == [True] * 22


REGISTER = "                saga.register(service, partial(undo, order))\n"
STEP = "                await book(order)\n"
ASK = "                stop_if_cancelled()\n"
WAIT = "        cancellation_type=ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,\n"
WHERE_BOOKED = "key.rpartition('/')[2]"

FALLS = [
    # Undone in the order in which it was done.
    Fall("CP-01", "in reversed(self.steps)", "in self.steps", None, ["the third step is refused"]),
    # Undoing that runs whether or not anything failed.
    Fall("CP-01", "if error is None or isinstance", "if isinstance", 2, ["when all goes well"]),
    # Undoing that runs when the work goes on in a new run.
    Fall("CP-01", " or isinstance(error, workflow.ContinueAsNewError)", "", 3, ["continue-as-new inside the block"]),
    # No car is refused where nothing is compensated: nothing was to be undone.
    Fall("CP-01", 'ALL, [300, 200], faults=[no_car], without="compensation"', 'ALL, [300, 200], without="compensation"',
         None, ["without compensation"]),
    # Were there a saga in the SDK, the cap of three would be gone.
    Fall("CP-01", '"saga|compensat"', '"signal"', 4, ["no saga construct"]),
    # The undoing is not shielded: the cancellation ends it.
    Fall("CP-01", "await asyncio.shield(undoing)", "await undoing", 3, ["cancelled while it is undone"]),
    # What was begun is only registered once it is known to be done.
    Fall("CP-01", REGISTER + STEP, STEP + REGISTER, None,
         ["a step that timed out", "the first step is refused", "the second step is refused", "in the third step"]),
    # The undoing has no retries.
    Fall(
        "CP-01", "summary=order.service, start_to_close_timeout=timedelta(seconds=30)\n",
        "summary=order.service, start_to_close_timeout=timedelta(seconds=30),\n"
        "        retry_policy=RetryPolicy(maximum_attempts=1),\n", 3, ["retried until it succeeds", "worker killed"],
    ),
    # One undoing that fails for good ends all.
    Fall("CP-01", "left.append(f\"{name} ({error.cause})\")", "raise", 3, ["does not stop the others"]),
    # A provider that does not know its keys books the undoing of every attempt.
    Fall("CP-01", "self.books.reverse(key)", f"self.books.enter(f'{{key}}/{{time.time()}}', -PRICES[{WHERE_BOOKED}])",
         None, ["counts once"]),
    # A provider that forgets what was undone before it was booked.
    Fall("CP-01", "if not self.books.book(key, PRICES[service]):", "if self.books.enter(key, PRICES[service]):", 3,
         ["comes after its own undoing"]),
    # A cancellation does not wait for the booking under way.
    Fall("CP-01", WAIT + "        # One", "        # One", None, ["that is waited for"]),
    # A cancellation that came during a booking is not asked for after it.
    Fall("CP-01", STEP + ASK + '        return "booked"', STEP + '        return "booked"', 3, ["that is waited for"]),
    # The server delivers the second cancellation, too.
    Fall("CP-01", '.count("WorkflowExecutionCancelRequested")', '.count("Workflow")', None, ["drops the second"]),
    # Back to the first step instead of to the fourth.
    Fall("CP-02", "if scheduled.activity_id == activity_id:", "if scheduled.activity_id:", 1, ["reset there"]),
    # The paint never comes: what is reset fails again.
    Fall("CP-02", '    shelf.missing -= {f"{lab.id}-{name}/paint" for name in names}\n', "", None, ["reset there"]),
    # The workflow's code is not mended.
    Fall("CP-02", '([Assembly], task_queue=queue, build_id="mended"', '([AssemblyWithABug], task_queue=queue', 3,
         ["a run that it spoilt", "runs spoilt by a bad build"]),
    # The batch goes back to the beginning instead of to where the bad build took over.
    Fall("CP-02", '"--type", "BuildId", "--build-id", "bad",', '"--type", "FirstWorkflowTask",', 3,
         ["runs spoilt by a bad build"]),
    # One of the signals is there twice.
    Fall("CP-02", "new: list[str] = await resumed.query(Assembly.written)",
         "new: list[str] = [*await resumed.query(Assembly.written), 'a']", 3, ["signals from after the reset point"]),
    # A store that hands out a part at every call.
    Fall("CP-02", "if key not in self.handed_out:", "if key:", 3, ["comes again counts once"]),
    # The twin is helped, too.
    Fall("CP-03", 'stuck(lab, street, "twin")', 'stuck(lab, street, "twin", 0.1)', None, ["twin that nobody touches"]),
    # A workflow without words for intervention: the signal says something else.
    Fall("CP-03", "self.given_up = True", 'self.instead = "office"', 2, ["signal ends a stuck run"]),
    # A workflow that has no last word.
    Fall("CP-03", "            await workflow.execute_activity_method(Tour.take_back, parcel, start_to_close_timeout="
         "timedelta(seconds=30))\n", "", 2, ["cancel, with a last word"]),
    # An update that does not say what came of it.
    Fall("CP-03", 'return f"goes to {address}"', 'return "yes"', 2, ["update, which answers"]),
    # An update for which there is no validator.
    Fall("CP-03", 'raise ValueError(f"it goes to {self.address}: name another address")', "return", 3,
         ["refused by its validator"]),
    # What is asked for comes first, and then what came of the attempt.
    Fall("CP-03", "            self.outcome = await attempts\n",
         "            if self.instead:\n"
         "                raise ActivityError('', scheduled_event_id=0, started_event_id=0, identity='',\n"
         "                    activity_type='', activity_id='', retry_state=None)\n"
         "            self.outcome = await attempts\n", 3, ["in the same workflow task", "an attempt is under way"]),
    # Nobody waits for the attempt under way.
    Fall("CP-03", f"    {WAIT}", "", 3, ["while an attempt is under way"]),
    # Attempts are made while it is paused.
    Fall("CP-03", "before, other_before = len(paused.calls), len(other.calls)",
         "before, other_before = 0, len(other.calls)", 3, ["pause stops the attempts"]),
    # Nothing is carried over from the attempt that was paused.
    Fall("CP-03", "done = int(details[0]) if details else 0", "done = 0", 3, ["pause reaches an attempt"]),
    # Somebody else's name in the history.
    Fall("CP-03", "me, reset_by = lab.client.identity,", 'me, reset_by = "x",', 3, ["the history says who"]),
    # The command line says another name than the operator's.
    Fall("CP-03", '"--identity", OPERATOR)', '"--identity", "day shift")', 3,
         ["the history says by whom", "it says who paused it", "leave no event"]),
    # The retry is not an hour away: that it comes soon proves nothing.
    Fall("CP-03", '"activity-options")\n', '"activity-options", 60)\n', 3, ["new options take"]),
    Fall("CP-03", '"activity-reset")\n', '"activity-reset", 60)\n', 3, ["tries it again at once"]),
    # The history knows who it really was.
    Fall("CP-03", 'identity="the managing director"', "identity=lab.client.identity", 4, ["takes any name"]),
    # The key is made of the run's id, which a reset changes.
    Fall("CP-04", "self.shop.pay(order.number, order.amount)",
         'self.shop.pay(f"{order.number}/{activity.info().workflow_run_id}", order.amount)', 3, ["is paid twice"]),
    # The control's is not.
    Fall("CP-04", 'f"{order.number}/{workflow.info().run_id}"', "order.number", None, ["a key made of the run's id"]),
    # The addresses are not mended.
    Fall("CP-04", 'shop.unknown.remove("Nowhere")', "pass", 2, ["one batch drives them again"]),
    # The poison item is given up earlier.
    Fall("CP-04", "RetryPolicy(maximum_attempts=3)", "RetryPolicy(maximum_attempts=2)", 3, ["parked after 3 attempts"]),
    # Each item has a limit: none retries for ever.
    Fall("CP-04", "backoff_coefficient=1)\n", "backoff_coefficient=1, maximum_attempts=3)\n", None,
         ["without a limit to its attempts", "stuck in retries"]),
    # The healthy run is stuck, too.
    Fall("CP-04", '("healthy", {"home": "Old Street"})', '("healthy", {})', 3, ["stuck in its own code"]),
    # Every running run counts as stuck.
    Fall("CP-04", "if latest.attempt >= attempts:", "if latest.attempt >= 0:", 3, ["one that waits is not"]),
    # What was driven again stays among the dead letters.
    Fall("CP-04", "if not described.workflow_extended_info.reset_run_id:", "if described:", 2,
         ["one batch drives them again"]),
    # The last failure is not told.
    Fall("CP-04", "str(failure.cause.__cause__ or failure.cause)", "str(failure.cause)", 2, ["lists exactly"]),
]  # fmt: skip


@pytest.mark.hours
@pytest.mark.parametrize("falls", in_runs(FALLS), ids=name_of_run)
def test_a_verdict_falls(tmp_path: Path, falls: Sequence[Fall]) -> None:
    check_falls(SCRIPT, tmp_path, falls)
