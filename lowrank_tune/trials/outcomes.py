"""How a trial ended, read off its last epoch: the one place where the searcher, the tracker and the report agree."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from lowrank_tune.errors import InputError
from lowrank_tune.files import read_json, write_json
from lowrank_tune.records import FeatureSet, Split, StoppedBy, TrialConfig, TrialOutcome, TrialStatus

logger = logging.getLogger(__name__)

OBJECTIVES: dict[str, Literal["minimize", "maximize"]] = {
    "val_residual_ratio": "minimize",
    "val_mse": "minimize",
    "val_token_cosine": "maximize",
}
"""What a study file may name as its `objective`, and which way is better: the figures of a trial's best epoch."""
_STATUS: dict[StoppedBy, TrialStatus] = {
    "budget": "finished",
    "patience": "finished",
    "asha": "pruned",
    "interruption": "pruned",
    "error": "failed",
}


def stopped_by(last: Mapping[str, Any]) -> StoppedBy:
    """What ended a trial whose last epoch was `last`: what the trainer says, else the scheduler."""
    said = last.get("stopped_by", "")
    return next((word for word in _STATUS if word == said), "asha")


def outcome_of(
    config: TrialConfig, last: Mapping[str, Any], directory: Path, seconds: float, crash: str = ""
) -> TrialOutcome:
    """Say how a trial ended.

    Args:
        config: what was tried.
        last: the last epoch's figures as `Trainer.step` gives them, with `stopped_by` and `reason`; empty when there
            was none.
        directory: where its model lies.
        seconds: wall time of its training.
        crash: why it died without saying so itself; empty when it did not.
    """
    ended: StoppedBy = "error" if crash else stopped_by(last)
    best_epoch = int(last.get("best_epoch", 0))
    best = {name: float(last.get(f"best_{name}", math.nan)) for name in OBJECTIVES} if best_epoch else {}
    return TrialOutcome(
        config=config,
        status=_STATUS[ended],
        stopped_by=ended,
        epochs=int(last.get("epoch", 0)),
        best_epoch=best_epoch,
        best={name: value for name, value in best.items() if math.isfinite(value)},
        directory=str(directory),
        seconds=seconds,
        reason=crash or str(last.get("reason", "")),
    )


FEATURES = "features.json"
CHECKPOINT = "checkpoint.pt"
"""In a trial's folder while it is not over: all that its training needs to go on."""


def check_same_images(directory: Path, fingerprint: str, keys: Sequence[str]) -> None:
    """Refuse to go on with a study on other images than it began with: its trials would not be comparable.

    Args:
        directory: where `write_inputs` wrote; a study that has not got so far has nothing there.
        fingerprint: the cache of what the study file gives today.
        keys: its images; as many may be broken ones as were when the study began.

    Raises:
        InputError: they are others.
    """
    path = directory / FEATURES
    if not path.exists():
        return
    before = FeatureSet.read(path)
    began_with = [row.key for row in before.rows]
    known = set(began_with)
    kept = [key for key in keys if key in known]
    same = before.fingerprint == fingerprint
    if not same or kept != began_with or len(keys) - len(kept) > before.quarantined:
        what = "are not the same any more" if same else "are encoded otherwise now"
        raise InputError(
            f"features.source: the study began with {len(before.rows)} images, and they {what}; restore them, or run "
            "a new study with `lowrank-tune clone`"
        )


def write_inputs(directory: Path, features: FeatureSet, split: Split, optimum_path: Path) -> dict[str, str]:
    """Write what a study's trials share, references and never the features, for `read_inputs`; returns where it lies.

    Args:
        directory: where to write; made when missing.
        features: the study's features.
        split: which images train, validate and judge.
        optimum_path: the validation split's optimum, already saved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = {"features": directory / FEATURES, "split": directory / "split.json", "optimum": optimum_path}
    features.write(paths["features"])
    write_json(paths["split"], split, indent=None)
    return {name: str(path.absolute()) for name, path in paths.items()}


CONFIG, HISTORY, OUTCOME = "config.json", "history.json", "outcome.json"


def begin_trial(directory: Path, config: TrialConfig) -> None:
    """Write a trial's config.json as it starts; what another configuration has left there is removed."""
    path = directory / CONFIG
    for folder in (directory.parent, directory):
        folder.mkdir(exist_ok=True)
    if path.is_file():
        if TrialConfig(**read_json(path)) == config:
            return
        for name in (HISTORY, OUTCOME, CHECKPOINT, "best_model.safetensors"):
            (directory / name).unlink(missing_ok=True)
    write_json(path, config)


def write_history(directory: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write what each epoch of a trial gave; JSON has no NaN, so a figure that is not finite is null there."""
    write_json(directory / HISTORY, [{key: _finite(value) for key, value in row.items()} for row in rows])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_history(directory: Path) -> list[dict[str, float]]:
    """Read what each epoch of a trial gave; nothing where none has ended."""
    try:
        rows = read_json(directory / HISTORY)
    except FileNotFoundError:
        return []
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def write_outcome(trials_dir: Path, outcome: TrialOutcome) -> None:
    """Write `trials/<trial_id>/outcome.json`; what the trial would have needed to go on is removed."""
    directory = trials_dir / outcome.config.trial_id
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / OUTCOME, outcome)
    (directory / CHECKPOINT).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """A trial as its folder tells of it; moments are in milliseconds since 1970."""

    config: TrialConfig
    history: tuple[dict[str, Any], ...]  # an epoch each, the oldest first
    outcome: TrialOutcome | None  # None while it is not over; a history that ends the training tells its outcome, too
    directory: Path
    trained: int  # when the last epoch ended, or the trial began
    changed: int  # when it was over


def read_trial(directory: Path) -> TrialRecord | None:
    """Read a trial's config.json, history.json and outcome.json; None for one that left neither first nor last."""
    config_path, history_path, outcome_path = (directory / name for name in ("config.json", "history.json", OUTCOME))
    outcome = TrialOutcome.read(outcome_path) if outcome_path.is_file() else None
    if outcome is None and not config_path.is_file():
        return None
    config = outcome.config if outcome else TrialConfig(**read_json(config_path))
    history = read_json(history_path) if history_path.is_file() else []
    if outcome is None and history and config.ends_at(history[-1]["epoch"], history[-1]["best_epoch"]):
        outcome = _from_history(config, history, directory, None)
    paths = [path for path in (history_path, config_path, outcome_path) if path.is_file()]
    trained, last = _moment(paths[0]), _moment(outcome_path if outcome_path.is_file() else paths[0])
    return TrialRecord(config, tuple(history), outcome, directory, trained, last)


def read_trials(trials_dir: Path) -> list[TrialRecord]:
    """Every trial and repetition that left a file."""
    found = (read_trial(directory) for directory in sorted(trials_dir.glob("*")))
    return [record for record in found if record is not None]


def _moment(path: Path) -> int:
    return path.stat().st_mtime_ns // 1_000_000


def read_outcomes(trials_dir: Path) -> dict[str, TrialOutcome]:
    """Every outcome on file, of trials and of repetitions, by trial id."""
    outcomes = (TrialOutcome.read(path) for path in trials_dir.glob(f"*/{OUTCOME}"))
    return {outcome.config.trial_id: outcome for outcome in outcomes}


def remove_checkpoints(trials_dir: Path, outcomes: Iterable[TrialOutcome]) -> None:
    """Remove what trials that are over have kept to go on: an actor may write once more while it is stopped."""
    for outcome in outcomes:
        (trials_dir / outcome.config.trial_id / CHECKPOINT).unlink(missing_ok=True)


def recovered_outcome(trial: FrozenTrial, trials_dir: Path) -> TrialOutcome:
    """The outcome of a trial that Optuna was told the end of just before the driver died, from its history.

    Args:
        trial: Optuna's, over, with the user attribute `config`.
        trials_dir: `studies/<study_id>/trials`.
    """
    config = TrialConfig(**trial.user_attrs["config"])
    directory = trials_dir / config.trial_id
    history = read_history(directory)
    last: dict[str, Any] = dict(history[-1]) if history else {}
    if trial.state == TrialState.COMPLETE:
        last["stopped_by"] = "budget" if last.get("epoch") == config.epochs else "patience"
    crash = "the driver died before it could write the reason down" if trial.state == TrialState.FAIL else ""
    return outcome_of(config, last, directory, sum(row["seconds"] for row in history), crash)


def past_outcomes(study_dir: Path) -> list[TrialOutcome]:
    """Every training that left a model or a reason, by number, whether its study finished or not."""
    states = _search_states(study_dir / "tune" / "optuna.journal")
    found = [_outcome(folder, states) for folder in sorted((study_dir / "trials").glob("*"))]
    known = [outcome for outcome in found if outcome is not None]
    return sorted(known, key=lambda outcome: (outcome.config.number, outcome.config.trial_id))


def _outcome(folder: Path, states: Mapping[str, TrialState]) -> TrialOutcome | None:
    """How a trial ended: from its outcome where it is on file, else from its history and the search's journal."""
    try:
        if (folder / OUTCOME).is_file():
            return TrialOutcome.read(folder / OUTCOME)
        config = TrialConfig(**read_json(folder / CONFIG))
        return _from_history(config, read_history(folder), folder, states.get(config.trial_id))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: cannot be read (%s); the study is looked at without this trial", folder, error)
        return None


def _from_history(
    config: TrialConfig, history: list[dict[str, Any]], folder: Path, state: TrialState | None
) -> TrialOutcome:
    last = history[-1] if history else {}
    best_epoch = int(last.get("best_epoch", 0))
    stopped = _stopped_by(config, last, state)
    names = OBJECTIVES if best_epoch else ()
    return TrialOutcome(
        config=config,
        status=_STATUS[stopped],
        stopped_by=stopped,
        epochs=int(last.get("epoch", 0)),
        best_epoch=best_epoch,
        best={name: float(last[f"best_{name}"]) for name in names},
        directory=str(folder),
        seconds=sum(float(row.get("seconds", 0.0)) for row in history),
        reason="the study ended before it did" if stopped == "interruption" else "",
    )


def _stopped_by(config: TrialConfig, last: Mapping[str, Any], state: TrialState | None) -> StoppedBy:
    if last and (ended := config.ends_at(last["epoch"], last["best_epoch"])):
        return ended
    if state == TrialState.PRUNED:
        return "asha"
    # Optuna fails what an interruption leaves running; a trial that fails by itself and one that is cut off both leave
    # a model of the epochs before.
    return "interruption" if last else "error"


def _search_states(journal: Path) -> dict[str, TrialState]:
    if not journal.is_file():
        return {}
    try:
        storage = JournalStorage(JournalFileBackend(str(journal)))
        trials = [
            trial
            for name in optuna.get_all_study_names(storage)
            for trial in optuna.load_study(study_name=name, storage=storage).trials
        ]
    except Exception as error:  # a journal cut off by a kill fails wherever Optuna trips over it
        logger.warning("%s cannot be read (%s); why trials stopped is told from their histories alone", journal, error)
        return {}
    return {str(trial.user_attrs["trial_id"]): trial.state for trial in trials if "trial_id" in trial.user_attrs}
