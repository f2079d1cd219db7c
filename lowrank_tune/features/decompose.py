"""A decomposer is applied to features: A and B of every image, in a sealed cache that is continued after any kill.

OUT/  identity.json   which model, rank, features and dtype: written first, so that nothing of another is added
and what `cache.py` tells; a shard has the tensors that `pack_factors` makes
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_tune.config.schema import TensorSource
from lowrank_tune.errors import InputError
from lowrank_tune.features.cache import (
    FACTORS,
    MANIFEST,
    SOURCES,
    Contents,
    canonical,
    differences,
    fingerprint,
    open_cache,
    read_manifest,
)
from lowrank_tune.features.commits import Identity, UnusableError, layout, stored_as
from lowrank_tune.features.decoding import read_unchanged
from lowrank_tune.features.places import Place, is_uri
from lowrank_tune.features.remote import find_cache, open_local
from lowrank_tune.features.shards import Made, Node, Notes, Pool, Progress, Row, ShardJob, ShardPlan, fill
from lowrank_tune.features.sources import (
    Quarantine,
    SourceRecords,
    check_shape,
    first_shape,
    hash_files,
    load_tensor,
    read_records,
    write_record_table,
)
from lowrank_tune.files import write_durably
from lowrank_tune.lowrank.data import open_matrix, pack_factors
from lowrank_tune.lowrank.pretrained import ExportedModel, load_decomposer, read_exported
from lowrank_tune.lowrank.quantization import STORE_DTYPES
from lowrank_tune.records import FeatureSet

VERSION = 1
"""Counts up with every change of the code that can change a stored factor."""
IDENTITY = "identity.json"
REASONS_SHOWN = 3
NUMBERS_AT_ONCE = 2**23
"""Numbers of features in memory at a time: 16 images of [256, 2048]."""


def apply_decomposer(
    model: str | Path,
    features: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    store_dtype: str = "float16",
    device: str = "auto",
    max_quarantined: float = 0.05,
    results: str | Path | None = None,
    address: str | None = None,
    on_progress: Progress | None = None,
    on_note: Notes | None = None,
) -> FeatureSet:
    """Decompose every image of a cache, or of a directory of tensors, on Ray Data.

    What `out` holds already is not made again: a run that is killed at any moment is continued by the next one, to the
    same bytes, and where nothing is missing Ray is not started. `open_features(out)` reads X ≈ A·B back.

    Args:
        model: what `export_study` wrote; every Ray node must see it, `features` and `out` under these paths.
        features: a cache's fingerprint, the beginning of it, its path or address; or a directory with `features_N.pt`.
        out: where the factors go; a new folder, an empty one, or one that an earlier run began.
        rank: R, one of those that the model was trained for; its own when None.
        store_dtype: how the factors are kept, one of `STORE_DTYPES`.
        device: `cpu`, `cuda`, or `auto`: GPUs where Ray has any.
        max_quarantined: the fraction of unusable images above which this fails.
        results: where fingerprints are looked for.
        address: the Ray to start or to join where the caller has none; as for `ray_session`.
        on_progress: called with the number of distinct images dealt with and their total.
        on_note: called with a sentence when another process has to be waited for.

    Returns:
        The cache of factors; its `rank` is theirs.

    Raises:
        InputError: the model, the features or `out` cannot be used, they do not fit each other, or too many images are
            unusable.
        CacheError: the features or the factors are damaged.
    """
    chosen = read_exported(model)
    identity_rank = chosen.check_rank(rank)
    if store_dtype not in STORE_DTYPES:
        raise InputError(f"--dtype {store_dtype}: unknown; choose one of {', '.join(STORE_DTYPES)}")
    load_decomposer(chosen.directory)  # damaged weights are told before anything starts
    given = find_given(str(features), results)
    if (given.tokens, given.dim) != (chosen.tokens, chosen.dim):
        raise InputError(
            f"{given.shown}: images of [{given.tokens}, {given.dim}], but {chosen.directory} takes [{chosen.tokens}, "
            f"{chosen.dim}]; apply a model of a study on such features"
        )
    if is_uri(str(out)):
        raise InputError(f"{out}: only local and mounted paths are written to; apply there, then upload it")
    target = Path(out).expanduser().absolute()
    identity = factors_identity(chosen, identity_rank, given, store_dtype)
    encoder = f"{chosen.family} of rank {identity_rank} on {given.encoder}"
    job = Decompose(str(target), identity, encoder, given.weights, str(chosen.directory), given.place, device)

    def claim(note: Notes) -> None:
        _check_ours(target, identity)
        target.mkdir(parents=True, exist_ok=True)
        write_durably(target / IDENTITY, canonical(identity))

    try:
        _check_ours(target, identity)
        contents = fill(
            job,
            given.paths,
            lambda reasons: given.check(reasons, max_quarantined),
            doing="applying a decomposer",
            progress=on_progress,
            note=on_note,
            address=address,
            claim=claim,
            accept=lambda contents: given.check_keys(target, contents),
        )
        given.write_records(target, contents.quarantined)
        return open_cache(target)
    except OSError as error:
        raise InputError(f"{target}: cannot hold the factors ({error}); free it, or choose another folder") from error


@dataclass(frozen=True)
class Given:
    """What is to be decomposed: a cache, or a directory of tensors.

    Attributes:
        features: what they are, as of a cache.
        paths: key -> file, of every image that can be read, in order; None for those of a cache.
        place: the cache's; empty for tensors.
        source: the records of tensors, and how many of those may be quarantined.
    """

    shown: str
    tokens: int
    dim: int
    fingerprint: str
    encoder: str
    weights: str
    paths: Mapping[str, Path | None]
    place: str = ""
    table: str = ""
    source: tuple[SourceRecords, Quarantine] | None = None

    def check(self, reasons: Mapping[str, str], limit: float) -> None:
        """Compare the images that cannot be used with the fraction that may be; an InputError where they are more."""
        broken = [f"{self.paths[key] or key[:16]}: {reason}" for key, reason in reasons.items() if key in self.paths]
        if self.source:
            files = self.source[1].files
            broken[:0] = [f"{path}: {error}" for path, error in zip(files.records, files.errors, strict=True) if error]
        total = len(self.paths) + len(broken) - sum(key in self.paths for key in reasons)
        if len(broken) <= limit * total and len(broken) < total:
            return
        more = f"; and {len(broken) - REASONS_SHOWN} more" if len(broken) > REASONS_SHOWN else ""
        raise InputError(
            f"{self.shown}: {len(broken)} of {total} images cannot be decomposed, more than --max-quarantined "
            f"{limit:g} allows: {'; '.join(broken[:REASONS_SHOWN])}{more}"
        )

    def check_keys(self, target: Path, contents: Contents) -> None:
        """Refuse, as an InputError, factors of images that are none of those given."""
        if strange := sum(key not in self.paths for key in (*contents.rows, *contents.quarantined)):
            raise InputError(
                f"{target}: holds {strange} images that {self.shown} has not, so it belongs to other features; name a "
                "new folder"
            )

    def write_records(self, target: Path, reasons: Mapping[str, str]) -> None:
        """Write down which record each image is of: those of the tensors, or the table of the cache."""
        if self.source:
            records, quarantine = self.source
            write_record_table(target, records, quarantine.files.keys, quarantine.errors(reasons))
        elif self.table and not (copy := target / SOURCES / Path(self.table).name).exists():
            partial = copy.with_name(f".{os.getpid()}-{copy.name}")
            shutil.copyfile(self.table, partial)
            os.replace(partial, copy)


def find_given(name: str, results: str | Path | None) -> Given:
    """Find what is to be decomposed.

    Args:
        name: a cache's fingerprint, the beginning of it, its path or address; or a directory with `features_N.pt`.
        results: where fingerprints are looked for; as for the commands on caches.

    Raises:
        InputError: there is nothing of that name, or nothing in it.
        CacheError: the cache is unsealed or damaged.
    """
    directory = Path(name).expanduser()
    is_folder = not is_uri(name) and directory.is_dir()
    if is_folder and any(directory.glob("features_*.pt")):
        records = read_records(TensorSource(tensors=str(directory)), directory, 0)
        files = hash_files(records)
        tokens, dim = first_shape(path for path in records.paths if path is not None)
        # It says no more than what they are, for their bytes are their keys.
        mark = fingerprint({"kind": "tensors", "tokens": tokens, "dim": dim})
        source = records, Quarantine(files, 1)
        return Given(str(directory), tokens, dim, mark, "imported tensors", "unknown", files.paths, source=source)
    place = find_cache(results, str(directory.absolute()) if is_folder else name)
    cache = open_local(place)
    table = cache.records_path if cache.records_path and Path(cache.records_path).is_file() else ""
    paths = dict.fromkeys(row.key for row in cache.rows)
    return Given(
        cache.directory, cache.tokens, cache.dim, cache.fingerprint, cache.encoder, cache.weights, paths, place, table
    )


def factors_identity(model: ExportedModel, rank: int, given: Given, store_dtype: str) -> Identity:
    """What stored factors depend on, beside the features' bytes."""
    zeros = pack_factors(torch.zeros(given.tokens, rank), torch.zeros(rank, given.dim), store_dtype)
    return {
        "kind": FACTORS,
        "version": VERSION,
        "model": model.fingerprint,
        "family": model.family,
        "rank": rank,
        "features": given.fingerprint,
        "store_dtype": store_dtype,
        "tokens": given.tokens,
        "dim": given.dim,
        "tensors": {name: list(stored_as(part)) for name, part in zeros.items()},
    }


def _check_ours(target: Path, identity: Identity) -> None:
    """Refuse, as an InputError, a folder that holds anything else."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file; name a folder")
    if (target / MANIFEST).exists():
        found = read_manifest(Place(target))["identity"]
    else:
        try:
            found = json.loads((target / IDENTITY).read_text(encoding="utf-8"))
        except FileNotFoundError:
            found = None
        except (OSError, ValueError) as error:
            raise InputError(f"{target / IDENTITY}: cannot be read ({error}); remove the folder") from error
    if not isinstance(found, dict):
        if others := sorted(path.name for path in target.iterdir() if not path.name.startswith(".tmp-")):
            raise InputError(
                f"{target}: holds something else ({', '.join(others[:3])}), and is left alone; name a new one"
            )
    elif differ := differences(identity, found):
        raise InputError(
            f"{target}: belongs to another model, other features or another dtype ({'; '.join(differ[:3])}); "
            "name a new folder"
        )


@dataclass(frozen=True)
class Decompose(ShardJob):
    """Features -> factors.

    Attributes:
        model: the exported model's folder.
        place: the cache of features; empty for tensors, whose paths are in the plans.
        device: `cpu`, `cuda`, or `auto`.
    """

    work: ClassVar[str] = "the work"
    worker: ClassVar[str] = "decomposer"
    model: str
    place: str
    device: str

    def pool(self, shards: int, nodes: Sequence[Node]) -> Pool:
        """As many as there are GPUs or CPUs; products over more threads than one would round otherwise."""
        gpus = sum(int(node.gpus) for node in nodes)
        if self.device == "cuda" and not gpus:
            raise InputError("--device cuda: the Ray cluster has no GPU; start it with one, or use cpu")
        if self.device == "cpu" or not gpus:
            return super().pool(shards, nodes)
        return Pool(1, min(shards, gpus), gpus=1)

    def open(self, pool: Pool) -> Callable[[ShardPlan, Row], Made]:
        """Load the decomposer, and map the features."""
        device = "cuda" if pool.gpus else "cpu"
        model = load_decomposer(self.model).to(device)
        matrix = open_matrix(open_local(self.place)) if self.place else None
        rows = {row.key: number for number, row in enumerate(matrix.features.rows)} if matrix else {}
        at_once = max(1, NUMBERS_AT_ONCE // (model.tokens * model.dim))

        def read(plan: ShardPlan, place: int) -> Tensor:
            key = plan.keys[place]
            if matrix is not None:
                x_TD = matrix.load([rows[key]])[0]
            else:
                x_TD = load_tensor(read_unchanged(Path(plan.paths[place]), key)).float()
                check_shape(x_TD, model.tokens, model.dim)
            if not torch.isfinite(x_TD).all():
                raise UnusableError("the features hold NaN or infinite values")
            return x_TD

        @torch.inference_mode()
        def make(plan: ShardPlan, row: Row) -> Made:
            keys: list[str] = []
            stored: dict[str, list[Tensor]] = {name: [] for name in layout(self.identity)}
            quarantined: list[tuple[str, str]] = []
            for start in range(0, len(plan.keys), at_once):
                images: dict[str, Tensor] = {}
                for place in range(start, min(start + at_once, len(plan.keys))):
                    try:
                        images[plan.keys[place]] = read(plan, place)
                    except UnusableError as error:
                        quarantined.append((plan.keys[place], str(error)))
                if not images:
                    continue
                x_NTD = torch.stack([*images.values()]).to(device)
                a_NTR, b_NRD = (side.cpu() for side in model(x_NTD, rank=self.identity["rank"]))
                for key, a_TR, b_RD in zip(images, a_NTR, b_NRD, strict=True):
                    try:
                        packed = pack_factors(a_TR, b_RD, self.identity["store_dtype"])
                    except InputError as error:
                        quarantined.append((key, f"its factors cannot be stored: {error}"))
                        continue
                    keys.append(key)
                    for name, part in packed.items():
                        stored[name].append(part)
            return Made(keys, stored, quarantined)

        return make
