"""Spectra of the total update during a run: right for every kind of layer, and as often as costs under 1 %."""

import json
import math

import pytest
import torch
import yaml
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import pairs
from models import Mixed, TwoLayers, tiny_llama, with_lora
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerState
from typer.testing import CliRunner

from scalora import ScaLora, ScaLoraConfig, effective_rank, numerical_rank
from scalora.cli import app
from scalora.maths.spectrum import singular_values
from scalora.runs import update_spectra
from scalora.runs.errors import InputError
from scalora.runs.settings import load_settings
from scalora.runs.update_spectra import UpdateSpectra


def lines(folder):
    path = folder / "updates.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def with_spectrum(values, m, n):
    """A float32 matrix with nearly these singular values."""
    U, V = (torch.linalg.qr(torch.randn(size, len(values), dtype=torch.float64))[0] for size in (m, n))
    return (U * torch.tensor(values, dtype=torch.float64) @ V.mT).float()


SPECTRA = {
    "decaying": [0.9**i for i in range(96)],
    "at the threshold": [1.0, 0.5, 1.01e-3, 1.0001e-3, 0.9999e-3, 0.99e-3, 1e-4],
    "low rank": [3.0, 2.0, 1.0],
    "flat": [1.0] * 96,
    "far apart": [1.0, 1e-2, 1e-4, 1e-6],
    "large": [1e12 * 0.8**i for i in range(60)],
    "small": [1e-12 * 0.8**i for i in range(60)],
}


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (128, 128)])
def test_ranks_from_the_gram_matrix_are_those_of_the_svd(kind, shape):
    torch.manual_seed(0)
    update = with_spectrum(SPECTRA[kind], *shape)
    values, exact = singular_values(update), torch.linalg.svdvals(update.double())
    assert values.dtype == torch.float64
    assert len(values) == min(shape)
    assert int((values > 1e-3 * values[0]).sum()) == numerical_rank(update)
    large = exact > 1e-3 * exact[0]
    torch.testing.assert_close(values[large], exact[large], rtol=1e-9, atol=0)
    torch.testing.assert_close(values, exact, rtol=0, atol=float(1e-7 * exact[0]))
    assert update_spectra.effective_rank_of_values(values) == pytest.approx(effective_rank(update), rel=1e-4)


def test_a_zero_matrix_has_no_singular_values_but_zero():
    assert singular_values(torch.zeros(5, 3)).tolist() == [0, 0, 0]


def measured(model, folder, adapt, config=None):
    """The lines of one measurement, after `adapt` has changed the model."""
    spectra = UpdateSpectra(model, config, times=1)
    adapted = adapt(model)
    state = TrainerState(max_steps=1)
    spectra.write_to(folder)
    spectra.on_train_begin(None, state, None, model=adapted)
    state.global_step = 1
    spectra.on_step_end(None, state, None)
    return {line["layer"]: torch.tensor(line["singular_values"], dtype=torch.float64) for line in lines(folder)}


def check(values, update):
    exact = torch.linalg.svdvals(update.detach().double())[:64]
    torch.testing.assert_close(values, exact, rtol=1e-5, atol=float(1e-6 * exact[0]))


def noise(weight):
    return 0.02 * torch.randn_like(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_without_adapter_is_its_weight(dtype, tmp_path):
    model = TwoLayers().to(dtype)
    before = model.first.weight.detach().clone()

    def train(model):
        with torch.no_grad():
            model.first.weight += noise(model.first.weight)
        return model

    values = measured(model, tmp_path, train)
    check(values["first"], model.first.weight.double() - before.double())
    assert not values["second"].any()


def product(layer):
    A, B = (getattr(layer, name)["default"].weight.detach().double() for name in ("lora_A", "lora_B"))
    return layer.scaling["default"] * B @ A


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moved", [False, True], ids=["base kept", "base changed"])
def test_lora_over_linear_and_conv1d_layers(moved, dtype, tmp_path):
    config = {"target_modules": ["conv1d", "linear"], "r": 3, "lora_dropout": 0.5}
    updates = {}

    def adapt(model):
        adapted = with_lora(model, **config).train()
        for name in ("conv1d", "linear"):
            layer = adapted.base_model.model.get_submodule(name)
            weight = layer.base_layer.weight
            change = noise(weight) if moved else torch.zeros_like(weight)
            before = weight.detach().double().clone()
            with torch.no_grad():
                weight += change
            change = weight.detach().double() - before
            updates[name] = product(layer) + (change.mT if name == "conv1d" else change)
        return adapted

    values = measured(Mixed().to(dtype), tmp_path, adapt, LoraConfig(**config))
    assert set(values) == {"conv1d", "linear"}
    for name, update in updates.items():
        assert numerical_rank(update) == (10 if moved else 3)
        check(values[name], update)


@pytest.mark.parametrize("merge", ["dense", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scalora_is_its_remainder_and_its_adapter(merge, dtype, tmp_path):
    adapters = {}

    def adapt(model):
        adapted = with_lora(model, r=2, lora_alpha=2, target_modules=["q_proj"], random_B=False)
        adapters["q_proj"] = adapted.base_model.model.model.layers[0].self_attn.q_proj
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
        ScaLora(adapted, optimizer, ScaLoraConfig(merge=merge, warmup_steps=0))
        for step in range(6):
            tokens = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(step))
            adapted(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return adapted

    model = tiny_llama().to(dtype)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().double().clone()
    values = measured(model, tmp_path, adapt, LoraConfig(target_modules=["q_proj"]))
    layer = adapters["q_proj"]
    remainder = layer.frozen_remainder
    if merge == "dense":
        update = remainder.exact(layer.base_layer.weight).double() - before + product(layer)
    else:
        update = remainder.left.double() @ remainder.right.double().mT + product(layer)
    assert numerical_rank(update) > 2
    check(values["model.layers.0.self_attn.q_proj"], update)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_adapters_are_what_they_do_to_unit_vectors(dtype, tmp_path):
    config = {"target_modules": ["first"], "r": 2, "use_dora": True, "lora_dropout": 0.5}
    adapters = {}

    def adapt(model):
        adapters["first"] = with_lora(model, **config).train()
        return adapters["first"]

    model = TwoLayers().to(dtype)
    before = model.first.weight.detach().double().clone()
    values = measured(model, tmp_path, adapt, LoraConfig(**config))
    layer = adapters["first"].base_model.model.first
    assert layer.training
    whole = before + product(layer)
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().double()
    check(values["first"], magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True) - before)


def test_wide_layers_are_fed_a_part_of_the_unit_vectors_at_a_time(tmp_path, monkeypatch):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = measured(TwoLayers(), tmp_path / "whole", dora)
    monkeypatch.setattr(update_spectra, "_ROWS", 5)
    parts = measured(TwoLayers(), tmp_path / "parts", dora)
    torch.testing.assert_close(parts["first"], whole["first"])


def dora(model):
    return with_lora(model, target_modules=["first"], r=2, use_dora=True)


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_over_a_quantised_base(use_dora, tmp_path):
    model = nn.Sequential(nn.Linear(64, 64))
    quantised = Linear4bit(64, 64, quant_type="nf4")
    quantised.load_state_dict(model[0].state_dict())
    model[0] = quantised.to("cpu")
    adapters = {}

    def adapt(model):
        adapted = get_peft_model(model, LoraConfig(target_modules=["0"], r=3, use_dora=use_dora))
        layer = adapted.base_model.model[0]
        nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
        adapters["0"] = layer
        return adapted

    values = measured(model, tmp_path, adapt)
    update = product(adapters["0"])
    if use_dora:
        weight = quantised.weight
        base = dequantize_4bit(weight.data, weight.quant_state).detach().double()
        whole = base + update
        magnitude = adapters["0"].lora_magnitude_vector["default"].weight.detach().double()
        exact = torch.linalg.svdvals(magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True) - base)
        # bitsandbytes rounds a layer's outputs.
        torch.testing.assert_close(values["0"], exact, rtol=0, atol=float(0.02 * exact[0]))
    else:
        check(values["0"], update)


def test_an_update_that_is_not_finite_is_left_out(tmp_path):
    def diverge(model):
        with torch.no_grad():
            model.second.weight[0, 0] = math.nan
        return model

    assert set(measured(TwoLayers(), tmp_path, diverge)) == {"first"}


class Clock:
    """Time that passes in steps and in measurements only."""

    def __init__(self, monkeypatch, seconds_per_layer):
        self.now, self.cost, self.measured = 0.0, seconds_per_layer, []
        spectrum = update_spectra._spectrum

        def slow(tracked):
            self.now += self.cost
            self.measured.append(self.now)
            return spectrum(tracked)

        monkeypatch.setattr(update_spectra, "_spectrum", slow)
        monkeypatch.setattr(update_spectra.time, "perf_counter", lambda: self.now)


def run(spectra, model, clock, steps, folder, *, stop_at=None, start=0):
    """Steps of one second each; returns the seconds spent on measuring after each of them."""
    state = TrainerState(max_steps=steps, global_step=start)
    spectra.write_to(folder)
    spectra.on_train_begin(None, state, None, model=model)
    spent = []
    for step in range(start + 1, (stop_at or steps) + 1):
        clock.now += 1
        state.global_step = step
        spectra.on_step_end(None, state, None)
        spent.append(spectra.seconds)
    spectra.on_train_end(None, state, None)
    return spent


def steps_of(folder):
    return list(dict.fromkeys(line["step"] for line in lines(folder)))


@pytest.mark.parametrize(
    ("seconds_per_layer", "expected"),
    [
        (1e-4, list(range(20, 401, 20))),  # cheap: twenty times, evenly
        (0.1, [60, 80, 100, 120, 140, 160, 180, 200, 220, 240, 260, 280, 300, 320, 340, 360, 380, 400]),
        (0.39, [200, 280, 360, 400]),
        (3.0, [400]),  # dear: the last one alone
    ],
)
def test_auto_measures_as_often_as_costs_less_than_a_hundredth(seconds_per_layer, expected, tmp_path, monkeypatch):
    model = TwoLayers()
    clock = Clock(monkeypatch, seconds_per_layer)
    spectra = UpdateSpectra(model, None, times="auto")
    spent = run(spectra, model, clock, 400, tmp_path)
    assert steps_of(tmp_path) == expected
    assert spectra.seconds == pytest.approx(seconds_per_layer * len(clock.measured))
    if len(expected) > 1:
        # With the timing of the first layer and the last measurement: under 1 % at every step.
        assert all(seconds <= 0.01 * step for step, seconds in enumerate(spent, 1) if seconds > 1.5 * seconds_per_layer)
        assert spent[-1] < 0.01 * 400
    else:
        assert len(clock.measured) == 3  # one layer, to know what it costs, and the two at the end


def test_a_machine_that_gets_slower_is_measured_less_often(tmp_path, monkeypatch):
    model = TwoLayers()
    clock = Clock(monkeypatch, 0.1)
    spectra = UpdateSpectra(model, None, times="auto")
    spectrum = update_spectra._spectrum

    def slower(tracked):
        clock.cost = 0.5 if 100 < clock.now < 110 else 0.1  # at one measurement only
        return spectrum(tracked)

    monkeypatch.setattr(update_spectra, "_spectrum", slower)
    run(spectra, model, clock, 400, tmp_path)
    assert steps_of(tmp_path) == [60, 80, 100, 360, 380, 400]
    assert spectra.seconds < 4


def test_a_very_short_run_is_measured_at_its_end_only(tmp_path, monkeypatch):
    model = TwoLayers()
    clock = Clock(monkeypatch, 0.05)
    run(UpdateSpectra(model, None, times="auto"), model, clock, 10, tmp_path)
    assert steps_of(tmp_path) == [10]


def test_a_number_measures_that_often_whatever_it_costs(tmp_path, monkeypatch):
    model = TwoLayers()
    run(UpdateSpectra(model, None, times=4), model, Clock(monkeypatch, 9.0), 40, tmp_path)
    assert steps_of(tmp_path) == [10, 20, 30, 40]


@pytest.mark.parametrize("times", ["auto", 2])
def test_a_run_that_stops_early_is_measured_where_it_stops(times, tmp_path, monkeypatch):
    model = TwoLayers()
    run(UpdateSpectra(model, None, times=times), model, Clock(monkeypatch, 1e-4), 400, tmp_path, stop_at=207)
    assert steps_of(tmp_path)[-1] == 207
    assert len([line for line in lines(tmp_path) if line["step"] == 207]) == 2


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path, monkeypatch):
    model = TwoLayers()
    clock = Clock(monkeypatch, 1e-4)
    run(UpdateSpectra(model, None, times=8), model, clock, 40, tmp_path, stop_at=23)
    assert steps_of(tmp_path) == [5, 10, 15, 20, 23]
    run(UpdateSpectra(model, None, times=8), model, clock, 40, tmp_path, start=18)
    assert steps_of(tmp_path) == [5, 10, 15, 20, 25, 30, 35, 40]
    assert len(lines(tmp_path)) == 2 * 8


@pytest.mark.parametrize("fails", [False, True])
def test_spectra_are_computed_by_one_thread(fails, tmp_path, monkeypatch):
    threads = []

    def seen(tracked):
        threads.append(torch.get_num_threads())
        if fails:
            raise torch.OutOfMemoryError
        return torch.ones(2)

    monkeypatch.setattr(update_spectra, "_spectrum", seen)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        measured(TwoLayers(), tmp_path, lambda model: model)
        assert set(threads) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("times", ["auto", 10])
def test_measuring_ends_when_the_memory_does(times, tmp_path, monkeypatch, caplog):
    def full(tracked):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = TwoLayers()
    clock = Clock(monkeypatch, 1e-4)
    monkeypatch.setattr(update_spectra, "_spectrum", full)
    run(UpdateSpectra(model, None, times=times), model, clock, 40, tmp_path)
    assert lines(tmp_path) == []
    assert len(caplog.records) == 1
    assert "no memory to measure the rank" in caplog.text


def train(folder, **settings):
    config = folder / "config.yaml"
    training = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2}
    content = {"output_dir": str(folder / "run"), "save_model": False, "scalora": {"warmup_steps": 1}}
    config.write_text(yaml.safe_dump(content | {"training": training} | settings))
    result = CliRunner().invoke(app, ["train", str(config)])
    assert result.exit_code == 0, result.output
    summary = json.loads((folder / "run" / "summary.json").read_text())
    losses = [json.loads(line).get("loss") for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return summary, lines(folder / "run"), losses


@pytest.mark.slow
@pytest.mark.parametrize("method", ["scalora", "dora"])
def test_a_run_is_measured_by_default_and_trains_as_it_does_without(method, causal_folder, write_jsonl, tmp_path):
    settings = {
        "model": str(causal_folder),
        "method": method,
        "data": {"train": str(write_jsonl("train.jsonl", pairs(24)))},
        "lora": {"r": 2, "lora_alpha": 2, "lora_dropout": 0.1},
    }
    for name in ("default", "often", "never"):
        (tmp_path / name).mkdir()
    default, updates, losses = train(tmp_path / "default", **settings)
    assert [line["step"] for line in updates][-4:] == [6] * 4
    assert 0 < default["measuring_seconds"] < default["training_seconds"]
    _, measured_often, losses_often = train(tmp_path / "often", **settings, track_updates=6)
    assert [line["step"] for line in measured_often] == [step for step in range(1, 7) for _ in range(4)]
    never, nothing, losses_never = train(tmp_path / "never", **settings, track_updates=0)
    assert never["measuring_seconds"] == 0
    assert nothing == []
    assert losses == losses_often == losses_never


@pytest.mark.parametrize(("written", "read"), [("auto", "auto"), (0, 0), (7, 7), (None, "auto")])
def test_how_often_is_auto_or_a_number(written, read, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": "m"} | ({} if written is None else {"track_updates": written})))
    assert load_settings(config).track_updates == read


@pytest.mark.parametrize("wrong", [-1, 2.5, "often", True])
def test_anything_else_is_refused_by_name(wrong, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": "m", "track_updates": wrong}))
    with pytest.raises(InputError, match=f"track_updates={wrong!r}: must be auto or a number of times"):
        load_settings(config)
