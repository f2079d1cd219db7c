"""How the search went, drawn by Optuna itself from the study's own journal."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from plotly.graph_objects import Figure

from lowrank_tune.report.charts import Chart, chart, quiet_layout
from lowrank_tune.report.words import count

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

LEAST_FOR_IMPORTANCE = 10
"""Complete trials below which an importance is an accident."""
LEAST_FOR_COORDINATES = 2


@dataclass(frozen=True, slots=True)
class SearchViews:
    """What Optuna shows of a search.

    Attributes:
        charts: parallel coordinates and importances, where they can be had.
        importances: of each hyperparameter, the most important first; empty where there is none.
        notes: in words why a chart is missing, and how to read those that are there.
    """

    charts: tuple[Chart, ...]
    importances: tuple[tuple[str, float], ...]
    notes: tuple[str, ...]


def search_views(journal: Path, objective: str) -> SearchViews:
    """Let Optuna draw parallel coordinates and hyperparameter importances.

    Args:
        journal: `tune/optuna.journal` of the study.
        objective: what was searched for; ratios and errors are drawn as their logarithm, for they differ by powers.
    """
    study = _open(journal)
    if study is None:
        return SearchViews((), (), ("No search journal lies with this study, so there is nothing for Optuna to draw.",))
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    target, name = _target(objective, complete)
    notes = [f"Only trials that ran to their own end count here: {_states(study)}."]
    charts = []
    if len(complete) >= LEAST_FOR_COORDINATES:
        draw = optuna.visualization.plot_parallel_coordinate
        figure = _quietly(lambda: draw(study, target=target, target_name=name))
        alt = (
            f"Parallel coordinates of {count(len(complete), 'complete trial')}: a line a trial through its {name} and "
        )
        charts += _chart(
            "coordinates",
            "Every complete trial",
            figure,
            f"{alt}hyperparameters. The trials table has the same figures.",
        )
    else:
        notes.append(f"Parallel coordinates need {LEAST_FOR_COORDINATES} complete trials.")
    importances, why_not = _importances(study, complete, target)
    if why_not:
        notes.append(why_not)
    else:
        figure = _quietly(lambda: optuna.visualization.plot_param_importances(study, target=target, target_name=name))
        told = ", ".join(f"{key} {value:.2f}" for key, value in importances)
        charts += _chart(
            "importance", "What mattered", figure, f"Bar chart of hyperparameter importances for {name}: {told}."
        )
    return SearchViews(tuple(charts), importances, tuple(notes))


def _open(journal: Path) -> optuna.Study | None:
    if not journal.is_file():
        return None
    try:
        storage = JournalStorage(JournalFileBackend(str(journal)))
        names = optuna.get_all_study_names(storage)
        return optuna.load_study(study_name=names[0], storage=storage) if names else None
    except Exception as error:  # a journal cut off by a kill fails wherever Optuna trips over it
        _log.warning("%s cannot be read (%s); the report goes without Optuna's charts", journal, error)
        return None


def _target(objective: str, complete: list[FrozenTrial]) -> tuple[Callable[[FrozenTrial], float], str]:
    if objective != "val_token_cosine" and all((trial.value or 0) > 0 for trial in complete):
        return lambda trial: math.log10(trial.value or math.nan), f"log10 of {objective}"
    return lambda trial: trial.value if trial.value is not None else math.nan, objective


def _states(study: optuna.Study) -> str:
    states = Counter(trial.state.name.lower() for trial in study.trials)
    return ", ".join(f"{number} {state}" for state, number in states.most_common()) or "none"


def _importances(
    study: optuna.Study, complete: list[FrozenTrial], target: Callable[[FrozenTrial], float]
) -> tuple[tuple[tuple[str, float], ...], str]:
    if len(complete) < LEAST_FOR_IMPORTANCE:
        return (), (
            f"Hyperparameter importance needs {LEAST_FOR_IMPORTANCE} complete trials at least, and this study has "
            f"{len(complete)}: the others were stopped early, failed or never ran."
        )
    try:
        found = _quietly(lambda: optuna.importance.get_param_importances(study, target=target))
    except (ValueError, RuntimeError) as error:
        return (), f"Optuna can give no hyperparameter importance for this study: {str(error).rstrip('.')}."
    if not found:
        return (), "No hyperparameter varies in every complete trial, so there is no importance to give."
    return tuple(found.items()), ""


def _quietly(draw: Callable[[], _T]) -> _T:
    with warnings.catch_warnings():
        # About charts that Optuna calls experimental, and of scikit-learn about constant targets.
        warnings.simplefilter("ignore")
        return draw()


def _chart(name: str, title: str, figure: Figure, alt: str) -> list[Chart]:
    quiet = quiet_layout("", "")
    figure.update_layout(
        title=None, template="none", font=quiet["font"], paper_bgcolor="#ffffff", plot_bgcolor="#ffffff"
    )
    figure.update_layout(dragmode=False, margin={"l": 50, "r": 30, "t": 40, "b": 50}, showlegend=False)
    figure.update_yaxes(automargin=True, title_standoff=12)
    return [chart(name, title, figure, alt, 420, wide=name == "coordinates")]
