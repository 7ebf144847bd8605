"""What a user may name, leave out, keep beside an adapter or do with the trained model, and what is saved of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import TwoLayers, tiny_llama, trainable
from peft import LoraConfig, PeftModel, get_peft_model
from test_callback import arguments, tokens
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

from scalora import (
    BlockSignsCallback,
    PairAdamW,
    ScaLora,
    ScaLoraCallback,
    ScaLoraConfig,
    UnsupportedLayerError,
    add_block_signs,
    export_adapter,
    export_merged,
    load_model,
)

TOKENS = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(0))


def named(name="mine", **settings):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **settings)
    return get_peft_model(tiny_llama(), config, adapter_name=name)


def outputs(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def trained(model, merge, steps=4):
    optimizer = torch.optim.AdamW(trainable(model), 1e-2)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=1, merge=merge))
    model.train()
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_an_adapter_of_any_name_is_saved_loaded_and_exported(merge, tmp_path):
    model = named()
    engine = trained(model, merge)
    wanted = outputs(model)
    model.save_pretrained(tmp_path / "saved")
    engine.save(tmp_path / "state")
    for folder in ("saved", "state"):
        torch.testing.assert_close(outputs(load_model(tiny_llama(), tmp_path / folder)), wanted)
    export_adapter(tiny_llama(), tmp_path / "saved", tmp_path / "adapter", rtol=1e-6)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    torch.testing.assert_close(outputs(plain), wanted, rtol=1e-4, atol=1e-4)
    merged = export_merged(tiny_llama(), tmp_path / "saved", tmp_path / "merged")
    torch.testing.assert_close(outputs(merged), wanted, rtol=1e-4, atol=1e-4)
    if merge == "factored":  # where PEFT writes it
        plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved" / "mine")
        torch.testing.assert_close(outputs(plain), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_a_trainer_resumes_an_adapter_of_any_name_also_of_a_model_that_it_makes(merge, tmp_path):
    def train(steps, name, resume=None):
        args = arguments(
            tmp_path / name, max_steps=steps, save_strategy="steps", save_steps=3, lr_scheduler_type="constant"
        )
        callback = ScaLoraCallback(ScaLoraConfig(warmup_steps=1, merge=merge))
        makes = {"model_init": lambda: named()} if name == "made" else {"model": named()}
        trainer = Trainer(args=args, train_dataset=tokens(24), callbacks=[callback], **makes)
        trainer.train(resume_from_checkpoint=resume)
        return outputs(trainer.model)

    for name in ("given", "made"):
        whole = train(6, name)
        assert torch.equal(train(6, name, str(tmp_path / name / "checkpoint-3")), whole)


@pytest.mark.slow
def test_after_a_trainer_the_model_is_pefts_again(tmp_path):
    model = named("default")
    callback = ScaLoraCallback(ScaLoraConfig(warmup_steps=1, merge="factored"))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=tokens(24), callbacks=[callback])
    trainer.train()
    model.save_pretrained(tmp_path / "saved")
    saved = outputs(model)
    trainer.train()
    wanted = outputs(model)
    model.load_adapter(tmp_path / "saved", "earlier")
    assert list(model.peft_config) == ["default", "earlier"]
    assert torch.equal(outputs(model), wanted)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model))), wanted)
    model.set_adapter("earlier")
    torch.testing.assert_close(outputs(model), saved, rtol=1e-4, atol=1e-4)


class Normalised(TwoLayers):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_running_statistics_of_modules_to_save_are_saved(merge, tmp_path):
    def make():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["first", "second"], modules_to_save=["norm"])
        model = get_peft_model(Normalised(), config)
        optimizer = torch.optim.SGD(trainable(model), 1e-2)
        return model, optimizer, ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, merge=merge))

    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(0)) * 3 + 1
    model, optimizer, engine = make()
    for _ in range(4):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.save(tmp_path)
    other, _, its_engine = make()
    its_engine.load(tmp_path)
    assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.slow
@pytest.mark.parametrize("attach", ["rescales", "signs"])
def test_each_of_two_models_with_their_own_adapters_is_saved_whole(attach, tmp_path):
    models = nn.ModuleList([tiny_llama(seed) for seed in (0, 1)])
    for model in models:
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    if attach == "signs":
        add_block_signs(models, 4)
    optimizer = torch.optim.AdamW(trainable(models), 1e-2)
    if attach == "rescales":
        ScaLora(models, optimizer, ScaLoraConfig(warmup_steps=1))
    for _ in range(4):
        sum(model(input_ids=TOKENS, labels=TOKENS).loss for model in models).backward()
        optimizer.step()
        optimizer.zero_grad()
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / f"adapter-{seed}")
        tiny_llama(seed).save_pretrained(tmp_path / f"base-{seed}")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"base-{seed}")
        plain.load_adapter(str(tmp_path / f"adapter-{seed}"))
        torch.testing.assert_close(outputs(plain), outputs(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["AdamW", "PairAdamW"])
def test_layers_without_the_active_adapter_are_left_out(optimizer):
    model = named("default")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    optimizer = PairAdamW(model) if optimizer == "PairAdamW" else torch.optim.AdamW(trainable(model), 1e-2)
    engine = ScaLora(model, optimizer, ScaLoraConfig(mode="matrix" if isinstance(optimizer, PairAdamW) else "auto"))
    assert [pair.name.rpartition(".")[2] for pair in engine.pairs] == ["q_proj", "q_proj"]
    assert {pair.adapter for pair in engine.pairs} == {"other"}


def test_a_model_none_of_whose_layers_has_the_active_adapter_is_refused():
    model = named("default")
    model.base_model.set_adapter([])
    with pytest.raises(UnsupportedLayerError, match="0 active adapters"):
        PairAdamW(model)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_pair_adamw_says_that_one_factor_alone_has_a_gradient(frozen):
    model = named("default")
    optimizer = PairAdamW(model)
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    with pytest.raises(RuntimeError, match=f"{frozen} has no gradient, but the other factor has"):
        optimizer.step()


def test_pair_adamw_says_that_a_copy_of_it_would_belong_to_no_model():
    optimizer = PairAdamW(named("default"))
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="can't be copied or pickled"):
            copied(optimizer)


@pytest.mark.parametrize("callback", [ScaLoraCallback, BlockSignsCallback])
def test_a_trainer_is_not_given_two_optimizers(callback, tmp_path):
    model = named("default")
    optimizers = (torch.optim.AdamW(trainable(model)), None)
    with pytest.raises(ValueError, match="was given AdamW in optimizers"):
        Trainer(model, arguments(tmp_path), callbacks=[callback(pair_adamw=True)], optimizers=optimizers)
