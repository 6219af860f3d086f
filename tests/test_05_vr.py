"""Script 05 as a whole, and each of its verdicts made to fall by taking out what it rests on."""

from pathlib import Path

import pytest
from helpers import ROOT, changed, check_whole, evaluate

SCRIPT = ROOT / "05_vr_versioning.py"


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path)
    check_whole(verdicts)
    assert [item for item, one in verdicts.items.items() if one["fail_closed"]] == ["VR-01"]


MOVING = 'name="MovingOrder", versioning_behavior=VersioningBehavior.'
OLD_PAYLOAD = '"migrated", Shipment, lambda ledger: Address('

# (item, text in the script, what stands there instead, stars then: None where nothing is proven any more)
FALLS = [
    # The change is made without the patch.
    ("VR-01", 'hand_over(lab, "old", "patched", "patch-")', 'hand_over(lab, "old", "new", "patch-")', 2),
    # The change that should break without a patch is patched.
    ("VR-01", '    "new": OrderNew,\n', '    "new": OrderPatched,\n', None),
    # The orders that should move are pinned.
    ("VR-01", f"{MOVING}AUTO_UPGRADE", f"{MOVING}PINNED", 3),
    # A replay that never finds anything.
    ("VR-02", 'return f"{type(failure).__name__}: {failure}" if failure else ""', 'return ""', 1),
    # The harmless change does another step first.
    ("VR-02", "await self.take(Crew.pay, purchase)\n", "await self.take(Crew.screen, purchase)\n", None),
    # A prediction that is wrong.
    ("VR-02", '"deprecated": {"patched", "deprecated", "new"},', '"deprecated": {"deprecated", "new"},', 3),
    # No run goes to the new version.
    ("VR-03", 'way.deployment, "2.0", RAMP)', 'way.deployment, "2.0", 0)', 2),
    # The long run does not ask for the current version.
    ("VR-03", "auto = workflow.ContinueAsNewVersioningBehavior.AUTO_UPGRADE if", "auto = None if", 3),
    # Both workers without versioning have the same code.
    ("VR-03", "lab.worker_process([OrderNew], newer", "lab.worker_process([OrderOld], newer", None),
    # The field that should have a default has none.
    ("VR-04", '"express": (bool, False)},', '"express": bool},', 2),
    # The field that should have no default has one: nothing is stuck.
    ("VR-04", "    street: str\n", '    street: str = ""\n', None),
    # There is no old payload to migrate.
    ("VR-04", OLD_PAYLOAD, OLD_PAYLOAD.replace("Shipment", "ShipmentRenamed").replace("Address", "AddressRenamed"), 3),
]


@pytest.mark.parametrize(("item", "old", "new", "stars"), FALLS)
def test_the_verdict_falls(tmp_path: Path, item: str, old: str, new: str, stars: int | None) -> None:
    verdicts = evaluate(changed(SCRIPT, tmp_path, (old, new)), tmp_path, item)
    assert verdicts.stars(item) == stars, verdicts.out
    assert verdicts.code == (1 if stars is None or (stars < 4 and item == "VR-01") else 0)
