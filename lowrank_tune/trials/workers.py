"""Workers that train one trial data-parallel: Ray Train starts and watches them, the trial's actor directs them.

Ray Train would report epochs once in a poll of its controller, and a worker would train on before the scheduler has
judged. So the actor and its workers leave each other word by way of a small actor: an epoch is trained when it is asked
for, and the workers stay for the next trial, their features mapped.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from lowrank_tune.lowrank.team import Team
from lowrank_tune.trials.session import TrialSession, is_out_of_memory, open_session

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
    exchange, team = config["exchange"], Team.here()
    session: TrialSession | None = None
    given: dict[str, Any] = {}
    for number in itertools.count():
        order = ray.get(exchange.fetch.remote(("order", number)))
        if order is None:
            return
        what, settings = order
        if session is None or settings != given:
            given, session = settings, None  # what the last trial held goes before the next one begins
            session = open_session(settings, team)
        answer = getattr(session, what)()
        if team.first:
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
