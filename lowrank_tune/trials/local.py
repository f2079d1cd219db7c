"""One trial in this very process, for a debugger: no Ray, no workers, no tracker."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.oracle import Optimum
from lowrank_tune.lowrank.trainer import Trainer
from lowrank_tune.records import FeatureSet, Split, TrialConfig, TrialOutcome
from lowrank_tune.trials.outcome import outcome_of
from lowrank_tune.trials.session import train_epoch


def run_one_trial(
    config: TrialConfig,
    features: FeatureSet,
    split: Split,
    optimum: Optimum,
    directory: Path,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    device: str = "cpu",
) -> TrialOutcome:
    """Train one trial to its end, with the numbers that the same trial has inside a study.

    Args:
        config: what to train.
        features: the images' features.
        split: which of them train and validate.
        optimum: the validation split's.
        directory: takes best_model.safetensors, config.json and history.json.
        on_epoch: told each epoch's figures and the `trial_id`.
        device: where to train.

    Raises:
        InputError: the configuration does not fit the features.
        CacheError: the features cannot be read.
    """
    trainer = Trainer(config, FeatureMatrix(features), split, optimum, device)
    started = time.perf_counter()
    last: dict[str, Any] = {}
    while trainer.stopped_by is None:
        last = train_epoch(trainer, directory)
        if on_epoch is not None:
            on_epoch({"trial_id": config.trial_id, **last})
    return outcome_of(config, last, directory, time.perf_counter() - started)
