"""What the language model is shown in place of X: each method at each rank, in each form, and what it takes.

A form is asked for by names and numbers, which travel to a worker; there it is made of what the comparison measured.

T tokens, D dim, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_tune.comparison.choice import Kind
from lowrank_tune.comparison.codecs import Components, FactorBooks, Seen, Way, coded_itself, coded_shared
from lowrank_tune.comparison.compression import ITSELF, svd_factors
from lowrank_tune.comparison.methods import Method, one_thread, trained, training_axes, untrained
from lowrank_tune.comparison.rate_words import TOLD
from lowrank_tune.comparison.rates import FITTED, loaded
from lowrank_tune.config.fidelity import FidelitySpec
from lowrank_tune.config.plan import Plan, cache_bytes
from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.baselines import svd_weighted
from lowrank_tune.lowrank.codebooks import make_codebook
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Factors
from lowrank_tune.lowrank.decomposers.shared import Shared
from lowrank_tune.lowrank.quantization import factor_bytes, ordered, packed_bytes, restored, restored_factors
from lowrank_tune.lowrank.weighted import read_metric
from lowrank_tune.measured import FACTORS, Comparison, ComparisonRow
from lowrank_tune.records import ANSWERS_METRIC, WEIGHTED, FeatureSet, Split, TrialOutcome

STORED = ("float16", "int8", "int4")
"""Forms of factors that are stored in a dtype, a scale a row; the integers are X's own, too."""
CODED = "coded"
PICTURES = ("jpeg", "webp")
SVD = "svd"


@dataclass(frozen=True, slots=True)
class Wanted:
    """One form of the features: what a row of the figures is about."""

    method: str  # as in `FidelityRow`
    rank: int  # 0 where there are no factors
    form: str
    trial_id: str = ""

    @property
    def key(self) -> str:
        """What its results are kept under."""
        return f"{self.method}|{self.rank}|{self.form}|{self.trial_id}"


class Shown(NamedTuple):
    """A form of one image: X̂ and what it takes, or why there is none."""

    wanted: Wanted
    x_TD: Tensor | None
    size: int
    reason: str = ""


def wanted_forms(comparison: Comparison, asked: FidelitySpec, features: FeatureSet) -> tuple[Wanted, ...]:
    """List what is asked for: X first, then X in fewer bits, each method at each rank, and what is no factors.

    What comes of entropy coders and of pictures is what the comparison measured of them.
    """
    forms = [Wanted(ITSELF, 0, features.dtype)]
    forms += [Wanted(ITSELF, 0, dtype) for dtype in STORED[1:] if asked.wants(dtype)]
    for row in comparison.rows:
        own = (row.method, row.rank)
        if asked.wants(FACTORS, row.rank):
            forms.append(Wanted(*own, FACTORS, row.trial_id))
        if (row.method == SVD or row.chosen) and not row.shared_bytes:
            # Factors in float16 are nearly as they are, and stand where they do.
            kept = [dtype for dtype in STORED if asked.wants(FACTORS if dtype == STORED[0] else dtype, row.rank)]
            forms += [Wanted(*own, dtype, row.trial_id) for dtype in kept]
    for rate in comparison.compression.rates:
        if rate.dtype == CODED and rate.target in TOLD and asked.wants(CODED):
            forms.append(Wanted(rate.method, rate.rank, f"{CODED} {rate.target}", rate.trial_id))
        elif rate.dtype in PICTURES and asked.wants("pictures"):
            forms.append(Wanted(rate.method, 0, rate.dtype))
    return tuple(dict.fromkeys(forms))


def bytes_of(wanted: Wanted, rows: Sequence[ComparisonRow], features: FeatureSet) -> int:
    """What an image takes in a form that is the same size for all of them; 0 for the others."""
    shape = features.tokens, features.dim
    if wanted.form == FACTORS:
        return next(row.bytes_per_image for row in rows if (row.method, row.rank) == (wanted.method, wanted.rank))
    if wanted.form in STORED and wanted.rank:
        return factor_bytes(*shape, wanted.rank, wanted.form)
    if wanted.form.startswith(CODED) or wanted.form in PICTURES:
        return 0
    if wanted.form in STORED[1:]:
        return packed_bytes(shape, wanted.form)
    return cache_bytes(1, *shape, wanted.form)


class Makers:
    """In a worker: makes the wanted forms of one image after another; only that image's are in memory."""

    def __init__(
        self,
        plan: Plan,
        features: FeatureSet,
        split: Split,
        outcomes: Sequence[TrialOutcome],
        wanted: Iterable[Wanted],
        device: str,
    ) -> None:
        self._data, self._split, self._seed, self._device = FeatureMatrix(features), split, plan.spec.seed, device
        self.wanted = tuple(wanted)
        self._coders: dict[Wanted, Way] = {}
        ranks = sorted({each.rank for each in self.wanted if each.rank})
        self._methods: dict[tuple[str, int, str], Method] = {}
        for method in trained(outcomes, (), features, plan.spec.steered_by, device)[0]:
            self._methods[method.name, method.rank, method.trial_id] = method
        within = [rank for rank in ranks if rank <= min(features.tokens, features.dim)]
        if any(each.form == FACTORS and not each.trial_id and each.method != SVD for each in self.wanted):
            axes_DR = training_axes(self._data, split, max(within, default=1), self._seed).to(device)
            for rank in within:
                for method in untrained(rank, axes_DR, self._seed):
                    self._methods[method.name, rank, ""] = method
        if any(each.method == "svd_weighted" for each in self.wanted):
            factor_DD = read_metric(plan.study_dir / ANSWERS_METRIC, features.dim).to(device)
            for rank in within:
                decompose = partial(svd_weighted, rank=rank, factor_DD=factor_DD)
                self._methods["svd_weighted", rank, ""] = Method("svd_weighted", rank, decompose)

    @property
    def dtype(self) -> torch.dtype:
        """What the cache stores."""
        return self._data.dtype

    def load(self, image: int) -> Tensor:
        """X [T, D] of an image, on the device."""
        return self._data.load([image])[0].to(self._device)

    def show(
        self,
        image: int,
        wanted: Sequence[Wanted],
        encode: Callable[[Sequence[str]], Iterator[tuple[str, int, Tensor]]],
    ) -> Iterator[Shown]:
        """Make some forms of an image; `encode` gives pictures' names, bytes and features."""
        seen = _Image(self.load(image), self)
        pictures = {each.method: each for each in wanted if each.form in PICTURES}
        for each in wanted:
            if each.method in pictures:
                continue
            try:
                x_TD, size = seen.make(each)
            except InputError as error:  # a target that cannot be met, a number above what a dtype holds
                yield Shown(each, None, 0, str(error))
                continue
            finite = bool(x_TD.isfinite().all())
            yield Shown(each, x_TD if finite else None, size, "" if finite else "not finite")
        for name, size, x_TD in encode(list(pictures)) if pictures else ():
            yield Shown(pictures[name], x_TD.to(self._device), size)

    def method(self, wanted: Wanted) -> Method:
        """The method behind a form; an InputError where its model is gone."""
        try:
            return self._methods[wanted.method, wanted.rank, wanted.trial_id]
        except KeyError:
            of = f"trial {wanted.trial_id}" if wanted.trial_id else wanted.method
            raise InputError(f"the model of {of} at rank {wanted.rank} cannot be used") from None

    @cached_property
    def _train(self) -> list[Tensor]:
        return loaded(self._data, self._split.train, FITTED)

    @cached_property
    def _books(self) -> FactorBooks:
        return FactorBooks(self._train)

    def coder(self, wanted: Wanted) -> Way:
        """What writes and reads a coded form."""
        if wanted not in self._coders:
            self._coders[wanted] = self._coder(wanted)
        return self._coders[wanted]

    def _coder(self, wanted: Wanted) -> Way:
        if wanted.method == ITSELF:
            return coded_itself(self._data.tokens, self._data.dim, self._train)
        if wanted.method.removesuffix(WEIGHTED) == Shared.family:
            model = self.method(wanted).model
            assert isinstance(model, Shared)
            return coded_shared(wanted.method, make_codebook(model, wanted.rank), wanted.trial_id)
        of = _svd_of if wanted.method == SVD else _trained_of
        return self._books.way(wanted.method, wanted.rank, wanted.trial_id, of)


def _svd_of(seen: Seen) -> Components:
    return seen.svd


def _trained_of(seen: Seen) -> Components:
    return seen.trained


class _Image:
    """One image, and what several of its forms need."""

    def __init__(self, x_TD: Tensor, makers: Makers) -> None:
        self._x_TD, self._makers = x_TD, makers
        self._made: dict[Kind | tuple[str, int, str], Factors] = {}

    def make(self, wanted: Wanted) -> tuple[Tensor, int]:
        """X̂ and what it takes, where that differs from image to image, else 0."""
        if wanted.form.startswith(CODED):
            return self._coded(wanted)
        if wanted.method == ITSELF:
            return (restored(self._x_TD, wanted.form) if wanted.form in STORED[1:] else self._x_TD), 0
        factors = self._factors(wanted)
        if wanted.form in STORED:
            factors = restored_factors(factors if wanted.method == SVD else ordered(factors), wanted.form)
        return (factors.a_NTR @ factors.b_NRD)[0], 0

    def _factors(self, wanted: Wanted) -> Factors:
        key = wanted.method, wanted.rank, wanted.trial_id
        if wanted.method == SVD:
            return Factors(self._svd.a_NTR[..., : wanted.rank], self._svd.b_NRD[:, : wanted.rank])
        if key not in self._made:
            with torch.inference_mode():
                self._made[key] = self._makers.method(wanted).decompose(self._x_TD[None])
        return self._made[key]

    @cached_property
    def _svd(self) -> Factors:
        return svd_factors(self._x_TD[None])

    def _coded(self, wanted: Wanted) -> tuple[Tensor, int]:
        seen, way = self._seen, self._makers.coder(wanted)
        if wanted.trial_id and not isinstance(self._makers.method(wanted).model, Shared):
            seen = Seen(self._x_TD.cpu(), lambda _: Factors(*(part.cpu() for part in self._factors(wanted))))
        with one_thread(), torch.inference_mode():
            stream = way.encode(seen, float(wanted.form.removeprefix(CODED)))
            return way.decode(stream).to(self._x_TD), len(stream)

    @cached_property
    def _seen(self) -> Seen:
        """The image for the coders, whose SVD of it serves every target."""
        return Seen(self._x_TD.cpu())
