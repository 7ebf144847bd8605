"""ScaLoRA and the methods it is compared with, by their names in a config's ``method``.

To add a rival, add a file with a subclass of `scalora.rivals.method.Method`, and a line below. May import everything
below `scalora.runs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scalora.rivals.method import Method

_CLASSES = {
    "scalora": "scalora.ScaLoraMethod",
    "lora": "method.Method",
    "full": "full_weights.Full",
    # LoRA with another scaling, optimizer, form or start.
    "rslora": "from_peft.RsLora",
    "loraplus": "from_peft.LoraPlus",
    "dora": "from_peft.Dora",
    "pissa": "from_peft.Pissa",
    "lora_ga": "from_peft.LoraGa",
    "hira": "from_peft.Hira",
    "gralora": "from_peft.Gralora",
    "mora": "mora.Mora",
    "signed": "signed.Signed",
    "block_signs": "block_signs.BlockSigns",
    "riemannian": "from_peft.Riemannian",
    "reflora": "reflora.RefLora",
    "reflora_s": "reflora.RefLoraS",
    "lora_rite": "lora_rite.LoraRite",
    "lora_pro": "lora_pro.LoraPro",
    # High rank by merging, or by training the base's weights with low-rank moments.
    "relora": "relora.ReLora",
    "galore": "full_weights.GaLore",
    "apollo": "apollo.Apollo",
    # ScaLoRA with one thing replaced.
    "normalised_columns": "controls.NormalisedColumns",
    "no_transport": "controls.NoTransport",
    "lora_ga_restart": "controls.LoraGaRestart",
}


class _Methods(Mapping[str, "type[Method]"]):
    """Imports a method's class when it is looked up, so that names can be checked without loading torch."""

    def __getitem__(self, name: str) -> type[Method]:
        module, cls = home_of(name)
        found: type[Method] = getattr(import_module(module), cls)
        return found

    def __contains__(self, name: object) -> bool:
        return name in _CLASSES

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


METHODS: Mapping[str, type[Method]] = _Methods()
"""Class of each method, by name."""


def home_of(name: str) -> tuple[str, str]:
    """The module and the class that implement a method.

    Args:
        name: a key of `METHODS`.
    """
    module, _, cls = _CLASSES[name].rpartition(".")
    return f"{__name__}.{module}", cls
