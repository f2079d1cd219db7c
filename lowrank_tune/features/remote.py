"""A local copy of a cache that lies on an object store or a network mount: made once a node, checked, then mapped.

    <LOWRANK_TUNE_STAGING, else the temporary directory/lowrank-tune-staging-UID>/
      <digest of the manifest>/<fingerprint>/     a whole cache; there only when all of it was copied and checked

The manifest seals every byte, so its digest names the content: a cache that has grown since is another copy.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lowrank_tune.errors import CacheError, InputError, LowrankTuneError, redact
from lowrank_tune.features.cache import (
    COMMITS,
    MANIFEST,
    QUARANTINE,
    SHARDS,
    SOURCES,
    Folder,
    Identity,
    canonical,
    checksum,
    differences,
    is_uri,
    join,
    open_cache,
    open_sealed,
    read_commit,
    read_manifest,
    record_tables,
    shard_problems,
    verify_cache,
)
from lowrank_tune.files import results_place
from lowrank_tune.records import FeatureSet

_PIECE = 8 * 2**20
_STREAMS = 8
"""Shards on their way at once: one stream alone does not fill a network."""
_SPARE_BYTES = 64 * 2**20
logger = logging.getLogger(__name__)


def local_copy(features: FeatureSet) -> FeatureSet:
    """The same features where they can be mapped quickly: as they are on a local disk, else in this node's copy.

    Args:
        features: of a sealed cache, wherever it lies; what this function returned, on any node, may be given again.

    Returns:
        The features; `origin` then says where they were copied from.

    Raises:
        CacheError: what is there is damaged, or what was copied is not what was sealed.
        InputError: the place does not answer, or the staging directory has no room.
    """
    origin = features.origin or features.directory
    if not Folder.at(origin).is_remote:
        return features
    return replace(features, directory=str(stage_cache(origin)), origin=origin)


def stage_cache(place: str | Path) -> Path:
    """Copy a sealed cache to this node, when that has not been done yet.

    Every shard is compared with its checksums as it lies on the local disk, and the copy gets its name when all of it
    is sound: half of one is never taken for the whole. Of several processes one copies and the others wait.

    Args:
        place: the cache's path or address.

    Returns:
        The copy's folder.

    Raises:
        CacheError: what is there is damaged, or what was copied is not what was sealed.
        InputError: the place does not answer, or the staging directory has no room.
    """
    cache = Folder.at(place)
    manifest = read_manifest(cache)
    digest = checksum(canonical(manifest))
    root = staging_root()
    target = root / digest / cache.last
    with _writable(root), FileLock(root / f"{digest}.lock"):
        if target.exists() and not _is_sound(target, digest):
            shutil.rmtree(target)
        if not target.exists():
            logger.info("copying %s to %s", cache.name, target)
            _copy(cache, manifest, target)
    return target


def staging_root() -> Path:
    """Where this node's copies lie: LOWRANK_TUNE_STAGING, else a folder of this user's in the temporary directory."""
    given = os.environ.get("LOWRANK_TUNE_STAGING")
    if given:
        return Path(given).expanduser().absolute()
    return Path(tempfile.gettempdir()) / f"lowrank-tune-staging-{os.getuid()}"


def open_local(place: str | Path) -> FeatureSet:
    """Open a cache wherever it lies, by way of this node's copy where it is not on a local disk.

    Raises:
        CacheError: it is unsealed or damaged.
        InputError: the place does not answer, or the staging directory has no room.
    """
    folder = Folder.at(place)
    if not folder.is_remote:
        return open_cache(folder.path)
    return replace(open_cache(stage_cache(place)), origin=str(place))


def _is_sound(target: Path, digest: str) -> bool:
    folder = Folder.at(target)
    try:
        if checksum(canonical(read_manifest(folder))) != digest:
            raise CacheError(f"{target}: is a copy of another cache")
        open_sealed(folder, str(target))
    except CacheError as error:
        logger.warning("%s; it is copied again", error)
        return False
    return True


def _copy(cache: Folder, manifest: dict[str, Any], target: Path) -> None:
    """Copy into a folder of another name, and rename it when every file is the one that was sealed."""
    for abandoned in target.parent.glob(".tmp-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    partial = target.parent / f".tmp-{uuid.uuid4().hex}" / target.name
    try:
        for folder in (SHARDS, COMMITS, SOURCES):
            (partial / folder).mkdir(parents=True)
        _check_room(_size(cache / SHARDS), partial)
        with ThreadPoolExecutor(_STREAMS) as threads:
            try:
                jobs = [threads.submit(_copy_shard, cache, name, manifest, partial) for name in manifest["commits"]]
                for job in jobs:
                    job.result()
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        for name in record_tables(cache):
            _copy_file(cache / SOURCES, name, partial / SOURCES)
        for name in (QUARANTINE, MANIFEST):
            _copy_file(cache, name, partial)
        if problems := verify_cache(partial, full=False):
            raise CacheError(f"{cache.name}: arrived damaged ({problems[0]}); verify it where it lies")
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)


def _copy_shard(cache: Folder, name: str, manifest: dict[str, Any], partial: Path) -> None:
    """Copy a commit record and its shard, and compare them at once, while they are still in the page cache."""
    _copy_file(cache / COMMITS, name, partial / COMMITS)
    data = (partial / COMMITS / name).read_bytes()
    if checksum(data) != manifest["commits"][name]:
        raise CacheError(f"{cache.name}/{COMMITS}/{name}: is not the one that was sealed; verify the cache")
    commit = read_commit(data)
    if commit.rows:
        _copy_file(cache / SHARDS, commit.shard, partial / SHARDS)
    if problems := shard_problems(Folder.at(partial), commit, manifest["identity"], full=True):
        raise CacheError(f"{cache.name}: arrived damaged ({problems[0]}); verify it where it lies")


def _copy_file(folder: Folder, name: str, into: Path) -> None:
    with (into / name).open("wb") as file:
        for piece in _pieces(folder, name):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _pieces(folder: Folder, name: str) -> Iterator[bytes]:
    """Read a file; what fails here is the source's fault and not the copy's."""
    try:
        with folder.open(name) as source:
            while piece := source.read(_PIECE):
                yield piece
    except FileNotFoundError as error:
        raise CacheError(f"{folder.name}/{name}: is missing; verify the cache") from error
    except OSError as error:
        raise CacheError(
            f"{folder.name}/{name}: cannot be read ({redact(str(error))}); see that its place answers, and verify it"
        ) from error


def _size(shards: Folder) -> int:
    try:
        return shards.bytes()
    except OSError as error:
        raise CacheError(f"{shards.name}: cannot be listed ({redact(str(error))})") from error


def _check_room(needed: int, place: Path) -> None:
    free = shutil.disk_usage(place).free
    if needed + _SPARE_BYTES > free:
        raise OSError(f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Anyone may make a folder of that name in /tmp, and what lies in it would be trusted.
        if not os.environ.get("LOWRANK_TUNE_STAGING") and root.stat().st_uid != os.getuid():
            raise OSError("it belongs to another user")
        yield
    except OSError as error:
        raise InputError(
            f"staging directory {root}: cannot hold a copy of the cache ({redact(str(error))}); "
            "free it, or set LOWRANK_TUNE_STAGING to a local directory with room"
        ) from error


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
