"""What Optuna shows of a search."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from plotly.graph_objects import Figure

from lowrank_tune.report.page import Chart, Picture, Section
from lowrank_tune.report.style import QUIET
from lowrank_tune.report.tables import Table
from lowrank_tune.report.text import count

logger = logging.getLogger(__name__)

LEAST_FOR_IMPORTANCE = 10
"""Complete trials below which an importance is an accident."""


def search_section(journal: Path, objectives: Sequence[str]) -> Section:
    """Let Optuna draw a search from its journal, for each objective, and say why a chart is missing."""
    try:
        # Opening a journal makes one where there is none.
        backend = JournalFileBackend(str(journal.resolve(strict=True)))
        study = optuna.load_study(study_name=None, storage=JournalStorage(backend))
    except Exception as error:  # a journal cut off by a kill fails wherever Optuna trips over it
        logger.warning("%s cannot be read (%s); what Optuna knows of the trials is left out", journal, error)
        lacking = "No search journal lies with this study, so there is nothing for Optuna to draw."
        return Section("search", "The search", notes=(lacking,))
    states = Counter(trial.state.name.lower() for trial in study.trials).most_common()
    ended = ", ".join(f"{number} {state}" for state, number in states) or "none"
    pictures, tables = list[Picture](), list[Table]()
    notes = [f"Only trials that ran to their own end count for parameters: {ended}."]
    with warnings.catch_warnings():
        # About charts that Optuna calls experimental, and of scikit-learn about constant targets.
        warnings.simplefilter("ignore")
        for place, objective in enumerate(objectives):
            _draw_objective(study, place, objective, pictures, tables, notes)
        if study.trials:
            alt = f"When each of {count(len(study.trials), 'trial')} began and ended: a bar a trial, by its state."
            caption = "By Optuna: when each trial ran, and what became of it."
            figure = optuna.visualization.plot_timeline(study)
            pictures.append(_optunas("timeline", "When each trial ran", figure, alt, caption, True))
    return Section("search", "The search", tuple(pictures), tables=tuple(tables), notes=tuple(dict.fromkeys(notes)))


def _draw_objective(
    study: optuna.Study, place: int, objective: str, pictures: list[Picture], tables: list[Table], notes: list[str]
) -> None:
    """Add what Optuna draws of one objective, at its place among the study's."""
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    # Ratios, errors and bytes differ by powers of ten.
    log = objective != "val_token_cosine" and all(trial.values[place] > 0 for trial in complete)
    name = f"log10 of {objective}" if log else objective
    of, several = (f": {objective}", f"-{objective}") if len(study.directions) > 1 else ("", "")

    def target(trial: FrozenTrial) -> float:
        value = trial.values[place] if trial.values else math.nan
        return math.log10(value) if log else value

    if len(complete) < 2:
        notes.append("Parallel coordinates need 2 complete trials.")
    else:
        alt = f"Parallel coordinates of {count(len(complete), 'complete trial')}: a line a trial through its {name} "
        alt += "and hyperparameters. The trials table has the same figures."
        caption = "By Optuna: a line a trial through all that was searched; darker is better."
        figure = optuna.visualization.plot_parallel_coordinate(study, target=target, target_name=name)
        pictures.append(_optunas(f"coordinates{several}", f"Every complete trial{of}", figure, alt, caption))
    try:
        if len(complete) < LEAST_FOR_IMPORTANCE:
            raise ValueError(f"it needs {LEAST_FOR_IMPORTANCE} complete trials at least, not {len(complete)}")
        figure = optuna.visualization.plot_param_importances(study, target=target, target_name=name)
        found = list(zip(figure.data[0].y, figure.data[0].x, strict=True))[::-1] if figure.data else []
        if not found:
            raise ValueError("no hyperparameter varies in every complete trial")
        rows = tuple((key, f"{value:.2f}") for key, value in found)
        told = ", ".join(f"{key} {value}" for key, value in rows)
        alt = f"Bar chart of hyperparameter importances for {name}: {told}."
        caption = "By Optuna: the part of the objective's spread that each hyperparameter explains."
        pictures.append(_optunas(f"importance{several}", f"What mattered{of}", figure, alt, caption))
        head = ("hyperparameter", "importance")
        tables.append(Table(f"Hyperparameter importances{of}", head, rows, texts=head[:1]))
    except (ValueError, RuntimeError) as error:
        notes.append(f"There is no hyperparameter importance: {str(error).rstrip('.')}.")


def _optunas(name: str, title: str, figure: Figure, alt: str, caption: str, legend: bool = False) -> Picture:
    margin = {"l": 50, "r": 30, "t": 40, "b": 80 if legend else 50}
    figure.update_layout(title=None, template=QUIET, showlegend=legend, margin=margin)
    figure.update_yaxes(title_standoff=12)
    figure.update_xaxes(title=None)
    return Picture(caption, (Chart(name, title, figure, alt, wide=name.startswith("coordinates")),))
