"""What an extraction and an application survive: SIGKILL of their actor, their driver and their raylet, on real Ray.

The driver is this file in a process of its own: in the Ray of all tests, or, where its raylet is killed, in its own.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from cachekit import snapshot
from factorkit import IMAGES
from PIL import Image

from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.features.cache import open_cache, verify_cache
from lowrank_tune.features.decompose import apply_decomposer
from lowrank_tune.features.extract import extract_features
from lowrank_tune.features.shards import Progress


def extract(root: Path, told: Progress | None, folder: str) -> None:
    """Six shards of small images become features."""
    encoder = {"checkpoint": "tiny-random", "image_size": 56, "compute_dtype": "float32"}
    spec = FeaturesSpec.model_validate({"source": {"images": folder}, "encoder": encoder})
    extract_features(spec, root, seed=0, on_progress=told)


def apply(root: Path, told: Progress | None, model: str, tensors: str) -> None:
    """Six shards of tensors become factors."""
    apply_decomposer(model, tensors, root / "factors", store_dtype="int8", on_progress=told)


def code(root: Path, told: Progress | None, model: str, tensors: str) -> None:
    """Six shards of tensors become coded images."""
    apply_decomposer(model, tensors, root / "coded", coded=True, target_error=0.05, on_progress=told)


WORKS: dict[str, Callable[..., None]] = {"extract": extract, "apply": apply, "code": code}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, photographs, model, shared, tensors) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        with Image.open(photographs[number % len(photographs)]) as image:
            image.convert("RGB").resize((60 + number, 60)).save(folder / f"photo-{number:03}.jpg")
    return {"extract": [str(folder)], "apply": [str(model), str(tensors)], "code": [str(shared), str(tensors)]}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, sources, ray_cluster) -> dict[str, dict[str, bytes]]:
    """What each kind of work makes when nothing kills it."""
    found = {}
    for name, work in WORKS.items():
        root = tmp_path_factory.mktemp("uninterrupted")
        work(root, None, *sources[name])
        found[name] = caches(root)
    return found


def caches(root: Path) -> dict[str, bytes]:
    """Every file of the caches below a folder, but locks and the tiny checkpoint."""
    found = snapshot(root)
    return {name: data for name, data in found.items() if not name.startswith(("checkpoints", ".", "tiny"))}


def processes(of: psutil.Process, name: str) -> list[psutil.Process]:
    """Those that a process started, directly or not, whose command line has this name."""
    found = []
    for process in of.children(recursive=True):
        with suppress(psutil.Error):
            if name in " ".join(process.cmdline()[:1]):
                found.append(process)
    return found


@pytest.mark.parametrize(
    ("name", "role", "commits"),
    [
        ("extract", "actor", 1),
        ("extract", "driver", 0),
        ("extract", "driver", 1),
        ("extract", "raylet", 1),
        ("apply", "driver", 1),
        ("code", "driver", 1),
    ],
)
def test_killed_at_any_moment_the_next_run_completes_the_same_bytes(
    tmp_path, sources, uninterrupted, name, role, commits
):
    root, gate, here = tmp_path / "root", tmp_path / "gate", psutil.Process()
    cluster = {"address": ray.get_runtime_context().gcs_address}
    if role == "raylet":
        cluster = {"address": "local", "num_cpus": 2, "include_dashboard": False, "object_store_memory": 100_000_000}
    earlier = processes(here, "ShardWorker")
    command = [sys.executable, __file__, name, str(root), str(gate), json.dumps(cluster), *sources[name]]
    with (tmp_path / "told").open("w+") as told:
        driver = subprocess.Popen(
            command, stdout=told, stderr=told, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}
        )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 300
        # Before the first commit, and after it: in between, at whatever moment the machine is then.
        while not (actors := [found for found in processes(here, "ShardWorker") if found not in earlier]) or (
            len([*root.glob("*/commits/[!.]*.json")]) < commits
        ):
            assert driver.poll() is None and time.monotonic() < deadline, (tmp_path / "told").read_text()
            time.sleep(0.01)
        family = psutil.Process(driver.pid).children(recursive=True)
        victims = {"actor": actors, "driver": [driver], "raylet": processes(psutil.Process(driver.pid), "/raylet")}
        victims[role][0].send_signal(signal.SIGKILL)
        gate.touch()
        code = driver.wait(timeout=300)
    finally:
        driver.kill()
        driver.wait()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)
    if role == "driver":
        assert code == -signal.SIGKILL
    # Ray starts a killed actor again; a cache without its end is never taken for one.
    assert bool(list(root.glob("*/manifest.json"))) == (code == 0)
    WORKS[name](root, None, *sources[name])
    assert caches(root) == uninterrupted[name]
    (directory,) = (path.parent for path in root.glob("*/manifest.json"))
    assert verify_cache(directory) == []
    rows = open_cache(directory).rows
    assert len({row.key for row in rows}) == len(rows) == IMAGES


if __name__ == "__main__":
    name, root, gate, cluster, *given = sys.argv[1:]
    ray.init(**json.loads(cluster), log_to_driver=False, configure_logging=False)

    def wait(done: int, total: int) -> None:
        """Go on after the first shards when what is to be killed has been."""
        while done and not Path(gate).exists():
            time.sleep(0.01)

    WORKS[name](Path(root), wait, *given)
