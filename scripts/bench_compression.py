"""Bytes against error on features of [256, 2048]: factors in few bits beside X itself in few bits, and the int8 models.

    .venv/bin/python scripts/bench_compression.py [--images 16]

One CPU thread, about two minutes; two feature sets of bench_decomposers.py. The figures are the comparison's own, of
models as they start (`refined` learns a thousandth beyond its start, `sketch` starts at other images' principal axes).
Below them, what the storage of factors was chosen by: the relative error with a scale a component or a token, in the
SVD's own form or in columns that a random matrix has mixed; and what this part of the comparison takes beside the rest.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# numpy's and torch's BLAS read it when imported.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from bench_decomposers import PARAMS, SETS, _written
from torch import Tensor

from lowrank_tune.comparison import compare as room
from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Factors, make_decomposer, save_decomposer
from lowrank_tune.lowrank.linalg import stream
from lowrank_tune.lowrank.quantization import ordered, restored
from lowrank_tune.records import Comparison, FeatureSet, Split, TrialConfig, TrialOutcome

RANKS = (64, 128)


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help="images that judge; as many others fit the sketch")
    images = parser.parse_args().images
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("photographs", "power law"):
            folder = Path(scratch) / name
            folder.mkdir()
            x_NTD = SETS[name](2 * images, folder)
            features = _written(x_NTD, folder)
            _compared(name, features, images, folder)
            _choices(x_NTD[images : images + 4].float())


def _compared(name: str, features: FeatureSet, images: int, folder: Path) -> None:
    split = Split(tuple(range(images)), (), tuple(range(images, 2 * images)))
    outcomes = [_saved(family, rank, features, split, folder) for family in ("sketch", "refined") for rank in RANKS]
    with _timed("score", "measure_compression") as seconds:
        (folder / "study").mkdir()
        comparison = room.compare(
            features, split, outcomes, objective="val_residual_ratio", seed=0, directory=folder / "study"
        )
    print(f"\n{name}: {images} images of [{features.tokens}, {features.dim}]\n")
    _print(comparison)
    print(
        f"\n  seconds: the figures of every method {seconds['score']:.1f}, bytes against error "
        f"{seconds['measure_compression']:.1f} (torchao's import in it, the first time)"
    )


def _saved(family: str, rank: int, features: FeatureSet, split: Split, folder: Path) -> TrialOutcome:
    config = TrialConfig(f"{family}-{rank}", 0, 0, family, rank, 1e-3, 0.0, 8, 1, 1, PARAMS[family])
    model = make_decomposer(config, features.tokens, features.dim)
    model.initialise(FeatureMatrix(features).batches(split.train, 8), stream(0, "start"))
    directory = folder / config.trial_id
    directory.mkdir()
    save_decomposer(model, directory / "best_model.safetensors")
    best = {"val_residual_ratio": 1.0 if family == "refined" else 2.0}  # whose factors are told in few bits
    return TrialOutcome(config, "finished", "budget", 1, 1, best, str(directory), 0.0)


def _print(comparison: Comparison) -> None:
    for row in comparison.compression.stored:
        print(
            f"  {row.method:<8} {row.rank or '':>4} {row.dtype:<8}{row.bytes_per_image / 1024:>9.1f} KiB"
            f"{row.relative_error_mean:>9.2%}"
        )
    for row in comparison.compression.models:
        print(
            f"  model {row.method} {row.rank}: {row.model_bytes / 1024:.1f} -> {row.quantised_bytes / 1024:.1f} KiB, "
            f"error {row.relative_error_mean:.4%} -> {row.quantised_relative_error_mean:.4%}"
        )
    for sentence in comparison.compression.words:
        print(f"  {sentence}")


def _choices(x_NTD: Tensor) -> None:
    print("\n  relative error   scale a component   scale a token   components mixed")
    generator = torch.Generator().manual_seed(0)
    for rank in RANKS:
        best = baselines.svd(x_NTD, rank)
        a_NTR, b_NRD = ordered(best)
        mix_RR = torch.randn(rank, rank, generator=generator)
        mixed = Factors(best.a_NTR @ mix_RR, torch.linalg.solve(mix_RR, best.b_NRD))
        for dtype in ("int8", "int4"):
            b = restored(b_NRD, dtype)
            errors = [
                _error(x_NTD, restored(a_NTR.mT, dtype).mT @ b),
                _error(x_NTD, restored(a_NTR, dtype) @ b),
                _error(x_NTD, restored(mixed.a_NTR.mT, dtype).mT @ restored(mixed.b_NRD, dtype)),
            ]
            print(f"  rank {rank}, {dtype:<5}" + "".join(f"{error:>17.2%}" for error in errors))


def _error(x_NTD: Tensor, y_NTD: Tensor) -> float:
    ratio_N = torch.linalg.vector_norm(x_NTD - y_NTD, dim=(1, 2)) / torch.linalg.vector_norm(x_NTD, dim=(1, 2))
    return ratio_N.mean().item()


@contextmanager
def _timed(*names: str) -> Iterator[dict[str, float]]:
    """Time some steps of the comparison where they stand."""
    seconds: dict[str, float] = {}
    steps = {name: getattr(room, name) for name in names}

    def timed(name: str) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            started = time.process_time()
            result = steps[name](*arguments)
            seconds[name] = time.process_time() - started
            return result

        return run

    for name in names:
        setattr(room, name, timed(name))
    try:
        yield seconds
    finally:
        for name, step in steps.items():
            setattr(room, name, step)


if __name__ == "__main__":
    main()
