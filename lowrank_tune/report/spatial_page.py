"""The pictures of where on an image what is lost, and the page with choosers of image, rank and channel."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.colors
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lowrank_tune.errors import InputError
from lowrank_tune.files import write_whole
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Decomposer, load_decomposer
from lowrank_tune.measured import Comparison
from lowrank_tune.records import BEST_MODEL, FeatureSet, Split, TrialOutcome
from lowrank_tune.report.boxes import Box, read_boxes
from lowrank_tune.report.curves import saved
from lowrank_tune.report.page import Picture, Section, render_page, script_safe
from lowrank_tune.report.spatial import (
    Map,
    Reconstruction,
    Regions,
    SpatialView,
    compare_regions,
    spatial_views,
)
from lowrank_tune.report.tables import Table
from lowrank_tune.report.text import cosine_text, count

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scene:
    """What the spatial pictures of a study are made of."""

    features: FeatureSet
    split: Split
    outcomes: Sequence[TrialOutcome]
    comparison: Comparison

    def rank(self, wanted: int | None) -> int:
        """The rank to show: the wanted one, else the best trained model's, else the highest compared."""
        best = min(self.comparison.best_of_each_rank(), key=lambda row: row.chosen, default=None)
        compared = max((row.rank for row in self.comparison.rows), default=1)
        return wanted or (best.rank if best else min(compared, self.features.tokens, self.features.dim))

    def ranks(self, shown: int) -> list[int]:
        """The ranks to choose from, each of which adds to the page: the one shown and about five of those compared."""
        compared = sorted({row.rank for row in self.comparison.rows} - {shown})
        return sorted({shown, *compared[:: max(1, -(-len(compared) // 5))]})

    def network(self, rank: int) -> Decomposer | None:
        """The chosen model of a rank, in evaluation mode on the CPU; None where none can be loaded."""
        directories = {outcome.config.trial_id: Path(outcome.directory) for outcome in self.outcomes}
        row = next((row for row in self.comparison.best_of_each_rank() if row.rank == rank), None)
        if row is None or row.trial_id not in directories:
            return None
        try:
            return load_decomposer(directories[row.trial_id] / BEST_MODEL).eval()
        except InputError as error:
            logger.warning("the spatial pictures go without a network: %s", error)
            return None


def spatial_section(
    scene: Scene, plots: Path, *, images: Sequence[int], channels: Sequence[int] | int, rank: int | None = None
) -> Section:
    """Write the spatial pictures of some test images into `plots`, and gather what the interactive view of them shows.

    Images are positions in the test split, channels may be how many of the first ones; see `check_shown`.
    """
    if not images:
        return Section("places", "Where on the image")
    shown = scene.rank(rank)
    wanted = range(min(channels, scene.features.dim)) if isinstance(channels, int) else channels
    data, boxes = FeatureMatrix(scene.features), read_boxes(scene.features)
    networks = {each: scene.network(each) for each in scene.ranks(shown)}
    views = [
        list(spatial_views(data, scene.split, image, networks=networks, channels=wanted, boxes=boxes))
        for image in dict.fromkeys(images)
    ]
    first, *others = (of_image[list(networks).index(shown)] for of_image in views)
    height, width = first.norm_HW.shape
    methods = " and ".join(method.method for method in first.reconstructions)
    notes = []
    if not first.placed:
        notes.append(
            f"{height * width} tokens are no square number, so their places on the image are not known: they are drawn "
            f"row by row on the most nearly square grid, {height} x {width}, no map is laid over the photograph, and "
            "no boxes are drawn."
        )
    seen, regions = compare_regions(data, scene.split, boxes, shown, networks[shown]) if boxes else (0, {})
    if boxes is not None:
        lacking = (
            ""
            if seen or not boxes.boxes
            else "; no test image here has a box, a photograph and tokens on both sides of it"
        )
        notes.append(f"{boxes.note[:1].upper()}{boxes.note[1:]}{lacking}.")
    return Section(
        "places",
        "Where on the image",
        tuple(_spatial_picture(view, plots) for view in (first, *others)),
        lead=f"Each cell is one of {height} x {width} tokens; bright in the error maps is where {methods} "
        f"lose{'s' if len(first.reconstructions) == 1 else ''} most. Maps side by side share one colour scale.",
        tables=(_regions_table(shown, seen, regions),) if seen else (),
        notes=tuple(notes),
        spatial=spatial_json(views, boxes.note if boxes else ""),
        rank=shown,
    )


def _regions_table(rank: int, images: int, regions: Mapping[str, Regions]) -> Table:
    return Table.of(
        "Inside the boxes and outside",
        regions.items(),
        {
            "method": lambda pair: pair[0],
            "error inside": lambda pair: f"{pair[1].error_inside:.4g}",
            "error outside": lambda pair: f"{pair[1].error_outside:.4g}",
            "ratio": lambda pair: f"{np.divide(pair[1].error_inside, pair[1].error_outside or np.nan):.2f}",
            "token cosine inside": lambda pair: cosine_text(pair[1].cosine_inside),
            "token cosine outside": lambda pair: cosine_text(pair[1].cosine_outside),
        },
        f"Inside the boxes and outside them, at rank {rank}: root mean squared error and token cosine, means over "
        f"{count(images, 'test image')} with boxes.",
        texts=("method",),
    )


def _spatial_picture(view: SpatialView, plots: Path) -> Picture:
    height, width = view.norm_HW.shape
    cosines = ", ".join(f"{method.method} {method.token_cosine:.4f}" for method in view.reconstructions)
    return Picture(
        path=saved(spatial_figure(view), plots / f"spatial-{view.image:03d}-r{view.rank:03d}.png"),
        title=f"Test image {view.image}",
        alt=f"Test image {view.image} at rank {view.rank}: error maps, token cosine, and "
        f"{count(len(view.channels), 'channel')} of the {height} by {width} grid of tokens, original beside "
        f"reconstruction. Token cosine: {cosines}.",
        caption=f"Each cell is one of {height} x {width} tokens. A row shares one colour scale.",
        wide=False,
        replaced=True,
    )


def write_spatial_page(
    scene: Scene, directory: Path, *, images: Sequence[int], channels: Sequence[int] | int, rank: int | None = None
) -> tuple[Path, ...]:
    """Write `spatial_section`'s pictures and, returned last, `spatial.html` with choosers into a study's `plots/`."""
    section = spatial_section(scene, directory / "plots", images=images, channels=channels, rank=rank)
    title = f"Study {directory.name}: where on the image"
    subtitle = f"{directory.name}: {scene.comparison.data}" if scene.comparison.data else directory.name
    html = render_page("spatial.html.j2", title=title, subtitle=subtitle, section=section)
    page = directory / "plots" / "spatial.html"
    write_whole(page, lambda path: path.write_text(html, encoding="utf-8"))
    return (*section.files, page)


# Inches: a map's side, the gap beside it, its title above it, colour bars with their numbers, and the heading.
_SIDE, _GAP, _TITLE, _BARS, _HEAD = 1.7, 0.1, 0.28, 0.95, 0.65


def spatial_figure(view: SpatialView) -> Figure:
    """Draw one image: the photograph and each method's error; token lengths and cosines; a row a channel.

    All maps lie on one axes: making an axes takes longer than drawing a map.
    """
    methods, picture, (rows, columns) = view.reconstructions, view.photograph, view.norm_HW.shape
    tall = _SIDE * min(max(rows / columns, 0.25), 1.0)
    width = (1 + len(methods)) * (_SIDE + _GAP) + _GAP + _BARS
    height = (2 + len(view.channels)) * (tall + _TITLE) + _HEAD
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.set_axis_off()
    axes.text(width / 2, 0.2, f"Test image {view.image} at rank {view.rank}", ha="center", va="center", fontsize=11)

    def show(row: int, column: int, title: str, values: Any, boxes: Iterable[Box] = (), **scale: Any) -> None:
        left, top = _GAP + column * (_SIDE + _GAP), _HEAD + row * (tall + _TITLE)
        axes.imshow(values, extent=(left, left + _SIDE, top + tall, top), aspect="auto", **scale)
        axes.text(left + _SIDE / 2, top - 0.06, title, ha="center", va="bottom", fontsize=8)
        for x0, y0, x1, y1 in boxes:
            place = (left + x0 * _SIDE, top + y0 * tall), (x1 - x0) * _SIDE, (y1 - y0) * tall
            for color, line in (("#000000", 2.2), ("#00E5FF", 1.2)):
                axes.add_patch(Rectangle(*place, fill=False, edgecolor=color, linewidth=line))

    def compare(
        row: int, titles: Sequence[str], maps: Sequence[Map], colors: str, label: str = "", **more: Any
    ) -> None:
        """Draw maps at a row's end on one scale, with its bar."""
        finite = np.concatenate([values[np.isfinite(values)] for values in maps])
        scale = {"vmin": finite.min(initial=np.inf), "vmax": finite.max(initial=-np.inf), "cmap": colors} | more
        first = 1 + len(methods) - len(maps)
        for column, (title, values) in enumerate(zip(titles, maps, strict=True), first):
            show(row, column, title, values, **scale)
        left, top = width - _BARS, _HEAD + row * (tall + _TITLE)
        axes.imshow(
            np.linspace(1, 0, 128)[:, None], extent=(left, left + 0.12, top + tall, top), aspect="auto", cmap=colors
        )
        for share in (0.0, 0.5, 1.0):
            text = f"{scale['vmax'] + share * (scale['vmin'] - scale['vmax']):.3g}"
            axes.text(left + 0.18, top + (0.04 + 0.92 * share) * tall, text, va="center", fontsize=8)
        axes.text(left + 0.75, top + tall / 2, label, rotation=90, va="center", ha="center", fontsize=8)

    titles = [f"{method.method}: error\ntoken cosine {method.token_cosine:.4f}" for method in methods]
    errors = [method.error_HW for method in methods]
    compare(0, titles, errors, "magma", "RMS error of a token", vmin=0.0, boxes=view.boxes)
    show(1, 0, "token lengths", view.norm_HW, cmap="cividis")
    if picture is None:
        show(0, 0, "token lengths", view.norm_HW, cmap="cividis")
    else:
        show(0, 0, "photograph" + (" and boxes" if view.boxes else ""), np.asarray(picture), view.boxes)
    over = picture is not None and view.placed
    for place in range(len(methods)) if over else ():
        show(1, 1 + place, "", np.asarray(picture))
    titles, cosines = [f"{method.method}: token cosine" for method in methods], [method.cosine_HW for method in methods]
    compare(1, titles, cosines, "viridis", "token cosine", alpha=0.6 if over else 1.0)
    for row, channel in enumerate(view.channels, 2):
        maps = [view.original_KHW[row - 2], *(method.maps_KHW[row - 2] for method in methods)]
        compare(row, [f"channel {channel}", *(method.method for method in methods)], maps, "viridis")
    return figure


def spatial_json(images: Sequence[Sequence[SpatialView]], note: str = "") -> str:
    """Pack the views of each image, one a rank, with a note on boxes, as JSON that is safe inside a script element."""

    def packed(values: Map) -> str:
        return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")

    def of_method(method: Reconstruction) -> dict[str, Any]:
        maps = {"errors": method.error_HW, "cosines": method.cosine_HW, "maps": method.maps_KHW}
        regions = method.regions._asdict() if method.regions else None
        figures = {"name": method.method, "cosine": method.token_cosine, "regions": regions}
        return figures | {name: packed(values) for name, values in maps.items()}

    def of_image(views: Sequence[SpatialView]) -> dict[str, Any]:
        view, jpeg = views[0], io.BytesIO()
        if view.photograph is not None:
            view.photograph.save(jpeg, "JPEG", quality=80)
        source = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode("ascii")
        return {
            "image": view.image,
            "photograph": source if view.photograph is not None else None,
            "boxes": [list(box) for box in view.boxes],
            "original": packed(view.original_KHW),
            "lengths": packed(view.norm_HW),
            "ranks": {str(each.rank): list(map(of_method, each.reconstructions)) for each in views},
        }

    first, scales = images[0][0], plotly.colors.sequential
    payload = {
        "grid": list(first.norm_HW.shape),
        "placed": first.placed,
        "channels": list(first.channels),
        "ranks": [view.rank for view in images[0]],
        "note": note,
        "colors": {name: plotly.colors.make_colorscale(getattr(scales, name)) for name in ("Magma", "Viridis")},
        "images": list(map(of_image, images)),
    }
    return script_safe(json.dumps(payload, separators=(",", ":")))
