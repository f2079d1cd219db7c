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

from filelock import FileLock

from lowrank_tune.caches.places import Folder
from lowrank_tune.caches.sealed import (
    MANIFEST,
    QUARANTINE,
    SOURCES,
    canonical,
    open_cache,
    open_sealed,
    read_manifest,
    record_tables,
    verify_cache,
)
from lowrank_tune.caches.shards import COMMITS, SHARDS, checksum, read_commit, shard_problems
from lowrank_tune.errors import CacheError, InputError, redact
from lowrank_tune.records import FeatureSet

_PIECE = 8 * 2**20
_STREAMS = 8
"""Shards on their way at once: one stream alone does not fill a network."""
_SPARE_BYTES = 64 * 2**20
_logger = logging.getLogger(__name__)


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
            _logger.info("copying %s to %s", cache.name, target)
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
        _logger.warning("%s; it is copied again", error)
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
