"""The target norm ``1/(s·√(Lη))``: which learning rate η is, whatever a scheduler does and in whatever order."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from models import TwoLayers, backward, tiny_llama, trainable, with_lora
from peft import LoraConfig
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from transformers import Trainer, TrainingArguments

from scalora import ScaLora, ScaLoraCallback, ScaLoraConfig, StateError, optimal_start
from scalora.rivals.scalora import ScaLoraMethod
from scalora.start import random_start

L, PEAK = 50.0, 1e-2
TWO = ["first", "second"]


def adapted(**settings):
    return with_lora(TwoLayers(), **{"r": 3, "lora_alpha": 6, "target_modules": TWO} | settings)


def attach(model, optimizer):
    return ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, smoothness=L))


def norm(rate, scaling=2.0):
    return 1 / (scaling * math.sqrt(L * rate))


def norms(engine):
    return sorted({round(value, 12) for pair in engine.target_norms.values() for value in pair})


def train(model, optimizer, steps, scheduler=None, seed=0):
    for step in range(steps):
        loss = backward(model, seed=seed + step)
        optimizer.step()
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss)
        elif scheduler is not None:
            scheduler.step()


def plateau(optimizer):
    return ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=1e9, cooldown=0)


SCHEDULES = {
    "none": (PEAK, lambda optimizer: None),
    "cosine": (PEAK, lambda optimizer: CosineAnnealingLR(optimizer, 8)),
    "warm-up": (PEAK, lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, step / 4))),
    "warm-up, then cosine": (
        PEAK,
        lambda optimizer: SequentialLR(
            optimizer, [LinearLR(optimizer, 0.01, total_iters=3), CosineAnnealingLR(optimizer, 5)], [3]
        ),
    ),
    "plateau": (PEAK, plateau),
    # The optimizer's own rate means nothing here: the scheduler sets another one.
    "one cycle": (3e-4, lambda optimizer: OneCycleLR(optimizer, max_lr=PEAK, total_steps=10)),
}


@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_target_norm_is_that_of_the_schedules_peak_from_the_first_step_to_the_last(name, scheduler_first):
    rate, schedule = SCHEDULES[name]
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=rate)
    if scheduler_first:
        scheduler = schedule(optimizer)
        engine = attach(model, optimizer)
    else:
        engine = attach(model, optimizer)
        scheduler = schedule(optimizer)
    for _ in range(8):
        assert norms(engine) == pytest.approx([norm(PEAK)])
        train(model, optimizer, 1, scheduler)
    assert engine.metrics()["scalora/rescales"] == 8


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_with_a_peak_that_is_noted_nowhere_the_target_norm_is_that_of_the_highest_rate_so_far(scheduler_first):
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-4)
    make = lambda: CyclicLR(optimizer, 1e-3, PEAK, step_size_up=3)  # noqa: E731
    scheduler = make() if scheduler_first else None
    engine = attach(model, optimizer)
    scheduler = scheduler or make()
    highest = 1e-3
    for _ in range(10):
        highest = max(highest, optimizer.param_groups[0]["lr"])
        train(model, optimizer, 1, scheduler)
        assert norms(engine) == pytest.approx([norm(highest)])
    assert highest == pytest.approx(PEAK)


def test_each_factor_has_the_rate_of_its_own_group():
    model = adapted()
    of_A, of_B = ([p for name, p in model.named_parameters() if key in name] for key in ("lora_A", "lora_B"))
    optimizer = torch.optim.AdamW([{"params": of_A, "lr": 1e-3}, {"params": of_B, "lr": 1.6e-2}], lr=5e-3)
    for norms_of_layer in attach(model, optimizer).target_norms.values():
        assert norms_of_layer == pytest.approx((norm(1e-3), norm(1.6e-2)))


@pytest.mark.parametrize("scaling", [0.5, 4.0])
def test_the_target_norm_follows_peft_s_scaling(scaling):
    changed, from_the_start = adapted(), adapted(lora_alpha=3 * scaling)
    engines = [attach(model, torch.optim.SGD(trainable(model), lr=PEAK)) for model in (changed, from_the_start)]
    for layer in (changed.base_model.model.first, changed.base_model.model.second):
        layer.set_scale("default", scaling / 2)
    for engine, model in zip(engines, (changed, from_the_start), strict=True):
        assert norms(engine) == pytest.approx([norm(PEAK, scaling)])
        train(model, engine.optimizer, 3)
    for value, other in zip(changed.parameters(), from_the_start.parameters(), strict=True):
        assert torch.equal(value, other)


def test_an_adapter_that_is_switched_off_by_its_scaling_is_left_alone():
    model = adapted()
    engine = attach(model, torch.optim.SGD(trainable(model), lr=PEAK))
    model.base_model.model.first.set_scale("default", 0)
    before = [p.clone() for p in model.base_model.model.first.parameters()]
    train(model, engine.optimizer, 2)
    assert engine.metrics()["scalora/left_alone_share"] == 0.5
    assert all(torch.equal(p, q) for p, q in zip(model.base_model.model.first.parameters(), before, strict=True))


def make(lr, scheduler=None):
    model = adapted(random_B=False)
    optimizer = torch.optim.AdamW(trainable(model), lr=lr)
    return model, optimizer, scheduler and scheduler(optimizer), attach(model, optimizer)


@pytest.mark.parametrize("name", ["none", "plateau", "cyclic", "one cycle"])
@pytest.mark.parametrize("lr_of_the_new_optimizer", [1e-4, 1e-1])
def test_a_state_continues_with_its_own_target_norms(name, lr_of_the_new_optimizer, tmp_path):
    schedules = SCHEDULES | {"cyclic": (PEAK, lambda optimizer: CyclicLR(optimizer, 1e-3, PEAK, step_size_up=3))}
    rate, schedule = schedules[name]
    model, optimizer, scheduler, engine = make(rate, schedule)
    train(model, optimizer, 5, scheduler)
    engine.save(tmp_path)
    progress = copy.deepcopy(scheduler.state_dict()) if scheduler else None
    wanted = engine.target_norms
    train(model, optimizer, 4, scheduler, seed=5)

    again, optimizer, scheduler, engine = make(lr_of_the_new_optimizer, schedule)
    engine.load(tmp_path)
    if scheduler:
        scheduler.load_state_dict(progress)
    assert engine.target_norms == wanted
    train(again, optimizer, 4, scheduler, seed=5)
    for (key, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), key


def test_a_state_of_an_earlier_version_takes_the_rates_of_its_optimizer():
    model, optimizer, _, engine = make(PEAK)
    train(model, optimizer, 2)
    state = {key: value for key, value in copy.deepcopy(engine.state_dict()).items() if key != "base_rates"}
    _, _, _, engine = make(1e-3)
    engine.load_state_dict(state)
    assert norms(engine) == pytest.approx([norm(PEAK)])


@pytest.mark.parametrize("damage", [{}, 3, {"base_model.model.first": [1.0], "base_model.model.second": [1.0, 2.0]}])
def test_damaged_base_rates_are_refused_before_anything_is_changed(damage):
    model, optimizer, _, engine = make(PEAK)
    train(model, optimizer, 2)
    state = copy.deepcopy(engine.state_dict()) | {"base_rates": damage}
    train(model, optimizer, 1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match=r"base learning rates of 'base_model\.model\.first'"):
        engine.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_a_trainer_that_resumes_after_its_plateau_keeps_the_target_norm(tmp_path):
    ids = torch.randint(0, 64, (32, 8), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])

    def trainer():
        model = with_lora(tiny_llama(), r=2, target_modules=["q_proj"], random_B=False)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=PEAK, save_steps=3,
            eval_strategy="steps", eval_steps=1, lr_scheduler_type="reduce_lr_on_plateau",
            lr_scheduler_kwargs={"patience": 0, "threshold": 1e9}, report_to="none", bf16=False, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        callback = ScaLoraCallback(ScaLoraConfig(warmup_steps=1, smoothness=L))
        return Trainer(model, arguments, train_dataset=data, eval_dataset=data.select(range(4)), callbacks=[callback])

    whole, resumed = trainer(), trainer()
    whole.train()
    assert whole.optimizer.param_groups[0]["lr"] < PEAK / 5
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (key, value), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), key


@pytest.mark.parametrize("start", ["random", "oracle"])
def test_a_start_has_the_target_norm_of_the_training_that_follows(start):
    method = ScaLoraMethod(config=ScaLoraConfig(smoothness=L, warmup_steps=0), start=start)
    config = LoraConfig(r=3, lora_alpha=3, target_modules=TWO, alpha_pattern={"second": 12})
    model = method.adapt(TwoLayers(), config, backward, PEAK)
    engine = ScaLora(model, torch.optim.AdamW(trainable(model), lr=PEAK), method.config)
    assert norms(engine) == pytest.approx(sorted([norm(PEAK, 1.0), norm(PEAK, 4.0)]))
    for pair in engine.pairs:
        of_A, of_B = pair.lora_B.norm(dim=0).tolist(), pair.lora_A.norm(dim=1).tolist()
        assert (of_A, of_B) == tuple(pytest.approx([wanted] * 3, rel=1e-5) for wanted in engine.target_norms[pair.name])


def test_a_start_that_can_t_know_the_target_norm_is_refused_and_changes_nothing():
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="give learning_rate"):
        random_start(model, smoothness=L)
    with pytest.raises(ValueError, match=r"positive base learning rate.*first"):
        optimal_start(model, lambda: backward(model), smoothness=L, learning_rate=0.0)
    with pytest.raises(ValueError, match="not both"):
        random_start(model, smoothness=L, learning_rate=PEAK, target_norm=1.0)
    with pytest.raises(ValueError, match="give learning_rate"):
        ScaLoraMethod(config=ScaLoraConfig(smoothness=L), start="random").adapt(
            TwoLayers(), LoraConfig(r=3, target_modules=TWO), backward
        )
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with model.disable_adapter():  # which an attached model of dense remainders may refuse
        model(torch.randn(2, 12))


def test_an_optimizer_whose_one_rate_was_reduced_is_known_by_the_rate_it_was_built_with():
    """As a plateau schedule leaves it in a run that is resumed: it notes the first rate down nowhere."""
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    optimizer.param_groups[0]["lr"] = 1e-4
    assert norms(attach(model, optimizer)) == pytest.approx([norm(1e-2)])
    model = adapted()
    factors = [[p for name, p in model.named_parameters() if key in name] for key in ("lora_A", "lora_B")]
    groups = [{"params": factors[0], "lr": 1e-4}, {"params": factors[1], "lr": 1e-3}]
    assert norms(attach(model, torch.optim.AdamW(groups, lr=1e-2))) == pytest.approx([norm(1e-3), norm(1e-4)])
