"""`optimizer: pair_adamw` and `head_learning_rate` in `scalora train`."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from conftest import WORDS, pairs
from models import TwoLayers, tiny_llama, with_lora
from torch import nn
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from scalora import PairAdamW, ScaLoraCallback, ScaLoraConfig
from scalora.cli import app
from scalora.runs.head_rate import give_rate, head_parameters


def scalora(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def config(causal_folder, write_jsonl, tmp_path):
    def write(**settings):
        training = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1}
        content = {
            "model": str(causal_folder),
            "output_dir": str(tmp_path / "run"),
            "data": {"train": str(write_jsonl("train.jsonl", pairs(24)))},
            "scalora": {"warmup_steps": 1},
            "training": training,
        }
        for key, value in settings.items():
            content[key] = {**content[key], **value} if isinstance(content.get(key), dict) else value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def classification(encoder_folder, write_jsonl):
    rows = [{"text": f" {WORDS[i % 10]} {WORDS[i % 3]}", "label": WORDS[i % 3]} for i in range(24)]
    data = {"train": str(write_jsonl("labelled.jsonl", rows)), "eval": str(write_jsonl("asked.jsonl", rows[:8]))}
    return {"model": str(encoder_folder), "task": "classification", "data": data}


@pytest.fixture
def optimizers(monkeypatch):
    """The optimizers of all trainings, as they are when training begins."""
    seen = []
    create = Trainer.create_scheduler

    def spy(self, num_training_steps, optimizer=None):
        seen.append(getattr(self.optimizer, "optimizer", self.optimizer))
        return create(self, num_training_steps, optimizer)

    monkeypatch.setattr(Trainer, "create_scheduler", spy)
    return seen


def logs(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"optimizer": "pair_adamw"}, {"scalora": {"mode": "matrix"}}])
def test_one_switch_sets_optimizer_and_mode(settings, config, optimizers, tmp_path):
    result = scalora("train", config(**settings))
    assert result.exit_code == 0, result.output
    assert type(optimizers[0]) is PairAdamW
    assert optimizers[0].defaults["lr"] == 7.2e-3  # 0.23 by the width of this model, 32
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["training"]["learning_rate"] == 7.2e-3  # so that another default of a later version changes nothing
    shares = [log["scalora/matrix_share"] for log in logs(tmp_path) if "scalora/matrix_share" in log]
    assert len(shares) == 3
    assert shares[-1] == 1


def test_a_model_without_a_width_needs_a_rate(config, causal_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("scalora.runs.prepare.hidden_size", lambda source, settings: None)
    result = scalora("train", config())
    assert result.exit_code == 2
    assert "has no hidden_size in its config" in result.stderr.replace("\n", " ")
    assert not (tmp_path / "run").exists()
    assert scalora("train", config(), "--training.learning_rate", "1e-3", "--dry-run").exit_code == 0


@pytest.mark.slow
def test_with_lora_it_is_another_optimizer_and_nothing_else(config, optimizers, tmp_path):
    result = scalora("train", config(method="lora", optimizer="pair_adamw"))
    assert result.exit_code == 0, result.output
    assert type(optimizers[0]) is PairAdamW
    assert not any("scalora/rescales" in log for log in logs(tmp_path))


@pytest.mark.slow
def test_a_matrix_run_resumes(config, tmp_path):
    path = config(optimizer="pair_adamw", training={"save_strategy": "steps", "save_steps": 2})
    assert scalora("train", path).exit_code == 0
    longer = scalora("train", path, "--resume", "--max_steps", "6")
    assert longer.exit_code == 0, longer.output


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "pair_adamw", "method": "lora_rite"}, ["pair_adamw", "lora_rite"]),
        ({"optimizer": "pair_adamw", "method": "full"}, ["pair_adamw", "full"]),
        ({"optimizer": "pair_adamw", "training": {"optim": "sgd"}}, ["pair_adamw", "training.optim='sgd'"]),
        ({"scalora": {"mode": "matrix"}, "training": {"optim": "sgd"}}, ["scalora.target_norm"]),
        (
            {"scalora": {"mode": "matrix", "target_norm": 1.0}, "training": {"optim": "adamw_torch"}},
            ["AdamW", "elementwise"],
        ),
        ({"scalora": {"mode": "matrix", "turn": 0}}, ["turn"]),
        ({"optimizer": "pair"}, ["optimizer"]),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(settings, words, config, tmp_path):
    result = scalora("train", config(**settings))
    assert result.exit_code != 0
    error = result.output.strip().splitlines()[-1]
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"optimizer": "pair_adamw"}, {"scalora": {"mode": "auto"}}])
@pytest.mark.parametrize(("given", "rate"), [({}, None), ({"head_learning_rate": 0.03}, 0.03)])
def test_the_head_has_the_rate_that_it_is_given(settings, given, rate, config, classification, optimizers):
    path = config(**settings, **given, **classification, training={"learning_rate": 1e-3})
    result = scalora("train", path)
    assert result.exit_code == 0, result.output
    usual = 1e-2 if "optimizer" in settings else 1e-3
    rates = sorted(group["initial_lr"] for group in optimizers[0].param_groups)
    assert rates[-1] == (rate or usual)
    assert rates[0] == 1e-3


@pytest.mark.slow
def test_a_trainer_of_ones_own_takes_it_with_its_model(tmp_path):
    model = with_lora(tiny_llama(), random_B=False, r=2, target_modules="all-linear")
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))} for _ in range(8)]
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=3, report_to="none", save_strategy="no")
    callback = ScaLoraCallback(ScaLoraConfig(mode="matrix", warmup_steps=1))
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        callbacks=[callback],
        optimizer_cls_and_kwargs=(PairAdamW, {"model": model, "lr": 1e-3}),
    )
    trainer.train()
    assert type(callback.engine.optimizer) is PairAdamW
    assert callback.engine.metrics()["scalora/rescales"] == 2


def test_give_rate_moves_parameters_to_a_group_with_the_same_settings():
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "classifier": nn.Linear(3, 2)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    give_rate(optimizer, head_parameters(model), 0.5)
    body, head = optimizer.param_groups
    assert [id(p) for p in body["params"]] == [id(p) for p in model["body"].parameters()]
    assert [id(p) for p in head["params"]] == [id(p) for p in model["classifier"].parameters()]
    assert (body["lr"], head["lr"], head["weight_decay"]) == (0.1, 0.5, 0.3)


def test_a_group_of_nothing_but_a_head_is_not_left_empty():
    model = nn.ModuleDict({"score": nn.Linear(3, 2)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    give_rate(optimizer, head_parameters(model), 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]


def test_head_parameters_are_those_that_are_trained():
    assert head_parameters(with_lora(TwoLayers(), r=2, target_modules=["first"])) == []
