"""Script 08 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from pathlib import Path

import pytest
from helpers import ROOT, changed, check_whole, evaluate

SCRIPT = ROOT / "08_op_operations.py"


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path)
    check_whole(verdicts)
    assert [item for item, one in verdicts.items.items() if one["fail_closed"]] == ["OP-02"]


# OP-01 runs this very script once more, which is not what is to fall here: an answer in its place saves the time.
QUICK = (
    (
        'await run_again(lab, "OP-04", server)',
        '({"items": [{"stars": 4}], "environment": {"where": "given server"}}, 0)',
    ),
    ("and runs > 0", ""),
)

# (item, text in the script, what stands there instead, stars then: None where nothing is proven any more)
FALLS = [
    # The proxy does not ask the client for a certificate.
    ("OP-01", 'tls("temporal.example", mutual=True)', 'tls("temporal.example")', 3),
    # The port that should speak TLS speaks plaintext.
    ("OP-01", 'Proxy(server, certificates.tls("127.0.0.1"))', "Proxy(server)", None),
    # The gateway lets any key pass.
    ("OP-01", 'if header == f"Bearer {key}" else refuse', "if True else refuse", 3),
    # An update that nobody checks.
    ("OP-02", "        if not item:\n", "        if False:\n", 3),
    # A signal that the workflow does not take up.
    ("OP-02", "        self.items.append(item)\n", "        pass\n", 1),
    # The call that must not reach anything does reach the workflow.
    ("OP-02", "another = str(uuid.uuid4())", 'another = ""', None),
    # The servers keep nothing on disk.
    ("OP-03", "lab.private_server(file=True)", "lab.private_server()", None),
    # The backup is made a signal later.
    (
        "OP-03",
        'await asyncio.to_thread(back_up, Path(lab.file("original")), copy)',
        'await handles[0].signal(Inbox.put, 98); await asyncio.to_thread(back_up, Path(lab.file("original")), copy)',
        3,
    ),
    # Numbers that are lost on the way, and acknowledged.
    ("OP-03", "self.sent += 1\n", "self.sent += 1 + (self.sent == 2)\n", 3),
    # All loads go to as many workers.
    ("OP-04", "async with workforce(lab, queue, count):", "async with workforce(lab, queue, 1):", 1),
    # The killed worker is not there.
    ("OP-04", "await victim.kill()\n        shift", "shift", 3),
    # More slots than the control allows.
    ("OP-04", '{"max_concurrent_activities": 2}', '{"max_concurrent_activities": 4}', None),
    # The platform deletes earlier than it was told to.
    ("OP-05", "{name: at - end.timestamp() for", "{name: at - end.timestamp() - 2 for", 2),
    # The neighbour of the deleted workflow is gone, too.
    ("OP-05", "left = await traces(client, spared)", "left = await traces(client, doomed)", 2),
    # The one that runs is gone like the closed one.
    ("OP-05", "await traces(short, running), await", "await traces(short, closed), await", 3),
    # Visibility keeps what the history has lost.
    (
        "OP-05",
        "seen.setdefault(name, time.time())",
        'seen.setdefault(name, time.time() + 3 * (name == "visibility"))',
        3,
    ),
    # The one who should be killed stays.
    ("OP-06", "await victim.kill()\n        killed", "killed", 1),
    # Somebody is there to take over, where nobody should be.
    (
        "OP-06",
        "    await asyncio.sleep(SOON.seconds + 1)\n    waited, status = ",
        '    async with lab.worker_process(**parts_of(lab, "nobody")): await handle.result()\n    waited, status = ',
        None,
    ),
    # Effects without their keys, over a line that breaks.
    ("OP-06", 'f"{stage.journey}/{stage.number}"', 'f"{stage.journey}/{time.time_ns()}"', 1),
    # One namespace for both tenants.
    ("OP-07", 'await connect(Target(server.address, "blue"))', 'await connect(Target(server.address, "red"))', None),
    # No limit where there should be one.
    ("OP-07", 'neighbours(lab, "limited", LIMITED)', 'neighbours(lab, "limited", {})', 3),
    # A limit where there should be none.
    ("OP-07", 'neighbours(lab, "free", {})', 'neighbours(lab, "free", LIMITED)', None),
]


@pytest.mark.all
@pytest.mark.parametrize(("item", "old", "new", "stars"), FALLS)
def test_the_verdict_falls(tmp_path: Path, item: str, old: str, new: str, stars: int | None) -> None:
    quick = QUICK if item == "OP-01" else ()
    verdicts = evaluate(changed(SCRIPT, tmp_path, (old, new), *quick), tmp_path, item)
    assert verdicts.stars(item) == stars, verdicts.out
    assert verdicts.code == (1 if stars is None or (item == "OP-02" and stars < 4) else 0)
