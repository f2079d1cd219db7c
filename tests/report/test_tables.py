"""What a terminal shows of a study, word for word, and the tables behind it."""

import io
from dataclasses import replace

from rich.console import Console

from lowrank_tune.measured import Compression, PrunedRow, QuantisedRow, StoredRow
from lowrank_tune.records import FeatureSet
from lowrank_tune.report.curves import rank_curve
from lowrank_tune.report.tables import (
    choices_table,
    comparison_tables,
    methods_table,
    studies_table,
    summary_table,
    trained_table,
    trials_table,
)
from lowrank_tune.report.text import Choice
from tests.comparison.small_study import make_outcome, make_row
from tests.report.conftest import make_comparison

KIB = 1024
STORED = (
    StoredRow("x", 0, "float16", 4, 128 * KIB, 0.0, 0.0, 1.0),
    StoredRow("x", 0, "int8", 4, 65 * KIB, 0.0073, 0.0084, 0.99997),
    StoredRow("x", 0, "int4", 4, 33 * KIB, 0.132, 0.149, 0.9915),
    *(
        StoredRow(method, rank, dtype, 4, int(rank * size * KIB), error / rank, 1.5 * error / rank, 0.98, trial)
        for method, trial, more in (("svd", "", 1.0), ("sketch", "r-sketch", 1.1))
        for rank in (2, 4)
        for dtype, size, error in (("float16", 1.0, 0.5 * more), ("int8", 0.51, 0.51 * more))
    ),
)
PRUNED = (
    PrunedRow("svd", 12, "float16", "0.2", 4, 4, 5.2, 9, 30 * KIB, 0.19, 0.2),
    PrunedRow("svd", 12, "int8", "0.2", 4, 4, 5.3, 9, 15.5 * KIB, 0.19, 0.2),
    PrunedRow("svd", 12, "int8", "int8", 4, 3),
    PrunedRow("svd", 12, "float16", "int8", 4, 4, 11.0, 12, 90 * KIB, 0.007, 0.008),
    PrunedRow("sketch", 4, "float16", "0.2", 4, 2, trial_id="r-sketch"),
    PrunedRow("sketch", 4, "int8", "0.5", 4, 4, 2.0, 3, 5 * KIB, 0.45, 0.5, "r-sketch"),
)
MODELS = (
    QuantisedRow("sketch", 4, "r-sketch", 64 * KIB, 17 * KIB, 0.173, 0.174),
    QuantisedRow("refined", 4, "r-refined", 75 * KIB, 75 * KIB, 0.145, 0.145),
)
FOUND = Compression(STORED, PRUNED, MODELS, ("int8 of X takes <65> KiB: not beaten by any factors.",))

GOLDEN = """\

The best of each rank: 4 test images of a checkpoint

 rank  trained    cosine     SVD's     ρ   ρ over seeds  untrained
 ────────────────────────────────────────────────────────────────────────────
   64  direct     0.8000    0.9893  34.0              —  randomized_svd 1.012
  128  refined  0.999956  0.999961  12.5  1.215 ± 0.013  randomized_svd 1.012

trained: what validation chose, on the test images · cosine: mean token
cosine, beside the SVD's · ρ: squared error over the least possible at that
rank, the SVD's: 1 is perfect · over seeds: the same configuration trained
again · untrained: the nearest control that takes no longer, and its ρ

Rank x method: 4 test images of a checkpoint

 rank  method               token cosine      ρ  median ρ  worst ρ  images/s
 ───────────────────────────────────────────────────────────────────────────
   64  svd               0.9893 ± 0.0100  1.000     1.000    1.100       123
       direct ★          0.8000 ± 0.0100   34.0      34.0     37.4       123
       refined                         —      —         —        —         —
       randomized_svd    0.9891 ± 0.0100  1.012     1.012    1.114     1,230

  128  svd             0.999961 ± 0.0100  1.000     1.000    1.100       123
       direct                          —      —         —        —         —
       refined ★       0.999956 ± 0.0100   12.5      12.5     13.8       123
       randomized_svd    0.9500 ± 0.0100  1.012     1.012    1.113       123

Means ± sd over the test images · ρ: residual over the SVD's, 1 is the
optimum: exp(mean log ρ) with a 95 % interval over groups of images, then the
middle and the worst image's · ★ the trained model of its rank that
validation chose · images/s: A and B, on one CPU thread (test)

Trained: beside the SVD, and over seeds

                      token cosine  training took                     ρ
 rank  method                − SVD       off ρ, %  seeds     over seeds
 ──────────────────────────────────────────────────────────────────────
   64  direct ★            -0.2000              —      —              —

  128  refined ★  -0.0132 ± 0.0020              —      3  1.215 ± 0.013

− SVD: difference on the same test image, mean ± 95 % interval ·
training took off: against the same model before its first epoch, on the
same images · over seeds: the same configuration trained again, mean ±
sd, which is what it gives; the trial's own training was chosen for its
validation figures

Studies side by side, by rank and ρ

 rank  study   method          token cosine      ρ  median ρ  worst ρ
 ────────────────────────────────────────────────────────────────────
   64  one-0a  svd                   0.9893  1.000     1.000    1.100
       one-0a  randomized_svd        0.9891  1.012     1.012    1.114
       one-0a  direct ★              0.8000   34.0      34.0     37.4

  128  one-0a  svd                 0.999961  1.000     1.000    1.100
       one-0a  randomized_svd        0.9500  1.012     1.012    1.113
       one-0a  refined ★           0.999956   12.5      12.5     13.8

ρ: residual over the SVD's, 1 is the optimum · ★ the trained model
that its study's validation chose
"""


def printed(*shown) -> str:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    for each in shown:
        console.print(each)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def small():
    seeds = {
        "seeds": 3, "residual_ratio_seed_mean": 1.2149, "residual_ratio_seed_sd": 0.0126,
        "token_cosine_seed_mean": 0.90641, "token_cosine_seed_sd": 0.00034,
    }  # fmt: skip
    pair = {"token_cosine_minus_svd": -0.01321, "token_cosine_minus_svd_low": -0.015,
            "token_cosine_minus_svd_high": -0.011}  # fmt: skip
    comparison = make_comparison(
        make_row("svd", 128, 1.0, 0.999961), make_row("svd", 64, 1.0, 0.98931),
        make_row("refined", 128, 12.5, 0.999956, **pair, **seeds),
        make_row("direct", 64, 34.0, 0.8, token_cosine_minus_svd=-0.2),
        make_row("randomized_svd", 64, 1.0123, 0.9891, images_per_second=1234.5),
        make_row("randomized_svd", 128, 1.012),
    )  # fmt: skip
    return replace(comparison, data="4 test images of a checkpoint")


def test_a_terminal_of_80_columns_shows_the_study_word_for_word():
    comparison = small()
    text = printed(summary_table(comparison), comparison_tables(comparison), studies_table({"one-0a": comparison}))
    assert text == GOLDEN


def test_every_rank_has_every_method_in_one_order():
    table = methods_table(
        make_comparison(make_row("power_1", 4), make_row("sketch", 8, 1.1), make_row("direct", 4), make_row("svd", 8))
    )
    assert [[cells[:2] for cells in group] for group in table.groups] == [
        [(rank, method) for method in ("svd", direct, sketch, "power_1")]
        for rank, direct, sketch in (("4", "direct ★", "sketch"), ("8", "direct", "sketch ★"))
    ]
    assert not trained_table(make_comparison(make_row("svd", 4, 1.0))).rows


def test_above_the_rank_of_any_image_there_is_no_ratio_but_everything_else():
    none = dict.fromkeys(
        ("residual_ratio", "residual_ratio_mean", "residual_ratio_max", "residual_ratio_low", "residual_ratio_high",
         "residual_ratio_median")
    )  # fmt: skip
    seeds = {"seeds": 2, "token_cosine_seed_mean": 0.99, "token_cosine_seed_sd": 0.001}
    comparison = make_comparison(
        make_row("svd", 4, 1.0), make_row("shared", 4, 1.9), make_row("shared", 32, cosine=0.99, **none, **seeds)
    )
    shown = dict(zip((table := methods_table(comparison)).head, table.rows[-1], strict=True))
    assert (shown["rank"], shown["method"]) == ("32", "shared ★")
    assert [shown[name] for name in ("ρ", "95 % of ρ", "median ρ", "worst ρ")] == ["—"] * 4
    assert shown["token cosine"].startswith("0.9900")
    assert summary_table(comparison).rows[-1][-1] == "above the images' own rank, where there is no ρ"
    assert trained_table(comparison).rows[-1][-2:] == ("—", "0.9900 ± 0.0010")
    assert [row[0] for row in studies_table({"one": comparison}).rows] == ["4", "4", "32"]
    ratios = {line.get_label(): line.get_xdata() for line in rank_curve(comparison.rows).axes[1].lines}
    assert list(ratios["shared"]) == [4]


def test_what_all_images_share_stands_beside_what_an_image_takes():
    shared = make_row("shared", 4, 1.9, shared_bytes=4 * KIB, bytes_per_image=KIB)
    table = methods_table(make_comparison(make_row("svd", 4, 1.0), shared))
    places = [table.head.index(name) for name in ("KiB an image", "shared, KiB")]
    assert [[row[place] for place in places] for row in table.rows] == [["8.0", "—"], ["1.0", "4.0"]]
    assert "not in an image's KiB" in table.caption
    assert "shared, KiB" not in methods_table(make_comparison(make_row("svd", 4, 1.0))).head
    features = FeatureSet("", "", "", "", "float16", 16, 24, (), "")
    assert choices_table([Choice(0.95, 4, shared)], features).rows[0][-1] == "1.0 KiB, 133% of X, and 4 KiB once"


def test_a_setting_may_be_a_word():
    trial = make_outcome("shared", 4)
    config = replace(trial.config, family_params={"token_transform": "dct", "lambda_rate": 0.25})
    (row,) = trials_table([replace(trial, config=config)]).rows
    assert row[-1].endswith("token_transform\u00a0dct, lambda_rate\u00a00.25")


def test_where_there_is_a_metric_every_method_has_its_ratio_in_it():
    interval = {"residual_ratio_weighted_low": 1.5, "residual_ratio_weighted_high": 1.75}
    rows = (make_row("svd", 4, residual_ratio_weighted=1.625, **interval), make_row("shared_weighted", 4))
    table = methods_table(replace(make_comparison(), rows=rows))
    place = table.head.index("ρ_W")
    assert [row[place : place + 2] for row in table.rows] == [("1.625", "1.500–1.750"), ("—", "—")]
    assert "ρ_W" in table.terminal and "ρ_W: ρ where errors weigh" in table.caption
    assert "of …_weighted training is told by ρ_W" in trained_table(replace(make_comparison(), rows=rows)).caption
    assert "ρ_W" not in methods_table(make_comparison()).head


def test_repetitions_stand_in_one_row_below_their_trial():
    trials = [make_outcome("sketch", 3, number, best={"val_residual_ratio": 1.5}) for number in (1, 0)]
    config = replace(trials[0].config, confirms=trials[0].config.trial_id)
    again = [
        replace(trials[0], config=config, epochs=3, best={"val_residual_ratio": 1.2}),
        replace(trials[0], config=config, stopped_by="patience", best={"val_residual_ratio": 1.4}),
        replace(trials[0], config=config, status="failed", stopped_by="error", best_epoch=0, epochs=0, best={}),
    ]
    table = trials_table(trials, again)
    assert table.trials == (0, 1, 1)
    assert [row[0] for row in table.rows] == ["r003-sketch-0000", "r003-sketch-0001", "r003-sketch-0001, 3 fresh seeds"]
    shown = dict(zip(table.head, table.rows[2], strict=True))
    assert (shown["ρ"], shown["best epoch"], shown["time"]) == ("1.300 ± 0.141", "4 ± 0.0", "6.0 s")
    assert shown["how it ended"] == "trained again: 1 ran its full budget, 1 stopped by patience, 1 failed"
    assert dict(zip(table.head, table.rows[0], strict=True))["ρ"] == "1.500"
