from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trial_configs import REFINED

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers.direct import Direct
from lowrank_tune.lowrank.decomposers.refined import Refined
from lowrank_tune.lowrank.decomposers.sketch import Sketch
from lowrank_tune.lowrank.metrics import EXACT, measure, residual_ratio
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.lowrank.trainer import Trainer
from lowrank_tune.records import Split

CONFIG = replace(REFINED, rank=24, weight_decay=0.0, epochs=4, patience=4, family_params={"steps": 2})
SPLIT = Split(tuple(range(16)), tuple(range(16, 24)), ())


def made(tokens, dim, rank, steps=2, seed=0):
    return Refined(tokens, dim, rank, {"steps": steps}, torch.Generator().manual_seed(seed))


@torch.no_grad()
def ratios(model, x, rank=None):
    optimum = measure_optimum([x])
    a, b = model(x, rank)
    return residual_ratio(measure(x, a, b).residual_N, optimum.at(a.shape[-1]).residual_N, optimum.energy_N)


@pytest.mark.parametrize(("tokens", "dim"), [(64, 128), (100, 300), (128, 128), (96, 40)])
@pytest.mark.parametrize("rank", [1, 4, 16, 32])
def test_it_is_near_the_optimum_without_training(power_law, tokens, dim, rank):
    rho = ratios(made(tokens, dim, rank), power_law(4, tokens, dim))
    assert rho.mean() < 1.02
    assert rho.max() < 1.05


@pytest.mark.parametrize(
    ("tokens", "dim", "rank", "steps"),
    [
        *((64, 128, rank, 2) for rank in (52, 60, 64)),
        (128, 64, 60, 2),
        (128, 64, 64, 2),
        (80, 30, 28, 5),
        (80, 30, 30, 5),
    ],
)
def test_ranks_up_to_the_full_one_leave_no_room_and_do_no_harm(power_law, tokens, dim, rank, steps):
    assert (
        ratios(made(tokens, dim, rank, steps), power_law(8, tokens, dim, decay=0.5 if steps > 2 else 1.0)).max() < 1.03
    )


@pytest.mark.parametrize("rank", [2, 16, 32])
def test_another_step_comes_nearer(power_law, rank):
    x = power_law(4, 100, 200)
    rho = [ratios(made(100, 200, rank, steps), x).mean() for steps in (1, 2, 3, 5)]
    assert rho == sorted(rho, reverse=True)
    assert rho[-1] < 1.005


@pytest.mark.parametrize("rank", [3, 16, 40])
def test_nearly_equal_tokens_do_not_hide_what_tells_them_apart(power_law, rank):
    x = power_law(4, 80, 160, decay=1.5)
    x = x + 300 * torch.randn(4, 1, 160, generator=torch.Generator().manual_seed(1))
    assert ratios(made(80, 160, rank), x).max() < 1.05


@given(
    seed=st.integers(0, 1000),
    spread=st.floats(0, 6),
    zero_rows=st.integers(0, 30),
    giant=st.sampled_from([1.0, 1e2, 1e4]),
    true_rank=st.integers(1, 40),
    rank=st.sampled_from([1, 7, 24, 40]),
)
@settings(deadline=None, max_examples=40)
def test_any_spectrum_gives_safe_factors_and_gradients(seed, spread, zero_rows, giant, true_rank, rank):
    generator = torch.Generator().manual_seed(seed)
    sigma = 10 ** -torch.linspace(0, spread, true_rank)
    x = torch.randn(2, 40, true_rank, generator=generator) * sigma @ torch.randn(true_rank, 50, generator=generator)
    x[:, :zero_rows] = 0
    x[:, -1] *= giant
    model = made(40, 50, rank, seed=seed)
    model.loss(x).backward()
    assert model.zeros_K.grad is not None
    assert model.zeros_K.grad.isfinite().all()
    rho = ratios(model, x)
    assert (rho >= 1 - 1e-6).all()
    # Where the optimum leaves nothing, ρ compares float32's rounding with the 1e-8 of the energy that counts as none.
    optimum = measure_optimum([x])
    excess_N = (rho - 1) * torch.maximum(
        optimum.at(rank).residual_N / optimum.energy_N.clamp_min(1e-300), torch.tensor(EXACT)
    )
    assert ((rho < 1.5) | (excess_N < 1e-7)).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("rank", [2, 3, 20, 38, 40])
def test_what_one_direction_leaves_may_be_rounding_alone_and_singular_values_may_be_equal(rank, steps):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 40, generator=generator).repeat(1, 40, 1)
    x[1] += 1e-3 * torch.randn(40, 40, generator=generator)
    x[2] = torch.randn(40, 40, generator=generator)
    x[2, 3] *= 1e6
    x[3] = 1
    equal = torch.linalg.qr(torch.randn(1, 40, 40, generator=generator)).Q
    for image in (*x, *equal):
        model = made(40, 40, rank, steps)
        model.loss(image[None]).backward()
        assert model.zeros_K.grad.isfinite().all()
        assert (ratios(model, image[None]) < 1.05).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_image_that_is_not_finite_spoils_its_own_factors_alone(power_law, value):
    x, model = power_law(3, 40, 60), made(40, 60, 8)
    alone = model(x[:2])
    x[2, 5, 7] = value
    together = model(x)
    torch.testing.assert_close(together.a_NTR[:2], alone.a_NTR, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.b_NRD[:2], alone.b_NRD, atol=1e-5, rtol=1e-4)
    assert together.a_NTR[2].isnan().all()
    assert model.loss(x).isnan()


def test_autocast_changes_nothing_and_half_precision_features_are_computed_in_float32(power_law):
    x, model = power_law(2, 40, 60), made(40, 60, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within, loss = model(x), model.loss(x)
        loss.backward()
    assert all(map(torch.equal, within, model(x)))
    assert torch.equal(loss, model.loss(x))
    assert torch.equal(model(x.half()).a_NTR, model(x.half().float()).a_NTR)


def test_the_loss_is_the_residuals_share_of_the_energy(power_law):
    x, model = power_law(3, 40, 60), made(40, 60, 12)
    residual_N = measure(x, *(factor.detach() for factor in model(x))).residual_N
    share = (residual_N / x.double().square().sum((-2, -1))).mean()
    torch.testing.assert_close(model.loss(x).double(), share, atol=1e-6, rtol=1e-4)


def test_the_gradient_is_that_of_the_loss(power_law):
    precomputed = made(80, 120, 6).precompute(power_law(2, 80, 120, decay=0.3))
    precomputed = [part.double() if part.is_floating_point() else part for part in precomputed]
    model = made(80, 120, 6).double()
    model.precomputed_loss(*precomputed).backward()
    for place in range(2):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                model.zeros_K[place] += step
                values.append(model.precomputed_loss(*precomputed).item())
                model.zeros_K[place] -= step
        assert model.zeros_K.grad[place].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-2)


def test_steps_are_counted():
    for steps in (0, 1.5, -2):
        with pytest.raises(InputError, match="steps"):
            made(12, 20, 4, steps)


@pytest.fixture
def make_trainer(make_features):
    def make(x, config=CONFIG):
        return Trainer(config, FeatureMatrix(make_features(x)), SPLIT, measure_optimum([x[16:]])), x

    return make


def test_training_keeps_gram_matrices_and_lowers_the_ratio(make_trainer, power_law):
    trainer, x = make_trainer(power_law(24, 96, 128, decay=0.5))
    untrained = trainer.model.loss(x[:16]).item()
    while trainer.stopped_by is None:
        trainer.step()
    assert trainer.model.loss(x[:16]).item() < untrained
    ratio = [row["val_residual_ratio"] for row in trainer.history]
    assert ratio[-1] < ratio[0] < 1.03


def test_too_many_gram_matrices_are_made_anew_with_the_same_numbers(make_trainer, power_law, monkeypatch):
    losses = []
    for budget in (2**20, 0):
        monkeypatch.setattr("lowrank_tune.lowrank.trainer.PRECOMPUTED_BYTES", budget)
        trainer, _ = make_trainer(power_law(24, 40, 60), replace(CONFIG, rank=8))
        losses.append([trainer.step()["train_loss"] for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_one_nested_training_serves_every_rank(make_trainer, power_law):
    ranks = (4, 8, 16, 24)
    trainer, x = make_trainer(power_law(24, 64, 96), replace(CONFIG, nested_ranks=ranks))
    row = trainer.step()
    means = [ratios(trainer.best_model, x[16:], rank).mean().item() for rank in ranks]
    assert all(mean < 1.03 for mean in means)
    assert row["val_residual_ratio"] == pytest.approx(sum(means) / len(means), rel=1e-4)
    assert row["train_loss"] == pytest.approx(row["val_residual_ratio"], rel=0.2)


def test_a_nested_loss_is_the_mean_ratio_of_the_ranks_of_an_ordered_basis():
    model = Sketch(12, 20, 4, {}, torch.Generator().manual_seed(0))
    model.nest({2: 0.25, 4: 0.1})
    residual = torch.tensor([0.5, 0.4, 0.2, 0.12], requires_grad=True)
    loss = model.weigh_ranks(residual)
    loss.backward()
    assert loss.item() == pytest.approx((0.4 / 0.25 + 0.12 / 0.1) / 2)
    assert residual.grad.tolist() == pytest.approx([0, 2, 0, 5])
    with pytest.raises(InputError, match="direct has no ordered basis"):
        Direct(12, 20, 4, {"lambda_b": 0, "lambda_ortho": 0}, torch.Generator()).nest({2: 0.2, 4: 0.1})
    with pytest.raises(InputError, match="rank 5"):
        made(12, 20, 4).nest({5: 0.1})
