"""Where a study's shared material lies: all of it that travels to an actor."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lowrank_tune.errors import InputError
from lowrank_tune.records import FeatureSet, Split

FEATURES = "features.json"
CHECKPOINT = "checkpoint.safetensors"
"""In a trial's folder while it is not over: all that its training needs to go on."""


@dataclass(frozen=True, slots=True)
class MaterialPaths:
    """Where a study's shared material lies.

    Attributes:
        features: a FeatureSet as JSON.
        split: a Split as JSON.
        optimum: the validation split's Optimum.
    """

    features: str
    split: str
    optimum: str


def check_same_images(directory: Path, features: FeatureSet) -> None:
    """Refuse to go on with a study on other images than it began with: its trials would not be comparable.

    Args:
        directory: where `write_material` wrote; a study that has not got so far has nothing there.
        features: what the study file gives today.

    Raises:
        InputError: they are others.
    """
    path = directory / FEATURES
    if not path.exists():
        return
    before = FeatureSet.read(path)
    same = before.fingerprint == features.fingerprint
    if not same or [row.key for row in before.rows] != [row.key for row in features.rows]:
        what = "are not the same any more" if same else "are encoded otherwise now"
        raise InputError(
            f"features.source: the study began with {len(before.rows)} images, and they {what}; restore them, or run "
            "a new study with `lowrank-tune clone`"
        )


def write_material(directory: Path, features: FeatureSet, split: Split, optimum_path: Path) -> MaterialPaths:
    """Write what actors read: a reference to the features, never the features.

    Args:
        directory: where to write; made when missing.
        features: the study's features.
        split: which images train, validate and judge.
        optimum_path: the validation split's optimum, already saved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    features_path, split_path = directory / FEATURES, directory / "split.json"
    features.write(features_path)
    split_path.write_text(json.dumps(asdict(split)), encoding="utf-8")
    paths = (path.absolute() for path in (features_path, split_path, optimum_path))
    return MaterialPaths(*map(str, paths))
