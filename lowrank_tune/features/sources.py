"""What a study's images are: the `features.source` of a study file -> a list of files with the user's columns."""

from __future__ import annotations

import difflib
import glob
import hashlib
import importlib.util
import io
import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from lowrank_tune.features.cache import SOURCES, UnusableError, checksum
from lowrank_tune.files import write_durably

if TYPE_CHECKING:
    import torch


def read_manifest(path: Path, image_column: str) -> tuple[list[str | None], pa.Table]:
    """Read a table of records.

    JSON is a list of objects, or an object with exactly one such list (TextVQA's files keep theirs under `data`).
    Nested values stay nested; a JSON column whose values have no common type is kept as JSON text.

    Args:
        path: `.json`, `.jsonl`, `.csv` or `.parquet`.
        image_column: the column with the images' paths.

    Returns:
        The image path of each record, None where it has none, and the table.

    Raises:
        InputError: the file or the column is missing, or the file cannot be read as what its suffix says.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path}: features.source.manifest reads {', '.join(_READERS)}, "
            f"not {path.suffix or 'a file without suffix'}"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file; correct features.source.manifest{_near(path)}")
    try:
        table = reader(path, image_column)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as {path.suffix[1:].upper()} ({error})") from error
    if table.num_rows == 0:
        raise InputError(f"{path}: has no records")
    if image_column not in table.column_names:
        near = difflib.get_close_matches(image_column, table.column_names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(
            f"{path}: has no column {image_column!r}, only {', '.join(table.column_names)}{hint} (image_column)"
        )
    images = table.column(image_column)
    if not (pa.types.is_string(images.type) or pa.types.is_large_string(images.type)):
        raise InputError(f"{path}: column {image_column!r} holds {images.type}, not paths; name another image_column")
    return [value or None for value in images.to_pylist()], table


def _near(path: Path) -> str:
    names = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _read_json(path: Path, image_column: str) -> pa.Table:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict):
        lists = [value for value in content.values() if _is_records(value)]
        if len(lists) != 1:
            raise ValueError(f"an object with {len(lists)} lists of records; it must have one, or be one")
        content = lists[0]
    return _from_records(content, image_column)


def _read_json_lines(path: Path, image_column: str) -> pa.Table:
    records = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error
    return _from_records(records, image_column)


def _read_csv(path: Path, image_column: str) -> pa.Table:
    # Without this, images named 0001 would become the number 1.
    as_text = pyarrow.csv.ConvertOptions(column_types={image_column: pa.string()})
    quoted_lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.read_csv(path, parse_options=quoted_lines, convert_options=as_text)


def _read_parquet(path: Path, image_column: str) -> pa.Table:
    table = pyarrow.parquet.read_table(path)
    plain = [column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column for column in table]
    return pa.table(plain, names=table.column_names)


_READERS: dict[str, Callable[[Path, str], pa.Table]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _is_records(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _from_records(records: object, image_column: str) -> pa.Table:
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("not a list of objects")
    names = dict.fromkeys(name for record in records for name in record)
    return pa.table({name: _column([record.get(name) for record in records]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([None if value is None else json.dumps(value) for value in values])


# By path, never through skimage.data: that would download what is not shipped.
_PHOTOGRAPHS = {
    "skimage": (
        "data/astronaut.png",
        "data/brick.png",
        "data/camera.png",
        "data/cell.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/coins.png",
        "data/grass.png",
        "data/gravel.png",
        "data/hubble_deep_field.jpg",
        "data/ihc.png",
        "data/moon.png",
        "data/motorcycle_left.png",
        "data/motorcycle_right.png",
        "data/page.png",
        "data/retina.jpg",
        "data/rocket.jpg",
        "data/text.png",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
_SMALLEST_SIDE = 160
_LARGEST_SIDE = 480
_LEAST_CONTRAST = 6.0
"""Standard deviation of the grey values, of 255: leaves out the black corners round the retina."""

_NAME = re.compile(r"^(\d{4})-([a-z_]+)-x(\d+)-y(\d+)-s(\d+)\.png$")


def write_samples(count: int, seed: int, parent: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Make sure that the first `count` crops of a seed lie below `parent`.

    Args:
        count: how many.
        seed: which crops.
        parent: gets a folder `seed-<seed>`.

    Returns:
        Each crop's file and its origin: `photograph`, `left`, `top`, `size` in pixels.

    Raises:
        InputError: the packages that ship the photographs are not installed.
        OSError: the folder cannot be written.
    """
    directory = parent / f"seed-{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    found = _written(directory)
    if any(number not in found for number in range(count)):
        for number, (name, crop) in zip(range(count), _crops(seed), strict=False):
            if number not in found:
                buffer = io.BytesIO()
                crop.save(buffer, "PNG", compress_level=1)
                write_durably(directory / f"{number:04d}-{name}.png", buffer.getvalue())
        found = _written(directory)
    return [found[number] for number in range(count)]


def _written(directory: Path) -> dict[int, tuple[Path, dict[str, Any]]]:
    found = {}
    for path in directory.iterdir():
        if match := _NAME.match(path.name):
            number, photograph, left, top, size = match.groups()
            origin = {"photograph": photograph, "left": int(left), "top": int(top), "size": int(size)}
            found[int(number)] = (path, origin)
    return found


def _crops(seed: int) -> Iterator[tuple[str, Image.Image]]:
    """Endless distinct crops, each with a name that tells where it was cut; the photographs take turns."""
    photographs = [(path.stem, _load(path)) for path in _photograph_paths()]
    generator = np.random.default_rng(seed)
    seen = set()
    while True:
        for stem, image in photographs:
            while True:
                side = int(generator.integers(_SMALLEST_SIDE, min(_LARGEST_SIDE, *image.size) + 1))
                left = int(generator.integers(0, image.width - side + 1))
                top = int(generator.integers(0, image.height - side + 1))
                name = f"{stem}-x{left}-y{top}-s{side}"
                crop = image.crop((left, top, left + side, top + side))
                if name not in seen and np.asarray(crop.convert("L")).std() >= _LEAST_CONTRAST:
                    break
            seen.add(name)
            yield name, crop


def _photograph_paths() -> list[Path]:
    paths = []
    for package, files in _PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"features.source.samples needs the photographs in {_DISTRIBUTIONS[package]}: "
                f"pip install {_DISTRIBUTIONS[package]}, or name your own images"
            )
        root = Path(spec.submodule_search_locations[0])
        for file in files:
            if not (root / file).is_file():
                raise InputError(
                    f"{root / file}: this version of {_DISTRIBUTIONS[package]} does not ship it; install another"
                )
            paths.append(root / file)
    return paths


def _load(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


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


HASHING_THREADS = 8
REASONS_SHOWN = 5


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source.

    Attributes:
        keys: sha256 of each record's file, None where it cannot be read.
        errors: why not, None where it can.
        records: each record's file, for messages.
        paths: key -> one file that has it, in the order of the records.
    """

    keys: tuple[str | None, ...]
    errors: tuple[str | None, ...]
    records: tuple[Path | None, ...]
    paths: dict[str, Path]


def hash_files(records: SourceRecords) -> SourceFiles:
    """Read every file once; one that cannot be read becomes an error of its records."""

    def digest(path: Path | None) -> tuple[str | None, str | None]:
        if path is None:
            return None, "the record names no file"
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest(), None
        except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
            return None, getattr(error, "strerror", None) or str(error)

    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        keys, errors = zip(*threads.map(digest, records.paths), strict=True)
    paths: dict[str, Path] = {}
    for key, path in zip(keys, records.paths, strict=True):
        if key is not None and path is not None:
            paths.setdefault(key, path)
    return SourceFiles(keys, errors, records.paths, paths)


class Quarantine:
    """Which records have no usable image, and how many may.

    Args:
        files: the source's.
        limit: `features.max_quarantined`, a fraction of all records.
    """

    def __init__(self, files: SourceFiles, limit: float) -> None:
        self.files = files
        self.limit = limit

    def errors(self, reasons: Mapping[str, str]) -> list[str | None]:
        """Why each record has no features, None for those that have or may still have.

        Args:
            reasons: key -> why it is quarantined.
        """
        return [
            error if key is None else reasons.get(key)
            for key, error in zip(self.files.keys, self.files.errors, strict=True)
        ]

    def check(self, reasons: Mapping[str, str]) -> None:
        """Compare with the limit.

        Raises:
            InputError: it is exceeded, or no record is left; the message has the first reasons.
        """
        errors = self.errors(reasons)
        broken = [(path, error) for path, error in zip(self.files.records, errors, strict=True) if error]
        if len(broken) <= self.limit * len(errors) and len(broken) < len(errors):
            return
        listed = [f"\n  {path or 'a record'}: {error}" for path, error in broken[:REASONS_SHOWN]]
        more = f"\n  and {len(broken) - REASONS_SHOWN} more" if len(broken) > REASONS_SHOWN else ""
        raise InputError(
            f"features.source: {len(broken)} of {len(errors)} files cannot be used, "
            f"features.max_quarantined = {self.limit:g} allows {int(self.limit * len(errors))}:"
            f"{''.join(listed)}{more}\n"
            "Correct or remove them, or raise features.max_quarantined."
        )


def write_record_table(
    directory: Path, records: SourceRecords, keys: Sequence[str | None], errors: Sequence[str | None]
) -> Path:
    """Write one row a record: its number, key, path and error, and the user's columns.

    A column of the user's whose name is taken, by one of those four or by another column, is kept as `source_<name>`.

    Args:
        directory: the cache; the file's name is the digest of its content, so the same records give the same file.
        records: the source.
        keys: the key of each record's file, None where it could not be read.
        errors: why a record has no features, None where it has.

    Raises:
        OSError: the directory cannot be written.
    """
    columns = {
        "record": pa.array(range(len(keys)), pa.int64()),
        "key": pa.array(keys, pa.string()),
        "path": pa.array([None if path is None else str(path) for path in records.paths], pa.string()),
        "error": pa.array(errors, pa.string()),
    }
    for name, column in zip(records.columns.column_names, records.columns.columns, strict=True):
        while name in columns:
            name = f"source_{name}"
        columns[name] = column
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    data = sink.getvalue().to_pybytes()
    path = directory / SOURCES / f"{checksum(data)}.parquet"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_durably(path, data)
    return path


def load_tensor(data: bytes) -> torch.Tensor:
    """Load one tensor from a file's bytes; nothing in them is executed.

    Returns:
        [T, D], of a floating type, on the CPU.

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
        raise UnusableError(
            f"not a readable .pt file ({str(error).splitlines()[0] if str(error) else 'empty'})"
        ) from error
    if not isinstance(content, torch.Tensor):
        raise UnusableError(f"holds a {type(content).__name__}, not one tensor [tokens, dim]")
    if content.layout is not torch.strided or content.is_nested:
        raise UnusableError("holds a sparse or nested tensor, not a dense one; save it again as [tokens, dim]")
    if content.ndim != 2 or not content.is_floating_point() or 0 in content.shape:
        raise UnusableError(f"holds {_describe(content)}, not floating [tokens, dim]")
    return content.detach()


def check_shape(tensor: torch.Tensor, tokens: int, dim: int) -> None:
    """Compare with the shape that the cache has.

    Raises:
        UnusableError: it differs.
    """
    if tuple(tensor.shape) != (tokens, dim):
        raise UnusableError(f"holds {_describe(tensor)}; the first usable file has [{tokens}, {dim}]")


def first_shape(paths: Iterable[Path]) -> tuple[int, int]:
    """Tokens and dim of the first file that holds finite features.

    Raises:
        InputError: no file does; the message has the first reasons.
    """
    import torch

    reasons = []
    for path in paths:
        try:
            tensor = load_tensor(path.read_bytes())
            if not torch.isfinite(tensor).all():
                raise UnusableError("holds NaN or infinite values")
        except (UnusableError, OSError) as error:
            reasons.append(f"{path}: {error}")
            continue
        return tensor.shape[0], tensor.shape[1]
    listed = "\n  ".join(reasons[:3])
    raise InputError(f"features.source.tensors: none of the {len(reasons)} files holds features:\n  {listed}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
