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
SYSTEMS = ["temporal", "langgraph", "crewai", "dbos", "restate", "dbosify", "temporal_langgraph", "temporal_crewai"]


def load(name: str, known_as: str) -> ModuleType:
    """A module of a folder that is no package. The project's harness has a compare of its own."""
    spec = importlib.util.spec_from_file_location(known_as, FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[known_as] = module
    spec.loader.exec_module(module)
    return module


probes = load("probes", "probes")
compare = load("compare", "comparison_compare")


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
        7: good | {"late": 0.1, "after_restart": 2.1, "start": 0.4},
        8: {"finished": True, "attempts": 3, "gaps": [0.2, 0.4], "native": True, "error": ""},
        9: {"finished": 20, "lost": 0, "twice": 0, "unreported": 2, "nameless": 0, "kills": 3, "by_itself": True}
        | {"seconds": 9.0, "error": ""},
        10: {
            "packages_mb": 20.0,
            "server_mb": 0.0,
            "import": 0.5,
            "import_min": 0.4,
            "import_max": 0.6,
            "import_cpu": 0.3,
            "lines": {"setup": 10, "five": 12, "human": 20},
            "names": ["invoke"],
            "server": False,
            "column": "only",
            "elsewhere": "",
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
        ({"p7": {"late": 3.4, "after_restart": 5.4, "start": 0.4}}, "durability", 4),
        ({"p7": {"late": 3.4, "after_restart": 4.9, "start": 3.0}}, "durability", 5),
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
        ({"p10": {"packages_mb": 251.0}}, "learning curve", 4),
        ({"p10": {"server_mb": 251.0}}, "learning curve", 5),
        ({"p10": {"elsewhere": "npm"}}, "learning curve", 4),
        ({"p10": {"lines": {"five": 15}}}, "learning curve", 4),
        ({"p10": {"lines": {"setup, only": 3}}}, "learning curve", 4),
        ({"p10": {"lines": {"setup, other": 30}}}, "learning curve", 5),
        ({"p10": {"lines": {"human": 25}}}, "HITL", 4),
        ({"p10": {"llm": {"agent loop": False}}}, "LLM-native", 4),
    ],
)
def test_each_statement_costs_a_star(change: dict[str, Any], row: str, expected: int) -> None:
    seen = stars(facts(**change))
    assert seen[row] == expected
    assert all(count == 5 for other, count in seen.items() if other != row)


def test_every_bound_says_its_reason() -> None:
    statements = [one for row in probes.RULE.values() for one in row]
    assert len(statements) == 4 * len(probes.RULE)
    for one in statements:
        has_a_number = any(word.isdigit() for word in one.text.split() if word != "20")
        assert one.reason != probes.BY_NATURE or not has_a_number, one.text


def test_a_column_is_rated_with_its_own_server() -> None:
    made = [one for one in records(facts()) if one["probe"] != 10]
    other = [one | {"column": "database"} for one in made]
    size = [one for one in records(facts()) if one["probe"] == 10]
    system = {"columns": ["only", "database"], "servers": {"database": True}, "records": [*made, *other, *size]}
    rated = probes.rate_columns(system)
    assert rated["only"]["learning curve"]["stars"] == 5
    assert rated["database"]["learning curve"]["stars"] == 4


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
    assert probes.count_chaos(whole) == {"finished": 20, "lost": 0, "twice": 0, "unreported": 0, "nameless": 0}
    assert probes.count_chaos([*whole[:-2], line("s5", "begin", ""), line("s5", "end", "")])["lost"] == 1
    assert probes.count_chaos([*whole, line("s1", "begin", "")])["nameless"] == 1
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


SOURCE = """
import os
import probes
from other import thing, unused
from product import (
    Flow,
    start,
)
from apart import Apart  # only: setup, other

x = 1

# user code: setup
def make(run):
    \"\"\"Says what it is.\"\"\"
    # why
    flow = Flow(
        tuning=1,  # harness
    )
    return flow.begin(os.path.join(run, "a").upper())


# end
# user code: five
class Own:
    def __init__(self):
        self.text = ""

    def run(self):
        if PLAN.phase == "start":
            start(self.text)
            note("a", "b", "c")
        else:
            self.run()
        if PLAN.steps:
            pass
"""


def test_user_code_is_counted_by_one_rule() -> None:
    code = probes.user_code(SOURCE)
    # The imports of others stand as setup wherever they are: 1 + 4, and make() has 4 without its setting.
    assert code.lines == {"setup": 5 + 4, "setup, other": 1, "five": 4 + 2 + 2}
    assert code.names == {"Flow", "start", "begin"}


def test_the_cost_of_several_turns_is_one_figure() -> None:
    def turn(ms: float) -> dict[str, Any]:
        return {shape: probes.summed_up([ms], [ms / 2]) for shape in ("sequential", "parallel")}

    facts = probes.merged([turn(3), turn(1), turn(2)])
    assert facts["sequential"]["ms"] == 2
    assert (facts["parallel"]["min"], facts["parallel"]["max"], facts["parallel"]["cpu_ms"]) == (1, 3, 1)
    failed = {"sequential": {"error": "no"}, "parallel": turn(1)["parallel"]}
    assert probes.merged([turn(3), failed])["sequential"] == {"error": "no"}


def test_every_system_is_measured_in_each_turn_and_what_was_seen_is_kept(tmp_path: Path) -> None:
    order = []

    class Runner:
        def run(self, name: str, *_: Any) -> dict[str, Any]:
            order.append(name)
            seen = {shape: probes.summed_up([float(len(order))], [1.0]) for shape in ("sequential", "parallel")}
            outcome, measured = probes.words(6, seen)
            row = {"system": name, "column": "only", "probe": 6, "seconds": 1.0, "facts": seen, "status": "seen"}
            return {"records": [row | {"outcome": outcome, "measured": measured}]}

    systems = [{"name": name, "title": name, "columns": ["only"], "servers": {}, "records": []} for name in "ab"]
    options = compare.parse(["--json", str(tmp_path / "seen.json"), "--probe", "6"])
    loads = compare.by_turns(systems, Runner(), tmp_path, options, time.monotonic(), {"lessons": {}})
    assert order == ["a", "b"] * compare.TURNS
    assert len(loads) == len(order)
    record = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    assert record["load"] == loads
    for system, expected in zip(record["systems"], ([1, 3, 5], [2, 4, 6]), strict=True):
        (row,) = system["records"]
        assert row["facts"]["sequential"]["all"] == expected


def test_a_peer_that_is_newer_than_the_record_is_said() -> None:
    record = {"versions": {"dbos": "3.4.0", "other": "1.0"}}
    assert probes.newer_than(record, {"dbos": "3.4.0", "other": "1.0"}) == []
    assert probes.newer_than(record, {"dbos": "3.10.1"}) == ["dbos 3.10.1 (recorded: 3.4.0)"]
    assert probes.newer_than(record, {"dbos": "3.3.9"}) == []


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("json:loads", ""),
        ("collections.abc:Mapping", "is abstract"),
        ("json:nothing", "cannot be imported"),
        ("no_such_module:thing", "cannot be imported"),
        ("", "there is none"),
    ],
)
def test_only_what_can_be_used_counts_as_there(place: str, why: str) -> None:
    assert probes.usable(place) == why


def test_the_locks_say_when_each_peer_was_released() -> None:
    for name in SYSTEMS:
        found = probes.locked(FOLDER / f"on_{name}.py")
        assert found
        assert all(len(day) == 10 for _, day in found.values() if day), name


SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if (FOLDER / f"{path.name}.lock").exists())


@pytest.mark.all
@pytest.mark.parametrize("name", SCRIPTS)
def test_types(name: str) -> None:
    """Each script, with the modules it imports, passes the strict type checker against its own packages."""
    script = install(name)
    found = uv("python", "find", "--script", script)
    command = ["run", "--no-sync", "mypy", "--strict", "--python-executable", found.stdout.strip(), script]
    done = uv(*command, seconds=300)
    assert done.returncode == 0, done.stdout


def recorded() -> dict[str, Any]:
    record: dict[str, Any] = json.loads((ROOT / "results" / "comparison.json").read_text(encoding="utf-8"))
    return record


def test_the_record_is_of_what_is_locked() -> None:
    record = recorded()
    for system in record["systems"]:
        now = {name: version for name, (version, _) in probes.locked(FOLDER / f"on_{system['name']}.py").items()}
        assert probes.newer_than(system, now) == []
        assert all(len(day) == 10 for day in system.get("released", {}).values()), system["name"]


def test_the_lessons_on_dbosify_are_recorded() -> None:
    lessons = recorded()["lessons"]
    counted = sum(lessons["counts"].values())
    assert lessons["unchanged"] == f"{lessons['counts']['unchanged']} of {counted}"
    assert counted == len(lessons["lessons"])
    for one in lessons["lessons"]:
        assert bool(one["said"]) == (one["outcome"] != "unchanged")


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
    system |= {"store": "a file", "servers": {}, "versions": {"one": "1.0"}, "licences": {"one": "MIT"}}
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"minutes": 1.0, "environment": {}, "systems": [system]}), encoding="utf-8")
    done = uv("run", "--quiet", "--script", install("compare"), "--show", str(file))
    assert done.returncode == 0, done.stderr
    assert "One: resumes by itself" in done.stdout
    assert done.stdout.count("      5") == 6
    assert uv("run", "--quiet", "--script", "comparison/compare.py", "--show", str(tmp_path)).returncode == 2


def test_the_recorded_run_is_complete() -> None:
    record = recorded()
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
            assert json.loads(json.dumps(probes.rate_columns(system)[column])) == rows
