"""Records as a finished study leaves them, and a small cache with photographs behind it."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lowrank_tune.config.plan import Plan, make_plan
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.lowrank.decomposers import make_decomposer, save_decomposer
from lowrank_tune.records import Comparison, ComparisonRow, FeatureRow, FeatureSet, Split, TrialConfig, TrialOutcome
from lowrank_tune.report.text import is_trained

TOKENS, DIM = 12, 20
TEST = (5, 6, 7, 8)
FAILED = {"status": "failed", "stopped_by": "error", "epochs": 0, "best_epoch": 0, "best": {}}


def make_row(method: str, rank: int, ratio: float = 1.1, cosine: float = 0.95, **fields) -> ComparisonRow:
    figures = {
        "n_images": 4, "token_cosine_mean": cosine, "token_cosine_sd": 0.01, "flat_cosine_mean": cosine,
        "mse_mean": 0.1,
        "residual_ratio_mean": ratio, "residual_ratio_max": ratio * 1.1, "bytes_per_image": 2048 * rank,
        "images_per_second": 123.0, "trial_id": f"r{rank:03d}-{method}" if is_trained(method) else "",
        "chosen": int(is_trained(method)), "val_token_cosine": cosine if is_trained(method) else None,
    }  # fmt: skip
    return ComparisonRow(method=method, rank=rank, **(figures | fields))


def make_comparison(*rows: ComparisonRow, remarks: tuple[str, ...] = ()) -> Comparison:
    return Comparison(rows, "per_image.parquet", "one CPU thread (test)", remarks)


def history(epochs: int, *, start: float = 2.0) -> list[dict[str, float]]:
    """Falling curves; the learning rate halves at epoch 3."""
    return [
        {
            "epoch": epoch, "train_loss": start / epoch, "val_mse": 0.5 * start / epoch, "val_token_cosine": 0.9,
            "val_residual_ratio": 1 + start / epoch, "lr": 0.01 if epoch < 3 else 0.005, "seconds": 0.1,
        }
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip


@dataclass
class Study:
    """What `write_report` needs."""

    plan: Plan
    features: FeatureSet
    split: Split
    outcomes: list[TrialOutcome]
    comparison: Comparison
    directory: Path


def make_outcome(
    family: str = "sketch", rank: int = 3, number: int = 0, directory: Path = Path("study"), **ending
) -> TrialOutcome:
    params = {"lambda_b": 1e-4, "lambda_ortho": 1e-3} if family == "direct" else {}
    config = TrialConfig(f"r{rank:03d}-{family}-{number:04d}", number, 0, family, rank, 1e-3, 1e-5, 4, 5, 5, params)
    best = {"val_residual_ratio": 1.5, "val_mse": 0.25, "val_token_cosine": 0.9}
    defaults = {"status": "finished", "stopped_by": "budget", "epochs": 4, "best_epoch": 4, "best": best}
    place = str(directory / "trials" / config.trial_id)
    return TrialOutcome(**{"config": config, "directory": place, "seconds": 2.0, **defaults, **ending})


def make_features(tmp_path: Path) -> FeatureSet:
    """Nine images of 12 tokens; each has a photograph but the last test image, whose record names none."""
    x_NTD = torch.randn(9, TOKENS, DIM, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1, DIM)
    cache = tmp_path / "cache"
    (cache / "shards").mkdir(parents=True)
    save_file({"features": x_NTD}, cache / "shards" / "00000.safetensors")
    rows = tuple(FeatureRow(f"{n:064x}", "00000.safetensors", n) for n in range(9))
    for n in range(8):
        Image.fromarray(np.full((20, 40, 3), 25 * n, dtype=np.uint8)).save(cache / f"{n}.png")
    paths = [str(cache / f"{n}.png") for n in range(8)] + [None]
    records = pd.DataFrame({"record": range(9), "key": [row.key for row in rows], "path": paths, "error": [None] * 9})
    records.to_parquet(cache / "records.parquet")
    return FeatureSet(
        str(cache), "0" * 16, "synthetic", "random", "float32", TOKENS, DIM, rows, str(cache / "records.parquet")
    )


def make_study(tmp_path: Path, features: FeatureSet) -> Study:
    spec = StudySpec.model_validate(
        {
            "name": "small",
            "features": {"source": {"samples": 9}},
            "split": {"validation": 1, "test": 4},
            "search": {"space": {"families": {"sketch": {}}, "rank": 3}},
            "report": {"images": [0, 3], "channels": 2},
        }
    )
    plan = make_plan(spec, tmp_path / "results", datetime(2026, 1, 1, tzinfo=UTC))
    directory = plan.study_dir
    directory.mkdir(parents=True)
    (directory / "study.yaml").write_text("name: small  # <script>alert(1)</script>\n")
    outcomes = [
        make_outcome(directory=directory),
        make_outcome(directory=directory, number=1, status="pruned", stopped_by="asha", epochs=2, best_epoch=2),
        make_outcome("direct", number=2, directory=directory, **FAILED, reason="loss is <nan> in epoch 1"),
    ]
    for outcome in outcomes[:2]:
        place = Path(outcome.directory)
        place.mkdir(parents=True)
        save_decomposer(make_decomposer(outcome.config, TOKENS, DIM), place / "best_model.safetensors")
        (place / "history.json").write_text(json.dumps(history(outcome.epochs)))
    comparison = make_comparison(
        make_row("svd", 3, 1.0),
        make_row("random_sketch", 3, 1.8),
        make_row("sketch", 3, 1.2, trial_id=outcomes[0].config.trial_id),
        remarks=("random weights: these figures show the pipeline, not the science",),
    )
    split = Split(train=(0, 1, 2, 3), validation=(4,), test=TEST)
    return Study(plan, features, split, outcomes, comparison, directory)


@pytest.fixture
def features(tmp_path: Path) -> FeatureSet:
    return make_features(tmp_path)


@pytest.fixture
def study(tmp_path: Path, features: FeatureSet) -> Study:
    return make_study(tmp_path, features)
