"""A trainer's state as two plain files: tensors in safetensors, the rest in JSON. No pickle, so it can run no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

_TENSORS, _REST = "tensors.safetensors", "state.json"


def write_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """Write a state of dicts, lists, tuples, tensors, numbers, text and None into an existing directory.

    Raises:
        TypeError: it holds anything else.
    """
    tensors: dict[str, Tensor] = {}
    rest = _encode(state, tensors)
    save_file(tensors, directory / _TENSORS)
    (directory / _REST).write_text(json.dumps(rest), encoding="utf-8")


def read_checkpoint(directory: Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote, its tensors on the CPU."""
    rest = json.loads((directory / _REST).read_text(encoding="utf-8"))
    state: dict[str, Any] = _decode(rest, load_file(directory / _TENSORS))
    return state


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    # Containers are tagged because JSON knows neither tuples nor keys that are numbers, and an optimiser has both.
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Tensor():
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {"tensor": name}
        case dict():
            return {"dict": [[key, _encode(item, tensors)] for key, item in value.items()]}
        case list():
            return {"list": [_encode(item, tensors) for item in value]}
        case tuple():
            return {"tuple": [_encode(item, tensors) for item in value]}
        case _:
            raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    match value:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": items}:
            return {key: _decode(item, tensors) for key, item in items}
        case {"list": items}:
            return [_decode(item, tensors) for item in items]
        case {"tuple": items}:
            return tuple(_decode(item, tensors) for item in items)
        case _:
            return value
