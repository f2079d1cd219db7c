"""What a study will do, worked out by pure functions from its file alone."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowrank_tune.config.axes import combinations, whole_values
from lowrank_tune.config.points import SHARED_PARAMS, count_points, grid_points, nearest_point
from lowrank_tune.config.schema import SplitSpec, StudySpec
from lowrank_tune.config.search import DEFAULT_TRIALS, given_points
from lowrank_tune.errors import InputError
from lowrank_tune.records import Split, TrialConfig

_BYTES_PER_ELEMENT = {"float16": 2, "bfloat16": 2, "float32": 4}
_EXTENSIBLE = {"search", "resources", "report", "tracking", "keep", "notify"}
_ID_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
# 20 bits of time in steps of 512 s last until 2043; the 12 bits left tell apart what starts within one step.
_ID_STEP_S = 512


@dataclass(frozen=True, slots=True)
class Plan:
    """A study about to start; for method grid, `grid` is every combination in the order of `grid_points`.

    `first` holds what the study file itself gives; of another study, `checks.first_points` knows the points.
    """

    spec: StudySpec  # the study file, every default filled in
    study_id: str  # `<name>-<8 hex>`, see `make_study_id`
    spec_hash: str  # identity of the resolved study file whatever its start, 16 hex digits
    results: Path  # the results directory
    study_dir: Path  # `results/studies/<study_id>`
    features_root: Path  # `results/features`, which studies share
    n_trials: int  # how many trials are tried at most
    grid: tuple[dict[str, Any], ...]
    first: tuple[dict[str, Any], ...]  # points that are known to be good, to be tried first
    started: datetime  # in UTC


def make_plan(spec: StudySpec, results: Path, started: datetime) -> Plan:
    """Work out a study; its start makes the id unique."""
    started = started.astimezone(UTC)
    identity = spec_hash(spec)
    study_id = make_study_id(spec.name, identity, started)
    grid = tuple(grid_points(spec.search.space)) if spec.search.method == "grid" else ()
    return Plan(
        spec=spec,
        study_id=study_id,
        spec_hash=identity,
        results=results,
        study_dir=results / "studies" / study_id,
        features_root=results / "features",
        n_trials=int(min(len(grid) or spec.search.trials or DEFAULT_TRIALS, count_points(spec.search.space))),
        grid=grid,
        first=given_points(spec.search),
        started=started,
    )


def extend_plan(plan: Plan, spec: StudySpec) -> Plan:
    """The same study with more trials, by a larger `search.trials` or another `search.space`.

    Raises:
        InputError: nothing is added, or what changes would make old and new trials incomparable.
    """
    changed = [key for key in type(spec).model_fields if getattr(spec, key) != getattr(plan.spec, key)]
    fixed = [key for key in changed if key not in _EXTENSIBLE]
    if spec.search.method != plan.spec.search.method:
        fixed.append("search.method")
    if fixed:
        raise InputError(
            f"{', '.join(fixed)}: an extension keeps it, for its trials are compared with those that there are; "
            "`lowrank-tune clone` makes a new study of this one"
        )
    grid = plan.grid
    if spec.search.method == "grid":
        grid += tuple(point for point in grid_points(spec.search.space) if point not in plan.grid)
    # No configuration is trained twice: a space that stays as it was has no more trials than points.
    most = count_points(spec.search.space) + (spec.search.space != plan.spec.search.space) * plan.n_trials
    n_trials = int(min(len(grid) or spec.search.trials or DEFAULT_TRIALS, most))
    # What ended a search early may be lifted, too.
    if n_trials < plan.n_trials or (n_trials == plan.n_trials and spec.search.stop == plan.spec.search.stop):
        more = "a wider search.space" if grid or n_trials == most else "--trials"
        raise InputError(f"study {plan.study_id}: nothing to add to its {plan.n_trials} trials; give {more}")
    same = (spec.search.space, spec.search.first) == (plan.spec.search.space, plan.spec.search.first)
    first = plan.first if same else given_points(spec.search)
    return replace(plan, spec=spec, grid=grid, first=first, n_trials=n_trials)


def spec_hash(spec: StudySpec) -> str:
    """The identity of a study's content, however its file was written: 16 hex digits."""
    return _digest(json.dumps(spec.model_dump(mode="json"), sort_keys=True))[:16]


def make_study_id(name: str, identity: str, started: datetime) -> str:
    """Name one start of a study: `<name>-<8 hex>`.

    The first five digits count steps of 512 s since 2026, so that lists of one name sort by time; the last three are a
    hash of the spec and of the start's microsecond: within one step one pair in 4096 is equal, and planned again.
    """
    step = int((started - _ID_EPOCH).total_seconds()) // _ID_STEP_S
    return f"{name}-{step % 16**5:05x}{_digest(f'{identity}:{started.isoformat()}')[:3]}"


def search_groups(spec: StudySpec) -> list[dict[str, Any]]:
    """What is the same for all trials of each group that is searched for itself: `{"family": …, "rank": …}` or less."""
    within = spec.scheduler.compete_within if spec.search.deal == "evenly" else ()
    groups: list[dict[str, Any]] = []
    for family in spec.search.space.families.chosen():
        axis = spec.search.space.axes(family)["rank"]
        # A range has no group for each of its ranks.
        ranks = axis if isinstance(axis, tuple) and "rank" in within else ()
        own = {"family": family} if "family" in within else {}
        groups += [own | {"rank": rank} for rank in ranks] or [own]
    return [group for place, group in enumerate(groups) if group not in groups[:place]]


def search_bounds(plan: Plan) -> list[str]:
    """What ends a study's search, whichever comes first."""
    stop, wanted = plan.spec.search.stop, plan.spec.search.trials or plan.n_trials
    whole = f", all points of its space, of {wanted} that it may try" if plan.n_trials < wanted else ""
    bounds = [f"{plan.n_trials} trials{whole}"]
    if stop.hours is not None:
        bounds.append(f"{stop.hours:g} hours of training them")
    if stop.target is not None:
        bounds.append(f"every rank at {plan.spec.steered_by} {stop.target:g}")
    if stop.no_gain is not None:
        bounds.append(f"{stop.no_gain.trials} trials of a group in a row without a gain of {100 * stop.no_gain.by:g} %")
    if stop.alike_failures is not None:
        bounds.append(f"{stop.alike_failures} trials in a row that fail alike")
    return bounds


def default_points(spec: StudySpec) -> list[list[dict[str, Any]]]:
    """By group, as in `search_groups`, the published defaults of each family that belongs to it, put into the space."""
    space = spec.search.space
    return [
        [
            nearest_point(space, family, fixed=group)
            for family in space.families.chosen()
            if group.get("family", family) == family
        ]
        for group in search_groups(spec)
    ]


def max_rank(spec: StudySpec) -> int:
    return max(whole_values(spec.search.space.rank))


def trial_config(plan: Plan, number: int, params: Mapping[str, Any]) -> TrialConfig:
    """What the trial at this position of the search, from 0, trains at a point as in `Plan.grid`."""
    family, rank = str(params["family"]), int(params["rank"])
    return TrialConfig(
        trial_id=f"r{rank:03d}-{family}-{number:04d}",
        number=number,
        # One family's trials of a rank start alike, so that the search cannot pick a lucky start.
        seed=int(_digest(f"{plan.spec.seed}:start:{family}:{rank}")[:8], 16),
        family=family,
        rank=rank,
        lr=float(params["lr"]),
        weight_decay=float(params["weight_decay"]),
        batch_size=int(params["batch_size"]),
        epochs=plan.spec.training.epochs,
        patience=plan.spec.training.patience,
        family_params={name: value for name, value in params.items() if name not in SHARED_PARAMS},
        nested_ranks=plan.spec.search.space.nested_ranks,
        objective=plan.spec.steered_by,
        target_error=plan.spec.target_error,
        require=plan.spec.search.require.limits(),
    )


def confirmation_config(plan: Plan, config: TrialConfig, repeat: int) -> TrialConfig:
    """A trial's configuration with a fresh seed, to see how much of its figures was luck; repetitions count from 1."""
    return replace(
        config,
        trial_id=f"{config.trial_id}-s{repeat}",
        seed=int(_digest(f"{plan.spec.seed}:trial:{config.number}:repeat:{repeat}")[:8], 16),
        confirms=config.trial_id,
        origin="",
    )


def split_images(groups: Sequence[str], split: SplitSpec, seed: int) -> Split:
    """Divide images by a hash of what they belong to, so that adding images moves few of the others.

    Images with equal names stay together; by its key an image stands alone. In order of `sha256("<seed>:<name>")` the
    first groups test, the last ones validate, until there are enough: what stops testing goes on to train, never to
    validate. An InputError where none would be left to train.
    """
    n_validation, n_test = split.counts(len(groups))
    members: dict[str, list[int]] = {}
    for index, name in enumerate(groups):
        members.setdefault(name, []).append(index)
    order = deque(sorted(members, key=lambda name: _digest(f"{seed}:{name}")))
    test: list[int] = []
    validation: list[int] = []
    while order and len(test) < n_test:
        test += members[order.popleft()]
    while order and len(validation) < n_validation:
        validation += members[order.pop()]
    train = [index for name in order for index in members[name]]
    if not train:
        of, more = f"{len(groups)}", "give more images"
        if len(members) < len(groups):
            many = "s" * (len(members) > 1)
            of, more = f"{of} images, kept together in {len(members)} group{many},", "group by a column of more values"
        raise InputError(
            f"split: {n_validation} images to validate and {n_test} to test leave none of {of} to train; "
            f"lower split.validation or split.test, or {more}"
        )
    return Split(train=tuple(sorted(train)), validation=tuple(sorted(validation)), test=tuple(sorted(test)))


def plan_cost(plan: Plan) -> dict[str, Any]:
    """What a study costs at most, as far as it is known before its images are seen.

    `max_epochs` are those of all trials when none is stopped early, `confirmations` the trainings that repeat the best
    of each rank, `combinations` the points of each family's space, None where a range makes them endless.
    """
    space = plan.spec.search.space
    axes = {family: space.axes(family) for family in space.families.chosen()}
    ranks = combinations([next(iter(axes.values()))["rank"]]) or plan.n_trials
    return {
        "n_trials": plan.n_trials,
        "max_epochs": plan.n_trials * plan.spec.training.epochs,
        "confirmations": min(ranks, plan.n_trials) * plan.spec.report.confirm_seeds,
        "combinations": {family: combinations(own.values()) for family, own in axes.items()},
    }


def cache_bytes(n_images: int, tokens: int, dim: int, dtype: str) -> int:
    """How many bytes of values the features of images [tokens, dim] take in a cache."""
    return n_images * tokens * dim * _BYTES_PER_ELEMENT[dtype]


def plan_summary(plan: Plan) -> dict[str, Any]:
    """What `plan.json` and `plan --json` show."""
    return {
        "study_id": plan.study_id,
        "name": plan.spec.name,
        "spec_hash": plan.spec_hash,
        "started": plan.started.isoformat(),
        "study_dir": str(plan.study_dir),
        "features_root": str(plan.features_root),
        "method": plan.spec.search.method,
        "objective": plan.spec.objective,
        "target_error": plan.spec.target_error,
        **plan_cost(plan),
        "grid": list(plan.grid),
        "first": list(plan.first),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
