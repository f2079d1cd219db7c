"""One best of a rank, chosen by validation, wherever it is shown or leaves the study; the test split only reports."""

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime

import mlflow
import numpy as np
import pytest
import torch
import yaml

from lowrank_tune import export_study
from lowrank_tune.cluster.study_dir import create_study
from lowrank_tune.comparison.choice import winners
from lowrank_tune.comparison.compare import read_comparison
from lowrank_tune.config.plan import make_plan
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.files import write_json
from lowrank_tune.lowrank.decomposers import load_decomposer
from lowrank_tune.past_study import open_study, report_of
from lowrank_tune.report.spatial_page import Scene
from lowrank_tune.tracking.store import local_uri
from lowrank_tune.trials.outcomes import write_outcome
from lowrank_tune.trials.trial import write_inputs

TEXT = """\
name: disagreement
features: {source: {samples: 20}}
split: {group_by: null}
search: {method: grid, space: {rank: [2, 6], families: {sketch: {}, direct: {}}}}
objective: val_residual_ratio
tracking: {register_as: decomposer}
report: {images: [0], channels: 1}
"""


@pytest.fixture
def disagreeing(make_study, tmp_path):
    """A study whose test images like `sketch` at either rank, and whose validation says `direct`."""
    spec = StudySpec.model_validate(yaml.safe_load(TEXT))
    plan = make_plan(spec, tmp_path / "results", datetime(2026, 1, 1, tzinfo=UTC))
    create_study(plan, TEXT)
    study = make_study()
    study.directory = plan.study_dir
    for rank, cosine in ((2, 0.93), (6, 0.99)):
        study.add_trial("sketch", rank, best={"val_residual_ratio": 1.5, "val_mse": 0.1, "val_token_cosine": 0.8})
        best = {"val_residual_ratio": 1.2 + rank / 100, "val_mse": 0.2, "val_token_cosine": cosine}
        study.add_trial("direct", rank, best=best)
    write_inputs(plan.study_dir, study.features, study.split)
    for outcome in study.outcomes:
        write_outcome(outcome)
    ended = {"state": "finished", "started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T00:00:10+00:00"}
    write_json(plan.study_dir / "status.json", ended)
    return study


def test_what_validation_chose_is_confirmed_starred_pictured_stored_registered_and_exported(disagreeing, tmp_path):
    results, study_id = tmp_path / "results", disagreeing.directory.name
    confirmed = [outcome.config.trial_id for outcome in winners(disagreeing.outcomes, "val_residual_ratio")]
    assert confirmed == ["r002-direct-0001", "r006-direct-0003"]

    past = open_study(results, study_id)
    (*_, report), untold = report_of(past)
    assert untold == ""
    rows = json.loads((disagreeing.directory / "comparison.json").read_text())
    ratios = {(row["method"], row["rank"]): row["residual_ratio_mean"] for row in rows}
    assert all(ratios["sketch", rank] < ratios["direct", rank] for rank in (2, 6)), "the test split would say sketch"
    places = {row["trial_id"]: row["chosen"] for row in rows if row["chosen"]}
    assert places == {confirmed[0]: 1, confirmed[1]: 2}

    comparison = read_comparison(disagreeing.directory, "val_residual_ratio")
    assert [row.trial_id for row in comparison.best_of_each_rank()] == confirmed
    assert {row.trial_id for row in comparison.compression.stored if row.trial_id} == set(confirmed)
    page = report.read_text(encoding="utf-8")
    assert page.count("direct ★") >= 2 and "sketch ★" not in page
    assert "take rank 6, the lowest of those compared whose model does on the validation images (direct" in page
    scene = Scene(past.features, past.split, past.outcomes, comparison)
    assert scene.rank(None) == 2 and scene.network(6).family == "direct"

    client = mlflow.MlflowClient(local_uri(results))
    assert client.get_model_version_by_alias("decomposer", "best").tags["lowrank.trial_id"] == confirmed[0]

    exported = export_study(study_id, tmp_path / "model", rank=6, results=results)
    assert exported.family == "direct"


def test_a_comparison_from_before_the_choice_was_kept_is_chosen_from_by_the_trials_own_figures(disagreeing):
    written = disagreeing.compare()
    for outcome in disagreeing.outcomes:
        write_outcome(outcome)
    rows = [asdict(row) for row in written.rows]
    for row in rows:
        del row["chosen"], row["val_token_cosine"]
    write_json(disagreeing.directory / "comparison.json", rows)
    assert read_comparison(disagreeing.directory, "val_residual_ratio").rows == written.rows
    by_mse = read_comparison(disagreeing.directory, "val_mse")
    assert [row.method for row in by_mse.best_of_each_rank()] == ["sketch", "sketch"]


def test_a_rank_that_winners_of_several_rank_sets_serve_has_one_best(make_study):
    study = make_study()
    small = study.add_trial("sketch", 2, best={"val_residual_ratio": 1.3})
    large = study.add_trial("refined", 6, best={"val_residual_ratio": 1.1})
    study.outcomes = [
        replace(outcome, config=replace(outcome.config, nested_ranks=ranks))
        for outcome, ranks in zip(study.outcomes, ((), (2, 6)), strict=True)
    ]
    rows = study.compare().rows
    assert {(row.trial_id, row.rank) for row in rows if row.trial_id} == {(small, 2), (large, 2), (large, 6)}
    assert sorted(row.rank for row in rows if row.chosen) == [2, 6]


def test_of_models_that_serve_several_ranks_one_wins_and_is_measured_at_each_on_the_validation_images(make_study):
    study = make_study()
    trial_ids = [study.add_trial("sketch", 6, best={"val_residual_ratio": ratio}) for ratio in (1.3, 1.1)]
    study.outcomes = [
        replace(outcome, config=replace(outcome.config, nested_ranks=(2, 6))) for outcome in study.outcomes
    ]
    assert winners(study.outcomes, "val_residual_ratio") == [study.outcomes[1]]
    low, high = study.compare().best_of_each_rank()
    assert [(row.rank, row.trial_id) for row in (low, high)] == [(2, trial_ids[1]), (6, trial_ids[1])]
    model = load_decomposer(study.directory / "trials" / trial_ids[1] / "best_model.safetensors")
    x_NTD = study.x_NTD[list(study.split.validation)]
    for row in (low, high):
        with torch.inference_mode():
            a_NTR, b_NRD = model(x_NTD, row.rank)
        cosine = torch.cosine_similarity(x_NTD, a_NTR @ b_NRD, dim=-1).double().numpy()
        assert row.val_token_cosine == pytest.approx(np.mean(cosine), rel=1e-5)
    assert {low.chosen, high.chosen} == {1, 2}
