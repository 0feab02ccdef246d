from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.media.mpegts import CLOCK, WRAP
from gpu_byoc.media.timeline import JUMP, Timeline

FRAME = 3600


@given(st.integers(0, WRAP - 1), st.lists(st.integers(0, JUMP), max_size=60))
def test_a_sender_that_counts_on_is_followed_exactly_over_any_number_of_wraps(first: int, steps: list[int]) -> None:
    timeline, true = Timeline(), first
    assert timeline.place("video", first, False) == first
    for step in steps:
        true += step
        assert timeline.place("video", true % WRAP, False) == true


def test_audio_and_video_wrap_at_different_moments() -> None:
    timeline = Timeline()
    assert timeline.place("video", WRAP - 10, False) == WRAP - 10
    assert timeline.place("audio", WRAP - 50, False) == WRAP - 50
    assert timeline.place("video", FRAME - 10, False) == WRAP + FRAME - 10
    assert timeline.place("audio", WRAP - 5, False) == WRAP - 5
    assert timeline.place("audio", 1915, False) == WRAP + 1915


def test_the_first_audio_before_a_wrap_joins_video_after_it() -> None:
    timeline = Timeline()
    assert timeline.place("video", 100, False) == 100
    assert timeline.place("audio", WRAP - 100, False) == -100


def test_a_restart_follows_what_came_before_and_audio_moves_with_video() -> None:
    timeline = Timeline()
    for number in range(100):
        timeline.place("video", number * FRAME, False)
        timeline.place("audio", number * FRAME + 100, False)
    end = 99 * FRAME + 100
    restarted = timeline.place("video", 0, True)
    assert restarted is not None
    assert restarted > end
    assert timeline.place("audio", 99 * FRAME + 2000, False) == 99 * FRAME + 2000, "from before the restart, late"
    assert timeline.place("audio", 1000, False) == restarted + 1000
    assert timeline.place("video", FRAME, False) == restarted + FRAME


def test_one_wild_stamp_is_dropped_and_changes_nothing() -> None:
    timeline = Timeline()
    timeline.place("video", 5 * FRAME, False)
    assert timeline.place("video", 2**32 - 5, False) is None
    assert timeline.place("video", 6 * FRAME, False) == 6 * FRAME


def test_two_that_agree_are_believed() -> None:
    timeline = Timeline()
    timeline.place("video", 5 * FRAME, False)
    later = 3600 * CLOCK
    assert timeline.place("video", later, False) is None
    assert timeline.place("video", later + FRAME, False) == later + FRAME


def test_a_long_pause_before_a_keyframe_keeps_its_length() -> None:
    timeline = Timeline()
    timeline.place("video", 0, True)
    assert timeline.place("video", 60 * CLOCK, True) == 60 * CLOCK


def test_a_restart_after_less_than_a_second_is_one_at_a_keyframe() -> None:
    timeline = Timeline()
    for number in range(20):
        timeline.place("video", number * FRAME, False)
    assert timeline.place("video", 0, True) == 20 * FRAME


def test_a_late_unit_is_dropped_without_moving_the_others() -> None:
    timeline = Timeline()
    timeline.place("audio", CLOCK, False)
    assert timeline.place("audio", CLOCK - 10, False) is None
    assert timeline.place("audio", CLOCK + 10, False) == CLOCK + 10


@given(st.lists(st.tuples(st.sampled_from(["video", "audio"]), st.integers(0, WRAP - 1), st.booleans()), max_size=80))
def test_whatever_comes_a_track_never_goes_back(units: list[tuple[str, int, bool]]) -> None:
    timeline, last = Timeline(), dict[str, int]()
    for name, raw, trusted in units:
        place = timeline.place(name, raw, trusted)
        if place is not None:
            assert place >= last.get(name, place)
            last[name] = place
