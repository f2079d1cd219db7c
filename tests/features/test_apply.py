"""A decomposer applied to caches and tensors on real Ray, and what stops it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from cachekit import snapshot
from factorkit import DIM, FEW, RANK, TOKENS, write_model, write_tensors

from lowrank_tune import apply_decomposer, load_decomposer, open_features
from lowrank_tune.cli import run
from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.errors import InputError
from lowrank_tune.features.cache import verify_cache
from lowrank_tune.features.extract import extract_features
from lowrank_tune.lowrank.data import FactorMatrix
from lowrank_tune.lowrank.quantization import factor_bytes, ordered, restored_factors

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def out(model, few, tmp_path_factory, ray_cluster):
    out = tmp_path_factory.mktemp("applied") / "factors"
    apply_decomposer(model, few, out, store_dtype="float32")
    return out


def test_what_is_stored_is_what_the_decomposer_gives(model, few, out):
    matrix = open_features(out)
    assert isinstance(matrix, FactorMatrix)
    assert (len(matrix), matrix.tokens, matrix.dim, matrix.rank) == (FEW, TOKENS, DIM, RANK)
    table = pd.read_parquet(matrix.features.records_path).set_index("key")
    x_NTD = torch.stack([torch.load(table.path[row.key], weights_only=True) for row in matrix.features.rows])
    a_NTR, b_NRD = load_decomposer(model)(x_NTD)
    found = matrix.factors(range(FEW))
    torch.testing.assert_close(found.a_NTR, a_NTR.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.b_NRD, b_NRD.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matrix.load([3, 0]), (a_NTR @ b_NRD).detach()[[3, 0]], rtol=1e-5, atol=1e-4)
    assert [len(batch) for batch in matrix.batches(range(FEW), 32)] == [32, 32, 6]
    manifest = json.loads((out / "manifest.json").read_text())["identity"]
    assert manifest["model"] == json.loads((model / "config.json").read_text())["weights_sha256"][:16]
    assert manifest["features"] and (manifest["rank"], manifest["store_dtype"]) == (RANK, "float32")


def test_factors_in_few_bits_are_read_back_as_they_were_rounded(model, few, out, tmp_path):
    features = apply_decomposer(model, few, tmp_path / "factors", store_dtype="int4")
    assert verify_cache(tmp_path / "factors", full=True) == []
    exact, found = open_features(out), open_features(tmp_path / "factors")
    assert [row.key for row in features.rows] == [row.key for row in exact.features.rows]
    # What the comparison of bytes and error measures is what lies on the disk.
    expected = restored_factors(ordered(exact.factors(range(FEW))), "int4")
    products = [factors.a_NTR @ factors.b_NRD for factors in (found.factors(range(FEW)), expected)]
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.load(range(FEW)), products[0])
    shards = (tmp_path / "factors" / "shards").iterdir()
    bytes_an_image = factor_bytes(TOKENS, DIM, RANK, "int4")
    assert 0 <= sum(shard.stat().st_size for shard in shards) - FEW * bytes_an_image < 2000


def test_a_cache_gives_what_its_tensors_give_under_its_name_path_or_address(model, few, tmp_path, capsys):
    results, target = tmp_path / "results", tmp_path / "factors"
    spec = FeaturesSpec.model_validate({"source": {"tensors": str(few)}, "store_dtype": "float32"})
    features = extract_features(spec, results / "features", seed=0)
    for name in (features.fingerprint[:6], features.directory, Path(features.directory).as_uri()):
        capsys.readouterr()
        assert run(["apply", str(model), name, str(target), "--results", str(results), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["images"], facts["rank"], facts["dtype"]) == (FEW, RANK, "float16")
        assert json.loads((target / "manifest.json").read_text())["identity"]["features"] == features.fingerprint
    matrix, cache = open_features(target), open_features(features.directory)
    places = {row.key: place for place, row in enumerate(cache.features.rows)}
    assert {row.key for row in matrix.features.rows} == places.keys()
    a_NTR, b_NRD = load_decomposer(model)(cache.load([places[matrix.features.rows[7].key]]))
    torch.testing.assert_close(matrix.load([7]), (a_NTR @ b_NRD).detach(), rtol=0.01, atol=0.01)
    assert Path(matrix.features.records_path).read_bytes() == Path(cache.features.records_path).read_bytes()


def test_factors_are_features_of_a_nested_model_that_gives_any_of_its_ranks_and_no_other(out, tmp_path):
    nested, exact = write_model(tmp_path / "nested", nested=(2, RANK)), open_features(out)
    features = apply_decomposer(nested, out, tmp_path / "again", rank=2, store_dtype="float32")
    assert features.rank == 2
    place = [row.key for row in features.rows].index(exact.features.rows[0].key)
    a_NTR, b_NRD = load_decomposer(nested)(exact.load([0]), rank=2)
    found = open_features(tmp_path / "again").load([place])
    torch.testing.assert_close(found, (a_NTR @ b_NRD).detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="rank 3: .* was trained for 2, 6; choose among them"):
        apply_decomposer(nested, out, tmp_path / "other", rank=3)


def test_what_is_done_is_not_done_again_and_starts_no_ray(model, few, out):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    command = [sys.executable, "-m", "lowrank_tune", "apply", str(model), str(few), str(out), "--dtype", "float32"]
    dead = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(command, env=dead, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_broken_files_are_quarantined_each_with_its_reason_and_more_files_are_gone_on_with(model, tmp_path):
    folder, target = write_tensors(tmp_path / "tensors", range(8)), tmp_path / "factors"
    torch.save(torch.full((TOKENS, DIM), float("nan")), folder / "features_1.pt")
    torch.save({"features": torch.ones(DIM)}, folder / "features_2.pt")
    torch.save(print, folder / "features_3.pt")
    with pytest.raises(InputError, match=r"3 of 8 files cannot be used, --max-quarantined = 0.05 allows 0:") as error:
        apply_decomposer(model, folder, target)
    for reason in ("features_1.pt: the features hold NaN", "features_3.pt: needs pickle"):
        assert reason in str(error.value)
    features = apply_decomposer(model, folder, target, max_quarantined=0.5)
    assert (len(features.rows), features.quarantined) == (5, 3)
    errors = pd.read_parquet(features.records_path).error
    assert errors.notna().tolist() == [False, True, True, True, False, False, False, False]
    before = snapshot(target / "shards")
    write_tensors(folder, range(8, 12))
    assert len(apply_decomposer(model, folder, target, max_quarantined=0.5).rows) == 9
    assert before.items() < snapshot(target / "shards").items()


def test_what_does_not_fit_is_refused_in_one_line(model, few, out, tmp_path, capsys):
    other_shape = write_tensors(tmp_path / "shape", range(2), (TOKENS, DIM + 1))
    other_images = write_tensors(tmp_path / "images", range(1000, 1003))
    other_model = write_model(tmp_path / "other", seed=2)
    foreign, begun, garbled, odd = (tmp_path / name for name in ("foreign", "begun", "garbled", "odd"))
    for folder in (foreign, begun, garbled, odd, tmp_path / "nothing"):
        folder.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    (begun / "identity.json").write_bytes((out / "identity.json").read_bytes())
    (garbled / "identity.json").write_text("[]")
    (odd / os.fsdecode(b"caf\xe9")).mkdir()
    new = tmp_path / "new"
    for arguments, reason in [
        ((model, other_shape, new), f"images of [16, {DIM + 1}], but {model} takes [16, {DIM}]"),
        ((model, other_images, out, "--dtype", "float32"), f"holds {FEW} images that {other_images} has not"),
        ((other_model, few, out, "--dtype", "float32"), "belongs to another model, other features or another dtype"),
        ((other_model, few, begun, "--dtype", "float32"), "belongs to another model"),
        ((model, few, garbled), "identity.json: cannot be read"),
        ((model, few, out, "--dtype", "int8"), "store_dtype: expected 'int8', found 'float32'"),
        ((model, few, foreign), "holds something else (thesis.tex), and is left alone"),
        ((model, few, foreign / "thesis.tex"), "is a file; name a folder"),
        ((model, tmp_path / "nothing", new), "no files of tensors in it"),
        ((model, odd, new), "no files of tensors in it"),
        ((model, "f00d", new, "--results", tmp_path), "feature cache f00d: not in"),
        ((few, few, new), "no exported model, it has no config.json"),
        ((model, few, new, "--rank", "4"), "was trained for 6"),
        ((model, few, new, "--device", "cuda"), "the Ray cluster has no GPU"),
        ((model, few, "s3://bucket/factors"), "only local and mounted paths"),
    ]:
        capsys.readouterr()
        code = run(["apply", "--quiet", *map(str, arguments)])
        err = capsys.readouterr().err
        assert (code, err.count("\n")) == (2, 1) and err.startswith("error: ") and reason in err, (arguments, err)
    assert (foreign / "thesis.tex").read_text() == "years of work"
