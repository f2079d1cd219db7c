from pathlib import Path

import mlflow
import pytest

from lowrank_tune.tracking.store import local_uri


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making one takes seconds, copying it none."""
    results = tmp_path_factory.mktemp("migrated")
    mlflow.MlflowClient(local_uri(results)).search_experiments()
    return results / "mlflow.db"
