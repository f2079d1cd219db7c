"""Real bytes against error on some test images: X, factors and shared models, by general and by learned entropy coders.

What can meet an error meets each of `TARGETS` on every image, and the rest stands at its one error. Streams are written
and read back: their lengths, what comes back and the time of reading are measured, on one CPU thread.

N images, T tokens, D dim.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lowrank_tune.comparison.choice import Kind
from lowrank_tune.comparison.codecs import (
    INTEGERS,
    STORED,
    FactorBooks,
    Seen,
    Way,
    coded_itself,
    coded_shared,
    plain,
    squeezed,
    stored_factors,
)
from lowrank_tune.comparison.intervals import interval
from lowrank_tune.comparison.methods import Method, one_thread, reason_of
from lowrank_tune.comparison.rate_words import TOLD, training_text
from lowrank_tune.comparison.remarks import listed, percent
from lowrank_tune.errors import CacheError
from lowrank_tune.lowrank.codebooks import make_codebook
from lowrank_tune.lowrank.coding import Codebook, UnreachableError
from lowrank_tune.lowrank.data import FeatureMatrix, evenly
from lowrank_tune.lowrank.decomposers import Factors
from lowrank_tune.lowrank.decomposers.shared import Shared
from lowrank_tune.lowrank.metrics import measure_matrix
from lowrank_tune.measured import ComparisonRow, RateRow
from lowrank_tune.records import WEIGHTED, Split

TARGETS = ("0.01", "0.02", "0.05", "0.1", "0.14", "0.2", "0.3")
"""Relative errors."""
LEAST_IMAGES, FEW_IMAGES, MOST_IMAGES = 3, 8, 16
"""Test images that are measured: a quarter of them, from few up to most, where few are no more than `NUMBERS`."""
NUMBERS = 3 * 2**19
"""Features of 3 images of [256, 2048]. With these, all of it takes no longer than the comparison's other figures."""
FITTED, JUDGING, EXAMPLES = 16, 4, 1
"""Training images that scales are fitted to; validation images that choose a shared model; those that choose a form."""
ROUNDING = 1e-3
"""By which part float32 may miss a target."""
ORDER = {"x": 0, "shared": 2}
"""Of methods, in the rows; the others between them."""


@dataclass
class Rates:
    """What was measured: rows, and what must be said of them."""

    rows: list[RateRow] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def measure_rates(
    data: FeatureMatrix,
    split: Split,
    places: Sequence[int],
    rows: Sequence[ComparisonRow],
    methods: Sequence[Method],
    starts: Mapping[Kind, Method],
    groups: Sequence[str],
    device: str,
) -> Rates:
    """Measure test images, none of them all zeros, at their places in `split.test`; `groups` are the test images'.

    What breaks costs its own rows and is told, and never the study.

    Raises:
        CacheError: features cannot be read.
    """
    chosen = {(row.method, row.rank) for row in rows if row.chosen and not row.shared_bytes}
    trained = max((each for each in methods if each.kind in chosen), key=lambda each: each.rank, default=None)
    few = min(FEW_IMAGES, NUMBERS // (data.tokens * data.dim))
    most = min(MOST_IMAGES, max(LEAST_IMAGES, few, len(split.test) // 4))
    places = [places[each] for each in evenly(len(places), most)]
    bench = _Bench(trained, device)
    try:
        with one_thread(), torch.inference_mode():
            bench.see(data, split, places, groups)
            for way in bench.ways(data, split):
                for target in TARGETS if way.targeted else ("",):
                    bench.measure(way, target)
            bench.tell_missed()
            shared = [each for each in methods if isinstance(each.model, Shared)]
            alike = [[each for each in shared if each.name == name] for name in sorted({each.name for each in shared})]
            worth = [_measure_shared(bench, models, starts, data, split) for models in alike]
    except CacheError:
        raise
    except Exception as error:
        return Rates(remarks=[*bench.remarks, f"the bytes of entropy coders are left out: {reason_of(error)}"])
    return Rates(bench.rows(), [*bench.remarks, *filter(None, worth)])


class _Bench:
    """The images that are measured, and what every way gave on them, a row an image and target."""

    def __init__(self, trained: Method | None, device: str) -> None:
        self.remarks: list[str] = []
        self.seen: list[Seen] = []
        self._trained, self._device = trained, device
        self._frames: list[tuple[Way, str, pd.DataFrame]] = []
        self._broken: set[tuple[str, str]] = set()
        self._tried: dict[tuple[str, str], Way] = {}

    def see(self, data: FeatureMatrix, split: Split, places: Sequence[int], groups: Sequence[str]) -> None:
        """Load the images."""
        self.groups = [groups[place] for place in places]
        for place in places:
            x_TD = data.load([split.test[place]])[0]
            self.seen.append(Seen(x_TD, self._decompose if self._trained else None))

    def _decompose(self, x_NTD: Tensor) -> Factors:
        assert self._trained is not None
        return Factors(*(part.cpu() for part in self._trained.decompose(x_NTD.to(self._device))))

    def ways(self, data: FeatureMatrix, split: Split) -> Iterator[Way]:
        """All but the shared models'; one that cannot be made is told."""
        shape, train = (data.tokens, data.dim), loaded(data, split.train, FITTED)
        makers: dict[str, Callable[[], Way]] = {}
        for dtype in INTEGERS:
            makers[f"{dtype} of X"] = partial(plain, *shape, dtype)
            for compressor in ("zlib", "zstd"):
                examples = [seen.x_TD for seen in self.seen[:EXAMPLES]]
                makers[f"{dtype}+{compressor} of X"] = partial(squeezed, *shape, dtype, compressor, examples)
        makers["X in uniform steps"] = lambda: coded_itself(*shape, train)
        books = cache(lambda: FactorBooks(train))
        named = {"svd": (min(shape), "", lambda seen: seen.svd)}
        if self._trained:
            named[self._trained.name] = (self._trained.rank, self._trained.trial_id, lambda seen: seen.trained)
        for name, (rank, trial_id, components) in named.items():
            for dtype in STORED:
                makers[f"{name} in {dtype}"] = partial(stored_factors, name, rank, trial_id, components, shape, dtype)
            makers[f"{name} in uniform steps"] = partial(_coded_factors, books, name, rank, trial_id, components)
        for told, make in makers.items():
            try:
                yield make()
            except Exception as error:
                self.remarks.append(f"{told} is left out of the bytes against error: {reason_of(error)}")

    def measure(self, way: Way, target: str) -> pd.DataFrame | None:
        """Measure all images; None where one of them cannot meet the target, or the way is broken."""
        if (way.method, way.dtype) in self._broken:
            return None
        self._tried[way.method, way.dtype] = way
        found = []
        try:
            for seen, group in zip(self.seen, self.groups, strict=True):
                stream = way.encode(seen, float(target or 0))
                started = time.thread_time()
                y_TD = way.decode(stream)
                seconds = time.thread_time() - started
                figures = measure_matrix(seen.x_TD[None], y_TD[None])
                error = math.sqrt(figures.residual_N.item() / seen.energy)
                if target and error > float(target) * (1 + ROUNDING):
                    raise UnreachableError("what comes back is farther than was asked for")
                found.append((group, len(stream), error, figures.token_cosine_N.item(), seconds))
        except UnreachableError:
            return None
        except Exception as error:
            self._broken.add((way.method, way.dtype))
            told = f"{way.method} in {way.dtype} is left out of the bytes against error: {reason_of(error)}"
            self.remarks.append(told)
            return None
        table = pd.DataFrame(found, columns=["group", "size", "error", "cosine", "seconds"])
        self._frames.append((way, target, table))
        return table

    def tell_missed(self) -> None:
        """Say which ways have no row since an image misses every target; factors' dtypes stand for one another."""
        rowed = {_form(way) for way, _, _ in self._frames}
        missed = {_form(way): way for each, way in self._tried.items() if each not in self._broken}
        for (method, coded), way in missed.items():
            if (method, coded) in rowed:
                continue
            kept = "uniform steps" if coded else listed(STORED, "or")
            self.remarks.append(
                f"{method}{f', rank {way.rank},' if way.rank else ''} in {kept} "
                f"is left out of the bytes against error: it does not hold every image to {percent(float(TARGETS[-1]))}"
            )

    def rows(self) -> list[RateRow]:
        """A row a way and target; of factors without an entropy coder, at each target the dtype of the fewest bytes."""
        made, least = [], dict[tuple[str, str], RateRow]()
        for way, target, table in self._frames:
            if (way.method, way.dtype) in self._broken:
                continue
            row = RateRow(
                method=way.method,
                rank=way.rank,
                dtype=way.dtype,
                target=target,
                n_images=len(table),
                bytes_per_image=float(table["size"].mean()),
                relative_error_mean=float(table["error"].mean()),
                relative_error_max=float(table["error"].max()),
                token_cosine_mean=float(table["cosine"].mean()),
                images_per_second=float(1 / max(table["seconds"].median(), 1e-9)),
                shared_bytes=way.shared_bytes,
                trial_id=way.trial_id,
            )
            if way.method == "x" or way.dtype == "coded":
                made.append(row)
                continue
            known = least.setdefault((way.method, row.target), row)
            least[way.method, row.target] = min(known, row, key=lambda each: each.bytes_per_image)
        place = {row.method: ORDER.get(row.method.removesuffix(WEIGHTED), 1) for row in [*made, *least.values()]}
        return sorted([*made, *least.values()], key=lambda row: (place[row.method], row.method, row.dtype))


def _form(way: Way) -> tuple[str, bool]:
    return way.method, way.dtype == "coded"


def _coded_factors(books: Callable[[], FactorBooks], *named: Any) -> Way:
    return books().way(*named)


def _measure_shared(
    bench: _Bench, models: Sequence[Method], starts: Mapping[Kind, Method], data: FeatureMatrix, split: Split
) -> str:
    """Measure at each target which of some shared models validation images choose, and say what training saved it.

    Where it cannot hold a test image to the target, the next one does.
    """
    judging = loaded(data, split.validation or split.train, JUDGING)
    books = [make_codebook(_shared(model), model.rank) for model in models]
    ways = [coded_shared(model.name, book, model.trial_id) for book, model in zip(books, models, strict=True)]
    start_of = cache(lambda method: make_codebook(_shared(method), method.rank))
    saved, missed = [], list[str]()
    for target in TARGETS:
        order = _by_bytes(books, judging, float(target))
        for place in order:
            table = bench.measure(ways[place], target)
            if table is None:
                continue
            start = starts.get(models[place].kind)
            if target in TOLD and start:
                saved.append((target, ways[place], _saving(bench, table, start_of(start), float(target))))
            break
        else:
            missed.append(percent(float(target)))
    if missed:
        most = max(book.rank for book in books)
        said = f"{ways[0].method}, up to rank {most}, does not hold every image to an error of {listed(missed, 'or')}"
        bench.remarks.append(said)
    return training_text(saved)


def _shared(method: Method) -> Shared:
    assert isinstance(method.model, Shared)
    return method.model


def _by_bytes(books: Sequence[Codebook], images: Sequence[Tensor], target: float) -> list[int]:
    """Places of codebooks, those first that hold more of the images to the target, then those of fewer bytes."""
    if len(books) == 1:
        return [0]
    keys = []
    for place, book in enumerate(books):
        sizes = []
        for x_TD in images:
            try:
                sizes.append(book.count(x_TD, target_error=target)[0])
            except UnreachableError:
                continue
        keys.append((len(images) - len(sizes), sum(sizes), place))
    return [place for *_, place in sorted(keys)]


def _saving(bench: _Bench, table: pd.DataFrame, start: Codebook, target: float) -> tuple[float, float, float] | None:
    """The part of the untrained model's bytes that training saved, and the ends of its interval; None where it fails.

    By the mean logarithm over images, paired.
    """
    try:
        sizes = [start.count(seen.x_TD, target_error=target)[0] for seen in bench.seen]
    except UnreachableError:
        return None
    logs = np.log(table["size"].to_numpy() / np.array(sizes))
    mean, half = interval(table.assign(method="shared", rank=0, log=logs), "log")
    low, high = float((mean - half).iloc[0]), float((mean + half).iloc[0])
    return -math.expm1(float(mean.iloc[0])), -math.expm1(high), -math.expm1(low)


def loaded(data: FeatureMatrix, images: Sequence[int], most: int) -> list[Tensor]:
    """Some of the images, evenly spread, that are not all zeros."""
    return [x_TD for place in evenly(len(images), most) if (x_TD := data.load([images[place]])[0]).any()]
