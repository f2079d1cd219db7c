"""What `apply` costs beside a bare loop, and how many bytes an image's factors take.

    .venv/bin/python scripts/bench_apply.py [IMAGES]

An untrained `refined` of rank 64 on random features [256, 2048] (its time does not depend on training). The bare loop
decomposes the mapped cache in batches of 16 on one thread of one process and writes nothing; `apply` adds Ray Data, the
packing, checksums and durable writes, on all cores; its seconds hold the start of its actors, each of which imports
torch. Ray itself runs already.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import ray
import torch
from rich.console import Console
from rich.table import Table

from lowrank_tune import apply_decomposer, load_decomposer, open_features
from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.features.extract import extract_features
from lowrank_tune.lowrank.decomposers import make_decomposer, save_decomposer
from lowrank_tune.lowrank.pretrained import write_exported
from lowrank_tune.lowrank.quantization import factor_bytes
from lowrank_tune.records import TrialConfig

TOKENS, DIM, RANK, BATCH = 256, 2048, 64, 16


def prepare(home: Path, images: int) -> tuple[Path, str]:
    """Write a model and a cache of features whose spectrum falls as a power.

    Returns:
        The model's folder and the cache's.
    """
    config = TrialConfig("r064-refined-0000", 0, 0, "refined", RANK, 1e-3, 1e-5, 8, 1, 1, {"steps": 2})
    save_decomposer(make_decomposer(config, TOKENS, DIM), home / "weights.safetensors")
    model = home / "model"
    write_exported(model, home / "weights.safetensors", RANK, "bench", config, None)
    tensors = home / "tensors"
    tensors.mkdir()
    generator = torch.Generator().manual_seed(0)
    fall = torch.arange(1, TOKENS + 1).pow(-0.7)
    for number in range(images):
        left = torch.randn(TOKENS, TOKENS, generator=generator) * fall
        x_TD = left @ torch.randn(TOKENS, DIM, generator=generator)
        torch.save(x_TD.half(), tensors / f"features_{number}.pt")
    spec = FeaturesSpec.model_validate({"source": {"tensors": str(tensors)}})
    return model, extract_features(spec, home / "features", seed=0).directory


def bare(model: Path, cache: str) -> float:
    """Seconds of the loop."""
    torch.set_num_threads(1)
    decomposer, features = load_decomposer(model), open_features(cache)
    with torch.inference_mode():
        decomposer(features.load(range(2)))
        started = time.perf_counter()
        for x_NTD in features.batches(range(len(features)), BATCH):
            decomposer(x_NTD)
    return time.perf_counter() - started


def applied(model: Path, cache: str, out: Path, dtype: str) -> float:
    """Seconds of one application, its actors' start included."""
    started = time.perf_counter()
    apply_decomposer(model, cache, out, store_dtype=dtype)
    return time.perf_counter() - started


def main() -> None:
    """Print the table."""
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    table = Table(title=f"{images} images of [{TOKENS}, {DIM}], refined at rank {RANK}")
    for name in ("", "seconds", "images/s", "bytes an image"):
        table.add_column(name, justify="right" if name else "left")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
        model, cache = prepare(home, images)
        seconds = bare(model, cache)
        table.add_row("bare loop, one thread", f"{seconds:.1f}", f"{images / seconds:.1f}", "")
        for dtype in ("float16", "int8", "int4"):
            seconds = applied(model, cache, home / dtype, dtype)
            size = factor_bytes(TOKENS, DIM, RANK, dtype)
            table.add_row(f"apply --dtype {dtype}", f"{seconds:.1f}", f"{images / seconds:.1f}", f"{size:,}")
        ray.shutdown()
    Console().print(table)


if __name__ == "__main__":
    main()
