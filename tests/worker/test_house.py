"""Where a stream's frames wait: order, bounds, and the end, with real slots of a real engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from gpu_byoc.bridge import Closed
from gpu_byoc.config import EngineConfig
from gpu_byoc.engine.device import Outcome
from gpu_byoc.engine.engine import Engine
from gpu_byoc.frames import FrameSpec
from gpu_byoc.media.audio import AudioPacket, AudioTrack
from gpu_byoc.media.decode import VideoInfo
from gpu_byoc.media.planes import Colour
from gpu_byoc.plugins import load_backend
from gpu_byoc.processors.passthrough import Passthrough
from gpu_byoc.worker.house import AUDIO_AT_ONCE, House, Ticket

INFO = VideoInfo("h264", 4, 2, "yuv420p", Colour(), None)
TRACK = AudioTrack("aac", 48_000, 2)
MOST, MOST_BYTES = 100, 1000


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(load_backend("numpy")(), Passthrough(), EngineConfig(slots=8, max_batch=2))
    made.start().result(20)
    yield made
    made.close()
    assert all(room["free"] == room["slots"] for room in made.rooms()), "every slot came back"


def ticket(engine: Engine, number: int) -> Ticket:
    there = threading.Event()
    lease = engine.lease(FrameSpec(4, 2), 1, lambda error: there.set(), patient=True)
    assert lease.granted or there.wait(20)
    return Ticket(lease, number, time.monotonic(), INFO, False)


def sound(number: int) -> AudioPacket:
    return AudioPacket(b"", number, TRACK)


def stamps(house: House) -> list[int]:
    return [item.pts for item in house.take()]


def test_sound_waits_behind_a_frame_that_is_being_computed_and_goes_with_it(engine: Engine) -> None:
    house = House(lambda: 3, MOST, MOST_BYTES)
    first, second = ticket(engine, 10), ticket(engine, 20)
    house.sound(sound(1))
    house.enter(first)
    for number in range(11, 11 + AUDIO_AT_ONCE):
        house.sound(sound(number))
    house.enter(second)
    house.landed(second, Outcome(None))
    house.landed(first, Outcome(None))
    assert stamps(house) == [1, 10, *range(11, 11 + AUDIO_AT_ONCE), 20]
    house.leave(first)
    house.leave(second)
    house.input_ended()
    assert house.take() == []


def test_a_little_sound_behind_the_last_computed_frame_waits_for_the_next_one(engine: Engine) -> None:
    house = House(lambda: 3, MOST, MOST_BYTES)
    first, second = ticket(engine, 10), ticket(engine, 20)
    house.enter(first)
    house.sound(sound(11))
    house.landed(first, Outcome(None))
    assert stamps(house) == [10]
    house.enter(second)
    house.sound(sound(21))
    house.landed(second, Outcome(None))
    assert stamps(house) == [11, 20]
    for number in range(22, 21 + AUDIO_AT_ONCE):
        house.sound(sound(number))
    assert stamps(house) == list(range(21, 21 + AUDIO_AT_ONCE)), "a sixth of a second of it goes alone"
    house.leave(first)
    house.leave(second)


def test_a_little_sound_waits_for_a_picture_and_more_does_not() -> None:
    house = House(lambda: 3, MOST, MOST_BYTES)
    got: list[list[int]] = []
    taking = threading.Thread(target=lambda: got.append(stamps(house)))
    taking.start()
    for number in range(AUDIO_AT_ONCE):
        assert not got
        house.sound(sound(number))
    taking.join(20)
    assert got == [list(range(AUDIO_AT_ONCE))]
    house.sound(sound(99))
    house.input_ended()
    assert stamps(house) == [99], "at the end nothing is worth waiting for"
    assert house.take() == []


def test_sound_that_nobody_takes_is_bounded_and_frames_are_not_thrown_out_for_it(engine: Engine) -> None:
    house = House(lambda: 3, MOST, MOST_BYTES)
    frame = ticket(engine, -1)
    house.enter(frame)
    assert all(house.sound(sound(number)) for number in range(MOST))
    assert not house.sound(sound(MOST)), "the oldest went for it"
    house.landed(frame, Outcome(None))
    assert stamps(house) == [-1, *range(1, MOST + 1)]
    house.leave(frame)


def test_sound_has_a_bound_in_bytes_too(engine: Engine) -> None:
    house = House(lambda: 3, MOST, MOST_BYTES)
    house.enter(ticket(engine, -1))
    big = bytes(MOST_BYTES // 4)
    assert [house.sound(AudioPacket(big, number, TRACK)) for number in range(5)] == [True] * 4 + [False]
    house.close()


def test_a_frame_in_a_full_house_waits_for_its_place_or_for_its_time(engine: Engine) -> None:
    house = House(lambda: 1, MOST, MOST_BYTES)
    frame = ticket(engine, 1)
    assert house.place(None)
    house.enter(frame)
    assert not house.place(time.monotonic() + 0.01)
    got: list[bool] = []
    waiting = threading.Thread(target=lambda: got.append(house.place(None)))
    waiting.start()
    house.landed(frame, Outcome(None))
    house.take()
    house.leave(frame)
    waiting.join(20)
    assert got == [True]
    assert house.age() == 0


def test_stop_wakes_everybody_and_closing_gives_all_slots_back(engine: Engine) -> None:
    house = House(lambda: 1, MOST, MOST_BYTES)
    frame = ticket(engine, 1)
    house.enter(frame)
    assert house.age() > 0
    ended: list[str] = []

    def until_closed(what: str, wait: object) -> None:
        assert callable(wait)
        with pytest.raises(Closed):
            wait()
        ended.append(what)

    threads = [
        threading.Thread(target=until_closed, args=("place", lambda: house.place(None))),
        threading.Thread(target=until_closed, args=("take", house.take)),
    ]
    for thread in threads:
        thread.start()
    asked = threading.Event()
    house.watch(asked)
    house.stop()
    for thread in threads:
        thread.join(20)
    assert sorted(ended) == ["place", "take"]
    assert asked.is_set(), "who waits for a slot is woken, too"
    with pytest.raises(Closed):
        house.watch(threading.Event())
    assert house.close() == 1
    late = ticket(engine, 2)
    with pytest.raises(Closed):
        house.enter(late)
    late.lease.release()


def test_a_frame_that_could_not_be_submitted_holds_up_nothing(engine: Engine) -> None:
    house = House(lambda: 3, MOST, MOST_BYTES)
    frame = ticket(engine, 1)
    house.enter(frame)
    house.sound(sound(2))
    house.withdraw(frame)
    frame.lease.release()
    house.input_ended()
    assert stamps(house) == [2]
    assert house.take() == []
