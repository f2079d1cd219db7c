"""`sketch`: A spans a learned sketch of the columns, B in closed form.

A = orth(XΩ), B = AᵀX: the range finder of Halko, Martinsson & Tropp (2011) with Ω [D, R] learned instead of drawn; this
B is the least-squares one for its A. N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_tune.lowrank.decomposers.base import Decomposer, Factors
from lowrank_tune.lowrank.linalg import orthonormalise, principal_axes, scaled


class Sketch(Decomposer):
    """Starts at the training images' principal axes; its basis is ordered, by Ω's leading columns."""

    family = "sketch"
    ordered = True

    def __init__(self, tokens: int, dim: int, rank: int, params: Mapping[str, Any], generator: torch.Generator) -> None:
        super().__init__(tokens, dim, rank, params, generator)
        # The length of a column means nothing to A; elements of size 1 make a learning rate a relative step.
        self.omega_DR = nn.Parameter(torch.randn(dim, rank, generator=generator))

    def initialise(self, x_batches: Iterable[Tensor], generator: torch.Generator) -> None:
        """Set Ω to the leading principal axes of training images [n, T, D]."""
        axes_DR = principal_axes(x_batches, self.rank, generator)
        with torch.no_grad():
            self.omega_DR.copy_(axes_DR * self.dim**0.5)

    def forward(self, x_NTD: Tensor, rank: int | None = None) -> Factors:
        """Decompose images [N, T, D], at the model's rank or a smaller one."""
        a_NTR = orthonormalise(x_NTD @ self.omega_DR[:, : self.check_rank(rank)])
        return Factors(a_NTR, a_NTR.mT @ x_NTD)

    def precomputed_loss(self, *precomputed: Tensor) -> Tensor:
        """Return 1 − tr(QᵀGQ) / tr G of images [N, T, D] with Q = A and G = XXᵀ, the residual's share of the energy.

        tr(QᵀGQ) is taken as ‖QᵀX‖², which for R < T costs less than forming G.
        """
        x_NTD = scaled(precomputed[0])
        _, b_NRD = self(x_NTD)
        energy_N1 = x_NTD.square().sum((-2, -1))[:, None].clamp_min(torch.finfo(x_NTD.dtype).tiny)
        return self.weigh_ranks((1 - b_NRD.square().sum(-1).cumsum(-1) / energy_N1).mean(0))
