"""Script 06 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ROOT, Fall, changed, check_falls, check_whole, evaluate, in_runs, name_of_run

SCRIPT = ROOT / "06_cp_compensation.py"


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path)
    check_whole(verdicts)
    assert verdicts.stars("CP-01") == 3, "the limit of three is the only thing between a saga and four stars"
    held = [one["held"] for kind in ("works", "holds", "control", "limit") for one in verdicts.evidence("CP-01", kind)]
    assert held == [True] * 20


REGISTER = "                saga.register(service, partial(undo, order))\n"
STEP = "                await book(order)\n"

FALLS = [
    # Undone in the order in which it was done.
    Fall("CP-01", "in reversed(self.steps)", "in self.steps", None, ["the third step is refused"]),
    # Undoing that runs whether or not anything failed.
    Fall("CP-01", "if error is None or isinstance", "if isinstance", None, ["when all goes well"]),
    # Undoing that runs when the work goes on in a new run.
    Fall("CP-01", " or isinstance(error, workflow.ContinueAsNewError)", "", 3, ["continue-as-new inside the block"]),
    # No car is ever refused: nothing was to be undone.
    Fall("CP-01", 'no_car = refuse("book", service="car", ', 'no_car = refuse("book", service="boat", ', None),
    # Were there a saga in the SDK, the cap of three would be gone.
    Fall("CP-01", '"saga|compensat"', '"signal"', 4, ["no saga construct"]),
    # The undoing is not shielded: the cancellation ends it.
    Fall("CP-01", "await asyncio.shield(undoing)", "await undoing", 3, ["cancelled while it is undone"]),
    # What was begun is only registered once it is known to be done.
    Fall("CP-01", REGISTER + STEP, STEP + REGISTER, None, ["a step that timed out"]),
    # The undoing has no retries.
    Fall(
        "CP-01", "summary=order.service, start_to_close_timeout=timedelta(seconds=30)\n",
        "summary=order.service, start_to_close_timeout=timedelta(seconds=30),\n"
        "        retry_policy=RetryPolicy(maximum_attempts=1),\n", 3, ["retried until it succeeds", "worker killed"],
    ),
    # One undoing that fails for good ends all.
    Fall("CP-01", "left.append(f\"{name} ({error.cause})\")", "raise", 3, ["does not stop the others"]),
    # A provider that does not know its keys books the undoing of every attempt.
    Fall("CP-01", "self.books.reverse(key)", "self.books.reverse(key), self.books.reverse(key + '/')", 3),
    # A provider that forgets what was undone before it was booked.
    Fall("CP-01", "if not self.books.book(key, PRICES[service]):", "if self.books.enter(key, PRICES[service]):", 3,
         ["comes after its own undoing"]),
]  # fmt: skip


@pytest.mark.all
@pytest.mark.parametrize("falls", in_runs(FALLS), ids=name_of_run)
def test_a_verdict_falls(tmp_path: Path, falls: Sequence[Fall]) -> None:
    check_falls(SCRIPT, tmp_path, falls)


# (item, text in the script, what stands there instead, stars then: None where nothing is proven any more)
OLD_FALLS = [
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


@pytest.mark.parametrize(("item", "old", "new", "stars"), OLD_FALLS)
def test_the_verdict_falls(tmp_path: Path, item: str, old: str, new: str, stars: int | None) -> None:
    verdicts = evaluate(changed(SCRIPT, tmp_path, (old, new)), tmp_path, item)
    assert verdicts.stars(item) == stars, verdicts.out
    assert verdicts.code == (1 if stars is None else 0)
