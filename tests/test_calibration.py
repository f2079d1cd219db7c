"""What `plan` reckons of trials that several workers train."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lowrank_tune.config.plan import make_plan
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.cost import Calibration, calibrate
from lowrank_tune.records import Split

SPLIT = Split(tuple(range(64)), tuple(range(64, 72)), tuple(range(72, 80)))


def calibration(tmp_path: Path, **resources: Any) -> Calibration:
    study = {
        "name": "test",
        "features": {"source": {"samples": 80}},
        "search": {"space": {"rank": 8, "batch_size": 16, "families": {"direct": {}}}},
        "resources": resources,
    }
    plan = make_plan(StudySpec.model_validate(study), tmp_path, datetime(2026, 1, 1, tzinfo=UTC))
    before = torch.get_num_threads()
    try:
        return calibrate(plan, 32, 64, SPLIT)
    finally:
        torch.set_num_threads(before)


def test_workers_take_places_from_trials_and_each_holds_its_share_of_a_batch(tmp_path: Path) -> None:
    share = (os.cpu_count() or 1) / 8
    one = calibration(tmp_path, cpus_per_trial=share)
    four = calibration(tmp_path, cpus_per_trial=share, workers_per_trial=4)
    assert (one.trials_at_once, four.trials_at_once) == (8, 2)
    assert one.memory_per_trial - four.memory_per_trial == 4 * 4 * (16 - 4) * 32 * 64
    assert four.expected_epochs == one.expected_epochs
