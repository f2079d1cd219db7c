"""What it is worth to search each rank for itself: simulated, as a replay of many seeds.

    .venv/bin/python scripts/bench_search.py [--seeds N]

No training: the error of a trial is a smooth function of lr, lambda_b and lambda_ortho over a floor that differs by
rank, with 0.5 % of noise, as `direct` has it. The study's own searcher draws 48 trials over three ranks, once dealt
evenly to groups that are searched for themselves and once freely, as one TPE over all would. Printed is by how much the
best trial of each rank lies above the best possible one, and how many trials it had; two minutes. In the second table
the best learning rate lies a decade lower from one rank to the next, so that what one rank teaches misleads another.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from lowrank_tune.config.plan import make_plan
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.trials.search import StudySearcher, open_optuna_study

FLOORS = {16: 4.3, 64: 16.0, 128: 57.0}
TRIALS = 48


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    for title, best_lr in (
        ("near the same best learning rate", {16: -2.6, 64: -2.9, 128: -3.2}),
        ("best learning rates a decade apart", {16: -2.0, 64: -3.0, 128: -4.0}),
    ):
        table = Table(title=f"{TRIALS} trials, {seeds} seeds, {title}", title_justify="left")
        for column in ("deal", *(f"rank {rank}" for rank in FLOORS)):
            table.add_column(column, justify="right")
        for deal in ("evenly", "freely"):
            runs = [simulate(deal, seed, best_lr) for seed in range(seeds)]
            cells = []
            for rank, floor in FLOORS.items():
                found = [run[rank] for run in runs]
                above = np.mean([min(errors, default=math.nan) / floor - 1 for errors in found])
                cells.append(f"{above:.1%} ({np.mean([len(errors) for errors in found]):.0f} trials)")
            table.add_row(deal, *cells)
        Console(width=110).print(table)


def simulate(deal: str, seed: int, best_lr: dict[int, float]) -> dict[int, list[float]]:
    """The errors that a search finds at each rank."""
    space = {
        "rank": list(FLOORS),
        "lr": {"loguniform": [1e-5, 1e-1]},
        "families": {"direct": {"lambda_b": {"loguniform": [1e-7, 1e-1]}, "lambda_ortho": {"loguniform": [1e-6, 1]}}},
    }
    study = {"name": "search", "seed": seed, "features": {"source": {"samples": 96}}}
    study["search"] = {"method": "tpe", "trials": TRIALS, "deal": deal, "space": space}
    noise = np.random.default_rng(seed)
    errors: dict[int, list[float]] = {rank: [] for rank in FLOORS}
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(StudySpec.model_validate(study), Path(folder), datetime.now(UTC))
        searcher = StudySearcher(plan, open_optuna_study(plan, Path(folder) / "optuna.journal"))
        for number in range(TRIALS):
            drawn = searcher.suggest(str(number))
            assert isinstance(drawn, dict)
            trial, params = drawn["trial"], drawn["trial"]["family_params"]
            off = math.log10(trial["lr"]) - best_lr[trial["rank"]]
            further = (
                0.08 * (math.log10(params["lambda_b"]) + 4) ** 2 + 0.04 * (math.log10(params["lambda_ortho"]) + 3) ** 2
            )
            error = FLOORS[trial["rank"]] * math.exp(0.35 * off**2 + further + 0.005 * abs(noise.normal()))
            errors[trial["rank"]].append(error)
            told = {"epoch": 1, "stopped_by": "budget"} | dict.fromkeys(
                ("val_residual_ratio", "best_val_residual_ratio"), error
            )
            searcher.on_trial_complete(str(number), told)
    return errors


if __name__ == "__main__":
    main()
