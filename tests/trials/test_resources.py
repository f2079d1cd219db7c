import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowrank_tune.config.schema import ResourcesSpec
from lowrank_tune.errors import InputError
from lowrank_tune.trials.tuning import trials_at_once


def node(alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("spec", "nodes", "expected"),
    [
        ({"cpus_per_trial": 1}, [node(CPU=2)], 2),
        ({"cpus_per_trial": 2}, [node(CPU=3), node(CPU=5)], 3),
        ({"cpus_per_trial": 1, "gpus_per_trial": 0.1}, [node(CPU=64, GPU=1)], 10),
        ({"cpus_per_trial": 1, "gpus_per_trial": 0.25}, [node(CPU=2, GPU=1), node(CPU=64)], 2),
        ({"cpus_per_trial": 0.5, "max_concurrent": 3}, [node(CPU=4)], 3),
        ({"cpus_per_trial": 1, "max_concurrent": 9}, [node(CPU=4)], 4),
        ({"cpus_per_trial": 1}, [node(CPU=2), node(alive=False, CPU=32)], 2),
        ({"cpus_per_trial": 2, "workers_per_trial": 3}, [node(CPU=5), node(CPU=9)], 2),
        ({"cpus_per_trial": 1, "gpus_per_trial": 1, "workers_per_trial": 4}, [node(CPU=64, GPU=8)], 2),
        ({"cpus_per_trial": 1, "workers_per_trial": 2, "max_concurrent": 1}, [node(CPU=8)], 1),
    ],
)
def test_as_many_trials_run_as_fit_on_the_nodes(spec: dict[str, Any], nodes: list[Any], expected: int) -> None:
    assert trials_at_once(ResourcesSpec.model_validate(spec), nodes) == expected


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([node(CPU=4)], r"gpus_per_trial: .* 1 GPU, .* more than 0"),
        ([node(CPU=1, GPU=4)], r"cpus_per_trial: .* 2 CPU, .* more than 1"),
        ([node(CPU=8), node(CPU=1, GPU=4)], r"2 CPU and 1 GPU together"),
    ],
)
def test_a_trial_that_fits_nowhere_is_refused(nodes: list[Any], said: str) -> None:
    spec = ResourcesSpec(cpus_per_trial=2, gpus_per_trial=1)
    with pytest.raises(InputError, match=said):
        trials_at_once(spec, nodes)


def test_more_workers_than_fit_on_all_nodes_together_are_refused() -> None:
    spec = ResourcesSpec(cpus_per_trial=2, workers_per_trial=4)
    said = r"resources.workers_per_trial: a trial asks for 4 workers of 2 CPU and 0 GPU each, .* has room for 3; lower"
    with pytest.raises(InputError, match=said):
        trials_at_once(spec, [node(CPU=5), node(CPU=3)])


def test_four_trials_that_ask_for_a_quarter_of_a_gpu_train_on_it_at_once(tmp_path: Path) -> None:
    script = Path(__file__).with_name("shared_gpu.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "4 started, 0 ended"
