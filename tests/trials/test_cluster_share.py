from typing import Any

import pytest

from lowrank_tune.config.schema import ResourcesSpec
from lowrank_tune.errors import InputError
from lowrank_tune.trials.cluster_share import trials_at_once
from lowrank_tune.trials.trainable import TrialActor


def node(alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("spec", "nodes", "expected"),
    [
        ({"cpus_per_trial": 1}, [node(CPU=2)], 2),
        ({"cpus_per_trial": 2}, [node(CPU=3), node(CPU=5)], 3),
        ({"cpus_per_trial": 1, "gpus_per_trial": 0.1}, [node(CPU=64, GPU=1)], 10),
        ({"cpus_per_trial": 1, "gpus_per_trial": 0.25}, [node(CPU=8, GPU=1)], 4),
        ({"cpus_per_trial": 1, "gpus_per_trial": 0.25}, [node(CPU=2, GPU=1), node(CPU=64)], 2),
        ({"cpus_per_trial": 0.5, "max_concurrent": 3}, [node(CPU=4)], 3),
        ({"cpus_per_trial": 1, "max_concurrent": 9}, [node(CPU=4)], 4),
        ({"cpus_per_trial": 1}, [node(CPU=2), node(alive=False, CPU=32)], 2),
        ({"cpus_per_trial": 2, "workers_per_trial": 3}, [node(CPU=5), node(CPU=9)], 2),
        ({"cpus_per_trial": 1, "gpus_per_trial": 1, "workers_per_trial": 4}, [node(CPU=64, GPU=8)], 2),
    ],
)
def test_as_many_trials_run_as_fit_on_the_nodes(spec: dict[str, Any], nodes: list[Any], expected: int) -> None:
    assert trials_at_once(ResourcesSpec.model_validate(spec), nodes) == expected


@pytest.mark.parametrize(
    ("spec", "nodes", "said"),
    [
        ({"gpus_per_trial": 1}, [node(CPU=4)], r"1 x \(2 CPU and 1 GPU .* room for 0: .* at most 4 CPU and 0 GPU"),
        ({"gpus_per_trial": 1}, [node(CPU=8), node(CPU=1, GPU=4)], r"room for 0: .* at most 8 CPU and 4 GPU; lower"),
        ({"workers_per_trial": 4}, [node(CPU=5), node(CPU=3)], r"4 x \(2 CPU and 0 GPU .* room for 3: .* at most 5"),
        ({}, [], "room for 0"),
    ],
)
def test_a_trial_that_fits_nowhere_is_refused(spec: dict[str, Any], nodes: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        trials_at_once(ResourcesSpec.model_validate({"cpus_per_trial": 2} | spec), nodes)


@pytest.mark.parametrize(
    ("workers", "reserved"),
    [(1, [{"CPU": 2, "GPU": 0.25}]), (2, [{"memory": 1}, {"CPU": 2, "GPU": 0.25}, {"CPU": 2, "GPU": 0.25}])],
)
def test_ray_reserves_what_a_trial_needs_and_a_part_of_a_gpu_is_no_whole_one(
    workers: int, reserved: list[dict[str, float]]
) -> None:
    asked = TrialActor.default_resource_request({"cpus": 2, "gpus": 0.25, "workers": workers})
    assert asked is not None
    assert asked.bundles == reserved
