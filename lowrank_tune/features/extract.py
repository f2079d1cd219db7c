"""Features of a study's images: what is cached is taken, the rest is extracted, and the cache is sealed."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.config.source import TensorSource
from lowrank_tune.errors import InputError
from lowrank_tune.features.cache import fingerprint
from lowrank_tune.features.checkpoint import CheckpointConfig, TowerFiles, find_tower, read_checkpoint_config
from lowrank_tune.features.commits import TENSOR, Identity, UnusableError, to_stored
from lowrank_tune.features.decoding import decode_shard, fits_now
from lowrank_tune.features.images import SourceRecords, hash_files, read_unchanged, write_record_table
from lowrank_tune.features.remote import nearest_cache
from lowrank_tune.features.shards import (
    DECODE_CPUS,
    Made,
    Node,
    Notes,
    Pool,
    Progress,
    Row,
    ShardJob,
    ShardPlan,
    fill,
    shares,
    shown,
)
from lowrank_tune.features.sources import read_records
from lowrank_tune.features.tensors import common_shape, load_tensor
from lowrank_tune.features.tiny import TINY_RANDOM
from lowrank_tune.records import FeatureSet

if TYPE_CHECKING:
    import ray.data

    from lowrank_tune.features.encoder import Encoder

FIELDS_SHOWN = 5
CALLS_AT_ONCE = 3
"""Shards an encoder has in hand: one is encoded while two are written, for writing may take longer than encoding."""

FORWARD_VERSION = 3
"""Counts up with every change of the forward or decoding code that can change a value.

2: bfloat16, and float32 on a GPU, take steps that round otherwise than transformers' own; 16-bit images are scaled.
3: what is transparent shows white in every mode; HEIF and 32-bit pixels of an evident range are read.
"""

IMPORT_VERSION = 1
"""Likewise for ready tensors, which no forward touches."""

_VISION_DEFAULTS = {
    "depth": None,
    "fullatt_block_indexes": None,
    "hidden_act": "silu",
    "hidden_size": None,
    "intermediate_size": None,
    "num_heads": None,
    "out_hidden_size": None,
    "patch_size": None,
    "rope_parameters": None,
    "spatial_merge_size": None,
    "temporal_patch_size": 2,
    "window_size": None,
}
_PREPROCESSOR_KEYS = ("image_mean", "image_std", "rescale_factor")


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
        on_note: called with a sentence: what of the source was left out, in what a new cache differs from those that
            are there, or what is waited for.
        address: the Ray to start or to join where the caller has none; as for `ray_session`.

    Raises:
        InputError: the source, the checkpoint or `cache_root` cannot be used, or too many images are broken.
        CacheError: a cache with this fingerprint is damaged, or a shard could not be written.
    """
    try:
        records = read_records(spec.source, cache_root, seed)
        if on_note:
            for sentence in records.notes:
                on_note(sentence)
        files = hash_files(records)
        job = plan_extraction(spec, cache_root, records)
        directory, limit = Path(job.directory), spec.max_quarantined
        contents = fill(
            job,
            files.images,
            lambda quarantined: files.check(quarantined, limit, "features.source", "features.max_quarantined"),
            doing="extracting",
            progress=on_progress,
            note=on_note,
            address=address,
            claim=lambda note: _explain(job, note),
        )
        errors = files.errors(contents.quarantined)
        return FeatureSet(
            directory=job.directory,
            fingerprint=directory.name,
            encoder=job.encoder,
            weights=job.weights,
            dtype=job.identity["store_dtype"],
            tokens=job.identity["tokens"],
            dim=job.identity["dim"],
            rows=tuple(contents.rows[key] for key in files.images if key in contents.rows),
            records_path=str(write_record_table(directory, records, files.keys, errors)),
            quarantined=sum(error is not None for error in errors),
        )
    except OSError as error:
        raise _unusable(cache_root, error) from error


def _unusable(cache_root: Path, error: OSError) -> InputError:
    """Of the source where the error is of a path elsewhere, else of the cache."""
    root, place = cache_root.absolute(), Path(error.filename or cache_root).absolute()
    if not place.is_relative_to(root) and not root.is_relative_to(place):
        return InputError(f"{error.filename}: cannot be read ({error.strerror}); see that its place answers")
    return InputError(
        f"{cache_root}: cannot hold the feature cache ({error}); free it, or choose another results directory"
    )


def _explain(job: ShardJob, note: Notes) -> None:
    """Before a cache is begun: how its checkpoint was read, and in what it differs from the one most like it."""
    directory = Path(job.directory)
    if isinstance(job, EncodeImages) and not directory.exists():
        for sentence in job.config.notes:
            note(sentence)
    name, differ = nearest_cache(directory.parent, job.identity) if not directory.exists() else ("", [])
    if name:
        more = f"; and {len(differ) - FIELDS_SHOWN} more" if len(differ) > FIELDS_SHOWN else ""
        note(f"cache {directory.name} is new; {name} was made differently: {'; '.join(differ[:FIELDS_SHOWN])}{more}")


def known_images(spec: FeaturesSpec, cache_root: Path, seed: int) -> tuple[str, list[str]]:
    """The cache that a source's features belong into, and the keys of its readable images; nothing is extracted.

    Raises:
        InputError: the source or the checkpoint cannot be used.
    """
    records = read_records(spec.source, cache_root, seed)
    return Path(plan_extraction(spec, cache_root, records).directory).name, list(hash_files(records).images)


def probe_shape(spec: FeaturesSpec, cache_root: Path, seed: int) -> tuple[int, int]:
    """Tokens and dim that `extract_features` will give, from configuration files or what the files of tensors tell.

    Of a checkpoint in a directory the weights are looked for as well, but not loaded.

    Raises:
        InputError: the checkpoint, or the directory of tensors, cannot be used.
    """
    if isinstance(spec.source, TensorSource):
        return common_shape(read_records(spec.source, cache_root, seed), spec.max_quarantined)
    config = read_checkpoint_config(spec.encoder.checkpoint, cache_root)
    if config.revision is None and config.name != TINY_RANDOM:
        find_tower(config, cache_root)
    return config.shape(spec.encoder.image_size)


def plan_extraction(spec: FeaturesSpec, cache_root: Path, records: SourceRecords) -> EncodeImages | ImportTensors:
    """Find out what the features depend on, and so which cache holds them; no weight is loaded.

    Args:
        spec: the encoder and how features are kept.
        cache_root: the folder of the caches.
        records: the source; most of ready tensors give their shape.

    Raises:
        InputError: the checkpoint, or the directory of tensors, cannot be used.
    """
    root = cache_root.absolute()
    if isinstance(spec.source, TensorSource):
        tokens, dim = common_shape(records, spec.max_quarantined)
        identity = {"kind": "tensors", "forward": IMPORT_VERSION, "store_dtype": spec.store_dtype}
        identity |= {"tokens": tokens, "dim": dim}
        return ImportTensors(str(root / fingerprint(identity)), identity, "imported tensors", "unknown")
    return plan_encoding(spec, root)


def plan_encoding(spec: FeaturesSpec, cache_root: Path) -> EncodeImages:
    """`plan_extraction` of images, whichever these are."""
    root = cache_root.absolute()
    config = read_checkpoint_config(spec.encoder.checkpoint, root)
    tower = find_tower(config, root)
    identity = image_identity(spec, config, tower.digest())
    directory = root / fingerprint(identity)
    if not directory.exists():  # else it was found sound, and torch, which takes seconds to import, is not needed
        from lowrank_tune.features.encoder import check_tower

        check_tower(config, tower)
    return EncodeImages(str(directory), identity, config.name, config.weights, config, tower, spec)


def image_identity(spec: FeaturesSpec, config: CheckpointConfig, weights_digest: str) -> Identity:
    """What the features of an image depend on, beside its bytes."""
    tokens, dim = config.shape(spec.encoder.image_size)
    return {
        "kind": "images",
        "forward": FORWARD_VERSION,
        "weights": weights_digest,
        "vision": {key: config.vision.get(key, default) for key, default in _VISION_DEFAULTS.items()},
        "preprocessing": {key: config.preprocessor.get(key) for key in _PREPROCESSOR_KEYS},
        "image_size": spec.encoder.image_size,
        "compute_dtype": spec.encoder.compute_dtype,
        "store_dtype": spec.store_dtype,
        "tokens": tokens,
        "dim": dim,
    }


@dataclass(frozen=True)
class ImportTensors(ShardJob):
    """Ready tensors -> features, on CPU workers."""

    def open(self, pool: Pool) -> Callable[[ShardPlan, Row], Made]:
        """Load and check the tensors of one shard."""

        def make(plan: ShardPlan, row: Row) -> Made:
            keys, tensors, quarantined = [], [], []
            shape = self.identity["tokens"], self.identity["dim"]
            for key, image in zip(plan.keys, plan.images, strict=True):
                try:
                    tensor = load_tensor(read_unchanged(image, key), shape)
                    tensors.append(to_stored(tensor, self.identity["store_dtype"]))
                    keys.append(key)
                except UnusableError as error:
                    quarantined.append((key, str(error)))
            return Made(keys, {TENSOR: tensors}, quarantined)

        return make


@dataclass(frozen=True)
class EncodeImages(ShardJob):
    """Images -> features: decoded in tasks on CPUs, encoded in workers that have a vision tower each."""

    config: CheckpointConfig
    tower: TowerFiles
    spec: FeaturesSpec

    def pool(self, shards: int, nodes: Sequence[Node]) -> Pool:
        """Divide a cluster between encoders and decoding so that both always fit.

        `features.actors` is a number, or `auto` for one a GPU and, without GPUs, one a large machine; more encoders
        than shards are never started.

        Raises:
            InputError: the cluster has no CPU, or not what so many encoders need.
        """
        cpus, on_gpus = sum(int(node.cpus) for node in nodes), any(node.gpus >= 1 for node in nodes)
        if cpus < 1:
            raise InputError("the Ray cluster has no CPU to decode images with; start it with at least one (num_cpus)")
        most, asked = _places(nodes, 1, on_gpus), self.spec.actors
        # A machine with at least half of what the largest has is kept busy by one encoder of its own.
        large = sum(node.cpus >= max(node.cpus for node in nodes) / 2 for node in nodes)
        wanted = asked if asked != "auto" else max(1, most if on_gpus else large)
        if wanted > most:
            need = "a GPU and a CPU of the same machine" if on_gpus else "a CPU"
            raise InputError(
                f"features.actors: {wanted} encoders need {need} each, the Ray cluster ({shown(nodes)}) has room for "
                f"{most}; {f'ask for at most {most}, or auto' if most else 'start a machine that has both'}"
            )
        number = min(shards, wanted)
        decoding = max(1, cpus // 4) if cpus > 1 else DECODE_CPUS
        ideal = min((cpus - decoding) / number, 1 if on_gpus else max(node.cpus for node in nodes))
        each = next(each for each in shares(ideal) if _places(nodes, each, on_gpus) >= number)
        return Pool(
            least=1 if asked == "auto" else number,
            most=number,
            cpus=each,
            gpus=1 if on_gpus else 0,
            threads=max(1, int(each)),
            calls=CALLS_AT_ONCE,
            decoding=True,
        )

    def holds(self, reason: str) -> bool:
        """Not that an image has too many pixels, where features.max_pixels was raised since."""
        return not fits_now(reason, self.spec.max_pixels)

    def prepare(self, shards: ray.data.Dataset) -> ray.data.Dataset:
        """Read and decode, in tasks."""
        import ray.data

        return shards.map(
            decode_shard,
            fn_kwargs={"image_size": self.spec.encoder.image_size, "max_pixels": self.spec.max_pixels},
            num_cpus=DECODE_CPUS,
            compute=ray.data.TaskPoolStrategy(size=None if self.spec.decoders == "auto" else self.spec.decoders),
        )

    def load_encoder(self, pool: Pool) -> Encoder:
        """Load the tower, onto a worker's GPU where the pool gives it one.

        Raises:
            InputError: torch sees no GPU, or as `Encoder`.
        """
        # Both take seconds to import, which the driver need not spend.
        import torch

        from lowrank_tune.features.encoder import Encoder

        if pool.gpus and not torch.cuda.is_available():
            raise InputError(
                f"{socket.gethostname()}: the Ray cluster has a GPU here, but torch {torch.__version__} sees none; "
                "install a torch built for it and its driver, or start Ray without GPUs (num_gpus=0)"
            )
        batch = None if self.spec.batch_size == "auto" else self.spec.batch_size
        device = "cuda" if pool.gpus else "cpu"
        return Encoder(self.config, self.tower, self.spec.encoder.compute_dtype, device, batch)

    def open(self, pool: Pool) -> Callable[[ShardPlan, Row], Made]:
        """Load the tower; threads that make shards take turns at it, while others write theirs."""
        import torch

        encoder, store_dtype = self.load_encoder(pool), self.identity["store_dtype"]

        def make(plan: ShardPlan, row: Row) -> Made:
            keys, quarantined, problem = pickle.loads(row["decoded"])
            if problem:
                raise problem
            encoded = encoder.start(row["pixels"], getattr(torch, store_dtype)).wait()
            usable = []
            for place, key in enumerate(keys):
                try:
                    # What the largest value fits, every value fits.
                    to_stored(encoded.largest_N[place, None], store_dtype)
                    usable.append(place)
                except UnusableError as error:
                    quarantined.append((key, str(error)))
            features_NTD = encoded.features_NTD if len(usable) == len(keys) else encoded.features_NTD[usable]
            return Made([keys[place] for place in usable], {TENSOR: features_NTD}, quarantined, encoded.notes)

        return make


def _places(nodes: Sequence[Node], cpus_each: float, on_gpus: bool) -> int:
    """How many encoders fit the cluster."""
    by_cpus = [int(int(node.cpus) / cpus_each) for node in nodes]
    return sum(min(place, int(node.gpus)) if on_gpus else place for place, node in zip(by_cpus, nodes, strict=True))
