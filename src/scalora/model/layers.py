"""The kinds of layer that LoRA adapts, and where PEFT keeps what is quantised: one place for their names."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
"""Layers with a weight matrix; Conv1D (GPT-2's) stores it transposed."""

ADAPTABLE = (*LINEAR, nn.Embedding)
"""Layers whose update is ``s·A·Bᵀ``; an embedding's weight is stored transposed."""

# Checked with PEFT 0.21. Layers over quantised weights whose forward pass goes through a `LoraVariant` if there is one,
# which is what the factored remainder needs (bitsandbytes, GPTQ, HQQ, torchao); AWQ's, EETQ's and AQLM's do not.
QUANTISED = ("Linear4bit", "Linear8bitLt", "GPTQLoraLinear", "HqqLoraLinear", "TorchaoLoraLinear")
"""Class names of PEFT's LoRA layers over quantised weights that can be treated."""
