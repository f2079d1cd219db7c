"""When a search begins no more trials: after its hours, at its target, for want of gain, or for failures alike.

All of that follows from the trials that have ended, in their order, and from the seconds that the search has taken: a
study that was killed and goes on decides as if nothing had been.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune import Stopper

from lowrank_tune.config.plan import Plan, search_groups
from lowrank_tune.records import StoppedFor, TrialOutcome, sign

LEAD_S = 5.0
"""How long before its hours are over a search stops: Tune gives an epoch in progress 10 s to end, and then ends it."""


@dataclass
class _Course:
    """What the trials of a group, or of the whole search, have come to."""

    best: float = math.inf  # less is better; as of the last gain
    since: int = 0  # trials that have ended since
    failure: str = ""  # how the last one failed, numbers left out
    alike: int = 0  # how many have failed so in a row

    def see(self, value: float, failure: str, by: float) -> None:
        gained = value < self.best - by * abs(self.best) if math.isfinite(self.best) else value < self.best
        self.best, self.since = (value, 0) if gained else (self.best, self.since + 1)
        self.alike = self.alike + 1 if failure and failure == self.failure else int(bool(failure))
        self.failure = failure


class SearchEnd:
    """Tells whether a search, and each of its groups, goes on; `searched_s` are its seconds so far."""

    def __init__(self, plan: Plan, ended: Iterable[TrialOutcome], searched_s: Callable[[], float]) -> None:
        self._plan = plan
        self._stop = plan.spec.search.stop
        self._searched_s = searched_s
        self._groups = search_groups(plan.spec)
        self._courses = [_Course() for _ in self._groups]
        self._whole = _Course()
        # Of a list each rank has to reach the target, whether or not it has groups of its own; of a range any.
        axis = plan.spec.search.space.rank
        self._ranks: frozenset[int | None] = frozenset(axis) if isinstance(axis, tuple) else frozenset({None})
        self._reached: set[int | None] = set()
        for outcome in ended:
            self.trial_ended(outcome)

    def trial_ended(self, outcome: TrialOutcome) -> None:
        objective, gain = self._plan.spec.steered_by, self._stop.no_gain
        value = sign(objective) * outcome.best.get(objective, math.nan)
        value = value if math.isfinite(value) and outcome.feasible and outcome.status != "failed" else math.inf
        failure = re.sub(r"\d+", "N", outcome.reason) if outcome.status == "failed" else ""
        self._whole.see(value, failure, 0.0)
        if self._stop.target is not None and value <= sign(objective) * self._stop.target:
            self._reached |= {outcome.config.rank, None} & self._ranks
        for group, course in zip(self._groups, self._courses, strict=True):
            if belongs(outcome.config.point, group):
                course.see(value, failure, gain.by if gain else 0.0)

    @property
    def at_once(self) -> StoppedFor | None:
        """Why the whole search stops, trials at work included, which keep a checkpoint."""
        searched_s = (
            self._searched_s()
        )  # asked whatever ends it: `extend` may add hours, which count from the beginning
        if self._stop.hours is not None and searched_s >= 3600 * self._stop.hours - LEAD_S:
            return "hours"
        if self._ranks <= self._reached:
            return "target"
        return "alike_failures" if self._has_failed(self._whole) else None

    def closed(self, group: Mapping[str, Any]) -> StoppedFor | None:
        """Why a group gets no more trials; those that it has at work may change that."""
        course = self._courses[self._groups.index(dict(group))]
        if group.get("rank") in self._reached:
            return "target"
        if self._stop.no_gain and course.since >= self._stop.no_gain.trials:
            return "no_gain"
        return "alike_failures" if self._has_failed(course) else None

    def why(self, stopped_for: StoppedFor, tried: int) -> str:
        """Say in a sentence why the search ended after so many trials; nothing where all had their turn."""
        if stopped_for == "trials":
            return ""
        stop, wanted = self._stop, max(self._plan.n_trials, self._plan.spec.search.trials or 0)
        # What goes on to the end has had all its points.
        reasons = Counter(self.closed(group) or "space" for group in self._groups)
        told = {
            "space": "every configuration of its space has been tried",
            "hours": f"its {stop.hours or 0:g} hours are over (search.stop.hours)",
            "target": f"{self._plan.spec.steered_by} {stop.target or 0:g} is reached (search.stop.target)",
            "no_gain": f"no more was gained by {stop.no_gain.trials if stop.no_gain else 0} trials in a row "
            "(search.stop.no_gain)",
            "alike_failures": f"{stop.alike_failures} trials in a row failed alike (search.stop.alike_failures)",
        }
        parts = [f"{number} of {len(self._groups)} groups: {told[name]}" for name, number in reasons.items()]
        said = told[stopped_for] if len(parts) < 2 or self.at_once else "; ".join(parts)
        return f"the search ended after {tried} of {wanted} trials: {said}"

    def _has_failed(self, course: _Course) -> bool:
        return self._stop.alike_failures is not None and course.alike >= self._stop.alike_failures


def belongs(point: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    return all(point[name] == value for name, value in group.items())


class StopTune(Stopper):
    """Has Tune stop every trial at work once the search stops at once; they keep what they have trained."""

    def __init__(self, end: SearchEnd) -> None:
        self._end = end

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune's copy to restore a study from is not used."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._end.at_once is not None
