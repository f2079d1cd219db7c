"""A user's records in JSON, JSON lines, CSV or parquet -> the images' paths, and all columns as they are."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from lowrank_tune.errors import InputError


def read_manifest(path: Path, image_column: str) -> tuple[list[str | None], pa.Table]:
    """Read a table of records.

    JSON is a list of objects, or an object with exactly one such list (TextVQA's files keep theirs under `data`).
    Nested values stay nested; a JSON column whose values have no common type is kept as JSON text.

    Args:
        path: `.json`, `.jsonl`, `.csv` or `.parquet`.
        image_column: the column with the images' paths.

    Returns:
        The image path of each record, None where it has none, and the table.

    Raises:
        InputError: the file or the column is missing, or the file cannot be read as what its suffix says.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path}: features.source.manifest reads {', '.join(_READERS)}, "
            f"not {path.suffix or 'a file without suffix'}"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file; correct features.source.manifest{_near(path)}")
    try:
        table = reader(path, image_column)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as {path.suffix[1:].upper()} ({error})") from error
    if table.num_rows == 0:
        raise InputError(f"{path}: has no records")
    if image_column not in table.column_names:
        near = difflib.get_close_matches(image_column, table.column_names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(
            f"{path}: has no column {image_column!r}, only {', '.join(table.column_names)}{hint} (image_column)"
        )
    images = table.column(image_column)
    if not (pa.types.is_string(images.type) or pa.types.is_large_string(images.type)):
        raise InputError(f"{path}: column {image_column!r} holds {images.type}, not paths; name another image_column")
    return [value or None for value in images.to_pylist()], table


def _near(path: Path) -> str:
    names = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _read_json(path: Path, image_column: str) -> pa.Table:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict):
        lists = [value for value in content.values() if _is_records(value)]
        if len(lists) != 1:
            raise ValueError(f"an object with {len(lists)} lists of records; it must have one, or be one")
        content = lists[0]
    return _from_records(content, image_column)


def _read_json_lines(path: Path, image_column: str) -> pa.Table:
    records = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error
    return _from_records(records, image_column)


def _read_csv(path: Path, image_column: str) -> pa.Table:
    # Without this, images named 0001 would become the number 1.
    as_text = pyarrow.csv.ConvertOptions(column_types={image_column: pa.string()})
    quoted_lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.read_csv(path, parse_options=quoted_lines, convert_options=as_text)


def _read_parquet(path: Path, image_column: str) -> pa.Table:
    table = pyarrow.parquet.read_table(path)
    plain = [column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column for column in table]
    return pa.table(plain, names=table.column_names)


_READERS: dict[str, Callable[[Path, str], pa.Table]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _is_records(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _from_records(records: object, image_column: str) -> pa.Table:
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("not a list of objects")
    names = dict.fromkeys(name for record in records for name in record)
    return pa.table({name: _column([record.get(name) for record in records]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([None if value is None else json.dumps(value) for value in values])
