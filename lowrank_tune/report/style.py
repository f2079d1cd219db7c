"""How methods look, the scales on which they differ, and what all charts share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from lowrank_tune.records import TrialOutcome

Number = TypeVar("Number", int, float)
Trial = tuple[TrialOutcome, list[dict[str, float]]]
"""A trial and its epochs."""


def series(history: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """The epochs at which a figure is a finite number, and its values there."""
    points = [(epoch["epoch"], epoch[name]) for epoch in history if math.isfinite(epoch.get(name, math.nan))]
    return [epoch for epoch, _ in points], [value for _, value in points]


class Look(NamedTuple):
    """How matplotlib draws a method."""

    color: str
    marker: str
    line: str = "-"
    width: float = 2.2


_KNOWN = {
    "svd": Look("#000000", "o", "-", 1.8),
    "svd_weighted": Look("#000000", "+", "-.", 1.4),
    "svd_rows": Look("#000000", "x", ":", 1.2),
    "random_sketch": Look("#E69F00", "v", "--", 1.2),
    "pca_basis": Look("#56B4E9", "^", "--", 1.2),
    "power_1": Look("#7F7F7F", "<", "--", 1.2),
    "randomized_svd": Look("#CC79A7", ">", "--", 1.2),
    "gram_eigh": Look("#999933", "*", "--", 1.2),
    "direct": Look("#D55E00", "s"),
    "sketch": Look("#0072B2", "D"),
    "refined": Look("#009E73", "P"),
    "shared": Look("#882255", "X"),
    "refined_weighted": Look("#44AA99", "p", "-."),
    "shared_weighted": Look("#AA4499", "h", "-."),
}
_FURTHER = (Look("#332288", "h"), Look("#AA4499", "p"), Look("#117733", "d"))
SYMBOLS = {
    "o": "circle", "x": "x-thin", "v": "triangle-down", "^": "triangle-up", "<": "triangle-left", ">": "triangle-right",
    "s": "square", "D": "diamond", "P": "cross", "X": "x", "h": "hexagon2", "p": "pentagon", "d": "diamond-tall",
    "*": "star", "+": "cross-thin",
}  # fmt: skip
"""plotly's names of matplotlib's markers."""
DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
"""And of its lines."""
INK, SOFT, GRID = "#1a1a1a", "#595959", "#e4e4e4"


def look_of(method: str, methods: Iterable[str] = ()) -> Look:
    """A method's look; a family without one of its own gets one that differs from the other `methods`'."""
    if method in _KNOWN:
        return _KNOWN[method]
    unknown = sorted({name for name in (*methods, method) if name not in _KNOWN})
    return _FURTHER[unknown.index(method) % len(_FURTHER)]


def tick_text(value: float, _position: float | None = None) -> str:
    """All digits of a cosine, few of a large number: 0.99999, 5000, 1e5."""
    return f"{value:.7g}" if abs(value) < 1e4 else f"{value:.2g}".replace("e+0", "e").replace("e+", "e")


@dataclass(frozen=True, slots=True)
class AxisScale:
    """A scale that is finer where methods differ."""

    forward: Callable[[NDArray[np.float64]], NDArray[np.float64]]  # values to places on the axis
    inverse: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    ticks: tuple[float, ...]  # in order of preference: where two would touch, the earlier one stays
    default: float  # a value to scale an empty axis by

    def place(self, values: Sequence[float]) -> list[float]:
        """Where values lie on the axis."""
        places: list[float] = self.forward(np.asarray(values, dtype=np.float64)).tolist()
        return places

    def ends(self, values: Sequence[float]) -> tuple[float, float]:
        """The places at which an axis that holds these values begins and ends."""
        values = values or [self.default]
        low, high = self.place([min(values), max(values)])
        margin = 0.06 * (high - low) + 0.02
        return low - margin, high + margin

    def ticks_for(self, values: Sequence[float]) -> list[float]:
        """The ticks that such an axis has room for, two at least."""
        low, high = self.ends(values)
        inside: list[float] = []
        for tick in self.ticks:
            (place,) = self.place([tick])
            apart = min((abs(place - other) for other in self.place(inside)), default=np.inf)
            if low <= place <= high and apart * 14 >= high - low:
                inside.append(tick)
        if len(inside) < 2:
            inside = [round(float(value), 6) for value in self.inverse(np.linspace(low, high, 5)[1:-1])]
        return inside

    def on_plotly(self, values: Sequence[float]) -> dict[str, Any]:
        """Plotly's axis for these values, which are drawn at their places."""
        ticks = self.ticks_for(values)
        return {"range": self.ends(values), "tickvals": self.place(ticks), "ticktext": list(map(tick_text, ticks))}

    def on_matplotlib(self, axes: Axes, values: Sequence[float]) -> None:
        """Give matplotlib's y axis this scale."""
        axes.set_yscale("function", functions=(self.forward, self.inverse))
        axes.set_ylim(*self.inverse(np.array(self.ends(values))))
        axes.yaxis.set_major_locator(FixedLocator(self.ticks_for(values)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(tick_text))


# A method that is exact would lie at infinity; beyond 1 - 1e-7 it is drawn as exact.
TOWARDS_ONE = AxisScale(
    lambda cosine: -np.log10(np.maximum(1 - cosine, 1e-7)),
    lambda place: 1 - 10.0**-place,
    (
        *(0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999, 0, 0.5, 0.95, 0.995, 0.9995, 0.8, 0.98, 0.998, 0.9998),
        *(0.7, 0.97, 0.997, 0.3, 0.93, 0.993, -0.5, -1),
    ),
    0.5,
)
"""Cosines by −log(1 − cosine): 0.99 and 0.999 lie as far apart as 0.9 and 0.99."""

# Differences from the optimum that are finer than this matter to nobody.
_GRAIN = 0.01
ABOVE_ONE = AxisScale(
    lambda ratio: np.log10(np.maximum(ratio - 1, -0.9 * _GRAIN) + _GRAIN),
    lambda place: 1 - _GRAIN + 10.0**place,
    (1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1.1, 2, 1.02, 5, 1.2, 1.5, 1.05, 20, 50, 200, 500, 3, 1.01),
    1.0,
)
"""Residual ratios by log(ρ − 1 + 0.01): 1.02 stands apart from the optimum beside a 20."""


def plain_log(axes: Axes, values: Sequence[float]) -> None:
    """Make matplotlib's y axis logarithmic where its values need it."""
    if values and min(values) > 0 and max(values) >= 8 * min(values):
        axes.set_yscale("log")
        decades = np.log10(max(values) / min(values))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_yscale("linear")
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(tick_text))


def rank_axis(axes: Axes, ranks: Sequence[int]) -> None:
    """Make matplotlib's x axis one of sorted ranks: logarithmic, a tick at each that has room for it."""
    axes.set_xlabel("rank")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(thinned(ranks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    if len(ranks) == 1:
        axes.set_xlim(ranks[0] / 1.5, ranks[0] * 1.5)


def thinned(ranks: Sequence[Number]) -> list[Number]:
    """Choose, of sorted ranks or sizes, those whose labels do not touch on a logarithmic axis."""
    apart = (ranks[-1] / ranks[0]) ** (1 / 9)
    shown = [ranks[0]]
    for rank in ranks[1:]:
        if rank >= shown[-1] * apart:
            shown.append(rank)
    return shown


def quiet_grid(axes: Axes) -> None:
    """Draw a pale grid behind the curves."""
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


_AXIS = {
    "gridcolor": GRID, "linecolor": SOFT, "showline": True, "zeroline": False, "automargin": True, "ticks": "outside",
    "tickcolor": SOFT,
}  # fmt: skip
QUIET = go.layout.Template(
    layout={
        "font": {"family": 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif', "size": 13, "color": INK},
        "margin": {"l": 60, "r": 16, "t": 30, "b": 48},
        "legend": {"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0, "xanchor": "left"},
        "hoverlabel": {"align": "left"},
        "dragmode": False,  # fingers scroll
        "xaxis": {**_AXIS, "title": {"standoff": 6}},
        "yaxis": {**_AXIS, "title": {"standoff": 8}},
    }
)
"""How plotly draws every chart of the page."""


def log_steps(values: Sequence[float]) -> list[float]:
    """Ticks of a logarithmic axis, as many as a phone has room for; it has no place for what is not above 0."""
    placed = [value for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(placed))), math.ceil(math.log10(max(placed)))
    span = max(placed) / min(placed)
    steps = (1, 2, 3, 4, 5, 6, 8) if span < 5 else (1, 2, 5) if span < 2e3 else (1,)
    return [step * 10.0**decade for decade in range(low, high + 1) for step in steps]


def log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Plotly's logarithmic axis with the ticks of `log_steps`."""
    ticks = log_steps(values)
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,.4g}" for tick in ticks]}
