"""How many workers an extraction gets, and of what: read off the cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lowrank_tune.errors import InputError

DECODE_CPUS = 0.5
"""What a decoding task reserves: it waits for storage about as long as it computes.

Ray Data fuses a task stage into the actor stage behind it when both reserve the same. An encoder reserves half a CPU
only on clusters so small that decoding inside it does no harm.
"""


@dataclass(frozen=True)
class Pool:
    """The resources of an extraction.

    Attributes:
        actors: encoders.
        gpus_each: GPUs an encoder; 0 where the cluster has none.
        cpus_each: CPUs an encoder reserves.
        threads: torch threads an encoder.
    """

    actors: int
    gpus_each: float
    cpus_each: float
    threads: int


def plan_pool(
    wanted: int | Literal["auto"], shards: int, resources: Mapping[str, float], largest_node_cpus: float
) -> Pool:
    """Divide a cluster between encoders and decoding so that both always fit.

    Args:
        wanted: encoders; `auto` takes one a GPU, or one where there is no GPU.
        shards: how many shards there are to make; more encoders than that are never started.
        resources: `ray.cluster_resources()`.
        largest_node_cpus: CPUs of the largest node; no encoder can reserve more.

    Raises:
        InputError: the cluster has no CPU, or fewer than the encoders asked for need.
    """
    cpus, gpus = resources.get("CPU", 0), int(resources.get("GPU", 0))
    if cpus < 1:
        raise InputError("the Ray cluster has no CPU to decode images with; start it with at least one (num_cpus)")
    actors = min(shards, max(1, gpus) if wanted == "auto" else wanted)
    if actors > cpus:
        raise InputError(
            f"features.actors: {actors} encoders need a CPU each, the Ray cluster has {cpus:g}; ask for fewer"
        )
    decoding = max(1, cpus // 4) if cpus > 1 else DECODE_CPUS
    cpus_each = min((cpus - decoding) / actors, largest_node_cpus, 1 if gpus else largest_node_cpus)
    cpus_each = float(int(cpus_each)) if cpus_each >= 1 else math.floor(cpus_each * 100) / 100
    return Pool(
        actors=actors,
        # A share that does not divide one GPU evenly might never be scheduled.
        gpus_each=1 / math.ceil(actors / gpus) if gpus else 0,
        cpus_each=cpus_each,
        threads=max(1, int(cpus_each)),
    )
