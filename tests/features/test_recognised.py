import shlex

import numpy as np
import pytest
import torch
from checkpointkit import locate, tensors_of
from safetensors.numpy import save_file

from lowrank_tune.errors import InputError
from lowrank_tune.features.tiny import quiet_transformers


def only(at, *names):
    """Nothing but the configuration, and files or folders (a trailing `/`) of these names."""
    for path in at.glob("model*"):
        path.unlink()
    for name in names:
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).mkdir() if name.endswith("/") else (at / name).write_text("{}")


def adapter(at, *keys):
    only(at)
    (at / "config.json").unlink()
    (at / "adapter_config.json").write_text('{"base_model_name_or_path": "Some/Base", "peft_type": "LORA"}')
    save_file({f"base_model.model.{key}.lora_A.weight": np.ones(1) for key in keys}, at / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("lay", "message"),
    [
        (lambda at: adapter(at, "model.layers.0"), "leaves the vision tower as it was.*checkpoint: Some/Base$"),
        (lambda at: adapter(at, "visual.blocks.0"), r'python -c .*peft.*"Some/Base".*merge_and_unload.*-merged'),
        (lambda at: only(at, "checkpoint-90/config.json", "checkpoint-500/config.json"), "such as .*/checkpoint-500$"),
        (lambda at: only(at, "run/checkpoint-9/adapter_config.json"), r"checkpoint: .*/run/checkpoint-9$"),
        (lambda at: only(at, "zero_to_fp32.py", "global_step5/"), r"cd .* && python zero_to_fp32.py \. \. --safe"),
        (lambda at: only(at, "mp_rank_00_model_states.pt"), "--tag checkpoint"),
        (lambda at: only(at, "pytorch_model_fsdp_0/"), "accelerate merge-weights .*/pytorch_model_fsdp_0 "),
        (lambda at: only(at, "model_world_size_8_rank_0.pt"), "verl.model_merger merge"),
        (lambda at: only(at, "iter_0000100/", "latest_checkpointed_iteration.txt"), "swift export"),
        (lambda at: only(at, "model-Q4_K_M.gguf"), r"holds model-Q4_K_M.gguf, which is llama.cpp's format"),
        (lambda at: only(at, "visual.onnx", "model.pt"), r"holds visual.onnx, which is ONNX"),
        (lambda at: only(at, "tower-fp8.safetensors"), "another name .*: `mv .*/tower-fp8.safetensors .*/model.safe"),
        (lambda at: only(at, "optimizer.pt", "model.pt"), "if it is the model's state_dict, `mv .*/model.pt .*/pytor"),
        (lambda at: (at / "model.safetensors.index.json").unlink(), "index.json is missing, .* copy it to them"),
        (lambda at: only(at, "step_9/actor/model_world_size_1_rank_0.pt"), "checkpoint: .*/step_9/actor$"),
        (lambda at: only(at, ".cache/huggingface/download/a.incomplete"), "go on with it: `hf download"),
        (lambda at: only(at, "merges.txt"), r"there are no weights.*the folder holds chat_template.json, config"),
        (lambda at: (at / "config.json").unlink(), r"config.json is missing.*the folder holds chat_template.json, gen"),
        (lambda at: [path.unlink() for path in at.iterdir()], r"the folder is empty"),
    ],
)  # fmt: skip
def test_what_lies_there_instead_is_recognised_and_the_step_that_helps_is_told(checkpoint, lay, message):
    lay(checkpoint)
    with pytest.raises(InputError, match=message) as caught:
        locate(checkpoint)
    assert "download" not in str(caught.value) or list(checkpoint.rglob("*.incomplete"))


def test_the_command_for_pickled_weights_makes_them_readable(checkpoint, tiny_tower):
    tensors = {key: torch.from_numpy(value) for key, value in tensors_of(checkpoint).items()}
    only(checkpoint)
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"its weights are pickled \(pytorch_model.bin\)") as caught:
        locate(checkpoint)
    with quiet_transformers():
        exec(shlex.split(str(caught.value).split("`")[1])[-1])
    assert locate(checkpoint)[1].digest() == tiny_tower.digest()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "one file of a checkpoint; name its folder"),
        ("../model.gguf", "is a file, which is llama.cpp's format"),
        ("../model.zip", "is an archive; unpack it"),
        ("../notes.txt", "is a file; name a folder that holds config.json"),
    ],
)
def test_a_file_in_place_of_a_folder_is_told(checkpoint, name, message):
    (checkpoint / name).touch()
    with pytest.raises(InputError, match=message):
        locate(checkpoint / name)
