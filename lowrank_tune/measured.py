"""What a study measures of its methods on the test split: frozen value objects, fit for JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FACTORS = "factors"
"""The form of A·B as they are, in `FidelityRow`."""
STAYS = 0.05
"""Where no greater a part of the answers flips, they are said to stay."""


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One method at one rank on the test split: means over images of an image's figures.

    `_low` and `_high` are the ends of a 95 % confidence interval over groups of images that belong together, None below
    two; the four `_seed_` figures are of repetitions with fresh seeds. All of ρ, and what is held against the SVD, is
    None above min(T, D), where X has no more directions than the SVD keeps.
    """

    method: str  # `svd`, a control's name, or a trained family; `_weighted` at its end where errors weigh by W
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
    # 1 − ρ / ρ of the same model before training, likewise, of ρ_W where that is what it lowers; None without training
    training_gain: float | None = None
    training_gain_low: float | None = None
    training_gain_high: float | None = None
    beaten_by: str = ""  # which of the SVD and the controls beat this model, nearest first: `gram_eigh, power_1`
    level_with: str = ""  # and which are level with it
    shared_bytes: int = 0  # B in the cache's dtype, kept once for the data set; 0 where each image has its own
    residual_ratio_weighted: float | None = None  # exp(mean log ρ_W); None without a metric of the answers
    residual_ratio_weighted_low: float | None = None
    residual_ratio_weighted_high: float | None = None


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
class FidelityRow:
    """What the language model still answers from one form of the features: means over questions on test images.

    X itself, as cached, is `method: x`. `_low` and `_high` are the ends of a 95 % confidence interval over groups of
    images, None below two groups. What is held against `answers` is None where the study names none.
    """

    method: str  # as in `ComparisonRow`, `x`, or as in `RateRow`: `jpeg-q75`, `half-side`
    rank: int  # 0 where there are no factors
    form: str  # `factors` for A·B as they are; `float16`, `int8`, `int4`, `coded 0.05`; of pictures `jpeg` or `webp`
    n_questions: int
    n_images: int
    bytes_per_image: float  # what an image alone takes
    kl_mean: float  # of KL(p_X ‖ p_X̂) of the next token in nats, mean over the positions of the answer that X gives
    first_token_flips: float  # part of the questions whose answer begins with another token
    answer_flips: float  # part of the questions whose whole greedy answer is another one
    loglik_delta_mean: float  # log-likelihood of the answer that X gives, under X̂ minus under X
    kl_mean_low: float | None = None
    kl_mean_high: float | None = None
    first_token_flips_low: float | None = None
    first_token_flips_high: float | None = None
    answer_flips_low: float | None = None
    answer_flips_high: float | None = None
    loglik_delta_mean_low: float | None = None
    loglik_delta_mean_high: float | None = None
    accuracy: float | None = None  # VQA accuracy as TextVQA defines it
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    accuracy_minus_x: float | None = None  # paired: on the same question
    accuracy_minus_x_low: float | None = None
    accuracy_minus_x_high: float | None = None
    anls: float | None = None  # average normalised Levenshtein similarity, with its usual threshold of 0.5
    anls_low: float | None = None
    anls_high: float | None = None
    n_hard: int = 0  # questions that X answers and the half-side image does not
    accuracy_hard: float | None = None  # VQA accuracy on these
    accuracy_hard_low: float | None = None
    accuracy_hard_high: float | None = None
    relative_error_mean: float | None = None  # of ‖X − X̂‖ / ‖X‖
    trial_id: str = ""  # the trial behind it; empty without one


@dataclass(frozen=True, slots=True)
class FidelityExample:
    """One question, and what is answered at each rank."""

    key: str  # the image's
    picture: str  # a small JPEG of it, relative to the study's folder
    question: str
    answer: str  # that X gives
    answers: dict[str, dict[int, str]]  # by method, `svd` and the best of each rank as `trained`, then by rank
    stays_from: dict[str, int | None]  # by method, the first rank from which on the answer is X's; None for never


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What the language model still sees: the rows are `fidelity.json`."""

    rows: tuple[FidelityRow, ...] = ()  # one a (method, rank, form)
    examples: tuple[FidelityExample, ...] = ()
    model: str = ""  # which language model answered, its weights and its device, for people
    words: tuple[str, ...] = ()  # from which rank and bytes on the answers stay, a sentence each
    remarks: tuple[str, ...] = ()  # on what and how it was measured, and what was not and why, a sentence each


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
