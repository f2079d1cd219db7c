"""Interactive: token cosine and residual ratio against rank, and the trade-offs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from lowrank_tune.records import ComparisonRow, Front, FrontPoint
from lowrank_tune.report.charts import (
    SYMBOLS,
    Chart,
    chart,
    line_of,
    pale,
    quiet_layout,
    rank_ticks,
    stretched_axis,
)
from lowrank_tune.report.palette import in_order, is_trained, look_of
from lowrank_tune.report.spectrum import Spectrum
from lowrank_tune.report.stretch import ABOVE_ONE, TOWARDS_ONE, Stretch
from lowrank_tune.report.tradeoffs import LABELS, TITLES
from lowrank_tune.report.words import ABSENT, cosine_text, rate_text, ratio_text, seed_texts

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
