"""The comparison with other systems: its rule, its table, its ledger, and two small real runs."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from helpers import ROOT, environment

FOLDER = ROOT / "comparison"
SYSTEMS = ["temporal", "langgraph", "crewai", "dbos", "restate", "temporal_langgraph", "temporal_crewai"]


def load() -> ModuleType:
    """probes.py, which is no package and stands in another folder."""
    spec = importlib.util.spec_from_file_location("probes", FOLDER / "probes.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["probes"] = module
    spec.loader.exec_module(module)
    return module


probes = load()


def facts(**changes: Any) -> dict[int, dict[str, Any]]:
    """What a faultless system without a server would show; `changes` are p1=..., p2=... and so on."""
    good = {"finished": True, "by_itself": True, "error": "", "again": [], "after": ["s4", "s5"], "seconds": 1.0}
    change = {"outcome": "noticed", "heals": True, "after": [], "error": "x"}
    everything: dict[int, dict[str, Any]] = {
        1: dict(good),
        2: good | {"again": [], "after": ["s3", "s4", "s5"]},
        3: good | {"server_killed": False},
        4: {"error": "", "ran": [], "recorded": list(probes.FIVE), "noticed": "diverges", "ran_swapped": []},
        5: {one: dict(change) for one in probes.CHANGES} | {"remedy": {"works": True, "after": [], "error": ""}},
        6: {shape: {"ms": 2, "min": 1, "max": 3, "cpu_ms": 1} for shape in ("sequential", "parallel")},
        7: good | {"late": 0.1},
        8: {"finished": True, "attempts": 3, "gaps": [0.2, 0.4], "native": True, "error": ""},
        9: {"finished": 20, "lost": 0, "twice": 0, "unreported": 2, "kills": 3, "by_itself": True}
        | {"seconds": 9.0, "error": ""},
        10: {
            "packages_mb": 20.0,
            "server_mb": 0.0,
            "import": 0.5,
            "import_min": 0.4,
            "import_max": 0.6,
            "lines": {"setup": 10, "five": 12, "human": 20},
            "names": 5,
            "server": False,
            "llm": dict.fromkeys(("agent loop", "model client", "tool calling", "agent framework integration"), True),
        },
    }
    for name, change_of in changes.items():
        of = everything[int(name[1:])]
        for key, value in change_of.items():
            of[key] = of[key] | value if isinstance(value, dict) else value
    return everything


def records(of: dict[int, dict[str, Any]], system: str = "one", column: str = "only") -> list[dict[str, Any]]:
    made = []
    for probe, seen in of.items():
        outcome, measured = probes.words(probe, seen)
        row = {"system": system, "column": column, "probe": probe, "seconds": 1.0, "facts": seen, "status": "seen"}
        made.append(row | {"outcome": outcome, "measured": measured})
    return made


def stars(of: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return {row: rated["stars"] for row, rated in probes.rate(records(of)).items()}


def test_a_faultless_system_has_five_stars_everywhere() -> None:
    assert set(stars(facts()).values()) == {5}


@pytest.mark.parametrize(
    ("change", "row", "expected"),
    [
        ({"p1": {"by_itself": False}}, "durability", 4),
        ({"p1": {"again": ["s1", "s2", "s3"], "by_itself": False}}, "durability", 3),
        ({"p1": {"finished": False, "by_itself": False}}, "durability", 3),
        ({"p9": {"twice": 1}}, "durability", 4),
        ({"p9": {"lost": 1}}, "durability", 4),
        ({"p7": {"late": 3.4}}, "durability", 4),
        ({"p3": {"finished": False}}, "HITL", 1),
        ({"p3": {"by_itself": False}}, "HITL", 4),
        ({"p3": {"again": ["draft"]}}, "HITL", 4),
        ({"p4": {"noticed": ""}}, "replay", 4),
        ({"p4": {"ran": ["s1"], "noticed": ""}}, "replay", 3),
        ({"p4": {"error": "no", "recorded": [], "noticed": ""}}, "replay", 1),
        ({"p5": {"inserted": {"outcome": "done twice", "heals": None}}}, "versioning", 3),
        ({"p5": {"renamed next": {"outcome": "noticed", "heals": False}}}, "versioning", 4),
        ({"p5": {"renamed next": {"outcome": "step lost silently", "heals": None}}}, "versioning", 3),
        ({"p5": {"remedy": {"works": False}}}, "versioning", 4),
        ({"p10": {"server": True}}, "learning curve", 4),
        ({"p10": {"server_mb": 200.0}}, "learning curve", 4),
    ],
)
def test_each_statement_costs_a_star(change: dict[str, Any], row: str, expected: int) -> None:
    seen = stars(facts(**change))
    assert seen[row] == expected
    assert all(count == 5 for other, count in seen.items() if other != row)


def test_what_was_not_seen_earns_nothing_and_shows() -> None:
    made = records(facts())
    for record in made:
        if record["probe"] == 9:
            record["status"] = "inconclusive"
    rated = probes.rate(made)
    assert rated["durability"]["stars"] == 4
    assert probes.stars_text(rated["durability"]) == "4?"
    assert len(rated["durability"]["unknown"]) == 1
    nothing = probes.rate([])
    assert {row["stars"] for row in nothing.values()} == {None}
    assert probes.stars_text(nothing["HITL"]) == "-"


@pytest.mark.parametrize(
    ("finished", "error", "seen", "expected"),
    [
        (False, "mismatch", "s1 s2 s3", "noticed"),
        (False, "", "s1 s2 s3", "stuck silently"),
        (True, "", "s1 s2 s3 s4 s5", "accepted"),
        (True, "", "s1 s2 s3 s4new s5", "accepted"),
        (True, "", "s1 s2 s3", "step lost silently"),
        (True, "", "s1 s2 s3 s1 s2 s2b s3 s4 s5", "done twice"),
        (True, "", "s1 s2 s3 s2b s4 s5", "out of order"),
    ],
)
def test_what_became_of_a_changed_program(finished: bool, error: str, seen: str, expected: str) -> None:
    assert probes.judge_change(finished, error, seen.split()) == expected


def test_chaos_tells_what_was_lost_and_done_twice() -> None:
    def line(step: str, event: str, run: str = "run-0") -> Any:
        return probes.Line(0.0, run, step, event)

    whole = [line(step, event, f"run-{run}") for run in range(20) for step in probes.FIVE for event in ("begin", "end")]
    assert probes.count_chaos(whole) == {"finished": 20, "lost": 0, "twice": 0, "unreported": 0}
    assert probes.count_chaos(whole[:-2])["lost"] == 1
    # Step 1 again although step 2 had begun: the system had known that it ended.
    known = [line("s1", "begin"), line("s1", "end"), line("s2", "begin"), line("s1", "begin"), line("s1", "end")]
    assert probes.count_chaos(known)["twice"] == 1
    # Step 1 again with nothing after it: the kill came between its end and its record.
    unknown = [line("s1", "begin"), line("s1", "end"), line("s1", "begin"), line("s1", "end")]
    assert probes.count_chaos(unknown)["twice"] == 0
    assert probes.count_chaos(unknown)["unreported"] == 1


def test_a_run_that_fails_in_the_timing_probe_says_so() -> None:
    outcome, measured = probes.words(6, facts(p6={"parallel": {"error": "Boom: too much"}})[6])
    assert outcome == "2.0 / fails ms a step"
    assert "parallel fails: Boom: too much" in measured


def test_the_table_reads_on_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    made = records(facts())
    one = {
        "name": "one",
        "title": "System One",
        "columns": ["only"],
        "records": made,
        "stars": {"only": probes.rate(made)},
        "focus": "a focus",
        "store": "a file",
        "versions": {"one": "1.0"},
        "licences": {"one": "MIT"},
    }
    two = {"name": "two", "title": "System Two", "columns": [], "records": [], "stars": {}, "reason": "no server"}
    probes.show_table([one, two])
    out = capsys.readouterr().out
    for number, title in probes.PROBES.items():
        assert f"{number}. {title}" in out
    assert "System One: resumes by itself" in out
    assert "System Two: not run. no server" in out
    assert "one 1.0" in out
    assert "one: MIT" in out
    assert all(len(row) <= 100 for row in out.splitlines())


def test_user_code_counts_what_stands_between_the_marks() -> None:
    setup = ["# user code: setup", "import a", "", "# why", "from b import c, d", "# end"]
    five = ["# user code: five", "def f():", "    pass"]
    source = "\n".join(["import x", *setup, "y = 1", *five])
    assert probes.user_code(source) == ({"setup": 2, "five": 2}, 3)


def test_the_ledger_survives_a_kill_and_children_do_not(tmp_path: Path) -> None:
    guard = probes.Guard(tmp_path / "gone")
    code = (
        f"import sys, time; sys.path.insert(0, {str(FOLDER)!r}); import probes; "
        f"probes.Ledger({str(tmp_path)!r}).note('r', 's1', 'begin'); time.sleep(60)"
    )
    ledger = probes.Ledger(tmp_path)
    process = guard.start([sys.executable, "-c", code], tmp_path / "log", environment(), tmp_path)
    assert probes.until(lambda: ledger.events("begin") == ["s1"], 30)
    guard.kill(process)
    assert process.returncode == -signal.SIGKILL
    other = guard.start(
        [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", environment(), tmp_path
    )
    guard.close()
    other.wait(10)
    assert other.returncode == -signal.SIGKILL
    assert ledger.events("begin") == ["s1"]


def uv(*arguments: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    if shutil.which("uv") is None:
        pytest.skip("uv is not installed")
    return subprocess.run(
        ["uv", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def install(name: str) -> str:
    script = f"comparison/{name}.py"
    done = uv("sync", "--quiet", "--script", script, seconds=300)
    if done.returncode:
        pytest.skip(f"its packages cannot be installed here: {done.stderr[-200:]}")
    return script


@pytest.mark.parametrize(
    "wrong",
    [["--probe", "11"], ["--probe", "x"], ["--system", "nobody"], ["--json", "/no/such/folder/x.json"], ["extra"]],
)
def test_bad_arguments_are_refused_before_anything_runs(wrong: list[str]) -> None:
    done = uv("run", "--quiet", "--script", install("compare"), *wrong)
    assert done.returncode == 2
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(("name", "outcome"), [("on_dbos", "resumes by itself"), ("on_langgraph", "resumes by hand")])
def test_a_small_real_run(name: str, outcome: str, tmp_path: Path) -> None:
    script = install(name)
    file = tmp_path / "seen.json"
    done = uv("run", "--quiet", "--script", script, "--probe", "1", "--json", str(file), seconds=240)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(file.read_text(encoding="utf-8"))
    first = record["records"][0]
    assert first["outcome"] == outcome
    assert first["facts"]["after"] == ["s4", "s5"]
    assert first["facts"]["again"] == []
    assert all(record["versions"].values())
    assert all(record["licences"].values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    install("on_dbos")
    script = install("compare")
    tag = {"COMPARISON_TEST": f"{os.getpid()}-{number}-{time.monotonic()}", "TMPDIR": str(tmp_path)}

    def tagged() -> list[tuple[psutil.Process, str]]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("COMPARISON_TEST") == tag["COMPARISON_TEST"] and process.status() != "zombie":
                    found.append((process, " ".join(process.cmdline())))
            except psutil.Error:
                continue
        return found

    starter = subprocess.Popen(
        ["uv", "run", "--quiet", "--script", script, "--system", "dbos", "--probe", "3", "7"],
        cwd=ROOT,
        env=environment(**tag),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert probes.until(lambda: any("--child" in command for _, command in tagged()), 90)
    comparing = next(one for one, command in tagged() if "compare.py" in command and one.pid != starter.pid)
    comparing.send_signal(number)
    code = starter.wait(40)
    assert probes.until(lambda: not tagged(), 40), tagged()
    if number == signal.SIGINT:
        assert code == 130
        assert not list(tmp_path.glob("comparison-*"))


def test_a_recorded_run_is_shown_again(tmp_path: Path) -> None:
    made = records(facts())
    system = {"name": "one", "title": "One", "columns": ["only"], "records": made, "stars": {}, "focus": "a focus"}
    system |= {"store": "a file", "versions": {"one": "1.0"}, "licences": {"one": "MIT"}}
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"minutes": 1.0, "systems": [system]}), encoding="utf-8")
    done = uv("run", "--quiet", "--script", install("compare"), "--show", str(file))
    assert done.returncode == 0, done.stderr
    assert "One: resumes by itself" in done.stdout
    assert done.stdout.count("      5") == 6
    assert uv("run", "--quiet", "--script", "comparison/compare.py", "--show", str(tmp_path)).returncode == 2


def test_the_recorded_run_is_complete() -> None:
    recorded = ROOT / "results" / "comparison.json"
    if not recorded.exists():
        pytest.skip("there is no recorded run yet")
    record = json.loads(recorded.read_text(encoding="utf-8"))
    assert [system["name"] for system in record["systems"]] == SYSTEMS
    assert {"python", "os", "cpus", "date"} <= set(record["environment"])
    for system in record["systems"]:
        if "reason" in system:
            continue
        assert all(system["versions"].values())
        assert all(system["licences"].values())
        seen = {one["probe"] for one in system["records"] if one["column"] == system["columns"][0]}
        assert seen == ({1, 2, 3} if system["name"].startswith("temporal_") else set(range(1, 11)))
        for one in system["records"]:
            assert one["status"] in ("seen", "inconclusive")
            assert one["outcome"]
            assert one["measured"]
            if one["status"] == "seen":
                assert probes.words(one["probe"], one["facts"]) == (one["outcome"], one["measured"])
        for column, rows in system["stars"].items():
            mine = [one for one in system["records"] if one["column"] == column or one["probe"] == 10]
            assert json.loads(json.dumps(probes.rate(mine))) == rows
