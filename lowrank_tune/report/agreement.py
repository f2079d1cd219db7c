"""How many answers stay: every way to keep features against bytes and against rank, each chart drawn twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import plotly.graph_objects as go
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lowrank_tune.measured import FACTORS, STAYS, FidelityRow
from lowrank_tune.report.curves import saved
from lowrank_tune.report.page import Chart, Picture
from lowrank_tune.report.rates import PICTURES
from lowrank_tune.report.rates import Line as Rate
from lowrank_tune.report.style import (
    DASHES,
    QUIET,
    SYMBOLS,
    Look,
    log_steps,
    log_ticks,
    look_of,
    quiet_grid,
    rank_axis,
    thinned,
)
from lowrank_tune.report.text import in_order

MOST = round(100 * (1 - STAYS))
"""Percent of the answers at which the charts draw a line."""
_RULE = "#767676"
_STORED = {"coded": "o", "int8": "s", "int5": "^", "int4": "D"}
_UNRANKED = {"half-side": "-.", "quarter-side": ":"}
"""What has no rank and stands beside those that have one all the same, as a level line of its own kind."""

Against = Literal["bytes", "rank"]


class Line(NamedTuple):
    """A way to keep features at its settings."""

    name: str
    look: Look
    rows: tuple[FidelityRow, ...]  # by rising bytes
    stored: bool  # in few bits, by an entropy coder or as a picture, and not as factors: drawn hollow


def picture_of(method: str) -> str:
    """Which of `PICTURES` a method is, whatever its quality; empty where it is none."""
    name = method.partition("-q")[0]
    return name if name in PICTURES else ""


def lines_of(rows: Sequence[FidelityRow]) -> list[Line]:
    """Sort rows into lines: factors as they are, then factors and X stored in other forms, then pictures."""
    methods = in_order(row.method for row in rows if row.form == FACTORS and row.rank)
    found: dict[tuple[str, str], list[FidelityRow]] = {(method, FACTORS): [] for method in methods}
    for row in sorted(rows, key=lambda row: (bool(picture_of(row.method)), row.method == "x")):
        # Factors in float16 stand where those do that are as they are: the table alone tells them apart.
        alike = row.form == "float16" and row.method in methods
        if row.bytes_per_image > 0 and math.isfinite(row.answer_flips) and not alike:
            found.setdefault(_way(row, methods), []).append(row)
    found |= {way: found.pop(way) for name in PICTURES if (way := (name, "")) in found}
    return [
        Line(*_drawn(*way, methods), tuple(sorted(own, key=lambda row: row.bytes_per_image)), way[1] != FACTORS)
        for way, own in found.items()
        if own
    ]


def _way(row: FidelityRow, methods: Sequence[str]) -> tuple[str, str]:
    """What is kept, and in which form: all of X's plain ones are one line."""
    if picture := picture_of(row.method):
        return picture, ""
    form = row.form.partition(" ")[0]
    if row.method == "x":
        return "x", form if form == "coded" else "plain"
    return row.method, FACTORS if form == FACTORS and row.method in methods else form


def _drawn(method: str, form: str, methods: Sequence[str]) -> tuple[str, Look]:
    """A line's name and look: colours are those of the other charts, and only factors have unbroken lines."""
    if form == FACTORS:
        return method, look_of(method, methods)
    rate = Rate(method, form, ())
    if method == "x" or not form:
        return rate.name, rate.look._replace(line=":", width=1.6)
    return f"{method}, {form}", Look(look_of(method, methods).color, _STORED.get(form, "v"), ":", 1.6)


def agreement_pictures(rows: Sequence[FidelityRow], plots: Path) -> tuple[Picture, ...]:
    """Draw the answers that stay against bytes and, of factors, against rank."""
    lines = lines_of(rows)
    levels = [line.name for line in lines if line.rows[0].method in _UNRANKED]
    bytes_caption = (
        "Higher and further left is better. Filled: factors A·B as they are. Hollow and dotted: what is stored in few "
        "bits, by an entropy coder or as a picture."
    )
    rank_caption = "Factors A·B as they are."
    if levels:
        rank_caption += f" Level lines, for what has no rank: {' and '.join(levels)}."
    factors = [line.name for line in lines if not line.stored]
    pictures = []
    if lines:
        pictures.append(_picture(lines, "bytes", [line.name for line in lines], bytes_caption, plots))
    if factors:
        pictures.append(_picture(lines, "rank", [*factors, *levels], rank_caption, plots))
    return tuple(pictures)


def _picture(lines: Sequence[Line], against: Against, shown: Sequence[str], caption: str, plots: Path) -> Picture:
    axis = "rank" if against == "rank" else "KiB an image"
    title = f"Answers that stay, against {axis}"
    alt = (
        f"Line chart: part of the answers that stay the same as X's, against {axis}, one line each for "
        f"{'; '.join(shown)}. The table has the same figures."
    )
    if any(row.answer_flips_low is not None for line in lines for row in line.rows):
        caption += " Whiskers: 95 % interval over groups of images, side by side where methods share a place."
    return Picture(
        f"{caption} Grey: {MOST} %.",
        (Chart(f"fidelity-{against}", title, _plotly(lines, against), alt, 460 + 10 * len(shown)),),
        path=saved(agreement_figure(lines, against), plots / f"fidelity_{against}.png"),
        title=title,
        alt=alt,
        replaced=True,
    )


class _Drawn(NamedTuple):
    """A line on its chart."""

    line: Line
    rows: tuple[FidelityRow, ...]
    x: list[float]  # ranks or KiB, moved a little where methods share them
    y: list[float]  # percent
    below: list[float]  # from y to the end of its interval; 0 without one
    above: list[float]


def _placed(lines: Sequence[Line], against: Against) -> list[_Drawn]:
    """Where lines lie: what shares a place stands side by side, so that no interval hides another."""
    kept = [(line, line.rows) for line in lines]
    if against == "rank":
        kept = [(line, tuple(sorted(rows, key=lambda row: row.rank))) for line, rows in kept if not line.stored]
    values = [[_value(row, against) for row in rows] for _, rows in kept]
    shared: dict[float, list[int]] = {}
    for place, own in enumerate(values):
        for value in dict.fromkeys(own):
            shared.setdefault(value, []).append(place)
    # Factors of one rank are of one size; what is stored has sizes between theirs, which must not narrow the room.
    as_they_are = {value for (line, _), own in zip(kept, values, strict=True) if not line.stored for value in own}
    crowded = sorted(value for value in as_they_are if len(shared[value]) > 1)
    room = min((math.log(high / low) for low, high in pairwise(crowded)), default=1.0)
    span = max(math.log(max(shared) / min(shared)), 0.8)
    step = min(0.009 * span, 0.6 * room / max(map(len, shared.values())))

    def moved(value: float, place: int) -> float:
        beside = shared[value]
        return value * math.exp(step * (beside.index(place) - (len(beside) - 1) / 2))

    found = []
    for place, (line, rows) in enumerate(kept):
        y = [100 * (1 - row.answer_flips) for row in rows]
        ends = [_ends(row) for row in rows]
        below = [max(0.0, mean - low) for mean, (low, _) in zip(y, ends, strict=True)]
        above = [max(0.0, high - mean) for mean, (_, high) in zip(y, ends, strict=True)]
        found.append(_Drawn(line, rows, [moved(value, place) for value in values[place]], y, below, above))
    return found


def _value(row: FidelityRow, against: Against) -> float:
    return row.rank if against == "rank" else row.bytes_per_image / 1024


def _ends(row: FidelityRow) -> tuple[float, float]:
    """The interval of the answers that stay, in percent: those that there can be."""
    flips, low, high = row.answer_flips, row.answer_flips_low, row.answer_flips_high
    return 100 * (1 - min(1.0, flips if high is None else high)), 100 * (1 - max(0.0, flips if low is None else low))


def _xs(drawn: Sequence[_Drawn], against: Against) -> list[float]:
    """The ranks or KiB that there are."""
    return sorted({_value(row, against) for each in drawn for row in each.rows})


def _ends_of_x(drawn: Sequence[_Drawn], against: Against) -> tuple[float, float]:
    """The ends of the other axis: few or narrow sizes need room for a tick, too."""
    places = [x for each in drawn for x in each.x]
    margin = 1.45 if against == "bytes" or len(_xs(drawn, against)) == 1 else 1.08
    return min(places) / margin, max(places) * margin


def _levels(lines: Sequence[Line], against: Against) -> Iterator[tuple[Line, float]]:
    """What stands beside ranks without having one, and its height."""
    for line in lines if against == "rank" else ():
        if line.rows[0].method in _UNRANKED:
            yield line, 100 * (1 - line.rows[-1].answer_flips)


def _heights(drawn: Sequence[_Drawn], levels: Sequence[tuple[Line, float]]) -> tuple[list[float], tuple[float, float]]:
    """Ticks in percent, and the ends of the axis, which has room for `MOST` in any case."""
    lowest = [y - below for each in drawn for y, below in zip(each.y, each.below, strict=True)]
    low = min([MOST - 1.0, *lowest, *(height for _, height in levels)])
    step = next(step for step in (1, 2, 5, 10, 20) if 100 - low <= 6 * step)
    margin = 0.03 * (100 - low)
    return [float(tick) for tick in range(100, math.floor(low) - 1, -step)], (low - margin, 100 + margin)


def _plotly(lines: Sequence[Line], against: Against) -> go.Figure:
    figure, drawn, levels = go.Figure(), _placed(lines, against), list(_levels(lines, against))
    for line, rows, x, y, below, above in drawn:
        color, symbol = line.look.color, SYMBOLS[line.look.marker] + "-open" * line.stored
        whiskers = {"array": above, "arrayminus": below, "symmetric": False, "thickness": 1, "width": 3}
        figure.add_scatter(
            x=x,
            y=y,
            error_y=whiskers if any(map(any, (above, below))) else None,
            mode="lines+markers" if len(x) > 1 else "markers",
            name=line.name,
            line={"color": color, "width": line.look.width, "dash": DASHES[line.look.line]},
            marker={"symbol": symbol, "color": color, "size": 8, "line": {"width": 1.6, "color": color}},
            text=[_told(line, row, *_ends(row)) for row in rows],
            hovertemplate="%{text}<extra></extra>",
        )
    (low, high), xs = _ends_of_x(drawn, against), _xs(drawn, against)
    for line, height in levels:
        dash = {"color": line.look.color, "width": 1.6, "dash": DASHES[_UNRANKED[line.rows[0].method]]}
        text = f"<b>{line.name}</b><br>{height:.1f} % of the answers stay"
        figure.add_scatter(x=[low, high], y=[height] * 2, mode="lines", name=line.name, line=dash, text=[text] * 2,
                           hovertemplate="%{text}<extra></extra>")  # fmt: skip
    figure.add_hline(y=MOST, line={"color": _RULE, "width": 1}, layer="below")
    ticks, ends = _heights(drawn, levels)
    scale = log_ticks(xs)
    if against == "rank":
        ranks = thinned(xs)
        scale = {"type": "log", "tickvals": ranks, "ticktext": [f"{rank:g}" for rank in ranks]}
    scale["range"] = [math.log10(low), math.log10(high)]
    figure.update_layout(
        template=QUIET,
        showlegend=True,  # of one line, too, which plotly would leave without a name
        xaxis={"title": "rank" if against == "rank" else "KiB an image", "tickangle": 0, **scale},
        yaxis={"title": "answers that stay", "range": ends, "tickvals": ticks, "ticktext": [f"{t:g} %" for t in ticks]},
        # Narrow enough for two columns on a phone.
        legend={"xref": "container", "entrywidth": 95, "font": {"size": 11}},
    )
    return figure


def _told(line: Line, row: FidelityRow, low: float, high: float) -> str:
    setting = ", ".join(filter(None, [f"rank {row.rank}" if row.rank else "", row.form if line.stored else ""]))
    ends = "" if row.answer_flips_low is None else f" ({low:.1f} to {high:.1f})"
    what = row.method if picture_of(row.method) else line.name
    return (
        f"<b>{what}</b>, {setting}<br>{row.bytes_per_image / 1024:,.4g} KiB an image<br>"
        f"{100 * (1 - row.answer_flips):.1f} %{ends} of the answers stay"
    )


def agreement_figure(lines: Sequence[Line], against: Against) -> Figure:
    """Draw the chart for paper and for MLflow."""
    figure, drawn, levels = Figure(figsize=(10, 7)), _placed(lines, against), list(_levels(lines, against))
    axes, handles = figure.add_subplot(), list[Any]()
    for line, _, x, y, below, above in drawn:
        look = line.look
        style: dict[str, Any] = {"color": look.color, "linewidth": look.width, "marker": look.marker, "markersize": 7}
        style |= {"linestyle": look.line if len(x) > 1 else "none", "capsize": 2, "elinewidth": 0.9}
        whiskers = [below, above] if any(map(any, (below, above))) else None
        fill = "white" if line.stored else None
        handles.append(axes.errorbar(x, y, yerr=whiskers, label=line.name, **style, markerfacecolor=fill))
    for line, height in levels:
        kind = _UNRANKED[line.rows[0].method]
        handles.append(axes.axhline(height, color=line.look.color, linewidth=1.6, linestyle=kind, label=line.name))
    axes.axhline(MOST, color=_RULE, linewidth=1, zorder=0.9)
    xs = _xs(drawn, against)
    if against == "rank":
        rank_axis(axes, [int(x) for x in xs])
    else:
        axes.set(xscale="log", xlabel="KiB an image")
        axes.xaxis.set_major_locator(FixedLocator(log_steps(xs)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    ticks, ends = _heights(drawn, levels)
    axes.set(ylabel="answers that stay", xlim=_ends_of_x(drawn, against), ylim=ends)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    quiet_grid(axes)
    deep = -(-(len(drawn) + len(levels)) // 5)
    figure.subplots_adjust(left=0.085, right=0.985, top=0.97, bottom=0.1 + 0.035 * deep)
    figure.legend(handles=handles, loc="lower center", ncols=5, frameon=False, handlelength=3)
    return figure
