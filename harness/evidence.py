"""Evidence and judge: what was seen, the facts it rests on, and the stars that follow from it."""

from harness.settings import find_cli
from harness.stages import STAGES, Api, Stage, api_name, api_stage
from harness.versions import lacks_yet

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

SCHEMA = 2  # of a record; 1 was without facts
Kind = Literal["works", "holds", "native", "control", "limit", "cited"]
STAR_NEEDING: Mapping[Kind, int] = {"works": 3, "holds": 4, "native": 5, "limit": 5}
LABELS = {1: "unsupported", 2: "experimental", 3: "PoC", 4: "production-ready", 5: "recommended"}


@dataclass(frozen=True)
class Fact:
    """One thing that was measured, what was expected of it, and whether it held.

    `measured` is a value JSON can hold, or a Spread. `expected` None: it only informs, and always holds.
    """

    measured: Any
    expected: str | None = None
    held: bool = True

    @property
    def words(self) -> str:
        """What was measured, and what was expected where it was something else."""
        return words(self.measured) + ("" if self.held else f" (expected {self.expected})")


@dataclass(frozen=True)
class Spread:
    """A figure measured several times: what was usual and how far it went, in `unit`."""

    median: float
    low: float
    high: float
    times: int
    unit: str

    @classmethod
    def of(cls, values: Iterable[float], unit: str) -> "Spread":
        """The spread of at least one value."""
        every = sorted(values)
        return cls(statistics.median(every), every[0], every[-1], len(every), unit)

    def __str__(self) -> str:
        """Such as "12 ms (10 to 15, 20 times)"."""
        if self.times == 1:
            return f"{words(self.median)} {self.unit}"
        return f"{self.median:.3g} {self.unit} ({self.low:.3g} to {self.high:.3g}, {self.times} times)"


def figure(value: float, unit: str) -> Spread:
    """A figure measured once, in `unit`."""
    return Spread.of([value], unit)


def words(value: Any) -> str:
    """A measured value as a person reads it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {words(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(words(one) for one in value) or "none"
    return str(value) if str(value) else "nothing"


def equal(measured: Any, expected: Any) -> Fact:
    """It is exactly this."""
    return Fact(measured, words(expected), measured == expected)


def differs(measured: Any, other: Any) -> Fact:
    """It is something else than this."""
    return Fact(measured, f"other than {words(other)}", measured != other)


def contains(measured: Any, *parts: Any) -> Fact:
    """Each part is in it: in a text, a list or the keys of a mapping."""
    missing = [part for part in parts if part not in measured]
    return Fact(measured, f"with {words(missing or parts)}", not missing)


def lacks(measured: Any, *parts: Any) -> Fact:
    """No part is in it. What is empty lacks everything: say beside it that something was there to look at."""
    found = [part for part in parts if part in measured]
    return Fact(measured, f"without {words(found or parts)}", not found)


def one_of(measured: Any, *options: Any) -> Fact:
    """It is one of these."""
    return Fact(measured, f"one of {words(options)}", measured in options)


def at_least(measured: float | Spread, bound: float) -> Fact:
    """It is this or more; of a Spread, the median is."""
    return Fact(measured, f"{words(bound)} or more", _middle(measured) >= bound)


def at_most(measured: float | Spread, bound: float) -> Fact:
    """It is this or less; of a Spread, the median is."""
    return Fact(measured, f"{words(bound)} or less", _middle(measured) <= bound)


def between(measured: float | Spread, low: float, high: float) -> Fact:
    """It is `low` or more and `high` or less; of a Spread, the median is."""
    return Fact(measured, f"{words(low)} to {words(high)}", low <= _middle(measured) <= high)


def _middle(measured: float | Spread) -> float:
    return measured.median if isinstance(measured, Spread) else measured


@dataclass(frozen=True)
class Evidence:
    """One thing that was looked at: a claim in plain words, and the facts it rests on.

    `held` is whether all facts hold, and `measured` the sentence made from them. `held` None means it was
    not run; `measured` then says why. For a limit, `held` means it was seen.
    """

    kind: Kind
    claim: str
    held: bool | None
    measured: str
    cap: int = 5
    certain: bool = False  # a limit whose absence no slowness can feign
    stage: Stage | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict)


def works(claim: str, held: bool | None = None, measured: str = "", /, **facts: Any) -> Evidence:
    """Does the main case work? Needed for three stars."""
    return _seen("works", claim, held, measured, facts)


def holds(claim: str, held: bool | None = None, measured: str = "", /, **facts: Any) -> Evidence:
    """Does it hold at the edges: faults, kills, races, bad input? Needed for four stars."""
    return _seen("holds", claim, held, measured, facts)


def control(claim: str, held: bool | None = None, measured: str = "", /, **facts: Any) -> Evidence:
    """Does the failure appear when the feature is left out? If not, the item is inconclusive."""
    return _seen("control", claim, held, measured, facts)


def limit(
    claim: str, seen: bool | None = None, measured: str = "", /, cap: int = 4, certain: bool = False, **facts: Any
) -> Evidence:
    """Is this known limitation there? If seen, it caps the stars at 4, or at 3 where users must build it.

    `certain`: whether it is there hangs on what was built, such as one server process or several, and on no time. Then
    a starved machine casts no doubt on its absence.
    """
    return replace(_seen("limit", claim, seen, measured, facts), cap=cap, certain=certain)


def _seen(kind: Kind, claim: str, held: bool | None, measured: str, given: Mapping[str, Any]) -> Evidence:
    """Evidence that rests on named facts; a plain value is a fact that only informs.

    The names are those of the keyword arguments, with spaces for underscores. At least one fact must expect something.
    """
    if not given:
        return Evidence(kind, claim, held, measured)
    facts = {name.replace("_", " "): one if isinstance(one, Fact) else Fact(one) for name, one in given.items()}
    if all(fact.expected is None for fact in facts.values()):
        raise TypeError(f"no fact of this claim could fail: {claim}")
    sentence = "; ".join(f"{name} {fact.words}" for name, fact in facts.items())
    return Evidence(kind, claim, all(fact.held for fact in facts.values()), sentence, facts=facts)


def not_run(kind: Kind, claim: str, reason: str) -> Evidence:
    """What could not be looked at where it stands, and why. It earns nothing."""
    return Evidence(kind, claim, None, reason)


def cited(claim: str, source: str) -> Evidence:
    """What a source says that cannot be run here. Shown, and never earns a star."""
    return Evidence("cited", claim, None, source)


def native(claim: str, *apis: Api, adds: Sequence[str] = ()) -> Evidence:
    """Is it built in, generally available, and enough by itself? Needed for five stars.

    `apis` are what the item did to get what it claims, nothing more and nothing less (not how it watched, nor what
    every item does): SDK objects, pairs of one and the name of its parameter or field, or a command with the flags
    that matter, such as "temporal workflow reset --query". A call of the server's raw API is named by the command
    that makes it. Each is looked up on the running platform: it must be there, belong to the SDK or the server, and
    carry no notice wherever one may stand (stages.py). `adds` lists what the demonstration had to build itself; it
    must be empty. A stage that cannot be read is not taken for GA: then this was not run, nor was it where the
    installed SDK does not have it yet.
    """
    cli = find_cli()
    stages = {api_name(api): api_stage(api, cli) for api in apis}
    worst = max(stages.values(), key=STAGES.index)
    found = ", ".join(f"{name}: {stage}" for name, stage in stages.items())
    held = None if worst == "not readable" and not adds else worst == "GA" and not adds
    measured = f"{found}; built by the demonstration: {', '.join(adds) or 'nothing'}"
    measured += "; no docstring, source or --help tells the stage of what is not readable" if held is None else ""
    if yet := [why for api in apis if isinstance(api, str) and (why := lacks_yet(api))]:
        return Evidence("native", claim, None, "; ".join(yet))
    return Evidence("native", claim, held, measured, stage=worst)


Outcome = Literal["judged", "inconclusive", "not_run"]


@dataclass(frozen=True)
class Verdict:
    """What an item's evidence amounts to. `stars` is 1 to 5 when judged, else None; `reason` says why."""

    outcome: Outcome
    stars: int | None
    reason: str
    stage: Stage | None = None


def judge(evidence: Sequence[Evidence], trouble: str | None = None, starved: str | None = None) -> Verdict:
    """The stars that follow from the evidence. Nothing else sets a star.

    1 no `works` held, 2 some did, 3 all did, 4 and every `holds`, 5 and every `native` and no `limit` seen.
    A star needs evidence of its kind: without a `holds` there is no fourth, without a `native` no fifth.
    What was not run earns nothing, and a limit that was not looked at counts as seen. `trouble`
    (an exception, a timeout) and a failed control make it inconclusive. So does a machine that `starved` the
    experiment where something did not hold: that cannot be told from slowness.
    """
    of: dict[str, list[Evidence]] = {kind: [one for one in evidence if one.kind == kind] for kind in STAR_NEEDING}
    controls = [one for one in evidence if one.kind == "control"]
    stage = max((one.stage for one in of["native"] if one.stage), key=STAGES.index, default=None)
    doubt = trouble or _doubt(of, controls, starved)
    if doubt:
        return Verdict("inconclusive", None, doubt, stage)
    for kind, some in (("works", of["works"]), ("control", controls)):
        if all(one.held is None for one in some):
            return Verdict("not_run", None, f"no {kind} evidence could be run: {some[0].measured}", stage)
    stars = _earned(of)
    capped = min([stars, *(one.cap for one in of["limit"] if one.held is not False)])
    return Verdict("judged", capped, _reason(of, stars, capped), stage)


def _doubt(of: Mapping[str, Sequence[Evidence]], controls: Sequence[Evidence], starved: str | None) -> str | None:
    """Why nothing follows from the evidence, or None."""
    for one in controls:
        if one.held is False:
            return f"the control failed, so nothing is proven: {one.claim}: {one.measured}"
    for kind, some in (("works", of["works"]), ("control", controls)):
        if not some:
            return f"there is no {kind} evidence"
    doubtful = (one for kind in ("works", "holds", "limit") for one in of[kind] if not one.certain)
    failed = [one for one in doubtful if one.held is False]
    return f"{starved}, so this cannot be told from slowness: {failed[0].claim}" if starved and failed else None


def _earned(of: Mapping[str, Sequence[Evidence]]) -> int:
    """The stars before limits."""
    if not any(one.held for one in of["works"]):
        return 1
    for kind, stars in (("works", 2), ("holds", 3), ("native", 4)):
        if not of[kind] or not all(one.held for one in of[kind]):
            return stars
    return 5


def _reason(of: Mapping[str, Sequence[Evidence]], earned: int, stars: int) -> str:
    """What decided the stars, first, and then everything else that was lost, also under a cap."""
    lost = []
    for kind, needed in (("works", 3), ("holds", 4), ("native", 5)):
        for one in of[kind]:
            if not one.held:
                lost.append(f"{'failed' if one.held is False else 'not run'} ({kind}): {one.claim}")
        if not of[kind] and earned == needed - 1:
            lost.append(f"there is no {kind} evidence")
    caps = [
        f"limit {'seen' if one.held else 'not looked at'}: {one.claim}"
        for one in of["limit"]
        if one.held is not False and one.cap <= stars
    ]
    first, then = (caps, lost) if stars < earned else (lost, caps)
    return "; ".join([*first, *then]) or "everything held, no limit seen"
