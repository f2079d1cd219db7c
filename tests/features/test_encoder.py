import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import AutoImageProcessor, Qwen2_5_VLForConditionalGeneration

from lowrank_tune.errors import InputError
from lowrank_tune.features.checkpoint import find_tower, read_checkpoint_config
from lowrank_tune.features.commit import to_stored
from lowrank_tune.features.decoding import decode_image
from lowrank_tune.features.encoder import Encoder
from lowrank_tune.features.jobs import UnusableError


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


def test_bfloat16_agrees_with_float32(tiny_config, tiny_tower, encoder, photographs):
    image = pixels(photographs, 448, 2)
    rough = Encoder(tiny_config, tiny_tower, "bfloat16").encode(image)
    assert rough.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(rough.float(), encoder.encode(image), dim=-1)
    assert cosine.mean() > 0.999


def test_spectra_of_photographs_decay(encoder, photographs):
    """The quickstart needs features that low rank fits well, and not too well."""
    energy = torch.linalg.svdvals(encoder.encode(pixels(photographs, 448, 20)).double()) ** 2
    kept = (energy[:, :32].sum(1) / energy.sum(1)).sqrt()
    assert 0.9 < kept.mean() < 0.999
    assert kept.min() > 0.75


def spoil(directory, shard, change):
    tensors = load_file(directory / shard)
    change(tensors)
    save_file(tensors, directory / shard)


@pytest.mark.parametrize(
    ("problem", "change"),
    [
        ("mismatched keys", lambda tensors: tensors.update({"visual.merger.ln_q.weight": np.ones(7, np.float32)})),
        ("missing keys", None),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path, tiny_config, problem, change):
    directory = tmp_path / "checkpoint"
    shutil.copytree(tiny_config.directory, directory)
    if change:
        spoil(directory, "model-00003-of-00003.safetensors", change)
    else:
        config = (directory / "config.json").read_text()
        (directory / "config.json").write_text(config.replace('"depth": 2', '"depth": 3'))
    config = read_checkpoint_config(str(directory), tmp_path)
    with pytest.raises(InputError, match=rf"\d+ {problem} in the vision tower, such as"):
        Encoder(config, find_tower(config, tmp_path), "float32")


def test_a_preprocessor_for_another_tower_is_refused(tmp_path, tiny_config, tiny_tower):
    directory = tmp_path / "checkpoint"
    shutil.copytree(tiny_config.directory, directory)
    text = (directory / "preprocessor_config.json").read_text()
    (directory / "preprocessor_config.json").write_text(text.replace('"patch_size": 14', '"patch_size": 16'))
    with pytest.raises(InputError, match="patch_size is 16 in preprocessor_config.json"):
        Encoder(read_checkpoint_config(str(directory), tmp_path), tiny_tower, "float32")


def test_what_does_not_fit_the_stored_type_is_refused_with_the_remedy():
    fine = torch.tensor([[65280.0, -1.0]])
    assert to_stored(fine.bfloat16(), "float16").tolist() == fine.tolist()
    with pytest.raises(UnusableError, match=r"7e\+04 does not fit float16; set features.store_dtype to bfloat16"):
        to_stored(torch.tensor([[70000.0, 1.0]]), "float16")
    assert to_stored(torch.tensor([[70000.0]]), "bfloat16").isfinite().all()
    with pytest.raises(UnusableError, match="NaN or infinite"):
        to_stored(torch.tensor([[float("nan")]]), "float32")


def test_the_encoder_runs_without_ray_and_mlflow():
    program = "import sys; sys.modules['ray'] = sys.modules['mlflow'] = None; import lowrank_tune.features.encoder"
    subprocess.run([sys.executable, "-c", program], check=True, env=dict(os.environ), timeout=120)
