import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
from tiny_study import DIM, IMAGES, TOKENS, World, build_plan, make_world

from lowrank_tune.spec.plan import Plan


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


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
