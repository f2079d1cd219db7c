"""Features of a study's images: what is cached is taken, the rest is extracted, and the cache is sealed."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from filelock import Timeout

from lowrank_tune.config.schema import FeaturesSpec, TensorSource
from lowrank_tune.errors import CacheError, InputError, LowrankTuneError
from lowrank_tune.features.cache import (
    SHARD_ROWS,
    TENSOR,
    Contents,
    Extraction,
    ImageEncoding,
    ShardPlan,
    ShardResult,
    UnusableError,
    commit_shard,
    fingerprint,
    image_identity,
    read_sealed,
    recover,
    seal,
    shard_name,
    tensor_identity,
    to_stored,
)
from lowrank_tune.features.checkpoint import find_tower, read_checkpoint_config
from lowrank_tune.features.decoding import decode_shard, read_unchanged
from lowrank_tune.features.remote import nearest_cache, only_writer
from lowrank_tune.features.sources import (
    Quarantine,
    SourceFiles,
    SourceRecords,
    check_shape,
    hash_files,
    load_tensor,
    read_records,
    write_record_table,
)
from lowrank_tune.records import FeatureSet

if TYPE_CHECKING:
    import ray.data
    import torch

logger = logging.getLogger(__name__)

FIELDS_SHOWN = 5

Progress = Callable[[int, int], None]
Notes = Callable[[str], None]


def extract_features(
    spec: FeaturesSpec,
    cache_root: Path,
    *,
    seed: int,
    on_progress: Progress | None = None,
    on_note: Notes | None = None,
    address: str | None = None,
) -> FeatureSet:
    """Make sure that the features of every image of a source are cached.

    What is cached already costs the hashing of the images' bytes, and where nothing is missing Ray is not even loaded.
    The rest runs on Ray Data, in the caller's Ray or, where there is none, in one that is gone afterwards. A run that
    is killed at any moment is continued by the next one.

    Args:
        spec: the source, the encoder and how features are kept.
        cache_root: the folder of the caches, `results/features`; every Ray node must see it under this path.
        seed: which crops, for sample images.
        on_progress: called with the number of distinct images dealt with and their total.
        on_note: called with a sentence: in what a new cache differs from those that are there, or what is waited for.
        address: the Ray to start or to join where the caller has none; as for `ray_session`.

    Raises:
        InputError: the source, the checkpoint or `cache_root` cannot be used, or too many images are broken.
        CacheError: a cache with this fingerprint is damaged, or a shard could not be written.
    """
    try:
        records = read_records(spec.source, cache_root, seed)
        files = hash_files(records)
        extraction = plan_extraction(spec, cache_root, records)
        directory = Path(extraction.directory)
        contents = read_sealed(directory, extraction.identity)
        quarantine = Quarantine(files, spec.max_quarantined)
        quarantine.check(contents.quarantined if contents else {})
        progress = on_progress or (lambda done, total: None)
        if contents is None or contents.missing(files.paths):
            note = on_note or logger.warning
            _explain(extraction, note)
            with only_process(directory, note, "extracting"):
                contents = _extend(extraction, spec, files, quarantine, progress, note, address)
        else:
            progress(len(files.paths), len(files.paths))
        return _feature_set(extraction, contents, records, quarantine)
    except OSError as error:
        root, place = cache_root.absolute(), Path(error.filename or cache_root).absolute()
        if not place.is_relative_to(root) and not root.is_relative_to(place):
            raise InputError(
                f"{error.filename}: cannot be read ({error.strerror}); see that its place answers"
            ) from error
        raise InputError(
            f"{cache_root}: cannot hold the feature cache ({error}); free it, or choose another results directory"
        ) from error


def known_images(spec: FeaturesSpec, cache_root: Path, seed: int) -> tuple[str, list[str]]:
    """The cache that a source's features belong into, and the keys of its readable images; nothing is extracted.

    Raises:
        InputError: the source or the checkpoint cannot be used.
    """
    records = read_records(spec.source, cache_root, seed)
    fingerprint = Path(plan_extraction(spec, cache_root, records).directory).name
    return fingerprint, list(hash_files(records).paths)


def import_tensors(
    directory: Path,
    cache_root: Path,
    *,
    store_dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    max_quarantined: float = 0.05,
    on_progress: Progress | None = None,
    on_note: Notes | None = None,
    address: str | None = None,
) -> FeatureSet:
    """Take ready features into the cache that a study with `source: {tensors: directory}` looks in.

    Args:
        directory: has `features_N.pt`, one tensor [T, D] each.
        cache_root: the folder of the caches, `results/features`.
        store_dtype: what the cache stores.
        max_quarantined: the fraction of broken files above which the import fails.
        on_progress: as for `extract_features`.
        on_note: as for `extract_features`.
        address: as for `extract_features`.

    Raises:
        InputError: as for `extract_features`.
        CacheError: as for `extract_features`.
    """
    source = TensorSource(tensors=str(directory))
    spec = FeaturesSpec(source=source, store_dtype=store_dtype, max_quarantined=max_quarantined)
    return extract_features(spec, cache_root, seed=0, on_progress=on_progress, on_note=on_note, address=address)


def probe_shape(spec: FeaturesSpec, cache_root: Path, seed: int) -> tuple[int, int]:
    """Tokens and dim that `extract_features` will give, from configuration files or the first tensor alone.

    Args:
        spec: the source and the encoder.
        cache_root: `tiny-random` is written below it at its first use.
        seed: not used by any source's shape; here so that both functions are called alike.

    Raises:
        InputError: the checkpoint, or the directory of tensors, cannot be used.
    """
    if isinstance(spec.source, TensorSource):
        return _first_shape(read_records(spec.source, cache_root, seed))
    return read_checkpoint_config(spec.encoder.checkpoint, cache_root).shape(spec.encoder.image_size)


def plan_extraction(spec: FeaturesSpec, cache_root: Path, records: SourceRecords) -> Extraction:
    """Find out what the features depend on, and so which cache holds them; no weight is loaded.

    Args:
        spec: the encoder and how features are kept.
        cache_root: the folder of the caches.
        records: the source; the first usable one of ready tensors gives their shape.

    Raises:
        InputError: the checkpoint, or the directory of tensors, cannot be used.
    """
    root = cache_root.absolute()
    if isinstance(spec.source, TensorSource):
        identity = tensor_identity(spec, *_first_shape(records))
        return Extraction(str(root / fingerprint(identity)), identity, "imported tensors", "unknown", None)
    config = read_checkpoint_config(spec.encoder.checkpoint, root)
    tower = find_tower(config, root)
    identity = image_identity(spec, config, tower.digest())
    encoding = ImageEncoding(config, tower, spec.encoder.image_size, spec.encoder.compute_dtype)
    return Extraction(str(root / fingerprint(identity)), identity, config.name, config.weights, encoding)


def _first_shape(records: SourceRecords) -> tuple[int, int]:
    # torch takes seconds to import, and only ready tensors need it here.
    from lowrank_tune.features.sources import first_shape

    return first_shape(path for path in records.paths if path is not None)


def _explain(extraction: Extraction, note: Notes) -> None:
    """Before a cache is begun: in what it differs from the one that is most like it."""
    directory = Path(extraction.directory)
    if not directory.exists():
        name, differ = nearest_cache(directory.parent, extraction.identity)
        if name:
            more = f"; and {len(differ) - FIELDS_SHOWN} more" if len(differ) > FIELDS_SHOWN else ""
            note(
                f"cache {directory.name} is new; {name} was made differently: {'; '.join(differ[:FIELDS_SHOWN])}{more}"
            )


def _extend(
    extraction: Extraction,
    spec: FeaturesSpec,
    files: SourceFiles,
    quarantine: Quarantine,
    on_progress: Progress,
    note: Notes,
    address: str | None,
) -> Contents:
    """Extract what is missing and seal the cache; call it only while holding the cache's lock."""
    directory = Path(extraction.directory)
    contents = recover(directory, extraction.identity)
    missing = contents.missing(files.paths)
    total = len(files.paths)
    done = total - len(missing)
    on_progress(done, total)
    if missing:
        reasons = dict(contents.quarantined)
        plans = plan_shards(missing, files.paths)
        with contextlib.closing(_make_shards(extraction, spec, plans, address, note)) as results:
            for result in results:
                reasons |= dict(result.quarantined)
                quarantine.check(reasons)
                done += result.images
                on_progress(done, total)
    return seal(directory, extraction.identity, extraction.encoder, extraction.weights)


def plan_shards(missing: Sequence[str], paths: Mapping[str, Path]) -> list[ShardPlan]:
    """Which shards hold what is missing.

    Args:
        missing: keys of images.
        paths: key -> file; empty where the images are not files.
    """
    plans = []
    for first in range(0, len(missing), SHARD_ROWS):
        keys = tuple(missing[first : first + SHARD_ROWS])
        plans.append(ShardPlan(shard_name(keys), keys, tuple(str(paths[key]) for key in keys if paths)))
    return plans


def delivered(made: Generator[ShardResult, None, None], work: str) -> Generator[ShardResult, None, None]:
    """Pass on what Ray's workers made, shard by shard, until one fails; what was committed before it stays.

    Args:
        made: their answers.
        work: what they do, for messages.

    Raises:
        InputError: a shard failed by what the user gave.
        CacheError: or by the files of a cache.
        LowrankTuneError: or Ray did.
    """
    from ray.exceptions import RayError

    try:
        with contextlib.closing(made):
            for result in made:
                if result.failure:
                    raise (InputError if result.fault == "input" else CacheError)(result.failure)
                yield result
    except RayError as error:
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        raise LowrankTuneError(f"{work} stopped ({reason}); what is committed stays, run again") from error


def _make_shards(
    extraction: Extraction, spec: FeaturesSpec, plans: Sequence[ShardPlan], address: str | None, note: Notes
) -> Generator[ShardResult, None, None]:
    """Have the shards made, and tell of each one."""
    # A run that finds everything in the cache spends no time on importing torch and Ray.
    from lowrank_tune.runtime import ray_session

    with ray_session(address):
        pool = find_pool(spec, len(plans), note)
        logger.info("extracting %d shards with %s", len(plans), pool)
        yield from delivered(run_extraction(extraction, plans, pool), f"the extraction into {extraction.directory}")


@contextlib.contextmanager
def only_process(directory: Path, note: Notes, doing: str) -> Iterator[None]:
    """Hold a cache's lock; told that another process does the same, wait for it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(only_writer(directory, timeout=0))
        except Timeout:
            note(f"another process is {doing} into {directory}: waiting for it")
            stack.enter_context(only_writer(directory))
        yield


def _feature_set(
    extraction: Extraction, contents: Contents, records: SourceRecords, quarantine: Quarantine
) -> FeatureSet:
    files = quarantine.files
    errors = quarantine.errors(contents.quarantined)
    quarantine.check(contents.quarantined)
    table = write_record_table(Path(extraction.directory), records, files.keys, errors)
    return FeatureSet(
        directory=extraction.directory,
        fingerprint=Path(extraction.directory).name,
        encoder=extraction.encoder,
        weights=extraction.weights,
        dtype=extraction.identity["store_dtype"],
        tokens=extraction.identity["tokens"],
        dim=extraction.identity["dim"],
        rows=tuple(contents.rows[key] for key in files.paths if key in contents.rows),
        records_path=str(table),
        quarantined=sum(error is not None for error in errors),
    )


DECODE_CPUS = 0.5
"""What a decoding task reserves: it waits for storage about as long as it computes."""

LEAST_CPUS = 0.4
"""What an encoder reserves where there is no whole CPU for it.

Not as much as a decoding task, or Ray Data would fuse the two stages; and with it as many encoders as the cluster has
CPUs leave room for a decoding task on some machine, however they are placed.
"""

SHRINK_AFTER_S = 20.0
"""How long to wait for the whole of what would be had without other work: what ended just now is still giving it back.
"""

_LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster has, or has free."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Pool:
    """The resources of an extraction.

    Attributes:
        actors: encoders.
        gpus_each: GPUs an encoder; 0 where the cluster has none.
        cpus_each: CPUs an encoder reserves.
        threads: torch threads an encoder.
        batch: images an encoder takes at once; None for what fills its device.
        decoders: decoding tasks at once; None for as many as fit.
    """

    actors: int
    gpus_each: float
    cpus_each: float
    threads: int
    batch: int | None = None
    decoders: int | None = None


def find_pool(
    spec: FeaturesSpec, shards: int, note: Callable[[str], None], shrink_after_s: float = SHRINK_AFTER_S
) -> Pool:
    """Divide the Ray cluster that is connected, and wait until other work leaves the pool its room.

    Args:
        spec: `actors`, `batch_size` and `decoders`; `auto` actors become fewer where other work holds the rest.
        shards: how many shards there are to make.
        note: told, once, what is waited for.
        shrink_after_s: how long to wait for the whole pool before a smaller one will do.

    Raises:
        InputError: the cluster has not what the study file asks for.
    """
    import ray

    nodes = [_node(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    if isinstance(spec.source, TensorSource):  # nothing is encoded, so GPUs do not matter
        nodes = [Node(node.cpus, 0) for node in nodes]
    pool = plan_pool(spec, shards, nodes)
    began, told = time.monotonic(), False
    while not _fits(pool, free := _node(ray.available_resources())):
        if time.monotonic() - began > shrink_after_s:
            smaller = shrink_pool(pool, free, fewer=spec.actors == "auto")
            if smaller is not None:
                logger.warning("other work holds some of the Ray cluster; extracting with %s", smaller)
                return smaller
            if not told:
                note(f"waiting for other work to end: {_lack(pool, nodes, free, fewer=spec.actors == 'auto')}")
                told = True
        time.sleep(_LOOK_EVERY_S)
    return pool


def plan_pool(spec: FeaturesSpec, shards: int, nodes: Sequence[Node]) -> Pool:
    """Divide a cluster between encoders and decoding so that both always fit.

    Args:
        spec: `actors` is a number, or `auto` for one a GPU and, without GPUs, one a machine.
        shards: how many shards there are to make; more encoders than that are never started.
        nodes: the cluster's machines.

    Raises:
        InputError: the cluster has no CPU, or not what so many encoders need.
    """
    cpus, on_gpus = sum(int(node.cpus) for node in nodes), any(node.gpus >= 1 for node in nodes)
    if cpus < 1:
        raise InputError("the Ray cluster has no CPU to decode images with; start it with at least one (num_cpus)")
    most = _places(nodes, 1, on_gpus)
    wanted = spec.actors if spec.actors != "auto" else max(1, most if on_gpus else _large_machines(nodes))
    if wanted > most:
        need = "a GPU and a CPU of the same machine" if on_gpus else "a CPU"
        raise InputError(
            f"features.actors: {wanted} encoders need {need} each, the Ray cluster ({_shown(nodes)}) has room for "
            f"{most}; {f'ask for at most {most}, or auto' if most else 'start a machine that has both'}"
        )
    actors = min(shards, wanted)
    decoding = max(1, cpus // 4) if cpus > 1 else DECODE_CPUS
    ideal = min((cpus - decoding) / actors, 1 if on_gpus else max(node.cpus for node in nodes))
    cpus_each = next(each for each in _shares(ideal) if _places(nodes, each, on_gpus) >= actors)
    return Pool(
        actors=actors,
        gpus_each=1 if on_gpus else 0,
        cpus_each=cpus_each,
        threads=max(1, int(cpus_each)),
        batch=None if spec.batch_size == "auto" else spec.batch_size,
        decoders=None if spec.decoders == "auto" else spec.decoders,
    )


def shrink_pool(pool: Pool, free: Node, *, fewer: bool) -> Pool | None:
    """Make do with what other work leaves: encoders with fewer CPUs, and fewer encoders if that is allowed.

    Args:
        pool: what would be had without other work.
        free: what is free of all machines, together.
        fewer: whether there may be fewer encoders.

    Returns:
        None where it leaves too little.
    """
    for actors in range(pool.actors, 0 if fewer else pool.actors - 1, -1):
        for cpus_each in _shares(pool.cpus_each):
            smaller = replace(pool, actors=actors, cpus_each=cpus_each, threads=max(1, int(cpus_each)))
            if _fits(smaller, free):
                return smaller
    return None


def _lack(pool: Pool, nodes: Sequence[Node], free: Node, *, fewer: bool) -> str:
    encoders = 1 if fewer else pool.actors
    gpus = f"{encoders * pool.gpus_each:g} GPUs and " if pool.gpus_each else ""
    return (
        f"the extraction needs at least {gpus}{encoders * LEAST_CPUS + DECODE_CPUS:g} CPUs for {encoders} encoders and "
        f"a decoding task; the Ray cluster has {_shown(nodes)}, of which {_shown([free])} are free"
        f"{'' if fewer else '; a lower features.actors would need less'}"
    )


def _node(resources: Mapping[str, float]) -> Node:
    return Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def _fits(pool: Pool, free: Node) -> bool:
    cpus = pool.actors * pool.cpus_each + DECODE_CPUS
    return cpus <= free.cpus + 1e-4 and pool.actors * pool.gpus_each <= free.gpus + 1e-4


def _shares(most: float) -> Iterator[float]:
    """CPUs that an encoder may reserve, falling."""
    yield from range(int(most), 0, -1)
    yield LEAST_CPUS


def _places(nodes: Sequence[Node], cpus_each: float, on_gpus: bool) -> int:
    """How many encoders fit the cluster."""
    by_cpus = [int(int(node.cpus) / cpus_each) for node in nodes]
    return sum(min(place, int(node.gpus)) if on_gpus else place for place, node in zip(by_cpus, nodes, strict=True))


def _large_machines(nodes: Sequence[Node]) -> int:
    """How many machines have at least half of what the largest has: an encoder on each keeps them busy."""
    largest = max(node.cpus for node in nodes)
    return sum(node.cpus >= largest / 2 for node in nodes)


def _shown(nodes: Sequence[Node]) -> str:
    return f"{sum(node.cpus for node in nodes):g} CPUs, {sum(node.gpus for node in nodes):g} GPUs"


CALLS_AT_ONCE = 3
"""Threads of an encoder: one shard is encoded while two are written, for writing may take longer than encoding."""

START_PATIENCE_S = 600
"""How long encoders may take to start; what they need was free a moment ago, and a tower on a slow mount takes time."""


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
                    logger.warning(note)
                yield result


def _plan(extraction: Extraction, plans: Sequence[ShardPlan], pool: Pool) -> ray.data.Dataset:
    """The dataset whose rows are the shards' results: reading and decoding on CPUs, then the encoders."""
    import ray.data

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
        # Both take seconds to import, which the driver need not spend.
        import torch

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
        import torch

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
    import torch

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
        commit_shard(Path(extraction.directory), result.shard, keys, {TENSOR: features_NTD}, result.quarantined)
    except OSError as error:
        failure = f"{extraction.directory}: shard {result.shard} cannot be written ({error}); make room and run again"
        return replace(result, failure=failure, fault="cache")
    return result


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """No progress bars, plans and statistics on the terminal, Ray's own log files keep them; and no endless waiting."""
    import ray.data

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
