"""The decomposition as Ray Data sees it: one row is one shard, and the actor that makes its factors commits it.

Neither features nor factors travel through the object store. N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import ray
import ray.data
import torch
from torch import Tensor

from lowrank_tune.caches.identity import Identity
from lowrank_tune.caches.shards import layout
from lowrank_tune.caches.staging import open_local
from lowrank_tune.errors import InputError, LowrankTuneError
from lowrank_tune.features.commit import commit_rows
from lowrank_tune.features.decoding import read_unchanged
from lowrank_tune.features.jobs import ShardPlan, ShardResult, UnusableError
from lowrank_tune.features.tensors import check_shape, load_tensor
from lowrank_tune.features.workers import quiet_ray_data
from lowrank_tune.lowrank.exported import load_decomposer
from lowrank_tune.lowrank.factors import open_matrix, pack_factors

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
        commit_rows(Path(self.job.directory), plan.shard, keys, stored, quarantined)
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
