"""A trial's folder: its configuration, epochs and outcome are written and read here, and how it ended is told here."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lowrank_tune.errors import InputError
from lowrank_tune.files import read_json, write_json
from lowrank_tune.records import (
    BEST_MODEL,
    FIGURES,
    FeatureSet,
    StoppedBy,
    TrialConfig,
    TrialOutcome,
    TrialStatus,
)

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
CONFIG, HISTORY, OUTCOME = "config.json", "history.json", "outcome.json"
FEATURES, SPLIT = "features.json", "split.json"
"""In the folder `tune` of a study: what its trials share, references and never the features."""
CHECKPOINT = "checkpoint.pt"
"""In a trial's folder while it is not over: all that its training needs to go on."""

_STATUS: dict[StoppedBy, TrialStatus] = {
    "budget": "finished",
    "patience": "finished",
    "asha": "pruned",
    "interruption": "pruned",
    "error": "failed",
}


_RECOVERED = {
    "error": "the driver died before it could write the reason down",
    "interruption": "the study ended before it did",
}


def stopped_by(last: Mapping[str, Any]) -> StoppedBy:
    """What ended a trial: what the trainer said at its last epoch, else the scheduler."""
    said: StoppedBy = last.get("stopped_by") or "asha"
    return said


def outcome_of(config: TrialConfig, last: Mapping[str, Any], directory: Path, crash: str = "") -> TrialOutcome:
    """How a trial ended, from its last epoch's figures as `train_epoch` gives them, or why it died without a word."""
    ended: StoppedBy = "error" if crash else stopped_by(last)
    best_epoch = int(last.get("best_epoch", 0))
    best = {name: float(last.get(f"best_{name}", math.nan)) for name in FIGURES} if best_epoch else {}
    return TrialOutcome(
        config=config,
        status=_STATUS[ended],
        stopped_by=ended,
        epochs=int(last.get("epoch", 0)),
        best_epoch=best_epoch,
        best={name: value for name, value in best.items() if math.isfinite(value)},
        directory=str(directory),
        seconds=last.get("trained_seconds", 0.0),
        reason=crash or str(last.get("reason", "")),
    )


def check_same_images(directory: Path, fingerprint: str, keys: Sequence[str]) -> None:
    """Refuse to go on with a study on other images than it began with, but for as many as were broken then."""
    path = directory / FEATURES
    if not path.exists():
        return
    before = FeatureSet.read(path)
    began_with = [row.key for row in before.rows]
    known = set(began_with)
    kept = [key for key in keys if key in known]
    study_id = directory.parent.name
    if before.fingerprint != fingerprint:
        raise InputError(
            f"study {study_id}: it began with the features {before.fingerprint}, and its file gives {fingerprint} now, "
            "for its checkpoint, or the way in which this version of lowrank-tune reads images, is another; run it "
            f"anew with `lowrank-tune clone {study_id}`; `compare` and `report` still tell what it has"
        )
    if kept != began_with or len(keys) - len(kept) > before.quarantined:
        raise InputError(
            f"features.source: the study began with {len(before.rows)} images, and they are not the same any more, "
            f"or in another order; restore them, or run a new study with `lowrank-tune clone {study_id}`"
        )


def begin_trial(directory: Path, config: TrialConfig) -> None:
    """Write a trial's config.json as it starts; what another configuration, or damage, has left there is removed."""
    path = directory / CONFIG
    _make_folder(directory)
    if path.is_file():
        try:
            read_history(directory)
            if TrialConfig(**read_json(path)) == config:
                return
        except (ValueError, TypeError) as error:
            logger.warning("trial %s begins afresh: its files are damaged (%s)", config.trial_id, error)
        for name in (HISTORY, OUTCOME, CHECKPOINT, BEST_MODEL):
            (directory / name).unlink(missing_ok=True)
    write_json(path, config)


def _make_folder(directory: Path) -> None:
    """Make a trial's folder in its study's, which must be there: one made anew would hide that its mount has gone."""
    for folder in (directory.parent, directory):
        folder.mkdir(exist_ok=True)


def write_history(directory: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write what each epoch of a trial gave; a figure that is not finite is null."""
    write_json(directory / HISTORY, [{key: _finite(value) for key, value in row.items()} for row in rows])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_history(directory: Path) -> list[dict[str, float]]:
    try:
        rows = read_json(directory / HISTORY)
    except FileNotFoundError:
        return []
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def write_outcome(outcome: TrialOutcome) -> None:
    """Write a trial's outcome.json; what it would have needed to go on is removed."""
    _make_folder(Path(outcome.directory))
    write_json(Path(outcome.directory) / OUTCOME, outcome)
    remove_checkpoint(outcome)


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
    config_path, history_path, outcome_path = (directory / name for name in (CONFIG, HISTORY, OUTCOME))
    outcome = TrialOutcome.read(outcome_path) if outcome_path.is_file() else None
    if outcome is None and not config_path.is_file():
        return None
    config = outcome.config if outcome else TrialConfig(**read_json(config_path))
    history = read_history(directory)
    if outcome is None and history and config.ends_at(int(history[-1]["epoch"]), int(history[-1]["best_epoch"])):
        outcome = recovered_outcome(config, directory, history)
    paths = [path for path in (history_path, config_path, outcome_path) if path.is_file()]
    trained, last = _moment(paths[0]), _moment(outcome_path if outcome_path.is_file() else paths[0])
    return TrialRecord(config, tuple(history), outcome, directory, trained, last)


def read_trials(trials_dir: Path) -> list[TrialRecord]:
    """Every trial that left something, by id; one that is damaged is left out, with a warning."""
    return [record for record in _readable(trials_dir.glob("*"), read_trial) if record is not None]


def _readable(paths: Iterable[Path], read: Callable[[Path], Found]) -> Iterator[Found]:
    for path in sorted(paths):
        try:
            yield read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s: cannot be read (%s); the study is looked at without this trial", path, error)


def _moment(path: Path) -> int:
    return path.stat().st_mtime_ns // 1_000_000


def read_outcomes(trials_dir: Path) -> dict[str, TrialOutcome]:
    """Every outcome on file, of trials and of repetitions, by trial id."""
    outcomes = _readable(trials_dir.glob(f"*/{OUTCOME}"), TrialOutcome.read)
    return {outcome.config.trial_id: outcome for outcome in outcomes}


def remove_checkpoint(outcome: TrialOutcome) -> None:
    """Remove what a trial that is over has kept to go on: an actor may write once more while it is stopped."""
    Path(outcome.directory, CHECKPOINT).unlink(missing_ok=True)


def recovered_outcome(
    config: TrialConfig, directory: Path, history: Sequence[Mapping[str, float]], state: str = ""
) -> TrialOutcome:
    """How a trial ended whose driver died before it wrote an outcome; `state`, if known, names Optuna's TrialState."""
    last: dict[str, Any] = dict(history[-1]) if history else {}
    ended: StoppedBy = "interruption" if last else "error"
    if state == "FAIL":
        ended = "error"
    elif last and (by_itself := config.ends_at(int(last["epoch"]), int(last["best_epoch"]))):
        ended = by_itself
    elif state == "PRUNED":
        ended = "asha"
    seconds = sum(row.get("seconds", 0.0) for row in history)
    said = {"stopped_by": ended, "reason": _RECOVERED.get(ended, ""), "trained_seconds": seconds}
    return outcome_of(config, last | said, directory)


def past_outcomes(study_dir: Path) -> list[TrialOutcome]:
    """Every training that left a model or a reason, by number, whether its study finished or not."""
    found = [
        record.outcome or recovered_outcome(record.config, record.directory, record.history)
        for record in read_trials(study_dir / "trials")
        if record.outcome or record.history
    ]
    return sorted(found, key=lambda outcome: (outcome.config.number, outcome.config.trial_id))
