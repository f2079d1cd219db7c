"""What every room's tests share: quiet libraries and one Ray."""

import os
from collections.abc import Callable, Iterator

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of two CPUs for the whole session; starting one takes seconds."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    """Runs a command as a person types it: its exit code, stdout and stderr."""
    from lowrank_tune.cli import run

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return run([str(word) for word in arguments]), *capsys.readouterr()

    return call


DEAR = {"ran": "study", "cluster": "cluster", "tiny_cache": "trials"}
"""By fixture that is built once, the group of the files that look at it."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist one process has every file that looks at the one big study; each other file stays whole."""
    groups = {
        item.path: group for item in items for name, group in DEAR.items() if name in getattr(item, "fixturenames", ())
    }
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups.get(item.path, str(item.path))))
    # The longest first, or one process ends with them while the other waits.
    items.sort(key=lambda item: item.path not in groups)
