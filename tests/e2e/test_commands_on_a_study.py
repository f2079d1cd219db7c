import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Typed
from tests.e2e.conftest import Ran

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def printed(ran: Ran, typed: Typed) -> Callable[..., tuple[int, str]]:
    """Exit code and stdout of a command on the results of the study."""
    return lambda *arguments: typed(*arguments, "--results", ran.results)[:2]


def test_plan_counts_what_the_study_did(ran: Ran, printed: Callable[..., tuple[int, str]]) -> None:
    code, out = printed("plan", ran.study_file, "--json")
    facts, features = json.loads(out), ran.result.features
    assert code == 0
    assert facts == facts | {
        "trials": len(ran.result.outcomes),
        "images": 30,
        "images_cached": 30,
        "images_to_extract": 0,
        "split": {name: len(getattr(ran.result.split, name)) for name in ("train", "validation", "test")},
        "features_shape": [features.tokens, features.dim],
        "cache": features.directory,
        "extraction_seconds": 0,
    }
    assert facts["epochs_expected"] <= facts["epochs_at_most"] + facts["confirmations_at_most"] * 3


def test_doctor_looks_at_everything(ran: Ran, printed: Callable[..., tuple[int, str]]) -> None:
    code, out = printed("doctor", ran.study_file, "--json", "--set", "features.source={samples: 60}")
    findings = {check["name"]: check["finding"] for check in json.loads(out)}
    assert code == 0
    assert findings.keys() == {"python", "device", "results", "tracking", "features", "encoder"}
    assert re.search(rf"\[16, {ran.result.features.dim}\] in \[-?[\d.]+, [\d.]+\], \d+\.\d\d s", findings["encoder"])
    assert re.search(r"\b[345]\d images are left .*about \d+:\d\d:\d\d with", findings["encoder"])
    assert ran.result.features.directory in findings["features"]
    code, out = printed("doctor", ran.study_file, "--set", "features.source={images: nowhere/}")
    assert code == 1
    assert "nowhere/: no such directory or file" in out


def test_verify_finds_a_cache_sound_and_names_the_shard_of_a_flipped_bit(
    ran: Ran, tmp_path: Path, printed: Callable[..., tuple[int, str]], typed: Typed
) -> None:
    source = Path(ran.result.features.directory)
    code, out = printed("features", "verify", source.name, "--full", "--json")
    assert (code, json.loads(out)["problems"]) == (0, [])
    shutil.copytree(source, tmp_path / "features" / source.name)
    shard = next((tmp_path / "features" / source.name / "shards").iterdir())
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    code, out, _ = typed("features", "verify", source.name, "--full", "--results", tmp_path)
    assert code == 1 and shard.name in out


def test_trial_and_extract_print_pure_json(ran: Ran, printed: Callable[..., tuple[int, str]]) -> None:
    for command, key, value in (("trial", "status", "finished"), ("extract", "images", 30)):
        code, out = printed(command, ran.study_file, "--json")
        assert (code, json.loads(out)[key]) == (0, value)


def test_plan_tells_people_words_and_units_only(ran: Ran, printed: Callable[..., tuple[int, str]]) -> None:
    code, out = printed("plan", ran.study_file, "--set", "search.method=random", "--set", "search.trials=3")
    lines = {line[:11].strip(): line[11:].strip() for line in out.splitlines()}
    assert code == 0
    assert not re.search(r"None|[{}\[\]_]|: ", out.replace(str(ran.results), ""))
    assert lines["search"] == "random, 3 trials of 3 epochs each at most"
    assert lines["cached"] == "30 of 30 images, all"
    assert re.fullmatch(r"[\d.]+ [KM]iB a trial", lines["memory"])
    assert re.fullmatch(r"about \d+ s, \d+ s if nothing is stopped early", lines["time"])
