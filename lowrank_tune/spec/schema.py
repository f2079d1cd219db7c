"""The study file's schema: what each key means, its unit and its default.

A value in the search space is a constant, a list (a grid axis, or a choice), or one range:
`{uniform: [low, high]}`, `{loguniform: [low, high]}` or `{int: [low, high]}`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

PositiveInt = Annotated[int, Field(strict=True, ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
StepCount = Annotated[int, Field(strict=True, ge=0, le=16)]


class Section(BaseModel):
    """A mapping of the study file: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class UniformRange(Section):
    """Any number between two bounds, both included."""

    uniform: tuple[float, float]
    """[low, high]"""


class LogUniformRange(Section):
    """Any positive number between two bounds, its logarithm uniform."""

    loguniform: tuple[PositiveFloat, PositiveFloat]
    """[low, high]"""


class IntRange(Section):
    """Any whole number between two bounds, both included."""

    int: tuple[PositiveInt, PositiveInt]
    """[low, high]"""


def _whole_form(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "int" if isinstance(value, dict | Section) else "constant"


def _real_form(value: Any) -> str:
    if isinstance(value, dict | Section):
        keys = value if isinstance(value, dict) else type(value).model_fields
        return "loguniform" if "loguniform" in keys else "uniform"
    return "list" if isinstance(value, list | tuple) else "constant"


# The form of a value decides which errors are about it: without a discriminator, one wrong number
# would be reported once for each form that it might have had.
CountAxis = Annotated[
    Annotated[PositiveInt, Tag("constant")]
    | Annotated[tuple[PositiveInt, ...], Field(min_length=1), Tag("list")]
    | Annotated[IntRange, Tag("int")],
    Discriminator(_whole_form),
]
StepsAxis = Annotated[
    Annotated[StepCount, Tag("constant")]
    | Annotated[tuple[StepCount, ...], Field(min_length=1), Tag("list")]
    | Annotated[IntRange, Tag("int")],
    Discriminator(_whole_form),
]
LrAxis = Annotated[
    Annotated[PositiveFloat, Tag("constant")]
    | Annotated[tuple[PositiveFloat, ...], Field(min_length=1), Tag("list")]
    | Annotated[UniformRange, Tag("uniform")]
    | Annotated[LogUniformRange, Tag("loguniform")],
    Discriminator(_real_form),
]
WeightAxis = Annotated[
    Annotated[NonNegativeFloat, Tag("constant")]
    | Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1), Tag("list")]
    | Annotated[UniformRange, Tag("uniform")]
    | Annotated[LogUniformRange, Tag("loguniform")],
    Discriminator(_real_form),
]


class ImageSource(Section):
    """A directory or a glob of images."""

    images: Annotated[str, Field(min_length=1)]
    """A directory (searched recursively) or a glob with `**`, relative to the working directory."""


class ManifestSource(Section):
    """A table of records, one image each: JSON, JSONL, CSV or parquet."""

    manifest: Annotated[str, Field(min_length=1)]
    """The table's path; its suffix tells the format."""
    image_column: str = "image"
    """The column with each image's path."""
    root: str | None = None
    """The folder that relative image paths start from; the table's own folder by default."""


class TensorSource(Section):
    """A directory of ready features, `features_N.pt`, one tensor [tokens, dim] each."""

    tensors: Annotated[str, Field(min_length=1)]
    """The directory."""


class SampleSource(Section):
    """Photographs that ship inside scikit-image and scikit-learn, cropped."""

    samples: Annotated[int, Field(strict=True, ge=3, le=1024)]
    """How many crops."""


def _source_form(value: Any) -> str:
    keys = value if isinstance(value, dict) else type(value).model_fields if isinstance(value, Section) else ()
    return next((form for form in ("manifest", "tensors", "samples") if form in keys), "images")


Source = Annotated[
    Annotated[ImageSource, Tag("images")]
    | Annotated[ManifestSource, Tag("manifest")]
    | Annotated[TensorSource, Tag("tensors")]
    | Annotated[SampleSource, Tag("samples")],
    Discriminator(_source_form),
]


class EncoderSpec(Section):
    """The Qwen2.5-VL vision tower."""

    checkpoint: Annotated[str, Field(min_length=1)] = "Qwen/Qwen2.5-VL-3B-Instruct"
    """A hub id, a checkpoint directory, or `tiny-random`: a small tower with seeded random weights."""
    image_size: Annotated[int, Field(strict=True, ge=28, le=4480, multiple_of=28)] = 448
    """Pixels a side; a token covers 28x28 of them."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the tower computes in."""


class FeaturesSpec(Section):
    """Where the features come from and how they are kept."""

    source: Source
    encoder: EncoderSpec = EncoderSpec()
    store_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """What the cache stores; float16 holds bfloat16 features exactly up to 65,280."""
    actors: PositiveInt | Literal["auto"] = "auto"
    """Encoder actors: `auto` takes one a GPU, or one for the whole machine where there is none."""
    max_quarantined: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The fraction of broken images above which the extraction fails."""


class SplitSpec(Section):
    """How the images are divided; what is left trains."""

    validation: PositiveInt | Annotated[float, Field(gt=0, lt=1)] = 0.1
    """A count, or a fraction of all images."""
    test: PositiveInt | Annotated[float, Field(gt=0, lt=1)] = 0.1
    """A count, or a fraction of all images."""


class DirectSpace(Section):
    """`direct`: a network regresses both factors."""

    lambda_b: WeightAxis = 1e-4
    """Weight of the mean squared element of B."""
    lambda_ortho: WeightAxis = 1e-3
    """Weight of the distance of A's columns from orthonormality."""


class SketchSpace(Section):
    """`sketch`: a learned sketch of the columns, B in closed form; nothing of its own to search."""


class FamiliesSpec(Section):
    """Which decomposers are tried, each with what it alone has; at least one."""

    direct: DirectSpace | None = None
    sketch: SketchSpace | None = None


class SpaceSpec(Section):
    """What is searched."""

    families: FamiliesSpec
    rank: CountAxis = 128
    """R, the columns of A and rows of B."""
    lr: LrAxis = 1e-3
    """AdamW's learning rate at the start."""
    weight_decay: WeightAxis = 1e-5
    """AdamW's decoupled weight decay."""
    batch_size: CountAxis = 8
    """Images a step."""


class SearchSpec(Section):
    """How the space is searched."""

    space: SpaceSpec
    method: Literal["grid", "random", "tpe"] = "tpe"
    """Every combination, independent draws, or Optuna's TPE."""
    trials: PositiveInt | None = None
    """How many trials; 20 by default for random and tpe. A grid's number follows from its axes."""


class TrainingSpec(Section):
    """The budget of one trial."""

    epochs: PositiveInt = 20
    """Passes over the training split."""
    patience: PositiveInt = 10
    """Epochs in a row without a lower validation MSE before a trial stops."""


class SchedulerSpec(Section):
    """Which trials are stopped early."""

    kind: Literal["asha", "none"] = "asha"
    grace_epochs: PositiveInt = 3
    """No trial is stopped before this epoch."""
    reduction_factor: Annotated[int, Field(strict=True, ge=2)] = 3
    """One in so many goes on at each rung."""
    compete_within: tuple[Literal["rank", "family"], ...] = ("rank",)
    """Trials compete for survival only with trials that agree in these."""


class ResourcesSpec(Section):
    """What a trial may use."""

    cpus_per_trial: PositiveFloat = 1
    """CPU cores; torch gets as many threads, at least one."""
    gpus_per_trial: NonNegativeFloat = 0
    """A fraction lets several trials share a GPU."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; by default as many as fit."""


class TrackingSpec(Section):
    """Where MLflow keeps the study."""

    uri: str | None = None
    """A server or database; by default MLFLOW_TRACKING_URI, else sqlite in the results directory."""
    experiment: str | None = None
    """The experiment's name; the study's by default."""


class ReportSpec(Section):
    """The post-study pictures."""

    images: tuple[Annotated[int, Field(strict=True, ge=0)], ...] = (0,)
    """Which images of the test split get spatial pictures, counted from 0."""
    channels: PositiveInt = 8
    """How many channels each shows."""


class StudySpec(Section):
    """A study file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
    """Letters, digits, `-` and `_`; names the MLflow experiment and the results folder."""
    features: FeaturesSpec
    search: SearchSpec
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    """Reaches the split, the searcher, every trial's weights and mini-batches, and the controls."""
    split: SplitSpec = SplitSpec()
    training: TrainingSpec = TrainingSpec()
    scheduler: SchedulerSpec = SchedulerSpec()
    objective: Literal["val_residual_ratio", "val_mse", "val_token_cosine"] = "val_residual_ratio"
    """What searcher and scheduler steer by, and what picks the best trial of a family and rank."""
    resources: ResourcesSpec = ResourcesSpec()
    tracking: TrackingSpec = TrackingSpec()
    report: ReportSpec = ReportSpec()
