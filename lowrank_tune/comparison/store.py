"""A comparison on disk: `comparison.json`, a list of rows, and `per_image.parquet`, a row a method, rank and image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.files import write_whole
from lowrank_tune.records import Comparison, ComparisonRow

_DEVICE, _REMARKS = b"lowrank_tune.device", b"lowrank_tune.remarks"


def write_comparison(
    directory: Path, rows: Sequence[ComparisonRow], per_image: pd.DataFrame, device: str, remarks: Sequence[str]
) -> Comparison:
    """Write a comparison's two files, each whole or not at all.

    `comparison.json` is a list by contract, so the device and the remarks travel in the parquet file's own metadata.

    Args:
        directory: the study's.
        rows: one a (method, rank), every figure finite.
        per_image: one row a (method, rank, image).
        device: what the speeds were measured on.
        remarks: what a reader must not miss.

    Returns:
        The record of it.
    """
    per_image_path = directory / "per_image.parquet"
    table = pa.Table.from_pandas(per_image, preserve_index=False)
    notes = {_DEVICE: device, _REMARKS: json.dumps(list(remarks))}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **notes})
    write_whole(per_image_path, lambda path: pq.write_table(table, path))
    text = json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False)
    write_whole(directory / "comparison.json", lambda path: _write_text(path, text))
    return Comparison(tuple(rows), str(per_image_path), device, tuple(remarks))


def read_comparison(directory: Path) -> Comparison:
    """Read what `write_comparison` wrote.

    Args:
        directory: the study's.

    Raises:
        InputError: the study has no comparison, or its files are damaged.
    """
    path, per_image_path = directory / "comparison.json", directory / "per_image.parquet"
    try:
        rows = tuple(ComparisonRow(**row) for row in json.loads(path.read_text(encoding="utf-8")))
        notes = pq.read_schema(per_image_path).metadata or {}
        remarks = tuple(json.loads(notes.get(_REMARKS, b"[]")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{directory}: no readable comparison lies there ({error}); run `lowrank-tune compare` on the study"
        ) from error
    return Comparison(rows, str(per_image_path), notes.get(_DEVICE, b"").decode(), remarks)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
