"""The linear algebra that decomposers and controls share.

N images, T tokens, D dim, R rank or any number of columns.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

JITTER = 1e-12
"""What `orthonormalise` adds to a correlation matrix, relative to its size: above the rounding of float64 products over
any number of tokens that fits into memory, below what float32 columns resolve squared."""
SMALL_JITTER = 2e-15
"""Likewise for `orthonormalise_once`, just above the rounding of float64 products: what it adds must stay below the
squares of directions that are a millionth of the longest, for no second pass restores them."""
NEARLY = 0.3
"""Sine of the angle between a column and those before it above which `orthonormalise_nearly` trusts one pass in the
columns' own dtype: the basis is then orthonormal to about 1 / `NEARLY`² roundings."""
DOMINATED = 0.8
"""‖G‖ over tr G above which one direction is taken out before G is formed. What is then left of the energy, a fifth at
most, is by how much G's rounding shrinks; that pays where the eigenvalue at the rank is a millionth of the largest."""
GRADED = 100
"""Roundings of X's dtype, relative to the largest eigenvalue, below which an eigensolver's eigenvectors are mixed with
those of smaller ones by its own rounding."""
FITTING = (1e-20, 1e30)
"""What an image's energy may be in float32 without a number of the Gram matrix, or of its square, leaving the range."""
POWERS_AT_RANK_1 = 8
"""Products with XXᵀ, beyond the one that every rank has, from Xω to that direction; they fall with the rank, for at a
high one it need only lie among the leading directions."""
LOOSE = 0.25
"""‖VᵀV − I‖ over the root of the dtype's rounding, above which eigenvectors count as not orthonormal: 9e-5 in float32,
where LAPACK's are within 2e-5 of 256 columns."""
OVERSAMPLING = 64
"""Columns that `principal_axes` sketches with beyond twice those it returns; few axes would be poor ones without."""

logger = logging.getLogger(__name__)


def gram(x_NTD: Tensor) -> Tensor:
    """Return G = X Xᵀ of each image [N, T, T]."""
    plain = x_NTD.device.type == "cpu" and not x_NTD.requires_grad
    if plain and x_NTD.dtype in (torch.float32, torch.float64):
        x = x_NTD.numpy()
        # numpy computes a matrix times its own transpose by half the products (BLAS syrk); torch has no such call.
        return torch.from_numpy(np.matmul(x, x.swapaxes(-1, -2)))
    return x_NTD @ x_NTD.mT


class DeflatedGram(NamedTuple):
    """G = XXᵀ of images, or, where one direction q holds most of an image's energy, that of X − qqᵀX.

    Tokens that are nearly equal, or a giant one, make such a q; squared in G, it would bury the others in rounding.
    """

    gram_NTT: Tensor  # over its own trace: powers of a G over ‖X‖² might leave float32's range
    share_N: Tensor  # that trace over ‖X‖²: a trillionth perhaps where q was taken out
    dominated_N: Tensor  # of which images it was
    q_nT1: Tensor = torch.empty(0)  # their q

    def complete(self, basis_NTR: Tensor) -> Tensor:
        """Put q before the basis of what is left, whose last column makes room for it."""
        if not len(self.q_nT1):
            return basis_NTR
        others_nTR = basis_NTR[self.dominated_N, :, :-1]
        # Products with G leave a trace of q, which an image of nearly equal tokens would magnify.
        others_nTR = torch.addcmul(others_nTR, self.q_nT1, self.q_nT1.mT @ others_nTR, value=-1)
        return basis_NTR.index_put((self.dominated_N,), torch.cat([self.q_nT1, others_nTR], -1))

    def residual(self, basis_NTR: Tensor) -> Tensor:
        """Return ‖X − AAᵀX‖² / ‖X‖² [N, R] for the first 1..R columns of A, `complete` of this basis of what is left.

        Where q was taken out it is tr G − tr(A'ᵀGA') of the G without it and the other columns A'.
        """
        kept_NR = (basis_NTR * (self.gram_NTT @ basis_NTR)).sum(-2)
        kept_NR = torch.where(self.dominated_N[:, None], functional.pad(kept_NR[:, :-1], (1, 0)), kept_NR)
        left_N1 = self.gram_NTT.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        return self.share_N[:, None] * (left_N1 - kept_NR.cumsum(-1))


def deflated_gram(x_NTD: Tensor, rank: int, omega_D: Tensor) -> DeflatedGram:
    """Return the Gram matrices of images for bases of a rank; ω is a random direction, in X's dtype."""
    gram_NTT = gram(x_NTD)
    energy_N = gram_NTT.diagonal(dim1=-2, dim2=-1).sum(-1)
    fits_N = (energy_N > FITTING[0]) & (energy_N < FITTING[1])
    if not fits_N.all():
        x_NTD = torch.where(fits_N[:, None, None], x_NTD, scaled(x_NTD))
        gram_NTT = gram(x_NTD)
        energy_N = gram_NTT.diagonal(dim1=-2, dim2=-1).sum(-1)
    energy_N = energy_N.clamp_min(torch.finfo(x_NTD.dtype).tiny)
    gram_NTT = gram_NTT.div_(energy_N[:, None, None])
    flat_NTT = gram_NTT.flatten(1)
    dominated_N = torch.linalg.vecdot(flat_NTT, flat_NTT) > DOMINATED**2
    q_nT1, share_N = x_NTD.new_empty(0), torch.ones_like(energy_N)
    if dominated_N.any():
        q_nT1, gram_NTT[dominated_N], share_N[dominated_N] = _deflate(x_NTD[dominated_N], rank, omega_D)
    return DeflatedGram(gram_NTT, share_N, dominated_N, q_nT1)


def eigh(symmetric_NKK: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, rising [N, K], and orthonormal eigenvectors [N, K, K] of one matrix or many.

    On a GPU torch 2.12 and later solve by Jacobi rotations, of which eigenvectors that are not orthonormal have been
    reported (pytorch 192483): those of a GPU are looked at.
    """
    values_NK, vectors_NKK = torch.linalg.eigh(symmetric_NKK)
    return (values_NK, vectors_NKK) if symmetric_NKK.is_cpu else mended(symmetric_NKK, values_NK, vectors_NKK)


def mended(symmetric_NKK: Tensor, values_NK: Tensor, vectors_NKK: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors, those of matrices whose vectors are not orthonormal made anew on the CPU."""
    bad_N = is_loose(vectors_NKK)
    if not bad_N.any():
        return values_NK, vectors_NKK
    logger.warning(
        "%d of %d eigendecompositions by %s were not orthonormal, and are done on the CPU",
        bad_N.sum().item(), bad_N.numel(), symmetric_NKK.device,
    )  # fmt: skip
    again = torch.linalg.eigh(symmetric_NKK[bad_N].cpu())
    values_NK, vectors_NKK = values_NK.clone(), vectors_NKK.clone()
    values_NK[bad_N] = again.eigenvalues.to(values_NK)
    vectors_NKK[bad_N] = again.eigenvectors.to(vectors_NKK)
    return values_NK, vectors_NKK


def is_loose(vectors_NKK: Tensor) -> Tensor:
    """Return whose eigenvectors are not orthonormal, NaN among them [N]."""
    sound_N: Tensor = departure(vectors_NKK) <= LOOSE * torch.finfo(vectors_NKK.dtype).eps ** 0.5
    return ~sound_N


def departure(basis_NTR: Tensor) -> Tensor:
    """Return ‖QᵀQ − I‖ [N] of each basis, the root of the sum of squares."""
    identity_RR = torch.eye(basis_NTR.shape[-1], dtype=basis_NTR.dtype, device=basis_NTR.device)
    length_N: Tensor = torch.linalg.matrix_norm(basis_NTR.mT @ basis_NTR - identity_RR)
    return length_N


def leading_eigenvectors(symmetric_NKK: Tensor, count: int) -> Tensor:
    """Return the eigenvectors of the `count` largest eigenvalues [N, K, count], the largest first; NaN counts as 0.

    Where an eigenvalue is so small that the solver's own rounding mixes its vector with those of smaller ones, the
    matrix is decomposed in float64: what it holds is finer than that.
    """
    # One matrix that is not finite would be an error for all the batch.
    symmetric_NKK = symmetric_NKK.nan_to_num(0, 0, 0)
    values_NK, vectors_NKK = eigh(symmetric_NKK)
    leading_NKC: Tensor = vectors_NKK[..., -count:].flip(-1)
    mixed_N = values_NK[:, -count] < GRADED * torch.finfo(values_NK.dtype).eps * values_NK[:, -1]
    if symmetric_NKK.dtype != torch.float64 and mixed_N.any():
        leading_NKC[mixed_N] = leading_eigenvectors(symmetric_NKK[mixed_N].double(), count).to(leading_NKC.dtype)
    return leading_NKC


def _deflate(x_NTD: Tensor, rank: int, omega_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [N, T, 1], the Gram matrices of X − qqᵀX over their traces [N, T, T], and those over ‖X‖² [N]."""
    q_NT1 = _unit((x_NTD @ omega_D)[..., None])
    for _ in range(1 + POWERS_AT_RANK_1 // rank):
        q_NT1 = _unit(x_NTD @ (q_NT1.mT @ x_NTD).mT)
    row_N1D = q_NT1.mT @ x_NTD
    gram_NTT = gram(torch.addcmul(x_NTD, q_NT1, row_N1D, value=-1))
    left_N, tiny = gram_NTT.diagonal(dim1=-2, dim2=-1).sum(-1), torch.finfo(x_NTD.dtype).tiny
    energy_N = left_N + row_N1D.square().sum((-2, -1))
    return q_NT1, gram_NTT / left_N.clamp_min(tiny)[:, None, None], left_N / energy_N.clamp_min(tiny)


def _unit(y_NT1: Tensor) -> Tensor:
    length_N11: Tensor = torch.linalg.vector_norm(y_NT1, dim=-2, keepdim=True)
    return y_NT1 / length_N11.clamp_min(torch.finfo(y_NT1.dtype).tiny)


def scaled(x_NTD: Tensor) -> Tensor:
    """Return each image over its largest element, so that squares stay in range; one of zeros stays."""
    largest_N11 = x_NTD.abs().amax((-2, -1), keepdim=True)
    return x_NTD / torch.where(largest_N11 > 0, largest_N11, torch.ones_like(largest_N11))


def orthonormalise(y_NTR: Tensor) -> Tensor:
    """Return an orthonormal basis [N, T, R] of each matrix's columns, R ≤ T, in the dtype of Y, by CholeskyQR2.

    Two passes of Y (chol(YᵀY))⁻ᵀ (Fukaya, Nakatsukasa, Yanagisawa & Yamamoto, 2014): matrix products and a Cholesky of
    [R, R], no Householder loop. YᵀY squares the condition of Y, which float32 does not survive on images with a giant
    token or equal tokens. Columns are first brought to length one, and each pass adds R·`JITTER` to the diagonal, so
    that anything finite is factorised; what is not gives NaN.

    The first r columns span those of Y. Where these have fewer than r dimensions the surplus columns come out shorter
    than one, down to zero, and gradients through them stay finite.
    """
    y = y_NTR.double()
    lengths_N1R = torch.linalg.vector_norm(y, dim=-2, keepdim=True)
    floor_N11 = torch.finfo(y_NTR.dtype).eps * lengths_N1R.detach().amax(-1, keepdim=True)
    unit_NTR = y / torch.maximum(lengths_N1R, floor_N11).clamp_min(torch.finfo(y.dtype).tiny)
    return _cholesky_pass(_cholesky_pass(unit_NTR)).to(y_NTR.dtype)


def orthonormalise_once(y_NTR: Tensor) -> Tensor:
    """As `orthonormalise`, by one pass at half the cost or less.

    The basis is orthonormal up to κ times Y's rounding, and to κ² · 1e-16, with κ the condition of Y with columns of
    length one: good for columns near eigenvectors and, in float64, before another product.
    """
    inner_NRR = gram(y_NTR.double().mT)
    squares_NR = inner_NRR.detach().diagonal(dim1=-2, dim2=-1)
    # Eigenvalues go down to float32's rounding beside the largest, and columns may hold their squares.
    noise_N1 = torch.finfo(torch.float32).eps ** 4 * squares_NR.sum(-1, keepdim=True)
    void_NR = squares_NR <= noise_N1
    if void_NR.any():
        y_NTR = y_NTR.masked_fill(void_NR[..., None, :], 0)
        inner_NRR = gram(y_NTR.double().mT) + torch.diag_embed(void_NR.double())
    inner_NRR.diagonal(dim1=-2, dim2=-1).mul_(1 + (y_NTR.shape[-1] + 100) * SMALL_JITTER)
    q_NTR: Tensor = torch.linalg.solve_triangular(
        _upper_factor(inner_NRR).to(y_NTR.dtype), y_NTR, upper=True, left=False
    )
    return q_NTR


def orthonormalise_nearly(y_NTR: Tensor) -> Tensor:
    """As `orthonormalise`, quickest where columns are nearly orthogonal, as Ritz vectors are: one pass in Y's dtype.

    The Cholesky factor's diagonal holds the sines of the angles between columns and those before them; an image with
    one below `NEARLY` goes through two passes of `orthonormalise_once` in float64 instead.
    """
    inner_NRR = y_NTR.mT @ y_NTR
    # Any scale gives the same basis, so it needs no gradient; that of a small one would leave float32's range.
    scale_NR = inner_NRR.detach().diagonal(dim1=-2, dim2=-1).rsqrt()
    correlation_NRR = inner_NRR * (scale_NR[..., None] * scale_NR[..., None, :])
    upper_NRR, failed_N = torch.linalg.cholesky_ex(correlation_NRR, upper=True)
    nearly_N = (failed_N == 0) & (upper_NRR.diagonal(dim1=-2, dim2=-1) > NEARLY).all(-1)
    if nearly_N.all():
        scaled_NRR = upper_NRR / scale_NR[..., None, :]
        basis_NTR: Tensor = torch.linalg.solve_triangular(scaled_NRR, y_NTR, upper=True, left=False)
        return basis_NTR
    q_NTR = torch.empty_like(y_NTR)
    q_NTR[nearly_N] = orthonormalise_nearly(y_NTR[nearly_N])
    q_NTR[~nearly_N] = orthonormalise_once(orthonormalise_once(y_NTR[~nearly_N].double())).to(y_NTR.dtype)
    return q_NTR


def _cholesky_pass(y_NTR: Tensor) -> Tensor:
    rank = y_NTR.shape[-1]
    correlation = y_NTR.mT @ y_NTR + rank * JITTER * torch.eye(rank, dtype=y_NTR.dtype, device=y_NTR.device)
    q_NTR: Tensor = torch.linalg.solve_triangular(_upper_factor(correlation), y_NTR, upper=True, left=False)
    return q_NTR


def _upper_factor(positive_NRR: Tensor) -> Tensor:
    """Return U with UᵀU the positive definite matrix; NaN where it is none."""
    # The checked variant would wait for the GPU, and raise where NaN features should make NaN figures.
    factor, failed_N = torch.linalg.cholesky_ex(positive_NRR)
    factor_NRR: Tensor = factor.masked_fill(failed_N[..., None, None] != 0, torch.nan)
    return factor_NRR.mT


def principal_axes(x_batches: Iterable[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Return the leading `count` eigenvectors of C = Σ XᵀX / ‖X‖² over images: [D, count], float64, the largest first.

    C is formed where that is cheaper than sketching it; otherwise one pass gives its Nyström approximation
    (CΩ)(ΩᵀCΩ)⁺(CΩ)ᵀ with random orthonormal Ω [D, K] (Tropp, Yurtsever, Udell & Cevher, 2017). Where the images span
    fewer dimensions, the last columns are arbitrary.

    Args:
        x_batches: [n, T, D], at least one; one is in memory at a time.
        count: At most D.
        generator: Draws Ω; on the CPU.

    Raises:
        torch.linalg.LinAlgError: The features are not finite.
    """
    batches = iter(x_batches)
    first_NTD = next(batches)
    dim, width = first_NTD.shape[-1], 2 * count + OVERSAMPLING
    test_DK: Tensor | None = None
    if dim > 2 * width:
        test_DK = torch.linalg.qr(torch.randn(dim, width, generator=generator)).Q.to(first_NTD)
    moment = _weigh(first_NTD, test_DK)
    for x_NTD in batches:
        moment += _weigh(x_NTD, test_DK)
    if test_DK is None:
        return eigh(moment)[1][:, -count:].flip(-1)
    core = test_DK.double().mT @ moment
    values_K, vectors_KK = eigh((core + core.mT) / 2)
    # Below what the features' own dtype resolves, eigenvalues of the core are noise of either sign.
    noise = width * torch.finfo(first_NTD.dtype).eps * values_K[-1]
    scales_K = values_K.clamp_min(noise.clamp_min(torch.finfo(torch.float64).tiny)).rsqrt()
    axes_DK: Tensor = torch.linalg.svd(moment @ (vectors_KK * scales_K), full_matrices=False).U
    return axes_DK[:, :count]


def _weigh(x_NTD: Tensor, test_DK: Tensor | None) -> Tensor:
    """Return a batch's share of C [D, D], or of CΩ [D, K], in float64."""
    lengths_N11 = torch.linalg.vector_norm(x_NTD, dim=(-2, -1), keepdim=True, dtype=torch.float64).to(x_NTD.dtype)
    rows = (x_NTD / lengths_N11.clamp_min(torch.finfo(x_NTD.dtype).tiny)).flatten(0, 1)
    share: Tensor = (rows.mT @ (rows if test_DK is None else rows @ test_DK)).double()
    return share


def stream(seed: int, purpose: str) -> torch.Generator:
    """Return a CPU generator for one purpose of one seed, independent of other purposes'."""
    words = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) >> 1)
