"""A small study on disk, a cache of [16, 24] images and saved decomposers, as the other rooms leave it; and records."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_tune.comparison.compare import compare
from lowrank_tune.config.plan import Plan
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import load_decomposer, make_decomposer, save_decomposer
from lowrank_tune.lowrank.trainer import initialise
from lowrank_tune.lowrank.weighted import METRIC, metric_factor
from lowrank_tune.measured import Comparison, ComparisonRow
from lowrank_tune.records import (
    ANSWERS_METRIC,
    CONTROLS,
    WEIGHTED,
    FeatureRow,
    FeatureSet,
    Split,
    TrialConfig,
    TrialOutcome,
)

TOKENS, DIM = 16, 24


def make_row(method: str, rank: int, ratio: float = 1.1, cosine: float = 0.95, **fields: Any) -> ComparisonRow:
    trained = method not in (*CONTROLS, "svd", "svd_weighted", "svd_rows")
    figures = {
        "n_images": 4, "token_cosine_mean": cosine, "token_cosine_sd": 0.01, "flat_cosine_mean": cosine,
        "mse_mean": 0.1, "residual_ratio_mean": ratio, "residual_ratio_max": ratio * 1.1, "residual_ratio": ratio,
        "residual_ratio_low": ratio * 0.99, "residual_ratio_high": ratio * 1.01, "residual_ratio_median": ratio,
        "bytes_per_image": 2048 * rank, "images_per_second": 123.0, "trial_id": f"r{rank:03d}-{method}" * trained,
        "chosen": int(trained), "val_token_cosine": cosine if trained else None,
    }  # fmt: skip
    return ComparisonRow(method=method, rank=rank, **(figures | fields))


def make_outcome(
    family: str = "sketch", rank: int = 3, number: int = 0, directory: Path = Path("study"), **ending: Any
) -> TrialOutcome:
    trial_id, whole = f"r{rank:03d}-{family}-{number:04d}", family
    family = family.removesuffix(WEIGHTED)
    params: dict[str, Any] = {
        "direct": {"lambda_b": 1e-4, "lambda_ortho": 1e-3},
        "refined": {"steps": 1},
        "shared": {"token_transform": "dct", "lambda_rate": 10.0},
    }.get(family, {})
    params |= {"metric": "answers"} if whole != family else {}
    config = TrialConfig(trial_id, number, number, family, rank, 1e-3, 1e-5, 4, 5, 5, params)
    best = {"val_residual_ratio": 1.5, "val_mse": 0.25, "val_token_cosine": 0.9}
    given = {"status": "finished", "stopped_by": "budget", "epochs": 4, "best_epoch": 4, "best": best, "seconds": 2.0}
    return TrialOutcome(**{"config": config, "directory": str(directory / "trials" / trial_id), **given, **ending})


@dataclass
class Study:
    """What `compare` and `write_report` need; trials are added one by one."""

    directory: Path
    x_NTD: Tensor
    features: FeatureSet
    split: Split
    outcomes: list[TrialOutcome] = field(default_factory=list)
    confirmations: list[TrialOutcome] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    plan: Plan | None = None
    comparison: Comparison | None = None

    def add_trial(self, family: str, rank: int, *, spoil: Callable[[Path], None] | None = None, **ending: Any) -> str:
        """Save an untrained, initialised model as a trial's best one; `refined_weighted` is one with a metric."""
        outcome = make_outcome(family, rank, len(self.outcomes), self.directory, **ending)
        path = self._save(outcome.config, nudge=0.0)
        if spoil:
            spoil(path)
        self.outcomes.append(outcome)
        return outcome.config.trial_id

    def repeat(self, trial_id: str, seed: int, **ending: Any) -> TrialOutcome:
        """Save a model like a trial's, started with another seed and nudged, as a repetition's."""
        (trial,) = (outcome for outcome in self.outcomes if outcome.config.trial_id == trial_id)
        number = sum(outcome.config.confirms == trial_id for outcome in self.confirmations) + 1
        config = replace(trial.config, trial_id=f"{trial_id}-s{number}", seed=seed, confirms=trial_id)
        directory = str(self._save(config, nudge=0.05).parent)
        self.confirmations.append(replace(trial, config=config, directory=directory, **ending))
        return self.confirmations[-1]

    def nudge(self, trial_id: str, by: float) -> None:
        """Let a trial's model be another than the one it began with."""
        (trial,) = (outcome for outcome in self.outcomes if outcome.config.trial_id == trial_id)
        path = Path(trial.directory) / "best_model.safetensors"
        model, generator = load_decomposer(path), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                weight += by * torch.randn(weight.shape, generator=generator)
        save_decomposer(model, path)

    def _save(self, config: TrialConfig, nudge: float) -> Path:
        metric = self.directory / ANSWERS_METRIC
        factor = metric_factor(load_file(metric)[METRIC]) if metric.is_file() else None
        model = make_decomposer(config, self.features.tokens, self.features.dim, factor)
        generator = torch.Generator().manual_seed(config.seed)
        initialise(model, config, FeatureMatrix(self.features).load, self.split.train, config.batch_size)
        with torch.no_grad():
            for weight in model.parameters():
                weight += nudge * torch.randn(weight.shape, generator=generator)
        path = self.directory / "trials" / config.trial_id / "best_model.safetensors"
        path.parent.mkdir(parents=True)
        save_decomposer(model, path)
        return path

    def compare(self, objective: str = "val_residual_ratio", **given: Any) -> Comparison:
        given |= {"seed": 3, "directory": self.directory, "confirmations": self.confirmations}
        given["groups"] = self.groups
        return compare(self.features, self.split, self.outcomes, objective=objective, **given)

    def test_images(self) -> Tensor:
        return self.x_NTD[list(self.split.test)]


def images(tokens: int = TOKENS, dim: int = DIM) -> Tensor:
    """Twenty of them, their singular values falling."""
    return torch.randn(20, tokens, dim, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1.5, dim)


def build_study(
    home: Path, x_NTD: Tensor | None = None, *, test: int = 6, dtype: torch.dtype = torch.float32, **fields: Any
) -> Study:
    """A cache of 20 images, of which 10 train and the last ones judge; no trial yet."""
    x_NTD = (images() if x_NTD is None else x_NTD).to(dtype)
    cache, directory = home / "cache", home / "study"
    (cache / "shards").mkdir(parents=True)
    directory.mkdir()
    rows = []
    for start in range(0, 20, 8):
        name = f"{start:05d}.safetensors"
        save_file({"features": x_NTD[start : start + 8].contiguous()}, cache / "shards" / name)
        rows += [FeatureRow(f"{image:064x}", name, image - start) for image in range(start, min(start + 8, 20))]
    given = {"fingerprint": "0" * 16, "encoder": "synthetic", "weights": "pretrained", "tokens": x_NTD.shape[1]}
    given |= {"dim": x_NTD.shape[2], "dtype": str(dtype).removeprefix("torch.")}
    given |= {"directory": str(cache), "rows": tuple(rows), "records_path": str(cache / "records.parquet")}
    split = Split(tuple(range(10)), tuple(range(10, 20 - test)), tuple(range(20 - test, 20)))
    return Study(directory, x_NTD.float(), FeatureSet(**{**given, **fields}), split)


def find_row(rows: tuple[ComparisonRow, ...], method: str, rank: int) -> ComparisonRow:
    return next(row for row in rows if (row.method, row.rank) == (method, rank))
