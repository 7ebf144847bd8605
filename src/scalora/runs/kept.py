"""`Kept`: what an evaluation has found so far, and the outputs for each example that it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from scalora.parallel.job import is_first
from scalora.parallel.processes import process_rank
from scalora.runs.errors import InputError
from scalora.runs.run_folder import as_json, check_output, json_lines, replace_text, write_json
from scalora.runs.track import of_all

RESULTS_FILE = "results.json"
"""The scores, written last: an evaluation whose folder has it is finished."""

_UNFINISHED = "unfinished-*.jsonl"


_OWN = (RESULTS_FILE, "samples_*.jsonl", "unfinished-*", ".*")


def check_folder(folder: Path, keys: set[str]) -> None:
    """Check that an evaluation's folder is new, empty or that of another evaluation of its kind.

    Args:
        folder: what ``--output`` names; need not exist.
        keys: keys that the scores of its kind have.

    Raises:
        InputError: there is something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {str(folder)!r} is neither a folder nor a .json file: choose another name")
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if not any(path.match(pattern) for pattern in _OWN):
            raise InputError(
                f"--output {str(folder)!r} holds {path.name!r}, which is nothing of an evaluation: choose a folder of "
                "its own"
            )
    check_output(folder / RESULTS_FILE, "--output", keys)


class Kept:
    """Outputs of a model by keys, in memory and, with a folder, on the disk as soon as they are added.

    In a job of several processes, each writes a file of its own, and all know of all outputs from `exchange` on.

    Args:
        folder: the folder of the evaluation, which is created. None: nothing is written.
        identity: what outputs depend on besides their keys. What was kept under another identity is dropped.

    Raises:
        InputError: the folder holds results of something else.
    """

    def __init__(self, folder: Path | None = None, identity: str = "") -> None:
        self._folder = folder
        self._found: dict[str, Any] = {}
        self._new: dict[str, Any] = {}
        self._file: IO[str] | None = None
        if folder is None:
            return
        check_folder(folder, {"weights", "examples"})
        folder.mkdir(parents=True, exist_ok=True)
        head = {"of": identity}
        for path in sorted(folder.glob(_UNFINISHED)):
            first, *lines = json_lines(path) or [{}]
            if first == head:
                self._new |= {line["key"]: line["value"] for line in lines}
        self.exchange()
        own = folder / _UNFINISHED.replace("*", str(process_rank()))
        # The first writes all of them before the others empty their files: one that is killed here loses nothing.
        if is_first():
            replace_text(own, "".join(map(_line, [head, *self._entries(self._found)])))
        of_all([])
        if not is_first():
            replace_text(own, _line(head))
        self._file = own.open("a", encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Any:
        return self._found[key]

    def add(self, found: Mapping[str, Any]) -> None:
        """Keep some outputs.

        Args:
            found: the outputs, as JSON has them, by their keys.
        """
        self._found |= found
        self._new |= found
        if self._file is not None:
            self._file.writelines(map(_line, self._entries(found)))
            self._file.flush()

    def exchange(self) -> None:
        """Have all processes of a job know what each of them has added."""
        self._found |= dict(of_all(list(self._new.items())))
        self._new = {}

    def write(self, metric: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the outputs for each example, one JSON object per line.

        Args:
            metric: the score that they belong to.
            rows: the outputs.
        """
        if self._folder is not None and is_first():
            lines = (json.dumps(as_json(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
            replace_text(self._folder / f"samples_{metric}.jsonl", "".join(lines))

    def finish(self, scores: Mapping[str, Any]) -> None:
        """Write the scores, and remove what only an unfinished evaluation needs.

        Args:
            scores: the scores by name.
        """
        if self._folder is None or self._file is None:
            return
        self._file.close()
        of_all([])
        if is_first():
            write_json(self._folder / RESULTS_FILE, scores)
            for path in self._folder.glob(_UNFINISHED):
                path.unlink()

    @staticmethod
    def _entries(found: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"key": key, "value": value} for key, value in found.items()]


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"
