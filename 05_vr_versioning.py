"""VR: versioning - how code, workers and data change while workflows run.

A workflow that runs for hours outlives the code that began it. Whoever continues it replays its history
with today's code, so a change that a web service would simply roll out can break every open run here.
The four items ask how the code says which path a run belongs to, how a break is found before it is
deployed, how workers are exchanged under running workflows, and how the stored data follows.
"""

from common import Category, Evidence, cited, control, holds, limit, native, piece, side_by_side, works
from lab import Lab, Server, count_events, failed_tasks, name_of, note, notes, run, sandbox, status_of, until

import asyncio
import collections
import contextlib
import dataclasses
import enum
import itertools
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from temporalio import activity, workflow
from temporalio.api.deployment.v1 import RoutingConfig, WorkerDeploymentVersionInfo
from temporalio.api.enums.v1 import EventType, RoutingConfigUpdateState, TaskQueueType, VersionDrainageStatus
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import (
    DescribeTaskQueueRequest,
    DescribeWorkerDeploymentRequest,
    DescribeWorkerDeploymentVersionRequest,
    SetWorkerDeploymentCurrentVersionRequest,
    SetWorkerDeploymentRampingVersionRequest,
)
from temporalio.client import (
    Client,
    WorkflowExecutionAsyncIterator,
    WorkflowExecutionStatus,
    WorkflowHandle,
    WorkflowHistory,
)
from temporalio.common import RawValue, RetryPolicy, VersioningBehavior, WorkerDeploymentVersion
from temporalio.converter import (
    CompositePayloadConverter,
    DataConverter,
    DefaultPayloadConverter,
    JSONPlainPayloadConverter,
    JSONTypeConverter,
)
from temporalio.exceptions import ActivityError, ApplicationError
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Replayer, Worker, WorkerDeploymentConfig

# Without this the sandbox would import them again for every run.
with workflow.unsafe.imports_passed_through():
    import pydantic
    from temporalio.contrib.pydantic import PydanticPayloadConverter, pydantic_data_converter

T = TypeVar("T")

VR = Category(
    "VR",
    "Versioning",
    "How do code, workers and data change while workflows run?",
)

# A workflow task that failed is tried again after at most this long, here short (default 10 s), to save time.
SOON = timedelta(seconds=3)
# Where nothing is to be given up, a slow machine gets all the time it needs.
PATIENT = timedelta(seconds=30)


@dataclass
class Purchase:
    """One argument object instead of several arguments: fields can be added later without breaking runs."""

    ledger: str
    gate: str = ""  # paying does not end before this file is there


class Crew:
    """The activities as one build has them: the ledger says which build ran what."""

    def __init__(self, build: str) -> None:
        self.build = build

    @activity.defn
    async def screen(self, purchase: Purchase) -> str:
        note(purchase.ledger, f"screen on {self.build}")
        return "screen"

    @activity.defn
    async def pay(self, purchase: Purchase) -> str:
        note(purchase.ledger, f"pay on {self.build}")
        while purchase.gate and not Path(purchase.gate).exists():
            await asyncio.sleep(0.05)
        return "pay"

    @activity.defn
    async def ship(self, purchase: Purchase) -> str:
        note(purchase.ledger, f"ship on {self.build}")
        return "ship"

    @property
    def activities(self) -> list[Callable[..., Any]]:
        return [self.screen, self.pay, self.ship]


async def do(step: Callable[[Crew, Purchase], Awaitable[str]], purchase: Purchase) -> str:
    return await workflow.execute_activity_method(step, purchase, start_to_close_timeout=PATIENT)


async def builds_of(handle: WorkflowHandle[Any, Any]) -> list[str]:
    """Which build completed each workflow task of a run, as the server recorded it, oldest first.

    A worker that takes part in no deployment is named here by its identity.
    """
    history = await handle.fetch_history()
    done = [
        event.workflow_task_completed_event_attributes
        for event in history.events
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED
    ]
    return [one.deployment_version.build_id or one.identity for one in done]


async def together(*parts: Awaitable[T]) -> list[T]:
    """asyncio.gather, but when one part fails the others are ended before it raises: no worker is left behind."""
    async with beside(*parts) as tasks:
        return list(await asyncio.gather(*tasks))


@contextlib.asynccontextmanager
async def beside(*parts: Awaitable[T]) -> AsyncIterator[Sequence[asyncio.Future[T]]]:
    """Parts that run beside the block, and no longer than it."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# VR-01 Workflow versioning ---------------------------------------------------------------------------
# Either the code asks which path a run belongs to (patching), or the server sends each run to the build
# that it belongs to (Worker Deployment Versioning).


class Approvable:
    """What all versions of the order have in common: they wait for an approval."""

    def __init__(self) -> None:
        self.approved = False

    @workflow.signal
    def approve(self) -> None:
        self.approved = True


@workflow.defn(name="Order")
class OrderOld(Approvable):
    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        done = [await do(Crew.pay, purchase)]
        await workflow.wait_condition(lambda: self.approved)
        return [*done, await do(Crew.ship, purchase)]


@workflow.defn(name="Order")
class OrderPatched(Approvable):
    """Screens before it pays. A run that has paid already goes on as it was begun."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        done = [await do(Crew.screen, purchase)] if workflow.patched("screen-first") else []
        done.append(await do(Crew.pay, purchase))
        await workflow.wait_condition(lambda: self.approved)
        return [*done, await do(Crew.ship, purchase)]


@workflow.defn(name="Order")
class OrderDeprecated(Approvable):
    """For the time when no open run is on the old path any more, but some carry the patch's marker."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        workflow.deprecate_patch("screen-first")
        done = [await do(Crew.screen, purchase), await do(Crew.pay, purchase)]
        await workflow.wait_condition(lambda: self.approved)
        return [*done, await do(Crew.ship, purchase)]


@workflow.defn(name="Order")
class OrderNew(Approvable):
    """The end of the change, and what it looks like when somebody forgets the patch."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        done = [await do(Crew.screen, purchase), await do(Crew.pay, purchase)]
        await workflow.wait_condition(lambda: self.approved)
        return [*done, await do(Crew.ship, purchase)]


STAGES: dict[str, type] = {
    "old": OrderOld,
    "patched": OrderPatched,
    "deprecated": OrderDeprecated,
    "new": OrderNew,
}
STEPS = {stage: ["pay", "ship"] if stage == "old" else ["screen", "pay", "ship"] for stage in STAGES}


@dataclass
class Begun:
    """A run that was begun and waits for its approval."""

    handle: WorkflowHandle[Any, Any]
    ledger: str
    queue: str


def staff(lab: Lab, stage: str, queue: str) -> Worker:
    """A worker with one stage of the code, whose tasks are recorded under the stage's name."""
    return lab.worker([STAGES[stage]], Crew(stage).activities, task_queue=queue, identity=stage)


async def begin(lab: Lab, stage: str, name: str) -> Begun:
    """Begin an order with one stage of the code, on a queue of its own, and stop that worker when the order waits."""
    ledger, queue = lab.file(name), f"{lab.id}-{name}"
    async with staff(lab, stage, queue):
        handle = await lab.client.start_workflow("Order", Purchase(ledger), id=queue, task_queue=queue)
        await until(lambda: waits(handle, STEPS[stage][:-1]), f"the order {name} waits")
    return Begun(handle, ledger, queue)


async def waits(handle: WorkflowHandle[Any, Any], steps: Sequence[str]) -> bool:
    """The steps are done, and so is the workflow task that heard of the last one."""
    count = await count_events(handle)
    return count["ACTIVITY_TASK_COMPLETED"] == len(steps) and count["WORKFLOW_TASK_COMPLETED"] == len(steps) + 1


@dataclass
class Ending:
    """How a run went on: the steps of its result, or the message of the workflow task that failed."""

    steps: list[str] | None
    trouble: str
    ran: list[str]  # the ledger's account
    builds: list[str]

    def is_clean(self, begun: str, code: str) -> bool:
        """Begun with one stage and finished with another: on the path it was begun on, each step once."""
        first, last = STEPS[begun][:-1], STEPS[begun][-1]
        ran = [*(f"{step} on {begun}" for step in first), f"{last} on {code}"]
        handed_over = self.builds[: len(first) + 1] == [begun] * (len(first) + 1) and self.builds[-1] == code
        return self.steps == STEPS[begun] and self.ran == ran and handed_over and not self.trouble


async def ending(order: Begun) -> Ending:
    """Wait until the run has either finished or its workflow task has failed."""
    trouble: list[str] = []
    async with beside(order.handle.result()) as (result,), asyncio.timeout(60):
        while not result.done() and not (trouble := await failed_tasks(order.handle)):
            await asyncio.wait({result}, timeout=0.3)
        trouble = trouble or await failed_tasks(order.handle)
        steps = None if trouble else await result
    return Ending(steps, trouble[0] if trouble else "", notes(order.ledger), await builds_of(order.handle))


async def hand_over(lab: Lab, begun: str, code: str, name: str = "") -> Ending:
    """Begin an order with one stage of the code and approve it when only the other one runs."""
    return await go_on(lab, await begin(lab, begun, f"{name}{begun}-{code}"), code)


async def go_on(lab: Lab, order: Begun, code: str) -> Ending:
    await order.handle.signal(Approvable.approve)
    async with staff(lab, code, order.queue):
        return await ending(order)


async def patch(lab: Lab) -> Evidence:
    """One order in flight, one begun after the change; the same patched code has to do both right."""
    one, other = await together(
        hand_over(lab, "old", "patched", "patch-"), hand_over(lab, "patched", "patched", "patch-")
    )
    return works(
        "patched(): a run begun on the old code finishes on its old path, a new run takes the new one",
        one.is_clean("old", "patched") and other.is_clean("patched", "patched"),
        f"begun before the change: {', '.join(one.ran)}; begun after it: {', '.join(other.ran)}; "
        f"builds that completed the first one's workflow tasks: {', '.join(one.builds)}",
    )


async def stages(lab: Lab) -> Evidence:
    """patched, then deprecate_patch, then removed: each release meets runs of the release before."""
    order = list(STAGES)
    pairs = list(itertools.pairwise(order))
    endings = await together(*(hand_over(lab, *pair) for pair in pairs))
    clean = [pair for pair, one in zip(pairs, endings, strict=True) if one.is_clean(*pair)]
    told = [
        f"{begun} to {code}: {', '.join(one.ran)}{one.trouble and '; ' + one.trouble[:120]}"
        for (begun, code), one in zip(pairs, endings, strict=True)
    ]
    return holds(
        "all stages (patched, deprecate_patch, removed): each finishes the runs of the stage before",
        clean == pairs and len(pairs) == 3,
        "; ".join(told),
    )


async def unpatched(lab: Lab) -> Evidence:
    one = await hand_over(lab, "old", "new")
    return control(
        "the same change without a patch: NondeterminismError, and the run does not go on",
        "TMPRL1100" in one.trouble and one.steps is None and one.ran == ["pay on old"],
        f"begun on old, continued on new: {one.trouble[:150]}; steps that ran: {', '.join(one.ran)}",
    )


async def visible(lab: Lab) -> Evidence:
    """Two queries say which open runs still need a stage of the code; replaying them says whether that is true."""
    prefix = f"{lab.id}-visible"
    mine = f'WorkflowType = "Order" AND ExecutionStatus = "Running" AND WorkflowId STARTS_WITH "{prefix}"'

    async def open_runs(more: str) -> list[str]:
        return sorted([one.id.removeprefix(prefix) async for one in lab.client.list_workflows(f"{mine} AND {more}")])

    async def old_path() -> list[str]:
        return await open_runs("TemporalChangeVersion IS NULL")

    async def marked() -> list[str]:
        return await open_runs('TemporalChangeVersion = "screen-first"')

    async def listed(old: list[str], new: list[str]) -> bool:
        return await old_path() == old and await marked() == new

    early, late = await together(begin(lab, "old", "visible-early"), begin(lab, "patched", "visible-late"))
    await until(lambda: listed(["-early"], ["-late"]), "both runs are listed")
    too_soon = await breaks(lab, mine, OrderDeprecated)
    await go_on(lab, early, "patched")
    seconds = await until(lambda: listed([], ["-late"]), "the old path is no longer listed")
    in_time = await breaks(lab, mine, OrderDeprecated)
    await go_on(lab, late, "patched")
    await until(lambda: listed([], []), "no open run is listed")
    return holds(
        "visibility tells when a patch may go: the open runs on the old path, and those that carry its marker",
        too_soon == [early.handle.id] and in_time == [],
        f"TemporalChangeVersion IS NULL listed the old run and = screen-first the new one; {seconds:.1f} s after the "
        f"old run's end the first list was empty. Open runs that deprecate_patch would break, found by replay: "
        f"{len(too_soon)} before, {len(in_time)} after",
    )


async def breaks(lab: Lab, query: str, *candidates: type) -> list[str]:
    """Replay every run that a query lists against candidate code. Returns the ids of those that do not fit."""
    replayer = Replayer(workflows=candidates, workflow_runner=sandbox())
    histories = lab.client.list_workflows(query).map_histories()
    async with asyncio.timeout(30):
        replayed = await replayer.replay_workflows(histories, raise_on_replay_failure=False)
    broken = set(replayed.replay_failures)
    return sorted([one.id async for one in lab.client.list_workflows(query) if one.run_id in broken])


@workflow.defn(name="PinnedOrder", versioning_behavior=VersioningBehavior.PINNED)
class PinnedOrderOne(Approvable):
    """Stays on the build that it began on."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        done = [await do(Crew.pay, purchase)]
        await workflow.wait_condition(lambda: self.approved)
        return [*done, await do(Crew.ship, purchase)]


@workflow.defn(name="PinnedOrder", versioning_behavior=VersioningBehavior.PINNED)
class PinnedOrderTwo(Approvable):
    """Needs no patch, though no run of build 1.0 could be replayed with it."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        done = [await do(Crew.screen, purchase), await do(Crew.pay, purchase)]
        await workflow.wait_condition(lambda: self.approved)
        return [*done, await do(Crew.ship, purchase)]


@workflow.defn(name="MovingOrder", versioning_behavior=VersioningBehavior.AUTO_UPGRADE)
class MovingOrderOne(Approvable):
    """Moves to the current build with its next workflow task."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        done = [await do(Crew.pay, purchase)]
        await workflow.wait_condition(lambda: self.approved)
        return [*done, await do(Crew.ship, purchase)]


@workflow.defn(name="MovingOrder", versioning_behavior=VersioningBehavior.AUTO_UPGRADE)
class MovingOrderTwo(Approvable):
    """Must be patched: it gets runs that build 1.0 began."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        done = [await do(Crew.screen, purchase)] if workflow.patched("screen-first") else []
        done.append(await do(Crew.pay, purchase))
        await workflow.wait_condition(lambda: self.approved)
        return [*done, await do(Crew.ship, purchase)]


ORDERS: dict[str, Sequence[type]] = {
    "1.0": [PinnedOrderOne, MovingOrderOne],
    "2.0": [PinnedOrderTwo, MovingOrderTwo],
}


def versioned(deployment: str, build: str) -> WorkerDeploymentConfig:
    """What a worker needs to take part in Worker Deployment Versioning."""
    return WorkerDeploymentConfig(
        version=WorkerDeploymentVersion(deployment_name=deployment, build_id=build), use_worker_versioning=True
    )


async def set_current(client: Client, deployment: str, build: str) -> float:
    """Make a build current, once its worker has registered. Returns the seconds until tasks are routed to it."""
    request = SetWorkerDeploymentCurrentVersionRequest(
        namespace=client.namespace, deployment_name=deployment, build_id=build
    )
    return await route(
        client, deployment, lambda: client.workflow_service.set_worker_deployment_current_version(request)
    )


async def route(client: Client, deployment: str, change: Callable[[], Any]) -> float:
    """Change a deployment's routing and wait until the task queue (of the same name here) follows it."""
    begun = time.monotonic()

    async def accepted() -> bool:
        try:
            await change()
        except RPCError as error:
            if error.status in (RPCStatusCode.NOT_FOUND, RPCStatusCode.FAILED_PRECONDITION):
                return False  # its worker has not registered yet
            raise
        return True

    await until(accepted, f"the server accepts the routing of {deployment}")
    since = time.monotonic()

    async def routed() -> bool:
        request = DescribeWorkerDeploymentRequest(namespace=client.namespace, deployment_name=deployment)
        found = (await client.workflow_service.describe_worker_deployment(request)).worker_deployment_info
        if found.routing_config_update_state == RoutingConfigUpdateState.ROUTING_CONFIG_UPDATE_STATE_COMPLETED:
            return True
        # Seen once in 72 switches: the server never reports it completed, though the queue has long followed.
        return time.monotonic() > since + 3 and await follows(client, deployment, found.routing_config)

    await until(routed, f"the task queue follows the routing of {deployment}")
    return time.monotonic() - begun


async def follows(client: Client, task_queue: str, wanted: RoutingConfig) -> bool:
    """Whether a task queue's own account of its versions is what the deployment wants it to be."""
    for kind in (TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW, TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY):
        request = DescribeTaskQueueRequest(
            namespace=client.namespace, task_queue=TaskQueue(name=task_queue), task_queue_type=kind
        )
        has = (await client.workflow_service.describe_task_queue(request)).versioning_info
        if (has.current_deployment_version, has.ramping_deployment_version) != (
            wanted.current_deployment_version,
            wanted.ramping_deployment_version,
        ):
            return False
    return True


@dataclass
class Shop:
    """One deployment with two builds, and the orders given to it."""

    lab: Lab
    queue: str
    gate: str
    orders: dict[str, Begun] = field(default_factory=dict)

    def worker(self, build: str) -> Worker:
        return self.lab.worker(
            ORDERS[build], Crew(build).activities, task_queue=self.queue, deployment_config=versioned(self.queue, build)
        )

    async def order(self, workflow_type: str, name: str, gate: str = "") -> Begun:
        ledger = self.lab.file(f"shop-{name}")
        handle = await self.lab.client.start_workflow(
            workflow_type, Purchase(ledger, gate), id=f"{self.queue}-{name}", task_queue=self.queue
        )
        self.orders[name] = Begun(handle, ledger, self.queue)
        return self.orders[name]


async def no_current_version(shop: Shop) -> Evidence:
    """A versioned worker polls and no version is current yet: the run waits, and nothing says so."""
    waiting = await shop.order("PinnedOrder", "waiting")
    await until(lambda: has_version(shop.lab.client, shop.queue, "1.0"), "the worker has registered")
    await asyncio.sleep(3)
    before = await count_events(waiting.handle)
    status, failed = await status_of(waiting.handle), await failed_tasks(waiting.handle)
    current = await set_current(shop.lab.client, shop.queue, "1.0")
    seconds = await until(lambda: waits(waiting.handle, ["pay"]), "the run begins")
    return limit(
        WAITS,
        before["WORKFLOW_TASK_SCHEDULED"] == 1 and before["WORKFLOW_TASK_STARTED"] == 0 and not failed,
        f"3 s after its worker registered: status {name_of(status)}, history {', '.join(before)}, no failure; "
        f"current version set and routed in {current:.1f} s, then at its first wait after {seconds:.1f} s",
    )


async def has_version(client: Client, deployment: str, build: str) -> bool:
    with contextlib.suppress(RPCError):
        return bool((await version_info(client, deployment, build)).create_time.seconds)
    return False


async def version_info(client: Client, deployment: str, build: str) -> WorkerDeploymentVersionInfo:
    """What the server says of one build of a deployment: its status, its drainage."""
    request = DescribeWorkerDeploymentVersionRequest(
        namespace=client.namespace,
        deployment_version={"deployment_name": deployment, "build_id": build},  # type: ignore[arg-type]
    )
    found = await client.workflow_service.describe_worker_deployment_version(request)
    return found.worker_deployment_version_info


STAYS = "pinned runs stay on their build though the next one is incompatible; new runs go to the current build"
MOVES = "auto-upgrade runs move to the current build, patched, and go on as they were begun"
ENDS_THERE = "an activity that is running during the switch ends on its build, once, and its run goes on"
WAITS = "with workers polling but no current version set, a run waits, and reports no error, until one is set"


@piece(works(STAYS), holds(MOVES), holds(ENDS_THERE), limit(WAITS))
async def deployments(lab: Lab) -> list[Evidence]:
    """Build 2.0 becomes current while four orders of build 1.0 are open, two of them inside an activity."""
    lab.needs("worker deployments")
    shop = Shop(lab, f"{lab.id}-shop", lab.file("gate"))
    async with shop.worker("1.0"):
        limited = await no_current_version(shop)
        for kind in ("PinnedOrder", "MovingOrder"):
            await shop.order(kind, f"{kind}-waiting")
            await shop.order(kind, f"{kind}-paying", gate=shop.gate)
        for name, order in shop.orders.items():
            if name.endswith("waiting"):
                await until(lambda: waits(order.handle, ["pay"]), f"{name} waits")  # noqa: B023
            else:
                await until(lambda: notes(order.ledger), f"{name} is inside its activity")  # noqa: B023
        async with shop.worker("2.0"):
            switch = await set_current(lab.client, shop.queue, "2.0")
            for kind in ("PinnedOrder", "MovingOrder"):
                await shop.order(kind, f"{kind}-new")
            note(shop.gate, "open")
            for order in shop.orders.values():
                await order.handle.signal(Approvable.approve)
            endings = {name: await ending(order) for name, order in shop.orders.items()}
    return [*routed_rightly(endings, switch), limited]


def routed_rightly(endings: dict[str, Ending], switch: float) -> list[Evidence]:
    """The evidence that follows from how the orders of two builds ended."""

    def ran(name: str, *expected: str) -> bool:
        one = endings[name]
        builds = {entry.split(" on ")[1] for entry in expected}
        return one.ran == list(expected) and not one.trouble and set(one.builds) == builds

    def told(*names: str) -> str:
        return "; ".join(f"{name}: {', '.join(endings[name].ran)}{endings[name].trouble[:100]}" for name in names)

    fresh = ("screen on 2.0", "pay on 2.0", "ship on 2.0")
    return [
        works(
            STAYS,
            ran("waiting", "pay on 1.0", "ship on 1.0")
            and ran("PinnedOrder-waiting", "pay on 1.0", "ship on 1.0")
            and ran("PinnedOrder-new", *fresh)
            and ran("MovingOrder-new", *fresh),
            f"{told('PinnedOrder-waiting', 'PinnedOrder-new', 'MovingOrder-new')}; "
            f"routed {switch:.1f} s after the switch",
        ),
        holds(
            MOVES,
            ran("MovingOrder-waiting", "pay on 1.0", "ship on 2.0"),
            f"{told('MovingOrder-waiting')}; builds: {', '.join(endings['MovingOrder-waiting'].builds)}",
        ),
        holds(
            ENDS_THERE,
            ran("PinnedOrder-paying", "pay on 1.0", "ship on 1.0")
            and ran("MovingOrder-paying", "pay on 1.0", "ship on 2.0"),
            told("PinnedOrder-paying", "MovingOrder-paying"),
        ),
    ]


@VR.item("VR-01", "Workflow versioning", seconds=150, fail_closed=True)
async def workflow_versioning(lab: Lab) -> AsyncIterator[Evidence]:
    """Orders are begun with one version of the code and finished with another; a ledger says which ran what."""
    parts = (together(patch(lab), unpatched(lab)), together(stages(lab), visible(lab)), deployments(lab))
    async for evidence in side_by_side(*parts):
        yield evidence
    yield native(
        "patching is part of the SDK, its runs are found by a query, and replay tells when a patch may go",
        workflow.patched,
        workflow.deprecate_patch,
        workflow.NondeterminismError,
        Client.list_workflows,
        WorkflowExecutionAsyncIterator.map_histories,
        Replayer.replay_workflows,
    )
    yield native(
        "Worker Deployment Versioning is part of SDK and server (the command makes the call that was made here)",
        (workflow.defn, "versioning_behavior"),
        VersioningBehavior.PINNED,
        VersioningBehavior.AUTO_UPGRADE,
        (Worker, "deployment_config"),
        (WorkerDeploymentConfig, "use_worker_versioning"),
        WorkerDeploymentVersion,
        "temporal worker deployment set-current-version",
        "temporal worker deployment describe-version",
    )


# VR-02 Detection of breaking changes -----------------------------------------------------------------
# The histories of open runs are the test data of the next release: replay them all against it first.

# Which code may meet which history. A patched run is not for code without the patch, and a run on the old
# path only for code that still has it.
FITS = {
    "old": {"old", "patched"},
    "patched": {"patched", "deprecated"},
    "deprecated": {"patched", "deprecated", "new"},
    "new": {"deprecated", "new"},
}


@workflow.defn(name="Order")
class OrderRefactored(Approvable):
    """A harmless change of OrderOld: other names, a query, a log line, a condition with a new form."""

    def __init__(self) -> None:
        super().__init__()
        self.progress: list[str] = []

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        await self.take(Crew.pay, purchase)
        workflow.logger.info("paid, waiting for the approval")
        while not self.approved:
            await workflow.wait_condition(lambda: self.approved)
        await self.take(Crew.ship, purchase)
        return self.progress

    async def take(self, step: Callable[[Crew, Purchase], Awaitable[str]], purchase: Purchase) -> None:
        self.progress.append(await do(step, purchase))

    @workflow.query
    def status(self) -> list[str]:
        return self.progress


@dataclass
class Action:
    name: str
    ledger: str


@activity.defn
async def act(action: Action) -> str:
    """One activity for everything: what is to be done is an argument, which replay does not compare."""
    note(action.ledger, action.name)
    return action.name


@workflow.defn(name="Delivery")
class Delivery(Approvable):
    @workflow.run
    async def run(self, ledger: str) -> list[str]:
        done = [await workflow.execute_activity(act, Action("pay", ledger), start_to_close_timeout=PATIENT)]
        await workflow.wait_condition(lambda: self.approved)
        return done


@workflow.defn(name="Delivery")
class DeliveryWithStepInFront(Approvable):
    """The same breaking change as in OrderNew. The recorded payment now passes for the screening."""

    @workflow.run
    async def run(self, ledger: str) -> list[str]:
        done = [
            await workflow.execute_activity(act, Action(name, ledger), start_to_close_timeout=PATIENT)
            for name in ("screen", "pay")
        ]
        await workflow.wait_condition(lambda: self.approved)
        return done


@workflow.defn(name="Trial")
class Trial:
    @workflow.run
    async def run(self, ledger: str) -> None:
        await workflow.sleep(0.1)
        await workflow.execute_activity(act, Action("try", ledger), start_to_close_timeout=PATIENT)


@workflow.defn(name="Trial")
class TrialOtherTimer:
    @workflow.run
    async def run(self, ledger: str) -> None:
        await workflow.sleep(3600)
        await workflow.execute_activity(act, Action("try", ledger), start_to_close_timeout=PATIENT)


@workflow.defn(name="Trial")
class TrialOtherTimeout:
    @workflow.run
    async def run(self, ledger: str) -> None:
        await workflow.sleep(0.1)
        await workflow.execute_activity(act, Action("try", ledger), start_to_close_timeout=timedelta(hours=1))


@workflow.defn(name="Trial")
class TrialOtherRetries:
    @workflow.run
    async def run(self, ledger: str) -> None:
        await workflow.sleep(0.1)
        await workflow.execute_activity(
            act,
            Action("try", ledger),
            start_to_close_timeout=PATIENT,
            retry_policy=RetryPolicy(maximum_attempts=1),
        )


UNSEEN = (TrialOtherTimer, TrialOtherTimeout, TrialOtherRetries)


async def replay(workflow_class: type, history: WorkflowHistory) -> str:
    """Replay a history against a workflow's code. Returns what is wrong, or "" when it fits."""
    replayer = Replayer(workflows=[workflow_class], workflow_runner=sandbox())
    async with asyncio.timeout(30):
        failure = (await replayer.replay_workflow(history, raise_on_replay_failure=False)).replay_failure
    return f"{type(failure).__name__}: {failure}" if failure else ""


async def store(order: Begun, path: str) -> None:
    """Keep a run's history in a file, as `temporal workflow show --output json` does too."""
    history = await order.handle.fetch_history()
    await asyncio.to_thread(Path(path).write_text, history.to_json(), "utf-8")


def stored(path: str) -> WorkflowHistory:
    return WorkflowHistory.from_json(Path(path).stem, Path(path).read_text(encoding="utf-8"))


async def catch_before_deployment(lab: Lab) -> list[Evidence]:
    """The history of one open order, in a file, against three releases. None of them is deployed."""
    order = await begin(lab, "old", "stored")
    path = lab.file("stored.json")
    await store(order, path)
    begun = time.monotonic()
    broken = await replay(OrderNew, stored(path))
    seconds = time.monotonic() - begun
    harmless = {code.__name__: await replay(code, stored(path)) for code in (OrderOld, OrderRefactored, OrderPatched)}
    events = len(stored(path).events)
    untouched = notes(order.ledger) == ["pay on old"] and len((await order.handle.fetch_history()).events) == events
    return [
        works(
            "a breaking change is caught by replaying a stored history, before anything is deployed",
            "NondeterminismError" in broken and "TMPRL1100" in broken and untouched,
            f"{events} events from a file, replayed in {seconds:.2f} s: {broken[:260]}; the run itself is untouched, "
            f"its ledger still: {', '.join(notes(order.ledger))}",
        ),
        control(
            "a harmless change passes, and so do the same code and the patched change",
            not any(harmless.values()),
            "; ".join(f"{name}: {wrong[:100] or 'fits'}" for name, wrong in harmless.items()),
        ),
    ]


async def matrix(lab: Lab) -> list[Evidence]:
    """Each stage of the code meets a history of each stage: predicted, replayed, and then deployed for real."""
    pairs = [(history, code) for history in STAGES for code in STAGES]
    orders: dict[tuple[str, str], Begun] = {}
    for history in STAGES:  # some at a time, to go easy on small machines
        for code, order in zip(
            STAGES, await together(*(begin(lab, history, f"open-{history}-{code}") for code in STAGES)), strict=True
        ):
            orders[history, code] = order
    nightly = await replay_all_open(lab, orders)
    replayed = {
        (history, code): await replay(STAGES[code], await orders[history, code].handle.fetch_history())
        for history, code in pairs
    }
    endings: dict[tuple[str, str], Ending] = {}
    for history in STAGES:
        for code, one in zip(
            STAGES, await together(*(go_on(lab, orders[history, code], code) for code in STAGES)), strict=True
        ):
            endings[history, code] = one
    predicted = {key: key[1] in FITS[key[0]] for key in orders}
    fits = {key: not wrong for key, wrong in replayed.items()}
    finished = {key: one.is_clean(*key) for key, one in endings.items()}
    stuck = {key: "TMPRL1100" in one.trouble for key, one in endings.items()}
    surprises = [
        f"{code} on a run of {history}: predicted {predicted[key]}, replayed {fits[key]}, deployed {finished[key]}"
        for key in pairs
        for history, code in [key]
        if not predicted[key] == fits[key] == finished[key] == (not stuck[key])
    ]
    rows = [f"{history}: {', '.join(code for code in STAGES if fits[history, code])}" for history in STAGES]
    return [
        holds(
            "each of 4 stages of the code against 4 histories: replay says what was predicted, and so does deploying",
            len(orders) == 16 and not surprises,
            f"history: code that fits it - {'; '.join(rows)}; {sum(finished.values())} of 16 runs finished right "
            f"when deployed, {sum(stuck.values())} stuck on NondeterminismError; differing: {surprises or 'none'}",
        ),
        nightly,
    ]


async def replay_all_open(lab: Lab, orders: dict[tuple[str, str], Begun]) -> Evidence:
    """What a CI job does before each release: every open run that visibility lists, whatever its type."""
    candidate = "deprecated"
    # A job of its own namespace needs no more than ExecutionStatus = "Running".
    mine = f'ExecutionStatus = "Running" AND WorkflowId STARTS_WITH "{lab.id}-open"'
    other = await begin_delivery(lab, "open-other")

    async def listed() -> bool:
        return (await lab.client.count_workflows(mine)).count == len(orders) + 1

    await until(listed, "visibility lists every open run")
    begun = time.monotonic()
    broken = await breaks(lab, mine, STAGES[candidate])
    expected = [order.handle.id for key, order in orders.items() if candidate not in FITS[key[0]]]
    return holds(
        "replaying every open run, as a CI job would, names exactly those that the release would break",
        broken == sorted([*expected, other.handle.id]) and len(expected) == 4,
        f"{len(orders) + 1} open runs replayed against the stage {candidate} in {time.monotonic() - begun:.1f} s; "
        f"named: {', '.join(one.removeprefix(lab.id + '-open-') for one in broken)} (other: a type it does not have)",
    )


async def begin_delivery(lab: Lab, name: str) -> Begun:
    ledger, queue = lab.file(name), f"{lab.id}-{name}"
    handle = await lab.client.start_workflow(Delivery.run, ledger, id=queue, task_queue=queue)
    async with lab.worker([Delivery], [act], task_queue=queue):
        await until(lambda: waits(handle, ["pay"]), "it has paid")
    return Begun(handle, ledger, queue)


async def change_behind_an_argument(lab: Lab) -> Evidence:
    """The change that OrderNew is caught for, in code that has one activity for everything."""
    delivery = await begin_delivery(lab, "delivery")
    found = await replay(DeliveryWithStepInFront, await delivery.handle.fetch_history())
    await delivery.handle.signal(Approvable.approve)
    async with lab.worker([DeliveryWithStepInFront], [act], task_queue=delivery.queue):
        await until(lambda: is_over(delivery.handle), "it finished or failed")
    ledger = delivery.ledger
    return limit(
        "a changed activity argument passes replay, and with it a step in front when both are one activity type",
        found == "" and notes(ledger) == ["pay", "pay"],
        f"replay: {found[:100] or 'fits'}; deployed, the ledger reads {', '.join(notes(ledger))}: the recorded payment "
        "passed for the screening, and it was paid a second time",
    )


async def is_over(handle: WorkflowHandle[Any, Any]) -> bool:
    return await status_of(handle) != WorkflowExecutionStatus.RUNNING or bool(await failed_tasks(handle))


async def unseen_options(lab: Lab) -> Evidence:
    ledger, queue = lab.file("trial"), f"{lab.id}-trial"
    async with lab.worker([Trial], [act], task_queue=queue):
        handle = await lab.client.start_workflow(Trial.run, ledger, id=queue, task_queue=queue)
        await handle.result()
    history = await handle.fetch_history()
    unseen = [change.__name__ for change in UNSEEN if not await replay(change, history)]
    return limit(
        "changed timer length, timeouts and retry policy pass replay",
        bool(unseen),
        f"replayed clean: {', '.join(unseen) or 'none'}",
    )


@VR.item("VR-02", "Detection of breaking changes", seconds=150)
async def breaking_changes(lab: Lab) -> AsyncIterator[Evidence]:
    """Histories of open runs are replayed against the next release; then it is deployed, to see who was right."""
    parts = (catch_before_deployment(lab), matrix(lab))
    async for evidence in side_by_side(*parts, together(change_behind_an_argument(lab), unseen_options(lab))):
        yield evidence
    yield native(
        "replaying stored and listed histories is part of the SDK",
        Replayer,
        Replayer.replay_workflow,
        Replayer.replay_workflows,
        WorkflowHandle.fetch_history,
        WorkflowHistory.to_json,
        WorkflowHistory.from_json,
        Client.list_workflows,
        WorkflowExecutionAsyncIterator.map_histories,
        workflow.patched,
        workflow.deprecate_patch,
    )


# VR-03 Migration strategy ----------------------------------------------------------------------------
# A release is a routing table that the server keeps: try the new build with a share of the new runs, make
# it current, wait until the old one has drained, and turn back at any time.

# How soon the server looks whether a version has drained; lowered, to see in seconds what takes minutes.
DRAIN_SOON = {
    "matching.wv.VersionDrainageStatusVisibilityGracePeriod": '"1s"',
    "matching.wv.VersionDrainageStatusRefreshInterval": '"1s"',
}
RAMPED_RUNS, RAMP = 60, 30


@workflow.defn(name="PinnedOrder", versioning_behavior=VersioningBehavior.PINNED)
class PinnedOrderThree(Approvable):
    """A bad release: what it begins it cannot finish."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        await do(Crew.screen, purchase)
        await do(Crew.pay, purchase)
        await workflow.wait_condition(lambda: self.approved)
        raise RuntimeError("a bug of build 3.0")  # not an ApplicationError: the workflow task fails, not the run


@dataclass
class Months:
    ledger: str
    upgrades: bool  # ask for the current build with each continue-as-new
    paid: int = 0
    due: int = 0  # asked for, and not yet paid


class Renewable:
    @workflow.init
    def __init__(self, months: Months) -> None:
        self.due = months.due
        self.ended = False

    @workflow.signal
    def renew(self) -> None:
        self.due += 1

    @workflow.signal
    def end(self) -> None:
        self.ended = True

    async def next(self, months: Months) -> None:
        """Wait for the next month. Where a new build waits for this run, begin the month as a new run."""
        if workflow.info().is_target_worker_deployment_version_changed() and not self.ended:
            auto = workflow.ContinueAsNewVersioningBehavior.AUTO_UPGRADE if months.upgrades else None
            # What was signalled and not done yet goes along, or it would be lost.
            workflow.continue_as_new(dataclasses.replace(months, due=self.due), initial_versioning_behavior=auto)
        await workflow.wait_condition(lambda: self.due > 0 or self.ended)
        self.due -= 1


@workflow.defn(name="Subscription", versioning_behavior=VersioningBehavior.PINNED)
class SubscriptionOne(Renewable):
    """Never ends by itself, so it would stay on its build for ever."""

    @workflow.run
    async def run(self, months: Months) -> int:
        while True:
            await self.next(months)
            if self.ended:
                return months.paid
            await do(Crew.pay, Purchase(months.ledger))
            months.paid += 1


@workflow.defn(name="Subscription", versioning_behavior=VersioningBehavior.PINNED)
class SubscriptionTwo(Renewable):
    @workflow.run
    async def run(self, months: Months) -> int:
        while True:
            await self.next(months)
            if self.ended:
                return months.paid
            await do(Crew.screen, Purchase(months.ledger))
            await do(Crew.pay, Purchase(months.ledger))
            months.paid += 1


RELEASES: dict[str, Sequence[type]] = {
    "1.0": [PinnedOrderOne, SubscriptionOne],
    "2.0": [PinnedOrderTwo, SubscriptionTwo],
    "3.0": [PinnedOrderThree, SubscriptionTwo],
}


async def set_ramp(client: Client, deployment: str, build: str, percent: float) -> float:
    """Send a share of the new runs to a build. Returns the seconds until tasks are routed so."""
    request = SetWorkerDeploymentRampingVersionRequest(
        namespace=client.namespace, deployment_name=deployment, build_id=build, percentage=percent
    )
    return await route(
        client, deployment, lambda: client.workflow_service.set_worker_deployment_ramping_version(request)
    )


@dataclass
class Rollout:
    """One deployment that is taken through three releases, and every order that was given to it."""

    lab: Lab
    server: Server
    deployment: str
    orders: list[Begun] = field(default_factory=list)

    def worker(self, build: str) -> Worker:
        return self.lab.worker(
            RELEASES[build],
            Crew(build).activities,
            server=self.server,
            task_queue=self.deployment,
            deployment_config=versioned(self.deployment, build),
        )

    async def set_current(self, build: str) -> float:
        return await set_current(self.server.client, self.deployment, build)

    async def begin(self, count: int, *, approved: bool = False) -> list[Begun]:
        """Start orders; approved ones run to their end, the others wait when they have paid."""
        first = len(self.orders)
        begun = await together(*(self.start(number, approved) for number in range(first, first + count)))
        self.orders += begun
        if not approved:
            await until(lambda: all(any("pay" in step for step in notes(one.ledger)) for one in begun), "all have paid")
        return begun

    async def start(self, number: int, approved: bool) -> Begun:
        ledger = self.lab.file(f"order-{number}")
        handle: WorkflowHandle[Any, Any] = await self.server.client.start_workflow(
            "PinnedOrder",
            Purchase(ledger),
            id=f"{self.deployment}-{number}",
            task_queue=self.deployment,
            task_timeout=None if approved else SOON,
            start_signal="approve" if approved else None,
        )
        return Begun(handle, ledger, self.deployment)

    async def approve(self, orders: Sequence[Begun]) -> None:
        for order in orders:
            await order.handle.signal(Approvable.approve)

    async def drainage(self, build: str) -> str:
        """Whether a build still has open runs, as the server reports it."""
        info = await version_info(self.server.client, self.deployment, build)
        return VersionDrainageStatus.Name(info.drainage_info.status).removeprefix("VERSION_DRAINAGE_STATUS_")


async def finish(orders: Sequence[Begun]) -> None:
    async with asyncio.timeout(60):
        await together(*(order.handle.result() for order in orders))


def builds_that_ran(orders: Sequence[Begun]) -> collections.Counter[str]:
    """How many orders each build worked on, as their ledgers tell; "1.0, 2.0" is one that was moved."""
    return collections.Counter(
        ", ".join(sorted({step.split(" on ")[1] for step in notes(order.ledger)})) for order in orders
    )


async def rollout(lab: Lab) -> AsyncIterator[Evidence]:
    async with lab.private_server(settings=DRAIN_SOON) as server:
        way = Rollout(lab, server, f"{lab.id}-rollout")
        async with way.worker("2.0"):
            async with way.worker("1.0"):
                await way.set_current("1.0")
                long = await way.begin(5)
                subscriptions = [await subscribe(way, upgrades) for upgrades in (True, False)]
                yield await ramp(way)
                yield await take_over(way)
                yield await upgrade_at_continue_as_new(subscriptions)
                yield await drain(way, long)
            yield await roll_back_and_move(way)
        yield await nothing_lost(way)


async def ramp(way: Rollout) -> Evidence:
    seconds = await set_ramp(way.server.client, way.deployment, "2.0", RAMP)
    ramped = await way.begin(RAMPED_RUNS, approved=True)
    await finish(ramped)
    ran = builds_that_ran(ramped)
    # Four standard deviations: chance alone leaves it once in some ten thousand evaluations.
    expected = RAMPED_RUNS * RAMP / 100
    slack = 4 * math.sqrt(expected * (1 - RAMP / 100))
    return works(
        f"a new version ramps: about {RAMP} % of the new runs go to it, each whole run to one version",
        abs(ran["2.0"] - expected) <= slack and ran["1.0"] + ran["2.0"] == RAMPED_RUNS,
        f"{ran['2.0']} of {RAMPED_RUNS} runs on 2.0 ({ran['2.0'] / RAMPED_RUNS:.0%}; expected {expected:.0f}, accepted "
        f"within {slack:.0f} of it), {ran['1.0']} on 1.0; routed {seconds:.1f} s after the command",
    )


async def take_over(way: Rollout) -> Evidence:
    seconds = await way.set_current("2.0")
    after = await way.begin(10, approved=True)
    await finish(after)
    ran = builds_that_ran(after)
    return works(
        "made current, it gets every new run",
        ran == {"2.0": 10},
        f"10 runs started after the switch: {dict(ran)}; routed {seconds:.1f} s after the command",
    )


async def drain(way: Rollout, long: Sequence[Begun]) -> Evidence:
    """The old version is looked at while its last runs are open, and when they are done."""
    switched = (await version_info(way.server.client, way.deployment, "1.0")).last_deactivation_time.ToDatetime()

    async def checked_with_open_runs() -> bool:
        info = await version_info(way.server.client, way.deployment, "1.0")
        return info.drainage_info.last_checked_time.ToDatetime() > switched + timedelta(seconds=1)

    await until(checked_with_open_runs, "the server looked at the open runs of 1.0")
    before = await way.drainage("1.0")
    await way.approve(long)
    await finish(long)

    async def drained() -> bool:
        return await way.drainage("1.0") == "DRAINED"

    seconds = await until(drained, "1.0 is reported drained")
    ran = builds_that_ran(long)
    return works(
        "the old version drains: DRAINING while its runs are open, which finish on it, then DRAINED",
        before == "DRAINING" and ran == {"1.0": 5},
        f"checked by the server with {len(long)} runs open: {before}; they finished on {dict(ran)}; "
        f"DRAINED {seconds:.1f} s after the last one (check interval lowered to 1 s)",
    )


async def roll_back_and_move(way: Rollout) -> Evidence:
    """Build 3.0 is bad. New runs go back to 2.0; the five that 3.0 began are stuck on it, and then it is gone."""
    async with way.worker("3.0"):
        await way.set_current("3.0")
        victims = await way.begin(5)
        await way.approve(victims)
        for victim in victims:
            await until(lambda: failed_tasks(victim.handle), "the bug of 3.0 has shown")  # noqa: B023
        seconds = await way.set_current("2.0")
        after = await way.begin(5, approved=True)
        await finish(after)
    stuck = [await status_of(one.handle) for one in victims].count(WorkflowExecutionStatus.RUNNING)
    untouched = builds_that_ran(victims)
    begun = time.monotonic()
    moved = await together(*(move_by_hand(way, victim, "2.0") for victim in victims))
    await finish(victims)
    return holds(
        "rollback: new runs go to the old version again; runs pinned to a dead version are moved by hand and finish",
        builds_that_ran(after) == {"2.0": 5}
        and stuck == len(victims)
        and untouched == {"3.0": 5}
        and set(moved) == {0}
        and all(notes(one.ledger) == ["screen on 3.0", "pay on 3.0", "ship on 2.0"] for one in victims),
        f"routed back in {seconds:.1f} s, then {dict(builds_that_ran(after))}; {stuck} of {len(victims)} runs were "
        f"stuck on 3.0 when its worker was gone; all finished {time.monotonic() - begun:.1f} s after "
        f"`temporal workflow update-options`; one of them: {', '.join(notes(victims[0].ledger))}",
    )


async def move_by_hand(way: Rollout, order: Begun, build: str) -> int:
    """What an operator types. Returns the exit status."""
    done = await way.lab.cli(
        "workflow", "update-options",
        "--workflow-id", order.handle.id,
        "--versioning-override-behavior", "pinned",
        "--versioning-override-deployment-name", way.deployment,
        "--versioning-override-build-id", build,
        server=way.server,
    )  # fmt: skip
    return done.code


async def subscribe(way: Rollout, upgrades: bool) -> Begun:
    """A subscription on build 1.0 that has paid its first month."""
    name = f"{way.deployment}-{'upgrades' if upgrades else 'stays'}"
    ledger = way.lab.file(name)
    handle: WorkflowHandle[Any, Any] = await way.server.client.start_workflow(
        "Subscription", Months(ledger, upgrades), id=name, task_queue=way.deployment, start_signal="renew"
    )
    await until(lambda: waits(handle, ["pay"]), "the first month is paid")
    return Begun(way.server.client.get_workflow_handle(handle.id), ledger, way.deployment)


def paid(subscription: Begun) -> int:
    return sum(step.startswith("pay") for step in notes(subscription.ledger))


async def upgrade_at_continue_as_new(subscriptions: Sequence[Begun]) -> Evidence:
    """Build 2.0 is current by now. Two more months: in the first, each run learns of it and continues as new."""
    results = []
    for one in subscriptions:
        first = (await one.handle.describe()).run_id
        for month in (2, 3):
            await one.handle.signal(Renewable.renew)
            await until(lambda: paid(one) == month, f"month {month} is paid")  # noqa: B023
        await one.handle.signal(Renewable.end)
        results.append(await one.handle.result())
        if (await one.handle.describe()).run_id == first:
            results.append("never continued as new")
    upgraded, stayed = (notes(one.ledger) for one in subscriptions)
    return holds(
        "a long run learns of the new version and upgrades at continue-as-new, with its state",
        results == [3, 3]
        and upgraded == ["pay on 1.0", "pay on 1.0", "screen on 2.0", "pay on 2.0"]
        and stayed == ["pay on 1.0"] * 3,
        f"with initial_versioning_behavior=AUTO_UPGRADE: {', '.join(upgraded)}; months counted over both runs: "
        f"{results[0]}; without it: {', '.join(stayed)}",
    )


async def nothing_lost(way: Rollout) -> Evidence:
    """Every order ever started, against its own ledger: finished, and each step taken once."""
    paths = (["pay", "ship"], ["screen", "pay", "ship"])
    whole, results = 0, 0
    for order in way.orders:
        steps = [step.split(" on ")[0] for step in notes(order.ledger)]
        whole += steps in paths
        results += (
            await status_of(order.handle) == WorkflowExecutionStatus.COMPLETED and await order.handle.result() == steps
        )
    count = len(way.orders)
    return holds(
        "no run is lost or doubled in the whole rollout",
        whole == results == count == 5 + RAMPED_RUNS + 10 + 5 + 5,
        f"{count} orders started over three versions, a ramp, three switches and a rollback; {results} completed with "
        f"the result that their ledger shows, {whole} ledgers have each step once",
    )


HOP = "two workers without versioning, old and new code on one queue: runs hop between them and break"
MOVE_OVER = "a worker without versioning beside a current version gets no run, and open runs it had begun move over"


@piece(control(HOP), holds(MOVE_OVER))
async def unversioned_beside(lab: Lab) -> list[Evidence]:
    """A worker that was forgotten in the move to versioning polls the same queue with old code."""
    lab.needs("worker deployments")
    queue = f"{lab.id}-beside"

    async def started(name: str, count: int) -> list[Begun]:
        return [await start_order(lab, "Order", f"{name}-{number}", queue) for number in range(count)]

    older = Crew("unversioned old").activities
    # No cache, so that each workflow task may go to either worker, as it does with many runs.
    async with lab.worker([OrderOld], older, task_queue=queue, max_cached_workflows=0):
        adopted = await started("adopted", 3)
        await until(lambda: all(notes(one.ledger) for one in adopted), "the unversioned worker began its runs")
        release = dataclasses.replace(versioned(queue, "2.0"), default_versioning_behavior=VersioningBehavior.PINNED)
        async with lab.worker([OrderPatched], Crew("2.0").activities, task_queue=queue, deployment_config=release):
            await set_current(lab.client, queue, "2.0")
            fresh = await started("fresh", 5)
            for order in [*adopted, *fresh]:
                await order.handle.signal(Approvable.approve)
            await finish([*adopted, *fresh])
            await set_current(lab.client, queue, "")
        # A second worker for the same queue needs a process or a client of its own.
        newer = Crew("unversioned new").activities
        async with lab.worker_process([OrderNew], newer, task_queue=queue, max_cached_workflows=0):
            mixed = await started("mixed", 6)
            for order in mixed:
                await order.handle.signal(Approvable.approve)
            endings = await together(*(ending(order) for order in mixed))
    broken = [one.trouble for one in endings if "TMPRL1100" in one.trouble]
    return [
        control(
            HOP,
            len(broken) > 0,
            f"current version taken away; {len(broken)} of {len(mixed)} runs failed a workflow task: "
            f"{(broken or ['none'])[0][:150]}; worked on by: {dict(builds_that_ran(mixed))}",
        ),
        holds(
            MOVE_OVER,
            builds_that_ran(fresh) == {"2.0": 5} and builds_that_ran(adopted) == {"2.0, unversioned old": 3},
            f"{len(fresh)} new runs: {dict(builds_that_ran(fresh))}; 3 begun by the unversioned worker: "
            f"{dict(builds_that_ran(adopted))} - the first current version takes over every open unversioned run, so "
            "its code must fit them",
        ),
    ]


async def start_order(
    lab: Lab, workflow_type: str, name: str, queue: str, task_timeout: timedelta | None = None
) -> Begun:
    ledger = lab.file(name)
    handle: WorkflowHandle[Any, Any] = await lab.client.start_workflow(
        workflow_type, Purchase(ledger), id=f"{queue}-{name}", task_queue=queue, task_timeout=task_timeout
    )
    return Begun(handle, ledger, queue)


UNCONFIGURED = "a workflow that declares a versioning behavior hangs on a worker without deployment_config"
NOT_DRAINED = "with the server's own settings, an empty version is not reported DRAINED within 8 s"


@piece(limit(UNCONFIGURED))
async def annotated_but_unversioned(lab: Lab) -> Evidence:
    """The workflow says that it is pinned, but its worker was given no deployment_config."""
    lab.needs("worker deployments")
    queue = f"{lab.id}-annotated"
    async with lab.worker([PinnedOrderOne], Crew("unversioned").activities, task_queue=queue):
        order = await start_order(lab, "PinnedOrder", "annotated", queue, task_timeout=SOON)

        async def timed_out() -> bool:
            return (await count_events(order.handle))["WORKFLOW_TASK_TIMED_OUT"] > 0

        seconds = await until(timed_out, "a workflow task timed out")
        status, failed = await status_of(order.handle), await failed_tasks(order.handle)
    return limit(
        UNCONFIGURED,
        status == WorkflowExecutionStatus.RUNNING and not failed and notes(order.ledger) == [],
        f"the worker started without complaint; {seconds:.1f} s later the first workflow task had timed out (timeout "
        f"{SOON.total_seconds():.0f} s, default 10 s): status {name_of(status)}, no step taken, no failure in the "
        "history; only the worker's log names the reason",
    )


@piece(limit(NOT_DRAINED))
async def default_drainage(lab: Lab) -> Evidence:
    """A version that never had a run, on the server as it is set: how soon is it reported drained?"""
    lab.needs("worker deployments")
    deployment = f"{lab.id}-default"

    def worker(build: str) -> Worker:
        return lab.worker(
            ORDERS[build], Crew(build).activities, task_queue=deployment, deployment_config=versioned(deployment, build)
        )

    async with worker("1.0"), worker("2.0"):
        await set_current(lab.client, deployment, "1.0")
        await set_current(lab.client, deployment, "2.0")
        await asyncio.sleep(8)
        info = (await version_info(lab.client, deployment, "1.0")).drainage_info
    status = VersionDrainageStatus.Name(info.status).removeprefix("VERSION_DRAINAGE_STATUS_")
    return limit(
        NOT_DRAINED,
        status != "DRAINED",
        f"no run was ever started on it; 8 s after the switch: {status}, last checked "
        f"{(info.last_checked_time.ToDatetime() - info.last_changed_time.ToDatetime()).total_seconds():.1f} s after "
        "it stopped being current",
    )


@VR.item("VR-03", "Migration strategy", seconds=150)
async def migration(lab: Lab) -> AsyncIterator[Evidence]:
    """Three builds of one deployment; every order has a ledger that says which build took which step."""
    async with beside(unversioned_beside(lab), annotated_but_unversioned(lab), default_drainage(lab)) as tasks:
        async for evidence in rollout(lab):
            yield evidence
        for task in tasks:
            for evidence in await task:
                yield evidence
    yield cited(
        "the server looks for open runs 180 s after a version stopped being current, unless it is set otherwise",
        "temporalio/sdk-go, test/worker_deployment_test.go: default VersionDrainageStatusVisibilityGracePeriod",
    )
    yield native(
        "ramp, switch, rollback, drainage and moving a run are the server's (a command makes each call made here)",
        (workflow.defn, "versioning_behavior"),
        (Worker, "deployment_config"),
        (WorkerDeploymentConfig, "use_worker_versioning"),
        (WorkerDeploymentConfig, "default_versioning_behavior"),
        WorkerDeploymentVersion,
        "temporal worker deployment set-ramping-version --percentage",
        "temporal worker deployment set-current-version",
        "temporal worker deployment describe",
        "temporal worker deployment describe-version",
        "temporal workflow update-options --versioning-override-behavior",
    )
    yield native(
        "upgrading at continue-as-new is part of the SDK",
        (workflow.continue_as_new, "initial_versioning_behavior"),
        workflow.ContinueAsNewVersioningBehavior.AUTO_UPGRADE,
        workflow.Info.is_target_worker_deployment_version_changed,
    )


# VR-04 Schema evolution ------------------------------------------------------------------------------
# Payloads outlive the types that wrote them. Give every new field a default; for anything else, the code
# that reads has to be able to read what was written before.

Fields = dict[str, Any]  # of a type: a name and its type, or its type and default; of a value: a name and its value


class Size(enum.StrEnum):
    SMALL = "S"
    MEDIUM = "M"


class MoreSizes(enum.StrEnum):
    SMALL = "S"
    MEDIUM = "M"
    LARGE = "L"


@dataclass(frozen=True)
class Change:
    """A type before and after, what each side writes, and what the other must make of it: None is refused."""

    name: str
    old: Fields
    new: Fields
    old_writes: Fields
    new_writes: Fields
    new_reads: Fields | None
    old_reads: Fields | None
    coerced: Fields | None = None  # what pydantic makes of new_writes where a dataclass refuses


DEFAULT, REQUIRED = "field added with a default", "field added, required"
CHANGES = (
    Change(
        DEFAULT,
        old={"city": str},
        new={"city": str, "express": (bool, False)},
        old_writes={"city": "Bonn"},
        new_writes={"city": "Bonn", "express": True},
        new_reads={"city": "Bonn", "express": False},
        old_reads={"city": "Bonn"},
    ),
    Change(
        REQUIRED,
        old={"city": str},
        new={"city": str, "express": bool},
        old_writes={"city": "Bonn"},
        new_writes={"city": "Bonn", "express": True},
        new_reads=None,
        old_reads={"city": "Bonn"},
    ),
    Change(
        "field removed",
        old={"city": str, "weight": int},
        new={"city": str},
        old_writes={"city": "Bonn", "weight": 7},
        new_writes={"city": "Bonn"},
        new_reads={"city": "Bonn"},
        old_reads=None,
    ),
    Change(
        "field renamed",
        old={"weight": int},
        new={"grams": int},
        old_writes={"weight": 7},
        new_writes={"grams": 7},
        new_reads=None,
        old_reads=None,
    ),
    Change(
        "int becomes str",
        old={"weight": int},
        new={"weight": str},
        old_writes={"weight": 7},
        new_writes={"weight": "7"},
        new_reads=None,
        old_reads=None,
        coerced={"weight": 7},
    ),
    Change(
        "int becomes int | str",
        old={"weight": int},
        new={"weight": int | str},
        old_writes={"weight": 7},
        new_writes={"weight": "heavy"},
        new_reads={"weight": 7},
        old_reads=None,
    ),
    Change(
        "enum gets a member",
        old={"size": Size},
        new={"size": MoreSizes},
        old_writes={"size": Size.MEDIUM},
        new_writes={"size": MoreSizes.LARGE},
        new_reads={"size": MoreSizes.MEDIUM},
        old_reads=None,
    ),
)


def as_dataclass(name: str, fields: Fields) -> type:
    parts = [(key, *kind) if isinstance(kind, tuple) else (key, kind) for key, kind in fields.items()]
    return dataclasses.make_dataclass(name, parts)


def as_pydantic(name: str, fields: Fields) -> type:
    parts = {key: kind if isinstance(kind, tuple) else (kind, ...) for key, kind in fields.items()}
    return pydantic.create_model(name, **parts)  # type: ignore[no-any-return, call-overload]


LIBRARIES = ("dataclass", "pydantic")


@workflow.defn(dynamic=True)
class Courier:
    """Hands each of its arguments, as it is, to the activity that is to read it."""

    @workflow.run
    async def run(self, args: Sequence[RawValue]) -> dict[str, str]:
        readers, *parcels = args
        names = workflow.payload_converter().from_payload(readers.payload, list[str])
        return dict(zip(names, await asyncio.gather(*map(self.deliver, names, parcels)), strict=True))

    async def deliver(self, name: str, parcel: RawValue) -> str:
        try:
            # What cannot be decoded is refused once and for all; a lost task is no refusal, and is tried again.
            await workflow.execute_activity(
                name,
                parcel,
                start_to_close_timeout=PATIENT,
                retry_policy=RetryPolicy(maximum_attempts=3, non_retryable_error_types=["RuntimeError"]),
            )
        except ActivityError as error:
            return f"refused: {error.cause}" if isinstance(error.cause, ApplicationError) else str(error.cause)
        return "read"


def reader(name: str, kind: type, ledger: str) -> Callable[..., Any]:
    """An activity with `kind` as the type of its argument. It notes what it was given."""

    @activity.defn(name=name)
    async def read(parcel: kind) -> None:  # type: ignore[valid-type]
        note(ledger, f"{name}: {vars(parcel)}")

    return read


async def try_all(
    lab: Lab, library: str, client: Client, make: Callable[[str, Fields], type]
) -> tuple[dict[str, str], dict[str, str]]:
    """Send both sides of every change to the other side. Returns (what came out, what was expected)."""
    ledger, queue = lab.file(library), f"{lab.id}-{library}"
    parcels, readers, expected = {}, [], {}
    for change in CHANGES:
        old, new = make("Old", change.old), make("New", change.new)
        coerced = change.coerced if library == "pydantic" else None
        for name, written, kind, reads in (
            (f"{change.name}, new reads old", old(**change.old_writes), new, change.new_reads),
            (f"{change.name}, old reads new", new(**change.new_writes), old, change.old_reads or coerced),
        ):
            parcels[name] = written
            readers.append(reader(name, kind, ledger))
            expected[name] = "refused" if reads is None else str(reads)
    async with lab.worker([Courier], readers, task_queue=queue, client=client):
        outcome: dict[str, str] = await client.execute_workflow(
            "Courier", args=[list(parcels), *parcels.values()], id=queue, task_queue=queue
        )
    found = dict(line.split(": ", 1) for line in notes(ledger))
    return {name: found.get(name, said.split(":")[0]) for name, said in outcome.items()}, expected


def with_converter(client: Client, converter: DataConverter) -> Client:
    """The same connection with another data converter."""
    config = client.config()
    config["data_converter"] = converter
    return Client(**config)


def told(change: Change, found: Mapping[str, str]) -> str:
    """What became of a change, in words; the libraries are told apart where they differ."""
    ways = []
    for way in ("new reads old", "old reads new"):
        said = ["refused" if found[f"{one} {change.name}, {way}"] == "refused" else "yes" for one in LIBRARIES]
        ways.append(f"{way} {said[0] if said[0] == said[1] else ' / '.join(said)}")
    return f"{change.name}: {', '.join(ways)}"


async def every_change(lab: Lab) -> list[Evidence]:
    both = await together(
        try_all(lab, "dataclass", lab.client, as_dataclass),
        try_all(lab, "pydantic", with_converter(lab.client, pydantic_data_converter), as_pydantic),
    )
    found, expected = (
        {
            f"{library} {name}": read
            for library, some in zip(LIBRARIES, side, strict=True)
            for name, read in some.items()
        }
        for side in zip(*both, strict=True)
    )
    easy = {name: read for name, read in found.items() if DEFAULT in name}
    surprises = [
        f"{name}: {found.get(name)} instead of {expected[name]}"
        for name in expected
        if found.get(name) != expected[name]
    ]
    return [
        works(
            "a field added with a default is read in both directions, by dataclass and pydantic",
            len(easy) == 4 and all(read == expected[name] for name, read in easy.items()),
            "; ".join(f"{name.replace(DEFAULT + ', ', '')}: {read}" for name, read in easy.items()),
        ),
        holds(
            f"{len(CHANGES)} kinds of change in both directions with both libraries are read or refused as predicted",
            not surprises and len(found) == len(expected) == len(CHANGES) * 4,
            f"{len(found)} tries; unlike predicted: {surprises or 'none'}. "
            + "; ".join(told(change, found) for change in CHANGES),
        ),
    ]


@dataclass
class Address:
    city: str
    ledger: str


@dataclass
class AddressWithDefault:
    city: str
    ledger: str
    express: bool = False


@dataclass
class AddressWithRequired:
    city: str
    ledger: str
    street: str


@dataclass
class AddressRenamed:
    renamed: ClassVar[dict[str, str]] = {"city": "town"}  # what the fields were called in older payloads

    town: str
    ledger: str


@workflow.defn(name="Shipment")
class Shipment(Approvable):
    @workflow.run
    async def run(self, to: Address) -> str:
        await workflow.wait_condition(lambda: self.approved)
        return await send(f"{to.city}", to.ledger)


@workflow.defn(name="Shipment")
class ShipmentWithDefault(Approvable):
    @workflow.run
    async def run(self, to: AddressWithDefault) -> str:
        await workflow.wait_condition(lambda: self.approved)
        return await send(f"{to.city}{' express' if to.express else ''}", to.ledger)


@workflow.defn(name="Shipment")
class ShipmentWithRequired(Approvable):
    @workflow.run
    async def run(self, to: AddressWithRequired) -> str:
        await workflow.wait_condition(lambda: self.approved)
        return await send(f"{to.street}, {to.city}", to.ledger)


@workflow.defn(name="Shipment")
class ShipmentRenamed(Approvable):
    @workflow.run
    async def run(self, to: AddressRenamed) -> str:
        await workflow.wait_condition(lambda: self.approved)
        return await send(to.town, to.ledger)


async def send(where: str, ledger: str) -> str:
    return await workflow.execute_activity(act, Action(f"sent to {where}", ledger), start_to_close_timeout=PATIENT)


async def begin_shipment(lab: Lab, name: str, code: type, address: Callable[[str], Any]) -> Begun:
    """Begin a shipment with one version of its type, and approve it when that version's worker is gone."""
    ledger, queue = lab.file(name), f"{lab.id}-{name}"
    async with lab.worker([code], [act], task_queue=queue):
        handle: WorkflowHandle[Any, Any] = await lab.client.start_workflow(
            "Shipment", address(ledger), id=queue, task_queue=queue
        )
        await until(lambda: waits(handle, []), "the shipment waits")
    await handle.signal(Approvable.approve)
    return Begun(handle, ledger, queue)


async def complaint(handle: WorkflowHandle[Any, Any]) -> str:
    """The first failed workflow task's whole chain of causes, or "" when none failed."""
    for event in (await handle.fetch_history()).events:
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED:
            failure, said = event.workflow_task_failed_event_attributes.failure, []
            while failure.message:
                said.append(failure.message)
                failure = failure.cause
            return ": ".join(said)
    return ""


async def default_added_live(lab: Lab) -> Evidence:
    """Open runs: one from before the field was added, and one from after it that meets the old code again."""
    old, new = await together(
        begin_shipment(lab, "upgraded", Shipment, lambda ledger: Address("Bonn", ledger)),
        begin_shipment(lab, "downgraded", ShipmentWithDefault, lambda ledger: AddressWithDefault("Bonn", ledger, True)),
    )
    async with (
        lab.worker([ShipmentWithDefault], [act], task_queue=old.queue),
        lab.worker([Shipment], [act], task_queue=new.queue),
    ):
        await finish([old, new])
    failed = await failed_tasks(old.handle) + await failed_tasks(new.handle)
    return works(
        "open runs go on when a field with a default is added, and when that is rolled back",
        notes(old.ledger) == notes(new.ledger) == ["sent to Bonn"] and not failed,
        f"begun without the field, finished with it: {', '.join(notes(old.ledger))}; begun with express=True, finished "
        f"without the field: {', '.join(notes(new.ledger))} (what the old code does not know is dropped); failed "
        f"workflow tasks: {len(failed)}",
    )


async def break_live(lab: Lab) -> list[Evidence]:
    """A release adds a field without a default. It starts well; the open run is stuck until it is rolled back."""
    shipment = await begin_shipment(lab, "broken", Shipment, lambda ledger: Address("Bonn", ledger))
    replayed = await replay(ShipmentWithRequired, await shipment.handle.fetch_history())
    begun = time.monotonic()
    async with lab.worker([ShipmentWithRequired], [act], task_queue=shipment.queue) as worker:
        await until(lambda: is_over(shipment.handle), "it finished or failed")
        noticed = time.monotonic() - begun
        serving = worker.is_running
        status, message = await status_of(shipment.handle), await complaint(shipment.handle)
        sent = notes(shipment.ledger)
    back = time.monotonic()
    async with lab.worker([Shipment], [act], task_queue=shipment.queue):
        result = await shipment.handle.result()
    seconds = time.monotonic() - back
    return [
        control(
            "the same field without a default: the open run is stuck",
            status == WorkflowExecutionStatus.RUNNING and "street" in message and sent == [],
            f"status {name_of(status)}; nothing sent; the workflow task failed: {message[:160]}",
        ),
        holds(
            "a live break is noticed in the run's history, and after a rollback the run finishes",
            bool(message) and result == "sent to Bonn" and notes(shipment.ledger) == ["sent to Bonn"],
            f"first failed workflow task {noticed:.1f} s after the release started; result {result!r} {seconds:.1f} s "
            "after the old type was back (the next try comes when the last one's workflow task times out, after 10 s)",
        ),
        limit(
            "a breaking change surfaces as a stuck workflow, not when it is deployed",
            serving and status == WorkflowExecutionStatus.RUNNING,
            f"the worker with the changed type started and kept serving without complaint, the run stayed "
            f"{name_of(status)}; replaying its history beforehand finds it: {bool(replayed)}",
        ),
    ]


class RenamedFields(JSONTypeConverter):
    """Reads older payloads into a type that lists what its fields were once called."""

    def to_typed_value(self, hint: type, value: Any) -> Any:
        renamed: dict[str, str] = getattr(hint, "renamed", {})
        if not isinstance(value, dict) or not renamed.keys() & value.keys():
            return JSONTypeConverter.Unhandled
        fields: Fields = {renamed.get(str(name), str(name)): one for name, one in value.items()}
        return hint(**fields)


class MigratingPayloadConverter(CompositePayloadConverter):
    """The default converters, with the JSON one taught to read what was written before."""

    def __init__(self) -> None:
        json_converter = JSONPlainPayloadConverter(custom_type_converters=[RenamedFields()])
        defaults = DefaultPayloadConverter.default_encoding_payload_converters
        super().__init__(*(json_converter if one.encoding == json_converter.encoding else one for one in defaults))


MIGRATING = DataConverter(payload_converter_class=MigratingPayloadConverter)


async def migrate(lab: Lab) -> Evidence:
    """A renamed field: refused without the converter, read with it, and new payloads are read too."""
    old = await begin_shipment(lab, "migrated", Shipment, lambda ledger: Address("Bonn", ledger))
    async with lab.worker([ShipmentRenamed], [act], task_queue=old.queue):
        await until(lambda: is_over(old.handle), "it finished or failed")
    message, sent = await complaint(old.handle), notes(old.ledger)
    new = await begin_shipment(lab, "renamed", ShipmentRenamed, lambda ledger: AddressRenamed("Ulm", ledger))
    client = with_converter(lab.client, MIGRATING)
    async with (
        lab.worker([ShipmentRenamed], [act], task_queue=old.queue, client=client),
        lab.worker([ShipmentRenamed], [act], task_queue=new.queue, client=client),
    ):
        await finish([old, new])
    return holds(
        "a payload converter that knows the old name lets the stuck run finish on the new type, and reads new payloads",
        "town" in message
        and sent == []
        and notes(old.ledger) == ["sent to Bonn"]
        and notes(new.ledger) == ["sent to Ulm"],
        f"without it: {message[:160]}; with it: {', '.join(notes(old.ledger))}; a run begun with the new type: "
        f"{', '.join(notes(new.ledger))}",
    )


@VR.item("VR-04", "Schema evolution", seconds=150)
async def schema_evolution(lab: Lab) -> AsyncIterator[Evidence]:
    """Every kind of change is written by one side and read by the other; then open runs meet changed types."""
    parts = (every_change(lab), break_live(lab), together(default_added_live(lab), migrate(lab)))
    async for evidence in side_by_side(*parts):
        yield evidence
    yield native(
        "defaults and converters are part of the SDK, but reading what was renamed or retyped is the user's to write",
        (DataConverter, "payload_converter_class"),
        CompositePayloadConverter,
        DefaultPayloadConverter,
        (JSONPlainPayloadConverter, "custom_type_converters"),
        JSONTypeConverter,
        PydanticPayloadConverter,
        (workflow.defn, "dynamic"),
        adds=["RenamedFields, which reads old payloads"],
    )


if __name__ == "__main__":
    run(VR)
