"""A study's plan, read back from its own directory."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from lowrank_tune.errors import InputError
from lowrank_tune.spec.loading import load_study
from lowrank_tune.spec.plan import Plan, make_plan


def find_study(results: Path, study_id: str) -> Path:
    """The directory of a study, looked for among those that are there: an id is never part of a path.

    Args:
        results: the results directory.
        study_id: the study's id, or as much of its beginning as no other study shares.

    Raises:
        InputError: no study begins so, or several do.
    """
    directories = sorted(path.parent for path in (results / "studies").glob("*/study.resolved.yaml"))
    found = [path for path in directories if path.name == study_id]
    found = found or [path for path in directories if study_id and path.name.startswith(study_id)]
    if len(found) != 1:
        known = ", ".join(path.name for path in (found or directories)[-10:]) or "none"
        raise InputError(f"study {study_id!r}: {'several begin so' if found else 'not in ' + str(results)}; {known}")
    return found[0]


def read_plan(directory: Path) -> Plan:
    """Read back the plan that a study was started with; the results directory may have been moved since.

    Args:
        directory: `studies/<study_id>`.

    Raises:
        InputError: its files are missing or damaged.
    """
    try:
        summary = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
        started = datetime.fromisoformat(summary["started"])
        identity = str(summary["spec_hash"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{directory / 'plan.json'}: cannot be read ({error}); without it nothing is known") from error
    directory = directory.absolute()
    plan = make_plan(load_study(directory / "study.resolved.yaml"), directory.parent.parent, started)
    # The hash of a file that an older version wrote would differ, and the study's name with it.
    return replace(plan, study_id=directory.name, spec_hash=identity, study_dir=directory)
