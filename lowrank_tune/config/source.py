"""`features.source` of a study file: where images or features come from."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from lowrank_tune.config.axes import Section, Text

SOURCES = ("images", "manifest", "tensors", "samples")


Paths = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[Annotated[tuple[Text, ...], Field(min_length=1)], Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list | tuple) else "<text>"),
]


class ImageSource(Section):
    """Images: a directory, a glob, a file, or a list of these."""

    images: Paths
    """A directory (searched recursively), a glob with `**` or braces, or a list; from the working directory."""


class ManifestSource(Section):
    """Tables of records, an image or several each: JSON, JSONL, CSV, TSV, parquet or tars."""

    manifest: Paths
    """A table, a directory of tables or a glob, or a list of them; the suffix of each file tells its format."""
    image_column: Text | None = None
    """The column with each record's image; by default the one that has such a name."""
    records: Text | None = None
    """Which of a JSON file's lists of records, where it has several, such as `train`."""
    root: Text | None = None
    """The folder that relative image paths start from; each table's own folder by default."""


class NamedTensors(Section):
    """Files of ready features that hold more than the features."""

    path: Paths
    """A directory, a file, a glob, or a list of them."""
    key: Annotated[Text, BeforeValidator(lambda key: str(key) if type(key) is int else key)]
    """The entry's name in each file, `hidden.states` for one within another, or a number in a list."""


class TensorSource(Section):
    """Ready features, [tokens, dim] an image: in .pt, .pth, .bin, .npy, .npz or .safetensors files."""

    tensors: Annotated[
        Annotated[Paths, Tag("<paths>")] | Annotated[NamedTensors, Tag("<named>")],
        Discriminator(lambda value: "<named>" if isinstance(value, dict | Section) else "<paths>"),
    ]
    """A directory (searched recursively), a file, a glob, a list of them, or {path:, key:}."""

    @property
    def paths(self) -> tuple[str, ...]:
        """All that is named."""
        named = self.tensors.path if isinstance(self.tensors, NamedTensors) else self.tensors
        return (named,) if isinstance(named, str) else named

    @property
    def key(self) -> str | None:
        """The entry to take of each file, where one is named."""
        return self.tensors.key if isinstance(self.tensors, NamedTensors) else None


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
