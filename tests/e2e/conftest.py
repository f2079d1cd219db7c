"""One real study, run once: photographs, the tiny tower, Ray Data, Ray Tune, Optuna and MLflow."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_tune import run_study
from lowrank_tune.study import StudyProgress, StudyResult

STUDY = """\
name: small
seed: 3
features:
  source: {samples: 30}
  encoder: {checkpoint: tiny-random, image_size: 112, compute_dtype: float32}
split: {validation: 5, test: 6}
search:
  method: grid
  space:
    rank: [2, 4]
    lr: [1e-3, 1e-2]
    batch_size: 4
    families: {direct: , sketch: }
training: {epochs: 3, patience: 2}
scheduler: {kind: asha, grace_epochs: 1, reduction_factor: 2}
resources: {max_concurrent: 1}
report: {images: [0, 5], channels: 3, confirm_seeds: 2}
"""


class Witness(StudyProgress):
    """Remembers what a study told."""

    def __init__(self) -> None:
        self.image_calls: list[tuple[int, int]] = []
        self.ended: list[str] = []
        self.ratios: list[float] = []

    def images(self, done: int, total: int) -> None:
        self.image_calls.append((done, total))

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, Any]) -> None:
        self.ratios.append(metrics["val_residual_ratio"])

    def trial_ended(self, outcome: Any) -> None:
        self.ended.append(outcome.config.trial_id)


@dataclass(frozen=True)
class Ran:
    """A finished study and what was seen of it."""

    results: Path
    study_file: Path
    result: StudyResult
    witness: Witness

    def again(self, **keywords: Any) -> StudyResult:
        return run_study(self.study_file, results=self.results, **keywords)


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Ran:
    home = tmp_path_factory.mktemp("study")
    study_file = home / "small.yaml"
    study_file.write_text(STUDY)
    witness = Witness()
    result = run_study(study_file, results=home / "results", progress=witness)
    return Ran(home / "results", study_file, result, witness)


@pytest.fixture(scope="module")
def no_report() -> Iterator[None]:
    """Studies without their report, which takes longer than a tiny study and is looked at elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank_tune.report.report.write_report", lambda *_: None)
        yield


def write_tensors(directory: Path, count: int, tokens: int = 8, dim: int = 16) -> None:
    """Ready features, `features_N.pt`."""
    directory.mkdir()
    for number in range(count):
        x_TD = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(number))
        torch.save(x_TD, directory / f"features_{number}.pt")


def older(resolved: str) -> str:
    """A study's resolved file as the versions before the redesign wrote it."""
    assert "\nresources:\n" in resolved
    return resolved.replace("\nresources:\n", "\nresources:\n  fuse: never\n")
