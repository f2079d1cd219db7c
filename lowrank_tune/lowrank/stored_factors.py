"""Factors in few bytes: an ordered form, Aᵀ and B in few bits, and as many components as an image needs.

Every product A B is first brought to the form of its own SVD, U Σ Vᵀ, with √Σ in either factor:

- Its leading columns are then the best of their number that A and B hold (Eckart & Young), whatever made them, and
  columns that nearly cancel, as regressed ones may, no longer magnify the rounding of each.
- A is stored with one scale a token. Tokens differ in length, in some images by a factor of ten; with one scale a
  component (Aᵀ by rows) the longest token's would round the others away. Measured in int4: an error of 23 % instead of
  33 % where they differ much, 2 to 4 % of itself less where they hardly do; in int8 the two are alike
  (`scripts/bench_compression.py`). B has a scale a component.
- √Σ in A lets its later columns be smaller, and so be rounded coarser beside the first: all of Σ in A would lose them,
  none of it would spend on them what they are not worth. And what lies in either factor fits into float16's range,
  where a length in one of them need not.
- Pruning drops an image's last components: A's last columns, B's last rows. Scales stay as they were.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_tune.lowrank.compression import packed_bytes, restored
from lowrank_tune.lowrank.decomposers.base import Factors


def ordered(factors: Factors) -> Factors:
    """Return the same products as their SVD, √Σ in either factor, components by falling Σ.

    Args:
        factors: A [N, T, R] and B [N, R, D], R at most min(T, D).

    Returns:
        float32 factors of the same shapes; components that are nothing but rounding are zeros or nearly so.
    """
    q_NTR, left_NRR = torch.linalg.qr(factors.a_NTR.float())
    p_NDR, right_NRR = torch.linalg.qr(factors.b_NRD.float().mT)
    u_NRR, sigma_NR, vh_NRR = torch.linalg.svd(left_NRR @ right_NRR.mT)
    root_NR = sigma_NR.sqrt()
    return Factors(q_NTR @ (u_NRR * root_NR[:, None, :]), root_NR[..., None] * (vh_NRR @ p_NDR.mT))


def restored_factors(factors: Factors, dtype: str) -> Factors:
    """Return what comes back of factors when A and B are packed, float32.

    Args:
        factors: A [N, T, R] and B [N, R, D], as `ordered` returns them.
        dtype: one of `compression.STORE_DTYPES`.

    Raises:
        InputError: as `compression.pack`.
    """
    return Factors(restored(factors.a_NTR, dtype), restored(factors.b_NRD, dtype))


def factor_bytes(tokens: int, dim: int, rank: int, dtype: str) -> int:
    """Count the bytes of an image's packed A [tokens, rank] and B [rank, dim]; none for no rank."""
    return packed_bytes((tokens, rank), dtype) + packed_bytes((rank, dim), dtype) if rank else 0


def residual_by_rank(x_NTD: Tensor, factors: Factors) -> Tensor:
    """Measure ‖X − A_r B_r‖² for the leading r components, for every r from none to all.

    With a_j, b_j the components it is ‖X‖² − 2 Σ_j a_jᵀXb_j + Σ_ij (a_i·a_j)(b_i·b_j), one product with X for all r.

    Args:
        x_NTD: features [N, T, D].
        factors: A [N, T, R] and B [N, R, D].

    Returns:
        float64 [N, R + 1]; column r is that of r components.
    """
    x, a_NTR, b_NRD = x_NTD.double(), factors.a_NTR.double(), factors.b_NRD.double()
    energy_N1 = x.square().sum((-2, -1))[:, None]
    explained_NR = torch.linalg.vecdot(a_NTR.mT @ x, b_NRD).cumsum(-1)
    overlap_NRR = (a_NTR.mT @ a_NTR) * (b_NRD @ b_NRD.mT)
    product_NR = overlap_NRR.cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1)
    residual_NR = (energy_N1 - 2 * explained_NR + product_NR).clamp_min(0)
    return torch.cat([energy_N1, residual_NR], -1)


def prune(residual_NR: Tensor, allowed_N: Tensor) -> Tensor:
    """Choose for each image the least rank whose residual is within what is allowed.

    Args:
        residual_NR: from `residual_by_rank`, [N, R + 1].
        allowed_N: ‖X − A_r B_r‖² at most, [N].

    Returns:
        int64 [N], from 0 to R; -1 for an image whose residual is within it at no rank.
    """
    within_NR = residual_NR <= allowed_N[:, None]
    first_N: Tensor = within_NR.int().argmax(-1)
    return torch.where(within_NR.any(-1), first_N, -1)
