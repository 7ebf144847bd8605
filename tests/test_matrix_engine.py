"""``mode="matrix"`` in the engine: the function, the state, saving and resuming, and what is refused or left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Mixed, TwoLayers, tiny_llama, trainable, with_lora
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from scalora import (
    PairAdamW,
    PairState,
    ScaLora,
    ScaLoraConfig,
    UnsupportedOptimizerError,
    export_adapter,
    reference_matrix_step,
)
from scalora.rivals.controls import scale_gradients_only


def batches(count: int, dtype: torch.dtype = torch.float64, features: int = 12, outputs: int = 6) -> list[tuple]:
    generator = torch.Generator().manual_seed(3)
    made = [(torch.randn(16, n, generator=generator) for n in (features, outputs)) for _ in range(count)]
    return [(x.to(dtype), y.to(dtype)) for x, y in made]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple]) -> None:
    for x, y in data:
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def matrix(**settings) -> ScaLoraConfig:
    return ScaLoraConfig(**{"mode": "matrix", "warmup_steps": 0, **settings})


@pytest.mark.slow
@pytest.mark.parametrize("optimum", ["polar", "exact"])
@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_two_hundred_rescales_keep_the_function(optimum, merge):
    model = with_lora(TwoLayers(), dtype=torch.float64, r=3, target_modules=["first", "second"])
    optimizer = PairAdamW(model, lr=0.01)
    engine = ScaLora(model, optimizer, matrix(optimum=optimum, merge=merge))
    x = torch.randn(16, 12, dtype=torch.float64)
    worst = 0.0
    for inputs, targets in batches(200):
        nn.functional.mse_loss(model(inputs), targets).backward()
        before = model(x).detach()
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # so that the step itself changes nothing
        with torch.no_grad():
            engine._rescale(None)
        worst = max(worst, float((model(x) - before).abs().max() / before.abs().max()))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    assert engine.metrics()["scalora/matrix_share"] == 1
    # A compression of a factored remainder leaves out what is below 1e-7 of it.
    assert worst < (1e-12 if merge == "dense" else 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [3, 16])
def test_factors_that_lack_directions_at_every_rescale_train_as_without_rescales(r, dtype):
    """As those of a rank above a layer's sides, or of layers of whose outputs few count, such as an expert's."""
    losses, largest = {}, {}
    for rescaled in (True, False):
        model = with_lora(TwoLayers(), dtype=dtype, r=r, lora_alpha=r, target_modules=["first", "second"])
        optimizer = PairAdamW(model, lr=0.005)
        if rescaled:
            ScaLora(model, optimizer, matrix())
        for x, y in batches(1, dtype) * 200:
            output = model(x)
            assert output.isfinite().all()
            loss = nn.functional.mse_loss(output[:, :2], y[:, :2])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[rescaled] = float(loss.detach())
        moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "second_moment")]
        largest[rescaled] = max(float(moment.abs().max()) for moment in moments)
    assert losses[True] < 2 * losses[False] + 1e-3
    assert largest[True] < 1e3 * largest[False]


def test_a_direction_that_comes_up_late_does_not_make_the_momentum_explode():
    """A trained head of one output turns, and with it the one direction of the gradients of the layer below."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 1))
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["0", "2"], modules_to_save=["3"]))
    optimizer = torch.optim.SGD(trainable(model), 1e-3, momentum=0.9)
    ScaLora(model, optimizer, ScaLoraConfig(mode="matrix", target_norm=1.0))
    x = torch.randn(256, 64)
    y = torch.tanh(x @ torch.randn(64, 1) / 8)
    losses = []
    for _ in range(80):
        loss = nn.functional.mse_loss(model(x), y)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[10] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("optimum", ["polar", "exact"])
def test_fifty_steps_are_those_of_the_dense_reference(optimum):
    model = with_lora(nn.Sequential(nn.Linear(12, 6, bias=False)), dtype=torch.float64, r=3, target_modules=["0"])
    layer = model.base_model.model[0]
    optimizer = PairAdamW(model, lr=0.02)
    ScaLora(model, optimizer, matrix(optimum=optimum, target_norm=0.7))
    A, B = layer.lora_B["default"].weight.detach().clone(), layer.lora_A["default"].weight.detach().mT.clone()
    state = PairState.start(layer.base_layer.weight.detach().clone(), A, B)
    s = layer.scaling["default"]
    for x, y in batches(50):
        weight = (state.weight + s * state.A @ state.B.mT).requires_grad_()
        nn.functional.mse_loss(x @ weight.mT, y).backward()
        state = reference_matrix_step(
            state, weight.grad, scaling=s, learning_rate=0.02, target_norm=0.7, optimum=optimum
        )
        train(model, optimizer, [(x, y)])
        torch.testing.assert_close(layer.lora_B["default"].weight, state.A, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(layer.lora_A["default"].weight, state.B.mT, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(layer.base_layer.weight, state.weight, rtol=1e-8, atol=1e-8)


def test_after_a_polar_rescale_the_factors_are_orthonormal_but_for_the_step():
    model = with_lora(TwoLayers(), dtype=torch.float64, r=3, target_modules=["first"])
    optimizer = PairAdamW(model, lr=1e-9)
    ScaLora(model, optimizer, matrix(target_norm=0.5))
    train(model, optimizer, batches(1))
    layer = model.base_model.model.first
    for tall in (layer.lora_B["default"].weight, layer.lora_A["default"].weight.mT):
        torch.testing.assert_close(tall.mT @ tall, 0.25 * torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Muon(p)])
def test_optimizers_with_a_linear_state_are_carried(make):
    model = with_lora(TwoLayers(), dtype=torch.float64, r=3, target_modules=["first", "second"])
    optimizer = make(trainable(model))
    engine = ScaLora(model, optimizer, matrix(target_norm=0.5))
    train(model, optimizer, batches(5))
    assert engine.metrics()["scalora/matrix_share"] == 1


def test_column_scaling_carries_the_state_of_pair_adamw_as_diagonal_matrices():
    """The same column scaling twice: once with matrices, and with momentum as the truth of the linear state."""
    models = [with_lora(TwoLayers(), dtype=torch.float64, r=3, target_modules=["first"]) for _ in range(2)]
    pair = PairAdamW(models[0], lr=0.0)
    momentum = torch.optim.SGD(trainable(models[1]), lr=0.0, momentum=0.9, dampening=0.1)
    for model, optimizer in zip(models, (pair, momentum), strict=True):
        ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=1, target_norm=0.5))
        train(model, optimizer, batches(4))
    layers = [model.base_model.model.first for model in models]
    for name in ("lora_A", "lora_B"):
        mine, true = (getattr(layer, name)["default"].weight for layer in layers)
        torch.testing.assert_close(mine, true)
        # torch's momentum buffer begins with the whole first gradient, an average with a tenth of it.
        assert pair.state[mine]["exp_avg"].shape == momentum.state[true]["momentum_buffer"].shape
    assert all(state["second_moment"].isfinite().all() for state in pair.state.values())


def test_from_pefts_zero_start_the_first_rescales_change_nothing_but_the_factors():
    model = with_lora(TwoLayers(), dtype=torch.float64, random_B=False, r=3, target_modules=["first", "second"])
    optimizer = PairAdamW(model, lr=1e-3)
    engine = ScaLora(model, optimizer, matrix())
    twin = copy.deepcopy(model)
    truth = PairAdamW(twin, lr=1e-3)
    train(twin, truth, batches(1))
    train(model, optimizer, batches(1))
    assert engine.metrics()["scalora/left_alone_share"] == 1  # lora_B = 0 has no optimum
    x = batches(1)[0][0]
    torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-14)
    train(model, optimizer, batches(3))
    assert engine.metrics()["scalora/matrix_share"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["dense", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_adapter_is_the_trained_model(tmp_path, merge, dtype):
    model = with_lora(tiny_llama(), r=4, target_modules="all-linear")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    optimizer = PairAdamW(model, lr=1e-3)
    ScaLora(model, optimizer, matrix(merge=merge))
    tokens = torch.arange(24).reshape(2, 12)
    for _ in range(4):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    trained = model(input_ids=tokens).logits.detach()
    model.save_pretrained(tmp_path / "saved")
    base = tiny_llama().to(dtype)
    export_adapter(copy.deepcopy(base), tmp_path / "saved", tmp_path / "adapter", rtol=1e-5)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    # The base of a dense merge in bfloat16 is rounded once.
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(loaded(input_ids=tokens).logits, trained, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_a_resumed_run_continues_to_the_bit(tmp_path, merge):
    def build() -> tuple[nn.Module, PairAdamW, ScaLora]:
        model = with_lora(TwoLayers(), r=3, target_modules=["first", "second"])
        optimizer = PairAdamW(model, lr=1e-2)
        return model, optimizer, ScaLora(model, optimizer, matrix(merge=merge))

    data = batches(8, torch.float32)
    model, optimizer, engine = build()
    train(model, optimizer, data[:4])
    engine.save(tmp_path)
    train(model, optimizer, data[4:])
    resumed, its_optimizer, its_engine = build()
    its_engine.load(tmp_path)
    train(resumed, its_optimizer, data[4:])
    assert torch.equal(model(data[0][0]), resumed(data[0][0]))


def test_every_kind_of_layer_is_rescaled():
    model = with_lora(Mixed(), dtype=torch.float64, r=3, target_modules=["embed", "conv1d", "linear"])
    optimizer = PairAdamW(model, lr=1e-3)
    engine = ScaLora(model, optimizer, matrix())
    tokens = torch.arange(20).reshape(4, 5)
    before = None
    for _ in range(3):
        output = model(tokens)
        before = output.detach()
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert engine.metrics()["scalora/matrix_share"] == 1
    assert float((model(tokens) - before).abs().max()) < 0.1


@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_a_layer_with_nan_is_left_alone_and_counted(merge):
    model = with_lora(TwoLayers(), r=3, target_modules=["first", "second"])
    optimizer = PairAdamW(model, lr=0.0)
    engine = ScaLora(model, optimizer, matrix(target_norm=0.5, merge=merge))
    first = model.base_model.model.first
    nn.functional.mse_loss(model(torch.randn(4, 12)), torch.randn(4, 6)).backward()
    first.lora_A["default"].weight.grad[0, 0] = torch.nan
    factors = [first.lora_A["default"].weight.detach().clone(), first.lora_B["default"].weight.detach().clone()]
    weight = first.base_layer.weight.detach().clone()
    with torch.no_grad():
        engine._rescale(None)
    assert torch.equal(first.lora_A["default"].weight, factors[0])
    assert torch.equal(first.lora_B["default"].weight, factors[1])
    assert torch.equal(first.base_layer.weight, weight)
    with pytest.warns(UserWarning, match="NaN"):
        metrics = engine.metrics()
    assert metrics["scalora/nonfinite"] == 1
    assert metrics["scalora/matrix_share"] == 0.5


def test_a_skipped_step_changes_nothing():
    model = with_lora(TwoLayers(), r=3, target_modules=["first", "second"])
    optimizer = PairAdamW(model, lr=0.1)
    engine = ScaLora(model, optimizer, matrix(target_norm=0.5))
    nn.functional.mse_loss(model(torch.randn(4, 12)), torch.randn(4, 6)).backward()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        engine._rescale(torch.tensor(1.0))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weight_decay_decays_the_remainder_too():
    model = with_lora(TwoLayers(), dtype=torch.float64, r=3, target_modules=["first"])
    optimizer = PairAdamW(model, lr=1e-3)
    ScaLora(model, optimizer, matrix(merge="factored"))
    train(model, optimizer, batches(5))
    layer = model.base_model.model.first
    update = layer.get_delta_weight("default").detach().clone()
    optimizer.param_groups[0]["weight_decay"] = 0.5
    for parameter in trainable(model):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.state[parameter]["exp_avg"].zero_()
    optimizer.step()
    torch.testing.assert_close(layer.get_delta_weight("default"), update * (1 - 1e-3 * 0.5), rtol=1e-10, atol=1e-12)


def test_weight_decay_with_a_dense_merge_is_refused():
    model = with_lora(TwoLayers(), r=3, target_modules=["first"])
    with pytest.raises(UnsupportedOptimizerError, match="merge='factored'"):
        ScaLora(model, PairAdamW(model, weight_decay=0.1), matrix(merge="dense"))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
def test_an_elementwise_state_is_refused_by_name(optimizer):
    model = with_lora(TwoLayers(), r=3, target_modules=["first"])
    with pytest.raises(UnsupportedOptimizerError, match=r"mode='matrix'.*elementwise.*PairAdamW"):
        ScaLora(model, optimizer(trainable(model), lr=1e-3), matrix(target_norm=1.0))


def test_a_state_that_appears_later_is_refused_before_anything_is_changed():
    """Muon with an auxiliary Adam: whether an adapter has Adam's moments is seen only in its state."""

    with_aux_adam = type("SingleDeviceMuonWithAuxAdam", (torch.optim.Adam,), {"__module__": "muon"})
    model = with_lora(TwoLayers(), r=3, target_modules=["first"])
    optimizer = with_aux_adam([{"params": trainable(model), "use_muon": False}], lr=1e-3)
    ScaLora(model, optimizer, matrix(target_norm=1.0, warmup_steps=1))
    data = batches(2, torch.float32)
    train(model, optimizer, data[:1])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedOptimizerError, match=r"mode='matrix'.*'exp_avg_sq'"):
        train(model, optimizer, data[1:])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_transport_of_column_scalings_is_refused():
    model = with_lora(TwoLayers(), r=3, target_modules=["first"])
    with pytest.raises(ValueError, match="transport"):
        ScaLora(model, PairAdamW(model), matrix(), transport=scale_gradients_only)


def test_without_pair_adamw_the_norm_has_to_be_given():
    model = with_lora(TwoLayers(), r=3, target_modules=["first"])
    with pytest.raises(ValueError, match=r"SGD needs target_norm"):
        ScaLora(model, torch.optim.SGD(trainable(model), lr=0.1), matrix())


@pytest.mark.parametrize(("r", "alpha", "width"), [(2, 2, 64), (8, 8, 64), (8, 32, 64), (8, 8, 256)])
def test_rate_and_turn_mean_the_same_for_every_shape(r, alpha, width):
    model = with_lora(nn.Sequential(nn.Linear(width, width)), r=r, lora_alpha=alpha, target_modules=["0"])
    optimizer = PairAdamW(model, lr=1e-3)
    ScaLora(model, optimizer, matrix(turn=0.2))
    layer = model.base_model.model[0]

    def weight() -> Tensor:
        return (layer.base_layer.weight + layer.get_delta_weight("default")).detach().clone()

    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        G = torch.randn(width, width, generator=generator)
        lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        s = layer.scaling["default"]
        lora_B.grad, lora_A.grad = s * G @ lora_A.detach().mT, s * lora_B.detach().mT @ G
        before = weight()
        optimizer.step()
    moved = float((weight() - before).square().mean().sqrt())
    assert 0.6e-3 < moved < 1.2e-3
    # Columns of length 1 before the step, at right angles to what a random gradient adds.
    norm = ScaLora(model, optimizer, matrix(turn=0.2)).target_norms["base_model.model.0"][0]
    turned = float((lora_B.square().sum(0).mean().sqrt() / norm) ** 2 - 1) ** 0.5
    assert 0.1 < turned < 0.3


@pytest.mark.parametrize("of", ["lora_A", "lora_B"])
def test_a_rescale_of_an_ill_conditioned_factor_keeps_the_function_in_float32(of):
    model = with_lora(nn.Sequential(nn.Linear(64, 48, bias=False)), r=4, target_modules=["0"])
    layer = model.base_model.model[0]
    factor = getattr(layer, of)["default"].weight
    with torch.no_grad():
        narrow = torch.logspace(0, -5, 4)
        factor.mul_(narrow[:, None] if of == "lora_A" else narrow)
        mixed = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
        factor.copy_(mixed @ factor if of == "lora_A" else factor @ mixed)
    engine = ScaLora(model, PairAdamW(model, lr=1e-3), matrix(target_norm=1.0))

    def weight() -> Tensor:
        product = (
            layer.scaling["default"] * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        )
        return layer.base_layer.weight.double() + product

    before = weight()
    model(torch.randn(8, 64)).square().mean().backward()
    with torch.no_grad():
        engine._rescale(None)
    assert engine.metrics()["scalora/matrix_share"] == 1
    assert float((weight() - before).norm() / before.norm()) < 3e-7


@pytest.mark.slow
def test_lora_alpha_changes_nothing():
    """Rate and target norm take it into account, so that it can't make a good rate bad."""
    outputs = []
    for alpha in (3, 12):
        model = with_lora(
            TwoLayers(), dtype=torch.float64, random_B=False, r=3, lora_alpha=alpha, target_modules=["first"]
        )
        optimizer = PairAdamW(model, lr=1e-2)
        ScaLora(model, optimizer, matrix())
        train(model, optimizer, batches(20))
        outputs.append(model(batches(1)[0][0]).detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["auto", "matrix"])
@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_layers_in_small_chunks_train_as_those_of_a_shape_together(mode, merge, monkeypatch):
    def trained() -> dict[str, Tensor]:
        torch.manual_seed(0)
        layers = [nn.Linear(12, 12) for _ in range(5)]
        model = with_lora(
            nn.Sequential(*layers, nn.Linear(12, 6)), dtype=torch.float64, r=3, target_modules="all-linear"
        )
        optimizer = PairAdamW(model, lr=0.01)
        ScaLora(model, optimizer, ScaLoraConfig(mode=mode, merge=merge, warmup_steps=1))
        train(model, optimizer, batches(12))
        return model.state_dict()

    wanted = trained()
    monkeypatch.setattr("scalora.model.adapters.CHUNK", 2 * 8 * 3 * (12 + 12))  # two layers
    for key, value in trained().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-9, atol=1e-12)
