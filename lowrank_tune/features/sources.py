"""What a study's images are: the `features.source` of a study file -> a list of files with the user's columns."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lowrank_tune.errors import InputError
from lowrank_tune.features.manifests import read_manifest
from lowrank_tune.features.samples import write_samples
from lowrank_tune.spec.features import ImageSource, ManifestSource, SampleSource, Source, TensorSource

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_TENSOR_FILE = re.compile(r"^features_(\d+)\.pt$")


@dataclass(frozen=True)
class SourceRecords:
    """A user's records, in order.

    Attributes:
        paths: the absolute path of each one's file; None where the record names none. The files may not be there.
        columns: the user's own columns, a row a record; none where the source has none.
    """

    paths: tuple[Path | None, ...]
    columns: pa.Table


def read_records(source: Source, cache_root: Path, seed: int) -> SourceRecords:
    """List the files of a source; none is opened but the manifest.

    Args:
        source: from the study file; relative paths start from the working directory.
        cache_root: sample crops are written below it.
        seed: which sample crops.

    Raises:
        InputError: the directory, glob or manifest gives no files.
    """
    match source:
        case ImageSource():
            return _images(source.images)
        case ManifestSource():
            return _manifest(source)
        case TensorSource():
            return _tensors(Path(source.tensors).expanduser().absolute())
        case SampleSource():
            crops = write_samples(source.samples, seed, cache_root.absolute() / "samples")
            return SourceRecords(
                tuple(path for path, _ in crops), pa.Table.from_pylist([origin for _, origin in crops])
            )


def _images(pattern: str) -> SourceRecords:
    place = Path(pattern).expanduser().absolute()
    if place.is_dir():
        paths = [path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
        problem = f"{place}: no images in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))}, in subfolders too)"
    elif glob.has_magic(pattern):
        paths = [path for name in glob.glob(str(place), recursive=True) if (path := Path(name)).is_file()]
        problem = f"{pattern}: matches no file from {Path.cwd()}"
    elif place.exists():
        paths = []
        problem = f"{place}: is a file; give a directory, a glob, or `manifest: {pattern}` for a table of records"
    else:
        paths = []
        problem = f"{place}: no such directory"
    if not paths:
        raise InputError(f"{problem}; correct features.source.images")
    return SourceRecords(tuple(sorted(paths)), pa.table({}))


def _manifest(source: ManifestSource) -> SourceRecords:
    path = Path(source.manifest).expanduser().absolute()
    images, columns = read_manifest(path, source.image_column)
    root = Path(source.root).expanduser().absolute() if source.root is not None else path.parent
    if not root.is_dir():
        raise InputError(f"{root}: no such directory; correct features.source.root")
    return SourceRecords(tuple(root / image if image else None for image in images), columns)


def _tensors(directory: Path) -> SourceRecords:
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; correct features.source.tensors")
    numbered = sorted(
        (int(match[1]), path.name, path) for path in directory.iterdir() if (match := _TENSOR_FILE.match(path.name))
    )
    if not numbered:
        raise InputError(f"{directory}: no file named features_N.pt in it; correct features.source.tensors")
    numbers = pa.table({"number": [number for number, _, _ in numbered]})
    return SourceRecords(tuple(path for _, _, path in numbered), numbers)
