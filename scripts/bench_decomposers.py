"""How near the trained decomposers come to the optimum, and how fast, beside the routes that need no training.

    .venv/bin/python scripts/bench_decomposers.py [--quick] [--skip-direct]

One CPU thread; about seven minutes, `--quick` one (two ranks, few images and epochs). Every number comes from this one
run: compare ratios, not machines. ρ is on images held out from training: exp(mean log ρ), the median and the worst
image's. Wanted: refined at most 1.01, 1.02 for the worst image, and at most 10 % slower than the quickest untrained
route that is as near; an epoch of refined at most a quarter of direct's. `exact` is the SVD by its quickest exact form,
float64 eigenvectors of the Gram matrix.

Features of [256, 2048]: `photographs` are the sample photographs through the tiny encoder with random weights and 2048
outputs; `power law` is synthetic, its flat cosine 0.992 at rank 128, the tokens' norms with log-sd 0.6.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

# numpy's and torch's BLAS read it when imported.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from scipy.linalg import eigh
from sklearn.utils.extmath import randomized_svd
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from lowrank_tune.features.sources import write_samples
from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Factors, make_decomposer
from lowrank_tune.lowrank.linalg import gram, principal_axes, stream
from lowrank_tune.lowrank.metrics import mean_ratio, measure, residual_ratio
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.lowrank.trainer import Trainer
from lowrank_tune.records import FeatureRow, FeatureSet, Split, TrialConfig

TOKENS, DIM, PATCHES = 256, 2048, 32
REACHED = 1.02
PARAMS: dict[str, dict[str, float]] = {
    "direct": {"lambda_b": 1e-4, "lambda_ortho": 1e-3},
    "sketch": {},
    "refined": {"steps": 3},
}
Route = Callable[[Tensor], Factors]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two ranks, few images and epochs")
    parser.add_argument("--skip-direct", action="store_true", help="leave out what takes longest to train")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks = [16, 128] if options.quick else [16, 32, 64, 128]
    train, validation, test = (16, 4, 8) if options.quick else (32, 8, 24)
    split = Split(
        *(tuple(part) for part in np.split(np.arange(train + validation + test), [train, train + validation]))
    )
    table = Table(title=f"[{TOKENS}, {DIM}], one CPU thread", title_justify="left")
    for column in ("", "rank", "ρ", "median", "worst", "ms an image", "x exact", "x best rival"):
        table.add_column(column, justify="left" if not column else "right")
    with tempfile.TemporaryDirectory() as folder:
        sets = {"photographs": _photographs(len(split.train + split.validation + split.test), Path(folder)),
                "power law": _power_law(len(split.train + split.validation + split.test))}  # fmt: skip
        models: dict[str, Trainer] = {}
        for name, x_NTD in sets.items():
            bench = _Bench(x_NTD, split, Path(folder) / name.replace(" ", "-"), epochs=5 if options.quick else 20)
            table.add_section()
            for family in ("sketch", "refined") if options.skip_direct else PARAMS:
                for rank in ranks:
                    models[f"{family} {rank}"] = bench.train(family, rank)
            models["nested"] = bench.train("refined", ranks[-1], tuple(ranks))
            for rank in ranks:
                routes = _controls(rank, bench.axes_DR) | {
                    family: models[f"{family} {rank}"].best_model for family in PARAMS if f"{family} {rank}" in models
                }
                routes["nested refined"] = partial(models["nested"].best_model, rank=rank)
                routes["refined, before training"] = bench.untrained("refined", rank)
                for route, decompose in routes.items():
                    table.add_row(f"{name}: {route}", str(rank), *bench.quality(decompose, rank))
        speeds = _speeds(bench, models, [rank for rank in ranks if rank != 32], rounds=5 if options.quick else 15)
        for row in speeds:
            table.add_section() if row[0] == "exact" else None
            table.add_row(*row)
        if not options.skip_direct:
            table.add_section()
            for rank in ranks:
                table.add_row("an epoch, refined / direct", str(rank), "", "", f"{bench.epoch_ratio(rank):.2f} of it")
    Console(width=110).print(table)


class _Bench:
    """One set of features, on disk as training reads it.

    Args:
        x_NTD: the images.
        split: which of them train, steer and judge.
        folder: where to write them.
        epochs: the trainings' budget.
    """

    def __init__(self, x_NTD: Tensor, split: Split, folder: Path, epochs: int) -> None:
        self._split, self._epochs = split, epochs
        self._data = FeatureMatrix(_written(x_NTD, folder))
        self.test_NTD = self._data.load(split.test)
        self._optimum = measure_optimum(self.test_NTD.split(8))
        self._steering = measure_optimum(self._data.batches(split.validation, 8))
        self.axes_DR = principal_axes(self._data.batches(split.train, 8), 128, stream(0, "axes"))

    def train(self, family: str, rank: int, nested: tuple[int, ...] = ()) -> Trainer:
        trainer = Trainer(self._config(family, rank, nested), self._data, self._split, self._steering)
        while trainer.stopped_by is None:
            trainer.step()
        trainer.best_model.eval()
        return trainer

    def untrained(self, family: str, rank: int) -> Route:
        """What a training starts from."""
        return make_decomposer(self._config(family, rank), TOKENS, DIM).eval()

    def quality(self, decompose: Route, rank: int, images: int | None = None) -> tuple[str, str, str]:
        """exp(mean log ρ), the median and the worst over the first test images."""
        ratio_N = self._ratios(decompose, self.test_NTD[:images], rank)
        return f"{mean_ratio(ratio_N):.4f}", f"{ratio_N.median():.4f}", f"{ratio_N.max():.3f}"

    @torch.inference_mode()
    def _ratios(self, decompose: Route, x_NTD: Tensor, rank: int) -> Tensor:
        residual_N = torch.cat([measure(part, *decompose(part)).residual_N for part in x_NTD.split(8)])
        return residual_ratio(residual_N, self._optimum.residual_NR[: len(x_NTD), rank - 1], self._energy(len(x_NTD)))

    def _energy(self, images: int) -> Tensor:
        return self._optimum.energy_N[:images]

    def epoch_ratio(self, rank: int) -> float:
        """An epoch of refined over one of direct, each the quickest after its first, with one validation image."""
        split = Split(self._split.train, self._split.validation[:1], self._split.test)
        optimum = measure_optimum([self._data.load(split.validation)])
        trainers = [Trainer(self._config(family, rank), self._data, split, optimum) for family in ("refined", "direct")]
        for trainer in trainers:
            trainer.step()
        # In turns, for others use the machine.
        refined, direct = zip(*((trainer.step()["seconds"] for trainer in trainers) for _ in range(4)), strict=True)
        return min(refined) / min(direct)

    def _config(self, family: str, rank: int, nested: tuple[int, ...] = ()) -> TrialConfig:
        return TrialConfig(trial_id=f"r{rank:03d}-{family}-0000", number=0, seed=0, family=family, rank=rank, lr=1e-3,
                           weight_decay=1e-5, batch_size=8, epochs=self._epochs, patience=10,
                           family_params=PARAMS[family], nested_ranks=nested)  # fmt: skip


def _controls(rank: int, axes_DR: Tensor) -> dict[str, Route]:
    return {
        "random_sketch": lambda x: baselines.random_sketch(x, rank, stream(0, "sketch")),
        "pca_basis": partial(baselines.pca_basis, rank=rank, axes_DR=axes_DR),
        "power_1": lambda x: baselines.power_1(x, rank, stream(0, "power")),
        "randomized_svd": lambda x: baselines.randomized_svd(x, rank, stream(0, "randomized")),
        "gram_eigh": lambda x: baselines.gram_eigh(x, rank, stream(0, "eigh")),
    }


def _rivals(rank: int) -> Mapping[str, Route]:
    """What one would otherwise call, each giving A and B for one image [1, T, D]."""

    def svd(x_NTD: Tensor) -> Factors:
        u, s, v = torch.linalg.svd(x_NTD, full_matrices=False)
        return Factors(u[..., :rank] * s[:, None, :rank], v[:, :rank])

    def partial_eigh(x_NTD: Tensor) -> Factors:
        """LAPACK's eigensolver for the leading eigenvectors alone."""
        tokens = x_NTD.shape[-2]
        vectors = [eigh(each.numpy(), subset_by_index=(tokens - rank, tokens - 1))[1] for each in gram(x_NTD)]
        return baselines.project(x_NTD, torch.from_numpy(np.stack(vectors)))

    def lowrank(x_NTD: Tensor) -> Factors:
        u, s, v = torch.svd_lowrank(x_NTD, q=rank)
        return Factors(u * s[:, None], v.mT)

    def scikit(x_NTD: Tensor) -> Factors:
        parts = [randomized_svd(x_TD.numpy(), rank, random_state=0) for x_TD in x_NTD]
        return Factors(
            *(torch.from_numpy(np.stack(part)) for part in zip(*((u * s, v) for u, s, v in parts), strict=True))
        )

    return {
        "exact": partial(baselines.svd, rank=rank),
        "torch.linalg.svd": svd,
        "Gram + LAPACK's partial eigh": partial_eigh,
        "svd_lowrank": lowrank,
        "scikit-learn randomized_svd": scikit,
        "control randomized_svd": lambda x: baselines.randomized_svd(x, rank, stream(0, "randomized")),
        "control gram_eigh": lambda x: baselines.gram_eigh(x, rank, stream(0, "eigh")),
    }


def _speeds(bench: _Bench, models: Mapping[str, Trainer], ranks: Sequence[int], rounds: int) -> list[list[str]]:
    """One row a route and rank; routes take turns, and each one's quickest time counts, for others use the machine."""
    rows = []
    for rank in ranks:
        routes = {**_rivals(rank), "refined": models[f"refined {rank}"].best_model}
        routes["nested refined"] = partial(models["nested"].best_model, rank=rank)
        seconds = dict.fromkeys(routes, math.inf)
        with torch.inference_mode():
            for number in range(rounds):
                x_NTD = bench.test_NTD[number % len(bench.test_NTD)][None]
                for name, decompose in routes.items():
                    for _ in range(1 if name == "torch.linalg.svd" else 3):
                        began = time.perf_counter()
                        decompose(x_NTD)
                        seconds[name] = min(seconds[name], time.perf_counter() - began)
        quality = {name: bench.quality(decompose, rank, 8) for name, decompose in routes.items()}
        best = min(seconds[name] for name in _rivals(rank) if float(quality[name][0]) <= REACHED)
        rows += [
            [
                name,
                str(rank),
                *quality[name],
                f"{spent * 1e3:.2f}",
                f"{seconds['exact'] / spent:.1f}",
                f"{best / spent:.2f}",
            ]
            for name, spent in seconds.items()
        ]
    return rows


def _photographs(images: int, folder: Path) -> Tensor:
    """The sample crops through a vision tower as small as the tiny checkpoint's, with random weights, as float16."""
    config = Qwen2_5_VLVisionConfig(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=DIM,
                                    fullatt_block_indexes=[1])  # fmt: skip
    tower = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
            elif "norm" not in name and "ln_q" not in name:
                weight.normal_(0, 0.02, generator=generator)
        grid = torch.tensor([[1, PATCHES, PATCHES]])
        paths = [path for path, _ in write_samples(images, 0, folder / "samples")]
        return torch.stack([tower(_patches(path), grid_thw=grid).pooler_output for path in paths]).half()


def _patches(path: Path) -> Tensor:
    """One image as the tower's patches, 2x2 neighbours next to each other [PATCHES², 3·2·14·14]."""
    image = Image.open(path).convert("RGB").resize((14 * PATCHES, 14 * PATCHES), Image.Resampling.BICUBIC)
    pixels = (torch.from_numpy(np.asarray(image).copy()) / 255 - torch.tensor([0.481, 0.458, 0.408])) / 0.27
    cells = pixels.permute(2, 0, 1).view(3, PATCHES // 2, 2, 14, PATCHES // 2, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)
    return cells[..., None, :, :].expand(*cells.shape[:5], 2, 14, 14).reshape(PATCHES**2, -1)


def _power_law(images: int) -> Tensor:
    """Images whose spectrum falls as a power, half of its axes' energy common to all, token norms with log-sd 0.6."""
    common = torch.linalg.qr(torch.randn(DIM, TOKENS, generator=stream(0, "axes"))).Q.mT

    def image(decay: float, seed: int) -> Tensor:
        generator = stream(seed, "image")
        own = torch.linalg.qr(torch.randn(DIM, TOKENS, generator=generator)).Q.mT
        mixing = torch.linalg.qr(torch.randn(TOKENS, TOKENS, generator=generator)).Q
        sigma = torch.arange(1, TOKENS + 1).pow(-decay)[:, None]
        x_TD = mixing @ (sigma * (common + own) / math.sqrt(2))
        norms_T1 = torch.exp(0.6 * torch.randn(TOKENS, 1, generator=generator))
        return x_TD / torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True) * norms_T1

    low, high = 0.0, 3.0
    for _ in range(12):
        decay = (low + high) / 2
        reached = measure_optimum([image(decay, 0)[None]]).at(128).flat_cosine_N.item()
        low, high = (decay, high) if reached < 0.992 else (low, decay)
    return torch.stack([image(high, seed) for seed in range(1, images + 1)])


def _written(x_NTD: Tensor, folder: Path) -> FeatureSet:
    (folder / "shards").mkdir(parents=True)
    save_file({"features": x_NTD.contiguous()}, folder / "shards" / "00000.safetensors")
    rows = tuple(FeatureRow(f"{number:064x}", "00000.safetensors", number) for number in range(len(x_NTD)))
    return FeatureSet(directory=str(folder), fingerprint="0" * 16, encoder="bench", weights="random",
                      dtype=str(x_NTD.dtype).removeprefix("torch."), tokens=TOKENS, dim=DIM, rows=rows,
                      records_path="")  # fmt: skip


if __name__ == "__main__":
    main()
