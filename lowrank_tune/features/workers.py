"""The extraction as Ray Data sees it: one row is one shard, and the worker that makes a shard's features commits it.

Only pixels and small results travel through the object store, features never do. N images, H = W pixels, T tokens,
D dim.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import ray.data
import torch

from lowrank_tune.errors import InputError
from lowrank_tune.features.commit import commit_shard, to_stored
from lowrank_tune.features.decoding import decode_shard, read_unchanged
from lowrank_tune.features.jobs import Extraction, ShardPlan, ShardResult, UnusableError
from lowrank_tune.features.pool import DECODE_CPUS, Pool
from lowrank_tune.features.tensors import check_shape, load_tensor

BATCH_ON_CPU = 4
BATCH_ON_GPU = 32

_Row = dict[str, Any]


def run_extraction(
    extraction: Extraction, plans: Sequence[ShardPlan], pool: Pool
) -> Generator[ShardResult, None, None]:
    """Make and commit shards, in whatever order they are done.

    Args:
        extraction: what to do.
        plans: the shards.
        pool: how many workers, with what.

    Yields:
        One result a shard; ending the iteration early stops the workers.
    """
    with _quiet_ray_data():
        rows = [{"plan": plan.dump()} for plan in plans]
        shards = ray.data.from_items(rows, override_num_blocks=len(rows))
        if extraction.encoding is None:
            results = shards.map(import_shard, fn_kwargs={"extraction": extraction})
        else:
            size = {"image_size": extraction.encoding.image_size}
            decoded = shards.map(decode_shard, fn_kwargs=size, num_cpus=DECODE_CPUS)
            results = decoded.map_batches(
                ShardEncoder,
                fn_constructor_kwargs={"extraction": extraction, "threads": pool.threads},
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=pool.actors),
                num_cpus=pool.cpus_each,
                num_gpus=pool.gpus_each,
            )
        # Without prefetching, a result is told when it is there and not when the next one is.
        for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
            for text in batch["result"]:
                yield ShardResult.load(text)


class ShardEncoder:
    """An actor of the pool: one tower, one shard a call.

    Args:
        extraction: what to do.
        threads: torch threads of this process.
    """

    def __init__(self, extraction: Extraction, threads: int) -> None:
        # transformers takes seconds to import, which the driver need not spend.
        from lowrank_tune.features.encoder import Encoder

        torch.set_num_threads(threads)
        self.extraction = extraction
        self.problem = ""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.batch = BATCH_ON_GPU if device == "cuda" else BATCH_ON_CPU
        encoding = extraction.encoding
        if encoding is None:
            raise ValueError("an extraction without an encoding has no use for an encoder")
        try:
            self.encoder = Encoder(encoding.config, encoding.tower, encoding.compute_dtype, device)
        except InputError as error:
            # Ray would start an actor that fails here again and again; its first result brings the message home.
            self.problem = str(error)

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, list[str]]:
        """Encode, write and commit one shard.

        Args:
            batch: one row of `decode_shard`.

        Returns:
            One row, `result`.
        """
        result = ShardResult.load(batch["result"][0])
        if not result.failure and self.problem:
            result = replace(result, failure=self.problem, fault="input")
        if not result.failure:
            keys: list[str] = json.loads(batch["keys"][0])
            result = _commit(self.extraction, result, keys, self._encode(batch["pixels"][0]))
        return {"result": [result.dump()]}

    def _encode(self, pixels_NHWC: npt.NDArray[np.uint8]) -> Iterator[torch.Tensor]:
        for first in range(0, len(pixels_NHWC), self.batch):
            yield from self.encoder.encode(pixels_NHWC[first : first + self.batch])


def import_shard(row: _Row, extraction: Extraction) -> _Row:
    """Load, check and commit the tensors of one shard, on a CPU worker.

    Returns:
        One row, `result`.
    """
    plan = ShardPlan.load(row["plan"])
    keys: list[str] = []
    tensors: list[torch.Tensor] = []
    quarantined: list[tuple[str, str]] = []
    try:
        for key, path in zip(plan.keys, plan.paths, strict=True):
            try:
                tensor = load_tensor(read_unchanged(Path(path), key))
                check_shape(tensor, extraction.identity["tokens"], extraction.identity["dim"])
                tensors.append(tensor)
                keys.append(key)
            except UnusableError as error:
                quarantined.append((key, str(error)))
    except OSError as error:
        return {"result": ShardResult(plan.shard, len(plan.keys), failure=str(error), fault="input").dump()}
    result = ShardResult(plan.shard, len(plan.keys), tuple(quarantined))
    return {"result": _commit(extraction, result, keys, tensors).dump()}


def _commit(
    extraction: Extraction, result: ShardResult, keys: Sequence[str], features_TD: Iterable[torch.Tensor]
) -> ShardResult:
    """Store what can be stored, quarantine what cannot, commit the shard."""
    stored: list[torch.Tensor] = []
    usable: list[str] = []
    quarantined = list(result.quarantined)
    for key, features in zip(keys, features_TD, strict=True):
        try:
            stored.append(to_stored(features, extraction.identity["store_dtype"]))
            usable.append(key)
        except UnusableError as error:
            quarantined.append((key, str(error)))
    try:
        commit_shard(Path(extraction.directory), result.shard, usable, stored, quarantined)
    except OSError as error:
        failure = f"{extraction.directory}: shard {result.shard} cannot be written ({error}); make room and run again"
        return replace(result, failure=failure, fault="cache")
    return replace(result, quarantined=tuple(quarantined))


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """No progress bars, plans and statistics on the terminal; Ray's own log files keep them."""
    context = ray.data.DataContext.get_current()
    quiet = {"enable_progress_bars": False, "print_on_execution_start": False, "enable_auto_log_stats": False}
    before = {name: getattr(context, name) for name in quiet}
    consoles = [
        handler for handler in logging.getLogger("ray.data").handlers if isinstance(handler, logging.StreamHandler)
    ]
    levels = [handler.level for handler in consoles]
    for name, value in quiet.items():
        setattr(context, name, value)
    for console in consoles:
        console.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for console, level in zip(consoles, levels, strict=True):
            console.setLevel(level)
