"""Trainings as one have the numbers that each has alone."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from trial_configs import DIRECT, REFINED, SKETCH

from lowrank_tune.lowrank import trainer as trainer_module
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.fused import fusion_key, train_together
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.lowrank.trainer import Trainer
from lowrank_tune.records import Split, TrialConfig

SPLIT = Split(train=tuple(range(26)), validation=tuple(range(26, 32)), test=())
EVERY = pytest.mark.parametrize(
    "config",
    [DIRECT, SKETCH, REFINED, replace(SKETCH, nested_ranks=(1, 2, 4)), replace(REFINED, nested_ranks=(2, 4))],
    ids=["direct", "sketch", "refined", "sketch, nested", "refined, nested"],
)

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(make_features, power_law) -> MakeTrainer:
    x_NTD = power_law(32, 12, 20)
    # `refined` treats images of nearly equal tokens apart.
    alike_NTD = x_NTD[::5] + 40 * x_NTD[::5].mean(1, keepdim=True)
    x_NTD[::5] = alike_NTD * (x_NTD[::5].norm() / alike_NTD.norm())
    features, optimum = make_features(x_NTD), measure_optimum([x_NTD[26:]])
    return lambda config: Trainer(config, FeatureMatrix(features), SPLIT, optimum)


def members(config: TrialConfig) -> list[TrialConfig]:
    """Trainings that differ in all that fused ones may differ in."""
    lambdas = [{"lambda_b": 1e-2, "lambda_ortho": 0.0}, {"lambda_b": 0.0, "lambda_ortho": 1e-1}, {}]
    lrs = [1e-3, 2e-3, 3e-3]
    return [
        replace(
            config,
            trial_id=f"{config.trial_id}-{number}",
            seed=number,
            lr=lr,
            weight_decay=10.0**-number,
            family_params=config.family_params | (own if config.family == "direct" else {}),
        )
        for number, (lr, own) in enumerate(zip(lrs, lambdas, strict=True))
    ]


def numbers(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "seconds"}


def step_together(trainers: list[Trainer]) -> list[dict[str, float]]:
    return [trainer.step(trained) for trainer, trained in zip(trainers, train_together(trainers), strict=True)]


def alone(make_trainer: MakeTrainer, config: TrialConfig) -> Trainer:
    trainer = make_trainer(config)
    while trainer.stopped_by is None:
        trainer.step()
    return trainer


def apart(trainer: Trainer, other: Trainer) -> float:
    pairs = zip(trainer.best_model.parameters(), other.best_model.parameters(), strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


@EVERY
def test_each_has_the_numbers_that_it_has_alone(make_trainer, config):
    configs = members(config)
    together = [make_trainer(own) for own in configs]
    step_together(together)
    early = [[weight.detach().clone() for weight in trainer.model.parameters()] for trainer in together]
    for _ in range(config.epochs - 1):
        step_together(together)
    for trainer, weights in zip(together, early, strict=True):
        assert not any(torch.equal(*pair) for pair in zip(trainer.model.parameters(), weights, strict=True))
    for trainer, own in zip(together, configs, strict=True):
        expected = alone(make_trainer, own)
        assert trainer.stopped_by == "budget"
        for row, row_alone in zip(trainer.history, expected.history, strict=True):
            assert numbers(row) == pytest.approx(numbers(row_alone), rel=1e-5)
        assert apart(trainer, expected) < 1e-4


@EVERY
def test_members_join_leave_and_train_alone_at_epochs_of_their_own(make_trainer, config):
    configs = members(config)
    first, second, third = (make_trainer(own) for own in configs)
    first.step()
    step_together([first, second])
    step_together([second, third, first])
    third.step()
    step_together([third, second])
    restored = make_trainer(configs[2])
    restored.restore(third.state())
    step_together([second, restored])
    restored.step()
    for trainer, own, epochs in ((first, configs[0], 3), (second, configs[1], 4), (restored, configs[2], 5)):
        rows = alone(make_trainer, own).history[:epochs]
        assert [numbers(row) for row in trainer.history] == [pytest.approx(numbers(row), rel=1e-5) for row in rows]


@pytest.mark.parametrize("config", [SKETCH, REFINED], ids=["sketch", "refined"])
def test_what_is_not_kept_between_epochs_gives_the_same(make_trainer, monkeypatch, config):
    kept, again = ([make_trainer(own) for own in members(config)] for _ in range(2))
    rows = step_together(kept)
    monkeypatch.setattr(trainer_module, "CONDENSED_BYTES", 0)
    for row, other in zip(step_together(again), rows, strict=True):
        assert numbers(row) == pytest.approx(numbers(other), rel=1e-5)


def test_each_has_its_own_plateaus_and_patience(make_trainer):
    # Float32 weights do not move at 1e-30; at 1e-7 they move too little for the scheduler.
    configs = [replace(SKETCH, lr=lr, epochs=8, patience=6) for lr in (1e-3, 1e-7, 1e-30)]
    together = [make_trainer(own) for own in configs]
    while live := [trainer for trainer in together if trainer.stopped_by is None]:
        step_together(live)
    assert (together[0].stopped_by, together[2].stopped_by) == ("budget", "patience")
    assert len(together[2].history) == 7
    lrs = [[row["lr"] for row in trainer.history] for trainer in together]
    assert lrs[0] == [1e-3] * 8
    assert lrs[1][:6] == [1e-7] * 5 + [5e-8]
    assert lrs == [[row["lr"] for row in alone(make_trainer, own).history] for own in configs]


def test_a_broken_member_breaks_no_other(make_trainer):
    broken, sound = members(DIRECT)[:2]
    together = [make_trainer(broken), make_trainer(sound)]
    with torch.no_grad():
        together[0].model.token_in.weight.fill_(torch.inf)
    step_together(together)
    assert together[0].stopped_by == "error"
    assert "train_loss" in together[0].reason
    expected = make_trainer(sound).step()
    assert numbers(together[1].history[-1]) == pytest.approx(numbers(expected), rel=1e-5)


def test_an_epoch_that_fails_leaves_every_trainer_as_it_was(make_trainer, monkeypatch):
    together = [make_trainer(own) for own in members(DIRECT)]
    step_together(together)
    before = [trainer.state() for trainer in together]
    lend, calls = together[0]._batches.lend, []

    def short_of_memory(images: list[int]) -> Tensor:
        calls.append(images)
        if len(calls) == 3:
            raise MemoryError
        return lend(images)

    monkeypatch.setattr(together[0]._batches, "lend", short_of_memory)
    with pytest.raises(MemoryError):
        train_together(together)
    monkeypatch.undo()
    for trainer, own, state in zip(together, members(DIRECT), before, strict=True):
        other = make_trainer(own)
        other.restore(state)
        assert numbers(trainer.step()) == numbers(other.step())


def test_only_trainings_of_one_shape_are_fused():
    keys = [fusion_key(config) for config in (DIRECT, SKETCH, REFINED)]
    assert len(set(keys)) == 3
    for change in ({"rank": 3}, {"batch_size": 5}, {"family_params": {"steps": 2}}, {"nested_ranks": (2, 4)}):
        assert fusion_key(replace(REFINED, **change)) != fusion_key(REFINED)
    for config in (DIRECT, SKETCH, REFINED):
        assert len({fusion_key(own) for own in members(config)}) == 1
