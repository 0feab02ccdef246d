from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from gpu_byoc.errors import BackendUnavailable, BadFrame, ConfigError, EncoderFailed
from gpu_byoc.frames import FrameSpec
from gpu_byoc.media.encode import CodedPicture, Encoder, EncoderSettings, choose_encoder
from gpu_byoc.media.nal import kind, starts_with_aud
from gpu_byoc.media.planes import Colour
from tests.support import clips

SPEC = FrameSpec(64, 48)


def shade(number: int, spec: FrameSpec = SPEC) -> memoryview:
    return memoryview(bytearray([30 + 5 * number]) * spec.nbytes)


def decoded(pictures: list[CodedPicture]) -> list[VideoFrame]:
    context = VideoCodecContext.create("h264", "r")
    context.thread_count = 1
    frames = []
    for each in pictures:
        packet = av.Packet(each.data)
        packet.pts = each.pts
        frames += context.decode(packet)
    return frames + context.decode(None)


def test_one_picture_comes_out_for_each_that_goes_in() -> None:
    encoder = Encoder(SPEC)
    for number in range(30):
        assert [each.pts for each in encoder.encode(shade(number), number * 3600)] == [number * 3600]
    assert encoder.flush() == []


def test_time_stamps_are_kept_exactly_however_uneven() -> None:
    encoder, times = Encoder(SPEC, rate=Fraction(30)), [5, 6, 4000, 2**33 + 7, 2**33 + 8, 2**40]
    pictures = [each for number, pts in enumerate(times) for each in encoder.encode(shade(number), pts)]
    assert [(each.pts, each.dts) for each in pictures] == [(pts, pts) for pts in times], "no B-frames"
    assert [frame.pts for frame in decoded(pictures)] == times


def test_keyframes_come_where_they_are_asked_for() -> None:
    encoder = Encoder(SPEC)
    pictures = [p for n in range(30) for p in encoder.encode(shade(n % 3), n * 3600, n in (7, 8, 20))]
    assert [n for n, each in enumerate(pictures) if each.key] == [0, 7, 8, 20]
    for each in pictures:
        assert starts_with_aud("h264", each.data)
        assert kind("h264", each.data).key == each.key
        assert bool(kind("h264", each.data).sps) == each.key, "parameter sets in front of each keyframe"
    assert len(decoded(pictures[20:])) == 10, "decoding can start at any of them"


def test_what_comes_out_looks_like_what_went_in() -> None:
    encoder = Encoder(SPEC)
    frames = decoded([each for number in range(10) for each in encoder.encode(shade(number), number)])
    for number, frame in enumerate(frames):
        assert abs(frame.to_ndarray(format="rgb24").mean() - (30 + 5 * number)) < 2


def test_the_slot_is_free_again_after_the_call() -> None:
    encoder, slot = Encoder(SPEC), np.full(SPEC.nbytes, 100, np.uint8)
    pictures = encoder.encode(slot.data, 0)
    slot[:] = 255
    pictures += encoder.encode(memoryview(bytes(shade(0))), 1)
    assert abs(decoded(pictures)[0].to_ndarray(format="rgb24").mean() - 100) < 2


@pytest.mark.parametrize("colour", [Colour(), Colour(1, False, 1, 1), Colour(6, True, 6, 6), Colour(9, False, 9, 14)])
def test_colours_keep_their_names(colour: Colour) -> None:
    encoder = Encoder(SPEC, colour=colour, aspect=Fraction(4, 3))
    frame = decoded(encoder.encode(shade(1), 0))[0]
    assert Colour.of(frame) == colour


def test_frames_that_are_yuv_already_need_no_slot() -> None:
    encoder = Encoder(SPEC)
    pictures = [each for n in range(5) for each in encoder.encode_frame(clips.picture(n), n * 3600)]
    for number, frame in enumerate(decoded(pictures)):
        assert clips.psnr(frame, clips.picture(number)) > 30
    with pytest.raises(BadFrame, match="96x64"):
        encoder.encode_frame(clips.picture(0, 96, 64), 10**6)


def test_what_cannot_be_encoded_is_refused_and_the_next_frame_is_not() -> None:
    encoder = Encoder(SPEC)
    encoder.encode(shade(0), 3600)
    with pytest.raises(BadFrame, match="PTS 3600"):
        encoder.encode(shade(0), 3600)
    with pytest.raises(BadFrame, match="10 bytes"):
        encoder.encode(memoryview(bytes(10)), 7200)
    assert len(encoder.encode(shade(1), 7200)) == 1
    with pytest.raises(BadFrame, match="even"):
        Encoder(FrameSpec(65, 48))


def test_after_the_flush_there_is_no_more() -> None:
    encoder = Encoder(SPEC)
    encoder.encode(shade(0), 0)
    encoder.flush()
    with pytest.raises(EncoderFailed, match="libx264 failed at 64x48"):
        encoder.encode(shade(0), 3600)


def test_options_reach_the_encoder() -> None:
    fine = Encoder(SPEC, settings=EncoderSettings(options={"crf": "10"}))
    coarse = Encoder(SPEC, settings=EncoderSettings(options={"crf": "45"}))
    pictures = [[len(each.data) for each in e.encode_frame(clips.picture(3), 0)] for e in (fine, coarse)]
    assert pictures[0] > pictures[1]
    with pytest.raises(ConfigError, match="colour-of-magic"):
        Encoder(SPEC, settings=EncoderSettings(options={"colour-of-magic": "octarine"}))
    with pytest.raises(ConfigError, match="libx264 does not take"):
        Encoder(SPEC, settings=EncoderSettings(options={"preset": "no such preset"}))


def test_the_choice_of_the_encoder_has_a_reason() -> None:
    asked = choose_encoder("libx264")
    assert (asked.name, asked.reason) == ("libx264", "asked for")
    auto = choose_encoder("auto")
    assert auto.reason.startswith("auto: ")
    if auto.name == "h264_nvenc":
        assert choose_encoder("h264_nvenc").name == "h264_nvenc"
    else:
        assert "h264_nvenc does not open here" in auto.reason
        with pytest.raises(BackendUnavailable, match="--encoder auto"):
            choose_encoder("h264_nvenc")
    with pytest.raises(ConfigError, match=r"libx265.*libx264"):
        choose_encoder("libx265")
