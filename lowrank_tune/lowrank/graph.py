"""A decomposer as a graph that torch alone can run: neither this package nor a pickle is needed to load it.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank_tune.lowrank.decomposers import Decomposer


def write_graph(model: Decomposer, path: Path) -> None:
    """Trace a decomposer, at its default rank and for any number of images, into a file of torch's own.

    Args:
        model: on the device where the graph shall run.
        path: the file; loaded, it maps [N, T, D] to the pair (A, B).
    """
    device = next(iter(model.state_dict().values())).device
    # From random numbers: of a graph's own tensors none may come from an example's zeros. torch keeps a size of 1.
    x_NTD = torch.randn(2, model.tokens, model.dim, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        traced = torch.export.export(_Pair(model), (x_NTD,), dynamic_shapes=[{0: torch.export.Dim.AUTO}])
    torch.export.save(traced, path)


class _Pair(nn.Module):
    """A decomposer whose result is a plain pair: a named one could be read back only where its class is known."""

    def __init__(self, model: Decomposer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_NTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return A [N, T, R] and B [N, R, D]."""
        a_NTR, b_NRD = self.model(x_NTD)
        return a_NTR, b_NRD
