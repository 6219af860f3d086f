"""Records: what a run left in JSON, read back and held against what a record is.

A run is a folder such as results/, with a file a script, or one such file. docs/record.schema.json describes
a file for other languages; the models here are the same for this one.
"""

from harness.evidence import SCHEMA
from harness.settings import HERE, Unusable, sdk_version

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError


class FactRecord(BaseModel):
    """A named fact: what was measured and, in words, what was expected of it (None: it only informs)."""

    model_config = ConfigDict(frozen=True)
    name: str
    measured: Any
    expected: str | None
    held: bool


class EvidenceRecord(BaseModel):
    """A claim and what it rests on. `held` None: not run. For a limit, True: it was seen."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["works", "holds", "native", "control", "limit", "cited"]
    claim: str
    held: bool | None
    measured: str
    facts: Sequence[FactRecord] = ()


class ItemRecord(BaseModel):
    """One of the 58 items with its verdict. `stars` is None where it was not judged."""

    model_config = ConfigDict(frozen=True)
    id: str
    title: str
    fail_closed: bool
    outcome: Literal["judged", "inconclusive", "not_run"]
    stars: int | None
    stage: str | None
    reason: str
    seconds: float
    evidence: Sequence[EvidenceRecord]


class EnvironmentRecord(BaseModel):
    """What was evaluated, on what machine, and when."""

    model_config = ConfigDict(frozen=True, extra="allow")
    python: str
    sdk: str
    server: str
    where: str
    os: str
    cpus: int
    date: str
    seed: int
    speed: float | None = None


class CategoryRecord(BaseModel):
    """What one script wrote."""

    model_config = ConfigDict(frozen=True)
    category: str
    title: str
    environment: EnvironmentRecord
    items: Sequence[ItemRecord]


@dataclass(frozen=True)
class Run:
    """A whole run, or part of one, and what it is called."""

    name: str
    categories: Sequence[CategoryRecord]

    @property
    def items(self) -> dict[str, ItemRecord]:
        return {item.id: item for category in self.categories for item in category.items}

    @property
    def environment(self) -> EnvironmentRecord:
        """That of the first script; they share all but date and seed."""
        return self.categories[0].environment

    @property
    def words(self) -> str:
        """What it is of, for a heading."""
        one = self.environment
        speed = f", {one.speed:.1f} times as slow as the reference machine" if one.speed else ""
        where = f"{one.where}, Temporal {one.server}, SDK {one.sdk}, Python {one.python}"
        return f"{self.name}: {where}, {one.cpus} cores{speed}; {one.date[:10]}, {len(self.items)} items"


def load_run(path: Path) -> Run:
    """The run that a folder or a file holds. Raises Unusable, in a sentence, where it is none."""
    try:
        files = sorted(path.glob("[0-9][0-9]_*.json")) if path.is_dir() else [path]
        texts = [(file, file.read_text(encoding="utf-8")) for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"{path} cannot be read ({error}): name a recorded run, such as results.") from None
    if not texts:
        raise Unusable(f"{path} holds no record (NN_*.json): name a folder that --record wrote, such as results.")
    categories = [_category(file, text) for file, text in texts]
    return Run(str(path), categories)


def _category(file: Path, text: str) -> CategoryRecord:
    try:
        value = json.loads(text)
    except ValueError:
        raise Unusable(f"{file} is not JSON: name what --json or --record wrote, whole.") from None
    version = value.get("schema", 1) if isinstance(value, Mapping) else 1
    if not isinstance(version, int) or version > SCHEMA:
        raise Unusable(f"{file} is of a newer evaluation (schema {version}, here {SCHEMA}): compare it with that one.")
    try:
        record = CategoryRecord.model_validate(value)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise Unusable(f"{file} is no record of this evaluation (at {where or 'its top'}): name another.") from None
    if not record.items:
        raise Unusable(f"{file} is a record without items: name one of a run that came to its end.")
    return record


def age_of(run: Run) -> str | None:
    """That a record is of another SDK than the installed one, and which of them is older; None where it is not."""
    here, there = sdk_version(), run.environment.sdk
    if here == there:
        return None
    older, newer = (numbers(version) for version in (there, here))
    how = "older" if older < newer else "newer"
    return f"the record is {how} than what is installed: SDK {there} was recorded, and SDK {here} is installed"


def numbers(version: str) -> list[int]:
    """The numbers of a version, to be compared."""
    return [int(number) for number in re.findall(r"\d+", version)]


def recorded_here() -> Run | None:
    """The run that comes with the project, where there is one."""
    folder = HERE / "results"
    return load_run(folder) if any(folder.glob("[0-9][0-9]_*.json")) else None
