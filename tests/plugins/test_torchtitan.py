"""torchtitan has no PEFT adapter: its own LoRA layers are refused."""

import pytest
import torch
from frameworks import needs
from torch import nn

from scalora import ScaLora, UnsupportedLayerError

pytestmark = needs("torchtitan")


def test_its_lora_layers_are_its_own_and_refused():
    from torchtitan.components.lora import LoRAConverter
    from torchtitan.models.common.linear import Linear

    converter = LoRAConverter(LoRAConverter.Config(rank=2, alpha=2.0))
    layer = converter.convert(Linear.Config(in_features=8, out_features=6)).build()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_a.weight", "lora_b.weight"}
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad])
    with pytest.raises(UnsupportedLayerError, match="no LoRA layers: wrap it with peft"):
        ScaLora(nn.Sequential(layer), optimizer)
