"""Curves: figures against rank, and learning against epochs.

Every function returns a matplotlib Figure of its own; nothing goes through pyplot, whose global list of figures a
driver that lives for days would fill.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
import plotly.colors
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

from lowrank_tune.files import write_whole
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.svd import Spectrum, measure_optimum
from lowrank_tune.records import (
    Comparison,
    ComparisonRow,
    Compression,
    Front,
    FrontPoint,
    PrunedRow,
    QuantisedRow,
    StoredRow,
    TrialOutcome,
)
from lowrank_tune.report.spatial import SpatialView, spatial_figure
from lowrank_tune.report.style import (
    ABOVE_ONE,
    INK,
    SYMBOLS,
    TOWARDS_ONE,
    Chart,
    Stretch,
    chart,
    epoch_axis,
    in_order,
    is_trained,
    line_of,
    look_of,
    pale,
    plain_log,
    quiet_grid,
    quiet_layout,
    rank_axis,
    rank_ticks,
    spread_above_one,
    spread_towards_one,
    stretched_axis,
    thinned,
    tick_text,
)
from lowrank_tune.report.text import ABSENT, STOPPED, cosine_text, count, rate_text, ratio_text, seed_texts, series


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG in the report, or what stands in its place where scripts run.

    Attributes:
        path: the file; None for what only a script draws.
        title: a few words.
        alt: what it shows, for those who cannot see it.
        caption: how to read it.
        wide: whether a phone must scroll sideways to read its labels, rather than shrink it.
        charts: the same, interactive.
        replaced: whether something else of the section stands in its place where scripts run.
    """

    path: Path | None
    title: str
    alt: str
    caption: str
    wide: bool = True
    charts: tuple[Chart, ...] = ()
    replaced: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts.

    Attributes:
        label: what it holds.
        head: its columns' names; all but the first column are numbers.
        rows: the first text of each is its header.
        caption: how to read it.
    """

    label: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Places:
    """The interactive view of test images.

    Attributes:
        data: from `places_json`.
        rank: the one that is shown first.
    """

    data: str
    rank: int


@dataclass(frozen=True, slots=True)
class Section:
    """A heading of the report with what stands below it; `id` is its anchor."""

    id: str
    title: str
    pictures: tuple[Picture, ...] = ()
    lead: str = ""
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    places: Places | None = None


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


LABELS = {
    "rank": "rank",
    "val_mse": "validation MSE",
    "bytes_per_image": "KiB an image, A and B",
    "token_cosine_mean": "token cosine (finer towards 1)",
}
TITLES = {"search": "Every trial: rank against error", "storage": "Every method: storage against token cosine"}


def pareto_figure(fronts: Sequence[Front]) -> Figure:
    """Draw trade-offs, a panel each.

    Args:
        fronts: at least one, each with a candidate.

    Returns:
        A figure in which the front's members are filled and joined, the others hollow.
    """
    figure = Figure(figsize=(max(5.5, 5.0 * len(fronts)), 4.8), layout="constrained")
    methods = in_order(point.method for front in fronts for point in front.points)
    for axes, front in zip(figure.subplots(1, len(fronts), squeeze=False)[0], fronts, strict=True):
        _draw(axes, front, methods)
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, linestyle="none", label=method)
        for method, look in ((method, look_of(method, methods)) for method in methods)
    ]
    front_handle = Line2D([], [], color="#888888", linewidth=1.2, label="front")
    figure.legend(handles=[*handles, front_handle], loc="outside lower center", ncols=5, frameon=False)
    return figure


def _draw(axes: Axes, front: Front, methods: Sequence[str]) -> None:
    members = [point for point in front.points if point.on_front]
    axes.step(
        [point.x for point in members], [point.y for point in members], where="post", color="#888888", linewidth=1.2
    )
    for point in front.points:
        look = look_of(point.method, methods)
        axes.plot(
            point.x,
            point.y,
            color=look.color,
            marker=look.marker,
            markersize=7 if point.on_front else 6,
            markerfacecolor=look.color if point.on_front or look.marker == "x" else "none",
            linestyle="none",
            alpha=1.0 if point.on_front else 0.75,
        )
    values = [point.y for point in front.points]
    rank_axis(axes, sorted({round(point.x) for point in front.points}))
    if front.x == "bytes_per_image":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:,.4g}"))
    plain_log(axes, values) if front.better == "lower" else spread_towards_one(axes, values)
    axes.margins(x=0.08)
    axes.set_xlabel(LABELS[front.x])
    axes.set_ylabel(LABELS[front.y])
    axes.set_title(TITLES[front.name], fontsize=11)
    quiet_grid(axes)


Figures = Callable[[ComparisonRow], tuple[float, float | None, float | None]]
"""A row's mean on the test split, and the mean and sd over fresh seeds."""


def rank_charts(rows: Sequence[ComparisonRow], spectrum: Spectrum | None) -> tuple[Chart, ...]:
    """Draw token cosine and residual ratio against rank, a chart each, a line a method.

    Args:
        rows: the comparison's rows, at least one.
        spectrum: gives the SVD's cosine at the ranks between; None leaves the line to the ranks compared.
    """
    methods = ", ".join(in_order(row.method for row in rows))
    cosine = _rank_figure(
        rows, TOWARDS_ONE, lambda row: (row.token_cosine_mean, row.token_cosine_seed_mean, row.token_cosine_seed_sd)
    )
    _layout(cosine, rows, "token cosine (finer towards 1)")
    cosines = [row.token_cosine_mean for row in rows]
    cosine.update_layout(yaxis=stretched_axis(TOWARDS_ONE, cosines))
    if spectrum is not None:
        _every_rank(cosine, rows, spectrum)
    ratio = _rank_figure(
        rows,
        ABOVE_ONE,
        lambda row: (row.residual_ratio_mean, row.residual_ratio_seed_mean, row.residual_ratio_seed_sd),
    )
    _layout(ratio, rows, "residual ratio ρ (finer towards 1)")
    ratio.update_layout(yaxis=stretched_axis(ABOVE_ONE, [1.0, *(row.residual_ratio_mean for row in rows)]))
    alt = f"Line chart of {{}} against rank, one line each for {methods}. The comparison table has the same figures."
    return (
        chart("cosine", "Token cosine by rank", cosine, alt.format("token cosine"), 470),
        chart("ratio", "Residual ratio ρ by rank: 1 is the optimum", ratio, alt.format("the residual ratio"), 470),
    )


def _rank_figure(rows: Sequence[ComparisonRow], stretch: Stretch, figures: Figures) -> go.Figure:
    figure = go.Figure()
    methods = in_order(row.method for row in rows)
    for method in methods:
        own = sorted((row for row in rows if row.method == method), key=lambda row: row.rank)
        if is_trained(method):
            _seed_band(figure, [row for row in own if row.seeds], stretch, figures, methods)
        figure.add_scatter(
            x=[row.rank for row in own],
            y=stretch.place([figures(row)[0] for row in own]),
            name=method,
            legendgroup=method,
            text=[_hover(row) for row in own],
            hovertemplate="%{text}<extra></extra>",
            **line_of(method, methods),
        )
    return figure


def _hover(row: ComparisonRow) -> str:
    lines = [
        f"<b>{row.method}</b> at rank {row.rank}",
        f"token cosine {cosine_text(row.token_cosine_mean)} ± {row.token_cosine_sd:.4f} over images",
        f"ρ {ratio_text(row.residual_ratio_mean)}, worst image {ratio_text(row.residual_ratio_max)}",
        f"{rate_text(row.images_per_second)} images/s",
    ]
    ratio, cosine = seed_texts(row)
    if ratio != ABSENT:
        lines.append(f"over {row.seeds} fresh seeds: token cosine {cosine}, ρ {ratio}")
    return "<br>".join([*lines, row.trial_id] if row.trial_id else lines)


def _seed_band(
    figure: go.Figure, rows: Sequence[ComparisonRow], stretch: Stretch, figures: Figures, methods: Sequence[str]
) -> None:
    """A band of mean ± sd over fresh seeds: filled where there are ranks to join, a whisker where there is one."""
    known = [(row, figures(row)[1], figures(row)[2] or 0.0) for row in rows]
    spans = [(row, mean, mean - sd, mean + sd) for row, mean, sd in known if mean is not None]
    if not spans:
        return
    color = look_of(spans[0][0].method, methods).color
    ranks = [row.rank for row, *_ in spans]
    group = {"legendgroup": rows[0].method, "showlegend": False, "hoverinfo": "skip"}
    if len(spans) > 1:
        high = stretch.place([high_end for *_, high_end in spans])
        low = stretch.place([low_end for *_, low_end, _ in spans])
        figure.add_scatter(
            x=[*ranks, *reversed(ranks)], y=[*high, *reversed(low)], fill="toself", mode="lines",
            fillcolor=pale(color, 0.3), line={"width": 0}, name=f"{rows[0].method} over seeds", **group,
        )  # fmt: skip
    for row, mean, low_end, high_end in spans:
        below, place, above = stretch.place([low_end, mean, high_end])
        figure.add_scatter(
            # Beside the line's own marker, which would hide a short whisker.
            x=[row.rank * 1.05], y=[place], mode="markers",
            error_y={"array": [above - place], "arrayminus": [place - below], "symmetric": False},
            marker={"symbol": "line-ew-open", "size": 9, "color": color, "line": {"width": 2}},
            name=f"{row.method} over seeds", **group,
        )  # fmt: skip


def _every_rank(figure: go.Figure, rows: Sequence[ComparisonRow], spectrum: Spectrum) -> None:
    low, high = min(row.rank for row in rows) / 1.6, max(row.rank for row in rows) * 1.6
    shown = [(int(rank), cosine) for rank, cosine in zip(spectrum.ranks, spectrum.cosine_K, strict=True)]
    shown = [(rank, cosine) for rank, cosine in shown if low <= rank <= high]
    figure.add_scatter(
        x=[rank for rank, _ in shown],
        y=TOWARDS_ONE.place([cosine for _, cosine in shown]),
        mode="lines",
        line={"color": "#000000", "width": 1},
        name="svd at every rank",
        legendgroup="svd",
        showlegend=False,
        text=[f"<b>svd</b> at rank {rank}<br>token cosine {cosine_text(cosine)}" for rank, cosine in shown],
        hovertemplate="%{text}<extra></extra>",
    )


def _layout(figure: go.Figure, rows: Sequence[ComparisonRow], y: str) -> None:
    ranks = sorted({row.rank for row in rows})
    figure.update_layout(quiet_layout("rank", y))
    figure.update_layout(xaxis=rank_ticks(ranks))


def tradeoff_charts(fronts: Sequence[Front]) -> tuple[Chart, ...]:
    """Draw trade-offs, a chart each: the front's members filled and joined, the others hollow."""
    return tuple(_tradeoff(front) for front in fronts)


def _tradeoff(front: Front) -> Chart:
    figure = go.Figure()
    scaled = TOWARDS_ONE if front.better == "higher" else None
    members = [point for point in front.points if point.on_front]
    figure.add_scatter(
        x=[point.x for point in members],
        y=_placed(members, scaled),
        mode="lines",
        line={"color": "#767676", "width": 1.4, "shape": "hv"},
        name="front",
        hoverinfo="skip",
    )
    methods = in_order(point.method for point in front.points)
    for method in methods:
        own = [point for point in front.points if point.method == method]
        look = look_of(method, methods)
        symbol = SYMBOLS[look.marker].removesuffix("-open")
        figure.add_scatter(
            x=[point.x for point in own],
            y=_placed(own, scaled),
            mode="markers",
            name=method,
            marker={
                "symbol": [symbol if point.on_front and symbol != "x-thin" else f"{symbol}-open" for point in own],
                "color": look.color,
                "size": 9,
                "line": {"width": 1.6, "color": look.color},
            },
            text=[_point_text(point, front) for point in own],
            hovertemplate="%{text}<extra></extra>",
        )
    xs = sorted({point.x for point in front.points})
    figure.update_layout(quiet_layout(LABELS[front.x], LABELS[front.y]))
    per_tick = 1024 if front.x == "bytes_per_image" else 1
    figure.update_layout(xaxis={"type": "log", "tickvals": xs, "ticktext": [f"{x / per_tick:,.4g}" for x in xs]})
    values = [point.y for point in front.points]
    figure.update_layout(yaxis=stretched_axis(TOWARDS_ONE, values) if scaled else {"type": "log", "dtick": 1})
    joined = ", ".join(f"{point.trial_id or point.method} at rank {point.rank}" for point in members)
    title = TITLES[front.name]
    return chart(
        f"pareto-{front.name}", title, figure, f"Scatter chart: {TITLES[front.name]}. On the front: {joined}.", 440
    )


def _placed(points: Sequence[FrontPoint], stretch: Stretch | None) -> list[float]:
    values = [point.y for point in points]
    return stretch.place(values) if stretch else values


def _point_text(point: FrontPoint, front: Front) -> str:
    y = cosine_text(point.y) if front.better == "higher" else f"{point.y:.4g}"
    named = f"<b>{point.trial_id or point.method}</b> at rank {point.rank}"
    return f"{named}<br>{LABELS[front.y].partition(' (')[0]} {y}" + ("<br>on the front" if point.on_front else "")


MOST_IMAGES = 128
"""Test images that the spectrum is taken of, at most, spread evenly over the split."""
_BATCH = 8
# Beyond this part of the first singular value float16 features hold nothing but rounding.
_VALUE_FLOOR = 1e-5


def measure_spectrum(data: FeatureMatrix, test: Sequence[int]) -> Spectrum | None:
    """Take the spectrum of test images.

    Args:
        data: the features.
        test: indices of the test images.

    Returns:
        Of the images that are not all zeros; None when there is none.

    Raises:
        CacheError: features cannot be read.
    """
    places = np.unique(np.linspace(0, len(test) - 1, min(MOST_IMAGES, len(test))).round().astype(int))
    seen = [index for index in (test[place] for place in places) if data.load([index]).any()]
    if not seen:
        return None
    count = min(data.tokens, data.dim)
    optimum = measure_optimum(data.batches(seen, _BATCH))
    residual_NK = optimum.residual_NR[:, :count].numpy()
    energy_N1 = optimum.energy_N.numpy()[:, None]
    squares_NK = -np.diff(np.concatenate([energy_N1, residual_NK], axis=1), axis=1)
    values_NK = np.sqrt(np.maximum(squares_NK, 0))
    return Spectrum(
        values_NK=values_NK / values_NK[:, :1],
        cosine_K=optimum.token_cosine_NR[:, :count].mean(dim=0).numpy(),
        left_K=(residual_NK / energy_N1).mean(axis=0),
        test_images=len(test),
    )


def shown_ranks(spectrum: Spectrum) -> NDArray[np.int64]:
    """The ranks whose singular values are more than rounding, at least the first."""
    mean_K = spectrum.values_NK.mean(axis=0)
    return spectrum.ranks[: max(1, int((mean_K > _VALUE_FLOOR).sum()))]


def spectrum_figure(spectrum: Spectrum, ranks: Sequence[int]) -> Figure:
    """Draw the spectrum, and what the SVD leaves at each rank.

    Args:
        spectrum: from `measure_spectrum`.
        ranks: the study's, marked.
    """
    shown = shown_ranks(spectrum)
    values_NK = spectrum.values_NK[:, : len(shown)]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    values, left = figure.subplots(1, 2)
    low, high = np.maximum(values_NK.min(axis=0), _VALUE_FLOOR), values_NK.max(axis=0)
    values.fill_between(shown, low, high, color="#0072B2", alpha=0.2, linewidth=0)
    values.plot(shown, values_NK.mean(axis=0), color="#0072B2", linewidth=1.8)
    values.set_title("Singular values over the first: mean and range over images", fontsize=11)
    left.plot(shown, np.maximum(spectrum.left_K[: len(shown)], _VALUE_FLOOR**2), color="#000000", linewidth=1.8)
    left.set_title("Share of the squared norm that the SVD leaves", fontsize=11)
    for axes in (values, left):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("rank")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
        axes.xaxis.set_minor_locator(NullLocator())
        for rank in ranks:
            axes.axvline(rank, color="#888888", linestyle=":", linewidth=1)
        quiet_grid(axes)
    return figure


_RATIO = "val_residual_ratio"


def learning_charts(trials: Sequence[Trial], confirmations: Sequence[Trial]) -> tuple[Chart, ...]:
    """Draw every trial's validation residual ratio against epochs, a chart a family, coloured by rank.

    Args:
        trials: outcomes with their histories, at least one of them not empty.
        confirmations: repetitions with theirs; those of a trial are drawn as a band of mean ± sd over seeds.
    """
    seen = [(outcome, history) for outcome, history in trials if series(history, _RATIO)[1]]
    ranks = sorted({outcome.config.rank for outcome, _ in seen})
    # The last sixth of viridis is too pale to see on white.
    places = [0.85 * place / max(len(ranks) - 1, 1) for place in range(len(ranks))]
    colors = dict(zip(ranks, plotly.colors.sample_colorscale("Viridis", places, colortype="tuple"), strict=True))
    shades = {rank: _hex(color) for rank, color in colors.items()}
    return tuple(
        _family_chart(
            family,
            [trial for trial in seen if trial[0].config.family == family],
            [trial for trial in confirmations if trial[0].config.family == family],
            shades,
        )
        for family in in_order(outcome.config.family for outcome, _ in seen)
    )


def _family_chart(
    family: str, trials: Sequence[Trial], confirmations: Sequence[Trial], colors: dict[int, str]
) -> Chart:
    figure = go.Figure()
    drawn = [1.0]
    for confirmed in dict.fromkeys(outcome.config.confirms for outcome, _ in confirmations):
        repeats = [(outcome, history) for outcome, history in confirmations if outcome.config.confirms == confirmed]
        drawn += _seed_range(figure, repeats, colors)
    named: set[int] = set()
    for outcome, history in sorted(trials, key=lambda trial: trial[0].config.rank):
        rank = outcome.config.rank
        drawn += _trial_line(figure, outcome, history, colors[rank], rank not in named)
        named.add(rank)
    for stop in dict.fromkeys(outcome.stopped_by for outcome, _ in trials):
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=STOPPED[stop], hoverinfo="skip",
            marker={"symbol": SYMBOLS[STOP_MARKERS[stop]], "size": 9, "color": "#888888", "line": {"width": 1}},
        )  # fmt: skip
    figure.update_layout(quiet_layout("epoch", "validation ρ (finer towards 1)"))
    last = max(outcome.epochs for outcome, _ in trials)
    figure.update_layout(
        yaxis=stretched_axis(ABOVE_ONE, drawn), xaxis={"tickformat": "d", "dtick": max(1, -(-last // 8))}
    )
    ends = ", ".join(
        f"{outcome.config.trial_id} {STOPPED[outcome.stopped_by]} at epoch {outcome.epochs}"
        for outcome, _ in list(trials)[:12]
    )
    more = f", and {len(trials) - 12} more" if len(trials) > 12 else ""
    alt = (
        f"Validation residual ratio of {count(len(trials), 'trial')} of {family} against epochs, coloured by rank: "
        f"{ends}{more}. The trials table has them all."
    )
    return chart(f"learning-{family}", family, figure, alt, 420)


def _trial_line(
    figure: go.Figure, outcome: TrialOutcome, history: list[dict[str, float]], color: str, in_legend: bool
) -> list[float]:
    epochs, values = series(history, _RATIO)
    config, last = outcome.config, len(values) - 1
    placed = ABOVE_ONE.place(values)
    settings = ", ".join(f"{key} {value:.3g}" for key, value in {"lr": config.lr, **config.family_params}.items())
    ending = f"<br>{STOPPED[outcome.stopped_by]} at epoch {outcome.epochs}"
    ending += f": {outcome.reason[:120]}" if outcome.reason else ""
    figure.add_scatter(
        x=epochs,
        y=placed,
        mode="lines+markers",
        name=f"rank {config.rank}",
        legendgroup=f"rank {config.rank}",
        showlegend=in_legend,
        line={"color": color, "width": 1.6},
        marker={
            "symbol": [*["circle"] * last, SYMBOLS[STOP_MARKERS[outcome.stopped_by]]],
            "size": [*[3] * last, 10],
            "color": color,
            "line": {"color": INK, "width": [*[0] * last, 1]},
        },
        text=[
            f"<b>{config.trial_id}</b><br>{settings}<br>epoch {epoch:.0f}: ρ {ratio_text(value)}"
            + (ending if place == last else "")
            for place, (epoch, value) in enumerate(zip(epochs, values, strict=True))
        ],
        hovertemplate="%{text}<extra></extra>",
    )
    return values


def _seed_range(figure: go.Figure, repeats: Sequence[Trial], colors: dict[int, str]) -> list[float]:
    config = repeats[0][0].config
    lines = [dict(zip(*series(history, _RATIO), strict=True)) for _, history in repeats]
    epochs = sorted(set.intersection(*(set(line) for line in lines))) if all(lines) else []
    if len(lines) < 2 or not epochs or config.rank not in colors:
        return []
    values_SE = np.array([[line[epoch] for epoch in epochs] for line in lines])
    mean, spread = values_SE.mean(axis=0), values_SE.std(axis=0, ddof=1)
    low, high = np.maximum(mean - spread, 1.0).tolist(), (mean + spread).tolist()
    figure.add_scatter(
        x=[*epochs, *reversed(epochs)],
        y=[*ABOVE_ONE.place(high), *reversed(ABOVE_ONE.place(low))],
        fill="toself",
        mode="lines",
        line={"width": 0},
        fillcolor=pale(colors[config.rank], 0.25),
        name=f"{config.confirms} over {len(lines)} seeds",
        legendgroup=f"rank {config.rank}",
        showlegend=False,
        hoverinfo="skip",
    )
    return [*low, *high]


def spectrum_charts(spectrum: Spectrum, ranks: Sequence[int]) -> tuple[Chart, ...]:
    """Draw the singular values, mean and range over images, and what the SVD leaves at each rank.

    Args:
        spectrum: from `measure_spectrum`.
        ranks: the study's, marked.
    """
    shown = shown_ranks(spectrum)
    values_NK = spectrum.values_NK[:, : len(shown)]
    x, mean = shown.tolist(), values_NK.mean(axis=0).tolist()
    low, high = np.maximum(values_NK.min(axis=0), 1e-6).tolist(), values_NK.max(axis=0).tolist()
    values = go.Figure()
    values.add_scatter(
        x=[*x, *reversed(x)], y=[*high, *reversed(low)], fill="toself", mode="lines", line={"width": 0},
        fillcolor=pale("#0072B2", 0.2), name="range over images", hoverinfo="skip",
    )  # fmt: skip
    values.add_scatter(
        x=x, y=mean, mode="lines", line={"color": "#0072B2", "width": 2}, name="mean",
        hovertemplate="singular value %{x}: %{y:.3g} of the first<extra></extra>",
    )  # fmt: skip
    values.update_layout(quiet_layout("number", "share of the first"))
    left = go.Figure()
    left.add_scatter(
        x=x, y=np.maximum(spectrum.left_K[: len(x)], 1e-12).tolist(), mode="lines", showlegend=False,
        line={"color": "#000000", "width": 2},
        hovertemplate="rank %{x}: the SVD leaves %{y:.3g} of the squared norm<extra></extra>",
    )  # fmt: skip
    left.update_layout(quiet_layout("rank", "share of ‖X‖²"))
    for figure in (values, left):
        figure.update_layout(xaxis={"type": "log", "dtick": "D2"})
        figure.update_layout(yaxis={"type": "log", "dtick": 1, "tickformat": "~g"})
        for rank in ranks:
            figure.add_vline(x=rank, line={"color": "#888888", "width": 1, "dash": "dot"})
    at = ", ".join(f"{spectrum.left_K[rank - 1]:.3g} at rank {rank}" for rank in ranks if rank <= len(x))
    alts = (
        f"Line chart of the mean singular value over the first, falling to {mean[-1]:.2g}.",
        f"Line chart of the share of the squared norm that the SVD leaves: {at}.",
    )
    return (
        chart("spectrum", "Singular values over the first", values, alts[0], 380),
        chart("left", "What the SVD leaves of the squared norm", left, alts[1], 380),
    )


def _hex(color: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in color)


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


FEATURES = "x"
_LOOKS = {
    "float16": ("#767676", "o"), "int8": ("#0072B2", "s"), "int5": ("#009E73", "^"), "int4": ("#CC79A7", "D"),
}  # fmt: skip
"""Colour and marker of each dtype."""
_CONTROL = ("#D55E00", "X")
_ERROR_FLOOR = 1e-3
"""Percent: smaller errors, which a logarithmic axis has no place for, are drawn here."""
_X, _Y = "KiB an image", "relative error, %"
_TITLES = ("A rank for all images", "As many components as each image needs")

Row = TypeVar("Row", StoredRow, PrunedRow)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the pictures.

    Attributes:
        name: in the legend.
        color: hex RGB.
        marker: matplotlib's code; empty for none.
        dash: matplotlib's line style.
        kib: x, by rising bytes.
        errors: y, in percent.
        labels: what each point is.
        shown: whether the labels stand in the still picture.
    """

    name: str
    color: str
    marker: str
    dash: str
    kib: tuple[float, ...]
    errors: tuple[float, ...]
    labels: tuple[str, ...]
    shown: bool = False


def compression_section(compression: Compression, plots: Path) -> Section:
    """Make the section of a comparison that measured bytes against error.

    Args:
        compression: with stored rows.
        plots: where the still picture goes.
    """
    whole = next((row for row in compression.stored if (row.method, row.dtype) == (FEATURES, "float16")), None)
    panels = (_fixed(compression.stored), _pruned(compression))
    picture = saved(
        _figure(panels, whole),
        plots / "compression.png",
        title="Bytes against error",
        alt="Two line charts of relative error against KiB an image: factors in float16, int8, int5 and int4 at each "
        "rank, and with a rank an image, each beside X itself in int8, int5 and int4. The tables have the figures.",
        caption="Lower and further left is better. Orange: X itself with a scale a token, the control that factors "
        "must beat. Left: the best trained factors of each rank, the SVD's dotted. Right: the SVD's leading "
        "components, for each image as few as meet a target; crosses: the best trained ones, up to the highest rank "
        "compared. Dashed: X in float16.",
        charts=tuple(_chart(place, lines, whole) for place, lines in enumerate(panels)),
    )
    tables = [_targets(compression), _stored(compression.stored, whole)]
    if compression.models:
        tables.append(_models(compression.models))
    return Section(
        "compression",
        "Bytes against error",
        (picture,),
        lead="What an image takes when it is stored as factors in few bits, and what is lost by it, beside X itself in "
        "as few bits. Relative error: ‖X − Y‖ / ‖X‖ of what comes back, Y.",
        tables=tuple(tables),
        notes=compression.words,
    )


def _fixed(stored: Sequence[StoredRow]) -> list[Line]:
    lines = []
    for dtype, (color, marker) in _LOOKS.items():
        own = sorted((row for row in stored if row.dtype == dtype and row.rank), key=lambda row: row.rank)
        svd = [row for row in own if row.method == "svd"]
        trained = [row for row in own if row.method != "svd"]
        if trained:
            lines.append(_line(f"svd, {dtype}", color, "", ":", svd, _of_rank))
        if own:
            lines.append(_line(dtype, color, marker, "-", trained or svd, _of_rank, shown=dtype == "float16"))
    return [*lines, _control(stored)]


def _pruned(compression: Compression) -> list[Line]:
    met = [row for row in compression.pruned if row.bytes_per_image is not None]
    lines = []
    for method in sorted({row.method for row in met}, key=lambda method: method != "svd"):
        for dtype, (color, marker) in _LOOKS.items():
            own = [row for row in met if (row.method, row.dtype) == (method, dtype)]
            own.sort(key=lambda row: row.bytes_per_image or 0.0)
            look = (marker, "-") if method == "svd" else ("x", "")
            name = dtype if method == "svd" else f"{method}, {dtype}"
            if own:
                lines.append(_line(name, color, *look, own, _of_target))
    return [*lines, _control(compression.stored)]


def _control(stored: Sequence[StoredRow]) -> Line:
    own = [row for row in stored if row.method == FEATURES and row.dtype != "float16"]
    own.sort(key=lambda row: row.bytes_per_image)
    return _line("X itself", *_CONTROL, "-", own, lambda row: row.dtype, shown=True)


def _line(
    name: str,
    color: str,
    marker: str,
    dash: str,
    rows: Sequence[Row],
    label: Callable[[Row], str],
    shown: bool = False,
) -> Line:
    return Line(
        name,
        color,
        marker,
        dash,
        tuple((row.bytes_per_image or 0.0) / 1024 for row in rows),
        tuple(max(100 * (row.relative_error_mean or 0.0), _ERROR_FLOOR) for row in rows),
        tuple(label(row) for row in rows),
        shown,
    )


def _of_rank(row: StoredRow) -> str:
    return f"rank {row.rank}"


def _of_target(row: PrunedRow) -> str:
    return f"{row.rank_mean:.0f} components"


def _figure(panels: Sequence[Sequence[Line]], whole: StoredRow | None) -> Figure:
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    for axes, lines, title in zip(figure.subplots(1, len(panels)), panels, _TITLES, strict=True):
        _draw_bytes(axes, lines, whole)
        axes.set_title(title, fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    named = {label: handle for handle, label in zip(handles, labels, strict=True) if not label.startswith("svd,")}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def _draw_bytes(axes: Axes, lines: Sequence[Line], whole: StoredRow | None) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for line in lines:
        bold = line.color == _CONTROL[0]
        axes.plot(
            line.kib, line.errors, color=line.color, marker=line.marker or None, linestyle=line.dash or "none",
            linewidth=2.4 if bold else 1.4, markersize=9 if bold or line.marker == "x" else 6, label=line.name,
            zorder=3 if bold else 2,
        )  # fmt: skip
        for x, y, label in zip(line.kib, line.errors, line.labels, strict=True) if line.shown else ():
            axes.annotate(
                label, (x, y), (7, 4), textcoords="offset points", fontsize=9, color=line.color,
                fontweight="bold" if bold else "normal",
            )  # fmt: skip
    if whole is not None:
        axes.axvline(whole.bytes_per_image / 1024, color="#888888", linestyle="--", linewidth=1.2, label="X in float16")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.09, y=0.08)
    axes.set_xlabel(_X)
    axes.set_ylabel(_Y)
    quiet_grid(axes)


def _chart(place: int, lines: Sequence[Line], whole: StoredRow | None) -> Chart:
    figure = go.Figure()
    shown: set[str] = set()
    for line in lines:
        method, comma, dtype = line.name.partition(", ")
        figure.add_scatter(
            x=line.kib, y=line.errors, name={"svd": "the SVD's"}.get(method, method),
            mode="+".join(part for part, there in (("lines", line.dash), ("markers", line.marker)) if there),
            line={
                "color": line.color,
                "width": 1.4 + (line.name == "X itself"),
                "dash": "dot" if line.dash == ":" else "solid",
            },
            marker={
                "symbol": SYMBOLS.get(line.marker, "circle"),
                "size": 9,
                "color": line.color,
                "line": {"width": 1.6, "color": line.color},
            },
            # Lines of one method beside those that give the dtypes' colours are one entry of the legend.
            showlegend=method not in shown,
            legendgroup=dtype if comma else method,
            text=[
                f"<b>{line.name}</b>, {label}<br>{x:,.4g} KiB an image<br>relative error {y:.3g} %"
                for x, y, label in zip(line.kib, line.errors, line.labels, strict=True)
            ],
            hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
        shown.add(method)
    errors = [error for line in lines for error in line.errors]
    if whole is not None and errors:
        figure.add_scatter(
            x=[whole.bytes_per_image / 1024] * 2, y=[min(errors), max(errors)], mode="lines", name="X in float16",
            line={"color": "#888888", "width": 1.4, "dash": "dash"}, hoverinfo="skip",
        )  # fmt: skip
    sizes = [kib for line in lines for kib in line.kib]
    figure.update_layout(quiet_layout(_X, _Y))
    figure.update_layout(
        xaxis=_log_ticks(sizes),
        yaxis=_log_ticks(errors),
    )
    alt = f"Line chart: {_TITLES[place]}: relative error against KiB an image. The tables below have the figures."
    return chart(f"compression-{place}", _TITLES[place], figure, alt, 470)


def _log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis with a tick at each 1, 2 and 5 of its decades."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    ticks = [step * 10.0**decade for decade in range(low, high + 1) for step in (1, 2, 5)]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,.4g}" for tick in ticks]}


def _targets(compression: Compression) -> Table:
    controls = [row for row in compression.stored if row.method == FEATURES]
    trained = next((row.method for row in compression.pruned if row.method != "svd"), "")
    rows = []
    for target in dict.fromkeys(row.target for row in compression.pruned):
        at = next((row for row in controls if row.dtype == target), None)
        if at is None:
            met = [row for row in controls if row.relative_error_max <= float(target)]
            at = min(met, key=lambda row: row.bytes_per_image, default=None)
            name = f"{100 * float(target):g} %"
        else:
            name = f"as {target} of X: {_percent(at.relative_error_mean)}"
        own = [_fewest(compression.pruned, target, method) for method in ("svd", trained)]
        rows.append((name, f"{_kib(at.bytes_per_image)}, {at.dtype}" if at else ABSENT, *own))
    return Table(
        "Bytes for an error that every image keeps",
        ("relative error at most", "X itself, KiB", "the SVD's factors, KiB", f"{trained or 'trained'} factors, KiB"),
        tuple(rows),
        caption="The fewest bytes an image, on average, at which every test image is as near. Factors: the dtype that "
        "takes the fewest, and the components an image keeps on average. The SVD may keep as many as there are, "
        f"trained factors as many as the highest rank compared; {ABSENT} where that does not do.",
    )


def _fewest(pruned: Sequence[PrunedRow], target: str, method: str) -> str:
    own = [row for row in pruned if (row.target, row.method) == (target, method) and row.bytes_per_image is not None]
    if not own:
        return ABSENT
    row = min(own, key=lambda row: row.bytes_per_image or 0.0)
    return f"{_kib(row.bytes_per_image or 0.0)}, {row.dtype}, {row.rank_mean:.0f} components"


def _stored(stored: Sequence[StoredRow], whole: StoredRow | None) -> Table:
    trained = any(row.trial_id for row in stored)
    shown = [row for row in stored if row.method == FEATURES or bool(row.trial_id) is trained]
    rows = [
        (
            "X itself" if row.method == FEATURES else f"{row.method}, rank {row.rank}",
            row.dtype,
            _kib(row.bytes_per_image),
            f"{row.bytes_per_image / whole.bytes_per_image:.1%}" if whole else ABSENT,
            _percent(row.relative_error_mean),
            _percent(row.relative_error_max),
            cosine_text(row.token_cosine_mean),
        )
        for row in shown
    ]
    return Table(
        "Factors at each rank and dtype",
        ("stored", "as", "KiB an image", "of X in float16", "relative error", "worst image", "token cosine"),
        tuple(rows),
        caption="Every image at the same rank, scales included; compression.json has the SVD's, too.",
    )


def _models(models: Sequence[QuantisedRow]) -> Table:
    rows = [
        (
            f"{row.method}, rank {row.rank}",
            _kib(row.model_bytes),
            _kib(row.quantised_bytes) if row.quantised_bytes != row.model_bytes else "no learned matrix",
            _percent(row.relative_error_mean),
            _percent(row.quantised_relative_error_mean),
        )
        for row in models
    ]
    return Table(
        "The trained models with int8 matrices",
        ("model", "float32, KiB", "int8, KiB", "relative error", "in int8"),
        tuple(rows),
        caption="Weights only, a scale a row, by torchao. Relative error: of the factors that the model makes.",
    )


def _kib(size: float) -> str:
    return f"{size / 1024:,.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
