"""The language model asked about some test images, each form of them in turn: Ray Data, and a pool of actors.

An item is an image with its questions; its forms are made in the actor, and only figures leave it. What was answered is
on disk before the next forms are made, so that a run that is killed at any moment is continued by the next one.

N forms of one image at once, T tokens, D dim, P positions of an answer, V words.
"""

from __future__ import annotations

import math
import pickle
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy.typing as npt
import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from lowrank_tune.comparison.methods import reason_of
from lowrank_tune.config.fidelity import FidelitySpec
from lowrank_tune.config.plan import Plan
from lowrank_tune.errors import InputError, LowrankTuneError
from lowrank_tune.features.asked import Asked
from lowrank_tune.features.commits import UnusableError
from lowrank_tune.features.decoding import decode_image
from lowrank_tune.features.extract import EncodeImages
from lowrank_tune.features.images import read_original
from lowrank_tune.features.pictures import WAYS, bring_back
from lowrank_tune.features.remote import local_copy
from lowrank_tune.features.shards import Node, Notes, Pool, Progress, on_actors, wait_for_room
from lowrank_tune.fidelity.kept import FOLDER, PIXELS, Kept, Reply, read_kept, write_kept
from lowrank_tune.fidelity.ways import Makers, Shown, Wanted
from lowrank_tune.files import read_fields, write_json
from lowrank_tune.lowrank.data import NUMBERS_AT_ONCE
from lowrank_tune.records import FeatureSet, Split, TrialOutcome

if TYPE_CHECKING:
    from lowrank_tune.features.encoder import Encoder
    from lowrank_tune.fidelity.model import Prompt

FORMS_AT_ONCE = 16
"""Forms of an image that are heard in one pass, at most; fewer of large features."""


@dataclass(frozen=True)
class Asking:
    """What the workers need to know: paths, names and numbers."""

    plan: Plan
    asked: FidelitySpec
    features: FeatureSet
    split: Split
    outcomes: tuple[TrialOutcome, ...]
    wanted: tuple[Wanted, ...]
    encoding: EncodeImages


class Item(NamedTuple):
    """An image, by its place among the features, with its questions."""

    image: int
    questions: tuple[Asked, ...]


class Done(NamedTuple):
    """What became of an image."""

    image: int
    problems: tuple[str, ...] = ()  # why some of its forms are still not answered
    error: LowrankTuneError | None = None


def lacking(asking: Asking, items: Sequence[Item]) -> list[Item]:
    """The images of which something was not answered yet."""
    rows, directory = asking.features.rows, asking.plan.study_dir
    return [
        item
        for item in items
        if any(read_kept(directory, rows[item.image].key, asked).lacks(asking.wanted) for asked in item.questions)
    ]


def ask_all(asking: Asking, left: Sequence[Item], total: int, note: Notes, progress: Progress) -> list[str]:
    """Have the caller's Ray answer what is `left` of so many images; why some of it still is, a sentence each.

    Raises:
        InputError: the cluster has no room, or the model does not start there.
        LowrankTuneError: Ray failed.
    """
    nodes = [Node.of(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    done, problems = total - len(left), dict[str, None]()
    progress(done, total)
    pool = wait_for_room(worker_pool(asking.asked.device, len(left), nodes), nodes, note)
    rows = [{"item": pickle.dumps(item)} for item in left]
    try:
        items_read = ray.data.from_items(rows, override_num_blocks=len(rows))
        for data in on_actors(items_read, Asker, {"asking": asking, "pool": pool}, pool):
            result: Done = pickle.loads(data)
            if result.error:
                raise result.error
            problems |= dict.fromkeys(result.problems)
            done += 1
            progress(done, total)
    except RayError as error:
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        raise LowrankTuneError(f"the language model's workers stopped ({reason}); what is answered stays") from error
    return list(problems)


def worker_pool(device: str, images: int, nodes: Sequence[Node]) -> Pool:
    """A worker a GPU; without GPUs one a large machine, which has all of it: a whole model is in its memory."""
    gpus = sum(int(node.gpus) for node in nodes)
    if device == "cuda" and not gpus:
        raise InputError("fidelity.device: cuda, and the Ray cluster has no GPU; make it auto")
    if gpus and device != "cpu":
        return Pool(1, min(images, gpus), cpus=1, gpus=1)
    most = max(int(node.cpus) for node in nodes)
    large = sum(node.cpus >= most / 2 for node in nodes)
    cpus = max(1, min(int(node.cpus) for node in nodes if node.cpus >= most / 2))
    return Pool(1, min(images, large), cpus=cpus, threads=cpus)


class Asker:
    """An actor of the pool: it has the language model, and answers all about an image a call."""

    def __init__(self, asking: Asking, pool: Pool) -> None:
        torch.set_num_threads(pool.threads)
        self.asking, self._pool = asking, pool
        self._encoder: Encoder | None = None
        self.problem: LowrankTuneError | None = None
        try:
            # It takes seconds to import, which the driver need not spend.
            from lowrank_tune.fidelity.model import LanguageModel

            if pool.gpus and not torch.cuda.is_available():
                raise InputError(f"{socket.gethostname()}: torch sees no GPU; make fidelity.device cpu")
            device = "cuda" if pool.gpus else "cpu"
            features = local_copy(asking.features)
            self.makers = Makers(asking.plan, features, asking.split, asking.outcomes, asking.wanted, device)
            self.model = LanguageModel(asking.plan.spec.features, asking.plan.features_root, device)
        except LowrankTuneError as error:
            self.problem = error
        except Exception as error:
            # Ray would start an actor that fails here again and again.
            self.problem = InputError(f"the language model did not start: {reason_of(error)}")

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, list[bytes]]:
        """Take one row, whose `item` is a pickled Item; the answer's `result` is a Done."""
        item: Item = pickle.loads(batch["item"][0])
        try:
            if self.problem:
                raise self.problem
            result = Done(item.image, tuple(self.ask(item)))
        except LowrankTuneError as error:
            result = Done(item.image, error=error)
        except OSError as error:
            result = Done(item.image, error=LowrankTuneError(f"{error}; make room and go on"))
        return {"result": [pickle.dumps(result)]}

    def ask(self, item: Item) -> list[str]:
        """Answer what an image's files lack; why some of it still lacks, a sentence each."""
        directory, key = self.asking.plan.study_dir, self.asking.features.rows[item.image].key
        kept = {asked: read_kept(directory, key, asked) for asked in item.questions}
        wanted = [each for each in self.asking.wanted if any(own.lacks([each]) for own in kept.values())]
        prompts = {asked: self.model.prompt(asked.question) for asked in item.questions}
        x_TD, problems = self.makers.load(item.image), list[str]()
        self._check_pixels(key, x_TD)
        for asked, own in kept.items():
            if not own.ids:
                answer = self.model.answer(x_TD, prompts[asked], self.asking.asked.max_new_tokens)
                kept[asked] = replace(own, ids=tuple(answer.ids), answer=answer.text, cut=answer.cut)
        at_once = max(1, min(FORMS_AT_ONCE, NUMBERS_AT_ONCE // x_TD.numel()))
        shown = self._shown(item.image, key, wanted, problems)
        while some := list(islice(shown, at_once)):
            for asked, own in kept.items():
                if replies := self._hear(x_TD, some, prompts[asked], own):
                    kept[asked] = replace(own, replies=own.replies | replies)
                    write_kept(directory, kept[asked])
        return problems

    def _shown(self, image: int, key: str, wanted: Sequence[Wanted], problems: list[str]) -> Iterator[Shown]:
        def encode(names: Sequence[str]) -> Iterator[tuple[str, int, Tensor]]:
            spec, features = self.asking.plan.spec.features, self.asking.features
            try:
                file = read_original(features, key)
                square_HWC = decode_image(file, spec.encoder.image_size, spec.max_pixels)
            except (OSError, UnusableError) as error:
                problems.append(f"pictures are left out of an image's figures: {error}")
                return
            self._encoder = self._encoder or self.asking.encoding.load_encoder(self._pool)
            ways = [way for way in WAYS if way.name in names]
            tokens, dtype = features.tokens, self.makers.dtype
            for name, size, y_TD, _ in bring_back(self._encoder, square_HWC, tokens, ways, dtype):
                yield name, size, y_TD

        return self.makers.show(image, wanted, encode)

    def _hear(self, x_TD: Tensor, some: Sequence[Shown], prompt: Prompt, own: Kept) -> dict[str, Reply]:
        """What each of some forms gives on a question, beside X in the same pass."""
        lacking = [shown for shown in some if shown.wanted.key not in own.replies]
        replies = {shown.wanted.key: Reply(reason=shown.reason) for shown in lacking if shown.x_TD is None}
        seen = [shown for shown in lacking if shown.x_TD is not None]
        if not seen:
            return replies
        x_NTD = torch.stack([x_TD, *(shown.x_TD for shown in seen if shown.x_TD is not None)])
        log_NPV = self.model.hear(x_NTD, prompt, own.ids)
        figures = compared(log_NPV, own.ids)
        energy = x_TD.double().square().sum()
        # X itself is the first of every pass.
        places = [0 if torch.equal(x_NTD[number], x_TD) else number for number in range(1, len(x_NTD))]
        flipped = [place for place in places if figures[2][place]]
        most = self.asking.asked.max_new_tokens
        again = dict(zip(flipped, self.model.answers(x_NTD[flipped], prompt, most) if flipped else (), strict=True))
        for shown, place in zip(seen, places, strict=True):
            kl, first, _, delta = (figure_N[place].item() for figure_N in figures)
            ids, text = (again[place].ids, again[place].text) if place in again else (own.ids, own.answer)
            error = math.sqrt(float((x_NTD[place] - x_TD).double().square().sum() / energy)) if energy > 0 else 0.0
            replies[shown.wanted.key] = Reply(kl, bool(first), ids != own.ids, delta, text, shown.size, error)
        return replies

    def _check_pixels(self, key: str, x_TD: Tensor) -> None:
        """Once a study: whether the features are those that the model itself makes of the picture."""
        path = self.asking.plan.study_dir / FOLDER / PIXELS
        if read_fields(path):
            return
        try:
            spec = self.asking.plan.spec.features
            picture = decode_image(read_original(self.asking.features, key), spec.encoder.image_size, spec.max_pixels)
            said = self.model.pixels_agree(picture, x_TD)
        except (OSError, UnusableError) as error:
            said = f"that the features are those of the pixels is not checked: {error}"
        write_json(path, {"said": said})


def compared(log_NPV: Tensor, ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hold each against the first, by their log-probabilities of the next token at the positions of an answer.

    Returns, an entry each: KL(first ‖ it) mean over positions, whether the first token's argmax and any token's is
    another, and the answer's log-likelihood less the first's.
    """
    first_PV, log_NPV = log_NPV[0].double(), log_NPV.double()
    # Where p is 0 its logarithm is not finite, and p times it is 0.
    apart_NPV = torch.where(first_PV > -torch.inf, first_PV - log_NPV, 0.0)
    kl_N = (first_PV.exp() * apart_NPV).sum(-1).mean(-1).clamp_min(0.0)
    top_NP = log_NPV.argmax(-1)
    other_NP = top_NP != top_NP[0]
    chosen = torch.tensor(list(ids), device=log_NPV.device)
    likely_N = log_NPV.gather(2, chosen.expand(len(log_NPV), -1)[..., None])[..., 0].sum(-1)
    return kl_N, other_NP[:, 0], other_NP.any(-1), likely_N - likely_N[0]
