"""What is explored in the report, drawn once, by plotly: trade-offs, spectrum and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from lowrank_tune.lowrank.svd import Optimum, Spectrum
from lowrank_tune.measured import Compression, Front, FrontPoint, PrunedRow, StoredRow
from lowrank_tune.report.page import Chart, Picture
from lowrank_tune.report.style import QUIET, SYMBOLS, TOWARDS_ONE, log_ticks, look_of, thinned
from lowrank_tune.report.text import cosine_text, count, in_order

_AXES = {
    "rank": "rank",
    "val_mse": "validation MSE",
    "val_bytes": "validation KiB an image (in the model's own form)",
    "val_error": "validation relative error",
    "bytes_per_image": "KiB an image, A and its own B",
    "token_cosine_mean": "token cosine (finer towards 1)",
}
_FRONTS = {
    ("search", "rank"): "Every trial: rank against error",
    ("search", "val_bytes"): "Every trial: bytes against error",
    ("storage", "bytes_per_image"): "Every method: storage against token cosine",
}


def tradeoff_picture(fronts: Sequence[Front], numbers: Mapping[str, int]) -> Picture:
    """What a rank and a byte buy: the front's members filled and joined, the others hollow.

    `numbers` are the trials', by their ids: the page's script finds a trial by it in all charts.
    """
    sizes = {(point.rank, point.x) for front in fronts if front.name == "storage" for point in front.points}
    one_a_rank = len(sizes) == len({rank for rank, _ in sizes})
    return Picture(
        "Filled and joined: the Pareto front, which nothing beats; pareto.json has every figure. Trials by validation "
        "figures, methods by test figures; a rank has the same bytes whatever the method"
        + ("." if one_a_rank else ", but where all images share one B: of that an image takes A alone."),
        tuple(_tradeoff_chart(front, numbers) for front in fronts),
    )


def _tradeoff_chart(front: Front, numbers: Mapping[str, int]) -> Chart:
    cosines, title = front.better == "higher", _FRONTS[front.name, front.x]
    figure, members = go.Figure(), [point for point in front.points if point.on_front]

    def draw(points: Sequence[FrontPoint], **look: Any) -> None:
        values = [point.y for point in points]
        figure.add_scatter(x=[point.x for point in points], y=TOWARDS_ONE.place(values) if cosines else values, **look)

    draw(members, mode="lines", name="front", hoverinfo="skip", line={"color": "#767676", "width": 1.4, "shape": "hv"})
    methods = in_order(point.method for point in front.points)
    for method in methods:
        own, look = [point for point in front.points if point.method == method], look_of(method, methods)
        symbol = SYMBOLS[look.marker]
        # A thin cross has nothing to fill.
        symbols = [symbol if point.on_front and symbol != "x-thin" else f"{symbol}-open" for point in own]
        told = [
            ("" if point.trial_id in numbers else f"<b>{point.trial_id or method}</b> ")
            + f"at rank {point.rank}<br>{_AXES[front.y].partition(' (')[0]} "
            + (cosine_text(point.y) if cosines else f"{point.y:.4g}")
            + ("<br>on the front" if point.on_front else "")
            for point in own
        ]
        line = {"width": 1.6, "color": look.color}
        marker = {"symbol": symbols, "color": look.color, "size": 9, "line": line}
        whose = [numbers.get(point.trial_id) for point in own]
        shared: dict[str, Any] = {"text": told, "customdata": whose, "hovertemplate": "%{text}<extra></extra>"}
        draw(own, mode="markers", name=method, marker=marker, **shared)
    xs, unit = thinned(sorted({point.x for point in front.points})), 1 if front.x == "rank" else 1024
    scale = TOWARDS_ONE.on_plotly([point.y for point in front.points]) if cosines else {"type": "log", "dtick": 1}
    ticks: dict[str, Any] = {"type": "log", "tickvals": xs, "ticktext": [f"{x / unit:,.4g}" for x in xs]}
    if front.x == "val_bytes":  # each trial has its own
        ticks = log_ticks([x / unit for x in xs])
        ticks["tickvals"] = [tick * unit for tick in ticks["tickvals"]]
    xaxis, yaxis = {"title": _AXES[front.x], **ticks}, {"title": _AXES[front.y], **scale}
    figure.update_layout(template=QUIET, xaxis=xaxis, yaxis=yaxis)
    joined = ", ".join(f"{point.trial_id or point.method} at rank {point.rank}" for point in members)
    return Chart(f"pareto-{front.name}", title, figure, f"Scatter chart: {title}. On the front: {joined}.", 440)


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
        xaxis = {"title": names[0], "type": "log", "dtick": "D2"}
        yaxis = {"title": names[1], "type": "log", "dtick": 1, "tickformat": "~g"}
        figure.update_layout(template=QUIET, xaxis=xaxis, yaxis=yaxis)
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
            Chart("spectrum", "Singular values over the first", values, told, 380),
            Chart("left", "What the SVD leaves of the squared norm", left, kept, 380),
        ),
    )


_DTYPES = {"float16": ("#767676", "circle"), "int8": ("#0072B2", "square"), "int5": ("#009E73", "triangle-up"),
           "int4": ("#CC79A7", "diamond")}  # fmt: skip


def compression_picture(compression: Compression) -> Picture:
    """Bytes against error: one rank for all images, and, unless it has rates, as many components as each needs."""
    at_rank = [row for row in compression.stored if row.rank]
    pruned = [row for row in compression.pruned if row.bytes_per_image is not None]
    dotted = "svd" if {row.method for row in at_rank} > {"svd"} else ""
    first = _sizes_chart("compression-0", "A rank for all images", compression, at_rank, dotted)
    second = _sizes_chart("compression-1", "As many components as each image needs", compression, pruned, "")
    shown = "the chosen trained factors of each rank, the SVD's dotted."
    own = "the chosen trained factors of each rank, the SVD's dotted."
    shown = (
        f"First: {own} Second: the SVD's leading components, for each image as few as meet a target; crosses: the "
        "trained ones, up to the highest rank compared."
    )
    return Picture(
        "Lower and further left is better. Orange: X itself with a scale a token, the control that factors must beat. "
        f"{f'In colours: {own}' if compression.rates else shown} Dashed: X in float16.",
        (first,) if compression.rates else (first, second),
    )


def _sizes_chart(
    name: str, title: str, compression: Compression, rows: Sequence[StoredRow | PrunedRow], dotted: str
) -> Chart:
    """Draw error against bytes, a line a method and dtype; the legend has the dtypes, the caption the methods."""
    figure = go.Figure()

    def draw(found: Sequence[StoredRow | PrunedRow], told: str, **look: Any) -> None:
        if not found:
            return
        found = sorted(found, key=lambda row: row.bytes_per_image or 0.0)
        sizes = [(row.bytes_per_image or 0.0) / 1024 for row in found]
        # A logarithmic axis has no place for an exact one.
        errors = [max(100 * (row.relative_error_mean or 0.0), 1e-3) for row in found]
        text = [f"<b>{told}</b>, {_components(row)}" for row in found]
        hover = "%{text}<br>%{x:,.4g} KiB an image<br>relative error %{y:.3g} %<extra></extra>"
        figure.add_scatter(x=sizes, y=errors, text=text, hovertemplate=hover, **look)

    for method in sorted({row.method for row in rows}, key=lambda method: method != "svd"):
        for dtype, (color, symbol) in _DTYPES.items():
            crosses = method != "svd" and any(isinstance(row, PrunedRow) for row in rows)
            draw(
                [row for row in rows if (row.method, row.dtype) == (method, dtype)],
                f"{method}, {dtype}",
                name=dtype,
                legendgroup=dtype,
                showlegend=not crosses and method != dotted,
                mode="markers" if crosses else "lines" if method == dotted else "lines+markers",
                line={"color": color, "width": 1.4, "dash": "dot" if method == dotted else "solid"},
                marker={"symbol": "x" if crosses else symbol, "size": 9},
            )
    control = [row for row in compression.stored if row.method == "x"]
    orange = {"line": {"color": "#D55E00", "width": 2.4}, "marker": {"symbol": "x", "size": 9}}
    draw(
        [row for row in control if row.dtype != "float16"], "X itself", name="X itself", mode="lines+markers", **orange
    )
    sizes, errors = ([value for trace in figure.data for value in trace[axis]] for axis in "xy")
    for whole in (row for row in control if row.dtype == "float16" and errors):
        dashed = {"color": "#888888", "width": 1.4, "dash": "dash"}
        x, y = [whole.bytes_per_image / 1024] * 2, [min(errors), max(errors)]
        figure.add_scatter(x=x, y=y, mode="lines", name="X in float16", line=dashed, hoverinfo="skip")
    xaxis, yaxis = {"title": "KiB an image", **log_ticks(sizes)}, {"title": "relative error, %", **log_ticks(errors)}
    figure.update_layout(template=QUIET, xaxis=xaxis, yaxis=yaxis)
    alt = f"Line chart: {title}: relative error against KiB an image. The tables below have the figures."
    return Chart(name, title, figure, alt, 470)


def _components(row: StoredRow | PrunedRow) -> str:
    """What is kept of an image."""
    if isinstance(row, PrunedRow):
        return f"{row.rank_mean:.0f} components"
    return f"rank {row.rank}" if row.rank else row.dtype
