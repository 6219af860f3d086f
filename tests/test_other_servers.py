"""Servers that are set up differently: what they refuse is not run, at once and by name; the rest is judged."""

from common import Evidence, holds, piece, side_by_side
from harness.given import between, refusal
from harness.settings import Target, connect
from lab import Server

import asyncio
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from helpers import ROOT, Verdicts, evaluate, run, tiny
from servers import gateway, given_server, nginx
from temporalio.api.workflowservice.v1 import GetSystemInfoRequest
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode
from test_bad_input import refused

pytestmark = pytest.mark.all

OFF = {
    "frontend__enableSchedules": "false",
    "frontend__enableBatcher": "false",
    "frontend__enableExecuteMultiOperation": "false",
    "activity__enableStandalone": "false",
    "system__enableDeploymentVersions": "false",
}
NO_SYSTEM_WORKER = {"worker__perNamespaceWorkerCount": "0"}


def given(address: str) -> dict[str, str]:
    return {"TEMPORAL_ADDRESS": address, "TEMPORAL_NAMESPACE": "evaluation"}


def not_run(verdicts: Verdicts, item: str) -> dict[str, str]:
    """The claims of an item that were not run, each with the reason."""
    return {one["claim"]: one["measured"] for one in verdicts.items[item]["evidence"] if one["held"] is None}


def held(verdicts: Verdicts, item: str) -> int:
    """How many claims of an item were looked at; none may have failed. A release stage is not the server's doing."""
    looked_at = [one for one in verdicts.items[item]["evidence"] if one["held"] is not None]
    assert all(one["held"] for one in looked_at if one["kind"] not in ("limit", "native")), verdicts.out
    return len(looked_at)


@pytest.fixture(scope="module")
def switched_off(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with given_server(tmp_path_factory.mktemp("server"), **OFF) as server:
        yield server


@pytest.fixture(scope="module")
def unattended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs no worker of its own for the namespace."""
    with given_server(tmp_path_factory.mktemp("server"), **NO_SYSTEM_WORKER) as server:
        yield server


def refuse_operators(path: str, sent: Mapping[str, str]) -> tuple[grpc.StatusCode, str] | None:
    """What a company's gateway may say to everything that is not for users."""
    operator = "OperatorService" in path or path.endswith("UpdateTaskQueueConfig")
    return (grpc.StatusCode.PERMISSION_DENIED, "Request unauthorized.") if operator else None


def test_what_a_server_can_do_is_asked_and_printed(switched_off: Server, tmp_path: Path) -> None:
    with gateway(switched_off.address, refuse_operators) as address:
        done = evaluate(tiny(tmp_path), tmp_path, "TT-01", env=given(address))
    words = " ".join(done.out.split())
    for line in (
        "Temporal 1.", "It offers updates,", "limits: payload 2,097,152 bytes",
        "It does not offer schedules: the server refuses it (PERMISSION_DENIED: Schedules are disabled",
        "It does not offer batch operations: the server refuses it",
        "It does not offer worker deployments: the server refuses it",
        "It does not offer standalone activities: the server refuses it (UNIMPLEMENTED: Standalone activity is",
        "It does not offer operator calls: the server refuses it (PERMISSION_DENIED: Request unauthorized.)",
        "It does not offer task queue settings: the server refuses it",
    ):  # fmt: skip
        assert line in words
    assert done.stars("TT-01") == 5


def test_a_missing_system_worker_is_noticed(unattended: Server, tmp_path: Path) -> None:
    done = evaluate(tiny(tmp_path), tmp_path, "TT-01", env=given(unattended.address))
    words = " ".join(done.out.split())
    assert "It does not offer system worker: the server's own worker for this namespace does not run" in words
    assert "It does not offer schedules: the server's own worker" in words
    assert "standalone activities, task queue settings; limits" in words


# Script, item -> what it lacks where the features are off, and where no system worker runs.
REFUSED = [
    ("03_wf_workflow_primitives.py", "WF-01", {"standalone activities"}, set()),
    ("03_wf_workflow_primitives.py", "WF-05", {"schedules"}, {"schedules"}),
    ("03_wf_workflow_primitives.py", "WF-06", {"standalone activities"}, set()),
    ("04_sg_signals_events.py", "SG-03", {"schedules"}, {"schedules"}),
    ("05_vr_versioning.py", "VR-01", {"worker deployments"}, {"worker deployments"}),
    ("05_vr_versioning.py", "VR-03", {"worker deployments"}, {"worker deployments"}),
    ("06_cp_compensation.py", "CP-02", {"batch operations"}, {"batch operations"}),
    ("06_cp_compensation.py", "CP-04", {"batch operations"}, {"batch operations"}),
]


@pytest.mark.hours
@pytest.mark.parametrize(("script", "item", "off", "unwatched"), REFUSED)
@pytest.mark.parametrize("which", ["switched_off", "unattended"])
def test_what_is_refused_is_not_run_and_the_rest_is_judged(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    which: str,
    script: str,
    item: str,
    off: set[str],
    unwatched: set[str],
) -> None:
    server: Server = request.getfixturevalue(which)
    verdicts = evaluate(ROOT / script, tmp_path, item, env=given(server.address))
    # Where no main case of an item can be run, it is not run as a whole; never is it a question mark.
    whole = (item, which) == ("WF-06", "switched_off")
    assert verdicts.items[item]["outcome"] == ("not_run" if whole else "judged"), verdicts.out
    lost = [why for why in not_run(verdicts, item).values() if "the server" in why]
    named = [re.match("the server does not offer ([a-z ]+): ", why) for why in lost]
    assert {one and one[1] for one in named} == (off if which == "switched_off" else unwatched), lost
    assert held(verdicts, item) >= 2


def test_one_item_where_schedules_are_off(switched_off: Server, tmp_path: Path) -> None:
    """The default run's share of the test above."""
    verdicts = evaluate(ROOT / "04_sg_signals_events.py", tmp_path, "SG-03", env=given(switched_off.address))
    (why,) = (why for why in not_run(verdicts, "SG-03").values() if "schedules" in why)
    assert why.startswith("the server does not offer schedules: the server refuses it")
    assert verdicts.items["SG-03"]["outcome"] == "judged"
    assert held(verdicts, "SG-03") >= 5


# The machinery by itself -------------------------------------------------------------------------------


def rpc(status: RPCStatusCode, message: str) -> RPCError:
    return RPCError(message, status, b"")


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (rpc(RPCStatusCode.UNIMPLEMENTED, "unknown method"), True),
        (rpc(RPCStatusCode.PERMISSION_DENIED, "Request unauthorized."), True),
        (rpc(RPCStatusCode.INVALID_ARGUMENT, "activity pause is disabled on this namespace"), True),
        (rpc(RPCStatusCode.FAILED_PRECONDITION, "workflow pause is not enabled"), True),
        (rpc(RPCStatusCode.INVALID_ARGUMENT, "WorkflowId is not set on request."), False),
        (rpc(RPCStatusCode.NOT_FOUND, "workflow not found"), False),
        (rpc(RPCStatusCode.DEADLINE_EXCEEDED, "too late"), False),
        (rpc(RPCStatusCode.RESOURCE_EXHAUSTED, "namespace rate limit exceeded"), False),
        (ValueError("disabled"), False),
        (None, False),
    ],
)
def test_what_is_a_refusal(error: BaseException | None, refused: bool) -> None:
    assert bool(refusal(error)) is refused
    if error:
        outer = RuntimeError("outer")
        outer.__cause__ = error
        assert bool(refusal(outer)) is refused


def test_a_limit_of_somebodys_server_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPORAL_ADDRESS", "a.test:1")
    assert "a limit" in str(refusal(rpc(RPCStatusCode.RESOURCE_EXHAUSTED, "namespace rate limit exceeded")))
    for said in (
        "exceeded workflow execution limit for signal events",
        "limit on number of concurrent in-flight updates has been reached (5)",
        "Workflow history count exceeds limit.",
    ):
        assert said in str(refusal(ApplicationError(said)))
    # A model that an item asks has limits of its own, and they are no reason to leave the item out.
    assert refusal(ApplicationError("Rate limit reached for requests")) is None


LIMITED = '''
from common import Category, Evidence, control, works
from lab import Lab, run

import asyncio
import json
import os
import datetime

from temporalio import activity, workflow
from temporalio.client import WorkflowUpdateStage

LL = Category("LL", "Limited", "Is a limit of the server noticed?")


@activity.defn
async def nothing() -> None:
    await asyncio.sleep(0)


@workflow.defn
class Wide:
    """More activities at once than a server of this test lets wait."""

    @workflow.run
    async def run(self) -> None:
        options = {"start_to_close_timeout": datetime.timedelta(seconds=30)}
        await asyncio.gather(*(workflow.execute_activity(nothing, **options) for _ in range(20)))


@workflow.defn
class Long:
    """A longer history than a server of this test keeps."""

    @workflow.run
    async def run(self) -> None:
        for _ in range(40):
            await workflow.execute_activity(nothing, start_to_close_timeout=datetime.timedelta(seconds=30))


@workflow.defn
class Asked:
    @workflow.run
    async def run(self) -> None:
        await workflow.wait_condition(lambda: False)

    @workflow.update
    async def ask(self) -> None:
        await workflow.wait_condition(lambda: False)

    @workflow.signal
    def tell(self) -> None: ...


async def shows(lab: Lab, workflow_type: type):
    async with lab.worker([workflow_type], [nothing]):
        await lab.client.execute_workflow(workflow_type.run, id=lab.id, task_queue=lab.task_queue)
    yield works("it works", True, "")
    yield control("a control", True, "")


@LL.item("LL-01", "Pending activities")
async def wide(lab: Lab):
    async for evidence in shows(lab, Wide):
        yield evidence


@LL.item("LL-02", "History")
async def long(lab: Lab):
    async for evidence in shows(lab, Long):
        yield evidence


@LL.item("LL-03", "Updates")
async def updates(lab: Lab):
    async with lab.worker([Asked]):
        handle = await lab.client.start_workflow(Asked.run, id=lab.id, task_queue=lab.task_queue)
        accepted = WorkflowUpdateStage.ACCEPTED
        await asyncio.gather(*(handle.start_update(Asked.ask, wait_for_stage=accepted) for _ in range(4)))
    yield works("it works", True, "")
    yield control("a control", True, "")


@LL.item("LL-04", "Signals")
async def signals(lab: Lab):
    handle = await lab.client.start_workflow(Asked.run, id=lab.id, task_queue=lab.task_queue)
    for _ in range(20):
        await handle.signal(Asked.tell)
    yield works("it works", True, "")
    yield control("a control", True, "")


if __name__ == "__main__":
    run(LL)
'''


def test_every_limit_that_is_set_lower_is_told_by_name(tmp_path: Path) -> None:
    """Pending activities, history, updates and signals: the first hangs, the second ends, the others are refused."""
    tiny(tmp_path)
    (tmp_path / "limited.py").write_text(LIMITED)
    limits = {
        "limit__numPendingActivities__error": "10", "limit__historyCount__error": "50",
        "history__maxInFlightUpdates": "2", "history__maximumSignalsPerExecution": "10",
    }  # fmt: skip
    with given_server(tmp_path, **limits) as server:
        verdicts = evaluate(tmp_path / "limited.py", tmp_path, env=given(server.address))
    reasons = {id: (item["outcome"], item["reason"]) for id, item in verdicts.items.items()}
    assert {outcome for outcome, _ in reasons.values()} == {"not_run"}, verdicts.out
    for id, words in (
        ("LL-01", "PENDING_ACTIVITIES_LIMIT_EXCEEDED"), ("LL-02", "Workflow history count exceeds limit"),
        ("LL-03", "in-flight updates"), ("LL-04", "execution limit for signal events"),
    ):  # fmt: skip
        assert "a limit of the server is in the way" in reasons[id][1]
        assert words in reasons[id][1]


@piece(holds("it is there"), holds("so is this"))
async def part(error: Exception | None, *claims: str) -> list[Evidence]:
    if error:
        raise error
    return [holds(claim, True, "seen") for claim in claims]


async def collected(*parts: Any) -> list[Evidence]:
    return [one async for one in side_by_side(*parts)]


def test_a_piece_that_is_refused_is_not_run_and_the_others_are() -> None:
    no = rpc(RPCStatusCode.UNIMPLEMENTED, "no such call")
    found = asyncio.run(collected(part(no), part(None, "it is there", "so is this")))
    assert sorted((one.claim, one.held) for one in found if one.held is None) == [
        ("it is there", None), ("so is this", None),
    ]  # fmt: skip
    assert all("no such call" in one.measured for one in found if one.held is None)
    assert sum(one.held is True for one in found) == 2


def test_a_piece_that_fails_or_forgets_a_claim_is_an_error() -> None:
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(collected(part(ValueError("broken"))))
    with pytest.raises(RuntimeError, match="so is this"):
        asyncio.run(collected(part(None, "it is there")))


def test_an_item_that_is_refused_as_a_whole_is_not_run(switched_off: Server, tmp_path: Path) -> None:
    script = tiny(tmp_path)
    text = script.read_text().replace(
        'raise ValueError("thrown on purpose") from KeyError("the cause")', "await lab.client.list_schedules()\n"
        "    async for _ in await lab.client.list_schedules():\n        pass",
    )  # fmt: skip
    script.write_text(text)
    verdicts = evaluate(script, tmp_path, "TT-03", env=given(switched_off.address))
    assert verdicts.items["TT-03"]["outcome"] == "not_run"
    assert "Schedules are disabled" in verdicts.items["TT-03"]["reason"]


# Limits, and what stands in front ----------------------------------------------------------------------


@pytest.mark.hours
@pytest.mark.parametrize("limit", [15 << 20, 7 << 19, 2 << 20, 1 << 18])
def test_a_payload_limit_is_judged_by_how_it_behaves(tmp_path: Path, limit: int) -> None:
    """Seen in public settings: 15 MB and 3.5 MB. The last is below the size at which a server only warns."""
    with given_server(tmp_path, limit__blobSize__error=str(limit)) as server:
        verdicts = evaluate(ROOT / "07_pf_performance.py", tmp_path, "PF-03", env=given(server.address))
    assert verdicts.stars("PF-03") == 4, verdicts.out
    assert not not_run(verdicts, "PF-03")
    assert f"payload {limit:,} bytes" in " ".join(verdicts.out.split())


def test_behind_a_proxy_with_its_defaults_it_says_who_refuses(switched_off: Server, tmp_path: Path) -> None:
    with nginx(switched_off.address, tmp_path) as address:
        verdicts = evaluate(ROOT / "07_pf_performance.py", tmp_path, "PF-03", env=given(address))
    assert verdicts.items["PF-03"]["outcome"] == "judged", verdicts.out
    lost = not_run(verdicts, "PF-03")
    assert len(lost) == 2
    assert all("something between here and the server" in why and "HTTP 413" in why for why in lost.values())
    (passes,) = verdicts.evidence("PF-03", "works")
    assert passes["held"]
    assert "does not arrive: something between" in passes["measured"]
    assert "compression flag" not in verdicts.out


def test_a_server_behind_nginx_is_used_as_any_other(switched_off: Server, tmp_path: Path) -> None:
    closed = "location /temporal.api.operatorservice.v1.OperatorService/ { return 403; }"
    with nginx(switched_off.address, tmp_path, closed) as address:
        verdicts = evaluate(tiny(tmp_path), tmp_path, "TT-08", env=given(address))
    assert verdicts.items["TT-08"]["evidence"][0]["held"], verdicts.out
    assert "It does not offer operator calls: " in " ".join(verdicts.out.split())


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ("protocol error: received message with invalid compression flag: 60 (valid flags are 0 and 1) while receiving "
         "response with status: 413 Payload Too Large", "HTTP 413 Payload Too Large"),
        ("grpc-status header missing, mapped from HTTP status code 502", "HTTP 502"),
        ("invalid content-type: text/html", "with a page for a browser"),
    ],
)  # fmt: skip
def test_who_answers_in_place_of_the_server_is_said(said: str, what: str) -> None:
    assert str(between(said)).endswith(what)
    assert "something between" in str(refusal(rpc(RPCStatusCode.INTERNAL, said)))


def test_a_proxy_whose_server_is_away_is_told_from_a_server(tmp_path: Path) -> None:
    with nginx("127.0.0.1:9", tmp_path) as address:
        assert "something between here and it" in refused(tiny(tmp_path), "TT-05", **given(address))


def test_what_came_to_no_verdict_is_run_a_second_time_and_says_so(unattended: Server, tmp_path: Path) -> None:
    """An item that throws in its first run alone, on a server that is somebody else's, and on one of our own."""
    once = '    if not Path(lab.file("../been here")).exists():\n        Path(lab.file("../been here")).touch()\n    '
    script = tiny(tmp_path)
    text = script.read_text(encoding="utf-8").replace("import time\n", "import time\nfrom pathlib import Path\n")
    thrown = '    raise ValueError("thrown on purpose") from KeyError("the cause")\n'
    assert text.count(thrown) == 1
    script.write_text(text.replace(thrown, once + thrown + '    yield control("there", True, "1")\n'), encoding="utf-8")
    theirs = evaluate(script, tmp_path, "TT-03", "TT-02", env=given(unattended.address))
    assert theirs.items["TT-03"]["outcome"] == "judged", theirs.out
    assert "run a second time, for the first was inconclusive: ValueError: thrown on" in theirs.items["TT-03"]["reason"]
    assert "second time" not in theirs.items["TT-02"]["reason"]
    ours = evaluate(script, tmp_path, "TT-03")
    assert ours.items["TT-03"]["outcome"] == "inconclusive"
    assert "second time" not in ours.items["TT-03"]["reason"]


async def call_often(address: str, callers: int, times: int) -> None:
    client = await connect(Target(None))
    assert client.service_client.config.target_host == address

    async def call() -> None:
        for _ in range(times):
            await client.workflow_service.get_system_info(GetSystemInfoRequest())

    await asyncio.gather(*(call() for _ in range(callers)))


def test_a_call_that_a_proxy_took_along_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nginx ends a connection after 1,000 calls; here after 50."""
    with given_server(tmp_path) as server, nginx(server.address, tmp_path, "keepalive_requests 50;") as address:
        for name, value in given(address).items():
            monkeypatch.setenv(name, value)
        asyncio.run(call_often(address, 8, 300))


@pytest.mark.parametrize("said", ["workflow not found", "received message larger than max (4194500 vs. 4194304)"])
def test_what_the_server_itself_says_is_not_taken_for_another(said: str) -> None:
    assert between(said) is None


# All at once -------------------------------------------------------------------------------------------

EVERYTHING = OFF | {
    "limit__blobSize__error": str(15 << 20),
    "limit__numPendingActivities__error": "200",
    "limit__numPendingChildExecutions__error": "100",
    "limit__historyCount__error": "2000",
    "history__maximumSignalsPerExecution": "500",
    "history__maxInFlightUpdates": "5",
}


@pytest.mark.hours
def test_run_all_on_a_server_that_differs_in_every_way_at_once(tmp_path: Path) -> None:
    """No question mark may be due to a setting of the server: what it refuses is not run, the rest has a verdict."""
    closed = "location /temporal.api.operatorservice.v1.OperatorService/ { return 403; }"
    with given_server(tmp_path, **EVERYTHING) as server, nginx(server.address, tmp_path, closed) as address:
        env = given(address) | {"OPENAI_API_KEY": "", "TEMPORAL_DOTENV": os.devnull}
        done = run("run_all.py", "--record", str(tmp_path / "record"), env=env, seconds=3000)
    items = {
        item["id"]: item
        for file in (tmp_path / "record").glob("[01]*.json")
        for item in json.loads(file.read_text(encoding="utf-8"))["items"]
    }
    assert len(items) == 58, done.stdout + done.stderr
    asking = {id: item["reason"] for id, item in items.items() if item["outcome"] == "inconclusive"}
    assert not asking, asking
    for id, item in items.items():
        for one in item["evidence"]:
            assert one["held"] is not None or one["measured"], id
    assert "Temporal 1." in done.stdout or "server 1." in done.stdout
