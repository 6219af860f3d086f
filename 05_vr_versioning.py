"""VR: versioning - how code, workers and data change while workflows run.

A workflow that runs for hours outlives the code that began it. Whoever continues it replays its history
with today's code, so a change that a web service would simply roll out can break every open run here.
The four items ask how the code says which path a run belongs to, how a break is found before it is
deployed, how workers are exchanged under running workflows, and how the stored data follows.
"""

from common import (
    Category,
    Evidence,
    Fact,
    NotRun,
    Spread,
    Target,
    at_least,
    at_most,
    between,
    cited,
    connect,
    contains,
    control,
    equal,
    figure,
    holds,
    limit,
    native,
    piece,
    side_by_side,
    slowness,
    works,
)
from harness.faults import Outside
from lab import (
    PATIENT,
    Child,
    Ending,
    Handle,
    Lab,
    Server,
    count_events,
    end,
    ended,
    failed_tasks,
    finds,
    happened,
    is_closed,
    is_closed_or_stuck,
    make_worker,
    note,
    notes,
    open_gate,
    outline,
    refusal,
    requires,
    run,
    sandbox,
    soon,
    status_of,
    together,
    until,
    waits,
    withhold,
)

import asyncio
import collections
import contextlib
import dataclasses
import enum
import inspect
import itertools
import json
import math
import re
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar

from temporalio import activity, workflow
from temporalio.api.deployment.v1 import RoutingConfig, WorkerDeploymentVersionInfo
from temporalio.api.deployment.v1 import WorkerDeploymentVersion as DeploymentVersion
from temporalio.api.enums.v1 import EventType, RoutingConfigUpdateState, TaskQueueType, VersionDrainageStatus
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import (
    DescribeTaskQueueRequest,
    DescribeWorkerDeploymentRequest,
    DescribeWorkerDeploymentVersionRequest,
    GetSystemInfoRequest,
    SetWorkerDeploymentCurrentVersionRequest,
    SetWorkerDeploymentRampingVersionRequest,
)
from temporalio.client import (
    Client,
    WorkflowExecutionAsyncIterator,
    WorkflowHandle,
    WorkflowHistory,
)
from temporalio.common import RawValue, RetryPolicy, SearchAttributeKey, VersioningBehavior, WorkerDeploymentVersion
from temporalio.converter import (
    CompositePayloadConverter,
    DataConverter,
    DefaultPayloadConverter,
    JSONPlainPayloadConverter,
    JSONTypeConverter,
    value_to_type,
)
from temporalio.exceptions import ActivityError, ApplicationError
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Replayer, Worker, WorkerDeploymentConfig

# Without this the sandbox would import them again for every run.
with workflow.unsafe.imports_passed_through():
    import pydantic
    from temporalio.contrib.pydantic import PydanticPayloadConverter, pydantic_data_converter

T = TypeVar("T")
K = TypeVar("K")

VR = Category(
    "VR",
    "Versioning",
    "How do code, workers and data change while workflows run?",
    at_once=2,  # each has a dozen workers
)

# What the items share --------------------------------------------------------------------------------


# VR-01 Workflow versioning ---------------------------------------------------------------------------
# A run outlives the code that began it. Either the code asks which path a run belongs to (patching), or the
# server sends each run to the build that it belongs to (Worker Deployment Versioning).


@dataclass
class Purchase:
    number: str


class Provider(Protocol):
    """Whoever screens, charges and delivers. A step that is asked for twice under one number counts once."""

    def work(self, step: str, number: str) -> None: ...


class Crew:
    def __init__(self, provider: Provider) -> None:
        self.provider = provider

    @activity.defn
    def screen(self, purchase: Purchase) -> str:
        return self._work("screen", purchase)

    @activity.defn
    def pay(self, purchase: Purchase) -> str:
        return self._work("pay", purchase)

    @activity.defn
    def ship(self, purchase: Purchase) -> str:
        return self._work("ship", purchase)

    def _work(self, step: str, purchase: Purchase) -> str:
        self.provider.work(step, purchase.number)
        return step

    @property
    def activities(self) -> list[Callable[..., Any]]:
        return [self.screen, self.pay, self.ship]


async def do(step: Callable[[Crew, Purchase], str], purchase: Purchase) -> str:
    return await workflow.execute_activity_method(step, purchase, start_to_close_timeout=timedelta(seconds=30))


class Approvable:
    """What all versions of the order have in common: paid for, it waits for an approval before it is shipped."""

    def __init__(self) -> None:
        self.approved = False

    @workflow.signal
    def approve(self) -> None:
        self.approved = True

    async def pay_and_ship(self, purchase: Purchase) -> list[str]:
        done = [await do(Crew.pay, purchase)]
        await workflow.wait_condition(lambda: self.approved)
        return [*done, await do(Crew.ship, purchase)]


@workflow.defn(name="Order")
class OrderOld(Approvable):
    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        return await self.pay_and_ship(purchase)


@workflow.defn(name="Order")
class OrderPatched(Approvable):
    """Screens before it pays. A run that has paid already goes on as it was begun."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        done = [await do(Crew.screen, purchase)] if workflow.patched("screen-first") else []
        return done + await self.pay_and_ship(purchase)


@workflow.defn(name="Order")
class OrderDeprecated(Approvable):
    """For the time when no open run is on the old path any more, but some carry the patch's marker."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        workflow.deprecate_patch("screen-first")
        return [await do(Crew.screen, purchase), *await self.pay_and_ship(purchase)]


@workflow.defn(name="Order")
class OrderNew(Approvable):
    """The end of the change, and what it looks like when somebody forgets the patch."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        return [await do(Crew.screen, purchase), *await self.pay_and_ship(purchase)]


async def ids_of(client: Client, query: str) -> list[str]:
    return sorted([one.id async for one in client.list_workflows(query)])


async def on_old_path(client: Client, patch: str, open_runs: str) -> list[str]:
    """The ids of the open runs (those of a query) that do not carry a patch's marker: while there are any, it stays.

    Asking for runs without any marker would not do: those that carry another patch's are missing there. No worker of
    the old code may be left, and visibility may lag by a moment; replay before you release (VR-02).
    """
    every = await ids_of(client, open_runs)
    return sorted(set(every) - set(await ids_of(client, f'{open_runs} AND TemporalChangeVersion = "{patch}"')))


@workflow.defn(name="PinnedOrder", versioning_behavior=VersioningBehavior.PINNED)
class PinnedOrderOne(Approvable):
    """Stays on the build that it began on."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        return await self.pay_and_ship(purchase)


@workflow.defn(name="PinnedOrder", versioning_behavior=VersioningBehavior.PINNED)
class PinnedOrderTwo(Approvable):
    """Needs no patch, though no run of build 1.0 could be replayed with it."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        return [await do(Crew.screen, purchase), *await self.pay_and_ship(purchase)]


@workflow.defn(name="MovingOrder", versioning_behavior=VersioningBehavior.AUTO_UPGRADE)
class MovingOrderOne(Approvable):
    """Moves to the current build with its next workflow task."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        return await self.pay_and_ship(purchase)


@workflow.defn(name="MovingOrder", versioning_behavior=VersioningBehavior.AUTO_UPGRADE)
class MovingOrderTwo(Approvable):
    """Must be patched: it gets runs that build 1.0 began."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        done = [await do(Crew.screen, purchase)] if workflow.patched("screen-first") else []
        return done + await self.pay_and_ship(purchase)


def versioned(deployment: str, build: str) -> WorkerDeploymentConfig:
    """What a worker needs to take part. Make the build id of the commit: two codes under one id are not noticed."""
    return WorkerDeploymentConfig(
        version=WorkerDeploymentVersion(deployment_name=deployment, build_id=build), use_worker_versioning=True
    )


async def set_current(client: Client, deployment: str, build: str) -> None:
    """Make a build current once its worker has registered: `temporal worker deployment set-current-version`.

    Raises RPCError, and TimeoutError when no worker of the build registers within a minute.
    """
    request = SetWorkerDeploymentCurrentVersionRequest(
        namespace=client.namespace, deployment_name=deployment, build_id=build
    )
    await once_registered(lambda: client.workflow_service.set_worker_deployment_current_version(request))


async def once_registered(change: Callable[[], Awaitable[object]]) -> None:
    """Change a deployment's routing; again, for a minute at most, while the server does not know its worker yet."""
    async with asyncio.timeout(60):
        while True:
            try:
                await change()
                return
            except RPCError as error:
                if error.status not in (RPCStatusCode.NOT_FOUND, RPCStatusCode.FAILED_PRECONDITION):
                    raise
            await asyncio.sleep(0.2)


class Desk:
    """A provider for the example. It keeps in memory what it did."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def work(self, step: str, number: str) -> None:
        self.done.append(f"{step} {number}")

    async def has(self, what: str) -> None:
        """Wait until it was done. Raises TimeoutError after a minute."""
        async with asyncio.timeout(60):
            while what not in self.done:
                await asyncio.sleep(0.1)


async def example_vr_01(client: Client) -> None:
    desk, name = Desk(), f"orders-{uuid.uuid4()}"

    def worker(code: type, build: str = "") -> Worker:
        return Worker(
            client,
            task_queue=name,
            workflows=[code],
            activities=Crew(desk).activities,
            activity_executor=ThreadPoolExecutor(10),
            deployment_config=versioned(name, build) if build else None,
        )

    async def begin(kind: str, number: str) -> WorkflowHandle[Any, Any]:
        handle: WorkflowHandle[Any, Any] = await client.start_workflow(
            kind, Purchase(number), id=f"{name}-{number}", task_queue=name
        )
        await desk.has(f"pay {number}")
        return handle

    async with worker(OrderOld):
        old = await begin("Order", "1")
    async with worker(OrderPatched):
        new = await begin("Order", "2")
        for order in (old, new):
            await order.signal(Approvable.approve)
            print(f"Patched code finished {order.id}: {await order.result()}")
        open_runs = f'WorkflowType = "Order" AND ExecutionStatus = "Running" AND WorkflowId STARTS_WITH "{name}"'
        print(f"The old path is still needed by {await on_old_path(client, 'screen-first', open_runs)}")

    async with worker(PinnedOrderOne, "1.0"), worker(PinnedOrderTwo, "2.0"):
        await set_current(client, name, "1.0")
        old = await begin("PinnedOrder", "3")
        await set_current(client, name, "2.0")
        await old.signal(Approvable.approve)
        print(f"Build 2.0 is current, and {old.id} stays on 1.0: {await old.result()}")


# VR-01 put to the test -------------------------------------------------------------------------------

STAGES: dict[str, type] = {
    "old": OrderOld,
    "patched": OrderPatched,
    "deprecated": OrderDeprecated,
    "new": OrderNew,
}
SCREENED = ["screen", "pay", "ship"]
STEPS = {stage: ["pay", "ship"] if stage == "old" else SCREENED for stage in STAGES}
# The stage of the code that a run is begun with, and the one that it is finished with.
Pair = tuple[str, str]


@dataclass(frozen=True)
class Journal:
    """A provider that writes down, outside Temporal, who did what, and on which build."""

    path: str
    build: str

    def work(self, step: str, number: str) -> None:
        note(self.path, f"{number} {step} on {self.build}")


def crew(lab: Lab, build: str) -> list[Callable[..., Any]]:
    return Crew(Journal(lab.file("journal"), build)).activities


def ran(lab: Lab, *orders: Handle) -> list[str]:
    """What the journal says of orders, such as "pay on 1.0", oldest first."""
    ids = {order.id for order in orders}
    lines = (line.split(" ", 1) for line in notes(lab.file("journal")))
    return [step for number, step in lines if number.partition("/")[0] in ids]


async def builds_of(handle: Handle) -> list[str]:
    """Which builds completed the workflow tasks of a run, as the server recorded it, each named when its turn begins.

    A worker that takes part in no deployment is named here by its identity.
    """
    history = await handle.fetch_history()
    done = [
        event.workflow_task_completed_event_attributes
        for event in history.events
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED
    ]
    return [name for name, _ in itertools.groupby(one.deployment_version.build_id or one.identity for one in done)]


async def begin(lab: Lab, worker: Worker, queue: str, *names: str) -> list[Handle]:
    """Begin orders on a worker, and stop it when all of them wait for their approval."""
    async with worker:
        ids = [f"{queue}-{name}" for name in names]
        handles = [await lab.start("Order", Purchase(id), id=id, task_queue=queue) for id in ids]
        for handle in handles:
            await until_waiting(handle)
    return handles


async def until_waiting(handle: Handle) -> float:
    """Wait until a run waits for something. Returns the seconds it took."""
    return await until(partial(waits, handle), f"{handle.id} waits")


async def until_over(handle: Handle) -> None:
    await until(partial(is_closed_or_stuck, handle), f"{handle.id} is finished or stuck")


def staff(lab: Lab, stage: str, queue: str) -> Worker:
    """A worker with one stage of the code, whose tasks are recorded under the stage's name."""
    return lab.worker([STAGES[stage]], crew(lab, stage), task_queue=queue, identity=stage)


@dataclass(frozen=True)
class Passage:
    """How a run went that was begun with one code and met another: its result, or what its workflow task failed of."""

    status: str
    steps: list[str] | None
    trouble: str
    ran: list[str]
    builds: list[str]

    def is_clean(self, begun: str, code: str) -> bool:
        """Finished on the path that it was begun on, each step once, and on the right stages."""
        first, last = STEPS[begun][:-1], STEPS[begun][-1]
        return self == Passage(
            "COMPLETED",
            STEPS[begun],
            "",
            [*(f"{step} on {begun}" for step in first), f"{last} on {code}"],
            list(dict.fromkeys([begun, code])),
        )


async def passage(lab: Lab, handle: Handle) -> Passage:
    """How a run has gone that is closed or stuck. A stuck one is ended, or the next worker would try it, too."""
    status, trouble = await status_of(handle), await failed_tasks(handle)
    seen = status, None if status == "RUNNING" else (await ended(handle)).result, (trouble or [""])[0]
    found = Passage(*seen, ran(lab, handle), await builds_of(handle))
    await end(handle, "stuck")
    return found


async def passages(lab: Lab, orders: Mapping[K, Handle]) -> dict[K, Passage]:
    """Wait until each order is finished or stuck, and see how it has gone."""
    for order in orders.values():
        await until_over(order)
    return {name: await passage(lab, order) for name, order in orders.items()}


async def begin_all(lab: Lab, queue: str, pairs: Sequence[Pair]) -> dict[Pair, Handle]:
    """Begin an order for each pair with its first stage; only one stage of the code runs at a time."""
    orders: dict[Pair, Handle] = {}
    for stage in STAGES:
        mine = [pair for pair in pairs if pair[0] == stage]
        if mine:
            begun = await begin(lab, staff(lab, stage, queue), queue, *("-".join(pair) for pair in mine))
            orders.update(zip(mine, begun, strict=True))
    return orders


async def finish_all(lab: Lab, queue: str, orders: Mapping[Pair, Handle]) -> dict[Pair, Passage]:
    """Approve each order when only its second stage runs, and wait until it is finished or stuck."""
    seen: dict[Pair, Passage] = {}
    for stage in STAGES:
        mine = {pair: order for pair, order in orders.items() if pair[1] == stage}
        for order in mine.values():
            await order.signal(Approvable.approve)
        if mine:
            async with staff(lab, stage, queue):
                seen |= await passages(lab, mine)
    return seen


async def patching(lab: Lab) -> list[Evidence]:
    """Each release meets runs of the release before; beside them the change without a patch."""
    queue = f"{lab.id}-patching"
    stages = [("old", "patched"), ("patched", "deprecated"), ("deprecated", "new")]
    orders = await begin_all(lab, queue, [*stages, ("patched", "patched"), ("old", "new")])
    seen = await finish_all(lab, queue, orders)
    before, after, unpatched = seen["old", "patched"], seen["patched", "patched"], seen["old", "new"]
    return [
        works(
            "patched(): a run begun on the old code finishes on its old path, a new run takes the new one",
            begun_before_the_change=equal(before.ran, ["pay on old", "ship on patched"]),
            begun_after_it=equal(after.ran, ["screen on patched", "pay on patched", "ship on patched"]),
            results=equal([before.steps, after.steps], [["pay", "ship"], SCREENED]),
            workflow_tasks_of_the_first_completed_by=equal(before.builds, ["old", "patched"]),
            failed_workflow_tasks=equal([before.trouble, after.trouble], ["", ""]),
        ),
        holds(
            "all stages (patched, deprecate_patch, removed): each finishes the runs of the stage before",
            old_to_patched=equal(before.ran, ["pay on old", "ship on patched"]),
            patched_to_deprecated=equal(
                seen["patched", "deprecated"].ran, ["screen on patched", "pay on patched", "ship on deprecated"]
            ),
            deprecated_to_new=equal(
                seen["deprecated", "new"].ran, ["screen on deprecated", "pay on deprecated", "ship on new"]
            ),
            results=equal([seen[pair].steps for pair in stages], [["pay", "ship"], SCREENED, SCREENED]),
            builds=equal([seen[pair].builds for pair in stages], [list(pair) for pair in stages]),
            failed_workflow_tasks=equal([seen[pair].trouble for pair in stages], [""] * 3),
        ),
        control(
            "the same change without a patch: NondeterminismError, and the open run gets no further",
            trouble=contains(unpatched.trouble, "TMPRL1100", "'pay' does not match", "'screen'"),
            status=equal(unpatched.status, "RUNNING"),
            steps=equal(unpatched.ran, ["pay on old"]),
        ),
    ]


@workflow.defn(name="Order")
class OldWithGift(OrderOld):
    """The old code, in which an earlier change has left a patch of its own."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        workflow.patched("gift-wrap")
        return await super().run(purchase)


@workflow.defn(name="Order")
class PatchedWithGift(OrderPatched):
    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        workflow.patched("gift-wrap")
        return await super().run(purchase)


@workflow.defn(name="Order")
class DeprecatedWithGift(OrderDeprecated):
    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        workflow.patched("gift-wrap")
        return await super().run(purchase)


CHANGE_VERSION = SearchAttributeKey.for_keyword_list("TemporalChangeVersion")
MARKERS = {"early": [], "gifted": ["gift-wrap"], "late": ["gift-wrap", "screen-first"]}


async def visible(lab: Lab) -> list[Evidence]:
    """Queries say which open runs still need a stage of the code; replaying them says whether that is true."""
    queue = f"{lab.id}-visible"
    mine = f'WorkflowType = "Order" AND ExecutionStatus = "Running" AND WorkflowId STARTS_WITH "{queue}"'

    def worker(code: type) -> Worker:
        return lab.worker([code], crew(lab, code.__name__), task_queue=queue)

    def short(ids: Iterable[str]) -> list[str]:
        return sorted(one.removeprefix(f"{queue}-") for one in ids)

    async def follows(*left: str) -> bool:
        found = {
            one.id: one.typed_search_attributes.get(CHANGE_VERSION) async for one in lab.client.list_workflows(mine)
        }
        return {short([id])[0]: sorted(found[id] or []) for id in found} == {name: MARKERS[name] for name in left}

    async def look(*left: str) -> tuple[dict[str, list[str]], float]:
        """What the queries list and what replay finds, and after how many seconds visibility had followed."""
        seconds = await until(partial(follows, *left), f"visibility lists {left}")
        listed = {
            "old": await on_old_path(lab.client, "screen-first", mine),
            "without any": await ids_of(lab.client, f"{mine} AND TemporalChangeVersion IS NULL"),
            "with it": await ids_of(lab.client, f'{mine} AND TemporalChangeVersion = "screen-first"'),
            "broken": list(await misfits(replayer_of(DeprecatedWithGift), lab.client, mine)),  # VR-02's lesson
        }
        return {what: short(ids) for what, ids in listed.items()}, seconds

    orders = {}
    for name, code in (("early", OrderOld), ("gifted", OldWithGift), ("late", PatchedWithGift)):
        [orders[name]] = await begin(lab, worker(code), queue, name)
    seen, names = [await look(*orders)], list(orders)
    async with worker(PatchedWithGift):
        while names:
            order = orders[names.pop(0)]
            await order.signal(Approvable.approve)
            await ended(order)
            seen.append(await look(*names))
    found = [one for one, _ in seen]
    return [
        holds(
            "visibility tells when a patch may go: the old path is every open run without its marker, whatever other "
            "patch it carries; then those that carry it",
            on_the_old_path=equal(found[0]["old"], ["early", "gifted"]),
            broken_by_deprecate_patch=equal(found[0]["broken"], ["early", "gifted"]),
            after_the_end_of_the_first=equal([found[1]["old"], found[1]["broken"]], [["gifted"], ["gifted"]]),
            after_the_end_of_the_second=equal([found[2]["old"], found[2]["broken"]], [[], []]),
            with_the_marker=equal([one["with it"] for one in found], [["late"], ["late"], ["late"], []]),
            visibility_had_followed_after=Spread.of((seconds for _, seconds in seen), "s"),
        ),
        control(
            "asking for runs without any marker: the list is empty while a run with an older patch is on the old path",
            listed=equal(found[1]["without any"], []),
            then_broken_by_deprecate_patch=equal(found[1]["broken"], ["gifted"]),
        ),
    ]


ORDERS: dict[str, Sequence[type]] = {
    "1.0": [PinnedOrderOne, MovingOrderOne],
    "2.0": [PinnedOrderTwo, MovingOrderTwo],
}


async def routed(client: Client, deployment: str) -> None:
    """Wait until the task queue, of the same name here, follows the routing of a deployment."""
    since = time.monotonic()

    async def follows() -> bool:
        request = DescribeWorkerDeploymentRequest(namespace=client.namespace, deployment_name=deployment)
        try:
            found = (await client.workflow_service.describe_worker_deployment(request)).worker_deployment_info
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return False  # a server under load has been seen not to find it, for a moment
        if found.routing_config_update_state == RoutingConfigUpdateState.ROUTING_CONFIG_UPDATE_STATE_COMPLETED:
            return True
        # Seen once in 72 switches: the server never reports it completed, though the queue has long followed.
        return time.monotonic() > since + 3 and await queue_follows(client, deployment, found.routing_config)

    await until(follows, f"the task queue follows the routing of {deployment}")


async def queue_follows(client: Client, task_queue: str, wanted: RoutingConfig) -> bool:
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


async def has_version(client: Client, deployment: str, build: str) -> bool:
    try:
        return bool((await version_info(client, deployment, build)).create_time.seconds)
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        return False


class Shop:
    """A task queue, the deployment of the same name, and the orders given to it, by name."""

    def __init__(self, lab: Lab, name: str, server: Server | None = None) -> None:
        self.lab, self.server, self.client = lab, server, server.client if server else lab.client
        self.queue = f"{lab.id}-{name}"
        self.orders: dict[str, Handle] = {}

    def worker(self, build: str, code: Sequence[type], *, takes_part: bool = True, **options: Any) -> Worker:
        """A worker that takes part in the deployment, with this build's id, or one that only polls the queue."""
        if takes_part:
            options.setdefault("deployment_config", versioned(self.queue, build))
        # What is held up for as long as a switch takes, on a busy machine too, is not to be given up.
        longer = {"pay": {"start_to_close_timeout": timedelta(minutes=10)}}
        options |= {"server": self.server, "task_queue": self.queue, "shortened": longer}
        return self.lab.worker(code, crew(self.lab, build), **options)

    async def order(self, kind: str, name: str, **options: Any) -> Handle:
        id = f"{self.queue}-{name}"
        options |= {"id": id, "task_queue": self.queue, "client": self.client}
        self.orders[name] = await self.lab.start(kind, Purchase(id), **options)
        return self.orders[name]

    async def switch(self, build: str) -> float:
        """Make a build current. Returns the seconds until tasks are routed to it."""
        begun = time.monotonic()
        await set_current(self.client, self.queue, build)
        await routed(self.client, self.queue)
        return time.monotonic() - begun

    def ran(self, *names: str) -> list[str]:
        return ran(self.lab, *(self.orders[name] for name in names))


STAYS = "pinned runs stay on their build though the next one is incompatible; new runs go to the current build"
MOVES = "auto-upgrade runs move to the current build, patched, and go on as they were begun"
ENDS_THERE = "an activity that is running during the switch ends on its build, once, and its run goes on"
WAITS = "with workers polling but no current version set, a run waits, and reports no error, until one is set"
ORPHAN = (
    "a pinned run whose build has no worker waits for it: a newer build that polls gets no task of it, and a query "
    "by version and the version's backlog tell of it"
)
TWO_CODES = "one build id with two different codes: neither server nor worker objects, and a pinned run breaks on it"


PINNED, MOVING = "PinnedOrder", "MovingOrder"
PAYING = ("pinned-paying", "moving-paying")  # inside their activity when builds change


@piece(works(STAYS), holds(MOVES), holds(ENDS_THERE), holds(ORPHAN), limit(WAITS), limit(TWO_CODES))
async def deployments(lab: Lab) -> list[Evidence]:
    """Build 2.0 becomes current while orders of build 1.0 are open, two of them inside an activity."""
    lab.needs("worker deployments")
    shop, gate = Shop(lab, "shop"), lab.gate("paying")
    faults = [withhold("pay", gate, silent=True).of(f"{shop.queue}-{name}") for name in PAYING]
    async with shop.worker("2.0", ORDERS["2.0"]):
        async with shop.worker("1.0", ORDERS["1.0"], faults=faults):
            waited = await no_current_version(shop)
            for name in ("pinned", "moving", "rebuilt", "orphan"):
                order = await shop.order(MOVING if name == "moving" else PINNED, name)
                await until_waiting(order)
            for name, kind in zip(PAYING, (PINNED, MOVING), strict=True):
                await shop.order(kind, name)
                await until(partial(shop.ran, name), f"{name} is inside its activity")
            seconds = await shop.switch("2.0")
            for name, kind in (("pinned-new", PINNED), ("moving-new", MOVING)):
                await shop.order(kind, name)
            open_gate(gate)
            seen = await routed_rightly(shop, seconds)
        return [*seen, waited, *await orphaned(shop), await rebuilt(shop)]


async def no_current_version(shop: Shop) -> Evidence:
    """Versioned workers poll and no version is current yet: the run waits, and nothing says so."""
    for build in ORDERS:
        await until(partial(has_version, shop.client, shop.queue, build), f"{build} has registered")
    waiting, queue = await shop.order(PINNED, "early"), f"{shop.queue}-beside"
    [beside] = await begin(shop.lab, staff(shop.lab, "old", queue), queue, "later")
    before, status, failed = await count_events(waiting), await status_of(waiting), await failed_tasks(waiting)
    await beside.terminate(reason="not needed any more")
    current = await shop.switch("1.0")
    seconds = await until_waiting(waiting)
    return limit(
        WAITS,
        history=equal(list(before), ["WORKFLOW_EXECUTION_STARTED", "WORKFLOW_TASK_SCHEDULED"]),
        status=equal(status, "RUNNING"),
        failed_workflow_tasks=equal(failed, []),
        meanwhile_steps_of_a_later_run_on_a_worker_without_versions=equal(ran(shop.lab, beside), ["pay on old"]),
        current_version_set_and_routed=figure(current, "s"),
        then_at_its_first_wait=figure(seconds, "s"),
    )


FRESH, STAYED = ["screen on 2.0", "pay on 2.0", "ship on 2.0"], ["pay on 1.0", "ship on 1.0"]
MOVED = ["pay on 1.0", "ship on 2.0"]


async def routed_rightly(shop: Shop, seconds: float) -> list[Evidence]:
    """Approve the orders, and see on which builds they end."""
    orders = {name: order for name, order in shop.orders.items() if name not in ("orphan", "rebuilt")}
    for order in orders.values():
        await order.signal(Approvable.approve)
    seen = await passages(shop.lab, orders)
    paid = collections.Counter(call.workflow for call in shop.lab.calls(activity="pay"))
    return [
        works(
            STAYS,
            pinned=equal(seen["pinned"].ran, STAYED),
            its_workflow_tasks_on=equal(seen["pinned"].builds, ["1.0"]),
            pinned_and_begun_first=equal(seen["early"].ran, STAYED),
            new_and_pinned=equal(seen["pinned-new"].ran, FRESH),
            new_and_moving=equal(seen["moving-new"].ran, FRESH),
            results=equal([seen["pinned"].steps, seen["pinned-new"].steps], [["pay", "ship"], SCREENED]),
            failed_workflow_tasks=equal([one.trouble for one in seen.values() if one.trouble], []),
            routed_after=figure(seconds, "s"),
        ),
        holds(
            MOVES,
            steps=equal(seen["moving"].ran, MOVED),
            workflow_tasks_on=equal(seen["moving"].builds, ["1.0", "2.0"]),
            result=equal(seen["moving"].steps, ["pay", "ship"]),
            failed_workflow_tasks=equal(seen["moving"].trouble, ""),
        ),
        holds(
            ENDS_THERE,
            pinned=equal(seen["pinned-paying"].ran, STAYED),
            moving=equal(seen["moving-paying"].ran, MOVED),
            calls_to_pay=equal([paid[orders[name].id] for name in PAYING], [1, 1]),
            results=equal([seen[name].steps for name in PAYING], [["pay", "ship"]] * 2),
        ),
    ]


@piece(holds(ORPHAN))
async def orphaned(shop: Shop) -> Evidence:
    """A run is pinned to 1.0, whose workers are gone, while those of 2.0 poll the same queue."""
    orphan = shop.orders["orphan"]
    await orphan.signal(Approvable.approve)
    await ended(await shop.order(PINNED, "next", start_signal="approve"))
    meanwhile = [await status_of(orphan), outline(await orphan.fetch_history(), without="").split("\n")[-1]]
    meanwhile += shop.ran("orphan")
    query = f'TemporalWorkerDeploymentVersion = "{shop.queue}:1.0" AND ExecutionStatus = "Running"'
    await until(partial(ids_of, shop.client, query), "visibility tells of it")
    named = [one.removeprefix(f"{shop.queue}-") for one in await ids_of(shop.client, query)]
    reported = await reported_problems(shop.client, query)
    backlog: list[int] = []

    async def told_or_over() -> bool:
        backlog[:] = [await backlog_of(shop, "1.0")]
        return backlog[0] > 0 or await is_closed_or_stuck(orphan)

    await until(told_or_over, "the old build's backlog is told")
    async with shop.worker("1.0", ORDERS["1.0"]):
        [after] = (await passages(shop.lab, {"orphan": orphan})).values()
    return holds(
        ORPHAN,
        a_later_run_on_the_new_build=equal(shop.ran("next"), FRESH),
        the_pinned_one_meanwhile=equal(meanwhile, ["RUNNING", "WorkflowTaskScheduled", "pay on 1.0"]),
        open_runs_on_the_old_build_by_query=equal(named, ["orphan", "rebuilt"]),
        workflow_tasks_in_the_old_builds_backlog_by_describe_version=at_least(backlog[0], 1),
        runs_found_by_TemporalReportedProblems=reported,
        result_with_a_worker_of_the_old_build_again=equal(after.steps, ["pay", "ship"]),
        its_steps=equal(after.ran, STAYED),
    )


async def reported_problems(client: Client, query: str) -> int | str:
    """How many runs of a query the server reports as stuck; in words where it does not know of such reports yet."""
    try:
        return len(await ids_of(client, f"{query} AND TemporalReportedProblems IS NOT NULL"))
    except RPCError as error:
        if error.status != RPCStatusCode.INVALID_ARGUMENT:
            raise
        return "not known to this server"


async def backlog_of(shop: Shop, build: str) -> int:
    """About how many workflow tasks wait for a build, as the operator is told."""
    told = await shop.lab.command(
        "worker", "deployment", "describe-version", "--deployment-name", shop.queue, "--build-id", build,
        "--report-task-queue-stats", "--output", "json",
    )  # fmt: skip
    queues = json.loads(told.out)["taskQueuesInfos"]
    return sum(int(queue["stats"]["approximateBacklogCount"]) for queue in queues if queue["type"] == "workflow")


async def rebuilt(shop: Shop) -> Evidence:
    """Somebody rebuilt 1.0 from other code: a worker has the code of 2.0 and says that it is 1.0."""
    order = shop.orders["rebuilt"]
    async with shop.worker("1.0", ORDERS["2.0"]) as worker:
        await order.signal(Approvable.approve)
        [found] = (await passages(shop.lab, {"rebuilt": order})).values()
        serving = worker.is_running
    request = DescribeWorkerDeploymentRequest(namespace=shop.client.namespace, deployment_name=shop.queue)
    info = (await shop.client.workflow_service.describe_worker_deployment(request)).worker_deployment_info
    return limit(
        TWO_CODES,
        versions=equal(sorted(one.deployment_version.build_id for one in info.version_summaries), list(ORDERS)),
        worker_with_the_other_code_serves=equal(serving, True),
        the_run=equal([found.status, *found.ran], ["RUNNING", "pay on 1.0"]),
        its_workflow_task=contains(found.trouble, "TMPRL1100"),
    )


@VR.item("VR-01", "Workflow versioning", seconds=150, fail_closed=True)
async def workflow_versioning(lab: Lab) -> AsyncIterator[Evidence]:
    """Orders are begun with one version of the code and finished with another; a journal says which ran what."""
    parts = (patching, visible, deployments)
    async for evidence in side_by_side(*(part(lab) for part in parts)):
        yield evidence
    yield native(
        "patching is part of the SDK, its runs are found by a query, and replay tells when a patch may go",
        workflow.patched,
        workflow.deprecate_patch,
        workflow.NondeterminismError,
        Client.list_workflows,
        WorkflowExecutionAsyncIterator.map_histories,
        Replayer.workflow_replay_iterator,
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
        "temporal worker deployment describe-version --report-task-queue-stats",
    )


# VR-02 Detection of breaking changes -----------------------------------------------------------------
# The histories of open runs are the test data of the next release: replay them all against it first.


async def misfits(replayer: Replayer, client: Client, open_runs: str) -> dict[str, str]:
    """What a CI job does before each release: replay every run that a query lists against the new code.

    `replayer`: with that code, and with the workers' own interceptors, converter and runner. In a namespace of one's
    own the query is 'ExecutionStatus = "Running"'. Returns what is wrong by workflow id; when there is nothing, the
    release fits.
    """
    histories = client.list_workflows(open_runs).map_histories()
    async with replayer.workflow_replay_iterator(histories) as results:
        return {one.history.workflow_id: str(one.replay_failure) async for one in results if one.replay_failure}


async def misfit(replayer: Replayer, history: WorkflowHistory) -> str:
    """The same for one history. Returns what is wrong with it, or "" when it fits."""
    failure = (await replayer.replay_workflow(history, raise_on_replay_failure=False)).replay_failure
    return str(failure or "")


async def keep(handle: WorkflowHandle[Any, Any], path: Path) -> None:
    """Keep a run's history in a file, as `temporal workflow show --output json` does, to test releases without it."""
    history = await handle.fetch_history()
    await asyncio.to_thread(path.write_text, history.to_json(), "utf-8")


def kept(path: Path) -> WorkflowHistory:
    return WorkflowHistory.from_json(path.stem, path.read_text(encoding="utf-8"))


async def example_vr_02(client: Client) -> None:
    desk, name = Desk(), f"orders-{uuid.uuid4()}"
    async with Worker(
        client,
        task_queue=name,
        workflows=[OrderOld],
        activities=Crew(desk).activities,
        activity_executor=ThreadPoolExecutor(10),
    ):
        order = await client.start_workflow("Order", Purchase("1"), id=name, task_queue=name)
        await desk.has("pay 1")
    history = await order.fetch_history()
    for release in (OrderNew, OrderPatched):
        breaks = await misfit(Replayer(workflows=[release]), history)
        print(f"{release.__name__} {'breaks' if breaks else 'fits'} the open order")
    open_runs = f'ExecutionStatus = "Running" AND WorkflowId STARTS_WITH "{name}"'
    broken = await misfits(Replayer(workflows=[OrderNew]), client, open_runs)
    print(f"Open runs that {OrderNew.__name__} would break: {list(broken)}")
    await order.terminate(reason="the example is over")


# VR-02 put to the test -------------------------------------------------------------------------------

# Which code may meet which history. A patched run is not for code without the patch, and a run on the old
# path only for code that still has it.
FITS = {
    "old": ["old", "patched"],
    "patched": ["patched", "deprecated"],
    "deprecated": ["patched", "deprecated", "new"],
    "new": ["deprecated", "new"],
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

    async def take(self, step: Callable[[Crew, Purchase], str], purchase: Purchase) -> None:
        self.progress.append(await do(step, purchase))

    @workflow.query
    def status(self) -> list[str]:
        return self.progress


@activity.defn
async def act(action: str) -> str:
    """One activity for everything: what is to be done is an argument, which replay does not compare."""
    return action


async def acted(action: str) -> str:
    return await workflow.execute_activity(act, action, start_to_close_timeout=PATIENT)


@workflow.defn(name="Delivery")
class Delivery(Approvable):
    steps: tuple[str, ...] = ("pay",)

    @workflow.run
    async def run(self) -> list[str]:
        done = [await acted(step) for step in self.steps]
        await workflow.wait_condition(lambda: self.approved)
        return done


@workflow.defn(name="Delivery")
class DeliveryWithStepInFront(Delivery):
    """The same breaking change as in OrderNew. The recorded payment now passes for the screening."""

    steps = ("screen", "pay")

    @workflow.run
    async def run(self) -> list[str]:
        return await super().run()


@workflow.defn(name="Trial")
class Trial:
    seconds: float = 0.1
    options: ClassVar[Mapping[str, Any]] = {"start_to_close_timeout": PATIENT}

    @workflow.run
    async def run(self) -> None:
        await workflow.sleep(self.seconds)
        await workflow.execute_activity(act, "try", **self.options)


@workflow.defn(name="Trial")
class OtherTimer(Trial):
    seconds = 3600

    @workflow.run
    async def run(self) -> None:
        await super().run()


@workflow.defn(name="Trial")
class OtherTimeout(Trial):
    options: ClassVar[Mapping[str, Any]] = {"start_to_close_timeout": timedelta(hours=1)}

    @workflow.run
    async def run(self) -> None:
        await super().run()


@workflow.defn(name="Trial")
class OtherRetries(Trial):
    options: ClassVar[Mapping[str, Any]] = {
        "start_to_close_timeout": PATIENT,
        "retry_policy": RetryPolicy(maximum_attempts=1),
    }

    @workflow.run
    async def run(self) -> None:
        await super().run()


UNSEEN = {"timer length": OtherTimer, "timeout": OtherTimeout, "retry policy": OtherRetries}


def message_of(misfit: str) -> str:
    """What a replay found, without the places in the code."""
    found = re.search(r'message: "((?:[^"\\]|\\.)*)"', misfit)
    return found[1] if found else misfit


def replayer_of(*release: type) -> Replayer:
    """With the runner that the workers here have."""
    return Replayer(workflows=release, workflow_runner=sandbox())


async def catch_before_deployment(lab: Lab) -> list[Evidence]:
    """The history of one open order, in a file, against four releases. None of them is deployed."""
    queue, path = f"{lab.id}-stored", Path(lab.file("stored.json"))
    [order] = await begin(lab, staff(lab, "old", queue), queue, "order")
    await keep(order, path)
    begun = time.monotonic()
    broken = await misfit(replayer_of(OrderNew), kept(path))
    seconds = time.monotonic() - begun
    same, harmless, patched = [
        await misfit(replayer_of(code), kept(path)) for code in (OrderOld, OrderRefactored, OrderPatched)
    ]
    events = len(kept(path).events)
    return [
        works(
            "a breaking change is caught by replaying a stored history, before anything is deployed",
            found=contains(message_of(broken), "TMPRL1100", "'pay' does not match", "'screen'"),
            events_in_the_run_afterwards=equal(len((await order.fetch_history()).events), events),
            its_journal=equal(ran(lab, order), ["pay on old"]),
            replayed_in=figure(seconds, "s"),
        ),
        control(
            "a harmless change passes, and so do the same code and the patched change",
            found_in_the_harmless_change=equal(harmless, ""),
            in_the_same_code=equal(same, ""),
            in_the_patched_change=equal(patched, ""),
        ),
    ]


async def matrix(lab: Lab) -> list[Evidence]:
    """Each stage of the code meets a history of each stage: predicted, replayed, and then deployed for real."""
    queue, pairs = f"{lab.id}-open", [(history, code) for history in STAGES for code in STAGES]
    orders = await begin_all(lab, queue, pairs)
    nightly = await replay_all_open(lab, queue, orders)
    replayed = {
        pair: await misfit(replayer_of(STAGES[pair[1]]), await order.fetch_history()) for pair, order in orders.items()
    }
    deployed = await finish_all(lab, queue, orders)

    facts: dict[str, Fact] = {}
    for history, fitting in FITS.items():
        by_replay = [code for code in STAGES if not replayed[history, code]]
        by_deploying = [code for code in STAGES if deployed[history, code].is_clean(history, code)]
        stuck = [code for code in STAGES if deployed[history, code].status == "RUNNING"]
        facts[f"{history}: fits by replay"] = equal(by_replay, fitting)
        facts[f"{history}: finished right when deployed"] = equal(by_deploying, fitting)
        facts[f"{history}: stuck"] = equal(stuck, [code for code in STAGES if code not in fitting])
    whys = [replayed[pair] for pair in pairs if replayed[pair]] + [
        one.trouble for one in deployed.values() if one.trouble
    ]
    return [
        holds(
            "each of 4 stages of the code against 4 histories: replay says what was predicted, and so does deploying",
            **facts,
            misfits_by_replay_and_stuck=equal(len(whys), 14),
            of_these_NondeterminismError=equal(sum("TMPRL1100" in why for why in whys), 14),
        ),
        nightly,
    ]


async def replay_all_open(lab: Lab, queue: str, orders: Mapping[Pair, Handle]) -> Evidence:
    """Every open run that visibility lists, whatever its type."""
    candidate = "deprecated"
    mine = f'ExecutionStatus = "Running" AND WorkflowId STARTS_WITH "{queue}"'
    await begin_delivery(lab, f"{queue}-other")
    await until(lambda: finds(lab.client, mine, len(orders) + 1), "visibility lists every open run")
    begun = time.monotonic()
    broken = await misfits(replayer_of(STAGES[candidate]), lab.client, mine)
    seconds = time.monotonic() - begun
    named = {id.removeprefix(f"{queue}-"): why for id, why in broken.items()}
    unregistered = message_of(named.get("other-delivery", ""))
    return holds(
        "replaying every open run, as a CI job would, names exactly those that the release would break",
        open_runs=equal((await lab.client.count_workflows(mine)).count, 17),
        named=equal(sorted(named), ["old-deprecated", "old-new", "old-old", "old-patched", "other-delivery"]),
        why_the_one_of_a_type_that_the_release_does_not_have=contains(unregistered, "not registered"),
        replayed_in=figure(seconds, "s"),
    )


async def begin_delivery(lab: Lab, queue: str) -> Handle:
    async with lab.worker([Delivery], [act], task_queue=queue):
        handle = await lab.start("Delivery", id=f"{queue}-delivery", task_queue=queue)
        await until_waiting(handle)
    return handle


async def change_behind_an_argument(lab: Lab) -> Evidence:
    """The change that OrderNew is caught for, in code that has one activity for everything."""
    queue = f"{lab.id}-argument"
    delivery = await begin_delivery(lab, queue)
    found = await misfit(replayer_of(DeliveryWithStepInFront), await delivery.fetch_history())
    await delivery.signal(Approvable.approve)
    async with lab.worker([DeliveryWithStepInFront], [act], task_queue=queue):
        await until_over(delivery)
    return limit(
        "a changed activity argument passes replay, and with it a step in front when both are one activity type",
        found_by_replay=equal(found, ""),
        calls_once_it_is_deployed=equal([call.argument for call in lab.calls(delivery.id)], ["pay", "pay"]),
        result=equal((await passage(lab, delivery)).steps, ["pay", "pay"]),
    )


async def unseen_options(lab: Lab) -> list[Evidence]:
    """One history, and code in which one number differs."""
    async with lab.worker([Trial], [act], task_queue=f"{lab.id}-trial"):
        handle = await lab.start("Trial", name="trial", task_queue=f"{lab.id}-trial")
        await ended(handle)
    history = await handle.fetch_history()
    return [
        limit(f"a changed {what} passes replay", found=equal(await misfit(replayer_of(code), history), ""))
        for what, code in UNSEEN.items()
    ]


@VR.item("VR-02", "Detection of breaking changes", seconds=150)
async def breaking_changes(lab: Lab) -> AsyncIterator[Evidence]:
    """Histories of open runs are replayed against the next release; then it is deployed, to see who was right."""
    parts = (catch_before_deployment, matrix, change_behind_an_argument, unseen_options)
    async for evidence in side_by_side(*(part(lab) for part in parts)):
        yield evidence
    yield native(
        "replaying stored and listed histories is part of the SDK",
        Replayer,
        Replayer.replay_workflow,
        Replayer.workflow_replay_iterator,
        WorkflowHandle.fetch_history,
        WorkflowHistory.to_json,
        WorkflowHistory.from_json,
        Client.list_workflows,
        WorkflowExecutionAsyncIterator.map_histories,
        workflow.patched,
        workflow.deprecate_patch,
    )


# VR-03 Migration strategy ----------------------------------------------------------------------------
# A release is a routing table that the server keeps: try the new build with a share of the new runs, make it
# current, wait until the old one has drained, and turn back at any time. A worker process that has to go is
# told so by SIGTERM, and given the time to finish what it runs.


async def set_ramp(client: Client, deployment: str, build: str, percent: float) -> None:
    """Send a share of the new runs to a build: `temporal worker deployment set-ramping-version`."""
    request = SetWorkerDeploymentRampingVersionRequest(
        namespace=client.namespace, deployment_name=deployment, build_id=build, percentage=percent
    )
    await once_registered(lambda: client.workflow_service.set_worker_deployment_ramping_version(request))


async def version_info(client: Client, deployment: str, build: str) -> WorkerDeploymentVersionInfo:
    """`temporal worker deployment describe-version`. Raises RPCError where there is no such version."""
    request = DescribeWorkerDeploymentVersionRequest(
        namespace=client.namespace,
        deployment_version=DeploymentVersion(deployment_name=deployment, build_id=build),
    )
    found = await client.workflow_service.describe_worker_deployment_version(request)
    return found.worker_deployment_version_info


async def drainage(client: Client, deployment: str, build: str) -> str:
    """Whether a build that is no longer current has open runs: DRAINING, then DRAINED, when its workers may go."""
    info = await version_info(client, deployment, build)
    return VersionDrainageStatus.Name(info.drainage_info.status).removeprefix("VERSION_DRAINAGE_STATUS_")


@dataclass
class Months:
    number: str  # of the subscription
    paid: int = 0
    due: int = 0  # asked for, and not yet paid


class Renewable:
    """A run that never ends by itself, so that it would stay on its build for ever."""

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

    def go_on(self, months: Months) -> NoReturn:
        """Continue on the build that is current now, to which a pinned run does not move otherwise."""
        upgrade = workflow.ContinueAsNewVersioningBehavior.AUTO_UPGRADE
        workflow.continue_as_new(months, initial_versioning_behavior=upgrade)

    async def next(self, months: Months) -> Purchase | None:
        """Wait for the next month, None when there is none. Where a new build waits, the month begins as a new run."""
        if workflow.info().is_target_worker_deployment_version_changed() and not self.ended:
            # What was signalled and not done yet goes along, or it would be lost.
            self.go_on(dataclasses.replace(months, due=self.due))
        await workflow.wait_condition(lambda: self.due > 0 or self.ended)
        if self.due == 0:
            return None
        self.due, months.paid = self.due - 1, months.paid + 1
        return Purchase(f"{months.number}/{months.paid}")


@workflow.defn(name="Subscription", versioning_behavior=VersioningBehavior.PINNED)
class SubscriptionOne(Renewable):
    @workflow.run
    async def run(self, months: Months) -> int:
        while month := await self.next(months):
            await do(Crew.pay, month)
        return months.paid


@workflow.defn(name="Subscription", versioning_behavior=VersioningBehavior.PINNED)
class SubscriptionTwo(Renewable):
    @workflow.run
    async def run(self, months: Months) -> int:
        while month := await self.next(months):
            await do(Crew.screen, month)
            await do(Crew.pay, month)
        return months.paid


# How long a worker that was told to end waits for its activities; without it they fail at once. As long as the
# longest of them takes, and shorter than whoever sends SIGTERM waits before SIGKILL. One that takes longer asks
# activity.is_worker_shutdown() and stops at a good place.
GRACE = timedelta(seconds=30)


async def serve(worker: Worker) -> None:
    """Run a worker until SIGTERM: it takes no new task then, and ends when its activities have, after GRACE at most."""
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    async with worker:
        await told.wait()


async def example_vr_03(client: Client) -> None:
    desk, name = Desk(), f"subscriptions-{uuid.uuid4()}"

    def worker(code: type, build: str) -> Worker:
        return Worker(
            client,
            task_queue=name,
            workflows=[code],
            activities=Crew(desk).activities,
            activity_executor=ThreadPoolExecutor(10),
            deployment_config=versioned(name, build),
            graceful_shutdown_timeout=GRACE,
        )

    old = asyncio.create_task(serve(worker(SubscriptionOne, "1.0")))
    async with worker(SubscriptionTwo, "2.0"):
        await set_current(client, name, "1.0")
        handle: WorkflowHandle[Any, Any] = await client.start_workflow(
            "Subscription", Months("1"), id=name, task_queue=name, start_signal="renew"
        )
        await desk.has("pay 1/1")
        await set_ramp(client, name, "2.0", 10)
        await set_current(client, name, "2.0")
        for month in (2, 3):
            await handle.signal("renew")
            await desk.has(f"pay 1/{month}")
        await handle.signal("end")
        print(f"Months paid: {await handle.result()}; done: {', '.join(desk.done)}")
        print(f"Build 1.0: {await drainage(client, name, '1.0')} (the server looks again after minutes)")
        signal.raise_signal(signal.SIGTERM)
        await old


# VR-03 put to the test -------------------------------------------------------------------------------

# Settings that no user has, to see in seconds what takes minutes: how soon the server looks whether a version has
# drained.
DRAIN_SOON = {
    "matching.wv.VersionDrainageStatusVisibilityGracePeriod": '"1s"',
    "matching.wv.VersionDrainageStatusRefreshInterval": '"1s"',
}
# So many runs that neither half the share nor twice as much can be taken for it (see ramp()).
SAMPLES, RAMP = 200, 50


@workflow.defn(name="PinnedOrder", versioning_behavior=VersioningBehavior.PINNED)
class PinnedOrderThree(Approvable):
    """A bad release: what it begins it cannot finish."""

    @workflow.run
    async def run(self, purchase: Purchase) -> list[str]:
        await do(Crew.screen, purchase)
        await do(Crew.pay, purchase)
        await workflow.wait_condition(lambda: self.approved)
        raise RuntimeError("a bug of build 3.0")  # not an ApplicationError: the workflow task fails, not the run


@workflow.defn(name="StayingSubscription", versioning_behavior=VersioningBehavior.PINNED)
class StayingSubscription(SubscriptionOne):
    """Continues as new, too, but does not ask for the current build."""

    def go_on(self, months: Months) -> NoReturn:
        workflow.continue_as_new(months)

    @workflow.run
    async def run(self, months: Months) -> int:
        return await super().run(months)


@workflow.defn(name="Sample", versioning_behavior=VersioningBehavior.PINNED, sandboxed=False)
class Sample:
    """So small that hundreds of them are cheap: it only says which build it runs on."""

    @workflow.run
    async def run(self) -> str:
        version = workflow.info().get_current_deployment_version()
        return version.build_id if version else ""


RELEASES: dict[str, Sequence[type]] = {
    "1.0": [PinnedOrderOne, SubscriptionOne, StayingSubscription, Sample],
    "2.0": [PinnedOrderTwo, SubscriptionTwo, Sample],
    "3.0": [PinnedOrderThree],
}


class Rollout(Shop):
    """A deployment that is taken through three releases."""

    def release(self, build: str) -> Worker:
        return self.worker(build, RELEASES[build])

    async def begin(self, count: int, *, approved: bool = False) -> list[Handle]:
        """Start orders; approved ones run to their end, the others wait when they have paid."""
        names = [str(number) for number in range(len(self.orders), len(self.orders) + count)]
        how: dict[str, Any] = {"start_signal": "approve"} if approved else {"task_timeout": soon()}
        begun = await together(*(self.order(PINNED, name, **how) for name in names))
        for one in begun:
            await (ended(one) if approved else until_waiting(one))
        return begun

    def builds(self, orders: Sequence[Handle]) -> dict[str, int]:
        return builds_that_ran(self.lab, orders)


def builds_that_ran(lab: Lab, orders: Sequence[Handle]) -> dict[str, int]:
    """How many orders each build worked on, as the journal tells; "1.0 and 2.0" is one that was moved."""
    every = ({step.split(" on ")[1] for step in ran(lab, order)} for order in orders)
    return dict(collections.Counter(" and ".join(sorted(builds)) for builds in every))


def ways(lab: Lab, orders: Sequence[Handle]) -> collections.Counter[str]:
    """How many orders took which steps, on which builds."""
    return collections.Counter(", ".join(ran(lab, order)) for order in orders)


async def rollout(lab: Lab, drained_in: asyncio.Future[float]) -> list[Evidence]:
    """Tells by `drained_in` how many seconds after the switch the old version was reported drained."""
    try:
        async with lab.private_server(settings=DRAIN_SOON) as server:
            return await three_releases(Rollout(lab, "rollout", server), drained_in)
    except NotRun as reason:
        drained_in.set_exception(NotRun(f"there is nothing to compare it with: {reason}"))
        raise


async def three_releases(way: Rollout, drained_in: asyncio.Future[float]) -> list[Evidence]:
    async with way.release("2.0"):
        async with way.release("1.0"):
            await way.switch("1.0")
            long = await way.begin(5)
            subscriptions = asyncio.ensure_future(subscribe(way, "Subscription", "StayingSubscription"))
            await asyncio.wait({subscriptions})
            seen = [await ramp(way), await take_over(way)]
            switched = time.monotonic()
            seen += [*await upgrade_at_continue_as_new(way, subscriptions), await drain(way, long)]
            drained_in.set_result(time.monotonic() - switched)
        seen.append(await roll_back_and_move(way))
    return [*seen, await nothing_lost(way)]


def chance(low: int, high: int, runs: int, share: float) -> float:
    """How likely it is that of so many runs, each sent there with this probability, `low` to `high` are."""
    return sum(math.comb(runs, n) * share**n * (1 - share) ** (runs - n) for n in range(low, high + 1))


async def ramp(way: Rollout) -> Evidence:
    """The bounds are such that the right share misses them once in ten thousand evaluations."""
    begun = time.monotonic()
    await set_ramp(way.client, way.queue, "2.0", RAMP)
    await routed(way.client, way.queue)
    seconds, share = time.monotonic() - begun, RAMP / 100
    samples = await together(*(sample(way, number) for number in range(SAMPLES)))
    ramped = await way.begin(20, approved=True)
    middle = round(SAMPLES * share)
    slack = next(n for n in range(SAMPLES) if chance(middle - n, middle + n, SAMPLES, share) > 1 - 1e-4)
    low, high = middle - slack, middle + slack
    return works(
        "a new version ramps: the share of the new runs that was asked for goes to it, each whole run to one version",
        asked_for_in_percent=RAMP,
        of=SAMPLES,
        went_to_the_new_version=between(samples.count("2.0"), low, high),
        to_the_old_one=equal(samples.count("1.0"), SAMPLES - samples.count("2.0")),
        half_the_share_would_pass_with_probability=at_most(chance(low, high, SAMPLES, share / 2), 1e-3),
        twice_the_share_with=at_most(chance(low, high, SAMPLES, min(1, share * 2)), 1e-3),
        orders_of_three_steps_by_builds_that_worked_on_them=contains(way.builds(ramped), "1.0", "2.0"),
        orders_on_two_builds=equal(way.builds(ramped).get("1.0 and 2.0", 0), 0),
        routed_after=figure(seconds, "s"),
    )


async def sample(way: Rollout, number: int) -> str:
    """The build that a new run was sent to."""
    where: dict[str, Any] = {"id": f"{way.queue}-sample-{number}", "task_queue": way.queue, "client": way.client}
    how = await ended(await way.lab.start(Sample.run, task_timeout=PATIENT, **where))
    return str(how.result)


async def take_over(way: Rollout) -> Evidence:
    seconds = await way.switch("2.0")
    after = await way.begin(10, approved=True)
    return works(
        "made current, it gets every new run",
        runs_started_after_the_switch=equal(way.builds(after), {"2.0": 10}),
        routed_after=figure(seconds, "s"),
    )


async def drain(way: Rollout, long: Sequence[Handle]) -> Evidence:
    """The old version is looked at while its last runs are open, and when they are done."""

    async def checked_with_open_runs() -> bool:
        info = (await version_info(way.client, way.queue, "1.0")).drainage_info
        return info.last_checked_time.ToDatetime() > info.last_changed_time.ToDatetime()

    await until(checked_with_open_runs, "the server looked at the open runs of 1.0")
    before, open_runs = await drainage(way.client, way.queue, "1.0"), [await status_of(one) for one in long]
    for order in long:
        await order.signal(Approvable.approve)
    for order in long:
        await ended(order)

    async def drained() -> bool:
        return await drainage(way.client, way.queue, "1.0") == "DRAINED"

    seconds = await until(drained, "1.0 is reported drained")
    return works(
        "the old version drains: DRAINING while its runs are open, which finish on it, then DRAINED",
        open_runs=equal(open_runs.count("RUNNING"), 5),
        checked_by_the_server_with_these_open=equal(before, "DRAINING"),
        they_finished_on=equal(way.builds(long), {"1.0": 5}),
        DRAINED_after_the_last_one=figure(seconds, "s"),
        interval_at_which_the_server_looks=figure(1, "s"),
    )


async def roll_back_and_move(way: Rollout) -> Evidence:
    """Build 3.0 is bad. New runs go back to 2.0; the five that 3.0 began are stuck on it, and then it is gone."""
    async with way.release("3.0"):
        await way.switch("3.0")
        victims = await way.begin(5)
        for victim in victims:
            await victim.signal(Approvable.approve)
            await until(partial(failed_tasks, victim), "the bug of 3.0 has shown")
        seconds = await way.switch("2.0")
        after = await way.begin(5, approved=True)
    stuck = collections.Counter([await status_of(one) for one in victims])
    untouched = way.builds(victims)
    begun = time.monotonic()
    moved = await together(*(move_by_hand(way, victim, "2.0") for victim in victims))
    how = collections.Counter([(await ended(victim, 30)).status for victim in victims])
    return holds(
        "rollback: new runs go to the old version again; runs pinned to a dead version are moved by hand and finish",
        new_runs=equal(way.builds(after), {"2.0": 5}),
        runs_pinned_to_it_when_its_worker_is_gone=equal(stuck, {"RUNNING": 5}),
        worked_on_by=equal(untouched, {"3.0": 5}),
        exit_statuses_of_update_options=equal(moved, [0] * 5),
        then_they_are=equal(how, {"COMPLETED": 5}),
        steps=equal(ways(way.lab, victims), {"screen on 3.0, pay on 3.0, ship on 2.0": 5}),
        routed_back_after=figure(seconds, "s"),
        all_finished_after_the_move=figure(time.monotonic() - begun, "s"),
        workflow_task_timeout=figure(soon().total_seconds(), "s"),
    )


async def move_by_hand(way: Rollout, order: Handle, build: str) -> int:
    """What an operator types. Returns the exit status."""
    done = await way.lab.cli(
        "workflow", "update-options",
        "--workflow-id", order.id,
        "--versioning-override-behavior", "pinned",
        "--versioning-override-deployment-name", way.queue,
        "--versioning-override-build-id", build,
        server=way.server,
    )  # fmt: skip
    return done.code


Subscriptions = list[Handle]
TELLS_SINCE = (1, 31)  # of the server: 1.30.1 did not when it was tried, 1.31.2 did


async def subscribe(way: Rollout, *kinds: str) -> Subscriptions:
    """Subscriptions on build 1.0 that have paid their first month. Raises NotRun where SDK or server is too old."""
    requires(
        "temporalio.workflow.Info.is_target_worker_deployment_version_changed",
        "temporalio.workflow.ContinueAsNewVersioningBehavior.AUTO_UPGRADE",
    )
    version = (await way.client.workflow_service.get_system_info(GetSystemInfoRequest())).server_version
    if tuple(map(int, version.split(".")[:2])) < TELLS_SINCE:
        raise NotRun(f"Temporal {version} does not tell a run of a new version of its code yet: it does since 1.31")
    handles = []
    for kind in kinds:
        id = f"{way.queue}-{kind}"
        where: dict[str, Any] = {"id": id, "task_queue": way.queue, "client": way.client}
        await way.lab.start(kind, Months(id), start_signal="renew", **where)
        handles.append(way.client.get_workflow_handle(id))  # of whichever run is the latest
        await until_waiting(handles[-1])
    return handles


UPGRADES = "a long run learns of the new version and upgrades at continue-as-new, with its state"


@piece(holds(UPGRADES))
async def upgrade_at_continue_as_new(way: Rollout, subscribed: Awaitable[Subscriptions]) -> Evidence:
    """Build 2.0 is current by now. Two more months: in the first, each run learns of it and continues as new."""
    subscriptions = await subscribed
    results, runs = [], []
    for one in subscriptions:
        first = (await one.describe()).run_id
        for month in (2, 3):
            await one.signal(Renewable.renew)
            await until(partial(has_paid, way, one, month), f"month {month} is paid")
        await one.signal(Renewable.end)
        results.append((await ended(one)).result)
        runs.append("another" if (await one.describe()).run_id != first else "the first")
    upgraded, stayed = subscriptions
    return holds(
        UPGRADES,
        with_AUTO_UPGRADE=equal(ran(way.lab, upgraded), ["pay on 1.0", "pay on 1.0", "screen on 2.0", "pay on 2.0"]),
        without_it=equal(ran(way.lab, stayed), ["pay on 1.0"] * 3),
        months_counted_over_all_runs=equal(results, [3, 3]),
        last_run_of_each=equal(runs, ["another", "another"]),
    )


def has_paid(way: Rollout, subscription: Handle, month: int) -> bool:
    return sum(step.startswith("pay") for step in ran(way.lab, subscription)) == month


async def nothing_lost(way: Rollout) -> Evidence:
    """Every order ever started, against the journal: finished, and each step taken once."""
    steps = [[step.split(" on ")[0] for step in ran(way.lab, order)] for order in way.orders.values()]
    endings = [await ended(order) for order in way.orders.values()]
    return holds(
        "no run is lost or doubled in the whole rollout",
        orders=len(way.orders),
        over="three versions, a ramp, three switches and a rollback",
        completed=equal([one.status for one in endings].count("COMPLETED"), len(way.orders)),
        with_each_step_once_in_the_journal=equal(sum(one in (["pay", "ship"], SCREENED) for one in steps), len(steps)),
        with_another_result_than_the_journal=equal(
            [
                order.id
                for order, one, seen in zip(way.orders.values(), endings, steps, strict=True)
                if one.result != seen
            ],
            [],
        ),
    )


NOT_DRAINED = (
    "with the server's own settings, an empty version is still DRAINING after the time in which one whose server "
    "looks every second was DRAINED"
)


@piece(limit(NOT_DRAINED))
async def default_drainage(lab: Lab, drained_in: asyncio.Future[float]) -> Evidence:
    """On the evaluated server, as it is set, a version that never had a run stops being current."""
    lab.needs("worker deployments")
    shop = Shop(lab, "empty")
    async with shop.worker("1.0", ORDERS["1.0"]), shop.worker("2.0", ORDERS["2.0"]):
        for build in ORDERS:
            await shop.switch(build)
    switched = time.monotonic()
    await asyncio.sleep(await drained_in + switched - time.monotonic())
    info = (await version_info(lab.client, shop.queue, "1.0")).drainage_info
    looked = (info.last_checked_time.ToDatetime() - info.last_changed_time.ToDatetime()).total_seconds()
    return limit(
        NOT_DRAINED,
        status=equal(await drainage(lab.client, shop.queue, "1.0"), "DRAINING"),
        after_the_switch=figure(time.monotonic() - switched, "s"),
        last_looked_at_after=figure(looked, "s"),
    )


HOP = "two workers without versioning, old and new code on one queue: runs hop between them and break"
MOVE_OVER = "a worker without versioning beside a current version gets no run, and open runs it had begun move over"


@piece(control(HOP), holds(MOVE_OVER))
async def unversioned_beside(lab: Lab) -> list[Evidence]:
    """A worker that was forgotten in the move to versioning polls the same queue with old code."""
    lab.needs("worker deployments")
    shop = Shop(lab, "beside")
    # No cache, so that each workflow task may go to either worker, as it does with many runs.
    unversioned: dict[str, Any] = {"takes_part": False, "max_cached_workflows": 0}
    release = dataclasses.replace(versioned(shop.queue, "2.0"), default_versioning_behavior=VersioningBehavior.PINNED)
    mixed = Passage("", None, "", [], [])
    tries, hands = 0, [""]

    async with shop.worker("old", [OrderOld], identity="old code", **unversioned):
        adopted = [await shop.order("Order", f"adopted-{number}") for number in range(3)]
        for one in adopted:
            await until_waiting(one)
        async with shop.worker("2.0", [OrderPatched], deployment_config=release):
            await shop.switch("2.0")
            fresh = [await shop.order("Order", f"fresh-{number}") for number in range(5)]
            for one in [*adopted, *fresh]:
                await one.signal(Approvable.approve)
            how = collections.Counter([(await ended(one)).status for one in [*adopted, *fresh]])
            await shop.switch("")
        # A second worker for the same queue needs a client of its own.
        another = await connect(lab.target)
        async with shop.worker("new", [OrderNew], identity="new code", client=another, **unversioned):
            while not mixed.trouble and tries < 20:  # three of four runs go to both
                tries += 1
                one = await shop.order("Order", f"mixed-{tries}", start_signal="approve")
                await until_over(one)
                mixed, hands = await passage(lab, one), await hands_on(one)
    return [
        control(
            HOP,
            runs_until_one_broke=tries,
            its_workflow_task=contains(mixed.trouble, "TMPRL1100"),
            workers_that_had_a_task_of_it=contains(hands, "new code", "old code"),
        ),
        holds(
            MOVE_OVER,
            new_runs_worked_on_by=equal(builds_that_ran(lab, fresh), {"2.0": 5}),
            runs_begun_by_the_unversioned_worker=equal(ways(lab, adopted), {"pay on old, ship on 2.0": 3}),
            statuses=equal(how, {"COMPLETED": 8}),
        ),
    ]


async def hands_on(handle: Handle) -> list[str]:
    """The identities of the workers that had a workflow task of a run, completed or failed."""
    events = (await handle.fetch_history()).events
    done = {event.workflow_task_completed_event_attributes.identity for event in events}
    failed = {event.workflow_task_failed_event_attributes.identity for event in events}
    return sorted((done | failed) - {""})


UNCONFIGURED = "a workflow that declares a versioning behavior hangs on a worker without deployment_config"


@piece(limit(UNCONFIGURED))
async def annotated_but_unversioned(lab: Lab) -> Evidence:
    """The workflow says that it is pinned, but its worker was given no deployment_config."""
    lab.needs("worker deployments")
    shop = Shop(lab, "annotated")
    async with shop.worker("unversioned", [PinnedOrderOne], takes_part=False) as worker:
        order = await shop.order(PINNED, "order", task_timeout=soon())
        timed_out = partial(happened, order, "WORKFLOW_TASK_TIMED_OUT")
        seconds = await until(timed_out, "a workflow task timed out")
        status, failed, serving = await status_of(order), await failed_tasks(order), worker.is_running
    await order.terminate(reason="it hangs")
    return limit(
        UNCONFIGURED,
        worker_serves=equal(serving, True),
        status=equal(status, "RUNNING"),
        failed_workflow_tasks=equal(failed, []),
        steps=equal(ran(lab, order), []),
        first_workflow_task_timed_out_after=figure(seconds, "s"),
        workflow_task_timeout=figure(soon().total_seconds(), "s"),
    )


@dataclass(frozen=True)
class Lasting(Journal):
    """Its payment is under way when the worker is told to end, and done a moment later."""

    def work(self, step: str, number: str) -> None:
        super().work(step, number)
        if step == "pay":
            activity.wait_for_worker_shutdown_sync(timedelta(seconds=60))
            time.sleep(0.5 * slowness())


class Slow(Journal):
    """Each step takes a while longer than its effect."""

    def work(self, step: str, number: str) -> None:
        super().work(step, number)
        time.sleep(slowness())


AT_MOST_ONCE = {step: {"retry_policy": RetryPolicy(maximum_attempts=1)} for step in SCREENED}


async def deployable(target: Target, queue: str, options: Mapping[str, Any]) -> None:
    """The life of a worker process that ends as the lesson says."""
    await serve(make_worker(await connect(target), queue, [OrderOld], **options))


@contextlib.asynccontextmanager
async def deployed_worker(
    lab: Lab, queue: str, provider: Journal, grace: timedelta | None = GRACE
) -> AsyncIterator[Child]:
    """A worker process that lets SIGTERM end it. No activity is tried twice, so that what is lost shows."""
    options: dict[str, Any] = {"activities": Crew(provider).activities}
    options["interceptors"] = [Outside(lab.file("calls"), shortened=AT_MOST_ONCE)]
    if grace is not None:
        options["graceful_shutdown_timeout"] = grace
    async with lab.process(deployable, lab.target, queue, options) as child:
        yield child


async def end_while_paying(lab: Lab, name: str, grace: timedelta | None) -> tuple[int, Ending, list[str]]:
    """SIGTERM to the worker while an order is paid for. Returns its exit status, the run's end, and the journal."""
    queue = f"{lab.id}-{name}"
    async with deployed_worker(lab, queue, Lasting(lab.file("journal"), name), grace) as child:
        order = await lab.start("Order", Purchase(queue), id=queue, task_queue=queue, start_signal="approve")
        await until(partial(ran, lab, order), "the order is being paid for")
        child.send(signal.SIGTERM)
        status = await child.wait()
    async with deployed_worker(lab, queue, Journal(lab.file("journal"), "the next worker")):
        how = await ended(order)
    return status, how, ran(lab, order)


async def told_to_end(lab: Lab) -> list[Evidence]:
    """With time to finish, and with the SDK's default."""
    given, hasty = await together(end_while_paying(lab, "patient", GRACE), end_while_paying(lab, "default", None))
    default = inspect.signature(Worker).parameters["graceful_shutdown_timeout"].default
    told = "Worker is shutting down and this activity did not complete in time"
    return [
        holds(
            "a worker that is told to end by SIGTERM finishes the activity it runs, given graceful_shutdown_timeout",
            exit_status=equal(given[0], 0),
            steps=equal(given[2], ["pay on patient", "ship on the next worker"]),
            run=equal(str(given[1]), "COMPLETED"),
        ),
        control(
            "without it the running activity, which has had its effect, fails at once, and a run that tries once, too",
            exit_status=equal(hasty[0], 0),
            steps=equal(hasty[2], ["pay on default"]),
            run=equal(str(hasty[1]), f"FAILED: {told}"),
        ),
        limit(
            "by default a worker that is told to end gives its activities no time",
            default_of_graceful_shutdown_timeout=equal(default.total_seconds(), 0),
            activity=contains(hasty[1].why, told),
        ),
    ]


async def rolled(lab: Lab) -> Evidence:
    """The workers of a queue are told to end, one after the other while they work; a new one is there already."""
    queue = f"{lab.id}-rolled"

    def worker(name: str) -> contextlib.AbstractAsyncContextManager[Child]:
        return deployed_worker(lab, queue, Slow(lab.file("journal"), name))

    def running_on(child: Child) -> int:
        mine = [call for call in lab.calls() if call.pid == child.pid]
        return len(mine) - sum(call.pid == child.pid for call in lab.calls(what="ended"))

    orders: list[Handle] = []

    async def busy(child: Child) -> bool:
        """Keep a few orders under way, and see whether this worker runs an activity."""
        if len(orders) - sum(step.startswith("ship") for step in ran(lab, *orders)) < 6:
            id = f"{queue}-{len(orders)}"
            orders.append(await lab.start("Order", Purchase(id), id=id, task_queue=queue, start_signal="approve"))
        return running_on(child) > 0

    running, statuses = [], []
    async with worker("a") as first, worker("b") as second, worker("c"):
        for child in (first, second):
            await until(partial(busy, child), "it runs an activity")
            running.append(running_on(child))
            child.send(signal.SIGTERM)
            statuses.append(await child.wait())
        how = [await ended(order) for order in orders]
    steps = [", ".join(step.split(" on ")[0] for step in ran(lab, order)) for order in orders]
    return holds(
        "a rollout of workers by SIGTERM under load loses and doubles nothing, though no activity is tried twice",
        activities_running_when_the_first_was_told=at_least(running[0], 1),
        when_the_second_was=at_least(running[1], 1),
        exit_statuses=equal(statuses, [0, 0]),
        runs=equal(collections.Counter(str(one) for one in how), {"COMPLETED": len(orders)}),
        steps=equal(collections.Counter(steps), {"pay, ship": len(orders)}),
    )


@VR.item("VR-03", "Migration strategy", seconds=150)
async def migration(lab: Lab) -> AsyncIterator[Evidence]:
    """Three builds of one deployment; the journal says which build took which step of every order."""
    drained_in: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    parts = (unversioned_beside, annotated_but_unversioned, told_to_end, rolled)
    async for evidence in side_by_side(
        rollout(lab, drained_in), default_drainage(lab, drained_in), *(part(lab) for part in parts)
    ):
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
        "temporalio.workflow.continue_as_new(initial_versioning_behavior)",
        "temporalio.workflow.ContinueAsNewVersioningBehavior.AUTO_UPGRADE",
        "temporalio.workflow.Info.is_target_worker_deployment_version_changed",
    )
    yield native(
        "time to finish is an option of the worker",
        (Worker, "graceful_shutdown_timeout"),
    )


# VR-04 Schema evolution ------------------------------------------------------------------------------
# Payloads outlive the types that wrote them. Give every new field a default; for anything else, the code
# that reads has to be able to read what was written before.


class Size(enum.StrEnum):
    SMALL = "S"
    MEDIUM = "M"


@dataclass
class Parcel:
    size: Size
    weight: int


@dataclass
class Address:
    """As it was when open runs were begun with it."""

    city: str
    parcel: Parcel
    remark: str = ""


@dataclass
class WeighedParcel:
    """Today's parcel. `renamed` says what its fields were called in older payloads."""

    renamed: ClassVar[dict[str, str]] = {"weight": "grams"}

    size: Size
    grams: int


@dataclass
class TownAddress:
    """Today's address: a field renamed, one removed, one added with a default, and another type of parcel."""

    renamed: ClassVar[dict[str, str]] = {"city": "town"}

    town: str
    parcel: WeighedParcel
    express: bool = False


class RenamedFields(JSONTypeConverter):
    """Reads older payloads into a type that says what its fields were called; all the rest is left to the SDK.

    What the SDK does is needed: it makes enums and nested types of text and dicts, and drops what is no longer known.
    """

    def to_typed_value(self, hint: type, value: Any) -> Any:
        renamed: dict[str, str] = getattr(hint, "renamed", {})
        if not isinstance(value, dict) or not renamed.keys() & value.keys():
            return JSONTypeConverter.Unhandled
        fields = {renamed[name]: one for name, one in value.items() if name in renamed}
        fields |= {name: one for name, one in value.items() if name not in renamed}  # where both are there, the new one
        return value_to_type(hint, fields, [self])


class MigratingPayloadConverter(CompositePayloadConverter):
    """The default converters, with the JSON one taught to read what was written before."""

    type_converter: ClassVar[type[JSONTypeConverter]] = RenamedFields

    def __init__(self) -> None:
        json_converter = JSONPlainPayloadConverter(custom_type_converters=[self.type_converter()])
        defaults = DefaultPayloadConverter.default_encoding_payload_converters
        super().__init__(*(json_converter if one.encoding == json_converter.encoding else one for one in defaults))


MIGRATING = DataConverter(payload_converter_class=MigratingPayloadConverter)


def with_converter(client: Client, converter: DataConverter) -> Client:
    """The same connection with another data converter."""
    config = client.config()
    config["data_converter"] = converter
    return Client(**config)


@activity.defn
async def send(where: str) -> str:
    return f"sent to {where}"


class Sendable(Approvable):
    async def send(self, where: str) -> str:
        await workflow.wait_condition(lambda: self.approved)
        return await workflow.execute_activity(send, where, start_to_close_timeout=timedelta(seconds=30))


@workflow.defn(name="Shipment")
class Shipment(Sendable):
    @workflow.run
    async def run(self, to: Address) -> str:
        return await self.send(f"{to.city}, {to.parcel.size.name}, {to.parcel.weight} g")


@workflow.defn(name="Shipment")
class TownShipment(Sendable):
    @workflow.run
    async def run(self, to: TownAddress) -> str:
        return await self.send(
            f"{to.town}, {to.parcel.size.name}, {to.parcel.grams} g{', express' if to.express else ''}"
        )


async def example_vr_04(client: Client) -> None:
    name = f"shipment-{uuid.uuid4()}"
    written_long_ago = Address("Bonn", Parcel(Size.MEDIUM, 700), remark="ring twice")
    handle = await client.start_workflow(
        Shipment.run, written_long_ago, id=name, task_queue=name, start_signal="approve"
    )
    migrating = with_converter(client, MIGRATING)
    async with Worker(migrating, task_queue=name, workflows=[TownShipment], activities=[send]):
        print(f"Written with the old type, read with today's: {await handle.result()}")


# VR-04 put to the test -------------------------------------------------------------------------------

Fields = dict[str, Any]  # of a type: a name and its type, or its type and default; of a value: a name and its value


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


DEFAULT = "field added with a default"
CHANGES = (
    Change(
        DEFAULT, old={"city": str}, new={"city": str, "express": (bool, False)},
        old_writes={"city": "Bonn"}, new_reads={"city": "Bonn", "express": False},
        new_writes={"city": "Bonn", "express": True}, old_reads={"city": "Bonn"},
    ),
    Change(
        "field added, required", old={"city": str}, new={"city": str, "express": bool},
        old_writes={"city": "Bonn"}, new_reads=None,
        new_writes={"city": "Bonn", "express": True}, old_reads={"city": "Bonn"},
    ),
    Change(
        "field removed", old={"city": str, "weight": int}, new={"city": str},
        old_writes={"city": "Bonn", "weight": 7}, new_reads={"city": "Bonn"},
        new_writes={"city": "Bonn"}, old_reads=None,
    ),
    Change(
        "field renamed", old={"weight": int}, new={"grams": int},
        old_writes={"weight": 7}, new_reads=None, new_writes={"grams": 7}, old_reads=None,
    ),
    Change(
        "int becomes str", old={"weight": int}, new={"weight": str},
        old_writes={"weight": 7}, new_reads=None, new_writes={"weight": "7"}, old_reads=None, coerced={"weight": 7},
    ),
    Change(
        "int becomes int | str", old={"weight": int}, new={"weight": int | str},
        old_writes={"weight": 7}, new_reads={"weight": 7}, new_writes={"weight": "heavy"}, old_reads=None,
    ),
    Change(
        "enum gets a member", old={"size": Size}, new={"size": MoreSizes},
        old_writes={"size": Size.MEDIUM}, new_reads={"size": MoreSizes.MEDIUM},
        new_writes={"size": MoreSizes.LARGE}, old_reads=None,
    ),
)  # fmt: skip


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
        arguments: list[Any] = [list(parcels), *parcels.values()]
        how = await ended(await lab.start("Courier", *arguments, name=library, task_queue=queue, client=client))
    outcome: dict[str, str] = how.result or dict.fromkeys(parcels, str(how))
    found = dict(line.split(": ", 1) for line in notes(ledger))
    return {name: found.get(name, said.split(":")[0]) for name, said in outcome.items()}, expected


def surely(found: Mapping[str, str], expected: Mapping[str, str], name: str) -> Fact:
    """What each library made of a parcel, in one word where they agree, against what was predicted."""

    def told(some: Mapping[str, str]) -> str:
        ways = [some[f"{library} {name}"] for library in LIBRARIES]
        return (
            ways[0] if ways[0] == ways[1] else "; ".join(f"{x}: {way}" for x, way in zip(LIBRARIES, ways, strict=True))
        )

    return equal(told(found), told(expected))


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
    names = [f"{change.name}, {way}" for change in CHANGES for way in ("new reads old", "old reads new")]
    facts = {name: surely(found, expected, name) for name in names}
    return [
        works(
            "a field added with a default is read in both directions, by dataclass and pydantic",
            **{name.removeprefix(f"{DEFAULT}, "): fact for name, fact in facts.items() if name.startswith(DEFAULT)},
        ),
        holds(
            f"{len(CHANGES)} kinds of change in both directions with both libraries are read or refused as predicted",
            tries=len(found),
            **facts,
        ),
    ]


@dataclass
class AddressWithDefault(Address):
    express: bool = False


@dataclass(kw_only=True)
class AddressWithRequired(Address):
    street: str


@workflow.defn(name="Shipment")
class ShipmentWithDefault(Sendable):
    @workflow.run
    async def run(self, to: AddressWithDefault) -> str:
        return await self.send(f"{to.city}{', express' if to.express else ''}")


@workflow.defn(name="Shipment")
class ShipmentWithRequired(Sendable):
    @workflow.run
    async def run(self, to: AddressWithRequired) -> str:
        return await self.send(f"{to.street}, {to.city}")


PARCEL = Parcel(Size.MEDIUM, 700)
BONN = Address("Bonn", PARCEL, remark="ring twice")
TO_BONN = "Bonn, MEDIUM, 700 g"


async def begin_shipment(lab: Lab, name: str, code: type, to: Any, queue: str | None = None) -> Handle:
    """Begin a shipment with one version of its type, and approve it when that version's worker is gone."""
    queue = queue or f"{lab.id}-{name}"
    async with lab.worker([code], [send], task_queue=queue):
        handle = await lab.start("Shipment", to, name=name, task_queue=queue, task_timeout=soon())
        await until_waiting(handle)
    await handle.signal(Approvable.approve)
    return handle


def sent(lab: Lab, handle: Handle) -> list[str]:
    """Where the shipment was sent, by the calls of the activity."""
    return [call.argument for call in lab.calls(handle.id)]


async def complaint(handle: Handle) -> str:
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
        begin_shipment(lab, "upgraded", Shipment, BONN),
        begin_shipment(lab, "downgraded", ShipmentWithDefault, AddressWithDefault("Ulm", PARCEL, express=True)),
    )
    async with (
        lab.worker([ShipmentWithDefault], [send], task_queue=old.id),
        lab.worker([Shipment], [send], task_queue=new.id),
    ):
        await together(ended(old), ended(new))
    return works(
        "open runs go on when a field with a default is added, and when that is rolled back",
        begun_without_the_field_and_finished_with_it=equal(sent(lab, old), ["Bonn"]),
        begun_with_express_and_finished_without_the_field=equal(sent(lab, new), ["Ulm, MEDIUM, 700 g"]),
        failed_workflow_tasks=equal(await failed_tasks(old) + await failed_tasks(new), []),
    )


async def break_live(lab: Lab) -> list[Evidence]:
    """A release adds a field without a default. It starts well; the open run is stuck until it is rolled back."""
    shipment = await begin_shipment(lab, "broken", Shipment, BONN)
    replayed = await misfit(replayer_of(ShipmentWithRequired), await shipment.fetch_history())
    begun = time.monotonic()
    async with lab.worker([ShipmentWithRequired], [send], task_queue=shipment.id) as worker:
        await until_over(shipment)
        noticed, serving = time.monotonic() - begun, worker.is_running
        status, message, before = await status_of(shipment), await complaint(shipment), sent(lab, shipment)
    back = time.monotonic()
    async with lab.worker([Shipment], [send], task_queue=shipment.id):
        how = await ended(shipment)
    seconds = time.monotonic() - back
    return [
        control(
            "the same field without a default: the open run is stuck",
            status=equal(status, "RUNNING"),
            sent_to=equal(before, []),
            its_workflow_task=contains(message, "missing 1 required", "'street'"),
        ),
        holds(
            "a live break is noticed in the run's history, and after a rollback the run finishes",
            in_the_history=contains(message, "'street'"),
            result=equal(how.result, f"sent to {TO_BONN}"),
            sent_to=equal(sent(lab, shipment), [TO_BONN]),
            noticed_after=figure(noticed, "s"),
            finished_after_the_rollback=figure(seconds, "s"),
            workflow_task_timeout=figure(soon().total_seconds(), "s"),
        ),
        limit(
            "a breaking change surfaces as a stuck workflow, not when it is deployed",
            worker_serves=equal(serving, True),
            status=equal(status, "RUNNING"),
            replay_beforehand_names_the_field="'street'" in replayed,
        ),
    ]


class Hasty(JSONTypeConverter):
    """The control: renames, and makes the type of it without the SDK's conversion."""

    def to_typed_value(self, hint: type, value: Any) -> Any:
        renamed: dict[str, str] = getattr(hint, "renamed", {})
        if not isinstance(value, dict) or not renamed.keys() & value.keys():
            return JSONTypeConverter.Unhandled
        fields: Fields = {renamed.get(str(name), str(name)): one for name, one in value.items()}
        return hint(**fields)


class HastyPayloadConverter(MigratingPayloadConverter):
    type_converter = Hasty


async def migrate(lab: Lab) -> list[Evidence]:
    """A run begun with the old type meets today's: without the converter, with a hasty one, and with the lesson's."""
    queue, hasty = f"{lab.id}-migrated", DataConverter(payload_converter_class=HastyPayloadConverter)

    def worker(client: Client = lab.client) -> Worker:
        return lab.worker([TownShipment], [send], task_queue=queue, client=client)

    old = await begin_shipment(lab, "migrated", Shipment, BONN)
    async with worker():
        await until_over(old)
    message, before = await complaint(old), sent(lab, old)
    async with worker(with_converter(lab.client, MIGRATING)):
        begun = await attempt_of(old)
        await until(partial(is_done_or_tried, old, begun + 2), "the run is finished, or was tried again in vain")
        status, after = await status_of(old), sent(lab, old)
        today = TownAddress("Ulm", WeighedParcel(Size.SMALL, 50), express=True)
        new = await lab.start("Shipment", today, name="today", task_queue=queue, start_signal="approve")
        how = await ended(new)
    other = await begin_shipment(lab, "hasty", Shipment, BONN, queue=queue)
    async with worker(with_converter(lab.client, hasty)):
        await until_over(other)
    read = reread(hasty, {"city": "Bonn", "parcel": {"size": "M", "weight": 700}}, TownAddress)
    parcel = reread(hasty, {"size": "M", "weight": 700}, WeighedParcel)
    return [
        holds(
            "a payload converter that knows the old names lets the stuck run finish on the new type, with its nested "
            "type and enum and without the field that is gone, and reads new payloads",
            without_it=contains(message, "missing 1 required", "'grams'"),
            sent_without_it=equal(before, []),
            with_it=equal(status, "COMPLETED"),
            sent_to=equal(after, [TO_BONN]),
            a_run_begun_with_the_new_type=equal(how.result, "sent to Ulm, SMALL, 50 g, express"),
        ),
        control(
            "a converter that only renames: a field that is gone is an error, and nested types and enums stay raw",
            the_open_run=contains(await complaint(other), "unexpected keyword argument 'remark'"),
            nested_type_arrives_as=equal(type(read.parcel).__name__, "dict"),
            enum_arrives_as=equal(type(parcel.size).__name__, "str"),
        ),
    ]


async def attempt_of(handle: Handle) -> int:
    """Which attempt at its workflow task a run is at; 0 when none is due."""
    return (await handle.describe()).raw_description.pending_workflow_task.attempt


async def is_done_or_tried(handle: Handle, attempt: int) -> bool:
    return await is_closed(handle) or await attempt_of(handle) >= attempt


def reread(converter: DataConverter, written: Fields, kind: type) -> Any:
    """What a converter makes of a payload."""
    payload = DataConverter.default.payload_converter.to_payload(written)
    return converter.payload_converter.from_payload(payload, kind)


@activity.defn
async def echo(value: Any) -> Any:
    return value


@workflow.defn
class Echo:
    @workflow.run
    async def run(self, value: Any) -> Any:
        return await workflow.execute_activity(echo, value, start_to_close_timeout=PATIENT)


def nested(depth: int) -> Any:
    value: Any = "core"
    for _ in range(depth):
        value = [value]
    return value


@dataclass(frozen=True)
class Odd:
    """A value, what becomes of it on its way through client, workflow and activity and back, and in another language.

    `shown` is what `temporal workflow result`, written in Go, makes of it; None where nobody looks.
    """

    name: str
    value: Any
    by_default: str = "kept"
    by_pydantic: str = "kept"
    shown: str | None = None
    limit: str = ""


REFUSED = "refused by the client, no run"


def odd_ones() -> list[Odd]:
    """The values. No constant, because the sandbox runs a module's top level anew for each run of a workflow."""
    return [
        Odd("a null byte", "a\0b", shown='"a\\u0000b"'),
        Odd("a lone surrogate", "a\ud800b", by_pydantic=REFUSED, shown='"a\ufffdb"', limit="is replaced"),
        Odd("2**53 + 1", 2**53 + 1, shown="9007199254740992", limit="is rounded"),
        Odd("NaN", math.nan, shown="failed", limit="cannot be read"),
        Odd("100 lists in each other", nested(100)),
        Odd("100000 lists in each other", nested(100_000), by_default=REFUSED, by_pydantic=REFUSED),
        Odd("an empty list", [], shown="null", limit="is shown as nothing"),
        Odd("none", None),
    ]


async def odd_payloads(lab: Lab) -> list[Evidence]:
    """Every odd value with both converters; and what another language reads of those that came through."""
    converters = {"default": DataConverter.default, "pydantic": pydantic_data_converter}
    facts: dict[str, Fact] = {}
    shown: dict[str, str] = {}
    values = odd_ones()
    for library, converter in converters.items():
        client, queue = with_converter(lab.client, converter), f"{lab.id}-odd-{library}"
        async with lab.worker([Echo], [echo], task_queue=queue, client=client):
            for number, odd in enumerate(values):
                id = f"{queue}-{number}"
                expected = odd.by_default if library == "default" else odd.by_pydantic
                facts[f"{odd.name} ({library})"] = equal(await sent_around(lab, client, queue, id, odd.value), expected)
                if library == "default" and odd.shown:
                    shown[odd.name] = await shown_by_cli(lab, id)
    return [
        holds("odd values come back as they went, or are refused before anything is begun", **facts),
        holds(
            "a null byte is read by another language, too",
            by_temporal_workflow_result=equal(shown["a null byte"], '"a\\u0000b"'),
        ),
        *(
            limit(
                f"{odd.name} {odd.limit} by a reader in another language",
                by_temporal_workflow_result=equal(shown[odd.name], odd.shown),
            )
            for odd in values
            if odd.limit
        ),
    ]


async def sent_around(lab: Lab, client: Client, queue: str, id: str, value: Any) -> str:
    """What became of a value: "kept" when the activity was given it, and the client got it back."""
    try:
        handle = await lab.start(Echo.run, value, id=id, task_queue=queue, client=client)
    except (RecursionError, ValueError) as error:  # pydantic's is a ValueError
        described = await refusal(client.get_workflow_handle(id))
        return REFUSED if described == "NOT_FOUND" else f"{type(error).__name__}, {described or 'described'}"
    how = await ended(handle)
    # Text, for NaN is not equal to itself.
    given, back = [repr(call.argument) for call in lab.calls(id)], repr(how.result)
    return "kept" if given == [repr(value)] == [back] else f"{how.status}, given {given}, back {back}"


async def shown_by_cli(lab: Lab, id: str) -> str:
    """The result of a run as the command line (written in Go) shows it, or "failed"."""
    command = await lab.cli("workflow", "result", "--workflow-id", id)
    line = next((one for one in command.out.splitlines() if one.split()[:1] == ["Result"]), "")
    return line.partition("Result")[2].strip() if command.code == 0 else "failed"


@VR.item("VR-04", "Schema evolution", seconds=150)
async def schema_evolution(lab: Lab) -> AsyncIterator[Evidence]:
    """Every kind of change is written by one side and read by the other; then open runs meet changed types."""
    parts = (every_change, break_live, default_added_live, migrate, odd_payloads)
    async for evidence in side_by_side(*(part(lab) for part in parts)):
        yield evidence
    yield native(
        "defaults and converters are part of the SDK, but reading what was renamed or retyped is the user's to write",
        (DataConverter, "payload_converter_class"),
        CompositePayloadConverter,
        DefaultPayloadConverter,
        (JSONPlainPayloadConverter, "custom_type_converters"),
        JSONTypeConverter,
        value_to_type,
        PydanticPayloadConverter,
        (workflow.defn, "dynamic"),
        adds=["RenamedFields, which reads old payloads"],
    )


if __name__ == "__main__":
    run(VR)
