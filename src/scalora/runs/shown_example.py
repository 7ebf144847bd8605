"""An example as the model sees it: the decoded text, and which part of it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer

_IGNORED = -100  # the label of a token that is not trained on


@dataclass(frozen=True)
class ShownExample:
    """An example as the model sees it.

    Attributes:
        parts: consecutive pieces of the decoded text, each with whether its tokens are trained on.
        tokens: number of tokens.
        trained: number of tokens that are trained on; 0 for classification and regression.
        label: the class or number to be learnt; None for other tasks.
    """

    parts: list[tuple[str, bool]]
    tokens: int
    trained: int
    label: str | None = None


def shown_example(
    row: dict[str, Any], trainer: Trainer, tokenizer: PreTrainedTokenizerBase, label: str | None
) -> ShownExample:
    """Collate one example as the trainer would, and decode it.

    Args:
        row: a tokenised example of the trainer's training set.
        trainer: the trainer, whose collator makes batches.
        tokenizer: the model's tokenizer.
        label: the class or number to be learnt; None where tokens are trained on.
    """
    batch = trainer.data_collator([row])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    if "attention_mask" in batch:
        kept = batch["attention_mask"][0].bool()
        ids, labels = ids[kept], labels[kept] if label is None else labels
    if label is not None:
        return ShownExample([(_decoded(ids.tolist(), tokenizer), False)], len(ids), 0, label)
    mask = (labels != _IGNORED).tolist()
    return ShownExample(_parts(ids.tolist(), mask, tokenizer), len(ids), sum(mask))


def _parts(ids: list[int], mask: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    parts, end, before = [], 0, ""
    for trained, tokens in groupby(mask):
        end += len(list(tokens))
        # What the text grows by: of a piece alone, some tokenizers would drop the leading space.
        text = _decoded(ids[:end], tokenizer)
        parts.append((text[len(before) :], trained))
        before = text
    return parts


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
