"""Bytes that are counted are those that `pack` makes, and the fewest of all."""

import math
from dataclasses import replace

import pytest
import torch
from trial_configs import DIRECT, SKETCH

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.baselines import svd
from lowrank_tune.lowrank.codebooks import make_codebook
from lowrank_tune.lowrank.coding import UnreachableError
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Factors
from lowrank_tune.lowrank.decomposers.shared import Shared
from lowrank_tune.lowrank.quantization import COUNT_BYTES, STORE_DTYPES, ordered, pack, unpack
from lowrank_tune.lowrank.rates import coded_rates, counter, factor_rates
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.lowrank.trainer import Trainer
from lowrank_tune.records import RATES, Split


def relative_error(x, y):
    return ((x.double() - y.double()).norm() / x.double().norm()).item()


def stored(x, dtype):
    """What comes back of a matrix and its bytes; infinitely many where the dtype cannot hold it."""
    try:
        parts = pack(x, dtype)
    except InputError:
        return x, math.inf
    return unpack(parts, dtype, x.shape).double(), sum(part.nbytes for part in parts.values())


def smallest(x_TD, a_TR, b_RD, target):
    """By trying each dtype and number of components, and writing the bytes."""
    parts, sizes = ordered(Factors(a_TR[None], b_RD[None])), []
    for dtype in STORE_DTYPES:
        for rank in range(1, a_TR.shape[1] + 1):
            (a, a_size), (b, b_size) = (
                stored(part, dtype) for part in (parts.a_NTR[0, :, :rank], parts.b_NRD[0, :rank])
            )
            if relative_error(x_TD, a.double() @ b.double()) <= target:
                sizes.append(COUNT_BYTES + a_size + b_size)
    itself = [stored(x_TD, dtype) for dtype in STORE_DTYPES]
    return min(sizes) if sizes else min(size for y, size in itself if relative_error(x_TD, y) <= target)


@pytest.mark.parametrize("target", [0.4, 0.1, 0.02, 1e-3, 1e-9])
def test_an_image_takes_the_fewest_bytes_that_hold_it_to_the_target_and_else_those_of_x(power_law, target):
    x = power_law(5, 12, 20)
    x[1] *= 1e-6
    x[2] *= 1e6  # beyond float16
    x[3, 0] *= 1e4
    factors = svd(x, 6)
    rates = factor_rates(x, factors, target)
    assert rates.bytes_at_error_N.tolist() == [
        smallest(image, a, b, target) for image, a, b in zip(x, *factors, strict=True)
    ]
    alone = [factor_rates(x[[n]], Factors(*(part[[n]] for part in factors)), target) for n in range(5)]
    for together, each in zip(rates, zip(*alone, strict=True), strict=True):
        assert torch.allclose(together, torch.cat(each), rtol=1e-6)


def test_a_models_own_form_is_its_factors_in_float16_or_in_float32_where_they_are_too_large(power_law):
    x = power_law(3, 12, 20)
    x[1] *= 1e12
    factors = svd(x, 4)
    rates = factor_rates(x, factors, 0.1)
    assert rates.bytes_N.tolist() == [2 * 4 * 32, 4 * 4 * 32, 2 * 4 * 32]
    exact = [relative_error(image, a.double() @ b.double()) for image, a, b in zip(x, *factors, strict=True)]
    assert rates.error_N.tolist() == pytest.approx(exact, rel=1e-3)


SPLIT = Split(train=tuple(range(24)), validation=tuple(range(24, 32)), test=())


def shared_model(x, rank, transform="none"):
    params = {"token_transform": transform, "lambda_rate": 30.0}
    model = Shared(x.shape[1], x.shape[2], rank, params, torch.Generator().manual_seed(0))
    model.initialise([x], torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize(("rank", "all_reach"), [(4, False), (20, True)])
def test_an_image_takes_its_stream_or_where_the_rank_does_not_suffice_x_itself(power_law, rank, all_reach):
    x = power_law(24, 12, 20)
    x[22] = 1e6 * torch.randn(12, 20, generator=torch.Generator().manual_seed(3))
    model = shared_model(x[:16], rank)
    book = make_codebook(model)
    rates = coded_rates(x[16:], book, model.step, 0.3)
    reached = 0
    for image, size, own, error in zip(x[16:], *rates, strict=True):
        try:
            stream = book.encode(image, target_error=0.3)
            assert abs(size - len(stream)) <= 4
            reached += 1
        except UnreachableError:
            assert size == min(found for y, found in (stored(image, dtype) for dtype in STORE_DTYPES)
                               if relative_error(image, y) <= 0.3)  # fmt: skip
        assert (own, error) == book.count(image, step=model.step)
    assert (reached == 8) == all_reach


def test_of_nested_ranks_each_is_coded_with_the_leading_rows_of_the_basis(power_law):
    x = power_law(24, 12, 20)
    model = shared_model(x[:16], 20)
    count = counter(model, 0.9)
    a, b = model(x[16:])
    for rank in (3, 20):
        rates = count(x[16:], Factors(a[..., :rank], b[:, :rank]))
        assert torch.equal(
            torch.stack(rates), torch.stack(coded_rates(x[16:], make_codebook(model, rank), model.step, 0.9))
        )
    whole, few = (make_codebook(model, rank).count(x[16], step=0.1) for rank in (20, 3))
    assert few[0] < whole[0] and few[1] > whole[1]


@pytest.mark.parametrize("nested", [(), (2, 4)])
def test_a_training_tells_bytes_where_a_target_is_set_and_goes_by_them(make_features, power_law, nested):
    x = power_law(32, 12, 20)
    x[27] = 0
    data, optimum = FeatureMatrix(make_features(x)), measure_optimum([x[24:]])
    config = replace(SKETCH, nested_ranks=nested, epochs=3, objective="val_bytes_at_error", target_error=0.3)
    trainer, plain = (Trainer(each, data, SPLIT, optimum) for each in (config, replace(SKETCH, nested_ranks=nested)))
    rows = [trainer.step() for _ in range(3)]
    seen = x[[24, 25, 26, 28, 29, 30, 31]]
    with torch.no_grad():
        a, b = trainer.best_model(seen)
    rates = [factor_rates(seen, Factors(a[..., :rank], b[:, :rank]), 0.3) for rank in config.ranks]
    for name, figure in zip(RATES, map(torch.stack, zip(*rates, strict=True)), strict=True):
        assert rows[-1][f"best_{name}"] == pytest.approx(figure.mean().item())
    assert min(row["val_bytes_at_error"] for row in rows) == rows[-1]["best_val_bytes_at_error"]
    assert plain.step().keys().isdisjoint([*RATES, *(f"best_{name}" for name in RATES)])


def test_factors_that_are_not_finite_end_a_training_in_words(make_features, power_law):
    x = power_law(32, 12, 20)
    config = replace(DIRECT, objective="val_bytes_at_error", target_error=0.3)
    trainer = Trainer(config, FeatureMatrix(make_features(x)), SPLIT, measure_optimum([x[24:]]))
    trainer.step()
    with torch.no_grad():
        trainer.model.token_in.weight.fill_(torch.inf)
    trainer.step()
    assert trainer.stopped_by == "error"
    assert "not finite" in trainer.reason


@pytest.mark.parametrize("rank", [4, 18])
def test_a_shared_model_is_trained_by_its_coded_bytes_above_the_images_rank_too(make_features, power_law, rank):
    x = power_law(32, 12, 20)
    params = {"token_transform": "learned", "lambda_rate": 30.0}
    config = replace(SKETCH, family="shared", rank=rank, family_params=params, epochs=3)
    config = replace(config, objective="val_bytes_at_error", target_error=0.4)
    trainer = Trainer(config, FeatureMatrix(make_features(x)), SPLIT, measure_optimum([x[24:]]))
    rows = [trainer.step() for _ in range(3)]
    with torch.no_grad():
        rates = counter(trainer.best_model, 0.4)(x[24:], trainer.best_model(x[24:]))
    assert rows[-1]["best_val_bytes_at_error"] == pytest.approx(rates.bytes_at_error_N.mean().item())
    assert rows[-1]["best_val_error"] == pytest.approx(rates.error_N.mean().item())
    assert ("val_residual_ratio" in rows[0]) == (rank <= 12)
