"""What the two reports say, compared with what was recorded: every star, count, state and figure.

The reports are written by hand. Three rules make them checkable:

- An item's heading is `#### XX-01 Title ★★★★☆ / ★★★★★ stage`, with the stars on the dev server and on the cluster
  (these only where a cluster was recorded), and `, fail-closed` behind it where it is.
- A figure stands in backticks, word for word as the item measured it. In a line that is not an item's
  own, it belongs to one of the items that the line names, or to `results/comparison.json` where the
  section is the comparison.
- Tables of counts hold plain numbers, which are counted again from the record. A plain number of two digits or more
  that stands elsewhere outside the items' sections is held against the same as a figure in backticks, and against
  the records of other versions.
- The table of all items has a row an item, `| [XX-01](#xx-01) | title | stars | stars on the cluster | stage | ... |`,
  and each row leads to an anchor above the item's heading.
"""

import collections
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ITEM = re.compile(r"\b[A-Z]{2}-\d\d\b")
HEADING = re.compile(
    r"^#### (?P<id>[A-Z]{2}-\d\d) (?P<title>.+?) (?P<stars>[★☆]{5}|\?|-)(?: / (?P<cluster>[★☆]{5}|\?|-))?"
    r"(?: (?P<stage>[^,]+))?(?P<closed>, fail-closed)?$"
)
SPAN = re.compile(r"`([^`\n]*)`")
# A code span that names something instead of quoting a figure: a file, an option, a setting, a command.
NAME = re.compile(
    r"^(--[a-z-]+ \d+|\d\d_\w+\.py|0\d|[\w./-]+\.(py|md|json|svg|png|lock|toml|yml)|[A-Z]{2}-\d\d|uv run .*"
    r"|TMPRL\d+|\[TMPRL\d+\])$"
)


@dataclass(frozen=True)
class Record:
    """The recorded run: what each category wrote, and the comparison with other systems, where there is one."""

    categories: Sequence[Mapping[str, Any]]
    comparison: Mapping[str, Any]
    cluster: "Record | None" = None
    others: Mapping[str, "Record"] = field(default_factory=dict)  # of other versions, by the folder's name

    @functools.cached_property
    def items(self) -> dict[str, Mapping[str, Any]]:
        return {item["id"]: item for category in self.categories for item in category["items"]}

    @functools.cached_property
    def words(self) -> dict[str, str]:
        """All that each item claimed and measured, as one text."""
        texts = {}
        for id, item in self.items.items():
            words = [f"{one['claim']}\n{one['measured']}" for one in item["evidence"]]
            words += [self.cluster.words[id]] if self.cluster else []
            texts[id] = squeezed("\n".join([*words, item["reason"], f"{item['seconds']:.1f} s"]))
        return texts

    @functools.cached_property
    def environment(self) -> str:
        here = "\n".join(f"{name} {value}" for one in self.categories for name, value in one["environment"].items())
        return squeezed(f"{here}\n{self.cluster.environment}" if self.cluster else here)

    @functools.cached_property
    def systems(self) -> str:
        """All that the comparison measured."""
        return squeezed(json.dumps(self.comparison, ensure_ascii=False))


def load(folder: Path) -> Record:
    """The record in a results folder."""
    categories = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("[01][0-9]_*.json"))]
    file = folder / "comparison.json"
    cluster = load(folder / "cluster") if (folder / "cluster").exists() else None
    others = {path.name: load(path) for path in sorted(folder.glob("sdk-*"))}
    return Record(categories, json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}, cluster, others)


def stars_of(item: Mapping[str, Any]) -> str:
    """An item's stars as the reports write them."""
    if item["stars"] is None:
        return "?" if item["outcome"] == "inconclusive" else "-"
    stars: int = item["stars"]
    return "★" * stars + "☆" * (5 - stars)


def sections(report: str) -> list[tuple[str, list[str]]]:
    """The report's parts in their order: (heading of level two, its lines)."""
    parts: list[tuple[str, list[str]]] = []
    for line in report.splitlines():
        if line.startswith("## "):
            parts.append((line[3:], []))
        elif parts:
            parts[-1][1].append(line)
    return parts


def item_sections(report: str) -> dict[str, tuple[re.Match[str], str]]:
    """The item headings of a report, each with the text below it."""
    found: dict[str, tuple[re.Match[str], str]] = {}
    current = None
    for line in report.splitlines():
        heading = HEADING.match(line)
        if heading:
            current = heading["id"]
            found[current] = (heading, "")
        elif line.startswith("#"):
            current = None
        elif current:
            found[current] = (found[current][0], found[current][1] + line + "\n")
    return found


@functools.lru_cache(maxsize=4)
def cells_of(report: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if line[:1] == "|"]


def rows(report: str, first: str) -> list[list[str]]:
    """The cells of all table rows whose first cell matches `first` in full."""
    return [row for row in cells_of(report) if re.fullmatch(first, row[0])]


def quotes(text: str) -> list[str]:
    """The figures that a text quotes: its code spans with a digit that do not name something."""
    return [span for span in SPAN.findall(text) if is_figure(span)]


def is_figure(span: str) -> bool:
    return re.search(r"\d", span) is not None and not NAME.match(span)


def squeezed(text: str) -> str:
    return " ".join(text.split())


@functools.cache
def occurs(quote: str, text: str) -> bool:
    """Whether a squeezed text holds the quote, and no digit continues it to either side."""
    quote = squeezed(quote)
    if quote not in text:
        return False
    return re.search(rf"(?<![\d.]){re.escape(quote)}(?!\.?\d)", text) is not None


def wrong_items(report: str, record: Record) -> Iterable[str]:
    """Headings that differ from the record, and figures that no evidence of the item holds."""
    found = item_sections(report)
    if list(found) != list(record.items):
        yield f"items differ: {sorted(set(found) ^ set(record.items)) or 'their order'}"
    for id, (heading, text) in found.items():
        if id not in record.items:
            continue
        item = record.items[id]
        if heading["stars"] != stars_of(item):
            yield f"{id}: {heading['stars']} but recorded {stars_of(item)}"
        on_cluster = stars_of(record.cluster.items[id]) if record.cluster else None
        if heading["cluster"] != on_cluster:
            yield f"{id}: {heading['cluster']} on the cluster but recorded {on_cluster}"
        if (heading["stage"] or "") != (item["stage"] or ""):
            yield f"{id}: stage {heading['stage']} but recorded {item['stage']}"
        if bool(heading["closed"]) != item["fail_closed"]:
            yield f"{id}: fail-closed is said wrongly"
        for quote in quotes(text):
            if not occurs(quote, record.words[id]):
                yield f"{id}: `{quote}` is not in its evidence"
        for number in re.findall(r"(?<![A-Za-z0-9_.-])\d+(?:\.\d+)?", re.sub(r"`[^`]*`|[A-Z]{2}-\d\d", "", text)):
            if not occurs(number, record.words[id]):
                yield f"{id}: {number} is not in its evidence"


def wrong_overview(report: str, record: Record) -> Iterable[str]:
    """Rows of the table of all items that differ from the items' own headings or lead nowhere."""
    found = item_sections(report)
    said = {row[0]: row[1:5] for row in rows(report, r"\[[A-Z]{2}-\d\d\]\(#[a-z]{2}-\d\d\)")}
    if record.cluster is None and not said:
        return
    expected = {
        f"[{id}](#{id.lower()})": [one["title"], one["stars"], one["cluster"] or "", one["stage"] or ""]
        for id, (one, _) in found.items()
    }
    if list(said) != list(expected):
        yield f"rows of the overview: {sorted(set(said) ^ set(expected)) or 'their order'}"
    yield from (f"{name} in the overview: {said[name]}" for name in said if said[name] != expected.get(name))
    lost = [id for id in found if f'<a id="{id.lower()}"></a>\n\n#### {id} ' not in report]
    yield from (f"{id}: no anchor above its heading" for id in lost)


def wrong_figures(report: str, record: Record, comparison: str) -> Iterable[str]:
    """Figures outside the items' own sections that nothing which their line names holds.

    `comparison` is the heading of the section whose figures come from the other systems' record.
    """
    for heading, lines in sections(report):
        if any(HEADING.match(line) for line in lines):
            continue
        for line in lines:
            named = [id for id in ITEM.findall(line) if id in record.items]
            texts = [*(record.words[id] for id in named), record.environment]
            texts += [record.systems] if heading == comparison else []
            lost = [one for one in quotes(line) if not any(occurs(one, text) for text in texts)]
            yield from (f"{heading}: `{one}` is not recorded" for one in lost)


def wrong_prose(report: str, record: Record) -> Iterable[str]:
    """Plain numbers of two digits or more outside the items' own sections that nothing which their line names holds."""
    for heading, lines in sections(report):
        if any(HEADING.match(line) for line in lines):
            continue
        for line in lines:
            if re.match(r"\| (?:[A-Z]{2}|\*\*)", line):  # a row of counts
                continue
            named = [id for id in ITEM.findall(line) if id in record.items]
            every = [record, *record.others.values()]
            texts = [record.systems, *(one.environment for one in every)]
            texts += [one.words[id] for one in every for id in named if id in one.words]
            lost = [one for one in numbers(line) if not any(occurs(one.replace(",", ""), text) for text in texts)]
            lost = [one for one in lost if not any(occurs(one, text) for text in texts)]
            yield from (f"{heading}: {one} is not recorded" for one in lost)


def numbers(line: str) -> list[str]:
    """The plain numbers of two digits or more in a line: no code, item, link, day, version, or place in a list."""
    bare = re.sub(r"`[^`]*`|\[[^]]*\]\([^)]*\)|[A-Z]{2}-\d\d|\d{4}-\d\d-\d\d|\d+\.\d+\.\d+|^\d+\. ", "", line)
    bare = re.sub(r"(?:Python|SDK|Server|RMF|MAP|MEASURE|MANAGE|GOVERN) ?\d+(?:\.\d+)*", "", bare)
    return [one for one in re.findall(r"(?<![A-Za-z0-9_.-])\d+(?:[.,]\d+)*", bare) if len(re.sub(r"\D", "", one)) > 1]


def version_row(record: Record, other: Record) -> list[str]:
    """What the table of versions says of one: as many stars as today, more, fewer, not run, inconclusive, by item."""
    kinds: dict[str, list[str]] = {kind: [] for kind in ("same", "more", "fewer", "not_run", "inconclusive")}
    for id, item in record.items.items():
        there = other.items[id]
        if there["stars"] is None or item["stars"] is None:
            kinds[there["outcome"] if there["stars"] is None else "more"].append(id)
        else:
            way = (there["stars"] > item["stars"]) - (there["stars"] < item["stars"])
            kinds[("same", "more", "fewer")[way]].append(id)
    lists = [f"{len(ids)}: {', '.join(ids)}" if ids else "0" for kind, ids in kinds.items() if kind != "same"]
    return [str(len(kinds["same"])), *lists]


def wrong_versions(report: str, record: Record) -> Iterable[str]:
    """Rows of the table of versions that do not say what is counted from the records of those versions."""
    said = {row[0]: row[1:] for row in rows(report, r"SDK [\d.]+, Server [\d.]+") if len(row) == 6}
    counted = {}
    for other in record.others.values():
        there = other.categories[0]["environment"]
        counted[f"SDK {there['sdk']}, Server {there['server']}"] = version_row(record, other)
    yield from (
        f"{one}: {said.get(one)}, but counted {counted[one]}" for one in counted if said.get(one) != counted[one]
    )
    yield from (f"{one}: there is no record" for one in said if one not in counted)


def category_row(category: Mapping[str, Any]) -> list[str]:
    """What the summary says of a category behind its name: items, mean, good, insufficient, inconclusive, not run."""
    outcomes = collections.Counter(item["outcome"] for item in category["items"])
    stars = [item["stars"] for item in category["items"] if item["stars"] is not None]
    good = sum(one >= 3 for one in stars)
    mean = f"{sum(stars) / len(stars):.1f}" if stars else "-"
    counts = (len(category["items"]), mean, good, len(stars) - good, outcomes["inconclusive"], outcomes["not_run"])
    return [str(one) for one in counts]


def wrong_counts(report: str, record: Record) -> Iterable[str]:
    """Rows of the summary that do not say what is counted from the record."""
    for category in record.categories:
        said = [row[2:] for row in rows(report, category["category"])]
        if said != [category_row(category)]:
            yield f"{category['category']}: the summary says {said}, counted {category_row(category)}"
    every = {"items": list(record.items.values())}
    said = [row[2:] for row in rows(report, r"\*\*.*\*\*") if len(row) == 8]
    if said != [[f"**{one}**" for one in category_row(every)]]:
        yield f"the summary's last row says {said}, counted {category_row(every)}"


def wrong_states(report: str, record: Record, states: Mapping[str, str]) -> Iterable[str]:
    """Rows of the fail-closed table, and of others that name an item and its stars, that differ from the record."""
    said = {row[0]: row for row in rows(report, ITEM.pattern) if len(row) == 4}
    for id, state in states.items():
        stars = stars_of(record.items[id]) if id in record.items else "-"
        if id not in said or said[id][2] != stars or (said[id][3] in ("passes", "合格")) != (state == "passes"):
            yield f"{id}: the fail-closed table says {said.get(id)}, but it is {stars}, {state}"
    for row in rows(report, ITEM.pattern + " .*"):
        if set(row[1]) <= set("★☆") and row[1] != stars_of(record.items[row[0][:5]]):
            yield f"{row[0]}: a table says {row[1]}"


def wrong_comparison(report: str, record: Record) -> Iterable[str]:
    """Rows of stars in the comparison that differ from its record: a system and its mode, then six times stars."""
    said = {row[0]: row[1:7] for row in rows(report, ".*") if len(row) == 8 and set(row[1]) <= set("★☆")}
    recorded = {
        f"{system['title']} {mode}" if len(system["stars"]) > 1 else str(system["title"]): [
            "?" if one["stars"] is None else "★" * one["stars"] + "☆" * (5 - one["stars"]) for one in stars.values()
        ]
        for system in record.comparison.get("systems", [])
        if "with" not in system["title"]
        for mode, stars in system["stars"].items()
    }
    if said != recorded:
        yield f"the comparison's stars differ: {[name for name in recorded if said.get(name) != recorded[name]]}"


def mutations(report: str) -> Iterable[tuple[str, str]]:
    """The report with one star or one figure changed at a time: (what was changed, the changed report)."""
    for shown in re.finditer(r"(?:^#### .*?|^\| (?!★).*?\| )([★☆]{5})", report, re.MULTILINE):
        stars = shown[1].count("★")
        other = "★" * (stars % 5 + 1)
        yield shown[0], report[: shown.start(1)] + other.ljust(5, "☆") + report[shown.end(1) :]
    for quote in SPAN.finditer(report):
        if is_figure(quote[1]):
            digit = re.search(r"\d", quote[0])
            assert digit
            at = quote.start() + digit.start()
            yield quote[0], report[:at] + str((int(digit[0]) + 1) % 10) + report[at + 1 :]
