import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, Qwen2_5_VLForConditionalGeneration

from lowrank_tune.errors import InputError
from lowrank_tune.features.checkpoint import find_tower, read_checkpoint_config
from lowrank_tune.features.commits import UnusableError, to_stored
from lowrank_tune.features.decoding import decode_image
from lowrank_tune.features.encoder import Encoder, check_tower


@pytest.fixture(scope="module")
def encoder(tiny_config, tiny_tower):
    return Encoder(tiny_config, tiny_tower, "float32")


@pytest.fixture(scope="module")
def whole_model(tiny_config):
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tiny_config.directory, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model


def pixels(photographs, size, count=3):
    return np.stack([decode_image(path.read_bytes(), size) for path in photographs[:count]])


@pytest.mark.parametrize("size", [28, 112, 448])
def test_features_are_those_of_the_whole_model(tiny_config, encoder, whole_model, photographs, size):
    pixels_NHWC = pixels(photographs, size)
    processor = AutoImageProcessor.from_pretrained(tiny_config.directory)
    batch = processor(images=[Image.fromarray(image) for image in pixels_NHWC], do_resize=False, return_tensors="pt")
    with torch.inference_mode():
        output = whole_model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    expected = torch.stack(list(output.pooler_output))
    features = encoder.encode(pixels_NHWC)
    assert features.shape == (3, *tiny_config.shape(size))
    assert torch.equal(features, expected)


def test_a_token_covers_its_own_28_pixels(encoder, photographs):
    """Row-major order: changing the square in row 2, column 5 changes that token most."""
    image = pixels(photographs, 448, 1)[0]
    spoilt = image.copy()
    spoilt[2 * 28 : 3 * 28, 5 * 28 : 6 * 28] = 255 - spoilt[2 * 28 : 3 * 28, 5 * 28 : 6 * 28]
    change = (encoder.encode(np.stack([image]))[0] - encoder.encode(np.stack([spoilt]))[0]).norm(dim=1)
    assert int(change.argmax()) == 2 * 16 + 5


def test_spectra_of_photographs_decay(encoder, photographs):
    """The quickstart needs features that low rank fits well, and not too well."""
    energy = torch.linalg.svdvals(encoder.encode(pixels(photographs, 448, 20)).double()) ** 2
    kept = (energy[:, :32].sum(1) / energy.sum(1)).sqrt()
    assert 0.9 < kept.mean() < 0.999
    assert kept.min() > 0.75


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"depth": 2',
            '"depth": 2, "temporal_patch_size": 1',
            r"patch_embed.proj.weight .* is \[64, 3, 2, 14, 14\] in",
        ),
        ('"depth": 2', '"depth": 2, "hidden_act": "loud"', "config.json describes no tower .*loud"),
        ('"depth": 2', '"depth": 2, "rope_parameters": {"rope_type": "mrope"}', "describes no tower .*mrope"),
    ],
)
def test_a_configuration_that_is_not_that_of_the_weights_is_refused(tmp_path, tiny_config, old, new, message):
    directory = shutil.copytree(tiny_config.directory, tmp_path / "checkpoint")
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace(old, new))
    config = read_checkpoint_config(str(directory), tmp_path)
    with pytest.raises(InputError, match=message):
        check_tower(config, find_tower(config, tmp_path))


def test_what_does_not_fit_the_stored_type_is_refused_with_the_remedy():
    fine = torch.tensor([[65280.0, -1.0]])
    assert to_stored(fine.bfloat16(), "float16").tolist() == fine.tolist()
    with pytest.raises(UnusableError, match=r"7e\+04 does not fit float16; set features.store_dtype to bfloat16"):
        to_stored(torch.tensor([[70000.0, 1.0]]), "float16")
    assert to_stored(torch.tensor([[70000.0]]), "bfloat16").isfinite().all()
    with pytest.raises(UnusableError, match=r"1e-20, vanishes in float16; set features.store_dtype to bfloat16"):
        to_stored(torch.tensor([[1e-20, 0.0]]), "float16")
    with pytest.raises(UnusableError, match=r"1e-50, vanishes in float32; scale the features"):
        to_stored(torch.tensor([[1e-50]], dtype=torch.float64), "float32")
    assert to_stored(torch.tensor([[1e-20]]), "bfloat16").item() > 0 == to_stored(torch.zeros(1, 1), "float16").item()
    with pytest.raises(UnusableError, match="NaN or infinite"):
        to_stored(torch.tensor([[float("nan")]]), "float32")


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_the_batch_size_shows_in_the_rounding_at_most(tiny_config, tiny_tower, photographs, dtype, rounding):
    image = pixels(photographs, 112, 11)
    once = Encoder(tiny_config, tiny_tower, dtype, batch=11).encode(image)
    for batch in (1, 2, 3, 4, 7, None):
        features = Encoder(tiny_config, tiny_tower, dtype, batch=batch).encode(image)
        torch.testing.assert_close(features, once, rtol=rounding, atol=rounding)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory"),
]


@pytest.fixture
def small_memory(monkeypatch):
    """A device whose memory holds attention over so many images only; returns the sizes that were tried."""
    attend = torch.nn.functional.scaled_dot_product_attention
    tried = []

    def limit(images, error=OUT_OF_MEMORY[0]):
        def attend_if_it_fits(query, *arguments, **options):
            tried.append(len(query))
            if len(query) > images:
                raise error
            return attend(query, *arguments, **options)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend_if_it_fits)
        return tried

    return limit


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["torch", "cublas", "driver"])
def test_out_of_memory_halves_the_batch_and_changes_nothing_but_rounding(
    tiny_config, tiny_tower, encoder, photographs, small_memory, error, caplog
):
    image = pixels(photographs, 56, 21)
    expected = encoder.encode(image)
    small = Encoder(tiny_config, tiny_tower, "float32", batch=16)
    tried = small_memory(3, error)
    encoding = small.start(image, torch.float32).wait()
    # Some processors multiply few rows by other kernels than many.
    torch.testing.assert_close(encoding.features_NTD, expected, rtol=1e-4, atol=1e-4)
    assert [text.split(":")[0] for text in encoding.notes] == [
        f"out of memory with {images} images at once" for images in (16, 8, 4)
    ]
    assert "going on with 2" in caplog.text
    tried.clear()
    assert small.start(image, torch.float32).wait().notes == (), "it is not tried again"
    assert max(tried) == 2


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OUT_OF_MEMORY[0], InputError, r"tiny-random: out of memory .* a single image; free the GPU"),
        (RuntimeError("CUDA error: an illegal memory access"), RuntimeError, "illegal memory access"),
    ],
)
def test_a_device_that_holds_no_image_and_one_that_is_broken_are_errors(
    tiny_config, tiny_tower, photographs, small_memory, error, kind, message
):
    small_memory(0, error)
    with pytest.raises(kind, match=message):
        Encoder(tiny_config, tiny_tower, "float32").encode(pixels(photographs, 56, 3))


def test_the_largest_magnitude_is_told_before_the_stored_type_cuts_it(tiny_config, tiny_tower, encoder, photographs):
    image = pixels(photographs, 56, 3)
    encoding = encoder.start(image, torch.float16).wait()
    assert torch.equal(encoding.largest_N, encoder.encode(image).abs().amax((1, 2)))
    large = Encoder(tiny_config, tiny_tower, "float32")
    large.model.merger.mlp[2].weight.data *= 1e6
    encoding = large.start(image, torch.float16).wait()
    assert encoding.features_NTD.isinf().any() and (encoding.largest_N > 65504).all()
