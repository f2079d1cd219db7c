"""The forward for square images beside transformers' own, to the bit where both take the same steps."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from lowrank_tune.features.decoding import decode_image
from lowrank_tune.features.encoder import Encoder
from lowrank_tune.features.window_attention import SquareTower, WindowGrid, align_mlp, cut_patches, window_grid

PUBLISHED = {
    "depth": 2,
    "fullatt_block_indexes": [1],
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "window_size": 112,
}
"""The 3B tower, but for its depth: one windowed block and one with full attention."""

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def encoders(tiny_config, tiny_tower):
    return {dtype: Encoder(tiny_config, tiny_tower, dtype) for dtype in ("float32", "bfloat16")}


def noise(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(("size", "count"), [(28, 1), (56, 5), (84, 2), (112, 1), (224, 5), (448, 2), (560, 1)])
def test_float32_features_are_transformers_to_the_bit(encoders, size, count):
    encoder, pixels = encoders["float32"], torch.from_numpy(noise(count, size))
    assert window_grid(encoder.model.config, size) is not None
    assert torch.equal(encoder.forward(pixels), encoder.forward_as_stock(pixels))


@pytest.mark.parametrize("size", [140, 168, 420])
def test_windows_that_differ_go_through_transformers_own_forward(encoders, monkeypatch, size):
    encoder, pixels = encoders["float32"], torch.from_numpy(noise(2, size))
    assert window_grid(encoder.model.config, size) is None
    monkeypatch.setattr(SquareTower, "__call__", None)
    assert torch.equal(encoder.forward(pixels), encoder.forward_as_stock(pixels))


@pytest.mark.parametrize("size", [112, 448])
def test_bfloat16_features_are_float32s_up_to_rounding(encoders, photographs, size):
    pixels = torch.from_numpy(np.stack([decode_image(path.read_bytes(), size) for path in photographs[:4]]))
    exact = encoders["float32"].forward(pixels)
    for rough in (encoders["bfloat16"].forward(pixels), encoders["bfloat16"].forward_as_stock(pixels)):
        assert cosine_similarity(rough.float(), exact, dim=-1).min() > 0.999


@pytest.mark.parametrize("size", [28, 84, 448])
def test_patches_are_the_preprocessors_to_the_bit(encoders, size):
    """Every byte value in every channel; only the order of the patches is another."""
    encoder = encoders["float32"]
    values = np.arange(size * size * 3, dtype=np.int64) * 7 % 256
    pixels = torch.from_numpy(values.astype(np.uint8).reshape(1, size, size, 3))
    assert size == 28 or all(len(pixels[..., channel].unique()) == 256 for channel in range(3))
    theirs = Qwen2VLImageProcessor(patch_size=14)(
        images=list(pixels.permute(0, 3, 1, 2)), do_resize=False, return_tensors="pt"
    ).pixel_values
    square = SquareTower(encoder.model, window_grid(encoder.model.config, size))
    ours = encoder.normalised_patches(pixels, square.grid)[0]
    whole = WindowGrid(square.grid.side, square.grid.side, square.grid.merge)
    assert torch.equal(encoder.normalised_patches(pixels, whole)[0], theirs)
    by_token = theirs.view(-1, square.grid.merge**2, theirs.shape[1])
    assert torch.equal(ours.view(by_token.shape)[square.rows_T], by_token)


def test_blocks_of_the_published_dimensions_are_the_same_bits_and_the_quicker_steps_the_same_up_to_rounding():
    """What a GPU takes instead, here in float32, where rounding is all that may differ."""
    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(**PUBLISHED)
    config._attn_implementation = "sdpa"
    model = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    grid = window_grid(config, 224)
    assert (grid.side, grid.window, grid.merge) == (16, 8, 2)
    patches = cut_patches(torch.from_numpy(noise(2, 224)).float() / 128 - 1, grid, 2)
    tower = SquareTower(model, grid)
    theirs = patches.view(2, -1, grid.merge**2, patches.shape[-1])[:, tower.rows_T].reshape(-1, patches.shape[-1])
    output = model(theirs, grid_thw=torch.tensor([[1, grid.side, grid.side]] * 2)).pooler_output
    expected = output.view(2, 64, 2048)
    assert torch.equal(tower(patches), expected)
    assert torch.equal(tower(patches[1:])[0], expected[1])

    tower.exact = False
    align_mlp(model)
    assert model.blocks[0].mlp.gate_proj.weight.shape == (3456, 1280)
    quick = tower(patches)
    assert not torch.equal(quick, expected)
    torch.testing.assert_close(quick, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
