"""Every lesson can be lifted out: it runs alone and inside a package, and passes the strict type checker."""

from harness.lesson import Lesson, copy_of, lessons_of
from lab import Server

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import SCRIPTS, environment, run
from servers import given_server

LESSONS = [
    (script, lesson)
    for script in SCRIPTS
    for lesson in lessons_of(script.read_text(encoding="utf-8")).values()
    if lesson.example
]
CODE = [(script, lesson.item) for script, lesson in LESSONS if lesson.is_code]
SAMPLE = [("06_cp_compensation.py", "CP-01")]  # what a newcomer's `uv run pytest` tries; --all tries each


def marked(script: Path, item: str) -> object:
    marks = [] if (script.name, item) in SAMPLE else [pytest.mark.all]
    return pytest.param(script, item, marks=marks, id=item)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with given_server(tmp_path_factory.mktemp("server"), namespace="default") as server:
        yield server


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a project that holds temporalio, of the version installed here, and nothing else of ours."""
    return new_environment(tmp_path_factory.mktemp("empty"), "temporalio")


def new_environment(folder: Path, *packages: str) -> Path:
    versions = subprocess.run(
        ["uv", "pip", "freeze", "--python", sys.executable], capture_output=True, text=True, check=True
    ).stdout
    named = [line for line in versions.splitlines() if line.partition("==")[0] in packages]
    subprocess.run(["uv", "venv", "-q", "--python", sys.executable, str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run(["uv", "pip", "install", "-q", "--python", str(python), *named], check=True)
    return python


def packages_of(text: str) -> list[str]:
    """What the inline metadata of a copy says it needs."""
    return re.findall(r'^#   "([\w-]+)>=', text, re.MULTILINE)


def start(*command: str | Path, folder: Path, server: Server) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, against this server."""
    env = environment(TEMPORAL_ADDRESS=server.address) | {"PYTHONSAFEPATH": ""}
    return subprocess.run(
        [*map(str, command)], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(("script", "item"), [marked(*one) for one in CODE])
def test_a_copy_runs_in_an_empty_project(
    script: Path, item: str, python: Path, server: Server, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = copy_of(script, item)
    assert text
    more = [name for name in packages_of(text) if name != "temporalio"]
    interpreter = new_environment(tmp_path_factory.mktemp("named"), "temporalio", *more) if more else python
    (tmp_path / "lesson.py").write_text(text, encoding="utf-8")
    done = start(interpreter, "lesson.py", folder=tmp_path, server=server)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example says what came of it"


# Libraries of the project's own environment that take long to import, and that refuse to be imported twice.
HEAVY = "import cryptography.x509\nimport matplotlib.pyplot\nimport numpy\nimport rich.console\n"
PASSED = "from temporalio import workflow\n\nwith workflow.unsafe.imports_passed_through():\n"


@pytest.mark.parametrize(("script", "item"), [marked(*one) for one in CODE])
def test_a_copy_runs_inside_a_package_with_heavy_imports(
    script: Path, item: str, server: Server, tmp_path: Path
) -> None:
    text = copy_of(script, item)
    assert text
    package = tmp_path / "package"
    package.mkdir()
    (package / "lesson.py").write_text(text, encoding="utf-8")
    (package / "__init__.py").write_text(HEAVY, encoding="utf-8")
    done = start(sys.executable, "-m", "package.lesson", folder=tmp_path, server=server)
    assert done.returncode == 0, done.stderr
    # Imported as a module, the sandbox imports the package again: what refuses that is passed through there.
    indented = "".join(f"    {line}\n" for line in HEAVY.splitlines())
    (package / "__init__.py").write_text(PASSED + indented, encoding="utf-8")
    code = "import asyncio, os; from package import lesson; os._exit(asyncio.run(lesson.main()))"
    done = start(sys.executable, "-c", code, folder=tmp_path, server=server)
    assert done.returncode == 0, done.stderr


@pytest.mark.all
def test_all_copies_pass_the_strict_type_checker(tmp_path: Path) -> None:
    for script, item in CODE:
        (tmp_path / f"{item.replace('-', '_').lower()}.py").write_text(copy_of(script, item) or "", encoding="utf-8")
    done = run("-m", "mypy", "--strict", *sorted(tmp_path.glob("*.py")), cwd=tmp_path)
    assert done.returncode == 0, done.stdout


def test_one_command_runs_a_copy_anywhere(server: Server, tmp_path: Path) -> None:
    done = run("06_cp_compensation.py", "--copy", "CP-01")
    (tmp_path / "saga.py").write_text(done.stdout, encoding="utf-8")
    said = start("uv", "run", "--quiet", "saga.py", folder=tmp_path, server=server)
    assert said.returncode == 0, said.stderr
    assert "The trip failed" in said.stdout
    nobody = subprocess.run(
        [sys.executable, "saga.py"], cwd=tmp_path, env=environment(TEMPORAL_ADDRESS="127.0.0.1:9"), capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert nobody.returncode == 1
    assert "Traceback" not in nobody.stderr
    assert "temporal server start-dev" in nobody.stderr


def test_a_lesson_uses_nothing_of_ours(tmp_path: Path) -> None:
    script = tmp_path / "99_xx.py"
    script.write_text(
        "from lab import note\n\n"
        "# XX-01 A lesson ------------------------------\n# What it says.\n\n\n"
        "async def example_xx_01(client: object) -> None:\n    note('a', 'b')\n\n\n"
        "# XX-01 put to the test -----------------------\n"
    )
    with pytest.raises(ValueError, match=r"uses note of lab\.py"):
        copy_of(script, "XX-01")


def test_a_setting_is_copied_as_it_is(tmp_path: Path) -> None:
    script = tmp_path / "99_xx.py"
    script.write_text(
        "# XX-01 A setting ------------------------------\n# What it says.\n\n"
        'EXAMPLE_XX_01 = """\ntemporal operator namespace create\n"""\n\n'
        "# XX-01 put to the test -----------------------\n"
    )
    assert copy_of(script, "XX-01") == "temporal operator namespace create\n"
    (lesson,) = lessons_of(script.read_text()).values()
    assert lesson == Lesson("XX-01", "A setting", ["What it says."], 2, 7, "EXAMPLE_XX_01", False)


def test_what_has_no_lesson_is_refused_in_a_sentence() -> None:
    done = run("07_pf_performance.py", "--copy", "PF-99")
    assert done.returncode == 2
    assert "PF-99" in done.stderr


def test_the_list_says_what_can_be_copied() -> None:
    for script in SCRIPTS:
        done = run(script, "--list", env={"TEMPORAL_ADDRESS": "127.0.0.1:9"})
        assert done.returncode == 0
        for one, lesson in LESSONS:
            assert one != script or f"{lesson.item}  " in done.stdout
