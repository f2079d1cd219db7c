from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_study import DIM, IMAGES, TOKENS, build_plan, write_features

from lowrank_tune.config.plan import Plan
from lowrank_tune.records import FeatureSet


@pytest.fixture(scope="session")
def images_NTD() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, TOKENS, DIM, generator=generator) * torch.logspace(0, -2, DIM)


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory, images_NTD: torch.Tensor) -> FeatureSet:
    return write_features(tmp_path_factory.mktemp("features") / "cache", images_NTD)


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Plan]:
    return partial(build_plan, tmp_path / "results")
