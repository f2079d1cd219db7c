"""Ready features, as they were saved -> one tensor [tokens, dim] each."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from lowrank_tune.config.schema import TensorSource
from lowrank_tune.errors import InputError
from lowrank_tune.features.commits import UnusableError
from lowrank_tune.features.images import SourceRecords, read_bytes

if TYPE_CHECKING:
    import torch

_TENSOR_FILE = re.compile(r"^features_(\d+)\.pt$")


def find_tensors(source: TensorSource) -> SourceRecords:
    """Find the tensors of a directory, in the order of their numbers; an InputError where there are none."""
    place = Path(source.tensors).expanduser().absolute()
    if not place.is_dir():
        raise InputError(f"{place}: no such directory; correct features.source.tensors")
    found = {path: int(match[1]) for path in place.iterdir() if (match := _TENSOR_FILE.match(path.name))}
    if not found:
        raise InputError(f"{place}: no file named features_N.pt in it; correct features.source.tensors")
    paths = sorted(found, key=lambda path: (found[path], path.name))
    return SourceRecords(tuple(map(str, paths)), pa.table({"number": [found[path] for path in paths]}))


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


def first_shape(images: Iterable[str | None]) -> tuple[int, int]:
    """Tokens and dim of the first file that holds finite features; an InputError where none does."""
    reasons = []
    for path in filter(None, images):
        try:
            tensor = load_tensor(read_bytes(path))
            if tensor.isfinite().all():
                return tensor.shape[0], tensor.shape[1]
            reasons.append(f"{path}: holds NaN or infinite values")
        except (UnusableError, OSError) as error:
            reasons.append(f"{path}: {error}")
    listed = "\n  ".join(reasons[:3])
    raise InputError(f"features.source.tensors: none of the {len(reasons)} files holds features:\n  {listed}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
