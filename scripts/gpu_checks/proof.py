"""What is proven, at what size, and how a finding becomes a row. N images, T tokens, D dim."""

from __future__ import annotations

import gc
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from lowrank_tune.features.checkpoint import find_tower, read_checkpoint_config
from lowrank_tune.features.encoder import Encoder
from lowrank_tune.features.tiny import TINY_PREPROCESSOR, TINY_VISION, WEIGHTS_MARK
from lowrank_tune.lowrank.data import batches_on
from lowrank_tune.lowrank.decomposers import Decomposer, make_decomposer
from lowrank_tune.lowrank.linalg import stream
from lowrank_tune.records import FeatureRow, FeatureSet, Split, TrialConfig

PUBLISHED = {
    "depth": 32,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "window_size": 112,
}
"""The tower of the 3B."""
PARAMS: dict[str, dict[str, float | str]] = {
    "direct": {"lambda_b": 1e-4, "lambda_ortho": 1e-3},
    "sketch": {},
    "refined": {"steps": 3},
    "shared": {"token_transform": "learned", "lambda_rate": 30.0},
}
SHARD = 64


@dataclass(frozen=True)
class Size:
    """Where and at what size everything is tried."""

    folder: Path  # for files, gone at the end
    device: str
    vision: dict[str, object]
    image_size: int
    tokens: int
    dim: int
    ranks: tuple[int, ...]
    batches: tuple[int, ...]
    encoded: int  # images that a forward is timed with
    trials: tuple[int, ...]  # trainings at once
    seconds: float  # for which a route is timed
    compiler: str  # torch.compile's backend

    @classmethod
    def of_gpu(cls, folder: Path) -> Size:
        """The true one: the 3B's tower and [256, 2048] features."""
        return cls(
            folder, "cuda", PUBLISHED, 448, 256, 2048, (16, 32, 64, 128), (1, 8, 64, 256), 32, (1, 4, 16), 1.5,
            "inductor",
        )  # fmt: skip

    @classmethod
    def of_twin(cls, folder: Path) -> Size:
        """A small one for the CPU."""
        return cls(folder, "cpu", TINY_VISION, 112, 100, 160, (12, 40), (1, 64), 2, (1,), 0.01, "eager")

    def encoder(self, compute_dtype: str, device: str, batch: int | None = None) -> Encoder:
        """A tower with seeded random weights; at the first call its checkpoint is written, in bfloat16."""
        directory = self.folder / "checkpoint"
        if not directory.exists():
            directory.mkdir()
            (directory / "preprocessor_config.json").write_text(json.dumps(TINY_PREPROCESSOR))
            config = {"model_type": "qwen2_5_vl", "vision_config": self.vision, WEIGHTS_MARK: "random"}
            (directory / "config.json").write_text(json.dumps(config))
            with torch.device("meta"):
                model = Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**self.vision))
            generator = torch.Generator(self.device).manual_seed(0)
            weights = {}
            for name, shape in ((name, weight.shape) for name, weight in model.state_dict().items()):
                # Small biases, and matrices that keep the scale of what passes through them.
                deviation = shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.02
                drawn = torch.randn(shape, generator=generator, device=self.device) * deviation
                of_norm = "norm" in name or "ln_q" in name
                weights[f"visual.{name}"] = (torch.ones(shape) if of_norm else drawn).to("cpu", torch.bfloat16)
            save_file(weights, directory / "model.safetensors")
        config = read_checkpoint_config(str(directory), self.folder)
        return Encoder(config, find_tower(config, self.folder), compute_dtype, device, batch)

    def pixels(self, images: int) -> npt.NDArray[np.uint8]:
        """Random images [N, H, W, 3]."""
        shape = (images, self.image_size, self.image_size, 3)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def features(self, images: int) -> Tensor:
        """Random features [N, T, D] on the CPU whose singular values fall as j^-0.8; a direction rules the first."""
        generator = stream(images, "features")
        sizes_T = torch.arange(1, self.tokens + 1) ** -0.8
        x_NTD = torch.randn(images, self.tokens, self.tokens, generator=generator) * sizes_T
        x_NTD = x_NTD @ torch.randn(images, self.tokens, self.dim, generator=generator)
        x_NTD[0] += 30 * torch.randn(self.dim, generator=generator)
        return x_NTD

    def stored(self, images: int) -> FeatureSet:
        """Such features as a cache keeps them, in float16."""
        directory = self.folder / f"cache-{images}"
        if not directory.exists():
            (directory / "shards").mkdir(parents=True)
            for start in range(0, images, SHARD):
                count = min(SHARD, images - start)
                save_file({"features": self.features(count).half()}, directory / f"shards/{start}.safetensors")
        rows = tuple(FeatureRow(f"{i:064x}", f"{i // SHARD * SHARD}.safetensors", i % SHARD) for i in range(images))
        return FeatureSet(str(directory), "0" * 16, "noise", "random", "float16", self.tokens, self.dim, rows, "")

    def trial(self, family: str, rank: int, **changes: object) -> TrialConfig:
        """A training of a family, by its validation error."""
        fields = {"lr": 1e-3, "weight_decay": 1e-5, "batch_size": 8, "epochs": 1, "patience": 9} | changes
        return TrialConfig("t", 0, 0, family, rank, family_params=PARAMS[family], objective="val_mse", **fields)

    def model(self, family: str, rank: int, x_NTD: Tensor) -> Decomposer:
        """A family's model on the CPU, as a training on these images begins."""
        model = make_decomposer(self.trial(family, rank), self.tokens, self.dim)
        model.initialise([x_NTD], stream(0, "initialise"))
        return model


def split(images: int) -> Split:
    """Three quarters train, the rest validates."""
    return Split(tuple(range(images * 3 // 4)), tuple(range(images * 3 // 4, images)), ())


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, in float64 on the CPU."""
    expected = expected.detach().double().cpu()
    return float(
        torch.linalg.vector_norm(found.detach().double().cpu() - expected) / torch.linalg.vector_norm(expected)
    )


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    measured: str
    wanted: str = ""  # a bound or a goal
    verdict: str = "measured"  # or holds, FAILS; met, not met of a goal; left out, does not work


def within(what: str, measured: float, most: float) -> Finding:
    """A figure that must be at most so much; NaN is more than anything."""
    return Finding(what, f"{measured:.2g}", f"≤ {most:g}", "holds" if measured <= most else "FAILS")


def at_least(what: str, measured: float, least: float, *, goal: bool = False) -> Finding:
    """A figure that must be, or of a goal should be, at least so much."""
    verdict = ("met", "not met") if goal else ("holds", "FAILS")
    return Finding(what, f"{measured:.6g}", f"≥ {least:g}", verdict[0] if measured >= least else verdict[1])


def same(what: str, pairs: Iterator[tuple[str, Tensor, Tensor]]) -> Finding:
    """Tensors that must be equal to the bit, wherever they lie."""
    others = [name for name, found, expected in pairs if not torch.equal(found.cpu(), expected.cpu())]
    return Finding(
        what, f"differ: {', '.join(others)}" if others else "equal", "equal bits", "FAILS" if others else "holds"
    )


@dataclass
class Proof:
    """The rows, and the time that is left for more."""

    until: float  # time.monotonic()
    rows: dict[str, list[Finding]] = field(default_factory=dict)

    def look(self, part: str, needs_s: float, check: Callable[[], Iterator[Finding]], name: str) -> None:
        """Keep what a check finds; one that raises has failed, and the others go on.

        A check begins only where the seconds that it may need are left, and ends with the time: of the numbers that is
        a failure, for they are not proven then.
        """
        rows, late = self.rows.setdefault(part, []), "FAILS" if part == "right" else "left out"
        left = self.until - time.monotonic()
        if left <= needs_s:
            rows.append(Finding(name, "no time was left for it", "", late))
            return
        signal.signal(signal.SIGALRM, _no_time)
        signal.setitimer(signal.ITIMER_REAL, left)
        try:
            for finding in check():
                rows.append(finding)
        except TimeoutError as error:
            rows.append(Finding(name, str(error), "", late))
        except Exception as error:  # whatever a machine that nobody has tried raises
            rows.append(Finding(name, reason_of(error), "to work", "FAILS"))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        forget()  # an exception holds what was allocated until here

    @property
    def failed(self) -> int:
        """How many rows did not hold."""
        return sum(row.verdict == "FAILS" for rows in self.rows.values() for row in rows)

    def markdown(self) -> str:
        """A table a part."""
        lines = []
        for part, rows in self.rows.items():
            lines += ["", f"### {part}", "", "| what | measured | wanted | |", "| --- | --- | --- | --- |"]
            cells = ([row.what, row.measured, row.wanted, row.verdict] for row in rows)
            lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells]
        return "\n".join(lines[1:])

    def json(self) -> dict[str, list[dict[str, str]]]:
        """The same for programs."""
        return {part: [asdict(row) for row in rows] for part, rows in self.rows.items()}


def _no_time(*_: object) -> None:
    raise TimeoutError("no time was left to end it")


def reason_of(error: Exception) -> str:
    """One line of what an error says."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def seconds_of(run: Callable[[], object], device: str, at_least_s: float) -> float:
    """What one run takes: the median of blocks of runs, warmed up; on a GPU by its own clock."""
    for _ in range(2):
        started = time.perf_counter()
        run()
        wait(device)
        once = time.perf_counter() - started
    if once > 1:
        return once
    in_block = max(1, math.ceil(min(0.02, at_least_s) / once))
    blocks, began = [], time.perf_counter()
    while len(blocks) < 3 or (time.perf_counter() - began < at_least_s and len(blocks) < 100):
        if device == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(in_block):
                run()
            last.record()
            last.synchronize()
            blocks.append(first.elapsed_time(last) / 1000 / in_block)
        else:
            started = time.perf_counter()
            for _ in range(in_block):
                run()
            blocks.append((time.perf_counter() - started) / in_block)
    return float(np.median(blocks))


def forget() -> None:
    """Give back a GPU's memory that nobody needs: features held for the next training, and what lies in cycles."""
    batches_on.cache_clear()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def wait(device: str) -> None:
    """Until a device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
