"""The curves that go into papers and MLflow, as PNG: figures by rank, and each trial's training.

Nothing goes through pyplot, whose global list of figures a driver that lives for days would fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lowrank_tune.files import write_whole
from lowrank_tune.lowrank.svd import Spectrum
from lowrank_tune.measured import Comparison, ComparisonRow
from lowrank_tune.records import TrialOutcome
from lowrank_tune.report.page import Picture
from lowrank_tune.report.style import (
    ABOVE_ONE,
    TOWARDS_ONE,
    Look,
    Trial,
    look_of,
    plain_log,
    quiet_grid,
    rank_axis,
    series,
)
from lowrank_tune.report.text import STOPPED, count, in_order, is_trained


def saved(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, sharp on a phone and of less than about 200 KB."""
    path.parent.mkdir(exist_ok=True)
    write_whole(
        path, lambda temporary: figure.savefig(temporary, format="png", dpi=110, pil_kwargs={"compress_level": 1})
    )
    return path


def rank_picture(comparison: Comparison, spectrum: Spectrum | None, plots: Path) -> Picture:
    """Token cosine and residual ratio by rank."""
    methods = ", ".join(in_order(row.method for row in comparison.rows))
    seeds = any(row.seeds for row in comparison.rows)
    weighted = any(row.residual_ratio_weighted for row in comparison.rows)
    charts = (
        ("Three", "token cosine, residual ratio and that in the answers' metric")
        if weighted
        else ("Two", "token cosine and residual ratio")
    )
    return Picture(
        path=saved(rank_curve(comparison.rows, spectrum), plots / "rank_curve.png"),
        title="Token cosine and ρ by rank",
        alt=f"{charts[0]} line charts against rank, {charts[1]}, one line each for {methods}. "
        "The comparison table has the same figures.",
        caption="Solid: trained. Dashed: controls without training. Black: the SVD, the bound. Both axes are finer "
        "towards 1. Shaded: ± sd over test images, and up to the worst one."
        + (" ρ_W: ρ where errors weigh as they move the language model's answers." if weighted else "")
        + (" Whiskers: mean ± sd over fresh seeds." if seeds else ""),
    )


def rank_curve(rows: Sequence[ComparisonRow], spectrum: Spectrum | None = None) -> Figure:
    """Draw token cosine and residual ratio against rank, a line a method, the SVD's between ranks, too."""
    weighted = any(row.residual_ratio_weighted for row in rows)
    figure = Figure(figsize=(15, 5) if weighted else (10, 5))
    cosine, ratio, *in_metric = figure.subplots(1, 3 if weighted else 2)
    methods, ranks = in_order(row.method for row in rows), sorted({row.rank for row in rows})
    for method in methods:
        own = sorted((row for row in rows if row.method == method), key=lambda row: row.rank)
        _draw_method(cosine, ratio, own, look_of(method, methods))
        for axes in in_metric:
            _draw_in_metric(axes, own, look_of(method, methods))
    if spectrum is not None:
        between = [rank for rank in spectrum.ranks.tolist() if ranks[0] <= rank <= ranks[-1]]
        cosine.plot(between, spectrum.cosine_K[[rank - 1 for rank in between]], color="#000000", linewidth=0.8)
    TOWARDS_ONE.on_matplotlib(
        cosine, [value for row in rows for value in (row.token_cosine_mean, row.token_cosine_seed_mean) if value]
    )
    ABOVE_ONE.on_matplotlib(
        ratio, [1.0, *(value for row in rows for value in (row.residual_ratio, row.residual_ratio_max) if value)]
    )
    cosine.set_ylabel("token cosine (finer towards 1)")
    ratio.set_ylabel("residual ratio ρ (finer towards 1)")
    for axes in in_metric:
        ABOVE_ONE.on_matplotlib(axes, [1.0, *(row.residual_ratio_weighted or 1.0 for row in rows)])
        axes.set_ylabel("ρ_W, in the metric of the answers (finer towards 1)")
    for axes in (cosine, ratio, *in_metric):
        rank_axis(axes, ranks)
        quiet_grid(axes)
    handles, labels = cosine.get_legend_handles_labels()
    if any(row.seeds for row in rows):
        handles.append(Line2D([], [], color="#444444", marker="_", markersize=9, linestyle="none"))
        labels.append("mean ± sd over fresh seeds")
    # Margins by hand: a layout engine draws everything twice.
    figure.subplots_adjust(
        left=0.05 if weighted else 0.08, right=0.985, top=0.97, bottom=0.13 + 0.05 * -(-len(labels) // 5), wspace=0.22
    )
    figure.legend(handles, labels, loc="lower center", ncols=min(5, len(labels)), frameon=False)
    return figure


def _draw_method(cosine: Axes, ratio: Axes, rows: Sequence[ComparisonRow], look: Look) -> None:
    ranks, method = [row.rank for row in rows], rows[0].method
    means = [row.token_cosine_mean for row in rows]
    # Above the rank of any image there is no ρ.
    ratios = [row.residual_ratio for row in rows if row.residual_ratio]
    worst = [row.residual_ratio_max for row in rows if row.residual_ratio_max]
    style: dict[str, Any] = {"color": look.color, "marker": look.marker, "linestyle": look.line}
    for axes, values in ((cosine, means), (ratio, ratios)):
        axes.plot(ranks[: len(values)], values, label=method, linewidth=look.width, **style)
    if not is_trained(method):
        return
    band: dict[str, Any] = {"color": look.color, "alpha": 0.1, "linewidth": 0}
    spread = [row.token_cosine_sd for row in rows]
    cosine.fill_between(ranks, np.subtract(means, spread), np.minimum(np.add(means, spread), 1), **band)
    ratio.fill_between(ranks[: len(worst)], ratios, worst, **band)
    for row in rows:
        for axes, mean, sd, ends in (
            (cosine, row.token_cosine_seed_mean, row.token_cosine_seed_sd, (-1.0, 1.0)),
            (ratio, row.residual_ratio_seed_mean, row.residual_ratio_seed_sd, (1.0, np.inf)),
        ):
            if mean is not None:
                whisker = np.clip([mean - (sd or 0), mean, mean + (sd or 0)], *ends)
                # Beside the line's own marker, which would hide a short whisker.
                axes.plot([row.rank * 1.08] * 3, whisker, color=look.color, marker="_", markersize=9, linewidth=1.4)


def _draw_in_metric(axes: Axes, rows: Sequence[ComparisonRow], look: Look) -> None:
    known = [(row.rank, row.residual_ratio_weighted) for row in rows if row.residual_ratio_weighted]
    axes.plot(
        [rank for rank, _ in known],
        [ratio for _, ratio in known],
        color=look.color,
        marker=look.marker,
        linestyle=look.line,
        linewidth=look.width,
    )


def loss_pictures(trials: Sequence[Trial]) -> list[Picture]:
    """The curves of every trial that left a history, in its own folder; those newer than their history stay."""
    figure = Figure(figsize=(9, 5.6))  # one for all: most of the time goes into making axes and their ticks
    pictures = []
    for outcome, history in trials:
        path, trial_id = Path(outcome.directory) / "loss_curves.png", outcome.config.trial_id
        if history and not (path.is_file() and path.stat().st_mtime > path.with_name("history.json").stat().st_mtime):
            draw_losses(figure, outcome, history)
            saved(figure, path)
        if history:
            third = "residual ratio" if outcome.config.target_error is None else "bytes at the target error"
            shown = f"Training loss, validation MSE, validation {third} and learning rate"
            alt = f"{shown} of {trial_id} against epochs."
            caption = "Dotted: the learning rate dropped. Star: the epoch of the saved model."
            pictures.append(Picture(caption, path=path, title=trial_id, alt=alt))
    return pictures


_PANELS = {
    "train_loss": "training loss",
    "val_mse": "validation MSE",
    "val_residual_ratio": "validation residual ratio ρ",
    "lr": "learning rate",
}


_BYTES_PANEL = {"val_bytes_at_error": "validation bytes at the target error"}


def draw_losses(figure: Figure, outcome: TrialOutcome, history: list[dict[str, float]]) -> None:
    """Draw one trial's training in four panels, in place of the one that the figure showed before."""
    if not figure.axes:
        figure.subplots_adjust(left=0.1, right=0.985, bottom=0.09, top=0.9, wspace=0.3, hspace=0.08)
        for axes, label in zip(figure.subplots(2, 2, sharex=True).flat, _PANELS.values(), strict=True):
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            quiet_grid(axes)
        for axes in figure.axes[-2:]:
            axes.set_xlabel("epoch")
    epochs, rates = series(history, "lr")
    drops = [epoch for epoch, before, after in zip(epochs[1:], rates, rates[1:], strict=False) if after < before]
    panels = dict(_PANELS)
    if outcome.config.target_error is not None:  # then the training goes by it
        panels = dict(list(_PANELS.items())[:2]) | _BYTES_PANEL | {"lr": _PANELS["lr"]}
    for axes, (name, label) in zip(figure.axes, panels.items(), strict=True):
        axes.set_ylabel(label)
        for artist in [*axes.lines, *axes.texts]:
            artist.remove()
        epochs, values = series(history, name)
        if name == "lr":
            axes.step(epochs, values, where="mid", color="#444444", linewidth=1.6)
        else:
            axes.plot(epochs, values, color=look_of(outcome.config.method).color, marker=".", linewidth=1.6)
            if outcome.best_epoch in epochs:
                best = values[epochs.index(outcome.best_epoch)]
                axes.plot(outcome.best_epoch, best, "*", markersize=14, color="#000000", label="best epoch")
        for epoch in drops:
            axes.axvline(epoch - 0.5, color="#888888", linestyle=":", linewidth=1)
        if not values:
            axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", va="center", color="#666666")
        axes.relim()
        axes.autoscale()
        ABOVE_ONE.on_matplotlib(axes, values) if name == "val_residual_ratio" else plain_log(axes, values)
    ending = f"{outcome.config.trial_id}: {STOPPED[outcome.stopped_by]} ({count(outcome.epochs, 'epoch')})"
    best_epoch = f", best at epoch {outcome.best_epoch} (★)" if outcome.best_epoch else ""
    reason = f"\n{outcome.reason[:110]}" if outcome.reason else ""
    figure.suptitle(f"{ending}{best_epoch}{reason}", fontsize=11, parse_math=False)
