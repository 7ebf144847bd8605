"""The schema of the sections of a config file whose keys are scalora's own: data, reward and evaluate."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from scalora.runs.strict_model import StrictModel, expanded_field


class DataSettings(StrictModel):
    """The examples: where they are, and the names of their columns, which docs/data.md lists by task."""

    train: str | list[str] | dict[str, float] | None = Field(
        None,
        description="Training data: jsonl, json, csv or parquet file, or hub id, which may name a configuration and a "
        "split: nyu-mll/glue:mnli@validation_matched, with datasets' slices such as @train[:-120]. Required for "
        "training. Several, as a list: all of their examples. As names with weights, such as {a.jsonl: 3, b.jsonl: 1}: "
        "mixed, so that the share of each in the examples is that of its weight; an epoch ends when every example has "
        "been seen, and sets that end before begin anew.",
    )
    eval: str | list[str] | None = Field(
        None,
        description="Evaluation data, in the same formats; of a list, all. null: train without evaluation. Required "
        "for `scalora evaluate`.",
    )
    first: int | None = Field(
        None,
        gt=0,
        description="Use only the first so many examples of each training and evaluation set, to try a config. "
        "null: all.",
    )
    prompt: str | None = Field(
        None,
        description="Jinja template that makes the prompt of an example from its columns, such as "
        "'Question: {{ question }}' (sft), for data that have no column prompt. With completion.",
    )
    completion: str | None = Field(
        None, description="Jinja template that makes the completion of an example from its columns. With prompt."
    )
    choices: str | None = Field(
        None,
        description="Jinja template that makes the choices of multiple_choice from an example's columns, as a JSON "
        "list: '{{ [sol1, sol2] | tojson }}'. With prompt.",
    )
    answer: str | None = Field(
        None, description="Jinja template that makes the answer of multiple_choice. With choices."
    )
    streaming: bool = Field(
        False,
        description="Read the training data while training, instead of all of them before it: for sets that don't fit "
        "the memory or disk. Needs training.max_steps, because a stream has no length, and weights if there are "
        "several sets. What is checked before training is their first examples. Not for classification and "
        "regression, whose labels must be known before, and not for orpo.",
    )
    shuffle_buffer: int = Field(
        1000,
        gt=0,
        description="Number of streamed examples among which the next one is drawn at random. More mix better, and "
        "take memory and time at the start; 1 keeps the order of the file. 1000 is the default of datasets.",
    )
    text: str = Field("text", description="Column with the text (classification, regression, and sft on plain text).")
    text_pair: str | None = Field(
        None, description="Column with the second text, for tasks on pairs (classification and regression)."
    )
    label: str = Field(
        "label", description="Column with the label: a class name or number (classification) or a number (regression)."
    )
    max_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens of a text that are kept (classification and regression; other tasks have "
        "training.max_length). null: 512, because memory grows with the square of it. Never more than the model and "
        "its tokenizer allow. A warning says how many texts are truncated.",
    )
    similar_labels: Literal["refuse", "merge", "separate"] = Field(
        "refuse",
        description="How to treat labels that differ only in case or white space (classification). refuse: an "
        "error, because they are usually meant to be one class. merge: one class. separate: a class each.",
    )

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _names(cls, value: Any, info: ValidationInfo) -> Any:
        """One error, where a union would report one for each of its types; and paths as shells take them."""
        if value is None:
            return None
        if isinstance(value, str):
            return expanded_field(value)
        if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
            return [expanded_field(name) for name in value]
        if isinstance(value, dict) and info.field_name == "train" and value:
            for name, weight in value.items():
                number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
                if not number or not 0 < weight < math.inf:
                    raise PydanticCustomError("weight", "the weight of {name} must be a number above 0", {"name": name})
            return {expanded_field(str(name)): float(weight) for name, weight in value.items()}
        mixed = ", or names with weights" if info.field_name == "train" else ""
        raise PydanticCustomError("names", "write a file or hub id, or a list of them{mixed}", {"mixed": mixed})


class RewardSettings(StrictModel):
    """What is rewarded in the answers that a model generates while it trains (grpo)."""

    file: str | None = Field(
        None,
        description="Python file with functions that reward answers. It is executed. Each is called as TRL calls its "
        "own, with prompts, completions and the columns of the data by name, each a list with one entry per answer, "
        "and returns one number per answer. null: pattern.",
    )
    functions: list[str] = Field(
        default=[], description="Names of the functions in the file whose rewards are added up. Required with file."
    )
    weights: list[float] | None = Field(
        None, description="What the rewards of each function are multiplied by. null: 1 each. Only with file."
    )
    pattern: str | None = Field(
        None,
        description="Regular expression in place of a file. The reward is 1 if it matches anywhere in an answer, "
        "else 0.",
    )
    answer: str | None = Field(
        None,
        description="Column with the right answers: the reward of pattern is 1 only if what it matches first, its "
        "first group or the whole match if it has no group, is the right answer, without white space at the ends.",
    )

    @field_validator("file")
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        return None if value is None else expanded_field(value)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        return _pattern(value)


class EvaluateSettings(StrictModel):
    """How `scalora evaluate` scores a model."""

    metrics: list[Literal["loss", "exact_match", "math", "multiple_choice"]] = Field(
        default=["loss"],
        min_length=1,
        description="Scores of an sft model. Only the loss by default, because it needs no columns but those for "
        "training. The other tasks always report all of their scores.",
    )
    max_new_tokens: int = Field(
        64,
        gt=0,
        description="Maximum length of a generated answer, in tokens. A prompt that does not fit the model's positions "
        "with it is shortened at its beginning, as in lm-evaluation-harness.",
    )
    batch_size: int = Field(
        16, gt=0, description="Examples per batch. The scores do not depend on it, but for orpo's loss."
    )
    limit: int | None = Field(None, gt=0, description="Number of examples to score, from the first. null: all.")
    answer_pattern: str | None = Field(
        None,
        description="Regular expression that extracts the answer from a text, for exact_match, where it first matches: "
        "its first group, or the whole match if it has no group. An expected answer that it does not match is an "
        "error, a generated one is wrong. null: the whole text, without white space at its ends.",
    )

    @field_validator("answer_pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        return _pattern(value)


def _pattern(value: str | None) -> str | None:
    """A regular expression, if it is one."""
    try:
        re.compile(value or "")
    except re.error as error:
        raise PydanticCustomError("pattern", "not a regular expression: {why}", {"why": str(error)}) from None
    return value


class NeedsSettings(StrictModel):
    """What is known of a run's model and data before they are downloaded, to say in time what it will need."""

    model: dict[str, Any] = Field(
        default_factory=dict,
        description="What the model's config.json says, as far as its sizes go: estimates are made of it where the hub "
        "can't be reached.",
    )
    gated: bool = Field(
        False, description="Whether the hub asks for a token, because the model's licence is to be accepted."
    )
    examples: int | None = Field(None, gt=0, description="Number of training examples.")
    tokens: float | None = Field(None, gt=0, description="Mean number of tokens of a training example.")
    data_gb: float = Field(0, ge=0, description="Size of the data on the disk, in GB.")
    packages: list[str] = Field(default=[], description="Packages that the run imports besides scalora's own.")
