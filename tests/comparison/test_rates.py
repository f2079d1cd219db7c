"""Real bytes against error: streams that come back, targets that every image keeps, words that are true."""

import math
from dataclasses import replace

import pytest
import torch

from lowrank_tune.comparison.codecs import (
    INTEGERS,
    FactorBooks,
    Seen,
    coded_itself,
    plain,
    squeezed,
    stored_factors,
)
from lowrank_tune.comparison.compare import read_comparison
from lowrank_tune.comparison.rate_words import rate_words, training_text
from lowrank_tune.comparison.rates import TARGETS
from lowrank_tune.lowrank.coding import UnreachableError
from lowrank_tune.lowrank.decomposers import load_decomposer, save_decomposer
from lowrank_tune.lowrank.quantization import packed_bytes, restored
from lowrank_tune.measured import Comparison, RateRow
from lowrank_tune.records import BEST_MODEL
from tests.comparison.small_study import DIM, TOKENS, Study, build_study, images

KIB = 1024
X_NTD = images()
TRAIN = list(X_NTD[:10])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Comparison]:
    """A basis of every rank an image may have and one of few; the first one's scales are spoilt."""
    study = build_study(tmp_path_factory.mktemp("rates"))
    for rank in (6, DIM):
        study.add_trial("shared", rank)
    study.add_trial("sketch", 6, best={"val_mse": 0.2, "val_token_cosine": 0.95})
    path = study.directory / "trials" / "r024-shared-0001" / BEST_MODEL
    model = load_decomposer(path)
    with torch.no_grad():
        model.log_scale_TR += 0.5  # which no longer are what the images have
    save_decomposer(model, path)
    return study, study.compare("val_mse")


def rows_of(study, method, dtype="coded"):
    return [row for row in study[1].compression.rates if (row.method, row.dtype) == (method, dtype)]


def error(x, y):
    return (torch.linalg.vector_norm(x.double() - y) / torch.linalg.vector_norm(x.double())).item()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_come_back_the_same_plain_and_squeezed_and_squeezing_never_costs_more_than_a_few_bytes(dtype):
    for x_TD in X_NTD[14:17]:
        streams = {}
        for way in (
            plain(TOKENS, DIM, dtype),
            *(squeezed(TOKENS, DIM, dtype, by, TRAIN[:1]) for by in ("zlib", "zstd")),
        ):
            streams[way.dtype] = way.encode(Seen(x_TD), 0.0)
            assert torch.equal(way.decode(streams[way.dtype]), restored(x_TD, dtype))
        assert len(streams[dtype]) == packed_bytes((TOKENS, DIM), dtype)
        assert all(len(stream) <= len(streams[dtype]) + 16 for stream in streams.values())


@pytest.mark.parametrize("compressor", ["zlib", "zstd"])
def test_a_compressor_is_shown_in_its_best_form(compressor):
    """Channels that differ in size: channel after channel, a code a byte, takes far less than packed codes do."""
    x_TD = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -3, 64)
    squeezed_size = len(squeezed(256, 64, "int5", compressor, [x_TD]).encode(Seen(x_TD), 0.0))
    assert squeezed_size < 0.5 * len(plain(256, 64, "int5").encode(Seen(x_TD), 0.0))


@pytest.mark.parametrize("target", [0.01, 0.14, 0.3])
def test_coded_x_and_factors_keep_the_target_and_waste_little_of_it(target):
    books = FactorBooks(TRAIN)
    for way in (coded_itself(TOKENS, DIM, TRAIN), books.way("svd", TOKENS, "", lambda seen: seen.svd)):
        for x_TD in X_NTD[14:17]:
            found = error(x_TD, way.decode(way.encode(Seen(x_TD), target)))
            assert 0.8 * target < found <= target * (1 + 1e-5)


def test_stored_factors_keep_as_few_components_as_do_and_say_where_none_do():
    way = stored_factors("svd", TOKENS, "", lambda seen: seen.svd, (TOKENS, DIM), "int8")
    sizes = []
    for target in (0.05, 0.1, 0.3):
        stream = way.encode(Seen(X_NTD[15]), target)
        assert error(X_NTD[15], way.decode(stream)) <= target
        sizes.append(len(stream))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    with pytest.raises(UnreachableError):
        way.encode(Seen(X_NTD[15]), 1e-4)


def test_every_way_has_its_rows_and_every_image_keeps_its_targets(study):
    rates = study[1].compression.rates
    assert {row.dtype for row in rates if row.method == "x"} >= {"coded", *INTEGERS, "int5+zlib", "int4+zstd"}
    for method in ("x", "svd", "shared"):
        assert [row.target for row in rows_of(study, method)] == list(TARGETS)
    for row in rates:
        assert row.n_images == 6 and row.images_per_second > 0
        assert not row.target or row.relative_error_max <= float(row.target) * (1 + 1e-4)
    for method in ("x", "svd", "shared"):
        sizes = [row.bytes_per_image for row in rows_of(study, method)]
        assert sizes == sorted(sizes, reverse=True), "a nearer target takes more"
    assert read_comparison(study[0].directory, "val_mse").compression == study[1].compression


def test_what_is_shared_is_told_with_its_trial_and_only_where_there_is_any(study):
    assert {row.trial_id for row in rows_of(study, "shared")} <= {"r006-shared-0000", "r024-shared-0001"}
    assert {row.rank for row in rows_of(study, "shared") if float(row.target) < 0.1} == {DIM}
    assert all(row.shared_bytes > DIM * row.rank * 4 for row in rows_of(study, "shared"))
    assert all(row.shared_bytes == 0 for row in study[1].compression.rates if row.dtype in INTEGERS)
    assert 0 < rows_of(study, "x")[0].shared_bytes < rows_of(study, "shared")[0].shared_bytes


def test_a_sentence_tells_what_training_saved_in_bytes(study):
    (said,) = [remark for remark in study[1].remarks if remark.startswith("bytes of shared")]
    assert "before its first epoch: training costs " in said, "its scales were spoilt"
    assert all(f"at {target} error" in said for target in ("1 %", "5 %", "14 %"))


WAY = plain(TOKENS, DIM, "int8")


@pytest.mark.parametrize(
    ("saving", "said"),
    [
        ((0.05, 0.03, 0.07), "training saves 5.0 % (3.0 to 7.0 saved) at 5 % error"),
        ((0.002, -0.01, 0.014), "training changes nothing measurable: 0.2 % (-1.0 to 1.4 saved) at 5 % error"),
        ((-0.05, -0.07, -0.03), "training costs 5.0 % (-7.0 to -3.0 saved) at 5 % error"),
        ((0.05, math.nan, math.nan), "training changes nothing measurable: 5.0 % at 5 % error"),
    ],
)
def test_savings_are_told_by_their_interval(saving, said):
    assert said in training_text([("0.05", replace(WAY, method="shared"), saving)])
    assert training_text([("0.05", WAY, None)]) == ""


def test_a_way_that_breaks_costs_its_rows_and_a_sentence(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("zstd is not here")

    monkeypatch.setattr("lowrank_tune.comparison.codecs.pa.Codec", fail)
    study = build_study(tmp_path)
    study.add_trial("shared", 16)
    comparison = study.compare()
    assert {row.method for row in comparison.compression.rates} == {"x", "svd", "shared"}
    assert not any("zstd" in row.dtype for row in comparison.compression.rates)
    assert sum("zstd is not here" in remark for remark in comparison.remarks) == 3


def test_an_error_that_a_rank_is_too_low_for_is_told(tmp_path):
    study = build_study(tmp_path)
    study.add_trial("shared", 2)
    comparison = study.compare()
    assert not [row for row in comparison.compression.rates if row.method == "shared"]
    assert (
        "shared, up to rank 2, does not hold every image to an error of 1 %, 2 %, 5 %, 10 %, 14 %, 20 % or 30 %"
        in comparison.remarks
    )


def test_a_way_that_meets_no_target_is_told_and_not_dropped(tmp_path):
    study = build_study(tmp_path)
    study.add_trial("sketch", 1, best={"val_mse": 0.2, "val_token_cosine": 0.95})
    comparison = study.compare("val_mse")
    assert not [row for row in comparison.compression.rates if row.method == "sketch"]
    for kept in ("float16, int8, int5 or int4", "uniform steps"):
        assert (
            f"sketch, rank 1, in {kept} is left out of the bytes against error: it does not hold every image to 30 %"
            in comparison.remarks
        )


def row(method, dtype, size, error, target="", rank=0, **fields):
    return RateRow(method, rank, dtype, target, 4, size * KIB, error, error, 0.99, 12.0, **fields)


RATES = [
    row("x", "int8+zlib", 141, 0.03),
    row("x", "coded", 90, 0.0499, "0.05"),
    row("svd", "int8", 95, 0.0498, "0.05"),
    row("shared", "coded", 70, 0.05, "0.05", 384, shared_bytes=KIB, trial_id="t"),
    row("shared", "coded", 20, 0.14, "0.14", 384, shared_bytes=KIB, trial_id="t"),
    row("jpeg-q75", "jpeg", 28, 0.04),
    row("jpeg-q50", "jpeg", 19, 0.06),
]


def test_an_error_is_told_with_the_best_of_each_kind_and_who_wins():
    at_5, at_14, *_ = rate_words(RATES)
    assert at_5 == (
        "At 5 % error an image takes 70 KiB as shared (rank 384), 90 KiB as uniform steps, coded, of X, 95 KiB as the "
        "SVD's factors, int8, 28 KiB as its jpeg-q75 (encoded again: 12 images/s): the picture wins."
    )
    assert at_14.startswith("At 14 % error an image takes 20 KiB as shared (rank 384)") and "19 KiB as its" in at_14


def test_features_win_where_they_take_less_and_a_picture_that_is_never_near_is_told():
    dearer = [replace(row, bytes_per_image=row.bytes_per_image * 9) if row.dtype == "jpeg" else row for row in RATES]
    assert rate_words(dearer)[0].endswith(": features win.")
    farther = [replace(row, relative_error_mean=0.5) if row.dtype == "jpeg" else row for row in RATES]
    assert rate_words(farther)[0].endswith(": the picture comes as near at none of its qualities.")


def test_each_budget_names_the_measured_point_of_least_error_within_it():
    budgets = [words for words in rate_words(RATES) if "comes nearest" in words]
    assert budgets == [
        "Of the settings measured, the picture as jpeg-q75, encoded again comes nearest at 32, 64 and 128 KiB an "
        "image: 4 %, 4 % and 4 % error.",
        "Of the settings measured, int8+zlib of X comes nearest at 256 KiB an image: 3 % error.",
    ]
    assert rate_words([]) == []
