"""An exported model that was never trained, and a directory of tensors that fits it."""

import json
from pathlib import Path

import torch

from lowrank_tune.lowrank.decomposers import make_decomposer, save_decomposer
from lowrank_tune.lowrank.pretrained import write_exported
from lowrank_tune.records import TrialConfig

TOKENS, DIM, RANK = 16, 48, 6
IMAGES = 330


def write_model(folder: Path, rank: int = RANK, nested: tuple[int, ...] = (), seed: int = 1) -> Path:
    config = TrialConfig("r006-sketch-0000", 0, seed, "sketch", rank, 1e-3, 1e-5, 8, 3, 3, {}, nested)
    save_decomposer(make_decomposer(config, TOKENS, DIM), folder.with_suffix(".safetensors"))
    write_exported(folder, folder.with_suffix(".safetensors"), rank, "study-0", config, None)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "lowrank_decomposer"
    return folder


def write_tensors(folder: Path, numbers: range, shape: tuple[int, int] = (TOKENS, DIM)) -> Path:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        torch.save(torch.randn(shape, generator=generator), folder / f"features_{number}.pt")
    return folder
