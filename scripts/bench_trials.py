"""What starting a trial costs beyond its training, in a study on a Ray of this machine.

    .venv/bin/python scripts/bench_trials.py [--trials 24] [--epochs 4] [--at-once 1]
    .venv/bin/python scripts/bench_trials.py --many 200 2000 [--method random] [--at-once 1] [--seconds 0]

About a minute; tiny synthetic features, so that little but the starting is left. Every number comes from this one run:
compare ratios, not machines. Wanted: at most 0.3 s a trial.

With --many, studies of so many trials that do next to nothing, each in a process of its own, tracked in MLflow on
sqlite: what a trial costs beyond its training, how the driver's memory grows, and how far MLflow is behind when the
last one ends. About 2 minutes for 200 and 2,000, and 7 for 10,000. Wanted: at most 0.045 s and 8 KB a trial, the
latter over the second half, where everything that is imported is there. Ray's own figure, 10,000 one-second trials on
16 CPUs in 715 s where 625 are ideal, is `--at-once 16 --seconds 1`: such trials sleep, so two cores can have 16.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import psutil
import ray
import torch
from safetensors.torch import save_file

from lowrank_tune.config.plan import Plan, make_plan
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.records import FeatureRow, FeatureSet, Split, TrialConfig, TrialOutcome, TrialTracker
from lowrank_tune.tracking.tracker import Tracker
from lowrank_tune.trials import tuning
from lowrank_tune.trials.trainable import TrialActor
from lowrank_tune.trials.trial import write_inputs
from lowrank_tune.trials.tuning import run_trials

TOKENS, DIM, IMAGES = 8, 12, 24
SPLIT = Split(tuple(range(16)), tuple(range(16, 20)), tuple(range(20, 24)))
WANTED_S = 0.3


@dataclass
class Clock(TrialTracker):
    """A tracker that notes when each trial starts and ends, and passes it on."""

    behind: Tracker | None = None
    process: psutil.Process = field(default_factory=psutil.Process)
    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def trial_started(self, config: TrialConfig) -> None:
        """Note a start."""
        self.starts.append(time.perf_counter())
        if self.behind:
            self.behind.trial_started(config)

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        """Pass it on."""
        if self.behind:
            self.behind.trial_epoch(trial_id, epoch, metrics)

    def trial_ended(self, outcome: TrialOutcome) -> None:
        """Note an end."""
        self.ends.append(time.perf_counter())
        self.memory.append(self.process.memory_info().rss)
        if self.behind:
            self.behind.trial_ended(outcome)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--many", type=int, nargs="+")
    parser.add_argument("--method", choices=["random", "tpe"], default="random")
    parser.add_argument("--seconds", type=float, default=0.0, help="that each of many trials takes at least")
    sizes = parser.parse_args()
    if sizes.many:
        _many(sizes.many, sizes.method, sizes.at_once, sizes.seconds)
        return
    ray.init(address="local", num_cpus=sizes.at_once, include_dashboard=False, log_to_driver=False,
             logging_level=logging.ERROR, object_store_memory=200_000_000)  # fmt: skip
    print(f"{sizes.trials} trials of {sizes.epochs} epochs, {sizes.at_once} at once\n")
    print(f"{'tracked by':<16}{'first trial, s':>16}{'start, s':>10}{'of wanted':>11}{'training, s':>13}")
    with tempfile.TemporaryDirectory() as folder:
        features = _features(Path(folder))
        for name in ("nobody", "MLflow, sqlite"):
            plan = _plan(Path(folder) / name.split(",")[0], sizes.trials, sizes.epochs, sizes.at_once)
            write_inputs(plan.study_dir, features, SPLIT)
            clock = Clock()
            began = time.perf_counter()
            if name == "nobody":
                outcomes = run_trials(plan, [clock])
            else:
                with Tracker(plan) as clock.behind:
                    outcomes = run_trials(plan, [clock])
            start, training = _costs(clock, outcomes, sizes.at_once)
            first = clock.starts[0] - began
            print(f"{name:<16}{first:>16.2f}{start:>10.3f}{start / WANTED_S:>11.2f}{training:>13.3f}")
    ray.shutdown()


def _many(counts: Sequence[int], method: str, at_once: int, seconds: float) -> None:
    """Print a line a study, each run in a process of its own: one's memory says nothing about the next."""
    names = ("trials", "wall, s", "ideal, s", "a trial, s", "first half", "second half")
    names += ("memory, MiB", "KB a trial", "behind, s")
    print(f"{method}, MLflow on sqlite\n" + "".join(f"{name:>13}" for name in names))
    spawn = multiprocessing.get_context("spawn")
    for count in counts:
        process = spawn.Process(target=_one_of_many, args=(count, method, at_once, seconds))
        process.start()
        process.join()


def _one_of_many(count: int, method: str, at_once: int, seconds: float) -> None:
    class Sleeper(TrialActor):
        """Trains, and sleeps until its trial has taken as long as it is to."""

        def step(self) -> dict[str, Any]:
            began = time.perf_counter()
            result = super().step()
            time.sleep(max(0.0, seconds - (time.perf_counter() - began)))
            return result

    tuning.TrialActor = Sleeper  # type: ignore[misc]
    ray.init(address="local", num_cpus=at_once, include_dashboard=False, log_to_driver=False,
             logging_level=logging.ERROR, object_store_memory=200_000_000)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        features = _features(Path(folder))
        plan = _plan(Path(folder) / "results", count, 1, at_once, method)
        write_inputs(plan.study_dir, features, SPLIT)
        with Tracker(plan) as tracker:
            clock = Clock(tracker)
            outcomes = run_trials(plan, [clock])
            ended = time.perf_counter()
        behind = time.perf_counter() - ended
        with closing(sqlite3.connect(plan.results / "mlflow.db")) as database:
            told = database.execute("SELECT COUNT(*) FROM runs WHERE status = 'FINISHED'").fetchone()[0]
    ray.shutdown()
    wall, half = clock.ends[-1] - clock.ends[0], count // 2
    training = sum(max(seconds, outcome.seconds) for outcome in outcomes) / count / at_once
    first = (clock.ends[half] - clock.ends[0]) / half - training
    second = (clock.ends[-1] - clock.ends[half]) / (count - half - 1) - training
    grown = (clock.memory[-1] - clock.memory[min(50, half)]) / 2**20
    each = (clock.memory[-1] - clock.memory[half]) / 1024 / (count - half - 1)
    print(f"{count:>13,}{wall:>13.1f}{training * count:>13.1f}{wall / count - training:>13.3f}{first:>13.3f}"
          f"{second:>13.3f}{grown:>+13.1f}{each:>13.1f}{behind:>13.1f}", flush=True)  # fmt: skip
    assert (tracker.problems, told) == ((), count + 1), f"MLflow has {told} of {count + 1} runs: {tracker.problems}"


def _costs(clock: Clock, outcomes: Sequence[TrialOutcome], at_once: int) -> tuple[float, float]:
    """Seconds a trial beyond its training, and of training, over the trials after the first ones on their actors."""
    later = outcomes[at_once:]
    wall = clock.ends[-1] - clock.ends[at_once - 1]
    training = sum(outcome.seconds for outcome in later) / len(later)
    return wall * at_once / len(later) - training, training


def _plan(results: Path, trials: int, epochs: int, at_once: int, method: str = "random") -> Plan:
    study = {
        "name": "bench",
        "features": {"source": {"samples": IMAGES}},
        "search": {
            "method": method,
            "trials": trials,
            "space": {"families": {"direct": {}, "sketch": {}}, "rank": [2, 4, 8], "lr": {"loguniform": [1e-4, 1e-2]}},
        },
        "training": {"epochs": epochs},
        "scheduler": {"kind": "none"},
        "resources": {"max_concurrent": at_once},
    }
    return make_plan(StudySpec.model_validate(study), results, datetime.now(UTC))


def _features(folder: Path) -> FeatureSet:
    """A cache of random features."""
    (folder / "shards").mkdir()
    x_NTD = torch.randn(IMAGES, TOKENS, DIM, generator=torch.Generator().manual_seed(0))
    save_file({"features": x_NTD}, folder / "shards" / "00000.safetensors")
    rows = tuple(FeatureRow(f"{number:064x}", "00000.safetensors", number) for number in range(IMAGES))
    return FeatureSet(
        directory=str(folder),
        fingerprint="0" * 16,
        encoder="synthetic",
        weights="random",
        dtype="float32",
        tokens=TOKENS,
        dim=DIM,
        rows=rows,
        records_path=str(folder / "records.parquet"),
    )


if __name__ == "__main__":
    main()
