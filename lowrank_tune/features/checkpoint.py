"""Qwen2.5-VL checkpoints as files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lowrank_tune.errors import InputError
from lowrank_tune.features.hub import CONFIG, INDEX, SINGLE, fetch_files, is_local
from lowrank_tune.features.recognised import broken_file, quantised
from lowrank_tune.features.tiny import (
    TINY_PREPROCESSOR,
    TINY_RANDOM,
    TINY_VISION,
    WEIGHTS_MARK,
    tiny_directory,
)
from lowrank_tune.files import file_sha256, read_fields, read_header

_PREPROCESSOR, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
_ADAPTER = "adapter_config.json"
_TELLING = (_ADAPTER, INDEX, "pytorch_model.bin.index.json")
"""Small files that tell what a model on the hub is that has no `config.json` or no safetensors."""
_TOKENIZERS = ("tokenizer.json", "vocab.json")
_BESIDE = (
    *_TOKENIZERS,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
_LANGUAGE = ".self_attn."
"""In the names of tensors of every language model, and of no tower."""
_ANCHOR = "patch_embed.proj.weight"
"""A tensor of every tower: what stands before it is the prefix of the others."""
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:base_layer|modules_to_save\.\w+|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What PEFT, torch.compile and FSDP put into the names of a model that was saved without being unwrapped."""
_PLAIN_TYPES = {"F64", "F32", "F16", "BF16"}
_LARGEST = 2**20
"""Above every size of a tower; what is beyond it is no size."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint's two small files say."""

    name: str  # as the study file has it
    directory: Path
    revision: str | None  # the hub's commit; None for a directory
    weights: str  # `random`, `pretrained` or `unknown`
    vision: dict[str, Any]
    preprocessor: dict[str, Any]
    notes: tuple[str, ...] = ()  # what a user should know of how it was read, a sentence each

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

    def shapes(self) -> dict[str, list[int]]:
        """The shape of each of the tower's tensors."""
        return {
            ours: header[theirs]["shape"]
            for path, names in self.files.items()
            for header in [read_header(path)[1]]
            for theirs, ours in names.items()
        }

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


@dataclass(frozen=True)
class ModelFiles:
    """A whole model on disk."""

    directory: Path
    weights: tuple[Path, ...]
    texts: tuple[Path, ...]  # what may lie there of the tokenizer and the chat template

    def parameters(self) -> int:
        """How many numbers the weights are."""
        headers = [_open(path) for path in self.weights]
        return sum(math.prod(tensor["shape"]) for header in headers for tensor in header.values())

    def digest(self) -> str:
        """Sha256 of the weights, however they are divided into files, and of the texts."""
        weights = TowerFiles({path: {key: key for key in _open(path)} for path in self.weights}).digest()
        texts = [[path.name, file_sha256(path)] for path in self.texts if path.is_file()]
        return hashlib.sha256(json.dumps([weights, *texts]).encode()).hexdigest()


def read_checkpoint_config(name: str, cache_root: Path) -> CheckpointConfig:
    """Find a checkpoint, `tiny-random`, a directory or a hub id, and read its configuration without its weights.

    Raises:
        InputError: there is no such checkpoint, it cannot be downloaded, or it is no Qwen2.5-VL.
    """
    if name == TINY_RANDOM:
        # Known before it is written, which a look at a study file must not do.
        directory = tiny_directory(cache_root / "checkpoints")
        return CheckpointConfig(name, directory, None, "random", TINY_VISION, TINY_PREPROCESSOR)
    directory = fetch_files(name, cache_root, None, [CONFIG], [_PREPROCESSOR, _PROCESSOR], _TELLING)
    config = _read_json(directory / CONFIG)
    vision = _read_vision(name, config)
    preprocessor, notes = _read_preprocessor(name, directory, vision)
    if (directory / _ADAPTER).is_file():
        notes += (f"{name}: {_ADAPTER} lies there too; a LoRA that is not merged into the weights has no part in them",)
    local = is_local(name)
    # A directory may hold anything under the published names; only the hub says whose weights they are.
    weights = "random" if config.get(WEIGHTS_MARK) == "random" else "unknown" if local else "pretrained"
    return CheckpointConfig(name, directory, None if local else directory.name, weights, vision, preprocessor, notes)


def find_tower(config: CheckpointConfig, cache_root: Path) -> TowerFiles:
    """Find the files that hold the vision tower, and download only those.

    Raises:
        InputError: the checkpoint has no vision tower, a file that its index names is missing or broken, or the tower
            is quantised or holds a LoRA that is not merged.
    """
    weight_map = _weight_map(config, cache_root)
    files: dict[str, dict[str, str]] = {}
    for key, ours in _tower_names(config.name, weight_map).items():
        files.setdefault(weight_map[key], {})[key] = ours
    directory = fetch_files(config.name, cache_root, config.revision, sorted(files))
    tower = TowerFiles({directory / file: names for file, names in sorted(files.items())})
    for path, names in tower.files.items():
        header = _open(path)
        if absent := names.keys() - header.keys():
            raise InputError(
                f"{path}: lacks {min(absent)}, which {INDEX} places there, so the two are of different models; "
                "save the model into an empty folder"
            )
        if coded := [key for key in sorted(names) if header[key]["dtype"] not in _PLAIN_TYPES]:
            described = read_fields(config.directory / CONFIG)
            raise InputError(quantised(config.name, described, f"{coded[0]} is {header[coded[0]]['dtype']}"))
    shapes = tower.shapes()
    held = {
        "depth": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        "hidden_size": next(iter(shapes[_ANCHOR]), 0),
        "intermediate_size": next(iter(shapes.get("blocks.0.mlp.up_proj.bias", ())), 0),
        "out_hidden_size": next(iter(shapes.get("merger.mlp.2.bias", ())), 0),
    }
    if differ := [f"{key} {config.vision[key]} and {size}" for key, size in held.items() if config.vision[key] != size]:
        said = ", ".join(differ)
        raise InputError(
            f"{config.name}: {CONFIG} and the weights are of different models ({said}); take both from one"
        )
    return tower


def find_model(config: CheckpointConfig, cache_root: Path) -> ModelFiles:
    """Find the files of the whole model, of which a tower is only a part, and download them.

    Raises:
        InputError: the checkpoint has no language model or no tokenizer, or a file is missing or broken.
    """
    weight_map = _weight_map(config, cache_root)
    if not any(_LANGUAGE in key for key in weight_map):
        raise InputError(
            f"{config.name}: holds a vision tower alone; of its {len(weight_map)} tensors none is the language model's "
            f"(`model.layers.0{_LANGUAGE}q_proj.weight` and others), which fidelity asks: name the whole Qwen2.5-VL "
            "checkpoint, or remove `fidelity`"
        )
    weights = sorted(set(weight_map.values()))
    directory = fetch_files(config.name, cache_root, config.revision, [CONFIG, *weights], _TOKENIZERS, _BESIDE)
    if not any((directory / file).is_file() for file in _TOKENIZERS):
        raise InputError(
            f"{config.name}: has no tokenizer (no {' and no '.join(_TOKENIZERS)}), without which nothing can be asked; "
            "copy the tokenizer's files from the model that this one was made from"
        )
    return ModelFiles(
        directory, tuple(directory / file for file in weights), tuple(directory / file for file in _BESIDE)
    )


def _weight_map(config: CheckpointConfig, cache_root: Path) -> dict[str, str]:
    """Which file holds each tensor."""
    where = config.name, cache_root, config.revision
    directory = fetch_files(*where, [], [INDEX, SINGLE])
    # A whole file beside an index, of which one is older, is what transformers takes as well.
    if (directory / INDEX).is_file() and not os.path.isfile(directory / SINGLE):
        weight_map = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise InputError(f"{directory / INDEX}: its weight_map names no files; save the model once more")
        return weight_map
    directory = fetch_files(*where, [SINGLE])
    return dict.fromkeys(_open(directory / SINGLE), SINGLE)


def _read_vision(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the tower, and transformers' defaults where it says nothing."""
    wrapped = config.get("vlm_config")  # of ColQwen and others that have a whole Qwen2.5-VL within them
    whole = wrapped if isinstance(wrapped, dict) else config
    kind = whole.get("model_type")
    # A tower that was saved alone is described by the file itself, until 4.51 under the whole model's type.
    alone = kind == "qwen2_5_vl_vision" or "vision_config" not in whole and "out_hidden_size" in whole
    if kind not in ("qwen2_5_vl", "qwen2_5_vl_vision"):
        raise InputError(
            f"{name}: {CONFIG} {f'describes {reprlib.repr(kind)},' if kind else 'has no model_type, so it is'} not a "
            "Qwen2.5-VL model ('qwen2_5_vl'); name another checkpoint in features.encoder.checkpoint"
        )
    said = whole if alone else whole.get("vision_config") or {}
    if not isinstance(said, dict):
        raise InputError(f"{name}: vision_config in {CONFIG} is {reprlib.repr(said)}, not an object; save it again")
    vision = {key: value for key, value in said.items() if value is not None}
    if not vision.keys() >= TINY_VISION.keys() or "rope_theta" in vision or "rope_scaling" in vision:
        vision |= _as_transformers_reads(name, vision)
    for key, like in TINY_VISION.items():
        values = vision[key] if isinstance(like, list) else [vision[key]]
        least = 0 if isinstance(like, list) else 1
        if not isinstance(values, list | tuple) or not all(type(v) is int and least <= v <= _LARGEST for v in values):
            wanted = "a list of whole numbers" if isinstance(like, list) else "a whole number from 1 on"
            raise InputError(f"{name}: {key} in {CONFIG} is {reprlib.repr(vision[key])}, not {wanted}; correct it")
    token, heads = vision["patch_size"] * vision["spatial_merge_size"], vision["num_heads"]
    if vision["window_size"] < token or vision["hidden_size"] % (4 * heads):
        raise InputError(
            f"{name}: the tower that {CONFIG} describes cannot be: its window ({vision['window_size']}) is to hold a "
            f"token ({token}), and hidden_size ({vision['hidden_size']}) be divisible by 4 times num_heads ({heads})"
        )
    return vision


def _as_transformers_reads(name: str, vision: dict[str, Any]) -> dict[str, Any]:
    """The keys that a file may leave out, which a file of transformers does where they are as in its own class."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig as Known

    keys = Known.__annotations__.keys() | Known.attribute_map.keys() | {"rope_theta", "rope_scaling"}
    try:
        read = Known(**{key: vision[key] for key in keys & vision.keys()})
    except Exception as error:  # of any kind, by what the file holds
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: vision_config in {CONFIG} is not understood by transformers ({reason})") from error
    missing = [key for key in TINY_VISION if key not in vision]
    if "rope_parameters" not in vision and read.rope_parameters != Known().rope_parameters:
        missing.append("rope_parameters")
    return {key: list(value) if isinstance(value := getattr(read, key), tuple) else value for key in missing}


def _read_preprocessor(name: str, directory: Path, vision: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings of the tower's input, and a note where they lie nowhere."""
    file, settings = _PREPROCESSOR, None
    notes: tuple[str, ...] = ()
    if (directory / file).is_file():
        settings = _read_json(directory / file)
    elif (directory / _PROCESSOR).is_file():
        file, settings = _PROCESSOR, _read_json(directory / _PROCESSOR).get("image_processor")
    if not isinstance(settings, dict):
        settings = {key: TINY_PREPROCESSOR[key] for key in ("image_mean", "image_std")}
        notes = (
            f"{name} has no {_PREPROCESSOR} nor {_PROCESSOR} with an image_processor: images are scaled as published",
        )
    for key, positive in (("image_mean", False), ("image_std", True), ("rescale_factor", True)):
        value = settings.get(key)
        numbers = [value] if key == "rescale_factor" else value if isinstance(value, list) and len(value) == 3 else [""]
        if value is not None and not all(_is_number(number, positive) for number in numbers):
            wanted = "a number" if key == "rescale_factor" else "three numbers"
            raise InputError(
                f"{name}: {key} in {file} is {reprlib.repr(value)}, not {wanted}{' above 0' if positive else ''}; "
                "copy the file from the model that this one was made from"
            )
    for theirs, ours in (
        ("patch_size", "patch_size"),
        ("merge_size", "spatial_merge_size"),
        ("temporal_patch_size", "temporal_patch_size"),
    ):
        wanted = vision.get(ours, 2)
        if (found := settings.get(theirs, wanted)) != wanted:
            raise InputError(
                f"{name}: {theirs} is {reprlib.repr(found)} in {file}, but {ours} is {reprlib.repr(wanted)} in "
                f"{CONFIG}; copy the file from the model that this one was made from"
            )
    return settings, notes


def _is_number(value: object, positive: bool) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < math.inf and (value > 0 or not positive)


def _tower_names(name: str, keys: Collection[str]) -> dict[str, str]:
    """Names of the tower's tensors in the files -> in the tower, whatever stands before them there."""
    cleaned = {key: _WRAPPERS.sub("", key) for key in sorted(keys) if ".original_module." not in key}
    prefixes = {clean.removesuffix(_ANCHOR) for clean in cleaned.values() if clean.endswith(_ANCHOR)}
    prefixes = {prefix for prefix in prefixes if not prefix or prefix.endswith(".")}
    if not prefixes:
        raise InputError(
            f"{name}: none of the checkpoint's {len(keys)} tensors is a vision tower's `visual.{_ANCHOR}`; use a whole "
            "Qwen2.5-VL checkpoint, not its language model alone"
        )
    if len(prefixes) > 1:
        raise InputError(
            f"{name}: holds several vision towers ({', '.join(sorted(prefixes))}); save the model with one of them"
        )
    (prefix,) = prefixes
    ours = {key: clean.removeprefix(prefix) for key, clean in cleaned.items() if clean.startswith(prefix)}
    if not prefix:  # a tower that was saved alone: what else lies there is none of it
        ours = {key: clean for key, clean in ours.items() if clean.split(".")[0] in ("blocks", "merger", "patch_embed")}
    if added := [key for key in ours if "lora_" in key]:
        raise InputError(
            f"{name}: {added[0]} is a LoRA that is not merged into the vision tower; load the model with its LoRA and "
            "save what `merge_and_unload()` returns"
        )
    return ours


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())  # in UTF-8 or UTF-16, with a mark or without
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); {broken_file(path)}") from error
    return content


def _open(path: Path) -> dict[str, Any]:
    """A safetensors file's header: its tensors' types and shapes."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        header = read_header(path)[1]
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: is no readable safetensors file ({error}); {broken_file(path)}") from error
    if metadata.get("format") == "mlx":
        raise InputError(f"{path}: is in MLX's layout, which only MLX reads; name the model that it was converted from")
    return header
