"""The model card of an exported decomposer: its `README.md`, with the front matter that the hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lowrank_tune.records import ComparisonRow, FeatureSet
from lowrank_tune.report.verdict import RankVerdict
from lowrank_tune.report.words import METHOD_NOTES, cosine_text, ratio_text

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TASK = ("feature-extraction", "low-rank decomposition of visual tokens")
_METRICS = {
    "residual_ratio": ("residual_ratio_mean", "squared error over the least possible at this rank (ρ), mean"),
    "mse": ("mse_mean", "squared error of an element, mean"),
    "token_cosine": ("token_cosine_mean", "cosine of each token's row, mean"),
}


def model_card(
    name: str,
    config: Mapping[str, Any],
    features: FeatureSet,
    verdict: RankVerdict,
    device: str,
    remarks: tuple[str, ...],
) -> str:
    """Write the card.

    Args:
        name: the model's.
        config: its `config.json`.
        features: what it was trained on.
        verdict: its own figures at its rank, the SVD's and the best control's.
        device: what the speeds were measured on.
        remarks: what a reader of the study's figures must not miss.

    Returns:
        Markdown, the front matter first.

    Raises:
        ValueError: the verdict has no trained row.
    """
    row = verdict.trained
    if row is None:
        raise ValueError(f"rank {verdict.rank} has no trained model")
    text = _BODY.format(
        name=name,
        note=METHOD_NOTES.get(row.method, row.method),
        family=row.method,
        tokens=config["tokens"],
        dim=config["dim"],
        rank=config["rank"],
        serves=_serves(config),
        table=_table(verdict),
        n_images=row.n_images,
        device=device,
        features=_features(features),
        training="\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in config["training"].items()),
        remarks="".join(f"- {remark}\n" for remark in remarks) or "- none\n",
        kept=config["tokens"] * config["dim"] / ((config["tokens"] + config["dim"]) * config["rank"]),
    )
    return f"---\n{_front_matter(name, features, row)}\n---\n\n{text}"


def _front_matter(name: str, features: FeatureSet, row: ComparisonRow) -> str:
    figures = {metric: (getattr(row, field), words) for metric, (field, words) in _METRICS.items()}
    results = [
        EvalResult(
            task_type=_TASK[0],
            task_name=_TASK[1],
            dataset_type="features",
            dataset_name=f"features {features.fingerprint}",
            dataset_split="test",
            metric_type=metric,
            metric_value=value,
            metric_name=words,
        )
        for metric, (value, words) in figures.items()
    ]
    # Only a hub id is a base model there; a local path would be a broken link, and tell of this machine.
    base = features.encoder if features.weights == "pretrained" and _HUB_ID.fullmatch(features.encoder) else None
    card = ModelCardData(
        model_name=name,
        library_name="lowrank_tune",
        pipeline_tag=_TASK[0],
        tags=["low-rank", "visual-tokens", "compression", row.method],
        base_model=base,
        base_model_relation="adapter" if base else None,
        eval_results=results,
    )
    return card.to_yaml()


def _serves(config: Mapping[str, Any]) -> str:
    others = [rank for rank in config["ranks"] if rank != config["rank"]]
    if not others:
        return ""
    return f"\nOne training serves every rank of {config['ranks']}: `model(x, rank={others[0]})` gives another.\n"


def _features(features: FeatureSet) -> str:
    weights = {"random": ", **random weights: its figures show a pipeline, not the science**"}.get(features.weights, "")
    return (
        f"{features.encoder}{weights}; fingerprint `{features.fingerprint}`, {len(features.rows)} images of "
        f"[{features.tokens}, {features.dim}] in {features.dtype}"
    )


def _table(verdict: RankVerdict) -> str:
    names = (("this model", verdict.trained), ("svd", verdict.svd), (None, verdict.control))
    lines = [_line(name or row.method, row) for name, row in names if row is not None]
    return "\n".join(lines)


def _line(name: str, row: ComparisonRow) -> str:
    seconds = f"{1 / row.images_per_second:.2g}" if row.images_per_second > 0 else "—"
    cells = (
        name,
        ratio_text(row.residual_ratio_mean),
        ratio_text(row.residual_ratio_max),
        f"{row.mse_mean:.4g}",
        cosine_text(row.token_cosine_mean),
        cosine_text(row.flat_cosine_mean),
        seconds,
        f"{row.bytes_per_image:,}",
    )
    return f"| {' | '.join(cells)} |"


_BODY = """\
# {name}

A decomposer of visual tokens: the features X [{tokens}, {dim}] of one image become A [{tokens}, {rank}] and
B [{rank}, {dim}] with X ≈ A·B, in one forward pass, {kept:.3g} times fewer numbers. Family `{family}` ({note}).

## How to load it

```python
from lowrank_tune import load_decomposer

model = load_decomposer("path/to/this/folder")
a, b = model(x)  # x: float32 [images, {tokens}, {dim}]; a @ b approximates it
```

    lowrank-tune apply path/to/this/folder FEATURES OUT    # a whole cache, or a folder of features_N.pt
{serves}
## Its figures

On {n_images} test images that trained nothing; seconds on {device}.

| method | ρ | worst ρ | MSE | token cosine | flat cosine | seconds an image | bytes an image |
| --- | --- | --- | --- | --- | --- | --- | --- |
{table}

ρ is the squared error over that of the truncated SVD at the same rank, the optimum: 1 is perfect. The token cosine has
another optimum, so that a method may stand above `svd` in it. The last line is the best method without training, where
one was measured.

Remarks on the study:

{remarks}
## Where it comes from

Features: {features}.

| training | |
| --- | --- |
{training}
"""
