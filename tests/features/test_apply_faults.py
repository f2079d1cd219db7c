"""What `apply` survives: SIGKILL of its driver and of its actor, on a Ray of its own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from cachekit import snapshot
from factorkit import IMAGES

from lowrank_tune.features.cache import open_cache, verify_cache

PROGRAM = """
import sys, ray
from lowrank_tune.features.decompose import apply_decomposer
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000,
         log_to_driver=False, configure_logging=False)
apply_decomposer(*sys.argv[1:], store_dtype="int8")
"""


def started(model: Path, tensors: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, str(model), str(tensors), str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finished(model: Path, tensors: Path, out: Path) -> None:
    process = started(model, tensors, out)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err.decode()


def committed(out: Path) -> int:
    return len([path for path in out.glob("commits/*.json") if not path.name.startswith(".")])


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def is_actor(process: psutil.Process) -> bool:
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return line.startswith("ray::") and "ShardDecomposer" in line


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, model: Path, tensors: Path) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("uninterrupted") / "factors"
    finished(model, tensors, out)
    return snapshot(out)


@pytest.mark.parametrize("victim", ["driver", "actor"])
def test_killed_in_the_middle_the_next_run_completes_the_same_bytes(
    tmp_path: Path, model: Path, tensors: Path, uninterrupted: dict[str, bytes], victim: str
) -> None:
    out = tmp_path / "factors"
    process = started(model, tensors, out)
    deadline = time.monotonic() + 600
    try:
        while not committed(out):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "nothing was committed for ten minutes"
            time.sleep(0.002)
        members = family(process)
        if victim == "actor":
            for member in members:
                if is_actor(member):
                    member.send_signal(signal.SIGKILL)
        else:
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=600)
    finally:
        process.kill()
        for member in members:
            if member.is_running():
                member.kill()
        psutil.wait_procs(members, timeout=30)
    if victim == "driver":
        assert process.returncode == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
    # Ray starts a killed actor again; a cache without its end is never taken for one.
    assert (out / "manifest.json").exists() == (process.returncode == 0)
    finished(model, tensors, out)
    assert snapshot(out) == uninterrupted
    assert verify_cache(out, full=True) == []
    assert len(open_cache(out).rows) == IMAGES
