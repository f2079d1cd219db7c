"""The metric W [D, D] by which the language model's answers move, estimated from training images.

    g_t = ∂ log p(answer | X) / ∂ x_t                      of each of an image's tokens, [D]
    W_i = (1/T) Σ_t g_t g_tᵀ                               what one image tells
    W   = (1 − s) · mean_i W_i  +  s · (tr / D) · I        shrunk, then scaled to a mean diagonal of 1

To first order an error E of the features moves an answer's log-likelihood by Σ_t ⟨g_t, E_t⟩, whose square is tr(E W Eᵀ)
on average over errors that are unrelated between tokens: what moves no answer may be lost, and the rest weighs by how
much it moves them. The answer is the one that the model itself gives. With answers drawn from p in its place W would
be the Fisher information, the curvature of KL(p_X ‖ p_X̂); where the two part: Kunstner et al., NeurIPS 2019.

Why it is shrunk, and by how much: tokens of an image are alike, so that n images tell hardly more than n independent
things, of D² / 2 unknowns; the mean's large eigenvalues are then too large, its small ones too small, and many are 0,
which would say that these directions are free. Ledoit and Wolf (J. Multivariate Anal. 88, 2004) give the s with the
least expected squared error towards a multiple of the identity. Their proof needs only that what is averaged is
independent, so images are averaged here, not tokens:

    s = min(1, b² / d²),   b² = Σ_i ‖W_i − W̄‖² / (n (n − 1)),   d² = ‖W̄ − (tr W̄ / D) · I‖²

and of a single image s = 1. It is `LEAST_SHRINKAGE` at least, so that W can be inverted in float32.

Of b² and d² only sums of squares are kept: W̄ [D, D] and one image's gradients are all that is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from safetensors.torch import save
from torch import Tensor

from lowrank_tune.config.plan import Plan
from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.errors import InputError, LowrankTuneError
from lowrank_tune.features.asked import image_questions
from lowrank_tune.features.groups import image_groups
from lowrank_tune.features.remote import local_copy
from lowrank_tune.features.shards import Node, Notes, wait_for_room
from lowrank_tune.fidelity.job import worker_pool
from lowrank_tune.fidelity.model import LanguageModel
from lowrank_tune.files import write_durably
from lowrank_tune.lowrank.data import FeatureMatrix, spread
from lowrank_tune.lowrank.device import device_for
from lowrank_tune.lowrank.weighted import METRIC
from lowrank_tune.records import ANSWERS_METRIC, FeatureSet, Split
from lowrank_tune.runtime import in_worker

MOST_IMAGES = 64
"""Training images that are asked, a question each: their gradients take as long as an answer of each."""
LEAST_SHRINKAGE = 0.01


class MeanOuterProduct:
    """The shrunk mean of GᵀG / T over images with gradients G [T, D], which are seen once; float64, on G's device."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.images = 0
        self._sum_DD = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._squares = 0.0  # Σ_i ‖W_i‖²

    def add(self, gradient_TD: Tensor) -> None:
        """See an image's gradients [T, D]."""
        exact_TD = gradient_TD.double()
        own_DD = exact_TD.mT @ exact_TD / len(exact_TD)
        self._sum_DD += own_DD
        self._squares += float(own_DD.square().sum())
        self.images += 1

    def shrunk(self) -> tuple[Tensor, float]:
        """W [D, D] with a mean diagonal of 1, float32 on the CPU, and how much of it is the identity.

        Raises:
            InputError: no gradient was seen, or all are 0, or one is not finite.
        """
        mean_DD = self._sum_DD / max(self.images, 1)
        level = float(mean_DD.diagonal().mean())
        if not (level > 0 and math.isfinite(self._squares)):
            raise InputError("the answers' likelihood moves with no feature, or its gradients are not finite")
        identity_DD = torch.eye(len(mean_DD), dtype=mean_DD.dtype, device=mean_DD.device)
        apart = float((mean_DD - level * identity_DD).square().sum())
        unsure = self._squares - self.images * float(mean_DD.square().sum())
        known = self.images > 1 and apart > 0
        part = min(1.0, max(LEAST_SHRINKAGE, unsure / (self.images * (self.images - 1)) / apart)) if known else 1.0
        return ((1 - part) * mean_DD / level + part * identity_DD).float().cpu(), part


@dataclass(frozen=True)
class _Estimate:
    """What a worker needs to know: paths and words."""

    spec: FeaturesSpec
    cache_root: Path
    features: FeatureSet  # of the images that are asked, these alone
    questions: tuple[str, ...]  # one each
    max_new_tokens: int
    path: Path


def estimate_metric(plan: Plan, features: FeatureSet, split: Split, note: Notes) -> None:
    """Make sure that a study's folder holds the metric of its answers, `ANSWERS_METRIC`, where its file has `fidelity`.

    Asked are training images alone, spread evenly over groups by the study's seed, each the first of its questions: in
    one worker of the caller's Ray, or in this process where there is none. It is estimated once.

    Raises:
        InputError: the questions or the language model cannot be used.
        CacheError: features cannot be read.
        LowrankTuneError: the worker failed.
    """
    asked, path = plan.spec.fidelity, plan.study_dir / ANSWERS_METRIC
    if asked is None or path.exists():
        return
    known = image_questions(features, asked).by_image
    images = [image for image in split.train if features.rows[image].key in known]
    if not images:
        note("the metric of the answers is not estimated: there is no question about any training image")
        return
    groups = image_groups(features, plan.spec.split.group_by)
    chosen = [images[place] for place in spread([groups[image] for image in images], MOST_IMAGES, plan.spec.seed)]
    rows = tuple(features.rows[image] for image in chosen)
    questions = tuple(known[row.key][0].question for row in rows)
    work = _Estimate(
        plan.spec.features, plan.features_root, replace(features, rows=rows), questions, asked.max_new_tokens, path
    )
    blank = len(split.train) - len(images)
    left_out = f" ({blank} others have none)" if blank else ""
    note(f"asking the language model which directions its answers hang on: {len(rows)} training images{left_out}")
    if not ray.is_initialized():
        note(_estimate(work, device_for(asked.device != "cpu"), torch.get_num_threads()))
        return
    nodes = [Node.of(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    pool = wait_for_room(worker_pool(asked.device, 1, nodes), nodes, note)
    try:
        device = "cuda" if pool.gpus else "cpu"
        note(in_worker(_estimate, work, device, pool.threads, cpus=pool.cpus, gpus=pool.gpus))
    except RayTaskError as error:
        if isinstance(error.cause, LowrankTuneError):
            raise error.cause from None
        raise
    except RayError as error:
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        raise LowrankTuneError(f"the language model's worker stopped ({reason}); go on by `resume`") from error


def _estimate(work: _Estimate, device: str, threads: int) -> str:
    """Estimate the metric and write it; what it was made of, in a sentence."""
    torch.set_num_threads(threads)
    model = LanguageModel(work.spec, work.cache_root, device)
    data = FeatureMatrix(local_copy(work.features))
    metric_DD, part, cut = measure_gradients(model, data, work.questions, work.max_new_tokens)
    # Of bytes, for a file that safetensors makes itself is closed to other users.
    write_durably(work.path, save({METRIC: metric_DD}))
    longer = f"; {cut} of them are longer than {work.max_new_tokens} tokens, and cut" if cut else ""
    return (
        f"the metric of the answers is estimated from the answers about {len(data)} training images, and {part:.0%} of "
        f"it is the identity, as Ledoit and Wolf shrink{longer}"
    )


def measure_gradients(
    model: LanguageModel, data: FeatureMatrix, questions: Sequence[str], max_new_tokens: int
) -> tuple[Tensor, float, int]:
    """Ask each image its question: W [D, D], how much of it is the identity, and how many answers were cut."""
    metric, cut = MeanOuterProduct(data.dim, model.device), 0
    for image, question in enumerate(questions):
        x_TD, prompt = data.load([image])[0], model.prompt(question)
        answer = model.answer(x_TD, prompt, max_new_tokens)
        metric.add(model.answer_gradient(x_TD, prompt, answer.ids))
        cut += answer.cut
    return *metric.shrunk(), cut
