"""What is said of vLLM when an adapter is exported: the rank it must allow, and what it would refuse."""

import copy
import json
import warnings

import pytest
import torch
from models import tiny_llama, trainable
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification

import scalora
from scalora import ScaLora, ScaLoraConfig
from scalora.saving.ordinary_adapter import AdapterReport
from scalora.saving.vllm import vllm_objections

# Each setting was tried with vLLM 0.32.0's own PEFTHelper and LoRAModel, which refuse what is refused here.
REFUSED = {
    "head": ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
    "embedding": ({"modules_to_save": ["embed_tokens", "lm_head"]}, "modules_to_save: embed_tokens, lm_head"),
    "biases": ({"bias": "lora_only"}, "bias='lora_only'"),
    "factors' biases": ({"lora_bias": True}, "lora_bias"),
    "tokens": ({"trainable_token_indices": [1, 5]}, "trainable_token_indices"),
    "rank": ({"r": 513}, "rank 513 is above 512"),
    "rank of one layer": ({"rank_pattern": {"q_proj": 600}}, "rank 600 is above 512"),
}
TAKEN = {"plain": {}, "largest": {"r": 512}, "each its own": {"rank_pattern": {"q_proj": 4}}}


def adapter(folder, model, **settings):
    get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | settings)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("settings", "said"), REFUSED.values(), ids=REFUSED)
def test_what_vllm_refuses_is_named(settings, said, tmp_path):
    (objection,) = vllm_objections(adapter(tmp_path, tiny_llama(attention_bias=True), **settings))
    assert said in objection


@pytest.mark.parametrize("settings", TAKEN.values(), ids=TAKEN)
def test_what_vllm_takes_has_no_objection(settings, tmp_path):
    assert vllm_objections(adapter(tmp_path, tiny_llama(), **settings)) == []


def test_the_head_of_a_classifier_is_taken(tmp_path):
    model = LlamaForSequenceClassification(tiny_llama().config)
    assert vllm_objections(adapter(tmp_path, model, modules_to_save=["score"])) == []


def test_convolutions_are_refused(tmp_path):
    (objection,) = vllm_objections(adapter(tmp_path, nn.Sequential(nn.Conv1d(3, 4, 2)), target_modules=["0"]))
    assert "convolutions (base_model.model.0)" in objection


@pytest.mark.parametrize(("rank", "limit"), [(1, 1), (2, 8), (16, 16), (17, 32), (257, 320), (321, 512)])
def test_the_serving_rank_is_one_that_vllm_accepts(rank, limit):
    assert AdapterReport({"layer": rank}, {}, {}, {}).serving_rank == limit


def test_an_export_says_what_vllm_does_not_take_and_whose_base_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    base = tiny_llama()
    base.save_pretrained(tmp_path / "temporary" / "base")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0))
    model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "saved")

    def export(name, said):
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, report = scalora.export_adapter(copy.deepcopy(base), tmp_path / "saved", output, name=name)
        assert report.vllm == (vllm_objections(output)[0],)
        assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == name
        found = [str(w.message) for w in caught if str(w.message).startswith("the adapter names")]
        assert [said in message for message in found] == ([True] if said else [])

    export(str(tmp_path / "base"), None)
    export("someone/model", None)
    export(str(tmp_path / "temporary" / "base"), "among temporary files")
    export(str(tmp_path / "gone"), "neither a hub id nor a folder")
    export(None, "no base")
