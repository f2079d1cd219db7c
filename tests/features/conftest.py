"""Real photographs and the tiny checkpoint, made once for this room."""

from pathlib import Path

import pytest

from lowrank_tune.features.checkpoint import (
    CheckpointConfig,
    TowerFiles,
    find_tower,
    read_checkpoint_config,
    write_tiny_checkpoint,
)
from lowrank_tune.features.sources import write_samples


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [path for path, _ in write_samples(40, 0, tmp_path_factory.mktemp("photographs"))]


@pytest.fixture(scope="session")
def checkpoint_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="session")
def tiny_config(checkpoint_root: Path) -> CheckpointConfig:
    write_tiny_checkpoint(checkpoint_root / "checkpoints")
    return read_checkpoint_config("tiny-random", checkpoint_root)


@pytest.fixture(scope="session")
def tiny_tower(tiny_config: CheckpointConfig, checkpoint_root: Path) -> TowerFiles:
    return find_tower(tiny_config, checkpoint_root)
