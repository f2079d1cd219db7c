"""Ready features, as they were saved -> one tensor [tokens, dim] an image."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from lowrank_tune.config.source import TensorSource
from lowrank_tune.errors import InputError, writable
from lowrank_tune.features.commits import UnusableError
from lowrank_tune.features.folders import Wanted, find_files
from lowrank_tune.features.images import HASHING_THREADS, SourceRecords, read_bytes
from lowrank_tune.features.tensor_files import SUFFIXES, Leaf, is_tensors, natural, only_leaf, read_leaves

if TYPE_CHECKING:
    import torch

_FEATURES = re.compile(r"features_\d+", re.IGNORECASE)
_NUMBER = re.compile(r"(\d{1,18})$", re.ASCII)
_NUMBERED = re.compile(r"(\d+|\[\d+\])(?=\.|$)", re.ASCII)
"""How the name of a thing in a list begins, or of one that a number is the key of."""


class _Image(NamedTuple):
    """An image's tensor, and where it is: `entry` is empty where it is all that its file has."""

    path: Path
    entry: str = ""
    tokens: int | None = None  # None where the file cannot be used
    dim: int | None = None
    dtype: str | None = None


def find_tensors(source: TensorSource, said: str = "features.source.tensors") -> SourceRecords:
    """Find the tensors of directories, files and globs, and how many images each file holds.

    Files are in the order of the numbers at the ends of their names, or else of their names. The columns are that
    `number`, `folder`, `file` and `entry`, and the `tokens`, `dim` and `dtype` that its file tells. No value is read,
    and a file that cannot be used is a record, too. `said` is where the user named them.

    Raises:
        InputError: there are none.
    """
    paths, notes = _files(source.paths, said)
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        scans = list(threads.map(_scan, paths))
    images, how = _images(paths, scans, source.key)
    top = Path(os.path.commonpath([path.parent for path in paths]))
    parts = [(image, image.path.relative_to(top)) for image in images]
    numbered = [image.entry.rstrip("]") if len(paths) == 1 else image.path.stem for image in images]
    columns = {
        "number": pa.array(
            [int(match[1]) if (match := _NUMBER.search(name)) else None for name in numbered], pa.int64()
        ),
        "folder": pa.array([writable(str(part.parent)) for _, part in parts], pa.string()),
        "file": pa.array([writable(str(part)) for _, part in parts], pa.string()),
        "entry": pa.array([writable(image.entry) or None for image in images], pa.string()),
        "tokens": pa.array([image.tokens for image in images], pa.int64()),
        "dim": pa.array([image.dim for image in images], pa.int64()),
        "dtype": pa.array([image.dtype for image in images], pa.string()),
    }
    places = tuple(f"{image.path}::{image.entry}" if image.entry else str(image.path) for image in images)
    return SourceRecords(places, pa.table(columns), (*notes, *how))


def _files(entries: Sequence[str], said: str) -> tuple[list[Path], list[str]]:
    """The files in order, and what was left out: of a directory with files named features_N, all others."""
    kinds = f"{', '.join(SUFFIXES[:-1])} and {SUFFIXES[-1]} are read"
    wanted = Wanted("file of tensors", "files of tensors", f"{said} ({kinds})", _kind_left_out)
    found, notes = find_files(entries, wanted)
    paths = list(map(Path, found))
    for folder in (Path(entry).absolute() for entry in map(os.path.expanduser, entries) if os.path.isdir(entry)):
        below = [path for path in paths if folder in path.parents]
        others = [path for path in below if not _FEATURES.fullmatch(path.stem)]
        if 0 < len(others) < len(below):
            paths = [path for path in paths if path not in set(others)]
            notes.append(f"left out: {len(others)} not named features_N, as others are ({others[0].name})")
    stems: dict[Path, Path] = {}
    for path in paths:
        other = stems.setdefault(path.with_suffix(""), path)
        if other.suffix != path.suffix and {other.suffix.lower(), path.suffix.lower()} <= set(SUFFIXES):
            raise InputError(
                f"{path.parent}: holds {path.stem} twice, as {other.suffix} and as {path.suffix}; choose one kind in "
                f"{said}, such as {path.parent.name}/*{other.suffix}"
            )
    return _ordered(paths), notes


def _kind_left_out(file: str, by_content: bool) -> str:
    suffix = os.path.splitext(file)[1].lower()
    try:
        wanted = suffix in SUFFIXES or ((by_content or not suffix) and is_tensors(file))
    except OSError:
        wanted = True  # told when it is read
    return "" if wanted else suffix or "without a suffix"


def _ordered(paths: list[Path]) -> list[Path]:
    """By the number at the end of the name, where every file has one; else, as in different folders, by name."""
    numbers = [int(match[1]) if (match := _NUMBER.search(path.stem)) else None for path in paths]
    by_number = None not in numbers
    folders = len(set(numbers)) < len(numbers) or not by_number

    def place(pair: tuple[Path, int | None]) -> tuple[object, ...]:
        path, number = pair
        folder = [natural(part) for part in path.parent.parts] if folders else []
        return folder, number if by_number else natural(path.name), path.name

    return [path for path, _ in sorted(zip(paths, numbers, strict=True), key=place)]


def _scan(path: Path) -> tuple[Leaf, ...]:
    """The arrays of a file; none where it cannot be read."""
    try:
        status = path.stat()
        return _scanned(path, status.st_mtime_ns, status.st_size)
    except (UnusableError, OSError):
        return ()


@functools.lru_cache(maxsize=2**17)
def _scanned(path: Path, changed: int, size: int) -> tuple[Leaf, ...]:
    return tuple(read_leaves(path))


def _images(
    paths: Sequence[Path], scans: Sequence[tuple[Leaf, ...]], key: str | None
) -> tuple[list[_Image], list[str]]:
    """Every file's images, and how files that are more than one tensor [tokens, dim] were taken."""
    alone = len(paths) == 1
    wanted = [[leaf for leaf in leaves if key is None or _is_named(leaf.name, key)] for leaves in scans]
    fitting = [[leaf for leaf in leaves if leaf.images()[0]] for leaves in wanted]
    names = Counter(leaf.name for leaves in fitting if len(leaves) > 1 for leaf in leaves)
    images: list[_Image] = []
    how: dict[str, tuple[int, int, str]] = {}
    for path, leaves, fits in zip(paths, wanted, fitting, strict=True):
        taken = [leaf for leaf in fits if len(fits) == 1 or _are_images(fits, names)]
        only = alone and len(taken) == 1
        made = [image for leaf in taken for image in _of_leaf(path, leaf, only, key is not None or len(taken) > 1)]
        images += made or [_Image(path, key or "")]
        if taken and (said := _how(taken, len(leaves), only)):
            files, number, example = how.get(said, (0, 0, f"{path.name}: {taken[0]}"))
            how[said] = files + 1, number + len(made), example
    return images, [
        f"tensors: {files} file{'s' * (files > 1)}, {said}: {number} image{'s' * (number > 1)} ({example})"
        for said, (files, number, example) in how.items()
    ]


def _is_named(name: str, key: str) -> bool:
    """Whether a key of the study file names an entry, or what it lies in; a number names a place in a list, too."""
    name, key = (re.sub(r"\[(\d+)\]|\((\d+)\)", r".\1\2", text).lstrip(".") for text in (name, key))
    return any(each == key or each.startswith(f"{key}.") for each in (name, re.sub(r"^\d+\.(?=\D)", "", name)))


def _are_images(fits: Sequence[Leaf], names: Counter[str]) -> bool:
    """Whether entries are an image each, and no several things of one image, which every file names alike."""
    numbered = all(_NUMBERED.match(leaf.name) for leaf in fits)
    things = {_NUMBERED.sub("", leaf.name, count=1) for leaf in fits}
    if len({leaf.images()[1:] for leaf in fits}) > 1 or (numbered and len(things) > 1):
        return False
    return numbered or all(names[leaf.name] == 1 and leaf.images()[0] == 1 for leaf in fits)


def _of_leaf(path: Path, leaf: Leaf, alone: bool, by_name: bool) -> Iterator[_Image]:
    number, tokens, dim = leaf.images(alone)
    if number == 1:
        yield _Image(path, leaf.name if by_name else "", tokens, dim, leaf.dtype)
    else:
        for row in range(number):
            yield _Image(path, f"{leaf.name}[{row}]", tokens, dim, leaf.dtype)


def _how(taken: Sequence[Leaf], leaves: int, alone: bool) -> str:
    leaf = taken[0]
    number, tokens, _ = leaf.images(alone)
    if len(taken) > 1:
        return "each entry taken as an image" if number == 1 else "each row of each entry taken as an image"
    said = [f"{leaf.name} taken"] if leaf.name and leaves > 1 and number == 1 else []
    if number > 1:
        said = [f"each row of {leaf.name or 'the tensor'} taken as an image"]
    if tokens not in leaf.shape:
        said.append("each grid taken as tokens, row by row")
    return " and ".join(said)


def load_tensor(data: bytes, shape: tuple[int, int] | None = None) -> torch.Tensor:
    """Load one floating tensor [T, D], of this shape where one is given, from a file; nothing in it is executed.

    Raises:
        UnusableError: the file holds anything else, or would have to be unpickled.
    """
    leaves = read_leaves(data)
    leaf = only_leaf(leaves)
    number, tokens, dim = leaf.images()
    if number != 1:
        raise UnusableError(f"holds {leaf}, {number} images")
    if shape and (tokens, dim) != shape:
        raise UnusableError(f"holds {leaf}; most files have {list(shape)}")
    try:
        return leaves[leaf](()).reshape(tokens, dim)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise UnusableError(f"its values cannot be read ({str(error).splitlines()[0]})") from error


def common_shape(records: SourceRecords, limit: float = 1.0, said: str = "features.source.tensors") -> tuple[int, int]:
    """Tokens and dim of most images, which `find_tensors` found.

    Raises:
        InputError: no image has finite features, or more than the fraction `limit` are unusable or of other shapes.
    """
    shapes = list(zip(*(records.columns[name].to_pylist() for name in ("tokens", "dim")), strict=True))
    counted = Counter(shape for shape in shapes if None not in shape).most_common()
    shape: tuple[int, int] = counted[0][0] if counted else (0, 0)
    others = [image for image, its in zip(records.images, shapes, strict=True) if its != shape]
    if counted and len(others) <= limit * len(shapes):
        fitting = (image for image, its in zip(records.images, shapes, strict=True) if its == shape)
        reasons = []
        for reason in _reasons(fitting):
            if reason is None:
                return shape
            reasons.append(reason)
        raise _nothing(len(shapes), reasons, said)
    unreadable = [image for image, its in zip(records.images, shapes, strict=True) if None in its]
    if not counted:
        raise _nothing(len(shapes), [reason or "" for reason in _reasons(unreadable[:3])], said)
    found = [f"{number} of {list(its)}, such as {records.images[shapes.index(its)]}" for its, number in counted[:4]]
    if unreadable:
        found.append(f"{len(unreadable)} unusable, such as {next(_reasons(unreadable))}")
    listed = "\n  ".join(found)
    raise InputError(
        f"{said}: {len(others)} of {len(shapes)} files or images cannot be used or have not most others' shape, "
        f"features.max_quarantined = {limit:g} allows {int(limit * len(shapes))}:\n  {listed}\n"
        "Correct them, name files of one shape, or raise it."
    )


def _nothing(number: int, reasons: Sequence[str], said: str) -> InputError:
    listed = "\n  ".join(reasons[:3])
    return InputError(f"{said}: none of the {number} files holds features:\n  {listed}")


def _reasons(images: Iterable[str | None]) -> Iterator[str | None]:
    """Why each image has no finite features; None where it has."""
    for image in filter(None, images):
        try:
            finite = bool(load_tensor(read_bytes(image)).isfinite().all())
            yield None if finite else f"{image}: holds NaN or infinite values"
        except (UnusableError, OSError) as error:
            yield f"{image}: {getattr(error, 'strerror', None) or error}"
