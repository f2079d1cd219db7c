"""Small seeded feature sets, in memory and on disk as the features room writes them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowrank_tune.records import FeatureRow, FeatureSet


@pytest.fixture(scope="session")
def power_law() -> Callable[..., Tensor]:
    """Features [n, tokens, dim] with a power-law spectrum whose axes they share in part; token norms vary."""

    def make(n: int, tokens: int, dim: int, seed: int = 0, decay: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        count = min(tokens, dim)
        shared = torch.linalg.qr(torch.randn(dim, count, generator=generator)).Q.mT
        own = torch.randn(n, count, dim, generator=generator) / dim**0.5
        sigma = torch.arange(1, count + 1).pow(-decay)[:, None]
        mixing = torch.randn(n, tokens, count, generator=generator)
        norms = torch.exp(0.6 * torch.randn(n, tokens, 1, generator=generator))
        return norms * (mixing @ (sigma * (0.8 * shared + 0.6 * own)))

    return make


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., FeatureSet]:
    """Writes features into a folder as a cache's shards."""

    def write(directory: Path, x_NTD: Tensor, dtype: str = "float32", shard_size: int = 8) -> FeatureSet:
        (directory / "shards").mkdir(exist_ok=True)
        rows = []
        for start in range(0, len(x_NTD), shard_size):
            part, name = x_NTD[start : start + shard_size], f"{start:05d}.safetensors"
            save_file({"features": part.to(getattr(torch, dtype)).contiguous()}, directory / "shards" / name)
            rows += [FeatureRow(f"{start + row:064x}", name, row) for row in range(len(part))]
        tokens, dim = x_NTD.shape[1:]
        return FeatureSet(str(directory), "0" * 16, "synthetic", "random", dtype, tokens, dim, tuple(rows), "")

    return write


@pytest.fixture
def make_features(tmp_path: Path, write_shards: Callable[..., FeatureSet]) -> Callable[..., FeatureSet]:
    """Writes features as a cache's shards."""
    return partial(write_shards, tmp_path)
