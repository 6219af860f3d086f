# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "crewai==1.15.30",
#   "temporalio>=1.35",
# ]
# ///
"""A worker with a crew of CrewAI inside an activity. CrewAI does not resolve together with what else is used here.

python worker.py ADDRESS QUEUE LEDGER GATE: its tools note in the file LEDGER what they do, and reserve only once
there is a file GATE.
"""

import asyncio
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool
from temporalio import activity
from temporalio.client import Client
from temporalio.worker import Worker


@dataclass
class Errand:
    text: str
    model: str
    url: str


class Shop:
    def __init__(self, ledger: Path, gate: Path) -> None:
        self.ledger, self.gate = ledger, gate

    def note(self, line: str) -> None:
        with self.ledger.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def crew(self, errand: Errand) -> Crew:
        @tool("stock")
        def stock(product: str) -> str:
            """How many pieces of a product are in stock."""
            self.note(f"stock {product}")
            return "7 in stock"

        @tool("reserve")
        def reserve(product: str) -> str:
            """Reserve one piece of a product."""
            self.note(f"reserve {product}")
            while not self.gate.exists():
                time.sleep(0.05)
            return "reserved as R-1"

        llm = LLM(model=f"openai/{errand.model}", base_url=errand.url)
        shopper = Agent(
            role="Shopper", goal="Buy what is asked for", backstory="You buy things.", llm=llm, tools=[stock, reserve]
        )
        return Crew(
            agents=[shopper],
            tasks=[Task(description=errand.text, expected_output="What the tools said", agent=shopper)],
        )

    @activity.defn
    async def shop_by_crew(self, errand: Errand) -> str:
        """The crew works in a thread; meanwhile the server is told that it does."""
        working = asyncio.create_task(asyncio.to_thread(self.crew(errand).kickoff))
        while not (await asyncio.wait({working}, timeout=0.5))[0]:
            activity.heartbeat()
        return str(working.result().raw)


async def main(address: str, queue: str, ledger: str, gate: str) -> None:
    shop = Shop(Path(ledger), Path(gate))
    client = await Client.connect(address)
    await Worker(client, task_queue=queue, activities=[shop.shop_by_crew]).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
