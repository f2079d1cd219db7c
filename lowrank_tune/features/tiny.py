"""`tiny-random`: a small Qwen2.5-VL with the same seeded random weights everywhere, in the hub's layout."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_tune.files import write_directory_once

TINY_RANDOM = "tiny-random"
TINY_VERSION = 1
"""Counts up with every change of its vision tower, so that an old copy on disk is not taken for the new one."""
WEIGHTS_MARK = "lowrank_tune_weights"
"""The key of config.json that says `random`."""

TINY_VISION = {
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
_TINY_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    WEIGHTS_MARK: "random",
    "vision_config": TINY_VISION,
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
TINY_PREPROCESSOR = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
}


def write_tiny_checkpoint(parent: Path) -> Path:
    """Make sure that `tiny-random`, the same weights everywhere, lies below `parent`."""
    directory = tiny_directory(parent)
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
    files["config.json"] = json.dumps(_TINY_CONFIG, indent=2).encode()
    files["preprocessor_config.json"] = json.dumps(TINY_PREPROCESSOR, indent=2).encode()
    write_directory_once(directory, files)
    return directory


def tiny_directory(parent: Path) -> Path:
    """Where it lies, written or not."""
    return parent / f"{TINY_RANDOM}-{TINY_VERSION}"


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
