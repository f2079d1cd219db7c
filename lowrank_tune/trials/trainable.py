"""What Tune runs: one actor that trains trial after trial, an epoch a step.

Ray pickles the class by its name, so a worker imports this module. torch, and all that needs it, is imported by the
first step: an actor is up seconds before it would be otherwise, and nothing of the driver's side is ever loaded.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections import defaultdict
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune import PlacementGroupFactory

from lowrank_tune.lowrank.distributed import World
from lowrank_tune.trials.outcomes import MaterialPaths
from lowrank_tune.trials.trial import TrialSession, is_out_of_memory, open_session


class TrialActor(tune.Trainable):
    """Trains the trial that its configuration describes, and the next one in the same process.

    The configuration holds numbers and paths only: `trial` (a TrialConfig), `material` (MaterialPaths), `trials_dir`,
    `cpus`, `gpus`, `workers` and, for a trial that goes on, `reported`: its last epoch that the study has heard of.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """What Ray reserves for a trial; several workers are reserved for by Ray Train, which starts them."""
        return _reserved(config["cpus"], config["gpus"], config["workers"])

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial."""
        self._crew: Any = None
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
        if self._crew is not None:
            self._crew.part()

    def _open(self) -> Any:
        given = self._settings
        if given["workers"] == 1:
            from lowrank_tune.trials.trial import open_session

            return open_session(given)

        if self._crew is None:
            records = Path(given["trials_dir"]).parent / "tune" / "workers"
            self._crew = Crew(given["workers"], given["cpus"], given["gpus"], records)
        return CrewSession(self._crew, given)


@lru_cache
def _reserved(cpus: float, gpus: float, workers: int) -> PlacementGroupFactory:
    """One for all trials of a study: Tune holds on to every trial's until the end."""
    # Tune asks for something; a byte is on every node, and takes no worker's place.
    return PlacementGroupFactory([{"CPU": cpus, "GPU": gpus} if workers == 1 else {"memory": 1}])


def actor_config(paths: MaterialPaths, trials_dir: Path, cpus: float, gpus: float, workers: int = 1) -> dict[str, Any]:
    """The part of an actor's configuration that all trials of a study share."""
    return {
        "material": asdict(paths),
        "trials_dir": str(trials_dir.absolute()),
        "cpus": cpus,
        "gpus": gpus,
        "workers": workers,
    }


_LOOK_S = 0.5
"""How often the actor looks whether its workers still live while it waits for an epoch."""
_PART_S = 20.0
"""How long workers may take to part."""
_POLL = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
"""How often Ray Train looks after the workers; by default it is every two seconds."""


class Exchange:
    """Where the trial's actor and its workers leave each other word: each by a name of its own, left once."""

    def __init__(self) -> None:
        self._words: defaultdict[tuple[str, int], asyncio.Future[Any]] = defaultdict(asyncio.Future)

    async def leave(self, name: tuple[str, int], word: Any) -> None:
        """Leave word for whoever waits for it, or will."""
        self._words[name].set_result(word)

    async def fetch(self, name: tuple[str, int]) -> Any:
        """Wait for it."""
        return await asyncio.shield(self._words[name])


class Crew:
    """The workers of an actor's trials, from its first trial to its end.

    Args:
        workers: how many.
        cpus: cores of each.
        gpus: GPUs of each, whole ones; with none they exchange over Gloo.
        directory: where Ray Train may keep its records; every node sees it.
    """

    def __init__(self, workers: int, cpus: float, gpus: float, directory: Path) -> None:
        os.environ.setdefault(*_POLL)
        self._exchange = ray.remote(num_cpus=0)(Exchange).remote()
        self._trainer = TorchTrainer(
            train_as_ordered,
            train_loop_config={"exchange": self._exchange},
            # What lies on a CPU, an error's few bytes among it, must not wait for a GPU.
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=gpus > 0, resources_per_worker={"CPU": cpus, "GPU": gpus}
            ),
            run_config=RunConfig(name=f"crew-{ray.get_runtime_context().get_actor_id()}", storage_path=str(directory)),
        )
        self._error: Exception | None = None
        self._number = itertools.count()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ask(self, what: str, settings: dict[str, Any]) -> Any:
        """Let every worker do something for the trial of these settings, and return what the first of them has to say.

        Args:
            what: a method of TrialSession.
            settings: of the trial's actor.

        Raises:
            RuntimeError: a worker has died or given up; the others have been ended.
        """
        number = next(self._number)
        self._exchange.leave.remote(("order", number), (what, settings))
        answer = self._exchange.fetch.remote(("answer", number))
        while not ray.wait([answer], timeout=_LOOK_S)[0]:
            if not self.alive:
                raise RuntimeError(_said(self._error)) from self._error
        return ray.get(answer)

    @property
    def alive(self) -> bool:
        """Whether its workers train, or are on their way."""
        return self._thread.is_alive()

    def part(self) -> None:
        """End the workers, and wait for them to be gone."""
        self._exchange.leave.remote(("order", next(self._number)), None)
        self._thread.join(_PART_S)

    def _run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            self._error = error


class CrewSession:
    """A TrialSession whose training is a crew's.

    Args:
        crew: trains it.
        settings: of the trial's actor.
    """

    def __init__(self, crew: Crew, settings: dict[str, Any]) -> None:
        self._crew = crew
        self._settings = settings

    def epoch(self) -> dict[str, Any]:
        """As `TrialSession.epoch`."""
        row: dict[str, Any] = self._crew.ask("epoch", self._settings)
        return row

    def keep(self) -> None:
        """As `TrialSession.keep`; workers that have died keep nothing."""
        if self._crew.alive:
            self._crew.ask("keep", self._settings)


def train_as_ordered(config: dict[str, Any]) -> None:
    """Do what the trial's actor asks for, until it asks for nothing more; every worker runs this.

    Args:
        config: `exchange`, the handle of an Exchange.
    """
    exchange, world = config["exchange"], World.here()
    session: TrialSession | None = None
    given: dict[str, Any] = {}
    for number in itertools.count():
        order = ray.get(exchange.fetch.remote(("order", number)))
        if order is None:
            return
        what, settings = order
        if session is None or settings != given:
            given, session = settings, None  # what the last trial held goes before the next one begins
            session = open_session(settings, world)
        answer = getattr(session, what)()
        if world.first:
            ray.get(exchange.leave.remote(("answer", number), answer))


def _said(error: Exception | None) -> str:
    """Why a crew has ended, on one line: the first cause, not that the others then lost a worker."""
    if not isinstance(error, WorkerGroupError):
        return f"its workers did not start: {error}" if error else "its workers have ended"
    causes = {rank: _cause(failure) for rank, failure in sorted(error.worker_failures.items())}
    first = next((rank for rank, cause in causes.items() if not isinstance(cause, ConnectionError)), min(causes))
    cause = causes[first]
    if isinstance(cause, OutOfMemoryError) or (isinstance(cause, Exception) and is_out_of_memory(cause)):
        what = "out of memory"
    else:
        what = "actor died" if isinstance(cause, RayActorError) else type(cause).__name__
    # Ray says all that it knows of a node's memory after the first line.
    return f"worker {first + 1}: {what}: {next(iter(str(cause).strip().splitlines()), '')}"


def _cause(failure: BaseException) -> BaseException:
    """What Ray Train has wrapped."""
    inner = getattr(failure, "health_check_failure", None) or getattr(failure, "_base_exc", None)
    return failure if inner is None else _cause(inner)
