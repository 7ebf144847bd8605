"""What a run leaves behind in its folder: the trained model, adapter and state, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from scalora.engine import ScaLora
from scalora.model.adapters import LoraPair, find_lora_pairs
from scalora.model.layers import plain_name
from scalora.parallel.job import is_first
from scalora.parallel.shards import wholes_for
from scalora.parallel.zero import run_of_weight
from scalora.rescale.remainder import FactoredRemainder
from scalora.rivals.scalora import ScaLoraMethod
from scalora.runs.base_names import named_base
from scalora.runs.models import save_tokenizer
from scalora.runs.prepare import PreparedRun
from scalora.runs.special_tokens import adopt_special_tokens, save_text_settings
from scalora.saving.base_name import base_name, write_base_name
from scalora.saving.export import load_model
from scalora.saving.files import atomic_folder
from scalora.saving.merged_model import write_model
from scalora.saving.model_state import state_of
from scalora.saving.ordinary_adapter import write_adapter
from scalora.saving.readme import write_readme
from scalora.saving.state_file import STATE_FILE, read_state, write_state


def result_names(run: PreparedRun, *, factored: bool) -> list[str]:
    """The folders that a run writes at its end.

    ``delta`` is the exact state of a ScaLoRA run, for `scalora export`. ``adapter`` is an ordinary adapter, where it
    costs nothing: of a method that leaves the base unchanged, and of a factored remainder. ``model`` is the merged
    model; a quantised base can't take the update.

    Args:
        run: the run.
        factored: whether ScaLoRA keeps a factored remainder.
    """
    if not run.settings.save_model:
        return []
    names = []
    if isinstance(run.method, ScaLoraMethod):
        names += ["delta", "adapter"] if factored else ["delta"]
    elif run.peft_config is not None and run.method.ordinary_adapter:
        names.append("adapter")
    if run.settings.quantization is None:
        names.append("model")
    return names


def write_results(run: PreparedRun, model: Any, folder: Path) -> None:
    """Write the folders named by `result_names`, each whole or not at all.

    Args:
        run: the run.
        model: the trained model.
        folder: the run folder.
    """
    pairs = find_lora_pairs(model, all_shapes=True) if isinstance(run.method, ScaLoraMethod) else []
    _write(run, model, pairs, folder, result_names(run, factored=_is_factored(pairs)))


def write_results_of_shards(
    run: PreparedRun, model: Any, engine: ScaLora, folder: Path, load_base: Callable[[], PreTrainedModel]
) -> None:
    """The same for a model of which each process has shards: all take part in the state, the first writes the rest.

    What is made of the state needs the whole model in the first process's memory, once all shards are on the disk.

    Args:
        run: the run, of ScaLoRA.
        model: the trained model, of which this process has shards.
        engine: what has trained the model.
        folder: the run folder.
        load_base: loads the base as training did.
    """
    names = result_names(run, factored=_is_factored(engine.pairs))
    if not names:
        return
    target = folder / "delta"
    if not is_first():
        engine.save(target, resumable=False)
        return
    with atomic_folder(target, replace=True) as temporary:
        engine.save(temporary, resumable=False)
        write_readme(temporary, read_state(temporary))
        save_text_settings(model.get_base_model(), run.tokenizer, temporary)
    base = load_base()
    adopt_special_tokens(base, run.tokenizer)
    whole = load_model(base, target)
    _write(run, whole, find_lora_pairs(whole, all_shapes=True), folder, [name for name in names if name != "delta"])


def write_adapter_of_shards(
    run: PreparedRun, model: nn.Module, folder: Path, load_base: Callable[[], PreTrainedModel]
) -> None:
    """The same for a model of which each process has shards, and that some method has adapted which leaves the base.

    All processes take part in what is trained, the first writes. That needs the whole model in its memory.

    Args:
        run: the run.
        model: the trained model, of which this process has shards.
        folder: the run folder.
        load_base: loads the base as training did.
    """
    if not (names := result_names(run, factored=False)):
        return
    parts = {plain_name(name): run_of_weight(p) or p for name, p in model.named_parameters() if p.requires_grad}
    trained = wholes_for(parts, keep=is_first())
    if not is_first():
        return
    base = load_base()
    adopt_special_tokens(base, run.tokenizer)
    whole = run.method.adapt(base, run.peft_config, _no_gradients, run.arguments.learning_rate)
    parameters = dict(whole.named_parameters())
    with torch.no_grad():
        for name, value in trained.items():
            parameters[name].copy_(value)
    _write(run, whole, [], folder, names)


def _no_gradients(model: nn.Module) -> None:
    raise AssertionError("what is written from shards starts without gradients")


def _is_factored(pairs: Sequence[LoraPair]) -> bool:
    return bool(pairs) and isinstance(pairs[0].remainder, FactoredRemainder)


def _write(run: PreparedRun, model: Any, pairs: list[LoraPair], folder: Path, names: list[str]) -> None:
    factored = _is_factored(pairs)

    def write_delta(target: Path) -> None:
        state = state_of(model, pairs)
        write_state(target / STATE_FILE, state)
        write_readme(target, state)
        save_text_settings(model.get_base_model(), run.tokenizer, target)

    def write_ordinary_adapter(target: Path) -> None:
        if factored:
            write_adapter(model, pairs, target)
        else:
            model.save_pretrained(target)
        base, note = named_base(run.source)
        write_base_name(target, base or base_name(model, model.active_adapter), note)
        save_text_settings(model.get_base_model(), run.tokenizer, target)

    def write_merged(target: Path) -> None:
        write_model(cast("PreTrainedModel", run.method.merged(model)), target)
        save_tokenizer(run.tokenizer, target)

    writers: dict[str, Callable[[Path], None]] = {
        "delta": write_delta,
        "adapter": write_ordinary_adapter,
        "model": write_merged,
    }
    for name in names:
        with atomic_folder(folder / name, replace=True) as target:  # a resumed run's own, from before
            writers[name](target)
