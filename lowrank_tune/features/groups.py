"""Images that belong together: crops of a photograph, frames of a scene, pages of a document."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lowrank_tune.config.source import SampleSource, Source
from lowrank_tune.errors import CacheError, InputError, did_you_mean
from lowrank_tune.features.images import RECORD_COLUMNS
from lowrank_tune.features.sources import photograph_paths, read_records
from lowrank_tune.records import FeatureSet


def listed_groups(source: Source, group_by: str | None) -> list[str]:
    """Name what each image that a source lists belongs to, before anything is opened or hashed.

    Raises:
        InputError: as `read_records`, or the list has no such column.
    """
    if isinstance(source, SampleSource):
        photographs = photograph_paths()
        names = [photographs[number % len(photographs)].stem for number in range(source.samples)]
        return names if group_by else list(map(str, range(len(names))))
    records = read_records(source, None, 0)
    images = list(dict.fromkeys(image for image in records.images if image is not None))
    if group_by is None:
        return list(map(str, range(len(images))))
    if group_by not in records.columns.column_names:
        hint = did_you_mean(group_by, records.columns.column_names)
        raise InputError(
            f"split.group_by: the records have no column {group_by!r}, only "
            f"{', '.join(records.columns.column_names)}{hint}"
        )
    return _joined(images, records.images, records.columns.column(group_by).to_pylist())


def image_groups(features: FeatureSet, group_by: str | None) -> list[str]:
    """Name what each image belongs to: the least of the values that its records have, and those that share one with it.

    An image without a value stands alone, by its key.

    Raises:
        CacheError: the source's records cannot be read.
    """
    keys = [row.key for row in features.rows]
    if group_by is None:
        return keys
    try:
        column = f"source_{group_by}" if group_by in RECORD_COLUMNS else group_by
        records = pyarrow.parquet.read_table(features.records_path, columns=["key", column]).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise CacheError(
            f"{features.records_path}: the records' groups cannot be read ({error}); extract again"
        ) from error
    return _joined(keys, records["key"], records[column])


def _joined(images: Sequence[str], recorded: Sequence[str | None], values: Sequence[Any]) -> list[str]:
    """A name an image, from its image and value in each record; one without a value has its own."""
    pairs = {(key, str(value)) for key, value in zip(recorded, values, strict=True) if value is not None}
    numbers = {key: number for number, key in enumerate(images)}
    ends = [(numbers[key], value) for key, value in sorted(pairs, key=itemgetter(1)) if key in numbers]
    places = {value: len(images) + number for number, value in enumerate(dict.fromkeys(value for _, value in ends))}
    size = len(images) + len(places)
    rows, columns = np.array([(end, places[value]) for end, value in ends], dtype=np.int64).reshape(-1, 2).T
    links = coo_array((np.ones(len(ends)), (rows, columns)), (size, size))
    components = connected_components(links, directed=False)[1]
    names: dict[int, str] = {}
    for value, number in places.items():
        names.setdefault(components[number], value)
    return [names.get(components[number], key) for number, key in enumerate(images)]
