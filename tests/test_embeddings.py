"""Embeddings and heads, tied or not, resized or not, that are trained beside the adapter or by it.

What PEFT alone makes of an exported adapter, and Transformers of a merged model, must be what the trained model says.
"""

import pytest
import torch
from models import tiny_llama, trainable
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from scalora import (
    PairAdamW,
    ScaLora,
    ScaLoraConfig,
    UnsupportedLayerError,
    export_adapter,
    export_merged,
    load_model,
)

NEW = 70  # tokens after resizing, of 64 before

ADAPTERS = {
    "new tokens": {"trainable_token_indices": [60, 63]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [60, 61], "lm_head": [60, 61]}},
    "other tokens of the head": {"trainable_token_indices": {"embed_tokens": [60], "lm_head": [60, 61]}},
    "saved whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved whole and tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "both adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "adapted and tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
}


def base(tied, resized):
    model = tiny_llama(tie_word_embeddings=tied)
    if resized:
        torch.manual_seed(5)
        model.resize_token_embeddings(NEW, mean_resizing=False)
    return model


def tokens(resized):
    batch = torch.randint(0, 64, (3, 8), generator=torch.Generator().manual_seed(9))
    batch[:, -2:] = torch.tensor([[60, 61], [63, 66], [67, 60]]) if resized else torch.tensor([60, 61])
    return batch


def settings(name, resized):
    chosen = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | ADAPTERS[name]
    if resized and name == "new tokens":
        chosen["trainable_token_indices"] = [60, 63, 66, 67]
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("resized", [False, True], ids=["", "resized"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_embeddings_are_exported_and_merged_as_they_were_trained(tied, resized, name, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(base(tied, resized), LoraConfig(**settings(name, resized)))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    merge = "factored" if tied and "adapted" in name else "auto"
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=1, merge=merge))
    for step in range(4):
        batch = torch.randint(0, NEW if resized else 64, (4, 8), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    assert engine.metrics()["scalora/merge_norm"] > 0

    @torch.no_grad()
    def says(other):
        return other.eval()(input_ids=tokens(resized)).logits

    wanted, before = says(model), says(base(tied, resized))

    def is_as_trained(other):
        assert (says(other) - wanted).norm() < 1e-5 * (wanted - before).norm()

    engine.save(tmp_path / "state")
    model.save_pretrained(tmp_path / "saved")
    is_as_trained(load_model(base(tied, resized), tmp_path / "saved"))
    export_adapter(base(tied, resized), tmp_path / "state", tmp_path / "adapter", rtol=1e-6)
    is_as_trained(PeftModel.from_pretrained(base(tied, resized), tmp_path / "adapter"))
    merged = export_merged(base(tied, resized), tmp_path / "state", tmp_path / "merged")
    is_as_trained(merged)
    is_as_trained(type(merged).from_pretrained(tmp_path / "merged"))
    is_as_trained(model.merge_and_unload())


class HeadOfEmbedding(nn.Module):
    """An output head that is the adapted embedding, in one parameter."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = [embedding]  # not registered

    def forward(self, hidden):
        embedding = self.embedding[0]
        weight = embedding.get_base_layer().weight + embedding.get_delta_weight("default")
        return nn.functional.linear(hidden, weight)


def tied_in_float64(**settings):
    torch.manual_seed(3)
    model = tiny_llama(tie_word_embeddings=True).double()  # before PEFT ties factors: a conversion parts them
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM", **settings)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad and "lm_head" not in name:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


CASES = {
    "columns": {},
    "compressed": {"remainder_rank": 4},
    "matrix, pairs": {"mode": "matrix"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_tied_factors_are_one_pair_with_the_sum_of_both_gradients(case):
    tied, plain = tied_in_float64(ensure_weight_tying=True), tied_in_float64()
    embedding, head = tied.base_model.model.model.embed_tokens, tied.base_model.model.lm_head
    assert embedding.lora_embedding_B["default"].data_ptr() == head.lora_A["default"].weight.data_ptr()
    plain.base_model.model.lm_head = HeadOfEmbedding(plain.base_model.model.model.embed_tokens)
    losses = {}
    for name, model in (("tied", tied), ("plain", plain)):
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        if "pairs" in case:
            optimizer = PairAdamW(model, lr=2e-3)
        config = {"warmup_steps": 0, "merge": "factored", "remainder_rank": 64} | CASES[case]
        engine = ScaLora(model, optimizer, ScaLoraConfig(**config))
        losses[name] = []
        for step in range(5):
            batch = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
        assert engine.metrics()["scalora/merge_norm"] > 1e-3
    # A compression's Gram matrices resolve 1e-8 of what it compresses.
    assert losses["tied"] == pytest.approx(losses["plain"], rel=1e-7 if case == "compressed" else 1e-10)
    assert torch.equal(embedding.lora_embedding_A["default"].mT, head.lora_B["default"].weight)


def test_tied_factors_take_no_dense_remainder():
    model = tied_in_float64(ensure_weight_tying=True)
    with pytest.raises(UnsupportedLayerError, match=r"embed_tokens.*lm_head.*merge='factored'"):
        ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig(merge="dense"))
