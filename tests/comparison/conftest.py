"""A small study on disk: a cache of [16, 24] images and saved decomposers, as the other rooms leave them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowrank_tune.comparison.compare import compare
from lowrank_tune.lowrank.decomposers import make_decomposer, save_decomposer
from lowrank_tune.records import Comparison, ComparisonRow, FeatureRow, FeatureSet, Split, TrialConfig, TrialOutcome

TOKENS, DIM = 16, 24


@dataclass
class Study:
    """What `compare` needs; trials are added one by one."""

    directory: Path
    x_NTD: Tensor
    features: FeatureSet
    split: Split
    outcomes: list[TrialOutcome] = field(default_factory=list)
    confirmations: list[TrialOutcome] = field(default_factory=list)

    def add_trial(self, family: str, rank: int, *, spoil: Callable[[Path], None] | None = None, **ending: Any) -> str:
        """Save an untrained, initialised model as a trial's best one."""
        number = len(self.outcomes)
        params = {"direct": {"lambda_b": 1e-4, "lambda_ortho": 1e-3}, "refined": {"steps": 1}}.get(family, {})
        config = TrialConfig(
            f"r{rank:03d}-{family}-{number:04d}", number, number, family, rank, 1e-3, 1e-5, 4, 5, 5, params
        )
        path = self._save(config, nudge=0.0)
        if spoil:
            spoil(path)
        figures = {"val_residual_ratio": 1.1, "val_mse": 0.1, "val_token_cosine": 0.9}
        defaults = {"status": "finished", "stopped_by": "budget", "epochs": 5, "best_epoch": 4, "best": figures}
        self.outcomes.append(
            TrialOutcome(**{"config": config, "directory": str(path.parent), "seconds": 1.0, **defaults, **ending})
        )
        return config.trial_id

    def repeat(self, trial_id: str, seed: int, **ending: Any) -> TrialOutcome:
        """Save a model like a trial's, started with another seed and nudged, as a repetition's."""
        (trial,) = (outcome for outcome in self.outcomes if outcome.config.trial_id == trial_id)
        number = sum(outcome.config.confirms == trial_id for outcome in self.confirmations) + 1
        config = replace(trial.config, trial_id=f"{trial_id}-s{number}", seed=seed, confirms=trial_id)
        directory = str(self._save(config, nudge=0.05).parent)
        self.confirmations.append(replace(trial, config=config, directory=directory, **ending))
        return self.confirmations[-1]

    def _save(self, config: TrialConfig, nudge: float) -> Path:
        model, generator = make_decomposer(config, TOKENS, DIM), torch.Generator().manual_seed(config.seed)
        model.initialise([self.x_NTD[list(self.split.train)]], generator)
        with torch.no_grad():
            for weight in model.parameters():
                weight += nudge * torch.randn(weight.shape, generator=generator)
        path = self.directory / "trials" / config.trial_id / "best_model.safetensors"
        path.parent.mkdir(parents=True)
        save_decomposer(model, path)
        return path

    def compare(self, objective: str = "val_residual_ratio") -> Comparison:
        return compare(
            self.features,
            self.split,
            self.outcomes,
            objective=objective,
            seed=3,
            directory=self.directory,
            confirmations=self.confirmations,
        )

    def test_images(self) -> Tensor:
        return self.x_NTD[list(self.split.test)]


@pytest.fixture(scope="session", autouse=True)
def short_timings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank_tune.comparison.methods.SECONDS", 0.005)
        yield


def build_study(
    home: Path, x_NTD: Tensor | None = None, *, test: int = 6, dtype: torch.dtype = torch.float32, **fields: Any
) -> Study:
    """A cache of 20 images, of which 10 train and the last ones judge; no trial yet."""
    if x_NTD is None:
        x_NTD = torch.randn(20, TOKENS, DIM, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1.5, DIM)
    cache, directory = home / "cache", home / "study"
    (cache / "shards").mkdir(parents=True)
    directory.mkdir()
    rows = []
    for start in range(0, len(x_NTD), 8):
        part, name = x_NTD[start : start + 8].to(dtype), f"{start:05d}.safetensors"
        save_file({"features": part.contiguous()}, cache / "shards" / name)
        rows += [FeatureRow(f"{start + row:064x}", name, row) for row in range(len(part))]
    given = {"fingerprint": "0" * 16, "encoder": "synthetic", "weights": "pretrained", "tokens": TOKENS, "dim": DIM}
    given |= {"dtype": str(dtype).removeprefix("torch."), "records_path": str(cache / "records.parquet")}
    features = FeatureSet(**{"directory": str(cache), "rows": tuple(rows), **given, **fields})
    images = len(x_NTD)
    split = Split(tuple(range(10)), tuple(range(10, images - test)), tuple(range(images - test, images)))
    return Study(directory, x_NTD.to(dtype).float(), features, split)


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Study]:
    return lambda *args, **fields: build_study(tmp_path, *args, **fields)


def with_trials(study: Study) -> Study:
    """Two families at ranks 2 and 6."""
    for rank in (2, 6):
        study.add_trial("sketch", rank)
        study.add_trial("direct", rank)
    return study


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    return with_trials(make_study())


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Comparison]:
    """The same study with three repetitions of one trial and one of another, compared once; to be looked at only."""
    study = with_trials(build_study(tmp_path_factory.mktemp("compared")))
    for trial, seeds in (("r006-direct-0003", (11, 12, 13)), ("r002-sketch-0000", (11,))):
        for seed in seeds:
            study.repeat(trial, seed)
    return study, study.compare()


def find_row(rows: tuple[ComparisonRow, ...], method: str, rank: int) -> ComparisonRow:
    return next(row for row in rows if (row.method, row.rank) == (method, rank))
