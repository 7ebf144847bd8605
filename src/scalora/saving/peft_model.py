"""Saving and loading of a PeftModel with remainders (paper, section 6).

With a factored remainder the base is unchanged, so `save_pretrained` writes the whole update as an ordinary adapter.
With a dense remainder the base itself changes: `save_pretrained` writes a state that only scalora reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from scalora.model.adapters import LoraPair, pairs_with_remainders
from scalora.model.mixed_class import MixedIn
from scalora.model.remainder_layer import ChangedBaseError
from scalora.rescale.remainder import FactoredRemainder
from scalora.saving.files import atomic_write
from scalora.saving.model_state import load_into, state_of
from scalora.saving.ordinary_adapter import write_adapter
from scalora.saving.readme import write_readme
from scalora.saving.state_file import STATE_FILE, holds_state, write_state

_NOT_AN_ADAPTER = (
    "a ScaLoRA state, not a PEFT adapter: make one with scalora.export_adapter(base, folder, output), see README.md in "
    "this folder"
)


class ShardedModelError(RuntimeError):
    """One process alone can't save a model whose weights are split over processes. The message says what can."""


class SavesWholeUpdate(MixedIn, PeftModel):  # type: ignore[misc]
    """Mixed into the class of a PeftModel when ScaLoRA is attached."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        """PEFT's `save_pretrained`, and the state from which training continues exactly.

        The state (`scalora_state.safetensors`) is what `scalora.load_model` and `scalora export` read. With a factored
        remainder, the whole update is also written as an ordinary adapter. With a dense one, a README and placeholders
        for the adapter's files are, which PEFT refuses to load. Adapters that ScaLoRA does not train are PEFT's.

        Args:
            save_directory: the folder; created if it does not exist.
            safe_serialization: as in PEFT, for the ordinary adapter.
            selected_adapters: the adapters to save; None for all.
            save_embedding_layers: as in PEFT, for the ordinary adapter.
            is_main_process: whether this process writes.
            path_initial_model_for_weight_conversion: must be None: it is for initialisations that change the base.
            kwargs: as in PEFT. A ``state_dict`` is used for adapters that ScaLoRA does not train.

        Raises:
            ValueError: `save_directory` is a file, an adapter does not exist, or
                `path_initial_model_for_weight_conversion` is given.
            ChangedBaseError: the adapter is merged into a base that ScaLoRA has changed.
            ChangedFactorsError: something other than an optimizer has overwritten the factors.
            ShardedModelError: the weights are split over processes (FSDP2, ZeRO-3).
            OSError: the folder can't be written to.
        """
        pairs = pairs_with_remainders(self)
        trained = pairs[0].adapter
        if path_initial_model_for_weight_conversion is not None:
            raise ValueError(
                "path_initial_model_for_weight_conversion can't be used with ScaLoRA: leave it out, the adapter that "
                "is written is an ordinary one"
            )
        selected = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        if others := [name for name in selected if name != trained]:
            super().save_pretrained(
                save_directory,
                safe_serialization=safe_serialization,
                selected_adapters=others,
                save_embedding_layers=save_embedding_layers,
                is_main_process=is_main_process,
                **kwargs,
            )
        if trained not in selected or not is_main_process:
            return
        by_callback = pairs[0].layer.attachment.saved_by_callback
        if any(pair.is_sharded for pair in pairs) and not by_callback:
            raise ShardedModelError(
                "the model's weights are split over processes, and save_pretrained() has one of them: call "
                "ScaLora.save(folder) in all processes, and make an adapter of it with scalora.export_adapter()"
            )
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{str(folder)!r} is a file: choose a folder to save the model in")
        if by_callback:
            return  # the callback writes the state in all processes
        state = state_of(self, pairs)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(pairs[0].remainder, FactoredRemainder):
            write_adapter(
                self,
                pairs,
                folder,
                safe_serialization=safe_serialization,
                save_embedding_layers=save_embedding_layers,
            )
        else:
            write_placeholders(pairs[0], folder)
            write_readme(folder, state)
        write_state(folder / STATE_FILE, state)

    def load_adapter(self, model_id: str | Path, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """PEFT's `load_adapter`; a ScaLoRA state that is loaded into the trained adapter is restored exactly.

        Args:
            model_id: as in PEFT.
            adapter_name: as in PEFT.
            args: as in PEFT.
            kwargs: as in PEFT.

        Raises:
            StateError: the folder holds a state that is damaged, or of another base model or adapter.
            ChangedBaseError: the adapter belongs to the original base, which ScaLoRA has changed.
        """
        pairs = pairs_with_remainders(self)
        if adapter_name == pairs[0].adapter and (folder := state_beside(model_id, adapter_name)) is not None:
            load_into(self, pairs, folder)
            return None
        return super().load_adapter(model_id, adapter_name, *args, **kwargs)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """PEFT's choice of the active adapter.

        Args:
            adapter_name: the adapter.
            inference_mode: whether it is frozen.

        Raises:
            ChangedBaseError: another adapter belongs to the original base, which ScaLoRA has changed.
        """
        self.base_model.check_set_adapter(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's `push_to_hub`.

        Args:
            args: as in PEFT.
            kwargs: as in PEFT.

        Raises:
            ChangedBaseError: there is no adapter of the original base to upload.
        """
        if not isinstance(pairs_with_remainders(self)[0].remainder, FactoredRemainder):
            raise ChangedBaseError(
                "push_to_hub would upload an adapter that is wrong on any other copy of the base, because ScaLoRA "
                "merges part of the update into it: push the result of model.merge_and_unload() or of `scalora "
                "export` instead, or set merge='factored'"
            )
        return super().push_to_hub(*args, **kwargs)


def state_beside(folder: str | Path, adapter: str) -> Path | None:
    """The folder with the state that belongs to an adapter's folder; None if there is none.

    Args:
        folder: as for PEFT's `load_adapter`: where the adapter was saved, or the folder of its name in it.
        adapter: name of the adapter.
    """
    path = Path(folder)
    if holds_state(path):
        return path
    return path.parent if path.name == adapter and holds_state(path.parent) else None


def write_placeholders(pair: LoraPair, folder: Path) -> None:
    """Write adapter files that nothing loads, and whose errors say what to do instead.

    The Trainer looks for a weights file of this name before it resumes. PEFT and Transformers show the peft_type, or
    the base model's name, in the error that they raise for it.

    Args:
        pair: any layer of the model.
        folder: the folder to write them to.
    """
    config = {"peft_type": _NOT_AN_ADAPTER, "base_model_name_or_path": _NOT_AN_ADAPTER}
    with atomic_write(folder / PEFT_CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(config, indent=2), encoding="utf-8")
    empty = {f"{pair.name}.lora_A.weight": torch.empty(0, pair.n)}
    with atomic_write(folder / SAFETENSORS_WEIGHTS_NAME) as temporary:
        save_file(empty, temporary, metadata={"format": "pt", "scalora": _NOT_AN_ADAPTER})
