"""What a source has, what of it is cached, and what its first images look like; nothing is extracted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lowrank_tune.caches.sealed import read_committed, read_sealed
from lowrank_tune.caches.shards import SHARD_ROWS
from lowrank_tune.errors import InputError
from lowrank_tune.features.decoding import decode_image
from lowrank_tune.features.encoder import Encoder
from lowrank_tune.features.files import Quarantine, hash_files
from lowrank_tune.features.jobs import UnusableError
from lowrank_tune.features.pipeline import plan_extraction
from lowrank_tune.features.sources import read_records
from lowrank_tune.features.tensors import check_shape, load_tensor
from lowrank_tune.spec.features import FeaturesSpec


@dataclass(frozen=True, slots=True)
class Survey:
    """A source beside its cache.

    Attributes:
        directory: the cache, whether it is there yet or not.
        encoder: what makes the features, for people.
        weights: `random`, `pretrained` or `unknown`.
        records: the source's records.
        unreadable: records whose file is missing or cannot be read.
        images: distinct readable files among the rest.
        cached: how many of those the cache holds, sealed or left by an extraction that was cut short.
        quarantined: how many of those are known to be unusable.
        tokens: T, rows of an image's matrix.
        dim: D, its columns.
    """

    directory: str
    encoder: str
    weights: str
    records: int
    unreadable: int
    images: int
    cached: int
    quarantined: int
    tokens: int
    dim: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """One image as features.

    Attributes:
        path: its file.
        shape: of its features, (T, D).
        low: their least value.
        high: their greatest value.
        seconds: what reading, decoding and encoding it took.
        error: why it cannot be used; empty when it can, and the rest is empty when it cannot.
    """

    path: str
    shape: tuple[int, ...] = ()
    low: float = 0.0
    high: float = 0.0
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """A few images as features, and what the others will take.

    Attributes:
        images: the first ones of the source.
        seconds_each: what an image takes one encoder, once it runs: on a GPU in a whole shard, on a CPU, or for ready
            tensors, as the quickest of `images` did. 0 where none was usable.
    """

    images: tuple[Sampled, ...]
    seconds_each: float


def survey_features(spec: FeaturesSpec, cache_root: Path, seed: int) -> Survey:
    """Count a source's images and those of them that are cached.

    Args:
        spec: the source and the encoder.
        cache_root: `results/features`.
        seed: which crops, for sample images.

    Raises:
        InputError: the source or the checkpoint cannot be used, or more of its files than may be are broken.
        CacheError: there is a cache, and it is damaged.
    """
    records = read_records(spec.source, cache_root, seed)
    files = hash_files(records)
    extraction = plan_extraction(spec, cache_root, records)
    directory = Path(extraction.directory)
    contents = read_sealed(directory, extraction.identity)
    if contents is None or contents.missing(files.paths):
        contents = read_committed(directory, extraction.identity)
    Quarantine(files, spec.max_quarantined).check(contents.quarantined)
    return Survey(
        directory=extraction.directory,
        encoder=extraction.encoder,
        weights=extraction.weights,
        records=len(records.paths),
        unreadable=sum(key is None for key in files.keys),
        images=len(files.paths),
        cached=sum(key in contents.rows for key in files.paths),
        quarantined=sum(key in contents.quarantined for key in files.paths),
        tokens=extraction.identity["tokens"],
        dim=extraction.identity["dim"],
    )


def try_images(spec: FeaturesSpec, cache_root: Path, seed: int, count: int, device: str) -> Trial:
    """Turn the first images of a source into features, in this process, and keep nothing.

    Args:
        spec: the source and the encoder.
        cache_root: `results/features`.
        seed: which crops, for sample images.
        count: how many images.
        device: where to encode.

    Raises:
        InputError: the source or the checkpoint cannot be used.
    """
    records = read_records(spec.source, cache_root, seed)
    extraction = plan_extraction(spec, cache_root, records)
    encoding, identity = extraction.encoding, extraction.identity
    paths = [path for path in records.paths if path is not None][:count]
    if encoding is None:

        def load(path: Path) -> torch.Tensor:
            tensor = load_tensor(path.read_bytes())
            check_shape(tensor, identity["tokens"], identity["dim"])
            return tensor

        images = tuple(_sample(path, load) for path in paths)
        return Trial(images, min((image.seconds for image in images if not image.error), default=0.0))

    size = spec.encoder.image_size
    encoder = Encoder(
        encoding.config,
        encoding.tower,
        encoding.compute_dtype,
        device,
        None if spec.batch_size == "auto" else spec.batch_size,
    )
    # A device's first pass finds kernels and memory, and is no measure of the others.
    encoder.encode(np.zeros((1, size, size, 3), np.uint8))
    images = tuple(_sample(path, lambda path: encoder.encode(_pixels(path, size))[0]) for path in paths)
    usable = [image for image in images if not image.error]
    if device == "cpu" or not usable:
        return Trial(images, min((image.seconds for image in usable), default=0.0))
    batch_NHWC = np.repeat(_pixels(Path(usable[0].path), size), SHARD_ROWS, axis=0)
    encoder.encode(batch_NHWC)
    started = time.perf_counter()
    encoder.encode(batch_NHWC)
    return Trial(images, (time.perf_counter() - started) / SHARD_ROWS)


def _pixels(path: Path, image_size: int) -> npt.NDArray[np.uint8]:
    return decode_image(path.read_bytes(), image_size)[None]


def _sample(path: Path, features_of: Callable[[Path], torch.Tensor]) -> Sampled:
    started = time.perf_counter()
    try:
        features_TD = features_of(path)
    except (UnusableError, InputError, OSError) as error:
        return Sampled(str(path), error=str(error))
    seconds = time.perf_counter() - started
    low, high = features_TD.min().item(), features_TD.max().item()
    return Sampled(str(path), tuple(features_TD.shape), low, high, seconds)
