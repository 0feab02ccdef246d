"""The sandboxed decoder: the same frames as in this process, walls that stand, and what happens when it breaks."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpu_byoc.media
from gpu_byoc.errors import ConfigError, DecoderFailed
from gpu_byoc.media import confine, sandbox
from gpu_byoc.media import sandbox_wire as wire
from gpu_byoc.media.audio import AudioPacket
from gpu_byoc.media.decode import Frame, Reader, StreamEvent, StreamReader, VideoInfo
from gpu_byoc.media.demux import Limits, Problem, Tracks
from gpu_byoc.media.mpegts import WRAP
from gpu_byoc.media.planes import Colour
from gpu_byoc.media.sandbox import SandboxedReader
from tests.support import clips

Stream = functools.cache(clips.live_stream)
SMALL = Limits(max_pixels=640 * 480)


@pytest.fixture
def reader() -> Iterator[SandboxedReader]:
    made = SandboxedReader(SMALL)
    yield made
    made.close()


def read(reader: Reader, data: bytes, step: int = 10**9, finish: bool = True) -> list[StreamEvent]:
    events: list[StreamEvent] = []
    for at in range(0, len(data), step):
        events += reader.feed(data[at : at + step])
    return [*events, *reader.end_segment(), *(reader.finish() if finish else ())]


def plain(event: StreamEvent) -> Any:
    """Comparable: a frame as its pixels and all that is known of it."""
    if not isinstance(event, Frame):
        return event
    picture = event.picture
    shown = picture.width, picture.height, picture.format.name, int(picture.colorspace)
    return shown, event.pts, event.key, [bytes(plane)[:0] or rows(plane) for plane in picture.planes]


def rows(plane: Any) -> bytes:
    """Without what stands behind each row."""
    pixels = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    return pixels[: plane.height, : plane.width].tobytes()


def frames(events: list[StreamEvent]) -> list[Frame]:
    return [each for each in events if isinstance(each, Frame)]


def reasons(events: list[StreamEvent]) -> list[str]:
    return [each.reason for each in events if isinstance(each, Problem)]


def pid(reader: SandboxedReader) -> int:
    assert reader._cell is not None
    return reader._cell.process.pid


# --- the same


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({}, 1316),
        ({"b_frames": 2, "gop": 10}, 10**9),
        ({"video": "libx265", "gop": 4}, 10**9),
        ({"audio": "aac"}, 16_384),
        ({"size": (66, 50)}, 10**9),
    ],
)
def test_the_same_events_as_in_this_process(options: dict[str, Any], step: int) -> None:
    data = Stream(12, **options)
    told: list[list[int]] = [[], []]
    sandboxed = SandboxedReader(SMALL, told[1].append)
    try:
        expected = [plain(each) for each in read(StreamReader(SMALL, told[0].append), data, step)]
        assert [plain(each) for each in read(sandboxed, data, step)] == expected
        assert len(expected) > 12
        assert told[0] == told[1]
        assert len(told[0]) == 12
    finally:
        sandboxed.close()


def test_the_real_clip(reader: SandboxedReader) -> None:
    data = clips.remuxed()
    expected = [plain(each) for each in read(StreamReader(SMALL), data)]
    assert [plain(each) for each in read(reader, data)] == expected


def test_mpeg_audio_comes_out_as_opus(reader: SandboxedReader) -> None:
    events = read(reader, Stream(25, audio="mp2"))
    sounds = [each for each in events if isinstance(each, AudioPacket)]
    assert {each.track.codec for each in sounds} == {"opus"}
    assert sum(each.pts for each in sounds[1:2]) - sounds[0].pts == pytest.approx(1800, abs=1), "20 ms a packet"
    assert 45 <= len(sounds) <= 52
    assert [each.audio.codec for each in events if isinstance(each, Tracks) and each.audio] == ["mp2"]


def test_limits_hold_in_there(reader: SandboxedReader) -> None:
    events = read(reader, clips.live_stream(4, (656, 480), gop=4))
    assert reasons(events) == ["too_large", *["no_key"] * 3]
    assert not frames(events)


@pytest.mark.parametrize("name", sorted(wire.SAMPLE))
def test_every_format_that_is_taken_crosses_unchanged(name: str) -> None:
    from av.video.frame import VideoFrame

    frame = VideoFrame(38, 22, name)
    random = np.random.default_rng(1)
    for plane in frame.planes:
        view = np.frombuffer(memoryview(plane), np.uint8)
        np.copyto(view, random.integers(0, 256, view.size, np.uint8))
    memory, colour = np.zeros(wire.room(Limits(max_pixels=38 * 22)), np.uint8), Colour(1, True, 1, 1)
    wire.write_pixels(frame, memory)
    came = wire.read_pixels(VideoInfo("h264", 38, 22, name, colour, None), memory)
    for one, other in zip(frame.planes, came.planes, strict=True):
        row = one.width * wire.SAMPLE[name]
        left, right = (np.frombuffer(memoryview(p), np.uint8).reshape(-1, p.line_size) for p in (one, other))
        assert np.array_equal(left[: one.height, :row], right[: one.height, :row])
    assert Colour.of(came) == colour


def test_every_problem_has_a_word_that_is_let_through() -> None:
    folder = Path(gpu_byoc.media.__file__).parent
    found = set()
    for name in ("demux.py", "decode.py", "sandboxed.py"):
        for node in ast.walk(ast.parse((folder / name).read_text("utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                at = {"Problem": 0, "_problem": 0, "_lose": 1}.get(called)
                if at is not None and len(node.args) > at and isinstance(word := node.args[at], ast.Constant):
                    found.add(word.value)
    assert found == wire.REASONS


# --- walls

TRY = """
import ctypes, json, os, resource, socket, sys, threading
from gpu_byoc.media import confine
parent = os.getppid()
held = os.open("/dev/null", os.O_RDWR)
walls = confine.confine(64 << 20)
libc = ctypes.CDLL(None, use_errno=True)
def errno(call):
    try:
        call()
    except MemoryError:
        return "memory"
    except (OSError, ValueError, RuntimeError) as error:
        return getattr(error, "errno", str(error))
def c(name, *args):
    ctypes.set_errno(0)
    return ctypes.get_errno() if getattr(libc, name)(*args) < 0 else 0
tried = {
    "open": errno(lambda: open("/etc/passwd")),
    "socket": errno(lambda: socket.socket()),
    "fork": errno(os.fork),
    "exec": errno(lambda: os.execv("/bin/true", ["true"])),
    "thread": errno(lambda: threading.Thread(target=int).start()),
    "kill": errno(lambda: os.kill(parent, 0)),
    "ptrace": c("ptrace", 16, parent, 0, 0),
    "read another's memory": c("process_vm_readv", parent, 0, 0, 0, 0, 0),
    "a signal to it": errno(lambda: os.kill(os.getpid(), 0)),
    "rlimit": errno(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))),
    "dup": errno(lambda: os.dup(held)),
    "memory": errno(lambda: bytearray(256 << 20)),
    "a little memory": errno(lambda: bytearray(16 << 20)),
    "mount": c("mount", 0, 0, 0, 0, 0),
    "prctl": c("prctl", 4, 1, 0, 0, 0),
}
os.write(1, json.dumps([walls, tried]).encode())
"""


def test_what_is_left_to_it() -> None:
    done = subprocess.run([sys.executable, "-c", TRY], capture_output=True, timeout=30, check=True)
    walls, tried = json.loads(done.stdout)
    assert list(walls) == list(confine.WALLS)
    assert not walls["limits"]
    assert not walls["privileges"]
    assert not walls["system calls"]
    assert tried.pop("a little memory") is None
    assert tried.pop("memory") == "memory"
    assert all(tried.values()), tried
    assert set(tried.values()) <= {1, 24, "can't start new thread", "not allowed to raise maximum limit"}


def test_each_wall_by_itself() -> None:
    """Without the others, each does its own part: otherwise a wall that does nothing would not be noticed."""
    program = """
import ctypes, errno, os, resource, socket, sys
from gpu_byoc.media import confine
libc = ctypes.CDLL(None, use_errno=True)
why = getattr(confine, sys.argv[1])(*([libc] if sys.argv[1] != "_limit" else [1 << 30]))
if why:
    os.write(1, why.encode()); os._exit(3)
status = dict(line.split(":", 1) for line in os.read(held, 9999).decode().splitlines()) if (held := os.open(
    "/proc/self/status", os.O_RDONLY) if sys.argv[1] == "_drop" else 0) else {}
try:
    made = socket.socket(); made.settimeout(2); made.connect(("127.0.0.1", int(sys.argv[2]))); reached = 0
except OSError as error:
    reached = error.errno
os.write(1, repr((reached, status.get("CapEff", "").strip(), status.get("NoNewPrivs", "").strip())).encode())
"""

    def alone(wall: str, port: int) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", program, wall, str(port)], capture_output=True, timeout=30, check=False
        )
        if done.returncode == 3:
            pytest.skip(f"{wall}: {done.stdout.decode()}")
        return ast.literal_eval(done.stdout.decode())

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert alone("_drop", port) == (0, "0" * 16, "1"), "no privileges, but the network is there"
        assert alone("_limit", port)[0] == 24
        assert alone("_unshare", port)[0] == 101, "no network to reach it by"


def test_the_filter_says_no_to_everything_but_its_list() -> None:
    """Run by hand, as the kernel would: every number of both machines, and those of another one."""
    for machine, (audit, end) in confine._MACHINES.items():
        at = list(confine._MACHINES).index(machine)
        good = {numbers[at] for numbers in confine._CALLS.values()}
        program = list(struct.iter_unpack("=HBBI", confine._bpf(machine)))
        assert {number for number in range(600) if _run(program, number, audit) == confine._ALLOW} == good
        assert _run(program, end + min(good), audit) == confine._REFUSE, "x32"
        assert _run(program, min(good), 0x40000003) == confine._REFUSE, "32 bits"
        assert _run(program, -38 & 0xFFFFFFFF, audit) == confine._REFUSE


def _run(program: list[tuple[int, ...]], number: int, audit: int) -> int:
    at, value = 0, 0
    while True:
        code, yes, no, k = program[at]
        at += 1
        if code == 0x20:
            value = {0: number, 4: audit}[k]
        elif code == 0x06:
            return k
        else:
            at += yes if (value == k if code == 0x15 else value >= k) else no


def test_the_system_calls_numbers() -> None:
    """Against the headers, where they are installed."""
    generic = Path("/usr/include/asm-generic/unistd.h")
    ours = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not (generic.exists() and ours.exists()):
        pytest.skip("no kernel headers here (linux-libc-dev)")
    import re

    x86 = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", ours.read_text()))
    arm = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", generic.read_text()))
    for name, numbers in confine._CALLS.items():
        assert numbers == (int(x86[name]), int(arm[name])), name


def test_a_child_has_none_of_our_secrets(reader: SandboxedReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_SECRET", "hush")
    assert frames(read(reader, Stream(3)))
    child = psutil.Process(pid(reader))
    try:
        environ = child.environ()
    except psutil.AccessDenied:  # it cannot even be looked at; root can
        pytest.skip("its environment is hidden")
    assert "ORCH_SECRET" not in environ
    assert "hush" not in str(environ) + str(child.cmdline())


def test_a_child_ends_with_the_thread_that_reads() -> None:
    """Also where nobody says goodbye, and while it hangs."""
    made: list[SandboxedReader] = []

    def thread() -> None:
        made.append(SandboxedReader(SMALL))
        read(made[0], Stream(3))
        os.kill(pid(made[0]), signal.SIGSTOP)

    running = threading.Thread(target=thread)
    running.start()
    running.join(20)
    cell = made[0]._cell
    assert cell is not None
    assert cell.process.wait(20) == -signal.SIGKILL
    made[0].close()


# --- when it breaks


def test_a_crash_costs_the_pictures_up_to_the_next_keyframe(reader: SandboxedReader) -> None:
    first = read(reader, Stream(10, gop=10), finish=False)
    before = pid(reader)
    os.kill(before, signal.SIGSEGV)
    assert reader._cell is not None
    reader._cell.process.wait(10)
    parts = clips.ts_packets(clips.live_stream(20, gop=10, first=10 * clips.TICKS))
    events = [each for part in parts for each in reader.feed(part)] + list(reader.finish())
    assert reasons(events)[0] == "decoder"
    assert "SIGSEGV" in next(each.detail for each in events if isinstance(each, Problem))
    assert pid(reader) != before
    times = [each.pts for each in frames(first + events)]
    assert times == sorted(set(times))
    assert times[-1] == 29 * clips.TICKS, "in time with what came before"
    assert len(frames(events)) >= 10


@pytest.mark.parametrize(
    ("first", "second", "gap"),
    [
        (
            WRAP - 5 * clips.TICKS,
            5 * clips.TICKS,
            clips.TICKS,
        ),  # behind the end of the clock, which the new one never saw
        (90_000_000, 0, sandbox.STEP),  # the sender has started again meanwhile
    ],
)
def test_time_goes_on_over_a_crash(reader: SandboxedReader, first: int, second: int, gap: int) -> None:
    came = frames(read(reader, Stream(10, first=first, gop=10), finish=False))
    os.kill(pid(reader), signal.SIGKILL)
    lost = list(reader.end_segment())
    assert reasons(lost) == ["decoder"]
    after = frames(read(reader, Stream(10, first=second, gop=10)))
    assert [each.pts for each in after] == [came[-1].pts + gap + n * clips.TICKS for n in range(10)]


def test_a_hang_is_noticed(reader: SandboxedReader, monkeypatch: pytest.MonkeyPatch) -> None:
    assert frames(read(reader, Stream(3), finish=False))
    os.kill(pid(reader), signal.SIGSTOP)
    monkeypatch.setattr(sandbox, "HANG_SECONDS", 0.2)
    assert "it hangs" in next(each.detail for each in reader.feed(Stream(3)) if isinstance(each, Problem))
    monkeypatch.setattr(sandbox, "HANG_SECONDS", 10.0)
    assert len(frames(read(reader, Stream(3, first=3 * clips.TICKS)))) == 3


def test_a_stream_that_breaks_it_again_and_again_is_given_up(reader: SandboxedReader) -> None:
    for _ in range(sandbox.FAILURES - 1):
        reader.open()
        os.kill(pid(reader), signal.SIGKILL)
        assert reasons(list(reader.feed(Stream(3)))) == ["decoder"]
    reader.open()
    os.kill(pid(reader), signal.SIGKILL)
    with pytest.raises(DecoderFailed, match="broken 5 times within 60 s, now: it was ended by SIGKILL"):
        list(reader.feed(Stream(3)))


def test_stop_wakes_whoever_waits(reader: SandboxedReader) -> None:
    assert frames(read(reader, Stream(3), finish=False))
    os.kill(pid(reader), signal.SIGSTOP)
    timer = threading.Timer(0.1, reader.stop)
    timer.start()
    began = time.monotonic()
    assert list(reader.feed(Stream(3))) == []
    assert time.monotonic() - began < 5
    timer.join()
    assert list(reader.feed(Stream(3))) == [], "and none is started any more"
    reader.stop()
    reader.close()
    assert reader._cell is None


def test_what_is_not_read_to_its_end_costs_the_process_and_no_more(reader: SandboxedReader) -> None:
    events = reader.feed(Stream(10))
    while not isinstance(next(events), Frame):
        pass
    events.close()  # type: ignore[attr-defined]
    assert reader._cell is None
    assert len(frames(read(reader, Stream(5, first=10 * clips.TICKS)))) == 5


def test_nothing_is_left_behind() -> None:
    fds, children = psutil.Process().num_fds(), psutil.Process().children()
    for _ in range(3):
        made = SandboxedReader(SMALL)
        read(made, Stream(3))
        made.close()
        made.close()
    assert psutil.Process().num_fds() == fds
    assert psutil.Process().children() == children


@pytest.mark.parametrize("room", range(4))
def test_no_descriptors_no_decoder_and_none_is_lost(reader: SandboxedReader, room: int) -> None:
    """A process takes two for the socket, one for the memory, and some for its start."""
    data, files = Stream(3), psutil.Process().num_fds()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(int(each.name) for each in Path("/proc/self/fd").iterdir()) + 16, hard)
    )
    try:
        while True:
            held.append(os.dup(0))
    except OSError:
        for _ in range(room):
            os.close(held.pop())
    try:
        with pytest.raises(DecoderFailed, match=r"no process can be started .*Too many open files"):
            list(reader.feed(data))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in held:
            os.close(each)
    assert psutil.Process().num_fds() == files
    assert len(frames(read(reader, data))) == 3, "and later there is one"


def test_check() -> None:
    walls = sandbox.check()
    assert list(walls) == list(confine.WALLS)
    assert not walls["limits"]
    assert not walls["system calls"]


def test_an_interpreter_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match="does not start: it has ended with status 1"):
        sandbox.check()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(ConfigError, match="No such file"):
        sandbox.check()


def test_a_process_with_fewer_walls_than_the_first_one_gets_nothing(
    reader: SandboxedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "_standing", {})
    walls = sandbox.check()
    assert sandbox._standing == walls
    low = [wall for wall, why in walls.items() if not why]
    monkeypatch.setitem(sandbox._standing, "namespaces", "")
    monkeypatch.setattr(sandbox, "_spawn", _without_a_wall)
    with pytest.raises(DecoderFailed, match=r"less confined than .* \(namespaces: not today\)"):
        list(reader.feed(Stream(3)))
    assert reader._cell is None, "it is gone"
    monkeypatch.setitem(sandbox._standing, "namespaces", "not then either")
    assert frames(read(reader, Stream(3))), "what did not stand at the start is known, and in the status"
    assert set(low) >= {"limits", "privileges", "system calls"}


def _without_a_wall(sock: int, memory: int, limits: Limits) -> subprocess.Popen[bytes]:
    program = (
        "import sys; from gpu_byoc.media import confine, sandboxed\n"
        "confine._unshare = lambda libc: 'not today'\n"
        "sys.exit(sandboxed.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, str(sock), str(memory), json.dumps(dataclasses.asdict(limits))]
    return subprocess.Popen(command, pass_fds=(sock, memory))


# --- a child that has been taken over

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.just("h264"),
    lambda inner: st.lists(inner, max_size=10) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
WORDS = ("pictures", "frame", "sound", "info", "tracks", "problem", "broken", "done")
INFO = ["h264", 64, 48, "yuv420p", 1, False, 1, 1, 0, 0]


class Impostor:
    """Says what it likes, in the place of a child."""

    def __init__(self, *messages: Any) -> None:
        self.messages = [*messages, {"done": True}]
        self.memory = np.zeros(wire.room(SMALL), np.uint8)
        self.walls: dict[str, str] | None = {}
        self.ended = False

    def say(self, letter: bytes, data: Any = b"") -> None:
        pass

    def listen(self) -> tuple[Any, bytes]:
        return self.messages.pop(0), b"sound"

    def end(self) -> None:
        self.ended = True


def told(*messages: Any) -> tuple[list[StreamEvent], bool]:
    """What a reader makes of them, and whether it has got rid of the child."""
    reader, child = SandboxedReader(SMALL), Impostor(*messages)
    reader._cell = child  # type: ignore[assignment]
    return list(reader.feed(b"x")), child.ended


@given(st.lists(st.dictionaries(st.sampled_from(WORDS), JSON | st.just(INFO), max_size=2), max_size=4))
def test_whatever_it_says_nothing_but_events_comes_of_it(messages: list[dict[str, Any]]) -> None:
    events, _ = told(*messages)
    assert all(isinstance(each, Frame | AudioPacket | VideoInfo | Tracks | Problem) for each in events)
    assert {each.reason for each in events if isinstance(each, Problem)} <= wire.REASONS | {"decoder"}
    for each in frames(events):
        assert each.picture.width * each.picture.height <= SMALL.max_pixels


@pytest.mark.parametrize(
    "messages",
    [
        [{"frame": [0, True]}],
        [{"info": [*INFO[:1], 10_000, 10_000, *INFO[3:]]}],
        [{"info": [*INFO[:1], 0, 48, *INFO[3:]]}],
        [{"info": [*INFO[:3], "rgb24", *INFO[4:]]}],
        [{"info": ["mjpeg", *INFO[1:]]}],
        [{"info": INFO}, {"frame": [1 << 70, True]}],
        [{"info": INFO}, {"frame": [True, True]}],
        [{"problem": ["x" * 9, "", None]}],
        [{"problem": ["corrupt", "", "x"]}],
        [{"sound": [0, ["flac", 48_000, 2]]}],
        [{"sound": [0, ["mp2", 48_000, 2]]}],  # it is to be decoded in there, not here
        [{"pictures": 5}],
        [{"broken": "no more memory"}],
    ],
)
def test_a_child_that_lies_is_ended(messages: list[dict[str, Any]]) -> None:
    events, ended = told(*messages)
    assert reasons(events)[-1] == "decoder"
    assert ended
    assert not frames(events)


def test_an_answer_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "WORDS", 5)
    sounds = [{"sound": [number, ["aac", 48_000, 2]]} for number in range(5)]
    events, ended = told(*sounds[:4])
    assert (len(events), ended) == (4, False)
    events, ended = told(*sounds)
    assert reasons(events) == ["decoder"]
    assert ended


def test_time_stamps_of_one_that_lies_again_and_again_stay_within_64_bits() -> None:
    reader, last = SandboxedReader(SMALL), 0
    for _ in range(1000):
        reader._cell = Impostor({"info": INFO}, {"frame": [-wire.FAR, True]}, {"frame": [wire.FAR, True]})  # type: ignore[assignment]
        reader._shift = None if reader._last else 0
        reader._failures.clear()
        (*_, frame) = frames(list(reader.feed(b"x")))
        assert last < frame.pts < 1 << 63
        last = frame.pts


def test_a_child_that_does_not_lie_is_believed() -> None:
    events, ended = told(
        {"info": INFO}, {"frame": [7, True]}, {"frame": [7, False]}, {"sound": [1, ["aac", 48_000, 2]]}
    )
    assert not ended
    assert [each.pts for each in frames(events)] == [7]
    assert reasons(events) == ["timestamp"], "time does not stand still"
    assert isinstance(events[-1], AudioPacket)


@given(st.binary(max_size=60))
def test_bytes_of_any_kind(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        ours.settimeout(5)
        try:
            message, _ = wire.listen(ours)
        except (EOFError, wire.Broken):
            return
        assert isinstance(message, dict)


def test_too_much_is_not_even_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("<II", 2, 1 << 31) + b"{}")
        ours.settimeout(5)
        with pytest.raises(wire.Broken, match="too much"):
            wire.listen(ours)


def test_the_memory_cannot_be_made_shorter(reader: SandboxedReader) -> None:
    """Reading beyond the end of a file would kill the worker."""
    read(reader, Stream(3), finish=False)
    path = f"/proc/{os.getpid()}/map_files"
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:frame" in line]
    assert maps
    try:
        fd = os.open(f"{path}/{maps[-1].split()[0]}", os.O_RDWR)
    except PermissionError:
        pytest.skip("only root may open a mapping")
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)
