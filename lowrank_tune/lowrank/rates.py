"""What an image takes in a trained model's hands: bytes at a given error, and in the model's own form.

A model of `shared` codes an image's coefficients. Factors A and B of an image are stored in one of `STORE_DTYPES`, as
many leading components as the error needs. Bytes are counted, not written. N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.codebooks import make_codebook
from lowrank_tune.lowrank.coding import Codebook, UnreachableError
from lowrank_tune.lowrank.decomposers import Decomposer, Factors
from lowrank_tune.lowrank.decomposers.shared import Shared
from lowrank_tune.lowrank.quantization import (
    COUNT_BYTES,
    STORE_DTYPES,
    factor_bytes,
    ordered,
    packed_bytes,
    prune,
    residual_by_rank,
    restored,
)

OWN_DTYPES = ("float16", "float32")
"""In which factors are a model's own form: the first that holds them, and loses nothing that could be told."""


class Rates(NamedTuple):
    """One model's figures, float64 [N].

    Attributes:
        bytes_at_error_N: of the smallest form whose relative error is at most the target; where the model has none, of
            X itself in the smallest dtype that has it.
        bytes_N: of the model's own form.
        error_N: ‖X − Y‖ / ‖X‖ of what comes back of that form, Y.
    """

    bytes_at_error_N: Tensor
    bytes_N: Tensor
    error_N: Tensor


def counter(model: Decomposer, target_error: float) -> Callable[[Tensor, Factors], Rates]:
    """Return what counts the bytes of images and of the model's factors of them, at whatever rank those have."""
    if not isinstance(model, Shared):
        return lambda x_NTD, factors: factor_rates(x_NTD, factors, target_error)
    step, book_of = model.step, cache(partial(make_codebook, model))
    return lambda x_NTD, factors: coded_rates(x_NTD, book_of(factors.a_NTR.shape[-1]), step, target_error)


def own_bytes(model: Decomposer) -> Callable[[Tensor, Factors], tuple[Tensor]]:
    """Return what counts the bytes of images in the model's own form alone."""

    def of_factors(x_NTD: Tensor, factors: Factors) -> tuple[Tensor]:
        (tokens, dim), rank = x_NTD.shape[1:], factors.a_NTR.shape[-1]
        return (torch.full((len(x_NTD),), factor_bytes(tokens, dim, rank, "float16"), dtype=torch.float64),)

    if not isinstance(model, Shared):
        return of_factors
    step, book_of = model.step, cache(partial(make_codebook, model))

    def coded(x_NTD: Tensor, factors: Factors) -> tuple[Tensor]:
        book = book_of(factors.a_NTR.shape[-1])
        sizes = [float(book.count(x_TD, step=step)[0]) for x_TD in x_NTD.cpu()]
        return (torch.tensor(sizes, dtype=torch.float64),)

    return coded


def factor_rates(x_NTD: Tensor, factors: Factors, target_error: float) -> Rates:
    """Count what factors of images [N, T, D] take, R ≤ min(T, D); their own form is all of them in float16."""
    exact_NTD, parts = x_NTD.double(), ordered(factors)
    (tokens, dim), rank = x_NTD.shape[1:], factors.a_NTR.shape[-1]
    energy_N = exact_NTD.square().sum((-2, -1))
    at_error_N = torch.full_like(energy_N, torch.inf)
    bytes_N, error_N = at_error_N.clone(), torch.full_like(energy_N, torch.nan)
    for dtype in STORE_DTYPES:
        residual_NR = residual_by_rank(exact_NTD, Factors(*_what_returns(parts, dtype)))
        kept_N = prune(residual_NR, target_error**2 * energy_N)
        sizes_R = energy_N.new_tensor([COUNT_BYTES + factor_bytes(tokens, dim, k, dtype) for k in range(rank + 1)])
        at_error_N = torch.where(kept_N < 0, at_error_N, at_error_N.minimum(sizes_R[kept_N.clamp_min(0)]))
        whole_N = (residual_NR[:, -1] / energy_N).sqrt()
        if dtype in OWN_DTYPES:  # float32 comes first, and stays where the numbers are too large for float16
            bytes_N = torch.where(whole_N.isfinite(), factor_bytes(tokens, dim, rank, dtype), bytes_N)
            error_N = torch.where(whole_N.isfinite(), whole_N, error_N)
    return Rates(with_itself(exact_NTD, at_error_N, target_error), bytes_N, error_N)


def coded_rates(x_NTD: Tensor, book: Codebook, step: float, target_error: float) -> Rates:
    """Count what a codebook makes of images [N, T, D]; their own form is by the model's `step`."""
    at_error, own = list[float](), list[tuple[float, float]]()
    for x_TD in x_NTD.cpu():
        own.append(book.count(x_TD, step=step))
        try:
            at_error.append(book.count(x_TD, target_error=target_error)[0])
        except UnreachableError:
            at_error.append(math.inf)
    at_error_N, own_N2 = (torch.tensor(found, dtype=torch.float64, device=x_NTD.device) for found in (at_error, own))
    return Rates(with_itself(x_NTD, at_error_N, target_error), *own_N2.unbind(-1))


def with_itself(x_NTD: Tensor, bytes_N: Tensor, target_error: float) -> Tensor:
    """Put, where there are no finite bytes [N], those of X [N, T, D] itself in the smallest dtype within the target.

    X of a cache is exact in float32, so that the bytes of all images are finite then.
    """
    places = torch.nonzero(~bytes_N.isfinite())[:, 0]
    x_NTD, bytes_N = x_NTD[places].double(), bytes_N.clone()
    for dtype in STORE_DTYPES:
        (y_NTD,) = _what_returns((x_NTD,), dtype)
        within_N = (y_NTD - x_NTD).square().sum((-2, -1)) <= target_error**2 * x_NTD.square().sum((-2, -1))
        bytes_N[places[within_N]] = packed_bytes(x_NTD.shape[1:], dtype)
    return bytes_N


def _what_returns(parts: Sequence[Tensor], dtype: str) -> list[Tensor]:
    """Return what comes back of each image's parts, NaN for the images whose numbers the dtype cannot hold."""
    try:
        return [restored(part, dtype) for part in parts]
    except InputError:
        if len(parts[0]) == 1:
            return [torch.full_like(part, torch.nan) for part in parts]
        images = [_what_returns(image, dtype) for image in zip(*(torch.split(part, 1) for part in parts), strict=True)]
        return [torch.cat(part) for part in zip(*images, strict=True)]
