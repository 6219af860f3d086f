"""Temporal's cluster on PostgreSQL for one probe, by the project's own cluster.py: `PORT:READY FOLDER --KEY=VALUE...`.

Runs in the project's environment, not in a script's. It keeps its data in the folder and finds them there again, and
ends with the process that started it.
"""

import asyncio
import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cluster import Cluster


async def main(arguments: Sequence[str]) -> None:
    """Start it on the port, and listen on the other one once it has handed out a task."""
    ports, folder, *settings = arguments
    port, ready = map(int, ports.split(":"))
    dynamic = {}
    for one in settings:
        name, _, value = one.removeprefix("--").partition("=")
        dynamic[name] = json.loads(value)
    async with Cluster(keep=Path(folder) / "cluster", port=port, settings=dynamic):
        with socket.create_server(("127.0.0.1", ready)):
            await asyncio.Future()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
