"""The metric W [D, D] by which a language model's answers move, and the decomposition that is optimal in it.

    ‖E‖_W² = tr(E W Eᵀ) = ‖E F‖²     what an error E of the features weighs; W = F Fᵀ
    X F = U Σ Vᵀ                     the SVD
    A = U_r, B = U_rᵀ X              of all A B of rank r that with the least ‖X − A B‖_W, for A B F = U_r Σ_r V_rᵀ

Whichever F with F Fᵀ = W is taken, W^½ say, U is the same; a Cholesky factor costs no eigendecomposition.

N images, T tokens, D dim, K = min(T, D), R ranks 1..T (column r − 1 is rank r).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.svd import Matrix, Optimum

METRIC = "metric_DD"
"""The one tensor of a metric's file."""


@dataclass(frozen=True, slots=True)
class WeightedOptimum:
    """What the truncated SVD of X F leaves of some images at every rank, float64.

    Attributes:
        energy_N: ‖X‖_W² [N].
        residual_NR: the least ‖X − A B‖_W² there is [N, T].
        own: what these A B are beside X in the figures without a metric.
    """

    energy_N: Tensor
    residual_NR: Tensor
    own: Optimum


def read_metric(path: Path, dim: int) -> Tensor:
    """Read the metric of features with so many columns as its `metric_factor`.

    Raises:
        InputError: it is missing, damaged, or another size's.
    """
    try:
        with safe_open(path, "pt") as file:
            metric_DD = file.get_tensor(METRIC)
        if metric_DD.shape != (dim, dim):
            raise ValueError(f"it is of {list(metric_DD.shape)}, the features have {dim} columns")
        return metric_factor(metric_DD)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(
            f"{path}: no metric of the answers ({error}); a study that has `fidelity` in its file estimates one before "
            "its trials, so remove what lies there and `lowrank-tune resume` the study"
        ) from error


def metric_factor(metric_DD: Tensor) -> Tensor:
    """Return F [D, D], lower triangular and float64, with F Fᵀ = W over the mean of W's diagonal.

    Raises:
        ValueError: W is not positive definite.
    """
    exact_DD = metric_DD.double()
    mean = exact_DD.diagonal().mean()
    unit_DD = (exact_DD + exact_DD.mT) / (2 * mean)
    factor_DD, failed = torch.linalg.cholesky_ex(unit_DD)
    if failed:
        # What storing a large eigenvalue in float32 rounds away may have made a small one negative.
        rounding = torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(unit_DD)
        factor_DD, failed = torch.linalg.cholesky_ex(unit_DD + rounding * torch.eye(len(unit_DD), dtype=torch.float64))
    if failed or not mean > 0 or not factor_DD.isfinite().all():
        raise ValueError("it is not positive definite")
    found_DD: Tensor = factor_DD
    return found_DD


def weighted_residual(weighted_NTD: Tensor, a_NTR: Tensor, b_NRD: Tensor, factor_DD: Tensor) -> Tensor:
    """Return ‖X − A B‖_W² [N] in float64 for X F [N, T, D], A [N, T, R] and B [N, R, D]."""
    lost_NTD = weighted_NTD - a_NTR.double() @ (b_NRD.double() @ factor_DD)
    residual_N: Tensor = lost_NTD.square().sum((-2, -1))
    return residual_N


def measure_weighted(x_batches: Iterable[Tensor], factor_DD: Tensor) -> WeightedOptimum:
    """Measure the weighted SVD of each image in batches [n, T, D], all of them finite: one decomposition an image."""
    factor, elements = factor_DD.cpu().numpy(), 0
    energies: list[tuple[float, float]] = []
    curves: list[Matrix] = []
    for x_NTD in x_batches:
        elements = x_NTD[0].numel()
        for x_TD in x_NTD.double().cpu().numpy():
            left_TK, values_K, _ = np.linalg.svd(x_TD @ factor, full_matrices=False)
            energies.append((float(np.square(values_K).sum()), float(np.square(x_TD).sum())))
            curves.append(np.concatenate([_left(np.square(values_K), len(x_TD))[None], _in_x(x_TD, left_TK)]))
    weighted_N, energy_N = torch.tensor(energies, dtype=torch.float64).reshape(-1, 2).unbind(-1)
    least_NR, residual_NR, token_cosine_NR, flat_cosine_NR = torch.from_numpy(np.stack(curves, axis=1))
    return WeightedOptimum(
        weighted_N, least_NR, Optimum(energy_N, residual_NR, token_cosine_NR, flat_cosine_NR, elements)
    )


def _in_x(x_TD: Matrix, left_TK: Matrix) -> Matrix:
    """Return ‖X − Y_r‖² and the token and flat cosines of X and Y_r = U_r U_rᵀ X at every rank [3, T]."""
    rows_KD = left_TK.T @ x_TD
    inner_KK = rows_KD @ rows_KD.T
    explained_K = inner_KK.diagonal()
    dots_TK = np.cumsum(left_TK * (x_TD @ rows_KD.T), axis=1)
    # ‖row i of Y_r‖² grows by u_ir² H_rr and twice Σ_{k<r} u_ik H_kr u_ir, H the inner products of B's rows.
    grown_TK = left_TK * (2 * left_TK @ np.triu(inner_KK, 1) + left_TK * explained_K)
    energy_T1 = np.square(x_TD).sum(axis=1, keepdims=True)
    norms_TK = np.sqrt(np.clip(np.cumsum(grown_TK, axis=1), 0, None) * energy_T1)
    cosine_TK = np.divide(dots_TK, norms_TK, out=np.zeros_like(dots_TK), where=norms_TK > 0)
    tokens, count = left_TK.shape
    curve = np.zeros((3, tokens))
    curve[0] = _left(explained_K, tokens)
    curve[1, :count] = np.clip(cosine_TK, -1, 1).sum(axis=0) / max(1, np.count_nonzero(energy_T1))
    curve[2, :count] = np.sqrt(np.cumsum(explained_K) / max(explained_K.sum(), np.finfo(float).tiny))
    curve[1:, count:] = curve[1:, count - 1 : count]
    return curve


def _left(explained_K: Matrix, tokens: int) -> Matrix:
    """Return what is left of a sum beyond its first 1..T parts; of more than there are, nothing."""
    left = np.zeros(tokens)
    left[: len(explained_K) - 1] = np.cumsum(explained_K[::-1])[-2::-1]
    return left
