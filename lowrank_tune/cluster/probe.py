"""Looks, from every node of a Ray cluster, whether a study's results directory is the same and writable everywhere."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lowrank_tune.errors import InputError

_PATIENCE_S = 60.0
_DRIVERS = "driver"


def check_shared(results: Path) -> int:
    """Check that every node sees what the driver writes, and the driver what every node writes.

    A cluster of one node needs no look. Ray is initialised by the caller.

    Args:
        results: the results directory; writable here.

    Returns:
        How many nodes there are.

    Raises:
        InputError: a node does not share it, cannot write to it, or does not answer.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) < 2:
        return len(nodes)
    folder = results / f".probe-{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        (folder / _DRIVERS).touch()
        # Several nodes may have one address.
        found = [(nodes[node], finding) for node, finding in _look_from(nodes, folder).items()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    problems = [f"node {address} {finding}" for address, finding in sorted(found) if finding]
    if problems:
        raise InputError(
            f"results directory {results}: {'; '.join(problems)}; every node must have it at this path: mount a shared "
            "file system there, or pass --results DIR"
        )
    return len(nodes)


def _look_from(nodes: dict[str, str], folder: Path) -> dict[str, str]:
    """By node, what is wrong there; empty where nothing is."""
    remote_look = ray.remote(look)
    tasks = {
        remote_look.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(str(folder), node): node
        for node in nodes
    }
    ready, silent = ray.wait(list(tasks), num_returns=len(tasks), timeout=_PATIENCE_S)
    found = {tasks[task]: f"did not answer in {_PATIENCE_S:.0f} s" for task in silent}
    for task in ready:
        found[tasks[task]] = _result(task) or ("" if (folder / tasks[task]).exists() else "writes to another place")
    return found


def _result(task: Any) -> str:
    try:
        return str(ray.get(task))
    except ray.exceptions.RayError as error:
        return f"could not look ({str(error).splitlines()[0]})"


def look(folder: str, node: str) -> str:
    """Look from a node: read what the driver wrote, and write a file named like the node.

    Returns:
        What is wrong, as the end of a sentence; empty when nothing is.
    """
    if not os.path.exists(os.path.join(folder, _DRIVERS)):
        return "does not see what the driver wrote there"
    try:
        Path(folder, node).touch()
    except OSError as error:
        return f"cannot write to it ({error.strerror})"
    return ""
