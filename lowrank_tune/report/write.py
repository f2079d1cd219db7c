"""Writing a study's report: its plots, its trials' loss curves, and report.html."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.files import write_whole
from lowrank_tune.records import Comparison, FeatureSet, Split, TrialOutcome
from lowrank_tune.report.compression import compression_section
from lowrank_tune.report.cost import study_cost
from lowrank_tune.report.curves import Trial
from lowrank_tune.report.history import read_history
from lowrank_tune.report.html import Contents, Picture, Section, Table, render, render_places
from lowrank_tune.report.pictures import (
    learning_picture,
    loss_picture,
    pareto_picture,
    rank_picture,
    spectrum_picture,
)
from lowrank_tune.report.search import SearchViews, search_views
from lowrank_tune.report.spatial import check_images
from lowrank_tune.report.spatial_report import Scene, spatial_section, written
from lowrank_tune.report.spectrum import Spectrum, measure_spectrum
from lowrank_tune.spec.plan import Plan

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """What a report wrote.

    Attributes:
        html: `report.html`.
        plots: the files of `plots/`.
        loss_curves: one `loss_curves.png` a trial that left a history, in the trial's directory.
    """

    html: Path
    plots: tuple[Path, ...]
    loss_curves: tuple[Path, ...]


def write_report(
    plan: Plan,
    features: FeatureSet,
    split: Split,
    outcomes: Sequence[TrialOutcome],
    comparison: Comparison,
    directory: Path,
    confirmations: Sequence[TrialOutcome] = (),
) -> ReportFiles:
    """Write everything a person looks at after a study.

    Args:
        plan: the study; its `report` section names the images and channels of the spatial pictures.
        features: the study's.
        split: its images.
        outcomes: every trial.
        comparison: the post-study figures.
        directory: the study's; holds `study.yaml`, which the report repeats, and the search's journal.
        confirmations: repetitions of the best trials; each gets its loss curves beside its model.

    Returns:
        The files written. An image that the test split does not have is told in the report's remarks instead of failing
        it; `check_images` finds it before a study starts.

    Raises:
        CacheError: the features of an image cannot be read.
    """
    plots = directory / "plots"
    try:
        check_images(plan.spec.report.images, len(split.test))
    except InputError as error:
        comparison = replace(comparison, remarks=(*comparison.remarks, str(error)))
        _log.warning("%s", error)
    trials, repeats = _with_histories(outcomes), _with_histories(confirmations)
    losses = [loss_picture(outcome, history) for outcome, history in (*trials, *repeats) if history]
    spectrum = measure_spectrum(FeatureMatrix(features), split.test)
    images = [image for image in plan.spec.report.images if image < len(split.test)]
    scene = Scene(features, split, outcomes, comparison)
    places = spatial_section(scene, plots, images=images, channels=plan.spec.report.channels)
    first = [*_ranks(comparison, spectrum, plots), *([places] if places.pictures else [])]
    views = search_views(directory / "tune" / "optuna.journal", plan.spec.objective)
    further = [*_learning(trials, repeats, plots), _search(views), *_storage(comparison, spectrum, plots)]
    contents = Contents(
        name=plan.spec.name,
        study_id=plan.study_id,
        objective=plan.spec.objective,
        study_file=_study_file(directory),
        features=features,
        split=split,
        outcomes=outcomes,
        comparison=comparison,
        cost=study_cost(directory, features, outcomes, confirmations),
        spectrum=spectrum,
    )
    standing = {row.trial_id for row in comparison.rows}
    text = render(contents, first, further, [picture for picture in losses if picture.title in standing])
    html = directory / "report.html"
    write_whole(html, lambda path: path.write_text(text, encoding="utf-8"))
    return ReportFiles(
        html=html,
        plots=tuple(path for section in (*first, *further) for path in written(section)),
        loss_curves=tuple(picture.path for picture in losses if picture.path is not None),
    )


def write_places(
    scene: Scene,
    directory: Path,
    *,
    images: Sequence[int],
    channels: Sequence[int] | int,
    rank: int | None = None,
) -> tuple[Path, ...]:
    """Write the spatial pictures of some test images, and a page with choosers of image, rank and channel.

    Args:
        scene: the study's.
        directory: the study's; the files go into its `plots/`.
        images: positions in the test split, from 0, at least one.
        channels: which channels, or how many of the first ones.
        rank: R of the pictures; by default that of the best trained model.

    Returns:
        The PNG files, then the page, `spatial.html`.

    Raises:
        InputError: the test split has no such image, or the features no such rank or channel.
        CacheError: features cannot be read.
    """
    check_images(images, len(scene.split.test), "images")
    section = spatial_section(scene, directory / "plots", images=images, channels=channels, rank=rank)
    subtitle = f"{directory.name}: {scene.comparison.data}" if scene.comparison.data else directory.name
    page = directory / "plots" / "spatial.html"
    text = render_places(f"Study {directory.name}: where on the image", subtitle, section)
    write_whole(page, lambda path: path.write_text(text, encoding="utf-8"))
    return (*written(section), page)


def _with_histories(outcomes: Sequence[TrialOutcome]) -> list[Trial]:
    return [(outcome, read_history(Path(outcome.directory))) for outcome in outcomes]


def _ranks(comparison: Comparison, spectrum: Spectrum | None, plots: Path) -> list[Section]:
    if not comparison.rows:
        return []
    return [Section("ranks", "By rank", (rank_picture(comparison, spectrum, plots),))]


def _learning(trials: Sequence[Trial], repeats: Sequence[Trial], plots: Path) -> list[Section]:
    if not any(history for _, history in trials):
        return []
    return [Section("learning", "Learning", (learning_picture(trials, repeats, plots),))]


def _search(views: SearchViews) -> Section:
    captions = {
        "chart-coordinates": "By Optuna: a line a trial through all that was searched; darker is better.",
        "chart-importance": "By Optuna: the part of the objective's spread that each hyperparameter explains.",
    }
    pictures = tuple(Picture(None, chart.id, chart.alt, captions[chart.id], charts=(chart,)) for chart in views.charts)
    table = Table(
        "Hyperparameter importances",
        ("hyperparameter", "importance"),
        tuple((name, f"{value:.2f}") for name, value in views.importances),
    )
    tables = (table,) if views.importances else ()
    return Section("search", "The search", pictures, tables=tables, notes=views.notes)


def _storage(comparison: Comparison, spectrum: Spectrum | None, plots: Path) -> list[Section]:
    sections = []
    if comparison.fronts:
        sections.append(Section("tradeoffs", "Trade-offs", (pareto_picture(comparison.fronts, plots),)))
    if comparison.compression.stored:
        sections.append(compression_section(comparison.compression, plots))
    if spectrum is not None:
        ranks = sorted({row.rank for row in comparison.rows})
        sections.append(Section("spectrum", "Spectrum", (spectrum_picture(spectrum, ranks, plots),)))
    return sections


def _study_file(directory: Path) -> str:
    path = directory / "study.yaml"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        _log.warning("the report goes without the study file: %s", error)
        return "not at hand"
