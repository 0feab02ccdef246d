"""The process that decodes one stream: ``python -m gpu_byoc.media.sandboxed SOCKET MEMORY LIMITS``.

It reads the worker's words from a socket and answers with events; the pixels of a frame go into memory that both map,
one frame at a time. Sound that is not copied becomes Opus here, too: all decoders of a stranger's bytes are in here.
"""

from __future__ import annotations

import json
import mmap
import socket
import sys
from collections.abc import Iterable, Iterator

import av.error
import numpy as np

from gpu_byoc.media import sandbox_wire as wire
from gpu_byoc.media.audio import AudioPacket, OpusTranscoder
from gpu_byoc.media.confine import confine
from gpu_byoc.media.decode import Frame, StreamEvent, StreamReader, VideoDecoder, VideoInfo
from gpu_byoc.media.demux import VIDEO, Limits, Problem, Tracks

SPARE: int = 128 << 20
"""Bytes beside the pictures: input, sound, the interpreter's own."""

PICTURES: int = 18
"""That a decoder may hold: 16 to refer to (H.264 A.3.1), the one it decodes, the one it gives out."""


def memory_of(limits: Limits) -> int:
    """Bytes that decoding may take; pictures of 4:2:0 in 16 bits, or of 4:4:4 in 8."""
    return PICTURES * limits.max_pixels * 3 + SPARE


class Cell:
    def __init__(self, sock: socket.socket, memory: mmap.mmap, limits: Limits) -> None:
        self._sock = sock
        self._memory = np.frombuffer(memory, np.uint8)
        self._pictures: list[int] = []  # that went into the decoder since the last message
        self._reader = StreamReader(limits, self._pictures.append)
        self._opus: OpusTranscoder | None = None
        self._lent = False  # the worker has not read the last frame's pixels yet

    def serve(self) -> None:
        """Until the worker is gone."""
        while True:
            letter, data = wire.hear(self._sock)
            if letter == wire.TAKEN:
                self._lent = False
                continue
            if letter == wire.FEED:
                self._all(self._reader.feed(data))
            elif letter == wire.SEGMENT:
                self._all(self._reader.end_segment())
            else:
                self._all(self._reader.finish())
                self._sounds(self._flushed())
            self._tell({"done": True})

    def _all(self, events: Iterator[StreamEvent]) -> None:
        for event in events:
            if isinstance(event, Frame):
                self._frame(event)
            elif isinstance(event, AudioPacket):
                self._sounds(self._portable(event))
            elif isinstance(event, VideoInfo):
                self._tell(wire.info_out(event) if event.format in wire.SAMPLE else _unknown(event))
            elif isinstance(event, Tracks):
                self._tell(wire.tracks_out(event))
            else:
                self._tell(wire.problem_out(event))

    def _frame(self, event: Frame) -> None:
        if event.picture.format.name not in wire.SAMPLE:
            return
        if self._lent and wire.hear(self._sock)[0] != wire.TAKEN:
            raise ValueError("the worker goes on before it has read the frame")
        wire.write_pixels(event.picture, self._memory)
        self._lent = True
        self._tell({"frame": [event.pts, event.key]})

    def _portable(self, packet: AudioPacket) -> list[AudioPacket]:
        """As the output can carry it."""
        done = self._flushed(packet.pts) if self._opus is not None and self._opus.source != packet.track else []
        if packet.track.copies:
            return [*done, packet]
        if self._opus is None:
            self._opus = OpusTranscoder(packet.track)
        before = self._opus.failures
        done += self._opus.convert(packet)
        if self._opus.failures != before:
            self._tell(wire.problem_out(Problem("audio", "an audio packet that cannot be decoded")))
        return done

    def _flushed(self, before: int | None = None) -> list[AudioPacket]:
        opus, self._opus = self._opus, None
        return [] if opus is None else opus.flush(before)

    def _sounds(self, packets: Iterable[AudioPacket]) -> None:
        for packet in packets:
            self._tell(wire.sound_out(packet), packet.data)

    def _tell(self, message: dict[str, object], sound: bytes = b"") -> None:
        if self._pictures:
            message["pictures"] = self._pictures.copy()
            self._pictures.clear()
        wire.tell(self._sock, message, sound)


def _unknown(info: VideoInfo) -> dict[str, object]:
    return wire.problem_out(Problem("format", f"pictures of the format {info.format} are not taken", VIDEO))


def main(argv: list[str]) -> int:
    sock = socket.socket(fileno=int(argv[0]))
    limits = Limits(**json.loads(argv[2]))
    memory = mmap.mmap(int(argv[1]), wire.room(limits))
    for codec in ("h264", "hevc"):  # nothing can be loaded later
        VideoDecoder("h264" if codec == "h264" else "hevc", limits)
    try:
        wire.tell(sock, {"ready": confine(memory_of(limits))})
        Cell(sock, memory, limits).serve()
    except EOFError:
        return 0
    except (MemoryError, av.error.MemoryError):
        wire.tell(sock, {"broken": "no more memory"})
    except Exception as error:  # whatever it is, the worker says it in its log; we have none
        wire.tell(sock, {"broken": f"{type(error).__name__}: {error}"[:500]})
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
