"""What Tune runs: one actor that trains trial after trial, an epoch a step.

Ray pickles the class by its name, so a worker imports this module. torch, and all that needs it, is imported by the
first step: an actor is up seconds before it would be otherwise, and nothing of the driver's side is ever loaded.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import PlacementGroupFactory

from lowrank_tune.records import TrialConfig
from lowrank_tune.trials.paths import MaterialPaths


class TrialActor(tune.Trainable):
    """Trains the trial that its configuration describes, and the next one in the same process.

    The configuration holds numbers and paths only: `trial` (a TrialConfig), `material` (MaterialPaths), `trials_dir`,
    `cpus`, `gpus` and, for a trial that goes on, `reported`: its last epoch that the study has heard of.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """What Ray reserves for a trial."""
        return _reserved(config["cpus"], config["gpus"])

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial."""
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
            from lowrank_tune.trials.session import TrialSession

            given = self._settings
            config = TrialConfig(**given["trial"])
            directory = Path(given["trials_dir"]) / config.trial_id
            paths = MaterialPaths(**given["material"])
            reported = given.get("reported", 0)
            self._session = TrialSession(config, paths, directory, given["cpus"], given["gpus"], reported)
        result = self._session.epoch()
        return {**result, "done": bool(result["stopped_by"])}

    def cleanup(self) -> None:
        """Keep what a study that is stopped has trained."""
        if self._session is not None:
            self._session.keep()


@lru_cache
def _reserved(cpus: float, gpus: float) -> PlacementGroupFactory:
    """One for all trials of a study: Tune holds on to every trial's until the end."""
    return PlacementGroupFactory([{"CPU": cpus, "GPU": gpus}])


def actor_config(paths: MaterialPaths, trials_dir: Path, cpus: float, gpus: float) -> dict[str, Any]:
    """The part of an actor's configuration that all trials of a study share."""
    return {"material": asdict(paths), "trials_dir": str(trials_dir.absolute()), "cpus": cpus, "gpus": gpus}
