"""Exported adapters and models equal the live model, whatever PEFT's settings are, and say what rounding loses."""

import copy
import json

import pytest
import torch
from models import tiny_gpt2, tiny_llama, trainable, with_lora
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import scalora
from scalora import ScaLora, ScaLoraConfig
from scalora.saving.state_file import read_state, write_state

TOKENS = torch.randint(0, 64, (4, 10), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def trained(base, folder, merge, steps=5, **settings):
    """Train a copy of a base for a few steps with rescales, save it, and return its logits."""
    model = with_lora(base, **{"r": 2, "target_modules": ["q_proj", "v_proj"]} | settings)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=1, merge=merge))
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    live = logits(model)
    model.save_pretrained(folder)
    return live


# The settings of PEFT, by what is special about them.
LLAMAS = {
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 4, "v_proj": 1},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 7},
    },
    "bias": {"lora_bias": True, "lora_alpha": 6, "bias": "lora_only"},
    "all-biases": {"bias": "all"},
    "embedding": {"target_modules": ["embed_tokens", "down_proj"]},
    "trained-head": {"modules_to_save": ["lm_head"]},
    "trained-embedding": {"modules_to_save": ["embed_tokens"]},
    "new-tokens": {"trainable_token_indices": [1, 5, 9]},
    "some-layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
}


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["dense", "factored"])
@pytest.mark.parametrize("settings", LLAMAS.values(), ids=LLAMAS)
def test_every_setting_of_peft_is_in_the_exports(settings, merge, tmp_path):
    base = tiny_llama(attention_bias=True, tie_word_embeddings=False)
    check(base, tmp_path, merge, **settings)


@pytest.mark.parametrize("settings", [LLAMAS["trained-head"], LLAMAS["trained-embedding"], LLAMAS["new-tokens"], {}])
def test_tied_embeddings_stay_tied_or_are_said_not_to_be(settings, tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    check(base, tmp_path, "dense", **settings)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] == ("modules_to_save" not in settings)


@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_conv1d(merge, tmp_path):
    settings = {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True}
    base = tiny_gpt2()
    base.config.tie_word_embeddings = False
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.clone())
    check(base, tmp_path, merge, **settings)


def check(base, folder, merge, **settings):
    live = trained(base, folder / "saved", merge, **settings)
    change = (live - logits(copy.deepcopy(base))).norm()
    assert change > 0.1
    scalora.export_adapter(copy.deepcopy(base), folder / "saved", folder / "adapter", rtol=1e-5)
    scalora.export_merged(copy.deepcopy(base), folder / "saved", folder / "merged")
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter")
    assert (logits(adapted) - live).norm() < 1e-3 * change
    assert (logits(AutoModelForCausalLM.from_pretrained(folder / "merged")) - live).norm() < 1e-3 * change
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert not config["use_rslora"]
    assert config["lora_alpha"] == config["r"]


@pytest.mark.usefixtures("without_shape_checks")
def test_a_layer_whose_name_ends_anothers_keeps_its_own_rank(tmp_path):
    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.proj = torch.nn.Linear(12, 12)
            self.block = torch.nn.ModuleDict({"proj": torch.nn.Linear(12, 12)})

        def forward(self, x):
            return self.block["proj"](torch.tanh(self.proj(x)))

    base, x = Nested(), torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    patterns = {"rank_pattern": {"block.proj": 4}, "alpha_pattern": {"block.proj": 12}}
    model = with_lora(base, r=1, target_modules=["proj"], **patterns)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=100, merge="factored"))
    model(x).square().mean().backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "saved")
    scalora.export_adapter(copy.deepcopy(base), tmp_path / "saved", tmp_path / "adapter", rtol=1e-5, per_layer=True)
    for folder in ("adapter", "saved"):  # `save_pretrained` writes an ordinary adapter, too
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_what_rounding_loses_is_measured_in_each_layer(merge, dtype, tmp_path):
    base = tiny_llama(tie_word_embeddings=False)
    trained(base, tmp_path / "saved", merge)
    exact = scalora.export_merged(copy.deepcopy(base), tmp_path / "saved", tmp_path / "exact").state_dict()
    losses = {}
    rounded = scalora.export_merged(
        copy.deepcopy(base), tmp_path / "saved", tmp_path / "rounded", dtype=dtype, with_losses=losses.update
    ).state_dict()
    assert len(losses) == 4
    for name, loss in losses.items():
        key = name.removeprefix("base_model.model.") + ".weight"
        update = exact[key] - base.state_dict()[key]
        assert loss == pytest.approx(float((rounded[key].float() - exact[key]).norm() / update.norm()), rel=1e-3)
    _, report = scalora.export_adapter(copy.deepcopy(base), tmp_path / "saved", tmp_path / "adapter", dtype=dtype)
    assert max(report.errors.values()) < 1e-3 + 2 * torch.finfo(dtype).eps
    assert min(report.errors.values()) > torch.finfo(dtype).eps / 20


def test_a_merged_model_in_bfloat16_that_has_lost_the_update_says_so(tmp_path):
    base = tiny_llama(tie_word_embeddings=False)
    model = with_lora(base, r=2, target_modules=["q_proj"], random_B=False)
    ScaLora(model, torch.optim.SGD(trainable(model)), ScaLoraConfig(merge="factored"))
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.fill_(1e-3)
    model.save_pretrained(tmp_path / "saved")
    with pytest.warns(UserWarning, match=r"rounding the merged weights to torch\.bfloat16 changes them by up to"):
        scalora.export_merged(copy.deepcopy(base), tmp_path / "saved", tmp_path / "out", dtype=torch.bfloat16)


def test_an_adapter_too_small_for_float16_is_not_written(tmp_path):
    base = tiny_llama(tie_word_embeddings=False)
    model = with_lora(base, r=2, target_modules=["q_proj"], random_B=False)
    ScaLora(model, torch.optim.SGD(trainable(model)), ScaLoraConfig(merge="factored"))
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.fill_(1e-9)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(scalora.ExportError, match="float16 can't hold factors this small"):
        scalora.export_adapter(copy.deepcopy(base), tmp_path / "saved", tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    scalora.export_adapter(copy.deepcopy(base), tmp_path / "saved", tmp_path / "out", dtype=torch.bfloat16)


def rewrite(path, change):
    tensors = load_file(path)
    save_file(change(tensors), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v[:1] if k.endswith("lora_A.weight") else v for k, v in t.items()}, "says rank"),
        (lambda t: {k: v for k, v in t.items() if "lm_head" not in k}, "PEFT has not written it"),
        (lambda t: {k: v + 1 if "lm_head" in k else v for k, v in t.items()}, "is not the trained model's"),
        (lambda t: {k: -v if "layers.1" in k and "lora_A" in k else v for k, v in t.items()}, "layer's update"),
        (lambda t: {k: v / 0 for k, v in t.items()}, "NaN or infinite"),
    ],
)
def test_a_wrong_file_is_never_called_done(change, message, tmp_path, monkeypatch):
    base = tiny_llama(tie_word_embeddings=False)
    trained(base, tmp_path / "saved", "factored", modules_to_save=["lm_head"])
    save = PeftModel.save_pretrained

    def wrong(self, folder, **settings):
        save(self, folder, **settings)
        rewrite(f"{folder}/adapter_model.safetensors", change)

    monkeypatch.setattr(PeftModel, "save_pretrained", wrong)
    with pytest.raises(scalora.ExportError, match=message):
        scalora.export_adapter(base, tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_model_whose_file_is_not_the_model_is_never_called_done(tmp_path, monkeypatch):
    base = tiny_llama(tie_word_embeddings=False)
    trained(base, tmp_path / "saved", "dense")
    save = type(base).save_pretrained

    def wrong(self, folder, **settings):
        save(self, folder, **settings)
        rewrite(folder / "model.safetensors", lambda t: {k: v * 1.01 if "q_proj" in k else v for k, v in t.items()})

    monkeypatch.setattr(type(base), "save_pretrained", wrong)
    with pytest.raises(scalora.ExportError, match="is not the merged model's"):
        scalora.export_merged(base, tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "CorDA"])
def test_a_state_of_a_start_that_changed_the_base_is_refused_by_its_name(start, tmp_path):
    base = tiny_llama(tie_word_embeddings=False)
    trained(base, tmp_path / "saved", "factored")
    path = tmp_path / "saved" / "scalora_state.safetensors"
    state = read_state(path)
    content = {key: {k: t.clone() for k, t in v.items()} if key == "tensors" else v for key, v in state.items()}
    # As it is after a start that has subtracted something from the base before the first step.
    write_state(path, content | {"base": "0" * 64, "adapter": state["adapter"] | {"init_lora_weights": start}})
    for use in (
        lambda: scalora.load_model(copy.deepcopy(base), tmp_path / "saved"),
        lambda: scalora.export_adapter(copy.deepcopy(base), tmp_path / "saved", tmp_path / "out"),
        lambda: scalora.export_merged(copy.deepcopy(base), tmp_path / "saved", tmp_path / "out"),
    ):
        with pytest.raises(scalora.StateError, match=f"init_lora_weights='{start.lower()}'"):
            use()
    assert not (tmp_path / "out").exists()


def test_a_generation_config_that_transformers_loads_and_will_not_save(tmp_path):
    base = tiny_llama(tie_word_embeddings=False)
    trained(base, tmp_path / "saved", "dense")
    base.generation_config.temperature = 0.5
    with pytest.warns(UserWarning, match="saved with do_sample=True"):
        scalora.export_merged(base, tmp_path / "saved", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.temperature == 0.5
