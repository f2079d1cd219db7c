"""Interactive: every trial's learning curve with the point and the reason at which it stopped, and the spectrum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.colors
import plotly.graph_objects as go

from lowrank_tune.records import TrialOutcome
from lowrank_tune.report.charts import INK, SYMBOLS, Chart, chart, pale, quiet_layout, stretched_axis
from lowrank_tune.report.curves import STOP_MARKERS, Trial
from lowrank_tune.report.history import series
from lowrank_tune.report.palette import in_order
from lowrank_tune.report.spectrum import Spectrum, shown_ranks
from lowrank_tune.report.stretch import ABOVE_ONE
from lowrank_tune.report.words import STOPPED, count, ratio_text

_RATIO = "val_residual_ratio"


def learning_charts(trials: Sequence[Trial], confirmations: Sequence[Trial]) -> tuple[Chart, ...]:
    """Draw every trial's validation residual ratio against epochs, a chart a family, coloured by rank.

    Args:
        trials: outcomes with their histories, at least one of them not empty.
        confirmations: repetitions with theirs; those of a trial are drawn as a band of mean ± sd over seeds.
    """
    seen = [(outcome, history) for outcome, history in trials if series(history, _RATIO)[1]]
    ranks = sorted({outcome.config.rank for outcome, _ in seen})
    # The last sixth of viridis is too pale to see on white.
    places = [0.85 * place / max(len(ranks) - 1, 1) for place in range(len(ranks))]
    colors = dict(zip(ranks, plotly.colors.sample_colorscale("Viridis", places, colortype="tuple"), strict=True))
    shades = {rank: _hex(color) for rank, color in colors.items()}
    return tuple(
        _family_chart(
            family,
            [trial for trial in seen if trial[0].config.family == family],
            [trial for trial in confirmations if trial[0].config.family == family],
            shades,
        )
        for family in in_order(outcome.config.family for outcome, _ in seen)
    )


def _family_chart(
    family: str, trials: Sequence[Trial], confirmations: Sequence[Trial], colors: dict[int, str]
) -> Chart:
    figure = go.Figure()
    drawn = [1.0]
    for confirmed in dict.fromkeys(outcome.config.confirms for outcome, _ in confirmations):
        repeats = [(outcome, history) for outcome, history in confirmations if outcome.config.confirms == confirmed]
        drawn += _seed_band(figure, repeats, colors)
    named: set[int] = set()
    for outcome, history in sorted(trials, key=lambda trial: trial[0].config.rank):
        rank = outcome.config.rank
        drawn += _trial_line(figure, outcome, history, colors[rank], rank not in named)
        named.add(rank)
    for stop in dict.fromkeys(outcome.stopped_by for outcome, _ in trials):
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=STOPPED[stop], hoverinfo="skip",
            marker={"symbol": SYMBOLS[STOP_MARKERS[stop]], "size": 9, "color": "#888888", "line": {"width": 1}},
        )  # fmt: skip
    figure.update_layout(quiet_layout("epoch", "validation ρ (finer towards 1)"))
    last = max(outcome.epochs for outcome, _ in trials)
    figure.update_layout(
        yaxis=stretched_axis(ABOVE_ONE, drawn), xaxis={"tickformat": "d", "dtick": max(1, -(-last // 8))}
    )
    ends = ", ".join(
        f"{outcome.config.trial_id} {STOPPED[outcome.stopped_by]} at epoch {outcome.epochs}"
        for outcome, _ in list(trials)[:12]
    )
    more = f", and {len(trials) - 12} more" if len(trials) > 12 else ""
    alt = (
        f"Validation residual ratio of {count(len(trials), 'trial')} of {family} against epochs, coloured by rank: "
        f"{ends}{more}. The trials table has them all."
    )
    return chart(f"learning-{family}", family, figure, alt, 420)


def _trial_line(
    figure: go.Figure, outcome: TrialOutcome, history: list[dict[str, float]], color: str, in_legend: bool
) -> list[float]:
    epochs, values = series(history, _RATIO)
    config, last = outcome.config, len(values) - 1
    placed = ABOVE_ONE.place(values)
    settings = ", ".join(f"{key} {value:.3g}" for key, value in {"lr": config.lr, **config.family_params}.items())
    ending = f"<br>{STOPPED[outcome.stopped_by]} at epoch {outcome.epochs}"
    ending += f": {outcome.reason[:120]}" if outcome.reason else ""
    figure.add_scatter(
        x=epochs,
        y=placed,
        mode="lines+markers",
        name=f"rank {config.rank}",
        legendgroup=f"rank {config.rank}",
        showlegend=in_legend,
        line={"color": color, "width": 1.6},
        marker={
            "symbol": [*["circle"] * last, SYMBOLS[STOP_MARKERS[outcome.stopped_by]]],
            "size": [*[3] * last, 10],
            "color": color,
            "line": {"color": INK, "width": [*[0] * last, 1]},
        },
        text=[
            f"<b>{config.trial_id}</b><br>{settings}<br>epoch {epoch:.0f}: ρ {ratio_text(value)}"
            + (ending if place == last else "")
            for place, (epoch, value) in enumerate(zip(epochs, values, strict=True))
        ],
        hovertemplate="%{text}<extra></extra>",
    )
    return values


def _seed_band(figure: go.Figure, repeats: Sequence[Trial], colors: dict[int, str]) -> list[float]:
    config = repeats[0][0].config
    lines = [dict(zip(*series(history, _RATIO), strict=True)) for _, history in repeats]
    epochs = sorted(set.intersection(*(set(line) for line in lines))) if all(lines) else []
    if len(lines) < 2 or not epochs or config.rank not in colors:
        return []
    values_SE = np.array([[line[epoch] for epoch in epochs] for line in lines])
    mean, spread = values_SE.mean(axis=0), values_SE.std(axis=0, ddof=1)
    low, high = np.maximum(mean - spread, 1.0).tolist(), (mean + spread).tolist()
    figure.add_scatter(
        x=[*epochs, *reversed(epochs)],
        y=[*ABOVE_ONE.place(high), *reversed(ABOVE_ONE.place(low))],
        fill="toself",
        mode="lines",
        line={"width": 0},
        fillcolor=pale(colors[config.rank], 0.25),
        name=f"{config.confirms} over {len(lines)} seeds",
        legendgroup=f"rank {config.rank}",
        showlegend=False,
        hoverinfo="skip",
    )
    return [*low, *high]


def spectrum_charts(spectrum: Spectrum, ranks: Sequence[int]) -> tuple[Chart, ...]:
    """Draw the singular values, mean and range over images, and what the SVD leaves at each rank.

    Args:
        spectrum: from `measure_spectrum`.
        ranks: the study's, marked.
    """
    shown = shown_ranks(spectrum)
    values_NK = spectrum.values_NK[:, : len(shown)]
    x, mean = shown.tolist(), values_NK.mean(axis=0).tolist()
    low, high = np.maximum(values_NK.min(axis=0), 1e-6).tolist(), values_NK.max(axis=0).tolist()
    values = go.Figure()
    values.add_scatter(
        x=[*x, *reversed(x)], y=[*high, *reversed(low)], fill="toself", mode="lines", line={"width": 0},
        fillcolor=pale("#0072B2", 0.2), name="range over images", hoverinfo="skip",
    )  # fmt: skip
    values.add_scatter(
        x=x, y=mean, mode="lines", line={"color": "#0072B2", "width": 2}, name="mean",
        hovertemplate="singular value %{x}: %{y:.3g} of the first<extra></extra>",
    )  # fmt: skip
    values.update_layout(quiet_layout("number", "share of the first"))
    left = go.Figure()
    left.add_scatter(
        x=x, y=np.maximum(spectrum.left_K[: len(x)], 1e-12).tolist(), mode="lines", showlegend=False,
        line={"color": "#000000", "width": 2},
        hovertemplate="rank %{x}: the SVD leaves %{y:.3g} of the squared norm<extra></extra>",
    )  # fmt: skip
    left.update_layout(quiet_layout("rank", "share of ‖X‖²"))
    for figure in (values, left):
        figure.update_layout(xaxis={"type": "log", "dtick": "D2"})
        figure.update_layout(yaxis={"type": "log", "dtick": 1, "tickformat": "~g"})
        for rank in ranks:
            figure.add_vline(x=rank, line={"color": "#888888", "width": 1, "dash": "dot"})
    at = ", ".join(f"{spectrum.left_K[rank - 1]:.3g} at rank {rank}" for rank in ranks if rank <= len(x))
    alts = (
        f"Line chart of the mean singular value over the first, falling to {mean[-1]:.2g}.",
        f"Line chart of the share of the squared norm that the SVD leaves: {at}.",
    )
    return (
        chart("spectrum", "Singular values over the first", values, alts[0], 380),
        chart("left", "What the SVD leaves of the squared norm", left, alts[1], 380),
    )


def _hex(color: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in color)
