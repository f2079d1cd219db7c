"""What an extraction and an application survive: SIGKILL of their actor, their driver and their raylet, on real Ray.

What is killed runs in a process of its own with a Ray of its own, so that killing it harms nobody else; what goes on
with it runs here, in the Ray of all tests.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from cachekit import snapshot
from factorkit import IMAGES
from PIL import Image

from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.features.cache import open_cache, verify_cache
from lowrank_tune.features.decompose import apply_decomposer
from lowrank_tune.features.extract import extract_features

PROGRAM = """
import sys, pathlib, ray
from lowrank_tune.cli import run
from lowrank_tune.features.decompose import apply_decomposer
from lowrank_tune.features.extract import extract_features
from lowrank_tune.config.schema import FeaturesSpec
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000,
         log_to_driver=False, configure_logging=False)
if sys.argv[1] == "extract":
    extract_features(FeaturesSpec.model_validate_json(sys.argv[2]), pathlib.Path(sys.argv[3]), seed=0)
else:
    apply_decomposer(*sys.argv[2:], store_dtype="int8")
"""


class Extracting:
    """Six shards of small images become features."""

    def __init__(self, tmp_path_factory: pytest.TempPathFactory, photographs: list[Path]) -> None:
        folder = tmp_path_factory.mktemp("photos")
        for number in range(IMAGES):
            with Image.open(photographs[number % len(photographs)]) as image:
                image.convert("RGB").resize((60 + number, 60)).save(folder / f"photo-{number:03}.jpg")
        encoder = {"checkpoint": "tiny-random", "image_size": 56, "compute_dtype": "float32"}
        self.spec = FeaturesSpec.model_validate({"source": {"images": str(folder)}, "encoder": encoder})

    def arguments(self, root: Path) -> list[str]:
        return ["extract", self.spec.model_dump_json(), str(root)]

    def finish(self, root: Path) -> None:
        extract_features(self.spec, root, seed=0)


class Applying:
    """Six shards of tensors become factors."""

    def __init__(self, model: Path, tensors: Path) -> None:
        self.model, self.tensors = model, tensors

    def arguments(self, root: Path) -> list[str]:
        return ["apply", str(self.model), str(self.tensors), str(root / "factors")]

    def finish(self, root: Path) -> None:
        apply_decomposer(self.model, self.tensors, root / "factors", store_dtype="int8")


Work = Extracting | Applying


@pytest.fixture(scope="module")
def works(tmp_path_factory, photographs, model, tensors, ray_cluster) -> dict[str, tuple[Work, dict[str, bytes]]]:
    """Each kind of work, and what it makes when nothing kills it."""
    found: dict[str, tuple[Work, dict[str, bytes]]] = {}
    for name, work in (
        ("extract", Extracting(tmp_path_factory, photographs)),
        ("apply", Applying(model, tensors)),
    ):
        root = tmp_path_factory.mktemp("uninterrupted")
        work.finish(root)
        found[name] = work, caches(root)
    return found


def caches(root: Path) -> dict[str, bytes]:
    """Every file of the caches below a folder, but locks and the tiny checkpoint."""
    found = snapshot(root)
    return {name: data for name, data in found.items() if not name.startswith(("checkpoints", ".", "tiny"))}


class Driver:
    """Work in a process of its own, and all processes that it started."""

    def __init__(self, arguments: list[str]) -> None:
        self._told = tempfile.TemporaryFile("w+")  # noqa: SIM115  # `close` closes it
        command = [sys.executable, "-c", PROGRAM, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self._told)
        self.family: dict[int, psutil.Process] = {}

    def look(self) -> list[psutil.Process]:
        """Remember which processes there are: those of a killed driver can no more be found by their parent."""
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.family |= {child.pid: child for child in children}
        return list(self.family.values())

    def member(self, role: str) -> psutil.Process | None:
        """The driver, the actor that makes shards, or the raylet."""
        if role == "driver":
            return psutil.Process(self.process.pid)
        for process in self.look():
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if role == "actor" and line.startswith("ray::") and "ShardWorker" in line:
                    return process
                if role == "raylet" and line.split(" ")[0].endswith("/raylet"):
                    return process
        return None

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 600
        while not condition():
            if self.process.poll() is not None:
                self._told.seek(0)
                pytest.fail(f"the work ended too early: {self._told.read()}")
            assert time.monotonic() < deadline, "nothing happened for ten minutes"
            self.look()
            time.sleep(0.01)

    def close(self) -> None:
        """Kill whatever is left."""
        left = self.look()
        self.process.kill()
        self.process.wait()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=30)
        self._told.close()


@pytest.mark.parametrize(
    ("name", "role", "commits"),
    [("extract", role, commits) for role in ("actor", "driver", "raylet") for commits in (0, 1)]
    + [("apply", "driver", 1)],
)
def test_killed_at_any_moment_the_next_run_completes_the_same_bytes(tmp_path, works, name, role, commits):
    work, uninterrupted = works[name]
    driver = Driver(work.arguments(tmp_path))
    try:
        # Before the first commit, and after it: in between, at whatever moment the machine is then.
        driver.wait_for(
            lambda: driver.member("actor") and len([*tmp_path.glob("*/commits/[!.]*.json")]) >= commits,
        )
        victim = driver.member(role)
        assert victim is not None
        victim.send_signal(signal.SIGKILL)
        code = driver.process.wait(timeout=600)
    finally:
        driver.close()
    if role == "driver":
        assert code == -signal.SIGKILL
    # Ray starts a killed actor again; a cache without its end is never taken for one.
    assert bool(list(tmp_path.glob("*/manifest.json"))) == (code == 0)
    work.finish(tmp_path)
    assert caches(tmp_path) == uninterrupted
    (directory,) = (path.parent for path in tmp_path.glob("*/manifest.json"))
    assert verify_cache(directory) == []
    rows = open_cache(directory).rows
    assert len({row.key for row in rows}) == len(rows) == IMAGES
