"""Green tint's kernels for GPUs: they compile for the GPUs they are meant for, and do the right thing to each byte."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpu_byoc.processors._green_tint_cuda import SOURCE
from tests.conftest import skip_or_fail


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_it_compiles_to_machine_code_without_a_gpu(arch: str) -> None:
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("cupy is not installed (pip install cupy-cuda12x)")
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        skip_or_fail("GPU_BYOC_REQUIRE_CUDA", f"cupy finds no NVRTC ({error})")
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
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True, timeout=150)
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


# --- the same in Triton, in processes of their own: whether it interprets is decided when it is imported


def with_triton(program: str, **environment: str) -> str:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install triton)")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


_INTERPRET = """
import numpy as np, torch
from gpu_byoc.processors._green_tint_triton import WORDS, tint
for pixels in [*range(1, 20), 4 * WORDS // 3, 4 * WORDS // 3 + 1, 5003]:
    for boost in (0, 1, 80, 254, 255):
        room = torch.zeros(pixels * 3 + 16, dtype=torch.uint8)
        before = np.random.default_rng(pixels + boost).integers(0, 256, (1, 1, pixels, 3), np.uint8)
        frames = room[: pixels * 3].view(1, 1, pixels, 3)
        frames.copy_(torch.from_numpy(before))
        tint(frames, boost)
        want = before.astype(int)
        want[..., 1] = np.minimum(want[..., 1] + boost, 255)
        np.testing.assert_array_equal(frames.numpy(), want)
        assert not room[pixels * 3 :].any()
print("equal")
"""


@pytest.mark.needs_torch
def test_triton_s_interpreter_equals_the_formula() -> None:
    assert with_triton(_INTERPRET, TRITON_INTERPRET="1") == "equal\n"


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gpu_byoc.processors._green_tint_triton import WORDS, _tint
source = ASTSource(
    fn=_tint,
    signature={"bytes_": "*u8", "vectors": "i32", "boost": "i32", "WORDS": "constexpr"},
    constexprs={"WORDS": WORDS},
    attrs={(0,): [["tt.divisibility", 16]]},
)
for arch in (80, 90):
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    loads, stores = (built.asm["ptx"].count(f"{kind}.global.v4.b32") for kind in ("ld", "st"))
    print(arch, built.asm["cubin"][:4] == b"\\x7fELF", loads, stores)
"""


def test_triton_compiles_to_machine_code_with_accesses_of_16_bytes(tmp_path: Path) -> None:
    """Two vectors a thread, each one load and one store."""
    if "TRITON_INTERPRET" in os.environ:
        pytest.skip("TRITON_INTERPRET is set")
    assert with_triton(_COMPILE, TRITON_CACHE_DIR=str(tmp_path)).split("\n") == ["80 True 2 2", "90 True 2 2", ""]


@pytest.mark.needs_torch
@pytest.mark.needs_cuda
def test_on_a_gpu_both_of_torch_s_kernels_equal_the_formula() -> None:
    import torch

    from gpu_byoc.processors._green_tint_cuda import torch_kernel, triton_kernel
    from gpu_byoc.processors.green_tint import GreenTint

    if importlib.util.find_spec("triton") is None:
        skip_or_fail("GPU_BYOC_REQUIRE_CUDA", "triton is not installed")
    for pixels in [*range(1, 40), 4096, 5003, 1920 * 1080]:
        before = np.random.default_rng(pixels).integers(0, 256, (1, 1, pixels, 3), np.uint8)
        for boost in (0, 1, 80, 254, 255):
            want = before.astype(int)
            want[..., 1] = np.minimum(want[..., 1] + boost, 255)
            for kernel in (triton_kernel, torch_kernel):
                frames = kernel(torch.from_numpy(before).cuda(), GreenTint.Params(boost))
                np.testing.assert_array_equal(frames.cpu().numpy(), want)
