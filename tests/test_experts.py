"""Mixtures of experts whose experts are one parameter (`target_parameters`): each expert is a LoRA pair of its own.

The truth is the same model with each expert a linear layer and ordinary LoRA, on the same tokens.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from experts import (
    ADAPTER,
    EXPERTS,
    MODELS,
    backward,
    batch,
    factors_of_experts,
    fused,
    fused_layers,
    path_of_expert,
    separate,
    tiny,
    weights_of_experts,
)
from models import trainable, with_adapter_in_float32, with_lora
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from scalora import (
    PairAdamW,
    ScaLora,
    ScaLoraConfig,
    UnsupportedLayerError,
    UnsupportedOptimizerError,
    export_adapter,
    export_merged,
    load_model,
    optimal_start,
)
from scalora.rescale.rounding import join
from scalora.rescale.stochastic import StochasticRemainder
from scalora.rivals.reflora import GradientRefactorer
from scalora.start import random_start

STEPS = 6

CASES = {
    "column": {"mode": "column"},
    "scalar, sgd": {"mode": "scalar", "optimizer": "sgd"},
    "matrix, sgd": {"mode": "matrix", "optimizer": "sgd", "target_norm": 1.0},
    "matrix, pairs": {"mode": "matrix", "optimizer": "pairs"},
    "matrix, pairs that decay": {"mode": "matrix", "optimizer": "decaying pairs", "merge": "factored"},
    "columns, pairs": {"optimizer": "pairs", "target_norm": 1.0},
    "factored": {"merge": "factored", "remainder_rank": 12},
    "compressed": {"merge": "factored", "remainder_rank": 2},
    "a few layers at a time": {"bucket": 1},
}

OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(trainable(model), lr=2e-2),
    "sgd": lambda model: torch.optim.SGD(trainable(model), lr=2e-2, momentum=0.9),
    "pairs": lambda model: PairAdamW(model, lr=2e-3),
    "decaying pairs": lambda model: PairAdamW(model, lr=2e-3, weight_decay=1.0),
}


def attached(model, optimizer="adamw", **config):
    config = {"warmup_steps": 0, "merge": "dense"} | config
    optimizer = OPTIMIZERS[optimizer](model)
    return ScaLora(model, optimizer, ScaLoraConfig(**config)), optimizer


def train(model, optimizer, steps=range(STEPS), **shape):
    """Steps on the same tokens for all models; returns the losses."""
    losses = []
    for step in steps:
        losses.append(backward(model, step, **shape))
        for parameter in trainable(model):  # experts that are linear layers have no gradient without tokens
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
    return losses


def check_equal_trajectories(name, tolerance=1e-10, **case):
    whole = fused(name)
    parts = separate(name, whole)
    engine, optimizer = attached(whole, **case)
    other, optimizer_of_parts = attached(parts, **case)
    losses = train(whole, optimizer)
    assert losses == pytest.approx(train(parts, optimizer_of_parts), rel=tolerance)
    layers = dict(parts.named_modules())
    for path, layer in fused_layers(whole).items():
        for expert, (A, B) in enumerate(factors_of_experts(layer)):
            own = layers[path_of_expert(path, layer, expert)]
            close(A, own.lora_A["default"].weight, tolerance)
            close(B, own.lora_B["default"].weight, tolerance)
            close(weights_of_experts(layer)[expert], own.get_base_layer().weight, tolerance)
            if case.get("merge") == "factored":
                update = layer.get_delta_weight("default")[expert]
                close(update.mT if name == "gpt_oss" else update, own.get_delta_weight("default"), tolerance)
    found, wanted = engine.metrics(), other.metrics()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-7, abs=1e-9), key
    assert wanted["scalora/merge_norm"] > 1e-3
    return whole


def close(found, wanted, tolerance):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_fused_experts_train_as_separate_ones_do(name):
    check_equal_trajectories(name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_fused_experts_train_as_separate_ones_do_in_all_modes(case, monkeypatch):
    settings = dict(CASES[case])
    if "bucket" in settings:
        monkeypatch.setattr("scalora.parallel.stacks._BUCKET", settings.pop("bucket"))
    # A compression's Gram matrices resolve 1e-8 of what it compresses.
    check_equal_trajectories("mixtral", 1e-7 if case == "compressed" else 1e-10, **settings)


@pytest.mark.slow
def test_the_comparison_would_notice_experts_that_are_mixed_up(monkeypatch):
    def by_rows(lora_B, experts):  # as the rows of lora_A are laid out
        return lora_B.view(len(lora_B), experts, -1).permute(1, 0, 2)

    monkeypatch.setattr("scalora.parallel.stacks.stack_of_B", by_rows)
    with pytest.raises(AssertionError):
        check_equal_trajectories("mixtral")


def test_an_expert_without_tokens_is_left_alone_and_counted_as_such():
    model = fused("mixtral")
    engine, _ = attached(model)
    before = copy.deepcopy(model)
    backward(model, 0, length=2)  # at most 4 of 6 experts in each layer
    engine._before_step(engine.optimizer, (), {})
    idle, busy = 0, 0
    for (path, layer), old in zip(fused_layers(model).items(), fused_layers(before).values(), strict=True):
        gradients = layer.lora_B["default"].weight.grad
        for expert in range(EXPERTS):
            same = all(map(torch.equal, factors_of_experts(layer)[expert], factors_of_experts(old)[expert]))
            same = same and torch.equal(weights_of_experts(layer)[expert], weights_of_experts(old)[expert])
            has_tokens = bool(gradients[:, expert::EXPERTS].any())
            assert has_tokens or same, path
            idle, busy = idle + (not has_tokens), busy + (has_tokens and not same)
    assert idle >= 8
    assert busy > 0
    metrics = engine.metrics()
    layers = 2 * 2 * EXPERTS + 2
    assert metrics["scalora/degenerate_share"] == pytest.approx(idle / layers)
    assert metrics["scalora/left_alone_share"] == pytest.approx(1 - busy / layers, abs=3 / layers)
    assert metrics["scalora/nonfinite"] == metrics["scalora/exploding"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["matrix", "auto"])
def test_a_rescale_of_experts_leaves_the_function_as_it_is(mode):
    for name in MODELS:
        for merge in ("dense", "factored"):
            model = fused(name)
            engine, optimizer = attached(
                model, mode=mode, merge=merge, target_norm=0.5, optimizer="sgd" if mode == "matrix" else "adamw"
            )
            before = backward(model, 0)
            engine._before_step(optimizer, (), {})
            assert engine.metrics()["scalora/merge_norm"] > 1e-3
            assert backward(model, 0) == pytest.approx(before, rel=1e-12)


def give_gradients(whole, parts, seed):
    """The same random gradients to both models."""
    generator = torch.Generator().manual_seed(seed)
    layers = dict(parts.named_modules())
    for parameter in trainable(whole):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for path, layer in fused_layers(whole).items():
        A, B = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        for expert in range(EXPERTS):
            own = layers[path_of_expert(path, layer, expert)]
            own.lora_A["default"].weight.grad = A[2 * expert : 2 * expert + 2].clone()
            own.lora_B["default"].weight.grad = B[:, expert::EXPERTS].clone()
    for name, parameter in whole.named_parameters():
        if "o_proj" in name and parameter.requires_grad:
            parts.get_parameter(name).grad = parameter.grad.clone()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merge", ["dense", "dense_8bit", "stochastic"])
def test_merges_into_experts_are_those_into_separate_ones(merge, dtype, name):
    whole = with_adapter_in_float32(fused(name, dtype))
    parts = with_adapter_in_float32(separate(name, whole, dtype))
    engines = [attached(model, merge=merge) for model in (whole, parts)]
    layers = dict(parts.named_modules())
    for step in range(3):
        give_gradients(whole, parts, step)
        for _, optimizer in engines:
            optimizer.step()
    drawn, total = 0, 0
    for path, layer in fused_layers(whole).items():
        low = layer.remainder.rounded_off
        for expert, weight in enumerate(weights_of_experts(layer)):
            own = layers[path_of_expert(path, layer, expert)]
            wanted = own.get_base_layer().weight
            if merge == "stochastic" and dtype != torch.float32:
                spacing = torch.finfo(dtype).eps * wanted.abs().amax().item()  # of the largest, at each of three steps
                assert (weight.float() - wanted.float()).abs().max() <= 3 * spacing
                drawn, total = drawn + int((weight != wanted).sum()), total + wanted.numel()
                continue
            tolerance = 1e-6 if dtype == torch.float32 else 2e-2 if merge == "dense_8bit" else 0
            if tolerance:
                close(weight.float(), wanted.float(), tolerance)
            else:
                lower = low[expert].mT if name == "gpt_oss" else low[expert]
                exact = join(weight.contiguous(), lower.contiguous())
                close(exact, own.remainder.exact(wanted), 1e-6)
    if drawn:  # random numbers of its own for each expert
        assert 0.05 * total < drawn < 0.95 * total


def test_experts_with_equal_weights_draw_different_random_numbers():
    weight = torch.rand(3, 8, 8).to(torch.bfloat16)[:1].repeat(3, 1, 1)
    remainder = StochasticRemainder(weight, transposed=False, name="experts")
    left, right = torch.full((8, 1), 0.01), torch.ones(8, 1)
    for part, of_expert in zip(remainder.by_matrix(weight, list(weight)), weight, strict=True):
        part.add(of_expert, left, right)
    assert not torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[1], weight[2])


@pytest.fixture(scope="module", params=["dense", "factored"])
def trained(request, tmp_path_factory):
    """A trained model in float32, and what `save_pretrained` and the engine's `save` wrote, by its name."""
    folder = tmp_path_factory.mktemp(request.param)
    runs = {}
    for name in MODELS:
        model = fused(name, torch.float32)
        engine, optimizer = attached(model, merge=request.param, remainder_rank=4)
        train(model, optimizer)
        model.save_pretrained(folder / name)
        engine.save(folder / f"{name} state")
        runs[name] = model, folder / name, folder / f"{name} state"
    return runs


@torch.no_grad()
def says(model):
    return model.eval()(input_ids=batch(99, rows=2, length=9)).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_run_with_experts_is_saved_loaded_exported_and_merged(trained, name, tmp_path):
    model, folder, state = trained[name]
    wanted, base = says(model), says(tiny(name))
    assert (wanted - base).norm() > 0.05 * base.norm()
    assert torch.equal(says(load_model(tiny(name), folder)), wanted)
    export_adapter(tiny(name), state, tmp_path / "adapter", rtol=1e-6)
    plain = PeftModel.from_pretrained(tiny(name), tmp_path / "adapter")
    close(says(plain), wanted, 1e-4)
    assert not any("remainder" in name for name, _ in plain.named_modules())
    export_adapter(tiny(name), state, tmp_path / "per layer", rtol=1e-6, per_layer=True)
    close(says(PeftModel.from_pretrained(tiny(name), tmp_path / "per layer")), wanted, 1e-4)
    close(says(export_merged(tiny(name), state, tmp_path / "merged")), wanted, 1e-4)
    merged = type(tiny(name)).from_pretrained(
        tmp_path / "merged", attn_implementation="eager", experts_implementation="eager"
    )
    close(says(merged), wanted, 1e-4)
    if folder.parent.name.startswith("factored"):  # an ordinary adapter, too
        saved = says(PeftModel.from_pretrained(tiny(name), folder))  # at the default tolerance
        assert (saved - wanted).norm() < 0.01 * (wanted - base).norm()


RESUMED = {
    "dense": {"merge": "dense"},
    "factored": {"merge": "factored", "remainder_rank": 4},
    "matrix, pairs": {"mode": "matrix", "optimizer": "pairs"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_a_run_with_experts_that_is_resumed_goes_on_as_if_it_had_not_stopped(case, tmp_path):
    def run():
        model = fused("gpt_oss", torch.float32)
        return model, *attached(model, **RESUMED[case])

    model, engine, optimizer = run()
    train(model, optimizer)
    engine.save(tmp_path)
    again, other, optimizer_of_again = run()
    other.load(tmp_path)
    for further in range(STEPS, STEPS + 3):
        assert train(again, optimizer_of_again, [further]) == train(model, optimizer, [further])
    for one, resumed in zip(trainable(model), trainable(again), strict=True):
        assert torch.equal(one, resumed)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_peft_merges_unmerges_and_unloads_experts_with_their_remainders(trained, name):
    model = copy.deepcopy(trained[name][0])
    wanted = says(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter()
    close(says(model), wanted, 1e-5)
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert torch.equal(says(model), wanted)
    whole = copy.deepcopy(model).merge_and_unload()
    close(says(whole), wanted, 1e-5)
    assert not fused_layers(whole)


def test_a_state_dict_of_experts_has_the_factors_of_the_whole_update(trained):
    model, folder, _ = trained["mixtral"]
    if not folder.parent.name.startswith("factored"):
        pytest.skip("a dense remainder is in the base weights")
    tensors = {key: value.clone() for key, value in model.state_dict().items() if "lora_" in key}
    wanted = says(model)
    again = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trainable(again):
            parameter.zero_()
    again.load_state_dict(tensors, strict=False)
    close(says(again), wanted, 1e-5)
    with model.disable_adapter():
        close(says(model), says(tiny("mixtral")), 1e-6)


@pytest.mark.parametrize("merge", ["dense", "factored"])
@pytest.mark.parametrize("start", ["optimal", "random"])
def test_starts_of_experts_keep_the_function(start, merge):
    model = fused("gpt_oss", random_B=False)
    before = says(model)
    if start == "random":
        random_start(model, target_norm=0.7, merge=merge)
    else:
        optimal_start(model, lambda: backward(model, 0, rows=8), target_norm=0.7, merge=merge)
    close(says(model), before, 1e-10)
    for layer in fused_layers(model).values():
        for A, B in factors_of_experts(layer):
            close(A.norm(dim=1), torch.full((2,), 0.7, dtype=A.dtype), 1e-10)
            close(B.norm(dim=0), torch.full((2,), 0.7, dtype=A.dtype), 1e-10)
    attached(model, merge=merge)


def test_what_cannot_be_done_with_experts_is_refused_by_name():
    model = fused("mixtral", torch.float32)
    with pytest.raises(UnsupportedLayerError, match=r"layers.0.mlp.experts'.*parameter 'down_proj' of MixtralExperts"):
        GradientRefactorer(model, torch.optim.AdamW(trainable(model)))
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(UnsupportedOptimizerError, match=r"not supported for experts \(module .*experts'"):
        ScaLora(model, bnb.optim.AdamW8bit(trainable(model), lr=1e-3))
    ScaLora(model, bnb.optim.AdamW32bit(trainable(model), lr=1e-3)).detach()


def test_all_linear_adapts_experts_and_their_router():
    model = fused("mixtral", torch.float64, target_modules="all-linear", target_parameters=None)
    layers = fused_layers(model)
    assert {layer.parameter_name for layer in layers.values()} == {"weight", "gate_up_proj", "down_proj"}
    engine, optimizer = attached(model, merge="factored", mode="auto")
    before = backward(model, 0)
    engine._before_step(optimizer, (), {})
    assert backward(model, 0) == pytest.approx(before, rel=1e-12)
    router = next(layer for layer in layers.values() if layer.parameter_name == "weight")
    assert router.has_remainder


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_all_ways_to_compute_experts_see_the_remainder(experts):
    model = fused("mixtral", torch.float32)
    _, optimizer = attached(model, merge="factored")
    train(model, optimizer, range(3))
    wanted = says(model)
    model.base_model.model.set_experts_implementation(experts)
    close(says(model), wanted, 1e-5)


def test_experts_that_are_linear_layers_train_without_tokens_for_some():
    model = separate("mixtral", fused("mixtral"))
    engine, optimizer = attached(model)
    before = copy.deepcopy(model)
    losses, idle = [], 0
    for step in range(3):
        losses.append(backward(model, step, length=3))
        optimizer.step()
        idle += sum(pair.lora_A.grad is None for pair in engine.pairs)
    assert idle > 0
    assert engine.metrics()["scalora/merge_norm"] > 1e-3
    untouched = 0
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, before.get_parameter(name))
        untouched += same and "experts" in name and "lora_A" in name
    assert 0 < untouched < 2 * 2 * EXPERTS


class Launches(TorchDispatchMode):
    """Counts the operations that compute something: on a GPU, kernels are launched for these."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = (
            "aten.unbind",
            "aten.split",
            "aten.detach",
            "aten.alias",
            "aten.lift_fresh",
            "aten._local_scalar_dense",
        )
        if not function.is_view and not str(function).startswith(views):
            self.count += 1
        return function(*args, **kwargs or {})


@pytest.mark.slow
@pytest.mark.parametrize("case", ["columns", "matrix"])
def test_a_rescale_takes_as_many_operations_for_few_experts_as_for_many(case):
    config = {"mode": "matrix", "optimizer": "pairs"} if case == "matrix" else {}
    counts = []
    for experts in (3, 12):
        model = with_lora(tiny("mixtral", num_local_experts=experts), **ADAPTER)
        engine, optimizer = attached(model, merge="factored", remainder_rank=4, **config)
        for step in range(4):  # with moments, and with a compression
            backward(model, step, rows=6, length=12)
            with Launches() as launches:
                optimizer.step()
        assert engine.metrics()["scalora/merge_norm"] > 1e-3
        counts.append(launches.count)
    assert counts[1] == counts[0] > 0


def test_experts_of_shards_are_refused_by_name():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(fused("mixtral", torch.float32), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UnsupportedLayerError, match=r"mlp.experts'.*parameter 'down_proj'.*sharded"):
            ScaLora(model, torch.optim.AdamW(trainable(model)))
    finally:
        dist.destroy_process_group()
