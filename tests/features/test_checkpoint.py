import json
import shutil
import threading

import huggingface_hub.constants
import numpy as np
import pytest
from checkpointkit import configure, edit_json, locate, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from lowrank_tune import files
from lowrank_tune.errors import InputError
from lowrank_tune.features.checkpoint import find_tower, read_checkpoint_config
from lowrank_tune.features.encoder import Encoder, check_tower
from lowrank_tune.features.tiny import quiet_transformers, write_tiny_checkpoint

INDEX = "model.safetensors.index.json"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3982688704\n"
LANGUAGE_SHARD, MIXED_SHARD, TOWER_SHARD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


def test_the_tiny_checkpoint_has_the_hubs_layout_and_is_the_same_bytes_everywhere(tmp_path, tiny_config):
    again = write_tiny_checkpoint(tmp_path)
    names = {path.name for path in again.iterdir()}
    small = ("chat_template", "config", "generation_config", "preprocessor_config", "tokenizer", "tokenizer_config")
    extra = {"model.safetensors.index.json", *(f"{name}.json" for name in small)}
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
    """It is part of a cache's fingerprint: the tower of the tiny checkpoint stays what it is."""
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


def replace(path, make):
    path.unlink()
    make(path)


def configure_vision(checkpoint, **keys):
    edit_json(checkpoint / "config.json", lambda config: config["vision_config"].update(keys))


def prepare(checkpoint, **keys):
    edit_json(checkpoint / "preprocessor_config.json", lambda settings: settings.update(keys))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda at: truncate(at / TOWER_SHARD, 5), rf"{TOWER_SHARD}: is no readable .*copy it again from where it was"),
        (lambda at: truncate(at / TOWER_SHARD, -100), rf"{TOWER_SHARD}: is no readable .*save the model once more"),
        (lambda at: (at / TOWER_SHARD).write_bytes(b""), rf"{TOWER_SHARD}: is no readable .*it is empty"),
        (lambda at: (at / TOWER_SHARD).write_text(LFS), rf"{TOWER_SHARD}: .*a git-lfs pointer.* run `git lfs pull` in"),
        (lambda at: (at / "config.json").write_text(LFS), r"config.json: .*a git-lfs pointer.* run `git lfs pull` in"),
        (lambda at: (at / TOWER_SHARD).write_text("<!DOCTYPE html>"), r"a web page that was saved in the file's place"),
        (lambda at: (at / TOWER_SHARD).unlink(), rf"'{TOWER_SHARD}' is missing, .* holds .*only {LANGUAGE_SHARD}"),
        (lambda at: [path.unlink() for path in at.glob("model-*")], "holds none of the weights"),
        (lambda at: replace(at / TOWER_SHARD, lambda p: p.symlink_to("../blobs/1")), r"a link to ../blobs/1.*cp -rL"),
        (lambda at: shutil.copy(at / LANGUAGE_SHARD, at / TOWER_SHARD), r"lacks visual.*index.json places"),
        (lambda at: truncate(at / "config.json", 9), r"config.json: cannot be read as JSON.*correct it"),
        (lambda at: (at / "config.json").write_text("[1]"), r"cannot be read as JSON \(a list, not an object\)"),
        (lambda at: configure(at, model_type="llama"), "describes 'llama', not a Qwen2.5-VL model"),
        (lambda at: configure(at, model_type="qwen3_vl"), "describes 'qwen3_vl', not a Qwen2.5-VL model"),
        (lambda at: configure(at, vision_config=[]), "are of different models .depth 32 and 2, hidden_size 3584"),
        (lambda at: configure_vision(at, intermediate_size=96), r"different models \(intermediate_size 96 and 128\)"),
        (lambda at: configure(at, vision_config=3), "vision_config in config.json is 3, not an object"),
        (lambda at: configure_vision(at, depth="2"), "depth in config.json is '2', not a whole number from 1 on"),
        (lambda at: configure_vision(at, num_heads=3), "cannot be: .*hidden_size \\(64\\) be divisible by"),
        (lambda at: prepare(at, image_std=[0, 1, 1]), "image_std in preprocessor_config.json is .*numbers above 0"),
        (lambda at: prepare(at, image_mean=0.5), "image_mean in preprocessor_config.json is 0.5, not three numbers"),
        (lambda at: prepare(at, patch_size=16), "patch_size is 16 in preprocessor_config.json, but patch_size is 14"),
        (
            lambda at: edit_json(at / INDEX, lambda index: index.update(weight_map={})),
            r"none of the checkpoint's 0 tensors is a vision tower's `visual\.",
        ),
        (lambda at: edit_json(at / INDEX, lambda index: index.update(weight_map=[1])), "its weight_map names no files"),
    ],
)  # fmt: skip
def test_missing_broken_and_foreign_files_are_named(checkpoint, spoil, message):
    spoil(checkpoint)
    with pytest.raises(InputError, match=message):
        check_tower(*locate(checkpoint))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_config):
    """What transformers leaves of the whole model and its processor, of the model's body and of its tower alone."""
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor())
    at = tmp_path_factory.mktemp("saved")
    with quiet_transformers():
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_config.directory)
        for name, part in {"whole": model, "body": model.model, "tower": model.model.visual}.items():
            part.save_pretrained(at / name)
        processor.save_pretrained(at / "whole")
        model.save_pretrained(at / "shards", max_shard_size="200KB")
    return at


@pytest.mark.parametrize("name", ["whole", "body", "tower", "shards"])
def test_what_transformers_saves_is_read_as_it_is(saved, tiny_config, tiny_tower, name):
    config, tower = locate(saved / name)
    check_tower(config, tower)
    assert tower.digest() == tiny_tower.digest()
    assert config.shape(448) == tiny_config.shape(448)
    assert config.preprocessor["image_mean"] == tiny_config.preprocessor["image_mean"]
    assert bool(config.notes) == (name != "whole")


def test_features_of_what_transformers_saves_are_the_same(saved, tiny_config, tiny_tower):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 112, 112, 3), np.uint8)
    expected = Encoder(tiny_config, tiny_tower, "float32").encode(pixels)
    for name in ("whole", "tower"):
        assert Encoder(*locate(saved / name), "float32").encode(pixels).equal(expected)


def test_what_vision_config_leaves_out_is_transformers_own(checkpoint, tiny_config):
    """Of 4.49 to 4.51, what differs from the class's defaults; and names that other classes have."""
    same = ("patch_size", "spatial_merge_size", "window_size")
    edit_json(checkpoint / "config.json", lambda config: [config["vision_config"].pop(key) for key in same])
    configure_vision(checkpoint, torch_dtype="bfloat16", attn_implementation="flash_attention_2", rope_theta=10000.0)
    config, tower = locate(checkpoint)
    check_tower(config, tower)
    assert {key: config.vision[key] for key in tiny_config.vision} == tiny_config.vision
    assert "rope_parameters" not in config.vision
    for key in tiny_config.vision:
        edit_json(checkpoint / "config.json", lambda config, key=key: config["vision_config"].pop(key, None))
    config = read_checkpoint_config(str(checkpoint), checkpoint.parent)
    assert (config.vision["depth"], config.vision["fullatt_block_indexes"]) == (32, [7, 15, 23, 31])


def test_without_a_preprocessor_file_the_published_settings_are_used_and_told(checkpoint, tiny_config):
    (checkpoint / "preprocessor_config.json").unlink()
    config, _ = locate(checkpoint)
    assert config.preprocessor.items() <= tiny_config.preprocessor.items()
    assert "no preprocessor_config.json nor processor_config.json with an image_processor" in config.notes[0]


def resave(checkpoint, change):
    """The weights in one file, each under the names and values that `change` gives it."""
    tensors = {}
    for key, value in tensors_of(checkpoint).items():
        tensors |= change(key, value)
    for path in checkpoint.glob("model*"):
        path.unlink()
    save_file(tensors, checkpoint / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda key, value: {f"model.{key}": value},
        lambda key, value: {f"base_model.model.{key}": value},
        lambda key, value: {f"base_model.model.model.{key}".replace(".qkv.", ".qkv.base_layer."): value},
        lambda key, value: {f"_orig_mod.{key}".replace("visual.", "visual._fsdp_wrapped_module."): value},
        lambda key, value: {
            key.replace("merger.", "merger.modules_to_save.default."): value,
            key.replace("merger.", "merger.original_module."): value * 0 if "merger" in key else value,
        },
        lambda key, value: {f"module.vlm.{key}": value},
    ],
)
def test_the_tower_is_found_under_every_name(checkpoint, tiny_tower, change):
    resave(checkpoint, change)
    config, tower = locate(checkpoint)
    check_tower(config, tower)
    assert tower.digest() == tiny_tower.digest()


QKV = "visual.blocks.0.attn.qkv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key, value: {key: value, f"{key}.lora_A.default.weight": value}, "LoRA that is not merged"),
        (lambda key, value: {f"actor.{key}": value, f"ref.{key}": value}, r"several vision towers \(actor.visual"),
        (lambda key, value: {key: value.astype("int8") if key == QKV else value}, rf"gptq: {QKV} is I8.*\(Some/Base"),
        (lambda key, value: {key: value[:1] if key == QKV else value}, r"qkv.weight .* is \[1, 64\] in the weights"),
        (lambda key, value: {} if key == QKV else {key: value}, r"attn.qkv.weight .* is missing in the weights"),
        (lambda key, value: {key: value, f"{key}_extra": value}, r"_extra of the vision tower is .* and unknown by"),
    ],
)  # fmt: skip
def test_weights_that_are_no_plain_tower_are_refused(checkpoint, change, message):
    configure(checkpoint, quantization_config={"quant_method": "gptq"}, _name_or_path="Some/Base")
    resave(checkpoint, change)
    with pytest.raises(InputError, match=message):
        check_tower(*locate(checkpoint))


def test_a_model_whose_quantisation_leaves_the_tower_out_is_read(checkpoint, tiny_tower):
    configure(checkpoint, quantization_config={"quant_method": "awq", "modules_to_not_convert": ["visual"]})
    resave(checkpoint, lambda key, value: {key: value if key.startswith("visual") else value.astype("int8")})
    assert locate(checkpoint)[1].digest() == tiny_tower.digest()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([-1, 0, 1, 3, 14]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory, tiny_config):
    return shutil.copytree(tiny_config.directory, tmp_path_factory.mktemp("kept") / "checkpoint")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_the_small_files_hold_is_read_or_refused(kept, tiny_config, data):
    """Random JSON in place of a whole file, or of one value in it."""
    file = data.draw(st.sampled_from(["config.json", "preprocessor_config.json", INDEX]))
    content = json.loads((tiny_config.directory / file).read_text())
    at = data.draw(st.sampled_from([None, content, *(value for value in content.values() if isinstance(value, dict))]))
    if at:
        at[data.draw(st.sampled_from([*at, "rope_parameters", "rope_scaling", "hidden_act"]))] = data.draw(JSON)
    (kept / file).write_text(json.dumps(content if at else data.draw(JSON)))
    try:
        check_tower(*locate(kept))
    except InputError as error:
        assert len(str(error)) < 1500
    finally:
        shutil.copy(tiny_config.directory / file, kept / file)


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
        ("~nobody-of-this-name/gone", "neither a directory nor a hub id"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "config.json is not on this machine and HF_HUB_OFFLINE forbids.*tiny-random"),
    ],
)
def test_a_checkpoint_that_cannot_be_had_names_the_remedy(tmp_path, hub, name, message):
    with pytest.raises(InputError, match=message):
        read_checkpoint_config(name, tmp_path)


def test_a_whole_file_goes_before_an_index_that_was_left_there(checkpoint, tiny_tower):
    index = (checkpoint / INDEX).read_bytes()
    resave(checkpoint, lambda key, value: {key: value})
    (checkpoint / INDEX).write_bytes(index)
    assert locate(checkpoint)[1].digest() == tiny_tower.digest()


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
    truncate(repository / "snapshots" / revision / TOWER_SHARD, 900)
    with pytest.raises(InputError, match=rf"`hf download Someone/Tiny-VL {TOWER_SHARD} --force-download`"):
        find_tower(config, tmp_path)
    (repository / "snapshots" / revision / TOWER_SHARD).unlink()
    with pytest.raises(InputError, match=rf"Someone/Tiny-VL: .*{TOWER_SHARD} is not on this machine.*hf download"):
        find_tower(config, tmp_path)


def test_a_lora_in_the_local_cache_is_recognised(tmp_path, hub):
    snapshot = hub / "models--Someone--Lora" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    (snapshot / "adapter_config.json").write_text('{"base_model_name_or_path": "Some/Base"}')
    with pytest.raises(InputError, match='^Someone/Lora: holds a LoRA .*"Some/Base".*save_pretrained."Lora-merged"'):
        read_checkpoint_config("Someone/Lora", tmp_path)
