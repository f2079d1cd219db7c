"""A removal that is killed three times, each time after one more run was deleted in MLflow.

python removed.py RESULTS STUDY_ID
"""

import sys

import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 (once, not in each process that is forked)
from killed import forked

from lowrank_tune.tracking.store import set_mlflow_defaults
from lowrank_tune.upkeep import remove_studies

set_mlflow_defaults()
for _ in range(3):
    forked(remove_studies, [sys.argv[2]], sys.argv[1], dies_at=2, beginning="UPDATE runs")
