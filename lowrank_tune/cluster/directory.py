"""A study's folder: what is written at its start, and what a later process reads back to go on with it."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowrank_tune.caches.places import results_place
from lowrank_tune.errors import InputError
from lowrank_tune.spec.loading import load_study
from lowrank_tune.spec.plan import Plan, extend_plan, make_plan, plan_summary
from lowrank_tune.spec.rendering import render_study
from lowrank_tune.spec.schema import StudySpec

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a study comes from.

    Attributes:
        parent: the study that it is a clone of; empty for one of its own.
        difference: by key of the study file, what the parent had and what this one has.
    """

    parent: str = ""
    difference: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


def results_directory(results: str | Path | None) -> Path:
    """The results directory, made when missing.

    Args:
        results: a path; `LOWRANK_TUNE_RESULTS`, else `./results`, when None.

    Raises:
        InputError: it cannot be made or written to.
    """
    path = results_path(results)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"results directory {path}: cannot write to it ({error.strerror}); "
            "pass --results DIR or set LOWRANK_TUNE_RESULTS"
        ) from None
    return path


def results_path(results: str | Path | None) -> Path:
    """Where the results directory is, whether or not this machine sees it.

    Args:
        results: as for `results_directory`.

    Raises:
        InputError: it is no path.
    """
    name = results_place(results)
    if "://" in name:
        raise InputError(
            f"results directory {name}: only local and mounted paths can be used; mount it, or pass --results DIR"
        )
    return Path(os.path.abspath(Path(name).expanduser()))


def check_id(name: str) -> str:
    """Return a study's id, or the beginning of one.

    Raises:
        InputError: it could not be one; nothing outside the results directory is ever looked at.
    """
    if not _ID.fullmatch(name):
        raise InputError(
            f"study {name!r}: no study's id, which has letters, digits, `-` and `_`; see `lowrank-tune list`"
        )
    return name


def find_study(results: Path, name: str) -> Path:
    """The folder of the one study whose id is, or begins with, `name`.

    Raises:
        InputError: there is none, or several.
    """
    check_id(name)
    root = results / "studies"
    known = sorted(path.parent.name for path in root.glob("*/plan.json"))
    found = [name] if name in known else [study_id for study_id in known if study_id.startswith(name)]
    if len(found) != 1:
        shown = ", ".join(found or known[-10:]) or "none"
        what = "several begin so" if found else f"not in {results} (--results names another)"
        raise InputError(f"study {name}: {what}; studies: {shown}")
    return root / found[0]


def create_study(plan: Plan, given: str, overrides: Sequence[str], lineage: Lineage) -> None:
    """Make a study's folder with what it was given.

    Args:
        plan: the study.
        given: the study file's text.
        overrides: what was laid over it.
        lineage: where it comes from.

    Raises:
        InputError: there is a study of this id already.
    """
    directory = plan.study_dir
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        raise InputError(
            f"study {plan.study_id}: {directory} is there already; go on with it by `resume`, or begin again, which "
            "draws another id"
        ) from None
    (directory / "study.yaml").write_text(given, encoding="utf-8")
    record: dict[str, Any] = {"overrides": list(overrides), "parent": lineage.parent, "extensions": []}
    if lineage.parent:
        record["difference"] = {key: list(values) for key, values in lineage.difference.items()}
    _write_plan(plan, record)


def read_plan(directory: Path) -> Plan:
    """The plan of a study that has begun, extensions included.

    Raises:
        InputError: its files cannot be read.
    """
    record = _record(directory)
    spec = load_study(directory / "study.resolved.yaml")
    plan = make_plan(spec, directory.parent.parent, datetime.fromisoformat(record["started"]))
    return replace(
        plan,
        study_id=directory.name,
        study_dir=directory,
        spec_hash=record["spec_hash"],
        n_trials=record["n_trials"],
        grid=tuple(record["grid"]),
    )


def extended_plan(plan: Plan, trials: int, overrides: Sequence[str]) -> Plan:
    """A study with more trials; nothing is written.

    Args:
        plan: the study as it is.
        trials: how many to add, for random and tpe.
        overrides: `key.path=value` texts laid over its file.

    Raises:
        InputError: nothing would be added, or trials would not be comparable any more.
    """
    wanted = [*overrides, *([f"search.trials={plan.n_trials + trials}"] if trials else [])]
    return extend_plan(plan, load_study(plan.study_dir / "study.resolved.yaml", wanted))


def record_extension(before: Plan, after: Plan, overrides: Sequence[str]) -> None:
    """Write down that trials were added to a study, and which."""
    record = _record(after.study_dir)
    extension = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "trials_before": before.n_trials,
        "trials": after.n_trials,
        "overrides": list(overrides),
    }
    kept: dict[str, Any] = {key: record[key] for key in ("overrides", "parent", "difference") if key in record}
    _write_plan(after, {**kept, "extensions": [*record["extensions"], extension]})


def spec_difference(old: StudySpec, new: StudySpec) -> dict[str, tuple[Any, Any]]:
    """By key, what two studies have where they differ."""
    before, after = (dict(_leaves(spec.model_dump(mode="json"))) for spec in (old, new))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return {key: (before.get(key), after.get(key)) for key in keys}


def lineage_of(directory: Path) -> dict[str, Any]:
    """A study's `parent` and `extensions`, as its plan.json holds them."""
    record = _record(directory)
    return {"parent": record.get("parent", ""), "extensions": record.get("extensions", [])}


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}.{key}" if path else key)]


def _write_plan(plan: Plan, record: Mapping[str, Any]) -> None:
    _write(plan.study_dir / "study.resolved.yaml", render_study(plan.spec))
    _write(plan.study_dir / "plan.json", json.dumps({**plan_summary(plan), **record}, indent=2))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _record(directory: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"study {directory.name}: {directory / 'plan.json'} cannot be read ({error})") from None
    return record
