"""The loops that people fine-tune with PEFT in, each against a plain loop or an independent truth."""

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from models import TwoLayers, backward, trainable, with_adapter_in_float32, with_lora

from scalora import PairAdamW, ScaLora, ScaLoraConfig, StateError, UnsupportedOptimizerError

TWO = ["first", "second"]
KINDS = ["factored", "dense", "dense in bfloat16", "dense_8bit in bfloat16", "stochastic in bfloat16"]


def adapted(kind="dense", **settings):
    model = with_lora(TwoLayers(), **{"r": 2, "target_modules": TWO} | settings)
    return with_adapter_in_float32(model.bfloat16()) if kind.endswith("bfloat16") else model


def config_of(kind, **settings):
    return ScaLoraConfig(merge=kind.split(" ")[0], **{"warmup_steps": 1, "interval": 2, "remainder_rank": 3} | settings)


def adamw(model):
    return torch.optim.AdamW(trainable(model), lr=1e-2)


def steps(model, optimizer, which):
    for step in which:
        backward(model, seed=step)
        optimizer.step()


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(value, wanted[key]) for key, value in found.items())


# --- state dicts of model and optimizer, as plain loops, Accelerate, Lightning and Fabric save them -----------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dicts_of_model_and_optimizer_are_a_whole_run(kind):
    model = adapted(kind)
    engine = ScaLora(model, adamw(model), config_of(kind))
    steps(model, engine.optimizer, range(8))
    saved = copy.deepcopy((model.state_dict(), engine.optimizer.state_dict()))
    steps(model, engine.optimizer, range(8, 15))
    wanted, counts = tensors(model), (engine.step, engine.metrics()["scalora/rescales"])

    resumed = adapted(kind)
    again = ScaLora(resumed, adamw(resumed), config_of(kind))
    resumed.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    assert again.step == 8
    steps(resumed, again.optimizer, range(8, 15))
    assert equal(tensors(resumed), wanted)
    assert (again.step, again.metrics()["scalora/rescales"]) == counts

    without_counts = {key: value for key, value in saved[1].items() if key != "scalora"}  # the control
    resumed = adapted(kind)
    again = ScaLora(resumed, adamw(resumed), config_of(kind, interval=3))
    resumed.load_state_dict(saved[0])
    again.optimizer.load_state_dict(without_counts)
    steps(resumed, again.optimizer, range(8, 15))
    assert not equal(tensors(resumed), wanted)
    with pytest.raises(StateError, match="interval=2.*interval=3"):
        again.optimizer.load_state_dict(saved[1])
    with pytest.raises(StateError, match="'scalora' is 7"):
        again.optimizer.load_state_dict(saved[1] | {"scalora": 7})


def test_a_detached_or_absent_engine_leaves_the_optimizers_state_dict_alone():
    model = adapted()
    engine = ScaLora(model, adamw(model), config_of("dense", warmup_steps=0))
    steps(model, engine.optimizer, range(3))
    with_counts = engine.optimizer.state_dict()
    assert "scalora" not in engine.state_dict()["optimizer"]
    engine.detach()
    assert with_counts.keys() - engine.optimizer.state_dict().keys() == {"scalora"}
    adamw(model).load_state_dict(with_counts)


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("attached", ["before prepare", "after prepare"])
def test_accelerates_save_state_is_exact_by_itself(kind, attached, tmp_path):
    def prepared():
        accelerator = Accelerator(cpu=True)
        model = adapted(kind, lora_dropout=0.2)
        optimizer = adamw(model)
        if attached == "before prepare":
            engine = ScaLora(model, optimizer, config_of(kind))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        if attached == "after prepare":
            engine = ScaLora(model, optimizer, config_of(kind))
        return accelerator, model, optimizer, schedule, engine

    def train(accelerator, model, optimizer, schedule, which):
        for step in which:
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
            accelerator.backward(model(x.to(next(model.parameters()).dtype)).float().square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    *run, engine = prepared()
    train(*run, range(6))
    run[0].save_state(str(tmp_path))
    train(*run, range(6, 12))
    wanted, counts = tensors(run[1]), (engine.step, engine.metrics()["scalora/rescales"])

    torch.manual_seed(123)
    *run, engine = prepared()
    run[0].load_state(str(tmp_path))
    train(*run, range(6, 12))
    assert equal(tensors(run[1]), wanted)
    assert (engine.step, engine.metrics()["scalora/rescales"]) == counts == (12, 5)
