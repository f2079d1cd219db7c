from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import World

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.svd import Optimum
from lowrank_tune.lowrank.trainer import Trainer
from lowrank_tune.records import TrialConfig
from lowrank_tune.trials.trial import read_checkpoint, write_checkpoint

CONFIG = TrialConfig(
    "r002-direct-0000", 0, 5, "direct", 2, 0.01, 1e-5, 4, 4, 4, {"lambda_b": 1e-4, "lambda_ortho": 0.0}
)


def without_seconds(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in history]


def test_a_restored_training_goes_on_as_if_it_had_never_stopped(world: World, tmp_path: Path) -> None:
    def trainer() -> Trainer:
        return Trainer(CONFIG, FeatureMatrix(world.features), world.split, Optimum.load(world.optimum_path))

    whole, first, second = trainer(), trainer(), trainer()
    for _ in range(4):
        whole.step()
    first.step()
    first.step()
    write_checkpoint(tmp_path / "c.safetensors", first.state())
    second.restore(read_checkpoint(tmp_path / "c.safetensors"))
    second.step()
    second.step()
    assert without_seconds(second.history) == without_seconds(whole.history)


def test_a_checkpoint_keeps_every_kind_of_value(tmp_path: Path) -> None:
    state: dict[str, Any] = {"a": {0: (1, 2.5), 1: [None, True, "x"]}, "inf": float("inf"), "t": torch.arange(3)}
    write_checkpoint(tmp_path / "c.safetensors", state)
    read = read_checkpoint(tmp_path / "c.safetensors")
    assert torch.equal(read.pop("t"), state.pop("t"))
    assert read == state


def test_a_checkpoint_refuses_what_it_would_have_to_pickle(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold set"):
        write_checkpoint(tmp_path / "c.safetensors", {"a": {1, 2}})
    assert not list(tmp_path.iterdir())


def test_a_pickle_is_no_checkpoint_and_runs_nothing(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": Payload()}, tmp_path / "c.safetensors")
    with pytest.raises(InputError, match="no checkpoint that can be read"):
        read_checkpoint(tmp_path / "c.safetensors")
    assert not (tmp_path / "ran").exists()
