"""The look that all interactive charts share, and how one gets into the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lowrank_tune.report.palette import look_of
from lowrank_tune.report.stretch import Stretch, tick_text

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
