"""A study of small trials beside a loop without Ray and beside a plain Ray Tune script.

    .venv/bin/python scripts/bench_study.py [--trials 32] [--rounds 1] [--family sketch] [--only ...]

About 4 minutes a round on 2 cores. The same configurations, trained by the same code on the same synthetic features:

- bare: a loop in as many processes as there are cores, which writes the files that a trial writes; nothing else
- study: a study with MLflow on sqlite, a trial a core
- plain: a Ray Tune script of the kind that users write: a function that loads every features_N.pt and trains,
  MLflowLoggerCallback

Ray is up, and what the driver imports is imported, before the clock starts. `start` is until the first epoch is known:
processes and their imports. `cpu s` is what all processes together computed, which other work on the machine changes
least. Every number comes from this one run: compare ratios, not machines. Wanted: a study at most 1.15 of bare and 0.6
of plain.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0"}

import psutil
import ray
import torch
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from safetensors.torch import save_file

from lowrank_tune.config.plan import Plan, make_plan, trial_config
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.svd import Optimum, measure_optimum
from lowrank_tune.lowrank.trainer import Trainer
from lowrank_tune.records import FeatureRow, FeatureSet, Split, TrialConfig, TrialOutcome, TrialTracker
from lowrank_tune.tracking.tracker import Tracker
from lowrank_tune.trials.trial import train_epoch, write_inputs
from lowrank_tune.trials.tuning import run_trials

TOKENS, DIM, TRAIN, VALIDATION = 16, 32, 600, 56
SPLIT = Split(tuple(range(TRAIN)), tuple(range(TRAIN, TRAIN + VALIDATION)), ())
CORES = 2


@dataclass
class Run:
    """How long a way of running took.

    Attributes:
        wall: seconds in all.
        start: of them, until the first epoch.
        cpu: CPU seconds of all processes, to half a second each.
    """

    wall: float
    start: float
    cpu: float = 0.0


class Meter(threading.Thread):
    """Adds up what this process and all below it compute, while it is entered."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()
        self._seconds: dict[tuple[int, float], float] = {}

    def __enter__(self) -> Meter:
        self._look()
        self._before = sum(self._seconds.values())
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        self._look()

    @property
    def spent(self) -> float:
        """CPU seconds since it was entered."""
        return sum(self._seconds.values()) - self._before

    def run(self) -> None:
        """Look twice a second: what a process has computed is gone with it."""
        while not self._over.wait(0.5):
            self._look()

    def _look(self) -> None:
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self._seconds[process.pid, process.create_time()] = times.user + times.system


@dataclass
class Clock(TrialTracker):
    """A tracker that notes when the first epoch ends, and passes everything on."""

    behind: Tracker
    first: float = 0.0
    ended: list[TrialOutcome] = field(default_factory=list)

    def trial_started(self, config: TrialConfig) -> None:
        """Pass it on."""
        self.behind.trial_started(config)

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        """Note the first, and pass it on."""
        self.first = self.first or time.perf_counter()
        self.behind.trial_epoch(trial_id, epoch, metrics)

    def trial_ended(self, outcome: TrialOutcome) -> None:
        """Pass it on."""
        self.ended.append(outcome)
        self.behind.trial_ended(outcome)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1, help="each way so often, in turns; the fastest counts")
    parser.add_argument("--family", default="sketch", choices=["direct", "sketch", "refined"])
    parser.add_argument("--only", nargs="+", default=["bare", "study", "plain"])
    given = parser.parse_args()
    ray.init(address="local", num_cpus=CORES, include_dashboard=False, log_to_driver=False,
             logging_level=logging.ERROR, object_store_memory=200_000_000)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        world = _World(Path(folder), given.trials, given.epochs, given.family)
        ways: dict[str, Callable[[Path], Run]] = {
            "bare": world.bare,
            "study": world.study,
            "plain": world.plain,
        }
        runs: dict[str, list[Run]] = {name: [] for name in given.only}
        for turn in range(given.rounds):
            for name in given.only:
                with Meter() as meter:
                    run = ways[name](Path(folder) / f"{name}-{turn}")
                run.cpu = meter.spent
                runs[name].append(run)
                print(f"{name} {turn + 1}: {run.wall:.1f} s, start {run.start:.1f} s, cpu {run.cpu:.1f} s", flush=True)
    _table({name: min(own, key=lambda run: run.wall) for name, own in runs.items()}, given.trials)


def _table(best: dict[str, Run], trials: int) -> None:
    print(f"{'':>8}{'wall s':>9}{'start s':>9}{'cpu s':>9}{'trials/h':>10}{'after start':>13}")
    for name, run in best.items():
        steady = trials / (run.wall - run.start) * 3600
        print(f"{name:>8}{run.wall:>9.1f}{run.start:>9.1f}{run.cpu:>9.1f}"
              f"{trials / run.wall * 3600:>10,.0f}{steady:>13,.0f}")  # fmt: skip
    if {"bare", "study", "plain"} <= best.keys():
        bare, study, plain = (best[name] for name in ("bare", "study", "plain"))
        print(f"study of bare {study.wall / bare.wall:.2f} (wanted 1.15), of plain {study.wall / plain.wall:.2f} "
              "(wanted 0.60)")  # fmt: skip


class _World:
    """Synthetic features in every form that a way of running wants, and the configurations to train."""

    def __init__(self, folder: Path, trials: int, epochs: int, family: str) -> None:
        self._trials, self._epochs, self._family = trials, epochs, family
        (folder / "shards").mkdir()
        (folder / "pt").mkdir()
        generator = torch.Generator().manual_seed(0)
        x_NTD = torch.randn(TRAIN + VALIDATION, TOKENS, DIM, generator=generator) * torch.logspace(0, -2, DIM)
        save_file({"features": x_NTD}, folder / "shards" / "00000.safetensors")
        for number, x_TD in enumerate(x_NTD):
            torch.save(x_TD.clone(), folder / "pt" / f"features_{number}.pt")
        rows = tuple(FeatureRow(f"{number:064x}", "00000.safetensors", number) for number in range(len(x_NTD)))
        self._features = FeatureSet(
            directory=str(folder),
            fingerprint="0" * 16,
            encoder="synthetic",
            weights="random",
            dtype="float32",
            tokens=TOKENS,
            dim=DIM,
            rows=rows,
            records_path="",
        )
        self._optimum = folder / "optimum.safetensors"
        measure_optimum([x_NTD[TRAIN:]]).save(self._optimum)
        self._pt = folder / "pt"

    def study(self, results: Path) -> Run:
        """A study with MLflow on sqlite."""
        plan = self._plan(results)
        write_inputs(plan.study_dir, self._features, SPLIT)
        started = time.perf_counter()
        with Tracker(plan) as tracker:
            clock = Clock(tracker)
            run_trials(plan, [clock])
        ended = time.perf_counter()
        assert {outcome.status for outcome in clock.ended} == {"finished"}
        return Run(ended - started, clock.first - started)

    def bare(self, results: Path) -> Run:
        """A loop in as many processes as there are cores."""
        spawn = multiprocessing.get_context("spawn")
        configs, firsts = self._configs(results), spawn.Queue()
        started = time.perf_counter()
        processes = [
            spawn.Process(target=_train_all, args=(configs[own::CORES], self._features, self._optimum, results, firsts))
            for own in range(CORES)
        ]
        for process in processes:
            process.start()
        first = min(firsts.get() for _ in processes)
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * CORES
        return Run(time.perf_counter() - started, first - started)

    def plain(self, results: Path) -> Run:
        """What a user of Ray Tune writes."""
        results.mkdir(parents=True)
        space = {"config": tune.grid_search([asdict(config) for config in self._configs(results)])}
        fixed = {"pt": str(self._pt), "optimum": str(self._optimum), "results": str(results)}
        first = _First()
        uri = f"sqlite:///{results / 'mlflow.db'}"
        started = time.perf_counter()
        grid = tune.Tuner(
            tune.with_resources(_trainable, {"cpu": 1}),
            param_space=space | fixed,
            run_config=tune.RunConfig(
                storage_path=str(results / "tune"),
                callbacks=[first, MLflowLoggerCallback(tracking_uri=uri, experiment_name="plain")],
                verbose=0,
            ),
        ).fit()
        assert not grid.errors
        return Run(time.perf_counter() - started, first.at - started)

    def _configs(self, results: Path) -> list[TrialConfig]:
        plan = self._plan(results)
        return [trial_config(plan, number, point) for number, point in enumerate(plan.grid)]

    def _plan(self, results: Path) -> Plan:
        lrs = [1e-4 * 1.1**number for number in range(self._trials)]
        study = {
            "name": "bench",
            "features": {"source": {"samples": TRAIN}},
            "search": {"method": "grid", "space": {"families": {self._family: {}}, "rank": 4, "lr": lrs}},
            "training": {"epochs": self._epochs, "patience": self._epochs},
            "scheduler": {"kind": "none"},
        }
        return make_plan(StudySpec.model_validate(study), results, datetime.now(UTC))


def _train_all(configs: Sequence[TrialConfig], features: FeatureSet, optimum: Path, results: Path, firsts: Any) -> None:
    torch.set_num_threads(1)
    data, known, told = FeatureMatrix(features), Optimum.load(optimum), False
    for config in configs:
        trainer = Trainer(config, data, SPLIT, known)
        while trainer.stopped_by is None:
            train_epoch(trainer, results / config.trial_id)
            if not told:
                # The clock that counts is the machine's, the same in every process.
                firsts.put(time.perf_counter())
                told = True


class _Loaded:
    """Features that a trial has loaded for itself, in the form that `Trainer` reads."""

    def __init__(self, folder: Path) -> None:
        count = len(list(folder.iterdir()))
        self._x_NTD = torch.stack([torch.load(folder / f"features_{number}.pt") for number in range(count)])
        self.tokens, self.dim, self.dtype = *self._x_NTD.shape[1:], torch.float32

    def load(
        self, indices: Sequence[int], dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `FeatureMatrix.load`."""
        return self._x_NTD[list(indices)] if out is None else out.copy_(self._x_NTD[list(indices)])


def _trainable(given: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    config = TrialConfig(**given["config"])
    trainer = Trainer(config, _Loaded(Path(given["pt"])), SPLIT, Optimum.load(Path(given["optimum"])))  # type: ignore[arg-type]
    while trainer.stopped_by is None:
        tune.report(trainer.step())
    torch.save(trainer.best_model.state_dict(), Path(given["results"]) / f"{config.trial_id}.pt")


class _First(tune.Callback):
    """Notes when the first epoch is known."""

    at = 0.0

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """An epoch ended."""
        self.at = self.at or time.perf_counter()


if __name__ == "__main__":
    main()
