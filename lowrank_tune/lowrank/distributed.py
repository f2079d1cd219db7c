"""The processes that train one decomposer together, each on its share of every batch.

What they exchange goes through torch.distributed's default group: NCCL between GPUs, Gloo for all that lies on a CPU.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_AGREED = "met_by_all_workers"


class Team:
    """One worker's view of the processes that train together; by default it is on its own, and nothing is exchanged.

    Every worker makes the same calls in the same order. What may fail on one alone goes through `together`, so that no
    worker waits for another that has given up.

    Args:
        rank: this worker's number, from 0; the first one keeps the trial's files.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def here(cls) -> Team:
        """This process's team, of all that were brought together with `torch.distributed.init_process_group`."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def first(self) -> bool:
        """Whether this worker is the one that keeps the trial's files."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> slice:
        """Which of `count` things in order are a worker's, this one's by default; none where there are too few."""
        rank = self.rank if rank is None else rank
        return slice(rank * count // self.size, (rank + 1) * count // self.size)

    def together(self, work: Callable[[], T]) -> T:
        """Do what may fail here or on another worker, and exchanges nothing.

        Returns:
            What `work` returns, once it has succeeded on every worker.

        Raises:
            Exception: It failed; on every worker the same error, that of the first on which it did, with a note that
                names the worker.
        """
        if self.size == 1:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        failed = torch.tensor([0 if error is None else self.size - self.rank])
        with self._exchange():
            dist.all_reduce(failed, dist.ReduceOp.MAX)
        worst = int(failed)
        if worst == 0:
            return result
        agreed = self._error_of(self.size - worst, error)
        setattr(agreed, _AGREED, True)
        try:
            raise agreed
        finally:
            # By a cycle through this frame they would keep what the work that failed had allocated.
            del agreed, error

    def sum(self, x: Tensor) -> Tensor:
        """Add up a tensor over the workers, in place; on every worker it is the same to the last bit."""
        if self.size > 1:
            with self._exchange():
                dist.all_reduce(x)
        return x

    def fill(self, whole: Tensor) -> Tensor:
        """Complete a tensor of which each worker has computed its `share` of the first dimension, in place."""
        for rank in range(self.size if self.size > 1 else 0):
            part = whole[self.share(len(whole), rank)]
            if len(part):
                with self._exchange():
                    dist.broadcast(part, src=rank)
        return whole

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values that they have on the first worker."""
        for x in tensors if self.size > 1 else ():
            with self._exchange():
                dist.broadcast(x, src=0)

    def by_first(self, work: Callable[[], T]) -> T:
        """Let the first worker do something, and tell all of them what it gave; it must be possible to pickle that.

        Raises:
            Exception: It failed; on every worker.
        """
        value: T | None = self.together(work if self.first else _nothing)
        return self._told_by(0, value)

    def agrees_on(self, error: Exception) -> bool:
        """Whether all workers have met this error; otherwise the others may be waiting for this one."""
        return self.size == 1 or hasattr(error, _AGREED)

    def _told_by(self, rank: int, value: T | None) -> T:
        box: list[Any] = [value]
        if self.size == 1:
            return cast(T, value)
        with self._exchange():
            dist.broadcast_object_list(box, src=rank)
        return cast(T, box[0])

    def _error_of(self, rank: int, error: Exception | None) -> Exception:
        """Return the error that worker `rank` has met, on every worker."""
        if error is not None and rank == self.rank:
            error.add_note(f"on worker {rank + 1} of {self.size}")
            error = _portable(error)
        return self._told_by(rank, error)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ConnectionError(f"worker {self.rank + 1} of {self.size} has lost the others: {error}") from error


ALONE = Team()
"""A process that trains by itself."""


def _nothing() -> Any:
    return None


def _portable(error: Exception) -> Exception:
    """Return an error, or, where it cannot travel to another process, one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        told = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        return told
    return error
