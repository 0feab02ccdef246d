"""The examples that are ours: the vignette on every array library, and the vignette served."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.support.processes import example, free_port, post, running


@pytest.fixture(scope="module")
def vignette() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vignette_example", example("vignette.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def process(vignette: ModuleType, frames: Any, strength: int, xp: Any) -> Any:
    processor = vignette.Vignette()
    return processor.process_batch(frames, processor.Params(strength=strength), xp)


@pytest.mark.parametrize(("width", "height"), [(9, 7), (1, 1), (1, 5), (640, 3)])
def test_the_middle_stays_and_the_corners_get_darker(vignette: ModuleType, width: int, height: int) -> None:
    import array_api_compat.numpy as xp

    frames = np.full((2, height, width, 3), 200, np.uint8)
    dimmed = process(vignette, frames, 50, xp)
    assert dimmed.shape == frames.shape
    assert dimmed.dtype == np.uint8
    assert dimmed.max() in (199, 200)  # an even side has no pixel in its very middle
    for turned in (dimmed, dimmed[:, ::-1], dimmed[:, :, ::-1]):
        assert np.array_equal(turned, dimmed)
    assert (dimmed[:, 0, 0] == {True: 100, False: 150}[width > 1 and height > 1]).all() or (width, height) == (1, 1)
    assert np.array_equal(process(vignette, frames, 0, xp), frames)


def test_a_large_frame_does_not_overflow(vignette: ModuleType) -> None:
    import array_api_compat.numpy as xp

    frames = np.full((1, 1, 65535, 3), 255, np.uint8)
    dimmed = process(vignette, frames, 100, xp)[0, 0, :, 0].astype(int)
    assert (dimmed[0], dimmed[32767], dimmed[-1]) == (128, 255, 128)
    assert (np.diff(dimmed[:32768]) >= 0).all()


@pytest.mark.needs_torch
def test_torch_returns_the_same_bytes(vignette: ModuleType) -> None:
    import array_api_compat.numpy as numpy_xp
    import array_api_compat.torch as torch_xp
    import torch

    frames = np.random.default_rng(1).integers(0, 256, (2, 33, 20, 3), np.uint8)
    expected = process(vignette, frames, 70, numpy_xp)
    assert np.array_equal(process(vignette, torch.from_numpy(frames), 70, torch_xp).numpy(), expected)


def test_the_vignette_is_served_with_its_parameter() -> None:
    port = free_port()
    arguments = ("serve", "--processor", str(example("vignette.py")), "--backend", "numpy", "--host", "127.0.0.1")
    with running(*arguments, "--port", str(port)) as worker:
        worker.wait_for("listening")
        kind = "application/octet-stream; width=3; height=3; format=rgb24; strength=100"
        status, body = post(port, "/", bytes([100]) * 27, Content_Type=kind)
        assert status == 200
        assert list(body[::3]) == [0, 50, 0, 50, 100, 50, 0, 50, 0]
        assert post(port, "/", bytes(27), Content_Type=kind.replace("100", "101"))[0] == 422
