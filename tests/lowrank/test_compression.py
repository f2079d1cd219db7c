"""Matrices in few bits: what comes back is near, and the bytes are the bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.torch import load, save
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.quantization import STORE_DTYPES, pack, packed_bytes, restored, unpack

INTEGERS = {"int8": 127, "int5": 15, "int4": 7}
MATRICES = st.builds(
    torch.from_numpy,
    arrays(
        np.float32,
        array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=19),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
)


def stored(x: Tensor, dtype: str) -> Tensor:
    return unpack(load(save(pack(x, dtype))), dtype, x.shape)


@settings(deadline=None)
@given(MATRICES, st.sampled_from(sorted(INTEGERS)))
def test_no_number_is_off_by_more_than_half_a_step(x: Tensor, dtype: str) -> None:
    step = x.double().abs().amax(-1, keepdim=True) / INTEGERS[dtype]
    error = (stored(x, dtype).double() - x.double()).abs()
    assert (error <= 0.5001 * step.clamp_min(torch.finfo(torch.float32).tiny)).all()


@settings(deadline=None)
@given(MATRICES, st.sampled_from(sorted(INTEGERS)))
def test_the_bytes_are_those_of_what_pack_returns(x: Tensor, dtype: str) -> None:
    parts = pack(x, dtype)
    assert packed_bytes(x.shape, dtype) == sum(part.numel() * part.element_size() for part in parts.values())


@settings(deadline=None)
@given(MATRICES, st.sampled_from(sorted(INTEGERS)))
def test_what_comes_back_is_known_without_making_the_bytes(x: Tensor, dtype: str) -> None:
    torch.testing.assert_close(restored(x, dtype), stored(x, dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_floats_are_stored_as_they_are(dtype: str) -> None:
    x = torch.tensor([[1.0, -0.5, 0.0], [3e-5, 1024.0, 7.0]])
    expected = x.to(getattr(torch, dtype)).float()
    assert torch.equal(stored(x, dtype), expected) and torch.equal(restored(x, dtype), expected)
    assert packed_bytes(x.shape, dtype) == 6 * getattr(torch, dtype).itemsize


@pytest.mark.parametrize("dtype", STORE_DTYPES)
def test_rows_of_zeros_and_of_equal_numbers_come_back_exactly(dtype: str) -> None:
    x = torch.tensor([[0.0] * 7, [2.5] * 7, [-0.125] * 7])
    torch.testing.assert_close(stored(x, dtype), x, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", sorted(INTEGERS))
def test_a_giant_row_leaves_its_neighbours_alone(dtype: str) -> None:
    x = torch.stack([torch.full((9,), 3.4e38), torch.linspace(-1, 1, 9), torch.full((9,), 1e-45)])
    y = stored(x, dtype)
    assert y.isfinite().all()
    assert (y[1] - x[1]).abs().max() <= 0.5001 / INTEGERS[dtype]


@pytest.mark.parametrize("count", range(1, 18))
@pytest.mark.parametrize(("dtype", "bits"), [("int5", 5), ("int4", 4)])
def test_codes_of_less_than_a_byte_share_bytes_at_any_length(count: int, dtype: str, bits: int) -> None:
    levels = INTEGERS[dtype]
    x = torch.arange(count).remainder(2 * levels + 1).sub(levels).float()
    x[0] = -levels
    parts = pack(x, dtype)
    assert parts["codes"].dtype == torch.uint8 and len(parts["codes"]) == math.ceil(count * bits / 8)
    assert torch.equal(unpack(parts, dtype, x.shape), x)


def test_leading_rows_can_be_read_by_themselves() -> None:
    x = torch.randn(5, 13, generator=torch.Generator().manual_seed(0))
    leading = {name: part[:2] for name, part in pack(x, "int5").items()}
    assert torch.equal(unpack(leading, "int5", (2, 13)), restored(x, "int5")[:2])


@pytest.mark.parametrize("dtype", STORE_DTYPES)
def test_no_image_is_no_bytes(dtype: str) -> None:
    x = torch.empty(0, 3, 9)
    assert stored(x, dtype).shape == x.shape and packed_bytes(x.shape, dtype) == 0


def test_fewer_bits_are_fewer_bytes_and_more_error() -> None:
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    sizes = [packed_bytes(x.shape, dtype) for dtype in STORE_DTYPES]
    errors = [(stored(x, dtype) - x).norm().item() for dtype in STORE_DTYPES]
    assert sizes == sorted(set(sizes), reverse=True) and errors == sorted(set(errors))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", STORE_DTYPES)
def test_what_is_not_finite_is_refused(dtype: str, bad: float) -> None:
    for refuse in (pack, restored):
        with pytest.raises(InputError, match="NaN, infinity"):
            refuse(torch.tensor([[1.0, bad]]), dtype)


def test_float16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(InputError, match=r"1e\+05 do not fit into float16; store float32, or int8"):
        pack(torch.tensor([[1e5]]), "float16")


def test_an_unknown_dtype_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match="'int3' is unknown; choose one of float32, float16, int8, int5, int4"):
        pack(torch.ones(1, 1), "int3")


def test_numbers_without_rows_are_refused() -> None:
    with pytest.raises(InputError, match="no rows to pack"):
        pack(torch.tensor(1.0), "int8")


def test_parts_of_another_shape_or_dtype_are_refused() -> None:
    parts = pack(torch.ones(2, 9), "int5")
    for dtype, shape in (("int5", (2, 17)), ("int4", (2, 9)), ("int8", (2, 9)), ("float16", (2, 9))):
        with pytest.raises(InputError, match="give the dtype and shape that it was packed with"):
            unpack(parts, dtype, shape)
