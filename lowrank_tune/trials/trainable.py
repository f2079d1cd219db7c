"""What Tune runs: one actor that trains trial after trial, an epoch a step, alone or at the head of several workers.

A worker imports this module; torch is imported by the first step, so that an actor is up seconds earlier.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import ray
from ray import tune
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.tune import PlacementGroupFactory


class TrialActor(tune.Trainable):
    """Trains the trial that its configuration describes, and the next one in the same process.

    The configuration holds numbers and paths only: `trial` (a TrialConfig), `study_dir` (where `write_inputs` wrote),
    `cpus`, `gpus`, `workers` and, for a trial that goes on, `reported`: its last epoch that the study has heard of.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """What Ray reserves for a trial; this actor itself needs nothing beside its workers."""
        return _reserved(config["cpus"], config["gpus"], config["workers"])

    def setup(self, config: dict[str, Any]) -> None:
        self._workers: WorkerGroup | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial; the features stay mapped."""
        # The session is made by the first step: an actor that raises here is lost, one that raises there tells why.
        self._session: Any = None
        self._settings = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch; a failure that no other actor would be spared is told, not raised, so this one lives on."""
        if self._session is None:
            self._session = self._open()
        result = self._session.epoch()
        return {**result, "done": bool(result["stopped_by"])}

    def cleanup(self) -> None:
        """Keep what a study that is stopped has trained."""
        if self._session is not None:
            self._session.keep()

    def _open(self) -> Any:
        from lowrank_tune.trials.trial import TrialSession

        if self._settings["workers"] == 1:
            return TrialSession(self._settings)
        self._workers = self._workers or WorkerGroup(self._settings)
        self._workers.ask("open", self._settings)
        return self._workers


@lru_cache
def _reserved(cpus: float, gpus: float, workers: int) -> PlacementGroupFactory:
    """One for all trials of a study: Tune holds on to every trial's until the end."""
    worker = {"CPU": cpus, "GPU": gpus}
    # Beside its workers an actor asks for a byte, as Tune wants it to ask for something.
    return PlacementGroupFactory([worker] if workers == 1 else [{"memory": 1}, *[worker] * workers])


_OTHERS_S = 20.0
"""How long to wait for the error that made a worker lose the others."""


class WorkerGroup:
    """The workers of an actor's trials, in the places that Tune has reserved; to the actor, its session.

    Raises:
        RuntimeError: a worker has died or raised; all have been ended.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

        # It brings the workers together, and outlives them.
        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        size = settings["workers"]
        make = ray.remote(num_cpus=settings["cpus"], num_gpus=settings["gpus"])(TrialWorker)
        self._workers = [make.remote(rank, size, host, self._store.port) for rank in range(size)]

    def epoch(self) -> Any:
        return self.ask("epoch")

    def keep(self) -> None:
        """Write a checkpoint; workers that have died keep nothing."""
        if self._workers:
            self.ask("keep")

    def ask(self, what: str, *arguments: Any) -> Any:
        """Let every worker do something, and return what the first of them has to say."""
        answers = [getattr(worker, what).remote(*arguments) for worker in self._workers]
        waiting = answers
        errors: dict[int, Exception] = {}
        while waiting:
            done, waiting = ray.wait(waiting, timeout=_OTHERS_S if errors else None)
            for answer in done:
                try:
                    ray.get(answer)
                except RayError as error:
                    errors[answers.index(answer)] = error
            if errors and (not done or not all(isinstance(error, ConnectionError) for error in errors.values())):
                break
        if not errors:
            return ray.get(answers[0])
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []
        raise RuntimeError(_first_cause(errors)) from next(iter(errors.values()))


class TrialWorker:
    """One of the processes that train a trial together: number `rank` of `size`, which meet at the group's store."""

    def __init__(self, rank: int, size: int, host: str, port: int) -> None:
        import torch
        from torch.distributed import TCPStore, init_process_group  # type: ignore[attr-defined]

        # What lies on a CPU, an error's few bytes among it, must not wait for a GPU.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        init_process_group(backend, store=TCPStore(host, port), rank=rank, world_size=size)
        self._session: Any = None

    def open(self, settings: dict[str, Any]) -> None:
        from lowrank_tune.lowrank.distributed import World
        from lowrank_tune.trials.trial import TrialSession

        self._session = None  # what the last trial held goes before the next one begins
        self._session = TrialSession(settings, World.here())

    def epoch(self) -> Any:
        return self._session.epoch()

    def keep(self) -> None:
        self._session.keep()


def _first_cause(errors: dict[int, Exception]) -> str:
    """Why a group of workers has ended: the first cause, not that the others then lost a worker."""
    from lowrank_tune.lowrank.device import is_out_of_memory

    rank = next((rank for rank, error in sorted(errors.items()) if not isinstance(error, ConnectionError)), min(errors))
    error = errors[rank]
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, OutOfMemoryError) or is_out_of_memory(cause):
        what = "out of memory"
    else:
        what = "actor died" if isinstance(cause, RayActorError) else type(cause).__name__
    # Ray says all that it knows of a node's memory after the first line.
    return f"worker {rank + 1}: {what}: {next(iter(str(cause).strip().splitlines()), '')}"
