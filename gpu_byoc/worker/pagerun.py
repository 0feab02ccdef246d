"""``gpu-byoc run FILE.py``: the quickstart page's processor file, unmodified."""

from __future__ import annotations

import importlib
import logging
import runpy
import sys
from pathlib import Path
from types import ModuleType

from gpu_byoc.errors import PluginError
from gpu_byoc.processor import FrameProcessor
from gpu_byoc.worker.serve import run_processor

log = logging.getLogger("gpu_byoc.run")

NAMES = ("FrameProcessor", "run_processor")


def run_file(path: Path) -> int:
    """Run ``path`` as ``__main__``, with ``from pytrickle import FrameProcessor, run_processor`` resolving to ours
    unless a real pytrickle has both names. In this process only."""
    if not path.is_file():
        raise PluginError(f"no such file: {path}")
    _provide_pytrickle()
    sys.argv = [str(path)]
    sys.path.insert(0, str(path.parent.resolve()))
    runpy.run_path(str(path), run_name="__main__")
    return 0


def _provide_pytrickle() -> None:
    try:
        real = importlib.import_module("pytrickle")
    except ModuleNotFoundError as error:
        if error.name != "pytrickle":
            raise PluginError(f"pytrickle is installed but needs {error.name!r}, which is not") from error
        real = None
    if real is not None and all(hasattr(real, name) for name in NAMES):
        log.info("pytrickle: the installed one has %s and is used", " and ".join(NAMES))
        return
    ours = ModuleType("pytrickle", "Stands in for pytrickle with gpu_byoc's FrameProcessor and run_processor.")
    ours.__dict__.update(FrameProcessor=FrameProcessor, run_processor=run_processor, __all__=list(NAMES))
    sys.modules["pytrickle"] = ours
    log.info("pytrickle: gpu_byoc answers for %s in this process", " and ".join(NAMES))
