"""`SavedFolder`: a folder in which a Trainer, or ``save_pretrained``, has saved a model with ScaLoRA attached."""

from __future__ import annotations

import json
import re
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from scalora.runs.claim import is_run_folder
from scalora.runs.errors import InputError
from scalora.runs.finished_run import FinishedRun
from scalora.runs.models import Source, load_base, load_tokenizer, resolve_source
from scalora.runs.settings import Settings, run_settings
from scalora.saving.base_name import loadable_name
from scalora.saving.checkpoints import WRITTEN_LAST
from scalora.saving.errors import StateError
from scalora.saving.loading import convert_as
from scalora.saving.state import check_content
from scalora.saving.state_file import STATE_FILE, check_state, holds_any_state, holds_state, read_state, states_below

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

# What an export is compared on are logits for token ids, which models of these kinds have.
_KINDS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")

_NAMED = 3  # folders that an error names


def opened(
    path: Path, *, base: str | None = None, dtype: str | None = None, quantization: str | None = None
) -> FinishedRun | SavedFolder:
    """The result in a folder: that of a run, or what a Trainer or ``save_pretrained`` has saved.

    Args:
        path: a run folder, a Trainer's output folder, a checkpoint of either, or the folder of a saved model.
        base: where to load the base from. None: where the run loaded it.
        dtype: the dtype in which to load the base. None: that of the run.
        quantization: ``"nf4"`` or ``"int8"``, how to quantise the base. None: as in the run.

    Raises:
        InputError: there is no such folder, it has no state of ScaLoRA, the base is unknown, or an option is not for
            this kind of folder.
    """
    if not path.is_dir():
        raise InputError(f"run {str(path)!r} {'is not a folder' if path.exists() else 'does not exist'}")
    if not _belongs_to_run(path):
        return SavedFolder(path, base=base, dtype=dtype, quantization=quantization)
    for option, value in (("--base-dtype", dtype), ("--quantization", quantization)):
        if value is not None:
            raise InputError(
                f"{option} {value}: the run in {str(path)!r} says itself how it loaded its base; leave it out"
            )
    return FinishedRun(path, base)


def dtype_on_disk(source: Source, *, trust_remote_code: bool = False) -> str:
    """The dtype that Transformers loads a model in if nobody says otherwise.

    Args:
        source: the model.
        trust_remote_code: whether its config may be code that comes with it. Not by default: whose it is must be said.

    Raises:
        InputError: its config can't be read.
    """
    try:
        config = AutoConfig.from_pretrained(source.name, trust_remote_code=trust_remote_code, **source.arguments)
    except (OSError, ValueError) as error:
        raise InputError(f"model {source.name!r} can't be loaded: {error}") from None
    return str(config.dtype or torch.float32).removeprefix("torch.")


class SavedFolder:
    """The state in a folder, and the models that belong to it.

    Args:
        path: a Trainer's output folder, whose last whole checkpoint is taken unless it holds a state itself, a
            checkpoint, or a folder that ``save_pretrained`` has written.
        base: where to load the base from. None: the name in the state.
        dtype: the dtype in which to load the base. None: that in the state.
        quantization: how to quantise the base. None: as the state says.

    Attributes:
        path: the path given.
        folder: the folder beside whose files exports are written: of a checkpoint, the folder that it is in.
        state: the folder of the state.
        settings: the settings of a run that would have loaded the same base.

    Raises:
        InputError: there is no state, there are several, or the base is unknown.
        StateError: the state is damaged.
    """

    labels: list[str] | None = None

    def __init__(
        self, path: Path, *, base: str | None = None, dtype: str | None = None, quantization: str | None = None
    ) -> None:
        self.path = path
        self.state = _state_folder(path)
        self.folder = path.absolute().parent if _CHECKPOINT.fullmatch(path.name) else path
        state = read_state(self.state)
        check_content(state)
        self._loading: dict[str, Any] | None = None if dtype or quantization else state.get("loading")
        name = base or _named_base(self.path, (state["adapter"] or {}).get("base_model_name_or_path"))
        self.source: Source = resolve_source(name)
        if dtype is None:
            dtype = _dtype(self._loading, state["tensors"]) or dtype_on_disk(self.source)
        self.settings = Settings(model=name, dtype=dtype, quantization=quantization)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer saved with the state, else that of the base; None if neither has one."""
        for folder in (self.state, self.path):
            if (folder / TOKENIZER_CONFIG_FILE).is_file():
                return load_tokenizer(Source(str(folder), None), self.settings)
        try:
            return load_tokenizer(self.source, self.settings)
        except InputError:
            warnings.warn("neither the folder nor its base has a tokenizer: the export has none either", stacklevel=2)
            return None

    def load(self) -> PreTrainedModel:
        """Load the base as it was loaded in training.

        Raises:
            InputError: the base can't be loaded.
            StateError: what the state says of the loading is damaged.
        """
        if self._loading is None:
            return load_base(self.source, self.settings, self.tokenizer, None)
        try:
            arguments, dtypes = _arguments(self._loading), dict(self._loading["dtypes"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"the state is damaged: its 'loading' can't be used ({error!r})") from None
        model = self._from_pretrained(self.source, arguments | self.source.arguments)
        if self.source.gguf_file and model.hf_quantizer is not None:
            # The weights are plain tensors now; a model marked as quantised could neither be trained nor saved.
            model.hf_quantizer.remove_quantization_config(model)
        convert_as(model, dtypes)
        if model.config.get_text_config().pad_token_id is None and self.tokenizer is not None:
            model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return model

    def load_merged(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        """Load an exported model.

        Args:
            folder: the folder of the model.
            dtype: dtype of its weights.

        Raises:
            InputError: the model can't be loaded.
        """
        return self._from_pretrained(Source(str(folder), None), {"dtype": dtype})

    def _from_pretrained(self, source: Source, arguments: dict[str, Any]) -> PreTrainedModel:
        name = "AutoModelForCausalLM" if self._loading is None else str(self._loading["class"])
        cls = getattr(transformers, name, None)
        if not name.endswith(_KINDS) or cls is None:
            raise InputError(
                f"{str(self.path)!r} is the state of a {name}, which this command can't load: use "
                "scalora.export_adapter(base, folder, output) or scalora.export_merged from Python"
            )
        try:
            model: PreTrainedModel = cls.from_pretrained(source.name, **arguments)
        except Exception as error:  # whatever Transformers, safetensors or torch raise about the files
            raise InputError(f"model {source.name!r} can't be loaded: {type(error).__name__}: {error}") from None
        return model


def _belongs_to_run(path: Path) -> bool:
    """Whether a folder is that of a run of `scalora train`, or lies in one as a run's checkpoints and states do."""
    if path.is_dir() and is_run_folder(path):
        return True
    in_run = path.resolve().parents[:2]
    for folder in (path, *in_run):
        if not (folder / "config.yaml").is_file():
            continue
        try:
            run_settings(folder)
        except InputError:
            # Somebody's own config.yaml beside a Trainer's output, unless there is nothing else that it could be.
            if folder == path and not holds_any_state(path):
                raise
            continue
        return folder == path or holds_any_state(path) or _CHECKPOINT.fullmatch(path.name) is not None
    return (path / "config.yaml").is_file() and not holds_any_state(path)


def _state_folder(path: Path) -> Path:
    """The folder of the state that a folder holds: itself, or its last whole checkpoint."""
    if holds_state(path):
        check_state(path)
        return path
    found = {int(m[1]): folder for folder in path.iterdir() if (m := _CHECKPOINT.fullmatch(folder.name))}
    for step in sorted(found, reverse=True):
        flaw = _flaw(found[step])
        if flaw is None:
            return found[step]
        warnings.warn(f"checkpoint {str(found[step])!r} is skipped: {flaw}", stacklevel=2)
    if found:
        raise InputError(f"{str(path)!r} holds no whole checkpoint with a {STATE_FILE}")
    inside = sorted(
        states_below(path, "*") | {checkpoint.parent for checkpoint in states_below(path, "*/checkpoint-*")}
    )
    if inside:
        names = ", ".join(repr(folder.name) for folder in inside[:_NAMED]) + (", …" if len(inside) > _NAMED else "")
        raise InputError(f"{str(path)!r} holds no {STATE_FILE} itself, but its folders do: give one of {names}")
    ordinary = (
        "; its adapter is an ordinary one, which needs no export" if (path / "adapter_config.json").exists() else ""
    )
    raise InputError(
        f"{str(path)!r} holds neither a run's config.yaml nor a {STATE_FILE}, in itself or in a checkpoint-N: give the "
        f"folder of a run, of a Trainer with ScaLoRA attached, or of its model.save_pretrained{ordinary}"
    )


def _flaw(folder: Path) -> str | None:
    """Why a checkpoint is not whole, as far as an export is concerned; None if it is."""
    try:
        json.loads((folder / WRITTEN_LAST).read_text(encoding="utf-8"))
        check_state(folder)
    except OSError:
        return f"it has no {WRITTEN_LAST}: it was cut off while it was written"
    except StateError as error:
        return str(error)
    except ValueError:
        return f"its {WRITTEN_LAST} is cut short"
    return None


def _named_base(path: Path, name: Any) -> str:
    """The base that a state names, if that is a name that can be loaded."""
    found = loadable_name(name) if isinstance(name, str) else None
    if found is None:
        what = f"names {name!r} as its base, where there is no model" if name else "does not name its base"
        raise InputError(f"the state in {str(path)!r} {what}: give the base with --base (hub id, folder or GGUF file)")
    return found


def _dtype(loading: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> str | None:
    """The dtype of the base that a state was trained on, where the state says it."""
    if loading is not None:
        return str(loading.get("dtype"))
    weights = (tensor for name, tensor in tensors.items() if name.startswith("weight."))
    weight = next(weights, None)
    return None if weight is None else str(weight.dtype).removeprefix("torch.")


def _arguments(loading: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained` that load a base as a state says it was loaded."""
    dtype = getattr(torch, loading["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{loading['dtype']!r} is no dtype")
    arguments: dict[str, Any] = {"dtype": dtype}
    if loading["quantization"] is not None:
        arguments["quantization_config"] = AutoQuantizationConfig.from_dict(loading["quantization"])
    if (head := loading["head"]) is not None:
        names = {int(index): name for index, name in head["id2label"].items()}
        arguments |= {"id2label": names, "label2id": head["label2id"], "num_labels": head["num_labels"]}
        # A head that is trained is in the state; the base may have one for other classes.
        arguments |= {"problem_type": head["problem_type"], "ignore_mismatched_sizes": True}
    return arguments
