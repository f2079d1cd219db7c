"""Manifests, tables of records in files -> where the images of each lie, and the user's columns."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from lowrank_tune.config.schema import ManifestSource
from lowrank_tune.errors import InputError, did_you_mean
from lowrank_tune.features.forms import IMAGE_COLUMN, decoded, find_records, parsed
from lowrank_tune.features.images import SourceRecords
from lowrank_tune.features.named import Finder, image_column, is_chat, named_images, refuse_addresses

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".tar")
"""Of the files that hold records."""
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
"""What may follow the suffix of a text: what pyarrow unpacks by itself."""
_ANOTHER = "write features.source.image_column, the column of the images"
_FOLDER_TABLE = "metadata"
"""The stem of the tables in a directory made for `datasets.load_dataset("imagefolder")`."""
_NOT_RECORDS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""What `datasets` writes beside its tables."""


def read_manifest(source: ManifestSource) -> SourceRecords:
    """Read the records of a manifest's files; an InputError where there are none, or they name no images."""
    files = manifest_files((source.manifest,) if isinstance(source.manifest, str) else source.manifest)
    root = None if source.root is None else Path(os.path.expanduser(source.root)).absolute()
    if root is not None and not root.is_dir():
        raise InputError(f"{root}: no such directory; correct features.source.root")
    tables, notes = list[pa.Table](), list[str]()
    for path in files:
        told: list[str] = []
        tables.append(read_table(path, source, told))
        notes += [f"{path}: {sentence}" for sentence in told]
    folders = [str(root or path.parent) for path, table in zip(files, tables, strict=True) for _ in range(len(table))]
    columns = concatenate(tables)
    if not folders:
        raise InputError(f"{files[0]}: has no records{f', nor has any of {len(files) - 1} more' if files[1:] else ''}")
    column = image_column(columns, source.image_column, files[0])
    named = [named_images(value) for value in columns.column(column).to_pylist()]
    kind = columns.column(column).type
    if not any(named):
        raise InputError(f"{files[0]}: column {column!r} holds {kind}, which names no image; {_ANOTHER}")
    refuse_addresses((image for images in named for image in images), column, files[0])
    finder, text_only = Finder(files), 0 if is_chat(columns.column_names) else None
    images, numbers = list[str | None](), list[int]()
    for number, (folder, names) in enumerate(zip(folders, named, strict=True)):
        if not names and text_only is not None:
            text_only += 1
            continue
        images += [finder.place(name, folder) for name in names] or [None]
        numbers += [number] * (len(names) or 1)
    if pa.types.is_integer(kind) and not any(map(os.path.exists, filter(None, images))):
        raise InputError(f"{files[0]}: column {column!r} holds {kind}, which are no files' names; {_ANOTHER}")
    if text_only:
        notes.append(f"{text_only} of {len(named)} records name no image, only text, and are left out")
    if numbers != list(range(len(columns))):
        columns = columns.take(numbers)
    return SourceRecords(tuple(images), columns, tuple(notes), tuple(numbers))


def manifest_files(patterns: Iterable[str]) -> list[Path]:
    """List the tables that a manifest's paths, directories and globs name; an InputError where one names none."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        place = Path(expanded).absolute()
        if place.is_dir():
            found = _tables_of(place)
        elif place.is_file():
            found = [place]
        elif glob.has_magic(pattern):
            found = sorted(
                path for name in glob.glob(expanded, recursive=True) if (path := Path(name).absolute()).is_file()
            )
            if not found:
                raise InputError(f"{pattern}: matches no file from {Path.cwd()}; correct features.source.manifest")
        else:
            siblings = [sibling.name for sibling in place.parent.iterdir()] if place.parent.is_dir() else []
            hint = did_you_mean(place.name, siblings)
            raise InputError(f"{place}: no such file; correct features.source.manifest{hint}")
        files |= dict.fromkeys(found)
    return list(files)


def _tables_of(directory: Path) -> list[Path]:
    below = [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(directory).parts)
    ]
    tables = [path for path in below if table_suffix(path) in SUFFIXES and path.name not in _NOT_RECORDS]
    tables = [path for path in tables if path.name.split(".")[0] == _FOLDER_TABLE] or tables
    kinds = Counter(map(table_suffix, tables))
    if not tables:
        suffixes = Counter(path.suffix.lower() or "no suffix" for path in below).most_common(5)
        found = ", ".join(f"{count} {suffix}" for suffix, count in suffixes) or "nothing"
        raise InputError(
            f"{directory}: no tables in it (looked for {', '.join(SUFFIXES)}, in subfolders too; found {found}); "
            "correct features.source.manifest"
        )
    if len(kinds) > 1:
        raise InputError(
            f"{directory}: tables of several kinds, {', '.join(f'{count} {kind}' for kind, count in kinds.items())}; "
            f"name the one, or a glob such as {directory}/**/*{next(iter(kinds))}, in features.source.manifest"
        )
    return tables


def table_suffix(path: Path) -> str:
    """Return the suffix that tells a table's format, in small letters, that of a compression aside."""
    path = Path(path.name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def read_table(path: Path, source: ManifestSource, notes: list[str]) -> pa.Table:
    """Read one file's records, each column of a type that a table can hold; what was left out becomes a note.

    Raises:
        InputError: it cannot be read as what its suffix says, which is named with the place.
    """
    suffix = table_suffix(path)
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: the suffix tells a table's format, and must be one of {', '.join(SUFFIXES)}")
    try:
        match suffix:
            case ".csv" | ".tsv":
                return _read_text_table(path)
            case ".parquet":
                return _plain(pyarrow.parquet.read_table(path))
            case _:
                content = parsed(decoded(_read_bytes(path), notes), suffix != ".json")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as {suffix[1:].upper()}: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply to be a list of records") from error
    try:
        return columns_of(find_records(content, source.image_column, source.records, notes))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply to be a list of records") from error


def _plain(table: pa.Table) -> pa.Table:
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(field.type.value_type))
    return table


def _read_bytes(path: Path) -> bytes:
    with pa.input_stream(str(path), compression="detect") as stream:
        data: bytes = stream.read()
    return data


def _read_text_table(path: Path) -> pa.Table:
    data = _read_bytes(path)
    # As text, or images named 0001 would become the number 1.
    text = pyarrow.csv.ConvertOptions(column_types={IMAGE_COLUMN: pa.string()})
    separated = pyarrow.csv.ParseOptions(
        newlines_in_values=True, delimiter="\t" if table_suffix(path) == ".tsv" else ","
    )
    return pyarrow.csv.read_csv(pa.BufferReader(data), None, separated, text)


def columns_of(records: list[dict[str, Any]]) -> pa.Table:
    """Make a table of records, a column for every name that any of them has."""
    names = dict.fromkeys(name for record in records for name in record)
    return pa.table({name: _column([record.get(name) for record in records]) for name in names})


def concatenate(tables: list[pa.Table]) -> pa.Table:
    """Join the records of several tables; a column whose types cannot be reconciled becomes text."""
    names = dict.fromkeys(name for table in tables for name in table.column_names)
    for name in names:
        holding = [number for number, table in enumerate(tables) if name in table.column_names]
        try:
            pa.unify_schemas(
                [pa.schema([tables[number].schema.field(name)]) for number in holding], promote_options="permissive"
            )
        except pa.ArrowException:
            for number in holding:
                table = tables[number]
                place = table.column_names.index(name)
                tables[number] = table.set_column(place, name, _texts(table.column(place).to_pylist()))
    return pa.concat_tables(tables, promote_options="permissive")


def _column(values: list[Any]) -> pa.Array:
    """An array of the values' common type, or else of texts."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return _texts(values)


def _texts(values: list[Any]) -> pa.Array:
    """An array of the values as text: their JSON where they are none."""
    texts = (value if value is None or isinstance(value, str) else json.dumps(value, default=str) for value in values)
    return pa.array(list(texts), pa.string())
