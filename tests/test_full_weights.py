"""Full fine-tuning of the matrices that LoRA would adapt: which weights it trains, and what becomes of such a run."""

import json

import pytest
import torch
import yaml
from conftest import WORDS, pairs
from models import Mixed, TwoLayers, tiny_gpt2, tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from scalora.cli import app
from scalora.model.adapters import UnsupportedLayerError
from scalora.rivals.full_weights import Full

METHODS = ["full", "galore", "apollo"]


def adapted(method):
    return {"method": method, "method_options": {"matrices": "adapted"}}


ADAPTED = adapted("full")


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def train(tmp_path, write_jsonl):
    classes = [{"text": f" {WORDS[i % 10]} {WORDS[i % 3]}", "label": WORDS[i % 3]} for i in range(24)]
    rows = {"sft": pairs(24), "classification": classes}

    def run(name, task="sft", training=None, **settings):
        data = {"train": str(write_jsonl(f"{task}.jsonl", rows[task])), "eval": str(tmp_path / f"{task}.jsonl")}
        # A rate at which two steps change every weight that is trained.
        training = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2} | (training or {})
        content = {"output_dir": str(tmp_path / name), "task": task, "data": data, "training": training} | settings
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        result = command("train", tmp_path / f"{name}.yaml")
        assert result.exit_code == 0, result.output
        return tmp_path / name

    return run


def summary(run):
    return json.loads((run / "summary.json").read_text())


def adapted_by_lora(run):
    """The weights that a LoRA run has trained in any form, by the names of the base, from the adapter that it saved."""
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.") for name in saved if ".lora_B." not in name}
    return {name.replace(".lora_A.", ".") for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_it_trains_the_weights_that_lora_adapts_and_no_others(method, lora, train, causal_folder):
    run = train(method, model=str(causal_folder), lora=lora, **adapted(method))
    wanted = adapted_by_lora(train("lora", model=str(causal_folder), lora=lora, method="lora"))
    before, after = load_file(causal_folder / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == wanted
    assert summary(run)["trainable_parameters"] == sum(before[name].numel() for name in wanted)
    assert "adapter_rank" not in summary(run)
    measured = {json.loads(line)["layer"] for line in (run / "updates.jsonl").read_text().splitlines()}
    assert {f"{name}.weight" for name in measured} <= wanted


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_classifiers_new_head_is_trained_too(method, train, encoder_folder):
    settings = {"task": "classification", "model": str(encoder_folder), "lora": {"target_modules": ["query"]}}
    run = train(method, **settings, **adapted(method))
    wanted = adapted_by_lora(train("lora", **settings, method="lora"))
    assert {"classifier.weight", "classifier.bias"} < wanted
    after = load_file(run / "model" / "model.safetensors")
    assert summary(run)["trainable_parameters"] == sum(after[name].numel() for name in wanted)
    before = load_file(encoder_folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after.get(name, before[name]))}
    assert changed - {"classifier.weight", "classifier.bias"} == wanted - {"classifier.weight", "classifier.bias"}


def trained(model, settings):
    method = Full(matrices="adapted")
    model = method.adapt(model, method.peft_config(settings), lambda model: pytest.fail("it needs no gradients"))
    assert not any(parameter.is_meta for parameter in model.parameters())
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("model", "settings", "names"),
    [
        (Mixed(), {"target_modules": ["embed", "conv1d"]}, {"embed.weight", "conv1d.weight"}),
        (
            Mixed(),
            {"target_modules": ["linear"], "modules_to_save": ["head"]},
            {"linear.weight", "head.weight", "head.bias"},
        ),
        (TwoLayers(), {"target_modules": ["first"], "lora_bias": True}, {"first.weight", "first.bias"}),
        (
            tiny_llama(),
            {"target_modules": ["k_proj"], "layers_to_transform": [0], "lora_bias": True},
            {"model.layers.0.self_attn.k_proj.weight"},
        ),
        (TwoLayers(), {"target_modules": ["first"], "bias": "all"}, {"first.weight", "first.bias", "second.bias"}),
        (TwoLayers(), {"target_modules": "sec.*"}, {"second.weight"}),
        (TwoLayers(), {"target_modules": ["first", "second"], "exclude_modules": ["first"]}, {"second.weight"}),
        (
            tiny_gpt2(),
            {"target_modules": ["c_fc"], "layers_to_transform": 0, "fan_in_fan_out": True},
            {"transformer.h.0.mlp.c_fc.weight"},
        ),
        (
            tiny_llama(),
            {"target_parameters": ["k_proj.weight"], "target_modules": []},
            {f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (0, 1)},
        ),
        (tiny_llama(tie_word_embeddings=True), {"target_modules": ["lm_head"]}, {"model.embed_tokens.weight"}),
    ],
    ids=[
        "kinds",
        "modules_to_save",
        "lora_bias",
        "no_bias",
        "bias",
        "pattern",
        "exclude",
        "conv1d",
        "parameters",
        "tied",
    ],
)
def test_every_way_to_name_what_is_adapted(model, settings, names):
    assert trained(model, {"r": 2, **settings}) == names


def test_finding_the_weights_changes_none_and_leaves_the_model_as_it_was():
    model, settings = tiny_llama(), {"r": 2, "target_modules": ["q_proj"]}
    before, modules = {n: p.clone() for n, p in model.state_dict().items()}, [type(m) for m in model.modules()]
    trained(model, settings)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [type(module) for module in model.modules()] == modules
    get_peft_model(model, LoraConfig(**settings))  # and it can still be adapted


def test_what_can_not_be_trained_in_full_is_refused_by_name():
    with pytest.raises(UnsupportedLayerError, match=r"embed_tokens.*leave lora\.trainable_token_indices out"):
        trained(tiny_llama(), {"target_modules": ["q_proj"], "trainable_token_indices": [3]})
    model = TwoLayers()
    model.second.weight = nn.Parameter(torch.zeros(6, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedLayerError, match=r"'second\.weight': it is quantised \(torch\.int8\)"):
        trained(model, {"target_modules": ["first"]})


@pytest.mark.slow
def test_such_a_run_is_resumed_inspected_and_evaluated_like_any_other(train, causal_folder, tmp_path):
    settings = {"model": str(causal_folder), "lora": {"target_modules": ["q_proj"]}, **ADAPTED}
    training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = train("whole", **settings, training=training)
    train("parts", **settings, training=training | {"max_steps": 2})
    result = command("train", tmp_path / "parts.yaml", "--resume", "--training.max_steps", 4)
    assert result.exit_code == 0, result.output
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")]
    torch.testing.assert_close(*weights)
    assert command("inspect", whole, "--batches", 0).exit_code == 0
    layers = json.loads((whole / "inspect.json").read_text())["layers"]
    assert [layer["name"] for layer in layers] == [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    result = command("evaluate", whole, tmp_path / "whole.yaml", "--output", tmp_path / "scores.json")
    assert result.exit_code == 0, result.output
    loss = json.loads((tmp_path / "scores.json").read_text())["loss"]
    assert loss == pytest.approx(summary(whole)["eval_loss"], rel=1e-3)


@pytest.mark.slow
def test_gradient_checkpointing_reaches_the_weights_behind_frozen_embeddings(train, causal_folder):
    settings = {"model": str(causal_folder), "lora": {"target_modules": ["q_proj"]}, **ADAPTED}
    weights = []
    for checkpointing in (False, True):
        run = train(f"run-{checkpointing}", **settings, training={"gradient_checkpointing": checkpointing})
        weights.append(load_file(run / "model" / "model.safetensors"))
    torch.testing.assert_close(*weights)


def test_a_dry_run_counts_what_is_trained_and_no_adapter(tmp_path, write_jsonl, causal_folder):
    data = {"train": str(write_jsonl("train.jsonl", pairs(8)))}
    content = {"model": str(causal_folder), "output_dir": str(tmp_path / "run"), "data": data, **ADAPTED}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content | {"lora": {"target_modules": ["q_proj"]}}))
    result = command("train", tmp_path / "run.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    # Two layers of 32 × 32 in float32: 8192 bytes of gradients, twice that of moments.
    assert "trains 2,048 parameters" in result.output
    assert "gradients 8.2 kB, optimizer (as Adam) 16.4 kB" in result.output
    assert "adapter" not in result.output


def test_the_settings_of_lora_are_checked(tmp_path, write_jsonl, causal_folder):
    data = {"train": str(write_jsonl("train.jsonl", pairs(8)))}
    content = {"model": str(causal_folder), "output_dir": str(tmp_path / "run"), "data": data, **ADAPTED}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    for override, message in {
        ("--lora.target_modules", "[qproj]"): "lora.target_modules: the model has no module 'qproj'",
        ("--lora.r", "0"): "lora.r",
        ("--method_options.matrices", "most"): "matrices='most': the choices are all, adapted",
        ("--method", "mora"): "method_options.matrices is an option of full, galore, apollo, not",
    }.items():
        result = command("train", tmp_path / "run.yaml", *override)
        assert result.exit_code == 2
        assert message in result.output
        assert not (tmp_path / "run").exists()
