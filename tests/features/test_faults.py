"""What an extraction survives: SIGKILL of its actor, its driver and its raylet, on real Ray.

Each extraction runs in a process of its own with a Ray of its own, so that killing them harms nobody else.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from cachekit import snapshot
from PIL import Image

from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.features.cache import open_cache, verify_cache

IMAGES, SHARDS = 300, 5
PROGRAM = """
import sys, pathlib, ray
from lowrank_tune.cli import run
from lowrank_tune.errors import LowrankTuneError
from lowrank_tune.features.extract import extract_features
from lowrank_tune.config.schema import FeaturesSpec
spec = FeaturesSpec.model_validate_json(sys.argv[1])
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000,
         log_to_driver=False, configure_logging=False)
try:
    features = extract_features(spec, pathlib.Path(sys.argv[2]), seed=0)
except LowrankTuneError as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(3)
print(features.directory)
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, photographs: list[Path]) -> str:
    """More than four shards of small images."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        with Image.open(photographs[number % len(photographs)]) as image:
            image.convert("RGB").resize((60 + number, 60)).save(folder / f"photo-{number:03}.jpg")
    encoder = {"checkpoint": "tiny-random", "image_size": 56, "compute_dtype": "float32"}
    return FeaturesSpec.model_validate({"source": {"images": str(folder)}, "encoder": encoder}).model_dump_json()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, spec: str) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("uninterrupted")
    assert finished(spec, root)[0] == 0
    return caches(root)


def caches(root: Path) -> dict[str, bytes]:
    """Every file of the caches below a folder, but locks and the tiny checkpoint."""
    found = snapshot(root)
    return {name: data for name, data in found.items() if not name.startswith(("checkpoints", ".", "tiny"))}


class Driver:
    """An extraction that runs, and all processes that it started."""

    def __init__(self, spec: str, root: Path) -> None:
        self._told = tempfile.TemporaryFile("w+")  # noqa: SIM115  # `close` closes it
        command = [sys.executable, "-c", PROGRAM, spec, str(root)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self._told)
        self.family: dict[int, psutil.Process] = {}

    def ended(self) -> tuple[int, str]:
        """Wait for the end: exit code and stderr."""
        code = self.process.wait(timeout=600)
        self._told.seek(0)
        return code, self._told.read()

    def look(self) -> list[psutil.Process]:
        """Remember which processes there are: those of a killed driver can no more be found by their parent."""
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.family |= {child.pid: child for child in children}
        return list(self.family.values())

    def member(self, role: str) -> psutil.Process | None:
        """The actor that encodes, or the raylet."""
        for process in self.look():
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if role == "actor" and line.startswith("ray::") and "ShardEncoder" in line:
                    return process
                if role == "raylet" and line.split(" ")[0].endswith("/raylet"):
                    return process
        return None

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 600
        while not condition():
            assert self.process.poll() is None, f"the extraction ended too early: {self.ended()}"
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


@contextmanager
def extraction(spec: str, root: Path) -> Iterator[Driver]:
    driver = Driver(spec, root)
    try:
        yield driver
    finally:
        driver.close()


def finished(spec: str, root: Path) -> tuple[int, str]:
    """Run an extraction to its end: exit code and stderr."""
    with extraction(spec, root) as driver:
        return driver.ended()


def committed(root: Path) -> int:
    return len([path for path in root.glob("*/commits/*.json") if not path.name.startswith(".")])


def sealed(root: Path) -> list[Path]:
    return [path.parent for path in root.glob("*/manifest.json")]


@pytest.mark.parametrize("commits", [0, 1])
@pytest.mark.parametrize("role", ["actor", "driver", "raylet"])
def test_killed_at_any_moment_the_next_run_completes_the_same_bytes(tmp_path, spec, uninterrupted, role, commits):
    with extraction(spec, tmp_path) as driver:
        # Before the first commit, and after it: in between, at whatever moment the machine is then.
        driver.wait_for(lambda: driver.member("actor") and committed(tmp_path) >= commits)
        victim = psutil.Process(driver.process.pid) if role == "driver" else driver.member(role)
        assert victim is not None
        victim.send_signal(signal.SIGKILL)
        code, _ = driver.ended()
    if role == "driver":
        assert code == -signal.SIGKILL
    # Ray starts a killed actor again; a cache without its end is never taken for one.
    assert bool(sealed(tmp_path)) == (code == 0)
    code, err = finished(spec, tmp_path)
    assert code == 0, err
    assert caches(tmp_path) == uninterrupted
    (directory,) = sealed(tmp_path)
    assert verify_cache(directory) == []
    rows = open_cache(directory).rows
    assert len({row.key for row in rows}) == len(rows) == IMAGES
