"""A feature cache, `features/<fingerprint>/`: written, sealed, opened and checked.

    shards/<name>.safetensors   tensor `features` [n, T, D], or those of factors; n <= 64
    commits/<name>.json         written after its shard: the shard's size, checksums, quarantined keys
    quarantine.json             every quarantined key with its reason; written at sealing
    manifest.json               seals all of the above by digest; written last
    sources/<digest>.parquet    a user's records and the key of each one's image

A shard counts when its commit is there; a cache counts when its manifest is there. Everything is written whole, and
names and contents depend only on the images and the fingerprint, so that a cache completed after any kill is byte for
byte the one of an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow.fs import FileType

from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.errors import CacheError, redact
from lowrank_tune.features.checkpoint import CheckpointConfig
from lowrank_tune.features.places import Place, join
from lowrank_tune.files import Readable, parse_header, remove_temporaries, write_durably
from lowrank_tune.records import FeatureRow, FeatureSet

if TYPE_CHECKING:
    from torch import Tensor

Identity = dict[str, Any]
"""What the features of a cache depend on, beside the images' bytes."""
Layout = dict[str, tuple[str, list[int]]]
"""By name, in a shard's order, safetensors' dtype and the shape of each tensor that one image is."""

SHARD_ROWS = 64
"""Images a shard, at most."""
FORMAT = 1
TENSOR = "features"
SHARDS = "shards"
COMMITS = "commits"
SOURCES = "sources"
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.json"
FACTORS = "factors"
"""The kind of a cache that holds A [T, R] and B [R, D] of each image, X ≈ A·B, in place of X."""

STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "int8": "I8", "uint8": "U8"}
"""What safetensors calls each dtype of a cache."""
ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I8": 1, "U8": 1}

_STREAMS = 8
"""Shards that are read at once: one stream alone fills no network."""

logger = logging.getLogger(__name__)


def fingerprint(identity: Identity) -> str:
    """16 hex digits of the identity's sha256."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def differences(expected: Identity, found: Identity) -> list[str]:
    """One text for each field in which two identities differ: `vision.depth: expected 32, found 24`."""
    wanted, there = dict(_fields(expected)), dict(_fields(found))
    return [
        f"{name}: expected {wanted.get(name)!r}, found {there.get(name)!r}"
        for name in sorted(wanted.keys() | there.keys())
        if wanted.get(name) != there.get(name)
    ]


def _fields(identity: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in identity.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def canonical(content: object) -> bytes:
    """JSON in the one form whose digest is taken."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def checksum(*pieces: bytes | memoryview) -> str:
    """16 hex digits of blake2b over the pieces, one after the other."""
    digest = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def shard_name(keys: Sequence[str]) -> str:
    """The file name of the shard that is planned for these keys: the same keys give the same name in every run."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16] + ".safetensors"


def layout(identity: Identity) -> Layout:
    """The tensors of one image in a cache of this identity: wide items first, as safetensors has them."""
    feature = STORED.get(identity["store_dtype"], ""), [identity["tokens"], identity["dim"]]
    tensors = identity.get("tensors", {TENSOR: feature})
    return {
        name: (kind, list(shape))
        for name, (kind, shape) in sorted(tensors.items(), key=lambda entry: (-ITEM_BYTES[entry[1][0]], entry[0]))
    }


def _header(tensors: Layout, count: int) -> dict[str, Any]:
    """What a safetensors header says of so many images: each tensor's `dtype`, `shape` and `data_offsets`."""
    entries: dict[str, Any] = {}
    start = 0
    for name, (kind, shape) in tensors.items():
        end = start + count * _row_bytes(kind, shape)
        entries[name] = {"dtype": kind, "shape": [count, *shape], "data_offsets": [start, end]}
        start = end
    return entries


def _row_bytes(kind: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * ITEM_BYTES[kind]


@dataclass(frozen=True)
class Commit:
    """What is known about a shard, written after it.

    Attributes:
        shard: file name under `shards/`.
        size: the file's bytes; 0, and no file, where no image was usable.
        header: checksum of the file's bytes before the first value.
        rows: key and checksum of each row, in the tensors' order.
        quarantined: key and reason of each image that was to be in this shard and could not be used.
    """

    shard: str
    size: int
    header: str
    rows: tuple[tuple[str, str], ...]
    quarantined: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, data: bytes) -> Commit:
        """Read the content of a commit record; a damaged one is a ValueError."""
        try:
            fields = json.loads(data)
            rows = tuple((str(key), str(check)) for key, check in fields["rows"])
            quarantined = tuple((str(key), str(error)) for key, error in fields["quarantined"])
            return cls(fields["shard"], fields["size"], fields["header"], rows, quarantined)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a commit record ({error!r})") from error


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
        return cls(rows, quarantined)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are neither stored nor quarantined, each once, in their order."""
        return [key for key in dict.fromkeys(keys) if key not in self.rows and key not in self.quarantined]


def commit_shard(
    directory: Path,
    shard: str,
    keys: Sequence[str],
    tensors: Mapping[str, Tensor | Sequence[Tensor]],
    quarantined: Sequence[tuple[str, str]],
) -> Commit:
    """Write a shard and then its commit record; safetensors' own writer would copy the values twice.

    Args:
        directory: the cache; `shards/` and `commits/` are there.
        shard: file name.
        keys: one a row.
        tensors: by name, in the order of the cache's layout, N rows each, in the cache's dtype and on the CPU; N may
            be 0.
        quarantined: key and reason of the images without a row.

    Raises:
        OSError: no space, no permission, no such folder; nothing is committed then.
    """
    import torch

    # numpy has no bfloat16, but it has bytes.
    pieces = [[row.reshape(-1).view(torch.uint8).numpy().data for row in rows] for rows in tensors.values()]
    header = b""
    if keys:
        text = json.dumps(
            _header({name: stored_as(rows[0]) for name, rows in tensors.items()}, len(keys)), separators=(",", ":")
        ).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
        write_durably(directory / SHARDS / shard, header, *itertools.chain.from_iterable(pieces))
    commit = Commit(
        shard=shard,
        size=len(header) + sum(piece.nbytes for rows in pieces for piece in rows),
        header=checksum(header) if keys else "",
        rows=tuple((key, checksum(*row)) for key, row in zip(keys, zip(*pieces, strict=True), strict=True)),
        quarantined=tuple(quarantined),
    )
    record = directory / COMMITS / Path(shard).with_suffix(".json").name
    write_durably(record, json.dumps(asdict(commit), sort_keys=True).encode())
    return commit


def stored_as(row: Tensor) -> tuple[str, list[int]]:
    """Safetensors' dtype and the shape of a tensor, as a cache's layout has them."""
    return STORED[str(row.dtype).removeprefix("torch.")], list(row.shape)


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
    cache, sound = Place(directory), dict[str, Commit]()
    if (directory / MANIFEST).exists():
        sound = {commit.shard: commit for commit in _sealed_commits(cache, read_manifest(cache))}
    sealed = {Path(shard).stem for shard in sound}
    for path in sorted((directory / COMMITS).glob("*.json")):
        if path.stem in sealed:
            continue
        try:
            commit = Commit.read(path.read_bytes())
            problems = shard_problems(cache, commit, identity, full=True)
        except (OSError, ValueError) as error:
            problems = [f"{path}: {error}"]
        for problem in problems:
            logger.warning("%s; it is extracted anew", problem)
        if problems:
            path.unlink()
        else:
            sound[commit.shard] = commit
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
    commits = []
    for path in sorted((directory / COMMITS).glob("[!.]*.json")):
        try:
            commit = Commit.read(path.read_bytes())
        except (OSError, ValueError):
            continue
        if not shard_problems(Place(directory), commit, identity, full=False):
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
        return [found for each in threads.map(check, manifest["commits"]) for found in each]


def shard_problems(cache: Place, commit: Commit, identity: Identity, *, full: bool) -> list[str]:
    """What is wrong with a committed shard: one text each, none when it is sound.

    Args:
        cache: the cache's folder.
        commit: what the shard should be.
        identity: the cache's; gives tokens, dim and dtype.
        full: also read every value and compare checksums.
    """
    if not commit.rows:
        return []
    path = f"{SHARDS}/{commit.shard}"
    name = f"{cache.name}/{path}"
    try:
        info = cache.get_file_info(path)
        if info.type != FileType.File:
            return [f"{name}: is missing"]
        if info.size != commit.size:
            return [f"{name}: has {info.size} bytes, {commit.size} were committed"]
        with cache.open(path) as file:
            start, header = parse_header(file, commit.size)
            tensors = layout(identity)
            if header != (expected := _header(tensors, len(commit.rows))):
                return [f"{name}: holds {_shown(header)}, expected {_shown(expected)}"]
            return _checksum_problems(name, file, commit, start, tensors) if full else []
    except FileNotFoundError:
        return [f"{name}: is missing"]
    except (OSError, ValueError) as error:
        return [f"{name}: cannot be read ({redact(str(error))})"]


def _checksum_problems(name: str, file: Readable, commit: Commit, start: bytes, tensors: Layout) -> list[str]:
    problems = []
    if checksum(start) != commit.header:
        problems.append(f"{name}: the header is not the one that was committed")
    found = [hashlib.blake2b(digest_size=8) for _ in commit.rows]
    for kind, shape in tensors.values():
        for row in found:
            row.update(file.read(_row_bytes(kind, shape)))
    for number, (row, (key, expected)) in enumerate(zip(found, commit.rows, strict=True)):
        if row.hexdigest() != expected:
            problems.append(f"{name}: row {number} ({key[:16]}) is not what was committed")
    return problems


def _shown(header: dict[str, Any]) -> str:
    entries = [
        f"{name} {entry.get('dtype')} {entry.get('shape')}" if isinstance(entry, dict) else name
        for name, entry in sorted(header.items())
    ]
    return ", ".join(entries) or "nothing"


def _digest(cache: Place, path: str) -> str | None:
    try:
        return checksum(cache.read(path))
    except OSError:
        return None


class UnusableError(Exception):
    """This one image or tensor file cannot become features; the message is the reason, for its quarantine row."""


def to_stored(features_TD: Tensor, store_dtype: str) -> Tensor:
    """Convert to the cache's dtype.

    Args:
        features_TD: [T, D], of a floating type.
        store_dtype: `float16`, `bfloat16` or `float32`.

    Returns:
        [T, D] in that dtype.

    Raises:
        UnusableError: a value is NaN or infinite, or too large for the dtype.
    """
    import torch

    if not torch.isfinite(features_TD).all():
        raise UnusableError("the features hold NaN or infinite values")
    stored = features_TD.to(getattr(torch, store_dtype))
    if not torch.isfinite(stored).all():
        largest = features_TD.abs().max().item()
        raise UnusableError(
            f"a value of {largest:.4g} does not fit {store_dtype}; set features.store_dtype to bfloat16 or float32"
        )
    return stored


FORWARD_VERSION = 2
"""Counts up with every change of the forward or decoding code that can change a value.

2: bfloat16, and float32 on a GPU, take steps that round otherwise than transformers' own; 16-bit images are scaled.
"""

IMPORT_VERSION = 1
"""Likewise for ready tensors, which no forward touches."""

_VISION_DEFAULTS = {
    "depth": None,
    "fullatt_block_indexes": None,
    "hidden_act": "silu",
    "hidden_size": None,
    "intermediate_size": None,
    "num_heads": None,
    "out_hidden_size": None,
    "patch_size": None,
    "rope_parameters": None,
    "spatial_merge_size": None,
    "temporal_patch_size": 2,
    "window_size": None,
}
_PREPROCESSOR_KEYS = ("image_mean", "image_std", "rescale_factor")


def image_identity(spec: FeaturesSpec, config: CheckpointConfig, weights_digest: str) -> Identity:
    """What the features of an image depend on, beside its bytes."""
    tokens, dim = config.shape(spec.encoder.image_size)
    return {
        "kind": "images",
        "forward": FORWARD_VERSION,
        "weights": weights_digest,
        "vision": {key: config.vision.get(key, default) for key, default in _VISION_DEFAULTS.items()},
        "preprocessing": {key: config.preprocessor.get(key) for key in _PREPROCESSOR_KEYS},
        "image_size": spec.encoder.image_size,
        "compute_dtype": spec.encoder.compute_dtype,
        "store_dtype": spec.store_dtype,
        "tokens": tokens,
        "dim": dim,
    }


def tensor_identity(spec: FeaturesSpec, tokens: int, dim: int) -> Identity:
    """What imported tensors depend on, beside the bytes of their files."""
    return {
        "kind": "tensors",
        "forward": IMPORT_VERSION,
        "store_dtype": spec.store_dtype,
        "tokens": tokens,
        "dim": dim,
    }
