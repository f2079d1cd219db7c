"""A feature cache, `features/<fingerprint>/`: written, sealed, opened and checked.

    shards/<name>.safetensors   tensor `features` [n, T, D], or those of factors or coded images; n <= 64
    commits/<name>.json         written after its shard: the shard's size, checksums, quarantined keys
    quarantine.json             every quarantined key with its reason; written at sealing
    manifest.json               seals all of the above by digest; written last
    sources/<digest>.parquet    a user's records and the key of each one's image
    codebook.safetensors        what all coded images share, written before the first shard

A shard counts when its commit is there; a cache counts when its manifest is there. Everything is written whole, and
names and contents depend only on the images and the fingerprint, so that a cache completed after any kill is byte for
byte the one of an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow.fs import FileType

from lowrank_tune.errors import CacheError, redact
from lowrank_tune.features.commits import COMMITS, SHARDS, Commit, Identity, checksum, shard_problems
from lowrank_tune.features.places import Place, join
from lowrank_tune.files import remove_temporaries, write_durably
from lowrank_tune.records import FeatureRow, FeatureSet

FORMAT = 1
SOURCES = "sources"
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.json"
IDENTITY = "identity.json"
CODEBOOK = "codebook.safetensors"
FACTORS = "factors"
"""The kind of a cache that holds what a decomposer made of each image in place of X: A [T, R] and B [R, D], or a stream
of bytes from which, with the codebook, A·B comes back."""

_STREAMS = 8
"""Shards that are read at once: one stream alone fills no network."""

logger = logging.getLogger(__name__)


def fingerprint(identity: Identity) -> str:
    """16 hex digits of the identity's sha256."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def differences(expected: Identity, found: Identity, prefix: str = "") -> list[str]:
    """One text for each field in which two identities differ: `vision.depth: expected 32, found 24`."""
    texts = []
    for name in sorted(expected.keys() | found.keys()):
        wanted, there = expected.get(name), found.get(name)
        if isinstance(wanted, dict) and isinstance(there, dict):
            texts += differences(wanted, there, f"{prefix}{name}.")
        elif wanted != there:
            texts.append(f"{prefix}{name}: expected {wanted!r}, found {there!r}")
    return texts


def canonical(content: object) -> bytes:
    """JSON in the one form whose digest is taken."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Contents:
    """What a cache holds: key -> its row, and key -> the reason why it has none."""

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
        return cls(rows, {key: reason for key, reason in quarantined.items() if key not in rows})

    def standing(self, holds: Callable[[str], bool]) -> Contents:
        """The same without those that are quarantined for a reason that holds no longer."""
        return Contents(self.rows, {key: reason for key, reason in self.quarantined.items() if holds(reason)})

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are neither stored nor quarantined, each once, in their order."""
        return [key for key in dict.fromkeys(keys) if key not in self.rows and key not in self.quarantined]


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
    sound: list[Commit] = []
    if (directory / MANIFEST).exists():
        sound += _sealed_commits(Place(directory), read_manifest(Place(directory)))
    sealed = {Path(commit.shard).stem for commit in sound}
    for path, found in _committed(directory, identity, full=True, besides=sealed):
        if isinstance(found, Commit):
            sound.append(found)
            continue
        for problem in found:
            logger.warning("%s; it is extracted anew", problem)
        path.unlink()
    shards = {commit.shard for commit in sound}
    for path in (directory / SHARDS).iterdir():
        if path.name not in shards:
            path.unlink()
    return Contents.of(sorted(sound, key=lambda commit: commit.shard))


def _committed(
    directory: Path, identity: Identity, *, full: bool, besides: Collection[str] = ()
) -> Iterator[tuple[Path, Commit | list[str]]]:
    """Each commit record that is there, and what it says or, where it or its shard is unsound, the problems."""
    for path in sorted((directory / COMMITS).glob("[!.]*.json")):
        if path.stem not in besides:
            try:
                commit = Commit.read(path.read_bytes())
                yield path, shard_problems(Place(directory), commit, identity, full=full) or commit
            except (OSError, ValueError) as error:
                yield path, [f"{path}: {error}"]


def seal(directory: Path, identity: Identity, encoder: str, weights: str) -> Contents:
    """Write the quarantine and then the manifest over every committed shard; an earlier seal is replaced.

    `encoder` is its name, for people; `weights` is `random`, `pretrained` or `unknown`.

    Raises:
        CacheError: a committed shard is not what was committed.
        OSError: the directory cannot be written.
    """
    records = {path.name: path.read_bytes() for path in sorted((directory / COMMITS).glob("*.json"))}
    commits = [Commit.read(record) for record in records.values()]
    for commit in commits:
        if problems := shard_problems(Place(directory), commit, identity, full=False):
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
        "commits": {name: checksum(record) for name, record in records.items()},
    }
    manifest["digest"] = checksum(canonical(manifest))
    write_durably(directory / MANIFEST, canonical(manifest))
    return contents


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
    cache = Place(place)
    manifest = read_manifest(cache)
    contents = Contents.of(_sealed_commits(cache, manifest))
    tables, identity = record_tables(cache), manifest["identity"]
    return FeatureSet(
        directory=str(place),
        fingerprint=manifest["fingerprint"],
        encoder=manifest["encoder"],
        weights=manifest["weights"],
        dtype=identity["store_dtype"],
        tokens=identity["tokens"],
        dim=identity["dim"],
        rows=tuple(contents.rows.values()),
        records_path=join(join(str(place), SOURCES), tables[-1]) if tables else "",
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
    cache = Place(directory)
    manifest = read_manifest(cache)
    if differ := differences(identity, manifest["identity"]):
        raise CacheError(f"{directory}: was made differently ({'; '.join(differ)}); remove the directory and run again")
    return Contents.of(_sealed_commits(cache, manifest))


def read_committed(directory: Path, identity: Identity) -> Contents:
    """What an extraction would find done already: every committed shard whose size and shape are right.

    The values are not read, and the cache need not be sealed; another process may be writing into it.
    """
    found = (found for _, found in _committed(directory, identity, full=False))
    return Contents.of(commit for commit in found if isinstance(commit, Commit))


def verify_cache(place: str | Path, full: bool = True) -> list[str]:
    """Check a cache against its seal.

    Args:
        place: its folder's path or address.
        full: read every value and compare its checksum; otherwise sizes, shapes and records only.

    Returns:
        One text a problem, each naming a file; none when the cache is sound.
    """
    cache = Place(place)
    try:
        manifest = read_manifest(cache)
    except CacheError as error:
        return [str(error)]
    problems = [found for found in _checked_commits(cache, manifest, full) if isinstance(found, str)]
    if _digest(cache, QUARANTINE) != manifest["quarantine"]:
        problems.append(f"{cache.name}/{QUARANTINE}: is not the one that was sealed")
    for name in record_tables(cache):
        if _digest(cache, f"{SOURCES}/{name}") != name.removesuffix(".parquet"):
            problems.append(
                f"{cache.name}/{SOURCES}/{name}: is not what was recorded; remove it, and the next run writes it again"
            )
    return problems


def read_manifest(cache: Place) -> dict[str, Any]:
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
        there = cache.get_file_info("").type == FileType.Directory
        state = "is not sealed, its extraction has not finished" if there else "is no feature cache"
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


def record_tables(cache: Place) -> list[str]:
    """Names of the tables under `sources/`, the latest last; one that is still being written is none of them."""
    names = cache.entries(FileType.File, SOURCES)
    return [name for name in names if name.endswith(".parquet") and not name.startswith(".")]


def _sealed_commits(cache: Place, manifest: dict[str, Any]) -> Iterator[Commit]:
    """The commit records that a manifest seals; a CacheError where one or its shard is not what was sealed."""
    for found in _checked_commits(cache, manifest, full=False):
        if isinstance(found, str):
            raise CacheError(f"{found}; {_remedy(cache)}")
        yield found


def _remedy(cache: Place) -> str:
    return f"remove {cache.name}/{MANIFEST} and run again: sound shards are kept, damaged ones are extracted anew"


def _checked_commits(cache: Place, manifest: dict[str, Any], full: bool) -> list[Commit | str]:
    """Each commit record that a manifest seals; in place of one that is unsound, or whose shard is, its problems."""

    def check(name: str) -> list[Commit | str]:
        path = f"{cache.name}/{COMMITS}/{name}"
        try:
            data = cache.read(f"{COMMITS}/{name}")
        except FileNotFoundError:
            return [f"{path}: is missing"]
        except OSError as error:
            return [f"{path}: cannot be read ({redact(str(error))})"]
        if checksum(data) != manifest["commits"][name]:
            return [f"{path}: is not the one that was sealed"]
        commit = Commit.read(data)
        return [*shard_problems(cache, commit, manifest["identity"], full=full)] or [commit]

    with ThreadPoolExecutor(_STREAMS) as threads:
        commits = [found for each in threads.map(check, manifest["commits"]) for found in each]
    return [*_codebook_problems(cache, manifest["identity"]), *commits]


def _codebook_problems(cache: Place, identity: Identity) -> list[str]:
    """What is wrong with the codebook of coded images; it is read whole, for all of them stand or fall with it."""
    if "codebook" not in identity:
        return []
    path = f"{cache.name}/{CODEBOOK}"
    try:
        found = hashlib.sha256(cache.read(CODEBOOK)).hexdigest()
    except FileNotFoundError:
        return [f"{path}: is missing"]
    except OSError as error:
        return [f"{path}: cannot be read ({redact(str(error))})"]
    return [] if found == identity["codebook"] else [f"{path}: is damaged, or another codebook"]


def _digest(cache: Place, path: str) -> str | None:
    try:
        return checksum(cache.read(path))
    except OSError:
        return None
