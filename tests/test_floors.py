"""Imports go down only.

::

     5  cli   benchmarks   examples
     4  worker           checks             local
     3  engine   media   transport   bridge   plugins        (neighbours do not know each other)
     2  core   backend and processor contracts   processors
     1  frames  errors  config  logs  redact                 (standard library only)

        gpu_byoc_backends imports backend, frames, errors, processor; nothing imports it by name

Read from the source, so imports inside functions and under TYPE_CHECKING count too, and so do module names in strings
("gpu_byoc.worker.serve:run"), which is how a late import is written. ``gpu_byoc/__init__.py`` is exempt: it only
hands out names on first use, which the last tests check.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = {
    1: {"_version", "config", "errors", "frames", "logs", "redact"},
    2: {"backend", "core", "processor", "processors"},
    3: {"bridge", "engine", "media", "plugins", "transport"},
    4: {"checks", "local", "worker"},
    5: {"__main__", "benchmarks", "cli", "examples"},
}
FLOOR_OF = {part: floor for floor, parts in FLOORS.items() for part in parts}

# Steps that are allowed on one floor: who, and whom it may import.
SIDEWAYS = {
    "backend": {"processor"},
    "config": {"errors", "frames"},
    "frames": {"errors"},
    "logs": {"errors", "redact"},
    "processors": {"processor"},
    "__main__": {"cli"},
}
# Steps down that are not: who, whom it may not import, and why.
NEVER = {"local": {"engine": "it meets the worker only over HTTP, as a real network would"}}

BACKENDS = "gpu_byoc_backends"
BACKENDS_MAY = {"backend", "errors", "frames", "processor"}
STANDARD_LIBRARY_ONLY = {"_version", "config", "core", "errors", "frames", "logs", "redact"}
HEAVY = ["aiohttp", "av", "cupy", "numpy", "torch"]

# A module's name in a string; an entry point group or a logger's name is none.
MODULE_IN_A_STRING = re.compile(rf"({BACKENDS}|gpu_byoc\.({'|'.join(FLOOR_OF)}))(\.\w+)*(:\w+)?")


class Step(NamedTuple):
    """One import: the line, and the dotted name that is imported."""

    line: int
    target: str


def steps(source: str, package: str) -> Iterator[Step]:
    """Every import in ``source``, a module of ``package``, relative ones resolved.

    ``from gpu_byoc import x`` counts as ``gpu_byoc.x``.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Step(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            if base == "gpu_byoc":
                yield from (Step(node.lineno, f"gpu_byoc.{alias.name}") for alias in node.names)
            else:
                yield Step(node.lineno, base)
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_IN_A_STRING.fullmatch(node.value)
        ):
            yield Step(node.lineno, node.value.partition(":")[0])


def part_of(module: str) -> str:
    """``gpu_byoc.core.slots`` -> ``core``; ``gpu_byoc_backends.numpy_cpu`` -> ``gpu_byoc_backends``."""
    names = module.split(".")
    return names[1] if names[0] == "gpu_byoc" and len(names) > 1 else names[0]


def complaint(part: str, target: str) -> str | None:
    """The rule that ``part`` breaks by importing ``target``, or None."""
    top, there = target.split(".")[0], part_of(target)
    if top == BACKENDS:
        return None if part == BACKENDS else "backends are found by entry point; nothing imports them by name"
    if top != "gpu_byoc":
        foreign = part in STANDARD_LIBRARY_ONLY and top not in sys.stdlib_module_names
        return f"{part} uses the standard library only" if foreign else None
    if part == there or (FLOOR_OF.get(part) == 5 and there not in FLOOR_OF):
        return None  # inside one part; or the top floor using a public name
    if there not in FLOOR_OF:
        return f"{target} is no part: import a public name from the module it lives in, or give a new part a floor here"
    if part == BACKENDS:
        allowed = ", ".join(sorted(BACKENDS_MAY))
        return None if there in BACKENDS_MAY else f"a backend imports only {allowed}"
    if there in NEVER.get(part, {}):
        return f"{part} never imports {there}: {NEVER[part][there]}"
    if FLOOR_OF[there] == FLOOR_OF[part] and there not in SIDEWAYS.get(part, set()):
        return f"{part} and {there} are neighbours on floor {FLOOR_OF[part]} and do not know each other"
    if FLOOR_OF[there] > FLOOR_OF[part]:
        return f"imports go down only: {part} is on floor {FLOOR_OF[part]}, {there} on floor {FLOOR_OF[there]}"
    return None


def modules() -> Iterator[tuple[Path, str]]:
    """Every source file that has a floor, with its dotted name."""
    for folder, name in (
        ("gpu_byoc", "gpu_byoc"),
        ("backends", BACKENDS),
        ("benchmarks", "benchmarks"),
        ("examples", "examples"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            dotted = ".".join([name, *(inner[:-1] if inner[-1] == "__init__" else inner)])
            if dotted != "gpu_byoc":
                yield path, dotted


def test_imports_go_down_only() -> None:
    broken = []
    for path, module in modules():
        part = part_of(module)
        where = path.relative_to(ROOT)
        if part not in FLOOR_OF and part != BACKENDS:
            broken.append(f"{where}:1: {part} has no floor; give it one in tests/test_floors.py")
            continue
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for step in steps(path.read_text(encoding="utf-8"), package):
            rule = complaint(part, step.target)
            if rule:
                broken.append(f"{where}:{step.line}: imports {step.target}: {rule}")
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("gpu_byoc.core.slots", "from gpu_byoc.engine.engine import Engine", "go down only"),
        ("gpu_byoc.core.slots", "def f():\n    import gpu_byoc.worker.app", "go down only"),
        ("gpu_byoc.core.slots", "if TYPE_CHECKING:\n    from gpu_byoc.backend import Batch", "do not know each other"),
        ("gpu_byoc.core.slots", "import numpy", "standard library only"),
        ("gpu_byoc.frames", "from gpu_byoc.processor import FrameProcessor", "go down only"),
        ("gpu_byoc.engine.engine", "from ..transport import trickle_client", "do not know each other"),
        ("gpu_byoc.engine.engine", "from gpu_byoc import FrameSpec", "the module it lives in"),
        ("gpu_byoc.local.gateway", "from gpu_byoc.engine import engine", "never imports engine"),
        ("gpu_byoc.local.gateway", "import gpu_byoc.worker.serve", "do not know each other"),
        ("gpu_byoc.worker.serve", "import_module('gpu_byoc.local.demo')", "do not know each other"),
        ("gpu_byoc.plugins", "from gpu_byoc_backends.numpy_cpu import NumpyBackend", "by entry point"),
        ("gpu_byoc.cli", "load('gpu_byoc_backends.numpy_cpu:NumpyBackend')", "by entry point"),
        ("gpu_byoc_backends.numpy_cpu", "from gpu_byoc.core import slots", "a backend imports only"),
    ],
)
def test_a_step_up_or_sideways_is_noticed(module: str, source: str, words: str) -> None:
    found = [complaint(part_of(module), step.target) or "" for step in steps(source, module.rpartition(".")[0])]
    assert any(words in rule for rule in found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gpu_byoc.core.slots", "import heapq\nfrom gpu_byoc.errors import Overloaded\nfrom . import batching"),
        ("gpu_byoc.engine.engine", "import numpy\nfrom gpu_byoc.core.slots import Slots\nfrom gpu_byoc import errors"),
        ("gpu_byoc.local.gateway", "from gpu_byoc.transport import http\nfrom gpu_byoc.core import meter"),
        ("gpu_byoc_backends.torch_cuda", "import torch\nfrom .numpy_cpu import x\nfrom gpu_byoc.backend import Batch"),
        ("examples.tint", "from gpu_byoc import ArrayProcessor"),
    ],
)
def test_a_step_down_is_fine(module: str, source: str) -> None:
    found = [complaint(part_of(module), step.target) for step in steps(source, module.rpartition(".")[0])]
    assert found
    assert not any(found), found


def test_every_package_is_listed() -> None:
    """setuptools installs what is listed, so a forgotten folder would be missing only from the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for top in ("gpu_byoc", "backends") for path in (ROOT / top).rglob("*.py")}
    folders.add(ROOT / "benchmarks")  # what lies below it is run by other Pythons, and is data
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    installed = project["package-dir"]
    assert sorted(project["packages"]) == sorted(
        set(installed) | {name for name in names if name not in installed.values()}
    )
    assert all((folder / "__init__.py").exists() for folder in folders)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=150, check=False
    )


def test_importing_the_package_loads_nothing_heavy() -> None:
    done = python(f"import sys, gpu_byoc; print([name for name in {HEAVY} if name in sys.modules])")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_every_public_name_can_be_had() -> None:
    done = python("import gpu_byoc as g; print(all(getattr(g, name) is not None for name in g.__all__))")
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def test_a_bare_checkout_does_not_make_a_second_copy_of_the_backends() -> None:
    done = python("import backends")
    assert done.returncode == 1
    assert "ImportError: import gpu_byoc_backends, not backends" in done.stderr
