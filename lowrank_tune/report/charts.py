"""What is explored in the report, drawn once, by plotly: learning, trade-offs, spectrum and bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import plotly.colors
import plotly.graph_objects as go
from numpy.typing import NDArray

from lowrank_tune.lowrank.svd import Optimum, Spectrum
from lowrank_tune.records import Compression, Front, FrontPoint, PrunedRow, StoredRow, TrialOutcome
from lowrank_tune.report.page import Picture
from lowrank_tune.report.style import (
    ABOVE_ONE,
    INK,
    SYMBOLS,
    TOWARDS_ONE,
    Chart,
    Trial,
    chart,
    log_ticks,
    look_of,
    quiet_layout,
    series,
)
from lowrank_tune.report.text import STOPPED, cosine_text, count, in_order, ratio_text

_STOP_MARKERS = {"budget": "o", "patience": "s", "asha": "v", "interruption": "d", "error": "X"}


def learning_charts(trials: Sequence[Trial], repeats: Sequence[Trial] = ()) -> tuple[Chart, ...]:
    """Draw every trial's validation residual ratio against epochs, a chart a family, coloured by rank.

    Optuna's plot_intermediate_values does not serve: it knows no rank, family or ending, and one diverged trial makes
    all others a flat line.
    """
    seen = [(outcome, history) for outcome, history in trials if series(history, "val_residual_ratio")[1]]
    ranks = sorted({outcome.config.rank for outcome, _ in seen})
    # The last sixth of viridis is too pale to see on white.
    places = [0.85 * place / max(len(ranks) - 1, 1) for place in range(len(ranks))]
    colors = dict(zip(ranks, plotly.colors.sample_colorscale("Viridis", places), strict=True))
    charts = []
    for family in in_order(outcome.config.family for outcome, _ in seen):
        own = sorted(
            (trial for trial in seen if trial[0].config.family == family), key=lambda trial: trial[0].config.rank
        )
        again = [trial for trial in repeats if trial[0].config.family == family and trial[0].config.rank in colors]
        figure, values = go.Figure(), [1.0]
        for outcome, history in (*own, *again):
            values += _draw_trial(figure, outcome, history, colors[outcome.config.rank])
        for stop in dict.fromkeys(outcome.stopped_by for outcome, _ in own):
            figure.add_scatter(
                x=[None], y=[None], mode="markers", name=STOPPED[stop], hoverinfo="skip",
                marker={"symbol": SYMBOLS[_STOP_MARKERS[stop]], "size": 9, "color": "#888888", "line": {"width": 1}},
            )  # fmt: skip
        last = max(outcome.epochs for outcome, _ in own)
        axes = {"xaxis": {"tickformat": "d", "dtick": max(1, -(-last // 8))}, "yaxis": ABOVE_ONE.on_plotly(values)}
        figure.update_layout(quiet_layout("epoch", "validation ρ (finer towards 1)", **axes))
        ends = [f"{o.config.trial_id} {STOPPED[o.stopped_by]} at epoch {o.epochs}" for o, _ in own]
        told = ", ".join(ends[:12]) + (f", and {len(ends) - 12} more" if len(ends) > 12 else "")
        alt = f"Validation residual ratio of {count(len(own), 'trial')} of {family} against epochs, coloured by rank: "
        charts.append(chart(f"learning-{family}", family, figure, f"{alt}{told}. The trials table has them all."))
    return tuple(charts)


def _draw_trial(figure: go.Figure, outcome: TrialOutcome, history: list[dict[str, float]], color: str) -> list[float]:
    config, (epochs, values) = outcome.config, series(history, "val_residual_ratio")
    rank, last = f"rank {config.rank}", len(values) - 1
    settings = ", ".join(f"{key} {value:.3g}" for key, value in {"lr": config.lr, **config.family_params}.items())
    ending = f"<br>{STOPPED[outcome.stopped_by]} at epoch {outcome.epochs}"
    ending += f": {outcome.reason[:120]}" if outcome.reason else ""
    said = [f"<b>{config.trial_id}</b><br>{settings}<br>epoch {x:.0f}: ρ {ratio_text(y)}"
            for x, y in zip(epochs, values, strict=True)]  # fmt: skip
    figure.add_scatter(
        x=epochs,
        y=ABOVE_ONE.place(values),
        mode="lines+markers",
        name=rank,
        legendgroup=rank,
        showlegend=rank not in {trace.name for trace in figure.data},
        line={"color": color, "width": 1.6, "dash": "dot" if config.confirms else "solid"},
        marker={
            "symbol": [*["circle"] * last, SYMBOLS[_STOP_MARKERS[outcome.stopped_by]]],
            "size": [*[3] * last, 10],
            "color": color,
            "line": {"color": INK, "width": [*[0] * last, 1]},
        },
        text=[*said[:-1], *(text + ending for text in said[-1:])],
        hovertemplate="%{text}<extra></extra>",
    )
    return values


_AXES = {
    "rank": "rank",
    "val_mse": "validation MSE",
    "bytes_per_image": "KiB an image, A and B",
    "token_cosine_mean": "token cosine (finer towards 1)",
}
_FRONTS = {"search": "Every trial: rank against error", "storage": "Every method: storage against token cosine"}


def tradeoff_picture(fronts: Sequence[Front]) -> Picture:
    """What a rank and a byte buy."""
    return Picture(
        "Filled and joined: the Pareto front, which nothing beats; pareto.json has every figure. Trials by validation "
        "figures, methods by test figures; a rank has the same bytes whatever the method.",
        tuple(tradeoff_chart(front) for front in fronts),
    )


def tradeoff_chart(front: Front) -> Chart:
    """Draw a trade-off: the front's members filled and joined, the others hollow."""

    def places(points: Sequence[FrontPoint]) -> list[float]:
        values = [point.y for point in points]
        return TOWARDS_ONE.place(values) if front.better == "higher" else values

    def said(point: FrontPoint) -> str:
        y = cosine_text(point.y) if front.better == "higher" else f"{point.y:.4g}"
        named = f"<b>{point.trial_id or point.method}</b> at rank {point.rank}"
        return f"{named}<br>{_AXES[front.y].partition(' (')[0]} {y}" + ("<br>on the front" if point.on_front else "")

    figure, members = go.Figure(), [point for point in front.points if point.on_front]
    figure.add_scatter(
        x=[point.x for point in members], y=places(members), mode="lines", name="front", hoverinfo="skip",
        line={"color": "#767676", "width": 1.4, "shape": "hv"},
    )  # fmt: skip
    methods = in_order(point.method for point in front.points)
    for method in methods:
        own, look = [point for point in front.points if point.method == method], look_of(method, methods)
        symbol = SYMBOLS[look.marker]
        figure.add_scatter(
            x=[point.x for point in own],
            y=places(own),
            mode="markers",
            name=method,
            marker={
                # A thin cross has nothing to fill.
                "symbol": [symbol if point.on_front and symbol != "x-thin" else f"{symbol}-open" for point in own],
                "color": look.color,
                "size": 9,
                "line": {"width": 1.6, "color": look.color},
            },
            text=[said(point) for point in own],
            hovertemplate="%{text}<extra></extra>",
        )
    xs, unit = sorted({point.x for point in front.points}), 1024 if front.x == "bytes_per_image" else 1
    xaxis = {"type": "log", "tickvals": xs, "ticktext": [f"{x / unit:,.4g}" for x in xs]}
    cosines = TOWARDS_ONE.on_plotly([point.y for point in front.points])
    yaxis = cosines if front.better == "higher" else {"type": "log", "dtick": 1}
    figure.update_layout(quiet_layout(_AXES[front.x], _AXES[front.y], xaxis=xaxis, yaxis=yaxis))
    joined = ", ".join(f"{point.trial_id or point.method} at rank {point.rank}" for point in members)
    title = _FRONTS[front.name]
    return chart(f"pareto-{front.name}", title, figure, f"Scatter chart: {title}. On the front: {joined}.", 440)


def spectrum_of(optimum: Optimum) -> Spectrum | None:
    """The mean spectrum of the images that are not all zeros; None when there is none."""
    seen = optimum.energy_N > 0
    if not seen.any():
        return None
    energy_N1 = optimum.energy_N[seen].numpy()[:, None]
    left_NK = optimum.residual_NR[seen].numpy()
    squares_NK = -np.diff(np.concatenate([energy_N1, left_NK], axis=1), axis=1)
    values_NK: NDArray[np.float64] = np.sqrt(np.maximum(squares_NK, 0))
    return Spectrum(
        values_NK=values_NK / values_NK[:, :1],
        cosine_K=optimum.token_cosine_NR[seen].mean(dim=0).numpy(),
        left_K=(left_NK / energy_N1).mean(axis=0),
        test_images=len(energy_N1),
    )


def spectrum_picture(spectrum: Spectrum, ranks: Sequence[int]) -> Picture:
    """The singular values of the test images, and what the SVD leaves at each rank; `ranks` are the study's."""
    # Beyond 1e-5 of the first, float16 features hold nothing but rounding.
    shown = max(1, int((spectrum.values_NK.mean(axis=0) > 1e-5).sum()))
    values_NK, x = spectrum.values_NK[:, :shown], spectrum.ranks[:shown].tolist()
    mean, left_of = values_NK.mean(axis=0).tolist(), np.maximum(spectrum.left_K[:shown], 1e-12).tolist()
    low, high = np.maximum(values_NK.min(axis=0), 1e-6).tolist(), values_NK.max(axis=0).tolist()
    values, left = go.Figure(), go.Figure()
    values.add_scatter(
        x=[*x, *reversed(x)], y=[*high, *reversed(low)], fill="toself", mode="lines", line={"width": 0},
        fillcolor="rgba(0,114,178,0.2)", name="range over images", hoverinfo="skip",
    )  # fmt: skip
    values.add_scatter(
        x=x, y=mean, mode="lines", line={"color": "#0072B2", "width": 2}, name="mean",
        hovertemplate="singular value %{x}: %{y:.3g} of the first<extra></extra>",
    )  # fmt: skip
    left.add_scatter(
        x=x, y=left_of, mode="lines", showlegend=False, line={"color": "#000000", "width": 2},
        hovertemplate="rank %{x}: the SVD leaves %{y:.3g} of the squared norm<extra></extra>",
    )  # fmt: skip
    for figure, names in ((values, ("number", "share of the first")), (left, ("rank", "share of ‖X‖²"))):
        yaxis = {"type": "log", "dtick": 1, "tickformat": "~g"}
        figure.update_layout(quiet_layout(*names, xaxis={"type": "log", "dtick": "D2"}, yaxis=yaxis))
        for rank in ranks:
            figure.add_vline(x=rank, line={"color": "#888888", "width": 1, "dash": "dot"})
    at = ", ".join(f"{left_of[rank - 1]:.3g} at rank {rank}" for rank in ranks if rank <= shown)
    told = f"Line chart of the mean singular value over the first, falling to {mean[-1]:.2g}."
    kept = f"Line chart of the share of the squared norm that the SVD leaves: {at}."
    return Picture(
        f"Of {count(spectrum.test_images, 'test image')}. Shaded: from the least to the greatest of any image. Dotted: "
        "the ranks of the study. A steep fall means that few directions hold an image; where it is flat, a rank more "
        "buys little.",
        (
            chart("spectrum", "Singular values over the first", values, told, 380),
            chart("left", "What the SVD leaves of the squared norm", left, kept, 380),
        ),
    )


_DTYPES = {"float16": ("#767676", "circle"), "int8": ("#0072B2", "square"), "int5": ("#009E73", "triangle-up"),
           "int4": ("#CC79A7", "diamond")}  # fmt: skip


def compression_picture(compression: Compression) -> Picture:
    """Bytes against error: one rank for all images, and as many components as each image needs."""
    stored = compression.stored
    whole = next((row for row in stored if (row.method, row.dtype) == ("x", "float16")), None)
    titles = ("A rank for all images", "As many components as each image needs")
    charts = []
    for place, (draw, title) in enumerate(zip((_draw_ranks, _draw_targets), titles, strict=True)):
        figure = go.Figure()
        draw(figure, compression)
        itself = [row for row in stored if row.method == "x" and row.dtype != "float16"]
        _draw_line(figure, "X itself", "X itself", itself, lambda row: row.dtype, "#D55E00", "x", width=2.4)
        errors = [error for trace in figure.data for error in trace.y]
        if whole is not None and errors:
            figure.add_scatter(
                x=[whole.bytes_per_image / 1024] * 2, y=[min(errors), max(errors)], mode="lines", name="X in float16",
                line={"color": "#888888", "width": 1.4, "dash": "dash"}, hoverinfo="skip",
            )  # fmt: skip
        axes = {"xaxis": log_ticks([size for trace in figure.data for size in trace.x]), "yaxis": log_ticks(errors)}
        figure.update_layout(quiet_layout("KiB an image", "relative error, %", **axes))
        alt = f"Line chart: {title}: relative error against KiB an image. The tables below have the figures."
        charts.append(chart(f"compression-{place}", title, figure, alt, 470))
    return Picture(
        "Lower and further left is better. Orange: X itself with a scale a token, the control that factors must beat. "
        "First: the chosen trained factors of each rank, the SVD's dotted. Second: the SVD's leading components, for "
        "each image as few as meet a target; crosses: the trained ones, up to the highest rank compared. Dashed: X in "
        "float16.",
        tuple(charts),
    )


def _draw_ranks(figure: go.Figure, compression: Compression) -> None:
    for dtype, (color, symbol) in _DTYPES.items():
        own = [row for row in compression.stored if row.dtype == dtype and row.rank]
        svd, trained = ([row for row in own if (row.method == "svd") is bound] for bound in (True, False))
        if trained:
            _draw_line(figure, f"svd, {dtype}", "the SVD's", svd, lambda row: f"rank {row.rank}", color, "", "dot")
        if own:
            _draw_line(figure, dtype, dtype, trained or svd, lambda row: f"rank {row.rank}", color, symbol)


def _draw_targets(figure: go.Figure, compression: Compression) -> None:
    met = [row for row in compression.pruned if row.bytes_per_image is not None]
    for method in sorted({row.method for row in met}, key=lambda method: method != "svd"):
        for dtype, (color, symbol) in _DTYPES.items():
            own = [row for row in met if (row.method, row.dtype) == (method, dtype)]
            look, name = (("solid", symbol), dtype) if method == "svd" else (("", "x"), method)
            if own:
                full = dtype if method == "svd" else f"{method}, {dtype}"
                _draw_line(figure, full, name, own, lambda row: f"{row.rank_mean:.0f} components", color, *look[::-1])


def _draw_line(
    figure: go.Figure,
    name: str,
    entry: str,
    found: Sequence[StoredRow | PrunedRow],
    label: Callable[[Any], str],
    color: str,
    symbol: str,
    dash: str = "solid",
    width: float = 1.4,
) -> None:
    """Draw rows by rising bytes; lines of one legend entry are named there once, and go with their dtype's."""
    rows = sorted(found, key=lambda row: row.bytes_per_image or 0.0)
    # A logarithmic axis has no place for an exact one.
    errors = [max(100 * (row.relative_error_mean or 0.0), 1e-3) for row in rows]
    sizes = [(row.bytes_per_image or 0.0) / 1024 for row in rows]
    figure.add_scatter(
        x=sizes, y=errors, name=entry, legendgroup=name.rpartition(", ")[2],
        showlegend=entry not in {trace.name for trace in figure.data},
        mode="+".join(part for part, there in (("lines", dash), ("markers", symbol)) if there),
        line={"color": color, "width": width, "dash": dash or "solid"},
        marker={"symbol": symbol or "circle", "size": 9, "color": color, "line": {"width": 1.6, "color": color}},
        text=[f"<b>{name}</b>, {label(row)}<br>{x:,.4g} KiB an image<br>relative error {y:.3g} %"
              for row, x, y in zip(rows, sizes, errors, strict=True)],
        hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
