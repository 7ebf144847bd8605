"""Attaching changes everything or nothing, and a model and an optimizer have one engine."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from models import TwoLayers, backward, tiny_llama, trainable, with_lora
from torch import nn
from transformers import Trainer, TrainingArguments

from scalora import ScaLora, ScaLoraCallback, ScaLoraConfig, UnsupportedLayerError, UnsupportedOptimizerError
from scalora.rivals.controls import OracleRestarts

TWO = ["first", "second"]


def adapted(**settings):
    return with_lora(TwoLayers(), **{"r": 3, "target_modules": TWO} | settings)


def adamw(model, **settings):
    return torch.optim.AdamW(trainable(model), **{"lr": 1e-2} | settings)


def train(model, optimizer, steps):
    for step in range(steps):
        backward(model, seed=step)
        optimizer.step()


def of_another_model(model):
    return ScaLora(model, torch.optim.AdamW(TwoLayers().parameters()), ScaLoraConfig(merge="dense"))


def without_rate(model):
    return ScaLora(model, adamw(model, lr=0.0), ScaLoraConfig(merge="dense", smoothness=1.0))


def with_unknown_state(model):
    optimizer = adamw(model)
    optimizer.state[trainable(model)[0]]["velocity"] = torch.ones_like(trainable(model)[0])
    return ScaLora(model, optimizer, ScaLoraConfig(merge="dense"))


def of_a_factored_optimizer(model):
    return ScaLora(model, torch.optim.Adafactor(trainable(model)), ScaLoraConfig(merge="dense"))


def without_a_compiler(model):
    return ScaLora(model, adamw(model), ScaLoraConfig(merge="dense", native=True))


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        (of_another_model, "does not hold lora_A"),
        (without_rate, "positive base learning rate"),
        (with_unknown_state, "'velocity'"),
        (of_a_factored_optimizer, "Adafactor"),
        (without_a_compiler, "no compiler"),
    ],
)
def test_an_engine_that_can_t_be_attached_leaves_no_trace(fail, reason, monkeypatch):
    def no_compiler():
        raise ValueError("no compiler")

    monkeypatch.setattr("scalora.engine.native.build", no_compiler)
    model = adapted()
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes, before = set(vars(model)), copy.deepcopy(model.state_dict())
    x = torch.randn(4, 12)
    with model.disable_adapter():
        base = model(x)
    with pytest.raises(ValueError, match=reason):
        fail(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert set(vars(model)) == attributes
    assert model.state_dict().keys() == before.keys()
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    # The merge of the attempt above does not bind the next one.
    engine = ScaLora(model, adamw(model), ScaLoraConfig(merge="factored", warmup_steps=0))
    train(model, engine.optimizer, 2)
    assert engine.metrics()["scalora/rescales"] == 2


def test_an_engine_that_can_t_be_attached_leaves_the_earlier_one_at_work():
    model = adapted()
    optimizer = adamw(model)
    engine = ScaLora(model, optimizer, ScaLoraConfig(merge="dense", warmup_steps=0))
    with pytest.raises(UnsupportedLayerError, match="already has a dense remainder"):
        ScaLora(model, optimizer, ScaLoraConfig(merge="factored", warmup_steps=0))
    train(model, optimizer, 3)
    assert (engine.step, engine.metrics()["scalora/rescales"]) == (3, 3)


@pytest.mark.parametrize("fresh_optimizer", [False, True])
@pytest.mark.parametrize("kind", [ScaLora, OracleRestarts])
def test_a_second_engine_replaces_the_first_and_trains_as_one_alone(kind, fresh_optimizer):
    config = ScaLoraConfig(warmup_steps=2, interval=2)
    results = []
    for attempts in (1, 3):
        model = adapted()
        optimizer = adamw(model)
        first = kind(model, optimizer, config)
        for _ in range(attempts - 1):
            if fresh_optimizer:
                optimizer = adamw(model)
            kind(model, optimizer, config)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, optimizer, 7)
        # Whichever engine one has kept: they count the steps of the model.
        assert (first.step, first.metrics()["scalora/rescales"], first.state_dict()["rescales"]) == (7, 2, 2)
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_an_optimizer_that_moves_to_another_model_leaves_its_first_engine_behind():
    first, second = adapted(), adapted()
    optimizer = torch.optim.AdamW([*trainable(first), *trainable(second)], lr=1e-2)
    ScaLora(first, optimizer, ScaLoraConfig(warmup_steps=0))
    ScaLora(second, optimizer, ScaLoraConfig(warmup_steps=0))
    before = first.base_model.model.first.base_layer.weight.clone()
    backward(first), backward(second)
    optimizer.step()
    assert torch.equal(first.base_model.model.first.base_layer.weight, before)


@pytest.mark.slow
def test_engines_and_models_are_not_kept_alive():
    model = adapted()
    engine = weakref.ref(ScaLora(model, adamw(model), ScaLoraConfig(warmup_steps=0)))
    gc.collect()
    assert engine() is None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("keep", [True, False])
def test_an_optimizer_that_replaces_the_attached_one_is_named_once(keep):
    model = adapted()
    engine = ScaLora(model, adamw(model), ScaLoraConfig(warmup_steps=0))
    train(model, engine.optimizer, 2)
    if not keep:
        del engine
        gc.collect()
    other = torch.optim.SGD(trainable(model), lr=1e-3)
    with pytest.warns(UserWarning, match=r"SGD has updated .*first\.lora_A.*attach again"):
        train(model, other, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, other, 2)


def test_optimizers_of_other_parameters_and_wrappers_of_the_attached_one_are_not_warned_of():
    class Passing(torch.optim.Optimizer):
        """A wrapper that is an optimizer itself."""

        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups, {})
            self.optimizer = optimizer

        def step(self, closure=None):
            self.optimizer.step()

    model, head = adapted(), nn.Linear(6, 6)
    wrapper, other = Passing(adamw(model)), torch.optim.SGD(head.parameters(), lr=1e-3)
    engine = ScaLora(model, wrapper, ScaLoraConfig(warmup_steps=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            head(model(torch.randn(5, 12))).square().mean().backward()
            wrapper.step()
            other.step()
    assert engine.step == 3
    engine.detach()
    with warnings.catch_warnings():  # plain LoRA from here on, with whatever optimizer
        warnings.simplefilter("error")
        train(model, torch.optim.SGD(trainable(model), lr=1e-3), 1)


@pytest.mark.parametrize(
    ("steps", "settings", "reason"),
    [
        (0, {}, "AdamW that it was attached to took no step"),
        (5, {"warmup_steps": 5}, "first rescale is at step 6, and the run had 5"),
        (5, {"warmup_steps": 0, "interval": 8}, "first rescale is at step 8, and the run had 5"),
        (5, {"warmup_steps": 0}, None),
    ],
)
def test_a_run_without_a_rescale_is_said_to_be_plain_lora(steps, settings, reason):
    model = adapted()
    engine = ScaLora(model, adamw(model), ScaLoraConfig(**settings))
    train(model, engine.optimizer, steps)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        engine.detach()
        engine.detach()
    assert len(given) == (reason is not None)
    assert reason is None or reason in str(given[0].message)


def test_a_run_whose_steps_had_no_gradients_is_said_to_be_plain_lora():
    model = adapted()
    engine = ScaLora(model, adamw(model), ScaLoraConfig(warmup_steps=0))
    for _ in range(3):
        model(torch.randn(4, 12))
        engine.optimizer.step()
    with pytest.warns(UserWarning, match="no layer had gradients"):
        engine.detach()


class OutOfMemoryOnce(Trainer):
    """Runs out of memory in its third training step."""

    calls = 0

    def training_step(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return super().training_step(*args, **kwargs)


@pytest.mark.slow
def test_a_trainer_that_starts_again_with_smaller_batches_counts_its_steps_once(tmp_path):
    model = with_lora(tiny_llama(), r=2, target_modules=["q_proj"])
    row = {"input_ids": list(range(8)), "labels": list(range(8))}
    callback = ScaLoraCallback(ScaLoraConfig(warmup_steps=1))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=4, auto_find_batch_size=True,
        report_to="none", save_strategy="no", disable_tqdm=True, bf16=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = OutOfMemoryOnce(model, arguments, train_dataset=[row] * 16, callbacks=[callback])
    trainer.train()
    state = callback.engine.state_dict()
    assert (trainer.calls, state["step"], state["rescales"]) == (8, 5, 4)


def test_an_unregistered_state_is_refused_before_anything_is_rescaled():
    model = adapted()
    engine = ScaLora(model, adamw(model), ScaLoraConfig(warmup_steps=1))
    train(model, engine.optimizer, 1)
    for p in trainable(model):
        engine.optimizer.state[p]["velocity"] = torch.ones_like(p)
    before = copy.deepcopy(model.state_dict())
    backward(model)
    with pytest.raises(UnsupportedOptimizerError, match="'velocity'"):
        engine.optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert engine.step == 1


@pytest.mark.slow
def test_the_constants_on_the_device_do_not_pile_up_with_the_patterns_of_active_layers():
    model = with_lora(tiny_llama(), r=2, target_modules="all-linear")
    engine = ScaLora(model, adamw(model), ScaLoraConfig(warmup_steps=0))
    for step in range(12):
        tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        for i, pair in enumerate(engine.pairs):
            if step >> (i % 4) & 1:
                pair.lora_A.grad = None
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        if step == 0:
            gc.collect()
            held = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    gc.collect()
    assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) <= held + 4
