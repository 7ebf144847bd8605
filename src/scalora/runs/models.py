"""Loads base models and tokenizers from a hub id, a local folder, a run folder or a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from scalora.runs.errors import InputError
from scalora.runs.model_limits import require_known_padding, vocabulary
from scalora.runs.settings import Settings
from scalora.runs.tasks import WITH_HEAD
from scalora.runs.unfinished import how_to_go_on, is_unfinished
from scalora.saving.state_file import holds_any_state

_NAMED = 3  # parameters that a warning names


class Source(NamedTuple):
    """Where `from_pretrained` finds a model.

    Attributes:
        name: hub id or folder.
        gguf_file: name of the GGUF file in that folder; None for weights in another format.
    """

    name: str
    gguf_file: str | None

    @property
    def arguments(self) -> dict[str, str]:
        """Keyword arguments for `from_pretrained`, in addition to the name."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def resolve_source(model: str) -> Source:
    """Tell hub ids from local paths; of a run folder it is the model in it.

    Args:
        model: hub id, folder of a saved model, run folder, or GGUF file.

    Raises:
        InputError: `model` looks like a local path and does not exist, or the folder holds no model.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"model file {model!r} is not a .gguf file: give the folder of a saved model instead")
        return Source(str(path.parent), path.name)
    if path.is_dir():
        if (path / "model" / "config.json").is_file():
            path = path / "model"
        if (path / "delta").is_dir() and not (path / "config.json").is_file():
            raise InputError(
                f"run {model!r} holds no merged model (a run on a quantised base writes none): make one with "
                f"`scalora export {model} --to merged`, and give that"
            )
        if holds_any_state(path):
            raise InputError(
                f"folder {model!r} holds the state of a model with ScaLoRA, not a model: make one with "
                f"`scalora export {model} --to merged`, and give that"
            )
        if is_unfinished(path):
            raise InputError(f"run {model!r} is no model: {how_to_go_on(path)}")
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {model!r} holds no config.json: it is not a saved model or finished run")
        return Source(str(path), None)
    if model.startswith((".", "/", "~")) or path.suffix == ".gguf" or model.count("/") > 1:
        raise InputError(f"model {model!r} does not exist")
    return Source(model, None)


def load_tokenizer(source: Source, settings: Settings) -> PreTrainedTokenizerBase:
    """Load a tokenizer. One without a padding token gets the end token for padding, as in TRL.

    Args:
        source: the model.
        settings: the run's settings, for ``trust_remote_code``, and the tokens that are set in ``training``.

    Raises:
        InputError: there is no tokenizer, it can't be downloaded or read, or it has no token to pad with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.name, trust_remote_code=settings.trust_remote_code, **source.arguments
        )
    except OSError as error:
        where = "" if Path(source.name).is_dir() else " is not a local folder or file, and downloading it failed"
        raise InputError(f"model {source.name!r}{where}: {error}") from None
    except Exception as error:  # tokenizers raises nothing more specific
        raise InputError(f"the tokenizer of model {source.name!r} can't be read: {error}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_by_trl = settings.training.keys() & {"pad_token", "eos_token"}
    if tokenizer.pad_token is None and not set_by_trl:
        takes_one = settings.task in ("sft", "dpo", "reward")
        way_out = ", or set training.pad_token" if takes_one else ""
        raise InputError(
            f"the tokenizer of model {source.name!r} has no padding token, and no end token to pad with: save one with "
            f"a pad_token{way_out}"
        )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer.

    Args:
        tokenizer: the tokenizer.
        folder: folder to write it to.

    Raises:
        OSError: it can't be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises nothing more specific
        raise OSError(f"the tokenizer can't be written to {str(folder)!r}: {error}") from None


def load_causal_model(source: Source, settings: Settings) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        source: the model.
        settings: the run's settings, for ``dtype``, ``quantization`` and ``trust_remote_code``.

    Raises:
        InputError: it can't be read, a GGUF file can't be quantised again, or bitsandbytes is missing.
    """
    arguments = _common(source, settings)
    with _readable(source):
        model, loading = AutoModelForCausalLM.from_pretrained(
            source.name, **arguments, **source.arguments, output_loading_info=True
        )
    _warn_about_missing(loading["missing_keys"], source)
    if source.gguf_file and model.hf_quantizer is not None:
        # The weights are plain tensors now; a model marked as quantised could neither be trained nor saved.
        model.hf_quantizer.remove_quantization_config(model)
    return model


def load_classifier(
    source: Source,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str] | None,
    *,
    new_head: bool,
) -> PreTrainedModel:
    """Load a sequence classifier, or a model with one output for regression or rewards.

    Args:
        source: the model.
        settings: the run's settings, for ``dtype``, ``quantization`` and ``trust_remote_code``.
        tokenizer: the model's tokenizer, whose padding token the model needs.
        labels: names of the classes in order; None for regression.
        new_head: True: a head that the model lacks, or has for other classes, starts at random. False: it is an error.

    Raises:
        InputError: it can't be read, or it has no such head and `new_head` is False.
    """
    arguments = _common(source, settings)
    with _readable(source):
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            source.name,
            **arguments,
            **source.arguments,
            **_head(labels),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    if not new_head and (loading["missing_keys"] or loading["mismatched_keys"]):
        raise InputError(f"model {source.name!r} has no head for {settings.task} with {model.num_labels} output(s)")
    if (rows := vocabulary(model)) is not None:
        require_known_padding(tokenizer, rows)
    inside = f"{model.base_model_prefix}."
    _warn_about_missing([key for key in loading["missing_keys"] if key.startswith(inside)], source)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def load_base(
    source: Source,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str] | None,
    *,
    new_head: bool = True,
) -> PreTrainedModel:
    """Load the model for the settings' task, with `load_causal_model` or `load_classifier`.

    Args:
        source: the model.
        settings: the run's settings, for ``task``, ``dtype``, ``quantization`` and ``trust_remote_code``.
        tokenizer: the model's tokenizer, whose padding token a classifier needs.
        labels: names of the classes in order; None for other tasks than classification.
        new_head: whether a classifier's head may start at random; False: the model must have it.

    Raises:
        InputError: it can't be read, or it has no head for the task and `new_head` is False.
    """
    if settings.task not in WITH_HEAD:
        return load_causal_model(source, settings)
    return load_classifier(source, settings, tokenizer, labels, new_head=new_head)


def empty_base(
    source: Source, settings: Settings, tokenizer: PreTrainedTokenizerBase, labels: list[str] | None
) -> PreTrainedModel:
    """The model that `load_base` would load, from its config alone: on torch's meta device, without weights.

    Linear layers are never quantised, whatever the settings say.

    Args:
        source: the model.
        settings: the run's settings, for ``task``, ``dtype``, ``quantization`` and ``trust_remote_code``.
        tokenizer: the model's tokenizer, whose padding token a classifier needs.
        labels: names of the classes in order; None for other tasks than classification.

    Raises:
        InputError: no model can be built from the config, it has no embedding for a classifier's padding token, a GGUF
            file can't be quantised again, or bitsandbytes is missing.
    """
    arguments = {key: value for key, value in _common(source, settings).items() if key != "quantization_config"}
    causal = settings.task not in WITH_HEAD
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    head = {} if causal else _head(labels) | {"pad_token_id": tokenizer.pad_token_id}
    config = _config(source, settings, **head)
    if head and (rows := getattr(config.get_text_config(), "vocab_size", None)) is not None:
        require_known_padding(tokenizer, rows)
    with _readable(source), torch.device("meta"):
        model: PreTrainedModel = kind.from_config(config, **arguments)
    # As a model has that Accelerate has placed on a device: no Trainer moves it.
    model.hf_device_map = {"": "meta"}
    return model


def hidden_size(source: Source, settings: Settings) -> int | None:
    """The width of a model; None if its config has no such number.

    Args:
        source: the model.
        settings: the run's settings, for ``trust_remote_code``.

    Raises:
        InputError: there is no readable config.
    """
    width: int | None = getattr(_config(source, settings).get_text_config(), "hidden_size", None)
    return width


def class_names(source: Source, settings: Settings) -> list[str] | None:
    """The classes of a saved classifier in order; None for other tasks.

    Args:
        source: the classifier.
        settings: the run's settings, for ``task`` and ``trust_remote_code``.
    """
    if settings.task != "classification":
        return None
    config = AutoConfig.from_pretrained(source.name, trust_remote_code=settings.trust_remote_code)
    return [config.id2label[index] for index in sorted(config.id2label)]


def fingerprint(source: Source) -> str:
    """Identifies a model's weights: its path and a hash of its weight files, or its hub id.

    Args:
        source: the model.
    """
    folder = Path(source.name)
    if not folder.is_dir():
        return f"hub:{source.name}"
    if source.gguf_file:
        return fingerprint_of_files(folder / source.gguf_file, [folder / source.gguf_file])
    return fingerprint_of_files(folder, weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that Transformers or PEFT load from a folder, in an order that is always the same.

    Args:
        folder: the folder of a model or an adapter.
    """
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def fingerprint_of_files(path: Path, files: Collection[Path]) -> str:
    """Identifies the weights in some files, by a path and a hash.

    Args:
        path: what is said to hold them.
        files: the files, in an order that is always the same.
    """
    digest = hashlib.sha256()
    for name in files:
        with name.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return f"{path.resolve()} sha256:{digest.hexdigest()[:12]}"


def _config(source: Source, settings: Settings, **changes: Any) -> Any:
    with _readable(source):
        return AutoConfig.from_pretrained(
            source.name, trust_remote_code=settings.trust_remote_code, **source.arguments, **changes
        )


def _head(labels: list[str] | None) -> dict[str, Any]:
    """What a config says of the head of a classifier, or of one output where there are no labels."""
    if labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(labels),
        "problem_type": "single_label_classification",
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def _warn_about_missing(keys: Collection[str], source: Source) -> None:
    if keys:
        names = ", ".join(sorted(keys)[:_NAMED]) + (", …" if len(keys) > _NAMED else "")
        warnings.warn(
            f"model {source.name!r} has no weights for {len(keys)} of its parameters ({names}): they start at random",
            stacklevel=3,
        )


@contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Name the model in any error that Transformers, safetensors or torch raise about its files."""
    try:
        yield
    except Exception as error:
        raise InputError(f"model {source.name!r} can't be loaded: {type(error).__name__}: {error}") from None


def _common(source: Source, settings: Settings) -> dict[str, Any]:
    dtype = getattr(torch, settings.dtype)
    arguments = {"dtype": dtype, "trust_remote_code": settings.trust_remote_code}
    if settings.quantization is None:
        return arguments
    if source.gguf_file:
        raise InputError(
            f"quantization={settings.quantization!r} of the GGUF file {source.gguf_file!r}: it is quantised already; "
            "give the folder of a full-precision model"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"quantization={settings.quantization!r} needs bitsandbytes: pip install bitsandbytes")
    if settings.quantization == "nf4":
        quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        quantisation = BitsAndBytesConfig(load_in_8bit=True)
    return arguments | {"quantization_config": quantisation}
