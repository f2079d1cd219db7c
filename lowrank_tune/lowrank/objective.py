"""The reference system's loss: reconstruction, size of B, orthogonality of A.

M models, N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
