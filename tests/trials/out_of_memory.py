"""Trains two trials with too little memory, for a test: run as a process of its own, which it limits.

    out_of_memory.py FOLDER

The first does not fit with its whole batch and does with a quarter of it; the second does not fit at all.
"""

import os
import resource
import sys
from dataclasses import asdict
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from tiny_study import write_features

from lowrank_tune.records import Split, TrialConfig
from lowrank_tune.trials.outcomes import begin_trial
from lowrank_tune.trials.trial import TrialSession, write_inputs

TOKENS, DIM, BATCH = 256, 1024, 64
SPARE = 340 * 2**20  # a batch is 64 MiB, and training holds several times as much


def config_of(name: str, batch_size: int) -> TrialConfig:
    return TrialConfig(name, 0, 1, "direct", 4, 1e-3, 0.0, batch_size, 3, 3, {"lambda_b": 0.0, "lambda_ortho": 0.0})


def make_inputs(folder: Path, images: int) -> None:
    x_NTD = torch.randn(images + 2, TOKENS, DIM, generator=torch.Generator().manual_seed(0))
    write_inputs(folder, write_features(folder, x_NTD), Split(tuple(range(images)), (images, images + 1), ()))


def main(folder: Path) -> None:
    make_inputs(folder, BATCH)

    def session(name: str, batch_size: int) -> TrialSession:
        config = config_of(name, batch_size)
        begin_trial(folder / "trials" / name, config)
        return TrialSession({"trial": asdict(config), "study_dir": str(folder), "cpus": 1, "gpus": 0})

    session("warm", 1).epoch()
    limit(SPARE)
    large = session("large", BATCH)
    rows = [large.epoch() for _ in range(3)]
    epochs = " ".join(str(row["epoch"]) for row in rows)
    print(f"epochs {epochs}, {rows[-1]['stopped_by']}, micro-batch {large.micro_batch}")
    limit(2**20)
    row = session("none", BATCH).epoch()
    print(f"{row['stopped_by']} after {row['epoch']} epochs: {row['reason']}")


def limit(spare: int) -> None:
    """Let this process have so much more address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
