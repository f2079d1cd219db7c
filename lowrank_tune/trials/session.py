"""One trial's training, as an actor and a debugger both drive it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowrank_tune.lowrank.trainer import Trainer
from lowrank_tune.records import TrialConfig
from lowrank_tune.trials.material import read_material
from lowrank_tune.trials.paths import MaterialPaths


def open_trainer(config: TrialConfig, paths: MaterialPaths, cpus: float, gpus: float) -> Trainer:
    """Make a trial's trainer on what a study shares, on a GPU when the trial has a part of one.

    Args:
        config: the trial.
        paths: the shared material, mapped once a process.
        cpus: cores reserved for it; torch gets as many threads, at least one.
        gpus: GPUs reserved for it.

    Raises:
        InputError: the configuration does not fit the features.
    """
    torch.set_num_threads(max(1, int(cpus)))
    material = read_material(paths)
    device = "cuda" if gpus and torch.cuda.is_available() else "cpu"
    return Trainer(config, material.data, material.split, material.optimum, device)


def train_epoch(trainer: Trainer, directory: Path) -> dict[str, Any]:
    """Train one epoch and write what it gave.

    Returns:
        `Trainer.step`'s figures, and `stopped_by` and `reason`, both empty while the trial may go on.
    """
    metrics = trainer.step()
    trainer.save(directory)
    return {**metrics, "stopped_by": trainer.stopped_by or "", "reason": trainer.reason}
