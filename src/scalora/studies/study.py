"""The schema of a study file, and the cells it expands to: one run for each method, learning rate and seed.

A study may also run the methods for fewer steps at their best learning rate, to find out how many they need.

A comparison is fair when every method sees the same data in the same order and is tuned over the same number of
learning rates ("Learning Rate Matters: Vanilla LoRA May Suffice", arXiv:2602.04998). Studies that are not fair in this
sense are rejected when they are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from scalora.runs.errors import InputError
from scalora.runs.limits import check_limits
from scalora.runs.settings import Settings, check_keys, first_problem
from scalora.runs.strict_model import StrictModel, expanded_field
from scalora.runs.yaml_file import as_written, parsed_overrides, read_yaml, refuse_repeated, set_dotted
from scalora.studies.folder_names import slug
from scalora.studies.study_checks import check_cells, check_data, check_fairness, run_settings_of

STUDY_FILE = "study.yaml"

_SMALLER_IS_BETTER = ("loss", "mse", "perplexity")


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Attributes:
        method: name of the method in the tables, which need not be a key of `scalora.rivals.METHODS`.
        learning_rate: peak learning rate of the run.
        seed: seed for both the model's random initialisation and the order of the data.
        folder: the run folder.
        config: the run's config as nested keys and values, not validated yet.
        share: share of the study's steps that the run takes; 1 for ordinary cells.
        tests: config for `scalora evaluate` of each of the study's `tests`, not validated yet; none of a run that is
            only for choosing a learning rate.
        score: score of a test that counts.
    """

    method: str
    learning_rate: float
    seed: int
    folder: Path
    config: dict[str, Any]
    share: float = 1.0
    tests: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    score: str = ""

    @property
    def settings(self) -> Settings:
        """The run's config, validated and with all defaults filled in.

        Raises:
            InputError: the config is invalid; the message names the method and the key.
        """
        return run_settings_of(self.config, f"methods.{self.method}: ")

    def __str__(self) -> str:
        return f"{self.method} {self.folder.name}"


class Study(StrictModel):
    """A study; its fields are the keys of a study file."""

    output_dir: str = Field(description="The study folder.")
    baseline: str = Field("lora", description="Method that all others are compared with.")
    ceiling: str | None = Field(
        "full",
        description="Method that defines the upper end of `gap closed`; the column is left out if `methods` lacks it.",
    )
    metric: str = Field(
        "eval_loss",
        description="Score shown in the tables, by the name that evaluations log. The default is the loss, because "
        "every task has one.",
    )
    greater_is_better: bool | None = Field(
        None,
        description="Whether larger values of the metric are better. null: false for names ending in loss, mse or "
        "perplexity, true for all others.",
    )
    chosen_by: Literal["eval_loss", "metric"] = Field(
        "eval_loss",
        description="What a method's learning rate is chosen by on the tuning seeds. eval_loss by default, because it "
        "is less noisy than most metrics; metric where the loss of a classifier rises, the surer it gets, while its "
        "answers still become better.",
    )
    tests: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Sets that the trained models are scored on: name -> overrides of `run` for `scalora evaluate`. "
        "The runs on `seeds` are; those that only choose learning rates are not. The score of a test becomes "
        "`eval_NAME` in the tables, and the mean of all `eval_tests`, for `metric`. The weights are deleted once all "
        "tests are done, unless `run.save_model` is true.",
    )
    test_score: str | None = Field(
        None,
        description="Score of `scalora evaluate` that counts in `tests`. null: the first of `run.evaluate.metrics`.",
    )
    seeds: list[int] = Field(min_length=1, description="Seeds of the reported runs.")
    tuning_seeds: list[int] | None = Field(
        None,
        min_length=1,
        description="Seeds for choosing the learning rate: the rate with the lowest final evaluation loss is then run "
        "on `seeds`. null: run every learning rate on all of `seeds`.",
    )
    learning_rates: list[float] | None = Field(
        None,
        min_length=1,
        description="Learning rates of the methods without a list of their own. All methods need the same number.",
    )
    step_shares: list[float] | None = Field(
        None,
        min_length=1,
        description="Shares of `run.training.max_steps`, between 0 and 1. At its best learning rate, every method but "
        "the baseline is also run on `seeds` over each of them, with a schedule that ends there, to find out how many "
        "steps it needs to be level with the baseline's full run. null: no such runs.",
    )
    run: dict[str, Any] = Field(
        description="Config for `scalora train`, without method, output_dir, learning rate and seeds."
    )
    methods: dict[str, dict[str, Any] | None] = Field(
        min_length=1,
        description="Name in the tables -> overrides of `run`, and optionally learning_rates. `method` defaults to the "
        "name.",
    )

    @field_validator("output_dir")
    @classmethod
    def _path(cls, value: str) -> str:
        return expanded_field(value)

    @field_validator("seeds", "tuning_seeds", "learning_rates")
    @classmethod
    def _usable(cls, values: list[float] | None, info: ValidationInfo) -> list[float] | None:
        """As a run would check each of them."""
        key = "learning_rate" if info.field_name == "learning_rates" else "seed"
        for value in values or ():
            try:
                check_limits("training", key, value)
            except ValueError as error:
                raise PydanticCustomError("value", "{words}", {"words": f"{value!r} {error}"}) from None
        return values

    @field_validator("step_shares")
    @classmethod
    def _shares_of_a_run(cls, values: list[float] | None) -> list[float] | None:
        for value in values or ():
            if not 0 < value < 1:
                raise PydanticCustomError("value", "{words}", {"words": f"{value!r} must be above 0 and below 1"})
        return values

    @property
    def folder(self) -> Path:
        """The study folder."""
        return Path(self.output_dir)

    def larger_is_better(self) -> bool:
        """Whether a larger value of the metric is better."""
        if self.greater_is_better is None:
            return not self.metric.endswith(_SMALLER_IS_BETTER)
        return self.greater_is_better

    def _test_score(self) -> str:
        metrics = (self.run.get("evaluate") or {}).get("metrics") or ["loss"]
        return self.test_score or str(metrics[0])

    def shares(self) -> list[float]:
        """The `step_shares`, in ascending order; none if there are none."""
        return sorted(self.step_shares or ())

    def rates(self, method: str) -> list[float]:
        """The learning rates of a method, in ascending order.

        Args:
            method: a key of `methods`.

        Raises:
            InputError: neither the method nor the study lists any, or one is not a positive number.
        """
        rates = (self.methods[method] or {}).get("learning_rates", self.learning_rates)
        if not rates or not isinstance(rates, list):
            raise InputError(
                f"methods.{method}: there is no list of learning_rates, neither here nor at the top level of the study"
            )
        for rate in rates:
            number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
            if not number or not 0 < rate < math.inf:
                raise InputError(f"methods.{method}: learning rate {rate!r} is not a number above 0")
        return sorted(float(rate) for rate in rates)

    def tuning_cells(self) -> list[Cell]:
        """The cells for choosing learning rates: every rate of every method on each tuning seed.

        Methods alternate, so that a study that is stopped early has runs of all methods to compare.
        """
        seeds = self.seeds if self.tuning_seeds is None else self.tuning_seeds
        count = max(len(self.rates(method)) for method in self.methods)
        return [
            self.cell(method, self.rates(method)[index], seed)
            for seed in seeds
            for index in range(count)
            for method in self.methods
        ]

    def reported_cells(self, best: dict[str, float]) -> list[Cell]:
        """The cells that the tables report: every method at its best learning rate, on each of `seeds`.

        Args:
            best: best learning rate by method; a method that is absent has no cells.
        """
        return [
            self.cell(method, best[method], seed) for seed in self.seeds for method in self.methods if method in best
        ]

    def share_cells(self, best: dict[str, float]) -> list[Cell]:
        """The cells of `step_shares`: every method but the baseline at its best learning rate, on each of `seeds`.

        Args:
            best: best learning rate by method; a method that is absent has no cells.

        Raises:
            InputError: a run's config is invalid.
        """
        return [
            self.cell(method, best[method], seed, share)
            for seed in self.seeds
            for share in self.shares()
            for method in self.methods
            if method in best and method != self.baseline
        ]

    def cell(self, method: str, learning_rate: float, seed: int, share: float = 1.0) -> Cell:
        """One cell, with the config of its run.

        Args:
            method: a key of `methods`.
            learning_rate: peak learning rate of the run.
            seed: seed for initialisation and data order.
            share: share of the study's steps that the run takes. 1, for ordinary cells, needs no ``max_steps``.

        Raises:
            InputError: the config is invalid; found only for a `share` below 1.
        """
        overrides = {key: value for key, value in (self.methods[method] or {}).items() if key != "learning_rates"}
        # A model takes hundreds of megabytes per cell, and the comparison only reads logs.
        content = merged({"save_model": False, "method": method}, merged(self.run, overrides))
        name = f"lr{learning_rate}-seed{seed}" + ("" if share == 1 else f"-share{share}")
        folder = self.folder / "cells" / slug(method) / name
        training: dict[str, Any] = {"learning_rate": learning_rate, "seed": seed, "data_seed": seed}
        config = merged(content, {"output_dir": str(folder), "training": training})
        cell = Cell(method, learning_rate, seed, folder, config, share)
        if share == 1:
            tests = {test: merged(config, overrides) for test, overrides in self.tests.items() if seed in self.seeds}
            return replace(
                cell,
                tests=tests,
                score=self._test_score(),
                config=merged(config, {"save_model": True}) if tests else config,
            )
        return replace(cell, config=merged(config, {"training": _shortened(cell.settings.training, share)}))


def load_study_file(path: Path, overrides: Sequence[str] = (), options: Sequence[str] = ()) -> Study:
    """Read a study file, apply overrides, and check everything that can be checked before a run.

    Args:
        path: path of the YAML file.
        overrides: command-line words, ``--key value`` or ``--key=value`` with dotted keys, which replace keys of the
            file.
        options: the options of the command, such as ``"--table-only"``, to suggest for a mistyped one.

    Raises:
        InputError: the file is missing or not YAML, a key or value is invalid, a data file is missing, or the methods
            would not be compared fairly.
    """
    content = read_yaml(path, "study")
    pairs = parsed_overrides(overrides, options)
    refuse_repeated([key for key, _ in pairs])
    for key, value in pairs:
        check_keys("", [key.partition(".")[0]], Study.model_fields)
        set_dotted(content, as_written(content, key), value)
    study = checked_study(content)
    check_data(study)
    return study


def checked_study(content: dict[str, Any]) -> Study:
    """Make a study of the keys and values of a study file, and check all that needs no data.

    Args:
        content: nested keys and values.

    Raises:
        InputError: a key or value is invalid, or the methods would not be compared fairly.
    """
    study = _study(content)
    check_fairness(study)
    check_cells(study)
    return study


def study_of(folder: Path) -> Study:
    """The study that was run in a folder, even if the folder has been moved since.

    Args:
        folder: the study folder.

    Raises:
        InputError: the folder holds no valid study file.
    """
    if not (folder / STUDY_FILE).is_file():
        raise InputError(f"{str(folder)!r} holds no {STUDY_FILE}: it is not the folder of a study")
    return _study(read_yaml(folder / STUDY_FILE, "study") | {"output_dir": str(folder)})


def merged(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries into a new one.

    Args:
        base: nested keys and values.
        overrides: nested keys and values that take precedence over those of `base`.
    """
    result = dict(base)
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def _study(content: dict[str, Any]) -> Study:
    check_keys("", content, Study.model_fields)
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        raise InputError(first_problem(error)) from None


def _shortened(training: Mapping[str, Any], share: float) -> dict[str, Any]:
    """The training arguments that make a run take a share of its steps."""
    changed = {"max_steps": round(share * training["max_steps"])}
    warmup = training.get("warmup_steps", 0)
    # Below 1 it is a share of the steps already.
    return changed | ({"warmup_steps": round(share * warmup)} if warmup >= 1 else {})
