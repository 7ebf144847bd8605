"""`load_scored`: a causal language model to be scored, whatever its weights are kept in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from scalora._version import __version__
from scalora.runs.errors import InputError
from scalora.runs.finished_run import FinishedRun
from scalora.runs.models import (
    Source,
    fingerprint,
    fingerprint_of_files,
    load_causal_model,
    load_tokenizer,
    resolve_source,
    weight_files,
)
from scalora.runs.saved_folder import dtype_on_disk, opened
from scalora.runs.settings import Settings, load_settings, overridden
from scalora.runs.special_tokens import adopt_special_tokens
from scalora.saving.base_name import loadable_name
from scalora.saving.checkpoints import WRITTEN_LAST
from scalora.saving.export import load_model
from scalora.saving.state_file import SHARDED_STATE, holds_any_state

_ADAPTER = "adapter_config.json"


def settings_of_model(
    model: str, config: Path | None, overrides: Sequence[str] = (), options: Sequence[str] = ()
) -> Settings:
    """The settings by which a model is loaded where nothing else of a config is needed.

    Args:
        model: as for `load_scored`.
        config: the config. None: that of the run, if the model is one; else the model is loaded in its own dtype.
        overrides: words of the command line that replace keys, as for `load_settings`.
        options: the options of the command, to suggest for a mistyped key.

    Raises:
        InputError: a key or value is wrong, or the model's own config can't be read.
    """
    path = Path(model).expanduser()
    of_run = path / "config.yaml"
    if config is not None or of_run.is_file():
        return load_settings(config or of_run, overrides, options)
    settings = overridden({"model": model}, overrides, options)
    if "dtype" in settings.model_fields_set or holds_any_state(path):
        return settings
    source = _base_of_adapter(path) if _is_adapter(path) else resolve_source(model)
    dtype = dtype_on_disk(source, trust_remote_code=settings.trust_remote_code)
    return settings.model_copy(update={"dtype": dtype})


class Scored(NamedTuple):
    """A model to be scored.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        weights: identifies its weights.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    weights: str

    def place(self, settings: Settings) -> None:
        """Move the model to the device that computes; one that is quantised has been placed.

        Args:
            settings: the config, of which ``training.use_cpu`` matters.
        """
        if getattr(self.model, "hf_quantizer", None) is None:
            self.model.to(PartialState(cpu=bool(settings.training.get("use_cpu", False))).device)

    def identity(self, settings: Settings) -> str:
        """What outputs depend on, besides what is asked: weights, how they are loaded and used, and the libraries.

        Args:
            settings: the config, of which ``quantization`` matters.
        """
        config = self.model.config
        adapters = {name: adapter.to_dict() for name, adapter in getattr(self.model, "peft_config", {}).items()}
        used = config.to_json_string() + json.dumps(adapters, sort_keys=True, default=_in_order)
        parts = [
            self.weights,
            getattr(config, "_commit_hash", None),  # of a model on the hub, whose name is no hash
            self.model.dtype,
            settings.quantization,
            sha256(used.encode()).hexdigest()[:12],
            __version__,
            *(f"{package} {version(package)}" for package in ("torch", "transformers", "peft")),
        ]
        return "; ".join(map(str, parts))


def load_scored(model: str, settings: Settings) -> Scored:
    """Load a causal language model: a whole one, an adapter on its base, or what a run has changed of its base.

    Of a run folder it is the merged model; of one without, as a run on a quantised base has it, and of a checkpoint,
    the state or the adapter on the base, which is loaded as the run did.

    Args:
        model: run folder, checkpoint, model folder, folder of an ordinary adapter, GGUF file or hub id.
        settings: the config, of which ``dtype``, ``quantization`` and ``trust_remote_code`` matter, and the tokens
            that are set in ``training``.

    Raises:
        InputError: there is no such model, or it or its base can't be loaded.
    """
    path = Path(model).expanduser()
    if _is_adapter(path):
        _refuse_part_of_update(path)
        return _adapter_by_name(path, settings)
    whole = any((folder / "config.json").is_file() for folder in (path, path / "model"))
    if not whole and (holds_any_state(path) or (path / "config.yaml").is_file()):
        run = opened(path)
        adapter = getattr(run, "adapter", None)
        if run.state is not None or adapter is not None:
            return _of_run(run, run.state, adapter)
    source = resolve_source(model)
    tokenizer = load_tokenizer(source, settings)
    return Scored(load_causal_model(source, settings), tokenizer, fingerprint(source))


def _is_adapter(path: Path) -> bool:
    """Whether a folder holds an ordinary adapter, and neither a whole model nor a state."""
    return (path / _ADAPTER).is_file() and not (path / "config.json").is_file() and not holds_any_state(path)


def _refuse_part_of_update(path: Path) -> None:
    """Raise `InputError` if the adapter in a run's checkpoint is not all that the run has changed."""
    if not (path / WRITTEN_LAST).is_file():
        return
    run = opened(path)
    if isinstance(run, FinishedRun) and run.adapter is None:
        raise InputError(
            f"{str(path)!r} is a checkpoint of {run.settings.method!r} without the total update: score the finished run"
        )


def _base_of_adapter(path: Path) -> Source:
    named = PeftConfig.from_pretrained(path).base_model_name_or_path
    name = loadable_name(named)
    if name is None:
        raise InputError(
            f"adapter {str(path)!r} names {named!r} as its base, which is neither a hub id nor a folder with a "
            f"config.json: write the base into base_model_name_or_path of its {_ADAPTER}"
        )
    return resolve_source(name)


def _adapter_by_name(path: Path, settings: Settings) -> Scored:
    """An ordinary adapter on the base that it names."""
    base = _base_of_adapter(path)
    own = (path / TOKENIZER_CONFIG_FILE).is_file()
    tokenizer = load_tokenizer(Source(str(path), None) if own else base, settings)
    model = load_causal_model(base, settings)
    if own:
        adopt_special_tokens(model, tokenizer)
    weights = f"{_identity(path)} on {fingerprint(base)}"
    return Scored(_ready(PeftModel.from_pretrained(model, path)), tokenizer, weights)


def _of_run(run: Any, state: Path | None, adapter: Path | None) -> Scored:
    """The state, or else the adapter, of a run on the base that the run loaded."""
    if run.tokenizer is None:
        raise InputError(f"{str(run.path)!r} and its base have no tokenizer: save one in the folder")
    base = run.load()
    adopt_special_tokens(base, run.tokenizer)
    if state is not None:
        model, folder = load_model(base, state), state
    else:
        assert adapter is not None
        model, folder = PeftModel.from_pretrained(base, adapter), adapter
    return Scored(_ready(model), run.tokenizer, f"{_identity(folder)} on {fingerprint(run.source)}")


def _in_order(value: Any) -> Any:
    """For JSON: a set as a list that is always the same, anything else as it is printed."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _ready(model: PeftModel) -> PeftModel:
    # TRL converts trainable parameters on a quantised base to bfloat16, even if it only evaluates.
    model.requires_grad_(False)
    return model


def _identity(folder: Path) -> str:
    """Identifies the weights of an adapter or a state."""
    return fingerprint_of_files(folder, weight_files(folder) + sorted(folder.glob(f"{SHARDED_STATE}/**/*.safetensors")))
