"""Axes on which the differences that matter can be seen, with plain numbers at the ticks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from lowrank_tune.report.stretch import ABOVE_ONE, TOWARDS_ONE, Stretch, tick_text

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
