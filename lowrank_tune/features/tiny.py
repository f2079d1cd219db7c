"""`tiny-random`: a small Qwen2.5-VL checkpoint with seeded random weights, in the hub's own format.

It has the real architecture (patch 14, 2x2 merge, window and full attention) and the published key names, and loads
through the same code as a real one. Its features are random projections of the images: their spectra decay as the
photographs' do, but they mean nothing, and `config.json` says so in `WEIGHTS_MARK`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from lowrank_tune.features.durable import write_directory_once

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
