"""`shared`: one basis for a whole data set, learned for few bits at little error.

    X̂ = X / rms(X)                    every image counts alike
    A = X Bᵀ, X ≈ A B                 B [R, D] has orthonormal rows, the first along the mean token M: A B, of rank R,
                                      is (X − M) BᵀB + M, and A the least-squares one for B
    Z = C (X̂ − M̂) Bᵀ [T, R]           coefficients; C [T, T], orthonormal, transforms the tokens (Tucker's form)
    loss = bits(Z) / T / D + lambda_rate · ‖X̂ − Y‖ / ‖X̂‖

With a metric W = F Fᵀ all of this is of X̂F in place of X̂, so that the error weighs by it: A = X F B'ᵀ and B = B' F⁻¹
for the orthonormal B' of X̂F.

B is the same for every image, so that an image is kept as its coefficients, which `lowrank.coding` writes in bits. In
training they are rounded by noise added to them, and their bits are those of Laplace distributions with learned scales
(Ballé, Laparra & Simoncelli, 2017).

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.decomposers.base import Decomposer, Factors
from lowrank_tune.lowrank.linalg import eigh, orthonormalise, principal_axes

TOKEN_TRANSFORMS = ("none", "dct", "learned")
SLOW = 10.0
"""Size of the elements of B and C as they are learned: a step of the optimiser turns them by so much less."""
PACE = 10.0
"""What a step of the optimiser counts for a number that rules all coefficients."""
FADING, PRIOR, SMALL = 0.625, 2.0, 0.3
"""How `surprise` weighs: an older group's part of the next one's, what is taken for seen beforehand, and the expected
size below which a coefficient counts by it."""
MOST_DEAD = 0.25
"""By how much `rounded` moves a border at most."""
LEAST_RATIO = 1 / 16
"""Of a coefficient's scale to the step, below which it is zero for certain."""
RARELY = 0.2
"""Of the scale to the step, below which a coefficient's error in training is itself."""
LEAST_SCALE = 1e-6
"""Of a coefficient, where X̂'s elements are about 1: what never differs from the mean needs a scale, too."""


class Shared(Decomposer):
    """Its basis is ordered at its start: the leading rows of B are the best for fewer ranks.

    Two parameters: `token_transform`, and `lambda_rate`, how many bits an element a relative error of 1 is worth.
    """

    family = "shared"
    params = ("token_transform", "lambda_rate")
    ordered = True
    weighable = True
    mean_D: Tensor
    transform_TT: Tensor
    group_T: Tensor
    dither_TR: Tensor

    def __init__(self, tokens: int, dim: int, rank: int, params: Mapping[str, Any], generator: torch.Generator) -> None:
        super().__init__(tokens, dim, rank, params, generator)
        kind, self.lambda_rate = params["token_transform"], float(params["lambda_rate"])
        if kind not in TOKEN_TRANSFORMS:
            raise InputError(f"token_transform {kind!r}: there is none; choose of {', '.join(TOKEN_TRANSFORMS)}")
        if not (math.isfinite(self.lambda_rate) and self.lambda_rate > 0):
            raise InputError(f"lambda_rate {self.lambda_rate}: must be a number above 0")
        self.register_buffer("mean_D", torch.zeros(dim))
        start_DR = torch.randn(dim, rank, generator=generator)
        self.basis_RD = nn.Parameter(orthonormalise(start_DR).mT.contiguous() * SLOW * dim**0.5)
        if kind == "none":
            self.register_buffer("transform_TT", torch.eye(tokens))
        elif kind == "dct":
            self.register_buffer("transform_TT", grid_dct(tokens))
        else:
            self.transform_TT = nn.Parameter(torch.eye(tokens) * SLOW * tokens**0.5)
        self.log_scale_TR = nn.Parameter(torch.zeros(tokens, rank))
        # About where a bit more, of 6 dB, lowers the loss by nothing.
        self.log_step = nn.Parameter(torch.tensor(math.log(min(1.0, 5 / self.lambda_rate)) / PACE))
        self.adaptation = nn.Parameter(torch.zeros(()))
        self.register_buffer("group_T", _groups(kind, tokens))
        self.register_buffer("dither_TR", torch.rand(tokens, rank, generator=generator) - 0.5, persistent=False)

    @classmethod
    def highest_rank(cls, tokens: int, dim: int) -> int:
        """Return D: of so many directions a data set may be, whatever one image has."""
        return dim

    @property
    def basis(self) -> Tensor:
        """B [R, D]; with a metric that of X̂F."""
        basis_RD: Tensor = self.basis_RD / (SLOW * self.dim**0.5)
        return basis_RD

    @property
    def transform(self) -> Tensor:
        """C [T, T]."""
        return self.transform_TT / (SLOW * self.tokens**0.5) if self._learns_transform else self.transform_TT

    @property
    def step(self) -> float:
        """What coefficients are rounded by, in units of the image's root mean square."""
        return math.exp(PACE * self.log_step.item())

    @property
    def _learns_transform(self) -> bool:
        return isinstance(self.transform_TT, nn.Parameter)

    def forward(self, x_NTD: Tensor, rank: int | None = None) -> Factors:
        """Decompose images [N, T, D], at the model's rank or a smaller one."""
        basis_RD = self.basis[: self.check_rank(rank)]
        return Factors(x_NTD @ self.taking(basis_RD).mT, self.giving(basis_RD).expand(len(x_NTD), -1, -1))

    def taking(self, rows: Tensor) -> Tensor:
        """Return rows [..., D] whose products with X are those of the given ones with X F."""
        return rows if self.weight_DD is None else (rows.double() @ self.weight_DD.double().mT).to(rows)

    def giving(self, rows: Tensor) -> Tensor:
        """Return rows [..., D] of X F as those of X."""
        if self.weight_DD is None:
            return rows
        # In float64: F may weigh some directions ten thousand times as much as others.
        plain: Tensor = torch.linalg.solve_triangular(self.weight_DD.double(), rows.double(), upper=False, left=False)
        return plain.to(rows)

    def initialise(self, x_batches: Iterable[Tensor], generator: torch.Generator) -> None:
        """Set B to the mean and the principal axes of the tokens of training images [n, T, D], and fit the scales."""
        self._level(x_batches)
        total, images = torch.zeros(self.dim, dtype=torch.float64), 0
        for x_NTD in x_batches:
            total += self._units(x_NTD)[0].double().mean(1).sum(0).cpu()
            images += len(x_NTD)
        mean_D = (total / max(images, 1)).to(self.mean_D)
        direction_D = mean_D / torch.linalg.vector_norm(mean_D).clamp_min(torch.finfo(mean_D.dtype).tiny)

        def centred() -> Iterator[Tensor]:
            for x_NTD in x_batches:
                tokens_NTD = self._units(x_NTD)[0] - mean_D
                yield tokens_NTD - (tokens_NTD @ direction_D)[..., None] * direction_D

        with torch.no_grad():
            axes_DR = principal_axes(centred(), self.rank, generator).to(mean_D)
            kept = direction_D[:, None] if mean_D.any() else axes_DR[:, :1]
            others = axes_DR[:, : self.rank - 1] if mean_D.any() else axes_DR[:, 1:]
            self.mean_D.copy_(mean_D)
            self.basis_RD.copy_(orthonormalise(torch.cat([kept, others], 1)).mT * SLOW * self.dim**0.5)
            if self._learns_transform:
                self.transform_TT.copy_(self._token_axes(x_batches) * SLOW * self.tokens**0.5)
            self._fit_scales(x_batches, images)

    def _level(self, x_batches: Iterable[Tensor]) -> None:
        """Scale the metric so that X̂F is as large as X̂: a step, a bit and lambda_rate then mean what they do there."""
        if self.weight_DD is not None:
            squares = [self._units(x_NTD)[0].double().square().mean((-2, -1)).cpu() for x_NTD in x_batches]
            found_N = torch.cat(squares) if squares else torch.zeros(0)
            if found_N.any():
                self.weight_DD /= found_N[found_N > 0].mean().sqrt().to(self.weight_DD)

    def _units(self, x_NTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return X̂F, without a metric X̂, and which images [N] are not all zeros."""
        unit_NTD, seen_N = unit_images(x_NTD)
        return self.weighted(unit_NTD), seen_N

    def _token_axes(self, x_batches: Iterable[Tensor]) -> Tensor:
        """Return the principal axes of the tokens [T, T], largest first, all components alike."""
        moment_TT = self.mean_D.new_zeros(self.tokens, self.tokens, dtype=torch.float64)
        for x_NTD in x_batches:
            z_NTR = self._projected(self._units(x_NTD)[0])
            power_R = z_NTR.square().mean((0, 1)).clamp_min(LEAST_SCALE**2)
            unit_NTR = (z_NTR * power_R.rsqrt()).double()
            moment_TT += torch.einsum("ntr,nsr->ts", unit_NTR, unit_NTR)
        return eigh(moment_TT)[1].flip(-1).mT.to(self.mean_D)

    def _fit_scales(self, x_batches: Iterable[Tensor], images: int) -> None:
        """Set each coefficient's scale to its mean size, the Laplace distribution's maximum of likelihood."""
        sizes_TR = torch.zeros_like(self.log_scale_TR)
        for x_NTD in x_batches:
            sizes_TR += self.coefficients(x_NTD).abs().sum(0)
        self.log_scale_TR.copy_((sizes_TR / max(images, 1)).clamp_min(LEAST_SCALE).log())

    def settle(self) -> None:
        """Make B's rows, and C, orthonormal again."""
        with torch.no_grad():
            self.basis_RD.copy_(orthonormalise(self.basis_RD.mT).mT * SLOW * self.dim**0.5)
            if self._learns_transform:
                self.transform_TT.copy_(orthonormalise(self.transform_TT.mT).mT * SLOW * self.tokens**0.5)

    def _projected(self, unit_NTD: Tensor) -> Tensor:
        projected_NTR: Tensor = (unit_NTD - self.mean_D) @ self.basis.mT
        return projected_NTR

    def coefficients(self, x_NTD: Tensor) -> Tensor:
        """Return Z [N, T, R] of images [N, T, D]."""
        z_NTR: Tensor = self.transform @ self._projected(self._units(x_NTD)[0])
        return z_NTR

    def precomputed_loss(self, *precomputed: Tensor) -> Tensor:
        """Return bits an element of X and lambda_rate times the relative error, the mean over images [N, T, D]."""
        unit_NTD, seen_N = self._units(precomputed[0])
        z_NTR = self.transform @ self._projected(unit_NTD)
        log_step = PACE * self.log_step
        exact_NTR, log_ratio_TR = z_NTR / log_step.exp(), self.log_scale_TR - log_step
        rounded_NTR = rounded(exact_NTR.detach(), log_ratio_TR.detach())
        noisy_NTR = exact_NTR + ((exact_NTR + self.dither_TR).round() - (exact_NTR + self.dither_TR)).detach()
        log_ratio_NTR = log_ratio_TR + PACE * self.adaptation * self.surprise(rounded_NTR, log_ratio_TR.detach())
        coded_TR = log_ratio_TR.detach() > math.log(LEAST_RATIO)
        bits_N = (laplace_bits(noisy_NTR, log_ratio_NTR.exp()) * coded_TR).sum((-2, -1))
        # What is rounded to 0 nearly always loses itself, and not what a step has on the average.
        lost_NTR = torch.where(
            log_ratio_TR.detach() > math.log(RARELY), log_step.exp() * (noisy_NTR - exact_NTR).detach(), z_NTR
        )
        outside_N = (unit_NTD - self.mean_D).square().sum((-2, -1)) - z_NTR.square().sum((-2, -1))
        elements = self.tokens * self.dim
        error_N = ((lost_NTR.square().sum((-2, -1)) + outside_N.clamp_min(0)) / elements + LEAST_SCALE**2).sqrt()
        return ((bits_N / elements + self.lambda_rate * error_N) * seen_N).mean()

    def surprise(self, rounded_NTR: Tensor, log_ratio_TR: Tensor) -> Tensor:
        """Return by how much the coefficients of earlier groups of tokens were larger than expected, as a logarithm.

        Groups follow each other as they are coded; each has [N, 1, R] of those before it, newer ones counting more.
        """
        expected_TR = expected_size(log_ratio_TR)
        weight_TR = 1 / (expected_TR + SMALL)
        member_GT = torch.nn.functional.one_hot(self.group_T).T.to(expected_TR)
        found_NGR = member_GT @ (rounded_NTR.abs() * weight_TR)
        awaited_GR = member_GT @ (expected_TR * weight_TR)
        ages_GG = torch.arange(len(member_GT), device=expected_TR.device)
        ages_GG = ages_GG[:, None] - ages_GG - 1
        past_GG = torch.where(ages_GG >= 0, FADING ** ages_GG.clamp_min(0).to(expected_TR), 0)
        log_NGR = ((past_GG @ found_NGR + PRIOR) / (past_GG @ awaited_GR + PRIOR)).log()
        return log_NGR[:, self.group_T]


def unit_images(x_NTD: Tensor) -> tuple[Tensor, Tensor]:
    """Return images over their root mean square, and which [N] are not all zeros."""
    energy_N = torch.linalg.vector_norm(x_NTD, dim=(-2, -1), dtype=torch.float64)
    rms_N = (energy_N / x_NTD[0].numel() ** 0.5).to(x_NTD.dtype).clamp_min(torch.finfo(x_NTD.dtype).tiny)
    return x_NTD / rms_N[:, None, None], energy_N > 0


def laplace_bits(u: Tensor, scale: Tensor) -> Tensor:
    """Return −log2 of the chance that a Laplace variable of this scale lies within ½ of u; shapes broadcast."""
    scale, size = scale.clamp_min(LEAST_RATIO), u.abs()
    # Each part within its own range: the other's gradient may not be finite.
    within, beyond = size.clamp_max(0.5), size.clamp_min(0.5) - 0.5
    near = -torch.log1p(-0.5 * ((within - 0.5) / scale).exp() - 0.5 * ((-within - 0.5) / scale).exp())
    far = beyond / scale - (-torch.expm1(-1 / scale)).log() + math.log(2)
    return torch.where(size < 0.5, near, far) / math.log(2)


def expected_size(log_ratio: Tensor) -> Tensor:
    """Return the mean size of a rounded Laplace variable, its scale over the step given as a logarithm."""
    inverse = (-log_ratio).clamp_max(-math.log(LEAST_RATIO)).exp()
    size: Tensor = (-0.5 * inverse).exp() / -torch.expm1(-inverse)
    return size


def borders(log_ratio: Tensor) -> Tensor:
    """Return where a coefficient's size is rounded up to the next whole step, its scale over the step as a logarithm.

    A bit more is worth its cost where it lowers the error D, in steps², by 2 ln 2 D with D = 1/12, as at a fine step:
    the border between 0 and 1 moves by half of that times the bits between them, and the others with it.
    """
    ratio = log_ratio.clamp_min(math.log(LEAST_RATIO)).exp()
    zero, one = laplace_bits(torch.zeros_like(ratio), ratio), laplace_bits(torch.ones_like(ratio), ratio)
    return 0.5 + (math.log(2) / 12 * (one - zero)).clamp(0, MOST_DEAD)


def rounded(exact: Tensor, log_ratio: Tensor) -> Tensor:
    """Return whole numbers for exact ones, by `borders`, and 0 below `LEAST_RATIO`."""
    size = (exact.abs() + 1 - borders(log_ratio)).floor().clamp_min(0)
    return size * exact.sign() * (log_ratio > math.log(LEAST_RATIO))


def grid_dct(tokens: int) -> Tensor:
    """Return the orthonormal 2-D DCT-II of a square grid of tokens, row by row, as a matrix [T, T].

    Raises:
        InputError: the number of tokens is no square.
    """
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise InputError(
            f"token_transform dct: {tokens} tokens are no square grid; take `learned`, which fits any order, or `none`"
        )
    place = np.arange(side)
    row = np.cos(np.pi / side * np.outer(place, place + 0.5)) * np.sqrt(2 / side)
    row[0] = np.sqrt(1 / side)
    return torch.from_numpy(np.kron(row, row)).float()


def _groups(kind: str, tokens: int) -> Tensor:
    """Return which group [T] each row of C Z is coded in: rows of the grid, or with a dct its shells around 0."""
    side = math.isqrt(tokens)
    place_T = torch.arange(tokens)
    if kind == "dct":
        return torch.maximum(place_T // side, place_T % side)
    return place_T // side
