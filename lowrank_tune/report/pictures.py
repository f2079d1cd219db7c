"""Each still picture with its words and its interactive twin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lowrank_tune.lowrank.files import write_whole
from lowrank_tune.records import Comparison, Front, TrialOutcome
from lowrank_tune.report.charts import Chart
from lowrank_tune.report.curves import Trial, learning_curves, loss_curves, rank_curve
from lowrank_tune.report.html import Picture
from lowrank_tune.report.learning_charts import learning_charts, spectrum_charts
from lowrank_tune.report.maps import spatial_figure
from lowrank_tune.report.palette import in_order
from lowrank_tune.report.rank_charts import rank_charts, tradeoff_charts
from lowrank_tune.report.spatial import SpatialView
from lowrank_tune.report.spectrum import Spectrum, spectrum_figure
from lowrank_tune.report.tradeoffs import pareto_figure
from lowrank_tune.report.words import count

DPI = 110
"""Pixels an inch: sharp on a phone, and a picture stays under about 200 KB."""


def rank_picture(comparison: Comparison, spectrum: Spectrum | None, plots: Path) -> Picture:
    """Token cosine and ρ by rank."""
    methods = ", ".join(in_order(row.method for row in comparison.rows))
    seeds = any(row.seeds for row in comparison.rows)
    return saved(
        rank_curve(comparison.rows),
        plots / "rank_curve.png",
        title="Token cosine and ρ by rank",
        alt=f"Two line charts against rank, token cosine and residual ratio, one line each for {methods}. "
        "The comparison table has the same figures.",
        caption="Solid: trained. Dashed: controls without training. Black: the SVD, the bound. Both axes are finer "
        "towards 1." + (" Shaded, with whiskers: mean ± sd over fresh seeds." if seeds else ""),
        charts=rank_charts(comparison.rows, spectrum),
    )


def pareto_picture(fronts: Sequence[Front], plots: Path) -> Picture:
    """The trade-offs."""
    members = "; ".join(
        f"{front.name}: " + ", ".join(f"{p.trial_id or p.method} at rank {p.rank}" for p in front.points if p.on_front)
        for front in fronts
    )
    return saved(
        pareto_figure(fronts),
        plots / "pareto.png",
        title="What a rank and a byte buy",
        alt=f"Scatter charts of cost against quality. On the fronts, {members}. pareto.json has every figure.",
        caption=f"Filled and joined: the Pareto front, which nothing beats. {members[:1].upper()}"
        f"{members[1:]}. Trials by validation figures, methods by test figures; a rank has the same bytes whatever the "
        "method.",
        charts=tradeoff_charts(fronts),
    )


def learning_picture(trials: Sequence[Trial], confirmations: Sequence[Trial], plots: Path) -> Picture:
    """Every trial's learning curve."""
    families = ", ".join(in_order(outcome.config.family for outcome, _ in trials))
    repeated = any(history for _, history in confirmations)
    return saved(
        learning_curves(trials),
        plots / "learning_curves.png",
        title="Learning curves",
        alt=f"Validation residual ratio against epochs for {count(len(trials), 'trial')} of {families}, coloured by "
        "rank. The trials table tells where each ended.",
        caption="One line a trial; the marker at its end tells what stopped it."
        + (" Shaded: mean ± sd over the fresh seeds of a configuration trained again." if repeated else ""),
        charts=learning_charts(trials, confirmations),
    )


def spectrum_picture(spectrum: Spectrum, ranks: Sequence[int], plots: Path) -> Picture:
    """The spectrum of the test features."""
    images = len(spectrum.values_NK)
    of = f"{count(images, 'test image')}" + (f" of {spectrum.test_images}" if images < spectrum.test_images else "")
    return saved(
        spectrum_figure(spectrum, ranks),
        plots / "spectrum.png",
        title="Spectrum of the test features",
        alt=f"Two line charts over {of}: singular values divided by the first, and the share of the squared norm that "
        "the SVD leaves at each rank.",
        caption=f"Of {of}. Shaded: from the least to the greatest of any image. Dotted: the ranks of the study. A "
        "steep fall means that few directions hold an image; where it is flat, a rank more buys little.",
        charts=spectrum_charts(spectrum, ranks),
    )


def loss_picture(outcome: TrialOutcome, history: list[dict[str, float]]) -> Picture:
    """One trial's training."""
    trial_id = outcome.config.trial_id
    return saved(
        loss_curves(outcome, history),
        Path(outcome.directory) / "loss_curves.png",
        title=trial_id,
        alt=f"Training loss, validation MSE, validation residual ratio and learning rate of {trial_id} against epochs.",
        caption="Dotted: the learning rate dropped. Star: the epoch of the saved model.",
    )


def spatial_picture(view: SpatialView, plots: Path) -> Picture:
    """One test image's maps."""
    height, width = view.norm_HW.shape
    cosines = ", ".join(f"{method.method} {method.token_cosine:.4f}" for method in view.reconstructions)
    return saved(
        spatial_figure(view),
        plots / f"spatial-{view.image:03d}-r{view.rank:03d}.png",
        title=f"Test image {view.image}",
        alt=f"Test image {view.image} at rank {view.rank}: error maps, token cosine, and "
        f"{count(len(view.channels), 'channel')} of the {height} by {width} grid of tokens, original beside "
        f"reconstruction. Token cosine: {cosines}.",
        caption=f"Each cell is one of {height} x {width} tokens. A row shares one colour scale.",
        wide=False,
        replaced=True,
    )


def saved(
    figure: Figure,
    path: Path,
    *,
    title: str,
    alt: str,
    caption: str,
    wide: bool = True,
    charts: tuple[Chart, ...] = (),
    replaced: bool = False,
) -> Picture:
    """Write a figure as PNG and tell of it."""
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI))
    return Picture(path, title, alt, caption, wide, charts, replaced)
