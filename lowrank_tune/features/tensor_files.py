"""Files of tensors, as they were saved -> what lies in them; their values are read one image at a time.

A file is told by how it begins, not by its name: torch's (zip or old), NumPy's .npy and .npz, safetensors. Nothing in
one is executed: what would have to be unpickled is refused. N images, T tokens, D dim.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import pickle
import re
import struct
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from lowrank_tune.features.commits import UnusableError
from lowrank_tune.files import LFS_POINTER

if TYPE_CHECKING:
    import torch

SUFFIXES = (".pt", ".pth", ".bin", ".npy", ".npz", ".safetensors")
_DEEPEST = 8
"""Of dicts and lists within each other, one of which may hold itself."""
_SHOWN = 6
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FLOATS |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

Load = Callable[[tuple[int, ...]], "torch.Tensor"]
"""Reads what an index chooses of a leaf."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """An array in a file.

    Attributes:
        name: its place in the file, `features`, `model.features`, `[3]` in a list, `(3)` in a tuple; empty where
            the file is nothing but it.
        shape: all its axes.
        dtype: in torch's words.
        problem: why it cannot be features, whatever its shape; empty where it can.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    problem: str = ""

    def images(self, alone: bool = False) -> tuple[int, int, int]:
        """How many images it is, and the tokens and dim of each; no image where it is no features.

        [T, D] is one and leading ones are dropped; [N, T, D] are N; [N, H, W, D] are N of H·W tokens. A square
        [S, S, D] is one image's grid, unless it is `alone`, all that a study has.
        """
        *lead, dim = self.shape or (0,)
        if self.problem or not lead or 0 in self.shape:
            return 0, 0, 0
        while len(lead) > 1 and lead[0] == 1 and (alone or len(lead) != 3):
            lead = lead[1:]
        match lead:
            case [tokens]:
                return 1, tokens, dim
            case [height, width] if height == width and not alone:
                return 1, height * width, dim
            case [number, tokens]:
                return number, tokens, dim
            case [number, height, width]:
                return number, height * width, dim
        return 0, 0, 0

    def index(self, row: int) -> tuple[int, ...]:
        """Of an image among several; empty where there is no such row."""
        axis = next((axis for axis, side in enumerate(self.shape) if side > 1), 0)
        return (0,) * axis + (row,) if row < self.shape[axis] else ()

    def __str__(self) -> str:
        """For people: dtype and shape."""
        return f"{self.dtype} {list(self.shape)}"


def natural(text: str) -> list[Any]:
    """Sort numbers in a text by their value: 9 before 10."""
    parts = re.split(r"([0-9]+)", text)
    return [(len(part.lstrip("0")), part.lstrip("0")) if place % 2 else part for place, part in enumerate(parts)]


def is_tensors(path: str) -> bool:
    """Whether a file begins as one of tensors does."""
    start, size = _start(path)
    return any(begins(start, size) for begins, _, _ in _FORMS)


def _start(file: str | Path | bytes) -> tuple[bytes, int]:
    """The first bytes of a file, or of a file's bytes, and how many there are."""
    if isinstance(file, bytes):
        return file[:64], len(file)
    with open(file, "rb") as stream:
        return stream.read(64), os.fstat(stream.fileno()).st_size


def read_entry(path: str, entry: str) -> bytes:
    """Read one image's tensor out of a file of several: as a safetensors file of its own, so the same in every form.

    Raises:
        UnusableError: the file cannot be read as tensors, or has no such entry.
        OSError: it cannot be read at all.
    """
    from safetensors.torch import save

    status = os.stat(path)
    with _OPENING:
        leaves = _opened(path, status.st_mtime_ns, status.st_size)
    for leaf, load in leaves.items():
        row = re.fullmatch(r"\[(\d{1,18})\]", entry.removeprefix(leaf.name)) if entry.startswith(leaf.name) else None
        index = leaf.index(int(row[1])) if row and leaf.shape else ()
        if entry == leaf.name or index:
            tensor = load(index)
            data: bytes = save({"features": tensor.reshape(-1, tensor.shape[-1])})
            return data
    found = _listed([*leaves]) or "nothing"
    raise UnusableError(f"has no entry {entry}, but {found}; correct key in features.source.tensors, or leave it out")


_OPENING = threading.Lock()


@functools.lru_cache(maxsize=2)
def _opened(path: str, changed: int, size: int) -> dict[Leaf, Load]:
    return read_leaves(Path(path))


def read_leaves(file: Path | bytes) -> dict[Leaf, Load]:
    """Find the arrays of a file, or of a file's bytes, in natural order; a path's values are mapped, not read.

    Raises:
        UnusableError: it cannot be read, or would have to be unpickled.
        OSError: there is no such file.
    """
    start, size = _start(file)
    if not size:
        raise UnusableError("the file is empty")
    if start[:1] == b"\x80" and start[1:2] != b"\x02":  # torch's own are of protocol 2
        raise UnusableError(_unpickled(""))
    if start.startswith(LFS_POINTER):
        raise UnusableError("a git-lfs pointer, not the file itself; fetch it with `git lfs pull`")
    kind, read = next(((kind, read) for begins, kind, read in _FORMS if begins(start, size)), ("", None))
    if read is None:
        raise UnusableError(
            "no file of torch, NumPy or safetensors; save it with torch.save(tensor, path) or np.save(path, array)"
        )
    try:
        found = list(read(file))
    except (UnusableError, OSError):
        raise
    except pickle.UnpicklingError as error:
        raise UnusableError(_unpickled(str(error))) from error
    except Exception as error:  # torch and NumPy raise RuntimeError, EOFError, KeyError, ... for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UnusableError(f"not a readable {kind} file ({reason})") from error
    found.sort(key=lambda pair: natural(pair[0].name))
    leaves = dict(found)
    if len({leaf.name for leaf in leaves}) < len(found):
        raise UnusableError("two of its entries have the same name")
    return leaves


def _unpickled(message: str) -> str:
    match = _GLOBAL.search(message)
    what = match[1] if match else ""
    better = "save the bare tensor again with torch.save(tensor, path)"
    if what.startswith("numpy"):
        what, better = "a NumPy array", "save it with np.save(path, array)"
    elif "modeling_" in what:
        better = "save one tensor of it, as with torch.save(output.last_hidden_state, path)"
    return f"needs pickle{f' for {what}' if what else ''}, which could run code from the file; {better}"


def _read_numpy(file: Path | bytes) -> Iterator[tuple[Leaf, Load]]:
    if isinstance(file, bytes):
        header, stream = _header(io.BytesIO(file)), io.BytesIO(file)
        yield _array_leaf("", *header[:2], lambda: np.load(stream, allow_pickle=False))
    else:
        with open(file, "rb") as opened:
            shape, dtype, _ = _header(opened)
        mapped = np.zeros(0) if dtype.hasobject else np.load(file, mmap_mode="r", allow_pickle=False)
        yield _array_leaf("", shape, dtype, lambda: mapped)


def _read_npz(file: Path | bytes) -> Iterator[tuple[Leaf, Load]]:
    archive = zipfile.ZipFile(io.BytesIO(file) if isinstance(file, bytes) else file)
    for info in archive.infolist():
        if not info.filename.endswith(".npy"):
            continue
        with archive.open(info) as member:
            shape, dtype, start = _header(member)
        if not dtype.hasobject and start + math.prod(shape) * dtype.itemsize != info.file_size:
            raise UnusableError(f"{info.filename} in it is damaged")
        if isinstance(file, Path) and info.compress_type == zipfile.ZIP_STORED and not dtype.hasobject:
            read = functools.partial(_mapped, file, info.header_offset, start, shape, dtype)
        else:
            read = functools.partial(_unzipped, archive, info)
        yield _array_leaf(info.filename.removesuffix(".npy"), shape, dtype, functools.cache(read))


def _mapped(path: Path, header: int, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Map a member of a zip file that is not compressed."""
    with open(path, "rb") as stream:
        stream.seek(header + 26)
        name, extra = struct.unpack("<HH", stream.read(4))
    flat = np.memmap(path, np.uint8, "r", header + 30 + name + extra + start, (math.prod(shape) * dtype.itemsize,))
    return flat.view(dtype).reshape(shape)


def _unzipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape and dtype of an .npy file, and where its values start."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype, stream.tell()


def _array_leaf(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], read: Callable[[], np.ndarray[Any, Any]]
) -> tuple[Leaf, Load]:
    problem = "" if dtype.kind == "f" else "not floating [tokens, dim]"
    if dtype.hasobject:
        problem = "an object array, which would have to be unpickled; save one array of numbers, np.stack(arrays)"

    def load(index: tuple[int, ...]) -> torch.Tensor:
        import torch

        kind = dtype.newbyteorder("=") if dtype.itemsize <= 8 else np.dtype(np.float64)
        return torch.from_numpy(np.array(read()[index], dtype=kind, order="C"))

    return Leaf(name, tuple(map(int, shape)), dtype.name, problem), load


def _read_safetensors(file: Path | bytes) -> Iterator[tuple[Leaf, Load]]:
    from safetensors import safe_open
    from safetensors.torch import load

    if isinstance(file, bytes):
        for name, tensor in load(file).items():
            yield _tensor_leaf(name, tensor)
        return
    opened: Any = safe_open(str(file), framework="pt")
    for name in opened.keys():  # noqa: SIM118 (no mapping)
        sliced = opened.get_slice(name)
        kind = sliced.get_dtype()
        leaf = Leaf(
            name,
            tuple(sliced.get_shape()),
            _FLOATS.get(kind, kind.lower()),
            "" if kind in _FLOATS else "not floating [tokens, dim]",
        )
        yield leaf, functools.partial(_safe_slice, opened, name)


def _safe_slice(opened: Any, name: str, index: tuple[int, ...]) -> torch.Tensor:
    tensor: torch.Tensor = opened.get_slice(name)[index] if index else opened.get_tensor(name)
    return _wide(tensor)


def _read_torch(file: Path | bytes) -> Iterator[tuple[Leaf, Load]]:
    import torch

    stream = io.BytesIO(file) if isinstance(file, bytes) else str(file)
    mapped = isinstance(file, Path) and zipfile.is_zipfile(file)  # the older form cannot be
    content = torch.load(stream, map_location="cpu", weights_only=True, mmap=mapped or None)
    found = [_tensor_leaf(name, tensor) for name, tensor in _tensors(content, "", 0)]
    if not found:
        raise UnusableError(f"holds a {type(content).__name__}, not one tensor [tokens, dim]")
    yield from found


def _tensors(content: Any, name: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    if isinstance(content, torch.Tensor):
        yield name, content
    elif depth < _DEEPEST and isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key), depth + 1)
    elif depth < _DEEPEST and isinstance(content, list | tuple):
        for place, value in enumerate(content):
            # What several functions gave is a tuple, as the layers of one image; images are collected in a list.
            where = f"({place})" if isinstance(content, tuple) else f"[{place}]"
            yield from _tensors(value, f"{name}{where}", depth + 1)


def _tensor_leaf(name: str, tensor: torch.Tensor) -> tuple[Leaf, Load]:
    import torch

    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_nested or tensor.layout is not torch.strided:
        what = "a sparse or nested tensor, not a dense one; save it again as [tokens, dim]"
        return Leaf(name, (), kind, what), lambda index: tensor
    problem = "" if tensor.is_floating_point() else "not floating [tokens, dim]"
    if tensor.is_quantized:
        problem = "a quantised tensor; save x.dequantize()"
    elif tensor.is_meta:
        problem = "a tensor without values (on the device meta); save it again where it has some"
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        problem = "a view that repeats its values; save x.contiguous()"
    return Leaf(name, tuple(tensor.shape), kind, problem), lambda index: _wide(tensor.detach()[index])


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """What arithmetic knows: of eight bits it knows little."""
    return tensor.float() if tensor.element_size() == 1 else tensor.contiguous()


def _is_safetensors(start: bytes, size: int) -> bool:
    return start[8:9] == b"{" and 8 + int.from_bytes(start[:8], "little") <= size


_FORMS: list[tuple[Callable[[bytes, int], bool], str, Callable[[Path | bytes], Iterator[tuple[Leaf, Load]]]]] = [
    (lambda start, size: start.startswith(b"\x93NUMPY"), ".npy", _read_numpy),
    (lambda start, size: start.startswith(b"PK"), ".pt or .npz", lambda file: _read_zip(file)),
    (_is_safetensors, ".safetensors", _read_safetensors),
    (lambda start, size: start.startswith(b"\x80"), ".pt", _read_torch),
]
"""How each kind of file begins, what it is called, and what reads it; the first that fits."""


def _read_zip(file: Path | bytes) -> Iterator[tuple[Leaf, Load]]:
    try:
        with zipfile.ZipFile(io.BytesIO(file) if isinstance(file, bytes) else file) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise UnusableError("cut short or damaged; copy or save it again") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise UnusableError("holds a TorchScript program, no tensors; save what it gives with torch.save(tensor, path)")
    return _read_npz(file) if any(name.endswith(".npy") for name in names) else _read_torch(file)


def only_leaf(leaves: Iterable[Leaf]) -> Leaf:
    """The one array that is features; an UnusableError, which lists what there is, where none is or several are."""
    leaves = list(leaves)
    fitting = [leaf for leaf in leaves if leaf.images()[0]]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise UnusableError(_described(leaves))
    key = re.sub(r"^(\d+|\[\d+\])\.", "", fitting[0].name)  # of each in a list
    raise UnusableError(
        f"holds {len(fitting)} entries that may be the features, {_listed(fitting)}; name one of them, "
        f"`tensors: {{path: …, key: {json.dumps(key)}}}`"
    )


def _described(leaves: list[Leaf]) -> str:
    """Say what a file holds instead of features."""
    if len(leaves) == 1 and not leaves[0].name:
        (leaf,) = leaves
        if leaf.problem and not leaf.problem.startswith("not floating"):
            return f"holds {leaf.problem}"
        hint = "; save x.float()" if leaf.problem and leaf.dtype.startswith(("int", "uint", "bool")) else ""
        return f"holds {leaf}, not floating [tokens, dim]{hint}"
    return f"holds no floating [tokens, dim], but {_listed(leaves) or 'nothing'}"


def _listed(leaves: list[Leaf]) -> str:
    shown = [f"{leaf.name or 'one'} ({leaf if leaf.shape else leaf.problem or leaf})" for leaf in leaves[:_SHOWN]]
    return ", ".join([*shown, *([f"and {len(leaves) - _SHOWN} more"] if len(leaves) > _SHOWN else [])])
