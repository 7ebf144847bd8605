"""The tests of a study's cells: sets that a trained model is scored on, each by a `scalora evaluate` of its own.

What they leave is in the folder ``tests`` of the run folder: for each test the config that it was scored with, and a
folder with the outputs for each example and the scores, which are written last. A test that is killed goes on from it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from statistics import mean

from scalora.runs.kept import RESULTS_FILE
from scalora.runs.yaml_file import yaml_dump
from scalora.studies.folder_names import slug
from scalora.studies.study import Cell

_WEIGHTS = ("model", "delta", "adapter")  # what training writes of a model

MEAN = "eval_tests"
"""Name of the mean score over the tests of a cell."""


def missing_tests(cell: Cell) -> list[str]:
    """The tests of a cell that are not done yet.

    Args:
        cell: a cell of a study.
    """
    return [test for test in cell.tests if not scores_file(cell, test).is_file()]


def test_scores(cell: Cell) -> dict[str, float]:
    """The score of each test of a cell, as ``eval_NAME``, and their mean; nothing without tests.

    Args:
        cell: a cell of a study, whose tests are done.
    """
    found = {
        f"eval_{test}": float(json.loads(scores_file(cell, test).read_text(encoding="utf-8"))[cell.score])
        for test in cell.tests
    }
    return found | ({MEAN: mean(found.values())} if found else {})


def test_command(cell: Cell, test: str) -> list[str]:
    """The command that scores a trained model on a test; writes the config that it names.

    Args:
        cell: a cell of a study, whose model is trained.
        test: name of the test.
    """
    config = config_file(cell, test)
    config.parent.mkdir(exist_ok=True)
    config.write_text(yaml_dump(cell.tests[test]), encoding="utf-8")
    output = scores_file(cell, test).parent
    return [sys.executable, "-m", "scalora", "evaluate", str(cell.folder), str(config), "--output", str(output)]


def drop_weights(cell: Cell, *, keep: bool) -> None:
    """Delete the weights of a cell whose tests are done.

    Args:
        cell: the cell.
        keep: whether the study keeps them.
    """
    if cell.tests and not keep:
        for name in _WEIGHTS:
            shutil.rmtree(cell.folder / name, ignore_errors=True)


def config_file(cell: Cell, test: str) -> Path:
    """The config that a test is scored with.

    Args:
        cell: a cell of a study.
        test: name of the test.
    """
    return cell.folder / "tests" / f"{slug(test)}.yaml"


def scores_file(cell: Cell, test: str) -> Path:
    """The scores of a test.

    Args:
        cell: a cell of a study.
        test: name of the test.
    """
    return cell.folder / "tests" / slug(test) / RESULTS_FILE
