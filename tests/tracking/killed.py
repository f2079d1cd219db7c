"""Processes that are killed while they track: forked from this script, for importing MLflow takes seconds each time.

python killed.py RESULTS TABLE…    a study's driver, killed at ten random statements, then left to end; then
                                   MLflow making RESULTS/TABLE/mlflow.db, killed before that table; then we
"""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import mlflow.store.db.utils
import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store
import sqlalchemy
from tracked_study import build_plan, config_of, outcome_of, write_trial

from lowrank_tune.config.plan import Plan
from lowrank_tune.tracking import tracker
from lowrank_tune.tracking.database import open_database
from lowrank_tune.tracking.reconcile import reconcile
from lowrank_tune.tracking.store import resolve_store, set_mlflow_defaults, sqlite_uri
from lowrank_tune.trials.outcomes import read_trial

TRIALS, EPOCHS = 12, 3


def drive(plan: Plan) -> None:
    reconcile(plan)
    with tracker.Tracker(plan) as tracking:
        for number in range(TRIALS):
            config = config_of(number)
            directory = plan.study_dir / "trials" / config.trial_id
            if (directory / "outcome.json").exists():
                continue
            before = read_trial(directory)
            write_trial(plan, config, len(before.history) if before else 0)
            tracking.trial_started(config)
            for epoch in range(1 + len(before.history if before else ()), EPOCHS + 1):
                time.sleep(0.02)
                write_trial(plan, config, epoch)
                tracking.trial_epoch(config.trial_id, epoch, {})
            outcome = outcome_of(plan, config)
            write_trial(plan, config, EPOCHS, outcome)
            tracking.trial_ended(outcome)
    assert tracking.problems == ()


def forked(work: Callable[..., object], *arguments: object, dies_at: int = 0, beginning: str = "") -> None:
    """Do something in a process of its own, which is killed before its statement of this number that begins so."""
    child = os.fork()
    if child == 0:
        seen = []

        @sqlalchemy.event.listens_for(sqlalchemy.Engine, "before_cursor_execute")
        def watch(connection: object, cursor: object, statement: str, *rest: object) -> None:
            seen.extend([None] * statement.lstrip().startswith(beginning))
            if len(seen) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            work(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (-signal.SIGKILL if dies_at else 0)


def make_by_mlflow(path: Path) -> None:
    mlflow.store.db.utils._initialize_tables(sqlalchemy.create_engine(sqlite_uri(path)))


def main(results: Path, tables: list[str]) -> None:
    set_mlflow_defaults()
    tracker.PAUSE_S = 0.05
    plan = build_plan(results)
    plan.study_dir.mkdir(parents=True)
    moments = random.Random(os.environ.get("SEED", "7"))
    for _ in range(10):
        forked(drive, plan, dies_at=moments.randint(1, 90))
    forked(drive, plan)
    for table in tables:
        place = results / table
        (place / "ours").mkdir(parents=True)
        forked(make_by_mlflow, place / "mlflow.db", dies_at=1, beginning=f"CREATE TABLE {table} ")
        forked(open_database, resolve_store(None, place / "ours"), dies_at=1, beginning=f"CREATE TABLE {table} ")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
