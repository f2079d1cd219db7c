"""One trial's training: continued where it was, an epoch at a time, whatever process it is in."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_tune.errors import InputError, LowrankTuneError, redact
from lowrank_tune.features.remote import local_copy
from lowrank_tune.files import write_whole
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.distributed import ALONE, World
from lowrank_tune.lowrank.svd import Optimum
from lowrank_tune.lowrank.trainer import FIGURES, Trainer, largest_share
from lowrank_tune.records import FeatureSet, Split, TrialConfig, TrialOutcome
from lowrank_tune.trials.outcomes import (
    CHECKPOINT,
    InputPaths,
    begin_trial,
    outcome_of,
    read_history,
    write_history,
)

_REST = "state"


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a state of dicts, lists, tuples, tensors, numbers, text and None; the file is replaced as a whole.

    Raises:
        TypeError: it holds anything else.
    """
    tensors: dict[str, Tensor] = {}
    rest = json.dumps(_encode(state, tensors))
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata={_REST: rest}))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote, its tensors on the CPU.

    Raises:
        InputError: it is none, or it is damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            rest = json.loads((file.metadata() or {})[_REST])
            state: dict[str, Any] = _decode(rest, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path}: no checkpoint that can be read ({error}); delete it to train afresh") from error
    return state


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    # Containers are tagged because JSON knows neither tuples nor keys that are numbers, and an optimiser has both.
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Tensor():
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {"tensor": name}
        case dict():
            return {"dict": [[key, _encode(item, tensors)] for key, item in value.items()]}
        case list():
            return {"list": [_encode(item, tensors) for item in value]}
        case tuple():
            return {"tuple": [_encode(item, tensors) for item in value]}
        case _:
            raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    match value:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": items}:
            return {key: _decode(item, tensors) for key, item in items}
        case {"list": items}:
            return [_decode(item, tensors) for item in items]
        case {"tuple": items}:
            return tuple(_decode(item, tensors) for item in items)
        case _:
            return value


@dataclass(frozen=True, slots=True)
class TrialInputs:
    """What a study's trials share, in memory or mapped into it."""

    data: FeatureMatrix
    split: Split
    optimum: Optimum


@lru_cache(maxsize=1)
def read_inputs(paths: InputPaths) -> TrialInputs:
    """Read what a study's trials share; the same object again for every later trial of this process.

    Features that do not lie on a local disk are copied to this node by its first trial; the others wait for it.
    """
    split = json.loads(Path(paths.split).read_text(encoding="utf-8"))
    return TrialInputs(
        data=FeatureMatrix(local_copy(FeatureSet.read(Path(paths.features)))),
        split=Split(**{name: tuple(indices) for name, indices in split.items()}),
        optimum=Optimum.load(Path(paths.optimum)),
    )


logger = logging.getLogger(__name__)

_SHRINK = 4
"""What the batch is divided by after a trial ran out of memory; it gets one such retry."""
_CHECKPOINT_SHARE = 0.05
"""The part of a trial's time that its checkpoints may take."""


class TrialSession:
    """Trains one trial, from where an earlier process left it on.

    Its checkpoint lies beside its other files and is none of Tune's: the same file serves a retry after a crash, a
    retry with less memory and a study that is resumed, and Tune has nothing to copy, register and restore.

    Args:
        config: the trial.
        paths: what a study's trials share, mapped once a process.
        directory: has its config.json; takes best_model.safetensors, history.json, and the checkpoint while it trains.
        cpus: cores reserved for it; torch gets as many threads, at least one.
        gpus: GPUs reserved for it.
        reported: the last epoch that the study has heard of; later ones on file are told before any is trained.
        world: the processes that train it, each by a session of its own; the first one has its files.

    Attributes:
        micro_batch: images in memory at a time: this process's share of the batch, or a part of it once memory did not
            suffice.
    """

    def __init__(
        self,
        config: TrialConfig,
        paths: InputPaths,
        directory: Path,
        cpus: float,
        gpus: float,
        reported: int = 0,
        world: World = ALONE,
    ) -> None:
        torch.set_num_threads(max(1, int(cpus)))
        self._config = config
        self._paths = paths
        self._directory = directory
        self._device = "cuda" if gpus and torch.cuda.is_available() else "cpu"
        self._trainer: Trainer | None = None
        self._reported = reported
        self._untold: list[dict[str, float]] | None = None
        self._on_file: list[dict[str, float]] = []
        self._world = world
        self.micro_batch = largest_share(config, world)
        self._kept_epoch = 0
        self._kept_at = time.perf_counter()
        self._keeping_took = 0.0

    def epoch(self) -> dict[str, Any]:
        """Train one epoch and write what it gave.

        Returns:
            `Trainer.step`'s figures, `trained_seconds` of all epochs so far, and `stopped_by` and `reason`, both empty
            while the trial may go on. A failure that another process would meet again is told in them.

        Raises:
            OSError: this machine cannot reach the files, or the other workers.
            torch.AcceleratorError: this process has lost its device.
        """
        try:
            if self._untold is None:
                self._untold = self._find_untold()
            return self._tell(self._untold.pop(0)) if self._untold else self._train_in_memory()
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
        try:
            return self._train()
        except Exception as error:
            less = math.ceil(largest_share(self._config, self._world) / _SHRINK)
            if not is_out_of_memory(error) or self._world.size > 1 or self.micro_batch <= less:
                raise
            logger.warning("trial %s: %s", self._config.trial_id, error)
        # Out of the handler: until here the error's traceback holds what the failed epoch had allocated.
        self._trainer = None
        if self._device == "cuda":
            torch.cuda.empty_cache()
        self.micro_batch = less
        return self._train()

    def _train(self) -> dict[str, Any]:
        trainer = self._trainer = self._trainer or self._open()
        metrics = train_epoch(trainer, self._directory)
        if time.perf_counter() - self._kept_at >= self._keeping_took / _CHECKPOINT_SHARE:
            self.keep()
        return metrics

    def _open(self) -> Trainer:
        state = self._world.of_first(self._checkpoint() if self._world.first else {})
        self.micro_batch = min(self.micro_batch, state.get("micro_batch", self.micro_batch))
        return self._restored(state)

    def _restored(self, state: dict[str, Any]) -> Trainer:
        inputs = read_inputs(self._paths)
        trainer = Trainer(
            self._config,
            inputs.data,
            inputs.split,
            inputs.optimum,
            self._device,
            micro_batch=self.micro_batch,
            world=self._world,
        )
        if state:
            trainer.restore(state["trainer"])
            self._kept_epoch = trainer.epoch
        return trainer

    def _checkpoint(self) -> dict[str, Any]:
        """What an earlier process left of this very trial; empty for nothing that can be used."""
        path = self._directory / CHECKPOINT
        try:
            state = read_checkpoint(path) if path.is_file() else {}
        except InputError as error:
            logger.warning("trial %s begins afresh: %s", self._config.trial_id, error)
            return {}
        return state if state.get("config") == asdict(self._config) else {}

    def keep(self) -> None:
        """Write a checkpoint of the last epoch that ended, when there is none yet and the training is not over."""
        trainer = self._trainer if self._world.first else None
        if trainer is None or trainer.stopped_by is not None or trainer.epoch <= self._kept_epoch:
            return
        started = time.perf_counter()
        # A process's share of the batch is no sign that memory is short: the trial may go on with fewer processes.
        short = self.micro_batch < largest_share(self._config, self._world)
        micro_batch = self.micro_batch if short else self._config.batch_size
        state = {"config": asdict(self._config), "micro_batch": micro_batch, "trainer": trainer.state()}
        write_checkpoint(self._directory / CHECKPOINT, state)
        self._kept_epoch, self._kept_at = trainer.epoch, time.perf_counter()
        self._keeping_took = self._kept_at - started

    def _find_untold(self) -> list[dict[str, float]]:
        """The epochs on file that the study has not heard of: its driver, or an earlier process of the trial, died."""
        rows = self._on_file = self._world.of_first(read_history(self._directory))
        if rows and self._ends_at(rows[-1]):
            return [row for row in rows if row["epoch"] > self._reported] or rows[-1:]
        if not self._world.of_first((self._directory / CHECKPOINT).is_file()):
            return []
        self._trainer = self._open()
        return [row for row in self._trainer.history if row["epoch"] > self._reported]

    def _tell(self, row: dict[str, float]) -> dict[str, Any]:
        rows = self._trainer.history if self._trainer else self._on_file
        seconds = sum(earlier["seconds"] for earlier in rows if earlier["epoch"] <= row["epoch"])
        return {**row, "trained_seconds": seconds, "stopped_by": self._ends_at(row) or "", "reason": ""}

    def _ends_at(self, row: dict[str, float]) -> str | None:
        return self._config.ends_at(int(row["epoch"]), int(row["best_epoch"]))

    def _failed(self, error: Exception) -> dict[str, Any]:
        last = self._trainer.history[-1:] if self._trainer else []
        metrics: dict[str, Any] = dict.fromkeys(FIGURES, math.nan) | {"epoch": 0, "best_epoch": 0, "seconds": 0.0}
        if last:
            metrics |= {name: value for name, value in last[0].items() if name == "epoch" or name.startswith("best_")}
        reason = self._reason(error)
        seconds = sum(row["seconds"] for row in self._trainer.history) if self._trainer else 0.0
        return {**metrics, "trained_seconds": seconds, "stopped_by": "error", "reason": reason}

    def _reason(self, error: Exception) -> str:
        said = str(error) if isinstance(error, LowrankTuneError) else f"{type(error).__name__}: {error}"
        where = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        if is_out_of_memory(error):
            said = f"out of memory{where} with {self.micro_batch} images in it at a time; lower batch_size ({said})"
        else:
            said += f" ({where.strip()})" * bool(where)
        return " ".join(redact(said).split())


def open_session(settings: dict[str, Any], world: World = ALONE) -> TrialSession:
    """The session of a trial as its actor's configuration describes it, in one of the processes that train it."""
    config = TrialConfig(**settings["trial"])
    directory = Path(settings["trials_dir"]) / config.trial_id
    paths = InputPaths(**settings["inputs"])
    reported = settings.get("reported", 0)
    return TrialSession(config, paths, directory, settings["cpus"], settings["gpus"], reported, world)


def train_epoch(trainer: Trainer, directory: Path) -> dict[str, Any]:
    """Train one epoch and write what it gave.

    Returns:
        `Trainer.step`'s figures, `trained_seconds` of all epochs, and `stopped_by` and `reason`, both empty while
        the trial may go on.
    """
    metrics = trainer.step()
    if trainer.world.first:
        trainer.save(directory)
        write_history(directory, trainer.history)
    seconds = sum(row["seconds"] for row in trainer.history if row["epoch"] < metrics["epoch"]) + metrics["seconds"]
    return {**metrics, "trained_seconds": seconds, "stopped_by": trainer.stopped_by or "", "reason": trainer.reason}


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device's memory or this machine's did not suffice."""
    # On the CPU, torch has no class of its own for it.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def run_one_trial(
    config: TrialConfig,
    features: FeatureSet,
    split: Split,
    optimum: Optimum,
    directory: Path,
    on_epoch: Callable[[str, int, dict[str, Any]], None] | None = None,
    device: str = "cpu",
) -> TrialOutcome:
    """Train one trial to its end, with the numbers that the same trial has inside a study.

    Args:
        config: what to train.
        features: the images' features.
        split: which of them train and validate.
        optimum: the validation split's.
        directory: takes best_model.safetensors, config.json and history.json.
        on_epoch: told of each epoch: the `trial_id`, its number from 1 and its figures.
        device: where to train.

    Raises:
        InputError: the configuration does not fit the features.
        CacheError: the features cannot be read.
    """
    trainer = Trainer(config, FeatureMatrix(features), split, optimum, device)
    begin_trial(directory, config)
    started = time.perf_counter()
    last: dict[str, Any] = {}
    while trainer.stopped_by is None:
        last = train_epoch(trainer, directory)
        if on_epoch is not None:
            on_epoch(config.trial_id, int(last["epoch"]), last)
    return outcome_of(config, last, directory, time.perf_counter() - started)
