"""Checkpoints that a test reads and spoils."""

import json

from safetensors.numpy import load_file

from lowrank_tune.features.checkpoint import find_tower, read_checkpoint_config


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def locate(checkpoint):
    config = read_checkpoint_config(str(checkpoint), checkpoint.parent)
    return config, find_tower(config, checkpoint.parent)


def configure(checkpoint, **keys):
    edit_json(checkpoint / "config.json", lambda config: config.update(keys))


def tensors_of(checkpoint):
    return {
        key: value for path in sorted(checkpoint.glob("model*.safetensors")) for key, value in load_file(path).items()
    }
