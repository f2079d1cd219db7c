"""Matrices in few bits, and back: a row has one scale and codes −L..L, L = 127, 15, 7 for int8, int5, int4.

    scale = max|x| / L       code = round(x / scale)       x ≈ code · scale, off by half a scale at most

Codes of b < 8 bits follow one another without gaps, lowest bit first: a row of K codes is ⌈K b / 8⌉ bytes, so that
leading rows can be read by themselves. N images, T tokens, D dim, R rank, K numbers of a row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.decomposers.base import Decomposer, Factors

StoreDtype = Literal["float32", "float16", "int8", "int5", "int4"]
STORE_DTYPES: tuple[StoreDtype, ...] = get_args(StoreDtype)
"""What `pack` can store, by falling bytes."""

COUNT_BYTES = 2
"""What an image needs beyond its components where their number is its own."""
_FLOATS = {"float32": torch.float32, "float16": torch.float16}
_BITS = {"int8": 8, "int5": 5, "int4": 4}
_TINY = torch.finfo(torch.float32).tiny
"""The least scale. Below it floats lose digits, and a row of zeros needs a scale that can be divided by."""


def pack(x: Tensor, dtype: str) -> dict[str, Tensor]:
    """Store finite numbers [..., K], K at least 1, in fewer bytes, contiguous tensors of their own.

    Returns:
        `values` [..., K] for a float dtype; else `codes`, int8 [..., K] or uint8 [..., ⌈K bits / 8⌉], and `scales`,
        float32 [...].

    Raises:
        InputError: the dtype is none of `STORE_DTYPES`, there is no row, or a number is not finite or too large for it.
    """
    _check(dtype)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise InputError(f"numbers of shape {list(x.shape)} have no rows to pack; give [..., K] with K at least 1")
    if dtype in _FLOATS:
        return {"values": _as_float(x, dtype).clone(memory_format=torch.contiguous_format)}
    codes, scales = quantise(x, dtype)
    return {"codes": _to_bytes(codes, _BITS[dtype]), "scales": scales}


def unpack(parts: Mapping[str, Tensor], dtype: str, shape: Sequence[int]) -> Tensor:
    """Restore [..., K], float32; an InputError where the parts are not what `pack` makes of this dtype and shape."""
    wanted = layout(shape, dtype)
    found = {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
    if found != wanted:
        raise InputError(
            f"{dtype} of shape {list(shape)} is stored as {_words(wanted)}, not as {_words(found)}; "
            "give the dtype and shape that it was packed with"
        )
    if dtype in _FLOATS:
        return parts["values"].float()
    return dequantise(_from_bytes(parts["codes"], _BITS[dtype], shape[-1]), parts["scales"])


def restored(x: Tensor, dtype: str) -> Tensor:
    """Return `unpack(pack(x, dtype))`, float32 [..., K], without making the bytes; errors as `pack`."""
    _check(dtype)
    return _as_float(x, dtype).float() if dtype in _FLOATS else dequantise(*quantise(x, dtype))


def packed_bytes(shape: Sequence[int], dtype: str) -> int:
    """Count the bytes that `pack` makes of [..., K], scales included."""
    return sum(math.prod(part) * kind.itemsize for part, kind in layout(shape, dtype).values())


def _check(dtype: str) -> None:
    if dtype not in STORE_DTYPES:
        raise InputError(f"store dtype {dtype!r} is unknown; choose one of {', '.join(STORE_DTYPES)}")


def layout(shape: Sequence[int], dtype: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of each part that `pack` makes of [..., K]."""
    _check(dtype)
    *rows, count = shape
    if dtype in _FLOATS:
        return {"values": ((*rows, count), _FLOATS[dtype])}
    bits = _BITS[dtype]
    codes = ((*rows, count), torch.int8) if bits == 8 else ((*rows, math.ceil(count * bits / 8)), torch.uint8)
    return {"codes": codes, "scales": (tuple(rows), torch.float32)}


def _words(layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{name} {list(shape)} of {kind}" for name, (shape, kind) in layout.items()) or "nothing"


def _finite(x: Tensor) -> Tensor:
    numbers = x.float()
    if not numbers.isfinite().all():
        raise InputError("NaN, infinity or a number above 3.4e38 cannot be stored; look at what made it")
    return numbers


def _as_float(x: Tensor, dtype: str) -> Tensor:
    numbers = _finite(x)
    values = numbers.to(_FLOATS[dtype])
    if not values.isfinite().all():
        raise InputError(
            f"numbers up to {numbers.abs().max().item():.3g} do not fit into {dtype}; "
            "store float32, or int8, whose scales have float32's range"
        )
    return values


def quantise(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Return the codes, whole numbers in float32 [..., K], and the scales [...]."""
    numbers = _finite(x)
    largest = 2 ** (_BITS[dtype] - 1) - 1
    scales = (torch.linalg.vector_norm(numbers, math.inf, dim=-1) / largest).clamp_min(_TINY)
    return (numbers / scales[..., None]).round_().clamp_(-largest, largest), scales


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers of codes [..., K] and scales [...], finite."""
    # A row that reaches float32's last number would come out infinite by rounding.
    limit = torch.finfo(torch.float32).max
    return (codes.float() * scales[..., None]).clamp_(-limit, limit)


def _to_bytes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [..., K] into uint8 [..., ⌈K bits / 8⌉]."""
    if bits == 8:
        return codes.to(torch.int8)
    unsigned = (codes.cpu().numpy() + (2 ** (bits - 1) - 1)).astype(np.uint8)[..., None]
    stream = np.unpackbits(unsigned, axis=-1, bitorder="little")[..., :bits]
    rows = stream.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    return torch.from_numpy(np.packbits(rows, axis=-1, bitorder="little")).to(codes.device)


def _from_bytes(octets: Tensor, bits: int, count: int) -> Tensor:
    """Undo `_to_bytes`: codes [..., K]."""
    if bits == 8:
        return octets
    rows = np.unpackbits(octets.cpu().numpy(), axis=-1, count=count * bits, bitorder="little")
    unsigned = np.packbits(rows.reshape(*octets.shape[:-1], count, bits), axis=-1, bitorder="little")[..., 0]
    codes: Tensor = torch.from_numpy(unsigned).to(octets.device).float() - (2 ** (bits - 1) - 1)
    return codes


class QuantisedDecomposer:
    """A copy of a trained decomposer whose matrices are int8, by torchao.

    Attributes:
        model: the copy.
        matrices: names of what is int8 in it, perhaps none.
    """

    def __init__(self, model: Decomposer) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        layers = [name for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear)]
        self.matrices = [name for name, weight in self.model.named_parameters() if weight.ndim == 2]
        self._raw = [name for name in self.matrices if name.removesuffix(".weight") not in layers]
        if self.matrices:
            # Seconds of import, and only who quantises a model needs it.
            from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

            config = FqnToConfig({name: Int8WeightOnlyConfig(version=2) for name in self.matrices})
            quantize_(self.model, config, filter_fn=None)

    def __call__(self, x_NTD: Tensor, rank: int | None = None) -> Factors:
        """Decompose images [N, T, D] as `Decomposer.forward` does."""
        restored = {name: self.model.get_parameter(name).dequantize() for name in self._raw}
        factors: Factors = functional_call(self.model, restored, (x_NTD,), {"rank": rank})
        return factors


def model_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's weights, scales and buffers."""
    return sum(_bytes(tensor) for tensor in model.state_dict().values())


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torch's protocol of tensors that hold others, as torchao's do
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def ordered(factors: Factors) -> Factors:
    """Return the same products as their SVD, √Σ in either factor, components by falling Σ.

    A [N, T, R] and B [N, R, D] give float32 factors of the same shapes; components that are nothing but rounding are
    nearly zero, those beyond min(T, D) are zero.
    """
    q_NTR, left_NRR = torch.linalg.qr(factors.a_NTR.float())
    p_NDR, right_NRR = torch.linalg.qr(factors.b_NRD.float().mT)
    u_NRR, sigma_NR, vh_NRR = torch.linalg.svd(left_NRR @ right_NRR.mT, full_matrices=False)
    root_NR = sigma_NR.sqrt()
    zeros = factors.a_NTR.shape[-1] - sigma_NR.shape[-1]
    a_NTR, b_NRD = q_NTR @ (u_NRR * root_NR[:, None, :]), root_NR[..., None] * (vh_NRR @ p_NDR.mT)
    return Factors(pad(a_NTR, (0, zeros)), pad(b_NRD, (0, 0, 0, zeros)))


def restored_factors(factors: Factors, dtype: str) -> Factors:
    """Return what comes back of factors, `ordered` and packed; errors as `pack`."""
    return Factors(restored(factors.a_NTR, dtype), restored(factors.b_NRD, dtype))


def factor_bytes(tokens: int, dim: int, rank: int, dtype: str) -> int:
    """Count the bytes of an image's packed A [tokens, rank] and B [rank, dim]."""
    return packed_bytes((tokens, rank), dtype) + packed_bytes((rank, dim), dtype) if rank else 0


def residual_by_rank(x_NTD: Tensor, factors: Factors) -> Tensor:
    """Measure ‖X − A_r B_r‖² for the leading r components, r from none to all: float64 [N, R + 1].

    With a_j, b_j the components it is ‖X‖² − 2 Σ_j a_jᵀXb_j + Σ_ij (a_i·a_j)(b_i·b_j), one product with X for all r.
    """
    x, a_NTR, b_NRD = x_NTD.double(), factors.a_NTR.double(), factors.b_NRD.double()
    energy_N1 = x.square().sum((-2, -1))[:, None]
    explained_NR = torch.linalg.vecdot(a_NTR.mT @ x, b_NRD).cumsum(-1)
    overlap_NRR = (a_NTR.mT @ a_NTR) * (b_NRD @ b_NRD.mT)
    product_NR = overlap_NRR.cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1)
    residual_NR = (energy_N1 - 2 * explained_NR + product_NR).clamp_min(0)
    return torch.cat([energy_N1, residual_NR], -1)


def prune(residual_NR: Tensor, allowed_N: Tensor) -> Tensor:
    """Return the least rank, int64 [N], whose residual [N, R + 1] is within what is allowed [N]; -1 where none is."""
    within_NR = residual_NR <= allowed_N[:, None]
    first_N: Tensor = within_NR.int().argmax(-1)
    return torch.where(within_NR.any(-1), first_N, -1)
