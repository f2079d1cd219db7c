"""What a low-rank reconstruction does to one image, place by place.

T tokens lie on a grid of H x W places in row-major order; D dim, K channels shown.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import plotly.colors
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Decomposer
from lowrank_tune.records import FeatureSet, Split
from lowrank_tune.report.style import script_safe

_log = logging.getLogger(__name__)

_COLUMN = re.compile(r"^(bbox|bboxes|bboxs|box|boxes|bounding_box|bounding_boxes)(_xywh|_xyxy)?$", re.IGNORECASE)
_CORNERS = (
    ("x0", "y0", "x1", "y1"),
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("left", "top", "right", "bottom"),
)
_SIZES = (("x", "y", "w", "h"), ("x", "y", "width", "height"), ("left", "top", "width", "height"))

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as fractions of the image's sides in 0..1."""


@dataclass(frozen=True, slots=True)
class BoxColumn:
    """The boxes of a study's records.

    Attributes:
        boxes: of each image's key, as corners in the column's own unit.
        in_pixels: whether that unit is a pixel; else a side of the image.
        note: how the column was read, for people.
    """

    boxes: Mapping[str, tuple[Box, ...]]
    in_pixels: bool
    note: str

    def of(self, key: str, width: int, height: int) -> tuple[Box, ...]:
        """An image's boxes in fractions of its sides, clipped to it; none where it has none.

        Args:
            key: the image's.
            width: of the upright image, in pixels.
            height: likewise.
        """
        sides = (width, height, width, height) if self.in_pixels else (1, 1, 1, 1)
        scaled = (
            tuple(min(max(edge / side, 0.0), 1.0) for edge, side in zip(box, sides, strict=True))
            for box in self.boxes.get(key, ())
        )
        return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in scaled if x1 > x0 and y1 > y0)


def read_boxes(features: FeatureSet) -> BoxColumn | None:
    """Read the boxes of a study's records.

    Args:
        features: whose records may have a column of boxes.

    Returns:
        None when no column has such a name, or none of its values is a box.
    """
    try:
        names = pq.read_schema(features.records_path).names
        name = next((name for name in names if _COLUMN.match(name)), None)
        if name is None:
            return None
        records = pd.read_parquet(features.records_path, columns=["key", name])
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        _log.info("%s: no boxes can be read (%s)", features.records_path, error)
        return None
    found = [
        (str(key), *box)
        for key, value in zip(records["key"], records[name], strict=True)
        for box in _boxes(value)
        if isinstance(key, str)
    ]
    if not found:
        return None
    corners, how = _form(name, [(numbers, form) for _, numbers, form in found])
    by_key: dict[str, list[Box]] = {}
    for key, (a, b, c, d), form in found:
        as_corners = corners if form is None else form
        by_key.setdefault(key, []).append((a, b, c, d) if as_corners else (a, b, a + c, b + d))
    largest = max(abs(number) for _, numbers, _ in found for number in numbers)
    unit = "pixels" if largest > 1 else "fractions of the sides"
    return BoxColumn(
        {key: tuple(dict.fromkeys(boxes)) for key, boxes in by_key.items()},
        largest > 1,
        f"boxes of the records' column {name}, read as {how} in {unit}",
    )


def inside_boxes(boxes: Iterable[Box], height: int, width: int) -> NDArray[np.bool_]:
    """Mark the tokens that lie in a box: those whose centre does, and the one at a box's centre however small it is.

    Args:
        boxes: in fractions of the image's sides.
        height: H, rows of the grid.
        width: W, its columns.

    Returns:
        A mask [H, W].
    """
    inside = np.zeros((height, width), dtype=bool)
    y_H1 = (np.arange(height)[:, None] + 0.5) / height
    x_1W = (np.arange(width)[None, :] + 0.5) / width
    for x0, y0, x1, y1 in boxes:
        inside |= (x_1W >= x0) & (x_1W < x1) & (y_H1 >= y0) & (y_H1 < y1)
        inside[min(int((y0 + y1) / 2 * height), height - 1), min(int((x0 + x1) / 2 * width), width - 1)] = True
    return inside


def _form(name: str, found: list[tuple[Box, bool | None]]) -> tuple[bool, str]:
    """Whether lists of four numbers are corners, and how the column was read, for people."""
    match = _COLUMN.match(name)
    suffix = (match.group(2) or "").lower() if match else ""
    plain = [numbers for numbers, form in found if form is None]
    if not plain:
        return True, "objects with named sides"
    corners = suffix == "_xyxy" if suffix else all(c > a and d > b for a, b, c, d in plain)
    return corners, "corners [x0, y0, x1, y1]" if corners else "[x, y, width, height]"


def _boxes(value: Any) -> Iterator[tuple[Box, bool | None]]:
    """A record's boxes: four numbers each, and whether they are corners; None where only the column tells."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return
    if isinstance(value, Mapping):
        yield from _named(value)
    elif isinstance(value, list | tuple | np.ndarray):
        items = list(value)
        if len(items) == 4 and all(_is_number(item) for item in items):
            a, b, c, d = map(float, items)
            yield (a, b, c, d), None
        else:
            for item in items:
                yield from _boxes(item)


def _named(value: Mapping[str, Any]) -> Iterator[tuple[Box, bool | None]]:
    sides = {str(name).lower(): side for name, side in value.items() if _is_number(side)}
    for names, corners in [(names, True) for names in _CORNERS] + [(names, False) for names in _SIZES]:
        if all(name in sides for name in names):
            a, b, c, d = (float(sides[name]) for name in names)
            yield (a, b, c, d), corners
            return


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float | np.integer | np.floating)
        and not isinstance(value, bool)
        and math.isfinite(float(value))
    )


_log = logging.getLogger(__name__)

_PHOTOGRAPH_PIXELS = 448

Map = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Regions:
    """A reconstruction inside an image's boxes and outside them.

    Attributes:
        error_inside: root mean squared error of an element over the tokens in a box.
        error_outside: likewise over the others.
        cosine_inside: mean token cosine over the tokens in a box.
        cosine_outside: likewise over the others.
    """

    error_inside: float
    error_outside: float
    cosine_inside: float
    cosine_outside: float


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """One method's reconstruction of the image.

    Attributes:
        method: `svd` or the trained family.
        maps_KHW: its values of the shown channels.
        error_HW: root mean squared error over all D channels, a token.
        cosine_HW: cosine with the original, a token.
        regions: inside the boxes and outside; None where there are no boxes, or nothing outside them.
    """

    method: str
    maps_KHW: Map
    error_HW: Map
    cosine_HW: Map
    regions: Regions | None = None

    @property
    def token_cosine(self) -> float:
        """Mean over tokens of the cosine with the original."""
        return float(self.cosine_HW.mean())


@dataclass(frozen=True, slots=True)
class Photograph:
    """The picture behind an image's features.

    Attributes:
        pixels: RGB, squeezed to a square as the encoder saw it [448, 448, 3].
        width: of the upright file, in pixels.
        height: likewise.
    """

    pixels: NDArray[np.uint8]
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class SpatialView:
    """One test image, its channels and its reconstructions at one rank.

    Attributes:
        image: position in the test split, from 0.
        key: the image's key.
        rank: R of every reconstruction.
        channels: which of the D channels are shown.
        original_KHW: their values.
        norm_HW: the length of each token.
        reconstructions: the SVD's first, then the network's where there is one.
        photograph: the picture, or None where its file is not at hand.
        boxes: the image's, in fractions of its sides.
        placed: whether the grid is known to be the image's; a number of tokens that is no square leaves it a guess.
    """

    image: int
    key: str
    rank: int
    channels: tuple[int, ...]
    original_KHW: Map
    norm_HW: Map
    reconstructions: tuple[Reconstruction, ...]
    photograph: Photograph | None
    boxes: tuple[Box, ...] = ()
    placed: bool = True


def grid_shape(tokens: int) -> tuple[int, int]:
    """The most nearly square grid of so many tokens, (rows, columns), no taller than wide: 256 -> 16x16, 12 -> 3x4."""
    height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return height, tokens // height


def check_images(images: Sequence[int], test_images: int, said: str = "report.images") -> None:
    """Refuse images that the test split does not have.

    Args:
        images: positions in the test split, from 0.
        test_images: how many it has.
        said: where the user named them.

    Raises:
        InputError: naming the first that is not there, and how many are.
    """
    for image in images:
        if not 0 <= image < test_images:
            has = "1 image, number 0" if test_images == 1 else f"{test_images} images, numbers 0 to {test_images - 1}"
            raise InputError(f"{said}: there is no image {image}; the test split has {has}: choose among them")


def check_channels(channels: Sequence[int], dim: int) -> None:
    """Refuse channels that the features do not have.

    Raises:
        InputError: naming the first that is not there, and how many are.
    """
    for channel in channels:
        if not 0 <= channel < dim:
            raise InputError(f"channel {channel}: these features have channels 0 to {dim - 1}; choose among them")


def spatial_views(
    data: FeatureMatrix,
    split: Split,
    image: int,
    *,
    networks: Mapping[int, Decomposer | None],
    channels: Sequence[int],
    boxes: BoxColumn | None = None,
) -> Iterator[SpatialView]:
    """Reconstruct one test image at several ranks, by the SVD and by a network.

    Args:
        data: the study's features.
        split: whose test images are counted.
        image: position in the test split, from 0.
        networks: of each rank a trained decomposer that serves it, in evaluation mode on the CPU, or None.
        channels: which channels to show, at least one.
        boxes: of the study's records.

    Yields:
        A view a rank, in the order of `networks`.

    Raises:
        InputError: the test split has no such image, or the features no such channel.
        CacheError: its features cannot be read.
    """
    check_images([image], len(split.test))
    check_channels(channels, data.dim)
    row = data.features.rows[split.test[image]]
    x_TD = data.load([split.test[image]])[0]
    grid = grid_shape(data.tokens)
    picture = photograph(data.features, row.key)
    placed = grid[0] == grid[1]
    found = boxes.of(row.key, picture.width, picture.height) if boxes and picture and placed else ()
    inside_HW = inside_boxes(found, *grid) if found else None
    for rank, made in zip(networks, reconstruct(x_TD, networks), strict=True):
        yield SpatialView(
            image=image,
            key=row.key,
            rank=rank,
            channels=tuple(channels),
            original_KHW=_maps(x_TD[:, list(channels)].T, grid),
            norm_HW=_maps(x_TD.double().norm(dim=1), grid),
            reconstructions=tuple(
                _reconstruction(name, x_TD, y_TD, channels, inside_HW) for name, y_TD in made.items()
            ),
            photograph=picture,
            boxes=found,
            placed=placed,
        )


def reconstruct(x_TD: Tensor, networks: Mapping[int, Decomposer | None]) -> Iterator[dict[str, Tensor]]:
    """Reconstruct an image at several ranks; the SVD is computed once.

    Args:
        x_TD: its features [T, D].
        networks: as for `spatial_views`.

    Yields:
        A rank's reconstructions [T, D] in float64 by method, the SVD's first.
    """
    u, s, vh = torch.linalg.svd(x_TD.double(), full_matrices=False)
    for rank, network in networks.items():
        made = {"svd": (u[:, :rank] * s[:rank]) @ vh[:rank]}
        if network is not None:
            with torch.inference_mode():
                a_NTR, b_NRD = network(x_TD[None], rank)
            made[network.family] = a_NTR[0].double() @ b_NRD[0].double()
        yield made


def token_maps(x_TD: Tensor, y_TD: Tensor) -> tuple[Map, Map]:
    """Root mean squared error and cosine of each token of a reconstruction, each [H, W].

    Args:
        x_TD: the original [T, D].
        y_TD: its reconstruction [T, D].
    """
    x_TD, grid = x_TD.double(), grid_shape(len(x_TD))
    error_HW = _maps((x_TD - y_TD).square().mean(dim=1).sqrt(), grid)
    return error_HW, _maps(torch.cosine_similarity(x_TD, y_TD, dim=1), grid)


def regions_of(error_HW: Map, cosine_HW: Map, inside_HW: NDArray[np.bool_]) -> Regions | None:
    """Compare a reconstruction inside boxes and outside; None where one of the two is empty."""
    if not inside_HW.any() or inside_HW.all():
        return None
    return Regions(
        error_inside=float(np.sqrt(np.square(error_HW[inside_HW]).mean())),
        error_outside=float(np.sqrt(np.square(error_HW[~inside_HW]).mean())),
        cosine_inside=float(cosine_HW[inside_HW].mean()),
        cosine_outside=float(cosine_HW[~inside_HW].mean()),
    )


def _reconstruction(
    method: str, x_TD: Tensor, y_TD: Tensor, channels: Sequence[int], inside_HW: NDArray[np.bool_] | None
) -> Reconstruction:
    error_HW, cosine_HW = token_maps(x_TD, y_TD)
    return Reconstruction(
        method=method,
        maps_KHW=_maps(y_TD[:, list(channels)].T, grid_shape(len(x_TD))),
        error_HW=error_HW,
        cosine_HW=cosine_HW,
        regions=None if inside_HW is None else regions_of(error_HW, cosine_HW, inside_HW),
    )


def _maps(values: Tensor, grid: tuple[int, int]) -> Map:
    maps: Map = values.double().reshape(*values.shape[:-1], *grid).numpy()
    return maps


def photograph(features: FeatureSet, key: str) -> Photograph | None:
    """The picture behind an image's features.

    Args:
        features: whose records name the images' files.
        key: the image's key.

    Returns:
        None when no record names a picture that can be opened here: imported tensors have none, and a study's images
        may lie on another machine.
    """
    for path in _paths(features, key):
        try:
            with Image.open(path) as picture:
                upright = ImageOps.exif_transpose(picture).convert("RGB")
                pixels = np.asarray(upright.resize((_PHOTOGRAPH_PIXELS, _PHOTOGRAPH_PIXELS)))
                return Photograph(pixels, *upright.size)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            _log.info("%s: not shown beside its maps (%s)", path, error)
    return None


def _paths(features: FeatureSet, key: str) -> list[Path]:
    try:
        records: Any = pd.read_parquet(features.records_path, columns=["key", "path"], filters=[("key", "==", key)])
    except (OSError, ValueError, KeyError) as error:
        _log.info("%s: the images' paths cannot be read (%s)", features.records_path, error)
        return []
    return [Path(path) for path in records["path"] if isinstance(path, str) and path and Path(path).is_file()]


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


_JPEG_QUALITY = 80


def places_json(images: Sequence[Sequence[SpatialView]], note: str = "") -> str:
    """Pack views for the page.

    Args:
        images: of each image its views, one a rank; the same ranks and channels for all.
        note: what must be said about boxes.

    Returns:
        JSON that is safe inside a script element.
    """
    first = images[0][0]
    payload = {
        "grid": list(first.norm_HW.shape),
        "placed": first.placed,
        "channels": list(first.channels),
        "ranks": [view.rank for view in images[0]],
        "note": note,
        "colors": {name: _scale(name) for name in ("Magma", "Viridis")},
        "images": [_image(views) for views in images],
    }
    return script_safe(json.dumps(payload, separators=(",", ":")))


def _image(views: Sequence[SpatialView]) -> dict[str, Any]:
    view = views[0]
    return {
        "image": view.image,
        "photograph": _jpeg(view.photograph.pixels) if view.photograph is not None else None,
        "boxes": [list(box) for box in view.boxes],
        "original": _packed(view.original_KHW),
        "lengths": _packed(view.norm_HW),
        "ranks": {str(each.rank): [_method(method) for method in each.reconstructions] for each in views},
    }


def _method(method: Reconstruction) -> dict[str, Any]:
    return {
        "name": method.method,
        "cosine": method.token_cosine,
        "errors": _packed(method.error_HW),
        "cosines": _packed(method.cosine_HW),
        "maps": _packed(method.maps_KHW),
        "regions": asdict(method.regions) if method.regions else None,
    }


def _packed(values: Map) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")


def _jpeg(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _scale(name: str) -> list[list[Any]]:
    colors = getattr(plotly.colors.sequential, name)
    return [[place / (len(colors) - 1), color] for place, color in enumerate(colors)]


MOST_IMAGES = 128
"""Test images that are looked at, at most: the first ones that have a box."""


@dataclass(frozen=True, slots=True)
class RegionRow:
    """A method's means over the test images with boxes.

    Attributes:
        method: `svd` or the trained family.
        rank: R.
        images: how many images the means are over.
        regions: the means.
    """

    method: str
    rank: int
    images: int
    regions: Regions


def compare_regions(
    data: FeatureMatrix, split: Split, boxes: BoxColumn, rank: int, network: Decomposer | None
) -> list[RegionRow]:
    """Measure the SVD and a network inside and outside the boxes of the test images.

    Args:
        data: the study's features.
        split: whose test images are looked at.
        boxes: of the study's records.
        rank: R.
        network: a decomposer that serves it, in evaluation mode on the CPU, or None.

    Returns:
        A row a method; none where no test image has a box, a photograph and tokens on both sides, or where the number
        of tokens is no square, so that their places are not known.

    Raises:
        CacheError: features cannot be read.
    """
    grid = grid_shape(data.tokens)
    if grid[0] != grid[1]:
        return []
    found: dict[str, list[Regions]] = {}
    for index in split.test:
        if max(map(len, found.values()), default=0) == MOST_IMAGES:
            break
        key = data.features.rows[index].key
        picture = photograph(data.features, key) if key in boxes.boxes else None
        own = boxes.of(key, picture.width, picture.height) if picture else ()
        if own:
            inside_HW = inside_boxes(own, *grid)
            for method, regions in _of_image(data, index, rank, network, inside_HW):
                found.setdefault(method, []).append(regions)
    return [RegionRow(method, rank, len(regions), _mean(regions)) for method, regions in found.items()]


def _of_image(
    data: FeatureMatrix, index: int, rank: int, network: Decomposer | None, inside_HW: NDArray[np.bool_]
) -> list[tuple[str, Regions]]:
    x_TD = data.load([index])[0]
    (made,) = reconstruct(x_TD, {rank: network})
    measured = ((method, regions_of(*token_maps(x_TD, y_TD), inside_HW)) for method, y_TD in made.items())
    return [(method, regions) for method, regions in measured if regions is not None]


def _mean(regions: Sequence[Regions]) -> Regions:
    return Regions(
        error_inside=fmean(each.error_inside for each in regions),
        error_outside=fmean(each.error_outside for each in regions),
        cosine_inside=fmean(each.cosine_inside for each in regions),
        cosine_outside=fmean(each.cosine_outside for each in regions),
    )
