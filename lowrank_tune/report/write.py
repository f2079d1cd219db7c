"""Writing a study's report: its plots, its trials' loss curves, and report.html."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Decomposer, load_decomposer
from lowrank_tune.lowrank.files import write_whole
from lowrank_tune.records import Comparison, ComparisonRow, FeatureSet, Front, Split, TrialOutcome
from lowrank_tune.report.curves import Trial, learning_curves, loss_curves, rank_curve
from lowrank_tune.report.history import read_history
from lowrank_tune.report.html import Contents, Picture, Section, render
from lowrank_tune.report.maps import spatial_figure
from lowrank_tune.report.palette import in_order, is_trained
from lowrank_tune.report.spatial import SpatialView, check_images, spatial_view
from lowrank_tune.report.tradeoffs import pareto_figure
from lowrank_tune.report.words import best_row, count
from lowrank_tune.spec.plan import Plan

_log = logging.getLogger(__name__)

DPI = 110
"""Pixels an inch: sharp on a phone, and a picture stays under about 100 KB."""


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
        directory: the study's; holds `study.yaml`, which the report repeats.
        confirmations: repetitions of the best trials; each gets its loss curves beside its model.

    Returns:
        The files written. An image that the test split does not have is told in the report's remarks instead of failing
        it; `check_images` finds it before a study starts.

    Raises:
        CacheError: the features of an image cannot be read.
    """
    plots = directory / "plots"
    trials: list[Trial] = [(outcome, read_history(Path(outcome.directory))) for outcome in outcomes]
    try:
        check_images(plan.spec.report.images, len(split.test))
    except InputError as error:
        comparison = replace(comparison, remarks=(*comparison.remarks, str(error)))
        _log.warning("%s", error)
    images = [image for image in plan.spec.report.images if image < len(split.test)]
    maps = write_spatial(
        features, split, outcomes, comparison, plots, images=images, channels=plan.spec.report.channels
    )
    sections = [*_curves(comparison, trials, plots), Section("places", "Where on the image", tuple(maps))]
    trials += [(outcome, read_history(Path(outcome.directory))) for outcome in confirmations]
    losses = [_loss_picture(outcome, history) for outcome, history in trials if history]
    standing = {row.trial_id for row in comparison.rows}
    contents = Contents(
        name=plan.spec.name,
        study_id=plan.study_id,
        objective=plan.spec.objective,
        study_file=_study_file(directory),
        features=features,
        split=split,
        outcomes=outcomes,
        comparison=comparison,
    )
    html = directory / "report.html"
    text = render(contents, sections, [picture for picture in losses if picture.title in standing])
    write_whole(html, lambda path: _write_text(path, text))
    return ReportFiles(
        html=html,
        plots=tuple(picture.path for section in sections for picture in section.pictures),
        loss_curves=tuple(picture.path for picture in losses),
    )


def write_spatial(
    features: FeatureSet,
    split: Split,
    outcomes: Sequence[TrialOutcome],
    comparison: Comparison,
    plots: Path,
    *,
    images: Sequence[int],
    channels: int,
    rank: int | None = None,
) -> list[Picture]:
    """Write the spatial pictures of some test images.

    Args:
        features: the study's.
        split: whose test images are counted.
        outcomes: every trial; the models lie in their directories.
        comparison: tells which trained model is nearest to the optimum.
        plots: where the pictures go.
        images: positions in the test split, from 0.
        channels: how many channels each shows.
        rank: R; by default that of the best trained model, or the highest compared where there is none.

    Returns:
        The pictures, with the best trained model of the rank where one can be loaded, else with the SVD alone.

    Raises:
        InputError: the test split has no such image, or the features have no such rank.
        CacheError: features cannot be read.
    """
    check_images(images, len(split.test))
    highest = min(features.tokens, features.dim)
    if rank is not None and not 1 <= rank <= highest:
        raise InputError(f"rank {rank}: these features have ranks 1 to {highest}; choose among them")
    rank, network = _best_network(outcomes, comparison, rank)
    data = FeatureMatrix(features)
    views = (
        spatial_view(data, split, image, rank=min(rank, highest), channels=channels, network=network)
        for image in dict.fromkeys(images)
    )
    return [_spatial_picture(view, plots) for view in views]


def _curves(comparison: Comparison, trials: Sequence[Trial], plots: Path) -> list[Section]:
    sections = []
    if comparison.rows:
        sections.append(Section("ranks", "Figures by rank", (_rank_picture(comparison, plots),)))
    if comparison.fronts:
        sections.append(Section("tradeoffs", "Trade-offs", (_pareto_picture(comparison.fronts, plots),)))
    if any(history for _, history in trials):
        sections.append(Section("learning", "Learning", (_learning_picture(trials, plots),)))
    return sections


def _best_network(
    outcomes: Sequence[TrialOutcome], comparison: Comparison, rank: int | None
) -> tuple[int, Decomposer | None]:
    rows: list[ComparisonRow] = [row for row in comparison.rows if is_trained(row.method)]
    row = best_row(row for row in rows if rank in (None, row.rank))
    directories = {outcome.config.trial_id: Path(outcome.directory) for outcome in outcomes}
    if row is not None and row.trial_id in directories:
        try:
            return row.rank, load_decomposer(directories[row.trial_id] / "best_model.safetensors").eval()
        except InputError as error:
            _log.warning("the spatial pictures go without a network: %s", error)
    compared = max((row.rank for row in comparison.rows), default=1)
    return rank or (row.rank if row else compared), None


def _rank_picture(comparison: Comparison, plots: Path) -> Picture:
    methods = ", ".join(in_order(row.method for row in comparison.rows))
    return _saved(
        rank_curve(comparison.rows),
        plots / "rank_curve.png",
        title="Token cosine and ρ by rank",
        alt=f"Two line charts against rank, token cosine and residual ratio, one line each for {methods}. "
        "The comparison table has the same figures.",
        caption="Solid: trained. Dashed: controls without training. Black: the SVD, the bound. Bands of "
        "trained families: ± 1 sd of the token cosine over images, and up to the worst image's ρ. Both axes are finer "
        "towards 1." + (" Whiskers: mean ± sd over fresh seeds." if any(row.seeds for row in comparison.rows) else ""),
    )


def _pareto_picture(fronts: Sequence[Front], plots: Path) -> Picture:
    members = "; ".join(
        f"{front.name}: " + ", ".join(f"{p.trial_id or p.method} at rank {p.rank}" for p in front.points if p.on_front)
        for front in fronts
    )
    return _saved(
        pareto_figure(fronts),
        plots / "pareto.png",
        title="What a rank and a byte buy",
        alt=f"Scatter charts of cost against quality. On the fronts, {members}. pareto.json has every figure.",
        caption=f"Filled and joined: the Pareto front, which nothing beats. {members[:1].upper()}"
        f"{members[1:]}. Trials by validation figures, methods by test figures; a rank has the same bytes whatever the "
        "method.",
    )


def _learning_picture(trials: Sequence[Trial], plots: Path) -> Picture:
    families = ", ".join(in_order(outcome.config.family for outcome, _ in trials))
    return _saved(
        learning_curves(trials),
        plots / "learning_curves.png",
        title="Learning curves",
        alt=f"Validation residual ratio against epochs for {count(len(trials), 'trial')} of {families}, coloured by "
        "rank. The trials table tells where each ended.",
        caption="One line a trial; the marker at its end tells what stopped it.",
    )


def _loss_picture(outcome: TrialOutcome, history: list[dict[str, float]]) -> Picture:
    trial_id = outcome.config.trial_id
    return _saved(
        loss_curves(outcome, history),
        Path(outcome.directory) / "loss_curves.png",
        title=trial_id,
        alt=f"Training loss, validation MSE, validation residual ratio and learning rate of {trial_id} against epochs.",
        caption="Dotted: the learning rate dropped. Star: the epoch of the saved model.",
    )


def _spatial_picture(view: SpatialView, plots: Path) -> Picture:
    height, width = view.norm_HW.shape
    cosines = ", ".join(f"{method.method} {method.token_cosine:.4f}" for method in view.reconstructions)
    return _saved(
        spatial_figure(view),
        plots / f"spatial-{view.image:03d}-r{view.rank:03d}.png",
        title=f"Test image {view.image}",
        alt=f"Test image {view.image} at rank {view.rank}: error maps, and {count(len(view.channels), 'channel')} of "
        f"the {height} by {width} grid of tokens, original beside reconstruction. Token cosine: {cosines}.",
        caption=f"Each cell is one of {height} x {width} tokens. A row shares one colour scale.",
        wide=False,
    )


def _saved(figure: Figure, path: Path, *, title: str, alt: str, caption: str, wide: bool = True) -> Picture:
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI))
    return Picture(path=path, title=title, alt=alt, caption=caption, wide=wide)


def _study_file(directory: Path) -> str:
    path = directory / "study.yaml"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        _log.warning("the report goes without the study file: %s", error)
        return "not at hand"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
