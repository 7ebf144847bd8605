"""Whether the finished cells of a study are what the study would run now, on the same examples."""

from __future__ import annotations

import json
from typing import Any

from scalora.runs.errors import InputError
from scalora.runs.run_folder import ENVIRONMENT_FILE
from scalora.runs.settings import Settings, run_settings
from scalora.runs.yaml_file import parse_yaml
from scalora.studies.cell_tests import config_file, scores_file
from scalora.studies.cells import summary_of
from scalora.studies.study import Cell, Study


def check_finished_cells(study: Study) -> None:
    """Check that the finished cells are those that would be run now.

    Args:
        study: the study.

    Raises:
        InputError: one was run with other settings than it would be run with now, or on other examples than another.
    """
    for cell in _cells(study):
        if summary_of(cell) is None:
            continue
        before, now = map(compared, (run_settings(cell.folder), cell.settings))
        for key in [*now, *before]:
            if before.get(key) != now.get(key):
                raise InputError(
                    f"{str(cell.folder)!r} was run with {key}={before.get(key)!r}, but the study now has "
                    f"{now.get(key)!r}: choose another output_dir, or delete that folder to run it again"
                )
        for test, content in cell.tests.items():
            earlier = parse_yaml(config_file(cell, test).read_text(encoding="utf-8"))
            if _tested(earlier) != _tested(content):
                raise InputError(
                    f"{str(config_file(cell, test))!r} is not what the study now has in tests.{test}: choose another "
                    f"output_dir, or delete that file and the folder {scores_file(cell, test).parent.name!r} to do the "
                    "test again"
                )

    check_same_data(study)


def check_same_data(study: Study) -> None:
    """Check that cells with the same settings for data were run on the same examples, which a file may lose.

    Args:
        study: the study.

    Raises:
        InputError: two finished cells were not.
    """
    first: dict[str, tuple[Cell, Any]] = {}
    for cell in _cells(study):
        if cell.settings.data.streaming or summary_of(cell) is None or (examples := _examples(cell)) is None:
            continue
        other, theirs = first.setdefault(_data_of(cell), (cell, examples))
        for split in examples:
            if examples[split] != theirs.get(split):
                raise InputError(
                    f"{str(cell.folder)!r} was run on other examples than {str(other.folder)!r}: data.{split} has "
                    "changed between them. Choose another output_dir, or delete the folders of those that were run "
                    "before to run them again"
                )


def _cells(study: Study) -> list[Cell]:
    """All cells that a study may have."""
    seeds = {*study.seeds, *(study.tuning_seeds or [])}
    cells = [study.cell(m, rate, seed) for m in study.methods for rate in study.rates(m) for seed in seeds]
    for rates in zip(*map(study.rates, study.methods), strict=True):
        cells += study.share_cells(dict(zip(study.methods, rates, strict=True)))
    return cells


def _examples(cell: Cell) -> dict[str, Any] | None:
    """What a cell's environment says of its examples; None if it says nothing."""
    try:
        content = json.loads((cell.folder / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    examples = content.get("data") if isinstance(content, dict) else None
    return examples if isinstance(examples, dict) else None


def _data_of(cell: Cell) -> str:
    """What of a cell's settings decides about its examples: the seed, too, in which several sets are mixed."""
    settings = cell.settings
    mixed = not all(isinstance(files, str | None) for files in (settings.data.train, settings.data.eval))
    seeds = (cell.seed, settings.training.get("data_seed")) if mixed else None
    return json.dumps([settings.task, settings.data.model_dump(), seeds], sort_keys=True, default=str)


def _tested(config: dict[str, Any]) -> dict[str, Any]:
    """What of a test's config decides about its score besides the run's own settings."""
    return {key: config.get(key) for key in ("data", "evaluate")}


def compared(settings: Settings) -> dict[str, Any]:
    """What of a cell's settings must not change: not the folder, which may have been moved, nor what was estimated."""
    return _flat(settings.model_dump(exclude={"output_dir", "needs"}))


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys and values as dotted keys and values."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
