import re

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.errors import InputError
from lowrank_tune.features.decompose import Decompose
from lowrank_tune.features.extract import EncodeImages, ImportTensors
from lowrank_tune.features.shards import DECODE_CPUS, LEAST_CPUS, Node, Pool, wait_for_room


def plan_pool(shards, nodes, actors="auto"):
    spec = FeaturesSpec.model_validate({"source": {"samples": 4}, "actors": actors})
    return EncodeImages("", {}, "", "", None, None, spec).pool(shards, nodes)


def place(pool, nodes):
    """Put every encoder somewhere, always on the machine with most room; return what is left of each machine's CPUs."""
    left = [[node.cpus, node.gpus] for node in nodes]
    for _ in range(pool.most):
        fitting = [room for room in left if room[0] >= pool.cpus - 1e-9 and room[1] >= pool.gpus]
        assert fitting, f"no machine of {nodes} has room for one more of {pool}"
        most = max(fitting)
        most[0] -= pool.cpus
        most[1] -= pool.gpus
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
            plan_pool(shards, nodes, wanted)
        return
    pool = plan_pool(shards, nodes, wanted)
    assert 1 <= pool.least <= pool.most <= shards
    assert wanted == "auto" or pool.least == pool.most == min(shards, wanted)
    assert pool.threads >= 1
    assert pool.gpus == on_gpus
    assert pool.cpus != DECODE_CPUS, "Ray Data would fuse decoding into the encoder"
    assert max(place(pool, nodes)) >= DECODE_CPUS


@pytest.mark.parametrize(
    ("nodes", "most", "cpus", "gpus"),
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
def test_auto_takes_one_encoder_a_gpu_or_one_a_machine(nodes, most, cpus, gpus):
    pool = plan_pool(10, nodes)
    assert (pool.most, pool.cpus, pool.gpus) == (most, cpus, gpus)


@pytest.mark.parametrize(
    ("wanted", "nodes", "message"),
    [
        ("auto", [], "has no CPU"),
        (3, [Node(2, 0)], r"3 encoders need a CPU each, the .* \(2 CPUs, 0 GPUs\) has room for 2; .* at most 2"),
        (2, [Node(8, 1)], r"2 encoders need a GPU and a CPU .* \(8 CPUs, 1 GPUs\) has room for 1"),
        ("auto", [Node(8, 0), Node(0, 2)], "start a machine that has both"),
    ],
)
def test_what_the_cluster_lacks_is_an_error_that_names_it(wanted, nodes, message):
    with pytest.raises(InputError, match=message):
        plan_pool(9, nodes, wanted)


def test_tensors_take_a_cpu_each_and_a_decomposer_a_gpu_where_there_is_one():
    nodes = [Node(8, 2), Node(4, 1)]
    assert ImportTensors("", {}, "", "").pool(100, nodes) == Pool(1, 12)
    assert Decompose("", {}, "", "", "model", "", "auto").pool(100, nodes) == Pool(1, 3, gpus=1)
    assert Decompose("", {}, "", "", "model", "", "cpu").pool(2, nodes) == Pool(1, 2)
    with pytest.raises(InputError, match="--device cuda: the Ray cluster has no GPU"):
        Decompose("", {}, "", "", "model", "", "cuda").pool(2, [Node(8, 0)])


@pytest.mark.parametrize(
    ("pool", "need"),
    [
        (Pool(1, 1), "0.4 CPUs for 1 workers"),
        (Pool(1, 1, gpus=1), "1 GPUs and 0.4 CPUs for 1 workers"),
        (Pool(2, 2, decoding=True), "1.3 CPUs for 2 workers and a decoding task"),
    ],
)
def test_a_cluster_that_has_too_little_even_without_other_work_is_not_waited_for(pool, need):
    with pytest.raises(InputError, match=f"the work needs at least {need}; the Ray cluster has 0 CPUs, 1 GPUs; start"):
        wait_for_room(pool, [Node(0, 1), Node(0, 0)], pytest.fail)


def test_a_cluster_that_other_work_holds_is_waited_for_and_the_user_told(ray_cluster):
    @ray.remote(num_cpus=1.5)
    class Other:
        def here(self):
            return True

    other = Other.remote()
    assert ray.get(other.here.remote())
    notes, nodes = [], [Node(2, 0)]

    def end_the_other(note):
        notes.append(note)
        ray.kill(other)

    # Two encoders were wanted where the cluster is free; one with less is enough where it is not.
    pool = Pool(1, 2, decoding=True)
    found = wait_for_room(pool, nodes, end_the_other, shrink_after_s=0.1)
    assert (found.least, found.cpus) in {(1, LEAST_CPUS), (1, 1)}
    (note,) = notes
    assert re.search(r"waiting .* at least 0\.9 CPUs .* has 2 CPUs, 0 GPUs, of which 0\.5 CPUs, 0 GPUs are free", note)
    # Ray tells of a freed CPU a moment later: what is waited for comes.
    assert wait_for_room(Pool(1, 1, decoding=True), nodes, notes.append).cpus == 1
