"""How MLflow loads a study's best models: named by the model's MLmodel file, read from safetensors, never unpickled.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowrank_tune.lowrank.exported import load_decomposer


class PyfuncDecomposer:
    """A trained decomposer behind MLflow's `predict`.

    Args:
        directory: an exported model, `config.json` and `model.safetensors`.
    """

    def __init__(self, directory: Path) -> None:
        self._decomposer = load_decomposer(directory)

    @torch.no_grad()
    def predict(self, x_NTD: NDArray[np.float32], params: dict[str, Any] | None = None) -> dict[str, NDArray[Any]]:
        """Decompose images.

        Args:
            x_NTD: their features, float32 [N, T, D].
            params: taken because MLflow passes it; there are none.

        Returns:
            `a` [N, T, R] and `b` [N, R, D], float32.
        """
        factors = self._decomposer(torch.from_numpy(np.ascontiguousarray(x_NTD, dtype=np.float32)))
        return {"a": factors.a_NTR.numpy(), "b": factors.b_NRD.numpy()}


def _load_pyfunc(data_path: str) -> PyfuncDecomposer:
    return PyfuncDecomposer(Path(data_path))
