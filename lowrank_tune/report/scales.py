"""Axes on which the differences that matter can be seen, with plain numbers at the ticks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

MOST_RANK_TICKS = 9

_Scale = Callable[[NDArray[np.float64]], NDArray[np.float64]]

# Ticks in order of preference: where two would touch, the earlier one stays.
_COSINE_TICKS = (
    *(0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999, 0, 0.5, 0.95, 0.995, 0.9995, 0.8, 0.98, 0.998, 0.9998),
    *(0.7, 0.97, 0.997, 0.3, 0.93, 0.993, -0.5, -1),
)
# A method that is exact would lie at infinity on the cosine axis; beyond this it is drawn as exact.
_CLOSEST_TO_ONE = 1e-7
_RATIO_TICKS = (1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1.1, 2, 1.02, 5, 1.2, 1.5, 1.05, 20, 50, 200, 500, 3, 1.01)
# Ticks on an axis at most, roughly.
_MOST_TICKS = 14
# Where the ratio's axis turns from logarithmic in ρ − 1 to linear: finer differences from the optimum matter to nobody.
_RATIO_GRAIN = 0.01
# A span of values under this factor reads better on a linear axis.
_LINEAR_SPAN = 8.0


def spread_towards_one(axes: Axes, values: Sequence[float]) -> None:
    """Scale a y axis of cosines by −log(1 − cosine), so that 0.99 and 0.999 lie as far apart as 0.9 and 0.99.

    Args:
        axes: whose y axis.
        values: the cosines that the axis must hold.
    """
    _stretch(
        axes,
        values or [0.5],
        lambda cosine: -np.log10(np.maximum(1 - cosine, _CLOSEST_TO_ONE)),
        lambda stretched: 1 - 10.0**-stretched,
        _COSINE_TICKS,
    )


def spread_above_one(axes: Axes, values: Sequence[float]) -> None:
    """Scale a y axis of residual ratios by log(ρ − 1 + 0.01), so that 1.02 stands apart from the optimum beside a 20.

    Args:
        axes: whose y axis.
        values: the ratios that the axis must hold.
    """
    _stretch(
        axes,
        values or [1.0],
        lambda ratio: np.log10(np.maximum(ratio - 1, -0.9 * _RATIO_GRAIN) + _RATIO_GRAIN),
        lambda stretched: 1 - _RATIO_GRAIN + 10.0**stretched,
        _RATIO_TICKS,
    )


def _stretch(axes: Axes, values: Sequence[float], forward: _Scale, inverse: _Scale, ticks: Sequence[float]) -> None:
    axes.set_yscale("function", functions=(forward, inverse))
    low, high = forward(np.array([min(values), max(values)], dtype=np.float64))
    margin = 0.06 * (high - low) + 0.02
    bottom, top = inverse(np.array([low - margin, high + margin]))
    axes.set_ylim(bottom, top)
    inside: list[float] = []
    for tick in ticks:
        distances = np.abs(forward(np.array([*inside, np.inf])) - forward(np.array([tick], dtype=np.float64)))
        if bottom <= tick <= top and distances.min() * _MOST_TICKS >= high - low + 2 * margin:
            inside.append(tick)
    axes.yaxis.set_major_locator(FixedLocator(inside) if len(inside) >= 2 else MaxNLocator(5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_tick_text))


def _tick_text(value: float, _position: float | None = None) -> str:
    """All digits of a cosine, and no more than five characters of a large number: 0.99999, 5000, 1e5."""
    return f"{value:.7g}" if abs(value) < 1e4 else f"{value:.2g}".replace("e+0", "e").replace("e+", "e")


def plain_log(axes: Axes, values: Sequence[float]) -> None:
    """Make a y axis logarithmic where its values span enough to need it.

    Args:
        axes: whose y axis.
        values: what is drawn there; a single non-positive one keeps the axis linear.
    """
    axes.yaxis.set_major_formatter(FuncFormatter(_tick_text))
    if not values or min(values) <= 0 or max(values) < _LINEAR_SPAN * min(values):
        return
    axes.set_yscale("log")
    decades = np.log10(max(values) / min(values))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick_text))
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
