"""A trained decomposer with its matrices in int8, by torchao: one scale a row, weights only.

Linear layers compute with the int8 weights. Matrices that are parameters by themselves, as the learned sketch Ω, are
held in int8, too, and restored where a forward pass reads them. Vectors stay as they are, and so do buffers: `refined`
has learned nothing but a number a step, and its random start is no weight, so there is nothing to quantise.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.func import functional_call

from lowrank_tune.lowrank.decomposers.base import Decomposer, Factors


class QuantisedDecomposer:
    """A copy of a decomposer whose matrices are int8.

    Args:
        model: trained; it stays as it is.

    Attributes:
        model: the copy.
        matrices: the names of what is int8 in it; none where the family has learned no matrix.
    """

    def __init__(self, model: Decomposer) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        layers = [name for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear)]
        self.matrices = [name for name, weight in self.model.named_parameters() if weight.ndim == 2]
        self._raw = [name for name in self.matrices if name.removesuffix(".weight") not in layers]
        if self.matrices:
            _to_int8(self.model, self.matrices)

    def __call__(self, x_NTD: Tensor, rank: int | None = None) -> Factors:
        """Decompose images [N, T, D] as `Decomposer.forward` does."""
        restored = {name: self.model.get_parameter(name).dequantize() for name in self._raw}
        factors: Factors = functional_call(self.model, restored, (x_NTD,), {"rank": rank})
        return factors


def _to_int8(model: nn.Module, matrices: list[str]) -> None:
    # Seconds of import, and only who quantises a model needs it.
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

    config = FqnToConfig({name: Int8WeightOnlyConfig(version=2) for name in matrices})
    quantize_(model, config, filter_fn=None)


def model_bytes(model: nn.Module) -> int:
    """Count the bytes of all that a model holds: weights, scales and buffers."""
    return sum(_bytes(tensor) for tensor in model.state_dict().values())


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torch's protocol of tensors that hold others, as torchao's do
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
