"""Each rival that comes from PEFT or Transformers against its paper's equations, restated in plain PyTorch."""

import copy
import math
import sys

import pytest
import torch
from models import TwoLayers, tiny_gpt2, tiny_llama, trainable
from peft import PeftModel
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from scalora.rivals.apollo import Apollo
from scalora.rivals.from_peft import Dora, Gralora, Hira, LoraGa, LoraPlus, Pissa, Riemannian, RsLora
from scalora.rivals.full_weights import Full, GaLore

TWO = {"r": 3, "lora_alpha": 6, "target_modules": ["first", "second"]}
X = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(2))

# An epsilon beside which AdamW's second moments vanish: its first step is then gradient descent at the rate η of
# learning_rate = η·HUGE.
HUGE = 1e8


def forward(model):
    """The outputs for the same batch every time, whatever the model."""
    if any(isinstance(module, TwoLayers) for module in model.modules()):
        return model(X)
    return model(input_ids=TOKENS).logits


def backward(model):
    forward(model).square().sum().backward()


def adapted(method, model=None, settings=TWO, backward=backward, random=True):
    """The model under the method's adapter, with adapter weights that are not zero unless asked for."""
    torch.manual_seed(0)
    model = method.adapt(model or TwoLayers(), method.peft_config(settings), backward)
    if random:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "hira_" in name:
                    parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    return model


def factors(layer):
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


@pytest.fixture
def arguments(tmp_path):
    def make(**keywords):
        return TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **keywords)

    return make


@pytest.fixture
def gradient_descent(arguments):
    def make(rate, weight_decay=0.0):
        return arguments(learning_rate=rate * HUGE, adam_epsilon=HUGE, weight_decay=weight_decay / HUGE)

    return make


def step(model, optimizer):
    """One optimizer step; returns each parameter's change and its gradient before the step, by name."""
    optimizer.zero_grad()
    backward(model)
    before = {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    after = dict(model.named_parameters())
    return {n: (after[n].detach() - weight, gradient) for n, (weight, gradient) in before.items()}


def test_rslora_scales_the_adapter_by_alpha_over_the_root_of_the_rank():
    layer = adapted(RsLora()).base_model.model.first
    A, B = factors(layer)
    expected = layer.base_layer(X) + 6 / math.sqrt(3) * X @ A.T @ B.T
    torch.testing.assert_close(layer(X), expected)


def test_lora_plus_moves_B_faster_by_the_ratio(gradient_descent):
    method = LoraPlus(lr_ratio=4.0)
    model = adapted(method)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = method.optimizer(model, gradient_descent(0.1, weight_decay=0.5))
    changes = step(model, optimizer)
    assert len(changes) == 4
    for name, (change, gradient) in changes.items():
        rate = 0.4 if "lora_B" in name else 0.1
        torch.testing.assert_close(change, -rate * (gradient + 0.5 * start[name]), rtol=1e-4, atol=1e-6)


def test_lora_plus_by_default_has_the_papers_ratio_between_adamws_first_updates(arguments):
    method = LoraPlus()
    model = adapted(method)
    changes = step(model, method.optimizer(model, arguments(learning_rate=1e-4, adam_epsilon=1e-12)))
    size = {key: {round(c.abs().mean().item(), 8) for n, (c, _) in changes.items() if key in n} for key in ("_A", "_B")}
    assert size == {"_A": {1e-4}, "_B": {16e-4}}


def test_dora_gives_every_output_its_magnitude():
    layer = adapted(Dora()).base_model.model.first
    A, B = factors(layer)
    magnitude = layer.lora_magnitude_vector["default"].weight.detach()
    assert magnitude.shape == (16,)
    W = layer.base_layer.weight.detach() + 2 * B @ A
    assert not torch.allclose(W.norm(dim=1), magnitude, rtol=0.1)
    W = magnitude[:, None] * W / W.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(X), X @ W.T + layer.base_layer.bias)


def test_dora_trains_the_magnitudes_and_starts_as_the_base():
    model = adapted(Dora(), random=False)
    torch.testing.assert_close(model(X), TwoLayers()(X))
    assert any("magnitude" in name for name, p in model.named_parameters() if p.requires_grad)


def test_pissa_moves_the_top_singular_part_into_the_adapter():
    model = adapted(Pissa(), random=False)
    for name in ("first", "second"):
        W = getattr(TwoLayers(), name).weight.detach()
        U, values, Vh = torch.linalg.svd(W, full_matrices=False)
        layer = getattr(model.base_model.model, name)
        A, B = factors(layer)
        torch.testing.assert_close(2 * B @ A, U[:, :3] @ values[:3].diag() @ Vh[:3])
        torch.testing.assert_close(A @ A.T, (values[:3] / 2).diag())
        torch.testing.assert_close(B.T @ B, (values[:3] / 2).diag())
        torch.testing.assert_close(layer.base_layer.weight + 2 * B @ A, W)
    torch.testing.assert_close(model(X), TwoLayers()(X))
    assert not Pissa.ordinary_adapter


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (TwoLayers(), TWO),
        (tiny_llama(), {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
        (tiny_gpt2().eval(), {"r": 4, "target_modules": ["c_fc"], "fan_in_fan_out": True}),
    ],
    ids=["two_layers", "llama", "gpt2"],
)
def test_lora_ga_starts_along_the_gradients_singular_vectors_and_keeps_the_function(base, settings):
    plain = copy.deepcopy(base)
    backward(plain)
    gradients = {name: p.grad.T if name.endswith("c_fc.weight") else p.grad for name, p in plain.named_parameters()}
    model = LoraGa().adapt(copy.deepcopy(base), LoraGa().peft_config(settings), backward)
    r, pairs = settings["r"], 0
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        pairs += 1
        A, B = factors(layer)
        U, _, Vh = torch.linalg.svd(gradients[f"{name}.weight"], full_matrices=False)
        norm = U.shape[0] ** 0.25 / 4
        torch.testing.assert_close(A @ A.T, norm**2 * torch.eye(r))
        torch.testing.assert_close(B.T @ B, norm**2 * torch.eye(r))
        torch.testing.assert_close((Vh[:r] @ A.T).norm(), torch.tensor(norm * math.sqrt(r)), rtol=1e-3, atol=0)
        torch.testing.assert_close((U[:, r : 2 * r].T @ B).norm(), torch.tensor(norm * math.sqrt(r)), rtol=1e-3, atol=0)
    assert pairs == {"TwoLayers": 2, "LlamaForCausalLM": 14, "GPT2LMHeadModel": 2}[type(base).__name__]
    torch.testing.assert_close(forward(model), forward(base), rtol=1e-4, atol=1e-5)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters())
    assert not LoraGa.ordinary_adapter


def test_lora_gas_gamma_shrinks_the_start():
    A, _ = factors(adapted(LoraGa(gamma=64.0), random=False).base_model.model.first)
    torch.testing.assert_close(A.norm(dim=1), torch.full((3,), 16**0.25 / 8))


def test_lora_ga_refuses_a_rank_without_enough_directions_and_changes_nothing():
    base = TwoLayers()
    with pytest.raises(ValueError, match=r"rank 4 .*second.*\(6, 16\).* choose r ≤ 3"):
        adapted(LoraGa(), base, TWO | {"r": 4}, random=False)
    assert torch.equal(base.first.base_layer.weight, TwoLayers().first.weight)


def test_lora_ga_refuses_a_layer_without_gradient():
    with pytest.raises(ValueError, match=r"first.*no finite gradient"):
        adapted(LoraGa(), backward=lambda model: None)


def test_lora_ga_refuses_a_quantised_base(tmp_path):
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ValueError, match=r"q_proj.*quantised.*no gradient"):
        adapted(LoraGa(), base, {"r": 2, "target_modules": "all-linear"})


def test_hira_multiplies_the_weight_by_the_low_rank_product():
    model = adapted(Hira(), settings=TWO | {"lora_alpha": 1000})
    layer = model.base_model.model.first
    W, A, B = layer.base_layer.weight.detach(), layer.hira_A["default"].detach(), layer.hira_B["default"].detach()
    assert A.shape == (3, 12)
    torch.testing.assert_close(layer(X), X @ (W + W * (B @ A)).T + layer.base_layer.bias)
    before = model(X)
    torch.testing.assert_close(Hira().merged(model)(X), before)


def test_gralora_gives_each_block_factors_of_its_own():
    model = adapted(Gralora(k=2), settings=TWO | {"r": 4, "lora_alpha": 12})
    layer = model.base_model.model.first
    assert sum(p.numel() for p in trainable(layer)) == 4 * (12 + 16)
    x = torch.eye(12)
    update = (layer(x) - layer.base_layer(x)).T.detach()
    ranks = [torch.linalg.matrix_rank(block) for rows in update.chunk(2) for block in rows.chunk(2, dim=1)]
    assert ranks == [2, 2, 2, 2]
    assert torch.linalg.matrix_rank(update) == 8
    scaled = adapted(Gralora(k=2), settings=TWO | {"r": 4, "lora_alpha": 24}).base_model.model.first
    torch.testing.assert_close((scaled(x) - scaled.base_layer(x)).T, 2 * update)
    before = forward(model)
    torch.testing.assert_close(Gralora().merged(model)(X), before)


def test_gralora_takes_over_what_it_shares_with_lora_and_refuses_the_rest():
    config = Gralora().peft_config({"r": 4, "lora_alpha": 8, "lora_dropout": 0.25, "modules_to_save": ["score"]})
    assert (config.r, config.alpha, config.gralora_dropout, config.gralora_k) == (4, 8, 0.25, 2)
    assert config.modules_to_save == ["score"]
    with pytest.raises(TypeError, match="use_rslora=True: GraLoRA has no such field"):
        Gralora().peft_config({"use_rslora": True})
    with pytest.raises(ValueError, match="k must be a positive integer, got 0"):
        Gralora(k=0)


def test_hira_takes_over_what_it_shares_with_lora_and_refuses_the_rest():
    config = Hira().peft_config({"r": 2, "lora_alpha": 8, "lora_dropout": 0.25, "modules_to_save": ["score"]})
    assert (config.r, config.hira_dropout, config.modules_to_save) == (2, 0.25, ["score"])
    with pytest.raises(TypeError, match=r"use_rslora=True: HiRA has no such field; leave it out"):
        Hira().peft_config({"use_rslora": True})


def test_riemannian_multiplies_the_gradients_by_damped_inverse_grams(gradient_descent):
    method = Riemannian(reg=0.05)
    model = adapted(method)
    layer = model.base_model.model.first
    A, B = (weight.clone() for weight in factors(layer))
    changes = step(model, method.optimizer(model, gradient_descent(0.1)))
    key = "base_model.model.first.lora_{}.default.weight"
    (change_A, gradient_A), (change_B, gradient_B) = changes[key.format("A")], changes[key.format("B")]
    damping = 0.05 * torch.eye(3)
    torch.testing.assert_close(change_A, -0.1 * (B.T @ B + damping).inverse() @ gradient_A, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(change_B, -0.1 * gradient_B @ (A @ A.T + damping).inverse(), rtol=1e-3, atol=1e-6)


def test_full_fine_tuning_trains_every_weight_without_an_adapter(arguments):
    method = Full()
    model = adapted(method, tiny_llama(), {"r": 8, "target_modules": "all-linear"})
    assert not isinstance(model, PeftModel)
    assert method.optimizer(model, arguments()) is None
    changes = step(model, torch.optim.AdamW(trainable(model)))
    assert set(changes) == {name for name, _ in tiny_llama().named_parameters()}
    assert all(change.abs().max() > 0 for change, _ in changes.values())
    assert method.merged(model) is model


def low_rank_step(method, arguments, **keywords):
    """One step of the method on tiny Llama: its optimizer, the model, and each weight's change and gradient."""
    model = method.adapt(tiny_llama(), method.peft_config({"r": 8}), backward)
    keywords = {"learning_rate": 1e-3, "adam_epsilon": 1e-12} | method.training_defaults() | keywords
    optimizer = method.optimizer(model, arguments(**keywords))
    return optimizer, model, step(model, optimizer)


def is_in_block(name):
    return ".layers." in name and name.endswith("proj.weight")


def test_galore_steps_adam_within_the_gradients_top_singular_subspace(arguments):
    optimizer, model, changes = low_rank_step(GaLore(rank=3, scale=2.0), arguments)
    assert sum(map(is_in_block, changes)) == 14
    for name, (change, G) in changes.items():
        moments = optimizer.state[model.get_parameter(name)]["exp_avg_sq"]
        if not is_in_block(name):
            assert moments.shape == G.shape
            torch.testing.assert_close(change, -1e-3 * G.sign(), rtol=1e-2, atol=1e-6, msg=name)
            continue
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        if G.shape[0] >= G.shape[1]:
            assert moments.shape == (G.shape[0], 3)
            expected = (G @ Vh[:3].T).sign() @ Vh[:3]
        else:
            assert moments.shape == (3, G.shape[1])
            expected = U[:, :3] @ (U[:, :3].T @ G).sign()
        torch.testing.assert_close(change, -1e-3 * 2.0 * expected, rtol=1e-3, atol=1e-5)


def test_galore_finds_its_subspace_anew_after_the_gap(arguments):
    optimizer, model, _ = low_rank_step(GaLore(rank=3, update_proj_gap=2), arguments, learning_rate=0.05)
    name = "model.layers.0.mlp.up_proj.weight"
    first = model.get_parameter(name).grad.clone()
    residuals = []
    for _ in range(2):
        change, G = step(model, optimizer)[name]
        spans = [torch.linalg.svd(gradient, full_matrices=False)[2][:3] for gradient in (first, G)]
        residuals.append([(change - change @ V.T @ V).norm() / change.norm() for V in spans])
    (old_first, _), (new_first, new_second) = residuals
    assert old_first < 1e-3
    assert new_second < 1e-3 < new_first


def test_apollo_scales_each_channel_of_the_gradient_as_adam_does_in_a_low_rank_space(arguments):
    optimizer, model, changes = low_rank_step(Apollo(rank=3, scale=4.0), arguments)
    for name, (change, G) in changes.items():
        state = optimizer.state[model.get_parameter(name)]
        if not is_in_block(name):
            assert state["exp_avg_sq"].shape == G.shape
            continue
        channels = 1 if G.shape[0] >= G.shape[1] else 0
        shape = list(G.shape)
        shape[channels] = 3
        assert list(state["exp_avg_sq"].shape) == shape
        projected = state["exp_avg"] / 0.1
        # Adam's first step is the sign: √3 for each channel of three entries.
        factor = math.sqrt(3) / projected.norm(dim=channels, keepdim=True)
        torch.testing.assert_close(change, -1e-3 * math.sqrt(4.0) * factor * G, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("method", [GaLore(), Apollo()])
def test_the_projected_weights_are_the_linear_layers_of_the_blocks(method, arguments):
    torch.manual_seed(0)
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    )
    for model, linear in ((bert, 12), (tiny_llama(), 14)):
        optimizer = method.optimizer(model, arguments(**method.training_defaults()))
        names = {id(p): name for name, p in model.named_parameters()}
        projected = [names[id(p)] for group in optimizer.param_groups if "rank" in group for p in group["params"]]
        ordinary = [names[id(p)] for group in optimizer.param_groups if "rank" not in group for p in group["params"]]
        assert len(projected) == linear
        assert not any(part in name for name in projected for part in ("lm_head", "classifier", "pooler", "embed"))
        assert sorted(projected + ordinary) == sorted(names.values())


@pytest.mark.parametrize("method", [GaLore(), Apollo()])
def test_the_optimizers_settings_are_the_users(method, arguments):
    user = {"learning_rate": 0.01, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-4, "weight_decay": 0.1}
    optimizer = method.optimizer(tiny_llama(), arguments(**method.training_defaults() | user))
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.01, (0.8, 0.9), 1e-4, 0.1)


def apollo_steps(arguments, gradients, optimizer=None, **options):
    """Gives gradients to a weight in a block, and returns its changes and the optimizer."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(6, 9, bias=False)})])})
    optimizer = optimizer or Apollo(rank=2, scale=4.0, **options).optimizer(model, arguments(learning_rate=1e-2))
    ((weight,),) = (group["params"] for group in optimizer.param_groups)
    changes = []
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        changes.append(weight.detach() - before)
    return changes, optimizer


def test_an_update_of_apollo_grows_by_a_hundredth_at_most(arguments):
    G = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    (first, second, third), _ = apollo_steps(arguments, [G, -3 * G, G])
    assert second.norm() / first.norm() <= 1.01 + 1e-5
    assert third.norm() / second.norm() <= 1.01 + 1e-5
    (first, second, none), optimizer = apollo_steps(arguments, [0 * G, G, 0 * G])
    assert first.norm() == none.norm() == 0 < second.norm()
    assert all(change.isfinite().all() for change in apollo_steps(arguments, [G], optimizer)[0])


def test_apollo_draws_its_space_anew_after_the_gap(arguments):
    G = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    _, optimizer = apollo_steps(arguments, [G], update_proj_gap=2)
    ((weight,),) = (group["params"] for group in optimizer.param_groups)
    moments = [optimizer.state[weight]["exp_avg"].clone()]
    for _ in range(2):
        apollo_steps(arguments, [G], optimizer)
        moments.append(optimizer.state[weight]["exp_avg"].clone())
    projected = [moments[0] / 0.1, (moments[1] - 0.9 * moments[0]) / 0.1, (moments[2] - 0.9 * moments[1]) / 0.1]
    torch.testing.assert_close(projected[1], projected[0], rtol=1e-4, atol=1e-5)
    assert (projected[2] - projected[0]).norm() > 0.1 * projected[0].norm()


def test_apollo_goes_on_from_its_state_as_if_it_had_not_stopped(arguments):
    gradients = [torch.randn(9, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    whole, _ = apollo_steps(arguments, gradients, update_proj_gap=2)
    _, first = apollo_steps(arguments, gradients[:3], update_proj_gap=2)
    _, second = apollo_steps(arguments, [], update_proj_gap=2)
    second.load_state_dict(first.state_dict())
    rest, _ = apollo_steps(arguments, gradients[3:], second)
    for change, expected in zip(rest, whole[3:], strict=True):
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-6)


def test_what_apollo_does_not_project_is_trained_by_adamw(arguments):
    keywords = {"learning_rate": 1e-2, "weight_decay": 0.1}
    model, other = tiny_llama(), tiny_llama()
    optimizer = Apollo().optimizer(model, arguments(**keywords))
    reference = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        step(model, optimizer)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = p.grad.clone()
        reference.step()
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if not is_in_block(name):
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-7)


def test_a_model_without_blocks_has_nothing_for_apollo(arguments):
    with pytest.raises(ValueError, match="no linear layers in numbered blocks"):
        Apollo().optimizer(nn.Linear(4, 4), arguments())


@pytest.mark.parametrize("method", [GaLore()])
def test_another_optimizer_under_the_methods_name_is_refused(method, arguments):
    with pytest.raises(ValueError, match=rf"training.optim='sgd': .*'{method.optim}'; leave training.optim out"):
        method.optimizer(tiny_llama(), arguments(**method.training_defaults() | {"optim": "sgd"}))


@pytest.mark.parametrize("method", [GaLore()])
def test_a_missing_package_is_said_before_anything_is_loaded(method, monkeypatch):
    monkeypatch.setitem(sys.modules, method.package.replace("-", "_"), None)
    with pytest.raises(ImportError, match=f"pip install {method.package}"):
        method.training_defaults()


@pytest.mark.parametrize("cls", [RsLora, LoraPlus, Dora, Pissa, LoraGa, Hira, Gralora, Riemannian])
def test_a_field_that_the_adapter_does_not_have_is_refused_by_name(cls):
    with pytest.raises(TypeError, match="no_such_field"):
        cls().peft_config(TWO | {"no_such_field": 1})


@pytest.mark.parametrize(
    ("cls", "field", "other", "own"),
    [
        (RsLora, "use_rslora", False, True),
        (Dora, "use_dora", False, True),
        (Pissa, "init_lora_weights", "gaussian", "pissa"),
        (LoraGa, "init_lora_weights", "pissa", True),
    ],
)
def test_a_setting_that_would_undo_the_method_is_refused(cls, field, other, own):
    with pytest.raises(ValueError, match=f"{field}={other!r}: the method itself sets {field}={own!r}"):
        cls().peft_config(TWO | {field: other})
    assert getattr(cls().peft_config(TWO | {field: own}), field) == own


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (LoraPlus, {"lr_ratio": 0}),
        (LoraGa, {"gamma": -1.0}),
        (Riemannian, {"reg": float("nan")}),
        (GaLore, {"rank": 2.5}),
        (Apollo, {"scale": "large"}),
        (Apollo, {"update_proj_gap": True}),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(cls, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{name} must be a positive (integer|finite number), got {value!r}"):
        cls(**options)
