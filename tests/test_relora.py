"""ReLoRA: merges, resets and learning rates against plain re-statements, by itself and in a Trainer."""

import pytest
import torch
from datasets import Dataset
from models import Mixed, TwoLayers, tiny_llama, trainable, with_lora
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from scalora import UnsupportedLayerError, UnsupportedOptimizerError
from scalora.rivals.relora import ReLora, ReLoraRestarts

ALL_MIXED = {"r": 2, "lora_alpha": 6, "target_modules": ["embed", "conv1d", "linear"]}


def train(model, optimizer, steps, features=12):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(16, features, generator=generator)
        model(x).square().sum(1).sub(3).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_restart_keeps_the_function_and_begins_the_adapter_anew():
    model = with_lora(Mixed(), **ALL_MIXED).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    restarts = ReLoraRestarts(model, torch.optim.AdamW(trainable(model)), ReLora())
    tokens = torch.randint(0, 20, (5, 7))
    expected = model(tokens).detach()
    restarts.restart()
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_embedding_B" in name:
            assert parameter.abs().sum() > 0
        if "lora_" in name or "base_layer.weight" in name:
            assert not torch.equal(parameter, before[name]), name
    # PEFT's own start of lora_A: uniform within ±1/√n.
    lora_A = model.base_model.model.linear.lora_A["default"].weight
    assert 0.5 / 10**0.5 < lora_A.abs().max() <= 1 / 10**0.5


@pytest.mark.parametrize(("interval", "rank"), [(5, 6), (100, 2)])
def test_the_updates_rank_grows_by_r_with_each_restart(interval, rank):
    base = TwoLayers(features=32, hidden=24)
    model = with_lora(base, r=2, target_modules=["first"], random_B=False)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    restarts = ReLoraRestarts(model, optimizer, ReLora(interval=interval, restart_warmup_steps=2), total_steps=15)
    train(model, optimizer, 15, features=32)
    assert restarts.restarts == rank // 2 - 1
    update = ReLora().merged(model).first.weight - base.first.weight
    assert torch.linalg.matrix_rank(update.double(), rtol=1e-4) == rank


def test_many_merges_into_a_bfloat16_base_are_no_further_off_than_one_rounding():
    torch.manual_seed(0)
    model = with_lora(nn.Sequential(nn.Linear(64, 48)), r=2, target_modules=["0"], random_B=False)
    layer = model.base_model.model[0]
    layer.base_layer.to(torch.bfloat16)
    restarts = ReLoraRestarts(model, torch.optim.AdamW(trainable(model)), ReLora())
    exact = layer.base_layer.weight.detach().double()
    for _ in range(200):
        for parameter in trainable(model):
            nn.init.normal_(parameter, std=0.02)
        exact += layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).double()
        restarts.restart()
    error = (layer.base_layer.weight.double() - exact).norm()
    assert error <= 1.01 * (exact.to(torch.bfloat16).double() - exact).norm()


def after_a_reset(**settings):
    model = with_lora(TwoLayers(features=200, hidden=150), r=4, target_modules=["first"], modules_to_save=["second"])
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    restarts = ReLoraRestarts(model, optimizer, ReLora(**settings))
    train(model, optimizer, 7, features=200)
    before = {
        parameter: {key: value.clone() for key, value in state.items()} for parameter, state in optimizer.state.items()
    }
    restarts.restart()
    return model, optimizer, before


@pytest.mark.parametrize("prune", [0.99, 0.7, 0.0, 1.0])
def test_magnitude_keeps_the_moments_where_the_first_is_largest(prune):
    model, optimizer, before = after_a_reset(prune=prune)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = before[parameter]["exp_avg"].abs().flatten()
            kept = size.numel() - round(prune * size.numel()) if "lora_" in name else size.numel()
            mask = torch.zeros_like(size).index_fill(0, size.argsort(descending=True)[:kept], 1.0)
            for key in ("exp_avg", "exp_avg_sq"):
                expected = before[parameter][key] * mask.view_as(parameter)
                assert torch.equal(optimizer.state[parameter][key], expected), name
            assert optimizer.state[parameter]["step"] == 7


def test_random_keeps_the_moments_at_random_entries():
    model, optimizer, before = after_a_reset(reset="random", prune=0.7)
    zeros = entries = 0
    for parameter in (p for name, p in model.named_parameters() if "lora_" in name):
        kept = optimizer.state[parameter]["exp_avg"] != 0
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][key], before[parameter][key] * kept)
        size = before[parameter]["exp_avg"].abs()
        assert size[~kept].max() > size[kept].min()
        zeros, entries = zeros + (~kept).sum().item(), entries + kept.numel()
    assert zeros / entries == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("reset", ["magnitude", "random", "zero"])
def test_the_step_after_a_restart_is_a_normal_step(reset):
    model, optimizer, _ = after_a_reset(reset=reset, prune=0.9)
    adapter = [p for name, p in model.named_parameters() if "lora_" in name]
    before = [p.detach().clone() for p in adapter]
    train(model, optimizer, 1, features=200)
    assert all((p - q).abs().max() < 10 * 1e-3 for p, q in zip(adapter, before, strict=True))


def test_zero_begins_adams_averages_anew():
    model, optimizer, _ = after_a_reset(reset="zero")
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    lora_B = model.base_model.model.first.lora_B["default"].weight
    train(model, optimizer, 1, features=200)
    # The first step of Adam: the learning rate, warmed up for 1 of 10 steps, in the direction of the gradient's sign.
    moved = lora_B.abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3 / 10), rtol=1e-3, atol=0)


def test_the_learning_rate_is_the_schedule_times_a_linear_ramp_after_each_restart():
    model = with_lora(TwoLayers(), r=2, target_modules=["first"])
    witness = nn.Parameter(torch.zeros((), dtype=torch.float64))  # its gradient is always 1: it moves by the rate
    optimizer = torch.optim.SGD([*trainable(model), witness], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 3 if step < 3 else 1 - step / 30)
    ReLoraRestarts(model, optimizer, ReLora(interval=8, restart_warmup_steps=4))
    rates = []
    for _ in range(24):
        (model(torch.ones(1, 12)).sum() * 1e-3 + witness).backward()
        at = witness.item()
        optimizer.step()
        rates.append(at - witness.item())
        assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
        scheduler.step()
        optimizer.zero_grad()
    schedule = [0.5 * ((step + 1) / 3 if step < 3 else 1 - step / 30) for step in range(24)]
    ramps = [1.0] * 8 + ([0.25, 0.5, 0.75, 1.0] + [1.0] * 4) * 2
    assert rates == pytest.approx([rate * ramp for rate, ramp in zip(schedule, ramps, strict=True)], rel=1e-9)


@pytest.mark.parametrize(("total_steps", "restarts"), [(None, 3), (12, 2), (13, 2), (14, 3), (8, 1), (9, 1), (10, 2)])
def test_there_is_no_restart_whose_warm_up_would_not_end(total_steps, restarts):
    model = with_lora(TwoLayers(), r=2, target_modules=["first"])
    optimizer = torch.optim.AdamW(trainable(model))
    engine = ReLoraRestarts(model, optimizer, ReLora(interval=4, restart_warmup_steps=1), total_steps)
    train(model, optimizer, total_steps or 12)
    assert engine.restarts == restarts


def test_after_detaching_nothing_happens():
    model = with_lora(TwoLayers(), r=2, target_modules=["first"])
    optimizer = torch.optim.AdamW(trainable(model))
    engine = ReLoraRestarts(model, optimizer, ReLora(interval=2, restart_warmup_steps=2))
    train(model, optimizer, 3)
    engine.detach()
    base = model.base_model.model.first.base_layer.weight.clone()
    train(model, optimizer, 5)
    assert engine.restarts == 1
    assert torch.equal(model.base_model.model.first.base_layer.weight, base)


def trainer(tmp_path, method, **settings):
    ids = torch.randint(0, 64, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 8} for row in ids])
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 9,
        "learning_rate": method.learning_rate,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    model = with_lora(tiny_llama(), r=2, target_modules="all-linear", random_B=False)
    callbacks = method.callbacks()
    args = TrainingArguments(**defaults | settings)
    made = Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks)
    return made, callbacks[0]


@pytest.mark.slow
def test_a_trainer_restarts_by_optimizer_steps_and_its_whole_model_is_the_merged_one(tmp_path):
    method = ReLora(interval=2, restart_warmup_steps=1)
    made, callback = trainer(tmp_path, method, learning_rate=1e-2)
    made.train()
    assert callback.restarts.restarts == 3  # after 2, 4 and 6 of 9 steps; after 8 there would be the warm-up alone
    tokens = torch.randint(0, 64, (2, 9))
    model = made.model.eval()
    logits = model(input_ids=tokens).logits
    base = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert torch.linalg.matrix_rank((base - tiny_llama().model.layers[0].mlp.up_proj.weight).double(), rtol=1e-4) == 6
    merged = method.merged(model)
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(merged(input_ids=tokens).logits, logits, rtol=1e-5, atol=1e-5)


class StopAfterThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


@pytest.mark.slow
def test_a_trainer_that_has_stopped_leaves_the_optimizer_alone(tmp_path):
    made, callback = trainer(tmp_path, ReLora(interval=2, restart_warmup_steps=1))
    made.add_callback(StopAfterThree())
    made.train()
    made.optimizer.step()
    assert callback.restarts.restarts == 1


@pytest.mark.slow
def test_what_needs_a_checkpoint_of_the_base_is_refused(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    made, _ = trainer(tmp_path, ReLora(), **best)
    with pytest.raises(ValueError, match="load_best_model_at_end=False"):
        made.train()
    made, _ = trainer(tmp_path, ReLora(), max_steps=2, save_strategy="steps", save_steps=1)
    made.train()
    made, _ = trainer(tmp_path, ReLora())
    with pytest.raises(ValueError, match="can't resume at step 1"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_layers_that_can_not_be_merged_into_are_refused_by_name(tmp_path):
    model = tiny_llama(hidden_size=64, intermediate_size=64)
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype="float32")
    model = with_lora(quantised, r=2, target_modules=["q_proj"])
    with pytest.raises(UnsupportedLayerError, match=r"q_proj.*quantised"):
        ReLoraRestarts(model, torch.optim.AdamW(trainable(model)), ReLora())
    model = with_lora(TwoLayers(), r=2, target_modules=["first"], lora_bias=True)
    with pytest.raises(UnsupportedLayerError, match=r"first.*lora_bias=False"):
        ReLoraRestarts(model, torch.optim.AdamW(trainable(model)), ReLora())


def test_an_optimizer_without_elementwise_moments_is_refused_in_the_first_step_unless_it_begins_anew():
    model = with_lora(TwoLayers(), r=2, target_modules=["first"])
    optimizer = torch.optim.Adafactor(trainable(model), lr=1e-3)
    engine = ReLoraRestarts(model, optimizer, ReLora())
    with pytest.raises(UnsupportedOptimizerError, match=r"'row_var' of Adafactor.*reset='zero'"):
        train(model, optimizer, 1)
    engine.detach()
    optimizer = torch.optim.Adafactor(trainable(model), lr=1e-3)
    engine = ReLoraRestarts(model, optimizer, ReLora(interval=2, restart_warmup_steps=1, reset="zero"))
    train(model, optimizer, 5)
    assert engine.restarts == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": 0}, "interval=0"),
        ({"reset": "none"}, "reset='none' must be one of magnitude, random, zero"),
        ({"prune": 99}, "prune=99"),
        ({"interval": 5, "restart_warmup_steps": 6}, "restart_warmup_steps=6 must be from 0 to the interval, 5"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReLora(**settings)
