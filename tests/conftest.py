"""What every test may rely on: the two markers for things a machine may lack.

``needs_cuda``   skips without an NVIDIA GPU; fails without one when ``GPU_BYOC_REQUIRE_CUDA=1``
``needs_torch``  skips where torch is missing; fails there when ``GPU_BYOC_REQUIRE_TORCH=1`` (``make test TORCH=1``)

A test names what it needs and imports it inside the test or fixture, never at the head of the file: nothing heavy is
imported at collection, and every skipped test is listed by its name.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, settings

# Seconds on the wall say how busy the machine is, not what an example costs. The examples are the same ones in
# each run, so that a failure is of the code that changed; HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("gpu-byoc", settings.get_profile("search"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gpu-byoc"))

# Asks the driver itself, so neither torch nor cupy has to be there. In a process of its own, because a process that
# called cuInit cannot fork and use CUDA in the child. 0 devices and "no driver" are both 0.
_COUNT_GPUS = """
import ctypes
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    print(0)
    raise SystemExit from None
count = ctypes.c_int(0)
ready = cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
print(count.value if ready else 0)
"""


@functools.cache
def cuda_devices() -> int:
    """How many NVIDIA GPUs the driver offers; 0 without a driver."""
    probe = subprocess.run(
        [sys.executable, "-S", "-c", _COUNT_GPUS], capture_output=True, text=True, timeout=30, check=False
    )
    return int((probe.stdout or "0").strip())


def has_torch() -> bool:
    """Whether torch is installed, without importing it."""
    return importlib.util.find_spec("torch") is not None


def skip_or_fail(variable: str, reason: str) -> None:
    """Skip from inside a test or fixture, unless the environment says that this machine must have what is missing."""
    if os.environ.get(variable) == "1":
        pytest.fail(f"{reason}, and {variable}=1 says it must be there", pytrace=False)
    pytest.skip(reason)


def missing(item: pytest.Item) -> tuple[str, str] | None:
    """What ``item`` needs and this machine lacks: the variable that says it must be there, and the reason to skip."""
    if item.get_closest_marker("needs_torch") and not has_torch():
        return "GPU_BYOC_REQUIRE_TORCH", "torch is not installed (make test TORCH=1 installs it)"
    if item.get_closest_marker("needs_cuda") and cuda_devices() == 0:
        return "GPU_BYOC_REQUIRE_CUDA", "no NVIDIA GPU here"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip by mark, so that the summary lists the test's own file and not this one."""
    for item in items:
        lack = missing(item)
        if lack and os.environ.get(lack[0]) != "1":
            item.add_marker(pytest.mark.skip(reason=lack[1]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    lack = missing(item)
    if lack:  # not skipped by mark, so it is required
        skip_or_fail(*lack)
