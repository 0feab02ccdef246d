"""Names to code: backends by entry point, processors by name, ``module:Class`` or ``file.py[:Class]``.

Nothing is imported to learn that it exists; only what was chosen is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from gpu_byoc.backend import Backend
from gpu_byoc.errors import BackendUnavailable, GpuByocError, PluginError
from gpu_byoc.processor import ArrayProcessor, FrameProcessor, Processor
from gpu_byoc.processors import SHIPPED

GROUP = "gpu_byoc.backends"

AUTO = ("cupy", "torch", "numpy")
"""What ``--backend auto`` tries, best first. Only ours: a stranger's code runs when it is asked for by name."""


def backend_names() -> dict[str, EntryPoint]:
    """Every backend that is installed, by name, without importing any."""
    return {point.name: point for point in entry_points(group=GROUP)}


def load_backend(name: str) -> type[Backend]:
    """The class behind a backend's name.

    Raises:
        BackendUnavailable: no such name, or its module does not import; says which of the two, and what to do.
    """
    known = backend_names()
    if name not in known:
        raise BackendUnavailable(
            f"no backend named {name!r}; installed: {', '.join(sorted(known)) or 'none'} "
            f"(a plug-in registers itself as an entry point in the group {GROUP!r})"
        )
    try:
        backend: type[Backend] = known[name].load()
    except ImportError as error:
        raise BackendUnavailable(f"backend {name!r} ({known[name].value}) does not import: {error}") from error
    except AttributeError as error:
        raise BackendUnavailable(f"backend {name!r}: {known[name].value} does not exist: {error}") from error
    return backend


def load_processor(text: str) -> Processor:
    """An instance of the processor that ``text`` names.

    Raises:
        PluginError: not found, does not import, or is not a processor.
    """
    target = SHIPPED.get(text, text)
    place, _, attribute = target.rpartition(":") if ":" in target else (target, "", "")
    if place.endswith(".py"):
        module = _from_file(Path(place))
    elif attribute:
        module = _from_module(place)
    else:
        raise PluginError(
            f"no processor named {text!r}; shipped: {', '.join(SHIPPED)}; or give module:Class or file.py:Class"
        )
    found = getattr(module, attribute, None) if attribute else _only_processor(module, text)
    if found is None:
        raise PluginError(f"{place} has no {attribute!r}")
    if not (inspect.isclass(found) and issubclass(found, FrameProcessor | ArrayProcessor)):
        raise PluginError(f"{text} is not a subclass of FrameProcessor or ArrayProcessor")
    try:
        processor: Processor = found()
    except Exception as error:  # whatever it raises is for its author
        blame(text, error)
    return processor


def blame(name: str, error: Exception) -> NoReturn:
    """Raise what a user's code raised as a PluginError that shows their part of the way there and none of ours; one of
    our own errors as it is."""
    if isinstance(error, GpuByocError):
        raise error
    trace = error.__traceback__
    while trace is not None and str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] in _OURS:
        trace = trace.tb_next
    shown = "".join(traceback.format_exception(type(error), error, trace)).rstrip()
    told = f"{name} cannot be used: the mistake is in its code, or in what that imports\n{shown}"
    raise PluginError(told) from error


_OURS = ("gpu_byoc", "importlib", "runpy", "_frozen_importlib", "_frozen_importlib_external")


def _from_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise PluginError(f"no module named {name!r}; is it installed, or on PYTHONPATH?") from error
        raise PluginError(f"{name} needs {error.name!r}, which is not installed") from error
    except Exception as error:  # whatever the module raises is for its author
        blame(name, error)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise PluginError(f"no such file: {path}")
    name = f"gpu_byoc_processor_{path.stem}"  # of its own, so that a file json.py does not become json
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # whatever the file raised: it is not left half imported
        del sys.modules[name]
        if isinstance(error, ModuleNotFoundError):
            instead = f"; install it, or use `gpu-byoc run {path}`" if error.name == "pytrickle" else ""
            raise PluginError(f"{path} needs {error.name!r}, which is not installed{instead}") from error
        if isinstance(error, Exception):
            blame(str(path), error)
        raise
    return module


def _only_processor(module: ModuleType, text: str) -> Any:
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, FrameProcessor | ArrayProcessor)
        and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        names = ", ".join(cls.__name__ for cls in classes) or "none"
        raise PluginError(f"{text}: say which processor, as file.py:Class; found: {names}")
    return classes[0]
