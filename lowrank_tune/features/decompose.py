"""A decomposer is applied to features: A and B of every image, in a sealed cache that is continued after any kill.

OUT/  identity.json   which model, rank, features and dtype: written first, so that nothing of another is added
and what `caches/sealed.py` tells; a shard has the tensors that `pack_factors` makes
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import ray
import ray.data
import torch
from torch import Tensor

from lowrank_tune.config.schema import TensorSource
from lowrank_tune.errors import InputError, LowrankTuneError
from lowrank_tune.features.cache import (
    FACTORS,
    MANIFEST,
    SOURCES,
    Contents,
    Identity,
    ShardPlan,
    ShardResult,
    UnusableError,
    canonical,
    commit_shard,
    differences,
    fingerprint,
    layout,
    open_cache,
    read_manifest,
    read_sealed,
    recover,
    seal,
    stored_as,
)
from lowrank_tune.features.decoding import read_unchanged
from lowrank_tune.features.extract import delivered, only_process, plan_shards, quiet_ray_data
from lowrank_tune.features.places import Place, is_uri
from lowrank_tune.features.remote import find_cache, open_local
from lowrank_tune.features.sources import (
    SourceFiles,
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


@dataclass(frozen=True)
class Given:
    """What is to be decomposed.

    Attributes:
        shown: its place, for messages.
        tokens: T.
        dim: D.
        fingerprint: a cache's; for tensors it says no more than what they are, for their bytes are their keys.
        encoder: what made the features, for people.
        weights: `random`, `pretrained` or `unknown`.
        keys: of every image that can be read, each once, in order.
        unreadable: for each record that has none, why.
        place: the cache's; empty for tensors.
        paths: key -> file, for tensors.
        records: the user's records: of tensors, or the cache's own table.
    """

    shown: str
    tokens: int
    dim: int
    fingerprint: str
    encoder: str
    weights: str
    keys: tuple[str, ...]
    unreadable: tuple[str, ...]
    place: str
    paths: Mapping[str, Path]
    records: tuple[SourceRecords, SourceFiles] | Path | None

    def write_records(self, directory: Path, reasons: Mapping[str, str]) -> None:
        """Write down which record each image is of, into another cache's `sources/`.

        Args:
            directory: that cache.
            reasons: key -> why it is quarantined there.

        Raises:
            OSError: the directory cannot be written.
        """
        if isinstance(self.records, tuple):
            records, files = self.records
            errors = [
                error if key is None else reasons.get(key) for key, error in zip(files.keys, files.errors, strict=True)
            ]
            write_record_table(directory, records, files.keys, errors)
        elif self.records is not None and not (copy := directory / SOURCES / self.records.name).exists():
            partial = copy.with_name(f".{os.getpid()}-{copy.name}")
            shutil.copyfile(self.records, partial)
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
    if is_uri(name) or not directory.is_dir():
        return _of_cache(find_cache(results, name))
    if any(directory.glob("features_*.pt")):
        return _of_tensors(directory)
    return _of_cache(find_cache(results, str(directory.absolute())))


def _of_cache(place: str) -> Given:
    features = open_local(place)
    table = Path(features.records_path) if features.records_path else None
    return Given(
        shown=features.directory,
        tokens=features.tokens,
        dim=features.dim,
        fingerprint=features.fingerprint,
        encoder=features.encoder,
        weights=features.weights,
        keys=tuple(row.key for row in features.rows),
        unreadable=(),
        place=place,
        paths={},
        records=table if table is not None and table.is_file() else None,
    )


def _of_tensors(directory: Path) -> Given:
    records = read_records(TensorSource(tensors=str(directory)), directory, 0)
    files = hash_files(records)
    tokens, dim = first_shape(path for path in records.paths if path is not None)
    unreadable = [f"{path}: {error}" for path, error in zip(files.records, files.errors, strict=True) if error]
    return Given(
        shown=str(directory),
        tokens=tokens,
        dim=dim,
        fingerprint=fingerprint({"kind": "tensors", "tokens": tokens, "dim": dim}),
        encoder="imported tensors",
        weights="unknown",
        keys=tuple(files.paths),
        unreadable=tuple(unreadable),
        place="",
        paths=files.paths,
        records=(records, files),
    )


VERSION = 1
"""Counts up with every change of the code that can change a stored factor."""
IDENTITY = "identity.json"
REASONS_SHOWN = 3

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


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
    on_note: Callable[[str], None] | None = None,
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
    target = _target(out)
    identity = factors_identity(chosen, identity_rank, given, store_dtype)
    work = _Work(target, identity, chosen, given, device, max_quarantined, address)
    try:
        work.run(on_progress or (lambda done, total: None), on_note or logger.warning)
        return open_cache(target)
    except OSError as error:
        raise InputError(f"{target}: cannot hold the factors ({error}); free it, or choose another folder") from error


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


class _Work:
    """One application: a target, and what goes into it."""

    def __init__(
        self,
        target: Path,
        identity: Identity,
        model: ExportedModel,
        given: Given,
        device: str,
        max_quarantined: float,
        address: str | None,
    ) -> None:
        self.target = target
        self.identity = identity
        self.model = model
        self.given = given
        self.device = device
        self.max_quarantined = max_quarantined
        self.address = address

    def run(self, progress: Progress, note: Callable[[str], None]) -> None:
        """Make what is missing, if anything is."""
        self.check_ours()
        self.target.mkdir(parents=True, exist_ok=True)
        contents = read_sealed(self.target, self.identity)
        if contents is None or contents.missing(self.given.keys):
            with only_process(self.target, note, "applying a decomposer"):
                self.extend(progress)
        else:
            self.check_keys(contents)
            progress(len(self.given.keys), len(self.given.keys))

    def check_ours(self) -> None:
        """Refuse a folder that holds anything else.

        Raises:
            InputError: it does.
            CacheError: its manifest is damaged.
        """
        if not self.target.exists():
            return
        if not self.target.is_dir():
            raise InputError(f"{self.target}: is a file; name a folder")
        found = self._found()
        if found is None:
            others = sorted(path.name for path in self.target.iterdir() if not path.name.startswith(".tmp-"))
            if others:
                raise InputError(
                    f"{self.target}: holds something else ({', '.join(others[:3])}), and is left alone; name a new one"
                )
        elif differ := differences(self.identity, found):
            raise InputError(
                f"{self.target}: belongs to another model, other features or another dtype ({'; '.join(differ[:3])}); "
                "name a new folder"
            )

    def check_keys(self, contents: Contents) -> None:
        """Refuse factors of images that are none of those given.

        Raises:
            InputError: there are some.
        """
        known = set(self.given.keys)
        if strange := [key for key in (*contents.rows, *contents.quarantined) if key not in known]:
            raise InputError(
                f"{self.target}: holds {len(strange)} images that {self.given.shown} has not, so it belongs to other "
                "features; name a new folder"
            )

    def extend(self, progress: Progress) -> None:
        """Make what is missing and seal; only while holding the cache's lock."""
        self.check_ours()
        write_durably(self.target / IDENTITY, canonical(self.identity))
        contents = recover(self.target, self.identity)
        self.check_keys(contents)
        missing = contents.missing(self.given.keys)
        total = len(self.given.keys)
        reasons, done = dict(contents.quarantined), total - len(missing)
        self._check(reasons)
        progress(done, total)
        if missing:
            with contextlib.closing(self._make(plan_shards(missing, self.given.paths))) as made:
                for result in made:
                    reasons |= dict(result.quarantined)
                    self._check(reasons)
                    done += result.images
                    progress(done, total)
        self.given.write_records(self.target, reasons)
        encoder = f"{self.model.family} of rank {self.identity['rank']} on {self.given.encoder}"
        seal(self.target, self.identity, encoder, self.given.weights)

    def _found(self) -> Identity | None:
        """What the folder says that it holds."""
        if (self.target / MANIFEST).exists():
            manifest: dict[str, Any] = read_manifest(Place(self.target))
            return dict(manifest["identity"])
        try:
            found = json.loads((self.target / IDENTITY).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(f"{self.target / IDENTITY}: cannot be read ({error}); remove the folder") from error
        return dict(found) if isinstance(found, dict) else None

    def _check(self, reasons: Mapping[str, str]) -> None:
        """Compare what cannot be used with what may be.

        Raises:
            InputError: it is more.
        """
        broken = [*self.given.unreadable, *(f"{self._name(key)}: {reason}" for key, reason in reasons.items())]
        total = len(self.given.keys) + len(self.given.unreadable)
        if len(broken) <= self.max_quarantined * total and len(broken) < total:
            return
        more = f"; and {len(broken) - REASONS_SHOWN} more" if len(broken) > REASONS_SHOWN else ""
        raise InputError(
            f"{self.given.shown}: {len(broken)} of {total} images cannot be decomposed, more than --max-quarantined "
            f"{self.max_quarantined:g} allows: {'; '.join(broken[:REASONS_SHOWN])}{more}"
        )

    def _name(self, key: str) -> str:
        return str(self.given.paths.get(key, key[:16]))

    def _make(self, plans: Sequence[ShardPlan]) -> Generator[ShardResult, None, None]:
        # A run that finds everything done spends no time on importing Ray.
        import ray

        from lowrank_tune.runtime import ray_session

        with ray_session(self.address):
            has = ray.cluster_resources()
            device = _device(self.device, has.get("GPU", 0.0))
            actors = max(1, min(len(plans), int(has.get("GPU" if device == "cuda" else "CPU", 1.0))))
            job = Decomposition(str(self.target), self.identity, str(self.model.directory), self.given.place, device)
            yield from delivered(run_decomposition(job, plans, actors), f"the work into {self.target}")


def _device(wanted: str, gpus: float) -> str:
    if wanted == "auto":
        return "cuda" if gpus >= 1 else "cpu"
    if wanted == "cuda" and gpus < 1:
        raise InputError("--device cuda: the Ray cluster has no GPU; start it with one, or use cpu")
    return wanted


def _target(out: str | Path) -> Path:
    if "://" in str(out):
        raise InputError(f"{out}: only local and mounted paths are written to; apply there, then upload it")
    return Path(out).expanduser().absolute()


NUMBERS_AT_ONCE = 2**23
"""Numbers of features in memory at a time: 16 images of [256, 2048]."""


@dataclass(frozen=True)
class Decomposition:
    """All that an actor needs to know, beside its shard.

    Attributes:
        directory: the cache of factors.
        identity: what the factors depend on: model, rank, features, dtype.
        model: the exported model's folder.
        place: the cache of features; empty for tensors, whose paths are in the plans.
        device: `cpu` or `cuda`.
    """

    directory: str
    identity: Identity
    model: str
    place: str
    device: str


def run_decomposition(
    job: Decomposition, plans: Sequence[ShardPlan], actors: int
) -> Generator[ShardResult, None, None]:
    """Make and commit shards of factors, in whatever order they are done.

    Args:
        job: what to do.
        plans: the shards.
        actors: how many processes, each with a CPU and, where that is the device, a GPU.

    Yields:
        One result a shard; ending the iteration early stops the actors.
    """
    rows = [{"plan": plan.dump()} for plan in plans]
    with quiet_ray_data():
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            ShardDecomposer,
            fn_constructor_kwargs={"job": job},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=1,
            num_gpus=1 if job.device == "cuda" else 0,
        )
        for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
            yield from (ShardResult.load(text) for text in batch["result"])


class ShardDecomposer:
    """An actor of the pool: one decomposer, one shard a call.

    Args:
        job: what to do.
    """

    def __init__(self, job: Decomposition) -> None:
        # Products over more threads round otherwise: what is made after a kill must be the same bytes.
        torch.set_num_threads(1)
        self.job = job
        self.problem: str = ""
        try:
            self.model = load_decomposer(job.model).to(job.device)
            self.matrix = open_matrix(open_local(job.place)) if job.place else None
            rows = self.matrix.features.rows if self.matrix else ()
            self.rows = {row.key: number for number, row in enumerate(rows)}
        except Exception as error:
            # Ray would start an actor that fails here again and again; its first result brings the message home.
            known = isinstance(error, LowrankTuneError)
            self.problem = str(error) if known else f"the decomposer did not start: {error!r}"

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, list[str]]:
        """Read, decompose, write and commit one shard.

        Args:
            batch: one row, `plan`, a `ShardPlan` as JSON.

        Returns:
            One row, `result`.
        """
        plan = ShardPlan.load(batch["plan"][0])
        result = ShardResult(plan.shard, len(plan.keys))
        if self.problem:
            return {"result": [replace(result, failure=self.problem, fault="input").dump()]}
        try:
            return {"result": [self._make(plan, result).dump()]}
        except LowrankTuneError as error:
            fault = "input" if isinstance(error, InputError) else "cache"
            return {"result": [replace(result, failure=str(error), fault=fault).dump()]}  # type: ignore[arg-type]
        except OSError as error:
            failure = f"{self.job.directory}: shard {plan.shard} cannot be made ({error}); make room and run again"
            return {"result": [replace(result, failure=failure).dump()]}

    def _make(self, plan: ShardPlan, result: ShardResult) -> ShardResult:
        identity = self.job.identity
        quarantined: list[tuple[str, str]] = []
        keys: list[str] = []
        stored: dict[str, list[Tensor]] = {name: [] for name in layout(identity)}
        for places in self._pieces(len(plan.keys)):
            read = [(plan.keys[place], self._read(plan, place)) for place in places]
            quarantined += [(key, found) for key, found in read if isinstance(found, str)]
            whole = [(key, found) for key, found in read if isinstance(found, Tensor)]
            for key, factors in self._factors(whole):
                try:
                    packed = pack_factors(*factors, identity["store_dtype"])
                except InputError as error:
                    quarantined.append((key, f"its factors cannot be stored: {error}"))
                    continue
                keys.append(key)
                for name, part in packed.items():
                    stored[name].append(part)
        commit_shard(Path(self.job.directory), plan.shard, keys, stored, quarantined)
        return replace(result, quarantined=tuple(quarantined))

    def _pieces(self, count: int) -> Iterator[range]:
        size = max(1, NUMBERS_AT_ONCE // (self.model.tokens * self.model.dim))
        return (range(start, min(start + size, count)) for start in range(0, count, size))

    def _read(self, plan: ShardPlan, place: int) -> Tensor | str:
        """One image's features, float32 [T, D]; why not, where they cannot be used."""
        if self.matrix is not None:
            x_TD = self.matrix.load([self.rows[plan.keys[place]]])[0]
        else:
            try:
                x_TD = load_tensor(read_unchanged(Path(plan.paths[place]), plan.keys[place])).float()
                check_shape(x_TD, self.model.tokens, self.model.dim)
            except UnusableError as error:
                return str(error)
        return x_TD if torch.isfinite(x_TD).all() else "the features hold NaN or infinite values"

    @torch.inference_mode()
    def _factors(self, images: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        if not images:
            return iter(())
        x_NTD = torch.stack([x_TD for _, x_TD in images]).to(self.job.device)
        a_NTR, b_NRD = self.model(x_NTD, rank=self.job.identity["rank"])
        return zip((key for key, _ in images), zip(a_NTR.cpu(), b_NRD.cpu(), strict=True), strict=True)
