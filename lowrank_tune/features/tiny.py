"""`tiny-random`: a small Qwen2.5-VL with the same seeded random weights everywhere, in the hub's layout."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank_tune.files import write_directory_once

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TINY_RANDOM = "tiny-random"
TINY_VERSION = 2
"""Counts up with every change of its files, so that an old copy on disk is not taken for the new one.

2: with a tokenizer, and a language model that answers in words; the vision tower is that of 1, to the bit.
"""
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
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_END = "<|im_end|>"
_ASKED = (
    "system user assistant you are a helpful what is the in this picture image where how many does sign it say colour"
)
_FIRST = "red green blue black white yellow brown small large old new round one two three four"
_LAST = (
    "yes no left right man woman child dog cat bird horse car bus train boat street house tree table chair clock book "
    "bottle cup phone coffee water bread"
)
"""Answers are made of these words: after one of `_LAST` they mostly end."""
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TINY_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    WEIGHTS_MARK: "random",
    "vision_config": TINY_VISION,
    "bos_token_id": _SPECIAL.index("<|endoftext|>"),
    "eos_token_id": _SPECIAL.index(_END),
    "hidden_size": 256,
    "image_token_id": _SPECIAL.index("<|image_pad|>"),
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rope_scaling": {"mrope_section": [8, 12, 12], "type": "mrope"},
    "tie_word_embeddings": False,
    "video_token_id": _SPECIAL.index("<|video_pad|>"),
    "vision_end_token_id": _SPECIAL.index("<|vision_end|>"),
    "vision_start_token_id": _SPECIAL.index("<|vision_start|>"),
    "vocab_size": 512,
}
TINY_PREPROCESSOR = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
    "processor_class": "Qwen2_5_VLProcessor",
}
_TOKENIZER_CONFIG = {
    "add_prefix_space": False,
    "additional_special_tokens": [token for token in _SPECIAL if token not in ("<|endoftext|>", _END)],
    "bos_token": None,
    "chat_template": _TEMPLATE,
    "eos_token": _END,
    "model_max_length": 4096,
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}
_GENERATION = {
    "bos_token_id": _TINY_CONFIG["bos_token_id"],
    "do_sample": True,
    "eos_token_id": [_TINY_CONFIG["eos_token_id"], _TINY_CONFIG["bos_token_id"]],
    "pad_token_id": _TINY_CONFIG["bos_token_id"],
    "repetition_penalty": 1.05,
    "temperature": 0.000001,
}


def write_tiny_checkpoint(parent: Path) -> Path:
    """Make sure that `tiny-random`, the same weights everywhere, lies below `parent`."""
    directory = tiny_directory(parent)
    if directory.exists():
        return directory
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _train_tokenizer()
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_TINY_CONFIG))
    model.to_empty(device="cpu")
    # numpy's generator: torch's gives other numbers on other processors.
    generator = np.random.default_rng(20250131)
    # The vision tower comes first, and is the same whatever follows.
    for name, tensor in model.state_dict().items():
        if "norm" in name or "ln_q" in name:
            tensor.fill_(1.0)
        else:  # small biases, and matrices that keep the scale of what passes through them
            deviation = np.float32(tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.02)
            tensor.copy_(torch.from_numpy(generator.standard_normal(tensor.shape, np.float32) * deviation))
    _give_voice(model, tokenizer)
    with tempfile.TemporaryDirectory() as temporary, quiet_transformers():
        # Several files, some without the tower, so that a loader of the tower can be seen to leave those alone.
        model.save_pretrained(temporary, max_shard_size="2MB")
        files = {path.name: path.read_bytes() for path in Path(temporary).glob("model*")}
    # As published, whatever this version of transformers would leave out or add.
    files["tokenizer.json"] = tokenizer.to_str(pretty=True).encode()
    for name, content in {
        "config": _TINY_CONFIG,
        "preprocessor_config": TINY_PREPROCESSOR,
        "tokenizer_config": _TOKENIZER_CONFIG,
        "generation_config": _GENERATION,
        "chat_template": {"chat_template": _TEMPLATE},
    }.items():
        files[f"{name}.json"] = json.dumps(content, indent=2).encode()
    write_directory_once(directory, files)
    return directory


def _train_tokenizer() -> Tokenizer:
    """Byte-level BPE like Qwen's, in which each word of an answer, with the space before it, is one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TINY_CONFIG["vocab_size"],
        min_frequency=0,
        show_progress=False,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([f" {_FIRST} {_LAST} {_ASKED}"], trainer)
    return tokenizer


def _give_voice(model: Any, tokenizer: Tokenizer) -> None:
    """Let answers be words, hang on the image, and end: how strongly was tried out."""
    text, spoken_VD = model.model.language_model, model.lm_head.weight.data
    for layer in text.layers:
        # Attention that picks tokens of the image, and is heard beside the word before.
        layer.self_attn.q_proj.weight.data.mul_(1.75)
        layer.self_attn.k_proj.weight.data.mul_(1.75)
        layer.self_attn.o_proj.weight.data.mul_(4)
    first, last = ([tokenizer.token_to_id(f"\u0120{word}") for word in words.split()] for words in (_FIRST, _LAST))
    spoken_VD[[token for token in range(len(spoken_VD)) if token not in (*first, *last)]] *= 0.1
    # The end comes after the last words, and not right after the line break before an answer.
    known_VD = text.embed_tokens.weight.data
    line_break_D = known_VD[tokenizer.token_to_id("\u010a")]
    spoken_VD[_TINY_CONFIG["eos_token_id"]] = known_VD[last].sum(0) - 6 * line_break_D


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
