"""Qwen2.5-VL checkpoints as files."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from lowrank_tune.errors import InputError
from lowrank_tune.files import read_header, write_directory_once

TINY_RANDOM = "tiny-random"
TINY_VERSION = 1
"""Counts up with every change of its vision tower, so that an old copy on disk is not taken for the new one."""
WEIGHTS_MARK = "lowrank_tune_weights"
"""The key of config.json that says `random`."""

_TINY_VISION = {
    "depth": 2,
    "fullatt_block_indexes": [1],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 256,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "window_size": 112,
}
"""What every checkpoint must say of its tower; the rest has defaults."""
_TINY_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    WEIGHTS_MARK: "random",
    "vision_config": _TINY_VISION,
    "eos_token_id": 1,
    "hidden_size": 256,
    "image_token_id": 60,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "rope_scaling": {"mrope_section": [8, 12, 12], "type": "mrope"},
    "tie_word_embeddings": False,
    "video_token_id": 61,
    "vision_end_token_id": 63,
    "vision_start_token_id": 62,
    "vocab_size": 64,
}
_TINY_PREPROCESSOR = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
}

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_TOWER_KEY = re.compile(r"^(?:model\.)?visual\.(.+)$")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint's two small files say."""

    name: str  # as the study file has it
    directory: Path
    revision: str | None  # the hub's commit; None for a directory
    weights: str  # `random`, `pretrained` or `unknown`
    vision: dict[str, Any]
    preprocessor: dict[str, Any]

    def shape(self, image_size: int) -> tuple[int, int]:
        """Tokens and dim of a square image of so many pixels a side; an InputError where patches do not fill it."""
        token = self.vision["patch_size"] * self.vision["spatial_merge_size"]
        if image_size % token:
            raise InputError(
                f"features.encoder.image_size: {image_size} is not a multiple of {token}, "
                f"the pixels a side of one token of {self.name}; use {max(1, round(image_size / token)) * token}"
            )
        return (image_size // token) ** 2, self.vision["out_hidden_size"]


@dataclass(frozen=True)
class TowerFiles:
    """The vision tower's tensors on disk: file -> {name in it -> name in the tower}."""

    files: dict[Path, dict[str, str]]

    def digest(self) -> str:
        """Sha256 of the tower's names, types, shapes and values, however they are divided into files."""
        # By the files' own bytes: torch takes seconds to import, and a run that finds its features needs none here.
        parts = {}
        for path, names in self.files.items():
            start, header = read_header(path)
            with path.open("rb") as file:
                for theirs, ours in names.items():
                    begin, end = header[theirs]["data_offsets"]
                    kind = json.dumps([header[theirs]["dtype"], header[theirs]["shape"]])
                    file.seek(start + begin)
                    parts[ours] = hashlib.sha256(kind.encode() + file.read(end - begin)).hexdigest()
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_checkpoint_config(name: str, cache_root: Path) -> CheckpointConfig:
    """Find a checkpoint, `tiny-random`, a directory or a hub id, and read its configuration without its weights.

    Raises:
        InputError: there is no such checkpoint, it cannot be downloaded, or it is no Qwen2.5-VL.
    """
    if name == TINY_RANDOM:
        # Known before it is written, which a look at a study file must not do.
        directory = _tiny_directory(cache_root / "checkpoints")
        return CheckpointConfig(name, directory, None, "random", _TINY_VISION, _TINY_PREPROCESSOR)
    directory = _fetch(name, cache_root, None, [_CONFIG])
    config = _read_json(directory / _CONFIG)
    if config.get("model_type") != "qwen2_5_vl":
        raise InputError(
            f"{name}: {_CONFIG} describes {config.get('model_type', 'no model_type')!r}, not a Qwen2.5-VL model "
            "('qwen2_5_vl'); name another checkpoint in features.encoder.checkpoint"
        )
    vision = config.get("vision_config") or {}
    if absent := [key for key, value in _TINY_VISION.items() if not isinstance(vision.get(key), type(value))]:
        raise InputError(
            f"{name}: vision_config in {_CONFIG} lacks {', '.join(absent)}; the file is not the published one"
        )
    local = Path(name).expanduser().is_dir()
    revision = None if local else directory.name
    preprocessor = _read_json(_fetch(name, cache_root, revision, [_PREPROCESSOR]) / _PREPROCESSOR)
    # A directory may hold anything under the published names; only the hub says whose weights they are.
    weights = "random" if config.get(WEIGHTS_MARK) == "random" else "unknown" if local else "pretrained"
    return CheckpointConfig(name, directory, revision, weights, vision, preprocessor)


def find_tower(config: CheckpointConfig, cache_root: Path) -> TowerFiles:
    """Find the files that hold `visual.*`, and download only those.

    Raises:
        InputError: the checkpoint has no vision tower, or a file that its index names is missing.
    """
    where = config.name, cache_root, config.revision
    try:
        weight_map = _read_json(_fetch(*where, [_INDEX]) / _INDEX).get("weight_map") or {}
    except InputError:
        weight_map = dict.fromkeys(_open(_fetch(*where, [_SINGLE]) / _SINGLE).keys(), _SINGLE)
    files: dict[str, dict[str, str]] = {}
    for key, file in sorted(weight_map.items()):
        if match := _TOWER_KEY.match(key):
            files.setdefault(file, {})[key] = match[1]
    if not files:
        raise InputError(
            f"{config.name}: no tensor of the checkpoint begins with `visual.`, so it has no vision tower; "
            "use a Qwen2.5-VL checkpoint, not its language model alone"
        )
    directory = _fetch(*where, sorted(files))
    tower = TowerFiles({directory / file: names for file, names in sorted(files.items())})
    for path, names in tower.files.items():
        if absent := names.keys() - set(_open(path).keys()):
            raise InputError(
                f"{path}: lacks {min(absent)}, which the checkpoint's index places there; download it again"
            )
    return tower


def write_tiny_checkpoint(parent: Path) -> Path:
    """Make sure that `tiny-random`, the same weights everywhere, lies below `parent`."""
    directory = _tiny_directory(parent)
    if directory.exists():
        return directory
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_TINY_CONFIG))
    model.to_empty(device="cpu")
    # numpy's generator: torch's gives other numbers on other processors.
    generator = np.random.default_rng(20250131)
    for name, tensor in model.state_dict().items():
        if "norm" in name or "ln_q" in name:
            tensor.fill_(1.0)
        else:  # small biases, and matrices that keep the scale of what passes through them
            deviation = np.float32(tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.02)
            tensor.copy_(torch.from_numpy(generator.standard_normal(tensor.shape, np.float32) * deviation))
    with tempfile.TemporaryDirectory() as temporary, quiet_transformers():
        # Several files, some without the tower, so that a loader of the tower can be seen to leave those alone.
        model.save_pretrained(temporary, max_shard_size="1MB")
        files = {path.name: path.read_bytes() for path in Path(temporary).glob("model*")}
    # As published, whatever this version of transformers would leave out or add.
    files[_CONFIG] = json.dumps(_TINY_CONFIG, indent=2).encode()
    files[_PREPROCESSOR] = json.dumps(_TINY_PREPROCESSOR, indent=2).encode()
    write_directory_once(directory, files)
    return directory


def _tiny_directory(parent: Path) -> Path:
    return parent / f"{TINY_RANDOM}-{TINY_VERSION}"


def _fetch(name: str, cache_root: Path, revision: str | None, files: Sequence[str]) -> Path:
    """The folder that holds these files of a checkpoint; what only the hub has is downloaded."""
    tiny = name == TINY_RANDOM
    directory = write_tiny_checkpoint(cache_root / "checkpoints") if tiny else Path(name).expanduser()
    if directory.is_dir():
        if absent := [file for file in files if not (directory / file).is_file()]:
            raise InputError(
                f"{directory}: {absent[0]} is missing; the directory is not a complete checkpoint, download it again"
            )
        return directory
    if not _HUB_ID.match(name):
        hint = " (did you mean tiny-random?)" if difflib.get_close_matches(name, [TINY_RANDOM]) else ""
        raise InputError(
            f"features.encoder.checkpoint: {name} is neither a directory nor a hub id "
            f"such as Qwen/Qwen2.5-VL-3B-Instruct{hint}"
        )
    # Without a revision, the one that is on this machine already is taken before the newest one is asked for.
    for offline in (True, False):
        try:
            options: dict[str, Any] = {"revision": revision, "allow_patterns": [*files], "local_files_only": offline}
            directory = Path(snapshot_download(name, **options))
        except LocalEntryNotFoundError:
            problem = "is not on this machine and the hub does not answer"
        except (OSError, ValueError) as error:
            problem = f"cannot be downloaded ({str(error).strip().splitlines()[0]})"
        else:
            if all((directory / file).is_file() for file in files):
                return directory
            problem = "is not on this machine, and the hub has no such file there or does not answer"
    raise InputError(
        f"{name}: {', '.join(files)} {problem}; download it where there is a network (`hf download {name}`) and give "
        "the directory, name another safetensors Qwen2.5-VL checkpoint, or use `checkpoint: tiny-random`"
    )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar and no report of what was loaded."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); download the checkpoint again") from error
    return content


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: is no readable safetensors file ({error}); download it again") from error
