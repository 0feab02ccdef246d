"""Machine code of the CUDA kernels, compiled ahead for the common GPUs, so that a start waits for no compiler.

``python -m gpu_byoc.processors._cubins`` compiles with NVRTC into ``cubins/`` beside this file; it needs cupy's NVRTC
and no GPU. The build of the CUDA images runs it. A file's name holds a digest of what it was compiled from, so machine
code of an older source is never loaded. Where there is none for the GPU at hand, NVRTC compiles at the first call.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).with_name("cubins")

CAPABILITIES: Final = ("80", "86", "89", "90")
"""A100; A10 and RTX 30; L4, L40 and RTX 40; H100 and H200. As cupy says it: major and minor without a point."""

OPTIONS: Final = ("--std=c++17",)


def kernel(name: str, source: str, folder: Path = FOLDER) -> Any:
    """cupy's RawKernel of the function ``name`` for the current device."""
    import cupy

    path = file_of(name, source, cupy.cuda.Device().compute_capability, folder)
    if path.is_file():
        return cupy.RawModule(path=str(path)).get_function(name)
    return cupy.RawKernel(source, name, options=OPTIONS)


def file_of(name: str, source: str, capability: str, folder: Path = FOLDER) -> Path:
    """Where the machine code of ``source`` is, if it is, for GPUs of a compute capability such as ``90``."""
    digest = hashlib.sha256("\0".join((source, *OPTIONS)).encode()).hexdigest()[:16]
    return folder / f"{name}-{digest}.sm_{capability}.cubin"


def compile_ahead(name: str, source: str, capability: str, folder: Path = FOLDER) -> Path:
    """Write the machine code of one kernel. Raises nvrtc's error, with its log, where the source does not compile."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"-arch=sm_{capability}", *OPTIONS))
        code: bytes = nvrtc.getCUBIN(program)
    finally:
        nvrtc.destroyProgram(program)
    folder.mkdir(exist_ok=True)
    path = file_of(name, source, capability, folder)
    path.write_bytes(code)
    return path


def main() -> None:
    from gpu_byoc.processors import _green_tint_cuda

    for capability in CAPABILITIES:
        began = time.perf_counter()
        path = compile_ahead("green_tint", _green_tint_cuda.SOURCE, capability)
        print(f"{path.name}: {path.stat().st_size} bytes in {(time.perf_counter() - began) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
