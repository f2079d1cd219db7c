"""A trial's training over the processes that it takes."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_study import DIM, SPLIT, write_features

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.decomposers import load_decomposer
from lowrank_tune.lowrank.weighted import METRIC, metric_factor
from lowrank_tune.records import ANSWERS_METRIC, BEST_MODEL, FeatureSet, TrialConfig
from lowrank_tune.trials.outcomes import (
    CHECKPOINT,
    begin_trial,
    outcome_of,
    read_history,
    write_history,
    write_outcome,
)
from lowrank_tune.trials.trial import TrialSession, write_inputs

SessionOf = Callable[..., TrialSession]

CONFIG = TrialConfig(
    "r002-direct-0000", 0, 5, "direct", 2, 0.01, 1e-5, 4, 4, 4, {"lambda_b": 1e-4, "lambda_ortho": 0.0}
)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_part_of_the_split_that_is_all_zeros_is_told_before_any_trial(part, images_NTD, tmp_path):
    x_NTD = images_NTD.clone()
    x_NTD[list(getattr(SPLIT, part))] = 0
    with pytest.raises(InputError, match=f"split: every {part} image holds nothing but zeros"):
        write_inputs(tmp_path, write_features(tmp_path / "cache", x_NTD), SPLIT)


def without_seconds(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in history]


@pytest.fixture
def session_of(tiny_cache: FeatureSet, tmp_path: Path) -> SessionOf:
    write_inputs(tmp_path, tiny_cache, SPLIT)

    def make(config: TrialConfig = CONFIG, reported: int = 0) -> TrialSession:
        config = replace(config, trial_id="trial")
        begin_trial(tmp_path / "trials" / "trial", config)
        return TrialSession(
            {
                "trial": asdict(config),
                "study_dir": str(tmp_path),
                "cpus": 1,
                "gpus": 0,
                "reported": reported,
            }
        )

    return make


def train(session: TrialSession, epochs: int = 100) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while len(rows) < epochs and not (rows and rows[-1]["stopped_by"]):
        rows.append(session.epoch())
    return rows


def test_a_second_process_goes_on_where_the_first_one_was_killed(session_of: SessionOf, tmp_path: Path) -> None:
    first = train(session_of(), 1)
    rest = train(session_of(reported=1))
    assert [row["epoch"] for row in (*first, *rest)] == [1, 2, 3, 4]
    (tmp_path / "trials" / "trial" / CHECKPOINT).unlink()
    (tmp_path / "trials" / "trial" / "history.json").unlink()
    assert without_seconds(first + rest) == without_seconds(train(session_of()))


def test_an_epoch_that_nobody_heard_of_is_told_before_the_next_is_trained(session_of: SessionOf) -> None:
    stopped = session_of()
    first = train(stopped, 2)
    stopped.keep()
    rows = train(session_of(reported=1))
    assert [row["epoch"] for row in rows] == [2, 3, 4]
    assert rows[0] == first[1]


def test_a_training_that_has_ended_is_told_and_not_trained_again(session_of: SessionOf, tmp_path: Path) -> None:
    whole = train(session_of())
    model = tmp_path / "trials" / "trial" / "best_model.safetensors"
    before = model.stat().st_mtime_ns
    assert train(session_of()) == whole
    assert train(session_of(reported=3)) == train(session_of(reported=4)) == whole[-1:]
    assert model.stat().st_mtime_ns == before


def test_another_trials_files_are_no_start(session_of: SessionOf) -> None:
    train(session_of(), 1)
    assert [row["epoch"] for row in train(session_of(replace(CONFIG, seed=99)))] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", [CHECKPOINT, "config.json", "history.json"])
def test_a_damaged_file_costs_its_epochs_only(session_of: SessionOf, tmp_path: Path, name: str) -> None:
    train(session_of(), 1)
    path = tmp_path / "trials" / "trial" / name
    path.write_bytes(path.read_bytes()[:20])
    assert [row["epoch"] for row in train(session_of())] == [1, 2, 3, 4]


def test_a_pickle_in_a_checkpoints_place_runs_nothing(session_of: SessionOf, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    session = session_of()
    torch.save({"model": Payload()}, tmp_path / "trials" / "trial" / CHECKPOINT)
    assert [row["epoch"] for row in train(session)] == [1, 2, 3, 4]
    assert not (tmp_path / "ran").exists()


def test_what_another_process_would_meet_again_is_told(session_of: SessionOf) -> None:
    (row,) = train(session_of(replace(CONFIG, rank=13)))
    assert (row["stopped_by"], row["epoch"], row["best_epoch"]) == ("error", 0, 0)
    assert "rank 13" in row["reason"]
    assert math.isnan(row["val_mse"])


def test_a_figure_that_is_not_finite_is_null_on_file(tmp_path: Path) -> None:
    write_history(tmp_path, [{"epoch": 1, "val_mse": math.nan, "lr": math.inf}])
    assert json.loads((tmp_path / "history.json").read_text()) == [{"epoch": 1, "val_mse": None, "lr": None}]
    (row,) = read_history(tmp_path)
    assert row["epoch"] == 1
    assert math.isnan(row["val_mse"])


def test_a_file_system_that_is_gone_is_another_machines_chance(session_of: SessionOf, tmp_path: Path) -> None:
    session = session_of()
    shutil.rmtree(tmp_path / "trials" / "trial")
    with pytest.raises(FileNotFoundError):
        session.epoch()
    outcome = outcome_of(CONFIG, {"stopped_by": "budget"}, tmp_path / "study" / "trials" / "trial")
    with pytest.raises(FileNotFoundError):
        write_outcome(outcome)
    assert not (tmp_path / "trials" / "trial").exists() and not (tmp_path / "study").exists()


def test_a_trial_that_is_out_of_memory_is_retried_once_in_smaller_parts(tmp_path: Path) -> None:
    script = Path(__file__).with_name("out_of_memory.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    trained, failed = done.stdout.splitlines()
    assert trained == "epochs 1 2 3, budget, micro-batch 16"
    assert failed.startswith("error after 0 epochs: out of memory with 16 images in it at a time; lower batch_size (")
    assert "can't allocate memory" in failed


def test_a_trial_in_the_answers_metric_reads_it_from_the_studys_folder_and_says_so_where_there_is_none(
    session_of, tmp_path
):
    config = replace(CONFIG, family="refined", family_params={"steps": 1, "metric": "answers"})
    lacking = session_of(config).epoch()
    assert lacking["stopped_by"] == "error"
    assert "answers_metric.safetensors: no metric of the answers" in lacking["reason"]
    metric = torch.diag(torch.arange(1.0, DIM + 1))
    save_file({METRIC: metric}, tmp_path / ANSWERS_METRIC)
    result = session_of(config).epoch()
    assert not result["stopped_by"] and math.isfinite(result["val_residual_ratio"])
    model = load_decomposer(tmp_path / "trials" / "trial" / BEST_MODEL)
    torch.testing.assert_close(model.weight_DD, metric_factor(metric).float())
