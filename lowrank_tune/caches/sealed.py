"""A sealed feature cache, `features/<fingerprint>/`: opened, checked, and refused where it is not what it was.

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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_tune.caches.identity import Identity, differences, fingerprint
from lowrank_tune.caches.places import Folder, join
from lowrank_tune.caches.shards import COMMITS, Commit, checksum, read_commit, shard_problems
from lowrank_tune.errors import CacheError, redact
from lowrank_tune.records import FeatureRow, FeatureSet

FORMAT = 1
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.json"
SOURCES = "sources"
FACTORS = "factors"
"""The kind of a cache that holds A [T, R] and B [R, D] of each image, X ≈ A·B, in place of X."""


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


def open_cache(place: str | Path) -> FeatureSet:
    """Open a sealed cache with all its images.

    Sizes, shapes and digests are compared; `verify_cache` also reads every value.

    Args:
        place: its folder's path or address.

    Returns:
        Its features, shard by shard; `records_path` is the source that was recorded last, or empty.

    Raises:
        CacheError: the cache is missing, unsealed, damaged or not what its name says; the message says what differs.
    """
    return open_sealed(Folder.at(place), str(place))


def open_sealed(cache: Folder, directory: str) -> FeatureSet:
    """As `open_cache`, with the place as readers shall be told it."""
    manifest = read_manifest(cache)
    contents = Contents.of(sealed_commits(cache, manifest))
    tables = record_tables(cache)
    identity = manifest["identity"]
    return FeatureSet(
        directory=directory,
        fingerprint=manifest["fingerprint"],
        encoder=manifest["encoder"],
        weights=manifest["weights"],
        dtype=identity["store_dtype"],
        tokens=identity["tokens"],
        dim=identity["dim"],
        rows=tuple(contents.rows.values()),
        records_path=join(join(directory, SOURCES), tables[-1]) if tables else "",
        quarantined=len(contents.quarantined),
        rank=identity["rank"] if identity["kind"] == FACTORS else 0,
    )


def read_sealed(directory: Path, identity: Identity) -> Contents | None:
    """What a sealed cache holds; None where there is none yet.

    Raises:
        CacheError: there is one, and it is damaged or made differently.
    """
    if not (directory / MANIFEST).exists():
        return None
    cache = Folder.at(directory)
    manifest = read_manifest(cache)
    if differ := differences(identity, manifest["identity"]):
        raise CacheError(f"{directory}: was made differently ({'; '.join(differ)}); remove the directory and run again")
    return Contents.of(sealed_commits(cache, manifest))


def read_committed(directory: Path, identity: Identity) -> Contents:
    """What an extraction would find done already: every committed shard whose size and shape are right.

    The values are not read, and the cache need not be sealed; another process may be writing into it.
    """
    cache = Folder.at(directory)
    commits = []
    for path in sorted((directory / COMMITS).glob("[!.]*.json")):
        try:
            commit = read_commit(path.read_bytes())
        except (OSError, ValueError):
            continue
        if not shard_problems(cache, commit, identity, full=False):
            commits.append(commit)
    return Contents.of(commits)


def verify_cache(place: str | Path, full: bool = True) -> list[str]:
    """Check a cache against its seal.

    Args:
        place: its folder's path or address.
        full: read every value and compare its checksum; otherwise sizes, shapes and records only.

    Returns:
        One text a problem, each naming a file; none when the cache is sound.
    """
    cache = Folder.at(place)
    try:
        manifest = read_manifest(cache)
    except CacheError as error:
        return [str(error)]
    problems = []
    for name, digest in manifest["commits"].items():
        commit = _matching_commit(cache, name, digest)
        if isinstance(commit, str):
            problems.append(commit)
        else:
            problems += shard_problems(cache, commit, manifest["identity"], full=full)
    if not _matches(cache, QUARANTINE, manifest["quarantine"]):
        problems.append(f"{cache.name}/{QUARANTINE}: is not the one that was sealed")
    sources = cache / SOURCES
    for name in record_tables(cache):
        if not _matches(sources, name, name.removesuffix(".parquet")):
            problems.append(
                f"{sources.name}/{name}: is not what was recorded; remove it, and the next run writes it again"
            )
    return problems


def read_manifest(cache: Folder) -> dict[str, Any]:
    """The manifest of a sealed cache, without its own digest.

    Raises:
        CacheError: it is missing, damaged, of another format, or another cache's.
    """
    path = f"{cache.name}/{MANIFEST}"
    try:
        data = cache.read(MANIFEST)
        manifest: dict[str, Any] = json.loads(data)
        digest = manifest.pop("digest")
        if checksum(canonical(manifest)) != digest or canonical({**manifest, "digest": digest}) != data:
            raise ValueError("its own digest differs")
    except FileNotFoundError as error:
        state = "is not sealed, its extraction has not finished" if cache.exists() else "is no feature cache"
        raise CacheError(f"{cache.name}: {state}; run the extraction to its end") from error
    except OSError as error:
        raise CacheError(f"{path}: cannot be read ({redact(str(error))}); see that its place answers") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CacheError(f"{path}: is damaged ({error}); {_remedy(cache)}") from error
    if manifest["format"] != FORMAT:
        raise CacheError(
            f"{path}: has format {manifest['format']}, this program reads {FORMAT}; remove {cache.name} and run again"
        )
    # Only a cache that is found by its content has its name from it; where factors go, their user says.
    if manifest["identity"].get("kind") != FACTORS and fingerprint(manifest["identity"]) != cache.last:
        raise CacheError(
            f"{cache.name}: holds the cache {fingerprint(manifest['identity'])}; "
            "give the directory that name again, or remove it"
        )
    return manifest


def sealed_commits(cache: Folder, manifest: dict[str, Any]) -> list[Commit]:
    """The commit records that a manifest seals, each with its shard in place.

    Raises:
        CacheError: one is missing or not the one that was sealed, or a shard is not what was committed.
    """
    commits = []
    for name, digest in manifest["commits"].items():
        commit = _matching_commit(cache, name, digest)
        if isinstance(commit, str):
            raise CacheError(f"{commit}; {_remedy(cache)}")
        if problems := shard_problems(cache, commit, manifest["identity"], full=False):
            raise CacheError(f"{problems[0]}; {_remedy(cache)}")
        commits.append(commit)
    return commits


def record_tables(cache: Folder) -> list[str]:
    """Names of the tables under `sources/`, the latest last; one that is still being written is none of them."""
    return [name for name in (cache / SOURCES).files() if name.endswith(".parquet") and not name.startswith(".")]


def canonical(content: object) -> bytes:
    """JSON in the one form whose digest is taken."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _matching_commit(cache: Folder, name: str, digest: str) -> Commit | str:
    """The commit record of that name when it is the one that was sealed; what is wrong with it otherwise."""
    commits = cache / COMMITS
    try:
        data = commits.read(name)
    except FileNotFoundError:
        return f"{commits.name}/{name}: is missing"
    except OSError as error:
        return f"{commits.name}/{name}: cannot be read ({redact(str(error))})"
    return read_commit(data) if checksum(data) == digest else f"{commits.name}/{name}: is not the one that was sealed"


def _matches(folder: Folder, name: str, digest: str) -> bool:
    try:
        return checksum(folder.read(name)) == digest
    except OSError:
        return False


def _remedy(cache: Folder) -> str:
    return f"remove {cache.name}/{MANIFEST} and run again: sound shards are kept, damaged ones are extracted anew"
