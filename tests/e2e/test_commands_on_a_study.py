import json
import re
import shutil
from pathlib import Path

import pytest

from lowrank_tune.cli import run
from tests.e2e.conftest import Ran

pytestmark = pytest.mark.usefixtures("ray_cluster")


def printed(capsys: pytest.CaptureFixture[str], ran: Ran, *arguments: str) -> tuple[int, str]:
    """Exit code and stdout of a command on the results of the study."""
    capsys.readouterr()
    code = run([*arguments, "--results", str(ran.results)])
    return code, capsys.readouterr().out


def test_plan_counts_what_the_study_did(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = printed(capsys, ran, "plan", str(ran.study_file), "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["trials"] == len(ran.result.outcomes)
    assert facts["images_cached"] == facts["images"] == 30
    assert facts["images_to_extract"] == 0
    assert facts["split"] == {"train": 19, "validation": 5, "test": 6}
    assert facts["features_shape"] == [ran.result.features.tokens, ran.result.features.dim]
    assert facts["cache"] == ran.result.features.directory
    assert 0 < facts["trial_seconds"] < facts["seconds"] <= facts["seconds_at_most"]
    assert facts["extraction_seconds"] == 0
    assert facts["memory_bytes_per_trial"] > 0
    assert facts["epochs_expected"] <= facts["epochs_at_most"] + facts["confirmations_at_most"] * 3


def test_doctor_looks_at_everything_and_finds_it_sound(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = printed(capsys, ran, "doctor", str(ran.study_file), "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert code == 0
    assert checks.keys() == {"python", "device", "results", "tracking", "features", "encoder"}
    assert f"[16, {ran.result.features.dim}]" in checks["encoder"]["finding"]
    assert re.search(r"in \[-?[\d.]+, [\d.]+\], \d+\.\d\d s", checks["encoder"]["finding"])
    assert "30 cached" in checks["features"]["finding"]
    assert ran.result.features.directory in checks["features"]["finding"]
    _, out = printed(capsys, ran, "doctor", str(ran.study_file), "--json", "--set", "features.source={samples: 60}")
    finding = {check["name"]: check for check in json.loads(out)}["encoder"]["finding"]
    assert re.search(r"\b[345]\d images are left .*about \d+:\d\d:\d\d with", finding)


def test_doctor_fails_on_images_that_are_not_there(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = printed(capsys, ran, "doctor", str(ran.study_file), "--set", "features.source={images: nowhere/}")
    assert code == 1
    assert "nowhere: no such directory" in out


def test_verify_finds_a_cache_sound_and_names_the_shard_of_a_flipped_bit(
    ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(ran.result.features.directory)
    code, out = printed(capsys, ran, "features", "verify", source.name, "--full", "--json")
    assert (code, json.loads(out)["problems"]) == (0, [])
    shutil.copytree(source, tmp_path / "features" / source.name)
    shard = next((tmp_path / "features" / source.name / "shards").iterdir())
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert run(["features", "verify", source.name, "--full", "--results", str(tmp_path)]) == 1
    assert shard.name in capsys.readouterr().out


def test_trial_and_extract_print_pure_json(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = printed(capsys, ran, "trial", str(ran.study_file), "--json")
    assert (code, json.loads(out)["status"]) == (0, "finished")
    code, out = printed(capsys, ran, "extract", str(ran.study_file), "--json")
    assert (code, json.loads(out)["images"]) == (0, 30)


def test_no_secret_of_an_address_is_printed_or_kept(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for key in ("uri", "urri"):
        address = f"tracking.{key}=http://someone:s3cret@127.0.0.1:9"
        assert run(["run", str(ran.study_file), "--results", str(ran.results), "--set", address]) == 2
    printed_all = "".join(capsys.readouterr())
    assert "MLFLOW_TRACKING_PASSWORD" in printed_all
    assert "s3cret" not in printed_all
