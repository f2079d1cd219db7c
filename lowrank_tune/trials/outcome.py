"""How a trial ended, read off its last epoch: the one place where the searcher, the tracker and the report agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_tune.records import StoppedBy, TrialConfig, TrialOutcome, TrialStatus

_BEST = ("val_mse", "val_token_cosine", "val_residual_ratio")
_STATUS: dict[StoppedBy, TrialStatus] = {
    "budget": "finished",
    "patience": "finished",
    "asha": "pruned",
    "error": "failed",
}


def stopped_by(last: Mapping[str, Any]) -> StoppedBy:
    """What ended a trial whose last epoch was `last`: what the trainer says, else the scheduler."""
    said = last.get("stopped_by", "")
    return next((word for word in _STATUS if word == said), "asha")


def outcome_of(
    config: TrialConfig, last: Mapping[str, Any], directory: Path, seconds: float, crash: str = ""
) -> TrialOutcome:
    """Say how a trial ended.

    Args:
        config: what was tried.
        last: the last epoch's figures as `Trainer.step` gives them, with `stopped_by` and `reason`; empty when there
            was none.
        directory: where its model lies.
        seconds: wall time of its training.
        crash: why it died without saying so itself; empty when it did not.
    """
    ended: StoppedBy = "error" if crash else stopped_by(last)
    best_epoch = int(last.get("best_epoch", 0))
    best = {name: float(last.get(f"best_{name}", math.nan)) for name in _BEST} if best_epoch else {}
    return TrialOutcome(
        config=config,
        status=_STATUS[ended],
        stopped_by=ended,
        epochs=int(last.get("epoch", 0)),
        best_epoch=best_epoch,
        best={name: value for name, value in best.items() if math.isfinite(value)},
        directory=str(directory),
        seconds=seconds,
        reason=crash or str(last.get("reason", "")),
    )
