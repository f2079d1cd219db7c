"""Every way to keep features, as the bytes of an image against its error: one chart, drawn twice, and one table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

from lowrank_tune.measured import Compression, PrunedRow, RateRow, StoredRow
from lowrank_tune.report.curves import saved
from lowrank_tune.report.page import Chart, Picture
from lowrank_tune.report.style import DASHES, QUIET, SYMBOLS, Look, log_steps, log_ticks, look_of, quiet_grid
from lowrank_tune.report.tables import Table
from lowrank_tune.report.text import ABSENT, CODER_NOTES, METHOD_NOTES, kib_text, percent_text, rate_text, size_text

TARGETS = (0.01, 0.05, 0.14)
"""Relative errors of the table."""
NEAR = 1.3
"""By which factor an error may differ from one of `TARGETS` and stand for it."""
LEVEL = 0.02
"""The part of an error by which another way must be better to win: what meets one target meets it that closely."""
EXACT = 1e-5
"""The relative error at which an exact way is drawn: a logarithmic axis has no place for none."""

PICTURES = {
    "jpeg": ("JPEG", Look("#0072B2", "D", "-", 1.8)),
    "webp": ("WebP", Look("#56B4E9", "P", "-", 1.8)),
    "half-side": ("half side", Look("#009E73", "h")),
    "quarter-side": ("quarter side", Look("#009E73", "*")),
}
"""Names and looks of the ways to keep a picture in place of its features."""
_FIRST = {"shared": ("shared", look_of("shared").color)}
_LAST = {"x": ("X", "#D55E00"), "svd": ("SVD", look_of("svd").color)}
_CODERS = {
    "coded": ("o", "-", 2.2),
    "zstd": ("^", "--", 1.5),
    "zlib": ("v", "-.", 1.5),
    "plain": ("s", ":", 1.8),
}
_BAND, _BROAD = "#d4d4d4", 7


class Line(NamedTuple):
    """A way to keep features at its settings, without those that another of its own beats."""

    method: str
    coder: str  # `plain`, `zlib`, `zstd` or `coded`; empty of pictures
    rows: tuple[RateRow, ...]  # by rising bytes and falling error

    @property
    def name(self) -> str:
        """What the legend calls it."""
        if self.method in PICTURES:
            return PICTURES[self.method][0]
        label, _ = {**_FIRST, **_LAST}.get(self.method, (self.method, ""))
        return f"{label}, {self.coder}"

    @property
    def look(self) -> Look:
        """Colour tells what is kept, the line's kind by which coder."""
        if self.method in PICTURES:
            return PICTURES[self.method][1]
        _, color = {**_FIRST, **_LAST}.get(self.method, ("", "#7F7F7F"))
        return Look(color, *_CODERS.get(self.coder, _CODERS["plain"]))

    def near(self, error: float) -> RateRow | None:
        """The row nearest to an error; where none is near, the smallest of those below, if there is one."""
        nearest = min(self.rows, key=lambda row: _apart(row, error))
        if _apart(nearest, error) <= math.log(NEAR):
            return nearest
        return next((row for row in self.rows if row.relative_error_mean <= error), None)


def _apart(row: RateRow, error: float) -> float:
    return abs(math.log(max(row.relative_error_mean, EXACT) / error))


def lines_of(compression: Compression) -> list[Line]:
    """Sort what was measured into lines: what is learned, X itself, the SVD, and the pictures."""
    rates: dict[tuple[str, str], list[RateRow]] = {}
    for row in compression.rates:
        rates.setdefault(_way(row), []).append(row)
    # What was measured on all test images without writing a byte stands in where the bytes are not known.
    known = set(rates)
    for row in _without_coder(compression):
        if _way(row) not in known:
            rates.setdefault(_way(row), []).append(row)
    methods = [*_FIRST, *sorted({method for method, _ in rates} - {*_FIRST, *_LAST, *PICTURES}), *_LAST, *PICTURES]
    coders = [*_CODERS, ""]
    found = []
    for (method, coder), rows in sorted(
        rates.items(), key=lambda item: (methods.index(item[0][0]), coders.index(item[0][1]))
    ):
        if best := list(_unbeaten(rows)):
            found.append(Line(method, coder, tuple(best)))
    return found


def _way(row: RateRow) -> tuple[str, str]:
    """What is kept, and by which coder."""
    if (picture := row.method.partition("-q")[0]) in PICTURES:
        return picture, ""
    coder = row.dtype if row.dtype == "coded" else row.dtype.partition("+")[2]
    return row.method, coder if coder in _CODERS else "plain"


def _without_coder(compression: Compression) -> Iterator[RateRow]:
    """X in few bits, and the factors of one image alone where all images meet a target."""
    rows: list[StoredRow | PrunedRow] = [
        row for row in compression.stored if row.method == "x" and row.dtype != "float16"
    ]
    for row in (*rows, *compression.pruned):
        size, error, worst = row.bytes_per_image, row.relative_error_mean, row.relative_error_max
        if size is None or error is None or worst is None:
            continue
        target = row.target if isinstance(row, PrunedRow) else ""
        kept = (row.method, row.rank, row.dtype, target, row.n_images, size, error, worst)
        yield RateRow(*kept, token_cosine_mean=math.nan, trial_id=row.trial_id)


def _unbeaten(rows: Sequence[RateRow]) -> Iterator[RateRow]:
    """By rising bytes, the rows with less error than all that take no more."""
    least = math.inf
    for row in sorted(rows, key=lambda row: (row.bytes_per_image, row.relative_error_mean)):
        if 0 < row.bytes_per_image < math.inf and row.relative_error_mean < least:
            least = row.relative_error_mean
            yield row


class Envelope(NamedTuple):
    """The least error that any line has at each size, lines drawn straight on logarithmic axes."""

    sizes: list[float]  # bytes, rising
    errors: list[float]
    names: list[str]  # of the lines that have them

    @property
    def winners(self) -> list[tuple[str, float]]:
        """Which line has the least error, and from how many bytes on."""
        pairs = zip(self.names, self.sizes, strict=True)
        return [next(run) for _, run in groupby(pairs, key=lambda pair: pair[0])]

    def holds(self, line: Line, row: RateRow) -> bool:
        """Whether a row of a line has the least error at its size."""
        return self.names[self.sizes.index(row.bytes_per_image)] == line.name


def envelope(lines: Sequence[Line]) -> Envelope:
    """Find the winner at every size: a line has no error below its first size, and keeps its last one's.

    Who is ahead stays so until another is better by more than `LEVEL`.
    """
    sizes = np.array([row.bytes_per_image for line in lines for row in line.rows])
    at = np.unique(np.concatenate([sizes, np.geomspace(sizes.min(), sizes.max(), 200)[1:-1]]))
    errors = np.array([_along(line, at) for line in lines])
    ahead = [int(errors[:, 0].argmin())]
    for column in errors.T[1:]:
        best = int(column.argmin())
        ahead.append(best if column[best] < (1 - LEVEL) * column[ahead[-1]] else ahead[-1])
    return Envelope(at.tolist(), errors[ahead, np.arange(len(at))].tolist(), [lines[place].name for place in ahead])


def _along(line: Line, at: NDArray[np.float64]) -> NDArray[np.float64]:
    own, errors = np.log([(row.bytes_per_image, max(row.relative_error_mean, EXACT)) for row in line.rows]).T
    along: NDArray[np.float64] = np.exp(np.interp(np.log(at), own, errors, left=np.inf))
    return along


def rates_picture(compression: Compression, images: int, plots: Path) -> Picture:
    """Every way's bytes against its error; `images` are the data set's."""
    lines = lines_of(compression)
    told = "; ".join(f"{name} from {size_text(size)} on" for name, size in envelope(lines).winners)
    alt = f"Line chart: relative error against KiB an image. Least error: {told}. The table has the figures."
    caption = " ".join([*_reading(lines), *_besides(compression, images)])
    title = "An image's bytes and its error"
    return Picture(
        caption,
        (Chart("rates", title, _plotly(lines), alt, 620),),
        path=saved(rates_figure(lines), plots / "rate_distortion.png"),
        title=title,
        alt=alt,
        replaced=True,
    )


def _reading(lines: Sequence[Line]) -> Iterator[str]:
    """How to read the chart, and the words that its legend uses."""
    yield "Lower and further left is better. On the grey band, and filled: the least error at its size."
    notes: dict[str, list[str]] = {}
    for coder, note in CODER_NOTES.items():
        if any(line.coder == coder for line in lines):
            notes.setdefault(note, []).append(coder)
    if notes:
        told = "; ".join(f"{' and '.join(coders)}: {note}" for note, coders in notes.items())
        yield f"{told[0].upper()}{told[1:]}."


def _besides(compression: Compression, images: int) -> Iterator[str]:
    """What an image takes as it is, and what is not in any image's bytes."""
    for row in compression.stored:
        if (row.method, row.dtype) == ("x", "float16"):
            yield f"X in float16 takes {size_text(row.bytes_per_image)}."
    if once := max((row.shared_bytes for row in compression.rates), default=0):
        share = f"{size_text(once / images)} an image over the {images:,} of this data set"
        yield f"What is shared is kept once and not in an image's bytes: at most {size_text(once)}, {share}."


def _points(rows: Sequence[RateRow]) -> tuple[list[float], list[float]]:
    return _on_axes([row.bytes_per_image for row in rows], [row.relative_error_mean for row in rows])


def _on_axes(sizes: Sequence[float], errors: Sequence[float]) -> tuple[list[float], list[float]]:
    """Sizes in KiB and errors in percent."""
    return [size / 1024 for size in sizes], [100 * max(error, EXACT) for error in errors]


def _plotly(lines: Sequence[Line]) -> go.Figure:
    figure, least = go.Figure(), envelope(lines)
    x, y = _on_axes(least.sizes, least.errors)
    band = {"color": _BAND, "width": _BROAD}
    figure.add_scatter(x=x, y=y, mode="lines", name="least error", line=band, hoverinfo="skip")
    for line in lines:
        look, (x, y) = line.look, _points(line.rows)
        symbol = SYMBOLS[look.marker]
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines+markers" if len(line.rows) > 1 else "markers",
            name=line.name,
            line={"color": look.color, "width": look.width, "dash": DASHES[look.line]},
            marker={
                "symbol": [symbol if least.holds(line, row) else f"{symbol}-open" for row in line.rows],
                "color": look.color,
                "size": 8,
                "line": {"width": 1.6, "color": look.color},
            },
            text=[_told(line, row) for row in line.rows],
            hovertemplate="%{text}<br>%{x:,.4g} KiB an image<br>relative error %{y:.3g} %<extra></extra>",
        )
    sizes, errors = _points([row for line in lines for row in line.rows])
    percents = {"ticktext": [f"{tick:g} %" for tick in log_steps(errors)]}
    figure.update_layout(
        template=QUIET,
        xaxis={"title": "KiB an image", "tickangle": 0, "tickfont": {"size": 11}, **log_ticks(sizes)},
        yaxis={"title": "relative error", **log_ticks(errors), **percents},
        # Narrow enough for two columns on a phone, where the plot is 240 pixels wide.
        legend={"xref": "container", "entrywidth": 77, "font": {"size": 11}},
    )
    return figure


def _told(line: Line, row: RateRow) -> str:
    speed = f"<br>{rate_text(row.images_per_second)} images/s back" if row.images_per_second else ""
    return ", ".join(filter(None, [f"<b>{line.name}</b>", _setting(row)])) + speed


def _setting(row: RateRow) -> str:
    """The quality of a picture; of everything else the bits, and the rank of the model behind it."""
    what, _, quality = row.method.partition("-q")
    if what in PICTURES:
        return f"quality {quality}" if quality.isdigit() else ""
    dtype = row.dtype.partition("+")[0]
    return ", ".join(filter(None, [dtype if dtype != "coded" else "", f"rank {row.rank}" if row.trial_id else ""]))


def rates_figure(lines: Sequence[Line]) -> Figure:
    """Draw the chart for paper and for MLflow."""
    figure, least = Figure(figsize=(10, 7)), envelope(lines)
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlabel="KiB an image", ylabel="relative error")
    axes.plot(*_on_axes(least.sizes, least.errors), color=_BAND, linewidth=_BROAD, label="least error")
    for line in lines:
        look, (x, y) = line.look, _points(line.rows)
        style: dict[str, Any] = {"color": look.color, "linewidth": look.width, "marker": look.marker, "markersize": 7}
        style["linestyle"] = look.line if len(x) > 1 else "none"
        axes.plot(x, y, label=line.name, **style, markerfacecolor="white")
        won = [place for place, row in enumerate(line.rows) if least.holds(line, row)]
        axes.plot([x[place] for place in won], [y[place] for place in won], **style | {"linestyle": "none"})
    sizes, errors = _points([row for line in lines for row in line.rows])
    # A single point needs room for a tick, too.
    axes.set(xlim=(min(sizes) / 1.3, 1.3 * max(sizes)), ylim=(min(errors) / 1.3, 1.3 * max(errors)))
    for axis, values, unit in ((axes.xaxis, sizes, ""), (axes.yaxis, errors, " %")):
        axis.set_major_locator(FixedLocator(log_steps(values)))
        axis.set_major_formatter(FuncFormatter(lambda value, _, unit=unit: f"{value:,.4g}{unit}"))
        axis.set_minor_locator(NullLocator())
    quiet_grid(axes)
    deep = -(-(len(lines) + 1) // 4)
    figure.subplots_adjust(left=0.085, right=0.985, top=0.97, bottom=0.1 + 0.035 * deep)
    figure.legend(loc="lower center", ncols=4, frameon=False, handlelength=3)
    return figure


def way_notes(lines: Sequence[Line]) -> tuple[tuple[str, str], ...]:
    """What is kept, by the names of the lines."""
    kept = {line.name.partition(", ")[0]: METHOD_NOTES.get(line.method, "trained") for line in lines}
    return tuple(kept.items())


def rates_table(lines: Sequence[Line], images: int) -> Table:
    """What each way takes at a few errors, fewest bytes first; `images` are the data set's."""
    shares = any(row.shared_bytes for line in lines for row in line.rows)
    once = ("shared,\nKiB", "its share\nan image") if shares else ()
    head = ("error", "kept as", "KiB\nan image", "relative\nerror", "setting", *once, "images/s\nback")
    rows = []
    for target in TARGETS:
        found = [(line.name, row) for line in lines if (row := line.near(target))]
        for name, row in sorted(found, key=lambda pair: pair[1].bytes_per_image):
            texts = [f"{100 * target:g} %", name, kib_text(row.bytes_per_image), percent_text(row.relative_error_mean)]
            own = (row.shared_bytes, row.shared_bytes / images) if shares else ()
            texts += [_setting(row), *(kib_text(size) if size else ABSENT for size in own)]
            rows.append((*texts, rate_text(row.images_per_second or 0.0)))
    return Table(
        "What an image takes at an error",
        head,
        tuple(rows),
        f"Of each way the setting measured nearest to the error; where none is within a factor of {NEAR:g}, the "
        "smallest that is nearer to X. Fewest bytes of an image first"
        + (f" · share: of what is kept once, over the {images:,} images of this data set" if shares else "")
        + " · images/s: features back from bytes; a picture is decoded and encoded again",
        texts=("error", "kept as", "setting"),
        grouped=True,
    )


def out_of_reach(lines: Sequence[Line]) -> tuple[str, ...]:
    """What the table leaves out, a sentence an error."""
    said = []
    for target in TARGETS:
        far = [line for line in lines if not line.near(target)]
        least = [f"{line.name} ({percent_text(line.rows[-1].relative_error_mean)} at the least)" for line in far]
        if least:
            said.append(f"No setting measured comes near {100 * target:g} %: {', '.join(least)}.")
    return tuple(said)
