"""A trained decomposer leaves its study: a folder in the hub's own form."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lowrank_tune.errors import InputError
from lowrank_tune.files import write_directory_once
from lowrank_tune.lowrank.pretrained import CONFIG, WEIGHTS, ExportedModel, exported_files, read_exported
from lowrank_tune.past_study import PastStudy, comparison_of, open_study
from lowrank_tune.records import Comparison, ComparisonRow, FeatureSet
from lowrank_tune.report.text import METHOD_NOTES, RankSummary, cosine_text, rank_summaries, ratio_text

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
    summary: RankSummary,
    device: str,
    remarks: tuple[str, ...],
) -> str:
    """Write the card in Markdown, front matter first.

    Args:
        name: the model's.
        config: its `config.json`.
        features: what it was trained on.
        summary: the figures at its rank; a ValueError where they lack a trained row.
        device: what the speeds were measured on.
        remarks: what a reader of the study's figures must not miss.
    """
    row = summary.trained
    if row is None:
        raise ValueError(f"rank {summary.rank} has no trained model")
    others, serves = [rank for rank in config["ranks"] if rank != config["rank"]], ""
    if others:
        serves = f"\nOne training serves every rank of {config['ranks']}: `model(x, rank={others[0]})` gives another.\n"
    made_by = features.encoder
    if features.weights == "random":
        made_by += ", **random weights: its figures show a pipeline, not the science**"
    text = _BODY.format(
        name=name,
        note=METHOD_NOTES.get(row.method, row.method),
        family=row.method,
        tokens=config["tokens"],
        dim=config["dim"],
        rank=config["rank"],
        serves=serves,
        table=_table(summary),
        n_images=row.n_images,
        device=device,
        features=f"{made_by}; fingerprint `{features.fingerprint}`, {len(features.rows)} images of "
        f"[{features.tokens}, {features.dim}] in {features.dtype}",
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


def _table(summary: RankSummary) -> str:
    names = (("this model", summary.trained), ("svd", summary.svd), (None, summary.control))
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


CARD = "README.md"


def export_study(
    name: str, directory: str | Path, *, rank: int | None = None, results: str | Path | None = None
) -> ExportedModel:
    """Write the trained model with a rank's lowest mean ρ on the test split to a folder of its own.

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
    if study.state != "finished":
        raise InputError(
            f"study {study.directory.name}: it is {study.state}, and only finished studies are exported; go on with it "
            "by `lowrank-tune resume`"
        )
    comparison = comparison_of(study)
    row = _choose(study, comparison, rank)
    _write(target, _files(study, comparison, row))
    return read_exported(target)


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


def _files(study: PastStudy, comparison: Comparison, row: ComparisonRow) -> dict[str, bytes]:
    outcome = next((trial for trial in study.outcomes if trial.config.trial_id == row.trial_id), None)
    if outcome is None:
        raise InputError(
            f"study {study.directory.name}: trial {row.trial_id} is compared, but its folder is gone; compare again "
            f"with `lowrank-tune compare {study.directory.name} --again`"
        )
    files = exported_files(
        Path(outcome.directory) / "best_model.safetensors",
        row.rank,
        study.directory.name,
        outcome.config,
        study.features,
    )
    summary = next(summary for summary in rank_summaries(comparison) if summary.rank == row.rank)
    model_name = f"{study.directory.name}-r{row.rank:03d}"
    card = model_card(
        model_name, json.loads(files[CONFIG]), study.features, summary, comparison.device, comparison.remarks
    )
    return {**files, CARD: card.encode()}


def _target(directory: str | Path) -> Path:
    if "://" in str(directory):
        raise InputError(f"{directory}: only local and mounted paths are written to; export there, then upload it")
    target = Path(os.path.realpath(Path(directory).expanduser()))
    if not target.exists():
        return target
    if not target.is_dir():
        raise InputError(f"{target}: is a file; name a folder")
    names = {path.name for path in target.iterdir()}
    if names and not names <= {CONFIG, WEIGHTS, CARD}:
        others = sorted(names - {CONFIG, WEIGHTS, CARD})
        raise InputError(
            f"{target}: holds something else ({', '.join(others[:3])}), and is left alone; name a new folder"
        )
    if names:
        try:
            read_exported(target)
        except InputError as error:
            raise InputError(f"{target}: is no export of this program, and is left alone ({error})") from error
    return target


def _write(target: Path, files: Mapping[str, bytes]) -> None:
    """Give the folder its files in one step, or leave what is there."""
    if target.is_dir() and all(_holds(target / name, data) for name, data in files.items()):
        return
    mark = uuid.uuid4().hex
    fresh, old = (target.with_name(f".{what}-{mark}-{target.name}") for what in ("new", "removed"))
    try:
        write_directory_once(fresh, files)
        # The name is free for a moment: a reader finds the old model, none, or the new one, and never a mixture.
        if target.is_dir():
            os.rename(target, old)
        os.rename(fresh, target)
    except OSError as error:
        if old.is_dir() and not target.exists():
            os.rename(old, target)
        raise InputError(f"{target}: cannot be written ({error.strerror or error}); choose another folder") from error
    finally:
        for remains in (fresh, old):
            shutil.rmtree(remains, ignore_errors=True)


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data
