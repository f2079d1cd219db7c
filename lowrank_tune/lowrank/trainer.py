"""One training: epochs over the training split, each judged on the validation split beside the optimum.

N images, T tokens, D dim, K ranks that the training serves, F figures of an image.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.data import FeatureMatrix, batches_on
from lowrank_tune.lowrank.decomposers import Decomposer, Factors, make_decomposer, save_decomposer
from lowrank_tune.lowrank.distributed import ALONE, World
from lowrank_tune.lowrank.linalg import stream
from lowrank_tune.lowrank.metrics import Figures, mean_ratio, measure, residual_ratio
from lowrank_tune.lowrank.rates import counter, own_bytes
from lowrank_tune.lowrank.svd import Optimum
from lowrank_tune.records import BEST_MODEL, RATES, WORST_RATIO, Split, StoppedBy, TrialConfig, sign

logger = logging.getLogger(__name__)

INITIAL_IMAGES = 256
"""Training images that a decomposer's start is fitted on, at most: a rank's axes need no more, and it then costs less
than an epoch."""
PRECOMPUTED_BYTES = 256 * 2**20
"""Memory for what is precomputed of training images, kept from epoch to epoch where all of it fits: 500 images of 256
tokens at rank 128. A constant, so that a trial's memory does not grow with the cache."""
VALIDATION_BATCH = 8
"""Validation images in memory at a time."""
FIGURES = ("train_loss", "val_mse", "val_token_cosine")
"""What every training tells of an epoch."""
LR_FACTOR = 0.5
"""What the learning rate is multiplied by on a plateau."""
LR_PATIENCE = 3
"""Epochs without a better objective before that; several plateaus fit into the default patience of 10."""


class Trainer:
    """Trains one decomposer: AdamW, the learning rate halved on plateaus, early stopping, the best weights kept.

    All of that goes by the configuration's objective. Validation images of zeros count in no figure.

    On the CPU equal arguments give equal numbers, and a restored trainer goes on as if it had never stopped. Several
    processes may train one decomposer, each on its share of every batch, with the numbers of one but for rounding.

    Args:
        optimum: of `split.validation`, in its order.
        micro_batch: images in memory at a time; gradients add up over the parts of a batch. All by default.
        world: the processes that train it.
        factor_DD: the answers' metric as its factor, which `metric: answers` needs.

    Attributes:
        figures: what it tells of an epoch: `FIGURES`, `val_residual_ratio`, unless a rank is above the images' own, and
            `RATES`, where the configuration has a target error, and what it requires something of.
        model: the decomposer as of the last epoch.
        best_model: that of the best epoch.
        history: what `step` returned, but for an epoch that failed.
        stopped_by: None while it may go on, then `budget`, `patience` or `error`.
        reason: why it failed, one line.

    Raises:
        InputError: The configuration does not fit the features, a split is empty, the optimum is another split's, or
            every validation image is zeros.
    """

    def __init__(
        self,
        config: TrialConfig,
        data: FeatureMatrix,
        split: Split,
        optimum: Optimum,
        device: str = "cpu",
        micro_batch: int | None = None,
        world: World = ALONE,
        factor_DD: Tensor | None = None,
    ) -> None:
        if not split.train or not split.validation:
            raise InputError(f"trial {config.trial_id}: training and validation need an image each; change `split`")
        if len(optimum.energy_N) != len(split.validation):
            raise InputError(
                f"trial {config.trial_id}: the optimum is of {len(optimum.energy_N)} images, "
                f"the validation split has {len(split.validation)}; measure the optimum of this split"
            )
        if not optimum.energy_N.any():
            raise InputError(
                f"trial {config.trial_id}: every validation image holds nothing but zeros; look at the source images"
            )
        self.config = config
        self.split = split
        self.device = device
        self.world = world
        self._batches = batches_on(data, device)
        self._own_batch = largest_share(config, world)
        self.micro_batch = min(micro_batch or self._own_batch, self._own_batch)
        self.history: list[dict[str, float]] = []
        self.stopped_by: StoppedBy | None = None
        self.reason = ""
        self._energy_N = optimum.energy_N
        nothing_N = torch.zeros_like(optimum.energy_N)
        self._floors = [optimum.at(k).residual_N if k <= data.tokens else nothing_N for k in config.ranks]
        # Above the images' rank the optimum has no error to hold one's own against.
        ratio: tuple[str, ...] = ("val_residual_ratio",) if max(config.ranks) <= min(data.tokens, data.dim) else ()
        rates = RATES if config.target_error is not None else ()
        if WORST_RATIO in config.require:
            if not ratio:
                raise InputError(f"trial {config.trial_id}: ρ has no meaning at its rank; remove {WORST_RATIO}")
            ratio += (WORST_RATIO,)
        self._own_bytes = "val_bytes" in config.require and not rates
        self.figures = (*FIGURES, *ratio, *rates, *(["val_bytes"] if self._own_bytes else []))
        self._precomputed: list[Tensor] = []
        self._order = stream(config.seed, "order")
        self._saved_epoch = 0
        self.model = make_decomposer(config, data.tokens, data.dim, factor_DD).to(device)
        if config.nested_ranks:
            seen_N = optimum.energy_N > 0
            shares = [(floor_N / optimum.energy_N)[seen_N].mean().item() for floor_N in self._floors]
            self.model.nest(dict(zip(config.ranks, shares, strict=True)))
        self.best_model = copy.deepcopy(self.model)
        self._weights = list(self.model.parameters())
        self._optimizer = AdamW(self._weights, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self._sign = sign(config.objective)
        self._scheduler = ReduceLROnPlateau(self._optimizer, factor=LR_FACTOR, patience=LR_PATIENCE)

    @property
    def epoch(self) -> int:
        """Epochs trained."""
        return len(self.history)

    @property
    def best_epoch(self) -> int:
        """The epoch whose objective is the best, from 1; 0 before the first."""
        return int(self.history[-1]["best_epoch"]) if self.history else 0

    @property
    def kept_bytes(self) -> int:
        """What it keeps from epoch to epoch of its training images."""
        return sum(part.nbytes for part in self._precomputed)

    def step(self) -> dict[str, float]:
        """Train one epoch and validate.

        Returns:
            `epoch` (from 1), its `figures` (means over images, ρ's geometric), `lr`, `seconds`, and `best_epoch`,
            `best_val_mse` and so on of the best epoch. When the epoch fails (`stopped_by` is then `error`) its figures
            are not finite.

        Raises:
            RuntimeError: The training has stopped already.
            CacheError: The features cannot be read.
            ConnectionError: Another process that trains it has ended.
        """
        if self.stopped_by is not None:
            raise RuntimeError(f"trial {self.config.trial_id} has stopped ({self.stopped_by})")
        started = time.perf_counter()
        row: dict[str, float] = {"epoch": self.epoch + 1, "lr": self._optimizer.param_groups[0]["lr"]}
        row |= dict.fromkeys(self.figures, math.nan)
        try:
            if self.epoch == 0:
                self._initialise()
            row["train_loss"] = self._train()
            row |= self._validate()
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, but not in its __all__
            logger.warning("trial %s, epoch %d: %s", self.config.trial_id, row["epoch"], error)
        row["seconds"] = time.perf_counter() - started
        self._judge(row)
        return row

    def save(self, directory: Path) -> None:
        """Write best_model.safetensors into a folder that is there, when it improved since the last call."""
        if self.best_epoch > self._saved_epoch:
            save_decomposer(self.best_model, directory / BEST_MODEL)
            self._saved_epoch = self.best_epoch

    def state(self) -> dict[str, Any]:
        """Return all that `restore` needs: tensors, numbers and text, independent of what training does next."""
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "best_model": self.best_model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "scheduler": self._scheduler.state_dict(),
                "order": self._order.get_state(),
                "history": self.history,
                "stopped_by": self.stopped_by,
                "reason": self.reason,
            }
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned in a trainer with the same arguments."""
        state = copy.deepcopy(state)
        self.model.load_state_dict(state["model"])
        self.best_model.load_state_dict(state["best_model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self._order.set_state(state["order"])
        self.history = state["history"]
        self.stopped_by = state["stopped_by"]
        self.reason = state["reason"]

    def _initialise(self) -> None:
        """Set the weights from training images; every worker does, and takes the first one's to the last bit."""
        initialise(self.model, self.config, self._batches.load, self.split.train, self.micro_batch)
        for weights in self.model.state_dict().values():
            self.world.sum(weights if self.world.first else weights.zero_())

    def _train(self) -> float:
        train, size = self.split.train, self.config.batch_size
        order = torch.randperm(len(train), generator=self._order).tolist()
        total = torch.zeros((), device=self.device)
        self.model.train()
        self._precompute()
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            self._optimizer.zero_grad()
            total += self._backward(batch) * len(batch)
            for weight in self._weights if self.world.size > 1 else ():
                weight.grad = self.world.sum(torch.zeros_like(weight) if weight.grad is None else weight.grad)
            self._optimizer.step()
            self.model.settle()
        return self.world.sum(total).item() / len(train)

    def _precompute(self) -> None:
        """Keep what the loss needs of all training images, unless that is X itself or too much."""
        train, size = self.split.train, self.config.batch_size
        short = self.micro_batch < self._own_batch
        # Where memory is short, what is kept would be the largest part of it.
        if type(self.model).precompute is Decomposer.precompute or self._precomputed or short:
            return
        one = self.model.precompute(self._batches.lend(train[:1]))
        if len(train) * sum(part.nbytes for part in one) > PRECOMPUTED_BYTES:
            return
        kept = [part.new_zeros(len(train), *part.shape[1:]) for part in one]
        own = self.world.share(len(train))
        for start in own[::size]:
            stop = min(start + size, own.stop)
            for whole, part in zip(kept, self.model.precompute(self._batches.lend(train[start:stop])), strict=True):
                whole[start:stop] = part
        self._precomputed = [self.world.sum(whole) for whole in kept]

    def _backward(self, batch: list[int]) -> Tensor:
        """Add up a batch's gradients, and return its loss: this worker's part of both."""
        total = torch.zeros((), device=self.device)
        own = self.world.share(len(batch))
        for start in own[:: self.micro_batch]:
            places = batch[start : min(start + self.micro_batch, own.stop)]
            if self._precomputed:
                piece = tuple(whole[places] for whole in self._precomputed)
            else:
                piece = self.model.precompute(self._batches.lend([self.split.train[place] for place in places]))
            loss = self.model.precomputed_loss(*piece) * (len(places) / len(batch))
            torch.autograd.backward(loss)
            total += loss.detach()
        return total

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Return the validation figures, means over images and ranks."""
        self.model.eval()
        images, ranks = self.split.validation, self.config.ranks
        target_error = self.config.target_error
        count: Callable[[Tensor, Factors], tuple[Tensor, ...]] | None = None
        if target_error is not None:
            count = counter(self.model, target_error)
        elif self._own_bytes:
            count = own_bytes(self.model)
        width = len(Figures._fields) + len([name for name in self.figures if name in RATES])
        table_NKF = torch.zeros(len(images), len(ranks), width, dtype=torch.float64)
        # A trial short of memory in training is short of it here as well.
        short = self.micro_batch < self._own_batch
        size = min(VALIDATION_BATCH, self.micro_batch) if short else VALIDATION_BATCH
        own = self.world.share(len(images))
        for start in own[::size]:
            stop = min(start + size, own.stop)
            x_NTD = self._batches.lend(images[start:stop])
            a_NTR, b_NRD = self.model(x_NTD)
            for column, rank in enumerate(ranks):
                # An ordered basis: the leading columns are the factors of a lower rank.
                leading = Factors(a_NTR[..., :rank], b_NRD[:, :rank])
                rates = () if count is None else count(x_NTD, leading)
                table_NKF[start:stop, column] = torch.stack([*measure(x_NTD, *leading), *rates], -1)
        return self._over_images(self.world.sum(table_NKF))

    def _over_images(self, table_NKF: Tensor) -> dict[str, float]:
        seen_N, table_KNF = self._energy_N > 0, table_NKF.transpose(0, 1)
        figures = Figures(*table_KNF[..., : len(Figures._fields)].unbind(-1))
        means = {"val_mse": figures.mse_N, "val_token_cosine": figures.token_cosine_N}
        counted = [name for name in RATES if name in self.figures]
        rates = zip(counted, table_KNF[..., len(Figures._fields) :].unbind(-1), strict=False)
        found = {name: figure_KN[:, seen_N].mean().item() for name, figure_KN in (*means.items(), *rates)}
        if "val_residual_ratio" in self.figures:
            ratio_KN = residual_ratio(figures.residual_N, torch.stack(self._floors), self._energy_N)
            found["val_residual_ratio"] = mean_ratio(ratio_KN[:, seen_N])
            if WORST_RATIO in self.figures:
                found[WORST_RATIO] = ratio_KN[:, seen_N].max().item()
        return found

    def _judge(self, row: dict[str, float]) -> None:
        """Complete an epoch's row, keep its weights when they are the best, and decide whether to stop."""
        broken = [name for name in self.figures if not math.isfinite(row[name])]
        last = self.history[-1] if self.history else {}
        objective = self.config.objective
        best = {name: last.get(f"best_{name}", math.nan) for name in self.figures}
        least = self.config.excess(best), self._sign * last.get(f"best_{objective}", self._sign * math.inf)
        # What holds all that is required comes first, then what is nearer to it.
        improved = not broken and (self.config.excess(row), self._sign * row[objective]) < least
        source = row if improved else {name: last.get(f"best_{name}", math.nan) for name in self.figures[1:]}
        row |= {f"best_{name}": source[name] for name in self.figures[1:]}
        row["best_epoch"] = row["epoch"] if improved else last.get("best_epoch", 0)
        if broken:
            self.stopped_by = "error"
            self.reason = f"epoch {row['epoch']}: {', '.join(broken)} not finite; lower lr or check the features"
            return
        self.history.append(row)
        if improved:
            self.best_model.load_state_dict(self.model.state_dict())
        self._scheduler.step(self._sign * row[objective])
        self.stopped_by = self.config.ends_at(self.epoch, self.best_epoch)


def initialise(
    model: Decomposer, config: TrialConfig, load: Callable[[Sequence[int]], Tensor], train: Sequence[int], at_once: int
) -> None:
    """Set a model's weights from training images, so many in memory at once, as its training begins."""
    generator = stream(config.seed, "initialise")
    order = torch.randperm(len(train), generator=generator)[:INITIAL_IMAGES].tolist()
    images = [train[place] for place in order]
    model.initialise(_Batches(load, images, at_once), generator)


class _Batches:
    """Batches that are loaded as they are gone through, as often as that is."""

    def __init__(self, load: Callable[[Sequence[int]], Tensor], images: Sequence[int], at_once: int) -> None:
        self._load, self._images, self._at_once = load, images, at_once

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self._images), self._at_once):
            yield self._load(self._images[start : start + self._at_once])


def largest_share(config: TrialConfig, world: World = ALONE) -> int:
    """How many images of a batch a worker has at most."""
    return math.ceil(config.batch_size / world.size)
