"""What a source has, what of it is cached, and what its first images look like; nothing is extracted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lowrank_tune.caches.sealed import read_sealed
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
        cached: how many of those the cache holds.
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
    contents = read_sealed(Path(extraction.directory), extraction.identity)
    rows, quarantined = (contents.rows, contents.quarantined) if contents else ({}, {})
    Quarantine(files, spec.max_quarantined).check(quarantined)
    return Survey(
        directory=extraction.directory,
        encoder=extraction.encoder,
        weights=extraction.weights,
        records=len(records.paths),
        unreadable=sum(key is None for key in files.keys),
        images=len(files.paths),
        cached=sum(key in rows for key in files.paths),
        quarantined=sum(key in quarantined for key in files.paths),
        tokens=extraction.identity["tokens"],
        dim=extraction.identity["dim"],
    )


def try_images(spec: FeaturesSpec, cache_root: Path, seed: int, count: int, device: str) -> list[Sampled]:
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
    encoder = Encoder(encoding.config, encoding.tower, encoding.compute_dtype, device) if encoding else None

    def features_of(path: Path) -> torch.Tensor:
        data = path.read_bytes()
        if encoder is None:
            tensor = load_tensor(data)
            check_shape(tensor, identity["tokens"], identity["dim"])
            return tensor
        return encoder.encode(np.stack([decode_image(data, spec.encoder.image_size)]))[0]

    return [_sample(path, features_of) for path in records.paths[:count] if path is not None]


def _sample(path: Path, features_of: Callable[[Path], torch.Tensor]) -> Sampled:
    started = time.perf_counter()
    try:
        features_TD = features_of(path)
    except (UnusableError, InputError, OSError) as error:
        return Sampled(str(path), error=str(error))
    seconds = time.perf_counter() - started
    low, high = features_TD.min().item(), features_TD.max().item()
    return Sampled(str(path), tuple(features_TD.shape), low, high, seconds)
