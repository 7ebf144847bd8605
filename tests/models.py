"""Tiny models with LoRA that the tests share."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D


class TwoLayers(nn.Module):
    """Linear, tanh, linear: the smallest thing with two LoRA layers."""

    def __init__(self, features=12, hidden=16, outputs=6):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(features, hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Mixed(nn.Module):
    """An embedding, a Conv1D and a linear layer, plus a head for modules_to_save."""

    def __init__(self, vocabulary=20, width=12):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, width)
        self.conv1d = Conv1D(10, width)
        self.linear = nn.Linear(10, width)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.linear(torch.tanh(self.conv1d(self.embed(tokens))))))


def with_lora(model, *, dtype=torch.float32, random_B=True, seed=0, **settings):
    """The model wrapped by PEFT, with a lora_B that is not zero unless asked for."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(**settings)).to(dtype)
    if random_B:
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name or "lora_embedding_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return peft_model


def tiny_llama(seed=0, **settings):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "tie_word_embeddings": False,
            }
            | settings
        )
    )


def tiny_gpt2(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def backward(model, seed=3):
    """One batch of a regression on `TwoLayers` forward and backward; returns the loss."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(32, 12, generator=generator), torch.randn(32, 6, generator=generator)
    dtype = next(model.parameters()).dtype
    loss = (model(x.to(dtype)) - y.to(dtype)).square().mean()
    model.zero_grad()
    loss.backward()
    return loss.item()


def losses_of(model, optimizer, tokens, steps):
    """Train a language model on one batch; returns the loss before each step."""
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def with_adapter_in_float32(model):
    """A half-precision model whose trained parameters are in float32, as PEFT keeps adapters."""
    for parameter in trainable(model):
        parameter.data = parameter.data.float()
    return model


def take_random_steps(model, optimizer, steps):
    """Steps with random gradients."""
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        for parameter in trainable(model):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
