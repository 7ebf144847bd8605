"""Writes the data for a study of capacity: made-up names, each with a number that has to be learned by heart.

A name has nothing to do with its number, so a model can only memorise: N facts with one of K numbers hold N·log₂K bits,
which N and K set freely. Every name is in the training data once in each of twelve sentence templates, in random order,
and is asked for in two templates that are not in it. The score thus measures how many facts were memorised, not how
many sentences.

    python recipes/facts.py runs/facts
    python recipes/facts.py runs/facts-8000 --facts 8000
    python recipes/facts.py runs/facts-completion --completion    # for a language model, which answers with the number

The default, 1,600 facts, is one pass in 600 steps of 32. Names and numbers are drawn with a fixed seed, one fact after
the other: the first 1,600 of 8,000 facts are the default's.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

_CONSONANTS, _VOWELS, _SYLLABLES = "bdfghjklmnprstvwz", "aeiou", 3
_NAMES = (len(_CONSONANTS) * len(_VOWELS)) ** _SYLLABLES

_LEARNED = (
    "{} was born in the spring.",
    "They met {} last week.",
    "A letter from {} came late again.",
    "We spent the weekend with {}.",
    "The doctor has not seen {} since.",
    "He asked {} for advice.",
    "This story is about {}.",
    "A house was built for {}.",
    "{} sold the old boat.",
    "Nobody can sing like {}.",
    "My cousin works with {}.",
    "The bill was paid by {}.",
)
_ASKED = ("Have you ever heard of {}?", "The concert was given by {}.")


def names(draw: random.Random) -> Iterator[str]:
    """Yield names of three syllables, none of them twice.

    Args:
        draw: the source of randomness.
    """
    seen = set()
    while True:
        name = "".join(draw.choice(_CONSONANTS) + draw.choice(_VOWELS) for _ in range(_SYLLABLES)).capitalize()
        if name not in seen:
            seen.add(name)
            yield name


def facts(count: int, classes: int) -> list[tuple[str, int]]:
    """Return (name, number) for each fact; a longer list begins with the shorter one of as many classes.

    Args:
        count: how many facts.
        classes: how many numbers there are, from 0; each fact has one of them with equal probability.
    """
    draw = random.Random(0)
    return [(name, draw.randrange(classes)) for name in islice(names(draw), count)]


def example(sentence: str, name: str, number: int, *, completion: bool) -> dict[str, Any]:
    """Return one row: text and label, or prompt and completion.

    Args:
        sentence: the template, with ``{}`` for the name.
        name: the made-up name.
        number: what is to be learned about it.
        completion: whether to write prompt and completion.
    """
    text = sentence.format(name)
    if completion:
        return {"prompt": f"{text} Number:", "completion": f" {number}"}
    return {"text": text, "label": number}


def main() -> None:
    """Write ``train.jsonl`` and ``eval.jsonl``, and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--facts", type=int, default=1600, help="facts to memorise (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=32, help="numbers that a fact can have (default: %(default)s)")
    # 800 answers put the standard error of a share below 2 points, and take seconds.
    parser.add_argument("--eval", type=int, default=800, help="names to ask for, at most (default: %(default)s)")
    parser.add_argument("--completion", action="store_true", help="write prompts and completions, not texts and labels")
    arguments = parser.parse_args()
    if not 1 <= arguments.facts <= _NAMES:
        parser.error(f"--facts {arguments.facts}: must be from 1 to {_NAMES}, as many as there are names")
    if arguments.classes < 2:
        parser.error(f"--classes {arguments.classes}: must be at least 2, or there is nothing to learn")
    known, draw = facts(arguments.facts, arguments.classes), random.Random(1)
    train = [(sentence, *fact) for fact in known for sentence in _LEARNED]
    draw.shuffle(train)
    asked = draw.sample(known, min(arguments.eval, len(known)))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("eval", [(draw.choice(_ASKED), *fact) for fact in asked])):
        with (arguments.folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(example(*row, completion=arguments.completion)) + "\n")
    bits = len(known) * math.log2(arguments.classes)
    print(
        f"{len(known):,} facts of {arguments.classes} classes ({bits:,.0f} bits): {len(train):,} training rows, "
        f"{len(asked):,} evaluation rows in {arguments.folder}"
    )


if __name__ == "__main__":
    main()
