"""Matrices and factors in few bits: what comes back is near, and the bytes are the bytes."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.torch import load, save
from trial_configs import DIRECT, REFINED, SKETCH

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.decomposers import Factors, make_decomposer
from lowrank_tune.lowrank.quantization import (
    STORE_DTYPES,
    QuantisedDecomposer,
    factor_bytes,
    model_bytes,
    ordered,
    pack,
    packed_bytes,
    prune,
    residual_by_rank,
    restored,
    restored_factors,
    unpack,
)

INTEGERS = {"int8": 127, "int5": 15, "int4": 7}
ANY_DTYPE = pytest.mark.parametrize("dtype", STORE_DTYPES)
MATRICES = st.builds(
    torch.from_numpy,
    arrays(
        np.float32,
        array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=19),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
)
TOKENS, DIM = 24, 40


def stored(x, dtype):
    return unpack(load(save(pack(x, dtype))), dtype, x.shape)


def images(seed=0, count=3, tokens=TOKENS, dim=DIM):
    """Images with falling spectra, as features have."""
    generator = torch.Generator().manual_seed(seed)
    fall = torch.logspace(0, -1.5, min(tokens, dim))
    left = torch.linalg.qr(torch.randn(count, tokens, tokens, generator=generator)).Q[..., : len(fall)]
    right = torch.linalg.qr(torch.randn(count, dim, dim, generator=generator)).Q[..., : len(fall)]
    return (left * fall) @ right.mT


def error(x, factors):
    return (factors.a_NTR @ factors.b_NRD - x).norm(dim=(-2, -1)) / x.norm(dim=(-2, -1))


def leading(factors, rank):
    return Factors(factors.a_NTR[..., :rank].double(), factors.b_NRD[..., :rank, :].double())


def mixed(factors):
    """The same products from columns that nearly cancel, as a network's may."""
    rank = factors.a_NTR.shape[-1]
    mix = torch.randn(rank, rank, generator=torch.Generator().manual_seed(0))
    return Factors(factors.a_NTR @ mix, torch.linalg.solve(mix, factors.b_NRD))


@settings(deadline=None, max_examples=60)
@given(MATRICES, st.sampled_from(sorted(INTEGERS)))
def test_no_number_is_off_by_more_than_half_a_step_and_the_bytes_are_what_was_counted(x, dtype):
    step = x.double().abs().amax(-1, keepdim=True) / INTEGERS[dtype]
    found = stored(x, dtype)
    assert ((found.double() - x.double()).abs() <= 0.5001 * step.clamp_min(torch.finfo(torch.float32).tiny)).all()
    torch.testing.assert_close(restored(x, dtype), found, rtol=0, atol=0)
    assert packed_bytes(x.shape, dtype) == sum(part.nbytes for part in pack(x, dtype).values())
    assert factor_bytes(5, 9, 3, dtype) == packed_bytes((5, 3), dtype) + packed_bytes((3, 9), dtype)
    assert factor_bytes(5, 9, 0, dtype) == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_floats_are_stored_as_they_are(dtype):
    x = torch.tensor([[1.0, -0.5, 0.0], [3e-5, 1024.0, 7.0]])
    expected = x.to(getattr(torch, dtype)).float()
    assert torch.equal(stored(x, dtype), expected) and torch.equal(restored(x, dtype), expected)
    assert packed_bytes(x.shape, dtype) == 6 * getattr(torch, dtype).itemsize


@ANY_DTYPE
def test_zeros_equal_numbers_and_no_image_come_back_exactly(dtype):
    x = torch.tensor([[0.0] * 7, [2.5] * 7, [-0.125] * 7])
    torch.testing.assert_close(stored(x, dtype), x, rtol=1e-7, atol=0)
    none = torch.empty(0, 3, 9)
    assert stored(none, dtype).shape == none.shape and packed_bytes(none.shape, dtype) == 0


def test_the_bytes_of_a_stored_file_stay_what_they_were():
    parts = pack(torch.tensor([[15.0, -15, 1, 0, 7, -8, 3, 2, -1]]), "int5")
    assert parts["codes"].tolist() == [[30, 192, 103, 143, 140, 14]] and parts["scales"].tolist() == [1.0]


def test_leading_rows_can_be_read_by_themselves():
    x = torch.randn(5, 13, generator=torch.Generator().manual_seed(0))
    rows = {name: part[:2] for name, part in pack(x, "int5").items()}
    assert torch.equal(unpack(rows, "int5", (2, 13)), restored(x, "int5")[:2])


def test_what_cannot_be_stored_is_refused():
    for dtype in STORE_DTYPES:
        for bad in (math.nan, math.inf, -math.inf):
            for refuse in (pack, restored):
                with pytest.raises(InputError, match="NaN, infinity"):
                    refuse(torch.tensor([[1.0, bad]]), dtype)
    with pytest.raises(InputError, match=r"1e\+05 do not fit into float16; store float32, or int8"):
        pack(torch.tensor([[1e5]]), "float16")
    with pytest.raises(InputError, match="'int3' is unknown; choose one of float32, float16, int8, int5, int4"):
        pack(torch.ones(1, 1), "int3")
    with pytest.raises(InputError, match="no rows to pack"):
        pack(torch.tensor(1.0), "int8")


def test_parts_of_another_shape_or_dtype_are_refused():
    parts = pack(torch.ones(2, 9), "int5")
    for dtype, shape in (("int5", (2, 17)), ("int4", (2, 9)), ("int8", (2, 9)), ("float16", (2, 9))):
        with pytest.raises(InputError, match="give the dtype and shape that it was packed with"):
            unpack(parts, dtype, shape)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 9), (9, 1)])
def test_ordered_factors_are_the_same_product_by_falling_weight(shape):
    x = images(tokens=shape[0], dim=shape[1])
    made = mixed(baselines.svd(x, min(*shape, 7)))
    a, b = ordered(made)
    torch.testing.assert_close(a @ b, made.a_NTR @ made.b_NRD, rtol=0, atol=1e-5)
    lengths = a.norm(dim=-2)
    torch.testing.assert_close(lengths, b.norm(dim=-1), rtol=1e-3, atol=1e-5)
    assert (lengths.diff() <= 1e-6).all()


@pytest.mark.parametrize("rank", [TOKENS + 3, DIM + 5])
def test_factors_of_more_components_than_an_image_has_ranks_are_ordered_and_filled_with_zeros(rank):
    generator = torch.Generator().manual_seed(0)
    made = Factors(*(torch.randn(3, *shape, generator=generator) for shape in ((TOKENS, rank), (rank, DIM))))
    a, b = ordered(made)
    assert (a.shape, b.shape) == (made.a_NTR.shape, made.b_NRD.shape)
    torch.testing.assert_close(a @ b, made.a_NTR @ made.b_NRD, rtol=0, atol=1e-4)
    assert not a[..., TOKENS:].any() and not b[:, TOKENS:].any()


def test_leading_components_of_ordered_factors_are_the_best_of_their_number():
    x = images()
    factors = ordered(mixed(baselines.svd(x, TOKENS)))
    for rank in (1, 5, 11):
        best = error(x, baselines.svd(x, rank))
        torch.testing.assert_close(error(x, leading(factors, rank)), best.double(), rtol=1e-3, atol=0)


def test_ordering_spares_few_bits_the_columns_that_cancel():
    x = images()
    regressed = mixed(baselines.svd(x, 12))
    near, far = (error(x, restored_factors(each, "int8")) for each in (ordered(regressed), regressed))
    assert (near < far).all()


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 16), st.floats(1e-3, 1e3))
def test_fewer_bits_are_more_error_and_float16_is_nearly_none(seed, rank, scale):
    x = scale * images(seed)
    factors = ordered(baselines.svd(x, rank))
    exact = error(x, factors)
    errors = [error(x, restored_factors(factors, dtype)) for dtype in STORE_DTYPES]
    torch.testing.assert_close(errors[0], exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(errors[1], exact, rtol=0, atol=1e-3)
    means = [exact.mean(), *(each.mean() for each in errors[2:])]
    assert means == sorted(set(means))


def test_a_long_token_takes_no_digits_from_the_others():
    x = images()
    x[:, 0] *= 30
    a, b = ordered(baselines.svd(x, TOKENS))
    near = (restored(a, "int8") @ b - x)[:, 1:].norm() / x[:, 1:].norm()
    by_component = (restored(a.mT, "int8").mT @ b - x)[:, 1:].norm() / x[:, 1:].norm()
    assert near < 0.01 < 2 * near < by_component


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(STORE_DTYPES), st.floats(0.001, 1.1))
def test_pruning_keeps_the_fewest_components_that_meet_the_target_on_every_image(seed, dtype, target):
    x = images(seed).double()
    factors = restored_factors(ordered(baselines.svd(x.float(), TOKENS)), dtype)
    energy = x.square().sum((-2, -1))
    residual = residual_by_rank(x, factors)
    errors = torch.stack([error(x, leading(factors, rank)) for rank in range(TOKENS + 1)], -1)
    torch.testing.assert_close(residual, errors.square() * energy[:, None], rtol=1e-6, atol=1e-9)
    for image, kept in enumerate(prune(residual, target**2 * energy).tolist()):
        assert (errors[image, : max(kept, 0)] > target * (1 - 1e-6)).all()
        if kept < 0:
            assert errors[image].min() > target * (1 - 1e-6)
        else:
            assert errors[image, kept] <= target * (1 + 1e-6)


def test_float16_holds_ordered_factors_whose_length_in_one_of_them_it_could_not():
    x = 6e4 * images(count=1).sign()
    factors = baselines.svd(x, 3)
    with pytest.raises(InputError, match="do not fit into float16"):
        restored_factors(factors, "float16")
    near = error(x, restored_factors(ordered(factors), "float16"))
    torch.testing.assert_close(near, error(x, factors), rtol=1e-3, atol=0)


def product(model, x, rank=None):
    with torch.inference_mode():
        a, b = model(x, rank=rank)
        return a @ b


@pytest.mark.parametrize("config", [DIRECT, SKETCH], ids=["direct", "sketch"])
def test_int8_matrices_are_about_a_fourth_of_the_bytes_and_give_nearly_the_same_factors(config):
    x, model = images(1, dim=48), make_decomposer(replace(config, rank=8), TOKENS, 48).eval()
    before = product(model, x)
    quantised = QuantisedDecomposer(model)
    matrices = {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}
    assert quantised.matrices == list(matrices)
    assert {type(quantised.model.get_parameter(name)).__name__ for name in matrices} == {"Int8Tensor"}
    spared = model_bytes(model) - model_bytes(quantised.model)
    size = sum(weight.numel() for weight in matrices.values())
    assert 0.75 * 3 * size < spared < 3 * size
    assert torch.equal(product(model, x), before)  # the model itself stays as it was
    ranks = (None, 3) if model.ordered else (None,)
    for rank in ranks:
        exact, near = product(model, x, rank), product(quantised, x, rank)
        assert 0 < (near - exact).norm() / exact.norm() < 0.02


def test_a_family_without_matrices_has_nothing_to_quantise_and_a_models_bytes_are_weights_and_buffers():
    x, model = images(1), make_decomposer(REFINED, TOKENS, DIM).eval()
    quantised = QuantisedDecomposer(model)
    width = 14  # rank 4 and 10 columns more
    assert quantised.matrices == []
    assert model_bytes(quantised.model) == model_bytes(model) == 4 * (3 + DIM + TOKENS * width)
    assert torch.equal(product(quantised, x), product(model, x))


def test_only_who_quantises_loads_torchao():
    code = "import lowrank_tune.lowrank.quantization, sys; sys.exit('torchao' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
