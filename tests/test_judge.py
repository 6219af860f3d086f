"""The checker is checked: judge() against hand-made evidence, good and bad."""

from common import Evidence, control, equal, holds, judge, limit, native, works

import inspect
import subprocess
import sys

import pytest
from helpers import ROOT
from temporalio import workflow
from temporalio.client import Client
from temporalio.common import RetryPolicy
from temporalio.worker import Worker

WORKS = works("it works", True, "1")
WORKS_NOT = works("it does not work", False, "0")
HOLDS = holds("it holds", True, "1")
CONTROL = control("it fails without", True, "1")
NATIVE = Evidence("native", "it is built in", True, "GA", stage="GA")
FULL = [WORKS, HOLDS, CONTROL, NATIVE]


@pytest.mark.parametrize(
    ("evidence", "stars"),
    [
        (FULL, 5),
        ([WORKS, HOLDS, CONTROL], 4),
        ([WORKS, CONTROL], 3),
        ([WORKS, CONTROL, NATIVE], 3),
        ([WORKS, WORKS_NOT, HOLDS, CONTROL, NATIVE], 2),
        ([WORKS_NOT, HOLDS, CONTROL, NATIVE], 1),
        ([*FULL, holds("an edge does not hold", False, "0")], 3),
        ([*FULL, Evidence("native", "a preview", False, "preview", stage="preview")], 4),
        ([*FULL, limit("seen", True, "1")], 4),
        ([*FULL, limit("seen", True, "1", cap=3)], 3),
        ([*FULL, limit("seen", True, "1"), limit("seen", True, "1", cap=3)], 3),
        ([*FULL, limit("no longer seen", False, "0", cap=3)], 5),
        ([WORKS_NOT, CONTROL, limit("seen", True, "1")], 1),
        ([*FULL, Evidence("cited", "somebody says", None, "a source")], 5),
    ],
)
def test_stars_follow_from_the_evidence(evidence: list[Evidence], stars: int) -> None:
    verdict = judge(evidence)
    assert (verdict.outcome, verdict.stars) == ("judged", stars)
    assert verdict.reason


@pytest.mark.parametrize(
    ("evidence", "stars"),
    [
        ([works("not run", None, "no node"), WORKS, HOLDS, CONTROL, NATIVE], 2),
        ([*FULL, holds("not run", None, "no node")], 3),
        ([*FULL, Evidence("native", "not run", None, "no cli")], 4),
        ([*FULL, limit("not looked at", None, "no node")], 4),
        ([*FULL, control("not run", None, "no node")], 5),
    ],
)
def test_what_was_not_run_earns_nothing(evidence: list[Evidence], stars: int) -> None:
    assert judge(evidence).stars == stars


@pytest.mark.parametrize(
    ("evidence", "trouble", "outcome"),
    [
        (FULL, "ValueError: broken", "inconclusive"),
        (FULL, "no end within 90 s", "inconclusive"),
        ([*FULL, control("it fails without", False, "it did not")], None, "inconclusive"),
        ([WORKS, HOLDS, NATIVE], None, "inconclusive"),
        ([HOLDS, CONTROL, NATIVE], None, "inconclusive"),
        ([], None, "inconclusive"),
        ([works("not run", None, "no node"), CONTROL], None, "not_run"),
        ([WORKS, HOLDS, control("not run", None, "no node")], None, "not_run"),
    ],
)
def test_nothing_proven_is_never_a_star(evidence: list[Evidence], trouble: str | None, outcome: str) -> None:
    verdict = judge(evidence, trouble)
    assert (verdict.outcome, verdict.stars) == (outcome, None)
    assert verdict.reason


def test_a_failed_control_outweighs_everything_else() -> None:
    failed = control("the control", False, "0")
    for other in ([WORKS_NOT], [works("not run", None, "x")], [limit("seen", True, "1")], FULL):
        assert judge([*other, failed]).outcome == "inconclusive"


def test_slowness_casts_doubt_on_a_limit_that_is_gone_unless_no_time_is_in_it() -> None:
    gone = limit("gone", False, "0")
    built = limit("gone", certain=True, processes=equal(4, 1))
    assert judge([*FULL, gone], starved="the machine was slow").outcome == "inconclusive"
    assert judge([*FULL, built], starved="the machine was slow").stars == 5


def test_the_order_of_evidence_does_not_matter() -> None:
    evidence = [*FULL, limit("seen", True, "1"), holds("not", False, "0")]
    assert judge(evidence).stars == judge(evidence[::-1]).stars == 3


def test_the_stage_is_the_least_mature_one() -> None:
    preview = Evidence("native", "a preview", False, "preview", stage="preview")
    assert judge([*FULL, preview]).stage == "preview"
    assert judge(FULL).stage == "GA"
    assert judge([WORKS, CONTROL]).stage is None


def test_native_looks_at_the_running_platform() -> None:
    assert native("GA", workflow.defn, Worker, (RetryPolicy, "maximum_attempts"), "temporal workflow reset").held
    assert native("no such parameter", (Client.start_workflow, "no_such_policy")).stage == "missing"
    assert native("not the SDK's", inspect.getdoc).stage == "missing"
    assert native("no such command", "temporal workflow no-such-command").stage == "missing"
    assert native("marked so in its docstring", Client.count_nexus_operations).stage == "experimental"


def test_native_reads_the_notice_of_the_parameter_meant() -> None:
    experimental = (Worker, "workflow_failure_exception_types")
    assert native("one parameter is experimental", experimental).stage == "experimental"
    assert native("another one is not", (Worker, "max_cached_workflows")).stage == "GA"
    # The docstring of start_child_workflow marks one of its parameters; that is no notice about the function.
    assert native("the function is not", workflow.start_child_workflow).stage == "GA"
    assert native("the parameter is", (workflow.start_child_workflow, "versioning_override")).stage == "experimental"


def test_native_falls_with_what_the_user_had_to_build() -> None:
    assert native("alone", workflow.defn).held
    built = native("with help", workflow.defn, adds=["a retry loop"])
    assert built.held is False
    assert "a retry loop" in built.measured


def test_native_does_not_take_missing_docstrings_for_general_availability() -> None:
    code = "from common import native; from temporalio import workflow; print(native('x', workflow.defn).held)"
    done = subprocess.run([sys.executable, "-OO", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
