"""Audio of a transport stream: what its headers say, and its way to Opus where it cannot stay as it is.

Header fields: ADTS is ISO/IEC 13818-7 6.2, MPEG audio ISO/IEC 11172-3 2.4.1.3 and 13818-3 2.4.2.3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

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
_AAC_RATES: Final = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
_MPA_RATES: Final = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by version id


@dataclass(frozen=True, slots=True)
class AudioTrack:
    """Codec parameters; ``sample_rate`` in Hz. ``mp2`` stands for all layers of MPEG audio."""

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


class OpusTranscoder:
    """MPEG audio -> Opus, 48 kHz, at most two channels, 20 ms a packet.

    ``convert`` each packet, ``flush`` at the end. Output starts where the input's time stamps say, and where they
    differ from the samples counted by more than one Opus frame they win: a gap stays a gap, and of a sender that sends
    more than its time stamps have room for, frames are left out (``skipped``). Audio stays within a frame of video.
    Packets that cannot be decoded are counted in ``failures`` and leave a gap.
    """

    def __init__(self, track: AudioTrack) -> None:
        self.source = track
        self.track = AudioTrack("opus", OPUS_RATE, min(track.channels, 2) or 2)
        self.failures = 0
        self.skipped = 0
        self._decoder = AudioCodecContext.create("mp3", "r")  # layers I to III alike
        self._decoder.thread_count = 1
        self._begin()

    def _begin(self) -> None:
        layout = "mono" if self.track.channels == 1 else "stereo"
        self._resampler = AudioResampler("s16", layout, OPUS_RATE)
        self._fifo = AudioFifo()
        self._encoder = AudioCodecContext.create("libopus", "w")
        self._encoder.sample_rate = OPUS_RATE
        self._encoder.layout = AudioLayout(layout)
        self._encoder.format = AudioFormat("s16")
        self._encoder.bit_rate = _OPUS_BITS * self.track.channels
        self._encoder.time_base = Fraction(1, OPUS_RATE)
        self._start: int | None = None  # where the first sample is, 90 kHz
        self._taken = Fraction(0)  # 90 kHz ticks of sound from there on; exact, as rounding adds up over hours
        self._given = 0  # samples from there to the end of what the encoder has

    def convert(self, packet: AudioPacket) -> list[AudioPacket]:
        try:
            frames = self._decoder.decode(padded(packet.data))
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError:
            self.failures += 1
            return []
        done: list[AudioPacket] = []
        pts = packet.pts
        for frame in frames:
            done += self._add(frame, pts)
            pts += frame.samples * CLOCK // frame.sample_rate
        return done

    def flush(self) -> list[AudioPacket]:
        """What was waiting for more samples; the encoder fills the last frame up."""
        if self._start is None:
            return []
        for part in self._resampler.resample(None):
            self._fifo.write(part)
        done = self._encode(self._fifo.read_many(_OPUS_FRAME))
        if rest := self._fifo.read(0, True):
            done += self._encode([rest])
        done += self._packets(self._encoder.encode(None))
        self._begin()
        return done

    def _add(self, frame: AudioFrame, pts: int) -> list[AudioPacket]:
        done: list[AudioPacket] = []
        if self._start is not None:
            expected = self._start + self._taken
            if pts < expected - _ticks(_OPUS_FRAME):
                self.skipped += 1
                return done
            if pts > expected + _ticks(_OPUS_FRAME):
                done += self.flush()
        if self._start is None:
            self._start = pts
        frame.pts = None  # time is counted here, in samples
        self._taken += Fraction(frame.samples * CLOCK, frame.sample_rate)
        for part in self._resampler.resample(frame):
            part.pts = None
            self._fifo.write(part)
        return done + self._encode(self._fifo.read_many(_OPUS_FRAME))

    def _encode(self, frames: list[AudioFrame]) -> list[AudioPacket]:
        done: list[AudioPacket] = []
        for frame in frames:
            frame.pts, frame.time_base = self._given, Fraction(1, OPUS_RATE)
            self._given += frame.samples
            done += self._packets(self._encoder.encode(frame))
        return done

    def _packets(self, packets: Iterable[av.Packet[Any]]) -> list[AudioPacket]:
        """The encoder's stamps say where a packet's first sample belongs, its own delay of 6.5 ms taken off."""
        assert self._start is not None
        return [
            AudioPacket(opus_unit(bytes(each)), self._start + _ticks(each.pts or 0), self.track) for each in packets
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
