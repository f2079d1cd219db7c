"""What a search was worth, and how it went."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from lowrank_tune.records import TrialOutcome, sign
from lowrank_tune.report.page import Chart, Picture, Section
from lowrank_tune.report.style import QUIET
from lowrank_tune.report.tables import Table
from lowrank_tune.report.text import count, ratio_text
from lowrank_tune.report.trial_charts import coordinates_chart, timeline_chart

logger = logging.getLogger(__name__)

LEAST_FOR_IMPORTANCE = 10
"""Complete trials below which an importance is an accident."""


def search_section(
    journal: Path, objectives: Sequence[str], outcomes: Sequence[TrialOutcome], rungs: Sequence[int]
) -> Section:
    """Draw a search, with Optuna's importances and moments from its journal, and say why a chart is missing."""
    study, notes, moments = _opened(journal), list[str](), dict[int, tuple[datetime, datetime]]()
    pictures, tables = list[Picture](), list[Table]()
    for objective in objectives:
        several = f"-{objective}" if len(objectives) > 1 else ""
        chart = coordinates_chart(outcomes, objective, f"coordinates{several}")
        if chart:
            caption = f"A line a trial through all that was searched; darker is better in {objective}."
            pictures.append(Picture(caption, (chart,)))
    if not pictures:
        notes.append("Parallel coordinates need 2 trials that ran to their own end.")
    if study is None:
        notes.append("No search journal lies with this study, so there is nothing that Optuna knows of it.")
    else:
        states = Counter(trial.state.name.lower() for trial in study.trials).most_common()
        ended = ", ".join(f"{number} {state}" for state, number in states) or "none"
        notes.append(f"Only trials that ran to their own end count for parameters: {ended}.")
        for place, objective in enumerate(objectives):
            _draw_importance(study, place, objective, pictures, tables, notes)
        moments = {_number(trial): (trial.datetime_start, trial.datetime_complete) for trial in study.trials
                   if trial.datetime_start and trial.datetime_complete}  # fmt: skip
    timeline = timeline_chart(outcomes, moments, rungs)
    if timeline:
        caption = "A line a trial, from when it began to its last epoch; the marker at its end tells what stopped it. "
        caption += "Dotted: the rungs, at which ASHA lets few go on." if rungs else "No scheduler stopped any."
        pictures.insert(0, Picture(caption, (timeline,)))
    return Section("search", "The search", tuple(pictures), tables=tuple(tables), notes=tuple(dict.fromkeys(notes)))


def _opened(journal: Path) -> optuna.Study | None:
    try:
        # Opening a journal makes one where there is none.
        backend = JournalFileBackend(str(journal.resolve(strict=True)))
        return optuna.load_study(study_name=None, storage=JournalStorage(backend))
    except Exception as error:  # a journal cut off by a kill fails wherever Optuna trips over it
        logger.warning("%s cannot be read (%s); what Optuna knows of the trials is left out", journal, error)
        return None


def _number(trial: FrozenTrial) -> int:
    number: int = trial.user_attrs.get("config", {}).get("number", trial.number)
    return number


def _draw_importance(
    study: optuna.Study, place: int, objective: str, pictures: list[Picture], tables: list[Table], notes: list[str]
) -> None:
    """Add what mattered to one objective, at its place among the study's."""
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    # Ratios, errors and bytes differ by powers of ten.
    log = objective != "val_token_cosine" and all(trial.values[place] > 0 for trial in complete)
    name = f"log10 of {objective}" if log else objective
    of, several = (f": {objective}", f"-{objective}") if len(study.directions) > 1 else ("", "")

    def target(trial: FrozenTrial) -> float:
        value = trial.values[place] if trial.values else math.nan
        return math.log10(value) if log else value

    try:
        if len(complete) < LEAST_FOR_IMPORTANCE:
            raise ValueError(f"it needs {LEAST_FOR_IMPORTANCE} complete trials at least, not {len(complete)}")
        with warnings.catch_warnings():
            # About charts that Optuna calls experimental, and of scikit-learn about constant targets.
            warnings.simplefilter("ignore")
            figure = optuna.visualization.plot_param_importances(study, target=target, target_name=name)
        found = list(zip(figure.data[0].y, figure.data[0].x, strict=True))[::-1] if figure.data else []
        if not found:
            raise ValueError("no hyperparameter varies in every complete trial")
        rows = tuple((key, f"{value:.2f}") for key, value in found)
        told = ", ".join(f"{key} {value}" for key, value in rows)
        alt = f"Bar chart of hyperparameter importances for {name}: {told}."
        caption = "By Optuna: the part of the objective's spread that each hyperparameter explains."
        margin = {"l": 50, "r": 30, "t": 40, "b": 50}
        figure.update_layout(title=None, template=QUIET, showlegend=False, margin=margin)
        figure.update_yaxes(title_standoff=12)
        figure.update_xaxes(title=None)
        pictures.append(Picture(caption, (Chart(f"importance{several}", f"What mattered{of}", figure, alt),)))
        head = ("hyperparameter", "importance")
        tables.append(Table(f"Hyperparameter importances{of}", head, rows, texts=head[:1]))
    except (ValueError, RuntimeError) as error:
        notes.append(f"There is no hyperparameter importance: {str(error).rstrip('.')}.")


def search_sentences(outcomes: Sequence[TrialOutcome], objective: str, status: Mapping[str, Any]) -> list[str]:
    """Say what each rank's search was worth: what the defaults gave, what came of it and when; and what ended it."""
    said = []
    for rank in sorted({outcome.config.rank for outcome in outcomes}):
        own = sorted(
            (outcome for outcome in outcomes if outcome.config.rank == rank), key=lambda outcome: outcome.config.number
        )
        known = [outcome for outcome in own if objective in outcome.best]
        if not known:
            continue
        # Of equals the first: what comes later is no gain.
        best = min(known, key=lambda outcome: sign(objective) * outcome.best[objective])
        defaults = [outcome for outcome in known if outcome.config.origin == "defaults"]
        gave = f"the search gave {_value(best, objective)} ({best.config.trial_id})"
        if best in defaults:
            gave = f"the defaults gave {_value(best, objective)} ({best.config.family}), and the search nothing better"
        elif defaults:
            least = min(defaults, key=lambda outcome: sign(objective) * outcome.best[objective])
            gave = f"the defaults gave {_value(least, objective)} ({least.config.family}), {gave}"
        tried = count(len(own), "trial")
        after = f" in {tried}" if best in defaults else f"; after {own.index(best) + 1} of {tried} nothing better came"
        said.append(f"Rank {rank}, {objective}: {gave}{after}.")
    if status.get("stopped_for"):
        # A search that had all its trials has nothing to explain.
        told = str(status.get("stopped_why") or "the search ended as it had had all its trials")
        said.append(f"{told[0].upper()}{told[1:]}.")
    return said


def _value(outcome: TrialOutcome, objective: str) -> str:
    value = outcome.best[objective]
    return ratio_text(value) if objective == "val_residual_ratio" else f"{value:.4g}"
