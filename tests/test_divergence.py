"""A run that went wrong says so: what is not finite stops it, and a run that never rescaled is named."""

import json
import math
import re

import pytest
import torch
import yaml
from conftest import pairs
from safetensors.torch import load_file
from typer.testing import CliRunner

from scalora import ScaLoraCallback
from scalora.cli import app
from scalora.runs import train as training
from scalora.runs.divergence import first_not_finite
from scalora.runs.run_folder import write_json
from scalora.saving.state_file import read_state, write_state

TRAINING = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2}


def scalora(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def write_config(causal_folder, write_jsonl, tmp_path):
    def write(**settings):
        data = {"train": str(write_jsonl("train.jsonl", pairs(24)))} | settings.pop("data", {})
        content = {"model": str(causal_folder), "output_dir": str(tmp_path / "run"), "data": data, "track_updates": 0}
        content |= {"scalora": {"warmup_steps": 0}} | settings | {"training": TRAINING | settings.get("training", {})}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def lines(run):
    """The lines of metrics; a NaN or Infinity in them would not be JSON."""

    def not_json(word):
        raise ValueError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=not_json) for line in (run / "metrics.jsonl").read_text().splitlines()]


def diverged(result, run, step):
    """The error of a run that diverged at a step and has left no result."""
    assert result.exit_code == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(rf"error: training diverged: .* at step {step} of 6\. No result is written; ", error), error
    for word in ("learning_rate", "warm-up", "max_grad_norm", "data", "--overwrite"):
        assert word in error
    assert not {path.name for path in run.iterdir()} & {"summary.json", "model", "delta", "adapter"}
    assert json.loads((run / "diverged.json").read_text()) == {"step": step, "error": error.removeprefix("error: ")}
    return error


def break_at(step, what, monkeypatch):
    """Have a trainer meet a number that is not finite at a step."""
    make = training._adapt

    def adapt(run, base):
        trainer = make(run, base)
        take = trainer.training_step

        def training_step(*arguments, **options):
            loss = take(*arguments, **options)
            if trainer.state.global_step + 1 == step:
                if what == "loss":
                    return loss * math.nan
                if what == "gradient":
                    next(p for p in trainer.model.parameters() if p.grad is not None).grad.fill_(math.inf)
                if what == "weight":
                    next(p for p in trainer.model.parameters() if p.requires_grad).data[0, 0] = math.nan
                if what == "frozen weight":
                    next(p for p in trainer.model.parameters() if not p.requires_grad).data[-1, 0] = -math.inf
            return loss

        trainer.training_step = training_step
        return trainer

    monkeypatch.setattr(training, "_adapt", adapt)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "settings", "step"),
    [
        ("loss", {}, 3),
        ("loss", {"logging_steps": 100}, 3),
        ("loss", {"logging_strategy": "no"}, 3),
        ("loss", {"logging_nan_inf_filter": True}, 3),
        ("loss", {"logging_strategy": "epoch", "save_strategy": "epoch"}, 3),
        ("gradient", {"max_grad_norm": 0}, 3),
        ("weight", {"logging_strategy": "no"}, 6),  # at the end
        ("frozen weight", {"logging_strategy": "no"}, 6),
    ],
)
def test_what_is_not_finite_stops_the_run(what, settings, step, write_config, tmp_path, monkeypatch):
    break_at(6 if step == 6 else 3, what, monkeypatch)
    method = "lora" if what == "gradient" else "scalora"
    result = scalora("train", write_config(method=method, training=settings))
    assert "no checkpoint was written before" in diverged(result, tmp_path / "run", step)
    if (tmp_path / "run" / "metrics.jsonl").exists():
        assert len(lines(tmp_path / "run")) in range(1, step + 1)


@pytest.mark.slow
def test_the_last_good_checkpoint_is_named_and_none_is_written_after_it(write_config, tmp_path, monkeypatch):
    break_at(4, "weight", monkeypatch)
    result = scalora("train", write_config(training={"save_strategy": "steps", "save_steps": 2, "logging_steps": 10}))
    good = tmp_path / "run" / "trainer" / "checkpoint-2"
    assert f"the last good one is {str(good)!r}" in diverged(result, tmp_path / "run", 4)
    assert [path.name for path in (tmp_path / "run" / "trainer").glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(tensor.isfinite().all() for tensor in load_file(good / "scalora_state.safetensors").values())


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut off", "not finite"])
def test_a_checkpoint_that_is_no_good_is_not_named(damage, write_config, tmp_path, monkeypatch):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step != 4:
            return
        latest = tmp_path / "run" / "trainer" / "checkpoint-4"
        if damage == "cut off":
            (latest / "trainer_state.json").unlink()
            return
        content = read_state(latest)
        content["tensors"] = {name: tensor * math.nan for name, tensor in content["tensors"].items()}
        write_state(latest / "scalora_state.safetensors", content)

    break_at(5, "loss", monkeypatch)
    monkeypatch.setattr(ScaLoraCallback, "on_save", on_save)
    result = scalora("train", write_config(training={"save_strategy": "steps", "save_steps": 2}))
    assert "checkpoint-2'" in diverged(result, tmp_path / "run", 5)


@pytest.mark.slow
def test_an_evaluation_that_is_not_finite_is_said_and_the_finite_model_is_kept(write_config, tmp_path, monkeypatch):
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(json.dumps(pairs(1)[0]) + "\n")
    make = training._adapt

    def adapt(run, base):
        trainer = make(run, base)
        loop = trainer.evaluation_loop

        def evaluation_loop(*arguments, **options):
            output = loop(*arguments, **options)
            output.metrics["eval_loss"] = math.inf
            return output

        trainer.evaluation_loop = evaluation_loop
        return trainer

    monkeypatch.setattr(training, "_adapt", adapt)
    result = scalora("train", write_config(data={"eval": str(evaluation)}, training={"max_steps": 2}))
    assert result.exit_code == 0, result.output
    assert result.stderr.count("warning: eval_loss is inf at step 2, although") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["eval_loss"] is None
    assert any(line.get("eval_loss", 0) is None for line in lines(tmp_path / "run"))
    assert re.search(r"evaluation loss +not finite", result.stdout)


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    write_json(tmp_path / "f.json", {"a": math.nan, "b": [1.5, math.inf, {"c": -math.inf}], "d": "NaN", "e": True})
    text = (tmp_path / "f.json").read_text()
    assert json.loads(text) == {"a": None, "b": [1.5, None, {"c": None}], "d": "NaN", "e": True}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_mask_may_be_infinite_and_nothing_else(value):
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2,), -math.inf))
    assert first_not_finite(model) is None
    model.weight.data[1, 1] = value
    assert first_not_finite(model) == "weight"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "first"),
    [({"warmup_steps": 6}, 7), ({"warmup_steps": 10}, 11), ({"warmup_steps": 0, "interval": 7}, 7)],
)
def test_a_run_too_short_to_rescale_is_said_before_it_trains(settings, first, write_config):
    config = write_config(scalora=settings, save_model=False)
    for flags in (["--dry-run"], []):
        result = scalora("train", config, *flags)
        assert result.exit_code == 0, result.output
        (said,) = [line for line in result.stderr.splitlines() if "this run of 6 steps never rescales" in line]
        assert said.startswith("warning: ")
        assert f"the first rescale is at step {first};" in said
    assert "never rescales" not in scalora("train", config, "--dry-run", "--max_steps", first).stderr
