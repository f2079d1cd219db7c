"""`features` and `extract` as a person types them, on ready tensors."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowrank_tune.cli import run
from lowrank_tune.features.remote import only_writer
from tests.cli.test_commands import loaded_by

STUDY = """
name: tensors
features: {{source: {{tensors: "{folder}"}}}}
search: {{space: {{families: {{sketch: }}, rank: 2}}}}
"""
# Nothing listens there, so whatever needs Ray fails at once.
DEAD = {"RAY_ADDRESS": "127.0.0.1:1"}


def write_tensors(folder: Path, count: int = 12) -> Path:
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        torch.save(torch.randn(6, 10, generator=generator), folder / f"features_{number}.pt")
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Path, Path, str]:
    """A folder of tensors, the results directory that has them, and the cache's name."""
    root = tmp_path_factory.mktemp("import")
    folder = write_tensors(root / "feature_cache_real")
    assert run(["features", "import", str(folder), "--results", str(root / "results")]) == 0
    (cache,) = (path for path in (root / "results" / "features").iterdir() if path.is_dir())
    return folder, root / "results", cache.name


def test_import_says_what_it_did_and_how_a_study_uses_it(imported, typed):
    folder, results, name = imported
    code, out, _ = typed("features", "import", folder, "--results", results)
    assert code == 0
    facts = dict(line.split("  ", 1) for line in out.splitlines()[:-1])
    assert facts["fingerprint"].strip() == name
    assert (facts["images"].strip(), facts["quarantined"].strip()) == ("12", "0")
    assert f'features: {{source: {{tensors: "{folder}"}}}}' in out.splitlines()[-1]
    code, out, _ = typed("features", "import", folder, "--results", results, "--json")
    assert (json.loads(out)["fingerprint"], json.loads(out)["shape"]) == (name, [6, 10])


def test_a_study_with_that_source_finds_the_same_cache_and_starts_no_ray(imported, tmp_path):
    folder, results, name = imported
    (tmp_path / "study.yaml").write_text(STUDY.format(folder=folder))
    command = [sys.executable, "-m", "lowrank_tune", "extract", str(tmp_path / "study.yaml")]
    command += ["--results", results, "--json"]
    done = subprocess.run(command, env={**os.environ, **DEAD}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cache"] == str(results / "features" / name)


def test_an_import_is_extended_by_what_is_new(imported, tmp_path, typed):
    folder = write_tensors(tmp_path / "tensors", count=4)
    results = tmp_path / "results"
    arguments = ("features", "import", folder, "--results", results, "--json")
    first = json.loads(typed(*arguments)[1])
    shards = Path(first["cache"]) / "shards"
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    write_tensors(folder, count=7)
    assert json.loads(typed(*arguments)[1])["images"] == 7
    after = {path.name: path.read_bytes() for path in shards.iterdir()}
    assert before.items() < after.items()


def test_an_import_of_broken_files_exits_2_with_their_reasons(imported, tmp_path, typed):
    folder = write_tensors(tmp_path / "tensors", count=3)
    torch.save(torch.full((6, 10), float("nan")), folder / "features_1.pt")
    arguments = ("features", "import", folder, "--results", tmp_path / "results")
    code, _, err = typed(*arguments)
    assert code == 2
    assert "1 of 3 files cannot be used" in err and "features_1.pt: the features hold NaN" in err
    assert typed(*arguments, "--max-quarantined", "0.4")[0] == 0
    code, _, err = typed("features", "import", tmp_path / "nowhere", "--results", tmp_path)
    assert code == 2 and "no such directory" in err


def test_another_dtype_is_another_cache_and_the_field_is_named(imported, typed):
    folder, results, name = imported
    arguments = ("features", "import", folder, "--results", results, "--store-dtype", "float32")
    code, out, err = typed(*arguments)
    assert code == 0
    assert f"{name} was made differently: store_dtype: expected 'float32', found 'float16'" in err
    assert "store_dtype: float32" in out.splitlines()[-1]
    other = out.splitlines()[0].split()[1]
    code, out, _ = typed("features", "show", name, "--against", other, "--results", results, "--json")
    assert json.loads(out)["differences"] == ["store_dtype: expected 'float16', found 'float32'"]
    assert typed("features", "rm", other, "--yes", "--results", results)[0] == 0


def test_looking_at_caches_loads_neither_torch_nor_ray(imported):
    _, results, name = imported
    place = (results).as_uri()
    commands = (["ls"], ["show", name], ["verify", name, "--full"])
    assert loaded_by(*(["features", *command, "--results", place] for command in commands)) == set()


def test_rm_asks_and_takes_no_for_an_answer(imported, tmp_path, typed, monkeypatch):
    folder = write_tensors(tmp_path / "tensors", count=3)
    results = tmp_path / "results"
    arguments = ("--results", results)
    typed("features", "import", folder, *arguments)
    (name,) = (path.name for path in (results / "features").iterdir() if path.is_dir())
    cache = results / "features" / name
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert typed("features", "rm", name, *arguments)[0] == 1
    assert (cache / "manifest.json").exists()
    with only_writer(cache):
        code, _, err = typed("features", "rm", name, "--yes", *arguments)
    assert code == 2 and "an extraction is writing into it" in err
    code, out, _ = typed("features", "rm", name, "--yes", *arguments)
    assert code == 0 and out.startswith(f"{name}: removed")
    assert not cache.exists()
    assert len(list(folder.iterdir())) == 3
