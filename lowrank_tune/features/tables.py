"""A manifest, a table of records -> where the image of each lies, and the user's columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from lowrank_tune.config.schema import ManifestSource
from lowrank_tune.errors import InputError, did_you_mean
from lowrank_tune.features.images import SourceRecords


def read_manifest(source: ManifestSource) -> SourceRecords:
    """Read a manifest's records; an InputError where it cannot be read, has none, or lacks the column of images."""
    path = Path(source.manifest).expanduser().absolute()
    columns = _read_manifest(path, source.image_column)
    root = Path(source.root).expanduser().absolute() if source.root is not None else path.parent
    if not root.is_dir():
        raise InputError(f"{root}: no such directory; correct features.source.root")
    images = columns.column(source.image_column).to_pylist()
    return SourceRecords(tuple(str(root / image) if image else None for image in images), columns)


def _read_manifest(path: Path, image_column: str) -> pa.Table:
    if not path.is_file():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"{path}: no such file; correct features.source.manifest{did_you_mean(path.name, siblings)}")
    try:
        match path.suffix.lower():
            case ".csv":
                # As text, or images named 0001 would become the number 1.
                text = pyarrow.csv.ConvertOptions(column_types={image_column: pa.string()})
                table = pyarrow.csv.read_csv(path, None, pyarrow.csv.ParseOptions(newlines_in_values=True), text)
            case ".parquet":
                table = pyarrow.parquet.read_table(path)
                for place, field in enumerate(table.schema):
                    if pa.types.is_dictionary(field.type):
                        table = table.set_column(place, field.name, table.column(place).cast(field.type.value_type))
            case _:
                records = _read_objects(path)
                names = dict.fromkeys(name for record in records for name in record)
                table = pa.table({name: _column([record.get(name) for record in records]) for name in names})
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as {path.suffix[1:].upper()} ({error})") from error
    if table.num_rows == 0:
        raise InputError(f"{path}: has no records")
    if image_column not in table.column_names:
        hint = did_you_mean(image_column, table.column_names)
        raise InputError(
            f"{path}: has no column {image_column!r}, only {', '.join(table.column_names)}{hint} (image_column)"
        )
    kind = table.column(image_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"{path}: column {image_column!r} holds {kind}, not paths; name another image_column")
    return table


def _read_objects(path: Path) -> list[dict[str, Any]]:
    """Records of a list of objects, an object a line, or an object with one such list (TextVQA's is in `data`)."""
    text = path.read_text(encoding="utf-8-sig")
    content: Any = []
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                content += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    else:
        content = json.loads(text)
    if isinstance(content, dict):
        lists = [
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        if len(lists) != 1:
            raise ValueError(f"an object with {len(lists)} lists of records; it must have one, or be one")
        content = lists[0]
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise ValueError("not a list of objects")
    return content


def _column(values: list[Any]) -> pa.Array:
    """An array of the values' common type, or else of their JSON."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([None if value is None else json.dumps(value) for value in values])
