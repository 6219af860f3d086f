"""Script 08 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from cluster import Cluster
from common import NotRun

from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ROOT, Fall, check_falls, check_whole, evaluate, in_runs, name_of_run

SCRIPT = ROOT / "08_op_operations.py"


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path, seconds=900)
    check_whole(verdicts)
    assert [item for item, one in verdicts.items.items() if one["fail_closed"]] == ["OP-02"]


FALLS = [
    # The proxy does not ask the client for a certificate.
    Fall("OP-01", 'tls("temporal.example", mutual=True)', 'tls("temporal.example")', 3,
         ["learns the client's name", "missing client certificate"]),
    # The port that should speak TLS speaks plaintext.
    Fall("OP-01", 'Proxy(server, certificates.tls("127.0.0.1"))', "Proxy(server)", None),
    # The gateway lets any key pass.
    Fall("OP-01", 'if header == f"Bearer {key}" else refuse', "if True else refuse", 3, ["an API key is a setting"]),
    # The program is not told where the server is.
    Fall("OP-01", '{"TEMPORAL_ADDRESS": server.address, "TEMPORAL_CONFIG_FILE"',
         '{"TEMPORAL_ADDRESS": "127.0.0.1:1", "TEMPORAL_CONFIG_FILE"', None),
    # An update that nobody checks.
    Fall("OP-02", "        if not item:\n", "        if False:\n", 3, ["kinds of wrong call"]),
    # A signal that the workflow does not take up.
    Fall("OP-02", "        self.items.append(item)\n", "        pass\n", 1, ["every verb works"]),
    # The call that must not reach anything does reach the workflow.
    Fall("OP-02", "    another = str(uuid.uuid4())\n", '    another = ""\n', None),
    # What HTTP calls a cancellation is something else.
    Fall("OP-02", '"cancel": lambda: self.ask(f"{at}/cancel", run)',
         '"cancel": lambda: self.ask(f"{at}/terminate", run)', 3,
         ["over HTTP"]),
    # A wrong call that is carried out.
    Fall("OP-02", 'Wrong("terminate", "closed", [],', 'Wrong("terminate", "open", [],', 3, ["kinds of wrong call"]),
    # A query finds a run too few.
    Fall("OP-02", '["x", "y"], ["y", "z"]', '["x", "y"], ["z"]', 3, ["each query finds exactly"]),
    # The server keeps nothing on disk.
    Fall("OP-03", "lab.private_server(file=True) as server, lab.worker([Inbox]",
         "lab.private_server() as server, lab.worker([Inbox]", None),
    # The backup is made a signal later.
    Fall("OP-03", "await asyncio.to_thread(back_up, original, copy)",
         "await handles[0].signal(Inbox.put, 98); await asyncio.to_thread(back_up, original, copy)", 3,
         ["a backup of the live file"]),
    # Numbers that are lost on the way, and acknowledged.
    Fall("OP-03", "self.sent += 1\n", "self.sent += 1 + (self.sent == 2)\n", 3, ["10 kills of the process"]),
    # The killed worker is not killed.
    Fall("OP-04", "await victim.kill()\n        facts", "facts", 3, ["a worker killed under load"]),
    # More slots than the control allows.
    Fall("OP-04", '{"max_concurrent_activities": SLOTS}', '{"max_concurrent_activities": SLOTS + 1}', None),
    # Pollers that do not grow by themselves.
    Fall("OP-04", '"autoscaling", activity_task_poller_behavior=pollers', '"autoscaling"', 3, ["autoscaling pollers"]),
    # No time is given.
    Fall("OP-04", '{"graceful_shutdown_timeout": timedelta(seconds=grace)} if grace else {}',
         "{}", 3, ["told to end by SIGTERM"]),
    # Somebody handles the signal where nobody should.
    Fall("OP-04", "    if handler:\n", "    if True:\n", None),
    # The platform deletes earlier than it was told to.
    Fall("OP-05", "{name: at - end.timestamp() for", "{name: at - end.timestamp() - 20 for", 2, ["and not before"]),
    # The neighbour of the deleted workflow is gone, too.
    Fall("OP-05", "left = await traces(client, spared)",
         "left = await traces(client, doomed)", None, ["its neighbour"]),
    # The one that runs is gone like the closed one.
    Fall("OP-05", "await traces(short, running), await",
         "await traces(short, closed), await", 3, ["a running workflow"]),
    # Visibility is not looked at.
    Fall("OP-05", "        for name in WHOLE:\n", "        for name in WHOLE[:2]:\n", 2, ["all go"]),
    # The one who should be killed stays.
    Fall("OP-06", "await victim.kill()\n        killed", "killed", 1, ["one of two workers killed"]),
    # Somebody has taken over, where nobody should be.
    Fall("OP-06", "waited, status = len(line.calls()) - before,",
         "waited, status = len(line.calls()) - before + 1,", None),
    # Effects without their keys, where a stage is run again.
    Fall("OP-06", 'return f"{self.journey}/{self.number}"',
         'return f"{self.journey}/{self.number}/{time.time_ns()}"', 1,
         ["one of two workers killed"]),
    # One namespace for both tenants.
    Fall("OP-07", 'await connect(Target(server.address, "blue"))',
         'await connect(Target(server.address, "red"))', None),
    # No limit where there should be one.
    Fall("OP-07", '"limited", LIMITED', '"limited", {}', 3, ["with a limit for each namespace"]),
    # A limit of each one's own where there should be one for both.
    Fall("OP-07", '"shared", SHARED', '"shared", LIMITED', None),
]  # fmt: skip

ON_A_CLUSTER = [
    # The database writes before it acknowledges: nothing is lost.
    Fall("OP-03", '"synchronous_commit": "off"', '"synchronous_commit": "on"', None),
    # The backup is made a signal later.
    Fall("OP-03", "await cluster.region.database.backup(folder)",
         "await handles[0].signal(Inbox.put, 98); await cluster.region.database.backup(folder)", 3, ["a base backup"]),
    # Some processes are left as they are.
    Fall("OP-04", "in list(self.region.services):", "in list(self.region.services)[:4]:", 3, ["all eight service"]),
    # The bucket answers all the time.
    Fall("OP-05", "    bucket.pause()\n", "", 3, ["while the bucket does not answer"]),
    # Both namespaces have an archive.
    Fall("OP-05", '"lost", short_time(), **UNARCHIVED', '"lost", short_time(), **STATES', None),
    # Region a lives.
    Fall("OP-06", 'name="local", client=self.a.client', 'name="local", client=self.b.client', None),
    # Signals that are there twice.
    Fall("OP-06", "in repeated(numbers)]",
         "in repeated(numbers * 2)]", 3,
         ["nothing is there twice"]),
    # The writer may only read.
    Fall("OP-07", '"writer": token("red:write", subject="will")', '"writer": token("red:read", subject="will")', 3,
         ["a token permits"]),
    # The history does not say whose token it was.
    Fall("OP-07", '"frontend.enablePrincipalPropagation": True', '"frontend.enablePrincipalPropagation": False', 4),
]  # fmt: skip


@pytest.fixture
def _nothing_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cluster would show is not run then, which saves its time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.hours
@pytest.mark.usefixtures("_nothing_prepared")
@pytest.mark.parametrize("falls", in_runs(FALLS), ids=name_of_run)
def test_a_verdict_falls(tmp_path: Path, falls: Sequence[Fall]) -> None:
    check_falls(SCRIPT, tmp_path, falls)


@pytest.mark.hours
@pytest.mark.parametrize("falls", in_runs(ON_A_CLUSTER), ids=name_of_run)
def test_a_verdict_falls_on_a_cluster(tmp_path: Path, falls: Sequence[Fall]) -> None:
    try:
        Cluster()
    except NotRun as error:
        pytest.skip(str(error))
    check_falls(SCRIPT, tmp_path, falls)


@pytest.mark.all
@pytest.mark.usefixtures("_nothing_prepared")
def test_without_a_cluster_the_dev_server_is_judged(tmp_path: Path) -> None:
    """Each limit that a cluster does not have is seen then, and what needs a cluster says how to have one."""
    limits = {
        "OP-03": "in SQLite", "OP-04": "in one shard", "OP-05": "archival", "OP-06": "a second region",
        "OP-07": "do not guard",
    }  # fmt: skip
    verdicts = evaluate(SCRIPT, tmp_path, *limits)
    for item, words in limits.items():
        (seen,) = (one for one in verdicts.evidence(item, "limit") if words in one["claim"])
        assert seen["held"], verdicts.out
        missing = [one for one in verdicts.items[item]["evidence"] if one["held"] is None and one["kind"] != "cited"]
        assert missing
        assert all("cluster.py prepare" in one["measured"] for one in missing)
