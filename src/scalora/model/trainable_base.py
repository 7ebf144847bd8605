"""Refuses quantised base layers that adapters on top of them or below them can't be trained through.

Checked with GPTQModel 7.7 and torchao 0.18, neither of which is imported.
"""

from __future__ import annotations

from scalora.model.adapters import LoraPair, refuse


def check_gradients_pass(pairs: list[LoraPair]) -> None:
    """Check that every base layer passes gradients on, and takes being switched to training.

    For inference such layers are as good as others, so this is for training only.

    Args:
        pairs: the LoRA pairs of one model.

    Raises:
        UnsupportedLayerError: a layer's kernel is for inference only, or its inputs are quantised by an operation
            without a gradient.
    """
    for pair in pairs:
        base = pair.layer.get_base_layer()
        if getattr(base, "SUPPORTS_TRAINING", None) is False:
            refuse(
                pair.name,
                f"GPTQModel's {type(base).__name__} is for inference only",
                "load the base with GPTQConfig(bits=…, backend='auto_trainable')",
            )
        if type(pair.weight).__name__ == "Int8Tensor" and getattr(pair.weight, "act_quant_kwargs", None) is not None:
            refuse(
                pair.name,
                "torchao quantises its inputs to int8 without a gradient, so layers below would not be trained by it",
                "quantise the weights alone (Int8WeightOnlyConfig)",
            )
