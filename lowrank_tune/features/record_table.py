"""The table that maps a user's records to the cache's keys: `sources/<digest>.parquet`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from lowrank_tune.caches.sealed import SOURCES
from lowrank_tune.caches.shards import checksum
from lowrank_tune.features.durable import write_durably
from lowrank_tune.features.sources import SourceRecords


def write_record_table(
    directory: Path, records: SourceRecords, keys: Sequence[str | None], errors: Sequence[str | None]
) -> Path:
    """Write one row a record: its number, key, path and error, and the user's columns.

    A column of the user's whose name is taken, by one of those four or by another column, is kept as `source_<name>`.

    Args:
        directory: the cache; the file's name is the digest of its content, so the same records give the same file.
        records: the source.
        keys: the key of each record's file, None where it could not be read.
        errors: why a record has no features, None where it has.

    Raises:
        OSError: the directory cannot be written.
    """
    columns = {
        "record": pa.array(range(len(keys)), pa.int64()),
        "key": pa.array(keys, pa.string()),
        "path": pa.array([None if path is None else str(path) for path in records.paths], pa.string()),
        "error": pa.array(errors, pa.string()),
    }
    for name, column in zip(records.columns.column_names, records.columns.columns, strict=True):
        while name in columns:
            name = f"source_{name}"
        columns[name] = column
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    data = sink.getvalue().to_pybytes()
    path = directory / SOURCES / f"{checksum(data)}.parquet"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_durably(path, data)
    return path
