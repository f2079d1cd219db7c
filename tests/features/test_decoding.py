import io
import struct
import zlib
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from qwen_vl_utils import fetch_image

from lowrank_tune.features.commits import UnusableError
from lowrank_tune.features.decoding import decode_image, fits_now


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


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(photograph, orientation):
    image = photograph.crop((0, 0, 160, 120))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode_image(data, 56), decode_image(encoded(upright), 56))


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


def of_pixels(pixels_HW, kind="TIFF", **options):
    return decode_image(encoded(Image.fromarray(pixels_HW), kind, **options), 28)


def test_an_evident_range_of_32_bit_pixels_is_taken(photograph):
    grey = np.asarray(photograph.convert("L").resize((28, 28)))
    grey = np.where(grey == grey.min(), 0, np.where(grey == grey.max(), 255, grey)).astype(np.uint8)
    as_viewed = of_pixels(grey)
    np.testing.assert_array_equal(of_pixels((grey / 255).astype(np.float32)), as_viewed)
    for kind in (np.float32, np.int32):
        np.testing.assert_array_equal(of_pixels(grey.astype(kind)), as_viewed)
        np.testing.assert_array_equal(of_pixels(grey.astype(kind) * 257), as_viewed)


@pytest.mark.parametrize("values", [[-1, 3], [0, 70000], [0.5, 1.5], [0.0, np.nan], [0.0, np.inf]])
def test_pixels_without_a_range_are_refused(values):
    pixels = np.array([values * 14] * 28)
    with pytest.raises(UnusableError, match="32-bit .* do not say what is white; save it with 8 or 16 bits"):
        of_pixels(pixels.astype(np.int32 if pixels.dtype == int else np.float32))


def deep_png(pixels, colour_type, *chunks):
    """A PNG of 16 bits, which Pillow does not write, by hand."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def transparent_files():
    """Files of each mode, whose left half is hidden, black as editors write it, and whose right half is grey."""
    alpha = np.array([[0] * 14 + [255] * 14] * 28, np.uint8)
    grey = np.where(alpha > 0, 120, 0).astype(np.uint8)
    rgba = Image.fromarray(np.dstack([grey] * 3 + [alpha]))
    yield "RGBA", encoded(rgba)
    yield "LA", encoded(Image.fromarray(np.dstack([grey, alpha])))
    yield "PA", encoded(rgba.quantize(4, method=Image.Quantize.FASTOCTREE))
    yield "palette with one hidden colour", encoded(Image.fromarray(grey).convert("P"), "GIF", transparency=0)
    yield "RGB with a hidden colour", encoded(Image.fromarray(grey).convert("RGB"), transparency=(0, 0, 0))
    yield "L with a hidden grey", encoded(Image.fromarray(grey), transparency=0)
    yield "two colours", encoded(Image.fromarray(alpha > 0), transparency=0)
    yield "16 bits of grey", encoded(Image.fromarray(grey.astype(np.uint16) * 257), transparency=0)
    deep = grey.astype(int)[..., None] * 257
    yield "16 bits of RGB", deep_png(deep.repeat(3, 2), 2, (b"tRNS", bytes(6)))
    yield (
        "16 bits of RGB and another key",
        deep_png(deep.repeat(3, 2) + 771, 2, (b"tRNS", struct.pack(">HHH", *[771] * 3))),
    )
    yield "16 bits of LA", deep_png(np.dstack([deep[..., 0], alpha.astype(int) * 257]), 4)
    yield "WebP", encoded(rgba, "WEBP", lossless=True)
    yield "TIFF", encoded(rgba, "TIFF")
    yield "ICO", encoded(rgba, "ICO", sizes=[(28, 28)])
    yield "TGA", encoded(rgba, "TGA")


@pytest.mark.parametrize(("mode", "data"), [pytest.param(*each, id=each[0]) for each in transparent_files()])
def test_what_is_transparent_lies_on_white_in_every_mode(mode, data):
    pixels = decode_image(data, 28)
    assert (pixels[:, :14] == 255).all()
    assert abs(pixels[:, 14:].astype(int) - (255 if mode == "two colours" else 120)).max() <= 3


def test_a_photograph_of_a_phone_is_read_whatever_its_file_is_named(photograph):
    upright = decode_image(encoded(photograph), 56).astype(int)
    exif = Image.Exif()
    exif[0x0112] = 6
    heic = encoded(photograph.transpose(Image.Transpose.ROTATE_90), "HEIF", quality=95, exif=exif.tobytes())
    assert abs(decode_image(heic, 56) - upright).mean() < 4


def test_a_scan_in_which_0_is_white_is_not_shown_as_its_negative():
    assert (of_pixels(np.full((28, 28), 200 * 257, np.uint16), tiffinfo={262: 0}) == 55).all()


def test_a_cameras_raw_file_is_not_its_thumbnail():
    for tags in ({254: 1}, {50706: b"\1\4\0\0"}):
        with pytest.raises(UnusableError, match="a camera's RAW file"):
            of_pixels(np.zeros((28, 28), np.uint8), tiffinfo=tags)


def test_long_notes_in_a_png_are_no_reason_to_refuse_it_and_a_bomb_is_one():
    for megabytes, fits in ((3, True), (70, False)):
        note = (b"zTXt", b"k\0\0" + zlib.compress(bytes(megabytes * 2**20)))
        data = deep_png(np.zeros((28, 28, 3), int), 2, note)
        with nullcontext() if fits else pytest.raises(UnusableError, match="too large"):
            assert (decode_image(data, 28) == 0).all()


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
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (lambda data: b"II*\0" + bytes(60), "a TIFF of a kind that Pillow does not read"),
        (lambda data: b"\n<!DOCTYPE html><html><svg></svg>", "a drawing|a web page, not an image"),
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


def test_more_pixels_than_the_limit_are_refused_with_the_key_until_it_is_raised():
    big = encoded(Image.new("L", (40, 40)))
    with pytest.raises(
        UnusableError, match=r"1,600 pixels are above features\.max_pixels = 1,599; raise it"
    ) as refused:
        decode_image(big, 56, 1599)
    assert decode_image(big, 56, 1600).shape == (56, 56, 3)
    assert [fits_now(str(refused.value), limit) for limit in (1599, 1600)] == [False, True]
    assert not fits_now("image file is truncated", 1600)


KINDS = "PNG JPEG GIF TIFF BMP WEBP AVIF HEIF JPEG2000 PPM TGA ICO DDS PCX SGI QOI"
FILES = [encoded(Image.linear_gradient("L").resize((24, 20)).convert("RGB"), kind) for kind in KINDS.split()]


@settings(max_examples=300, deadline=5000)
@given(st.data())
def test_whatever_the_bytes_are_they_give_pixels_or_a_reason(data):
    spoilt = bytearray(data.draw(st.sampled_from(FILES) | st.binary(max_size=300)))
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6)):
        if spoilt:
            spoilt[place % len(spoilt)] = value
    del spoilt[data.draw(st.integers(0, 4000)) :]
    try:
        pixels = decode_image(bytes(spoilt), 28)
    except UnusableError as error:
        assert str(error)
    else:
        assert (pixels.shape, pixels.dtype) == ((28, 28, 3), np.uint8)
