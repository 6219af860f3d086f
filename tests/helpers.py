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
    # What is made to fail must be seen to fail, and not be put down to a machine that runs other tests beside it.
    return kept | {"LANG": "C.UTF-8", "EVALUATION_SLOW": "1000"} | changes


def own_dotenv(script: Path) -> dict[str, str]:
    """Keep the .env of whoever runs the tests from a script that stands beside it."""
    return {"TEMPORAL_DOTENV": os.devnull} if script.resolve().parent == ROOT else {}


def run(
    *command: str | Path, cwd: Path = ROOT, seconds: float = 900, env: Mapping[str, str] | None = None
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
    script: Path, tmp_path: Path, *arguments: str, seconds: float = 900, env: Mapping[str, str] | None = None
) -> Verdicts:
    """Run a numbered script with --json and read what it wrote."""
    file = tmp_path / "verdicts.json"
    done = run(script, "--json", str(file), *arguments, cwd=script.parent, seconds=seconds, env=env)
    assert file.exists(), f"no verdicts (exit {done.returncode}): {done.stdout}{done.stderr}"
    record = json.loads(file.read_text(encoding="utf-8"))
    return Verdicts(done.returncode, done.stdout, done.stderr, {one["id"]: one for one in record["items"]}, record)


SHARED = ["common.py", "lab.py", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("harness/*.py"))]
SHARED += ["cluster.py"] if (ROOT / "cluster.py").exists() else []


def changed(script: Path, tmp_path: Path, *changes: tuple[str, str], shared: Sequence[tuple[str, str]] = ()) -> Path:
    """A copy of a script in which texts are replaced: the feature taken out, or a platform that lies.

    `shared` are replacements in the files that scripts share. Each text must be there, or the test has lost its point.
    """
    for name, pairs in ((script.name, changes), *((name, shared) for name in SHARED)):
        text = (ROOT / name).read_text(encoding="utf-8")
        for old, new in pairs:
            assert name in SHARED or old in text, f"{name} no longer holds {old!r}"
            text = text.replace(old, new)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "systems", tmp_path / "systems", dirs_exist_ok=True)
    for old, _ in shared:
        assert any(old in (ROOT / name).read_text(encoding="utf-8") for name in SHARED), f"nothing shared holds {old!r}"
    return tmp_path / script.name


def check_whole(verdicts: Verdicts) -> None:
    """What every script's full run must show: the items and stars of the recorded run, each with its control.

    An item may differ only where evidence was run here and not there, or the other way round, and where the record
    is of other evidence: its stars say nothing of what is claimed now.
    """
    assert verdicts.err == ""
    (recorded,) = (one for one in load(ROOT / "results").categories if one["category"] == verdicts.record["category"])
    assert [one["id"] for one in recorded["items"]] == list(verdicts.items)
    for there in recorded["items"]:
        here = verdicts.items[there["id"]]
        same = here["stars"] == there["stars"]
        stale = claims(here) != claims(there)
        assert same or stale or not_run(here) != not_run(there), f"recorded {there['stars']}: {verdicts.out}"
        assert here["outcome"] == "judged", verdicts.out
    assert verdicts.code == 0
    for item in verdicts.items.values():
        kinds = {one["kind"] for one in item["evidence"]}
        assert {"works", "control"} <= kinds, item["id"]
        for one in item["evidence"]:
            assert one["claim"], item["id"]
            assert one["measured"], item["id"]
        assert item["id"] in verdicts.out


def claims(item: Mapping[str, Any]) -> set[tuple[str, str]]:
    return {(one["kind"], one["claim"]) for one in item["evidence"]}


def not_run(item: Mapping[str, Any]) -> set[str]:
    """The claims of an item that could not be looked at where it ran."""
    return {one["claim"] for one in item["evidence"] if one["held"] is None and one["kind"] != "cited"}


def tiny(tmp_path: Path) -> Path:
    """The tiny script beside a copy of what scripts share, as if it were a numbered one."""
    (tmp_path / "harness").mkdir(exist_ok=True)
    for name in SHARED:
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "tests/tiny.py", tmp_path)
    return tmp_path / "tiny.py"


@dataclass(frozen=True)
class Fall:
    """A change to a script that must cost an item something: the feature taken out, or a platform that lies.

    `old` is replaced by `new` in the script (`shared`: in what scripts share). Then the item has `stars`, None where
    nothing is proven any more, and every text in `lost` is part of a claim that is said not to hold. Falls of
    different items share a run of the script; one that touches more than its item runs `alone`.
    """

    item: str
    old: str
    new: str
    stars: int | None
    lost: Sequence[str] = ()
    shared: bool = False
    alone: bool = False


def in_runs(falls: Sequence[Fall]) -> list[list[Fall]]:
    """The falls packed into as few runs as there can be: no two of one item in the same."""
    runs: list[list[Fall]] = []
    for fall in falls:
        fitting = (
            run for run in runs if not fall.alone and not run[0].alone and fall.item not in {f.item for f in run}
        )
        run = next(fitting, None)
        if run is None:
            runs.append([fall])
        else:
            run.append(fall)
    return runs


def name_of_run(falls: Sequence[Fall]) -> str:
    return ",".join(fall.item for fall in falls)


def check_falls(script: Path, tmp_path: Path, falls: Sequence[Fall], env: Mapping[str, str] | None = None) -> None:
    """Run the script with the changes of all these falls, and look for what each must cost."""
    changes = [(fall.old, fall.new) for fall in falls if not fall.shared]
    shared = [(fall.old, fall.new) for fall in falls if fall.shared]
    script = changed(script, tmp_path, *changes, shared=shared)
    verdicts = evaluate(script, tmp_path, *(fall.item for fall in falls), env=env)
    stands = [
        f"{fall.item}, {fall.old!r} -> {fall.new!r}: {what}" for fall in falls for what in _stands(verdicts, fall)
    ]
    assert not stands, "\n".join([*stands, verdicts.out, verdicts.err])


def _stands(verdicts: Verdicts, fall: Fall) -> list[str]:
    """What a fall should have cost and did not."""
    stars = verdicts.stars(fall.item)
    gone = [one["claim"] for one in verdicts.items[fall.item]["evidence"] if one["held"] is False]
    other = [f"{stars} stars instead of {fall.stars}"] if stars != fall.stars else []
    return other + [f"{words!r} is not lost" for words in fall.lost if not any(words in claim for claim in gone)]
