"""The study file's schema: what each key means, its unit and its default.

A check of several keys stands in the smallest section that holds them, and runs though other sections are wrong, so
that one look at a file finds everything.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lowrank_tune.config.axes import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Real,
    Section,
    Text,
    distinct,
    rejected,
    whole_values,
)
from lowrank_tune.config.fidelity import FidelitySpec
from lowrank_tune.config.objective import Objective, no_ratio
from lowrank_tune.config.search import SearchSpec
from lowrank_tune.config.source import ImageSource, SampleSource, Source, TensorSource
from lowrank_tune.records import BYTES_AND_ERROR, BYTES_AT_ERROR, sign

TOKEN_PIXELS = 28
"""Pixels a side that one merged token of the Qwen2.5-VL tower covers."""
PILLOWS_MAX_PIXELS = 178_956_970
"""Where Pillow takes a picture for an attack: 512 MiB of pixels."""


class EncoderSpec(Section):
    """The Qwen2.5-VL vision tower."""

    checkpoint: Text = "Qwen/Qwen2.5-VL-3B-Instruct"
    """A hub id, a checkpoint directory, or `tiny-random`: a small tower with seeded random weights."""
    image_size: Annotated[int, Field(strict=True, ge=28, le=4480, multiple_of=TOKEN_PIXELS)] = 448
    """Pixels a side; a token covers 28x28 of them."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the tower computes in."""


CountOrAuto = Annotated[
    Annotated[PositiveInt, Tag("<count>")] | Annotated[Literal["auto"], Tag("<word>")],
    Discriminator(lambda value: "<word>" if isinstance(value, str) else "<count>"),
]


class FeaturesSpec(Section):
    """Where the features come from and how they are kept."""

    source: Source
    """Exactly one of images, manifest, tensors and samples."""
    encoder: EncoderSpec = EncoderSpec()
    store_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """What the cache stores; float16 holds bfloat16 features exactly up to 65,280."""
    actors: CountOrAuto = "auto"
    """Encoder actors: `auto` takes one a GPU, or one a machine where there is none."""
    batch_size: CountOrAuto = "auto"
    """Images that an encoder takes at once: `auto` fills its device. Halved where the GPU's memory does not suffice."""
    decoders: CountOrAuto = "auto"
    """Tasks that read and decode images at once, half a CPU each: `auto` takes as many as fit."""
    max_pixels: PositiveInt = PILLOWS_MAX_PIXELS
    """Images with more are refused, as attacks; decoding takes 3 to 8 bytes a pixel."""
    max_quarantined: Annotated[Real, Field(ge=0, le=1)] = 0.05
    """The fraction of broken images above which the extraction fails."""

    @field_validator("encoder")
    @classmethod
    def _nothing_to_encode(cls, encoder: EncoderSpec, info: ValidationInfo) -> EncoderSpec:
        if isinstance(info.data.get("source"), TensorSource):
            raise rejected("tensors are features already, nothing encodes them: remove encoder")
        return encoder


Share = Annotated[
    Annotated[PositiveInt, Tag("<count>")] | Annotated[float, Field(strict=True, gt=0, lt=1), Tag("<fraction>")],
    Discriminator(lambda value: "<fraction>" if isinstance(value, float) else "<count>"),
]


class SplitSpec(Section):
    """How the images are divided; what is left trains. With groups, whole ones until the count is reached."""

    validation: Share = 0.1
    """A count, or a fraction of all images."""
    test: Share = 0.1
    """A count, or a fraction of all images."""
    group_by: Text | None = None
    """A manifest's column: equals stay on one side, and intervals are over such groups; of samples the photograph."""

    @model_validator(mode="after")
    def _leaves_some(self) -> SplitSpec:
        shares = (self.validation, self.test)
        if sum(share for share in shares if isinstance(share, float)) >= 1:
            raise rejected("validation and test take every image and leave none to train: their sum must be below 1")
        return self

    def counts(self, n_images: int) -> tuple[int, int]:
        """How many of so many images validate and test, at least one each; their sum may exceed `n_images`."""
        # 0.29 of 100 is 28.999999999999996 in binary, and 29 to whoever wrote it.
        validation, test = (
            share if isinstance(share, int) else max(1, int(share * n_images + 1e-9))
            for share in (self.validation, self.test)
        )
        return validation, test


class TrainingSpec(Section):
    """The budget of one trial."""

    epochs: PositiveInt = 20
    """Passes over the training split."""
    patience: PositiveInt = 10
    """Epochs in a row without a better objective before a trial stops; never, if as many as epochs."""


class SchedulerSpec(Section):
    """Which trials are stopped early."""

    kind: Literal["asha", "none"] = "asha"
    """Asynchronous successive halving, or every trial to its end."""
    grace_epochs: PositiveInt = 3
    """No trial is stopped before this epoch; 3 by default, or training.epochs where that is less."""
    reduction_factor: Annotated[int, Field(strict=True, ge=2)] = 3
    """One in so many goes on at each rung."""
    compete_within: Annotated[tuple[Literal["rank", "family"], ...], AfterValidator(distinct)] = ("rank", "family")
    """Trials compete for survival, and are searched, only with trials that agree in these."""


def _whole_above_one(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise rejected("above 1 a number of GPUs must be whole; below 1 it is the share of one")
    return gpus


class ResourcesSpec(Section):
    """What a trial may use."""

    cpus_per_trial: PositiveFloat = 1.0
    """CPU cores, of each worker where there are several; torch gets as many threads, at least one."""
    gpus_per_trial: Annotated[NonNegativeFloat, AfterValidator(_whole_above_one)] = 0.0
    """A fraction lets several trials share a GPU; of each worker where there are several, and then a whole number."""
    workers_per_trial: PositiveInt = 1
    """Processes that train one trial together, each on its share of every batch, on one node or several."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; by default as many as fit, or this study's part of them while others work on the cluster."""

    @field_validator("workers_per_trial")
    @classmethod
    def _a_gpu_each(cls, workers: int, info: ValidationInfo) -> int:
        gpus = info.data.get("gpus_per_trial", 0.0)
        if workers > 1 and gpus != int(gpus):
            raise rejected(
                f"workers cannot share a GPU, for NCCL has them exchange between whole ones: make gpus_per_trial 1 "
                f"instead of {gpus:g}, or workers_per_trial 1"
            )
        return workers


def _registered_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}", name):
        raise rejected("letters, digits, spaces, `.`, `-` and `_` only, beginning with a letter or digit, 100 at most")
    return name


def has_secret(address: str) -> bool:
    """Whether an address holds a user name, password or token: study files are copied into results and MLflow."""
    secret = r"://.*@|[?&](user|password|passwd|pwd|token|key|secret|sig|signature)="
    return bool(re.search(secret, address, re.IGNORECASE | re.DOTALL))


def _web_address(address: str) -> str:
    if not re.match(r"https?://[^/\s?#]", address):
        raise rejected("an address on the web is expected, https://HOST/… or http://HOST/…")
    if has_secret(address):
        raise rejected(
            "an address in a study file must not hold a user name, password or token: give the whole address in the "
            "environment variable LOWRANK_TUNE_NOTIFY"
        )
    return address


class TrackingSpec(Section):
    """Where MLflow keeps the study."""

    uri: Text | None = None
    """A server or database; by default MLFLOW_TRACKING_URI, else sqlite in the results directory."""
    experiment: Text | None = None
    """The experiment's name; the study's by default."""
    register_as: Annotated[Text, AfterValidator(_registered_name)] | None = None
    """The model in MLflow's registry of which the best of each rank becomes a version; none by default."""

    @field_validator("uri")
    @classmethod
    def _no_secret(cls, uri: str | None) -> str | None:
        if uri and has_secret(uri) and not uri.startswith(("sqlite:", "file:///")):
            raise rejected(
                "an address in a study file must not hold a user name or password: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or give the whole address in MLFLOW_TRACKING_URI"
            )
        return uri


class ReportSpec(Section):
    """The post-study figures and pictures."""

    images: Annotated[tuple[Annotated[int, Field(strict=True, ge=0)], ...], AfterValidator(distinct)] = (0,)
    """Which images of the test split get spatial pictures, counted from 0."""
    channels: PositiveInt = 8
    """How many channels each shows."""
    confirm_seeds: Annotated[int, Field(strict=True, ge=0)] = 3
    """How often the best configuration of each rank is trained again, each time with a fresh seed; 0 for never."""


class KeepSpec(Section):
    """What stays of a study that has finished."""

    best: PositiveInt
    """Of each rank the trials with the best objective keep their weights, and so do those that were compared."""


class StudySpec(Section):
    """A study file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
    """Letters, digits, `-` and `_`; names the MLflow experiment and the results folder."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    """Reaches the split, the searcher, every trial's weights and mini-batches, and the controls."""
    features: FeaturesSpec
    split: SplitSpec = Field(default=SplitSpec(), validate_default=True)
    search: SearchSpec
    training: TrainingSpec = TrainingSpec()
    scheduler: SchedulerSpec = Field(default=SchedulerSpec(), validate_default=True)
    objective: Objective = Field(default="val_residual_ratio", validate_default=True)
    """What steers a search and picks its best; of [val_bytes, val_error] Optuna alone, the rest val_bytes_at_error."""
    target_error: Annotated[Real, Field(gt=0, lt=1)] | None = Field(default=None, validate_default=True)
    """The relative error that each image may have where bytes are counted: ‖X − Y‖ / ‖X‖ of what comes back, Y."""
    resources: ResourcesSpec = ResourcesSpec()
    tracking: TrackingSpec = TrackingSpec()
    report: ReportSpec = ReportSpec()
    keep: KeepSpec | None = None
    """Which trials keep their weights at the end, {best: N}; null, and all do. What an epoch gave stays of each."""
    notify: Annotated[Text, AfterValidator(_web_address)] | None = None
    """Where the end is told, a POST of JSON: finished, failed or stopped. A secret one goes to LOWRANK_TUNE_NOTIFY."""
    fidelity: FidelitySpec | None = Field(default=None, validate_default=True)
    """Whether the language model still answers the same, {questions: COLUMN}; null, and it is not asked."""

    @property
    def experiment(self) -> str:
        """The name of the MLflow experiment that the study belongs to."""
        return self.tracking.experiment or self.name

    @property
    def objectives(self) -> tuple[str, ...]:
        """What the searcher is told of a trial: one figure, or two."""
        return (self.objective,) if isinstance(self.objective, str) else self.objective

    @property
    def steered_by(self) -> str:
        """The one figure by which trials are stopped, weights kept and the best trials chosen."""
        return self.objective if isinstance(self.objective, str) else BYTES_AT_ERROR

    @field_validator("split")
    @classmethod
    def _samples_suffice(cls, split: SplitSpec, info: ValidationInfo) -> SplitSpec:
        n_images = _known_images(info)
        if n_images is not None and sum(split.counts(n_images)) >= n_images:
            validation, test = split.counts(n_images)
            raise rejected(f"{validation} images to validate and {test} to test leave none of {n_images} to train")
        return split

    @field_validator("split")
    @classmethod
    def _groups_exist(cls, split: SplitSpec, info: ValidationInfo) -> SplitSpec:
        features = info.data.get("features")
        match features.source if isinstance(features, FeaturesSpec) else None:
            case SampleSource() if "group_by" not in split.model_fields_set:
                return split.model_copy(update={"group_by": "photograph"})
            case SampleSource() if split.group_by not in (None, "photograph"):
                raise rejected("samples are grouped by photograph, or by null", ("group_by",))
            case ImageSource() if split.group_by is not None:
                reason = "only a manifest has columns to group by: list the files in one, or set it to null"
                raise rejected(reason, ("group_by",))
        return split

    @field_validator("search")
    @classmethod
    def _rank_exists(cls, search: SearchSpec, info: ValidationInfo) -> SearchSpec:
        tokens, highest = _known_tokens(info), max(whole_values(search.space.rank))
        if tokens is not None and highest > tokens and (limited := search.space.families.limited()):
            side = info.data["features"].encoder.image_size
            reason = f"rank {highest} of {', '.join(limited)} is above the {tokens} tokens of an image of {side} pixels"
            raise rejected(f"{reason} a side: lower it, or try shared alone", ("space", "rank"))
        return search

    @field_validator("scheduler")
    @classmethod
    def _grace_fits(cls, scheduler: SchedulerSpec, info: ValidationInfo) -> SchedulerSpec:
        training = info.data.get("training")
        if not isinstance(training, TrainingSpec) or scheduler.grace_epochs <= training.epochs:
            return scheduler
        if "grace_epochs" not in scheduler.model_fields_set:
            return scheduler.model_copy(update={"grace_epochs": training.epochs})
        if scheduler.kind == "asha":
            reason = f"asha would stop nothing: at most training.epochs, {training.epochs}, or kind: none"
            raise rejected(reason, ("grace_epochs",))
        return scheduler

    @field_validator("objective")
    @classmethod
    def _has_a_meaning(cls, objective: Objective, info: ValidationInfo) -> Objective:
        search, tokens = info.data.get("search"), _known_tokens(info)
        if objective == "val_residual_ratio" and isinstance(search, SearchSpec) and tokens is not None:
            highest = max(whole_values(search.space.rank))
            if highest > tokens:
                raise rejected(no_ratio(highest, tokens))
        return objective

    @field_validator("objective")
    @classmethod
    def _can_reach_the_target(cls, objective: Objective, info: ValidationInfo) -> Objective:
        search, steered_by = info.data.get("search"), objective if isinstance(objective, str) else BYTES_AT_ERROR
        target = search.stop.target if isinstance(search, SearchSpec) else None
        bound = float(steered_by in ("val_residual_ratio", "val_token_cosine"))
        if target is not None and sign(steered_by) * target < sign(steered_by) * bound:
            side = "above" if sign(steered_by) < 0 else "below"
            raise rejected(f"{steered_by} is never {side} {bound:g}: no trial can reach search.stop.target, {target:g}")
        return objective

    @field_validator("target_error")
    @classmethod
    def _goes_with_bytes(cls, target_error: float | None, info: ValidationInfo) -> float | None:
        objective = info.data.get("objective", "")
        counted = objective in (BYTES_AT_ERROR, BYTES_AND_ERROR)
        if counted and target_error is None:
            raise rejected("an objective in bytes needs the relative error that each image may have, such as 0.05")
        if objective and not counted and target_error is not None:
            raise rejected(
                f"only an objective in bytes has a use for it: remove it, or make objective {BYTES_AT_ERROR}"
            )
        return target_error

    @field_validator("fidelity")
    @classmethod
    def _can_be_asked(cls, fidelity: FidelitySpec | None, info: ValidationInfo) -> FidelitySpec | None:
        features, search = info.data.get("features"), info.data.get("search")
        if fidelity is not None and isinstance(features, FeaturesSpec):
            fidelity.check(features.source, search.space.rank if isinstance(search, SearchSpec) else None)
        if fidelity is None and isinstance(search, SearchSpec) and (weighted := search.space.families.weighted()):
            remedy = "ask a question, {questions: COLUMN}, or make metric none"
            if isinstance(features, FeaturesSpec) and isinstance(features.source, TensorSource):
                remedy = "of ready tensors there is none, so make metric none"
            raise rejected(f"metric: answers, of {', '.join(weighted)}, needs the language model's answers: {remedy}")
        return fidelity

    @field_validator("report")
    @classmethod
    def _images_exist(cls, report: ReportSpec, info: ValidationInfo) -> ReportSpec:
        split, n_images = info.data.get("split"), _known_images(info)
        if isinstance(split, SplitSpec) and (n_images is not None or isinstance(split.test, int)):
            n_test = split.counts(n_images or 0)[1]
            if max(report.images, default=0) >= n_test:
                reason = f"the test split has {n_test} images, counted from 0: the last is {n_test - 1}"
                raise rejected(reason, ("images",))
        return report


def _known_tokens(info: ValidationInfo) -> int | None:
    features = info.data.get("features")
    if not isinstance(features, FeaturesSpec) or isinstance(features.source, TensorSource):
        return None
    return (features.encoder.image_size // TOKEN_PIXELS) ** 2


def _known_images(info: ValidationInfo) -> int | None:
    features = info.data.get("features")
    source = features.source if isinstance(features, FeaturesSpec) else None
    return source.samples if isinstance(source, SampleSource) else None
