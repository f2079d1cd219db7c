"""Studies that no process works on: MLflow is healed from their files, and what nobody needs any more is removed.

A study is removed in steps, so that a removal which is killed is taken up by the next one: its folder loses its name,
which makes it no study any more; MLflow is told; the folder loses that name, too, and its files go.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from lowrank_tune.cluster.study_dir import (
    check_id,
    claimed,
    find_study,
    read_plan,
    read_status,
    results_path,
    study_folders,
)
from lowrank_tune.comparison.choice import ranked
from lowrank_tune.comparison.compare import read_comparison
from lowrank_tune.config.plan import Plan
from lowrank_tune.errors import InputError
from lowrank_tune.files import bytes_below, read_fields
from lowrank_tune.measured import Comparison
from lowrank_tune.notes import add_note, read_notes
from lowrank_tune.records import BEST_MODEL
from lowrank_tune.tracking.reconcile import reconcile, report_notes
from lowrank_tune.tracking.removal import reach_for_removal, remove_tracked
from lowrank_tune.trials.outcomes import CHECKPOINT, FEATURES, read_outcomes

_REMOVING, _REMOVED = ".removing-", ".removed-"
"""What the name of a study's folder begins with while MLflow is told, and while its files go."""
_LOCK = ".removing.lock"
_LARGE = (BEST_MODEL, CHECKPOINT, "loss_curves.png")
"""What `keep` takes from a trial's folder: its configuration, epochs and outcome are small, and needed to go on."""


@dataclass(frozen=True, slots=True)
class Removal:
    """What a study's removal freed, and what of it stays."""

    study_id: str
    bytes: int  # of its folder, and of what MLflow kept of it beside the results
    runs: int  # of MLflow that are deleted; as in MLflow's pages they can be restored, without their files
    features: str  # the name of the cache that it used, which stays: others may use it
    registered: tuple[str, ...]  # versions of registered models, `NAME 3`, which stay
    left: tuple[str, ...]  # addresses of files of MLflow's that stay


def remove_studies(names: Sequence[str], results: str | Path | None = None) -> list[Removal]:
    """Remove studies, folder and MLflow's runs, and complete what earlier removals left; nothing else is touched.

    Raises:
        InputError: one of them is not there, or a process works on it; none is removed.
        TrackingError: MLflow does not answer; removals that have begun are completed by the next one.
    """
    home, plans = results_path(results), dict[Path, Plan]()
    with ExitStack() as claims:
        for name in names:
            if _begun(home, name):
                continue
            directory = find_study(home, name)
            if directory not in plans:
                claims.enter_context(claimed(directory))
                plans[directory] = read_plan(directory)
        for plan in plans.values():
            reach_for_removal(plan)
        for directory in plans:
            directory.rename(directory.with_name(f"{_REMOVING}{directory.name}"))
    return complete_removals(home)


def complete_removals(home: Path) -> list[Removal]:
    """Go on with every removal that has begun in a results directory."""
    studies, done = home / "studies", list[Removal]()
    if not any(studies.glob(".remov*-*")):
        return done
    with FileLock(studies / _LOCK):
        for doomed in sorted(studies.glob(f"{_REMOVING}*")):
            study_id = doomed.name.removeprefix(_REMOVING)
            tracked = remove_tracked(replace(read_plan(doomed), study_id=study_id))
            features = str(read_fields(doomed / "tune" / FEATURES).get("fingerprint", ""))
            freed = tracked.bytes + bytes_below(doomed)
            doomed.rename(studies / f"{_REMOVED}{study_id}")
            done.append(Removal(study_id, freed, tracked.runs, features, tracked.registered, tracked.left))
        for remains in studies.glob(f"{_REMOVED}*"):
            shutil.rmtree(remains, ignore_errors=True)
            if remains.exists():
                raise InputError(f"{remains}: is no study any more, but not all its files could be removed; remove it")
    return done


def reconcile_study(study_id: str, results: str | Path | None = None) -> dict[str, Any]:
    """Make MLflow hold what a study's files hold; returns `study_id` and what was repaired, fit for JSON.

    Removals that were cut off are completed, and what `keep` does not keep goes.
    """
    home = results_path(results)
    begun = _begun(home, study_id)
    removed = [removal.study_id for removal in complete_removals(home)]
    if begun:
        return {"study_id": begun, "studies_removed": removed or [begun]}
    directory = find_study(home, study_id)
    plan = read_plan(directory)
    with claimed(directory):
        repairs = repair_tracking(plan)
        comparison = read_comparison(directory, plan.spec.steered_by)
        finished = comparison and read_status(directory, ours=True)["state"] == "finished"
        freed = free_trials(plan, comparison) if comparison and finished else 0
    return {"study_id": plan.study_id, **repairs, "bytes_freed": freed, "studies_removed": removed}


def note_study(name: str, text: str, results: str | Path | None = None) -> dict[str, Any]:
    """Write something down about a study, whatever its state; returns its `notes`, and why MLflow lacks them, if so."""
    directory = find_study(results_path(results), name)
    plan = read_plan(directory)
    add_note(directory, text)
    return {"study_id": directory.name, "notes": read_notes(directory), "untracked": report_notes(plan)}


def repair_tracking(plan: Plan) -> dict[str, Any]:
    """Make MLflow hold what the files of a claimed study hold; what was repaired."""
    return asdict(reconcile(plan, read_comparison(plan.study_dir, plan.spec.steered_by), lambda: other_studies(plan)))


def other_studies(plan: Plan) -> Iterator[tuple[Plan, Comparison | None]]:
    """The other studies of the results directory that no process works on, each claimed while it is looked at."""
    for directory in study_folders(plan.results):
        if directory != plan.study_dir:
            with suppress(InputError, KeyError, TypeError, ValueError), claimed(directory):
                other, comparison = read_plan(directory), None
                with suppress(InputError):  # its trials are told all the same
                    comparison = read_comparison(other.study_dir, other.spec.steered_by)
                yield other, comparison


def free_trials(plan: Plan, comparison: Comparison) -> int:
    """Remove the weights and pictures of all trials but those that `keep` keeps; how many bytes are free now.

    The N best of each rank stay, and whatever the comparison stands on, so that it can be made again.
    """
    if plan.spec.keep is None:
        return 0
    outcomes = read_outcomes(plan.study_dir / "trials")
    kept, count = {row.trial_id for row in comparison.rows if row.trial_id}, dict[tuple[int, ...], int]()
    for outcome in ranked((each for each in outcomes.values() if not each.config.confirms), plan.spec.steered_by):
        place = count[outcome.config.ranks] = count.get(outcome.config.ranks, 0) + 1
        kept |= {outcome.config.trial_id} if place <= plan.spec.keep.best else set()
    freed = 0
    for trial_id, outcome in outcomes.items():
        if not {trial_id, outcome.config.confirms} & kept:
            for path in (Path(outcome.directory, name) for name in _LARGE):
                freed += path.stat().st_size if path.is_file() else 0
                path.unlink(missing_ok=True)
    return freed


def _begun(home: Path, name: str) -> str:
    """The id of the study whose removal has begun that a name means, if any."""
    ids = sorted(
        path.name.removeprefix(prefix)
        for prefix in (_REMOVING, _REMOVED)
        for path in (home / "studies").glob(f"{prefix}{check_id(name)}*")
    )
    there = any(directory.name.startswith(name) for directory in study_folders(home))
    return ids[0] if len(ids) == 1 and not there else ""
