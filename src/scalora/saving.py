"""Keeps an adapter-only save of a changed base from being silently wrong.

After a rescale part of the update lives in the base weight, so PEFT's adapter files fit only that changed base. Until
such a model can be exported as an adapter, saving one raises.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from torch import nn


class AdapterOnlySaveError(RuntimeError):
    """An adapter whose base has been changed was about to be saved alone."""


def refuse_adapter_only_save(model: nn.Module) -> None:
    """From now on `save_pretrained` and `push_to_hub` of this model raise `AdapterOnlySaveError`.

    The way out, `merge_and_unload()`, returns another object (the plain model), which saves as ever.
    """
    for method in ("save_pretrained", "push_to_hub"):
        if hasattr(model, method):
            setattr(model, method, partial(_refuse, method))


def _refuse(method: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise AdapterOnlySaveError(
        f"{method} would save the adapter alone, but ScaLoRA has merged part of the update into the base weights, so "
        "the adapter would be wrong on any other copy of the base: save model.merge_and_unload() instead"
    )
