"""One trial's training: continued where it was, an epoch at a time, whatever process it is in."""

from __future__ import annotations

import logging
import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lowrank_tune.errors import InputError, LowrankTuneError, redact
from lowrank_tune.features.remote import local_copy
from lowrank_tune.files import write_json, write_whole
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.device import device_for, is_out_of_memory
from lowrank_tune.lowrank.distributed import ALONE, World
from lowrank_tune.lowrank.svd import Optimum, kept_optimum
from lowrank_tune.lowrank.trainer import FIGURES, Trainer, largest_share
from lowrank_tune.lowrank.weighted import read_metric
from lowrank_tune.records import ANSWERS_METRIC, VALIDATION_OPTIMUM, FeatureSet, Split, TrialConfig, TrialOutcome
from lowrank_tune.trials.outcomes import (
    CHECKPOINT,
    FEATURES,
    SPLIT,
    begin_trial,
    outcome_of,
    read_history,
    write_history,
)

logger = logging.getLogger(__name__)

_SHRINK = 4
"""What the batch is divided by after a trial ran out of memory; it gets one such retry."""
_CHECKPOINT_SHARE = 0.05
"""The part of a trial's time that its checkpoints may take."""


def write_inputs(study_dir: Path, features: FeatureSet, split: Split) -> None:
    """Write what a study's trials share; the optimum of its validation images is measured, once.

    Raises:
        InputError: a part of the split holds nothing but zeros.
    """
    data = FeatureMatrix(features)
    for part in ("train", "validation", "test"):
        images = getattr(split, part)
        if images and not any(bool(x_NTD.any()) for x_NTD in data.batches(images, 16)):
            raise InputError(f"split: every {part} image holds nothing but zeros; look at the source images")
    tune = study_dir / "tune"
    tune.mkdir(parents=True, exist_ok=True)
    features.write(tune / FEATURES)
    write_json(tune / SPLIT, split, indent=None)
    of = features.digest(split.validation)
    kept_optimum(study_dir / VALIDATION_OPTIMUM, of, data.batches(split.validation, 16))


@lru_cache(maxsize=1)
def read_inputs(study_dir: Path) -> tuple[FeatureMatrix, Split, Optimum]:
    """Read what `write_inputs` wrote; the same objects again for every later trial of this process.

    Features that do not lie on a local disk are copied to this node by its first trial; the others wait for it.
    """
    data = FeatureMatrix(local_copy(FeatureSet.read(study_dir / "tune" / FEATURES)))
    return data, Split.read(study_dir / "tune" / SPLIT), Optimum.load(study_dir / VALIDATION_OPTIMUM)


_metric_of = lru_cache(maxsize=1)(read_metric)
"""Factorised once for all trials of this process."""


def open_trainer(
    config: TrialConfig, study_dir: Path, device: str, micro_batch: int | None = None, world: World = ALONE
) -> Trainer:
    """Make the trainer of a trial on what `write_inputs` wrote and, where it needs it, the metric beside that."""
    data, split, optimum = read_inputs(study_dir)
    weighted = config.method != config.family
    factor_DD = _metric_of(study_dir / ANSWERS_METRIC, data.dim) if weighted else None
    return Trainer(config, data, split, optimum, device, micro_batch, world, factor_DD)


class TrialSession:
    """Trains one trial, its settings those of `TrialActor`, from where an earlier process left it on.

    Its checkpoint is none of Tune's: the same file serves a retry after a crash, a retry with less memory and a study
    that is resumed. Epochs on file after the `reported` one are told before any is trained. Of several processes, each
    has a session, and the first one the files.
    """

    def __init__(self, settings: dict[str, Any], world: World = ALONE) -> None:
        torch.set_num_threads(max(1, int(settings["cpus"])))
        self._config = TrialConfig(**settings["trial"])
        self._study_dir = Path(settings["study_dir"])
        self._directory = self._study_dir / "trials" / self._config.trial_id
        self._device = device_for(settings["gpus"])
        self._reported = settings.get("reported", 0)
        self._world = world
        self._trainer: Trainer | None = None
        self._untold: list[dict[str, Any]] | None = None
        self._whole_share = self.micro_batch = largest_share(self._config, world)
        self._kept_epoch = 0
        self._kept_at = time.perf_counter()
        self._keeping_took = 0.0

    def epoch(self) -> dict[str, Any]:
        """Train one epoch, as `train_epoch`; a failure that another process would meet again is told in it.

        Raises:
            OSError: this machine cannot reach the files, or the other workers.
            torch.AcceleratorError: this process has lost its device.
        """
        try:
            if self._untold is None:
                self._untold = self._find_untold()
            return self._untold.pop(0) if self._untold else self._train_in_memory()
        except (OSError, torch.AcceleratorError):
            raise
        except Exception as error:
            if self._world.size > 1:  # the others wait for this one: whoever started them all has to end them
                raise
            if not isinstance(error, LowrankTuneError):
                logger.exception("trial %s failed", self._config.trial_id)
            return self._failed(error)

    def _train_in_memory(self) -> dict[str, Any]:
        """Train, and where memory does not suffice once more with less of the batch in it."""
        less = math.ceil(self._whole_share / _SHRINK)
        try:
            return self._train()
        except Exception as error:
            if not is_out_of_memory(error) or self._world.size > 1 or self.micro_batch <= less:
                raise
            logger.warning("trial %s: %s", self._config.trial_id, error)
        # Out of the handler: until here the error's traceback holds what the failed epoch had allocated.
        self._trainer = None
        torch.cuda.empty_cache()
        self.micro_batch = less
        return self._train()

    def _train(self) -> dict[str, Any]:
        trainer = self._trainer = self._trainer or self._open()
        result = train_epoch(trainer, self._directory)
        if time.perf_counter() - self._kept_at >= self._keeping_took / _CHECKPOINT_SHARE:
            self.keep()
        return result

    def _open(self) -> Trainer:
        state = self._world.of_first(self._checkpoint() if self._world.first else {})
        self.micro_batch = min(self.micro_batch, state.get("micro_batch", self.micro_batch))
        trainer = open_trainer(self._config, self._study_dir, self._device, self.micro_batch, self._world)
        if state:
            trainer.restore(state["trainer"])
            self._kept_epoch = trainer.epoch
        return trainer

    def _checkpoint(self) -> dict[str, Any]:
        path = self._directory / CHECKPOINT
        older = path.with_suffix(".safetensors")
        if older.is_file():
            logger.warning("trial %s begins afresh: an older version has kept %s", self._config.trial_id, older.name)
            older.unlink()
        if not path.is_file():
            return {}
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            logger.warning("trial %s begins afresh: %s cannot be read (%s)", self._config.trial_id, path, error)
            return {}
        return state if state.get("config") == asdict(self._config) else {}

    def keep(self) -> None:
        """Write a checkpoint of the last epoch that ended, when there is none yet and the training is not over."""
        trainer = self._trainer if self._world.first else None
        if trainer is None or trainer.stopped_by is not None or trainer.epoch <= self._kept_epoch:
            return
        started = time.perf_counter()
        # A process's share of the batch is no sign that memory is short: the trial may go on with fewer processes.
        micro_batch = self.micro_batch if self.micro_batch < self._whole_share else self._config.batch_size
        state = {"config": asdict(self._config), "micro_batch": micro_batch, "trainer": trainer.state()}
        write_whole(self._directory / CHECKPOINT, lambda path: torch.save(state, path))
        self._kept_epoch, self._kept_at = trainer.epoch, time.perf_counter()
        self._keeping_took = self._kept_at - started

    def _find_untold(self) -> list[dict[str, Any]]:
        """The epochs on file that the study has not heard of: its driver, or an earlier process of the trial, died."""
        rows = self._world.of_first(read_history(self._directory))
        if not rows or not self._ends_at(rows[-1]):
            if not self._world.of_first((self._directory / CHECKPOINT).is_file()):
                return []
            self._trainer = self._open()
            rows = self._trainer.history
        results = [_result(rows[:count], self._ends_at(rows[count - 1])) for count in range(1, len(rows) + 1)]
        untold = [result for result in results if result["epoch"] > self._reported]
        return untold or [result for result in results if result["stopped_by"]]

    def _ends_at(self, row: dict[str, float]) -> str:
        return self._config.ends_at(int(row["epoch"]), int(row["best_epoch"])) or ""

    def _failed(self, error: Exception) -> dict[str, Any]:
        rows = self._trainer.history if self._trainer else []
        last = rows[-1] if rows else {"epoch": 0, "best_epoch": 0}
        best = {name: value for name, value in last.items() if name == "epoch" or name.startswith("best_")}
        said = str(error) if isinstance(error, LowrankTuneError) else f"{type(error).__name__}: {error}"
        where = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        if is_out_of_memory(error):
            said = f"out of memory{where} with {self.micro_batch} images in it at a time; lower batch_size ({said})"
        else:
            said += f" ({where.strip()})" * bool(where)
        figures = self._trainer.figures if self._trainer else FIGURES
        row = dict.fromkeys(figures, math.nan) | {"seconds": 0.0} | best
        return _result([*rows, row], "error", " ".join(redact(said).split()))


def train_epoch(trainer: Trainer, directory: Path) -> dict[str, Any]:
    """Train one epoch and write what it gave.

    Returns `Trainer.step`'s figures, `trained_seconds` of all epochs, and `stopped_by` and `reason`, both empty while
    the trial may go on.
    """
    row = trainer.step()
    if trainer.world.first:
        trainer.save(directory)
        write_history(directory, trainer.history)
    earlier = [other for other in trainer.history if other["epoch"] < row["epoch"]]
    return _result([*earlier, row], trainer.stopped_by or "", trainer.reason)


def _result(rows: Sequence[dict[str, float]], stopped_by: str, reason: str = "") -> dict[str, Any]:
    seconds = sum(row["seconds"] for row in rows)
    return {**rows[-1], "trained_seconds": seconds, "stopped_by": stopped_by, "reason": reason}


def run_one_trial(
    config: TrialConfig,
    study_dir: Path,
    on_epoch: Callable[[str, int, dict[str, Any]], None],
    device: str = "cpu",
) -> TrialOutcome:
    """Train one trial to its end in this process, with the numbers that it has inside a study."""
    trainer, directory = open_trainer(config, study_dir, device), study_dir / "trials" / config.trial_id
    begin_trial(directory, config)
    last: dict[str, Any] = {}
    while trainer.stopped_by is None:
        last = train_epoch(trainer, directory)
        on_epoch(config.trial_id, int(last["epoch"]), last)
    return outcome_of(config, last, directory)
