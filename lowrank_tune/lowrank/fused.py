"""One epoch of several trainings at once: models of one shape as one batched model.

Small matrices leave a device waiting for the next operation to be asked for; one operation on M models asks M times
less often. Each training keeps its own weights, optimiser, learning rate, order of images and epoch: they are gathered
for an epoch and given back at its end, so that a training is whole between epochs and any may leave or join.

M models, N images, P weights of a model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_tune.lowrank.decomposers import FAMILIES, Decomposer
from lowrank_tune.lowrank.trainer import Trained, Trainer
from lowrank_tune.records import TrialConfig


def fusion_key(config: TrialConfig) -> tuple[Any, ...]:
    """What trainings agree in that `train_together` takes: all that shapes a model and its batches."""
    shapes = FAMILIES[config.family].shapes
    return (config.family, config.ranks, config.batch_size, *(config.family_params[name] for name in shapes))


def train_together(trainers: Sequence[Trainer]) -> list[Trained]:
    """Train one epoch of each, all of them as one; `Trainer.step` of each then validates it.

    The numbers are those of training each alone, but for rounding.

    Args:
        trainers: on the same features, split and device, with equal `fusion_key`s and whole batches in memory; each may
            be at an epoch of its own.

    Returns:
        What each one's `step` is to be given, in their order; the time is shared equally.

    Raises:
        Exception: whatever training met, such as a lack of memory; every trainer is then as it was.
    """
    started = time.perf_counter()
    for trainer in trainers:
        trainer.begin()
        trainer.model.train()
    with _orders(trainers) as order_MN:
        stack = _Stack(trainers)
        size = trainers[0].config.batch_size
        total_M = torch.zeros(len(trainers), device=trainers[0].device)
        for places_Mn in torch.split(order_MN, size, dim=1):
            loss_M = stack.losses(places_Mn)
            stack.step(loss_M)
            total_M += loss_M.detach() * places_Mn.shape[1]
        losses = (total_M / order_MN.shape[1]).tolist()
        stack.give_back()
    seconds = (time.perf_counter() - started) / len(trainers)
    return [Trained(loss, seconds) for loss in losses]


@contextmanager
def _orders(trainers: Sequence[Trainer]) -> Iterator[Tensor]:
    """The order in which each trains on its images [M, N]; as if not drawn when the block fails."""
    before = [trainer._order.get_state() for trainer in trainers]
    try:
        yield torch.stack([torch.randperm(len(trainer.split.train), generator=trainer._order) for trainer in trainers])
    except BaseException:
        for trainer, state in zip(trainers, before, strict=True):
            trainer._order.set_state(state)
        raise


class _Stack:
    """Several trainers' weights and optimisers as one, [M, P] each.

    Args:
        trainers: as `train_together` takes them; they are not touched before `give_back`.
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self._trainers = trainers
        self._model = trainers[0].model
        named = [dict(trainer.model.named_parameters()) for trainer in trainers]
        self._weights_MP = _rows([list(weights.values()) for weights in named])
        self._leaves: dict[str, Tensor] = {}
        start = 0
        for name, weight in named[0].items():
            shape, end = (len(trainers), *weight.shape), start + weight.numel()
            self._leaves[name], start = self._weights_MP[:, start:end].view(shape).requires_grad_(), end
        device = self._weights_MP.device
        configs = [trainer.config for trainer in trainers]
        self._params = {
            name: torch.tensor([float(config.family_params[name]) for config in configs], device=device)
            for name in self._model.params
        }
        self._adamw = _AdamW(trainers, self._weights_MP)
        self._as_it_is = type(self._model).condense is Decomposer.condense
        # Nothing where a family condenses nothing, or where there is too much of it to keep.
        self._kept = [trainer._condense() for trainer in trainers]
        self._buffers = [part.new_empty(0) for part in self._kept[0]]

    def losses(self, places_Mn: Tensor) -> Tensor:
        """Return each model's loss of its batch, given the places of that in the training split; [M]."""
        return self._model.condensed_losses(self._leaves, self._params, *self._batch(places_Mn))

    def step(self, loss_M: Tensor) -> None:
        """Let each optimiser take a step along its loss's gradient."""
        gradients = torch.autograd.grad(loss_M.sum(), list(self._leaves.values()))
        self._adamw.step(torch.cat([gradient.flatten(1) for gradient in gradients], dim=1))

    @torch.no_grad()
    def give_back(self) -> None:
        """Let each trainer have its weights and its optimiser's state."""
        for row, trainer in enumerate(self._trainers):
            weights: list[Tensor] = list(trainer.model.parameters())
            torch._foreach_copy_(weights, _like(self._weights_MP[row], weights))
        self._adamw.give_back()

    def _batch(self, places_Mn: Tensor) -> Sequence[Tensor]:
        """What each model's loss needs of its images, one model after the other."""
        size = places_Mn.shape[1]
        if not all(self._kept):
            train = self._trainers[0].split.train
            x_NTD = self._trainers[0]._batches.lend([train[place] for place in places_Mn.flatten().tolist()])
            if self._as_it_is:
                return (x_NTD,)
            own = [t.model.condense(x) for t, x in zip(self._trainers, torch.split(x_NTD, size), strict=True)]
            return [torch.cat(parts) for parts in zip(*own, strict=True)]
        places_Mn = places_Mn.to(self._weights_MP.device)
        for which, buffer in enumerate(self._buffers):
            if len(buffer) != places_Mn.numel():
                buffer = self._buffers[which] = buffer.new_empty(places_Mn.numel(), *self._kept[0][which].shape[1:])
            for rows, kept, places_n in zip(torch.split(buffer, size), self._kept, places_Mn, strict=True):
                torch.index_select(kept[which], 0, places_n, out=rows)
        return self._buffers


class _AdamW:
    """torch's AdamW on the rows of a matrix, with a learning rate, a decay and a count of steps a row.

    torch's own take one learning rate for all that they step at once.

    Args:
        trainers: whose optimisers it stands for, a row each.
        weights_MP: what it steps.
    """

    def __init__(self, trainers: Sequence[Trainer], weights_MP: Tensor) -> None:
        self._optimizers = [trainer._optimizer for trainer in trainers]
        self._weights_MP = weights_MP
        groups = [optimizer.param_groups[0] for optimizer in self._optimizers]
        self._beta1, self._beta2 = groups[0]["betas"]
        self._eps = groups[0]["eps"]
        # In float64: 1 - 0.999 ** step has few digits left in float32.
        self._lr_M1 = torch.tensor([[group["lr"]] for group in groups], dtype=torch.float64).to(weights_MP.device)
        decay_M1 = torch.tensor([[group["weight_decay"]] for group in groups], dtype=torch.float64)
        self._keep_M1 = (1 - self._lr_M1 * decay_M1.to(weights_MP.device)).to(weights_MP.dtype)
        states = [[_state(optimizer, weight) for weight in optimizer.param_groups[0]["params"]]
                  for optimizer in self._optimizers]  # fmt: skip
        self._mean_MP = _rows([[state["exp_avg"] for state in own] for own in states])
        self._square_MP = _rows([[state["exp_avg_sq"] for state in own] for own in states])
        self._steps_M1 = torch.stack([own[0]["step"] for own in states])[:, None].to(weights_MP.device).double()

    @torch.no_grad()
    def step(self, gradients_MP: Tensor) -> None:
        """Take a step along the gradients."""
        self._steps_M1 += 1
        scale_M1 = (1 - self._beta2**self._steps_M1).sqrt()
        pace_M1 = self._lr_M1 / (1 - self._beta1**self._steps_M1)
        self._weights_MP.mul_(self._keep_M1)
        self._mean_MP.lerp_(gradients_MP, 1 - self._beta1)
        self._square_MP.mul_(self._beta2).addcmul_(gradients_MP, gradients_MP, value=1 - self._beta2)
        # The pace, and what eps is added to, go into the divisor, which is [M, P] anyway.
        divisor_MP = self._square_MP.sqrt().div_(scale_M1.to(self._square_MP)).add_(self._eps)
        self._weights_MP.addcdiv_(self._mean_MP * pace_M1.to(self._mean_MP), divisor_MP, value=-1)

    @torch.no_grad()
    def give_back(self) -> None:
        """Let each optimiser have its state, in the form that torch's own step leaves it in."""
        for row, optimizer in enumerate(self._optimizers):
            weights = optimizer.param_groups[0]["params"]
            means, squares = (_like(moment[row], weights) for moment in (self._mean_MP, self._square_MP))
            for weight, mean, square in zip(weights, means, squares, strict=True):
                state = _state(optimizer, weight)
                state["step"].copy_(self._steps_M1[row, 0])
                state["exp_avg"].copy_(mean)
                state["exp_avg_sq"].copy_(square)
                optimizer.state[weight] = state


def _state(optimizer: Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """An optimiser's state of one weight; before the first step, what that starts from."""
    if weight in optimizer.state:
        state: dict[str, Tensor] = optimizer.state[weight]
        return state
    return {
        "step": torch.zeros((), device=weight.device),
        "exp_avg": torch.zeros_like(weight),
        "exp_avg_sq": torch.zeros_like(weight),
    }


def _rows(tensors: Sequence[Sequence[Tensor]]) -> Tensor:
    """Each model's tensors one behind the other, [M, P]."""
    return torch.stack([torch.cat([tensor.detach().flatten() for tensor in own]) for own in tensors])


def _like(row_P: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of a row in the shapes of the tensors that it was made of."""
    pieces = torch.split(row_P, [tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]
