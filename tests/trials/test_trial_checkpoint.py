from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import World

from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.oracle import Optimum
from lowrank_tune.lowrank.trainer import Trainer
from lowrank_tune.records import TrialConfig
from lowrank_tune.trials.checkpoint import read_checkpoint, write_checkpoint
from lowrank_tune.trials.paths import write_material
from lowrank_tune.trials.trainable import TrialActor, actor_config

CONFIG = TrialConfig(
    "r002-direct-0000", 0, 5, "direct", 2, 0.01, 1e-5, 4, 4, 4, {"lambda_b": 1e-4, "lambda_ortho": 0.0}
)


def without_seconds(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def test_a_restored_training_goes_on_as_if_it_had_never_stopped(world: World, tmp_path: Path) -> None:
    def trainer() -> Trainer:
        return Trainer(CONFIG, FeatureMatrix(world.features), world.split, Optimum.load(world.optimum_path))

    whole, first, second = trainer(), trainer(), trainer()
    for _ in range(4):
        whole.step()
    first.step()
    first.step()
    write_checkpoint(tmp_path / "kept", first.state())
    second.restore(read_checkpoint(tmp_path / "kept"))
    second.step()
    second.step()
    assert without_seconds(second.history) == without_seconds(whole.history)


def test_an_actor_saves_and_loads_its_trial(world: World, tmp_path: Path) -> None:
    paths = write_material(tmp_path / "tune", world.features, world.split, world.optimum_path)
    config = {"trial": vars_of(CONFIG), **actor_config(paths, tmp_path / "trials", 1, 0)}
    actor = bare_actor(config)
    actor.step()
    actor.save_checkpoint(str(tmp_path))
    other = bare_actor(config)
    other.load_checkpoint(str(tmp_path))
    expected, restored = actor.step(), other.step()
    assert restored["epoch"] == 2
    assert {**restored, "seconds": 0} == {**expected, "seconds": 0}


def test_a_checkpoint_keeps_every_kind_of_value(tmp_path: Path) -> None:
    state: dict[str, Any] = {"a": {0: (1, 2.5), 1: [None, True, "x"]}, "inf": float("inf"), "t": torch.arange(3)}
    write_checkpoint(tmp_path / "kept", state)
    read = read_checkpoint(tmp_path / "kept")
    assert torch.equal(read.pop("t"), state.pop("t"))
    assert read == state


def test_a_checkpoint_refuses_what_it_would_have_to_pickle(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold set"):
        write_checkpoint(tmp_path / "kept", {"a": {1, 2}})


def vars_of(config: TrialConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__slots__}


def bare_actor(config: dict[str, Any]) -> TrialActor:
    """An actor without Tune around it."""
    actor = TrialActor.__new__(TrialActor)
    actor.setup(config)
    return actor
