"""How fast images become features: the forward beside transformers' own, and an extraction beside the bare forward.

    .venv/bin/python scripts/bench_features_extraction.py [--shards 6] [--seconds 8] [--peak-tflops 989]

Two minutes on two CPU cores, where the tower is a mid-size one; with a GPU it is the 3B's true size in bfloat16. The
weights are random and the images photographs. Every number comes from this one run: compare ratios, not machines.
Wanted: an extraction that has got going at >= 0.90 of the bare forward; on a GPU a forward >= 2 times transformers' own
with SDPA, and >= 220 images/s on an H100 or H200 (370 would be a triumph).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}

import numpy as np
import ray
import torch
from gpu_checks.fast import PEAK_TFLOPS, TERAFLOP_AN_IMAGE
from gpu_checks.proof import PUBLISHED, SHARD
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.features.checkpoint import find_tower, read_checkpoint_config
from lowrank_tune.features.encoder import Encoder
from lowrank_tune.features.extract import extract_features, plan_extraction
from lowrank_tune.features.shards import Node, Pool
from lowrank_tune.features.sources import read_records
from lowrank_tune.features.tiny import WEIGHTS_MARK, write_tiny_checkpoint

IMAGE_SIZE = 448
MID_SIZE = PUBLISHED | {
    "depth": 4,
    "fullatt_block_indexes": [3],
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_heads": 4,
}


@dataclass(frozen=True)
class Tower:
    """A tower to measure: where it lies and what it computes in."""

    checkpoint: Path
    compute_dtype: str
    device: str

    def load(self, batch: int | None = None) -> Encoder:
        """Load it as an extraction does."""
        config = read_checkpoint_config(str(self.checkpoint), self.checkpoint.parent)
        return Encoder(config, find_tower(config, self.checkpoint.parent), self.compute_dtype, self.device, batch)


def main() -> None:
    """Print what `bench_extraction` finds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=6, help="how many shards of 64 images are extracted")
    parser.add_argument("--seconds", type=float, default=8, help="how long each forward is measured")
    parser.add_argument("--peak-tflops", type=float, help="the GPU's, for the fraction of it")
    sizes = parser.parse_args()
    bench_extraction(sizes.shards, sizes.seconds, sizes.peak_tflops)


def bench_extraction(shards: int, seconds: float, peak_tflops: float | None) -> None:
    """Measure and print: the two forwards, then the extraction."""
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vision, dtype, device = (PUBLISHED, "bfloat16", "cuda") if on_gpu else (MID_SIZE, "float32", "cpu")
        tower = Tower(_write_checkpoint(folder / "checkpoint", vision), dtype, device)
        print(f"{_device_name(tower)}: hidden {vision['hidden_size']}, "
              f"depth {vision['depth']}, {dtype}, {IMAGE_SIZE}x{IMAGE_SIZE} pixels\n")  # fmt: skip
        _bench_forwards(tower, seconds, peak_tflops)
        _bench_pipeline(tower, folder, shards, seconds)


def _bench_forwards(tower: Tower, seconds: float, peak_tflops: float | None) -> None:
    torch.set_num_threads(1)
    quick, stock = tower.load(), tower.load()
    stock.model = _as_transformers_loads_it(tower)
    pixels_NHWC = _noise(32 if tower.device == "cuda" else 4).to(tower.device)
    routes: dict[str, Callable[[], Tensor]] = {
        "transformers, SDPA": lambda: stock.forward_as_stock(pixels_NHWC),
        "windows by reshape": lambda: quick.forward(pixels_NHWC),
    }
    rates = _take_turns(routes, len(pixels_NHWC), seconds)
    peak = peak_tflops or next((PEAK_TFLOPS[name] for name in PEAK_TFLOPS if name in _device_name(tower)), None)
    print(f"{'forward':<28}{'images/s':>10}{'ratio':>8}{'of peak FLOP/s':>16}")
    for name, rate in rates.items():
        share = f"{rate * TERAFLOP_AN_IMAGE / peak:.1%}" if peak else "-"
        print(f"{name:<28}{rate:>10.2f}{rate / rates['transformers, SDPA']:>8.2f}{share:>16}")
    with torch.inference_mode():
        stocks, quicks = (route().float() for route in routes.values())
    equal = "the same bits" if torch.equal(stocks, quicks) else "not the same bits"
    print(f"least token cosine between them {cosine_similarity(stocks, quicks, dim=-1).min():.6f}, {equal}")


def _as_transformers_loads_it(tower: Tower) -> Qwen2_5_VisionTransformerPretrainedModel:
    """The tower without what `Encoder` does to it on a GPU."""
    vision = json.loads((tower.checkpoint / "config.json").read_text())["vision_config"]
    model = Qwen2_5_VisionTransformerPretrainedModel(_config(vision))
    weights = load_file(tower.checkpoint / "model.safetensors")
    model.load_state_dict({name.removeprefix("visual."): weight for name, weight in weights.items()})
    return model.to(tower.device, getattr(torch, tower.compute_dtype)).eval()


def _bench_pipeline(tower: Tower, folder: Path, shards: int, seconds: float) -> None:
    encoder = {"checkpoint": str(tower.checkpoint), "image_size": IMAGE_SIZE, "compute_dtype": tower.compute_dtype}
    spec = FeaturesSpec.model_validate({"source": {"samples": shards * SHARD}, "encoder": encoder})
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    job = plan_extraction(spec, folder, read_records(spec.source, folder, 0))
    pool = job.pool(shards, [Node.of(node["Resources"]) for node in ray.nodes()])
    bare = [_bare_rate(tower, pool, seconds)]
    steady, first_s = _steady_rate(spec, folder)
    bare.append(_bare_rate(tower, pool, seconds))
    mean = sum(bare) / len(bare) * pool.most
    ray.shutdown()
    print(f"\n{pool}\n{'extraction':<28}{'images/s':>10}{'ratio':>8}")
    print(f"{'bare forward, before, after':<28}{' / '.join(f'{rate:.2f}' for rate in bare):>18}")
    print(f"{'extraction, steady':<28}{steady:>10.2f}{steady / mean:>8.2f}    first shard after {first_s:.1f} s")


def _bare_rate(tower: Tower, pool: Pool, seconds: float) -> float:
    """Images/s of one encoder process, shaped as the extraction's, that does nothing but forwards."""

    @ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus)
    def measure() -> float:
        torch.set_num_threads(pool.threads)
        encoder = tower.load(None)
        pixels_NHWC = _noise(pool.batch or (32 if tower.device == "cuda" else 4)).to(tower.device)
        return _take_turns({"bare": lambda: encoder.forward(pixels_NHWC)}, len(pixels_NHWC), seconds)["bare"]

    rate: float = ray.get(measure.remote())
    return rate


def _steady_rate(spec: FeaturesSpec, folder: Path) -> tuple[float, float]:
    """Images/s between an extraction's first shard and its last, and the seconds until the first."""
    told: list[tuple[float, int]] = []
    extract_features(spec, folder, seed=0, on_progress=lambda done, _: told.append((time.perf_counter(), done)))
    (began, _), (first, before), *_, (last, done) = told
    return (done - before) / (last - first), first - began


def _take_turns(routes: dict[str, Callable[[], object]], images: int, seconds: float) -> dict[str, float]:
    """Images/s by the median pass; routes take turns, so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in routes}
    began = time.perf_counter()
    with torch.inference_mode():
        for turn in range(10_000):
            for name, route in routes.items():
                started = time.perf_counter()
                route()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if turn > 0:  # the first pass warms up
                    times[name].append(time.perf_counter() - started)
            if turn > 2 and time.perf_counter() - began > seconds * len(routes):
                break
    return {name: images / float(np.median(values)) for name, values in times.items()}


def _write_checkpoint(directory: Path, vision: dict[str, object]) -> Path:
    """A checkpoint with a tower of random weights, in the hub's format."""
    tiny = write_tiny_checkpoint(directory.parent)
    directory.mkdir()
    (directory / "preprocessor_config.json").write_bytes((tiny / "preprocessor_config.json").read_bytes())
    config = {"model_type": "qwen2_5_vl", "vision_config": vision, WEIGHTS_MARK: "random"}
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    state = Qwen2_5_VisionTransformerPretrainedModel(_config(vision)).state_dict()
    dtype = torch.bfloat16 if vision is PUBLISHED else torch.float32
    save_file({f"visual.{name}": weight.to(dtype) for name, weight in state.items()}, directory / "model.safetensors")
    return directory


def _config(vision: dict[str, object]) -> Qwen2_5_VLVisionConfig:
    config = Qwen2_5_VLVisionConfig(**vision)
    config._attn_implementation = "sdpa"
    return config


def _noise(images: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (images, IMAGE_SIZE, IMAGE_SIZE, 3), generator=generator, dtype=torch.uint8)


def _device_name(tower: Tower) -> str:
    return torch.cuda.get_device_name() if tower.device == "cuda" else "no GPU here"


if __name__ == "__main__":
    main()
