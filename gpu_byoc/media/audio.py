"""Audio of a transport stream: what its headers say, and its way to Opus where it cannot stay as it is.

Header fields: ADTS is ISO/IEC 13818-7 6.2, MPEG audio ISO/IEC 11172-3 2.4.1.3 and 13818-3 2.4.2.3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, cast

import av
import av.error
from av.audio.codeccontext import AudioCodecContext
from av.audio.fifo import AudioFifo
from av.audio.format import AudioFormat
from av.audio.frame import AudioFrame
from av.audio.layout import AudioLayout
from av.audio.resampler import AudioResampler

from gpu_byoc.media.mpegts import CLOCK, AudioCodec

PADDING: Final = 64
"""Zeros behind what goes to a decoder; FFmpeg's bit readers look ahead."""
OPUS_RATE: Final = 48_000
_OPUS_FRAME: Final = 960  # samples, 20 ms: what the Opus encoder makes of one call
_OPUS_BITS: Final = 64_000  # a second and channel; RFC 7587 3.1.1 recommends 48 to 128 kbit/s for music in stereo
_MOST_HELD: Final = 256 << 10  # bytes that a parser keeps; the largest frame is one of DTS-HD, under 64 KiB
_AAC_RATES: Final = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
_MPA_RATES: Final = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by version id

DECODERS: Final[Mapping[AudioCodec, str]] = {
    "mp2": "mp3",  # layers I to III alike
    "aac_latm": "aac_latm",
    "ac3": "ac3",
    "eac3": "eac3",
    "dts": "dca",
    "truehd": "truehd",
    "s302m": "s302m",
    "pcm_bluray": "pcm_bluray",
}
"""FFmpeg's decoder for each codec that is not copied; no other one is opened for sound."""

_UNPARSED: Final = ("s302m", "pcm_bluray")  # a PES is a frame, with a header that says so


@dataclass(frozen=True, slots=True)
class AudioTrack:
    """Codec parameters; ``sample_rate`` in Hz; 0 where only the frames themselves say it, as those do that have to be
    decoded anyway. ``mp2`` stands for all layers of MPEG audio."""

    codec: AudioCodec
    sample_rate: int
    channels: int

    @property
    def copies(self) -> bool:
        """Whether packets go to the output as they came; the network's players know AAC and Opus."""
        return self.codec in ("aac", "opus")


@dataclass(frozen=True, slots=True)
class AudioPacket:
    """The payload of one PES packet as it came: one or more audio frames, ``pts`` (90 kHz) that of the first."""

    data: bytes
    pts: int
    track: AudioTrack


def track_of(codec: AudioCodec, data: bytes | bytearray | memoryview, channels: int) -> AudioTrack | None:
    """What the first frame's header says; for Opus what the PMT said (``channels``). None if it is no header."""
    if codec == "opus":
        return AudioTrack(codec, OPUS_RATE, channels)
    if codec != "aac" and codec != "mp2":
        return AudioTrack(codec, 0, 0)
    if len(data) < 4 or data[0] != 0xFF or data[1] & 0xE0 != 0xE0:
        return None
    if codec == "aac":
        rate, count = data[2] >> 2 & 15, (data[2] & 1) << 2 | data[3] >> 6
        if data[1] & 0xF6 != 0xF0 or rate >= len(_AAC_RATES):
            return None
        return AudioTrack(codec, _AAC_RATES[rate], 8 if count == 7 else count)  # 0: said inside the frame
    version, layer, rate = data[1] >> 3 & 3, data[1] >> 1 & 3, data[2] >> 2 & 3
    if version == 1 or layer == 0 or rate == 3:
        return None
    return AudioTrack(codec, _MPA_RATES[version][rate], 1 if data[3] >> 6 == 3 else 2)


class _Decoder:
    """PES payloads -> decoded frames with the places of their first samples (90 kHz).

    A PES may have several coded frames, or parts of some: FFmpeg's parsers cut them apart. Its PTS is that of the first
    frame which begins in it (ISO/IEC 13818-1 2.4.3.7); the others follow one another. Where one cannot be decoded,
    what comes behind it has no place before the next PTS, and is left out.
    """

    def __init__(self, codec: AudioCodec) -> None:
        self.failures = 0
        self._codec = codec
        self._open()

    def _open(self) -> None:
        self._context = cast(AudioCodecContext, AudioCodecContext.create(DECODERS[self._codec], "r"))
        self._context.thread_count = 1
        self._parser = AudioCodecContext.create(DECODERS[self._codec], "r")  # its own: it writes into it what it finds
        self._fed = self._cut = 0  # bytes of this stream that went into the parser, and that came out
        self._begins: deque[tuple[int, int]] = deque()  # byte and PTS of each PES
        self._next: Fraction | None = None  # where the next frame is

    def decode(self, packet: AudioPacket) -> Iterator[tuple[AudioFrame, int]]:
        if self._codec in _UNPARSED:
            yield from self._frames(padded(packet.data), packet.pts)
            return
        for unit, pts in self._units(packet):
            yield from self._frames(unit, pts)
        if self._fed - self._cut > _MOST_HELD:  # a parser keeps what it finds no frame in
            self.failures += 1
            self._open()

    def flush(self) -> Iterator[tuple[AudioFrame, int]]:
        """What the parser has, which looks for the next frame to know the end of one."""
        if self._codec not in _UNPARSED:
            for unit in self._parser.parse(None):
                yield from self._frames(unit, self._begin())
        self._open()

    def _units(self, packet: AudioPacket) -> Iterator[tuple[av.Packet[Any], int | None]]:
        units = self._parser.parse(memoryview(packet.data + bytes(PADDING))[: len(packet.data)])
        size = sum(unit.size for unit in units)
        self._begins.append((self._fed, packet.pts))
        if self._codec == "truehd":  # its parser keeps at most a unit of 0.8 ms, and throws away what it cannot use
            if not self._cut and size != len(packet.data):
                self._begins.clear()
            self._cut = self._fed
        self._fed += len(packet.data)
        for unit in units:
            pts = self._begin()
            self._cut += unit.size
            yield unit, pts

    def _begin(self) -> int | None:
        """The PTS of the frame that is next out of the parser; None if it follows the one before."""
        pts = None
        while self._begins and self._begins[0][0] <= self._cut:
            pts = self._begins.popleft()[1]
        return pts

    def _frames(self, unit: av.Packet[Any], pts: int | None) -> Iterator[tuple[AudioFrame, int]]:
        if pts is not None:
            self._next = Fraction(pts)
        try:
            frames = self._context.decode(unit)
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError:
            self.failures += 1
            frames = []
        if not frames:
            self._next = None
        for frame in frames:
            if self._next is not None:
                place, self._next = int(self._next), self._next + Fraction(frame.samples * CLOCK, frame.sample_rate)
                yield frame, place


class OpusTranscoder:
    """Any sound that does not stay as it is -> Opus, 48 kHz, 20 ms a packet; one channel stays one, more become two.

    ``convert`` each packet, ``flush`` at the end. Output starts where the input's time stamps say, and where they
    differ from the samples counted by more than one Opus frame they win: a gap stays a gap, and of a sender that sends
    more than its time stamps have room for, frames are left out (``skipped``). Audio stays within a frame of video.
    Frames that cannot be decoded are counted in ``failures`` and leave a gap.
    """

    def __init__(self, track: AudioTrack) -> None:
        self.source = track
        self.skipped = 0
        self._failures = 0
        self._decoder = _Decoder(track.codec)
        self._shape: tuple[str, str, int] | None = None  # of the frames that are being resampled
        self._start = 0  # where the first sample is, 90 kHz
        self._taken = Fraction(0)  # 90 kHz ticks of sound from there on; exact, as rounding adds up over hours
        self._given = 0  # samples from there to the end of what the encoder has

    @property
    def failures(self) -> int:
        return self._failures + self._decoder.failures

    def convert(self, packet: AudioPacket) -> list[AudioPacket]:
        return self._all(self._decoder.decode(packet))

    def flush(self, before: int | None = None) -> list[AudioPacket]:
        """The rest, without what would begin at ``before`` (90 kHz) or later, where other sound does."""
        done = self._all(self._decoder.flush()) + self._finish()
        return [each for each in done if before is None or each.pts < before]

    def _all(self, frames: Iterator[tuple[AudioFrame, int]]) -> list[AudioPacket]:
        done: list[AudioPacket] = []
        for frame, pts in frames:
            try:
                done += self._add(frame, pts)
            except av.error.MemoryError:
                raise
            except av.error.FFmpegError:  # a rate or a layout that cannot be resampled
                self._failures += 1
                self._shape = None
        return done

    def _add(self, frame: AudioFrame, pts: int) -> list[AudioPacket]:
        done: list[AudioPacket] = []
        shape = (frame.format.name, frame.layout.name, frame.sample_rate)
        if self._shape is not None:
            expected = self._start + self._taken
            if pts < expected - _ticks(_OPUS_FRAME):
                self.skipped += 1
                return done
            if pts > expected + _ticks(_OPUS_FRAME) or shape != self._shape:
                done += [each for each in self._finish() if each.pts < pts]
        if self._shape is None:
            self._begin("mono" if frame.layout.nb_channels == 1 else "stereo")
            self._shape, self._start = shape, pts
        frame.pts = None  # time is counted here, in samples
        self._taken += Fraction(frame.samples * CLOCK, frame.sample_rate)
        for part in self._resampler.resample(frame):
            part.pts = None
            self._fifo.write(part)
        return done + self._encode(self._fifo.read_many(_OPUS_FRAME))

    def _begin(self, layout: str) -> None:
        self._track = AudioTrack("opus", OPUS_RATE, 1 if layout == "mono" else 2)
        self._resampler = AudioResampler("s16", layout, OPUS_RATE)
        self._fifo = AudioFifo()
        self._encoder = AudioCodecContext.create("libopus", "w")
        self._encoder.sample_rate = OPUS_RATE
        self._encoder.layout = AudioLayout(layout)
        self._encoder.format = AudioFormat("s16")
        self._encoder.bit_rate = _OPUS_BITS * self._track.channels
        self._encoder.time_base = Fraction(1, OPUS_RATE)
        self._taken, self._given = Fraction(0), 0

    def _finish(self) -> list[AudioPacket]:
        """What was waiting for more samples; the encoder fills the last frame up."""
        if self._shape is None:
            return []
        self._shape = None
        for part in self._resampler.resample(None):
            self._fifo.write(part)
        done = self._encode(self._fifo.read_many(_OPUS_FRAME))
        if rest := self._fifo.read(0, True):
            done += self._encode([rest])
        return done + self._packets(self._encoder.encode(None))

    def _encode(self, frames: list[AudioFrame]) -> list[AudioPacket]:
        done: list[AudioPacket] = []
        for frame in frames:
            frame.pts, frame.time_base = self._given, Fraction(1, OPUS_RATE)
            self._given += frame.samples
            done += self._packets(self._encoder.encode(frame))
        return done

    def _packets(self, packets: Iterable[av.Packet[Any]]) -> list[AudioPacket]:
        """The encoder's stamps say where a packet's first sample belongs, its own delay of 6.5 ms taken off."""
        return [
            AudioPacket(opus_unit(bytes(each)), self._start + _ticks(each.pts or 0), self._track) for each in packets
        ]


def _ticks(samples: int) -> int:
    return samples * CLOCK // OPUS_RATE


def padded(data: bytes) -> av.Packet[Any]:
    """A packet of a copy, with the zeros behind it that decoders may read."""
    return packet_of(memoryview(data + bytes(PADDING))[: len(data)])


def packet_of(view: memoryview) -> av.Packet[Any]:
    """A packet that refers to ``view``, which must have ``PADDING`` zeros behind it."""
    return av.Packet(view)  # type: ignore[arg-type]  # takes any buffer


def opus_unit(packet: bytes) -> bytes:
    """An Opus packet with the control header that it has in a transport stream: 11 bits of ones but one, its size."""
    size = len(packet)
    return b"\x7f\xe0" + b"\xff" * (size // 255) + bytes((size % 255,)) + packet
