"""Text of a file -> its records: JSON in the forms that annotations are published in.

The standard library's parser, not pyarrow's or pandas' readers: those know one form each, the latter guesses dates, and
both refuse what a record may hold here, such as values of several types under one name.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from lowrank_tune.features.named import is_image_name, is_message, looks_like_image

Record = dict[str, Any]

IMAGE_COLUMN = "image"
"""Of records that are nothing but a path, or are named by one."""
_LONGEST_INTEGER = 4000
"""Digits; Python refuses more than 4300."""
_CHOICES_SHOWN = 12
_SPLIT = re.compile(
    r"(mini)?(train|test|val|valid|validation|dev|eval)(ing)?\d{0,4}([-_ ./]?[a-z]+\d{0,4})?", re.IGNORECASE
)
"""A name of a list of records rather than of one."""


def decoded(data: bytes, notes: list[str]) -> str:
    """Return a file's text, whatever its encoding; what was guessed becomes a note."""
    encoding = json.detect_encoding(data)  # by the byte order mark or the zeros of UTF-16 and UTF-32; else UTF-8
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        text = data.decode(encoding, "replace")
        line = data.count(b"\n", 0, error.start) + 1
    if not encoding.startswith("utf-8") or any(character > "\x7f" for character in set(text) - {"\ufffd"}):
        notes.append(f"broken characters are read as \ufffd: {text.count(chr(0xFFFD))}, the first in line {line}")
        return text
    notes.append(f"not in UTF-8, from line {line}: read as Windows-1252")
    return data.decode("cp1252", "replace")


def find_records(content: Any, image_column: str | None, chosen: str | None, notes: list[str]) -> list[Record]:
    """Find the records of a JSON document.

    Args:
        content: what was parsed; a list where there were several documents.
        image_column: the column of images, where it is known.
        chosen: which of several lists of records.
        notes: gets a sentence for each thing that was left out.

    Raises:
        ValueError: it has no list of records, or has several and none was chosen.
    """
    found: dict[str, list[Record]] = {}
    if isinstance(content, list):
        found = {"": _rows(content)}
    elif isinstance(content, dict) and any(
        _are(value, dict) and all(map(is_message, value)) for value in content.values()
    ):
        found = {"": [content]}  # one chat
    elif isinstance(content, dict):
        found = dict(_lists(content, image_column, notes))
    return _chosen(found, content, image_column, chosen)


def _chosen(found: dict[str, list[Record]], content: Any, column: str | None, chosen: str | None) -> list[Record]:
    listed = ", ".join(f"{name!r} ({len(records)})" for name, records in list(found.items())[:_CHOICES_SHOWN] if name)
    listed += f" and {len(found) - _CHOICES_SHOWN} more" if len(found) > _CHOICES_SHOWN else ""
    if chosen is not None:
        if chosen not in found:
            what = f"its lists of records are {listed}" if listed else "its records have no name"
            raise ValueError(f"no records {chosen!r}: {what}; correct features.source.records")
        return found[chosen]
    named = {name: records for name, records in found.items() if has_images(records, column)}
    if not named and "" not in found and isinstance(content, dict) and has_images([content], column):
        return [content]
    choices = list((named or found).values())
    if len(choices) > 1:
        first = next(iter(named or found))
        raise ValueError(f"several lists of records, {listed}; choose one, such as features.source.records: {first}")
    if choices:
        return choices[0]
    keys = ", ".join(map(repr, list(content)[:_CHOICES_SHOWN])) if isinstance(content, dict) else ""
    raise ValueError(f"has no records, {f'but an object with {keys}' if keys else f'nothing but {_kind(content)}'}")


def has_images(records: Iterable[Iterable[str]], column: str | None) -> bool:
    """Whether records have a column of images: the one that is wanted, or one of a well-known name."""
    names = dict.fromkeys(name for record in records for name in record)
    return column in names if column is not None else any(map(is_image_name, names))


def _lists(content: Record, column: str | None, notes: list[str], name: str = "") -> Iterator[tuple[str, list[Record]]]:
    """Find an object's lists of records by the keys that lead to each."""
    values = list(content.values())
    images, are_splits = content.get("images"), any(map(_SPLIT.fullmatch, content))
    if _are(images, dict) and ("annotations" in content or has_images(content["images"], column)):
        yield name, _join_coco(content, notes)
    elif _are(content.get("columns"), str) and _are(content.get("data"), list):  # pandas' `split`
        rows = [dict(zip(content["columns"], row, strict=False)) for row in content["data"]]
        keys = content.get("index")
        if not isinstance(keys, list) or len(keys) != len(rows) or keys == list(range(len(rows))):
            yield name, rows
        else:
            key_column = (column or IMAGE_COLUMN) if not has_images([content["columns"]], column) else "index"
            yield name, [{key_column: key, **row} for key, row in zip(keys, rows, strict=True)]
    elif _are(values, list) and len(set(map(len, values))) == 1 and has_images([content], column):
        yield name, [dict(zip(content, row, strict=True)) for row in zip(*values, strict=True)]
    elif values and all(map(looks_like_image, content)):
        yield name, [{column or IMAGE_COLUMN: key, **_spread(value)} for key, value in content.items()]
    elif _are(values, dict) and len(set(map(frozenset, values))) == 1 and has_images([content], column):  # pandas'
        yield name, [dict(zip(content, row[1:], strict=True)) for row in _across(values)]
    elif not are_splits and _are(values, dict) and all(values) and all(map(looks_like_image, chain(*values))):
        yield name, [dict(zip((column or IMAGE_COLUMN, *content), row, strict=True)) for row in _across(values)]
    elif not are_splits and _are(values, dict) and _are_keyed(values, column):
        taken = set(chain(*values))
        key_column = (column or IMAGE_COLUMN) if not has_images([taken], column) else "key" if "id" in taken else "id"
        yield name, [{key_column: key, **value} for key, value in content.items()]
    elif paths := next(
        (each for key, each in content.items() if has_images([[key]], column) and _are(each, str)), list[str]()
    ):
        columns = {key: each for key, each in content.items() if isinstance(each, list) and len(each) == len(paths)}
        if len(columns) == 1:  # one record, of several images
            yield name, [content]
        else:
            others = ", ".join(repr(key) for key in content if key not in columns)
            notes.append(f"left out, for it is no value for each image: {others}")
            yield name, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    else:
        for key, value in content.items():
            inner = f"{name}.{key}" if name else key
            if isinstance(value, dict):
                yield from _lists(value, column, notes, inner)
            elif _are(value, dict) or (_are(value, str) and all(map(looks_like_image, value))):
                yield inner, _rows(value)


def _across(columns: list[Record]) -> Iterator[tuple[Any, ...]]:
    """Each row's key, and its value in each of the columns."""
    for key in dict.fromkeys(key for column in columns for key in column):
        yield key, *(column.get(key) for column in columns)


def _are_keyed(values: list[Record], column: str | None) -> bool:
    """Whether objects are records that their keys name: most have an image, or all are alike, and named by theirs."""
    if sum(has_images([value], column) for value in values) > len(values) / 2:
        return True
    return len(values) > 1 and all(values) and len({frozenset(value) for value in values}) == 1


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, kind) for value in values)


def _spread(value: Any) -> Record:
    return value if isinstance(value, dict) else {"value": value}


def _rows(values: list[Any]) -> list[Record]:
    if _are(values, str):
        return [{IMAGE_COLUMN: value} for value in values]
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise ValueError(f"record {number} is {_kind(value)}, not an object with a name for each value")
    return values


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _join_coco(content: Record, notes: list[str]) -> list[Record]:
    """Give each image of COCO's form its annotations, and what their boxes, categories and captions are."""
    images: list[Record] = content["images"]
    annotations: list[Record] = content["annotations"] if _are(content.get("annotations"), dict) else []
    categories: list[Record] = content["categories"] if _are(content.get("categories"), dict) else []
    called = {str(category.get("id")): category.get("name") for category in categories}
    by_image: dict[str, list[Record]] = defaultdict(list)
    for annotation in annotations:
        by_image[str(annotation.get("image_id"))].append(annotation)
    if strange := set(by_image) - {str(image.get("id")) for image in images}:
        count = sum(len(by_image[image]) for image in strange)
        notes.append(f"annotations of images that are not in the list are left out: {count}")
    known = {name for annotation in annotations for name in annotation}
    records = []
    for image in images:
        own = by_image[str(image.get("id"))]
        joined: Record = {"annotations": own} if annotations else {}
        if "bbox" in known:
            joined["boxes_xywh"] = [each["bbox"] for each in own if each.get("bbox") is not None]
        if "category_id" in known:
            joined["categories"] = [called.get(str(each.get("category_id"))) for each in own]
        if "caption" in known:
            joined["captions"] = [each.get("caption") for each in own]
        records.append(
            {**{name if name not in image else f"coco_{name}": value for name, value in joined.items()}, **image}
        )
    return records


def parsed(text: str, lines: bool) -> Any:
    """Parse JSON: one document, or a list of what stands on each line, or in a row, as `jq` writes it.

    Raises:
        ValueError: it is no JSON; with line and column.
    """
    documents = _documents(text, lines)
    return documents[0] if len(documents) == 1 else documents


def _documents(text: str, lines: bool) -> list[Any]:
    if not text.strip():
        raise ValueError("the file is empty")
    if not lines:
        try:
            return [_DECODER.decode(text)]
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):
                raise ValueError(_told(error, text)) from error
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            documents += [_DECODER.decode(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            try:
                return list(_in_a_row(text))
            except json.JSONDecodeError:
                last = not "".join(text.split("\n")[number:]).strip()
                raise ValueError(_told(error, line, number, last)) from error
    return documents


def _in_a_row(text: str) -> Iterator[Any]:
    end = 0
    while begin := re.compile(r"\s*").match(text, end):
        if begin.end() == len(text):
            return
        document, end = _DECODER.raw_decode(text, begin.end())
        yield document


def _told(error: json.JSONDecodeError, text: str, line: int | None = None, last: bool = True) -> str:
    place = f"line {line or error.lineno}, column {error.colno}"
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if last and (not after or error.msg.startswith("Unterminated string")):
        return f"{place}: the file ends inside of a value, as if it were cut off"
    if after == ",":
        return f"{place}: a comma after the record; remove it"
    if before.endswith(",") and after[:1] in ("]", "}"):
        return f"{place}: a comma before the closing bracket; remove it"
    return f"{place}: {error.msg}"


def _unlike(pairs: list[tuple[str, Any]]) -> Record:
    """Keep the values of a name that an object has twice, under names of their own."""
    record = dict(pairs)
    if len(record) < len(pairs):
        record = {}
        seen: Counter[str] = Counter()
        for name, value in pairs:
            seen[name] += 1
            record[name if seen[name] == 1 else f"{name}_{seen[name]}"] = value
    return record


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) < _LONGEST_INTEGER else digits


_DECODER = json.JSONDecoder(object_pairs_hook=_unlike, parse_int=_integer, strict=False)
