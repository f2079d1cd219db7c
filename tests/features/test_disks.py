"""What a shard's worker says of a disk that is full, read-only or gone, on real file systems; no Ray is started."""

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cachekit import IDENTITY, importing, made, snapshot

from lowrank_tune.errors import CacheError
from lowrank_tune.features.cache import fingerprint, open_cache, recover, seal, verify_cache
from lowrank_tune.features.commits import shard_name
from lowrank_tune.features.shards import ShardPlan, ShardResult


def mounted(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mounted("-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)):
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


@pytest.fixture
def plans(tmp_path: Path) -> list[ShardPlan]:
    """Three shards of four tensors."""
    generator = torch.Generator().manual_seed(0)
    plans = []
    for shard in range(3):
        paths = [tmp_path / f"features_{4 * shard + number}.pt" for number in range(4)]
        for path in paths:
            torch.save(torch.randn(IDENTITY["tokens"], IDENTITY["dim"], generator=generator), path)
        keys = tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
        plans.append(ShardPlan(shard_name(keys), keys, tuple(map(str, paths))))
    return plans


def begin(root: Path) -> Path:
    directory = root / fingerprint(IDENTITY)
    recover(directory, IDENTITY)
    return directory


def make(directory: Path, plan: ShardPlan) -> ShardResult:
    return made(importing(directory), plan)


def complete(root: Path, plans: list[ShardPlan]) -> dict[str, bytes]:
    """What the next run does: take stock, make what is missing, seal."""
    directory = root / fingerprint(IDENTITY)
    missing = recover(directory, IDENTITY).missing(key for plan in plans for key in plan.keys)
    for plan in plans:
        if set(plan.keys) & set(missing):
            assert not make(directory, plan).error
    seal(directory, IDENTITY, "imported tensors", "unknown")
    assert verify_cache(directory) == []
    return snapshot(directory)


@pytest.mark.parametrize(("trouble", "reason"), [("full", "No space left"), ("read-only", "Read-only file system")])
def test_a_disk_in_trouble_is_named_and_the_next_run_completes_the_same_bytes(disk, tmp_path, plans, trouble, reason):
    directory = begin(disk)
    assert not make(directory, plans[0]).error
    if trouble == "full":
        with (disk / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError, match=reason):
            while True:
                ballast.write(bytes(4096))
    else:
        assert mounted("-o", "remount,ro", str(disk))
    for plan in plans[1:]:
        with pytest.raises(CacheError, match=f"{directory}: shard .* cannot be written .*{reason}"):
            raise make(directory, plan).error
    assert [path.name for path in (directory / "shards").iterdir()] == [plans[0].shard]
    assert len(list((directory / "commits").iterdir())) == 1
    with pytest.raises(OSError, match=reason):
        seal(directory, IDENTITY, "imported tensors", "unknown")
    with pytest.raises(CacheError, match="not sealed"):
        open_cache(directory)
    if trouble == "full":
        (disk / "ballast").unlink()
    else:
        assert mounted("-o", "remount,rw", str(disk))
    assert complete(disk, plans) == complete(tmp_path / "uninterrupted", plans)


def test_a_mount_that_vanishes_is_named_and_nothing_is_sealed(disk, plans):
    directory = begin(disk)
    assert not make(directory, plans[0]).error
    subprocess.run(["umount", "-l", str(disk)], check=True)
    with pytest.raises(CacheError, match=f"{directory}: shard .*No such file or directory"):
        raise make(directory, plans[1]).error
    with pytest.raises(CacheError, match="is no feature cache"):
        open_cache(directory)
    assert not list(disk.iterdir()), "nothing was written below the mount"
