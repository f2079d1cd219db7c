"""The few pieces of linear algebra that decomposers and controls share.

N images, T tokens, D dim, R rank or any number of columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def gram(x_NTD: Tensor) -> Tensor:
    """Return G = X Xᵀ of each image [N, T, T]."""
    return x_NTD @ x_NTD.mT


def orthonormalise(y_NTR: Tensor) -> Tensor:
    """Return an orthonormal basis of each matrix's columns by CholeskyQR2.

    Two passes of Y (chol(YᵀY))⁻¹ (Fukaya, Nakatsukasa, Yanagisawa & Yamamoto, 2014, "CholeskyQR2: a simple and
    communication-avoiding algorithm for computing a tall-skinny QR factorization"): matrix products and a Cholesky of
    [R, R], no Householder loop. Columns are first brought to length one, and each pass adds R·ε to the diagonal of what
    is then a correlation matrix, so that float32 factorises it whatever Y is.

    The first r columns span the first r columns of Y. Where those have fewer than r dimensions to float precision
    (equal columns, zeros), the surplus columns come out shorter than one, down to zero, and gradients through them
    stay finite.

    Args:
        y_NTR: Matrices [N, T, R], R ≤ T, float32 or float64.

    Returns:
        Bases Q [N, T, R] with QᵀQ = I.
    """
    lengths_N1R = y_NTR.square().sum(-2, keepdim=True).clamp_min(torch.finfo(y_NTR.dtype).tiny).sqrt()
    return _cholesky_pass(_cholesky_pass(y_NTR / lengths_N1R))


def _cholesky_pass(y_NTR: Tensor) -> Tensor:
    rank = y_NTR.shape[-1]
    jitter = rank * torch.finfo(y_NTR.dtype).eps
    correlation = y_NTR.mT @ y_NTR + jitter * torch.eye(rank, dtype=y_NTR.dtype, device=y_NTR.device)
    upper = torch.linalg.cholesky(correlation).mT
    q_NTR: Tensor = torch.linalg.solve_triangular(upper, y_NTR, upper=True, left=False)
    return q_NTR


def principal_axes(x_batches: Iterable[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Return the leading eigenvectors of the images' uncentred second moment, each image counting alike.

    The second moment is C = mean over images of XᵀX / ‖X‖². It is formed where that is cheaper than sketching it;
    otherwise one pass gives its Nyström approximation from Y = C Ω, Ω gaussian [D, 2·count] (Tropp, Yurtsever, Udell &
    Cevher, 2017, "Fixed-rank approximation of a positive-semidefinite matrix from streaming data", algorithm 3).

    Args:
        x_batches: Features, batches [n, T, D]; at most one batch is in memory at a time.
        count: How many eigenvectors, at most D.
        generator: Draws Ω; on the CPU.

    Returns:
        Orthonormal columns [D, count] in the batches' dtype, the largest eigenvalue first.
    """
    test_DK: Tensor | None = None
    moment: Tensor | None = None
    images = 0
    for x_NTD in x_batches:
        dim, width = x_NTD.shape[-1], 2 * count
        if moment is None:
            formed = dim <= 2 * width
            test = torch.randn(dim, width, generator=generator, dtype=torch.float64)
            test_DK = None if formed else torch.linalg.qr(test).Q.to(x_NTD)
            moment = torch.zeros(dim, dim if formed else width, dtype=torch.float64, device=x_NTD.device)
        energy_N11 = x_NTD.square().sum((-2, -1), keepdim=True).clamp_min(torch.finfo(x_NTD.dtype).tiny)
        rows = (x_NTD / energy_N11.sqrt()).flatten(0, 1)
        moment += rows.T @ (rows if test_DK is None else rows @ test_DK)
        images += len(x_NTD)
    if moment is None:
        raise ValueError("principal_axes needs at least one batch")
    moment /= images
    axes = _leading(moment, count) if test_DK is None else _nystrom(moment, test_DK.double(), count)
    return axes.to(x_NTD.dtype)


def _leading(moment_DD: Tensor, count: int) -> Tensor:
    vectors_DD: Tensor = torch.linalg.eigh(moment_DD).eigenvectors
    return vectors_DD[:, -count:].flip(-1)


def _nystrom(sketch_DK: Tensor, test_DK: Tensor, count: int) -> Tensor:
    """Return the leading eigenvectors of (CΩ)(ΩᵀCΩ)⁺(CΩ)ᵀ from CΩ and Ω."""
    shift = torch.finfo(sketch_DK.dtype).eps * torch.linalg.matrix_norm(sketch_DK) * sketch_DK.shape[0] ** 0.5
    shifted = sketch_DK + shift * test_DK
    core = test_DK.T @ shifted
    core = (core + core.T) / 2 + shift * torch.eye(len(core), dtype=core.dtype, device=core.device)
    factor = torch.linalg.solve_triangular(torch.linalg.cholesky(core).T, shifted, upper=True, left=False)
    axes_DK: Tensor = torch.linalg.svd(factor, full_matrices=False).U
    return axes_DK[:, :count]
