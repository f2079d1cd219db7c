"""Writing a feature cache: `features/<fingerprint>/`, laid out as `caches/sealed.py` tells.

Everything is written whole (`durable.py`), and names and contents depend only on the images and the fingerprint, so
that a cache completed after any kill is byte for byte the one of an uninterrupted run.
"""

from __future__ import annotations

import logging
from pathlib import Path

from lowrank_tune.caches.identity import Identity, fingerprint
from lowrank_tune.caches.places import Folder
from lowrank_tune.caches.sealed import (
    FORMAT,
    MANIFEST,
    QUARANTINE,
    SOURCES,
    Contents,
    canonical,
    read_manifest,
    sealed_commits,
)
from lowrank_tune.caches.shards import COMMITS, SHARDS, Commit, checksum, commit_path, read_commit, shard_problems
from lowrank_tune.errors import CacheError
from lowrank_tune.features.durable import remove_temporaries, write_durably

_logger = logging.getLogger(__name__)


def recover(directory: Path, identity: Identity) -> Contents:
    """Take stock of an unfinished cache: keep what was committed and is sound, delete the rest.

    Call it only while holding the cache's lock. Every value outside the sealed shards is read and compared.

    Raises:
        CacheError: the part that is sealed already is damaged.
        OSError: the directory cannot be written.
    """
    (directory / SOURCES).mkdir(parents=True, exist_ok=True)  # written without the lock: its temporaries may be in use
    for folder in (directory, directory / SHARDS, directory / COMMITS):
        folder.mkdir(exist_ok=True)
        remove_temporaries(folder)
    cache = Folder.at(directory)
    sealed = {}
    if (directory / MANIFEST).exists():
        sealed = {commit.shard: commit for commit in sealed_commits(cache, read_manifest(cache))}
    sealed_names = {commit_path(directory, shard).name for shard in sealed}
    sound = dict(sealed)
    for path in sorted((directory / COMMITS).glob("*.json")):
        if path.name in sealed_names:
            continue
        if commit := _sound_commit(cache, path, identity):
            sound[commit.shard] = commit
        else:
            path.unlink()
    for path in (directory / SHARDS).iterdir():
        if path.name not in sound:
            path.unlink()
    return Contents.of(sound[shard] for shard in sorted(sound))


def seal(directory: Path, identity: Identity, encoder: str, weights: str) -> Contents:
    """Write the quarantine and then the manifest over every committed shard; an earlier seal is replaced.

    Args:
        directory: the cache.
        identity: what the features depend on.
        encoder: its name, for people.
        weights: `random`, `pretrained` or `unknown`.

    Raises:
        CacheError: a committed shard is not what was committed.
        OSError: the directory cannot be written.
    """
    paths = sorted((directory / COMMITS).glob("*.json"))
    commits = [read_commit(path.read_bytes()) for path in paths]
    for commit in commits:
        if problems := shard_problems(Folder.at(directory), commit, identity, full=False):
            raise CacheError(f"{problems[0]}; run again, and it is extracted anew")
    contents = Contents.of(commits)
    quarantine = canonical([{"key": key, "error": error} for key, error in sorted(contents.quarantined.items())])
    write_durably(directory / QUARANTINE, quarantine)
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "encoder": encoder,
        "weights": weights,
        "rows": len(contents.rows),
        "quarantine": checksum(quarantine),
        "commits": {path.name: checksum(path.read_bytes()) for path in paths},
    }
    manifest["digest"] = checksum(canonical(manifest))
    write_durably(directory / MANIFEST, canonical(manifest))
    return contents


def _sound_commit(cache: Folder, path: Path, identity: Identity) -> Commit | None:
    try:
        commit = read_commit(path.read_bytes())
        problems = shard_problems(cache, commit, identity, full=True)
    except (OSError, ValueError) as error:
        problems = [f"{path}: {error}"]
    for problem in problems:
        _logger.warning("%s; it is extracted anew", problem)
    return None if problems else commit
