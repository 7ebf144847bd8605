"""Puts what `gpu.cities` needs on a GPU into one folder of under 60 MB: the base model in float16, and data.

    python -m gpu.carry MODEL OUTPUT runs/cities runs/facts

Weights are rounded to float16 (by at most 0.05 %), and loaded as float32 again.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModel

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def main(arguments: list[str] | None = None) -> None:
    """Write the folder.

    Args:
        arguments: those of the command line, for tests.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("output", type=Path, help="folder to write: the model in 'model', tasks under their names")
    parser.add_argument("data", type=Path, nargs="+", help="folders with train.jsonl and eval.jsonl")
    options = parser.parse_args(arguments)
    AutoModel.from_pretrained(options.model, dtype=torch.float16).save_pretrained(options.output / "model")
    # The tokenizer's files as they are: a version of Transformers may not read what a later one writes.
    for name in _TOKENIZER_FILES:
        if (file := options.model / name).is_file():
            shutil.copyfile(file, options.output / "model" / name)
    for folder in options.data:
        (options.output / folder.name).mkdir(exist_ok=True)
        for name in ("train.jsonl", "eval.jsonl"):
            shutil.copyfile(folder / name, options.output / folder.name / name)
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    print(f"{options.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
