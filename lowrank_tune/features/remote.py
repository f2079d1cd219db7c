"""The caches of a results directory, wherever it lies, and this node's local copies of them.

    <LOWRANK_TUNE_STAGING, else the temporary directory/lowrank-tune-staging-UID>/
      <digest of the manifest>/<fingerprint>/     a whole cache; there only when all of it was copied and checked

The manifest seals every byte, so its digest names the content: a cache that has grown since is another copy.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pyarrow.fs import FileType, LocalFileSystem, copy_files

from lowrank_tune.errors import CacheError, InputError, LowrankTuneError, redact
from lowrank_tune.features.cache import (
    CODEBOOK,
    MANIFEST,
    SOURCES,
    canonical,
    differences,
    open_cache,
    read_manifest,
    verify_cache,
)
from lowrank_tune.features.commits import (
    COMMITS,
    ITEM_BYTES,
    SHARDS,
    STORED,
    Identity,
    checksum,
    stream_lengths,
)
from lowrank_tune.features.places import Place, join
from lowrank_tune.files import bytes_below, is_uri, results_place, sync
from lowrank_tune.records import CODED, FeatureSet

FEATURES = "features"
_SPARE_BYTES = 64 * 2**20
_CHUNK_BYTES = 8 * 2**20
_STREAMS = 8

logger = logging.getLogger(__name__)


def local_copy(features: FeatureSet) -> FeatureSet:
    """The same features where they can be mapped: as they lie in a local folder, else in this node's copy.

    A local folder is copied, too, where LOWRANK_TUNE_STAGING is set: its place may be on the other end of a network.

    Args:
        features: of a sealed cache, wherever it lies; what this function returned, on any node, may be given again.

    Returns:
        The features; where they were copied, `origin` says from where.

    Raises:
        CacheError: what is there is damaged, or what was copied is not what was sealed.
        InputError: the place does not answer, or the staging directory has no room.
    """
    directory, origin = _mapped(features.origin or features.directory)  # another node may have named a copy of its own
    return replace(features, directory=directory, origin=origin)


def open_local(place: str | Path) -> FeatureSet:
    """Open a cache wherever it lies, by way of this node's copy where `local_copy` would make one; raises the same."""
    directory, origin = _mapped(str(place))
    return replace(open_cache(directory), origin=origin)


def _mapped(place: str) -> tuple[str, str]:
    """The folder to map a cache from and, where that is a copy, the place of which."""
    cache = Place(place)
    if cache.is_local and not os.environ.get("LOWRANK_TUNE_STAGING"):
        return cache.path, ""
    return str(stage_cache(place)), place


def stage_cache(place: str | Path) -> Path:
    """Copy a sealed cache to this node, when that has not been done yet, and return the copy's folder.

    Every shard is compared with its checksums as it lies on the local disk, and the copy gets its name when all of it
    is sound: half of one is never taken for the whole. Of several processes one copies and the others wait. A cache
    that is sealed anew meanwhile is copied as it is then.

    Raises:
        CacheError: what is there is damaged, or what was copied is not what was sealed.
        InputError: the place does not answer, or the staging directory has no room.
    """
    cache = Place(place)
    manifest = read_manifest(cache)
    while True:
        digest = checksum(canonical(manifest))
        try:
            with _staging() as root, FileLock(root / f"{digest}.lock"):
                target = root / digest / cache.last
                if target.exists() and (problems := _copy_problems(target, digest, full=False)):
                    logger.warning("%s; it is copied again", problems[0])
                    shutil.rmtree(target)
                if not target.exists():
                    logger.info("copying %s to %s", cache.name, target)
                    _copy(cache, manifest, target)
                return target
        except CacheError:
            before, manifest = manifest, read_manifest(cache)
            if manifest == before:
                raise


def _copy(cache: Place, manifest: dict[str, Any], target: Path) -> None:
    """Copy into a folder of another name, and rename it when every file is the one that was sealed."""
    for abandoned in target.parent.glob(".tmp-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    partial = target.parent / f".tmp-{uuid.uuid4().hex}" / target.name
    for folder in (SHARDS, COMMITS, SOURCES):
        (partial / folder).mkdir(parents=True)
    try:
        try:
            files = _sealed_files(cache, manifest)
            needed, free = sum(files.values()), shutil.disk_usage(partial).free
            if needed + _SPARE_BYTES > free:
                raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")

            def copy(name: str) -> None:
                copy_files(name, str(partial / name), cache, LocalFileSystem(), chunk_size=_CHUNK_BYTES)

            with ThreadPoolExecutor(_STREAMS) as threads:
                list(threads.map(copy, files))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise CacheError(
                f"{cache.name}: cannot be copied ({redact(str(error))}); see that its place answers, and verify it"
            ) from error
        if problems := _copy_problems(partial, checksum(canonical(manifest)), full=True):
            raise CacheError(f"{cache.name}: arrived damaged ({problems[0]}); verify it where it lies")
        for path in partial.rglob("*"):
            sync(path)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)


def _sealed_files(cache: Place, manifest: dict[str, Any]) -> dict[str, int]:
    """Path and bytes of each file of a sealed cache, without what another process is adding to it and may remove."""
    sealed = {Path(name).stem for name in manifest["commits"]}
    return {
        f"{folder}/{name}".removeprefix("/"): size
        for folder in ("", SHARDS, COMMITS, SOURCES)
        for name, size in cache.entries(FileType.File, folder).items()
        if not name.startswith(".") and (folder in ("", SOURCES) or Path(name).stem in sealed)
    }


def _copy_problems(copy: Path, digest: str, *, full: bool) -> list[str]:
    problems = verify_cache(copy, full=full)
    if not problems and checksum(canonical(read_manifest(Place(copy)))) != digest:
        problems = [f"{copy}: is a copy of another cache"]
    return problems


@contextmanager
def _staging() -> Iterator[Path]:
    """Where this node's copies lie; an OSError while one is made there becomes an InputError."""
    given = os.environ.get("LOWRANK_TUNE_STAGING")
    root = Path(given or f"{tempfile.gettempdir()}/lowrank-tune-staging-{os.getuid()}").expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Anyone may make a folder of that name in /tmp, and what lies in it would be trusted.
        if not given and root.stat().st_uid != os.getuid():
            raise OSError("it belongs to another user")
        yield root
    except OSError as error:
        raise InputError(
            f"staging directory {root}: cannot hold a copy of the cache ({redact(str(error))}); "
            "free it, or set LOWRANK_TUNE_STAGING to a local directory with room"
        ) from error


def list_caches(results: str | Path | None) -> list[str]:
    """The places of all feature caches of a results directory, sealed or not, sorted.

    Raises:
        InputError: the place does not answer.
    """
    root = join(results_place(results), FEATURES)
    folder = Place(root)
    try:
        return [join(root, name) for name in sorted(folder.entries(FileType.Directory)) if is_cache(join(root, name))]
    except OSError as error:
        raise InputError(
            f"{folder.name}: cannot be listed ({redact(str(error))}); see that its place answers"
        ) from error


def find_cache(results: str | Path | None, name: str) -> str:
    """The place of the one cache whose name begins with `name`; a path or address of a cache is taken as it is.

    Raises:
        InputError: none does, or several do.
    """
    if "/" in name:
        if not is_cache(name):
            raise InputError(f"{redact(name)}: is no feature cache; give its folder, or its fingerprint and --results")
        return name
    places = {place: Place(place).last for place in list_caches(results)}
    found = {place: last for place, last in places.items() if name and last.startswith(name)}
    if len(found) != 1:
        known = ", ".join((found or places).values()) or "none"
        raise InputError(
            f"feature cache {name}: {'several begin so' if found else f'not in {redact(results_place(results))}'}; "
            f"caches: {known}"
        )
    return next(iter(found))


def cache_row(place: str, features: FeatureSet | None = None) -> dict[str, Any]:
    """A cache as a line of a list, unless `features` has it opened by now; one that cannot be opened says why."""
    cache = Place(place)
    row: dict[str, Any] = {"fingerprint": cache.last, "images": "-", "shape": "-", "dtype": "-"}
    row |= {"bytes": sum(cache.entries(FileType.File, SHARDS).values()), "weights": "-"}
    try:
        features = features or open_cache(place)
    except LowrankTuneError as error:
        return row | {"encoder": str(error)}
    row |= {"images": len(features.rows), "shape": [features.tokens, features.dim], "dtype": features.dtype}
    if features.dtype == CODED:
        row["bytes"] += cache.get_file_info(CODEBOOK).size
    return row | {"weights": features.weights, "encoder": features.encoder}


def coded_facts(features: FeatureSet) -> dict[str, Any]:
    """What the images of a cache of coded images take as files, and each one's stream; nothing of any other cache."""
    if features.dtype != CODED:
        return {}
    cache, count = Place(features.directory), max(1, len(features.rows))
    identity = read_manifest(cache)["identity"]
    shards = Counter(row.shard for row in features.rows)
    lengths = [length for shard, images in shards.items() for length in stream_lengths(cache, shard, images)]
    stored = sum(cache.get_file_info(f"{SHARDS}/{shard}").size for shard in shards)
    shared = cache.get_file_info(CODEBOOK).size
    error, most = identity["target_error"], identity["max_bytes"]
    x_bytes = features.tokens * features.dim * ITEM_BYTES[STORED[identity["x_dtype"]]]
    return {
        "target": f"a relative error of {error:g} at most" if most is None else f"{most} bytes an image at most",
        "bytes_per_image": round(stored / count),
        "longest_stream": max(lengths, default=0),
        "codebook_bytes": shared,
        "codebook_bytes_per_image": round(shared / count),
        "x_dtype": identity["x_dtype"],
        "x_bytes_per_image": x_bytes,
        "share_of_x_with_codebook": round((stored + shared) / count / x_bytes, 4),
    }


def describe_cache(place: str) -> dict[str, Any]:
    """What a cache holds and what made it; a CacheError where it is unsealed or damaged."""
    features = open_cache(place)
    return {
        **cache_row(place, features),
        **coded_facts(features),
        "quarantined": features.quarantined,
        "shards": len({row.shard for row in features.rows}),
        "records": redact(features.records_path),
        "identity": read_manifest(Place(place))["identity"],
    }


def nearest_cache(root: Path, identity: Identity) -> tuple[str, list[str]]:
    """The sealed cache below `root`, `results/features`, that differs from an identity in the fewest fields.

    Returns:
        Its name, and each field in which it differs; empty both when there is no cache of that kind.
    """
    found = []
    for name in sorted(Place(root).entries(FileType.Directory)):
        try:
            other = read_manifest(Place(root / name))["identity"]
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
    directory = Path(Place(place).path)
    if not is_cache(place):
        raise InputError(f"{directory}: is no feature cache, and is left alone")
    if directory.is_symlink():
        raise InputError(f"{directory}: is a link, and is left alone; remove the cache where it lies")
    try:
        with only_writer(directory):
            freed = bytes_below(directory)
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
def only_writer(directory: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Keep every other process from writing into a cache, whose parent must be there, or removing it.

    Where another one has it, `waiting` is called and its end waited for; without `waiting` that is a `Timeout`.
    """
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting is None:
            raise
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_cache(place: str) -> bool:
    """Whether a feature cache was begun at a path or an address."""
    # An object store has no empty folders, and a cache whose images are all broken has no shards.
    cache = Place(place)
    return not cache.last.startswith(".") and bool(
        {SHARDS, COMMITS} & set(cache.entries(FileType.Directory)) or MANIFEST in cache.entries(FileType.File)
    )
