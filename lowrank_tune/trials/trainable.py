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

from lowrank_tune.trials.paths import MaterialPaths


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
            from lowrank_tune.trials.session import open_session

            return open_session(given)
        from lowrank_tune.trials.workers import Crew, CrewSession

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
