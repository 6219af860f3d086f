"""Every Python that the project says it runs on, where it can be had: script 01, and the tests of judge and output."""

import glob
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, environment

pytestmark = pytest.mark.all

VERSIONS = ("3.11", "3.12", "3.13", "3.14")


def interpreter(version: str) -> str:
    """A Python of this version: one that uv finds or can fetch, or pyenv's. Skips the test where there is none."""
    found = subprocess.run(
        ["uv", "python", "find", "--no-project", version], capture_output=True, text=True, timeout=60, check=False
    )
    if found.returncode == 0:
        return found.stdout.strip()
    kept = sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python3")))
    if kept:
        return kept[-1]
    fetched = subprocess.run(
        ["uv", "python", "install", version], capture_output=True, text=True, timeout=300, check=False
    )
    if fetched.returncode != 0:
        pytest.skip(f"Python {version} is not here, and uv could not fetch it: {fetched.stderr.splitlines()[-1:]}")
    return version


def under(version: str, *command: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command of the project's in an environment of its own, with that Python."""
    if shutil.which("uv") is None:
        pytest.skip("uv is not on the PATH, so no other Python can be given an environment")
    wanted = ["uv", "run", "--isolated", "--locked", "--no-default-groups", "--python", interpreter(version)]
    extra = ["--group", "dev"] if "pytest" in command else []
    kept = {name: value for name, value in environment(TEMPORAL_DOTENV=os.devnull).items() if name != "VIRTUAL_ENV"}
    return subprocess.run(
        [*wanted, *extra, *command], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=seconds, check=False
    )


@pytest.mark.hours
@pytest.mark.parametrize("version", VERSIONS)
def test_script_01_runs(version: str, tmp_path: Path) -> None:
    done = under(version, "01_ex_execution_semantics.py", seconds=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Python {version}." in done.stdout
    assert "7 judged" in done.stdout


@pytest.mark.hours
@pytest.mark.parametrize("version", VERSIONS)
def test_judge_and_output_pass(version: str) -> None:
    done = under(
        version, "pytest", "-q", "-o", "addopts=", "tests/test_judge.py", "tests/test_output.py", seconds=600
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_one_item_runs_on_the_newest_that_is_here() -> None:
    """The default run's share of the tests above: nothing is fetched for it."""
    version = next(
        (one for one in reversed(VERSIONS) if glob.glob(os.path.expanduser(f"~/.pyenv/versions/{one}.*/bin/python3"))
         or shutil.which(f"python{one}")), None,
    )  # fmt: skip
    if version is None:
        pytest.skip("no Python beside this one is here")
    done = under(version, "01_ex_execution_semantics.py", "EX-03", seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
