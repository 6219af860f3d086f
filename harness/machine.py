"""The machine an evaluation runs on: how slow it is, whether it starved an experiment, who may run beside whom."""

import asyncio
import contextlib
import fcntl
import inspect
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NoReturn, TypeVar

T = TypeVar("T")

REFERENCE = 50.0  # million turns of the loop below a second: two quiet cores, Python 3.11
SLOW = float(os.environ.get("EVALUATION_SLOW") or 4)  # times slower: from here on a loss may be slowness
STALL = SLOW / 4  # seconds: a tick that comes so late took the processor from what was tried
SPEED = "EVALUATION_SPEED"  # the variable that tells a script's processes how slow the machine is
ROOM = "EVALUATION_ROOM"  # the variable that names the folder of the locks for items that run alone


def measure_slowness(seconds: float = 0.2) -> float:
    """How many times slower than the reference this machine is now, other programs' share included."""
    begun, turns = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < seconds:
        for _ in range(1000):
            turns += 1
    return REFERENCE * 1e6 * passed / turns


def slowness() -> float:
    """The factor by which patience and short product timeouts grow: 1 on a machine that is quick enough."""
    return max(1.0, float(os.environ.get(SPEED, 1)))


class Ticker:
    """Notices that the machine starved this process: a thread that wants to wake twenty times a second."""

    def __init__(self) -> None:
        self.at_start = measure_slowness()
        os.environ[SPEED] = f"{self.at_start:.2f}"
        self._late: list[tuple[float, float]] = []  # (when, seconds too late)
        threading.Thread(target=self._tick, daemon=True).start()

    def starved_since(self, begun: float) -> str | None:
        """In what way the machine was too slow since `begun` (time.monotonic) to blame anything else; or None."""
        stall = max((late for when, late in self._late if when >= begun), default=0)
        if stall > STALL:
            return f"this process stood still for {stall:.1f} s"
        now = max(measure_slowness(), self.at_start)
        return f"the machine was {now:.1f} times slower than usual" if now > SLOW else None

    def _tick(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(0.05)
            now = time.monotonic()
            if now - last > STALL / 2:
                self._late.append((now, now - last))
            last = now


class Room:
    """The place in which items run: many together, or one that measures alone, over all scripts of a run.

    Without a folder it is this script's own; run_all.py names one. Two locks make it fair: who waits at the
    door holds back those who come later.
    """

    def __init__(self, places: int) -> None:
        named = os.environ.get(ROOM)
        self._folder = Path(named) if named else None
        self._places = asyncio.Semaphore(places)

    @contextlib.asynccontextmanager
    async def enter(self, alone: bool) -> AsyncIterator[None]:
        async with self._places:
            if self._folder is None:
                yield
                return
            with open(self._folder / "door", "ab") as door, open(self._folder / "room", "ab") as room:
                await asyncio.to_thread(fcntl.flock, door, fcntl.LOCK_EX)
                await asyncio.to_thread(fcntl.flock, room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
                fcntl.flock(door, fcntl.LOCK_UN)
                yield


def leave(code: int) -> NoReturn:
    """End this process now.

    With SDK 1.35 the interpreter sometimes aborts while it tears itself down after a correct run
    (PyGILState_Release, status 134 or 139), so it is not given the chance.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


async def until(condition: Callable[[], object], what: str, seconds: float = 60, every: float | None = None) -> float:
    """Wait until `condition`, a function or coroutine function, is truthy. Returns the seconds it took.

    It is asked `every` so many seconds: by default 0.05, and 0.2 where it is a coroutine, whose answer costs a server
    something. Raises TimeoutError, which says that `what` did not happen, after `seconds`, which grow on a slow
    machine.
    """
    seconds *= slowness()
    begun = time.monotonic()
    while True:
        met = condition()
        asked = inspect.isawaitable(met)
        if await met if asked else met:  # type: ignore[misc]
            return time.monotonic() - begun
        if time.monotonic() > begun + seconds:
            raise TimeoutError(f"within {seconds:g} s it did not happen that {what}")
        await asyncio.sleep(every or (0.2 if asked else 0.05))


async def together(*parts: Awaitable[T]) -> list[T]:
    """Run parts at the same time. When one fails, or this is cancelled, the others have ended as well on return."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
