"""What every trial of a study shares: the features, the split and the optimum, read once a process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lowrank_tune.caches.staging import local_copy
from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.oracle import Optimum
from lowrank_tune.records import FeatureSet, Split
from lowrank_tune.trials.paths import MaterialPaths


@dataclass(frozen=True, slots=True)
class Material:
    """The shared material, in memory or mapped into it."""

    data: FeatureMatrix
    split: Split
    optimum: Optimum


@lru_cache(maxsize=1)
def read_material(paths: MaterialPaths) -> Material:
    """Read a study's material; the same object again for every later trial of this process.

    Features that do not lie on a local disk are copied to this node by its first trial; the others wait for it.
    """
    split = json.loads(Path(paths.split).read_text(encoding="utf-8"))
    return Material(
        data=FeatureMatrix(local_copy(FeatureSet.read(Path(paths.features)))),
        split=Split(**{name: tuple(indices) for name, indices in split.items()}),
        optimum=Optimum.load(Path(paths.optimum)),
    )
