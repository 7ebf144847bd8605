"""What a model can read: how many tokens of an example, and which tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from scalora.model.layers import whole_shape
from scalora.runs.errors import InputError
from scalora.runs.tasks import Task

# Names of the tables in which Transformers' models look up positions.
_POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")

# Texts of classification and regression are short, and attention takes memory with the square of their length.
_DEFAULT_TEXT = 512


class Positions(NamedTuple):
    """The longest sequence that a model reads.

    Attributes:
        tokens: number of tokens; None without a limit.
        firm: whether a longer sequence is an error; else the model was only trained on none.
    """

    tokens: int | None
    firm: bool


class TextLimit(NamedTuple):
    """Where texts of classification and regression are truncated.

    Attributes:
        tokens: number of tokens that are kept.
        most: number of tokens that the model and its tokenizer allow; None without a limit.
    """

    tokens: int
    most: int | None


def positions(model: nn.Module) -> Positions:
    """The longest sequence that a model reads, from its tables and its config.

    Args:
        model: a model of Transformers, which may have no weights.
    """
    config: Any = model.config
    config = config.get_text_config()
    declared = getattr(config, "max_position_embeddings", None)
    tables = [
        _usable_rows(module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _POSITION_TABLES and getattr(module, "weight", None) is not None
    ]
    known = [*tables, *([declared] if isinstance(declared, int) and declared > 0 else [])]
    if not known:
        return Positions(None, firm=False)
    # Rotations are computed for any position, and only those that the model was trained on are known to it.
    return Positions(min(known), firm=bool(tables) or getattr(config, "rope_parameters", None) is None)


def _usable_rows(table: Any) -> int:
    """Rows of a table of positions that tokens can have: RoBERTa's begin after the padding row, OPT's at the third."""
    padding = getattr(table, "padding_idx", None)
    offset = getattr(table, "offset", 0) if padding is None else padding + 1
    return whole_shape(table.weight)[0] - int(offset)


def text_limit(max_tokens: int | None, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> TextLimit:
    """Where texts of classification and regression are truncated.

    Args:
        max_tokens: the setting ``data.max_tokens``.
        tokenizer: the model's tokenizer.
        model: the model, which may have no weights.
    """
    most = positions(model).tokens
    # Tokenizers without a limit give 1e30.
    if tokenizer.model_max_length < 2**31:
        most = min(int(tokenizer.model_max_length), most or tokenizer.model_max_length)
    wanted = _DEFAULT_TEXT if max_tokens is None else max_tokens
    return TextLimit(wanted if most is None else min(wanted, most), most)


def require_known_tokens(
    tokenised: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module,
    columns: Sequence[str] = ("input_ids",),
) -> None:
    """Check that a model has an embedding for every token of the examples, and for the padding token.

    Args:
        tokenised: tokenised examples.
        name: file or hub id of the data, or what else the examples are, for errors.
        tokenizer: the model's tokenizer.
        model: the model, which may have no weights.
        columns: the columns with tokens.

    Raises:
        InputError: it has no embedding for a token; names the token and the size of the embedding.
    """
    size = vocabulary(model)
    if size is None:
        return
    require_known_padding(tokenizer, size)
    for batch in tokenised.with_format("arrow").iter(batch_size=10_000):
        found = (pc.max(pc.list_flatten(batch[column])).as_py() for column in columns)
        largest = max((token for token in found if token is not None), default=None)
        if largest is not None and largest >= size:
            raise InputError(
                f"data {name!r}: the tokenizer gives the token {tokenizer.convert_ids_to_tokens(largest)!r} the number "
                f"{largest}, but the model's embedding has only {size:,} rows: resize it to the tokenizer and save the "
                "model"
            )


def require_trl_tokens(
    tokenizer: PreTrainedTokenizerBase, task: Task, training: dict[str, Any], *, conversations: bool
) -> None:
    """Check that a tokenizer has what TRL writes examples with.

    Args:
        tokenizer: the model's tokenizer.
        task: the task, one that TRL trains.
        training: the training arguments, which may bring what the tokenizer lacks.
        conversations: whether the examples are conversations; else they are texts.

    Raises:
        InputError: it has no chat template for conversations, or no end token for texts.
    """
    brings = task in ("sft", "reward")
    if conversations and tokenizer.chat_template is None and training.get("chat_template_path") is None:
        way_out = "set training.chat_template_path" if brings else "save one with it, next to the model"
        raise InputError(f"the examples are conversations, and the tokenizer has no chat template: {way_out}")
    if not conversations and tokenizer.eos_token is None and training.get("eos_token") is None:
        way_out = "set training.eos_token" if brings else "save one with it, next to the model"
        raise InputError(f"the tokenizer has no end token, which follows every text: {way_out}")


def require_known_padding(tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Check that a model has an embedding for the padding token.

    Args:
        tokenizer: the model's tokenizer.
        size: number of rows of the model's embedding.

    Raises:
        InputError: it has none.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= size:
        raise InputError(
            f"the tokenizer gives its padding token {tokenizer.pad_token!r} the number {tokenizer.pad_token_id}, but "
            f"the model's embedding has only {size:,} rows: resize it to the tokenizer and save the model"
        )


def vocabulary(model: nn.Module) -> int | None:
    """The number of rows of a model's embedding, from its config; None if that does not say.

    Args:
        model: a model of Transformers, which may have no weights.
    """
    config: Any = model.config
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None
