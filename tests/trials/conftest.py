from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_study import DIM, IMAGES, TOKENS, World, build_plan, make_world

from lowrank_tune.config.plan import Plan


@pytest.fixture(scope="session")
def images_NTD() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, TOKENS, DIM, generator=generator) * torch.logspace(0, -2, DIM)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, images_NTD: torch.Tensor) -> World:
    return make_world(tmp_path_factory.mktemp("features"), images_NTD)


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Plan]:
    return partial(build_plan, tmp_path / "results")
