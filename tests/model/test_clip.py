"""Videos: which frames are looked at, where they lie on their sheet, what cannot be read.

Run: pytest tests/model/test_clip.py
"""

import io

import av
import numpy as np
import pytest
from PIL import Image

from model import images
from model.clip import clip_of, frames_of, sampled, sheet
from model.errors import UserError
from model.images import Limits, read_image
from tests.videos import colour, video


@pytest.mark.parametrize(
    "total, fps, most, wanted",
    [
        (23, 8, 32, [0, 6, 11, 16, 22]),  # 2.9 s: five frames, spread evenly, the ends included
        (100, 25, 32, [0, 14, 28, 42, 57, 71, 85, 99]),
        (10, 10, 32, [0, 3, 6, 9]),  # one second: not two, but the least
        (3, 30, 32, [0, 1, 2]),
        (1000, 10, 4, [0, 333, 666, 999]),
        (1, 25, 32, [0]),
    ],
)
def test_two_frames_a_second_are_looked_at(total, fps, most, wanted):
    assert sampled(total, fps, most).tolist() == wanted


@pytest.mark.parametrize("container", ["mp4", "avi", "matroska"])
def test_a_file_becomes_a_sheet_of_the_frames_that_are_looked_at(container):
    image, notes = read_image(video(container=container))
    clip = clip_of(image)
    assert clip.size == (96, 64) and clip.seconds == (0, 6 / 8, 11 / 8, 16 / 8, 22 / 8)
    assert notes == ("5 frames of a video of 2.9 s",)
    assert clip.fps == 5 / 23 * 8
    for number, frame in zip((0, 6, 11, 16, 22), frames_of(image), strict=True):
        seen = np.asarray(frame)[40:].reshape(-1, 3).mean(0)
        assert np.abs(seen - colour(number)).max() < 4, number  # frames differ by 8 in red and blue
    assert clip.columns % 2 == 0 and image.size == clip.sheet_size


def test_frames_lie_in_rows_of_an_even_number():
    frames = [Image.new("RGB", (20, 10), (n, 0, 0)) for n in range(7)]
    image = sheet(frames, range(7), 1.0)
    assert clip_of(image).columns == 2 and image.size == (40, 40)
    assert clip_of(image).box(3) == (20, 10, 40, 20)
    assert [frame.getpixel((0, 0))[0] for frame in frames_of(image)] == [*range(7)]
    tall = sheet([Image.new("RGB", (10, 40))] * 6, range(6), 1.0)
    assert clip_of(tall).columns == 4 and tall.size == (40, 80)


def test_what_is_no_longer_the_sheet_is_no_clip():
    image = sheet([Image.new("RGB", (20, 10))] * 4, range(4), 1.0)
    assert clip_of(image.convert("RGB")) == clip_of(image.copy()) == clip_of(image)
    assert clip_of(image.crop((0, 0, 20, 10))) is clip_of(image.resize((10, 10))) is None
    assert clip_of(Image.new("RGB", image.size)) is None


def test_a_video_that_was_taken_upright_is_upright(monkeypatch):
    real = images._turned

    def lying(frame):
        class Frame:
            rotation = 90
            to_image = frame.to_image

        return real(Frame)

    monkeypatch.setattr(images, "_turned", lying)
    image, _ = read_image(video(4))
    assert clip_of(image).size == (64, 96)


def test_large_frames_are_reduced_to_what_a_model_takes_at_most():
    image, notes = read_image(video(2, size=(1920, 1080)))
    width, height = clip_of(image).size
    assert images.FRAME_PIXELS * 0.99 < width * height <= images.FRAME_PIXELS * 1.01
    assert notes[1] == f"frames reduced to {width} × {height} pixels"


def only_sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize(
    "data, limits, words",
    [
        (video()[:1500], {}, "cut off or damaged"),
        (b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41", {}, "cut off or damaged"),
        (b"RIFF\x24\x80\0\0AVI LIST", {}, "cut off or damaged"),
        (only_sound(), {}, "has sound and no picture"),
        (video(30, 8), {"max_seconds": 3}, "lasts 4 seconds; at most 3 are taken (max_seconds)"),
        (video(4, size=(640, 64)), {"max_side": 600}, "max_side"),
        (video(), {"max_bytes": 1000}, "max_bytes"),
    ],
)
def test_what_cannot_be_read_gets_one_sentence(tmp_path, data, limits, words):
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_image(path, Limits(**limits))
    assert words in str(error.value) and str(error.value).startswith("clip.mp4 ") and "\n" not in str(error.value)


def test_the_limit_of_frames_holds():
    image, _ = read_image(video(), Limits(max_frames=3))
    assert len(clip_of(image).seconds) == 3
