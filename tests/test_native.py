"""stages.py finds a notice wherever the SDK or the command line may put one; the table says what it found."""

from common import native
from harness.stages import NOTICES, Api, Stage, api_name, api_stage

import enum
import importlib.util
import stat
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import temporalio
from list_stages import TABLE, table
from temporalio import workflow
from temporalio.client import Client
from temporalio.common import RetryPolicy
from temporalio.converter import DataConverter
from temporalio.service import TLSConfig, WorkflowService
from temporalio.worker import Replayer, Worker

SOURCE = '''
"""A module of the SDK."""

import enum
import typing
from dataclasses import dataclass

import typing_extensions


class Plain:
    """Nothing to say."""

    async def method(self, one: int, two: int = 0) -> None:
        """Do it.

        Args:
            one: What there is first, over
                two lines.
            two: And second.
                WARNING: This is an experimental feature and may change in the future.

        Returns:
            Nothing.
        """

    def ends_with_a_warning(self, one: int) -> None:
        """Do it.

        Args:
            one: What there is.

        Returns:
            Nothing.

        .. warning::
            This API is unstable.
        """

    def warned_at_the_margin(self, one: int, two: int) -> None:
        """Do it.

        Args:
            one: What there is.
            WARNING: Deprecated. Use another.
            two: And second.
        """

    def says_nothing(self) -> None: ...

    @property
    def value(self) -> int:
        """What it is worth. This API is experimental."""
        return 1

    @classmethod
    def make(cls, size: int) -> "Plain":
        """Make one.

        Args:
            size: Deprecated: all have one size.
        """
        return cls()


class Heir(Plain):
    """Inherits, and says nothing of what it does otherwise."""

    @property
    def value(self) -> int:
        return 2


class Unwritten(Plain):
    pass


class Silent:
    pass


class Old:
    """A class.

    .. deprecated::
        Use another.
    """

    def method(self) -> None:
        """Do it."""


class Made:
    """A class whose making is what is new."""

    def __init__(self, one: int) -> None:
        """Make it. This is in Public Preview.

        Args:
            one: What there is.
        """


@dataclass
class Settings:
    """Settings."""

    plain: int = 0

    fresh: int = 0
    """How fresh.

    .. warning::
        This API is experimental.
    """

    stale: int = 0
    """How stale. WARNING: Deprecated. Use fresh."""


@dataclass
class MoreSettings(Settings):
    """More of them."""

    more: int = 0


@dataclass
class Bare:
    one: int = 0

    told: int = 0
    """What it is."""


class Kind(enum.Enum):
    """Kinds.

    ``NEWEST`` is experimental and may change without notice.
    """

    GOOD = 1
    """As it should be."""

    NEW = 2
    """Experimental. Not yet what it will be."""

    NEWEST = 3


@typing.overload
def several(one: int) -> int:
    """This overload is in preview."""


@typing.overload
def several(one: str) -> str: ...


def several(one: typing.Any) -> typing.Any:
    """Take one thing or another."""


@typing_extensions.deprecated("use several")
def given_up(one: int) -> None:
    """Do it."""


def shortcut(one: int, fresh: int) -> None:
    """Do it and wait.

    This is a shortcut for ``await`` :py:func:`other`.
    """


def other(one: int, fresh: int) -> None:
    """Do it.

    Args:
        one: What there is.
        fresh: Experimental.
    """


def speaks_of_it() -> None:
    """Mark something as deprecated. The dictionary form of this is deprecated, its value may change."""
'''


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A made-up module of the SDK, with its source in a file."""
    return made_up(tmp_path_factory.mktemp("sdk"), "temporalio.made_up", SOURCE)


def made_up(folder: Path, name: str, source: str) -> ModuleType:
    file = folder / f"{name}.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    setattr(temporalio, name.rpartition(".")[2], module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("path", "part", "stage"),
    [
        ("Plain", "", "GA"),
        ("Plain.method", "", "GA"),
        ("Plain.method", "one", "GA"),
        ("Plain.method", "two", "experimental"),
        ("Plain.method", "three", "missing"),
        ("Plain.ends_with_a_warning", "", "experimental"),
        ("Plain.ends_with_a_warning", "one", "experimental"),
        ("Plain.warned_at_the_margin", "one", "deprecated"),
        ("Plain.warned_at_the_margin", "two", "GA"),
        ("Plain.says_nothing", "", "not readable"),
        ("Plain.value", "", "experimental"),
        ("Plain.make", "", "GA"),
        ("Plain.make", "size", "deprecated"),
        ("Heir", "", "GA"),
        ("Heir.method", "two", "experimental"),
        ("Heir.value", "", "experimental"),
        ("Unwritten", "", "GA"),
        ("Silent", "", "not readable"),
        ("Old", "", "deprecated"),
        ("Old.method", "", "deprecated"),
        ("Made", "", "preview"),
        ("Made", "one", "preview"),
        ("Settings", "", "GA"),
        ("Settings", "plain", "GA"),
        ("Settings", "fresh", "experimental"),
        ("Settings", "stale", "deprecated"),
        ("Settings", "none", "missing"),
        ("MoreSettings", "fresh", "experimental"),
        ("MoreSettings", "more", "GA"),
        ("Bare", "", "not readable"),
        ("Bare", "one", "not readable"),
        ("Bare", "told", "GA"),
        ("Kind", "", "GA"),
        ("Kind", "GOOD", "GA"),
        ("Kind.GOOD", "", "GA"),
        ("Kind.NEW", "", "experimental"),
        ("Kind.NEWEST", "", "experimental"),
        ("several", "", "preview"),
        ("given_up", "", "deprecated"),
        ("shortcut", "", "GA"),
        ("shortcut", "one", "GA"),
        ("shortcut", "fresh", "experimental"),
        ("speaks_of_it", "", "GA"),
    ],
)
def test_a_notice_is_found_where_it_stands(sdk: Any, path: str, part: str, stage: Stage) -> None:
    thing = sdk
    for name in path.split("."):
        thing = getattr(thing, name)
    assert api_stage((thing, part) if part else thing, None) == stage


def test_a_package_speaks_for_all_that_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "temporalio.contrib_of_ours", ModuleType("x", "This package is experimental."))
    inside = made_up(tmp_path, "temporalio.contrib_of_ours._inside", "class Thing:\n    '''Nothing to say.'''\n")
    assert api_stage(inside.Thing, None) == "experimental"


def test_a_field_without_its_source_is_not_readable(tmp_path: Path) -> None:
    source = 'class Lost:\n    """Nothing to say."""\n    field: int = 0\n    """This is experimental."""\n'
    lost = made_up(tmp_path, "temporalio.lost", source).Lost
    (tmp_path / "temporalio.lost.py").write_text("", encoding="utf-8")
    assert api_stage((lost, "field"), None) == "not readable"
    assert api_stage(lost, None) == "GA"


@pytest.mark.parametrize(
    ("api", "stage"),
    [
        ((Worker, "deployment_config"), "experimental"),
        ((Worker, "patch_activation_callback"), "experimental"),
        ((Worker, "build_id"), "deprecated"),
        ((Worker, "max_concurrent_activity_task_polls"), "deprecated"),
        ((Replayer, "workflow_failure_exception_types"), "experimental"),
        ((workflow.defn, "failure_exception_types"), "experimental"),
        ((workflow.execute_child_workflow, "versioning_intent"), "deprecated"),
        ((DataConverter, "external_storage"), "experimental"),
        ((DataConverter, "payload_codec"), "GA"),
        ((RetryPolicy, "maximum_attempts"), "GA"),
        ((TLSConfig, "client_cert"), "GA"),
        ((Client.start_workflow, "search_attributes"), "GA"),
        (workflow.VersioningIntent.COMPATIBLE, "deprecated"),
        (workflow.deprecate_patch, "GA"),
    ],
)
def test_the_sdk_as_it_is(api: Api, stage: Stage) -> None:
    assert api_stage(api, None) == stage


def test_generated_methods_are_refused() -> None:
    """They are all alike and tell no stage, so that naming one is a mistake of the script's."""
    with pytest.raises(TypeError, match="name the command"):
        native("pausing is built in", WorkflowService.pause_workflow_execution)


HELP = {
    "": "The CLI.\n\nUsage:\n  temporal [command]\n\nAvailable Commands:\n"
    "  thing       Do a thing\n  young       Do it sooner (Experimental feature)\n",
    "thing": "Things.\n\nUsage:\n  temporal thing [command]\n\nAvailable Commands:\n"
    "  do          Do it\n  old         Do it as ever (Deprecated)\n  early       [Preview] Do it early\n",
    "young": "Young.\n\nUsage:\n  temporal young [flags]\n",
    "thing do": "Do it.\n\nUsage:\n  temporal thing do [flags]\n\nFlags:\n"
    "  -a, --alone string      With nothing else, as\n                          --query is of no use.\n"
    "  -q, --query string      EXPERIMENTAL: a query\n                          of some length.\n"
    "      --stale             Gone soon. Deprecated.\n",
    "thing old": "As ever.\n\nUsage:\n  temporal thing old\n",
    "thing early": "Early.\n\nUsage:\n  temporal thing early\n",
}


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A command line of our own that knows HELP, and answers to anything unknown as the real one does."""
    file = tmp_path_factory.mktemp("cli") / "temporal"
    file.write_text(
        f"#!{sys.executable}\nimport sys\nHELP = {HELP!r}\nwords = sys.argv[1:-1]\n"
        "while ' '.join(words) not in HELP:\n    words.pop()\nprint(HELP[' '.join(words)], end='')\n",
        encoding="utf-8",
    )
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


@pytest.mark.parametrize(
    ("command", "stage"),
    [
        ("temporal thing do", "GA"),
        ("temporal thing do --alone", "GA"),
        ("temporal thing do --query", "experimental"),
        ("temporal thing do --alone --stale", "deprecated"),
        ("temporal thing do --none", "missing"),
        ("temporal thing old", "deprecated"),
        ("temporal thing early", "preview"),
        ("temporal thing none", "missing"),
        ("temporal young", "experimental"),
    ],
)
def test_a_command_is_read_with_those_above_it_and_its_flags(cli: str, command: str, stage: Stage) -> None:
    assert api_stage(command, cli) == stage


def test_a_command_that_cannot_be_asked_is_not_readable(tmp_path: Path) -> None:
    broken = tmp_path / "temporal"
    broken.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    broken.chmod(0o700)
    unreadable = [api_stage("temporal workflow reset", one) for one in (None, str(broken), str(tmp_path))]
    assert unreadable == ["not readable"] * 3


def test_what_cannot_be_read_is_not_run_and_never_ga(sdk: Any) -> None:
    unread = native("unread", workflow.defn, sdk.Silent)
    assert (unread.held, unread.stage) == (None, "not readable")
    assert "made_up.Silent: not readable" in unread.measured
    assert "no docstring" in unread.measured
    assert native("and worse", sdk.Silent, sdk.Old).held is False
    assert native("and built", sdk.Silent, adds=["a loop"]).held is False


def test_names_tell_things_and_their_parts_apart(sdk: Any) -> None:
    named = [api_name(one) for one in (sdk.Plain.value, (sdk.Settings, "fresh"), sdk.Kind.NEW, "temporal x --y")]
    assert named == ["made_up.Plain.value", "made_up.Settings(fresh)", "made_up.Kind(NEW)", "temporal x --y"]
    assert isinstance(sdk.Kind.NEW, enum.Enum)


def test_every_stage_has_its_words() -> None:
    assert set(NOTICES) == {"preview", "experimental", "deprecated"}


def test_the_table_says_what_is_found() -> None:
    """Where it differs: `uv run tests/list_stages.py`, and read what has changed."""
    assert TABLE.read_text(encoding="utf-8") == table()
