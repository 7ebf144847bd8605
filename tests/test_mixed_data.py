"""Training data of several sets, mixed by weights, and streamed."""

import json
import shutil
from collections import Counter
from itertools import islice

import pandas
import pytest
import torch
from conftest import pairs
from safetensors.torch import load_file
from test_trl_tasks import interrupt, preferences, refused, scalora, write_config

from scalora.runs.data import examples_of, load_sets
from scalora.runs.errors import InputError
from scalora.runs.mixing import mixed
from scalora.runs.sections import DataSettings
from scalora.runs.streams import Stream


def numbered(name, count):
    return [{"prompt": f"{name} {i}", "completion": "x"} for i in range(count)]


def files(write_jsonl, *counts):
    return [str(write_jsonl(f"{name}.jsonl", numbered(name, n))) for name, n in zip("abc", counts, strict=False)]


def order(value):
    rows, name = load_sets(value, "train")
    return [row["prompt"] for row in mixed(rows, name, value, seed=3)]


def test_a_list_of_sets_is_all_of_their_examples_in_a_random_order(write_jsonl):
    found = order(files(write_jsonl, 40, 10))
    assert Counter(found) == Counter(row["prompt"] for row in numbered("a", 40) + numbered("b", 10))
    assert any(text.startswith("b") for text in found[:20])
    assert order(files(write_jsonl, 40)) == [row["prompt"] for row in numbered("a", 40)]  # one set: as it stands


def test_sets_with_weights_have_their_shares_and_an_epoch_has_every_example(write_jsonl):
    a, b, c = files(write_jsonl, 600, 30, 10)
    found = order({a: 6, b: 3, c: 1})
    counts = Counter(text[0] for text in found)
    assert set(found) == {row["prompt"] for name, n in (("a", 600), ("b", 30), ("c", 10)) for row in numbered(name, n)}
    for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
        assert counts[name] / len(found) == pytest.approx(share, abs=0.05)
    assert counts["a"] == 600  # the set that takes longest is seen once
    each = Counter(text for text in found if text.startswith("b"))
    assert max(each.values()) - min(each.values()) <= 1
    assert order({a: 6, b: 3, c: 1}) == found


def test_the_first_examples_are_those_of_each_set(write_jsonl):
    a, b = files(write_jsonl, 40, 10)
    data = DataSettings(train={a: 1, b: 3}, first=4)
    rows, name = examples_of(data, data.train, "train")
    wanted = {row["prompt"] for row in numbered("a", 4) + numbered("b", 4)}
    assert {row["prompt"] for row in rows} == wanted
    assert {row["prompt"] for row in mixed(rows, name, data.train, seed=3)} == wanted


def test_errors_name_the_set_and_its_own_row(causal_folder, write_jsonl, tmp_path):
    good, bad = (
        write_jsonl("good.jsonl", pairs(3)),
        write_jsonl("bad.jsonl", [*pairs(2), {"prompt": "a", "completion": 1}]),
    )
    config = write_config(tmp_path, "sft", causal_folder, {str(good): 1, str(bad): 2})
    assert f"data {str(bad)!r}, row 3: column 'completion' is 1, not a text" in refused("train", config)
    bad.write_text("".join(json.dumps(row) + "\n" for row in [*pairs(1), {"prompt": "a", "completion": " "}]))
    assert f"data {str(bad)!r}, row 2: column 'completion' is ' '" in refused("train", config)
    for value, words in (
        ({str(good): 0}, "the weight of"),
        ([], "write a file or hub id, or a list of them, or names with weights"),
        ({"a.jsonl": "much"}, "must be a number above 0"),
    ):
        assert words in refused("train", write_config(tmp_path, "sft", causal_folder, value))
    config = write_config(tmp_path, "sft", causal_folder, good, data={"eval": {str(good): 1}})
    assert "data.eval={" in refused("train", config)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_stream_has_the_examples_of_its_files_over_and_over(suffix, tmp_path):
    frame, path = pandas.DataFrame(preferences(5)), tmp_path / f"rows.{suffix}"
    {
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "csv": lambda: frame.to_csv(path, index=False),
        "parquet": lambda: frame.to_parquet(path),
    }[suffix]()
    stream = Stream(DataSettings(train=str(path), streaming=True, shuffle_buffer=1), "dpo", seed=0)
    assert list(islice(stream.examples(stream.head()), 12)) == (preferences(5) * 3)[:12]


def test_streams_are_mixed_by_weights_shuffled_and_the_same_again(write_jsonl):
    a, b = files(write_jsonl, 50, 3)
    stream = Stream(DataSettings(train={a: 3, b: 1}, streaming=True, shuffle_buffer=20), "sft", seed=0)
    found = [row["prompt"] for row in islice(stream.examples(stream.head()), 800)]
    assert sum(text.startswith("b") for text in found) / 800 == pytest.approx(0.25, abs=0.05)
    assert found[:10] != sorted(found[:10], key=lambda text: int(text[2:]))
    assert found == [row["prompt"] for row in islice(stream.examples(stream.head()), 800)]


def test_a_stream_reads_no_more_than_it_needs(write_jsonl):
    path = write_jsonl("long.jsonl", numbered("a", 1500))
    with path.open("a") as file:
        file.write('{"prompt": "broken"\n')
    stream = Stream(DataSettings(train=str(path), streaming=True, shuffle_buffer=1), "sft", seed=0)
    rows = iter(stream.examples(stream.head()))
    assert len(list(islice(rows, 1500))) == 1500
    with pytest.raises(InputError, match=r"long\.jsonl' can't be read as json: line 1501"):
        next(rows)
    path.write_text(json.dumps(numbered("a", 2)))
    with pytest.raises(InputError, match="a list can't be streamed: write one object per line"):
        stream.head()


@pytest.mark.slow
def test_a_streamed_run_is_that_of_the_same_examples_in_memory_also_when_it_is_resumed(
    causal_folder, write_jsonl, tmp_path
):
    train = write_jsonl("train.jsonl", pairs(12))
    more = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}  # beyond the end of the file
    config = write_config(
        tmp_path, "sft", causal_folder, train, training=more | {"train_sampling_strategy": "sequential"}
    )
    scalora("train", config)
    loaded = load_file(tmp_path / "run" / "model" / "model.safetensors")
    shutil.rmtree(tmp_path / "run")
    config = write_config(
        tmp_path, "sft", causal_folder, train, training=more, data={"streaming": True, "shuffle_buffer": 1}
    )
    assert "6 of 4 examples\n" in scalora("train", config, "--dry-run")
    scalora("train", config)
    for resume in ([], ["--resume"]):
        if resume:
            interrupt(tmp_path / "run", 4)
            scalora("train", config, *resume)
        streamed = load_file(tmp_path / "run" / "model" / "model.safetensors")
        assert all(torch.equal(streamed[name], loaded[name]) for name in loaded)
    interrupt(tmp_path / "run", 4)
    write_jsonl("train.jsonl", pairs(11))
    assert "data.train has changed since the run to resume began (first 12 examples then" in refused(
        "train", config, "--resume"
    )
