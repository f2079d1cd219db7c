"""`direct`: a network regresses both factors, the reference system's idea.

N images, T tokens, D dim, R rank, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.decomposers.base import Decomposer, Factors


def three_term_loss(x_NTD: Tensor, a_NTR: Tensor, b_NRD: Tensor, lambda_b: float, lambda_ortho: float) -> Tensor:
    """Return MSE(X, AB) + lambda_b · mean(B²) + lambda_ortho · ‖AᵀA − I‖² / R², averaged over images.

    Args:
        x_NTD: Features [N, T, D].
        a_NTR: Left factors [N, T, R].
        b_NRD: Right factors [N, R, D].
        lambda_b: Weight of the mean squared element of B.
        lambda_ortho: Weight of the mean squared element of AᵀA − I.

    Returns:
        A scalar.
    """
    reconstruction = (a_NTR @ b_NRD - x_NTD).square().mean()
    identity = torch.eye(a_NTR.shape[-1], dtype=a_NTR.dtype, device=a_NTR.device)
    orthogonality = (a_NTR.mT @ a_NTR - identity).square().mean()
    return reconstruction + lambda_b * b_NRD.square().mean() + lambda_ortho * orthogonality


def three_term_losses(
    x_MNTD: Tensor, a_MNTR: Tensor, b_MNRD: Tensor, lambda_b_M: Tensor, lambda_ortho_M: Tensor
) -> Tensor:
    """Return `three_term_loss` of each of M models' factors of N images of its own, with weights of its own, [M]."""
    each = (-3, -2, -1)
    # Flat, for a product of matrices with two batch axes copies the factors first.
    product_MNTD = (a_MNTR.flatten(0, 1) @ b_MNRD.flatten(0, 1)).view_as(x_MNTD)
    reconstruction_M = (product_MNTD - x_MNTD).square().mean(each)
    a_NTR = a_MNTR.flatten(0, 1)
    identity = torch.eye(a_NTR.shape[-1], dtype=a_NTR.dtype, device=a_NTR.device)
    orthogonality_M = (a_NTR.mT @ a_NTR - identity).square().view(len(a_MNTR), -1).mean(-1)
    return reconstruction_M + lambda_b_M * b_MNRD.square().mean(each) + lambda_ortho_M * orthogonality_M


HIDDEN = 512
"""H: at [256, 2048] and rank 128 the network then has 3.4 M weights."""


class Direct(Decomposer):
    """Each token gives its row of A by a two-layer network; the pooled tokens and a learned vector a component give B.

    X is brought to root mean square 1 for the network, and B takes the scale back, so that A is free of the features'
    unit and scaling X scales AB.
    """

    family = "direct"
    params = ("lambda_b", "lambda_ortho")

    def __init__(
        self, tokens: int, dim: int, rank: int, params: Mapping[str, float], generator: torch.Generator
    ) -> None:
        super().__init__(tokens, dim, rank, params, generator)
        self.token_in = _linear(dim, HIDDEN, generator)
        self.token_out = _linear(HIDDEN, rank, generator)
        self.pool_in = _linear(dim, HIDDEN, generator)
        self.component_RH = nn.Parameter(torch.randn(rank, HIDDEN, generator=generator))
        self.component_out = _linear(HIDDEN, dim, generator)

    def forward(self, x_NTD: Tensor, rank: int | None = None) -> Factors:
        """Decompose images [N, T, D]; the rank is the model's own."""
        if self.check_rank(rank) != self.rank:
            raise InputError(f"rank {rank}: a direct model has factors of its own rank {self.rank} only")
        scale_N11 = x_NTD.square().mean((-2, -1), keepdim=True).sqrt()
        unit_NTD = x_NTD / scale_N11.clamp_min(torch.finfo(x_NTD.dtype).tiny)
        a_NTR = self.token_out(functional.gelu(self.token_in(unit_NTD)))
        pooled_N1H = self.pool_in(unit_NTD.mean(-2, keepdim=True))
        b_NRD = self.component_out(functional.gelu(self.component_RH + pooled_N1H)) * scale_N11
        return Factors(a_NTR, b_NRD)

    def condensed_loss(self, *condensed: Tensor) -> Tensor:
        """Return the three-term loss of images [N, T, D]."""
        (x_NTD,) = condensed
        a_NTR, b_NRD = self(x_NTD)
        return three_term_loss(x_NTD, a_NTR, b_NRD, **self.family_params)

    def condensed_losses(
        self, weights: Mapping[str, Tensor], params: Mapping[str, Tensor], *condensed: Tensor
    ) -> Tensor:
        """Return `condensed_loss` of each of M models, [M]; see `Decomposer.condensed_losses`."""
        (x_NTD,) = condensed
        count = len(weights["component_RH"])
        x_MNTD = x_NTD.view(count, -1, self.tokens, self.dim)
        scale_MN11 = x_MNTD.square().mean((-2, -1), keepdim=True).sqrt()
        unit_MNTD = x_MNTD / scale_MN11.clamp_min(torch.finfo(x_NTD.dtype).tiny)
        a_MNTR = _linears(weights, "token_out", functional.gelu(_linears(weights, "token_in", unit_MNTD)))
        pooled_MN1H = _linears(weights, "pool_in", unit_MNTD.mean(-2, keepdim=True))
        hidden_MNRH = functional.gelu(weights["component_RH"][:, None] + pooled_MN1H)
        b_MNRD = _linears(weights, "component_out", hidden_MNRH) * scale_MN11
        return three_term_losses(x_MNTD, a_MNTR, b_MNRD, params["lambda_b"], params["lambda_ortho"])


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a layer drawn from the generator (nn.Linear itself would draw from the global one)."""
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    bound = inputs**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def _linears(weights: Mapping[str, Tensor], name: str, rows: Tensor) -> Tensor:
    """Return a layer's outputs [M, ..., outputs] of inputs [M, ..., inputs], each model's by its own weights."""
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return torch.baddbmm(bias[:, None], rows.flatten(1, -2), weight.mT).view(*rows.shape[:-1], -1)
