import io

import numpy as np
import pytest
from PIL import Image, ImageCms
from qwen_vl_utils import fetch_image

from lowrank_tune.features.commits import UnusableError
from lowrank_tune.features.decoding import decode_image


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


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")])
def test_16_bit_grey_is_scaled_and_not_cut_off(photograph, kind, mode):
    grey = np.asarray(photograph.convert("L"))
    deep = Image.fromarray((grey.astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2"))
    assert deep.mode == mode
    data = encoded(deep, kind)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode.startswith("I;16")
    np.testing.assert_array_equal(decode_image(data, 112), decode_image(encoded(Image.fromarray(grey)), 112))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(mode):
    with pytest.raises(UnusableError, match="32-bit .* what is white; save it with 8 or 16 bits"):
        decode_image(encoded(Image.new(mode, (30, 20), 1), "TIFF"), 56)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 3
    np.testing.assert_allclose(decode_image(data, 56), np.full((56, 56, 3), (255, 0, 0)), atol=2)


@pytest.mark.parametrize("mode", ["1", "YCbCr", "LAB"])
def test_other_modes_are_decoded_too(photograph, mode):
    small = photograph.resize((56, 56))
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    data = encoded(ImageCms.applyTransform(small, lab) if mode == "LAB" else small.convert(mode), "TIFF")
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == mode
    assert abs(decode_image(data, 56).mean() - np.asarray(small).mean()) < 5


def test_spoilt_exif_data_spoils_no_image(photograph):
    whole = encoded(photograph, "JPEG")
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        np.testing.assert_array_equal(decode_image(encoded(photograph, "JPEG", exif=exif), 56), decode_image(whole, 56))


@pytest.mark.parametrize("size", [(200, 1), (1, 200), (1, 1)])
def test_one_pixel_and_the_longest_images_that_qwen_takes_are_taken(size):
    assert (decode_image(encoded(Image.new("RGB", size, (9, 8, 7))), 56) == (9, 8, 7)).all()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: b"", "the file is empty"),
        (lambda data: b"Dear reader,", "not an image in any format"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:200], "."),
        (lambda data: encoded(Image.new("L", (20000, 10))), "20000x10 pixels: the aspect ratio 2000 is above 200"),
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
