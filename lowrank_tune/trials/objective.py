"""What a study steers by, and which way is better."""

from __future__ import annotations

from typing import Literal

Direction = Literal["minimize", "maximize"]

DIRECTIONS: dict[str, Direction] = {
    "val_residual_ratio": "minimize",
    "val_mse": "minimize",
    "val_token_cosine": "maximize",
}
"""The direction of every `objective` that a study file may name."""
