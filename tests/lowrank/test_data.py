"""Features as they are read from a cache's shards, and the three ways to mini-batches.

The ways are tried on the CPU: what is said about devices here holds for any torch device.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_tune.errors import CacheError
from lowrank_tune.lowrank.codebooks import make_codebook
from lowrank_tune.lowrank.data import (
    RESIDENT_FRACTION,
    FeatureMatrix,
    Resident,
    Streamed,
    batches_on,
    fits,
    open_matrix,
)
from lowrank_tune.lowrank.decomposers import make_decomposer
from lowrank_tune.records import FeatureRow, FeatureSet, TrialConfig

WAYS = {
    "mapped": lambda data: data,
    "resident": lambda data: Resident(data, "cpu"),
    "streamed": lambda data: Streamed(data, "cpu"),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_come_in_the_order_asked_for_from_any_shard(make_features, power_law, dtype):
    x = power_law(10, 6, 9)
    data = FeatureMatrix(make_features(x, dtype, shard_size=4))
    stored = x.to(getattr(torch, dtype))
    assert (len(data), data.tokens, data.dim, data.dtype) == (10, 6, 9, stored.dtype)
    assert torch.equal(data.load([9, 0, 5, 5]), stored[[9, 0, 5, 5]].float())
    assert torch.equal(data.load([3], data.dtype), stored[[3]])
    batches = list(data.batches(range(7), 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), stored[:7].float())
    data.load([0]).zero_()  # a batch is the caller's own
    assert torch.equal(data.load([0]), stored[:1].float())
    for kind in (torch.float16, torch.float32, torch.float64):
        out = torch.zeros(2, 6, 9, dtype=kind)
        assert data.load([4, 1], out=out) is out
        assert torch.equal(out, stored[[4, 1]].to(kind))


@pytest.mark.parametrize("shape", [(70, 1000), (3, 40000), (5, 7)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_threads_give_the_same_rows(make_features, shape, dtype):
    """Rows of several pieces, of pieces that torch divides all the same, and of one piece."""
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    data = FeatureMatrix(make_features(x, dtype, shard_size=2))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(data.load([4, 0, 4, 3]), x.to(data.dtype)[[4, 0, 4, 3]].float())
        assert data.load([]).shape == (0, *shape)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "shard",
    [
        None,
        b"not a shard",
        {"features": torch.zeros(2, 4, 6)},
        {"features": torch.zeros(2, 4, 5).half()},
        {"other": torch.zeros(1)},
    ],
    ids=["missing", "damaged", "shape", "dtype", "content"],
)
def test_a_shard_that_is_not_what_the_cache_says_is_refused_when_a_row_is_asked_for(make_features, power_law, shard):
    features = make_features(power_law(4, 4, 5), shard_size=2)
    path = Path(features.directory) / "shards" / "00002.safetensors"
    path.unlink()
    if isinstance(shard, bytes):
        path.write_bytes(shard)
    elif shard:
        save_file(shard, path)
    data = FeatureMatrix(features)
    with pytest.raises(CacheError, match=r"00002\.safetensors.*features verify"):
        data.load([0])


@pytest.fixture
def coded(tmp_path, power_law):
    """Five coded images in two shards, and what comes back of each."""
    x_NTD = power_law(5, 4, 6)
    params = {"token_transform": "none", "lambda_rate": 100.0}
    config = TrialConfig("r006-shared-0000", 0, 0, "shared", 6, 1e-3, 1e-5, 8, 1, 1, params)
    model = make_decomposer(config, 4, 6)
    model.initialise([x_NTD], torch.Generator().manual_seed(0))
    codebook = make_codebook(model)
    codebook.save(tmp_path / "codebook.safetensors")
    (tmp_path / "shards").mkdir()
    streams = [codebook.encode(x_TD, target_error=0.1) for x_TD in x_NTD]
    for shard, images in (("a", [0, 1, 2]), ("b", [3, 4])):
        lengths = torch.tensor([len(streams[image]) for image in images], dtype=torch.uint32)
        together = torch.frombuffer(bytearray(b"".join(streams[image] for image in images)), dtype=torch.uint8)
        save_file({"length": lengths, "stream": together}, tmp_path / "shards" / f"{shard}.safetensors")
    rows = tuple(
        FeatureRow(name * 64, f"{name}.safetensors", row) for name, row in zip("aaabb", [0, 1, 2, 0, 1], strict=True)
    )
    features = FeatureSet(str(tmp_path), "f", "shared", "unknown", "coded", 4, 6, rows, "", rank=6)
    return features, torch.stack([codebook.decode(stream) for stream in streams])


def test_coded_images_come_in_the_order_asked_for_from_any_shard(coded):
    features, x_NTD = coded
    data = open_matrix(features)
    assert (len(data), data.tokens, data.dim, data.dtype) == (5, 4, 6, torch.float32)
    assert torch.equal(data.load([4, 0, 2, 2]), x_NTD[[4, 0, 2, 2]])
    assert torch.equal(data.load([1], torch.float64), x_NTD[[1]].double())
    assert torch.equal(torch.cat(list(data.batches(range(5), 2))), x_NTD)
    for way in WAYS.values():
        assert torch.equal(way(data).lend([3, 1]), x_NTD[[3, 1]])


@pytest.mark.parametrize("origin", ["", "s3://bucket/coded"])
@pytest.mark.parametrize("part", ["length", "stream"])
def test_a_coded_image_that_is_damaged_is_named_with_the_remedy(coded, part, origin):
    features, x_NTD = coded
    path = Path(features.directory) / "shards" / "b.safetensors"
    parts = load_file(path)
    parts[part].view(torch.uint8)[-1 if part == "stream" else 0] ^= 1
    save_file(parts, path)
    data = open_matrix(replace(features, origin=origin))
    with pytest.raises(CacheError, match=r"b\.safetensors: row 1 \(b{16}\) cannot be decoded") as error:
        data.load([4])
    assert (f"remove this copy of {origin}" if origin else f"remove {features.directory}/manifest.json") in str(
        error.value
    )
    assert torch.equal(data.load([0, 2]), x_NTD[[0, 2]])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from Linux's /proc")
def test_memory_does_not_grow_with_the_cache(make_features):
    one = make_features(torch.ones(8, 256, 2048, dtype=torch.float16), "float16")
    shards = Path(one.directory) / "shards"
    names = [f"link{number}.safetensors" for number in range(60)]  # half a gigabyte to map, 8 MB on the disk
    for name in names:
        (shards / name).hardlink_to(shards / "00000.safetensors")
    rows = tuple(replace(row, shard=name) for name in names for row in one.rows)
    data = FeatureMatrix(replace(one, rows=rows))
    before = anonymous_bytes()
    for batch in data.batches(range(len(data)), 2):
        assert batch[0, 0, 0] == 1
    # What batches leave in the allocator comes to 70 MB at most; a batch lost with each shard comes to 500 MB.
    assert anonymous_bytes() - before < 200e6


def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.fixture(params=["float16", "bfloat16", "float32"])
def stored(request, make_features, power_law):
    """A cache of more images than are moved at once, and what it holds as float32."""
    x_NTD = power_law(70, 6, 9)
    data = FeatureMatrix(make_features(x_NTD, request.param, shard_size=16))
    return data, x_NTD.to(data.dtype).float()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_numbers_and_a_loaded_batch_stays_the_callers_own(stored, way):
    data, x_NTD = stored
    batches = WAYS[way](data)
    kept = batches.load([7, 8])
    for indices in ([69, 0, 5, 5], [3], list(range(40)), [68, 1]):
        for get in (batches.load, batches.lend):
            found = get(indices)
            assert found.dtype == torch.float32
            assert torch.equal(found, x_NTD[indices])
    assert torch.equal(kept, x_NTD[[7, 8]])
    kept.zero_()
    assert torch.equal(batches.load([7, 8]), x_NTD[[7, 8]])


def test_on_the_cpu_lent_batches_use_the_same_memory_and_trials_share_what_they_read_from(stored):
    batches = batches_on(stored[0], "cpu")
    assert batches is batches_on(stored[0], "cpu")
    first = batches.lend([0, 1, 2, 3]).data_ptr()
    assert batches.lend([4, 5]).data_ptr() == first


def test_features_are_held_only_when_enough_memory_stays_free():
    assert fits(5_000, 20_000)
    assert not fits(5_001, 20_000)
    # Four trials that start one after the other on one device all leave room.
    assert (1 - RESIDENT_FRACTION) ** 4 > 0.3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_held_and_streamed_features_are_the_same(stored):
    data, x_NTD = stored
    streamed = Streamed(data, "cuda")
    assert isinstance(batches_on(data, "cuda"), Resident)
    for start in range(0, 60, 5):
        indices = list(range(start, start + 10))
        assert torch.equal(streamed.load(indices).cpu(), x_NTD[indices])
        assert torch.equal(batches_on(data, "cuda").load(indices).cpu(), x_NTD[indices])
