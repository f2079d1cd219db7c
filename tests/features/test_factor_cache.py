"""A cache of factors as files: read, checked, copied to a node; no Ray is needed."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from factorkit import DIM, RANK, TOKENS, write_tensors
from safetensors.torch import load_file

from lowrank_tune import open_features
from lowrank_tune.cli import run
from lowrank_tune.errors import CacheError, InputError
from lowrank_tune.features.cache import open_cache, recover, seal, verify_cache
from lowrank_tune.features.commits import commit_shard, layout, shard_name
from lowrank_tune.features.decompose import factors_identity
from lowrank_tune.features.given import find_given
from lowrank_tune.features.remote import stage_cache
from lowrank_tune.lowrank.data import pack_factors, unpack_factors
from lowrank_tune.lowrank.pretrained import read_exported
from lowrank_tune.lowrank.quantization import STORE_DTYPES, factor_bytes

COUNT = 5


def factors(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(TOKENS, RANK, generator=generator), torch.randn(RANK, DIM, generator=generator)


@pytest.fixture(params=STORE_DTYPES)
def cache(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Path:
    """A sealed cache of five images under a name of its user's."""
    given = find_given(str(write_tensors(tmp_path / "tensors", range(COUNT))), None)
    identity = factors_identity(read_exported(model), RANK, given.features, request.param)
    directory = tmp_path / "my factors"
    directory.mkdir()
    recover(directory, identity)
    keys = [hashlib.sha256(bytes([number])).hexdigest() for number in range(COUNT)]
    packed = [pack_factors(*factors(number), request.param) for number in range(COUNT)]
    commit_shard(
        directory, shard_name(keys), keys, {name: [row[name] for row in packed] for name in layout(identity)}, []
    )
    seal(directory, identity, "sketch", "unknown")
    return directory


def test_factors_are_read_as_features_and_as_factors(cache: Path) -> None:
    matrix = open_features(cache)
    dtype = open_cache(cache).dtype
    for number in range(COUNT):
        a_TR, b_RD = unpack_factors(pack_factors(*factors(number), dtype), dtype, TOKENS, DIM, RANK)
        read = matrix.factors([number])
        assert torch.equal(read.a_NTR[0], a_TR) and torch.equal(read.b_NRD[0], b_RD)
        torch.testing.assert_close(matrix.load([number])[0], a_TR @ b_RD)
    half = torch.empty(2, TOKENS, DIM, dtype=torch.float16)
    assert matrix.load([4, 1], out=half) is half
    torch.testing.assert_close(half, matrix.load([4, 1]).half())
    (shard,) = (cache / "shards").iterdir()
    row = {name: part[0] for name, part in load_file(shard).items()}
    assert sum(part.nbytes for part in row.values()) == factor_bytes(TOKENS, DIM, RANK, dtype)


def test_every_part_of_a_row_is_under_its_checksum(cache: Path) -> None:
    assert verify_cache(cache, full=True) == []
    (shard,) = (cache / "shards").iterdir()
    whole = shard.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:length])
    for entry in header.values():
        first, after = entry["data_offsets"]
        for row in (0, COUNT - 1):
            data = bytearray(whole)
            data[length + first + row * (after - first) // COUNT] ^= 1
            shard.write_bytes(data)
            (problem,) = verify_cache(cache, full=True)
            assert f"row {row} " in problem
    shard.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match="bytes"):
        open_features(cache)


def test_a_copy_on_a_node_is_whole_and_the_commands_know_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWRANK_TUNE_STAGING", str(tmp_path / "staging"))
    copy = stage_cache(cache)
    assert copy != cache
    assert torch.equal(open_features(copy).load(range(COUNT)), open_features(cache).load(range(COUNT)))
    capsys.readouterr()
    assert run(["features", "show", str(cache), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["identity"]["kind"], facts["identity"]["rank"]) == (COUNT, "factors", RANK)
    assert run(["features", "verify", str(cache), "--full"]) == 0


def test_factors_that_are_not_finite_are_not_stored() -> None:
    a_TR, b_RD = factors(0)
    for dtype in STORE_DTYPES:
        with pytest.raises(InputError, match="NaN or infinity"):
            pack_factors(a_TR.log(), b_RD, dtype)
    with pytest.raises(InputError, match="float16"):
        pack_factors(a_TR * 1e6, b_RD, "float16")
