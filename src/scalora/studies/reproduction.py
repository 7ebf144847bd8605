"""The schema of a recipe for one of the paper's tables, and the studies that it expands to: one for each task.

A recipe is a study file with `tasks`, each of which overrides keys of the study, and with what the paper reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from scalora.runs.errors import InputError
from scalora.runs.settings import check_keys, first_problem
from scalora.runs.strict_model import StrictModel, expanded_field
from scalora.runs.yaml_file import as_written, parse_yaml, parsed_overrides, read_yaml, refuse_repeated, set_dotted
from scalora.saving.files import atomic_write
from scalora.studies.folder_names import slug
from scalora.studies.study import Study, checked_study, merged

REPRODUCTION_FILE = "reproduction.yaml"
"""The recipe as it was run, in the folder of its table."""

RECIPES = ("glue", "commonsense", "math")
"""The recipes that come with the package."""

AVERAGE = "average"
"""The column with the mean over all others."""


class Recipe(StrictModel):
    """What a recipe has besides the keys of a study."""

    title: str = Field(description="What the table is of.")
    source: str = Field(description="Where the paper's figures are from, and what they are taken to be.")
    hardware: str = Field(description="What it runs on.")
    hours: str = Field(description="How long it takes.")
    unpublished: list[str] = Field(
        default_factory=list, description="What the paper leaves open, and what is taken in its place."
    )
    output_dir: str = Field(description="Folder of the table, with a study's folder for each task.")
    tasks: dict[str, dict[str, Any]] = Field(
        min_length=1, description="Name of a task -> overrides of the study. A study is run for each."
    )
    paper: dict[str, dict[str, dict[str, float]]] = Field(
        default_factory=dict,
        description="What the paper reports, in per cent: title of a table -> method -> column or average -> figure.",
    )
    smoke: dict[str, Any] = Field(
        default_factory=dict,
        description="Overrides of the study for --smoke, and `only`: the tasks and methods that it runs unless others "
        "are named.",
    )

    @field_validator("output_dir")
    @classmethod
    def _path(cls, value: str) -> str:
        return expanded_field(value)


class Reproduction:
    """A table of the paper to reproduce.

    Args:
        content: the keys and values of the recipe, overrides applied, reduced to what is to be run.

    Attributes:
        content: as given.
        recipe: what the recipe has besides a study's keys.
        studies: the study of each task.

    Raises:
        InputError: a key or value is invalid, or a study would not compare its methods fairly.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        check_keys("", content, [*Recipe.model_fields, *Study.model_fields])
        try:
            self.recipe = Recipe.model_validate({key: content[key] for key in Recipe.model_fields if key in content})
        except ValidationError as error:
            raise InputError(first_problem(error)) from None
        common = {key: value for key, value in content.items() if key == "run" or key not in Recipe.model_fields}
        self.studies: dict[str, Study] = {}
        for task, overrides in self.recipe.tasks.items():
            own = merged(common, overrides) | {"output_dir": str(self.folder / slug(task))}
            try:
                self.studies[task] = checked_study(own)
            except InputError as error:
                raise InputError(f"tasks.{task}: {error}") from None

    @property
    def folder(self) -> Path:
        """The folder of the table."""
        return Path(self.recipe.output_dir)

    def columns(self) -> dict[str, dict[str, tuple[Study, str]]]:
        """The tables of the recipe: title -> column -> the study that it is of, and the name of the score.

        Tasks without `tests` are the columns of one table; one with tests is a table of its own.
        """
        tables: dict[str, dict[str, tuple[Study, str]]] = {}
        for task, study in self.studies.items():
            if study.tests:
                tables[task] = {test: (study, f"eval_{test}") for test in study.tests}
            else:
                tables.setdefault(self.recipe.title, {})[task] = (study, study.metric)
        return tables


def load_recipe(
    name: str,
    overrides: Sequence[str] = (),
    options: Sequence[str] = (),
    *,
    only: Iterable[str] = (),
    smoke: bool = False,
) -> Reproduction:
    """Read a recipe, apply overrides, and reduce it to what is to be run.

    Args:
        name: one of `RECIPES`, or the path of a YAML file.
        overrides: command-line words, ``--key value`` or ``--key=value`` with dotted keys, which replace keys of the
            file.
        options: the options of the command, to suggest for a mistyped one.
        only: names of tasks and methods to run, of each kind all if none is named.
        smoke: whether to run a few steps on a few examples, with one seed and one rate, in a folder of its own.

    Raises:
        InputError: there is no such recipe, task or method, or a key or value is invalid.
    """
    if name in RECIPES:
        content = parse_yaml(recipe_text(name))
    elif Path(name).suffix in (".yaml", ".yml"):
        content = read_yaml(Path(name), "recipe")
    else:
        raise InputError(f"{name!r} is neither one of {', '.join(RECIPES)} nor a .yaml file")
    pairs = parsed_overrides(overrides, options)
    refuse_repeated([key for key, _ in pairs])
    known = [*Recipe.model_fields, *Study.model_fields]
    for key, value in pairs:
        section = key.partition(".")[0]
        check_keys("", [section], known)
        named = as_written(content, key)
        _check_named(named, content)
        set_dotted(content, named, value)
        if section in Study.model_fields and section != "methods":
            set_dotted(content.setdefault("smoke", {}), named, value)  # beats what the recipe makes small
    _check_paper(content)
    if smoke:
        content = _smoke(content)
    wanted = list(only)
    for names in (content.get("tasks") or {}, content.get("methods") or {}):
        if smoke and not set(wanted) & set(names):
            wanted += [name for name in content["smoke"].get("only", []) if name in names]
    return Reproduction(_reduced(content, wanted))


def recipe_text(name: str) -> str:
    """The text of a recipe that comes with the package.

    Args:
        name: one of `RECIPES`.
    """
    return files("scalora.studies.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def write_recipe(name: str, path: Path) -> None:
    """Write a recipe to a file, to be changed there.

    Args:
        name: one of `RECIPES`, or the path of a YAML file.
        path: the file, which must not exist yet.

    Raises:
        InputError: the file exists, or there is no such recipe.
        OSError: it can't be written.
    """
    if path.exists():
        raise InputError(f"--write {str(path)!r} exists already: choose another")
    text = recipe_text(name) if name in RECIPES else Path(name).read_text(encoding="utf-8")
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def reproduction_of(folder: Path) -> Reproduction:
    """The table that was run in a folder, even if the folder has been moved since.

    Args:
        folder: the folder of the table.

    Raises:
        InputError: the folder holds no valid recipe.
    """
    if not (folder / REPRODUCTION_FILE).is_file():
        raise InputError(f"{str(folder)!r} holds no {REPRODUCTION_FILE}: it is not the folder of a table")
    return Reproduction(read_yaml(folder / REPRODUCTION_FILE, "recipe") | {"output_dir": str(folder)})


def _check_named(key: str, content: Mapping[str, Any]) -> None:
    """Check that the task or test that a dotted key names is in the recipe."""
    section, *rest = key.split(".")
    names = content.get(section) or {}
    if section in ("tasks", "tests") and rest and rest[0] not in names:
        raise InputError(f"--{key}: {section} has no {rest[0]!r}; it has {', '.join(names)}")


def _smoke(content: Mapping[str, Any]) -> dict[str, Any]:
    """One seed, the first rate of each method, and what the recipe itself makes small."""
    overrides = {key: value for key, value in content.get("smoke", {}).items() if key != "only"}

    def with_first_rates(section: Mapping[str, Any] | None) -> dict[str, Any]:
        small = dict(section or {})
        if rates := small.get("learning_rates"):
            small["learning_rates"] = rates[:1]
        if methods := small.get("methods"):
            small["methods"] = {name: with_first_rates(method) for name, method in methods.items()}
        return small

    small = with_first_rates(content) | {"seeds": content["seeds"][:1], "tuning_seeds": None}
    small["output_dir"] = f"{content['output_dir']}-smoke"
    # What is small for all tasks is not to be undone by one.
    small["tasks"] = {task: merged(with_first_rates(own), overrides) for task, own in content["tasks"].items()}
    return merged(small, overrides)


def _check_paper(content: Mapping[str, Any]) -> None:
    """Raise `InputError` for a figure of a table, method or column that the recipe does not have."""
    tables: dict[str, list[str]] = {}
    for task, own in (content.get("tasks") or {}).items():
        if tests := merged(dict(content), own).get("tests"):
            tables[task] = [*tests, AVERAGE]
        else:
            tables.setdefault(str(content.get("title")), [AVERAGE]).append(task)
    for title, rows in (content.get("paper") or {}).items():
        where, known = f"paper.{title}", list(tables)
        if title in tables:
            for method, figures in rows.items():
                check_keys("paper: method ", [method], content.get("methods") or {})
                check_keys(f"{where}.{method}.", figures, tables[title])
        else:
            check_keys("paper: table ", [title], known)


def _reduced(content: dict[str, Any], only: Sequence[str]) -> dict[str, Any]:
    tasks, methods = content.get("tasks") or {}, content.get("methods") or {}
    for name in only:
        if name not in tasks and name not in methods:
            raise InputError(
                f"--only {name}: there is no such task or method; the tasks are {', '.join(tasks)}, the methods "
                f"{', '.join(methods)}"
            )

    def chosen(section: Mapping[str, Any], every: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in section.items() if name in only or not set(only) & set(every)}

    # A task may have its own rates for a method.
    own = {
        name: {**task, "methods": chosen(task["methods"], methods)} if task and "methods" in task else task
        for name, task in chosen(tasks, tasks).items()
    }
    left = chosen(methods, methods)
    baseline = content.get("baseline", Study.model_fields["baseline"].default)
    if set(only) & set(methods) and baseline not in left:
        baseline = next(iter(left))  # the table compares with the paper in any case
    return {**content, "tasks": own, "methods": left, "baseline": baseline}
