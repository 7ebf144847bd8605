"""An example as the model sees it: the decoded text, and which part of it is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer

from scalora.runs.lengths import tokenised_head
from scalora.runs.prepare import PreparedRun
from scalora.runs.tasks import LABELLED

_IGNORED = -100  # the label of a token that is not trained on


@dataclass(frozen=True)
class ShownExample:
    """An example as the model sees it.

    Attributes:
        parts: consecutive pieces of the decoded text, each with whether its tokens are trained on.
        tokens: number of tokens.
        trained: number of tokens that are trained on; 0 where no token is.
        goal: what is to be learnt of the whole text, such as its label; None where tokens are trained on.
        kind: what the text is among those of an example, such as ``"chosen"``; None if an example is one text.
    """

    parts: list[tuple[str, bool]]
    tokens: int
    trained: int
    goal: str | None = None
    kind: str | None = None


def shown_examples(run: PreparedRun, trainer: Trainer, count: int) -> list[ShownExample]:
    """The first examples as the model sees them.

    Args:
        run: the run.
        trainer: the trainer over the examples.
        count: the number of examples. Those of pairs of answers are two texts each.
    """
    examples = tokenised_head(trainer.train_dataset, run.tokenizer)
    rows = examples.select(range(min(count, len(examples))))
    return [shown for row in rows for shown in _shown(row, run, trainer)]


def _shown(row: dict[str, Any], run: PreparedRun, trainer: Trainer) -> Iterator[ShownExample]:
    task, tokenizer = run.settings.task, run.tokenizer
    if task in LABELLED:
        label = run.labels[row["labels"]] if run.labels else f"{row['labels']:g}"
        yield _whole(row["input_ids"], tokenizer, f"label {label}")
    elif task == "grpo":
        yield _whole(row["input_ids"], tokenizer, f"answered {trainer.args.num_generations} times")
    elif task == "reward":
        for kind in ("chosen", "rejected"):
            yield _whole(row[f"{kind}_ids"], tokenizer, "scored as a whole", kind)
    elif task == "sft":
        batch = trainer.data_collator([row])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        if "attention_mask" in batch:
            kept = batch["attention_mask"][0].bool()
            ids, labels = ids[kept], labels[kept]
        yield _answer(ids.tolist(), (labels != _IGNORED).tolist(), tokenizer)
    elif task == "orpo":
        for kind in ("chosen", "rejected"):
            mask = [label != _IGNORED for label in row[f"{kind}_labels"]]
            yield _answer(row[f"{kind}_input_ids"], mask, tokenizer, kind)
    else:
        kinds = ("chosen", "rejected") if task == "dpo" else ("completion",)
        for kind in kinds:
            ids = (row["prompt_ids"] + row[f"{kind}_ids"])[: trainer.args.max_length]
            mask = [place >= len(row["prompt_ids"]) for place in range(len(ids))]
            yield _answer(ids, mask, tokenizer, kind if task == "dpo" else "good" if row["label"] else "bad")


def _whole(ids: list[int], tokenizer: PreTrainedTokenizerBase, goal: str, kind: str | None = None) -> ShownExample:
    return ShownExample([(_decoded(ids, tokenizer), False)], len(ids), 0, goal, kind)


def _answer(
    ids: list[int], mask: Sequence[bool], tokenizer: PreTrainedTokenizerBase, kind: str | None = None
) -> ShownExample:
    parts, end, before = [], 0, ""
    for trained, tokens in groupby(mask):
        end += len(list(tokens))
        # What the text grows by: of a piece alone, some tokenizers would drop the leading space.
        text = _decoded(ids[:end], tokenizer)
        parts.append((text[len(before) :], trained))
        before = text
    return ShownExample(parts, len(ids), sum(mask), None, kind)


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
