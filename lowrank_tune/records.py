"""The frozen value objects that pass between rooms.

Only numbers, text and paths live here, so that any of them can travel to a Ray actor or into a JSON file as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from lowrank_tune.files import read_json, write_json

CONTROLS = ("random_sketch", "pca_basis", "power_1", "randomized_svd")
"""The methods without training that a trained family is held against beside the SVD, weakest first."""
TEST_OPTIMUM = "test_optimum.safetensors"
"""In a study's folder: the SVD's figures of the test images, measured once."""

TrialStatus = Literal["finished", "pruned", "failed"]
StoppedBy = Literal["budget", "patience", "asha", "interruption", "error"]
"""What ended a trial; `interruption` is only ever read off the files of a study that did not finish."""


@dataclass(frozen=True, slots=True)
class FeatureRow:
    """Where one image's features lie in a cache: tensor `features` of `shard`, at index `row`.

    Attributes:
        key: sha256 of the image file's bytes (of the `.pt` file's for imported tensors), 64 hex digits.
        shard: file name under the cache's `shards/`.
        row: index along the shard's first axis.
    """

    key: str
    shard: str
    row: int


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """The features of one study's images, inside a sealed cache.

    Attributes:
        directory: the cache, `features/<fingerprint>`.
        fingerprint: identity of encoder, preprocessing and dtypes, 16 hex digits.
        encoder: what made them, for people: a checkpoint's name, or `imported tensors`.
        weights: `random`, `pretrained` or `unknown`; every report repeats it.
        dtype: how they are stored: `float16`, `bfloat16` or `float32`.
        tokens: T, rows of each image's matrix.
        dim: D, its columns.
        rows: one a distinct usable image, in the order of the source.
        records_path: parquet with one row a record of the user's source (`record`, `key`, `path`, `error` and all of
            the user's own columns); records that share an image share a key.
        quarantined: how many records had no usable image.
        origin: where the cache lies when `directory` is a node's own copy of it; empty otherwise.
        rank: R where the cache holds factors, X ≈ A·B in place of X; `dtype` is then theirs, and `encoder` says which
            model made them. 0 otherwise.
    """

    directory: str
    fingerprint: str
    encoder: str
    weights: str
    dtype: str
    tokens: int
    dim: int
    rows: tuple[FeatureRow, ...]
    records_path: str
    quarantined: int = 0
    origin: str = ""
    rank: int = 0

    def write(self, path: Path) -> None:
        """Write this record as JSON."""
        write_json(path, self, indent=None)

    @classmethod
    def read(cls, path: Path) -> FeatureSet:
        """Read what `write` wrote."""
        fields: dict[str, Any] = read_json(path)
        fields["rows"] = tuple(FeatureRow(**row) for row in fields["rows"])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Split:
    """Which images train, steer and judge: indices into `FeatureSet.rows`, disjoint, each sorted."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TrialConfig:
    """All that one training depends on, beside the features.

    Attributes:
        trial_id: readable and unique in its study, `r064-sketch-0003`.
        number: position in the search, from 0.
        seed: seeds the weights and the order of mini-batches.
        family: a decomposer's name.
        rank: R.
        lr: AdamW's learning rate at the start.
        weight_decay: AdamW's decoupled weight decay.
        batch_size: images a step.
        epochs: the budget.
        patience: epochs in a row without a lower validation MSE before the trial stops.
        family_params: what this family alone has (`lambda_b`, `lambda_ortho`, `steps`).
        nested_ranks: the ranks that this one training serves, the highest is `rank`; empty when it serves `rank` alone.
        confirms: the trial whose configuration this training repeats with a fresh seed; empty for the search's own.
    """

    trial_id: str
    number: int
    seed: int
    family: str
    rank: int
    lr: float
    weight_decay: float
    batch_size: int
    epochs: int
    patience: int
    family_params: dict[str, float] = field(default_factory=dict)
    nested_ranks: tuple[int, ...] = ()
    confirms: str = ""

    def __post_init__(self) -> None:
        """Take the list that JSON makes of a tuple."""
        object.__setattr__(self, "nested_ranks", tuple(self.nested_ranks))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank that the trained model serves."""
        return self.nested_ranks or (self.rank,)

    def ends_at(self, epoch: int, best_epoch: int) -> Literal["budget", "patience"] | None:
        """What ends this training after an epoch; None while it may go on.

        Args:
            epoch: epochs trained.
            best_epoch: the one with the lowest validation MSE, from 1.
        """
        if epoch >= self.epochs:
            return "budget"
        return "patience" if epoch - best_epoch >= self.patience else None


@dataclass(frozen=True, slots=True)
class TrialOutcome:
    """How a trial ended.

    Attributes:
        config: what was tried.
        status: `finished` at full budget or patience, `pruned` by the scheduler, `failed`.
        stopped_by: which of the four ended it.
        epochs: epochs trained.
        best_epoch: the epoch of the saved model, from 1; 0 when there is none.
        best: `val_mse`, `val_token_cosine` and `val_residual_ratio` at that epoch.
        directory: `studies/<study_id>/trials/<trial_id>`.
        seconds: wall time of its training.
        reason: why it failed, one line; empty otherwise.
    """

    config: TrialConfig
    status: TrialStatus
    stopped_by: StoppedBy
    epochs: int
    best_epoch: int
    best: dict[str, float]
    directory: str
    seconds: float
    reason: str = ""

    @classmethod
    def read(cls, path: Path) -> TrialOutcome:
        """Read a trial's outcome.json; its directory is the one where the file lies now, for results may be moved."""
        fields: dict[str, Any] = read_json(path)
        return cls(**fields | {"config": TrialConfig(**fields["config"]), "directory": str(path.parent)})


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One method at one rank on the test split: a row of `comparison.json`.

    Attributes:
        method: `svd`, a control's name, or a trained family.
        rank: R.
        n_images: images in the test split.
        token_cosine_mean: mean over images of the mean over tokens of the cosine between rows of X and AB.
        token_cosine_sd: its standard deviation over images.
        flat_cosine_mean: mean over images of the cosine between the flattened matrices.
        mse_mean: mean over images of the mean squared error of an element.
        residual_ratio_mean: mean over images of ‖X − AB‖² / ‖X − X_r‖²; 1.0 is the optimum.
        residual_ratio_max: the worst image's.
        bytes_per_image: A and B in the cache's dtype.
        images_per_second: decompositions (A and B, no reconstruction) on one CPU thread or on the study's GPU.
        trial_id: the trial behind it; empty for methods without training.
        seeds: how many further trainings of that trial's configuration, each with a fresh seed, the next four are of.
        residual_ratio_seed_mean: mean over those seeds of each model's `residual_ratio_mean`; None without seeds.
        residual_ratio_seed_sd: its standard deviation over seeds; None below two.
        token_cosine_seed_mean: likewise of `token_cosine_mean`.
        token_cosine_seed_sd: its standard deviation over seeds; None below two.
        token_cosine_minus_svd: mean over images of this method's token cosine minus the SVD's on the same image.
        token_cosine_minus_svd_low: lower end of its 95 % confidence interval; None for a single image.
        token_cosine_minus_svd_high: upper end.
        val_token_cosine: the model's mean token cosine on the validation images; None where it is not known.
        chosen: 0, unless the study's objective, on the validation images, made this model the best of its rank; then
            its place among those of all ranks, 1 the best.
    """

    method: str
    rank: int
    n_images: int
    token_cosine_mean: float
    token_cosine_sd: float
    flat_cosine_mean: float
    mse_mean: float
    residual_ratio_mean: float
    residual_ratio_max: float
    bytes_per_image: int
    images_per_second: float
    trial_id: str = ""
    seeds: int = 0
    residual_ratio_seed_mean: float | None = None
    residual_ratio_seed_sd: float | None = None
    token_cosine_seed_mean: float | None = None
    token_cosine_seed_sd: float | None = None
    token_cosine_minus_svd: float | None = None
    token_cosine_minus_svd_low: float | None = None
    token_cosine_minus_svd_high: float | None = None
    val_token_cosine: float | None = None
    chosen: int = 0


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One candidate of a trade-off.

    Attributes:
        method: a trained family, a control, or an SVD.
        rank: R.
        x: what is paid; less is better.
        y: what is got.
        trial_id: the trial behind it; empty for methods without training.
        on_front: whether no other candidate pays no more and gets no less, one of the two strictly.
    """

    method: str
    rank: int
    x: float
    y: float
    trial_id: str = ""
    on_front: bool = False


@dataclass(frozen=True, slots=True)
class Front:
    """A two-objective trade-off with all its candidates, by rising `x`.

    Attributes:
        name: `search` or `storage`.
        x: the figure that `FrontPoint.x` is.
        y: the figure that `FrontPoint.y` is.
        better: which `y` is better.
        points: every candidate.
    """

    name: str
    x: str
    y: str
    better: Literal["lower", "higher"]
    points: tuple[FrontPoint, ...]


@dataclass(frozen=True, slots=True)
class StoredRow:
    """Factors at one rank, or the features themselves, stored in one dtype: means over the test images.

    Attributes:
        method: `svd`, the best trained family at this rank, or `x` for the features themselves.
        rank: R; 0 for the features themselves.
        dtype: `float16`, `int8`, `int5` or `int4`.
        n_images: images measured.
        bytes_per_image: all of it, scales included.
        relative_error_mean: mean over images of ‖X − Y‖ / ‖X‖ for what comes back, Y.
        relative_error_max: the worst image's.
        token_cosine_mean: as in `ComparisonRow`.
        trial_id: the trial behind the factors; empty without one.
    """

    method: str
    rank: int
    dtype: str
    n_images: int
    bytes_per_image: int
    relative_error_mean: float
    relative_error_max: float
    token_cosine_mean: float
    trial_id: str = ""


@dataclass(frozen=True, slots=True)
class PrunedRow:
    """Factors pruned by energy: each image keeps the fewest leading components that meet a target.

    Attributes:
        method: `svd`, of which every rank is at hand, or the best trained family of the highest rank.
        rank: the components there are to keep.
        dtype: as in `StoredRow`.
        target: the relative error that each image must meet, `0.1`; or `int8`: the error of that image's X in int8.
        n_images: images measured.
        n_met: how many of them meet it at any rank; the figures below are there only when all do.
        rank_mean: mean over images of the rank kept.
        rank_max: the highest rank kept.
        bytes_per_image: mean over images, scales and a count of components included.
        relative_error_mean: as in `StoredRow`.
        relative_error_max: as in `StoredRow`.
        trial_id: as in `StoredRow`.
    """

    method: str
    rank: int
    dtype: str
    target: str
    n_images: int
    n_met: int
    rank_mean: float | None = None
    rank_max: int | None = None
    bytes_per_image: float | None = None
    relative_error_mean: float | None = None
    relative_error_max: float | None = None
    trial_id: str = ""


@dataclass(frozen=True, slots=True)
class QuantisedRow:
    """A trained decomposer before and after its matrices were brought to int8.

    Attributes:
        method: its family.
        rank: R.
        trial_id: the trial behind it.
        model_bytes: weights and buffers in float32.
        quantised_bytes: the same with int8 matrices and their scales; equal where the family has no learned matrix.
        relative_error_mean: mean over the test images of ‖X − AB‖ / ‖X‖.
        quantised_relative_error_mean: the same of the int8 model's factors.
    """

    method: str
    rank: int
    trial_id: str
    model_bytes: int
    quantised_bytes: int
    relative_error_mean: float
    quantised_relative_error_mean: float


@dataclass(frozen=True, slots=True)
class Compression:
    """Bytes against error: what `compression.json` holds.

    Attributes:
        stored: the features themselves, then factors by rank, each in every dtype.
        pruned: factors with a rank an image, by target.
        models: each trained model of the comparison, quantised.
        words: which wins where, a sentence each.
    """

    stored: tuple[StoredRow, ...] = ()
    pruned: tuple[PrunedRow, ...] = ()
    models: tuple[QuantisedRow, ...] = ()
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """The post-study figures.

    Attributes:
        rows: one a (method, rank).
        per_image_path: `per_image.parquet`: method, rank, key, split index and the figures of each image.
        device: what the speeds were measured on, for people.
        remarks: sentences a reader must not miss (random weights, a control that wins, a rank without a model).
        data: what the figures were measured on, for people: images, features, encoder and its weights.
        fronts: the trade-offs of `pareto.json`.
        compression: bytes against error; empty in a study that was compared before there was any.
    """

    rows: tuple[ComparisonRow, ...]
    per_image_path: str
    device: str
    remarks: tuple[str, ...] = ()
    data: str = ""
    fronts: tuple[Front, ...] = ()
    compression: Compression = field(default_factory=Compression)

    def best_of_each_rank(self) -> tuple[ComparisonRow, ...]:
        """The trained row that validation chose at each rank, by rising rank."""
        return tuple(sorted((row for row in self.rows if row.chosen), key=lambda row: row.rank))


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """What a report wrote: the page, the files of `plots/`, and a `loss_curves.png` in the folder of each trial."""

    html: Path
    plots: tuple[Path, ...]
    loss_curves: tuple[Path, ...]


class TrialTracker(Protocol):
    """What the trials room tells a tracker, from the driver only; none of these may raise."""

    def trial_started(self, config: TrialConfig) -> None:
        """A trial begins."""

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        """An epoch ended; `epoch` counts from 1."""

    def trial_ended(self, outcome: TrialOutcome) -> None:
        """A trial is over, whichever way."""


class StudyProgress:
    """What a study tells while it runs; each method may be overridden, and none needs to be."""

    def stage(self, text: str) -> None:
        """A new part of the story begins."""

    def images(self, done: int, total: int) -> None:
        """So many of the images that the cache lacked are in it now."""

    def trials(self, total: int) -> None:
        """So many trainings begin: the search's trials, then the repetitions of its best."""

    def trial_started(self, config: TrialConfig) -> None:
        """A trial begins."""

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, Any]) -> None:
        """A trial finished an epoch."""

    def trial_ended(self, outcome: TrialOutcome) -> None:
        """A trial is over."""
