"""What a decomposer is: X [tokens, dim] to A [tokens, rank] and B [rank, dim] in one forward pass.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_tune.errors import InputError


class Factors(NamedTuple):
    """X ≈ A B.

    Attributes:
        a_NTR: left factors [N, T, R].
        b_NRD: right factors [N, R, D].
    """

    a_NTR: Tensor
    b_NRD: Tensor


class Decomposer(nn.Module, ABC):
    """A trained map from features to factors.

    A family subclasses it, sets `family` and `params`, makes its weights in `__init__` from the generator alone, and
    enters itself in `registry.FAMILIES`; the conformance suite then tests it.

    Args:
        tokens: T, rows of each X.
        dim: D, its columns.
        rank: R, the columns of A at most.
        params: What this family alone has; every name in the class's `params`, and no other.
        generator: Draws the weights; on the CPU.

    Raises:
        InputError: The rank exceeds min(tokens, dim), or `params` are not the family's.
    """

    family: ClassVar[str]
    """The name in the study file."""
    params: ClassVar[tuple[str, ...]] = ()
    """The names of the hyperparameters that this family alone has."""

    def __init__(
        self, tokens: int, dim: int, rank: int, params: Mapping[str, float], generator: torch.Generator
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(tokens, dim):
            raise InputError(
                f"rank {rank}: features of [{tokens}, {dim}] have ranks 1 to {min(tokens, dim)}; lower `rank`"
            )
        if set(params) != set(self.params):
            raise InputError(
                f"family {self.family} takes {', '.join(self.params) or 'no parameters'}; "
                f"it was given {', '.join(sorted(params)) or 'none'}"
            )
        self.tokens = tokens
        self.dim = dim
        self.rank = rank
        self.family_params = dict(params)

    @abstractmethod
    def forward(self, x_NTD: Tensor, rank: int | None = None) -> Factors:
        """Decompose images, each independently of the others in the batch.

        Args:
            x_NTD: Features [N, T, D] in the weights' dtype.
            rank: How many columns A gets, `self.rank` by default. Fewer are the leading ones of an ordered basis, for
                families that have one.

        Raises:
            InputError: This family, or this model, has no factors of that rank.
        """

    @abstractmethod
    def loss(self, x_NTD: Tensor) -> Tensor:
        """Return the scalar that training lowers, averaged over images [N, T, D].

        A family is free in how: from reconstructions, or from the Gram matrices alone.
        """

    def initialise(self, x_batches: Iterable[Tensor], generator: torch.Generator) -> None:  # noqa: B027
        """Set the weights from training images before the first epoch; by default they stay as drawn.

        Args:
            x_batches: Features of training images [n, T, D], read once.
            generator: Draws what is drawn; on the CPU.
        """

    def check_rank(self, rank: int | None) -> int:
        """Return the rank to compute.

        Raises:
            InputError: It is not in 1..`self.rank`.
        """
        if rank is None:
            return self.rank
        if not 1 <= rank <= self.rank:
            raise InputError(f"rank {rank}: this {self.family} model was made for ranks 1 to {self.rank}")
        return rank
