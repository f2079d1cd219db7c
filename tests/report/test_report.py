"""The whole report: its files, and the page as a parser and a browser without a network meet it."""

import base64
import io
import logging
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.records import Front, FrontPoint
from lowrank_tune.report.report import TEST_OPTIMUM, read_history, write_report
from tests.report.test_tables import FOUND

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
        "rank_curve.png", "spatial-000-r003.png", "spatial-003-r003.png"
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
    assert len(pictures) == 4
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
    assert "3 sketch 0.9500 0.9500 1.200 — random_sketch 1.800 20.0 % above the least possible error" in text
    assert "3 trials trained for 6 epochs in all" in text
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
        "rank_curve.png", "spatial-000-r003.png", "spatial-003-r003.png"
    ]  # fmt: skip


def test_a_second_report_replaces_the_first(study):
    first = report(study)
    before = first.html.read_text(encoding="utf-8")
    assert report(study) == first
    assert first.html.read_text(encoding="utf-8") == before


def test_trade_offs_repetitions_and_bytes_are_shown_where_there_are_any(study):
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
        compression=FOUND,
    )
    files = write_report(
        study.plan, study.features, study.split, study.outcomes, study.comparison, study.directory, [repetition]
    )
    assert files.loss_curves[-1] == Path(repetition.directory) / "loss_curves.png"
    html = files.html.read_text(encoding="utf-8")
    page = Page(html)
    assert {"tradeoffs", "compression", "learning", "spectrum", "search"} <= set(page.ids)
    assert "On the front: r003-sketch-0000 at rank 3" in html
    assert "int8 of X takes &lt;65&gt; KiB: not beaten by any factors." in html
    text = " ".join(" ".join(page.text).split())
    assert "sketch ★ 0.9500 ± 0.0100 1.200 1.320 123 -0.0500 ± 0.0200 0.9500" in text
    assert "3 sketch ★ -0.0500 ± 0.0200 1 1.310 0.9400" in text


def test_progress_is_told_and_what_the_comparison_measured_is_not_measured_again(study, monkeypatch):
    measure_optimum(FeatureMatrix(study.features).batches(study.split.test, 4)).save(study.directory / TEST_OPTIMUM)
    monkeypatch.setattr("lowrank_tune.report.report.measure_optimum", None)
    told = []
    given = (study.plan, study.features, study.split, study.outcomes, study.comparison, study.directory)
    files = write_report(*given, progress=told.append)
    assert "Of 4 test images." in files.html.read_text(encoding="utf-8")
    assert [text.partition(": ")[0] for text in told] == ["writing the report"] * 3


def test_epochs_come_in_order_with_their_finite_numbers(tmp_path):
    (tmp_path / "history.json").write_text(
        '[{"epoch": 1, "val_mse": NaN, "lr": 0.1}, {"epoch": 2, "val_mse": 0.5, "lr": 0.1, "note": "x", "on": true}]'
    )
    assert read_history(tmp_path) == [{"epoch": 1, "lr": 0.1}, {"epoch": 2, "val_mse": 0.5, "lr": 0.1}]
    assert read_history(tmp_path / "absent") == []


@pytest.mark.parametrize("text", ["{", '["epoch"]', "3"])
def test_a_damaged_history_is_told_and_skipped(tmp_path, caplog, text):
    (tmp_path / "history.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert read_history(tmp_path) == []
    assert str(tmp_path) in caplog.text
