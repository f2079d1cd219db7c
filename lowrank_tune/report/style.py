"""The look that all interactive charts share, and how one gets into the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

CONTROLS = ("random_sketch", "pca_basis", "power_1", "randomized_svd")
"""Methods without training, weakest first; the SVD and its row-normalised form stand apart as bounds."""

BOUNDS = ("svd", "svd_rows")
"""What no method beats in flat cosine, and about the best there is in token cosine."""


@dataclass(frozen=True, slots=True)
class Look:
    """How a method is drawn.

    Attributes:
        color: hex RGB.
        marker: matplotlib's marker code.
        line: matplotlib's line style.
        width: points.
    """

    color: str
    marker: str
    line: str
    width: float


_KNOWN = {
    "svd": Look("#000000", "o", "-", 1.8),
    "svd_rows": Look("#000000", "x", ":", 1.2),
    "random_sketch": Look("#E69F00", "v", "--", 1.2),
    "pca_basis": Look("#56B4E9", "^", "--", 1.2),
    "power_1": Look("#7F7F7F", "<", "--", 1.2),
    "randomized_svd": Look("#CC79A7", ">", "--", 1.2),
    "direct": Look("#D55E00", "s", "-", 2.2),
    "sketch": Look("#0072B2", "D", "-", 2.2),
    "refined": Look("#009E73", "P", "-", 2.2),
}
_FURTHER = (
    Look("#882255", "X", "-", 2.2),
    Look("#332288", "h", "-", 2.2),
    Look("#999933", "p", "-", 2.2),
    Look("#117733", "d", "-", 2.2),
)


def is_trained(method: str) -> bool:
    """Tell a trained family from a bound or a control."""
    return method not in BOUNDS and method not in CONTROLS


def in_order(methods: Iterable[str]) -> list[str]:
    """Sort methods for tables and legends: bounds, then trained families by name, then controls; each once."""
    present = set(methods)
    trained = sorted(method for method in present if is_trained(method))
    return [method for method in (*BOUNDS, *trained, *CONTROLS) if method in present]


def look_of(method: str, methods: Iterable[str] = ()) -> Look:
    """Choose a method's look.

    Args:
        method: its name.
        methods: all that share the plot; a family that has no look of its own gets one that differs from theirs.
    """
    if method in _KNOWN:
        return _KNOWN[method]
    unknown = sorted({name for name in (*methods, method) if name not in _KNOWN})
    return _FURTHER[unknown.index(method) % len(_FURTHER)]


_Scale = Callable[[NDArray[np.float64]], NDArray[np.float64]]

# Ticks on an axis at most, roughly.
_MOST_TICKS = 14
# A method that is exact would lie at infinity on the cosine axis; beyond this it is drawn as exact.
_CLOSEST_TO_ONE = 1e-7
# Where the ratio's axis turns from logarithmic in ρ − 1 to linear: finer differences from the optimum matter to nobody.
_RATIO_GRAIN = 0.01


@dataclass(frozen=True, slots=True)
class Stretch:
    """A scale that is finer where methods differ.

    Attributes:
        forward: values to places on the axis.
        inverse: places to values.
        ticks: in order of preference: where two would touch, the earlier one stays.
        default: a value to scale an empty axis by.
    """

    forward: _Scale
    inverse: _Scale
    ticks: tuple[float, ...]
    default: float

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
        """The ticks that such an axis has room for; there may be none."""
        low, high = self.ends(values)
        inside: list[float] = []
        for tick in self.ticks:
            (place,) = self.place([tick])
            apart = min((abs(place - other) for other in self.place(inside)), default=np.inf)
            if low <= place <= high and apart * _MOST_TICKS >= high - low:
                inside.append(tick)
        return inside


TOWARDS_ONE = Stretch(
    lambda cosine: -np.log10(np.maximum(1 - cosine, _CLOSEST_TO_ONE)),
    lambda place: 1 - 10.0**-place,
    (
        *(0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999, 0, 0.5, 0.95, 0.995, 0.9995, 0.8, 0.98, 0.998, 0.9998),
        *(0.7, 0.97, 0.997, 0.3, 0.93, 0.993, -0.5, -1),
    ),
    0.5,
)
"""Cosines by −log(1 − cosine): 0.99 and 0.999 lie as far apart as 0.9 and 0.99."""

ABOVE_ONE = Stretch(
    lambda ratio: np.log10(np.maximum(ratio - 1, -0.9 * _RATIO_GRAIN) + _RATIO_GRAIN),
    lambda place: 1 - _RATIO_GRAIN + 10.0**place,
    (1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1.1, 2, 1.02, 5, 1.2, 1.5, 1.05, 20, 50, 200, 500, 3, 1.01),
    1.0,
)
"""Residual ratios by log(ρ − 1 + 0.01): 1.02 stands apart from the optimum beside a 20."""


def tick_text(value: float, _position: float | None = None) -> str:
    """All digits of a cosine, and no more than five characters of a large number: 0.99999, 5000, 1e5."""
    return f"{value:.7g}" if abs(value) < 1e4 else f"{value:.2g}".replace("e+0", "e").replace("e+", "e")


INK, SOFT, GRID = "#1a1a1a", "#595959", "#e4e4e4"
SYMBOLS = {
    "o": "circle", "x": "x-thin-open", "v": "triangle-down", "^": "triangle-up", "<": "triangle-left",
    ">": "triangle-right", "s": "square", "D": "diamond", "P": "cross", "X": "x", "h": "hexagon2", "p": "pentagon",
    "d": "diamond-tall",
}  # fmt: skip
"""plotly's names of matplotlib's markers."""
_DASHES = {"-": "solid", "--": "dash", ":": "dot"}


@dataclass(frozen=True, slots=True)
class Chart:
    """An interactive chart of the page.

    Attributes:
        id: its anchor, unique in the page.
        title: stands above it, and wraps on a phone.
        figure: plotly's JSON, safe inside a script element.
        alt: what it shows, for those who cannot see it.
        height: pixels.
        wide: whether it must be as wide as on a screen to be read: a phone scrolls it sideways.
    """

    id: str
    title: str
    figure: str
    alt: str
    height: int
    wide: bool = False


def chart(name: str, title: str, figure: go.Figure, alt: str, height: int = 400, wide: bool = False) -> Chart:
    """Make a chart of a figure.

    Args:
        name: a part of its anchor, unique in the page.
        title: what stands above it.
        figure: what to draw.
        alt: what it shows.
        height: pixels.
        wide: whether a phone scrolls it sideways.
    """
    return Chart(f"chart-{name}", title, script_safe(figure.to_json()), alt, height, wide)


def script_safe(text: str) -> str:
    """JSON that cannot end the script element that holds it."""
    return text.replace("<", "\\u003c")


def quiet_layout(x: str, y: str) -> dict[str, Any]:
    """A layout of plain axes, a pale grid, a legend below, and no drag, which would stop a finger from scrolling."""
    axis = {
        "gridcolor": GRID, "linecolor": SOFT, "zeroline": False, "automargin": True, "ticks": "outside",
        "tickcolor": SOFT, "fixedrange": False,
    }  # fmt: skip
    return {
        "template": "none",
        "font": {"family": 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif', "size": 13, "color": INK},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "margin": {"l": 60, "r": 16, "t": 30, "b": 48},
        "legend": {"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0, "xanchor": "left"},
        "hoverlabel": {"align": "left"},
        "dragmode": False,
        "xaxis": {**axis, "title": {"text": x, "standoff": 6}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 8}},
    }


def stretched_axis(stretch: Stretch, values: Sequence[float]) -> dict[str, Any]:
    """The range and ticks of an axis whose values were placed by `stretch.place`."""
    ticks = stretch.ticks_for(values)
    if len(ticks) < 2:
        ticks = [round(float(value), 6) for value in stretch.inverse(np.linspace(*stretch.ends(values), 5)[1:-1])]
    return {"range": stretch.ends(values), "tickvals": stretch.place(ticks), "ticktext": list(map(tick_text, ticks))}


def rank_ticks(ranks: Sequence[int]) -> dict[str, Any]:
    """A logarithmic axis of ranks with a tick at each."""
    return {"type": "log", "tickvals": list(ranks), "ticktext": [str(rank) for rank in ranks]}


def line_of(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """How a method's line and markers are drawn: as in the still pictures."""
    look = look_of(method, methods)
    symbol = SYMBOLS[look.marker]
    marker: dict[str, Any] = {"symbol": symbol, "size": 8, "color": look.color}
    if symbol.endswith("-open"):
        marker["line"] = {"width": 2, "color": look.color}
    return {
        "mode": "lines+markers",
        "line": {"color": look.color, "width": look.width, "dash": _DASHES[look.line]},
        "marker": marker,
    }


def pale(color: str, opacity: float) -> str:
    """A hex colour, let through."""
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


MOST_RANK_TICKS = 9

# A span of values under this factor reads better on a linear axis.
_LINEAR_SPAN = 8.0


def spread_towards_one(axes: Axes, values: Sequence[float]) -> None:
    """Scale a y axis of cosines so that 0.99 and 0.999 lie as far apart as 0.9 and 0.99.

    Args:
        axes: whose y axis.
        values: the cosines that the axis must hold.
    """
    _stretch(axes, values, TOWARDS_ONE)


def spread_above_one(axes: Axes, values: Sequence[float]) -> None:
    """Scale a y axis of residual ratios so that 1.02 stands apart from the optimum beside a 20.

    Args:
        axes: whose y axis.
        values: the ratios that the axis must hold.
    """
    _stretch(axes, values, ABOVE_ONE)


def _stretch(axes: Axes, values: Sequence[float], stretch: Stretch) -> None:
    axes.set_yscale("function", functions=(stretch.forward, stretch.inverse))
    axes.set_ylim(*stretch.inverse(np.array(stretch.ends(values))))
    inside = stretch.ticks_for(values)
    axes.yaxis.set_major_locator(FixedLocator(inside) if len(inside) >= 2 else MaxNLocator(5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(tick_text))


def plain_log(axes: Axes, values: Sequence[float]) -> None:
    """Make a y axis logarithmic where its values span enough to need it.

    Args:
        axes: whose y axis.
        values: what is drawn there; a single non-positive one keeps the axis linear.
    """
    axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
    if not values or min(values) <= 0 or max(values) < _LINEAR_SPAN * min(values):
        return
    axes.set_yscale("log")
    decades = np.log10(max(values) / min(values))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
    axes.yaxis.set_minor_formatter(NullFormatter())


def rank_axis(axes: Axes, ranks: Sequence[int]) -> None:
    """Make the x axis one of ranks: logarithmic, a tick at each rank that has room for its label.

    Args:
        axes: whose x axis.
        ranks: sorted, distinct, at least one.
    """
    axes.set_xlabel("rank")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(thinned(ranks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    if len(ranks) == 1:
        axes.set_xlim(ranks[0] / 1.5, ranks[0] * 1.5)


def thinned(ranks: Sequence[int]) -> list[int]:
    """Choose, of sorted ranks, those whose labels do not touch on a logarithmic axis."""
    apart = (ranks[-1] / ranks[0]) ** (1 / MOST_RANK_TICKS)
    shown = [ranks[0]]
    for rank in ranks[1:]:
        if rank >= shown[-1] * apart:
            shown.append(rank)
    return shown


def epoch_axis(axes: Axes) -> None:
    """Make the x axis one of epochs: whole numbers at the ticks."""
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def quiet_grid(axes: Axes) -> None:
    """Draw a pale grid behind the curves."""
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
