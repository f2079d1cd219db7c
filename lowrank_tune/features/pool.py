"""How many workers an extraction gets, and of what: read off the cluster."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import ray

from lowrank_tune.errors import InputError
from lowrank_tune.spec.features import FeaturesSpec, TensorSource

DECODE_CPUS = 0.5
"""What a decoding task reserves: it waits for storage about as long as it computes."""

LEAST_CPUS = 0.4
"""What an encoder reserves where there is no whole CPU for it.

Not as much as a decoding task, or Ray Data would fuse the two stages; and with it as many encoders as the cluster has
CPUs leave room for a decoding task on some machine, however they are placed.
"""

SHRINK_AFTER_S = 20.0
"""How long to wait for the whole of what would be had without other work: what ended just now is still giving it back.
"""

_LOOK_EVERY_S = 0.2

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster has, or has free."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Pool:
    """The resources of an extraction.

    Attributes:
        actors: encoders.
        gpus_each: GPUs an encoder; 0 where the cluster has none.
        cpus_each: CPUs an encoder reserves.
        threads: torch threads an encoder.
        batch: images an encoder takes at once; None for what fills its device.
        decoders: decoding tasks at once; None for as many as fit.
    """

    actors: int
    gpus_each: float
    cpus_each: float
    threads: int
    batch: int | None = None
    decoders: int | None = None


def find_pool(
    spec: FeaturesSpec, shards: int, note: Callable[[str], None], shrink_after_s: float = SHRINK_AFTER_S
) -> Pool:
    """Divide the Ray cluster that is connected, and wait until other work leaves the pool its room.

    Args:
        spec: `actors`, `batch_size` and `decoders`; `auto` actors become fewer where other work holds the rest.
        shards: how many shards there are to make.
        note: told, once, what is waited for.
        shrink_after_s: how long to wait for the whole pool before a smaller one will do.

    Raises:
        InputError: the cluster has not what the study file asks for.
    """
    nodes = [_node(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    if isinstance(spec.source, TensorSource):  # nothing is encoded, so GPUs do not matter
        nodes = [Node(node.cpus, 0) for node in nodes]
    pool = plan_pool(spec, shards, nodes)
    began, told = time.monotonic(), False
    while not _fits(pool, free := _node(ray.available_resources())):
        if time.monotonic() - began > shrink_after_s:
            smaller = shrink_pool(pool, free, fewer=spec.actors == "auto")
            if smaller is not None:
                _logger.warning("other work holds some of the Ray cluster; extracting with %s", smaller)
                return smaller
            if not told:
                note(f"waiting for other work to end: {_lack(pool, nodes, free, fewer=spec.actors == 'auto')}")
                told = True
        time.sleep(_LOOK_EVERY_S)
    return pool


def plan_pool(spec: FeaturesSpec, shards: int, nodes: Sequence[Node]) -> Pool:
    """Divide a cluster between encoders and decoding so that both always fit.

    Args:
        spec: `actors` is a number, or `auto` for one a GPU and, without GPUs, one a machine.
        shards: how many shards there are to make; more encoders than that are never started.
        nodes: the cluster's machines.

    Raises:
        InputError: the cluster has no CPU, or not what so many encoders need.
    """
    cpus, on_gpus = sum(int(node.cpus) for node in nodes), any(node.gpus >= 1 for node in nodes)
    if cpus < 1:
        raise InputError("the Ray cluster has no CPU to decode images with; start it with at least one (num_cpus)")
    most = _places(nodes, 1, on_gpus)
    wanted = spec.actors if spec.actors != "auto" else max(1, most if on_gpus else _large_machines(nodes))
    if wanted > most:
        need = "a GPU and a CPU of the same machine" if on_gpus else "a CPU"
        raise InputError(
            f"features.actors: {wanted} encoders need {need} each, the Ray cluster ({_shown(nodes)}) has room for "
            f"{most}; {f'ask for at most {most}, or auto' if most else 'start a machine that has both'}"
        )
    actors = min(shards, wanted)
    decoding = max(1, cpus // 4) if cpus > 1 else DECODE_CPUS
    ideal = min((cpus - decoding) / actors, 1 if on_gpus else max(node.cpus for node in nodes))
    cpus_each = next(each for each in _shares(ideal) if _places(nodes, each, on_gpus) >= actors)
    return Pool(
        actors=actors,
        gpus_each=1 if on_gpus else 0,
        cpus_each=cpus_each,
        threads=max(1, int(cpus_each)),
        batch=None if spec.batch_size == "auto" else spec.batch_size,
        decoders=None if spec.decoders == "auto" else spec.decoders,
    )


def shrink_pool(pool: Pool, free: Node, *, fewer: bool) -> Pool | None:
    """Make do with what other work leaves: encoders with fewer CPUs, and fewer encoders if that is allowed.

    Args:
        pool: what would be had without other work.
        free: what is free of all machines, together.
        fewer: whether there may be fewer encoders.

    Returns:
        None where it leaves too little.
    """
    for actors in range(pool.actors, 0 if fewer else pool.actors - 1, -1):
        for cpus_each in _shares(pool.cpus_each):
            smaller = replace(pool, actors=actors, cpus_each=cpus_each, threads=max(1, int(cpus_each)))
            if _fits(smaller, free):
                return smaller
    return None


def _lack(pool: Pool, nodes: Sequence[Node], free: Node, *, fewer: bool) -> str:
    encoders = 1 if fewer else pool.actors
    gpus = f"{encoders * pool.gpus_each:g} GPUs and " if pool.gpus_each else ""
    return (
        f"the extraction needs at least {gpus}{encoders * LEAST_CPUS + DECODE_CPUS:g} CPUs for {encoders} encoders and "
        f"a decoding task; the Ray cluster has {_shown(nodes)}, of which {_shown([free])} are free"
        f"{'' if fewer else '; a lower features.actors would need less'}"
    )


def _node(resources: Mapping[str, float]) -> Node:
    return Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def _fits(pool: Pool, free: Node) -> bool:
    cpus = pool.actors * pool.cpus_each + DECODE_CPUS
    return cpus <= free.cpus + 1e-4 and pool.actors * pool.gpus_each <= free.gpus + 1e-4


def _shares(most: float) -> Iterator[float]:
    """CPUs that an encoder may reserve, falling."""
    yield from range(int(most), 0, -1)
    yield LEAST_CPUS


def _places(nodes: Sequence[Node], cpus_each: float, on_gpus: bool) -> int:
    """How many encoders fit the cluster."""
    by_cpus = [int(int(node.cpus) / cpus_each) for node in nodes]
    return sum(min(place, int(node.gpus)) if on_gpus else place for place, node in zip(by_cpus, nodes, strict=True))


def _large_machines(nodes: Sequence[Node]) -> int:
    """How many machines have at least half of what the largest has: an encoder on each keeps them busy."""
    largest = max(node.cpus for node in nodes)
    return sum(node.cpus >= largest / 2 for node in nodes)


def _shown(nodes: Sequence[Node]) -> str:
    return f"{sum(node.cpus for node in nodes):g} CPUs, {sum(node.gpus for node in nodes):g} GPUs"
