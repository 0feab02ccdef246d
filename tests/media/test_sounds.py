"""Each codec of sound that is not copied, from a transport stream to Opus: when it is heard, how loud, and how much.

FFmpeg's encoders write what they can here. DTS and TrueHD come from ``sounds/``: a sine of 440 Hz in stereo, written
with ``ffmpeg -f lavfi -i sine=f=440:r=48000 -ac 2 -af volume=4 -strict -2 -c:a dca -b:a 384k`` (or ``-c:a truehd``).
"""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.layout import AudioLayout
from av.audio.resampler import AudioResampler
from numpy.typing import NDArray

from gpu_byoc.media import mpegts
from gpu_byoc.media.audio import DECODERS, AudioPacket, AudioTrack, OpusTranscoder, padded
from gpu_byoc.media.demux import Demuxer, Limits, Problem
from gpu_byoc.media.mpegts import CLOCK, AudioCodec, Stream
from gpu_byoc.media.sandbox import SandboxedReader
from tests.media.test_audio import OPUS_TICKS, bare, heard
from tests.support import clips

SOUNDS = Path(__file__).parent / "sounds"
CLICKS = [0.5, 1.25, 1.8]
FRAMES = {"ac3": 1536, "eac3": 1536, "mp2": 1152, "aac_latm": 1024, "pcm_bluray": 240}  # samples


def clicking(seconds: float = 2.2, layout: str = "stereo", rate: int = 48_000) -> AudioFrame:
    """Silence with a short loud tone at each of CLICKS, on all channels, from PTS CLOCK."""
    samples = np.zeros(int(seconds * rate), np.int16)
    for at in CLICKS:
        begin = int(at * rate)
        samples[begin : begin + 400] = 20_000 * np.sign(np.sin(np.arange(400) / 8))
    count = AudioLayout(layout).nb_channels
    frame = AudioFrame.from_ndarray(np.repeat(samples, count).reshape(1, -1), format="s16", layout=layout)
    frame.sample_rate, frame.pts = rate, rate
    return frame


def written(encoder: str, layout: str = "stereo", rate: int = 48_000, **options: str) -> bytes:
    """A transport stream with the clicks and nothing else, one coded frame a PES."""
    file = io.BytesIO()
    said = {"mpegts_copyts": "1", "pes_payload_size": "0"} | options
    with av.open(file, "w", format="mpegts", options=said) as out:
        sound: Any = out.add_stream(encoder, rate)
        sound.layout = layout
        if encoder in ("ac3", "eac3"):
            sound.bit_rate = 448_000
        if encoder == "pcm_bluray":
            sound.format = "s16"
        for frame in AudioResampler(sound.codec_context.format, layout, rate).resample(
            clicking(layout=layout, rate=rate)
        ):
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    return file.getvalue()


def packets(stream: bytes) -> list[AudioPacket]:
    demuxer = Demuxer()
    events = [*demuxer.feed(stream), *demuxer.finish()]
    assert [each for each in events if isinstance(each, Problem)] == []
    return [each for each in events if isinstance(each, AudioPacket)]


def source(codec: str) -> list[AudioPacket]:
    if codec == "s302m":
        return s302m()
    if codec == "aac_latm":
        return packets(written("aac", mpegts_flags="latm"))
    if codec == "pcm_bluray":
        data = written(codec, mpegts_m2ts_mode="1")  # Blu-ray's packets have four bytes before them
        return packets(b"".join(data[at + 4 : at + 192] for at in range(0, len(data), 192)))
    return packets(written(codec))


def s302m() -> list[AudioPacket]:
    """SMPTE 302M: per PES the bytes that follow, channels and bits, then samples from their lowest bit on, each
    with four bits of AES3."""
    wave = np.frombuffer(memoryview(clicking().planes[0]), np.uint16)[: 2 * int(2.2 * 48_000)]
    found = []
    for number, part in enumerate(np.split(wave, 55)):
        bits = (part[:, None] >> np.arange(16) & 1).astype(np.uint8)
        body = np.packbits(np.hstack([bits, np.zeros((len(part), 4), np.uint8)])).tobytes()
        head = len(body).to_bytes(2, "big") + bytes(2)  # two channels, 16 bits
        found.append(AudioPacket(head + body, CLOCK + number * CLOCK // 25, AudioTrack("s302m", 0, 0)))
    return found


def through(source: list[AudioPacket]) -> tuple[list[AudioPacket], OpusTranscoder]:
    transcoder = OpusTranscoder(source[0].track)
    return [each for packet in source for each in transcoder.convert(packet)] + transcoder.flush(), transcoder


def wave(packets: list[AudioPacket]) -> NDArray[np.float64]:
    """What a player of the Opus packets hears, -1 to 1, shape (samples, 2)."""
    context = AudioCodecContext.create("libopus", "r")
    context.sample_rate, context.layout = 48_000, AudioLayout("stereo")
    resampler, parts = AudioResampler("flt", "stereo", 48_000), []
    for packet in packets:
        for frame in context.decode(padded(bare(packet))):
            frame.pts = None
            parts += [part.to_ndarray().reshape(-1, 2) for part in resampler.resample(frame)]
    return np.concatenate(parts).astype(np.float64)


@pytest.mark.parametrize("codec", sorted({*FRAMES, "s302m"}))
def test_sound_is_heard_when_it_was_sent(codec: str) -> None:
    sent = source(codec)
    assert {each.track.codec for each in sent} == {codec}
    out, transcoder = through(sent)
    assert (transcoder.failures, transcoder.skipped) == (0, 0)
    assert {each.track for each in out} == {AudioTrack("opus", 48_000, 2)}
    assert {later.pts - earlier.pts for earlier, later in pairwise(out)} == {OPUS_TICKS}
    frame = max(FRAMES.get(codec, 1920), 312) * CLOCK // 48_000  # of the codec, or the delay of Opus
    assert abs(out[0].pts - sent[0].pts) <= frame
    assert heard(out) == pytest.approx(CLICKS, abs=0.006)


@pytest.mark.parametrize("codec", ["ac3", "eac3"])
@pytest.mark.parametrize("layout", ["mono", "5.1", "5.1(side)"])
def test_surround_becomes_stereo(codec: str, layout: str) -> None:
    out, transcoder = through(packets(written(codec, layout)))
    assert transcoder.failures == 0
    assert {each.track.channels for each in out} == {1 if layout == "mono" else 2}
    assert heard(out) == pytest.approx(CLICKS, abs=0.006)


@pytest.mark.parametrize("rate", [44_100, 32_000])
def test_other_rates_become_48_khz(rate: int) -> None:
    assert heard(through(packets(written("ac3", rate=rate)))[0]) == pytest.approx(CLICKS, abs=0.006)


@pytest.mark.parametrize("name", ["dca", "truehd"])
def test_sound_of_encoders_that_are_not_here(name: str) -> None:
    sent = packets((SOUNDS / f"{name}.ts").read_bytes())
    out, transcoder = through(sent)
    assert (transcoder.failures, transcoder.skipped) == (0, 0)
    assert {later.pts - earlier.pts for earlier, later in pairwise(out)} == {OPUS_TICKS}
    assert abs(out[0].pts - sent[0].pts) <= 512 * CLOCK // 48_000
    assert len(out) * 0.02 == pytest.approx(0.3 if name == "dca" else 0.2, abs=0.04)
    loud = wave(out)[2400:7200]
    assert np.abs(np.fft.rfft(loud[:, 0])).argmax() == 44, "440 Hz of 10 Hz each"
    assert 0.2 < np.sqrt((loud**2).mean()) < 0.5
    assert np.abs(loud[:, 0] - loud[:, 1]).max() < 0.05


@pytest.mark.parametrize("codec", ["ac3", "mp2", "aac_latm"])
@pytest.mark.parametrize("size", [100, 1000, 5000])
def test_frames_need_not_begin_where_packets_do(codec: str, size: int) -> None:
    """The same bytes cut anew; a packet's PTS is that of the first frame which begins in it."""
    begins, at = list[tuple[int, int]](), 0
    for each in source(codec):
        begins.append((at, each.pts))
        at += len(each.data)
    whole, track = b"".join(each.data for each in source(codec)), source(codec)[0].track
    cut = []
    for begin in range(0, len(whole), size):
        pts = next((pts for at, pts in begins if at >= begin), begins[-1][1])
        if any(begin <= at < begin + size for at, _ in begins):
            cut.append(AudioPacket(whole[begin : begin + size], pts, track))
        else:  # none begins in it, so it has no PTS: it goes with the one before
            cut[-1] = AudioPacket(cut[-1].data + whole[begin : begin + size], cut[-1].pts, track)
    out, transcoder = through(cut)
    assert (transcoder.failures, transcoder.skipped) == (0, 0)
    assert {later.pts - earlier.pts for earlier, later in pairwise(out)} == {OPUS_TICKS}
    assert heard(out) == pytest.approx(CLICKS, abs=0.006)


@pytest.mark.parametrize("codec", ["aac_latm", "truehd"])
def test_what_is_joined_in_the_middle_is_on_time_or_not_there(codec: str) -> None:
    """LATM says how it is coded now and then, TrueHD where it can be begun with."""
    sent = source(codec) if codec == "aac_latm" else packets((SOUNDS / "truehd.ts").read_bytes())
    late, _ = through(sent[1:])
    whole, _ = through(sent)
    assert late
    assert sent[1].pts - OPUS_TICKS < late[0].pts
    one, other = wave(whole), wave(late)
    shift = round((late[0].pts - whole[0].pts) * 48_000 / CLOCK)
    count = min(len(other), len(one) - shift) - 2400
    assert np.abs(one[shift + 1200 : shift + 1200 + count] - other[1200 : 1200 + count]).mean() < 0.05


def test_another_layout_in_mid_stream() -> None:
    """A broadcaster's 5.1 for a film and stereo for the news, on one PID."""
    first, second = packets(written("ac3", "5.1")), packets(written("ac3"))
    length = first[-1].pts - first[0].pts + 2880
    moved = [AudioPacket(each.data, each.pts + length, each.track) for each in second]
    out, transcoder = through([*first, *moved])
    assert transcoder.failures == 0
    assert heard(out) == pytest.approx([*CLICKS, *(at + length / CLOCK for at in CLICKS)], abs=0.006)
    assert all(later.pts > earlier.pts for earlier, later in pairwise(out))


@pytest.mark.parametrize("codec", sorted(DECODERS))
def test_noise_is_counted_and_not_kept(codec: AudioCodec) -> None:
    """A parser holds on to what it finds no frame in; there is an end to that. Good sound afterwards is heard."""
    noise = np.random.default_rng(1).bytes(1 << 20)
    transcoder = OpusTranscoder(AudioTrack(codec, 0, 0))
    for at in range(0, len(noise), 4096):
        transcoder.convert(AudioPacket(noise[at : at + 4096], CLOCK + at, transcoder.source))
        assert transcoder._decoder._fed - transcoder._decoder._cut <= 300_000
    zeros = AudioPacket(bytes(1 << 20), 20 * CLOCK, transcoder.source)
    transcoder.convert(zeros)
    assert transcoder._decoder._fed - transcoder._decoder._cut <= 300_000
    assert transcoder.failures > 0


def test_the_first_codec_does_not_overlap_with_the_next() -> None:
    sent = source("ac3")
    transcoder = OpusTranscoder(sent[0].track)
    out = [each for packet in sent[:30] for each in transcoder.convert(packet)]
    begins = sent[29].pts + 2880
    out += transcoder.flush(begins)
    assert begins - 2 * OPUS_TICKS < out[-1].pts < begins


REGISTERED = {b"AC-3": "ac3", b"EAC3": "eac3", b"BSSD": "s302m", b"DTS1": "dts", b"DTS3": "dts", b"AC-4": None}


@pytest.mark.parametrize(
    ("owner", "kind", "info", "codec"),
    [
        *((b"", 0x06, b"\x05\x04" + name, codec) for name, codec in REGISTERED.items()),
        *((b"", 0xC1, b"\x05\x04" + name, codec) for name, codec in REGISTERED.items()),
        *((b"", 0x06, bytes((tag, 1, 0)), codec) for tag, codec in ((0x6A, "ac3"), (0x7A, "eac3"), (0x7B, "dts"))),
        (b"", 0x06, b"", None),
        (b"", 0x06, b"\x56\x05engl\x09\x6a\x01\x00", "ac3"),
        (b"", 0x06, b"\x05\x02AC", None),
        *((owner, 0x81, b"", "ac3") for owner in (b"", b"HDMV", b"GA94")),
        *((owner, 0x87, b"", "eac3") for owner in (b"", b"HDMV", b"GA94")),
        *((b"HDMV", kind, b"", codec) for kind, codec in ((0x80, "pcm_bluray"), (0x84, "eac3"), (0x86, "dts"))),
        *((owner, 0x82, b"", codec) for owner, codec in ((b"", "dts"), (b"HDMV", "dts"), (b"GA94", None))),
        *((owner, 0x83, b"", codec) for owner, codec in ((b"", "truehd"), (b"HDMV", "truehd"), (b"SCTE", None))),
        *((owner, kind, b"", None) for owner in (b"", b"CUEI") for kind in (0x80, 0x84, 0x86)),
        (b"CUEI", 0x86, b"\x05\x04CUEI", None),
        (b"", 0x11, b"", "aac_latm"),
        (b"", 0x1B, b"\x05\x04AC-3", "h264"),
    ],
)
def test_what_a_pmt_says(owner: bytes, kind: int, info: bytes, codec: str | None) -> None:
    program = b"\x05\x04" + owner if owner else b""
    body = b"\xe1\x00\xf0" + bytes((len(program),)) + program + bytes((kind, 0xE1, 0x01, 0xF0, len(info))) + info
    (found,) = mpegts.pmt_streams(mpegts.section(2, 1, 0, body))
    assert (found.pid, found.type, found.codec) == (0x101, kind, codec)


@pytest.mark.parametrize("codec", ["aac", "aac_latm", "ac3", "dts", "eac3", "mp2", "opus", "s302m", "truehd"])
def test_a_pmt_of_ours_says_the_same(codec: AudioCodec) -> None:
    channels = 2 if codec == "opus" else 0
    (found,) = mpegts.pmt_streams(mpegts.pmt(0x100, 0, (Stream(0x101, 0, codec, channels),)))
    assert (found.codec, found.channels) == (codec, channels)


def test_the_core_beside_truehd_is_left_out() -> None:
    """Blu-ray has both on one PID."""
    ts = (SOUNDS / "truehd.ts").read_bytes()
    core = packets(written("ac3"))[0].data
    parts = clips.ts_packets(ts)
    first = next(number for number, part in enumerate(parts) if clips.pid(part) == 0x100 and clips.starts(part))
    pes = b"\0\0\1\xfd" + (8 + len(core)).to_bytes(2, "big") + b"\x80\x80\x05" + mpegts.stamp_bytes(2, 126_000) + core
    counter, mixed = clips.counter(parts[first]), b""
    for at in range(0, len(pes), 184):
        part = pes[at : at + 184]
        field = b"" if len(part) == 184 else (bytes((183 - len(part), 0)) + b"\xff" * 184)[: 184 - len(part)]
        head = bytes((0x47, (0 if at else 0x40) | 1, 0, (0x30 if field else 0x10) | counter))
        counter = counter + 1 & 15
        mixed += head + field + part
    rest = b""
    for part in parts[first:]:
        if clips.pid(part) == 0x100:
            part = part[:3] + bytes((part[3] & 0xF0 | counter,)) + part[4:]
            counter = counter + 1 & 15
        rest += part
    assert packets(b"".join(parts[:first]) + mixed + rest) == packets(ts)


@pytest.mark.parametrize("codec", ["ac3", "eac3", "mp2", "dca", "truehd"])
def test_in_the_sandbox_it_is_the_same(codec: str) -> None:
    stream = (SOUNDS / f"{codec}.ts").read_bytes() if codec in ("dca", "truehd") else clips.live_stream(25, audio=codec)
    expected, _ = through(packets(stream))
    reader = SandboxedReader(Limits(max_pixels=640 * 480))
    try:
        events = [*reader.feed(stream), *reader.finish()]
    finally:
        reader.close()
    assert [each for each in events if isinstance(each, AudioPacket)] == expected
    assert [each for each in events if isinstance(each, Problem)] == []
