import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cachekit import KEYS, build, features_of, snapshot

from lowrank_tune import open_features
from lowrank_tune.errors import CacheError, InputError
from lowrank_tune.features import remote as staging_module
from lowrank_tune.features.cache import checksum, open_cache, verify_cache
from lowrank_tune.features.remote import local_copy, stage_cache


def placed(kind, cache, bucket):
    """The same cache's address on each kind of place."""
    return cache.as_uri() if kind == "file" else bucket.put(cache, f"results/features/{cache.name}")


@pytest.fixture(params=["s3", "memory"])
def remote(request, cache, s3_server, staging):
    """A cache on an object store: S3 by pyarrow, and one that only fsspec knows."""
    if request.param == "s3":
        return request.getfixturevalue("bucket").put(cache, f"results/features/{cache.name}")
    import fsspec

    memory = fsspec.filesystem("memory")
    root = f"/{cache.parent.parent.parent.name}"
    memory.put(str(cache), f"{root}/{cache.name}", recursive=True)
    return f"memory:/{root}/{cache.name}"


def test_features_come_from_an_object_store_by_way_of_a_local_copy(remote, cache, staging):
    features = open_features(remote)
    assert len(features) == len(KEYS) - 1
    for index, row in enumerate(features.features.rows):
        assert torch.equal(features.load([index], torch.float16)[0], features_of(row.key))
    copy = Path(features.features.directory)
    assert copy.is_relative_to(staging)
    assert snapshot(copy) == snapshot(cache)
    assert features.features.origin == remote


def test_a_file_address_is_read_where_it_lies(cache, staging):
    features = open_features(cache.as_uri())
    assert features.features.directory == str(cache)
    assert torch.equal(features.load([0], torch.float16)[0], features_of(features.features.rows[0].key))
    assert not staging.exists()


def test_a_copy_is_made_once_and_a_grown_cache_is_another(bucket, tmp_path, staging):
    root = tmp_path / "features"
    build(root, KEYS[:4])
    (directory,) = (path for path in root.iterdir() if path.is_dir())
    address = bucket.put(directory, directory.name)
    first = stage_cache(address)
    made = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert stage_cache(address) == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == made
    build(root)
    bucket.put(directory, directory.name)
    grown = stage_cache(address)
    assert grown != first
    assert len(open_cache(grown).rows) == len(KEYS) - 1
    assert len(open_cache(first).rows) == 4


def test_what_arrives_damaged_gets_no_name(bucket, cache, staging):
    shard = sorted((cache / "shards").iterdir())[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    address = bucket.put(cache, cache.name)
    bucket.write(f"{cache.name}/shards/{shard.name}", bytes(data))
    with pytest.raises(CacheError, match=rf"arrived damaged \(.*{shard.name}: row \d+ .* verify it where it lies"):
        open_features(address)
    assert not [path for path in staging.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert any(shard.name in problem for problem in verify_cache(address, full=True))


@pytest.mark.parametrize("kind", ["truncated", "missing", "unsealed"])
def test_a_damaged_store_is_refused_by_name_and_without_its_secrets(bucket, cache, staging, kind):
    address = bucket.put(cache, cache.name)
    shard = sorted((cache / "shards").iterdir())[0].name
    if kind == "truncated":
        bucket.write(f"{cache.name}/shards/{shard}", (cache / "shards" / shard).read_bytes()[:-1])
    else:
        gone = "manifest.json" if kind == "unsealed" else f"shards/{shard}"
        bucket.filesystem.delete_file(f"{bucket.name}/{cache.name}/{gone}")
    with pytest.raises(CacheError) as error:
        open_features(address)
    expected = {"truncated": f"{shard}: has", "missing": f"{shard}: is missing", "unsealed": "is not sealed"}[kind]
    assert expected in str(error.value)
    assert bucket.name in str(error.value)
    assert "s3cret" not in str(error.value)


def test_a_copy_that_was_spoilt_is_made_again(remote, staging):
    copy = stage_cache(remote)
    shard = sorted((copy / "shards").iterdir())[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert stage_cache(remote) == copy
    assert shard.read_bytes() == whole


def _stage_and_die(address, step):
    """Stage, killed at the given fsync."""
    calls = 0
    fsync = os.fsync

    def counted(descriptor):
        nonlocal calls
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        fsync(descriptor)

    os.fsync = counted
    stage_cache(address)


def test_killed_while_copying_the_next_process_starts_over(cache, staging, monkeypatch):
    address = _pretended_mount(cache, monkeypatch)
    context = multiprocessing.get_context("fork")
    files = len([path for path in cache.rglob("*") if path.is_file()])
    for step in range(files):
        child = context.Process(target=_stage_and_die, args=(address, step))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        assert not list(staging.glob("*/[0-9a-f]*")), "no half of a copy has the cache's name"
    copy = stage_cache(address)
    assert snapshot(copy) == snapshot(cache)
    assert not list(staging.glob("*/.tmp-*"))


def _stage_and_tell(address, queue):
    copies = []
    original = staging_module._copy

    def counted(*arguments):
        copies.append(1)
        time.sleep(0.2)
        original(*arguments)

    staging_module._copy = counted
    queue.put((str(stage_cache(address)), len(copies)))


def test_of_several_processes_one_copies(cache, staging, monkeypatch):
    address = _pretended_mount(cache, monkeypatch)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_stage_and_tell, args=(address, queue)) for _ in range(4)]
    for child in children:
        child.start()
    told = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
    assert len({place for place, _ in told}) == 1
    assert sum(copies for _, copies in told) == 1


def test_another_node_copies_for_itself(remote, cache, staging, monkeypatch):
    """What one node wrote down for the others is right on a node that has no copy yet."""
    here = local_copy(replace(open_cache(cache), directory=remote))
    assert (here.origin, Path(here.directory).is_relative_to(staging)) == (remote, True)
    elsewhere = staging.with_name("elsewhere")
    monkeypatch.setenv("LOWRANK_TUNE_STAGING", str(elsewhere))
    shutil.rmtree(staging)
    there = local_copy(here)
    assert Path(there.directory).is_relative_to(elsewhere)
    assert there.rows == here.rows
    assert verify_cache(there.directory) == []


def test_features_on_a_local_disk_stay_where_they_are(cache, staging):
    features = open_cache(cache)
    assert local_copy(features) is features


def test_a_staging_directory_without_room_is_named(remote, staging, monkeypatch):
    staging.write_text("in the way")
    with pytest.raises(InputError, match=r"staging directory .*/staging: cannot hold .* set LOWRANK_TUNE_STAGING"):
        open_features(remote)
    staging.unlink()
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(InputError, match="are needed, 0.0 GB are free"):
        open_features(remote)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives a folder to another user")
def test_a_default_staging_directory_of_another_user_is_not_trusted(remote, tmp_path, monkeypatch):
    monkeypatch.delenv("LOWRANK_TUNE_STAGING")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    staged = stage_cache(remote)
    assert staged.is_relative_to(tmp_path)
    os.chown(staged.parent.parent, 12345, -1)
    with pytest.raises(InputError, match="belongs to another user"):
        stage_cache(remote)


def test_a_store_that_does_not_answer_is_named(staging):
    silent = "s3://someone:s3cret@bucket/x?endpoint_override=127.0.0.1%3A9&scheme=http&region=us-east-1"
    with pytest.raises(CacheError, match=r"s3://bucket/x/manifest\.json: cannot be read") as error:
        open_features(silent)
    assert "s3cret" not in str(error.value)
    with pytest.raises(InputError, match=r"nosuch://bucket/x: no place to read from"):
        open_features("nosuch://bucket/x")


def _pretended_mount(cache, monkeypatch):
    """The cache's path, on what the operating system tells to be a network mount."""
    from collections import namedtuple

    mount = namedtuple("mount", "mountpoint fstype")
    mounts = [mount("/", "ext4"), mount(str(cache.parent.parent), "nfs4")]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    return str(cache)


def test_a_cache_on_a_network_mount_is_copied_too(cache, staging, monkeypatch):
    features = open_features(_pretended_mount(cache, monkeypatch))
    assert Path(features.features.directory).is_relative_to(staging)
    assert features.features.origin == str(cache)


def test_a_copy_of_another_cache_under_its_name_is_made_again(remote, cache, staging, tmp_path):
    copy = stage_cache(remote)
    build(tmp_path / "other", KEYS[:4])
    shutil.rmtree(copy)
    shutil.copytree(tmp_path / "other" / cache.name, copy)
    assert len(open_cache(stage_cache(remote)).rows) == len(KEYS) - 1


def test_a_table_that_is_being_written_is_nobodys(bucket, cache, staging):
    whole = cache / "sources" / f"{checksum(b'whole')}.parquet"
    whole.write_bytes(b"whole")
    half = cache / "sources" / f".tmp-0123-{checksum(b'whole and more')}.parquet"
    half.write_bytes(b"whole and")
    assert open_cache(cache).records_path == str(whole)
    assert verify_cache(cache) == []
    copy = stage_cache(bucket.put(cache, cache.name))
    assert [path.name for path in (copy / "sources").iterdir()] == [whole.name]
    build(cache.parent)
    assert half.exists(), "its writer does not hold the cache's lock"


def test_the_copys_name_is_the_manifests_digest(remote, cache, staging):
    manifest = json.loads((cache / "manifest.json").read_text())
    assert stage_cache(remote) == staging / manifest["digest"] / cache.name
    assert checksum((cache / "manifest.json").read_bytes()) != manifest["digest"]
