"""Two runs side by side: what was lost and gained, what is new and gone, and what moved beyond noise.

Evidence is told by its kind and claim, facts by their name. A figure that was measured several times carries
its spread, and has moved when the spreads do not meet; one that was measured once says nothing of its noise,
and counts only when it is another order of size.
"""

from harness.record import EvidenceRecord, FactRecord, ItemRecord, Run

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

What = Literal["lost", "gained", "new", "gone", "moved", "not run here", "not run there"]
HEADS: Mapping[What, str] = {
    "lost": "Lost",
    "gained": "Gained",
    "not run here": "Run there and not here",
    "not run there": "Run here and not there",
    "new": "New evidence",
    "gone": "Evidence that is gone",
    "moved": "Moved beyond noise",
}
APART = 1.25  # spreads that do not meet and whose medians are this far apart: it moved
ANOTHER_SIZE = 4.0  # a figure measured once must be this many times another
# Below this a figure in this unit is the machine's breath: a timer's tick, a scheduler's turn.
BREATH = {"s": 0.5, "ms": 5.0, "%": 5.0}


@dataclass(frozen=True)
class Change:
    """One thing that differs between two runs."""

    what: What
    item: str
    words: str


def compare(there: Run, here: Run) -> list[Change]:
    """What differs from one run to another, in the order of the items of both."""
    changes: list[Change] = []
    old, new = there.items, here.items
    for id, item in new.items():
        if id in old:
            changes += _item(old[id], item)
        else:
            changes.append(Change("new", id, f"{item.title}: {_stars(item)}"))
    # An item that was not asked for in this run is not gone; one of a script that did run is.
    ran = {category.category for category in here.categories}
    asked = len(new) > 1
    changes += [
        Change("gone", id, item.title)
        for category in there.categories
        for id, item in ((one.id, one) for one in category.items)
        if id not in new and category.category in ran and asked and _whole(here, category.category, old)
    ]
    return changes


def _whole(here: Run, category: str, old: Mapping[str, ItemRecord]) -> bool:
    """Whether a script ran with all its items, so that one that is missing is gone."""
    ids = {item.id for one in here.categories if one.category == category for item in one.items}
    known = {id for id in old if id.startswith(category)}
    return len(ids & known) >= len(known) - 1 and len(ids) > 1


def _stars(item: ItemRecord) -> str:
    return f"{item.stars} stars" if item.stars else item.outcome.replace("_", " ")


def _item(old: ItemRecord, new: ItemRecord) -> Iterator[Change]:
    """What differs in one item: its verdict, then its evidence."""
    if old.outcome == new.outcome == "judged" and old.stars != new.stars:
        what: What = "lost" if (new.stars or 0) < (old.stars or 0) else "gained"
        yield Change(what, new.id, f"{old.stars} -> {new.stars} stars: {new.reason}")
    elif old.outcome != new.outcome:
        yield Change(_outcome(old, new), new.id, f"{_stars(old)} -> {_stars(new)}: {new.reason}")
    there = {(one.kind, one.claim): one for one in old.evidence}
    here = {(one.kind, one.claim): one for one in new.evidence}
    for key, one in here.items():
        yield from _evidence(new.id, there[key], one) if key in there else [Change("new", new.id, _claim(one))]
    if new.outcome == "judged":  # an item that broke off has not lost what it did not come to
        yield from (Change("gone", new.id, _claim(one)) for key, one in there.items() if key not in here)


def _outcome(old: ItemRecord, new: ItemRecord) -> What:
    if new.outcome == "not_run":
        return "not run here"
    if old.outcome == "not_run":
        return "not run there"
    return "lost" if new.outcome == "inconclusive" else "gained"


def _claim(one: EvidenceRecord) -> str:
    held = {True: "", False: " (does not hold)", None: " (not run)"}[one.held] if one.kind != "limit" else ""
    return f"{one.kind}: {one.claim}{held}"


def _evidence(item: str, old: EvidenceRecord, new: EvidenceRecord) -> Iterator[Change]:
    """What differs in one piece of evidence: whether it held, and what moved."""
    if old.held != new.held and new.kind != "cited":
        if new.held is None:
            yield Change("not run here", item, f"{_claim(new)}: {new.measured}")
        elif old.held is None:
            yield Change("not run there", item, _claim(new))
        else:
            better = new.held != (new.kind == "limit")
            yield Change("gained" if better else "lost", item, f"{_claim(new)}: {new.measured}")
    known = {fact.name: fact for fact in old.facts}
    for fact in new.facts:
        if fact.name in known and (moved := how_far(known[fact.name], fact)):
            yield Change("moved", item, f"{new.claim}: {fact.name} {moved}")


def how_far(old: FactRecord, new: FactRecord) -> str | None:
    """How far a figure has moved, in words; None where it has not, or is no figure."""
    one, other = _figure(old.measured), _figure(new.measured)
    if one is None or other is None or one[4] != other[4]:
        return None
    (median, low, high, times, unit), (now, now_low, now_high, now_times, _) = one, other
    if max(abs(median), abs(now)) < BREATH.get(unit, 0) or median == now:
        return None
    repeated = times > 1 and now_times > 1
    apart = low > now_high or now_low > high
    ratio = max(abs(median), abs(now)) / max(min(abs(median), abs(now)), 1e-12)
    if not (apart and ratio >= (APART if repeated else ANOTHER_SIZE)):
        return None
    return f"{median:.3g} -> {now:.3g} {unit}".strip()


def _figure(measured: Any) -> tuple[float, float, float, int, str] | None:
    """(median, low, high, times, unit) of a measured value that is a figure with a unit."""
    if isinstance(measured, Mapping) and {"median", "low", "high", "times", "unit"} <= measured.keys():
        return (measured["median"], measured["low"], measured["high"], measured["times"], measured["unit"])
    return None


def differences(there: Run, here: Run) -> list[str]:
    """In what the surroundings of two runs differ, so that nobody takes one for the other."""
    one, other = there.environment, here.environment
    pairs = [
        (name, getattr(one, name), getattr(other, name)) for name in ("where", "server", "sdk", "python", "os", "cpus")
    ]
    said = [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]
    if one.speed and other.speed and not 0.67 < one.speed / other.speed < 1.5:
        said.append(f"the machine was {one.speed:.1f} and is {other.speed:.1f} times as slow as the reference")
    missing = len(set(here.items) - set(there.items))
    said += [f"{missing} items are not in {there.name}"] if missing else []
    return said


def lines_of(there: Run, here: Run, changes: Sequence[Change]) -> list[tuple[str, str]]:
    """(style, text) of what is shown of a comparison."""
    lines = [("bold", f"Against {there.words}")]
    lines += [("yellow", f"The surroundings differ: {', '.join(said)}")] if (said := differences(there, here)) else []
    for what, head in HEADS.items():
        some = [change for change in changes if change.what == what]
        style = {"lost": "red", "gained": "green"}.get(what, "")
        lines += [("bold", f"{head}: {len(some)}")] if some else []
        lines += [(style, f"{change.item}  {change.words}") for change in some]
    if not changes:
        lines.append(("", "Nothing was lost or gained, and nothing moved beyond noise."))
    elif is_stale(changes):
        lines.append(
            ("yellow", f"{there.name} is stale: it does not know what was gained. --accept writes the new one.")
        )
    return lines


def is_stale(changes: Sequence[Change]) -> bool:
    """Whether something was gained that the baseline does not know."""
    return any(change.what in ("gained", "new") for change in changes)


def status_of(changes: Sequence[Change]) -> int:
    """The exit status: 1 where something was lost, and where the baseline is stale."""
    return 1 if any(change.what == "lost" for change in changes) or is_stale(changes) else 0
