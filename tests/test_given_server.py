"""A server that the user names: untuned, with a namespace of its own. It is used, and left as it was."""

from common import connect, find_cli
from lab import Guard, Server

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, evaluate

pytestmark = pytest.mark.all


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A dev server with its own default settings, in which the namespace "evaluation" exists."""
    folder = tmp_path_factory.mktemp("server")
    cli = find_cli()
    assert cli
    guard = Guard(folder)
    given = Server(cli, guard, folder / "log.txt", settings={}, namespace="evaluation")
    asyncio.run(given.start())
    yield given
    given.kill()
    guard.close()


async def open_and_all(server: Server) -> tuple[int, int]:
    """How many workflows are running on the server, and how many there ever were."""
    client = await connect(server.target)
    running = await client.count_workflows('ExecutionStatus = "Running"')
    return running.count, (await client.count_workflows()).count


@pytest.mark.parametrize(
    ("script", "item", "stars"),
    [
        ("01_ex_execution_semantics.py", "EX-06", 4),
        ("02_rt_retry_timeout.py", "RT-02", 4),
        ("03_wf_workflow_primitives.py", "WF-02", 4),
        ("04_sg_signals_events.py", "SG-02", 4),
        ("05_vr_versioning.py", "VR-01", 4),
        ("06_cp_compensation.py", "CP-01", 3),
        ("08_op_operations.py", "OP-06", 3),
        ("09_ob_observability.py", "OB-03", 4),
        ("11_ai_agent_integration.py", "AI-02", 4),
    ],
)
def test_an_item_of_each_script(server: Server, tmp_path: Path, script: str, item: str, stars: int) -> None:
    # No cluster of its own beside the given server, whether or not one is prepared here.
    env = {"TEMPORAL_ADDRESS": server.address, "TEMPORAL_NAMESPACE": "evaluation"}
    env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    _, before = asyncio.run(open_and_all(server))
    verdicts = evaluate(ROOT / script, tmp_path, item, env=env)
    assert verdicts.stars(item) == stars, verdicts.out
    assert verdicts.code == 0
    assert f"given server {server.address}" in verdicts.out
    running, after = asyncio.run(open_and_all(server))
    assert after > before, "the item ran on this server"
    assert running == 0, "what the item left running was terminated"
