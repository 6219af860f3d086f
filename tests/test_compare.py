"""Two runs side by side: losses are found, also under a cap, noise is not, and what is no record is refused."""

from common import accept_record
from harness.compare import compare, how_far, lines_of, status_of
from harness.record import CategoryRecord, FactRecord, Run, load_run

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import junitparser
import pytest
from helpers import ROOT, changed, evaluate, run, tiny
from test_run_all import project

ENVIRONMENT = {
    "python": "3.11.7", "sdk": "1.35.0", "server": "1.32.0", "where": "embedded server", "os": "Linux", "cpus": 2,
    "date": "2026-01-01T00:00:00+00:00", "seed": 1, "speed": 1.0,
}  # fmt: skip


def evidence(kind: str, held: bool | None, claim: str = "", *facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "claim": claim or kind, "held": held, "measured": "", "facts": list(facts)}


def item(stars: int | None = 4, outcome: str = "judged", *pieces: dict[str, Any], id: str = "XX-01") -> dict[str, Any]:
    return {
        "id": id, "title": "One", "fail_closed": False, "outcome": outcome, "stars": stars, "stage": None,
        "reason": "because", "seconds": 1.0, "evidence": list(pieces),
    }  # fmt: skip


def a_run(*items: dict[str, Any], **environment: Any) -> Run:
    record = {"category": "XX", "title": "X", "environment": ENVIRONMENT | environment, "items": list(items)}
    return Run("a run", [CategoryRecord.model_validate(record)])


WORKS, HOLDS, LOST = evidence("works", True), evidence("holds", True), evidence("holds", False)
SEEN, GONE, UNRUN = evidence("limit", True), evidence("limit", False), evidence("holds", None)


@pytest.mark.parametrize(
    ("old", "new", "found", "status"),
    [
        (item(), item(), [], 0),
        (item(4), item(3), ["lost"], 1),
        (item(3), item(4), ["gained"], 1),
        (item(4), item(None, "inconclusive"), ["lost"], 1),
        (item(None, "inconclusive"), item(4), ["gained"], 1),
        (item(4), item(None, "not_run"), ["not run here"], 0),
        (item(None, "not_run"), item(4), ["not run there"], 0),
        # The stars are the same, held down by a cap, and yet something was lost.
        (item(3, "judged", WORKS, HOLDS, SEEN), item(3, "judged", WORKS, LOST, SEEN), ["lost"], 1),
        (item(3, "judged", LOST), item(3, "judged", HOLDS), ["gained"], 1),
        # A limit that is no longer seen is gained, one that appears is lost.
        (item(4, "judged", SEEN), item(4, "judged", GONE), ["gained"], 1),
        (item(4, "judged", GONE), item(4, "judged", SEEN), ["lost"], 1),
        (item(4, "judged", HOLDS), item(4, "judged", UNRUN), ["not run here"], 0),
        (item(4, "judged", UNRUN), item(4, "judged", HOLDS), ["not run there"], 0),
        (item(4, "judged", WORKS), item(4, "judged", WORKS, HOLDS), ["new"], 1),
        (item(4, "judged", WORKS, HOLDS), item(4, "judged", WORKS), ["gone"], 0),
    ],
)
def test_what_differs_is_found(old: dict[str, Any], new: dict[str, Any], found: list[str], status: int) -> None:
    changes = compare(a_run(old), a_run(new))
    assert [change.what for change in changes] == found
    assert status_of(changes) == status
    text = "\n".join(words for _, words in lines_of(a_run(old), a_run(new), changes))
    assert ("stale" in text) == any(what in ("gained", "new") for what in found)


def fact(low: float, median: float, high: float, times: int = 9, unit: str = "ms") -> FactRecord:
    spread = {"median": median, "low": low, "high": high, "times": times, "unit": unit}
    return FactRecord(name="a step", measured=spread, expected=None, held=True)


@pytest.mark.parametrize(
    ("old", "new", "moved"),
    [
        (fact(9, 10, 12), fact(10, 11, 14), False),  # the spreads meet
        (fact(9, 10, 12), fact(13, 14, 15), True),
        (fact(90, 100, 101), fact(102, 103, 104), False),  # they do not, but nobody would care
        (fact(10, 10, 10, 1), fact(30, 30, 30, 1), False),  # once each: who knows their noise
        (fact(10, 10, 10, 1), fact(50, 50, 50, 1), True),
        (fact(0.1, 0.2, 0.3), fact(1, 2, 3), False),  # below what a scheduler takes
        (fact(9, 10, 12), fact(13, 14, 15, unit="s"), False),  # another unit is another figure
        (fact(13, 14, 15), fact(9, 10, 12), True),
    ],
)
def test_a_figure_moves_when_it_leaves_the_noise_of_both(old: FactRecord, new: FactRecord, moved: bool) -> None:
    assert (how_far(old, new) is not None) is moved


def test_facts_that_are_no_figures_do_not_move() -> None:
    one = FactRecord(name="id", measured="CP-01-a", expected=None, held=True)
    assert how_far(one, one.model_copy(update={"measured": "CP-01-b"})) is None


def test_surroundings_that_differ_head_the_comparison() -> None:
    lines = lines_of(a_run(item(), sdk="1.22.0"), a_run(item(), where="cluster"), [])
    assert any("sdk 1.22.0 -> 1.35.0" in words and "embedded server -> cluster" in words for _, words in lines)


def test_a_run_against_itself_repeated_finds_nothing_and_a_slowed_step_is_found(tmp_path: Path) -> None:
    script = tiny(tmp_path)
    first = tmp_path / "first.json"
    assert run(script, "TT-01", "TT-11", "--json", str(first), cwd=tmp_path).returncode == 0
    again = run(script, "TT-01", "TT-11", "--against", str(first), cwd=tmp_path)
    assert again.returncode == 0, again.stdout
    assert "Nothing was lost or gained, and nothing moved beyond noise." in again.stdout
    script.write_text(script.read_text().replace("STEP = 0.01", "STEP = 0.2"))
    slowed = run(script, "TT-01", "TT-11", "--against", str(first), cwd=tmp_path)
    assert "Moved beyond noise: 1" in slowed.stdout
    assert "a step" in slowed.stdout


def test_a_loss_fails_the_run_and_accepting_writes_the_new_record(tmp_path: Path) -> None:
    script, file = tiny(tmp_path), tmp_path / "old.json"
    assert run(script, "TT-01", "--json", str(file), cwd=tmp_path).returncode == 0
    script.write_text(script.read_text().replace('holds("an edge holds", True,', 'holds("an edge holds", False,'))
    lost = run(script, "TT-01", "--against", str(file), cwd=tmp_path)
    assert lost.returncode == 1
    assert "an edge holds (does not hold)" in lost.stdout
    accepted = run(script, "TT-01", "--against", str(file), "--accept", cwd=tmp_path)
    assert f"Accepted: {file}" in accepted.stdout.replace("\n", "")
    assert json.loads(file.read_text())["items"][0]["stars"] == 3
    assert "Nothing was lost" in run(script, "TT-01", "--against", str(file), cwd=tmp_path).stdout


def test_accepting_some_items_keeps_the_others_as_recorded(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    record = {"category": "XX", "items": [item(3), item(4, id="XX-02")]}
    file.write_text(json.dumps(record), encoding="utf-8")
    accept_record(file, {"category": "XX", "items": [item(5, id="XX-02")]})
    stars = {one["id"]: one["stars"] for one in json.loads(file.read_text(encoding="utf-8"))["items"]}
    assert stars == {"XX-01": 3, "XX-02": 5}


def test_a_whole_run_is_accepted_into_the_files_of_its_own_scripts(tmp_path: Path) -> None:
    command = project(tmp_path, _01_tt="TT-01")
    assert run(command, "--record", str(tmp_path / "results"), cwd=tmp_path).returncode == 0
    done = run(command, "--against", str(tmp_path / "results"), "--accept", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [one.name for one in (tmp_path / "results").iterdir()] == ["01_tt.json"]
    refused = run(command, "--against", str(tmp_path / "results" / "01_tt.json"), "--accept", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("half a rec", "is not JSON"),
        ('{"name": "somebody-else"}', "is no record of this evaluation"),
        ("[1, 2]", "is no record of this evaluation"),
        (json.dumps({"schema": 99}), "newer evaluation"),
        (json.dumps({"category": "XX", "title": "X", "environment": ENVIRONMENT, "items": []}), "without items"),
    ],
)
def test_what_is_no_record_is_refused_before_anything_runs(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "record.json"
    if text is not None:
        file.write_text(text)
    for command in (tiny(tmp_path), project(tmp_path, _01_aa="TT-01")):
        done = run(command, "--against", str(file), cwd=tmp_path)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""


def test_accepting_needs_a_run_to_replace(tmp_path: Path) -> None:
    done = run(tiny(tmp_path), "--accept", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--against" in done.stderr


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run(tiny(tmp_path), "--against", str(tmp_path / "empty"), cwd=tmp_path)
    assert done.returncode == 2
    assert "holds no record" in done.stderr


def test_what_is_recorded_can_be_read() -> None:
    recorded = load_run(ROOT / "results")
    assert len(recorded.items) == 58
    assert compare(recorded, recorded) == []


def test_junit_is_read_back_by_a_kept_parser(tmp_path: Path) -> None:
    file, summary = tmp_path / "junit.xml", tmp_path / "summary.md"
    command = project(tmp_path, _01_aa="TT-01 TT-02", _02_bb="TT-03 TT-05")
    done = run(command, "--junit", str(file), cwd=tmp_path, env={"GITHUB_STEP_SUMMARY": str(summary)})
    assert done.returncode == 1
    suites = list(junitparser.JUnitXml.fromfile(str(file)))
    cases = {case.name.split()[0]: case for suite in suites for case in suite}
    assert sorted(cases) == ["TT-01", "TT-02", "TT-03", "TT-05"]
    kinds = {id: [type(one).__name__ for one in case.result] for id, case in cases.items()}
    assert kinds == {"TT-01": [], "TT-02": [], "TT-03": ["Error"], "TT-05": ["Skipped"]}
    assert "a workflow in a worker process greets" in str(cases["TT-01"].system_out)
    text = summary.read_text(encoding="utf-8")
    assert "| TT Tiny |" in text
    assert "**TT-03** Throws: ValueError" in text


@pytest.mark.parametrize("option", ["--html", "--junit"])
def test_an_unwritable_file_is_refused_before_anything_runs(tmp_path: Path, option: str) -> None:
    done = run(project(tmp_path, _01_aa="TT-01"), option, str(tmp_path / "no" / "file"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert option in done.stderr


def test_a_falling_star_is_told_apart_from_a_changed_script(tmp_path: Path) -> None:
    """A whole item against its own record, with the feature taken out: what is lost is named, stars and claim."""
    script = ROOT / "06_cp_compensation.py"
    first = evaluate(script, tmp_path, "CP-02")
    file = tmp_path / "old.json"
    file.write_text(json.dumps(first.record), encoding="utf-8")
    broken = changed(script, tmp_path, ("if scheduled.activity_id == activity_id:", "if scheduled.activity_id:"))
    done = run(broken, "CP-02", "--against", str(file), cwd=tmp_path)
    assert done.returncode == 1
    assert "Lost: " in done.stdout
