"""What Tune runs: one actor that trains trial after trial, an epoch a step.

Ray pickles the class by its name, so a worker imports this module. torch, and all that needs it, is imported by the
first step: an actor is up seconds before it would be otherwise, and nothing of the driver's side is ever loaded.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import PlacementGroupFactory

from lowrank_tune.records import TrialConfig
from lowrank_tune.trials.paths import CHECKPOINT, MaterialPaths

KEEP_EVERY_S = 1.0
"""Seconds of training between two checkpoints, at least; what a kill may cost, beside the epoch at work."""
KEEP_COST = 20.0
"""Training between two checkpoints, in times of what writing one takes, at least: 5 % of a trial's time goes there."""


class TrialActor(tune.Trainable):
    """Trains the trial that its configuration describes, and the next one in the same process.

    The configuration holds numbers and paths only: `trial` (a TrialConfig), `material` (MaterialPaths), `trials_dir`,
    `cpus` and `gpus`. A trial whose folder holds a checkpoint goes on from there: after a stop, a kill or a lost node.
    The epochs in it that the driver never heard of, those after `reported`, are reported first.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """What Ray reserves for a trial."""
        return PlacementGroupFactory([{"CPU": config["cpus"], "GPU": config["gpus"]}])

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial."""
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial; the features stay mapped."""
        # The trainer is made by the first step: an actor that raises here is lost, one that raises there tells why.
        self._trainer: Any = None
        self._settings = new_config
        self._directory = Path(new_config["trials_dir"]) / new_config["trial"]["trial_id"]
        self._unkept_s = self._keeping_s = 0.0
        self._unreported: list[dict[str, Any]] = []
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch; a failure that the trainer foresees is told, not raised, so that the actor lives on."""
        from lowrank_tune.trials.session import train_epoch

        trainer = self._open()
        if self._unreported:
            return {**self._unreported.pop(0), "stopped_by": "", "reason": "", "done": False}
        result = train_epoch(trainer, self._directory)
        self._unkept_s += result["seconds"]
        if not result["stopped_by"] and self._unkept_s >= max(KEEP_EVERY_S, KEEP_COST * self._keeping_s):
            self._keep()
        return {**result, "done": bool(result["stopped_by"])}

    def cleanup(self) -> None:
        """Keep what a study that is stopped has trained."""
        if self._unkept_s and self._trainer.stopped_by is None:
            self._keep()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write all that training needs to go on."""
        from lowrank_tune.trials.checkpoint import write_checkpoint

        write_checkpoint(Path(checkpoint_dir) / CHECKPOINT, self._open().state())

    def load_checkpoint(self, checkpoint: str) -> None:
        """Go on where `save_checkpoint` left off."""
        from lowrank_tune.trials.checkpoint import read_checkpoint

        self._open().restore(read_checkpoint(Path(checkpoint) / CHECKPOINT))

    def _keep(self) -> None:
        started = time.perf_counter()
        self.save_checkpoint(str(self._directory))
        self._unkept_s, self._keeping_s = 0.0, time.perf_counter() - started

    def _open(self) -> Any:
        if self._trainer is None:
            from lowrank_tune.trials.session import open_trainer

            given = self._settings
            config, paths = TrialConfig(**given["trial"]), MaterialPaths(**given["material"])
            self._trainer = open_trainer(config, paths, given["cpus"], given["gpus"])
            if (self._directory / CHECKPOINT).exists():
                self.load_checkpoint(str(self._directory))
                reported = given.get("reported", self._trainer.epoch)
                self._unreported = [dict(row) for row in self._trainer.history if row["epoch"] > reported]
        return self._trainer


def actor_config(paths: MaterialPaths, trials_dir: Path, cpus: float, gpus: float) -> dict[str, Any]:
    """The part of an actor's configuration that all trials of a study share."""
    return {"material": asdict(paths), "trials_dir": str(trials_dir.absolute()), "cpus": cpus, "gpus": gpus}
