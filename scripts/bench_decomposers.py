"""How near the trained decomposers come to the optimum, and how fast, beside the routes that need no training.

    .venv/bin/python scripts/bench_decomposers.py [--quick] [--skip-direct]

One CPU thread; ten minutes of its time, `--quick` two (two ranks, few images and epochs, of `direct` as well). Every
number comes from this one run: compare ratios, not machines. ρ is on images held out from training: exp(mean log ρ),
the median and the worst image's. Times are CPU seconds of one image [1, T, D] at a time, routes in turns, each one's
quickest run. `x rival` is the time of the quickest untrained route with no greater ρ (to four decimals) over a trained
one's. Wanted of refined: ρ at most 1.01, 1.02 for the worst image, `x rival` at least 0.91; an epoch at most a quarter
of direct's. `exact` is the SVD by its quickest exact form, float64 eigenvectors of the Gram matrix.

`photographs` are the sample photographs through the tiny encoder with random weights and 2048 outputs; `power law` is
synthetic, its flat cosine 0.992 at rank 128, the tokens' norms with log-sd 0.6; in the others singular values fall
evenly, exponentially, in six steps of a decade, or from one that dominates. `direct` is trained on the first two sets.
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
from lowrank_tune.lowrank.decomposers import Decomposer, Factors, make_decomposer
from lowrank_tune.lowrank.linalg import deflated_gram, principal_axes, stream
from lowrank_tune.lowrank.metrics import mean_ratio, measure, residual_ratio
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.lowrank.trainer import Trainer, initialise
from lowrank_tune.records import FeatureRow, FeatureSet, Split, TrialConfig

TOKENS, DIM, PATCHES = 256, 2048, 32
PARAMS: dict[str, dict[str, float]] = {
    "direct": {"lambda_b": 1e-4, "lambda_ortho": 1e-3},
    "sketch": {},
    "refined": {"steps": 3},
}
Route = Callable[[Tensor], Factors]


def main() -> None:
    """Print a table of each set, and what refined gave on all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two ranks, few images and epochs")
    parser.add_argument("--skip-direct", action="store_true", help="leave out what takes longest to train")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=150)
    ranks = [16, 128] if options.quick else [16, 32, 64, 128]
    train, validation, test = (16, 4, 8) if options.quick else (32, 8, 24)
    numbers = np.split(np.arange(train + validation + test), [train, train + validation])
    split = Split(*(tuple(part.tolist()) for part in numbers))
    summary = _table(f"refined at ranks {', '.join(map(str, ranks))}", "ρ", "worst", "ms", "x rival")
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in SETS.items():
            folder = Path(scratch) / name
            folder.mkdir()
            x_NTD = make(train + validation + test, folder)
            set_name = f"{name} [{x_NTD.shape[1]}, {x_NTD.shape[2]}]"
            families = [
                family
                for family in PARAMS
                if family != "direct" or (x_NTD.shape[1:] == (TOKENS, DIM) and not options.skip_direct)
            ]
            bench = _Bench(x_NTD, split, folder, 5 if options.quick else 20, families, ranks)
            table = _table(set_name, "rank", "ρ", "median", "worst", "ms", "x rival")
            told = []
            for rank in ranks:
                rows = bench.rows(rank, rounds=5 if options.quick else 15)
                for route, cells in rows.items():
                    table.add_row(route, str(rank), *cells)
                if "direct" in families:
                    table.add_row("an epoch, refined / direct", str(rank), "", "", "", f"{bench.epoch_ratio(rank):.2f}")
                table.add_section()
                told.append(rows["refined"])
            console.print(table)
            rho, _, worst, spent, rival = (", ".join(cells) for cells in zip(*told, strict=True))
            summary.add_row(set_name, rho, worst, spent, rival)
    console.print(summary)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    return table


class _Bench:
    """One set of features, on disk as training reads it, and what is trained on it.

    Args:
        x_NTD: the images.
        split: which of them train, steer and judge.
        folder: where to write them.
        epochs: the trainings' budget.
        families: what is trained at each of the ranks.
    """

    def __init__(
        self, x_NTD: Tensor, split: Split, folder: Path, epochs: int, families: Sequence[str], ranks: Sequence[int]
    ) -> None:
        self._split, self._epochs, self._families = split, epochs, families
        self._data = FeatureMatrix(_written(x_NTD, folder))
        self._test_NTD = self._data.load(split.test)
        self._optimum = measure_optimum(self._test_NTD.split(8))
        self._steering = measure_optimum(self._data.batches(split.validation, 8))
        self._axes_DR = principal_axes(self._data.batches(split.train, 8), ranks[-1], stream(0, "axes"))
        self._nested = self._trained("refined", ranks[-1], tuple(ranks))

    def rows(self, rank: int, rounds: int) -> dict[str, list[str]]:
        """The cells of every route at a rank: ρ, its median, its worst, ms an image, and of trained ones `x rival`."""
        untrained = _rivals(rank) | _controls(rank, self._axes_DR)
        trained: dict[str, Route] = {family: self._trained(family, rank) for family in self._families}
        trained["nested refined"] = partial(self._nested, rank=rank)
        starts = {f"{family}, before training": self._untrained(family, rank) for family in self._families}
        routes = untrained | starts | trained
        seconds = self._seconds(routes, rounds)
        rows = {}
        for name, decompose in routes.items():
            ratio_N = self._ratios(decompose, rank)
            figures = [mean_ratio(ratio_N), ratio_N.median().item(), ratio_N.max().item()]
            rows[name] = [*(f"{figure:.4f}" for figure in figures), f"{seconds[name] * 1e3:.2f}", ""]
        for name in trained:
            best = min(seconds[other] for other in untrained if float(rows[other][0]) <= float(rows[name][0]))
            rows[name][-1] = f"{best / seconds[name]:.2f}"
        return rows

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

    def _trained(self, family: str, rank: int, nested: tuple[int, ...] = ()) -> Decomposer:
        trainer = Trainer(self._config(family, rank, nested), self._data, self._split, self._steering)
        while trainer.stopped_by is None:
            trainer.step()
        return trainer.best_model.eval()

    def _untrained(self, family: str, rank: int) -> Decomposer:
        """What a training starts from."""
        config = self._config(family, rank)
        model = make_decomposer(config, self._data.tokens, self._data.dim).eval()
        initialise(model, config, self._data.load, self._split.train, config.batch_size)
        return model

    @torch.inference_mode()
    def _seconds(self, routes: Mapping[str, Route], rounds: int) -> dict[str, float]:
        """Take turns; CPU time and each route's quickest run count, for others use the machine."""
        seconds = dict.fromkeys(routes, math.inf)
        for number in range(rounds):
            x_NTD = self._test_NTD[number % len(self._test_NTD)][None]
            for name, decompose in routes.items():
                for _ in range(1 if name == "torch.linalg.svd" else 3):
                    began = time.process_time()
                    decompose(x_NTD)
                    seconds[name] = min(seconds[name], time.process_time() - began)
        return seconds

    @torch.inference_mode()
    def _ratios(self, decompose: Route, rank: int) -> Tensor:
        parts = [measure(part, *decompose(part)).residual_N for part in self._test_NTD.split(8)]
        return residual_ratio(torch.cat(parts), self._optimum.residual_NR[:, rank - 1], self._optimum.energy_N)

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


def _rivals(rank: int) -> dict[str, Route]:
    """What one would otherwise call, each giving A and B for one image [1, T, D]."""

    def svd(x_NTD: Tensor) -> Factors:
        u, s, v = torch.linalg.svd(x_NTD, full_matrices=False)
        return Factors(u[..., :rank] * s[:, None, :rank], v[:, :rank])

    def partial_eigh(x_NTD: Tensor) -> Factors:
        """LAPACK's eigensolver for the leading eigenvectors alone."""
        left = deflated_gram(x_NTD, rank, torch.randn(x_NTD.shape[-1], generator=stream(0, "partial")))
        first = x_NTD.shape[-2] - rank
        found = [eigh(each.numpy(), subset_by_index=(first, first + rank - 1))[1] for each in left.gram_NTT]
        return baselines.project(x_NTD, left.complete(torch.from_numpy(np.stack(found)).flip(-1)))

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
    }


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


def _power_law(images: int, _: Path) -> Tensor:
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


def _falling(tokens: int, dim: int, values: Callable[[Tensor], Tensor]) -> Callable[[int, Path], Tensor]:
    """Images whose singular values are a function of their place in [0, 1), token norms with log-sd 0.4, as float16."""

    def make(images: int, _: Path) -> Tensor:
        count = min(tokens, dim)
        sigma_K = values(torch.arange(count) / count)

        def image(generator: torch.Generator) -> Tensor:
            own_KD = torch.linalg.qr(torch.randn(dim, count, generator=generator)).Q.mT
            mixing_TK = torch.linalg.qr(torch.randn(tokens, count, generator=generator)).Q
            norms_T1 = torch.exp(0.4 * torch.randn(tokens, 1, generator=generator))
            return ((mixing_TK * sigma_K) @ own_KD * norms_T1).half()

        return torch.stack([image(stream(seed, "image")) for seed in range(images)])

    return make


SETS: dict[str, Callable[[int, Path], Tensor]] = {
    "photographs": _photographs,
    "power law": _power_law,
    "even": _falling(256, 1024, lambda place: 1 - 0.8 * place),
    "exponential": _falling(160, 3584, lambda place: torch.exp(-8 * place)),
    "stepped": _falling(400, 588, lambda place: 10 ** -(6 * place).floor()),
    "dominated": _falling(576, 1280, lambda place: torch.where(place > 0, (1 + 576 * place) ** -0.7, 300.0)),
}


def _written(x_NTD: Tensor, folder: Path) -> FeatureSet:
    (folder / "shards").mkdir(parents=True)
    save_file({"features": x_NTD.contiguous()}, folder / "shards" / "00000.safetensors")
    rows = tuple(FeatureRow(f"{number:064x}", "00000.safetensors", number) for number in range(len(x_NTD)))
    return FeatureSet(directory=str(folder), fingerprint="0" * 16, encoder="bench", weights="random",
                      dtype=str(x_NTD.dtype).removeprefix("torch."), tokens=x_NTD.shape[1], dim=x_NTD.shape[2],
                      rows=rows, records_path="")  # fmt: skip


if __name__ == "__main__":
    main()
