"""What a decomposer is: X [tokens, dim] to A [tokens, rank] and B [rank, dim] in one forward pass.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.metrics import EXACT


class Factors(NamedTuple):
    """X ≈ A B, left factors [N, T, R] and right factors [N, R, D]."""

    a_NTR: Tensor
    b_NRD: Tensor


class Decomposer(nn.Module, ABC):
    """A trained map from features to factors.

    A family subclasses it, sets `family` and `params`, makes its weights in `__init__` from the generator alone, and
    enters itself in `decomposers.FAMILIES`; the conformance suite then tests it.

    Args:
        tokens: T, rows of each X.
        dim: D, its columns.
        rank: R, the columns of A at most.
        params: One for every name in the class's `params`.
        generator: Draws the weights; on the CPU.

    Raises:
        InputError: The rank exceeds the family's `highest_rank`, or `params` are not the family's.
    """

    family: ClassVar[str]
    """The name in the study file."""
    params: ClassVar[tuple[str, ...]] = ()
    """The names of the hyperparameters that this family alone has."""
    ordered: ClassVar[bool] = False
    """Whether `forward` serves lower ranks, too, by leading columns: one training can then serve them all."""
    weighable: ClassVar[bool] = False
    """Whether `params` may hold `metric`, too: with `answers` the error that training lowers weighs by the metric."""
    weight_DD: Tensor | None
    """F of the metric W = F Fᵀ, lower triangular; None where all directions weigh alike."""

    def __init__(self, tokens: int, dim: int, rank: int, params: Mapping[str, Any], generator: torch.Generator) -> None:
        super().__init__()
        highest = self.highest_rank(tokens, dim)
        if not 1 <= rank <= highest:
            raise InputError(
                f"rank {rank}: {self.family} has ranks 1 to {highest} for features of [{tokens}, {dim}]; lower `rank`"
            )
        if set(params) - ({"metric"} if self.weighable else set()) != set(self.params):
            raise InputError(
                f"family {self.family} takes {', '.join(self.params) or 'no parameters'}; "
                f"it was given {', '.join(sorted(params)) or 'none'}"
            )
        self.tokens = tokens
        self.dim = dim
        self.rank = rank
        self.default_rank = rank
        self.family_params = dict(params)
        self._loss_weights = {rank: 1.0}
        self.register_buffer("weight_DD", torch.eye(dim) if params.get("metric") == "answers" else None)

    @classmethod
    def highest_rank(cls, tokens: int, dim: int) -> int:
        """Return the highest rank that the family has for features [tokens, dim]: by default their own."""
        return min(tokens, dim)

    @abstractmethod
    def forward(self, x_NTD: Tensor, rank: int | None = None) -> Factors:
        """Decompose images [N, T, D] in the weights' dtype, each independently of the others.

        A smaller `rank` than `self.default_rank` gives the leading columns of an ordered basis.

        Raises:
            InputError: This family, or this model, has no factors of that rank.
        """

    def loss(self, x_NTD: Tensor) -> Tensor:
        """Return the scalar that training lowers, the mean over images [N, T, D]."""
        return self.precomputed_loss(*self.precompute(x_NTD))

    def precompute(self, x_NTD: Tensor) -> tuple[Tensor, ...]:
        """Return what the loss needs of images [N, T, D], one entry an image, and no training changes; by default X."""
        return (x_NTD,)

    @abstractmethod
    def precomputed_loss(self, *precomputed: Tensor) -> Tensor:
        """Return `loss` from what `precompute` returned."""

    def nest(self, optima: Mapping[int, float]) -> None:
        """Let `loss` be the mean ρ over several ranks, so that one training serves them all.

        Args:
            optima: Each rank, with the share of ‖X‖² that the optimum leaves at it.

        Raises:
            InputError: The family's basis is not ordered, or a rank exceeds the model's.
        """
        if not self.ordered:
            raise InputError(f"family {self.family} has no ordered basis to nest ranks in; list the ranks instead")
        self._loss_weights = {self.check_rank(rank): 1 / max(share, EXACT) for rank, share in optima.items()}

    def weigh_ranks(self, residual_R: Tensor) -> Tensor:
        """Return the scalar to lower from the mean share of ‖X‖² that is left at ranks 1..R, [R].

        Nested ranks weigh by one over their optimum: a percent counts alike at every rank.
        """
        chosen = residual_R[[rank - 1 for rank in self._loss_weights]]
        return (chosen * chosen.new_tensor(list(self._loss_weights.values()))).mean()

    def initialise(self, x_batches: Iterable[Tensor], generator: torch.Generator) -> None:  # noqa: B027
        """Set the weights from training images [n, T, D] before the first epoch; by default they stay.

        `x_batches` may be gone through several times.
        """

    def weighted(self, x_NTD: Tensor) -> Tensor:
        """Return X F [N, T, D], whose error is that of X in the model's metric; X itself where it has none."""
        return x_NTD if self.weight_DD is None else x_NTD @ self.weight_DD

    def settle(self) -> None:  # noqa: B027
        """Bring the weights back to where they belong after a step of the optimiser; by default anywhere."""

    def check_rank(self, rank: int | None) -> int:
        """Return the rank to compute; InputError where it is not in 1..`self.rank`."""
        if rank is None:
            return self.default_rank
        if not 1 <= rank <= self.rank:
            raise InputError(f"rank {rank}: this {self.family} model was made for ranks 1 to {self.rank}")
        return rank
