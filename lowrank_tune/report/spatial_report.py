"""Writing the spatial pictures of a study: which images, ranks and networks, as PNG and as an interactive view."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Decomposer, load_decomposer
from lowrank_tune.records import Comparison, FeatureSet, Split, TrialOutcome
from lowrank_tune.report.boxes import BoxColumn, read_boxes
from lowrank_tune.report.html import Places, Section, Table
from lowrank_tune.report.palette import is_trained
from lowrank_tune.report.pictures import spatial_picture
from lowrank_tune.report.places import places_json
from lowrank_tune.report.regions import RegionRow, compare_regions
from lowrank_tune.report.spatial import SpatialView, check_channels, check_images, spatial_views
from lowrank_tune.report.words import best_row, cosine_text, count

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
