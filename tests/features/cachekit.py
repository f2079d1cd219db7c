"""A small cache without images: what the cache's tests and their killed children build."""

import hashlib
import os
import pickle
import signal
from pathlib import Path

import torch

from lowrank_tune.features.cache import Contents, fingerprint, recover, seal
from lowrank_tune.features.commits import TENSOR, commit_shard, shard_name
from lowrank_tune.features.extract import ImportTensors
from lowrank_tune.features.remote import stage_cache
from lowrank_tune.features.shards import Pool, ShardJob, ShardPlan, ShardResult, ShardWorker

IDENTITY = {"kind": "tensors", "forward": 1, "store_dtype": "float16", "tokens": 3, "dim": 5}
KEYS = [hashlib.sha256(bytes([number])).hexdigest() for number in range(11)]
SHARD_ROWS = 4
BROKEN = KEYS[6]


def cache_directory(root: Path) -> Path:
    return root / fingerprint(IDENTITY)


def features_of(key: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(key[:8], 16))
    return torch.randn(IDENTITY["tokens"], IDENTITY["dim"], generator=generator).half()


def build(root: Path, keys: list[str] = KEYS) -> Contents:
    """Complete the cache for these keys, as the pipeline does."""
    directory = cache_directory(root)
    missing = recover(directory, IDENTITY).missing(keys)
    for first in range(0, len(missing), SHARD_ROWS):
        planned = missing[first : first + SHARD_ROWS]
        usable = [key for key in planned if key != BROKEN]
        features = torch.stack([features_of(key) for key in usable])
        quarantined = [(BROKEN, "truncated")] if BROKEN in planned else []
        commit_shard(directory, shard_name(planned), usable, {TENSOR: features}, quarantined)
    return seal(directory, IDENTITY, "imported tensors", "unknown")


def build_and_die(root: Path, step: int) -> None:
    """Run `build`, killed at the given one of the moments before and after each fsync and rename."""
    calls = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal calls
            for moment in ("before", "after"):
                if calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                if moment == "before":
                    result = function(*arguments, **options)
            return result

        return call

    os.fsync = counted(os.fsync)
    os.replace = counted(os.replace)
    build(root)


def stage_and_die(place: Path, staging: Path, step: int) -> None:
    """Stage a cache, killed at the given fsync."""
    os.environ["LOWRANK_TUNE_STAGING"] = str(staging)
    fsync, calls = os.fsync, []

    def counted(descriptor):
        calls.append(descriptor)
        if len(calls) > step:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = counted
    stage_cache(place)


def importing(directory: Path) -> ImportTensors:
    """The import of tensors into that cache."""
    return ImportTensors(str(directory), IDENTITY, "imported tensors", "unknown")


def made(job: ShardJob, plan: ShardPlan, pool: Pool | None = None, **row: object) -> ShardResult:
    """What a worker in this process makes of a shard."""
    batch = {name: [value] for name, value in ({"plan": pickle.dumps(plan)} | row).items()}
    return pickle.loads(ShardWorker(job, pool or Pool(1, 1))(batch)["result"][0])


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
