"""Script 11 as a whole, with a model of one's own, and each of its verdicts made to fall."""

from harness.settings import CLI_ALONE

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import ROOT, changed, check_whole, evaluate

SCRIPT = ROOT / "11_ai_agent_integration.py"
# Whoever runs the tests may have a model of their own in the environment: here the stand-in answers.
STAND_IN = {"OPENAI_API_KEY": "", "OPENAI_BASE_URL": "", "OPENAI_MODEL": ""}


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path, env=STAND_IN)
    check_whole(verdicts)
    stages = {item: one["stage"] for item, one in verdicts.items.items()}
    assert (stages["AI-04"], stages["AI-05"]) == ("experimental", "GA")


def serve_stand_in(ledger: str, ready: str) -> None:
    """Run the script's stand-in for a model in this process, as if it were somebody's real one."""
    spec = importlib.util.spec_from_file_location("script_11", SCRIPT)
    assert spec
    assert spec.loader
    sys.path.insert(0, str(ROOT))
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    import asyncio

    asyncio.run(script.serve_model(ledger, ready))


@contextmanager
def a_model(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A model on a port of its own. Yields its URL and the ledger of its calls."""
    ledger, ready = tmp_path / "calls", tmp_path / "ready"
    process = multiprocessing.get_context("spawn").Process(target=serve_stand_in, args=(str(ledger), str(ready)))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not (ready.exists() and ready.read_text().strip()):
            assert time.monotonic() < deadline
            assert process.is_alive()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{ready.read_text().strip()}/v1", ledger
    finally:
        process.kill()
        process.join()


@contextmanager
def a_server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A Temporal server that keeps its histories in a file. Yields its address and the file."""
    sys.path.insert(0, str(ROOT))
    from lab import free_port

    port, file = free_port(), tmp_path / "histories.sqlite"
    cli = Path(sys.executable).with_name("temporal")
    command = [str(cli), "server", "start-dev", "--headless", "--ip", "127.0.0.1", "--port", str(port), *CLI_ALONE]
    process = subprocess.Popen(
        [*command, "--db-filename", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield f"127.0.0.1:{port}", file
    finally:
        process.kill()
        process.wait()


def everything_in(file: Path) -> bytes:
    """The bytes of a database, with what is still in its journal."""
    return b"".join(path.read_bytes() for path in file.parent.glob(f"{file.name}*"))


@pytest.mark.all
def test_a_model_of_ones_own_and_its_key_stays_secret(tmp_path: Path) -> None:
    """The calls go where OPENAI_BASE_URL says; what needs the stand-in is not run; the key is nowhere."""
    key = "sk-" + os.urandom(12).hex()
    with a_model(tmp_path) as (url, ledger), a_server(tmp_path) as (address, file):
        settings = {"OPENAI_API_KEY": key, "OPENAI_BASE_URL": url, "OPENAI_MODEL": "own-model"}
        log = tmp_path / "log.txt"
        verdicts = evaluate(
            SCRIPT,
            tmp_path,
            "AI-01",
            "AI-02",
            "AI-06",
            "--log",
            str(log),
            env={**settings, "TEMPORAL_ADDRESS": address},
        )
        histories = everything_in(file)
        calls = ledger.read_text()
    assert verdicts.code == 0, verdicts.out + verdicts.err
    assert {verdicts.stars(item) for item in verdicts.items} == {3}, verdicts.out
    assert '"model": "own-model"' in calls
    assert '"model": "own-model@' not in calls
    waiting = [one for item in verdicts.items.values() for one in item["evidence"] if one["held"] is None]
    assert waiting
    assert all("stand-in" in one["measured"] for one in waiting)
    assert b"Name a colour." in histories  # so that the key would be seen if it were there
    for place in (verdicts.out, verdicts.err, (tmp_path / "verdicts.json").read_text(), log.read_text(), calls):
        assert key not in place
    assert key.encode() not in histories


# (item, text in the script, what stands there instead, stars then: None where nothing is proven any more)
FALLS = [
    # Each question is put twice.
    (
        "AI-01",
        'note(question.ledger, f"{question.model.name}: {question.text}")',
        'note(question.ledger, f"{question.model.name}: {question.text}\\n{question.model.name}: {question.text}")',
        1,
    ),
    # Every attempt has a key of its own.
    ("AI-01", "{info.workflow_id}/{info.activity_id}", "{info.workflow_id}/{info.activity_id}/{info.attempt}", 3),
    # No error is hopeless: 400 and 401 are retried.
    ("AI-01", "HOPELESS = {400, 401, 403, 404, 422}", "HOPELESS: set[int] = set()", None),
    # What Retry-After asks for is not passed on.
    ("AI-01", "timedelta(seconds=float(after)) if after else None", "None", 3),
    # A replay decides anew.
    (
        "AI-02",
        "return await follow(decision, case)",
        "return await follow(OPTIONS[len(notes(case.decisions))], case)",
        1,
    ),
    # The guard is gone.
    ("AI-02", 'if workflow.patched("kind-prompt"):', "if True:", 3),
    # The control branches as before.
    ("AI-02", "return await follow(secrets.choice(OPTIONS), case)", "return await follow(OPTIONS[0], case)", None),
    # No validator: anybody may decide.
    ("AI-03", "    @decide.validator\n    def check", "    def check", 2),
    # The update is sent again under another id.
    ("AI-03", 'Decision("ben", False, 9), id="ana-1"', 'Decision("ben", False, 9), id="ana-2"', None),
    # The program of the control knows its request again.
    ("AI-03", "waiting = secrets.token_hex(4)", 'waiting = "the only one"', None),
    # No marker for a new attempt.
    ("AI-04", 'pieces.publish(Piece(attempt, -1, "", time.time()))', "pass", 1),
    # Who comes late begins one too far.
    ("AI-04", "late, offset=middle)", "late, offset=middle + 1)", 3),
    # A tool of the agent is tried once.
    (
        "AI-05",
        "start_to_close_timeout=NOTICED, retry_policy=RETRY)",
        "start_to_close_timeout=NOTICED, retry_policy=RetryPolicy(maximum_attempts=1))",
        3,
    ),
    # The long tool begins at its first page again.
    ("AI-06", "first = done[0] + 1 if done else 1", "first = 1", 3),
    # One tool after the other.
    (
        "AI-06",
        "await asyncio.gather(*(self.use(call, task.forgiving) for call in turn.calls))",
        "[await self.use(call, task.forgiving) for call in turn.calls]",
        3,
    ),
    # The control forgives as well.
    ("AI-06", '["poison"], forgiving=False)', '["poison"], forgiving=True)', None),
]


@pytest.mark.all
@pytest.mark.parametrize(("item", "old", "new", "stars"), FALLS)
def test_the_verdict_falls(tmp_path: Path, item: str, old: str, new: str, stars: int | None) -> None:
    verdicts = evaluate(changed(SCRIPT, tmp_path, (old, new)), tmp_path, item, env=STAND_IN)
    assert verdicts.stars(item) == stars, verdicts.out
    assert verdicts.code == (1 if stars is None else 0)
