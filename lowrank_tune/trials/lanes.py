"""Trials that share a process and its device; what trains them trains those of one shape as one.

A lane is an actor with what the study file gives one trial. Tune's actors of its members only pass on what it says, so
that scheduler, searcher, retries and trackers see trials as they see them without lanes. A round of a lane is an epoch
of one shape's members: it begins when all of them have asked for their next, or when those that did have waited for so
long that training them without the others is the quicker way.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.tune import PlacementGroupFactory

from lowrank_tune.config.schema import ResourcesSpec
from lowrank_tune.records import TrialConfig
from lowrank_tune.trials.lane_plan import NEVER_ON_CPU, LanePlan
from lowrank_tune.trials.trainable import TrialActor

logger = logging.getLogger(__name__)

_WAIT_S = 0.25
"""How long a round waits for members that have not asked, at least; and no less than half of what the last one took."""
_PLACE_S = 60.0
"""How long a lane may wait for its place before the study does without it."""
_CAUTION = 4
"""What the members of a lane whose process died are divided by: it may have been memory."""


@dataclass(slots=True)
class _Member:
    """A trial in a lane."""

    visit: str
    shape: tuple[Any, ...]
    fuses: bool
    session: Any
    late: bool = False


class Lane:
    """Trains the trials that ask for an epoch, those of one shape as one; an actor.

    Args:
        members: trials as one, at most.
        always: whether trials are fused that are not known to gain by it.
    """

    def __init__(self, members: int, always: bool) -> None:
        # Ray's own word for an actor whose process has died before.
        again = ray.get_runtime_context().was_current_actor_reconstructed
        self._limit = max(1, members // _CAUTION) if again else members
        self._always = always
        self._fusion: Any = None
        self._members: dict[str, _Member] = {}
        self._asked: dict[str, tuple[float, asyncio.Future[Any]]] = {}
        self._took: dict[tuple[Any, ...], float] = {}
        self._wake = asyncio.Event()
        # One thread trains, reads and writes; the loop's own only listens.
        self._thread = ThreadPoolExecutor(1)
        self._rounds: asyncio.Task[None] | None = None

    async def epoch(self, settings: dict[str, Any], visit: str) -> dict[str, Any]:
        """Train the next epoch of a trial.

        Args:
            settings: as `TrialActor` is given them, with the last epoch that the study has heard of.
            visit: which of the trial's actors asks; an earlier one's trial goes on from its checkpoint.
        """
        trial_id = settings["trial"]["trial_id"]
        if trial_id not in self._members or self._members[trial_id].visit != visit:
            await self.leave(trial_id, "", keep=True)
            self._members[trial_id] = await self._in_thread(self._enter, settings, visit)
        loop = asyncio.get_running_loop()
        self._rounds = self._rounds or loop.create_task(self._train())
        future = loop.create_future()
        self._asked[trial_id] = (time.monotonic(), future)
        self._members[trial_id].late = False
        self._wake.set()
        told = await future
        if isinstance(told, Exception):
            raise told
        return dict(told)

    async def ready(self) -> None:
        """Answer: the lane has got its place."""

    async def leave(self, trial_id: str, visit: str, keep: bool) -> None:
        """Let a trial go; the others do not wait for it any more.

        Args:
            trial_id: which.
            visit: of the actor that says so; any of them when empty.
            keep: whether to write a checkpoint of what it has trained.
        """
        member = self._members.get(trial_id)
        if member is None or visit not in ("", member.visit):
            return
        del self._members[trial_id]
        self._asked.pop(trial_id, None)
        self._wake.set()
        if keep:
            await self._in_thread(member.session.keep)

    async def _train(self) -> None:
        while True:
            chosen = self._next_round()
            if not chosen:
                self._wake.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._patience())
                continue
            members = [self._members[trial_id] for trial_id in chosen]
            futures = [self._asked.pop(trial_id)[1] for trial_id in chosen]
            started = time.monotonic()
            try:
                told = await self._in_thread(self._epoch, members)
            except Exception as error:
                told = [error] * len(chosen)
            self._took[members[0].shape] = time.monotonic() - started
            for trial_id, future, what in zip(chosen, futures, told, strict=True):
                if isinstance(what, dict) and what["stopped_by"]:
                    self._members.pop(trial_id, None)
                if not future.done():
                    future.set_result(what)

    def _next_round(self) -> list[str]:
        """Whom to train next: a shape whose members have all asked, else one that has waited for long enough."""
        shapes: dict[tuple[Any, ...], list[str]] = {}
        for trial_id in self._asked:
            shapes.setdefault(self._members[trial_id].shape, []).append(trial_id)
        now = time.monotonic()
        for shape, asked in shapes.items():
            if not self._missing(shape):
                return asked
        for shape, asked in shapes.items():
            if now >= self._until(shape, asked):
                for member in self._missing(shape):
                    member.late = True
                return asked
        return []

    def _missing(self, shape: tuple[Any, ...]) -> list[_Member]:
        """Those that a shape's round waits for."""
        return [
            member
            for trial_id, member in self._members.items()
            if member.shape == shape and member.fuses and not member.late and trial_id not in self._asked
        ]

    def _until(self, shape: tuple[Any, ...], asked: Sequence[str]) -> float:
        return min(self._asked[trial_id][0] for trial_id in asked) + max(_WAIT_S, self._took.get(shape, 0.0) / 2)

    def _patience(self) -> float | None:
        """Seconds until a round begins though nobody else asks; None when nobody has."""
        until = [self._until(self._members[trial_id].shape, [trial_id]) for trial_id in self._asked]
        return max(0.0, min(until) - time.monotonic()) if until else None

    async def _in_thread(self, work: Any, *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *given)

    def _enter(self, settings: dict[str, Any], visit: str) -> _Member:
        # Here, in the thread: torch takes seconds to import, and sets its number of threads for the thread that asks.
        from lowrank_tune.lowrank.fused import fusion_key
        from lowrank_tune.trials.fusion import Fusion
        from lowrank_tune.trials.trial import open_session

        self._fusion = self._fusion or Fusion(self._limit)
        config = TrialConfig(**settings["trial"])
        fuses = self._always or bool(settings["gpus"]) or config.family not in NEVER_ON_CPU
        shape = fusion_key(config) if fuses else (config.trial_id,)
        return _Member(visit, shape, fuses, open_session(settings))

    def _epoch(self, members: Sequence[_Member]) -> Any:
        import torch

        try:
            return self._fusion.epoch([member.session for member in members])
        except torch.AcceleratorError:
            # No later call of this process would find the device again; Ray starts another one.
            logger.exception("the lane has lost its device")
            os._exit(1)


class LaneTrialActor(TrialActor):
    """Asks a lane for every epoch of its trial.

    The configuration holds, beside a `TrialActor`'s, `lanes`, their names, and `share`, the CPUs reserved here.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """What Ray reserves for a trial beside its lane."""
        return PlacementGroupFactory([{"CPU": config["share"]}])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        seat = getattr(self, "_session", None)
        if seat is not None:
            seat.leave()
        return super().reset_config(new_config)

    def _open(self) -> Any:
        return _Seat(self._settings)


class _Seat:
    """A trial's place in a lane, for the actor that Tune knows; in place of a `TrialSession`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._trial_id = settings["trial"]["trial_id"]
        lanes = settings["lanes"]
        # By number: repetitions of one configuration, which have one number, meet in one lane.
        self._lane = ray.get_actor(lanes[settings["trial"]["number"] % len(lanes)])
        self._visit = uuid.uuid4().hex

    def epoch(self) -> dict[str, Any]:
        told: dict[str, Any] = ray.get(self._lane.epoch.remote(self._settings, self._visit))
        # Should the lane die, its successor tells nothing twice.
        self._settings = {**self._settings, "reported": max(self._settings.get("reported", 0), int(told["epoch"]))}
        return told

    def keep(self) -> None:
        try:
            ray.get(self._lane.leave.remote(self._trial_id, self._visit, keep=True))
        except RayActorError:
            logger.warning("trial %s: its lane is gone", self._trial_id)

    def leave(self) -> None:
        self._lane.leave.remote(self._trial_id, self._visit, keep=False)


@contextmanager
def open_lanes(resources: ResourcesSpec, planned: LanePlan, study_id: str) -> Iterator[list[str]]:
    """Start a study's lanes, and end them with the block; a lane whose process dies is started again.

    Yields:
        The names of those that got a place in time, one at least: the trials of another one would wait for ever.
    """
    # Restarted as often as need be: its members' retries end at some time.
    options = {
        "num_cpus": planned.cpus,
        "num_gpus": resources.gpus_per_trial,
        "max_restarts": -1,
        "max_concurrency": 1000,
    }
    names = [f"{study_id}-lane-{number}-{uuid.uuid4().hex[:8]}" for number in range(planned.lanes)]
    actor, always = ray.remote(Lane), resources.fuse == "always"
    lanes = {name: actor.options(name=name, **options).remote(planned.members, always) for name in names}
    try:
        answers = {lane.ready.remote(): name for name, lane in lanes.items()}
        placed, _ = ray.wait(list(answers), num_returns=len(answers), timeout=_PLACE_S)
        placed = placed or ray.wait(list(answers), num_returns=1)[0]
        found = {answers[answer] for answer in placed}
        for name in set(names) - found:
            ray.kill(lanes.pop(name))
        yield [name for name in names if name in found]
    finally:
        for lane in lanes.values():
            ray.kill(lane)
