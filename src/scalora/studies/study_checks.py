"""Checks of a study before any of its runs: that it is fair, that every run is valid, and that the data are there."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scalora.config import ScaLoraConfig
from scalora.runs.errors import InputError
from scalora.runs.settings import Settings, checked_settings
from scalora.studies.folder_names import slug

if TYPE_CHECKING:
    from scalora.studies.study import Study

# Keys of a run's config that the study sets in every cell.
_SET_BY_STUDY = ("output_dir",)
_SET_BY_STUDY_IN_TRAINING = ("learning_rate", "seed", "data_seed")


def run_settings_of(content: dict[str, Any], where: str) -> Settings:
    """The settings of a run.

    Args:
        content: nested keys and values of its config.
        where: what an error begins with.

    Raises:
        InputError: a key or value is wrong.
    """
    try:
        return checked_settings(content)
    except InputError as error:
        raise InputError(f"{where}{error}") from None


def check_fairness(study: Study) -> None:
    """Check that all methods are tuned over as many rates, and have folders of their own.

    Args:
        study: the study.

    Raises:
        InputError: they are not.
    """
    if study.baseline not in study.methods:
        raise InputError(f"baseline={study.baseline!r} is none of the methods {', '.join(study.methods)}")
    for name in ("seeds", "tuning_seeds", "step_shares"):
        if twice := _first_duplicate(getattr(study, name) or []):
            raise InputError(f"{name}: {twice[0]} is listed twice")
    for method in study.methods:
        if twice := _first_duplicate(study.rates(method)):
            raise InputError(f"methods.{method}: learning rate {twice[0]} is listed twice")
    counts = {method: len(study.rates(method)) for method in study.methods}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{method} {count}" for method, count in counts.items())
        raise InputError(
            f"all methods must have the same number of learning rates, for equal tuning budgets; they have: {listed}"
        )
    slugs = {method: slug(method) for method in study.methods}
    if twice := _first_duplicate(list(slugs.values())):
        names = " and ".join(repr(method) for method, slug in slugs.items() if slug == twice[0])
        raise InputError(f"methods {names} would share the folder {twice[0]!r}: rename one of them")
    if empty := [method for method, slug in slugs.items() if not slug]:
        raise InputError(f"method name {empty[0]!r} has no letter or digit, so it gives no folder name: rename it")


def _check_tests(study: Study) -> None:
    """Raise `InputError` for tests that can't be told apart, or would choose rates on runs that they don't score."""
    if twice := _first_duplicate([slug(test) for test in study.tests]):
        raise InputError(f"tests: two would share the file {twice[0]!r}: rename one of them")
    if study.tests and study.chosen_by == "metric" and not set(study.tuning_seeds or study.seeds) <= set(study.seeds):
        raise InputError("chosen_by='metric': runs on tuning_seeds are not scored on the tests; set it to eval_loss")


def check_cells(study: Study) -> None:
    """Check the runs: first for mistakes that all share, then for those of one method.

    Args:
        study: the study.

    Raises:
        InputError: a run or a test is not valid.
    """
    if "method" in study.run:
        raise InputError("run.method: the study sets it from `methods`; leave it out")
    _refuse_what_the_study_sets("run", study.run)
    run_settings_of({"method": "full"} | study.run, "run: ")
    for method, overrides in study.methods.items():
        _refuse_what_the_study_sets(f"methods.{method}", overrides or {})
        cell = study.cell(method, study.rates(method)[0], study.seeds[0])
        for split, name in cell.settings.data:
            if split in ("train", "eval") and name is None:
                raise InputError(f"methods.{method}: data.{split} is missing; a study needs data.train and data.eval")
        for test, content in cell.tests.items():
            run_settings_of(content, f"tests.{test}: ")
        _warn_of_plain_lora(method, cell.settings)
    _check_tests(study)
    _check_step_shares(study)


def _warn_of_plain_lora(method: str, settings: Settings) -> None:
    steps, config = settings.training.get("max_steps", -1), ScaLoraConfig.from_dict(settings.scalora)
    if settings.method == "scalora" and 0 < steps < config.first_rescale:
        warnings.warn(
            f"methods.{method}: its runs of {steps} steps never rescale, so they are plain LoRA: the first rescale is "
            f"at step {config.first_rescale}; lower scalora.warmup_steps or interval, or train for longer",
            stacklevel=2,
        )


def check_data(study: Study) -> None:
    """Check that all data of a study can be loaded; what is on the hub is downloaded.

    Args:
        study: the study.

    Raises:
        InputError: data are missing or can't be read.
    """
    data: dict[str, str] = {}
    for method in study.methods:
        cell = study.cell(method, study.rates(method)[0], study.seeds[0])
        sets = [
            cell.settings.data,
            *(run_settings_of(content, f"tests.{test}: ").data for test, content in cell.tests.items()),
        ]
        for section in sets:
            for split, name in (("train", section.train), ("eval", section.eval)):
                if name is not None and not (split == "train" and section.streaming):
                    data |= dict.fromkeys([name] if isinstance(name, str) else name, split)
    from scalora.runs.data import load_examples  # loads torch, so after all else has been checked

    for name, split in data.items():
        load_examples(name, split)


def _check_step_shares(study: Study) -> None:
    """Raise `InputError` unless all methods take the same number of steps, of which each share is another number."""
    if study.step_shares is None:
        return
    steps = {
        method: study.cell(method, study.rates(method)[0], study.seeds[0]).settings.training.get("max_steps", 0)
        for method in study.methods
    }
    whole = steps[study.baseline]
    if whole < 1:
        raise InputError("step_shares: they are shares of run.training.max_steps, which is missing: set it")
    for method, own in steps.items():
        if own != whole:
            raise InputError(
                f"methods.{method}.training.max_steps={own}: step_shares need the same for all methods, and "
                f"{study.baseline} has {whole}"
            )
    taken = {share: round(share * whole) for share in (*study.shares(), 1.0)}
    numbers = Counter(taken.values())
    for share in study.shares():
        if taken[share] < 1 or numbers[taken[share]] > 1:
            raise InputError(
                f"step_shares: {share} of {whole} steps is {taken[share]}, but each share must be another number of "
                f"steps, from 1 to {whole - 1}: leave it out or change it"
            )


def _refuse_what_the_study_sets(where: str, content: dict[str, Any]) -> None:
    training = content.get("training")
    given = [key for key in _SET_BY_STUDY if key in content]
    if isinstance(training, dict):
        given += [f"training.{key}" for key in _SET_BY_STUDY_IN_TRAINING if key in training]
    if given:
        raise InputError(f"{where}.{given[0]}: the study sets it from output_dir, learning_rates and seeds")


def _first_duplicate(values: Sequence[Any]) -> list[Any]:
    """The first value that occurs more than once, as a list of one; an empty list if there is none."""
    return [value for value, count in Counter(values).items() if count > 1][:1]
