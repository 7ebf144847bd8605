"""Data sets of the hub by configuration and split, from folders in the same form; GLUE's pairs and scores."""

import math

import numpy as np
import pytest
from stand_ins import hub_folder
from transformers import EvalPrediction

from scalora.runs.data import examples_of, hub_name, load_examples, tokenized_for_classification
from scalora.runs.errors import InputError
from scalora.runs.scores import classification_scores, regression_scores
from scalora.runs.sections import DataSettings
from scalora.runs.settings import checked_settings
from scalora.runs.streams import Stream

NAMES = {
    "nyu-mll/glue:mnli@validation_matched": ("nyu-mll/glue", "mnli", "validation_matched"),
    "openai/gsm8k:main": ("openai/gsm8k", "main", None),
    "a/b@train[:-500]": ("a/b", None, "train[:-500]"),
    "a/b@train[:10]+train[20:30]": ("a/b", None, "train[:10]+train[20:30]"),
    "wikimedia/wikipedia:20231101.cy@train": ("wikimedia/wikipedia", "20231101.cy", "train"),
    "/home/me@work/c:d/data": ("/home/me@work/c:d/data", None, None),
    "plain/name": ("plain/name", None, None),
}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_name_says(name):
    assert hub_name(name) == NAMES[name]


def rows(start, count):
    return [{"text": f"{start + i}"} for i in range(count)], None


@pytest.fixture
def folder(tmp_path):
    sets = {"one": {"train": rows(0, 8), "validation": rows(50, 3)}, "two": {"train": rows(100, 5)}}
    return hub_folder(tmp_path / "data", sets)


@pytest.mark.parametrize(
    ("end", "first", "count"),
    [
        (":one", "0", 8),
        (":one@validation", "50", 3),
        (":two@train[1:3]", "101", 2),
        (":one@train[-2:]+train[:1]", "6", 3),
        (":one@train[:25%]", "0", 2),
    ],
)
def test_a_folder_is_loaded_as_the_hub_would_be(folder, end, first, count):
    found = load_examples(f"{folder}{end}", "train")
    assert (found[0]["text"], len(found)) == (first, count)


def test_what_a_folder_does_not_have_is_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"no split 'eval'; it has train, validation: name one"):
        load_examples(f"{folder}:one", "eval")
    with pytest.raises(InputError, match=r"loading it failed: .*three"):
        load_examples(f"{folder}:three@train", "train")
    with pytest.raises(InputError, match=r"a file has no configurations and splits; write '.*README\.jsonl'"):
        load_examples(f"{tmp_path}/README.jsonl@train", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"does not exist as a file, and loading it failed"):
        load_examples(str(tmp_path / "empty"), "train")


def test_folders_of_one_name_are_not_taken_for_each_other(tmp_path):
    for number in (1, 2):
        hub_folder(tmp_path / str(number) / "data", {"default": {"train": rows(number, 1)}})
    found = [load_examples(str(tmp_path / str(number) / "data"), "train")[0]["text"] for number in (1, 2)]
    assert found == ["1", "2"]
    hub_folder(tmp_path / "1" / "data", {"default": {"train": rows(7, 1)}})  # it has changed
    assert load_examples(str(tmp_path / "1" / "data"), "train")[0]["text"] == "7"


def test_the_first_examples_and_streams_of_a_folder(folder):
    few = DataSettings(train=f"{folder}:one@train", first=3)
    assert examples_of(few, few.train, "train").rows["text"][:] == ["0", "1", "2"]
    streamed = DataSettings(
        train=f"{folder}:two@train", streaming=True, prompt="{{ text }}?", completion="!", shuffle_buffer=1
    )
    assert Stream(streamed, "sft", seed=0).head().rows["prompt"][:] == ["100?", "101?", "102?", "103?", "104?"]
    endless = iter(Stream(streamed, "sft", seed=0).examples(Stream(streamed, "sft", seed=0).head()))
    assert [next(endless)["prompt"] for _ in range(6)] == ["100?", "101?", "102?", "103?", "104?", "100?"]
    content = {"model": "m", "data": {"train": "a/b", "streaming": True, "first": 3}, "training": {"max_steps": 1}}
    with pytest.raises(InputError, match=r"data\.first=3: a stream is as long as"):
        checked_settings(content)
    with pytest.raises(InputError, match=r"data\.prompt: only task: sft takes templates"):
        checked_settings({"model": "m", "task": "classification", "data": {"prompt": "a", "completion": "b"}})


@pytest.mark.parametrize(("pair", "error"), [(["", "b"], None), (["a", ""], None), (["", " "], "must be a text")])
def test_one_text_of_a_pair_may_be_empty(pair, error, write_jsonl, tokenizer):
    path = str(write_jsonl("pairs.jsonl", [{"question1": pair[0], "question2": pair[1], "label": 0.5}]))
    data = DataSettings(text="question1", text_pair="question2")
    given = load_examples(path, "train"), path, data, "regression", tokenizer, None, None
    if error is None:
        made = tokenized_for_classification(*given).examples[0]["input_ids"]
        assert made == tokenizer(*pair)["input_ids"]
    else:
        with pytest.raises(InputError, match=error):
            tokenized_for_classification(*given)


def test_scores_of_glue_by_hand():
    # STS-B: of labels 0, 1, 2, 3 and outputs 0, 0, 1, 9. Deviations -1.5, -.5, .5, 1.5 and -2.5, -2.5, -1.5, 6.5.
    pearson = (3.75 + 1.25 - 0.75 + 9.75) / math.sqrt(5 * (6.25 + 6.25 + 2.25 + 42.25))
    # Ranks 1.5, 1.5, 3, 4 against 1, 2, 3, 4: deviations -1, -1, .5, 1.5.
    spearman = (1.5 + 0.5 + 0.25 + 2.25) / math.sqrt(5 * (1 + 1 + 0.25 + 2.25))
    given = EvalPrediction(np.array([[0.0], [0.0], [1.0], [9.0]]), np.array([0.0, 1.0, 2.0, 3.0]))
    scores = regression_scores(given)
    assert scores["pearson"] == pytest.approx(pearson)
    assert scores["spearman"] == pytest.approx(spearman)
    assert scores["correlation"] == pytest.approx((pearson + spearman) / 2)
    # CoLA and MRPC: 5 true positives, 1 false one, 2 true negatives, 2 false ones.
    labels = np.array([1] * 5 + [0] + [0] * 2 + [1] * 2)
    predicted = np.array([1] * 6 + [0] * 4)
    found = classification_scores(EvalPrediction(np.eye(2)[predicted], labels))
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["matthews"] == pytest.approx((5 * 2 - 1 * 2) / math.sqrt(6 * 7 * 3 * 4))
