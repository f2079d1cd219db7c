"""What lies there in place of a checkpoint as the hub has it, and the one step that makes it one."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lowrank_tune.files import LFS_POINTER, read_fields

SHOWN = 5
"""Names of a folder's content that a message has room for."""

_ADAPTER = "adapter_config.json"
_STATE = re.compile(
    r"(?!adapter_|optimizer|scheduler|training_args|rng_state|random_states|scaler).*\.(bin|pt|pth|ckpt)"
)
"""Files that torch.save wrote and that may hold a model."""
_IN_HUB_CACHE = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[^/]+/(.+)$")
_SUFFIXES = {
    ".gguf": "llama.cpp's format (GGUF)",
    ".onnx": "ONNX, a fixed graph",
    ".engine": "a TensorRT engine",
    ".h5": "TensorFlow's format",
    ".msgpack": "Flax's format",
    ".npz": "numpy's format",
}
"""Formats that only their own programs read."""
_SHARDS = (
    (r"zero_to_fp32\.py", "DeepSpeed's shards", "cd {at} && python zero_to_fp32.py . . --safe_serialization"),
    (
        r".*_(?:model|optim)_states\.pt",
        "DeepSpeed's shards",
        "cd {above} && python zero_to_fp32.py . . --safe_serialization --tag {own}",
    ),
    (r"(pytorch_model_fsdp_\d+)", "FSDP's shards", "accelerate merge-weights {at}/{found} {at}"),
    (r".*\.distcp", "torch's distributed shards", "accelerate merge-weights {at} {at}"),
    (
        r"model_world_size_\d+_rank_\d+\.pt",
        "verl's shards",
        "python -m verl.model_merger merge --backend fsdp --local_dir {at} --target_dir {at}/merged",
    ),
    (
        r"latest_checkpointed_iteration\.txt|mp_rank_\d+.*",
        "Megatron's shards",
        "swift export --mcore_model {at} --to_hf true --output_dir {at}/merged",
    ),
    (
        r"global_step\d+",
        "DeepSpeed's shards without the script that joins them",
        "python -m deepspeed.utils.zero_to_fp32 {at} {at} --safe_serialization",
    ),
)
"""A name in the folder, what it is of, and the command that joins the shards."""
_HEADS = {
    LFS_POINTER: "a git-lfs pointer and not the file itself: run `git lfs pull` in {folder}",
    b"<!": "a web page that was saved in the file's place: `hf download` gets the file itself",
    b"<html": "a web page that was saved in the file's place: `hf download` gets the file itself",
    b"PK": "a file of torch.save under this name: rename it to pytorch_model.bin",
    b"GGUF": "a GGUF file under this name: name the safetensors model that it was made from",
}


def no_checkpoint(directory: Path, missing: str, name: str = "", listed: Iterable[str] = ()) -> str:
    """Why a folder that lacks config.json or weights is no checkpoint, and what to do with what it holds.

    `name` is the hub's, where `listed` lies: the folder holds a few small files of it, if any. Empty where nothing is
    recognised there.
    """
    at = name or str(directory)
    try:
        content = sorted(listed) or sorted(os.listdir(directory))
    except OSError as error:
        if name:
            return ""
        return f"{at}: cannot be read ({error.strerror}); give yourself the right to read it"
    if os.path.islink(directory / missing):
        return missing_file(directory, missing, "")
    if _ADAPTER in content:
        return _adapter(directory, at)
    if any(re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?", file) for file in content):
        return _pickled(at, name, "config.json" in content)
    if path := next(directory.glob(".cache/huggingface/download/*.incomplete"), None):
        step = f"hf download MODEL --local-dir {shlex.quote(at)}"
        return f"{at}: its download was cut short ({path.name}); go on with it: `{step}`"
    for pattern, what, command in _SHARDS:
        if found := next((file for file in content if re.fullmatch(pattern, file)), None):
            places = {"at": directory, "above": directory.absolute().parent, "own": directory.absolute().name}
            quoted = {key: shlex.quote(str(place)) for key, place in places.items()}
            step = command.format(**quoted, found=found)
            if "{at}/merged" in command:
                more = f", then name {directory}/merged"
            else:
                more = "" if "config.json" in content else ", then copy config.json from the base model"
            return f"{at}: holds {what} ({found}) and no {missing}; join them by `{step}`{more}"
    if below := _checkpoints_below(directory):
        shown = ", ".join(below[:SHOWN]) + (f" and {len(below) - SHOWN} more" if len(below) > SHOWN else "")
        return (
            f"{at}: has no {missing} itself, but below it, newest first, {shown}; name one of them, such as "
            f"features.encoder.checkpoint: {directory / below[0]}"
        )
    for file in content:
        if Path(file).suffix in _SUFFIXES:
            return _foreign(f"{at}: holds {file}", Path(file).suffix)
    visible = [file for file in content if not file.startswith(".")]
    if name or not visible:
        return "" if name else f"{at}: the folder is empty; name the one that holds config.json and the weights"
    shown = ", ".join(visible[:SHOWN]) + (f" and {len(visible) - SHOWN} more" if len(visible) > SHOWN else "")
    return f"{at}: {_absent(directory, missing, visible)}; the folder holds {shown}"


def _absent(directory: Path, missing: str, content: list[str]) -> str:
    if missing == "config.json":
        return "config.json is missing, which describes the model; copy it from the model that this one was made from"
    if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", file) for file in content):
        return "model.safetensors.index.json is missing, which says what is in which shard; copy it to them"
    if len(named := [file for file in content if file.endswith(".safetensors") and file != missing]) == 1:
        move = shlex.join(["mv", str(directory / named[0]), str(directory / missing)])
        return f"the weights have another name than {missing}: `{move}`"
    if saved := [file for file in content if _STATE.fullmatch(file)]:
        move = shlex.join(["mv", str(directory / saved[0]), str(directory / "pytorch_model.bin")])
        return f"{saved[0]} is no safetensors; if it is the model's state_dict, `{move}` and try again"
    return (
        "there are no weights, model.safetensors or shards with model.safetensors.index.json; save the model here with "
        "`save_pretrained`, or copy all of its files"
    )


def not_a_folder(path: Path) -> str:
    """What to name in place of a file."""
    if path.suffix in _SUFFIXES:
        return _foreign(f"{path}: is a file", path.suffix)
    if (path.parent / "config.json").is_file():
        return f"{path}: is one file of a checkpoint; name its folder, {path.parent}"
    if path.suffix in {".zip", ".tar", ".gz", ".tgz", ".zst", ".7z"}:
        return f"{path}: is an archive; unpack it and name the folder that holds config.json"
    return f"{path}: is a file; name a folder that holds config.json and the model's weights"


def missing_file(directory: Path, file: str, index: str) -> str:
    """Where a file that an index names may be."""
    path = directory / file
    if os.path.islink(path):
        return (
            f"{path}: is a link to {os.readlink(path)}, which is not there; copy the folder again with what its links "
            "lead to: cp -rL"
        )
    parts = sorted(directory.glob("*.safetensors"))
    held = f"of the weights only {', '.join(part.name for part in parts[:SHOWN])}" if parts else "none of the weights"
    return (
        f"{directory}: {file!r} is missing, which {index} names; the folder holds {held}: copy the others from where "
        "they were saved"
    )


def broken_file(path: Path) -> str:
    """What a file that cannot be read is, and what to do."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        return f"see that {path.name} can be read ({error.strerror})"
    for start, what in _HEADS.items():
        if head.lstrip().startswith(start):
            return f"it is {what.format(folder=path.parent)}"
    if cached := _IN_HUB_CACHE.search(path.as_posix()):
        owner, model, file_name = cached.groups()
        return f"its download was cut short: `hf download {owner}/{model} {file_name} --force-download`"
    if not head.strip(b"\0 \n\r\t"):
        return "it is empty: its copy or its writing was cut short; copy it again from where it was saved"
    if path.suffix == ".json":
        return "correct it, or copy it from the model that this one was made from"
    return "its copy or its writing was cut short; copy it again from where it was saved, or save the model once more"


def quantised(name: str, described: dict[str, Any], found: str) -> str:
    """What to name in place of a tower that is kept in fewer bits; `described` is its config.json."""
    said = described.get("quantization_config")
    method = said.get("quant_method") if isinstance(said, dict) else None
    base = described.get("_name_or_path")
    source = f" ({base})" if isinstance(base, str) and base not in ("", name) else ""
    by = f"{method}: " if isinstance(method, str) else ""
    return (
        f"{name}: its vision tower is quantised ({by}{found}), and features "
        f"come from a tower in 16 or 32 bits; name the model that it was made from{source}, or quantise without the "
        'tower: modules_to_not_convert=["visual"], for bitsandbytes llm_int8_skip_modules'
    )


def _foreign(found: str, suffix: str) -> str:
    return (
        f"{found}, which is {_SUFFIXES[suffix]}; features need the vision tower in safetensors: name the model that it "
        "was made from"
    )


def _python(code: str) -> str:
    return shlex.join(["python", "-c", code])


def _pickled(at: str, name: str, described: bool) -> str:
    first = "" if described else "copy config.json from the base model, then "
    target = f"{Path(name).name}-safetensors" if name else at
    code = (
        "from transformers import Qwen2_5_VLForConditionalGeneration as M; "
        f'M.from_pretrained({json.dumps(at)}, dtype="auto").save_pretrained({json.dumps(target)})'
    )
    more = f", then name {target}" if name else " and try again"
    return (
        f"{at}: its weights are pickled (pytorch_model.bin), which can run any code and is not read here; "
        f"{first}write them as safetensors by `{_python(code)}`{more}"
    )


def _adapter(directory: Path, at: str) -> str:
    """Whether its base model or a merged one is to be named."""
    said = read_fields(directory / _ADAPTER).get("base_model_name_or_path")
    base = said if isinstance(said, str) and said else "ITS_BASE_MODEL"
    try:
        with safe_open(directory / "adapter_model.safetensors", framework="numpy") as file:
            touches = any("visual" in key for key in file.keys())  # noqa: SIM118  (it is no dict)
    except (OSError, SafetensorError):
        touches = True
    if not touches:
        return (
            f"{at}: holds a LoRA ({_ADAPTER}) that leaves the vision tower as it was, so its features are those of its "
            f"base model; name that: features.encoder.checkpoint: {base}"
        )
    merged = f"{at if at == str(directory) else at.split('/')[-1]}-merged"
    code = (
        "from peft import PeftModel; from transformers import Qwen2_5_VLForConditionalGeneration as M; "
        f'm = M.from_pretrained({json.dumps(base)}, dtype="auto"); '
        f"PeftModel.from_pretrained(m, {json.dumps(at)}).merge_and_unload()"
        f".save_pretrained({json.dumps(merged)})"
    )
    return f"{at}: holds a LoRA ({_ADAPTER}) and no whole model; merge it and name the result: `{_python(code)}`"


def _checkpoints_below(directory: Path) -> list[str]:
    """Folders of a model, a LoRA or verl's shards, at most three deep: Qwen2.5-VL's first, then by step and time."""
    found = {}
    for pattern in ("*", "*/*", "*/*/*"):
        for file in ("config.json", _ADAPTER, "model_world_size_*_rank_0.pt"):
            for path in directory.glob(f"{pattern}/{file}"):
                if path.parent.parent not in found:
                    steps = re.search(r"(\d+)\D*$", path.parent.relative_to(directory).as_posix())
                    is_model = file != "config.json" or read_fields(path).get("model_type") == "qwen2_5_vl"
                    found[path.parent] = (is_model, int(steps[1]) if steps else -1, path.stat().st_mtime)
    newest = sorted(found, key=lambda path: found[path], reverse=True)
    return [path.relative_to(directory).as_posix() for path in newest]
