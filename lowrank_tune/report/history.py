"""Reading what a trial left behind: its history, epoch by epoch."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


def read_history(directory: Path) -> list[dict[str, float]]:
    """Read a trial's `history.json`.

    Args:
        directory: the trial's directory.

    Returns:
        One mapping an epoch, in order, with the finite numbers among its entries. Empty when the trial left no history
        or a damaged one: a report shows what there is.
    """
    path = directory / "history.json"
    try:
        epochs: Any = json.loads(path.read_text(encoding="utf-8"))
        return [{key: float(value) for key, value in epoch.items() if _is_number(value)} for epoch in epochs]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, TypeError) as error:
        _log.warning("%s cannot be read (%s); the report goes without this trial's curves", path, error)
        return []


def series(history: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """The epochs at which a figure is known, and its values there."""
    points = [(epoch["epoch"], epoch[name]) for epoch in history if "epoch" in epoch and name in epoch]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
