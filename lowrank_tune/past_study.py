"""Looks at a study that has finished, or was stopped: its comparison, its pictures and its report, again.

Only the study's folder and its feature cache are read, wherever they lie now: a results directory may have been copied
or mounted elsewhere since. No Ray is started.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from lowrank_tune.cluster.study_dir import find_study, read_plan, results_path
from lowrank_tune.comparison.compare import compare, read_comparison
from lowrank_tune.config.plan import Plan
from lowrank_tune.errors import InputError, LowrankTuneError
from lowrank_tune.records import Comparison, FeatureSet, Split, StoppedBy, TrialConfig, TrialOutcome, TrialStatus
from lowrank_tune.report.report import ReportFiles, Scene, write_places, write_report
from lowrank_tune.tracking.mlflow_tracker import RunStatus, StudyTracker

_log = logging.getLogger(__name__)

_STATUS: dict[StoppedBy, TrialStatus] = {
    "budget": "finished",
    "patience": "finished",
    "asha": "pruned",
    "interruption": "pruned",
    "error": "failed",
}
_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}
_RUN_STATUS: dict[str, RunStatus] = {"finished": "FINISHED", "failed": "FAILED"}


@dataclass(frozen=True, slots=True)
class PastStudy:
    """A study as its folder tells it.

    Attributes:
        directory: `results/studies/<study_id>`.
        plan: what it was to do.
        state: `finished`, `stopped`, `failed` or `running`.
        features: its features, where they lie now.
        split: which of them trained, validated and tested.
        outcomes: the trials that left a model or a reason, in the order of their numbers.
        confirmations: likewise the repetitions of the best.
    """

    directory: Path
    plan: Plan
    state: str
    features: FeatureSet
    split: Split
    outcomes: tuple[TrialOutcome, ...]
    confirmations: tuple[TrialOutcome, ...]

    @property
    def remarks(self) -> tuple[str, ...]:
        """What must be said of figures from a study that is not finished."""
        if self.state == "finished":
            return ()
        trials = f"{len(self.outcomes)} of {self.plan.n_trials} trials"
        said = "still runs, or was killed" if self.state == "running" else f"is {self.state}"
        return (f"the study {said}: these figures are of the {trials} that left something",)


def open_study(results: str | Path | None, name: str) -> PastStudy:
    """Open a study of a results directory.

    Args:
        results: the results directory; `LOWRANK_TUNE_RESULTS`, else `./results`, when None.
        name: the study's id, or the beginning of it.

    Raises:
        InputError: there is no such study, it never began to train, or its files are damaged.
    """
    return read_study(find_study(results_path(results), name))


def read_study(directory: Path) -> PastStudy:
    """Read a study's folder.

    Args:
        directory: `results/studies/<study_id>`.

    Raises:
        InputError: it never began to train, or its files are damaged.
    """
    results = directory.parent.parent
    try:
        plan = read_plan(directory)
        state = str(_json(directory / "status.json")["state"])
        split = Split(**{name: tuple(images) for name, images in _json(directory / "tune" / "split.json").items()})
        features = _moved(FeatureSet.read(directory / "tune" / "features.json"), results)
    except FileNotFoundError as error:
        raise InputError(
            f"study {directory.name}: {error.filename} is not there: it never began to train, so there is nothing to "
            "look at; run it again"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"study {directory.name}: its files cannot be read ({error}); run it again") from error
    outcomes = _outcomes(directory)
    return PastStudy(
        directory=directory,
        plan=plan,
        state=state,
        features=features,
        split=split,
        outcomes=tuple(outcome for outcome in outcomes if not outcome.config.confirms),
        confirmations=tuple(outcome for outcome in outcomes if outcome.config.confirms),
    )


def comparison_of(study: PastStudy, *, again: bool = False) -> Comparison:
    """The study's figures on the test split: those on file, else measured now on the trials that there are.

    Args:
        study: from `open_study`.
        again: measure even though there are figures on file, and replace them.

    Raises:
        InputError: no trial left anything to compare, or the features have no usable test image.
        CacheError: features cannot be read.
    """
    if again or not (study.directory / "comparison.json").is_file():
        gpu = study.plan.spec.resources.gpus_per_trial and torch.cuda.is_available()
        with _writing(study):
            comparison = compare(
                study.features,
                study.split,
                study.outcomes,
                objective=study.plan.spec.objective,
                seed=study.plan.spec.seed,
                directory=study.directory,
                confirmations=study.confirmations,
                device="cuda" if gpu else "cpu",
            )
    else:
        comparison = read_comparison(study.directory)
    return replace(comparison, remarks=(*study.remarks, *comparison.remarks))


def report_of(study: PastStudy, *, again: bool = False) -> tuple[ReportFiles, str]:
    """Write the study's report anew and log it to its run in MLflow.

    Args:
        study: from `open_study`.
        again: as for `comparison_of`.

    Returns:
        The files written, and what MLflow was not told and why; empty when it knows everything.

    Raises:
        InputError: as for `comparison_of`.
        CacheError: features cannot be read.
    """
    comparison = comparison_of(study, again=again)
    with _writing(study):
        files = write_report(
            study.plan, study.features, study.split, study.outcomes, comparison, study.directory, study.confirmations
        )
    return files, _track(study, comparison)


def visualize(
    study: PastStudy, images: Sequence[int], *, rank: int | None = None, channels: Sequence[int] | int = 8
) -> tuple[Path, ...]:
    """Write the spatial pictures of some test images, and a page with choosers of image, rank and channel.

    Args:
        study: from `open_study`.
        images: positions in the test split, from 0.
        rank: R; by default that of the best trained model.
        channels: which channels, or how many of the first ones.

    Returns:
        The PNG files, then the page.

    Raises:
        InputError: there is no such image, rank or channel, or nothing to compare.
        CacheError: features cannot be read.
    """
    scene = Scene(study.features, study.split, study.outcomes, comparison_of(study))
    with _writing(study):
        return write_places(scene, study.directory, images=images, channels=channels, rank=rank)


def check_ranks_compared(comparisons: Mapping[str, Comparison], rank: int | None) -> None:
    """Refuse a rank that no study compared.

    Raises:
        InputError: naming those that were.
    """
    compared = sorted({row.rank for comparison in comparisons.values() for row in comparison.rows})
    if rank is not None and rank not in compared:
        raise InputError(f"rank {rank}: compared were {', '.join(map(str, compared)) or 'none'}; choose among them")


def comparability(studies: Sequence[PastStudy]) -> list[str]:
    """Say what keeps the figures of several studies from being held against each other; nothing when all is equal."""
    first = studies[0]
    said = []
    if len({study.features.fingerprint for study in studies}) > 1:
        made = "; ".join(f"{study.directory.name}: {study.features.encoder}" for study in studies)
        said.append(f"the studies' features differ ({made}): compare within each study only")
    tested = [{study.features.rows[index].key for index in study.split.test} for study in studies]
    if any(keys != tested[0] for keys in tested):
        shared = len(set.intersection(*tested))
        said.append(
            f"the studies' test images differ: they share {shared} of {first.directory.name}'s {len(tested[0])}, and "
            "means are over each study's own"
        )
    return said


def _moved(features: FeatureSet, results: Path) -> FeatureSet:
    """The features where they lie now: beside the study, when they are not where they were."""
    here = results / "features" / features.fingerprint
    if Path(features.directory).is_dir() or not here.is_dir():
        return features
    records = here / "sources" / Path(features.records_path).name
    return replace(features, directory=str(here), records_path=str(records))


def _outcomes(directory: Path) -> list[TrialOutcome]:
    states = _search_states(directory / "tune" / "optuna.journal")
    found = [_outcome(folder, states) for folder in sorted((directory / "trials").glob("*"))]
    known = [outcome for outcome in found if outcome is not None]
    return sorted(known, key=lambda outcome: (outcome.config.number, outcome.config.trial_id))


def _outcome(folder: Path, states: Mapping[str, TrialState]) -> TrialOutcome | None:
    """How a trial ended: from its outcome where it is on file, else from its history and the search's journal."""
    try:
        if (folder / "outcome.json").is_file():
            return TrialOutcome.read(folder / "outcome.json")
        config = TrialConfig(**_json(folder / "config.json"))
        history = _json(folder / "history.json")
        return _from_history(config, history, folder, states.get(config.trial_id))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s: cannot be read (%s); the study is looked at without this trial", folder, error)
        return None


def _from_history(
    config: TrialConfig, history: list[dict[str, Any]], folder: Path, state: TrialState | None
) -> TrialOutcome:
    last = history[-1] if history else {}
    best_epoch = int(last.get("best_epoch", 0))
    stopped = _stopped_by(config, last, state)
    names = ("val_mse", "val_token_cosine", "val_residual_ratio") if best_epoch else ()
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
        _log.warning("%s cannot be read (%s); why trials stopped is told from their histories alone", journal, error)
        return {}
    return {str(trial.user_attrs["trial_id"]): trial.state for trial in trials if "trial_id" in trial.user_attrs}


def _track(study: PastStudy, comparison: Comparison) -> str:
    # One that calls itself running may be trained by another process at this moment.
    status = None if study.state == "running" else _RUN_STATUS.get(study.state, "KILLED")
    try:
        tracker = StudyTracker(study.plan, past=True)
    except LowrankTuneError as error:
        return str(error)
    tracker.log_comparison(comparison, (*study.outcomes, *study.confirmations), study.directory)
    tracker.finish(status)
    return "; ".join(tracker.problems)


@contextmanager
def _writing(study: PastStudy) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise InputError(
            f"study {study.directory.name}: cannot write into {study.directory} ({error.strerror}); make room or get "
            "the right to, or copy the study and its features to another results directory and name that with --results"
        ) from error


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
