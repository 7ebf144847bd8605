"""The loss and the scores of `scalora evaluate`, against TRL's and Transformers' own trainers on the same arguments."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import yaml
from conftest import WORDS
from datasets import Dataset
from evaluated import model_for, settings, variant
from sklearn.metrics import accuracy_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer
from typer.testing import CliRunner

from scalora.cli import app
from scalora.runs.errors import InputError
from scalora.runs.evaluate import loss_score, sequence_scores
from scalora.runs.scores import classification_scores, regression_scores

MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def texts(count=7):
    """Prompts and answers, each of other lengths than the next."""
    return [(f"say: {' '.join(WORDS[: 1 + i * 3 % 5])}", " " + " ".join(WORDS[: 1 + i * 2 % 7])) for i in range(count)]


PAIRS = [{"prompt": prompt, "completion": answer} for prompt, answer in texts()]
CHATS = [
    {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
    for prompt, answer in texts()
]
PLAIN = [{"text": prompt + answer} for prompt, answer in texts()]

CASES = {
    "pairs": (PAIRS, {}),
    "pairs, both scored": (PAIRS, {"completion_only_loss": False}),
    "pairs, answers alone": (PAIRS, {"completion_only_loss": True}),
    "pairs, cut": (PAIRS, {"max_length": 6}),
    "pairs, the end kept": (PAIRS, {"max_length": 6, "truncation_mode": "keep_end"}),
    "chats": (CHATS, {}),
    "chats, answers alone": (CHATS, {"assistant_only_loss": True}),
    "texts": (PLAIN, {"max_length": None}),
    "texts, packed": (PLAIN, {"packing": True, "max_length": 24}),
    "texts, packed for training alone": (PLAIN, {"packing": True, "eval_packing": False, "max_length": 24}),
    "texts, wrapped": (PLAIN, {"eval_packing": True, "packing_strategy": "wrapped", "max_length": 12}),
    "pairs, smoothed": (PAIRS, {"label_smoothing_factor": 0.2}),
    "pairs, weighted": (PAIRS, {"loss_type": "dft"}),
    "pairs, another end": (PAIRS, {"eos_token": "<end>"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_trls_trainer(case, tokenizer, tmp_path):
    rows, training = CASES[case]
    tokenizer = variant(tokenizer, "begins")
    tokenizer.chat_template = MARKED
    model, data = model_for(tokenizer), Dataset.from_list(rows)
    options = {"output_dir": str(tmp_path), "report_to": "none", "bf16": False, "use_cpu": True}
    # All in one batch, so that its mean over batches is one over tokens.
    arguments = SFTConfig(**training, **options, per_device_eval_batch_size=len(rows))
    twin = copy.deepcopy(tokenizer)
    trainer = SFTTrainer(copy.deepcopy(model), arguments, train_dataset=data, eval_dataset=data, processing_class=twin)
    expected = trainer.evaluate()["eval_loss"]
    for size in (2, 16):
        found = loss_score(
            copy.deepcopy(model), copy.deepcopy(tokenizer), data, "data", settings(training, batch_size=size)
        )
        assert found["loss"] == pytest.approx(expected, rel=1e-5)
    labels = trainer.eval_dataset["labels"]
    likelihood = []
    if "packing_strategy" not in training and not training.get("packing"):
        for ids, goal in zip(trainer.eval_dataset["input_ids"], labels, strict=True):
            with torch.no_grad():
                each = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            likelihood += [each[i, token].item() for i, token in enumerate(goal[1:]) if token != -100]
        assert found["perplexity"] == pytest.approx(math.exp(-np.mean(likelihood)), rel=1e-4)


def test_what_is_left_out_or_cut_off_is_counted(tokenizer):
    tokenizer = variant(tokenizer)
    model = model_for(tokenizer)
    rows = [
        {"prompt": "say: red", "completion": " red"},
        {"prompt": "say: red", "completion": " red blue green"},
        {"prompt": "say: red blue green black white", "completion": " red"},
    ]
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    limit = lengths[0] + 2
    assert lengths[2] >= limit
    with pytest.warns(UserWarning, match=r"training\.max_length") as caught:
        found = loss_score(model, tokenizer, Dataset.from_list(rows), "data", settings({"max_length": limit}))
    assert (found["loss_left_out"], found["loss_cut_off"]) == (1, 1)
    said = [str(warning.message) for warning in caught if "data 'data'" in str(warning.message)]
    assert said == [
        f"data 'data': 1 of 3 examples are left out: nothing to score is within training.max_length={limit} tokens",
        f"data 'data': 1 of 3 examples are cut off at training.max_length={limit} tokens",
    ]
    with pytest.raises(InputError, match="none of the 1 examples has a token to score"):
        loss_score(model, tokenizer, Dataset.from_list(rows[2:]), "data", settings({"max_length": limit}))


def test_arguments_that_don_t_fit_the_data_are_refused(tokenizer):
    tokenizer = variant(tokenizer)
    with pytest.raises(InputError, match="the loss can't be computed as training would"):
        loss_score(
            model_for(tokenizer), tokenizer, Dataset.from_list(PAIRS), "data", settings({"assistant_only_loss": True})
        )


@pytest.mark.slow
def test_the_command_gives_the_loss_that_training_logged(causal_folder, write_jsonl, tmp_path):
    data, config = write_jsonl("data.jsonl", PAIRS), tmp_path / "config.yaml"
    training = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "completion_only_loss": False,
        "max_length": 8,
    }
    files = {"train": str(data), "eval": str(data)}
    content = {"model": str(causal_folder), "output_dir": str(tmp_path / "run"), "data": files, "training": training}
    config.write_text(yaml.safe_dump(content))
    assert CliRunner().invoke(app, ["train", str(config)]).exit_code == 0
    output = tmp_path / "scores.json"
    words = ["evaluate", str(tmp_path / "run"), str(config), "--output", str(output), "--evaluate.batch_size", "5"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    scores = json.loads(output.read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert scores["loss"] == pytest.approx(summary["eval_loss"], rel=1e-4)
    assert scores["loss_cut_off"] > 0
    assert "loss_cut_off" in result.stdout
    assert "are cut off at training.max_length=8 tokens" in result.stderr


def labelled(task):
    rows = [f"{WORDS[i]} {' '.join(WORDS[: i * 3 % 8])}" for i in range(9)]
    labels = [f"LABEL_{i * i % 3 % 2}" for i in range(9)] if task == "classification" else [i % 4 / 3 for i in range(9)]
    return Dataset.from_dict({"text": rows, "label": labels})


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_scores_of_a_head_are_those_of_the_trainer(task, encoder_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    torch.manual_seed(0)
    classes = 2 if task == "classification" else 1
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder_folder, num_labels=classes, ignore_mismatched_sizes=True
    )
    model.classifier.weight.data.normal_()  # so that the outputs differ by more than rounding errors
    training = {"label_smoothing_factor": 0.3} if task == "classification" else {}
    data, names = labelled(task), ["LABEL_0", "LABEL_1"] if task == "classification" else None
    tokenised = [
        {
            **tokenizer(row["text"], truncation=True, max_length=5),
            "labels": names.index(row["label"]) if names else row["label"],
        }
        for row in data
    ]
    trainer = Trainer(
        copy.deepcopy(model),
        TrainingArguments(str(tmp_path), **training, report_to="none", per_device_eval_batch_size=9, use_cpu=True),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=classification_scores if names else regression_scores,
    )
    expected = trainer.evaluate(Dataset.from_list(tokenised))
    for size in (2, 16):
        with pytest.warns(UserWarning, match="truncated to 5 tokens"):
            found = sequence_scores(
                model,
                tokenizer,
                data,
                "data",
                settings(training, {"max_tokens": 5}, task, batch_size=size),
                names,
            )
        for name, value in found.items():
            if name != "truncated":
                assert value == pytest.approx(expected[f"eval_{name}"], rel=1e-4, abs=1e-6)
        assert found["truncated"] == sum(len(tokenizer(text)["input_ids"]) > 5 for text in data["text"]) > 0


def test_outputs_that_are_no_numbers_have_no_scores():
    labels = np.array([0, 1, 0])
    logits = np.array([[1.0, 0.0], [math.nan, 2.0], [0.0, 1.0]])
    assert all(map(math.isnan, classification_scores(EvalPrediction(logits, labels)).values()))
    assert all(map(math.isnan, regression_scores(EvalPrediction(logits[:, :1], labels)).values()))
    one = regression_scores(EvalPrediction(np.array([[0.5]]), np.array([1.0])))
    assert math.isnan(one["pearson"])
    assert math.isnan(one["spearman"])
    assert one["mse"] == 0.25


def test_the_scores_of_a_model_with_more_outputs_are_those_of_its_head():
    labels, logits = np.array([0, 1, 1]), np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    found = classification_scores(EvalPrediction((logits, np.zeros((3, 7))), labels))
    assert found["accuracy"] == accuracy_score(labels, logits.argmax(-1))
