"""Which release stage the platform itself claims for an API: read from docstrings, the SDK's source, and --help.

The SDK has no list of stages. It says "This API is experimental" in the docstring of a class, a function, a
module or a whole package, in a parameter's or a field's text, or behind a parameter's last line; it says
"WARNING: Deprecated. Use ..." or `@deprecated`; the command line says "(Experimental)" beside a command's name,
above its usage, or in a flag's text. All of these are looked at, and the least mature one counts.
"""

from harness.settings import Target, cli_environment
from harness.versions import found

import ast
import enum
import functools
import inspect
import itertools
import pydoc
import re
import subprocess
import sys
import textwrap
import time
import typing
from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any, Literal

Stage = Literal["GA", "not readable", "preview", "experimental", "deprecated", "missing"]
STAGES: tuple[Stage, ...] = typing.get_args(Stage)  # from the most to the least mature

Api = str | tuple[Any, str] | Any


def api_name(api: Api) -> str:
    """What `api` is called in a list of stages, such as "worker.Worker(max_cached_workflows)"."""
    if isinstance(api, str):
        return api.removeprefix("temporalio.")
    if isinstance(api, tuple):
        return f"{api_name(api[0])}({api[1]})"
    if isinstance(api, enum.Enum):
        return f"{api_name(type(api))}({api.name})"
    api = _bare(api)
    return f"{api.__module__.split('._')[0].removeprefix('temporalio.')}.{api.__qualname__}"


def api_stage(api: Api, cli: str | None) -> Stage:
    """The least mature stage that anything written about `api` claims; "missing" where it is not the platform's.

    `api` is an SDK object (class, function, method, property, enum member), a pair of one and the name of its
    parameter, field or member, the name of either as text where an older SDK lacks it (see versions.py), or a
    command such as "temporal workflow reset --query", which `cli` is asked for.

    "not readable" where nothing would say it: no docstring of its own (Python's -OO strips them all), for a field
    no source, for a command no `cli` or none that answers --help. Who has a docstring is taken to say all there,
    so a class such as RetryPolicy whose docstring and fields carry no notice is GA.

    Raises TypeError for the generated methods of WorkflowService: theirs are all alike and tell no stage.
    """
    if isinstance(api, str) and not api.startswith("temporalio."):
        return _stage_of_command(api, cli)
    if isinstance(api, str):
        named, parameter = found(api), api.partition("(")[2].rstrip(")")
        if named is None:
            return "missing"
        return api_stage((named, parameter) if parameter else named, cli)
    thing, part = api if isinstance(api, tuple) else (api, None)
    if isinstance(thing, enum.Enum):
        thing, part = type(thing), thing.name
    module = _bare(thing).__module__
    if not module.startswith("temporalio."):
        return "missing"
    if "services_generated" in module:
        raise TypeError(f"{api_name(thing)} is generated and tells no stage: name the command or the SDK's own call")
    if part and part not in _parts(thing):
        return "missing"
    own = list(_own_texts(thing, part))
    if None in own or not any(own) or sys.flags.optimize > 1:
        return "not readable"
    return _least_mature(_claimed(text) for text in (*own, *_texts_around(thing)) if text)


def _least_mature(stages: Iterable[Stage]) -> Stage:
    return max(stages, key=STAGES.index, default="GA")


def _bare(thing: Any) -> Any:
    """A property's function; anything else as it is."""
    return thing.fget if isinstance(thing, property) else thing


def _lineage(thing: Any) -> list[type]:
    """A class and those of the SDK's that it inherits from; nothing for a function."""
    return [one for one in getattr(thing, "__mro__", ()) if one.__module__.startswith("temporalio.")]


def _fields(one: type) -> set[str]:
    return {*inspect.get_annotations(one), *getattr(one, "__members__", ())}


def _parts(thing: Any) -> set[str]:
    """The names of a callable's parameters, or of a class's parameters, fields and enum members."""
    fields: set[str] = set().union(*map(_fields, _lineage(thing)))
    try:
        return fields | {*inspect.signature(thing).parameters}
    except (TypeError, ValueError):  # a module, or a class without a signature
        return fields


def _own_texts(thing: Any, part: str | None, seen: tuple[Any, ...] = ()) -> Iterator[str | None]:
    """What is written about a thing, or about a part of it; None where that could not be read.

    Its docstring, that of a class's `__init__`, those of a function's overloads (which one is called is not
    told), `@deprecated`, and what these point to, as in "This is a shortcut for :py:meth:`start_activity`";
    without what they say of other parts. Then what stands behind a field.
    """
    for one in (thing, *([thing.__init__] if inspect.isclass(thing) else typing.get_overloads(_bare(thing)))):
        whole, of_parts = _split(_docstring(one), _parts(thing))
        of_part = of_parts.get(part or "", "")
        yield whole
        yield of_part
        if hasattr(one, "__deprecated__"):
            yield f"Deprecated: {one.__deprecated__}"
        for other in _referred(of_part or whole, one):
            if other not in (*seen, thing) and (not part or of_part or part in _parts(other)):
                yield from _own_texts(other, None if of_part else part, (*seen, thing))
    for one in _lineage(thing):
        if part in _fields(one):
            yield _behind(one, part)


def _referred(doc: str, thing: Any) -> Iterator[Any]:
    """The SDK's functions to which a docstring sends its reader."""
    for name in re.findall(r"(?:shortcut for|\bSee)\b[^:.]*:py:(?:meth|func):`~?([\w.]+)`", doc):
        module, beside = _bare(thing).__module__, _bare(thing).__qualname__.rpartition(".")[0]
        for full in (f"{module}.{beside}.{name}", f"{module}.{name}", name):
            found = pydoc.locate(full.replace("..", "."))
            if inspect.isroutine(found):
                yield found
                break


def _texts_around(thing: Any) -> Iterator[str]:
    """The docstrings of the packages, the module and the classes that a class or function stands in."""
    thing = _bare(thing)
    for name in itertools.accumulate(thing.__module__.split("."), "{}.{}".format):
        within = sys.modules.get(name)
        yield _docstring(within)
    for name in thing.__qualname__.split(".")[:-1]:
        within = getattr(within, name, None)
        yield _split(_docstring(within), _parts(within))[0]


def _docstring(thing: Any) -> str:
    """What was written for a module, a class or a function, or for the nearest that it inherits from."""
    if inspect.isclass(thing):
        # A dataclass without a docstring is given its signature as one.
        docs = (vars(one).get("__doc__") or "" for one in _lineage(thing))
        return inspect.cleandoc(next((doc for doc in docs if doc and not re.match(r"\w+\(", doc)), ""))
    if getattr(thing, "__name__", "") == "__init__":  # or it would inherit that of `object`
        return inspect.cleandoc(thing.__doc__ or "") if inspect.isfunction(thing) else ""
    written = (ModuleType, FunctionType, MethodType, property)
    return (inspect.getdoc(thing) or "") if isinstance(thing, written) else ""


def _split(doc: str, parts: set[str]) -> tuple[str, dict[str, str]]:
    """A docstring without what it says of parameters and fields, and what it says of each.

    The text of an entry goes on to the next line that stands at the list's own indent and names a part: a line
    "WARNING: This is an experimental feature" within it belongs to it. Outside the list, a sentence such as
    "``event_groups`` is experimental" is about that part alone.
    """
    texts: dict[str, str] = {}
    section = re.search(r"^( *)(?:Args|Attributes):\n((?:\1 +\S.*\n|[ \t]*\n)*)", f"{doc}\n", re.MULTILINE)
    if section:
        doc = f"{doc}\n".replace(section[0], "\n")
        name = ""
        for entry in re.split(r"^(?=\S)", textwrap.dedent(section[2]), flags=re.MULTILINE):
            named = re.match(r"[*`]*(\w+)[*`]*(?: \(.*\))?:", entry)
            name = named[1] if named and named[1] in parts else name
            texts[name] = texts.get(name, "") + entry
    for about, subjects in re.findall(r"^(((?:``\w+``(?:, | and )?)+) (?:is|are)\b[^.]*\.)", doc, re.MULTILINE):
        if parts.issuperset(names := re.findall(r"\w+", subjects.replace(" and ", " "))):
            doc = doc.replace(about, "")
            texts |= {name: f"{texts.get(name, '')}\n{about}" for name in names}
    return doc, texts


def parsed(source: str) -> ast.Module:
    """The syntax tree of a source. On Python 3.11 parsing fails now and then while other threads are busy."""
    for _ in range(20):
        try:
            return ast.parse(source)
        except SystemError:
            time.sleep(0.01)
    return ast.parse(source)


@functools.cache
def _behind(one: type, part: str) -> str | None:
    """The string literal behind a field or an enum member in a class's source; None where there is no source."""
    try:
        (tree,) = parsed(textwrap.dedent(inspect.getsource(one))).body
    except (OSError, TypeError, SyntaxError):
        return None
    assert isinstance(tree, ast.ClassDef)
    for field, text in itertools.pairwise(tree.body):
        targets = field.targets if isinstance(field, ast.Assign) else [getattr(field, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == part for target in targets):
            literal = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and text.value.value
            return literal if isinstance(literal, str) else ""
    return ""


def _stage_of_command(line: str, cli: str | None) -> Stage:
    """The least mature stage that --help claims for a command, a command above it, or a flag named with it."""
    words = [word for word in line.split() if not word.startswith("-")]
    flags = [word for word in line.split() if word.startswith("-")]
    texts = []
    for length in range(1, len(words) + 1):
        command = " ".join(words[:length])
        said = _help(cli, *words[1:length])
        if said is None:
            return "not readable"
        above, _, below = said.partition("Usage:")
        if not below.split("[")[0].strip().startswith(command):
            return "missing"  # an unknown command is answered by the one above it
        texts.append(above)
        if length < len(words):
            texts += re.findall(rf"^  {re.escape(words[length])} .*", below, re.MULTILINE)
    for flag in flags:
        text = re.search(rf"^  (?:-\w, |    ){re.escape(flag)}\b.*(?:\n {{8,}}.*)*", below, re.MULTILINE)
        if text is None:
            return "missing"
        texts.append(text[0])
    return _least_mature(map(_claimed, texts))


@functools.cache
def _help(cli: str | None, *words: str) -> str | None:
    """What `temporal ... --help` prints; None where it cannot be asked."""
    if cli is None:
        return None
    try:
        environment = cli_environment(Target(""))
        done = subprocess.run(
            [cli, *words, "--help"], capture_output=True, text=True, timeout=60, check=False, env=environment
        )
    except OSError:
        return None
    return done.stdout if done.returncode == 0 and "Usage:" in done.stdout else None


# Notices, in a text whose lines were joined.
NOTICES: dict[Stage, str] = {
    "preview": r"\b(public|private|pre-release|in|a) preview\b|\bpre-release\b|[(\[]preview\b|(^|[.:] )preview[.:]",
    "experimental": r"\bexperimental\b|\bunstable\b|\bsubject to (change|removal)\b|\bmay change (in|without)\b",
    # Not any "deprecated": deprecate_patch tells of what it does, search_attributes of a form of it that is, and
    # `temporal task-queue describe` of what one of its flags asks for.
    "deprecated": r"\.\. deprecated|(?<!form of this )(?<!reachability status )\bis deprecated\b"
    r"|(^|[.:;*] |[(\[])deprecated\b",
}


def _claimed(text: str) -> Stage:
    """The stage that a text claims; GA where it carries no notice."""
    joined = " ".join(text.split())
    return _least_mature(stage for stage, notice in NOTICES.items() if re.search(notice, joined, re.IGNORECASE))
