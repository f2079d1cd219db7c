"""The charts of a study's trials; each point tells whose it is, so that the page's script finds a trial in all of them.

Trials that look alike share a line with gaps: a line each would take plotly seconds for two thousand of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import plotly.colors
import plotly.graph_objects as go

from lowrank_tune.records import BYTES_AT_ERROR, LEADING, TrialOutcome, sign
from lowrank_tune.report.page import Chart
from lowrank_tune.report.style import ABOVE_ONE, INK, QUIET, Trial, log_ticks, series
from lowrank_tune.report.text import STOPPED, count, in_order, leading_text, setting_text

_ENDINGS = {
    "budget": "circle", "patience": "square", "asha": "triangle-down", "interruption": "diamond-tall", "error": "x",
}  # fmt: skip
_AXES = {
    "val_mse": "validation MSE",
    "val_residual_ratio": "validation ρ (finer towards 1)",
    "val_bytes_at_error": "validation KiB an image (at the target error)",
}
_SHADES = 6
MANY = 60
"""Trials of a rank above which lines and markers are small."""
Moments = Mapping[int, tuple[datetime, datetime]]
"""When a trial began and ended, by its number."""


@dataclass(slots=True)
class _Line:
    """Points of several trials, with a gap after each."""

    x: list[float | None] = field(default_factory=list)
    y: list[float | None] = field(default_factory=list)
    trials: list[int | None] = field(default_factory=list)  # whose each point is
    texts: list[str] = field(default_factory=list)

    def add(self, trial: int, x: Iterable[float], y: Iterable[float], texts: Sequence[str]) -> None:
        self.x += [*map(_short, x), None]
        self.y += [*map(_short, y), None]
        self.trials += [*[trial] * len(texts), None]
        self.texts += [*texts, ""]

    def draw(self, figure: go.Figure, **look: Any) -> None:
        """Add the points to a figure; what else stands in a label is what the page knows of the trial."""
        given = {"x": self.x, "y": self.y, "customdata": self.trials, "text": self.texts}
        figure.add_scatter(**given, hovertemplate="%{text}<extra></extra>", **look)


def _short(value: float) -> float:
    """Five digits: more are not seen, and cost a page of many trials its size."""
    return float(f"{value:.5g}")


def rank_colors(ranks: Sequence[int]) -> dict[int, str]:
    # The last sixth of viridis is too pale to see on white.
    places = [0.85 * place / max(len(ranks) - 1, 1) for place in range(len(ranks))]
    return dict(zip(ranks, plotly.colors.sample_colorscale("Viridis", places), strict=True))


def learning_charts(trials: Sequence[Trial], repeats: Sequence[Trial] = ()) -> tuple[Chart, ...]:
    """Draw every trial's ρ, or bytes at the target error, against epochs, a chart a family, coloured by rank.

    Optuna's plot_intermediate_values does not serve: it knows no rank, family or ending, and one diverged trial makes
    all others a flat line.
    """
    seen = [(outcome, history) for outcome, history in trials if _told(history)]
    colors = rank_colors(sorted({outcome.config.rank for outcome, _ in seen}))
    charts = []
    for family in in_order(outcome.config.method for outcome, _ in seen):
        own = [trial for trial in seen if trial[0].config.method == family]
        again = [trial for trial in repeats if trial[0].config.method == family and trial[0].config.rank in colors]
        # The first that all of them have.
        name = max((_told(history)[0] for _, history in own), key=LEADING.index)
        figure, values = go.Figure(), list[float]()
        for rank, color in colors.items():
            solid, dotted, ends = _Line(), _Line(), _Line()
            for line, found in ((solid, own), (dotted, again)):
                for outcome, history in found:
                    if outcome.config.rank == rank:
                        values += _add_curve(line, ends if line is solid else line, name, outcome, history)
            endings = [_ENDINGS[o.stopped_by] for o, _ in own if o.config.rank == rank]
            _draw_rank(figure, f"rank {rank}", color, solid, dotted, ends, endings)
        _endings_legend(figure, [outcome for outcome, _ in own])
        last = max(outcome.epochs for outcome, _ in own)
        ratio = name == "val_residual_ratio"
        yaxis = {"title": _AXES[name], **(ABOVE_ONE.on_plotly([1.0, *values]) if ratio else log_ticks(values))}
        xaxis = {"title": "epoch", "tickformat": "d", "dtick": max(1, -(-last // 8))}
        figure.update_layout(template=QUIET, xaxis=xaxis, yaxis=yaxis, hovermode="closest")
        ends_told = [f"{o.config.trial_id} {STOPPED[o.stopped_by]} at epoch {o.epochs}" for o, _ in own]
        told = ", ".join(ends_told[:12]) + (f", and {len(ends_told) - 12} more" if len(ends_told) > 12 else "")
        shown = (
            f"{_AXES[name].partition(' (')[0].replace('ρ', 'residual ratio')} of {count(len(own), 'trial')} of {family}"
        )
        alt = f"{shown[0].upper()}{shown[1:]} against epochs, coloured by rank: "
        charts.append(Chart(f"learning-{family}", family, figure, f"{alt}{told}. The trials table has them all."))
    return tuple(charts)


def _told(history: list[dict[str, float]]) -> list[str]:
    """Which of the leading figures a trial has."""
    return [name for name in LEADING if series(history, name)[1]]


def _add_curve(
    line: _Line, ends: _Line, name: str, outcome: TrialOutcome, history: list[dict[str, float]]
) -> list[float]:
    epochs, values = series(history, name)
    texts = [leading_text({name: value}) for value in values]
    if name == BYTES_AT_ERROR:
        values = [value / 1024 for value in values]
    places = ABOVE_ONE.place(values) if name == "val_residual_ratio" else values
    if line is ends:  # a repetition, which the page's table does not have by itself
        texts = [f"{outcome.config.trial_id}<br>{text}" for text in texts]
    line.add(outcome.config.number, epochs, places, texts)
    if line is not ends and values:
        ends.add(outcome.config.number, epochs[-1:], places[-1:], texts[-1:])
    return values


def _draw_rank(
    figure: go.Figure, name: str, color: str, solid: _Line, dotted: _Line, ends: _Line, endings: Sequence[str]
) -> None:
    shared: dict[str, Any] = {"name": name, "legendgroup": name}
    size, width = (10, 1.6) if len(endings) <= MANY else (6, 0.7)
    if solid.x:
        solid.draw(figure, mode="lines", line={"color": color, "width": width}, **shared)
        # After each end stands a gap.
        symbols = [symbol for ending in endings for symbol in (ending, "circle")]
        marker = {"symbol": symbols, "size": size, "color": color, "line": {"color": INK, "width": width / 1.6}}
        ends.draw(figure, mode="markers", showlegend=False, marker=marker, **shared)
    if dotted.x:
        line = {"color": color, "width": 1.6, "dash": "dot"}
        dotted.draw(figure, mode="lines+markers", showlegend=False, line=line, marker={"size": 3}, **shared)


def _endings_legend(figure: go.Figure, outcomes: Sequence[TrialOutcome]) -> None:
    for stop in dict.fromkeys(outcome.stopped_by for outcome in outcomes):
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=STOPPED[stop], hoverinfo="skip",
            marker={"symbol": _ENDINGS[stop], "size": 9, "color": "#888888", "line": {"width": 1}},
        )  # fmt: skip


def timeline_chart(outcomes: Sequence[TrialOutcome], moments: Moments, rungs: Sequence[int]) -> Chart | None:
    """Draw when each trial ran and how far it came: a line from its first moment to its last epoch; None without any.

    Optuna's plot_timeline does not serve: it knows no epochs, so that neither the rungs nor what ASHA stopped is seen.
    """
    known = [outcome for outcome in outcomes if outcome.config.number in moments]
    if not known:
        return None
    began = min(moments[outcome.config.number][0] for outcome in known)
    whole = max((moments[outcome.config.number][1] - began).total_seconds() for outcome in known)
    unit, name = (3600.0, "hours") if whole >= 10800 else (60.0, "minutes") if whole >= 180 else (1.0, "seconds")
    figure, colors = go.Figure(), rank_colors(sorted({outcome.config.rank for outcome in known}))
    for rank, color in colors.items():
        lines, ends, own = _Line(), _Line(), [outcome for outcome in known if outcome.config.rank == rank]
        for outcome in own:
            start, end = ((at - began).total_seconds() / unit for at in moments[outcome.config.number])
            text = f"{start:.3g} to {end:.3g} {name}, {count(outcome.epochs, 'epoch')}"
            lines.add(outcome.config.number, (start, end), (0, outcome.epochs), ("", text))
            ends.add(outcome.config.number, (end,), (outcome.epochs,), (text,))
        _draw_rank(figure, f"rank {rank}", color, lines, _Line(), ends, [_ENDINGS[o.stopped_by] for o in own])
    _endings_legend(figure, known)
    last = max(max(outcome.epochs for outcome in known), 1)
    for rung in (rung for rung in rungs if rung < last):
        label = {"annotation": {"text": f"rung {rung}", "font": {"size": 12}}, "annotation_position": "right"}
        figure.add_hline(y=rung, line={"color": "#767676", "width": 1, "dash": "dot"}, layer="below", **label)
    xaxis = {"title": f"{name} since the first trial began", "rangemode": "tozero"}
    yaxis = {"title": "epochs", "tickformat": "d", "dtick": max(1, -(-last // 8)), "range": [0, last * 1.06]}
    figure.update_layout(template=QUIET, xaxis=xaxis, yaxis=yaxis, hovermode="closest", margin={"r": 64})
    stopped = sum(outcome.stopped_by == "asha" for outcome in known)
    alt = f"When each of {count(len(known), 'trial')} ran and how many epochs it came to, "
    alt += f"over {whole / unit:.3g} {name}; ASHA stopped {stopped}. " + (
        f"Its rungs are at epochs {', '.join(map(str, rungs))}. " if rungs else ""
    )
    return Chart("timeline", "When each trial ran, and how far it came", figure, f"{alt}The trials table has them all.")


def coordinates_chart(outcomes: Sequence[TrialOutcome], objective: str, name: str) -> Chart | None:
    """Draw a line a trial through its objective and all that varies among them; None where there are not two.

    Optuna's plot_parallel_coordinate does not serve: it leaves out trials whose family lacks a hyperparameter that
    another one has, and knows no trial's name.
    """
    known = [outcome for outcome in outcomes if outcome.status == "finished" and objective in outcome.best]
    if len(known) < 2:
        return None
    told = [_point(outcome) for outcome in known]
    axes = [key for key in dict.fromkeys(key for point in told for key in point)
            if len({point.get(key) for point in told}) > 1]  # fmt: skip
    values = [outcome.best[objective] for outcome in known]
    places = [_places(values), *(_places([point.get(key) for point in told]) for key in axes)]
    best_first = sorted(range(len(known)), key=lambda place: sign(objective) * values[place])
    shade = {place: order * _SHADES // len(known) for order, place in enumerate(best_first)}
    figure, colors = go.Figure(), plotly.colors.sample_colorscale("Blues_r", _SHADES, 0, 0.75)
    for part in reversed(range(_SHADES)):  # the best on top
        line = _Line()
        for place, outcome in enumerate(known):
            if shade[place] == part:
                at = [(x, column[place]) for x, column in enumerate(places)]
                shown = [(x, y) for x, y in at if y is not None]
                texts = [f"{axes[x - 1]} {setting_text(told[place][axes[x - 1]])}" if x
                         else f"{objective} {values[place]:.4g}" for x, _ in shown]  # fmt: skip
                line.add(outcome.config.number, (x for x, _ in shown), (y for _, y in shown), texts)
        if line.x:
            shared = {"color": colors[part], "width": 1.2}
            line.draw(figure, mode="lines", line=shared, showlegend=False)
    for x, key in enumerate([objective, *axes]):
        column = values if not x else [point.get(key) for point in told]
        _draw_axis(figure, x, column)
    xaxis = {"tickvals": list(range(len(axes) + 1)), "ticktext": [objective.removeprefix("val_"), *axes],
             "range": [-0.2, len(axes) + 0.6], "showgrid": False, "side": "top", "ticks": ""}  # fmt: skip
    yaxis = {"visible": False, "range": [-0.06, 1.06]}
    margin = {"l": 20, "r": 20, "t": 60, "b": 20}
    figure.update_layout(template=QUIET, xaxis=xaxis, yaxis=yaxis, hovermode="closest", margin=margin)
    alt = f"Parallel coordinates of {count(len(known), 'trial')} that ran to their own end: a line a trial through "
    alt += f"its {objective} and {', '.join(axes) or 'nothing that varies'}. The trials table has the same figures."
    return Chart(name, "Every trial that ran to its own end", figure, alt, wide=True)


def _point(outcome: TrialOutcome) -> dict[str, float | str]:
    config = outcome.config
    shared: dict[str, float | str] = {
        "family": config.family,
        "rank": config.rank,
        "lr": config.lr,
        "weight decay": config.weight_decay,
    }
    return {**shared, "batch": config.batch_size, **config.family_params}


def _is_log(numbers: Sequence[float]) -> bool:
    return min(numbers) > 0 and max(numbers) >= 8 * min(numbers)


def _places(column: Sequence[float | str | None]) -> list[float | None]:
    """Where values lie between the ends of an axis, 0 and 1; words in their order, None where there is no value."""
    words = sorted({value for value in column if isinstance(value, str)})
    numbers = [words.index(value) if isinstance(value, str) else value for value in column]
    found = [number for number in numbers if number is not None]
    scale = math.log10 if not words and _is_log(found) else float
    low, high = scale(min(found)), scale(max(found))
    return [None if number is None else (scale(number) - low) / (high - low or 1.0) for number in numbers]


def _draw_axis(figure: go.Figure, x: int, column: Sequence[float | str | None]) -> None:
    """Draw one of the upright axes: its ends, or each of its words or few values, beside it."""
    found = sorted({value for value in column if value is not None}, key=lambda value: (isinstance(value, str), value))
    labels = found if len(found) <= 5 else [found[0], found[-1]]
    places = dict(zip(column, _places(column), strict=True))
    figure.add_vline(x=x, line={"color": "#767676", "width": 1}, layer="below")
    for value in labels:
        figure.add_annotation(
            x=x, y=places[value], text=setting_text(value), showarrow=False, xanchor="left", xshift=4,
            yanchor="bottom", bgcolor="rgba(255,255,255,0.85)", font={"size": 12},
        )  # fmt: skip
