"""An epoch of several trials at once, whatever process it is in; out of memory, it is several epochs of fewer."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trial_checkpoint import CONFIG, without_seconds
from tiny_study import World

from lowrank_tune.config.schema import ResourcesSpec
from lowrank_tune.lowrank.trainer import Trained, Trainer
from lowrank_tune.records import TrialConfig
from lowrank_tune.trials import fusion as fusion_module
from lowrank_tune.trials.fusion import Fusion
from lowrank_tune.trials.lane_plan import gains_by_fusing, plan_lanes
from lowrank_tune.trials.outcomes import MaterialPaths, write_material
from lowrank_tune.trials.trial import TrialSession

CONFIGS = [replace(CONFIG, trial_id=f"trial-{number}", seed=number, lr=1e-3 * (1 + number)) for number in range(5)]


@pytest.fixture
def paths(world: World, tmp_path: Path) -> MaterialPaths:
    return write_material(tmp_path / "tune", world.features, world.split, world.optimum_path)


def session_of(config: TrialConfig, paths: MaterialPaths, folder: Path, reported: int = 0) -> TrialSession:
    return TrialSession(config, paths, folder / config.trial_id, 1, 0, reported)


def assert_as_alone(rows: Sequence[Any], paths: MaterialPaths, folder: Path) -> None:
    for config, row in zip(CONFIGS, rows, strict=True):
        (alone,) = without_seconds([session_of(config, paths, folder).epoch()])
        (told,) = without_seconds([row])
        assert {told.pop("stopped_by"), told.pop("reason"), alone.pop("stopped_by"), alone.pop("reason")} == {""}
        assert told == pytest.approx(alone, rel=1e-5)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many trained as one, each time that some did; more than two are out of memory."""
    sizes: list[int] = []
    real = fusion_module.train_together

    def watched(trainers: Sequence[Trainer]) -> list[Trained]:
        sizes.append(len(trainers))
        if len(trainers) > 2:
            raise torch.OutOfMemoryError("not so many")
        return real(trainers)

    monkeypatch.setattr(fusion_module, "train_together", watched)
    return sizes


def test_out_of_memory_they_train_in_smaller_groups_from_then_on(
    groups: list[int], paths: MaterialPaths, tmp_path: Path
) -> None:
    fusion = Fusion(8)
    sessions = [session_of(config, paths, tmp_path / "fused") for config in CONFIGS]
    assert_as_alone(fusion.epoch(sessions), paths, tmp_path / "alone")
    assert groups == [5, 2, 2, 1]
    groups.clear()
    assert [row["epoch"] for row in fusion.epoch(sessions)] == [2] * 5
    assert max(groups) == 2


def test_members_are_shared_out_evenly(groups: list[int], paths: MaterialPaths, tmp_path: Path) -> None:
    sessions = [session_of(config, paths, tmp_path) for config in CONFIGS[:4]]
    Fusion(3).epoch(sessions)
    assert groups == [2, 2]


def test_each_tells_what_it_has_to_tell(groups: list[int], paths: MaterialPaths, tmp_path: Path) -> None:
    before = session_of(CONFIGS[0], paths, tmp_path)
    first = before.epoch()
    before.keep()
    untold = session_of(CONFIGS[0], paths, tmp_path)
    impossible = session_of(replace(CONFIGS[1], rank=13), paths, tmp_path)
    (tmp_path / "trial-2").write_text("not a folder")
    lost = session_of(CONFIGS[2], paths, tmp_path)
    sound = [session_of(config, paths, tmp_path) for config in CONFIGS[3:]]
    told = Fusion(8).epoch([untold, impossible, *sound])
    assert told[0] == first
    assert (told[1]["stopped_by"], math.isnan(told[1]["val_mse"])) == ("error", True)
    assert [row["epoch"] for row in told[2:]] == [1, 1]
    assert groups == [2]
    assert isinstance(Fusion(8).epoch([lost])[0], OSError)


@pytest.mark.parametrize(
    ("given", "families", "numbers", "fused"),
    [
        ({}, ["sketch"], 64, False),
        ({"fuse": "always"}, ["direct"], 10**9, True),
        ({"fuse": "auto"}, ["direct"], 64, False),
        ({"fuse": "auto"}, ["direct", "refined"], 64, True),
        ({"fuse": "auto"}, ["refined"], 256 * 2048, False),
        ({"fuse": "auto", "gpus_per_trial": 0.25}, ["direct"], 256 * 2048, True),
    ],
)
def test_auto_fuses_where_it_was_measured_to_gain_and_on_a_gpu(
    given: dict[str, Any], families: list[str], numbers: int, fused: bool
) -> None:
    assert gains_by_fusing(ResourcesSpec.model_validate(given), families, numbers) is fused


@pytest.mark.parametrize(
    ("given", "fit", "lanes", "at_once"),
    [
        ({}, 2, 2, 16),
        ({"max_concurrent": 4}, 2, 1, 4),
        ({"max_concurrent": 6}, 2, 2, 6),
        ({"gpus_per_trial": 1}, 1, 1, 16),
        ({"gpus_per_trial": 0.25}, 4, 4, 16),
    ],
)
def test_lanes_hold_no_more_trials_than_may_run_and_no_more_cpus_than_they_have(
    given: dict[str, Any], fit: int, lanes: int, at_once: int
) -> None:
    planned = plan_lanes(ResourcesSpec.model_validate(given), fit)
    assert (planned.lanes, planned.at_once) == (lanes, at_once)
    assert planned.lanes * planned.cpus + planned.at_once * planned.share <= fit + 1e-9
