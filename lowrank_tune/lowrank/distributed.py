"""The processes that train one decomposer together, data parallel over torch.distributed's default group.

NCCL between GPUs, Gloo for all that lies on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class World:
    """One worker's view of the processes that train together; all make the same calls in the same order.

    An error on one is raised there alone: the others wait until whoever started them ends them.
    """

    rank: int = 0
    """This worker's number, from 0; the first one keeps the trial's files."""
    size: int = 1

    @classmethod
    def here(cls) -> World:
        """All in torch.distributed's process group; without one this process alone."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def first(self) -> bool:
        """Whether this worker keeps the trial's files."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` things are this worker's, perhaps none."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum(self, x: Tensor) -> Tensor:
        """Add up a tensor over the workers, in place, to the same bits on each.

        Raises:
            ConnectionError: another worker has ended.
        """
        if self.size > 1:
            with self._exchange():
                dist.all_reduce(x.view(torch.uint8) if x.dtype == torch.bool else x)
        return x

    def of_first(self, value: Any) -> Any:
        """Return the first worker's picklable value on all of them; errors as `sum`."""
        box = [value]
        if self.size > 1:
            with self._exchange():
                dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ConnectionError(f"worker {self.rank + 1} of {self.size} has lost the others: {error}") from error


ALONE = World()
