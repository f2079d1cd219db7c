"""A model of the finished study leaves it: exported, loaded, and refused where something is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from lowrank_tune import export_study, load_decomposer, open_features
from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.decomposers import load_decomposer as load_weights
from lowrank_tune.lowrank.metrics import measure
from lowrank_tune.measured import ComparisonRow
from tests.conftest import Typed
from tests.e2e.conftest import Ran

pytestmark = pytest.mark.usefixtures("ray_cluster")


def best(ran: Ran, rank: int) -> ComparisonRow:
    return next(row for row in ran.result.comparison.best_of_each_rank() if row.rank == rank)


def of_test_images(ran: Ran, cache: Any) -> torch.Tensor:
    """What a cache of the study's images has of those of the test split, [N, T, D]."""
    place = {row.key: index for index, row in enumerate(cache.features.rows)}
    return cache.load([place[ran.result.features.rows[index].key] for index in ran.result.split.test])


@pytest.fixture
def model(ran: Ran, tmp_path: Path) -> Path:
    """The study's best model of rank 4, to be spoilt."""
    return export_study(ran.result.study_id, tmp_path / "model", rank=4, results=ran.results).directory


def test_an_exported_model_is_the_best_of_its_rank_and_gives_the_same_numbers(
    ran: Ran, tmp_path: Path, typed: Typed
) -> None:
    row = best(ran, 4)
    arguments = ("export", ran.result.study_id[:-1], "--rank", 4, tmp_path / "model", "--json")
    facts = json.loads(typed(*arguments, "--results", ran.results)[1])
    assert (facts["trial"], facts["family"], facts["rank"], facts["ranks"]) == (row.trial_id, row.method, 4, [4])
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = load_decomposer(tmp_path / "model")
    features = ran.result.features
    x_NTD = open_features(features.directory).load(range(3))
    trial = ran.result.directory / "trials" / row.trial_id / "best_model.safetensors"
    for ours, theirs in zip(loaded(x_NTD), load_weights(trial).eval()(x_NTD), strict=True):
        assert torch.equal(ours, theirs)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "lowrank_decomposer"
    assert config["features"]["fingerprint"] == features.fingerprint
    assert config["training"]["study_id"] == ran.result.study_id


def test_the_figures_on_the_card_are_the_models_own(ran: Ran, model: Path) -> None:
    card = ModelCard.load(model / "README.md")
    assert card.data.library_name == "lowrank_tune"
    # The tiny tower has random weights: there is no base model to name.
    assert card.data.base_model is None
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    x_NTD = of_test_images(ran, open_features(ran.result.features.directory))
    with torch.inference_mode():
        measured = measure(x_NTD.double(), *load_decomposer(model)(x_NTD))
    assert figures["mse"] == pytest.approx(float(measured.mse_N.mean()), rel=1e-4)
    assert figures["token_cosine"] == pytest.approx(float(measured.token_cosine_N.mean()), rel=1e-4)
    assert figures["residual_ratio"] == pytest.approx(best(ran, 4).residual_ratio_mean)
    for text in (ran.result.study_id, ran.result.features.fingerprint, "| svd | 1.000 |", "random weights"):
        assert text in card.text


def test_a_rank_must_be_named_where_there_are_several_and_must_have_a_model(
    ran: Ran, tmp_path: Path, typed: Typed
) -> None:
    study = ran.result.study_id
    for asked, reason in (
        ([study], f"study {study}: it has models of ranks 2, 4; choose one with --rank\n"),
        ([study, "--rank", "3"], "rank 3 has no trained model; those that have: 2, 4"),
        (["nope", "--rank", "2"], "study nope: not in"),
    ):
        code, _, err = typed("export", *asked, tmp_path / "model", "--results", ran.results)
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith("error: ") and reason in err
    assert not (tmp_path / "model").exists()


def test_only_finished_studies_are_exported(ran: Ran, tmp_path: Path) -> None:
    results = tmp_path / "results"
    study = results / "studies" / ran.result.study_id
    shutil.copytree(ran.result.directory, study)
    (study / "status.json").write_text(json.dumps({"state": "stopped", "started": "2026-01-01T00:00:00+00:00"}))
    with pytest.raises(InputError, match="it is stopped, and only finished studies are exported"):
        export_study(ran.result.study_id, tmp_path / "model", rank=4, results=results)
    assert not (tmp_path / "model").exists()


def test_an_earlier_export_is_replaced_and_anything_else_is_left_alone(
    ran: Ran, model: Path, tmp_path: Path, typed: Typed
) -> None:
    arguments = ("export", ran.result.study_id, "--rank", 2, "--results", ran.results)
    before = (model / "model.safetensors").stat().st_ino
    assert export_study(ran.result.study_id, model, rank=4, results=ran.results).rank == 4
    assert (model / "model.safetensors").stat().st_ino == before, "the same model is not written again"
    assert typed(*arguments, model)[0] == 0
    assert load_decomposer(model).rank == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left beside it"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    code, _, err = typed(*arguments, foreign)
    assert code == 2 and "holds something else (thesis.tex), and is left alone" in err
    (foreign / "thesis.tex").rename(foreign / "config.json")
    code, _, err = typed(*arguments, foreign)
    assert code == 2 and "is no export of this program" in err
    assert (foreign / "config.json").read_text() == "years of work"
    code, _, err = typed(*arguments, foreign / "config.json")
    assert code == 2 and "is a file" in err
    (tmp_path / "empty").mkdir()
    assert typed(*arguments, tmp_path / "empty")[0] == 0


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("config.json", lambda data: None, "no exported model, it has no config.json"),
        ("config.json", lambda data: data[:40], "config.json: cannot be read"),
        ("config.json", lambda data: data.replace(b"lowrank_decomposer", b"bert"), "model_type is 'bert'"),
        ("config.json", lambda data: b"[]", "model_type is None"),
        ("config.json", lambda data: data.replace(b'"tokens": 16', b'"tokens": 17'), "does not describe the weights"),
        ("config.json", lambda data: data.replace(b'"format": 1', b'"format": 2'), "has format 2"),
        ("config.json", lambda data: data.replace(b'"tokens"', b'"token"'), "is damaged"),
        ("model.safetensors", lambda data: None, "model.safetensors: cannot be read"),
        ("model.safetensors", lambda data: data[:-7], "is damaged or another model's"),
    ],
)
def test_a_spoilt_folder_is_refused_in_words(model: Path, name, spoil, reason) -> None:
    data = spoil((model / name).read_bytes())
    (model / name).unlink() if data is None else (model / name).write_bytes(data)
    with pytest.raises(InputError, match=reason) as caught:
        load_decomposer(model)
    assert "\n" not in str(caught.value)


def test_mlflow_holds_the_same_model(ran: Ran, model: Path) -> None:
    import mlflow

    from lowrank_tune.tracking.store import local_uri

    client = mlflow.MlflowClient(local_uri(ran.results))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (parent,) = client.search_runs(experiments, "tags.`lowrank.kind` = 'study'")
    outputs = {output.step: output.model_id for output in parent.outputs.model_outputs}
    location = client.get_logged_model(outputs[4]).artifact_location
    x_NTD = open_features(ran.result.features.directory).load(range(3))
    with torch.no_grad():
        ours = load_decomposer(model)(x_NTD)
    factors = mlflow.pyfunc.load_model(location).predict(x_NTD.numpy())
    for name, expected in zip("ab", ours, strict=True):
        assert torch.equal(torch.from_numpy(factors[name]), expected)


def test_a_model_applied_to_the_studys_cache_has_the_error_that_its_card_tells(
    ran: Ran, model: Path, tmp_path: Path, typed: Typed
) -> None:
    arguments = ("apply", model, ran.result.features.fingerprint[:8], tmp_path / "factors", "--json")
    facts = json.loads(typed(*arguments, "--dtype", "float32", "--quiet", "--results", ran.results)[1])
    assert (facts["images"], facts["rank"], facts["bytes_per_image"]) == (30, 4, 4 * 4 * sum(facts["shape"]))
    assert typed("features", "verify", tmp_path / "factors", "--full")[0] == 0
    caches = (open_features(ran.result.features.directory), open_features(tmp_path / "factors"))
    x_NTD, approximated_NTD = (of_test_images(ran, cache) for cache in caches)
    error = (approximated_NTD - x_NTD).square().mean()
    assert float(error) == pytest.approx(best(ran, 4).mse_mean, rel=1e-3)


def test_loading_needs_neither_ray_nor_mlflow(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from lowrank_tune import load_decomposer\n"
        f"load_decomposer({str(model)!r})\n"
        "assert not {'ray', 'mlflow', 'pandas', 'optuna'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
