"""A decomposer is applied to features: A and B of every image, in a sealed cache that is continued after any kill.

OUT/  identity.json   which model, rank, features and dtype: written first, so that nothing of another is added
and what `caches/sealed.py` tells; a shard has the tensors that `pack_factors` makes
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowrank_tune.caches.identity import Identity, differences
from lowrank_tune.caches.places import Folder
from lowrank_tune.caches.sealed import FACTORS, MANIFEST, Contents, canonical, open_cache, read_manifest, read_sealed
from lowrank_tune.errors import InputError
from lowrank_tune.factors.given import Given, find_given
from lowrank_tune.features.cache import recover, seal
from lowrank_tune.features.commit import stored_as
from lowrank_tune.features.durable import write_durably
from lowrank_tune.features.jobs import ShardPlan, ShardResult
from lowrank_tune.features.pipeline import delivered, only_process, plan_shards
from lowrank_tune.lowrank.compression import STORE_DTYPES
from lowrank_tune.lowrank.exported import ExportedModel, load_decomposer, read_exported
from lowrank_tune.lowrank.factors import pack_factors
from lowrank_tune.records import FeatureSet

VERSION = 1
"""Counts up with every change of the code that can change a stored factor."""
IDENTITY = "identity.json"
REASONS_SHOWN = 3

_logger = logging.getLogger(__name__)

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
        work.run(on_progress or (lambda done, total: None), on_note or _logger.warning)
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
            manifest: dict[str, Any] = read_manifest(Folder.at(self.target))
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

        from lowrank_tune.factors.workers import Decomposition, run_decomposition
        from lowrank_tune.session import ray_session

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
