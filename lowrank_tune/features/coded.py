"""Images kept as coded streams: `apply --coded`."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.features.cache import CODEBOOK, IDENTITY
from lowrank_tune.features.commits import CODED_IMAGE, LENGTH, STREAM, Identity, UnusableError
from lowrank_tune.features.given import image_reader
from lowrank_tune.features.shards import Made, Pool, Row, ShardJob, ShardPlan
from lowrank_tune.files import read_json
from lowrank_tune.lowrank.codebooks import make_codebook
from lowrank_tune.lowrank.coding import Codebook, UnreachableError
from lowrank_tune.lowrank.data import DTYPES
from lowrank_tune.lowrank.decomposers import Decomposer
from lowrank_tune.lowrank.decomposers.shared import Shared
from lowrank_tune.lowrank.quantization import STORE_DTYPES
from lowrank_tune.records import CODED, FeatureSet


@dataclass(frozen=True)
class Kept:
    """How what is made of an image is kept.

    Attributes:
        dtype: of the factors, one of `STORE_DTYPES`; or `coded`, and one of the others is given.
        target_error: what ‖X − Y‖ / ‖X‖ may be at most for what comes back of each image, Y.
        max_bytes: what the stream of each image may take at most.
    """

    dtype: str
    target_error: float | None = None
    max_bytes: int | None = None

    @classmethod
    def asked(cls, dtype: str | None, coded: bool, target_error: float | None, max_bytes: int | None) -> Kept:
        """From the options of `apply`; an InputError where they do not go together."""
        if not coded and (target_error is not None or max_bytes is not None):
            raise InputError("--target-error and --bytes say how --coded works; add --coded, or leave them out")
        if not coded:
            if (dtype := dtype or "float16") not in STORE_DTYPES:
                raise InputError(f"--dtype {dtype}: unknown; choose one of {', '.join(STORE_DTYPES)}")
            return cls(dtype)
        if dtype is not None:
            raise InputError(f"--dtype {dtype}: with --coded bits are as many as an image needs; leave one of them out")
        if (target_error is None) == (max_bytes is None):
            raise InputError("--coded: give --target-error, such as 0.05, or --bytes, such as 4096, and not both")
        if target_error is not None and not 0 < target_error < 1:
            raise InputError(f"--target-error {target_error:g}: give the error ‖X − Y‖ / ‖X‖, above 0 and below 1")
        return cls(CODED, target_error, max_bytes)


def coded_identity(made: Identity, kept: Kept, features: FeatureSet, codebook: bytes) -> Identity:
    """What coded images depend on, beside the features' bytes; `made` says from which model, at which rank."""
    # Those that a cache stores have a dtype of their own; it is told for comparison alone.
    x_dtype = features.dtype if features.dtype in DTYPES and not features.rank else "float16"
    return {
        **made,
        "store_dtype": kept.dtype,
        "target_error": kept.target_error,
        "max_bytes": kept.max_bytes,
        "x_dtype": x_dtype,
        "tensors": {name: list(part) for name, part in CODED_IMAGE.items()},
        "codebook": hashlib.sha256(codebook).hexdigest(),
    }


def codebook_of(model: Decomposer, rank: int, folder: Path, kept: Kept, device: str) -> bytes:
    """The codebook of a model at a rank, as a file; an InputError where it has none, or the bytes are too few."""
    if not isinstance(model, Shared):
        raise InputError(
            f"--coded: {folder} is of family {model.family}, and only family shared learns what all images share; "
            "export a model of that family, or leave --coded out"
        )
    if device == "cuda":
        raise InputError("--device cuda: --coded works on CPUs; leave one of the two out")
    codebook = make_codebook(model, rank)
    if kept.max_bytes is not None:
        try:
            codebook.encode(torch.ones(model.tokens, model.dim), max_bytes=kept.max_bytes)
        except UnreachableError as error:
            raise InputError(f"--bytes {kept.max_bytes}: too few for any image ({error})") from error
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / CODEBOOK
        codebook.save(path)
        return path.read_bytes()


def as_begun(target: Path, identity: Identity, codebook: bytes) -> tuple[Identity, bytes]:
    """The same, but with the codebook of an earlier run: made on another machine it may differ in its last digits."""
    try:
        there, begun = read_json(target / IDENTITY), (target / CODEBOOK).read_bytes()
    except (OSError, ValueError):
        return identity, codebook
    expected = identity | {"codebook": hashlib.sha256(begun).hexdigest()}
    return (expected, begun) if there == expected else (identity, codebook)


@dataclass(frozen=True)
class Encode(ShardJob):
    """Features -> coded images, by the codebook that lies in the cache.

    Attributes:
        place: the cache of features; empty for tensors, whose paths are in the plans.
    """

    work: ClassVar[str] = "the work"
    worker: ClassVar[str] = "encoder"
    place: str

    def open(self, pool: Pool) -> Callable[[ShardPlan, Row], Made]:
        """Load the codebook, and map the features."""
        codebook = Codebook.load(Path(self.directory) / CODEBOOK)
        read = image_reader(self.place, (codebook.tokens, codebook.dim))
        target_error, max_bytes = self.identity["target_error"], self.identity["max_bytes"]

        def make(plan: ShardPlan, row: Row) -> Made:
            keys: list[str] = []
            streams: list[Tensor] = []
            quarantined: list[tuple[str, str]] = []
            for number, key in enumerate(plan.keys):
                try:
                    stream = codebook.encode(read(plan, number), target_error=target_error, max_bytes=max_bytes)
                except (UnusableError, UnreachableError) as error:
                    quarantined.append((key, str(error)))
                    continue
                keys.append(key)
                streams.append(torch.frombuffer(bytearray(stream), dtype=torch.uint8))
            lengths = torch.tensor([len(stream) for stream in streams], dtype=torch.uint32)
            return Made(keys, {LENGTH: lengths, STREAM: streams}, quarantined)

        return make
