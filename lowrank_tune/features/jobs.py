"""What the extraction's workers are told and what they answer: text and numbers only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from lowrank_tune.caches.identity import Identity
from lowrank_tune.features.checkpoint import CheckpointConfig, TowerFiles


class UnusableError(Exception):
    """This one image or tensor file cannot become features; the message is the reason, for its quarantine row."""


@dataclass(frozen=True)
class ShardPlan:
    """A shard that is to be made.

    Attributes:
        shard: its file name.
        keys: sha256 of each file.
        paths: where each file lies.
    """

    shard: str
    keys: tuple[str, ...]
    paths: tuple[str, ...]

    def dump(self) -> str:
        """As JSON, for a row of a dataset."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> ShardPlan:
        """Read what `dump` wrote."""
        fields = json.loads(text)
        return cls(fields["shard"], tuple(fields["keys"]), tuple(fields["paths"]))


@dataclass(frozen=True)
class ShardResult:
    """What became of a shard.

    Attributes:
        shard: its file name.
        images: how many files it was planned for.
        quarantined: key and reason of those that could not be used.
        failure: why the shard was not committed; empty when it was.
        fault: whose failure it is: the user's `input`, or the `cache`'s place.
        notes: what the user should know of how it was made.
    """

    shard: str
    images: int
    quarantined: tuple[tuple[str, str], ...] = ()
    failure: str = ""
    fault: Literal["input", "cache"] = "cache"
    notes: tuple[str, ...] = ()

    def dump(self) -> str:
        """As JSON, for a row of a dataset."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> ShardResult:
        """Read what `dump` wrote."""
        fields = json.loads(text)
        fields["quarantined"] = tuple((key, error) for key, error in fields["quarantined"])
        fields["notes"] = tuple(fields["notes"])
        return cls(**fields)


@dataclass(frozen=True)
class ImageEncoding:
    """How images become features."""

    config: CheckpointConfig
    tower: TowerFiles
    image_size: int
    compute_dtype: str


@dataclass(frozen=True)
class Extraction:
    """All that a worker needs to know, beside its shard.

    Attributes:
        directory: the cache.
        identity: what the features depend on; gives tokens, dim and dtype.
        encoder: what makes the features, for people.
        weights: `random`, `pretrained` or `unknown`.
        encoding: None for tensors, which are features already.
    """

    directory: str
    identity: Identity
    encoder: str
    weights: str
    encoding: ImageEncoding | None
