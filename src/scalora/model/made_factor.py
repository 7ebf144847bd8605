"""A tensor that is made of others each time that it is asked for: to read, and not to write to.

Whoever wrote to it would change nothing, and hear nothing of it: PEFT's ``hotswap_adapter`` and
``reset_lora_parameters``, or ``nn.init`` on a factor.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

_ALIASES = (Tensor.data.__get__, Tensor.detach)  # type: ignore[attr-defined]
_WRITING = (Tensor.__setitem__, Tensor.__delitem__)  # type: ignore[attr-defined]


class MadeFactorError(RuntimeError):
    """Something has tried to write to a factor that is made of others. The message says what to do instead."""


class MadeFactor(Tensor):
    """A tensor that refuses what changes a tensor. What is computed from it are ordinary tensors."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse functions that write, and hand out aliases of the same kind.

        Args:
            func: the function.
            types: not used.
            args: its arguments.
            kwargs: its keyword arguments.

        Raises:
            MadeFactorError: the function writes.
        """
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        writes = (name.endswith("_") and not name.endswith("__")) or func in _WRITING or name == "__set__"
        written = args[:1] or tuple(kwargs.values())  # torch.nn.init gives them by name
        if (writes and isinstance(written[0], (cls, list, tuple))) or isinstance(kwargs.get("out"), cls):
            _refuse()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if func in _ALIASES:
            return result.as_subclass(cls)
        return result.as_subclass(Tensor) if isinstance(result, cls) else result

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to replace data, gradient or class.

        Args:
            name: the attribute.
            value: its new value.

        Raises:
            MadeFactorError: always.
        """
        _refuse()


def _refuse() -> NoReturn:
    raise MadeFactorError(
        "lora_A.weight and lora_B.weight of an adapter with block signs are made of its trained factors, and can't be "
        "written to: change lora_A.NAME.factor and lora_B.NAME.factor, or load a state dict"
    )
