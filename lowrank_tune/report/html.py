"""report.html and the page of spatial pictures: everything in one file that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from lowrank_tune.records import Comparison, ComparisonRow, FeatureSet, Split, TrialOutcome
from lowrank_tune.report.charts import Chart
from lowrank_tune.report.palette import in_order
from lowrank_tune.report.spectrum import Spectrum
from lowrank_tune.report.table import Cell, rank_groups
from lowrank_tune.report.verdict import Choice, RankVerdict, choices, rank_sentence, verdicts
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
    """A PNG in the report, or what stands in its place where scripts run.

    Attributes:
        path: the file; None for what only a script draws.
        title: a few words.
        alt: what it shows, for those who cannot see it.
        caption: how to read it.
        wide: whether a phone must scroll sideways to read its labels, rather than shrink it.
        charts: the same, interactive.
        replaced: whether something else of the section stands in its place where scripts run.
    """

    path: Path | None
    title: str
    alt: str
    caption: str
    wide: bool = True
    charts: tuple[Chart, ...] = ()
    replaced: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts.

    Attributes:
        label: what it holds.
        head: its columns' names; all but the first column are numbers.
        rows: the first text of each is its header.
        caption: how to read it.
    """

    label: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Places:
    """The interactive view of test images.

    Attributes:
        data: from `places_json`.
        rank: the one that is shown first.
    """

    data: str
    rank: int


@dataclass(frozen=True, slots=True)
class Section:
    """A heading of the report with what stands below it; `id` is its anchor."""

    id: str
    title: str
    pictures: tuple[Picture, ...] = ()
    lead: str = ""
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    places: Places | None = None


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
        cost: what the study took, names and texts.
        spectrum: of the test images, where there is one.
    """

    name: str
    study_id: str
    objective: str
    study_file: str
    features: FeatureSet
    split: Split
    outcomes: Sequence[TrialOutcome]
    comparison: Comparison
    cost: Sequence[tuple[str, str]] = field(default_factory=tuple)
    spectrum: Spectrum | None = None


def render(
    contents: Contents, first: Sequence[Section], further: Sequence[Section], loss_curves: Sequence[Picture]
) -> str:
    """Render the report.

    Args:
        contents: what it is about.
        first: what stands before the comparison table.
        further: what stands after it.
        loss_curves: pictures that are folded away under the trials.

    Returns:
        HTML text with every picture, every chart and the script that draws them inside it.
    """
    comparison = contents.comparison
    found = choices(comparison, contents.spectrum)
    anchors = [("summary", "In words"), *((section.id, section.title) for section in first)]
    anchors += [("comparison", "Every method"), *((section.id, section.title) for section in further)]
    anchors += [("trials", "Trials"), ("cost", "Cost"), ("study", "Study file")]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            **_scripts(),
            title=f"Study {contents.name}",
            subtitle=f"{contents.study_id}: {comparison.data}" if comparison.data else contents.study_id,
            anchors=anchors,
            verdicts=[_verdict(verdict) for verdict in verdicts(comparison)],
            choice=rank_sentence(found),
            choices=[_choice(choice, contents.features) for choice in found],
            summary=summary(comparison, contents.outcomes, seeds=False),
            remarks=comparison.remarks,
            facts=_facts(contents),
            cost=contents.cost,
            test_images=count(comparison.rows[0].n_images, "test image") if comparison.rows else "no test image",
            repeated=[_repeated(row) for row in comparison.rows if row.seeds],
            device=comparison.device,
            groups=[
                {"rank": group.rank, "cells": [_cell(cell) for cell in group.cells]}
                for group in rank_groups(comparison)
            ],
            methods=[
                (name, METHOD_NOTES.get(name, "trained")) for name in in_order(row.method for row in comparison.rows)
            ],
            first=[_section(section) for section in first],
            further=[_section(section) for section in further],
            trials=[_trial(outcome) for outcome in _by_rank(contents.outcomes)],
            loss_curves=[_embedded(picture) for picture in loss_curves],
            study_file=contents.study_file,
        )
    )


def render_places(title: str, subtitle: str, section: Section) -> str:
    """Render the page of spatial pictures by itself.

    Args:
        title: its heading.
        subtitle: what stands below that.
        section: its pictures and their interactive view.
    """
    return (
        _environment()
        .get_template("places.html.j2")
        .render(**_scripts(), title=title, subtitle=subtitle, anchors=[], section=_section(section))
    )


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("lowrank_tune.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


@cache
def _scripts() -> dict[str, str]:
    page = (Path(__file__).parent / "templates" / "page.js").read_text(encoding="utf-8")
    return {"plotly_script": get_plotlyjs(), "page_script": page}


def _section(section: Section) -> dict[str, Any]:
    fields = ("id", "title", "lead", "tables", "notes", "places")
    return {name: getattr(section, name) for name in fields} | {"pictures": list(map(_embedded, section.pictures))}


def _verdict(verdict: RankVerdict) -> dict[str, Any]:
    trained, control, svd = verdict.trained, verdict.control, verdict.svd
    texts = [ABSENT] * 6
    if trained is not None:
        texts[0] = trained.method
        texts[1] = cosine_text(trained.token_cosine_mean)
        texts[3] = ratio_text(trained.residual_ratio_mean)
        texts[4] = seed_texts(trained)[0]
    if svd is not None:
        texts[2] = cosine_text(svd.token_cosine_mean)
    if control is not None:
        texts[5] = f"{control.method}, ρ {ratio_text(control.residual_ratio_mean)}"
    return {"rank": verdict.rank, "texts": texts, "word": verdict.word}


def _choice(choice: Choice, features: FeatureSet) -> dict[str, Any]:
    row, item = choice.row, 4 if features.dtype == "float32" else 2
    texts = [str(choice.svd_rank or ABSENT)]
    if row is None:
        texts += ["none compared", ABSENT, ABSENT, ABSENT]
    else:
        share = row.bytes_per_image / (features.tokens * features.dim * item)
        size = f"{row.bytes_per_image / 1024:,.1f} KiB, {share:.0%} of X"
        texts += [str(row.rank), row.method, cosine_text(row.token_cosine_mean), size]
    return {"cosine": f"{choice.cosine:g}", "texts": texts}


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
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii") if picture.path else ""
    source = f"data:image/png;base64,{data}" if data else ""
    return asdict(picture) | {"source": source, "charts": picture.charts}
