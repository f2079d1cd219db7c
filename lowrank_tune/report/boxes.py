"""Bounding boxes in a study's records, and the tokens that lie in them.

The rule by which a column is read:

- Its name is one of `bbox`, `bboxes`, `bboxs`, `box`, `boxes`, `bounding_box`, `bounding_boxes`, in any case, perhaps
  with `_xywh` or `_xyxy` after it. A record holds one box, or a list of boxes; several records of one image add up.
- A box is four numbers, or an object: x, y, w, h (or width, height); x0, y0, x1, y1; x1, y1, x2, y2; xmin, ymin, xmax,
  ymax; left, top, right, bottom.
- Four numbers are [x, y, width, height] in a column `…_xywh` and corners [x0, y0, x1, y1] in a column `…_xyxy`. Without
  such a name they are corners when in every box of the column the third exceeds the first and the fourth the second,
  and [x, y, width, height] otherwise: a whole column of widths and heights does not look like corners by chance, but a
  column of very few boxes may, and then its name should say.
- Numbers are pixels of the upright image, or fractions of its sides when none of the column exceeds 1.

T tokens lie on a grid of H x W places in row-major order.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lowrank_tune.records import FeatureSet

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
