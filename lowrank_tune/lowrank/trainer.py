"""One training: epochs over the training split, each judged on the validation split beside the optimum.

N images, T tokens, D dim.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Decomposer, make_decomposer, save_decomposer
from lowrank_tune.lowrank.files import write_whole
from lowrank_tune.lowrank.metrics import Figures, measure, residual_ratio
from lowrank_tune.lowrank.oracle import Optimum
from lowrank_tune.lowrank.residence import batches_on
from lowrank_tune.lowrank.seeds import stream
from lowrank_tune.records import Split, StoppedBy, TrialConfig

logger = logging.getLogger(__name__)

INITIAL_IMAGES = 256
"""Training images that a decomposer's start is fitted on, at most: a rank's axes need no more, and it then costs less
than an epoch."""
CONDENSED_BYTES = 256 * 2**20
"""Memory for what training images condense to, kept from epoch to epoch where all of it fits: 500 images of 256
tokens at rank 128. A constant, so that a trial's memory does not grow with the cache."""
VALIDATION_BATCH = 8
"""Validation images in memory at a time."""
FIGURES = ("train_loss", "val_mse", "val_token_cosine", "val_residual_ratio")
LR_FACTOR = 0.5
"""What the learning rate is multiplied by on a plateau."""
LR_PATIENCE = 3
"""Epochs without a lower validation MSE before that; several plateaus fit into the default patience of 10."""


@dataclass(frozen=True, slots=True)
class Trained:
    """An epoch that was trained elsewhere, on this trainer's weights, optimiser and order of images.

    Attributes:
        loss: the mean loss over its images.
        seconds: this training's share of the time that it took.
    """

    loss: float
    seconds: float


class Trainer:
    """Trains one decomposer: AdamW, the learning rate halved on plateaus, early stopping, the best weights kept.

    On the CPU the same arguments give the same numbers, and a restored trainer goes on as if it had never stopped.

    Args:
        config: The trial.
        data: The features.
        split: Which images train and which validate.
        optimum: The optimum of `split.validation`, in its order.
        device: Where to train.
        micro_batch: Images in memory at a time, where `batch_size` of them are too many: gradients are gathered over so
            many parts of each batch, and the numbers are the same but for rounding. All of them by default.

    Attributes:
        model: the decomposer as of the last epoch.
        best_model: the decomposer of the epoch with the lowest validation MSE.
        history: one row an epoch, as `step` returned it; an epoch that failed has none.
        stopped_by: None while it may go on, then `budget`, `patience` or `error`.
        reason: why it failed, one line; empty otherwise.

    Raises:
        InputError: The configuration does not fit the features, a split is empty, or the optimum is another split's.
    """

    def __init__(
        self,
        config: TrialConfig,
        data: FeatureMatrix,
        split: Split,
        optimum: Optimum,
        device: str = "cpu",
        micro_batch: int | None = None,
    ) -> None:
        if not split.train or not split.validation:
            raise InputError(f"trial {config.trial_id}: training and validation need an image each; change `split`")
        if len(optimum.energy_N) != len(split.validation):
            raise InputError(
                f"trial {config.trial_id}: the optimum is of {len(optimum.energy_N)} images, "
                f"the validation split has {len(split.validation)}; measure the optimum of this split"
            )
        self.config = config
        self.data = data
        self.split = split
        self.device = device
        self._batches = batches_on(data, device)
        self.micro_batch = min(micro_batch or config.batch_size, config.batch_size)
        self.history: list[dict[str, float]] = []
        self.stopped_by: StoppedBy | None = None
        self.reason = ""
        self._energy_N = optimum.energy_N
        self._floors = [optimum.at(rank).residual_N for rank in config.ranks]
        self._condensed: list[Tensor] = []
        self._order = stream(config.seed, "order")
        self._saved_epoch = 0
        self.model = make_decomposer(config, data.tokens, data.dim).to(device)
        self.best_model = copy.deepcopy(self.model)
        self._optimizer = AdamW(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self._scheduler = ReduceLROnPlateau(self._optimizer, factor=LR_FACTOR, patience=LR_PATIENCE)

    @property
    def epoch(self) -> int:
        """Epochs trained."""
        return len(self.history)

    @property
    def best_epoch(self) -> int:
        """The epoch with the lowest validation MSE, from 1; 0 before the first."""
        return int(self.history[-1]["best_epoch"]) if self.history else 0

    def step(self, trained: Trained | None = None) -> dict[str, float]:
        """Train one epoch and validate.

        Args:
            trained: what `fused.train_together` gave for this epoch, which is then only validated.

        Returns:
            `epoch` (from 1), `train_loss`, `val_mse`, `val_token_cosine`, `val_residual_ratio` (means over images),
            `lr` (that the epoch trained with), `seconds` (of this epoch), and `best_epoch`, `best_val_mse`,
            `best_val_token_cosine`, `best_val_residual_ratio`, those of the epoch with the lowest `val_mse`. When the
            epoch fails (`stopped_by` is then `error`) the figures that are not finite say so, and the best ones are
            still those of the epochs before.

        Raises:
            RuntimeError: The training has stopped already.
            CacheError: The features cannot be read.
        """
        if self.stopped_by is not None:
            raise RuntimeError(f"trial {self.config.trial_id} has stopped ({self.stopped_by})")
        started = time.perf_counter()
        row: dict[str, float] = {"epoch": self.epoch + 1, "lr": self._optimizer.param_groups[0]["lr"]}
        row |= dict.fromkeys(FIGURES, math.nan)
        try:
            if trained is None:
                self.begin()
                row["train_loss"] = self._train()
            else:
                row["train_loss"] = trained.loss
            row |= self._validate()
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, but not in its __all__
            logger.warning("trial %s, epoch %d: %s", self.config.trial_id, row["epoch"], error)
        row["seconds"] = time.perf_counter() - started + (trained.seconds if trained else 0.0)
        self._judge(row)
        return row

    def save(self, directory: Path) -> None:
        """Write best_model.safetensors (when it improved since the last call), config.json and history.json.

        Each file is replaced as a whole.
        """
        if self.best_epoch > self._saved_epoch:
            save_decomposer(self.best_model, directory / "best_model.safetensors")
            self._saved_epoch = self.best_epoch
        _write_json(directory / "config.json", asdict(self.config))
        _write_json(directory / "history.json", self.history)

    def state(self) -> dict[str, Any]:
        """Return all that `restore` needs: tensors, numbers and text only, independent of what training does next."""
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

    def begin(self) -> None:
        """Set the weights from training images, before the first epoch only; `step` does so by itself."""
        if self.epoch:
            return
        generator = stream(self.config.seed, "initialise")
        order = torch.randperm(len(self.split.train), generator=generator)[:INITIAL_IMAGES].tolist()
        images = [self.split.train[place] for place in order]
        size = self.micro_batch
        starts = range(0, len(images), size)
        self.model.initialise((self._batches.load(images[start : start + size]) for start in starts), generator)

    def _condense(self) -> list[Tensor]:
        """Return what the training images condense to, made once; nothing where it is X itself or too much to keep."""
        train, size = self.split.train, self.config.batch_size
        # Where memory is short, what is kept would be the largest part of it.
        if type(self.model).condense is Decomposer.condense or self._condensed or self.micro_batch < size:
            return self._condensed
        one = self.model.condense(self._batches.load(train[:1]))
        if len(train) * sum(part.nbytes for part in one) <= CONDENSED_BYTES:
            self._condensed = [part.new_empty(len(train), *part.shape[1:]) for part in one]
            for start in range(0, len(train), size):
                parts = self.model.condense(self._batches.load(train[start : start + size]))
                for whole, part in zip(self._condensed, parts, strict=True):
                    whole[start : start + size] = part
        return self._condensed

    def _train(self) -> float:
        """Return the mean loss of an epoch."""
        train, size = self.split.train, self.config.batch_size
        order = torch.randperm(len(train), generator=self._order).tolist()
        total = torch.zeros((), device=self.device)
        self.model.train()
        kept = self._condense()
        for start in range(0, len(order), size):
            places = order[start : start + size]
            self._optimizer.zero_grad()
            if kept:
                loss = self.model.condensed_loss(*(part[places] for part in kept))
                torch.autograd.backward(loss)
            else:
                loss = self._backward([train[place] for place in places])
            self._optimizer.step()
            total += loss.detach() * len(places)
        return total.item() / len(train)

    def _backward(self, images: list[int]) -> Tensor:
        """Gather the gradients of a batch, `micro_batch` images at a time, and return its loss."""
        parts = [images[start : start + self.micro_batch] for start in range(0, len(images), self.micro_batch)]
        if len(parts) > 1:
            pieces = [partial(self._condensed_of, part) for part in parts]
            return self.model.backward_in_pieces(pieces, [len(part) for part in parts])
        loss = self.model.loss(self._batches.lend(images))
        torch.autograd.backward(loss)
        return loss

    def _condensed_of(self, images: list[int]) -> tuple[Tensor, ...]:
        return self.model.condense(self._batches.load(images))

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        self.model.eval()
        images = self.split.validation
        parts: list[list[Figures]] = [[] for _ in self.config.ranks]
        # A trial short of memory in training is short of it here as well.
        short = self.micro_batch < self.config.batch_size
        size = min(VALIDATION_BATCH, self.micro_batch) if short else VALIDATION_BATCH
        for start in range(0, len(images), size):
            x_NTD = self._batches.lend(images[start : start + size])
            a_NTR, b_NRD = self.model(x_NTD)
            for rank, own in zip(self.config.ranks, parts, strict=True):
                # An ordered basis: the leading columns are the factors of a lower rank.
                figures = measure(x_NTD, a_NTR[..., :rank], b_NRD[:, :rank])
                own.append(Figures(*(figure.cpu() for figure in figures)))
        rows = []
        for own, floor_N in zip(parts, self._floors, strict=True):
            figures = Figures(*(torch.cat(column) for column in zip(*own, strict=True)))
            ratio_N = residual_ratio(figures.residual_N, floor_N, self._energy_N)
            rows.append(torch.stack([figures.mse_N.mean(), figures.token_cosine_N.mean(), ratio_N.mean()]))
        return dict(zip(FIGURES[1:], torch.stack(rows).mean(0).tolist(), strict=True))

    def _judge(self, row: dict[str, float]) -> None:
        """Complete an epoch's row, keep its weights when they are the best, and decide whether to stop."""
        broken = [name for name in FIGURES if not math.isfinite(row[name])]
        last = self.history[-1] if self.history else {}
        improved = not broken and row["val_mse"] < last.get("best_val_mse", math.inf)
        source = row if improved else {name: last.get(f"best_{name}", math.nan) for name in FIGURES[1:]}
        row |= {f"best_{name}": source[name] for name in FIGURES[1:]}
        row["best_epoch"] = row["epoch"] if improved else last.get("best_epoch", 0)
        if broken:
            self.stopped_by = "error"
            self.reason = f"epoch {row['epoch']}: {', '.join(broken)} not finite; lower lr or check the features"
            return
        self.history.append(row)
        if improved:
            self.best_model.load_state_dict(self.model.state_dict())
        self._scheduler.step(row["val_mse"])
        self.stopped_by = self.config.ends_at(self.epoch, self.best_epoch)


def _write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
