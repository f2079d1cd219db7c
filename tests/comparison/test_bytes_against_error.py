"""Bytes against error on the test split: figures from their definitions, targets that are met, words that are true."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lowrank_tune.comparison.compare import read_comparison
from lowrank_tune.comparison.compression import DTYPES, TARGETS
from lowrank_tune.comparison.remarks import compression_texts, which_are_beaten
from lowrank_tune.lowrank.quantization import COUNT_BYTES
from lowrank_tune.measured import Compression, Pictures, PrunedRow, QuantisedRow, RateRow, StoredRow
from tests.comparison.small_study import images

LEVELS = {"int8": 127, "int5": 15, "int4": 7}
BITS = {"float16": 16, "int8": 8, "int5": 5, "int4": 4}


def find(rows, **wanted):
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def quantised(x, dtype):
    """A scale a row, straight from the definition."""
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float64)
    scale = np.abs(x).max(axis=-1, keepdims=True) / LEVELS[dtype]
    return np.round(x / scale) * scale


def relative_error(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(x)


def packed(rows, count, dtype):
    return rows * (-(-count * BITS[dtype] // 8) + (0 if dtype == "float16" else 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rows_of_the_features_and_of_the_svd_are_numpys(compared, dtype):
    """The SVD with √Σ in either factor."""
    study, comparison = compared
    for rank in (0, 2, 6):
        (row,) = find(comparison.compression.stored, method="svd" if rank else "x", rank=rank, dtype=dtype)
        errors = []
        for x in study.test_images().double().numpy():
            u, s, vh = np.linalg.svd(x, full_matrices=False)
            a, b = u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank, None]) * vh[:rank]
            errors.append(relative_error(x, quantised(a, dtype) @ quantised(b, dtype) if rank else quantised(x, dtype)))
        size = packed(16, rank, dtype) + packed(rank, 24, dtype) if rank else packed(16, 24, dtype)
        assert (row.n_images, row.bytes_per_image) == (6, size)
        assert row.relative_error_mean == pytest.approx(np.mean(errors), rel=1e-3)
        assert row.relative_error_max == pytest.approx(np.max(errors), rel=1e-3)


def test_the_best_trained_method_of_each_rank_stands_beside_the_svd(compared):
    _, comparison = compared
    trained = [row for row in comparison.compression.stored if row.trial_id]
    for rank in (2, 6):
        (best,) = (row for row in comparison.best_of_each_rank() if row.rank == rank)
        own = find(trained, rank=rank)
        assert {(row.method, row.trial_id) for row in own} == {(best.method, best.trial_id)}
        assert [row.dtype for row in own] == list(DTYPES)
        unquantised = find(comparison.rows, method=best.method, rank=rank)[0].token_cosine_mean
        assert own[0].token_cosine_mean == pytest.approx(unquantised, abs=1e-4)


def test_pruned_factors_meet_their_target_on_every_image(compared):
    compression = compared[1].compression
    assert {(row.method, row.rank) for row in compression.pruned} == {("svd", 16), (compression.stored[-1].method, 6)}
    met = [row for row in compression.pruned if row.bytes_per_image is not None]
    assert {row.target for row in met} >= {"0.5", "0.1", "0.01", "int8", "int5", "int4"}
    for row in met:
        assert row.n_met == row.n_images == 6
        assert 0 < row.rank_mean <= row.rank_max <= row.rank
        assert row.bytes_per_image <= COUNT_BYTES + packed(16, row.rank_max, row.dtype) + packed(
            row.rank_max, 24, row.dtype
        )
        if row.target in TARGETS:
            assert row.relative_error_max <= float(row.target) * (1 + 1e-9)
        else:
            (control,) = find(compression.stored, method="x", dtype=row.target)
            assert row.relative_error_max <= control.relative_error_max * (1 + 1e-9)
            assert row.relative_error_mean <= control.relative_error_mean
    assert all(row.n_met < row.n_images and row.rank_mean is None for row in set(compression.pruned) - set(met))
    for dtype in DTYPES:
        sizes = [row.bytes_per_image for row in find(met, method="svd", dtype=dtype) if row.target in TARGETS]
        assert len(sizes) >= 2 and sizes == sorted(sizes), "a nearer target takes more"


def test_every_trained_model_is_quantised(compared):
    models = compared[1].compression.models
    assert {(row.method, row.rank) for row in models} == {
        (name, rank) for name in ("sketch", "direct") for rank in (2, 6)
    }
    for row in models:
        assert row.trial_id and row.quantised_bytes < row.model_bytes
        assert row.quantised_relative_error_mean == pytest.approx(row.relative_error_mean, rel=0.02)
        assert row.quantised_relative_error_mean != row.relative_error_mean


def test_what_float16_cannot_hold_is_left_out_and_the_rest_is_there(make_study):
    x_NTD = images()
    x_NTD[19] *= 1e8
    study = make_study(x_NTD)
    study.add_trial("sketch", 4)
    compression = study.compare().compression
    assert {row.dtype for row in compression.stored if row.method == "x"} == {"int8", "int5", "int4"}
    assert find(compression.stored, method="svd", dtype="int8")[0].n_images == 6
    assert all(row.relative_error_mean < 1 for row in compression.stored)


def test_the_comparison_says_which_controls_are_beaten(compared):
    _, comparison = compared
    (said,) = [remark for remark in comparison.remarks if remark.startswith("bytes against error")]
    for dtype in ("int8", "int5", "int4"):
        (control,) = find(comparison.compression.stored, method="x", dtype=dtype)
        own = find(comparison.compression.pruned, target=dtype)
        smallest = min(row.bytes_per_image for row in own if row.bytes_per_image)
        (sentence,) = [words for words in comparison.compression.words if words.startswith(f"{dtype} of X takes")]
        assert ("not beaten" in sentence) is (smallest >= control.bytes_per_image)
        assert dtype in said


def test_linear_algebra_that_fails_costs_these_figures_and_no_others(make_study, monkeypatch):
    def fail(*_):
        raise torch.linalg.LinAlgError("svd did not converge\nat all")

    monkeypatch.setattr("lowrank_tune.comparison.compression.ordered", fail)
    study = make_study()
    study.add_trial("sketch", 2)
    comparison = study.compare()
    found = comparison.compression
    assert comparison.rows and found.rates and (found.stored, found.pruned, found.models) == ((), (), ())
    (study.directory / "compression.json").unlink()
    older = replace(comparison, compression=Compression())
    assert read_comparison(study.directory, "val_mse") == older, "an older study has none"
    assert "bytes against error are left out: svd did not converge" in comparison.remarks


X = StoredRow("x", 0, "int8", 4, 65 * 1024, 0.00728, 0.008, 0.9999)
SVD = PrunedRow("svd", 256, "int8", "int8", 4, 4, 40.2, 50, 50 * 1024.0, 0.007, 0.008)
TRAINED = PrunedRow("refined", 64, "int5", "int8", 4, 4, 41.0, 52, 60 * 1024.0, 0.007, 0.008, "r064-refined-0001")
LOST = PrunedRow("refined", 64, "int8", "int8", 4, 3, trial_id="r064-refined-0001")


@pytest.mark.parametrize(
    ("pruned", "verdict"),
    [
        ([SVD, TRAINED], "int8 of X is beaten by the SVD's factors and refined's factors"),
        ([SVD, LOST], "int8 of X is beaten by the SVD's factors only"),
        ([SVD, replace(TRAINED, bytes_per_image=65 * 1024.0)], "int8 of X is beaten by the SVD's factors only"),
        ([replace(SVD, bytes_per_image=70 * 1024.0), LOST], "int8 of X is not beaten by factors"),
        ([SVD], "int8 of X is beaten by the SVD's factors"),
    ],
)
def test_a_control_is_beaten_by_fewer_bytes_at_its_error_on_every_image(pruned, verdict):
    assert which_are_beaten([X], pruned) == f"bytes against error: {verdict}"
    assert compression_texts([X], pruned, [])[0].endswith(f": {verdict}.")


def test_the_sentences_tell_bytes_error_and_components_and_what_few_bits_cost_factors_and_models():
    stored = [
        StoredRow("refined", 64, "float16", 4, 65536, 0.14521, 0.3, 0.98, "t"),
        StoredRow("refined", 64, "int8", 4, 33280, 0.14563, 0.3, 0.98, "t"),
        StoredRow("svd", 64, "int8", 4, 33280, 0.14, 0.3, 0.98),
    ]
    models = [
        QuantisedRow("sketch", 64, "t", 65536, 17664, 0.1725, 0.1726),
        QuantisedRow("refined", 64, "t", 76808, 76808, 0.145, 0.145),
    ]
    assert compression_texts([X, *stored], [SVD, LOST], models) == [
        "int8 of X takes 65 KiB an image at a relative error of 0.728 %; as near on every image, the SVD's factors "
        "take 50 KiB (int8, 40 components an image); refined's factors, up to rank 64, come as near on 3 of 4 images: "
        "int8 of X is beaten by the SVD's factors only.",
        "Factors of refined at rank 64: float16 64 KiB at 14.5 %, int8 32.5 KiB at 14.6 %.",
        "refined has learned no matrix, so quantising its model has nothing to do (75 KiB at rank 64, most of it "
        "random numbers that a seed draws).",
        "The sketch model of rank 64 in int8 takes 17.2 KiB instead of 64 KiB; the error of its factors goes from "
        "17.2 % to 17.3 %.",
    ]
    assert compression_texts([], [], []) == [] and which_are_beaten([], []) == ""


def test_what_the_pictures_gave_stands_in_the_comparison_and_is_read_back(study):
    row = RateRow("jpeg-q75", 0, "jpeg", "", 2, 900.5, 0.04, 0.05, 0.99, 31.0)
    pictures = Pictures((0, 3), (row,), {"jpeg-q75": (900, 901)}, {"jpeg-q75": (0.03, 0.05)}, ("on 2 of 6 images",))
    comparison = study.compare(pictures=pictures)
    assert row in comparison.compression.rates
    assert "on 2 of 6 images" in comparison.remarks
    assert row in read_comparison(study.directory, "val_residual_ratio").compression.rates
