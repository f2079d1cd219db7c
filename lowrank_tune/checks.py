"""What refuses a study before it leaves a trace."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lowrank_tune.cluster.study_dir import find_study, read_plan
from lowrank_tune.comparison.choice import ranked
from lowrank_tune.config.objective import no_ratio
from lowrank_tune.config.paths import absolute_paths
from lowrank_tune.config.plan import Plan, max_rank, split_images
from lowrank_tune.config.points import nearest_point
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.config.search import BestOfStudy
from lowrank_tune.errors import InputError
from lowrank_tune.features.asked import check_questions
from lowrank_tune.features.checkpoint import find_model, read_checkpoint_config
from lowrank_tune.features.extract import known_images, probe_shape
from lowrank_tune.features.groups import listed_groups
from lowrank_tune.features.tiny import TINY_RANDOM
from lowrank_tune.lowrank.decomposers import FAMILIES
from lowrank_tune.records import WORST_RATIO, TrialOutcome
from lowrank_tune.report.spatial import check_images
from lowrank_tune.trials.drawing import auto_sampler
from lowrank_tune.trials.outcomes import check_same_images, past_outcomes


def check_data(spec: StudySpec, *, trains: bool = True) -> None:
    """Refuse what a source's list cannot give; broken or equal images may leave too few later."""
    source = spec.features.source
    groups = listed_groups(source, spec.split.group_by)
    check_fidelity(spec)
    check_sampler(spec)
    # Only samples, and features themselves, are written into a cache.
    check_space(spec, *probe_shape(spec.features, Path(), spec.seed))
    if trains:
        split = split_images(groups, spec.split, spec.seed)
        check_images(spec.report.images, len(split.test))


def check_fidelity(spec: StudySpec) -> None:
    """Refuse questions that the source's records lack, and a local checkpoint without a language model."""
    if spec.fidelity is None:
        return
    check_questions(spec.features.source, spec.fidelity)
    config = read_checkpoint_config(spec.features.encoder.checkpoint, Path())
    if config.revision is None and config.name != TINY_RANDOM:  # what the hub has whole is not downloaded to look
        find_model(config, Path())


def check_sampler(spec: StudySpec) -> None:
    """Refuse a method whose code is not installed here."""
    if spec.search.method == "auto":
        auto_sampler()


def check_space(spec: StudySpec, tokens: int, dim: int) -> None:
    """Refuse a rank that a family has not for matrices [tokens, dim], and what needs a grid of tokens without one."""
    highest, families, least = max_rank(spec), spec.search.space.families.chosen(), min(tokens, dim)
    limits = {family: FAMILIES[family].highest_rank(tokens, dim) for family in families}
    above = [family for family, limit in limits.items() if highest > limit == least]
    if above:
        alone = "; shared alone may go on to dim" if max(limits.values()) > least else ""
        raise InputError(
            f"search.space.rank: {highest} is above min(tokens, dim) = min({tokens}, {dim}) = {least}, the rank of the "
            f"features themselves, and so of {', '.join(above)}; lower it{alone}"
        )
    if highest > max(limits.values()):
        raise InputError(
            f"search.space.rank: {highest} is above dim = {dim}, the most of {', '.join(limits)}; lower it"
        )
    if highest > least and spec.objective == "val_residual_ratio":
        raise InputError(f"objective: {no_ratio(highest, tokens, dim)}")
    if highest > least and WORST_RATIO in spec.search.require.limits():
        raise InputError(
            f"search.require.{WORST_RATIO}: ρ has no meaning at rank {highest}, for from {least} on the optimum has no "
            "error; remove it, or lower the rank"
        )
    shared = spec.search.space.families.shared
    if shared is not None and "dct" in shared.token_transform and math.isqrt(tokens) ** 2 != tokens:
        raise InputError(
            f"search.space.families.shared.token_transform: dct needs a square grid of tokens, and {tokens} are none; "
            "make it learned, which fits any order, or none"
        )


def check_begun(plan: Plan) -> None:
    """Refuse a study whose images are gone, or are not those it began with."""
    with paths_explained(plan.study_id, plan.spec):
        check_data(plan.spec)
        fingerprint, keys = known_images(plan.spec.features, plan.features_root, plan.spec.seed)
        check_same_images(plan.study_dir / "tune", fingerprint, keys)


def with_first_points(plan: Plan) -> Plan:
    """A plan that knows the points of another study which its own begins with, the best of each rank first.

    Raises:
        InputError: there is no such study, or it has no trial of a family that is searched here.
    """
    first, space = plan.spec.search.first, plan.spec.search.space
    if not isinstance(first, BestOfStudy) or plan.first:
        return plan
    try:
        directory = find_study(plan.results, first.study)
    except InputError as error:
        raise InputError(f"search.first.study: {error}") from None
    trials = [outcome for outcome in past_outcomes(directory) if not outcome.config.confirms]
    ranks = dict[tuple[int, ...], list[TrialOutcome]]()
    for outcome in ranked(trials, read_plan(directory).spec.steered_by):
        if outcome.config.family in space.families.chosen():
            ranks.setdefault(outcome.config.ranks, []).append(outcome)
    best = [own[place] for place in range(first.best) for own in ranks.values() if place < len(own)]
    points = [nearest_point(space, outcome.config.family, outcome.config.point) for outcome in best]
    if not points:
        families = ", ".join(space.families.chosen())
        raise InputError(
            f"search.first.study: study {directory.name} has no trained model of {families}; name another, or give "
            "points themselves"
        )
    return replace(plan, first=tuple(point for place, point in enumerate(points) if point not in points[:place]))


@contextmanager
def paths_explained(study_id: str, spec: StudySpec) -> Iterator[None]:
    """Say of a study file with relative paths where they are looked for."""
    try:
        yield
    except InputError as error:
        relative = ", ".join(absolute_paths(spec))
        if not relative:
            raise
        raise InputError(
            f"{error}; study {study_id} has a relative path in {relative}: go on with it from the working directory "
            "that it was started in"
        ) from error
