"""report.html: the whole study in one file that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lowrank_tune.records import Comparison, ComparisonRow, FeatureSet, Split, TrialOutcome
from lowrank_tune.report.palette import in_order
from lowrank_tune.report.table import Cell, rank_groups
from lowrank_tune.report.words import (
    ABSENT,
    METHOD_NOTES,
    STOPPED,
    cosine_text,
    count,
    difference_text,
    duration_text,
    rate_text,
    ratio_text,
    seed_texts,
    summary,
)


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG in the report.

    Attributes:
        path: the file.
        title: a few words.
        alt: what it shows, for those who cannot see it.
        caption: how to read it.
        wide: whether a phone must scroll sideways to read its labels, rather than shrink it.
    """

    path: Path
    title: str
    alt: str
    caption: str
    wide: bool = True


@dataclass(frozen=True, slots=True)
class Section:
    """A heading of the report with its pictures; `id` is its anchor."""

    id: str
    title: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a report is about.

    Attributes:
        name: the study's.
        study_id: its id.
        objective: what it steered by.
        study_file: the study file's text.
        features: the study's.
        split: its images.
        outcomes: every trial.
        comparison: the post-study figures.
    """

    name: str
    study_id: str
    objective: str
    study_file: str
    features: FeatureSet
    split: Split
    outcomes: Sequence[TrialOutcome]
    comparison: Comparison


def render(contents: Contents, sections: Sequence[Section], loss_curves: Sequence[Picture]) -> str:
    """Render the report.

    Args:
        contents: what it is about.
        sections: its pictures, each file readable.
        loss_curves: pictures that are folded away under the trials.

    Returns:
        HTML text with every picture inside it.
    """
    environment = Environment(
        loader=PackageLoader("lowrank_tune.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    comparison = contents.comparison
    shown = [section for section in sections if section.pictures]
    anchors = [("summary", "In words"), ("comparison", "Comparison")]
    anchors += [(section.id, section.title) for section in shown]
    anchors += [("trials", "Trials"), ("study", "Study file")]
    return environment.get_template("report.html.j2").render(
        title=f"Study {contents.name}",
        study_id=contents.study_id,
        anchors=anchors,
        summary=summary(comparison, contents.outcomes),
        remarks=comparison.remarks,
        facts=_facts(contents),
        test_images=count(comparison.rows[0].n_images, "test image") if comparison.rows else "no test image",
        repeated=[_repeated(row) for row in comparison.rows if row.seeds],
        device=comparison.device,
        groups=[
            {"rank": group.rank, "cells": [_cell(cell) for cell in group.cells]} for group in rank_groups(comparison)
        ],
        methods=[(name, METHOD_NOTES.get(name, "trained")) for name in in_order(row.method for row in comparison.rows)],
        sections=[{"id": s.id, "title": s.title, "pictures": [_embedded(p) for p in s.pictures]} for s in shown],
        trials=[_trial(outcome) for outcome in _by_rank(contents.outcomes)],
        loss_curves=[_embedded(picture) for picture in loss_curves],
        study_file=contents.study_file,
    )


def _facts(contents: Contents) -> list[tuple[str, str]]:
    features, split = contents.features, contents.split
    quarantined = f", {features.quarantined} unusable" if features.quarantined else ""
    return [
        ("Features", f"[{features.tokens}, {features.dim}] an image, stored as {features.dtype}"),
        ("Encoder", f"{features.encoder}, {features.weights} weights"),
        (
            "Images",
            f"{len(features.rows)}{quarantined}: {len(split.train)} train, {len(split.validation)} validate, "
            f"{len(split.test)} test",
        ),
        ("Objective", contents.objective),
        ("Feature cache", features.fingerprint),
    ]


def _cell(cell: Cell) -> dict[str, Any]:
    row = cell.row
    texts = [ABSENT] * 7
    if row is not None:
        texts = [
            f"{cosine_text(row.token_cosine_mean)} ± {row.token_cosine_sd:.4f}",
            ratio_text(row.residual_ratio_mean),
            ratio_text(row.residual_ratio_max),
            rate_text(row.images_per_second),
            difference_text(row),
            cosine_text(row.flat_cosine_mean),
            f"{row.bytes_per_image / 1024:,.1f}",
        ]
    return {"method": cell.method, "best": cell.best, "texts": texts, "trial_id": row.trial_id if row else ""}


def _repeated(row: ComparisonRow) -> dict[str, Any]:
    ratio, cosine = seed_texts(row)
    return {
        "rank": row.rank,
        "trial_id": row.trial_id,
        "texts": [ratio_text(row.residual_ratio_mean), cosine_text(row.token_cosine_mean), row.seeds, ratio, cosine],
    }


def _by_rank(outcomes: Sequence[TrialOutcome]) -> list[TrialOutcome]:
    return sorted(outcomes, key=lambda trial: (trial.config.rank, trial.config.family, trial.config.number))


def _trial(outcome: TrialOutcome) -> dict[str, Any]:
    config, best = outcome.config, outcome.best
    settings = {
        "lr": config.lr,
        "weight decay": config.weight_decay,
        "batch": config.batch_size,
        **config.family_params,
    }
    ending = STOPPED[outcome.stopped_by]
    return {
        "id": config.trial_id,
        "settings": [f"{name} {value:.4g}" for name, value in settings.items()],
        "ending": f"{ending}: {outcome.reason}" if outcome.reason else ending,
        "epochs": outcome.epochs,
        "best_epoch": outcome.best_epoch or ABSENT,
        "ratio": ratio_text(best["val_residual_ratio"]) if "val_residual_ratio" in best else ABSENT,
        "cosine": cosine_text(best["val_token_cosine"]) if "val_token_cosine" in best else ABSENT,
        "time": duration_text(outcome.seconds),
    }


def _embedded(picture: Picture) -> dict[str, Any]:
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    return asdict(picture) | {"source": f"data:image/png;base64,{data}"}
