"""The two reports say what was recorded, in both languages, and a changed star or figure does not pass."""

from run_all import ASSUMPTIONS, fail_closed_states, rate

import re
from pathlib import Path

import pytest
from helpers import ROOT, SCRIPTS
from reports import (
    Record,
    item_sections,
    load,
    mutations,
    quotes,
    rows,
    sections,
    wrong_comparison,
    wrong_counts,
    wrong_figures,
    wrong_items,
    wrong_overview,
    wrong_prose,
    wrong_states,
    wrong_versions,
)

RECORD = load(ROOT / "results")
COMPARISON = {
    "REPORT.md": "Comparison with LangGraph, CrewAI, DBOS, Restate and DBOSify",
    "REPORT_ja.md": "LangGraph・CrewAI・DBOS・Restate・DBOSify との比較",
}
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in COMPARISON}
ENGLISH, JAPANESE = TEXTS.values()


def problems(name: str, text: str, record: Record) -> list[str]:
    """All that a report says and the record does not."""
    states = fail_closed_states(record.items, ASSUMPTIONS)
    return [
        *wrong_items(text, record),
        *wrong_overview(text, record),
        *wrong_figures(text, record, COMPARISON[name]),
        *wrong_prose(text, record),
        *wrong_counts(text, record),
        *wrong_states(text, record, states),
        *wrong_comparison(text, record),
        *wrong_versions(text, record),
    ]


def differences(english: str, japanese: str) -> list[str]:
    """The items whose figures are not the same in both languages."""
    left, right = item_sections(english), item_sections(japanese)
    return [id for id in left if id not in right or sorted(quotes(left[id][1])) != sorted(quotes(right[id][1]))]


@pytest.mark.parametrize("name", TEXTS)
def test_a_report_says_what_was_recorded(name: str) -> None:
    assert problems(name, TEXTS[name], RECORD) == []


def test_both_languages_say_the_same() -> None:
    assert differences(ENGLISH, JAPANESE) == []
    assert len(sections(ENGLISH)) == len(sections(JAPANESE)) >= 14
    for left, right in zip(sections(ENGLISH), sections(JAPANESE), strict=True):
        assert len(rows("\n".join(left[1]), ".*")) == len(rows("\n".join(right[1]), ".*")), left[0]
        english, japanese = (sorted(quotes("\n".join(lines))) for lines in (left[1], right[1]))
        assert english == japanese, left[0]


def test_the_record_is_whole() -> None:
    assert [f"{path.stem}.json" for path in SCRIPTS] == [
        path.name for path in sorted((ROOT / "results").glob("[01]*.json"))
    ]
    assert len(RECORD.items) == 58
    assert len({str(one["environment"]["sdk"]) + one["environment"]["server"] for one in RECORD.categories}) == 1


def test_the_overall_rating() -> None:
    """On the dev server, and in a second line on the cluster where one was recorded."""
    expected = []
    for record in [RECORD, *([RECORD.cluster] if RECORD.cluster else [])]:
        rating = rate(record.items, ASSUMPTIONS)
        assert rating.mean is not None
        assert rating.stars is not None
        counts = (str(rating.judged), str(rating.inconclusive), str(rating.not_run))
        expected.append(("★" * rating.stars + "☆" * (5 - rating.stars), f"{rating.mean:.1f}", *counts))
    for text in TEXTS.values():
        said = re.findall(r"^> .*?([★☆]{5}).*?(\d\.\d).*?(\d+).*?(\d+).*?(\d+)", text, re.MULTILINE)
        assert said == expected


@pytest.mark.parametrize("name", TEXTS)
def test_a_changed_star_or_figure_is_noticed(name: str) -> None:
    """Every single one: in the report itself, or because the other language then says something else."""
    unnoticed = []
    for what, text in mutations(TEXTS[name]):
        pair = (text, JAPANESE) if name == "REPORT.md" else (ENGLISH, text)
        left, right = (sorted(quotes(one)) for one in pair)
        if left == right and not problems(name, text, RECORD):
            unnoticed.append(what)
    assert unnoticed == []


def with_other_stars(record: Record, id: str) -> Record:
    """The record with one item's verdict changed."""
    stars = record.items[id]["stars"]
    changed = {**record.items[id], "outcome": "judged", "stars": stars % 5 + 1 if stars else 3}
    return Record(
        [
            {**category, "items": [changed if item["id"] == id else item for item in category["items"]]}
            for category in record.categories
        ],
        record.comparison,
        record.cluster,
    )


@pytest.mark.parametrize("name", TEXTS)
def test_a_changed_verdict_is_noticed(name: str) -> None:
    assert [id for id in RECORD.items if not problems(name, TEXTS[name], with_other_stars(RECORD, id))] == []


@pytest.mark.parametrize("name", [*TEXTS, "README.md"])
def test_every_file_a_page_shows_or_names_is_there(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [one for one in links if not (ROOT / one).exists()] == []


def test_results_hold_no_path_of_a_machine() -> None:
    for file in (ROOT / "results").rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"/(root|home|work|tmp)/|" + re.escape(str(Path.home())), text), file.name
