import re

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.errors import InputError
from lowrank_tune.features.extract import DECODE_CPUS, LEAST_CPUS, Node, find_pool, plan_pool, shrink_pool


def spec(actors="auto", **keys):
    return FeaturesSpec.model_validate({"source": {"samples": 4}, "actors": actors, **keys})


def place(pool, nodes):
    """Put every encoder somewhere, always on the machine with most room; return what is left of each machine's CPUs."""
    left = [[node.cpus, node.gpus] for node in nodes]
    for _ in range(pool.actors):
        fitting = [room for room in left if room[0] >= pool.cpus_each - 1e-9 and room[1] >= pool.gpus_each]
        assert fitting, f"no machine of {nodes} has room for one more of {pool}"
        most = max(fitting)
        most[0] -= pool.cpus_each
        most[1] -= pool.gpus_each
    return [cpus for cpus, _ in left]


@given(
    wanted=st.one_of(st.just("auto"), st.integers(1, 16)),
    shards=st.integers(1, 100),
    nodes=st.lists(st.builds(Node, st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=6),
)
def test_encoders_and_decoding_always_fit_the_cluster(wanted, shards, nodes):
    on_gpus = any(node.gpus for node in nodes)
    most = sum(min(node.cpus, node.gpus) if on_gpus else node.cpus for node in nodes)
    if wanted != "auto" and wanted > most:
        with pytest.raises(InputError, match=f"{wanted} encoders .* has room for {most}"):
            plan_pool(spec(wanted), shards, nodes)
        return
    pool = plan_pool(spec(wanted), shards, nodes)
    assert 1 <= pool.actors <= shards
    assert wanted == "auto" or pool.actors == min(shards, wanted)
    assert pool.threads >= 1
    assert pool.gpus_each == on_gpus
    assert pool.cpus_each != DECODE_CPUS, "Ray Data would fuse decoding into the encoder"
    assert max(place(pool, nodes)) >= DECODE_CPUS


@pytest.mark.parametrize(
    ("nodes", "actors", "cpus_each", "gpus_each"),
    [
        ([Node(2, 0)], 1, 1, 0),
        ([Node(16, 0)], 1, 12, 0),
        ([Node(16, 4)], 4, 1, 1),
        ([Node(1, 0)], 1, LEAST_CPUS, 0),
        ([Node(32, 0), Node(32, 0), Node(2, 0)], 2, 25, 0),
        ([Node(64, 0), Node(2, 4)], 2, 1, 1),
        ([Node(1, 1)], 1, LEAST_CPUS, 1),
    ],
)
def test_auto_takes_one_encoder_a_gpu_or_one_a_machine(nodes, actors, cpus_each, gpus_each):
    pool = plan_pool(spec(), 10, nodes)
    assert (pool.actors, pool.cpus_each, pool.gpus_each) == (actors, cpus_each, gpus_each)


def test_batch_size_and_decoders_come_from_the_study_file():
    assert (plan_pool(spec(), 1, [Node(2, 0)]).batch, plan_pool(spec(), 1, [Node(2, 0)]).decoders) == (None, None)
    pool = plan_pool(spec(batch_size=6, decoders=3), 1, [Node(2, 0)])
    assert (pool.batch, pool.decoders) == (6, 3)


@pytest.mark.parametrize(
    ("wanted", "nodes", "message"),
    [
        ("auto", [], "has no CPU"),
        (
            3,
            [Node(2, 0)],
            r"3 encoders need a CPU each, the Ray cluster \(2 CPUs, 0 GPUs\) has room for 2; .* at most 2",
        ),
        (2, [Node(8, 1)], r"2 encoders need a GPU and a CPU .* \(8 CPUs, 1 GPUs\) has room for 1"),
        ("auto", [Node(8, 0), Node(0, 2)], "start a machine that has both"),
    ],
)
def test_what_the_cluster_lacks_is_an_error_that_names_it(wanted, nodes, message):
    with pytest.raises(InputError, match=message):
        plan_pool(spec(wanted), 9, nodes)


def test_other_work_leaves_fewer_cpus_and_for_auto_fewer_encoders():
    nodes = [Node(16, 4)]
    pool = plan_pool(spec(), 10, nodes)
    fewer = shrink_pool(pool, Node(2.5, 3), fewer=True)
    assert (fewer.actors, fewer.cpus_each) == (3, LEAST_CPUS)
    alone = plan_pool(spec(), 10, [Node(16, 0)])
    assert shrink_pool(alone, Node(6.5, 0), fewer=True).cpus_each == 6
    assert shrink_pool(pool, Node(16, 3), fewer=False) is None


def test_a_cluster_that_other_work_holds_is_waited_for_and_the_user_told(ray_cluster):
    @ray.remote(num_cpus=1.5)
    class Other:
        def here(self):
            return True

    other = Other.remote()
    assert ray.get(other.here.remote())
    notes = []

    def end_the_other(note):
        notes.append(note)
        ray.kill(other)

    assert find_pool(spec(), 3, end_the_other, shrink_after_s=0.1).cpus_each <= 1
    (note,) = notes
    assert re.search(r"waiting .* at least 0\.9 CPUs .* has 2 CPUs, 0 GPUs, of which 0\.5 CPUs, 0 GPUs are free", note)
    # Ray tells of a freed CPU a moment later: what is waited for comes.
    assert find_pool(spec(), 3, notes.append).cpus_each == 1
