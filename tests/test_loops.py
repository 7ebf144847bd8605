"""The loops that people fine-tune with PEFT in, each against a plain loop or an independent truth."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from models import TwoLayers, backward, trainable, with_adapter_in_float32, with_lora
from torch._dynamo.utils import counters

from scalora import ScaLora, ScaLoraConfig, StateError, UnsupportedOptimizerError

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
    with pytest.raises(StateError, match=r"interval=2.*interval=3"):
        again.optimizer.load_state_dict(saved[1])
    with pytest.raises(StateError, match="'scalora' is 7"):
        again.optimizer.load_state_dict(saved[1] | {"scalora": 7})


def test_counts_are_saved_after_detaching_too_and_are_nothing_to_other_optimizers():
    model = adapted()
    engine = ScaLora(model, adamw(model), config_of("dense", warmup_steps=0))
    steps(model, engine.optimizer, range(3))
    assert "scalora" not in engine.state_dict()["optimizer"]
    engine.detach()
    saved = engine.optimizer.state_dict()
    assert (saved["scalora"]["step"], saved["scalora"]["rescales"]) == (3, 1)
    assert "scalora" not in adamw(model).state_dict()
    adamw(model).load_state_dict(saved)
    ScaLora(model, adamw(model), config_of("dense"))
    assert "scalora" not in engine.optimizer.state_dict()


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


# --- steps that no rescale can come before, and parameters that are replaced ----------------------------------------


def released(model, optimizer_of):
    """Every parameter is stepped by a hook as soon as its gradient is there."""
    for parameter in trainable(model):
        optimizer = optimizer_of(parameter)
        parameter.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: optimizer.step())


def test_gradient_release_with_the_attached_optimizer_or_others_is_refused_by_name():
    model = adapted()
    optimizer = adamw(model)
    engine = ScaLora(model, optimizer, config_of("dense"))
    before = tensors(model)
    released(model, lambda parameter: optimizer)
    with pytest.raises(UnsupportedOptimizerError, match=r"AdamW.step\(\).*gradient release"):
        backward(model)
    assert (engine.step, equal(tensors(model), before)) == (0, True)
    model = adapted()
    engine = ScaLora(model, adamw(model), config_of("dense"))
    released(model, lambda parameter: torch.optim.SGD([parameter], lr=1e-2))
    with pytest.raises(UnsupportedOptimizerError, match=r"SGD.step\(\).*gradient release"):
        backward(model)


def test_gradient_release_of_other_parameters_and_of_detached_models_is_nobodys_business():
    model, head = adapted(), torch.nn.Linear(6, 6)
    engine = ScaLora(model, adamw(model), config_of("dense"))
    before = head.weight.clone()
    for parameter in head.parameters():
        optimizer = torch.optim.SGD([parameter], lr=1e-2)
        parameter.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: optimizer.step())
    head(model(torch.randn(4, 12))).square().mean().backward()
    engine.optimizer.step()
    assert not torch.equal(head.weight, before)
    with pytest.warns(UserWarning, match="plain LoRA"):
        engine.detach()
    released(model, lambda parameter: torch.optim.SGD([parameter], lr=1e-2))
    backward(model)


def test_a_step_that_goes_into_a_cuda_graph_is_refused_by_name(monkeypatch):
    model = adapted()
    engine = ScaLora(model, adamw(model), config_of("dense", warmup_steps=0))
    backward(model)
    before = tensors(model)
    monkeypatch.setattr("scalora.rescale.moments.is_being_captured", lambda device: True)
    with pytest.raises(UnsupportedOptimizerError, match=r"captured in a CUDA graph.*make_graphed_callables"):
        engine.optimizer.step()
    assert (engine.step, equal(tensors(model), before)) == (0, True)


def replaced_by_assignment(model, optimizer):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def replaced_in_the_layer(model, optimizer):
    layer = model.base_model.model.second.lora_B["default"]
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())


def replaced_base(model, optimizer):
    layer = model.base_model.model.second.get_base_layer()
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def replaced_in_the_groups(model, optimizer):
    optimizer.param_groups[0]["params"] = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize(
    ("replace", "words"),
    [
        (replaced_by_assignment, "lora_A has been replaced"),
        (replaced_in_the_layer, r"second.*lora_B has been replaced"),
        (replaced_base, r"second.*base weight has been replaced"),
        (replaced_in_the_groups, "does not hold lora_A.*any more"),
    ],
)
def test_replaced_parameters_are_noticed_before_a_rescale_and_can_be_attached_to_anew(replace, words):
    model = adapted()
    engine = ScaLora(model, adamw(model), config_of("dense", warmup_steps=0, interval=1))
    steps(model, engine.optimizer, range(2))
    replace(model, engine.optimizer)
    for p in trainable(model):
        p.grad = torch.ones_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        engine.optimizer.step()
    assert equal(dict(model.named_parameters()), before)
    again = ScaLora(model, adamw(model), config_of("dense", warmup_steps=0, interval=1))
    assert equal(tensors(model), before)  # not refused as an overwritten one
    steps(model, again.optimizer, range(2))
    assert again.metrics()["scalora/rescales"] == 2


def test_an_optimizer_of_replaced_parameters_is_named():
    model = adapted()
    engine = ScaLora(model, adamw(model), config_of("dense", warmup_steps=0))
    steps(model, engine.optimizer, range(2))
    replaced_by_assignment(model, engine.optimizer)
    for p in trainable(model):
        p.requires_grad_(True)
    other = torch.optim.SGD([p for n, p in model.named_parameters() if "lora" in n], lr=1e-3)
    with pytest.warns(UserWarning, match=r"SGD has updated .*first\.lora_A.*attach again"):
        steps(model, other, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, other, range(1))


# --- torch.compile --------------------------------------------------------------------------------------------------


def in_place(model, backend):
    model.compile(backend=backend)
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")  # torch.compile can't trace them
@pytest.mark.parametrize(
    ("attached", "compiled", "kind", "backend"),
    [
        ("before", torch.compile, "factored", "aot_eager"),
        ("before", torch.compile, "dense in bfloat16", "eager"),
        ("before", in_place, "dense", "eager"),
        ("after", torch.compile, "factored", "eager"),
        ("after", torch.compile, "dense in bfloat16", "aot_eager"),
        ("after", in_place, "factored", "eager"),
        pytest.param("before", torch.compile, "factored", "inductor", marks=pytest.mark.slow),
        pytest.param("after", torch.compile, "dense", "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_trains_as_an_eager_one_and_is_not_compiled_again_at_rescales(
    attached, compiled, kind, backend
):
    torch._dynamo.reset()
    counters.clear()
    config = config_of(kind, warmup_steps=2, interval=1)
    eager, model = adapted(kind), adapted(kind)
    of_eager = ScaLora(eager, adamw(eager), config)
    if attached == "before":
        engine = ScaLora(model, adamw(model), config)
        run = compiled(model, backend=backend)
    else:
        run = compiled(model, backend=backend)
        backward(run)  # compiled without ScaLoRA
        engine = ScaLora(run, adamw(model), config)
    graphs = []
    for step in range(12):
        for each, optimizer in ((eager, of_eager.optimizer), (run, engine.optimizer)):
            backward(each, seed=step)
            optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"])
    assert engine.metrics()["scalora/rescales"] == 10
    assert graphs[0] > 0
    assert graphs[3:] == graphs[3:4] * 9  # the graph of a model with a remainder is there by the fourth step
    tolerance = 1e-2 if kind.endswith("bfloat16") else 1e-4
    for (name, found), wanted in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, msg=name)


# --- the table in the docs ------------------------------------------------------------------------------------------


def test_every_line_of_the_table_of_loops_names_a_test_that_is_there():
    tests = Path(__file__).parent
    rows = [row for row in (tests.parent / "docs/loops.md").read_text().splitlines() if row.startswith("| ")][1:]
    for row in rows:
        named = re.findall(r"`((?:plugins/)?test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, name in named:
            assert f"def {name}(" in (tests / file).read_text(), row
    assert len(rows) > 20
