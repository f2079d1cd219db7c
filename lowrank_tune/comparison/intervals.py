"""Confidence intervals of means over images that may belong together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import betaincinv, stdtrit

from lowrank_tune.comparison.choice import Kind

CONFIDENCE = 0.95
"""Of every interval."""


def interval(
    table: pd.DataFrame, column: str, kinds: Sequence[str] = ("method", "rank")
) -> tuple[pd.Series, pd.Series]:
    """The mean of a column at each of `kinds`, and half of its confidence interval, NaN where there is one group.

    Images of a group are not independent, but groups are: the standard error is of the groups' sums of deviations
    (Liang & Zeger, 1986), with Student's t of one degree of freedom less than groups. Of single images it is the usual.
    """
    each = table.groupby([*kinds], sort=False)[column]
    sums = table.assign(off=table[column] - each.transform("mean")).groupby([*kinds, "group"], sort=False)["off"].sum()
    by_kind = sums.pow(2).groupby(level=[*kinds], sort=False)
    groups = by_kind.size()
    error = np.sqrt(by_kind.sum() * groups / (groups - 1).where(groups > 1)) / each.size()
    return each.mean(), error * stdtrit((groups - 1).clip(lower=1), (1 + CONFIDENCE) / 2)


def proportion(table: pd.DataFrame, column: str, kinds: Sequence[str]) -> tuple[pd.Series, pd.Series, pd.Series]:
    """The mean of a column of zeros and ones at each of `kinds`, and the ends of its interval, NaN as `interval`.

    Clopper & Pearson's of as many independent ones as would vary alike (Korn & Graubard, 1998): where none or all are
    ones, as many as groups, for nothing varies and yet a next one may.
    """
    mean, half = interval(table, column, kinds)
    each = table.groupby([*kinds], sort=False)
    count, groups = each.size(), each["group"].nunique()
    varied = mean * (1 - mean) * (stdtrit((count - 1).clip(lower=1), (1 + CONFIDENCE) / 2) / half) ** 2
    own = varied.where((half > 0) & varied.notna(), groups).clip(upper=count)
    ones, tail = mean * own, (1 - CONFIDENCE) / 2
    low = pd.Series(betaincinv(ones, own - ones + 1, tail), mean.index).where(ones > 0, 0.0)
    high = pd.Series(betaincinv(ones + 1, own - ones, 1 - tail), mean.index).where(ones < own, 1.0)
    return mean, low.where(groups > 1), high.where(groups > 1)


def paired(
    per_image: pd.DataFrame, kind: Kind, other: Kind, ratio: str = "residual_ratio"
) -> tuple[float, float, float]:
    """The mean difference of log ρ on the same image, `kind` less `other`, and the ends of its interval."""
    own, theirs = (
        per_image[(per_image["method"] == name) & (per_image["rank"] == rank)].set_index("index")
        for name, rank in (kind, other)
    )
    log = np.log(own[ratio]) - np.log(theirs[ratio])
    mean, half = (float(part.iloc[0]) for part in interval(own.assign(log=log), "log"))
    return mean, mean - half, mean + half
