from __future__ import annotations

import numpy as np
import pytest
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from gpu_byoc.errors import BadFrame, TooLarge
from gpu_byoc.frames import FrameSpec
from gpu_byoc.media.planes import Colour, FromSlot, ToSlot, covering
from tests.support import clips

BT601, BT709 = (0.299, 0.114), (0.2126, 0.0722)
MATRIX = {6: BT601, 1: BT709}


def frame(y: NDArray[np.uint8], u: int = 128, v: int = 128, *, matrix: int = 2, full: bool = False) -> VideoFrame:
    height, width = y.shape
    made = VideoFrame(width, height, "yuv420p")
    chroma = (np.full((height // 2, width // 2), value, np.uint8) for value in (u, v))
    for plane, values in zip(made.planes, (y, *chroma), strict=True):
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        rows[: values.shape[0], : values.shape[1]] = values
    made.colorspace, made.color_range = matrix, 2 if full else 1
    return made


def slot(spec: FrameSpec) -> NDArray[np.uint8]:
    return np.zeros(spec.nbytes, np.uint8)


def put(source: VideoFrame, spec: FrameSpec) -> NDArray[np.uint8]:
    """The slot's bytes, in one row."""
    out = slot(spec)
    ToSlot(spec).write(source, out.data)
    return out


def exact(y: NDArray[np.uint8], u: int, v: int, weights: tuple[float, float]) -> NDArray[np.float64]:
    """ITU-R BT.601/709: limited-range Y'CbCr to full-range R'G'B', shape (height, width, 3)."""
    kr, kb = weights
    kg = 1 - kr - kb
    luma, cb, cr = (y.astype(float) - 16) * 255 / 219, (u - 128) * 255 / 224, (v - 128) * 255 / 224
    red, blue = luma + 2 * (1 - kr) * cr, luma + 2 * (1 - kb) * cb
    return np.clip(np.stack([red, (luma - kr * red - kb * blue) / kg, blue], -1), 0, 255)


RAMP = np.tile(np.arange(16, 236, dtype=np.uint8), (64, 1))


def converted(source: VideoFrame) -> NDArray[np.uint8]:
    spec = FrameSpec(source.width, source.height)
    return put(source, spec).reshape(spec.shape)


@pytest.mark.parametrize("matrix", [1, 2, 6])
def test_greys_keep_black_and_white_and_have_no_hue(matrix: int) -> None:
    rgb = converted(frame(RAMP, matrix=matrix))
    assert rgb[0, 0].tolist() == [0, 0, 0]
    assert rgb[0, -1].tolist() == [255, 255, 255]
    assert (rgb == rgb[..., :1]).all()
    assert np.abs(rgb[..., 0] - exact(RAMP, 128, 128, BT601)[..., 0]).max() < 1


@pytest.mark.parametrize("matrix", [1, 6])
@pytest.mark.parametrize(("u", "v"), [(90, 200), (200, 100), (60, 60), (170, 170)])
def test_colours_are_right_to_three_of_255(matrix: int, u: int, v: int) -> None:
    error = converted(frame(RAMP, u, v, matrix=matrix)) - exact(RAMP, u, v, MATRIX[matrix])
    assert np.abs(error).max() < 3
    other = exact(RAMP, u, v, MATRIX[7 - matrix])
    assert np.abs(converted(frame(RAMP, u, v, matrix=matrix)) - other).max() > 6, "the other matrix is another colour"


@pytest.mark.parametrize(("lines", "weights"), [(64, BT601), (720, BT709)])
def test_what_names_no_matrix_is_read_by_its_height(lines: int, weights: tuple[float, float]) -> None:
    y = np.tile(RAMP[0], (lines, 1))
    assert np.abs(converted(frame(y, 90, 200)) - exact(y, 90, 200, weights)).max() < 3


def test_full_range_is_not_stretched() -> None:
    y = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    rgb = converted(frame(y, full=True))
    assert np.array_equal(rgb[..., 1], y)


@pytest.mark.parametrize("matrix", [1, 2, 6, 9])
@pytest.mark.parametrize("full", [False, True])
def test_there_and_back_shifts_nothing(matrix: int, full: bool) -> None:
    source = clips.frames(clips.remuxed())[30]
    source.colorspace, source.color_range = matrix, 2 if full else 1
    spec = FrameSpec(source.width, source.height)
    out = put(source, spec)
    back = FromSlot(spec, Colour.of(source)).frame(out.data)
    for one, other in zip(back.planes, source.planes, strict=True):
        planes = [np.frombuffer(memoryview(p), np.uint8).reshape(-1, p.line_size)[:, : p.width] for p in (one, other)]
        error = planes[0].astype(int) - planes[1]
        assert abs(error.mean()) < 1.2
        assert np.abs(error).mean() < 1.25


@pytest.mark.parametrize("format", ["rgb24", "bgr24", "rgba", "bgra", "gray"])
def test_every_format_of_a_slot(format: str) -> None:
    source = clips.picture(5)
    spec = FrameSpec(64, 48, format)
    out = put(source, spec)
    back = FromSlot(spec).frame(out.data)
    assert back.format.name == "yuv420p"
    assert np.abs(clips.luma(back) - clips.luma(source)).mean() < 2
    if format == "bgr24":
        assert np.array_equal(out.reshape(-1, 3)[:, ::-1], converted(source).reshape(-1, 3))
    if format == "rgba":
        assert (out.reshape(-1, 4)[:, 3] == 255).all()


def test_widths_that_need_padding_in_a_frame_have_none_in_a_slot() -> None:
    rgb = converted(frame(RAMP[:, :50]))
    assert rgb.shape == (64, 50, 3)
    assert np.abs(rgb[7, :, 1] - exact(RAMP, 128, 128, BT601)[7, :50, 1]).max() < 1


def test_another_size_is_covered_and_cropped_around_the_centre() -> None:
    y = np.full((120, 320), 60, np.uint8)
    y[:, 100:220] = 200  # the middle 120 columns
    spec = FrameSpec(60, 60)
    inner = put(frame(y), spec).reshape(spec.shape)[:, 2:-2]
    assert (abs(inner.astype(int) - 214) <= 2).all(), "only the middle is left, and its colour"
    wide = FrameSpec(160, 60)
    lit = (put(frame(y), wide).reshape(wide.shape)[30, :, 0] > 130).nonzero()[0]
    assert (abs(lit[0] - 50) <= 1, abs(lit[-1] - 109) <= 1) == (True, True)


@pytest.mark.parametrize(
    ("size", "target", "scaled"),
    [
        ((640, 360), (640, 360), (640, 360)),
        ((853, 480), (852, 480), (853, 480)),
        ((1280, 720), (512, 512), (911, 512)),
        ((720, 1280), (512, 512), (512, 911)),
        ((320, 240), (640, 480), (640, 480)),
    ],
)
def test_the_covering_size(size: tuple[int, int], target: tuple[int, int], scaled: tuple[int, int]) -> None:
    assert covering(*size, FrameSpec(*target)) == scaled


def test_a_ribbon_is_not_scaled_to_a_wall() -> None:
    with pytest.raises(TooLarge, match="16x4096"):
        covering(16, 4096, FrameSpec(640, 360))


def test_slots_of_another_length_and_odd_sides_are_refused() -> None:
    spec = FrameSpec(64, 48)
    with pytest.raises(BadFrame, match="9215"):
        ToSlot(spec).write(clips.picture(0), memoryview(bytearray(spec.nbytes - 1)))
    with pytest.raises(BadFrame, match="9217"):
        FromSlot(spec).frame(memoryview(bytearray(spec.nbytes + 1)))
    with pytest.raises(BadFrame, match="even"):
        FromSlot(FrameSpec(63, 48))


def test_a_frame_made_from_a_slot_does_not_look_at_it_again() -> None:
    spec = FrameSpec(64, 48)
    out = slot(spec)
    made = FromSlot(spec).frame(out.data)
    before = clips.luma(made)
    out[:] = 255
    assert np.array_equal(clips.luma(made), before)


def test_a_colour_that_is_given_is_believed() -> None:
    unsaid, spec = frame(RAMP, 90, 200), FrameSpec(RAMP.shape[1], RAMP.shape[0])
    out = slot(spec)
    ToSlot(spec).write(unsaid, out.data, Colour(matrix=1))
    assert np.array_equal(out, put(frame(RAMP, 90, 200, matrix=1), spec))
    assert not np.array_equal(out, put(unsaid, spec))
