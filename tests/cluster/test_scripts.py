"""scripts/cluster: each file as far as it can be tried without the cluster that it is for."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ruamel.yaml import YAML

from lowrank_tune.cli import run
from tests.cluster.conftest import STUDY
from tests.e2e.conftest import write_tensors

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "cluster"


def read(name: str) -> Any:
    return YAML(typ="safe", pure=True).load(SCRIPTS / name)


@pytest.mark.parametrize("name", ["ray-up.yaml", "rayjob.yaml", "slurm.sh"])
def test_what_to_change_is_marked_and_is_little(name: str) -> None:
    assert 1 <= (SCRIPTS / name).read_text().count("# CHANGE") <= 3


def test_ray_accepts_the_cluster_file_which_shows_its_dashboard_to_nobody_and_asks_for_a_token() -> None:
    config = read("ray-up.yaml")
    assert config["max_workers"] == config["min_workers"] == len(config["provider"]["worker_ips"])
    validate_config(prepare_config(config))
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_the_manifest_is_a_ray_job_whose_parts_fit() -> None:
    manifest = read("rayjob.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec = manifest["spec"]
    assert spec.keys() <= {
        "entrypoint", "shutdownAfterJobFinishes", "backoffLimit", "runtimeEnvYAML", "rayClusterSpec"
    }  # fmt: skip
    assert YAML(typ="safe").load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())
    images = set()
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted == {"results": "/results", "study": "/study"}
        assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert len(images) == 1
    assert f"rayVersion: {ray_version()}" in (SCRIPTS / "rayjob.yaml").read_text()


def ray_version() -> str:
    pins = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    return next(pin.removeprefix("ray==") for pin in pins if pin.startswith("ray=="))


def test_the_manifests_entry_point_is_a_command_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, command, study, *rest = read("rayjob.yaml")["spec"]["entrypoint"].split()
    assert (program, command) == ("lowrank-tune", "run")
    given = tmp_path / Path(study).name
    given.write_text(STUDY.replace("epochs: 100", "epochs: 0"))
    local = [word.replace("/results", str(tmp_path / "results")) for word in rest]
    assert run([command, str(given), *local]) == 2
    assert "training.epochs" in capsys.readouterr().err


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An allocation of two nodes: this machine, twice."""
    tools = tmp_path / "bin"
    tools.mkdir()
    # What srun and scontrol would do, for nodes that are all here.
    (tools / "srun").write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
    (tools / "scontrol").write_text("#!/bin/sh\nprintf 'a\\nb\\n'\n")
    (tools / "hostname").write_text("#!/bin/sh\necho 127.0.0.1\n")
    (tools / "lowrank-tune").write_text(f'#!/bin/sh\nexec {sys.executable} -m lowrank_tune "$@"\n')
    (tools / "python").symlink_to(sys.executable)
    (tools / "ray").write_text(f'#!/bin/sh\nexec {sys.executable} -m ray.scripts.scripts "$@"\n')
    for tool in tools.iterdir():
        if not tool.is_symlink():
            tool.chmod(0o755)
    names = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "[a-b]", "SLURM_CPUS_PER_TASK": "1"}
    path = f"{tools}:{os.environ['PATH']}"
    return {**os.environ, **names, "PATH": path, "LOWRANK_TUNE_RESULTS": str(tmp_path / "results")}


def test_the_slurm_script_makes_a_cluster_of_its_nodes_and_works_in_it(tmp_path: Path, slurm: dict[str, str]) -> None:
    write_tensors(tmp_path / "in", 30)
    study = tmp_path / "tiny.yaml"
    features = f"features: {{source: {{tensors: {tmp_path / 'in'}}}}}\n"
    study.write_text(re.sub(r"features:\n(  .*\n)+", features, STUDY))
    command = ["bash", str(SCRIPTS / "slurm.sh"), "extract", str(study), "--json"]
    try:
        done = subprocess.run(command, cwd=tmp_path, env=slurm, capture_output=True, text=True, timeout=300)
    finally:
        for node in "ab":
            shutil.rmtree(f"/tmp/ray-{slurm['SLURM_JOB_ID']}-{node}", ignore_errors=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"images": 30' in done.stdout
