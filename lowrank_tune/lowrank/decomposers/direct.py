"""`direct`: a network regresses both factors, the reference system's idea.

N images, T tokens, D dim, R rank, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.decomposers.base import Decomposer, Factors


def three_term_loss(x_NTD: Tensor, a_NTR: Tensor, b_NRD: Tensor, lambda_b: float, lambda_ortho: float) -> Tensor:
    """Return MSE(X, AB) + lambda_b · mean(B²) + lambda_ortho · ‖AᵀA − I‖² / R², the mean over images.

    X is [N, T, D], A [N, T, R], B [N, R, D].
    """
    reconstruction = (a_NTR @ b_NRD - x_NTD).square().mean()
    identity = torch.eye(a_NTR.shape[-1], dtype=a_NTR.dtype, device=a_NTR.device)
    orthogonality = (a_NTR.mT @ a_NTR - identity).square().mean()
    return reconstruction + lambda_b * b_NRD.square().mean() + lambda_ortho * orthogonality


HIDDEN = 512
"""H: at [256, 2048] and rank 128 the network then has 3.4 M weights."""


class Direct(Decomposer):
    """Each token gives its row of A by a two-layer network; the pooled tokens and a learned vector a component give B.

    The network sees X at root mean square 1, and B takes the scale back: scaling X scales AB.
    """

    family = "direct"
    params = ("lambda_b", "lambda_ortho")

    def __init__(self, tokens: int, dim: int, rank: int, params: Mapping[str, Any], generator: torch.Generator) -> None:
        super().__init__(tokens, dim, rank, params, generator)
        self.token_in = _linear(dim, HIDDEN, generator)
        self.token_out = _linear(HIDDEN, rank, generator)
        self.pool_in = _linear(dim, HIDDEN, generator)
        self.component_RH = nn.Parameter(torch.randn(rank, HIDDEN, generator=generator))
        self.component_out = _linear(HIDDEN, dim, generator)

    def forward(self, x_NTD: Tensor, rank: int | None = None) -> Factors:
        """Decompose images [N, T, D] at the model's own rank."""
        if self.check_rank(rank) != self.rank:
            raise InputError(f"rank {rank}: a direct model has factors of its own rank {self.rank} only")
        energy_N11 = torch.linalg.vector_norm(x_NTD, dim=(-2, -1), keepdim=True, dtype=torch.float64)
        scale_N11 = (energy_N11 / x_NTD[0].numel() ** 0.5).to(x_NTD.dtype)
        unit_NTD = x_NTD / scale_N11.clamp_min(torch.finfo(x_NTD.dtype).tiny)
        a_NTR = self.token_out(functional.gelu(self.token_in(unit_NTD)))
        pooled_N1H = self.pool_in(unit_NTD.mean(-2, keepdim=True))
        b_NRD = self.component_out(functional.gelu(self.component_RH + pooled_N1H)) * scale_N11
        return Factors(a_NTR, b_NRD)

    def precomputed_loss(self, *precomputed: Tensor) -> Tensor:
        """Return the three-term loss of images [N, T, D]."""
        (x_NTD,) = precomputed
        a_NTR, b_NRD = self(x_NTD)
        return three_term_loss(x_NTD, a_NTR, b_NRD, **self.family_params)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a layer drawn from the generator (nn.Linear itself would draw from the global one)."""
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    bound = inputs**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
