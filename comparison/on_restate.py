# /// script
# requires-python = ">=3.11"
# dependencies = ["restate-sdk>=1.3", "hypercorn>=0.17", "httpx[http2]>=0.28", "psutil>=7.0"]
# ///
"""Restate under the probes: handlers served over HTTP/2, called and recorded by Restate's server.

The server comes from npm and is prepared once, in the project's folder:
`npm install --prefix .restate @restatedev/restate-server`
"""

import asyncio
import json
import os
from collections.abc import Mapping, Sequence

# user code: setup
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import hypercorn.asyncio
import hypercorn.config
import probes
import restate
from probes import FIVE, PLAN, TIMER, fail_twice, note, work
from restate import RunOptions, WorkflowContext, WorkflowSharedContext

INGRESS = f"http://127.0.0.1:{PLAN.server.get('ingress')}"
ADMIN = f"http://127.0.0.1:{PLAN.server.get('admin')}"


async def serve(services: Sequence[Any], port: int) -> None:
    config = hypercorn.config.Config()
    config.bind = [f"127.0.0.1:{port}"]
    await hypercorn.asyncio.serve(restate.app(services), config)


async def register(port: int) -> None:
    while not probes.answers(port):
        await asyncio.sleep(0.05)
    async with httpx.AsyncClient() as client:
        reply = await client.post(f"{ADMIN}/deployments", json={"uri": f"http://127.0.0.1:{port}"}, timeout=30)
        reply.raise_for_status()


async def call(path: str, body: Any = None, key: str = "") -> Any:
    headers = {"idempotency-key": key} if key else {}
    async with httpx.AsyncClient(timeout=None) as client:
        reply = await client.post(f"{INGRESS}/{path}", json=body, headers=headers)
        reply.raise_for_status()
        return reply.json() if reply.content else None


# end


# user code: five
def five_service(steps: Sequence[str]) -> restate.Service:
    service = restate.Service("Five")

    @service.handler("run")
    async def run(ctx: restate.Context, run: str) -> list[str]:
        return [await ctx.run_typed(name, work, run=run, step=name) for name in steps]

    return service


async def serve_five() -> None:
    server = asyncio.create_task(serve([five_service(PLAN.steps)], PLAN.port))
    if PLAN.phase == "start":
        await register(PLAN.port)
        await asyncio.gather(*(call("Five/run", run, key=run) for run in PLAN.names))
    else:
        await server


# end


# user code: remedy
async def serve_old_and_new() -> None:
    old = serve([five_service(FIVE)], PLAN.port)
    new = serve([five_service(PLAN.steps)], NEW_PORT)
    await asyncio.gather(old, new, register(NEW_PORT))


# end
NEW_PORT = PLAN.port + 1


# user code: human
review = restate.Workflow("Review")


@review.main()
async def run(ctx: WorkflowContext, run: str) -> None:
    await ctx.run_typed("draft", work, run=run, step="draft")
    ctx.set("asked", True)
    text = await ctx.promise("answer", type_hint=str)
    await ctx.run_typed("publish", work, run=run, step=f"publish {text}")


@review.handler("answer")
async def answered(ctx: WorkflowSharedContext, text: str) -> None:
    await ctx.promise("answer", type_hint=str).resolve(text)


@review.handler()
async def waiting(ctx: WorkflowSharedContext) -> bool:
    return bool(await ctx.get("asked"))


async def serve_review() -> None:
    server = asyncio.create_task(serve([review], PLAN.port))
    if PLAN.phase == "start":
        await register(PLAN.port)
        await call(f"Review/{PLAN.run}/run/send", PLAN.run)
        while not await call(f"Review/{PLAN.run}/waiting"):
            await asyncio.sleep(0.05)
        note(PLAN.run, "asked", "asked")
    await server


def answer() -> None:
    asyncio.run(call(f"Review/{PLAN.run}/answer/send", "yes"))


# end


async def query(sql: str) -> list[dict[str, Any]]:
    async with httpx.AsyncClient() as client:
        reply = await client.post(f"{ADMIN}/query", json={"query": sql}, headers={"accept": "application/json"})
        reply.raise_for_status()
        rows: list[dict[str, Any]] = reply.json()["rows"]
        return rows


# user code: replay
async def replay_run() -> list[str]:
    found = await query("select id from sys_invocation where target_service_name = 'Five' order by created_at")
    journal = await query(f"select * from sys_journal where id = '{found[0]['id']}' order by index")
    steps = [row["name"] for row in journal if row.get("name")]
    server = asyncio.create_task(serve([five_service(PLAN.steps)], PLAN.port))
    while not probes.answers(PLAN.port):
        await asyncio.sleep(0.05)
    async with httpx.AsyncClient() as client:
        url = f"{ADMIN}/invocations/{found[0]['id']}/restart-as-new"
        reply = await client.patch(url, params={"from": str(len(journal) - 1), "deployment": "keep"}, timeout=30)
        if reply.is_error:
            raise RuntimeError(reply.text)
        copy = reply.json()["new_invocation_id"]
    while True:
        row = (await query(f"select status, last_failure from sys_invocation where id = '{copy}'"))[0]
        if row["status"] == "completed":
            return steps
        if row.get("last_failure"):
            raise RuntimeError(row["last_failure"])
        await asyncio.sleep(0.1)
        assert not server.done()


# end


def five() -> None:
    asyncio.run(serve_old_and_new() if PLAN.version == "remedy" else serve_five())


def human() -> None:
    asyncio.run(serve_review())


def replay() -> list[str]:
    return asyncio.run(replay_run())


def state() -> dict[str, Any]:
    """What the server says of the run: finished or not, and the failure that holds it up."""
    sql = "select status, completion_result, last_failure from sys_invocation where target_service_name = 'Five'"
    row = asyncio.run(query(sql))[0]
    return {"finished": row["status"] == "completed", "error": row.get("last_failure") or ""}


# user code: many
async def nothing(number: int) -> int:
    return number


counter = restate.Service("Many")


@counter.handler("run")
async def many_steps(ctx: restate.Context, number: int) -> int:
    if PLAN.version == "parallel":
        steps = [ctx.run_typed("step", nothing, number=one) for one in range(number)]
        return len(await restate.gather(*steps))
    for one in range(number):
        await ctx.run_typed("step", nothing, number=one)
    return number


# end


def many() -> list[dict[str, float]]:
    async def prepare() -> list[dict[str, float]]:
        loop = asyncio.get_running_loop()
        server = asyncio.create_task(serve([counter], PLAN.port))
        await register(PLAN.port)

        def run_steps(number: int) -> None:
            asyncio.run_coroutine_threadsafe(call("Many/run", number), loop).result()

        seen = await asyncio.to_thread(probes.measure, run_steps)
        server.cancel()
        return seen

    return asyncio.run(prepare())


# user code: timer
timed = restate.Service("Timed")


@timed.handler("run")
async def timed_run(ctx: restate.Context, run: str) -> None:
    await ctx.run_typed("before", work, run=run, step="before")
    await ctx.sleep(timedelta(seconds=TIMER))
    await ctx.run_typed("after", work, run=run, step="after")


async def serve_timed() -> None:
    server = asyncio.create_task(serve([timed], PLAN.port))
    if PLAN.phase == "start":
        await register(PLAN.port)
        await call("Timed/run/send", PLAN.run)
    await server


def timer() -> None:
    asyncio.run(serve_timed())


# end


# user code: flaky
failing = restate.Service("Failing")


@failing.handler("run")
async def failing_run(ctx: restate.Context, run: str) -> None:
    options = RunOptions[str](max_attempts=3, initial_retry_interval=timedelta(seconds=0.2))
    await ctx.run_typed("flaky", fail_twice, options, run=run, step="flaky")


async def run_failing() -> None:
    server = asyncio.create_task(serve([failing], PLAN.port))
    await register(PLAN.port)
    await call("Failing/run", PLAN.run)
    server.cancel()


def flaky() -> None:
    asyncio.run(run_failing())


# end

ROOT = Path(__file__).resolve().parent.parent / ".restate" / "node_modules" / "@restatedev"


def find_server() -> Path | None:
    found = sorted(ROOT.glob("restate-server-*/bin/restate-server"))
    return found[0] if found and os.access(found[0], os.X_OK) else None


def manifest() -> dict[str, Any]:
    file = ROOT / "restate-server" / "package.json"
    package: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return package


def server_licence() -> str:
    return f"restate-server {manifest().get('version', '?')}: {manifest().get('license', '?')}"


def check() -> None:
    if find_server() is None:
        raise probes.NotRun(
            "Restate's server is not there: prepare it by `npm install --prefix .restate @restatedev/restate-server`"
        )


def server_env(folder: Path, ports: Mapping[str, int]) -> dict[str, str]:
    return {
        "RESTATE_BASE_DIR": str(folder / "restate"),
        "RESTATE_LISTEN_MODE": "tcp",
        "RESTATE_BIND_IP": "127.0.0.1",
        "RESTATE_ADVERTISED_HOST": "127.0.0.1",
        "RESTATE_BIND_PORT": str(ports["node"]),
        "RESTATE_INGRESS__BIND_PORT": str(ports["ingress"]),
        "RESTATE_ADMIN__BIND_PORT": str(ports["admin"]),
        "RESTATE_ADMIN__DISABLE_WEB_UI": "true",
        "RESTATE_LOG_FILTER": "warn",
    }


def healthy(ports: Mapping[str, int]) -> bool:
    if not probes.answers(ports["admin"]):
        return False
    try:
        urls = [f"http://127.0.0.1:{ports['admin']}/health", f"http://127.0.0.1:{ports['ingress']}/restate/health"]
        return all(httpx.get(url, timeout=2).is_success for url in urls)
    except httpx.HTTPError:
        return False


SYSTEM = probes.System(
    name="restate",
    title="Restate",
    columns=("service",),
    packages=("restate-sdk",),
    imports="import restate, hypercorn.asyncio",
    focus="durable handlers and workflows behind a server that calls them",
    store="restate-server on its folder",
    server=probes.Server(
        command=lambda folder, ports, column: [str(find_server()), "--no-logo", "--node-name", "probe"],
        ports=["node", "ingress", "admin"],
        ready="ingress",
        env=server_env,
        healthy=healthy,
    ),
    server_file=find_server,
    server_licence=server_licence,
    server_version=lambda: {"restate-server": manifest().get("version", "?")},
    check=check,
    elsewhere="its server comes from npm",
    remedy="a second deployment beside the first",
    retry="restate:RunOptions",
    llm={
        "agent loop": "",
        "model client": "",
        "tool calling": "",
        "agent framework integration": "",
    },
    companion="restate-sdk[openai] restate.ext.openai:DurableRunner",
)

if __name__ == "__main__":
    probes.main(SYSTEM)
