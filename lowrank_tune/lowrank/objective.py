"""The reference system's loss: reconstruction, size of B, orthogonality of A.

N images, T tokens, D dim, R rank.
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
