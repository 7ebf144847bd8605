"""The engine on PEFT models: preserved function, equality with a plain re-statement, rank, refusals."""

import copy
import warnings

import pytest
import torch
from models import Mixed, TwoLayers, tiny_gpt2, tiny_llama, trainable, with_lora
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from scalora import (
    ChangedBaseError,
    LayerState,
    ScaLora,
    ScaLoraConfig,
    UnsupportedLayerError,
    UnsupportedOptimizerError,
    numerical_rank,
    reference_step,
)

TWO = ["first", "second"]


def regression(seed=0, features=12, outputs=6, count=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator, dtype=dtype)
    return x, torch.randn(count, outputs, generator=generator, dtype=dtype)


class Probe:
    """Compares a model's output right before and right after the engine's hook, inside optimizer.step()."""

    def __init__(self, model, optimizer, config, inputs):
        self.model, self.inputs, self.worst = model, inputs, 0.0
        self.seen = 0
        optimizer.register_step_pre_hook(self.before)
        self.engine = ScaLora(model, optimizer, config)
        optimizer.register_step_pre_hook(self.after)

    @torch.no_grad()
    def output(self):
        self.model.eval()
        result = self.model(self.inputs)
        self.model.train()
        return result

    def before(self, *_):
        self.reference = self.output()

    def after(self, *_):
        change = (self.output() - self.reference).norm() / self.reference.norm()
        assert change.isfinite()
        self.worst = max(self.worst, change.item())
        self.seen += 1


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_200_rescales_keep_the_function(dtype, bound, dropout):
    model = with_lora(TwoLayers(), dtype=dtype, r=3, target_modules=TWO, lora_dropout=dropout, lora_alpha=7)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    x, y = regression(dtype=dtype)
    probe = Probe(model, optimizer, ScaLoraConfig(warmup_steps=0), x)
    weight = model.base_model.model.first.base_layer.weight.clone()
    for _ in range(200):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert probe.seen == 200
    assert probe.engine.metrics()["scalora/rescales"] == 200
    assert (model.base_model.model.first.base_layer.weight - weight).norm() > 0.1 * weight.norm()
    assert probe.worst < bound


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["dense", "factored"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_every_kind_of_layer_keeps_the_function(use_rslora, merge):
    model = with_lora(
        Mixed(),
        dtype=torch.float64,
        r=3,
        target_modules=["embed", "conv1d", "linear"],
        modules_to_save=["head"],
        rank_pattern={"linear": 2},
        alpha_pattern={"conv1d": 5},
        use_rslora=use_rslora,
        fan_in_fan_out=False,
    )
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    tokens = torch.randint(0, 20, (16, 4), generator=torch.Generator().manual_seed(0))
    probe = Probe(model, optimizer, ScaLoraConfig(warmup_steps=0, merge=merge), tokens)
    layers = {name: getattr(model.base_model.model, name).base_layer for name in ("embed", "conv1d", "linear")}
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    for _ in range(30):
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten() % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert probe.worst < 1e-12
    for name, layer in layers.items():
        assert torch.equal(layer.weight, before[name]) == (merge == "factored"), name
    live = probe.output()
    merged = model.merge_and_unload().eval()
    torch.testing.assert_close(merged(tokens), live, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_language_models_train_and_gain_rank(make):
    model = with_lora(make(), random_B=False, r=2, target_modules="all-linear")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=3, interval=2))
    tokens = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(20):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    metrics = engine.metrics()
    assert losses[-1] < losses[0] - 0.1
    assert metrics["scalora/rescales"] == 8
    shares = [metrics[f"scalora/{kind}_share"] for kind in ("column", "scalar", "left_alone")]
    assert sum(shares) == pytest.approx(1)


@pytest.mark.slow
def test_the_engine_is_the_reference():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 14, bias=False))
    model = with_lora(base, dtype=torch.float64, r=3, lora_alpha=6, target_modules=["0"])
    layer = model.base_model.model[0]
    A, B = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    x, y = regression(features=9, outputs=14, dtype=torch.float64)
    state = LayerState.start(layer.base_layer.weight.data.clone(), A.data.clone(), B.data.T.clone())
    optimizer = torch.optim.Adam(trainable(model), lr=3e-3)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, interval=1, target_norm=0.8))
    for _ in range(50):
        error = x @ (state.weight + 2.0 * state.A @ state.B.T).T - y
        G = 2 / error.numel() * error.T @ x
        state = reference_step(state, G, scaling=2.0, learning_rate=3e-3, target_norm=0.8)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(layer.base_layer.weight.data, state.weight, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(A.data, state.A, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(B.data, state.B.T, rtol=1e-8, atol=1e-8)
        for parameter, first, second in (
            (A, state.first_A, state.second_A),
            (B, state.first_B.T, state.second_B.T),
        ):
            torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], first, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"], second, rtol=1e-8, atol=1e-12)
    assert engine.metrics()["scalora/rescales"] == 50


def run(model, x, y, steps, config=None, lr=1e-2):
    optimizer = torch.optim.AdamW(trainable(model), lr=lr)
    engine = ScaLora(model, optimizer, config) if config else None
    for _ in range(steps):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine


@pytest.mark.slow
def test_with_rescaling_off_the_run_is_lora_bit_for_bit():
    x, y = regression()
    attached, plain = (with_lora(TwoLayers(), r=3, target_modules=TWO, random_B=False) for _ in range(2))
    run(attached, x, y, 25, ScaLoraConfig(warmup_steps=25))
    run(plain, x, y, 25)
    for (name, p), q in zip(attached.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.slow
def test_the_total_update_outgrows_r_and_loras_does_not():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(40, 30, bias=False))
    x, y = regression(features=40, outputs=30, count=256)
    ranks = {}
    for name, config in {"lora": None, "scalora": ScaLoraConfig()}.items():
        model = with_lora(base, r=4, target_modules=["0"], random_B=False)
        run(model, x, y, 100, config)
        ranks[name] = numerical_rank(model.merge_and_unload()[0].weight - base[0].weight)
    assert ranks["lora"] <= 4 < ranks["scalora"]


@pytest.mark.slow
def test_smoothness_is_the_target_norm_of_the_base_learning_rate():
    x, y = regression()
    direct, through_L = (with_lora(TwoLayers(), r=3, lora_alpha=6, target_modules=TWO) for _ in range(2))
    run(direct, x, y, 12, ScaLoraConfig(target_norm=1 / (2 * (50 * 1e-2) ** 0.5), warmup_steps=0))
    run(through_L, x, y, 12, ScaLoraConfig(smoothness=50.0, warmup_steps=0))
    for p, q in zip(direct.parameters(), through_L.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_schedule_does_not_change_the_target_norm():
    model = with_lora(TwoLayers(), r=3, target_modules=TWO)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert optimizer.param_groups[0]["lr"] == 0
    ScaLora(model, optimizer, ScaLoraConfig(smoothness=10.0))


def test_accumulated_and_clipped_gradients_are_rescaled_once():
    x, y = regression()
    whole, halves = (with_lora(TwoLayers(), dtype=torch.float64, r=3, target_modules=TWO) for _ in range(2))
    results = []
    for model, parts in ((whole, 1), (halves, 2)):
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0))
        for _ in range(5):
            for xs, ys in zip(x.double().chunk(parts), y.double().chunk(parts), strict=True):
                (nn.functional.mse_loss(model(xs), ys) / parts).backward()
            nn.utils.clip_grad_norm_(trainable(model), 0.01)
            optimizer.step()
            optimizer.zero_grad()
        assert engine.metrics()["scalora/rescales"] == 5
        results.append(model(x.double()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_grad_scaler_skips_does_not_rescale(fused):
    model = with_lora(TwoLayers(), r=3, target_modules=TWO)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=fused)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    x, y = regression()
    for overflow, rescales in ((True, 0), (False, 1), (True, 1)):
        before = copy.deepcopy(model.state_dict())
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        if overflow:
            trainable(model)[0].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        unchanged = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert unchanged == overflow
        assert engine.state_dict()["rescales"] == rescales


def test_a_layer_without_gradient_or_with_a_bad_one_is_left_alone():
    model = with_lora(TwoLayers(), r=3, target_modules=TWO)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0))
    x, y = regression()
    inner = model.base_model.model
    before = inner.first.base_layer.weight.clone()
    nn.functional.mse_loss(model(x), y).backward()
    inner.first.lora_A["default"].weight.grad = None
    optimizer.step()
    assert torch.equal(inner.first.base_layer.weight, before)
    assert engine.metrics()["scalora/left_alone_share"] == 0.5
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    inner.first.lora_A["default"].weight.grad[0, 0] = float("nan")
    engine_hooked = inner.second.base_layer.weight.clone()
    optimizer.step()
    assert torch.equal(inner.first.base_layer.weight, before)
    assert not torch.equal(inner.second.base_layer.weight, engine_hooked)
    with pytest.warns(UserWarning, match=r"left layers alone in rescales \(1 times\).*NaN"):
        metrics = engine.metrics()
    assert (metrics["scalora/degenerate_share"], metrics["scalora/nonfinite"]) == (0.5, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.metrics()


def test_factors_out_of_range_leave_the_layer_alone_and_are_counted():
    model = with_lora(TwoLayers(), r=3, target_modules=TWO)
    x, y = regression()
    before = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    engine = run(model, x, y, 3, ScaLoraConfig(warmup_steps=0, target_norm=1e12))
    with pytest.warns(UserWarning, match="above a million"):
        assert engine.metrics()["scalora/exploding"] > 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_detach_stops_and_state_is_restored():
    x, y = regression()
    model = with_lora(TwoLayers(), r=3, target_modules=TWO)
    engine = run(model, x, y, 7, ScaLoraConfig(warmup_steps=2, interval=2))
    state = engine.state_dict()
    assert (state["step"], state["rescales"]) == (7, 2)
    engine.detach()
    base = model.base_model.model.first.base_layer.weight.clone()
    engine.optimizer.step()
    assert torch.equal(base, model.base_model.model.first.base_layer.weight)
    other = ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig(warmup_steps=2, interval=2))
    other.load_state_dict(state)
    assert (other.state_dict()["step"], other.state_dict()["rescales"]) == (7, 2)
    third = ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig())
    with pytest.raises(ValueError, match="same settings"):
        third.load_state_dict(state)


def one_step(model, tokens, **settings):
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, **settings))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return model(input_ids=tokens).logits


@pytest.mark.slow
def test_a_dense_model_is_saved_as_a_state_that_nothing_takes_for_an_adapter(tmp_path):
    tokens = torch.randint(0, 64, (4, 10), generator=torch.Generator().manual_seed(0))
    model = with_lora(tiny_llama(), r=2, target_modules="all-linear")
    live = one_step(model, tokens, merge="dense")
    model.save_pretrained(tmp_path / "state")
    assert {path.name for path in (tmp_path / "state").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "scalora_state.safetensors",
    }
    with pytest.raises(KeyError, match=r"README\.md"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "state")
    with pytest.raises(RuntimeError, match="size mismatch"):
        with_lora(tiny_llama(), r=2, target_modules="all-linear").load_adapter(tmp_path / "state", "default")
    for method, arguments in {"push_to_hub": ["repository"], "unload": []}.items():
        with pytest.raises(ChangedBaseError, match=method):
            getattr(model, method)(*arguments)
    with pytest.raises(ChangedBaseError, match="disable_adapter"), model.disable_adapter():
        pass
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded = type(tiny_llama()).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(input_ids=tokens).logits, live, rtol=1e-4, atol=1e-5)


def test_a_factored_model_is_saved_as_an_ordinary_adapter(tmp_path):
    tokens = torch.randint(0, 64, (4, 10), generator=torch.Generator().manual_seed(0))
    model = with_lora(tiny_llama(), r=2, target_modules="all-linear")
    live = one_step(model, tokens, merge="factored")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with model.disable_adapter():
        change = live - model(input_ids=tokens).logits
    # The default tolerance of an adapter is a thousandth of the update.
    assert (loaded(input_ids=tokens).logits - live).norm() < 3e-3 * change.norm()
    torch.testing.assert_close(model.merge_and_unload()(input_ids=tokens).logits, live, rtol=1e-4, atol=1e-5)


def attach(model, config=None, **settings):
    peft_model = get_peft_model(model, LoraConfig(r=2, **settings))
    return ScaLora(peft_model, torch.optim.AdamW(trainable(peft_model)), config)


def test_layers_that_cannot_be_treated_are_refused_by_name():
    with pytest.raises(UnsupportedLayerError, match=r"first.*DoRA"):
        attach(TwoLayers(), target_modules=TWO, use_dora=True)
    attention = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(UnsupportedLayerError, match=r"0.*MultiheadAttention"):
        attach(attention, target_modules=["0"])
    tied = TwoLayers(features=16, outputs=16)
    tied.second.weight = tied.first.weight
    with pytest.raises(UnsupportedLayerError, match=r"first.*tied.*merge='factored'"):
        attach(tied, ScaLoraConfig(merge="dense"), target_modules=TWO)
    with pytest.raises(UnsupportedLayerError, match="get_peft_model"):
        ScaLora(TwoLayers(), torch.optim.AdamW(TwoLayers().parameters()))
    several = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=TWO))
    several.add_adapter("other", LoraConfig(r=2, target_modules=TWO))
    several.base_model.set_adapter(["default", "other"])
    with pytest.raises(UnsupportedLayerError, match=r"2 active adapters"):
        ScaLora(several, torch.optim.AdamW(trainable(several)))
    frozen = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=TWO))
    frozen.base_model.model.first.lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(UnsupportedLayerError, match=r"first.*lora_A is frozen"):
        ScaLora(frozen, torch.optim.AdamW(trainable(frozen)))


def test_an_optimizer_of_another_model_is_refused():
    model = with_lora(TwoLayers(), r=2, target_modules=TWO)
    with pytest.raises(ValueError, match=r"does not hold lora_A .*first"):
        ScaLora(model, torch.optim.AdamW(TwoLayers().parameters()))


def test_unsupported_optimizers_are_refused_by_name():
    model = with_lora(TwoLayers(), r=2, target_modules=TWO)
    with pytest.raises(UnsupportedOptimizerError, match=r"Adafactor.*factored.*AdamW"):
        ScaLora(model, torch.optim.Adafactor(trainable(model)))
