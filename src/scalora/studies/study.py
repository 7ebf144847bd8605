"""What a study file may say: one run with several methods, learning rates and seeds; and the cells it expands to.

A comparison is fair when every method gets the same data in the same order and as many learning rates to choose from
("Learning Rate Matters: Vanilla LoRA May Suffice", arXiv:2602.04998); a study that is not is refused here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scalora.runs.errors import InputError
from scalora.runs.settings import Settings, check_keys, check_nested, first_problem, parsed_overrides, read_yaml

STUDY_FILE = "study.yaml"

# Of a run's config, what the study itself sets in each of its cells.
_SET_BY_STUDY = ("output_dir",)
_SET_BY_STUDY_IN_TRAINING = ("learning_rate", "seed", "data_seed")
_SMALLER_IS_BETTER = ("loss", "mse", "perplexity")


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Attributes:
        method: the name in the table.
        learning_rate: of the run.
        seed: of the model's random parts and of the data's order.
        folder: the run folder.
        config: of the run, as the study file gives it.
    """

    method: str
    learning_rate: float
    seed: int
    folder: Path
    config: dict[str, Any]

    @property
    def settings(self) -> Settings:
        """Of the run, whole and checked.

        Raises:
            InputError: the config is wrong; names the method and the key.
        """
        return _run_settings(self.config, f"methods.{self.method}: ")

    def __str__(self) -> str:
        return f"{self.method} {self.folder.name}"


class Study(BaseModel):
    """One study; the fields are the keys of its file."""

    model_config = ConfigDict(extra="forbid")

    output_dir: str = Field(description="The study folder.")
    baseline: str = Field("lora", description="The method that the others are tested against.")
    ceiling: str | None = Field(
        "full", description="The method to which the closed gap is measured; no such column without that method."
    )
    metric: str = Field(
        "eval_loss", description="Of the table, as evaluations log it. The loss, because every task has one."
    )
    greater_is_better: bool | None = Field(
        None, description="Of the metric. When null: false for a loss, a squared error or a perplexity, else true."
    )
    seeds: list[int] = Field(min_length=1, description="Of the runs that are reported.")
    tuning_seeds: list[int] | None = Field(
        None,
        min_length=1,
        description="Seeds on which each learning rate is tried; the best by final evaluation loss is run on `seeds`. "
        "When null: every learning rate on every one of `seeds`.",
    )
    learning_rates: list[float] | None = Field(
        None, min_length=1, description="Of every method that does not give its own; all have equally many."
    )
    run: dict[str, Any] = Field(description="A config of `scalora train` without method, output_dir, rate and seed.")
    methods: dict[str, dict[str, Any] | None] = Field(
        min_length=1,
        description="Name in the table -> what differs from `run`, and learning_rates. `method` defaults to the name.",
    )

    @property
    def folder(self) -> Path:
        """The study folder."""
        return Path(self.output_dir)

    def larger_is_better(self) -> bool:
        """Whether a larger value of the metric is better."""
        if self.greater_is_better is None:
            return not self.metric.endswith(_SMALLER_IS_BETTER)
        return self.greater_is_better

    def rates(self, method: str) -> list[float]:
        """The learning rates of a method, ascending.

        Raises:
            InputError: neither the method nor the study gives any, or one is no positive number.
        """
        rates = (self.methods[method] or {}).get("learning_rates", self.learning_rates)
        if not rates or not isinstance(rates, list):
            raise InputError(f"methods.{method}: there is no list of learning_rates, here or for the whole study")
        for rate in rates:
            if not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
                raise InputError(f"methods.{method}: learning rate {rate!r} is not a number above 0")
        return sorted(float(rate) for rate in rates)

    def tuning_cells(self) -> list[Cell]:
        """Every learning rate of every method on the seeds that choose one; whole comparisons first."""
        seeds = self.seeds if self.tuning_seeds is None else self.tuning_seeds
        count = max(len(self.rates(method)) for method in self.methods)
        return [
            self.cell(method, self.rates(method)[index], seed)
            for seed in seeds
            for index in range(count)
            for method in self.methods
        ]

    def reported_cells(self, best: dict[str, float]) -> list[Cell]:
        """Each method at its best learning rate on the seeds that are reported; no cells of a method without one."""
        return [
            self.cell(method, best[method], seed) for seed in self.seeds for method in self.methods if method in best
        ]

    def cell(self, method: str, learning_rate: float, seed: int) -> Cell:
        """One cell, with the config of its run."""
        overrides = {key: value for key, value in (self.methods[method] or {}).items() if key != "learning_rates"}
        # Hundreds of megabytes a cell, and the comparison only reads figures.
        content = merged({"save_model": False, "method": method}, merged(self.run, overrides))
        folder = self.folder / "cells" / _slug(method) / f"lr{learning_rate}-seed{seed}"
        training = {"learning_rate": learning_rate, "seed": seed, "data_seed": seed}
        config = merged(content, {"output_dir": str(folder), "training": training})
        return Cell(method, learning_rate, seed, folder, config)


def load_study_file(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file, apply ``--key value`` overrides, check everything that can be checked before a run.

    Raises:
        InputError: the file is missing or not YAML, a key or value is wrong, a data file is missing, or the methods
            would not be compared fairly; names it.
    """
    content = read_yaml(path, "study")
    for key, value in parsed_overrides(overrides):
        _assign(content, key, value)
    study = _study(content)
    _check_fairness(study)
    _check_cells(study)
    return study


def study_of(folder: Path) -> Study:
    """The study whose folder this is, wherever the folder lies now.

    Raises:
        InputError: it is not the folder of a study.
    """
    if not (folder / STUDY_FILE).is_file():
        raise InputError(f"{str(folder)!r} holds no {STUDY_FILE}: it is not the folder of a study")
    return _study(read_yaml(folder / STUDY_FILE, "study") | {"output_dir": str(folder)})


def merged(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Nested keys of both; where both have one, that of `overrides`."""
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


def _run_settings(content: dict[str, Any], where: str) -> Settings:
    try:
        settings = Settings.model_validate(content)
        check_nested(settings)
    except ValidationError as error:
        raise InputError(where + first_problem(error)) from None
    except InputError as error:
        raise InputError(f"{where}{error}") from None
    return settings


def _check_fairness(study: Study) -> None:
    if study.baseline not in study.methods:
        raise InputError(f"baseline={study.baseline!r} is none of the methods {', '.join(study.methods)}")
    for name, seeds in (("seeds", study.seeds), ("tuning_seeds", study.tuning_seeds or [])):
        if twice := _first_duplicate(seeds):
            raise InputError(f"{name}: {twice[0]} is there twice")
    for method in study.methods:
        if twice := _first_duplicate(study.rates(method)):
            raise InputError(f"methods.{method}: learning rate {twice[0]} is there twice")
    counts = {method: len(study.rates(method)) for method in study.methods}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{method} {count}" for method, count in counts.items())
        raise InputError(
            f"methods must have equally many learning rates, the same budget for tuning, but have: {listed}"
        )
    slugs = {method: _slug(method) for method in study.methods}
    if twice := _first_duplicate(list(slugs.values())):
        names = " and ".join(repr(method) for method, slug in slugs.items() if slug == twice[0])
        raise InputError(f"methods {names} would share the folder {twice[0]!r}: rename one")
    if empty := [method for method, slug in slugs.items() if not slug]:
        raise InputError(f"method name {empty[0]!r} has no letter or digit to make a folder's name of")


def _check_cells(study: Study) -> None:
    """Raise `InputError` for a run that can't be: first for what all runs share, then for what a method changes."""
    from scalora.runs.data import load_examples

    if "method" in study.run:
        raise InputError("run.method: the study sets it, from `methods`")
    _refuse_what_the_study_sets("run", study.run)
    _run_settings({"method": "full"} | study.run, "run: ")
    data = {}
    for method, overrides in study.methods.items():
        _refuse_what_the_study_sets(f"methods.{method}", overrides or {})
        settings = study.cell(method, study.rates(method)[0], study.seeds[0]).settings
        for split, name in (("train", settings.data.train), ("eval", settings.data.eval)):
            if name is None:
                raise InputError(f"methods.{method}: data.{split} is missing; a study trains and evaluates")
            data[name] = "train" if split == "train" else "eval"
    for name, split in data.items():
        load_examples(name, split)


def _refuse_what_the_study_sets(where: str, content: dict[str, Any]) -> None:
    training = content.get("training")
    given = [key for key in _SET_BY_STUDY if key in content]
    if isinstance(training, dict):
        given += [f"training.{key}" for key in _SET_BY_STUDY_IN_TRAINING if key in training]
    if given:
        raise InputError(f"{where}.{given[0]}: the study sets it, from output_dir, learning_rates and seeds")


def _assign(content: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    check_keys("", [sections[0] if sections else key], Study.model_fields)
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise InputError(f"--{dotted}: {section!r} is not a section")
    content[key] = value


def _slug(method: str) -> str:
    return re.sub(r"[^a-z0-9_.]+", "-", method.lower()).strip("-.")


def _first_duplicate(values: Sequence[Any]) -> list[Any]:
    """The first value that is there more than once, or nothing."""
    return [value for value, count in Counter(values).items() if count > 1][:1]
