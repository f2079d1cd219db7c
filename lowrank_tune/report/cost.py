"""What a study cost: read from its outcomes and from the files that it left."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from lowrank_tune.records import FeatureSet, TrialOutcome
from lowrank_tune.report.words import STOPPED, count, duration_text


def study_cost(
    directory: Path, features: FeatureSet, outcomes: Sequence[TrialOutcome], confirmations: Sequence[TrialOutcome]
) -> list[tuple[str, str]]:
    """List what a study took, as names and texts.

    Args:
        directory: the study's; its `status.json` tells when it started.
        features: the study's.
        outcomes: every trial.
        confirmations: the repetitions of the best.
    """
    ends: Counter[str] = Counter(outcome.stopped_by for outcome in outcomes)
    told = ", ".join(f"{ends[stop]} {words}" for stop, words in STOPPED.items() if ends[stop])
    shards = {row.shard for row in features.rows}
    lines = [
        ("Trials", f"{len(outcomes)}: {told}" if outcomes else "0"),
        ("Epochs", _epochs(outcomes)),
        ("Training time of the trials", duration_text(sum(outcome.seconds for outcome in outcomes))),
    ]
    if confirmations:
        again = duration_text(sum(outcome.seconds for outcome in confirmations))
        epochs = count(sum(outcome.epochs for outcome in confirmations), "epoch")
        lines.append(("Trained again with fresh seeds", f"{len(confirmations)}, {epochs}, {again}"))
    lines += [
        ("Start to end", _wall(directory)),
        (
            "Feature cache",
            f"{bytes_text(_size(Path(features.directory) / 'shards' / name for name in shards))} for "
            f"{count(len(features.rows), 'image')}; other studies with these features share it",
        ),
        ("Trained models", bytes_text(_size((directory / "trials").glob("*/best_model.safetensors")))),
    ]
    return [(name, text) for name, text in lines if text]


def bytes_text(size: int) -> str:
    """A size in the largest unit that gives three digits: `12.6 MB`."""
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _epochs(outcomes: Sequence[TrialOutcome]) -> str:
    spent, budget = sum(trial.epochs for trial in outcomes), sum(trial.config.epochs for trial in outcomes)
    saved = f" of {budget} that no early stop would have taken" if spent < budget else ""
    return f"{spent}{saved}"


def _wall(directory: Path) -> str:
    try:
        status = json.loads((directory / "status.json").read_text(encoding="utf-8"))
        started = datetime.fromisoformat(status["started"])
        ended = datetime.fromisoformat(status["ended"]) if status.get("ended") else datetime.now(UTC)
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return duration_text((ended - started).total_seconds())


def _size(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total
