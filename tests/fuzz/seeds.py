"""Where the hunt starts: ``python -m tests.fuzz.seeds`` writes ``corpus/``, all but the files of earlier findings.

Media comes from this machine's encoders, so the bytes differ with their versions; that does no harm, and what is
committed is what is replayed. ``made`` has the inputs that are too large to commit.
"""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
import numpy as np

from gpu_byoc.media import mpegts
from gpu_byoc.media.confine import WALLS
from gpu_byoc.media.mpegts import PACKET, WRAP, Stream
from gpu_byoc.media.sandbox_wire import SAMPLE
from tests.fuzz.hunt import CORPUS, corpus
from tests.support import clips

NAMES = (
    *("ts", "stream", "sandbox", "params", "answers"),
    *("worker", "trickle-server", "trickle-client", "network", "next-hop"),
)
KEEP = ("crash-", "hang-", "growth-", "wrong-")
PMT, VIDEO = 0x1000, 0x100


# --- transport streams


def packetized(pid: int, payload: bytes, counter: int = 0, stuffed: bool = True) -> bytes:
    """A payload in packets, the first marked as a start; the last is padded with an adaptation field."""
    out, first = bytearray(), True
    while payload or first:
        part, payload = payload[:184], payload[184:]
        control, field = 0x10, b""
        if len(part) < 184 and stuffed:
            room = 184 - len(part)
            field = bytes((room - 1,)) + (b"\0" + b"\xff" * (room - 2) if room > 1 else b"")
            control = 0x30
        head = bytes((0x47, (0x40 if first else 0) | pid >> 8, pid & 255, control | counter & 15))
        out += (head + field + part).ljust(PACKET, b"\xff")
        counter, first = counter + 1, False
    return bytes(out)


def tables(*streams: Stream, pmt_pid: int = PMT) -> bytes:
    """PAT and PMT."""
    pat = packetized(0, b"\0" + mpegts.pat(pmt_pid).ljust(183, b"\xff"))
    return pat + packetized(pmt_pid, b"\0" + mpegts.pmt(VIDEO, 0, streams or (H264,)).ljust(183, b"\xff"))


H264 = Stream(VIDEO, 0x1B, "h264")


def pes(data: bytes, pts: int | None = 90_000, length: int = 0) -> bytes:
    stamp = b"" if pts is None else mpegts.stamp_bytes(2, pts)
    return b"\0\0\1\xe0" + length.to_bytes(2, "big") + bytes((0x80, 0x80 if stamp else 0, len(stamp))) + stamp + data


class Bits:
    """A writer of H.264's bit strings."""

    def __init__(self) -> None:
        self.text = ""

    def u(self, count: int, value: int) -> Bits:
        self.text += f"{value:0{count}b}"
        return self

    def ue(self, value: int) -> Bits:
        coded = f"{value + 1:b}"
        self.text += "0" * (len(coded) - 1) + coded
        return self

    def bytes(self) -> bytes:
        text = self.text + "1"
        text += "0" * (-len(text) % 8)
        raw = int(text, 2).to_bytes(len(text) // 8, "big")
        for end in (b"\0\0\0", b"\0\0\1", b"\0\0\2", b"\0\0\3"):  # emulation prevention, 7.4.1
            raw = raw.replace(end, b"\0\0\3" + end[2:])
        return raw


def sps(mbs: int, rows: int, crop: int | None = None) -> bytes:
    """A sequence parameter set of ``mbs`` x ``rows`` macroblocks; ``crop`` pairs of pixels are taken off each side."""
    bits = Bits().u(8, 66).u(8, 0).u(8, 52).ue(0).ue(0).ue(2).ue(1).u(1, 0).ue(mbs - 1).ue(rows - 1).u(1, 1).u(1, 0)
    bits.u(1, crop is not None)
    if crop is not None:
        bits.ue(crop).ue(crop).ue(crop).ue(crop)
    return b"\0\0\0\1\x67" + bits.u(1, 0).bytes()


def pictured(parameters: bytes) -> bytes:
    """A stream with these parameters before an intra picture of another one."""
    coded = clips.packets(clips.live_stream(2, (32, 32)))[0].data
    at = coded.find(b"\0\0\1\x68")
    return tables() + b"".join(
        packetized(VIDEO, pes(parameters + coded[at:], 90_000 + 3600 * number), 8 * number) for number in range(2)
    )


def without(stream: bytes, *gone: int) -> bytes:
    return b"".join(packet for number, packet in enumerate(clips.ts_packets(stream)) if number not in gone)


def streams() -> dict[str, bytes]:
    plain = clips.live_stream(6, (32, 32), gop=3)
    sound = {codec: clips.live_stream(3, (32, 32), gop=3, audio=codec) for codec in ("aac", "mp2", "ac3", "libopus")}
    many = tuple(Stream(0x100 + number, 0x1B, "h264") for number in range(33))
    noise = random.Random(1)
    return {
        "plain.bin": plain,
        "b-frames.bin": clips.live_stream(8, (32, 32), gop=8, b_frames=2),
        "hevc.bin": clips.live_stream(3, (32, 32), video="libx265"),
        **{f"{codec}.bin": data for codec, data in sound.items()},
        "wrap.bin": clips.live_stream(6, (32, 32), gop=3, first=WRAP - 2 * 3600),
        "resized.bin": plain + clips.live_stream(3, (48, 64), gop=3, first=10 * 3600) + plain,
        "holes.bin": without(plain, 4, 7, 8),
        "truncated.bin": plain[: len(plain) * 2 // 3 + 50],
        "garbage.bin": noise.randbytes(3000) + plain[:2000] + b"\x47" * 1500,
        "sync-only.bin": (b"\x47" + bytes(187)) * 8,
        "no-tables.bin": b"".join(packet for packet in clips.ts_packets(plain) if clips.pid(packet) == VIDEO),
        "pat-to-pat.bin": tables(pmt_pid=0) + plain,
        "pat-to-video.bin": tables(pmt_pid=VIDEO) + plain,
        "pmt-of-many.bin": tables(*many) + plain,
        "pmt-on-pmt.bin": tables(Stream(PMT, 0x1B, "h264")) + plain,
        "pmt-two-alike.bin": tables(H264, Stream(VIDEO, 0x0F, "aac")) + plain,
        "sps-0x0.bin": pictured(sps(1, 1, crop=4)),
        "sps-65536x65536.bin": pictured(sps(4096, 4096)),
        "sps-65535-crop.bin": pictured(sps(4096, 4096, crop=16_383)),
        "sps-overflow.bin": pictured(sps((1 << 31) - 1, (1 << 31) - 1)),
        "sps-largest.bin": pictured(sps(256, 144)),
        "sps-wide.bin": pictured(sps(512, 1)),
        "pes-length.bin": tables() + packetized(VIDEO, pes(b"\0\0\1\x65" + bytes(400), length=65_535)),
        "pes-empty.bin": tables() + packetized(VIDEO, pes(b"")) + packetized(VIDEO, b"\0\0\1\xe0", 1),
        "nal-tiny.bin": tables() + packetized(VIDEO, pes(b"\0\0\1\x67\0\0\1\x68\0\0\1\x65")),
    }


def large_streams() -> dict[str, bytes]:
    """A PES over any bound, a picture of the largest size, sizes that alternate, thousands of tables."""
    run = b"".join(bytes((0x47, 1, 0, 0x10 | number & 15)) + bytes(184) for number in range(1, 17))
    big, small = (clips.live_stream(1, size) for size in ((4096, 2304), (64, 48)))
    return {
        "huge-pes": tables() + packetized(VIDEO, pes(b"\0\0\1\x65" + bytes(171), None), stuffed=False) + run * 2000,
        "largest": big,
        "alternating": (big + small) * 3,
        "versions": b"".join(tables(Stream(VIDEO, 0x1B, "h264"), pmt_pid=0x20 + number) for number in range(3000)),
    }


# --- what a decoding process says


def said(*messages: Any, sound: bytes = b"", text: bytes | None = None) -> bytes:
    """Each with its length before it, ``sound`` behind each that is one."""
    out = bytearray()
    for message in messages:
        coded = json.dumps(message).encode() if text is None else text
        more = sound if "sound" in message else b""
        out += struct.pack("<II", len(coded), len(more)) + coded + more
    return bytes(out)


READY: Any = {"ready": dict.fromkeys(WALLS, "")}
INFO: list[Any] = ["h264", 64, 48, "yuv420p", 1, False, 1, 1, 1, 1]
DONE = {"done": True}


def decoders() -> dict[str, bytes]:
    """Answers of a process to the worker: honest ones, wrong ones, and some that only look wrong."""

    def info(**changed: Any) -> dict[str, Any]:
        names = ("codec", "width", "height", "format", "matrix", "full", "primaries", "transfer", "up", "down")
        return {"info": [changed.get(name, value) for name, value in zip(names, INFO, strict=True)]}

    def frames(*times: Any) -> list[dict[str, Any]]:
        return [{"frame": [each, not number]} for number, each in enumerate(times)]

    track = ["aac", 48_000, 2]
    honest = (
        *(READY, {"tracks": ["h264", track]}, info(), *frames(0, 3600, 7200), {"sound": [0, track]}),
        *({"problem": ["corrupt", "a picture", "video"]}, {"pictures": [1, 2], "done": True}),
    )
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    names = sorted(SAMPLE)
    sizes = ((0, 1), (1, 1), (2048, 4), (4, 2048), (96, 96), (97, 96), (2049, 1), (1 << 31, 1 << 31), (-4, -4))
    far = (-(1 << 48), 0, 1 << 48, (1 << 48) + 1, 1 << 60, 1 << 64)
    return {
        "honest.bin": said(*honest, sound=b"s" * 300) + said(*frames(10_800), DONE),
        "twice.bin": said(*honest, *honest, sound=b"s"),
        "done.bin": said(READY, *[DONE] * 8),
        "formats.bin": said(READY, *[m for n in names for m in (info(format=n), *frames(names.index(n)))], DONE),
        "sizes.bin": b"".join(said(READY, info(width=w, height=h), *frames(5), DONE) for w, h in sizes),
        "odd-sizes.bin": said(
            *(READY, info(width=1, height=1), *frames(1), info(width=33, height=7, format="yuv422p10le"), *frames(2)),
            DONE,
        ),
        "colours.bin": said(
            *(READY, info(matrix=255, primaries=255, transfer=255, full=True), *frames(1)),
            *(info(matrix=0, format="gbrp"), *frames(2), info(up=(1 << 31) - 1, down=1), *frames(3), DONE),
        ),
        "aspect.bin": said(READY, info(up=1 << 31, down=3), *frames(1), DONE),
        "far.bin": said(READY, info(), *frames(*far), DONE),
        "back.bin": said(READY, info(), *frames(9, 8, 9, 10, -5), DONE),
        "times.bin": said(READY, info(), {"frame": [True, True]}, DONE)
        + said(READY, info(), {"frame": [1.5, 1]}, DONE),
        "no-info.bin": said(READY, *frames(1), DONE),
        "no-ready.bin": said(info(), *frames(1), DONE),
        "walls.bin": said({"ready": {}}) + said({"ready": ["limits"]}) + said({"ready": {"limits": deep}}),
        "broken.bin": said(READY, {"broken": "x" * 5000}),
        "broken-deep.bin": said(READY, {"broken": deep}),
        "problem-deep.bin": said(READY, {"problem": ["corrupt", deep, None]}, DONE),
        "problem-lines.bin": said(READY, {"problem": ["corrupt", "a\nb\x1b[2J\u2028", None]}, DONE),
        "problem-new.bin": said(READY, {"problem": ["no-such-word", "", None]}, DONE),
        "problems.bin": said(READY, *[{"problem": ["sync", str(n), "audio"]} for n in range(100)], DONE),
        "sounds.bin": said(
            READY, *[{"sound": [n * 1920, ["opus", 48_000, 2]]} for n in range(60)], DONE, sound=b"o" * 99
        ),
        "sounds-of-all.bin": said(
            READY,
            *[{"sound": [9, [c, r, n]]} for c in ("aac", "opus") for r in (1, 7350, 192_000) for n in (0, 8)],
            DONE,
        ),
        "sound-mp2.bin": said(READY, {"sound": [0, ["mp2", 48_000, 2]]}, DONE, sound=b"m" * 50),
        "sound-back.bin": said(
            READY, {"sound": [9, track]}, {"sound": [1, track]}, {"sound": [9, track]}, DONE, sound=b"s"
        ),
        "sound-of-8-mib.bin": said(READY) + struct.pack("<II", 20, 8 << 20) + b'{"sound": [1, "aac"]}',
        "too-much.bin": said(READY) + struct.pack("<II", 1 << 31, 0),
        "empty.bin": said(READY) + struct.pack("<II", 0, 0) * 3,
        "pictures.bin": said(READY, {"pictures": list(range(900))}, {"pictures": [1 << 70]}, DONE),
        "all-at-once.bin": said(READY, info() | frames(1)[0] | {"tracks": [None, None]} | {"broken": "x", "done": 0}),
        "cut.bin": said(*honest)[:-9],
        "list.bin": said(READY) + said({}, text=b"[1]") + said({}, text=b'{"frame": NaN}'),
        "deep.bin": said(READY) + said({}, text=b"[" * 3_000),
        "number.bin": said(READY) + said({}, text=b'{"frame": [' + b"9" * 5000 + b", true]}"),
        "no-text.bin": said(READY) + said({}, text=b"\xff\xfe{}") + said({}, text=b'{"broken": "\\ud83d"}'),
    }


# --- text


def request(line: str, *headers: str, body: bytes = b"", length: bool = True) -> bytes:
    lines = [f"{line} HTTP/1.1", "Host: a", *headers]
    if length and (body or line.startswith("POST")):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def response(status: int, *headers: str, body: bytes = b"", length: bool = True) -> bytes:
    lines = [f"HTTP/1.1 {status} X", *headers, *([f"Content-Length: {len(body)}"] if length else [])]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))


def image(name: str, width: int = 12, height: int = 8) -> bytes:
    """A small picture as FFmpeg writes it."""
    context: Any = av.CodecContext.create("mjpeg" if name == "jpeg" else "png", "w")
    context.width, context.height = width, height
    context.pix_fmt = "yuvj420p" if name == "jpeg" else "rgb24"
    context.time_base = Fraction(1, 25)
    pixels = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=context.pix_fmt)
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def png(width: int, height: int, rows: int) -> bytes:
    """A PNG that says ``width`` x ``height`` and has so many rows of zeros: a bomb, if there are many."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(rows * (1 + 3 * width)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def sized_jpeg(width: int, height: int) -> bytes:
    """One whose frame header says another size than its data has."""
    data = image("jpeg")
    at = data.find(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def worker() -> dict[str, bytes]:
    job, raw = "POST /live/video-to-video", "Content-Type: application/octet-stream"
    jpeg, small = image("jpeg"), image("png")
    as_json = json.dumps({"image": base64.b64encode(jpeg).decode(), "params": {"boost": 3}}).encode()
    url = "data:image/png;base64," + base64.b64encode(small).decode()
    start = {"gateway_request_id": "f", "params": {"width": 64, "height": "48", "max_framerate": 30, "boost": 2}}
    urls = {
        f"{each}_url": f"http://127.0.0.1:1/{each}" for each in ("subscribe", "publish", "control", "events", "data")
    }
    form = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + small + b"\r\n--b--\r\n"
    geometry = f"{raw}; width=4; height=2; format=rgb24; boost=5"
    kind = "Content-Type: application/json"
    return {
        "raw.bin": request(job, raw, body=bytes(24)),
        "geometry.bin": request(job, geometry, body=bytes(48)),
        "headers.bin": request(job, "X-Frame-Width: 4", "X-Frame-Height: 2", "X-Frame-Format: rgb24", body=bytes(24)),
        "chunked.bin": request(job, raw, "Transfer-Encoding: chunked", length=False) + chunked(bytes(10), bytes(14)),
        "both-lengths.bin": request(job, raw, "Transfer-Encoding: chunked", body=chunked(bytes(24))),
        "two-lengths.bin": request(job, raw, "Content-Length: 7", body=bytes(24)),
        "pipelined.bin": request(job, raw, body=bytes(12)) * 3,
        "short.bin": request(job, raw, body=bytes(24))[:-9],
        "expect.bin": request(job, raw, "Expect: 100-continue", body=bytes(24)),
        "gzip.bin": request(job, raw, "Content-Encoding: gzip", body=zlib.compress(bytes(4000))),
        "jpeg.bin": request(job, "Content-Type: image/jpeg; boost=7", body=jpeg),
        "png.bin": request(job, "Content-Type: image/png", body=small),
        "png-bomb.bin": request(job, "Content-Type: image/png", body=png(60_000, 60_000, 20)),
        "png-lies.bin": request(job, "Content-Type: image/png", body=png(900, 900, 4_000)),
        "jpeg-65535.bin": request(job, "Content-Type: image/jpeg", body=sized_jpeg(65_535, 65_535)),
        "jpeg-0.bin": request(job, "Content-Type: image/jpeg", body=sized_jpeg(0, 8)),
        "json.bin": request(job, kind, body=as_json),
        "json-url.bin": request(job, kind, body=json.dumps({"image": url}).encode()),
        "json-deep.bin": request(job, kind, body=b'{"image":' + b"[" * 3_000),
        "json-number.bin": request(job, kind, body=b'{"image": ' + b"9" * 6000 + b"}"),
        "multipart.bin": request(job, "Content-Type: multipart/form-data; boundary=b", body=form),
        "rfc2231.bin": request(job, f"{raw}; width*=utf-8''4; height=2", body=bytes(24)),
        "start.bin": request("POST /stream/start", kind, body=json.dumps(start).encode()),
        "start-urls.bin": request("POST /api/stream/start", kind, body=json.dumps(start | urls).encode()),
        "start-stop.bin": request("POST /stream/start", kind, body=json.dumps(start).encode())
        + request("POST /stream/params", kind, body=b'{"boost": 9}')
        + request("GET /stream/status", "X-Stream-Id: f")
        + request("POST /stream/stop", "X-Stream-Id: f", kind, body=b"{}"),
        "reads.bin": b"".join(
            request(f"GET /{path}")
            for path in ("health", "health?deep=1", "ready", "metrics", "compute", "hardware/info")
        ),
        "methods.bin": request("OPTIONS *") + request("DELETE /stream/start") + request("GET http://a/live"),
    }


def trickle_requests() -> dict[str, bytes]:
    post = "Transfer-Encoding: chunked"
    return {
        "publish.bin": request("POST /BASE/s/3", post, length=False) + chunked(b"one", b"two"),
        "publish-next.bin": request("POST /BASE/s/-1", "Lp-Trickle-Reset: 1", body=b"abc"),
        "publish-open.bin": request("POST /BASE/s/3", post, length=False) + b"3\r\nabc\r\n",
        "publish-empty.bin": request("POST /BASE/s/3", body=b"") + request("GET /BASE/s/next"),
        "publish-again.bin": request("POST /BASE/s/1", body=b"more") * 2,
        "publish-far.bin": request("POST /BASE/s/9223372036854775807", body=b"x") + request("GET /BASE/s/-1"),
        "create.bin": request("POST /BASE/new", "Expect-Content: video/MP2T") + request("GET /BASE/new/0"),
        "many.bin": b"".join(request(f"POST /BASE/n{number}") for number in range(40)),
        "read.bin": b"".join(request(f"GET /BASE/s/{index}") for index in (0, 1, 2, -2)),
        "absent.bin": request("GET /BASE/s/77") + request("GET /BASE/none/0") + request("GET /BASE/s/-3"),
        "wait.bin": request("GET /BASE/s/-1"),
        "delete.bin": request("DELETE /BASE/s/2") + request("DELETE /BASE/s/9") + request("DELETE /BASE/s"),
        "chunk-sizes.bin": request("POST /BASE/s/3", post, length=False) + b"ffffffffffffffff\r\nabc",
        "chunk-sign.bin": request("POST /BASE/s/3", post, length=False) + b"-3\r\nabc\r\n0\r\n\r\n",
        "gzip.bin": request("POST /BASE/s/3", "Content-Encoding: gzip", body=zlib.compress(bytes(9000))),
        "unicode.bin": "GET /BASE/s/\u0663 HTTP/1.1\r\nHost: a\r\n\r\n".encode(),
        "escaped.bin": request("GET /BASE/s/%2D1")
        + request("GET /BASE/%2e%2e/0")
        + request("POST /BASE/%00/0", body=b"x"),
    }


def trickle_answers() -> dict[str, bytes]:
    def segment(number: int | str, body: bytes = b"abc", *more: str) -> bytes:
        return response(200, f"Lp-Trickle-Seq: {number}", *more, body=body)

    latest = "Lp-Trickle-Latest: "
    end = response(200, "Lp-Trickle-Closed: terminated")
    return {
        "read.bin": b"~~".join([segment(0), segment(1), segment(2), end]),
        "same.bin": b"~~".join([segment(0)] * 12),
        "back.bin": b"~~".join([segment(9), segment(3), segment(9), segment(0)]),
        "far.bin": b"~~".join([segment("9" * 30), segment(1 << 63), segment((1 << 64) - 1)]),
        "strange.bin": b"~~".join(segment(each) for each in ("-1", "", "1, 2", "0x1", "1e3", "+4", "\u0661")),
        "absent.bin": b"~~".join([response(470, latest + each) for each in ("0", "5", "-9", "x", "9" * 40, "1")]),
        "absent-bare.bin": b"~~".join([response(470)] * 8),
        "next.bin": b"~~".join([response(200, latest + "7", body=b"7")] + [response(200, "Lp-Trickle-Seq: 7")] * 6),
        "errors.bin": b"~~".join(response(status) for status in (500, 503, 408, 429, 204, 301, 100, 999)),
        "redirect.bin": response(302, "Location: http://127.0.0.1:1/s/0"),
        "cut.bin": b"~~".join([segment(0, b"a" * 50)[:-20], b"", b"HTTP/1.1 2", segment(1)]),
        "chunks.bin": response(200, "Lp-Trickle-Seq: 0", "Transfer-Encoding: chunked", length=False) + b"5\r\nab",
        "endless-head.bin": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 3000,
        "gzip.bin": segment(0, zlib.compress(bytes(90_000)), "Content-Encoding: deflate"),
        "interim.bin": b"HTTP/1.1 100 Continue\r\n\r\n" * 50 + segment(0),
    }


def network() -> dict[str, bytes]:
    job = "POST /live/video-to-video"
    model = "X-Model-Id: green-tint-cpu"
    token = "Livepeer-Eth-Address: " + base64.b64encode(b'{"addr": "0x1", "sig": "0x"}').decode()
    offer = json.dumps({"url": "ftp://x", "name": "n", "capacity": 2, "price_per_unit": 1, "price_scaling": 1}).encode()
    found = {
        "job": request(job, model, "Content-Type: application/octet-stream", body=bytes(50)),
        "livepeer": request(job, model, "Livepeer: " + base64.b64encode(b'{"request": "{}"}').decode(), body=b"x"),
        "chunked": request(job, model, "Transfer-Encoding: chunked", length=False) + chunked(b"ab", b"c"),
        "chunk-sizes": request(job, model, "Transfer-Encoding: chunked", length=False) + b"fffffffffffffffff\r\nab",
        "smuggled": request(job, model, "Transfer-Encoding: chunked", body=chunked(b"ab") + request("GET /status")),
        "two-lengths": request(job, model, "Content-Length: 3", body=b"abcde"),
        "short": request(job, model, body=bytes(50))[:-20],
        "gzip": request(job, model, "Content-Encoding: gzip", body=zlib.compress(bytes(4000))),
        "no-model": request(job, body=b"x") + request(job, "X-Model-Id: " + "a" * 3000, body=b"x"),
        "token": request("GET /process/token", token, "Livepeer-Capability: green-tint-cpu"),
        "token-bad": request("GET /process/token", "Livepeer-Eth-Address: W1tbW1tb", "Livepeer-Capability: x"),
        "register": request("POST /capability/register", "Authorization: x", body=offer)
        + request("POST /capability/unregister", "Authorization: x", body=b"n"),
        "reads": request("GET /health") + request("GET /status") + request("GET /none"),
    }
    return {f"{side}-{name}.bin": side[:1].upper().encode() + data for name, data in found.items() for side in SIDES}


SIDES = ("gateway", "orchestrator")


def hops() -> dict[str, bytes]:
    token = {"price": {"pixelsPerUnit": 1}, "service_addr": "http://127.0.0.1:1", "available_capacity": 3}
    kind = "Content-Type: application/json"
    note = 'X-Metadata: {"compute_seconds": 0.25, "backend": "numpy"}'
    return {
        "token.bin": response(200, kind, body=json.dumps(token).encode()),
        "token-full.bin": response(200, kind, body=json.dumps(token | {"available_capacity": 0}).encode()),
        "token-huge.bin": response(200, kind, body=b'{"available_capacity": ' + b"9" * 5000 + b"}"),
        "token-deep.bin": response(200, kind, body=b"[" * 3_000),
        "token-address.bin": response(200, kind, body=b'{"service_addr": "http://[::1", "available_capacity": 1}'),
        "token-charset.bin": response(200, "Content-Type: application/json; charset=x", body=b"\xff\xfe{}"),
        "answer.bin": response(200, "Content-Type: application/octet-stream", note, body=bytes(60)),
        "chunked.bin": response(200, note, "Transfer-Encoding: chunked", length=False) + chunked(b"ab", b"c"),
        "until-close.bin": response(200, note, body=b"abc", length=False),
        "interim.bin": b"HTTP/1.1 102 Processing\r\n\r\n" * 3 + response(200, body=b"x"),
        "busy.bin": response(503, "Retry-After: 1", kind, body=b'{"status": "error", "error": "overloaded"}'),
        "unauthorized.bin": response(401, body=b"no"),
        "cut.bin": response(200, body=bytes(60))[:-20],
        "both-lengths.bin": response(200, "Transfer-Encoding: chunked", body=chunked(b"x")),
        "two-lengths.bin": response(200, "Content-Length: 2", body=b"x"),
        "header-lines.bin": response(200, "A : b", "C", " folded: x", body=b"x"),
        "no-content.bin": response(204, "Content-Length: 5", length=False) + b"abcde",
        "note-deep.bin": response(200, "X-Metadata: " + "[" * 3_000, body=b"x"),
        "note-huge.bin": response(200, 'X-Metadata: {"compute_seconds": 1e999}', body=b"x"),
        "statuses.bin": b"HTTP/1.1 999 X\r\n\r\n",
    }


def params() -> dict[str, bytes]:
    given: list[Any] = [
        {"params": {"width": 64, "height": "48", "max_framerate": 24, "boost": 3}, "subscribe_url": "http://a/x"},
        {"params": {"width": 1e308, "height": -5, "detect_out_resolution": "yes", "show_loading": []}},
        {"params": {"boost": None}, "publish_url": "http://[::1]:99999/", "data_url": "https://\u2603/\ud800"},
        {"params": [1, 2], "control_url": 7, "events_url": " "},
        {"url": "http://127.0.0.1:1/api", "name": "n", "capacity": 2, "price_per_unit": 10, "price_scaling": 1},
        {"compute_seconds": 1.5, "a": 10**400, "b": True, "c": -1, "d": "x"},
        [], 5, None, "x",
    ]  # fmt: skip
    texts = {f"{number}.bin": json.dumps(each).encode() for number, each in enumerate(given)}
    return texts | {"deep.bin": b'{"params":' * 2_000, "nan.bin": b'{"params": {"width": NaN, "height": Infinity}}'}


_MAKERS: dict[str, Callable[[], dict[str, bytes]]] = {
    "ts": streams,
    "sandbox": decoders,
    "params": params,
    "answers": hops,
    "worker": worker,
    "trickle-server": trickle_requests,
    "trickle-client": trickle_answers,
    "network": network,
    "next-hop": hops,
}


def made(name: str) -> dict[str, bytes]:
    """Inputs that are not committed."""
    return large_streams() if name == "ts" else corpus("ts") if name == "stream" else {}


def main() -> None:
    for name, make in _MAKERS.items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if not old.name.startswith(KEEP):
                old.unlink()
        for file, data in make().items():
            (folder / file).write_bytes(data)
    print(sum(path.stat().st_size for path in CORPUS.rglob("*.bin")), "bytes")


if __name__ == "__main__":
    main()
