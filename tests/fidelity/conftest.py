"""A tiny language model, and features of a few photographs for it."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.features.checkpoint import find_tower, read_checkpoint_config
from lowrank_tune.features.decoding import decode_image
from lowrank_tune.features.encoder import Encoder
from lowrank_tune.features.sources import write_samples
from lowrank_tune.features.tiny import write_tiny_checkpoint
from lowrank_tune.fidelity.model import LanguageModel

SIZE = 112


@pytest.fixture(scope="session")
def model_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of caches that the tiny checkpoint lies in."""
    root = tmp_path_factory.mktemp("whole")
    write_tiny_checkpoint(root / "checkpoints")
    return root


@pytest.fixture(scope="session")
def asked_features() -> FeaturesSpec:
    encoder = {"checkpoint": "tiny-random", "image_size": SIZE, "compute_dtype": "float32"}
    return FeaturesSpec.model_validate({"source": {"samples": 8}, "encoder": encoder})


@pytest.fixture(scope="session")
def language_model(asked_features: FeaturesSpec, model_root: Path) -> LanguageModel:
    return LanguageModel(asked_features, model_root)


@pytest.fixture(scope="session")
def squares_NHWC(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.uint8]:
    """Photographs as the encoder sees them."""
    written = write_samples(8, 0, tmp_path_factory.mktemp("photographs"))
    return np.stack([decode_image(path.read_bytes(), SIZE) for path, _ in written])


@pytest.fixture(scope="session")
def x_NTD(model_root: Path, squares_NHWC: NDArray[np.uint8]) -> Tensor:
    """And their features."""
    config = read_checkpoint_config("tiny-random", model_root)
    return Encoder(config, find_tower(config, model_root), "float32").encode(squares_NHWC)
