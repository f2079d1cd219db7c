"""A trained decomposer in a loaded model, for any harness: the model sees A·B in place of its image features."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from lowrank_tune.config.schema import TOKEN_PIXELS
from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.decomposers import Decomposer

_METHOD = "get_image_features"


@contextmanager
def attach(model: nn.Module, decomposer: Decomposer, *, rank: int | None = None) -> Iterator[None]:
    """Let a loaded Qwen2.5-VL see each image as A·B in place of its features X, as long as the block lasts.

        with attach(model, load_decomposer("my-decomposer").to(model.device), rank=32):
            ids = model.generate(**inputs)

    One method of the model's is replaced, `get_image_features`, which `forward` and `generate` both go through; what
    wraps the model, PEFT or a harness, may stay around it. Videos pass as they are. The factors are computed in float32
    where the decomposer's weights are.

    Args:
        model: a `Qwen2_5_VLForConditionalGeneration`, or what holds one.
        decomposer: what `load_decomposer` gave.
        rank: R; the decomposer's own when None.

    Raises:
        InputError: the model is of another kind, or the decomposer has no such rank; and within the block, where an
            image has not the decomposer's tokens and dim.
    """
    rank, seer = decomposer.check_rank(rank), _seer(model)
    before = vars(seer).get(_METHOD)
    original = getattr(seer, _METHOD)

    @functools.wraps(original)
    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        seen = original(*args, **kwargs)
        if isinstance(seen, tuple):  # with return_dict=False
            return seen[0], _restored(seen[1], decomposer, rank), *seen[2:]
        seen.pooler_output = _restored(seen.pooler_output, decomposer, rank)
        return seen

    setattr(seer, _METHOD, get_image_features)
    try:
        yield
    finally:
        delattr(seer, _METHOD)
        if before is not None:  # of a block around this one
            setattr(seer, _METHOD, before)


def _seer(model: nn.Module) -> Qwen2_5_VLModel:
    """The part of a model that encodes images."""
    for module in model.modules():
        if isinstance(module, Qwen2_5_VLModel):
            return module
    vision = getattr(getattr(model, "config", None), "vision_config", None)
    if getattr(vision, "deepstack_visual_indexes", None):
        raise InputError(
            f"{type(model).__name__}: its language model is given features of several layers (deepstack), of which a "
            "decomposer replaces one: what it then sees would be half X. Use a Qwen2.5-VL"
        )
    raise InputError(f"{type(model).__name__}: holds no Qwen2.5-VL; load a Qwen2_5_VLForConditionalGeneration")


def _restored(features: tuple[Tensor, ...], decomposer: Decomposer, rank: int) -> tuple[Tensor, ...]:
    """A·B of each image, [tokens, dim] in its own dtype and place."""
    wanted = decomposer.tokens, decomposer.dim
    for x_TD in features:
        if tuple(x_TD.shape) != wanted:
            size = math.isqrt(wanted[0]) * TOKEN_PIXELS
            raise InputError(
                f"an image of {list(x_TD.shape)} features, and the decomposer takes {list(wanted)}: give the model "
                f"images of {size} pixels a side, and a decomposer that was trained on this model's features"
            )
    place = next(iter(decomposer.state_dict().values())).device
    a_NTR, b_NRD = decomposer(torch.stack(features).to(place, torch.float32), rank)
    return tuple((a_NTR @ b_NRD).to(features[0]))
