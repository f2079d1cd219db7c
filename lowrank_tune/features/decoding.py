"""Image files -> pixels, on CPU workers that load neither torch nor transformers. N images, H = W pixels."""

from __future__ import annotations

import io
import pickle
import re
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from lowrank_tune.errors import InputError
from lowrank_tune.features.commits import UnusableError
from lowrank_tune.features.images import read_unchanged

MAX_ASPECT_RATIO = 200
"""Qwen's own limit: beyond it an image resized to a square shows nothing of itself."""


def decode_image(data: bytes, image_size: int) -> npt.NDArray[np.uint8]:
    """Decode an image file, upright, in RGB, resized to a square of so many pixels, uint8 [H, W, 3].

    As `qwen_vl_utils.fetch_image` does with `resized_height` and `resized_width`, but for its limits of 56 and 3584
    pixels. As there, transparency shows white in RGBA and is ignored in palettes and in grey with alpha, and an
    animation is its first frame. Unlike there, 16-bit grey is scaled to 8 bits, not cut off at 255.

    Raises:
        UnusableError: the bytes are no image, a truncated one, one that is far too long and thin, or one whose pixels
            have no range.
    """
    if not data:
        raise UnusableError("the file is empty")
    try:
        with warnings.catch_warnings():
            # Large photographs are no attack; beyond twice Pillow's limit the warning is an error anyway.
            warnings.simplefilter("ignore")
            return _decode(data, image_size)
    except UnidentifiedImageError as error:
        raise UnusableError("not an image in any format that Pillow knows") from error
    except UnusableError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a broken file makes them trip over
        # Some messages name the buffer's address, which differs from run to run.
        reason = re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "the file", str(error))
        raise UnusableError(reason or type(error).__name__) from error


def decode_shard(row: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Read and decode the images of one shard, whose `plan` is a pickled ShardPlan.

    `pixels`, uint8 [N, H, W, 3], are of the images that could be decoded; `decoded`, pickled, has their keys, the
    others' reasons, and an error where a file could not be read.
    """
    pixels, keys, quarantined, problem = [], [], [], None
    plan = pickle.loads(row["plan"])
    try:
        for image, key in zip(plan.images, plan.keys, strict=True):
            try:
                pixels.append(decode_image(read_unchanged(image, key), image_size))
                keys.append(key)
            except UnusableError as error:
                quarantined.append((key, str(error)))
    except InputError as error:
        problem = error
    stacked = np.stack(pixels) if pixels else np.zeros((0, image_size, image_size, 3), np.uint8)
    return {"plan": row["plan"], "pixels": stacked, "decoded": pickle.dumps((keys, quarantined, problem))}


def _decode(data: bytes, image_size: int) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        ratio = max(width, height) / min(width, height)
        if ratio > MAX_ASPECT_RATIO:
            raise UnusableError(f"{width}x{height} pixels: the aspect ratio {ratio:.0f} is above {MAX_ASPECT_RATIO}")
        upright = _rgb(ImageOps.exif_transpose(image))
    return np.asarray(upright.resize((image_size, image_size)))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey_HW = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey_HW * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        raise UnusableError(f"its pixels are 32-bit {kind}, which do not say what is white; save it with 8 or 16 bits")
    if image.mode != "RGBA":
        return image.convert("RGB")
    on_white = Image.new("RGB", image.size, (255, 255, 255))
    on_white.paste(image, mask=image.getchannel("A"))
    return on_white
