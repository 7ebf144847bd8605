"""MoRA against its equations entry by entry, and as a PEFT layer: start, size, rank, merge, refusals."""

import copy
import math

import pytest
import torch
from models import Mixed, TwoLayers, tiny_gpt2, tiny_llama, trainable
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from scalora import UnsupportedLayerError
from scalora.rivals.mora import Mora


def with_mora(model, *, random_M=False, **settings):
    method = Mora()
    adapted = method.adapt(copy.deepcopy(model), method.peft_config(settings), lambda model: None)
    if random_M:
        torch.manual_seed(1)
        for parameter in trainable(adapted):
            nn.init.normal_(parameter, std=0.3)
    return adapted


def one_layer(inputs, outputs, r, **settings):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(inputs, outputs)).double()
    return base, with_mora(base, r=r, target_modules=["0"], random_M=True, **settings).double()


def square_of(adapted):
    (parameter,) = trainable(adapted)
    return parameter


def update_entry_by_entry(x, M, outputs):
    """Equation 9 of the paper for one input vector, in Python numbers."""
    size, half = len(M), len(M) // 2
    groups = -(-len(x) // size)
    padded = [x[i % len(x)] for i in range(groups * size)]
    answers = []
    for j in range(groups):
        group = padded[j * size : (j + 1) * size]
        turned = [0.0] * size
        for i in range(half):
            angle = j * 10000 ** (-2 * i / size)
            turned[i] = group[i] * math.cos(angle) - group[i + half] * math.sin(angle)
            turned[i + half] = group[i] * math.sin(angle) + group[i + half] * math.cos(angle)
        answers += [sum(M[row][column] * turned[column] for column in range(size)) for row in range(size)]
    return [answers[i % len(answers)] for i in range(outputs)]


@pytest.mark.parametrize(
    ("inputs", "outputs", "r", "size"),
    [
        (24, 12, 1, 6),  # n a multiple of r̂, more groups than the output takes
        (24, 24, 3, 12),  # both multiples
        (25, 23, 2, 8),  # neither a multiple; ⌊√96⌋ = 9 is odd
        (6, 40, 2, 8),  # n < r̂ < m: the input and the output are both continued
        (4, 60, 4, 16),  # the input is continued more than once
    ],
)
def test_the_forward_pass_is_the_papers_equation(inputs, outputs, r, size):
    base, adapted = one_layer(inputs, outputs, r)
    M = square_of(adapted)
    assert M.shape == (size, size)
    x = torch.randn(3, 2, inputs, dtype=torch.float64)
    expected = [update_entry_by_entry(row, M.tolist(), outputs) for row in x.flatten(0, 1).tolist()]
    expected = torch.tensor(expected, dtype=torch.float64).reshape(3, 2, outputs)
    torch.testing.assert_close(adapted(x) - base(x), expected, rtol=1e-10, atol=1e-12)


def test_neither_alpha_nor_rslora_changes_the_update():
    _, plain = one_layer(25, 23, 2)
    x = torch.randn(4, 25, dtype=torch.float64)
    for settings in ({"lora_alpha": 64}, {"use_rslora": True}):
        assert torch.equal(one_layer(25, 23, 2, **settings)[1](x), plain(x))


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(25, 23), (6, 40), (40, 6)])
def test_a_merge_gives_the_forward_pass_and_can_be_undone(inputs, outputs, safe):
    base, adapted = one_layer(inputs, outputs, 2)
    x = torch.randn(5, inputs, dtype=torch.float64)
    expected = adapted(x)
    adapted.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(adapted(x), expected, rtol=1e-10, atol=1e-12)
    adapted.unmerge_adapter()
    torch.testing.assert_close(adapted.base_model.model[0].base_layer.weight, base[0].weight, rtol=0, atol=1e-12)
    merged = Mora().merged(adapted)
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(x), expected, rtol=1e-10, atol=1e-12)


def test_the_start_is_the_bases_function():
    base = tiny_llama()
    adapted = with_mora(base, r=2, target_modules="all-linear")
    tokens = torch.randint(0, 64, (2, 9))
    assert torch.equal(adapted(input_ids=tokens).logits, base(input_ids=tokens).logits)


def test_there_are_nearly_as_many_parameters_as_in_lora_and_never_more():
    base = tiny_llama(hidden_size=64, intermediate_size=96)
    adapted = with_mora(base, r=4, target_modules="all-linear", rank_pattern={"down_proj": 8})
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    assert len(layers) == 14
    for name, layer in layers.items():
        budget = (layer.in_features + layer.out_features) * (8 if "down_proj" in name else 4)
        count = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        assert 0.8 * budget < count <= budget, name


def test_training_lowers_the_loss_and_the_updates_rank_exceeds_that_of_lora():
    base = tiny_llama()
    adapted = with_mora(base, r=2, target_modules="all-linear")
    assert all("lora_A" in name for name, p in adapted.named_parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(trainable(adapted), lr=1e-2)
    tokens = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable(adapted))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    merged = Mora().merged(adapted)
    for name, before in base.named_parameters():
        if name.endswith("proj.weight"):
            update = merged.get_parameter(name) - before
            assert torch.linalg.matrix_rank(update.double(), rtol=1e-3) > 2, name


def test_dropout_drops_the_adapters_input_only_in_training():
    base, adapted = one_layer(24, 12, 1, lora_dropout=0.5)
    x = torch.randn(3, 24, dtype=torch.float64)
    adapted.eval()
    still = adapted(x)
    assert torch.equal(adapted(x), still)
    adapted.train()
    assert not torch.allclose(adapted(x), still)
    nn.init.zeros_(square_of(adapted))
    assert torch.equal(adapted(x), base(x))


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (tiny_gpt2(), {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "c_attn.*Conv1D"),
        (Mixed(), {"target_modules": ["embed"]}, "embed.*Embedding"),
        (TwoLayers(), {"target_modules": ["first"], "use_dora": True}, "first.*use_dora"),
        (TwoLayers(), {"target_modules": ["first"], "lora_bias": True}, "first.*lora_bias"),
    ],
)
def test_what_has_no_square_matrix_is_refused_by_name(model, settings, message):
    with pytest.raises(UnsupportedLayerError, match=message):
        with_mora(model, r=2, **settings)


def test_a_start_that_would_change_the_base_is_refused():
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        Mora().peft_config({"init_lora_weights": "pissa"})


def test_an_adapter_can_be_saved_but_plain_peft_does_not_take_it_for_lora(tmp_path):
    with_mora(TwoLayers(), r=2, target_modules=["first"]).save_pretrained(tmp_path)
    assert not Mora.ordinary_adapter
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(TwoLayers(), tmp_path)
