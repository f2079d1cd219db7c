"""The study file's `features` section: exactly one of four sources, and what turns its images into features."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo, field_validator

from lowrank_tune.spec.section import PositiveInt, Real, Section, Text, rejected

TOKEN_PIXELS = 28
"""Pixels a side that one merged token of the Qwen2.5-VL tower covers."""
MANIFEST_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
SOURCES = ("images", "manifest", "tensors", "samples")


class ImageSource(Section):
    """A directory or a glob of images."""

    images: Text
    """A directory (searched recursively) or a glob with `**`, relative to the working directory."""


def _table_path(path: str) -> str:
    if PurePath(path).suffix.lower() not in MANIFEST_SUFFIXES:
        raise rejected(f"the suffix tells the table's format: {', '.join(MANIFEST_SUFFIXES)}")
    return path


class ManifestSource(Section):
    """A table of records, one image each: JSON, JSONL, CSV or parquet."""

    manifest: Annotated[Text, AfterValidator(_table_path)]
    """The table's path; its suffix tells the format."""
    image_column: Text = "image"
    """The column with each image's path."""
    root: Text | None = None
    """The folder that relative image paths start from; the table's own folder by default."""


class TensorSource(Section):
    """A directory of ready features, `features_N.pt`, one tensor [tokens, dim] each."""

    tensors: Text
    """The directory."""


class SampleSource(Section):
    """Photographs that ship inside scikit-image and scikit-learn, cropped."""

    samples: Annotated[int, Field(strict=True, ge=3, le=1024)]
    """How many crops."""


def _source_form(value: Any) -> str | None:
    keys = value if isinstance(value, dict) else type(value).model_fields if isinstance(value, Section) else ()
    forms = [form for form in SOURCES if form in keys]
    return f"<{forms[0]}>" if len(forms) == 1 else None


Source = Annotated[
    Annotated[ImageSource, Tag("<images>")]
    | Annotated[ManifestSource, Tag("<manifest>")]
    | Annotated[TensorSource, Tag("<tensors>")]
    | Annotated[SampleSource, Tag("<samples>")],
    Discriminator(
        _source_form,
        custom_error_type="source",
        custom_error_message="exactly one source is expected: {images: PATH}, {manifest: PATH}, {tensors: PATH} "
        "or {samples: COUNT}",
    ),
]


class EncoderSpec(Section):
    """The Qwen2.5-VL vision tower."""

    checkpoint: Text = "Qwen/Qwen2.5-VL-3B-Instruct"
    """A hub id, a checkpoint directory, or `tiny-random`: a small tower with seeded random weights."""
    image_size: Annotated[int, Field(strict=True, ge=28, le=4480, multiple_of=TOKEN_PIXELS)] = 448
    """Pixels a side; a token covers 28x28 of them."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the tower computes in."""


def _one_or_other(value: Any) -> str:
    return "<word>" if isinstance(value, str) else "<count>"


CountOrAuto = Annotated[
    Annotated[PositiveInt, Tag("<count>")] | Annotated[Literal["auto"], Tag("<word>")],
    Discriminator(_one_or_other),
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
    max_quarantined: Annotated[Real, Field(ge=0, le=1)] = 0.05
    """The fraction of broken images above which the extraction fails."""

    @field_validator("encoder")
    @classmethod
    def _nothing_to_encode(cls, encoder: EncoderSpec, info: ValidationInfo) -> EncoderSpec:
        if isinstance(info.data.get("source"), TensorSource):
            raise rejected("tensors are features already, nothing encodes them: remove encoder")
        return encoder
