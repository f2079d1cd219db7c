"""Whether a study's trials gain by training as one, and in how many processes then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_tune.config.plan import Plan
from lowrank_tune.config.schema import ResourcesSpec
from lowrank_tune.records import FeatureSet

MEMBERS_ON_CPU = 8
"""Trials in a lane, at most: with 16 of them a trial was hardly faster than with 8."""
MEMBERS_ON_GPU = 16
"""Likewise, for a whole GPU; a lane on a part of one has that part of them. No measurement stands behind it."""
SMALL_IMAGE = 2**14
"""Numbers in an image up to which fusing on a CPU is worth it: at [128, 128] it was 1.4 to 1.7 times as fast, at [256,
256] as fast as not. Larger matrices keep a core busy by themselves."""
NEVER_ON_CPU = ("direct",)
"""Families whose matrices are large whatever the images are."""
_MEMBERS_SHARE = 0.1
"""The part of a lane's CPUs that is reserved by its members' actors, which need next to nothing."""


@dataclass(frozen=True, slots=True)
class LanePlan:
    """How many lanes, and how many trials in them.

    Attributes:
        lanes: processes that train.
        members: trials in one of them that train as one, at most.
        at_once: trials in all of them.
        cpus: that a lane reserves.
        share: CPUs that each member's own actor reserves.
    """

    lanes: int
    members: int
    at_once: int
    cpus: float
    share: float


def plan_lanes(resources: ResourcesSpec, fit: int) -> LanePlan:
    """Plan as many lanes as trials fit at a time without them, or fewer where these would not be half full.

    Args:
        resources: what a lane is given.
        fit: trials that fit at a time.
    """
    gpus = resources.gpus_per_trial
    members = max(2, int(MEMBERS_ON_GPU * min(1.0, gpus))) if gpus else MEMBERS_ON_CPU
    at_once = min(fit * members, resources.max_concurrent or fit * members)
    share = max(int(1e4 * _MEMBERS_SHARE * resources.cpus_per_trial / members) / 1e4, 1e-4)
    cpus = resources.cpus_per_trial * (1 - _MEMBERS_SHARE)
    return LanePlan(min(fit, -(-at_once // (members // 2))), members, at_once, cpus, share)


def fuses(plan: Plan, features: FeatureSet) -> bool:
    """Whether a study's trials train in lanes."""
    families = tuple(plan.spec.search.space.families.chosen())
    return gains_by_fusing(plan.spec.resources, families, features.tokens * features.dim)


def gains_by_fusing(resources: ResourcesSpec, families: Sequence[str], numbers: int) -> bool:
    """Whether a study's trials train in lanes.

    Args:
        resources: as the study file has them.
        families: of the search.
        numbers: in an image.
    """
    if resources.fuse != "auto" or resources.gpus_per_trial:
        return resources.fuse != "never"
    return numbers <= SMALL_IMAGE and any(family not in NEVER_ON_CPU for family in families)
