"""ScaLoRA attached to whatever people hand over, and what copies, conversions and averages of the model are then."""

import copy
import pickle

import pytest
import torch
from models import Mixed, TwoLayers, backward, tiny_llama, trainable, with_lora
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from scalora import (
    ChangedBaseError,
    ChangedFactorsError,
    ScaLora,
    ScaLoraConfig,
    UnsupportedLayerError,
    accept_factors,
    load_model,
)
from scalora.model.adapters import find_lora_pairs
from scalora.saving.attach import attach

TOKENS = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "v_proj", "down_proj"]
TWO = ["first", "second"]


class Around(nn.Module):
    """A user's own module with a PeftModel in it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(**inputs)


def adapted(**settings):
    return with_lora(tiny_llama(), random_B=False, **{"r": 2, "target_modules": TARGETS} | settings)


def fit(attached, merge, run=None, steps=6, dtype=None):
    run = attached if run is None else run
    optimizer = torch.optim.AdamW(trainable(run), lr=2e-2)
    engine = ScaLora(attached, optimizer, ScaLoraConfig(warmup_steps=1, merge=merge))
    for step in range(steps):
        batch = torch.randint(0, 64, (4, 10), generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            run(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine


@torch.no_grad()
def says(model, **settings):
    return model.eval()(input_ids=TOKENS, **settings).logits


def base_says():
    return says(tiny_llama())


def close(found, wanted, tolerance=2e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


HANDED_OVER = {
    "itself": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "inside a module": Around,
    "inside two": lambda model: Around(Around(model)),
    "its base model": lambda model: model.get_base_model(),
}


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")  # torch.compile can't trace them
@pytest.mark.parametrize("merge", ["factored", "dense"])
@pytest.mark.parametrize("way", HANDED_OVER)
def test_a_model_is_saved_and_guarded_whatever_scalora_was_attached_to(way, merge, tmp_path):
    model = adapted()
    handed_over = HANDED_OVER[way](model)
    engine = fit(handed_over, merge, run=model if way == "its base model" else handed_over)
    trained = says(model)
    assert engine.metrics()["scalora/rescales"] == 5
    for name, saver in {"inner": model, "outer": handed_over}.items():
        if isinstance(getattr(saver, "_orig_mod", saver), PeftModel):
            saver.save_pretrained(tmp_path / name)
            close(says(load_model(tiny_llama(), tmp_path / name)), trained)
    engine.save(tmp_path / "engine")
    close(says(load_model(tiny_llama(), tmp_path / "engine")), trained)
    if merge == "factored":
        loaded = says(PeftModel.from_pretrained(tiny_llama(), tmp_path / "inner"))
        assert (loaded - trained).norm() < 3e-3 * (trained - base_says()).norm()
        with model.disable_adapter():
            close(says(model), base_says())
    else:
        with pytest.raises(ChangedBaseError), model.disable_adapter():
            pass
    close(says(model), trained)


def test_a_module_with_parameters_of_its_own_keeps_them_in_its_state():
    around = Around(adapted())
    around.head = nn.Linear(3, 3)
    engine = fit(around, "dense")
    state = engine.state_dict()
    assert "trained.head.weight" in state["tensors"]
    with torch.no_grad():
        around.head.weight.zero_()
    engine.load_state_dict(state | {"tensors": {**state["tensors"], "trained.head.weight": torch.ones(3, 3)}})
    assert around.head.weight.eq(1).all()


def test_two_peft_models_in_one_module_are_refused():
    both = Around(adapted())
    both.teacher = adapted()
    with pytest.raises(UnsupportedLayerError, match="2 PeftModels"):
        ScaLora(both, torch.optim.AdamW(trainable(both)))


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["factored", "auto"])
def test_transformers_own_adapters_are_saved_by_transformers(merge, tmp_path):
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS))
    fit(model, merge)
    trained = says(model)
    model.save_pretrained(tmp_path)
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path))
    close(says(loaded), trained)
    model.disable_adapters()
    close(says(model), base_says())
    model.enable_adapters()
    close(says(model), trained)


@pytest.mark.slow
def test_transformers_own_adapters_cannot_be_dense():
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(UnsupportedLayerError, match="merge='factored'"):
        ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig(merge="dense"))


@pytest.mark.slow
def test_injected_layers_without_any_peft_model_give_their_whole_update():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=TWO), TwoLayers())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, merge="factored"))
    for _ in range(3):
        backward(model)
        optimizer.step()
    x = torch.randn(5, 12)
    tensors = get_peft_model_state_dict(model)
    ranks = {len(tensor) for name, tensor in tensors.items() if "lora_A" in name}
    config = model.peft_config["default"].to_dict()
    assert ranks == {config["r"]}
    settings = {key: config[key] for key in ("r", "lora_alpha", "target_modules")}
    fitting = inject_adapter_in_model(LoraConfig(**settings), TwoLayers())
    fitting.load_state_dict(tensors_with_names(tensors), strict=False)
    close(fitting(x), model.eval()(x))


def tensors_with_names(tensors):
    return {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["factored", "dense"])
def test_copies_and_pickles_are_the_trained_model_with_its_guards(merge):
    model = adapted()
    fit(model, merge)
    trained = says(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(says(twin), trained)
        close(says(copy.deepcopy(twin).merge_and_unload()), trained)
        assert type(twin) is type(model)
        if merge == "dense":
            with pytest.raises(ChangedBaseError), twin.disable_adapter():
                pass
        fit(twin, merge, steps=3)
        assert (says(twin) - trained).norm() > 1e-3
    close(says(model), trained)


@pytest.mark.parametrize("merge", ["factored", "dense"])
def test_an_average_of_factors_is_refused_and_one_of_merged_models_is_not_needed_to_be(merge):
    model = adapted()
    average = None
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=1, merge=merge))
    for step in range(6):
        batch = torch.randint(0, 64, (4, 10), generator=torch.Generator().manual_seed(step))
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
        if average is not None:
            average.update_parameters(model)
    says(model)
    with pytest.raises(ChangedFactorsError, match="average"):
        says(average.module)


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("merge", ["factored", "dense"])
def test_factors_of_another_step_are_refused_until_they_are_put_back_or_accepted(merge, through_data, tmp_path):
    model = adapted()
    engine = fit(model, merge, steps=3)
    shadow = [p.detach().clone() for p in trainable(model)]
    engine.detach()
    fit(model, merge, steps=3)
    trained, present = says(model), [p.detach().clone() for p in trainable(model)]

    def put(values):
        with torch.no_grad():
            for parameter, value in zip(trainable(model), values, strict=True):
                (parameter.data if through_data else parameter).copy_(value)

    put(shadow)
    with pytest.raises(ChangedFactorsError):
        says(model)
    with pytest.raises(ChangedFactorsError):
        model.save_pretrained(tmp_path)
    put(present)
    close(says(model), trained)
    put(shadow)
    accept_factors(model)
    assert (says(model) - trained).norm() > 1e-3


@pytest.mark.parametrize("merge", ["factored", "dense"])
def test_an_optimizer_without_scalora_may_go_on(merge):
    model = adapted()
    fit(model, merge).detach()
    before = says(model)
    plain = torch.optim.SGD(trainable(model), lr=0.1)
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    plain.step()
    assert (says(model) - before).norm() > 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("merge", ["factored", "dense"])
def test_a_compiled_forward_pass_is_not_compiled_again_as_the_remainder_fills(merge):
    torch._dynamo.reset()
    counters.clear()
    model = with_lora(TwoLayers(), r=2, target_modules=TWO)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=2, merge=merge, remainder_rank=4))
    for _ in range(12):
        backward(compiled)
        optimizer.step()
    assert engine.metrics()["scalora/rescales"] == 10
    assert counters["stats"]["unique_graphs"] <= 2  # without a remainder, and with one


@pytest.mark.slow
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merge", ["factored", "dense"])
def test_a_conversion_rounds_the_weights_once_and_later_merges_do_not(before, to, merge):
    model = with_lora(TwoLayers(), r=2, target_modules=TWO, random_B=False)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.base_layer.to(before)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, merge=merge))
    train(model, optimizer, 4)
    exact = [whole(pair).clone() for pair in engine.pairs]
    model.to(to)
    for pair, wanted in zip(engine.pairs, exact, strict=True):
        rounding = max(torch.finfo(pair.lora_A.dtype).eps, 1e-6)  # the remainder's product is computed in float32
        torch.testing.assert_close(whole(pair), wanted, rtol=0, atol=4 * rounding * wanted.abs().max().item())
    adapters = [p for pair in engine.pairs for p in (pair.lora_A, pair.lora_B)]
    for parameter in adapters:
        parameter.data = parameter.data.float()
    reference = [whole(pair).clone() for pair in engine.pairs]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for _ in range(50):
        for parameter in adapters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    for pair, wanted in zip(engine.pairs, reference, strict=True):
        torch.testing.assert_close(whole(pair), wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())


def train(model, optimizer, steps):
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(8, 12, generator=torch.Generator().manual_seed(step))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def whole(pair):
    """The layer's whole weight, exactly."""
    remainder = pair.remainder
    dense = remainder.exact(pair.weight) if hasattr(remainder, "exact") else pair.weight
    total = dense.double() + pair.scaling * pair.lora_B.double() @ pair.lora_A.double()
    return total if hasattr(remainder, "exact") else total + remainder.dense().double()


def test_every_bfloat16_value_survives_a_merge_and_its_undoing():
    """PEFT's own merge and unmerge round twice, which TRL does to a policy at every synchronisation with vLLM."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16).reshape(256, 256)
    for merge in ("factored", "dense", "dense_8bit"):
        model = with_lora(nn.Sequential(nn.Linear(256, 256)), r=2, target_modules=["0"])
        layer = model.base_model.model[0]
        layer.base_layer.weight.data = values.clone()
        pairs, _ = attach(model, merge, 4)
        with torch.no_grad():
            pairs[0].remainder.add(pairs[0].weight, torch.randn(256, 2), torch.randn(256, 2))
        before = pairs[0].weight.detach().clone().view(torch.int16)
        update = layer.get_delta_weight("default")
        exact = pairs[0].remainder.exact(pairs[0].weight) if merge != "factored" else pairs[0].weight.float()
        wanted = (exact + update).to(torch.bfloat16)
        for _ in range(3):
            model.merge_adapter()
            torch.testing.assert_close(pairs[0].weight.detach(), wanted, rtol=0, atol=0, equal_nan=True)
            model.unmerge_adapter()
            assert torch.equal(pairs[0].weight.detach().view(torch.int16), before)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_the_same_after_a_merge_and_its_undoing(kind, tmp_path):
    base = tiny_llama(hidden_size=64, intermediate_size=64)
    base.save_pretrained(tmp_path)
    bits = {"load_in_8bit": kind == "int8", "load_in_4bit": kind == "nf4"}
    quantisation = BitsAndBytesConfig(**bits, bnb_4bit_quant_type="nf4")
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, dtype="float32")
    model = with_lora(base, r=2, target_modules=TARGETS, random_B=False)
    fit(model, "auto")
    before = says(model)
    for _ in range(2):
        model.merge_adapter()
        merged = says(model)
        assert 0 < (merged - before).norm() < before.norm()
        model.unmerge_adapter()
        assert torch.equal(says(model), before)


def test_an_embedding_s_remainder_is_in_mixed_batches_too():
    model = with_lora(Mixed(), r=2, target_modules=["embed", "conv1d", "linear"])
    model.peft_config["default"].task_type = None
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, merge="factored"))
    tokens = torch.arange(12).reshape(4, 3)
    untouched = Mixed()(tokens)
    for _ in range(3):
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model.eval()(tokens)
    mixed = model(tokens, adapter_names=["default", "__base__", "default", "__base__"])
    close(mixed[::2], trained[::2])
    close(mixed[1::2], untouched[1::2])


def test_tied_weights_are_left_alone_by_a_factored_remainder_and_untied_by_a_merge():
    base = tiny_llama(tie_word_embeddings=True)
    model = with_lora(base, r=2, target_modules=["lm_head", "q_proj"], random_B=False)
    untouched = says(tiny_llama(tie_word_embeddings=True))
    fit(model, "auto")
    trained = says(model)
    with model.disable_adapter():
        close(says(model), untouched)
    model.merge_adapter()
    close(says(model), trained)
    model.unmerge_adapter()
    assert model.base_model.model.lm_head.base_layer.weight is model.base_model.model.model.embed_tokens.weight
    close(says(model), trained)
    close(says(model.merge_and_unload()), trained)


def test_a_reference_adapter_may_be_there_and_a_copy_gets_the_remainder():
    model = adapted()
    model.add_adapter("ref", model.peft_config["default"])
    fit(model, "auto")
    assert {type(pair.remainder).__name__ for pair in find_lora_pairs(model)} == {"FactoredRemainder"}
    with torch.no_grad():
        for pair in find_lora_pairs(model):
            pair.layer.lora_A["ref"].weight.copy_(pair.lora_A)
            pair.layer.lora_B["ref"].weight.copy_(pair.lora_B)
    trained = says(model)
    ScaLora(model, torch.optim.AdamW(trainable(model)))
    model.set_adapter("ref")
    close(says(model), trained)
    assert model.peft_config["ref"].r > model.peft_config["default"].r


def test_the_adapter_of_a_remainder_is_the_one_to_go_on_with():
    model = adapted()
    fit(model, "factored")
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("other")
    with pytest.raises(UnsupportedLayerError, match=r"'default'.*'other' is active"):
        fit(model, "factored")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_initialisations_that_change_the_base_are_refused_by_name(start):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=start))
    before = says(model)
    with pytest.raises(UnsupportedLayerError, match=f"init_lora_weights='{start}'"):
        ScaLora(model, torch.optim.AdamW(trainable(model)))
    assert type(model).__mro__[1] is not type(model)
    close(says(model), before)
    with model.disable_adapter():
        says(model)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_right(start, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=start))
    fit(model, "factored")
    trained = says(model)
    model.save_pretrained(tmp_path)
    loaded = says(PeftModel.from_pretrained(tiny_llama(), tmp_path))
    assert (loaded - trained).norm() < 3e-3 * (trained - base_says()).norm()


def test_base_weights_that_are_trained_or_of_few_bits_are_not_merged_into():
    model = with_lora(TwoLayers(), r=2, target_modules=TWO)
    model.base_model.model.first.base_layer.weight.requires_grad_(True)
    with pytest.raises(UnsupportedLayerError, match=r"first.*trained too"):
        ScaLora(model, torch.optim.AdamW(trainable(model)))
    model = with_lora(TwoLayers(), r=2, target_modules=TWO)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = module.base_layer.weight.data.to(torch.float8_e4m3fn)
            module.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(UnsupportedLayerError, match=r"float8.*merge='factored'"):
        ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig(merge="dense"))
    engine = ScaLora(model, torch.optim.AdamW(trainable(model)))
    assert type(engine.pairs[0].remainder).__name__ == "FactoredRemainder"


@pytest.mark.parametrize("merge", ["factored", "dense"])
def test_a_step_with_a_merged_or_converted_adapter_is_refused_and_changes_nothing(merge):
    model = with_lora(TwoLayers(), r=2, target_modules=TWO)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, merge=merge))
    for change, undo, message in (
        (model.merge_adapter, model.unmerge_adapter, "is merged during an optimizer step"),
        (model.bfloat16, model.float, "lora_A is torch.bfloat16"),
    ):
        backward(model)
        optimizer.step()
        backward(model)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        change()
        with pytest.raises(UnsupportedLayerError, match=message):
            optimizer.step()
        undo()
        rounding = 0 if change == model.merge_adapter else 0.01
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=rounding, atol=0)
    assert engine.metrics()["scalora/rescales"] == 2
