"""The best models in MLflow: loaded by MLflow alone in a process of its own, and registered once."""

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
from lowrank_tune.lowrank.decomposers import FAMILIES, load_decomposer, make_decomposer
from lowrank_tune.lowrank.graph import write_graph
from lowrank_tune.records import Comparison, TrialConfig
from lowrank_tune.tracking.store import local_uri
from lowrank_tune.tracking.sync import reconcile
from lowrank_tune.tracking.tracker import Tracker

SKETCH, DIRECT, WORSE = config_of(0), config_of(1, "direct", 4), config_of(4, "direct", 2)
PARAMS = {"direct": {"lambda_b": 1e-4, "lambda_ortho": 1e-3}, "sketch": {}, "refined": {"steps": 3}}
PROGRAM = """
import sys
import numpy as np
import mlflow, mlflow.pyfunc, mlflow.pytorch
import torch
mlflow.set_tracking_uri(sys.argv[1])
x = np.load(sys.argv[2])
with torch.no_grad():
    a, b = mlflow.pytorch.load_model(sys.argv[3])(torch.from_numpy(x))
assert "lowrank_tune" not in sys.modules
factors = mlflow.pyfunc.load_model(sys.argv[3]).predict(x)
np.savez(sys.argv[4], a=a.numpy(), b=b.numpy(), pyfunc_a=factors["a"], pyfunc_b=factors["b"])
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
    return {
        str(version.version): (version.tags["lowrank.study_id"], version.tags["lowrank.trial_id"]) for version in found
    }


def aliases(plan: Plan) -> dict[str, str]:
    found = mlflow.MlflowClient(local_uri(plan.results)).get_registered_model("decomposer").aliases
    return {alias: str(version) for alias, version in found.items()}


def test_a_registered_model_loads_in_a_clean_process_with_the_same_numbers_and_no_pickle(
    plan: Plan, tmp_path: Path
) -> None:
    configs = [SKETCH, DIRECT, WORSE]
    reader = track(plan, configs, write_study(plan, configs))
    outputs = reader.parent().outputs.model_outputs
    models = {output.step: reader.client.get_logged_model(output.model_id) for output in outputs}
    assert {rank: model.name for rank, model in models.items()} == {2: "rank-002-sketch", 4: "rank-004-direct"}
    location = Path(models[2].artifact_location.removeprefix("file://"))
    assert not [file for file in location.rglob("*") if file.suffix in (".pkl", ".pickle", ".pt", ".pth")]
    x_NTD = np.random.default_rng(0).standard_normal((3, TOKENS, DIM)).astype(np.float32)
    np.save(tmp_path / "x.npy", x_NTD)
    place = tmp_path / "elsewhere"
    place.mkdir()
    arguments = [reader.client._tracking_client.tracking_uri, str(tmp_path / "x.npy"), "models:/decomposer@rank-002"]
    # MLflow's own word that nothing in the files is unpickled.
    strict = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    command = [sys.executable, "-c", PROGRAM, *arguments, str(tmp_path / "factors.npz")]
    done = subprocess.run(command, cwd=place, env=strict, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "factors.npz")
    weights = plan.study_dir / "trials" / SKETCH.trial_id / "best_model.safetensors"
    with torch.no_grad():
        ours = load_decomposer(weights).eval()(torch.from_numpy(x_NTD))
    for name, expected in zip("ab", ours, strict=True):
        np.testing.assert_array_equal(found[f"pyfunc_{name}"], expected)
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_traced_graph_gives_every_kind_of_image_what_the_decomposer_gives(tmp_path: Path, family: str) -> None:
    tokens, dim = 24, 40
    config = replace(SKETCH, family=family, rank=5, family_params=PARAMS[family])
    model = make_decomposer(config, tokens, dim).eval()
    write_graph(model, tmp_path / "model.pt2")
    graph = torch.export.load(tmp_path / "model.pt2").module()
    generator = torch.Generator().manual_seed(3)
    plain = torch.randn(3, tokens, dim, generator=generator)
    dominated = 1e-3 * plain[:1] + torch.randn(1, 1, dim, generator=generator)
    images = torch.cat([plain, dominated, torch.ones(1, tokens, dim), torch.zeros(1, tokens, dim), 1e-6 * plain])
    with torch.no_grad():
        for x_NTD in (images, plain[:1]):
            (a_NTR, b_NRD), (expected_a, expected_b) = graph(x_NTD), model(x_NTD)
            size = x_NTD.abs().amax((1, 2), keepdim=True)
            assert ((a_NTR @ b_NRD - expected_a @ expected_b).abs() <= 1e-5 * size).all()
            if family != "refined":
                torch.testing.assert_close(a_NTR, expected_a)


def test_a_nested_model_is_logged_at_each_rank_and_gives_that_one(plan: Plan, tmp_path: Path) -> None:
    nested = replace(config_of(0, "sketch", 4), nested_ranks=(2, 4))
    comparison = write_study(plan, [nested])
    comparison = replace(comparison, rows=(*comparison.rows, row_of("sketch", 2, 1.05, nested.trial_id, 2)))
    track(plan, [nested], comparison)
    mlflow.set_tracking_uri(local_uri(plan.results))
    x_NTD = np.ones((1, TOKENS, DIM), np.float32)
    for rank in (2, 4):
        factors = mlflow.pyfunc.load_model(f"models:/decomposer@rank-{rank:03d}").predict(x_NTD)
        assert (factors["a"].shape, factors["b"].shape) == ((1, TOKENS, rank), (1, rank, DIM))


def test_models_are_registered_once_and_aliases_follow_the_newest_study(plan: Plan) -> None:
    configs = [SKETCH, DIRECT]
    comparison = write_study(plan, configs)
    for _ in range(2):
        track(plan, configs, comparison)
    study = plan.study_id
    assert versions(plan) == {"1": (study, SKETCH.trial_id), "2": (study, DIRECT.trial_id)}
    assert aliases(plan) == {"rank-002": "1", "best": "1", "rank-004": "2"}
    other = build_plan(plan.results, seed=1, tracking={"register_as": "decomposer"})
    track(other, [DIRECT], write_study(other, [DIRECT]))
    assert aliases(plan) == {"rank-002": "1", "best": "3", "rank-004": "3"}
    track(plan, configs, comparison)
    assert len(versions(plan)) == 3
    assert aliases(plan) == {"rank-002": "1", "best": "3", "rank-004": "3"}, "the older study takes nothing back"


def test_what_the_registry_lost_is_registered_again_by_a_reconciliation(plan: Plan) -> None:
    comparison = write_study(plan, [SKETCH])
    track(plan, [SKETCH], comparison)
    assert not reconcile(plan, comparison).comparison_added
    mlflow.MlflowClient(local_uri(plan.results)).delete_model_version("decomposer", "1")
    assert reconcile(plan, comparison).comparison_added
    assert versions(plan) == {"2": (plan.study_id, SKETCH.trial_id)}


def test_nothing_is_registered_unless_the_study_says_so(tmp_path: Path, migrated: Path) -> None:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    plan = build_plan(tmp_path)
    reader = track(plan, [SKETCH], write_study(plan, [SKETCH]))
    assert list(reader.client.search_registered_models()) == []


def test_a_version_that_was_left_without_its_aliases_gets_them_and_is_not_made_twice(plan: Plan) -> None:
    comparison = write_study(plan, [SKETCH])
    track(plan, [SKETCH], comparison)
    client = mlflow.MlflowClient(local_uri(plan.results))
    client.delete_registered_model_alias("decomposer", "best")
    client.delete_model_version_tag("decomposer", "1", "lowrank.aliased")
    assert reconcile(plan, comparison).comparison_added
    assert versions(plan) == {"1": (plan.study_id, SKETCH.trial_id)}
    assert aliases(plan) == {"rank-002": "1", "best": "1"}
