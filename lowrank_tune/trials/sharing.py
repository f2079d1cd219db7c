"""How the studies that work on one Ray cluster at a time divide it among them.

Ray gives a place to whoever asks first, and an actor that goes from trial to trial never gives it back: the first
study would keep the whole cluster until its last trials. So each study counts the others, and begins no trial beyond
its part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray
from ray.util import placement_group, placement_group_table, remove_placement_group

from lowrank_tune.errors import InputError
from lowrank_tune.spec.schema import ResourcesSpec
from lowrank_tune.trials.resources import trials_that_fit

_NAME = "lowrank-tune study "
_LOOK_EVERY_S = 2.0


@contextmanager
def taking_part(study_id: str) -> Iterator[None]:
    """Let the other studies of this cluster know of this one until the block ends, or this driver does.

    Args:
        study_id: the study; Ray is initialised by the caller.
    """
    # Of what it reserves, one byte, only the name is wanted. Ray removes it with the driver that made it.
    sign = placement_group([{"memory": 1}], name=f"{_NAME}{study_id}")
    try:
        yield
    finally:
        remove_placement_group(sign)


def studies_at_work() -> int:
    """How many studies of this cluster extract features or train now."""
    groups = placement_group_table().values()
    return sum(group["name"].startswith(_NAME) and group["state"] != "REMOVED" for group in groups)


def fair_part(resources: ResourcesSpec) -> int:
    """A study's part of as many trials as fit, whatever others leave unused; at least one.

    Args:
        resources: what a trial needs.

    Raises:
        InputError: none fits.
    """
    return math.ceil(trials_that_fit(resources, ray.nodes()) / max(1, studies_at_work()))


class FairShare:
    """How many trials a study may have at work while it runs: its part, or fewer where the study file says so.

    Args:
        resources: what a trial needs.
    """

    def __init__(self, resources: ResourcesSpec) -> None:
        self._resources = resources
        self._share, self._looked_at = 1, -math.inf

    def __call__(self) -> int:
        """At least one; looked up at most every two seconds."""
        now = time.monotonic()
        if now - self._looked_at > _LOOK_EVERY_S:
            self._looked_at = now
            # While a node is lost, nothing may fit; what fitted before is the best guess.
            with suppress(InputError):
                part = fair_part(self._resources)
                self._share = min(part, self._resources.max_concurrent or part)
        return self._share
