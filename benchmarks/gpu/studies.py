"""Studies over methods, learning rates and seeds as a stream of runs: no method waits for another.

A file of studies is JSON: by the study's name, keys of a run (`gpu.classify`) that all its runs have in common, and

- ``methods``: by the method's name, keys of a run that are different for it, ``rates`` and ``seeds`` among them
- ``rates``: learning rates to try; the one with the lowest evaluation loss is the method's
- ``tuning_seeds``, ``seeds``: seeds on which rates are tried, and those that are reported
- ``shares``: shares of the steps, each with a schedule of its own; 1 is the study itself
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Run = dict[str, Any]

FILE = "cities.jsonl"
"""The file of results: a line for each run."""

_OF_STUDY = ("methods", "rates", "tuning_seeds", "seeds", "shares")


class Cell(NamedTuple):
    """The place of a run in the studies.

    Attributes:
        study: name of the study.
        method: name of the method in it.
        rate: learning rate.
        seed: seed.
        share: share of the study's steps.
    """

    study: str
    method: str
    rate: float
    seed: int
    share: float


class Studies:
    """The studies of a file, with the results so far.

    Args:
        studies: the file's content.
        results: results by cell, of an earlier attempt; None for a failed run.

    Raises:
        ValueError: a study lacks something that its runs need; the message names it.
    """

    def __init__(self, studies: dict[str, dict[str, Any]], results: dict[Cell, dict[str, Any] | None]) -> None:
        self._studies = studies
        self.results = dict(results)
        self._given_out: set[Cell] = set()
        for name, study in studies.items():
            for key in ("task", "methods", "rates", "seeds", "steps", "batch", "warmup", "head_rate"):
                if key not in study:
                    raise ValueError(f"study {name!r} lacks {key!r}")

    @classmethod
    def read(cls, *paths: Path) -> Studies:
        """Read files of studies, which are done in the order of the files.

        Args:
            paths: the files. A study that several of them have is that of the last one.
        """
        studies: dict[str, dict[str, Any]] = {}
        for path in paths:
            studies |= json.loads(path.read_text(encoding="utf-8"))
        return cls(studies, {})

    def names(self) -> list[str]:
        """Names of the studies."""
        return list(self._studies)

    def methods(self, study: str) -> list[str]:
        """Names of a study's methods.

        Args:
            study: its name.
        """
        return list(self._studies[study]["methods"])

    def settings(self, study: str, method: str) -> dict[str, Any]:
        """Everything that is set for a method of a study.

        Args:
            study: name of the study.
            method: name of the method.
        """
        common = self._studies[study]
        defaults = {"shares": [1], "tuning_seeds": common["seeds"][:1]}
        return defaults | common | common["methods"][method]

    def run(self, cell: Cell) -> Run:
        """The run of a cell, for `gpu.classify.train`.

        Args:
            cell: the cell.
        """
        settings = self.settings(cell.study, cell.method)
        steps, warmup = (max(1, round(cell.share * settings[key])) for key in ("steps", "warmup"))
        run = {key: value for key, value in settings.items() if key not in _OF_STUDY}
        return run | {"rate": cell.rate, "seed": cell.seed, "steps": steps, "warmup": warmup}

    def best_rate(self, study: str, method: str) -> float | None:
        """The rate with the lowest mean evaluation loss on the tuning seeds; None if some are not finished.

        Args:
            study: name of the study.
            method: name of the method.
        """
        settings = self.settings(study, method)
        losses = {}
        for rate in settings["rates"]:
            cells = [Cell(study, method, rate, seed, 1) for seed in settings["tuning_seeds"]]
            if any(cell not in self.results for cell in cells):
                return None
            found = [(self.results[cell] or {}).get("loss", math.nan) for cell in cells]
            losses[rate] = sum(found) / len(found)
        finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
        return min(finite, key=finite.__getitem__) if finite else None

    def next_cell(self) -> Cell | None:
        """The next run to do, which is then given out; None if there is none at the moment.

        Rates first, then the seeds one by one over all methods, so that all have as many when the time is over.
        """
        cell = next((cell for cell in self._ready() if cell not in self.results and cell not in self._given_out), None)
        if cell is not None:
            self._given_out.add(cell)
        return cell

    def _ready(self) -> Iterator[Cell]:
        for study in self._studies:
            every = {method: self.settings(study, method) for method in self.methods(study)}
            for method, settings in every.items():
                for seed in settings["tuning_seeds"]:
                    yield from (Cell(study, method, rate, seed, 1) for rate in settings["rates"])
            best = {method: self.best_rate(study, method) for method in every}
            places = max(len(settings["seeds"]) for settings in every.values())
            for place in range(places):
                for method, settings in every.items():
                    rate = best[method]
                    if rate is not None and place < len(settings["seeds"]):
                        seed = settings["seeds"][place]
                        yield from (Cell(study, method, rate, seed, share) for share in settings["shares"])
