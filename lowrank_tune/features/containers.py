"""Tables and tars that hold images themselves -> records as a table, with the place of each image in its stead."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lowrank_tune.errors import InputError
from lowrank_tune.features.decoding import IMAGE_SUFFIXES
from lowrank_tune.features.embedded import is_encoded, is_list, open_table, plain, read_batches, read_members, unwrapped
from lowrank_tune.features.named import is_image_name

KEPT_BYTES = 1024
"""What a column may hold of bytes, a record, and yet be read; more is a file, such as an image."""
_TEXTS = (".txt", ".cls", ".caption", ".text", ".label")
_LONGEST_TEXT = 1 << 20


# --- tables -----------------------------------------------------------------------------------------------------------


def read_parquet(path: Path, wanted: str | None) -> pa.Table:
    """Read a parquet file's records; images' bytes stay there: in their stead stand places, texts or lists of them.

    Bytes are images in Hugging Face's struct {bytes, path}, in texts of base64 or `data:`, and in columns that are
    wanted, named for images, declared as such, or large. Where a struct has no bytes its path stands there, as it is
    written; else what it calls the image becomes a column `<name>.path`.

    Raises:
        InputError: there are several columns of the wanted name, or it has bytes deep inside.
        OSError, pa.ArrowException: the file cannot be read.
    """
    table = open_table(path)
    schema, sizes = table.schema_arrow, _row_sizes(table)
    if wanted and schema.names.count(wanted) > 1:
        raise InputError(f"{path}: has {schema.names.count(wanted)} columns named {wanted!r}; rename all but one")
    images = {wanted, *_declared(schema)}
    special, kept, nested, files = set[str](), list[str](), list[str](), _files(table, sizes)
    for field in schema:
        item, leaves = _item(field.type), _leaves(table, field.name)
        likely = field.name in images or is_image_name(field.name) or sum(sizes[leaf] for leaf in leaves) > KEPT_BYTES
        if (_is_struct(item) or _is_text(item) or (_is_bytes(item) and likely)) and schema.names.count(field.name) == 1:
            special.add(field.name)
        else:
            kept += [leaf for leaf in leaves if leaf not in files]
            if files.intersection(leaves):
                nested.append(field.name)
    chosen = [wanted] if wanted else list(filter(is_image_name, nested if not any(map(is_image_name, special)) else ()))
    if deep := [name for name in chosen if name in nested]:
        raise InputError(
            f"{path}: column {deep[0]!r} holds images' bytes deep inside of it, from where they are not read; make a "
            "column of them, or of lists of them, and name it in features.source.image_column"
        )
    read = table.read(columns=list(dict.fromkeys(kept))) if kept else None
    columns, names = list[pa.ChunkedArray](), list[str]()
    for field in schema:
        if field.name in special:
            places, called = _without_bytes(table, path, field)
            columns.append(places)
            names.append(field.name)
            if called is not None:
                columns.append(called)
                names.append(f"{field.name}.path")
        elif read is not None and field.name in read.column_names:
            number = read.column_names.index(field.name)
            columns.append(_undictionaried(read.column(number)))
            names.append(field.name)
            read = read.remove_column(number)
    return pa.table(columns, names=names)


def declared_column(path: Path) -> str | None:
    """The column of a parquet file that holds images, as Hugging Face's `datasets` wrote or as its type says.

    Raises:
        InputError: several do, and none is named for it.
    """
    if path.suffix.lower() != ".parquet":
        return None
    try:
        schema = open_table(path).schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as PARQUET: {error}") from error
    found = _declared(schema) or [field.name for field in schema if _is_struct(_item(field.type))]
    named = [name for name in found if is_image_name(name)]
    if len(found) > 1 and not named:
        raise InputError(
            f"{path}: columns {', '.join(map(repr, found))} hold images; write which in features.source.image_column"
        )
    return next(iter(named or found), None)


def _declared(schema: pa.Schema) -> list[str]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [name for name, feature in features.items() if name in schema.names and _is_image_feature(feature)]
    except (KeyError, ValueError, TypeError, AttributeError):
        return []


def _is_image_feature(feature: Any) -> bool:
    if isinstance(feature, list):
        return len(feature) == 1 and _is_image_feature(feature[0])
    return isinstance(feature, dict) and (feature.get("_type") == "Image" or _is_image_feature(feature.get("feature")))


def _item(kind: pa.DataType) -> pa.DataType:
    """What a column, or each of its lists, holds."""
    kind = _plain_type(kind)
    return _plain_type(kind.value_type) if is_list(kind) else kind


def _plain_type(kind: pa.DataType) -> pa.DataType:
    while isinstance(kind, pa.DictionaryType | pa.BaseExtensionType):
        kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind.storage_type
    return kind


def _is_text(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_bytes(kind: pa.DataType) -> bool:
    is_fixed = pa.types.is_fixed_size_binary
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, is_fixed)
    return any(test(kind) for test in tests) and not pa.types.is_decimal(kind)


def _is_struct(kind: pa.DataType) -> bool:
    """Whether it is an image of Hugging Face's; one that holds paths alone may have bytes of no type."""
    if not pa.types.is_struct(kind) or "bytes" not in kind.names:
        return False
    held = kind.field("bytes").type
    return _is_bytes(held) or pa.types.is_null(held)


def _leaves(table: pq.ParquetFile, column: str) -> list[str]:
    paths = [table.schema.column(number).path for number in range(len(table.schema))]
    return [path for path in paths if path == column or path.startswith(f"{column}.")]


def _row_sizes(table: pq.ParquetFile) -> dict[str, float]:
    """Bytes a row of each leaf, by its path."""
    sizes = dict.fromkeys((table.schema.column(number).path for number in range(len(table.schema))), 0.0)
    for group in range(table.num_row_groups):
        held = table.metadata.row_group(group)
        for number in range(held.num_columns):
            chunk = held.column(number)
            sizes[chunk.path_in_schema] += chunk.total_uncompressed_size / max(1, table.metadata.num_rows)
    return sizes


def _files(table: pq.ParquetFile, sizes: Mapping[str, float]) -> set[str]:
    """Leaves of nested columns that are bytes of files, of which nothing is kept."""
    leaves = (table.schema.column(number) for number in range(len(table.schema)))
    raw = [
        leaf.path
        for leaf in leaves
        if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type == "NONE" and leaf.converted_type == "NONE"
    ]
    return {leaf for leaf in raw if sizes[leaf] > KEPT_BYTES or f"{leaf.removesuffix('.bytes')}.path" in sizes}


def _undictionaried(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _without_bytes(
    table: pq.ParquetFile, path: Path, field: pa.Field
) -> tuple[pa.ChunkedArray, pa.ChunkedArray | None]:
    """A column with places for bytes, and what those images are called, where they are."""
    column, first, places, called = field.name, 0, list[pa.Array](), list[pa.Array]()
    known = _known_without_bytes(table, field)
    for array, inside in known or _read_inside(table, column):
        names, lengths = _names(array, inside), _lengths(array)
        rows_N, items_N = np.arange(first, first + len(array)), None
        if lengths is not None:
            rows_N = np.repeat(rows_N, lengths)
            items_N = np.arange(len(rows_N)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        first += len(array)
        places.append(_listed(array, _places(f"{path}::{column}", rows_N, items_N, inside, names)))
        if _is_struct(_item(field.type)):
            called.append(_listed(array, pc.if_else(pa.array(inside), names, pa.scalar(None, pa.string()))))
    kind = pa.list_(pa.string()) if is_list(_plain_type(field.type)) else pa.string()
    any_called = any(_flat(array).null_count < len(_flat(array)) for array in called)
    return pa.chunked_array(places, kind), pa.chunked_array(called, kind) if any_called else None


Inside = tuple[pa.Array, npt.NDArray[np.bool_]]
"""A part of a column, and whether the bytes of each image of it are in the table."""


def _known_without_bytes(table: pq.ParquetFile, field: pa.Field) -> list[Inside] | None:
    """Tell from the file's counts and the images' names alone which rows have bytes; None where these do not tell."""
    column, rows, item = field.name, table.metadata.num_rows, _item(field.type)
    if _is_text(item):
        return None
    nulls, values = _count(table, column)
    if nulls is None:
        return None
    names = [leaf for leaf in _leaves(table, column) if not leaf.endswith(".bytes")]
    if _is_struct(item) and names:
        chunks = table.read(columns=names).column(column).chunks
        there = [_flat(chunk).is_valid().to_numpy(zero_copy_only=False) for chunk in chunks]
        if nulls == values:
            return [(chunk, np.zeros_like(flat_N)) for chunk, flat_N in zip(chunks, there, strict=True)]
        # Of the bytes, an empty list and a null one count as a null too.
        return list(zip(chunks, there, strict=True)) if nulls == values - sum(map(np.count_nonzero, there)) else None
    if nulls == 0 and not is_list(_plain_type(field.type)):
        return [(pa.nulls(rows, pa.string()), np.ones(rows, bool))]
    return None


def _count(table: pq.ParquetFile, column: str) -> tuple[int | None, int]:
    """How many of a column's bytes are null, where the file says so, and how many there are with these."""
    nulls, values = 0, 0
    for number in range(len(table.schema)):
        leaf = table.schema.column(number).path
        if leaf == column or (leaf.startswith(f"{column}.") and not leaf.endswith(".path")):
            for group in range(table.num_row_groups):
                chunk = table.metadata.row_group(group).column(number)
                if chunk.statistics is None or not chunk.statistics.has_null_count:
                    return None, 0
                nulls, values = nulls + chunk.statistics.null_count, values + chunk.num_values
    return nulls, values


def _read_inside(table: pq.ParquetFile, column: str) -> Iterator[Inside]:
    """Go through the column itself."""
    for group in range(table.num_row_groups):
        for array in read_batches(table, column, group):
            flat = _flat(array)
            if _is_text(flat.type):
                inside = np.array([text is not None and is_encoded(text) for text in flat.to_pylist()], bool)
            else:
                inside = plain(flat).is_valid().to_numpy(zero_copy_only=False)
            yield array, inside


def _flat(array: pa.Array) -> pa.Array:
    """The values of all lists, or the array itself, `unwrapped`."""
    while is_list((array := unwrapped(array)).type):
        array = array.flatten()
    return array


def _lengths(array: pa.Array) -> npt.NDArray[np.int64] | None:
    if not is_list(array.type):
        return None
    lengths: npt.NDArray[np.int64] = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64)


def _listed(array: pa.Array, values: pa.Array) -> pa.Array:
    """Values of all lists, in the lists of an array."""
    lengths = _lengths(array)
    if lengths is None:
        return values
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, values, mask=array.is_null())


def _names(array: pa.Array, inside_N: npt.NDArray[np.bool_]) -> pa.Array:
    """The paths or names of a column's images, not those that are images themselves."""
    flat = _flat(array)
    if (
        pa.types.is_struct(flat.type)
        and "path" in flat.type.names
        and _is_text(_plain_type(flat.type.field("path").type))
    ):
        return _flat(flat.field("path")).cast(pa.string())
    if not _is_text(flat.type):
        return pa.nulls(len(flat), pa.string())
    return pa.array(
        [None if inside else text for text, inside in zip(flat.to_pylist(), inside_N, strict=True)], pa.string()
    )


def _places(
    column: str,
    rows_N: npt.NDArray[np.int64],
    items_N: npt.NDArray[np.int64] | None,
    inside_N: npt.NDArray[np.bool_],
    names: pa.Array,
) -> pa.Array:
    text = pc.cast(pa.array(rows_N), pa.string())
    if items_N is not None:
        text = pc.binary_join_element_wise(text, pc.cast(pa.array(items_N), pa.string()), "][")
    places = pc.binary_join_element_wise(f"{column}[", text, "]", "")
    return pc.if_else(pa.array(inside_N), places, names)


# --- tars -------------------------------------------------------------------------------------------------------------


def read_tar(path: Path, wanted: str | None, notes: list[str]) -> list[dict[str, Any]]:
    """Read a tar's records, as webdataset writes them: the files of one name but for their suffixes are a sample.

    Args:
        path: the file.
        wanted: the suffix of the images, where not all are meant; it names their column too, which is `image` else.
        notes: gets a sentence on what was left out.

    Raises:
        InputError: the tar is compressed, cut short, or holds no such image.
    """
    suffixes = IMAGE_SUFFIXES if wanted in (None, "image") else {f".{wanted.lower().lstrip('.')}"}
    column = wanted or "image"
    samples, images = dict[str, dict[str, Any]](), dict[str, dict[str, str]]()
    others, twice = Counter[str](), 0
    try:
        with path.open("rb") as opened:
            for member in read_members(path):
                folder, name = os.path.split(member.name)
                if name.startswith(".") or _HIDDEN.search(folder):
                    continue
                stem, dot, extension = name.partition(".")
                key, extension = os.path.join(folder, stem).removeprefix("./"), extension.lower()
                last = PurePosixPath(name.lower()).suffix
                is_text = last in (".json", *_TEXTS) and member.size <= _LONGEST_TEXT
                if not (is_image := last in suffixes or f".{extension}" in suffixes) and not is_text:
                    others[last or "without a suffix"] += 1
                    if last not in IMAGE_SUFFIXES:
                        continue  # a README is no sample
                record = samples.setdefault(key, {column: None, "__key__": key, "__url__": str(path)})
                if is_image:
                    twice += member.name in images.setdefault(key, {})
                    images[key][member.name] = f"{path}::{member.name}"
                elif is_text:
                    opened.seek(member.offset_data)
                    text = opened.read(member.size).decode("utf-8-sig", "replace")
                    _add(record, extension, text, last == ".json")
    except tarfile.TarError as error:
        raise InputError(f"{path}: {_why(path, error)}") from error
    left_out = ", ".join(f"{count} {name}" for name, count in others.most_common(5))
    if not images:
        raise InputError(
            f"{path}: no images in it (looked for {', '.join(sorted(suffixes))}; found {left_out or 'none other'}); "
            "correct features.source.image_column, or the manifest"
        )
    several = any(len(found) > 1 for found in images.values())
    for key, found in images.items():
        samples[key][column] = list(found.values()) if several else next(iter(found.values()))
    if left_out:
        notes.append(f"left out: {left_out}")
    if twice:
        notes.append(f"{twice} files lie in it twice, of which the last is taken")
    return list(samples.values())


_HIDDEN = re.compile(r"(^|/)(\.[^./]|__MACOSX|PaxHeaders)")


def _add(record: dict[str, Any], extension: str, text: str, is_json: bool) -> None:
    """Give a sample a text's column, or those of a JSON object."""
    try:
        value = json.loads(text) if is_json else text
    except ValueError:
        value = text
    for name, field in value.items() if isinstance(value, dict) else [(extension, value)]:
        record[f"{extension}.{name}" if name in record else str(name)] = field


def _why(path: Path, error: Exception) -> str:
    with path.open("rb") as opened:
        head = opened.read(6)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "is a compressed tar, in which no image can be found without unpacking it all; unpack it (gunzip) once"
    return f"is no tar, or is cut short or damaged ({error}); get it again"
