"""Two processes that train together have the numbers of one: real processes, exchanging over Gloo.

This file is also one of those processes: test_data_parallel.py FOLDER RANK SIZE, which leaves what it finds as JSON.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import torch.distributed as dist
import trial_configs

from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.distributed import ALONE, World
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.lowrank.trainer import Trainer
from lowrank_tune.records import FeatureSet, Split

SIZE = 2
# Batches of 10, 10 and 1: the last one has an image for one worker only.
SPLIT = Split(train=tuple(range(21)), validation=tuple(range(21, 28)), test=())
LONGER = {"lr": 1e-2, "batch_size": 10, "epochs": 4}
DIRECT = replace(trial_configs.DIRECT, **LONGER)
SKETCH = replace(trial_configs.SKETCH, **LONGER)
REFINED = replace(trial_configs.REFINED, **LONGER, family_params={"steps": 2})
WEIGHTED = replace(REFINED, family_params={"steps": 2, "metric": "answers"})
SHARED = replace(SKETCH, family="shared", family_params={"token_transform": "learned", "lambda_rate": 30.0})
CASES = {  # configuration and micro-batch
    "direct": (DIRECT, None),
    "sketch": (SKETCH, None),
    "refined": (REFINED, None),
    "sketch, nested": (replace(SKETCH, nested_ranks=(1, 2, 4)), None),
    "refined, nested": (replace(REFINED, nested_ranks=(2, 4)), None),
    "shared, in parts": (SHARED, 2),
    "refined, weighted": (WEIGHTED, None),
    "shared, weighted": (replace(SHARED, family_params={**SHARED.family_params, "metric": "answers"}), 1),
    "direct, in parts": (DIRECT, 2),
    "refined, nested, in parts": (replace(REFINED, nested_ranks=(2, 4)), 2),
    "smaller batches than workers": (replace(SKETCH, batch_size=1), None),
    "plateaus and patience": (replace(SKETCH, lr=30.0, epochs=50, patience=5), None),
}


def train(name, folder, world):
    """Every epoch of a case, and its weights afterwards."""
    config, micro_batch = CASES[name]
    data = FeatureMatrix(FeatureSet.read(folder / "features.json"))
    optimum = measure_optimum([data.load(SPLIT.validation)])
    factor_DD = torch.diag(torch.logspace(0, -1, data.dim, dtype=torch.float64))
    trainer = Trainer(config, data, SPLIT, optimum, micro_batch=micro_batch, world=world, factor_DD=factor_DD)
    while trainer.stopped_by is None:
        trainer.step()
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in trainer.history]
    weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    return {"rows": rows, "stopped_by": trainer.stopped_by, "weights": weights.tolist()}


def work(folder, rank, size):
    """One worker; the second one ends first, and the first one notices."""
    dist.init_process_group(
        "gloo", f"file://{folder / 'rendezvous'}", timedelta(seconds=60), rank=rank, world_size=size
    )
    world = World.here()
    found = {name: train(name, folder, world) for name in CASES}
    found["of the first"] = world.of_first({"rank": rank})
    if rank == 0:
        try:
            world.sum(torch.zeros(1))
        except ConnectionError as error:
            found["lost"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, power_law, write_shards):
    directory = tmp_path_factory.mktemp("team")
    write_shards(directory, power_law(28, 12, 20)).write(directory / "features.json")
    return directory


@pytest.fixture(scope="module")
def found(folder):
    """What each of two workers has found."""
    commands = [[sys.executable, __file__, str(folder), str(rank), str(SIZE)] for rank in range(SIZE)]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    said = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * SIZE, said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.mark.parametrize("name", CASES)
def test_two_workers_have_the_numbers_of_one_and_the_same_weights(found, folder, name):
    alone, together = train(name, folder, ALONE), found[0][name]
    assert together["stopped_by"] == alone["stopped_by"]
    for row, expected in zip(together["rows"], alone["rows"], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    assert found[1][name] == together


def test_what_the_first_worker_has_read_all_have_and_one_that_is_gone_is_told_as_a_lost_connection(found):
    assert [worker["of the first"] for worker in found] == [{"rank": 0}] * SIZE
    assert found[0]["lost"].startswith("worker 1 of 2 has lost the others: ")


@pytest.mark.parametrize(("count", "size"), [(10, 3), (1, 4), (0, 2), (8, 1)])
def test_shares_are_all_there_is_and_differ_by_one_at_most(count, size):
    shares = [list(World(rank, size).share(count)) for rank in range(size)]
    assert sum(shares, []) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


if __name__ == "__main__":
    work(Path(sys.argv[1]), *map(int, sys.argv[2:]))
