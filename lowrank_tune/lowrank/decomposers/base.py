"""What a decomposer is: X [tokens, dim] to A [tokens, rank] and B [rank, dim] in one forward pass.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    ordered: ClassVar[bool] = False
    """Whether `forward` serves lower ranks, too, by leading columns: one training can then serve them all."""

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
        self.default_rank = rank
        self.family_params = dict(params)
        self.loss_ranks: tuple[int, ...] = (rank,)
        self._seen_R: Tensor | None = None
        self._whole_R: Tensor | None = None

    @abstractmethod
    def forward(self, x_NTD: Tensor, rank: int | None = None) -> Factors:
        """Decompose images, each independently of the others in the batch.

        Args:
            x_NTD: Features [N, T, D] in the weights' dtype.
            rank: How many columns A gets, `self.default_rank` when None. Fewer are the leading ones of an ordered
                basis, for families that have one.

        Raises:
            InputError: This family, or this model, has no factors of that rank.
        """

    def loss(self, x_NTD: Tensor) -> Tensor:
        """Return the scalar that training lowers, averaged over images [N, T, D]."""
        return self.condensed_loss(*self.condense(x_NTD))

    def condense(self, x_NTD: Tensor) -> tuple[Tensor, ...]:
        """Return all that `condensed_loss` needs of images [N, T, D], one entry an image; by default X itself.

        It depends on no weight that training changes, so that training may keep it from epoch to epoch.
        """
        return (x_NTD,)

    @abstractmethod
    def condensed_loss(self, *condensed: Tensor) -> Tensor:
        """Return `loss` from what `condense` returned.

        A family is free in how: from reconstructions, or from the Gram matrices alone.
        """

    def nest(self, ranks: Sequence[int]) -> None:
        """Let `loss` weigh several ranks, so that one training serves them all.

        Args:
            ranks: Each at most `self.rank`.

        Raises:
            InputError: The family's basis is not ordered, or a rank exceeds the model's.
        """
        if not self.ordered:
            raise InputError(f"family {self.family} has no ordered basis to nest ranks in; list the ranks instead")
        self.loss_ranks = tuple(self.check_rank(rank) for rank in sorted(set(ranks)))

    def weigh_ranks(self, residual_R: Tensor) -> Tensor:
        """Return the scalar to lower from the mean residual at each rank 1..R, [R].

        Each of `loss_ranks` weighs by the inverse of its residual, so that a percent counts alike at every rank; the
        value is the residual at the highest of them.
        """
        chosen = residual_R[[rank - 1 for rank in self.loss_ranks]]
        self._seen_R = chosen.detach()
        whole = self._seen_R if self._whole_R is None else self._whole_R
        fixed = whole.clamp_min(torch.finfo(chosen.dtype).tiny)
        loss: Tensor = (chosen * (fixed[-1] / fixed)).mean()
        return loss

    def backward_in_pieces(
        self,
        pieces: Sequence[Callable[[], tuple[Tensor, ...]]],
        shares: Sequence[float],
        whole_R: Tensor | None = None,
    ) -> Tensor:
        """Gather the gradients of a batch that does not fit into memory at once, or of a part of it.

        Args:
            pieces: Each gives what `condensed_loss` needs of some of the batch's images; one is in memory at a time.
            shares: Which part of the batch's images each has.
            whole_R: The sum of `residual_in_pieces` over all parts of the batch, where the pieces are not all of it.

        Returns:
            The scalar that `condensed_loss` of the whole batch is, but for rounding, or the part of it that these
            pieces add; likewise the gradients.
        """
        total = torch.zeros(())
        try:
            if self.weighs_ranks:
                # The ranks' weights are of the whole batch: they have to be known before its first piece.
                self._whole_R = self.residual_in_pieces(pieces, shares) if whole_R is None else whole_R
            for piece, share in zip(pieces, shares, strict=True):
                loss = self.condensed_loss(*piece()) * share
                torch.autograd.backward(loss)
                total = total.to(loss.device) + loss.detach()
        finally:
            self._whole_R = None
        return total

    @property
    def weighs_ranks(self) -> bool:
        """Whether `condensed_loss` has weights in it that are of the whole batch."""
        return len(self.loss_ranks) > 1

    @torch.no_grad()
    def residual_in_pieces(self, pieces: Sequence[Callable[[], tuple[Tensor, ...]]], shares: Sequence[float]) -> Tensor:
        """Return what pieces of a batch add to its mean residual at each of `loss_ranks`."""
        total_R = torch.zeros(len(self.loss_ranks), device=next(self.parameters()).device)
        for piece, share in zip(pieces, shares, strict=True):
            self.condensed_loss(*piece())
            if self._seen_R is not None:
                total_R += self._seen_R * share
        return total_R

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
            return self.default_rank
        if not 1 <= rank <= self.rank:
            raise InputError(f"rank {rank}: this {self.family} model was made for ranks 1 to {self.rank}")
        return rank
