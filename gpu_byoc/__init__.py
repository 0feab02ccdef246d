"""GPU-accelerated processor runtime with pluggable backends for Livepeer BYOC.

Names are loaded on first use: ``import gpu_byoc`` loads none of numpy, torch, cupy, av or aiohttp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpu_byoc._version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from gpu_byoc.errors import BadParams, GpuByocError
    from gpu_byoc.frames import FrameSpec
    from gpu_byoc.processor import ArrayProcessor, FrameProcessor
    from gpu_byoc.worker.serve import run_processor

__all__ = [
    "ArrayProcessor",
    "BadParams",
    "FrameProcessor",
    "FrameSpec",
    "GpuByocError",
    "__version__",
    "run_processor",
]

_HOME = {
    "ArrayProcessor": "gpu_byoc.processor",
    "BadParams": "gpu_byoc.errors",
    "FrameProcessor": "gpu_byoc.processor",
    "FrameSpec": "gpu_byoc.frames",
    "GpuByocError": "gpu_byoc.errors",
    "run_processor": "gpu_byoc.worker.serve",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gpu_byoc' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
