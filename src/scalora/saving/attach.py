"""Keeps uses of an adapter that assume the original base weights from being silently wrong.

Once ScaLoRA is attached, the adapter alone is not the update: the remainder belongs to it. With a factored remainder
the base is untouched, so saving writes the whole update as an ordinary adapter and everything else works as ever. With
a dense one the base itself changes: saving writes a state that only scalora reads, and what needs the original base
raises.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
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
from scalora.saving.state import base_fingerprint, gather
from scalora.saving.state_file import STATE_FILE, write_state

_NEEDS_THE_BASE = {
    "disable_adapter": "would give the changed base, not the original model: set merge='factored', or give a trainer "
    "that needs a reference model (DPO, KTO, GRPO) a separate ref_model",
    "unload": "would give the changed base, not the original model: reload that instead",
    "push_to_hub": "would upload the adapter alone, which is wrong on any other copy of the base: push "
    "model.merge_and_unload(), or what `scalora export` makes",
}


class ChangedBaseError(RuntimeError):
    """Something needs the original base weights, and ScaLoRA has changed them; the message says what to do."""


@dataclass
class Attachment:
    """What a model that ScaLoRA works on remembers, from one engine to the next.

    Attributes:
        fingerprint: of the base before the first change.
        config: of the engine that was attached last; None before the first.
        step: optimizer steps that this engine has seen.
    """

    fingerprint: str
    config: ScaLoraConfig | None = None
    step: int = 0
    _rescales: int = 0
    _skipped: Tensor | int = 0

    @property
    def rescales(self) -> int:
        """How often it has rescaled. Waits for the device if a GradScaler may have skipped steps."""
        return self._rescales - int(self._skipped)

    def count_rescale(self, skipped: Tensor | None) -> None:
        """Count one, without waiting for the device to know whether the optimizer skips the step."""
        self._rescales += 1
        if skipped is not None:
            self._skipped = self._skipped + skipped.bool()

    def restart(self, *, step: int, rescales: int) -> None:
        """Count from here."""
        self.step, self._rescales, self._skipped = step, rescales, 0


def attachment_of(model: nn.Module) -> Attachment | None:
    """What the model remembers; None if nothing of ScaLoRA has touched it."""
    return getattr(model, "_scalora", None)


def fingerprint_of(model: nn.Module) -> str:
    """`base_fingerprint` of a model as it was before ScaLoRA changed its base."""
    attachment = attachment_of(model)
    return attachment.fingerprint if attachment else base_fingerprint(model)


def attach(model: nn.Module, merge: Merge, remainder_rank: int) -> tuple[list[LoraPair], Attachment]:
    """Find the LoRA pairs, give each a place for its remainder, and see to it that saving is right from now on.

    Raises:
        UnsupportedLayerError: as `find_lora_pairs` and `place_remainders`; the model is as it was.
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
    """The whole trained state of a model: every tensor that training changes, and what they are changes to."""
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
    """What `save_pretrained` of an attached model does.

    Always writes the whole state (`scalora_state.safetensors`), from which training goes on exactly and from which
    `scalora export` makes the other forms. With a factored remainder it also writes the whole update as an ordinary
    adapter. With a dense one the adapter file is a placeholder that PEFT refuses to load: the Trainer looks for a file
    of that name before it resumes, and nobody must take it for the update.
    """
    if not settings.get("is_main_process", True):
        return
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"Provided path ({folder}) should be a directory, not a file")
    folder.mkdir(parents=True, exist_ok=True)
    pairs = find_lora_pairs(model)
    if isinstance(pairs[0].remainder, FactoredRemainder):
        write_adapter(model, pairs, folder)
    else:
        first = pairs[0]
        empty = {f"{first.name}.lora_A.weight": torch.empty(0, first.lora_A.shape[1])}
        note = "the update of a ScaLoRA run is in scalora_state.safetensors; `scalora export` makes an adapter of it"
        with atomic_write(folder / SAFETENSORS_WEIGHTS_NAME) as temporary:
            save_file(empty, temporary, metadata={"format": "pt", "scalora": note})
    write_state(folder / STATE_FILE, state_of(model, pairs))


def _refuse(method: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ChangedBaseError(
        f"ScaLoRA merges part of the update into the base weights: {method} {_NEEDS_THE_BASE[method]}"
    )


def _replace(model: nn.Module, method: str, by: Callable[..., Any]) -> None:
    if hasattr(model, method):
        object.__setattr__(model, method, by)
