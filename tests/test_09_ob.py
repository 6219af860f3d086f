"""Script 09 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

import shutil
from pathlib import Path

import pytest
from helpers import ROOT, changed, check_whole, evaluate

SCRIPT = ROOT / "09_ob_observability.py"
# Where Prometheus is not found, its evidence is left out, and the rest of OB-05 ends in seconds.
NO_PROMETHEUS = {"PATH": ""}


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path)
    check_whole(verdicts)
    for item in verdicts.items:
        seen = [(one["claim"], one["held"]) for one in verdicts.evidence(item, "holds")]
        here = item != "OB-05" or all(map(shutil.which, ("prometheus", "promtool", "prometheus-alertmanager")))
        assert seen
        assert not here or all(held for _, held in seen), seen


@pytest.mark.all
def test_without_prometheus_its_evidence_is_not_run(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path, "OB-05", env=NO_PROMETHEUS)
    assert verdicts.stars("OB-05") == 3, verdicts.out
    for one in verdicts.evidence("OB-05", "holds"):
        assert one["held"] is None
        assert "apt install" in one["measured"]


# (item, text in the script, what stands there instead, stars then: None where nothing is proven any more)
FALLS = [
    # One attempt instead of three: the UI has no retries to show.
    ("OB-01", "replace(QUICKLY, maximum_attempts=3)", "replace(QUICKLY, maximum_attempts=1)", 3),
    # The codec server has not the client's key, or nothing is encrypted at all.
    ("OB-01", "serve_codec, codec, key, ui.url", "serve_codec, codec, AESGCM.generate_key(256), ui.url", 3),
    ("OB-01", "payload_codec=Encryption(key)", "payload_codec=None", None),
    # The UI finds a run by an id that should not exist.
    ("OB-01", 'nobody = f"{lab.id}-nobody"', "nobody = handle.id", None),
    # An attempt that the worker counts is not in the ledger.
    ("OB-02", 'note(sale.ledger, "failed" if sale.refused else "done")', "pass", 1),
    # Nothing is counted through the SDK.
    ("OB-02", '.create_counter("sales_begun", "Sales that were begun").add(1)', "", 3),
    # Nothing is replayed, so nothing could be counted twice.
    ("OB-02", "task_queue=queue, max_cached_workflows=0\n", "task_queue=queue\n", None),
    # The timer is left out of the drawing.
    ("OB-03", '    ("TimerStarted", "TimerFired", "timerId", "startedEventId"),\n', "", 2),
    # Half as many timers make no long history.
    ("OB-03", "TIMERS = 500", "TIMERS = 250", 3),
    # The steps in one activity are only one step.
    ("OB-03", 'for step in ("reserve", "quote", "charge"):', 'for step in ("reserve",):', None),
    # The plugin carries the context on, but makes no spans.
    ("OB-04", "add_temporal_spans=True", "add_temporal_spans=False", 1),
    # The control has the plugin, too.
    ("OB-04", "traced=False) as", "traced=True) as", None),
    # The old name of an attribute.
    ("OB-04", "gen_ai.GEN_AI_PROVIDER_NAME", '"gen_ai.system"', 3),
    # The SDK does not count failures marked as benign.
    ("OB-05", '"the courier is away")', '"the courier is away", category=ApplicationErrorCategory.BENIGN)', 2),
    # Every first attempt fails from the beginning: the healthy run is none.
    (
        "OB-05",
        "away = Path(trip.courier).exists()",
        "away = Path(trip.courier).exists() or activity.info().attempt == 1",
        None,
    ),
    # The formatter loses the ids.
    ("OB-06", 'for source in ("temporal_workflow", "temporal_activity")', "for source in ()", 1),
    # Logs come during replay, too.
    (
        "OB-06",
        "    workflow.logger.workflow_info",
        "    workflow.logger.log_during_replay = True\n    workflow.logger.workflow_info",
        3,
    ),
    # The plain logger keeps still, as only the SDK's should.
    ("OB-06", 'logging.getLogger("plain").info', "workflow.logger.debug", None),
]


@pytest.mark.all
@pytest.mark.parametrize(("item", "old", "new", "stars"), FALLS)
def test_the_verdict_falls(tmp_path: Path, item: str, old: str, new: str, stars: int | None) -> None:
    env = NO_PROMETHEUS if item == "OB-05" else None
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    verdicts = evaluate(changed(SCRIPT, tmp_path, (old, new)), tmp_path, item, env=env)
    assert verdicts.stars(item) == stars, verdicts.out
    assert verdicts.code == (1 if stars is None else 0)
