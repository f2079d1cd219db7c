"""Drawing a SpatialView: the photograph, the error maps, and each channel's grid of tokens, in honest colours.

Maps that are to be compared share one scale: a channel's original and reconstructions, the error maps, the cosine maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from lowrank_tune.report.spatial import Map, SpatialView

# Inches: a map's side, the gaps beside and above it, the space for colour bars with their numbers, and for the heading.
_SIDE, _GAP, _TITLE, _BARS, _HEAD = 1.7, 0.1, 0.28, 0.95, 0.65
_BAR = 0.12
_OVERLAY = 0.6


def spatial_figure(view: SpatialView) -> Figure:
    """Draw one image's spatial picture.

    Args:
        view: what to draw, from `spatial_views`.

    Returns:
        A figure: first a row with the photograph and its boxes (the tokens' lengths where it is not at hand) and each
        method's error map; then the tokens' lengths and each method's token cosine, over the photograph where places
        are known; then a row a channel with the original and each method's reconstruction. A colour bar at a row's end.
    """
    figure, rows = _grid(2 + len(view.channels), 1 + len(view.reconstructions), view.norm_HW)
    _error_row(rows[0], view)
    _cosine_row(rows[1], view)
    for place, channel in enumerate(view.channels):
        maps = [view.original_KHW[place], *(method.maps_KHW[place] for method in view.reconstructions)]
        titles = [f"channel {channel}", *(method.method for method in view.reconstructions)]
        *panels, bar = rows[2 + place]
        figure.colorbar(_share_scale(panels, maps, titles, "viridis")[0], cax=bar)
    figure.text(0.5, 1 - 0.2 / figure.get_figheight(), _heading(view), ha="center", va="center", fontsize=11)
    return figure


def _heading(view: SpatialView) -> str:
    return f"Test image {view.image} at rank {view.rank}"


def _grid(rows: int, columns: int, map_HW: Map) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure of maps with a colour bar at each row's end; placed by hand, which is several times faster."""
    height, width = map_HW.shape
    tall = _SIDE * min(max(height / width, 0.25), 1.0)
    total_width, total_height = columns * (_SIDE + _GAP) + _GAP + _BARS, rows * (tall + _TITLE) + _HEAD
    figure = Figure(figsize=(total_width, total_height))

    def panel(left: float, bottom: float, side: float) -> Axes:
        return figure.add_axes((left / total_width, bottom / total_height, side / total_width, tall / total_height))

    grid = []
    for row in range(rows):
        bottom = total_height - _HEAD - tall - row * (tall + _TITLE)
        lefts = [_GAP + column * (_SIDE + _GAP) for column in range(columns)]
        bar = panel(lefts[-1] + _SIDE + _GAP, bottom, _BAR)
        grid.append([*(panel(left, bottom, _SIDE) for left in lefts), bar])
    return figure, grid


def _error_row(row: Sequence[Axes], view: SpatialView) -> None:
    first, *panels, bar = row
    height, width = view.norm_HW.shape
    if view.photograph is not None:
        first.imshow(view.photograph.pixels, aspect=height / width)
        pixels = view.photograph.pixels.shape
        _draw_boxes(first, view, pixels[1], pixels[0], "#00E5FF")
        _bare(first, "photograph" + (" and boxes" if view.boxes else ""))
    else:
        first.imshow(view.norm_HW, cmap="cividis")
        _bare(first, "token lengths")
    errors = [method.error_HW for method in view.reconstructions]
    titles = [f"{method.method}: error\ntoken cosine {method.token_cosine:.4f}" for method in view.reconstructions]
    images = _share_scale(panels, errors, titles, "magma", lowest=0.0)
    for panel in panels:
        _draw_boxes(panel, view, width, height, "#00E5FF", offset=0.5)
    bar.figure.colorbar(images[0], cax=bar, label="RMS error of a token")


def _cosine_row(row: Sequence[Axes], view: SpatialView) -> None:
    first, *panels, bar = row
    height, width = view.norm_HW.shape
    first.imshow(view.norm_HW, cmap="cividis")
    _bare(first, "token lengths")
    over = view.photograph is not None and view.placed
    if over and view.photograph is not None:
        for panel in panels:
            panel.imshow(view.photograph.pixels, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    cosines = [method.cosine_HW for method in view.reconstructions]
    titles = [f"{method.method}: token cosine" for method in view.reconstructions]
    images = _share_scale(panels, cosines, titles, "viridis", alpha=_OVERLAY if over else 1.0)
    bar.figure.colorbar(images[0], cax=bar, label="token cosine")


def _draw_boxes(axes: Axes, view: SpatialView, width: float, height: float, color: str, offset: float = 0.0) -> None:
    for x0, y0, x1, y1 in view.boxes:
        corner = (x0 * width - offset, y0 * height - offset)
        sides = ((x1 - x0) * width, (y1 - y0) * height)
        axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor="#000000", linewidth=2.2, clip_on=True))
        axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=color, linewidth=1.2, clip_on=True))


def _share_scale(
    axes: Sequence[Axes],
    maps: Sequence[Map],
    titles: Sequence[str],
    colors: str,
    lowest: float | None = None,
    alpha: float = 1.0,
) -> list[AxesImage]:
    finite = np.concatenate([values[np.isfinite(values)] for values in maps]) if maps else np.zeros(1)
    low = lowest if lowest is not None else float(finite.min(initial=np.inf))
    high = float(finite.max(initial=-np.inf))
    images = []
    for panel, values, title in zip(axes, maps, titles, strict=True):
        images.append(panel.imshow(values, cmap=colors, vmin=low, vmax=high, alpha=alpha))
        _bare(panel, title)
    return images


def _bare(axes: Axes, title: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8)
