"""Warns about examples that are cut off, left out, or longer than the model allows: the libraries do it silently."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, Trainer
from trl import GRPOTrainer
from trl.data_utils import is_conversational

from scalora.runs.errors import InputError
from scalora.runs.model_limits import positions, require_known_tokens
from scalora.runs.prepare import PreparedRun
from scalora.runs.streams import HEAD

# The columns whose tokens make up each sequence of an example, by the columns that a trainer has made.
_SEQUENCES = (
    (["input_ids"],),
    (["prompt_ids", "chosen_ids"], ["prompt_ids", "rejected_ids"]),
    (["prompt_ids", "completion_ids"],),
    (["chosen_ids"], ["rejected_ids"]),
    (["chosen_input_ids"], ["rejected_input_ids"]),
)


def tokenised_head(examples: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Examples as a trainer has tokenised them; of a stream the first.

    Args:
        examples: the examples of the trainer. Those of GRPO's are prompts, which it tokenises while it trains.
        tokenizer: the tokenizer.
    """
    if isinstance(examples, IterableDataset):
        examples = Dataset.from_list(list(islice(iter(examples), HEAD)))
    if any(set(sequence) <= set(examples.column_names) for sequence, *_ in _SEQUENCES):
        return examples

    def encode(row: dict[str, object]) -> dict[str, object]:
        if is_conversational(row):
            ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        else:
            ids = tokenizer(row["prompt"])["input_ids"]
        return {"input_ids": ids}

    return examples.map(encode, remove_columns=examples.column_names, desc="Tokenizing")


def token_counts(tokenised: Dataset) -> list[int]:
    """The number of tokens of each example; of the longer sequence where an example has two.

    Args:
        tokenised: tokenised examples, from `tokenised_head`.
    """
    counts: list[int] = []
    # Arrow knows the lengths of lists without making Python objects of their numbers.
    for batch in tokenised.with_format("arrow").iter(batch_size=10_000):
        lengths = {c: batch[c].combine_chunks().value_lengths().to_pylist() for c in token_columns(tokenised)}
        rows = zip(*(map(sum, zip(*(lengths[c] for c in s), strict=True)) for s in _sequences(tokenised)), strict=True)
        counts += [max(row) for row in rows]
    return counts


def token_columns(tokenised: Dataset) -> list[str]:
    """The columns with tokens.

    Args:
        tokenised: tokenised examples, from `tokenised_head`.
    """
    return list(dict.fromkeys(column for sequence in _sequences(tokenised) for column in sequence))


def _sequences(tokenised: Dataset) -> tuple[list[str], ...]:
    have = set(tokenised.column_names)
    return next(known for known in _SEQUENCES if all(set(sequence) <= have for sequence in known))


def require_readable(
    examples: Dataset | IterableDataset, name: str, tokenizer: PreTrainedTokenizerBase, trainer: Trainer
) -> None:
    """Check that a model has an embedding for every token of the examples, and a place for it; of a stream, the first.

    Args:
        examples: the examples as the trainer has tokenised, cut or packed them.
        name: file or hub id of the data, for errors.
        tokenizer: the tokenizer.
        trainer: the trainer, whose model may have no weights.

    Raises:
        InputError: it has not, so that training would fail at the first such example; or no example is left.
    """
    tokenised = tokenised_head(examples, tokenizer)
    limit = getattr(trainer.args, "max_length", None)
    if not len(tokenised):
        raise InputError(f"data {name!r}: no example has anything to learn within training.max_length={limit} tokens")
    require_known_tokens(tokenised, name, tokenizer, trainer.model, token_columns(tokenised))
    longest, firm = positions(trainer.model)
    if not firm or longest is None:
        return
    generated = trainer.args.max_completion_length if isinstance(trainer, GRPOTrainer) else 0
    counts = [min(count, limit or count) + generated for count in token_counts(tokenised)]
    if too_long := sum(count > longest for count in counts):
        more = f" with the training.max_completion_length={generated} tokens of an answer" if generated else ""
        way_out = "shorten the prompts or that" if generated else "set training.max_length to at most that"
        raise InputError(
            f"data {name!r}: {too_long:,} of {len(counts):,} sequences{more} are longer than the {longest:,} positions "
            f"of the model: {way_out}"
        )


def warn_about_lengths(run: PreparedRun, trainer: Trainer) -> None:
    """Warn about the examples of each split; not if they are packed, which moves what is too long elsewhere.

    Args:
        run: the run, with the examples as they were loaded.
        trainer: the trainer, with the examples as it has tokenised them.
    """
    if getattr(trainer.args, "packing", False):
        return
    for split in run.examples:
        examples = getattr(trainer, f"{split}_dataset")
        tokenised = tokenised_head(examples, run.tokenizer)
        first = "first " if isinstance(examples, IterableDataset) else ""
        # KTO's trainer makes two examples of a pair.
        paired = run.settings.task == "kto" and "chosen" in run.examples[split].rows.column_names
        loaded = len(tokenised) if first else run.count(split) * (2 if paired else 1)
        for count, message in _messages(run, trainer, tokenised, loaded):
            warnings.warn(f"{count:,} of {loaded:,} {first}{split} examples {message}", stacklevel=2)


def _messages(run: PreparedRun, trainer: Trainer, tokenised: Dataset, loaded: int) -> Iterator[tuple[int, str]]:
    """What there is to say: a number of examples, and what happens to them."""
    counts = token_counts(tokenised)
    limit = getattr(trainer.args, "max_length", None)
    if limit is not None:
        if cut := _cut(run, trainer, tokenised, counts):
            yield cut, f"are cut off at training.max_length={limit} tokens"
        if missing := loaded - len(tokenised):
            yield missing, f"are left out: nothing to train on is within training.max_length={limit} tokens"
    longest = run.tokenizer.model_max_length
    counts = [min(count, limit or count) for count in counts]
    way_out = "set training.max_length to at most that" if hasattr(trainer.args, "max_length") else "shorten them"
    if too_long := sum(count > longest for count in counts):
        yield too_long, f"are longer than the tokenizer's model_max_length={longest}: {way_out}"
    trained = positions(trainer.model).tokens
    if trained is not None and trained < longest and (too_long := sum(count > trained for count in counts)):
        yield too_long, f"are longer than the {trained:,} positions that the model was trained on: {way_out}"


def _cut(run: PreparedRun, trainer: Trainer, tokenised: Dataset, counts: list[int]) -> int:
    """How many examples have more tokens than allowed, or as many and don't end as examples end."""
    limit: int = trainer.args.max_length
    more = sum(count > limit for count in counts)  # where the trainer cuts batches
    if run.settings.task not in ("sft", "orpo"):
        return more
    reached = tokenised.select([index for index, count in enumerate(counts) if count == limit])
    if getattr(trainer.args, "truncation_mode", None) == "keep_end":
        return int(reached.num_rows)
    end = run.tokenizer.eos_token_id
    columns = token_columns(tokenised)
    return len([row for row in reached if any(len(row[c]) == limit and row[c][-1] != end for c in columns)])
