"""Ready features in `.pt` files, one tensor [T, D] each. T tokens, D dim."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path

import torch

from lowrank_tune.errors import InputError
from lowrank_tune.features.jobs import UnusableError


def load_tensor(data: bytes) -> torch.Tensor:
    """Load one tensor from a file's bytes; nothing in them is executed.

    Returns:
        [T, D], of a floating type, on the CPU.

    Raises:
        UnusableError: the file holds anything else, or would have to be unpickled.
    """
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
