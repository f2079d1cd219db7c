import json
import math
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient

from lowrank_tune.study import run_trial
from tests.e2e.conftest import Ran, Witness
from tests.tracked_once import assert_tracked_once

WRITTEN = ("report.html", "comparison.json", "per_image.parquet", "pareto.json", "compression.json")
CONTROLS = {"svd", "svd_rows", "random_sketch", "pca_basis", "power_1", "randomized_svd", "gram_eigh"}


def test_every_image_is_extracted_once_every_trial_ends_and_every_epoch_knows_its_distance(ran: Ran) -> None:
    assert ran.witness.image_calls[-1] == (30, 30)
    trainings = (*ran.result.outcomes, *ran.result.confirmations)
    assert sorted(ran.witness.ended) == sorted(outcome.config.trial_id for outcome in trainings)
    assert len(ran.result.outcomes) == 8
    assert {outcome.status for outcome in ran.result.outcomes} <= {"finished", "pruned"}
    assert len(ran.witness.ratios) == sum(outcome.epochs for outcome in trainings)
    assert all(ratio >= 1 - 1e-6 for ratio in ran.witness.ratios)


def test_results_directory_holds_what_the_contract_names(ran: Ran) -> None:
    directory = ran.result.directory
    assert directory == ran.results / "studies" / ran.result.study_id
    for name in (*WRITTEN, "study.resolved.yaml", "plan.json", "tune", "plots/rank_curve.png"):
        assert (directory / name).exists(), name
    assert (directory / "study.yaml").read_text() == ran.study_file.read_text()
    assert json.loads((directory / "status.json").read_text())["state"] == "finished"
    for outcome in (*ran.result.outcomes, *ran.result.confirmations):
        names = {path.name for path in Path(outcome.directory).iterdir()}
        assert {"best_model.safetensors", "config.json", "history.json", "loss_curves.png"} <= names


def test_comparison_has_every_method_at_every_rank(ran: Ran) -> None:
    rows = json.loads((ran.result.directory / "comparison.json").read_text())
    assert {(row["method"], row["rank"]) for row in rows} == {
        (method, rank) for method in CONTROLS | {"direct", "sketch"} for rank in (2, 4)
    }
    for row in rows:
        assert row["n_images"] == 6
        assert row["residual_ratio_mean"] >= 1 - 1e-6
        assert (row["trial_id"] != "") == (row["method"] in {"direct", "sketch"})
    svd = [row for row in rows if row["method"] == "svd"]
    assert [row["residual_ratio_mean"] for row in svd] == pytest.approx([1, 1])
    sketch, random = ([row for row in rows if row["method"] == name] for name in ("sketch", "random_sketch"))
    assert all(s["residual_ratio_mean"] < r["residual_ratio_mean"] for s, r in zip(sketch, random, strict=True))


def test_the_pictures_of_the_test_images_stand_beside_their_features(ran: Ran) -> None:
    rates = json.loads((ran.result.directory / "compression.json").read_text())["rates"]
    pictures = {row["method"]: row for row in rates if row["dtype"] in ("jpeg", "webp")}
    assert {"jpeg-q75", "webp-q75", "half-side", "quarter-side"} < pictures.keys()
    for row in pictures.values():
        assert row["n_images"] == 6 and row["bytes_per_image"] > 300 and row["relative_error_mean"] > 0
    (said,) = [remark for remark in ran.result.comparison.remarks if remark.startswith("the picture itself")]
    assert "on 6 of 6 test images" in said and "tiny-random on 1 CPU thread" in said


def test_the_best_of_each_rank_is_confirmed_and_nothing_else(ran: Ran) -> None:
    repeats = ran.result.confirmations
    best = {
        rank: min(
            (outcome for outcome in ran.result.outcomes if outcome.config.rank == rank),
            key=lambda outcome: outcome.best["val_residual_ratio"],
        )
        for rank in (2, 4)
    }
    assert [outcome.config.confirms for outcome in repeats] == [best[rank].config.trial_id for rank in (2, 2, 4, 4)]
    assert {outcome.status for outcome in repeats} == {"finished"}
    assert (
        len({outcome.config.seed for outcome in (*ran.result.outcomes, *repeats)}) == 4 + 4
    )  # trials of a family and rank start alike
    confirmed = {row.trial_id: row for row in ran.result.comparison.rows if row.seeds}
    assert confirmed.keys() == {outcome.config.trial_id for outcome in best.values()}
    for row in confirmed.values():
        assert row.seeds == 2
        assert (row.residual_ratio_seed_mean or 0) >= 1 - 1e-6
        assert row.residual_ratio_seed_sd is not None


def test_random_weights_are_named(ran: Ran) -> None:
    assert ran.result.features.weights == "random"
    assert any("random weights" in remark for remark in ran.result.comparison.remarks)
    assert "random weights" in (ran.result.directory / "report.html").read_text()


def test_mlflow_has_one_run_a_trial_and_the_parent_the_comparison(ran: Ran) -> None:
    assert ran.result.untracked == ()
    uri = f"sqlite:///{ran.results / 'mlflow.db'}"
    client, parent = MlflowClient(uri), assert_tracked_once(uri, ran.result.directory)
    for row in ran.result.comparison.rows:
        history = client.get_metric_history(parent, f"test.{row.method}.residual_ratio")
        values = {point.step: point.value for point in history}
        assert values[row.rank] == pytest.approx(row.residual_ratio)
        assert all(math.isfinite(value) for value in values.values())
    artifacts = {artifact.path for artifact in client.list_artifacts(parent)}
    assert {*WRITTEN, "plots", "study.yaml"} <= artifacts
    assert "plots/rank_curve.png" in {artifact.path for artifact in client.list_artifacts(parent, "plots")}


def test_optuna_opens_the_study(ran: Ran) -> None:
    journal = ran.result.directory / "tune" / "optuna.journal"
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    (name,) = optuna.get_all_study_names(storage)
    states = [trial.state for trial in optuna.load_study(study_name=name, storage=storage).trials]
    pruned = sum(outcome.status == "pruned" for outcome in ran.result.outcomes)
    assert states.count(optuna.trial.TrialState.PRUNED) == pruned
    assert states.count(optuna.trial.TrialState.COMPLETE) == len(states) - pruned == 8 - pruned


def test_second_run_extracts_nothing_and_gives_the_same_numbers(ran: Ran, no_report: None) -> None:
    witness = Witness()
    second = ran.again(progress=witness)
    assert witness.image_calls == [(30, 30)]
    assert second.study_id != ran.result.study_id
    assert second.features.fingerprint == ran.result.features.fingerprint
    assert [o.best for o in second.outcomes] == [o.best for o in ran.result.outcomes]
    assert [o.best for o in second.confirmations] == [o.best for o in ran.result.confirmations]
    figures = [
        {(row.method, row.rank): (row.token_cosine_mean, row.residual_ratio_mean) for row in result.comparison.rows}
        for result in (ran.result, second)
    ]
    assert figures[0] == figures[1]


def test_one_trial_in_this_process_gives_the_numbers_of_the_study(ran: Ran) -> None:
    outcome = run_trial(ran.study_file, results=ran.results)
    in_study = ran.result.outcomes[0]
    # What a search's trial comes from, one by itself does not know.
    assert outcome.config == replace(in_study.config, origin="")
    shared = min(outcome.epochs, in_study.epochs)
    histories = [json.loads((Path(o.directory) / "history.json").read_text())[:shared] for o in (outcome, in_study)]
    first, second = ([row["val_mse"] for row in history] for history in histories)
    assert first == second
