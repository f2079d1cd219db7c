"""Caches on a disk, on S3 and on a store that only fsspec knows: listed, found, removed, and copied to a node."""

import json
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cachekit import IDENTITY, KEYS, build, features_of, snapshot, stage_and_die

from lowrank_tune import open_features
from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.errors import CacheError, InputError
from lowrank_tune.features.cache import differences, fingerprint, open_cache, recover, seal, verify_cache
from lowrank_tune.features.checkpoint import read_checkpoint_config
from lowrank_tune.features.commits import checksum
from lowrank_tune.features.extract import image_identity
from lowrank_tune.features.remote import (
    cache_row,
    describe_cache,
    find_cache,
    list_caches,
    local_copy,
    nearest_cache,
    only_writer,
    remove_cache,
    stage_cache,
)


@pytest.fixture(params=["s3", "memory"])
def remote(request, cache, staging):
    """A cache on an object store: S3 by pyarrow, and one that only fsspec knows."""
    if request.param == "s3":
        return request.getfixturevalue("bucket").put(cache, f"results/features/{cache.name}")
    import fsspec

    memory, root = fsspec.filesystem("memory"), f"/{cache.parent.parent.parent.name}"
    memory.put(str(cache), f"{root}/{cache.name}", recursive=True)
    return f"memory:/{root}/{cache.name}"


def test_features_come_from_an_object_store_by_way_of_a_copy_that_is_made_once(remote, cache, staging):
    features = open_features(remote)
    assert len(features) == len(KEYS) - 1
    for index, row in enumerate(features.features.rows):
        assert torch.equal(features.load([index], torch.float16)[0], features_of(row.key))
    copy = Path(features.features.directory)
    assert features.features.origin == remote
    assert copy == staging / json.loads((cache / "manifest.json").read_text())["digest"] / cache.name
    assert snapshot(copy) == snapshot(cache)
    made = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert stage_cache(remote) == copy
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == made


def test_a_local_folder_is_read_where_it_lies_unless_the_user_names_a_staging_directory(cache, tmp_path, monkeypatch):
    monkeypatch.delenv("LOWRANK_TUNE_STAGING", raising=False)
    for place in (str(cache), cache.as_uri()):
        features = open_features(place).features
        assert (features.directory, features.origin) == (str(cache), "")
        assert local_copy(features) == features
    monkeypatch.setenv("LOWRANK_TUNE_STAGING", str(tmp_path / "staging"))
    features = open_features(cache).features
    assert (Path(features.directory).parents[1], features.origin) == (tmp_path / "staging", str(cache))
    monkeypatch.delenv("LOWRANK_TUNE_STAGING")
    elsewhere = local_copy(features)
    assert (elsewhere.directory, elsewhere.origin) == (str(cache), ""), "another node has its own staging directory"


def test_a_cache_that_has_grown_is_another_copy(bucket, tmp_path, staging):
    root = tmp_path / "features"
    build(root, KEYS[:4])
    (directory,) = (path for path in root.iterdir() if path.is_dir())
    first = stage_cache(bucket.put(directory, directory.name))
    build(root)
    grown = stage_cache(bucket.put(directory, directory.name))
    assert (len(open_cache(grown).rows), len(open_cache(first).rows)) == (len(KEYS) - 1, 4)


def test_a_cache_that_another_process_extends_is_copied_as_it_was_sealed_last(tmp_path, staging, monkeypatch):
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    memory, root = fsspec.filesystem("memory"), tmp_path / "features"
    build(root, KEYS[:4])
    (directory,) = (path for path in root.iterdir() if path.is_dir())
    remote = f"memory:/{tmp_path}/{directory.name}"
    memory.put(str(directory), f"{tmp_path}/", recursive=True)
    memory.pipe(f"{tmp_path}/{directory.name}/shards/.tmp-0123-abcd.safetensors", b"half")
    build(root)
    opened, read = [], MemoryFileSystem._open

    def while_it_grows(filesystem, path, *arguments, **options):
        if ".tmp-" in path:
            raise FileNotFoundError(path)
        if path.endswith("/manifest.json"):
            opened.append(path)
            if len(opened) == 2:  # it was read, and is to be copied now
                for file in directory.rglob("*.*"):
                    memory.pipe(f"{tmp_path}/{directory.name}/{file.relative_to(directory)}", file.read_bytes())
        return read(filesystem, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", while_it_grows)
    assert snapshot(stage_cache(remote)) == snapshot(directory)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("flipped", r"arrived damaged \(.*{shard}: row \d+ .* verify it where it lies"),
        ("truncated", "{shard}: has"),
        ("missing", "{shard}: is missing"),
        ("unsealed", "is not sealed"),
    ],
)
def test_a_damaged_store_is_refused_by_name_without_its_secrets_and_no_copy_stays(bucket, cache, staging, kind, reason):
    address = bucket.put(cache, cache.name)
    shard = sorted((cache / "shards").iterdir())[0]
    data = shard.read_bytes()
    if kind in ("flipped", "truncated"):
        spoilt = data[:-1] + bytes([data[-1] ^ 1]) if kind == "flipped" else data[:-1]
        bucket.write(f"{cache.name}/shards/{shard.name}", spoilt)
    else:
        gone = "manifest.json" if kind == "unsealed" else f"shards/{shard.name}"
        bucket.filesystem.delete_file(f"{bucket.name}/{cache.name}/{gone}")
    with pytest.raises(CacheError, match=reason.format(shard=shard.name)) as error:
        open_features(address)
    assert bucket.name in str(error.value) and "s3cret" not in str(error.value)
    assert not [path for path in staging.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert verify_cache(address, full=True)


@pytest.mark.parametrize("kind", ["truncated", "another"])
def test_a_copy_that_was_spoilt_is_made_again(remote, cache, staging, tmp_path, kind):
    copy = stage_cache(remote)
    if kind == "truncated":
        shard = sorted((copy / "shards").iterdir())[0]
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        build(tmp_path / "other", KEYS[:4])
        shutil.rmtree(copy)
        shutil.copytree(tmp_path / "other" / cache.name, copy)
    assert stage_cache(remote) == copy
    assert snapshot(copy) == snapshot(cache)


def test_killed_while_copying_the_next_processes_start_over_and_one_of_them_copies(cache, staging, forks):
    for step in (0, 3):
        child = forks.Process(target=stage_and_die, args=(cache, staging, step))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        assert list(staging.glob("*/.tmp-*")) and not list(staging.glob("*/[0-9a-f]*")), "no half has the cache's name"
    children = [forks.Process(target=stage_and_die, args=(cache, staging, 1000)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    (copy,) = staging.glob("*/[0-9a-f]*")
    assert snapshot(copy) == snapshot(cache)
    assert not list(staging.glob("*/.tmp-*"))


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


def test_a_table_that_is_being_written_is_nobodys(bucket, cache, staging):
    whole = cache / "sources" / f"{checksum(b'whole')}.parquet"
    whole.write_bytes(b"whole")
    half = cache / "sources" / f".tmp-0123-{checksum(b'whole and more')}.parquet"
    half.write_bytes(b"whole and")
    assert open_cache(cache).records_path == str(whole)
    assert verify_cache(cache) == []
    address = bucket.put(cache, cache.name)
    assert open_cache(address).records_path == address.replace("?", f"/sources/{whole.name}?")
    assert [path.name for path in (stage_cache(address) / "sources").iterdir()] == [whole.name]
    build(cache.parent)
    assert half.exists(), "its writer does not hold the cache's lock"


def changes(identity, path=()):
    """The identity with each of its fields changed, one at a time."""
    for name, value in identity.items():
        if isinstance(value, dict):
            for field, changed in changes(value, (*path, name)):
                yield field, {**identity, name: changed}
        else:
            yield ".".join((*path, name)), {**identity, name: "another"}


def test_a_change_of_any_field_is_another_cache_and_names_the_field(tmp_path):
    spec = FeaturesSpec.model_validate({"source": {"samples": 9}, "encoder": {"checkpoint": "tiny-random"}})
    identity = image_identity(spec, read_checkpoint_config("tiny-random", tmp_path), "0123abcd")
    fields = set()
    for field, changed in changes(identity):
        assert fingerprint(changed) != fingerprint(identity)
        (text,) = differences(changed, identity)
        assert text.startswith(f"{field}: expected 'another', found ")
        fields.add(field)
    assert fields >= {
        "kind", "forward", "weights", "vision.depth", "vision.fullatt_block_indexes", "vision.window_size",
        "preprocessing.image_mean", "preprocessing.image_std", "image_size", "compute_dtype", "store_dtype",
        "tokens", "dim",
    }  # fmt: skip
    without = {name: value for name, value in identity.items() if name != "forward"}
    assert differences(identity, without) == [f"forward: expected {identity['forward']}, found None"]


def test_a_cache_of_an_earlier_version_keeps_its_fingerprint():
    assert fingerprint(IDENTITY) == "62c389ec4e949815"


def test_caches_are_listed_found_and_shown_on_a_disk_and_on_a_store(cache, bucket):
    results = cache.parent.parent
    (cache.parent / "samples").mkdir()
    unsealed = cache.parent / "0123456789abcdef"
    (unsealed / "commits").mkdir(parents=True)
    (unsealed / "commits" / "a.json").write_text("{}")
    for place in (str(results), results.as_uri(), bucket.put(results, "results")):
        first, second = list_caches(place)
        assert cache_row(second) == {
            "fingerprint": cache.name,
            "images": len(KEYS) - 1,
            "shape": [3, 5],
            "dtype": "float16",
            "bytes": sum(path.stat().st_size for path in (cache / "shards").iterdir()),
            "weights": "unknown",
            "encoder": "imported tensors",
        }
        assert "is not sealed" in cache_row(first)["encoder"]
        assert find_cache(place, cache.name[:5]) == find_cache(None, second) == second
        shown = describe_cache(second)
        assert (shown["quarantined"], shown["shards"], shown["identity"]) == (1, 3, IDENTITY)
        with pytest.raises(InputError, match=f"feature cache ffff: not in .*caches: 0123456789abcdef, {cache.name}"):
            find_cache(place, "ffff")
    with pytest.raises(InputError, match="is no feature cache"):
        find_cache(None, str(results))
    assert list_caches(results / "nowhere") == []
    assert not (results / "nowhere").exists()


def test_the_nearest_cache_is_the_one_that_differs_least(tmp_path):
    for change in ({"dim": 6}, {"dim": 7, "tokens": 4}, {"kind": "images"}):
        identity = {**IDENTITY, **change}
        recover(tmp_path / fingerprint(identity), identity)
        seal(tmp_path / fingerprint(identity), identity, "imported tensors", "unknown")
    assert nearest_cache(tmp_path, IDENTITY) == (fingerprint({**IDENTITY, "dim": 6}), ["dim: expected 5, found 6"])
    assert nearest_cache(tmp_path / "nowhere", IDENTITY) == ("", [])


def test_removing_a_cache_removes_it_and_nothing_else_and_not_while_it_is_written(cache):
    neighbour = cache.parent / "0123456789abcdef"
    (neighbour / "shards").mkdir(parents=True)
    (neighbour / "shards" / "a").write_text("a")
    (cache.parent.parent / "mlflow.db").write_text("b")
    before = snapshot(cache.parent.parent)
    with only_writer(cache), pytest.raises(InputError, match="an extraction is writing into it"):
        remove_cache(str(cache))
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    assert remove_cache(cache.as_uri()) == size
    kept = {name: data for name, data in before.items() if not name.startswith(f"features/{cache.name}/")}
    after = snapshot(cache.parent.parent)
    assert {name: data for name, data in after.items() if not name.endswith(".lock")} == kept


def test_a_cache_that_cannot_be_removed_is_named_and_stays(cache):
    disk = str(cache.parent)
    if subprocess.run(["mount", "--bind", "-o", "ro", disk, disk], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        with pytest.raises(InputError, match=rf"{cache.name}: cannot be removed \(Read-only file system\)"):
            remove_cache(str(cache))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert len(open_cache(cache).rows) == len(KEYS) - 1


def test_what_is_no_cache_of_this_machine_is_left_alone(cache, tmp_path):
    link = tmp_path / cache.name
    os.symlink(cache, link)
    for place, reason in [
        (str(cache.parent), "is no feature cache, and is left alone"),
        (f"s3://bucket/features/{cache.name}", "only local caches"),
        (str(link), "is a link"),
    ]:
        with pytest.raises(InputError, match=reason):
            remove_cache(place)
    assert (cache / "manifest.json").exists()
