"""Image files -> pixels, on CPU workers that load neither torch nor transformers. N images, H = W pixels."""

from __future__ import annotations

import io
import logging
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pillow_heif
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from lowrank_tune.config.schema import PILLOWS_MAX_PIXELS
from lowrank_tune.errors import InputError
from lowrank_tune.features.commits import UnusableError
from lowrank_tune.features.images import read_unchanged
from lowrank_tune.files import LFS_POINTER

MAX_ASPECT_RATIO = 200
"""Qwen's own limit: beyond it an image resized to a square shows nothing of itself."""

Image.preinit()
Image.init()
pillow_heif.register_heif_opener()
# EPS and WMF need other programs, MPEG is no picture, and of the others Pillow knows the beginning alone.
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
FORMATS = tuple(kind for kind in Image.ID if kind not in _NOT_READ)
IMAGE_SUFFIXES = frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in (*FORMATS, "MPO"))
"""Of files that are images, in lower case."""
_SIGNED = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "HEIF", "AVIF", "JPEG2000", "PSD")
"""Formats whose first bytes nothing else has."""

# Cameras' and editors' notes inside a PNG are larger than Pillow takes; a bomb is refused still.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26
# Without a handler, what Pillow has to say of odd files would be printed by every worker.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_NO_IMAGE = "not an image in any format that Pillow knows"
_NO_IMAGES = (
    (re.compile(b"^" + LFS_POINTER), "a pointer of Git LFS, not the image itself; fetch it: git lfs pull"),
    (
        re.compile(rb"^(II[*+]\0|MM\0[*+])"),
        "a TIFF of a kind that Pillow does not read, such as one of 64 bits; save 8 or 16 bits of grey or RGB",
    ),
    (re.compile(rb"<svg[\s>]"), "a drawing in SVG, which Pillow does not read; save it as PNG"),
    (re.compile(rb"(?i)^\s*<(!doctype html|html)"), "a web page, not an image: what a server answered instead of one"),
    (re.compile(rb"^....ftyp(isom|mp4|qt|M4V|avc1)", re.DOTALL), "a video, not an image"),
)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _SUBFILE, _PHOTOMETRIC, _DNG_VERSION = 274, 254, 262, 50706


def decode_image(data: bytes, image_size: int, max_pixels: int = PILLOWS_MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Decode an image file, upright, in RGB, resized to a square of so many pixels, uint8 [H, W, 3].

    Of opaque images as `qwen_vl_utils.fetch_image` does with `resized_height` and `resized_width`, but for its limits
    of 56 and 3584 pixels. What is transparent, in any mode, lies on white, as a viewer shows it: that function ignores
    transparency in palettes and in grey with alpha, and shows what is hidden. An animation is its first frame, colour
    profiles are ignored. Unlike there, 16-bit grey is scaled to 8 bits, not cut off at 255; of 32-bit pixels the range
    is taken where it is evident: floats from 0 to 1, whole numbers up to 255, and up to 65,535.

    Raises:
        UnusableError: as `open_picture`.
    """
    return np.asarray(open_picture(data, max_pixels).resize((image_size, image_size)))


def open_picture(data: bytes, max_pixels: int | None) -> Image.Image:
    """A picture as `decode_image` takes it, in its own size.

    Raises:
        UnusableError: the bytes are no image, a truncated one, one that is far too long and thin or has more than
            `max_pixels`, or one whose pixels have no range.
    """
    if not data:
        raise UnusableError("the file is empty")
    Image.MAX_IMAGE_PIXELS = max_pixels and max_pixels / 2  # type: ignore[assignment]  # Pillow refuses what has twice as many
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata, which no pixel needs, and of half of max_pixels
            return _upright(data)
    except Image.DecompressionBombError as error:
        had = re.search(r"\d+", str(error))
        raise UnusableError(
            f"{int(had[0]) if had else 0:,} pixels are above features.max_pixels = {max_pixels:,}; raise it"
        ) from error
    except UnidentifiedImageError as error:
        raise UnusableError(next((text for sign, text in _NO_IMAGES if sign.search(data[:1000])), _NO_IMAGE)) from error
    except UnusableError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a broken file makes them trip over
        # Some messages name the buffer's address, which differs from run to run.
        reason = re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "the file", str(error))
        raise UnusableError(reason or type(error).__name__) from error


def decode_shard(row: dict[str, Any], image_size: int, max_pixels: int) -> dict[str, Any]:
    """Read and decode the images of one shard, whose `plan` is a pickled ShardPlan.

    `pixels`, uint8 [N, H, W, 3], are of the images that could be decoded; `decoded`, pickled, has their keys, the
    others' reasons, and an error where a file could not be read.
    """
    pixels, keys, quarantined, problem = [], [], [], None
    plan = pickle.loads(row["plan"])
    try:
        for image, key in zip(plan.images, plan.keys, strict=True):
            try:
                pixels.append(decode_image(read_unchanged(image, key), image_size, max_pixels))
                keys.append(key)
            except UnusableError as error:
                quarantined.append((key, str(error)))
    except InputError as error:
        problem = error
    stacked = np.stack(pixels) if pixels else np.zeros((0, image_size, image_size, 3), np.uint8)
    return {"plan": row["plan"], "pixels": stacked, "decoded": pickle.dumps((keys, quarantined, problem))}


def looks_like_an_image(path: str) -> bool:
    """Whether a file begins as one of the common formats does; False where it cannot be read."""
    try:
        with open(path, "rb") as file:
            prefix = file.read(32)
    except OSError:
        return False
    accepts: list[Callable[[bytes], bool | str] | None] = [Image.OPEN[kind][1] for kind in _SIGNED]
    return any(accept(prefix) is True for accept in accepts if accept and len(prefix) >= 16)


def fits_now(reason: str, max_pixels: int) -> bool:
    """Whether an image that was quarantined for this reason had too many pixels for a limit that has been raised."""
    had = re.search(r"^([\d,]+) pixels are above features\.max_pixels", reason)
    return had is not None and int(had[1].replace(",", "")) <= max_pixels


def _upright(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        ratio = max(width, height) / min(width, height)
        if ratio > MAX_ASPECT_RATIO:
            raise UnusableError(f"{width}x{height} pixels: the aspect ratio {ratio:.0f} is above {MAX_ASPECT_RATIO}")
        if _is_raw(data, getattr(image, "tag_v2", {})):
            raise UnusableError("a camera's RAW file, of which only a thumbnail can be read; save it as TIFF or JPEG")
        image.load()
        upright = _rgb(image)
        try:
            turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
        except Exception:  # whatever broken metadata makes Pillow trip over: the pixels are sound
            turn = None
        return upright if turn is None else upright.transpose(turn)


def _is_raw(data: bytes, tags: Any) -> bool:
    return _DNG_VERSION in tags or bool(tags and data[8:10] == b"CR") or bool(tags.get(_SUBFILE, 0) & 1)


def _rgb(image: Image.Image) -> Image.Image:
    """An image in RGB; what is transparent shows white."""
    hidden = image.info.get("transparency")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values_HW = np.asarray(image)
        grey_HW = _in_8_bits(values_HW, image.mode)
        if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # 0 is white; Pillow turns 8 bits round by itself
            grey_HW = 255 - grey_HW
        if isinstance(hidden, int):
            grey_HW[values_HW == hidden] = 255
        return Image.fromarray(grey_HW).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "RGB" and isinstance(hidden, tuple) and max(hidden) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in hidden)  # of 16 bits, as Pillow reads them
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    seen = image.convert("RGBA")
    on_white = Image.new("RGB", seen.size, (255, 255, 255))
    on_white.paste(seen, mask=seen.getchannel("A"))
    return on_white


def _in_8_bits(values_HW: npt.NDArray[Any], mode: str) -> npt.NDArray[np.uint8]:
    if mode.startswith("I;16"):
        return ((values_HW.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    low, high = float(values_HW.min()), float(values_HW.max())  # NaN is in no range
    scale = 255 if mode == "F" and high <= 1 else 1 if high <= 255 else 1 / 257
    if low >= 0 and high <= 65535 and (scale == 255 or (values_HW == np.rint(values_HW)).all()):
        scaled_HW: npt.NDArray[np.uint8] = np.rint(values_HW * scale).astype(np.uint8)
        return scaled_HW
    kind = "integers" if mode == "I" else "floats"
    raise UnusableError(
        f"its pixels are 32-bit {kind} from {low:g} to {high:g}, which do not say what is white; "
        "save it with 8 or 16 bits, or scale it to 0 to 1"
    )
