"""One of several processes that train together, for a test: run as a process of its own, with what it finds as JSON.

team_member.py FOLDER RANK SIZE
"""

import json
import os
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
import trial_configs

from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.distributed import World
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.lowrank.trainer import Trainer
from lowrank_tune.records import FeatureSet, Split, TrialConfig

# Batches of 10, 10 and 1: the last one has an image for one worker only.
SPLIT = Split(train=tuple(range(21)), validation=tuple(range(21, 28)), test=())
LONGER = {"lr": 1e-2, "batch_size": 10, "epochs": 4}
DIRECT = replace(trial_configs.DIRECT, **LONGER)
SKETCH = replace(trial_configs.SKETCH, **LONGER)
REFINED = replace(trial_configs.REFINED, **LONGER, family_params={"steps": 2})
CASES: dict[str, tuple[TrialConfig, int | None]] = {
    "direct": (DIRECT, None),
    "sketch": (SKETCH, None),
    "refined": (REFINED, None),
    "sketch, nested": (replace(SKETCH, nested_ranks=(1, 2, 4)), None),
    "refined, nested": (replace(REFINED, nested_ranks=(2, 4)), None),
    "direct, in parts": (DIRECT, 2),
    "refined, nested, in parts": (replace(REFINED, nested_ranks=(2, 4)), 2),
    "smaller batches than workers": (replace(SKETCH, batch_size=1), None),
    "plateaus and patience": (replace(SKETCH, lr=30.0, epochs=50, patience=5), None),
}


def train(name: str, folder: Path, world: World) -> dict[str, Any]:
    """Every epoch of a case, and its weights afterwards."""
    config, micro_batch = CASES[name]
    data = FeatureMatrix(FeatureSet.read(folder / "features.json"))
    optimum = measure_optimum([data.load(SPLIT.validation)])
    trainer = Trainer(config, data, SPLIT, optimum, micro_batch=micro_batch, world=world)
    while trainer.stopped_by is None:
        trainer.step()
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in trainer.history]
    weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    return {"rows": rows, "stopped_by": trainer.stopped_by, "weights": weights.tolist()}


def main(folder: Path, rank: int, size: int) -> None:
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), rank=rank, world_size=size)
    world = World.here()
    found: dict[str, Any] = {name: train(name, folder, world) for name in CASES}
    found["of the first"] = world.of_first({"rank": rank})
    if rank == 1:
        (folder / "1.json").write_text(json.dumps(found))
        os._exit(0)
    try:
        world.sum(torch.zeros(1))
    except ConnectionError as error:
        found["lost"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
