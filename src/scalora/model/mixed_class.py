"""Gives single objects a subclass of their own class, as `torch.nn.utils.parametrize` does.

Unlike methods that are replaced on an object, a class is kept by copies, and whoever reaches the object calls it.
"""

from __future__ import annotations

from typing import Any

_MIXED: dict[tuple[type, type], type] = {}


class MixedIn:
    """Base of the classes that are mixed in."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the two classes that are mixed, because the mixture has no importable name."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _empty, type(self).__bases__, *reduced[2:]


def mix_in(obj: object, mixin: type) -> None:
    """Put the methods of a class before those of an object.

    Args:
        obj: the object; modified. Its class must have no ``__slots__``.
        mixin: the class, a `MixedIn`.
    """
    obj.__class__ = _mixed(mixin, type(obj))


def plain_class(obj: object) -> type:
    """The class that an object had before `mix_in` and FSDP2, which does the same, or has.

    Args:
        obj: the object.
    """
    kind = type(obj)
    while len(kind.__bases__) == 2 and (issubclass(kind.__bases__[0], MixedIn) or _is_of_fsdp(kind.__bases__[0])):
        kind = kind.__bases__[1]
    return kind


def _is_of_fsdp(kind: type) -> bool:
    # By name, because torch.distributed is not imported for this (checked with torch 2.13).
    return kind.__name__ == "FSDPModule"


def _mixed(mixin: type, plain: type) -> type:
    if (kind := _MIXED.get((mixin, plain))) is None:
        kind = _MIXED[mixin, plain] = type(plain.__name__, (mixin, plain), {"__doc__": plain.__doc__})
    return kind


def _empty(mixin: type, plain: type) -> object:
    kind: Any = _mixed(mixin, plain)
    return kind.__new__(kind)
