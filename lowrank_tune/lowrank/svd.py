"""The truncated SVD's figures at every rank: the best that is mathematically possible.

X_r is the closest matrix of rank r (Eckart & Young, 1936). With G = X Xᵀ = Σ_j λ_j u_j u_jᵀ, without an SVD:

    ‖X − X_r‖² = Σ_{j>r} λ_j       flat_cosine² = Σ_{j≤r} λ_j / Σ_j λ_j       token_cosine_i² = Σ_{j≤r} λ_j u_ij² / G_ii

N images, T tokens, D dim, R ranks 1..T (column r − 1 is rank r).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_tune.errors import CacheError, InputError
from lowrank_tune.files import write_whole
from lowrank_tune.lowrank.metrics import Figures

Matrix = NDArray[np.float64]

GRADED = 1e10
"""λ_1 over the smallest token's energy above which an image goes through the SVD of X itself: squaring the matrix would
cost that token's cosine more than 1e-6."""


@dataclass(frozen=True, slots=True)
class Optimum:
    """The truncated SVD's figures of some images at every rank, float64.

    Attributes:
        energy_N: ‖X‖² [N].
        residual_NR: ‖X − X_r‖² [N, T].
        token_cosine_NR: cosine between the rows of X and X_r, mean over tokens [N, T].
        flat_cosine_NR: cosine between X and X_r, flattened [N, T].
        elements: T · D.
    """

    energy_N: Tensor
    residual_NR: Tensor
    token_cosine_NR: Tensor
    flat_cosine_NR: Tensor
    elements: int

    def at(self, rank: int) -> Figures:
        """Return the figures at one rank; InputError where it is not in 1..T."""
        ranks = self.residual_NR.shape[1]
        if not 1 <= rank <= ranks:
            raise InputError(f"rank {rank}: the images have {ranks} tokens; ask for a rank of 1 to {ranks}")
        residual_N = self.residual_NR[:, rank - 1]
        return Figures(
            token_cosine_N=self.token_cosine_NR[:, rank - 1],
            flat_cosine_N=self.flat_cosine_NR[:, rank - 1],
            mse_N=residual_N / self.elements,
            residual_N=residual_N,
        )

    def save(self, path: Path, of: str = "") -> None:
        """Write the figures as a safetensors file; `of` is a digest of the images."""
        tensors = {f.name: getattr(self, f.name).contiguous() for f in fields(self) if f.name != "elements"}
        tensors["elements"] = torch.tensor(self.elements)
        write_whole(path, lambda temporary: save_file(tensors, temporary, {"of": of}))

    @classmethod
    def load(cls, path: Path) -> Optimum:
        """Read what `save` wrote."""
        tensors = load_file(path)
        return cls(**tensors | {"elements": int(tensors["elements"])})


def measure_optimum(x_batches: Iterable[Tensor]) -> Optimum:
    """Measure the truncated SVD of each image in batches [n, T, D], one eigendecomposition an image.

    Raises:
        CacheError: An image is not finite.
        InputError: There is no image.
    """
    energies: list[float] = []
    curves: list[Matrix] = []
    elements = 0
    for x_NTD in x_batches:
        elements = x_NTD[0].numel()
        for x_TD in x_NTD.double().cpu().numpy():
            energy, curve = _decompose(x_TD, len(energies))
            energies.append(energy)
            curves.append(curve)
    if not curves:
        raise InputError("the optimum needs at least one image; enlarge the split that it is measured on")
    residual_NR, token_cosine_NR, flat_cosine_NR = torch.from_numpy(np.stack(curves, axis=1))
    return Optimum(torch.tensor(energies, dtype=torch.float64), residual_NR, token_cosine_NR, flat_cosine_NR, elements)


def kept_optimum(path: Path, of: str, x_batches: Iterable[Tensor]) -> Optimum:
    """Read the optimum at `path`, or, unless it is `of` these images, measure it; errors as `measure_optimum`."""
    try:
        with safe_open(path, "pt") as file:
            known = file.metadata() or {}
        if known.get("of") == of:
            return Optimum.load(path)
    except (OSError, SafetensorError):
        pass  # none is there yet, or a machine was lost while it was written
    optimum = measure_optimum(x_batches)
    optimum.save(path, of)
    return optimum


def _decompose(x_TD: Matrix, place: int) -> tuple[float, Matrix]:
    """Return ‖X‖² and the rows residual, token cosine, flat cosine [3, T]."""
    tokens, dim = x_TD.shape
    # numpy computes a matrix times its own transpose by half the products (BLAS syrk).
    gram = x_TD @ x_TD.T if tokens <= dim else x_TD.T @ x_TD
    energy = float(np.trace(gram))
    if not np.isfinite(energy):
        raise CacheError(f"image {place} of the split holds NaN or infinity; run `lowrank-tune features verify`")
    row_energy_T1 = np.diagonal(gram)[:, None] if tokens <= dim else np.square(x_TD).sum(axis=1, keepdims=True)
    eigenvalues_K, shares_TK = _spectrum(x_TD, gram, row_energy_T1)
    count = len(eigenvalues_K)
    curve = np.zeros((3, tokens))
    curve[0, : count - 1] = np.cumsum(eigenvalues_K)[-2::-1]
    # A token of zeros has no direction.
    cosine_TK = _cosine(np.cumsum(shares_TK[:, ::-1], axis=1), row_energy_T1)
    curve[1, :count] = cosine_TK.sum(axis=0) / max(1, np.count_nonzero(row_energy_T1))
    curve[2, :count] = _cosine(np.cumsum(eigenvalues_K[::-1]), np.float64(energy))
    curve[1:, count:] = curve[1:, count - 1 : count]
    return energy, curve


def _spectrum(x_TD: Matrix, gram: Matrix, row_energy_T1: Matrix) -> tuple[Matrix, Matrix]:
    """Return the eigenvalues, ascending and not negative [K], and how much of each token each explains [T, K]."""
    eigenvalues_K, vectors = np.linalg.eigh(gram)
    smallest = row_energy_T1.min(initial=np.inf, where=row_energy_T1 > 0)
    if eigenvalues_K[-1] > GRADED * smallest:
        _, singular_K, axes_KD = np.linalg.svd(x_TD, full_matrices=False)
        return singular_K[::-1] ** 2, (x_TD @ axes_KD[::-1].T) ** 2
    eigenvalues_K = np.maximum(eigenvalues_K, 0)
    if len(gram) == len(x_TD):
        return eigenvalues_K, vectors**2 * eigenvalues_K
    return eigenvalues_K, (x_TD @ vectors) ** 2


def _cosine(explained: Matrix, total: Matrix | np.float64) -> Matrix:
    share = np.divide(explained, total, out=np.zeros_like(explained), where=total > 0)
    cosine: Matrix = np.sqrt(np.clip(share, 0, 1))
    return cosine


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of some images, and what the SVD keeps of them at every rank.

    Attributes:
        values_NK: σ_j / σ_1, falling [N, K].
        cosine_K: the SVD's token cosine at ranks 1..K, mean over images.
        left_K: the share of ‖X‖² that it leaves, likewise.
        test_images: how many the split has; N are of them.
    """

    values_NK: NDArray[np.float64]
    cosine_K: NDArray[np.float64]
    left_K: NDArray[np.float64]
    test_images: int

    @property
    def ranks(self) -> NDArray[np.int64]:
        """1..K."""
        return np.arange(1, self.values_NK.shape[1] + 1)

    def rank_for(self, cosine: float) -> int | None:
        """The least rank with this mean token cosine; None where rounding keeps it from any."""
        enough = np.flatnonzero(self.cosine_K >= cosine)
        return int(enough[0]) + 1 if len(enough) else None
