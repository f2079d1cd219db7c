import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_tune.errors import InputError
from lowrank_tune.features.pool import DECODE_CPUS, plan_pool


@given(
    wanted=st.one_of(st.just("auto"), st.integers(1, 16)),
    shards=st.integers(1, 100),
    cpus=st.integers(1, 64),
    gpus=st.integers(0, 8),
)
def test_encoders_and_decoding_always_fit_the_cluster(wanted, shards, cpus, gpus):
    try:
        pool = plan_pool(wanted, shards, {"CPU": cpus, "GPU": gpus}, cpus)
    except InputError:
        assert (gpus if wanted == "auto" else wanted) > cpus
        return
    assert 1 <= pool.actors <= shards
    assert pool.threads >= 1
    assert pool.cpus_each > 0
    assert pool.actors * pool.cpus_each + DECODE_CPUS <= cpus
    if gpus:
        per_gpu = round(1 / pool.gpus_each)
        assert pool.gpus_each * per_gpu == pytest.approx(1)
        assert pool.actors <= per_gpu * gpus


@pytest.mark.parametrize(
    ("resources", "actors", "gpus_each"),
    [({"CPU": 2}, 1, 0), ({"CPU": 16, "GPU": 4}, 4, 1), ({"CPU": 1}, 1, 0)],
)
def test_auto_takes_one_encoder_a_gpu_or_one_for_the_machine(resources, actors, gpus_each):
    pool = plan_pool("auto", 10, resources, resources["CPU"])
    assert (pool.actors, pool.gpus_each) == (actors, gpus_each)


def test_no_encoder_asks_for_more_than_the_largest_node_has():
    assert plan_pool("auto", 10, {"CPU": 32}, 8).cpus_each == 8


def test_missing_resources_are_an_error_and_not_a_hang():
    with pytest.raises(InputError, match="has no CPU"):
        plan_pool("auto", 1, {}, 0)
    with pytest.raises(InputError, match="3 encoders need a CPU each, the Ray cluster has 2"):
        plan_pool(3, 9, {"CPU": 2}, 2)
