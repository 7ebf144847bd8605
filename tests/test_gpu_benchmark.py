"""benchmarks/gpu.sh: all of it at toy size on the CPU, its pool of processes, its order of runs and its tables."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu import report
from gpu.pool import answers
from gpu.studies import Cell, Studies
from gpu.tables import paired_p, t_probability, tables
from hypothesis import given
from hypothesis import strategies as st
from pool_jobs import worker
from scipy import stats

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"

# Libraries of the commands and of the tests, which a machine with a GPU need not have.
NOT_NEEDED = ("pydantic", "trl", "datasets", "typer", "rich", "beartype", "pandas", "hypothesis")


@pytest.mark.slow
def test_the_script_runs_at_toy_size_with_torch_and_peft_alone(tmp_path):
    # Python imports this at its start, in every process.
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({NOT_NEEDED}))\n")
    command = ["bash", SCRIPT, "--toy", "--output", tmp_path / "out", "--minutes", "10", "--parts", "steps,cities"]
    done = subprocess.run(
        [*command, "--workers", "1"],
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    steps = results["steps"]
    assert [(row["method"], row["checkpointing"]) for row in steps["steps"]] == [
        (method, checkpointing)
        for checkpointing in (False, True)
        for method in ("LoRA", "ScaLoRA, dense, I = 1", "block signs, PairAdamW", "ScaLoRA, matrices, factored, I = 10")
    ]
    assert all(seconds > 0 for row in steps["steps"] for seconds in row["seconds"] + row["baseline_seconds"])
    (rescale,) = steps["rescales"]
    assert all(rescale["parts"][part] > floor > 0 for part, floor in rescale["floor"].items())
    counted = {(row["method"], row["layers"]): row for row in steps["launches"]}
    assert sum(counted["LoRA", 2]["in_parts"].values()) == 0
    assert sum(counted["ScaLoRA, dense, I = 1", 2]["in_parts"].values()) > 100
    assert steps["left_out"] == []
    # Two rates and one seed more of lora, one rate and one seed more of the others; and the shares.
    assert len(results["cities"]) == (2 + 1) + 3 * 2 + 4 * 2
    for row in results["cities"]:
        assert row["error"] == ""
        assert 0 <= row["result"]["accuracy"] <= 1
        assert math.isfinite(row["result"]["loss"])
        assert row["run"]["steps"] == round(5 * row["cell"]["share"])
    text = (tmp_path / "out" / "gpu.md").read_text()
    for heading in (
        "## Steps",
        "With gradient checkpointing:",
        "## Training",
        "### toy",
        "| scalora, matrix | 0.001 | 2/2",
    ):
        assert heading in text


def test_a_pool_goes_on_after_jobs_that_fail_and_ends_those_that_hang():
    jobs = [{"what": what} for what in ("raise", "Ada", "die", "Bob", "hang")]
    start = time.monotonic()
    found = {
        answer.job["what"]: answer
        for answer in answers(worker, ("hello",), 1, lambda: jobs.pop(0) if jobs else None, start + 5)
    }
    assert time.monotonic() - start < 15
    assert found["raise"].error == "ValueError: no luck"
    assert found["Ada"].result["said"] == "hello Ada"
    assert found["die"].error == "its process ended with exit code 3"
    assert found["Bob"].result["said"] == "hello Bob"
    assert found["Bob"].result["process"] != found["Ada"].result["process"]
    assert "hang" not in found


def test_a_pool_whose_processes_all_die_gives_up():
    found = list(answers(worker, ("hello",), 2, lambda: {"what": "die"}, time.monotonic() + 60))
    assert 0 < len(found) <= 8
    assert {answer.error for answer in found} == {"its process ended with exit code 3"}


def study(**settings):
    common = {
        "task": "t",
        "head_rate": 0.1,
        "batch": 8,
        "steps": 10,
        "warmup": 2,
        "rates": [1, 2, 3],
        "seeds": [0, 1, 2],
    }
    return common | {"methods": {"one": {}, "two": {"rates": [4, 5]}, "three": {"seeds": [1]}}} | settings


losses = st.dictionaries(
    st.tuples(st.sampled_from(["one", "two", "three"]), st.integers(1, 5)),
    st.one_of(st.floats(0, 10), st.just(math.nan), st.none()),
)


@given(losses=losses, tuning_seeds=st.sampled_from([[0], [0, 1]]), shares=st.sampled_from([[1], [0.5, 1]]))
def test_every_run_is_given_out_once_and_seeds_only_at_the_best_rate(losses, tuning_seeds, shares):
    studies = Studies({"s": study(tuning_seeds=tuning_seeds, shares=shares)}, {})
    given_out = []
    while (cell := studies.next_cell()) is not None:
        given_out.append(cell)
        loss = losses.get((cell.method, cell.rate), 5.0)
        studies.results[cell] = None if loss is None else {"loss": loss}
    assert len(given_out) == len(set(given_out))
    for method, rates, seeds in (("one", [1, 2, 3], [0, 1, 2]), ("two", [4, 5], [0, 1, 2]), ("three", [1, 2, 3], [1])):
        tried = {rate: losses.get((method, rate), 5.0) for rate in rates}
        finite = {rate: loss for rate, loss in tried.items() if loss is not None and math.isfinite(loss)}
        best = min(finite, key=finite.get) if finite else None
        assert studies.best_rate("s", method) == best
        expected = {Cell("s", method, rate, seed, 1) for rate in rates for seed in tuning_seeds}
        expected |= {Cell("s", method, best, seed, share) for seed in seeds for share in shares if best is not None}
        assert {cell for cell in given_out if cell.method == method} == expected


def test_results_of_an_earlier_attempt_are_not_computed_again():
    first = Studies({"s": study()}, {})
    done = {first.next_cell(): {"loss": 1.0} for _ in range(4)}
    second = Studies({"s": study()}, done)
    assert second.next_cell() not in done


def test_a_share_of_the_steps_has_its_share_of_the_warm_up():
    run = Studies({"s": study()}, {}).run(Cell("s", "two", 4, 1, 0.5))
    assert run == {"task": "t", "head_rate": 0.1, "batch": 8, "steps": 5, "warmup": 1, "rate": 4, "seed": 1}


def test_a_study_without_something_that_its_runs_need_is_refused():
    wrong = study()
    del wrong["warmup"]
    with pytest.raises(ValueError, match="study 's' lacks 'warmup'"):
        Studies({"s": wrong}, {})


@given(t=st.floats(-50, 50), freedom=st.integers(1, 40))
def test_probabilities_of_students_t_are_scipys(t, freedom):
    # SciPy's own error is 3e-9 at t = 1e-8 with one degree of freedom, where 1 − (2/π)·arctan(t) is the probability.
    assert t_probability(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), abs=1e-8)
    if freedom == 1:
        assert t_probability(t, freedom) == pytest.approx(1 - 2 / math.pi * math.atan(abs(t)), abs=1e-12)


def test_tables_compare_methods_at_their_best_rates_seed_by_seed():
    studies = Studies({"s": study(methods={"lora": {}, "other": {"rates": [4, 5]}}, shares=[0.5, 1])}, {})
    while (cell := studies.next_cell()) is not None:
        gain = 0.0 if cell.method == "lora" else (0.1, 0.2, 0.15)[cell.seed]
        score = 0.5 + 0.1 * cell.seed + gain
        loss = 1 - score + abs(cell.rate - 2) % 2 / 10
        studies.results[cell] = {"accuracy": score, "loss": loss, "train_loss": 1.0, "seconds": 3.0}
    text = tables(studies)
    p = stats.ttest_rel([0.6, 0.8, 0.85], [0.5, 0.6, 0.7]).pvalue
    assert paired_p([0.1, 0.2, 0.15]) == pytest.approx(p)
    assert "| lora | 2 | 3/3 | 0.6000 ± 0.0577 | 0.4000 ± 0.0577 |" in text
    assert (
        f"| other | 4* | 3/3 | 0.7500 ± 0.0764 | 0.2500 ± 0.0764 | 1.0000 ± 0.0000 | +0.1500 ± 0.0289 | {p:.2g} |"
        in text
    )
    assert "| method | 50 % | 100 % |" in text


def test_the_report_names_the_tests_that_failed():
    log = "..F\nFAILED tests/test_gpu.py::test_a - AssertionError\n1 failed, 2 passed, 3 skipped in 4.56s\n"
    assert report.tests_of(log) == {
        "summary": "1 failed, 2 passed, 3 skipped in 4.56s",
        "failed": "- FAILED tests/test_gpu.py::test_a - AssertionError",
    }
    assert (
        report.tests_of("== 1 passed, 2 warnings in 61.23s (0:01:01) ==")["summary"] == "1 passed, 2 warnings in 61.23s"
    )
    assert report.tests_of("ImportError") == {"summary": "pytest did not come to an end"}
