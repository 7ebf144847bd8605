"""LoRA with random signs against its definition, and as a PEFT layer: start, signs, rank, merge, refusals."""

import copy

import pytest
import torch
from models import Mixed, TwoLayers, losses_of, tiny_gpt2, tiny_llama, trainable
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from scalora import UnsupportedLayerError
from scalora.rivals.signed import Signed, signs_of


def with_signs(model, *, random=False, **settings):
    method = Signed()
    adapted = method.adapt(copy.deepcopy(model), method.peft_config(settings), lambda model: None)
    if random:
        torch.manual_seed(1)
        for parameter in trainable(adapted):
            nn.init.normal_(parameter, std=0.3)
    return adapted


def one_layer(**settings):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 7)).double()
    adapted = with_signs(base, r=2, lora_alpha=6, target_modules=["0"], random=True, **settings).double()
    return base, adapted


def weight_of(base, adapted):
    """The weight by the definition, differentiable."""
    (both,) = trainable(adapted)
    assert both.shape == (2, 9 + 7)
    A, B = both[:, :9], both[:, 9:].T
    signs = signs_of("base_model.model.0", base[0].weight).double()
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    return base[0].weight.detach() + 3 * signs * (B @ A)


@pytest.mark.parametrize("shape", [(5, 9), (3, 2, 9), (9,)])
def test_outputs_and_gradients_are_those_of_the_definition(shape):
    base, adapted = one_layer()
    (both,) = trainable(adapted)
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    grad = torch.randn(*shape[:-1], 7, dtype=torch.float64)
    output, expected = adapted(x), nn.functional.linear(x, weight_of(base, adapted), base[0].bias)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(*(torch.autograd.grad(y, [x, both], grad) for y in (output, expected)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_autocast_rounds_as_it_does_for_lora():
    base, adapted = one_layer()
    exact = nn.functional.linear(torch.ones(4, 9).double(), weight_of(base, adapted), base[0].bias)
    adapted.float()
    with torch.autocast("cpu", torch.bfloat16):
        output = adapted(torch.ones(4, 9))
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    (both,) = trainable(adapted)
    assert both.grad.dtype == torch.float32
    assert 0 < (output - exact).norm() < 0.02 * exact.norm()


def test_signs_are_balanced_and_belong_to_the_layers_name_alone():
    weight = torch.empty(256, 256)
    signs = signs_of("layers.0.q_proj", weight)
    assert signs.dtype == torch.int8
    assert abs(signs.double().mean()) < 4 / 256
    assert torch.equal(signs, signs_of("layers.0.q_proj", torch.randn(256, 256).bfloat16()))
    assert abs((signs * signs_of("layers.1.q_proj", weight)).double().mean()) < 4 / 256
    # Rank one with signs is not low rank.
    assert torch.linalg.svdvals(signs.double())[0] < 0.15 * signs.double().norm()


@pytest.mark.parametrize("safe", [True, False])
def test_a_merge_gives_the_forward_pass_and_can_be_undone(safe):
    base, adapted = one_layer()
    x = torch.randn(5, 9, dtype=torch.float64)
    expected = adapted(x)
    adapted.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(adapted(x), expected, rtol=1e-10, atol=1e-12)
    adapted.unmerge_adapter()
    torch.testing.assert_close(adapted.base_model.model[0].base_layer.weight, base[0].weight, rtol=0, atol=1e-12)
    merged = Signed().merged(adapted)
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(x), expected, rtol=1e-10, atol=1e-12)


def test_it_starts_as_lora_with_as_many_parameters():
    base = tiny_llama()
    adapted = with_signs(base, r=2, target_modules="all-linear", rank_pattern={"down_proj": 4})
    tokens = torch.randint(0, 64, (2, 9))
    assert torch.equal(adapted(input_ids=tokens).logits, base(input_ids=tokens).logits)
    for name, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer):
            (both,) = trainable(layer)
            assert both.numel() == (layer.in_features + layer.out_features) * (4 if "down_proj" in name else 2)
            assert both[:, : layer.in_features].norm() > 0
            assert not both[:, layer.in_features :].any()
    assert not [key for key in adapted.state_dict() if "signs" in key]


def test_training_lowers_the_loss_and_the_updates_rank_exceeds_that_of_lora():
    base = tiny_llama()
    adapted = with_signs(base, r=2, target_modules="all-linear")
    optimizer = torch.optim.AdamW(trainable(adapted), lr=1e-2)
    tokens = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(0))
    losses = losses_of(adapted, optimizer, tokens, 8)
    assert losses[-1] < losses[0] - 0.1
    merged = Signed().merged(adapted)
    for name, before in base.named_parameters():
        if name.endswith("proj.weight"):
            update = merged.get_parameter(name) - before
            assert torch.linalg.matrix_rank(update.double(), rtol=1e-3) > 8, name


def test_dropout_drops_the_adapters_input_only_in_training():
    _, adapted = one_layer(lora_dropout=0.5)
    x = torch.randn(3, 9, dtype=torch.float64)
    adapted.eval()
    still = adapted(x)
    assert torch.equal(adapted(x), still)
    adapted.train()
    assert not torch.allclose(adapted(x), still)


def test_no_weights_gradient_or_update_is_kept_for_the_backward_pass():
    _, adapted = one_layer()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted(torch.randn(5, 9, dtype=torch.float64))
    matrices = [t for t in saved if t.shape in ((7, 9), (9, 7)) and t.dtype == torch.float64]
    base_weight = adapted.base_model.model[0].base_layer.weight
    assert all(t.data_ptr() == base_weight.data_ptr() for t in matrices)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (tiny_gpt2(), {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "c_attn.*Conv1D"),
        (Mixed(), {"target_modules": ["embed"]}, "embed.*Embedding"),
        (TwoLayers(), {"target_modules": ["first"], "use_dora": True}, "first.*use_dora"),
        (TwoLayers(), {"target_modules": ["first"], "lora_bias": True}, "first.*lora_bias"),
    ],
)
def test_what_has_no_signs_is_refused_by_name(model, settings, message):
    with pytest.raises(UnsupportedLayerError, match=message):
        with_signs(model, r=2, **settings)


def test_a_start_that_is_none_with_signs_is_refused():
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        Signed().peft_config({"init_lora_weights": "pissa"})


def test_an_adapter_can_be_saved_but_plain_peft_does_not_take_it_for_lora(tmp_path):
    with_signs(TwoLayers(), r=2, target_modules=["first"]).save_pretrained(tmp_path)
    assert not Signed.ordinary_adapter
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(TwoLayers(), tmp_path)
