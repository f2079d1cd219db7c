"""Runs a study whose trials ask for a quarter of a GPU each, on a Ray that says it has one; for a test.

It is a process of its own, for its Ray is another one than the tests'. The trials would train for ever: once four of
them have told an epoch the study is interrupted.
"""

import os
import signal
import sys
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}

import ray
import torch
from tiny_study import DIM, IMAGES, TOKENS, Listener, build_plan, make_world

from lowrank_tune.trials.tuning import run_trials


class Interrupter(Listener):
    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        super().trial_epoch(trial_id, epoch, metrics)
        if len({trial for trial, _, _ in self.epochs}) == 4:
            os.kill(os.getpid(), signal.SIGINT)


def main(folder: Path) -> None:
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=1,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        configure_logging=False,
    )
    world = make_world(folder / "features", torch.randn(IMAGES, TOKENS, DIM))
    plan = build_plan(
        folder / "results",
        {"rank": [1, 2, 3, 4, 5, 6]},
        training={"epochs": 1_000_000, "patience": 1_000_000},
        resources={"cpus_per_trial": 1, "gpus_per_trial": 0.25},
    )
    told = Interrupter()
    try:
        run_trials(plan, world.features, world.split, world.optimum_path, [told])
    except KeyboardInterrupt:
        print(f"{len(told.started)} started, {len(told.ended)} ended")
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
