"""A cache of coded images: made, read, checked, damaged, copied and made whole again.

The first is made on real Ray; all others by its worker in this process, whose starting there takes most of the time.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from cachekit import made as worked
from cachekit import snapshot
from factorkit import DIM, FEW, RANK, TOKENS, write_model, write_tensors
from safetensors.torch import load_file

from lowrank_tune import apply_decomposer, load_decomposer, open_features
from lowrank_tune.cli import run
from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.errors import CacheError, InputError
from lowrank_tune.features import shards
from lowrank_tune.features.cache import verify_cache
from lowrank_tune.features.extract import extract_features
from lowrank_tune.features.remote import stage_cache
from lowrank_tune.lowrank.data import CodedMatrix

TARGET = 0.05


@pytest.fixture(scope="module")
def made(shared, few, tmp_path_factory, ray_cluster):
    out = tmp_path_factory.mktemp("coded") / "coded"
    assert run(["apply", str(shared), str(few), str(out), "--coded", "--target-error", str(TARGET)]) == 0
    return out


@pytest.fixture(autouse=True)
def worker_here(made, monkeypatch):
    monkeypatch.setattr(shards, "_made", lambda job, plans, address, note: (worked(job, plan) for plan in plans))


@pytest.fixture
def cache(made, tmp_path):
    """That cache, to be spoilt."""
    return shutil.copytree(made, tmp_path / "my coded images")


def errors_of(matrix, x_of):
    x_NTD = torch.stack([x_of[row.key] for row in matrix.features.rows])
    return (matrix.load(range(len(matrix))) - x_NTD).flatten(1).norm(dim=1) / x_NTD.flatten(1).norm(dim=1)


@pytest.fixture(scope="module")
def x_of(few):
    """Each image by its key."""
    return {hashlib.sha256(path.read_bytes()).hexdigest(): torch.load(path) for path in few.iterdir()}


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def values_begin(shard):
    return 8 + int.from_bytes(shard.read_bytes()[:8], "little")


def test_every_image_comes_back_within_the_target(made, x_of):
    matrix = open_features(made)
    assert isinstance(matrix, CodedMatrix)
    assert (len(matrix), matrix.features.dtype, matrix.features.rank) == (FEW, "coded", DIM)
    errors = errors_of(matrix, x_of)
    assert TARGET / 2 < errors.max() <= TARGET
    half = torch.empty(2, TOKENS, DIM, dtype=torch.float16)
    assert matrix.load([4, 1], out=half) is half
    assert torch.equal(half, matrix.load([4, 1]).half())
    assert verify_cache(made, full=True) == []


def test_no_image_takes_more_bytes_than_it_may(shared, few, x_of, tmp_path):
    out = tmp_path / "coded"
    apply_decomposer(shared, few, out, coded=True, max_bytes=500)
    lengths = [size for shard in (out / "shards").iterdir() for size in load_file(shard)["length"].tolist()]
    assert len(lengths) == FEW and 250 < max(lengths) <= 500
    assert errors_of(open_features(out), x_of).max() < 0.9


def test_a_shard_holds_little_beside_the_streams(made):
    for shard in (made / "shards").iterdir():
        parts = load_file(shard)
        streams, images = sum(parts["length"].tolist()), len(parts["length"])
        assert len(parts["stream"]) == streams
        assert shard.stat().st_size - streams <= 4 * images + 160


def test_a_flipped_bit_is_found_and_its_shard_row_and_image_are_named(cache):
    shard = sorted((cache / "shards").iterdir())[0]
    parts, start = load_file(shard), values_begin(shard)
    lengths = parts["length"].tolist()
    for row in (0, 1, len(lengths) - 1):
        first = start + 4 * len(lengths) + sum(lengths[:row])
        for position in (first, first + lengths[row] // 2, first + lengths[row] - 1):
            flip(shard, position)
            (problem,) = verify_cache(cache, full=True)
            matrix = open_features(cache)
            index, image = next(
                (index, image)
                for index, image in enumerate(matrix.features.rows)
                if (image.shard, image.row) == (shard.name, row)
            )
            assert shard.name in problem and f"row {row} ({image.key[:16]})" in problem
            with pytest.raises(CacheError) as error:
                matrix.load([index])
            for text in (shard.name, f"row {row} ({image.key[:16]})", f"remove {cache}/manifest.json"):
                assert text in str(error.value)
            flip(shard, position)
    flip(shard, start)
    (problem,) = verify_cache(cache, full=True)
    assert f"{shard.name}: cannot be read (the lengths of its streams do not add up" in problem
    with pytest.raises(CacheError, match=rf"{shard.name}: row \d+ .* cannot be decoded \(the lengths"):
        open_features(cache).load(range(FEW))


def test_a_shard_cut_short_is_refused_by_name(cache):
    shard = sorted((cache / "shards").iterdir())[0]
    matrix = open_features(cache)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CacheError, match=f"{shard.name}: the shard cannot be read"):
        matrix.load(range(FEW))
    with pytest.raises(CacheError, match=rf"{shard.name}: has \d+ bytes, \d+ were committed"):
        open_features(cache)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: flip(path, -1), "is damaged, or another codebook"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged, or another codebook"),
    ],
    ids=["missing", "flipped", "cut"],
)
def test_a_codebook_that_is_not_the_caches_is_named_and_the_remedy_works(shared, few, made, cache, spoil, reason):
    spoil(cache / "codebook.safetensors")
    assert verify_cache(cache, full=False) == [f"{cache}/codebook.safetensors: {reason}"]
    for use in (
        lambda: open_features(cache),
        lambda: apply_decomposer(shared, few, cache, coded=True, target_error=TARGET),
    ):
        with pytest.raises(CacheError, match=rf"codebook.safetensors: {reason}; remove .*manifest.json and run again"):
            use()
    (cache / "manifest.json").unlink()
    apply_decomposer(shared, few, cache, coded=True, target_error=TARGET)
    assert snapshot(cache) == snapshot(made)


def test_a_damaged_stream_is_made_again_to_the_same_bytes(shared, few, made, cache):
    flip(sorted((cache / "shards").iterdir())[0], -1)
    (cache / "manifest.json").unlink()
    apply_decomposer(shared, few, cache, coded=True, target_error=TARGET)
    assert snapshot(cache) == snapshot(made)


@pytest.mark.parametrize("left", [("identity.json",), ("identity.json", "codebook.safetensors")])
def test_killed_before_the_first_shard_the_next_run_completes_the_same_bytes(shared, few, made, tmp_path, left):
    out = tmp_path / "coded"
    out.mkdir()
    for name in left:
        (out / name).write_bytes((made / name).read_bytes())
    (out / ".tmp-0123-codebook.safetensors").write_bytes(b"half")
    apply_decomposer(shared, few, out, coded=True, target_error=TARGET)
    assert snapshot(out) == snapshot(made)


def test_what_was_begun_with_a_codebook_is_gone_on_with_by_that_codebook(shared, few, made, cache):
    """Another machine may have made another one of the same model."""
    codebook = cache / "codebook.safetensors"
    header = codebook.read_bytes()
    length = int.from_bytes(header[:8], "little")
    codebook.write_bytes((length + 8).to_bytes(8, "little") + header[8 : 8 + length] + b" " * 8 + header[8 + length :])
    identity = json.loads((cache / "identity.json").read_text())
    identity["codebook"] = hashlib.sha256(codebook.read_bytes()).hexdigest()
    (cache / "identity.json").write_text(json.dumps(identity, sort_keys=True, separators=(",", ":")))
    (cache / "manifest.json").unlink()
    begun = codebook.read_bytes()
    apply_decomposer(shared, few, cache, coded=True, target_error=TARGET)
    assert codebook.read_bytes() == begun
    assert verify_cache(cache, full=True) == []
    assert snapshot(cache / "shards") == snapshot(made / "shards")


def test_what_is_done_is_not_done_again_and_starts_no_ray(shared, few, made):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    command = [sys.executable, "-m", "lowrank_tune", "apply", shared, few, made, "--coded", "--target-error", TARGET]
    dead = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run([str(word) for word in command], env=dead, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_an_image_that_cannot_meet_the_target_is_quarantined_with_the_reason(few, tmp_path):
    narrow = write_model(tmp_path / "narrow", RANK, family="shared")
    with pytest.raises(
        InputError, match=rf"of {FEW} files cannot be used, --max-quarantined .*\n .*features_0.pt: .*0.05"
    ):
        apply_decomposer(narrow, few, tmp_path / "none", coded=True, target_error=TARGET)
    folder = write_tensors(tmp_path / "tensors", range(3))
    _, basis_1RD = load_decomposer(narrow)(torch.zeros(1, TOKENS, DIM))
    for number in range(3, 6):
        a_TR = torch.randn(TOKENS, RANK, generator=torch.Generator().manual_seed(number))
        torch.save((a_TR @ basis_1RD[0]).detach(), folder / f"features_{number}.pt")
    options = {"coded": True, "target_error": 0.2, "max_quarantined": 0.5}
    features = apply_decomposer(narrow, folder, tmp_path / "some", **options)
    assert (len(features.rows), features.quarantined) == (3, 3)
    reasons = {row["error"] for row in json.loads((tmp_path / "some" / "quarantine.json").read_text())}
    assert all("0.2" in reason for reason in reasons)


def test_a_copy_on_a_node_and_one_from_a_bucket_bring_the_codebook(made, bucket, staging):
    for place in (made, bucket.put(made, "coded")):
        copy = stage_cache(place)
        assert copy.is_relative_to(staging)
        assert (copy / "codebook.safetensors").read_bytes() == (made / "codebook.safetensors").read_bytes()
        assert torch.equal(open_features(place).load(range(FEW)), open_features(copy).load(range(FEW)))
        (copy / "codebook.safetensors").unlink()
        assert (stage_cache(place) / "codebook.safetensors").exists()


def test_the_commands_tell_what_it_came_to(shared, few, made, tmp_path, typed):
    arguments = ("apply", shared, few, made, "--coded", "--target-error", TARGET, "--json")
    code, out, _ = typed(*arguments)
    facts = json.loads(out)
    stored = sum(shard.stat().st_size for shard in (made / "shards").iterdir())
    codebook = (made / "codebook.safetensors").stat().st_size
    assert (code, facts["images"], facts["dtype"], facts["rank"]) == (0, FEW, "coded", DIM)
    assert facts["bytes_per_image"] == round(stored / FEW)
    assert stored / FEW - 10 < facts["longest_stream"] < 1.2 * stored / FEW
    assert (facts["codebook_bytes"], facts["codebook_bytes_per_image"]) == (codebook, round(codebook / FEW))
    assert (facts["x_dtype"], facts["x_bytes_per_image"]) == ("float16", 2 * TOKENS * DIM)
    assert facts["share_of_x_with_codebook"] == pytest.approx((stored + codebook) / FEW / (2 * TOKENS * DIM), abs=1e-4)
    code, out, _ = typed("features", "show", made, "--json")
    shown = json.loads(out)
    assert code == 0 and shown.items() >= {name: facts[name] for name in ("target", "codebook_bytes")}.items()
    assert shown["target"] == "a relative error of 0.05 at most"
    shutil.copytree(made, tmp_path / "features" / "coded")
    code, out, _ = typed("features", "ls", "--results", tmp_path)
    assert code == 0 and "coded" in out and str(stored + codebook) in out
    assert typed("features", "verify", made, "--full")[0] == 0


def test_a_cache_of_features_and_a_cache_of_coded_images_are_coded_as_well(shared, few, made, tmp_path):
    spec = FeaturesSpec.model_validate({"source": {"tensors": str(few)}, "store_dtype": "float32"})
    features = extract_features(spec, tmp_path / "features", seed=0)
    apply_decomposer(shared, features.directory, tmp_path / "coded", coded=True, target_error=TARGET)
    of_tensors, of_cache = open_features(made), open_features(tmp_path / "coded")
    places = {row.key: number for number, row in enumerate(of_cache.features.rows)}
    assert torch.equal(of_tensors.load([3]), of_cache.load([places[of_tensors.features.rows[3].key]]))
    apply_decomposer(shared, made, tmp_path / "again", coded=True, target_error=0.2)
    once = {row.key: of_tensors.load([number])[0] for number, row in enumerate(of_tensors.features.rows)}
    assert errors_of(open_features(tmp_path / "again"), once).max() <= 0.2


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_shared_model_gives_factors_as_any_model_does_of_more_than_an_images_ranks_too(
    shared, few, x_of, dtype, tmp_path
):
    features = apply_decomposer(shared, few, tmp_path / "factors", store_dtype=dtype)
    assert (features.rank, features.dtype) == (DIM, dtype)
    assert not (tmp_path / "factors" / "codebook.safetensors").exists()
    assert errors_of(open_features(tmp_path / "factors"), x_of).max() < 0.05


def test_a_rank_that_the_model_was_trained_for_is_coded(shared, few, tmp_path):
    features = apply_decomposer(shared, few, tmp_path / "coded", rank=RANK, coded=True, max_bytes=300)
    assert (features.rank, len(features.rows)) == (RANK, FEW)
    assert torch.linalg.matrix_rank(open_features(tmp_path / "coded").load([0])[0]) <= RANK + 1


def test_what_does_not_go_together_is_refused_before_anything_is_written(shared, model, few, made, tmp_path, capsys):
    out = tmp_path / "out"
    for arguments, reason in [
        ((shared, "--coded"), "--coded: give --target-error, such as 0.05, or --bytes, such as 4096, and not both"),
        ((shared, "--coded", "--target-error", "0.1", "--bytes", "4096"), "and not both"),
        ((shared, "--target-error", "0.1"), "add --coded"),
        ((shared, "--bytes", "4096"), "add --coded"),
        ((shared, "--coded", "--target-error", "0.1", "--dtype", "int8"), "--dtype int8: "),
        ((shared, "--coded", "--target-error", "0"), "--target-error 0: "),
        ((shared, "--coded", "--target-error", "1"), "--target-error 1: "),
        ((shared, "--coded", "--target-error", "nan"), "--target-error nan: "),
        ((shared, "--coded", "--target-error", "5", "--rank", "7"), "--target-error 5: "),
        ((shared, "--coded", "--bytes", "2"), "--bytes 2: "),
        ((shared, "--coded", "--bytes", "-4"), "--bytes -4: "),
        ((shared, "--coded", "--bytes", "4096", "--rank", "7"), f"was trained for {RANK}, {DIM}"),
        ((shared, "--coded", "--bytes", "4096", "--device", "cuda"), "--device cuda: --coded works on CPUs"),
        ((model, "--coded", "--bytes", "4096"), f"{model} is of family sketch, and only family shared"),
    ]:
        capsys.readouterr()
        command = [str(arguments[0]), str(few), str(out), *arguments[1:]]
        code = run(["apply", "--quiet", *command])
        err = capsys.readouterr().err
        assert (code, err.count("\n")) == (2, 1) and err.startswith("error: ") and reason in err, (arguments, err)
        assert not out.exists()
    before = snapshot(made)
    for other in ({"target_error": 0.1}, {"max_bytes": 400}, {"target_error": TARGET, "rank": RANK}):
        with pytest.raises(InputError, match="belongs to another model, other features or another dtype or target"):
            apply_decomposer(shared, few, made, coded=True, **other)
    with pytest.raises(InputError, match="belongs to another model"):
        apply_decomposer(shared, few, made)
    assert snapshot(made) == before
