"""A comparison on disk.

`comparison.json` is a list of rows, `per_image.parquet` has a row a method, rank and image, `pareto.json` is a list of
trade-offs, and `compression.json` holds lists of what bytes buy: `stored`, `pruned`, `models` and `words`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.files import write_whole
from lowrank_tune.records import (
    Comparison,
    ComparisonRow,
    Compression,
    Front,
    FrontPoint,
    PrunedRow,
    QuantisedRow,
    StoredRow,
)

_DEVICE, _REMARKS, _DATA = b"lowrank_tune.device", b"lowrank_tune.remarks", b"lowrank_tune.data"


def write_comparison(directory: Path, comparison: Comparison, per_image: pd.DataFrame) -> None:
    """Write a comparison's files, each whole or not at all.

    `comparison.json` is a list by contract, so device, data and remarks travel in the parquet file's own metadata.

    Args:
        directory: the study's.
        comparison: what to write, every figure finite; its `per_image_path` lies in the directory.
        per_image: one row a (method, rank, image).
    """
    table = pa.Table.from_pandas(per_image, preserve_index=False)
    notes = {_DEVICE: comparison.device, _REMARKS: json.dumps(comparison.remarks), _DATA: comparison.data}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **notes})
    write_whole(Path(comparison.per_image_path), lambda path: pq.write_table(table, path))
    _write_json(directory / "comparison.json", [asdict(row) for row in comparison.rows])
    _write_json(directory / "pareto.json", [asdict(front) for front in comparison.fronts])
    _write_json(directory / "compression.json", asdict(comparison.compression))


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
        fronts = tuple(_front(**front) for front in json.loads((directory / "pareto.json").read_text(encoding="utf-8")))
        compression = _compression(directory / "compression.json")
        notes = pq.read_schema(per_image_path).metadata or {}
        remarks = tuple(json.loads(notes.get(_REMARKS, b"[]")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{directory}: no readable comparison lies there ({error}); measure it again with "
            f"`lowrank-tune compare {directory.name} --again`"
        ) from error
    device, data = (notes.get(key, b"").decode() for key in (_DEVICE, _DATA))
    return Comparison(rows, str(per_image_path), device, remarks, data, fronts, compression)


def _front(points: list[dict[str, Any]], **front: Any) -> Front:
    return Front(points=tuple(FrontPoint(**point) for point in points), **front)


def _compression(path: Path) -> Compression:
    """Read `compression.json`; a study that was compared before there was one has none."""
    if not path.exists():
        return Compression()
    kinds = {"stored": StoredRow, "pruned": PrunedRow, "models": QuantisedRow, "words": str}
    held: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8"))
    rows = {
        name: tuple(kind(**row) if isinstance(row, dict) else kind(row) for row in held[name])
        for name, kind in kinds.items()
    }
    return Compression(**rows)


def _write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=1, allow_nan=False)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
