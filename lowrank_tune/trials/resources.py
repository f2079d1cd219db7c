"""How many trials fit on a Ray cluster at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lowrank_tune.errors import InputError
from lowrank_tune.spec.schema import ResourcesSpec

_SLACK = 1e-9  # 4 trials of 0.25 GPUs fit on one, whatever floating point says


def trials_at_once(spec: ResourcesSpec, nodes: Iterable[Mapping[str, Any]]) -> int:
    """How many trials run at a time: as many as fit, or fewer where the study file says so.

    Args:
        spec: as for `trials_that_fit`.
        nodes: as for `trials_that_fit`.

    Raises:
        InputError: as `trials_that_fit` does.
    """
    fit = trials_that_fit(spec, nodes)
    return min(fit, spec.max_concurrent or fit)


def trials_that_fit(spec: ResourcesSpec, nodes: Iterable[Mapping[str, Any]]) -> int:
    """How many trials the cluster has room for.

    Args:
        spec: what one trial needs; each of its workers must fit on one node.
        nodes: as `ray.nodes()` describes them.

    Raises:
        InputError: no node can hold a trial's worker, or all of them together not all of its workers; the message says
            what there is.
    """
    needs = {"CPU": ("cpus_per_trial", spec.cpus_per_trial), "GPU": ("gpus_per_trial", spec.gpus_per_trial)}
    owned = [node["Resources"] for node in nodes if node["Alive"]]
    for resource, (key, need) in needs.items():
        most = max((has.get(resource, 0.0) for has in owned), default=0.0)
        if need > most + _SLACK:
            raise InputError(
                f"resources.{key}: a trial asks for {need:g} {resource}, but no node of this Ray has more than "
                f"{most:g}; lower it, or run where there are enough"
            )
    wanted = [(resource, need) for resource, (_, need) in needs.items() if need > 0]
    fit = sum(min(int(has.get(resource, 0.0) / need + _SLACK) for resource, need in wanted) for has in owned)
    if fit == 0:
        raise InputError(
            f"resources: no node of this Ray has {spec.cpus_per_trial:g} CPU and {spec.gpus_per_trial:g} GPU together; "
            "lower cpus_per_trial or gpus_per_trial"
        )
    trials = fit // spec.workers_per_trial
    if trials == 0:
        raise InputError(
            f"resources.workers_per_trial: a trial asks for {spec.workers_per_trial} workers of "
            f"{spec.cpus_per_trial:g} CPU and {spec.gpus_per_trial:g} GPU each, but this Ray has room for {fit}; "
            "lower it, or run where there are enough"
        )
    return trials
