"""A stopped run goes on as if it had not stopped: Trainer checkpoints, the engine's own state, the command, kills."""

import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from conftest import WORDS
from datasets import Dataset
from models import TwoLayers, tiny_llama, trainable, with_lora
from test_broken_input import contents
from torch import nn
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from scalora import ScaLora, ScaLoraCallback, ScaLoraConfig, StateError, last_checkpoint
from scalora.cli import app
from scalora.saving.checkpoints import set_broken_checkpoints_aside

MERGES = ["dense", "factored"]


def data(count=32):
    ids = torch.randint(0, 64, (count, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 8} for row in ids])


def trainer(folder, merge="dense", callbacks=None, base_seed=0, **settings):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    model = with_lora(
        tiny_llama(base_seed), r=2, target_modules="all-linear", lora_dropout=0.1, random_B=False, seed=base_seed
    )
    if callbacks is None:
        callbacks = [ScaLoraCallback(ScaLoraConfig(warmup_steps=1, merge=merge))]
    return Trainer(
        model,
        TrainingArguments(**arguments | settings),
        train_dataset=data(),
        eval_dataset=data(8),
        callbacks=callbacks,
    )


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("merge", MERGES)
def test_a_resumed_trainer_ends_with_the_same_weights(merge, tmp_path):
    alone = trainer(tmp_path / "alone", merge)
    alone.train()
    first = trainer(tmp_path / "run", merge)
    first.args.max_steps = 8
    first.train()
    for folder in (tmp_path / "run" / "checkpoint-8", tmp_path / "run" / "checkpoint-6"):
        folder.rename(folder.with_name(f"later-{folder.name}"))
    second = trainer(tmp_path / "run", merge, base_seed=0)
    second.train(resume_from_checkpoint=True)
    assert_same(weights(second.model), weights(alone.model))
    assert second.state.log_history[-2]["scalora/rescales"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("merge", MERGES)
def test_the_best_model_is_loaded_at_the_end(merge, tmp_path):
    run = trainer(tmp_path, merge, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    run.train()
    losses = {log["step"]: log["eval_loss"] for log in run.state.log_history if "eval_loss" in log}
    best = min(losses, key=losses.get)
    assert best != 8, losses
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_off_is_set_aside_and_the_one_before_is_used(tmp_path):
    trainer(tmp_path).train()
    for name in ("optimizer.pt", "scalora_state.safetensors"):
        last = tmp_path / f"checkpoint-{8 if name == 'optimizer.pt' else 6}"
        content = (last / name).read_bytes()
        (last / name).write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="is skipped") as warned:
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert len([w for w in warned if "skipped" in str(w.message)]) == 2
    resumed = trainer(tmp_path)
    assert not list(tmp_path.glob("incomplete-*"))  # a Trainer that is merely made touches nothing
    with pytest.warns(UserWarning, match="set aside"):
        resumed.train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.glob("incomplete-*")} == {
        "incomplete-checkpoint-6",
        "incomplete-checkpoint-8",
    }
    assert resumed.state.global_step == 8


@pytest.mark.slow
def test_whole_checkpoints_of_the_model_alone_are_kept_and_not_resumed_from(tmp_path):
    trainer(tmp_path, save_only_model=True).train()
    before = contents(tmp_path)
    resumed = trainer(tmp_path, save_only_model=True)
    for checkpoint in (True, str(tmp_path / "checkpoint-4")):
        with pytest.raises(StateError, match="the model without the optimizer's state"):
            resumed.train(resume_from_checkpoint=checkpoint)
    with pytest.warns(UserWarning, match="is skipped: it holds the model"):
        assert last_checkpoint(tmp_path) is None
    assert contents(tmp_path) == before


def test_a_checkpoint_that_another_process_sets_aside_meanwhile_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-3").mkdir()
    rename = Path.rename

    def too_late(self, target):
        rename(self, tmp_path / "incomplete-checkpoint-3")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", too_late)
    set_broken_checkpoints_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["incomplete-checkpoint-3"]


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_off_is_refused_by_name(tmp_path):
    trainer(tmp_path).train()
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    with pytest.raises(StateError, match=r"checkpoint-8.*cut off while it was written"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [6, 8])  # within an epoch, and at the end of one
def test_a_trainer_that_resumes_at_its_last_step_trains_no_further(steps, tmp_path):
    first = trainer(tmp_path, max_steps=steps)
    first.train()
    before = contents(tmp_path)
    second = trainer(tmp_path, max_steps=steps)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == steps
    assert_same(weights(second.model), weights(first.model))
    assert contents(tmp_path) == before
    second.args.max_steps = steps + 2
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == steps + 2


@pytest.mark.slow
def test_a_checkpoint_of_another_base_is_refused(tmp_path):
    trainer(tmp_path).train()
    with pytest.raises(StateError, match="fingerprint"):
        trainer(tmp_path, base_seed=1).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_callback_that_came_too_late_to_resume_says_so(tmp_path):
    trainer(tmp_path, "factored").train()
    run = trainer(tmp_path, callbacks=[])
    run.add_callback(ScaLoraCallback(ScaLoraConfig(warmup_steps=1, merge="factored")))
    # Depending on the ranks, PEFT refuses the sizes of the ordinary adapter first.
    with pytest.raises((StateError, RuntimeError), match=r"constructor|size mismatch"):
        run.train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_plain_lora_checkpoint_is_not_taken_for_one_of_scalora(tmp_path):
    trainer(tmp_path, callbacks=[]).train()
    run = trainer(tmp_path)
    assert not list(tmp_path.glob("incomplete-*"))
    with pytest.raises(StateError, match="without ScaLoRA"):
        run.train(resume_from_checkpoint=True)


def loop(merge, optimizer_class, steps, engine_folder=None, save_at=None):
    """A plain training loop with dropout and noise from all three random number generators."""
    model = with_lora(TwoLayers(), r=3, target_modules=["first", "second"], lora_dropout=0.2, random_B=False)
    optimizer = optimizer_class(trainable(model), lr=1e-2)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=2, interval=2, merge=merge))
    torch.manual_seed(5), numpy.random.seed(6), random.seed(7)
    if engine_folder is not None and save_at is None:
        torch.rand(100), numpy.random.rand(100), [random.random() for _ in range(100)]
        engine.load(engine_folder)
    start = engine.state_dict()["step"]
    for step in range(start, steps):
        if step == save_at:
            engine.save(engine_folder)
        x = torch.randn(16, 12) + numpy.random.rand() + random.random()
        nn.functional.mse_loss(model(x), x[:, :6].sin()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, engine


@pytest.mark.slow
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_the_engines_own_state_brings_everything_back(merge, optimizer, tmp_path):
    alone, _ = loop(merge, optimizer, 15, tmp_path, save_at=7)
    resumed, engine = loop(merge, optimizer, 15, tmp_path)
    assert engine.state_dict()["step"] == 15
    assert_same(weights(resumed), weights(alone))
    assert [path.name for path in tmp_path.iterdir()] == ["scalora_state.safetensors"]


def test_a_state_is_read_through_links_as_in_the_hugging_face_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "5f3a"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    model, engine = loop("dense", torch.optim.AdamW, 7)
    engine.save(blobs)
    (blobs / "scalora_state.safetensors").rename(blobs / "9c41")
    (tmp_path / "link").symlink_to(blobs / "9c41")
    (snapshot / "scalora_state.safetensors").symlink_to("../../link")
    before = weights(model)
    again = with_lora(TwoLayers(), r=3, target_modules=["first", "second"], random_B=False)
    config = ScaLoraConfig(warmup_steps=2, interval=2, merge="dense")
    ScaLora(again, torch.optim.AdamW(trainable(again), lr=1e-2), config).load(snapshot)
    assert_same(weights(again), before)


@pytest.mark.parametrize("merge", MERGES)
def test_a_state_dict_in_memory(merge):
    model, engine = loop(merge, torch.optim.AdamW, 9)
    state, before = copy.deepcopy(engine.state_dict()), weights(model)
    x = torch.randn(16, 12)
    for _ in range(4):
        model(x).square().sum().backward()
        engine.optimizer.step()
    engine.load_state_dict(state)
    assert_same(weights(model), before)
    with pytest.raises(StateError, match="lacks"):
        engine.load_state_dict({"step": 3})


@pytest.mark.parametrize("merge", MERGES)
def test_a_model_takes_its_own_state_dict(merge):
    model, _ = loop(merge, torch.optim.AdamW, 9)
    fresh = with_lora(TwoLayers(), r=3, target_modules=["first", "second"], random_B=False)
    ScaLora(fresh, torch.optim.AdamW(trainable(fresh)), ScaLoraConfig(merge=merge))
    fresh.load_state_dict(model.state_dict())
    assert_same(weights(fresh), weights(model))


@pytest.mark.slow
def test_the_command_resumes(causal_folder, write_jsonl, tmp_path):
    rows = [{"prompt": f"say: {WORDS[i % 10]}", "completion": f" {WORDS[i % 7]}"} for i in range(40)]
    train = write_jsonl("train.jsonl", rows)
    training = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-2,
    }
    config = tmp_path / "config.yaml"

    def command(name, *flags, **settings):
        content = {
            "model": str(causal_folder),
            "output_dir": str(tmp_path / name),
            "data": {"train": str(train)},
            "scalora": {"warmup_steps": 1},
            "training": training,
        }
        config.write_text(yaml.safe_dump(content | settings))
        return CliRunner().invoke(app, ["train", str(config), *flags])

    assert command("alone").exit_code == 0
    assert command("run").exit_code == 0
    (tmp_path / "run" / "trainer" / "checkpoint-6").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "summary.json").unlink()
    summary = (tmp_path / "run" / "metrics.jsonl").read_text()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    result = command("run", "--resume")
    assert result.exit_code == 0, result.stderr[-300:]
    one, other = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("alone", "run"))
    assert one == other
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in summary.splitlines()]
    refused = command("run", "--resume", lora={"r": 4})
    assert refused.exit_code == 2
    assert "resume with its own settings" in refused.stderr
    refused = command("nowhere", "--resume")
    assert refused.exit_code == 2
    assert "not the folder of a run" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("merge", MERGES)
def test_killed_runs_resume_to_the_same_weights(merge):
    script = Path(__file__).parents[1] / "benchmarks" / "kill_and_resume.py"
    output = subprocess.run(
        [sys.executable, script, "--merge", merge, "--kills", "3"], capture_output=True, text=True, check=True
    ).stdout
    assert output.splitlines()[-1] == f"3 kills, {merge}: largest difference 0.0e+00"
