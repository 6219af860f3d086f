"""Lets the tests import the project's modules and their own helpers, from wherever pytest is started."""

import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all",
        action="store_true",
        help="run the tests marked `all` or `hours`, too: CI runs the former (-m 'not hours'), in half an hour",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests to --all, unless they are named; let one that runs real evaluations run once more.

    An evaluation kills processes against the clock, and on a machine that is busy with something else it may
    rightly end as inconclusive. The closing lines count how many did. What is not an evaluation (judge, output,
    processes) gets one try.
    """
    named = any("::" in argument for argument in config.args)
    short = not config.getoption("--all") and not named
    left = [item for item in items if short and any(map(item.get_closest_marker, ("all", "hours")))]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]
    for item in items:
        if re.match(r"test_(\d\d_|given_server)", item.path.name):
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture
def _cluster() -> None:
    """Skip what needs a real cluster where none is prepared."""
    from common import NotRun
    from harness.services import find_programs

    try:
        find_programs()
    except NotRun as error:
        pytest.skip(str(error))
