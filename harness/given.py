"""Someone else's server: what it can do is asked, and what was made on it is taken away again.

1. Refusals        which errors say that a server does not want to, and what is meant by them
2. Capabilities    what a server is asked before anything runs on it
3. Inventory       what was made there, and how it is removed, or named where the server keeps it
"""

from harness import versions
from harness.settings import NotRun, is_given, made_file, redacted, remember

import asyncio
import contextlib
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import temporalio.api.enums.v1
import temporalio.api.operatorservice.v1 as operator
import temporalio.api.workflowservice.v1 as service
from temporalio.api.batch.v1 import BatchOperationTermination
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.deployment.v1 import WorkerDeploymentVersion
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.update.v1 import Input, Meta, Request, WaitPolicy
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.exceptions import FailureError
from temporalio.service import RPCError, RPCStatusCode

# 1. Refusals ------------------------------------------------------------------------------------------

# How a server says that something is more than it was set to allow. That is looked for on a server of the user's only:
# on one of our own the limits are known, and to run into one is a finding.
# The words are the server's own: a model or a service that an item calls has limits of its rate, too.
OVER_A_LIMIT = (
    r"(?i)of (concurrent )?in-flight updates|total number of (distinct )?updates|update registry size limit"
    r"|workflow execution limit|limit reached for maximum signals|workflow (history|mutable state) \w+ exceeds limit"
    r"|(namespace|service|reuse) rate limit exceeded|per.second limit exceeded|concurrent poller limit"
)
SWITCHED_OFF = r"(?i)disabled|not (yet )?(enabled|allowed|supported|implemented|permitted)|permission|unauthorized"


def refusal(error: BaseException | None) -> str | None:
    """Why a server refused, in a sentence, when `error` or one of its causes says that it did; else None.

    What the installed SDK does not have yet counts as one, too (versions.py). A refusal is a setting of the server,
    or of what stands before it, and no fault of Temporal's: the call is not offered, not permitted, switched off, or
    over a limit that somebody set.
    """
    while error is not None:
        if isinstance(error, NotRun):
            return str(error)
        if why := versions.met(error):
            return why
        if isinstance(error, RPCError):
            if words := between(str(error)):
                return words
            said = redacted(error.message)[:200]
            if error.status in (RPCStatusCode.UNIMPLEMENTED, RPCStatusCode.PERMISSION_DENIED):
                return f"the server refuses it ({error.status.name}: {said})"
            if missing := re.search(r"column name '(Temporal\w+)' is not a valid search attribute", said):
                return f"the server does not know the search attribute {missing[1]}, which later versions have"
            off = error.status in (RPCStatusCode.INVALID_ARGUMENT, RPCStatusCode.FAILED_PRECONDITION)
            if off and re.search(SWITCHED_OFF, said):
                return f"the server refuses it ({error.status.name}: {said})"
            if error.status == RPCStatusCode.RESOURCE_EXHAUSTED and is_given():
                return over_a_limit(said)
        if isinstance(error, RPCError | FailureError) and re.search(OVER_A_LIMIT, str(error)) and is_given():
            return over_a_limit(redacted(str(error))[:200])
        error = error.__cause__
    return None


def over_a_limit(said: str) -> str:
    return f"a limit of the server is in the way: {said}"


async def hindrance(client: Client, prefix: str) -> str | None:
    """What on the server keeps workflows whose ids begin with `prefix` from going on, when that is a limit; else None.

    Such a workflow seldom fails: its workflow task or its activity is tried again and again, and whoever waits
    for it would wait for ever.
    """
    with contextlib.suppress(RPCError):
        query = f'ExecutionStatus = "Running" AND WorkflowId STARTS_WITH "{prefix}"'
        async for run in client.list_workflows(query, limit=30):
            raw = (await client.get_workflow_handle(run.id).describe()).raw_description
            for pending in raw.pending_activities:
                if pending.attempt > 1 and re.search(OVER_A_LIMIT, pending.last_failure.message):
                    return over_a_limit(redacted(pending.last_failure.message)[:200])
            if raw.pending_workflow_task.attempt > 2 and (why := await _limit_in_history(client, run.id)):
                return over_a_limit(why)
        # Others have ended by it: terminated when their history had grown too long, or told by what they called.
        query = f'ExecutionStatus != "Running" AND WorkflowId STARTS_WITH "{prefix}"'
        async for run in client.list_workflows(query, limit=20):
            request = service.GetWorkflowExecutionHistoryReverseRequest(
                namespace=client.namespace, maximum_page_size=12, execution=WorkflowExecution(workflow_id=run.id)
            )
            page = (await client.workflow_service.get_workflow_execution_history_reverse(request)).history
            for event in page.events:
                said = event.workflow_execution_terminated_event_attributes.reason
                said += event.activity_task_failed_event_attributes.failure.message
                if re.search(OVER_A_LIMIT, said):
                    return over_a_limit(redacted(said)[:200])
    return None


async def _limit_in_history(client: Client, id: str) -> str | None:
    """The name of the limit for which the latest workflow task failed."""
    events = (await client.get_workflow_handle(id).fetch_history()).events
    causes = temporalio.api.enums.v1.WorkflowTaskFailedCause
    for event in reversed(events):
        if event.HasField("workflow_task_failed_event_attributes"):
            name = causes.Name(event.workflow_task_failed_event_attributes.cause)
            return name.removeprefix("WORKFLOW_TASK_FAILED_CAUSE_") if name.endswith("LIMIT_EXCEEDED") else None
    return None


def refused_command(errors: str) -> str | None:
    """refusal(), for what a command of the Go CLI wrote to its standard error."""
    lines = [line for line in errors.splitlines() if re.search(SWITCHED_OFF, line)]
    return f"the server refuses it ({redacted(lines[0])[:200]})" if lines else between(errors)


def between(error: str) -> str | None:
    """What something between here and the server answered in its place, when an error tells of that; else None.

    A proxy that does not pass a call on answers as to a browser, with a status and a page; what comes out of the SDK
    then is about the first letter of that page.
    """
    status = re.search(r"(?:status|HTTP status code|status code)[: ]+(\d{3}[ \w]*)", error)
    page = re.search(
        r"compression flag|invalid content.?type|text/html|grpc-status header missing", error, re.IGNORECASE
    )
    if not page and not (status and status.group(1)[:3] in ("413", "502", "504")):
        return None
    answered = f"HTTP {status.group(1).strip()}" if status else "with a page for a browser"
    return f"something between here and the server, such as a proxy, answers in its place: {answered}"


# 2. Capabilities --------------------------------------------------------------------------------------

SYSTEM_QUEUE = "temporal-sys-per-ns-tq"  # polled by the worker that the server runs for each namespace
NOBODY = "evaluation-probe-that-does-not-exist"


@dataclass(frozen=True)
class Capabilities:
    """What a server said before anything ran on it.

    `missing` has the features it does not offer, each with the reason; `limits` what it tells of them, in bytes.
    """

    version: str = ""
    features: Sequence[str] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)

    def told(self) -> list[str]:
        """One line of what is there, one of each thing that is not."""
        there = ", ".join(name for name in self.features if name not in self.missing)
        limits = ", ".join(f"{name} {size:,} bytes" for name, size in self.limits.items())
        lines = [f"It offers {there}" + (f"; limits: {limits}" if limits else "; it tells of no limits")]
        return [*lines, *(f"It does not offer {name}: {why}" for name, why in self.missing.items())]


def _probes(client: Client) -> dict[str, Callable[[], Awaitable[Any]]]:
    """For each feature a call that changes nothing, and that a server without it refuses in another way."""
    ask, space = client.workflow_service, client.namespace
    nobody = WorkflowExecution(workflow_id=NOBODY)
    change = Request(meta=Meta(update_id="probe"), input=Input(name="probe"))
    update = service.UpdateWorkflowExecutionRequest(
        namespace=space,
        workflow_execution=nobody,
        request=change,
        wait_policy=WaitPolicy(lifecycle_stage=2),  # type: ignore[arg-type]
    )
    probes: dict[str, Callable[[], Awaitable[Any]]] = {
        "updates": lambda: ask.update_workflow_execution(update),
        "update-with-start": lambda: ask.execute_multi_operation(service.ExecuteMultiOperationRequest(namespace=space)),
        "schedules": lambda: ask.describe_schedule(
            service.DescribeScheduleRequest(namespace=space, schedule_id=NOBODY)
        ),
        "batch operations": lambda: ask.describe_batch_operation(
            service.DescribeBatchOperationRequest(namespace=space, job_id=NOBODY)
        ),
        "worker deployments": lambda: ask.describe_worker_deployment(
            service.DescribeWorkerDeploymentRequest(namespace=space, deployment_name=NOBODY)
        ),
        "operator calls": lambda: client.operator_service.add_search_attributes(
            operator.AddSearchAttributesRequest(namespace=space)
        ),
        "visibility": lambda: client.count_workflows(f'WorkflowId = "{NOBODY}"'),
    }
    if hasattr(service, "DescribeActivityExecutionRequest"):
        probes["standalone activities"] = lambda: ask.describe_activity_execution(
            service.DescribeActivityExecutionRequest(namespace=space, activity_id=NOBODY)
        )
    if hasattr(service, "UpdateTaskQueueConfigRequest"):
        probes["task queue settings"] = lambda: ask.update_task_queue_config(
            service.UpdateTaskQueueConfigRequest(namespace=space)
        )
    return probes


NEED_THE_SYSTEM_WORKER = ("schedules", "batch operations", "worker deployments")


async def capabilities(client: Client, seconds: float = 5, ours: bool = False) -> Capabilities:
    """Ask a server what it can do, in some milliseconds; in up to twice `seconds` where its own worker is missing.

    One of `ours` has its worker, which only comes some seconds after it: that is not waited for.
    """
    system = await client.workflow_service.get_system_info(service.GetSystemInfoRequest())
    request = service.DescribeNamespaceRequest(namespace=client.namespace)
    described = await client.workflow_service.describe_namespace(request)
    probes = _probes(client)
    refused = dict(zip(probes, await asyncio.gather(*(_refused(ask, seconds) for ask in probes.values())), strict=True))
    missing = {name: why for name, why in refused.items() if why}
    if not hasattr(service, "DescribeActivityExecutionRequest"):
        missing["standalone activities"] = "this SDK does not have them"
    features = [*probes, "system worker"]
    if not ours and (why := await _no_system_worker(client, seconds, "batch operations" not in missing)):
        missing["system worker"] = why
        missing |= {name: f"{why}, which does their work" for name in NEED_THE_SYSTEM_WORKER if name not in missing}
    limits = getattr(described.namespace_info, "limits", None)
    sizes = {one.name: value for one, value in limits.ListFields()} if limits is not None else {}
    named = {"blob_size_limit_error": "payload", "memo_size_limit_error": "memo"}
    return Capabilities(
        system.server_version, features, missing, {named[name]: size for name, size in sizes.items() if name in named}
    )


async def _refused(ask: Callable[[], Awaitable[Any]], seconds: float) -> str | None:
    """Why a probe's feature is not there; None when the probe was answered, if only that nothing was found."""
    try:
        await asyncio.wait_for(ask(), seconds)
    except RPCError as error:
        return refusal(error)
    except TimeoutError:
        return f"no answer within {seconds:g} s"
    return None


async def _no_system_worker(client: Client, seconds: float, batch: bool) -> str | None:
    """Why it seems that the server runs no worker for this namespace; None when it does, or nobody can tell.

    Nobody polling its queue is a suspicion only: the worker of a new namespace comes after some seconds, and what
    a server keeps there is its own affair. So it is given a piece of work, which selects no workflow.
    """
    queue = TaskQueue(name=SYSTEM_QUEUE)
    request = service.DescribeTaskQueueRequest(
        namespace=client.namespace,
        task_queue=queue,
        task_queue_type=temporalio.api.enums.v1.TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
    )
    try:
        if (await client.workflow_service.describe_task_queue(request)).pollers:
            return None
        if not batch:
            return None  # nothing that could be tried
        job = f"evaluation-probe-{time.time_ns()}"
        await client.workflow_service.start_batch_operation(
            service.StartBatchOperationRequest(
                namespace=client.namespace,
                job_id=job,
                reason="whether the server's own worker is there",
                visibility_query=f'WorkflowId = "{NOBODY}"',
                termination_operation=BatchOperationTermination(identity="evaluation"),
            )
        )
        deadline = time.monotonic() + 2 * seconds
        asked = service.DescribeBatchOperationRequest(namespace=client.namespace, job_id=job)
        running = temporalio.api.enums.v1.BatchOperationState.BATCH_OPERATION_STATE_RUNNING
        while (await client.workflow_service.describe_batch_operation(asked)).state == running:
            if time.monotonic() > deadline:
                stop = service.StopBatchOperationRequest(namespace=client.namespace, job_id=job, reason="never begun")
                await client.workflow_service.stop_batch_operation(stop)
                return "the server's own worker for this namespace does not run"
            await asyncio.sleep(0.1)
    except RPCError:
        return None
    return None


# 3. Inventory -----------------------------------------------------------------------------------------

WORKFLOWS = "workflows that were still running"
POLLED = "has active pollers"
RUN_BEFORE = re.compile(r"[A-Z]{2}-\d\d-[0-9a-f]{8}-")  # how the names of all that an item makes begin
Made = tuple[str, str]  # what kind of thing, and its name


def made_so_far(path: str) -> list[Made]:
    """What was noted in the file of things made, each once, oldest first (see settings.remember)."""
    file = Path(path)
    lines = file.read_text(encoding="utf-8").splitlines() if path and file.exists() else []
    return list(dict.fromkeys((kind, name) for kind, name in map(json.loads, lines)))


# What the command line makes: the words of the command, the kind of thing, the option that names it.
MAKING = (
    ("task-queue config set", "queue", ("--task-queue", "-t")),
    ("schedule create", "schedule", ("--schedule-id", "-s")),
    ("workflow start", "workflow", ("--workflow-id", "-w")),
    ("workflow execute", "workflow", ("--workflow-id", "-w")),
    ("activity start", "activity", ("--activity-id", "-a")),
    ("operator search-attribute create", "search attribute", ("--name",)),
    ("operator namespace create", "namespace", ("--namespace", "-n")),
    ("operator nexus endpoint create", "endpoint", ("--name",)),
)


def remember_command(arguments: Sequence[str]) -> None:
    """Note what a command is about to make."""
    for words, kind, options in MAKING:
        if " ".join(arguments).startswith(words):
            for option, value in itertools.pairwise(arguments):
                if option in options:
                    remember(kind, value)


@dataclass
class Kept:
    """Something that the server did not let go: what, why, and the commands that remove it."""

    what: str
    why: str
    commands: Sequence[str]
    deployment: str | None = None  # its name, where it is one that the server will let go of later

    def told(self) -> list[str]:
        return [f"{self.what} stays on your server: {self.why}. To remove it:", *(f"  {one}" for one in self.commands)]


class Inventory:
    """What one run made on a server of the user's: noted as it was made, and found by names that begin with `prefixes`.

    Notes are there even where the server's own lists lag behind; the lists have what nobody noted, such as children
    with generated ids.
    """

    def __init__(self, client: Client, prefixes: Sequence[str] = ()) -> None:
        self._client, self._ask, self._space = client, client.workflow_service, client.namespace
        self._prefixes = tuple(prefixes)
        self._made = made_so_far(made_file()) if prefixes else []
        self._seen: set[str] = set()  # workflows that are there, running or not
        self.removed: dict[str, int] = {}
        self.kept: list[Kept] = []

    async def remove(self, seconds: float = 20) -> None:
        """Remove everything, within `seconds`. What is left then stands in `kept`, never in an exception."""
        steps: Sequence[Callable[[], Awaitable[None]]] = (
            self._schedules, self._batches, self._activities, self._workflows, self._queues, self._of_the_operator,
            lambda: self._deployments(seconds),
        )  # fmt: skip
        deadline = time.monotonic() + seconds
        for step in steps:
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), 2)):
                    await step()
            except TimeoutError:
                self.kept.append(Kept("Something that was made", "the server is slow or gone", [self._list_command()]))
            except RPCError as error:
                # A server without schedules refuses even to list them: then there are none of ours.
                if refusal(error) is None:
                    self.kept.append(Kept("Something that was made", redacted(str(error)), [self._list_command()]))

    def told(self) -> list[str]:
        """What is to be said of it in the end: one line of what was removed, and what was not, with the commands."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.removed.items())
        lines = [f"Taken away from your server: {counts}"] if counts else []
        return lines + [line for one in self.kept for line in one.told()]

    def hand_over(self, path: str) -> None:
        """Append to the file at `path` what was kept, for whoever runs this script (see handed_over())."""
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps([one.deployment, one.told()])}\n" for one in self.kept)

    def _names(self, kind: str) -> list[str]:
        return [name for one, name in self._made if one == kind]

    def _ours(self, name: str) -> bool:
        return name.startswith(self._prefixes)

    def _count(self, kind: str) -> None:
        self.removed[kind] = self.removed.get(kind, 0) + 1

    def _list_command(self) -> str:
        query = f"ExecutionStatus = 'Running' AND WorkflowId STARTS_WITH '{self._prefixes[0]}'"
        return f'temporal workflow terminate -n {self._space} --reason left --query "{query}"'

    async def _all(
        self, names: Iterable[str], remove: Callable[[str], Awaitable[bool]], kind: str, what: str, command: str
    ) -> None:
        """Remove by name, many at a time. What is gone already is no trouble; `command` ends with the name."""
        places = asyncio.Semaphore(20)

        async def one(name: str) -> None:
            async with places:
                try:
                    if await remove(name):
                        self._count(kind)
                except RPCError as error:
                    if error.status != RPCStatusCode.NOT_FOUND:
                        why = refusal(error) or redacted(error.message)
                        self.kept.append(Kept(f"{what} {name}", why, [f"temporal {command} {name}"]))

        await asyncio.gather(*(one(name) for name in dict.fromkeys(names)))

    # Schedules first, since they go on making workflows.

    async def _schedules(self) -> None:
        names = self._names("schedule")
        with unavailable():
            names += [one.id async for one in await self._client.list_schedules() if self._ours(one.id)]

        async def delete(id: str) -> bool:
            handle = self._client.get_schedule_handle(id)
            for action in (await handle.describe()).info.recent_actions:
                if started := getattr(action.action, "workflow_id", None):
                    self._made.append(("workflow", started))
            await handle.delete()
            return True

        await self._all(names, delete, "schedules", "Schedule", f"schedule delete -n {self._space} --schedule-id")

    async def _batches(self) -> None:
        """Batch operations have an id that was noted, or a query that names something of ours."""
        running = temporalio.api.enums.v1.BatchOperationState.BATCH_OPERATION_STATE_RUNNING
        names = self._names("batch")
        with unavailable():
            listed = await self._ask.list_batch_operations(service.ListBatchOperationsRequest(namespace=self._space))
            for one in listed.operation_info:
                if one.state == running:
                    asked = service.DescribeBatchOperationRequest(namespace=self._space, job_id=one.job_id)
                    query = (await self._ask.describe_batch_operation(asked)).query
                    names += [one.job_id] if any(prefix in query for prefix in self._prefixes) else []

        async def stop(id: str) -> bool:
            asked = service.DescribeBatchOperationRequest(namespace=self._space, job_id=id)
            if (await self._ask.describe_batch_operation(asked)).state != running:
                return False
            request = service.StopBatchOperationRequest(namespace=self._space, job_id=id, reason="left over")
            await self._ask.stop_batch_operation(request)
            return True

        command = f"batch terminate -n {self._space} --reason done --job-id"
        await self._all(names, stop, "batch operations", "Batch operation", command)

    async def _activities(self) -> None:
        if not hasattr(service, "TerminateActivityExecutionRequest"):
            return
        names = self._names("activity")
        with unavailable():
            request = service.ListActivityExecutionsRequest(
                namespace=self._space, query='ExecutionStatus = "Running"', page_size=1000
            )
            listed = await self._ask.list_activity_executions(request)
            names += [one.activity_id for one in listed.executions if self._ours(one.activity_id)]

        async def terminate(id: str) -> bool:
            asked = service.DescribeActivityExecutionRequest(namespace=self._space, activity_id=id)
            if (await self._ask.describe_activity_execution(asked)).info.status != 1:  # running
                return False
            end = service.TerminateActivityExecutionRequest(
                namespace=self._space, activity_id=id, reason="left over by the evaluation", request_id=id
            )
            await self._ask.terminate_activity_execution(end)
            return True

        command = f"activity terminate -n {self._space} --activity-id"
        await self._all(names, terminate, "running activities", "Standalone activity", command)

    async def _workflows(self) -> None:
        """Those that were noted, with their children; then whatever the server lists, until its list has caught up."""
        noted = list(dict.fromkeys(self._names("workflow")))
        await self._end(noted)
        latest = next((id for id in reversed(noted) if id in self._seen), None)
        deadline = time.monotonic() + 10
        with unavailable():
            while True:
                found = [id async for id in self._listed()]
                await self._end(found)
                caught_up = latest is None or (await self._client.count_workflows(f'WorkflowId = "{latest}"')).count
                if (not found and caught_up) or time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.5)

    async def _end(self, ids: Iterable[str]) -> None:
        command = f"workflow terminate -n {self._space} --workflow-id"
        await self._all(ids, self._terminate, WORKFLOWS, "Workflow", command)

    async def _listed(self) -> AsyncIterator[str]:
        """Running workflows that are ours by their id, their task queue, or the one at the root of their family."""
        seen = set()
        for prefix in self._prefixes:
            for attribute in ("WorkflowId", "TaskQueue", "RootWorkflowId"):
                query = f'ExecutionStatus = "Running" AND {attribute} STARTS_WITH "{prefix}"'
                with unavailable():
                    async for run in self._client.list_workflows(query):
                        if run.id not in seen:
                            seen.add(run.id)
                            yield run.id

    async def _terminate(self, id: str) -> bool:
        """Terminate a workflow and the children that it would leave. Says whether it was running."""
        handle = self._client.get_workflow_handle(id)
        described = await handle.describe()
        self._seen.add(id)
        children = [one.workflow_id for one in described.raw_description.pending_children]
        for child in children:
            with absent():
                if await self._terminate(child):
                    self._count(WORKFLOWS)
        if described.status != WorkflowExecutionStatus.RUNNING and described.raw_info.status != 8:  # 8: paused
            return False
        await handle.terminate("left over by the evaluation")
        return True

    async def _queues(self) -> None:
        """Take the rate limits off task queues that were given one."""
        kinds = temporalio.api.enums.v1.TaskQueueType
        names = self._names("queue") if hasattr(service, "UpdateTaskQueueConfigRequest") else []
        for name in dict.fromkeys(names):
            for kind in (kinds.TASK_QUEUE_TYPE_ACTIVITY, kinds.TASK_QUEUE_TYPE_WORKFLOW):
                none = service.UpdateTaskQueueConfigRequest.RateLimitUpdate(reason="the evaluation is over")
                request = service.UpdateTaskQueueConfigRequest(
                    namespace=self._space, identity="evaluation", task_queue=name, task_queue_type=kind,
                    update_queue_rate_limit=none, update_fairness_key_rate_limit_default=none,
                )  # fmt: skip
                with unavailable():
                    await self._ask.update_task_queue_config(request)
            self._count("task queue settings")

    async def _of_the_operator(self) -> None:
        """Search attributes, Nexus endpoints and namespaces."""
        call = self._client.operator_service
        for name in self._names("search attribute"):
            request = operator.RemoveSearchAttributesRequest(namespace=self._space, search_attributes=[name])
            await self._by_operator(
                call.remove_search_attributes(request), f"Search attribute {name}", "search attributes",
                f"temporal operator search-attribute remove -n {self._space} --name {name}",
            )  # fmt: skip
        if endpoints := self._names("endpoint"):
            with unavailable():
                listed = await call.list_nexus_endpoints(operator.ListNexusEndpointsRequest(page_size=1000))
                for one in listed.endpoints:
                    if one.spec.name in endpoints:
                        request_ = operator.DeleteNexusEndpointRequest(id=one.id, version=one.version)
                        await self._by_operator(
                            call.delete_nexus_endpoint(request_), f"Nexus endpoint {one.spec.name}", "Nexus endpoints",
                            f"temporal operator nexus endpoint delete --name {one.spec.name}",
                        )  # fmt: skip
        for name in self._names("namespace"):
            await self._by_operator(
                call.delete_namespace(operator.DeleteNamespaceRequest(namespace=name)),
                f"Namespace {name}", "namespaces",
                f"temporal operator namespace delete -n {name} --yes",
            )  # fmt: skip

    async def _by_operator(self, call: Awaitable[Any], what: str, kind: str, command: str) -> None:
        try:
            await call
            self._count(kind)
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                self.kept.append(Kept(what, refusal(error) or redacted(error.message), [command]))

    async def _deployments(self, seconds: float) -> None:
        names = self._names("deployment")
        with unavailable():
            async for name, age in self._listed_deployments():
                if self._ours(name):
                    names.append(name)
                elif RUN_BEFORE.match(name) and age > timedelta(minutes=30):
                    await self._remove_deployment(name)  # of a run whose server did not let it go then
        await self.remove_deployments(names, seconds, patience=6)

    async def remove_deployments(self, names: Iterable[str], seconds: float, patience: float) -> None:
        """Remove worker deployments with their versions within `seconds`; what stays is in `kept`.

        A server keeps a version until it has forgotten the workers that polled for it, which is five minutes unless
        it is set otherwise: `patience` is how many seconds to wait for that.
        """
        begun, waiting = time.monotonic(), list(dict.fromkeys(names))
        while True:
            found = await asyncio.gather(*(self._remove_deployment(name) for name in waiting))
            why = {name: words for name, words in zip(waiting, found, strict=True) if words}
            polled = any(POLLED in words for words in why.values())
            if not why or time.monotonic() + 1 > begun + (patience if polled else seconds):
                break
            waiting = list(why)
            await asyncio.sleep(1)
        for name, words in why.items():
            commands, later = await self._deployment_commands(name), name if POLLED in words else None
            self.kept.append(Kept(f"Worker deployment {name}", words, commands, later))

    async def _listed_deployments(self) -> AsyncIterator[tuple[str, timedelta]]:
        """Names and ages."""
        token = b""
        while True:
            request = service.ListWorkerDeploymentsRequest(namespace=self._space, next_page_token=token)
            page = await self._ask.list_worker_deployments(request)
            for one in page.worker_deployments:
                yield one.name, datetime.now(UTC) - one.create_time.ToDatetime(UTC)
            token = page.next_page_token
            if not token:
                return

    async def _remove_deployment(self, name: str) -> str | None:
        """Remove a deployment with its versions. Returns why the server did not, or None when it is gone."""
        told = False
        try:
            request = service.DescribeWorkerDeploymentRequest(namespace=self._space, deployment_name=name)
            info = (await self._ask.describe_worker_deployment(request)).worker_deployment_info
            told = True
            await self._route_nowhere(name)
            for one in info.version_summaries:
                version = WorkerDeploymentVersion(
                    deployment_name=name, build_id=one.deployment_version.build_id or one.version.partition(".")[2]
                )
                await self._ask.delete_worker_deployment_version(
                    service.DeleteWorkerDeploymentVersionRequest(
                        namespace=self._space, deployment_version=version, skip_drainage=True, identity="evaluation"
                    )
                )
            last = service.DeleteWorkerDeploymentRequest(
                namespace=self._space, deployment_name=name, identity="evaluation"
            )
            await self._ask.delete_worker_deployment(last)
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND or not told:
                return None  # it is not there, or the server has no deployments at all
            if POLLED in error.message:
                return f"the server keeps a version until it has forgotten its workers, some minutes ({POLLED})"
            return refusal(error) or redacted(error.message)
        self._count("worker deployments")
        return None

    async def _route_nowhere(self, name: str) -> None:
        """No version ramps, and none is current."""
        ramping = service.SetWorkerDeploymentRampingVersionRequest(
            namespace=self._space, deployment_name=name, ignore_missing_task_queues=True, identity="evaluation"
        )
        current = service.SetWorkerDeploymentCurrentVersionRequest(
            namespace=self._space, deployment_name=name, ignore_missing_task_queues=True, identity="evaluation"
        )
        await self._ask.set_worker_deployment_ramping_version(ramping)
        await self._ask.set_worker_deployment_current_version(current)

    async def _deployment_commands(self, name: str) -> list[str]:
        where, builds = f"-n {self._space}", []
        with unavailable():
            request = service.DescribeWorkerDeploymentRequest(namespace=self._space, deployment_name=name)
            info = (await self._ask.describe_worker_deployment(request)).worker_deployment_info
            builds = [one.deployment_version.build_id for one in info.version_summaries]
        delete = f"temporal worker deployment delete-version {where} --skip-drainage --deployment-name {name}"
        versions = [f"{delete} --build-id {build}" for build in builds]
        return [*versions, f"temporal worker deployment delete {where} --name {name}"]


def handed_over(path: Path) -> list[tuple[str | None, list[str]]]:
    """What scripts left on the server: the name of a deployment that will be let go later or None, and what to say."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(deployment, told) for deployment, told in map(json.loads, lines)]


@contextlib.contextmanager
def absent() -> Iterator[None]:
    """What is gone already need not be removed."""
    try:
        yield
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise


@contextlib.contextmanager
def unavailable() -> Iterator[None]:
    """A server that refuses to list has nothing of ours on that list, or it is named from the notes alone."""
    try:
        yield
    except RPCError as error:
        if refusal(error) is None and error.status not in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
            raise
