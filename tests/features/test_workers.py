"""What a worker does when files, memory, numbers or the cache's place fail it."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import ray
import torch
from cachekit import IDENTITY, importing, made
from safetensors.torch import load_file, save_file

from lowrank_tune.config.schema import PILLOWS_MAX_PIXELS, FeaturesSpec
from lowrank_tune.errors import CacheError, InputError
from lowrank_tune.features.cache import open_cache, verify_cache
from lowrank_tune.features.checkpoint import find_tower, read_checkpoint_config
from lowrank_tune.features.decoding import decode_shard
from lowrank_tune.features.encoder import Encoder
from lowrank_tune.features.extract import EncodeImages
from lowrank_tune.features.shards import Pool, ShardPlan

POOL = Pool(least=1, most=1)


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "features_0.pt"
    torch.save(torch.ones(IDENTITY["tokens"], IDENTITY["dim"]), path)
    return ShardPlan("s.safetensors", (hashlib.sha256(path.read_bytes()).hexdigest(),), (str(path),))


@pytest.mark.parametrize("change", ["content", "absence"])
def test_a_file_that_changed_since_it_was_hashed_fails_its_shard_and_is_not_quarantined(plan, tmp_path, change):
    file = tmp_path / "features_0.pt"
    file.write_bytes(b"other") if change == "content" else file.unlink()
    result = made(importing(tmp_path), plan)
    decoded = pickle.loads(decode_shard({"plan": pickle.dumps(plan)}, 56, PILLOWS_MAX_PIXELS)["decoded"])
    for error in (result.error, decoded[2]):
        with pytest.raises(InputError, match=f"{file}.*; run again"):
            raise error
    assert (result.quarantined, decoded[1]) == ((), [])


def test_a_cache_that_cannot_be_written_fails_the_shard_and_is_named(plan, tmp_path):
    with pytest.raises(CacheError, match="gone: shard s.safetensors cannot be written"):
        raise made(importing(tmp_path / "gone"), plan).error


@pytest.fixture
def images(photographs):
    """A shard of ten photographs."""
    keys = tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in photographs[:10])
    return ShardPlan("s.safetensors", keys, tuple(str(path) for path in photographs[:10]))


def image_extraction(directory, config, tower, dtype="float16"):
    for folder in ("shards", "commits"):
        (directory / folder).mkdir(parents=True)
    identity = {"kind": "images", "store_dtype": dtype, "tokens": 4, "dim": 256}
    encoder = {"image_size": 56, "compute_dtype": "float32"}
    spec = FeaturesSpec.model_validate({"source": {"samples": 9}, "batch_size": 4, "encoder": encoder})
    return EncodeImages(str(directory), identity, "tiny-random", "random", config, tower, spec)


def encoded(plan, extraction, pool=POOL):
    row = decode_shard({"plan": pickle.dumps(plan)}, 56, PILLOWS_MAX_PIXELS)
    return made(extraction, plan, pool, pixels=row["pixels"], decoded=row["decoded"])


def raising(error):
    def fail(*arguments, **options):
        raise error

    return fail


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("gpus", "where", "function", "message"),
    [
        (0, torch.nn.functional, raising(OUT_OF_MEMORY), "out of memory on cpu with a single image; free the GPU"),
        (1, torch.cuda, lambda: False, "has a GPU here, but torch"),
        (0, torch.nn.Module, raising(OUT_OF_MEMORY), "out of memory on cpu before the first image; free the GPU"),
        (0, torch.nn.Module, raising(RuntimeError("no image")), "encoder did not start: RuntimeError('no image')"),
    ],
)
def test_a_device_that_cannot_do_the_work_fails_the_shard_and_says_why(
    images, tiny_config, tiny_tower, tmp_path, monkeypatch, gpus, where, function, message
):
    names = {torch.nn.functional: "scaled_dot_product_attention", torch.cuda: "is_available", torch.nn.Module: "to"}
    monkeypatch.setattr(where, names[where], function)
    result = encoded(images, image_extraction(tmp_path, tiny_config, tiny_tower), replace(POOL, gpus=gpus))
    with pytest.raises(InputError, match=re.escape(message)):
        raise result.error
    assert not list((tmp_path / "commits").iterdir())


def test_features_beyond_float16_are_quarantined_one_by_one_and_never_infinite(
    images, tiny_config, tiny_tower, photographs, tmp_path
):
    """A checkpoint whose features are as large as float16 goes for half of the images, and larger for the rest."""
    pixels = decode_shard({"plan": pickle.dumps(images)}, 56, PILLOWS_MAX_PIXELS)["pixels"]
    largest = Encoder(tiny_config, tiny_tower, "float32").encode(pixels).abs().amax((1, 2))
    spoilt = tmp_path / "checkpoint"
    shutil.copytree(tiny_config.directory, spoilt)
    index = json.loads((spoilt / "model.safetensors.index.json").read_text())["weight_map"]
    last = [name for name in index if name.startswith("visual.merger.mlp.2.")]
    for name in last:
        tensors = load_file(spoilt / index[name])
        tensors[name] = tensors[name] * (65504 / largest.median())
        save_file(tensors, spoilt / index[name])
    assert len(last) == 2
    config = read_checkpoint_config(str(spoilt), tmp_path)
    tower = find_tower(config, tmp_path)
    result = encoded(images, image_extraction(tmp_path / "float16", config, tower))
    assert not result.error
    assert 3 <= len(result.quarantined) <= 7
    assert all(
        "does not fit float16; set features.store_dtype to bfloat16" in reason for _, reason in result.quarantined
    )
    kept = load_file(tmp_path / "float16" / "shards" / "s.safetensors")["features"]
    assert len(kept) + len(result.quarantined) == 10 and kept.isfinite().all()
    for dtype in ("bfloat16", "float32"):
        assert encoded(images, image_extraction(tmp_path / dtype, config, tower, dtype)).quarantined == ()


def test_a_real_extraction_goes_on_with_a_smaller_batch_and_says_so(ray_cluster, tmp_path):
    """Its own workers, in the Ray of all tests, have a small GPU memory."""
    program = """
import logging, pathlib, sys, ray
from lowrank_tune.features.extract import extract_features
from lowrank_tune.config.schema import FeaturesSpec

def shrink_memory():
    import torch
    attend = torch.nn.functional.scaled_dot_product_attention
    def attend_if_it_fits(query, *arguments, **options):
        if len(query) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return attend(query, *arguments, **options)
    torch.nn.functional.scaled_dot_product_attention = attend_if_it_fits

logging.basicConfig(level=logging.WARNING)
ray.init(sys.argv[3], log_to_driver=False, runtime_env={"worker_process_setup_hook": shrink_memory})
extract_features(FeaturesSpec.model_validate_json(sys.argv[1]), pathlib.Path(sys.argv[2]), seed=0)
"""
    encoder = {"checkpoint": "tiny-random", "image_size": 56}
    spec = FeaturesSpec.model_validate({"source": {"samples": 20}, "batch_size": 8, "encoder": encoder})
    address = ray.get_runtime_context().gcs_address
    script = [sys.executable, "-c", program, spec.model_dump_json(), str(tmp_path), address]
    ran = subprocess.run(script, env=dict(os.environ), timeout=300, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for tried, then in ((8, 4), (4, 2)):
        assert f"out of memory with {tried} images at once: going on with {then}" in ran.stderr
    (directory,) = (path.parent for path in tmp_path.glob("*/manifest.json"))
    assert verify_cache(directory) == []
    assert len(open_cache(directory).rows) == 20
