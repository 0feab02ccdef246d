from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from av.audio.codeccontext import AudioCodecContext
from av.audio.format import AudioFormat
from av.audio.frame import AudioFrame
from av.audio.layout import AudioLayout
from numpy.typing import NDArray

from gpu_byoc.media.audio import AudioPacket, AudioTrack, OpusTranscoder, padded, track_of
from gpu_byoc.media.mpegts import CLOCK

MP2 = AudioTrack("mp2", 48_000, 2)
FRAME = 1152  # samples of MPEG audio layer II
OPUS_TICKS = CLOCK // 50


def mp2(seconds: float, clicks: list[float], rate: int = 48_000, channels: int = 2) -> list[AudioPacket]:
    """Silence with a short loud tone at each of ``clicks`` (seconds), from PTS 0, encoder delay taken off."""
    samples = np.zeros(int(seconds * rate), np.int16)
    for at in clicks:
        begin = int(at * rate)
        samples[begin : begin + 200] = 20_000 * np.sign(np.sin(np.arange(200) / 4))
    context = AudioCodecContext.create("mp2", "w")
    context.sample_rate, context.bit_rate = rate, 192_000
    context.layout, context.format = AudioLayout("stereo" if channels == 2 else "mono"), AudioFormat("s16")
    packets = []
    for number, at in enumerate(range(0, len(samples) - FRAME, FRAME)):
        block = np.repeat(samples[at : at + FRAME], channels).reshape(1, -1)
        frame = AudioFrame.from_ndarray(block, format="s16", layout="stereo" if channels == 2 else "mono")
        frame.sample_rate, frame.pts = rate, number * FRAME
        packets += context.encode(frame)
    track = AudioTrack("mp2", rate, channels)
    # The encoder's stamps are early by its own delay of 481 samples, so that what is heard is on time.
    return [AudioPacket(bytes(each), CLOCK + (each.pts or 0) * CLOCK // rate, track) for each in packets]


def bare(packet: AudioPacket) -> bytes:
    """The Opus packet behind its control header."""
    data = packet.data
    assert data[:2] == b"\x7f\xe0"
    at, size = 2, 0
    while data[at] == 255:
        at, size = at + 1, size + 255
    size += data[at]
    assert len(data) == at + 1 + size
    return data[at + 1 :]


def heard(packets: list[AudioPacket]) -> list[float]:
    """When sounds begin, in seconds after CLOCK, as a player of the Opus packets hears them."""
    context = AudioCodecContext.create("libopus", "r")
    context.sample_rate, context.layout = 48_000, AudioLayout("stereo")
    begins: list[float] = []
    for packet in packets:
        for frame in context.decode(padded(bare(packet))):
            loud = np.abs(frame.to_ndarray().astype(float)).max(axis=0).reshape(-1)
            level: NDArray[np.float64] = loud if frame.format.name.startswith("flt") else loud / 32768
            if frame.format.name == "s16":
                level = level.reshape(-1, 2).max(axis=1)
            for at in (level > 0.2).nonzero()[0]:
                time = (packet.pts - CLOCK) / CLOCK + at / 48_000
                if not begins or time - begins[-1] > 0.05:
                    begins.append(time)
    return begins


@pytest.mark.parametrize(("rate", "channels"), [(48_000, 2), (44_100, 2), (32_000, 1)])
def test_sound_keeps_its_time(rate: int, channels: int) -> None:
    clicks = [0.5, 1.25, 2.8]
    transcoder = OpusTranscoder(AudioTrack("mp2", rate, channels))
    packets = [out for each in mp2(3.2, clicks, rate, channels) for out in transcoder.convert(each)]
    packets += transcoder.flush()
    assert transcoder.failures == 0
    assert {each.track for each in packets} == {AudioTrack("opus", 48_000, channels)}
    assert {later.pts - earlier.pts for earlier, later in pairwise(packets)} == {OPUS_TICKS}
    assert heard(packets) == pytest.approx(clicks, abs=0.006)
    assert abs(packets[-1].pts + OPUS_TICKS - CLOCK - 3.2 * CLOCK) < 6 * OPUS_TICKS


def test_several_frames_in_a_packet() -> None:
    single = mp2(2.0, [0.7, 1.4])
    pairs = [AudioPacket(a.data + b.data, a.pts, a.track) for a, b in zip(single[::2], single[1::2], strict=False)]
    transcoder = OpusTranscoder(MP2)
    packets = [out for each in pairs for out in transcoder.convert(each)]
    assert heard(packets) == pytest.approx([0.7, 1.4], abs=0.006)


def test_a_gap_stays_a_gap_and_what_follows_is_on_time() -> None:
    single = mp2(3.0, [0.5, 2.5])
    transcoder = OpusTranscoder(MP2)
    packets = [out for each in single[:40] + single[70:] for out in transcoder.convert(each)]
    packets += transcoder.flush()
    assert heard(packets) == pytest.approx([0.5, 2.5], abs=0.006)
    steps = [later.pts - earlier.pts for earlier, later in pairwise(packets)]
    assert sum(step > OPUS_TICKS * 2 for step in steps) == 1
    assert min(steps) > 0


@pytest.mark.parametrize("drift", [0.98, 1.02])
def test_clocks_that_differ_do_not_pull_sound_away_from_video(drift: float) -> None:
    """Half a minute of a sender whose samples run 2 % fast or slow by its time stamps, 0.6 s in all."""
    single = mp2(0.5, [])
    transcoder, worst, times = OpusTranscoder(MP2), 0.0, [0]
    for number in range(1_250):
        pts = CLOCK + round(number * FRAME * CLOCK / 48_000 * drift)
        for out in transcoder.convert(AudioPacket(single[number % len(single)].data, pts, MP2)):
            worst = max(worst, abs(out.pts - pts))
            times.append(out.pts)
    assert worst < OPUS_TICKS + FRAME * CLOCK // 48_000 + OPUS_TICKS
    assert all(later > earlier for earlier, later in pairwise(times))
    assert (transcoder.skipped > 20) == (drift < 1)


def test_a_rate_that_is_no_fraction_of_48_khz_does_not_add_up_to_a_gap() -> None:
    """1,152 samples at 44.1 kHz are 1,253.9 at 48 kHz: a rounded count would be 20 ms behind within half a minute."""
    source = mp2(65, [], 44_100, 1)
    transcoder = OpusTranscoder(source[0].track)
    packets = [each for packet in source for each in transcoder.convert(packet)]
    assert len(packets) > 3200
    assert {later.pts - earlier.pts for earlier, later in pairwise(packets)} == {OPUS_TICKS}
    assert transcoder.skipped == 0


def test_what_cannot_be_decoded_is_counted() -> None:
    single = mp2(1.0, [])
    transcoder = OpusTranscoder(MP2)
    damaged = [AudioPacket(b"\x55" * 300, each.pts, MP2) if n == 5 else each for n, each in enumerate(single)]
    packets = [out for each in damaged for out in transcoder.convert(each)] + transcoder.flush()
    assert transcoder.failures == 1
    assert packets[-1].pts > CLOCK + CLOCK // 2


def test_nothing_in_nothing_out() -> None:
    assert OpusTranscoder(MP2).flush() == []


@pytest.mark.parametrize(
    ("codec", "data", "track"),
    [
        ("aac", "fff14c80", AudioTrack("aac", 48_000, 2)),
        ("aac", "fff95040", AudioTrack("aac", 44_100, 1)),
        ("aac", "fff15dc0", AudioTrack("aac", 22_050, 8)),
        ("mp2", "fffdb404", AudioTrack("mp2", 48_000, 2)),
        ("mp2", "fffb90c4", AudioTrack("mp2", 44_100, 1)),
        ("mp2", "fff3c4c4", AudioTrack("mp2", 24_000, 1)),
        ("aac", "fffdb404", None),  # layer is not 0
        ("mp2", "fff14c80", None),  # layer is 0
        ("aac", "fff17480", None),  # a rate that does not exist
        ("mp2", "fffdbc04", None),
        ("mp2", "ffed9004", None),  # a version that does not exist
        ("aac", "4c80", None),
        ("aac", "00000000", None),
    ],
)
def test_headers(codec: str, data: str, track: AudioTrack | None) -> None:
    assert codec in ("aac", "mp2")
    assert track_of("aac" if codec == "aac" else "mp2", bytes.fromhex(data), 0) == track
