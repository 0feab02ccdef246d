"""Names to code: backends of other distributions, processors by name, module and file."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_byoc.errors import BackendUnavailable, PluginError
from gpu_byoc.plugins import AUTO, backend_names, load_backend, load_processor
from gpu_byoc.processors import SHIPPED
from gpu_byoc.processors.green_tint import GreenTint
from tests.support.processes import free_port, get, post, running

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "stranger"
version = "1.0"
[project.entry-points."gpu_byoc.backends"]
stranger = "stranger:Stranger"
broken = "stranger:Missing"
absent = "no_such_module:Backend"
[tool.setuptools]
py-modules = ["stranger"]
"""

SOURCE = '''
"""numpy's work, done by a stranger."""
from gpu_byoc_backends.numpy_cpu import NumpyBackend

class Stranger(NumpyBackend):
    name = "stranger"
    device = "elsewhere"
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distribution really built and installed by pip, into a directory of its own."""
    project, target = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    (project / "pyproject.toml").write_text(PROJECT)
    (project / "stranger.py").write_text(SOURCE)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    run = subprocess.run([*pip, "--target", str(target), str(project)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return target


def test_a_strangers_backend_is_found_by_entry_point(installed: Path) -> None:
    port = free_port()
    arguments = ("serve", "--backend", "stranger", "--host", "127.0.0.1", "--port", str(port))
    with running(*arguments, env={"PYTHONPATH": str(installed)}) as worker:
        worker.wait_for("backend stranger on elsewhere")
        worker.wait_for("listening")
        assert post(port, "/", bytes(6))[1] == bytes([0, 80, 0] * 2)
        assert get(port, "/stream/status")[1]["backend"]["name"] == "stranger"
        assert worker.end() == 0


@pytest.mark.parametrize(
    ("name", "says"), [("broken", "stranger:Missing does not exist"), ("absent", "no module named 'no_such_module'")]
)
def test_a_broken_plug_in_is_told_from_a_missing_one(installed: Path, name: str, says: str) -> None:
    with running("serve", "--backend", name, "--port", "0", env={"PYTHONPATH": str(installed)}) as worker:
        assert says.lower() in worker.wait_for(name).lower()
        assert worker.popen.wait(30) == 2


def test_backends_are_listed_with_reasons(installed: Path) -> None:
    with running("backends", env={"PYTHONPATH": str(installed)}) as listing:
        assert listing.popen.wait(30) == 0
        listing._reader.join(30)
        lines = {line.split()[0]: line.split(None, 1)[1] for line in listing.log}
    assert lines["numpy"] == "opens"
    assert lines["stranger"] == "opens"
    assert "no_such_module" in lines["absent"]


def test_auto_knows_only_what_ships() -> None:
    assert set(AUTO) <= set(backend_names())
    assert AUTO[-1] == "numpy"
    with pytest.raises(BackendUnavailable, match="no backend named"):
        load_backend("nothing")


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_loads_by_name(name: str) -> None:
    assert load_processor(name).name == name  # type: ignore[union-attr]


def test_processors_by_module_and_by_file(tmp_path: Path) -> None:
    assert isinstance(load_processor("gpu_byoc.processors.green_tint:GreenTint"), GreenTint)
    file = tmp_path / "mine.py"
    file.write_text("from gpu_byoc import FrameProcessor\nclass A(FrameProcessor): ...\n")
    assert type(load_processor(str(file))).__name__ == "A"
    file.write_text(file.read_text() + "class B(FrameProcessor): ...\n")
    assert type(load_processor(f"{file}:B")).__name__ == "B"
    with pytest.raises(PluginError, match=r"say which processor, as file\.py:Class; found: A, B"):
        load_processor(str(file))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("blue_tint", "no processor named 'blue_tint'"),
        ("no_such_package.inner:Class", "no module named 'no_such_package.inner'"),
        ("json:Nothing", "json has no 'Nothing'"),
        ("json:JSONDecoder", "not a subclass"),
        ("missing.py:Class", "no such file"),
    ],
)
def test_what_is_no_processor(text: str, says: str) -> None:
    with pytest.raises(PluginError, match=says):
        load_processor(text)


@pytest.mark.skipif(importlib.util.find_spec("pytrickle") is not None, reason="a real pytrickle is installed")
def test_a_file_for_run_is_told_from_one_for_serve(tmp_path: Path) -> None:
    file = tmp_path / "processor.py"
    file.write_text("from pytrickle import FrameProcessor\n")
    with pytest.raises(PluginError, match=rf"needs 'pytrickle', .* or use `gpu-byoc run {file}`$"):
        load_processor(str(file))
    file.write_text("import no_such_library\n")
    with pytest.raises(PluginError, match=r"needs 'no_such_library', which is not installed$"):
        load_processor(str(file))


def test_a_processor_that_raises_when_it_is_made(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from gpu_byoc import FrameProcessor\nclass A(FrameProcessor):\n    def __init__(self): raise KeyError(1)\n"
    )
    with pytest.raises(
        PluginError, match=r"cannot be used: the mistake is in its code.*\n(?s:.*)KeyError: 1$"
    ) as caught:
        load_processor(str(file))
    assert "plugins.py" not in str(caught.value)
    file.write_text("raise SystemExit(3)\n")
    with pytest.raises(SystemExit):
        load_processor(str(file))


def test_a_processor_whose_import_fails_names_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match="needs_more needs 'no_such_library'"):
        load_processor("needs_more:Class")
