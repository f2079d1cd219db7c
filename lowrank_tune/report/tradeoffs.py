"""Trade-offs: every candidate of a study by what it costs and what it gives, and the front of those worth having."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from lowrank_tune.records import Front
from lowrank_tune.report.palette import in_order, look_of
from lowrank_tune.report.scales import plain_log, quiet_grid, rank_axis, spread_towards_one

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
