"""The boxes of a study's records, in whatever form they were published."""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lowrank_tune.features.images import read_recorded
from lowrank_tune.records import FeatureSet

logger = logging.getLogger(__name__)

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
Form = Literal["corners", "size", "centre"]
"""What the last two of four numbers are: a corner, or width and height beside a corner or around a centre."""

NEARLY_ALL = 0.98
"""Of a column's boxes, the part that decides how all are read: one in a thousand may be broken."""
FEW = 6
"""Boxes of which one may be broken: of so many, all but one look like corners by chance in one column of hundreds."""
THOUSAND = 1000.0
"""What a side of the image is in the texts of vision-language models."""
_DEEPEST = 8
_TRIED = 50
"""Images whose size is looked at where only that tells pixels from thousandths."""
_REACHED = 0.9

_BOX = r"(?:b?box(?:es|s)?|bbox(?:es|s)?|bnd_?box(?:es)?|bounding_?box(?:es)?)"
_PREFIX = (
    r"(?:gt|gold|true|target|object|obj|ref|answer|region|face|person|text|word|ocr|pred|predicted|norm(?:alized)?)"
)
_COLUMN = re.compile(
    rf"(?!box(?:es)?_?2d)(?:(?:{_PREFIX}_)?{_BOX}(_?2d)?(?:_(xywh|xyxy|cxcywh|ltrb|ltwh)|_norm(?:alized)?|_pixels?|_abs)?|(xyxy|xywh|cxcywh))",
    re.IGNORECASE,
)
_EITHER = re.compile(r"box(?:es)?_?2d", re.IGNORECASE)
"""What Gemini calls [y0, x0, y1, x1] and others [x0, y0, x1, y1]."""
_OUTLINE = re.compile(
    r"(?:rect(?:angle)?|roi|polygon|quad|vertice|vertex|point|normalizedvertice)(?:s|es)?", re.IGNORECASE
)
_WHOLE = re.compile(r"(?:objects?|annotations?|regions?|detections?|instances?|labels?)", re.IGNORECASE)
"""Columns that may hold boxes beside other things; nothing is said where they hold none."""
_FORMS: dict[str, Form] = {
    "xyxy": "corners", "ltrb": "corners", "2d": "corners", "xywh": "size", "ltwh": "size", "cxcywh": "centre"
}  # fmt: skip
_SIDES: dict[tuple[str, ...], Form] = {
    ("x0", "y0", "x1", "y1"): "corners",
    ("x1", "y1", "x2", "y2"): "corners",
    ("xmin", "ymin", "xmax", "ymax"): "corners",
    ("minx", "miny", "maxx", "maxy"): "corners",
    ("xtl", "ytl", "xbr", "ybr"): "corners",
    ("left", "top", "right", "bottom"): "corners",
    ("x", "y", "w", "h"): "size",
    ("x", "y", "width", "height"): "size",
    ("left", "top", "width", "height"): "size",
    ("xmin", "ymin", "width", "height"): "size",
    ("topleftx", "toplefty", "width", "height"): "size",
    ("cx", "cy", "w", "h"): "centre",
    ("xcenter", "ycenter", "width", "height"): "centre",
}
"""Names of a box's sides, without case and marks, and what the last two are."""

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
_NUMBERS = re.compile(r"[\s\[\](){},|\d.eE+-]+", re.ASCII)
_TAGGED = re.compile(r"<(?:\|box_start\||box)>(.*?)<(?:\|box_end\||/box)>", re.DOTALL)
_QUOTED = str.maketrans("'()", '"[]')

_NAMED, _POINTS, _TEXT = "objects with named sides", "outlines of points", "text with box marks"
_ORDERS: dict[Form, str] = {
    "corners": "corners [x0, y0, x1, y1]",
    "size": "[x, y, width, height]",
    "centre": "[x, y, width, height] around a centre",
}


class _Found(NamedTuple):
    """A box as it was written: four numbers; five where only the column tells which of them is no side."""

    numbers: tuple[float, ...]
    form: Form | None = None
    how: str = ""
    in_thousandths: bool = False


@dataclass(frozen=True, slots=True)
class BoxColumn:
    """The boxes of a study's records, by the images' keys; none where a column was not understood.

    Attributes:
        boxes: in pixels, or in parts of the image's sides.
        side: what a side of the image is in their numbers; None for its pixels.
        note: how the column was read, for people.
    """

    boxes: Mapping[str, tuple[Box, ...]]
    side: float | None
    note: str

    def of(self, key: str, width: int, height: int) -> tuple[Box, ...]:
        """An image's boxes in fractions of its sides, clipped to it; the size is the upright image's, in pixels."""
        sides = (self.side,) * 4 if self.side else (width, height, width, height)
        scaled = (
            tuple(min(max(edge / side, 0.0), 1.0) for edge, side in zip(box, sides, strict=True))
            for box in self.boxes.get(key, ())
        )
        return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in scaled if x1 > x0 and y1 > y0)


def read_boxes(features: FeatureSet) -> BoxColumn | None:
    """Read the boxes of a study's records; None where no column has any, or looks as if it had."""
    try:
        schema = pq.read_schema(features.records_path)
        strange = None
        for columns, form in _candidates(schema):
            table = pq.read_table(features.records_path, columns=["key", "path", *columns])
            found, left_out, example = _found(table, columns, form)
            name = ", ".join(columns)
            if found:
                paths = dict(zip(table["key"].to_pylist(), table["path"].to_pylist(), strict=True))
                return _resolved(found, left_out, name, form, paths)
            if strange is None and left_out and _COLUMN.fullmatch(name):
                note = (
                    f"the records' column {name} looks like boxes, but is not understood ({example}), and is not drawn"
                )
                strange = BoxColumn({}, None, note)
        for name in schema.names if strange is None else ():
            if _EITHER.fullmatch(name):
                why = "x or y may come first; call it boxes_xyxy where x does"
                strange = BoxColumn({}, None, f"the records' column {name} looks like boxes, and is not drawn: {why}")
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        logger.info("%s: no boxes can be read (%s)", features.records_path, error)
        return None
    return strange


def _candidates(schema: pa.Schema) -> Iterator[tuple[list[str], Form | None]]:
    """The columns that may hold boxes, the likeliest first, and the form that their name tells."""
    names = list(dict.fromkeys(name for name in schema.names if schema.names.count(name) == 1))
    for name in names:
        if match := _COLUMN.fullmatch(name):
            yield [name], _form(match)
    by_side = {_plain(re.sub(rf"^{_BOX}_", "", name, flags=re.IGNORECASE)): name for name in reversed(names)}
    for sides in _SIDES:
        if all(side in by_side for side in sides):
            yield [by_side[side] for side in sides], None
    for name in names:
        kind = schema.field(name).type
        nested = pa.types.is_nested(kind) and _has_boxes(kind)
        if not _COLUMN.fullmatch(name) and (nested or _WHOLE.fullmatch(name) or _OUTLINE.fullmatch(name)):
            yield [name], None


def _has_boxes(kind: pa.DataType) -> bool:
    inner = [kind.field(place) for place in range(kind.num_fields)] if pa.types.is_nested(kind) else []
    names = {_plain(field.name) for field in inner}
    named = any(_COLUMN.fullmatch(field.name) for field in inner) or any(names >= set(sides) for sides in _SIDES)
    return named or any(_has_boxes(field.type) for field in inner)


def _form(match: re.Match[str]) -> Form | None:
    """Of a name; Qwen's bbox_2d are corners."""
    two_d, suffix, alone = match.groups()
    return _FORMS.get((suffix or alone or ("2d" if two_d else "")).lower())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _found(table: pa.Table, columns: Sequence[str], form: Form | None) -> tuple[list[tuple[str, _Found]], int, str]:
    """Every box with its image's key, how many values are none, and the first of those."""
    if len(columns) > 1:
        sides = [_plain(re.sub(rf"^{_BOX}_", "", name, flags=re.IGNORECASE)) for name in columns]
        values = table.select(columns).rename_columns(sides).to_pylist()
    else:
        values = table[columns[0]].to_pylist()
    found: list[tuple[str, _Found]] = []
    left_out, example = 0, ""
    for key, value in zip(table["key"].to_pylist(), values, strict=True):
        for box in _boxes(value, form, 0) if isinstance(key, str) else ():
            if box is not None:
                found.append((key, box))
            else:
                left_out += 1
                example = example or (text if len(text := str(value)) <= 60 else f"{text[:57]}...")
    return found, left_out, example


def _resolved(
    found: Sequence[tuple[str, _Found]], left_out: int, name: str, form: Form | None, paths: Mapping[str, str | None]
) -> BoxColumn:
    """Decide by all boxes of a column how each is read."""
    five = [box.numbers for _, box in found if len(box.numbers) == 5]
    by_class = not form and _nearly_all(
        numbers[0] == int(numbers[0]) >= 0 and all(0 <= number <= 1 for number in numbers[1:]) for numbers in five
    )
    scored = not by_class and _nearly_all(0 <= numbers[4] <= 1 for numbers in five)
    read: list[tuple[str, _Found]] = []
    for key, box in found:
        if len(box.numbers) == 4:
            read.append((key, box))
        elif by_class:
            read.append((key, _Found(box.numbers[1:], "centre", "YOLO's [class, x, y, width, height]")))
        elif scored:
            read.append((key, _Found(box.numbers[:4], box.form)))
    left_out += len(found) - len(read)
    plain = [box.numbers for _, box in read if box.form is None]
    chosen = form or ("corners" if _nearly_all(c >= a and d >= b for a, b, c, d in plain) else "size")
    boxes: dict[str, dict[Box, None]] = {}
    hows: Counter[str] = Counter()
    for key, box in read:
        how = box.form or chosen
        hows[box.how or _ORDERS[how]] += 1
        boxes.setdefault(key, {})[_corners(box.numbers, how)] = None
    if not read:
        what = "five numbers of which the last is no score and the first no class"
        return BoxColumn({}, None, f"the records' column {name} looks like boxes, but is not understood ({what})")
    by_key = {key: tuple(each) for key, each in boxes.items()}
    side = 1.0 if _nearly_all(max(map(abs, box.numbers)) <= 1 for _, box in read) else None
    if side is None and (_nearly_all(box.in_thousandths for _, box in read) or _in_thousandths(by_key, paths)):
        side = THOUSAND
    unit = {None: "pixels", 1.0: "fractions of the sides", THOUSAND: "thousandths of the sides"}[side]
    many = "s" if "," in name else ""
    note = f"boxes of the records' column{many} {name}, read as {' and '.join(hows)} in {unit}"
    if left_out:
        note += f"; {left_out} value{'s' if left_out > 1 else ''} in it {'are' if left_out > 1 else 'is'} no box"
    return BoxColumn(by_key, side, note)


def _nearly_all(truths: Iterator[bool]) -> bool:
    listed = list(truths)
    wrong = len(listed) - sum(listed)
    return bool(listed) and wrong <= max((1 - NEARLY_ALL) * len(listed), len(listed) >= FEW)


def _corners(numbers: Sequence[float], form: Form) -> Box:
    a, b, c, d = numbers
    if form == "size":
        return a, b, a + c, b + d
    return (a - c / 2, b - d / 2, a + c / 2, b + d / 2) if form == "centre" else (a, b, c, d)


def _in_thousandths(boxes: Mapping[str, tuple[Box, ...]], paths: Mapping[str, str | None]) -> bool:
    """Whether boxes reach to 1000 on both axes and never beyond, and beyond the sides of smaller images."""
    right, bottom = (max(box[axis] for each in boxes.values() for box in each) for axis in (2, 3))
    if not all(_REACHED * THOUSAND <= reached <= THOUSAND for reached in (right, bottom)):
        return False
    inside = []
    for key in list(boxes)[:: max(1, len(boxes) // _TRIED)]:
        try:
            with Image.open(io.BytesIO(read_recorded(paths[key] or ""))) as picture:
                # A turned photograph's sides may be either way.
                largest = max(picture.size) if picture.getexif().get(0x0112, 1) > 4 else 0
                width, height = (max(side, largest) for side in picture.size)
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        inside += [box[2] <= width + 1 and box[3] <= height + 1 for box in boxes[key]]
    return bool(inside) and sum(inside) < NEARLY_ALL * len(inside)


def _boxes(value: Any, form: Form | None, depth: int) -> Iterator[_Found | None]:
    """The boxes of a record's value; None for what is no box, and nothing for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return
    if depth > _DEEPEST:
        yield None
    elif isinstance(value, str):
        yield from _of_text(value, form, depth)
    elif isinstance(value, Mapping):
        yield from _of_mapping(value, form, depth)
    elif isinstance(value, list | tuple | np.ndarray):
        items = list(value)
        numbers = [_number(item) for item in items]
        points = [_point(item) for item in items]
        if numbers and None not in numbers:
            yield _of_numbers([number for number in numbers if number is not None], form)
        elif len(points) > 1 and None not in points:
            flat = [side for point in points if point for side in point]
            yield _Found((*flat,), "corners", _ORDERS["corners"]) if len(points) == 2 else _outline(flat)
        elif items and not any(isinstance(item, str | Mapping | list | tuple | np.ndarray) for item in items):
            yield None
        else:
            for item in items:
                yield from _boxes(item, form, depth + 1)
    else:
        yield None


def _of_numbers(numbers: Sequence[float], form: Form | None) -> _Found | None:
    match len(numbers):
        case 4 | 5:
            return _Found((*numbers,), form)
        case length if length >= 8 and length % 2 == 0:
            return _outline(numbers)
    return None


def _outline(flat: Sequence[float]) -> _Found:
    """Find the box around points x, y, x, y and so on."""
    return _Found((min(flat[::2]), min(flat[1::2]), max(flat[::2]), max(flat[1::2])), "corners", _POINTS)


def _of_mapping(value: Mapping[Any, Any], form: Form | None, depth: int) -> Iterator[_Found | None]:
    by_name = {_plain(str(name)): side for name, side in value.items()}
    for names, sides_form in _SIDES.items():
        if not all(name in by_name for name in names):
            continue
        sides = [by_name[name] for name in names]
        if all(side is None for side in sides):
            return
        columns = [side if isinstance(side, list | tuple | np.ndarray) else [side] for side in sides]
        if len({len(column) for column in columns}) > 1:
            yield None
            return
        for row in zip(*columns, strict=True):
            numbers = [number for side in row if (number := _number(side)) is not None]
            yield _Found((*numbers,), sides_form, _NAMED) if len(numbers) == 4 else None
        return
    inner = [(name, each) for name, each in value.items() if (match := _COLUMN.fullmatch(str(name)))]
    outlines = [(name, each) for name, each in value.items() if _OUTLINE.fullmatch(str(name))]
    in_thousandths = by_name.get("bboxtype") == "norm1000"  # ms-swift's word
    for name, each in inner or outlines:
        match = _COLUMN.fullmatch(str(name))
        for box in _boxes(each, (match and _form(match)) or form, depth + 1):
            yield box._replace(in_thousandths=True) if box and in_thousandths else box
    if not inner and not outlines and value:
        yield None


def _of_text(text: str, form: Form | None, depth: int) -> Iterator[_Found | None]:
    if tagged := _TAGGED.findall(text):
        for inside in tagged:
            numbers = [float(number) for number in _NUMBER.findall(inside)]
            for start in range(0, max(len(numbers), 1), 4):
                four = tuple(numbers[start : start + 4])
                yield _Found(four, "corners", _TEXT, True) if len(four) == 4 else None
        return
    for parsed in (text, text.translate(_QUOTED), f"[{text.translate(_QUOTED)}]"):
        try:
            yield from _boxes(json.loads(parsed), form, depth + 1)
            return
        except (ValueError, RecursionError):
            continue
    for line in re.split(r"[;\n]", text):
        if _NUMBERS.fullmatch(line) and (numbers := [float(number) for number in _NUMBER.findall(line)]):
            yield _of_numbers(numbers, form) if all(map(math.isfinite, numbers)) else None
        elif line.strip():
            yield None


def _number(value: object) -> float | None:
    """A finite number, in quotes or not."""
    if isinstance(value, str):
        value = float(value) if _NUMBER.fullmatch(value.strip()) else None
    if not isinstance(value, int | float | np.integer | np.floating | Decimal) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _point(value: object) -> tuple[float, float] | None:
    """Two numbers, [x, y] or {x:, y:}."""
    if isinstance(value, Mapping):
        value = [value.get("x"), value.get("y")] if {"x", "y"} == set(value) else None
    if not isinstance(value, list | tuple | np.ndarray) or len(value) != 2:
        return None
    x, y = map(_number, value)
    return None if x is None or y is None else (x, y)
