"""Bytes against error: factors in few bits beside the features in few bits, as two pictures and three tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lowrank_tune.records import Compression, PrunedRow, QuantisedRow, StoredRow
from lowrank_tune.report.charts import SYMBOLS, Chart, chart, quiet_layout
from lowrank_tune.report.html import Section, Table
from lowrank_tune.report.pictures import saved
from lowrank_tune.report.scales import quiet_grid
from lowrank_tune.report.words import ABSENT, cosine_text

FEATURES = "x"
_LOOKS = {
    "float16": ("#767676", "o"), "int8": ("#0072B2", "s"), "int5": ("#009E73", "^"), "int4": ("#CC79A7", "D"),
}  # fmt: skip
"""Colour and marker of each dtype."""
_CONTROL = ("#D55E00", "X")
_FLOOR = 1e-3
"""Percent: smaller errors, which a logarithmic axis has no place for, are drawn here."""
_X, _Y = "KiB an image", "relative error, %"
_TITLES = ("A rank for all images", "As many components as each image needs")

Row = TypeVar("Row", StoredRow, PrunedRow)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the pictures.

    Attributes:
        name: in the legend.
        color: hex RGB.
        marker: matplotlib's code; empty for none.
        dash: matplotlib's line style.
        kib: x, by rising bytes.
        errors: y, in percent.
        labels: what each point is.
        shown: whether the labels stand in the still picture.
    """

    name: str
    color: str
    marker: str
    dash: str
    kib: tuple[float, ...]
    errors: tuple[float, ...]
    labels: tuple[str, ...]
    shown: bool = False


def compression_section(compression: Compression, plots: Path) -> Section:
    """Make the section of a comparison that measured bytes against error.

    Args:
        compression: with stored rows.
        plots: where the still picture goes.
    """
    whole = next((row for row in compression.stored if (row.method, row.dtype) == (FEATURES, "float16")), None)
    panels = (_fixed(compression.stored), _pruned(compression))
    picture = saved(
        _figure(panels, whole),
        plots / "compression.png",
        title="Bytes against error",
        alt="Two line charts of relative error against KiB an image: factors in float16, int8, int5 and int4 at each "
        "rank, and with a rank an image, each beside X itself in int8, int5 and int4. The tables have the figures.",
        caption="Lower and further left is better. Orange: X itself with a scale a token, the control that factors "
        "must beat. Left: the best trained factors of each rank, the SVD's dotted. Right: the SVD's leading "
        "components, for each image as few as meet a target; crosses: the best trained ones, up to the highest rank "
        "compared. Dashed: X in float16.",
        charts=tuple(_chart(place, lines, whole) for place, lines in enumerate(panels)),
    )
    tables = [_targets(compression), _stored(compression.stored, whole)]
    if compression.models:
        tables.append(_models(compression.models))
    return Section(
        "compression",
        "Bytes against error",
        (picture,),
        lead="What an image takes when it is stored as factors in few bits, and what is lost by it, beside X itself in "
        "as few bits. Relative error: ‖X − Y‖ / ‖X‖ of what comes back, Y.",
        tables=tuple(tables),
        notes=compression.words,
    )


def _fixed(stored: Sequence[StoredRow]) -> list[Line]:
    lines = []
    for dtype, (color, marker) in _LOOKS.items():
        own = sorted((row for row in stored if row.dtype == dtype and row.rank), key=lambda row: row.rank)
        svd = [row for row in own if row.method == "svd"]
        trained = [row for row in own if row.method != "svd"]
        if trained:
            lines.append(_line(f"svd, {dtype}", color, "", ":", svd, _of_rank))
        if own:
            lines.append(_line(dtype, color, marker, "-", trained or svd, _of_rank, shown=dtype == "float16"))
    return [*lines, _control(stored)]


def _pruned(compression: Compression) -> list[Line]:
    met = [row for row in compression.pruned if row.bytes_per_image is not None]
    lines = []
    for method in sorted({row.method for row in met}, key=lambda method: method != "svd"):
        for dtype, (color, marker) in _LOOKS.items():
            own = [row for row in met if (row.method, row.dtype) == (method, dtype)]
            own.sort(key=lambda row: row.bytes_per_image or 0.0)
            look = (marker, "-") if method == "svd" else ("x", "")
            name = dtype if method == "svd" else f"{method}, {dtype}"
            if own:
                lines.append(_line(name, color, *look, own, _of_target))
    return [*lines, _control(compression.stored)]


def _control(stored: Sequence[StoredRow]) -> Line:
    own = [row for row in stored if row.method == FEATURES and row.dtype != "float16"]
    own.sort(key=lambda row: row.bytes_per_image)
    return _line("X itself", *_CONTROL, "-", own, lambda row: row.dtype, shown=True)


def _line(
    name: str,
    color: str,
    marker: str,
    dash: str,
    rows: Sequence[Row],
    label: Callable[[Row], str],
    shown: bool = False,
) -> Line:
    return Line(
        name,
        color,
        marker,
        dash,
        tuple((row.bytes_per_image or 0.0) / 1024 for row in rows),
        tuple(max(100 * (row.relative_error_mean or 0.0), _FLOOR) for row in rows),
        tuple(label(row) for row in rows),
        shown,
    )


def _of_rank(row: StoredRow) -> str:
    return f"rank {row.rank}"


def _of_target(row: PrunedRow) -> str:
    return f"{row.rank_mean:.0f} components"


def _figure(panels: Sequence[Sequence[Line]], whole: StoredRow | None) -> Figure:
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    for axes, lines, title in zip(figure.subplots(1, len(panels)), panels, _TITLES, strict=True):
        _draw(axes, lines, whole)
        axes.set_title(title, fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    named = {label: handle for handle, label in zip(handles, labels, strict=True) if not label.startswith("svd,")}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def _draw(axes: Axes, lines: Sequence[Line], whole: StoredRow | None) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for line in lines:
        bold = line.color == _CONTROL[0]
        axes.plot(
            line.kib, line.errors, color=line.color, marker=line.marker or None, linestyle=line.dash or "none",
            linewidth=2.4 if bold else 1.4, markersize=9 if bold or line.marker == "x" else 6, label=line.name,
            zorder=3 if bold else 2,
        )  # fmt: skip
        for x, y, label in zip(line.kib, line.errors, line.labels, strict=True) if line.shown else ():
            axes.annotate(
                label, (x, y), (7, 4), textcoords="offset points", fontsize=9, color=line.color,
                fontweight="bold" if bold else "normal",
            )  # fmt: skip
    if whole is not None:
        axes.axvline(whole.bytes_per_image / 1024, color="#888888", linestyle="--", linewidth=1.2, label="X in float16")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.09, y=0.08)
    axes.set_xlabel(_X)
    axes.set_ylabel(_Y)
    quiet_grid(axes)


def _chart(place: int, lines: Sequence[Line], whole: StoredRow | None) -> Chart:
    figure = go.Figure()
    shown: set[str] = set()
    for line in lines:
        method, comma, dtype = line.name.partition(", ")
        figure.add_scatter(
            x=line.kib, y=line.errors, name={"svd": "the SVD's"}.get(method, method),
            mode="+".join(part for part, there in (("lines", line.dash), ("markers", line.marker)) if there),
            line={
                "color": line.color,
                "width": 1.4 + (line.name == "X itself"),
                "dash": "dot" if line.dash == ":" else "solid",
            },
            marker={
                "symbol": SYMBOLS.get(line.marker, "circle"),
                "size": 9,
                "color": line.color,
                "line": {"width": 1.6, "color": line.color},
            },
            # Lines of one method beside those that give the dtypes' colours are one entry of the legend.
            showlegend=method not in shown,
            legendgroup=dtype if comma else method,
            text=[
                f"<b>{line.name}</b>, {label}<br>{x:,.4g} KiB an image<br>relative error {y:.3g} %"
                for x, y, label in zip(line.kib, line.errors, line.labels, strict=True)
            ],
            hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
        shown.add(method)
    errors = [error for line in lines for error in line.errors]
    if whole is not None and errors:
        figure.add_scatter(
            x=[whole.bytes_per_image / 1024] * 2, y=[min(errors), max(errors)], mode="lines", name="X in float16",
            line={"color": "#888888", "width": 1.4, "dash": "dash"}, hoverinfo="skip",
        )  # fmt: skip
    sizes = [kib for line in lines for kib in line.kib]
    figure.update_layout(quiet_layout(_X, _Y))
    figure.update_layout(
        xaxis=_log_ticks(sizes),
        yaxis=_log_ticks(errors),
    )
    alt = f"Line chart: {_TITLES[place]}: relative error against KiB an image. The tables below have the figures."
    return chart(f"compression-{place}", _TITLES[place], figure, alt, 470)


def _log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis with a tick at each 1, 2 and 5 of its decades."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    ticks = [step * 10.0**decade for decade in range(low, high + 1) for step in (1, 2, 5)]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,.4g}" for tick in ticks]}


def _targets(compression: Compression) -> Table:
    controls = [row for row in compression.stored if row.method == FEATURES]
    trained = next((row.method for row in compression.pruned if row.method != "svd"), "")
    rows = []
    for target in dict.fromkeys(row.target for row in compression.pruned):
        at = next((row for row in controls if row.dtype == target), None)
        if at is None:
            met = [row for row in controls if row.relative_error_max <= float(target)]
            at = min(met, key=lambda row: row.bytes_per_image, default=None)
            name = f"{100 * float(target):g} %"
        else:
            name = f"as {target} of X: {_percent(at.relative_error_mean)}"
        own = [_fewest(compression.pruned, target, method) for method in ("svd", trained)]
        rows.append((name, f"{_kib(at.bytes_per_image)}, {at.dtype}" if at else ABSENT, *own))
    return Table(
        "Bytes for an error that every image keeps",
        ("relative error at most", "X itself, KiB", "the SVD's factors, KiB", f"{trained or 'trained'} factors, KiB"),
        tuple(rows),
        caption="The fewest bytes an image, on average, at which every test image is as near. Factors: the dtype that "
        "takes the fewest, and the components an image keeps on average. The SVD may keep as many as there are, "
        f"trained factors as many as the highest rank compared; {ABSENT} where that does not do.",
    )


def _fewest(pruned: Sequence[PrunedRow], target: str, method: str) -> str:
    own = [row for row in pruned if (row.target, row.method) == (target, method) and row.bytes_per_image is not None]
    if not own:
        return ABSENT
    row = min(own, key=lambda row: row.bytes_per_image or 0.0)
    return f"{_kib(row.bytes_per_image or 0.0)}, {row.dtype}, {row.rank_mean:.0f} components"


def _stored(stored: Sequence[StoredRow], whole: StoredRow | None) -> Table:
    trained = any(row.trial_id for row in stored)
    shown = [row for row in stored if row.method == FEATURES or bool(row.trial_id) is trained]
    rows = [
        (
            "X itself" if row.method == FEATURES else f"{row.method}, rank {row.rank}",
            row.dtype,
            _kib(row.bytes_per_image),
            f"{row.bytes_per_image / whole.bytes_per_image:.1%}" if whole else ABSENT,
            _percent(row.relative_error_mean),
            _percent(row.relative_error_max),
            cosine_text(row.token_cosine_mean),
        )
        for row in shown
    ]
    return Table(
        "Factors at each rank and dtype",
        ("stored", "as", "KiB an image", "of X in float16", "relative error", "worst image", "token cosine"),
        tuple(rows),
        caption="Every image at the same rank, scales included; compression.json has the SVD's, too.",
    )


def _models(models: Sequence[QuantisedRow]) -> Table:
    rows = [
        (
            f"{row.method}, rank {row.rank}",
            _kib(row.model_bytes),
            _kib(row.quantised_bytes) if row.quantised_bytes != row.model_bytes else "no learned matrix",
            _percent(row.relative_error_mean),
            _percent(row.quantised_relative_error_mean),
        )
        for row in models
    ]
    return Table(
        "The trained models with int8 matrices",
        ("model", "float32, KiB", "int8, KiB", "relative error", "in int8"),
        tuple(rows),
        caption="Weights only, a scale a row, by torchao. Relative error: of the factors that the model makes.",
    )


def _kib(size: float) -> str:
    return f"{size / 1024:,.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
