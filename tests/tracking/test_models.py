"""The best models in MLflow: loaded where this package is not installed, and registered once."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from tracked_study import DIM, TOKENS, Reader, build_plan, config_of, outcome_of, row_of, track_trial, write_study

from lowrank_tune.config.plan import Plan
from lowrank_tune.lowrank.decomposers import load_decomposer
from lowrank_tune.measured import Comparison
from lowrank_tune.records import TrialConfig
from lowrank_tune.tracking.reconcile import reconcile
from lowrank_tune.tracking.store import local_uri
from lowrank_tune.tracking.tracker import Tracker

SKETCH, DIRECT, WORSE = config_of(0), config_of(1, "direct", 4), config_of(4, "direct", 2)
ELSEWHERE = """
import importlib.util, pathlib, sys
sys.path = [path for path in sys.path if not pathlib.Path(path, "lowrank_tune").exists()]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
assert importlib.util.find_spec("lowrank_tune") is None
import numpy as np
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
np.savez(sys.argv[3], **mlflow.pyfunc.load_model("models:/decomposer@best").predict(np.load(sys.argv[2])))
assert pathlib.Path(sys.modules["lowrank_tune"].__file__).parts[-3] == "code"
assert "ray" not in sys.modules
"""


@pytest.fixture
def plan(tmp_path: Path, migrated: Path) -> Plan:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return build_plan(tmp_path, tracking={"register_as": "decomposer"})


def track(plan: Plan, configs: Sequence[TrialConfig], comparison: Comparison) -> Reader:
    with Tracker(plan) as tracker:
        for config in configs:
            track_trial(tracker, plan, config)
        tracker.compared(comparison, [outcome_of(plan, config) for config in configs])
    assert tracker.problems == ()
    return Reader(local_uri(plan.results))


def versions(plan: Plan) -> dict[str, tuple[str, str]]:
    """Study and trial of each version of the registered model."""
    found = mlflow.MlflowClient(local_uri(plan.results)).search_model_versions("name = 'decomposer'")
    return {str(each.version): (each.tags["lowrank.study_id"], each.tags["lowrank.trial_id"]) for each in found}


def aliases(plan: Plan) -> dict[str, str]:
    found = mlflow.MlflowClient(local_uri(plan.results)).get_registered_model("decomposer").aliases
    return {alias: str(version) for alias, version in found.items()}


def test_a_registered_model_loads_without_this_package_and_unpickles_nothing(plan: Plan, tmp_path: Path) -> None:
    configs = [SKETCH, DIRECT, WORSE]
    reader = track(plan, configs, write_study(plan, configs))
    outputs = reader.parent().outputs.model_outputs
    models = {output.step: reader.client.get_logged_model(output.model_id) for output in outputs}
    assert {rank: model.name for rank, model in models.items()} == {2: "rank-002-sketch", 4: "rank-004-direct"}
    location = Path(models[2].artifact_location.removeprefix("file://"))
    assert not [file for file in location.rglob("*") if file.suffix in (".pkl", ".pickle", ".pt", ".pth", ".pyc")]
    x_NTD = np.random.default_rng(0).standard_normal((3, TOKENS, DIM)).astype(np.float32)
    np.save(tmp_path / "x.npy", x_NTD)
    files = [str(tmp_path / "x.npy"), str(tmp_path / "factors.npz")]
    # MLflow's own word that nothing in the files is unpickled.
    strict = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    command = [sys.executable, "-I", "-c", ELSEWHERE, local_uri(plan.results), *files]
    done = subprocess.run(command, cwd=location, env=strict, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    both = f"import sys; sys.path.insert(0, {str(location / 'code')!r}); import lowrank_tune.lowrank, lowrank_tune.cli"
    assert subprocess.run([sys.executable, "-c", both]).returncode == 0, (
        "where the package is installed, it stays whole"
    )
    weights = plan.study_dir / "trials" / SKETCH.trial_id / "best_model.safetensors"
    with torch.no_grad():
        ours = load_decomposer(weights).eval()(torch.from_numpy(x_NTD))
    for name, expected in zip("ab", ours, strict=True):
        np.testing.assert_array_equal(np.load(files[1])[name], expected)


def test_a_nested_model_is_logged_at_each_rank_and_registered_only_where_the_study_says_so(plan: Plan) -> None:
    plan = build_plan(plan.results)
    nested = replace(config_of(0, "sketch", 4), nested_ranks=(2, 4))
    comparison = write_study(plan, [nested])
    comparison = replace(comparison, rows=(*comparison.rows, row_of("sketch", 2, 1.05, nested.trial_id, 2)))
    reader = track(plan, [nested], comparison)
    x_NTD = np.ones((1, TOKENS, DIM), np.float32)
    for output in reader.parent().outputs.model_outputs:
        location = reader.client.get_logged_model(output.model_id).artifact_location
        factors = mlflow.pyfunc.load_model(location).predict(x_NTD)
        assert (factors["a"].shape, factors["b"].shape) == ((1, TOKENS, output.step), (1, output.step, DIM))
    assert list(reader.client.search_registered_models()) == []


def test_validation_chooses_what_is_logged_and_the_alias_and_each_model_is_registered_once(plan: Plan) -> None:
    configs = [SKETCH, DIRECT, WORSE]
    comparison = write_study(plan, configs)
    # On the test split SKETCH is the best of all; on validation images it is not even its rank's.
    chosen = {SKETCH.trial_id: 0, DIRECT.trial_id: 1, WORSE.trial_id: 2}
    rows = tuple(replace(row, chosen=chosen.get(row.trial_id, 0)) for row in comparison.rows)
    comparison = replace(comparison, rows=rows)
    assert min(row.residual_ratio_mean for row in rows if row.trial_id) == rows[2].residual_ratio_mean
    for _ in range(2):
        track(plan, configs, comparison)
    study = plan.study_id
    assert versions(plan) == {"1": (study, WORSE.trial_id), "2": (study, DIRECT.trial_id)}
    assert aliases(plan) == {"best": "2"}
    other = build_plan(plan.results, seed=1, tracking={"register_as": "decomposer"})
    track(other, [SKETCH], write_study(other, [SKETCH]))
    assert aliases(plan) == {"best": "3"}
    track(plan, configs, comparison)
    assert (len(versions(plan)), aliases(plan)) == (3, {"best": "3"}), "the older study takes nothing back"


def test_what_the_registry_lost_is_registered_again_and_a_model_whose_file_is_gone_costs_no_other(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    comparison = write_study(plan, [SKETCH, DIRECT])
    (plan.study_dir / "trials" / DIRECT.trial_id / "best_model.safetensors").unlink()
    track(plan, [SKETCH, DIRECT], comparison)
    assert "rank-004-direct is not in MLflow: " in caplog.text
    client = mlflow.MlflowClient(local_uri(plan.results))
    assert not reconcile(plan, comparison).comparison_added
    client.delete_registered_model_alias("decomposer", "best")
    assert reconcile(plan, comparison).comparison_added
    assert (versions(plan), aliases(plan)) == ({"1": (plan.study_id, SKETCH.trial_id)}, {"best": "1"})
    client.delete_model_version("decomposer", "1")
    assert reconcile(plan, comparison).comparison_added
    assert (versions(plan), aliases(plan)) == ({"2": (plan.study_id, SKETCH.trial_id)}, {"best": "2"})
    client.delete_registered_model("decomposer")
    assert reconcile(plan, comparison).comparison_added
    assert aliases(plan) == {"best": "1"}
