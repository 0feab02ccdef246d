"""Green tint for the device backends: in place on (N, H, W, 3) uint8, on the backend's current stream.

torch and cupy are imported when a kernel is called, never before.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from gpu_byoc.processors import _cubins

SOURCE: Final = r"""
// min(x, 255 - boost) + boost on every third byte from byte 1 on. A thread adds to 16 bytes at a time; because
// 16 % 3 == 1 and 4 % 3 == 1, word w of the thread's vector i starts at channel (i + w) % 3.
extern "C" __global__ void green_tint(unsigned char* bytes, unsigned long long size, unsigned int boost) {
    const unsigned int all = boost * 0x01010101u;
    const unsigned int step[3] = {all & 0x0000FF00u, all & 0xFF0000FFu, all & 0x00FF0000u};
    const unsigned long long vectors = size / 16;
    const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    const unsigned long long first = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (unsigned long long i = first; i < vectors; i += stride) {
        uint4 v = reinterpret_cast<uint4*>(bytes)[i];
        const unsigned int phase = i % 3;
        const unsigned int s0 = phase == 0 ? step[0] : phase == 1 ? step[1] : step[2];
        const unsigned int s1 = phase == 0 ? step[1] : phase == 1 ? step[2] : step[0];
        const unsigned int s2 = phase == 0 ? step[2] : phase == 1 ? step[0] : step[1];
        v.x = __vaddus4(v.x, s0);  // four bytes at once, each saturating at 255
        v.y = __vaddus4(v.y, s1);
        v.z = __vaddus4(v.z, s2);
        v.w = __vaddus4(v.w, s0);
        reinterpret_cast<uint4*>(bytes)[i] = v;
    }
    const unsigned long long rest = vectors * 16 + first;  // at most 15 bytes are left
    if (rest < size && rest % 3 == 1) {
        const unsigned int x = bytes[rest] + boost;
        bytes[rest] = x > 255u ? 255u : x;
    }
}
"""

THREADS: Final = 256
MAX_BLOCKS: Final = 1 << 16  # beyond 268 MB the threads loop


def triton_kernel(frames: Any, params: Any) -> Any:
    """One pass with 16-byte accesses, for torch. Needs triton, which torch's CUDA builds bring, and a C compiler."""
    if not (frames.is_cuda and frames.is_contiguous()) or frames.data_ptr() % 16:
        raise ValueError("the Triton kernel needs contiguous frames on a GPU, from a multiple of 16 bytes on")
    from gpu_byoc.processors._green_tint_triton import tint

    tint(frames, params.boost)
    return frames


def torch_kernel(frames: Any, params: Any) -> Any:
    """Two passes over the green channel, without temporaries; the limit keeps uint8 from wrapping."""
    frames[..., 1].clamp_(max=255 - params.boost).add_(params.boost)
    return frames


@cache
def _compiled(device: int) -> Any:
    """Once for each device: machine code belongs to the one that loaded it."""
    return _cubins.kernel("green_tint", SOURCE)


def cupy_kernel(frames: Any, params: Any) -> Any:
    """One pass with 16-byte accesses. ``frames`` is contiguous and starts at a multiple of 16 bytes."""
    import cupy
    import numpy as np

    if not frames.flags.c_contiguous or frames.data.ptr % 16:
        raise ValueError("the cupy kernel of green_tint needs contiguous frames from a multiple of 16 bytes on")
    blocks = min(MAX_BLOCKS, -(-frames.nbytes // (16 * THREADS)))
    kernel = _compiled(cupy.cuda.runtime.getDevice())
    kernel((blocks,), (THREADS,), (frames, np.uint64(frames.nbytes), np.uint32(params.boost)))
    return frames
