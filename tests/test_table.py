"""The table of a study, against figures worked out by hand from run folders that the tests write."""

import json
import math

import pandas as pd
import pytest
import yaml

from scalora.report.write import read_study
from scalora.runs.errors import InputError
from scalora.studies.table import load_study
from scalora.studies.table_markdown import markdown, write_tables

RATES = {"lora": [1e-3, 2e-3, 4e-3], "scalora": [1e-3, 2e-3, 4e-3], "full": [1e-5, 2e-5, 4e-5]}
# Final evaluation losses on the tuning seed: lora's best is in the middle of its grid, the others' at an edge.
TUNING = {"lora": [0.50, 0.45, math.nan], "scalora": [0.46, 0.45, 0.44], "full": [0.40, 0.42, 0.50]}
BEST = {"lora": 2e-3, "scalora": 4e-3, "full": 1e-5}
# Of each method: at steps 10, 20 and 30 (evaluation loss, accuracy), for seeds 1, 2 and 3.
REPORTED = {
    "lora": [
        [(0.60, 0.6), (0.40, 0.8), (0.50, 0.70)],
        [(0.70, 0.6), (0.50, 0.8), (0.60, 0.72)],
        [(0.80, 0.6), (0.60, 0.8), (0.70, 0.74)],
    ],
    "scalora": [
        [(0.50, 0.6), (0.30, 0.9), (0.35, 0.75)],
        [(0.60, 0.6), (0.40, 0.7), (0.55, 0.76)],
        [(0.70, 0.6), (0.50, 0.7), (0.60, 0.80)],
    ],
    "full": [
        [(0.50, 0.5), (0.45, 0.6), (0.20, 0.9)],
        [(0.60, 0.5), (0.55, 0.6), (0.30, 0.9)],
        [(0.70, 0.5), (0.65, 0.6), (0.40, 0.9)],
    ],
}
SECONDS_PER_STEP = {"lora": 0.1, "scalora": 0.15, "full": 0.2}


def write_study(folder, methods=REPORTED, **settings):
    folder.mkdir()
    study = {
        "output_dir": str(folder),
        "metric": "eval_accuracy",
        "seeds": [1, 2, 3],
        "tuning_seeds": [0],
        "run": {"model": "some/model", "task": "classification", "data": {"train": "a.csv", "eval": "b.csv"}},
        "methods": {method: {"learning_rates": RATES[method]} for method in methods},
    } | settings
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder


def cell_folder(study, method, rate, seed):
    return study / "cells" / method / f"lr{rate}-seed{seed}"


def write_cell(study, method, rate, seed, evaluations, losses=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2), share=None):
    folder = cell_folder(study, method, rate, seed)
    folder = folder if share is None else folder.with_name(f"{folder.name}-share{share}")
    folder.mkdir(parents=True)
    per_step = SECONDS_PER_STEP[method]
    lines = [{"step": 10 * i, "loss": loss} for i, loss in enumerate(losses, start=1)]
    lines += [
        {"step": 10 * i, "seconds": 10 * i * per_step, "eval_loss": loss, "eval_accuracy": accuracy}
        for i, (loss, accuracy) in enumerate(evaluations, start=1)
    ]
    # Training ends with an evaluation of its own: the last step is there twice.
    lines.append(lines[-1] | {"epoch": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loss, accuracy = evaluations[-1]
    summary = {"steps": 10 * len(evaluations), "training_seconds": 3.0, "eval_loss": loss, "eval_accuracy": accuracy}
    summary |= {"seconds_per_step": per_step, "peak_memory_bytes": seed * 2**20, "trainable_parameters": 1000}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_whole_study(folder, **settings):
    study = write_study(folder, **settings)
    for method, losses in TUNING.items():
        for rate, loss in zip(RATES[method], losses, strict=True):
            write_cell(study, method, rate, 0, [(loss, 0.5)])
        for seed, evaluations in enumerate(REPORTED[method], start=1):
            write_cell(study, method, BEST[method], seed, evaluations)
    return study


@pytest.fixture
def study(tmp_path):
    return write_whole_study(tmp_path / "study")


def rows(study):
    return load_study(study).table.set_index("method")


def test_the_best_rate_is_that_of_the_least_loss_and_marked_at_the_edge_of_its_grid(study):
    table = rows(study)
    assert table["learning_rate"].to_dict() == BEST
    assert table["at_edge"].to_dict() == {"lora": False, "scalora": True, "full": True}
    assert list(table["seeds"]) == [3, 3, 3]


def test_a_rate_that_diverged_on_one_seed_loses_to_any_that_never_did(tmp_path):
    study = write_study(tmp_path / "study", ["lora"], tuning_seeds=None, seeds=[1, 2])
    for rate, losses in zip(RATES["lora"], [(0.1, math.nan), (0.1, math.inf), (5.0, 6.0)], strict=True):
        for seed, loss in enumerate(losses, start=1):
            write_cell(study, "lora", rate, seed, [(loss, 0.5)])
    result = load_study(study)
    assert result.table["learning_rate"].item() == 4e-3
    assert result.table["eval_loss_mean"].item() == 5.5
    assert list(result.cells["reported"]) == [False, False, True] * 2
    assert list(result.sensitivity["eval_loss"]) == [math.inf, math.inf, 5.5]


def test_a_method_of_which_every_rate_diverged_is_in_the_table_with_an_infinite_loss(tmp_path):
    study = write_study(tmp_path / "study", ["lora"], tuning_seeds=None, seeds=[1, 2])
    for rate in RATES["lora"]:
        for seed in (1, 2):
            write_cell(study, "lora", rate, seed, [(math.nan, 0.5)])
    assert rows(study).loc["lora", "eval_loss_mean"] == math.inf
    assert "inf" in write_tables(study).folder.joinpath("table.md").read_text()


def test_means_and_standard_errors_over_seeds(study):
    table = rows(study)
    # Sample standard deviation of 0.5, 0.6, 0.7 is 0.1; of 0.70, 0.72, 0.74 it is 0.02.
    assert table.loc["lora", ["eval_loss_mean", "eval_loss_se"]].tolist() == pytest.approx([0.6, 0.1 / 3**0.5])
    assert table.loc["lora", ["metric_mean", "metric_se"]].tolist() == pytest.approx([0.72, 0.02 / 3**0.5])
    # Each run's own best, not the best of the means: 0.9, 0.76, 0.80.
    assert table.loc["scalora", "best_metric_mean"] == pytest.approx((0.9 + 0.76 + 0.80) / 3)
    # The last quarter of eight losses: 0.3 and 0.2.
    assert table.loc["lora", ["train_loss_mean", "train_loss_se"]].tolist() == pytest.approx([0.25, 0.0])


def test_costs_are_the_mean_and_memory_the_worst(study):
    row = rows(study).loc["scalora"]
    assert row["seconds_per_step"] == pytest.approx(0.15)
    assert row["peak_memory_bytes"] == 3 * 2**20
    assert row["trainable_parameters"] == 1000


def test_the_best_of_a_metric_that_should_be_small_is_its_smallest(tmp_path):
    study = write_whole_study(tmp_path / "study", metric="eval_loss")
    table = rows(study)
    assert table.loc["lora", "best_metric_mean"] == pytest.approx(0.5)
    assert table.loc["scalora", "metric_gap_closed"] == pytest.approx(1 / 3)


def test_steps_and_seconds_to_the_baselines_best_mean_loss(study):
    table = rows(study)
    # lora's mean curve 0.70, 0.50, 0.60: best 0.50 at step 20, after 2 s.
    assert table.loc["lora", ["steps_to_baseline", "steps_to_baseline_share"]].tolist() == pytest.approx([20, 1])
    # scalora's 0.6, 0.4, 0.5 crosses it half-way between steps 10 and 20.
    assert table.loc["scalora", ["steps_to_baseline", "steps_to_baseline_share"]].tolist() == pytest.approx([15, 0.75])
    seconds = ["seconds_to_baseline", "seconds_to_baseline_share"]
    assert table.loc["scalora", seconds].tolist() == pytest.approx([2.25, 1.125])
    # full's 0.60, 0.55, 0.30 a fifth of the way between steps 20 and 30.
    assert table.loc["full", ["steps_to_baseline", *seconds]].tolist() == pytest.approx([22, 4.4, 2.2])


def test_a_loss_that_is_never_reached_has_no_step(tmp_path):
    study = write_study(tmp_path / "study", ["lora", "scalora"], tuning_seeds=None, seeds=[1])
    for method, losses in {"lora": (0.5, 0.4), "scalora": (0.5, 0.41)}.items():
        for rate in RATES[method]:
            write_cell(study, method, rate, 1, [(loss, 0.5) for loss in losses])
    table = rows(study)
    assert table.loc["lora", "steps_to_baseline"] == 20
    assert math.isnan(table.loc["scalora", "steps_to_baseline"])
    text = (write_tables(study).folder / "table.md").read_text()
    assert "| scalora | -" not in text
    (line,) = [line for line in text.split("## Against lora")[1].split("##")[0].splitlines() if "| scalora" in line]
    assert line.endswith("| — | — |")


def test_share_of_the_gap_to_the_ceiling(study):
    table = rows(study)
    assert table.loc["scalora", "eval_loss_gap_closed"] == pytest.approx((0.6 - 0.5) / (0.6 - 0.3))
    assert table.loc["scalora", "metric_gap_closed"] == pytest.approx((0.77 - 0.72) / (0.90 - 0.72))
    assert table.loc["lora", "metric_gap_closed"] == 0
    assert table.loc["full", "metric_gap_closed"] == 1


def test_no_gap_where_the_ceiling_is_no_better_than_the_baseline(tmp_path):
    study = write_whole_study(tmp_path / "study", ceiling="lora", baseline="full")
    assert rows(study)[["metric_gap_closed", "eval_loss_gap_closed"]].isna().all(axis=None)


def test_no_gap_without_a_ceiling(tmp_path):
    study = write_whole_study(tmp_path / "study", ceiling=None)
    assert rows(study)["metric_gap_closed"].isna().all()
    assert "gap" not in (write_tables(study).folder / "table.md").read_text().lower()


def test_the_paired_test_against_the_baseline(study):
    row = rows(study).loc["scalora"]
    # Loss differences −0.15, −0.05, −0.10; accuracy 0.05, 0.04, 0.06. With two degrees of freedom Student's
    # distribution has a closed form: p = 1 − |t| / √(2 + t²).
    for name, mean, deviation in (("eval_loss", -0.10, 0.05), ("metric", 0.05, 0.01)):
        error = deviation / 3**0.5
        t = abs(mean) / error
        columns = [f"{name}_difference", f"{name}_difference_se", f"{name}_p"]
        assert row[columns].tolist() == pytest.approx([mean, error, 1 - t / (2 + t * t) ** 0.5])
    assert rows(study).loc["lora", ["metric_difference", "metric_p"]].isna().all()


def test_no_test_with_one_seed_or_where_all_differences_are_the_same(tmp_path):
    study = write_study(tmp_path / "study", ["lora", "scalora"], tuning_seeds=None, seeds=[1, 2])
    for method, gain in {"lora": 0.0, "scalora": 0.1}.items():
        for rate in RATES[method]:
            for seed in (1, 2):
                write_cell(study, method, rate, seed, [(0.5 - gain * seed, 0.1 * seed + gain)])
    row = rows(study).loc["scalora"]
    assert row["metric_difference"] == pytest.approx(0.1)
    assert math.isnan(row["metric_p"])
    assert row["eval_loss_p"] > 0
    content = yaml.safe_load((study / "study.yaml").read_text())
    (study / "study.yaml").write_text(yaml.safe_dump(content | {"seeds": [1]}))
    row = rows(study).loc["scalora"]
    assert row["eval_loss_difference"] == pytest.approx(-0.1)
    assert row[["metric_se", "eval_loss_p", "eval_loss_difference_se"]].isna().all()


def test_a_failed_run_is_marked_and_the_comparison_is_over_the_seeds_that_both_have(study):
    cell = cell_folder(study, "scalora", 4e-3, 3)
    (cell / "summary.json").unlink()
    (cell / "log.txt").write_text("loading\nerror: out of memory\nwarning: a semaphore was left\n")
    result = write_tables(study)
    row = result.table.set_index("method").loc["scalora"]
    assert row[["seeds", "unfinished"]].tolist() == [2, 1]
    assert row["eval_loss_difference"] == pytest.approx(-0.10)
    assert row["metric_difference"] == pytest.approx(0.045)
    # Seeds 1 and 2 alone: full's means 0.25 and 0.9, lora's 0.55 and 0.71, scalora's 0.45 and 0.755.
    assert row["eval_loss_gap_closed"] == pytest.approx((0.55 - 0.45) / (0.55 - 0.25))
    # lora's curve of the two seeds: 0.65, 0.45, 0.55; scalora's 0.55, 0.35, 0.45 crosses 0.45 at step 15.
    assert row["steps_to_baseline"] == pytest.approx(15)
    text = (study / "table.md").read_text()
    assert "| 2 (1 not finished) |" in text
    assert "- cells/scalora/lr0.004-seed3: error: out of memory" in text
    assert result.cells["status"].value_counts().to_dict() == {"finished": 17, "failed": 1}


def test_a_rate_with_a_run_that_is_not_finished_is_not_chosen(study):
    (cell_folder(study, "full", 1e-5, 0) / "summary.json").unlink()
    result = load_study(study)
    row = result.table.set_index("method").loc["full"]
    assert row["learning_rate"] == 2e-5
    assert not row["at_edge"]
    assert row[["seeds", "unfinished"]].tolist() == [0, 3]
    assert math.isnan(row["eval_loss_mean"])


def test_a_study_of_which_nothing_is_finished_has_a_table(tmp_path):
    result = write_tables(write_study(tmp_path / "study"))
    assert result.table["learning_rate"].isna().all()
    assert (result.cells["status"] == "missing").all()
    assert "0 of 9 runs finished" in (tmp_path / "study" / "table.md").read_text()


def test_the_rank_is_that_of_the_last_step_over_the_layers(study):
    for seed, last in enumerate([(8, 6.0), (10, 7.0), (12, 8.0)], start=1):
        lines = [
            {"step": step, "layer": layer, "numerical_rank": rank, "effective_rank": effective, "norm": 1.0}
            | {"singular_values": [2.0, 1.0]}
            for step, layer, rank, effective in [
                (10, "a", 100, 100.0),
                (30, "a", last[0], last[1]),
                (30, "b", last[0] + 2, last[1] + 1),
            ]
        ]
        path = cell_folder(study, "scalora", 4e-3, seed) / "updates.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = load_study(study)
    row = result.table.set_index("method").loc["scalora"]
    assert row[["numerical_rank", "effective_rank"]].tolist() == pytest.approx([11, 7.5])
    assert len(result.updates) == 9
    assert result.updates["singular_values"].iloc[0] == [2.0, 1.0]


def test_curves_hold_each_logged_number_once(study):
    curves = load_study(study).curves
    one = curves[(curves["method"] == "lora") & (curves["seed"] == 1) & (curves["name"] == "eval_loss")]
    assert one[["step", "seconds", "value"]].to_numpy().tolist() == [[10, 1, 0.6], [20, 2, 0.4], [30, 3, 0.5]]
    assert set(curves["name"]) == {"loss", "eval_loss", "eval_accuracy", "epoch"}


def test_a_line_that_a_kill_cut_off_is_left_out(study):
    with (cell_folder(study, "lora", 2e-3, 1) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "eval_lo')
    assert rows(study).loc["lora", "steps_to_baseline"] == 20


def test_a_study_folder_can_be_moved(study):
    before = rows(study)
    moved = study.rename(study.with_name("elsewhere"))
    pd.testing.assert_frame_equal(rows(moved), before)


def test_the_tables_on_disk(study):
    (study / "environment.json").write_text(
        json.dumps({"command": "scalora compare x.yaml", "date": "today", "threads": [1]})
    )
    for seed, version in ((1, "2.9"), (2, "2.10")):
        environment = json.dumps({"versions": {"torch": version}})
        (cell_folder(study, "lora", 2e-3, seed) / "environment.json").write_text(environment)
    result = write_tables(study)
    for name in ("cells", "curves", "table", "shares"):
        written = pd.read_parquet(study / f"{name}.parquet")
        pd.testing.assert_frame_equal(written, getattr(result, name), check_dtype=False)
    text = (study / "table.md").read_text()
    for part in ("`scalora compare x.yaml`", "today", "torch 2.10 and 2.9", "seeds 1, 2, 3", "chosen on 0", "run: 1"):
        assert part in text.splitlines()[2]
    assert "| scalora | 0.004* | 3 | 0.7700 ± 0.0153 |" in text
    assert "| lora | 0.002 | 3 |" in text
    assert (
        "| scalora | +0.0500 ± 0.0058 | 0.0131 | 28% | -0.1000 ± 0.0289 | 0.0742 | 33% | 15 (75%) | 2 (112%) |" in text
    )
    assert "| lora | **0.002** | 0.4500 | 0.5000 | 1 of 1 |" in text
    assert "| lora | 0.004 | inf |" in text


def test_a_folder_that_is_no_study_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no study"):
        load_study(tmp_path)


# At 0.5 and 0.75 of the steps, final evaluation losses and accuracies of seeds 1, 2 and 3. lora's full runs have means
# of 0.6 and 0.72.
BY_SHARE = {
    "scalora": {0.5: [(0.58, 0.70), (0.62, 0.72), (0.63, 0.71)], 0.75: [(0.62, 0.65), (0.50, 0.82), (0.68, 0.69)]},
    "full": {0.5: [(0.30, 0.70), (0.40, 0.73), (0.50, 0.74)], 0.75: [(0.70, 0.6), (0.70, 0.6), (math.nan, 0.6)]},
}
STEPS = {0.5: 2, 0.75: 3}


def write_study_of_shares(folder, **settings):
    study = write_whole_study(folder, step_shares=[0.75, 0.5], **settings)
    content = yaml.safe_load((study / "study.yaml").read_text())
    content["run"]["training"] = {"max_steps": 4}
    (study / "study.yaml").write_text(yaml.safe_dump(content))
    for method, shares in BY_SHARE.items():
        for share, scores in shares.items():
            for seed, last in enumerate(scores, start=1):
                write_cell(study, method, BEST[method], seed, [(0.9, 0.1)] * (STEPS[share] - 1) + [last], share=share)
    return study


def test_the_share_of_the_steps_at_which_a_method_is_level_with_the_baselines_full_runs(tmp_path):
    result = load_study(write_study_of_shares(tmp_path / "study"))
    table = result.shares.set_index(["method", "share"])
    assert set(table.index) == {("lora", 1.0)} | {(m, s) for m in ("scalora", "full") for s in (0.5, 0.75, 1.0)}
    assert table.loc["scalora", "steps"].to_dict() == {0.5: 20, 0.75: 30, 1.0: 30}
    assert table["seeds"].eq(3).all()
    half = table.loc[("scalora", 0.5)]
    assert [half["metric_mean"], half["metric_se"]] == pytest.approx([0.71, 0.01 / 3**0.5])
    assert half["eval_loss_mean"] == pytest.approx(0.61)
    # Equal means are level, although one is worse by what is rounded.
    assert table.loc[("scalora", 0.75), "eval_loss_mean"] > table.loc[("lora", 1.0), "eval_loss_mean"]
    assert table.loc["scalora", "metric_level"].tolist() == [False, True, True]
    assert table.loc["scalora", "eval_loss_level"].tolist() == [False, True, True]
    # The smallest share counts, whatever becomes of larger ones; a run that diverged is never level.
    assert table.loc["full", "metric_level"].tolist() == [True, False, True]
    assert table.loc["full", "eval_loss_level"].tolist() == [True, False, True]
    assert table.loc["lora", ["metric_level", "eval_loss_level"]].isna().all(axis=None)
    text = markdown(result)
    assert "| full | level with lora at 50 % of its steps | level with lora at 50 % of its steps |" in text
    assert "| scalora | level with lora at 75 % of its steps | level with lora at 75 % of its steps |" in text
    assert "| full | 75 % | 30 | 3 | 0.6000 ± 0.0000 | inf |" in text


def test_for_a_metric_that_should_be_small_a_smaller_mean_is_level(tmp_path):
    shares = load_study(write_study_of_shares(tmp_path / "study", metric="eval_loss")).shares
    assert shares["metric_level"].equals(shares["eval_loss_level"])


def test_level_is_judged_on_the_seeds_that_both_have(tmp_path):
    study = write_study_of_shares(tmp_path / "study")
    for name in ("lr0.004-seed1-share0.75", "lr0.004-seed3-share0.75"):
        (study / "cells" / "scalora" / name / "summary.json").unlink()
    result = load_study(study)
    row = result.shares.set_index(["method", "share"]).loc[("scalora", 0.75)]
    assert row[["seeds", "unfinished"]].tolist() == [1, 2]
    assert row[["metric_level", "eval_loss_level"]].tolist() == [True, True]
    (study / "cells" / "lora" / "lr0.002-seed2" / "summary.json").unlink()
    result = load_study(study)
    row = result.shares.set_index(["method", "share"]).loc[("scalora", 0.75)]
    assert row[["metric_level", "eval_loss_level"]].isna().all()
    assert "| scalora | level with lora at 100 % of its steps so far |" in markdown(result)


def test_a_method_that_is_level_at_no_share_and_one_without_runs(tmp_path):
    study = write_study_of_shares(tmp_path / "study", baseline="full", ceiling=None)
    text = markdown(load_study(study))
    assert "| scalora | not level | not level |" in text
    assert "| lora | not level so far | not level so far |" in text
    for folder in (study / "cells" / "full").iterdir():
        (folder / "summary.json").unlink()
    assert "| scalora | — | — |" in markdown(load_study(study))


def test_runs_over_a_share_of_the_steps_are_in_no_other_table_curve_or_figure(tmp_path):
    plain, study = write_whole_study(tmp_path / "plain"), write_study_of_shares(tmp_path / "study")
    wanted, result = load_study(plain), load_study(study)
    pd.testing.assert_frame_equal(result.table, wanted.table)
    pd.testing.assert_frame_equal(result.sensitivity, wanted.sensitivity)
    assert result.cells["share"].value_counts().to_dict() == {1.0: 18, 0.5: 6, 0.75: 6}
    assert not result.cells.loc[result.cells["share"] < 1, ["tuning", "reported"]].any(axis=None)
    for name in ("cells", "curves", "updates"):
        found = getattr(result, name)
        pd.testing.assert_frame_equal(found[found["share"] == 1].reset_index(drop=True), getattr(wanted, name))
    assert set(result.curves["share"]) == {0.5, 0.75, 1.0}
    figures, expected = read_study(study), read_study(plain)
    pd.testing.assert_frame_equal(figures.cells, expected.cells)
    pd.testing.assert_frame_equal(figures.curves, expected.curves)
    assert "Fewer steps" not in markdown(wanted)


def test_the_shares_are_on_disk(tmp_path):
    study = write_study_of_shares(tmp_path / "study")
    result = write_tables(study)
    written = pd.read_parquet(study / "shares.parquet")
    pd.testing.assert_frame_equal(written, result.shares, check_dtype=False)
    cells = pd.read_parquet(study / "cells.parquet")
    assert set(cells.loc[cells["share"] == 0.5, "folder"]) == {
        f"cells/{method}/lr{BEST[method]}-seed{seed}-share0.5" for method in BY_SHARE for seed in (1, 2, 3)
    }
