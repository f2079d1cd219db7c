from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowrank_tune.errors import CacheError
from lowrank_tune.lowrank.data import FeatureMatrix


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_come_in_the_order_asked_for_from_any_shard(make_features, power_law, dtype):
    x = power_law(10, 6, 9)
    data = FeatureMatrix(make_features(x, dtype, shard_size=4))
    stored = x.to(getattr(torch, dtype))
    assert (len(data), data.tokens, data.dim, data.dtype) == (10, 6, 9, stored.dtype)
    assert torch.equal(data.load([9, 0, 5, 5]), stored[[9, 0, 5, 5]].float())
    assert torch.equal(data.load([3], data.dtype), stored[[3]])


def test_batches_cover_the_images_once(make_features, power_law):
    x = power_law(7, 4, 5)
    batches = list(FeatureMatrix(make_features(x)).batches(range(7), 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), x)


def test_a_batch_is_the_callers_own(make_features, power_law):
    x = power_law(2, 4, 5)
    data = FeatureMatrix(make_features(x))
    data.load([0]).zero_()
    assert torch.equal(data.load([0]), x[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_features_are_put_where_the_caller_wants_them(make_features, power_law, dtype):
    x = power_law(5, 4, 5)
    out = torch.zeros(2, 4, 5, dtype=dtype)
    assert FeatureMatrix(make_features(x, "float16")).load([4, 1], out=out) is out
    assert torch.equal(out, x.half()[[4, 1]].to(dtype))


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


def test_nothing_is_read_before_it_is_asked_for(make_features, power_law):
    features = make_features(power_law(4, 4, 5), shard_size=2)
    (Path(features.directory) / "shards" / "00002.safetensors").unlink()
    data = FeatureMatrix(features)
    with pytest.raises(CacheError, match=r"00002\.safetensors.*features verify"):
        data.load([0])


@pytest.mark.parametrize(
    "shard", [{"features": torch.zeros(2, 4, 6)}, {"features": torch.zeros(2, 4, 5).half()}, {"other": torch.zeros(1)}]
)
def test_a_shard_that_is_not_what_the_cache_says_is_refused(make_features, power_law, shard):
    features = make_features(power_law(2, 4, 5))
    save_file(shard, Path(features.directory) / "shards" / "00000.safetensors")
    with pytest.raises(CacheError, match=r"00000\.safetensors"):
        FeatureMatrix(features).load([0])


def test_a_damaged_shard_is_refused(make_features, power_law):
    features = make_features(power_law(2, 4, 5))
    (Path(features.directory) / "shards" / "00000.safetensors").write_bytes(b"not a shard")
    with pytest.raises(CacheError, match="cannot be read"):
        FeatureMatrix(features).load([0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from Linux's /proc")
def test_memory_does_not_grow_with_the_cache(make_features):
    one = make_features(torch.ones(8, 256, 2048, dtype=torch.float16), "float16")
    shards = Path(one.directory) / "shards"
    names = [f"link{number}.safetensors" for number in range(60)]  # half a gigabyte to map, 8 MB on the disk
    for name in names:
        (shards / name).hardlink_to(shards / "00000.safetensors")
    rows = tuple(replace(row, shard=name) for name in names for row in one.rows)
    data = FeatureMatrix(replace(one, rows=rows))
    before = _anonymous_bytes()
    for batch in data.batches(range(len(data)), 2):
        assert batch[0, 0, 0] == 1
    # What batches leave in the allocator comes to 70 MB at most; a batch lost with each shard comes to 500 MB.
    assert _anonymous_bytes() - before < 200e6


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
