"""A study file is checked at once: reading one must not wait for torch or Ray to load."""

import subprocess
import sys

HEAVY = {"torch", "ray", "mlflow", "optuna", "matplotlib", "transformers", "pandas", "numpy"}


def test_the_whole_room_loads_without_a_heavy_library() -> None:
    code = (
        "import sys, lowrank_tune.config.loading, lowrank_tune.config.plan, lowrank_tune.config.render;"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "pydantic" in loaded
    assert HEAVY.isdisjoint(loaded)
