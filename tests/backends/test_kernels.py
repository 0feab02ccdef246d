"""The CUDA source of green tint: it compiles for the GPUs it is meant for, and does the right thing to each byte."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gpu_byoc.processors._green_tint_cuda import SOURCE


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_it_compiles_to_machine_code_without_a_gpu(arch: str) -> None:
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("cupy is not installed (pip install cupy-cuda12x)")
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(SOURCE, "green_tint.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"-arch={arch}", "--std=c++17"))
        assert b"green_tint" in nvrtc.getCUBIN(program)
        ptx = str(nvrtc.getPTX(program))
        assert "ld.global.v4" in ptx
        assert "st.global.v4" in ptx, "16 bytes at a time"
    finally:
        nvrtc.destroyProgram(program)


# What CUDA provides, for a C++ compiler. A launch is a loop over its threads.
_HOST = """
#define __global__
struct uint4 { unsigned int x, y, z, w; };
struct Dim { unsigned int x; };
static Dim gridDim, blockDim, blockIdx, threadIdx;
static unsigned int __vaddus4(unsigned int a, unsigned int b) {
    unsigned int sum = 0;
    for (int shift = 0; shift < 32; shift += 8) {
        unsigned int byte = ((a >> shift) & 255u) + ((b >> shift) & 255u);
        sum |= (byte > 255u ? 255u : byte) << shift;
    }
    return sum;
}
%s
extern "C" void launch(unsigned int blocks, unsigned int threads, unsigned char* bytes, unsigned long long size,
                       unsigned int boost) {
    gridDim.x = blocks; blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            green_tint(bytes, size, boost);
}
"""


def test_the_source_run_on_the_cpu_equals_the_formula(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    source, library = tmp_path / "green_tint.cpp", tmp_path / "green_tint.so"
    source.write_text(_HOST % SOURCE)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True, timeout=50)
    launch = ctypes.CDLL(str(library)).launch
    launch.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_ulonglong, ctypes.c_uint]
    for pixels in [*range(1, 40), 4096, 5003]:
        for boost in (0, 1, 80, 254, 255):
            for blocks, threads in [(1, 16), (2, 32)]:  # few, so that threads loop; never fewer than 15 bytes of rest
                before = np.random.default_rng(pixels + boost).integers(0, 256, (pixels, 3), np.uint8)
                room = np.zeros(pixels * 3 + 32, np.uint8)
                at = -room.ctypes.data % 16  # as device memory is aligned
                held = room[at : at + pixels * 3]
                held[:] = before.reshape(-1)
                launch(blocks, threads, held.ctypes.data, held.size, boost)
                want = before.astype(int)
                want[:, 1] = np.minimum(want[:, 1] + boost, 255)
                np.testing.assert_array_equal(held.reshape(-1, 3), want)
                assert not room[:at].any()
                assert not room[at + pixels * 3 :].any()
