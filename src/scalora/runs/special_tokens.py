"""The tokenizer of a result, and the token ids that its configs must agree on with it."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalora.model.layers import whole_shape
from scalora.runs.errors import InputError
from scalora.runs.models import save_tokenizer
from scalora.saving.merged_model import make_generation_valid


def require_vocabulary(model: nn.Module, rows: int, template: object) -> None:
    """Refuse a chat template whose tokenizer has made TRL enlarge the embeddings.

    The new rows are random and are not trained, so no adapter has them, and the base can't be told from another one.

    Args:
        model: the model that TRL's trainer has taken.
        rows: number of rows of its embeddings before.
        template: value of ``training.chat_template_path``.

    Raises:
        InputError: the embeddings have another number of rows.
    """
    now = whole_shape(model.get_input_embeddings().weight)[0]  # type: ignore[operator]
    if now != rows:
        raise InputError(
            f"training.chat_template_path={template!r}: TRL has taken the tokens of its tokenizer too, and so changed "
            f"the embeddings of the base from {rows} to {now} rows, which no adapter would hold: give a .jinja file "
            "with the template alone"
        )


def adopt_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a model's configs the special tokens of the tokenizer that a run has used, as the Trainer did in training.

    Args:
        model: the base as it was loaded; its configs are modified.
        tokenizer: the tokenizer of the run.
    """
    config, generation = model.config.get_text_config(), getattr(model, "generation_config", None)
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        wanted = getattr(tokenizer, key)
        if wanted is None:
            continue
        if wanted not in _ids(getattr(config, key, None)):
            setattr(config, key, wanted)
        if generation is not None and wanted not in (known := _ids(getattr(generation, key))):
            # Any of several end tokens stops a generation, so those of the base stay.
            setattr(generation, key, [wanted, *known] if key == "eos_token_id" else wanted)


def save_text_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer, with its chat template, and the generation config.

    Args:
        model: the model, whose generation config is written if it generates.
        tokenizer: the tokenizer of the run.
        folder: the folder to write to.

    Raises:
        OSError: a file can't be written.
    """
    save_tokenizer(tokenizer, folder)
    if model.can_generate():
        make_generation_valid(model)
        model.generation_config.save_pretrained(folder)


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
