import io

import numpy as np
import pytest
from PIL import Image
from qwen_vl_utils import fetch_image

from lowrank_tune.features.decoding import decode_image
from lowrank_tune.features.jobs import UnusableError


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def photograph(photographs):
    with Image.open(photographs[5]) as image:
        return image.convert("RGB")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK"])
def test_pixels_are_those_of_qwen_vl_utils(photograph, mode):
    image = photograph.crop((0, 0, 150, 101))
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image.convert(mode)
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    expected = fetch_image({"image": Image.open(io.BytesIO(data)), "resized_height": 448, "resized_width": 448})
    np.testing.assert_array_equal(decode_image(data, 448), np.asarray(expected))


def test_exif_orientation_is_applied(photograph):
    image = photograph.crop((0, 0, 160, 120))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(image.transpose(Image.Transpose.ROTATE_90), exif=exif)
    np.testing.assert_array_equal(decode_image(turned, 56), decode_image(encoded(image), 56))


@pytest.mark.parametrize("size", [28, 3612])
def test_sizes_beyond_qwens_limits_are_kept(size):
    assert decode_image(encoded(Image.new("RGB", (30, 20), "red")), size).shape == (size, size, 3)


def test_one_pixel_is_an_image():
    assert (decode_image(encoded(Image.new("RGB", (1, 1), (9, 8, 7))), 56) == (9, 8, 7)).all()


def test_a_ribbon_is_refused_with_its_ratio():
    with pytest.raises(UnusableError, match=r"20000x10 pixels: the aspect ratio 2000 is above 200"):
        decode_image(encoded(Image.new("L", (20000, 10))), 56)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: b"", "the file is empty"),
        (lambda data: b"Dear reader,", "not an image in any format"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:200], "."),
    ],
)
def test_broken_files_give_a_reason_that_is_the_same_in_every_run(photograph, spoil, reason):
    data = spoil(encoded(photograph, "JPEG"))
    with pytest.raises(UnusableError, match=reason) as first:
        decode_image(data, 56)
    with pytest.raises(UnusableError) as second:
        decode_image(bytes(bytearray(data)), 56)
    assert str(first.value) == str(second.value) != ""


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnusableError, match="decompression bomb"):
        decode_image(encoded(Image.new("L", (40, 40))), 56)
