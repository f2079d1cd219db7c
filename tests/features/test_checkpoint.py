import json
import shutil
import threading

import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from lowrank_tune import files
from lowrank_tune.errors import InputError
from lowrank_tune.features.checkpoint import find_tower, read_checkpoint_config, write_tiny_checkpoint

LANGUAGE_SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture
def checkpoint(tmp_path, tiny_config):
    """A directory checkpoint that may be spoilt."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(tiny_config.directory, directory)
    return directory


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def locate(checkpoint):
    config = read_checkpoint_config(str(checkpoint), checkpoint.parent)
    return config, find_tower(config, checkpoint.parent)


def test_the_tiny_checkpoint_has_the_hubs_layout(tiny_config):
    names = sorted(path.name for path in tiny_config.directory.iterdir())
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert names == ["config.json", *shards, "model.safetensors.index.json", "preprocessor_config.json"]
    weight_map = json.loads((tiny_config.directory / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in shards:
        assert set(load_file(tiny_config.directory / shard)) == {
            key for key, file in weight_map.items() if file == shard
        }
    assert "visual.blocks.1.attn.qkv.weight" in weight_map
    assert "model.layers.0.self_attn.q_proj.weight" in weight_map


def test_the_tiny_checkpoint_is_the_same_bytes_everywhere_and_marked_random(tmp_path, tiny_config):
    again = write_tiny_checkpoint(tmp_path)
    for path in tiny_config.directory.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert tiny_config.weights == "random"


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
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-random-1"]
    find_tower(read_checkpoint_config(str(tmp_path / "tiny-random-1"), tmp_path), tmp_path)


def test_a_directory_is_told_random_only_by_its_mark(checkpoint):
    assert locate(checkpoint)[0].weights == "random"
    edit_json(checkpoint / "config.json", lambda config: config.pop("lowrank_tune_weights"))
    assert locate(checkpoint)[0].weights == "unknown"


def test_only_files_with_the_tower_are_touched(checkpoint, tiny_tower):
    (checkpoint / LANGUAGE_SHARD).unlink()
    _, tower = locate(checkpoint)
    assert LANGUAGE_SHARD not in {path.name for path in tower.files}
    assert tower.digest() == tiny_tower.digest()


def test_the_digest_ignores_the_division_into_files_and_sees_every_value(checkpoint, tiny_tower):
    tensors = {key: value for path in checkpoint.glob("*.safetensors") for key, value in load_file(path).items()}
    for path in checkpoint.glob("model*"):
        path.unlink()
    save_file(
        {f"model.{key}" if key.startswith("visual.") else key: value for key, value in tensors.items()},
        checkpoint / "model.safetensors",
    )
    assert locate(checkpoint)[1].digest() == tiny_tower.digest()
    tensors["visual.merger.mlp.2.bias"][-1] += 1e-6
    save_file(tensors, checkpoint / "model.safetensors")
    assert locate(checkpoint)[1].digest() != tiny_tower.digest()


def test_a_checkpoint_without_a_tower_is_refused(checkpoint):
    for path in list(checkpoint.glob("model*")):
        if path.name != LANGUAGE_SHARD:
            path.unlink()
    (checkpoint / LANGUAGE_SHARD).rename(checkpoint / "model.safetensors")
    with pytest.raises(InputError, match=r"no tensor of the checkpoint begins with `visual\.`"):
        locate(checkpoint)


def test_missing_and_broken_files_are_named(checkpoint):
    shard = checkpoint / "model-00003-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:5])
    with pytest.raises(InputError, match=r"00003-of-00003.safetensors: is no readable safetensors file"):
        locate(checkpoint)
    shard.write_bytes(data[:-100])
    with pytest.raises(InputError, match="ends in the middle of"):
        locate(checkpoint)[1].digest()
    shard.unlink()
    with pytest.raises(InputError, match=r"00003-of-00003.safetensors is missing"):
        locate(checkpoint)
    (checkpoint / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"preprocessor_config.json is missing"):
        locate(checkpoint)


def test_another_architecture_is_refused(checkpoint):
    edit_json(checkpoint / "config.json", lambda config: config.update(model_type="llama"))
    with pytest.raises(InputError, match="describes 'llama', not a Qwen2.5-VL model"):
        locate(checkpoint)


def test_a_configuration_without_the_towers_sizes_is_refused(checkpoint):
    edit_json(checkpoint / "config.json", lambda config: config["vision_config"].pop("out_hidden_size"))
    with pytest.raises(InputError, match="vision_config in config.json lacks out_hidden_size"):
        locate(checkpoint)


def test_a_size_that_is_no_whole_number_of_tokens_is_refused(tiny_config):
    assert tiny_config.shape(448) == (256, 256)
    with pytest.raises(InputError, match="450 is not a multiple of 28.*use 448"):
        tiny_config.shape(450)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-randm", "neither a directory nor a hub id.*did you mean tiny-random"),
        ("./gone", "neither a directory nor a hub id"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "config.json is not on this machine and the hub does not answer.*tiny-random"),
    ],
)
def test_a_checkpoint_that_cannot_be_had_names_the_remedy(tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(InputError, match=message):
        read_checkpoint_config(name, tmp_path)


def test_a_hub_id_needs_only_the_towers_files_in_the_local_cache(tmp_path, monkeypatch, checkpoint, tiny_tower):
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--Someone--Tiny-VL"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (checkpoint / LANGUAGE_SHARD).unlink()
    edit_json(checkpoint / "config.json", lambda config: config.pop("lowrank_tune_weights"))
    shutil.copytree(checkpoint, repository / "snapshots" / revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    config = read_checkpoint_config("Someone/Tiny-VL", tmp_path)
    assert (config.weights, config.revision) == ("pretrained", revision)
    assert find_tower(config, tmp_path).digest() == tiny_tower.digest()
