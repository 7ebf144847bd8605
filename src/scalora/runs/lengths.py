"""Warns about examples that are cut off, left out, or longer than the model allows: the libraries do it silently."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from datasets import Dataset
from transformers import Trainer

from scalora.runs.data import longest_text
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
    else:
        limit = longest_text(run.tokenizer)
        if reached := sum(count == limit for count in counts):
            yield reached, f"reach the limit of {limit} tokens, where texts are cut off"
    longest = run.tokenizer.model_max_length
    if too_long := sum(count > longest for count in counts):
        yield (
            too_long,
            (f"are longer than the tokenizer's model_max_length={longest}: set training.max_length to at most that"),
        )


def _cut(run: PreparedRun, trainer: Trainer, tokenised: Dataset, counts: list[int]) -> int:
    """How many examples have as many tokens as allowed, and don't end as examples end."""
    reached = tokenised.select([index for index, count in enumerate(counts) if count == trainer.args.max_length])
    if trainer.args.truncation_mode == "keep_end":
        return len(reached)
    return sum(ids[-1] != run.tokenizer.eos_token_id for ids in reached["input_ids"])
