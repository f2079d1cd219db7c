"""The comparison's figures against numpy, its files against their contract, and what it does with broken parts."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import ttest_rel

from lowrank_tune.comparison.choice import winners
from lowrank_tune.comparison.compare import read_comparison
from lowrank_tune.errors import InputError
from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.decomposers import load_decomposer
from lowrank_tune.lowrank.svd import Optimum
from lowrank_tune.records import TEST_OPTIMUM

CONTRACT = [
    "method", "rank", "n_images", "token_cosine_mean", "token_cosine_sd", "flat_cosine_mean", "mse_mean",
    "residual_ratio_mean", "residual_ratio_max", "bytes_per_image", "images_per_second", "trial_id",
]  # fmt: skip
FURTHER = [
    "seeds", "residual_ratio_seed_mean", "residual_ratio_seed_sd", "token_cosine_seed_mean", "token_cosine_seed_sd",
    "token_cosine_minus_svd", "token_cosine_minus_svd_low", "token_cosine_minus_svd_high", "val_token_cosine", "chosen",
]  # fmt: skip
METHODS = {"svd", "svd_rows", "random_sketch", "pca_basis", "power_1", "randomized_svd", "sketch", "direct"}


def figures(x_ND, y_ND):
    """Token cosine, flat cosine, mse and residual of one image, straight from their definitions."""
    dots, lengths = (x_ND * y_ND).sum(1), np.linalg.norm(x_ND, axis=1) * np.linalg.norm(y_ND, axis=1)
    flat = (x_ND * y_ND).sum() / (np.linalg.norm(x_ND) * np.linalg.norm(y_ND))
    return (dots / lengths).mean(), flat, ((x_ND - y_ND) ** 2).mean(), ((x_ND - y_ND) ** 2).sum()


def truncated(x_TD, rank):
    u, s, vh = np.linalg.svd(x_TD.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


def test_comparison_json_is_a_list_of_the_contracts_keys_and_then_of_what_seeds_pairs_and_validation_tell(compared):
    study, comparison = compared
    rows = strict((study.directory / "comparison.json").read_text())
    assert all(list(row) == CONTRACT + FURTHER for row in rows)
    assert rows == [asdict(row) for row in comparison.rows]
    assert {(row["method"], row["rank"]) for row in rows} == {(method, rank) for method in METHODS for rank in (2, 6)}
    trials = {outcome.config.trial_id for outcome in study.outcomes}
    assert {row["trial_id"] for row in rows if row["method"] in ("sketch", "direct")} == trials
    assert {row["trial_id"] for row in rows if row["method"] not in ("sketch", "direct")} == {""}
    assert all(row["images_per_second"] > 0 for row in rows)
    assert [path.name for path in study.directory.iterdir() if path.name.startswith(".")] == []
    assert comparison.data == "6 test images, [16, 24] features of synthetic (pretrained weights)"
    assert comparison.device.startswith("one CPU thread")
    assert comparison.remarks and read_comparison(study.directory, "val_mse") == comparison


def test_svds_rows_are_numpys_svd_and_its_optimum_is_kept(compared, find_row):
    study, comparison = compared
    images = study.test_images().double().numpy()
    for rank in (2, 6):
        expected = np.array([figures(x, truncated(x, rank)) for x in images])
        row = find_row(comparison.rows, "svd", rank)
        assert row.n_images == 6
        assert row.token_cosine_mean == pytest.approx(expected[:, 0].mean(), rel=1e-9)
        assert row.token_cosine_sd == pytest.approx(expected[:, 0].std(ddof=1), rel=1e-6)
        assert row.flat_cosine_mean == pytest.approx(expected[:, 1].mean(), rel=1e-9)
        assert row.mse_mean == pytest.approx(expected[:, 2].mean(), rel=1e-9)
        assert (row.residual_ratio_mean, row.residual_ratio_max) == (1.0, 1.0)
        kept = Optimum.load(study.directory / TEST_OPTIMUM).at(rank)
        assert kept.residual_N.numpy() == pytest.approx(expected[:, 3], rel=1e-9)


def reconstructions(path, x_NTD):
    with torch.inference_mode():
        a_NTR, b_NRD = load_decomposer(path)(x_NTD)
    return (a_NTR.double() @ b_NRD.double()).numpy()


@pytest.mark.parametrize("family", ["sketch", "direct"])
def test_a_trained_familys_row_is_its_models_reconstruction(compared, find_row, family):
    study, comparison = compared
    row = find_row(comparison.rows, family, 6)
    made = reconstructions(study.directory / "trials" / row.trial_id / "best_model.safetensors", study.test_images())
    images = study.test_images().double().numpy()
    expected = np.array([figures(x, y) for x, y in zip(images, made, strict=True)])
    ratios = [figures(x, y)[3] / figures(x, truncated(x, 6))[3] for x, y in zip(images, made, strict=True)]
    assert row.token_cosine_mean == pytest.approx(expected[:, 0].mean(), rel=1e-6)
    assert row.flat_cosine_mean == pytest.approx(expected[:, 1].mean(), rel=1e-6)
    assert row.mse_mean == pytest.approx(expected[:, 2].mean(), rel=1e-6)
    assert row.residual_ratio_mean == pytest.approx(np.mean(ratios), rel=1e-6)
    assert row.residual_ratio_max == pytest.approx(np.max(ratios), rel=1e-6)


def test_pca_basis_knows_the_training_images_only(compared, find_row):
    study, comparison = compared
    train = study.x_NTD[list(study.split.train)].double().numpy()
    axes = np.linalg.eigh(sum(x.T @ x / (x**2).sum() for x in train))[1][:, ::-1][:, :6]
    ratios = []
    for x in study.test_images().double().numpy():
        q = np.linalg.qr(x @ axes)[0]
        ratios.append(figures(x, q @ (q.T @ x))[3] / figures(x, truncated(x, 6))[3])
    row = find_row(comparison.rows, "pca_basis", 6)
    assert row.residual_ratio_mean == pytest.approx(np.mean(ratios), rel=1e-4)


def test_per_image_figures_average_to_the_rows_and_none_beats_the_optimum(compared):
    study, comparison = compared
    per_image = pd.read_parquet(comparison.per_image_path)
    assert list(per_image.columns) == [
        "method", "rank", "key", "index", "token_cosine", "flat_cosine", "mse", "residual", "residual_ratio"
    ]  # fmt: skip
    assert set(per_image["method"]) == METHODS
    assert per_image["residual_ratio"].min() >= 1 - 1e-6
    for row in comparison.rows:
        own = per_image[(per_image["method"] == row.method) & (per_image["rank"] == row.rank)]
        assert own["index"].tolist() == list(range(6))
        assert own["key"].tolist() == [study.features.rows[index].key for index in study.split.test]
        assert own["token_cosine"].mean() == pytest.approx(row.token_cosine_mean)
        assert own["residual_ratio"].max() == pytest.approx(row.residual_ratio_max)


def test_the_difference_to_the_svd_is_paired_image_by_image(compared, find_row):
    _, comparison = compared
    per_image = pd.read_parquet(comparison.per_image_path)
    for row in comparison.rows:
        cosines = [
            per_image[(per_image["method"] == method) & (per_image["rank"] == row.rank)]["token_cosine"].to_numpy()
            for method in (row.method, "svd")
        ]
        low, high = row.token_cosine_minus_svd_low, row.token_cosine_minus_svd_high
        assert row.token_cosine_minus_svd == pytest.approx((cosines[0] - cosines[1]).mean(), abs=1e-12)
        if row.method == "svd":
            assert (low, high) == (0.0, 0.0)
        else:
            expected = ttest_rel(*cosines).confidence_interval(0.95)
            assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert find_row(comparison.rows, "random_sketch", 2).token_cosine_minus_svd_high < 0


def test_seeds_stand_in_the_row_of_the_trial_that_they_repeat(compared, find_row):
    study, comparison = compared
    images = study.test_images().double().numpy()
    ratios, cosines = [], []
    for repeat in study.confirmations[:3]:
        made = reconstructions(Path(repeat.directory) / "best_model.safetensors", study.test_images())
        pairs = list(zip(images, made, strict=True))
        ratios.append(np.mean([figures(x, y)[3] / figures(x, truncated(x, 6))[3] for x, y in pairs]))
        cosines.append(np.mean([figures(x, y)[0] for x, y in pairs]))
    row, one = find_row(comparison.rows, "direct", 6), find_row(comparison.rows, "sketch", 2)
    assert (row.seeds, one.seeds) == (3, 1)
    assert row.residual_ratio_seed_mean == pytest.approx(np.mean(ratios), rel=1e-5)
    assert row.residual_ratio_seed_sd == pytest.approx(np.std(ratios, ddof=1), rel=1e-5)
    assert row.token_cosine_seed_mean == pytest.approx(np.mean(cosines), rel=1e-5)
    assert row.token_cosine_seed_sd == pytest.approx(np.std(cosines, ddof=1), rel=1e-4)
    assert one.residual_ratio_seed_mean > 1
    assert (one.residual_ratio_seed_sd, one.token_cosine_seed_sd) == (None, None)
    others = {(other.seeds, other.residual_ratio_seed_mean) for other in comparison.rows if other not in (row, one)}
    assert others == {(0, None)}


def test_compared_again_in_small_batches_only_speeds_differ(study, compared, monkeypatch):
    monkeypatch.setattr("lowrank_tune.comparison.methods.BATCH_NUMBERS", 4 * 16 * 24)
    batched = {(row.method, row.rank): row for row in study.compare().rows}
    for row in compared[1].rows:
        other = batched[row.method, row.rank]
        keys = ("token_cosine_mean", "token_cosine_sd", "flat_cosine_mean", "mse_mean", "residual_ratio_mean")
        for key in (*keys, "residual_ratio_max", "token_cosine_minus_svd", "token_cosine_minus_svd_low"):
            assert getattr(row, key) == pytest.approx(getattr(other, key), abs=1e-6), (row.method, key)


@pytest.mark.parametrize(("objective", "best"), [("val_residual_ratio", 1), ("val_mse", 0), ("val_token_cosine", 2)])
def test_the_objective_picks_the_trial_of_a_family_and_the_winner_over_families(make_study, find_row, objective, best):
    study = make_study(dtype=torch.float16)
    trials = [
        study.add_trial("sketch", 2, best={"val_residual_ratio": 1.5, "val_mse": 0.1, "val_token_cosine": 0.7}),
        study.add_trial(
            "sketch", 2, status="pruned", stopped_by="asha",
            best={"val_residual_ratio": 1.2, "val_mse": 0.2, "val_token_cosine": 0.8},
        ),
        study.add_trial("direct", 2, best={"val_residual_ratio": 1.3, "val_mse": 0.3, "val_token_cosine": 0.9}),
    ]  # fmt: skip
    failed = {"val_residual_ratio": 1.0, "val_mse": 0.0, "val_token_cosine": 1.0}
    study.add_trial("sketch", 2, status="failed", stopped_by="error", best=failed)
    study.add_trial("sketch", 4, best_epoch=0, best={})
    other = study.add_trial("sketch", 6)
    assert [outcome.config.trial_id for outcome in winners(study.outcomes, objective)] == [trials[best], other]
    rows = study.compare(objective).rows
    row = find_row(rows, "sketch", 2)
    assert (row.trial_id, row.bytes_per_image) == (trials[{2: 1}.get(best, best)], (16 + 24) * 2 * 2)
    assert {row.rank: row.trial_id for row in rows if row.chosen} == {2: trials[best], 6: other}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def not_a_number(path: Path) -> None:
    weights, size = load_file(path), int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    save_file({name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}, path, metadata)


@pytest.mark.parametrize("spoil", [Path.unlink, cut])
def test_the_next_best_stands_in_for_a_model_that_cannot_be_read(make_study, find_row, spoil):
    study = make_study()
    lost = study.add_trial("sketch", 2, best={"val_residual_ratio": 1.0}, spoil=spoil)
    next_best = study.add_trial("sketch", 2)
    comparison = study.compare()
    assert find_row(comparison.rows, "sketch", 2).trial_id == next_best
    assert any(lost in remark for remark in comparison.remarks)


def test_a_model_of_another_shape_is_left_out(make_study):
    study = make_study()
    trial_id = study.add_trial("sketch", 2)
    other = study.add_trial("sketch", 4)
    (study.directory / "trials" / other / "best_model.safetensors").rename(
        study.directory / "trials" / trial_id / "best_model.safetensors"
    )
    comparison = study.compare()
    assert {row.method for row in comparison.rows if row.trial_id} == set()
    assert any("a sketch model of rank 4 for [16, 24], not sketch of rank 2" in remark for remark in comparison.remarks)
    assert "rank 4 has no sketch model: its one trial left none that can be used" in comparison.remarks


def test_a_model_that_gives_nan_is_told_and_leaves_no_nan(make_study):
    study = make_study()
    study.add_trial("direct", 2, spoil=not_a_number)
    comparison = study.compare()
    strict((study.directory / "comparison.json").read_text())
    assert "direct at rank 2 is left out: its factors are not finite on every test image" in comparison.remarks
    assert set(pd.read_parquet(comparison.per_image_path)["method"]) == METHODS - {"sketch", "direct"}


def test_one_test_image_has_no_spread(make_study):
    study = make_study(test=1)
    study.add_trial("sketch", 2)
    comparison = study.compare()
    assert {(row.n_images, row.token_cosine_sd, row.token_cosine_minus_svd_low) for row in comparison.rows} == {
        (1, 0.0, None)
    }
    assert all(row.token_cosine_minus_svd is not None for row in comparison.rows)
    assert any(remark.startswith("one test image only") for remark in comparison.remarks)


def test_images_of_zeros_are_left_out_and_told(make_study):
    x_NTD = torch.randn(20, 16, 24, generator=torch.Generator().manual_seed(1))
    x_NTD[[15, 18]] = 0
    study = make_study(x_NTD)
    study.add_trial("direct", 2)
    comparison = study.compare()
    assert {row.n_images for row in comparison.rows} == {4}
    assert set(pd.read_parquet(comparison.per_image_path)["index"]) == {0, 2, 3, 5}
    assert "2 of 6 test images hold nothing but zeros and are left out" in comparison.remarks


def test_an_image_of_the_ranks_own_rank_has_ratio_one_where_it_is_reproduced(make_study, find_row):
    generator = torch.Generator().manual_seed(2)
    x_NTD = torch.randn(20, 16, 2, generator=generator) @ torch.randn(20, 2, 24, generator=generator)
    x_NTD[16] = 3.0
    study = make_study(x_NTD)
    study.add_trial("sketch", 4)
    rows = study.compare().rows
    for method in ("svd", "sketch", "randomized_svd"):
        assert find_row(rows, method, 4).residual_ratio_max == pytest.approx(1.0, abs=1e-6)


def test_nothing_to_compare_is_an_input_error(make_study):
    x_NTD = torch.randn(20, 16, 24, generator=torch.Generator().manual_seed(1))
    x_NTD[14:] = 0
    study = make_study(x_NTD)
    with pytest.raises(InputError, match="no trials to compare"):
        study.compare()
    study.add_trial("sketch", 2)
    with pytest.raises(InputError, match="every test image holds nothing but zeros"):
        study.compare()
    study.split = replace(study.split, test=())
    with pytest.raises(InputError, match="no test images to compare"):
        study.compare()


def test_a_damaged_comparison_is_an_input_error(tmp_path):
    (tmp_path / "comparison.json").write_text('[{"method": "svd"}]')
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        read_comparison(tmp_path, "val_mse")


def test_a_method_that_raises_on_a_later_batch_leaves_no_row_behind(study, monkeypatch):
    monkeypatch.setattr("lowrank_tune.comparison.methods.BATCH_NUMBERS", 2 * 16 * 24)
    calls = []

    def fails_second(x_NTD, rank, generator):
        calls.append(rank)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("not positive definite\nmore")
        return original(x_NTD, rank, generator)

    original = baselines.power_1
    monkeypatch.setattr(baselines, "power_1", fails_second)
    comparison = study.compare()
    assert "power_1 at rank 6 is left out: not positive definite" in comparison.remarks
    assert {row.rank for row in comparison.rows if row.method == "power_1"} == {2}
    per_image = pd.read_parquet(comparison.per_image_path)
    assert set(per_image[per_image["method"] == "power_1"]["rank"]) == {2}


def test_a_repetition_that_failed_or_lost_its_model_is_told_and_the_others_count(study, find_row):
    trial_id = "r002-sketch-0000"
    study.repeat(trial_id, 11)
    study.repeat(trial_id, 12, status="failed", stopped_by="error", reason="epoch 1: val_mse not finite")
    lost = study.repeat(trial_id, 13)
    (Path(lost.directory) / "best_model.safetensors").unlink()
    comparison = study.compare()
    assert find_row(comparison.rows, "sketch", 2).seeds == 1
    assert f"1 of 3 repetitions of {trial_id} failed: epoch 1: val_mse not finite" in comparison.remarks
    assert any(f"repetition {lost.config.trial_id} is left out" in remark for remark in comparison.remarks)


def test_repetitions_of_a_model_that_is_lost_are_in_no_row(make_study):
    study = make_study()
    lost = study.add_trial("sketch", 2, best={"val_residual_ratio": 1.0}, spoil=Path.unlink)
    study.add_trial("sketch", 2)
    study.repeat(lost, 11)
    comparison = study.compare()
    assert {row.seeds for row in comparison.rows} == {0}
    assert f"{lost} was repeated, but its own model is in no row, so neither are its repetitions" in comparison.remarks


def test_trials_that_serve_the_same_nested_ranks_have_one_winner(make_study):
    study = make_study()
    for ratio in (1.3, 1.1):
        study.add_trial("sketch", 6, best={"val_residual_ratio": ratio})
    study.outcomes = [
        replace(outcome, config=replace(outcome.config, nested_ranks=(2, 6))) for outcome in study.outcomes
    ]
    assert winners(study.outcomes, "val_residual_ratio") == [study.outcomes[1]]
