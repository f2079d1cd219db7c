"""The extraction as Ray Data sees it: one row is one shard, and the worker that makes a shard's features commits it.

Only pixels and small results travel through the object store, features never do. N images, H = W pixels, T tokens,
D dim.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Generator, Iterator, Sequence
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

CALLS_AT_ONCE = 3
"""Threads of an encoder: one shard is encoded while two are written, for writing may take longer than encoding."""

START_PATIENCE_S = 600
"""How long encoders may take to start; what they need was free a moment ago, and a tower on a slow mount takes time."""

_logger = logging.getLogger(__name__)

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
    with quiet_ray_data():
        results = _plan(extraction, plans, pool)
        # Without prefetching, a result is told when it is there and not when the next one is.
        for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
            for text in batch["result"]:
                result = ShardResult.load(text)
                for note in result.notes:
                    _logger.warning(note)
                yield result


def _plan(extraction: Extraction, plans: Sequence[ShardPlan], pool: Pool) -> ray.data.Dataset:
    """The dataset whose rows are the shards' results: reading and decoding on CPUs, then the encoders."""
    rows = [{"plan": plan.dump()} for plan in plans]
    shards = ray.data.from_items(rows, override_num_blocks=len(rows))
    if extraction.encoding is None:
        return shards.map(import_shard, fn_kwargs={"extraction": extraction})
    decoded = shards.map(
        decode_shard,
        fn_kwargs={"image_size": extraction.encoding.image_size},
        num_cpus=DECODE_CPUS,
        compute=ray.data.TaskPoolStrategy(size=pool.decoders),
    )
    return decoded.map_batches(
        ShardEncoder,
        fn_constructor_kwargs={"extraction": extraction, "pool": pool},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=pool.actors,
            max_concurrent_calls_per_actor=CALLS_AT_ONCE,
            max_tasks_in_flight_per_actor=2 * CALLS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        num_cpus=pool.cpus_each,
        num_gpus=pool.gpus_each,
    )


class ShardEncoder:
    """An actor of the pool: one tower, one shard a call.

    Its threads take turns at the tower: while one shard is encoded, the ones before it are written.

    Args:
        extraction: what to do.
        pool: threads and batch size of this process, and whether it has a GPU.
    """

    def __init__(self, extraction: Extraction, pool: Pool) -> None:
        # transformers takes seconds to import, which the driver need not spend.
        from lowrank_tune.features.encoder import Encoder

        torch.set_num_threads(pool.threads)
        self.extraction = extraction
        self.problem = ""
        encoding = extraction.encoding
        if encoding is None:
            raise ValueError("an extraction without an encoding has no use for an encoder")
        try:
            device = _device(pool)
            self.encoder = Encoder(encoding.config, encoding.tower, encoding.compute_dtype, device, pool.batch)
        except Exception as error:
            # Ray would start an actor that fails here again and again; its first result brings the message home.
            self.problem = str(error) if isinstance(error, InputError) else f"the encoder did not start: {error!r}"

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
            try:
                result = self._make(result, json.loads(batch["keys"][0]), batch["pixels"][0])
            except InputError as error:
                result = replace(result, failure=str(error), fault="input")
        return {"result": [result.dump()]}

    def _make(self, result: ShardResult, keys: list[str], pixels_NHWC: npt.NDArray[np.uint8]) -> ShardResult:
        store_dtype = self.extraction.identity["store_dtype"]
        encoded = self.encoder.start(pixels_NHWC, getattr(torch, store_dtype)).wait()
        quarantined = list(result.quarantined)
        usable = []
        for row, key in enumerate(keys):
            try:
                # What the largest value fits, every value fits.
                to_stored(encoded.largest_N[row, None], store_dtype)
                usable.append(row)
            except UnusableError as error:
                quarantined.append((key, str(error)))
        result = replace(result, quarantined=tuple(quarantined), notes=encoded.notes)
        features_NTD = encoded.features_NTD if len(usable) == len(keys) else encoded.features_NTD[usable]
        return _commit(self.extraction, result, [keys[row] for row in usable], features_NTD)


def _device(pool: Pool) -> str:
    """Where this actor encodes.

    Raises:
        InputError: Ray gave it a GPU that torch does not see.
    """
    if not pool.gpus_each:
        return "cpu"
    if not torch.cuda.is_available():
        raise InputError(
            f"{socket.gethostname()}: the Ray cluster has a GPU here, but torch {torch.__version__} sees none; install "
            "a torch built for it and its driver, or start Ray without GPUs (num_gpus=0)"
        )
    return "cuda"


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
                tensors.append(to_stored(tensor, extraction.identity["store_dtype"]))
                keys.append(key)
            except UnusableError as error:
                quarantined.append((key, str(error)))
    except OSError as error:
        return {"result": ShardResult(plan.shard, len(plan.keys), failure=f"{error}; run again", fault="input").dump()}
    result = ShardResult(plan.shard, len(plan.keys), tuple(quarantined))
    return {"result": _commit(extraction, result, keys, tensors).dump()}


def _commit(
    extraction: Extraction,
    result: ShardResult,
    keys: Sequence[str],
    features_NTD: torch.Tensor | Sequence[torch.Tensor],
) -> ShardResult:
    """Commit the shard, in the cache's dtype already."""
    try:
        commit_shard(Path(extraction.directory), result.shard, keys, features_NTD, result.quarantined)
    except OSError as error:
        failure = f"{extraction.directory}: shard {result.shard} cannot be written ({error}); make room and run again"
        return replace(result, failure=failure, fault="cache")
    return result


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """No progress bars, plans and statistics on the terminal, Ray's own log files keep them; and no endless waiting."""
    context = ray.data.DataContext.get_current()
    quiet = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "enable_auto_log_stats": False,
        "wait_for_min_actors_s": START_PATIENCE_S,
    }
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
