"""What a search is worth: ways to search, replayed on a grid of trainings that was trained once.

    .venv/bin/python scripts/bench_search.py [--seeds 50]       # the replay, in simulated time: some minutes
    .venv/bin/python scripts/bench_search.py --build DIR        # the grid anew: half an hour of CPU time

The grid, `search_grid.parquet` beside this script, has ρ on validation images after each of 20 epochs of 303 trainings:
all families at ranks 8, 16 and 32, on features of a trained vision transformer (made in DIR by `trained_features.py`;
[64, 384], for of each image every other token of every other row is taken), photographs held out. Between its
points the logarithm of ρ is taken as linear in the logarithms of the parameters: a search draws from ranges, as in a
study. The defaults are among its points, which favours them a little.

Of each way is told, for each family and rank, after how many epochs of training its best lies within 1 % of the grid's
best: the mean over seeds, what is not found counting as the whole budget of 16 trials of 20 epochs; and in how many
of the seeds it was found. The ways:

    defaults      one training with the family's published defaults: told is its ρ over the grid's best
    random        independent draws, each trained to its end
    first epoch   16 draws trained for one epoch, then the best 4 to their end, the nearest first
    tpe           Optuna's TPE by itself, each trial trained to its end
    service       this service with its defaults: the family's defaults first, TPE dealt to groups, ASHA, patience
    freely        the same with `deal: freely`
    gp, auto      the service with `method: gp` and `method: auto`, on fewer seeds, for these samplers take long
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pandas as pd
import torch
from bench_decomposers import _written
from rich.console import Console
from rich.table import Table
from scipy.interpolate import RegularGridInterpolator

from lowrank_tune.config.plan import Plan, make_plan
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.lowrank.trainer import Trainer
from lowrank_tune.records import Split, TrialConfig
from lowrank_tune.trials.drawing import auto_sampler
from lowrank_tune.trials.scheduler import make_scheduler
from lowrank_tune.trials.search import StudySearcher

GRID = Path(__file__).with_name("search_grid.parquet")
RANKS = (8, 16, 32)
EPOCHS, TRIALS = 20, 16
"""Of a training; of a search in each of its groups."""
BUDGET = EPOCHS * TRIALS
NEAR = math.log(1.01)
KEPT = 4
"""Trials that go on after the first epoch."""
SLOW_SEEDS = 6
"""Of samplers that take long to draw."""
AXES: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "direct": {
        "lr": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
        "lambda_b": (1e-6, 1e-4, 1e-2),
        "lambda_ortho": (1e-5, 1e-3, 1e-1),
    },
    "sketch": {"lr": tuple(10.0 ** (half / 2) for half in range(-10, 1))},
    "refined": {"lr": tuple(10.0 ** (half / 2) for half in range(-10, -1)), "steps": (2, 3)},
    "shared": {"lr": tuple(10.0 ** (half / 2) for half in range(-10, -1)), "lambda_rate": (5.0, 30.0, 200.0)},
}
"""The grid's; of `steps` every value is one, the others are ranges between their ends."""
SIDE = 16
"""Tokens on a side of the pictures."""
IMAGES, HELD_OUT = 48, 16
"""That train, and that validate."""

Point = Mapping[str, float]
Near = dict[int, int]
"""The epochs that a search has spent until near the best, by rank."""


def main() -> None:
    """Train the grid, or replay searches on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, metavar="DIR", help="train the grid on features made in DIR")
    parser.add_argument("--seeds", type=int, default=50)
    options = parser.parse_args()
    if options.build:
        build(options.build)
        return
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    began = time.monotonic()
    grid = Grid(pd.read_parquet(GRID))
    ways: dict[str, tuple[Callable[..., Near], int]] = {
        "random": (partial(plainly, random=True), options.seeds),
        "first epoch": (first_epoch, options.seeds),
        "tpe": (partial(plainly, random=False), options.seeds),
        "service": (partial(as_the_service, "tpe"), options.seeds),
        "freely": (partial(as_the_service, "tpe", deal="freely"), options.seeds),
        "gp": (partial(as_the_service, "gp"), min(options.seeds, SLOW_SEEDS)),
    }
    try:
        auto_sampler()
        ways["auto"] = (partial(as_the_service, "auto"), min(options.seeds, SLOW_SEEDS))
    except InputError as error:
        print(f"auto did not run: {error}")
    jobs = [(way, family, seed) for way, (_, seeds) in ways.items() for family in AXES for seed in range(seeds)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        replayed = pool.starmap(partial(_replay, grid, {way: search for way, (search, _) in ways.items()}), jobs)
    _print(grid, [(way, family, found) for (way, family, _), found in zip(jobs, replayed, strict=True)])
    print(f"{time.monotonic() - began:.0f} s")


class Grid:
    """The trainings of the grid, and what lies between them."""

    def __init__(self, table: pd.DataFrame) -> None:
        self._curves: dict[tuple[str, int, float], RegularGridInterpolator] = {}
        self.best: dict[tuple[str, int], float] = {}
        for (family, rank), own in table.groupby(["family", "rank"]):
            self.best[family, rank] = float(own["log_ratio"].min())
            for steps, alike in own.groupby("steps"):
                names = [name for name in AXES[family] if name != "steps"]
                axes = [np.log(AXES[family][name]) for name in names]
                curves = alike.sort_values([*names, "epoch"])["log_ratio"].to_numpy()
                cube = curves.reshape(*(len(axis) for axis in axes), EPOCHS)
                self._curves[family, rank, steps] = RegularGridInterpolator(axes, cube)

    def curve(self, family: str, rank: int, point: Point) -> np.ndarray:
        """Log ρ after each epoch [EPOCHS], NaN from where a neighbour broke."""
        names = [name for name in AXES[family] if name != "steps"]
        ends = [(AXES[family][name][0], AXES[family][name][-1]) for name in names]
        place = [math.log(np.clip(point[name], *end)) for name, end in zip(names, ends, strict=True)]
        curve: np.ndarray = self._curves[family, rank, point.get("steps", 0)](place)[0]
        return curve


@dataclass
class Spent:
    """The epochs that a group's search has spent, until it came near."""

    best: float
    epochs: int = 0
    near: int = 0

    def epoch(self, log_ratio: float) -> None:
        """Count one."""
        self.epochs += 1
        if not self.near and log_ratio <= self.best + NEAR:
            self.near = self.epochs

    @property
    def told(self) -> int:
        """Of a group in which nothing came near, its whole budget."""
        return self.near or BUDGET


def _replay(grid: Grid, ways: Mapping[str, Callable[..., Near]], way: str, family: str, seed: int) -> Near:
    return ways[way](grid, family, seed)


def plainly(grid: Grid, family: str, seed: int, *, random: bool) -> Near:
    """Optuna's own sampler in each group, every trial trained to its end."""
    found = Near()
    for rank in RANKS:
        sampler = optuna.samplers.RandomSampler(seed) if random else optuna.samplers.TPESampler(seed=seed)
        study, spent = optuna.create_study(sampler=sampler), Spent(grid.best[family, rank])
        while spent.epochs < BUDGET and not spent.near:
            trial = study.ask()
            curve = grid.curve(family, rank, _drawn(trial, family))
            for value in curve:
                spent.epoch(value)
            study.tell(trial, None if np.isnan(curve).all() else float(np.nanmin(curve)),
                       state=optuna.trial.TrialState.FAIL if np.isnan(curve).all() else None)  # fmt: skip
        found[rank] = spent.told
    return found


def first_epoch(grid: Grid, family: str, seed: int) -> Near:
    """Many draws trained for one epoch, then the best of them to their end."""
    found = Near()
    for rank in RANKS:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
        spent = Spent(grid.best[family, rank])
        curves = [grid.curve(family, rank, _drawn(study.ask(), family)) for _ in range(TRIALS)]
        for curve in curves:
            spent.epoch(curve[0])
        for curve in sorted(curves, key=lambda curve: math.inf if math.isnan(curve[0]) else curve[0])[:KEPT]:
            for value in curve[1:]:
                spent.epoch(value)
        found[rank] = spent.told
    return found


def as_the_service(method: str, grid: Grid, family: str, seed: int, *, deal: str = "evenly") -> Near:
    """The service's own searcher and scheduler, one trial at a time."""
    plan = _plan(method, family, seed, deal)
    # In memory: a journal on disk would take most of the time.
    directions = ["minimize"] * len(plan.spec.objectives)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0), directions=directions)
    searcher, scheduler = StudySearcher(plan, study), make_scheduler(plan.spec)
    spent = {rank: Spent(grid.best[family, rank]) for rank in RANKS}
    for number in itertools.count():
        suggested = searcher.suggest(str(number))
        if not isinstance(suggested, dict) or all(each.near for each in spent.values()):
            break
        _train(str(number), TrialConfig(**suggested["trial"]), grid, searcher, scheduler, spent)
    return {rank: each.told for rank, each in spent.items()}


def _train(
    key: str, config: TrialConfig, grid: Grid, searcher: StudySearcher, scheduler: Any, spent: Mapping[int, Spent]
) -> None:
    trial = SimpleNamespace(trial_id=key, config={"trial": asdict(config)})
    curve = grid.curve(config.family, config.rank, {"lr": config.lr, **config.family_params})  # type: ignore[dict-item]
    scheduler.on_trial_add(None, trial)
    best, best_epoch, result = math.inf, 0, dict[str, Any]()
    for epoch, value in enumerate(curve.tolist(), start=1):
        spent[config.rank].epoch(value)
        if value < best:
            best, best_epoch = value, epoch
        ends = "error" if math.isnan(value) else config.ends_at(epoch, best_epoch)
        result = {"epoch": epoch, "val_residual_ratio": math.exp(value), "best_val_residual_ratio": math.exp(best)}
        result |= {"stopped_by": ends} if ends else {}
        if ends:
            break
        searcher.on_trial_result(key, result)
        if scheduler.on_trial_result(None, trial, result) == "STOP":
            result["stopped_by"] = "asha"
            break
    scheduler.on_trial_complete(None, trial, result)
    searcher.on_trial_complete(key, result)


def _drawn(trial: optuna.Trial, family: str) -> dict[str, float]:
    return {
        name: trial.suggest_categorical(name, values)
        if name == "steps"
        else trial.suggest_float(name, values[0], values[-1], log=True)
        for name, values in AXES[family].items()
    }


def _plan(method: str, family: str, seed: int, deal: str = "evenly") -> Plan:
    ranges = {
        name: list(values) if name == "steps" else {"loguniform": [values[0], values[-1]]}
        for name, values in AXES[family].items()
    }
    space = {"rank": list(RANKS), "lr": ranges.pop("lr"), "families": {family: ranges}}
    study = {
        "name": "search",
        "seed": seed,
        "features": {"source": {"samples": 96}},
        "search": {"method": method, "deal": deal, "trials": TRIALS * len(RANKS), "space": space},
        "training": {"epochs": EPOCHS},
    }
    return make_plan(StudySpec.model_validate(study), Path("results"), datetime.now(UTC))


def build(directory: Path) -> None:
    """Train every configuration of the grid in two processes, and write the table."""
    from trained_features import trained_sets

    (chosen,) = trained_sets(directory, names=["vit-last"])
    groups = list(dict.fromkeys(chosen.groups))
    held_out = set(groups[::4])
    places = [
        [place for place, group in enumerate(chosen.groups) if (group in held_out) == kept] for kept in (False, True)
    ]
    # As many of each group as there are crops in turn, not the first ones.
    train, validate = (
        np.array(of)[np.linspace(0, len(of) - 1, most).round().astype(int)].tolist()
        for of, most in zip(places, (IMAGES, HELD_OUT), strict=True)
    )
    with tempfile.TemporaryDirectory() as scratch:
        grid_NhwD = chosen.x_NTD[[*train, *validate]].unflatten(1, (SIDE, SIDE))
        features = _written(grid_NhwD[:, ::2, ::2].flatten(1, 2), Path(scratch))
        jobs = list(_configs())
        began = time.monotonic()
        rows: list[dict[str, Any]] = []
        with multiprocessing.get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
            for number, trained in enumerate(pool.imap(partial(_trained, features), jobs), start=1):
                rows += trained
                if number % 10 == 0:
                    print(f"{number} of {len(jobs)} after {time.monotonic() - began:.0f} s", flush=True)
    table = pd.DataFrame(rows).astype({"log_ratio": "float32", "rank": "int16", "epoch": "int8"})
    table.to_parquet(GRID, index=False, compression="zstd")
    print(f"{GRID.name}: {len(jobs)} trainings, {GRID.stat().st_size / 1e3:.0f} kB")


def _configs() -> Iterator[TrialConfig]:
    for family, axes in AXES.items():
        for rank in RANKS:
            for values in itertools.product(*axes.values()):
                params = dict(zip(axes, values, strict=True))
                yield TrialConfig(
                    trial_id="grid",
                    number=0,
                    seed=0,
                    family=family,
                    rank=rank,
                    lr=params.pop("lr"),
                    weight_decay=1e-5,
                    batch_size=8,
                    epochs=EPOCHS,
                    patience=EPOCHS,
                    family_params=({"token_transform": "none"} if family == "shared" else {}) | params,
                )


def _trained(features: Any, config: TrialConfig) -> list[dict[str, Any]]:
    """Log ρ after each epoch, NaN from where the training broke."""
    data = FeatureMatrix(features)
    split = Split(tuple(range(IMAGES)), tuple(range(IMAGES, IMAGES + HELD_OUT)), ())
    trainer = Trainer(config, data, split, measure_optimum([data.load(split.validation)]))
    while trainer.stopped_by is None:
        trainer.step()
    ratios = [row["val_residual_ratio"] for row in trainer.history] + [math.nan] * EPOCHS
    point = {"family": config.family, "rank": config.rank, "lr": config.lr, "steps": 0} | dict.fromkeys(NAMES, 0.0)
    point |= {name: value for name, value in config.family_params.items() if name != "token_transform"}
    return [point | {"epoch": epoch, "log_ratio": math.log(ratios[epoch - 1])} for epoch in range(1, EPOCHS + 1)]


NAMES = ("lambda_b", "lambda_ortho", "lambda_rate")


def _print(grid: Grid, replayed: Sequence[tuple[str, str, Near]]) -> None:
    ways = list(dict.fromkeys(way for way, _, _ in replayed))
    table = Table(title="Epochs until within 1 % of the grid's best, and where it was found", title_justify="left")
    for column in ("", "defaults", *ways):
        table.add_column(column, justify="right" if column else "left")
    means: dict[str, list[float]] = {way: [] for way in ways}
    for family, rank in itertools.product(AXES, RANKS):
        cells = [f"{family} {rank}", f"{_default_ratio(grid, family, rank):.3f}"]
        for way, own in means.items():
            spent = [found[rank] for other, kind, found in replayed if (other, kind) == (way, family)]
            own.append(float(np.mean(spent)))
            cells.append(f"{own[-1]:.0f}, {np.mean(np.array(spent) < BUDGET):.0%}")
        table.add_row(*cells)
    table.add_row("all", "", *(f"{np.mean(own):.0f}" for own in means.values()))
    Console(width=110).print(table)


def _default_ratio(grid: Grid, family: str, rank: int) -> float:
    """Of the family's defaults, ρ over the best."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    searcher = StudySearcher(_plan("tpe", family, 0), study)
    drawn = (TrialConfig(**searcher.suggest(str(number))["trial"]) for number in range(len(RANKS)))  # type: ignore[index]
    config = next(config for config in drawn if config.rank == rank)
    curve = grid.curve(family, rank, {"lr": config.lr, **config.family_params})  # type: ignore[dict-item]
    return math.exp(float(np.nanmin(curve)) - grid.best[family, rank])


if __name__ == "__main__":
    main()
