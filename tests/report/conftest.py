"""A study as one that has finished leaves it, with photographs behind its images."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from torch import Tensor

from lowrank_tune.config.plan import make_plan
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.files import file_sha256
from lowrank_tune.measured import Comparison, ComparisonRow
from lowrank_tune.trials.outcomes import write_history
from tests.comparison.small_study import Study, build_study, make_outcome, make_row

FAILED = {"status": "failed", "stopped_by": "error", "epochs": 0, "best_epoch": 0, "best": {}}


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


def make_study(home: Path, x_NTD: Tensor | None = None) -> Study:
    """Two trials with a model and one without; every image has a photograph but the last of four test images."""
    spec = StudySpec.model_validate(
        {
            "name": "small",
            "features": {"source": {"samples": 20}},
            "split": {"validation": 6, "test": 4, "group_by": None},
            "search": {"space": {"families": {"sketch": {}}, "rank": 3}},
            "report": {"images": [0, 3], "channels": 2},
        }
    )
    study = build_study(home, x_NTD, test=4, weights="random")
    study.plan = make_plan(spec, home / "results", datetime(2026, 1, 1, tzinfo=UTC))
    study.directory = study.plan.study_dir
    study.directory.mkdir(parents=True)
    (study.directory / "study.yaml").write_text("name: small  # <script>alert(1)</script>\n")
    paths = [home / "cache" / f"{image}.png" for image in range(19)]
    for image, path in enumerate(paths):
        Image.fromarray(np.full((20, 40, 3), 12 * image, dtype=np.uint8)).save(path)
    rows = study.features.rows
    keys = [*map(file_sha256, paths), rows[19].key]
    own = tuple(replace(row, key=key) for row, key in zip(rows, keys, strict=True))
    study.features = replace(study.features, rows=own)
    pd.DataFrame({"key": keys, "path": [*map(str, paths), None]}).to_parquet(study.features.records_path)
    study.add_trial("sketch", 3)
    study.add_trial("sketch", 3, status="pruned", stopped_by="asha", epochs=2, best_epoch=2)
    for outcome in study.outcomes:
        write_history(Path(outcome.directory), history(outcome.epochs))
    study.outcomes.append(make_outcome("direct", 3, 2, study.directory, **FAILED, reason="loss is <nan> in epoch 1"))
    study.comparison = make_comparison(
        make_row("svd", 3, 1.0),
        make_row("random_sketch", 3, 1.8),
        make_row("sketch", 3, 1.2, trial_id="r003-sketch-0000"),
        remarks=("random weights: these figures show the pipeline, not the science",),
    )
    return study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path)
