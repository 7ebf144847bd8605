"""Keeps uses of an adapter that assume the original base weights from being silently wrong.

After a rescale part of the update lives in the base weights. PEFT's adapter files then fit only that changed base, and
switching the adapter off no longer gives the original model. Both raise until there is a way to do them right.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from torch import nn

_CONSEQUENCES = {
    "save_pretrained": "would save the adapter alone, which is wrong on any other copy of the base: save "
    "model.merge_and_unload() instead",
    "push_to_hub": "would upload the adapter alone, which is wrong on any other copy of the base: push "
    "model.merge_and_unload() instead",
    "disable_adapter": "would give the changed base, not the original model: give a trainer that needs a reference "
    "model (DPO, KTO, GRPO) a separate ref_model",
}


class ChangedBaseError(RuntimeError):
    """Something needs the original base weights, and ScaLoRA has changed them; the message says what to do."""


def guard_changed_base(model: nn.Module) -> None:
    """From now on `save_pretrained`, `push_to_hub` and `disable_adapter` of this PEFT model raise `ChangedBaseError`.

    The way out of the first two, `merge_and_unload()`, returns another object (the plain model), which saves as ever.
    """
    for method in _CONSEQUENCES:
        if hasattr(model, method):
            setattr(model, method, partial(_refuse, method))


def _refuse(method: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ChangedBaseError(
        f"ScaLoRA has merged part of the update into the base weights: {method} {_CONSEQUENCES[method]}"
    )
