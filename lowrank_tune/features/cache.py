"""The feature cache on disk: `features/<fingerprint>/`.

    shards/<name>.safetensors   tensor `features` [n, T, D], n <= 64
    commits/<name>.json         written after its shard: the shard's size, checksums, quarantined keys
    quarantine.json             every quarantined key with its reason; written at sealing
    manifest.json               seals all of the above by digest; written last
    sources/<digest>.parquet    a user's records and the key of each one's image

A shard counts when its commit is there; a cache counts when its manifest is there. Everything is written whole
(`durable.py`), and names and contents depend only on the images and the fingerprint, so that a cache completed after
any kill is byte for byte the one of an uninterrupted run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_tune.errors import CacheError
from lowrank_tune.features.durable import remove_temporaries, write_durably
from lowrank_tune.features.identity import Identity, differences, fingerprint
from lowrank_tune.features.shards import (
    COMMITS,
    SHARDS,
    Commit,
    checksum,
    commit_path,
    read_commit,
    shard_problems,
)
from lowrank_tune.records import FeatureRow, FeatureSet

FORMAT = 1
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.json"
SOURCES = "sources"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contents:
    """What a cache holds.

    Attributes:
        rows: key -> its row.
        quarantined: key -> reason.
    """

    rows: dict[str, FeatureRow]
    quarantined: dict[str, str]

    @classmethod
    def of(cls, commits: Iterable[Commit]) -> Contents:
        """Collect the rows of these shards."""
        rows: dict[str, FeatureRow] = {}
        quarantined: dict[str, str] = {}
        for commit in commits:
            for number, (key, _) in enumerate(commit.rows):
                rows.setdefault(key, FeatureRow(key, commit.shard, number))
            quarantined |= dict(commit.quarantined)
        return cls(rows, quarantined)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are neither stored nor quarantined, each once, in their order."""
        return [key for key in dict.fromkeys(keys) if key not in self.rows and key not in self.quarantined]


def open_cache(directory: Path) -> FeatureSet:
    """Open a sealed cache with all its images.

    Sizes, shapes and digests are compared; `verify_cache` also reads every value.

    Returns:
        Its features, shard by shard; `records_path` is the source that was recorded last, or empty.

    Raises:
        CacheError: the cache is missing, unsealed, damaged or not what its name says; the message says what differs.
    """
    manifest = _read_manifest(directory)
    commits = _sealed_commits(directory, manifest)
    contents = Contents.of(commits)
    tables = sorted((directory / SOURCES).glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    identity = manifest["identity"]
    return FeatureSet(
        directory=str(directory),
        fingerprint=manifest["fingerprint"],
        encoder=manifest["encoder"],
        weights=manifest["weights"],
        dtype=identity["store_dtype"],
        tokens=identity["tokens"],
        dim=identity["dim"],
        rows=tuple(contents.rows.values()),
        records_path=str(tables[-1]) if tables else "",
        quarantined=len(contents.quarantined),
    )


def read_sealed(directory: Path, identity: Identity) -> Contents | None:
    """What a sealed cache holds; None where there is none yet.

    Raises:
        CacheError: there is one, and it is damaged or made differently.
    """
    if not (directory / MANIFEST).exists():
        return None
    manifest = _read_manifest(directory)
    if differ := differences(identity, manifest["identity"]):
        raise CacheError(f"{directory}: was made differently ({'; '.join(differ)}); remove the directory and run again")
    return Contents.of(_sealed_commits(directory, manifest))


def recover(directory: Path, identity: Identity) -> Contents:
    """Take stock of an unfinished cache: keep what was committed and is sound, delete the rest.

    Call it only while holding the cache's lock. Every value outside the sealed shards is read and compared.

    Raises:
        CacheError: the part that is sealed already is damaged.
        OSError: the directory cannot be written.
    """
    for folder in (directory, directory / SHARDS, directory / COMMITS, directory / SOURCES):
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder)
    sealed = {}
    if (directory / MANIFEST).exists():
        sealed = {commit.shard: commit for commit in _sealed_commits(directory, _read_manifest(directory))}
    sealed_names = {commit_path(directory, shard).name for shard in sealed}
    sound = dict(sealed)
    for path in sorted((directory / COMMITS).glob("*.json")):
        if path.name in sealed_names:
            continue
        if commit := _sound_commit(directory, path, identity):
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
    commits = [read_commit(path) for path in paths]
    for commit in commits:
        if problems := shard_problems(directory, commit, identity, full=False):
            raise CacheError(f"{problems[0]}; run again, and it is extracted anew")
    contents = Contents.of(commits)
    quarantine = _canonical([{"key": key, "error": error} for key, error in sorted(contents.quarantined.items())])
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
    manifest["digest"] = checksum(_canonical(manifest))
    write_durably(directory / MANIFEST, _canonical(manifest))
    return contents


def verify_cache(directory: Path, full: bool = True) -> list[str]:
    """Check a cache against its seal.

    Args:
        directory: the cache.
        full: read every value and compare its checksum; otherwise sizes, shapes and records only.

    Returns:
        One text a problem, each naming a file; none when the cache is sound.
    """
    try:
        manifest = _read_manifest(directory)
    except CacheError as error:
        return [str(error)]
    problems = []
    for name, digest in manifest["commits"].items():
        commit = _matching_commit(directory / COMMITS / name, digest)
        if isinstance(commit, str):
            problems.append(commit)
        else:
            problems += shard_problems(directory, commit, manifest["identity"], full=full)
    if not _matches(directory / QUARANTINE, manifest["quarantine"]):
        problems.append(f"{directory / QUARANTINE}: is not the one that was sealed")
    for path in sorted((directory / SOURCES).glob("*.parquet")):
        if not _matches(path, path.stem):
            problems.append(f"{path}: is not what was recorded; remove it, and the next run writes it again")
    return problems


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
        manifest: dict[str, Any] = json.loads(data)
        digest = manifest.pop("digest")
        if checksum(_canonical(manifest)) != digest or _canonical({**manifest, "digest": digest}) != data:
            raise ValueError("its own digest differs")
    except FileNotFoundError as error:
        state = "is not sealed, its extraction has not finished" if directory.is_dir() else "is no feature cache"
        raise CacheError(f"{directory}: {state}; run the extraction to its end") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CacheError(f"{path}: is damaged ({error}); {_remedy(directory)}") from error
    if manifest["format"] != FORMAT:
        raise CacheError(
            f"{path}: has format {manifest['format']}, this program reads {FORMAT}; remove {directory} and run again"
        )
    if fingerprint(manifest["identity"]) != directory.name:
        raise CacheError(
            f"{directory}: holds the cache {fingerprint(manifest['identity'])}; "
            "give the directory that name again, or remove it"
        )
    return manifest


def _sealed_commits(directory: Path, manifest: dict[str, Any]) -> list[Commit]:
    commits = []
    for name, digest in manifest["commits"].items():
        commit = _matching_commit(directory / COMMITS / name, digest)
        if isinstance(commit, str):
            raise CacheError(f"{commit}; {_remedy(directory)}")
        if problems := shard_problems(directory, commit, manifest["identity"], full=False):
            raise CacheError(f"{problems[0]}; {_remedy(directory)}")
        commits.append(commit)
    return commits


def _matching_commit(path: Path, digest: str) -> Commit | str:
    """The commit at `path` when it is the one that was sealed; what is wrong with it otherwise."""
    if not _matches(path, digest):
        return f"{path}: {'is not the one that was sealed' if path.exists() else 'is missing'}"
    return read_commit(path)


def _sound_commit(directory: Path, path: Path, identity: Identity) -> Commit | None:
    try:
        commit = read_commit(path)
        problems = shard_problems(directory, commit, identity, full=True)
    except (OSError, ValueError) as error:
        problems = [f"{path}: {error}"]
    for problem in problems:
        _logger.warning("%s; it is extracted anew", problem)
    return None if problems else commit


def _matches(path: Path, digest: str) -> bool:
    try:
        return checksum(path.read_bytes()) == digest
    except OSError:
        return False


def _remedy(directory: Path) -> str:
    return f"remove {directory / MANIFEST} and run again: sound shards are kept, damaged ones are extracted anew"


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
