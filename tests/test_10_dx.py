"""Script 10 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from harness.systems import SYSTEMS, prepared

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ROOT, Fall, check_falls, check_whole, evaluate, in_runs, name_of_run

SCRIPT = ROOT / "10_dx_developer_experience.py"
LANGUAGES = ("java", "go", "typescript")


def test_the_whole_script(tmp_path: Path) -> None:
    check_whole(evaluate(SCRIPT, tmp_path))


@pytest.mark.all
def test_where_no_other_language_is_prepared_only_its_pieces_are_not_run(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path, "DX-02", env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    missing = [one["measured"] for one in verdicts.evidence("DX-02", "holds")]
    assert len(missing) == 3
    assert all(f"`uv run cluster.py prepare --with {','.join(LANGUAGES)}`" in one for one in missing)
    assert verdicts.stars("DX-02") == 3
    assert all(one["held"] for one in verdicts.evidence("DX-02", "works"))
    assert verdicts.code == 0


@pytest.mark.all
def test_one_prepared_language_is_enough_and_the_others_are_named(tmp_path: Path) -> None:
    if not prepared("go")[0]:
        pytest.skip(prepared("go")[1][0])
    cache = tmp_path / "cache" / "temporal-example"
    cache.mkdir(parents=True)
    (cache / SYSTEMS["go"].folder.name).symlink_to(SYSTEMS["go"].folder)
    verdicts = evaluate(SCRIPT, tmp_path, "DX-02", env={"XDG_CACHE_HOME": str(cache.parent)})
    assert verdicts.stars("DX-02") == 5, verdicts.out
    for one in verdicts.evidence("DX-02", "holds"):
        assert "prepare --with java" in one["measured"]
        assert "prepare --with typescript" in one["measured"]


FALLS = [
    # One of the slips is none.
    Fall("DX-01", '("await order.signal(Purchase.approve, 7)"', '("await order.signal(Purchase.approve, str(7))"', 1,
         ["refuses each slip"]),
    # The names are no strings: the checker finds the slips of the control too.
    Fall("DX-01", "{by_name(call)}", "{call}", None, ["names as strings"]),
    Fall("DX-01", "interceptors=[Audit(tell)]", "interceptors=[]", 3, ["a plugin of under 20 lines"]),
    Fall("DX-01", "interceptors=[Audit(audit.append)]", "interceptors=[]", 3, ["an interceptor of under 20 lines"]),
    # The model forbids something else.
    Fall("DX-01", '["pieces"] = -3', '["price"] = "dear"', 3, ["refused by the model's own message"]),
    # The run that got a forbidden value is not left hanging.
    Fall("DX-01", "        seen = await look_at(shop, bad.id)\n        await bad.terminate()\n",
         "        await bad.terminate()\n        seen = await look_at(shop, bad.id)\n", 4, ["does not fail: it hangs"]),
    # The control's client has the converter.
    Fall("DX-01", "await lab.client.start_workflow(Purchase.run, BASKET",
         "await shop.start_workflow(Purchase.run, BASKET", None, ["without pydantic_data_converter"]),
    # The update answers something else than it should.
    Fall("DX-02", "        return len(self.names)\n", "        return 0\n", 1, ["a Go client", "plain HTTP"]),
    # What is pickled is said to be JSON: nobody can tell that it is not meant for them.
    Fall("DX-02", '"encoding": b"binary/python-pickle"', '"encoding": b"json/plain"', None),
    # Nothing keeps the program from the network.
    Fall("DX-03", "library.unshare(CLONE_NEWUSER | CLONE_NEWNET)", "library.unshare(0)", 3,
         ["any network but loopback"]),
    Fall("DX-03", "lab.private_server(file=True) as filed", "lab.private_server() as filed", 3, ["with a file"]),
    Fall("DX-03", "lab.private_server() as bare", "lab.private_server(file=True) as bare", None, ["without one"]),
    # The debugger is held up in a worker that is in no debug mode.
    Fall("DX-03", '"debugged", debug=True', '"debugged", debug=False', 3, ["debug mode"]),
    # The workflow task runs out while somebody thinks: it is tried again, and stops once more.
    Fall("DX-03", "task_queue=queue, task_timeout=PATIENT)\n\n    async def stopped",
         "task_queue=queue, task_timeout=timedelta(seconds=1))\n\n    async def stopped", None),
    Fall("DX-03", 'greet(name: str) -> str:\n    return f"Hello', 'greet(name: str) -> str:\n    return f"Bye', 1,
         ["from nothing"]),
    # The real activity where the mocked one belongs.
    Fall("DX-04", "Mailed(mocked).mock", "Mailed(mocked).send", 3, ["mocked by registering"]),
    # A day is not thirty.
    Fall("DX-04", "days: int = 30", "days: int = 1", 1, ["a 30-day wait", "the same 30 days"]),
    Fall("DX-04", 'activity.heartbeat(f"tidied', 'activity.heartbeat(f"stopped', 3, ["tested alone"]),
    # A test server that has schedules.
    Fall("DX-04", 'return f"{error.status.name}: {error.message}"', 'return "created"', 4, ["legacy one"]),
    # A mistake is not named by the message that is expected.
    Fall("DX-05", 'raise ValueError(f"{pieces} is too many")', 'raise ValueError(f"{pieces} are too many")', 2,
         ["named by a message"]),
    # The corrected twin does not end as it should, and shows that.
    Fall("DX-05", 'raise ApplicationError(f"{pieces} is', 'raise ApplicationError(f"{pieces + 1} is', None,
         ["shows nothing anywhere"]),
    # The worker polls the queue on which the run waits.
    Fall("DX-05", 'Setting(Doubling, queue="-typo")', "Setting(Doubling)", 2, ["on another task queue"]),
    # What is told of pending activities is not looked at.
    Fall("DX-05", 'if one.HasField("last_failure")', "if not one.activity_type.name", 3, ["at every place"]),
    # The signal is not misspelt.
    Fall("DX-05", 'Setting(WaitsForGo, signal="goo")', 'Setting(WaitsForGo, signal="go")', 4, ["misspelt signal"]),
    # The neighbour's worker does not block, and the control's does.
    Fall("DX-05", 'beside(lab, "loop", call_in_the_loop', 'beside(lab, "loop", call_in_a_thread', 4,
         ["a blocking call in an async activity"]),
    Fall("DX-05", '"thread", call_in_a_thread', '"thread", call_in_the_loop', None, ["the same call in a thread"]),
    Fall("DX-05", "await asyncio.gather(self.approval(), self.cooling())", "await self.approval()", 3,
         ["stack-trace query"]),
    Fall("DX-05", 'type="CardRefused", ', "", 3, ["cause chain"]),
    # One compensation is forgotten.
    Fall("DX-06", "for what in reversed(booked):\n                await",
         "for what in booked[:1]:\n                await", 1, ["do the same", "after the kill of its worker"]),
    # The step that was cut off is not tried again.
    Fall("DX-06", "Booking.book, what, start_to_close_timeout=patience)",
         "Booking.book, what, start_to_close_timeout=patience, retry_policy=RetryPolicy(maximum_attempts=1))", 3,
         ["after the kill of its worker"]),
    # The plain program is not started again.
    Fall("DX-06", "    open_gate(lost.gate)\n    async with lab.process(book_in_a_process, lost) as plain:\n"
         "        await plain.wait()\n", "", None, ["begins anew"]),
    # No message speaks of determinism: nothing else caps it at three.
    Fall("DX-06", r'r"(?i)\w*determinis\w*"', r'r"no such word"', 4, ["determinism must be understood"]),
    # DBOS takes as many lines.
    Fall("DX-06", "ours > lines_on_dbos()", "ours > 3 * lines_on_dbos()", 3, ["on DBOS"]),
    # The breaking change does not break.
    Fall("DX-07", '            await workflow.sleep(1)\n            await on_parcel(shipment, "wrap")',
         '            await on_parcel(shipment, "wrap")', 1, ["a breaking change is found", "replayed at once"]),
    # Damage that is none.
    Fall("DX-07", "text[: len(text) // 2]", "text", 3, ["as people download them"]),
    # The lesson does not look for payloads that were decoded, or for the order of events.
    Fall("DX-07", "if decoded(events):", "if not events:", 3, ["as people download them"]),
    Fall("DX-07", "if ids[-1] == 1 < ids[0]:", "if not text:", 3,
         ["as people download them"]),
    # The control replays the change.
    Fall("DX-07", "make_replayer(Shipping), text) for name, text in exports",
         "make_replayer(GiftsWrappedLater), text) for name, text in exports", None, ["unchanged code"]),
    Fall("DX-07", "p 'recorded', packed", "p 'recorded', shipment", 3, ["under a debugger"]),
    # A replay that sees arguments.
    Fall("DX-07", 'packed = await on_parcel(shipment, "throw away")', "packed = str(await workflow.sleep(1))", 4,
         ["told to do"]),
]  # fmt: skip
if prepared(*LANGUAGES)[0]:
    FALLS += [
        # Python's child does something else than is expected of it, abroad.
        Fall("DX-02", 'f"permit for {crate.pieces}"', 'f"permit for {crate.article}"', 3, ["works with Python"]),
        # Python's failure is of another type.
        Fall("DX-02", 'type="Nameless"', 'type="Unnamed"', 3, ["knows by its type"]),
        # Nothing is asked for that the other language would refuse.
        Fall("DX-02", "replace(order.crate, pieces=0),\n                task_queue",
             "replace(order.crate, pieces=1),\n                task_queue", 3, ["knows by its type"]),
        # What only Python reads is not sent abroad.
        Fall("DX-02", "pickled = await connect(server.target, data_converter=PICKLED)",
             "pickled = await connect(server.target)", 3, ["fails clearly in its activity"]),
    ]  # fmt: skip


@pytest.mark.hours
@pytest.mark.parametrize("falls", in_runs(FALLS), ids=name_of_run)
def test_a_verdict_falls(tmp_path: Path, falls: Sequence[Fall]) -> None:
    (tmp_path / "comparison").mkdir()
    shutil.copy(ROOT / "comparison" / "trip_on_dbos.py", tmp_path / "comparison")
    check_falls(SCRIPT, tmp_path, falls)
