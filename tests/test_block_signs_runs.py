"""Block signs by the command: their optimizer, and what the other commands say of such a run."""

import json

import pytest
import torch
import yaml
from conftest import pairs
from models import tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

import scalora.runs.train
from scalora import BlockSignsCallback, PairAdamW, ScaLoraCallback, ScaLoraConfig
from scalora.cli import app


@pytest.fixture
def config(causal_folder, tmp_path):
    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs(16)))
    content = {
        "model": str(causal_folder), "method": "block_signs", "data": {"train": str(data)},
        "output_dir": str(tmp_path / "run"), "lora": {"r": 2, "lora_alpha": 2},
        "training": {"max_steps": 3, "per_device_train_batch_size": 2},
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def said(*words, status=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


def test_the_optimizer_is_pair_adamw_unless_another_is_named(config):
    assert "optimizer PairAdamW, learning rate 0.014" in said("train", config, "--dry-run")  # 0.46 by a width of 32
    assert "optimizer adamw_torch, learning rate 0.001" in said(
        "train", config, "--training.optim", "adamw_torch", "--dry-run"
    )
    assert "optimizer PairAdamW" not in said("train", config, "--method", "lora", "--dry-run")


@pytest.mark.slow
def test_the_other_commands_know_what_such_a_run_has(config, tmp_path):
    run = tmp_path / "run"
    said("train", config)
    output = said("inspect", run, "--output", tmp_path / "update.json")
    assert "oracle" not in output
    layers = json.loads((tmp_path / "update.json").read_text())["layers"]
    assert {layer["adapter_rank"] for layer in layers} >= {32}
    assert {layer["residual"] for layer in layers} == {None}
    error = said("export", run, "--to", "adapter", status=2)
    assert f"its adapter '{run / 'adapter'}' is an ordinary one, its merged model is '{run / 'model'}'" in error


@pytest.mark.slow
@pytest.mark.parametrize("saving", ["no", "steps"])
def test_an_interrupted_run_says_how_to_go_on(saving, config, tmp_path, monkeypatch):
    class Interrupted(scalora.runs.train.StepClock):
        def on_step_end(self, args, state, *others, **more):
            super().on_step_end(args, state, *others, **more)
            if state.global_step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(scalora.runs.train, "StepClock", Interrupted)
    run, steps = tmp_path / "run", ("--training.max_steps", 5, "--training.save_steps", 2)
    output = said("train", config, *steps, "--training.save_strategy", saving, status=130)
    monkeypatch.undo()
    stopped = "it is not finished (stopped at step 3: it was interrupted (SIGINT))"
    assert stopped in output
    if saving == "no":
        assert "train anew with `scalora train CONFIG --overwrite`" in output
        assert stopped in said("train", config, *steps, "--resume", status=2)
    else:
        assert f"`scalora train CONFIG --resume` goes on from '{run / 'trainer' / 'checkpoint-2'}'" in output
    assert stopped in said("evaluate", run, config, "--data.eval", tmp_path / "words.jsonl", status=2)
    assert stopped in said("export", run, "--to", "adapter", status=2)


@pytest.mark.parametrize(
    "callback",
    [BlockSignsCallback(4, pair_adamw=True), ScaLoraCallback(ScaLoraConfig(mode="matrix"), pair_adamw=True)],
    ids=["block signs", "matrices"],
)
@pytest.mark.parametrize("by", ["model", "model_init"])
def test_callbacks_bring_the_optimizer(callback, by, tmp_path):
    def new_model():
        return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))

    tokens = torch.randint(0, 64, (8, 8))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    settings = TrainingArguments(
        tmp_path, max_steps=2, report_to=[], save_strategy="no", use_cpu=True, learning_rate=3e-3
    )
    model = {"model": new_model()} if by == "model" else {"model_init": new_model}
    trainer = Trainer(args=settings, train_dataset=data, callbacks=[callback], **model)
    for _ in range(2):  # a second training makes a new optimizer
        trainer.train()
        optimizer = trainer.optimizer.optimizer
        assert type(optimizer) is PairAdamW
        own = {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad}
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == own
        assert optimizer.param_groups[0]["initial_lr"] == 3e-3
