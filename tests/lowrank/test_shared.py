import pytest
import torch

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.decomposers.shared import Shared


def made(tokens: int, dim: int, rank: int, transform: str) -> Shared:
    params = {"token_transform": transform, "lambda_rate": 20.0}
    return Shared(tokens, dim, rank, params, torch.Generator().manual_seed(0))


def images(tokens: int = 16, dim: int = 12) -> torch.Tensor:
    return torch.randn(20, tokens, dim, generator=torch.Generator().manual_seed(3)) + 1.5


@pytest.mark.parametrize("transform", ["none", "dct", "learned"])
def test_the_basis_and_the_transform_are_orthonormal_at_the_start_and_after_any_step(transform):
    model = made(16, 12, 7, transform)

    def check() -> None:
        torch.testing.assert_close(model.basis @ model.basis.mT, torch.eye(7), atol=1e-5, rtol=0)
        torch.testing.assert_close(model.transform @ model.transform.mT, torch.eye(16), atol=1e-5, rtol=0)

    check()
    model.initialise([images()], torch.Generator().manual_seed(1))
    check()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    model.settle()
    check()


def test_the_mean_lies_in_the_basis_so_that_the_product_is_the_mean_and_what_the_axes_explain():
    model, x = made(16, 12, 5, "dct"), images()
    model.initialise([x], torch.Generator().manual_seed(1))
    a, b = model(x)
    mean = x.mean((0, 1))
    mean = model.mean_D * (mean @ model.mean_D) / model.mean_D.square().sum()
    centred = (x - mean) @ model.basis.mT @ model.basis + mean
    torch.testing.assert_close(a @ b, centred, atol=1e-4, rtol=1e-4)


def test_all_of_the_dimensions_hold_every_image_though_it_has_fewer_tokens():
    model, x = made(4, 12, 12, "dct"), images(4)
    model.initialise([x], torch.Generator().manual_seed(1))
    a, b = model(x)
    torch.testing.assert_close(a @ b, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [2, 12, 257])
def test_tokens_of_no_square_grid_have_no_dct_and_are_told_what_they_have(tokens):
    with pytest.raises(InputError, match=f"{tokens} tokens are no square grid; take `learned`"):
        made(tokens, 12, 2, "dct")
    assert made(tokens, 12, 2, "learned").tokens == tokens


def test_training_lowers_what_images_take():
    generator = torch.Generator().manual_seed(5)
    scale = torch.exp(torch.randn(60, 1, 12, generator=generator))
    x = torch.randn(60, 16, 12, generator=generator) * scale
    model = made(16, 12, 12, "none")
    model.initialise([x], torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(x)
        loss.backward()
        optimizer.step()
        model.settle()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03
    assert model.adaptation.item() > 0.01
