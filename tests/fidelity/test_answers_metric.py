"""By which directions of the features answers move: the estimate, and what it is worth on other images."""

import json
import shutil
from datetime import UTC, datetime

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.covariance import ledoit_wolf

from lowrank_tune.config.plan import make_plan
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.errors import InputError
from lowrank_tune.features.extract import extract_features
from lowrank_tune.fidelity.answers_metric import LEAST_SHRINKAGE, MeanOuterProduct, estimate_metric
from lowrank_tune.lowrank.weighted import METRIC, read_metric
from lowrank_tune.records import ANSWERS_METRIC, Split

QUESTION = "what is in this picture?"
DIM = 6


def seen(gradients):
    metric = MeanOuterProduct(gradients[0].shape[1])
    for gradient_TD in gradients:
        metric.add(gradient_TD)
    return metric


def test_of_images_of_one_token_it_is_ledoit_and_wolfs_estimate():
    """Scikit-learn divides the mean's variance by n, here it is by n − 1, as it is estimated."""
    rows_ND = torch.randn(40, DIM, generator=torch.Generator().manual_seed(0)).double() * torch.arange(1, DIM + 1)
    expected_DD, part = ledoit_wolf(rows_ND.numpy(), assume_centered=True)
    found_DD, own = seen(rows_ND[:, None].unbind()).shrunk()
    assert own == pytest.approx(part * 40 / 39, rel=1e-9)
    mean_DD = rows_ND.mT @ rows_ND / 40
    unit_DD = mean_DD / mean_DD.diagonal().mean()
    torch.testing.assert_close(
        found_DD.double(), (1 - own) * unit_DD + own * torch.eye(DIM).double(), rtol=1e-5, atol=1e-6
    )
    assert expected_DD.trace() == pytest.approx(float(mean_DD.trace()))


def test_images_that_tell_the_same_are_trusted_and_tokens_that_are_alike_count_as_one():
    generator = torch.Generator().manual_seed(1)
    image_TD = torch.randn(9, DIM, generator=generator) * torch.arange(1, DIM + 1)
    assert seen([image_TD] * 5).shrunk()[1] == LEAST_SHRINKAGE
    own = [torch.randn(1, DIM, generator=generator) * torch.arange(1, DIM + 1) for _ in range(12)]
    repeated = [row_1D.expand(50, -1) for row_1D in own]
    part = seen(own).shrunk()[1]
    assert 0.1 < part < 1 and seen(repeated).shrunk()[1] == pytest.approx(part)


def test_a_single_image_tells_nothing_and_gradients_without_a_number_are_refused():
    metric_DD, part = seen([torch.randn(9, DIM)]).shrunk()
    assert part == 1 and torch.equal(metric_DD, torch.eye(DIM))
    for spoilt in (torch.zeros(3, DIM), torch.full((3, DIM), torch.nan)):
        with pytest.raises(InputError, match="moves with no feature, or its gradients are not finite"):
            seen([spoilt, spoilt]).shrunk()


def test_on_other_images_its_leading_directions_move_answers_and_its_last_ones_hardly(language_model, x_NTD):
    prompt, metric = language_model.prompt(QUESTION), MeanOuterProduct(x_NTD.shape[-1])
    answers = [language_model.answer(x_TD, prompt, 8).ids for x_TD in x_NTD]
    for x_TD, ids in zip(x_NTD[:5], answers, strict=False):
        metric.add(language_model.answer_gradient(x_TD, prompt, ids))
    _, vectors_DD = torch.linalg.eigh(metric.shrunk()[0])
    noise_TK = torch.randn(x_NTD.shape[1], 16, generator=torch.Generator().manual_seed(0))
    moved = []
    for basis_DK in (vectors_DD[:, -16:], vectors_DD[:, :16]):
        error_TD = 0.1 * noise_TK @ basis_DK.mT
        apart = 0.0
        for x_TD, ids in zip(x_NTD[5:], answers[5:], strict=True):
            first_PV, other_PV = language_model.hear(torch.stack([x_TD, x_TD + error_TD]), prompt, ids).double()
            apart += float((first_PV.exp() * (first_PV - other_PV)).sum(-1).mean())
        moved.append(apart)
    assert moved[0] > 4 * moved[1]


@pytest.fixture(scope="module")
def studied(ray_cluster, tmp_path_factory, model_root, squares_NHWC):
    """A study of eight photographs, of which one has no question, and its features."""
    home = tmp_path_factory.mktemp("results")
    shutil.copytree(model_root / "checkpoints", home / "features" / "checkpoints")
    records = []
    for number, square_HWC in enumerate(squares_NHWC):
        Image.fromarray(square_HWC).save(home / f"{number}.png")
        question = " " if number == 0 else f"{QUESTION} {number}"
        records.append({"image": f"{number}.png", "question": question})
    (home / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    encoder = {"checkpoint": "tiny-random", "image_size": 112, "compute_dtype": "float32"}
    spec = StudySpec.model_validate(
        {
            "name": "asked",
            "features": {"source": {"manifest": str(home / "data.jsonl")}, "encoder": encoder},
            "search": {"space": {"rank": [4], "families": {"sketch": {}}}},
            "fidelity": {"questions": "question", "max_new_tokens": 4},
        }
    )
    plan = make_plan(spec, home, datetime.now(UTC))
    plan.study_dir.mkdir(parents=True)
    return plan, extract_features(spec.features, plan.features_root, seed=0)


def test_a_study_has_it_of_its_training_images_once_from_a_worker_or_from_this_process(studied, monkeypatch):
    plan, features = studied
    table = pd.read_parquet(features.records_path)
    (asked_nothing,) = table[table["question"].str.strip() == ""]["key"]
    blank = next(place for place, row in enumerate(features.rows) if row.key == asked_nothing)
    others = [place for place in range(len(features.rows)) if place != blank]
    split, notes = Split((blank, *others[:4]), (others[4],), tuple(others[5:])), list[str]()
    path = plan.study_dir / ANSWERS_METRIC
    estimate_metric(plan, features, split, notes.append)
    assert notes[0].endswith("4 training images (1 others have none)")
    assert "about 4 training images" in notes[1] and "Ledoit and Wolf shrink; " in notes[1]
    metric_DD = load_file(path)[METRIC]
    assert metric_DD.shape == (256, 256) and metric_DD.dtype == torch.float32
    assert float(metric_DD.diagonal().mean()) == pytest.approx(1, rel=1e-5)
    assert torch.equal(metric_DD, metric_DD.mT) and read_metric(path, 256).isfinite().all()
    first, told = path.read_bytes(), len(notes)
    estimate_metric(plan, features, split, notes.append)
    assert len(notes) == told and path.read_bytes() == first
    path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("lowrank_tune.fidelity.answers_metric.ray.is_initialized", lambda: False)
        estimate_metric(plan, features, split, notes.append)
    torch.testing.assert_close(load_file(path)[METRIC], metric_DD, rtol=1e-3, atol=1e-4)
    path.unlink()
    estimate_metric(plan, features, Split((blank,), (others[4],), (others[5],)), notes.append)
    assert not path.exists() and notes[-1].endswith("no question about any training image")


def test_what_the_worker_refuses_is_told_as_it_is(studied):
    plan, features = studied
    (directory,) = (plan.features_root / "checkpoints").iterdir()
    (directory / "tokenizer.json").rename(directory / "kept")
    try:
        with pytest.raises(InputError, match="tiny-random: has no tokenizer"):
            estimate_metric(plan, features, Split(tuple(range(len(features.rows))), (), ()), lambda text: None)
    finally:
        (directory / "kept").rename(directory / "tokenizer.json")
    assert not (plan.study_dir / ANSWERS_METRIC).exists()
