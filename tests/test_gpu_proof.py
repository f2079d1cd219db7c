"""scripts/gpu_proof: its CPU twin, on a machine that has what the script asks for and nothing else."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NEEDED = ("torch", "transformers", "numpy", "safetensors", "pillow")


def with_their_own(names: tuple[str, ...]) -> set[str]:
    """Packages, and all that they require."""
    found, open_ones = set[tuple[str, frozenset[str]]](), [Requirement(name) for name in names]
    while open_ones:
        each = open_ones.pop()
        known = (re.sub(r"[-_.]+", "-", each.name).lower(), frozenset(each.extras))
        if known in found:
            continue
        try:
            requires = importlib.metadata.distribution(each.name).requires or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        found.add(known)
        for one in map(Requirement, requires):
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *each.extras)):
                open_ones.append(one)
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def bare_machine(tmp_path_factory):
    """A directory of packages that holds what the script needs."""
    directory = tmp_path_factory.mktemp("packages")
    for name in with_their_own(NEEDED):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            place = Path(str(distribution.locate_file(top)))
            if place.exists() and not (directory / top).exists():
                (directory / top).symlink_to(place.resolve())
    return directory


def test_the_twin_holds_everything_on_a_machine_with_torch_and_transformers_alone(bare_machine, tmp_path):
    for absent in ("ray", "mlflow", "optuna", "pandas", "pyarrow", "scipy", "constriction", "torchvision", "joblib"):
        assert not (bare_machine / absent).exists()
    ran = subprocess.run(
        [sys.executable, "-S", ROOT / "scripts/gpu_proof", "--json", tmp_path / "proof.json"],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(bare_machine),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "no GPU here" in ran.stdout and "All that must hold holds." in ran.stdout
    told = json.loads((tmp_path / "proof.json").read_text())
    right, fast = ({row["what"]: row for row in told[part]} for part in ("right", "fast"))
    assert told["failed"] == 0 and len(right) > 40
    assert {row["verdict"] for row in right.values()} == {"holds", "measured", "left out"}
    assert [what for what, row in right.items() if row["verdict"] == "left out"] == ["coded streams"]
    assert right["faults put into 200 of them: found"]["measured"] == "200"
    assert right["found in the sound ones"]["measured"] == "0"
    assert "going on with" in right["out of memory in the tower: batches tried and then taken"]["measured"]
    assert [what for what, row in fast.items() if row["verdict"] == "does not work"] == ["forward by CUDA graph"]
    assert all(f"| {what.replace('|', '/')} |" in ran.stdout for what in [*right, *fast])
