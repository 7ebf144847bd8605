"""Puts what the parts of ``benchmarks/gpu.sh`` have written together: ``gpu.json`` and ``gpu.md``.

    python -m gpu.report FOLDER

A part that has not written anything is left out.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from gpu.studies import FILE
from scalora.saving.files import atomic_write

_SUMMARY = re.compile(r"^(=+ )?(?P<summary>(\d+ \w+,? ?)+in [\d.]+s)", re.MULTILINE)


def main(arguments: list[str] | None = None) -> None:
    """Write the files.

    Args:
        arguments: those of the command line, for tests.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the parts' results")
    folder: Path = parser.parse_args(arguments).folder
    content: dict[str, Any] = {}
    sections = []
    if (log := folder / "tests.log").is_file():
        content["tests"] = tests_of(log.read_text(encoding="utf-8"))
        sections += ["## Tests on the GPU", *content["tests"].values()]
    if (steps := folder / "steps.json").is_file():
        content["steps"] = json.loads(steps.read_text(encoding="utf-8"))
        sections += ["## Steps", (folder / "steps.md").read_text(encoding="utf-8").strip()]
    if (cities := folder / FILE).is_file():
        content["cities"] = [json.loads(line) for line in cities.read_text(encoding="utf-8").splitlines()]
        sections += ["## Training"]
        if (tables := folder / "cities.md").is_file():
            sections += [tables.read_text(encoding="utf-8").strip()]
    with atomic_write(folder / "gpu.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    with atomic_write(folder / "gpu.md") as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def tests_of(log: str) -> dict[str, str]:
    """What pytest says at the end, and the tests that failed.

    Args:
        log: its output.
    """
    found = list(_SUMMARY.finditer(log))
    failed = re.findall(r"^(?:FAILED|ERROR) .*$", log, re.MULTILINE)
    summary = found[-1]["summary"] if found else "pytest did not come to an end"
    return {"summary": summary} | ({"failed": "\n".join(f"- {line}" for line in failed)} if failed else {})


if __name__ == "__main__":
    main()
