"""A trained decomposer leaves its study: a folder in the hub's own form."""

from __future__ import annotations

import filecmp
import os
import re
import tempfile
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lowrank_tune.errors import InputError
from lowrank_tune.files import is_uri, sync
from lowrank_tune.lowrank.pretrained import CONFIG, WEIGHTS, ExportedModel, read_exported, write_exported
from lowrank_tune.measured import Comparison, ComparisonRow
from lowrank_tune.past_study import PastStudy, comparison_of, open_study
from lowrank_tune.records import BEST_MODEL, FeatureSet
from lowrank_tune.report.text import METHOD_NOTES, cosine_text, rank_summaries, ratio_text

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_METRICS = {
    "residual_ratio": "squared error over the least possible at this rank (ρ), exp of the mean logarithm",
    "mse": "squared error of an element, mean",
    "token_cosine": "cosine of each token's row, mean",
}
_TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

A decomposer of visual tokens: the features X [{{ tokens }}, {{ dim }}] of one image become A [{{ tokens }}, {{ rank }}]
and B [{{ rank }}, {{ dim }}] with X ≈ A·B, in one forward pass, {{ "%.3g" % (tokens * dim / kept) }} times fewer
numbers{{ ", for B is the same for every image" if shared }}. Family `{{ family }}` ({{ note }}).

## How to load it

```python
from lowrank_tune import load_decomposer

model = load_decomposer("path/to/this/folder")
a, b = model(x)  # x: float32 [images, {{ tokens }}, {{ dim }}]; a @ b approximates it
```

    lowrank-tune apply path/to/this/folder FEATURES OUT    # a whole cache, or a folder of features_N.pt
{%- if ranks | length > 1 %}

One training serves every rank of {{ ranks | join(", ") }}: `model(x, rank={{ ranks | reject("eq", rank) | first }})`
gives another.
{%- endif %}

## Its figures

On {{ measured[0][1].n_images }} test images that trained nothing; seconds on {{ device }}.

| method | ρ | worst ρ | MSE | token cosine | flat cosine | seconds an image | bytes an image |
| --- | --- | --- | --- | --- | --- | --- | --- |
{%- for name, row in measured %}
| {{ name }} | {{ ratio(row.residual_ratio) }} | {{ ratio(row.residual_ratio_max) }} |
{{- " %.4g" % row.mse_mean }} | {{ cosine(row.token_cosine_mean) }} | {{ cosine(row.flat_cosine_mean) }} |
{{- " %.2g" % (1 / row.images_per_second) if row.images_per_second > 0 else " —" }} |
{{- " {:,}".format(row.bytes_per_image) }} |
{%- endfor %}

ρ is the squared error over that of the truncated SVD at the same rank, the optimum: 1 is perfect. The token cosine has
another optimum, so that a method may stand above `svd` in it. The last line is the nearest control that takes no
longer, where one was measured.

Remarks on the study:
{% for remark in remarks or ["none"] %}
- {{ remark }}
{%- endfor %}

## Where it comes from

Features: {{ source.encoder }}
{{- ", **random weights: its figures show a pipeline, not the science**" if source.weights == "random" }}; fingerprint
`{{ source.fingerprint }}`, {{ source.rows | length }} images of [{{ tokens }}, {{ dim }}] in {{ source.dtype }}.

| training | |
| --- | --- |
{%- for key, value in training.items() %}
| {{ key | replace("_", " ") }} | {{ value }} |
{%- endfor %}
"""


def export_study(
    name: str, directory: str | Path, *, rank: int | None = None, results: str | Path | None = None
) -> ExportedModel:
    """Write the trained model that validation chose for a rank to a folder of its own.

    Args:
        name: the study's id, or the beginning of it.
        directory: a new folder, an empty one, or an earlier export, which is replaced.
        rank: may be left out where the study has one.
        results: the results directory; `LOWRANK_TUNE_RESULTS`, else `./results`, when None.

    Raises:
        InputError: there is no such study or rank, it has not finished, its model is missing, or the folder holds
            something else.
    """
    target = _target(directory)
    study = open_study(results, name)
    study_id = study.directory.name
    if study.state != "finished":
        raise InputError(
            f"study {study_id}: it is {study.state}, and only finished studies are exported; go on with it by "
            "`lowrank-tune resume`"
        )
    comparison = comparison_of(study)
    row = _choose(study, comparison, rank)
    trained = next((trial for trial in study.outcomes if trial.config.trial_id == row.trial_id), None)
    if trained is None:
        raise InputError(
            f"study {study_id}: trial {row.trial_id} is compared, but its folder is gone; compare again with "
            f"`lowrank-tune compare {study_id} --again`"
        )
    weights = Path(trained.directory) / BEST_MODEL
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as beside:
            fresh = Path(beside, "new")
            model = write_exported(fresh, weights, row.rank, study_id, trained.config, study.features)
            model_card(model, study.features, comparison).save(fresh / CARD)
            _replace(target, fresh, Path(beside, "old"))
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error}); choose another folder") from error
    return read_exported(target)


def model_card(model: ExportedModel, features: FeatureSet, comparison: Comparison) -> ModelCard:
    """Make the card of a model that was compared, from what it was trained on and the figures at its rank."""
    name = f"{model.training['study_id']}-r{model.rank:03d}"
    summary = next(summary for summary in rank_summaries(comparison) if summary.rank == model.rank)
    shared = bool(summary.trained and summary.trained.shared_bytes)
    measured = [("this model", summary.trained), ("svd", summary.svd)]
    measured += [(summary.control.method, summary.control)] if summary.control else []
    results = [
        EvalResult(
            task_type="feature-extraction",
            task_name="low-rank decomposition of visual tokens",
            dataset_type="features",
            dataset_name=f"features {features.fingerprint}",
            dataset_split="test",
            metric_type=metric,
            metric_value=getattr(summary.trained, f"{metric}_mean"),
            metric_name=words,
        )
        for metric, words in _METRICS.items()
        if getattr(summary.trained, f"{metric}_mean") is not None
    ]
    # Only a hub id is a base model there; a local path would be a broken link, and tell of this machine.
    base = features.encoder if features.weights == "pretrained" and _HUB_ID.fullmatch(features.encoder) else None
    card: ModelCard = ModelCard.from_template(
        ModelCardData(
            model_name=name,
            library_name="lowrank_tune",
            pipeline_tag="feature-extraction",
            tags=["low-rank", "visual-tokens", "compression", model.family],
            base_model=base,
            base_model_relation="adapter" if base else None,
            eval_results=results,
        ),
        template_str=_TEMPLATE,
        **{key: getattr(model, key) for key in ("tokens", "dim", "rank", "ranks", "family", "training")},
        name=name,
        note=METHOD_NOTES.get(model.family, model.family),
        shared=shared,
        kept=model.rank * (model.tokens if shared else model.tokens + model.dim),
        measured=[(method, row) for method, row in measured if row],
        source=features,
        device=comparison.device,
        remarks=comparison.remarks,
        ratio=ratio_text,
        cosine=cosine_text,
    )
    return card


def _choose(study: PastStudy, comparison: Comparison, rank: int | None) -> ComparisonRow:
    best = {row.rank: row for row in comparison.best_of_each_rank()}
    known = ", ".join(map(str, best)) or "none"
    if rank is None:
        if len(best) == 1:
            return next(iter(best.values()))
        raise InputError(f"study {study.directory.name}: it has models of ranks {known}; choose one with --rank")
    if rank not in best:
        raise InputError(f"study {study.directory.name}: rank {rank} has no trained model; those that have: {known}")
    return best[rank]


def _target(directory: str | Path) -> Path:
    """The folder to write, once it is sure that nothing but an earlier export would be lost."""
    if is_uri(str(directory)):
        raise InputError(f"{directory}: only local and mounted paths are written to; export there, then upload it")
    target = Path(os.path.realpath(os.path.expanduser(directory)))
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file; name a folder")
    names = {path.name for path in target.iterdir()} if target.exists() else set()
    if others := sorted(names - {CONFIG, WEIGHTS, CARD}):
        raise InputError(
            f"{target}: holds something else ({', '.join(others[:3])}), and is left alone; name a new folder"
        )
    if names:
        try:
            read_exported(target)
        except InputError as error:
            raise InputError(f"{target}: is no export of this program, and is left alone ({error})") from error
    return target


def _replace(target: Path, fresh: Path, old: Path) -> None:
    """Put a folder in another's place, unless they are the same; a reader finds the old, none or the new."""
    names = (CONFIG, WEIGHTS, CARD)
    if filecmp.cmpfiles(target, fresh, names, shallow=False)[0] == list(names):
        return
    for path in (*fresh.iterdir(), fresh):
        sync(path)
    if target.is_dir():
        target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        if old.is_dir():
            old.rename(target)
        raise
    sync(target.parent)
