"""Writing a study's report: its plots, its trials' loss curves, and report.html."""

from __future__ import annotations

import base64
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import optuna
from jinja2 import Environment, PackageLoader, StrictUndefined
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from lowrank_tune.config.plan import Plan
from lowrank_tune.errors import InputError
from lowrank_tune.files import write_whole
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Decomposer, load_decomposer
from lowrank_tune.lowrank.svd import Spectrum
from lowrank_tune.records import Comparison, ComparisonRow, FeatureSet, Split, TrialOutcome
from lowrank_tune.report.charts import (
    Picture,
    Places,
    Section,
    Table,
    Trial,
    compression_section,
    learning_picture,
    loss_picture,
    measure_spectrum,
    pareto_picture,
    rank_picture,
    spatial_picture,
    spectrum_picture,
)
from lowrank_tune.report.spatial import (
    BoxColumn,
    RegionRow,
    SpatialView,
    check_channels,
    check_images,
    compare_regions,
    places_json,
    read_boxes,
    spatial_views,
)
from lowrank_tune.report.style import Chart, chart, in_order, is_trained, quiet_layout
from lowrank_tune.report.text import (
    ABSENT,
    METHOD_NOTES,
    STOPPED,
    Cell,
    Choice,
    RankVerdict,
    best_row,
    choices,
    cosine_text,
    count,
    difference_text,
    duration_text,
    rank_groups,
    rank_sentence,
    rate_text,
    ratio_text,
    read_history,
    seed_texts,
    study_cost,
    summary,
    verdicts,
)


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


_log = logging.getLogger(__name__)

MOST_RANKS = 6
"""Ranks to choose from in the interactive view, at most: each adds its maps to the page."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What the spatial pictures of a study are made of.

    Attributes:
        features: the study's.
        split: whose test images are counted.
        outcomes: every trial; the models lie in their directories.
        comparison: tells which trained model is nearest to the optimum at each rank.
    """

    features: FeatureSet
    split: Split
    outcomes: Sequence[TrialOutcome]
    comparison: Comparison

    def rank(self, wanted: int | None) -> int:
        """The rank to show: the wanted one; else that of the best trained model, or the highest compared.

        Raises:
            InputError: the features have no such rank.
        """
        highest = min(self.features.tokens, self.features.dim)
        if wanted is not None and not 1 <= wanted <= highest:
            raise InputError(f"rank {wanted}: these features have ranks 1 to {highest}; choose among them")
        best = best_row(row for row in self.comparison.rows if is_trained(row.method))
        compared = max((row.rank for row in self.comparison.rows), default=1)
        return min(wanted or (best.rank if best else compared), highest)

    def ranks(self, shown: int) -> list[int]:
        """The ranks to choose from: those compared, spread evenly where they are many, and the one that is shown."""
        compared = sorted({row.rank for row in self.comparison.rows} - {shown})
        step = max(1, -(-len(compared) // (MOST_RANKS - 1)))
        return sorted({shown, *compared[::step]})

    def network(self, rank: int) -> Decomposer | None:
        """The best trained model of a rank, in evaluation mode on the CPU; None where none can be loaded."""
        row = best_row(row for row in self.comparison.rows if is_trained(row.method) and row.rank == rank)
        directories = {outcome.config.trial_id: Path(outcome.directory) for outcome in self.outcomes}
        if row is None or row.trial_id not in directories:
            return None
        try:
            return load_decomposer(directories[row.trial_id] / "best_model.safetensors").eval()
        except InputError as error:
            _log.warning("the spatial pictures go without a network: %s", error)
            return None


def spatial_section(
    scene: Scene, plots: Path, *, images: Sequence[int], channels: Sequence[int] | int, rank: int | None = None
) -> Section:
    """Write the spatial pictures of some test images, and gather what the interactive view of them shows.

    Args:
        scene: the study's.
        plots: where the pictures go.
        images: positions in the test split, from 0; none gives a section without anything.
        channels: which channels, or how many of the first ones.
        rank: R of the pictures; see `Scene.rank`.

    Returns:
        The pictures, with the best trained model of the rank where one can be loaded, else with the SVD alone.

    Raises:
        InputError: the test split has no such image, or the features no such rank or channel.
        CacheError: features cannot be read.
    """
    check_images(images, len(scene.split.test))
    shown = scene.rank(rank)
    wanted = range(min(channels, scene.features.dim)) if isinstance(channels, int) else channels
    check_channels(wanted, scene.features.dim)
    section = Section("places", "Where on the image")
    if not images:
        return section
    data, boxes = FeatureMatrix(scene.features), read_boxes(scene.features)
    networks = {each: scene.network(each) for each in scene.ranks(shown)}
    views = [
        list(spatial_views(data, scene.split, image, networks=networks, channels=wanted, boxes=boxes))
        for image in dict.fromkeys(images)
    ]
    at = list(networks).index(shown)
    pictures = [spatial_picture(of_image[at], plots) for of_image in views]
    regions = compare_regions(data, scene.split, boxes, shown, networks[shown]) if boxes else []
    note = boxes.note if boxes else ""
    return Section(
        "places",
        "Where on the image",
        pictures=tuple(pictures),
        lead=_lead(views[0][at]),
        tables=(_regions_table(regions),) if regions else (),
        notes=tuple(text for text in (_grid_note(views[0][at]), _box_note(boxes, regions)) if text),
        places=Places(places_json(views, note), shown),
    )


def written(section: Section) -> tuple[Path, ...]:
    """The files of a section's pictures."""
    return tuple(picture.path for picture in section.pictures if picture.path is not None)


def _lead(view: SpatialView) -> str:
    height, width = view.norm_HW.shape
    methods = " and ".join(method.method for method in view.reconstructions)
    return (
        f"Each cell is one of {height} x {width} tokens; bright in the error maps is where {methods} "
        f"lose{'s' if len(view.reconstructions) == 1 else ''} most. Maps side by side share one colour scale."
    )


def _grid_note(view: SpatialView) -> str:
    if view.placed:
        return ""
    height, width = view.norm_HW.shape
    return (
        f"{height * width} tokens are no square number, so their places on the image are not known: they are drawn row "
        f"by row on the most nearly square grid, {height} x {width}, no map is laid over the photograph, and no boxes "
        "are drawn."
    )


def _box_note(boxes: BoxColumn | None, regions: Sequence[RegionRow]) -> str:
    if boxes is None:
        return ""
    compared = "" if regions else "; no test image here has a box, a photograph and tokens on both sides of it"
    return f"{boxes.note[:1].upper()}{boxes.note[1:]}{compared}."


def _regions_table(regions: Sequence[RegionRow]) -> Table:
    rank, images = regions[0].rank, regions[0].images
    rows = []
    for row in regions:
        own = row.regions
        ratio = own.error_inside / own.error_outside if own.error_outside else float("nan")
        errors = (f"{own.error_inside:.4g}", f"{own.error_outside:.4g}", f"{ratio:.2f}")
        rows.append((row.method, *errors, cosine_text(own.cosine_inside), cosine_text(own.cosine_outside)))
    return Table(
        "Inside the boxes and outside",
        ("method", "error inside", "error outside", "ratio", "token cosine inside", "token cosine outside"),
        tuple(rows),
        f"Inside the boxes and outside them, at rank {rank}: root mean squared error and token cosine, means over "
        f"{count(images, 'test image')} with boxes.",
    )


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


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """What a report wrote.

    Attributes:
        html: `report.html`.
        plots: the files of `plots/`.
        loss_curves: one `loss_curves.png` a trial that left a history, in the trial's directory.
    """

    html: Path
    plots: tuple[Path, ...]
    loss_curves: tuple[Path, ...]


def write_report(
    plan: Plan,
    features: FeatureSet,
    split: Split,
    outcomes: Sequence[TrialOutcome],
    comparison: Comparison,
    directory: Path,
    confirmations: Sequence[TrialOutcome] = (),
) -> ReportFiles:
    """Write everything a person looks at after a study.

    Args:
        plan: the study; its `report` section names the images and channels of the spatial pictures.
        features: the study's.
        split: its images.
        outcomes: every trial.
        comparison: the post-study figures.
        directory: the study's; holds `study.yaml`, which the report repeats, and the search's journal.
        confirmations: repetitions of the best trials; each gets its loss curves beside its model.

    Returns:
        The files written. An image that the test split does not have is told in the report's remarks instead of failing
        it; `check_images` finds it before a study starts.

    Raises:
        CacheError: the features of an image cannot be read.
    """
    plots = directory / "plots"
    try:
        check_images(plan.spec.report.images, len(split.test))
    except InputError as error:
        comparison = replace(comparison, remarks=(*comparison.remarks, str(error)))
        _log.warning("%s", error)
    trials, repeats = _with_histories(outcomes), _with_histories(confirmations)
    losses = [loss_picture(outcome, history) for outcome, history in (*trials, *repeats) if history]
    spectrum = measure_spectrum(FeatureMatrix(features), split.test)
    images = [image for image in plan.spec.report.images if image < len(split.test)]
    scene = Scene(features, split, outcomes, comparison)
    places = spatial_section(scene, plots, images=images, channels=plan.spec.report.channels)
    first = [*_ranks(comparison, spectrum, plots), *([places] if places.pictures else [])]
    views = search_views(directory / "tune" / "optuna.journal", plan.spec.objective)
    further = [*_learning(trials, repeats, plots), _search(views), *_storage(comparison, spectrum, plots)]
    contents = Contents(
        name=plan.spec.name,
        study_id=plan.study_id,
        objective=plan.spec.objective,
        study_file=_study_file(directory),
        features=features,
        split=split,
        outcomes=outcomes,
        comparison=comparison,
        cost=study_cost(directory, features, outcomes, confirmations),
        spectrum=spectrum,
    )
    standing = {row.trial_id for row in comparison.rows}
    text = render(contents, first, further, [picture for picture in losses if picture.title in standing])
    html = directory / "report.html"
    write_whole(html, lambda path: path.write_text(text, encoding="utf-8"))
    return ReportFiles(
        html=html,
        plots=tuple(path for section in (*first, *further) for path in written(section)),
        loss_curves=tuple(picture.path for picture in losses if picture.path is not None),
    )


def write_places(
    scene: Scene,
    directory: Path,
    *,
    images: Sequence[int],
    channels: Sequence[int] | int,
    rank: int | None = None,
) -> tuple[Path, ...]:
    """Write the spatial pictures of some test images, and a page with choosers of image, rank and channel.

    Args:
        scene: the study's.
        directory: the study's; the files go into its `plots/`.
        images: positions in the test split, from 0, at least one.
        channels: which channels, or how many of the first ones.
        rank: R of the pictures; by default that of the best trained model.

    Returns:
        The PNG files, then the page, `spatial.html`.

    Raises:
        InputError: the test split has no such image, or the features no such rank or channel.
        CacheError: features cannot be read.
    """
    check_images(images, len(scene.split.test), "images")
    section = spatial_section(scene, directory / "plots", images=images, channels=channels, rank=rank)
    subtitle = f"{directory.name}: {scene.comparison.data}" if scene.comparison.data else directory.name
    page = directory / "plots" / "spatial.html"
    text = render_places(f"Study {directory.name}: where on the image", subtitle, section)
    write_whole(page, lambda path: path.write_text(text, encoding="utf-8"))
    return (*written(section), page)


def _with_histories(outcomes: Sequence[TrialOutcome]) -> list[Trial]:
    return [(outcome, read_history(Path(outcome.directory))) for outcome in outcomes]


def _ranks(comparison: Comparison, spectrum: Spectrum | None, plots: Path) -> list[Section]:
    if not comparison.rows:
        return []
    return [Section("ranks", "By rank", (rank_picture(comparison, spectrum, plots),))]


def _learning(trials: Sequence[Trial], repeats: Sequence[Trial], plots: Path) -> list[Section]:
    if not any(history for _, history in trials):
        return []
    return [Section("learning", "Learning", (learning_picture(trials, repeats, plots),))]


def _search(views: SearchViews) -> Section:
    captions = {
        "chart-coordinates": "By Optuna: a line a trial through all that was searched; darker is better.",
        "chart-importance": "By Optuna: the part of the objective's spread that each hyperparameter explains.",
    }
    pictures = tuple(Picture(None, chart.id, chart.alt, captions[chart.id], charts=(chart,)) for chart in views.charts)
    table = Table(
        "Hyperparameter importances",
        ("hyperparameter", "importance"),
        tuple((name, f"{value:.2f}") for name, value in views.importances),
    )
    tables = (table,) if views.importances else ()
    return Section("search", "The search", pictures, tables=tables, notes=views.notes)


def _storage(comparison: Comparison, spectrum: Spectrum | None, plots: Path) -> list[Section]:
    sections = []
    if comparison.fronts:
        sections.append(Section("tradeoffs", "Trade-offs", (pareto_picture(comparison.fronts, plots),)))
    if comparison.compression.stored:
        sections.append(compression_section(comparison.compression, plots))
    if spectrum is not None:
        ranks = sorted({row.rank for row in comparison.rows})
        sections.append(Section("spectrum", "Spectrum", (spectrum_picture(spectrum, ranks, plots),)))
    return sections


def _study_file(directory: Path) -> str:
    path = directory / "study.yaml"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        _log.warning("the report goes without the study file: %s", error)
        return "not at hand"
