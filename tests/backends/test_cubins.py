"""Machine code compiled ahead: it is found for the GPU and the source it was made for, and for no other."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_byoc.processors import _cubins
from gpu_byoc.processors._green_tint_cuda import SOURCE


class _Cupy:
    """cupy as far as a kernel is made: what was asked of it."""

    def __init__(self, capability: str) -> None:
        self.cuda = SimpleNamespace(Device=lambda: SimpleNamespace(compute_capability=capability))

    def RawKernel(self, source: str, name: str, options: tuple[str, ...]) -> tuple[Any, ...]:  # noqa: N802 - cupy's name
        return "compiled", source, name, options

    def RawModule(self, path: str) -> Any:  # noqa: N802 - cupy's name
        return SimpleNamespace(get_function=lambda name: ("loaded", Path(path).read_bytes(), name))


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", _Cupy("90"))


@pytest.mark.usefixtures("h100")
def test_what_was_compiled_ahead_is_loaded(tmp_path: Path) -> None:
    _cubins.file_of("tint", "text", "90", tmp_path).write_bytes(b"code")
    assert _cubins.kernel("tint", "text", tmp_path) == ("loaded", b"code", "tint")


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize(("name", "source", "capability"), [("tint", "text", "80"), ("tint", "older", "90")])
def test_what_was_made_for_another_gpu_or_source_is_not(
    tmp_path: Path, name: str, source: str, capability: str
) -> None:
    _cubins.file_of(name, source, capability, tmp_path).write_bytes(b"code")
    assert _cubins.kernel("tint", "text", tmp_path) == ("compiled", "text", "tint", _cubins.OPTIONS)


@pytest.mark.parametrize("capability", _cubins.CAPABILITIES)
def test_green_tint_compiles_ahead_without_a_gpu(tmp_path: Path, capability: str) -> None:
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("cupy is not installed (pip install cupy-cuda12x)")
    path = _cubins.compile_ahead("green_tint", SOURCE, capability, tmp_path)
    assert path == _cubins.file_of("green_tint", SOURCE, capability, tmp_path)
    assert path.read_bytes()[:4] == b"\x7fELF"
    assert b"green_tint" in path.read_bytes()
