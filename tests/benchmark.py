"""What the harness itself costs, printed with its spread and never asserted: `uv run tests/benchmark.py`.

How soon the embedded server answers, how soon a worker that replaces a killed one gives its first
result, and what it costs to start a workflow in script 01 against a script that holds nothing else.
"""

import sys

sys.path.insert(0, __file__.rpartition("tests")[0] or "..")  # the sandbox, too, imports this file

from common import HERE, Category, Evidence, control, works
from lab import Lab, make_worker, run

import importlib
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from temporalio import workflow

BM = Category("BM", "Benchmark", "What does the harness itself cost?")
NOTHING = """

@workflow.defn
class Nothing:
    @workflow.run
    async def run(self) -> int:
        return 1
"""


def spread(seconds: Sequence[float]) -> str:
    """Median, minimum and maximum in milliseconds, and how many."""
    low, middle, high = (1000 * one for one in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"median {middle:.0f} ms ({low:.0f} to {high:.0f}, n={len(seconds)})"


@workflow.defn
class Hello:
    @workflow.run
    async def run(self) -> int:
        return 1


@BM.item("BM-01", "Embedded server ready")
async def server_ready(lab: Lab) -> AsyncIterator[Evidence]:
    seconds = []
    for _ in range(7):
        async with lab.private_server() as server:
            server.kill()
            seconds.append(await server.start())
    yield works("from the command to the first answered call", True, spread(seconds))
    yield control("nothing is asserted here", True, "-")


@BM.item("BM-02", "First result of a replacement worker")
async def replacement(lab: Lab) -> AsyncIterator[Evidence]:
    seconds = []
    for number in range(10):
        async with lab.worker_process([Hello]) as worker:
            await worker.kill()
        handle = await lab.client.start_workflow(Hello.run, id=f"{lab.id}-{number}", task_queue=lab.task_queue)
        begun = time.monotonic()
        async with lab.worker_process([Hello]):
            await handle.result()
            seconds.append(time.monotonic() - begun)
    yield works("from asking for a worker process to the result of a waiting workflow", True, spread(seconds))
    yield control("nothing is asserted here", True, "-")


def module_with_nothing(folder: Path, name: str, text: str) -> Any:
    """A module made of a script's text and one workflow that does nothing."""
    (folder / f"{name}.py").write_text(text.split("\nif __name__")[0] + NOTHING, encoding="utf-8")
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


@BM.item("BM-03", "Workflow start")
async def workflow_start(lab: Lab) -> AsyncIterator[Evidence]:
    script = (HERE / "01_ex_execution_semantics.py").read_text(encoding="utf-8")
    bare = module_with_nothing(lab.folder, "bare", "from temporalio import workflow\n")
    full = module_with_nothing(lab.folder, "full", script)
    cases = {
        "a script that holds nothing else": bare,
        "script 01 with all its workflows": full,
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(4):
        for name, module in cases.items():
            queue = f"{lab.id}-{name}"
            async with make_worker(lab.client, queue, [module.Nothing]):
                for number in range(8):
                    begun = time.monotonic()
                    id = f"{queue}-{turn}-{number}"
                    await lab.client.execute_workflow(module.Nothing.run, id=id, task_queue=queue)
                    if number:  # the first one compiles
                        seconds[name].append(time.monotonic() - begun)
    for name, measured in seconds.items():
        yield works(f"start to result, {name}", True, spread(measured))
    yield control("nothing is asserted here", True, "-")


if __name__ == "__main__":
    run(BM)
