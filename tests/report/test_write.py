"""The whole report: its files, and the page as a parser and a browser without a network meet it."""

import base64
import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.records import Front, FrontPoint
from lowrank_tune.report.report import Scene, spatial_section, write_places, write_report

VOID = {"meta", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Collects what the tests ask about, and insists that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.images, self.cells, self.text = [], [], [], [], [], []
        self.tags = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag == "th":
            self.cells.append(attributes.get("scope"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def report(study):
    return write_report(study.plan, study.features, study.split, study.outcomes, study.comparison, study.directory)


def test_a_report_writes_its_files_and_no_others(study):
    files = report(study)
    assert files.html == study.directory / "report.html"
    assert [path.name for path in files.plots] == [
        "rank_curve.png", "spatial-000-r003.png", "spatial-003-r003.png", "learning_curves.png", "spectrum.png"
    ]  # fmt: skip
    assert [path.parent.name for path in files.loss_curves] == ["r003-sketch-0000", "r003-sketch-0001"]
    for path in (*files.plots, *files.loss_curves):
        with Image.open(path) as picture:
            picture.load()
            assert picture.width >= 300
        assert path.stat().st_size < 200_000
    left = {path.name for path in study.directory.rglob("*") if path.is_file()}
    assert left == {"study.yaml", "report.html", "history.json", "best_model.safetensors", "loss_curves.png"} | {
        path.name for path in files.plots
    }


def test_the_page_is_whole_by_itself(study):
    page = Page(report(study).html.read_text(encoding="utf-8"))
    assert "iframe" not in page.tags
    for link in page.links:
        assert link.startswith(("data:image/png;base64,", "data:,")) or (link.startswith("#") and link[1:] in page.ids)
    assert len(page.ids) == len(set(page.ids))
    pictures = [image for image in page.images if "src" in image]
    assert len(pictures) == 6
    for image in pictures:
        assert len(image["alt"]) > 30
        data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        Image.open(io.BytesIO(data)).verify()
    assert set(page.cells) == {"col", "row", "rowgroup"}


def test_the_page_says_what_matters_and_what_users_write_is_never_markup(study):
    html = report(study).html.read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "loss is &lt;nan&gt; in epoch 1" in html
    text = " ".join(" ".join(Page(html).text).split())
    assert "random weights: these figures show the pipeline, not the science" in text
    assert "At rank 3 sketch reaches 0.9500 of SVD's 0.9500 token cosine (ρ 1.200)" in text
    assert "sketch ★ 0.9500 ± 0.0100 1.200 1.320 123" in text
    assert "r003-sketch-0001" in text and "stopped by ASHA" in text
    assert "failed: loss is <nan> in epoch 1" in text
    assert "9: 4 train, 1 validate, 4 test" in text
    assert "name: small # <script>alert(1)</script>" in text


def test_an_image_that_the_split_lacks_is_told_and_costs_nothing_else(study):
    study.split = replace(study.split, test=study.split.test[:2])
    files = report(study)
    assert [path.name for path in files.plots if path.name.startswith("spatial")] == ["spatial-000-r003.png"]
    assert "report.images: there is no image 3; the test split has 2 images" in files.html.read_text(encoding="utf-8")


def test_a_report_without_models_or_histories_shows_the_svd(study):
    for outcome in study.outcomes[:2]:
        (Path(outcome.directory) / "best_model.safetensors").write_bytes(b"damaged")
        (Path(outcome.directory) / "history.json").unlink()
    files = report(study)
    assert files.loss_curves == ()
    assert [path.name for path in files.plots] == [
        "rank_curve.png", "spatial-000-r003.png", "spatial-003-r003.png", "spectrum.png"
    ]  # fmt: skip


def test_a_second_report_replaces_the_first(study):
    first = report(study)
    before = first.html.read_text(encoding="utf-8")
    assert report(study) == first
    assert first.html.read_text(encoding="utf-8") == before


def scene(study):
    return Scene(study.features, study.split, study.outcomes, study.comparison)


def test_spatial_pictures_at_a_rank_that_no_trial_had_show_the_svd(study):
    section = spatial_section(scene(study), study.directory / "plots", images=[1, 1], channels=3, rank=7)
    (picture,) = section.pictures
    assert picture.path.name == "spatial-001-r007.png"
    assert "svd" in picture.alt and "sketch" not in picture.alt
    assert any("12 tokens are no square number" in note for note in section.notes)


@pytest.mark.parametrize("rank", [0, 13])
def test_spatial_pictures_at_an_impossible_rank_are_an_input_error(study, rank):
    with pytest.raises(InputError, match=f"rank {rank}: these features have ranks 1 to 12"):
        spatial_section(scene(study), study.directory, images=[0], channels=1, rank=rank)


def test_the_page_of_places_holds_every_image_rank_and_channel(study):
    *pictures, page = write_places(scene(study), study.directory, images=[0, 3], channels=[4, 1], rank=7)
    assert [path.name for path in pictures] == ["spatial-000-r007.png", "spatial-003-r007.png"]
    text = page.read_text(encoding="utf-8")
    data = json.loads(text.split('id="places-data">')[1].split("</script>")[0])
    assert (data["grid"], data["ranks"], data["channels"]) == ([3, 4], [3, 7], [4, 1])
    assert [image["image"] for image in data["images"]] == [0, 3]
    assert [[method["name"] for method in data["images"][0]["ranks"][rank]] for rank in ("3", "7")] == [
        ["svd", "sketch"], ["svd"]
    ]  # fmt: skip
    original = np.frombuffer(base64.b64decode(data["images"][0]["original"]), "<f4").reshape(2, 3, 4)
    x_TD = FeatureMatrix(study.features).load([5])[0].numpy()
    assert original == pytest.approx(np.stack([x_TD[:, channel].reshape(3, 4) for channel in (4, 1)]))


def test_trade_offs_and_repetitions_are_shown_where_there_are_any(study):
    first, second = study.outcomes[:2]
    config = replace(first.config, trial_id="r003-sketch-0000-s1", confirms=first.config.trial_id)
    repetition = replace(second, config=config, directory=str(study.directory / "trials" / config.trial_id))
    Path(repetition.directory).mkdir(parents=True)
    (Path(repetition.directory) / "history.json").write_text((Path(second.directory) / "history.json").read_text())
    svd, control, trained = study.comparison.rows
    seeds = {"seeds": 1, "residual_ratio_seed_mean": 1.31, "token_cosine_seed_mean": 0.94}
    difference = {
        "token_cosine_minus_svd": -0.05,
        "token_cosine_minus_svd_low": -0.07,
        "token_cosine_minus_svd_high": -0.03,
    }
    point = FrontPoint("sketch", 3, 3, 0.25, first.config.trial_id, on_front=True)
    study.comparison = replace(
        study.comparison,
        rows=(svd, control, replace(trained, **seeds, **difference)),
        fronts=(Front("search", "rank", "val_mse", "lower", (point,)),),
    )
    files = write_report(
        study.plan, study.features, study.split, study.outcomes, study.comparison, study.directory, [repetition]
    )
    assert "pareto.png" in [path.name for path in files.plots]
    assert files.loss_curves[-1] == Path(repetition.directory) / "loss_curves.png"
    page = Page(files.html.read_text(encoding="utf-8"))
    text = " ".join(" ".join(page.text).split())
    assert "tradeoffs" in page.ids
    assert "search: r003-sketch-0000 at rank 3" in " ".join(image.get("alt", "") for image in page.images)
    assert "sketch ★ 0.9500 ± 0.0100 1.200 1.320 123 -0.0500 ± 0.0200 0.9500" in text
    assert "r003-sketch-0000 3 1.200 0.9500 1 1.310 0.9400" in text
    assert "3 sketch 0.9500 0.9500 1.200 1.310 random_sketch, ρ 1.800" in text
