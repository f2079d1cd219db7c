"""A few measured steps of a training, from which the whole is reckoned. T tokens, D dim."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.lowrank.trainer import PRECOMPUTED_BYTES, VALIDATION_BATCH, Trainer
from lowrank_tune.records import FeatureSet, Split, TrialConfig

STEPS = 3
"""Steps of an epoch that is timed, at most; the rest is reckoned."""


class Noise(FeatureMatrix):
    """A few random features that stand for those of so many images, stored in a dtype."""

    def __init__(self, tokens: int, dim: int, images: int, dtype: str = "float32") -> None:
        super().__init__(FeatureSet("", "", "noise", "random", dtype, tokens, dim, (), ""))
        self._images = images
        generator = torch.Generator().manual_seed(0)
        self._x_NTD = torch.randn(VALIDATION_BATCH, tokens, dim, generator=generator)

    def __len__(self) -> int:
        return self._images

    def load(self, indices: Sequence[int], dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """Repeat the few that there are; otherwise as `FeatureMatrix.load`."""
        x_NTD = self._x_NTD[[index % len(self._x_NTD) for index in indices]].to(dtype)
        return x_NTD if out is None else out.copy_(x_NTD)


def measure_training(config: TrialConfig, data: FeatureMatrix, split: Split, device: str) -> tuple[float, int]:
    """Return the seconds of a whole training and the bytes that it holds, from a few images' first epochs.

    The bytes are what it allocated on a GPU, else weights, gradients, moments and a batch; and, of all training images,
    what it keeps of them.
    """
    train = min(len(split.train), STEPS * config.batch_size)
    validation = range(min(len(split.validation), VALIDATION_BATCH))
    few = Split(tuple(range(train)), tuple(validation), ())
    if device == "cuda":
        gc.collect()  # what an earlier training has left in cycles
        torch.cuda.reset_peak_memory_stats()
    optimum = measure_optimum([data.load(validation)])
    # Any metric takes as long.
    any_DD = torch.eye(data.dim)
    trainer = Trainer(replace(config, epochs=4, patience=4), data, few, optimum, device, factor_DD=any_DD)
    seconds = []
    for _ in range(3):
        # An epoch ends with figures that are read from the device: nothing of it runs on after that.
        started = time.perf_counter()
        trainer.step()
        seconds.append(time.perf_counter() - started)
    # The first epoch also makes what later ones keep.
    scale, later = len(split.train) / train, min(seconds[1:])
    whole = scale * (max(seconds[0], later) + (config.epochs - 1) * later)
    kept = round(scale * trainer.kept_bytes)
    kept = kept if kept <= PRECOMPUTED_BYTES else 0
    if device == "cuda":
        return whole, torch.cuda.max_memory_allocated() - trainer.kept_bytes + kept
    weights = sum(weight.nbytes for weight in trainer.model.parameters())
    return whole, 5 * weights + 4 * 4 * config.batch_size * data.tokens * data.dim + kept
