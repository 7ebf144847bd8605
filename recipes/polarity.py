"""Writes the data for the classification and regression recipes: film-review sentences, each rated by twenty people.

The 10,605 sentences and their mean ratings (-4 … 4) come from the source package of vaderSentiment 0.5 on PyPI (Hutto
and Gilbert, ICWSM 2014; sentences from Pang and Lee, 2004). Half of them are positive.

    python recipes/polarity.py runs/polarity
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
from pathlib import Path

from pypi import package_archive

_TRAIN, _EVAL = 3200, 1600


def rated_sentences() -> list[tuple[float, str]]:
    """Download with pip; return (mean rating, sentence) for each sentence."""
    with package_archive("vaderSentiment==0.5", source=True) as archive:
        resources = archive.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(resources)) as archive:
        file = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert file is not None
        lines = file.read().decode("latin-1").splitlines()
    return [(float(score), text) for _, score, text in (line.split("\t") for line in lines)]


def main() -> None:
    """Shuffle with a fixed seed and write ``train.jsonl`` and ``eval.jsonl``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    sentences = rated_sentences()
    random.Random(0).shuffle(sentences)
    for name, part in {"train": sentences[:_TRAIN], "eval": sentences[_TRAIN : _TRAIN + _EVAL]}.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for score, text in part:
                label = "positive" if score > 0 else "negative"
                file.write(json.dumps({"text": text, "label": label, "score": score}) + "\n")


if __name__ == "__main__":
    main()
