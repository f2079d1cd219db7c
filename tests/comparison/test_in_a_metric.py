"""A study whose folder holds a metric of the answers: ρ_W of every method, and what is optimal or trained in it."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from lowrank_tune.comparison.compare import read_comparison
from lowrank_tune.lowrank.baselines import svd
from lowrank_tune.lowrank.weighted import METRIC
from lowrank_tune.measured import Comparison, ComparisonRow
from lowrank_tune.records import ANSWERS_METRIC
from tests.comparison.small_study import DIM, Study, build_study, find_row

TRAINED = ["refined", "refined_weighted", "shared", "shared_weighted", "sketch"]


def compared_in(
    home: Path, metric: torch.Tensor, trained: list[str], ranks: tuple[int, ...]
) -> tuple[Study, Comparison]:
    study = build_study(home)
    save_file({METRIC: metric}, study.directory / ANSWERS_METRIC)
    for rank in ranks:
        for method in trained:
            study.add_trial(method, rank)
    for method in ("shared", "shared_weighted"):  # at a rank that holds an image to some error
        study.add_trial(method, 16)
    return study, study.compare()


@pytest.fixture(scope="module")
def metric() -> torch.Tensor:
    axes = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(2))).Q
    return (axes * torch.logspace(0, -3, DIM)) @ axes.mT


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, metric: torch.Tensor) -> tuple[Study, Comparison]:
    return compared_in(tmp_path_factory.mktemp("weighted"), metric, TRAINED, (2, 6))


def rows_of(comparison: Comparison, rank: int) -> dict[str, ComparisonRow]:
    return {row.method: row for row in comparison.rows if row.rank == rank}


@pytest.mark.parametrize("rank", [2, 6])
def test_every_method_has_its_ratio_in_the_metric_none_below_its_optimum(compared, rank):
    rows = rows_of(compared[1], rank)
    assert set(rows) >= {"svd", "svd_weighted", "svd_rows", "gram_eigh", *TRAINED}
    assert rows["svd_weighted"].residual_ratio_weighted == 1 < rows["svd_weighted"].residual_ratio
    for row in rows.values():
        assert row.residual_ratio_weighted_low <= row.residual_ratio_weighted <= row.residual_ratio_weighted_high
        assert row.residual_ratio_weighted >= 1 - 1e-6 and row.residual_ratio >= 1 - 1e-6
    for family in ("refined", "shared"):
        plain, weighted = rows[family], rows[f"{family}_weighted"]
        assert weighted.residual_ratio_weighted < plain.residual_ratio_weighted
        assert weighted.residual_ratio > plain.residual_ratio
    assert rows["refined_weighted"].residual_ratio_weighted < 1.1


def test_the_ratio_is_that_of_the_svd_of_x_times_the_metrics_root(compared, metric):
    study, comparison = compared
    values, vectors = torch.linalg.eigh(metric.double())
    root, x = (vectors * values.sqrt()) @ vectors.mT, study.test_images().double()
    least = torch.linalg.svdvals(x @ root)[:, 6:].square().sum(-1)
    a, b = svd(x, 6)
    expected = ((x - a @ b) @ root).square().sum((-2, -1)) / least
    assert find_row(comparison.rows, "svd", 6).residual_ratio_weighted == pytest.approx(
        expected.log().mean().exp().item(), rel=1e-4
    )
    table = pd.read_parquet(comparison.per_image_path)
    own = table[(table["method"] == "svd") & (table["rank"] == 6)].sort_values("index")
    assert own["residual_ratio_weighted"].tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_what_is_trained_in_the_metric_is_held_against_nothing_without_it_and_coded_beside_what_is_not(compared):
    study, comparison = compared
    for row in comparison.rows:
        if row.method.endswith("_weighted"):
            assert not row.beaten_by and not row.level_with
    assert find_row(comparison.rows, "refined", 2).beaten_by or find_row(comparison.rows, "refined", 2).level_with
    coded = {row.method for row in comparison.compression.rates if row.shared_bytes and row.dtype == "coded"}
    assert {"shared", "shared_weighted"} <= coded
    for row in comparison.compression.rates:
        if row.method == "shared_weighted":
            assert row.relative_error_max <= float(row.target) * 1.001
    assert read_comparison(study.directory, "val_residual_ratio") == comparison
    told = json.loads((study.directory / "comparison.json").read_text())
    assert {row["method"] for row in told if row["residual_ratio_weighted"] is None} == set()


def test_a_metric_of_equal_directions_gives_the_figures_without_one(tmp_path):
    _, comparison = compared_in(tmp_path, torch.eye(DIM), ["refined", "direct"], (3,))
    rows = rows_of(comparison, 3)
    for row in rows.values():
        assert row.residual_ratio_weighted == pytest.approx(row.residual_ratio, rel=1e-9)
    for name in ("residual_ratio", "mse_mean", "token_cosine_mean", "flat_cosine_mean", "token_cosine_minus_svd"):
        assert getattr(rows["svd_weighted"], name) == pytest.approx(getattr(rows["svd"], name), rel=1e-9, abs=1e-12)
