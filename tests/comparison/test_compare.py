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
from scipy.stats import gmean, ttest_1samp, ttest_rel

from lowrank_tune.comparison.choice import winners
from lowrank_tune.comparison.compare import read_comparison
from lowrank_tune.comparison.intervals import interval
from lowrank_tune.errors import InputError
from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.decomposers import load_decomposer, make_decomposer, save_decomposer
from lowrank_tune.lowrank.svd import Optimum
from lowrank_tune.records import TEST_OPTIMUM, TrialConfig
from tests.comparison.small_study import find_row, images

CONTRACT = [
    "method", "rank", "n_images", "token_cosine_mean", "token_cosine_sd", "flat_cosine_mean", "mse_mean",
    "residual_ratio_mean", "residual_ratio_max", "bytes_per_image", "images_per_second", "trial_id",
]  # fmt: skip
FURTHER = [
    "seeds", "residual_ratio_seed_mean", "residual_ratio_seed_sd", "token_cosine_seed_mean", "token_cosine_seed_sd",
    "token_cosine_minus_svd", "token_cosine_minus_svd_low", "token_cosine_minus_svd_high", "val_token_cosine", "chosen",
    "n_groups", "residual_ratio", "residual_ratio_low", "residual_ratio_high", "residual_ratio_median", "training_gain",
    "training_gain_low", "training_gain_high", "shared_bytes",
    "residual_ratio_weighted", "residual_ratio_weighted_low", "residual_ratio_weighted_high",
]  # fmt: skip
METHODS = {
    "svd",
    "svd_rows",
    "random_sketch",
    "pca_basis",
    "power_1",
    "randomized_svd",
    "gram_eigh",
    "sketch",
    "direct",
}


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
    assert rows == [{key: value for key, value in asdict(row).items() if key in rows[0]} for row in comparison.rows]
    assert {(row["method"], row["rank"]) for row in rows} == {(method, rank) for method in METHODS for rank in (2, 6)}
    trials = {outcome.config.trial_id for outcome in study.outcomes}
    assert {row["trial_id"] for row in rows if row["method"] in ("sketch", "direct")} == trials
    assert {row["trial_id"] for row in rows if row["method"] not in ("sketch", "direct")} == {""}
    assert all(row["images_per_second"] > 0 for row in rows)
    assert [path.name for path in study.directory.iterdir() if path.name.startswith(".")] == []
    assert comparison.data == "6 test images, [16, 24] features of synthetic (pretrained weights)"
    assert comparison.device.removeprefix("one CPU thread (").removesuffix(")").strip()
    assert comparison.remarks and read_comparison(study.directory, "val_mse") == comparison


def reconstructions(path, x_NTD):
    with torch.inference_mode():
        a_NTR, b_NRD = load_decomposer(path)(x_NTD)
    return (a_NTR.double() @ b_NRD.double()).numpy()


def by_training_axes(study, images):
    """The projection on the main axes of the training images only."""
    train = study.x_NTD[list(study.split.train)].double().numpy()
    axes = np.linalg.eigh(sum(x.T @ x / (x**2).sum() for x in train))[1][:, ::-1][:, :6]
    q_NTR = np.linalg.qr(images @ axes)[0]
    return q_NTR @ (q_NTR.swapaxes(1, 2) @ images)


@pytest.mark.parametrize(("method", "rel"), [("svd", 1e-9), ("sketch", 1e-6), ("direct", 1e-6), ("pca_basis", 1e-4)])
def test_a_row_is_the_figures_of_its_methods_reconstructions(compared, method, rel):
    study, comparison = compared
    images, row = study.test_images().double().numpy(), find_row(comparison.rows, method, 6)
    optimum = [truncated(x, 6) for x in images]
    if row.trial_id:
        made = reconstructions(
            study.directory / "trials" / row.trial_id / "best_model.safetensors", study.test_images()
        )
    else:
        made = optimum if method == "svd" else by_training_axes(study, images)
    cosines, flat, mse, residuals = np.array([figures(x, y) for x, y in zip(images, made, strict=True)]).T
    least = np.array([figures(x, y)[3] for x, y in zip(images, optimum, strict=True)])
    assert row.n_images == 6
    assert row.token_cosine_mean == pytest.approx(cosines.mean(), rel=rel)
    assert row.token_cosine_sd == pytest.approx(cosines.std(ddof=1), rel=max(rel, 1e-6) * 100)
    assert row.flat_cosine_mean == pytest.approx(flat.mean(), rel=rel)
    assert row.mse_mean == pytest.approx(mse.mean(), rel=rel)
    assert row.residual_ratio_mean == pytest.approx((residuals / least).mean(), rel=rel)
    assert row.residual_ratio_max == pytest.approx((residuals / least).max(), rel=rel)
    kept = Optimum.load(study.directory / TEST_OPTIMUM).at(6)
    assert kept.residual_N.numpy() == pytest.approx(least, rel=1e-9)


def test_per_image_figures_average_to_the_rows_and_none_beats_the_optimum(compared):
    study, comparison = compared
    per_image = pd.read_parquet(comparison.per_image_path)
    assert list(per_image.columns) == [
        "method", "rank", "key", "index", "token_cosine", "flat_cosine", "mse", "residual", "residual_ratio", "group"
    ]  # fmt: skip
    assert set(per_image["method"]) == METHODS
    assert per_image["residual_ratio"].min() >= 1 - 1e-6
    for row in comparison.rows:
        own = per_image[(per_image["method"] == row.method) & (per_image["rank"] == row.rank)]
        assert own["index"].tolist() == list(range(6))
        assert own["key"].tolist() == [study.features.rows[index].key for index in study.split.test]
        assert own["token_cosine"].mean() == pytest.approx(row.token_cosine_mean)
        assert own["residual_ratio"].max() == pytest.approx(row.residual_ratio_max)


def test_the_difference_to_the_svd_is_paired_image_by_image(compared):
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


def test_the_ratio_is_told_by_its_logarithms_mean_with_an_interval_and_its_median(compared):
    _, comparison = compared
    per_image = pd.read_parquet(comparison.per_image_path)
    for row in comparison.rows:
        own = per_image[(per_image["method"] == row.method) & (per_image["rank"] == row.rank)]["residual_ratio"]
        assert row.residual_ratio == pytest.approx(gmean(own))
        assert row.residual_ratio_median == pytest.approx(own.median())
        if row.method != "svd":
            expected = ttest_1samp(np.log(own), 0).confidence_interval(0.95)
            assert (row.residual_ratio_low, row.residual_ratio_high) == pytest.approx(np.exp(expected))


def test_an_interval_is_over_groups_of_images():
    """Of 400 draws, 8 groups of 5 images that share half of their variance: 95 of 100 intervals hold the truth."""
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(8), 5)
    draws = pd.concat(
        pd.DataFrame({"method": "m", "rank": draw, "group": group, "image": range(40),
                      "x": generator.normal(size=8)[group] + generator.normal(size=40)}) for draw in range(400)
    )  # fmt: skip
    held = {}
    for by in ("group", "image"):
        mean, half = interval(draws.assign(group=draws[by]), "x")
        held[by] = (mean.abs() <= half).mean()
    assert 0.92 <= held["group"] <= 0.98
    assert held["image"] < 0.8
    one = draws[draws["group"] == 0]
    assert interval(one, "x")[1].isna().all()


def test_groups_of_images_widen_the_intervals_and_are_counted(study, make_study):
    alone = study.compare()
    study.groups = ["a", "b"] * 10
    grouped = study.compare()
    assert {row.n_groups for row in alone.rows} == {6}
    assert {row.n_groups for row in grouped.rows} == {2}
    assert "the 6 test images come from only 2 groups: intervals are wide" in grouped.remarks
    assert set(pd.read_parquet(grouped.per_image_path)["group"]) == {"a", "b"}
    study.groups = ["a"] * 20
    one = study.compare()
    assert {row.residual_ratio_low for row in one.rows} == {None}
    assert any("belong to one group: no interval" in remark for remark in one.remarks)


def test_every_trained_row_tells_what_training_added_to_the_model_it_began_with(make_study):
    study = make_study()
    for family in ("sketch", "direct"):
        study.add_trial(family, 6)
    study.nudge("r006-direct-0001", 0.5)
    rows = study.compare().rows
    start, worse = find_row(rows, "sketch", 6), find_row(rows, "direct", 6)
    assert (start.training_gain, start.training_gain_low, start.training_gain_high) == (0, 0, 0)
    assert worse.training_gain_low < worse.training_gain < worse.training_gain_high < 0
    assert {row.training_gain for row in rows if not row.trial_id} == {None}
    assert any("training adds nothing measurable to sketch here, at rank 6" in said for said in study.compare().remarks)


def test_images_that_the_svd_leaves_nothing_of_are_counted(make_study):
    x_NTD = torch.randn(20, 16, 24, generator=torch.Generator().manual_seed(0))
    x_NTD[18:] = x_NTD[18:, :, :4] @ x_NTD[18:, :4]  # rank 4
    study = make_study(x_NTD)
    study.add_trial("sketch", 6)
    assert any("of the energy of 2 of 6 test images" in remark for remark in study.compare().remarks)


def test_seeds_stand_in_the_row_of_the_trial_that_they_repeat(compared):
    study, comparison = compared
    images = study.test_images().double().numpy()
    ratios, cosines = [], []
    for repeat in study.confirmations[:3]:
        made = reconstructions(Path(repeat.directory) / "best_model.safetensors", study.test_images())
        pairs = list(zip(images, made, strict=True))
        ratios.append(gmean([figures(x, y)[3] / figures(x, truncated(x, 6))[3] for x, y in pairs]))
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


def test_in_small_batches_only_speeds_differ_and_images_of_zeros_are_left_out_and_told(make_study, monkeypatch):
    x_NTD = images()
    x_NTD[[15, 18]] = 0
    study = make_study(x_NTD)
    study.add_trial("sketch", 4)
    whole = study.compare()
    per_image = pd.read_parquet(whole.per_image_path).sort_values(["method", "index"], ignore_index=True)
    assert {row.n_images for row in (*whole.rows, *whole.compression.stored, *whole.compression.pruned)} == {4}
    assert set(per_image["index"]) == {0, 2, 3, 5}
    assert "2 of 6 test images hold nothing but zeros and are left out" in whole.remarks
    monkeypatch.setattr("lowrank_tune.comparison.methods.NUMBERS_AT_ONCE", 16 * 24)
    single = study.compare()
    again = pd.read_parquet(whole.per_image_path).sort_values(["method", "index"], ignore_index=True)
    pd.testing.assert_frame_equal(per_image, again, rtol=1e-5)
    for one, other in zip(whole.compression.stored, single.compression.stored, strict=True):
        assert one.relative_error_mean == pytest.approx(other.relative_error_mean, rel=1e-4)
    for one, other in zip(whole.compression.pruned, single.compression.pruned, strict=True):
        assert one.bytes_per_image == other.bytes_per_image


@pytest.mark.parametrize(("objective", "best"), [("val_residual_ratio", 1), ("val_mse", 0), ("val_token_cosine", 2)])
def test_the_objective_picks_the_trial_of_a_family_and_the_winner_over_families(make_study, objective, best):
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


def of_another_rank(path: Path) -> None:
    config = TrialConfig("", 0, 0, "sketch", 4, 1e-3, 0.0, 4, 5, 5)
    save_decomposer(make_decomposer(config, 16, 24), path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(Path.unlink, ""), (cut, ""), (of_another_rank, "a sketch model of rank 4 for [16, 24], not sketch of rank 2")],
)
def test_the_next_best_stands_in_for_a_model_that_cannot_be_used(make_study, spoil, said):
    study = make_study()
    lost = study.add_trial("sketch", 2, best={"val_residual_ratio": 1.0}, spoil=spoil)
    next_best = study.add_trial("sketch", 2)
    study.add_trial("direct", 4, spoil=Path.unlink)
    comparison = study.compare()
    assert find_row(comparison.rows, "sketch", 2).trial_id == next_best
    assert any(lost in remark and said in remark for remark in comparison.remarks)
    assert "rank 4 has no direct model: its one trial left none that can be used" in comparison.remarks


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


def test_an_image_of_the_ranks_own_rank_has_ratio_one_where_it_is_reproduced(make_study):
    generator = torch.Generator().manual_seed(2)
    x_NTD = torch.randn(20, 16, 2, generator=generator) @ torch.randn(20, 2, 24, generator=generator)
    x_NTD[16] = 3.0
    study = make_study(x_NTD)
    study.add_trial("sketch", 4)
    rows = study.compare().rows
    for method in ("svd", "sketch", "randomized_svd"):
        assert find_row(rows, method, 4).residual_ratio_max == pytest.approx(1.0, abs=1e-6)


def test_nothing_to_compare_is_an_input_error(make_study):
    x_NTD = images()
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
    assert read_comparison(tmp_path, "val_mse") is None
    (tmp_path / "comparison.json").write_text('[{"method": "svd"}]')
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        read_comparison(tmp_path, "val_mse")


def test_a_method_that_raises_on_a_later_batch_leaves_no_row_behind(study, monkeypatch):
    monkeypatch.setattr("lowrank_tune.comparison.methods.NUMBERS_AT_ONCE", 2 * 16 * 24)
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


def test_a_repetition_that_failed_or_lost_its_model_is_told_and_the_others_count(study):
    trial_id = "r002-sketch-0000"
    study.repeat(trial_id, 11)
    study.repeat(trial_id, 12, status="failed", stopped_by="error", reason="epoch 1: val_mse not finite")
    lost = study.repeat(trial_id, 13)
    (Path(lost.directory) / "best_model.safetensors").unlink()
    unread = study.add_trial("sketch", 6, best={"val_residual_ratio": 1.0})
    study.repeat(unread, 11)
    (study.directory / "trials" / unread / "best_model.safetensors").unlink()
    comparison = study.compare()
    assert find_row(comparison.rows, "sketch", 2).seeds == 1
    assert find_row(comparison.rows, "sketch", 6).seeds == 0
    assert f"1 of 3 repetitions of {trial_id} failed: epoch 1: val_mse not finite" in comparison.remarks
    assert any(f"repetition {lost.config.trial_id} is left out" in remark for remark in comparison.remarks)
    said = f"{unread} was repeated, but its own model is in no row, so neither are its repetitions"
    assert said in comparison.remarks
