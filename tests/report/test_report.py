"""The whole report: its files, and the page as a parser and a browser without a network meet it."""

import base64
import io
import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.measured import Front, FrontPoint
from lowrank_tune.records import TEST_OPTIMUM
from lowrank_tune.report.report import write_report
from lowrank_tune.trials.outcomes import write_history
from tests.report.conftest import history, make_study
from tests.report.test_rates_chart import RATES
from tests.report.test_still_sees import FOUND as SEEN
from tests.report.test_tables import FOUND

VOID = {"meta", "img", "br", "link", "hr"}
LINES = {"p", "tr", "li", "h1", "h2", "h3", "h4", "figcaption", "caption", "summary", "dt", "pre", "nav", "img"}
GOLDEN = Path(__file__).with_name("report.txt")


class Page(HTMLParser):
    """Insists that tags nest, and collects what the tests ask about: the text as a person meets it, too."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.images, self.scopes = [], [], [], [], []
        self.tags, self.lines = set(), [""]
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag in LINES:
            self.lines.append("")
        if tag in ("td", "th", "dd") and self.lines[-1]:
            self.lines[-1] += " | "
        if tag == "th":
            self.scopes.append(attributes.get("scope"))
        if tag == "img":
            self.images.append(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if attributes.get("alt") or attributes.get("role") == "img":
            self.lines[-1:] = [self.lines[-1], f"[{attributes.get('alt') or attributes['aria-label']}]", ""]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.lines[-1] += data

    @property
    def text(self) -> str:
        lines = (re.sub(r"\s+", " ", line).strip() for line in self.lines)
        return "\n".join(line for line in lines if line) + "\n"


@dataclass(frozen=True)
class Report:
    """A report with everything that one may have."""

    directory: Path
    plots: list[Path]
    told: list[str]
    page: Page


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    study = make_study(path)
    repetition = study.repeat("r003-sketch-0000", 1, epochs=2)
    write_history(Path(repetition.directory), history(2))
    svd, control, trained = study.comparison.rows
    seeds = {"seeds": 1, "residual_ratio_seed_mean": 1.31, "token_cosine_seed_mean": 0.94}
    ends = {"token_cosine_minus_svd_low": -0.07, "token_cosine_minus_svd_high": -0.03}
    point = FrontPoint("sketch", 3, 3, 0.25, "r003-sketch-0000", on_front=True)
    comparison = replace(
        study.comparison,
        rows=(svd, control, replace(trained, token_cosine_minus_svd=-0.05, **seeds, **ends)),
        fronts=(Front("search", "rank", "val_mse", "lower", (point,)),),
        compression=FOUND,
    )
    # As the comparison left it; two images are of zeros there, so that one sees that it was read.
    x_NTD = study.test_images()
    x_NTD[2:] = 0
    measure_optimum([x_NTD]).save(study.directory / TEST_OPTIMUM, study.features.digest(study.split.test))
    times = '{"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T00:02:05+00:00"}'
    (study.directory / "status.json").write_text(times)
    (study.directory / "fidelity").mkdir()
    Image.new("RGB", (64, 48), "red").save(study.directory / SEEN.examples[0].picture)
    told = []
    given = (study.plan, study.features, study.split, study.outcomes, comparison, study.directory, [repetition])
    *plots, page = write_report(*given, told.append, fidelity=SEEN)
    assert page == study.directory / "report.html"
    return Report(study.directory, plots, told, Page(page.read_text(encoding="utf-8")))


def test_a_report_writes_its_files_and_no_others(report):
    assert [text.partition(": ")[0] for text in report.told] == ["writing the report"] * 3
    assert [path.name for path in report.plots] == [
        "rank_curve.png", "fidelity_bytes.png", "fidelity_rank.png", "spatial-000-r003.png", "spatial-003-r003.png"
    ]  # fmt: skip
    curves = list(report.directory.glob("trials/*/loss_curves.png"))
    assert {path.parent.name for path in curves} == {"r003-sketch-0000", "r003-sketch-0001", "r003-sketch-0000-s1"}
    for path in (*report.plots, *curves):
        with Image.open(path) as picture:
            picture.load()
            assert picture.width >= 300
        assert path.stat().st_size < 200_000
    left = {path.name for path in report.directory.rglob("*") if path.is_file()}
    given = {"study.yaml", "status.json", "history.json", "best_model.safetensors", TEST_OPTIMUM, "0.jpg"}
    assert left == given | {"report.html", "loss_curves.png"} | {path.name for path in report.plots}


def test_the_page_is_whole_by_itself(report):
    page = report.page
    assert "iframe" not in page.tags
    for link in page.links:
        assert link.startswith(("data:image/webp;base64,", "data:image/jpeg;base64,", "data:,")) or (
            link.startswith("#") and link[1:] in page.ids
        )
    assert len(page.ids) == len(set(page.ids))
    pictures = [image for image in page.images if "src" in image]
    assert len(pictures) == 7
    for image in pictures:
        assert len(image["alt"]) > 30
        data = base64.b64decode(image["src"].partition(";base64,")[2], validate=True)
        Image.open(io.BytesIO(data)).verify()
    assert set(page.scopes) == {"col", "row", "rowgroup"}


def test_the_page_says_what_matters_word_for_word(report):
    """Where a sentence was changed on purpose: `GOLDEN.write_text(text)`, and read the difference."""
    # The id tells the study file's every setting, those that another change brings, too.
    text = report.page.text.replace(report.directory.name, "small-of-this-file")
    assert text.splitlines() == GOLDEN.read_text(encoding="utf-8").splitlines()


def test_bytes_against_error_are_told_once_with_every_way_before_the_factors(study):
    compression = replace(FOUND, rates=RATES, rate_words=("At 5 % error <71> KiB.",))
    comparison = replace(study.comparison, compression=compression)
    given = (study.plan, study.features, study.split, study.outcomes, comparison, study.directory)
    *plots, page = write_report(*given)
    assert plots[-1] == study.directory / "plots" / "rate_distortion.png"
    shown = Page(page.read_text(encoding="utf-8"))
    assert len(shown.ids) == len(set(shown.ids))
    section = shown.text[shown.text.rindex("Bytes against error") :]
    parts = (
        "What it takes to keep", "At 5 % error <71> KiB.", "Lower and further left", "What the lines are",
        "Of each way the setting", "No setting measured comes near 1 %", "An image's own factors at one rank",
        "Every image at the same rank", "Weights only", "int8 of X takes <65> KiB",
    )  # fmt: skip
    places = [section.index(part) for part in parts]
    assert places == sorted(places)
    assert "The fewest bytes an image, on average" not in section
    assert "As many components as each image needs" not in section
    assert section.count("At 5 % error") == 1


def test_what_users_write_is_never_markup(report):
    html = (report.directory / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html and "loss is &lt;nan&gt; in epoch 1" in html
    assert "<b>r003-sketch-0000</b>" not in html, "nothing in a chart ends the page's script element"
    assert "What &lt;b&gt;brand&lt;/b&gt; is it?" in html and "dakota &lt;i&gt;" in html
    for written in ("<b>brand", "dakota <i>", "needs <64>"):
        assert written not in html


@pytest.mark.parametrize("history", ["", "{", '["epoch"]', "3"])
def test_what_is_missing_or_damaged_is_told_and_costs_nothing_else(study, caplog, history):
    for outcome in study.outcomes[:2]:
        (Path(outcome.directory) / "best_model.safetensors").write_bytes(b"damaged")
        (Path(outcome.directory) / "history.json").write_text(history)
    (Path(study.outcomes[1].directory) / "history.json").unlink()
    split = replace(study.split, test=study.split.test[:2])
    given = (study.plan, study.features, split, study.outcomes, study.comparison, study.directory)
    *plots, page = write_report(*given)
    assert list(study.directory.glob("trials/*/loss_curves.png")) == []
    assert str(Path(study.outcomes[0].directory) / "history.json") in caplog.text
    assert [path.name for path in plots] == ["rank_curve.png", "spatial-000-r003.png"]
    assert (study.directory / TEST_OPTIMUM).is_file(), "measured now, and kept"
    html = page.read_text(encoding="utf-8")
    assert "report.images: there is no image 3; the test split has 2 images" in html
    assert "Of 2 test images." in html
    assert 'id="compression"' not in html and 'id="learning"' not in html
    assert 'id="fidelity"' not in html and "What the model still sees" not in html
