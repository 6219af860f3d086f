"""Script 10 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

import shutil
from pathlib import Path

import pytest
from helpers import ROOT, changed, check_whole, evaluate

SCRIPT = ROOT / "10_dx_developer_experience.py"
TYPESCRIPT = ROOT / ".typescript"
PREPARED = bool(shutil.which("node")) and (TYPESCRIPT / "node_modules" / "@temporalio" / "worker").is_dir()


def test_the_whole_script(tmp_path: Path) -> None:
    check_whole(evaluate(SCRIPT, tmp_path))


# (item, text in the script, what stands there instead, stars then: None where nothing is proven any more)
FALLS = [
    # One of the slips is none.
    ("DX-01", '"await order.signal(Purchase.approve, 7)"', '"await order.signal(Purchase.approve, str(7))"', 1),
    # The names are no strings: the checker finds the slips of the control too.
    ("DX-01", "slip.by_name}\\n", "slip.typed}\\n", None),
    ("DX-01", "interceptors=[Auditor(ledger)]", "interceptors=[]", 3),
    # The update answers something else than it should.
    ("DX-02", "        return len(self.names)\n", "        return 0\n", 1),
    # What is pickled is said to be JSON: nobody can tell that it is not meant for them.
    ("DX-02", '"encoding": b"binary/python-pickle"', '"encoding": b"json/plain"', None),
    # Nothing keeps the program from the network.
    ("DX-03", "library.unshare(CLONE_NEWUSER | CLONE_NEWNET)", "library.unshare(0)", 3),
    ("DX-03", "lab.private_server(file=file)", "lab.private_server()", 3),
    # The real activity where the mocked one belongs.
    ("DX-04", "run_dunning(env, mocked, send_reminder_mocked)", "run_dunning(env, mocked, send_reminder)", 3),
    # A day is not thirty.
    ("DX-04", "days: int = 30", "days: int = 1", 1),
    # A mistake is not named by the message that is expected.
    ("DX-05", '"7 is too many",\n        (HISTORY, LOG)', '"8 is too many",\n        (HISTORY, LOG)', 1),
    # The corrected twin does not end as it should.
    ("DX-05", 'raise ApplicationError(f"{pieces} is', 'raise ApplicationError(f"{pieces + 1} is', None),
    ("DX-05", 'type="CardRefused", ', "", 3),
    # One compensation is forgotten, in the plain program alone.
    (
        "DX-06",
        "for what in reversed(booked[:-1]):\n            await act_plainly",
        "for what in []:\n            await act_plainly",
        1,
    ),
    # The plain program is not killed where it should be.
    ("DX-06", "await plain.kill()", "await plain.kill()\n        note(lost.ledger, 'cancel flight')", None),
    # The breaking change does not break.
    (
        "DX-07",
        '            await workflow.sleep(1)\n            await on_parcel(shipment, "wrap")',
        '            await on_parcel(shipment, "wrap")',
        1,
    ),
    # Damage that is none.
    ("DX-07", "text[: len(text) // 2]", "text", 3),
]


@pytest.mark.all
@pytest.mark.parametrize(("item", "old", "new", "stars"), FALLS)
def test_the_verdict_falls(tmp_path: Path, item: str, old: str, new: str, stars: int | None) -> None:
    script = changed(SCRIPT, tmp_path, (old, new))
    if PREPARED:
        (tmp_path / TYPESCRIPT.name).symlink_to(TYPESCRIPT)
    verdicts = evaluate(script, tmp_path, item)
    assert verdicts.stars(item) == stars, verdicts.out
    assert verdicts.code == (1 if stars is None else 0)
