"""The three ways to mini-batches, on the CPU: what is said about devices here holds for any torch device."""

import pytest
import torch

from lowrank_tune.lowrank.data import RESIDENT_FRACTION, FeatureMatrix, Mapped, Resident, Streamed, batches_on, fits

WAYS = {
    "mapped": Mapped,
    "resident": lambda data: Resident(data, "cpu"),
    "streamed": lambda data: Streamed(data, "cpu"),
}


@pytest.fixture(params=["float16", "bfloat16", "float32"])
def stored(request, make_features, power_law):
    """A cache of more images than are moved at once, and what it holds as float32."""
    x_NTD = power_law(70, 6, 9)
    data = FeatureMatrix(make_features(x_NTD, request.param, shard_size=16))
    return data, x_NTD.to(data.dtype).float()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_numbers(stored, way):
    data, x_NTD = stored
    batches = WAYS[way](data)
    for indices in ([69, 0, 5, 5], [3], list(range(40)), [68, 1]):
        for get in (batches.load, batches.lend):
            found = get(indices)
            assert found.dtype == torch.float32
            assert torch.equal(found, x_NTD[indices])


@pytest.mark.parametrize("way", WAYS)
def test_a_loaded_batch_stays_the_callers_own(stored, way):
    data, x_NTD = stored
    batches = WAYS[way](data)
    kept = batches.load([7, 8])
    for start in range(4):
        batches.load([start, start + 1])
        batches.lend([start, start + 1])
    assert torch.equal(kept, x_NTD[[7, 8]])
    kept.zero_()
    assert torch.equal(batches.load([7, 8]), x_NTD[[7, 8]])


def test_lent_batches_on_the_cpu_use_the_same_memory(stored):
    batches = Mapped(stored[0])
    first = batches.lend([0, 1, 2, 3]).data_ptr()
    assert batches.lend([4, 5]).data_ptr() == first


def test_features_are_held_only_when_enough_memory_stays_free():
    assert fits(5_000, 20_000)
    assert not fits(5_001, 20_000)
    # Four trials that start one after the other on one device all leave room.
    free = 1.0
    for _ in range(4):
        free -= RESIDENT_FRACTION * free
    assert free > 0.3


def test_trials_of_one_process_share_what_they_read_from(stored):
    data, _ = stored
    assert batches_on(data, "cpu") is batches_on(data, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_held_and_streamed_features_are_the_same(stored):
    data, x_NTD = stored
    streamed = Streamed(data, "cuda")
    assert isinstance(batches_on(data, "cuda"), Resident)
    for start in range(0, 60, 5):
        indices = list(range(start, start + 10))
        assert torch.equal(streamed.load(indices).cpu(), x_NTD[indices])
        assert torch.equal(batches_on(data, "cuda").load(indices).cpu(), x_NTD[indices])
