"""Curves: figures against rank, and learning against epochs.

Every function returns a matplotlib Figure of its own; nothing goes through pyplot, whose global list of figures a
driver that lives for days would fill.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from numpy.typing import ArrayLike

from lowrank_tune.records import ComparisonRow, TrialOutcome
from lowrank_tune.report.history import series
from lowrank_tune.report.palette import in_order, is_trained, look_of
from lowrank_tune.report.scales import (
    epoch_axis,
    plain_log,
    quiet_grid,
    rank_axis,
    spread_above_one,
    spread_towards_one,
    thinned,
)
from lowrank_tune.report.words import STOPPED, count

Trial = tuple[TrialOutcome, list[dict[str, float]]]
"""A trial and its history, from `read_history`."""

STOP_MARKERS = {"budget": "o", "patience": "s", "asha": "v", "interruption": "d", "error": "X"}


def rank_curve(rows: Sequence[ComparisonRow]) -> Figure:
    """Draw token cosine and residual ratio against rank, a line a method.

    Args:
        rows: the comparison's rows, at least one.

    Returns:
        A figure of two panels. Bands, for the trained families: ± 1 sd over images of the token cosine, and up to the
        worst image's residual ratio. Whiskers: mean ± sd over fresh seeds, where there are any.
    """
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    cosine, ratio = figure.subplots(1, 2)
    methods = in_order(row.method for row in rows)
    for method in methods:
        own = sorted((row for row in rows if row.method == method), key=lambda row: row.rank)
        _rank_line(cosine, own, [row.token_cosine_mean for row in own], methods)
        _rank_line(ratio, own, [row.residual_ratio_mean for row in own], methods)
        if is_trained(method):
            means, spread = [row.token_cosine_mean for row in own], [row.token_cosine_sd for row in own]
            _band(cosine, own, np.subtract(means, spread), np.minimum(np.add(means, spread), 1), methods)
            _band(
                ratio, own, [row.residual_ratio_mean for row in own], [row.residual_ratio_max for row in own], methods
            )
            _seed_whiskers(cosine, ratio, [row for row in own if row.seeds], methods)
    for axes in (cosine, ratio):
        rank_axis(axes, sorted({row.rank for row in rows}))
        quiet_grid(axes)
    cosine.set_title("Token cosine: mean, band ± sd over test images", fontsize=11)
    cosine.set_ylabel("token cosine (finer towards 1)")
    spread_towards_one(
        cosine, [value for row in rows for value in (row.token_cosine_mean, row.token_cosine_seed_mean) if value]
    )
    ratio.set_title("Residual ratio: mean, band to the worst test image", fontsize=11)
    ratio.set_ylabel("residual ratio ρ (finer towards 1)")
    spread_above_one(
        ratio, [1.0, *(row.residual_ratio_mean for row in rows), *(row.residual_ratio_max for row in rows)]
    )
    handles, labels = cosine.get_legend_handles_labels()
    if any(row.seeds for row in rows):
        handles.append(Line2D([], [], color="#444444", marker="_", markersize=9, linestyle="none"))
        labels.append("mean ± sd over fresh seeds")
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, max(len(labels), 1)), frameon=False)
    return figure


def _rank_line(axes: Axes, rows: Sequence[ComparisonRow], values: Sequence[float], methods: Sequence[str]) -> None:
    look = look_of(rows[0].method, methods)
    axes.plot(
        [row.rank for row in rows],
        values,
        color=look.color,
        marker=look.marker,
        linestyle=look.line,
        linewidth=look.width,
        label=rows[0].method,
    )


def _band(axes: Axes, rows: Sequence[ComparisonRow], low: ArrayLike, high: ArrayLike, methods: Sequence[str]) -> None:
    color = look_of(rows[0].method, methods).color
    axes.fill_between([row.rank for row in rows], low, high, color=color, alpha=0.15, linewidth=0)


def _seed_whiskers(cosine: Axes, ratio: Axes, rows: Sequence[ComparisonRow], methods: Sequence[str]) -> None:
    for row in rows:
        # Beside the line's own marker, which would hide a short whisker.
        place, color = row.rank * 1.08, look_of(row.method, methods).color
        for axes, mean, sd, most in (
            (cosine, row.token_cosine_seed_mean, row.token_cosine_seed_sd, 1.0),
            (ratio, row.residual_ratio_seed_mean, row.residual_ratio_seed_sd, np.inf),
        ):
            if mean is not None:
                low, high = max(mean - (sd or 0), 1.0 if axes is ratio else -1.0), min(mean + (sd or 0), most)
                axes.vlines(place, low, high, color=color, linewidth=1.4)
                axes.plot([place] * 3, [low, mean, high], color=color, marker="_", markersize=9, linestyle="none")


def loss_curves(outcome: TrialOutcome, history: list[dict[str, float]]) -> Figure:
    """Draw one trial's training: loss, validation MSE, residual ratio and learning rate against epochs.

    Args:
        outcome: how the trial ended.
        history: its epochs, from `read_history`.

    Returns:
        A figure of four panels; dotted lines where the learning rate dropped, a star at the epoch of the saved model.
    """
    # Margins by hand: a layout engine draws everything twice, and a study may have hundreds of these.
    figure = Figure(figsize=(9, 5.6))
    figure.subplots_adjust(left=0.1, right=0.985, bottom=0.09, top=0.9, wspace=0.26, hspace=0.08)
    panels = {
        "train_loss": "training loss",
        "val_mse": "validation MSE",
        "val_residual_ratio": "validation residual ratio ρ",
        "lr": "learning rate",
    }
    look = look_of(outcome.config.family)
    drops = _drops(history)
    for axes, (name, label) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
        epochs, values = series(history, name)
        if name == "lr":
            axes.step(epochs, values, where="mid", color="#444444", linewidth=1.6)
        else:
            axes.plot(epochs, values, color=look.color, marker=".", linewidth=1.6)
        spread_above_one(axes, values) if name == "val_residual_ratio" else plain_log(axes, values)
        _mark_best(axes, outcome.best_epoch, dict(zip(epochs, values, strict=True)), name)
        for epoch in drops:
            axes.axvline(epoch - 0.5, color="#888888", linestyle=":", linewidth=1)
        if not values:
            axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", va="center", color="#666666")
        axes.set_ylabel(label)
        epoch_axis(axes)
        quiet_grid(axes)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("epoch")
    figure.suptitle(_trial_title(outcome), fontsize=11, parse_math=False)
    return figure


def _trial_title(outcome: TrialOutcome) -> str:
    epochs = count(outcome.epochs, "epoch")
    ending = f"{outcome.config.trial_id}: {STOPPED[outcome.stopped_by]} ({epochs})"
    if outcome.best_epoch:
        ending += f", best at epoch {outcome.best_epoch} (★)"
    return ending if not outcome.reason else f"{ending}\n{outcome.reason[:110]}"


def _mark_best(axes: Axes, best_epoch: int, values: dict[float, float], name: str) -> None:
    if name != "lr" and best_epoch in values:
        axes.plot(best_epoch, values[best_epoch], "*", markersize=14, color="#000000", label="best epoch")


def _drops(history: list[dict[str, float]]) -> list[float]:
    epochs, rates = series(history, "lr")
    return [epoch for epoch, before, after in zip(epochs[1:], rates, rates[1:], strict=False) if after < before]


def learning_curves(trials: Sequence[Trial]) -> Figure:
    """Draw every trial's validation residual ratio against epochs, a panel a family, coloured by rank.

    Args:
        trials: outcomes with their histories, at least one of them not empty.

    Returns:
        A figure, each panel with a scale of its own; the marker at a curve's end tells what stopped that trial.
    """
    trials = [(outcome, history) for outcome, history in trials if history]
    families = in_order(outcome.config.family for outcome, _ in trials)
    ranks = sorted({outcome.config.rank for outcome, _ in trials})
    figure = Figure(figsize=(max(5.5, 4.6 * len(families)), 4.6), layout="constrained")
    panels = figure.subplots(1, len(families), squeeze=False)[0]
    colors, norm = _rank_colors(), LogNorm(ranks[0] / 1.2, ranks[-1] * 1.2)
    for axes, family in zip(panels, families, strict=True):
        drawn = [1.0]
        for outcome, history in trials:
            epochs, values = series(history, "val_residual_ratio")
            if outcome.config.family != family or not values:
                continue
            color = colors(norm(outcome.config.rank))
            axes.plot(epochs, values, color=color, linewidth=1.2, alpha=0.85)
            marker = STOP_MARKERS[outcome.stopped_by]
            axes.plot(epochs[-1:], values[-1:], color=color, marker=marker, markeredgecolor="#222222", markersize=7)
            drawn += values
        axes.set_title(family, fontsize=11)
        axes.set_xlabel("epoch")
        # A scale a family: beside one that diverges, the others would be a flat line.
        spread_above_one(axes, drawn)
        epoch_axis(axes)
        quiet_grid(axes)
    panels[0].set_ylabel("validation residual ratio ρ (finer towards 1)")
    _rank_bar(figure, panels, ranks, colors, norm)
    figure.legend(handles=_stop_handles(trials), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _rank_colors() -> Colormap:
    # The last sixth of viridis is too pale to see on white.
    return ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.85, 256)))


def _rank_bar(figure: Figure, panels: np.ndarray, ranks: list[int], colors: Colormap, norm: LogNorm) -> None:
    bar = figure.colorbar(mpl.cm.ScalarMappable(norm, colors), ax=list(panels), label="rank")
    shown = thinned(ranks)
    bar.set_ticks(shown, labels=[str(rank) for rank in shown])
    bar.ax.yaxis.set_minor_locator(NullLocator())


def _stop_handles(trials: Sequence[Trial]) -> list[Line2D]:
    present = {outcome.stopped_by for outcome, _ in trials}
    return [
        Line2D([], [], color="#888888", linestyle="none", marker=marker, markeredgecolor="#222222", label=STOPPED[stop])
        for stop, marker in STOP_MARKERS.items()
        if stop in present
    ]
