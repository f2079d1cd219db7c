"""The `features.source` of a study file -> a list of files with the user's columns."""

from __future__ import annotations

import difflib
import glob
import importlib.util
import io
import json
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from PIL import Image

from lowrank_tune.config.schema import ImageSource, ManifestSource, SampleSource, Source, TensorSource
from lowrank_tune.errors import InputError
from lowrank_tune.features.cache import SOURCES
from lowrank_tune.features.commits import UnusableError, checksum
from lowrank_tune.files import file_sha256, write_durably

if TYPE_CHECKING:
    import torch

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
HASHING_THREADS = 8
_REASONS_SHOWN = 5

# By path, never through skimage.data: that would download what is not shipped.
PHOTOGRAPHS = {
    "scikit-image": (
        "skimage/data",
        "astronaut.png brick.png camera.png cell.png chelsea.png coffee.png coins.png grass.png gravel.png "
        "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png motorcycle_right.png page.png retina.jpg "
        "rocket.jpg text.png",
    ),
    "scikit-learn": ("sklearn/datasets/images", "china.jpg flower.jpg"),
}
_SMALLEST_SIDE, _LARGEST_SIDE = 160, 480
_LEAST_CONTRAST = 6.0
"""Standard deviation of the grey values, of 255: leaves out the black corners round the retina."""
_TENSOR_FILE = re.compile(r"^features_(\d+)\.pt$")


@dataclass(frozen=True)
class SourceRecords:
    """A user's records, in order."""

    paths: tuple[Path | None, ...]  # each one's file, absolute, which may not be there; None where it names none
    columns: pa.Table  # the user's own columns, a row a record; none where the source has none


def read_records(source: Source, cache_root: Path, seed: int) -> SourceRecords:
    """List a source's files, the seed's sample crops below `cache_root`; none is opened but the manifest.

    Raises:
        InputError: the directory, glob or manifest gives no files.
    """
    match source:
        case ImageSource():
            return SourceRecords(tuple(_find_images(source.images)), pa.table({}))
        case ManifestSource():
            path = Path(source.manifest).expanduser().absolute()
            columns = _read_manifest(path, source.image_column)
            root = Path(source.root).expanduser().absolute() if source.root is not None else path.parent
            if not root.is_dir():
                raise InputError(f"{root}: no such directory; correct features.source.root")
            images = columns.column(source.image_column).to_pylist()
            return SourceRecords(tuple(root / image if image else None for image in images), columns)
        case TensorSource():
            place = Path(source.tensors).expanduser().absolute()
            if not place.is_dir():
                raise InputError(f"{place}: no such directory; correct features.source.tensors")
            found = {path: int(match[1]) for path in place.iterdir() if (match := _TENSOR_FILE.match(path.name))}
            if not found:
                raise InputError(f"{place}: no file named features_N.pt in it; correct features.source.tensors")
            paths = sorted(found, key=lambda path: (found[path], path.name))
            return SourceRecords(tuple(paths), pa.table({"number": [found[path] for path in paths]}))
        case SampleSource():
            crops = write_samples(source.samples, seed, cache_root.absolute() / "samples")
            return SourceRecords(tuple(path for path, _ in crops), pa.Table.from_pylist([cut for _, cut in crops]))


def _find_images(pattern: str) -> list[Path]:
    place, paths = Path(pattern).expanduser().absolute(), []
    if place.is_dir():
        paths = [path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
        problem = f"{place}: no images in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))}, in subfolders too)"
    elif glob.has_magic(pattern):
        paths = [path for name in glob.glob(str(place), recursive=True) if (path := Path(name)).is_file()]
        problem = f"{pattern}: matches no file from {Path.cwd()}"
    elif place.exists():
        problem = f"{place}: is a file; give a directory, a glob, or `manifest: {pattern}` for a table of records"
    else:
        problem = f"{place}: no such directory"
    if not paths:
        raise InputError(f"{problem}; correct features.source.images")
    return sorted(paths)


def _read_manifest(path: Path, image_column: str) -> pa.Table:
    if not path.is_file():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"{path}: no such file; correct features.source.manifest{near(path.name, siblings)}")
    try:
        match path.suffix.lower():
            case ".csv":
                # As text, or images named 0001 would become the number 1.
                text = pyarrow.csv.ConvertOptions(column_types={image_column: pa.string()})
                table = pyarrow.csv.read_csv(path, None, pyarrow.csv.ParseOptions(newlines_in_values=True), text)
            case ".parquet":
                table = pyarrow.parquet.read_table(path)
                for place, field in enumerate(table.schema):
                    if pa.types.is_dictionary(field.type):
                        table = table.set_column(place, field.name, table.column(place).cast(field.type.value_type))
            case _:
                records = _read_objects(path)
                names = dict.fromkeys(name for record in records for name in record)
                table = pa.table({name: _column([record.get(name) for record in records]) for name in names})
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as {path.suffix[1:].upper()} ({error})") from error
    if table.num_rows == 0:
        raise InputError(f"{path}: has no records")
    if image_column not in table.column_names:
        hint = near(image_column, table.column_names)
        raise InputError(
            f"{path}: has no column {image_column!r}, only {', '.join(table.column_names)}{hint} (image_column)"
        )
    kind = table.column(image_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"{path}: column {image_column!r} holds {kind}, not paths; name another image_column")
    return table


def near(name: str, others: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(others), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _read_objects(path: Path) -> list[dict[str, Any]]:
    """Records of a list of objects, an object a line, or an object with one such list (TextVQA's is in `data`)."""
    text = path.read_text(encoding="utf-8-sig")
    content: Any = []
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                content += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    else:
        content = json.loads(text)
    if isinstance(content, dict):
        lists = [
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        if len(lists) != 1:
            raise ValueError(f"an object with {len(lists)} lists of records; it must have one, or be one")
        content = lists[0]
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise ValueError("not a list of objects")
    return content


def _column(values: list[Any]) -> pa.Array:
    """An array of the values' common type, or else of their JSON."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([None if value is None else json.dumps(value) for value in values])


def write_samples(count: int, seed: int, parent: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Make sure that the first `count` crops of a seed, none like another, lie below `parent`.

    Returns each crop's file and where it was cut, `photograph`, `left`, `top`, `size` in pixels.
    """
    photographs: list[tuple[str, Image.Image]] = []
    for path in photograph_paths():
        with Image.open(path) as photograph:
            photographs.append((path.stem, photograph.copy()))
    generator = np.random.default_rng(seed)
    crops: dict[str, tuple[Path, dict[str, Any]]] = {}
    while len(crops) < count:
        name, image = photographs[len(crops) % len(photographs)]
        side = int(generator.integers(_SMALLEST_SIDE, min(_LARGEST_SIDE, *image.size) + 1))
        left = int(generator.integers(0, image.width - side + 1))
        top = int(generator.integers(0, image.height - side + 1))
        place = f"{name}-x{left}-y{top}-s{side}"
        crop = image.crop((left, top, left + side, top + side))
        if place in crops or np.asarray(crop.convert("L")).std() < _LEAST_CONTRAST:
            continue
        path = parent / f"seed-{seed}" / f"{len(crops):04d}-{place}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            crop.save(buffer, "PNG", compress_level=1)
            write_durably(path, buffer.getvalue())
        crops[place] = path, {"photograph": name, "left": left, "top": top, "size": side}
    return list(crops.values())


def photograph_paths() -> list[Path]:
    paths = []
    for distribution, (folder, names) in PHOTOGRAPHS.items():
        package, _, below = folder.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"features.source.samples needs the photographs in {distribution}: "
                f"pip install {distribution}, or name your own images"
            )
        root = Path(spec.submodule_search_locations[0]) / below
        for name in names.split():
            if not (root / name).is_file():
                raise InputError(f"{root / name}: this version of {distribution} does not ship it; install another")
            paths.append(root / name)
    return paths


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source, or the images of a cache, which have keys alone."""

    keys: tuple[str | None, ...]  # sha256 of each record's file, None where it cannot be read
    unread: tuple[str | None, ...]  # why not, None where it can
    records: tuple[Path | None, ...]
    paths: Mapping[str, Path | None]  # key -> one file that has it, in the order of the records

    def errors(self, quarantined: Mapping[str, str]) -> list[str | None]:
        """Why each record has no features, with what is known of keys; None for those that have or may have."""
        return [
            error if key is None else quarantined.get(key) for key, error in zip(self.keys, self.unread, strict=True)
        ]

    def check(self, quarantined: Mapping[str, str], limit: float, source: str, option: str) -> None:
        """Refuse, as an InputError, where more than the fraction `limit` of all records, or every one, has no image."""
        errors = self.errors(quarantined)
        named = zip(self.records, self.keys, errors, strict=True)
        broken = [f"{path or (key or 'a record')[:16]}: {error}" for path, key, error in named if error]
        if len(broken) <= limit * len(errors) and len(broken) < len(errors):
            return
        shown = broken[:_REASONS_SHOWN]
        if len(broken) > len(shown):
            shown.append(f"and {len(broken) - len(shown)} more")
        listed = "\n  ".join(shown)
        raise InputError(
            f"{source}: {len(broken)} of {len(errors)} files cannot be used, {option} = {limit:g} allows "
            f"{int(limit * len(errors))}:\n  {listed}\nCorrect or remove them, or raise {option}."
        )


def hash_files(records: SourceRecords) -> SourceFiles:
    """Read every file once; one that cannot be read becomes an error of its records."""

    def digest(path: Path | None) -> tuple[str | None, str | None]:
        if path is None:
            return None, "the record names no file"
        try:
            return file_sha256(path), None
        except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
            return None, getattr(error, "strerror", None) or str(error)

    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        keys, unread = zip(*threads.map(digest, records.paths), strict=True)
    paths: dict[str, Path | None] = {}
    for key, path in zip(keys, records.paths, strict=True):
        if key is not None:
            paths.setdefault(key, path)
    return SourceFiles(keys, unread, records.paths, paths)


RECORD_COLUMNS = ("record", "key", "path", "error")
"""Of the table of a source's records, before the user's own."""


def write_record_table(
    directory: Path, records: SourceRecords, keys: Sequence[str | None], errors: Sequence[str | None]
) -> Path:
    """Write a parquet named by its content's digest, one row a record: number, key, path, error and the user's columns.

    A user's column whose name is taken becomes `source_<name>`.
    """
    paths = [None if path is None else str(path) for path in records.paths]
    own = [pa.array(range(len(keys)), pa.int64()), *(pa.array(each, pa.string()) for each in (keys, paths, errors))]
    columns = dict(zip(RECORD_COLUMNS, own, strict=True))
    for name, column in zip(records.columns.column_names, records.columns.columns, strict=True):
        while name in columns:
            name = f"source_{name}"
        columns[name] = column
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    data = sink.getvalue().to_pybytes()
    path = directory / SOURCES / f"{checksum(data)}.parquet"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)  # a copy from an object store has no empty folders
        write_durably(path, data)
    return path


def load_tensor(data: bytes, shape: tuple[int, int] | None = None) -> torch.Tensor:
    """Load one floating tensor [T, D], of this shape where one is given, from a file; nothing in it is executed.

    Raises:
        UnusableError: the file holds anything else, or would have to be unpickled.
    """
    import torch

    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnusableError(
            "needs pickle, which could run code from the file; save the bare tensor again with torch.save(tensor, path)"
        ) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, ... for damaged archives
        raise UnusableError(f"not a readable .pt file ({(str(error) or 'empty').splitlines()[0]})") from error
    if not isinstance(content, torch.Tensor):
        raise UnusableError(f"holds a {type(content).__name__}, not one tensor [tokens, dim]")
    if content.layout is not torch.strided or content.is_nested:
        raise UnusableError("holds a sparse or nested tensor, not a dense one; save it again as [tokens, dim]")
    if content.ndim != 2 or not content.is_floating_point() or 0 in content.shape:
        raise UnusableError(f"holds {_describe(content)}, not floating [tokens, dim]")
    if shape and tuple(content.shape) != shape:
        raise UnusableError(f"holds {_describe(content)}; the first usable file has {list(shape)}")
    return content.detach()


def first_shape(paths: Iterable[Path | None]) -> tuple[int, int]:
    """Tokens and dim of the first file that holds finite features; an InputError where none does."""
    reasons = []
    for path in filter(None, paths):
        try:
            tensor = load_tensor(path.read_bytes())
            if tensor.isfinite().all():
                return tensor.shape[0], tensor.shape[1]
            reasons.append(f"{path}: holds NaN or infinite values")
        except (UnusableError, OSError) as error:
            reasons.append(f"{path}: {error}")
    listed = "\n  ".join(reasons[:3])
    raise InputError(f"features.source.tensors: none of the {len(reasons)} files holds features:\n  {listed}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
