"""Features of a study's images: what is cached is taken, the rest is extracted, and the cache is sealed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from filelock import Timeout

from lowrank_tune.caches.catalog import nearest_cache, only_writer
from lowrank_tune.caches.identity import fingerprint
from lowrank_tune.caches.sealed import Contents, read_sealed
from lowrank_tune.caches.shards import SHARD_ROWS, shard_name
from lowrank_tune.errors import CacheError, InputError, LowrankTuneError
from lowrank_tune.features.cache import recover, seal
from lowrank_tune.features.checkpoint import find_tower, read_checkpoint_config
from lowrank_tune.features.files import Quarantine, SourceFiles, hash_files
from lowrank_tune.features.identity import image_identity, tensor_identity
from lowrank_tune.features.jobs import Extraction, ImageEncoding, ShardPlan, ShardResult
from lowrank_tune.features.record_table import write_record_table
from lowrank_tune.features.sources import SourceRecords, read_records
from lowrank_tune.records import FeatureSet
from lowrank_tune.spec.features import FeaturesSpec, TensorSource

_logger = logging.getLogger(__name__)

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
            note = on_note or _logger.warning
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
    from lowrank_tune.features.tensors import first_shape

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
    from lowrank_tune.features.pool import find_pool
    from lowrank_tune.features.workers import run_extraction
    from lowrank_tune.session import ray_session

    with ray_session(address):
        pool = find_pool(spec, len(plans), note)
        _logger.info("extracting %d shards with %s", len(plans), pool)
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
