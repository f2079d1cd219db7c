"""`refined`: a basis of the tokens sharpened by a learned filter of the image's own Gram matrix, B in closed form.

    G = XXᵀ                      over its trace, the only thing that the basis is made of; with a metric XF's
    Q = orth(GP)                 a block power step from a fixed random start P [T, W], W a little above R
    Q V = Ritz vectors           eigenvectors of QᵀGQ [W, W], the R largest kept, in order (Rayleigh–Ritz)
    A = orth(Π (G − c_k θ) QV)   the filter: its zeros lie at learned shares c_k of θ, the image's own W-th Ritz value
    B = AᵀX                      the least-squares B for this A

Randomized subspace iteration (Halko, Martinsson & Tropp, 2011) with the polynomial filter of Zhou, Saad, Tiago &
Chelikowsky (2006, J. Comput. Phys. 219). A filter fixed for a data set fails where spectra differ between images: this
one takes its scale from each. θ never lies above the W-th eigenvalue, so wanted eigenvalues lie above all zeros and the
filter grows with them.

Above `EXACT_FROM` of the tokens a whole eigendecomposition of G is no slower and exact: A is then its leading
eigenvectors, and there is nothing to learn.

Only the zeros are learned: a start P fitted to the training images' mean G was measured to be no better than a random
one. N images, T tokens, D dim, R rank, W width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.decomposers.base import Decomposer, Factors
from lowrank_tune.lowrank.linalg import (
    DeflatedGram,
    deflated_gram,
    eigh,
    leading_eigenvectors,
    orthonormalise_nearly,
    orthonormalise_once,
)

OVERSAMPLING = 10
"""W − R, at least. Without it the filter has nothing to tell wanted from unwanted by; but what is done in W columns
grows with W², and the eigendecomposition with W³."""
OVERSAMPLED = 0.1
"""W − R over R, at least: eigenvalues lie the closer the higher the rank."""
EXACT_FROM = 3 / 8
"""Rank over tokens above which all of G is decomposed: rank 96 of 256 tokens. `scripts/bench_decomposers.py` times both
routes; on CPUs they cross between 0.35 and 0.45 of 160 to 400 tokens."""
START = 0.9
"""Where the zeros begin. Chebyshev's would do the least harm over all of [0, θ]; but the products before have left
little near 0, and what is left stands near θ."""
PACE = 50.0
"""What the zeros' logits are stored divided by: a learning rate of 1e-3 then moves a zero by about a percent a step."""
STEPS_BETWEEN = 2
"""Steps after which the basis is made orthonormal again: a third would take float32's range on images whose
eigenvalues span six decades."""


class Refined(Decomposer):
    """Its basis is ordered: `forward` at a smaller rank is near the best of that rank.

    One parameter: `steps`, the degree of the filter, each step a product G Y; models of the exact route have it, too,
    and zeros that take no part.
    """

    family = "refined"
    params = ("steps",)
    ordered = True
    weighable = True
    omega_D: Tensor
    start_TW: Tensor

    def __init__(self, tokens: int, dim: int, rank: int, params: Mapping[str, Any], generator: torch.Generator) -> None:
        super().__init__(tokens, dim, rank, params, generator)
        steps = int(params["steps"])
        if steps < 1 or steps != params["steps"]:
            raise InputError(f"family refined: steps {params['steps']:g} must be a whole number, 1 at least")
        width = min(tokens, dim, rank + max(OVERSAMPLING, math.ceil(OVERSAMPLED * rank)))
        self.exact = rank > EXACT_FROM * tokens
        self.register_buffer("omega_D", torch.randn(dim, generator=generator))
        self.register_buffer("start_TW", torch.randn(tokens, width, generator=generator))
        self.zeros_K = nn.Parameter(torch.full((steps,), math.log(START / (1 - START)) / PACE))

    def forward(self, x_NTD: Tensor, rank: int | None = None) -> Factors:
        """Decompose images [N, T, D], at the model's rank or a smaller one; in float32 also under autocast."""
        count = self.check_rank(rank)
        with torch.autocast(x_NTD.device.type, enabled=False):
            x_NTD = x_NTD.to(self.start_TW.dtype)
            left = deflated_gram(self.weighted(x_NTD), self.rank, self.omega_D)
            if self.exact:
                a_NTR = leading_eigenvectors(left.gram_NTT, count)
            else:
                a_NTR = self._filter(left.gram_NTT, left.dominated_N, *self._ritz(left.gram_NTT, count))
            a_NTR = left.complete(a_NTR)
            return Factors(a_NTR, a_NTR.mT @ x_NTD)

    @torch.no_grad()
    def precompute(self, x_NTD: Tensor) -> tuple[Tensor, ...]:
        """Return G [N, T, T], its energy and what the filter starts from, or all that the exact route keeps [N, R]."""
        with torch.autocast(x_NTD.device.type, enabled=False):
            left = deflated_gram(self.weighted(x_NTD.to(self.start_TW.dtype)), self.rank, self.omega_D)
            if self.exact:
                basis_NTR = leading_eigenvectors(left.gram_NTT, self.rank)
                return (left.residual(basis_NTR),)
            return left.gram_NTT, left.share_N, left.dominated_N, *self._ritz(left.gram_NTT, self.rank)

    def precomputed_loss(self, *precomputed: Tensor) -> Tensor:
        """Return 1 − tr(AᵀXXᵀA) / ‖X‖², the residual's share of the energy."""
        if self.exact:
            (residual_NR,) = precomputed
            # The zeros take no part, but a training goes back through its loss.
            return self.weigh_ranks(residual_NR.mean(0)) + 0 * self.zeros_K.sum()
        gram_NTT, share_N, dominated_N, *start = precomputed
        with torch.autocast(gram_NTT.device.type, enabled=False):
            left = DeflatedGram(gram_NTT, share_N, dominated_N)
            return self.weigh_ranks(left.residual(self._filter(gram_NTT, dominated_N, *start)).mean(0))

    def _ritz(self, gram_NTT: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return Q [N, T, W], GQ, the coefficients V of the leading Ritz vectors [N, W, count] and θ [N, 1, 1]."""
        # In float64: the columns are all but parallel on an image with a few dominating directions.
        q_NTW = orthonormalise_once((gram_NTT @ self.start_TW).double()).to(gram_NTT.dtype)
        product_NTW = gram_NTT @ q_NTW
        # An image that is not finite stays so by its Q; here it would be an error for all the batch.
        inner_NWW = (q_NTW.mT @ product_NTW).nan_to_num(0, 0, 0)
        values_NW, vectors_NWW = eigh(inner_NWW)
        # Where W is all there is, the Ritz vectors are the eigenvectors, and zeros near the least of the eigenvalues
        # would let the rounding at 0 grow beside it.
        theta_N11 = values_NW[:, :1, None].clamp_min(0) * (values_NW.shape[-1] < min(self.tokens, self.dim))
        return q_NTW, product_NTW, vectors_NWW[..., -count:].flip(-1), theta_N11

    def _filter(
        self,
        gram_NTT: Tensor,
        dominated_N: Tensor,
        q_NTW: Tensor,
        product_NTW: Tensor,
        leading_NWR: Tensor,
        theta_N11: Tensor,
    ) -> Tensor:
        """Return the filtered basis [N, T, R], its last column zeros where q was taken out."""
        shifts_KN11 = -torch.sigmoid(PACE * self.zeros_K)[:, None, None, None] * theta_N11
        basis_NTR = torch.addcmul(product_NTW, q_NTW, shifts_KN11[0]) @ leading_NWR
        for step, shift_N11 in enumerate(shifts_KN11[1:], start=1):
            if step % STEPS_BETWEEN == 0:
                basis_NTR = _orthonormal(basis_NTR, dominated_N)
            basis_NTR = torch.baddbmm(shift_N11 * basis_NTR, gram_NTT, basis_NTR)
        return _orthonormal(basis_NTR, dominated_N)


def _orthonormal(basis_NTR: Tensor, dominated_N: Tensor) -> Tensor:
    if not dominated_N.any():
        return orthonormalise_nearly(basis_NTR)
    a_NTR = torch.zeros_like(basis_NTR)
    a_NTR[~dominated_N] = orthonormalise_nearly(basis_NTR[~dominated_N])
    a_NTR[dominated_N, :, :-1] = orthonormalise_nearly(basis_NTR[dominated_N, :, :-1])
    return a_NTR
