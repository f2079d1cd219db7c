"""How far A B is from X, the same for every method.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EXACT = 1e-8
"""The share of an image's energy below which a residual counts as none: float16 storage alone rounds away as much
(2**-22 / 12 of each element's square), and float32 factors cannot be told apart below it."""


class Figures(NamedTuple):
    """One method's figures, float64 [N].

    Attributes:
        token_cosine_N: cosine between the rows of X and AB, mean over the tokens that are not zeros; 0 when all are.
        flat_cosine_N: cosine between the flattened matrices; 0 when either is all zeros.
        mse_N: mean squared error of an element.
        residual_N: ‖X − AB‖².
    """

    token_cosine_N: Tensor
    flat_cosine_N: Tensor
    mse_N: Tensor
    residual_N: Tensor


def measure(x_NTD: Tensor, a_NTR: Tensor, b_NRD: Tensor) -> Figures:
    """Measure A [N, T, R] and B [N, R, D] against X [N, T, D]; not finite where the factors are not.

    In float64, whatever the dtypes: A B then has exactly rank R, and no residual falls below the optimum by rounding.
    """
    return measure_matrix(x_NTD, a_NTR.double() @ b_NRD.double())


def measure_matrix(x_NTD: Tensor, y_NTD: Tensor) -> Figures:
    """Measure Y [N, T, D], overwritten when it is float64, against X [N, T, D]."""
    x, y = x_NTD.double(), y_NTD.double()
    x_energy_NT, y_energy_NT = _row_energy(x), _row_energy(y)
    residual_NT = _row_energy(y.sub_(x))
    # 2 x·y = |x|² + |y|² − |x − y|², which spares another pass over [N, T, D].
    dots_NT = (x_energy_NT + y_energy_NT - residual_NT) / 2
    residual_N = residual_NT.sum(-1)
    return Figures(
        token_cosine_N=mean_over_tokens(_cosine(dots_NT, x_energy_NT, y_energy_NT), x_energy_NT),
        flat_cosine_N=_cosine(dots_NT.sum(-1), x_energy_NT.sum(-1), y_energy_NT.sum(-1)),
        mse_N=residual_N / (x.shape[-2] * x.shape[-1]),
        residual_N=residual_N,
    )


def residual_ratio(residual_N: Tensor, optimum_N: Tensor, energy_N: Tensor) -> Tensor:
    """ρ = ‖X − AB‖² / ‖X − X_r‖² [N]: 1.0 is the truncated SVD, and nothing is below it.

    Each residual counts as at least `EXACT` of the image's energy: where X has no more than the rank both are rounding
    noise. An image of zeros gets 1.0 where it was reproduced, else infinity; nobody counts it.

    Args:
        residual_N: ‖X − AB‖².
        optimum_N: ‖X − X_r‖², `Optimum.residual_NR` at the rank.
        energy_N: ‖X‖².
    """
    floor_N = EXACT * energy_N
    ratio_N = torch.maximum(residual_N, floor_N) / torch.maximum(optimum_N, floor_N)
    return torch.where((residual_N == 0) & (energy_N == 0), torch.ones_like(ratio_N), ratio_N)


def mean_ratio(ratio: Tensor) -> float:
    """Return exp(mean log ρ): every image counts alike, and one whose optimum is all but zero cannot rule the rest.

    Σ residual / Σ optimum would be ruled by the images of most energy instead; and the logarithm is what paired
    differences between methods are taken of.
    """
    return ratio.log().mean().exp().item()


def mean_over_tokens(cosine_NT: Tensor, x_energy_NT: Tensor) -> Tensor:
    """Return the mean [N] over the tokens that hold anything; their cosine [N, T] must be 0 where they do not."""
    return cosine_NT.sum(-1) / (x_energy_NT > 0).sum(-1).clamp_min(1)


def _row_energy(x_NTD: Tensor) -> Tensor:
    energy_NT: Tensor = torch.linalg.vector_norm(x_NTD, dim=-1).square()
    return energy_NT


def _cosine(dots: Tensor, x_energy: Tensor, y_energy: Tensor) -> Tensor:
    norms = x_energy.sqrt() * y_energy.sqrt()
    return torch.where(norms == 0, torch.zeros_like(dots), dots / norms).clamp(-1, 1)
