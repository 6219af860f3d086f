"""Script 11 as a whole, with a model of one's own, and each of its verdicts made to fall."""

from harness.settings import CLI_ALONE
from harness.systems import prepared

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import ROOT, Fall, check_falls, check_whole, evaluate, in_runs, name_of_run

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


PUT_ALL = 'return [await put(Question(f"{plan.number}/{n}", text)) for n, text in enumerate(plan.questions, 1)]'
PUT_TWICE = PUT_ALL.replace("[await", "[(await").replace("text))", 'text)), await put(Question("again", text)))[0]', 1)
CHANCE = """with workflow.unsafe.sandbox_unrestricted():
                    action = secrets.choice(["refund", "replace", "escalate"])
                await put(question)
                return Decision.model_validate({"action": action, "pieces": 1})"""

FALLS = [
    # Each question is put twice.
    Fall("AI-01", PUT_ALL, PUT_TWICE, 1, ["killed between two calls"]),
    # Every attempt has a key of its own: then the control's keys do not come again either.
    Fall("AI-01", f'{20 * " "}extra_headers={{"Idempotency-Key": question.key}}',
         'extra_headers={"Idempotency-Key": f"{question.key}/{activity.info().attempt}"}', None,
         ["every attempt of a call"]),
    # Keys are made of the workflow's id, which comes again.
    Fall("AI-01", 'put(Question(f"{plan.number}/{n}"', 'put(Question(f"{workflow.info().workflow_id}/{n}"', 3,
         ["every call one of its own"]),
    # No error is hopeless: 400 and 401 are retried.
    Fall("AI-01", "HOPELESS = {400, 401, 403, 404, 413, 422}", "HOPELESS: set[int] = set()", 3, ["400 and 401"]),
    # What Retry-After asks for is not passed on.
    Fall("AI-01", 'delay_of(error.response.headers.get("retry-after", ""))', "None", 3,
         ["429: the next call", "a date"]),
    # A date is not understood.
    Fall("AI-01", "parsedate_to_datetime(retry_after)", "datetime.now(UTC)", 3, ["a date"]),
    # The activity gives up before the client does.
    Fall("AI-01", "GIVE_UP + timedelta(seconds=10)", "GIVE_UP - timedelta(seconds=30)", 3,
         ["the client gives up before"]),
    # The causes of a timeout are kept, and are more than the server keeps.
    Fall("AI-01", "raise for_temporal(error) from None\n        usage",
         "raise for_temporal(error) from error\n        usage", 3, ["the failure says what was wrong"]),
    # The control knows what it has asked already.
    Fall("AI-01", "in enumerate(plan.questions, 1):\n        if number == 3", "in [*enumerate(plan.questions, 1)]"
         "[len(notes(answers)):]:\n        if number == 3", None, ["plain program"]),
    # A replay decides anew.
    Fall("AI-02", "return Decision.model_validate_json((await put(question)).text)", CHANCE, 1, ["on replay"]),
    # The guard is gone.
    Fall("AI-02", 'NEW if workflow.patched("kind-prompt") else OLD', "NEW", 3, ["behind patched()"]),
    # An answer that is not valid is not asked for again.
    Fall("AI-02", "for n in range(1, 4)", "for n in range(1, 2)", 3, ["validated by pydantic"]),
    # The control branches as before.
    Fall("AI-02", 'action = secrets.choice(["refund", "replace", "escalate"])', 'action = "refund"', None,
         ["raw randomness"]),
    # No validator: anybody may decide.
    Fall("AI-03", "    @decide.validator\n    def check", "    def check", 2, ["approved by update"]),
    # A signal is heeded, whoever sends it.
    Fall("AI-03", "if word.by in APPROVERS and not self.outcome:", "if not self.outcome:", 2, ["decided by signal"]),
    # The update is sent again under another id.
    Fall("AI-03", 'Word("ben", False, 9), id="ana-1"', 'Word("ben", False, 9), id="ana-2"', 3, ["under its id"]),
    # It is escalated too early.
    Fall("AI-03", "timeout=refund.patience", "timeout=refund.patience / 2", 3, ["not before the time"]),
    # What is escalated may still be decided.
    Fall("AI-03",
         '            self.outcome = self.outcome or "escalated"\n        await settle(refund.number, self.outcome)',
         '            pass\n        await settle(refund.number, self.outcome or "escalated")', 3, ["it is too late"]),
    # The program of the control knows its request again.
    Fall("AI-03", "waiting = secrets.token_hex(4)", 'waiting = "the only one"', None, ["plain program"]),
    # An update waits for the model's answer.
    Fall("AI-03", "        self.inbox.queue.append(message)\n",
         "        await put(Question(message.number, message.text))\n        self.inbox.queue.append(message)\n", 3,
         ["into a queue"]),
    # The agent does not continue as new.
    Fall("AI-03", "return workflow.info().is_continue_as_new_suggested()", "return False", 3, ["continues as new"]),
    # No marker for a new attempt.
    Fall("AI-04", 'pieces.publish(Piece(attempt, -1, ""))', "pass", 1, ["while they come"]),
    # Who comes late begins one too far.
    Fall("AI-04", "late, offset=middle)", "late, offset=middle + 1)", 3, ["after the end"]),
    # Who was cut off comes back to the piece that was seen last.
    Fall("AI-04", "broken, offset=broken[-1].offset + 1)", "broken, offset=broken[-1].offset)", 3, ["cut off"]),
    # The marker is not heeded.
    Fall("AI-04", "tokens = [] if one.index < 0 else", "tokens = tokens if one.index < 0 else", 3, ["in mid-stream"]),
    # The control shows something before its activity has ended.
    Fall("AI-04", "def so_far(self) -> str:\n        return self.text",
         'def so_far(self) -> str:\n        return self.text or "1"', None, ["polling by query"]),
    # Nothing of an agent is tried a second time.
    Fall("AI-05", "RetryPolicy(maximum_attempts=6)", "RetryPolicy(maximum_attempts=1)", 3,
         ["OpenAI Agents SDK by Temporal's plugin: a tool that fails",
          "OpenAI Agents SDK by Temporal's plugin: worker killed",
          "Pydantic AI by its own integration: worker killed", "LangGraph by Temporal's plugin: worker killed",
          "a framework inside an activity"],
         alone=True),
    # No agent is evicted.
    Fall("AI-05", "max_cached_workflows=1)", "max_cached_workflows=100)", 3, ["evicted in mid-tool"]),
    # The control is not killed.
    Fall("AI-05", 'product.startswith("lamp") and times == 1', 'product.startswith("lamp") and "plain" not in product '
         "and times == 1", None, ["without Temporal"]),
    # The long tool begins at its first page again.
    Fall("AI-06", "done[0] + 1 if done else 1", "1", 3, ["goes on where"]),
    # It leaves one out.
    Fall("AI-06", "done[0] + 1 if done else 1", "done[0] + 2 if done else 1", 3, ["goes on where"]),
    # One tool after the other.
    Fall("AI-06", "await asyncio.gather(*(self.use(call, task.tools) for call in turn.calls))",
         "[await self.use(call, task.tools) for call in turn.calls]", 3, ["run at once"]),
    # Results are mixed up.
    Fall("AI-06", "zip(turn.calls, results, strict=True)", "zip(turn.calls, results[::-1], strict=True)", 3,
         ["keep the order"]),
    # A tool that the model made up is not noticed.
    Fall("AI-06", "if call.name not in tools:", 'if call.name == "":', 3, ["made up"]),
    # One call more than the budget allows.
    Fall("AI-06", "if used > task.budget:", "if used > task.budget + 1:", 3, ["by the budget"]),
    # Who stops the agent does not wait for its tool.
    Fall("AI-06", "ActivityCancellationType.WAIT_CANCELLATION_COMPLETED", "ActivityCancellationType.TRY_CANCEL", 3,
         ["stops the agent"]),
    # The control handles what goes wrong.
    Fall("AI-06", "        topic, patience = json.loads", "        return await super().use(call, tools)\n"
         "        topic, patience = json.loads", None, ["one tool that fails"]),
]  # fmt: skip
if prepared("crewai")[0]:
    FALLS += [
        # The worker with the crew is not killed: nothing starts over.
        Fall("AI-05", "        worker.kill()\n        open_gate(gate)\n        await worker.start(120 * slowness())\n",
             "        open_gate(gate)\n", 3, ["each that is prepared here"]),
    ]  # fmt: skip


@pytest.mark.all
def test_where_crewai_is_not_prepared_no_star_is_lost_and_it_is_named(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path, "AI-05", env={"XDG_CACHE_HOME": str(tmp_path / "cache")} | STAND_IN)
    assert verdicts.stars("AI-05") == 4, verdicts.out
    (seen,) = (one for one in verdicts.evidence("AI-05", "holds") if "each that is prepared here" in one["claim"])
    assert "CrewAI is not prepared: `uv run cluster.py prepare --with crewai`" in seen["measured"]


@pytest.mark.hours
@pytest.mark.parametrize("falls", in_runs(FALLS), ids=name_of_run)
def test_a_verdict_falls(tmp_path: Path, falls: Sequence[Fall]) -> None:
    check_falls(SCRIPT, tmp_path, falls)
