"""Decompositions without training: what a trained decomposer must beat.

Each takes X [N, T, D] and a rank R ≤ min(T, D); a CPU generator draws one Ω for the batch. N images, T tokens, D dim, W
columns of a widened basis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_tune.lowrank.decomposers.base import Factors
from lowrank_tune.lowrank.linalg import (
    deflated_gram,
    gram,
    leading_eigenvectors,
    orthonormalise,
    orthonormalise_nearly,
    orthonormalise_once,
    scaled,
)

OVERSAMPLING = 1.25
"""Width of `randomized_svd`'s basis, relative to the rank."""


def random_sketch(x_NTD: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Return A = orth(XΩ) with gaussian Ω, and B = AᵀX (Halko, Martinsson & Tropp, 2011)."""
    return project(x_NTD, orthonormalise(x_NTD @ _gaussian(x_NTD, rank, generator)))


def pca_basis(x_NTD: Tensor, rank: int, axes_DR: Tensor) -> Factors:
    """Return A = orth(XV), V the leading R of the training images' `principal_axes` [D, ≥R], and B = AᵀX."""
    return project(x_NTD, orthonormalise(x_NTD @ axes_DR[:, :rank].to(x_NTD)))


def power_1(x_NTD: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Return A = orth(G XΩ) with gaussian Ω, one step of subspace iteration, and B = AᵀX."""
    start_NTR = orthonormalise(x_NTD @ _gaussian(x_NTD, rank, generator))
    rows_NDR = x_NTD.mT @ start_NTR
    return project(x_NTD, orthonormalise(x_NTD @ scaled(rows_NDR)))


def randomized_svd(x_NTD: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Return the randomized SVD of Halko, Martinsson & Tropp (2011, algorithms 4.4 and 5.1) by way of G = XXᵀ.

    A basis of width 1.25 R, two steps of subspace iteration, then the R leading eigenvectors of QᵀGQ (Rayleigh–Ritz),
    with `refined`'s guards: a dominating direction is taken out first.
    """
    tokens, dim = x_NTD.shape[-2:]
    width = min(math.ceil(OVERSAMPLING * rank), tokens, dim)
    left = deflated_gram(x_NTD, rank, _gaussian(x_NTD, 1, generator)[:, 0])
    q_NTW = torch.randn(tokens, width, generator=generator).to(x_NTD)
    for _ in range(1 + 2):  # the sketch, then two steps
        q_NTW = orthonormalise_once((left.gram_NTT @ q_NTW).double()).to(x_NTD)
    ritz_NWR = leading_eigenvectors(q_NTW.mT @ (left.gram_NTT @ q_NTW), rank)
    return project(x_NTD, left.complete(orthonormalise_nearly(q_NTW @ ritz_NWR)))


def gram_eigh(x_NTD: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Return the leading eigenvectors of the deflated G = XXᵀ as A, in X's dtype, and B = AᵀX: every rank at once."""
    left = deflated_gram(x_NTD, rank, _gaussian(x_NTD, 1, generator)[:, 0])
    return project(x_NTD, left.complete(leading_eigenvectors(left.gram_NTT, rank)))


def svd(x_NTD: Tensor, rank: int) -> Factors:
    """Return the truncated SVD, from a float64 eigendecomposition of the smaller Gram matrix.

    A has orthonormal columns and B = AᵀX; for T > D, B has orthonormal rows and A = XBᵀ.
    """
    x = x_NTD.double()
    if x.shape[-2] <= x.shape[-1]:
        return project(x_NTD, leading_eigenvectors(gram(x), rank).to(x_NTD))
    axes_NDR = leading_eigenvectors(gram(x.mT), rank).to(x_NTD)
    return Factors(x_NTD @ axes_NDR, axes_NDR.mT)


def svd_rows(x_NTD: Tensor, rank: int) -> Factors:
    """Return the truncated SVD of X with rows of length one, A's rows brought back to their tokens' lengths.

    It maximises the mean squared token cosine, as `svd` does the flat cosine.
    """
    lengths_NT1 = torch.linalg.vector_norm(x_NTD, dim=-1, keepdim=True, dtype=torch.float64).to(x_NTD)
    a_NTR, b_NRD = svd(torch.where(lengths_NT1 > 0, x_NTD / lengths_NT1, x_NTD), rank)
    return Factors(lengths_NT1 * a_NTR, b_NRD)


def svd_weighted(x_NTD: Tensor, rank: int, factor_DD: Tensor) -> Factors:
    """Return the A B of a rank that is nearest to X in the metric W = F Fᵀ: A leads the left singular vectors of X F.

    A has orthonormal columns and B = AᵀX, from a float64 eigendecomposition of the smaller Gram matrix of X F.
    """
    weighted_NTD = x_NTD.double() @ factor_DD.to(x_NTD.device)
    if x_NTD.shape[-2] <= x_NTD.shape[-1]:
        return project(x_NTD, leading_eigenvectors(gram(weighted_NTD), rank).to(x_NTD))
    axes_NDR = leading_eigenvectors(gram(weighted_NTD.mT), rank)
    return project(x_NTD, orthonormalise(weighted_NTD @ axes_NDR).to(x_NTD))


def project(x_NTD: Tensor, q_NTR: Tensor) -> Factors:
    """Return A = Q and the least-squares B = QᵀX for an orthonormal basis Q [N, T, R]."""
    return Factors(q_NTR, q_NTR.mT @ x_NTD)


def _gaussian(x_NTD: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(x_NTD.shape[-1], columns, generator=generator).to(x_NTD)
