"""A decomposer is applied to features: A and B of every image, in a sealed cache that is continued after any kill.

OUT/  identity.json   which model, rank, features and dtype: written first, so that nothing of another is added
and what `cache.py` tells; a shard has the tensors that `pack_factors` makes
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_tune.config.source import TensorSource
from lowrank_tune.errors import InputError
from lowrank_tune.features.cache import (
    FACTORS,
    SOURCES,
    Contents,
    canonical,
    differences,
    fingerprint,
    open_cache,
)
from lowrank_tune.features.commits import Identity, UnusableError, layout, stored_as
from lowrank_tune.features.images import SourceFiles, SourceRecords, hash_files, read_unchanged, write_record_table
from lowrank_tune.features.remote import find_cache, is_cache, open_local
from lowrank_tune.features.shards import Made, Node, Notes, Pool, Progress, Row, ShardJob, ShardPlan, fill
from lowrank_tune.features.tensors import common_shape, find_tensors, load_tensor
from lowrank_tune.files import is_uri, read_json, write_durably, write_whole
from lowrank_tune.lowrank.data import NUMBERS_AT_ONCE, open_matrix, pack_factors
from lowrank_tune.lowrank.pretrained import ExportedModel, load_decomposer, read_exported
from lowrank_tune.lowrank.quantization import STORE_DTYPES
from lowrank_tune.records import FeatureSet

VERSION = 1
"""Counts up with every change of the code that can change a stored factor."""
IDENTITY = "identity.json"


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
        features: a cache's fingerprint, the beginning of it, its path or address; or files of tensors: a directory, a
            file or a glob, as in a study file.
        out: where the factors go; a new folder, an empty one, or one that an earlier run began.
        rank: R, one of those that the model was trained for; its own when None.
        store_dtype: how the factors are kept, one of `STORE_DTYPES`.
        device: `cpu`, `cuda`, or `auto`: GPUs where Ray has any.
        max_quarantined: the fraction of unusable images above which this fails.
        results: where fingerprints are looked for.
        address: the Ray to start or to join where the caller has none; as for `ray_session`.
        on_progress: called with the number of distinct images dealt with and their total.
        on_note: called with a sentence: how tensors were taken, or when another process has to be waited for.

    Raises:
        InputError: the model, the features or `out` cannot be used or do not fit, or too many images are unusable.
        CacheError: the features or the factors are damaged.
    """
    if is_uri(str(out)):
        raise InputError(f"{out}: only local and mounted paths are written to; apply there, then upload it")
    target = Path(os.path.expanduser(out)).absolute()
    given, job = _plan(model, str(features), results, target, rank, store_dtype, device)
    if on_note and given.records:
        for sentence in given.records.notes:
            on_note(sentence)
    try:
        _check_ours(target, job.identity)
        contents = fill(
            job,
            given.files.images,
            lambda quarantined: given.files.check(
                quarantined, max_quarantined, given.features.directory, "--max-quarantined"
            ),
            doing="applying a decomposer",
            progress=on_progress,
            note=on_note,
            address=address,
            claim=lambda note: _claim(target, job.identity),
            accept=lambda contents: _check_keys(target, given, contents),
        )
        _write_records(target, given, contents.quarantined)
        return open_cache(target)
    except OSError as error:
        raise InputError(f"{target}: cannot hold the factors ({error}); free it, or choose another folder") from error


@dataclass(frozen=True)
class Given:
    """What is to be decomposed: a cache, or a directory of tensors.

    Attributes:
        features: what they are; those of tensors have no rows.
        files: the images that can be read, in order; those of a cache lie there.
        records: those of tensors; None for a cache.
    """

    features: FeatureSet
    files: SourceFiles
    records: SourceRecords | None = None


def find_given(name: str, results: str | Path | None) -> Given:
    """Find what is to be decomposed: what is there and is no cache are tensors; arguments as for `apply_decomposer`.

    Raises:
        InputError: there is nothing of that name, or nothing in it.
        CacheError: the cache is unsealed or damaged.
    """
    directory = Path(os.path.expanduser(name))
    exists = not is_uri(name) and directory.exists()
    if not is_uri(name) and (exists or re.search(r"[*?\[{]", name)) and not is_cache(str(directory)):
        records = find_tensors(TensorSource(tensors=name), "FEATURES, which is no feature cache")
        files = hash_files(records)
        tokens, dim = common_shape(records, said="FEATURES")
        # It says no more than what they are, for their bytes are their keys.
        mark = fingerprint({"kind": "tensors", "tokens": tokens, "dim": dim})
        features = FeatureSet(str(directory), mark, "imported tensors", "unknown", "", tokens, dim, (), "")
        return Given(features, files, records)
    features = open_local(find_cache(results, str(directory.absolute()) if exists else name))
    keys = tuple(row.key for row in features.rows)
    nothing = (None,) * len(keys)
    return Given(features, SourceFiles(keys, nothing, nothing, dict.fromkeys(keys)))


def _plan(
    directory: str | Path,
    name: str,
    results: str | Path | None,
    target: Path,
    rank: int | None,
    store_dtype: str,
    device: str,
) -> tuple[Given, Decompose]:
    """What is given and the work on it; an InputError where they or the dtype do not fit. What takes long is last."""
    model = read_exported(directory)
    rank = model.check_rank(rank)
    if store_dtype not in STORE_DTYPES:
        raise InputError(f"--dtype {store_dtype}: unknown; choose one of {', '.join(STORE_DTYPES)}")
    load_decomposer(model.directory)  # damaged weights are told before anything starts
    given = find_given(name, results)
    features = given.features
    if (features.tokens, features.dim) != (model.tokens, model.dim):
        raise InputError(
            f"{features.directory}: images of [{features.tokens}, {features.dim}], but {model.directory} takes "
            f"[{model.tokens}, {model.dim}]; apply a model of a study on such features"
        )
    identity = factors_identity(model, rank, features, store_dtype)
    encoder = f"{model.family} of rank {rank} on {features.encoder}"
    place = "" if given.records else features.origin or features.directory
    return given, Decompose(str(target), identity, encoder, features.weights, str(model.directory), place, device)


def factors_identity(model: ExportedModel, rank: int, features: FeatureSet, store_dtype: str) -> Identity:
    """What stored factors depend on, beside the features' bytes."""
    zeros = pack_factors(torch.zeros(features.tokens, rank), torch.zeros(rank, features.dim), store_dtype)
    return {
        "kind": FACTORS,
        "version": VERSION,
        "model": model.fingerprint,
        "family": model.family,
        "rank": rank,
        "features": features.fingerprint,
        "store_dtype": store_dtype,
        "tokens": features.tokens,
        "dim": features.dim,
        "tensors": {name: list(stored_as(part)) for name, part in zeros.items()},
    }


def _claim(target: Path, identity: Identity) -> None:
    _check_ours(target, identity)
    target.mkdir(parents=True, exist_ok=True)
    write_durably(target / IDENTITY, canonical(identity))


def _check_ours(target: Path, identity: Identity) -> None:
    """Refuse, as an InputError, a folder that holds anything else."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file; name a folder")
    try:
        differ = differences(identity, read_json(target / IDENTITY))
    except FileNotFoundError:
        if others := sorted(path.name for path in target.iterdir() if not path.name.startswith(".tmp-")):
            raise InputError(
                f"{target}: holds something else ({', '.join(others[:3])}), and is left alone; name a new one"
            ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{target / IDENTITY}: cannot be read ({error}); remove the folder") from error
    else:
        if differ:
            raise InputError(
                f"{target}: belongs to another model, other features or another dtype ({'; '.join(differ[:3])}); "
                "name a new folder"
            )


def _check_keys(target: Path, given: Given, contents: Contents) -> None:
    """Refuse, as an InputError, factors of images that are none of those given."""
    if strange := sum(key not in given.files.images for key in (*contents.rows, *contents.quarantined)):
        raise InputError(
            f"{target}: holds {strange} images that {given.features.directory} has not, so it belongs to other "
            "features; name a new folder"
        )


def _write_records(target: Path, given: Given, quarantined: Mapping[str, str]) -> None:
    """Write down which record each image is of: those of the tensors, or the table of the cache."""
    table = Path(given.features.records_path)
    if given.records:
        write_record_table(target, given.records, given.files.keys, given.files.errors(quarantined))
    elif table.is_file() and not (copy := target / SOURCES / table.name).exists():
        write_whole(copy, lambda partial: shutil.copyfile(table, partial))


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
                x_TD = load_tensor(read_unchanged(plan.images[place], key), (model.tokens, model.dim)).float()
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
