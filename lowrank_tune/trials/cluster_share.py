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


def trials_at_once(spec: ResourcesSpec, nodes: Iterable[Mapping[str, Any]], studies: int = 1) -> int:
    """How many trials a study has at work on the nodes, as of `ray.nodes()`: its part, at least one, of those that fit.

    Raises:
        InputError: no node can hold a trial's worker, or all together not all of its workers.
    """
    needs = {"CPU": spec.cpus_per_trial, "GPU": spec.gpus_per_trial}
    owned = [node["Resources"] for node in nodes if node["Alive"]]
    fit = sum(min(int(has.get(name, 0) / need + _SLACK) for name, need in needs.items() if need) for has in owned)
    if fit < spec.workers_per_trial:
        most = {name: max((has.get(name, 0) for has in owned), default=0) for name in needs}
        raise InputError(
            f"resources.cpus_per_trial, gpus_per_trial, workers_per_trial: a trial asks for {spec.workers_per_trial} x "
            f"({needs['CPU']:g} CPU and {needs['GPU']:g} GPU of one node), and this Ray has room for {fit}: its nodes "
            f"have at most {most['CPU']:g} CPU and {most['GPU']:g} GPU; lower them, or run where there is more"
        )
    part = math.ceil(fit // spec.workers_per_trial / max(1, studies))
    return min(part, spec.max_concurrent or part)


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
                self._share = trials_at_once(self._resources, ray.nodes(), studies_at_work())
        return self._share
