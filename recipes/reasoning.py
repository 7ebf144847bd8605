"""Writes the data for the studies: a task from reasoning-gym, with generated questions and exact answers.

    python recipes/reasoning.py family_relationships runs/family --train 9600 --eval 1000 --classify
    python recipes/reasoning.py chain_sum runs/sums --train 2000 --eval 200 --option max_terms=3

Writes prompt and completion for a language model or, with --classify, text and label for a classifier. reasoning-gym
counts its seeds up from the data set's, and the two data sets start far apart, so training and evaluation data never
overlap.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import reasoning_gym
import yaml

_SEEDS = {"train": 0, "eval": 1_000_000_000}


def example(entry: dict[str, Any], *, classify: bool) -> dict[str, str]:
    """Return one row: prompt and completion, or text and label."""
    question = entry["question"].strip()
    if classify:
        return {"text": question, "label": entry["answer"]}
    return {"prompt": question, "completion": "\n" + entry["answer"]}


def main() -> None:
    """Write ``train.jsonl`` and ``eval.jsonl``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="name of the task in reasoning-gym")
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--train", type=int, default=9600, help="training examples (default: %(default)s)")
    parser.add_argument("--eval", type=int, default=500, help="evaluation examples (default: %(default)s)")
    parser.add_argument("--classify", action="store_true", help="write text and label instead of prompt and completion")
    parser.add_argument("--option", action="append", default=[], help="a task option as key=value; repeatable")
    arguments = parser.parse_args()
    options = {key: yaml.safe_load(value) for key, value in (option.split("=", 1) for option in arguments.option)}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for split, size in (("train", arguments.train), ("eval", arguments.eval)):
        entries = reasoning_gym.create_dataset(arguments.task, size=size, seed=_SEEDS[split], **options)
        with (arguments.folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for entry in entries:
                file.write(json.dumps(example(entry, classify=arguments.classify), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
