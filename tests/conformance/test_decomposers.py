"""What every family of decomposers must do, and in a metric what may have one; a new one is tested by being there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.decomposers import FAMILIES, Decomposer, load_decomposer, make_decomposer, save_decomposer
from lowrank_tune.lowrank.metrics import measure, residual_ratio
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.lowrank.weighted import metric_factor
from lowrank_tune.records import WEIGHTED, TrialConfig

weighted = [f"{name}{WEIGHTED}" for name, family in FAMILIES.items() if family.weighable]
pytestmark = pytest.mark.parametrize("family", sorted([*FAMILIES, *weighted]))

PARAMS = {
    "direct": {"lambda_b": 1e-3, "lambda_ortho": 1e-3},
    "sketch": {},
    "refined": {"steps": 2},
    "shared": {"token_transform": "learned", "lambda_rate": 30.0},
}
HARD = ["gaussian", "zeros", "zero rows", "equal rows", "rank 1", "giant token", "tiny", "huge", "ones"]


def config(family: str, rank: int, seed: int = 0) -> TrialConfig:
    name = family.removesuffix(WEIGHTED)
    metric = {"metric": "answers"} if name != family else {}
    return TrialConfig("t", 0, seed, name, rank, 1e-3, 1e-5, 4, 2, 2, PARAMS[name] | metric)


def factor(dim: int) -> Tensor:
    """Of a metric whose eigenvalues span three decades."""
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(5))).Q
    return metric_factor((axes * torch.logspace(0, -3, dim)) @ axes.mT)


def features(n: int, tokens: int, dim: int, kind: str = "gaussian", seed: int = 0) -> Tensor:
    x = torch.randn(n, tokens, dim, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "zeros":
            x[0] = 0
        case "zero rows":
            x[:, : tokens // 2] = 0
        case "equal rows":
            x[:] = x[:, :1].clone()
        case "rank 1":
            x = x[:, :, :1] @ x[:, :1]
        case "giant token":
            x[:, 0] *= 1e3
        case "tiny":
            x *= 1e-20
        case "huge":
            x *= 1e18
        case "ones":
            x[:] = 1
    return x


def made(family: str, tokens: int, dim: int, rank: int, seed: int = 0) -> Decomposer:
    model = make_decomposer(config(family, rank, seed), tokens, dim, factor(dim))
    model.initialise([features(2, tokens, dim, seed=1)] * 2, torch.Generator().manual_seed(2))
    return model


@pytest.mark.parametrize(("tokens", "dim", "rank"), [(12, 20, 5), (20, 12, 12), (1, 7, 1), (64, 3, 2)])
def test_factors_have_their_shapes_and_dtype(family, tokens, dim, rank):
    model = made(family, tokens, dim, rank)
    assert (model.family, model.tokens, model.dim, model.rank) == (config(family, 1).family, tokens, dim, rank)
    for n in (1, 3):
        a, b = model(features(n, tokens, dim))
        assert (a.shape, b.shape) == ((n, tokens, rank), (n, rank, dim))
        assert a.dtype == b.dtype == torch.float32
    assert model.loss(features(3, tokens, dim)).shape == ()


@given(kind=st.sampled_from(HARD), seed=st.integers(0, 1000), rank=st.sampled_from([1, 4, 12]))
@settings(deadline=None, max_examples=30)
def test_any_image_gives_finite_gradients_and_no_better_than_the_optimum(family, kind, seed, rank):
    x = features(3, 12, 20, kind, seed)
    model = made(family, 12, 20, rank)
    loss = model.loss(x)
    loss.backward()
    if family != "direct" or kind != "huge":  # its loss is in X's units, whose squares leave float32's range
        assert loss.isfinite()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)
    with torch.no_grad():
        a, b = model(x)
    assert a.isfinite().all() and b.isfinite().all()
    optimum = measure_optimum([x])
    rho = residual_ratio(measure(x, a, b).residual_N, optimum.at(rank).residual_N, optimum.energy_N)
    assert (rho >= 1 - 1e-6).all()


def test_every_weight_learns(family):
    model = made(family, 24, 40, 4)
    model.loss(features(3, 24, 40)).backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in model.parameters())


def test_a_few_steps_lower_the_loss(family):
    model = made(family, 32, 40, 4)
    x = features(4, 32, 40, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model.loss(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_file_gives_back_the_same_model(family, tmp_path):
    model = made(family, 12, 20, 4)
    save_decomposer(model, tmp_path / "model.safetensors")
    loaded = load_decomposer(tmp_path / "model.safetensors")
    assert type(loaded) is type(model)
    assert (loaded.tokens, loaded.dim, loaded.rank) == (12, 20, 4)
    assert loaded.family_params == model.family_params
    x = features(3, 12, 20)
    for mine, theirs in zip(loaded(x), model(x), strict=True):
        assert torch.equal(mine, theirs)


def test_a_damaged_file_is_refused(family, tmp_path):
    path = tmp_path / "model.safetensors"
    save_decomposer(made(family, 12, 20, 4), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_decomposer(path)
    with pytest.raises(InputError, match=r"absent\.safetensors"):
        load_decomposer(tmp_path / "absent.safetensors")


def test_a_seed_makes_the_model_and_the_global_generator_does_not(family):
    x = features(2, 12, 20)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = made(family, 12, 20, 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first(x).a_NTR, made(family, 12, 20, 4)(x).a_NTR)
    fresh = [make_decomposer(config(family, 4, seed), 12, 20, factor(20)) for seed in (0, 1)]
    assert not torch.equal(fresh[0](x).a_NTR, fresh[1](x).a_NTR)


def test_an_image_is_decomposed_alike_in_any_company(family):
    model = made(family, 12, 20, 4)
    x = features(5, 12, 20)
    a, b = model(x)
    together = (a @ b)[2:3]
    a, b = model(x[2:3])
    torch.testing.assert_close(a @ b, together, atol=1e-5, rtol=1e-4)
    x[3] *= 1e4
    a, b = model(x)
    torch.testing.assert_close((a @ b)[2:3], together, atol=1e-5, rtol=1e-4)


def test_the_order_of_tokens_and_the_unit_of_the_features_do_not_matter(family):
    model = made(family, 12, 20, 4)
    x = features(2, 12, 20)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    a, b = model(x)
    shuffled_a, shuffled_b = model(x[:, order])
    torch.testing.assert_close(shuffled_a @ shuffled_b, (a @ b)[:, order], atol=1e-4, rtol=1e-3)
    scaled_a, scaled_b = model(100 * x)
    torch.testing.assert_close(scaled_a @ scaled_b, 100 * (a @ b), atol=1e-2, rtol=1e-3)


def test_ranks_and_parameters_are_checked(family):
    model = made(family, 12, 20, 4)
    x = features(2, 12, 20)
    assert torch.equal(model(x, rank=4).a_NTR, model(x).a_NTR)
    for rank in (0, 5):
        with pytest.raises(InputError, match=f"rank {rank}"):
            model(x, rank=rank)
    made_by = FAMILIES[config(family, 4).family]
    highest = made_by.highest_rank(12, 20)
    with pytest.raises(InputError, match=f"ranks 1 to {highest}"):
        make_decomposer(config(family, highest + 1), 12, 20)
    with pytest.raises(InputError, match=f"family {made_by.family} takes"):
        made_by(12, 20, 4, {"foreign": 1.0}, torch.Generator())


def test_a_lower_rank_is_refused_or_nested(family):
    model = made(family, 12, 20, 4)
    x = features(2, 12, 20)
    try:
        lower = model(x, rank=2)
    except InputError:
        return
    torch.testing.assert_close(lower.a_NTR, model(x).a_NTR[..., :2], atol=1e-5, rtol=1e-4)
    assert lower.b_NRD.shape == (2, 2, 20)
