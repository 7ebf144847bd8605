"""`scalora bench`: what it measures, what it writes, what it refuses; the floor against arithmetic by hand."""

import json
import time

import pytest
import torch
from typer.testing import CliRunner

from scalora.bench.case import Case, Contender
from scalora.bench.floor import Work, rescale_work
from scalora.bench.measure import interleaved_steps, rescale_parts
from scalora.bench.results import Steps
from scalora.bench.settings import interval_of
from scalora.cli import app

SMALL = ["--width", "64", "--layers", "1", "--sequence", "8", "--batch", "1", "--rounds", "2", "--device", "cpu"]


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def case(**settings):
    defaults = {"model": None, "width": 64, "layers": 1, "rank": 4, "batch": 1, "sequence": 8, "dtype": "float32"}
    return Case(**(defaults | {"merge": "auto", "device": "cpu"} | settings))


@pytest.mark.slow
def test_every_method_is_measured_in_every_case_beside_lora_and_a_rescale_beside_its_floor(tmp_path):
    axes = ["--rank", "4", "--rank", "8", "--dtype", "float32", "--dtype", "bfloat16"]
    methods = ["--method", "scalora", "--method", "scalora:2", "--method", "dora", "--method", "relora"]
    others = ["--method", "hira", "--method", "mora", "--method", "full"]
    result = bench(*SMALL, *axes, *methods, *others, "--no-memory", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "bench.json").read_text())
    names = ["lora", "scalora", "scalora:2", "dora", "relora", "hira", "mora", "full"]
    cases = ["base", "rank 8", "dtype bfloat16"]
    assert [(row["case"], row["method"]) for row in measured["steps"]] == [(c, n) for c in cases for n in names]
    for row in measured["steps"]:
        assert len(row["seconds"]) == 2
        assert all(len(steps) == 2 and min(steps) > 0 for steps in row["seconds"])
    assert [row["case"] for row in measured["rescales"]] == cases
    for row in measured["rescales"]:
        assert sum(row["parts"].values()) > sum(row["floor"].values()) > 0
    assert measured["environment"]["bandwidth"] > 1e8
    assert "never rescales" not in result.output
    text = (tmp_path / "bench.md").read_text()
    assert text.strip() in result.output
    assert "| rank 8 | scalora:2 |" in text
    for name in ("steps.svg", "rescale.svg"):
        assert "<svg" in (tmp_path / name).read_text()


@pytest.mark.slow
def test_peak_memory_is_each_methods_own(tmp_path):
    # Full fine-tuning keeps two moments and a gradient for each weight, 12 bytes, and AdamW's step takes two copies
    # more; LoRA keeps next to nothing.
    wide = ["--width", "512", "--layers", "4", "--sequence", "8", "--batch", "1", "--rounds", "1", "--device", "cpu"]
    result = bench(*wide, "--method", "full", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    lora, full = json.loads((tmp_path / "bench.json").read_text())["steps"]
    parameters = sum(p.numel() for p in case(width=512, layers=4).base().parameters())
    difference = full["peak_memory"] - lora["peak_memory"]
    assert 8 * parameters < difference < 24 * parameters


class Sleeper:
    """A contender whose rescale, at every second step, takes most of its time."""

    def __init__(self, name, seconds):
        self.name, self._seconds, self.steps = name, seconds, 0

    def step(self):
        self.steps += 1
        return self._seconds * (9 if self.steps % interval_of(self.name) == 0 else 1)


def test_a_rescale_counts_with_all_the_steps_that_it_is_for():
    contenders = [Sleeper("lora", 1.0), Sleeper("scalora:2", 1.0), Sleeper("scalora:3", 1.0)]
    rounds = list(interleaved_steps(contenders, 3))
    twos, threes = [1.0, 9.0] * 3, [1.0, 1.0, 9.0] * 2
    # Two steps come before the first round, which shifts where a rescale falls, alike in every round.
    assert rounds == [{"lora": [9.0] * 6, "scalora:2": twos, "scalora:3": threes[2:] + threes[:2]}] * 3


def test_a_disturbed_step_does_not_count_and_a_rescale_does():
    lora = [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 50.0, 1.0], [2.0, 2.0, 2.0, 2.0]]
    scalora = [[1.0, 1.0, 1.0, 5.0], [90.0, 1.0, 50.0, 5.0], [2.0, 2.0, 2.0, 10.0]]
    row = Steps("base", "scalora:4", scalora, lora, None, None)
    assert row.ratio == (1 + 1 + 1 + 5) / 4
    assert row.per_step == (2 + 1 + 2 + 5) / 4
    assert row.middle_half == (1.0, 5.0)


@pytest.mark.slow
def test_the_parts_of_a_rescale_are_those_of_the_clock():
    setting = case(width=256, layers=2)
    contender = Contender("scalora", setting.base(), setting)
    parts = rescale_parts(contender)
    plain = Contender("lora", setting.base(), setting)
    seconds = {}
    for it in (plain, contender):
        it.step()
        it.backward()
        start = time.perf_counter()
        for _ in range(5):
            it.optimizer.step()
        seconds[it.name] = (time.perf_counter() - start) / 5
    whole = seconds["scalora"] - seconds["lora"]
    assert 0.3 * whole < sum(parts.values()) < 4 * whole
    assert all(part > 0 for part in parts.values())


@pytest.mark.parametrize("width", [64, 256, 512, 1024])
def test_a_model_of_any_width_runs(width):
    model = case(width=width, layers=1).base()
    assert model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()


def test_a_contender_trains_as_its_method_does():
    setting = case(rank=2)
    states = {}
    for name in ("lora", "scalora", "scalora:3"):
        torch.manual_seed(0)
        contender = Contender(name, setting.base(), setting)
        weight = next(p for n, p in contender.model.named_parameters() if n.endswith("base_layer.weight"))
        before = weight.clone()
        changed = []
        for _ in range(4):
            assert contender.step() > 0
            changed.append(not torch.equal(weight, before))
        states[name] = changed
    # The first step from lora_B = 0 has nothing to rescale.
    assert states == {
        "lora": [False] * 4,
        "scalora": [False, True, True, True],
        "scalora:3": [False, False, True, True],
    }


def test_the_floor_is_every_byte_once_and_every_operation_once():
    m, n, r = 300, 200, 8
    dense = rescale_work(m, n, r, weight_bytes=4)
    assert dense.merge == Work(2 * 4 * m * n + 4 * (m + n) * r, 2 * m * n * r)
    # Adapter, gradient and two moments, read and written; A, B and their gradients read for the Grams.
    assert dense.transport.bytes == 4 * 2 * 4 * (m + n) * r
    assert dense.grams.bytes == 2 * 4 * (m + n) * r
    assert rescale_work(m, n, r, weight_bytes=4, moments=1).transport.bytes == 3 * 2 * 4 * (m + n) * r
    factored = rescale_work(m, n, r, weight_bytes=2, remainder_rank=64)
    assert factored.merge.bytes < dense.merge.bytes
    assert factored.merge.flops > dense.merge.flops  # the compressions
    assert Work(100, 50).seconds(10, 1) == 50
    assert Work(100, 50).seconds(1, 10) == 100
    assert (dense + dense).seconds(1, 1e30) == pytest.approx(2 * sum(part.bytes for part in dense))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lorra"], "--method 'lorra': the methods are scalora, lora,"),
        (["--method", "scalora:0"], "--method 'scalora:0': the interval after the colon"),
        (["--method", "scalora:x"], "--method 'scalora:x': the interval after the colon"),
        (["--dtype", "float8"], "--dtype 'float8': the dtypes are float32"),
        (["--merge", "sparse"], "--merge 'sparse': must be one of auto, dense, dense_8bit, stochastic, factored"),
        (["--device", "abacus"], "--device 'abacus' can't be used"),
        (["--rank", "0"], "'--rank'"),
        (["no/such/model"], "no/such/model"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(arguments, message, tmp_path):
    result = bench(*arguments, "--rounds", "1", "--output", str(tmp_path / "out"))
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_matrix_scaling_with_pair_adamw_is_a_contender(tmp_path):
    result = CliRunner().invoke(
        app,
        f"bench --output {tmp_path} --width 64 --layers 1 --sequence 8 --batch 1 --rounds 2 "
        "--method scalora+pair_adamw:2 --method lora+pair_adamw --no-memory",
    )
    assert result.exit_code == 0, result.output
    steps = json.loads((tmp_path / "bench.json").read_text())["steps"]
    assert [row["method"] for row in steps] == ["lora", "scalora+pair_adamw:2", "lora+pair_adamw"]


def test_another_optimizer_is_no_contender(tmp_path):
    result = CliRunner().invoke(app, ["bench", "--output", str(tmp_path), "--method", "scalora+sgd"])
    assert result.exit_code != 0
    assert "pair_adamw" in result.output
