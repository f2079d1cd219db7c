"""Drawing a SpatialView: the photograph, the error maps, and each channel's grid of tokens, in honest colours.

Maps that are to be compared share one scale: a channel's original and reconstructions, and the error maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lowrank_tune.report.spatial import Map, SpatialView

# Inches: a map's side, and what titles and colour bars take beside it.
_SIDE, _BAR, _HEAD = 1.75, 0.9, 0.75


def spatial_figure(view: SpatialView) -> Figure:
    """Draw one image's spatial picture.

    Args:
        view: what to draw, from `spatial_view`.

    Returns:
        A figure: first a row with the photograph (the tokens' lengths where it is not at hand) and each method's error
        map, then a row a channel with the original and each method's reconstruction.
    """
    columns, rows = 1 + len(view.reconstructions), 1 + len(view.channels)
    height, width = view.norm_HW.shape
    tall = min(max(height / width, 0.4), 1.0)
    figure = Figure(figsize=(_SIDE * columns + _BAR, (_SIDE * tall + 0.22) * rows + _HEAD), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    _first_row(figure, axes[0], view)
    for place, channel in enumerate(view.channels):
        maps = [view.original_KHW[place], *(method.maps_KHW[place] for method in view.reconstructions)]
        titles = [f"channel {channel}", *(method.method for method in view.reconstructions)]
        images = _share_scale(axes[1 + place], maps, titles, "viridis")
        figure.colorbar(images[0], ax=list(axes[1 + place]), fraction=0.05)
    figure.suptitle(f"Test image {view.image} at rank {view.rank}", fontsize=11)
    return figure


def _first_row(figure: Figure, axes: Sequence[Axes], view: SpatialView) -> None:
    if view.photograph is not None:
        height, width = view.norm_HW.shape
        axes[0].imshow(view.photograph, aspect=height / width)
        _bare(axes[0], "photograph")
    else:
        axes[0].imshow(view.norm_HW, cmap="cividis")
        _bare(axes[0], "token lengths")
    errors = [method.error_HW for method in view.reconstructions]
    titles = [f"{method.method}: error\ntoken cosine {method.token_cosine:.4f}" for method in view.reconstructions]
    images = _share_scale(axes[1:], errors, titles, "magma", lowest=0.0)
    figure.colorbar(images[0], ax=list(axes), fraction=0.05, label="RMS error a token")


def _share_scale(
    axes: Sequence[Axes], maps: Sequence[Map], titles: Sequence[str], colors: str, lowest: float | None = None
) -> list[AxesImage]:
    finite = np.concatenate([values[np.isfinite(values)] for values in maps]) if maps else np.zeros(1)
    low = lowest if lowest is not None else float(finite.min(initial=np.inf))
    high = float(finite.max(initial=-np.inf))
    images = []
    for panel, values, title in zip(axes, maps, titles, strict=True):
        images.append(panel.imshow(values, cmap=colors, vmin=low, vmax=high))
        _bare(panel, title)
    return images


def _bare(axes: Axes, title: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8)
