"""Attaches remainders to a model, and guards against uses that assume the original base (paper, section 6).

With ScaLoRA the adapter alone is not the whole update: the remainder belongs to it. With a factored remainder the base
is unchanged, so saving writes the whole update as an ordinary adapter, and everything else works as usual. With a dense
remainder the base itself changes: saving writes a state that only scalora reads, and methods that need the original
base raise an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from scalora.config import Merge, ScaLoraConfig
from scalora.model.adapters import LoraPair, find_lora_pairs
from scalora.model.placement import place_remainders
from scalora.parallel.data_parallel import keep_out_of_broadcasts
from scalora.rescale.remainder import FactoredRemainder
from scalora.saving.files import atomic_write
from scalora.saving.ordinary_adapter import write_adapter
from scalora.saving.readme import write_readme
from scalora.saving.state import base_fingerprint, gather
from scalora.saving.state_file import STATE_FILE, write_state

_NEEDS_THE_BASE = {
    "disable_adapter": "would give the changed base, not the original model: set merge='factored', or pass a separate "
    "ref_model to a trainer that needs a reference model (DPO, KTO, GRPO)",
    "unload": "would return the changed base, not the original model: load the original again instead",
    "push_to_hub": "would upload the adapter alone, which is wrong on any other copy of the base: push the result of "
    "model.merge_and_unload() or of `scalora export` instead",
}


_NOT_AN_ADAPTER = (
    "a ScaLoRA state, not a PEFT adapter: make one with scalora.export_adapter(base, folder, output), see README.md in "
    "this folder"
)


class ChangedBaseError(RuntimeError):
    """A method needs the original base weights, which ScaLoRA has changed. The message says what to do instead."""


@dataclass
class Attachment:
    """What ScaLoRA keeps on a model, from one engine to the next.

    Attributes:
        fingerprint: fingerprint of the base before it was first changed.
        config: settings of the engine that was attached last; None before the first.
        step: number of optimizer steps of the run.
    """

    fingerprint: str
    config: ScaLoraConfig | None = None
    step: int = 0
    _rescales: int = 0
    _skipped: Tensor | int = 0

    @property
    def rescales(self) -> int:
        """Number of rescales of the run. Waits for the device if GradScaler is in use."""
        return self._rescales - int(self._skipped)

    def count_rescale(self, skipped: Tensor | None) -> None:
        """Count a rescale, without waiting for the device.

        Args:
            skipped: a scalar that is positive if the optimizer skips the step; None if it can't.
        """
        self._rescales += 1
        if skipped is not None:
            self._skipped = self._skipped + skipped.bool()

    def restart(self, *, step: int, rescales: int) -> None:
        """Set the counts.

        Args:
            step: number of optimizer steps.
            rescales: number of rescales.
        """
        self.step, self._rescales, self._skipped = step, rescales, 0


def attachment_of(model: nn.Module) -> Attachment | None:
    """What ScaLoRA keeps on a model; None if it has never been attached.

    Args:
        model: the model.
    """
    return getattr(model, "_scalora", None)


def fingerprint_of(model: nn.Module) -> str:
    """The fingerprint of a model's base, as it was before ScaLoRA changed it.

    Args:
        model: a model with PEFT layers, with or without ScaLoRA attached.
    """
    attachment = attachment_of(model)
    return attachment.fingerprint if attachment else base_fingerprint(model)


def attach(model: nn.Module, merge: Merge, remainder_rank: int) -> tuple[list[LoraPair], Attachment]:
    """Find the LoRA pairs of a model, attach their remainders, and replace the methods that would now be wrong.

    Args:
        model: a model with PEFT LoRA layers; modified.
        merge: kind of the remainders: ``"dense"``, ``"factored"``, or ``"auto"`` to choose by the base weights.
        remainder_rank: the most columns that a compression of a factored remainder keeps.

    Returns:
        The pairs, and what ScaLoRA keeps on the model.

    Raises:
        UnsupportedLayerError: a module is not supported; the message names it. The model has not been changed then.
    """
    pairs = find_lora_pairs(model)
    attachment = attachment_of(model)
    fingerprint = fingerprint_of(model)
    place_remainders(pairs, merge, remainder_rank)
    keep_out_of_broadcasts(model)
    if attachment is None:
        attachment = Attachment(fingerprint)
        object.__setattr__(model, "_scalora", attachment)
        _replace(model, "save_pretrained", partial(_save_pretrained, model))
        if not isinstance(pairs[0].remainder, FactoredRemainder):
            for method in _NEEDS_THE_BASE:
                _replace(model, method, partial(_refuse, method))
    return pairs, attachment


def state_of(model: nn.Module, pairs: list[LoraPair]) -> dict[str, Any]:
    """The state of a model with ScaLoRA attached: every trained tensor, and which base they belong to.

    Args:
        model: the model.
        pairs: its LoRA pairs.

    Returns:
        A tree of dicts, numbers, strings and tensors, which are not copied.
    """
    attachment = attachment_of(model)
    assert attachment is not None
    adapter = getattr(model, "peft_config", {}).get(pairs[0].adapter)
    return {
        "base": attachment.fingerprint,
        "adapter": json.loads(json.dumps(adapter.to_dict(), default=_plain)) if adapter is not None else None,
        "merge": "factored" if isinstance(pairs[0].remainder, FactoredRemainder) else "dense",
        "config": attachment.config.to_dict() if attachment.config else None,
        "step": attachment.step,
        "rescales": attachment.rescales,
        "tensors": gather(model, pairs),
    }


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", str(value))


def _save_pretrained(model: nn.Module, save_directory: str | Path, **settings: Any) -> None:
    """Replaces `save_pretrained` of a model with ScaLoRA attached.

    Writes the whole state (`scalora_state.safetensors`), from which training can continue exactly and `scalora export`
    makes the other forms. With a factored remainder, also writes the whole update as an ordinary adapter. With a dense
    one, it writes a README and placeholders for the adapter's files, which PEFT refuses to load.
    """
    if not settings.get("is_main_process", True):
        return
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file: choose a folder to save the model in")
    folder.mkdir(parents=True, exist_ok=True)
    pairs = find_lora_pairs(model)
    state = state_of(model, pairs)
    if isinstance(pairs[0].remainder, FactoredRemainder):
        write_adapter(model, pairs, folder)
    else:
        _write_placeholders(pairs[0], folder)
        write_readme(folder, state)
    write_state(folder / STATE_FILE, state)


def _write_placeholders(pair: LoraPair, folder: Path) -> None:
    """Write adapter files that nothing loads, and whose errors say what to do instead.

    The Trainer looks for a weights file of this name before it resumes. PEFT and Transformers show the peft_type, or
    the base model's name, in the error that they raise for it.
    """
    config = {"peft_type": _NOT_AN_ADAPTER, "base_model_name_or_path": _NOT_AN_ADAPTER}
    with atomic_write(folder / PEFT_CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(config, indent=2), encoding="utf-8")
    empty = {f"{pair.name}.lora_A.weight": torch.empty(0, pair.n)}
    with atomic_write(folder / SAFETENSORS_WEIGHTS_NAME) as temporary:
        save_file(empty, temporary, metadata={"format": "pt", "scalora": _NOT_AN_ADAPTER})


def _refuse(method: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ChangedBaseError(
        f"ScaLoRA has merged part of the update into the base weights: {method} {_NEEDS_THE_BASE[method]}"
    )


def _replace(model: nn.Module, method: str, by: Callable[..., Any]) -> None:
    if hasattr(model, method):
        object.__setattr__(model, method, by)
