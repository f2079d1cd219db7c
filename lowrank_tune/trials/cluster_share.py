"""How many of a study's trials fit a Ray cluster, and how many of them while other studies work there."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.util import placement_group, placement_group_table, remove_placement_group

from lowrank_tune.config.schema import ResourcesSpec
from lowrank_tune.errors import InputError

_SLACK = 1e-9  # 4 trials of 0.25 GPUs fit on one, whatever floating point says


def trials_at_once(spec: ResourcesSpec, nodes: Iterable[Mapping[str, Any]]) -> int:
    """As many as fit, or fewer where the study file says so."""
    fit = trials_that_fit(spec, nodes)
    return min(fit, spec.max_concurrent or fit)


def trials_that_fit(spec: ResourcesSpec, nodes: Iterable[Mapping[str, Any]]) -> int:
    """How many trials the nodes, as of `ray.nodes()`, have room for; each worker must fit on one.

    Raises:
        InputError: no node can hold a trial's worker, or all together not all of its workers.
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


_NAME = "lowrank-tune study "
_LOOK_EVERY_S = 2.0


@contextmanager
def taking_part(study_id: str) -> Iterator[None]:
    """Let the other studies of this cluster know of this one until the block ends, or this driver does."""
    # Of what it reserves, one byte, only the name is wanted. Ray removes it with the driver that made it.
    sign = placement_group([{"memory": 1}], name=f"{_NAME}{study_id}")
    try:
        yield
    finally:
        remove_placement_group(sign)


def studies_at_work() -> int:
    groups = placement_group_table().values()
    return sum(group["name"].startswith(_NAME) and group["state"] != "REMOVED" for group in groups)


def fair_part(resources: ResourcesSpec) -> int:
    """A study's part of as many trials as fit, at least one, whatever others leave unused; InputError for none."""
    return math.ceil(trials_that_fit(resources, ray.nodes()) / max(1, studies_at_work()))


class FairShare:
    """How many trials a study may have at work while it runs; looked up at most every two seconds."""

    def __init__(self, resources: ResourcesSpec) -> None:
        self._resources = resources
        self._share, self._looked_at = 1, -math.inf

    def __call__(self) -> int:
        now = time.monotonic()
        if now - self._looked_at > _LOOK_EVERY_S:
            self._looked_at = now
            # While a node is lost, nothing may fit; what fitted before is the best guess.
            with suppress(InputError):
                part = fair_part(self._resources)
                self._share = min(part, self._resources.max_concurrent or part)
        return self._share
