"""The frozen value objects that pass between rooms: numbers, text and paths alone, fit for a Ray actor or JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
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

TrialStatus = Literal["finished", "pruned", "failed"]
StoppedBy = Literal["budget", "patience", "asha", "interruption", "error"]
"""What ended a trial; `interruption` is only ever read off the files of a study that did not finish."""
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
    family_params: dict[str, float | str] = field(default_factory=dict)  # `lambda_b`, `steps`, `token_transform`
    nested_ranks: tuple[int, ...] = ()  # that this one training serves, up to `rank`; empty when it serves `rank` alone
    objective: str = "val_residual_ratio"  # what early stopping, the learning rate and the kept weights go by
    target_error: float | None = None  # the relative error at which bytes are counted; None where nobody asks for them
    confirms: str = ""  # the trial whose configuration this one repeats with a fresh seed; empty for the search's own

    def __post_init__(self) -> None:
        """Take the list that JSON makes of a tuple."""
        object.__setattr__(self, "nested_ranks", tuple(self.nested_ranks))

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
    best: dict[str, float]  # the figures of `OBJECTIVES` that it has, at that epoch
    directory: str  # `studies/<study_id>/trials/<trial_id>`
    seconds: float  # wall time of its training
    reason: str = ""  # why it failed, one line

    @classmethod
    def read(cls, path: Path) -> TrialOutcome:
        """Read a trial's outcome.json; its directory is where the file lies now."""
        fields: dict[str, Any] = read_json(path)
        return cls(**fields | {"config": TrialConfig(**fields["config"]), "directory": str(path.parent)})


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One method at one rank on the test split: means over images of an image's figures.

    `_low` and `_high` are the ends of a 95 % confidence interval over groups of images that belong together, None below
    two; the four `_seed_` figures are of repetitions with fresh seeds. All of ρ, and what is held against the SVD, is
    None above min(T, D), where X has no more directions than the SVD keeps.
    """

    method: str  # `svd`, a control's name, or a trained family
    rank: int
    n_images: int
    token_cosine_mean: float  # of the mean over tokens of the cosine between rows of X and AB
    token_cosine_sd: float  # its standard deviation over images
    flat_cosine_mean: float  # of the cosine between the flattened matrices
    mse_mean: float  # of the mean squared error of an element
    residual_ratio_mean: (
        float | None
    )  # of ρ = ‖X − AB‖² / ‖X − X_r‖²; 1.0 is the optimum, and one easy image may rule it
    residual_ratio_max: float | None  # the worst image's
    bytes_per_image: int  # A and B in the cache's dtype; A alone where all images share one B
    images_per_second: float  # A and B, no reconstruction, on one CPU thread or on the study's GPU
    trial_id: str = ""  # the trial behind it; empty for methods without training
    seeds: int = 0  # how many further trainings
    residual_ratio_seed_mean: float | None = None  # None without seeds
    residual_ratio_seed_sd: float | None = None  # None below two
    token_cosine_seed_mean: float | None = None
    token_cosine_seed_sd: float | None = None
    token_cosine_minus_svd: float | None = None  # on the same image
    token_cosine_minus_svd_low: float | None = None
    token_cosine_minus_svd_high: float | None = None
    val_token_cosine: float | None = None  # the model's mean on the validation images; None where it is not known
    chosen: int = 0  # 0 unless the objective on validation images made it its rank's best: its place among those
    n_groups: int = 0  # of test images that belong together: as many as images unless `split.group_by` says more
    residual_ratio: float | None = None  # exp(mean log ρ), the figure to steer by
    residual_ratio_low: float | None = None
    residual_ratio_high: float | None = None
    residual_ratio_median: float | None = None
    training_gain: float | None = None  # 1 − ρ / ρ of the same model before training, likewise; None without training
    training_gain_low: float | None = None
    training_gain_high: float | None = None
    beaten_by: str = ""  # which of the SVD and the controls beat this model, nearest first: `gram_eigh, power_1`
    level_with: str = ""  # and which are level with it
    shared_bytes: int = 0  # B in the cache's dtype, kept once for the data set; 0 where each image has its own


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One candidate of a trade-off: a method at a rank."""

    method: str  # a trained family, a control, or an SVD
    rank: int
    x: float  # what is paid; less is better
    y: float  # what is got
    trial_id: str = ""  # the trial behind it; empty for methods without training
    on_front: bool = False  # no other candidate pays no more and gets no less, one of the two strictly


@dataclass(frozen=True, slots=True)
class Front:
    """A two-objective trade-off with all its candidates, by rising `x`."""

    name: str  # `search` or `storage`
    x: str  # the figure that `FrontPoint.x` is
    y: str  # the figure that `FrontPoint.y` is
    better: Literal["lower", "higher"]  # which `y` is better
    points: tuple[FrontPoint, ...]


@dataclass(frozen=True, slots=True)
class StoredRow:
    """Factors at one rank, or the features themselves, stored in one dtype: means over the test images."""

    method: str  # `svd`, the best trained family at this rank, or `x` for the features themselves
    rank: int  # 0 for the features themselves
    dtype: str  # `float16`, `int8`, `int5` or `int4`
    n_images: int
    bytes_per_image: int  # all of it, scales included
    relative_error_mean: float  # of ‖X − Y‖ / ‖X‖ for what comes back, Y
    relative_error_max: float  # the worst image's
    token_cosine_mean: float  # as in `ComparisonRow`
    trial_id: str = ""  # the trial behind the factors; empty without one


@dataclass(frozen=True, slots=True)
class PrunedRow:
    """Factors pruned by energy: each image keeps the fewest leading components that meet a target.

    From `rank_mean` on there are figures only where all images meet it.
    """

    method: str  # `svd`, of which every rank is at hand, or the best trained family of the highest rank
    rank: int  # the components there are to keep
    dtype: str  # as in `StoredRow`
    target: str  # the relative error that each image must meet, `0.1`; or `int8`: the error of that image's X in int8
    n_images: int
    n_met: int  # how many of them meet it at any rank
    rank_mean: float | None = None  # of the rank kept
    rank_max: int | None = None
    bytes_per_image: float | None = None  # mean, scales and a count of components included
    relative_error_mean: float | None = None
    relative_error_max: float | None = None
    trial_id: str = ""


@dataclass(frozen=True, slots=True)
class QuantisedRow:
    """A trained decomposer before and after its matrices were brought to int8."""

    method: str  # its family
    rank: int
    trial_id: str
    model_bytes: int  # weights and buffers in float32
    quantised_bytes: int  # with int8 matrices and their scales; equal where the family has no learned matrix
    relative_error_mean: float  # mean over the test images of ‖X − AB‖ / ‖X‖
    quantised_relative_error_mean: float  # the same of the int8 model's factors


@dataclass(frozen=True, slots=True)
class RateRow:
    """A way to keep features, as real bytes, at one setting: means over the test images that were measured."""

    method: str  # `x`, `svd`, `shared`, or the picture itself: `jpeg-q75`, `webp-q75`, `half-side`, `quarter-side`
    rank: int  # 0 where there are no factors
    dtype: str  # `int8`, `int8+zlib`, `int8+zstd`, `coded`; of pictures `jpeg` or `webp`
    target: str  # the relative error that each image was to meet, `0.05`; empty where none was set
    n_images: int
    bytes_per_image: float  # what an image alone takes
    relative_error_mean: float  # of ‖X − Y‖ / ‖X‖ for what comes back, Y
    relative_error_max: float  # the worst image's
    token_cosine_mean: float  # as in `ComparisonRow`
    images_per_second: float | None = (
        None  # that come back: on one CPU thread or the study's GPU, pictures on the encoder's
    )
    shared_bytes: int = 0  # what is kept once for the whole data set
    trial_id: str = ""


@dataclass(frozen=True, slots=True)
class Pictures:
    """What the picture itself takes as a file, and how far the features are that it gives when it is encoded again."""

    images: tuple[int, ...] = ()  # the test images that were measured: places in `Split.test`, rising
    rows: tuple[RateRow, ...] = ()  # one a way to keep the picture; none where nothing was measured
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by method, each image's bytes
    errors: dict[str, tuple[float, ...]] = field(default_factory=dict)  # by method, each image's ‖X − Y‖ / ‖X‖
    remarks: tuple[str, ...] = ()  # on what and how it was measured, and what was not and why, a sentence each


@dataclass(frozen=True, slots=True)
class Compression:
    """Bytes against error: what `compression.json` holds."""

    stored: tuple[StoredRow, ...] = ()  # the features themselves, then factors by rank, each in every dtype
    pruned: tuple[PrunedRow, ...] = ()  # factors with a rank an image, by target
    models: tuple[QuantisedRow, ...] = ()  # each trained model of the comparison, quantised
    words: tuple[str, ...] = ()  # which wins where, a sentence each
    rates: tuple[RateRow, ...] = ()  # real bytes against error: X, factors and pictures by entropy coders
    rate_words: tuple[str, ...] = ()  # what an error takes and who wins at a size by these rates, a sentence each


@dataclass(frozen=True, slots=True)
class Comparison:
    """The post-study figures."""

    rows: tuple[ComparisonRow, ...]  # one a (method, rank)
    per_image_path: str  # `per_image.parquet`: method, rank, key, split index and the figures of each image
    device: str  # what the speeds were measured on, for people
    remarks: tuple[str, ...] = ()  # what a reader must not miss: random weights, a control that wins, a missing model
    data: str = ""  # what the figures were measured on, for people: images, features, encoder and its weights
    fronts: tuple[Front, ...] = ()  # the trade-offs of `pareto.json`
    compression: Compression = field(default_factory=Compression)  # empty in a study compared before there was any

    def best_of_each_rank(self) -> tuple[ComparisonRow, ...]:
        """The trained row that validation chose at each rank, by rising rank."""
        return tuple(sorted((row for row in self.rows if row.chosen), key=lambda row: row.rank))


class TrialTracker:
    """What is told of trials, in the driver; any method may be overridden, and none may raise."""

    def trial_started(self, config: TrialConfig) -> None:
        """A trial begins."""

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        """An epoch ended; `epoch` counts from 1."""

    def trial_ended(self, outcome: TrialOutcome) -> None:
        """A trial is over, whichever way."""


class StudyProgress(TrialTracker):
    """What a study tells while it runs; any method may be overridden."""

    def stage(self, text: str) -> None:
        """A new part of the story begins."""

    def images(self, done: int, total: int) -> None:
        """So many of the images that the cache lacked are in it now."""

    def trials(self, total: int) -> None:
        """So many trainings begin: the search's trials, then the repetitions of its best."""
