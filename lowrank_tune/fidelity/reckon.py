"""What asking the language model will cost, from its configuration alone: passes, arithmetic, memory and time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from lowrank_tune.comparison.rate_words import TOLD
from lowrank_tune.config.axes import combinations
from lowrank_tune.config.plan import Plan
from lowrank_tune.features.checkpoint import read_checkpoint_config
from lowrank_tune.features.pictures import WAYS
from lowrank_tune.fidelity.ways import STORED
from lowrank_tune.files import read_json
from lowrank_tune.lowrank.device import device_for

_PROMPT = 32
"""Tokens of a question and of the chat's frame, about."""
_PASS_S = 0.02
"""What a form's pass takes beside its arithmetic, and its forming (scripts/bench_fidelity.py)."""
_METHODS = 7
"""Without training, beside the SVD, the one in the answers' metric among them."""
_SIDE, _TIMED = 1024, 3
"""Of the product of matrices that is timed, and how often."""


def fidelity_cost(plan: Plan, tokens: int, n_test: int) -> dict[str, Any] | None:
    """What `fidelity` of a study file will take, fit for JSON; None where it asks nothing.

    A question of each image is reckoned with. `teraflop` are all passes'; the seconds are this machine's.
    """
    asked = plan.spec.fidelity
    if asked is None:
        return None
    space, families = plan.spec.search.space, plan.spec.search.space.families.chosen()
    axis = space.axes(next(iter(families)))["rank"]
    ranks = len(space.nested_ranks) or combinations([axis]) or plan.n_trials
    ranks = len([each for each in asked.at or () if isinstance(each, int)]) or ranks
    stored = 2 * sum(asked.wants("factors" if dtype == "float16" else dtype) for dtype in STORED)
    factors = (1 + _METHODS + len(families)) * asked.wants("factors")
    whole = 1 + sum(asked.wants(dtype) for dtype in STORED[1:])
    forms = ranks * (factors + stored) + whole
    forms += asked.wants("coded") * len(TOLD) * (2 + len(families)) + asked.wants("pictures") * len(WAYS)
    images = min(asked.images, n_test)
    dtype = getattr(torch, plan.spec.features.encoder.compute_dtype)
    parameters, held = _parameters(
        read_checkpoint_config(plan.spec.features.encoder.checkpoint, plan.features_root).directory
    )
    flop = 2.0 * parameters * (tokens + _PROMPT) * images * (forms + asked.max_new_tokens)
    device = device_for(asked.device != "cpu")
    return {
        "images": images,
        "forms": forms,
        "passes": images * forms,
        "teraflop": round(flop / 1e12, 3),
        "model_bytes": held * torch.empty((), dtype=dtype).element_size(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "seconds": round(flop / _rate(device, dtype) + _PASS_S * images * forms, 1),
    }


def _parameters(checkpoint: Path) -> tuple[int, int]:
    """Of a language model: those that each token passes, and all that are held, its vision tower's aside."""
    config = read_json(checkpoint / "config.json")
    text = config.get("text_config") or config
    hidden, layers, vocabulary = text["hidden_size"], text["num_hidden_layers"], text["vocab_size"]
    part = text.get("num_key_value_heads", text["num_attention_heads"]) / text["num_attention_heads"]
    passed = layers * int(hidden * hidden * (2 + 2 * part) + 3 * hidden * text["intermediate_size"])
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return passed, passed + vocabulary * hidden * (1 if tied else 2)


def _rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second that this machine gives a product of matrices."""
    a = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(_TIMED):
        started = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * _SIDE**3 / best
