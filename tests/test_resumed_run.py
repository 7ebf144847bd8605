"""`scalora train --resume`: the resumed run is the run, with its settings, its data and one record of the whole."""

import json
import shutil

import pytest
import yaml
from conftest import pairs
from safetensors.torch import load_file
from test_broken_input import contents
from typer.testing import CliRunner

from scalora.cli import app
from scalora.runs import train as training

TRAINING = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 2,
}


def scalora(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def error_of(result):
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def write_config(folder, causal_folder, **settings):
    train = folder / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in pairs(16)))
    content = {
        "model": str(causal_folder),
        "output_dir": str(folder / "run"),
        "data": {"train": str(train)},
        "scalora": {"warmup_steps": 0},
        "track_updates": 0,
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(content | settings | {"training": TRAINING | settings.get("training", {})}))
    return config


@pytest.fixture(scope="module")
def trained(causal_folder, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("trained")
    result = scalora("train", write_config(folder, causal_folder))
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def finished(trained, causal_folder, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    config = write_config(tmp_path, causal_folder)
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    settings["data"]["train"] = str(tmp_path / "train.jsonl")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    return config


@pytest.fixture
def stopped(finished, tmp_path):
    """A run that was killed after step 2."""
    for name in ("trainer/checkpoint-4", "model", "delta"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "summary.json").unlink()
    return finished


def read(run, name):
    return json.loads((run / name).read_text())


def losses(run):
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


OTHER = {
    "--learning_rate=5e-2": "training.learning_rate=0.05, but the run to resume has 0.01",
    "--seed=7": "training.seed=7, but the run to resume has 42",
    "--data_seed=7": "training.data_seed=7",
    "--per_device_train_batch_size=2": "a step would have 2 examples, but had 4 in the run to resume: use as",
    "--gradient_accumulation_steps=2": "a step would have 8 examples, but had 4 in the run to resume: use as",
    "--lr_scheduler_type=constant": "training.lr_scheduler_type='constant', but the run to resume has 'linear'",
    "--warmup_steps=2": "training.warmup_steps=2",
    "--optim=sgd": "training.optim='sgd'",
    "--weight_decay=0.1": "training.weight_decay=0.1",
    "--max_grad_norm=0.5": "training.max_grad_norm=0.5",
    "--adam_beta2=0.95": "training.adam_beta2=0.95",
    "--max_length=8": "training.max_length=8",
    "--packing=true": "training.packing=True",
    "--completion_only_loss=false": "training.completion_only_loss=False",
    "--load_best_model_at_end=true": "training.load_best_model_at_end=True",
    "--max_steps=3": "training.max_steps=3, but the run to resume has 4: a run can be resumed with the same number",
    "--max_steps=-1": "training.max_steps=-1, but the run to resume has 4",
    "--scalora.interval=2": "scalora=",
    "--lora.r=4": "lora=",
}


@pytest.mark.parametrize("word", OTHER)
def test_what_would_make_it_another_run_is_refused_by_name(word, finished, tmp_path):
    if word == "--load_best_model_at_end=true":
        word = "--load_best_model_at_end=true --eval_strategy=no --save_strategy=no"
    before = contents(tmp_path)
    error = error_of(scalora("train", finished, "--resume", *word.split()))
    assert error.startswith(f"error: {OTHER[word.split()[0]]}")
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_a_resumed_run_is_one_run_with_one_record(trained, stopped, tmp_path):
    run = tmp_path / "run"
    saved = read(run, "trainer/checkpoint-2/trainer_state.json")["stateful_callbacks"]["scalora.runs"]["attributes"]
    slow = {"seconds": 1000.0, "step_seconds": 500.0, "per_step": 250.0, "peak_memory_bytes": 1 << 45, "loss": 30.0}
    state = read(run, "trainer/checkpoint-2/trainer_state.json")
    state["stateful_callbacks"]["scalora.runs"]["attributes"] = saved | slow
    (run / "trainer/checkpoint-2/trainer_state.json").write_text(json.dumps(state))
    result = scalora("train", stopped, "--resume", "--save_steps", 1, "--logging_steps", 2)
    assert result.exit_code == 0, result.output
    one, other = (load_file(folder / "run" / "model" / "model.safetensors") for folder in (trained, tmp_path))
    assert all(one[name].equal(other[name]) for name in one)
    assert losses(run).keys() == {1, 2, 4}
    assert (run / "trainer" / "checkpoint-3").is_dir()
    assert "warning" not in result.stderr
    logged = losses(trained / "run")
    assert (saved["steps"], saved["loss"]) == (2, pytest.approx(logged[1] + logged[2], rel=1e-3))
    summary, whole = read(run, "summary.json"), read(trained / "run", "summary.json")
    assert summary.keys() == whole.keys()
    assert summary["steps"] == 4
    assert 1000 < summary["training_seconds"] == summary["train_runtime"] < 1100
    assert summary["peak_memory_bytes"] == 1 << 45
    assert summary["seconds_per_step"] == pytest.approx(125, rel=0.02)
    assert summary["train_loss"] == pytest.approx((30 + logged[3] + logged[4]) / 4, rel=1e-3)
    assert summary["train_steps_per_second"] == pytest.approx(4 / summary["training_seconds"])
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert all(last[name] == summary[name] for name in ("train_runtime", "train_loss", "train_samples_per_second"))
    seconds = [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert seconds[1] < 500 < seconds[2]
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["save_steps"] == 1
    environment = read(run, "environment.json")
    (resumed,) = environment.pop("resumed")
    assert resumed["step"] == 2
    assert resumed["changed"] == {"training.save_steps": [2, 1], "training.logging_steps": [1, 2]}
    assert environment == read(trained / "run", "environment.json")


def test_a_finished_run_is_left_as_it_is(finished, tmp_path):
    before = contents(tmp_path)
    for flags in ([], ["--save_steps", 1]):
        result = scalora("train", finished, "--resume", *flags)
        assert result.exit_code == 0, result.output
        assert "is finished: nothing is trained or written" in result.stderr
        assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["scalora", "lora"])
def test_a_run_stopped_after_its_last_step_trains_no_further(method, causal_folder, tmp_path, monkeypatch):
    # Not the end of an epoch, after which the Trainer has no next step to take.
    config = write_config(tmp_path, causal_folder, method=method, training={"max_steps": 3, "save_steps": 3})

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_results", stop)
        assert scalora("train", config).exit_code != 0
    run = tmp_path / "run"
    assert not (run / "summary.json").exists()
    before = contents(run / "trainer"), losses(run)
    result = scalora("train", config, "--resume")
    assert result.exit_code == 0, result.output
    assert (contents(run / "trainer"), losses(run)) == before
    summary = read(run, "summary.json")
    assert summary["steps"] == 3
    assert summary["train_loss"] == pytest.approx(sum(losses(run).values()) / 3, rel=1e-3)
    adapter = load_file(run / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())


@pytest.mark.slow
def test_a_longer_run_keeps_the_earlier_results_and_says_what_its_schedule_was(finished, tmp_path):
    run = tmp_path / "run"
    before = contents(run)
    result = scalora("train", finished, "--resume", "--max_steps", 6)
    assert result.exit_code == 0, result.output
    assert "warning: the run is made longer: up to step 4 its learning rates (linear) are those of the" in result.stderr
    assert losses(run).keys() == {1, 2, 3, 4, 5, 6}
    assert read(run, "summary.json")["steps"] == 6
    kept = contents(run / "results.earlier-1")
    assert kept["summary.json"] == before["summary.json"]
    assert kept["model/model.safetensors"] == before["model/model.safetensors"]
    assert read(run, "environment.json")["resumed"][0]["changed"] == {"training.max_steps": [4, 6]}
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["max_steps"] == 6


def test_other_data_under_the_same_name_are_refused(stopped, tmp_path):
    rows = pairs(16)
    rows[9]["completion"] = " pink"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = contents(tmp_path)
    assert "data.train has changed since the run to resume began (16 examples then, 16 now)" in error_of(
        scalora("train", stopped, "--resume")
    )
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_a_step_may_be_put_together_from_other_batches(trained, stopped, tmp_path):
    words = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2)
    result = scalora("train", stopped, "--resume", *words)
    assert result.exit_code == 0, result.output
    one, other = (load_file(folder / "run" / "model" / "model.safetensors") for folder in (trained, tmp_path))
    assert all((one[name] - other[name]).norm() <= 1e-5 * one[name].norm() for name in one)


def test_another_number_of_examples_in_a_step_is_refused(stopped, tmp_path):
    environment = read(tmp_path / "run", "environment.json")
    (tmp_path / "run" / "environment.json").write_text(json.dumps(environment | {"examples_per_step": 8}))
    assert "a step would have 4 examples, but had 8" in error_of(scalora("train", stopped, "--resume"))


def test_checkpoints_without_an_optimizer_can_t_be_resumed_from(stopped, tmp_path):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (tmp_path / "run" / "trainer" / "checkpoint-2" / name).unlink()
    before = contents(tmp_path)
    result = scalora("train", stopped, "--resume")
    assert "there is no whole checkpoint" in error_of(result)
    assert "it holds the model without the optimizer's state" in result.stderr
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_a_run_from_before_totals_were_kept_says_what_its_summary_leaves_out(stopped, tmp_path):
    path = tmp_path / "run" / "trainer" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["scalora.runs"]
    path.write_text(json.dumps(state))
    result = scalora("train", stopped, "--resume")
    assert result.exit_code == 0, result.output
    assert "warning: the checkpoint of step 2 does not say what the run took up to there" in result.stderr


def test_resuming_is_recorded_only_once_the_checkpoint_is_loaded(stopped, tmp_path, monkeypatch):
    def fail(*arguments, **settings):
        raise OSError("the checkpoint can't be loaded")

    before = contents(tmp_path)
    monkeypatch.setattr("scalora.integrations.transformers.read_state", fail)
    assert "can't be loaded" in error_of(scalora("train", stopped, "--resume", "--max_steps", 6))
    assert contents(tmp_path) == before
