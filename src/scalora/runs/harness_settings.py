"""What `scalora evaluate --harness` takes: settings of lm-evaluation-harness, under its own names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import Field, ValidationError, field_validator

from scalora.runs.errors import InputError
from scalora.runs.paths import expanded
from scalora.runs.strict_model import StrictModel, expanded_field
from scalora.runs.yaml_file import parsed_overrides


class HarnessSettings(StrictModel):
    """Arguments of lm_eval 0.4.13, each with its meaning and its default there, but for the size of batches."""

    tasks: str = Field(description="Names of tasks, groups or tags, or task files (.yaml), separated by commas.")
    num_fewshot: int | None = Field(None, ge=0, description="Examples before each question. null: as the task says.")
    limit: float | None = Field(
        None, gt=0, description="Examples to score of each task, from the first; a share of them below 1. null: all."
    )
    batch_size: int | str | None = Field(
        None,
        description="Requests per batch, or auto for the largest that fits. null: evaluate.batch_size, where the "
        "harness takes 1.",
    )
    max_batch_size: int | None = Field(None, gt=0, description="Largest batch that auto tries.")
    apply_chat_template: bool | str = Field(
        False, description="Put prompts into the tokenizer's chat template, or into the one of this name."
    )
    system_instruction: str | None = Field(None, description="System message of the chat template.")
    fewshot_as_multiturn: bool = Field(True, description="Whether examples are turns of the conversation.")
    gen_kwargs: str | None = Field(None, description="Arguments of generation, as key=value,key=value.")
    include_path: str | None = Field(None, description="Folder with task files of your own.")
    bootstrap_iters: int = Field(100_000, ge=0, description="Resamples for the standard errors; 0: no such errors.")
    predict_only: bool = Field(False, description="Only keep the outputs, and score nothing.")
    confirm_run_unsafe_code: bool = Field(False, description="Run tasks that execute what the model writes.")
    random_seed: int = Field(0, description="Seed of Python.")
    numpy_random_seed: int = Field(1234, description="Seed of NumPy.")
    torch_random_seed: int = Field(1234, description="Seed of PyTorch.")
    fewshot_random_seed: int = Field(1234, description="Seed of the choice of few-shot examples.")
    add_bos_token: bool | None = Field(None, description="Begin texts with the token for it. null: as the tokenizer.")
    max_length: int | None = Field(None, gt=0, description="Longest input, in tokens. null: the model's.")
    prefix_token_id: int | None = Field(None, description="Token before a text without a prompt.")
    enable_thinking: bool | None = Field(None, description="Argument of the chat template.")
    think_end_token: int | str | None = Field(None, description="Token, or its id, after which the answer begins.")

    @field_validator("include_path")
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        return None if value is None else expanded_field(value)

    @property
    def task_names(self) -> list[str]:
        """The names in `tasks`, of which those of files are paths."""
        names = (name.strip() for name in self.tasks.split(","))
        return [expanded(name) if name.endswith(".yaml") else name for name in names if name]

    def given(self, names: frozenset[str]) -> dict[str, Any]:
        """The settings among some names that are set: the harness has its own defaults.

        Args:
            names: the names.
        """
        return self.model_dump(include=set(names & self.model_fields_set))


FOR_MODEL = frozenset(
    {"max_batch_size", "add_bos_token", "max_length", "prefix_token_id", "enable_thinking", "think_end_token"}
)
"""What the harness's class of the model takes, rather than its evaluation."""


def harness_settings(words: Sequence[str]) -> HarnessSettings:
    """Read the settings of a command line.

    Args:
        words: each a KEY=VALUE.

    Raises:
        InputError: a word is no such pair, a key is unknown or given twice, or a value is of another type.
    """
    given: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"--harness {word!r}: give a setting and its value, such as tasks=arc_easy,hellaswag")
        if key in given:
            raise InputError(f"--harness {key}: it is given twice; give it once")
        known = list(HarnessSettings.model_fields)
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(known)}"
            raise InputError(f"--harness: unknown setting {key!r}: {hint}")
        given[key] = value if key == "tasks" else next(parsed for _, parsed in parsed_overrides([f"--{key}={value}"]))
    try:
        settings = HarnessSettings.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0])
        if problem["type"] == "missing":
            raise InputError("--harness: tasks is missing: give the names of tasks, such as tasks=arc_easy") from None
        raise InputError(f"--harness {key}={given[key]!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from None
    if not settings.task_names:
        raise InputError(f"--harness tasks={settings.tasks!r}: give the names of tasks, such as tasks=arc_easy")
    size = settings.batch_size
    if not (
        size is None or (isinstance(size, int) and size > 0) or (isinstance(size, str) and size.startswith("auto"))
    ):
        raise InputError(f"--harness batch_size={size!r}: give a number of at least 1, or auto")
    return settings
