"""Images: exact where the format is, within rounding where it is not, and only client errors for anything else."""

from __future__ import annotations

import base64
import math
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpu_byoc.errors import BadFrame, CorruptImage, TooLarge, UnsupportedMedia
from gpu_byoc.frames import FrameSpec
from gpu_byoc.media import images, png
from gpu_byoc.media.images import JPEG, PNG

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

LIMIT = 1 << 22  # pixels
REFUSALS = (CorruptImage, TooLarge, UnsupportedMedia)

# 17x9 pixels of one colour, written by libjpeg (Pillow 12, quality 98): (the colour, the file in base 85).
JPEGS: Mapping[str, tuple[tuple[int, int, int], str]] = {
    "progressive": (
        (10, 200, 30),
        "|JeWF01!$>Nk#wx0RR9200961|JwjV009930RaI40RaI40RaI40s#R50RaL50RaL60s;a80s;a90|WyD0|NsB0s{mC0|W#F1Ox&D"
        "1qB2I1q1{H1pnIrLjeH+0RaI40s#R61OoyC1Ox;G1Ox;G1Ox;G1Ox;G1Ox;G1Ox;G1Ox;G1Ox;G1Ox;G1Ox;G1Ox;G1Ox;G1O)%W"
        "01*fP2>=lT0U`hb5di}c0sq7R6#xMN00000000000000000005|HJ?m0RaI4000000000000000000OH|Jncy0|5X65CaeZ00EvN"
        "yt@Pc!~hf!0RR91000000000000000AphC`2mt{A0R;kI|HJ?k5di=I00000000000000001*G$00;pC0RcY&KmWu46cGUc00000"
        "0000000000000pG+5iXv0s#R(0YCr502B}b0000000000000000000W|Jncu0RaF8KLTI>!~hf!0RR91000000000000000AphC`"
        "2mt{A0Y4#M|Jncy0|5X600RI301yBV|HJ?k5di=I00000000000000001*G$00;pC0RcY{KmWu46cGUc000000000000000000pG"
        "+5iXv0s#R(5I_IK02B}b0000000000000000000W|Jncu0RaF3KM-I4*#",
    ),
    "grey": (
        (124, 124, 124),
        "|JeWF01!$>Nk#wx0RR9200961|JwjV009930RaI40RaI40RaI40s#R50RaL50RaL60s;a80s;a90|WyD0|NsB0s{mC0|W#F1Ox&D"
        "1qB2I1q1{H1pmMQ3kU!S01*KJ5di<h02KfM0RR910000000000000002LHqW6c7Ob00000000000000000030+5iXv0RR9$0G|LK"
        "|Je",
    ),
    "cmyk": (
        (10, 200, 30),
        "|JeWT01iQ9Z(?NtWB>pF0095n07C!)0RaI40RaI40RaI40RaL50RaI40s#R50s;a80s;a80s{jC0|NsC0|EjA1Oo#E1Ox;G0s{pF"
        "1Ox>H1Ox>CzyK5o00{sQ1Va%3O%VWD5dcdO0RO}Q6#xMN0000000000000000000A|HJ?k5CH%H0000000000000000095m01gC0"
        "08Ic{080P>KLCXFAS1nh0000001yA!",
    ),
    "components are R, G, B": (
        (10, 200, 30),
        "|JeWT01iQ9Z(?NtWB>pF0095n07C!)0RaI40RaI40RaI40RaL50RaI40s#R50s;a80s;a80s{jC0|NsC0|EjA1Oo#E1Ox;G0s{pF"
        "1Ox>H1Ox>CzyJ{l00{sQ15yzHM-c!*5di<h02KfM0RR910000000000000003jf3a6c7Ob00000000000000000030+5ij#QUFH)"
        "LI40i0EG1*BfJ0r00;ls",
    ),
}


def decode(data: bytes | bytearray, content_type: str, limit: int = LIMIT) -> Pixels:
    spec = images.probe(data, content_type, limit)
    out = np.full(spec.nbytes, 0xA5, np.uint8)
    images.decode_into(data, spec, memoryview(out.data), content_type)
    return out.reshape(spec.shape)


def encode(pixels: Pixels, content_type: str) -> bytes:
    height, width, _ = pixels.shape
    return images.encode(np.ascontiguousarray(pixels).data, FrameSpec(width, height), content_type)


def smooth(width: int, height: int) -> Pixels:
    """A gradient in every channel: a picture on which JPEG loses little."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(kind + content))


def png_file(
    width: int, height: int, depth: int, color: int, data: bytes, extra: bytes = b"", interlace: int = 0
) -> bytes:
    ihdr = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    return png.SIGNATURE + chunk(b"IHDR", ihdr) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def unfiltered(samples: Any) -> bytes:
    """Rows of big-endian samples, each behind filter byte 0, deflated."""
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in samples))


# --- what comes back


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))))
def test_png_is_exact(pixels: Pixels) -> None:
    assert np.array_equal(decode(encode(pixels, PNG), PNG), pixels)


@given(st.integers(1, 70), st.integers(1, 70), st.tuples(*[st.integers(0, 255)] * 3))
def test_jpeg_keeps_a_flat_colour_within_two(width: int, height: int, colour: tuple[int, int, int]) -> None:
    pixels = np.full((height, width, 3), colour, np.uint8)
    assert np.abs(decode(encode(pixels, JPEG), JPEG).astype(int) - pixels).max() <= 2


def test_jpeg_keeps_the_page_colour_and_the_ends_of_the_range() -> None:
    for colour in ((10, 200, 30), (0, 0, 0), (255, 255, 255)):
        pixels = np.full((48, 64, 3), colour, np.uint8)
        assert np.abs(decode(encode(pixels, JPEG), JPEG).astype(int) - pixels).max() <= 2


def test_jpeg_is_good_and_has_colours_in_full_resolution() -> None:
    pixels = smooth(320, 240)
    pixels[:, ::2, 0] ^= 64  # red lines one pixel wide: 4:2:0 would average them away
    data = encode(pixels, JPEG)
    error = np.mean((decode(data, JPEG).astype(float) - pixels) ** 2)
    assert 10 * math.log10(255**2 / error) > 40
    assert data[6:10] == b"JFIF"
    assert b"Lavc" not in data


def test_content_type_may_have_parameters_and_capitals() -> None:
    pixels = smooth(8, 6)
    assert np.array_equal(decode(encode(pixels, "Image/PNG; boost=40"), "image/png;boost=40"), pixels)


@pytest.mark.parametrize("name", JPEGS)
def test_other_writers_jpegs(name: str) -> None:
    colour, text = JPEGS[name]
    pixels = decode(base64.b85decode(text), JPEG)
    assert pixels.shape == (9, 17, 3)
    assert np.abs(pixels.astype(int) - colour).max() <= 2


def test_a_jpeg_inside_a_larger_file_with_metadata() -> None:
    plain = encode(smooth(32, 32), JPEG)
    thumbnail = b"Exif\0\0" + plain
    exif = b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail
    fill = b"\xff" * 40
    data = plain[:2] + exif + fill + plain[2:] + b"another picture follows" + plain
    assert np.array_equal(decode(data, JPEG), decode(plain, JPEG))


GREY = np.arange(12 * 10, dtype=np.uint8).reshape(10, 12)


@pytest.mark.parametrize(
    ("depth", "color", "samples", "expected"),
    [
        pytest.param(8, 0, GREY, np.dstack([GREY] * 3), id="grey"),
        pytest.param(8, 4, np.dstack([GREY, 255 - GREY]), np.dstack([GREY] * 3), id="grey and alpha"),
        pytest.param(
            8, 6, np.dstack([GREY, GREY + 1, GREY + 2, np.zeros_like(GREY)]),
            np.dstack([GREY, GREY + 1, GREY + 2]), id="alpha 0 is dropped, not blended",
        ),
    ],
)  # fmt: skip
def test_pngs_that_are_not_rgb(depth: int, color: int, samples: Any, expected: Pixels) -> None:
    data = png_file(12, 10, depth, color, unfiltered(samples))
    assert np.array_equal(decode(data, PNG), expected)


def test_a_palette_png() -> None:
    colours = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)
    data = png_file(12, 10, 8, 3, unfiltered(GREY), extra=chunk(b"PLTE", colours.tobytes()))
    assert np.array_equal(decode(data, PNG), colours[GREY])


def test_a_one_bit_png() -> None:
    bits = np.random.default_rng(2).integers(0, 2, (10, 12), np.uint8)
    data = png_file(12, 10, 1, 0, unfiltered(np.packbits(bits, axis=1)))
    assert np.array_equal(decode(data, PNG), np.dstack([bits * 255] * 3))


def test_sixteen_bits_become_eight() -> None:
    samples = np.random.default_rng(3).integers(0, 65536, (10, 12, 3), np.uint16)
    data = png_file(12, 10, 16, 2, unfiltered(samples.astype(">u2")))
    assert np.abs(decode(data, PNG).astype(int) - samples / 257).max() < 2  # the scaler cuts, and rounds by a pattern


@pytest.mark.parametrize(("width", "height"), [(12, 10), (1, 1), (3, 2), (5, 9)])
def test_an_interlaced_png(width: int, height: int) -> None:
    pixels = smooth(width, height)
    rows = b""
    for left, top, across, down in png._ADAM7:
        for row in pixels[top::down, left::across]:
            rows += b"\0" + row.tobytes() if row.size else b""
    data = png_file(width, height, 8, 2, zlib.compress(rows), interlace=1)
    assert np.array_equal(decode(data, PNG), pixels)


def test_a_png_in_many_chunks_with_notes_between_header_and_data() -> None:
    pixels = smooth(16, 16)
    packed = unfiltered(pixels.reshape(16, -1))
    note = chunk(b"tEXt", b"Comment\0hello")
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0))
    pieces = b"".join(chunk(b"IDAT", packed[i : i + 7]) for i in range(0, len(packed), 7))
    data = png.SIGNATURE + ihdr + note + pieces + chunk(b"IEND", b"")
    assert np.array_equal(decode(data, PNG), pixels)


def test_threads_do_not_disturb_one_another() -> None:
    pictures = [np.roll(smooth(30 + n, 20 + n), n, axis=2) for n in range(8)]
    expected = [decode(encode(picture, JPEG), JPEG) for picture in pictures]
    gate = threading.Barrier(4)

    def work(_: int) -> list[Pixels]:
        gate.wait(10)
        return [decode(encode(picture, kind), kind) for kind in (JPEG, PNG) for picture in pictures]

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(work, range(4)):
            assert all(np.array_equal(a, b) for a, b in zip(results, expected + pictures, strict=True))


# --- what is refused


def test_a_pixel_bomb_is_refused_from_its_header() -> None:
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", 65535, 65535, 8, 2, 0, 0, 0))
    sof = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 65535, 65535, 3) + bytes([1, 17, 0, 2, 17, 0, 3, 17, 0])
    began = time.thread_time()
    for data, kind in ((png.SIGNATURE + ihdr, PNG), (b"\xff\xd8" + sof, JPEG)):
        with pytest.raises(TooLarge, match="65535x65535"):
            images.probe(data, kind, 1 << 26)
    assert time.thread_time() - began < 0.5


def test_a_png_side_beyond_the_frame_limit_is_too_large_whatever_the_pixel_limit() -> None:
    data = png.SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 65536, 1, 8, 2, 0, 0, 0))
    with pytest.raises(TooLarge):
        images.probe(data, PNG, 1 << 40)


def test_compressed_text_is_not_inflated() -> None:
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9))
    pixels = smooth(16, 16)
    data = png_file(16, 16, 8, 2, unfiltered(pixels.reshape(16, -1)), extra=bomb)
    stored = png.stored(memoryview(data))
    assert len(stored) < 2000
    assert np.array_equal(decode(data, PNG), pixels)


def test_image_data_that_inflates_to_more_than_the_header_says_is_refused_without_inflating_it() -> None:
    data = png_file(16, 16, 8, 2, zlib.compress(bytes(64 << 20), 9))
    began = time.thread_time()
    with pytest.raises(CorruptImage, match="more than 784"):
        decode(data, PNG)
    assert time.thread_time() - began < 0.5


ROWS = unfiltered(smooth(16, 16).reshape(16, -1))
RAW = zlib.decompress(ROWS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(zlib.compress(RAW[:-1]), "783 bytes where its header needs exactly 784", id="a byte short"),
        pytest.param(ROWS[:-4], "exactly 784", id="no checksum"),
        pytest.param(ROWS[:-4] + b"abcd", "cannot be inflated", id="wrong checksum"),
        pytest.param(zlib.compress(RAW + b"x"), "more than 784", id="a byte too many"),
        pytest.param(zlib.compress(b"\x05" + RAW[1:]), "filter", id="unknown filter"),
        pytest.param(b"", "0 bytes", id="empty"),
    ],
)
def test_png_data_that_the_decoder_would_let_pass(data: bytes, message: str) -> None:
    with pytest.raises(CorruptImage, match=message):
        decode(png_file(16, 16, 8, 2, data), PNG)


def test_a_wrong_chunk_checksum() -> None:
    good = png_file(16, 16, 8, 2, ROWS)
    at = good.index(b"IDAT") + 4 + len(ROWS)
    with pytest.raises(CorruptImage, match="IDAT"):
        decode(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :], PNG)


def test_a_jpeg_without_some_of_its_scans() -> None:
    data = base64.b85decode(JPEGS["progressive"][1])
    first = data.index(b"\xff\xda")
    second = data.index(b"\xff\xda", first + 2)
    assert data[first + 4] == 3  # libjpeg's first scan has all components, the later ones have one each
    with pytest.raises(CorruptImage, match="image data"):
        decode(data[:first] + b"\xff\xd9", JPEG)
    one_only = data[:first] + data[second:]
    scans = one_only.split(b"\xff\xda")
    with pytest.raises(CorruptImage, match="2 components"):
        decode(scans[0] + b"\xff\xda" + scans[1] + b"\xff\xd9", JPEG)


def test_a_jpeg_that_ends_early() -> None:
    data = encode(smooth(64, 64), JPEG)
    for cut in (len(data) // 2, len(data) - 2, len(data) - 1):
        with pytest.raises(CorruptImage):
            decode(data[:cut], JPEG)
    with pytest.raises(CorruptImage):
        decode(data[: len(data) // 2] + b"\xff\xd9", JPEG)


def test_too_many_scans_are_refused_before_decoding() -> None:
    data = base64.b85decode(JPEGS["progressive"][1])
    last = data.rindex(b"\xff\xda")
    with pytest.raises(CorruptImage, match="too many"):
        decode(data[:last] + data[last:-2] * 100 + b"\xff\xd9", JPEG)


def test_types() -> None:
    jpeg, png_data = encode(smooth(8, 8), JPEG), encode(smooth(8, 8), PNG)
    with pytest.raises(UnsupportedMedia, match="image/webp"):
        images.probe(jpeg, "image/webp", LIMIT)
    with pytest.raises(UnsupportedMedia, match="no content type"):
        images.probe(jpeg, "", LIMIT)
    with pytest.raises(UnsupportedMedia, match="is image/png"):
        images.probe(png_data, JPEG, LIMIT)
    with pytest.raises(CorruptImage, match="begin"):
        images.probe(b"GIF89a", JPEG, LIMIT)
    with pytest.raises(UnsupportedMedia, match="0xc9"):
        images.probe(jpeg.replace(b"\xff\xc0", b"\xff\xc9"), JPEG, LIMIT)
    with pytest.raises(UnsupportedMedia):
        images.encode(memoryview(bytes(12)), FrameSpec(2, 2), "image/gif")


def test_the_slot_must_fit() -> None:
    data = encode(smooth(8, 8), PNG)
    with pytest.raises(BadFrame, match="100 bytes"):
        images.decode_into(data, FrameSpec(8, 8), memoryview(bytearray(100)), PNG)
    with pytest.raises(BadFrame):
        images.encode(memoryview(bytes(100)), FrameSpec(8, 8), PNG)
    with pytest.raises(CorruptImage, match="8x8"):
        images.decode_into(data, FrameSpec(4, 16), memoryview(bytearray(192)), PNG)


SAMPLES = {
    "png": (encode(smooth(24, 17), PNG), PNG),
    "jpeg": (encode(smooth(24, 17), JPEG), JPEG),
    "progressive": (base64.b85decode(JPEGS["progressive"][1]), JPEG),
    "cmyk": (base64.b85decode(JPEGS["cmyk"][1]), JPEG),
}


@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_damaged_files_are_refused_or_decoded_and_nothing_else(name: str, data: st.DataObject) -> None:
    original, kind = SAMPLES[name]
    damaged = bytearray(original[: data.draw(st.integers(0, len(original)), "length")])
    for _ in range(data.draw(st.integers(0, 4), "flips")):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1), "at")] ^= data.draw(st.integers(1, 255), "bits")
    try:
        pixels = decode(damaged, kind)
    except REFUSALS:
        return
    assert pixels.dtype == np.uint8


@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_truncated_files_are_always_refused(name: str, data: st.DataObject) -> None:
    original, kind = SAMPLES[name]
    with pytest.raises(REFUSALS):
        decode(original[: data.draw(st.integers(0, len(original) - 1))], kind)


@given(st.sampled_from([(png.SIGNATURE, PNG), (b"\xff\xd8\xff", JPEG)]), st.binary(max_size=200))
def test_noise_behind_a_signature(start: tuple[bytes, str], noise: bytes) -> None:
    try:
        decode(start[0] + noise, start[1])
    except REFUSALS:
        pass


@pytest.mark.parametrize(
    "byte", [b"\xff", b"\x00", b"\xff\xe0\x00\x02", b"\xff\xda\x00\x02", b"\x00\x00\x00\x00IDAT\x35\xaf\x06\x1e"]
)
def test_a_megabyte_of_the_same_is_no_work(byte: bytes) -> None:
    filler = byte * (1_000_000 // len(byte))
    starts = [(b"\xff\xd8\xff\xe0\x00\x02", JPEG), (png_file(8, 8, 8, 2, b"")[:33], PNG)]
    for start, kind in starts:
        began = time.thread_time()
        with pytest.raises(REFUSALS):
            decode(start + filler, kind)
        assert time.thread_time() - began < 1.0


def test_nothing_is_printed(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(encode(smooth(64, 64), JPEG)[:-300] + b"\xff\xd9")
    code = f"""
import sys
from gpu_byoc.errors import CorruptImage
from gpu_byoc.media import images
data = open({str(tmp_path / "cut.jpg")!r}, "rb").read()
spec = images.probe(data, "image/jpeg", 1 << 22)
try:
    images.decode_into(data, spec, memoryview(bytearray(spec.nbytes)), "image/jpeg")
except CorruptImage:
    sys.exit(7)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (7, "", "")
