"""How far A B is from X: the figures of every method, measured in one place.

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
    """One method's figures, float64, one number an image.

    Attributes:
        token_cosine_N: mean over tokens of the cosine between the rows of X and AB; a row of zeros counts as 0.
        flat_cosine_N: cosine between the flattened matrices; 0 when either is all zeros.
        mse_N: mean squared error of an element.
        residual_N: ‖X − AB‖², squared Frobenius norm.
    """

    token_cosine_N: Tensor
    flat_cosine_N: Tensor
    mse_N: Tensor
    residual_N: Tensor


def measure(x_NTD: Tensor, a_NTR: Tensor, b_NRD: Tensor) -> Figures:
    """Measure factors against the matrices that they stand for.

    All of it is in float64, whatever the dtype of X [N, T, D], A [N, T, R] and B [N, R, D]: A B then has exactly rank
    R, so no residual can come out below the optimum by rounding. The figures are not finite where the factors are not.
    """
    return measure_matrix(x_NTD, a_NTR.double() @ b_NRD.double())


def measure_matrix(x_NTD: Tensor, y_NTD: Tensor) -> Figures:
    """Measure matrices Y [N, T, D], overwritten when they are float64, against the X [N, T, D] that they stand for."""
    x, y = x_NTD.double(), y_NTD.double()
    x_energy_NT, y_energy_NT = _row_energy(x), _row_energy(y)
    residual_NT = _row_energy(y.sub_(x))
    # 2 x·y = |x|² + |y|² − |x − y|², which spares another pass over [N, T, D].
    dots_NT = (x_energy_NT + y_energy_NT - residual_NT) / 2
    residual_N = residual_NT.sum(-1)
    return Figures(
        token_cosine_N=_cosine(dots_NT, x_energy_NT, y_energy_NT).mean(-1),
        flat_cosine_N=_cosine(dots_NT.sum(-1), x_energy_NT.sum(-1), y_energy_NT.sum(-1)),
        mse_N=residual_N / (x.shape[-2] * x.shape[-1]),
        residual_N=residual_N,
    )


def residual_ratio(residual_N: Tensor, optimum_N: Tensor, energy_N: Tensor) -> Tensor:
    """ρ = ‖X − AB‖² / ‖X − X_r‖², the distance to the truncated SVD: 1.0 is perfect, and nothing is below it.

    Where X has no more than the rank, or nearly so, both residuals are rounding noise: each counts as at least `EXACT`
    of the image's energy, so that an exact method gets 1.0 there and a bad one still a large number.

    Args:
        residual_N: ‖X − AB‖² of each image [N].
        optimum_N: ‖X − X_r‖² of each image [N], `Optimum.residual_NR` at the rank.
        energy_N: ‖X‖² of each image [N], `Optimum.energy_N`.

    Returns:
        ρ of each image [N]; 1.0 for an image of zeros that was reproduced, infinite for one that was not.
    """
    floor_N = EXACT * energy_N
    ratio_N = torch.maximum(residual_N, floor_N) / torch.maximum(optimum_N, floor_N)
    return torch.where((residual_N == 0) & (energy_N == 0), torch.ones_like(ratio_N), ratio_N)


def _row_energy(x_NTD: Tensor) -> Tensor:
    energy_NT: Tensor = torch.linalg.vector_norm(x_NTD, dim=-1).square()
    return energy_NT


def _cosine(dots: Tensor, x_energy: Tensor, y_energy: Tensor) -> Tensor:
    norms = x_energy.sqrt() * y_energy.sqrt()
    return torch.where(norms == 0, torch.zeros_like(dots), dots / norms).clamp(-1, 1)
