"""What a person hands in, a picture or a question, made into what the models take or refused in one clear sentence.

Every picture of the app comes through here: files, uploads, arrays. It leaves as an 8-bit RGB PIL image, upright,
opaque and of a size the models can take, with notes that say what had to be done to it. The size is read from the
header and checked before a pixel is decoded. Knows nothing about models, prompts or the page.
"""

import io
import math
import stat
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .clip import sampled, sheet
from .errors import UserError

# Raster formats whose decoders live inside Pillow (MPO is read as JPEG). No EPS: Pillow would start Ghostscript on it.
# No TGA: it has no signature, so other files would be taken for it.
FORMATS = "PNG JPEG GIF WEBP BMP DIB TIFF PPM AVIF JPEG2000 ICO QOI PCX".split()
FORMATS_IN_WORDS = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF"
SMALLEST_SIDE = 16  # pixels; a shorter picture is enlarged by a whole factor, each pixel becoming a square
SIXTEEN_BITS = "16 bits a channel reduced to 8"
MEGA = 1_000_000
FRAME_PIXELS = 768 * 32 * 32  # of one frame of a video: what Qwen3-VL's own code gives a frame at most


def _setting(default: int, help: str, unit: str):
    return field(default=default, metadata={"help": help, "unit": unit})


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for. Each field is a setting of the command line, its `help` the text there."""

    max_pixels: int = _setting(40 * MEGA, "pixels of one image, width x height", "pixels")
    max_side: int = _setting(16_384, "pixels along the longer side of one image", "pixels")
    max_aspect: int = _setting(100, "longer side of an image divided by its shorter side", "times")
    max_bytes: int = _setting(32 * 2**20, "size of one image file", "bytes")
    max_images: int = _setting(8, "images in one conversation", "images")
    max_frames: int = _setting(32, "frames looked at of one video", "frames")
    max_seconds: int = _setting(300, "length of one video", "seconds")
    max_text_chars: int = _setting(20_000, "characters of one question", "characters")
    max_prompt_tokens: int = _setting(20_000, "tokens of one prompt, visual ones included", "tokens")
    max_answer_tokens: int = _setting(1_024, "tokens of one answer", "tokens")
    max_memory: int = _setting(64 * 2**30, "memory of one request beside the model's weights, estimated", "bytes")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value < 1:
                raise UserError(f"{setting.name} is {value}; it must be at least 1 ({setting.metadata['help']}).")
        # Pillow itself refuses more than twice MAX_IMAGE_PIXELS, whatever this app allows.
        ceiling = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else self.max_pixels
        if self.max_pixels > ceiling:
            raise UserError(f"max_pixels is {self.max_pixels}; the image library opens at most {ceiling} pixels.")


DEFAULT_LIMITS = Limits()


def open_image(source, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """The picture as PIL RGB, 8 bit; see `read_image`."""
    return read_image(source, limits)[0]


def read_image(source, limits: Limits = DEFAULT_LIMITS) -> tuple[Image.Image, tuple[str, ...]]:
    """(picture as PIL RGB, 8 bit; notes on what was changed, one short phrase each, empty for a plain picture).

    source: a path, the bytes of a file, a PIL image, or an array [H, W] or [H, W, 1|3|4] of uint8, uint16, bool or
    floats in 0..1. A file that is a video becomes a sheet of its frames (model/clip.py). UserError for anything that is
    neither or is over the limits.
    """
    if isinstance(source, np.ndarray):
        _check_size(source.shape[1::-1] if source.ndim in (2, 3) else (0, 0), "The array", limits)
        image, name = _from_array(source), "The array"
    elif isinstance(source, Image.Image):
        image, name = source, "The image"
    elif isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), "The file"
        image = None if is_video(data) else _from_bytes(data, name, limits)
    elif isinstance(source, str | Path):
        path = Path(source)
        data, name = _read_file(path, limits), path.name
        image = None if is_video(data) else _from_bytes(data, name, limits)
    else:
        raise UserError(f"An image must be a file, bytes, a PIL image or an array, not {type(source).__name__}.")

    if image is None:
        return _from_video(data, name, limits)
    _check_size(image.size, name, limits)
    notes: list[str] = []
    try:
        image = _first_frame(image, notes)
        if any(";16B" in str(tile[3]) for tile in getattr(image, "tile", ())) and not image.mode.startswith("I"):
            notes.append(SIXTEEN_BITS)  # Pillow drops the lower byte of colour channels while it decodes
        image.load()
        image = _upright(image, notes)
        image = _rgb(image, notes)
    except UserError:
        raise
    except Exception as error:  # a decoder fed with broken bytes can raise anything: OSError, SyntaxError, zlib.error …
        raise UserError(
            f"{name} cannot be decoded: it is cut off or damaged ({_one_line(error)}). Save it again and retry."
        ) from error
    return _not_tiny(image, notes), tuple(notes)


def check_question(text: str, limits: Limits = DEFAULT_LIMITS) -> str:
    """The question without blanks around it; UserError where nothing or too much was typed."""
    if len(text) > limits.max_text_chars:
        raise UserError(
            f"The question has {len(text):,} characters; at most {limits.max_text_chars:,} are taken (max_text_chars). "
            "Shorten it."
        )
    text = text.replace("\0", "").strip()
    if not text:
        raise UserError("The question is empty. Type what you want to know about the image.")
    return text


def check_prompt(n_tokens: int, limits: Limits) -> None:
    """UserError for a prompt of more tokens than the limit; visual tokens count."""
    if n_tokens > limits.max_prompt_tokens:
        raise UserError(
            f"The prompt has {n_tokens:,} tokens, images included; at most {limits.max_prompt_tokens:,} are taken "
            "(max_prompt_tokens). Use fewer or smaller images, or less text."
        )


# ---- from a source to an opened, not yet decoded image


def _read_file(path: Path, limits: Limits) -> bytes:
    text = str(path)
    if "://" in text or text.startswith(("http:/", "https:/", "data:")):
        raise UserError(f"{text} is a web address; download the picture and give the file.")
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= limits.max_bytes:
            return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{text!r} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path} is a folder; give one image file.")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file; give an image file.")
    raise _too_big(path.name, status.st_size, limits)


def _from_bytes(data: bytes, name: str, limits: Limits) -> Image.Image:
    if not data:
        raise UserError(f"{name} is empty (0 bytes). Choose another image.")
    if len(data) > limits.max_bytes:
        raise _too_big(name, len(data), limits)
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:  # raised from the header's size alone
        raise UserError(
            f"{name} is far too large: {_one_line(error).split(',')[0].lower()}; at most {limits.max_pixels / MEGA:g} "
            "megapixels are taken (max_pixels). Make it smaller."
        ) from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is {_guess(data)}. These formats are opened: {FORMATS_IN_WORDS}.") from error
    except Exception as error:  # see read_image: broken bytes can raise anything
        raise UserError(
            f"{name} cannot be opened: its header is damaged ({_one_line(error)}). Save it again and retry."
        ) from error


VIDEOS = tuple(b"ftyp" + brand for brand in (b"isom", b"iso2", b"mp41", b"mp42", b"avc1", b"M4V ", b"qt  ", b"3gp4"))


def _guess(data: bytes) -> str:
    """What the bytes seem to be instead of a picture, as the end of the sentence 'NAME is …'."""
    head = data[:512].lstrip()
    if head.startswith(b"%PDF"):
        return "a PDF document, not a picture; save the page as PNG"
    if b"ftyphei" in head[:32] or b"ftypmif1" in head[:32]:
        return "an HEIC photo, which this app cannot open; save it as JPEG"
    if b"<svg" in head.lower():
        return "an SVG drawing, not a picture of pixels; save it as PNG"
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "a PostScript file, not a picture; save it as PNG"
    if (
        data.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*"))
        or b"ftypavi" in head[:32]
    ):
        return "a picture whose header is cut off or damaged"
    return "not an image"


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if channels == 1:
        array = array.reshape(array.shape[:2])
    if channels not in (1, 3, 4):
        raise UserError(f"An image array must have 1, 3 or 4 channels, last; this one has shape {array.shape}.")
    if array.dtype == np.uint16:
        array = array >> 8
    elif array.dtype == bool or array.dtype.kind == "f":
        array = np.nan_to_num(array.astype(np.float32)).clip(0, 1) * 255 + 0.5
    elif array.dtype != np.uint8:
        raise UserError(f"An image array must be uint8, uint16, bool or floats in 0..1; this one is {array.dtype}.")
    return Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8))


def is_video(data: bytes) -> bool:
    """Whether a file begins as videos do: MP4 and its kin, AVI, WebM and Matroska."""
    return data[4:12] in VIDEOS or data[8:12] == b"AVI " or data.startswith(b"\x1a\x45\xdf\xa3")


def _from_video(data: bytes, name: str, limits: Limits) -> tuple[Image.Image, tuple[str, ...]]:
    """(sheet of sampled frames, notes); UserError for a video that cannot be decoded or is over the limits."""
    import av  # takes a while, and few hand in videos

    if len(data) > limits.max_bytes:
        raise _too_big(name, len(data), limits)
    frames: list[Image.Image] = []
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise UserError(f"{name} has sound and no picture. Choose an image or a video.")
            stream = container.streams.video[0]
            _check_size((stream.width, stream.height), name, limits)
            total = sum(1 for packet in container.demux(stream) if packet.size)
            fps = float(stream.average_rate or stream.guessed_rate or 24)
            if total / fps > limits.max_seconds:
                raise UserError(
                    f"{name} lasts {total / fps:.0f} seconds; at most {limits.max_seconds} are taken (max_seconds). "
                    "Cut it."
                )
            wanted = sampled(total, fps, limits.max_frames).tolist()
            container.seek(0)
            stream.thread_type = "AUTO"
            for number, frame in enumerate(container.decode(stream)):
                if number == wanted[len(frames)]:
                    frames.append(_turned(frame))
                    if len(frames) == len(wanted):
                        break
    except UserError:
        raise
    except Exception as error:  # as in read_image: broken bytes can raise anything
        raise UserError(
            f"{name} cannot be decoded: it is cut off or damaged ({_one_line(error)}). Save it again and retry."
        ) from error
    if not frames:
        raise UserError(f"{name} is a video without a single frame. Choose another.")
    notes = [f"{len(frames)} frames of a video of {total / fps:.1f} s"]
    size = frames[0].size
    if size[0] * size[1] > FRAME_PIXELS:
        scale = math.sqrt(FRAME_PIXELS / (size[0] * size[1]))
        size = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        notes.append(f"frames reduced to {size[0]} × {size[1]} pixels")
    frames = [frame if frame.size == size else frame.resize(size, Image.Resampling.BICUBIC) for frame in frames]
    made = sheet(frames, [number / fps for number in wanted[: len(frames)]], len(frames) / total * fps)
    return made, tuple(notes)


def _turned(frame) -> Image.Image:
    """A decoded frame as RGB, upright as its stream says."""
    image = frame.to_image().convert("RGB")
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


# ---- limits


def _check_size(size: tuple[int, int], name: str, limits: Limits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise UserError(f"{name} holds no pixels ({width} x {height}).")
    if width * height > limits.max_pixels:
        raise UserError(
            f"{name} is {width} x {height}, {width * height / MEGA:.4g} megapixels; at most "
            f"{limits.max_pixels / MEGA:g} are taken (max_pixels). Make it smaller."
        )
    if max(width, height) > limits.max_side:
        raise UserError(
            f"{name} is {width} x {height}; a side may have {limits.max_side} pixels (max_side). Make it smaller."
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise UserError(
            f"{name} is {width} x {height}; a side may be at most {limits.max_aspect} times the other (max_aspect). "
            "Crop it."
        )


def _too_big(name: str, size: int, limits: Limits) -> UserError:
    return UserError(
        f"{name} has {size / 2**20:.1f} MiB; at most {limits.max_bytes / 2**20:g} MiB are taken (max_bytes). "
        "Save it smaller or as JPEG."
    )


# ---- conversions; each adds a note when it changed something a person could see


def _first_frame(image: Image.Image, notes: list[str]) -> Image.Image:
    if getattr(image, "is_animated", False):
        part = {"TIFF": "page of the document", "MPO": "picture of the file"}.get(
            image.format, "frame of the animation"
        )
        notes.append(f"first {part}")
        image.seek(0)
    return image


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        orientation = image.getexif().get(0x0112, 1)  # the EXIF tag Orientation; 1 is upright
    except Exception:  # EXIF that cannot be parsed says nothing about the pixels
        return image
    if orientation not in range(2, 9):
        return image
    notes.append("turned upright, as its EXIF data say")
    return ImageOps.exif_transpose(image)


def _rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image, notes)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            notes.append("transparency put on white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
        notes.append(f"{image.mode} converted to RGB")
    rgb = image.convert("RGB") if image.mode != "RGB" else image.copy()
    rgb.info = {}  # nothing of the file (EXIF, places, comments) travels on with the pixels
    return rgb


def _to_8_bit(image: Image.Image, notes: list[str]) -> Image.Image:
    """Grey of 16 or 32 bits or floats, to 8: by its full scale where one fits, else stretched, least to greatest."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    low, high = float(values.min()), float(values.max())
    scales = {"F": (1.0, 255.0), "I": (255.0, 65535.0)}.get(image.mode, (65535.0,))
    full = next((scale for scale in scales if 0 <= low and high <= scale), None)
    if full is not None:
        notes.append(SIXTEEN_BITS if full == 65535.0 else f"values up to {full:g} taken to 8 bits")
        values = values * (255.0 / full)
    else:
        notes.append(f"values {low:g} to {high:g} stretched to 8 bits")
        values = (values - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray((values + 0.5).clip(0, 255).astype(np.uint8))


def _not_tiny(image: Image.Image, notes: list[str]) -> Image.Image:
    factor = math.ceil(SMALLEST_SIDE / min(image.size))
    if factor <= 1:
        return image
    notes.append(f"enlarged {factor} times from {image.width} x {image.height}")
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
