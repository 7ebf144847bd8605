"""`scalora train`, `inspect`, `export` and `evaluate` of a mixture of experts, through the command."""

import json

import pytest
import torch
import yaml
from conftest import pairs
from experts import tiny
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from scalora.cli import app

ROWS = 8


def command(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr[-600:]
    return result


@pytest.fixture(scope="module", params=["dense", "factored"])
def run(request, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny("mixtral", vocab_size=len(tokenizer), eos_token_id=2, pad_token_id=1).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(ROWS)))
    settings = {
        "model": str(folder / "base"),
        "data": {"train": str(folder / "train.jsonl")},
        "method": "scalora",
        "output_dir": str(folder / "run"),
        "lora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
        "scalora": {"warmup_steps": 1, "merge": request.param},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": ROWS,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "gradient_checkpointing": False,
        },
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))
    command("train", folder / "train.yaml")
    return folder / "run"


@pytest.mark.slow
def test_inspect_describes_each_expert(run, tmp_path):
    command("inspect", run)
    layers = {layer["name"]: layer for layer in json.loads((run / "inspect.json").read_text())["layers"]}
    assert len(layers) == 2 + 2 * 6
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base")
    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    residuals = 0
    for block in range(2):
        name = f"model.layers.{block}.mlp.experts.gate_up_proj"
        update = (trained.get_parameter(name) - base.get_parameter(name)).detach().double()
        for expert in range(6):
            described = layers[f"{name}.{expert}"]
            assert described["shape"] == list(update[expert].shape)
            assert described["norm"] == pytest.approx(update[expert].norm().item(), rel=1e-4, abs=1e-6)
            relative = update[expert].norm() / base.get_parameter(name)[expert].norm()
            assert described["relative_norm"] == pytest.approx(relative.item(), rel=1e-4, abs=1e-7)
            residuals += described["residual"] is not None
    assert residuals > 6


def test_its_adapter_is_an_ordinary_one(run, tmp_path):
    command("export", run, "--output", tmp_path / "adapter")
    tokens = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(run / "model")(tokens).logits
        base = AutoModelForCausalLM.from_pretrained(run.parent / "base")
        before = base(tokens).logits
        found = PeftModel.from_pretrained(base, tmp_path / "adapter")(tokens).logits
    assert (found - wanted).norm() < 0.01 * (before - wanted).norm()
