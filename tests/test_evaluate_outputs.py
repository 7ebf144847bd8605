"""What `scalora evaluate --output FOLDER` leaves behind: outputs of each example, also where it is killed."""

import json
import os

import pytest
import torch
import yaml
from conftest import WORDS, pairs
from models import tiny_llama
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from scalora.cli import app

METRICS = ["exact_match", "math", "multiple_choice"]


def evaluate(model, config, output):
    return CliRunner().invoke(app, ["evaluate", *map(str, (model, config, "--output", output))])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def write_config(tmp_path):
    def write(name, rows, task="sft", **settings):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        content = {"model": "unused", "task": task, "data": {"eval": str(data)}, "evaluate": settings}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / f"{name}.yaml"

    return write


def questions(count=9):
    return [
        row | {"choices": [f" {word}" for word in WORDS[i : i + 3]], "answer": i % 3}
        for i, row in enumerate(pairs(count))
        if i < 7
    ]


@pytest.fixture
def counted(monkeypatch):
    """The sizes of the batches that models answer and compute logits for, and a place after which the process dies."""
    sizes, dies_at = [], []
    generate, forward = LlamaForCausalLM.generate, LlamaForCausalLM.forward
    inside = []

    def count(size):
        if dies_at and len(sizes) == dies_at[0]:
            os._exit(9)  # as SIGKILL would: nothing is cleaned up
        sizes.append(size)

    def generating(self, input_ids, **options):
        count(len(input_ids))
        inside.append(True)
        try:
            return generate(self, input_ids=input_ids, **options)
        finally:
            inside.pop()

    def computing(self, input_ids=None, **options):
        if not inside:
            count(len(input_ids))
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generating)
    monkeypatch.setattr(LlamaForCausalLM, "forward", computing)
    return sizes, dies_at


def test_outputs_of_each_example_add_up_to_the_scores(causal_folder, write_config, tmp_path):
    rows = questions()
    config = write_config("eval", rows, metrics=METRICS, max_new_tokens=4, batch_size=3)
    result = evaluate(causal_folder, config, tmp_path / "out")
    assert result.exit_code == 0, result.output
    files = [*(f"samples_{metric}.jsonl" for metric in METRICS)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", *files]
    scores = json.loads((tmp_path / "out" / "results.json").read_text())
    for metric in METRICS:
        kept = lines(tmp_path / "out" / f"samples_{metric}.jsonl")
        assert [row["prompt"] for row in kept] == [row["prompt"] for row in rows]
        assert [row["row"] for row in kept] == [*range(1, len(rows) + 1)]
        assert sum(row["right"] for row in kept) / len(kept) == scores[metric]
    answers = {name: lines(tmp_path / "out" / f"samples_{name}.jsonl") for name in METRICS[:2]}
    assert [row["answer"] for row in answers["exact_match"]] == [row["answer"] for row in answers["math"]]
    assert [row["expected"] for row in answers["exact_match"]] == [row["completion"] for row in rows]
    assert sum(not row["finished"] for row in answers["exact_match"]) == scores["exact_match_unfinished"]


def test_a_model_answers_once_for_all_scores_that_compare_answers(causal_folder, write_config, tmp_path, counted):
    sizes, _ = counted
    config = write_config("eval", questions(), metrics=["exact_match", "math"], max_new_tokens=4, batch_size=3)
    assert evaluate(causal_folder, config, tmp_path / "scores.json").exit_code == 0
    assert sum(sizes) == len(questions())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["eval.jsonl", "eval.yaml", "scores.json"]  # a file is a file, and nothing else is written


def test_a_killed_evaluation_goes_on_with_the_same_outputs(causal_folder, write_config, tmp_path, counted):
    sizes, dies_at = counted
    rows = questions()
    config = write_config("eval", rows, metrics=METRICS, max_new_tokens=4, batch_size=2)

    def run(output, model=causal_folder, config=config):
        sizes.clear()
        result = evaluate(model, config, output)
        assert result.exit_code == 0, result.output
        return len(sizes), {path.name: path.read_text() for path in output.iterdir()}

    def killed(output, at):
        sizes.clear()
        child = os.fork()
        if not child:
            dies_at.append(at)
            evaluate(causal_folder, config, output)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert not (output / "results.json").exists()

    batches, whole = run(tmp_path / "whole")
    again, output = batches, tmp_path / "killed"
    for place in (2, 3):  # in the middle of the answers, then among the log-likelihoods
        killed(output, place)
        again -= place
    file = output / "unfinished-0.jsonl"
    file.write_text(file.read_text() + '{"key": "cut o')
    computed, outputs = run(output)
    assert computed == again
    assert outputs == whole

    # What was kept of other weights, or of answers of another length, is of no use.
    other = tmp_path / "other"
    tiny_llama(seed=1, vocab_size=320, eos_token_id=2, pad_token_id=1, initializer_range=0.2).save_pretrained(other)
    AutoTokenizer.from_pretrained(causal_folder).save_pretrained(other)
    killed(tmp_path / "other weights", 3)
    assert run(tmp_path / "other weights", other)[0] == batches
    longer = write_config("longer", rows, metrics=["exact_match"], max_new_tokens=5, batch_size=2)
    killed(tmp_path / "longer", 3)
    assert run(tmp_path / "longer", config=longer)[0] == run(tmp_path / "as long", config=longer)[0]


def test_predictions_and_labels_of_heads(encoder_folder, write_config, tmp_path):
    texts = [f"{WORDS[i]} {WORDS[(3 * i) % 10]}" for i in range(6)]
    config = write_config(
        "classes", [{"text": t, "label": f"LABEL_{i % 2}"} for i, t in enumerate(texts)], "classification", batch_size=4
    )
    assert evaluate(encoder_folder, config, tmp_path / "classes").exit_code == 0
    model = AutoModelForSequenceClassification.from_pretrained(encoder_folder)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    with torch.no_grad():
        best = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    kept = lines(tmp_path / "classes" / "samples_classification.jsonl")
    assert [row["text"] for row in kept] == texts
    assert [row["prediction"] for row in kept] == [f"LABEL_{place}" for place in best]
    assert [row["label"] for row in kept] == [f"LABEL_{i % 2}" for i in range(6)]
    scores = json.loads((tmp_path / "classes" / "results.json").read_text())
    assert sum(row["right"] for row in kept) / 6 == scores["accuracy"]

    one = tmp_path / "one"
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder_folder, num_labels=1, ignore_mismatched_sizes=True
    )
    model.save_pretrained(one)
    tokenizer.save_pretrained(one)
    config = write_config("numbers", [{"text": t, "label": i / 2} for i, t in enumerate(texts)], "regression")
    assert evaluate(one, config, tmp_path / "numbers").exit_code == 0
    kept = lines(tmp_path / "numbers" / "samples_regression.jsonl")
    with torch.no_grad():
        values = [float(model(**tokenizer(text, return_tensors="pt")).logits) for text in texts]
    assert [row["prediction"] for row in kept] == pytest.approx(values, abs=1e-5)
    assert [row["label"] for row in kept] == [i / 2 for i in range(6)]


def test_a_folder_of_something_else_is_left_alone(causal_folder, write_config, tmp_path):
    config = write_config("eval", questions(), metrics=["exact_match"], max_new_tokens=2)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "results.json").write_text('{"results": {}, "weights": "of the harness"}')
    result = evaluate(causal_folder, config, mine)
    assert result.exit_code == 2
    assert "is a file that this command has not written" in result.stderr
    assert [path.name for path in mine.iterdir()] == ["results.json"]
