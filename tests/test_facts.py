"""Evidence rests on named facts, its sentence is made from them, and a record of it is what its schema says."""

from common import (
    Evidence,
    Fact,
    Spread,
    at_least,
    at_most,
    between,
    contains,
    control,
    differs,
    equal,
    figure,
    holds,
    judge,
    lacks,
    limit,
    native,
    one_of,
    words,
    works,
)
from harness.machine import measure_slowness

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from helpers import ROOT, evaluate, tiny
from temporalio import workflow

SCHEMA = json.loads((ROOT / "docs" / "record.schema.json").read_text(encoding="utf-8"))
FEW, MANY = Spread.of([1, 2, 3], "ms"), Spread.of([10, 20, 30], "ms")


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (equal([1, 2], [1, 2]), equal([1, 2], [2, 1])),
        (equal("", ""), equal("", "x")),
        (differs(1, 2), differs(1, 1)),
        (contains("a car", "car"), contains("a car", "car", "hotel")),
        (contains({"a": 1}, "a"), contains({"a": 1}, "b")),
        (lacks("a car", "hotel"), lacks("a car", "hotel", "car")),
        (one_of("A", "A", "B"), one_of("C", "A", "B")),
        (at_least(3, 3), at_least(2, 3)),
        (at_most(3, 3), at_most(4, 3)),
        (between(3, 3, 4), between(5, 3, 4)),
        (at_least(MANY, 20), at_least(FEW, 20)),
        (at_most(FEW, 2), at_most(MANY, 2)),
        (between(FEW, 2, 2), between(MANY, 2, 2)),
    ],
)
def test_each_way_to_expect_can_fail_and_says_what_was_expected(good: Fact, bad: Fact) -> None:
    assert good.held
    assert "expected" not in good.words
    assert not bad.held
    assert f"(expected {bad.expected})" in bad.words
    assert works("it works", fact=good).held is True
    assert works("it works", fact=good, other=bad).held is False


def test_the_sentence_is_made_from_the_facts() -> None:
    seen = holds("it holds", calls=equal(["a", "b"], ["a"]), took=figure(1.234, "s"), how_often=3)
    assert seen.measured == "calls a, b (expected a); took 1.23 s; how often 3"
    assert list(seen.facts) == ["calls", "took", "how often"]


def test_a_claim_whose_facts_cannot_fail_is_an_error() -> None:
    with pytest.raises(TypeError, match="no fact of this claim could fail"):
        works("it works", seconds=figure(1, "s"))


def test_a_spread_says_how_far_it_went() -> None:
    assert str(MANY) == "20 ms (10 to 30, 3 times)"
    assert str(figure(1500, "ms")) == "1500 ms"


@pytest.mark.parametrize(
    ("value", "said"),
    [(True, "yes"), (None, "none"), ([], "none"), ("", "nothing"), (0.12345, "0.123"), ({"a": [1, 2.0]}, "a 1, 2")],
)
def test_values_are_told_as_a_person_reads_them(value: Any, said: str) -> None:
    assert words(value) == said


FULL = [works("w", a=equal(1, 1)), holds("h", a=equal(1, 1)), control("c", a=equal(1, 1)), native("n", workflow.defn)]


def test_the_reason_names_what_a_cap_hides() -> None:
    lost = holds("the edge", a=equal(1, 2))
    verdict = judge([*FULL, lost, limit("it must be built", cap=3, a=equal(1, 1))])
    assert verdict.stars == 3
    assert "failed (holds): the edge" in verdict.reason
    assert "limit seen: it must be built" in verdict.reason
    under = judge([*FULL, lost, holds("another", a=equal(1, 2)), limit("four at most", a=equal(1, 1))])
    assert "the edge" in under.reason
    assert "another" in under.reason


def test_a_failed_control_says_what_it_saw() -> None:
    assert "calls 3 (expected 1)" in judge([*FULL, control("without it", calls=equal(3, 1))]).reason


STARVED = "this process stood still for 9 s"


@pytest.mark.parametrize("lost", [works("w", a=equal(1, 2)), holds("h", a=equal(1, 2)), limit("l", a=equal(1, 2))])
def test_what_a_starved_machine_lost_or_no_longer_saw_is_inconclusive(lost: Evidence) -> None:
    assert judge([*FULL, lost]).outcome == "judged"
    verdict = judge([*FULL, lost], starved=STARVED)
    assert (verdict.outcome, verdict.stars) == ("inconclusive", None)
    assert STARVED in verdict.reason
    assert judge(FULL, starved=STARVED).stars == 5, "nothing was lost, so there is nothing to doubt"


def test_a_ticker_notices_that_the_process_stood_still() -> None:
    code = (
        "import os, signal, subprocess, sys, time\n"
        "from harness.machine import Ticker\n"
        "ticker, begun = Ticker(), time.monotonic()\n"
        "calm = ticker.starved_since(begun) or ''\n"
        "subprocess.Popen(['/bin/sh', '-c', f'sleep 1.5; kill -CONT {os.getpid()}'])\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
        "time.sleep(0.2)\n"
        "print('stood still' in calm, ticker.starved_since(begun))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("False this process stood still for ")


def test_slowness_grows_with_what_else_computes() -> None:
    alone = min(measure_slowness(0.1) for _ in range(3))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        time.sleep(0.5)
        assert max(measure_slowness(0.3) for _ in range(3)) > alone
    finally:
        for one in busy:
            one.kill()
            one.wait()


def test_patience_grows_on_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.machine import SPEED, slowness

    monkeypatch.setenv(SPEED, "0.5")
    assert slowness() == 1
    monkeypatch.setenv(SPEED, "7.5")
    assert slowness() == 7.5


def test_a_record_is_what_its_schema_says(tmp_path: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    verdicts = evaluate(tiny(tmp_path), tmp_path, "TT-01", "TT-02", "TT-03", "TT-05")
    jsonschema.validate(verdicts.record, SCHEMA)
    verdicts.record["items"][0]["stars"] = None
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(verdicts.record, SCHEMA)


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "results").glob("[01]*.json")))
def test_what_is_recorded_is_what_the_schema_says(file: str) -> None:
    jsonschema.validate(json.loads((ROOT / "results" / file).read_text(encoding="utf-8")), SCHEMA)
