"""Script 01 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ROOT, Fall, changed, check_falls, check_whole, evaluate, in_runs, name_of_run

SCRIPT = ROOT / "01_ex_execution_semantics.py"


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path)
    check_whole(verdicts)
    assert [item for item, one in verdicts.items.items() if one["fail_closed"]] == ["EX-01", "EX-03"]


@pytest.mark.all
def test_everything_without_a_cache(tmp_path: Path) -> None:
    """Every workflow task begins with a replay of the whole history, and nothing is other than with a cache."""
    check_whole(evaluate(SCRIPT, tmp_path, "--no-cache"))


LOOK = """                await load.comes_to(moment, number)
                if victim == "server":
                    server.kill()
                    await server.start()
"""
# A server whose disk did not keep what it acknowledged: a copy of its file from a moment before is put back.
LOST = """                await load.comes_to(moment, number)
                if victim == "server":
                    import sqlite3

                    copy = sqlite3.connect(lab.file("copy"))
                    sqlite3.connect(str(server.file)).backup(copy)
                    copy.close()
                    await until(lambda: load.begun() >= moment + 12, "more steps were begun")
                    await load.look()
                    server.kill()
                    Path(str(server.file)).write_bytes(Path(lab.file("copy")).read_bytes())
                    Path(f"{server.file}-journal").unlink(missing_ok=True)
                    await server.start()
"""

FALLS = [
    # A server that lost completions which it had acknowledged: every result is right, and steps are taken again.
    Fall("EX-01", LOOK, LOST, 3, ["had as completed before a kill"]),
    # A step that was cut off is not tried again.
    Fall(
        "EX-01", "step, parcel, start_to_close_timeout=timedelta(minutes=1)",
        "step, parcel, start_to_close_timeout=timedelta(minutes=1), retry_policy=RetryPolicy(maximum_attempts=1)",
        3, ["inside the fourth step", "every result is right"],
    ),
    # The first step is taken once more after the kill.
    Fall("EX-01", "for step in (hand_over, notify)", "for step in (pick, hand_over, notify)", 1, ["between steps"]),
    # The default is not the default.
    Fall("EX-01", 'timeout": default, "max', 'timeout": timedelta(seconds=1), "max', 3, ["default sticky timeout"]),
    # The server without a file has one.
    Fall("EX-01", "lab.private_server(file=file)", "lab.private_server(file=True)", None, ["keeps nothing on disk"]),
    # The plain program knows where it was.
    Fall("EX-01", "for step in PARCEL_STEPS:", "for step in PARCEL_STEPS[len(notes(ledger)) :]:", None,
         ["plain program start over"]),
    # Signals come in another order than they were sent.
    Fall("EX-01", "self.heard.append(number)", "self.heard.insert(0, number)", 3, ["random programs"]),
    # With a cache nothing is replayed.
    Fall("EX-02", "max_cached_workflows=0, ", "max_cached_workflows=100, ", 1, ["is replayed"]),
    # A key that differs in each attempt.
    Fall("EX-02", "charge(payment.key, payment", 'charge(f"{payment.key} {activity.info().attempt}", payment', 3,
         ["the same kill with a key", "stood still"]),
    # An activity that does not die leaves nothing to prove.
    Fall("EX-02", "faults=[die(step)]", "faults=[]", None),
    # One attempt is all there may be, and the server makes another.
    Fall("EX-02", '{step: {"start_to_close_timeout": soon(2)}}',
         '{step: {"start_to_close_timeout": soon(), "retry_policy": None}}', 3, ["at most once"]),
    # The key is the same in every month.
    Fall("EX-02", 'f"{number}/month {month}"', 'f"{number}/month"', 3, ["over continue-as-new a key"]),
    # The ids of workflow and run do not come again.
    Fall("EX-02", "{activity.info().activity_id}", "{activity.info().workflow_run_id}", None, ["comes again in each"]),
    # Told to end, the worker gives no time.
    Fall("EX-02", '{"graceful_shutdown_timeout": PATIENT * slowness()} if case.grace',
         '{"interceptors": []} if case.grace', 3, ["lets its activity end"]),
    # The long activity does not heed that its worker leaves: it is cut off when the grace is over.
    Fall("EX-02", "if activity.is_worker_shutdown():", "if activity.is_worker_shutdown() is None:", 3,
         ["a long activity"]),
    # The worker never stood still: its report is taken.
    Fall("EX-02", "        old.send(signal.SIGSTOP)\n", "        open_gate(gate)\n", 3, ["stood still"]),
    # Each start gets an id of its own: the policies have nothing to decide.
    Fall("EX-03", "name=name, id_conflict_policy", 'name=f"{name}-{uuid.uuid4()}", id_conflict_policy', None),
    # The update no longer carries its id: twenty are twenty, and the run has no place for them.
    Fall("EX-03", 'Account.deposit, 10, id="transfer-1"', "Account.deposit, 10", None),
    # The account does not look whether it knows a transfer.
    Fall("EX-03", "if transfer not in balance.transfers:", "if transfer:", 3, ["takes the ids along"]),
    # The update that was accepted is not on disk.
    Fall("EX-03", "lab.private_server(file=True, ", "lab.private_server(", None),
    # Another policy than was asked for.
    Fall("EX-03", "id_reuse_policy=policy", "id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE", 3, ["reuse"]),
    Fall("EX-03", "WorkflowIDConflictPolicy.USE_EXISTING, 10", "WorkflowIDConflictPolicy.FAIL, 10", 3, ["conflict"]),
    # Two signals without a request id are two.
    Fall("EX-03", 'request_id="transfer-1"', 'request_id=""', 3, ["one request id"]),
    # Those who wait have ids of their own: the run has no place for all.
    Fall("EX-03", 'accepted("same")', 'accepted(f"same {uuid.uuid4()}")', None),
    # The server keeps nothing on disk.
    Fall("EX-04", "lab.private_server(file=True) as server:", "lab.private_server() as server:", None),
    # What a signal said is forgotten.
    Fall("EX-04", "self.round.remarks.append(text)", "self.round.total += 0", 1, ["state read by query"]),
    # The second reader misses an event.
    Fall("EX-04", 'json.loads(shown.out)["events"]', 'json.loads(shown.out)["events"][1:]', 3, ["second reader"]),
    # Signals are acknowledged, and never reach the disk.
    Fall("EX-04", "await remark_once(server.client, handle.id, remark)", "await asyncio.sleep(0)", 3, ["disk is full"]),
    # The disk is not full.
    Fall("EX-04", "(room, limits[1])", "limits", 3, ["disk is full"]),
    # No sandbox: the calls are not refused.
    Fall("EX-05", "@workflow.defn\nclass Forbidden", "@workflow.defn(sandboxed=False)\nclass Forbidden", 3,
         ["the sandbox refuses"]),
    # Real randomness where the SDK's belongs.
    Fall("EX-05", "lot=workflow.random()", "lot=random.SystemRandom()", 1, ["the values of the first run"]),
    # The control is in the sandbox, too.
    Fall("EX-05", "@workflow.defn(sandboxed=False)\nclass Unsandboxed", "@workflow.defn\nclass Unsandboxed", None,
         ["without the sandbox"]),
    # The changed code is not changed.
    Fall("EX-06", "await do(reserve, order), await do(pay, order)]", "await do(pay, order)]", None),
    # A query that finds every open run finds the healthy one.
    Fall("EX-06", "in client.list_workflows(STUCK)", "in client.list_workflows('ExecutionStatus = \"Running\"')", 3,
         ["visibility lists"]),
    # The code is changed where it is said not to be.
    Fall("EX-06", 'continued(lab, "unchanged", Order)', 'continued(lab, "unchanged", OrderChangedBehind)', 3,
         ["unchanged code"]),
    # The rollback is none.
    Fall("EX-06", "order.worker(lab, Order):", "order.worker(lab, OrderChangedBehind):", 3, ["after a rollback"]),
    # A journal that is compared with the code.
    Fall("EX-06", "for step in steps[done:]:", "for step in [one for one in steps if one not in notes(journal)]:",
         None, ["resumes by position"]),
    # A change that replay cannot see among those it must see.
    Fall("EX-07", '"timer removed": (booked, billed)',
         '"timer removed": (booked, partial(slept, 5), billed)', 3, ["breaking change"]),
    # Real randomness where the SDK's belongs.
    Fall("EX-07", "workflow.random().randrange(10**9), workflow", "random.SystemRandom().randrange(10**9), workflow", 1,
         ["come out as recorded"]),
    # One of the changes that pass unseen is seen: the others still are not.
    Fall("EX-07", "(booked, partial(slept, 3600), billed)", "(booked, billed)", 4,
         ["another length of a timer"]),
    # The control draws by the SDK's sources.
    Fall("EX-07", "Ticket(str(uuid.uuid4()), random.randrange(10**9), datetime.now(UTC))", "super().draw()", None,
         ["raw random"]),
    Fall("EX-07", "for _ in range(30):", "for _ in range(3):", 3, ["a long history"]),
]  # fmt: skip


ON_A_CLUSTER = "history, matching, frontend and database of a cluster"


@pytest.mark.all
@pytest.mark.usefixtures("_cluster")
def test_progress_on_a_cluster_whose_services_are_killed(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path, "EX-01", "--cluster")
    assert verdicts.stars("EX-01") == 5, verdicts.out
    (seen,) = (one for one in verdicts.evidence("EX-01", "holds") if one["claim"].startswith(ON_A_CLUSTER))
    assert seen["held"], verdicts.out
    assert all(f"{service} at step" in seen["measured"] for service in ("history", "matching", "frontend", "database"))


@pytest.mark.hours
@pytest.mark.usefixtures("_cluster")
def test_a_run_that_is_lost_among_killed_services_costs_the_star(tmp_path: Path) -> None:
    """One run is terminated behind the evaluation's back."""
    kill = "                process.kill()\n"
    lost = "                await load.parcels[-1].terminate() if moment == moments[0] else None\n" + kill
    verdicts = evaluate(changed(SCRIPT, tmp_path, (kill, lost)), tmp_path, "EX-01", "--cluster")
    assert verdicts.stars("EX-01") == 3, verdicts.out
    gone = [one["claim"] for one in verdicts.evidence("EX-01", "holds") if one["held"] is False]
    assert [claim.startswith(ON_A_CLUSTER) for claim in gone] == [True], verdicts.out


@pytest.mark.hours
@pytest.mark.parametrize("falls", in_runs(FALLS), ids=name_of_run)
def test_a_verdict_falls(tmp_path: Path, falls: Sequence[Fall]) -> None:
    check_falls(SCRIPT, tmp_path, falls)
