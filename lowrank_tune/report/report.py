"""Writing a study's report: its plots, its trials' loss curves, and report.html."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowrank_tune.config.plan import Plan
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.errors import InputError
from lowrank_tune.files import read_fields, write_whole
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.svd import Spectrum, kept_optimum
from lowrank_tune.measured import Comparison, Compression, Fidelity
from lowrank_tune.records import TEST_OPTIMUM, FeatureSet, Split, TrialOutcome, sign
from lowrank_tune.report.charts import (
    compression_picture,
    spectrum_of,
    spectrum_picture,
    tradeoff_picture,
)
from lowrank_tune.report.curves import loss_pictures, rank_picture
from lowrank_tune.report.fidelity import fidelity_section
from lowrank_tune.report.page import Picture, Section, render_page
from lowrank_tune.report.rates import lines_of, out_of_reach, rates_picture, rates_table, way_notes
from lowrank_tune.report.search import search_section, search_sentences
from lowrank_tune.report.spatial import check_images
from lowrank_tune.report.spatial_page import Scene, spatial_section
from lowrank_tune.report.style import Trial
from lowrank_tune.report.tables import (
    choices_table,
    compression_tables,
    methods_table,
    summary_table,
    trained_table,
    trials_table,
)
from lowrank_tune.report.text import (
    METHOD_NOTES,
    STOPPED,
    choices,
    count,
    in_order,
    rank_sentence,
    study_cost,
    training_sentence,
)
from lowrank_tune.report.trial_charts import learning_charts
from lowrank_tune.trials.outcomes import HISTORY, read_history

logger = logging.getLogger(__name__)


def write_report(
    plan: Plan,
    features: FeatureSet,
    split: Split,
    outcomes: Sequence[TrialOutcome],
    comparison: Comparison,
    directory: Path,
    confirmations: Sequence[TrialOutcome] = (),
    progress: Callable[[str], None] = lambda text: None,
    fidelity: Fidelity | None = None,
) -> tuple[Path, ...]:
    """Write all that a person looks at after a study into its `directory`; `progress` is told what is being written.

    Returns:
        The pictures in `plots/`, and the page last.
    """
    images = [image for image in plan.spec.report.images if image < len(split.test)]
    try:
        check_images(plan.spec.report.images, len(split.test))
    except InputError as error:  # what a study's start refuses is told in an old study's remarks
        comparison = replace(comparison, remarks=(*comparison.remarks, str(error)))
        logger.warning("%s", error)
    progress(f"writing the report: the curves of {count(len(outcomes) + len(confirmations), 'training')}")
    trials, repeats = (list(map(with_history, trainings)) for trainings in (outcomes, confirmations))
    losses = loss_pictures([*trials, *repeats])
    progress(f"writing the report: {count(len(images), 'test image')}, the spectrum and the search")
    batches = FeatureMatrix(features).batches(split.test, 16)
    spectrum = spectrum_of(kept_optimum(directory / TEST_OPTIMUM, features.digest(split.test), batches))
    scene = Scene(features, split, outcomes, comparison)
    spatial = spatial_section(scene, directory / "plots", images=images, channels=plan.spec.report.channels)
    first = [spatial] if spatial.pictures else []
    if fidelity and (fidelity.rows or fidelity.remarks):
        first.insert(0, fidelity_section(fidelity, directory))
    if comparison.rows:
        first.insert(0, Section("ranks", "By rank", (rank_picture(comparison, spectrum, directory / "plots"),)))
    target = plan.spec.target_error
    search = search_section(directory / "tune" / "optuna.journal", plan.spec.objectives, outcomes, _rungs(plan.spec))
    stored = _bytes(comparison.compression, len(features.rows), directory / "plots")
    further = [
        *_learning(trials, repeats),
        search,
        *_tradeoffs(comparison, outcomes),
        *stored,
        *_spectrum(comparison, spectrum),
    ]
    progress("writing the report: the page")
    found = choices(comparison, spectrum.rank_for if spectrum else lambda cosine: None)
    html = render_page(
        "report.html.j2",
        title=f"Study {plan.spec.name}",
        subtitle=f"{plan.study_id}: {comparison.data}" if comparison.data else plan.study_id,
        objective=", ".join(plan.spec.objectives) + (f" at a relative error of {target:g}" if target else ""),
        features=features,
        split=split,
        comparison=comparison,
        summary=summary_table(comparison),
        choice=rank_sentence(found),
        answers=fidelity.words[:1] if fidelity else (),
        choices=choices_table(found, features),
        training=training_sentence(outcomes) if outcomes else "",
        searched=search_sentences(outcomes, plan.spec.steered_by, read_fields(directory / "status.json")),
        cost=study_cost(directory, features, outcomes, confirmations),
        methods=methods_table(comparison),
        trained=trained_table(comparison),
        notes=[(name, METHOD_NOTES.get(name, "trained")) for name in in_order(row.method for row in comparison.rows)],
        first=first,
        further=further,
        trials=trials_table(outcomes, confirmations),
        linked=_linked(outcomes, plan.spec.steered_by),
        loss_curves=[picture for picture in losses if picture.title in {row.trial_id for row in comparison.rows}],
        study_file=_text_of(directory / "study.yaml"),
    )
    write_whole(directory / "report.html", lambda path: path.write_text(html, encoding="utf-8"))
    return (*(path for section in (*first, *further) for path in section.files), directory / "report.html")


def with_history(outcome: TrialOutcome) -> Trial:
    """A trial and its epochs; none of them when it left no history or a damaged one."""
    try:
        return outcome, read_history(Path(outcome.directory))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        logger.warning("%s: %s; the report goes without this trial's curves", Path(outcome.directory) / HISTORY, error)
        return outcome, []


def _learning(trials: Sequence[Trial], repeats: Sequence[Trial]) -> list[Section]:
    charts = learning_charts(trials, repeats)
    again = " Dotted: the same configuration trained again with fresh seeds." if any(h for _, h in repeats) else ""
    caption = f"One line a trial; the marker at its end tells what stopped it.{again}"
    return [Section("learning", "Learning", (Picture(caption, charts),))] if charts else []


def _rungs(spec: StudySpec) -> list[int]:
    """The epochs after which ASHA lets only the best go on."""
    if spec.scheduler.kind == "none":
        return []
    rungs = [min(spec.scheduler.grace_epochs, spec.training.epochs)]
    while rungs[-1] * spec.scheduler.reduction_factor < spec.training.epochs:
        rungs.append(rungs[-1] * spec.scheduler.reduction_factor)
    return rungs


def _linked(outcomes: Sequence[TrialOutcome], objective: str) -> dict[str, Any]:
    """What the page's script filters trials by, and ranks them by: less is better; a trial is known by its number."""
    families = in_order(outcome.config.method for outcome in outcomes)
    endings = [stop for stop in STOPPED if any(outcome.stopped_by == stop for outcome in outcomes)]
    trials = []
    for outcome in outcomes:
        config, value = outcome.config, outcome.best.get(objective)
        told = [config.number, families.index(config.method), config.rank, endings.index(outcome.stopped_by)]
        trials.append([*told, None if value is None else float(f"{sign(objective) * value:.6g}")])
    return {"trials": trials, "families": families, "endings": [STOPPED[stop] for stop in endings]}


def _tradeoffs(comparison: Comparison, outcomes: Sequence[TrialOutcome]) -> list[Section]:
    numbers = {outcome.config.trial_id: outcome.config.number for outcome in outcomes}
    pictures = (tradeoff_picture(comparison.fronts, numbers),) if comparison.fronts else ()
    return [Section("tradeoffs", "Trade-offs", pictures)] if pictures else []


def _bytes(compression: Compression, images: int, plots: Path) -> list[Section]:
    """What an image takes in every way that was measured; `images` are the data set's."""
    factors = Section(
        "compression",
        "Bytes against error",
        (compression_picture(compression),) if compression.stored else (),
        lead="What an image takes when it is stored as factors in few bits, and what is lost by it, beside X itself in "
        "as few bits. Relative error: ‖X − Y‖ / ‖X‖ of what comes back, Y.",
        tables=compression_tables(compression) if compression.stored else (),
        notes=compression.words,
    )
    lines = lines_of(compression) if compression.rates else []
    if not lines:
        return [factors] if compression.stored else []
    tested = max(row.n_images for row in compression.rates)
    title = "An image's own factors at one rank for all images, and trained models in int8"
    lead = "Beside the SVD's and X itself, each in few bits."
    # Where the sentences on rates stand by themselves, the others are about what is folded.
    notes = compression.words if compression.rate_words else ()
    folded = replace(factors, id="factors", title=title, lead=lead, notes=notes)
    return [
        Section(
            "compression",
            "Bytes against error",
            (rates_picture(compression, images, plots),),
            lead="What it takes to keep an image's features X, and how far off is what comes back, Y: the relative "
            f"error ‖X − Y‖ / ‖X‖, mean over {count(tested, 'test image')}.",
            points=compression.rate_words or compression.words,
            terms=way_notes(lines),
            tables=(rates_table(lines, images),),
            notes=out_of_reach(lines),
            folded=(folded,) if compression.stored else (),
        )
    ]


def _spectrum(comparison: Comparison, spectrum: Spectrum | None) -> list[Section]:
    ranks = sorted({row.rank for row in comparison.rows})
    return [Section("spectrum", "Spectrum", (spectrum_picture(spectrum, ranks),))] if spectrum else []


def _text_of(study_file: Path) -> str:
    try:
        return study_file.read_text(encoding="utf-8")
    except OSError as error:
        logger.warning("the report goes without the study file: %s", error)
        return "not at hand"
