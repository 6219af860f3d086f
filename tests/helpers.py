"""What the tests share: running the real commands, and running a script that was changed on purpose."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports import load

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("[01][0-9]_*.py"))

# The settings of whoever runs the tests must not decide how they end.
NEUTRAL = ("TEMPORAL_", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LC_", "LANG", "TERM")
# Nor must their proxies: the tests set some of their own.
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command under test: ours without the settings that steer it, then `changes`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NEUTRAL)}
    kept = {name: value for name, value in kept.items() if name.lower() not in PROXIES}
    return kept | {"LANG": "C.UTF-8"} | changes


def own_dotenv(script: Path) -> dict[str, str]:
    """Keep the .env of whoever runs the tests from a script that stands beside it."""
    return {"TEMPORAL_DOTENV": os.devnull} if script.resolve().parent == ROOT else {}


def run(
    *command: str | Path, cwd: Path = ROOT, seconds: float = 240, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a Python script with its arguments to its end, as a user would with its output piped."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment(**(own_dotenv(cwd / command[0]) | dict(env or {}))),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=seconds,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@dataclass(frozen=True)
class Verdicts:
    """The end of an evaluation: exit status, what was printed, and the items of its JSON by id."""

    code: int
    out: str
    err: str
    items: Mapping[str, Any]
    record: Mapping[str, Any]

    def stars(self, item: str) -> int | None:
        """The stars of an item, or None when it was not judged."""
        stars: int | None = self.items[item]["stars"]
        return stars

    def evidence(self, item: str, kind: str) -> list[Mapping[str, Any]]:
        """The evidence of one kind that an item gave."""
        return [one for one in self.items[item]["evidence"] if one["kind"] == kind]


def evaluate(
    script: Path, tmp_path: Path, *arguments: str, seconds: float = 240, env: Mapping[str, str] | None = None
) -> Verdicts:
    """Run a numbered script with --json and read what it wrote."""
    file = tmp_path / "verdicts.json"
    done = run(script, "--json", str(file), *arguments, cwd=script.parent, seconds=seconds, env=env)
    assert file.exists(), f"no verdicts (exit {done.returncode}): {done.stdout}{done.stderr}"
    record = json.loads(file.read_text(encoding="utf-8"))
    return Verdicts(done.returncode, done.stdout, done.stderr, {one["id"]: one for one in record["items"]}, record)


SHARED = [name for name in ("settings.py", "common.py", "given.py", "lab.py", "cluster.py") if (ROOT / name).exists()]


def changed(script: Path, tmp_path: Path, *changes: tuple[str, str], shared: Sequence[tuple[str, str]] = ()) -> Path:
    """A copy of a script in which texts are replaced: the feature taken out, or a platform that lies.

    `shared` are replacements in the files that scripts share. Each text must be there, or the test has lost its point.
    """
    for name, pairs in ((script.name, changes), *((name, shared) for name in SHARED)):
        text = (ROOT / name).read_text(encoding="utf-8")
        for old, new in pairs:
            assert name in SHARED or old in text, f"{name} no longer holds {old!r}"
            text = text.replace(old, new)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for old, _ in shared:
        assert any(old in (ROOT / name).read_text(encoding="utf-8") for name in SHARED), f"nothing shared holds {old!r}"
    return tmp_path / script.name


def check_whole(verdicts: Verdicts) -> None:
    """What every script's full run must show: the items and stars of the recorded run, each with its control.

    An item may differ only where evidence was run here and not there, or the other way round.
    """
    assert verdicts.err == ""
    (recorded,) = (one for one in load(ROOT / "results").categories if one["category"] == verdicts.record["category"])
    assert [one["id"] for one in recorded["items"]] == list(verdicts.items)
    for there in recorded["items"]:
        here = verdicts.items[there["id"]]
        same = here["stars"] == there["stars"]
        assert same or not_run(here) != not_run(there), f"recorded {there['stars']}: {verdicts.out}"
    assert verdicts.code == 0
    for item in verdicts.items.values():
        kinds = {one["kind"] for one in item["evidence"]}
        assert {"works", "control"} <= kinds, item["id"]
        for one in item["evidence"]:
            assert one["claim"], item["id"]
            assert one["measured"], item["id"]
        assert item["id"] in verdicts.out


def not_run(item: Mapping[str, Any]) -> set[str]:
    """The claims of an item that could not be looked at where it ran."""
    return {one["claim"] for one in item["evidence"] if one["held"] is None and one["kind"] != "cited"}


def tiny(tmp_path: Path) -> Path:
    """The tiny script beside a copy of what scripts share, as if it were a numbered one."""
    for name in (*SHARED, "tests/tiny.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path / "tiny.py"
