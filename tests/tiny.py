"""A numbered script in small, for tests of what is the same in all of them: output, exit status, processes.

Its items end in every way an item can end. TINY names the folder for its signs of life.
"""

from common import (
    Category,
    Evidence,
    NotRun,
    Spread,
    at_least,
    cited,
    control,
    equal,
    figure,
    holds,
    limit,
    native,
    works,
)
from harness.faults import note
from lab import Lab, run

import asyncio
import os
import time
from collections.abc import AsyncIterator

from temporalio import workflow

TT = Category("TT", "Tiny", "Does every way to end show?")


@workflow.defn
class Hello:
    @workflow.run
    async def run(self, name: str) -> str:
        return f"Hello, {name}"


@TT.item("TT-01", "Recommended", fail_closed=True)
async def good(lab: Lab) -> AsyncIterator[Evidence]:
    async with lab.worker_process([Hello]):
        hello = await lab.client.execute_workflow(Hello.run, "you", id=lab.id, task_queue=lab.task_queue)
    yield works("a workflow in a worker process greets", result=equal(hello, "Hello, you"), took=figure(0.25, "s"))
    yield holds("an edge holds", True, "1 of 1")
    yield control("the failure is there without it", True, "0 of 1")
    yield native("it is built in", workflow.defn)


@TT.item("TT-02", "Of every kind")
async def kinds(lab: Lab) -> AsyncIterator[Evidence]:
    yield works("it works", True, "a measured text that is long enough to need more than one line " * 2)
    yield holds("it does not hold \u2192 \u00fc", False, "3 of 7 \u2192 too few")
    yield holds("this needs a program", None, "node is not installed")
    yield control("the failure is there without it", True, "0 of 1")
    yield limit("a limit is there", True, "seen once")
    yield limit("another is gone", False, "not seen")
    yield cited("somebody says so", "a book, 2024")


@TT.item("TT-03", "Throws")
async def throws(lab: Lab) -> AsyncIterator[Evidence]:
    yield works("it works", True, "1 of 1")
    raise ValueError("thrown on purpose") from KeyError("the cause")


@TT.item("TT-04", "Hangs", seconds=1)
async def hangs(lab: Lab) -> AsyncIterator[Evidence]:
    yield works("it works", True, "1 of 1")
    await asyncio.sleep(3600)


@TT.item("TT-05", "Cannot run here")
async def cannot(lab: Lab) -> AsyncIterator[Evidence]:
    raise NotRun("this needs the moon")
    yield works("never", True, "")


@TT.item("TT-06", "Control fails")
async def control_fails(lab: Lab) -> AsyncIterator[Evidence]:
    yield works("it works", True, "1 of 1")
    yield control("the failure is there without it", False, "1 of 1")


@TT.item("TT-07", "Stays until killed", seconds=600)
async def stays(lab: Lab) -> AsyncIterator[Evidence]:
    """Everything that can be left behind is running when the sign of life appears."""
    async with (
        lab.private_server(file=True) as server,
        lab.worker_process([Hello], server=server),
        lab.worker_process([Hello], fresh=True),
        lab.worker([Hello], server=server),
    ):
        await server.client.execute_workflow(Hello.run, "you", id=lab.id, task_queue=lab.task_queue)
        note(os.environ["TINY"], str(lab.folder))
        await asyncio.sleep(3600)
    yield works("never", True, "")


@TT.item("TT-08", "Looks from everywhere")
async def looks(lab: Lab) -> AsyncIterator[Evidence]:
    """The server is reached by the SDK here, by a worker process, and by the Go CLI."""
    async with lab.worker_process([Hello]):
        hello = await lab.client.execute_workflow(Hello.run, "you", id=lab.id, task_queue=lab.task_queue)
    seen = await lab.cli("workflow", "describe", "--workflow-id", lab.id)
    yield works("the CLI finds it, too", hello == "Hello, you" and seen.code == 0, f"exit {seen.code}: {seen.err}")
    yield control(
        "one that does not exist is not found", (await lab.cli("workflow", "describe", "-w", "no")).code == 1, ""
    )


STEP = 0.01  # seconds


@TT.item("TT-11", "Measures", alone=True)
async def measures(lab: Lab) -> AsyncIterator[Evidence]:
    took = []
    for _ in range(9):
        begun = time.monotonic()
        await asyncio.sleep(STEP)
        took.append(1000 * (time.monotonic() - begun))
    yield works("a step takes its time", a_step=at_least(Spread.of(took, "ms"), 1000 * STEP * 0.9))
    yield control("the failure is there without it", True, "0 of 1")


if __name__ == "__main__":
    run(TT)
