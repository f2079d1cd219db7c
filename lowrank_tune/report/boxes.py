"""Boxes in users' records: whatever form they have, and the tokens inside them."""

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

_COLUMN = re.compile(r"^(?:bbox|bboxes|bboxs|box|boxes|bounding_box|bounding_boxes)(_xywh|_xyxy)?$", re.IGNORECASE)
_SIDES = {
    ("x0", "y0", "x1", "y1"): True,
    ("x1", "y1", "x2", "y2"): True,
    ("xmin", "ymin", "xmax", "ymax"): True,
    ("left", "top", "right", "bottom"): True,
    ("x", "y", "w", "h"): False,
    ("x", "y", "width", "height"): False,
    ("left", "top", "width", "height"): False,
}
"""Names of a box's sides, and whether they are corners."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True, slots=True)
class BoxColumn:
    """The boxes of a study's records, by the images' keys."""

    boxes: Mapping[str, tuple[Box, ...]]
    in_pixels: bool  # else in sides of the image
    note: str  # how the column was read, for people

    def of(self, key: str, width: int, height: int) -> tuple[Box, ...]:
        """An image's boxes in fractions of its sides, clipped to it; the size is the upright image's, in pixels."""
        sides = (width, height, width, height) if self.in_pixels else (1, 1, 1, 1)
        scaled = (
            tuple(min(max(edge / side, 0.0), 1.0) for edge, side in zip(box, sides, strict=True))
            for box in self.boxes.get(key, ())
        )
        return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in scaled if x1 > x0 and y1 > y0)


def read_boxes(features: FeatureSet) -> BoxColumn | None:
    """Read the boxes of a study's records; None when no column has such a name, or none of its values is a box."""
    try:
        names = pq.read_schema(features.records_path).names
        match = next((match for match in map(_COLUMN.match, names) if match), None)
        if match is None:
            return None
        name = match.group()
        records = pd.read_parquet(features.records_path, columns=["key", name])
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        _log.info("%s: no boxes can be read (%s)", features.records_path, error)
        return None
    found = [
        (key, *box)
        for key, value in zip(records["key"], records[name], strict=True)
        for box in _boxes(value)
        if isinstance(key, str)
    ]
    if not found:
        return None
    plain = [numbers for _, numbers, corners in found if corners is None]
    suffix = (match.group(1) or "").lower()
    as_corners = suffix == "_xyxy" if suffix else all(c > a and d > b for a, b, c, d in plain)
    how = "corners [x0, y0, x1, y1]" if as_corners else "[x, y, width, height]"
    by_key: dict[str, dict[Box, None]] = {}
    for key, (a, b, c, d), corners in found:
        corners = as_corners if corners is None else corners
        by_key.setdefault(key, {})[(a, b, c, d) if corners else (a, b, a + c, b + d)] = None
    in_pixels = max(abs(number) for _, numbers, _ in found for number in numbers) > 1
    unit = "pixels" if in_pixels else "fractions of the sides"
    how = how if plain else "objects with named sides"
    note = f"boxes of the records' column {name}, read as {how} in {unit}"
    return BoxColumn({key: tuple(boxes) for key, boxes in by_key.items()}, in_pixels, note)


def _boxes(value: Any) -> Iterator[tuple[Box, bool | None]]:
    """A record's boxes: four numbers each, and whether they are corners; None where only the column tells."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return
    if isinstance(value, Mapping):
        sides = {str(name).lower(): side for name, side in value.items() if _is_number(side)}
        for names, corners in _SIDES.items():
            if all(name in sides for name in names):
                a, b, c, d = (float(sides[name]) for name in names)
                yield (a, b, c, d), corners
                return
    elif isinstance(value, list | tuple | np.ndarray):
        items = list(value)
        if len(items) == 4 and all(map(_is_number, items)):
            a, b, c, d = map(float, items)
            yield (a, b, c, d), None
        else:
            for item in items:
                yield from _boxes(item)


def _is_number(value: object) -> bool:
    numbers = (int, float, np.integer, np.floating)
    return isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(float(value))


def inside_boxes(boxes: Iterable[Box], height: int, width: int) -> NDArray[np.bool_]:
    """Mark the tokens [H, W] whose centre lies in a box, and the one at a box's centre however small it is."""
    inside = np.zeros((height, width), dtype=bool)
    y_H1, x_1W = (np.arange(height)[:, None] + 0.5) / height, (np.arange(width)[None, :] + 0.5) / width
    for x0, y0, x1, y1 in boxes:
        inside |= (x_1W >= x0) & (x_1W < x1) & (y_H1 >= y0) & (y_H1 < y1)
        inside[min(int((y0 + y1) / 2 * height), height - 1), min(int((x0 + x1) / 2 * width), width - 1)] = True
    return inside
