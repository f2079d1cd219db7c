"""A family with one B for all images among those that have a B an image, up to ranks that no image has."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lowrank_tune.comparison.compare import read_comparison
from lowrank_tune.comparison.remarks import about_training
from lowrank_tune.export import model_card
from lowrank_tune.lowrank.pretrained import write_exported
from lowrank_tune.measured import Comparison
from lowrank_tune.records import BEST_MODEL
from lowrank_tune.report.curves import rank_curve
from lowrank_tune.report.tables import comparison_tables, studies_table, summary_table
from tests.comparison.small_study import DIM, TOKENS, Study, build_study, find_row, make_row

ABOVE = 20
"""A rank above the images' 16 tokens, and below their 24 columns."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Comparison]:
    study = build_study(tmp_path_factory.mktemp("shared"))
    for rank in (6, ABOVE):
        study.add_trial("shared", rank)
    study.add_trial("sketch", 6, best={"val_residual_ratio": 2.0, "val_mse": 0.3, "val_token_cosine": 0.8})
    study.outcomes[1] = replace(study.outcomes[1], best={"val_mse": 0.2, "val_token_cosine": 0.95})
    return study, study.compare("val_mse")


def test_an_image_keeps_a_alone_and_b_is_counted_once(shared):
    rows = shared[1].rows
    for rank in (6, ABOVE):
        row = find_row(rows, "shared", rank)
        assert (row.bytes_per_image, row.shared_bytes) == (TOKENS * rank * 4, DIM * rank * 4)
    assert find_row(rows, "sketch", 6).bytes_per_image == (TOKENS + DIM) * 6 * 4
    assert all(row.shared_bytes == 0 for row in rows if row.method != "shared")


def test_above_the_images_rank_there_are_figures_but_no_ratio_and_nothing_to_hold_against(shared):
    study, comparison = shared
    assert [row.method for row in comparison.rows if row.rank == ABOVE] == ["shared"]
    row = find_row(comparison.rows, "shared", ABOVE)
    ratios = (row.residual_ratio, row.residual_ratio_mean, row.residual_ratio_max, row.residual_ratio_median)
    held = (row.residual_ratio_low, row.residual_ratio_high, row.training_gain, row.token_cosine_minus_svd)
    assert set(ratios + held) == {None}
    assert row.mse_mean < find_row(comparison.rows, "shared", 6).mse_mean
    assert row.chosen and row.images_per_second > 0
    assert find_row(comparison.rows, "shared", 6).residual_ratio > 1
    table = pd.read_parquet(comparison.per_image_path)
    own = table[(table["method"] == "shared") & (table["rank"] == ABOVE)]
    assert len(own) == 6 and own["residual_ratio"].isna().all() and np.isfinite(own["mse"]).all()
    assert json.loads((study.directory / "comparison.json").read_text())
    assert read_comparison(study.directory, "val_mse") == comparison


def test_bytes_against_error_have_no_factors_of_what_shares_its_b(shared):
    compression = shared[1].compression
    assert {row.method for row in (*compression.stored, *compression.pruned)} == {"x", "svd"}
    assert {row.rank for row in compression.stored} == {0, 6}
    assert {(row.method, row.rank) for row in compression.models} == {("shared", 6), ("shared", ABOVE), ("sketch", 6)}


def test_one_remark_says_why_its_ratio_is_above_one_and_what_b_is_among_the_images(shared):
    row = find_row(shared[1].rows, "shared", 6)
    (said,) = [remark for remark in shared[1].remarks if "one B for all images" in remark]
    assert f"its ρ is above 1: {row.residual_ratio:.3f} at rank 6. " in said
    assert "the 20 images together one B: 0.562 KiB at rank 6 (0.0281 KiB an image)" in said
    assert any(f"no ρ at rank {ABOVE}" in remark for remark in shared[1].remarks)
    assert not row.beaten_by and not row.level_with, "at the same rank it takes other bytes"


def test_nothing_is_said_of_its_training_by_the_ratio_alone():
    gain = {"training_gain": 0.0, "training_gain_low": -0.01, "training_gain_high": 0.01}
    assert about_training([make_row("sketch", 4, **gain)])
    assert not about_training([make_row("shared", 4, **gain, shared_bytes=100)])


def test_the_report_and_a_models_card_tell_it(shared, tmp_path):
    study, comparison = shared
    assert rank_curve(comparison.rows).axes
    for table in (summary_table(comparison), studies_table({"study": comparison})):
        assert table.rows
    assert comparison_tables(comparison).renderables
    assert "where there is no ρ" in str(summary_table(comparison).rows)
    trial = study.outcomes[1]
    weights = study.directory / "trials" / trial.config.trial_id / BEST_MODEL
    model = write_exported(tmp_path / "model", weights, ABOVE, "study", trial.config, study.features)
    card = model_card(model, study.features, comparison)
    assert "1.2 times fewer\nnumbers, for B is the same for every image." in card.text
    assert {result.metric_type for result in card.data.eval_results} == {"mse", "token_cosine"}
