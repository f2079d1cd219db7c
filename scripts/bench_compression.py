"""Bytes against error: factors in few bits beside X itself, the int8 models, and what learning a data set is worth.

    .venv/bin/python scripts/bench_compression.py [--images 16]
    .venv/bin/python scripts/bench_compression.py --trained DIR [--sets vit-last resnet]

One CPU thread, about two minutes; two feature sets of bench_decomposers.py. The figures are the comparison's own, of
models as they start (`refined` learns a thousandth beyond its start, `sketch` starts at other images' principal axes).
Below them, what the storage of factors was chosen by: the relative error with a scale a component or a token, in the
SVD's own form or in columns that a random matrix has mixed; and what this part of the comparison takes beside the rest.

With `--trained`, `shared` on features of trained networks, of photographs or topics held out, about twenty minutes a
set; DIR keeps the sets of trained_features.py. A third of the groups is held out, a sixth validates. For each target a
model is trained by the product's own trainer, at a weight that suits the target, and kept where the validation images
take the fewest bytes. Told are real streams:

- KiB an image at 1, 5 and 14 % error of the model as it starts (KLT, DCT, fitted scales) and after training, with the
  saving and its 95 % interval over held-out groups;
- X in uniform steps and the SVD's factors by the same coder, at the same errors;
- at the error of int8, int5 and int4 of the same image's X, the bytes over theirs;
- images/s of one CPU thread, coding and back, and the streams' bytes over what their tables' chances make ideal.
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

import numpy as np
import torch
from bench_decomposers import PARAMS, SETS, _written
from scipy.special import stdtrit
from torch import Tensor
from trained_features import TrainedSet, trained_sets

from lowrank_tune.comparison import compare as room
from lowrank_tune.comparison.codecs import FactorBooks, Seen, coded_itself
from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.codebooks import make_codebook
from lowrank_tune.lowrank.coding import Codebook, UnreachableError
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Factors, make_decomposer, save_decomposer
from lowrank_tune.lowrank.decomposers.shared import Shared
from lowrank_tune.lowrank.linalg import stream
from lowrank_tune.lowrank.quantization import ordered, packed_bytes, restored
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.lowrank.trainer import Trainer, initialise
from lowrank_tune.measured import Comparison
from lowrank_tune.records import FeatureSet, Split, TrialConfig, TrialOutcome

RANKS = (64, 128)
HELD_OUT = 30
"""Images of trained networks' features that are coded, spread over the groups held out."""
WEIGHTS = {0.01: 150.0, 0.05: 30.0, 0.14: 8.0}
"""lambda_rate by target: about where a bit more lowers the error by as much as the loss gains."""


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help="images that judge; as many others fit the sketch")
    parser.add_argument("--trained", type=Path, metavar="DIR", help="measure `shared` on features of trained networks")
    parser.add_argument("--sets", nargs="*", help="names of such sets; all by default")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    given = parser.parse_args()
    images = given.images
    torch.set_num_threads(1)
    if given.trained:
        for each in trained_sets(given.trained, names=given.sets or ()):
            _learned(each, given)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("photographs", "power law"):
            folder = Path(scratch) / name
            folder.mkdir()
            x_NTD = SETS[name](2 * images, folder)
            features = _written(x_NTD, folder)
            _compared(name, features, images, folder)
            _choices(x_NTD[images : images + 4].float())
            _coder(x_NTD[:images].float(), x_NTD[images : images + 8].float())


def _compared(name: str, features: FeatureSet, images: int, folder: Path) -> None:
    split = Split(tuple(range(images)), (), tuple(range(images, 2 * images)))
    outcomes = [_saved(family, rank, features, split, folder) for family in ("sketch", "refined") for rank in RANKS]
    with _timed("score", "measure_compression", "measure_rates") as seconds:
        (folder / "study").mkdir()
        comparison = room.compare(
            features, split, outcomes, objective="val_residual_ratio", seed=0, directory=folder / "study"
        )
    print(f"\n{name}: {images} images of [{features.tokens}, {features.dim}]\n")
    _print(comparison)
    print(
        f"\n  seconds: the figures of every method {seconds['score']:.1f}, bytes against error "
        f"{seconds['measure_compression']:.1f} (torchao's import in it, the first time), "
        f"real streams {seconds['measure_rates']:.1f}"
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


def _coder(train_NTD: Tensor, x_NTD: Tensor) -> None:
    """Time `shared` at its start: coding from X, and back to X."""
    tokens, dim = train_NTD.shape[1:]
    for rank in (dim // 8, dim // 4, dim):
        params = {"token_transform": "dct", "lambda_rate": 30.0}
        model = Shared(tokens, dim, rank, params, stream(0, "start"))
        model.initialise(train_NTD.split(8), stream(0, "axes"))
        book = make_codebook(model)
        for target in (0.01, 0.05, 0.14, 0.3):
            try:
                coding, back, size = _rates(book, x_NTD, target)
            except UnreachableError:
                continue
            print(f"  shared, rank {rank}, {target:.0%}: {size:.1f} KiB, coding {coding:.0f}, back {back:.0f} images/s")


def _rates(book: Codebook, x_NTD: Tensor, target: float) -> tuple[float, float, float]:
    """Images a second of one thread's time, to streams and back, and KiB an image."""
    book.decode(book.encode(x_NTD[0], target_error=target))
    start = time.thread_time()
    streams = [book.encode(x_TD, target_error=target) for x_TD in x_NTD]
    middle = time.thread_time()
    for each in streams:
        book.decode(each)
    count, end = len(x_NTD), time.thread_time()
    return count / (middle - start), count / (end - middle), sum(map(len, streams)) / count / 1024


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


def _learned(each: TrainedSet, given: argparse.Namespace) -> None:
    split, groups = _held_out(each)
    x_NTD = each.x_NTD[list(split.test)].float()
    print(
        f"\n{each.name}: {list(each.x_NTD.shape)}, {len(split.train)} train, {len(split.test)} held out of "
        f"{len(set(groups))} groups",
        flush=True,
    )
    books: dict[float, Codebook] = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = FeatureMatrix(_written(each.x_NTD, Path(scratch) / each.name))
        for target in WEIGHTS:
            begun, books[target], epoch = _trained(data, split, target, "dct" if each.pictures else "learned", given)
            first, last = (
                np.array([len(book.encode(x_TD, target_error=target)) for x_TD in x_NTD])
                for book in (begun, books[target])
            )
            mean, half = _interval(np.log(last) - np.log(first), groups)
            saved, least, most = (-np.expm1(value) for value in (mean, mean + half, mean - half))
            print(
                f"  {target:.0%}: {first.mean() / 1024:.2f} KiB at the start, {last.mean() / 1024:.2f} trained (epoch "
                f"{epoch}): saves {saved:.1%} [{least:.1%}, {most:.1%}]",
                flush=True,
            )
    train_NTD = each.x_NTD[list(split.train)[:: max(1, len(split.train) // 16)]].float()
    rivals = [coded_itself(*train_NTD.shape[1:], train_NTD)]
    rivals.append(FactorBooks(list(train_NTD)).way("svd", train_NTD.shape[1], "", lambda seen: seen.svd))
    for way in rivals:
        sizes = [np.mean([len(way.encode(Seen(x_TD), target)) for x_TD in x_NTD]) / 1024 for target in WEIGHTS]
        print(f"  {way.method} by the same coder: {', '.join(f'{size:.2f}' for size in sizes)} KiB", flush=True)
    for dtype, target in (("int8", 0.01), ("int5", 0.05), ("int4", 0.14)):
        size, errors = packed_bytes(x_NTD.shape[1:], dtype), []
        for x_TD, y_TD in zip(x_NTD, restored(x_NTD, dtype), strict=True):
            errors.append(_error(x_TD[None], y_TD[None]))
        coded = [len(books[target].encode(x, target_error=error)) for x, error in zip(x_NTD, errors, strict=True)]
        print(f"  {dtype}: error {np.mean(errors):.2%}, {size / 1024:.0f} KiB; coded {np.mean(coded) / size:.3f} of it")
    for target, book in books.items():
        coding, back, size = _rates(book, x_NTD[:8], target)
        ideal = sum(book.count(x_TD, target_error=target)[0] for x_TD in x_NTD[:8]) / 8 / 1024
        print(
            f"  {target:.0%}: coding {coding:.0f}, back {back:.0f} images/s; bytes over the ideal {size / ideal:.4f}",
            flush=True,
        )


def _trained(
    data: FeatureMatrix, split: Split, target: float, transform: str, given: argparse.Namespace
) -> tuple[Codebook, Codebook, int]:
    """The codebooks of a model before its first epoch and of its best one, and which that was."""
    params = {"token_transform": transform, "lambda_rate": WEIGHTS[target]}
    config = TrialConfig(
        "t", 0, 0, "shared", data.dim, given.lr, 0.0, 8, given.epochs, given.epochs, params,
        objective="val_bytes_at_error", target_error=target,
    )  # fmt: skip
    trainer = Trainer(config, data, split, measure_optimum(data.batches(split.validation, 16)))
    assert isinstance(trainer.model, Shared) and isinstance(trainer.best_model, Shared)
    initialise(trainer.model, config, data.load, split.train, 8)
    begun = make_codebook(trainer.model)
    while trainer.stopped_by is None:
        row = trainer.step()
        size = row["val_bytes_at_error"] / 1024
        print(f"    epoch {row['epoch']}: loss {row['train_loss']:.4f}, {size:.3f} KiB to validate", flush=True)
    return begun, make_codebook(trainer.best_model), trainer.best_epoch


def _held_out(each: TrainedSet) -> tuple[Split, list[str]]:
    names = sorted(set(each.groups))
    np.random.default_rng(0).shuffle(names)
    third, half = len(names) // 3, len(names) // 2
    train, validation, test = (
        [place for place, name in enumerate(each.groups) if name in part]
        for part in (names[half:], names[third:half], names[:third])
    )
    test = [test[place] for place in np.linspace(0, len(test) - 1, min(HELD_OUT, len(test))).round().astype(int)]
    validation = validation[:: max(1, len(validation) // 10)]
    return Split(tuple(train), tuple(validation), tuple(test)), [each.groups[place] for place in test]


def _interval(difference: np.ndarray, groups: list[str]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval over groups."""
    sums = [
        difference[[g == name for g in groups]].sum() - difference.mean() * groups.count(name) for name in set(groups)
    ]
    count = len(sums)
    error = np.sqrt(count / (count - 1) * np.square(sums).sum()) / len(difference)
    return float(difference.mean()), float(stdtrit(count - 1, 0.975) * error)


def _shared(model: object) -> Shared:
    assert isinstance(model, Shared)
    return model


if __name__ == "__main__":
    main()
