"""Modules that another library has given kernels which read the adapted layers' factors and weights themselves."""

from types import FunctionType, MethodType

import pytest
import torch
from models import tiny_llama, trainable, with_lora

from scalora import ScaLora, ScaLoraConfig, UnsupportedLayerError


def output(layer, x):
    """What such a kernel computes of a layer: its base weight and its factors."""
    return (
        x
        @ (
            layer.base_layer.weight
            + layer.scaling["default"] * layer.lora_B.default.weight @ layer.lora_A.default.weight
        ).T
    )


def apply_lora_mlp(self, x):
    return output(self.down_proj, self.act_fn(output(self.gate_proj, x)) * output(self.up_proj, x))


def given_kernels(module_name):
    model = with_lora(tiny_llama(), target_modules=["gate_proj", "up_proj", "down_proj"], modules_to_save=None)
    kernel = FunctionType(apply_lora_mlp.__code__, globals() | {"__name__": module_name}, "apply_lora_mlp")
    for layer in model.base_model.model.model.layers:
        layer.mlp.forward = MethodType(kernel, layer.mlp)
    return model


def logits(model):
    return model(input_ids=torch.arange(8)[None]).logits


def trained(model, merge):
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    engine = ScaLora(model, optimizer, ScaLoraConfig(merge=merge, warmup_steps=1))
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
    return engine


@pytest.mark.parametrize("package", ["unsloth.kernels.fast_lora", "axolotl.kernels.lora"])
def test_a_factored_remainder_that_they_would_leave_out_is_refused(package):
    model = given_kernels(package)
    with pytest.raises(
        UnsupportedLayerError, match=rf"layers.0.mlp.*{package}.apply_lora_mlp computes its adapted layers"
    ):
        trained(model, "factored")
    for layer in model.base_model.model.model.layers:
        del layer.mlp.forward
    assert trained(model, "factored").metrics()["scalora/rescales"] == 2


def test_what_is_merged_into_the_weights_is_in_their_passes():
    with_kernels, without = given_kernels("unsloth.kernels.fast_lora"), given_kernels("unsloth.kernels.fast_lora")
    for layer in without.base_model.model.model.layers:
        del layer.mlp.forward
    assert trained(with_kernels, "dense").metrics()["scalora/rescales"] == 2
    trained(without, "dense")
    torch.testing.assert_close(logits(with_kernels), logits(without), rtol=1e-4, atol=1e-5)
