"""Everything that PEFT offers to do with a live model, done to one that ScaLoRA trains.

Whatever PEFT gives must be what the trained model (or its base, or another adapter on it) computes, or be refused by
name. The lists of what there is come from PEFT itself, so that something new shows up as untested.
"""

import inspect
import warnings

import peft.helpers
import peft.utils
import pytest
import torch
from models import tiny_llama, trainable, with_lora
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft.helpers import check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale, update_signature
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.conversion import convert_to_lora
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import (
    cast_mixed_precision_params,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter

from scalora import ChangedBaseError, ChangedFactorsError, ScaLora, ScaLoraConfig, load_model

TOKENS = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(0))
SETTINGS = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
REFUSED = (ChangedBaseError, ChangedFactorsError)


def new_adapter(seed=7, **settings):
    """A model with an adapter that has been trained without ScaLoRA."""
    return with_lora(tiny_llama(), seed=seed, **SETTINGS | settings)


def fit(model, merge, run=None, steps=6):
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=1, merge=merge))
    run = run or model
    for step in range(steps):
        batch = torch.randint(0, 64, (4, 10), generator=torch.Generator().manual_seed(step))
        run(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine


@torch.no_grad()
def says(model, **settings):
    return model.eval()(input_ids=TOKENS, **settings).logits


class Trained:
    """A model in the middle of a run, and what it, its base and another adapter on that base say."""

    def __init__(self, merge, folder):
        self.folder, self.merge = folder, merge
        self.base = says(tiny_llama())
        other = new_adapter(seed=11)
        other.save_pretrained(folder / "other")
        self.other = says(other)
        self.model = with_lora(tiny_llama(), seed=7, random_B=False, **SETTINGS)
        self.engine = fit(self.model, merge)
        self.trained = says(self.model)

    def still_says_the_same(self):
        assert_close(says(self.model), self.trained)


@pytest.fixture(params=["factored", "dense"])
def run(request, tmp_path):
    return Trained(request.param, tmp_path)


def assert_close(found, wanted, tolerance=2e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def within_a_thousandth_of_the_update(found, run):
    assert (found - run.trained).norm() < 3e-3 * (run.trained - run.base).norm()


def refused_if_dense(run, action):
    """Do something that needs the original base; the trained model must survive a refusal."""
    if run.merge == "factored":
        return action()
    with pytest.raises(ChangedBaseError, match="merge='factored'"):
        action()
    run.still_says_the_same()
    return None


def add_adapter(run):
    def action():
        run.model.add_adapter("second", LoraConfig(**SETTINGS))
        run.model.set_adapter("second")
        assert_close(says(run.model), run.base)  # a new adapter changes nothing
        run.model.set_adapter("default")
        run.still_says_the_same()

    refused_if_dense(run, action)


def delete_adapter(run):
    def action():
        run.model.add_adapter("second", LoraConfig(**SETTINGS))
        run.model.delete_adapter("default")
        assert_close(says(run.model), run.base)

    refused_if_dense(run, action)


def set_adapter(run):
    def action():
        run.model.load_adapter(run.folder / "other", "other")
        run.still_says_the_same()
        run.model.set_adapter("other")
        assert_close(says(run.model), run.other)
        run.model.set_adapter("default")
        run.still_says_the_same()

    refused_if_dense(run, action)


def load_adapter_into_the_trained_one(run):
    """An adapter that is loaded over the trained one is the whole adapter then."""

    def action():
        run.model.load_adapter(run.folder / "other", "default")
        assert_close(says(run.model), run.other)

    refused_if_dense(run, action)


def load_the_saved_run(run):
    run.model.save_pretrained(run.folder / "saved")
    before = run.trained
    fit(run.model, run.merge, steps=3)
    assert (says(run.model) - before).norm() > 1e-2
    run.model.load_adapter(run.folder / "saved", "default")
    assert_close(says(run.model), before)


def disable_adapter(run):
    def action():
        with run.model.disable_adapter():
            assert_close(says(run.model), run.base)
        run.still_says_the_same()

    refused_if_dense(run, action)


def disable_adapter_layers(run):
    def action():
        run.model.base_model.disable_adapter_layers()
        assert_close(says(run.model), run.base)
        run.model.base_model.enable_adapter_layers()
        run.still_says_the_same()

    refused_if_dense(run, action)


def forward_with_adapter_names(run):
    assert_close(says(run.model, adapter_names=["default"] * 3), run.trained)
    found = refused_if_dense(run, lambda: says(run.model, adapter_names=["default", "__base__", "default"]))
    if found is not None:
        assert_close(found[1], run.base[1])
        assert_close(found[::2], run.trained[::2])


def generate(run):
    generated = run.model.generate(input_ids=TOKENS[:1], max_new_tokens=4, do_sample=False)
    merged = run.model.merge_and_unload()
    assert torch.equal(generated, merged.generate(input_ids=TOKENS[:1], max_new_tokens=4, do_sample=False))


def merge_adapter(run):
    for safe in (False, True):
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        run.model.merge_adapter(safe_merge=safe)
        assert_close(says(run.model), run.trained)
        run.model.unmerge_adapter()
        assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


def merge_and_unload(run):
    assert_close(says(run.model.merge_and_unload()), run.trained)


def unload(run):
    found = refused_if_dense(run, lambda: says(run.model.unload()))
    if found is not None:
        assert_close(found, run.base)


def save_pretrained(run):
    run.model.save_pretrained(run.folder / "saved")
    assert_close(says(load_model(tiny_llama(), run.folder / "saved")), run.trained)
    if run.merge == "factored":
        within_a_thousandth_of_the_update(says(PeftModel.from_pretrained(tiny_llama(), run.folder / "saved")), run)
        for settings in ({"safe_serialization": False}, {"selected_adapters": ["default"]}):
            folder = run.folder / "-".join(settings)
            run.model.save_pretrained(folder, **settings)
            within_a_thousandth_of_the_update(says(PeftModel.from_pretrained(tiny_llama(), folder)), run)


def save_pretrained_with_another_adapter(run):
    def action():
        run.model.load_adapter(run.folder / "other", "other")
        run.model.set_adapter("other")
        run.model.save_pretrained(run.folder / "saved")
        within_a_thousandth_of_the_update(says(PeftModel.from_pretrained(tiny_llama(), run.folder / "saved")), run)
        assert_close(says(PeftModel.from_pretrained(tiny_llama(), run.folder / "saved" / "other")), run.other)
        assert_close(says(load_model(tiny_llama(), run.folder / "saved")), run.trained)

    refused_if_dense(run, action)


def save_pretrained_refuses_what_it_cannot_do(run):
    with pytest.raises(ValueError, match="path_initial_model"):
        run.model.save_pretrained(run.folder / "x", path_initial_model_for_weight_conversion=run.folder / "other")
    with pytest.raises(ValueError, match="nobody"):
        run.model.save_pretrained(run.folder / "x", selected_adapters=["nobody"])
    (run.folder / "file").write_text("")
    with pytest.raises(ValueError, match="file"):
        run.model.save_pretrained(run.folder / "file")


def save_pretrained_of_a_frozen_model(run):
    """Freezing a model for inference does not take anything out of what is saved."""
    run.model.requires_grad_(False)
    run.model.save_pretrained(run.folder / "saved")
    assert_close(says(load_model(tiny_llama(), run.folder / "saved")), run.trained)


def set_requires_grad(run):
    run.model.set_requires_grad("default", False)
    run.still_says_the_same()


def add_weighted_adapter(run):
    for kind, weights in (
        ("svd", [1.0]),
        ("linear", [1.0]),
        ("cat", [1.0, 0.0]),
        ("cat", [1.0, 1.0]),
        ("svd", [0.5, 0.0]),
    ):

        def action(kind=kind, weights=weights):
            if "other" not in run.model.peft_config:
                run.model.load_adapter(run.folder / "other", "other")
            names = ["default", "other"][: len(weights)]
            run.model.add_weighted_adapter(names, weights, "mix", combination_type=kind)
            run.model.set_adapter("mix")
            mixed = says(run.model)
            run.model.set_adapter("default")
            run.model.delete_adapter("mix")
            assert run.model.peft_config.keys() == {"default", "other"}
            run.still_says_the_same()
            return mixed

        mixed = refused_if_dense(run, action)
        if mixed is not None:
            assert_close(mixed, whole_weight(run.model, weights), 1e-4)


@torch.no_grad()
def whole_weight(model, weights):
    """What the base plus a weighted sum of the adapters' updates says."""
    base = tiny_llama()
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            update = sum(
                weight * layer.get_delta_weight(adapter)
                for weight, adapter in zip(weights, ["default", "other"], strict=False)
            )
            base.get_submodule(name).weight += update
    return says(base)


def state_dict_of_the_adapter(run):
    """`get_peft_model_state_dict` gives the whole update, which fits adapters of its rank, and no others."""
    tensors = refused_if_dense(run, lambda: get_peft_model_state_dict(run.model))
    if tensors is None:
        return
    rank = next(len(tensor) for name, tensor in tensors.items() if "lora_A" in name)
    fitting = get_peft_model(tiny_llama(), LoraConfig(**SETTINGS | {"r": rank, "lora_alpha": 2 * rank}))
    set_peft_model_state_dict(fitting, tensors)
    assert_close(says(fitting), run.trained)
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(get_peft_model(tiny_llama(), LoraConfig(**SETTINGS)), tensors)
    with pytest.raises(ChangedBaseError, match="state_dict"):
        get_peft_model_state_dict(run.model, state_dict=dict(trainable_tensors(run.model)))
    fit(run.model, "factored", steps=2)
    set_peft_model_state_dict(run.model, tensors)
    run.still_says_the_same()


def trainable_tensors(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def set_state_dict_of_another_adapter(run):
    tensors = get_peft_model_state_dict(new_adapter(seed=11))

    def action():
        set_peft_model_state_dict(run.model, tensors)
        assert_close(says(run.model), run.other)

    refused_if_dense(run, action)


def state_dicts_of_the_base(run):
    """Base and adapter together are the trained model; a base alone can't be put under a merged adapter."""
    base = {name: tensor.clone() for name, tensor in get_base_model_state_dict(run.model).items()}
    assert base.keys() == tiny_llama().state_dict().keys()
    refused_if_dense(run, lambda: set_base_model_state_dict(run.model, tiny_llama().state_dict()))
    run.still_says_the_same()
    if run.merge == "factored":
        bare = tiny_llama()
        bare.load_state_dict(base)
        assert_close(says(bare), run.base)


def whole_state_dict(run):
    saved = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    fit(run.model, run.merge, steps=3)
    run.model.load_state_dict(saved)
    run.still_says_the_same()


def rescale(run):
    def action():
        with rescale_adapter_scale(run.model, 0.0):
            assert_close(says(run.model), run.base)
        with rescale_adapter_scale(run.model, 0.5):
            scaled = says(run.model)
        assert_close(scaled, whole_weight(run.model, [0.5]), 1e-4)
        run.still_says_the_same()

    refused_if_dense(run, action)


def hotswap(run):
    hotswap_adapter(run.model, run.folder / "other", "default")
    with pytest.raises(ChangedFactorsError, match="hot-swapped"):
        says(run.model)
    with pytest.raises(ChangedFactorsError):
        run.model.save_pretrained(run.folder / "saved")


def conversion_to_lora(run):
    assert run.model.supports_lora_conversion() == (run.merge == "factored")
    if run.merge == "dense":
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            convert_to_lora(run.model, rank=16)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one already
        config, tensors = convert_to_lora(run.model, rank=16)
    converted = get_peft_model(tiny_llama(), config)
    set_peft_model_state_dict(converted, tensors)
    within_a_thousandth_of_the_update(says(converted), run)


def signatures(run):
    update_signature(run.model)
    run.still_says_the_same()


def input_dtype_casting(run):
    with disable_input_dtype_casting(run.model):
        run.still_says_the_same()


def saved_folder_is_a_peft_model(run):
    run.model.save_pretrained(run.folder / "saved")
    assert check_if_peft_model(str(run.folder / "saved")) == (run.merge == "factored")
    tensors = load_peft_weights(str(run.folder / "saved"), device="cpu")
    assert all(tensor.numel() for tensor in tensors.values()) == (run.merge == "factored")


def half_precision_base(run):
    """A conversion of the frozen base rounds it once; later merges do not round it again."""
    cast_mixed_precision_params(run.model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = says(run.model)
    assert (rounded - run.trained).norm() < 0.05 * run.trained.norm()
    weight = run.model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight
    if run.merge == "dense":
        with torch.autocast("cpu", torch.bfloat16):
            fit(run.model, "dense", steps=3)
        assert run.engine.pairs[0].remainder.rounded_off is not None
    assert weight.dtype == torch.bfloat16


def kbit_preparation(run):
    prepare_model_for_kbit_training(run.model, use_gradient_checkpointing=False)
    run.still_says_the_same()


def nothing_else(run):
    """Properties and reports that change nothing and tell nothing about weights."""
    assert run.model.active_adapters == ["default"]
    assert run.model.get_model_status().enabled is True
    assert run.model.get_model_status().active_adapters == ["default"]
    assert run.model.get_base_model() is run.model.base_model.model
    assert run.model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in trainable(run.model))
    run.model.print_trainable_parameters()
    assert len(run.model.get_layer_status()) == 6
    run.still_says_the_same()


PEFT_MODEL = {
    "add_adapter": add_adapter,
    "delete_adapter": delete_adapter,
    "disable_adapter": disable_adapter,
    "forward": forward_with_adapter_names,
    "generate": generate,
    "load_adapter": load_adapter_into_the_trained_one,
    "save_pretrained": save_pretrained,
    "set_adapter": set_adapter,
    "set_requires_grad": set_requires_grad,
    "supports_lora_conversion": conversion_to_lora,
    "from_pretrained": save_pretrained,
}
LORA_MODEL = {
    "add_weighted_adapter": add_weighted_adapter,
    "delete_adapter": delete_adapter,
    "disable_adapter_layers": disable_adapter_layers,
    "enable_adapter_layers": disable_adapter_layers,
    "forward": forward_with_adapter_names,
    "inject_adapter": add_adapter,
    "merge_adapter": merge_adapter,
    "merge_and_unload": merge_and_unload,
    "set_adapter": set_adapter,
    "set_requires_grad": set_requires_grad,
    "supports_lora_conversion": conversion_to_lora,
    "unload": unload,
    "unmerge_adapter": merge_adapter,
}
FUNCTIONS = {
    "cast_mixed_precision_params": half_precision_base,
    "check_if_peft_model": saved_folder_is_a_peft_model,
    "disable_input_dtype_casting": input_dtype_casting,
    "get_base_model_state_dict": state_dicts_of_the_base,
    "get_peft_model_state_dict": state_dict_of_the_adapter,
    "load_peft_weights": saved_folder_is_a_peft_model,
    "prepare_model_for_kbit_training": kbit_preparation,
    "rescale_adapter_scale": rescale,
    "set_base_model_state_dict": state_dicts_of_the_base,
    "set_peft_model_state_dict": set_state_dict_of_another_adapter,
    "update_forward_signature": signatures,
    "update_generate_signature": signatures,
    "update_signature": signatures,
}
MORE = [
    load_the_saved_run,
    save_pretrained_with_another_adapter,
    save_pretrained_refuses_what_it_cannot_do,
    save_pretrained_of_a_frozen_model,
    whole_state_dict,
    hotswap,
    nothing_else,
]

# What can't tell or change anything about the weights of a LoRA model, and why.
HARMLESS = {
    "active_adapters": "see nothing_else",
    "active_peft_config": "the configuration",
    "base_model_torch_dtype": "a dtype",
    "create_or_update_model_card": "writes a README",
    "get_base_model": "see nothing_else",
    "get_layer_status": "see nothing_else",
    "get_model_config": "the base model's configuration",
    "get_model_status": "see nothing_else",
    "get_nb_trainable_parameters": "see nothing_else",
    "get_prompt": "of prompt learning",
    "get_prompt_embedding_to_save": "of prompt learning",
    "has_active_enabled_adapter": "a flag",
    "modules_to_save": "names",
    "peft_config": "the configurations",
    "prefix": "a constant",
    "prepare_inputs_for_generation": "used by generate",
    "prepare_model_for_gradient_checkpointing": "adds hooks to the embedding",
    "print_trainable_parameters": "see nothing_else",
    "subtract_mutated_init": "used by save_pretrained for what is refused",
    "target_module_mapping": "a constant",
    "tuner_layer_cls": "a constant",
    "uses_shared_state": "a constant",
    "bloom_model_postprocess_past_key_value": "of prompt learning",
    "find_kappa_target_modules": "proposes modules of a base model",
    "get_gptqmodel_quant_linear": "classes of GPTQ",
    "get_quantization_config": "of quantised models",
    "get_quantization_kwargs": "of quantised models",
    "id_tensor_storage": "of tensors",
    "infer_device": "a device",
    "map_cache_to_layer_device_map": "of prompt learning",
    "quantization_extra_repr": "a text",
    "register_peft_method": "a decorator",
    "replace_lora_weights_loftq": "of 4-bit models that were just loaded; overwritten factors are tested elsewhere",
    "resolve_quantization_backend": "of quantised models",
    "set_additional_trainable_modules": "used by add_adapter",
    "shift_tokens_right": "of tensors",
    "transpose": "of tensors",
}


def public(cls):
    return {name for name in vars(cls) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("listed", "tested"),
    [
        (public(PeftModel) | public(PeftModelForCausalLM), PEFT_MODEL),
        (public(LoraModel) | public(BaseTuner), LORA_MODEL),
        (
            {
                name
                for module in (peft.helpers, peft.utils)
                for name, function in vars(module).items()
                if inspect.isfunction(function) and function.__module__.startswith("peft") and name[0] != "_"
            },
            FUNCTIONS,
        ),
    ],
    ids=["PeftModel", "LoraModel", "functions"],
)
def test_everything_that_peft_has_is_tested_or_known_to_be_harmless(listed, tested):
    assert listed - tested.keys() - HARMLESS.keys() == set()


DOORS = sorted({door for table in (PEFT_MODEL, LORA_MODEL, FUNCTIONS) for door in table.values()} | set(MORE), key=str)


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_what_peft_does_with_a_trained_model_is_right_or_refused(run, door):
    door(run)


REFUSALS = {
    "delete_adapter": lambda model: model.delete_adapter("default"),
    "add_adapter": lambda model: model.add_adapter("new", LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])),
    "set_adapter": lambda model: model.set_adapter("second"),
    "adapter_names": lambda model: model(input_ids=TOKENS, adapter_names=["default", "second", "default"]),
    "add_weighted_adapter": lambda model: model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "mix"),
    "unload": lambda model: model.unload(),
    "disable_adapter_layers": lambda model: model.base_model.disable_adapter_layers(),
    "merge_adapter": lambda model: model.merge_adapter(["second"]),
    "set_peft_model_state_dict": lambda model: set_peft_model_state_dict(
        model, get_peft_model_state_dict(new_adapter())
    ),
}


@pytest.mark.parametrize("action", REFUSALS)
def test_a_refusal_leaves_the_model_as_it_was(action):
    model = with_lora(tiny_llama(), seed=7, random_B=False, **SETTINGS)
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=1, merge="dense"))
    model.add_adapter("second", LoraConfig(**SETTINGS))  # before anything is merged
    for _ in range(4):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before, modules = says(model), [type(module) for module in model.modules()]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ChangedBaseError):
        REFUSALS[action](model)
    assert torch.equal(says(model), before)
    assert [type(module) for module in model.modules()] == modules
    assert model.peft_config.keys() == {"default", "second"}
    assert model.active_adapter == "default"
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    engine.detach()


def test_factors_taken_out_of_a_state_dict_are_the_whole_update_or_do_not_fit():
    """loralib's way of saving an adapter, and its way of loading it, which passes over what it does not know."""
    model = with_lora(tiny_llama(), seed=7, random_B=False, **SETTINGS)
    fit(model, "factored")
    trained = says(model)
    factors = {name: tensor for name, tensor in model.state_dict().items() if "lora_A" in name or "lora_B" in name}
    with pytest.raises(RuntimeError, match="size mismatch"):
        new_adapter().load_state_dict(factors, strict=False)
    rank = next(len(tensor) for name, tensor in factors.items() if "lora_A" in name)
    wide = new_adapter(r=rank, lora_alpha=2 * rank)
    wide.load_state_dict(factors, strict=False)
    assert_close(says(wide), trained)
    fit(model, "factored", steps=2)
    model.load_state_dict(factors, strict=False)
    assert_close(says(model), trained)


def test_factors_that_do_not_fit_leave_the_remainder_where_it_is():
    model = with_lora(tiny_llama(), seed=7, random_B=False, **SETTINGS)
    fit(model, "factored")
    trained = says(model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(new_adapter(r=1)))
    assert_close(says(model), trained)
