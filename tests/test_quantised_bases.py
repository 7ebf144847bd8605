"""Bases quantised by torchao, HQQ and GPTQModel: trained, saved, loaded and exported. `.ci/quantised` installs these.

bitsandbytes is tested in test_remainder.py, test_cli_export.py and test_export_folders.py.
"""

import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch
from models import tiny_llama, trainable
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import GPTQConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TorchAoConfig
from typer.testing import CliRunner

import scalora
from scalora import PairAdamW, ScaLora, ScaLoraConfig, UnsupportedLayerError, add_block_signs
from scalora.cli import app
from scalora.model.signed_factors import SignedFactor

R = 4
KINDS = ("torchao-int8", "torchao-float8", "torchao-int4", "hqq-8", "hqq-4", "gptqmodel-4")


def require(kind):
    library = kind.split("-")[0]
    if importlib.util.find_spec(library) is None and not os.environ.get("REQUIRE_QUANTISED"):
        pytest.skip(f"could not import {library!r}: it is not installed")


def torchao_config(kind):
    from torchao import quantization as ao

    return {
        "torchao-int8": lambda: ao.Int8WeightOnlyConfig(),
        "torchao-float8": lambda: ao.Float8WeightOnlyConfig(),
        "torchao-int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
        "torchao-inputs": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
    }[kind]()


def quantised_by_gptq(plain, folder):
    """A folder with a GPTQ base, calibrated on random tokens."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w1")
    tokens = torch.randint(2, 64, (16, 32), generator=torch.Generator().manual_seed(3))
    texts = [" ".join(f"w{i}" for i in row) for row in tokens.tolist()]
    config = GPTQConfig(bits=4, group_size=32, dataset=texts, tokenizer=tokenizer, model_seqlen=32)
    LlamaForCausalLM.from_pretrained(plain, dtype="float32", quantization_config=config).save_pretrained(folder)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads a base quantised in one of the ways, the same one each time."""
    folder = tmp_path_factory.mktemp("bases")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder / "plain")

    def load(kind):
        if kind.startswith("torchao"):
            settings = TorchAoConfig(torchao_config(kind))
            return LlamaForCausalLM.from_pretrained(folder / "plain", dtype="float32", quantization_config=settings)
        if kind.startswith("hqq"):
            from hqq.core.quantize import BaseQuantizeConfig
            from hqq.models.hf.base import AutoHQQHFModel

            base = LlamaForCausalLM.from_pretrained(folder / "plain", dtype="float32")
            settings = BaseQuantizeConfig(nbits=int(kind[-1]), group_size=32)
            AutoHQQHFModel.quantize_model(base, quant_config=settings, compute_dtype=torch.float32, device="cpu")
            return base
        if not (folder / "gptq").exists():
            quantised_by_gptq(folder / "plain", folder / "gptq")
        settings = GPTQConfig(bits=4, backend="auto_trainable" if kind == "gptqmodel-4" else "auto")
        return LlamaForCausalLM.from_pretrained(folder / "gptq", dtype="float32", quantization_config=settings)

    return load


@torch.no_grad()
def logits(model):
    model.eval()
    return model(input_ids=torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(9))).logits


def contents(value):
    """The bytes of all tensors in a state dict, also of tensors that are made of others."""
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        return b"".join(contents(getattr(value, part)) for part in value.__tensor_flatten__()[0])
    if isinstance(value, torch.Tensor):
        return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return repr(value).encode()


def base_bytes(model):
    return {name: contents(value) for name, value in model.state_dict().items() if "base_layer" in name}


def adapted(base):
    torch.manual_seed(1)
    settings = LoraConfig(r=R, lora_alpha=R, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base, settings)


@pytest.fixture(scope="module", params=KINDS)
def run(request, load, tmp_path_factory):
    """A run of a few steps with a rescale at each, and one with nothing but a rescale, saved."""
    require(request.param)
    base = load(request.param)
    untouched = logits(base)
    model = adapted(base)
    bytes_before = base_bytes(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0)
    for merge in ("dense", "dense_8bit", "stochastic"):
        with pytest.raises(UnsupportedLayerError, match=r"q_proj.* is quantised .*merge='factored'"):
            ScaLora(model, optimizer, ScaLoraConfig(merge=merge))
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, interval=1))
    tokens = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(7):
        model.train()
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        if step == 6:  # a step of rate zero is nothing but a rescale
            before = logits(model)
            factors = [parameter.detach().clone() for parameter in trainable(model)]
            optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
    moved = not any(map(torch.equal, factors, trainable(model)))
    folder = tmp_path_factory.mktemp("run") / "saved"
    model.save_pretrained(folder)
    return SimpleNamespace(
        kind=request.param,
        load=lambda: load(request.param),
        model=model,
        untouched=untouched,
        bytes_before=bytes_before,
        losses=losses,
        before=before,
        trained=logits(model),
        moved=moved,
        folder=folder,
    )


def agree(found, expected, tolerance):
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_it_trains_and_a_rescale_keeps_the_function(run):
    assert run.losses[-1] < run.losses[0] - 0.1
    assert run.moved
    agree(run.trained, run.before, 1e-5)
    assert (run.trained - run.untouched).norm() > 0.1 * run.trained.norm()


def test_the_base_stays_as_it_is(run):
    assert run.bytes_before
    assert base_bytes(run.model).keys() >= run.bytes_before.keys()
    assert {name: value == base_bytes(run.model)[name] for name, value in run.bytes_before.items()} == dict.fromkeys(
        run.bytes_before, True
    )
    with run.model.disable_adapter():
        assert torch.equal(logits(run.model), run.untouched)


def test_a_saved_run_is_loaded_and_exported(run, tmp_path):
    agree(logits(scalora.load_model(run.load(), run.folder)), run.trained, 1e-6)
    _, report = scalora.export_adapter(run.load(), run.folder, tmp_path / "adapter", rtol=1e-5)
    assert min(report.needed.values()) > R
    agree(logits(PeftModel.from_pretrained(run.load(), tmp_path / "adapter")), run.trained, 1e-4)
    scalora.export_merged(run.load(), run.folder, tmp_path / "merged")
    agree(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged")), run.trained, 1e-5)


def test_the_command_loads_the_base_as_in_training(run, tmp_path):
    if run.kind.startswith("hqq"):
        pytest.skip("Transformers 5.23 can't load HQQ bases, so the state can't say how")
    for to in ("adapter", "merged"):
        words = ["export", str(run.folder), "--to", to, "--output", str(tmp_path / to)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output[-500:]


@pytest.mark.parametrize("kind", KINDS)
def test_block_signs_over_it_train_and_end_in_an_ordinary_adapter(kind, load, tmp_path):
    require(kind)
    model = adapted(load(kind))
    add_block_signs(model, 4)
    untouched, optimizer = logits(model), PairAdamW(model, lr=1e-2)
    tokens = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model)
    assert (trained - untouched).norm() > 0.05 * trained.norm()
    model.save_pretrained(tmp_path)
    agree(logits(PeftModel.from_pretrained(load(kind), tmp_path)), trained, 1e-4)
    for module in model.modules():
        if isinstance(module, SignedFactor):  # PEFT's own pass calls them
            module.register_forward_hook(lambda module, args, output: None)
    agree(logits(model), trained, 1e-5)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("torchao-inputs", "quantises its inputs to int8 without a gradient"), ("gptqmodel-auto", "for inference only")],
)
def test_what_passes_no_gradients_is_refused(kind, said, load):
    require(kind)
    model = adapted(load(kind))
    with pytest.raises(UnsupportedLayerError, match=said):
        ScaLora(model, torch.optim.AdamW(trainable(model)))


def test_awq_is_refused_by_name():
    require("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    shape = {"in_features": 64, "out_features": 64, "bias": False}
    layer = AwqTorchLinear(bits=4, group_size=32, sym=True, desc_act=False, register_buffers=True, **shape)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64), layer), LoraConfig(r=R, target_modules=["1"]))
    with pytest.raises(UnsupportedLayerError, match="AwqLoraLinear over AwqTorchLinear"):
        ScaLora(model, torch.optim.AdamW(trainable(model)))
