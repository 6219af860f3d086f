"""Script 09 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ROOT, Fall, check_falls, check_whole, evaluate, in_runs, name_of_run

SCRIPT = ROOT / "09_ob_observability.py"
# Where Prometheus and Chromium are not found their evidence is left out, and the rest ends in seconds.
NO_PROGRAMS = {"PATH": ""}
PROGRAMS = all(map(shutil.which, ("prometheus", "promtool", "prometheus-alertmanager")))


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path)
    check_whole(verdicts)
    for item in verdicts.items:
        seen = [(one["claim"], one["held"]) for one in verdicts.evidence(item, "holds")]
        assert seen
        assert all(held is not False for _, held in seen), seen
        assert not PROGRAMS or item != "OB-05" or all(held for _, held in seen), seen


@pytest.mark.all
def test_without_programs_their_evidence_is_not_run(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path, "OB-05", env=NO_PROGRAMS)
    assert verdicts.stars("OB-05") == 3, verdicts.out
    left_out = [one["measured"] for one in verdicts.evidence("OB-05", "holds") if one["held"] is None]
    assert len(left_out) == 3
    assert all("apt install" in measured for measured in left_out)


RUN = "found[begun] = replace(found[begun], end=at,"
BLOCKING = "async def call_in_the_loop(gate: str) -> None:\n    call_supplier(gate)"
PENDING = '[replace(bar, end=now) if bar.how == "pending" and now else bar for bar in found.values()]'
SHIELDED = 'if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):'

FALLS = [
    # One attempt instead of three: the UI has no retries to show.
    Fall("OB-01", "maximum_attempts=3", "maximum_attempts=1", 3, ["a failed run is listed"]),
    # The UI's history lacks an event.
    Fall("OB-01", "by_client = await ui.events(handle.id)", "by_client = (await ui.events(handle.id))[1:]", 2,
         ["its history is what the client reads"]),
    # The codec server has not the client's key, or nothing is encrypted at all.
    Fall("OB-01", "serving(codec_server(0, key,", "serving(codec_server(0, AESGCM.generate_key(256),", 3,
         ["the codec server that the UI is told of reads it"]),
    Fall("OB-01", "payload_codec=Encryption(key)", "payload_codec=None", None,
         ["encrypted data is unreadable", "with another key"]),
    # It decrypts for anybody.
    Fall("OB-01", SHIELDED, "if not hmac:", 3, ["decrypts for nobody"]),
    # The UI finds a run by an id that should not exist.
    Fall("OB-01", 'nobody = f"{lab.id}-nobody"', "nobody = handle.id", None, ["never started"]),
    # Nothing is counted through the SDK.
    Fall("OB-02", '.create_counter("sales_begun", "Sales that were begun").add(1)', "", 3,
         ["a counter in workflow code"]),
    # Nothing is replayed, so nothing could be counted twice.
    Fall("OB-02", "faults=FAULTS, max_cached_workflows=0,", "faults=FAULTS,", None, ["counts every replay"]),
    # Something runs in the time in which nothing should.
    Fall("OB-02", "await asyncio.sleep(2)",
         'await ended(await market.start(Sell.run, Sale("plain-9"), queue="sales", name="idle"))', 3,
         ["while nothing runs"]),
    # A failure that is not marked as benign is counted.
    Fall("OB-02", "category=ApplicationErrorCategory.BENIGN, ", "", 2, ["but not those marked BENIGN"]),
    # What is not there is not taken for nought: a bucket of another name, a timer metric that lacks a task.
    Fall("OB-02", 'le="0.1"', 'le="0.07"', 3, ["how long tasks wait"]),
    # The control has metrics, too.
    Fall("OB-02", "partial(with_metrics, port) if metrics else None", "partial(with_metrics, port)", None,
         ["a worker whose runtime"]),
    # Nobody blocks the event loop, or both do.
    Fall("OB-02", BLOCKING, BLOCKING.replace("call_supplier(gate)", "await asyncio.to_thread(call_supplier, gate)"), 3,
         ["where a blocking call silences"]),
    Fall("OB-02", "\ndef call_in_a_thread", "\nasync def call_in_a_thread", None, ["beside the same call in a thread"]),
    # The timer is left out of the drawing, or Nexus, or what timed out, or what is pending.
    Fall("OB-03", '    "TIMER_STARTED": "timerId",\n', "", 2, ["a timeline drawn", "every kind and ending"]),
    Fall("OB-03", '    "NEXUS_OPERATION_SCHEDULED": "operation",\n', "", 3, ["operations of Nexus"]),
    Fall("OB-03", "|TIMED_OUT|", "|", 3, ["every kind and ending"]),
    # Bars ten times as long as what they stand for, or twice as long as their scale.
    Fall("OB-03", RUN, "found[begun] = replace(found[begun], end=at + 9 * (at - found[begun].begin),", 2,
         ["a timeline drawn", "every kind and ending"]),
    Fall("OB-03", "length = max(1, round(width *", "length = max(1, round(width * 2 *", 2, ["a timeline drawn"]),
    # No retry is needed, so none is seen.
    Fall("OB-03", '        fail("do_step", 1, name="charge"),\n', "", 2, ["a timeline drawn"]),
    # A picture of no length is divided by.
    Fall("OB-03", " or timedelta(microseconds=1)", "", None),
    # Half as many timers make no long history.
    Fall("OB-03", "TIMERS = 500", "TIMERS = 250", 3, ["1,000 events"]),
    # The steps in one activity are only one step.
    Fall("OB-03", 'for name in ("reserve", "quote", "charge")]', 'for name in ("reserve",)]', None, ["the same steps"]),
    # The plugin carries the context on, but makes no spans.
    Fall("OB-04", "add_temporal_spans=True", "add_temporal_spans=False", 1, ["one trace from the caller"]),
    # The control has the plugin, too.
    Fall("OB-04", "plugged=False)", "plugged=True)", None, ["without the plugin"]),
    # The old name of an attribute.
    Fall("OB-04", '"gen_ai.provider.name"', '"gen_ai.system"', 3, ["GenAI attributes"]),
    # The SDK does not count failures marked as benign.
    Fall("OB-05", '"the courier is away")', '"the courier is away", category=ApplicationErrorCategory.BENIGN)', 2,
         ["the failure rate"]),
    # Every first attempt fails from the beginning: the healthy run is none.
    Fall("OB-05", "away = Path(self.away).exists()", "away = Path(self.away).exists() or activity.info().attempt == 1",
         None, ["a healthy run"]),
    # The missing worker asks for tasks; or the living one does not.
    Fall("OB-05", "now = [await plant.last_polled(number) for number in (0, 1)]",
         "now = [await plant.last_polled(number) for number in (0, 0)]", 2, ["a missing worker"]),
    # Nothing is repaired.
    Fall("OB-05", "        os.unlink(plant.away)\n", "", None),
    # One of two limits is gone: the other one is still there.
    Fall("OB-05", '"alert|webhook"', '"signal"', 3, ["Temporal's API raises no alerts"]),
    # The formatter loses the ids.
    Fall("OB-06", 'for source in ("temporal_workflow", "temporal_activity")', "for source in ()", 1,
         ["carry the ids of their run"]),
    # Logs come during replay, too.
    Fall("OB-06", "    workflow.logger.workflow_info",
         "    workflow.logger.log_during_replay = True\n    workflow.logger.workflow_info", 3,
         ["a line is written once"]),
    # The plain logger keeps still, as only the SDK's should.
    Fall("OB-06", 'logging.getLogger("plain").info("entered")', "pass", None, ["by a plain logger"]),
]  # fmt: skip

WITH_PROGRAMS = [
    # A rule that looks at too short a time never fires.
    Fall("OB-05", '"[20m]": "[12s]"', '"[20m]": "[1s]"', 3, ["each fault fires its alert"]),
    # The webhook takes what is still firing for resolved.
    Fall("OB-05", 'note(ledger, f"{alert[\'status\']} {labels', 'note(ledger, f"resolved {labels', 3,
         ["goes on until its own cause is mended"]),
]  # fmt: skip


@pytest.mark.hours
@pytest.mark.parametrize("falls", in_runs(FALLS), ids=name_of_run)
def test_the_verdicts_fall(tmp_path: Path, falls: Sequence[Fall]) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    check_falls(SCRIPT, tmp_path, falls, env=NO_PROGRAMS)


@pytest.mark.hours
@pytest.mark.skipif(not PROGRAMS, reason="Prometheus is not installed (Debian: apt install prometheus ...)")
@pytest.mark.parametrize("fall", WITH_PROGRAMS, ids=lambda fall: fall.old[:20])
def test_the_alerts_fall(tmp_path: Path, fall: Fall) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    check_falls(SCRIPT, tmp_path, [fall])
