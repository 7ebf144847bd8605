"""A tensor that is made of others each time that it is asked for: to read, and not to write to.

Whoever wrote to it would change nothing, and hear nothing of it: PEFT's ``hotswap_adapter`` and
``reset_lora_parameters``, or ``nn.init`` on a factor.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor

_WRITING = (Tensor.__setitem__, Tensor.__delitem__)  # type: ignore[attr-defined]


class MadeFactorError(RuntimeError):
    """Something has tried to write to a factor that is made of others. The message says what to do instead."""


class MadeFactor(Tensor):
    """A tensor that refuses what changes a tensor, as do its views. What else is computed from it are ordinary tensors.

    Copies and pickles of it are ordinary tensors, too.
    """

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
            refuse_to_write()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            made = written[0] if isinstance(written[0], cls) else None
            if isinstance(result, (tuple, list)):  # chunks
                return type(result)(cls._as_own_kind(part, made) for part in result)
            return cls._as_own_kind(result, made)

    @classmethod
    def _as_own_kind(cls, result: Any, made: MadeFactor | None) -> Any:
        if not isinstance(result, Tensor):
            return result
        alias = made is not None and torch._C._is_alias_of(result, made)  # type: ignore[attr-defined]
        return result.as_subclass(cls if alias else Tensor)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to replace data, gradient or class.

        Args:
            name: the attribute.
            value: its new value.

        Raises:
            MadeFactorError: always.
        """
        refuse_to_write()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """An ordinary tensor.

        Args:
            memo: of `copy.deepcopy`.
        """
        return copy.deepcopy(self._ordinary, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as an ordinary tensor, which `torch.load` takes without trusting the file.

        Args:
            protocol: of `pickle`.
        """
        return self._ordinary.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @property
    def _ordinary(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)


def refuse_to_write() -> NoReturn:
    """Say that a made factor can't be written to, and what can.

    Raises:
        MadeFactorError: always.
    """
    raise MadeFactorError(
        "lora_A.weight and lora_B.weight of an adapter with block signs are made of its trained factors, and can't be "
        "written to: change lora_A.NAME.factor and lora_B.NAME.factor, or load a state dict"
    )
