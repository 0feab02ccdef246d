"""``gpu-byoc run FILE.py``: the quickstart page's processor file, unmodified."""

from __future__ import annotations

import importlib
import logging
import runpy
import sys
from pathlib import Path
from types import ModuleType

from gpu_byoc.errors import PluginError
from gpu_byoc.plugins import blame
from gpu_byoc.processor import FrameProcessor
from gpu_byoc.worker import serve

log = logging.getLogger("gpu_byoc.run")

NAMES = ("FrameProcessor", "run_processor")


def run_file(path: Path) -> int:
    """Run ``path`` as ``__main__``, with ``from pytrickle import FrameProcessor, run_processor`` resolving to ours
    unless a real pytrickle has both names. In this process only.

    Raises:
        PluginError: no such file, it raised before it ran a processor, or it has ended without having run one.
    """
    if not path.is_file():
        raise PluginError(f"no such file: {path}")
    real = _provide_pytrickle()
    sys.argv = [str(path)]
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        runpy.run_path(str(path), run_name="__main__")
    except Exception as error:  # whatever the file raises is for its author
        if serve.has_run():
            raise
        blame(str(path), error)
    if not (real or serve.has_run()):
        raise PluginError(
            f"no processor was run: {path} has ended without it; let the file end in "
            f"asyncio.run(run_processor(YourProcessor())), or use `gpu-byoc serve --processor {path}`"
        )
    return 0


def _provide_pytrickle() -> bool:
    """Whether the file gets the real one."""
    try:
        real = importlib.import_module("pytrickle")
    except ModuleNotFoundError as error:
        if error.name != "pytrickle":
            raise PluginError(f"pytrickle is installed but needs {error.name!r}, which is not") from error
        real = None
    if real is not None and all(hasattr(real, name) for name in NAMES):
        log.info("pytrickle: the installed one has %s and is used", " and ".join(NAMES))
        return True
    ours = ModuleType("pytrickle", "Stands in for pytrickle with gpu_byoc's FrameProcessor and run_processor.")
    ours.__dict__.update(FrameProcessor=FrameProcessor, run_processor=serve.run_processor, __all__=list(NAMES))
    sys.modules["pytrickle"] = ours
    log.info("pytrickle: gpu_byoc answers for %s in this process", " and ".join(NAMES))
    return False
