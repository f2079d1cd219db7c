"""Qwen2.5-VL checkpoints as files: where they lie, what their configuration says, which files hold the vision tower.

Nothing here loads a weight or imports torch's models, so a shape or a fingerprint costs no more than reading files.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.numpy import save

from lowrank_tune.errors import InputError
from lowrank_tune.files import read_header, write_directory_once

WEIGHTS_MARK = "lowrank_tune_weights"
"""The key of config.json that says `random`."""

VERSION = 1
"""Counts up with every change of the weights, so that an old copy on disk is not taken for the new one."""

_SEED = 20250131
_VISION: dict[str, Any] = {
    "depth": 2,
    "fullatt_block_indexes": [1],
    "hidden_act": "silu",
    "hidden_size": 64,
    "in_chans": 3,
    "intermediate_size": 128,
    "model_type": "qwen2_5_vl",
    "num_heads": 2,
    "out_hidden_size": 256,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 112,
}
_TEXT: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [8, 12, 12], "type": "mrope"},
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 64,
}
_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "image_token_id": 60,
    "model_type": "qwen2_5_vl",
    "torch_dtype": "float32",
    "video_token_id": 61,
    "vision_config": _VISION,
    "vision_end_token_id": 63,
    "vision_start_token_id": 62,
    WEIGHTS_MARK: "random",
    **_TEXT,
}
_PREPROCESSOR = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "processor_class": "Qwen2_5_VLProcessor",
    "temporal_patch_size": 2,
}


def write_tiny_checkpoint(parent: Path) -> Path:
    """Make sure that the checkpoint lies below `parent`, and return its folder.

    The language model has shards of its own, so that a loader of the tower can be seen to leave them alone.

    Raises:
        OSError: the folder cannot be written.
    """
    directory = parent / f"tiny-random-{VERSION}"
    if directory.exists():
        return directory
    generator = np.random.default_rng(_SEED)
    tower = _filled(_tower_shapes(), generator)
    half = len(tower) // 2
    names = list(tower)
    shards = [
        _filled(_language_shapes(), generator),
        {name: tower[name] for name in names[:half]},
        {name: tower[name] for name in names[half:]},
    ]
    files = {"config.json": _json(_CONFIG), "preprocessor_config.json": _json(_PREPROCESSOR)}
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[file] = save(tensors, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    total = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
    files["model.safetensors.index.json"] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    write_directory_once(directory, files)
    return directory


def _filled(shapes: dict[str, tuple[int, ...]], generator: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
    """Ones for norms, small biases, and matrices that keep the scale of what passes through them."""
    tensors = {}
    for name, shape in shapes.items():
        if "norm" in name or "ln_q" in name:
            tensors[name] = np.ones(shape, np.float32)
        else:
            deviation = np.float32(math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.02)
            tensors[name] = generator.standard_normal(shape, np.float32) * deviation
    return tensors


def _tower_shapes() -> dict[str, tuple[int, ...]]:
    hidden, inner = _VISION["hidden_size"], _VISION["intermediate_size"]
    merged = hidden * _VISION["spatial_merge_size"] ** 2
    patch = (_VISION["in_chans"], _VISION["temporal_patch_size"], _VISION["patch_size"], _VISION["patch_size"])
    shapes: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (hidden, *patch)}
    for block in range(_VISION["depth"]):
        prefix = f"visual.blocks.{block}"
        shapes |= {f"{prefix}.norm1.weight": (hidden,), f"{prefix}.norm2.weight": (hidden,)}
        shapes |= _linear(f"{prefix}.attn.qkv", 3 * hidden, hidden) | _linear(f"{prefix}.attn.proj", hidden, hidden)
        shapes |= _linear(f"{prefix}.mlp.gate_proj", inner, hidden) | _linear(f"{prefix}.mlp.up_proj", inner, hidden)
        shapes |= _linear(f"{prefix}.mlp.down_proj", hidden, inner)
    shapes |= {"visual.merger.ln_q.weight": (hidden,)}
    shapes |= _linear("visual.merger.mlp.0", merged, merged) | _linear(
        "visual.merger.mlp.2", _VISION["out_hidden_size"], merged
    )
    return shapes


def _language_shapes() -> dict[str, tuple[int, ...]]:
    hidden, inner, vocabulary = _TEXT["hidden_size"], _TEXT["intermediate_size"], _TEXT["vocab_size"]
    keys = hidden * _TEXT["num_key_value_heads"] // _TEXT["num_attention_heads"]
    layer = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (vocabulary, hidden),
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
        f"{layer}.mlp.gate_proj.weight": (inner, hidden),
        f"{layer}.mlp.up_proj.weight": (inner, hidden),
        f"{layer}.mlp.down_proj.weight": (hidden, inner),
    }
    for name, out in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys)):
        shapes |= _linear(f"{layer}.self_attn.{name}", out, hidden)
    return shapes


def _linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


TINY_RANDOM = "tiny-random"

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_TOWER_KEY = re.compile(r"^(?:model\.)?visual\.(.+)$")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_VISION_NUMBERS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "out_hidden_size",
    "patch_size",
    "spatial_merge_size",
    "window_size",
)
_ALTERNATIVES = (
    "download it where there is a network (`hf download {name}`) and give the directory, "
    "or use `checkpoint: tiny-random`"
)


@dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint's two small files say.

    Attributes:
        name: as the study file has it.
        directory: where its files lie.
        revision: the hub's commit; None for a directory.
        weights: `random`, `pretrained` or `unknown`.
        vision: `vision_config` of config.json.
        preprocessor: preprocessor_config.json.
    """

    name: str
    directory: Path
    revision: str | None
    weights: str
    vision: dict[str, Any]
    preprocessor: dict[str, Any]

    def shape(self, image_size: int) -> tuple[int, int]:
        """Tokens and dim of one square image.

        Args:
            image_size: pixels a side.

        Raises:
            InputError: the size is not a whole number of merged patches.
        """
        token = self.vision["patch_size"] * self.vision["spatial_merge_size"]
        if image_size % token:
            raise InputError(
                f"features.encoder.image_size: {image_size} is not a multiple of {token}, "
                f"the pixels a side of one token of {self.name}; use {max(1, round(image_size / token)) * token}"
            )
        return (image_size // token) ** 2, self.vision["out_hidden_size"]


@dataclass(frozen=True)
class TowerFiles:
    """The vision tower's tensors on disk.

    Attributes:
        files: file -> {name in the file -> name in the tower}; only files that hold some of the tower.
    """

    files: dict[Path, dict[str, str]]

    def digest(self) -> str:
        """Sha256 of the tower's names, types, shapes and values; how they are divided into files does not matter."""
        parts = {}
        for path, names in self.files.items():
            for name, digest in _tensor_digests(path, set(names)).items():
                parts[names[name]] = digest
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_checkpoint_config(name: str, cache_root: Path) -> CheckpointConfig:
    """Find a checkpoint and read its configuration, without its weights.

    Args:
        name: `tiny-random`, a directory, or a hub id.
        cache_root: `tiny-random` is written below it at its first use.

    Raises:
        InputError: there is no such checkpoint, it cannot be downloaded, or it is no Qwen2.5-VL.
    """
    fetch = _fetcher(name, cache_root, None)
    path = fetch(CONFIG)
    config = _read_json(path)
    if config.get("model_type") != "qwen2_5_vl":
        raise InputError(
            f"{name}: {CONFIG} describes {config.get('model_type', 'no model_type')!r}, not a Qwen2.5-VL model "
            "('qwen2_5_vl'); name another checkpoint in features.encoder.checkpoint"
        )
    vision = config.get("vision_config") or {}
    absent = [key for key in _VISION_NUMBERS if not isinstance(vision.get(key), int)]
    if absent or not isinstance(vision.get("fullatt_block_indexes"), list):
        missing = ", ".join(absent or ["fullatt_block_indexes"])
        raise InputError(f"{name}: vision_config in {CONFIG} lacks {missing}; the file is not the published one")
    revision = path.parent.name if _is_hub_id(name) else None
    preprocessor = _read_json(_fetcher(name, cache_root, revision)(PREPROCESSOR))
    return CheckpointConfig(name, path.parent, revision, _weights(name, config), vision, preprocessor)


def find_tower(config: CheckpointConfig, cache_root: Path) -> TowerFiles:
    """Find the files that hold `visual.*`, and download only those.

    Raises:
        InputError: the checkpoint has no vision tower, or a file that its index names is missing.
    """
    fetch = _fetcher(config.name, cache_root, config.revision)
    weight_map = _weight_map(fetch)
    files: dict[str, dict[str, str]] = {}
    for key, file in weight_map.items():
        if match := _TOWER_KEY.match(key):
            files.setdefault(file, {})[key] = match[1]
    if not files:
        raise InputError(
            f"{config.name}: no tensor of the checkpoint begins with `visual.`, so it has no vision tower; "
            "use a Qwen2.5-VL checkpoint, not its language model alone"
        )
    found = {fetch(file): names for file, names in sorted(files.items())}
    for path, names in found.items():
        if absent := set(names) - set(_header(path)[1]):
            raise InputError(
                f"{path}: lacks {min(absent)}, which the checkpoint's index places there; download it again"
            )
    return TowerFiles(found)


def _weight_map(fetch: Callable[[str], Path]) -> dict[str, str]:
    """Tensor name -> file name, of a checkpoint in several files or in one."""
    try:
        index = fetch(INDEX)
    except InputError:
        return dict.fromkeys(_header(fetch(SINGLE))[1], SINGLE)
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: has no weight_map; download the checkpoint again")
    return weight_map


def _is_hub_id(name: str) -> bool:
    return not Path(name).expanduser().is_dir() and _HUB_ID.match(name) is not None


def _fetcher(name: str, cache_root: Path, revision: str | None) -> Callable[[str], Path]:
    """A function from a file's name in the checkpoint to its path here; it raises InputError where there is none."""
    if name == TINY_RANDOM:
        return _from_directory(write_tiny_checkpoint(cache_root / "checkpoints"))
    directory = Path(name).expanduser()
    if directory.is_dir():
        return _from_directory(directory)
    if not _is_hub_id(name):
        hint = " (did you mean tiny-random?)" if difflib.get_close_matches(name, [TINY_RANDOM]) else ""
        raise InputError(
            f"features.encoder.checkpoint: {name} is neither a directory nor a hub id "
            f"such as Qwen/Qwen2.5-VL-3B-Instruct{hint}"
        )
    return _from_hub(name, revision)


def _from_directory(directory: Path) -> Callable[[str], Path]:
    def fetch(file: str) -> Path:
        path = directory / file
        if not path.is_file():
            raise InputError(
                f"{directory}: {file} is missing; the directory is not a complete checkpoint, download it again"
            )
        return path

    return fetch


def _from_hub(name: str, revision: str | None) -> Callable[[str], Path]:
    """Without a revision, the one that is on this machine already is taken before the newest one is asked for."""

    def fetch(file: str) -> Path:
        try:
            if revision is None:
                with contextlib.suppress(LocalEntryNotFoundError):
                    return Path(hf_hub_download(name, file, local_files_only=True))
            return Path(hf_hub_download(name, file, revision=revision))
        except LocalEntryNotFoundError as error:
            raise InputError(
                f"{name}: {file} is not on this machine and the hub does not answer; {_ALTERNATIVES.format(name=name)}"
            ) from error
        except EntryNotFoundError as error:
            raise InputError(
                f"{name}: the hub has no {file} there; it is not a safetensors Qwen2.5-VL checkpoint"
            ) from error
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{name}: {file} cannot be downloaded ({reason}); {_ALTERNATIVES.format(name=name)}"
            ) from error

    return fetch


def _weights(name: str, config: dict[str, Any]) -> str:
    if config.get(WEIGHTS_MARK) == "random":
        return "random"
    # A directory may hold anything under the published names; only the hub says whose weights they are.
    return "unknown" if Path(name).expanduser().is_dir() else "pretrained"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); download the checkpoint again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a JSON object; download the checkpoint again")
    return content


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    try:
        return read_header(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no readable safetensors file ({error}); download it again") from error


def _tensor_digests(path: Path, names: set[str]) -> dict[str, str]:
    start, header = _header(path)
    digests = {}
    with path.open("rb") as file:
        for name in sorted(names):
            entry = header[name]
            begin, end = entry["data_offsets"]
            digest = hashlib.sha256(json.dumps([entry["dtype"], entry["shape"]]).encode())
            file.seek(start + begin)
            left = end - begin
            while left:
                block = file.read(min(left, 1 << 20))
                if not block:
                    raise InputError(f"{path}: ends in the middle of {name}; download it again")
                digest.update(block)
                left -= len(block)
            digests[name] = digest.hexdigest()
    return digests
