"""Lists every API that an item names as native, with the stage found, in stages.txt.

`uv run tests/list_stages.py` rewrites it. A person reads it through once per version of the SDK and the command
line: is each stage right, and is a line missing that the item does, or there that it does not? test_native.py
fails when the file is not what is found.
"""

import sys

sys.path.insert(0, __file__.rpartition("tests")[0] or "..")

from common import find_cli, load_settings, sdk_version
from harness.stages import STAGES, api_name, api_stage

import ast
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "stages.txt"


def named(script: Path) -> Iterator[tuple[str, Any]]:
    """Each API that a script's native(...) calls name, with its item, without running an item.

    The calls are found in the source and their arguments evaluated where they stand: in the script's names, and
    those that the function around them imports.
    """
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    source = script.read_text(encoding="utf-8")
    headings = [(number, line[2:7]) for number, line in enumerate(source.splitlines(), 1) if HEADING.match(line)]
    for function in ast.parse(source).body:
        calls = [one for one in ast.walk(function) if isinstance(one, ast.Call) and ast.unparse(one.func) == "native"]
        names = dict(vars(module))
        for one in ast.walk(function) if calls else ():
            if isinstance(one, ast.ImportFrom):
                exec(ast.unparse(one), names)
        for call in sorted(calls, key=lambda one: one.lineno):
            item = [id for number, id in headings if number < call.lineno][-1]
            for argument in call.args[1:]:
                if isinstance(argument, ast.Starred) and isinstance(argument.value, ast.IfExp):
                    # What is named where the platform has it, as the newest does; else what stands in for it there.
                    yield from ((item, api) for api in eval(ast.unparse(argument.value.body), names))
                else:
                    yield item, eval(ast.unparse(argument), names)


HEADING = re.compile(r"# [A-Z]{2}-\d\d ")


def table() -> str:
    """The whole table: the versions, what is not GA, then each item's APIs in the order of its list."""
    cli = find_cli()
    assert cli
    version = subprocess.run([cli, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    found = [
        (item, api_stage(api, cli), api_name(api))
        for script in sorted(ROOT.glob("[01][0-9]_*.py"))
        for item, api in named(script)
    ]
    width = max(map(len, STAGES))
    rows = [f"{item}  {stage:<{width}}  {name}" for item, stage, name in found]
    return "\n".join(
        [
            f"Python SDK {sdk_version()}; {version}",
            "Rewritten by `uv run tests/list_stages.py`; to be read through after it.",
            "",
            f"{len(rows)} in all, of these not GA:",
            *[row for row, (_, stage, _) in zip(rows, found, strict=True) if stage != "GA"],
            "",
            "All:",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    load_settings()
    TABLE.write_text(table(), encoding="utf-8")
    print(f"Written: {TABLE.relative_to(ROOT)}")
