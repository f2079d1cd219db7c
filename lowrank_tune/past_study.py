"""A study that has finished, or was stopped: its comparison, pictures and report, again.

Only its folder and its feature cache are read, wherever they lie now; no Ray is started.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lowrank_tune.cluster.study_dir import claimed, find_study, read_plan, read_status, results_path
from lowrank_tune.comparison.compare import read_comparison
from lowrank_tune.config.loading import load_past_study
from lowrank_tune.config.plan import Plan
from lowrank_tune.errors import InputError
from lowrank_tune.features.pictures import measure_pictures
from lowrank_tune.fidelity.measure import Measured, ask_fidelity, read_fidelity
from lowrank_tune.measured import Comparison, Fidelity
from lowrank_tune.records import FeatureSet, Split, StudyProgress, TrialOutcome
from lowrank_tune.report.spatial import check_shown
from lowrank_tune.study import compare_study
from lowrank_tune.tracking.reconcile import report_comparison
from lowrank_tune.trials.outcomes import FEATURES, SPLIT, past_outcomes

_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True, slots=True)
class PastStudy:
    """A study as its folder tells it."""

    directory: Path
    plan: Plan
    state: str  # `finished`, `stopped`, `failed` or `running`
    features: FeatureSet
    split: Split
    outcomes: tuple[TrialOutcome, ...]  # that left a model or a reason, in the order of their numbers
    confirmations: tuple[TrialOutcome, ...]  # likewise

    @property
    def remarks(self) -> tuple[str, ...]:
        """What must be said of an unfinished study's figures."""
        if self.state == "finished":
            return ()
        trials = f"{len(self.outcomes)} of {self.plan.n_trials} trials"
        said = "still runs" if self.state == "running" else f"is {self.state}"
        return (f"the study {said}: these figures are of the {trials} that left something",)


def open_study(results: str | Path | None, name: str) -> PastStudy:
    """Open a study by its id, or the beginning of it.

    Raises:
        InputError: there is no such study, it never began to train, or its files are damaged.
    """
    directory = find_study(results_path(results), name)
    try:
        plan = read_plan(directory)
        state = str(read_status(directory)["state"])
        split = Split.read(directory / "tune" / SPLIT)
        features = _moved(FeatureSet.read(directory / "tune" / FEATURES), directory.parent.parent)
    except FileNotFoundError as error:
        raise InputError(
            f"study {directory.name}: {error.filename} is not there: it never began to train, so there is nothing to "
            "look at; run it again"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"study {directory.name}: its files cannot be read ({error}); run it again") from error
    found = past_outcomes(directory)
    outcomes = tuple(outcome for outcome in found if not outcome.config.confirms)
    confirmations = tuple(outcome for outcome in found if outcome.config.confirms)
    return PastStudy(directory, plan, state, features, split, outcomes, confirmations)


def comparison_of(study: PastStudy, *, again: bool = False) -> Comparison:
    """The study's figures on the test split: those on file, or measured now where there are none, or `again`.

    Raises:
        InputError: there is nothing to compare.
        CacheError: features cannot be read.
    """
    comparison = None if again else read_comparison(study.directory, study.plan.spec.steered_by)
    if comparison is None:
        with _writing(study):
            pictures = measure_pictures(study.plan, study.features, study.split.test)
            comparison = compare_study(
                study.plan, study.features, study.split, study.outcomes, study.confirmations, pictures
            )
    return replace(comparison, remarks=(*study.remarks, *comparison.remarks))


def report_of(
    study: PastStudy, *, again: bool = False, progress: Callable[[str], None] = lambda text: None
) -> tuple[tuple[Path, ...], str]:
    """Write the study's report anew and log it to MLflow; the page is the last file.

    Returns:
        The files, and what MLflow was not told and why.
    """
    comparison = comparison_of(study, again=again)
    with _writing(study):
        files = _write_report(study, comparison, read_fidelity(study.directory), progress)
    return files, _told(study, comparison)


def _write_report(
    study: PastStudy, comparison: Comparison, fidelity: Fidelity | None, progress: Callable[[str], None]
) -> tuple[Path, ...]:
    # It loads libraries of drawing, which whoever only reads figures need not wait for.
    from lowrank_tune.report.report import write_report

    return write_report(
        study.plan,
        study.features,
        study.split,
        study.outcomes,
        comparison,
        study.directory,
        study.confirmations,
        progress,
        fidelity,
    )


def _told(study: PastStudy, comparison: Comparison) -> str:
    """Log it all to MLflow; what was not told, and why."""
    return report_comparison(study.plan, comparison, (*study.outcomes, *study.confirmations))


def fidelity_of(
    study: PastStudy,
    *,
    questions: str | None = None,
    answers: str | None = None,
    images: int | None = None,
    address: str | None = None,
    progress: StudyProgress | None = None,
) -> tuple[Fidelity, str]:
    """Ask the language model what of a study was not asked yet, write its report anew and log both to MLflow.

    Args:
        study: from `open_study`.
        questions: as in a study file; by default what the study's own has, and likewise the next two.
        answers: the column of right answers.
        images: how many test images; more of them widen what is there.
        address: a Ray cluster; by default RAY_ADDRESS, else a Ray of this process's own.
        progress: told what happens.

    Returns:
        What was found, and what MLflow was not told and why.

    Raises:
        InputError: nothing says what to ask, or the questions, the checkpoint or the images cannot be used.
        CacheError: features cannot be read.
        LowrankTuneError: the workers stopped.
    """
    progress, own = progress or StudyProgress(), study.plan.spec.fidelity
    given = {"questions": questions, "answers": answers, "images": images}
    wanted = (own.model_dump() if own else {}) | {name: value for name, value in given.items() if value is not None}
    if "questions" not in wanted:
        raise InputError(
            f"study {study.directory.name}: its file has no fidelity section, so say what to ask: --questions with a "
            "column of its records, or the question itself; with --answers, a column, accuracy is measured, too"
        )
    asked = load_past_study(study.directory / "study.resolved.yaml", [f"fidelity={json.dumps(wanted)}"]).fidelity
    assert asked is not None
    with claimed(study.directory), _writing(study):
        comparison = comparison_of(study)
        measured = Measured(study.plan, study.features, study.split, study.outcomes, comparison)
        fidelity = ask_fidelity(measured, asked, note=progress.stage, progress=progress.asked, address=address)
        _write_report(study, comparison, fidelity, progress.stage)
    return fidelity, _told(study, comparison)


def visualize(
    study: PastStudy, images: Sequence[int], *, rank: int | None = None, channels: Sequence[int] | int = 8
) -> tuple[Path, ...]:
    """Write the spatial pictures of some test images, PNG files, and a page with choosers, the last path.

    Args:
        study: from `open_study`.
        images: positions in the test split, from 0.
        rank: by default that of the best trained model.
        channels: which channels, or how many of the first ones.

    Raises:
        InputError: there is no such image, rank or channel, or nothing to compare.
        CacheError: features cannot be read.
    """
    from lowrank_tune.report.spatial_page import Scene, write_spatial_page

    trained = [each for outcome in study.outcomes for each in outcome.config.ranks]
    check_shown(study.features, study.split, images, channels, rank, trained)
    scene = Scene(study.features, study.split, study.outcomes, comparison_of(study))
    with _writing(study):
        return write_spatial_page(scene, study.directory, images=images, channels=channels, rank=rank)


def write_side_by_side(
    studies: Sequence[PastStudy], comparisons: Mapping[str, Comparison], path: Path, rank: int | None = None
) -> Path:
    """Write a page that holds studies against each other: the best by rank, learning, and where their files differ.

    Args:
        studies: from `open_study`.
        comparisons: their figures, by the names of their directories.
        path: the page, `compare.html`; what is there is replaced.
        rank: only this one.

    Raises:
        InputError: the page cannot be written there.
    """
    from lowrank_tune.report.report import with_history
    from lowrank_tune.report.studies import Shown, write_studies_page
    from lowrank_tune.report.text import at_rank

    shown = {
        study.directory.name: Shown(
            at_rank(comparisons[study.directory.name], rank),
            study.plan.spec.model_dump(mode="json"),
            list(map(with_history, study.outcomes)),
        )
        for study in studies
    }
    page = path.expanduser().absolute()
    try:
        write_studies_page(shown, comparability(studies), page)
    except OSError as error:
        raise InputError(
            f"--html {path}: cannot be written ({error.strerror}); name a file in a folder that is there"
        ) from None
    return page


def check_rank_compared(studies: Sequence[PastStudy], rank: int | None) -> None:
    """Refuse a rank that no study compares."""
    ranks = sorted({each for study in studies for outcome in study.outcomes for each in outcome.config.ranks})
    if rank is not None and rank not in ranks:
        raise InputError(f"rank {rank}: compared were {', '.join(map(str, ranks)) or 'none'}; choose among them")


def comparability(studies: Sequence[PastStudy]) -> list[str]:
    """Say what keeps the figures of several studies from being held against each other."""
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
    """The features beside the study, when they are not where they were."""
    here = results / "features" / features.fingerprint
    if Path(features.directory).is_dir() or not here.is_dir():
        return features
    records = here / "sources" / Path(features.records_path).name
    return replace(features, directory=str(here), records_path=str(records))


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
