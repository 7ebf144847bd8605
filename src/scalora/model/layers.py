"""The types of layers that can be adapted, and PEFT's classes for quantised ones."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
"""Linear layers. Conv1D (GPT-2) stores its weight transposed."""

ADAPTABLE = (*LINEAR, nn.Embedding)
"""Layers whose update is ``s·A·Bᵀ``. An embedding stores its weight transposed."""

# Checked with PEFT 0.21. The factored remainder needs a forward pass that calls a `LoraVariant`: those of bitsandbytes,
# GPTQ, HQQ and torchao layers do, those of AWQ, EETQ and AQLM layers do not.
QUANTISED = ("Linear4bit", "Linear8bitLt", "GPTQLoraLinear", "HqqLoraLinear", "TorchaoLoraLinear")
"""Class names of PEFT's LoRA layers over quantised weights that are supported."""
