import contextlib
import hashlib
import json
import signal
import tempfile
from itertools import chain, count
from pathlib import Path

import numpy as np
import pytest
import torch
from cachekit import BROKEN, IDENTITY, KEYS, build, build_and_die, cache_directory, features_of, importing, snapshot
from safetensors.torch import load_file, save

from lowrank_tune.errors import CacheError
from lowrank_tune.features.cache import open_cache, read_sealed, seal, verify_cache
from lowrank_tune.features.commits import commit_shard, shard_name, shard_problems, stream_lengths
from lowrank_tune.features.places import Place
from lowrank_tune.features.remote import only_writer
from lowrank_tune.features.shards import fill


def a_file(cache, folder):
    return sorted((cache / folder).iterdir())[0]


def test_every_row_lies_where_the_cache_says(sealed):
    features = open_cache(sealed)
    assert (features.tokens, features.dim, features.dtype, features.weights) == (3, 5, "float16", "unknown")
    assert {row.key for row in features.rows} == set(KEYS) - {BROKEN}
    for row in features.rows:
        stored = load_file(sealed / "shards" / row.shard)["features"][row.row]
        assert torch.equal(stored, features_of(row.key))
    assert features.quarantined == 1
    assert json.loads((sealed / "quarantine.json").read_text()) == [{"key": BROKEN, "error": "truncated"}]
    assert verify_cache(sealed, full=True) == []


@pytest.fixture
def memory(tmp_path):
    """A folder in memory, where an fsync takes no time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) as folder:
        yield Path(folder)


def test_killed_at_any_step_the_next_run_completes_the_same_bytes(memory, sealed, forks):
    """SIGKILL before and after each fsync and rename of the first shard, its commit and the seal."""
    expected, unsealed = snapshot(sealed), 0
    for step in chain(range(12), count(36)):
        root = memory / str(step)
        child = forks.Process(target=build_and_die, args=(root, step))
        child.start()
        child.join(60)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        directory = cache_directory(root)
        if (directory / "manifest.json").exists():
            assert verify_cache(directory) == []
        else:
            unsealed += 1
            with pytest.raises(CacheError, match="not sealed"):
                open_cache(directory)
        build(root)
        assert snapshot(directory) == expected
    assert step == 4 * 12, "three calls for each of three shards, three commits, the quarantine and the manifest"
    assert unsealed >= 24 - 4


def test_a_second_process_of_the_same_work_waits_for_the_first_and_says_so(cache):
    """The first ends when the second has said so; all is committed then, and no Ray is needed."""
    (cache / "manifest.json").unlink()
    paths, told, progress = dict.fromkeys(KEYS), [], []

    def waiting(note):
        told.append(note)
        first.close()

    with contextlib.ExitStack() as first:
        first.enter_context(only_writer(cache))
        contents = fill(
            importing(cache), paths, lambda reasons: None, doing="extracting", address=None, note=waiting,
            progress=lambda done, total: progress.append((done, total)),
        )  # fmt: skip
    assert told == [f"another process is extracting into {cache}: waiting for it"]
    assert progress == [(len(KEYS), len(KEYS))] and contents.missing(KEYS) == []
    assert verify_cache(cache) == []


def test_what_is_committed_is_not_made_again(tmp_path, sealed, monkeypatch):
    root = tmp_path
    build(root, KEYS[:8])
    first = snapshot(cache_directory(root) / "shards")
    modified = {path: path.stat().st_mtime_ns for path in (cache_directory(root) / "shards").iterdir()}
    contents = build(root)
    assert set(contents.rows) == set(KEYS) - {BROKEN}
    assert first.items() <= snapshot(cache_directory(root) / "shards").items()
    assert all(path.stat().st_mtime_ns == before for path, before in modified.items())
    assert snapshot(cache_directory(root)) == snapshot(sealed)


def test_leftovers_of_a_killed_run_are_removed(cache):
    (cache / "manifest.json").unlink()
    (cache / "shards" / ".tmp-1-x.safetensors").write_bytes(b"half")
    (cache / "commits" / ".tmp-2-x.json").write_bytes(b"half")
    (cache / "shards" / "0123456789abcdef.safetensors").write_bytes(b"without a commit")
    damaged = cache / "shards" / shard_name(KEYS[:4])
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    build(cache.parent)
    assert verify_cache(cache) == []
    names = {path.name for path in cache.rglob("*")}
    assert not {".tmp-1-x.safetensors", ".tmp-2-x.json", "0123456789abcdef.safetensors"} & names


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_a_shard_is_what_safetensors_itself_would_write(tmp_path, dtype, rows):
    (tmp_path / "shards").mkdir()
    (tmp_path / "commits").mkdir()
    features = torch.randn(rows, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    keys = [hashlib.sha256(bytes([number])).hexdigest() for number in range(rows)]
    whole = commit_shard(tmp_path, "whole.safetensors", keys, {"features": features}, [])
    commit_shard(tmp_path, "rows.safetensors", keys, {"features": list(features)}, [])
    expected = save({"features": features})
    assert (tmp_path / "shards" / "whole.safetensors").read_bytes() == expected
    assert (tmp_path / "shards" / "rows.safetensors").read_bytes() == expected
    assert whole.size == len(expected)


def test_rows_that_differ_in_length_are_written_as_safetensors_itself_would_and_each_is_under_its_checksum(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "commits").mkdir()
    lengths, keys = [3, 11, 1, 0], KEYS[:4]
    rows = [torch.arange(length, dtype=torch.uint8) for length in lengths]
    parts = {"length": torch.tensor(lengths, dtype=torch.uint32), "stream": rows}
    commit = commit_shard(tmp_path, "a.safetensors", keys, parts, [])
    path, whole = tmp_path / "shards" / "a.safetensors", save(parts | {"stream": torch.cat(rows)})
    assert path.read_bytes() == whole
    assert stream_lengths(Place(tmp_path), commit.shard, len(keys)) == lengths
    identity = IDENTITY | {"tensors": {"stream": ["U8", [-1]], "length": ["U32", []]}}
    for full in (False, True):
        assert shard_problems(Place(tmp_path), commit, identity, full=full) == []
    values = len(whole) - 15
    for position, reason in [
        (values, "row 0 "), (values + 3, "row 1 "), (values + 14, "row 2 "),
        (values - 16, "the lengths of its streams do not add up"), (values - 13, "do not add up"), (20, "holds "),
    ]:  # fmt: skip
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        (problem,) = shard_problems(Place(tmp_path), commit, identity, full=True)
        assert "a.safetensors" in problem and reason in problem


def test_an_all_broken_shard_is_committed_without_a_file(tmp_path):
    build(tmp_path, KEYS[:4])
    directory = cache_directory(tmp_path)
    commit_shard(directory, shard_name([BROKEN]), [], {"features": []}, [(BROKEN, "truncated")])
    contents = seal(directory, IDENTITY, "imported tensors", "unknown")
    assert contents.missing([*KEYS[:4], BROKEN]) == []
    assert verify_cache(directory) == []
    assert len(list((directory / "shards").iterdir())) == 1


def test_two_hundred_bit_flips_are_all_found(cache):
    generator = np.random.default_rng(0)
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in files])
    for _ in range(200):
        path = files[generator.choice(len(files), p=sizes / sizes.sum())]
        data = bytearray(path.read_bytes())
        position, bit = int(generator.integers(len(data))), int(generator.integers(8))
        data[position] ^= 1 << bit
        path.write_bytes(data)
        problems = verify_cache(cache, full=True)
        assert problems and path.name in " ".join(problems), f"bit {bit} of byte {position} of {path.name}"
        data[position] ^= 1 << bit
        path.write_bytes(data)
    assert verify_cache(cache, full=True) == []


@pytest.mark.parametrize(
    ("folder", "spoil", "message"),
    [
        ("shards", lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, .* were committed"),
        ("shards", lambda path: path.unlink(), "is missing"),
        ("commits", lambda path: path.write_text(path.read_text() + " "), "is not the one that was sealed"),
        ("commits", lambda path: path.unlink(), "is missing"),
    ],
)
def test_readers_refuse_a_damaged_cache_and_the_remedy_works(cache, folder, spoil, message):
    path = a_file(cache, folder)
    spoil(path)
    with pytest.raises(CacheError, match=message) as error:
        open_cache(cache)
    assert path.name in str(error.value)
    assert f"remove {cache / 'manifest.json'} and run again" in str(error.value)
    assert any(path.name in problem for problem in verify_cache(cache))
    (cache / "manifest.json").unlink()
    build(cache.parent)
    assert len(open_cache(cache).rows) == len(KEYS) - 1


def test_a_cache_that_is_not_what_it_should_be_names_what_differs(cache, tmp_path):
    with pytest.raises(CacheError, match="dim: expected 6, found 5; store_dtype: expected 'float32', found 'float16'"):
        read_sealed(cache, {**IDENTITY, "store_dtype": "float32", "dim": 6})
    renamed = cache.rename(tmp_path / "0000000000000000")
    with pytest.raises(CacheError, match=f"holds the cache {cache.name}"):
        open_cache(renamed)


def test_a_missing_an_unsealed_and_a_garbled_cache_are_told_apart(cache):
    with pytest.raises(CacheError, match="is no feature cache"):
        open_cache(cache.parent / "nowhere")
    (cache / "manifest.json").write_text("{")
    with pytest.raises(CacheError, match=r"manifest.json: is damaged"):
        open_cache(cache)
    (cache / "manifest.json").unlink()
    with pytest.raises(CacheError, match="is not sealed"):
        open_cache(cache)
    assert verify_cache(cache)[0].startswith(str(cache))


def test_a_damaged_source_table_is_found(cache):
    (cache / "sources" / "0123456789abcdef.parquet").write_bytes(b"x")
    assert "0123456789abcdef.parquet: is not what was recorded" in verify_cache(cache)[0]
