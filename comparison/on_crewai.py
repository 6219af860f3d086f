# /// script
# requires-python = ">=3.11"
# dependencies = ["crewai>=1.15", "psutil>=7.0"]
# ///
"""CrewAI under the probes: a Flow, once with @persist (SQLite) and once with checkpoints (JSON files).

A flow that was restored from a checkpoint writes checkpoints whose first entry is an empty flow, and the next
restore takes that one: killed twice, a run begins anew, without its inputs. So it is with one run in a process of its
own as well (crewai 1.15.30, kickoff(from_checkpoint=...) and Flow.from_checkpoint() alike), and probe 9 shows it.
Checkpoints can go to SQLite as well, but only where SQLite is 3.45 or newer: with an older one each
write fails, and only a warning in the log says so.
"""

import contextlib
import functools
import json
import os
import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import probes
from crewai.flow.async_feedback import HumanFeedbackPending
from crewai.flow.flow import Flow, FlowState, listen, start
from crewai.flow.human_feedback import human_feedback
from crewai.flow.persistence import SQLiteFlowPersistence, persist
from crewai.state.checkpoint_config import CheckpointConfig  # only: setup, checkpoint
from probes import PLAN, TIMER, fail_twice, note, work

# user code: setup
DATABASE = SQLiteFlowPersistence(PLAN.file("flows.db") if "COMPARISON_PLAN" in os.environ else ":memory:")


class State(FlowState):
    run: str = ""


# end


# user code: setup, checkpoint
def checkpoints(run: str, **options: Any) -> CheckpointConfig:
    events: Any = ["method_execution_finished"]
    return CheckpointConfig(location=PLAN.file(f"checkpoints-{run}"), on_events=events, **options)


def latest(run: str) -> Path | None:
    written = Path(PLAN.file(f"checkpoints-{run}")).glob("*/*.json")
    for file in sorted(written, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        # Files are not written in one piece: a kill may leave the newest one cut off.
        with contextlib.suppress(ValueError):
            json.loads(file.read_text())
            return file
    return None


# end


# user code: setup
def kickoff(flow: type[Flow[State]], run: str) -> Any:
    inputs = {"id": run, "run": run}
    if PLAN.column == "persist":
        return flow().kickoff(inputs=inputs)
    return kickoff_from_checkpoint(flow, run)  # harness


def kept(flow: Any) -> Any:
    """The flow with its store, where the mode is @persist."""
    if PLAN.column == "persist":
        return persist(DATABASE)(flow)
    return flow  # harness


# end


# user code: setup, checkpoint
def kickoff_from_checkpoint(flow: type[Flow[State]], run: str) -> Any:
    """As its documentation restores a flow: from the newest file, and with further checkpoints."""
    checkpoint = latest(run)
    if checkpoint:
        return flow().kickoff(from_checkpoint=checkpoints(run, restore_from=checkpoint))
    return flow(checkpoint=checkpoints(run)).kickoff(inputs={"id": run, "run": run})


# end


# user code: five
def make_method(name: str, after: str) -> Any:
    def method(self: Flow[State]) -> str:
        return work(self.state.run, name)

    method.__name__ = name
    return listen(after)(method) if after else start()(method)


def five_flow(names: Sequence[str]) -> Any:
    befores = ["", *names]
    methods = {name: make_method(name, before) for before, name in zip(befores, names, strict=False)}
    return kept(type("FiveFlow", (Flow[State],), methods))


def five() -> None:
    if PLAN.phase != "up":
        with ThreadPoolExecutor(len(PLAN.names)) as pool:
            list(pool.map(functools.partial(kickoff, five_flow(PLAN.steps)), PLAN.names))


# end


# user code: human
class Later:
    def request_feedback(self, context: Any, flow: Any) -> str:
        raise HumanFeedbackPending(context=context)


@persist(DATABASE)
class Review(Flow[State]):
    @start()
    def draft(self) -> str:
        return work(self.state.run, "draft")

    @listen(draft)
    @human_feedback(message="publish?", provider=Later())
    def review(self) -> str:
        return "draft"

    @listen(review)
    def publish(self) -> str:
        answer: Any = self.last_human_feedback
        return work(self.state.run, f"publish {answer.feedback}")


def human() -> None:
    if PLAN.phase == "start":
        result = Review().kickoff(inputs={"id": PLAN.run, "run": PLAN.run})
        if isinstance(result, HumanFeedbackPending):
            note(PLAN.run, "asked", "asked")


def answer() -> None:
    Review.from_pending(PLAN.run, DATABASE).resume("yes")


# end


# user code: replay
def replay() -> list[str]:
    kickoff(five_flow(PLAN.steps), PLAN.run)
    return recorded(PLAN.run)


def recorded(run: str) -> list[str]:
    if PLAN.column != "persist":
        checkpoint = latest(run)
        flow = five_flow(PLAN.steps).from_checkpoint(checkpoints(run, restore_from=checkpoint))
        return sorted(flow.checkpoint_completed_methods or [])
    with sqlite3.connect(PLAN.file("flows.db")) as database:
        return [row[0] for row in database.execute("SELECT method_name FROM flow_states ORDER BY id")]


# end


# user code: many
def make_nothing(name: str, after: str) -> Any:
    def method(self: Flow[State]) -> int:
        return 1

    method.__name__ = name
    return listen(after)(method) if after else start()(method)


@functools.cache
def many_flow(number: int) -> Any:
    names = [f"n{one}" for one in range(number)]
    befores = ["first"] * number if PLAN.version == "parallel" else ["first", *names]
    methods = {name: make_nothing(name, before) for before, name in zip(befores, names, strict=False)}
    return kept(type("ManyFlow", (Flow[State],), {"first": make_nothing("first", ""), **methods}))


# end


def many() -> list[dict[str, float]]:
    many_flow(probes.STEPS)
    return probes.measure(lambda number: kickoff(many_flow(number), f"many-{time.time()}"))


# user code: timer
class Timed(Flow[State]):
    @start()
    def before(self) -> str:
        return work(self.state.run, "before")

    @listen(before)
    def wait(self) -> None:
        time.sleep(TIMER)

    @listen(wait)
    def after(self) -> str:
        return work(self.state.run, "after")


def timer() -> None:
    if PLAN.phase != "up":
        kickoff(kept(Timed), PLAN.run)


# end


# user code: flaky
class Flaky(Flow[State]):
    @start()
    def flaky(self) -> str:
        for attempt in range(3):
            try:
                return fail_twice(self.state.run, "flaky")
            except ConnectionError:
                time.sleep(0.2 * 2**attempt)
        raise ConnectionError("three attempts")


def flaky() -> None:
    kickoff(Flaky, PLAN.run)


# end


SYSTEM = probes.System(
    name="crewai",
    title="CrewAI",
    columns=("persist", "checkpoint"),
    packages=("crewai",),
    imports="from crewai.flow.flow import Flow",
    focus="crews of role-playing agents, and flows that connect them",
    store="SQLite file (@persist), JSON files (checkpoints)",
    by_hand=True,
    knows_state=False,
    llm={
        "agent loop": "crewai:Agent",
        "model client": "crewai:LLM",
        "tool calling": "crewai.tools:tool",
        "agent framework integration": "crewai:Crew",
    },
)

if __name__ == "__main__":
    probes.main(SYSTEM)
