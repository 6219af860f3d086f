"""Takes one lesson out of a script, as a file that runs on its own with temporalio alone.

A script has two sections an item: the lesson under "# CP-01 Title ----", and what is done to it under
"# CP-01 put to the test ----". A lesson that is code ends with `async def example_cp_01(client: Client)`; one
that is a command or a setting is a text named `EXAMPLE_CP_01`.
"""

import ast
import importlib.metadata
import re
import symtable
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HARNESS = ("common", "lab", "cluster", "harness")

MAIN = '''
async def main() -> int:
    """Connect as the TEMPORAL_* variables or the profile say, by default to a server on this machine."""
    config = ClientConfig.load_client_connect_config()
    config.setdefault("target_host", "localhost:7233")
    try:
        client = await Client.connect(**config)
    except RuntimeError as error:
        print(f"No Temporal server answers ({error}). Start one with: temporal server start-dev", file=sys.stderr)
        return 1
    await example(client)
    return 0


if __name__ == "__main__":
    status = asyncio.run(main())
    sys.stdout.flush()
    # With SDK 1.35 the interpreter sometimes aborts while it tears itself down, so it is not given the chance.
    os._exit(status)
'''
MAIN_IMPORTS = """import asyncio
import os
import sys
from temporalio.client import Client
from temporalio.envconfig import ClientConfig
"""


@dataclass(frozen=True)
class Lesson:
    """The lesson of one item: its title, the comment above it, its lines, and the name of its example.

    `first` and `last` are its lines in the script, counted from 1; `example` is None where there is nothing to copy.
    """

    item: str
    title: str
    comment: Sequence[str]
    first: int
    last: int
    example: str | None
    is_code: bool


def lessons_of(text: str) -> dict[str, Lesson]:
    """The lessons of a script by item id."""
    lines = text.splitlines()
    heads = [
        (n, m[1], m[2]) for n, line in enumerate(lines, 1) if (m := re.match(r"# ([A-Z]{2}-\d\d) (.*?) -+$", line))
    ]
    ends = [n for n, _, _ in heads[1:]] + [len(lines) + 1]
    found = {}
    for (line, item, title), end in zip(heads, ends, strict=True):
        if title == "put to the test":
            continue
        body = lines[line : end - 1]
        comment = [one.removeprefix("#").strip() for one in body[: next((n for n, b in enumerate(body) if not b), 0)]]
        name = item.replace("-", "_")
        code = f"async def example_{name.lower()}("
        example = f"example_{name.lower()}" if any(one.startswith(code) for one in body) else None
        setting = f"EXAMPLE_{name}" if any(one.startswith(f"EXAMPLE_{name} = ") for one in body) else None
        found[item] = Lesson(item, title, comment, line + 1, end - 1, example or setting, example is not None)
    return found


def copy_of(path: Path, item: str) -> str | None:
    """The lesson of an item as a file of its own, or None where it has none that can be copied."""
    text = path.read_text(encoding="utf-8")
    lesson = lessons_of(text).get(item)
    if lesson is None or lesson.example is None:
        return None
    tree = ast.parse(text)
    if not lesson.is_code:
        return _setting(tree, lesson.example)
    lines = text.splitlines()
    first = next(_starts(node) for node in tree.body if node.lineno >= lesson.first)
    while lines[first - 2].startswith("#") and first - 2 >= lesson.first + len(lesson.comment):
        first -= 1
    own = "\n".join(lines[first - 1 : lesson.last]).strip("\n")
    pieces = [*_needed(tree, lines, own, lesson), own]
    imports = _imports(tree, _free("\n".join(pieces)))
    body = "\n\n\n".join(pieces).replace(lesson.example, "example")
    inner = [ast.unparse(node) for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Import | ast.ImportFrom)]
    head = _metadata([*imports, *inner, *MAIN_IMPORTS.splitlines()]) + _docstring(lesson)
    return head + _sorted(imports) + "\n\n" + body + "\n\n" + MAIN


def _setting(tree: ast.Module, name: str) -> str:
    """The value of the text with this name."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return str(ast.literal_eval(node.value)).strip("\n") + "\n"
    raise ValueError(f"{name} is no text")


def _starts(node: ast.stmt) -> int:
    """The first line of a statement, its decorators included."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(one.lineno for one in decorators)])


def _source(lines: Sequence[str], node: ast.stmt) -> str:
    """The text of a statement, with the comment right above it."""
    first = _starts(node)
    while first > 1 and re.match(r"#(?! ([A-Z]{2}-\d\d|\d\.) )", lines[first - 2]):
        first -= 1
    return "\n".join(lines[first - 1 : node.end_lineno])


def _free(source: str) -> set[str]:
    """The names that a piece of a module reads and does not give itself, those in quoted annotations included."""
    top = symtable.symtable(source, "lesson", "exec")
    given = {one.get_name() for one in top.get_symbols() if one.is_assigned() or one.is_namespace()}
    read = {one.get_name() for one in top.get_symbols() if one.is_referenced()}
    inner = list(top.get_children())
    while inner:
        table = inner.pop()
        read |= {one.get_name() for one in table.get_symbols() if one.is_global() and one.is_referenced()}
        inner += table.get_children()
    quoted = (one.value for one in ast.walk(ast.parse(source)) if isinstance(one, ast.Constant))
    for text in quoted:
        if isinstance(text, str) and re.fullmatch(r"[A-Z][\w.]*(\[[\w., \[\]]+\])?( \| \w+)*", text):
            read |= set(re.findall(r"[A-Za-z_]\w*", text))
    return read - given


def _defines(node: ast.stmt) -> set[str]:
    """The names that a statement at the top level gives."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}
    return set()


def _needed(tree: ast.Module, lines: Sequence[str], own: str, lesson: Lesson) -> list[str]:
    """What a lesson uses from elsewhere in its script, as source in the order of the file."""
    outside = [node for node in tree.body if not lesson.first <= node.lineno <= lesson.last]
    taken: list[ast.stmt] = []
    while more := [
        node for node in outside if node not in taken and _defines(node) & _free(_joined(lines, taken, own))
    ]:
        taken += more
    wanted = _free(_joined(lines, taken, own))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and _root(node) in HARNESS:
            ours = {alias.asname or alias.name for alias in node.names} & wanted
            if ours:
                raise ValueError(f"the lesson of {lesson.item} uses {', '.join(sorted(ours))} of {node.module}.py")
    return [_source(lines, node) for node in sorted(taken, key=lambda node: node.lineno)]


def _joined(lines: Sequence[str], nodes: Sequence[ast.stmt], own: str) -> str:
    return "\n".join([*(_source(lines, node) for node in nodes), own])


def _imports(tree: ast.Module, names: set[str]) -> list[str]:
    """The import statements that give these names, one a line."""
    lines = []
    for node in _import_nodes(tree):
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            dotted = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
            if name not in names or (isinstance(node, ast.ImportFrom) and _root(node) in HARNESS):
                continue
            lines.append(
                f"from {node.module} import {dotted}" if isinstance(node, ast.ImportFrom) else f"import {dotted}"
            )
    return lines


def _import_nodes(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import at the top level, those passed through the sandbox or tried because of older SDKs included."""
    for node in tree.body:
        for one in node.body if isinstance(node, ast.With | ast.Try) else [node]:
            if isinstance(one, ast.Import | ast.ImportFrom):
                yield one


def _root(node: ast.ImportFrom) -> str:
    return (node.module or "").partition(".")[0]


def _module(line: str) -> str:
    return line.split()[1].partition(".")[0]


def _sorted(imports: Sequence[str]) -> str:
    """The imports of the file: the standard library's, temporalio's, and others, passed through the sandbox."""
    names: dict[str, set[str]] = {}
    for line in {*imports, *MAIN_IMPORTS.splitlines()}:
        start, _, name = line.rpartition(" import ") if line.startswith("from ") else ("", "", line)
        names.setdefault(f"{start} import " if start else line, set()).add(name if start else "")
    every = sorted((one + ", ".join(sorted(names[one])) for one in names), key=lambda line: (line[0] == "f", line))
    standard = [line for line in every if _module(line) in sys.stdlib_module_names]
    temporal = [line for line in every if _module(line) == "temporalio"]
    third = [line for line in every if line not in standard and line not in temporal]
    blocks = [standard, temporal]
    if third:
        blocks.append(["with workflow.unsafe.imports_passed_through():", *(f"    {line}" for line in third)])
        if not any(re.match("from temporalio import .*workflow", line) for line in temporal):
            temporal.append("from temporalio import workflow")
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _metadata(imports: Sequence[str]) -> str:
    """What `uv run` reads to install what a file needs (PEP 723)."""
    needed = sorted({_distribution(line) for line in imports if _module(line) not in sys.stdlib_module_names})
    versions = {one: ".".join(importlib.metadata.version(one).split(".")[:2]) for one in needed}
    named = "".join(f'#   "{one}>={versions[one]}",\n' for one in needed)
    return f'# /// script\n# requires-python = ">=3.11"\n# dependencies = [\n{named}# ]\n# ///\n'


def _distribution(line: str) -> str:
    """The package that an import comes from; several may share the first part of its name."""
    candidates = importlib.metadata.packages_distributions()[_module(line)]
    module, _, name = line.removeprefix("from ").removeprefix("import ").partition(" import ")
    path = module.partition(" as ")[0].replace(".", "/")
    files = [f"{one}{end}" for one in (f"{path}/{name}", path) for end in (".py", "/__init__.py")]
    for file in files if len(candidates) > 1 else []:
        for one in candidates:
            if file in {str(path) for path in importlib.metadata.files(one) or ()}:
                return one
    return candidates[0]


def _docstring(lesson: Lesson) -> str:
    comment = "\n".join(lesson.comment)
    return f'"""{lesson.title}.\n\n{comment}\n"""\n\n'
