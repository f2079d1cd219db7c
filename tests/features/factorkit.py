"""An exported model that was never trained, and a directory of tensors that fits it."""

import json
from pathlib import Path

import torch

from lowrank_tune.lowrank.decomposers import make_decomposer, save_decomposer
from lowrank_tune.lowrank.pretrained import write_exported
from lowrank_tune.records import TrialConfig

TOKENS, DIM, RANK = 16, 48, 6
FEW = 70
IMAGES = 330


def write_model(
    folder: Path, rank: int = RANK, nested: tuple[int, ...] = (), seed: int = 1, family: str = "sketch"
) -> Path:
    params = {"token_transform": "dct", "lambda_rate": 100.0} if family == "shared" else {}
    config = TrialConfig(f"r006-{family}-0000", 0, seed, family, rank, 1e-3, 1e-5, 8, 3, 3, params, nested)
    model, generator = make_decomposer(config, TOKENS, DIM), torch.Generator().manual_seed(seed)
    if family == "shared":
        model.initialise([torch.randn(64, TOKENS, DIM, generator=generator)], generator)
    save_decomposer(model, folder.with_suffix(".safetensors"))
    write_exported(folder, folder.with_suffix(".safetensors"), rank, "study-0", config, None)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "lowrank_decomposer"
    return folder


def write_tensors(folder: Path, numbers: range, shape: tuple[int, int] = (TOKENS, DIM)) -> Path:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        torch.save(torch.randn(shape, generator=generator), folder / f"features_{number}.pt")
    return folder
