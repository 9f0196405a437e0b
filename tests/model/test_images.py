"""Every bad or odd picture: converted and used with a note, or refused in one clear sentence, undecoded when too big.

Run: pytest tests/model/test_images.py
"""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from model.errors import UserError
from model.images import Limits, check_prompt, check_question, open_image, read_image

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(mode="RGB", size=(40, 20), left=RED, right=GREEN) -> Image.Image:
    """Left half one colour, right half another: shows orientation and colour at once."""
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def png_header_only(width: int, height: int) -> bytes:
    """A valid PNG that claims width x height and holds a few bytes of pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 4096)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def colours(image: Image.Image) -> tuple:
    """(leftmost, rightmost) pixel of the middle row."""
    return image.getpixel((1, image.height // 2)), image.getpixel((image.width - 2, image.height // 2))


# ---- used as they are, or converted


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "QOI", "PCX"])
def test_plain_lossless_files_keep_every_pixel_and_need_no_note(kind):
    picture = halves()
    image, notes = read_image(encoded(picture, kind))
    assert image.mode == "RGB" and notes == ()
    assert np.array_equal(np.asarray(image), np.asarray(picture))


@pytest.mark.parametrize("kind, options", [("JPEG", {"quality": 95}), ("WEBP", {}), ("AVIF", {}), ("JPEG2000", {})])
def test_lossy_files_keep_their_colours(kind, options):
    left, right = colours(open_image(encoded(halves(), kind, **options)))
    assert np.abs(np.subtract(left, RED)).max() < 30 and np.abs(np.subtract(right, GREEN)).max() < 30


def test_palette_with_transparency_is_put_on_white():
    picture = halves().convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    clear = picture.getpixel((0, 0))
    image, notes = read_image(encoded(picture, "PNG", transparency=clear))
    assert colours(image) == (WHITE, GREEN) and notes == ("transparency put on white",)


def test_half_transparent_red_becomes_pink_and_an_opaque_alpha_channel_says_nothing():
    image, notes = read_image(halves("RGBA", left=(255, 0, 0, 128), right=(0, 255, 0, 255)))
    assert colours(image) == ((255, 127, 127), GREEN) and notes == ("transparency put on white",)
    assert read_image(halves("RGBA", left=(*RED, 255), right=(*GREEN, 255)))[1] == ()


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "PA", "RGBX", "YCbCr", "HSV", "LAB"])
def test_every_colour_mode_becomes_rgb(mode):
    image, _ = read_image(
        halves().convert("RGB").convert(mode) if mode not in ("LAB", "PA") else Image.new(mode, (40, 20))
    )
    assert image.mode == "RGB" and image.size == (40, 20)


def test_grey_with_alpha_is_put_on_white():
    image, notes = read_image(encoded(halves("LA", left=(0, 0), right=(90, 255)), "PNG"))
    assert colours(image) == (WHITE, (90, 90, 90)) and notes == ("transparency put on white",)


def test_cmyk_jpeg_keeps_its_colours_and_is_noted():
    image, notes = read_image(encoded(halves().convert("CMYK"), "JPEG", quality=95))
    left, right = colours(image)
    assert np.abs(np.subtract(left, RED)).max() < 10 and np.abs(np.subtract(right, GREEN)).max() < 10
    assert notes == ("CMYK converted to RGB",)


def test_16_bit_grey_is_scaled_by_its_full_range_not_cut():
    values = np.array([[0, 32768, 65535, 257]] * 20, dtype=np.uint16).repeat(5, axis=1)
    image, notes = read_image(encoded(Image.fromarray(values), "PNG"))
    assert [image.getpixel((x, 3))[0] for x in (0, 5, 10, 15)] == [0, 128, 255, 1]
    assert notes == ("16 bits a channel reduced to 8",)


def test_16_bit_colour_png_is_read_and_noted():
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 0, 32768) * 20 for _ in range(20))

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    image, notes = read_image(data)
    assert image.getpixel((4, 4)) == (255, 0, 128) and notes == ("16 bits a channel reduced to 8",)


def test_float_and_32_bit_tiffs_become_visible():
    ramp = np.linspace(0, 1, 40, dtype=np.float32)[None].repeat(20, 0)
    for values in (ramp, ramp * 255, ramp * 1e6 - 500):
        image, notes = read_image(encoded(Image.fromarray(values), "TIFF"))
        assert image.getextrema()[0] == (0, 255) and len(notes) == 1
    image, _ = read_image(encoded(Image.fromarray((ramp * 100_000).astype(np.int32)), "TIFF"))
    assert image.getextrema()[0] == (0, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_used(kind):
    frames = [Image.new("RGB", (20, 20), RED), Image.new("RGB", (20, 20), GREEN)]
    options = {"lossless": True} if kind == "WEBP" else {}
    image, notes = read_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert image.getpixel((5, 5)) == RED
    assert notes == ("first page of the document" if kind == "TIFF" else "first frame of the animation",)


def test_mpo_of_a_stereo_camera_gives_its_first_picture():
    frames = [Image.new("RGB", (32, 32), RED), Image.new("RGB", (32, 32), GREEN)]
    image, notes = read_image(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    assert image.getpixel((5, 5))[0] > 240 and notes == ("first picture of the file",)


@pytest.mark.parametrize("orientation, red_side", [(3, "right"), (6, "top"), (8, "bottom"), (2, "right")])
def test_exif_rotation_is_applied(orientation, red_side):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, notes = read_image(encoded(halves(), "JPEG", exif=exif, quality=95))
    w, h = image.size
    sides = {"left": (2, h // 2), "right": (w - 3, h // 2), "top": (w // 2, 2), "bottom": (w // 2, h - 3)}
    assert image.getpixel(sides[red_side])[0] > 200, "the red half is on the wrong side"
    assert (w, h) == ((20, 40) if orientation in (6, 8) else (40, 20))
    assert notes == ("turned upright, as its EXIF data say",)


def test_broken_exif_is_no_reason_to_refuse_a_picture():
    image, _ = read_image(encoded(halves(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff rubbish", quality=95))
    assert image.size == (40, 20)


def test_nothing_of_the_file_travels_on_with_the_pixels():
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    assert open_image(encoded(halves(), "JPEG", exif=exif)).info == {}


@pytest.mark.parametrize("size, becomes", [((1, 1), (16, 16)), ((3, 100), (18, 600)), ((15, 16), (30, 32))])
def test_tiny_pictures_are_enlarged_and_noted(size, becomes):
    image, notes = read_image(Image.new("RGB", size, RED))
    assert image.size == becomes and image.getpixel((0, 0)) == RED
    assert notes == (f"enlarged {becomes[0] // size[0]} times from {size[0]} x {size[1]}",)


@pytest.mark.parametrize(
    "array",
    [
        np.full((20, 30), 128, np.uint8),
        np.full((20, 30, 1), 128, np.uint8),
        np.full((20, 30, 3), 128, np.uint8),
        np.full((20, 30, 3), 128 * 257, np.uint16),
        np.full((20, 30, 3), 128 / 255, np.float64),
    ],
)
def test_arrays_of_every_kind_agree(array):
    image = open_image(array)
    assert image.size == (30, 20) and image.getextrema() == ((128, 128),) * 3


def test_a_picture_given_as_pil_is_not_changed_itself():
    picture = Image.new("RGB", (20, 20), RED)
    open_image(picture).putpixel((0, 0), GREEN)
    assert picture.getpixel((0, 0)) == RED


def test_a_path_is_read_as_its_bytes_are(tmp_path):
    path = tmp_path / "a sign.png"
    path.write_bytes(encoded(halves(), "PNG"))
    assert colours(open_image(path)) == colours(open_image(str(path))) == (RED, GREEN)


# ---- refused, in one sentence that names the file


def refusal(source, limits=None) -> str:
    with pytest.raises(UserError) as caught:
        read_image(source, limits or Limits())
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300, message
    return message


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "is empty (0 bytes)"),
        (b"hello, I am a text file\n" * 20, "is not an image"),
        (b"%PDF-1.7 ...", "PDF document"),
        (b"<?xml version='1.0'?><svg xmlns='x'/>", "SVG drawing"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC photo"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript"),
        (b"\x89PNG\r\n\x1a\n", "header"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "header"),
        (bytes(range(256)) * 40, "is not an image"),
    ],
)
def test_bytes_that_are_no_picture_are_named_for_what_they_are(tmp_path, data, words):
    path = tmp_path / "upload.png"
    path.write_bytes(data)
    message = refusal(path)
    assert words in message and message.startswith("upload.png ")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_truncated_files_are_refused_not_half_shown(kind, keep):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    message = refusal(data[: int(len(data) * keep)])
    assert "damaged" in message or "cut off" in message


def test_a_decompression_bomb_is_refused_from_its_header():
    bomb = png_header_only(20_000, 20_000)
    tracemalloc.start()
    message = refusal(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "40 megapixels" in message and "400000000" in message
    assert peak < 5_000_000, "a 20,000 x 20,000 picture decodes to 1.2 GB"


@pytest.mark.parametrize("size", [(7000, 6000), (10_000, 9_000)])
def test_pictures_over_the_limit_but_under_pillows_own_are_refused_with_their_size(size):
    message = refusal(png_header_only(*size))
    assert f"{size[0]} x {size[1]}" in message and "max_pixels" in message


def test_each_limit_is_a_setting():
    picture = halves(size=(200, 100))
    assert "max_pixels" in refusal(picture, Limits(max_pixels=100))
    assert "max_side" in refusal(picture, Limits(max_side=150))
    assert "max_aspect" in refusal(Image.new("RGB", (202, 100)), Limits(max_aspect=2))
    assert "max_bytes" in refusal(encoded(picture, "BMP"), Limits(max_bytes=1000))
    assert open_image(picture, Limits(max_aspect=2)).size == (200, 100)


def test_a_limit_that_makes_no_sense_is_refused():
    with pytest.raises(UserError, match="max_images is 0"):
        Limits(max_images=0)
    with pytest.raises(UserError, match="max_pixels is"):
        Limits(max_pixels=10**9)


def test_paths_that_lead_to_no_picture(tmp_path):
    assert "There is no file" in refusal(tmp_path / "nowhere.png")
    assert "is a folder" in refusal(tmp_path)
    assert "not a regular file" in refusal("/dev/zero")
    assert "web address" in refusal("https://example.com/cat.png")
    assert "cannot be read" in refusal("a\0b.png")
    big = tmp_path / "big.png"
    with big.open("wb") as file:
        file.truncate(33 * 2**20)  # sparse: refused from its size alone
    assert "33.0 MiB" in refusal(big)


@pytest.mark.parametrize("source", [np.zeros((0, 5, 3), np.uint8), np.zeros((5, 5, 2), np.uint8), np.zeros(5), 7, None])
def test_arrays_and_objects_that_are_no_pictures(source):
    refusal(source)


# ---- questions and prompts


def test_questions():
    assert check_question("  what is this?\0 \n") == "what is this?"
    with pytest.raises(UserError, match="10,000,000 characters; at most 20,000"):
        check_question("x" * 10_000_000)
    for blank in ("", "   ", "\n\t", "\0"):
        with pytest.raises(UserError, match="empty"):
            check_question(blank)


def test_prompts_of_too_many_tokens():
    check_prompt(20_000, Limits())
    with pytest.raises(UserError, match="20,001 tokens"):
        check_prompt(20_001, Limits())
