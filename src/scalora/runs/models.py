"""Loads a base model and its tokenizer from a hub id, a local folder, a run folder or a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
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
from scalora.runs.settings import Settings


class Source(NamedTuple):
    """What `from_pretrained` takes: a name or folder, and the GGUF file in it if that is what it is."""

    name: str
    gguf_file: str | None

    @property
    def arguments(self) -> dict[str, str]:
        """Keyword arguments of `from_pretrained` beside the name."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def resolve_source(model: str) -> Source:
    """Tell hub ids from local paths; a run folder stands for the model in it.

    Raises:
        InputError: it looks like a local path and nothing is there, or the folder holds no model.
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
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {model!r} holds no config.json: it is not a saved model or finished run")
        return Source(str(path), None)
    if model.startswith((".", "/", "~")) or path.suffix == ".gguf" or model.count("/") > 1:
        raise InputError(f"model {model!r} does not exist")
    return Source(model, None)


def load_tokenizer(source: Source, settings: Settings) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token: the end token's where it has none, as TRL does.

    Raises:
        InputError: there is none, or the hub does not give it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.name, trust_remote_code=settings.trust_remote_code, **source.arguments
        )
    except OSError as error:
        where = "" if Path(source.name).is_dir() else " is no local folder or file, and the hub did not give it"
        raise InputError(f"model {source.name!r}{where}: {error}") from None
    except Exception as error:  # tokenizers raises nothing more special
        raise InputError(f"the tokenizer of model {source.name!r} can't be read: {error}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer.

    Raises:
        OSError: it can't be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises nothing more special
        raise OSError(f"the tokenizer can't be written to {str(folder)!r}: {error}") from None


def load_causal_model(source: Source, settings: Settings) -> PreTrainedModel:
    """A causal language model in the dtype and quantisation of the settings.

    Raises:
        InputError: it can't be read, a GGUF file can't be quantised again, or bitsandbytes is missing.
    """
    arguments = _common(source, settings)
    with _readable(source):
        model = AutoModelForCausalLM.from_pretrained(source.name, **arguments, **source.arguments)
    if source.gguf_file and model.hf_quantizer is not None:
        # The weights are plain tensors now: left marked as quantised, the model could neither be trained nor saved.
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
    """A sequence classifier; for regression (labels None) one output.

    Args:
        source: of the model.
        settings: of the run.
        tokenizer: its padding token is made known to the model.
        labels: names of the classes in order; None for regression.
        new_head: whether a head that the model lacks, or has for other classes, starts at random; else it is an error.

    Raises:
        InputError: it can't be read, or the head is not there and `new_head` is not given.
    """
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if labels is not None:
        head = {
            "num_labels": len(labels),
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
    arguments = _common(source, settings)
    with _readable(source):
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            source.name,
            **arguments,
            **source.arguments,
            **head,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    if not new_head and (loading["missing_keys"] or loading["mismatched_keys"]):
        raise InputError(f"model {source.name!r} has no head for {settings.task} with {model.num_labels} output(s)")
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
    """The model for the task of the settings: `load_causal_model` or `load_classifier`, with their arguments.

    Raises:
        InputError: as they do.
    """
    if settings.task == "sft":
        return load_causal_model(source, settings)
    return load_classifier(source, settings, tokenizer, labels, new_head=new_head)


def class_names(source: Source, settings: Settings) -> list[str] | None:
    """The classes of a saved classifier in order; None for regression."""
    if settings.task == "regression":
        return None
    config = AutoConfig.from_pretrained(source.name, trust_remote_code=settings.trust_remote_code)
    return [config.id2label[index] for index in sorted(config.id2label)]


def fingerprint(source: Source) -> str:
    """Which weights were scored: the path and a hash over its weight files, or the hub id."""
    folder = Path(source.name)
    if not folder.is_dir():
        return f"hub:{source.name}"
    files = [folder / source.gguf_file] if source.gguf_file else sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return f"{folder.resolve() / (source.gguf_file or '')} sha256:{digest.hexdigest()[:12]}"


@contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Name the model in whatever Transformers, safetensors or torch raise about its files."""
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
