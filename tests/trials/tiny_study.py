"""A tiny cache, studies on it, and watchers that remember."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import psutil
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from safetensors.torch import save_file

from lowrank_tune.config.plan import Plan, make_plan
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.records import FeatureRow, FeatureSet, Split, TrialConfig, TrialOutcome, TrialTracker
from lowrank_tune.trials.trial import write_inputs
from lowrank_tune.trials.tuning import run_trials

TOKENS, DIM, IMAGES = 12, 20, 16
SPLIT = Split(train=tuple(range(8)), validation=tuple(range(8, 12)), test=tuple(range(12, 16)))


@dataclass
class Listener(TrialTracker):
    """An observer that remembers what it was told."""

    started: list[TrialConfig] = field(default_factory=list)
    epochs: list[tuple[str, int, dict[str, float]]] = field(default_factory=list)
    ended: list[TrialOutcome] = field(default_factory=list)
    stopped_for: list[str] = field(default_factory=list)

    def trial_started(self, config: TrialConfig) -> None:
        self.started.append(config)

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        self.epochs.append((trial_id, epoch, metrics))

    def trial_ended(self, outcome: TrialOutcome) -> None:
        self.ended.append(outcome)

    def search_ended(self, stopped_for: str, told: str) -> None:
        self.stopped_for.append(stopped_for)


def processes(title: str) -> list[psutil.Process]:
    """This test's own processes of Ray's with this in their command line, oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if title in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


class Killer(Listener):
    """Kills the newest of some processes at the first trial's first epoch, and at every epoch of the second."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self._title = title

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        super().trial_epoch(trial_id, epoch, metrics)
        if trial_id.endswith("-0001") or (trial_id.endswith("-0000") and epoch == 1):
            processes(self._title)[-1].kill()


class Interrupter(Listener):
    """Interrupts the study like Ctrl-C once so many epochs were told."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self._after = epochs

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        super().trial_epoch(trial_id, epoch, metrics)
        if len(self.epochs) == self._after:
            os.kill(os.getpid(), signal.SIGINT)


def write_features(directory: Path, x_NTD: torch.Tensor) -> FeatureSet:
    """A one-shard cache that `FeatureMatrix` can open."""
    (directory / "shards").mkdir(parents=True)
    save_file({"features": x_NTD}, directory / "shards" / "00000.safetensors")
    return FeatureSet(
        directory=str(directory),
        fingerprint="0" * 16,
        encoder="synthetic",
        weights="random",
        dtype="float32",
        tokens=x_NTD.shape[1],
        dim=x_NTD.shape[2],
        rows=tuple(FeatureRow(f"{n:064x}", "00000.safetensors", n) for n in range(len(x_NTD))),
        records_path=str(directory / "records.parquet"),
    )


def build_plan(
    results: Path,
    space: dict[str, Any] | None = None,
    method: str = "grid",
    trials: int | None = None,
    **sections: Any,
) -> Plan:
    """Plan a study of small ranks, one trial at a time; keyword arguments replace sections of the file."""
    default_space = {"families": {"sketch": {}}, "rank": [2, 4], "lr": 0.001, "batch_size": 4}
    search: dict[str, Any] = {"method": method, "space": default_space | (space or {})}
    if trials is not None:
        search["trials"] = trials
    study: dict[str, Any] = {
        "name": "test",
        "features": {"source": {"samples": 16}},
        "search": search,
        "training": {"epochs": 3, "patience": 3},
        "scheduler": {"kind": "none"},
        "resources": {"max_concurrent": 1},
    }
    return make_plan(StudySpec.model_validate(study | sections), results, datetime(2026, 1, 1, tzinfo=UTC))


def run(plan: Plan, tiny_cache: FeatureSet, *observers: Any) -> tuple[TrialOutcome, ...]:
    return run_for(plan, tiny_cache, lambda: 0.0, *observers)


def run_for(
    plan: Plan, tiny_cache: FeatureSet, searched_s: Callable[[], float], *observers: Any
) -> tuple[TrialOutcome, ...]:
    """Run a study's trials, of whose search so many seconds are over."""
    write_inputs(plan.study_dir, tiny_cache, SPLIT)
    return run_trials(plan, observers, searched_s)


def optuna_trials(plan: Plan) -> list[optuna.trial.FrozenTrial]:
    """A study's trials as Optuna's own tools read them."""
    storage = JournalStorage(JournalFileBackend(str(plan.study_dir / "tune" / "optuna.journal")))
    return optuna.load_study(study_name=plan.study_id, storage=storage).trials
