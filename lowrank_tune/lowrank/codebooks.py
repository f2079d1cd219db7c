"""Codebooks made: of a `shared` model, or of X and of factors as they are.

T tokens, D dim, R rank.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lowrank_tune.lowrank.coding import FINE, FINEST, TURN, WEIGHT, Codebook
from lowrank_tune.lowrank.decomposers.shared import PACE, SMALL, Shared, borders, expected_size
from lowrank_tune.lowrank.entropy import HIGHEST, LOWEST, OCTAVE, laplace_counts


def make_codebook(model: Shared, rank: int | None = None) -> Codebook:
    """Make what the coded images of a model share, of all its ranks or the first."""
    basis_RD = model.basis[:rank]
    return book_of(
        model.giving(basis_RD),
        model.giving(model.mean_D[None])[0],
        model.transform,
        model.log_scale_TR[:, :rank],
        model.group_T,
        PACE * model.adaptation.item(),
        None if model.weight_DD is None else model.taking(basis_RD),
    )


def book_of(
    basis_RD: Tensor,
    mean_D: Tensor,
    transform_TT: Tensor,
    log_scale_TR: Tensor,
    group_T: Tensor,
    adaptation: float = 0.0,
    taking_RD: Tensor | None = None,
) -> Codebook:
    """Make the codebook of a basis, a transform and scales: these, and the whole-number tables that code by them.

    Coefficients are products with `taking_RD`, without one with the basis, whose rows are orthonormal then.
    """
    levels = np.arange(LOWEST, HIGHEST + 1)
    tables = [laplace_counts(2.0 ** (level / OCTAVE)) for level in levels]
    # Of the level that is not coded, and of all that sizes may have.
    every = torch.arange(LOWEST, 20 * OCTAVE, dtype=torch.float64) * (math.log(2) / OCTAVE)
    expected = expected_size(every)
    weight, awaited = (WEIGHT / (expected + SMALL)), (WEIGHT * expected / (expected + SMALL))
    scale_TR = log_scale_TR.detach().double().cpu() * (OCTAVE / math.log(2))
    taking = {} if taking_RD is None else {"taking": taking_RD.detach().float().cpu().contiguous().numpy()}
    return Codebook(
        taking
        | {
            "basis": basis_RD.detach().float().cpu().contiguous().numpy(),
            "mean": mean_D.detach().float().cpu().numpy(),
            "transform": transform_TT.detach().float().cpu().contiguous().numpy(),
            # At the least step every coefficient is coded: what never differed in training may in another image.
            "scale": scale_TR.round().clamp(LOWEST + FINEST // FINE, 2**14).numpy().astype(np.int16),
            "group": group_T.cpu().numpy().astype(np.int32),
            "adaptation": np.array([round(TURN * adaptation)], np.int32),
            "counts": np.concatenate(tables).astype(np.uint32),
            "symbols": np.array([len(table) for table in tables], np.int32),
            "weight": np.append(0, weight.round().numpy()).astype(np.int64),
            "awaited": np.append(0, awaited.round().numpy()).astype(np.int64),
            "powers": np.round(WEIGHT * 2.0 ** (np.arange(24 * OCTAVE) / OCTAVE)).astype(np.int64),
            "border": borders(every).float().numpy(),
        }
    )
