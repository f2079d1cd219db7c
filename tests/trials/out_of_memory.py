"""Trains two trials with too little memory, for a test: run as a process of its own, which it limits.

    out_of_memory.py FOLDER [RANK SIZE]

The first does not fit with its whole batch and does with a quarter of it; the second does not fit at all. Of several
processes that train together the last one has too little.
"""

import os
import resource
import sys
from datetime import timedelta
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
from tiny_study import World, write_features

from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.distributed import Team
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.records import Split, TrialConfig
from lowrank_tune.trials.outcomes import MaterialPaths, write_material
from lowrank_tune.trials.trial import TrialSession

TOKENS, DIM, BATCH = 256, 1024, 64
SPARE = 260 * 2**20  # a batch is 64 MiB, and training holds several times as much


def config_of(name: str, batch_size: int) -> TrialConfig:
    return TrialConfig(name, 0, 1, "direct", 4, 1e-3, 0.0, batch_size, 3, 3, {"lambda_b": 0.0, "lambda_ortho": 0.0})


def make_material(folder: Path, images: int) -> MaterialPaths:
    split = Split(tuple(range(images)), (images, images + 1), ())
    features = write_features(folder, torch.randn(images + 2, TOKENS, DIM, generator=torch.Generator().manual_seed(0)))
    world = World(features, folder / "optimum.safetensors", split)
    measure_optimum([FeatureMatrix(features).load(split.validation)]).save(world.optimum_path)
    return write_material(folder / "tune", features, split, world.optimum_path)


def main(folder: Path, rank: int = 0, size: int = 1) -> None:
    if size > 1:
        rendezvous = f"file://{folder / 'rendezvous'}"
        dist.init_process_group("gloo", rendezvous, timedelta(seconds=90), rank=rank, world_size=size)
    team = Team.here()
    # A batch of as many images for each process as for one alone.
    batch = BATCH * size
    paths = team.by_first(lambda: make_material(folder, batch))
    TrialSession(config_of("warm", size), paths, folder / "warm", 1, 0, team=team).epoch()
    limited = rank == size - 1
    if limited:
        limit(SPARE)
    session = TrialSession(config_of("large", batch), paths, folder / "large", 1, 0, team=team)
    rows = [session.epoch() for _ in range(3)]
    epochs = " ".join(str(row["epoch"]) for row in rows)
    print(f"epochs {epochs}, {rows[-1]['stopped_by']}, micro-batch {session.micro_batch}")
    if limited:
        limit(2**20)
    row = TrialSession(config_of("none", batch), paths, folder / "none", 1, 0, team=team).epoch()
    print(f"{row['stopped_by']} after {row['epoch']} epochs: {row['reason']}")


def limit(spare: int) -> None:
    """Let this process have so much more address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
