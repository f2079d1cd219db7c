"""Small trainings in processes of their own, which load no transformers."""

from __future__ import annotations

import time
from multiprocessing.synchronize import Barrier

import torch

from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.lowrank.trainer import Trainer
from lowrank_tune.records import FeatureSet, Split, TrialConfig

TOGETHER_S = 100
"""For which a process waits for the others."""
_together: Barrier


def begin(barrier: Barrier) -> None:
    """In a new process: one thread, as a trial has."""
    global _together
    _together = barrier
    torch.set_num_threads(1)


def train_together(config: TrialConfig, features: FeatureSet, split: Split, device: str) -> tuple[float, float, int]:
    """Train with all the others; return when that began and ended, and the memory that the card then has left."""
    _together.wait(TOGETHER_S)
    started = time.time()
    train(config, features, split, device)
    ended = time.time()
    _together.wait(TOGETHER_S)  # while every process holds what it has
    left = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    _together.wait(TOGETHER_S)
    return started, ended, left


def train(config: TrialConfig, features: FeatureSet, split: Split, device: str) -> None:
    """Train to the end."""
    data = FeatureMatrix(features)
    trainer = Trainer(config, data, split, measure_optimum([data.load(split.validation)]), device)
    while trainer.stopped_by is None:
        trainer.step()
