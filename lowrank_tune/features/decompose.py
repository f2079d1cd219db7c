"""A decomposer is applied to features: A and B of every image, or its coded stream, in a sealed cache.

OUT/  identity.json   which model, rank, features and dtype: written first, so that nothing of another is added
and what `cache.py` tells; a shard has the tensors that `pack_factors` makes, or streams that `coded.py` has made
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.features.cache import (
    CODEBOOK,
    FACTORS,
    IDENTITY,
    SOURCES,
    Contents,
    canonical,
    differences,
    open_cache,
)
from lowrank_tune.features.coded import Encode, Kept, as_begun, codebook_of, coded_identity
from lowrank_tune.features.commits import Identity, UnusableError, layout, stored_as
from lowrank_tune.features.given import Given, find_given, image_reader
from lowrank_tune.features.images import write_record_table
from lowrank_tune.features.shards import Made, Node, Notes, Pool, Progress, Row, ShardJob, ShardPlan, fill
from lowrank_tune.files import is_uri, read_json, write_durably, write_whole
from lowrank_tune.lowrank.data import NUMBERS_AT_ONCE, pack_factors
from lowrank_tune.lowrank.pretrained import ExportedModel, load_decomposer, read_exported
from lowrank_tune.records import CODED, FeatureSet

VERSION = 1
"""Counts up with every change of the code that can change a stored factor."""


def apply_decomposer(
    model: str | Path,
    features: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    store_dtype: str | None = None,
    coded: bool = False,
    target_error: float | None = None,
    max_bytes: int | None = None,
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
        out: where they go; a new folder, an empty one, or one that an earlier run began.
        rank: R, one of those that the model was trained for; its own when None.
        store_dtype: how the factors are kept, one of `STORE_DTYPES`; float16 when None.
        coded: keep a stream of bytes an image and what they all share once, in place of factors; of a `shared` model.
        target_error: with `coded`, what ‖X − Y‖ / ‖X‖ may be at most for what comes back of each image, Y;
        max_bytes: or what each image's stream may take at most.
        device: `cpu`, `cuda`, or `auto`: GPUs where Ray has any, and the work is not coding.
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
    kept = Kept.asked(store_dtype, coded, target_error, max_bytes)
    given, job, codebook = _plan(model, str(features), results, target, rank, kept, device)
    if on_note and given.records:
        for sentence in given.records.notes:
            on_note(sentence)
    return _complete(target, given, job, codebook, max_quarantined, progress=on_progress, note=on_note, address=address)


def _complete(
    target: Path, given: Given, job: ShardJob, codebook: bytes, max_quarantined: float, **ray: Any
) -> FeatureSet:
    """Have the job make what `target` lacks; `ray` are arguments of `fill`."""
    try:
        _check_ours(target, job.identity)
        contents = fill(
            job,
            given.files.images,
            lambda quarantined: given.files.check(
                quarantined, max_quarantined, given.features.directory, "--max-quarantined"
            ),
            doing="applying a decomposer",
            claim=lambda note: _claim(target, job.identity, codebook),
            accept=lambda contents: _check_keys(target, given, contents),
            **ray,
        )
        _write_records(target, given, contents.quarantined)
        return open_cache(target)
    except OSError as error:
        raise InputError(f"{target}: cannot hold them ({error}); free it, or choose another folder") from error


def _plan(
    directory: str | Path,
    name: str,
    results: str | Path | None,
    target: Path,
    rank: int | None,
    kept: Kept,
    device: str,
) -> tuple[Given, ShardJob, bytes]:
    """What is given, the work on it and its codebook, if any; an InputError where they do not fit."""
    model = read_exported(directory)
    rank = model.check_rank(rank)
    decomposer = load_decomposer(model.directory)  # damaged weights are told before anything starts
    codebook = codebook_of(decomposer, rank, model.directory, kept, device) if kept.dtype == CODED else b""
    given = find_given(name, results)  # which may take long
    features = given.features
    if (features.tokens, features.dim) != (model.tokens, model.dim):
        raise InputError(
            f"{features.directory}: images of [{features.tokens}, {features.dim}], but {model.directory} takes "
            f"[{model.tokens}, {model.dim}]; apply a model of a study on such features"
        )
    made_by = f"{model.family} of rank {rank} on {features.encoder}"
    if codebook:
        identity = coded_identity(_made_by(model, rank, features), kept, features, codebook)
        identity, codebook = as_begun(target, identity, codebook)
        return given, Encode(str(target), identity, made_by, features.weights, given.place), codebook
    identity = factors_identity(model, rank, features, kept.dtype)
    job = Decompose(str(target), identity, made_by, features.weights, str(model.directory), given.place, device)
    return given, job, codebook


def factors_identity(model: ExportedModel, rank: int, features: FeatureSet, store_dtype: str) -> Identity:
    """What stored factors depend on, beside the features' bytes."""
    zeros = pack_factors(torch.zeros(features.tokens, rank), torch.zeros(rank, features.dim), store_dtype)
    tensors = {name: list(stored_as(part)) for name, part in zeros.items()}
    return _made_by(model, rank, features) | {"store_dtype": store_dtype, "tensors": tensors}


def _made_by(model: ExportedModel, rank: int, features: FeatureSet) -> Identity:
    return {
        "kind": FACTORS,
        "version": VERSION,
        "model": model.fingerprint,
        "family": model.family,
        "rank": rank,
        "features": features.fingerprint,
        "tokens": features.tokens,
        "dim": features.dim,
    }


def _claim(target: Path, identity: Identity, codebook: bytes) -> None:
    _check_ours(target, identity)
    target.mkdir(parents=True, exist_ok=True)
    write_durably(target / IDENTITY, canonical(identity))
    if codebook:
        write_durably(target / CODEBOOK, codebook)


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
                f"{target}: belongs to another model, other features or another dtype or target "
                f"({'; '.join(differ[:3])}); name a new folder"
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
        read = image_reader(self.place, (model.tokens, model.dim))
        at_once = max(1, NUMBERS_AT_ONCE // (model.tokens * model.dim))

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
