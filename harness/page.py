"""A run, or two side by side, as one HTML page that needs nothing else; as JUnit XML; and as a summary in Markdown."""

from harness.compare import Change, compare, differences
from harness.evidence import words
from harness.record import CategoryRecord, EvidenceRecord, ItemRecord, Run

import base64
import collections
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jinja2
import junitparser

FILTERS = (
    ("all", "all"),
    ("failed", "failed"),
    ("not-run", "not run"),
    ("limits", "limits"),
    ("fail-closed", "fail-closed"),
    ("changed", "changed"),
)


class Rating(Protocol):
    """What a page says of the whole of a run: see run_all.py."""

    @property
    def mean(self) -> float | None: ...
    @property
    def stars(self) -> int | None: ...
    @property
    def judged(self) -> int: ...
    @property
    def inconclusive(self) -> int: ...
    @property
    def not_run(self) -> int: ...
    @property
    def missing(self) -> int: ...
    @property
    def capped_by(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Rated:
    """A run with its rating."""

    run: Run
    rating: Rating

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def words(self) -> str:
        return self.run.words


def html_of(runs: Sequence[Rated], plots: Sequence[Path] = ()) -> str:
    """One self-contained page of one run, or of an older one and a newer one side by side."""
    both = [one.run for one in runs]
    changes = compare(*both) if len(both) > 1 else []
    newest = both[-1]
    categories = [_category(category.category, category.title, both, changes) for category in newest.categories]
    entries = [item for category in categories for item in category["entries"]]
    counts = {name: sum(name in (*item["tags"], "all") for item in entries) for name, _ in FILTERS}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    filters: dict[str, Callable[..., str]] = {
        "stars": stars, "words": _words, "mark": _mark, "class_of": _class_of, "state": _state,
    }  # fmt: skip
    environment.filters.update(filters)
    template = environment.from_string((Path(__file__).with_name("page.html.j2")).read_text(encoding="utf-8"))
    return template.render(
        title=" and ".join(one.name for one in runs),
        runs=runs,
        differs=differences(*both) if len(both) > 1 else [],
        categories=categories,
        filters=[one for one in FILTERS if one[0] != "changed" or len(both) > 1],
        counts=counts,
        plots=[(path.stem, _embedded(path)) for path in plots],
        environment=_environment(both),
    )


def stars(count: int | None, outcome: str) -> str:
    """The stars as text; what was not judged has a sign."""
    if count is None:
        return "?" if outcome == "inconclusive" else "\u2013"
    return "\u2605" * count + "\u2606" * (5 - count)


def _category(id: str, title: str, runs: Sequence[Run], changes: Sequence[Change]) -> dict[str, Any]:
    ids = [item.id for category in runs[-1].categories if category.category == id for item in category.items]
    return {
        "id": id,
        "title": title,
        "cells": [_mean(run, id) for run in runs],
        "entries": [_entry(one, runs, [change for change in changes if change.item == one]) for one in ids],
    }


def _mean(run: Run, category: str) -> dict[str, Any]:
    given = [item.stars for one in run.categories if one.category == category for item in one.items if item.stars]
    mean = sum(given) / len(given) if given else None
    return {"mean": "-" if mean is None else f"{mean:.1f}", "stars": None if mean is None else int(mean + 0.5)}


def _entry(id: str, runs: Sequence[Run], changes: Sequence[Change]) -> dict[str, Any]:
    """What a page says of one item; the newest run gives its title, reason and stage."""
    of = [run.items.get(id) for run in runs]
    item = runs[-1].items[id]
    return {
        "id": id,
        "title": item.title,
        "fail_closed": item.fail_closed,
        "stage": item.stage,
        "reason": item.reason,
        "runs": of,
        "changes": changes,
        "tags": tags_of(item) + (["changed"] if changes else []),
    }


def tags_of(item: ItemRecord) -> list[str]:
    """The filters that show an item."""
    failed = item.outcome == "inconclusive" or any(_class_of(one) == "failed" for one in item.evidence)
    unrun = item.outcome == "not_run" or any(one.held is None and one.kind != "cited" for one in item.evidence)
    limits = any(one.kind == "limit" and one.held is not False for one in item.evidence)
    tags = {"failed": failed, "not-run": unrun, "limits": limits, "fail-closed": item.fail_closed}
    return [name for name, given in tags.items() if given]


def _class_of(one: EvidenceRecord) -> str:
    if one.held is None:
        return "dim"
    if one.kind == "limit":
        return "seen" if one.held else "held"
    return "held" if one.held else "failed"


def _mark(one: EvidenceRecord) -> str:
    signs = {"dim": "\u00b7", "seen": "\u25b2", "held": "\u2713", "failed": "\u2717"}
    return "\u25b3" if one.kind == "limit" and one.held is False else signs[_class_of(one)]


def _state(one: EvidenceRecord) -> str:
    """What the mark says, for those who do not see it."""
    if one.kind == "cited":
        return ""
    if one.held is None:
        return " (not run)"
    if one.kind == "limit":
        return " (seen)" if one.held else " (not seen)"
    return "" if one.held else " (does not hold)"


def _words(measured: Any) -> str:
    if isinstance(measured, Mapping) and {"median", "low", "high", "times", "unit"} <= measured.keys():
        once = f"{words(measured['median'])} {measured['unit']}"
        return once if measured["times"] == 1 else f"{once} ({measured['low']:.3g} to {measured['high']:.3g})"
    return words(measured)


def _embedded(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


def _environment(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    every = [run.environment.model_dump() for run in runs]
    names = list(dict.fromkeys(name for one in every for name in one))
    return [(name, [str(one.get(name, "")) for one in every]) for name in names]


def junit_of(run: Run) -> bytes:
    """JUnit XML: a suite a category, a case an item; a lost item is a failure, inconclusive an error, not run skipped.

    A fail-closed item below four stars is a failure; any other item fails only where none of it works.
    """
    whole = junitparser.JUnitXml(name="temporal-example")
    for category in run.categories:
        suite = junitparser.TestSuite(f"{category.category} {category.title}")
        for name, value in category.environment.model_dump().items():
            suite.add_property(name, str(value))
        suite.timestamp = category.environment.date
        for item in category.items:
            suite.add_testcase(_case(category, item))
        whole.add_testsuite(suite)
    text: bytes = whole.tostring()  # type: ignore[no-untyped-call]
    return text


def _case(category: CategoryRecord, item: ItemRecord) -> junitparser.TestCase:
    case = junitparser.TestCase(f"{item.id} {item.title}", classname=category.category, time=item.seconds)
    needed = 4 if item.fail_closed else 2
    if item.outcome == "inconclusive":
        case.result = [junitparser.Error(item.reason, "inconclusive")]
    elif item.outcome == "not_run":
        case.result = [junitparser.Skipped(item.reason)]
    elif (item.stars or 0) < needed:
        case.result = [junitparser.Failure(f"{item.stars} stars: {item.reason}", "stars")]
    lines = [f"{stars(item.stars, item.outcome)} {item.reason}"]
    lines += [f"{_mark(one)} {one.kind}: {one.claim}{_state(one)}\n    {one.measured}" for one in item.evidence]
    case.system_out = "\n".join(lines)
    return case


def summary_of(rated: Rated, changes: Sequence[Change] | None = None) -> str:
    """A summary in Markdown: the rating, the categories, what is not well, and what changed."""
    run, rating = rated.run, rated.rating
    mean = "nothing was judged" if rating.mean is None else f"mean {rating.mean:.1f}"
    lines = [f"## Durable execution on Temporal {stars(rating.stars, 'not_run')}", ""]
    lines += [f"{mean} over {rating.judged} judged, {rating.inconclusive} inconclusive, {rating.not_run} not run. "]
    lines += [f"Capped by {', '.join(rating.capped_by)}."] if rating.capped_by else []
    lines += ["", run.words, "", "| category | mean | items |", "|---|---|---|"]
    for one in run.categories:
        given = " ".join(str(item.stars or "?") for item in one.items)
        lines.append(f"| {one.category} {one.title} | {_mean(run, one.category)['mean']} | {given} |")
    odd = [item for item in run.items.values() if item.outcome != "judged" or (item.stars or 0) < 3]
    lines += ["", *(f"- **{item.id}** {item.title}: {_line(item.reason)}" for item in odd)] if odd else []
    if changes is not None:
        count = collections.Counter(change.what for change in changes)
        lines += ["", "### Changed", "", ", ".join(f"{n} {what}" for what, n in count.items()) or "nothing", ""]
        lines += [f"- **{one.what}** {one.item}: {_line(one.words)}" for one in changes if one.what != "moved"]
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    """A text of an item's in one line of Markdown that it cannot break out of."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
