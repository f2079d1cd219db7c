"""Manifests, tables of records in files -> where the images of each lie, and the user's columns."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from lowrank_tune.config.source import ManifestSource
from lowrank_tune.errors import InputError, did_you_mean, writable
from lowrank_tune.features.containers import declared_column, read_parquet, read_tar
from lowrank_tune.features.decoding import IMAGE_SUFFIXES
from lowrank_tune.features.embedded import is_list, take_out, take_out_columns
from lowrank_tune.features.folders import Wanted, expand_braces, find_files
from lowrank_tune.features.forms import decoded, find_records, has_images, parsed
from lowrank_tune.features.images import SourceRecords
from lowrank_tune.features.named import (
    Finder,
    also_of_chats,
    image_column,
    is_address,
    is_chat,
    local_path,
    named_images,
    refuse_addresses,
)
from lowrank_tune.features.separated import read_separated
from lowrank_tune.files import LFS_POINTER

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".tar")
"""Of the files that hold records."""
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
"""What may follow the suffix of a text: what pyarrow unpacks by itself."""
_ANOTHER = "write features.source.image_column, the column of the images"
_LARGEST_POINTER = 1024
_MOST_NAMES = 256
"""Of the objects in a column; more are keys, which a column each would not hold."""
_DEEPEST = 16
_NOTES_SHOWN = 5
_ADVICE = {
    ".arrow": "; `to_parquet` of `datasets` writes what it saved as one",
    ".txt": "; a list of paths with the first line `image` is a .csv",
    ".xlsx": "; save it as .csv",
    ".zip": "; unpack it first",
    ".xz": "; unpack it first",
    ".tgz": "; unpack it to a .tar first",
}
_FOLDER = ", or write features.source.images for a folder of images"
_FOLDER_TABLE = "metadata"
"""The stem of the tables in a directory made for `datasets.load_dataset("imagefolder")`."""
_NOT_RECORDS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""What `datasets` writes beside its tables."""


def read_manifest(source: ManifestSource, cache_root: Path | None) -> SourceRecords:
    """Read the records of a manifest's files; an InputError where there are none, or they name no images.

    Images that are written there as texts are kept below `cache_root`, or, where it is None, only told apart.
    """
    files = manifest_files((source.manifest,) if isinstance(source.manifest, str) else source.manifest)
    root = None if source.root is None else Path(local_path(source.root)).absolute()
    if root is not None and not root.is_dir():
        raise InputError(
            f"{source.root if is_address(str(source.root)) else root}: no such directory; correct features.source.root"
        )
    tables, notes, finder = list[pa.Table](), list[str](), Finder(files)
    # Flat, for a list a record takes more memory than all else.
    places, counts = list[str](), list[int]()
    for path in files:
        told: list[str] = []
        tables.append(read_table(path, source, cache_root, told))
        notes += [f"{path}: {sentence}" for sentence in told]
        found, found_counts = _places(path, tables[-1], source, finder, str(root or path.parent))
        places += found
        counts += found_counts
    columns = concatenate(tables)
    if not places:
        what = "no record that names an image" if counts else "no records"
        raise InputError(f"{files[0]}: has {what}{f', nor has any of {len(files) - 1} more' if files[1:] else ''}")
    text_only = counts.count(0) if is_chat(columns.column_names) else 0
    if text_only:
        notes.insert(0, f"{text_only} of {len(counts)} records name no image, only text, and are left out")
    images, numbers, each = list[str | None](), list[int](), iter(places)
    for number, count in enumerate(counts):
        if count or not text_only:
            images += islice(each, count) if count else [None]
            numbers += [number] * (count or 1)
    shown = notes[:_NOTES_SHOWN]
    shown += [f"and {len(notes) - len(shown)} more such notes"] if len(notes) > len(shown) else []
    if numbers == list(range(len(columns))):
        return SourceRecords(tuple(images), columns, tuple(shown))
    return SourceRecords(tuple(images), columns.take(numbers), tuple(shown), tuple(numbers))


def _places(
    path: Path, table: pa.Table, source: ManifestSource, finder: Finder, folder: str
) -> tuple[list[str], list[int]]:
    """Where the images of a table's records lie, and how many each has; none where all are chats of text."""
    column = image_column(table, source.image_column or declared_column(path), path) if len(table) else None
    if column is None:
        return [], [0] * len(table)
    named, counts = list[str](), list[int]()
    others = [table.column(name) for name in also_of_chats(table.column_names) if source.image_column is None]
    for number, value in enumerate(table.column(column).to_pylist()):
        found = named_images(value)
        for other in others if not found else ():
            found = found or named_images(other[number].as_py())
        named += found
        counts.append(len(found))
    kind = table.column(column).type
    if not named and not pa.types.is_null(kind):
        raise InputError(f"{path}: column {column!r} holds {kind}, which names no image; {_ANOTHER}")
    refuse_addresses(named, column, path)
    places = [finder.place(image, folder) for image in named]
    item = kind
    while is_list(item):
        item = item.value_type
    if pa.types.is_integer(item) and not any(map(os.path.exists, places)):
        raise InputError(f"{path}: column {column!r} holds {kind}, which are no files' names; {_ANOTHER}")
    return places, counts


def manifest_files(patterns: Iterable[str]) -> list[Path]:
    """List the tables that a manifest's paths, directories and globs name; an InputError where one names none."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = local_path(pattern)
        for name in [path] if os.path.lexists(path) else expand_braces(path):
            files |= dict.fromkeys(_files_of(name))
    return list(files)


def _files_of(pattern: str) -> list[Path]:
    place = Path(pattern).absolute()
    if place.is_file():
        return [place]
    if not place.is_dir() and not glob.has_magic(pattern) and not is_address(pattern):
        siblings = [sibling.name for sibling in place.parent.iterdir()] if place.parent.is_dir() else []
        hint = did_you_mean(place.name, siblings)
        raise InputError(f"{place}: no such file; correct features.source.manifest{hint}")
    try:
        found, _ = find_files([pattern], Wanted("table", "tables", "features.source.manifest", _kind_left_out))
    except InputError as error:
        advice = [text for suffix, text in _ADVICE.items() if suffix in str(error)]
        advice += [_FOLDER] if any(suffix in str(error) for suffix in IMAGE_SUFFIXES) else []
        raise InputError(f"{error}{''.join(advice)}") from error
    tables = list(map(Path, found))
    if not place.is_dir():
        return tables
    tables = [path for path in tables if path.name.split(".")[0] == _FOLDER_TABLE] or tables
    tars = {path.stem for path in tables if path.suffix.lower() == ".tar"}
    # img2dataset's 00000.parquet and 00000_stats.json lie beside 00000.tar, which holds all of theirs.
    tables = [path for path in tables if path.suffix.lower() == ".tar" or path.stem.removesuffix("_stats") not in tars]
    kinds = Counter(map(table_suffix, tables))
    if len(kinds) > 1:
        raise InputError(
            f"{place}: tables of several kinds, {', '.join(f'{count} {kind}' for kind, count in kinds.items())}; "
            f"name the one, or a glob such as {place}/**/*{next(iter(kinds))}, in features.source.manifest"
        )
    return tables


def _kind_left_out(file: str, by_content: bool) -> str:
    """The kind of a file that is no table, for people; empty where it is one."""
    path = Path(file)
    return path.suffix or "without a suffix" if table_suffix(path) not in SUFFIXES or path.name in _NOT_RECORDS else ""


def table_suffix(path: Path) -> str:
    """Return the suffix that tells a table's format, in small letters, that of a compression aside."""
    path = Path(path.name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def read_table(path: Path, source: ManifestSource, cache_root: Path | None, notes: list[str]) -> pa.Table:
    """Read one file's records, each column of a type that a table can hold; what was left out becomes a note.

    Raises:
        InputError: it cannot be read as what its suffix says, which is named with the place.
    """
    suffix = table_suffix(path)
    if suffix not in SUFFIXES:
        advice = _ADVICE.get(suffix, "")
        raise InputError(f"{path}: the suffix tells a table's format, and must be one of {', '.join(SUFFIXES)}{advice}")
    if source.records is not None and suffix in (".csv", ".tsv", ".parquet", ".tar"):
        raise InputError(f"{path}: has one list of records; leave out features.source.records")
    try:
        content = _content(path, suffix, source, cache_root, notes)
        if isinstance(content, pa.Table):
            return content
        records = find_records(content, source.image_column, source.records, notes)
        return apart(columns_of([take_out(record, cache_root) for record in records]))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply to be a list of records") from error


def _content(path: Path, suffix: str, source: ManifestSource, cache_root: Path | None, notes: list[str]) -> Any:
    """A file's table, or what its JSON is."""
    try:
        if path.stat().st_size < _LARGEST_POINTER and path.read_bytes().startswith(LFS_POINTER):
            raise ValueError("it is a pointer of Git LFS; fetch the file itself by `git lfs pull`")
        match suffix:
            case ".csv" | ".tsv":
                table = read_separated(decoded(_read_bytes(path), notes), suffix == ".tsv", source.image_column)
                return apart(take_out_columns(table, cache_root))
            case ".parquet":
                return apart(read_parquet(path, source.image_column))
            case ".tar":
                return columns_of(read_tar(path, source.image_column, notes))
        content = parsed(decoded(_read_bytes(path), notes), suffix != ".json")
    except (OSError, ValueError, pa.ArrowException) as error:
        advice = "; it is cut short or damaged: get it again" if suffix == ".parquet" else ""
        raise InputError(f"{path}: cannot be read as {suffix[1:].upper()}: {str(error).rstrip('.')}{advice}") from error
    if suffix != ".json" and isinstance(content, dict) and source.records is None:
        by_column = all(isinstance(each, dict) and all(map(str.isdigit, each)) for each in content.values())
        if has_images([content], source.image_column) and not by_column and "annotations" not in content:
            return [content]  # one line, one record
    return content


def _read_bytes(path: Path) -> bytes:
    with pa.input_stream(str(path), compression="detect") as stream:
        data: bytes = stream.read()
    return data


def columns_of(records: list[dict[str, Any]]) -> pa.Table:
    """Make a table of records, a column for every name that any of them has."""
    names = dict.fromkeys(name for record in records for name in record)
    columns = [_column([record.get(name) for record in records]) for name in names]
    return pa.Table.from_arrays(columns, [_text(name) for name in names])


def apart(table: pa.Table) -> pa.Table:
    """Give each column a name of its own: `name`, then `name_2`; `unnamed` where it has none."""
    names: dict[str, None] = {}
    for name in table.column_names:
        name, number = name or "unnamed", 1
        while (unlike := f"{name}_{number}" if number > 1 else name) in names:
            number += 1
        names[unlike] = None
    return table.rename_columns(list(names))


def concatenate(tables: list[pa.Table]) -> pa.Table:
    """Join the records of several tables; a column of types that cannot be joined, or written, becomes text."""
    whole: dict[str, pa.ChunkedArray] = {}
    known = [set(table.column_names) for table in tables]
    for name in dict.fromkeys(name for table in tables for name in table.column_names):
        parts = [table.select([name] if name in names else []) for table, names in zip(tables, known, strict=True)]
        try:
            column = pa.concat_tables(parts, promote_options="permissive").column(0)
        except pa.ArrowException:
            parts = [pa.table({name: _texts(part.column(0).to_pylist())}) if part.columns else part for part in parts]
            column = pa.concat_tables(parts, promote_options="permissive").column(0)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        whole[name] = column if _writable(column.type) else pa.chunked_array([_texts(column.to_pylist())])
    return pa.table(whole)


def _column(values: list[Any]) -> pa.Array:
    """An array of the values' common type, or else of texts."""
    named = {
        name
        for value in values
        for each in (value if isinstance(value, list) else [value])
        if isinstance(each, dict)
        for name in each
    }
    if len(named) <= _MOST_NAMES:
        try:
            array = pa.array(values)
            if _writable(array.type):
                return array
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            pass
    return _texts(values)


def _writable(kind: pa.DataType, depth: int = 0) -> bool:
    """Whether parquet holds values of this type; of the nested, those that readers of it get through."""
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    if pa.types.is_struct(kind) and not inner or depth > _DEEPEST:
        return False
    return all(_writable(each, depth + 1) for each in inner)


def _texts(values: list[Any]) -> pa.Array:
    """An array of the values as text: their JSON where they are none."""
    return pa.array([None if value is None or value != value else _text(value) for value in values], pa.string())


def _text(value: Any) -> str:
    return writable(value if isinstance(value, str) else json.dumps(value, default=str))
