"""The caches of a results directory, local or on an object store: listed, found by name, shown, removed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lowrank_tune.caches.identity import Identity, differences
from lowrank_tune.caches.places import Folder, is_uri, join, results_place
from lowrank_tune.caches.sealed import MANIFEST, open_sealed, read_manifest
from lowrank_tune.caches.shards import COMMITS, SHARDS
from lowrank_tune.errors import CacheError, InputError, LowrankTuneError, redact
from lowrank_tune.records import FeatureSet

FEATURES = "features"


def list_caches(results: str | Path | None) -> list[str]:
    """The places of all feature caches of a results directory, sealed or not, sorted.

    Raises:
        InputError: the place does not answer.
    """
    root = join(_plain(results), FEATURES)
    folder = Folder.at(root)
    try:
        names = [name for name in folder.folders() if _is_cache(folder / name)]
    except OSError as error:
        raise InputError(
            f"{folder.name}: cannot be listed ({redact(str(error))}); see that its place answers"
        ) from error
    return [join(root, name) for name in names]


def find_cache(results: str | Path | None, name: str) -> str:
    """The place of the one cache whose name begins with `name`; a path or address of a cache is taken as it is.

    Raises:
        InputError: none does, or several do.
    """
    if "/" in name:
        if not _is_cache(Folder.at(name)):
            raise InputError(f"{redact(name)}: is no feature cache; give its folder, or its fingerprint and --results")
        return name
    places = list_caches(results)
    found = [place for place in places if name and Folder.at(place).last.startswith(name)]
    if len(found) != 1:
        known = ", ".join(Folder.at(place).last for place in found or places) or "none"
        raise InputError(
            f"feature cache {name}: {'several begin so' if found else f'not in {redact(_plain(results))}'}; "
            f"caches: {known}"
        )
    return found[0]


def cache_row(place: str) -> dict[str, Any]:
    """A cache as a line of a list; one that cannot be opened says why."""
    try:
        return _row(place, open_sealed(Folder.at(place), place))
    except LowrankTuneError as error:
        return _row(place, None) | {"encoder": str(error)}


def describe_cache(place: str) -> dict[str, Any]:
    """What a cache holds and what made it.

    Raises:
        CacheError: it is unsealed or damaged.
    """
    cache = Folder.at(place)
    features = open_sealed(cache, place)
    return {
        **_row(place, features),
        "quarantined": features.quarantined,
        "shards": len({row.shard for row in features.rows}),
        "records": redact(features.records_path),
        "identity": read_manifest(cache)["identity"],
    }


def nearest_cache(root: Path, identity: Identity) -> tuple[str, list[str]]:
    """The sealed cache below `root` that differs from an identity in the fewest fields.

    Args:
        root: `results/features`.
        identity: another cache's, which is not there itself.

    Returns:
        Its name, and each field in which it differs; empty both when there is no cache of that kind.
    """
    folder = Folder.at(root)
    found = []
    for name in folder.folders():
        try:
            other = read_manifest(folder / name)["identity"]
        except CacheError:
            continue
        if other.get("kind") == identity.get("kind"):
            found.append((name, differences(identity, other)))
    return min(found, key=lambda entry: len(entry[1]), default=("", []))


def remove_cache(place: str) -> int:
    """Remove one cache, and nothing else.

    It loses its name in one step before its files go: a removal that is killed leaves no half of a cache behind it.

    Returns:
        The bytes that are free now.

    Raises:
        InputError: it lies on an object store, an extraction is writing into it, or its place lets nothing be removed.
    """
    if is_uri(place) and not place.startswith("file:"):
        raise InputError(f"{redact(place)}: only local caches are removed from here; use the object store's own tools")
    folder = Folder.at(place)
    directory = Path(folder.path)
    if not _is_cache(folder):
        raise InputError(f"{directory}: is no feature cache, and is left alone")
    if directory.is_symlink():
        raise InputError(f"{directory}: is a link, and is left alone; remove the cache where it lies")
    try:
        with only_writer(directory, timeout=0):
            freed = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
            doomed = directory.with_name(f".removed-{uuid.uuid4().hex}-{directory.name}")
            os.rename(directory, doomed)
    except Timeout:
        raise InputError(f"{directory}: an extraction is writing into it; stop that, or wait for its end") from None
    except OSError as error:
        raise InputError(f"{directory}: cannot be removed ({error.strerror or error})") from error
    for remains in directory.parent.glob(".removed-*"):  # this one, and those of removals that were killed
        shutil.rmtree(remains, ignore_errors=True)
    if doomed.exists():
        raise InputError(f"{directory}: is no cache any more, but not all its files could be removed; remove {doomed}")
    return freed


@contextmanager
def only_writer(directory: Path, timeout: float = -1) -> Iterator[None]:
    """Keep every other process from writing into a cache, or removing it.

    Args:
        directory: the cache; its parent must be there.
        timeout: seconds to wait for the process that has it; without end when negative.

    Raises:
        Timeout: another process has it still.
    """
    with FileLock(directory.with_name(f".{directory.name}.lock")).acquire(timeout=timeout):
        yield


def _plain(results: str | Path | None) -> str:
    name = results_place(results)
    return name if is_uri(name) else os.path.abspath(Path(name).expanduser())


def _is_cache(folder: Folder) -> bool:
    # An object store has no empty folders, and a cache whose images are all broken has no shards.
    return not folder.last.startswith(".") and bool(
        {SHARDS, COMMITS} & set(folder.folders()) or MANIFEST in folder.files()
    )


def _row(place: str, features: FeatureSet | None) -> dict[str, Any]:
    cache = Folder.at(place)
    row: dict[str, Any] = {"fingerprint": cache.last, "images": "-", "shape": "-", "dtype": "-"}
    row["bytes"] = (cache / SHARDS).bytes()
    if features is None:
        return row | {"weights": "-", "encoder": "-"}
    row |= {"images": len(features.rows), "shape": [features.tokens, features.dim], "dtype": features.dtype}
    return row | {"weights": features.weights, "encoder": features.encoder}
