"""A trained decomposer with its matrices in int8, by torchao: one scale a row, weights only.

Linear layers compute with the int8 weights. Matrices that are parameters by themselves, as the learned sketch Ω, are
held in int8, too, and restored where a forward pass reads them. Vectors stay as they are, and so do buffers: `refined`
has learned nothing but a number a step, and its random start is no weight, so there is nothing to quantise.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowrank_tune.lowrank.decomposers.base import Decomposer, Factors


class QuantisedDecomposer:
    """A copy of a decomposer whose matrices are int8.

    Args:
        model: trained; it stays as it is.
    """

    def __init__(self, model: Decomposer) -> None:
        # Seconds of import, and only who quantises a model needs it.
        with _quiet_import():
            from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        in_layers = {
            f"{name}.weight" for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear) and name
        }
        matrices = matrices_of(self.model)
        self._raw = [name for name in matrices if name not in in_layers]
        quantize_(
            self.model, FqnToConfig({name: Int8WeightOnlyConfig(version=2) for name in matrices}), filter_fn=None
        )

    def __call__(self, x_NTD: Tensor, rank: int | None = None) -> Factors:
        """Decompose images [N, T, D] as `Decomposer.forward` does."""
        restored = {name: self.model.get_parameter(name).dequantize() for name in self._raw}
        factors: Factors = functional_call(self.model, restored, (x_NTD,), {"rank": rank})
        return factors


def matrices_of(model: nn.Module) -> list[str]:
    """Name the learned matrices of a model, which are what can be quantised."""
    return [name for name, weight in model.named_parameters() if weight.ndim == 2]


def model_bytes(model: nn.Module) -> int:
    """Count the bytes of all that a model holds: weights, scales and buffers."""
    return sum(_bytes(tensor) for tensor in model.state_dict().values())


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torch's protocol of tensors that hold others, as torchao's do
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Keep torch's advice to torchao's authors off the user's terminal."""
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
