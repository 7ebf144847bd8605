"""Warns about examples that are cut off, left out, or longer than the model allows: the libraries do it silently."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from scalora.runs.errors import InputError
from scalora.runs.model_limits import positions, require_known_tokens
from scalora.runs.prepare import PreparedRun


def token_counts(tokenised: Dataset) -> list[int]:
    """The number of tokens of each example.

    Args:
        tokenised: tokenised examples, with a column ``input_ids``.
    """
    # Arrow knows the lengths of lists without making Python objects of their numbers.
    batches = tokenised.with_format("arrow").iter(batch_size=10_000)
    chunks = (chunk for batch in batches for chunk in batch["input_ids"].chunks)
    return [count for chunk in chunks for count in chunk.value_lengths().to_pylist()]


def require_readable(tokenised: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Check that a model has an embedding for every token of the examples, and a place for it.

    Args:
        tokenised: the examples as the trainer has tokenised, cut or packed them.
        name: file or hub id of the data, for errors.
        tokenizer: the tokenizer.
        model: the model, which may have no weights.

    Raises:
        InputError: it has not, so that training would fail at the first such example.
    """
    require_known_tokens(tokenised, name, tokenizer, model)
    longest, firm = positions(model)
    if firm and longest is not None and (too_long := sum(count > longest for count in token_counts(tokenised))):
        raise InputError(
            f"data {name!r}: {too_long:,} of {len(tokenised):,} sequences are longer than the {longest:,} positions of "
            "the model: set training.max_length to at most that"
        )


def warn_about_lengths(run: PreparedRun, trainer: Trainer) -> None:
    """Warn about the examples of each split; not if they are packed, which moves what is too long elsewhere.

    Args:
        run: the run, with the examples as they were loaded.
        trainer: the trainer, with the examples as it has tokenised them.
    """
    if getattr(trainer.args, "packing", False):
        return
    for split, rows in run.examples.items():
        for message in _messages(run, trainer, getattr(trainer, f"{split}_dataset"), len(rows)):
            warnings.warn(f"{message[0]:,} of {len(rows):,} {split} examples {message[1]}", stacklevel=2)


def _messages(run: PreparedRun, trainer: Trainer, tokenised: Dataset, loaded: int) -> Iterator[tuple[int, str]]:
    """What there is to say: a number of examples, and what happens to them."""
    counts = token_counts(tokenised)
    if run.settings.task == "sft":
        limit = trainer.args.max_length
        if cut := _cut(run, trainer, tokenised, counts):
            yield cut, f"are cut off at training.max_length={limit} tokens"
        if missing := loaded - len(tokenised):
            yield missing, f"are left out: nothing to train on is within training.max_length={limit} tokens"
    longest = run.tokenizer.model_max_length
    if too_long := sum(count > longest for count in counts):
        yield (
            too_long,
            (f"are longer than the tokenizer's model_max_length={longest}: set training.max_length to at most that"),
        )
    trained = positions(trainer.model).tokens
    if trained is not None and trained < longest and (too_long := sum(count > trained for count in counts)):
        yield (
            too_long,
            f"are longer than the {trained:,} positions that the model was trained on: set training.max_length to at "
            "most that",
        )


def _cut(run: PreparedRun, trainer: Trainer, tokenised: Dataset, counts: list[int]) -> int:
    """How many examples have as many tokens as allowed, and don't end as examples end."""
    reached = tokenised.select([index for index, count in enumerate(counts) if count == trainer.args.max_length])
    if trainer.args.truncation_mode == "keep_end":
        return len(reached)
    return sum(ids[-1] != run.tokenizer.eos_token_id for ids in reached["input_ids"])
