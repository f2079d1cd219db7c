"""Trained decomposers with int8 matrices, by torchao."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lowrank_tune.lowrank.decomposers import Decomposer, make_decomposer
from lowrank_tune.lowrank.quantization import QuantisedDecomposer, model_bytes
from lowrank_tune.records import TrialConfig

TOKENS, DIM, RANK = 16, 48, 8
PARAMS = {"direct": {"lambda_b": 1e-4, "lambda_ortho": 1e-3}, "sketch": {}, "refined": {"steps": 2.0}}


def model_of(family: str) -> Decomposer:
    config = TrialConfig("trial", 0, 7, family, RANK, 1e-3, 1e-5, 4, 5, 5, PARAMS[family])
    return make_decomposer(config, TOKENS, DIM).eval()


@pytest.fixture
def x_NTD() -> Tensor:
    return torch.randn(3, TOKENS, DIM, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -1, DIM)


def products(model: Decomposer | QuantisedDecomposer, x_NTD: Tensor, rank: int | None = None) -> Tensor:
    with torch.inference_mode():
        a_NTR, b_NRD = model(x_NTD, rank=rank)
        return a_NTR @ b_NRD


@pytest.mark.parametrize("family", ["direct", "sketch"])
def test_int8_matrices_are_about_a_fourth_of_the_bytes_and_give_nearly_the_same_factors(
    family: str, x_NTD: Tensor
) -> None:
    model = model_of(family)
    quantised = QuantisedDecomposer(model)
    matrices = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2)
    spared = model_bytes(model) - model_bytes(quantised.model)
    assert 0.75 * 3 * matrices < spared < 3 * matrices
    exact, near = products(model, x_NTD), products(quantised, x_NTD)
    assert 0 < (near - exact).norm() / exact.norm() < 0.02


def test_every_matrix_is_int8_and_the_model_itself_stays_as_it_was(x_NTD: Tensor) -> None:
    model = model_of("direct")
    before = products(model, x_NTD)
    quantised = QuantisedDecomposer(model)
    assert quantised.matrices == [
        "component_RH", "token_in.weight", "token_out.weight", "pool_in.weight", "component_out.weight"
    ]  # fmt: skip
    kinds = {type(quantised.model.get_parameter(name)).__name__ for name in quantised.matrices}
    assert kinds == {"Int8Tensor"}
    assert torch.equal(products(model, x_NTD), before)
    assert {type(weight) for weight in model.parameters()} == {torch.nn.Parameter}


def test_lower_ranks_of_an_ordered_family_work(x_NTD: Tensor) -> None:
    model = model_of("sketch")
    exact, near = products(model, x_NTD, 3), products(QuantisedDecomposer(model), x_NTD, 3)
    assert 0 < (near - exact).norm() / exact.norm() < 0.02


def test_a_family_without_matrices_has_nothing_to_quantise(x_NTD: Tensor) -> None:
    model = model_of("refined")
    quantised = QuantisedDecomposer(model)
    assert quantised.matrices == [] and model_bytes(quantised.model) == model_bytes(model)
    assert torch.equal(products(quantised, x_NTD), products(model, x_NTD))


def test_a_models_bytes_are_its_weights_and_buffers() -> None:
    assert model_bytes(model_of("sketch")) == 4 * DIM * RANK
    width = TOKENS  # rank 8 and 10 columns more would exceed it
    assert model_bytes(model_of("refined")) == 4 * (2 + DIM + TOKENS * width)


def test_only_who_quantises_loads_torchao() -> None:
    code = "import lowrank_tune.lowrank.quantization, sys; sys.exit('torchao' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
