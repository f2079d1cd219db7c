"""A trainer's state as one plain file: tensors in safetensors, the rest as JSON in its header.

No pickle, so it can run no code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.files import write_whole

_REST = "state"


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a state of dicts, lists, tuples, tensors, numbers, text and None; the file is replaced as a whole.

    Raises:
        TypeError: it holds anything else.
    """
    tensors: dict[str, Tensor] = {}
    rest = json.dumps(_encode(state, tensors))
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata={_REST: rest}))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote, its tensors on the CPU.

    Raises:
        InputError: it is none, or it is damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            rest = json.loads((file.metadata() or {})[_REST])
            state: dict[str, Any] = _decode(rest, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path}: no checkpoint that can be read ({error}); delete it to train afresh") from error
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
