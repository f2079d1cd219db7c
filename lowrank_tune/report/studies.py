"""The page that holds several studies against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from lowrank_tune.files import write_whole
from lowrank_tune.measured import Comparison
from lowrank_tune.records import leading
from lowrank_tune.report.page import Chart, Picture, Section, render_page
from lowrank_tune.report.style import ABOVE_ONE, QUIET, Trial, log_ticks, series, thinned
from lowrank_tune.report.tables import Table
from lowrank_tune.report.text import ABSENT, cosine_text, ratio_interval_text, ratio_text, seed_texts

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True, slots=True)
class Shown:
    """A study on the page."""

    comparison: Comparison
    settings: Mapping[str, Any]  # its resolved study file
    trials: Sequence[Trial]


def write_studies_page(studies: Mapping[str, Shown], caveats: Sequence[str], path: Path) -> None:
    """Write the page of some studies, by their ids."""
    best = Picture(
        "ρ of the trained model that each study's validation chose, on its test images, with a 95 % interval over "
        "groups of images: 1 is the optimum.",
        (_best_chart(studies),),
    )
    learning = Picture(
        "Validation figures of the same models while they were trained: a line a study.", _learning_charts(studies)
    )
    sections = [
        Section("best", "The best by rank", (best,), points=tuple(caveats), tables=(best_table(studies),)),
        Section("learning", "Learning", (learning,) if learning.charts else ()),
        Section("settings", "Where the study files differ", tables=(differences_table(studies),)),
    ]
    html = render_page("studies.html.j2", title="Studies side by side", subtitle=", ".join(studies), shown=sections)
    write_whole(path, lambda whole: whole.write_text(html, encoding="utf-8"))


def _look(place: int) -> dict[str, Any]:
    return {"color": _COLORS[place % len(_COLORS)], "dash": _DASHES[place % len(_DASHES)], "width": 2}


def _best_chart(studies: Mapping[str, Shown]) -> Chart:
    figure, values, ranks = go.Figure(), [1.0], set[int]()
    for place, (name, study) in enumerate(studies.items()):
        rows = [row for row in study.comparison.best_of_each_rank() if row.residual_ratio is not None]
        ratios = [row.residual_ratio or 1.0 for row in rows]
        ends = [(row.residual_ratio_low or at, row.residual_ratio_high or at)
                for row, at in zip(rows, ratios, strict=True)]  # fmt: skip
        at, low, high = (ABOVE_ONE.place(column) for column in (ratios, [e[0] for e in ends], [e[1] for e in ends]))
        values += [value for pair in ends for value in pair]
        ranks |= {row.rank for row in rows}
        figure.add_scatter(
            # Beside each other, so that no interval hides another.
            x=[row.rank * 1.02 ** (place - (len(studies) - 1) / 2) for row in rows], y=at, name=name,
            mode="lines+markers", line=_look(place), marker={"size": 8},
            error_y={"type": "data", "array": [h - y for h, y in zip(high, at, strict=True)],
                     "arrayminus": [y - lowest for lowest, y in zip(low, at, strict=True)]},
            text=[f"<b>{name}</b><br>rank {row.rank}, {row.method}: ρ {ratio_text(row.residual_ratio)} "
                  f"({ratio_interval_text(row)})" for row in rows], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    ticks = thinned(sorted(ranks)) if ranks else []
    xaxis = {"title": "rank", "type": "log", "tickvals": ticks, "ticktext": list(map(str, ticks))}
    yaxis = {"title": "ρ on test images (finer towards 1)", **ABOVE_ONE.on_plotly(values)}
    figure.update_layout(template=QUIET, xaxis=xaxis, yaxis=yaxis, showlegend=True)
    alt = (
        "Line chart of the residual ratio of each study's best model at each rank, with intervals. The table has them."
    )
    return Chart("best", "ρ of the best by rank", figure, alt)


def _learning_charts(studies: Mapping[str, Shown]) -> tuple[Chart, ...]:
    """Draw the best trials' curves over each other, a chart a rank."""
    charts = []
    ranks = {row.rank for study in studies.values() for row in study.comparison.best_of_each_rank()}
    for rank in sorted(ranks):
        found = []
        for place, (name, study) in enumerate(studies.items()):
            chosen = {row.trial_id for row in study.comparison.best_of_each_rank() if row.rank == rank}
            found += [(place, name, trial) for trial in study.trials if trial[0].config.trial_id in chosen and trial[1]]
        told = [leading(outcome.best) for _, _, (outcome, _) in found]
        # What all of them have.
        figured = told[0] if len(set(told)) == 1 else "val_mse"
        ratio, figure, values = figured == "val_residual_ratio", go.Figure(), list[float]()
        for place, name, (outcome, history) in found:
            epochs, own = series(history, figured)
            values += own
            of = f"<b>{name}</b><br>{outcome.config.trial_id}"
            figure.add_scatter(
                x=epochs, y=ABOVE_ONE.place(own) if ratio else own, name=name, mode="lines+markers", line=_look(place),
                marker={"size": 4}, text=[f"{of}<br>epoch {epoch:.0f}: {value:.4g}"
                                          for epoch, value in zip(epochs, own, strict=True)],
                hovertemplate="%{text}<extra></extra>",
            )  # fmt: skip
        if values:
            yaxis = {"title": figured, **(ABOVE_ONE.on_plotly([1.0, *values]) if ratio else log_ticks(values))}
            last = max(outcome.epochs for _, _, (outcome, _) in found)
            xaxis = {"title": "epoch", "tickformat": "d", "dtick": max(1, -(-last // 8))}
            figure.update_layout(template=QUIET, xaxis=xaxis, yaxis=yaxis, showlegend=True)
            alt = f"Line chart of {figured} against epochs at rank {rank}, a line a study: {', '.join(studies)}."
            charts.append(Chart(f"learning-{rank}", f"rank {rank}", figure, alt))
    return tuple(charts)


def best_table(studies: Mapping[str, Shown]) -> Table:
    found = [(name, row) for name, study in studies.items() for row in study.comparison.best_of_each_rank()]
    return Table.of(
        "The best of each study, by rank",
        sorted(found, key=lambda pair: pair[1].rank),
        {
            "rank": lambda pair: str(pair[1].rank),
            "study": lambda pair: pair[0],
            "method": lambda pair: pair[1].method,
            "ρ": lambda pair: ratio_text(pair[1].residual_ratio),
            "95 % of ρ": lambda pair: ratio_interval_text(pair[1]),
            "ρ over seeds": lambda pair: seed_texts(pair[1])[0],
            "token cosine": lambda pair: cosine_text(pair[1].token_cosine_mean),
            "test images": lambda pair: str(pair[1].n_images),
            "trial": lambda pair: pair[1].trial_id,
        },
        "On the test images · over seeds: the same configuration trained again, mean ± sd",
        texts=("study", "method", "trial"),
        grouped=True,
    )


def differences_table(studies: Mapping[str, Shown]) -> Table:
    """The keys of the study files whose values are not the same in all."""
    flat = [_flat(study.settings) for study in studies.values()]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [(key, *(settings.get(key, ABSENT) for settings in flat)) for key in keys]
    differing = tuple(row for row in rows if len(set(row[1:])) > 1)
    caption = "Every key whose values are not the same, defaults filled in." if differing else "No key differs."
    head = ("key", *studies)
    return Table("Where the study files differ", head, differing, caption, texts=head, prose=head[1:])


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, str]:
    found = dict[str, str]()
    for name, value in settings.items():
        nested = isinstance(value, Mapping) and value
        found |= (
            _flat(value, f"{above}{name}.") if nested else {f"{above}{name}": ABSENT if value is None else str(value)}
        )
    return found
