"""run_all.py: its rating against hand-made verdicts, and the command itself over small scripts."""

from run_all import ASSUMPTIONS, DEPLOYMENTS, FAIL_CLOSED, ITEMS_IN_ALL, fail_closed_states, rate

import json
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, SCRIPTS, environment, run, tiny
from test_processes import TAG, tagged, wait_for


def item(stars: int | None, outcome: str = "judged") -> dict[str, Any]:
    return {"stars": stars, "outcome": outcome, "reason": "because"}


PASSING = {id: item(4) for id in FAIL_CLOSED}


@pytest.mark.parametrize(
    ("items", "mean", "stars"),
    [
        (PASSING, 4.0, 4),
        (PASSING | {"A": item(5), "B": item(5), "C": item(5), "D": item(5), "E": item(5)}, 4.5, 5),
        (PASSING | {"A": item(5), "B": item(5), "C": item(5), "D": item(5)}, 4.44, 4),
        (PASSING | {"A": item(None, "inconclusive"), "B": item(None, "not_run")}, 4.0, 4),
        (PASSING | {"A": item(1)}, 3.5, 4),
    ],
)
def test_the_mean_is_over_judged_items_and_a_half_rounds_up(items: Mapping[str, Any], mean: float, stars: int) -> None:
    rating = rate(items, ASSUMPTIONS)
    assert rating.mean == pytest.approx(mean, abs=0.01)
    assert (rating.stars, rating.capped_by) == (stars, [])
    assert rating.judged + rating.inconclusive + rating.not_run == len(items)


@pytest.mark.parametrize("id", FAIL_CLOSED)
@pytest.mark.parametrize("state", [item(3), item(None, "inconclusive"), item(None, "not_run"), None])
def test_each_fail_closed_item_caps_the_rating(id: str, state: dict[str, Any] | None) -> None:
    items = {other: item(5) for other in FAIL_CLOSED} | {id: state}
    rating = rate({other: one for other, one in items.items() if one}, ASSUMPTIONS)
    assert (rating.stars, rating.capped_by) == (2, [id])


def test_the_cap_does_not_lift() -> None:
    assert rate({id: item(1) for id in FAIL_CLOSED}, ASSUMPTIONS).stars == 1


def test_nothing_judged_is_no_star() -> None:
    rating = rate({"A": item(None, "inconclusive")}, ASSUMPTIONS)
    assert (rating.mean, rating.stars, rating.inconclusive) == (None, None, 1)


@pytest.mark.parametrize(
    ("others", "missing", "mean", "least", "stars"),
    [
        ([item(1)] * 4, 0, 2.67, 2.67, 3),
        ([item(None, "inconclusive")] * 4, 0, 4.0, 2.67, 3),
        ([], 4, 4.0, 2.67, 3),
        ([item(1), item(None, "inconclusive")], 2, 3.5, 2.67, 3),
        ([item(5)] * 5, 0, 4.5, 4.5, 5),
        ([item(5)] * 5, 1, 4.5, 4.18, 4),
        ([item(None, "not_run")] * 4, 0, 4.0, 4.0, 4),
    ],
)
def test_the_stars_cannot_rise_by_losing_items(
    others: list[dict[str, Any]], missing: int, mean: float, least: float, stars: int
) -> None:
    rating = rate(PASSING | {f"XX-{number}": one for number, one in enumerate(others)}, ASSUMPTIONS, missing)
    assert rating.mean == pytest.approx(mean, abs=0.01)
    assert rating.least == pytest.approx(least, abs=0.01)
    assert rating.stars == stars


@pytest.mark.parametrize("stars", range(1, 6))
@pytest.mark.parametrize("lost", [1, 5, 9])
def test_whoever_loses_items_is_never_rated_higher(stars: int, lost: int) -> None:
    """Whatever the lost ones would have had, and however many: inconclusive, or gone with their script."""
    whole = {f"XX-{number}": item(stars) for number in range(lost)}
    rated = rate(PASSING | whole, ASSUMPTIONS).stars
    assert rated
    for rating in (
        rate(PASSING | dict.fromkeys(whole, item(None, "inconclusive")), ASSUMPTIONS),
        rate(PASSING, ASSUMPTIONS, lost),
    ):
        assert rating.stars
        assert rating.stars <= rated
        assert rating.lost == lost


def test_runs_of_seconds_need_no_versioning() -> None:
    items = PASSING | {"VR-01": item(1)}
    assert rate(items, ASSUMPTIONS).capped_by == ["VR-01"]
    seconds = ASSUMPTIONS | {"run time": "seconds"}
    assert rate(items, seconds).capped_by == []
    assert fail_closed_states(items, seconds)["VR-01"] == "not applicable"


def project(tmp_path: Path, **scripts: str) -> Path:
    """A copy of run_all.py beside small scripts: name -> the ids of tiny's items that it is to have."""
    text = tiny(tmp_path).read_text(encoding="utf-8")
    for name, ids in scripts.items():
        keep = f"TT.items = [one for one in TT.items if one.id in {ids.split()}]\n    run(TT)"
        (tmp_path / f"{name.removeprefix('_')}.py").write_text(text.replace("run(TT)", keep), encoding="utf-8")
    shutil.copy(ROOT / "run_all.py", tmp_path)
    return tmp_path / "run_all.py"


def test_it_runs_shows_and_records_what_it_finds(tmp_path: Path) -> None:
    command = project(tmp_path, _01_aa="TT-01 TT-02", _02_bb="TT-05", _07_cc="TT-01")
    done = run(command, "--record", "--seed", "7", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    for words in (
        "TT-01  \u2605\u2605\u2605\u2605\u2605  Recommended",
        "TT-02  \u2605\u2605\u2605\u2606\u2606  Of every kind - failed (holds): it does not hold",
        "TT-05  -      Cannot run here - this needs the moon",
        "TT  \u2605\u2605\u2605\u2605\u2606 4.0  Tiny; 2 items: 2 good, 0 insufficient",
        "1 items: 0 good, 0 insufficient, 1 not run",
        "EX-01  -      Progress guarantee: not run",
        "run time:     minutes to hours",
        "language:     Python",
        "of 58 items",
        "Capped at 2 stars by EX-01, EX-03, RT-01, VR-01, OP-02",
        "seed 7",
    ):
        assert words in done.stdout
    begins = re.findall(r"(\d\d_\w\w)\.py begins", done.stdout)
    assert begins[-1] == "07_cc", "the script that measures runs last, alone"
    recorded = {path.name: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert sorted(recorded) == ["01_aa.json", "02_bb.json", "07_cc.json"]
    assert [one["id"] for one in recorded["01_aa.json"]["items"]] == ["TT-01", "TT-02"]


def test_chosen_scripts_and_assumptions(tmp_path: Path) -> None:
    command = project(tmp_path, _01_aa="TT-01", _02_bb="TT-03")
    done = run(command, "01", "--run-time", "seconds", cwd=tmp_path)
    assert done.returncode == 0
    assert "02_bb" not in done.stdout
    assert "run time:     seconds" in done.stdout
    assert "VR-01  -      Workflow versioning: not applicable" in done.stdout
    assert not (tmp_path / "results").exists()


def test_an_inconclusive_item_and_a_broken_script_fail_the_run(tmp_path: Path) -> None:
    command = project(tmp_path, _01_aa="TT-01", _02_bb="TT-03")
    assert run(command, cwd=tmp_path).returncode == 1
    (tmp_path / "02_bb.py").write_text("import sys\nsys.exit('broken on purpose')\n")
    done = run(command, cwd=tmp_path)
    assert done.returncode == 1
    assert "02_bb.py: no verdicts, exit status 1. broken on purpose" in done.stdout
    assert "TT-01  \u2605\u2605\u2605\u2605\u2605" in done.stdout
    assert "mean 5.0 over 1 judged of 58 items" in done.stdout
    assert "0 inconclusive, 0 not run, 1 of scripts that left no verdicts" in done.stdout
    assert "with one star for each of the 1 lost items the mean is 3.0" in done.stdout


def test_a_script_without_verdicts_loses_the_items_that_it_registers(tmp_path: Path) -> None:
    command = project(tmp_path, _01_aa="TT-01", _02_bb="TT-03")
    registers = "".join(f'@TT.item("TT-0{number}", "One")\n' for number in range(1, 5))
    (tmp_path / "02_bb.py").write_text(f"import sys\nsys.exit(1)\n{registers}")
    done = run(command, cwd=tmp_path)
    assert done.returncode == 1
    assert "4 of scripts that left no verdicts" in done.stdout
    assert "with one star for each of the 4 lost items the mean is 1.8" in done.stdout


def test_the_scripts_register_as_many_items_as_there_are() -> None:
    registered = [len(re.findall(r"\.item\(\s*\"[A-Z]{2}-\d\d\"", path.read_text())) for path in SCRIPTS]
    assert sum(registered) == ITEMS_IN_ALL


def test_the_tables_can_be_drawn(tmp_path: Path) -> None:
    done = run(project(tmp_path, _01_aa="TT-01 TT-02"), "--pictures", "--record", cwd=tmp_path)
    picture = (tmp_path / "docs" / "run_all.svg").read_text(encoding="utf-8")
    assert done.returncode == 0
    assert "Tiny;" in picture.replace("&#160;", " ")
    assert "begins" not in picture, "the tables alone"
    assert "@font-face" not in picture, "it fetches nothing"
    assert str(tmp_path) not in picture


@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [
        (["99"], {}, "choose from 01"),
        (["--jobs", "0"], {}, "--jobs"),
        (["--record", "/dev/null/results"], {}, "--record"),
        ([], {"TEMPORAL_ADDRESS": "127.0.0.1:1"}, "nobody listens there"),
        ([], {"TEMPORAL_API_KEY": "secret-b4"}, "TEMPORAL_ADDRESS"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: list[str], env: dict[str, str], words: str) -> None:
    done = run(project(tmp_path, _01_aa="TT-01", _02_bb="TT-01"), *arguments, cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "secret-b4" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_every_script(tmp_path: Path, number: signal.Signals) -> None:
    tag, alive = uuid.uuid4().hex, tmp_path / "alive"
    process = subprocess.Popen(
        [sys.executable, str(project(tmp_path, _01_aa="TT-07 TT-01", _02_bb="TT-07 TT-01")), "--jobs", "2"],
        env=environment(**{TAG: tag, "TINY": str(alive), "TMPDIR": str(tmp_path)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: alive.exists() and len(alive.read_text().splitlines()) == 2, "both scripts are in full swing")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (128 + number if number != signal.SIGKILL else -number)
    assert "Traceback" not in err
    wait_for(lambda: tagged(tag) == [], "every script, worker and server has ended", 20)


def test_a_closed_pipe_ends_it(tmp_path: Path) -> None:
    tag = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, str(project(tmp_path, _01_aa="TT-01", _02_bb="TT-01", _03_cc="TT-01")), "--jobs", "1"],
        env=environment(**{TAG: tag}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr
    assert process.stderr.read() == ""
    assert tagged(tag) == []


def test_only_the_fail_closed_items_are_run_where_that_is_asked(tmp_path: Path) -> None:
    command = project(tmp_path, _01_ex="TT-01 TT-02", _06_cp="TT-02")
    text = (tmp_path / "01_ex.py").read_text().replace('"TT-01"', '"EX-01"').replace('"TT-02"', '"EX-03"')
    (tmp_path / "01_ex.py").write_text(text.replace("['TT-01', 'TT-02']", "['EX-01', 'EX-03']"))
    done = run(command, "--fail-closed", cwd=tmp_path)
    assert "EX-01  \u2605\u2605\u2605\u2605\u2605" in done.stdout, done.stdout + done.stderr
    assert "06_cp" not in done.stdout


def test_timings_say_where_the_time_went(tmp_path: Path) -> None:
    done = run(project(tmp_path, _01_aa="TT-01"), "--timings", cwd=tmp_path)
    assert re.search(r"01 TT +[\d.]+ s, [\d.]+ own \+ [\d.]+ servers and workers; TT-01 [\d.]+", done.stdout)


def test_every_place_that_a_record_knows_has_its_deployment() -> None:
    schema = json.loads((ROOT / "docs" / "record.schema.json").read_text(encoding="utf-8"))
    assert set(schema["$defs"]["environment"]["properties"]["where"]["enum"]) == set(DEPLOYMENTS)
