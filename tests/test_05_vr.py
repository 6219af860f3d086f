"""Script 05 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ROOT, Fall, check_falls, check_whole, evaluate, in_runs, name_of_run

SCRIPT = ROOT / "05_vr_versioning.py"


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path)
    check_whole(verdicts)
    assert [item for item, one in verdicts.items.items() if one["fail_closed"]] == ["VR-01"]


MOVING = 'name="MovingOrder", versioning_behavior=VersioningBehavior.'
PINNED = 'name="PinnedOrder", versioning_behavior=VersioningBehavior.'
OLD_PATH = "return sorted(set(every) - set("
OLD_WAY = (
    'return await ids_of(client, f"{open_runs} AND TemporalChangeVersion IS NULL")\n    return sorted(set(every) - set('
)

FALLS = [
    # The change is made without the patch.
    Fall("VR-01", '    "patched": OrderPatched,\n', '    "patched": OrderNew,\n', 2,
         ["patched(): a run", "all stages"], alone=True),
    # The change that should break without a patch is patched.
    Fall("VR-01", '    "new": OrderNew,\n', '    "new": OrderPatched,\n', None, ["without a patch"], alone=True),
    # Runs that should stay on their build follow the current one.
    Fall("VR-01", f"{PINNED}PINNED", f"{PINNED}AUTO_UPGRADE", 2,
         ["pinned runs stay", "a pinned run whose build has no worker"], alone=True),
    # The orders that should move are pinned.
    Fall("VR-01", f"{MOVING}AUTO_UPGRADE", f"{MOVING}PINNED", 3, ["auto-upgrade runs", "running during the switch"]),
    # The old path is taken for the runs without any marker.
    Fall("VR-01", OLD_PATH, OLD_WAY, 3, ["visibility tells when a patch may go"]),
    # The query for runs without a marker finds those with another patch's, too.
    Fall("VR-01", 'ids_of(lab.client, f"{mine} AND TemporalChangeVersion IS NULL")', "ids_of(lab.client, mine)", None,
         ["without any marker"]),
    # The run that should wait for its build moves to the newer one.
    Fall("VR-01", 'name == "moving" else', 'name in ("moving", "orphan") else', 3,
         ["a pinned run whose build has no worker"]),
    # The activity that is running during the switch is lost, and tried again.
    Fall("VR-01", 'withhold("pay", gate, silent=True)',
         'dataclasses.replace(withhold("pay", gate), does="fail", attempts=1)', 3, ["running during the switch"]),
    # A version is current before the first run.
    Fall("VR-01", '    waiting, queue = await shop.order(PINNED, "early")',
         '    await shop.switch("1.0")\n    waiting, queue = await shop.order(PINNED, "early")', 4,
         ["no current version set"]),
    # The build that is built again has the same code.
    Fall("VR-01", 'shop.worker("1.0", ORDERS["2.0"])', 'shop.worker("1.0", ORDERS["1.0"])', 4, ["two different codes"]),
    # A replay that never finds anything.
    Fall("VR-02", 'return str(failure or "")', 'return ""', 1, ["is caught by replaying", "each of 4 stages"]),
    # The harmless change does another step first.
    Fall("VR-02", "await self.take(Crew.pay, purchase)\n", "await self.take(Crew.screen, purchase)\n", None,
         ["a harmless change passes"]),
    # A prediction that is wrong.
    Fall("VR-02", '"deprecated": ["patched", "deprecated", "new"],', '"deprecated": ["deprecated", "new"],', 3,
         ["each of 4 stages"]),
    # The job overlooks runs of a type that the release no longer has.
    Fall("VR-02", "async for one in results if one.replay_failure}",
         'async for one in results if "TMPRL1100" in str(one.replay_failure)}', 3, ["replaying every open run"]),
    # Replay notices other options: the type's name stands for them here.
    Fall("VR-02", "await misfit(replayer_of(code), history)", "await misfit(replayer_of(Delivery), history)", 4,
         ["a changed timer length", "a changed timeout", "a changed retry policy"]),
    # The step in front is not there.
    Fall("VR-02", '    steps = ("screen", "pay")', '    steps = ("pay",)', 4, ["a changed activity argument"]),
    # Half the runs that were asked for go to the new version.
    Fall("VR-03", '"2.0", RAMP)', '"2.0", RAMP / 2)', 2, ["a new version ramps"]),
    # The long run does not ask for the current version.
    Fall("VR-03", "months, initial_versioning_behavior=upgrade", "months", 3,
         ["a long run learns"]),
    # Both workers without versioning have the same code.
    Fall("VR-03", 'shop.worker("new", [OrderNew]', 'shop.worker("new", [OrderOld]', None, ["runs hop between them"]),
    # The version that should take over is not made current.
    Fall("VR-03", '            await shop.switch("2.0")\n            fresh', "            fresh", 3,
         ["a worker without versioning beside"]),
    # A worker that is told to end gives its activities no time.
    Fall("VR-03", 'options["graceful_shutdown_timeout"] = grace', 'options["graceful_shutdown_timeout"] = timedelta()',
         3, ["told to end by SIGTERM finishes", "a rollout of workers by SIGTERM"]),
    # The default gives time.
    Fall("VR-03", "    if grace is not None:\n", "    grace = grace or GRACE\n    if grace is not None:\n", None,
         ["without it the running activity", "by default a worker"]),
    # The server calls a version drained while its runs are open.
    Fall("VR-03", "return VersionDrainageStatus.Name(", 'return "DRAINED" or VersionDrainageStatus.Name(', 2,
         ["the old version drains", "with the server's own settings"]),
    # What is moved by hand begins on its old build again.
    Fall("VR-03", "        await workflow.wait_condition(lambda: self.approved)\n        raise RuntimeError",
         "        await do(Crew.screen, purchase)\n"
         "        await workflow.wait_condition(lambda: self.approved)\n        raise RuntimeError", None),
    # Of every order a step is missing.
    Fall("VR-03", "for step in ran(way.lab, order)] for order", "for step in ran(way.lab, order)[1:]] for order", 3,
         ["no run is lost or doubled"]),
    # The field that should have a default has none.
    Fall("VR-04", '"express": (bool, False)}', '"express": bool}', 2, ["a field added with a default is read"]),
    # The field that should have no default has one: nothing is stuck.
    Fall("VR-04", "    street: str\n", '    street: str = ""\n', None, ["the open run is stuck"]),
    # Renamed without the SDK's conversion: nested types stay dicts, and what is gone is an error.
    Fall("VR-04", "return value_to_type(hint, fields, [self])", "return hint(**fields)", 3,
         ["a payload converter that knows the old names"]),
    # There is no old payload to migrate.
    Fall("VR-04", 'begin_shipment(lab, "migrated", Shipment, BONN)',
         'begin_shipment(lab, "migrated", TownShipment, TownAddress("Bonn", WeighedParcel(Size.MEDIUM, 700)))', 3,
         ["a payload converter that knows the old names"]),
    # The converter that only renames converts, too.
    Fall("VR-04", "        return hint(**fields)\n", "        return value_to_type(hint, fields, [self])\n", None,
         ["a converter that only renames"]),
    # What is empty comes back as none.
    Fall("VR-04", "return await workflow.execute_activity(echo, value, start_to_close_timeout=PATIENT)",
         "return await workflow.execute_activity(echo, value, start_to_close_timeout=PATIENT) or None", 3,
         ["odd values come back"]),
    # The other language shows nothing.
    Fall("VR-04", 'line.partition("Result")[2].strip()', 'line.partition("Result")[0].strip()', 3,
         ["a null byte is read", "is rounded", "is replaced", "an empty list"]),
]  # fmt: skip


@pytest.mark.hours
@pytest.mark.parametrize("falls", in_runs(FALLS), ids=name_of_run)
def test_a_verdict_falls(tmp_path: Path, falls: Sequence[Fall]) -> None:
    check_falls(SCRIPT, tmp_path, falls)
