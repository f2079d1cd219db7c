"""The frozen value objects that pass between rooms: numbers, text and paths alone, fit for a Ray actor or JSON."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lowrank_tune.files import read_json, write_json

CONTROLS = ("random_sketch", "pca_basis", "power_1", "randomized_svd", "gram_eigh")
"""What a trained family is held against beside the SVD, weakest first: `pca_basis` is fitted to the training images,
the others know nothing of them."""
SLOWER = 0.1
"""The part by which the rates of two methods must differ: less is the machine's noise."""
BYTES_AT_ERROR = "val_bytes_at_error"
"""What an image takes, mean, in a model's best form that holds it to the study's `target_error`."""
BYTES_AND_ERROR = ("val_bytes", "val_error")
"""Of a model's own form: the bytes that an image takes, and its relative error ‖X − Y‖ / ‖X‖, means."""
RATES = (BYTES_AT_ERROR, *BYTES_AND_ERROR)
"""Figures of trials whose study has a `target_error`."""
OBJECTIVES: dict[str, Literal["minimize", "maximize"]] = {
    "val_residual_ratio": "minimize",
    "val_mse": "minimize",
    "val_token_cosine": "maximize",
    **dict.fromkeys(RATES, "minimize"),
}
"""What a study may be steered by, and which way is better: of a trial's best epoch, as far as it has the figure."""


WORST_RATIO = "val_residual_ratio_worst"
"""The largest ρ of a validation image: a figure of trials whose study requires something of it."""
FIGURES = (*OBJECTIVES, WORST_RATIO)
"""What is known of a trial's epochs, as far as it has them."""


def sign(objective: str) -> float:
    """Of an objective, what makes less of it better."""
    return -1.0 if OBJECTIVES[objective] == "maximize" else 1.0


LEADING = (BYTES_AT_ERROR, "val_residual_ratio", "val_mse")
"""What tells of a trial in one number, less being better: the first that it has."""


def leading(figures: Container[str]) -> str:
    """Return which of `LEADING` tells of a trial with these figures; ρ, where it has none."""
    return next((name for name in LEADING if name in figures), "val_residual_ratio")


BEST_MODEL = "best_model.safetensors"
"""In a trial's folder: the weights of its best epoch."""
VALIDATION_OPTIMUM, TEST_OPTIMUM = "optimum.safetensors", "test_optimum.safetensors"
"""In a study's folder: the SVD's figures of these images, measured once."""

ANSWERS_METRIC = "answers_metric.safetensors"
"""In the folder of a study that has `fidelity`: the metric W by which the language model's answers move."""
WEIGHTED = "_weighted"
"""What ends the name of a method whose error weighs by that metric."""

TrialStatus = Literal["finished", "pruned", "failed"]
StoppedBy = Literal["budget", "patience", "asha", "interruption", "error"]
"""What ended a trial; `interruption` is only ever read off the files of a study that did not finish."""
StoppedFor = Literal["trials", "space", "hours", "target", "no_gain", "alike_failures"]
"""Why a search begins no more trials: it has had all of its own, every configuration of its space, or `search.stop`."""
CODED = "coded"
"""The dtype of features that are kept as a stream of bytes an image, beside a codebook for all."""


@dataclass(frozen=True, slots=True)
class FeatureRow:
    """Where one image's features lie in a cache."""

    key: str  # sha256 of the image's bytes, 64 hex digits (of an imported tensor's file, or of the one tensor in it)
    shard: str  # file name under the cache's `shards/`
    row: int  # index along the shard's first axis


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """The features of one study's images, inside a sealed cache.

    `records_path` is a parquet, one row a record of the user's source (`record`, `key`, `path`, `error`, and the user's
    own columns); records that share an image share a key.
    """

    directory: str  # the cache, `features/<fingerprint>`
    fingerprint: str  # identity of encoder, preprocessing and dtypes, 16 hex digits
    encoder: str  # what made them, for people: a checkpoint's name, or `imported tensors`; for factors, the model
    weights: str  # `random`, `pretrained` or `unknown`; every report repeats it
    dtype: str  # how they are stored: `float16`, `bfloat16`, `float32`; factors of them also in few bits, or CODED
    tokens: int  # T, rows of each image's matrix
    dim: int  # D, its columns
    rows: tuple[FeatureRow, ...]  # one a distinct usable image, in the order of the source
    records_path: str
    quarantined: int = 0  # how many records had no usable image
    origin: str = ""  # where the cache lies when `directory` is a node's own copy of it
    rank: int = 0  # R where the cache holds factors, X ≈ A·B in place of X

    def write(self, path: Path) -> None:
        """Write this record as JSON."""
        write_json(path, self, indent=None)

    def digest(self, images: Sequence[int]) -> str:
        """What tells these images' features, in this order, from any others."""
        told = "\n".join([self.fingerprint, *(self.rows[image].key for image in images)])
        return hashlib.sha256(told.encode()).hexdigest()

    @classmethod
    def read(cls, path: Path) -> FeatureSet:
        """Read what `write` wrote."""
        fields: dict[str, Any] = read_json(path)
        fields["rows"] = tuple(FeatureRow(**row) for row in fields["rows"])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Split:
    """Which images train, steer and judge: sorted, disjoint indices into `FeatureSet.rows`."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]

    @classmethod
    def read(cls, path: Path) -> Split:
        """Read what `write_json` wrote."""
        return cls(**{name: tuple(images) for name, images in read_json(path).items()})


@dataclass(frozen=True, slots=True)
class TrialConfig:
    """All that one training depends on, beside the features."""

    trial_id: str  # readable and unique in its study, `r064-sketch-0003`
    number: int  # position in the search, from 0
    seed: int  # of the weights and the order of mini-batches
    family: str  # a decomposer's name
    rank: int  # R
    lr: float  # AdamW's learning rate at the start
    weight_decay: float  # AdamW's decoupled weight decay
    batch_size: int  # images a step
    epochs: int  # the budget
    patience: int  # epochs in a row without a better objective before the trial stops
    family_params: dict[str, float | str] = field(default_factory=dict)  # `lambda_b`, `steps`, `metric`
    nested_ranks: tuple[int, ...] = ()  # that this one training serves, up to `rank`; empty when it serves `rank` alone
    objective: str = "val_residual_ratio"  # what early stopping, the learning rate and the kept weights go by
    target_error: float | None = None  # the relative error at which bytes are counted; None where nobody asks for them
    require: dict[str, float] = field(default_factory=dict)  # by figure, the most that the best model may have of it
    origin: Literal["", "defaults", "first"] = ""  # its family's published defaults, or from `search.first`
    confirms: str = ""  # the trial whose configuration this one repeats with a fresh seed; empty for the search's own

    def __post_init__(self) -> None:
        """Take the list that JSON makes of a tuple."""
        object.__setattr__(self, "nested_ranks", tuple(self.nested_ranks))

    def excess(self, figures: Mapping[str, float]) -> float:
        """The part by which figures are above what is required, 0 where nothing is; infinite where one is missing."""
        over = (figures.get(name, math.nan) / most - 1 for name, most in self.require.items())
        return sum(math.inf if math.isnan(part) else max(0.0, part) for part in over)

    @property
    def trains(self) -> str:
        """What two configurations of one study agree in that would train the same: numbers count to six digits."""
        point = {"metric": "none"} | self.point  # studies from before there was a metric say nothing of it
        told = [f"{name}={it if isinstance(it, str) else f'{it:.6g}'}" for name, it in sorted(point.items())]
        return " ".join([*map(str, self.ranks), *told])

    @property
    def point(self) -> dict[str, Any]:
        """The values of the search space that it has."""
        shared = {"family": self.family, "rank": self.rank, "lr": self.lr, "weight_decay": self.weight_decay}
        return {**shared, "batch_size": self.batch_size, **self.family_params}

    @property
    def method(self) -> str:
        """What its model is in a comparison: its family, and `WEIGHTED` where it is trained in the answers' metric."""
        return self.family + WEIGHTED * (self.family_params.get("metric") == "answers")

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank that the trained model serves."""
        return self.nested_ranks or (self.rank,)

    def ends_at(self, epoch: int, best_epoch: int) -> Literal["budget", "patience"] | None:
        """What ends this training after so many epochs, if anything, given the best one."""
        if epoch >= self.epochs:
            return "budget"
        return "patience" if epoch - best_epoch >= self.patience else None


@dataclass(frozen=True, slots=True)
class TrialOutcome:
    """How a trial ended."""

    config: TrialConfig
    status: TrialStatus  # `finished` at full budget or patience, `pruned` by the scheduler, `failed`
    stopped_by: StoppedBy
    epochs: int  # trained
    best_epoch: int  # of the saved model, from 1; 0 when there is none
    best: dict[str, float]  # those of `FIGURES` that it has, at that epoch
    directory: str  # `studies/<study_id>/trials/<trial_id>`
    seconds: float  # wall time of its training
    reason: str = ""  # why it failed, one line

    @property
    def feasible(self) -> bool:
        """Whether its best epoch holds all that its study requires."""
        return self.config.excess(self.best) == 0

    @classmethod
    def read(cls, path: Path) -> TrialOutcome:
        """Read a trial's outcome.json; its directory is where the file lies now."""
        fields: dict[str, Any] = read_json(path)
        return cls(**fields | {"config": TrialConfig(**fields["config"]), "directory": str(path.parent)})


class TrialTracker:
    """What is told of trials, in the driver; any method may be overridden, and none may raise."""

    def trial_started(self, config: TrialConfig) -> None:
        """A trial begins."""

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        """An epoch ended; `epoch` counts from 1."""

    def trial_ended(self, outcome: TrialOutcome) -> None:
        """A trial is over, whichever way."""

    def search_ended(self, stopped_for: StoppedFor, told: str) -> None:
        """No more trials begin; `told` says why, and is empty where all were tried as planned."""


class StudyProgress(TrialTracker):
    """What a study tells while it runs; any method may be overridden."""

    def stage(self, text: str) -> None:
        """A new part of the story begins."""

    def images(self, done: int, total: int) -> None:
        """So many of the images that the cache lacked are in it now."""

    def asked(self, done: int, total: int) -> None:
        """About so many of the test images the language model has answered all."""

    def trials(self, total: int) -> None:
        """So many trainings begin: the search's trials, then the repetitions of its best."""
