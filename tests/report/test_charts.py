"""What the interactive charts show, read from the JSON that the page's script draws."""

import json

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.records import Front, FrontPoint
from lowrank_tune.report.charts import learning_charts, measure_spectrum, rank_charts, spectrum_charts, tradeoff_charts
from lowrank_tune.report.report import LEAST_FOR_IMPORTANCE, search_views
from lowrank_tune.report.style import ABOVE_ONE, TOWARDS_ONE, script_safe


def traces(chart):
    return {trace.get("name"): trace for trace in json.loads(chart.figure)["data"]}


def test_the_rank_charts_draw_every_method_and_the_svd_between_the_ranks(row, features):
    spectrum = measure_spectrum(FeatureMatrix(features), (5, 6))
    rows = [row("svd", rank, 1.0, 0.9) for rank in (3, 6)]
    rows += [row("sketch", rank, 1.25, 0.85, trial_id=f"t{rank}") for rank in (3, 6)]
    cosine, ratio = rank_charts(rows, spectrum)
    drawn = traces(cosine)["sketch"]
    assert drawn["x"] == [3, 6]
    assert drawn["y"] == pytest.approx(TOWARDS_ONE.place([0.85, 0.85]))
    assert "t3" in drawn["text"][0] and "ρ 1.250" in drawn["text"][0]
    assert traces(ratio)["sketch"]["y"] == pytest.approx(ABOVE_ONE.place([1.25, 1.25]))
    between = traces(cosine)["svd at every rank"]
    assert between["x"] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert between["y"] == pytest.approx(TOWARDS_ONE.place(spectrum.cosine_K[1:9]))
    assert "svd, sketch" in cosine.alt


def test_fresh_seeds_are_a_band_of_mean_and_sd(row):
    seeds = {"seeds": 2, "residual_ratio_seed_mean": 1.3, "residual_ratio_seed_sd": 0.1,
             "token_cosine_seed_mean": 0.8, "token_cosine_seed_sd": 0.05}  # fmt: skip
    rows = [row("sketch", rank, 1.25, 0.85, trial_id="t", **seeds) for rank in (3, 6)]
    data = json.loads(rank_charts(rows, None)[0].figure)["data"]
    (band,) = [trace for trace in data if trace.get("fill") == "toself"]
    high, low = TOWARDS_ONE.place([0.85, 0.75])
    assert band["x"] == [3, 6, 6, 3]
    assert band["y"] == pytest.approx([high, high, low, low])


def test_learning_charts_tell_where_and_why_each_trial_stopped(outcome, history_of):
    trials = [
        (outcome("sketch", 2, 0, epochs=5), history_of(5)),
        (outcome("sketch", 8, 1, stopped_by="asha", epochs=2), history_of(2)),
        (outcome("direct", 8, 2, stopped_by="error", epochs=3, reason="loss is <nan>"), history_of(3)),
        (outcome("refined", 8, 3), []),
    ]
    direct, sketch = learning_charts(trials, [])
    assert [chart.title for chart in (direct, sketch)] == ["direct", "sketch"]
    assert "r008-sketch-0001 stopped by ASHA at epoch 2" in sketch.alt
    pruned = traces(sketch)["rank 8"]
    assert pruned["x"] == [1, 2]
    assert pruned["marker"]["symbol"] == ["circle", "triangle-down"]
    assert pruned["text"][-1].endswith("stopped by ASHA at epoch 2")
    failed = traces(direct)["rank 8"]["text"][-1]
    assert "failed at epoch 3: loss is <nan>" in failed
    assert "<nan>" not in direct.figure


def test_a_trial_trained_again_gets_a_band_over_its_seeds(outcome, history_of):
    from dataclasses import replace

    trial = (outcome("sketch", 2, 0), history_of(3))
    repeats = [
        (replace(trial[0], config=replace(trial[0].config, confirms=trial[0].config.trial_id)), history_of(3, start=s))
        for s in (2.0, 4.0)
    ]
    (chart,) = learning_charts([trial], repeats)
    band = traces(chart)["r002-sketch-0000 over 2 seeds"]
    assert band["x"] == [1, 2, 3, 3, 2, 1]
    middle, spread = 1 + 3.0, np.std([2.0, 4.0], ddof=1)
    assert band["y"][0] == pytest.approx(ABOVE_ONE.place([middle + spread])[0])


def test_trade_offs_fill_the_front(row):
    points = (FrontPoint("sketch", 3, 3, 0.25, "t", on_front=True), FrontPoint("direct", 3, 3, 0.5, "u"))
    (chart,) = tradeoff_charts([Front("search", "rank", "val_mse", "lower", points)])
    drawn = traces(chart)
    assert drawn["front"]["x"] == [3]
    assert drawn["sketch"]["marker"]["symbol"] == ["diamond"]
    assert drawn["direct"]["marker"]["symbol"] == ["square-open"]
    assert "On the front: t at rank 3" in chart.alt


def test_the_spectrum_is_the_singular_values_over_the_first(features):
    data = FeatureMatrix(features)
    spectrum = measure_spectrum(data, (5, 6, 7))
    expected = torch.linalg.svdvals(data.load([5, 6, 7]).double())
    assert spectrum.values_NK == pytest.approx((expected / expected[:, :1]).numpy(), abs=1e-6)
    energy = expected.square()
    left = 1 - energy.cumsum(1) / energy.sum(1, keepdim=True)
    assert spectrum.left_K == pytest.approx(left.mean(0).numpy(), abs=1e-9)
    assert spectrum.rank_for(spectrum.cosine_K[4]) == 5
    values, left_chart = spectrum_charts(spectrum, [3])
    assert traces(values)["mean"]["y"] == pytest.approx(spectrum.values_NK.mean(0))
    assert f"{spectrum.left_K[2]:.3g} at rank 3" in left_chart.alt


def journal_of(path, complete, pruned=0):
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name="s")
    spaces = {"rank": CategoricalDistribution((2, 4)), "lr": FloatDistribution(1e-4, 1e-1, log=True)}
    for number in range(complete + pruned):
        params = {"rank": (2, 4)[number % 2], "lr": 10 ** -(1 + number % 3)}
        state = optuna.trial.TrialState.COMPLETE if number < complete else optuna.trial.TrialState.PRUNED
        value = 1.0 + params["rank"] if number < complete else None
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=value, state=state))
    return path


def test_optuna_draws_the_search_from_its_journal(tmp_path):
    path = journal_of(tmp_path / "optuna.journal", LEAST_FOR_IMPORTANCE, pruned=3)
    views = search_views(path, "val_residual_ratio")
    assert [chart.id for chart in views.charts] == ["chart-coordinates", "chart-importance"]
    assert views.importances[0][0] == "rank"
    assert views.importances[0][1] > 0.5
    assert "10 complete, 3 pruned" in views.notes[0]


def test_an_importance_that_cannot_be_had_is_said_in_words(tmp_path):
    few = search_views(journal_of(tmp_path / "few", 4, pruned=9), "val_residual_ratio")
    assert [chart.id for chart in few.charts] == ["chart-coordinates"]
    assert f"needs {LEAST_FOR_IMPORTANCE} complete trials at least, and this study has 4" in few.notes[-1]
    none = search_views(journal_of(tmp_path / "none", 0, pruned=2), "val_residual_ratio")
    assert none.charts == ()
    absent = search_views(tmp_path / "absent", "val_residual_ratio")
    assert absent.charts == () and "No search journal" in absent.notes[0]
    (tmp_path / "torn").write_text('{"op_code": 0, "worker')
    assert search_views(tmp_path / "torn", "val_mse").charts == ()


def test_json_cannot_end_its_script_element():
    text = script_safe(json.dumps({"name": "</script><script>alert(1)"}))
    assert "<" not in text
    assert json.loads(text) == {"name": "</script><script>alert(1)"}
