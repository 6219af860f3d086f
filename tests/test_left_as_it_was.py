"""Someone else's server is left as it was: a full inventory before and after, however a run ends."""

from harness.settings import connect
from lab import Server

import asyncio
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import temporalio.api.operatorservice.v1 as operator
import temporalio.api.workflowservice.v1 as service
from helpers import ROOT, SCRIPTS, environment, evaluate, run, tiny
from servers import gateway, given_server
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.client import Client
from test_processes import wait_for

pytestmark = pytest.mark.all

FORGETS = {"matching__PollerHistoryTTL": '"1s"'}  # which workers polled: five minutes by default


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with given_server(tmp_path_factory.mktemp("server"), **FORGETS) as given:
        yield given


async def inventory(server: Server, queues: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    """Everything that somebody who owns a server could find there, but what has ended."""
    client = await connect(server.target)
    ask, operate, space = client.workflow_service, client.operator_service, client.namespace
    namespaces = await ask.list_namespaces(service.ListNamespacesRequest())
    attributes = await operate.list_search_attributes(operator.ListSearchAttributesRequest(namespace=space))
    endpoints = await operate.list_nexus_endpoints(operator.ListNexusEndpointsRequest())
    deployments = await ask.list_worker_deployments(service.ListWorkerDeploymentsRequest(namespace=space))
    batches = await ask.list_batch_operations(service.ListBatchOperationsRequest(namespace=space))
    activities = service.ListActivityExecutionsRequest(namespace=space, query='ExecutionStatus = "Running"')
    limited = [queue for queue in queues if await has_settings(client, queue)]
    return {
        "workflows": [run.id async for run in client.list_workflows('ExecutionStatus = "Running"')],
        "schedules": [one.id async for one in await client.list_schedules()],
        "activities": [one.activity_id for one in (await ask.list_activity_executions(activities)).executions],
        "deployments": [one.name for one in deployments.worker_deployments],
        "batch operations": [one.job_id for one in batches.operation_info if one.state == 1],
        "search attributes": sorted(attributes.custom_attributes),
        "endpoints": [one.spec.name for one in endpoints.endpoints],
        "namespaces": sorted(one.namespace_info.name for one in namespaces.namespaces),
        "task queue settings": limited,
    }


async def has_settings(client: Client, queue: str) -> bool:
    """Whether a task queue was given a rate limit."""
    for kind in (TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW, TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY):
        asked = service.DescribeTaskQueueRequest(namespace=client.namespace, task_queue_type=kind, report_config=True)
        asked.task_queue.name = queue
        config = (await client.workflow_service.describe_task_queue(asked)).config
        limits = (config.queue_rate_limit, config.fairness_keys_rate_limit_default)
        if any(one.HasField("rate_limit") for one in limits):
            return True
    return False


async def queues_of(server: Server) -> set[str]:
    client = await connect(server.target)
    return {run.task_queue async for run in client.list_workflows()}


def given(server: Server) -> dict[str, str]:
    return {"TEMPORAL_ADDRESS": server.address, "TEMPORAL_NAMESPACE": "evaluation"}


# A script of these items makes everything that can be left behind, and ends in the way its name says.
LEAVER = '''
from common import Category, Evidence, control, works
from lab import Lab, note, run
from harness.settings import remember

import asyncio
import datetime
import os

from temporalio import activity, workflow
from temporalio.client import Schedule, ScheduleActionStartWorkflow, ScheduleIntervalSpec, ScheduleSpec
from temporalio.common import VersioningBehavior, WorkerDeploymentVersion
from temporalio.worker import WorkerDeploymentConfig

LL = Category("LL", "Leaves", "Is it taken away?")


@activity.defn
async def stays() -> None:
    while True:
        await asyncio.sleep(1)
        activity.heartbeat()


@workflow.defn(versioning_behavior=VersioningBehavior.PINNED)
class Child:
    @workflow.run
    async def run(self) -> None:
        await workflow.wait_condition(lambda: False)


@workflow.defn
class Parent:
    """Its child has an id that nobody chose, and outlives it."""

    @workflow.run
    async def run(self, ends: bool) -> None:
        for queue in ([] if ends else [f"elsewhere-{workflow.uuid4()}"]) + [workflow.info().task_queue]:
            await workflow.start_child_workflow(
                Child.run, task_queue=queue, parent_close_policy=workflow.ParentClosePolicy.ABANDON
            )
        await workflow.wait_condition(lambda: ends)


async def leave_all(lab: Lab) -> None:
    minute = datetime.timedelta(minutes=1)
    every = ScheduleSpec(intervals=[ScheduleIntervalSpec(every=datetime.timedelta(seconds=1))])
    version = WorkerDeploymentVersion(deployment_name=f"{lab.id}-deployment", build_id="1")
    async with (
        lab.worker([Parent, Child], [stays]),
        lab.worker_process(
            [Child], task_queue=f"{lab.id}-versioned",
            deployment_config=WorkerDeploymentConfig(version=version, use_worker_versioning=True),
        ),
    ):
        for ends in (True, False):
            await lab.client.start_workflow(Parent.run, ends, id=f"{lab.id}-{ends}", task_queue=lab.task_queue)
        action = ScheduleActionStartWorkflow(Child.run, id=f"{lab.id}-scheduled", task_queue=lab.task_queue)
        await lab.client.create_schedule(f"{lab.id}-schedule", Schedule(action=action, spec=every))
        await lab.client.start_activity(
            stays, id=f"{lab.id}-activity", task_queue=lab.task_queue,
            start_to_close_timeout=minute, heartbeat_timeout=minute,
        )
        space, endpoint = f"{lab.id}-space", f"{lab.id}-endpoint"
        for command in (
            f"task-queue config set --task-queue {lab.task_queue} --task-queue-type activity --queue-rps-limit 5"
            " --queue-rps-limit-reason test",
            f"operator search-attribute create --name Of{lab.id[-8:]} --type Keyword",
            f"operator namespace create --namespace {space} --retention 1d",
            f"operator nexus endpoint create --name {endpoint} --target-namespace evaluation"
            f" --target-task-queue {lab.task_queue}",
        ):
            for _ in range(3):  # a settings call meets a deadline of the server's own now and then
                done = await lab.cli(*command.split())
                if done.code == 0:
                    break
            assert done.code == 0, done.err
        while True:
            listed = await lab.cli("worker", "deployment", "describe", "--name", f"{lab.id}-deployment")
            parent = await lab.client.get_workflow_handle(f"{lab.id}-False").describe()
            if listed.code == 0 and len(parent.raw_description.pending_children) == 2:
                break
            await asyncio.sleep(0.2)
        await asyncio.sleep(1.5)  # the schedule has started one


@LL.item("LL-01", "Ends")
async def ends(lab: Lab):
    await leave_all(lab)
    yield works("it works", True, "")
    yield control("a control", True, "")


@LL.item("LL-02", "Throws")
async def throws(lab: Lab):
    await leave_all(lab)
    raise ValueError("thrown on purpose")
    yield works("never", True, "")


@LL.item("LL-03", "Stays", seconds=600)
async def remains(lab: Lab):
    await leave_all(lab)
    note(os.environ["SIGN"], "here")
    await asyncio.sleep(600)
    yield works("never", True, "")


if __name__ == "__main__":
    run(LL)
'''


def leaver(tmp_path: Path) -> Path:
    tiny(tmp_path)
    (tmp_path / "leaver.py").write_text(LEAVER)
    return tmp_path / "leaver.py"


@pytest.mark.parametrize("item", ["LL-01", "LL-02"])
def test_everything_that_was_made_is_taken_away(server: Server, tmp_path: Path, item: str) -> None:
    before = asyncio.run(inventory(server))
    verdicts = evaluate(leaver(tmp_path), tmp_path, item, env=given(server))
    assert item == "LL-02" or verdicts.code == 0, verdicts.out
    assert "thrown on purpose" in verdicts.items[item]["reason"] or verdicts.code == 0, verdicts.out
    words = " ".join(verdicts.out.split())
    runs = 2 if item == "LL-02" else 1  # on a given server an item that came to no verdict is run a second time
    assert f"Taken away from your server: {runs} schedules, {runs} running activities," in words, verdicts.out
    assert f"{runs} worker deployments" in words
    assert asyncio.run(inventory(server, asyncio.run(queues_of(server)))) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_everything_is_taken_away_after_a_signal(server: Server, tmp_path: Path, number: signal.Signals) -> None:
    before = asyncio.run(inventory(server))
    sign = tmp_path / "sign"
    process = subprocess.Popen(
        [sys.executable, str(leaver(tmp_path)), "LL-03"],
        env=environment(**given(server), SIGN=str(sign)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(sign.exists, "everything was made", 90)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Taken away from your server: 1 schedules" in err, out + err
    assert "Traceback" not in err
    assert asyncio.run(inventory(server, asyncio.run(queues_of(server)))) == before


LISTS = ("ListWorkflowExecutions", "CountWorkflowExecutions", "ListSchedules", "ListActivityExecutions",
         "ListWorkerDeployments", "ListBatchOperations")  # fmt: skip


@pytest.mark.parametrize("seconds", [4, 3600])
def test_what_was_made_is_taken_away_though_every_list_lags(server: Server, tmp_path: Path, seconds: float) -> None:
    """Lists show nothing for so long after they were first asked for workflows: as a visibility store that lags."""
    before = asyncio.run(inventory(server))
    asked: list[float] = []

    def lag(path: str, sent: Mapping[str, str]) -> bytes | None:
        name = path.rpartition("/")[2]
        if name == "ListWorkflowExecutions":
            asked.append(time.monotonic())
        return b"" if name in LISTS and (not asked or time.monotonic() < asked[0] + seconds) else None

    with gateway(server.address, lag) as address:
        verdicts = evaluate(leaver(tmp_path), tmp_path, "LL-01", env=given(server) | {"TEMPORAL_ADDRESS": address})
    assert verdicts.code == 0, verdicts.out
    after = asyncio.run(inventory(server, asyncio.run(queues_of(server))))
    orphans = after.pop("workflows")
    # Only a list knows the child of a parent that has ended: it is found when the list has caught up.
    assert len(orphans) <= (0 if seconds < 10 else 1), verdicts.out
    assert after == {key: value for key, value in before.items() if key != "workflows"}
    asyncio.run(end(server, orphans))


async def end(server: Server, workflows: Sequence[str]) -> None:
    client = await connect(server.target)
    for one in workflows:
        await client.get_workflow_handle(one).terminate()


def test_what_the_server_does_not_let_go_is_named_with_the_command(tmp_path: Path) -> None:
    """With its defaults a server keeps a version for five minutes after its worker; and an operator may be needed."""

    def refuse(path: str, sent: Mapping[str, str]) -> tuple[grpc.StatusCode, str] | None:
        hidden = path.rpartition("/")[2] in ("RemoveSearchAttributes", "DeleteNexusEndpoint")
        return (grpc.StatusCode.PERMISSION_DENIED, "ask the operator") if hidden else None

    with given_server(tmp_path) as own, gateway(own.address, refuse) as address:
        verdicts = evaluate(leaver(tmp_path), tmp_path, "LL-01", env=given(own) | {"TEMPORAL_ADDRESS": address})
        left = asyncio.run(inventory(own))
        token = left["deployments"][0].split("-")[2]
        words = " ".join(verdicts.out.split())
        for command in (
            f"temporal worker deployment delete-version -n evaluation --skip-drainage --deployment-name "
            f"LL-01-{token}-deployment --build-id 1",
            f"temporal worker deployment delete -n evaluation --name LL-01-{token}-deployment",
            f"temporal operator search-attribute remove -n evaluation --name Of{token}",
            f"temporal operator nexus endpoint delete --name LL-01-{token}-endpoint",
        ):
            assert command in words, verdicts.out
        assert {key for key, value in left.items() if value} == {
            "deployments", "search attributes", "endpoints", "namespaces"
        }  # fmt: skip


@pytest.mark.hours
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name[:2])
def test_a_whole_script_leaves_nothing(server: Server, tmp_path: Path, script: Path) -> None:
    before = asyncio.run(inventory(server))
    verdicts = evaluate(script, tmp_path, env=given(server) | {"OPENAI_API_KEY": ""}, seconds=500)
    after = asyncio.run(inventory(server, asyncio.run(queues_of(server))))
    assert after == before, verdicts.out


@pytest.mark.hours
def test_run_all_waits_for_what_the_server_lets_go_later(tmp_path: Path) -> None:
    """A version is kept for 20 s here after its worker was there; the script alone does not wait so long."""
    with given_server(tmp_path, matching__PollerHistoryTTL='"20s"') as own:
        shutil.copy(ROOT / "run_all.py", leaver(tmp_path).with_name("run_all.py"))
        text = (tmp_path / "leaver.py").read_text()
        (tmp_path / "05_leaver.py").write_text(text.replace("run(LL)", "LL.items = LL.items[:1]\n    run(LL)"))
        before = asyncio.run(inventory(own))
        done = run(tmp_path / "run_all.py", cwd=tmp_path, env=given(own), seconds=300)
        assert "1 worker deployments are still on your server" in " ".join(done.stdout.split()), (
            done.stdout + done.stderr
        )
        assert "Taken away from your server: 1 worker deployments" in done.stdout
        assert asyncio.run(inventory(own)) == before


def test_the_next_run_removes_what_an_earlier_one_had_to_leave(tmp_path: Path) -> None:
    with given_server(tmp_path, matching__PollerHistoryTTL='"9s"') as own:
        script = leaver(tmp_path)
        evaluate(script, tmp_path, "LL-01", env=given(own))
        assert asyncio.run(inventory(own))["deployments"]
        time.sleep(9)
        # What began half an hour ago is of a run that has ended; here that is at once.
        given_py = tmp_path / "harness" / "given.py"
        given_py.write_text(given_py.read_text().replace("timedelta(minutes=30)", "timedelta(seconds=1)"))
        evaluate(tmp_path / "tiny.py", tmp_path, "TT-08", env=given(own))
        assert asyncio.run(inventory(own))["deployments"] == []
