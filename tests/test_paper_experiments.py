import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "paper"))
bench, problems, synthetic = (importlib.import_module(name) for name in ("bench", "problems", "synthetic"))

LORA = bench.Setting("LoRA", "momentum")
SCALORA = bench.Setting("ScaLoRA", "momentum", target_norm=0.25)
FULL = bench.Setting("full", "momentum")


def only(setting, rate, seed=10, steps=200):
    (run,) = bench.train(problems.LinearProblem, setting, [rate], [seed], steps)
    return run


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_the_floor_is_the_risk_of_the_best_update_of_its_rank(rank):
    problem = problems.LinearProblem(0)
    student = problem.student()
    root, update = problem._root, problem._teacher - problem._weight
    U, values, Vh = torch.linalg.svd(update @ root)
    best = (U[:, :rank] * values[:rank]) @ Vh[:rank] @ torch.linalg.inv(root)
    assert problem.risk(student) == pytest.approx(1, abs=1e-5)
    student[0].weight.data += best
    assert problem.risk(student) == pytest.approx(problem.floor[rank], abs=1e-5)


def test_the_risk_is_the_mean_over_inputs_drawn_as_in_training():
    problem = problems.LinearProblem(0)
    student = problem.student()
    with torch.no_grad():
        draws = [(student(x) - y).square().sum(1).mean() for x, y in (problem.batch() for _ in range(300))]
    noise = 64 * 0.05**2
    assert (torch.stack(draws).mean() - noise) / problem._start == pytest.approx(problem.risk(student), rel=0.03)


@pytest.mark.slow
def test_lora_stops_at_the_best_of_its_rank_and_scalora_goes_below_it():
    floor = problems.LinearProblem(10).floor[4]
    lora, scalora, full = only(LORA, 0.16), only(SCALORA, 0.64), only(FULL, 0.02)
    assert floor <= lora.risks[-1] < floor + 0.02
    assert lora.numerical_rank == 4
    assert scalora.risks[-1] < floor / 2
    assert scalora.effective_ranks[-1] > 3 * lora.effective_ranks[-1]
    assert full.risks[-1] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("setting", [FULL, LORA, SCALORA], ids=lambda setting: setting.method)
def test_a_copy_does_not_see_its_neighbours_not_even_one_that_diverges(setting):
    alone = only(setting, 0.04, steps=40)
    runs = bench.train(problems.LinearProblem, setting, [0.04, 1e3], [10, 11], 40)
    assert runs[0].risks == pytest.approx(alone.risks, rel=1e-3)
    assert math.isinf(runs[2].risks[-1])


@pytest.mark.parametrize("start", ["zero", "random", "oracle"])
def test_a_start_keeps_the_function(start):
    setting = replace(LORA, start=start, target_norm=0.25)
    assert only(setting, 1e-9, steps=10).risks == pytest.approx([1] * 10, abs=1e-5)


@pytest.mark.slow
def test_a_nonzero_start_lets_lora_reach_twice_its_rank():
    ranks = {start: only(replace(LORA, start=start), 0.1).numerical_rank for start in ("zero", "random")}
    assert ranks == {"zero": 4, "random": 8}


@pytest.mark.slow
def test_shares_are_of_the_scaling_that_was_taken():
    settings = (replace(SCALORA, mode="column"), replace(SCALORA, mode="scalar"), LORA)
    column, scalar, plain = (only(setting, 0.32, steps=40) for setting in settings)
    assert column.column_share > 0.5
    assert column.scalar_share == 0
    assert scalar.column_share == 0
    assert scalar.scalar_share > 0.5
    assert math.isnan(plain.column_share)


@pytest.mark.slow
def test_a_normalised_column_has_the_target_norm():
    setting = replace(SCALORA, method="normalised columns")
    assert only(setting, 0.04, steps=40).column_norm == pytest.approx(0.25)


@pytest.mark.slow
def test_a_grid_grows_until_its_best_is_inside():
    log = []
    tuned = bench.Search(problems.LinearProblem, 30, [0], rates=3, extensions=8).rate(
        bench.Setting("full", "SGD"), 0.05, log
    )
    assert tuned.inside
    assert min(tuned.tried) < tuned.rate < max(tuned.tried)
    assert len(log) == len(tuned.tried) > 3
    assert tuned.risk == min(tuned.tried.values())


@pytest.mark.slow
def test_a_grid_that_may_not_grow_says_that_its_best_is_its_last():
    search = bench.Search(problems.LinearProblem, 20, [0], rates=3, extensions=0, value_extensions=0)
    tuned = search.rate_and_value(SCALORA, "target_norm", [0.125, 0.25], 1e-4, [])
    assert not tuned.inside
    assert not tuned.value_inside
    assert set(tuned.by_value) == {0.125, 0.25}


@pytest.mark.slow
def test_the_command_writes_runs_a_table_and_a_figure_of_every_experiment(tmp_path):
    synthetic.main(["--small", "--output", str(tmp_path)])
    for name in synthetic.EXPERIMENTS:
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert {"setting", "rate", "seed", "risks", "effective_ranks"} <= rows[0].keys()
        assert {row["seed"] for row in rows} == {0, 10, 11}
        assert "AdamW |" in (tmp_path / f"{name}.md").read_text()
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
