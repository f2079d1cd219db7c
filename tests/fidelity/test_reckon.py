"""What asking will take, told before anything runs."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lowrank_tune.config.loading import parse_study
from lowrank_tune.config.plan import make_plan
from lowrank_tune.features.tiny import write_tiny_checkpoint
from lowrank_tune.fidelity.reckon import fidelity_cost
from lowrank_tune.files import read_header

STUDY = """\
name: a
features: {source: {samples: 40}, encoder: {checkpoint: tiny-random, image_size: 112, compute_dtype: float32}}
search: {space: {rank: [2, 4], families: {sketch: }}}
"""


def cost(home: Path, asked: str) -> dict:
    write_tiny_checkpoint(home / "features" / "checkpoints")
    spec = parse_study(STUDY, "study.yaml", [f"fidelity={asked}"])
    found = fidelity_cost(make_plan(spec, home, datetime.now(UTC)), 16, 20)
    assert found is not None
    return found


def test_the_cost_is_of_all_forms_of_all_images(tmp_path: Path) -> None:
    all_of_it = cost(tmp_path, "{questions: 'What is it?', images: 8}")
    assert all_of_it["images"] == 8
    assert all_of_it["passes"] == 8 * all_of_it["forms"]
    few = cost(tmp_path, "{questions: 'What is it?', at: [4, factors]}")
    assert few["images"] == 20
    # X; the SVD, the controls and the family at one rank; the SVD's and the best model's factors in float16.
    assert few["forms"] == 1 + (1 + 7 + 1) + 2
    assert all_of_it["forms"] > 2 * few["forms"]
    assert all_of_it["teraflop"] < few["teraflop"] * 8 / 20 * all_of_it["forms"] / few["forms"] * 1.01


def test_the_bytes_are_those_of_the_language_models_weights(tmp_path: Path) -> None:
    found = cost(tmp_path, "{questions: 'What is it?'}")
    headers = [read_header(path)[1] for path in (tmp_path / "features" / "checkpoints").glob("*/*.safetensors")]
    shapes = [tensor["shape"] for header in headers for name, tensor in header.items() if "visual" not in name]
    held = sum(4 * math.prod(shape) for shape in shapes)
    assert found["model_bytes"] == pytest.approx(held, rel=0.02)


def test_a_study_that_asks_nothing_costs_nothing(tmp_path: Path) -> None:
    spec = parse_study(STUDY, "study.yaml")
    assert fidelity_cost(make_plan(spec, tmp_path, datetime.now(UTC)), 16, 20) is None
    json.dumps(cost(tmp_path, "{questions: 'What is it?'}"))
