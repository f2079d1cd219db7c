import json
import shutil
import threading

import huggingface_hub.constants
import pytest
from safetensors.numpy import load_file, save_file

from lowrank_tune import files
from lowrank_tune.errors import InputError
from lowrank_tune.features.checkpoint import find_tower, read_checkpoint_config, write_tiny_checkpoint

LANGUAGE_SHARD, MIXED_SHARD, TOWER_SHARD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


@pytest.fixture
def checkpoint(tmp_path, tiny_config):
    """A directory checkpoint that may be spoilt."""
    return shutil.copytree(tiny_config.directory, tmp_path / "checkpoint")


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def locate(checkpoint):
    config = read_checkpoint_config(str(checkpoint), checkpoint.parent)
    return config, find_tower(config, checkpoint.parent)


def test_the_tiny_checkpoint_has_the_hubs_layout_and_is_the_same_bytes_everywhere(tmp_path, tiny_config):
    again = write_tiny_checkpoint(tmp_path)
    names = {path.name for path in again.iterdir()}
    extra = {"config.json", "preprocessor_config.json", "model.safetensors.index.json"}
    assert names == {LANGUAGE_SHARD, MIXED_SHARD, TOWER_SHARD, *extra}
    for name in names:
        assert (again / name).read_bytes() == (tiny_config.directory / name).read_bytes()
    weight_map = json.loads((again / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in (LANGUAGE_SHARD, MIXED_SHARD, TOWER_SHARD):
        assert set(load_file(again / shard)) == {key for key, file in weight_map.items() if file == shard}
    assert {"visual.blocks.1.attn.qkv.weight", "model.layers.0.self_attn.q_proj.weight"} <= set(weight_map)


def test_two_processes_may_write_it_at_once(tmp_path, monkeypatch):
    barrier = threading.Barrier(2, timeout=20)
    rename = files.os.rename

    def together(source, target):
        barrier.wait()
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", together)
    writers = [threading.Thread(target=write_tiny_checkpoint, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    (only,) = tmp_path.iterdir()
    locate(only)


def test_a_directory_is_told_random_only_by_its_mark(checkpoint):
    assert locate(checkpoint)[0].weights == "random"
    edit_json(checkpoint / "config.json", lambda config: config.pop("lowrank_tune_weights"))
    assert locate(checkpoint)[0].weights == "unknown"


def test_only_files_with_the_tower_are_touched(checkpoint):
    (checkpoint / LANGUAGE_SHARD).unlink()
    _, tower = locate(checkpoint)
    assert [path.name for path in tower.files] == [MIXED_SHARD, TOWER_SHARD]


def test_the_digest_ignores_the_division_into_files_and_sees_every_value(checkpoint, tiny_tower):
    """It is part of a cache's fingerprint: whoever changes the tower counts TINY_VERSION up."""
    assert tiny_tower.digest() == "63beecb683636625932639caa414e5a99eba1f6c85910499063569f54a8f24fd"
    tensors = {key: value for path in checkpoint.glob("*.safetensors") for key, value in load_file(path).items()}
    for path in checkpoint.glob("model*"):
        path.unlink()
    save_file({f"model.{key}" if key.startswith("visual.") else key: value for key, value in tensors.items()},
              checkpoint / "model.safetensors")  # fmt: skip
    assert locate(checkpoint)[1].digest() == tiny_tower.digest()
    tensors["visual.merger.mlp.2.bias"][-1] += 1e-6
    save_file(tensors, checkpoint / "model.safetensors")
    assert locate(checkpoint)[1].digest() != tiny_tower.digest()


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda at: truncate(at / TOWER_SHARD, 5), rf"{TOWER_SHARD}: is no readable safetensors file"),
        (lambda at: truncate(at / TOWER_SHARD, -100), rf"{TOWER_SHARD}: is no readable safetensors file"),
        (lambda at: (at / TOWER_SHARD).unlink(), rf"{TOWER_SHARD} is missing"),
        (lambda at: shutil.copy(at / LANGUAGE_SHARD, at / TOWER_SHARD), r"lacks visual.*the checkpoint's index places"),
        (lambda at: (at / "preprocessor_config.json").unlink(), r"preprocessor_config.json is missing"),
        (lambda at: truncate(at / "config.json", 9), r"config.json: cannot be read as JSON"),
        (
            lambda at: edit_json(at / "config.json", lambda config: config.update(model_type="llama")),
            "describes 'llama', not a Qwen2.5-VL model",
        ),
        (
            lambda at: edit_json(at / "config.json", lambda config: config["vision_config"].pop("out_hidden_size")),
            "vision_config in config.json lacks out_hidden_size",
        ),
        (
            lambda at: edit_json(at / "model.safetensors.index.json", lambda index: index.update(weight_map={})),
            r"no tensor of the checkpoint begins with `visual\.`",
        ),
    ],
)  # fmt: skip
def test_missing_broken_and_foreign_files_are_named(checkpoint, spoil, message):
    spoil(checkpoint)
    with pytest.raises(InputError, match=message):
        locate(checkpoint)


def test_a_size_that_is_no_whole_number_of_tokens_is_refused(tiny_config):
    assert tiny_config.shape(448) == (256, 256)
    with pytest.raises(InputError, match="450 is not a multiple of 28.*use 448"):
        tiny_config.shape(450)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache on this machine, empty; there is no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-randm", "neither a directory nor a hub id.*did you mean tiny-random"),
        ("./gone", "neither a directory nor a hub id"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "config.json is not on this machine and the hub does not answer.*tiny-random"),
    ],
)
def test_a_checkpoint_that_cannot_be_had_names_the_remedy(tmp_path, hub, name, message):
    with pytest.raises(InputError, match=message):
        read_checkpoint_config(name, tmp_path)


def test_a_hub_id_needs_only_the_towers_files_in_the_local_cache(tmp_path, hub, checkpoint, tiny_tower):
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = hub / "models--Someone--Tiny-VL"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (checkpoint / LANGUAGE_SHARD).unlink()
    edit_json(checkpoint / "config.json", lambda config: config.pop("lowrank_tune_weights"))
    shutil.copytree(checkpoint, repository / "snapshots" / revision)
    config = read_checkpoint_config("Someone/Tiny-VL", tmp_path)
    assert (config.weights, config.revision) == ("pretrained", revision)
    assert find_tower(config, tmp_path).digest() == tiny_tower.digest()
    (repository / "snapshots" / revision / TOWER_SHARD).unlink()
    with pytest.raises(InputError, match=rf"Someone/Tiny-VL: .*{TOWER_SHARD} is not on this machine.*hf download"):
        find_tower(config, tmp_path)
