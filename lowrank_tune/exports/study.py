"""A trained decomposer leaves its study: a folder in the hub's own form, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from lowrank_tune.errors import InputError
from lowrank_tune.exports.card import model_card
from lowrank_tune.features.durable import write_directory_once
from lowrank_tune.finished import PastStudy, comparison_of, open_study
from lowrank_tune.lowrank.exported import CONFIG, WEIGHTS, ExportedModel, exported_files, read_exported
from lowrank_tune.records import Comparison, ComparisonRow
from lowrank_tune.report.verdict import verdicts

CARD = "README.md"


def export_study(
    name: str, directory: str | Path, *, rank: int | None = None, results: str | Path | None = None
) -> ExportedModel:
    """Write the best model of a rank to a folder that needs nothing of its study.

    The best is the trained model with the lowest mean ρ on the test split, the one that MLflow holds for that rank.

    Args:
        name: the study's id, or the beginning of it.
        directory: where to; a new folder, an empty one, or an earlier export, which is replaced.
        rank: R; may be left out where the study has one.
        results: the results directory; `LOWRANK_TUNE_RESULTS`, else `./results`, when None.

    Returns:
        What was written.

    Raises:
        InputError: there is no such study or rank, it has not finished, its model is missing, or the folder holds
            something else.
    """
    target = _target(directory)
    study = open_study(results, name)
    if study.state != "finished":
        raise InputError(
            f"study {study.directory.name}: it is {study.state}, and only finished studies are exported; go on with it "
            "by `lowrank-tune resume`"
        )
    comparison = comparison_of(study)
    row = _choose(study, comparison, rank)
    _write(target, _files(study, comparison, row))
    return read_exported(target)


def _choose(study: PastStudy, comparison: Comparison, rank: int | None) -> ComparisonRow:
    best = {row.rank: row for row in comparison.best_of_each_rank()}
    known = ", ".join(map(str, best)) or "none"
    if rank is None:
        if len(best) == 1:
            return next(iter(best.values()))
        raise InputError(f"study {study.directory.name}: it has models of ranks {known}; choose one with --rank")
    if rank not in best:
        raise InputError(f"study {study.directory.name}: rank {rank} has no trained model; those that have: {known}")
    return best[rank]


def _files(study: PastStudy, comparison: Comparison, row: ComparisonRow) -> dict[str, bytes]:
    outcome = next((trial for trial in study.outcomes if trial.config.trial_id == row.trial_id), None)
    if outcome is None:
        raise InputError(
            f"study {study.directory.name}: trial {row.trial_id} is compared, but its folder is gone; compare again "
            f"with `lowrank-tune compare {study.directory.name} --again`"
        )
    files = exported_files(
        Path(outcome.directory) / "best_model.safetensors",
        row.rank,
        study.directory.name,
        outcome.config,
        study.features,
    )
    verdict = next(verdict for verdict in verdicts(comparison) if verdict.rank == row.rank)
    model_name = f"{study.directory.name}-r{row.rank:03d}"
    card = model_card(
        model_name, json.loads(files[CONFIG]), study.features, verdict, comparison.device, comparison.remarks
    )
    return {**files, CARD: card.encode()}


def _target(directory: str | Path) -> Path:
    if "://" in str(directory):
        raise InputError(f"{directory}: only local and mounted paths are written to; export there, then upload it")
    target = Path(os.path.realpath(Path(directory).expanduser()))
    if not target.exists():
        return target
    if not target.is_dir():
        raise InputError(f"{target}: is a file; name a folder")
    names = {path.name for path in target.iterdir()}
    if names and not names <= {CONFIG, WEIGHTS, CARD}:
        others = sorted(names - {CONFIG, WEIGHTS, CARD})
        raise InputError(
            f"{target}: holds something else ({', '.join(others[:3])}), and is left alone; name a new folder"
        )
    if names:
        try:
            read_exported(target)
        except InputError as error:
            raise InputError(f"{target}: is no export of this program, and is left alone ({error})") from error
    return target


def _write(target: Path, files: Mapping[str, bytes]) -> None:
    """Give the folder its files in one step, or leave what is there."""
    if target.is_dir() and all(_holds(target / name, data) for name, data in files.items()):
        return
    mark = uuid.uuid4().hex
    fresh, old = (target.with_name(f".{what}-{mark}-{target.name}") for what in ("new", "removed"))
    try:
        write_directory_once(fresh, files)
        # The name is free for a moment: a reader finds the old model, none, or the new one, and never a mixture.
        if target.is_dir():
            os.rename(target, old)
        os.rename(fresh, target)
    except OSError as error:
        if old.is_dir() and not target.exists():
            os.rename(old, target)
        raise InputError(f"{target}: cannot be written ({error.strerror or error}); choose another folder") from error
    finally:
        for remains in (fresh, old):
            shutil.rmtree(remains, ignore_errors=True)


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data
